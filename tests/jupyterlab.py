"""A JupyterLab that is nobody's: on a free port, with settings, runtime files and notebooks of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

HERE = importlib.util.find_spec("jupyterlab") is not None
WHY = "needs JupyterLab, to see the widget where it is used"
_QUIET: dict[str, dict[str, object]] = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    }
}
_DEADLINE_S = 30.0  # until it answers; a busy machine takes 10 s


@contextmanager
def serving(root: Path, private: Path, *, settings: dict[str, dict[str, object]] | None = None) -> Iterator[str]:
    """Serve the notebooks under `root`, with everything else under `private`; give the address, a {} for the notebook.

    `settings` are by plugin.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(private / name.lower())
    environment |= {"HOME": str(private), "IPYTHONDIR": str(private / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}
    for plugin, values in (_QUIET | (settings or {})).items():
        extension, name = plugin.split(":")
        file = private / "config" / "lab" / "user-settings" / extension / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    token = secrets.token_urlsafe(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--allow-root"]
    with (private / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        port = _port(private, process)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        process.send_signal(signal.SIGTERM)  # twice at a terminal, once here: its kernels end with it
        try:
            process.wait(_DEADLINE_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _port(private: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        for file in (private / "runtime").glob("jpserver-*.json"):
            text = file.read_text()
            if text.endswith("}"):
                return int(json.loads(text)["port"])
        time.sleep(0.05)
    raise AssertionError((private / "log.txt").read_text())


def write_notebook(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)

"""The commands `archive` and `status`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slidescan import cli
from slidescan.archive import archive_status
from slidescan.errors import ConfigError
from tests.archives import write_slide


class TestCommands:
    def test_archive_and_status(self, tmp_path: Path) -> None:
        """With the bundled detector; the exit code says that something failed, and the lines say what."""
        write_slide(tmp_path / "in/a.tiff", 1)
        (tmp_path / "in/b.svs").write_bytes(b"no slide")
        command = [sys.executable, "-m", "slidescan.cli"]
        run = [*command, "archive", str(tmp_path / "in"), "-o", str(tmp_path / "runs"), "--workers", "1"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "b: failed, open_error: OpenSlide cannot open it"
        )  # and nothing else: this is no terminal
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr
        assert "slides      2: 1 done, 1 failed, 0 to do" in done.stdout
        told = json.loads(subprocess.check_output([*command, "status", str(tmp_path / "runs"), "--json"]))
        assert (told["done"], told["failed"]) == (1, {"open_error": 1})
        (tmp_path / "in/notes.png").touch()
        again = subprocess.run([*run, "--dry-run"], capture_output=True, text=True, check=True)
        assert again.stdout.startswith("slides      2, all on record: nothing to do")
        assert again.stderr == f"slidescan: {tmp_path / 'in'}: 2 slides; left out files of other kinds: 1 .png\n"

    def test_sigterm_ends_it_soon_and_it_continues(self, tmp_path: Path) -> None:
        for seed in range(6):  # three are in flight
            write_slide(tmp_path / f"in/{seed}.tiff", seed)
        command = [sys.executable, "-m", "slidescan.cli", "archive", str(tmp_path / "in"), "-o", str(tmp_path / "runs")]
        run = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 300
        while not list((tmp_path / "runs").glob("records/*.json")) and time.monotonic() < until:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(timeout=0.02)
            assert run.poll() is None
        run.terminate()
        _, said = run.communicate(timeout=60)
        assert run.returncode == 3
        assert "run the same command to continue" in said
        assert "Traceback" not in said
        assert archive_status(tmp_path / "runs").done >= 1
        assert not archive_status(tmp_path / "runs").running
        assert archive_status(tmp_path / "runs").left >= 1

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--shard", "x"], "--shard must be i/n"),
            (["--shard", "0/0", "--dry-run"], "--shard must be i/n"),
            (["--retry-failed=x"], "--retry-failed must be one of not_found"),
            (["--retry-failed=no_tissue"], "--retry-failed must be one of not_found"),  # it did not fail
        ],
    )
    def test_usage(self, tmp_path: Path, options: list[str], told: str) -> None:
        command = [sys.executable, "-m", "slidescan.cli", "archive", str(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert told in done.stderr
        assert np.size(done.stderr.strip().splitlines()) == 1

    @pytest.mark.parametrize(
        ("options", "asked"),
        [
            ([], False),
            (["--retry-failed"], True),
            (["--retry-failed", "--workers", "1"], True),
            (["--retry-failed", "killed"], "killed"),
            (["--retry-failed=killed"], "killed"),
        ],
    )
    def test_what_to_retry(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], asked: bool | str
    ) -> None:
        """All that failed, or what failed for one reason; wherever the option stands."""
        (tmp_path / "a.svs").touch()
        seen = []

        def scan_archive(*_: object, retry_failed: bool | str, **__: object) -> None:
            seen.append(retry_failed)
            raise ConfigError("enough")

        monkeypatch.setattr("slidescan.archive.scan_archive", scan_archive)
        for arguments in ([str(tmp_path), *options], [*options, str(tmp_path)]):
            monkeypatch.setattr(sys, "argv", ["slidescan", "archive", *arguments])
            with pytest.raises(SystemExit):
                cli.main()
        assert seen == [asked, asked]

    def test_what_another_run_has_is_not_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A slide without a record is told: who calls this from a script must not take it for done."""
        for name in "abc":
            (tmp_path / f"{name}.svs").touch()
        monkeypatch.setattr("slidescan.archive.scan_archive", lambda *_, **__: [])
        monkeypatch.setattr("slidescan.cli_archive.status", lambda *_: None)
        for options, told in (
            ([], "3 of the slides are not done"),
            (["--shard", "2/2"], "1 of the slides is not done"),
        ):
            monkeypatch.setattr(sys, "argv", ["slidescan", "archive", str(tmp_path), *options])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 3
            assert told in capsys.readouterr().err


def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    """Worker processes import the script that started them; one line says what that asks of it."""
    write_slide(tmp_path / "in" / "a.tiff", 1)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport slidescan as ss\nfrom slidescan.endings import ends_in_a_line\n"
        "from tests.discs import ORACLE\n"
        "with ends_in_a_line('script'):\n    ss.scan_archive(sys.argv[1], ORACLE, out=sys.argv[2], workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, script, tmp_path / "in", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert 'does it below `if __name__ == "__main__":`' in line

"""A Chromium without a window, driven over its DevTools protocol: pages, keys, what a script returns, pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY = "needs Chromium, to see what a browser makes of the page"
_DEADLINE_S = 30.0  # of one wait; a busy machine takes a second
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Tab": 9, "Enter": 13}
_SHIFT, _CONTROL = 8, 2  # as the protocol counts modifiers


class _ElsewhereError(Exception):
    """The page was left while a script ran in it."""


class Tab:
    """One tab; every wait has a deadline."""

    def __init__(self, profile: Path, *, size_wh: tuple[int, int] = (1400, 900)) -> None:
        assert CHROMIUM is not None
        width, height = size_wh
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--hide-scrollbars", "about:blank"]
        self.said: list[str] = []
        """What the page wrote to the console, and what it was refused."""
        self.thrown: list[str] = []
        """Errors that nothing in the page caught: no wait outlasts one."""
        self.dialogs: list[str] = []
        """Kinds of dialogs that opened; they are answered with yes."""
        self.asked: list[str] = []
        """URLs it asked for."""
        self._loop = asyncio.new_event_loop()
        self._n = 0
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(self._connect(profile / "DevToolsActivePort"))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            self.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        except BaseException:
            self.close()
            raise

    async def _connect(self, file: Path) -> None:
        port = None
        for _ in _until("Chromium to start"):
            with contextlib.suppress(OSError, IndexError):
                port = file.read_text().splitlines()[0]
            if port:
                break
            await asyncio.sleep(0.02)
        self._http = aiohttp.ClientSession()
        async with self._http.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (page,) = (each for each in await answer.json() if each["type"] == "page")
        self._socket = await self._http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), _DEADLINE_S))

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._n += 1
        await self._socket.send_json({"id": self._n, "method": method, "params": parameters})
        while True:
            told = await self._socket.receive_json()
            if told.get("id") == self._n:
                if "navigated" in told.get("error", {}).get("message", ""):
                    raise _ElsewhereError
                assert "error" not in told, told
                return told["result"]
            if told.get("method") == "Page.javascriptDialogOpening":  # the page waits for an answer: yes
                self.dialogs.append(told["params"]["type"])
                yes = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                await self._socket.send_json(yes)
            self._heard(told)

    def _heard(self, told: dict[str, Any]) -> None:
        method, said = told.get("method"), told.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(each.get("value", each.get("description"))) for each in said["args"]))
        elif method == "Runtime.exceptionThrown":
            self.thrown.append(str(said["exceptionDetails"].get("exception", {}).get("description", said)))
        elif method == "Log.entryAdded":
            self.said.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(said["request"]["url"])

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        told = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return it."""
        for _ in _until(script, self.said):
            assert not self.thrown, self.thrown
            with contextlib.suppress(_ElsewhereError):
                if value := self.run(script):
                    return value
                self.run("new Promise((done) => requestAnimationFrame(done))")
        raise AssertionError

    def press(self, key: str, *, shift: bool = False, control: bool = False, repeats: bool = False) -> None:
        """Press and release a key."""
        code = _CODES.get(key) or ord(key.upper())
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT * shift + _CONTROL * control}
        text = {"text": key} if len(key) == 1 and not control else {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", autoRepeat=repeats, **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the first element of a selector."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        async def end() -> None:
            for each in (getattr(self, "_socket", None), getattr(self, "_http", None)):
                if each is not None:
                    await each.close()

        self._process.terminate()
        self._process.wait(_DEADLINE_S)
        self._loop.run_until_complete(end())
        self._loop.close()

    def __enter__(self) -> Tab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _until(what: str, said: list[str] | None = None) -> Iterator[None]:
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end:
        yield
    raise AssertionError(f"waited {_DEADLINE_S:g} s for {what}; the page said {said}")

"""A real headless Chromium for tests, driven over the DevTools protocol.

`screenshot` is the whole of it for most tests: open a page, wait for text, take a picture, return the page's DOM.
`visit` also returns what the browser asked the network for, and runs scripts in the page.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

Colour = tuple[int, int, int]

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--mute-audio",
    "--force-device-scale-factor=1",
    "--remote-debugging-port=0",
)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What a visit left.

    Attributes:
        dom: the page's HTML after it rendered.
        text: what a person reads on it.
        requested: every URL that the page asked for, favicon and ``data:`` left out.
        boxes: per selector of ``boxes``: ``(left, top, right, bottom)`` in pixels of the screenshot, per element.
    """

    dom: str
    text: str
    requested: tuple[str, ...]
    boxes: dict[str, list[tuple[int, int, int, int]]]


def chromium() -> str:
    """The browser's path; skips the test when there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium on PATH: install it, with `apt-get install chromium` for example")


def screenshot(url: str, path: Path, wait_for_text: Sequence[str] = (), *, timeout_s: float = 40.0) -> str:
    """Open ``url``, wait until every text of ``wait_for_text`` is on the page, write a PNG; returns the DOM.

    Raises:
        AssertionError: a text did not appear in time; the message holds the page's text. The PNG is written anyway.
    """
    return visit(url, path, wait_for_text=wait_for_text, timeout_s=timeout_s).dom


def visit(
    url: str,
    path: Path,
    *,
    wait_for_text: Sequence[str] = (),
    steps: Sequence[str] = (),
    wait_for_picture: Callable[[Image.Image], bool] | None = None,
    boxes: Sequence[str] = (),
    size: tuple[int, int] = (1400, 1000),
    timeout_s: float = 40.0,
) -> Visit:
    """Open ``url`` and look at it.

    Args:
        url: what to open.
        path: where the PNG goes.
        wait_for_text: texts that must all be readable on the page before the picture.
        steps: JavaScript expressions, each evaluated again and again until it is truthy, one after the other, after
            the page has loaded and before the waiting for text.
        wait_for_picture: pictures are taken until it says True.
        boxes: CSS selectors whose elements' places are wanted.
        size: of the window.
        timeout_s: for everything together.

    Raises:
        AssertionError: something did not come in time.
    """
    binary = chromium()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [binary, *_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            endpoint = _endpoint(Path(profile), process, timeout_s)
            task = _visit(endpoint, url, path, wait_for_text, steps, wait_for_picture, boxes, size, timeout_s)
            return asyncio.run(task)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def count_colour(picture: Image.Image, colour: Colour, tolerance: int = 12) -> int:
    """How many pixels of ``picture`` are ``colour``, each channel within ``tolerance``."""
    return len(colour_points(picture, colour, tolerance))


def colour_points(picture: Image.Image, colour: Colour, tolerance: int = 12) -> list[tuple[int, int]]:
    """``(x, y)`` of the pixels of ``picture`` that are ``colour``, each channel within ``tolerance``."""
    rgb = picture.convert("RGB")
    width = rgb.width
    data = rgb.tobytes()
    red, green, blue = colour
    return [
        (i % width, i // width)
        for i in range(width * rgb.height)
        if abs(data[3 * i] - red) <= tolerance
        and abs(data[3 * i + 1] - green) <= tolerance
        and abs(data[3 * i + 2] - blue) <= tolerance
    ]


def _endpoint(profile: Path, process: subprocess.Popen[bytes], timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    port_file = profile / "DevToolsActivePort"
    while time.monotonic() < deadline:
        assert process.poll() is None, f"chromium exited with {process.returncode}"
        if port_file.exists() and len(lines := port_file.read_text().splitlines()) == 2:
            return f"http://127.0.0.1:{lines[0]}"
        time.sleep(0.05)
    raise AssertionError(f"chromium did not open its debugging port in {timeout_s} s")


class _Tab:
    """One page over a DevTools websocket: numbered calls, and events that are collected in between."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requested: list[str] = []
        self._socket = socket
        self._last_id = 0

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        self._last_id += 1
        await self._socket.send_json({"id": self._last_id, "method": method, "params": params})
        while True:
            message = json.loads(await self._socket.receive_str())
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._last_id:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    async def evaluate(self, expression: str) -> Any:
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, f"{expression}: {reply['exceptionDetails']}"
        return reply["result"].get("value")

    async def picture(self) -> bytes:
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


async def _visit(
    endpoint: str,
    url: str,
    path: Path,
    wait_for_text: Sequence[str],
    steps: Sequence[str],
    wait_for_picture: Callable[[Image.Image], bool] | None,
    boxes: Sequence[str],
    size: tuple[int, int],
    timeout_s: float,
) -> Visit:
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
        async with session.get(f"{endpoint}/json/list") as reply:
            pages = [page for page in await reply.json() if page["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            await tab.call("Page.enable")
            await tab.call("Network.enable")
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
            )
            await tab.call("Page.navigate", url=url)
            try:
                for step in steps:
                    await _until(deadline, f"{step} to be true", functools.partial(tab.evaluate, step))
                await _until(deadline, f"{list(wait_for_text)} on the page", lambda: _has(tab, wait_for_text))
                await _until(deadline, "the picture to be as expected", lambda: _looks(tab, wait_for_picture))
            except AssertionError as error:
                raise AssertionError(f"{error}; the page says: {(await _text(tab))[:2000]!r}") from error
            finally:
                path.write_bytes(await tab.picture())  # noqa: ASYNC240 - nothing else runs in this loop
            places = {selector: await tab.evaluate(_BOXES % json.dumps(selector)) for selector in boxes}
            return Visit(
                dom=await tab.evaluate("document.documentElement.outerHTML"),
                text=await _text(tab),
                requested=tuple(u for u in tab.requested if not u.startswith(("data:", "blob:", "about:"))),
                boxes={
                    selector: [(round(b[0]), round(b[1]), round(b[2]), round(b[3])) for b in found]
                    for selector, found in places.items()
                },
            )


_BOXES = """[...document.querySelectorAll(%s)].map(e => {
    const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"""


async def _text(tab: _Tab) -> str:
    return str(await tab.evaluate("document.body ? document.body.innerText : ''") or "")


async def _has(tab: _Tab, texts: Sequence[str]) -> bool:
    text = await _text(tab)
    return all(wanted in text for wanted in texts)


async def _looks(tab: _Tab, expected: Callable[[Image.Image], bool] | None) -> bool:
    return expected is None or expected(Image.open(io.BytesIO(await tab.picture())))


async def _until(deadline: float, what: str, check: Callable[[], Awaitable[Any]]) -> None:
    while not await check():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.1)

"""Tests of the page in Debian's headless Chromium, against a stand-in for the service that serves the real page.

.venv/bin/python -I -m pytest -q .ci/test_page.py [-k ...]; with PAGE_PICTURES=folder it takes README's pictures.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import storyteller_automation as service  # noqa: E402
import test_storyteller_automation as tests  # noqa: E402

PATIENCE = 20.0
TOKEN = "a-token-of-the-tests-0123456789"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of a reference to an element, in the WebDriver protocol
AXE = "axe-playwright-python==0.1.8"  # a package that holds axe-core; nothing else of it is used
TAB, ENTER, ESCAPE = "\ue004", "\ue007", "\ue00c"
NOW = 1_780_000_000_000
MINUTE = 60_000


def wait_until(condition: Callable[[], Any], message: str = "") -> Any:
    """Waits until it is true; returns its value."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, message or "it never became true"
        time.sleep(0.02)
    return found


# The stand-in for the service ------------------------------------------------------------------------


def gpu(at: int = NOW, **changed: Any) -> dict[str, Any]:
    known = {"available": True, "gpuCount": 1, "utilization": 45, "memoryUsed": 8192, "memoryTotal": 24576}
    return {**known, "temperature": 65, "processCount": 1, "error": None, "at": at, **changed}


def session(number: int, step: str, done: int = 0, **changed: Any) -> dict[str, Any]:
    known = {"sessionTimestamp": NOW - (10 - number) * 1000, "step": step, "totalBeats": 48, "totalPrompts": done}
    more = {"promptsNeeded": 48, "title": f"Title {number}", "episodeNumber": number, "storyUuid": "u"}
    return {**known, **more, "lastUpdated": service.iso_time(NOW - 12_000), **changed}


def notification(number: int, type: str = "prompts_ready", **changed: Any) -> dict[str, Any]:
    total = "totalBeats" if type == "beats_ready" else "totalPrompts"
    known = {"id": f"notif {number}", "type": type, "sessionTimestamp": NOW - (10 - number) * 1000, "storyUuid": "u"}
    return {**known, "episodeNumber": number, total: 48, "timestamp": service.iso_time(NOW - 25_000), **changed}


def alert(kind: str, state: str = "raised", **changed: Any) -> dict[str, Any]:
    known = {"kind": kind, "state": state, "text": f"Trouble: {kind}.", "since": NOW - 90_000}
    return {**known, "until": NOW - 5000 if state == "ended" else None, **changed}


def swarmui(state: str = "ready", **changed: Any) -> dict[str, Any]:
    queue = {"waiting": 3, "live": 2, "loading": 0, "waitingBackends": 0}
    known = {"state": state, "since": service.iso_time(NOW - 9000), "ours": True, "pid": 1, "port": 7801}
    more = {"apiUrl": "http://localhost:7801", "version": "0.9", "startedAt": None, "startingFor": None}
    last = {"lastError": None, "idleFor": 0, "queue": queue if state == "ready" else None}
    return {**known, **more, **last, "backends": {"status": "running", "message": ""}, "logTail": [], **changed}


def state(**changed: Any) -> dict[str, Any]:
    known = {"version": "1.0.0", "store": "sqlite", "storeUp": True, "startedAt": NOW - 65 * MINUTE}
    history = [gpu(NOW - age * 5000, utilization=50 + age % 40) for age in range(170, 0, -1) if not 60 < age < 90]
    sessions = [session(4, "prompts", 31), session(3, "beats_ready"), session(2, "ready", 48), session(1, "saved")]
    return {
        "gpu": gpu(), "gpuHistory": history, "reservation": None, "swarmui": swarmui(), "alerts": [],
        "notifications": [notification(2), notification(3, "beats_ready"), notification(4, "beats_ready")],
        "sessions": sessions,
        "service": {**known, "addresses": ["http://localhost:8000"], "now": NOW}, **changed,
    }  # fmt: skip


class StandIn:
    """Responds as the service does, with what a test sets."""

    def __init__(self) -> None:
        self.state, self.log, self.page = state(), "[Init] one\n[Init] two\n", service.PAGE
        self.answers: dict[str, tuple[int, Any]] = {}  # by path; without one, a POST succeeds
        self.calls: list[str] = []  # of POSTs
        self.opened = 0  # event streams so far
        self.streams: list[queue.Queue[bytes | None]] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def answer(self) -> None:
                path = self.path.partition("?")[0]
                authorized = self.headers["Authorization"] == f"Bearer {TOKEN}"
                status, body = outer.answers.get(self.path, outer.answers.get(path, (200, {"success": True})))
                if not authorized:
                    status, body = 401, {"error": "The token is unknown, revoked or has expired: ask for another one."}
                self.respond(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.calls.append(self.path)
                self.answer()

            def do_GET(self) -> None:
                path, authorized = self.path.partition("?")[0], self.headers["Authorization"] == f"Bearer {TOKEN}"
                if path == "/":
                    self.respond(200, outer.page.encode(), service.page_headers(outer.page))
                elif path == "/api/v1/swarmui/logs" and authorized:
                    lines = outer.log.splitlines(keepends=True)[-200:]
                    self.respond(200, "".join(lines).encode(), {"Content-Type": "text/plain; charset=utf-8"})
                elif path == "/api/v1/events" and authorized and path not in outer.answers:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    self.send_events()
                else:
                    self.answer()

            def send_events(self) -> None:
                self.close_connection = True
                events: queue.Queue[bytes | None] = queue.Queue()
                events.put(event("state", outer.state))
                outer.streams.append(events)
                outer.opened += 1
                self.connection.setblocking(False)
                with contextlib.suppress(OSError):
                    while True:
                        with contextlib.suppress(queue.Empty):
                            part = events.get(timeout=0.05)
                            if part is None:
                                break
                            self.connection.setblocking(True)
                            self.connection.sendall(part)
                            self.connection.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            if not self.connection.recv(1):
                                break
                outer.streams.remove(events)

            def log_message(self, *_: object) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = allow_reuse_address = True

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    def send(self, name: str, data: Any) -> None:
        for stream in self.streams:
            stream.put(event(name, data))

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.end_streams()

    def end_streams(self) -> None:
        for stream in list(self.streams):
            stream.put(None)


def event(name: str, data: Any) -> bytes:
    return f"id: {name}\nevent: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


# The browser -----------------------------------------------------------------------------------------


class Browser:
    """Chromium, by the WebDriver protocol."""

    def __init__(self) -> None:
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.driver.stdout or () if "successfully on port" in line)
        port = re.search(r"on port (\d+)", line)[1]  # type: ignore[index]
        self._url = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--disable-gpu", "--no-first-run", "--force-device-scale-factor=1"]
        arguments += ["--no-sandbox"] * (os.getuid() == 0)
        options = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].partition("\n")[0]) from None

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("DELETE", "")
        self.driver.terminate()
        self.driver.wait(PATIENCE)
        self.driver.stdout.close()  # type: ignore[union-attr]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def go(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def tree(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Role, name and properties of each node of the accessibility tree."""
        nodes = self.cdp("Accessibility.getFullAXTree")["nodes"]
        return [
            (
                node["role"]["value"],
                node.get("name", {}).get("value", ""),
                {entry["name"]: entry["value"].get("value") for entry in node.get("properties", ())}
                | {"id": node.get("backendDOMNodeId")},
            )
            for node in nodes
            if not node["ignored"]
        ]

    def names(self, role: str) -> list[str]:
        return [name for found, name, _ in self.tree() if found == role]

    def text(self, region: str = "") -> str:
        """The visible text of a region, or of the whole page."""
        where = f'section[aria-label="{region}" i]' if region else "body"
        return str(self.run("return document.querySelector(arguments[0]).innerText", where))

    def wait_for(self, words: str, region: str = "") -> None:
        """Waits until a region, or the page, shows these words."""
        wait_until(lambda: words in self.text(region), f"{words!r} is not in {region or 'the page'}")

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def reach(self, name: str) -> None:
        """Presses Tab until the control of that name has the focus."""
        for _ in range(60):
            if self.focus() == name:
                return
            self.press(TAB)
        raise AssertionError(f"Tab does not reach {name}")

    def focus(self) -> str:
        script = "const e = document.activeElement; return e.ariaLabel ?? (e.labels?.[0] ?? e).textContent.trim()"
        return str(self.run(script))

    def click(self, name: str) -> None:
        script = """return [...document.querySelectorAll("button")].find((button) => button.checkVisibility() &&
            (button.ariaLabel ?? button.textContent) === arguments[0])"""
        found = wait_until(lambda: self.run(script, name), f"there is no button {name}")
        self.call("POST", f"/element/{found[ELEMENT]}/click")

    def size(self, width: int, height: int = 900) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name: str) -> None:
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def messages(self) -> list[str]:
        """Errors in the console, except those of the network."""
        found = [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]
        return [text for text in found if "Failed to load resource" not in text and "net::ERR" not in text]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with contextlib.closing(Browser()) as made:
        yield made


@pytest.fixture
def server() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.stop()


@pytest.fixture
def browser(chromium: Browser, server: StandIn) -> Iterator[Browser]:
    """Chromium without any data of another test. Fails the test if the page logs an error."""
    chromium.size(1280)
    chromium.theme("light")
    chromium.go(f"http://127.0.0.1:{server.port}/")
    chromium.run("localStorage.clear(); sessionStorage.clear()")
    chromium.messages()
    yield chromium
    assert chromium.messages() == []


@pytest.fixture
def open_page(browser: Browser, server: StandIn) -> Callable[..., Browser]:
    def open_with(**changed: Any) -> Browser:
        server.state = state(**changed)
        browser.go("about:blank")
        browser.go(f"http://127.0.0.1:{server.port}/#token={TOKEN}")
        wait_until(lambda: server.streams and browser.run("return !document.querySelector('#parts').hidden"))
        return browser

    return open_with


@pytest.fixture
def shorten_wait(server: StandIn) -> Callable[[str], None]:
    """Divides a waiting time of the page, given as it is written there, by 100."""

    def shorten(wait: str) -> None:
        assert server.page.count(wait) == 1
        server.page = server.page.replace(wait, str(int(wait) // 100))

    return shorten


# The token -------------------------------------------------------------------------------------------


def test_the_page_asks_for_a_token_and_opens_with_it(browser, server):
    tree = browser.tree()
    assert [name for role, name, _ in tree if role == "textbox"] == ["Token"]
    assert [name for role, name, _ in tree if role == "button"] == ["Open"]
    assert "./run.sh page" in browser.text()
    browser.reach("Token")
    browser.press(*"wrong", ENTER)
    browser.wait_for("The token is unknown, revoked or has expired")
    assert browser.focus() == "Token"
    browser.press(*TOKEN, ENTER)
    browser.wait_for("All is well")


def test_the_links_token_is_removed_from_address_and_history_and_kept_for_the_tab(open_page, server):
    browser = open_page()
    url = f"http://127.0.0.1:{server.port}/"
    assert browser.run("return [location.href, localStorage.length]") == [url, 0]
    history = browser.cdp("Page.getNavigationHistory")["entries"]
    assert [entry["url"] for entry in history if "token" in entry["url"]] == []
    browser.call("POST", "/refresh")
    browser.wait_for("All is well")


def test_a_link_that_is_opened_in_the_open_page_sets_its_token(browser, server):
    browser.run(f"location.hash = 'token={TOKEN}'")
    browser.wait_for("All is well")
    assert browser.run("return location.hash") == ""
    assert not [page for page in browser.cdp("Page.getNavigationHistory")["entries"] if "token" in page["url"]]


def test_a_token_is_remembered_on_the_device_until_it_is_forgotten(browser, server):
    browser.reach("Token")
    browser.press(*TOKEN)
    browser.reach("Remember on this device")
    browser.press(" ", ENTER)
    browser.wait_for("All is well")
    assert browser.run("return [localStorage.length, sessionStorage.length]") == [1, 0]
    browser.call("POST", "/refresh")
    browser.wait_for("All is well")
    browser.run("document.querySelector('section .remember').click()")
    assert browser.run("return [localStorage.length, sessionStorage.length]") == [0, 1]
    browser.run("document.querySelector('section .remember').click()")
    browser.click("Forget the token")
    assert browser.names("button") == ["Open"]
    assert browser.run("return [localStorage.length, sessionStorage.length]") == [0, 0]
    wait_until(lambda: not server.streams)


def test_another_tab_keeps_its_token_when_the_box_is_unticked_but_not_when_the_token_is_forgotten(open_page, server):
    browser = open_page()
    stored, tick = "return [localStorage.length, sessionStorage.length]", "$('section .remember').click()"
    browser.run(tick)
    first, second = browser.call("GET", "/window"), browser.call("POST", "/window/new", {"type": "tab"})["handle"]
    try:
        browser.call("POST", "/window", {"handle": second})
        browser.go(f"http://127.0.0.1:{server.port}/")
        browser.wait_for("All is well")
        browser.run(tick)
        browser.call("POST", "/window", {"handle": first})
        wait_until(lambda: browser.run(stored) == [0, 1])
        browser.run(tick)
        browser.call("POST", "/window", {"handle": second})
        browser.click("Forget the token")
    finally:
        browser.call("POST", "/window", {"handle": second})
        browser.call("DELETE", "/window")
        browser.call("POST", "/window", {"handle": first})
    wait_until(lambda: browser.names("button") == ["Open"])
    assert browser.run(stored) == [0, 0]


def test_the_page_asks_for_another_token_when_its_token_expires(open_page, server):
    browser = open_page(swarmui=swarmui("stopped"))
    server.answers["/api/v1/swarmui/start"] = 401, {"error": "The token has expired."}
    browser.click("Start SwarmUI")
    browser.wait_for("The token has expired.")
    assert (browser.names("button"), browser.focus()) == (["Open"], "Token")


def test_the_page_names_the_permission_that_a_request_lacks(browser, server, open_page):
    server.answers["/api/v1/swarmui/start"] = 403, {"error": "This token lacks the permission swarmui:control."}
    browser = open_page(swarmui=swarmui("stopped"))
    browser.click("Start SwarmUI")
    browser.wait_for("lacks the permission swarmui:control", "SwarmUI")
    server.answers["/api/v1/events"] = 403, {"error": "This token lacks the permission events:read."}
    browser.call("POST", "/refresh")
    browser.wait_for("lacks the permission events:read")


@pytest.mark.parametrize("status", [404, 429])
def test_the_page_forgets_no_token_because_of_a_status_that_says_nothing_about_it(open_page, server, status):
    browser = open_page()
    browser.run("$('section .remember').click()")
    server.answers["/api/v1/events"] = status, {"detail": "from another program on the port"}
    server.end_streams()
    seen = "return performance.getEntriesByType('resource').some((one) => one.responseStatus === arguments[0])"
    wait_until(lambda: browser.run(seen, status))
    del server.answers["/api/v1/events"]
    browser.wait_for("All is well")
    assert browser.run("return localStorage.length") == 1


def test_a_region_names_the_permission_that_it_lacks(browser, server, open_page):
    server.state = state()
    browser = open_page()
    del server.state["gpu"], server.state["sessions"]
    browser.call("POST", "/refresh")
    browser.wait_for("lacks the permission gpu:read", "GPU")
    browser.wait_for("lacks the permission sessions:read", "Sessions")


# The regions -----------------------------------------------------------------------------------------


def test_regions_have_names_and_the_header_summarizes_them(open_page):
    browser = open_page()
    names = [name.lower() for name in browser.names("region")]
    assert names == ["alerts", "sessions", "gpu", "swarmui", "notifications", "service"]
    well = "All is well: 2 sessions in progress"
    assert browser.run("return document.querySelector('[role=status]').innerText") == well
    assert browser.run("return document.title").startswith(well)


def test_an_alert_and_its_end_show_in_header_title_icon_and_region(open_page, server):
    browser = open_page()
    icon = browser.run("return document.querySelector('link').href")
    server.send("alert", alert("gpu_hot"))
    browser.wait_for("Trouble: gpu_hot.", "Alerts")
    assert "for 1 min" in browser.text("Alerts")
    assert browser.run("return [document.querySelector('[role=status]').innerText]") == ["Trouble: gpu_hot."]
    assert browser.run("return document.title").startswith("Trouble: gpu_hot.")
    assert browser.run("return document.querySelector('link').href") != icon
    for kind in ("a", "b", "c"):
        server.send("alert", alert(kind))
        server.send("alert", alert(kind, "ended", until=NOW - 5000 + ord(kind)))
    server.send("alert", alert("gpu_hot", "ended", until=NOW))
    browser.wait_for("All is well")
    assert re.findall(r"Trouble: (\w+)", browser.text("Alerts")) == ["gpu_hot", "c", "b"]


def test_a_raised_alert_stays_while_many_others_begin_and_end(open_page, server):
    browser = open_page()
    server.send("alert", alert("gpu_hot"))
    for number in range(60):
        server.send("alert", alert("disk", since=number))
        server.send("alert", alert("disk", "ended", since=number, until=NOW + number))
    server.send("alert", alert("last"))
    browser.wait_for("Trouble: last.", "Alerts")
    assert "Trouble: gpu_hot." in browser.text("Alerts")
    assert browser.run("return document.querySelector('[role=status]').innerText") == "Trouble: gpu_hot. (and 1 more)"


def test_a_session_shows_its_steps(open_page, server):
    browser = open_page(sessions=[session(number, "acknowledged", 48) for number in range(1, 10)])
    shown = browser.text("Sessions")
    assert "Episode 9 · Title 9" in shown and "Episode 1 ·" not in shown
    server.send("session", session(10, "prompts", 31))
    browser.wait_for("Episode 10 · Title 10", "Sessions")
    script = "return [...document.querySelectorAll('.session:first-child li')].map((e) => [e.innerText, e.ariaCurrent])"
    words = [["Saved", None], ["Beats ready", None], ["31 of 48 prompts", "step"], ["Ready", None]]
    assert browser.run(script) == [*words, ["Acknowledged", None]]
    colour = """return [0, 1, 3].map((place) => getComputedStyle(
        document.querySelectorAll('.session:first-child li')[place], '::before').backgroundColor)"""
    done, same, later = browser.run(colour)
    assert done == same != later
    bars = [found for found in browser.tree() if found[0] == "progressbar"]
    assert (len(bars), bars[0][1], bars[0][2]["valuemax"]) == (8, "Title 10", 48)
    assert re.search(r"\b[1-5]\d s ago", shown)
    server.send("session", {"sessionTimestamp": session(10, "")["sessionTimestamp"], "step": "deleted"})
    browser.wait_for("Episode 2 · Title 2", "Sessions")
    assert "Episode 10" not in browser.text("Sessions")


def test_the_page_counts_the_newest_50_sessions(open_page, server):
    browser = open_page(sessions=[session(number, "prompts") for number in range(50)])
    server.send("session", session(50, "prompts"))
    browser.wait_for("Episode 50 · Title 50", "Sessions")
    assert "50 sessions in progress" in browser.text()


@pytest.mark.parametrize(
    ("ending", "shown"),
    [(None, "Not known"), ("", "None ends within 3 days"), ("storyart (then)", "End soon: storyart (then)")],
)
def test_tokens_that_end_soon_are_shown(open_page, ending, shown):
    browser = open_page(service={**state()["service"], "tokensEnding": ending})
    browser.wait_for(shown, "Service")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "Free"),
        ({"utilization": 80}, "Busy"),
        ({"memoryUsed": 24576 - 4096}, "Busy"),
        ({"temperature": 85}, "Busy"),
        ({"available": False, "error": "reserved by me until then"}, "Busy"),
    ],
)
def test_the_gpu_region_shows_figures_and_whether_the_gpu_is_free_by_storyarts_rule(open_page, server, changed, word):
    browser = open_page(gpu=gpu(**changed))
    shown = " ".join(browser.text("GPU").split())
    figures = {"45 %", "8.0 GB", "of 24.0 GB", "65 °C"} if not changed or "error" in changed else {"of 24.0 GB"}
    assert all(words in shown for words in {*figures, word})
    assert changed.get("error", "") in shown
    server.send("reservation", {"holder": "me", "purpose": "a test", "since": NOW, "expiresAt": NOW + MINUTE})
    browser.wait_for("Reserved by me (a test) until", "GPU")


def test_the_gpus_charts_have_a_gap_without_data_and_survive_a_reload(open_page, server):
    browser = open_page()
    lines = "return [...document.querySelectorAll('svg')].map((e) => [e.ariaLabel, e.lastChild.getAttribute('d')])"
    drawn = dict(browser.run(lines))
    assert {f"GPU {what} over the last 15 minutes" for what in ("use", "memory", "temperature")} == drawn.keys()
    assert set(drawn) <= set(browser.names("image"))
    assert {path.count("M") for path in drawn.values()} == {2}
    server.send("gpu", gpu(NOW + 5000, available=False, memoryTotal=0, error="nvidia-smi is missing"))
    browser.wait_for("nvidia-smi is missing", "GPU")
    assert "Unknown" in browser.text("GPU")
    server.send("gpu", gpu(NOW + 10_000))
    browser.wait_for("Free", "GPU")
    assert dict(browser.run(lines))["GPU use over the last 15 minutes"].count("M") == 3
    browser.call("POST", "/refresh")
    browser.wait_for("All is well")
    assert dict(browser.run(lines)) == drawn
    server.send("gpu", gpu(NOW - 10 * MINUTE, utilization=1))  # the clock was set back
    wait_until(lambda: browser.run("return $('#use').textContent") == "1")
    for _, path in browser.run(lines):
        assert max(map(float, re.findall(r"[ML]([0-9.]+) ", path))) == 900
    server.send("gpu", None)  # it was set forward
    server.send("gpu", gpu(NOW + MINUTE, utilization=2))
    wait_until(lambda: browser.run("return $('#use').textContent") == "2")


def test_text_from_the_service_is_never_html(open_page, server):
    bad = "<img src=x onerror=document.title='bad'><b>bold</b>"
    browser = open_page(
        sessions=[session(1, "ready", title=bad)],
        notifications=[notification(1)],
        alerts=[alert("disk", text=bad)],
        swarmui=swarmui(lastError=bad),
        gpu=gpu(error=bad),
        reservation={"holder": bad, "purpose": bad, "since": NOW, "expiresAt": NOW},
    )
    server.log += bad + "\n"
    wait_until(lambda: bad in browser.run("return document.querySelector('#log').textContent"))
    assert browser.text().count(bad) >= 6
    assert browser.run("return document.querySelectorAll('img, b:has(b)').length") == 0


def test_a_title_may_contain_a_line_separator(open_page, server):
    browser = open_page(sessions=[session(1, "ready", title="First\u2028second")])
    browser.wait_for("second", "Sessions")
    server.send("session", session(2, "ready", title="Third\u2029fourth"))
    browser.wait_for("fourth", "Sessions")


# SwarmUI ---------------------------------------------------------------------------------------------


def test_the_page_starts_swarmui_and_shows_its_states(open_page, server):
    browser = open_page(swarmui=swarmui("stopped"))
    browser.wait_for("Stopped", "SwarmUI")
    browser.reach("Start SwarmUI")
    browser.press(ENTER)
    wait_until(lambda: server.calls == ["/api/v1/swarmui/start"])
    server.send("swarmui", swarmui("starting", since=service.iso_time(NOW - 12_000)))
    wait_until(lambda: re.search(r"Starting for [1-5]\d s", browser.text("SwarmUI")))
    assert browser.focus() == "Stop SwarmUI"  # which has replaced it
    server.send("swarmui", swarmui())
    browser.wait_for("2 generating, 3 waiting", "SwarmUI")
    assert "backends running" in browser.text("SwarmUI")


def test_the_error_of_a_button_shows_in_its_region(open_page, server):
    server.answers["/api/v1/swarmui/start"] = 500, {"success": False, "error": "SwarmUI failed to start: no path."}
    browser = open_page(swarmui=swarmui("failed"))
    browser.click("Start SwarmUI")
    browser.wait_for("SwarmUI failed to start: no path.", "SwarmUI")
    assert browser.names("dialog") == []
    script = "return document.querySelector('#swarmui [role=alert]').textContent"
    assert browser.run(script) == "SwarmUI failed to start: no path."


def test_a_stop_asks_first_and_after_a_409_asks_again_to_force_it(open_page, server):
    server.answers["/api/v1/swarmui/stop"] = 409, {"success": False, "error": "It was not launched by this service."}
    server.answers["/api/v1/swarmui/stop?force=true"] = 200, {"success": True, "message": "SwarmUI is stopped"}
    browser = open_page()
    browser.reach("Stop SwarmUI")
    browser.press(ENTER)
    wait_until(lambda: browser.names("dialog") == ["Stop SwarmUI?"])
    assert browser.names("button") == ["Cancel", "Stop"]
    assert browser.focus() == "Cancel"
    assert "2 running and 3 waiting images will be lost" in browser.text()
    browser.press(ESCAPE)
    wait_until(lambda: not browser.names("dialog"))
    assert (browser.focus(), server.calls) == ("Stop SwarmUI", [])
    browser.press(ENTER)
    browser.reach("Stop")
    browser.press(ENTER)
    browser.wait_for("It was not launched by this service.")
    browser.click("Stop")
    wait_until(lambda: len(server.calls) == 2)
    assert server.calls == ["/api/v1/swarmui/stop", "/api/v1/swarmui/stop?force=true"]


def test_the_focus_survives_a_stop_during_the_question(open_page, server):
    browser = open_page()
    browser.click("Stop SwarmUI")
    server.send("swarmui", swarmui("stopped"))
    wait_until(lambda: browser.run("return document.querySelector('#stop').hidden"))
    browser.press(ESCAPE)
    wait_until(lambda: browser.focus() == "Start SwarmUI")


def test_the_log_is_live_and_scrolls_unless_it_was_scrolled_up(open_page, server):
    browser = open_page()
    where = "const log = document.querySelector('#log'); "
    height = browser.run(where + "return log.clientHeight")
    server.log += "".join(f"line {number}\n" for number in range(300))
    wait_until(lambda: "line 299" in browser.run(where + "return log.textContent"))
    at_end = where + "return log.scrollHeight - log.scrollTop - log.clientHeight < 8"
    assert browser.run(at_end)
    assert browser.run(where + "log.scrollTop = 200; log.marked = log.children[100].marked = true; return true")
    server.log += "a further line\n"
    wait_until(lambda: "a further line" in browser.run(where + "return log.textContent"))
    assert not browser.run(at_end)
    assert browser.run(where + "return [log.clientHeight, log.childElementCount]") == [height, 200]
    assert browser.run(where + "return log.children[99].marked")  # only the new line was added
    assert [found for found in browser.tree() if found[:2] == ("log", "SwarmUI log")]
    browser.reach("SwarmUI log")  # which the keys can scroll


# Notifications ---------------------------------------------------------------------------------------


def ack(number: int, type: str) -> str:
    return f"Acknowledge {type}, episode {number}, session {NOW - (10 - number) * 1000}"


def test_the_end_of_one_dialog_does_not_close_the_next(open_page, server):
    browser = open_page()
    browser.run("const all = $('#all'); all.click(), $('dialog').close('no'), all.click()")
    browser.reach("Acknowledge")
    browser.press(ENTER)
    wait_until(lambda: server.calls)


def test_a_notification_is_acknowledged_after_a_question_and_the_focus_survives(open_page, server):
    browser = open_page()
    names = [ack(2, "prompts_ready"), ack(3, "beats_ready"), ack(4, "beats_ready")]
    assert [name for name in browser.names("button") if name.startswith("Ack")] == ["Acknowledge all", *names]
    browser.reach(names[0])
    browser.press(ENTER)
    wait_until(lambda: browser.names("dialog") == ["Acknowledge prompts_ready of episode 2?"])
    assert "Acknowledged notifications are not sent again" in browser.text()
    assert browser.names("button") == ["Cancel", "Acknowledge"]
    browser.press(ESCAPE)
    wait_until(lambda: browser.focus() == names[0])
    assert server.calls == []
    for name, after in zip(names, [names[1], names[2], "Notifications"]):
        browser.press(ENTER)
        browser.reach("Acknowledge")
        browser.press(ENTER)
        wait_until(lambda name=name: name not in browser.names("button"), name)
        wait_until(lambda after=after: browser.focus() == after, after)
    assert server.calls == [f"/api/v1/notifications/notif%20{number}/ack" for number in (2, 3, 4)]
    browser.wait_for("None pending", "Notifications")


def test_the_focus_survives_a_row_that_another_program_acknowledges(open_page, server):
    browser = open_page()
    browser.reach(ack(3, "beats_ready"))
    server.send("acknowledged", {"id": "notif 3", "type": "beats_ready", "sessionTimestamp": 1})
    wait_until(lambda: browser.focus() == ack(4, "beats_ready"))
    browser.press(ENTER)
    wait_until(lambda: browser.names("dialog"))
    server.send("acknowledged", {"id": "notif 4", "type": "beats_ready", "sessionTimestamp": 1})
    browser.press(ESCAPE)
    wait_until(lambda: browser.focus() == ack(2, "prompts_ready"))
    server.send("notification", notification(5))
    browser.wait_for("episode 5", "Notifications")
    assert browser.focus() == ack(2, "prompts_ready")


def test_the_page_marks_a_number_of_notifications_that_may_be_larger_and_asks_for_the_others(open_page, server):
    browser = open_page(notifications=[notification(number) for number in range(100)])
    browser.wait_for("100+", "Notifications")
    server.state = state(notifications=[notification(100)])
    browser.click("Acknowledge all")
    browser.click("Acknowledge")
    browser.wait_for("episode 100", "Notifications")


def test_two_or_more_notifications_can_be_acknowledged_at_once(open_page, server):
    browser = open_page()
    browser.click("Acknowledge all")
    assert browser.names("dialog") == ["Acknowledge all 3 notifications?"]
    browser.click("Acknowledge")
    browser.wait_for("None pending", "Notifications")
    assert len(server.calls) == 3
    server.send("notification", notification(5))
    browser.wait_for("episode 5", "Notifications")
    assert "Acknowledge all" not in browser.names("button")


def test_a_notification_that_another_program_removed_does_not_stop_acknowledge_all(open_page, server):
    server.answers["/api/v1/notifications/notif%202/ack"] = 404, {"error": "Notification not found"}
    browser = open_page()
    browser.click("Acknowledge all")
    browser.click("Acknowledge")
    browser.wait_for("None pending", "Notifications")
    assert "not found" not in browser.text("Notifications")


def test_the_page_does_not_know_which_notifications_are_pending_while_the_store_is_away(open_page, server):
    browser = open_page(notifications=[], service={**state()["service"], "storeUp": False})
    browser.wait_for("Not known", "Notifications")
    assert "None" not in browser.text("Notifications")


# The connection --------------------------------------------------------------------------------------


def test_the_page_shows_a_lost_connection_and_the_new_state_after_it(open_page, server):
    browser = open_page()
    server.stop()
    browser.wait_for("No connection since ")
    assert browser.run("return document.title").startswith("No connection since ")
    assert "45 %" in " ".join(browser.text("GPU").split())
    assert "grayscale" in browser.run("return getComputedStyle(document.querySelector('#parts')).filter")
    server.state = state(gpu=gpu(utilization=7), notifications=[])
    server.start()
    browser.wait_for("All is well")
    assert "7 %" in " ".join(browser.text("GPU").split())
    assert browser.run("return getComputedStyle(document.querySelector('#parts')).filter") == "none"


def test_the_page_reconnects_after_a_silence(shorten_wait, open_page, server):
    shorten_wait("40_000")
    open_page()
    wait_until(lambda: server.opened >= 2)


def test_a_hidden_page_closes_its_connection_and_reconnects_when_it_is_shown(shorten_wait, open_page, server):
    shorten_wait("10_000")
    browser = open_page()
    watch = "new MutationObserver(() => titles.push(document.title)).observe($('title'), { childList: true })"
    browser.run(f"window.titles = []; {watch}")
    handle = browser.call("GET", "/window")
    other = browser.call("POST", "/window/new", {"type": "tab"})["handle"]
    browser.call("POST", "/window", {"handle": other})
    try:
        wait_until(lambda: not server.streams)
    finally:
        browser.call("DELETE", "/window")
        browser.call("POST", "/window", {"handle": handle})
    wait_until(lambda: server.streams)
    browser.wait_for("All is well")
    assert "Not connected while hidden · StoryTeller" in browser.run("return titles")


# The real service ------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tests.Service]:
    """The service, with the tests' stand-ins for nvidia-smi and SwarmUI."""
    with contextlib.ExitStack() as stack:
        leash = stack.enter_context(contextlib.closing(tests.Leash()))
        known = {"gpus": tests.GOOD, "processes": {"print": "41\n"}, "runs": str(tmp_path / "runs")}
        settings = {
            "STORYTELLER_PORT": "0",
            "STORYTELLER_DATA_DIR": str(tmp_path / "data"),
            "STORYTELLER_API_TOKEN": TOKEN,
            "NVIDIA_SMI": str(tests.write_program(tmp_path / "nvidia-smi", tests.NVIDIA_SMI, known)),
            "SWARMUI_PATH": str(tests.write_swarmui_folder(tmp_path / "SwarmUI", {"leash": leash.port})),
            "SWARMUI_API_URL": f"http://localhost:{tests.free_port()}",
        }
        made = tests.Service(ROOT / "storyteller_automation.py", [], {**os.environ, **settings})
        stack.callback(made.close)
        yield made


def test_the_page_shows_and_controls_the_real_service(running, browser):
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    browser.go(next(service.page_links("localhost", running.port, TOKEN)))
    browser.wait_for("All is well: no sessions in progress")
    browser.wait_for("45 °C", "GPU")
    browser.click("Start SwarmUI")
    browser.wait_for("Ready", "SwarmUI")
    beats = [{"beatId": number, "prompts": {"cinematic": "a"} if number else {}} for number in range(2)]
    episode = {"title": "The Clockmaker", "episodeNumber": 2, "scenes": [{"beats": beats}]}
    document = {"timestamp": 5, "promptMode": "storyswarm", "analyzedEpisode": episode}
    assert running.call("PUT", "/api/v1/session/5", document, bearer)[0] == 200
    browser.wait_for("1 of 2 prompts", "Sessions")
    browser.wait_for("Beats ready, episode 2 · The Clockmaker", "Notifications")
    browser.click("Acknowledge beats_ready, episode 2, session 5")
    browser.click("Acknowledge")
    browser.wait_for("None pending", "Notifications")
    reservation = {"holder": "me", "purpose": "a test", "ttlSeconds": 60}
    assert running.call("POST", "/api/v1/gpu/reservation", reservation, bearer)[0] == 201
    browser.wait_for("Reserved by me (a test)", "GPU")
    browser.click("Stop SwarmUI")
    browser.click("Stop")
    browser.wait_for("Stopped", "SwarmUI")
    browser.wait_for("GetNewSession", "SwarmUI")  # its log
    running.stop()
    browser.wait_for("No connection since")


# Layout and speed ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core, from a package in a folder of its own; made once, and again for another version."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "storyteller-axe"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != AXE:
        venv.create(folder / "venv", clear=True, with_pip=True)
        pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--target", folder / "package", "--upgrade", AXE], check=True)
        stamp.write_text(AXE)
    return next((folder / "package").rglob("axe.min.js")).read_text("utf-8")


def show_dialog(browser: Browser, server: StandIn) -> None:
    browser.click("Stop SwarmUI")


def lose_connection(browser: Browser, server: StandIn) -> None:
    server.stop()
    browser.wait_for("No connection since")
    server.start()


def forget_token(browser: Browser, server: StandIn) -> None:
    browser.click("Forget the token")


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("act", [None, show_dialog, lose_connection, forget_token])
def test_axe_core_finds_no_violation(open_page, server, axe, theme, width, act):
    alerts = [alert("gpu_hot"), alert("disk", "ended")]
    server.log = "a line\n" * 100
    browser = open_page(alerts=alerts, gpu=gpu(error="What?"), swarmui=swarmui(lastError="It died"))
    wait_until(lambda: browser.run("return document.querySelector('#log').childElementCount") == 100)
    browser.size(width)
    browser.theme(theme)
    if act:
        act(browser, server)
    browser.run(axe + "; return true")
    script = "const done = arguments[0]; axe.run().then((found) => done(found.violations))"
    found = browser.call("POST", "/execute/async", {"script": script, "args": []})
    assert [(rule["id"], rule["nodes"][0]["html"], rule["nodes"][0]["failureSummary"]) for rule in found] == []


@pytest.mark.parametrize("width", [360, 699, 700, 999, 1000, 1280, 2560])
def test_nothing_scrolls_horizontally(open_page, server, width):
    long = "AVeryLongWordWithoutABreak" * 8
    browser = open_page(
        sessions=[session(1, "acknowledged", 1, title=long), session(2, "prompts", 100_000, promptsNeeded=100_000)],
        notifications=[notification(1), notification(2)],
        alerts=[alert("disk", text=long)],
        swarmui=swarmui(lastError=long),
        gpu=gpu(error=long, memoryUsed=819_200, memoryTotal=819_200, temperature=100, utilization=100),
        reservation={"holder": long, "purpose": long, "since": NOW, "expiresAt": NOW},
    )
    server.log += long + "\n"
    wait_until(lambda: long in browser.run("return document.querySelector('#log').textContent"))
    browser.size(width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
    assert browser.run(wide + ".map((e) => e.outerHTML.slice(0, 80))") == []


def test_the_page_paints_at_once_and_shifts_little(browser, server, open_page):
    shift = """new PerformanceObserver((list) => list.getEntries().forEach((e) => window.shift = (window.shift ?? 0) +
        e.value)).observe({ type: "layout-shift", buffered: true });"""
    for width in (360, 1280):
        browser.size(width)
        open_page()
        browser.run(shift)
        server.send("alert", alert("gpu_hot"))
        server.send("notification", notification(5))
        server.send("session", session(3, "prompts", 10))
        server.send("swarmui", swarmui("stopped"))
        server.log += "line\n" * 50
        wait_until(lambda: browser.run("return document.querySelector('#log').childElementCount") > 50)
        assert browser.run("return window.shift ?? 0") < 0.1
        paint = browser.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert paint < 300


def test_an_idle_page_costs_little(open_page, server):
    browser = open_page()
    browser.cdp("Performance.enable", timeDomain="threadTicks")

    def busy() -> float:
        return {row["name"]: row["value"] for row in browser.cdp("Performance.getMetrics")["metrics"]}["TaskDuration"]

    time.sleep(1)
    began, before = time.monotonic(), busy()
    time.sleep(4)
    assert (busy() - before) / (time.monotonic() - began) < 0.02


def test_the_page_is_small_and_needs_nothing_else():
    lines = service.PAGE.count("\n")
    assert (lines <= 500, len(service.PAGE.encode()) <= 60_000) == (True, True), lines
    assert not re.search(r"\bstyle=|\bon\w+=\"|innerHTML|https?://(?!www\.w3\.org/2000/svg)", service.PAGE)


@pytest.mark.skipif("PAGE_PICTURES" not in os.environ, reason="PAGE_PICTURES is not set")
@pytest.mark.parametrize(
    ("name", "theme", "width"), [("dark", "dark", 1280), ("light", "light", 1280), ("phone", "dark", 390)]
)
def test_pictures_for_the_readme(open_page, server, name, theme, width):
    titles = ["The Ghost in the Machine", "Nightfall at the Harbour", "A Letter from the Lighthouse", "The Clockmaker"]
    steps = [("prompts", 31), ("beats_ready", 0), ("ready", 48), ("acknowledged", 48)]
    history = [
        gpu(NOW - age * 5000, utilization=round(70 + 20 * math.sin(age / 4)) if age < 110 else 4,
            memoryUsed=9000 if age < 110 else 2000, temperature=62 if age < 90 else 44)
        for age in range(180, -1, -1)
    ]  # fmt: skip
    found = [session(5 - n, *step, title=title) for n, (title, step) in enumerate(zip(titles, steps))]
    alerts = [alert("gpu_hot", text="The GPU is at 93 °C.", since=NOW - 3000)] if name == "phone" else []
    server.log = "".join(f"23:{n:02}:04.123 [Init] Loading extension {n}: SwarmUI\n" for n in range(1, 12))
    latest = gpu(temperature=93, utilization=97) if alerts else history[-1]
    browser = open_page(sessions=found, gpuHistory=[*history, latest], gpu=latest, alerts=alerts)
    browser.size(width)
    browser.theme(theme)
    wait_until(lambda: browser.run("return document.querySelector('#log').childElementCount") == 11)
    height = browser.run("return document.querySelector('main').getBoundingClientRect().bottom") + 14
    browser.size(width, int(height))
    picture = browser.cdp("Page.captureScreenshot", format="webp", quality=80)["data"]
    Path(os.environ["PAGE_PICTURES"], f"page-{name}.webp").write_bytes(base64.b64decode(picture))

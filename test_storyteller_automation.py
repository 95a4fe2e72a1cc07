"""Tests of the StoryTeller automation service, in the order of its sections.

Programs replace SwarmUI and nvidia-smi (section "Stand-ins"). Everything else is real: a redis-server, SQLite files,
sockets, child processes, and the service itself as a process.
"""

from __future__ import annotations

import atexit
import base64
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import email.utils
import functools
import hashlib
import http.client
import http.server
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import urllib.request
import weakref
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import webtest

import storyteller_automation as service

HERE = Path(__file__).resolve().parent
TOKEN = "a-token-for-tests-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PATIENCE = 30.0  # seconds after which a wait fails; a test that passes never takes as long

# The tests run with -I, which ignores these variables: the processes that they start must not get them either.
for name in [name for name in os.environ if name.startswith("PYTHON")]:
    del os.environ[name]
# Nor that SIGINT is ignored, as in a background job of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ======================================================================================================
# Stand-ins
# ======================================================================================================

# Every stand-in has a leash: a connection to the test, over which it reports how it was started. It exits when the test
# closes the connection, and the test notices when it exits, in the same way on every system.
LEASH = """
import json, os, socket, sys, threading
def hold_leash(port, **report):
    leash = socket.create_connection(("127.0.0.1", port))
    report.update(pid=os.getpid(), arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    leash.sendall(json.dumps(report).encode() + b"\\n")
    threading.Thread(target=lambda: (leash.recv(1), os._exit(0)), daemon=True).start()
"""

# nvidia-smi: answers each query as `plan` says: {"gpus": {"print", "stderr", "exit", "crash", "hang", "after": a file
# whose creation it waits for}, "processes": {...}}.
NVIDIA_SMI = """
query = "gpus" if sys.argv[1].startswith("--query-gpu=") else "processes"
wanted = {
    "gpus": ["--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,count",
             "--format=csv,noheader,nounits"],
    "processes": ["--query-compute-apps=pid", "--format=csv,noheader"],
}
if sys.argv[1:] != wanted[query]:
    sys.exit("ERROR: Option is not recognized. Please run 'nvidia-smi -h'.")
act = plan[query]
with open(plan["runs"], "a") as file:
    file.write(query + "\\n")
while not os.path.exists(act.get("after", ".")):
    threading.Event().wait(0.01)
sys.stdout.write(act.get("print", ""))
sys.stderr.write(act.get("stderr", ""))
sys.stdout.flush()
if act.get("hang"):
    import subprocess
    # A child process, which must be killed as well.
    child = plan["leash_code"] + "hold_leash(int(sys.argv[1])); threading.Event().wait()"
    subprocess.Popen([sys.executable, "-c", child, str(plan["leash"])]).wait()
if act.get("crash"):
    os._exit(0xC0000005 - 2**32) if sys.platform == "win32" else os.kill(os.getpid(), 9)
sys.exit(act.get("exit", 0))
"""

# SwarmUI 0.9.8.2, as far as the service uses it: POST with JSON, never GET. `plan`: {"delay": seconds until it listens,
# "after": a file whose creation it waits for first, "print": text, "flood": MB of further output, "key": whether it
# waits for a key, "child": whether it starts a child process, "exit": the code with which it exits at once, "once": a
# file that records that it did, so that it does not again, "answer": [status, headers, body] in place of the usual
# response, "raw": [text, then] for each request, `then` being the end, silence, or the last letter for ever, "lacks":
# routes that do not exist, "refuses": routes for which permission is lacking, "forgets": whether every session is
# unknown, "shutdown": seconds that a shutdown takes, "deaf": whether it ignores shutdown and SIGTERM, "status": a file
# with the state of its work and its backends, "hang": a file that stops all responses while it exists, "taken": the
# port on which it listens in place of its own}.
SWARMUI = """
import http.server, signal, subprocess, time
hold_leash(plan["leash"])
if plan.get("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.buffer.write(plan.get("print", "").encode("utf-8", "surrogateescape"))
for _ in range(plan.get("flood", 0)):
    sys.stdout.buffer.write(b"x" * 999_999 + b"\\n")
sys.stdout.flush()
if "key" in plan:
    sys.stdin.read(1)
if "child" in plan:
    code = plan["leash_code"] + "hold_leash(int(sys.argv[1])); threading.Event().wait()"
    subprocess.Popen([sys.executable, "-c", code, str(plan["leash"])])
if "exit" in plan and not os.path.exists(plan.get("once", "")):
    if "once" in plan:
        open(plan["once"], "w").close()
    sys.exit(plan["exit"])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, headers, body):
        self.send_response(status)
        if plan.get("allow_origin"):
            self.send_header("Access-Control-Allow-Origin", plan["allow_origin"])
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())
    def do_GET(self):
        if self.path.startswith("/API/"):
            self.answer(302, {"Location": "/Error/NoGetAPI"}, "")
        else:
            self.answer(200, {"Content-Type": "text/html"}, "<html>Error</html>")
    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        route = self.path.removeprefix("/API/")
        while os.path.exists(plan.get("hang", "")):
            time.sleep(0.01)
        if "answer" in plan:
            self.answer(*plan["answer"])
        elif self.headers.get("Content-Type") != "application/json" or not body:
            self.answer(400, {}, json.dumps({"error_id": "basic_api", "error": "Request input lacks body"}))
        elif plan.get("token") and "swarm_token=" + plan["token"] not in self.headers.get("Cookie", ""):
            self.answer(200, {}, json.dumps({"error": "Invalid or unauthorized."}))
        elif self.path == "/API/GetNewSession":
            self.answer(200, {}, json.dumps({
                "session_id": "0" * 40, "user_id": "local", "version": "0.9.8.2", "server_id": server_id}))
            sessions.append(self.path)
        elif json.loads(body).get("session_id") != "0" * 40 or plan.get("forgets"):
            self.answer(401, {}, json.dumps({"error_id": "invalid_session_id", "error": "Invalid session ID."}))
        elif route in plan.get("lacks", []):
            self.answer(400, {}, json.dumps({"error_id": "bad_route", "error": "Unknown API route."}))
        elif route in plan.get("refuses", []):
            self.answer(400, {}, json.dumps({"error_id": "bad_permissions", "error": "You lack permission."}))
        elif route in ("GetGlobalStatus", "GetCurrentStatus"):
            counts = dict.fromkeys(["waiting_gens", "loading_models", "waiting_backends", "live_gens"], 0)
            known = {"status": counts, "backend_status": {
                "status": "running", "class": "", "message": "", "any_loading": False}}
            if os.path.exists(plan.get("status", "")):
                for name, values in json.load(open(plan["status"])).items():
                    known[name].update(values)
            if route == "GetCurrentStatus":
                known["status"] = counts
            self.answer(200, {}, json.dumps({**known, "sessions": len(sessions)}))
        elif route in ("ShutdownServer", "UpdateAndRestart"):
            self.answer(200, {}, json.dumps({"success": True}))
            code = 42 if route == "UpdateAndRestart" else 0
            if not plan.get("deaf"):
                threading.Timer(plan.get("shutdown", 0), os._exit, [code]).start()
        elif self.path == "/API/ChangeServerSettings":
            if not plan.get("stubborn"):
                plan["allow_origin"] = json.loads(body)["settings"]["Network.AccessControlAllowOrigin"]
            self.answer(200, {}, json.dumps({"success": True}))
        else:
            self.answer(400, {}, json.dumps({"error_id": "bad_route", "error": "Unknown API route."}))
    def log_message(self, *arguments):
        print("[Info] call of", self.path, flush=True)
sessions, server_id = [], os.urandom(8).hex()
def speak(connection):
    text, then = plan["raw"]
    with connection:
        request = connection.recv(65536)
        while not request.endswith(b"{}"):
            request += connection.recv(65536)
        connection.sendall(text.encode())
        while then == "the last letter for ever":
            time.sleep(0.02)
            connection.sendall(text[-1].encode())
        if then == "silence":
            threading.Event().wait()
time.sleep(plan.get("delay", 0))
while not os.path.exists(plan.get("after", ".")):
    time.sleep(0.01)
port = int(sys.argv[sys.argv.index("--port") + 1])
if "taken" in plan:
    print(f"[Init] Port {port} was taken, using {plan['taken']} instead.", flush=True)
    port = plan["taken"]
if "raw" in plan:
    listener = socket.create_server(("127.0.0.1", port))
    while True:
        threading.Thread(target=speak, args=[listener.accept()[0]], daemon=True).start()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def write_program(path: Path, code: str, plan: dict[str, Any]) -> Path:
    """Write an executable for this system that runs LEASH and then `code`, which can use `plan`; returns its path."""
    source = f"{LEASH}\nplan = json.loads({json.dumps(plan)!r})\n{code}"
    if not service.WINDOWS:
        # Through sh, because the path of an interpreter in a first line cannot contain a space.
        code_file = path.with_name(f"{path.name}.py")
        code_file.write_text(source, encoding="utf-8")
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -SE '{code_file}' \"$@\"\n", encoding="utf-8")
        path.chmod(0o755)
        return path
    # A real .exe: pip's launcher, which runs the Python program in the zip file at its end.
    import pip._vendor.distlib as distlib

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("__main__.py", source)
    launcher = (Path(distlib.__file__).parent / "t64.exe").read_bytes()
    path = path.with_suffix(".exe")
    path.write_bytes(launcher + f'#!"{sys.executable}" -SE\r\n'.encode() + packed.getvalue())
    return path


def write_swarmui_folder(folder: Path, plan: dict[str, Any]) -> Path:
    """Write SwarmUI's folder as installed: a launch script that runs an executable; returns the folder."""
    release = folder / "src" / "bin" / "live_release"
    release.mkdir(parents=True)
    program = write_program(release / "SwarmUI", SWARMUI, plan)
    if service.WINDOWS:
        # Like SwarmUI's own: it restarts on exit code 42, and pauses on any other code but 0.
        lines = [
            "@echo off",
            'cd /d "%~dp0"',
            ":start",
            f'"%~dp0{program.relative_to(folder)}" %*',
            "if %errorlevel% equ 42 goto start",
            "if not %errorlevel% equ 0 pause",
        ]
        (folder / "launch-windows.bat").write_bytes("\r\n".join([*lines, ""]).encode())
    else:
        script = folder / service.LAUNCH_SCRIPT
        relative = program.relative_to(folder)
        script.write_text(
            f'#!/bin/bash\ncd "$(dirname "$0")"\n"./{relative}" "$@"\ncode=$?\n'
            f'if [ $code = 42 ]; then exec "$0" "$@"; fi\nexit $code\n'
        )
        script.chmod(0o755)
    return folder


class Held:
    """A running stand-in, at the other end of a leash."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        self.connection = connection
        self.report: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        self._identity = self._identify()
        connection.setblocking(False)

    def _identify(self) -> str | None:
        return service.process_identity(self.report["pid"])

    def has_ended(self, patience: float = PATIENCE) -> bool:
        """Wait until it has exited. False if it still runs after `patience` seconds."""
        deadline = time.monotonic() + patience
        while (lives := self.is_alive()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not lives

    def is_alive(self) -> bool:
        """Whether it runs now."""
        try:
            return self.connection.recv(1) != b""
        except BlockingIOError:
            # Wine may keep the socket of a process open that was killed while it read.
            return not service.WINDOWS or bool(self._identity and self._identity == self._identify())
        except ConnectionError:
            return False


class Leash:
    """The test's end of the leashes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port = self._listener.getsockname()[1]
        self._held: list[Held] = []

    def next(self) -> Held:
        """Wait for the next stand-in that starts."""
        self._held.append(Held(self._listener.accept()[0]))
        return self._held[-1]

    def take_further(self) -> list[Held]:
        """The stand-ins that have started and that next() has not returned."""
        self._listener.setblocking(False)
        before = len(self._held)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._held.append(Held(self._listener.accept()[0]))
        self._listener.settimeout(PATIENCE)
        return self._held[before:]

    def count_further(self) -> int:
        return len(self.take_further())

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self.count_further()
            self._listener.close()
        for held in self._held:
            held.connection.close()


def take_ports() -> tuple[socket.socket, Iterator[int]]:
    """Reserve a block of ports, below those that systems choose themselves. The process that listens on the first port
    of a block has the others."""
    for first in range(20_000, 32_000, 500):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", first)), itertools.cycle(range(first + 1, first + 500))
    raise AssertionError("no block of ports is free")


PORTS_HELD, PORTS = take_ports()
atexit.register(PORTS_HELD.close)


def free_port() -> int:
    """A port of this process's block on which nothing listens."""
    for port in itertools.islice(PORTS, 499):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: not accepted before the listener was closed
        return False
    return True


def wait_until(happened: Callable[[], Any]) -> None:
    """Wait until it is true; fail after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def make_session(scenes: int = 4, beats: int = 249, prompts: int = 240, size: int = 850_000) -> dict[str, Any]:
    """A session like a real episode: of 249 beats 240 are NEW_IMAGE and 9 REUSE_IMAGE; `prompts` of the 240 have a
    prompt, in StoryArt's and StorySwarm's form by turns. Padded to about `size` bytes of JSON."""
    made: list[dict[str, Any]] = [
        {
            "beatId": f"s{number % scenes}-b{number}",
            "imageDecision": {"type": "REUSE_IMAGE" if number % 27 == 26 else "NEW_IMAGE"},
            "visual": "x" * (size * 3 // 4 // beats),
        }
        for number in range(beats)
    ]
    waiting = [beat for beat in made if beat["imageDecision"]["type"] == "NEW_IMAGE"]
    for number, beat in enumerate(waiting[:prompts]):
        text = f"a wide shot, beat {number}, Müller & Söhne"
        spoken = {"prompt": text, "model": "flux", "width": 1344, "height": 768, "steps": 20, "cfgscale": 1, "seed": -1}
        beat["prompts"] = {"cinematic": text if number % 2 else spoken}
    return {
        "scriptText": "s" * (size // 12),
        "episodeContext": json.dumps({"episode": "c" * (size // 6)}),
        "storyUuid": "59f64b1e-726a-439d-a6bc-0dfefcababdb",
        "promptMode": "storyswarm",
        "retrievalMode": "manual",
        "selectedLLM": "qwen",
        "analyzedEpisode": {
            "episodeNumber": 2,
            "title": "The Second",
            "scenes": [
                {"sceneNumber": number + 1, "title": f"Scene {number + 1}", "beats": made[number::scenes]}
                for number in range(scenes)
            ],
        },
    }


class Forwarder:
    """A proxy between the service and a Redis that fails as networks and PCs do. Once cut, it refuses connections until
    restore()."""

    def __init__(self, target: tuple[str, int], database: int = 0) -> None:
        self._target = target
        self._database = database
        self._passing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._round = 0  # connections of an earlier round are dead
        self.port = free_port()
        self.restore()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/{self._database}"

    def restore(self) -> None:
        self._passing.set()
        if not self._threads or not self._threads[0].is_alive():
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._threads.insert(0, threading.Thread(target=self._accept, daemon=True))
            self._threads[0].start()

    def hang(self) -> None:
        """Connections stay open and new ones are accepted, but no data passes until restore()."""
        self._passing.clear()

    def end_connections(self) -> None:
        """All connections end; new ones are accepted."""
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._sockets.clear()

    def forget_connections(self) -> None:
        """All connections die without notice, as while a PC sleeps. New ones work."""
        self._round += 1

    def refuse(self) -> None:
        """New connections are refused; open ones are not affected."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(OSError):  # on Windows closing it does not wake a thread in accept()
            socket.create_connection(("127.0.0.1", self.port), 0.1).close()
        self._threads[0].join(PATIENCE)

    def cut(self) -> None:
        """Connections end and new ones are refused."""
        self.refuse()
        self.end_connections()

    def close(self) -> None:
        self._passing.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                with self._lock:
                    self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=[*pair, self._round], daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, born: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._passing.wait()
                if born == self._round:
                    target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()  # each of the two threads closes its own source


class OwnRedis:
    """A redis-server for one test, which may reconfigure, break and kill it."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self._command = [shutil.which("redis-server"), "--bind", "127.0.0.1", "--dir", str(folder), *options]
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self, *options: str, wait: bool = True) -> None:
        command = [*self._command, "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: can_connect(self.port))
        if wait:
            wait_until(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.tell("PING"))
        return False

    def tell(self, *command: Any) -> Any:
        """Send one command over a new connection."""
        with redis.Redis.from_url(self.url, protocol=2) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def repair_log(self) -> None:
        """As Redis's manual says after a crash. Without it Redis (7.2 at least) leaves the half-written transaction in
        the file, and at its next start applies that half together with the next transaction."""
        manifest = self.folder / "appendonlydir" / "appendonly.aof.manifest"
        command = ["redis-check-aof", "--fix", manifest.name]
        subprocess.run(command, cwd=manifest.parent, input=b"y", stdout=subprocess.DEVNULL, check=True)


class Clock:
    """A clock in seconds or milliseconds that only the test advances."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> Any:
        return self.now


# ======================================================================================================
# Fixtures
# ======================================================================================================


def find_redis_server(*, is_required: bool = True) -> str:
    """The path of redis-server. Without one, tests that need it fail if REQUIRE_REDIS is set; else they are skipped."""
    program = shutil.which("redis-server")
    if not program:
        give_up = pytest.fail if is_required and os.environ.get("REQUIRE_REDIS") else pytest.skip
        give_up("redis-server is not installed, so what needs it was not tested")
    return program


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a real Redis: the one that TEST_REDIS_URL names, else one started for this run."""
    if os.environ.get("TEST_REDIS_URL"):
        yield os.environ["TEST_REDIS_URL"]
        return
    port = free_port()
    command = [find_redis_server(), "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: can_connect(port))
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server, protocol=2) as client:
        client.flushdb()
    return redis_server


@pytest.fixture
def forwarder(redis_url: str) -> Iterator[Forwarder]:
    """A proxy of the Redis of this run. It can be made to fail."""
    known = redis.connection.parse_url(redis_url)
    target = known.get("host", "localhost"), known.get("port", 6379)
    with contextlib.closing(Forwarder(target, known.get("db", 0))) as made:
        yield made


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., OwnRedis]]:
    """Starts a redis-server that the test may reconfigure, break and kill."""
    find_redis_server(is_required=not service.WINDOWS)
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> OwnRedis:
            folder = tmp_path / f"redis-{free_port()}"
            folder.mkdir()
            made = OwnRedis(folder, list(options))
            stack.callback(made.kill)
            return made

        yield start


@pytest.fixture
def other_program(redis_url: str) -> Iterator[redis.Redis]:
    """Another program's connection to the Redis that the store uses."""
    with redis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        yield client


def reads_of(client: redis.Redis) -> int:
    """How often Redis has read from a connection, which counts round trips. Redis 5 does not count them."""
    counted = client.info("stats").get("total_reads_processed")
    return pytest.skip("this Redis is older than 6") if counted is None else counted


@pytest.fixture
def clock() -> Clock:
    """The clock of the stores, in ms."""
    return Clock(service.now_ms() // 1000 * 1000)


@pytest.fixture
def sqlite_store(tmp_path: Path, clock: Clock) -> Iterator[service.SqliteStore]:
    with contextlib.closing(service.SqliteStore(tmp_path / "store.sqlite3", clock)) as store:
        yield store


@pytest.fixture
def redis_store(redis_url: str, clock: Clock) -> Iterator[service.RedisStore]:
    with contextlib.closing(service.RedisStore(redis_url, clock)) as store:
        yield store


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest) -> service.Store:
    """A test that uses it runs once against each kind of store."""
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture
def leash() -> Iterator[Leash]:
    with contextlib.closing(Leash()) as made:
        yield made


@pytest.fixture
def settings(tmp_path: Path) -> service.Settings:
    """Settings with short intervals, and with a URL at which no SwarmUI answers."""
    return service.Settings(
        api_token=TOKEN,
        data_dir=tmp_path,
        nvidia_smi=str(tmp_path / "no nvidia-smi"),
        swarmui_api_url=f"http://localhost:{free_port()}",
        poll_interval=0.05,
        # Windows takes 2 s to refuse a connection. Wine may leave a request open whose server is killed.
        health_timeout=PATIENCE / 4 if service.WINDOWS else 2.0,
    )


@pytest.fixture
def make_services(settings: service.Settings) -> Iterator[Callable[..., service.Services]]:
    """Makes what the handlers need, on the given store (by default a new SQLite file) and with changed settings."""
    with contextlib.ExitStack() as stack:

        def make(store: service.Store | None = None, **changed: Any) -> service.Services:
            given = dataclasses.replace(settings, **changed)
            if store is None:
                path = settings.data_dir / f"app-{len(list(settings.data_dir.iterdir()))}.sqlite3"
                store = stack.enter_context(contextlib.closing(service.SqliteStore(path)))
            gpu = service.GpuMonitor(lambda running: service.query_gpus(given, running), 0)
            stack.callback(gpu.close)
            reservations = stack.enter_context(contextlib.closing(service.Reservations(store, "render-pc")))
            swarmui = stack.enter_context(contextlib.closing(service.SwarmUISupervisor(given)))
            return stack.enter_context(contextlib.closing(service.Services(given, store, gpu, swarmui, reservations)))

        yield make


@pytest.fixture
def make_app(make_services: Callable[..., service.Services]) -> Callable[..., webtest.TestApp]:
    """Makes an application on what make_services makes. Its requests carry the token."""

    def make(store: service.Store | None = None, **changed: Any) -> webtest.TestApp:
        app = service.create_app(make_services(store, **changed))
        return webtest.TestApp(app, extra_environ={"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"})

    return make


@pytest.fixture
def app(make_app: Callable[..., webtest.TestApp], store: service.Store) -> webtest.TestApp:
    """An application on each kind of store. Its requests carry the token."""
    return make_app(store)


class Serving:
    """The service's Server in a thread of this process, so that a test can change its limits."""

    def __init__(self, app: Any) -> None:
        sockets = service.open_sockets("127.0.0.1", 0)
        self.port = sockets[0].getsockname()[1]
        self.server = service.Server(app, sockets, on_stop=lambda requests: None)
        self.thread = threading.Thread(target=self.server.run, name="server")
        self.thread.start()

    def stop(self, grace: float = PATIENCE) -> None:
        self.server.stop(grace)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def serving(make_services: Any) -> Iterator[Callable[[Any], Serving]]:
    """Serves an application until the test ends. It depends on make_services only so that services close later."""
    with contextlib.ExitStack() as stack:

        def serve(app: Any) -> Serving:
            made = Serving(app)
            stack.callback(made.stop)
            return made

        yield serve


# Windows sends Ctrl+C only to the processes of one console, so this one must attach to it, and ignore the event itself.
PRESS_CTRL_C = """
import ctypes, sys
kernel32 = ctypes.WinDLL("kernel32")
kernel32.FreeConsole()
if not (kernel32.AttachConsole(int(sys.argv[1])) and kernel32.SetConsoleCtrlHandler(None, True)):
    sys.exit("no such console")
kernel32.GenerateConsoleCtrlEvent(0, 0)
"""


class Service:
    """The service as a process, started as a user starts it, but in an invisible console of its own."""

    def __init__(self, module: Path, arguments: list[str], environment: dict[str, str]) -> None:
        self.folder = module.parent
        command = [sys.executable, str(module), *arguments]
        if service.WINDOWS:
            console: dict[str, Any] = {"creationflags": subprocess.CREATE_NO_WINDOW, "stdin": subprocess.DEVNULL}
        else:
            self._keys, terminal = os.openpty()
            # A session's first process that opens a terminal gets it as its controlling terminal.
            command = ["sh", "-c", 'exec "$@" <"$0"', os.ttyname(terminal), *command]
            console = {"start_new_session": True, "stdin": terminal}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **console
        )
        if not service.WINDOWS:
            os.close(terminal)
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line.decode("utf-8", "replace")
            if "  log " in self.printed:
                break
        else:
            raise AssertionError(f"the service exited with {self.process.wait()}: {self.printed}")
        self.port = int(self.printed.split("http://")[1].split()[0].rsplit(":", 1)[1])
        self.reading = threading.Event()  # while it is cleared, nobody reads the service's output
        self.reading.set()
        self._reader = threading.Thread(target=self._read_on)
        self._reader.start()

    def _read_on(self) -> None:
        with self.process.stdout as pipe:  # a full pipe would block the service
            for line in pipe:
                self.printed += line.decode("utf-8", "replace")
                self.reading.wait()

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] = BEARER) -> tuple[int, Any]:
        """Send a request; returns the status and the JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")

    def press_ctrl_c(self) -> None:
        if service.WINDOWS:
            pressed = [sys.executable, "-c", PRESS_CTRL_C, str(self.process.pid)]
            subprocess.run(pressed, check=True, timeout=PATIENCE)
        else:
            os.write(self._keys, b"\x03")

    def stop(self) -> None:
        """Terminate the service if it runs; on Windows that kills it. May be called again."""
        self.reading.set()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)

    def close(self) -> None:
        self.stop()
        if not service.WINDOWS:
            os.close(self._keys)


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """This process's environment without any setting of the service."""
    ours = {row.metadata["name"] for row in dataclasses.fields(service.Settings)}
    return {name: value for name, value in os.environ.items() if name.upper() not in ours}


def change_constants(module: Path, **constants: Any) -> None:
    """Change the values of constants in a copy of the module."""
    for name, value in constants.items():
        text = module.read_text("utf-8")
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1
        module.write_text(text, "utf-8")


@pytest.fixture
def module_copy(tmp_path: Path) -> Path:
    """A copy of the module in a folder of its own, with a space in its name and without a .env. It looks for StoryArt's
    sessions where no Redis listens."""
    folder = tmp_path / "the service"
    folder.mkdir()
    module = Path(shutil.copy(HERE / "storyteller_automation.py", folder))
    change_constants(module, STORYARTS_REDIS=f"redis://127.0.0.1:{free_port()}/0")
    return module


@pytest.fixture
def change_module(module_copy: Path) -> Callable[..., None]:
    """Changes the values of constants in the module that start_service starts."""
    return functools.partial(change_constants, module_copy)


@pytest.fixture
def start_service(module_copy: Path, clean_environment: dict[str, str]) -> Iterator[Callable[..., Service]]:
    """Starts the service on a free port, with settings as environment variables, and ends it with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> Service:
            given = {"STORYTELLER_API_TOKEN": TOKEN, "STORYTELLER_PORT": "0", **environment}
            made = Service(module_copy, list(arguments), {**clean_environment, **given})
            stack.callback(made.close)
            return made

        yield start


# ======================================================================================================
# Settings
# ======================================================================================================


def read_settings(**environment: str) -> service.Settings:
    """The settings of an environment, without a .env file."""
    return service.load_settings({}, environment, HERE / "no .env")


def test_the_defaults_that_readme_gives_in_words():
    """The test of README's table compares the other defaults."""
    found = read_settings()
    assert found.data_dir == HERE / "data"
    origins = "http://localhost:3000 http://localhost:5173 http://127.0.0.1:3000 http://127.0.0.1:5173"
    assert found.cors_origins == tuple(origins.split())
    assert {row.metadata["name"] for row in dataclasses.fields(found) if getattr(found, row.name) is None} == {
        "STORYTELLER_API_TOKEN", "REDIS_URL", "REDIS_HOST", "REDIS_PORT", "NVIDIA_SMI", "SWARMUI_PATH", "SWARMUI_TOKEN",
        "SWARMUI_ALLOW_ORIGIN", "SWARMUI_IDLE_SHUTDOWN", "STORYTELLER_ALERT_URL", "STORYTELLER_ALERT_FORMAT",
        "STORYTELLER_HEARTBEAT_URL",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "environment", "env_file", "port"),
    [
        pytest.param("1", "2", "3", 1, id="an argument"),
        pytest.param(None, "2", "3", 2, id="a variable"),
        pytest.param(None, None, "3", 3, id="a line of .env"),
        pytest.param("", "2", "3", 2, id="an empty argument is unset"),
        pytest.param(None, "", "3", 3, id="an empty variable is unset"),
        pytest.param(None, None, "", 8000, id="an empty line of .env is unset"),
        pytest.param(None, None, '""', 8000, id="empty quotes in .env are unset"),
    ],
)
def test_an_argument_overrides_a_variable_which_overrides_the_env_file(tmp_path, argument, environment, env_file, port):
    (tmp_path / ".env").write_text(f"STORYTELLER_PORT={env_file or ''}")
    environ = {} if environment is None else {"STORYTELLER_PORT": environment}
    assert service.load_settings({"port": argument}, environ, tmp_path / ".env").port == port


@pytest.mark.parametrize(
    ("trusted", "given", "allowed"),
    [
        pytest.param("http://localhost:3000", "", "http://localhost:3000", id="one is trusted"),
        pytest.param("http://localhost:3000", "http://a", "http://a", id="the setting wins"),
        pytest.param("http://localhost:3000 http://localhost:4000", "", None, id="two are trusted"),
        pytest.param("none", "", None, id="none is trusted"),
    ],
)
def test_swarmui_allows_the_only_trusted_origin_by_default(trusted, given, allowed):
    found = read_settings(STORYTELLER_TRUSTED_ORIGINS=trusted, SWARMUI_ALLOW_ORIGIN=given)
    assert found.swarmui_allow_origin == allowed


@pytest.mark.parametrize(
    ("text", "values"),
    [
        pytest.param("A=1\nB=2\n", {"A": "1", "B": "2"}, id="lines"),
        pytest.param("A=1\r\nB=2", {"A": "1", "B": "2"}, id="Windows line ends"),
        pytest.param("\ufeffA=Müller\n", {"A": "Müller"}, id="a BOM"),
        pytest.param("# A=1\n\n  # B=2\nC=3", {"C": "3"}, id="comments and empty lines"),
        pytest.param("A=1 # 2", {"A": "1 # 2"}, id="a number sign in the value"),
        pytest.param("  A = 1 2 ", {"A": "1 2"}, id="spaces around the value"),
        pytest.param("A=\" 1 '2' \"\nB=' 3 '", {"A": " 1 '2' ", "B": " 3 "}, id="quotes"),
        pytest.param('A="1\'\nB=\'\nC=--x "y z"', {"A": "\"1'", "B": "'", "C": '--x "y z"'}, id="unpaired quotes"),
        pytest.param(r'A="C:\new\table"', {"A": r"C:\new\table"}, id="backslashes are literal"),
        pytest.param("A=b=c", {"A": "b=c"}, id="an equals sign in the value"),
        pytest.param("A=\"a\" \"b c\"\nB='a' 'b'", {"A": '"a" "b c"', "B": "'a' 'b'"}, id="two quoted words"),
        pytest.param("A=1\nA=2", {"A": "2"}, id="a key set twice"),
        pytest.param("", {}, id="an empty file"),
    ],
)
def test_each_line_of_the_env_file_is_a_key_and_a_value_or_a_comment(tmp_path, text, values):
    (tmp_path / ".env").write_bytes(text.encode())
    assert dict(service.read_env_lines(tmp_path / ".env")) == values


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param("A=Müller".encode("cp1252"), "not UTF-8", id="cp1252"),
        pytest.param("A=1".encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param(b"A=1\nexport B=2", "line 2", id="not KEY=VALUE"),
        pytest.param(b"A", "line 1", id="no equals sign"),
        pytest.param(None, "cannot be read", id="a folder"),
    ],
)
def test_an_env_file_that_cannot_be_used_is_refused_with_its_path(tmp_path, data, words):
    path = tmp_path / ".env"
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(service.StartError, match=words) as refused:
        service.read_env_lines(path)
    assert str(path) in str(refused.value)


BAD_VALUES = {
    "STORYTELLER_HOST": ["local host", "http://localhost", "[::1]", "a/b", "a:80", "127.0.0.1:80", "a:b:c", "a%41"],
    "STORYTELLER_PORT": ["65536", "-1", "80.0", "http", " 80", "1e3"],
    "STORYTELLER_API_TOKEN": ["fifteen-letters", "sixteen letters here", "sixteen-lettérs!", "x" * 1025],
    "STORYTELLER_DATA_DIR": ["a\0b"],
    "STORYTELLER_CORS_ORIGINS": [
        *["*", "null", "http://localhost:3000/", "localhost:3000", "http://Localhost", "http://localhost:80"],
        *["https://a.example:443", "http://localhost:03000", "http://localhost:99999", "http://127.1"],
        *["http://[0:0:0:0:0:0:0:1]:3000", "http://..", "http://localhost:3000, *", "http://a@b", "http://a?b"],
    ],
    "STORYTELLER_TRUSTED_ORIGINS": ["*", "null", "http://localhost:3000/"],
    "SWARMUI_ALLOW_ORIGIN": ["null", "http://localhost:3000/", "http://a http://b"],
    "STORYTELLER_ALLOWED_HOSTS": ["pc:8000", "http://pc", "a/b"],
    "STORYTELLER_TOKEN_FAILURES": ["0", "x"],
    "STORYTELLER_LOG_LEVEL": ["loud"],
    "STORYTELLER_LOG_FORMAT": ["xml"],
    "REDIS_URL": [
        *["localhost:6379", "http://localhost", "redis://localhost:port", "redis://localhost:99999", "redis://[::1"],
        *["redis://:#prod42@127.0.0.1:6391/0", "redis://:42#prod@a", "redis://a#b", "rediss://a/0#b", "unix:///a"],
        *["redis://", "redis:///0", "rediss://:6379/0", "redis://user:word@", "redis://:12?b@a", "redis://?host=a"],
        *["unix://", "unix://a", "unix:///", "redis://a:0", "redis://a:0/1", "redis://a?port=99999"],
        *["redis://a?protocol=9", "rediss://a?ssl_cert_reqs=x", "rediss://a?ssl_keyfile=x", "redis://a?unknown=1"],
        *["redis://\t", "redis://[]"],
    ],
    "REDIS_HOST": ["redis://localhost", "127.0.0.1:6379", "a:b:c", "[::1]", "[::1", "::1%", ":", "a%41"],
    "REDIS_PORT": ["0", "65536", "x"],
    "STORYTELLER_BRIDGE": ["yes", "1"],
    "STORYTELLER_RESERVATION_GATES": ["yes", "1"],
    "NVIDIA_SMI_TIMEOUT": ["0", "-1", "x", "86401"],
    "GPU_CACHE_SECONDS": ["-1", "five", "nan", "inf", "86401"],
    "SWARMUI_API_URL": [
        *["localhost:7801", "ftp://localhost", "http://", "http://a b", "http://localhost:0", "http://[::1"],
        *["http://localhost:99999", "http://a..b", "http://user:word@localhost", "http://localhost/?a"],
        *["http://localhost/#a", "http://localhost:7801?"],
    ],
    "SWARMUI_PATH": ["a\0b"],
    "SWARMUI_TOKEN": ["a b", "a;b", "a,b", 'a"b', "a\\b", "é"],
    "SWARMUI_START_TIMEOUT": ["0", "-1", "x"],
    "SWARMUI_POLL_INTERVAL": ["0", "inf"],
    "SWARMUI_HEALTH_TIMEOUT": ["0", "nan"],
    "SWARMUI_START_INTERVAL": ["0", "1 m"],
    "SWARMUI_AUTOSTART": ["yes"],
    "SWARMUI_IDLE_SHUTDOWN": ["0", "-1", "1 h"],
    "SWARMUI_RESTART": ["always"],
    "STORYTELLER_METRICS": ["on", "closed"],
    "STORYTELLER_ALERT_URL": ["ntfy.sh/a", "ftp://a/b", "http://user:word@a/b", "http://a/#b", "http://a/b c"],
    "STORYTELLER_ALERT_FORMAT": ["mail"],
    "STORYTELLER_ALERT_STUCK": ["-1", "x"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_an_invalid_value_is_refused_with_the_name_of_its_setting(name, value):
    with pytest.raises(service.StartError, match=f"^{name}\\b.*: expected "):
        read_settings(**{name: value})


def test_the_home_folder_of_an_unknown_user_is_refused_except_on_windows():
    """Python on Windows does not look users up: it expects every home folder beside this user's."""
    if service.WINDOWS:
        found = read_settings(SWARMUI_PATH="~no-such-user-here/SwarmUI").swarmui_path
        assert found == Path.home().parent / "no-such-user-here" / "SwarmUI"
    else:
        with pytest.raises(service.StartError, match=r"^SWARMUI_PATH .*: expected a path"):
            read_settings(SWARMUI_PATH="~no-such-user-here/SwarmUI")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORYTELLER_API_TOKEN", "too-short"),
        ("REDIS_URL", "redis://:pass-word@localhost:port"),
        ("REDIS_URL", "redis://:#prod42@127.0.0.1:6391/0"),
        ("SWARMUI_TOKEN", "not a cookie"),
        ("STORYTELLER_ALERT_URL", "http://pass-word@localhost/"),
        ("STORYTELLER_HEARTBEAT_URL", "pass-word"),
    ],
)
def test_an_error_about_a_secret_does_not_show_it(name, value):
    with pytest.raises(service.StartError) as refused:
        read_settings(**{name: value})
    assert not re.search("short|pass-word|prod42|6391|a cookie", str(refused.value))


def test_an_error_about_a_redis_url_says_how_to_escape_special_characters():
    with pytest.raises(service.StartError, match="write # as %23 in a password"):
        read_settings(REDIS_URL="redis://:#prod42@127.0.0.1:6391/0")
    escaped = read_settings(REDIS_URL="redis://:%23prod42@127.0.0.1:6391/0").redis_address
    assert redis.connection.parse_url(escaped)["password"] == "#prod42"


def test_the_repr_of_the_settings_shows_no_secret():
    secrets = {"STORYTELLER_API_TOKEN": TOKEN, "REDIS_URL": "redis://:pass-word@a", "SWARMUI_TOKEN": "cookie-word"}
    secrets |= {"STORYTELLER_ALERT_URL": "http://a/pass-word", "STORYTELLER_HEARTBEAT_URL": "http://a/pass-word"}
    shown = repr(read_settings(**secrets))
    assert not any(word in shown for word in (TOKEN, "pass-word", "cookie-word"))


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("STORYTELLER_PORT", "0", "port", 0),
        ("STORYTELLER_PORT", "65535", "port", 65535),
        ("STORYTELLER_HOST", "::1", "host", "::1"),
        ("STORYTELLER_API_TOKEN", "~!sixteen-letter", "api_token", "~!sixteen-letter"),
        ("STORYTELLER_CORS_ORIGINS", "none", "cors_origins", ()),
        ("STORYTELLER_CORS_ORIGINS", "http://a:1,http://b", "cors_origins", ("http://a:1", "http://b")),
        ("STORYTELLER_CORS_ORIGINS", "http://a:1 ,  https://b:80", "cors_origins", ("http://a:1", "https://b:80")),
        ("STORYTELLER_CORS_ORIGINS", "http://[::1] http://1.2.3.4", "cors_origins", ("http://[::1]", "http://1.2.3.4")),
        ("STORYTELLER_CORS_ORIGINS", "chrome-extension://ab", "cors_origins", ("chrome-extension://ab",)),
        ("GPU_CACHE_SECONDS", "0", "gpu_cache_seconds", 0),
        ("SWARMUI_POLL_INTERVAL", "0.5", "poll_interval", 0.5),
        ("SWARMUI_API_URL", "https://render-pc:8443/swarm/", "swarmui_api_url", "https://render-pc:8443/swarm"),
        ("SWARMUI_API_URL", "http://[::1]:7801", "swarmui_port", 7801),
        ("SWARMUI_API_URL", "http://localhost", "swarmui_port", 80),
        ("SWARMUI_API_URL", "https://localhost", "swarmui_port", 443),
        ("SWARMUI_ARGS", "--a 'b c'" if not service.WINDOWS else '--a "b c"', "swarmui_args", ("--a", "b c")),
        ("SWARMUI_PATH", "no such folder", "swarmui_path", HERE / "no such folder"),
        ("STORYTELLER_DATA_DIR", "~/story", "data_dir", Path.home() / "story"),
        ("NVIDIA_SMI", "nvidia-smi", "nvidia_smi", "nvidia-smi"),
        ("NVIDIA_SMI", "tools/nvidia-smi", "nvidia_smi", str(HERE / "tools" / "nvidia-smi")),
        ("REDIS_URL", "rediss://:word@b:1/2", "redis_address", "rediss://:word@b:1/2"),
        ("REDIS_HOST", "b", "redis_address", "redis://b:6379/0"),
        ("REDIS_HOST", "::1", "redis_address", "redis://[::1]:6379/0"),
        ("REDIS_HOST", "fe80::1%12", "redis_address", "redis://[fe80::1%2512]:6379/0"),
        ("REDIS_PORT", "1234", "redis_address", "redis://127.0.0.1:1234/0"),
        ("STORYTELLER_BRIDGE", "OFF", "bridge", False),
        ("STORYTELLER_BRIDGE", "on", "bridge", True),
        ("STORYTELLER_BRIDGE", "false", "bridge", False),
        ("STORYTELLER_RESERVATION_GATES", "True", "gates", True),
        ("STORYTELLER_ALERT_URL", "https://a/b/?c=d&e", "alert_url", "https://a/b/?c=d&e"),
        ("STORYTELLER_ALERT_UNACKNOWLEDGED", "0.5", "alert_unacknowledged", 0.5),
    ],
)
def test_a_valid_value_is_parsed(name, text, field, value):
    """A path need not exist: the endpoint that needs it reports that. A relative path is relative to the module."""
    assert getattr(read_settings(**{name: text}), field) == value


def test_redis_url_overrides_host_and_port():
    both = {"REDIS_HOST": "b", "REDIS_PORT": "1"}
    assert read_settings(**both).redis_address == "redis://b:1/0"
    assert read_settings(**both, REDIS_URL="redis://c").redis_address == "redis://c"


@pytest.mark.parametrize(
    ("environment", "env_file", "advice"),
    [
        pytest.param({"STORYTELER_PORT": "1"}, "", {"STORYTELER_PORT": "STORYTELLER_PORT?"}, id="a typing error"),
        pytest.param({"STORYTELLER_PROT": "1"}, "", {"STORYTELLER_PROT": "STORYTELLER_PORT?"}, id="swapped letters"),
        pytest.param({"STORYTELLER_COLOUR": "1"}, "", {"STORYTELLER_COLOUR": "--help"}, id="only its prefix is ours"),
        pytest.param({"swarmui_path": "1"}, "", {"swarmui_path": "SWARMUI_PATH?"}, id="in lower case"),
        pytest.param({}, "REDIS_ULR=1", {"REDIS_ULR": "REDIS_URL?"}, id=".env: a typing error"),
        pytest.param({}, "COLOUR=1\nB=", {"COLOUR": "--help", "B": "--help"}, id=".env: like no setting"),
        pytest.param({}, "REDIS_PORT=1\nREDIS_HOST=1\n REDIS_PORT=2", {"REDIS_PORT": "the last"}, id=".env: twice"),
        pytest.param({}, "# REDIS_PORT=1\nREDIS_PORT=2", {}, id=".env: a comment"),
        pytest.param({"STORYTELLER_NO_PAUSE": "1", "REDIS_URL": "1"}, "REDIS_URL=1", {}, id="only settings"),
        pytest.param({"TEST_REDIS_URL": "1", "PATH": "1", "HOST": "1", "REQUIRE_REDIS": "1"}, "", {}, id="other names"),
    ],
)
def test_a_name_that_looks_like_a_setting_causes_a_warning_with_advice(tmp_path, environment, env_file, advice):
    (tmp_path / ".env").write_text(env_file)
    warnings = list(service.setting_warnings(environment, tmp_path / ".env"))
    assert [line.split()[0] for line in warnings] == list(advice)
    assert all(text in line for text, line in zip(advice.values(), warnings))


def test_an_env_file_that_an_editor_saved_as_txt_causes_a_warning(tmp_path):
    (tmp_path / ".env.txt").write_text("REDIS_URL=1")
    (warning,) = service.setting_warnings({}, tmp_path / ".env")
    assert warning == f"{tmp_path / '.env.txt'} is not read: rename it to .env"


# ======================================================================================================
# Platform
# ======================================================================================================

ONLY_WINDOWS = pytest.mark.skipif(not service.WINDOWS, reason="it means something else on other systems")
ONLY_POSIX = pytest.mark.skipif(service.WINDOWS, reason="it exists on POSIX systems only")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", (), id="nothing"),
        pytest.param("--a  b", ("--a", "b"), id="spaces"),
        pytest.param('--a "b c" ""', ("--a", "b c", ""), id="quotes"),
        pytest.param(r'"C:\a b"', (r"C:\a b",), id="a backslash in quotes"),
        pytest.param("$HOME %PATH% * ; & |", ("$HOME", "%PATH%", "*", ";", "&", "|"), id="nothing is expanded"),
    ],
)
def test_arguments_are_split_but_not_expanded(text, words):
    assert service.split_arguments(text) == words


def test_unclosed_quotes_are_refused_except_on_windows():
    """On Windows the end of the line closes them."""
    if service.WINDOWS:
        assert service.split_arguments('--a "b c') == ("--a", "b c")
    else:
        with pytest.raises(service.StartError, match=r"SWARMUI_ARGS .* quotes that are closed"):
            read_settings(SWARMUI_ARGS='--a "b c')


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """The path of a private file, in an empty folder."""
    return tmp_path / "secret"


def windows_rights(path: Path) -> set[str]:
    """The users and groups that have any access to a file on Windows."""
    descriptor, text = ctypes.c_void_p(), ctypes.c_wchar_p()
    file_object, access_list = 1, 4
    arguments = (str(path), file_object, access_list, None, None, None, None, ctypes.byref(descriptor))
    assert service._win32("advapi32.GetNamedSecurityInfoW", "NSNNPPPPP", *arguments) == 0
    name = "advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW"
    service._checked(name, "NPNNPP", descriptor, 1, access_list, ctypes.byref(text), None)
    return set(re.findall(r"([^;]+)\)", text.value))


def is_its_owners(path: Path) -> bool:
    """Whether nobody but its owner may read a file (and Windows itself, "SY", which may do anything)."""
    if service.WINDOWS:
        return windows_rights(path) - {"SY"} == {service._user_sid()}
    return path.stat().st_mode & 0o777 == 0o600


def test_a_private_file_is_only_readable_by_its_owner_from_its_creation_on(secret, monkeypatch):
    drafts = []
    monkeypatch.setattr(os, "fsync", lambda file: drafts.extend(map(is_its_owners, secret.parent.iterdir())))
    before = os.umask(0)
    try:
        service.write_private(secret, "text")
        secret.with_name("public").touch()
    finally:
        os.umask(before)
    assert [*drafts, is_its_owners(secret)] == [True, True]
    assert service.WINDOWS or not is_its_owners(secret.with_name("public"))


def test_a_private_file_that_cannot_be_written_leaves_nothing_behind(secret, monkeypatch):
    def disk_is_full(file):
        assert not secret.exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        service.write_private(secret, "text")
    assert list(secret.parent.iterdir()) == []


def test_a_private_file_replaces_another_only_if_asked_to(secret):
    service.write_private(secret, "the first", replace=True)
    with pytest.raises(FileExistsError):
        service.write_private(secret, "the second")
    assert (secret.read_text(), is_its_owners(secret)) == ("the first", True)
    service.write_private(secret, "third", replace=True)
    assert (secret.read_text(), is_its_owners(secret)) == ("third", True)
    assert list(secret.parent.iterdir()) == [secret]


def test_a_log_is_appended_to_even_after_it_was_truncated(tmp_path):
    path = tmp_path / "a log"
    path.write_bytes(b"old ")
    log = service.open_log(path)
    try:
        os.write(log, b"first")
        assert path.read_bytes() == b"old first"
        os.truncate(path, 0)
        os.write(log, b"second")
    finally:
        os.close(log)
    assert path.read_bytes() == b"second"


@pytest.fixture
def unread_input() -> Iterator[None]:
    """This process has input, which a child would read if it inherited it; pytest's own standard input is empty."""
    reader, writer = os.pipe()
    os.write(writer, b"input")
    before = os.dup(0)
    os.dup2(reader, 0)
    for descriptor in (reader, writer):
        os.close(descriptor)
    yield
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.usefixtures("unread_input")
@pytest.mark.parametrize("exits", [False, True], ids=["a child that runs", "a child that has exited"])
def test_a_bounded_child_is_killed_with_everything_that_it_started(tmp_path, leash, exits):
    grandchild_code = f"{LEASH}\nhold_leash({leash.port}); threading.Event().wait()"
    code = (
        "import subprocess, threading\n"
        "null = subprocess.DEVNULL\n"
        "subprocess.Popen([sys.executable, '-c', plan['code']], stdin=null, stdout=null, stderr=null)\n"
        "print(sys.stdin.read() + 'no input', flush=True)\n"
        f"{'' if exits else 'threading.Event().wait()'}"
    )
    program = write_program(tmp_path / "a child", code, {"code": grandchild_code})
    with service.bounded_child([str(program)], set()) as child:
        assert child.stdout.readline().strip() == b"no input"
        grandchild = leash.next()
        if exits:
            assert child.wait(PATIENCE) == 0
        assert grandchild.is_alive()
    assert grandchild.has_ended()
    assert child.wait(PATIENCE) is not None


# Reports what it reads, and whether it has a process group of its own; then prints.
LAUNCHED = """
group = os.getpgrp() if hasattr(os, "getpgrp") else os.getpid()
hold_leash(plan["leash"], read=sys.stdin.read(), own_group=group == os.getpid())
print("to stdout", flush=True); print("to stderr", file=sys.stderr, flush=True)
"""


@pytest.mark.usefixtures("unread_input")
def test_a_launched_program_gets_no_private_settings_no_input_and_its_own_process_group(tmp_path, monkeypatch, leash):
    monkeypatch.setenv("STORYTELLER_API_TOKEN", TOKEN)
    for name in ("STORYTELLER_ANYTHING", "REDIS_URL", "REDIS_HOST", "SWARMUI_TOKEN"):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("SWARMUI_OTHER", "passed on")
    program = write_program(tmp_path / "a program", LAUNCHED, {"leash": leash.port})
    folder = tmp_path / "a folder"
    folder.mkdir()
    service.launch_detached(program, ["--a", "b c", '"', "$HOME"], folder, tmp_path / "log").process.wait(PATIENCE)
    report = leash.next().report
    private = ("STORYTELLER_", "REDIS_", "SWARMUI_TOKEN")
    assert [name for name in report["environment"] if name.upper().startswith(private)] == []
    assert report["environment"]["SWARMUI_OTHER"] == "passed on"
    assert report["arguments"] == ["--a", "b c", '"', "$HOME"]
    assert Path(report["folder"]).samefile(folder)
    assert (report["read"], report["own_group"]) == ("", True)


def test_the_output_of_launched_programs_is_appended_to_the_log(tmp_path, leash):
    program = write_program(tmp_path / "a program", LAUNCHED, {"leash": leash.port})
    for _ in range(2):
        service.launch_detached(program, [], tmp_path, tmp_path / "log").process.wait(PATIENCE)
    assert (tmp_path / "log").read_text().split("\n") == [*["to stdout", "to stderr"] * 2, ""]


@pytest.fixture
def make_launcher(tmp_path: Path, leash: Leash) -> Callable[..., list[str]]:
    """Makes the command of a process that launches a program, with code that runs before and after the launch."""

    def make(before: str = "", after: str = "") -> list[str]:
        code = "import time; hold_leash(plan['leash']); time.sleep(3600)"
        program = write_program(tmp_path / "a program", code, {"leash": leash.port})
        code = (
            f"import ctypes, pathlib, sys, time, storyteller_automation as service\n{before}\n"
            "program = pathlib.Path(sys.argv[1]); folder = program.parent\n"
            f"service.launch_detached(program, [], folder, folder / 'log')\n{after}"
        )
        return [sys.executable, "-c", code, str(program)]

    return make


def test_a_launched_program_outlives_its_launcher(make_launcher, leash):
    subprocess.run(make_launcher(), cwd=HERE, check=True, timeout=PATIENCE)
    assert leash.next().is_alive()


@pytest.mark.skipif(not service.WINDOWS, reason="elsewhere a launched program leaves the session of the terminal")
def test_ctrl_c_in_the_services_console_does_not_reach_a_launched_program(make_launcher, leash):
    command = make_launcher(after=f"time.sleep({PATIENCE})")
    with subprocess.Popen(command, cwd=HERE, creationflags=subprocess.CREATE_NO_WINDOW) as launcher:
        program = leash.next()
        subprocess.run([sys.executable, "-c", PRESS_CTRL_C, str(launcher.pid)], check=True, timeout=PATIENCE)
        assert launcher.wait(PATIENCE) != 0
    assert not program.has_ended(patience=1.0)  # Ctrl+C would end it a moment later than its launcher


@pytest.mark.skipif(not service.WINDOWS, reason="elsewhere there are no job objects")
@pytest.mark.parametrize(("limits", "survives"), [(0x2800, True), (0x2000, False)], ids=["permitted", "forbidden"])
def test_a_launched_program_leaves_a_job_that_ends_with_the_service_if_that_permits_it(
    make_launcher, leash, limits, survives
):
    """The task scheduler runs the service in such a job: KILL_ON_JOB_CLOSE (0x2000), perhaps BREAKAWAY_OK (0x800)."""
    enter = f"job, this_process = ctypes.c_void_p(service._make_job({limits})), ctypes.c_void_p(-1)\n"
    enter += "assert ctypes.WinDLL('kernel32').AssignProcessToJobObject(job, this_process)"
    command = make_launcher(before=enter, after="sys.stdin.read()")
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE) as launcher:
        program = leash.next()
        launcher.stdin.close()
        launcher.wait(PATIENCE)
    assert program.is_alive() if survives else program.has_ended()


@pytest.mark.parametrize("executable", [True, pytest.param(False, marks=ONLY_POSIX)], ids=["", "without x bit"])
def test_a_launch_script_runs_in_a_folder_with_special_characters(tmp_path, leash, executable):
    folder = write_swarmui_folder(tmp_path / "render & (story) teller", {"leash": leash.port, "exit": 0})
    script = folder / service.LAUNCH_SCRIPT
    if not executable:
        script.chmod(0o644)
    arguments = ["--port", "1", "a & b", "D:\\data\\", "\\\\", "^c;(d)"]
    launched = service.launch_detached(script, arguments, folder, tmp_path / "log")
    assert leash.next().report["arguments"] == arguments
    assert launched.process.wait(PATIENCE) == 0


def test_the_identity_of_a_process_is_its_own_and_ends_with_it():
    identity = service.process_identity(os.getpid())
    assert identity
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert service.process_identity(other.pid) not in (None, identity)
        other.kill()
        wait_until(lambda: service.process_identity(other.pid) is None)  # although it is a zombie
    assert service.process_identity(os.getpid()) == identity


@ONLY_POSIX
def test_a_program_has_ended_once_another_process_has_its_pid_and_that_one_is_left_alone():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(PATIENCE)
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as other:
        program = service.Program(other.pid, None, ended)
        assert not program.is_alive()
        program.end(force=True)
        other.communicate(b"\n", timeout=PATIENCE)
        assert other.returncode == 0


@ONLY_POSIX
def test_the_identity_of_a_process_does_not_depend_on_time_zone_and_language(monkeypatch):
    """On macOS it is a time that ps prints. A process with another environment must find the same."""
    shutil.which("ps") or pytest.skip("ps is not installed")
    monkeypatch.setattr(sys, "platform", "darwin")
    identities = set()
    for zone, language in (("UTC", "C"), ("Asia/Tokyo", "ja_JP.UTF-8")):
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("LC_ALL", language)
        identities.add(service.process_identity(os.getpid()))
    (identity,) = identities
    assert re.search(r"\d\d:\d\d:\d\d", identity)


def test_a_listening_port_is_not_shared():
    with service.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError) as refused:
            service.listen("127.0.0.1", port).close()
        assert refused.value.errno in service._IN_USE
        with socket.socket() as thief, pytest.raises(OSError):
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", port))
            thief.listen()
        # Windows refuses the thief because of this option only; Wine does so in any case.
        assert not service.WINDOWS or listener.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)


def test_a_port_with_a_connection_in_time_wait_is_available_at_once():
    with service.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # the side that closes first keeps the connection in TIME_WAIT
    service.listen("127.0.0.1", port).close()


@pytest.mark.parametrize("page", ["cp1252", "cp437"])
def test_characters_that_the_code_page_lacks_are_printed_as_escapes_even_without_stderr(clean_environment, page):
    begin = "import sys, storyteller_automation as it; sys.stderr = None; it.prepare_console(); it.name_window('title')"
    code = f"{begin}; print('\\u2192 \\xfc')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, timeout=PATIENCE,
        env={**clean_environment, "PYTHONIOENCODING": page},
    )  # fmt: skip
    assert (done.returncode, done.stdout.decode(page).strip(), done.stderr) == (0, "\\u2192 ü", b"")


def test_check_prints_every_line_on_a_console_that_lacks_a_character(run_module):
    done = run_module("check", PYTHONIOENCODING="cp1252", SWARMUI_PATH="/Kunst → Müller/SwarmUI")
    assert done.returncode == 1
    assert "Kunst \\u2192 M" in done.stdout
    assert list(read_check(done)) == CHECKED


# ======================================================================================================
# Stores: what both do
# ======================================================================================================

T = 1_738_195_200_000  # the timestamp of a session, in ms
WEEK = 7 * 24 * 3600 * 1000
BEATS, PROMPTS = "beats_ready", "prompts_ready"


def add(store: service.Store, draft: service.Draft) -> tuple[bytes, int, bool]:
    (added,) = store.add([draft])
    return service.result_of(added)


def draft(type: str = PROMPTS, session: int = T) -> service.Draft:
    return service.Draft(type, session, {"storyUuid": "u", "episodeNumber": 2, "totalPrompts": 48, "totalBeats": 50})


def acknowledge(store: service.Store, id: str, *members: bytes) -> bool:
    return service.result_of(store.acknowledge({id: members})[0])


def members_of(store: service.Store) -> list[dict[str, Any]]:
    return [json.loads(member) for member, _ in store.pending(100)]


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that start at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.fixture
def twin(store, clock, request) -> Iterator[service.Store]:
    """The store as another instance of the service has it open."""
    if store.name == "redis":
        made = service.RedisStore(request.getfixturevalue("redis_url"), clock)
    else:
        made = service.SqliteStore(Path(store.place), clock)
    with contextlib.closing(made):
        yield made


@pytest.fixture
def plant(store, request) -> Callable[[Any, float], Any]:
    """Adds a pending member (bytes, or a value to encode as JSON) with a time, as another program does."""

    def insert(member: bytes, at: float) -> None:
        with contextlib.closing(sqlite3.connect(store.place)) as database, database:
            database.execute("INSERT INTO pending (member, time) VALUES (?, ?)", (member, at))

    def zadd(member: bytes, at: float) -> None:
        request.getfixturevalue("other_program").zadd("notifications:pending", {member: at})

    put = zadd if store.name == "redis" else insert
    return lambda value, at: put(value if isinstance(value, bytes) else json.dumps(value).encode(), at)


def test_a_session_is_read_back_byte_for_byte_with_the_time_of_its_save(store, clock):
    document = b'{"title": "M\xc3\xbcller"} \xff'
    assert store.save(T, service.Change(document)) is True
    found = store.session(T)
    assert (found.document, found.saved, found.announced) == (document, clock.now, None)
    assert store.session(T + 1) is None


def test_a_save_that_must_not_replace_leaves_an_existing_session_unchanged(store):
    store.save(T, service.Change(b"first"))
    assert store.save(T, service.Change(b"second", draft=draft()), replace=False) is False
    assert store.session(T).document == b"first"
    assert store.session(T).announced is None
    assert members_of(store) == []


def test_only_one_of_many_concurrent_saves_gets_a_free_timestamp(store, twin):
    saves = [functools.partial(one.save, T, service.Change(b"{}"), replace=False) for one in (store, twin) * 4]
    assert sorted(at_once(*saves)) == [False] * 7 + [True]


def test_sessions_are_listed_newest_first_across_pages(store):
    for number in range(105):
        store.save(T + number * 37 % 105, service.Change(b"{}"))  # in no order
    assert [session.timestamp for session in store.sessions()] == list(range(T + 104, T - 1, -1))


def test_an_own_notification_is_acknowledged_by_exactly_its_id(store, plant):
    member, at, _ = add(store, draft())
    id = json.loads(member)["id"]
    plant({**MEMBER, "id": "another"}, at)
    assert store.acknowledge({id.replace(str(at), str(at + 1)): [], id[:-1]: [], "": []}) == [False] * 3
    assert len(members_of(store)) == 2
    assert [store.acknowledge({id: []}) for _ in range(2)] == [[True], [True]]
    assert [member["id"] for member in members_of(store)] == ["another"]


def test_notifications_are_pending_with_increasing_times_even_if_the_clock_goes_back(store, clock):
    began = int(clock.now)
    added = []
    for number, step in enumerate([0, 0, -3_000_000, 3_000_001]):
        clock.now += step
        added.append(add(store, draft(session=T + number)))
    assert [(time, is_new) for _, time, is_new in added] == [(began + number, True) for number in range(4)]
    assert list(store.pending(100)) == [(member, time) for member, time, _ in added]


def test_a_stored_time_far_ahead_of_the_clock_is_ignored_with_one_warning(store, twin, clock, caplog):
    now = clock.now
    clock.now += 365 * 24 * 3_600_000
    store.save(T, service.Change(b"{}"))
    add(store, draft())
    clock.now = now
    for instance in (store, twin):
        instance.save(T, service.Change(b"{}"))
        assert now <= instance.session(T).saved < now + 10
    assert add(twin, draft(session=T + 1))[1] == now
    assert add(store, draft(session=T + 2))[1] == now + 1
    assert caplog.text.count("8760.0 h ahead of this PC's clock") == 2  # the times of the session and the notification


def test_a_trial_write_leaves_nothing_behind(store, request):
    store.try_write()
    assert store.writes.refusal == ""
    if store.name == "redis":
        assert request.getfixturevalue("other_program").keys() == []
    else:
        with contextlib.closing(sqlite3.connect(store.place)) as file:
            assert file.execute("SELECT count(*) FROM session").fetchone() == (0,)


def test_concurrent_adds_at_two_instances_get_different_times(store, twin):
    adds = [functools.partial(add, one, draft(session=T + n)) for n, one in enumerate((store, twin) * 8)]
    times = {time for _, time, _ in at_once(*adds)}
    assert len(times) == 16
    assert [time for _, time in store.pending(100)] == sorted(times)


def test_a_pending_notification_of_the_same_type_and_session_is_returned_instead_of_a_new_one(store):
    first = add(store, draft())
    assert add(store, draft()) == (*first[:2], False)
    assert [add(store, draft(BEATS))[2], add(store, draft(session=T + 1))[2]] == [True, True]
    assert len(members_of(store)) == 3


@pytest.mark.parametrize("end", ["acknowledged", "7 days old"])
def test_a_new_notification_is_made_once_that_of_the_same_type_and_session_is_gone(store, clock, end):
    old, _, _ = add(store, draft())
    if end == "acknowledged":
        acknowledge(store, json.loads(old)["id"], old)
    else:
        clock.now += WEEK
    new, _, is_new = add(store, draft())
    assert is_new and new != old
    assert [member for member, _ in store.pending(100)] == [new]


def test_concurrent_adds_at_two_instances_make_one_notification_per_type_and_session(store, twin):
    results = at_once(*[functools.partial(add, instance, draft()) for instance in (store, twin) * 4])
    assert len({member for member, _, _ in results}) == 1
    assert [is_new for _, _, is_new in results].count(True) == 1


def test_a_notification_expires_after_7_days(store, clock):
    member, _, _ = add(store, draft())
    clock.now += WEEK - 1
    assert len(members_of(store)) == 1
    clock.now += 1
    assert members_of(store) == []
    assert acknowledge(store, json.loads(member)["id"]) is False


@pytest.mark.parametrize(
    ("steps", "announced"),
    [
        pytest.param([BEATS], [BEATS], id="the first"),
        pytest.param([PROMPTS, PROMPTS], [PROMPTS], id="the same again"),
        pytest.param([BEATS, PROMPTS, PROMPTS, BEATS], [BEATS, PROMPTS, BEATS], id="back again"),
        pytest.param([BEATS, None, BEATS], [BEATS], id="nothing to announce in between"),
    ],
)
def test_a_save_announces_only_a_step_that_differs_from_the_last(store, steps, announced):
    seen = []
    for step in steps:
        store.save(T, service.Change(b"{}", draft=draft(step) if step else None))
        for member, _ in list(store.pending(100)):
            seen.append(json.loads(member)["type"])
            acknowledge(store, json.loads(member)["id"], member)
    assert seen == announced
    assert store.session(T).announced == announced[-1]


def test_two_instances_that_announce_a_step_concurrently_announce_it_once(store, twin):
    store.save(T, service.Change(b"{}", draft=draft(BEATS)))
    announcements = [functools.partial(instance.announce, draft()) for instance in (store, twin) * 4]
    assert at_once(*announcements).count(True) == 1
    assert [member["type"] for member in members_of(store)] == [BEATS, PROMPTS]


def test_a_step_is_announced_although_an_earlier_notification_of_its_kind_expired(store, clock):
    add(store, draft())
    clock.now += 1
    store.save(T, service.Change(b"{}", draft=draft(BEATS)))
    clock.now += WEEK - 1
    assert store.announce(draft()) is True
    assert [member["type"] for member in members_of(store)] == [BEATS, PROMPTS]


def test_a_save_whose_notification_cannot_be_made_stores_nothing(store):
    with pytest.raises(TypeError):
        store.save(T, service.Change(b"{}", draft=service.Draft(PROMPTS, T, {"totalPrompts": object()})))
    assert store.session(T) is None
    assert members_of(store) == []


def test_pending_yields_each_member_once_and_in_order_for_any_page_size(store, clock, plant):
    members = [b"%02d" % number for number in range(12)]
    for number, member in enumerate(members):
        plant(member, clock.now + (number >= 2) + (number >= 10))  # eight have one time: more than a page
    for page in (1, 3, 12, 100):
        assert [member for member, _ in store.pending(page)] == members


def test_acknowledging_members_during_a_read_hides_no_other_from_it(store, clock, plant):
    for number in range(9):
        plant(b"%d" % number, clock.now + number // 4)
    seen = []
    for member, _ in store.pending(2):
        seen.append(member)
        assert acknowledge(store, member.decode(), member)
    assert seen == [b"%d" % number for number in range(9)]
    assert members_of(store) == []


def test_an_acknowledged_id_stays_acknowledged_and_an_unknown_one_never_is(store):
    member, _, _ = add(store, draft())
    id = json.loads(member)["id"]
    for _ in range(2):
        assert acknowledge(store, "unknown", b"unknown") is False
        assert acknowledge(store, id, member) is True
    assert acknowledge(store, id) is True
    assert members_of(store) == []


def test_a_snapshot_has_the_oldest_members_within_their_ttl(store, clock, plant):
    for number in range(5):
        plant(b"%d" % number, clock.now + number // 2)
    plant(b"expired", clock.now - WEEK)
    members = [b"%d" % number for number in range(5)]
    assert store.snapshot(3, ["an-id"]) == (members[:3], False)
    assert store.snapshot(100, []) == (members, False)


def test_a_notification_that_cannot_be_added_fails_alone(store, request):
    if store.name == "redis":
        request.getfixturevalue("other_program").rpush(f"storyteller:made:{PROMPTS}:{T + 1}", "another type")
    else:
        refuse = f"BEFORE INSERT ON pending WHEN NEW.made = '{PROMPTS}:{T + 1}' BEGIN SELECT RAISE(ABORT, 'no'); END"
        make_database(Path(store.place), f"CREATE TRIGGER refuse {refuse}")
    outcomes = service.Notifications(store).create([draft(session=T + number) for number in range(3)])
    assert list(map(type, outcomes)) == [tuple, service.Unavailable, tuple]
    assert [member["sessionTimestamp"] - T for member in members_of(store)] == [0, 2]


def test_two_acknowledgements_of_another_programs_notification_at_once_both_succeed(store, plant, monkeypatch):
    slow, fast = (service.Notifications(store) for _ in range(2))
    plant({"id": "x-1", "type": PROMPTS, "sessionTimestamp": T, "totalPrompts": 3}, service.now_ms())
    search = slow._find_members

    def search_late(ids: Any) -> Any:
        assert fast.acknowledge(["x-1"]) == ["x-1"]
        return search(ids)

    monkeypatch.setattr(slow, "_find_members", search_late)
    assert slow.acknowledge(["x-1"]) == ["x-1"]


def test_an_acknowledgement_that_cannot_be_stored_fails_alone(sqlite_store):
    notifications = service.Notifications(sqlite_store)
    ids = [found.id for found, _ in notifications.create([draft(session=T + number) for number in range(3)])]
    refuse = f"BEFORE INSERT ON marker WHEN NEW.id = '{ids[1]}' BEGIN SELECT RAISE(ABORT, 'no'); END"
    make_database(Path(sqlite_store.place), f"CREATE TRIGGER refuse {refuse}")
    outcomes = notifications.acknowledge_own([*ids, "another program's"])
    assert [one if one in (True, False) else type(one) for one in outcomes] == [True, service.Unavailable, True, False]
    assert [member["sessionTimestamp"] - T for member in members_of(sqlite_store)] == [1]
    with pytest.raises(service.Unavailable):
        notifications.acknowledge([ids[1]])


# ======================================================================================================
# Stores: Redis
# ======================================================================================================


def is_a_week(ms: int) -> bool:
    return WEEK - PATIENCE * 1000 < ms <= WEEK


def test_redis_contains_the_agreed_keys_and_types(redis_store, other_program, clock):
    redis_store.save(T, service.Change('{"title": "ü"}'.encode(), draft=draft(BEATS)))
    member, _, _ = add(redis_store, draft(PROMPTS))
    acknowledge(redis_store, "an-id", member)
    shared = {key: other_program.type(key) for key in other_program.scan_iter() if not key.startswith("storyteller:")}
    assert shared == {
        f"session:{T}": "string",
        "notifications:pending": "zset",
        "notifications:ack:an-id": "string",
    }
    assert other_program.get(f"session:{T}") == '{"title": "ü"}'
    [(member, score)] = other_program.zrange("notifications:pending", 0, -1, withscores=True)
    assert score == clock.now
    assert json.loads(member).keys() == {
        "id", "type", "sessionTimestamp", "storyUuid", "episodeNumber", "totalPrompts", "totalBeats", "timestamp",
        "acknowledged",
    }  # fmt: skip


def test_sessions_and_markers_in_redis_have_a_ttl_of_7_days(redis_store, other_program):
    other_program.set(f"session:{T}", "{}", px=1000)
    redis_store.save(T, service.Change(b"{}", draft=draft()))
    [member] = other_program.zrange("notifications:pending", 0, -1)
    acknowledge(redis_store, "an-id", member.encode())
    assert is_a_week(other_program.pttl(f"session:{T}"))
    assert is_a_week(other_program.pttl("notifications:ack:an-id"))


@pytest.mark.parametrize("ttl", [None, 1_000_000])
@pytest.mark.parametrize("keys", [(f"session:{T}", f"storyart:session:{T}"), (f"storyart:session:{T}", f"session:{T}")])
@pytest.mark.parametrize("copies", [1, 2])
def test_metadata_live_as_long_as_the_longer_lived_copy(redis_store, other_program, ttl, keys, copies):
    for key, life in list(zip(keys, (ttl, 100_000)))[:copies]:
        other_program.set(key, "{}", px=life)
    redis_store.announce(draft())
    (left,) = [other_program.pttl(meta) for meta in other_program.keys("storyteller:session:*")]
    assert left == -1 if ttl is None else 0.9 * ttl < left <= ttl
    found = redis_store.session(T)
    assert (found.document, found.saved, found.announced) == (b"{}", None, PROMPTS)


@pytest.mark.parametrize(
    ("written", "document", "trips"),
    [
        pytest.param({"session": "ours"}, b"ours", 1, id="session:"),
        pytest.param({"storyart:session": "theirs"}, b"theirs", 2, id="StoryArt's key"),
        pytest.param({"session": "ours", "storyart:session": "theirs"}, b"ours", 1, id="both"),
        pytest.param({"session": b"\xff"}, b"\xff", 1, id="not UTF-8"),
        pytest.param({"session": ["a", "list"]}, None, 1, id="session: a list"),
        pytest.param({"session": ["a", "list"], "storyart:session": "theirs"}, None, 1, id="both, session: a list"),
        pytest.param({"storyart:session": ["a", "list"]}, None, 2, id="StoryArt's key a list"),
        pytest.param({"session": "ours", "storyart:session": ["a", "list"]}, b"ours", 1, id="both, one a list"),
    ],
)
def test_a_session_is_read_in_at_most_two_round_trips(redis_store, other_program, written, document, trips):
    for key, value in written.items():
        write = other_program.rpush if isinstance(value, list) else other_program.set
        write(f"{key}:{T}", *(value if isinstance(value, list) else [value]))
    redis_store.ping()  # connects
    reads = reads_of(other_program)
    found = redis_store.session(T)
    assert (found.document, found.saved, found.announced) == (document, None, None)
    assert reads_of(other_program) - reads == trips + 1  # and this INFO


def test_a_session_that_the_acl_forbids_to_read_fails_alone(own_redis):
    own = own_redis("--save", "")
    with contextlib.closing(service.RedisStore(own.url)) as store:
        for number in range(3):
            store.save(T + number, service.Change(b"{}"))
        own.tell("ACL", "SETUSER", "default", "resetkeys", f"~*:{T}", f"~*:{T + 2}")
        found = list(store.read_sessions([T, T + 1, T + 2]))
        assert list(map(type, found)) == [service.StoredSession, service.Unavailable, service.StoredSession]
        with pytest.raises(service.Unavailable, match="NOPERM"):
            store.session(T + 1)


def test_traffic_grows_linearly_with_the_number_of_members_of_one_score(redis_store, other_program, clock):
    def traffic(members: int) -> int:
        """The bytes that Redis sends while all members are read."""
        other_program.zadd("notifications:pending", {f"{number:06}": clock.now for number in range(members)})
        before = other_program.info("stats")["total_net_output_bytes"]
        assert len(list(redis_store.pending(10))) == members
        return other_program.info("stats")["total_net_output_bytes"] - before

    few = traffic(1000)
    assert traffic(4000) < 6 * few


def add_storyart_session(other_program: redis.Redis, timestamp: int) -> None:
    other_program.set(f"storyart:session:{timestamp}", "{}")
    other_program.zadd("storyart:sessions:index", {f"storyart:session:{timestamp}": timestamp})


def test_sessions_of_both_indexes_are_listed_once_and_newest_first_without_a_scan(redis_store, other_program):
    for number in range(120):
        if number % 3:
            add_storyart_session(other_program, T + number)
        if number % 2 or not number % 3:
            redis_store.save(T + number, service.Change(b"{}"))
    other_program.config_resetstat()
    assert [session.timestamp for session in redis_store.sessions()] == list(range(T + 119, T - 1, -1))
    assert not {"cmdstat_keys", "cmdstat_scan", "cmdstat_zscan"} & other_program.info("commandstats").keys()


def test_listing_sessions_removes_the_index_entries_of_sessions_that_are_gone(redis_store, other_program):
    for number in range(3):
        redis_store.save(T + number, service.Change(b"{}"))
        add_storyart_session(other_program, T + number + 10)
    other_program.delete(f"session:{T + 1}", f"storyart:session:{T + 11}")
    assert [session.timestamp - T for session in redis_store.sessions()] == [12, 10, 2, 0]
    assert other_program.zrange("storyart:sessions:index", 0, -1, withscores=True) == [
        (f"storyart:session:{T + number}", T + number) for number in (10, 12)
    ]
    assert other_program.zcard("storyteller:sessions") == 2


def test_meaningless_entries_of_an_index_hide_no_session(redis_store, other_program):
    add_storyart_session(other_program, T)
    meaningless = {**{f"entry {number}": T + 1 for number in range(101)}, "last": math.inf, "first": -math.inf}
    other_program.zadd("storyart:sessions:index", meaningless)
    assert [session.timestamp for session in redis_store.sessions()] == [T]


@pytest.mark.parametrize("index", ["storyteller:sessions", "storyart:sessions:index"])
def test_an_index_of_the_wrong_type_hides_no_session_of_the_other_index(redis_store, other_program, index):
    redis_store.save(T, service.Change(b"{}"))
    add_storyart_session(other_program, T)
    other_program.delete(index)
    other_program.set(index, "no sorted set")
    assert [session.timestamp for session in redis_store.sessions()] == [T]
    assert [timestamp for timestamp, _ in redis_store.newest_sessions(50)] == [T]


def test_a_session_whose_scores_differ_by_half_a_ms_is_listed_once_even_across_pages(redis_store, other_program):
    for number in range(101):
        redis_store.save(T + number, service.Change(b"{}"))
        other_program.zadd("storyart:sessions:index", {f"storyart:session:{T + number}": T + number + 0.5})
    assert [session.timestamp for session in redis_store.sessions()] == list(range(T + 100, T - 1, -1))


def test_the_newest_copy_is_session_latest_if_that_is_a_string(redis_store, other_program):
    assert redis_store.newest_copy() is None
    other_program.set("session:latest", '{"timestamp": 5}')
    assert redis_store.newest_copy() == b'{"timestamp": 5}'
    other_program.delete("session:latest")
    other_program.rpush("session:latest", "a list")
    assert redis_store.newest_copy() is None


def test_a_marker_of_another_program_counts_as_an_acknowledgement(redis_store, other_program):
    other_program.set("notifications:ack:marked", "any value")
    assert redis_store.acknowledged([]) == set()
    assert redis_store.acknowledged(["pending"]) == set()
    assert redis_store.acknowledged(["pending", "marked"]) == {"marked"}
    assert acknowledge(redis_store, "marked") is True
    assert redis_store.snapshot(1, ["pending", "marked"]) == ([], True)
    pending, _, _ = add(redis_store, draft())
    other_program.set(f"notifications:ack:{json.loads(pending)['id']}", "any value")
    _, _, is_new = add(redis_store, draft())
    assert is_new


@pytest.mark.parametrize("page", [1, 2, 100])
def test_scores_in_seconds_are_converted_to_ms_and_come_first(redis_store, other_program, clock, page):
    other_program.zadd(
        "notifications:pending",
        {"s": clock.now / 1000, "t": clock.now / 1000 + 5.0009, "ms": clock.now - 9, "n": clock.now},
    )
    assert [(member, int(time - clock.now)) for member, time in redis_store.pending(page)] == [
        (b"s", 0), (b"t", 5000), (b"ms", -9), (b"n", 0),
    ]  # fmt: skip
    assert redis_store.snapshot(3, []) == ([b"s", b"t", b"ms"], False)


OWN_MEMBER = b'{"id":"notif_%d_0123456789abcdef","type":"prompts_ready"}'
OTHER_MEMBERS = [b'{"id": "notif_%d_0123456789abcdef"}' % T, b'{"id":"notif_%d_0123"}' % T, b"theirs"]


@pytest.mark.parametrize("per_second", [1, 1000], ids=["in seconds", "in ms"])
def test_of_expired_members_only_those_of_this_service_are_removed(redis_store, other_program, clock, per_second):
    expired, live = clock.now - WEEK, clock.now - WEEK + 1
    others = {**dict.fromkeys(OTHER_MEMBERS, expired * per_second / 1000), "live": live * per_second / 1000}
    own = [OWN_MEMBER % (T + number) for number in range(3)]
    other_program.zadd("notifications:pending", {**others, own[0]: expired, own[1]: expired - 99_000, own[2]: live})
    assert sorted(redis_store.expired(100)) == sorted(OTHER_MEMBERS)
    new, _, _ = add(redis_store, draft())
    left = {member.encode() for member in other_program.zrange("notifications:pending", 0, -1)}
    assert left == {*OTHER_MEMBERS, b"live", own[2], new}


def test_expired_members_of_this_service_are_finally_removed_from_among_many_others(redis_store, other_program, clock):
    others = {f"theirs{number}": clock.now - WEEK - number for number in range(2500)}
    own = {OWN_MEMBER % number: clock.now - WEEK - number - 0.5 for number in (100, 1200, 2400)}  # far apart
    other_program.zadd("notifications:pending", {**others, **own})
    for number in range(3):
        clock.now += 1
        add(redis_store, draft(session=T + number))
    assert other_program.zcard("notifications:pending") == 2503


def test_no_script_uses_string_format_or_a_pattern_that_looks_like_its_argument():
    """In Redis 5 for Windows string.format('%d', ms) truncates to 32 bits."""
    scripts = {name: text for name, text in vars(service).items() if name.startswith("_LUA_")}
    assert len(scripts) >= 4
    assert [name for name, text in scripts.items() if "%d" in text or "format" in text] == []


METHODS = {
    "ping": lambda store: store.ping(),
    "session": lambda store: store.session(T),
    "read_sessions": lambda store: list(store.read_sessions([T])),
    "sessions": lambda store: list(store.sessions()),
    "newest_copy": lambda store: store.newest_copy(),
    "save": lambda store: store.save(T, service.Change(b"a secret document", draft=draft())),
    "announce": lambda store: store.announce(draft()),
    "add": lambda store: add(store, draft()),
    "pending": lambda store: list(store.pending(100)),
    "snapshot": lambda store: store.snapshot(100, ["an-id"]),
    "expired": lambda store: store.expired(100),
    "acknowledged": lambda store: store.acknowledged(["an-id"]),
    "acknowledge": lambda store: acknowledge(store, "an-id", b"a member"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_unavailable_if_redis_cannot_be_reached(method):
    with contextlib.closing(service.RedisStore(f"redis://user:hidden@127.0.0.1:{free_port()}/3")) as store:
        with pytest.raises(service.Unavailable) as raised:
            METHODS[method](store)
        assert "127.0.0.1" in store.place and "database 3" in store.place
    assert store.place in str(raised.value)
    assert "hidden" not in str(raised.value)
    assert raised.value.retry_after == 1


def test_redis_py_has_the_undocumented_attributes_that_the_module_uses():
    """_connect makes the socket, whose address no public API can choose; the others save 130 us per command."""
    names = ["_connect", "host", "port", "socket_connect_timeout", "socket_timeout", "next_health_check"]
    names += ["health_check_interval", "is_connected", "check_health", "pack_commands", "send_packed_command"]
    made = redis.ConnectionPool(connection_class=redis.Connection).make_connection()
    assert [name for name in names if not hasattr(made, name)] == []


@pytest.fixture
def name_addresses(monkeypatch) -> Callable[[list[str]], None]:
    """Makes localhost resolve to the given addresses."""
    look_up = socket.getaddrinfo

    def name(addresses: list[str]) -> None:
        def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
            hosts = addresses if host == "localhost" else [host]
            return [row for address in hosts for row in look_up(address, *arguments, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return name


ONLY_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has 127.0.0.2 by default")


@ONLY_LINUX
def test_the_addresses_of_a_host_name_share_the_connect_timeout(own_redis, name_addresses, monkeypatch):
    """A connection to a listener whose backlog is full gets no response on Linux."""
    own, silent = own_redis("--save", ""), [f"127.0.0.{number}" for number in range(2, 10)]
    monkeypatch.setattr(service.RedisClient, "CONNECT_TIMEOUT", 0.4)
    with contextlib.ExitStack() as stack:
        for address in silent:
            stack.enter_context(socket.create_server((address, own.port), backlog=0))
            for _ in range(4):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((address, own.port))
        name_addresses([*silent, "127.0.0.10"])
        own.tell("CONFIG", "SET", "bind", "127.0.0.1 127.0.0.10")
        timeouts: list[float] = []
        connect = socket.create_connection

        def record(address: Any, timeout: float) -> socket.socket:
            timeouts.append(timeout)
            return connect(address, timeout)

        monkeypatch.setattr(socket, "create_connection", record)
        with contextlib.closing(service.RedisStore(f"redis://localhost:{own.port}")) as store:
            store.ping()
    assert len(timeouts) == len(silent) + 1
    assert max(timeouts) < service.RedisClient.CONNECT_TIMEOUT / len(silent)


@ONLY_LINUX
def test_of_the_addresses_of_localhost_127_0_0_1_is_tried_first(own_redis, name_addresses):
    own = own_redis("--save", "")
    with socket.create_server(("127.0.0.2", own.port)) as other:
        name_addresses(["127.0.0.2", "127.0.0.1"])
        with contextlib.closing(service.RedisStore(f"redis://localhost:{own.port}")) as store:
            store.ping()
        other.setblocking(False)
        with pytest.raises(BlockingIOError):  # there was no connection
            other.accept()


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes a certificate for a host name, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed, so TLS was not tested")

    def make(name: str) -> tuple[Path, Path]:
        paths = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
        subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
        return paths

    return make


@pytest.mark.parametrize(("name", "fault"), [("localhost", None), ("another", "certificate is not trusted")])
def test_tls_verifies_the_certificate_against_the_host_name(own_redis, certificate, name, fault):
    file, key = certificate(name)
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", file, "--tls-key-file", key, "--tls-auth-clients", "no"]
    own_redis("--save", "", "--tls-ca-cert-file", str(file), *map(str, tls))
    refused = pytest.raises(service.Unavailable, match=fault) if fault else contextlib.nullcontext()
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={file}"
    with contextlib.closing(service.RedisStore(url)) as store, refused:
        store.ping()


@pytest.mark.parametrize(
    ("scheme", "given", "path", "wrong", "advice"),
    [
        ("redis", "", "/0", "it requires a password", "redis://:PASSWORD@"),
        ("redis", ":pass-word@", "/0", "it refuses the password", "correct user and password"),
        ("redis", "me:pass-word@", "/0", "it refuses the password", "correct user and password"),
        ("redis", ":right@", "/99", "no database with that number", "with /0"),
        ("rediss", ":right@", "/0", "does not answer in TLS", "begin REDIS_URL with redis://"),
    ],
)
def test_check_names_the_fault_of_a_redis_and_its_fix(
    own_redis, settings, monkeypatch, scheme, given, path, wrong, advice
):
    if scheme == "rediss":  # the handshake times out
        monkeypatch.setattr(service.RedisClient, "ANSWER_TIMEOUT", 0.1)
    own = own_redis("--save", "")
    own.tell("CONFIG", "SET", "requirepass", "right")
    url = f"{scheme}://{given}127.0.0.1:{own.port}{path}"
    ((level, _, text),) = service.check_store(dataclasses.replace(settings, redis_url=url))
    assert (level, wrong in text, advice in text) == ("FAIL", True, True)
    assert not re.search(r"pass-word|right|Error\b", text)
    with contextlib.closing(service.RedisStore(url)) as store, pytest.raises(service.Unavailable, match=wrong):
        store.ping()


@pytest.mark.parametrize("reply", ["ERR invalid password", "ERR Client sent AUTH, but no password is set"])
def test_check_says_that_a_redis_5_refuses_the_password(settings, reply):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1000):
                self.request.sendall(f"-{reply}\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"redis://:pass-word@127.0.0.1:{server.server_address[1]}"
        ((level, _, text),) = service.check_store(dataclasses.replace(settings, redis_url=url))
        server.shutdown()
    assert (level, "it refuses the password" in text, "correct user and password" in text) == ("FAIL", True, True)


@pytest.mark.parametrize("method", ["save", "announce", "add", "pending", "snapshot", "acknowledge"])
def test_with_a_pending_key_of_the_wrong_type_a_method_is_unavailable_and_writes_nothing(
    redis_store, other_program, method
):
    other_program.set("notifications:pending", "no sorted set")
    other_program.set(f"session:{T}", "as it was")
    with pytest.raises(service.Unavailable):
        METHODS[method](redis_store)
    assert other_program.get(f"session:{T}") == "as it was"
    assert not other_program.exists(f"storyteller:session:{T}", "notifications:ack:an-id")


@pytest.mark.parametrize("number", [-2, 8, 11001], ids=["Linux", "macOS", "Windows"])
def test_the_error_of_an_unknown_host_name_is_recognized_on_each_system(number):
    error = redis.ConnectionError(f"Error {number} connecting to no-such-pc:6379. It is not known.")
    with contextlib.closing(service.RedisClient("redis://no-such-pc")) as client:
        assert "its host name is unknown" in str(client.unavailable(error))


def test_a_transaction_that_may_not_watch_its_keys_writes_nothing(own_redis):
    own = own_redis("--save", "")
    own.tell("ACL", "SETUSER", "default", "-watch")
    with contextlib.closing(service.RedisClient(own.url)) as client:
        with pytest.raises(service.Unavailable, match="NOPERM"):
            client.transact(["a key"], [("GET", "a key")], lambda replies: [("SET", "a key", "anew")])
        assert client.ask(("EXISTS", "a key")) == [0]


def first_read(value: Any) -> property:
    """An attribute that seems to be reset by another thread after its first read in this one."""
    values = iter([value])
    return property(lambda _: next(values, None) if threading.current_thread() is threading.main_thread() else None)


def test_a_call_that_found_the_circuit_open_is_unavailable_even_if_it_closes_meanwhile(redis_url, monkeypatch):
    with contextlib.closing(service.RedisClient(redis_url)) as client:
        monkeypatch.setattr(service.RedisClient, "_fault", first_read(redis.ConnectionError("away")), raising=False)
        with pytest.raises(service.Unavailable, match="the connection failed"):
            client.ask(("PING",))
        assert client.ask(("PING",)) == [b"PONG"]


def test_a_ping_that_found_writes_refused_says_why_even_if_they_are_accepted_meanwhile(store, monkeypatch):
    monkeypatch.setattr(service.WriteStatus, "refusal", first_read("OOM"), raising=False)
    with pytest.raises(service.Unavailable, match="OOM"):
        store.ping()


@pytest.mark.parametrize("method", ["pending", "save"])
def test_an_error_shows_neither_the_command_nor_its_arguments(redis_store, other_program, method):
    """The error messages of Redis and redis-py may contain both."""
    other_program.set("notifications:pending", "no sorted set")
    with pytest.raises(service.Unavailable) as raised:
        METHODS[method](redis_store)
    context = "" if raised.value.__suppress_context__ else raised.value.__context__  # a traceback shows it, too
    assert not re.search("(?i)ZRANGEBYSCORE|EVAL|secret|Operation against", f"{raised.value} {context}")


# ======================================================================================================
# Stores: SQLite
# ======================================================================================================


@pytest.fixture
def connections(monkeypatch) -> list[sqlite3.Connection]:
    """All SQLite connections that are opened."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: made.append(connect(*a, **k)) or made[-1])
    return made


def is_closed(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return True
    return False


def test_sqlite_commits_with_full_synchronization_in_wal_mode(tmp_path, connections):
    with contextlib.closing(service.SqliteStore(tmp_path / "a store.sqlite3")):
        assert connections[0].execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connections[0].execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_close_closes_every_connection_even_one_that_is_reading(tmp_path, connections, monkeypatch):
    """Otherwise Windows could not move the file away, and the write-ahead log would stay."""
    store = service.SqliteStore(tmp_path / "a store.sqlite3")
    connect = store._connect
    monkeypatch.setattr(store, "_connect", lambda: (connect(), store.close())[0])  # close() during a read
    store.session(T)
    assert list(map(is_closed, connections)) == [True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["a store.sqlite3"]


WRITER_TO_KILL = """
import pathlib, sys, threading
sys.path.insert(0, sys.argv[2])
import storyteller_automation as service
store = service.SqliteStore(pathlib.Path(sys.argv[1]))
store.save(1, service.Change(b"committed", draft=service.Draft("beats_ready", 1, {"totalBeats": 3})))
class Hanging(service.Draft):
    def member(self, time):
        print("in a transaction", flush=True)
        threading.Event().wait()
store.save(2, service.Change(b"uncommitted", draft=Hanging("beats_ready", 2, {})))
"""


def test_a_killed_process_leaves_exactly_what_it_committed(tmp_path):
    path = tmp_path / "store.sqlite3"
    command = [sys.executable, "-c", WRITER_TO_KILL, str(path), str(HERE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"in a transaction"
        process.kill()
    with contextlib.closing(service.SqliteStore(path)) as store:
        (found,) = store.sessions()
        assert (found.timestamp, found.document, found.announced) == (1, b"committed", BEATS)
        assert [member["sessionTimestamp"] for member in members_of(store)] == [1]
        assert store.save(2, service.Change(b"new"), replace=False)  # no lock remains


def make_database(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    "make, fault",
    [
        pytest.param(lambda path: make_database(path, "PRAGMA user_version = 99"), "newer version", id="newer version"),
        pytest.param(lambda path: path.write_bytes(b"no database " * 500), "it is damaged", id="not SQLite"),
        pytest.param(lambda path: path.mkdir(), "cannot be used", id="a directory"),
        pytest.param(lambda path: make_database(path, "CREATE TABLE session (x)"), "another program's", id="foreign"),
    ],
)
def test_an_unusable_file_is_a_start_error_at_once_and_left_closed(tmp_path, connections, caplog, make, fault):
    path = tmp_path / "store.sqlite3"
    make(path)
    with pytest.raises(service.StartError, match=fault) as raised:
        service.SqliteStore(path)
    assert str(path) in str(raised.value)
    assert all(map(is_closed, connections))
    assert caplog.text == ""  # it did not wait for another program


@pytest.fixture
def lock_store(tmp_path: Path) -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Locks a store as another program does, on Windows even against reads. Returns the function that unlocks it."""
    with contextlib.ExitStack() as stack:

        def lock(path: Path) -> Callable[[], None]:
            other = stack.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None)))
            other.execute("BEGIN EXCLUSIVE")
            return other.rollback

        yield lock


def test_opening_waits_for_a_store_that_another_program_locks(tmp_path, lock_store, caplog):
    path = tmp_path / "store.sqlite3"
    unlock = lock_store(path)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(service.SqliteStore, path, lock_timeout=PATIENCE)
        wait_until(lambda: "locked by another program" in caplog.text)
        assert not opening.done()
        unlock()
        opening.result(PATIENCE).close()
    assert len(caplog.records) == 1


def test_a_store_that_stays_locked_is_a_start_error_that_does_not_call_it_damaged(tmp_path, lock_store):
    path = tmp_path / "store.sqlite3"
    lock_store(path)
    with pytest.raises(service.StartError, match="is locked by another program") as raised:
        service.SqliteStore(path, lock_timeout=0.01)
    assert not re.search("damaged|move", str(raised.value))


@pytest.mark.skipif(not service.WINDOWS, reason="only Windows lets a program bar others from reading a file")
def test_a_file_that_another_program_opened_exclusively_is_called_locked(tmp_path):
    path = tmp_path / "store.sqlite3"
    service.SqliteStore(path).close()
    handle = service._checked("kernel32.CreateFileW", "PSNNPNNP", str(path), 0x8000_0000, 0, None, 3, 0x80, None)
    with pytest.raises(service.StartError, match="is locked by another program"):
        service.SqliteStore(path, lock_timeout=0.01)
    service._win32("kernel32.CloseHandle", "NP", handle)


def test_no_statement_of_sqlite_numbers_its_parameters():
    """Python 3.12.0 to 3.12.3 warn of each on the console, which may take no output, so that writes would wait."""
    assert not re.search(r" \(?\?[1-9]", Path(service.__file__).read_text("utf-8"))


def test_while_another_process_writes_reads_succeed_and_writes_are_unavailable(sqlite_store, monkeypatch):
    sqlite_store.save(T, service.Change(b"{}"))
    with contextlib.closing(sqlite3.connect(sqlite_store.place, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert sqlite_store.session(T).document == b"{}"
        with monkeypatch.context() as patch, pytest.raises(service.Unavailable, match="locked"):
            patch.setattr(service.SqliteStore, "WAIT", 0.2)  # its batch must begin within this
            add(sqlite_store, draft())
    assert add(sqlite_store, draft())[2] is True


def test_threads_read_and_write_one_sqlite_store_concurrently(sqlite_store):
    def write_and_read(number: int) -> list[int]:
        for step in range(5):
            timestamp = T + number * 10 + step
            sqlite_store.save(timestamp, service.Change(b"{}", draft=draft(session=timestamp)))
        return [found.timestamp for found in sqlite_store.sessions()]

    calls = [functools.partial(write_and_read, number) for number in range(8)]
    for number, seen in enumerate(at_once(*calls)):
        assert set(seen) >= {T + number * 10 + step for step in range(5)}
    assert len(members_of(sqlite_store)) == 40


@pytest.fixture
def end_transaction(sqlite_store) -> Iterator[Callable[[], None]]:
    """The store's writer is in a transaction until the test calls this."""
    begun, ended = threading.Event(), threading.Event()

    class Slow(service.Draft):
        def member(self, time: int) -> bytes:
            begun.set()
            assert ended.wait(PATIENCE)
            return b"{}"

    with ThreadPoolExecutor(1) as pool:
        pool.submit(sqlite_store.add, [Slow("of nobody", 0, {})])
        try:
            assert begun.wait(PATIENCE)
            yield ended.set
        finally:
            ended.set()


@pytest.fixture
def statements(sqlite_store) -> list[str]:
    """The SQL statements that the store's writer executes."""
    executed: list[str] = []
    sqlite_store._writer.set_trace_callback(executed.append)
    return executed


@pytest.fixture
def queued(sqlite_store, monkeypatch) -> list[Future[Any]]:
    """The writes that were put into the store's queue."""
    futures: list[Future[Any]] = []
    ask = sqlite_store._writes.ask
    monkeypatch.setattr(sqlite_store._writes, "ask", lambda *a, **k: futures.append(ask(*a, **k)) or futures[-1])
    return futures


def test_many_writers_share_one_commit(sqlite_store, end_transaction, queued, statements):
    with ThreadPoolExecutor(8) as pool:
        saves = [pool.submit(sqlite_store.save, T + number, service.Change(b"{}")) for number in range(8)]
        wait_until(lambda: len(queued) == 8)
        end_transaction()
    assert [save.result(PATIENCE) for save in saves] == [True] * 8
    assert statements.count("COMMIT") == 2  # the first is that of the open transaction
    assert len(list(sqlite_store.sessions())) == 8


def test_a_change_that_fails_leaves_the_others_of_its_batch_intact(sqlite_store, end_transaction, queued):
    class Broken(service.Draft):
        def member(self, time: int) -> bytes:
            raise RuntimeError("no member")

    drafts = [None, Broken(PROMPTS, T, {}), Broken(PROMPTS, T, {})]
    with ThreadPoolExecutor(3) as pool:
        changes = [service.Change(b"{}", draft=draft) for draft in drafts]
        saves = [pool.submit(sqlite_store.save, T + number, change) for number, change in enumerate(changes)]
        wait_until(lambda: len(queued) == 3)
        end_transaction()
    assert [type(save.exception(PATIENCE)) for save in saves] == [type(None), RuntimeError, RuntimeError]
    assert [found.timestamp for found in sqlite_store.sessions()] == [T]


def test_a_write_that_times_out_changes_nothing(sqlite_store, end_transaction, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(service.Unavailable, match="busy"):
        patch.setattr(service.SqliteStore, "WAIT", 0.05)
        sqlite_store.save(T, service.Change(b"{}"))
    end_transaction()
    sqlite_store.save(T + 1, service.Change(b"{}"))
    assert [found.timestamp for found in sqlite_store.sessions()] == [T + 1]


def test_close_ends_the_writer_thread(tmp_path):
    others = set(threading.enumerate())
    store = service.SqliteStore(tmp_path / "store.sqlite3")
    (writer,) = set(threading.enumerate()) - others
    assert add(store, draft())[2] is True
    store.close()
    assert not writer.is_alive()


def test_time_in_the_queue_shortens_the_wait_for_other_processes(sqlite_store, statements, monkeypatch):
    times = iter([0.0, 2.9])  # when it joins the queue, and when its batch begins
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(times))
        sqlite_store.save(T, service.Change(b"{}"))
    assert "PRAGMA busy_timeout = 100" in statements


def test_sqlite_sessions_and_markers_expire_after_7_days_and_are_deleted(sqlite_store, clock):
    sqlite_store.save(T, service.Change(b"{}"))
    member, _, _ = add(sqlite_store, draft())
    acknowledge(sqlite_store, "an-id", member)
    clock.now += WEEK - 1
    assert sqlite_store.session(T) and acknowledge(sqlite_store, "an-id")
    clock.now += 1
    assert sqlite_store.session(T) is None and list(sqlite_store.sessions()) == []
    assert acknowledge(sqlite_store, "an-id") is False
    add(sqlite_store, draft(session=T + 1))
    with contextlib.closing(sqlite3.connect(sqlite_store.place)) as file:
        counts = [file.execute(f"SELECT count(*) FROM {name}").fetchone() for name in ("session", "pending", "marker")]
    assert counts == [(0,), (1,), (0,)]


# ======================================================================================================
# Sessions and prompts
# ======================================================================================================


@pytest.mark.parametrize(
    "data, fault",
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"{} {}", "not JSON", id="two values"),
        pytest.param(b'{"a": 1', "not JSON", id="truncated"),
        pytest.param(b"[NaN]", "NaN is not JSON", id="NaN"),
        pytest.param(b"[-Infinity]", "-Infinity is not JSON", id="Infinity"),
        pytest.param(b"[1e999]", "the number 1e999 is too large", id="too large"),
        pytest.param(b"[-1e999]", "the number -1e999 is too large", id="too small"),
        pytest.param(b'["\xff"]', "not UTF-8", id="not UTF-8"),
        pytest.param(b'["\xed\xa0\x80"]', "not UTF-8", id="encoded surrogate"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="nested too deeply"),
    ],
)
@pytest.mark.parametrize("from_request", [True, False])
def test_text_that_is_not_strict_json_is_refused(data, fault, from_request):
    with pytest.raises(ValueError, match=fault):
        service.parse_json(data, from_request=from_request)


@pytest.mark.parametrize("from_request", [True, False])
@pytest.mark.parametrize(
    "data", [pytest.param(rb'["\ud83d","\ude00 x"]', id="in strings"), pytest.param(rb'{"\ude00":1}', id="in a key")]
)
def test_half_a_surrogate_pair_is_json_and_is_written_as_it_was_read(data, from_request):
    assert service.to_json(service.parse_json(data, from_request=from_request)) == data


@pytest.mark.parametrize(
    "ms, text",
    [
        (0, "1970-01-01T00:00:00Z"),
        (T, "2025-01-30T00:00:00Z"),
        (T + 7, "2025-01-30T00:00:00.007Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (99_999_999_999_999, "5138-11-16T09:46:39.999Z"),
    ],
)
def test_a_time_is_written_in_utc_with_z_and_read_back(ms, text):
    assert service.iso_time(ms) == text
    assert service.read_time(text) == ms


@pytest.mark.parametrize(
    "value, ms",
    [
        pytest.param("2025-01-30T01:00:00+01:00", T, id="offset"),
        pytest.param("2025-01-30T00:00:00", T, id="no zone is UTC"),
        pytest.param(T, T, id="ms"),
        pytest.param(T + 0.5, T, id="fraction of a ms"),
        pytest.param(str(T), T, id="ms as text"),
        pytest.param(T // 1000, T, id="seconds"),
        pytest.param(T / 1000 + 0.1239, T + 123, id="fraction of a second"),
        pytest.param(str(T // 1000), T, id="seconds as text"),
        pytest.param(10**11 - 1, 10**14 - 1000, id="last in seconds"),
        pytest.param(10**11, 10**11, id="first in ms"),
        *((value, None) for value in (None, True, "", "soon", "2025-13-01", "1e3", [T], {}, 1e300, -1e308, 10**400)),
        pytest.param("0001-01-01T00:00:00+14:00", None, id="before year 1"),
    ],
)
def test_only_iso_8601_milliseconds_and_seconds_are_read_as_a_time(value, ms):
    assert service.read_time(value) == ms


def episode(*beats: Any, **fields: Any) -> dict[str, Any]:
    """A session of one scene with these beats."""
    return {"analyzedEpisode": {"scenes": [{"beats": list(beats)}]}, **fields}


READY_BEAT = {"prompts": {"cinematic": "a wide shot"}}


@pytest.mark.parametrize(
    "document, expected",
    [
        pytest.param(make_session(size=1), (249, 240, True), id="a finished episode"),
        pytest.param(make_session(size=1, prompts=239), (249, 239, False), id="one prompt short"),
        pytest.param(make_session(size=1, prompts=0), (249, 0, False), id="no prompts"),
        pytest.param({"analyzedEpisode": {"scenes": []}}, (0, 0, False), id="empty scenes"),
        pytest.param({"analyzedEpisode": {"scenes": [{}, {"beats": None}]}}, (0, 0, False), id="no beats"),
        pytest.param(episode({"prompts": None}, {"prompts": {}}, {}), (3, 0, False), id="no prompts in any beat"),
        pytest.param(episode({"prompts": {"cinematic": None}}), (1, 0, False), id="a null prompt"),
        pytest.param(episode({"prompts": {"cinematic": " \n\t\u3000"}}), (1, 0, False), id="a blank prompt"),
        pytest.param(episode({"prompts": {"cinematic": ""}}), (1, 0, False), id="an empty prompt"),
        pytest.param(episode({"prompts": {"cinematic": {}}}), (1, 0, False), id="an empty object"),
        pytest.param(episode({"prompts": {"cinematic": {"prompt": None}}}), (1, 0, False), id="null in an object"),
        pytest.param(episode({"prompts": {"cinematic": {"prompt": " "}}}), (1, 0, False), id="blank in an object"),
        pytest.param(episode({"prompts": {"cinematic": {"prompt": "x"}}}), (1, 1, True), id="a prompt in an object"),
        pytest.param(episode(READY_BEAT), (1, 1, True), id="a string"),
        pytest.param(episode({"prompts": {"vertical": "x"}}), (1, 0, False), id="only a vertical prompt"),
        pytest.param(episode({"imageDecision": {"type": "REUSE_IMAGE"}}, READY_BEAT), (2, 1, True), id="REUSE_IMAGE"),
        pytest.param(episode({"imageDecision": {"type": "NO_IMAGE"}}), (1, 0, True), id="NO_IMAGE"),
        pytest.param(episode({"imageDecision": {"type": "NEW_IMAGE"}}), (1, 0, False), id="NEW_IMAGE"),
        pytest.param(episode({"imageDecision": None}), (1, 0, False), id="a null decision"),
        pytest.param(episode({"imageDecision": {"type": None}}), (1, 0, False), id="a decision without type"),
        pytest.param(episode({"imageDecision": {"type": "NO_IMAGE"}, **READY_BEAT}), (1, 1, True), id="extra prompt"),
    ],
)
def test_a_session_is_ready_when_each_beat_that_needs_a_prompt_has_one(document, expected):
    assert service.progress(document) == service.Progress(*expected)


BEAT = "analyzedEpisode.scenes[0].beats[1]"


@pytest.mark.parametrize(
    "document, fault",
    [
        pytest.param({}, "no analyzedEpisode.scenes", id="no episode"),
        pytest.param({"analyzedEpisode": None}, "no analyzedEpisode.scenes", id="a null episode"),
        pytest.param({"analyzedEpisode": {}}, "no analyzedEpisode.scenes", id="no scenes"),
        pytest.param({"analyzedEpisode": []}, "analyzedEpisode is an array, not an object", id="episode"),
        pytest.param({"analyzedEpisode": {"scenes": {}}}, "scenes is an object, not an array", id="scenes"),
        pytest.param({"analyzedEpisode": {"scenes": [None]}}, "scenes[0] is null, not an object", id="scene"),
        pytest.param({"analyzedEpisode": {"scenes": [{"beats": "x"}]}}, "scenes[0].beats is a string", id="beats"),
        *(
            pytest.param(episode(READY_BEAT, beat), f"{BEAT}{fault}", id=f"{BEAT}{fault}")
            for beat, fault in [
                (5, " is a number, not an object"),
                (None, " is null, not an object"),
                ({"prompts": []}, ".prompts is an array, not an object"),
                ({"prompts": {"cinematic": 5}}, ".prompts.cinematic is a number, not a string or an object"),
                ({"prompts": {"cinematic": {"prompt": 1.5}}}, ".prompts.cinematic.prompt is a number, not a string"),
                ({"prompts": {"vertical": True}}, ".prompts.vertical is a boolean, not a string or an object"),
                ({"imageDecision": "NO_IMAGE"}, ".imageDecision is a string, not an object"),
                ({"imageDecision": {"type": 0}}, ".imageDecision.type is a number, not a string"),
                ({**READY_BEAT, "imageDecision": []}, ".imageDecision is an array, not an object"),
            ]
        ),
    ],
)
def test_a_wrong_type_at_any_depth_is_reported_with_its_place(document, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        service.progress(document)


@pytest.mark.parametrize(
    "document, fault",
    [
        pytest.param(None, "its key is not a string", id="a key of another type"),
        pytest.param(b"a text", "not JSON", id="not JSON"),
        pytest.param(b"[]", "it is an array, not an object", id="an array"),
        pytest.param(b"null", "it is null, not an object", id="null"),
    ],
)
def test_only_a_json_object_is_a_session(document, fault):
    with pytest.raises(ValueError, match=fault):
        service.read_session(document)


@pytest.mark.parametrize(
    "saved, document, ms",
    [
        pytest.param(None, {}, T, id="only its timestamp"),
        pytest.param(T - 5, {}, T - 5, id="its last save"),
        pytest.param(T, {"lastUpdated": T + 1, "updatedAt": service.iso_time(T + 2)}, T + 2, id="updatedAt"),
        pytest.param(T, {"lastUpdated": service.iso_time(T + 3), "updatedAt": T + 2}, T + 3, id="lastUpdated"),
        pytest.param(T + 9, {"lastUpdated": T + 1}, T + 9, id="a save after lastUpdated"),
        pytest.param(None, {"lastUpdated": T - 8}, T - 8, id="older than its timestamp"),
        pytest.param(None, {"lastUpdated": "soon", "updatedAt": [1]}, T, id="no valid times"),
        pytest.param(None, {"lastUpdated": T / 1000 + 0.5}, T + 500, id="in seconds"),
    ],
)
def test_last_updated_is_the_newest_known_time(saved, document, ms):
    stored = service.StoredSession(T, json.dumps(episode() | document).encode(), saved)
    response = service.progress_response(stored, service.find_facts(stored))
    assert json.loads(response.body)["lastUpdated"] == service.iso_time(ms)


def test_the_latest_session_is_the_newest_readable_one_and_unreadable_ones_are_logged(store, caplog):
    assert service.Sessions(store).latest() is None
    for number, document in enumerate([b"{}", b'{"analyzedEpisode": []}', b"[]", b"\xff"]):
        store.save(T + number, service.Change(document))
    assert service.Sessions(store).latest().timestamp == T + 1
    assert [str(T + number) in caplog.text for number in range(4)] == [False, False, True, True]


def test_a_session_that_is_left_out_of_the_list_is_logged_once(app, store, caplog):
    store.save(T, service.Change(b"[]"))
    for _ in range(3):
        assert app.get("/api/v1/session/list").json["count"] == 0
    assert len([record for record in caplog.records if str(T) in record.getMessage()]) == 1


@pytest.mark.parametrize(
    "copy, newest",
    [
        pytest.param(b'{"timestamp": %d}' % (T + 1), T + 1, id="newer"),
        pytest.param(b'{"timestamp": %d.0}' % (T + 1), T + 1, id="newer, as a float"),
        pytest.param(b'{"timestamp": "%d"}' % (T + 1), T + 1, id="newer, as text"),
        pytest.param(b'{"timestamp": %d.5}' % (T + 1), T + 1, id="newer, with half a ms"),
        pytest.param(b'{"timestamp": %d}' % T, T, id="same as the newest"),
        pytest.param(b'{"timestamp": %d}' % ((T + 1000) // 1000), T, id="like seconds, but a name"),
        pytest.param(b'{"timestamp": %d}' % (T - 1), T, id="older"),
        pytest.param(b'{"timestamp": "soon"}', T, id="without a timestamp"),
        pytest.param(b"no JSON", T, id="no JSON"),
        pytest.param(b"[]", T, id="no object"),
    ],
)
def test_a_newer_session_latest_is_the_latest_session(redis_store, other_program, caplog, copy, newest):
    redis_store.save(T, service.Change(b'{"saved": "here"}'))
    other_program.set("session:latest", copy)
    sessions = service.Sessions(redis_store)
    for _ in range(2):
        found = sessions.latest()
        assert (found.timestamp, found.document) == (newest, b'{"saved": "here"}' if newest == T else copy)
    assert len(caplog.records) == (b"soon" in copy or b"timestamp" not in copy)  # once


@pytest.fixture
def parsed(monkeypatch) -> list[int]:
    """The timestamp of each document that is parsed."""
    timestamps, find = [], service.find_facts
    monkeypatch.setattr(service, "find_facts", lambda stored: timestamps.append(stored.timestamp) or find(stored))
    return timestamps


def test_reading_many_sessions_keeps_few_documents_in_memory(store):
    for number in range(32):
        store.save(T + number, service.Change(b"%d" % number + bytes(1_000_000)))
    tracemalloc.start()
    try:
        assert sum(bool(found) for found in store.read_sessions(range(T, T + 32))) == 32
        assert tracemalloc.get_traced_memory()[1] < 21_000_000  # redis-py has the bytes of 8 as well
    finally:
        tracemalloc.stop()


def test_equal_documents_are_parsed_once_even_concurrently(store, parsed, monkeypatch):
    sessions, asked, find = service.Sessions(store), [], service.find_facts
    monkeypatch.setattr(service, "find_facts", lambda stored: (wait_until(lambda: len(asked) == 8), find(stored))[1])
    for number in range(8):
        store.save(T + number, service.Change(json.dumps(episode(READY_BEAT)).encode()))
    found = at_once(*[lambda one=one: asked.append(one) or sessions.facts_of(one) for one in store.sessions()])
    assert [facts.progress.ready for facts in found] == [True] * 8
    assert len(parsed) == 1


def test_several_sessions_are_read_in_one_round_trip_and_parsed_only_on_demand(redis_store, other_program, parsed):
    sessions = service.Sessions(redis_store)
    redis_store.save(T, service.Change(json.dumps(episode(READY_BEAT)).encode()))
    redis_store.save(T + 1, service.Change(b"no JSON"))
    other_program.rpush(f"session:{T + 2}", "another type")
    before = reads_of(other_program)
    *found, missing = redis_store.read_sessions([T, T + 1, T + 2, T + 3])
    assert reads_of(other_program) - before == 2  # one is INFO's
    assert (list(map(sessions.cached, found)), missing, parsed) == ([None, None, None], None, [])
    good, faulty, wrong = map(sessions.facts_of, found)
    assert good.progress.ready is True
    assert (faulty.fault, wrong.fault) == ("not JSON (Expecting value at character 0)", "its key is not a string")
    assert list(map(sessions.cached, found)) == [good, faulty, wrong]


def test_the_cache_of_facts_is_bounded_in_entries_and_in_bytes(store, parsed, monkeypatch):
    monkeypatch.setattr(service.Sessions, "CACHE_SIZE", 3)
    sessions = service.Sessions(store)
    for number in range(5):
        document = episode(READY_BEAT, number=number)
        document["analyzedEpisode"]["title"] = "t" * (10_000 if number == 4 else 10)  # part of the summary
        store.save(T + number, service.Change(json.dumps(document).encode()))
        sessions.facts_of(store.session(T + number))
    parsed.clear()
    for number in (3, 2, 1, 0, 4):
        facts = sessions.facts_of(store.session(T + number))
        assert facts.summary["analyzedEpisode"]["title"][0] == "t"
    assert parsed == [T, T + 4]


# ======================================================================================================
# Notifications
# ======================================================================================================

MEMBER = {"id": "theirs", "type": PROMPTS, "sessionTimestamp": T, "totalPrompts": 48}


@pytest.fixture
def notifications(store) -> service.Notifications:
    return service.Notifications(store)


def check(notifications: service.Notifications, *types: str, limit: int = 100) -> list[str]:
    return [found.id for found in notifications.check(types or (PROMPTS,), limit)]


def check_batch(notifications: service.Notifications, limit: int = 100) -> list[str]:
    """The same in a batch."""
    return [found.id for found in notifications.check_many([((PROMPTS,), limit)])[0]]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in MEMBER.items() if key != name}


def numbered(*times: float) -> dict[str, float]:
    """Members with the ids n0, n1, ... as JSON, and these as their scores."""
    return {json.dumps({**MEMBER, "id": f"n{number}"}): time for number, time in enumerate(times)}


@pytest.mark.parametrize(
    "changed, shown",
    [
        pytest.param({}, {}, id="defaults"),
        pytest.param({"id": "x" * 200}, {"id": "x" * 200}, id="longest id"),
        pytest.param({"id": "ü é"}, {"id": "ü é"}, id="non-ASCII id"),
        pytest.param({"totalPrompts": 0}, {"totalPrompts": 0}, id="no prompts"),
        pytest.param({"sessionTimestamp": float(T), "totalPrompts": 4.0}, {"totalPrompts": 4}, id="floats"),
        pytest.param({"storyUuid": "u", "episodeNumber": 3}, {"storyUuid": "u", "episodeNumber": 3}, id="all fields"),
        pytest.param({"storyUuid": 5, "episodeNumber": "three"}, {}, id="wrong types"),
        pytest.param({"storyUuid": None, "episodeNumber": 1.5, "totalBeats": "x"}, {}, id="more wrong types"),
        pytest.param({"sessionTimestamp": T + 0.5}, {}, id="fraction of a ms"),
        pytest.param({"totalPrompts": "007", "episodeNumber": "3"}, {"totalPrompts": 7, "episodeNumber": 3}, id="text"),
        pytest.param({"sessionTimestamp": str(T)}, {}, id="session as text"),
        pytest.param({"sessionTimestamp": 1738195200}, {"sessionTimestamp": 1738195200}, id="session like seconds"),
        pytest.param({"timestamp": 1738195201.5}, {"timestamp": "2025-01-30T00:00:01.500Z"}, id="time in seconds"),
        pytest.param({"timestamp": str(T + 1000)}, {"timestamp": "2025-01-30T00:00:01Z"}, id="time in ms, as text"),
        pytest.param({"timestamp": None}, {}, id="null time"),
        pytest.param({"timestamp": "soon"}, {}, id="invalid time"),
        pytest.param({"type": BEATS, "totalBeats": 50}, {"type": BEATS, "totalBeats": 50}, id="beats_ready"),
        pytest.param({"timestamp": "2026-01-29T10:00:00Z"}, {"timestamp": "2026-01-29T10:00:00Z"}, id="time"),
        # JavaScript takes a time without a zone for local time, and cannot read seconds in a zone.
        pytest.param({"timestamp": "2026-01-29T10:00:00"}, {"timestamp": "2026-01-29T10:00:00Z"}, id="no zone"),
        pytest.param({"timestamp": "2026-01-29T10:00+01:00:30"}, {"timestamp": "2026-01-29T08:59:30Z"}, id="odd zone"),
    ],
)
def test_a_valid_member_is_shown_with_exactly_the_documented_keys(changed, shown):
    found = json.loads(service.read_member(json.dumps({**MEMBER, **changed}).encode(), T + 0.9).text)
    total = {} if "totalBeats" in shown else {"totalPrompts": 48}
    expected = {"id": "theirs", "type": PROMPTS, "sessionTimestamp": T, "storyUuid": "", "episodeNumber": 0}
    assert found == {**expected, **total, "timestamp": "2025-01-30T00:00:00Z", **shown}
    assert float not in map(type, found.values())


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(b"no JSON", id="not JSON"),
        pytest.param(b"\xff", id="not UTF-8"),
        pytest.param([MEMBER], id="not an object"),
        *(pytest.param(without(name), id=f"no {name}") for name in ("id", "type", "sessionTimestamp")),
        *(
            pytest.param({**MEMBER, name: value}, id=f"{name} {value!r:.9}")
            for name, values in {
                "id": (5, None, "", "a/b", "a\\b", "a\nb", "x" * 201),
                "type": ("images_ready", None, ["x"]),
                "sessionTimestamp": ("x", "1.5", True, None, -0.5),
                "totalPrompts": ("x", "4.0", "-1", "\u0663", 1.5, True, None, -1),
            }.items()
            for value in values
        ),
        pytest.param({**without("totalPrompts"), "totalBeats": 5}, id="the other type's total"),
    ],
)
def test_an_invalid_member_is_skipped_logged_once_and_kept(store, notifications, clock, plant, caplog, member):
    plant(member, clock.now)
    plant(MEMBER, clock.now + 1)
    for _ in range(3):
        assert check(notifications) == ["theirs"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["notifications"]
    assert len(list(store.pending(100))) == 2


@pytest.mark.parametrize("number", ["three", 1.5, True, -1])
def test_an_invalid_episode_number_is_shown_as_0_and_logged_once(notifications, clock, plant, caplog, number):
    plant({**MEMBER, "episodeNumber": number}, clock.now)
    for _ in range(2):
        (found,) = notifications.check([PROMPTS], 100)
        assert json.loads(found.text)["episodeNumber"] == 0
        assert notifications.check_many([((PROMPTS,), 1)]) == [[found]]
    assert len([record for record in caplog.records if "episodeNumber" in record.getMessage()]) == 1


CHANGED_IDS = ["ep2#3", "a?b", "#", "?", "%41", "a%2fb", "%2e", ".", "..", "100%25", "\ud83d", "a\ude00b"]
KEPT_IDS = ["%", "100%", "a%4", "%zz", "...", ".a", " a ", "a b", "ü😀", "a+b&c=d;e:f@g,h", "\"<>^`{|}~[]'*", "%é1"]


@pytest.mark.parametrize("id", CHANGED_IDS)
def test_an_id_that_an_unescaped_path_changes_is_hidden_and_logged_once(store, notifications, clock, plant, caplog, id):
    plant({**MEMBER, "storyUuid": "u" * 300, "id": id}, clock.now)
    plant({**MEMBER, "storyUuid": "u" * 3000, "id": "theirs"}, clock.now + 1)
    for _ in range(2):
        assert check(notifications) == check_batch(notifications) == ["theirs"]
    assert [repr(id) in record.getMessage() for record in caplog.records] == [True]
    assert len(members_of(store)) == 2


@pytest.mark.parametrize("id", [*KEPT_IDS, *(id for id in CHANGED_IDS if id not in (".", "..") and id.isprintable())])
def test_an_id_is_acknowledged_by_its_escaped_path_and_shown_if_the_unescaped_one_works(app, clock, plant, id):
    plant({**MEMBER, "id": id}, clock.now)
    assert [shown["id"] for shown in pending(app)] == [id] * (id in KEPT_IDS)
    whole = "".join(part if part in "%" else urllib.parse.quote(part) for part in re.split("(%)", id))
    path = whole if id in KEPT_IDS else urllib.parse.quote(id, safe="")
    assert app.post(f"/api/v1/notifications/{path}/ack").json["notificationId"] == id
    assert pending(app) == []


def test_a_member_with_a_score_beyond_the_calendar_is_invalid(notifications, plant):
    plant(MEMBER, 1e300)
    assert check(notifications) == []
    assert notifications.acknowledge(["theirs"]) == []


def test_check_returns_the_oldest_first_up_to_its_limit(notifications, clock, plant):
    order = [number * 7 % 20 for number in range(20)]
    for member, at in numbered(*(clock.now + number for number in order)).items():
        plant(member.encode(), at)
    oldest = [f"n{order.index(number)}" for number in range(20)]
    for limit in (1, 19, 20, 1000):
        assert check(notifications, limit=limit) == oldest[:limit]


def test_check_finds_members_behind_many_that_it_does_not_show(notifications, clock, plant):
    created = notifications.create([draft(BEATS, session=T + number) for number in range(1100)])  # beyond a page
    plant({**MEMBER, "id": "acknowledged", "acknowledged": True}, clock.now + 1100)
    plant({**MEMBER, "id": "unknown", "type": "unknown"}, clock.now + 1101)
    plant({**MEMBER, "id": "shown", "acknowledged": "true"}, clock.now + 1102)
    assert check(notifications, limit=1) == ["shown"]
    assert check(notifications, BEATS, limit=1) == [created[0][0].id]
    assert check(notifications, BEATS, PROMPTS, limit=2000)[-2:] == [created[-1][0].id, "shown"]


def test_check_omits_members_that_have_a_marker(redis_store, other_program, clock):
    other_program.zadd("notifications:pending", numbered(*(clock.now + number for number in range(150))))
    other_program.mset({f"notifications:ack:n{number}": "1" for number in range(120)})
    assert check(service.Notifications(redis_store), limit=2) == ["n120", "n121"]


def test_checks_in_a_batch_get_the_answers_that_each_gets_alone(notifications):
    notifications.create([draft(BEATS if number % 3 else PROMPTS, session=T + number) for number in range(150)])
    queries = [((BEATS,), 10), ((PROMPTS,), 10), ((BEATS, PROMPTS), 100), ((PROMPTS,), 100), ((BEATS,), 1)]
    alone = [notifications.check(*query) for query in queries]
    for _ in range(2):
        assert notifications.check_many(queries) == [*alone[:3], None, alone[4]]  # None: it needs over 100 members
        assert notifications.check_many([*queries, ((PROMPTS,), 1000)]) == [*alone, alone[3]]


def test_a_member_scored_in_seconds_is_shown_with_its_time_and_acknowledged(
    make_app, redis_store, other_program, clock
):
    app, seconds = make_app(redis_store), int(clock.now) // 1000
    other_program.zadd("notifications:pending", numbered(*range(seconds + 1, seconds + 4)))
    made = make_pending(app)
    times = [service.iso_time(int(clock.now) + 1000 * number) for number in range(1, 4)]
    for query in ("", "?type=all&limit=1000"):
        assert [shown["timestamp"] for shown in pending(app, query)[:3]] == times
        assert [shown["id"] for shown in pending(app, query)] == ["n0", "n1", "n2", made]
    assert check(service.Notifications(redis_store), limit=2) == ["n0", "n1"]
    for number in range(3):
        assert app.post(f"/api/v1/notifications/n{number}/ack").json["success"] is True
    assert [shown["id"] for shown in pending(app)] == [made]


@pytest.mark.parametrize("per_second", [1, 1000], ids=["in seconds", "in ms"])
def test_another_programs_member_older_than_7_days_is_kept_hidden_and_logged_once(
    make_app, redis_store, other_program, clock, caplog, per_second
):
    app, notifications = make_app(redis_store), service.Notifications(redis_store)
    made = make_pending(app)
    expired = [(clock.now - WEEK - number) * per_second / 1000 for number in range(2)]
    other_program.zadd("notifications:pending", numbered(*expired))
    for _ in range(3):
        assert [shown["id"] for shown in pending(app)] == [made]
        make_pending(app, sessionTimestamp=T + 1)
        app.post(f"/api/v1/notifications/{pending(app)[1]['id']}/ack")
        notifications.report_expired()
    logged = [record.getMessage() for record in caplog.records if "older than 7 days" in record.getMessage()]
    assert sorted(re.findall('"(n.)"', " ".join(logged))) == ["n0", "n1"]
    assert other_program.zcard("notifications:pending") == 3
    app.post("/api/v1/notifications/n0/ack", status=404)


def test_members_that_expire_later_are_logged_too(redis_store, other_program, clock, caplog, monkeypatch):
    monkeypatch.setattr(service.Notifications, "MAX_REPORTED", 10)
    notifications = service.Notifications(redis_store)
    for number in range(12):
        other_program.zadd("notifications:pending", {f"member {number}": clock.now - WEEK - 100 + number})
        notifications.report_expired()
    assert [re.search("member [0-9]+", message)[0] for message in caplog.messages] == [f"member {n}" for n in range(10)]


def check_cost(notifications: service.Notifications, other_program: redis.Redis) -> int:
    """The bytes that Redis sends for a check of 5 notifications, and for INFO."""
    before = other_program.info("stats")["total_net_output_bytes"]
    assert len(check_batch(notifications, limit=5)) == 5
    return other_program.info("stats")["total_net_output_bytes"] - before


def test_many_expired_members_hide_no_others_and_are_not_read_by_a_check(redis_store, other_program, clock, caplog):
    notifications = service.Notifications(redis_store)
    other_program.zadd("notifications:pending", numbered(*(clock.now + number for number in range(5))))
    before = check_cost(notifications, other_program)
    other_program.zadd("notifications:pending", {f"{number:0100}": clock.now - WEEK - number for number in range(5000)})
    assert check_cost(notifications, other_program) < 1.1 * before
    for _ in range(2):
        notifications.report_expired()
    assert len(caplog.records) == 1000


def test_a_check_with_a_large_limit_makes_later_checks_no_costlier(redis_store, other_program, clock):
    notifications = service.Notifications(redis_store)
    other_program.zadd("notifications:pending", numbered(*(clock.now + number for number in range(1000))))
    before = check_cost(notifications, other_program)
    for _ in range(4):
        assert notifications.check_many([((BEATS,), 5)]) == [None]
        assert len(check_batch(notifications, limit=1000)) == 1000
    assert check_cost(notifications, other_program) < 1.1 * before


def test_a_repeated_check_parses_nothing_and_makes_one_round_trip(redis_store, other_program, monkeypatch):
    notifications = service.Notifications(redis_store)
    other_program.zadd("notifications:pending", {"no JSON": service.now_ms()})
    created = notifications.create([draft(session=T + number) for number in range(60)])
    assert check_batch(notifications) == [found.id for found, _ in created]
    monkeypatch.setattr(service, "read_member", None)
    before = reads_of(other_program)
    for count in range(1, 4):
        assert len(check_batch(notifications)) == 60
        assert reads_of(other_program) - before == 2 * count  # one each is INFO's


def test_a_check_sees_what_another_program_adds_marks_and_unmarks(redis_store, other_program, clock):
    notifications, shown = service.Notifications(redis_store), []
    other_program.set("notifications:ack:n1", "1")
    for member, at in numbered(clock.now, clock.now + 1, clock.now + 2).items():
        other_program.zadd("notifications:pending", {member: at})
        shown.append(check_batch(notifications))
    assert shown == [["n0"], ["n0"], ["n0", "n2"]]
    other_program.delete("notifications:ack:n1")
    assert check_batch(notifications) == ["n0", "n1", "n2"]
    other_program.set("notifications:ack:n0", "1")
    assert check_batch(notifications) == ["n1", "n2"]


def test_the_cache_of_members_is_bounded_in_entries_and_in_bytes(store, clock, plant, monkeypatch):
    monkeypatch.setattr(service.Notifications, "CACHE_SIZE", 2)
    notifications, read, parsed = service.Notifications(store), service.read_member, []
    monkeypatch.setattr(service, "read_member", lambda member, at: parsed.append(len(member)) or read(member, at))
    plant({**MEMBER, "id": "large", "storyUuid": "u" * 3000}, clock.now - 1)
    for number, parsed_again in enumerate([False, False, True]):
        plant({**MEMBER, "id": f"small{number}"}, clock.now + number)
        check(notifications)
        parsed.clear()
        assert len(check(notifications)) == number + 2
        assert [size > 2048 for size in parsed] == [True] + [False] * 3 * parsed_again


@pytest.mark.parametrize(
    "member, id",
    [
        pytest.param(MEMBER, "theirs", id="plain"),
        pytest.param(
            rb'{"id":"\u0074h\u00fc","type":"prompts_ready","sessionTimestamp":1,"totalPrompts":1}', "thü", id="escaped"
        ),
        pytest.param({**MEMBER, "id": f"notif_{T}_{'0' * 16}"}, f"notif_{T}_{'0' * 16}", id="like ours"),
        pytest.param({**MEMBER, "acknowledged": True}, "theirs", id="acknowledged already"),
    ],
)
def test_another_programs_id_is_acknowledged_with_all_its_members(store, notifications, clock, plant, member, id):
    plant(b"no JSON, with theirs in it", clock.now)
    plant(member, clock.now + 1)
    plant({**MEMBER, "id": id, "totalPrompts": 7}, clock.now + 1)
    plant({**MEMBER, "id": "not " + id}, clock.now + 2)
    assert [notifications.acknowledge([id]) for _ in range(2)] == [[id], [id]]
    assert check(notifications) == ["not " + id]


def test_acknowledging_a_notification_of_ours_reads_no_other(store, notifications, monkeypatch):
    created = notifications.create([draft(session=T + number) for number in range(300)])
    monkeypatch.setattr(store, "pending", None)
    for _ in range(2):
        assert notifications.acknowledge([created[-1][0].id])


def test_redis_answers_a_check_of_many_in_few_commands(redis_store, other_program):
    notifications = service.Notifications(redis_store)
    notifications.create([draft(session=T + number) for number in range(60)])
    other_program.config_resetstat()
    assert len(check(notifications)) == 60
    counts = {name: row["calls"] for name, row in other_program.info("commandstats").items()}
    assert max(counts.values()) <= 2


@pytest.mark.parametrize(
    "document, step",
    [
        pytest.param(episode({}, READY_BEAT), BEATS, id="prompts missing"),
        pytest.param(episode(READY_BEAT), PROMPTS, id="ready"),
        pytest.param({"analyzedEpisode": {"scenes": []}}, None, id="no beats"),
        pytest.param(episode(READY_BEAT, promptMode="storyart"), None, id="promptMode storyart"),
        pytest.param(episode(READY_BEAT, promptMode=None), None, id="no promptMode"),
    ],
)
def test_only_a_session_that_waits_for_storyswarm_announces_its_step(document, step):
    document = {"promptMode": "storyswarm", **document}
    found = service.due_notification(T, document)
    assert (found and (found.type, found.session)) == (step and (step, T))


@pytest.mark.parametrize(
    "story, number, expected",
    [("u", 2, ("u", 2)), ("u", 2.0, ("u", 2)), (None, None, ("", 0)), (5, "2", ("", 2)), ([], 1.5, ("", 0))],
)
def test_an_announcement_is_valid_whatever_else_its_session_contains(notifications, story, number, expected):
    document = episode(READY_BEAT, {"imageDecision": {"type": "NO_IMAGE"}}, promptMode="storyswarm", storyUuid=story)
    document["analyzedEpisode"]["episodeNumber"] = number
    found, _ = notifications.create([service.due_notification(T, document)])[0]
    shown = json.loads(found.text)
    assert (shown["type"], shown["sessionTimestamp"], shown["totalPrompts"]) == (PROMPTS, T, 1)
    assert (shown["storyUuid"], shown["episodeNumber"]) == expected


# ======================================================================================================
# GPU
# ======================================================================================================

UNREADABLE = ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "[Insufficient Permissions]", "[GPU is lost]",
              "[GPU requires reset]", "", "nan", "inf", "-5"]  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        pytest.param("8, 819, 8192, 45, 1\n", (1, 8, 819, 8192, 45), id="RTX 2080 SUPER, Linux, busy"),
        pytest.param("0, 596, 16376, 43, 1\n", (1, 0, 596, 16376, 43), id="RTX 4080 SUPER, Linux, idle"),
        pytest.param("7, 1296, 8192, 45, 1\r\n", (1, 7, 1296, 8192, 45), id="RTX 2080 SUPER, Windows, busy"),
        pytest.param("[N/A], 11125, 81559, 53, 1\n", (1, 0, 11125, 81559, 53), id="H100, partitioned"),
        pytest.param("10, 1, 100, 40, 2\n13, 2, 200, 60, 2\n", (2, 12, 3, 300, 60), id="two GPUs, half rounded up"),
        pytest.param("1, 1, 1, 1, 3\n0, 1, 1, 9, 3\n0, 1, 1, 4, 3\n", (3, 0, 3, 3, 9), id="three GPUs, rounded down"),
        pytest.param("5, [N/A], [N/A], 44, 1\n", (1, 5, 500, 120_000, 44), id="GB10, with the system's memory"),
        pytest.param("N/A, 7, N/A, 44, 1\n", (1, 0, 500, 120_000, 44), id="used memory is readable"),
        pytest.param(
            "4, [N/A], [Not Supported], 44, 2\n9, [N/A], [Not Supported], 50, 2\n",
            (2, 7, 500, 120_000, 50),
            id="two with the system's memory",
        ),
        pytest.param(
            "5, [N/A], [N/A], 44, 3\n1, 1, [GPU is lost], 90, 3\n90, 0, [N/A], [N/A], 3\n",
            (1, 5, 500, 120_000, 44),
            id="another is lost, a third without temperature",
        ),
        pytest.param("9, 0, [N/A], 99, 2\n8, 819, 8192, 45, 2\n", (1, 8, 819, 8192, 45), id="another has its own"),
    ],
)
def test_recorded_output_of_nvidia_smi_is_parsed(printed, expected):
    status = service.parse_gpus(printed, memory=(500, 120_000))
    assert dataclasses.astuple(status)[:6] == (True, *expected)
    assert (status.failed, status.error) == (False, None)


@pytest.mark.parametrize("cell", UNREADABLE)
def test_an_unreadable_value_is_0(cell):
    status = service.parse_gpus(f"{cell}, {cell}, 8192, {cell}, 1")
    assert (status.available, status.utilization, status.memory_used, status.temperature) == (True, 0, 0, 0)


@pytest.mark.parametrize("cell", UNREADABLE)
def test_a_gpu_without_readable_total_memory_is_not_counted(cell):
    status = service.parse_gpus(f"90, 500, {cell}, 80, 2\n10, 100, 8192, 40, 2")
    assert (status.gpu_count, status.utilization, status.memory_used, status.temperature) == (1, 10, 100, 40)


@pytest.mark.parametrize(
    "printed",
    ["", " \n\n", "8, 819, 8192, 45\n", "8, 819, 8192, 45, 1, 7\n", "8, 819, 8192, 45, GPU is lost\n",
     "8, 819, [N/A], [N/A], 1\n", *(f"8, 819, {cell}, 45, 1\n" for cell in UNREADABLE[3:])],
)  # fmt: skip
def test_output_without_a_usable_gpu_is_a_failure(printed):
    status = service.parse_gpus(printed, memory=(500, 120_000))
    assert (status.available, status.failed) == (False, True)
    assert "nvidia-smi" in status.error


def test_a_gpu_without_its_own_memory_is_a_failure_if_the_systems_is_unknown():
    assert service.parse_gpus("5, [N/A], [N/A], 44, 1\n", memory=None).failed


def test_the_systems_memory_is_in_mib():
    used, total = service.system_memory() or (0, 0)
    assert (0 < used < total) == (sys.platform != "darwin")
    if sys.platform == "linux":
        assert total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.fixture
def nvidia_smi(tmp_path, leash):
    """Makes an nvidia-smi that answers the two queries as these say, and writes each run into the file `runs`."""

    def make(gpus: dict[str, Any], processes: dict[str, Any]) -> str:
        plan = {"gpus": gpus, "processes": processes, "leash": leash.port, "leash_code": LEASH}
        plan["runs"] = str(tmp_path / "runs")
        return str(write_program(tmp_path / "nvidia smi", NVIDIA_SMI, plan))

    return make


GOOD = {"print": "8, 819, 8192, 45, 1\n"}


def run_queries(program: str, timeout: float = PATIENCE, running: Any = None) -> service.GpuStatus:
    settings = service.Settings(nvidia_smi=program, nvidia_smi_timeout=timeout)
    return service.query_gpus(settings, set() if running is None else running)


def test_the_status_has_exactly_the_documented_keys(make_app, nvidia_smi):
    answer = make_app(nvidia_smi=nvidia_smi(GOOD, {"print": "41\n42\n42\n"})).get("/api/v1/gpu/status")
    assert answer.json == {
        "available": True, "gpuCount": 1, "utilization": 8, "memoryUsed": 819, "memoryTotal": 8192, "temperature": 45,
        "processCount": 2, "error": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "code", "status", "error"),
    [
        ("No devices were found", 6, 200, "No devices were found"),
        ("No devices were found", 0, 200, "No devices were found"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, 500, "the NVIDIA driver"),
        ("Failed to initialize NVML: Driver/library version mismatch", 18, 500, "version mismatch"),
        ("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.", 15, 500, "GPU is lost"),
        ("", 4, 500, "exit code 4"),
        ("", 0, 500, "printed nothing"),
        ("8, 819", 0, 500, "8, 819"),
    ],
)
def test_a_failure_is_reported_in_the_words_of_nvidia_smi(make_app, nvidia_smi, tmp_path, printed, code, status, error):
    program = nvidia_smi({"print": printed, "exit": code}, {"print": "41\n"})
    answer = make_app(nvidia_smi=program).get("/api/v1/gpu/status", status=status)
    assert error in answer.json["error"]
    assert answer.json == {**service.gpu_json(service.GpuStatus()), "error": answer.json["error"]}
    assert (tmp_path / "runs").read_text().split().count("gpus") == 1


CORRUPT = "WARNING: infoROM is corrupted at gpu 0000:01:00.0\n"
LOST = "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.\n"


@pytest.mark.parametrize(
    ("gpus", "remarks"),
    [
        pytest.param({"print": GOOD["print"] + CORRUPT, "exit": 14}, CORRUPT, id="a warning after it"),
        pytest.param({"print": f"\n{LOST}\n{GOOD['print']}", "exit": 15}, LOST, id="a lost GPU before it"),
        pytest.param({**GOOD, "stderr": CORRUPT, "exit": 14}, CORRUPT, id="a warning on stderr"),
        pytest.param({**GOOD, "exit": 255}, "", id="only an exit code"),
        pytest.param({**GOOD, "stderr": "No devices were found\n"}, "No devices were found", id="no devices"),
    ],
)
def test_a_readable_gpu_counts_whatever_else_nvidia_smi_prints(make_app, nvidia_smi, caplog, gpus, remarks):
    app = make_app(nvidia_smi=nvidia_smi(gpus, {**gpus, "print": f"{CORRUPT}41\n42\n"}))
    answers = [app.get("/api/v1/gpu/status").json for _ in range(2)]
    assert answers == [{**service.gpu_json(service.parse_gpus(GOOD["print"])), "processCount": 2}] * 2
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert logged == [f"gpu: nvidia-smi works, but says: {remarks.strip()}"] * bool(remarks)


def test_a_gpu_without_its_own_memory_is_reported_with_the_systems(make_app, nvidia_smi, monkeypatch):
    monkeypatch.setattr(service, "system_memory", lambda: (500, 120_000))
    answer = make_app(nvidia_smi=nvidia_smi({"print": "5, [N/A], [N/A], 44, 1\n"}, {})).get("/api/v1/gpu/status").json
    assert (answer["available"], answer["memoryUsed"], answer["memoryTotal"]) == (True, 500, 120_000)


def test_each_remark_is_logged_once(make_monitor, caplog):
    remarks = iter("abab")
    monitor = make_monitor(lambda _: service.GpuStatus(available=True, remarks=next(remarks)), 0)
    for _ in range(4):
        status_of(monitor)
    assert [record.getMessage()[-1] for record in caplog.records] == ["a", "b"]


def test_the_output_of_a_crashed_nvidia_smi_does_not_count(nvidia_smi):
    status = run_queries(nvidia_smi({**GOOD, "stderr": "stack smashed\n", "crash": True}, {"print": "41\n"}))
    assert status.failed
    assert status.error.endswith(": 8, 819, 8192, 45, 1 stack smashed")


def test_a_missing_nvidia_smi_is_a_500_that_names_the_setting(make_app, tmp_path):
    answer = make_app(nvidia_smi=str(tmp_path / "nowhere")).get("/api/v1/gpu/status", status=500)
    assert "nvidia-smi not found or GPU not available" in answer.json["error"]
    assert f"NVIDIA_SMI is {tmp_path / 'nowhere'}, which cannot be run" in answer.json["error"]
    assert "install" not in answer.json["error"]


def test_without_a_setting_a_missing_nvidia_smi_is_a_500_that_asks_to_install_it(make_app, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(service, "NVIDIA_SMI_PLACES", ())
    answer = make_app(nvidia_smi=None).get("/api/v1/gpu/status", status=500)
    assert answer.json["error"].endswith(": install NVIDIA's driver, or set NVIDIA_SMI")


def test_an_nvidia_smi_that_cannot_be_run_is_a_failure(tmp_path):
    program = tmp_path / "broken.exe"
    program.write_bytes(b"\x7fnot a program")
    program.chmod(0o755)
    status = run_queries(str(program))
    assert status.failed
    assert "cannot be run" in status.error or "exit code" in status.error


@pytest.mark.parametrize(
    ("processes", "count"),
    [
        ({"print": "12\n34\n"}, 2),
        ({"print": "12\r\n12\r\n"}, 1),
        ({"print": "7\n[N/A]\n"}, 1),
        ({"print": ""}, 0),
        ({"print": "[Insufficient Permissions]\n"}, 0),
        ({"print": "5\n", "exit": 9}, 1),
        ({"print": "5\n", "crash": True}, 0),
    ],
)
def test_processes_are_counted_by_distinct_pid_if_they_can_be_listed(nvidia_smi, processes, count):
    status = run_queries(nvidia_smi(GOOD, processes))
    assert (status.available, status.process_count) == (True, count)


@pytest.fixture
def hang_timeout() -> float:
    """Seconds in which an nvidia-smi is sure to hang: several times what it and its child take to start."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import json, socket"], check=True, timeout=PATIENCE)
    return max(1.5, 10 * (time.monotonic() - began))


def test_a_hung_process_query_counts_no_process_and_is_ended_with_its_child(nvidia_smi, leash, hang_timeout):
    status = run_queries(nvidia_smi(GOOD, {"hang": True}), hang_timeout)
    assert (status.available, status.process_count) == (True, 0)
    assert leash.next().has_ended()


def test_an_nvidia_smi_that_prints_without_end_is_a_failure_without_a_timeout(tmp_path):
    program = write_program(tmp_path / "nvidia-smi", "while True: sys.stdout.write('8, 819, 8192, 45, 1' * 1000)", {})
    status = run_queries(str(program))
    assert status.failed
    assert "did not answer" not in status.error


def test_a_hung_nvidia_smi_is_ended_with_its_child(nvidia_smi, leash, hang_timeout):
    status = run_queries(nvidia_smi({"hang": True}, {"print": "41\n"}), hang_timeout)
    assert status.failed
    assert f"did not answer within {hang_timeout:g} s: " in status.error
    assert "NVIDIA_SMI_TIMEOUT" in status.error
    assert leash.next().has_ended()


def test_an_nvidia_smi_that_cannot_be_killed_blocks_nobody_and_runs_once(
    nvidia_smi, leash, hang_timeout, monkeypatch, tmp_path
):
    """It hangs inside its driver, and ends when the driver lets it."""
    popen, children = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    monkeypatch.setattr(service.Program, "end", lambda program, *, force: None)
    if service.WINDOWS:  # nor does it end with its job's handle
        make_job = service._make_job
        monkeypatch.setattr(service, "_make_job", lambda limits: make_job(0))
    program, running = nvidia_smi({"hang": True}, {"print": "41\n"}), set()
    assert "did not answer within" in run_queries(program, hang_timeout, running).error
    assert leash.next().is_alive()
    assert "cannot be ended: restart this PC" in run_queries(program, hang_timeout, running).error
    assert len((tmp_path / "runs").read_text().splitlines()) == 2  # one for each query
    leash.close()
    assert all(child.wait(PATIENCE) is not None for child in children)
    assert run_queries(nvidia_smi(GOOD, {"print": "41\n"}), running=running).available


def test_both_queries_run_concurrently(nvidia_smi, leash, tmp_path):
    """Neither would end alone: each waits until the other has started, too."""
    wait = 'while len(open(plan["runs"]).readlines()) < 2: pass\n'
    plan = {"gpus": GOOD, "processes": {"print": "41\n"}, "runs": str(tmp_path / "runs")}
    code = NVIDIA_SMI.replace("sys.stdout.write(act.get", wait + "sys.stdout.write(act.get", 1)
    program = write_program(tmp_path / "both", code, plan)
    assert run_queries(str(program)).process_count == 1


@pytest.mark.parametrize("number", range(4))
def test_a_thread_that_cannot_be_started_fails_only_one_run(nvidia_smi, monkeypatch, number):
    program = nvidia_smi(GOOD, {"print": "41\n"})
    running: set[service.Program] = set()
    left = iter(range(number + 1))
    fail_to_start_thread(monkeypatch, lambda thread: next(left, None) == number)
    status = run_queries(program, running=running)
    assert status.failed
    assert "can't start new thread" in status.error
    assert run_queries(program, running=running).process_count == 1
    assert running == set()


@pytest.fixture
def make_monitor():
    with contextlib.ExitStack() as stack:
        yield lambda *given, **named: stack.enter_context(contextlib.closing(service.GpuMonitor(*given, **named)))


def status_of(monitor: service.GpuMonitor) -> service.GpuStatus:
    asked = monitor.ask()
    return asked.result(PATIENCE) if isinstance(asked, Future) else asked


class Runs:
    """A query whose runs are counted, and end when the test lets them."""

    def __init__(self) -> None:
        self.count = 0
        self.began = threading.Semaphore(0)
        self.end = threading.Semaphore(0)

    def __call__(self, running: set[service.Program]) -> service.GpuStatus:
        self.count += 1
        self.began.release()
        assert self.end.acquire(timeout=PATIENCE)
        return service.GpuStatus(available=True, gpu_count=self.count)


@pytest.mark.parametrize("status", [service.GpuStatus(available=True), service.GpuStatus(error="broken", failed=True)])
def test_a_good_or_bad_status_is_cached_for_its_ttl(make_monitor, status):
    clock, runs = Clock(100.0), []
    monitor = make_monitor(lambda _: runs.append(1) or status, 5.0, clock)
    assert status_of(monitor) == status
    clock.now += 4.9
    assert monitor.ask() == status
    assert len(runs) == 1
    clock.now += 0.1
    assert status_of(monitor) == status
    assert len(runs) == 2


@pytest.mark.parametrize(("ttl", "run"), [(5.0, 1), (0.0, 2)], ids=["cached", "not cached"])
def test_callers_during_a_run_share_its_status_or_that_of_the_next_run(make_monitor, ttl, run):
    runs = Runs()
    monitor = make_monitor(runs, ttl)
    first = monitor.ask()
    assert runs.began.acquire(timeout=PATIENCE)
    others = [monitor.ask() for _ in range(100)]
    runs.end.release(2)
    assert first.result(PATIENCE).gpu_count == 1
    assert {other.result(PATIENCE).gpu_count for other in others} == {run}
    assert runs.count == run


def test_a_caller_that_cancels_leaves_the_others_waiting(make_monitor):
    runs = Runs()
    monitor = make_monitor(runs, 0.0)
    first = monitor.ask()
    assert runs.began.acquire(timeout=PATIENCE)
    cancelled, second = monitor.ask(), monitor.ask()
    assert cancelled.cancel()
    runs.end.release()
    assert first.result(PATIENCE).gpu_count == 1
    assert runs.began.acquire(timeout=PATIENCE)
    assert monitor.ask().cancel()  # so nobody needs a third run
    runs.end.release()
    assert second.result(PATIENCE).gpu_count == 2
    monitor.close()
    assert runs.count == 2


def test_closing_the_monitor_ends_its_run_and_starts_no_other(make_monitor, monkeypatch):
    runs = Runs()
    monitor = make_monitor(lambda running: running.add(service.Program(5, None)) or runs(running), 0.0)
    monkeypatch.setattr(service.Program, "end", lambda program, *, force: program.pid == 5 and runs.end.release())
    before = monitor.ask()
    assert runs.began.acquire(timeout=PATIENCE)
    waiting = monitor.ask()
    monitor.close()
    assert (before.result(0).available, waiting.result(0).failed, runs.count) == (True, True, 1)
    assert "gpu" not in {thread.name for thread in threading.enumerate()}


# ------------------------------------------------------------------------------ reservations ----

RESERVATION = "/api/v1/gpu/reservation"
HOLDER_KEYS = ["holder", "purpose", "since", "expiresAt"]


class Pc:
    """An instance of the service on a store, with clocks that the test sets: monotonic (s), and the PC's (ms)."""

    def __init__(self, services: service.Services, clock: Any, wall: Any) -> None:
        services.reservations.close()
        self.reservations = services.reservations = service.Reservations(
            services.store, "pc", clock, wall, watches=services.settings.gates
        )
        self.services = services
        self.app = webtest.TestApp(
            service.create_app(services), extra_environ={"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}, lint=False
        )

    def call(self, method: str, path: str = "", status: int = 200, body: Any = None, **headers: str) -> Any:
        """Checks the status, and returns the JSON of the response."""
        path = path if path.startswith("/api") else RESERVATION + path
        data = b"" if body is None else json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
        response = self.app.request(path, method=method, body=data, headers=headers, status=status)
        self.headers = response.headers
        return response.json if response.body else None

    def reserve(self, holder: str = "a", ttl: int = 60, status: int = 201, **fields: Any) -> Any:
        return self.call("POST", "", status, {"holder": holder, "ttlSeconds": ttl, **fields})

    def shown(self) -> Any:
        return self.call("GET")["reservation"]


@pytest.fixture
def make_pc(make_services) -> Iterator[Callable[..., Pc]]:
    with contextlib.ExitStack() as stack:

        def make(store: service.Store, clock: Any = time.monotonic, wall: Any = service.now_ms, **changed: Any) -> Pc:
            made = Pc(make_services(store, **changed), clock, wall)
            stack.callback(made.reservations.close)
            return made

        yield make


@pytest.fixture
def pc(make_pc, store) -> Pc:
    return make_pc(store)


def reserve_as(name: str, ttl: float = 60.0) -> Callable[..., Any]:
    """A change that reserves the GPU, if it is free, for a holder whose name is also the digest."""

    def change(known: Any, now: int, fence: int) -> Any:
        return None if known else service.Reservation(name, name, None, ttl, now, now + int(ttl * 1000), fence)

    return change


def test_a_reservation_is_made_shown_renewed_and_released(make_pc, store):
    wall = Clock(T)
    pc = make_pc(store, Clock(100.0), wall)
    assert pc.shown() is None
    made = pc.reserve("render", 60, purpose="episode 2")
    assert list(made) == ["reservationId", "fence", *HOLDER_KEYS]
    id = made.pop("reservationId")
    assert len(id) >= 43
    since, end, renewed_end = (service.iso_time(T + ms) for ms in (0, 60_000, 61_000))
    assert made == {"holder": "render", "purpose": "episode 2", "since": since, "expiresAt": end, "fence": T}
    assert (pc.shown(), pc.reservations.known.holder) == (made, "render")
    wall.now += 1000
    assert pc.call("PUT", f"/{id}") == pc.shown() == {**made, "expiresAt": renewed_end}
    assert pc.call("DELETE", f"/{id}", 204) is None
    assert (pc.shown(), pc.reservations.known) == (None, None)
    assert pc.reserve("other", 1)["purpose"] is None


def test_a_refused_reservation_names_the_holder_and_when_to_retry(make_pc, store):
    pc = make_pc(store, Clock(100.0), Clock(T))
    made = pc.reserve("render\ud83d", 60, purpose="episode 2")
    refused = pc.reserve("other", 60, 409)
    assert refused == {"error": refused["error"], **{key: made[key] for key in HOLDER_KEYS}}
    assert f"reserved by render\ud83d until {made['expiresAt']}" in refused["error"]
    assert pc.headers["Retry-After"] == "60"


@pytest.mark.parametrize(
    "changed",
    [{"holder": None}, {"holder": ""}, {"holder": "x" * 101}, {"holder": 5}, {"ttlSeconds": None}, {"ttlSeconds": 0},
     {"ttlSeconds": 3601}, {"ttlSeconds": "60"}, {"purpose": "x" * 201}, {"purpose": 5}, {"waitSeconds": 61},
     {"waitSeconds": -1}, {"waitSeconds": 0.5}],
)  # fmt: skip
def test_an_invalid_field_is_a_400_that_names_it(pc, changed):
    fields = {"holder": "a", "ttlSeconds": 60, **changed}
    assert next(iter(changed)) in pc.call("POST", "", 400, fields)["error"]
    assert pc.shown() is None


def test_fields_at_their_limits_are_valid(pc):
    pc.reserve("x" * 100, 3600, purpose="y" * 200, waitSeconds=60.0)
    pc.call("DELETE", "", 204)
    pc.reserve("x", 1, purpose=None, waitSeconds=None)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("end", ["unknown", "another's", "released", "ended by an admin", "expired", "expired, taken"])
def test_an_id_of_no_current_reservation_is_a_404(make_pc, store, method, end):
    clock = Clock(100.0)
    pc = make_pc(store, clock)
    id = pc.reserve(ttl=60)["reservationId"] if end != "unknown" else "none"
    if end in ("released", "ended by an admin"):
        pc.call("DELETE", f"/{id}" if end == "released" else "", 204)
    if end.startswith("expired"):
        clock.now += 60
    if end == "expired, taken":
        pc.reserve("other")
    before = pc.shown()
    assert "error" in pc.call(method, "/another" if end == "another's" else f"/{id}", 404)
    assert pc.shown() == before


def test_an_admin_ends_any_reservation(pc):
    assert "error" in pc.call("DELETE", "", 404)
    pc.reserve()
    pc.call("DELETE", "", 204)
    assert pc.shown() is None


def test_the_id_is_in_no_other_response_nor_in_the_log_nor_in_the_store(pc, store, caplog, request):
    caplog.set_level(logging.DEBUG)
    id = pc.reserve("holder-name")["reservationId"]
    shown = [pc.shown(), pc.reserve("other", 60, 409), pc.call("PUT", f"/{id}")]
    for method, path, status in [
        ("GET", f"/{id}", 405), ("PUT", f"/{id}/", 404), ("PUT", f"//{id}", 404), ("PUT", f"/x/{id}", 404),
        ("OPTIONS", f"/{id}", 204), ("PUT", f"/api/v1/GPU/Reservation/{id}", 404), ("DELETE", f"/{id}", 204),
        ("PUT", f"/api/v1/gpu/reservations/{id}", 404),
    ]:  # fmt: skip
        shown.append(pc.call(method, path, status))
    assert id not in json.dumps(shown) + caplog.text
    assert caplog.text.count("/reservation/...") == 7
    if store.name == "redis":
        record = request.getfixturevalue("other_program").get("storyteller:gpu:pc")
    else:
        files = Path(store.place).parent.glob("store.sqlite3*")
        record = b"".join(path.read_bytes() for path in files).decode("latin-1")
    assert "holder-name" in record
    assert (id in record, service.digest_of(id) in record) == (False, True)


def test_a_record_is_read_as_it_was_written_and_an_invalid_one_as_none():
    made = service.Reservation("d", "Müller\ud83d", None, 60, T, T + 60_000, T)
    record = service.to_json(dataclasses.asdict(made))
    assert service.read_reservation(record) == made
    invalid = [None, b"", b"x", b"[]", b"{}", record[:-1], record.replace(b'"fence"', b'"other"')]
    wrong = [{"fence": 2**53 - 1}, {"fence": "5"}, {"expires": "x"}, {"since": None}, {"ttl": None}, {"since": 10**18}]
    invalid += [service.to_json({**dataclasses.asdict(made), **fields}) for fields in wrong]
    assert list(filter(service.read_reservation, invalid)) == []


def test_a_record_that_cannot_be_read_is_replaced(make_pc, store):
    store.swap_reservation("pc", None, b"no record")
    pc = make_pc(store)
    assert pc.shown() is None
    assert pc.reserve()["fence"] > T


@pytest.mark.parametrize(
    ("ahead", "left"), [(0, 60), (1000, 59), (60_000, 0), (-1000, 60), (-3_600_000, 60), (3_600_000, -3540)]
)
def test_the_time_left_is_at_most_the_ttl(ahead, left):
    assert service.Reservation("d", "a", None, 60, T, T + 60_000, T).seconds_left(T + ahead) == left


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_reservation_that_was_read_ends_on_time_though_the_clock_is_set(make_pc, store, twin, hours):
    clock, wall = Clock(100.0), Clock(T)
    ours, other = make_pc(store, clock, wall), make_pc(twin, clock, wall)
    id = ours.reserve(ttl=60)["reservationId"]
    assert other.shown()

    def wait(seconds: float) -> None:
        clock.now += seconds
        wall.now += int(seconds * 1000)

    wall.now += hours * 3_600_000
    wait(59.5)
    other.reserve("b", 60, 409)
    assert int(other.headers["Retry-After"]) in range(1, 61)
    ours.call("PUT", f"/{id}")
    wait(59.5)
    assert [pc.shown()["holder"] for pc in (ours, other)] == ["a", "a"]
    wait(0.5)
    assert [pc.shown() for pc in (ours, other)] == [None, None]
    assert other.reserve("b", 60)["fence"] > T


def test_an_instance_that_reads_a_reservation_late_waits_at_most_its_ttl(make_pc, store, twin):
    clock, wall = Clock(100.0), Clock(T)
    make_pc(store, clock, wall).reserve(ttl=60)
    wall.now -= 3_600_000
    other = make_pc(twin, clock, wall)
    assert other.shown()
    clock.now += 60
    assert other.shown() is None


def test_a_reservation_that_another_instance_just_made_is_shown(make_pc, store, twin):
    clock = Clock(100.0)
    ours, other = make_pc(store, clock), make_pc(twin, clock)
    assert ours.shown() is None
    other.reserve("b")
    clock.now += 0.1
    assert ours.shown()["holder"] == "b"


def test_a_fault_of_the_store_fails_only_the_questions_before_it(store, monkeypatch):
    begun, go_on, swap = threading.Event(), threading.Event(), store.swap_reservation

    def fail_first(*given: Any) -> Any:
        if begun.is_set():
            return swap(*given)
        begun.set()
        assert go_on.wait(PATIENCE)
        raise service.Unavailable("away")

    monkeypatch.setattr(store, "swap_reservation", fail_first)
    with contextlib.closing(service.Reservations(store, "pc")) as reservations:
        first = reservations.ask()
        assert begun.wait(PATIENCE)
        second = reservations.ask(reserve_as("b"), 60)
        go_on.set()
        with pytest.raises(service.Unavailable):
            first.result(PATIENCE)
        assert second.result(PATIENCE).digest == "b"


def test_a_reservation_survives_a_restart(make_pc, store):
    clock, wall = Clock(100.0), Clock(T)
    first = make_pc(store, clock, wall)
    id = first.reserve(ttl=60)["reservationId"]
    first.reservations.close()
    clock.now, wall.now = 5.0, T + 59_000
    later = make_pc(store, clock, wall)
    assert later.shown()["holder"] == "a"
    later.call("PUT", f"/{id}")
    clock.now += 59.9
    assert later.shown()


def test_fences_grow_even_if_the_clock_is_set_back_or_the_store_loses_its_data(make_pc, store, request):
    wall = Clock(T)
    pc, fences = make_pc(store, time.monotonic, wall), []
    for change in (0, 0, -3_600_000, 0, 7_200_000):
        wall.now += change
        fences.append(pc.reserve()["fence"])
        pc.call("DELETE", "", 204)
    assert fences == [T, T + 1, T + 2, T + 3, T + 3_600_000]
    if store.name == "redis":
        id = pc.reserve()["reservationId"]
        request.getfixturevalue("other_program").flushdb()
        pc.call("PUT", f"/{id}", 404)
        assert pc.reserve()["fence"] > fences[-1] + 1
        request.getfixturevalue("other_program").flushdb()
        assert make_pc(store).reserve()["fence"] > fences[-1]  # by the real clock, which is later


def test_a_record_is_replaced_only_by_those_who_know_it(store, twin):
    swaps = [("pc", None, None), ("pc", b"1", b"2"), ("pc", None, b"1"), ("pc", None, b"2"), ("pc", b"1", b"2")]
    assert [store.swap_reservation(*swap) for swap in swaps] == [None, None, b"1", b"1", b"2"]
    assert [twin.swap_reservation(host, None, None) for host in ("pc", "other")] == [b"2", None]
    names = [b"by %d" % number for number in range(8)]
    calls = [lambda pair=pair: pair[0].swap_reservation("pc", b"2", pair[1]) for pair in zip([store, twin] * 4, names)]
    found = at_once(*calls)
    assert found == [store.swap_reservation("pc", None, None)] * 8


def test_each_pc_has_its_own_reservation(store):
    for host in ("pc-1", "pc-2"):
        with contextlib.closing(service.Reservations(store, host)) as reservations:
            assert reservations.ask(reserve_as(host), 0).result(PATIENCE).digest == host


def test_of_many_concurrent_requests_to_two_instances_one_gets_the_gpu(make_pc, store, twin):
    pcs = [make_pc(store), make_pc(twin)] * 4
    calls = [lambda pc=pc, n=n: pc.reservations.ask(reserve_as(f"{n}"), 0) for n, pc in enumerate(pcs)]
    assert len({future.result(PATIENCE).digest for future in at_once(*calls)}) == 1


# Clients that wait.


def wait_for_gpu(port: int, holder: str, seconds: int = 60) -> socket.socket:
    body = json.dumps({"holder": holder, "ttlSeconds": 60, "waitSeconds": seconds})
    head = request_of("POST", RESERVATION, "Content-Type: application/json", f"Content-Length: {len(body)}")
    return send_request(port, head + body)


def test_clients_that_wait_get_the_gpu_in_order_and_one_that_left_is_skipped(poll_service, store, monkeypatch):
    monkeypatch.setattr(service.Reservations, "INTERVAL", 3600.0)  # so the record is not read again meanwhile
    polled = poll_service(store)
    call = functools.partial(Service.call, polled)  # a connection for each: waitress closes it after a 204
    id, clients = call("POST", RESERVATION, {"holder": "first", "ttlSeconds": 60})[1]["reservationId"], []
    for name in ("second", "leaves", "third"):
        clients.append(wait_for_gpu(polled.port, name))
        wait_until(lambda: len(polled.services.reservations._loop.asked) == len(clients))
    clients[1].close()
    wait_until(lambda: polled.in_flight() == 2)
    for client, name in ((clients[0], "second"), (clients[2], "third")):
        with client:
            assert call("POST", RESERVATION, {"holder": "late", "ttlSeconds": 60})[0] == 409
            assert call("DELETE", f"{RESERVATION}/{id}")[0] == 204
            status, _, text = answer_of(client)
            made = json.loads(text)
            assert (status, made["holder"]) == (201, name)
            id = made["reservationId"]


def test_a_request_at_the_moment_of_a_release_comes_after_those_that_wait(make_pc, store, monkeypatch):
    pc, swap, go_on = make_pc(store), store.swap_reservation, threading.Event()
    ask = pc.reservations.ask
    ask(reserve_as("a"), 0).result(PATIENCE)
    waits = ask(reserve_as("waits"), 60)
    wait_until(lambda: pc.reservations._loop.asked)
    monkeypatch.setattr(store, "swap_reservation", lambda *given: (go_on.wait(PATIENCE), swap(*given))[-1])
    ask()  # the next two are answered in the turn after this one
    released, late = ask(functools.partial(service.renewed, "a", 0)), ask(reserve_as("late"), 0)
    go_on.set()
    assert [future.result(PATIENCE).digest for future in (released, waits, late)] == ["a", "waits", "waits"]


def test_a_request_waits_until_the_reservation_expires_or_its_own_time_is_over(make_pc, store, monkeypatch):
    monkeypatch.setattr(service.Reservations, "INTERVAL", 3600.0)
    clock = Clock(100.0)
    ask = make_pc(store, clock).reservations.ask
    assert ask(reserve_as("a", 0.2), 0).result(PATIENCE).digest == "a"
    patient, impatient = ask(reserve_as("b"), 3600), ask(reserve_as("c"), 0.01)
    clock.now += 0.01
    assert impatient.result(PATIENCE).digest == "a"
    clock.now += 0.2
    assert patient.result(PATIENCE).digest == "b"


def test_a_release_by_another_instance_is_noticed(make_pc, store, twin, monkeypatch):
    monkeypatch.setattr(service.Reservations, "INTERVAL", 0.05)
    ours, other = make_pc(store), make_pc(twin)
    id = other.reserve("b")["reservationId"]
    waiting = ours.reservations.ask(reserve_as("a"), 60)
    wait_until(lambda: ours.reservations.known)
    other.call("DELETE", f"/{id}", 204)
    assert waiting.result(PATIENCE).digest == "a"
    assert other.shown()["holder"] == "a"


def test_200_clients_wait_without_a_thread_each_and_further_ones_get_a_503(poll_service):
    polled = poll_service()
    assert polled.ask("POST", RESERVATION, {"holder": "first", "ttlSeconds": 3600})[0] == 201
    polled.ask("GET", "/health")
    threads = threading.active_count()
    clients = [wait_for_gpu(polled.port, f"{number}") for number in range(200)]
    wait_until(lambda: len(polled.services.reservations._loop.asked) == 200)
    assert threading.active_count() == threads
    status, headers, refused = polled.ask("POST", RESERVATION, {"holder": "x", "ttlSeconds": 1, "waitSeconds": 60})
    assert (status, "Retry-After" in headers, "200" in refused["error"]) == (503, True, True)
    assert polled.ask("POST", RESERVATION, {"holder": "x", "ttlSeconds": 1})[0] == 409
    for client in clients:
        client.close()
    wait_until(lambda: polled.in_flight() == 0)
    with wait_for_gpu(polled.port, "next") as client:
        wait_until(lambda: len(polled.services.reservations._loop.asked) == 1)
        assert polled.ask("DELETE", RESERVATION)[0] == 204
        assert json.loads(answer_of(client)[2])["holder"] == "next"


def test_close_fails_those_that_wait_and_ends_the_thread(pc):
    pc.reserve()
    waiting = pc.reservations.ask(reserve_as("b"), 60)
    pc.reservations.close()
    with pytest.raises(service.Unavailable):
        waiting.result(PATIENCE)
    with pytest.raises(service.Unavailable):
        pc.reservations.ask()
    wait_until(lambda: "reservations" not in {thread.name for thread in threading.enumerate()})


def test_a_service_that_stops_answers_clients_that_wait_at_once(start_service):
    running = start_service()
    running.call("POST", RESERVATION, {"holder": "a", "ttlSeconds": 60})
    with wait_for_gpu(running.port, "b") as client:
        body = {"holder": "c", "ttlSeconds": 60}
        assert running.call("POST", RESERVATION, body)[0] == 409  # so the one before it waits
        running.press_ctrl_c()
        assert answer_of(client)[0] == 503
    assert running.process.wait(PATIENCE) == 0


# Faults of the store, and killed instances.


def test_while_redis_is_away_requests_are_a_503_and_the_reservation_remains(make_pc, forwarder):
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        pc = make_pc(store)
        id = pc.reserve()["reservationId"]
        waiting = pc.reservations.ask(reserve_as("b"), 60)
        forwarder.cut()
        calls = [("POST", "", {"holder": "b", "ttlSeconds": 5}), ("GET", "", None), ("DELETE", "", None)]
        for method, path, body in [*calls, ("PUT", f"/{id}", None), ("DELETE", f"/{id}", None)]:
            assert "Redis" in pc.call(method, path, 503, body)["error"]
            assert pc.headers["Retry-After"] == "1"
        with pytest.raises(service.Unavailable):
            waiting.result(PATIENCE)
        assert pc.reservations.known
        forwarder.restore()
        wait_until(lambda: not store._redis._fault)
        assert pc.call("PUT", f"/{id}")["holder"] == "a"
        pc.reserve("b", 60, 409)


def test_a_reservation_whose_reply_from_the_store_was_lost_is_released(make_pc, store, monkeypatch):
    swap, lost = store.swap_reservation, [service.Unavailable("lost")]

    def lose(host: str, before: Any, after: Any) -> Any:
        result = swap(host, before, after)
        if after and lost:
            raise lost.pop()
        return result

    monkeypatch.setattr(store, "swap_reservation", lose)
    pc = make_pc(store)
    pc.reserve("a", 60, 503)
    assert b'"holder":"a"' in swap("pc", None, None)
    assert pc.reserve("b")["holder"] == "b"


@pytest.mark.parametrize("reads", [0, 3], ids=["stored at once", "stored later"])
def test_a_reservation_that_nobody_knows_is_released_though_nobody_asks(make_pc, store, twin, monkeypatch, reads):
    """It is stored by a Redis that hung, when it continues."""
    monkeypatch.setattr(service.Reservations, "INTERVAL", 0.01)
    swap, late, read = store.swap_reservation, [], threading.Semaphore(0)

    def lose(host: str, before: Any, after: Any) -> Any:
        if after and not late:
            late.append((host, before, after))
            raise service.Unavailable("lost")
        read.release()
        return swap(host, before, after)

    monkeypatch.setattr(store, "swap_reservation", lose)
    pc, other = make_pc(store), make_pc(twin)
    pc.reserve("a", 3600, 503)
    assert all(read.acquire(timeout=PATIENCE) for _ in range(1 + reads))  # the first one is of the request
    assert b'"holder":"a"' in swap(*late[0])
    wait_until(lambda: other.shown() is None)


def test_an_instance_reads_no_more_once_another_has_reserved_what_it_may_have(make_pc, store, twin, monkeypatch):
    monkeypatch.setattr(service.Reservations, "INTERVAL", 0.01)
    swap, lost, reads = store.swap_reservation, [service.Unavailable("lost")], {"ours": 0, "gated": 0}

    def count(name: str, swap: Any, *given: Any) -> Any:
        if given[2] and lost:
            raise lost.pop()
        reads[name] += 1
        return swap(*given)

    monkeypatch.setattr(store, "swap_reservation", functools.partial(count, "ours", swap))
    ours, other = make_pc(store), make_pc(twin)
    ours.reserve("a", 3600, 503)
    other.reserve("b", 3600)
    wait_until(lambda: ours.reservations.known)
    monkeypatch.setattr(twin, "swap_reservation", functools.partial(count, "gated", twin.swap_reservation))
    gated, before = make_pc(twin, gates=True), reads["ours"]
    wait_until(lambda: reads["gated"] >= 10)
    assert gated.reservations.known
    assert reads["ours"] == before


def test_a_reservation_for_a_client_that_just_left_goes_to_the_next(make_pc, store, monkeypatch):
    swap, waiting = store.swap_reservation, []

    def leave(host: str, before: Any, after: Any) -> Any:
        if after and b'"leaves"' in after:
            waiting[0].cancel()
        return swap(host, before, after)

    monkeypatch.setattr(store, "swap_reservation", leave)
    pc = make_pc(store)
    id = pc.reserve()["reservationId"]
    waiting += [pc.reservations.ask(reserve_as(name), 60) for name in ("leaves", "stays")]
    pc.call("DELETE", f"/{id}", 204)
    assert waiting[1].result(PATIENCE).digest == "stays"
    assert waiting[0].cancelled()


def test_an_unexpected_error_fails_only_one_request(make_pc, sqlite_store, fail_once):
    fail_once(sqlite_store, "swap_reservation", RuntimeError("unexpected"))
    pc = make_pc(sqlite_store)
    pc.call("GET", "", 500)
    assert pc.shown() is None


@pytest.mark.slow
def test_no_two_of_8_clients_have_the_gpu_at_once_while_instances_are_killed(start_service, redis_url):
    """Each client counts the end of its reservation from when it sent the request that was answered."""
    running = [start_service(REDIS_URL=redis_url, STORYTELLER_DATA_DIR=f"data-{number}") for number in range(2)]
    spans, stopping = [], threading.Event()

    def call(chance: random.Random, *request: Any) -> tuple[int, Any]:
        with contextlib.suppress(OSError, http.client.HTTPException):  # its service was killed
            return chance.choice(running).call(*request)
        return 0, None

    def work(name: int) -> None:
        chance = random.Random(name)
        while not stopping.is_set():
            sent = time.monotonic()
            status, made = call(chance, "POST", RESERVATION, {"holder": f"{name}", "ttlSeconds": 1, "waitSeconds": 2})
            if status != 201:
                assert status in (0, 409, 503)
                continue
            begun, end = time.monotonic(), sent + 1
            for _ in range(chance.randrange(4)):
                time.sleep(chance.random() / 5)
                sent = time.monotonic()
                status, _ = call(chance, "PUT", f"{RESERVATION}/{made['reservationId']}")
                assert status in (0, 200, 503) or time.monotonic() > end
                end = sent + 1 if status == 200 else end
            if chance.random() < 0.8:  # otherwise it never releases it
                end = min(end, time.monotonic())
                call(chance, "DELETE", f"{RESERVATION}/{made['reservationId']}")
            spans.append((begun, end, made["fence"]))

    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(work, name) for name in range(8)]
        try:
            for victim in (0, 1, 0, 1):
                before = len(spans)
                wait_until(lambda: len(spans) > before + 1)  # noqa: B023
                running[victim].process.kill()
                running[victim].process.wait(PATIENCE)
                running[victim] = start_service(REDIS_URL=redis_url, STORYTELLER_DATA_DIR=f"data-{victim}")
        finally:
            stopping.set()
        for future in working:
            future.result(PATIENCE)
    spans.sort()
    assert [(a, b) for a, b in itertools.pairwise(spans) if a[1] > b[0] or a[2] >= b[2]] == []


# Gates.


@pytest.fixture
def make_gated(make_pc, nvidia_smi) -> Callable[..., Pc]:
    return lambda *given, **named: make_pc(*given, nvidia_smi=nvidia_smi(GOOD, {}), gates=True, **named)


STATUS, START = "/api/v1/gpu/status", "/api/v1/swarmui/start"


def test_with_gates_only_the_holder_can_use_the_gpu(make_gated, store, swarmui_folder, leash):
    pc = make_gated(store, swarmui_path=swarmui_folder())
    free = pc.call("GET", STATUS)
    assert free["available"]
    made = pc.reserve("render")
    own = {"X-Reservation-Id": made["reservationId"]}
    words = f"reserved by render until {made['expiresAt']}"
    for other in ({}, {"X-Reservation-Id": "another"}, {"X-Reservation-Id": ""}):
        assert pc.call("GET", STATUS, **other) == {**free, "available": False, "error": words}
        refused = pc.call("POST", START, 409, **other)
        assert refused == {"success": False, "error": refused["error"], **{key: made[key] for key in HOLDER_KEYS}}
        assert words in refused["error"]
        assert int(pc.headers["Retry-After"]) <= 60
    assert leash.count_further() == 0
    assert pc.call("GET", STATUS, **own) == free
    assert pc.call("POST", START, **own)["success"]
    leash.next()
    pc.call("DELETE", f"/{made['reservationId']}", 204)
    assert pc.call("GET", STATUS) == free
    assert pc.call("POST", START)["success"]


def test_with_gates_a_failure_of_nvidia_smi_is_still_a_500(make_pc, store):
    pc = make_pc(store, gates=True)  # without an nvidia-smi
    pc.reserve()
    assert "nvidia-smi not found" in pc.call("GET", STATUS, 500)["error"]


def test_gates_are_off_by_default(make_pc, store, nvidia_smi, swarmui_folder, leash):
    pc = make_pc(store, nvidia_smi=nvidia_smi(GOOD, {}), swarmui_path=swarmui_folder())
    pc.reserve()
    assert pc.call("GET", STATUS)["available"]
    assert pc.call("POST", START)["success"]
    leash.next()


def test_gates_notice_another_instance_by_one_read_per_interval(make_gated, make_pc, store, twin, monkeypatch):
    interval, reads, swap = 0.2, [], store.swap_reservation
    monkeypatch.setattr(service.Reservations, "INTERVAL", interval)
    monkeypatch.setattr(store, "swap_reservation", lambda *given: reads.append(given) or swap(*given))
    began = time.monotonic()
    ours, other = make_gated(store), make_pc(twin)
    assert ours.call("GET", STATUS)["available"]
    id = other.reserve("b")["reservationId"]
    wait_until(lambda: not ours.call("GET", STATUS)["available"])
    other.call("DELETE", f"/{id}", 204)
    wait_until(lambda: ours.call("GET", STATUS)["available"])
    assert len(reads) <= (time.monotonic() - began) / interval + 2


def test_a_service_with_gates_learns_what_another_has_reserved(start_service, redis_url):
    common = {"REDIS_URL": redis_url, "STORYTELLER_RESERVATION_GATES": "true"}
    other, ours = (start_service(STORYTELLER_DATA_DIR=name, **common) for name in ("other", "ours"))
    assert ours.call("POST", START)[0] == 500  # SWARMUI_PATH is not set
    assert other.call("POST", RESERVATION, {"holder": "a", "ttlSeconds": 600})[0] == 201
    wait_until(lambda: ours.call("POST", START)[0] == 409)


def test_while_the_store_is_away_gates_apply_until_the_known_reservation_ends(make_gated, forwarder):
    clock = Clock(100.0)
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        pc = make_gated(store, clock)
        assert pc.call("GET", STATUS)["available"]
        pc.reserve(ttl=60)
        forwarder.cut()
        for seconds, available in ((0, False), (59.9, False), (0.1, True)):
            clock.now += seconds
            assert pc.call("GET", STATUS)["available"] == available


def test_a_page_may_send_the_reservation_id(make_gated, sqlite_store):
    pc = make_gated(sqlite_store, cors_origins=("http://localhost:3000",))
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "GET"}
    pc.call("OPTIONS", STATUS, 204, **asked)
    assert "X-Reservation-Id" in pc.headers["Access-Control-Allow-Headers"].split(", ")


# ======================================================================================================
# SwarmUI
# ======================================================================================================


@pytest.fixture
def swarmui_folder(tmp_path, leash):
    """Makes SwarmUI's folder, at a path that a shell has to quote."""
    return lambda **plan: write_swarmui_folder(tmp_path / "Swarm & UI (1)", {"leash": leash.port, **plan})


@pytest.fixture
def make_supervisor(settings):
    """Makes a supervisor with changed settings, and with a clock of the test."""
    with contextlib.ExitStack() as stack:

        def make(
            clock: Callable[[], float] = time.monotonic, is_reserved: Any = lambda: False, **changed: Any
        ) -> service.SwarmUISupervisor:
            supervisor = service.SwarmUISupervisor(dataclasses.replace(settings, **changed), clock, is_reserved)
            return stack.enter_context(contextlib.closing(supervisor))

        yield make


RESET = b"close with the request unread, which resets the connection"


def read_request(connection: socket.socket) -> None:
    """With its body: closing a connection with unread data resets it, and Windows then loses the response."""
    with connection.makefile("rb") as stream:
        stream.readline()
        stream.read(int(http.client.parse_headers(stream)["Content-Length"]))


@pytest.fixture
def answering(settings):
    """Starts a server at SwarmUI's port that sends these bytes on each connection; None: it keeps the connection."""
    stop, threads = threading.Event(), []
    port = settings.swarmui_port

    def serve(answer: bytes | None) -> None:
        listener = socket.create_server(("127.0.0.1", port))
        listener.settimeout(0.05)

        def run() -> None:
            connections = []
            with listener:
                while not stop.is_set():
                    with contextlib.suppress(TimeoutError, ConnectionError):
                        connection = listener.accept()[0]
                        connections.append(connection)
                        connection.settimeout(PATIENCE)
                        if answer is RESET:
                            connection.recv(1)
                            connection.close()
                        elif answer is not None:
                            read_request(connection)
                            connection.sendall(answer)
                            connection.close()
            for connection in connections:
                connection.close()

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield serve
    stop.set()
    for thread in threads:
        thread.join()


def response(status: int, body: str, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}".encode()


def ready(supervisor: service.SwarmUISupervisor) -> service.Probe:
    return supervisor.start().result(PATIENCE)


def failure(supervisor: service.SwarmUISupervisor) -> str:
    with pytest.raises(service.ApiError) as caught:
        ready(supervisor)
    assert caught.value.status == 500
    assert str(caught.value).startswith("SwarmUI failed to start: ")
    return str(caught.value)


def test_a_start_launches_swarmui_and_waits_until_it_answers(make_app, settings, swarmui_folder, leash):
    answer = make_app(swarmui_path=swarmui_folder(delay=0.3)).post("/api/v1/swarmui/start")
    assert answer.json == {
        "success": True,
        "message": "SwarmUI started successfully",
        "port": settings.swarmui_port,
        "apiUrl": settings.swarmui_api_url,
    }
    assert leash.next().is_alive()


def test_a_running_swarmui_is_not_launched_again(make_supervisor, swarmui_folder, leash):
    supervisor, other_instance = make_supervisor(swarmui_path=swarmui_folder()), make_supervisor()
    ready(supervisor)
    leash.next()
    assert ready(supervisor).message == ready(other_instance).message == "SwarmUI is already running"
    assert (supervisor.launches, other_instance.launches) == (1, 0)


def test_swarmui_is_launched_in_its_folder_with_its_arguments(
    make_supervisor, settings, swarmui_folder, leash, monkeypatch
):
    monkeypatch.setenv("STORYTELLER_API_TOKEN", "secret")
    folder = swarmui_folder()
    ready(make_supervisor(swarmui_path=folder, swarmui_args=("--user_id", "a b & c")))
    report = leash.next().report
    expected = ["--launch_mode", "none", "--port", str(settings.swarmui_port), "--user_id", "a b & c"]
    assert report["arguments"] == expected
    assert Path(report["folder"]) == folder
    assert not [name for name in report["environment"] if name.upper().startswith("STORYTELLER_")]


def test_an_executable_runs_in_the_folder_of_the_launch_scripts(make_supervisor, swarmui_folder, leash):
    folder = swarmui_folder()
    program = folder / "src" / "bin" / "live_release" / ("SwarmUI.exe" if service.WINDOWS else "SwarmUI")
    ready(make_supervisor(swarmui_path=program))
    assert Path(leash.next().report["folder"]) == folder


def test_an_executable_without_launch_scripts_above_it_runs_in_its_own_folder(make_supervisor, tmp_path, leash):
    folder = tmp_path / "alone"
    folder.mkdir()
    ready(make_supervisor(swarmui_path=write_program(folder / "SwarmUI", SWARMUI, {"leash": leash.port})))
    assert Path(leash.next().report["folder"]) == folder


def test_a_cancelled_start_leaves_nothing_behind_and_the_others_go_on_waiting(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(delay=0.3))
    first, second = supervisor.start(), supervisor.start()
    cancelled = weakref.ref(first)
    assert first.cancel()
    del first
    wait_until(lambda: cancelled() is None)
    assert second.result(PATIENCE).message == "SwarmUI started successfully"
    leash.next()


def test_a_launch_continues_when_every_start_was_cancelled(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(delay=0.3))
    waiting = supervisor.start()
    leash.next()
    waiting.cancel()
    assert ready(supervisor).message == "SwarmUI started successfully"
    assert supervisor.launches == 1


def fail_to_start_thread(monkeypatch: pytest.MonkeyPatch, fails: Callable[[threading.Thread], bool]) -> None:
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if fails(thread):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


def test_the_exit_of_swarmui_is_noticed_even_if_no_thread_can_wait_for_it(
    make_supervisor, swarmui_folder, leash, monkeypatch
):
    fail_to_start_thread(monkeypatch, lambda thread: thread.name == "swarmui-watch")
    supervisor = make_supervisor(swarmui_path=swarmui_folder())
    assert ready(supervisor).message == "SwarmUI started successfully"
    kill(leash.next())
    wait_until(lambda: supervisor.status()["state"] == "failed")


def start_swarmui(running: Service) -> tuple[int, str | None, Any]:
    """Status, Retry-After and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", "/api/v1/swarmui/start", headers=BEARER)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Retry-After"), json.loads(answer.read())


def test_a_second_launch_within_the_interval_is_a_429(make_app, swarmui_folder, leash):
    app = make_app(swarmui_path=swarmui_folder(exit=3))
    app.post("/api/v1/swarmui/start", status=500)
    answer = app.post("/api/v1/swarmui/start", status=429)
    assert answer.json["success"] is False
    assert "(it exited with code 3" in answer.json["error"] or service.WINDOWS
    assert 0 < int(answer.headers["Retry-After"]) <= 60


def test_a_failed_launch_can_be_repeated_after_the_interval(make_supervisor, swarmui_folder, leash):
    clock = Clock(1000.0)
    supervisor = make_supervisor(clock, swarmui_path=swarmui_folder(exit=3))
    failure(supervisor)
    clock.now += 59.9
    with pytest.raises(service.TooManyRequests):
        ready(supervisor)
    clock.now += 0.1
    failure(supervisor)
    leash.next()
    leash.next()


def test_a_wrapper_may_exit_with_0_before_swarmui_answers(make_supervisor, settings, tmp_path, leash):
    """It starts SwarmUI in the background, and exits."""
    server = write_program(tmp_path / "server", SWARMUI, {"leash": leash.port, "delay": 0.3})
    code = "import subprocess; subprocess.Popen([plan['server'], *sys.argv[1:]])"
    wrapper = write_program(tmp_path / "wrapper", code, {"server": str(server)})
    assert ready(make_supervisor(swarmui_path=wrapper)).message == "SwarmUI started successfully"
    leash.next()


def test_a_start_that_times_out_leaves_swarmui_running_for_the_next_start(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(delay=3600), start_timeout=0.2)
    message = failure(supervisor)
    assert "no answer within 0.2 s" in message
    assert "nothing listens" in message
    swarmui = leash.next()
    assert "no answer within 0.2 s" in failure(supervisor)
    assert swarmui.is_alive()
    assert supervisor.launches == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(response(200, "<html>hello</html>"), "answered 200: <html>hello</html>", id="html"),
        pytest.param(response(302, "", "Location: /elsewhere\r\n"), "answered 302", id="redirect"),
        pytest.param(response(500, '{"error": "oops"}'), "answered 500: oops", id="500"),
        pytest.param(response(200, '{"session_id": 7}'), "answered 200", id="an invalid session_id"),
        pytest.param(response(200, "[1]"), "answered 200", id="not an object"),
        pytest.param(response(200, '{"error": "Invalid or unauthorized."}'), "set SWARMUI_TOKEN", id="accounts"),
        pytest.param(b"220 mail.example ESMTP\r\n", "sent no valid response (220 mail.example ESMTP", id="not HTTP"),
        pytest.param(b"", "sent no valid response (Remote end closed connection", id="closed"),
        pytest.param(RESET, "sent no valid response", id="reset"),
        pytest.param(response(200, "-5\r\n", "Transfer-Encoding: chunked\r\n"), "sent no valid response", id="a chunk"),
        pytest.param(None, "did not answer within 0.3 s", id="silent"),
    ],
)
def test_nothing_is_launched_while_another_program_has_the_port(
    make_supervisor, swarmui_folder, answering, leash, answer, words
):
    answering(answer)
    supervisor = make_supervisor(swarmui_path=swarmui_folder(), health_timeout=0.3)
    message = failure(supervisor)
    assert "the program at its port does not answer as SwarmUI does" in message
    assert words in message
    assert supervisor.launches == 0


def test_a_probe_of_a_free_port_says_that_nothing_listens(settings):
    assert service.probe(settings) == service.Probe(
        ready=False, occupied=False, message=f"nothing listens at {settings.swarmui_api_url}"
    )


def test_the_time_to_answer_begins_when_the_connection_is_made(settings, answering, monkeypatch):
    """Windows refuses a host name's IPv6 address only after 2 s."""
    answering(response(200, '{"session_id": "x"}'))
    connect, clock = socket.create_connection, Clock(0.0)

    def connect_late(*given: Any, **options: Any) -> socket.socket:
        clock.now += 3600
        return connect(*given, **options)

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(socket, "create_connection", connect_late)
    assert service.probe(settings).ready


def test_the_token_is_sent_as_a_cookie(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(token="t0k3n"), swarmui_token="t0k3n")
    assert ready(supervisor).message == "SwarmUI started successfully"
    leash.next()


def test_the_environments_proxy_is_not_used(make_supervisor, swarmui_folder, leash, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ready(make_supervisor(swarmui_path=swarmui_folder())).message == "SwarmUI started successfully"
    leash.next()


def test_no_input_of_a_request_reaches_the_command_line(make_app, settings, swarmui_folder, leash):
    app = make_app(swarmui_path=swarmui_folder())
    app.post("/api/v1/swarmui/start?port=1", b"\xff --port 1; rm -rf /", {"Content-Type": "application/json"})
    assert leash.next().report["arguments"] == ["--launch_mode", "none", "--port", str(settings.swarmui_port)]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "SWARMUI_PATH is not set"),
        ("nowhere", "does not exist"),
        (".", "has no launch-"),
        ("a file", "cannot be launched"),
    ],
)
def test_a_start_names_a_path_that_is_unset_or_wrong(make_supervisor, tmp_path, path, words):
    (tmp_path / "a file").write_text("no program")
    message = failure(make_supervisor(swarmui_path=tmp_path / path if path else None))
    assert words in message
    assert "SWARMUI_PATH" in message


def test_swarmui_on_another_machine_is_not_launched(settings, tmp_path):
    url = "http://192.0.2.1:7801"  # an address that is reserved for documentation: no machine has it
    with pytest.raises(service.LaunchError, match="another machine"):
        service.find_swarmui(dataclasses.replace(settings, swarmui_api_url=url, swarmui_path=tmp_path))


def test_swarmui_and_its_log_outlive_the_service(start_service, swarmui_folder, leash, settings):
    running = start_service(
        SWARMUI_PATH=str(swarmui_folder(print="hello from SwarmUI\n")),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_POLL_INTERVAL="0.05",
    )
    assert running.call("POST", "/api/v1/swarmui/start")[0] == 200
    swarmui = leash.next()
    running.stop()
    assert service.probe(settings).ready
    assert swarmui.is_alive()
    assert "hello from SwarmUI" in (running.folder / "data" / "swarmui.log").read_text()


def test_closing_the_supervisor_answers_the_starts_that_wait(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(delay=3600), poll_interval=3600.0, start_timeout=3600.0)
    waiting = supervisor.start()
    swarmui = leash.next()
    supervisor.close()
    assert isinstance(waiting.exception(timeout=0), service.Unavailable)
    with pytest.raises(service.Unavailable):
        supervisor.start()
    assert swarmui.is_alive()


# ---------------------------------------------------------------------------- SwarmUI's states ----


SILENT, OTHER_PROGRAM = service.Probe(False, True, ""), service.Probe(False, True, "", responded=True)
ANSWERED = {"found": SILENT, "answered": True}


@pytest.mark.parametrize(
    ("snapshot", "state"),
    [
        ({}, "stopped"),
        ({"lives": True}, "starting"),
        ({"lives": True, "found": SILENT}, "starting"),  # it has the port, but has not answered yet
        ({"lives": True, "found": SILENT, "misses": 9}, "starting"),
        ({**ANSWERED, "lives": True, "misses": 2}, "ready"),
        ({**ANSWERED, "lives": True, "misses": 3}, "unresponsive"),
        ({**ANSWERED, "lives": True, "misses": 3, "found": OTHER_PROGRAM}, "unresponsive"),
        ({"found": SILENT, "lives": True, "was_ready": True, "misses": 2}, "starting"),  # it restarts by itself
        ({"found": SILENT, "lives": True, "was_ready": True, "misses": 3}, "unresponsive"),
        ({"found": SILENT, "was_ready": True, "misses": 3}, "failed"),  # it is gone, and another program has the port
        ({**ANSWERED, "misses": 3}, "unresponsive"),
        ({**ANSWERED, "misses": 3, "found": OTHER_PROGRAM}, "failed"),
        (ANSWERED, "ready"),
        ({**ANSWERED, "has_failed": True}, "ready"),  # another SwarmUI, after ours died
        ({"found": SILENT}, "failed"),
        ({"has_failed": True}, "failed"),
        ({**ANSWERED, "is_ending": True, "lives": True}, "stopping"),
    ],
)
def test_the_state_follows_from_the_snapshot(snapshot, state):
    assert service.next_state("", service.SwarmUISnapshot(**snapshot)) == state


class SwarmUIApi:
    """The application's routes below /api/v1/swarmui."""

    def __init__(self, app: webtest.TestApp) -> None:
        self.app = app

    def __call__(self, method: str, path: str, status: int | str = 200) -> Any:
        return self.app.request(f"/api/v1/swarmui/{path}", method=method, status=status).json

    @property
    def status(self) -> dict[str, Any]:
        return self("GET", "status")

    @property
    def launches(self) -> int:
        return int(re.search(r"(?m)^storyteller_swarmui_launches_total ([0-9]+)$", self.app.get("/metrics").text)[1])

    def wait_for(self, state: str) -> dict[str, Any]:
        wait_until(lambda: self.status["state"] == state)
        return self.status


@pytest.fixture
def make_api(make_app):
    """Makes an application that may launch SwarmUI at any time."""
    return lambda **changed: SwarmUIApi(make_app(**{"start_interval": 0.0, "start_timeout": PATIENCE, **changed}))


@pytest.fixture
def write_status(tmp_path):
    """Sets what the stand-in reports: its `backend_status`, and the counts of its queue."""

    def write(backends: Any = None, **counts: int) -> str:
        path = tmp_path / "status.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({"status": counts, "backend_status": backends or {}}))

        def is_replaced() -> bool:
            with contextlib.suppress(PermissionError):  # Windows replaces no file that the stand-in is reading
                os.replace(temporary, path)
            return not temporary.exists()

        wait_until(is_replaced)
        return str(path)

    return write


@pytest.fixture
def run_another_swarmui(tmp_path, leash, settings):
    """Runs a SwarmUI that the service did not launch."""
    processes = []

    def run(**plan: Any) -> Held:
        folder = write_swarmui_folder(tmp_path / "another", {"leash": leash.port, **plan})
        arguments = ["--port", str(settings.swarmui_port)]
        launched = service.launch_detached(folder / service.LAUNCH_SCRIPT, arguments, folder, tmp_path / "another.log")
        processes.append(launched.process)
        swarmui = leash.next()
        wait_until(lambda: service.probe(settings).ready)
        return swarmui

    yield run
    leash.close()
    for process in processes:
        process.wait(PATIENCE)


def call_swarmui(settings: service.Settings, route: str) -> Any:
    found = service.probe(settings)
    return service.ask_swarmui(found.url, route, {"session_id": found.session_id}, settings)[1]


def wait_for_probes(settings: service.Settings) -> None:
    """Until a probe that began after this call has been processed."""
    log = settings.data_dir / "swarmui.log"
    before = log.read_text().count("GetGlobalStatus")
    wait_until(lambda: log.read_text().count("GetGlobalStatus") > before + 2)


def kill(swarmui: Held) -> None:
    os.kill(swarmui.report["pid"], signal.SIGTERM if service.WINDOWS else signal.SIGKILL)


EMPTY_STATUS = {
    "ours": None, "pid": None, "version": None, "startedAt": None, "startingFor": None, "lastError": None,
    "idleFor": None, "queue": None, "backends": None, "logTail": [],
}  # fmt: skip


def test_the_first_status_has_every_key(make_api, settings):
    status = make_api().status
    assert service.read_time(status.pop("since")) <= service.now_ms()
    shown = {"state": "stopped", "port": settings.swarmui_port, "apiUrl": settings.swarmui_api_url}
    assert status == {**shown, **EMPTY_STATUS}


def test_the_status_shows_the_progress_of_a_start(make_api, swarmui_folder, tmp_path, leash):
    api = make_api(swarmui_path=swarmui_folder(after=str(tmp_path / "now"), print="Building...\n"))
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(api, "POST", "start")
        status = api.wait_for("starting")
        assert (status["ours"], status["startingFor"], status["version"]) == (True, 0, None)
        assert service.process_identity(status["pid"])
        assert abs(service.read_time(status["startedAt"]) - service.now_ms()) < 60_000
        wait_until(lambda: api.status["logTail"] == ["Building..."])
        (tmp_path / "now").touch()
        assert started.result()["message"] == "SwarmUI started successfully"
    status = api.status
    assert {name: status[name] for name in ("state", "ours", "version", "startingFor", "idleFor", "backends")} == {
        "state": "ready", "ours": True, "version": "0.9.8.2", "startingFor": None, "idleFor": 0,
        "backends": {"status": "running", "message": ""},
    }  # fmt: skip
    leash.next()


def test_the_status_shows_swarmuis_queue(make_api, swarmui_folder, leash, write_status):
    api = make_api(swarmui_path=swarmui_folder(status=write_status()))
    api("POST", "start")
    assert api.status["queue"] == {"waiting": 0, "live": 0, "loading": 0, "waitingBackends": 0}
    write_status(waiting_gens=3, live_gens=1, loading_models=2, waiting_backends=4)
    wait_until(lambda: api.status["queue"] == {"waiting": 3, "live": 1, "loading": 2, "waitingBackends": 4})
    assert api.status["idleFor"] == 0
    leash.next()


def test_swarmuis_own_restart_is_not_a_failure(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder(delay=0.3))
    api("POST", "start")
    leash.next()
    before = api.status
    call_swarmui(settings, "UpdateAndRestart")
    assert api.wait_for("starting")["lastError"] is None
    after = api.wait_for("ready")
    assert (after["pid"], after["startedAt"]) == (before["pid"], before["startedAt"])
    leash.next()


def test_the_status_shows_how_swarmui_died_until_the_next_start(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder())
    api("POST", "start")
    kill(leash.next())
    status = api.wait_for("failed")
    assert "it exited with code" in status["lastError"]
    assert {**EMPTY_STATUS, **{name: status[name] for name in ("lastError", "logTail")}}.items() <= status.items()
    api("POST", "start")
    assert api.status["lastError"] is None
    leash.next()


def test_the_children_that_a_dead_swarmui_leaves_are_killed(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(child=True, leash_code=LEASH))
    api("POST", "start")
    processes = [leash.next(), leash.next()]
    kill(next(process for process in processes if "--port" in process.report["arguments"]))
    api.wait_for("failed")
    assert all(process.has_ended() for process in processes)


def test_swarmui_that_stops_answering_is_unresponsive_until_it_answers_again(
    make_api, swarmui_folder, tmp_path, leash, caplog, monkeypatch
):
    monkeypatch.setattr(service, "ENDED_AFTER", service.UNRESPONSIVE_AFTER)  # only with SWARMUI_RESTART is it ended
    caplog.set_level(logging.INFO)
    api = make_api(swarmui_path=swarmui_folder(hang=str(tmp_path / "hang")), health_timeout=0.2)
    api("POST", "start")
    (tmp_path / "hang").touch()
    status = api.wait_for("unresponsive")
    assert status["ours"] is True
    assert {status[name] for name in ("version", "queue", "backends", "idleFor")} == {None}
    (tmp_path / "hang").unlink()
    api.wait_for("ready")
    states = [message for message in caplog.messages if re.match("swarmui: [a-z]+, after", message)]
    assert states[-2:] == ["swarmui: unresponsive, after ready", "swarmui: ready, after unresponsive"]
    leash.next()


def test_the_state_is_failed_while_another_program_has_the_port(make_api, settings):
    with socket.create_server(("127.0.0.1", settings.swarmui_port)) as listener:
        api = make_api(health_timeout=0.1)
        status = api.wait_for("failed")
        assert "the program at its port does not answer as SwarmUI does" in status["lastError"]
        listener.close()
        assert api.wait_for("stopped")["lastError"] is None


def test_a_failed_swarmui_is_probed_every_fifth_interval(make_supervisor, settings):
    with socket.create_server(("127.0.0.1", settings.swarmui_port)) as listener:
        listener.settimeout(PATIENCE)
        began = time.monotonic()
        make_supervisor(poll_interval=0.04)
        for _ in range(4):
            listener.accept()[0].close()
        assert time.monotonic() - began >= 3 * 5 * 0.04


def test_a_death_within_a_turn_is_not_blamed_on_the_program_at_the_port(
    make_api, swarmui_folder, settings, leash, monkeypatch, tmp_path
):
    shut_down_idle = service.SwarmUISupervisor._shut_down_idle

    def die_then_shut_down_idle(supervisor):
        if supervisor._probe.occupied and supervisor._ours.program:
            kill(swarmui)
            wait_until(lambda: not supervisor._ours.program.is_alive())
        shut_down_idle(supervisor)

    api = make_api(swarmui_path=swarmui_folder(after=str(tmp_path / "never")), health_timeout=0.1)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(api, "POST", "start", 500)
        swarmui = leash.next()
        monkeypatch.setattr(service.SwarmUISupervisor, "_shut_down_idle", die_then_shut_down_idle)
        with socket.create_server(("127.0.0.1", settings.swarmui_port)):
            assert "it exited with code" in started.result()["error"]


def test_a_start_that_arrives_as_a_stop_completes_launches_swarmui_again(make_api, swarmui_folder, leash, monkeypatch):
    api = make_api(swarmui_path=swarmui_folder(shutdown=3600))
    api("POST", "start")
    swarmui, look = leash.next(), service.SwarmUISupervisor._look

    def die_then_look(supervisor, *, is_due=False):
        if supervisor._ending and supervisor._waiting("start") and swarmui.is_alive():
            kill(swarmui)
            wait_until(lambda: not supervisor._ours.program.is_alive())
        look(supervisor, is_due=is_due)

    monkeypatch.setattr(service.SwarmUISupervisor, "_look", die_then_look)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(api, "POST", "stop?force=true")
        api.wait_for("stopping")
        assert api("POST", "start")["message"] == "SwarmUI started successfully"
        assert stopped.result()["message"] == "SwarmUI is stopped"
    assert leash.next().is_alive()


def test_all_probes_use_one_session(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder(print=""))
    api("POST", "start")
    log = settings.data_dir / "swarmui.log"
    wait_until(lambda: log.read_text().count("GetGlobalStatus") > 5)
    assert log.read_text().count("GetNewSession") == 1
    leash.next()


def test_a_refused_session_is_replaced(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder(forgets=True))
    api("POST", "start")
    log = settings.data_dir / "swarmui.log"
    wait_until(lambda: log.read_text().count("GetNewSession") > 3)
    assert api.status["state"] == "ready"
    leash.next()


@pytest.mark.parametrize("how", ["lacks", "refuses"])
def test_the_queue_is_unknown_without_the_global_status(make_api, swarmui_folder, leash, caplog, how):
    api = make_api(swarmui_path=swarmui_folder(**{how: ["GetGlobalStatus"]}))
    api("POST", "start")
    status = api.status
    assert (status["state"], status["queue"], status["idleFor"]) == ("ready", None, None)
    assert status["backends"] == {"status": "running", "message": ""}
    assert "is not known" in api("POST", "stop", 409)["error"]
    assert leash.next().is_alive()
    wait_until(lambda: api.status["state"] == "ready")
    assert sum("GetGlobalStatus" in message for message in caplog.messages) == 1


def test_a_successful_start_reports_backends_in_error(make_api, swarmui_folder, leash, write_status):
    status = write_status({"status": "empty", "class": "error", "message": "No backends present."})
    api = make_api(swarmui_path=swarmui_folder(status=status))
    started = api("POST", "start")
    assert started["success"] is True
    assert started["message"] == "SwarmUI started successfully; but it says: No backends present."
    leash.next()


def test_a_start_soon_after_a_death_is_a_429_that_says_how_it_died(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(), start_interval=60.0)
    api("POST", "start")
    kill(leash.next())
    api.wait_for("failed")
    error = api("POST", "start", 429)["error"]
    assert re.search(r"died at \d{4}-\d\d-\d\dT.*Z \(it exited with code ", error)


# ---- stop ----


@pytest.mark.parametrize(
    "plan",
    [{}, {"shutdown": 0.3}, {"refuses": ["ShutdownServer"]}, {"deaf": True}, {"delay": 3600}],
    ids=["at once", "late", "refusing ShutdownServer", "deaf to all but a kill", "still starting"],
)
def test_a_stop_ends_what_was_launched(make_api, swarmui_folder, leash, monkeypatch, plan):
    monkeypatch.setattr(service, "STOP_TIMEOUTS", {"ShutdownServer": 0.5, "terminate": 0.2})
    api = make_api(swarmui_path=swarmui_folder(**plan), start_timeout=0.2 if plan.get("delay") else PATIENCE)
    api("POST", "start", 500 if plan.get("delay") else 200)
    swarmui = leash.next()
    assert api("POST", "stop") == {"success": True, "message": "SwarmUI is stopped"}
    assert swarmui.has_ended()
    status = api.status
    assert (status["state"], status["lastError"], status["pid"]) == ("stopped", None, None)
    assert api("POST", "stop") == {"success": True, "message": "SwarmUI is not running"}


@pytest.mark.parametrize("is_earlier", [False, True], ids=["of this run", "of an earlier run"])
def test_a_stop_kills_swarmui_that_hangs(make_api, swarmui_folder, leash, tmp_path, is_earlier):
    api = make_api(swarmui_path=swarmui_folder(hang=str(tmp_path / "hang")), health_timeout=0.2)
    api("POST", "start")
    if is_earlier:
        api = make_api(health_timeout=0.2)
        api.wait_for("ready")
    (tmp_path / "hang").touch()
    api.wait_for("unresponsive")
    api("POST", "stop")
    assert leash.next().has_ended()


@pytest.mark.parametrize("count", service.COUNTS.values())
def test_a_stop_of_swarmui_at_work_needs_force(make_api, swarmui_folder, leash, write_status, count):
    api = make_api(swarmui_path=swarmui_folder(status=write_status(**{count: 1})))
    api("POST", "start")
    swarmui = leash.next()
    assert "at work" in api("POST", "stop", 409)["error"]
    assert swarmui.is_alive()
    api("POST", "stop?force=true")
    assert swarmui.has_ended()


def test_another_swarmui_is_used_and_its_stop_needs_force(make_api, run_another_swarmui):
    swarmui = run_another_swarmui()
    api = make_api()
    assert api.wait_for("ready")["ours"] is False
    assert api("POST", "start")["message"] == "SwarmUI is already running"
    assert "was not launched by this service" in api("POST", "stop", 409)["error"]
    assert swarmui.is_alive()
    api("POST", "stop?force=true")
    assert swarmui.has_ended()
    assert api.status["state"] == "stopped"


def test_another_swarmui_that_answers_after_ours_died_is_not_ours(
    make_api, swarmui_folder, run_another_swarmui, tmp_path, leash
):
    api = make_api(swarmui_path=swarmui_folder(after=str(tmp_path / "never")), start_interval=60.0)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(api, "POST", "start")
        ours = leash.next()
        another = run_another_swarmui()
        assert started.result(PATIENCE)["success"]
    kill(ours)
    wait_until(lambda: api.status["ours"] is False)
    assert (api.status["state"], api.status["lastError"]) == ("ready", None)
    api("POST", "stop", 409)
    assert another.is_alive()


def test_the_probes_of_refused_stops_do_not_count_as_missed(make_api, swarmui_folder, leash, tmp_path):
    folder = swarmui_folder(hang=str(tmp_path / "hang"))
    api = make_api(swarmui_path=folder, health_timeout=0.1, poll_interval=3600.0, start_timeout=0.1)
    wait_until(lambda: api("POST", "start", "*").get("success"))  # only a start probes: no poll is due
    swarmui = leash.next()
    (tmp_path / "hang").touch()
    for _ in range(service.UNRESPONSIVE_AFTER + 1):
        assert "not known" in api("POST", "stop", 409)["error"]
    assert swarmui.is_alive()


def test_a_stop_that_another_swarmui_refuses_is_a_500(make_api, run_another_swarmui):
    swarmui = run_another_swarmui(refuses=["ShutdownServer"])
    error = make_api()("POST", "stop?force=true", 500)["error"]
    assert "cannot be ended" in error
    assert "You lack permission" in error
    assert swarmui.is_alive()


def test_a_stop_fails_the_starts_that_wait(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(delay=3600))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api, "POST", "start", 500)
        swarmui = leash.next()
        api("POST", "stop")
        assert "it was stopped" in waiting.result(PATIENCE)["error"]
    assert swarmui.has_ended()


def test_a_start_during_a_stop_launches_swarmui_after_it(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(shutdown=0.5), start_interval=3600.0)
    api("POST", "start")
    first = leash.next()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(api, "POST", "stop")
        status = api.wait_for("stopping")
        nothing = ("version", "queue", "backends", "idleFor", "startingFor", "lastError")
        assert {name: status[name] for name in nothing} == dict.fromkeys(nothing)
        assert api("POST", "start")["message"] == "SwarmUI started successfully"
        assert stopping.result(PATIENCE)["success"]
    assert first.has_ended()
    assert leash.next().is_alive()
    assert api.launches == 2


# ---- what is ours ----


def kill_launch_script(api: SwarmUIApi) -> None:
    """Not SwarmUI, which the script started."""
    os.kill(api.status["pid"], signal.SIGTERM)


def test_swarmui_is_still_ours_after_its_launch_script_was_killed(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder())
    api("POST", "start")
    swarmui = leash.next()
    kill_launch_script(api)
    log = settings.data_dir / "swarmui.log"
    # It is probed in a new session, because another SwarmUI might answer from now on.
    wait_until(lambda: re.search("(?s)GetNewSession.*GetNewSession.*GetGlobalStatus.*GetGlobalStatus", log.read_text()))
    assert (api.status["state"], api.status["ours"]) == ("ready", True)
    kill(swarmui)
    assert "unknown code" in api.wait_for("failed")["lastError"]


@pytest.mark.parametrize("is_orphan", [False, True], ids=["with its script", "an orphan"])
def test_swarmui_is_still_ours_after_the_service_restarts(make_api, swarmui_folder, leash, is_orphan):
    first = make_api(swarmui_path=swarmui_folder())
    first("POST", "start")
    swarmui, before = leash.next(), first.status
    if is_orphan:
        kill_launch_script(first)
        wait_until(lambda: service.process_identity(before["pid"]) is None)
    second = make_api()
    assert {name: before[name] for name in ("ours", "pid", "startedAt")}.items() <= second.wait_for("ready").items()
    second("POST", "stop")
    assert swarmui.has_ended()


@pytest.mark.parametrize("pid", [0, 1, -5, True, "4000000", 4000000.5, 2**33, 10**30, None])
def test_a_record_with_an_invalid_process_id_is_ignored(make_api, settings, run_another_swarmui, pid):
    run_another_swarmui()
    record = {"pid": pid, "identity": "x", "serverId": service.probe(settings).server_id}
    (settings.data_dir / "swarmui.json").write_text(json.dumps(record))
    assert make_api().wait_for("ready")["ours"] is False


@pytest.mark.parametrize("text", ["[" * 100_000, '{"pid": 1e999, "identity": "x"}', "5", "[[1, 2]]", "\0"])
def test_a_damaged_record_is_ignored(make_api, settings, text):
    (settings.data_dir / "swarmui.json").write_text(text)
    assert make_api().status["state"] == "stopped"


@ONLY_POSIX
def test_a_record_that_cannot_be_written_whole_leaves_the_old_one(make_supervisor, settings, swarmui_folder, caplog):
    resource = pytest.importorskip("resource")
    supervisor = make_supervisor(swarmui_path=swarmui_folder(shutdown=0.5))
    ready(supervisor)
    path = settings.data_dir / "swarmui.json"
    before = path.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as if the disk were full
    try:
        supervisor.stop()
        wait_until(lambda: "swarmui.json cannot be written" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before


def test_a_stop_during_which_the_service_restarts_is_not_a_failure(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(shutdown=0.5), restart="on-failure")
    ready(supervisor)
    supervisor.stop()
    wait_until(lambda: supervisor.status()["state"] == "stopping")
    supervisor.close()
    again = make_supervisor(restart="on-failure")
    assert leash.next().has_ended()
    wait_until(lambda: again.status()["state"] == "stopped")
    assert again.status()["lastError"] is None


@pytest.mark.parametrize("ago", [service.STOP_LIMIT + 1, -3_600_000], ids=["", "before the clock was set back"])
def test_a_stop_that_an_earlier_run_did_not_end_does_not_make_a_later_death_wanted(
    make_supervisor, settings, swarmui_folder, leash, ago
):
    first = make_supervisor(swarmui_path=swarmui_folder())
    ready(first)
    first.close()
    path = settings.data_dir / "swarmui.json"
    record = {**json.loads(path.read_text()), "endingSince": service.now_ms() - ago}
    path.write_text(json.dumps(record))
    again = make_supervisor()
    wait_until(lambda: again.status()["state"] == "ready")
    kill(leash.next())
    wait_until(lambda: again.status()["state"] == "failed")


def test_swarmui_that_hangs_when_the_service_starts_is_unresponsive(make_api, swarmui_folder, leash, tmp_path):
    first = make_api(swarmui_path=swarmui_folder(hang=str(tmp_path / "hang")))
    first("POST", "start")
    (tmp_path / "hang").touch()
    assert make_api(health_timeout=0.1).wait_for("unresponsive")["ours"] is True
    leash.next()


def test_a_killed_orphan_is_gone_even_if_another_program_has_its_port(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder(), health_timeout=0.2)
    api("POST", "start")
    swarmui = leash.next()
    kill_launch_script(api)
    kill(swarmui)
    assert swarmui.has_ended()
    with socket.create_server(("127.0.0.1", settings.swarmui_port)):
        status = api.wait_for("failed")
        assert (status["ours"], status["pid"]) == (None, None)


def test_a_logged_prompt_about_a_taken_port_ends_nothing(make_api, swarmui_folder, settings, leash):
    api = make_api(swarmui_path=swarmui_folder())
    api("POST", "start")
    with open(settings.data_dir / "swarmui.log", "a") as log:
        print(f"prompt: Port {settings.swarmui_port} was taken by pirates", file=log)
    wait_for_probes(settings)
    assert api.status["state"] == "ready"
    assert leash.next().is_alive()


@pytest.mark.parametrize("count", [-1, "x", True, None, 0.5])
def test_the_queue_is_unknown_if_one_of_its_counts_is_invalid(make_api, swarmui_folder, leash, write_status, count):
    api = make_api(swarmui_path=swarmui_folder(status=write_status(live_gens=count)))
    api("POST", "start")
    assert api.status["queue"] is None
    api("POST", "stop", 409)
    leash.next()


def test_a_process_that_reuses_the_recorded_id_is_not_killed(make_api, settings, run_another_swarmui, monkeypatch):
    monkeypatch.setattr(service, "STOP_TIMEOUTS", dict.fromkeys(service.STOP_TIMEOUTS, 0.1))
    monkeypatch.setattr(service, "LAST_STOP_TIMEOUT", 0.1)
    run_another_swarmui(deaf=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        record = {"pid": other.pid, "identity": "of an earlier process", "serverId": service.probe(settings).server_id}
        (settings.data_dir / "swarmui.json").write_text(json.dumps(record))
        api = make_api()
        assert api.wait_for("ready")["ours"] is True
        assert "cannot be ended" in api("POST", "stop", 500)["error"]
        assert other.poll() is None
        other.kill()


def test_swarmui_that_took_another_port_is_killed(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(taken=free_port()))
    assert "port" in api("POST", "start", 500)["error"]
    assert leash.next().has_ended()
    assert api.status["state"] == "failed"


def test_a_start_succeeds_if_another_swarmui_took_the_port(
    make_api, swarmui_folder, run_another_swarmui, tmp_path, leash
):
    api = make_api(swarmui_path=swarmui_folder(after=str(tmp_path / "now"), taken=free_port()))
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(api, "POST", "start")
        ours = leash.next()
        another = run_another_swarmui()
        (tmp_path / "now").touch()
        assert started.result(PATIENCE)["success"]
        assert ours.has_ended()
    wait_until(lambda: (api.status["state"], api.status["ours"]) == ("ready", False))
    assert another.is_alive()


# ---- starts, stops and restarts without a request ----


def test_autostart_launches_swarmui_with_the_service(start_service, swarmui_folder, leash, settings):
    running = start_service(
        SWARMUI_PATH=str(swarmui_folder()), SWARMUI_API_URL=settings.swarmui_api_url, SWARMUI_AUTOSTART="true"
    )
    assert leash.next().is_alive()
    wait_until(lambda: running.call("GET", "/api/v1/swarmui/status")[1]["state"] == "ready")


IDLE = 0.3 / 60  # minutes


class Ahead:
    """The monotonic clock, ahead by some seconds."""

    by = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.by


@pytest.fixture
def ahead():
    return Ahead()


def test_idle_swarmui_is_stopped(make_api, swarmui_folder, leash):
    api = make_api(swarmui_path=swarmui_folder(), idle_shutdown=IDLE)
    api("POST", "start")
    assert leash.next().has_ended()
    assert api.wait_for("stopped")["lastError"] is None


@pytest.mark.parametrize(
    ("backends", "counts", "plan", "is_reserved"),
    [
        pytest.param({}, {"waiting_gens": 1}, {}, False, id="at work"),
        pytest.param({"any_loading": True}, {}, {}, False, id="a backend loads"),
        pytest.param({}, {}, {"lacks": ["GetGlobalStatus"]}, False, id="its queue is unknown"),
        pytest.param({}, {}, {}, True, id="the GPU is reserved"),
    ],
)
def test_swarmui_that_may_be_needed_is_not_stopped(
    make_supervisor, swarmui_folder, settings, leash, write_status, ahead, backends, counts, plan, is_reserved
):
    reserved = [is_reserved]
    folder = swarmui_folder(status=write_status(backends, **counts), **plan)
    supervisor = make_supervisor(ahead, lambda: reserved[0], swarmui_path=folder, idle_shutdown=60.0)
    ready(supervisor)
    swarmui = leash.next()
    ahead.by += 3600
    wait_for_probes(settings)
    assert swarmui.is_alive()
    if not plan:
        reserved[0] = False
        write_status()
        wait_for_probes(settings)  # its idle time begins here
        assert swarmui.is_alive()
        ahead.by += 3600
        assert swarmui.has_ended()


def test_work_since_the_last_probe_prevents_an_idle_shutdown(
    make_supervisor, swarmui_folder, leash, write_status, ahead
):
    intervals = {"poll_interval": 7200.0, "start_timeout": 0.1, "start_interval": 0.0}
    folder = swarmui_folder(status=write_status())
    supervisor = make_supervisor(ahead, swarmui_path=folder, idle_shutdown=60.0, **intervals)
    wait_until(lambda: not supervisor.start().exception(PATIENCE))  # only a start probes: no poll is due
    swarmui = leash.next()
    write_status(live_gens=1)
    ahead.by += 3600
    supervisor.start().cancel()  # causes a turn without a probe
    wait_until(lambda: not supervisor._loop._woken.is_set())
    with pytest.raises(service.Conflict, match="at work"):
        supervisor.stop().result(PATIENCE)
    assert swarmui.is_alive()


def test_a_reservation_at_another_instance_postpones_the_idle_shutdown(
    start_service, swarmui_folder, leash, settings, redis_url
):
    def start(name: str, **environment: str) -> Service:
        return start_service(REDIS_URL=redis_url, STORYTELLER_DATA_DIR=name, **environment)

    other = start("other")
    assert other.call("POST", RESERVATION, {"holder": "a", "ttlSeconds": 600})[0] == 201
    intervals = {"SWARMUI_IDLE_SHUTDOWN": f"{IDLE}", "SWARMUI_POLL_INTERVAL": "0.05"}
    path = str(swarmui_folder())
    ours = start("ours", SWARMUI_PATH=path, SWARMUI_API_URL=settings.swarmui_api_url, **intervals)
    assert ours.call("POST", "/api/v1/swarmui/start")[0] == 200
    wait_until(lambda: (ours.call("GET", "/api/v1/swarmui/status")[1]["idleFor"] or 0) >= 1)
    swarmui = leash.next()
    assert swarmui.is_alive()
    assert other.call("DELETE", RESERVATION)[0] == 204
    assert swarmui.has_ended()


def test_a_start_ends_the_idle_time(make_supervisor, swarmui_folder, leash, ahead):
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder())
    ready(supervisor)
    ahead.by += 3600
    assert supervisor.status()["idleFor"] >= 3600
    ready(supervisor)
    assert supervisor.status()["idleFor"] < 3600
    leash.next()


def test_another_swarmui_that_is_idle_is_not_stopped(make_api, run_another_swarmui):
    swarmui = run_another_swarmui()
    api = make_api(idle_shutdown=IDLE)
    wait_until(lambda: (api.status["idleFor"] or 0) >= 1)
    assert swarmui.is_alive()


RESTARTS = {"restart": "on-failure", "start_interval": 3600.0}


@pytest.fixture
def quick_restarts(monkeypatch):
    monkeypatch.setattr(service, "RESTART_DELAYS", (0.05, 0.2, 0.4))
    monkeypatch.setattr(service, "ENDED_AFTER", 6)


def test_idle_time_counts_from_the_restart(make_supervisor, swarmui_folder, settings, leash, ahead):
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder(), idle_shutdown=60.0, **RESTARTS)
    ready(supervisor)
    kill(leash.next())
    wait_until(lambda: supervisor.status()["state"] == "failed")
    ahead.by += 3600  # the restart is due
    again = leash.next()
    wait_until(lambda: supervisor.status()["state"] == "ready")
    wait_for_probes(settings)
    assert again.is_alive()
    ahead.by += 3600
    assert again.has_ended()


def kill_and_wait_for_restart(api: SwarmUIApi, leash: Leash) -> float:
    """Returns the seconds until the launch, or a little more."""
    before, began = api.launches, time.monotonic()
    kill(leash.next())
    wait_until(lambda: api.launches > before)
    seconds = time.monotonic() - began
    wait_until(lambda: api.status["state"] == "ready")
    return seconds


def test_swarmui_is_restarted_at_most_three_times_within_an_hour(
    make_api, swarmui_folder, leash, quick_restarts, caplog
):
    api = make_api(swarmui_path=swarmui_folder(), **RESTARTS)
    api("POST", "start")
    for delay in service.RESTART_DELAYS:
        assert kill_and_wait_for_restart(api, leash) >= delay
    kill(leash.next())
    assert "given up" in api.wait_for("failed")["lastError"]
    assert "given up" in caplog.text
    assert api.launches == 4
    assert "given up" in api("POST", "start", 429)["error"]


def test_deaths_an_hour_ago_do_not_count(make_supervisor, swarmui_folder, leash, ahead, quick_restarts):
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder(), **RESTARTS)
    ready(supervisor)
    for hours in (0, 0, 0, 1):
        ahead.by += hours * 3600
        before = supervisor.launches
        kill(leash.next())
        wait_until(lambda: supervisor.launches > before and supervisor.status()["state"] == "ready")  # noqa: B023
    leash.next()


def test_a_start_soon_after_a_restart_is_a_429(make_supervisor, swarmui_folder, leash, ahead, quick_restarts):
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder(), restart="on-failure", start_interval=60.0)
    ready(supervisor)
    ahead.by += 60
    kill(leash.next())
    wait_until(lambda: supervisor.launches == 2 and supervisor.status()["state"] == "ready")
    supervisor.stop().result(PATIENCE)
    with pytest.raises(service.TooManyRequests):
        ready(supervisor)
    leash.next()


def test_a_start_after_giving_up_resets_the_count_of_restarts(make_api, swarmui_folder, leash, quick_restarts):
    api = make_api(swarmui_path=swarmui_folder(), restart="on-failure")
    for _ in range(2):
        api("POST", "start")
        for _ in range(3):
            kill_and_wait_for_restart(api, leash)
        kill(leash.next())
        wait_until(lambda: "given up" in (api.status["lastError"] or ""))


def test_a_start_after_a_death_waits_for_the_scheduled_restart(make_api, swarmui_folder, leash, quick_restarts):
    api = make_api(swarmui_path=swarmui_folder(), **RESTARTS)
    api("POST", "start")
    kill(leash.next())
    wait_until(lambda: api.status["state"] == "failed" or api.launches == 2)
    assert api("POST", "start")["success"]
    leash.next()
    assert api.launches == 2


def test_a_failed_restart_is_followed_by_another(make_api, swarmui_folder, leash, tmp_path, quick_restarts):
    folder = swarmui_folder(exit=3, once=str(tmp_path / "broken"))
    (tmp_path / "broken").touch()
    api = make_api(swarmui_path=folder, **RESTARTS)
    api("POST", "start")
    (tmp_path / "broken").unlink()  # now it exits at once, and makes that file again
    kill(leash.next())
    leash.next()  # the failed restart
    leash.next()
    api.wait_for("ready")


def test_a_failed_first_launch_is_not_repeated(make_api, swarmui_folder, leash, quick_restarts):
    api = make_api(swarmui_path=swarmui_folder(exit=3), **RESTARTS)
    api("POST", "start", 500)
    leash.next()
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 10 * service.RESTART_DELAYS[0])
    assert api.launches == 1


def test_swarmuis_own_shutdown_button_causes_no_restart(make_api, swarmui_folder, settings, leash, quick_restarts):
    api = make_api(swarmui_path=swarmui_folder(), **RESTARTS)
    api("POST", "start")
    call_swarmui(settings, "ShutdownServer")
    assert leash.next().has_ended()
    assert api.wait_for("stopped")["lastError"] is None
    assert api.launches == 1


def test_swarmui_that_hangs_for_long_is_killed_and_restarted(make_api, swarmui_folder, leash, tmp_path, quick_restarts):
    api = make_api(swarmui_path=swarmui_folder(hang=str(tmp_path / "hang")), health_timeout=0.1, **RESTARTS)
    api("POST", "start")
    (tmp_path / "hang").touch()
    assert leash.next().has_ended()
    (tmp_path / "hang").unlink()
    api.wait_for("ready")
    assert leash.next().is_alive()


def test_swarmui_that_has_never_answered_is_not_ended_for_that(make_supervisor, swarmui_folder, leash, monkeypatch):
    monkeypatch.setattr(service, "ENDED_AFTER", 1)
    folder = swarmui_folder(raw=["", "silence"])
    supervisor = make_supervisor(swarmui_path=folder, health_timeout=0.1, start_timeout=0.2, **RESTARTS)
    wait_until(lambda: "did not answer within 0.1 s); it keeps running" in failure(supervisor))
    assert leash.next().is_alive()


@pytest.mark.skipif(service.WINDOWS, reason="no process can ignore its end there")
def test_a_stop_while_a_hanging_swarmui_is_ended_prevents_its_restart(
    make_supervisor, swarmui_folder, leash, tmp_path, ahead, quick_restarts, monkeypatch
):
    monkeypatch.setattr(service, "STOP_TIMEOUTS", {"terminate": 600.0})
    folder = swarmui_folder(hang=str(tmp_path / "hang"), deaf=True)
    supervisor = make_supervisor(ahead, swarmui_path=folder, health_timeout=0.1, **RESTARTS)
    ready(supervisor)
    (tmp_path / "hang").touch()
    wait_until(lambda: supervisor.status()["state"] == "stopping")
    stopped = supervisor.stop()
    wait_until(lambda: "end" in supervisor._loop.asked.values())  # it is decided
    ahead.by += 600
    assert stopped.result(PATIENCE) == "SwarmUI is stopped"
    assert (supervisor.status()["state"], supervisor.status()["lastError"]) == ("stopped", None)
    leash.next()


def test_another_swarmui_that_answers_cancels_the_scheduled_restart(
    make_supervisor, swarmui_folder, run_another_swarmui, leash, ahead, monkeypatch, caplog
):
    monkeypatch.setattr(service, "RESTART_DELAYS", (600.0,))
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder(), **RESTARTS)
    ready(supervisor)
    kill(leash.next())
    wait_until(lambda: supervisor.status()["state"] == "failed")
    another = run_another_swarmui()
    wait_until(lambda: supervisor.status()["state"] == "ready")
    ahead.by += 3600
    kill(another)
    wait_until(lambda: supervisor.status()["state"] == "stopped")
    assert (supervisor.launches, caplog.text.count("swarmui: failed: ")) == (1, 1)


def test_a_stop_cancels_the_scheduled_restart(make_supervisor, swarmui_folder, leash, ahead):
    supervisor = make_supervisor(ahead, swarmui_path=swarmui_folder(), **RESTARTS)
    ready(supervisor)
    kill(leash.next())
    wait_until(lambda: supervisor.status()["state"] == "failed")
    for _ in range(3):  # a restart would be launched in the second turn
        assert supervisor.stop().result(PATIENCE) == "SwarmUI is not running"
        ahead.by += 3600
    status = supervisor.status()
    assert (status["state"], status["lastError"], supervisor.launches) == ("stopped", None, 1)


def test_any_order_of_starts_stops_and_deaths_leaves_at_most_one_swarmui_and_its_true_state(
    make_api, swarmui_folder, settings, leash, monkeypatch, caplog
):
    monkeypatch.setattr(service, "STOP_TIMEOUTS", {"ShutdownServer": 1.0, "terminate": 0.5})
    api = make_api(swarmui_path=swarmui_folder(delay=0.05))
    chance, alive = random.Random(7), []

    def act(what: str) -> None:
        if what == "death":
            for swarmui in filter(Held.is_alive, alive):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(swarmui)
        else:
            api("POST", what, "*")

    with ThreadPoolExecutor(4) as pool:
        for _ in range(100 if not service.WINDOWS else 10):
            list(pool.map(act, chance.choices(["start", "stop?force=true", "death"], k=4)))
            alive = [swarmui for swarmui in [*alive, *leash.take_further()] if swarmui.is_alive()]
            assert len(alive) <= 1
            wait_until(lambda: api.status["state"] in ("ready", "stopped", "failed"))
            wait_until(lambda: (api.status["state"] == "ready") == service.probe(settings).ready)
    assert "cannot follow" not in caplog.text


# ---- its log ----


def test_the_last_lines_of_the_log_are_returned(make_app, settings):
    app, log = make_app(), settings.data_dir / "swarmui.log"
    show = functools.partial(app.get, "/api/v1/swarmui/logs")
    assert (show().body, show().headers["Content-Type"]) == (b"", "text/plain; charset=utf-8")
    log.touch()
    assert show().body == b""
    log.write_bytes(b"one\r\ntwo \xff\nthree\n")
    assert show({"lines": 2}).body == "two \ufffd\nthree\n".encode()
    log.write_bytes(b"x" * 99 + b"\n" + b"0123456789\n" * 100_000)
    assert len(show({"lines": 5000}).body) == 5000 * 11
    log.write_bytes(b"y" * (2 << 20))
    assert len(show().body) == (1 << 20) + 1
    for lines in ("0", "5001", "x"):
        show({"lines": lines}, status=400)


# ======================================================================================================
# Authentication
# ======================================================================================================

SESSION = {"scriptText": "once upon a time", "promptMode": "storyswarm", "storyUuid": "u-1"}
NOTIFICATION = {"type": "prompts_ready", "sessionTimestamp": 1738195200000, "storyUuid": "u-1", "episodeNumber": 2}

# The errors of these routes contain more than `error`.
ERROR_SHAPES = {
    "GET /api/v1/gpu/status": {
        "available": False, "gpuCount": 0, "utilization": 0, "memoryUsed": 0, "memoryTotal": 0, "temperature": 0,
        "processCount": 0, "error": None,
    },
    "GET /api/v1/session/<timestamp>/prompts-status": {"promptsReady": False},
    **{name: {"success": False} for name in (
        "POST /api/v1/swarmui/start", "POST /api/v1/swarmui/stop", "POST /api/v1/notifications/ack",
        "POST /api/v1/notifications/<notification_id>/ack", "DELETE /api/v1/notifications/<notification_id>",
        "POST /api/v1/session/save", "GET /api/v1/session/latest", "GET /api/v1/session/list",
        "GET /api/v1/session/<timestamp>", "PUT /api/v1/session/<timestamp>", "DELETE /api/v1/session/<timestamp>",
    )},
}  # fmt: skip


def route_id(route: service.Route) -> str:
    return f"{route.method} {route.path}"


def test_errors_have_the_shape_of_their_route():
    assert {route_id(route): route.error_shape for route in service.ROUTES if route.error_shape} == ERROR_SHAPES


@pytest.mark.parametrize(
    ("header", "status"),
    [("", 401), ("Bearer", 401), (f"Basic {TOKEN}", 401), (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401),
     (f"Bearer {TOKEN} {TOKEN}", 401), (TOKEN, 401), ("Bearer \xff\xfe", 401), ("Bearer \udc80", 401),
     (f"bearer {TOKEN}", 200), (f"BEARER   {TOKEN}", 200), (f" Bearer {TOKEN} ", 200)],
)  # fmt: skip
def test_only_a_bearer_header_with_the_token_is_accepted(make_app, header, status):
    app = make_app()
    app.extra_environ["HTTP_AUTHORIZATION"] = header
    app.get("/api/v1/notifications/check", status=status)


def test_an_application_needs_an_api_token(make_app):
    with pytest.raises(ValueError, match="token"):
        make_app(api_token="")


# ======================================================================================================
# HTTP application
# ======================================================================================================


@pytest.fixture
def dead_app(make_app):
    """The application on a Redis that is unavailable."""
    with contextlib.closing(service.RedisStore(f"redis://127.0.0.1:{free_port()}/0")) as store:
        yield make_app(store)


def make_pending(app: webtest.TestApp, **fields: Any) -> str:
    """Create a notification, and return its id."""
    return app.post_json("/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 48, **fields}).json["id"]


def pending(app: webtest.TestApp, query: str = "") -> list[dict[str, Any]]:
    return app.get(f"/api/v1/notifications/check{query}").json["notifications"]


def pending_ids(app: webtest.TestApp, query: str = "") -> list[str]:
    return [notification["id"] for notification in pending(app, query)]


def save(app: webtest.TestApp, document: dict[str, Any]) -> int:
    """Save a session, and return its timestamp."""
    return int(app.post_json("/api/v1/session/save", document).json["sessionKey"].split(":")[1])


def with_beats(*beats: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**SESSION, "analyzedEpisode": {"episodeNumber": 2, "scenes": [{"beats": list(beats)}]}, **fields}


def as_json(body: Any) -> dict[str, Any]:
    """Arguments of a request with a body, which is sent as it is if it is bytes."""
    return {"body": body if isinstance(body, bytes) else json.dumps(body).encode(), "content_type": "application/json"}


DONE, OPEN = {"prompts": {"cinematic": "a wide shot"}}, {"prompts": {}}


def test_health_is_open_to_all(app, store):
    del app.extra_environ["HTTP_AUTHORIZATION"]
    assert app.get("/health").json == {"status": "ok", "store": store.name}


def test_health_is_a_503_while_the_store_is_unavailable(dead_app):
    assert dead_app.get("/health", status=503).json == {"status": "degraded", "store": "redis"}


@pytest.mark.parametrize(
    "route",
    [route for route in service.ROUTES if re.search("/(notifications|session/)", route.path)],
    ids=route_id,
)
def test_a_route_that_needs_the_store_is_a_503_while_it_is_unavailable(dead_app, route):
    bodies = {"/api/v1/notifications": {**NOTIFICATION, "totalPrompts": 1}, "/api/v1/notifications/ack": {"ids": ["x"]}}
    path = re.sub("<.*?>", "1738195200000", route.path)
    answer = dead_app.request(path, method=route.method, **as_json(bodies.get(path, SESSION)), status=503)
    assert answer.json == {**route.error_shape, "error": answer.json["error"]}
    assert "Redis" in answer.json["error"]
    assert int(answer.headers["Retry-After"]) >= 1


def test_gpu_and_swarmui_need_no_store(dead_app):
    assert "nvidia-smi" in dead_app.get("/api/v1/gpu/status", status=500).json["error"]
    assert "SWARMUI_PATH" in dead_app.post("/api/v1/swarmui/start", status=500).json["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/v1/gpu", 404), ("GET", "/api/v1/session/1/2/3", 404), ("POST", "/health", 405),
     ("GET", "/api/v1/swarmui/start", 405), ("POST", "/api/v1/session/1", 405),
     ("PATCH", "/health", 405), ("PUT", "/api/v1/session/latest", 405)],
)  # fmt: skip
def test_an_unknown_path_or_method_is_an_error_in_json(make_app, method, path, status):
    answer = make_app().request(path, method=method, status=status)
    assert list(answer.json) == ["error"]
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/nothing"), ("GET", "/api/v1/session/1")])
def test_every_response_forbids_caching_sniffing_and_referrers(make_app, method, path):
    headers = make_app().request(path, method=method, expect_errors=True).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_an_unexpected_exception_is_a_500_whose_traceback_is_only_logged(make_app, sqlite_store, caplog):
    app = make_app(sqlite_store)
    sqlite_store.session = lambda timestamp: 1 / 0
    answer = app.get("/api/v1/session/5", status=500)
    assert answer.json == {"success": False, "error": "Internal server error"}
    assert "ZeroDivisionError" in caplog.text


# ------------------------------------------------------------------------------- notifications ----


def test_a_created_notification_is_returned_as_check_shows_it(app):
    answer = app.post_json("/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 48}, status=201)
    assert list(answer.json) == [
        "id", "type", "sessionTimestamp", "storyUuid", "episodeNumber", "totalPrompts", "timestamp",
    ]  # fmt: skip
    assert {**NOTIFICATION, "totalPrompts": 48}.items() <= answer.json.items()
    # It fits into a path unescaped.
    assert re.fullmatch(
        rf"notif_{service.read_time(answer.json['timestamp'])}_[A-Za-z0-9_-]{{1,44}}", answer.json["id"]
    )
    assert pending(app) == [answer.json]


def test_beats_ready_has_its_own_total_and_is_shown_only_on_request(app):
    created = app.post_json(
        "/api/v1/notifications", {**NOTIFICATION, "type": "beats_ready", "totalBeats": 7}, status=201
    )
    assert "totalPrompts" not in created.json
    assert created.json["totalBeats"] == 7
    assert pending(app) == []
    assert pending(app, "?type=beats_ready") == pending(app, "?type=all") == [created.json]


def test_creating_a_pending_notification_again_returns_it(app):
    id = make_pending(app)
    answer = app.post_json("/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 9}, status=200)
    assert answer.json["id"] == id
    app.post(f"/api/v1/notifications/{id}/ack")
    assert make_pending(app) != id


def test_check_returns_the_oldest_first_up_to_the_limit(app):
    ids = [make_pending(app, sessionTimestamp=number) for number in range(102)]
    assert pending_ids(app) == ids[:100]
    assert pending_ids(app, "?limit=3") == ids[:3]
    assert len(pending(app, "?limit=1000")) == 102


@pytest.mark.parametrize(
    ("path", "query"),
    [
        *[("session/list", query) for query in ("limit=0", "limit=1001", "limit=x")],
        *[("notifications/check", query) for query in (
            "x=1&x=2", "x=", "limit=0", "limit=1001", "limit=x", "limit=", "limit=-1", "limit=1&limit=2",
            "limit=%D9%A1", "type=other", "type=", "type=%ff",
        )],
    ],
)  # fmt: skip
def test_an_invalid_query_is_a_400_that_names_the_parameter(make_app, path, query):
    answer = make_app().get(f"/api/v1/{path}?{query}", status=400)
    assert query.split("=")[0] in answer.json["error"] or "UTF-8" in answer.json["error"]


@pytest.mark.parametrize(
    "changed",
    [{"type": "other"}, {"type": None}, {"sessionTimestamp": "1738195200000"}, {"sessionTimestamp": -1},
     {"sessionTimestamp": 10**14}, {"sessionTimestamp": True}, {"sessionTimestamp": 1.5}, {"storyUuid": 7},
     {"storyUuid": None}, {"episodeNumber": "2"}, {"totalPrompts": None}, {"totalPrompts": -1},
     {"type": "beats_ready"}],
)  # fmt: skip
def test_an_invalid_notification_is_a_400_that_names_the_field(make_app, changed):
    app = make_app()
    answer = app.post_json("/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 1, **changed}, status=400)
    assert ("totalBeats" if changed == {"type": "beats_ready"} else next(iter(changed))) in answer.json["error"]
    assert pending(app, "?type=all") == []


def test_an_acknowledged_notification_is_not_shown_again(app):
    first, second = make_pending(app), make_pending(app, sessionTimestamp=2)
    for _ in range(2):  # a repeated acknowledgement succeeds too
        answer = app.post(f"/api/v1/notifications/{first}/ack")
        assert answer.json == {"success": True, "notificationId": first}
    assert pending_ids(app) == [second]


def test_a_deleted_notification_is_gone_without_being_acknowledged(app, store):
    first, second = (make_pending(app, sessionTimestamp=session) for session in (T, T + 1))
    answer = app.delete(f"/api/v1/notifications/{first}")
    assert answer.json == {"success": True, "notificationId": first}
    assert pending_ids(app) == [second]
    assert store.acknowledged([first]) == set()
    for method, path in (("DELETE", first), ("POST", f"{first}/ack")):
        answer = app.request(f"/api/v1/notifications/{path}", method=method, status=404)
        assert answer.json == {"success": False, "error": "Notification not found"}
    assert make_pending(app, sessionTimestamp=T) != first


def test_an_acknowledged_notification_cannot_be_deleted(app):
    id = make_pending(app)
    app.post(f"/api/v1/notifications/{id}/ack")
    app.delete(f"/api/v1/notifications/{id}", status=404)


def test_a_notification_of_another_program_can_be_deleted(app, plant, clock):
    plant({**MEMBER, "id": "theirs"}, clock.now)
    app.delete("/api/v1/notifications/theirs")
    assert pending(app) == []


@pytest.mark.parametrize("id", ["notif_1738195200000_0123456789abcdef", f"notif_{'9' * 15}_x", "other", "%C3%BC"])
def test_an_unknown_id_is_a_404(app, id):
    make_pending(app)
    answer = app.post(f"/api/v1/notifications/{id}/ack", status=404)
    assert answer.json == {"success": False, "error": "Notification not found"}


@pytest.mark.parametrize("id", ["a%00b", "a%0Ab", "x" * 201, "a%ffb"])
def test_an_invalid_id_is_a_400(make_app, id):
    assert make_app().post(f"/api/v1/notifications/{id}/ack", status=400).json["success"] is False


# ------------------------------------------------------------------------------------ sessions ----


def test_prompts_status_has_exactly_the_required_keys(app):
    timestamp = save(app, with_beats(DONE, OPEN, timestamp=1738195200000))
    answer = app.get(f"/api/v1/session/{timestamp}/prompts-status").json
    assert answer == {
        "promptsReady": False,
        "sessionTimestamp": 1738195200000,
        "totalBeats": 2,
        "totalPrompts": 1,
        "lastUpdated": answer["lastUpdated"],
    }
    assert service.read_time(answer["lastUpdated"]) > 1738195200000


def test_the_real_episode_is_ready_with_fewer_prompts_than_beats(app):
    timestamp = save(app, make_session())
    answer = app.get(f"/api/v1/session/{timestamp}/prompts-status").json
    assert (answer["promptsReady"], answer["totalBeats"], answer["totalPrompts"]) == (True, 249, 240)


def test_a_missing_session_is_a_404(app):
    answer = app.get("/api/v1/session/1738195200000/prompts-status", status=404)
    assert answer.json == {"promptsReady": False, "error": "Session not found"}
    answer = app.get("/api/v1/session/1738195200000", status=404)
    assert answer.json == {"success": False, "error": "Session not found"}
    assert app.get("/api/v1/session/latest", status=404).json == {"success": False, "error": "No session found"}
    assert app.get("/api/v1/session/list").json == {"success": True, "count": 0, "sessions": []}


@pytest.mark.parametrize("timestamp", ["x", "-5", "1.5", "1" * 15, "0" * 15, "%D9%A1", "1e3", "%20"])
@pytest.mark.parametrize("tail", ["", "/prompts-status"])
def test_an_invalid_timestamp_is_a_400(make_app, timestamp, tail):
    assert "timestamp" in make_app().get(f"/api/v1/session/{timestamp}{tail}", status=400).json["error"]


def test_a_saved_session_is_returned_unchanged(app, store):
    document = {**make_session(size=5000), "timestamp": 1738195200000, "of": {"its": ["own", 1.5, None, "\U0001f600"]}}
    answer = app.post_json("/api/v1/session/save", document)
    assert answer.json == {
        "success": True, "message": "Session saved", "sessionKey": "session:1738195200000", "storage": store.name,
    }  # fmt: skip
    expected = {"success": True, "data": document, "storage": store.name}
    assert app.get("/api/v1/session/1738195200000").json == expected
    assert app.get("/api/v1/session/latest").json == expected


def test_a_session_without_a_timestamp_gets_the_next_free_one(app, monkeypatch):
    monkeypatch.setattr(service, "now_ms", lambda: 1738195200000)
    assert [save(app, SESSION) for _ in range(3)] == [1738195200000, 1738195200001, 1738195200002]
    assert app.get("/api/v1/session/1738195200001").json["data"] == {**SESSION, "timestamp": 1738195200001}


def test_put_creates_or_replaces_a_session(app):
    created = app.put_json("/api/v1/session/1738195200000", SESSION)
    assert created.json["sessionKey"] == "session:1738195200000"
    replaced = {**SESSION, "scriptText": "the end", "timestamp": 1738195200000}
    app.put_json("/api/v1/session/1738195200000", replaced)
    assert app.get("/api/v1/session/1738195200000").json["data"] == replaced


def test_a_deleted_session_is_gone_everywhere(app, store):
    for timestamp in (T, T + 1):
        app.put_json(f"/api/v1/session/{timestamp}", with_beats(DONE))
    assert app.get(f"/api/v1/session/{T + 1}/prompts-status").json["promptsReady"] is True
    answer = app.delete(f"/api/v1/session/{T + 1}")
    assert answer.json == {"success": True, "sessionTimestamp": T + 1}
    assert app.get("/api/v1/session/latest").json["data"]["timestamp"] == T
    assert [summary["timestamp"] for summary in app.get("/api/v1/session/list").json["sessions"]] == [T]
    for method, path in (("GET", ""), ("GET", "/prompts-status"), ("DELETE", "")):
        answer = app.request(f"/api/v1/session/{T + 1}{path}", method=method, status=404)
        assert answer.json["error"] == "Session not found"
    assert [number for number, _ in store.newest_sessions(10)] == [T]


def test_a_deleted_session_can_be_saved_and_announced_again(app):
    for _ in range(2):
        app.put_json(f"/api/v1/session/{T}", with_beats(DONE))
        (notification,) = pending(app)
        app.post(f"/api/v1/notifications/{notification['id']}/ack")
        app.delete(f"/api/v1/session/{T}")


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"timestamp": str(T)}, id="timestamp as text"),
        pytest.param({"timestamp": T + 0.5}, id="half a ms"),
        pytest.param({"\udfff": ["\ud83d", r"\\ud83d\\"], "scriptText": "😀"}, id="half a surrogate pair"),
    ],
)
def test_a_latest_copy_is_deleted_with_its_session(bridged, other_program, changed):
    other_program.set("session:latest", json.dumps({**SESSION, "timestamp": T, **changed}))
    bridged.app.delete(f"/api/v1/session/{T}")
    bridged.look()
    assert [key for key in other_program.keys("*session*") if str(T) in key or "latest" in key] == []


def test_put_refuses_a_timestamp_other_than_the_paths(app):
    answer = app.put_json("/api/v1/session/5", {**SESSION, "timestamp": 6}, status=400)
    assert "timestamp" in answer.json["error"]
    app.get("/api/v1/session/5", status=404)
    app.get("/api/v1/session/6", status=404)


BAD_SESSIONS = [
    pytest.param(b"", "JSON", id="empty"),
    pytest.param(b"{", "JSON", id="cut off"),
    pytest.param(b"[1]", "object", id="an array"),
    pytest.param(b"null", "object", id="null"),
    pytest.param(b'{"scriptText": "\xff"}', "UTF-8", id="not UTF-8"),
    pytest.param(b'{"scriptText": "x", "a": NaN}', "NaN", id="NaN"),
    pytest.param(b'{"scriptText": "x", "a": 1e999}', "too large", id="1e999"),
    pytest.param(b'{"scriptText": "x", "a": 1' + b"0" * 400 + b"}", "too large", id="400 digits"),
    pytest.param(b'{"scriptText": "x", "a": 1' + b"0" * 5000 + b"}", "too large", id="5000 digits"),
    pytest.param(b'{"scriptText": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeply", id="too deep"),
    pytest.param(b'{"scriptText": "a", "b": ' + b"[" * 100 + b"]" * 100 + b"}", "100 levels", id="101 levels"),
    pytest.param(b'{"scriptText": "a", "scriptText": "b"}', "twice", id="a key twice"),
    pytest.param(b'{"scriptText": "a", "b": {"c": 1, "c": 1}}', "twice", id="a nested key twice"),
    pytest.param(b"{}", "scriptText or analyzedEpisode", id="neither text nor episode"),
    pytest.param(b'{"scriptText": null}', "scriptText or analyzedEpisode", id="null is absent"),
    *(
        pytest.param(json.dumps({**SESSION, field: value}).encode(), field, id=f"{field} {value!r}")
        for field, value in [
            ("timestamp", "5"), ("timestamp", -1), ("timestamp", 10**14), ("timestamp", 1.5), ("timestamp", True),
            ("scriptText", 5), ("episodeContext", {}), ("storyUuid", []), ("analyzedEpisode", "x"),
            ("analyzedEpisode", []), ("promptMode", 1), ("retrievalMode", False), ("selectedLLM", 0.5),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/v1/session/save"), ("PUT", "/api/v1/session/5")])
@pytest.mark.parametrize(("body", "words"), BAD_SESSIONS)
def test_an_invalid_session_is_a_400_and_is_not_stored(make_app, method, path, body, words):
    app = make_app()
    answer = app.request(path, method=method, **as_json(body), status=400)
    assert answer.json == {"success": False, "error": answer.json["error"]}
    assert words in answer.json["error"]
    assert app.get("/api/v1/session/list").json["count"] == 0


def test_a_list_shows_summaries_newest_first(app):
    for timestamp in (5, 7, 6):
        save(app, with_beats(DONE, OPEN, timestamp=timestamp, scriptText="s" * 501))
    answer = app.get("/api/v1/session/list?limit=2").json
    assert [summary["timestamp"] for summary in answer["sessions"]] == [7, 6]
    assert answer["count"] == 2
    assert answer["sessions"][0] == {
        "timestamp": 7,
        "storyUuid": "u-1",
        "promptMode": "storyswarm",
        "scriptText": "s" * 500,
        "analyzedEpisode": {
            "episodeNumber": 2,
            "title": "",
            "scenes": [{"sceneNumber": None, "title": "", "totalBeats": 2}],
        },
    }


@pytest.mark.parametrize(
    ("document", "words"),
    [(b"\xff", "UTF-8"), (b"{", "JSON"), (b"[]", "an array"), (b'{"scriptText": "x"}', "scenes"),
     (b'{"analyzedEpisode": {"scenes": [{"beats": [{"prompts": {"cinematic": 5}}]}]}}',
      "analyzedEpisode.scenes[0].beats[0].prompts.cinematic is a number")],
)  # fmt: skip
def test_a_stored_document_that_is_no_session_is_a_500_that_names_its_fault(make_app, sqlite_store, document, words):
    sqlite_store.save(1738195200000, service.Change(document))
    answer = make_app(sqlite_store).get("/api/v1/session/1738195200000/prompts-status", status=500)
    assert answer.json["promptsReady"] is False
    assert "1738195200000" in answer.json["error"]
    assert words in answer.json["error"]


# --------------------------------------------------------------------------- what a session announces ----


def test_a_session_announces_its_beats_when_saved_and_its_prompts_when_ready(app):
    timestamp = save(app, with_beats(OPEN, OPEN))
    (beats,) = pending(app, "?type=all")
    assert (beats["type"], beats["sessionTimestamp"], beats["totalBeats"]) == ("beats_ready", timestamp, 2)
    assert (beats["storyUuid"], beats["episodeNumber"]) == ("u-1", 2)
    app.put_json(f"/api/v1/session/{timestamp}", with_beats(DONE, DONE))
    (prompts,) = pending(app)
    assert (prompts["sessionTimestamp"], prompts["totalPrompts"]) == (timestamp, 2)


def test_a_step_is_announced_once(app):
    timestamp = save(app, with_beats(DONE))
    (notification,) = pending(app, "?type=all")
    app.post(f"/api/v1/notifications/{notification['id']}/ack")
    app.put_json(f"/api/v1/session/{timestamp}", with_beats(DONE))
    app.get(f"/api/v1/session/{timestamp}/prompts-status")
    assert pending(app, "?type=all") == []


@pytest.mark.parametrize(
    "document",
    [with_beats(DONE, promptMode="storyart"), with_beats(), SESSION, with_beats({"prompts": 5})],
    ids=["not for StorySwarm", "no beats", "only a script", "wrong types"],
)
def test_a_session_without_beats_for_storyswarm_announces_nothing(app, document):
    timestamp = save(app, document)
    app.get(f"/api/v1/session/{timestamp}/prompts-status", expect_errors=True)
    assert pending(app, "?type=all") == []


# ------------------------------------------------------------------------------ session tokens ----

PAGE, TRUSTED, FOREIGN = "http://localhost:3000", "http://localhost:4000", "http://evil.example:3000"


def as_caller(app: webtest.TestApp, token: str | None, origin: str | None = None) -> webtest.TestApp:
    """The same application, called with another token (None: without one), from a page of this origin."""
    environ = {name: value for name, value in app.extra_environ.items() if name != "HTTP_AUTHORIZATION"}
    if token is not None:
        environ["HTTP_AUTHORIZATION"] = f"Bearer {token}"
    if origin is not None:
        environ["HTTP_ORIGIN"] = origin
    return webtest.TestApp(app.app, extra_environ=environ)


def make_token(app: webtest.TestApp, *permissions: str, subject: str = "storyswarm", **fields: Any) -> str:
    body = {"subject": subject, "permissions": list(permissions), **fields}
    return app.post_json("/api/v1/auth/session", body, status=201).json["token"]


def test_a_session_token_is_made_shown_and_revoked(app, store):
    wanted = {"subject": "story.swarm-1", "permissions": ["notifications:read", "gpu:read"], "ttlSeconds": 60}
    made = app.post_json("/api/v1/auth/session", wanted, status=201).json
    assert list(made) == ["token", "subject", "permissions", "expiresAt"]
    assert len(made["token"]) >= 43  # 256 bits
    left = service.read_time(made["expiresAt"]) - service.now_ms()
    assert 0 < left <= 60_000
    caller = as_caller(app, made["token"])
    shown = caller.get("/api/v1/auth/session").json
    assert shown == {name: made[name] for name in ("subject", "permissions", "expiresAt")}
    assert sorted(shown["permissions"]) == sorted(wanted["permissions"])
    caller.delete("/api/v1/auth/session", status=204)
    caller.get("/api/v1/auth/session", status=401)
    assert store.tokens() == []


def test_the_api_token_has_every_permission_and_no_end(app):
    shown = app.get("/api/v1/auth/session").json
    assert shown["expiresAt"] is None
    assert shown["permissions"] == list(service.PERMISSIONS)
    app.delete("/api/v1/auth/session", status=409)


def test_only_the_digest_of_a_token_is_stored(app, store):
    token = make_token(app, "gpu:read")
    ((digest, record),) = store.tokens()
    assert digest == service.digest_of(token)
    assert token.encode() not in record


def test_redis_expires_a_token_by_itself(make_app, redis_store, other_program):
    make_token(make_app(redis_store), "gpu:read", ttlSeconds=60)
    (key,) = other_program.keys("auth:session:*")
    assert 0 < other_program.pttl(key) <= 60_000


def test_a_token_is_valid_at_every_instance_on_the_same_redis(make_app, redis_store, redis_url):
    token = make_token(make_app(redis_store), "notifications:read")
    with contextlib.closing(service.RedisStore(redis_url)) as other:
        as_caller(make_app(other), token).get("/api/v1/notifications/check")


@pytest.mark.parametrize(
    "record",
    [b"\xff", b"[]", b"{}", b'{"subject": "a b", "permissions": [], "expiresAt": 9e15}',
     b'{"subject": "a", "permissions": ["root"], "expiresAt": 9e15}',
     b'{"subject": "a", "permissions": ["admin"], "expiresAt": 1e300}', b'{"subject": "a", "permissions": 5}'],
)  # fmt: skip
def test_a_token_with_an_invalid_record_is_unknown(make_app, store, record):
    store.keep_token(service.digest_of("a-token"), record, 60_000)
    as_caller(make_app(store), "a-token").get("/api/v1/auth/session", status=401)


@pytest.mark.parametrize(
    "changed",
    [{"subject": ""}, {"subject": "a b"}, {"subject": "a\n"}, {"subject": "x" * 65}, {"subject": None},
     {"permissions": None},
     {"permissions": []}, {"permissions": ["root"]}, {"permissions": "gpu:read"}, {"ttlSeconds": 59},
     {"ttlSeconds": 31622401}, {"ttlSeconds": "60"}],
)  # fmt: skip
def test_an_invalid_request_for_a_token_is_a_400_that_names_the_field(make_app, changed):
    body = {"subject": "a", "permissions": ["gpu:read"], **changed}
    assert next(iter(changed)) in make_app().post_json("/api/v1/auth/session", body, status=400).json["error"]


# ----------------------------------------------------------------------------- the permission matrix ----

KINDS = ["none", "api token", "expired", "revoked", *service.PERMISSIONS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", service.ROUTES, ids=route_id)
def test_each_route_requires_its_permission(make_app, sqlite_store, route, kind):
    app = make_app(sqlite_store)
    token = None if kind == "none" else TOKEN
    if kind in service.PERMISSIONS or kind == "revoked":
        token = make_token(app, "admin" if kind == "revoked" else kind)
    if kind == "expired":
        token, _ = service.issue_token(sqlite_store, "a", ["admin"], 60, service.now_ms() - 60_000)
    if kind == "revoked":
        as_caller(app, token).delete("/api/v1/auth/session")
    path = re.sub("<.*?>", "1738195200000", route.path)
    answer = as_caller(app, token).request(path, method=route.method, expect_errors=True)
    may = route.permission in (kind, {"swarmui:control": "swarmui:read"}.get(kind)) or kind in ("api token", "admin")
    if may or route.permission == "open" or (route.permission == "any" and kind in service.PERMISSIONS):
        assert answer.status_int not in (401, 403)
        return
    assert answer.status_int == (403 if kind in service.PERMISSIONS else 401)
    error = answer.json["error"]
    assert answer.json == {**route.error_shape, "error": error}
    assert (route.permission if kind in service.PERMISSIONS else "token") in error
    assert answer.headers.get("WWW-Authenticate") == (None if kind in service.PERMISSIONS else "Bearer")


def test_a_route_without_a_permission_is_refused(make_app, monkeypatch):
    route = dataclasses.replace(service.ROUTES[0], permission="")
    monkeypatch.setattr(service, "ROUTES", (route,))
    with pytest.raises(ValueError, match="permission"):
        make_app()


# ------------------------------------------------------------------------- looking a token up ----


@pytest.fixture
def authenticator(settings, sqlite_store, clock):
    """With a clock of its own (`seconds`), and a list of its `look_ups` in the store."""
    seconds = Clock(1000.0)
    authenticator = service.Authenticator(settings, sqlite_store, seconds, clock)
    authenticator.seconds, authenticator.look_ups = seconds, []
    real = sqlite_store.token
    sqlite_store.token = lambda digest: authenticator.look_ups.append(digest) or real(digest)
    return authenticator


def identify(authenticator: service.Authenticator, token: str, address: str = "192.0.2.7") -> service.Caller:
    return authenticator.identify({"HTTP_AUTHORIZATION": f"Bearer {token}", "REMOTE_ADDR": address})


def test_a_token_is_cached_for_5_seconds(authenticator, sqlite_store, clock):
    token, _ = service.issue_token(sqlite_store, "a", ["gpu:read"], 60, clock())
    for _ in range(3):
        identify(authenticator, token)
    authenticator.seconds.now += 4.9
    identify(authenticator, token)
    assert len(authenticator.look_ups) == 1
    authenticator.seconds.now += 0.1
    identify(authenticator, token)
    assert len(authenticator.look_ups) == 2


def test_an_unknown_token_is_not_cached(authenticator):
    for _ in range(2):
        with pytest.raises(service.Unauthorized):
            identify(authenticator, "unknown")
    assert len(authenticator.look_ups) == 2


def test_a_cached_token_expires_at_its_time(authenticator, sqlite_store, clock):
    token, _ = service.issue_token(sqlite_store, "a", ["gpu:read"], 60, clock())
    identify(authenticator, token)
    clock.now += 60_000
    with pytest.raises(service.Unauthorized):
        identify(authenticator, token)


def test_a_look_up_that_ends_late_does_not_restore_a_revoked_token(authenticator, sqlite_store, clock):
    token, _ = service.issue_token(sqlite_store, "a", ["gpu:read"], 3600, clock())
    identify(authenticator, token)
    real = sqlite_store.token

    def look_up(digest: str) -> bytes | None:
        found = real(digest)
        if sqlite_store.revoke_token(digest):  # and a later look-up ends before this one
            authenticator.seconds.now += 1
            with pytest.raises(service.Unauthorized):
                identify(authenticator, token)
        return found

    sqlite_store.token = look_up
    authenticator.seconds.now += 6
    for _ in range(2):
        with pytest.raises(service.Unauthorized):
            identify(authenticator, token)


def test_a_revocation_overrides_a_look_up_in_progress(authenticator, sqlite_store, clock):
    token, _ = service.issue_token(sqlite_store, "a", ["gpu:read"], 60, clock())
    real = sqlite_store.token

    def look_up(digest: str) -> bytes | None:
        found = real(digest)
        authenticator.revoke(digest)  # after the store was read, before its answer is used
        return found

    sqlite_store.token = look_up
    for _ in range(2):
        with pytest.raises(service.Unauthorized):
            identify(authenticator, token)


@pytest.fixture
def store_away(sqlite_store) -> Callable[[], None]:
    def fail(digest: str) -> None:
        raise service.Unavailable("away")

    return lambda: setattr(sqlite_store, "token", fail)


def test_a_token_stays_valid_for_a_minute_while_the_store_is_unavailable(
    authenticator, settings, sqlite_store, clock, store_away
):
    token, _ = service.issue_token(sqlite_store, "a", ["gpu:read"], 3600, clock())
    identify(authenticator, token)
    store_away()
    for _ in range(2):  # a use does not make it longer
        authenticator.seconds.now += 29.9
        assert identify(authenticator, token).subject == "a"
    authenticator.seconds.now += 0.3
    with pytest.raises(service.Unavailable):
        identify(authenticator, token)
    assert identify(authenticator, settings.api_token).subject == "api-token"


def test_a_token_revoked_in_the_store_is_not_valid_while_the_store_is_unavailable(
    authenticator, sqlite_store, clock, store_away
):
    token, caller = service.issue_token(sqlite_store, "a", ["gpu:read"], 3600, clock())
    identify(authenticator, token)
    sqlite_store.revoke_token(caller.digest)  # as the command `token --revoke` does
    authenticator.seconds.now += 60
    store_away()
    with pytest.raises(service.Unavailable):
        identify(authenticator, token)


def test_an_address_that_sent_many_wrong_tokens_is_refused_for_a_minute(authenticator, settings):
    for _ in range(20):
        with pytest.raises(service.Unauthorized):
            identify(authenticator, "wrong")
    with pytest.raises(service.TooManyRequests) as caught:
        identify(authenticator, "wrong")
    assert 0 < caught.value.retry_after <= 60
    with pytest.raises(service.Unauthorized):
        identify(authenticator, "wrong", "192.0.2.8")
    assert identify(authenticator, settings.api_token).subject == "api-token"
    with pytest.raises(service.Unauthorized):  # a missing token is not a wrong one
        authenticator.identify({"REMOTE_ADDR": "192.0.2.7"})
    authenticator.seconds.now += 60
    with pytest.raises(service.Unauthorized):
        identify(authenticator, "wrong")


def test_no_token_appears_in_the_log_or_a_response(make_app, sqlite_store, caplog):
    caplog.set_level("DEBUG")
    app = make_app(sqlite_store)
    token, wrong = make_token(app, "gpu:read"), "wr0ng-t0ken"
    texts = [as_caller(app, sent).get("/api/v1/session/list", expect_errors=True).text for sent in (token, wrong)]
    assert not any(secret in caplog.text + "".join(texts) for secret in (token, TOKEN, wrong))


def test_a_failed_revocation_can_be_repeated(authenticator, sqlite_store, clock, monkeypatch):
    token, caller = service.issue_token(sqlite_store, "a", ["gpu:read"], 60, clock())
    with contextlib.closing(sqlite3.connect(sqlite_store.place, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(sqlite_store, "WAIT", 0.01)
        with pytest.raises(service.Unavailable):
            authenticator.revoke(caller.digest)
        monkeypatch.undo()
    assert identify(authenticator, token) == caller
    authenticator.revoke(caller.digest)
    with pytest.raises(service.Unauthorized):
        identify(authenticator, token)


def test_a_trusted_page_needs_no_store_whatever_token_it_sends(make_app):
    with contextlib.closing(service.RedisStore(f"redis://127.0.0.1:{free_port()}/0")) as away:
        app = as_caller(make_app(away, trusted_origins=(TRUSTED,)), "of-another-backend", TRUSTED)
        app.get("/api/v1/auth/session", extra_environ={"REMOTE_ADDR": "127.0.0.1"}, status=200)


def test_two_authorization_headers_are_refused(make_app):
    app = as_caller(make_app(), f"{TOKEN}, Bearer {TOKEN}")
    assert "Authorization" in app.get("/api/v1/notifications/check", status=400).json["error"]


# ------------------------------------------------------------------------------------ browsers ----


@pytest.fixture
def page_app(make_app):
    """Called from this PC without a token; PAGE is allowed, TRUSTED is trusted."""
    app = as_caller(make_app(cors_origins=(PAGE,), trusted_origins=(TRUSTED,)), None)
    app.extra_environ["REMOTE_ADDR"] = "127.0.0.1"
    return app


@pytest.mark.parametrize("origin", [PAGE, TRUSTED, FOREIGN])
@pytest.mark.parametrize("path", ["/api/v1/gpu/status", "/api/v1/session/5", "/api/v1/auth/session", "/health"])
def test_a_preflight_is_answered_without_a_token(page_app, path, origin):
    requested = {
        "Origin": origin,
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "content-type",
    }
    answer = page_app.options(path, headers={**requested, "Access-Control-Request-Private-Network": "true"}, status=204)
    sent = {name: value for name, value in answer.headers.items() if name.startswith("Access-Control")}
    if origin == FOREIGN:
        assert sent == {}
        return
    methods = sorted(route.method for route in service.ROUTES if re.sub("<.*?>", "5", route.path) == path)
    assert sent["Access-Control-Allow-Origin"] == origin
    assert sent["Access-Control-Allow-Methods"] == ", ".join(methods)
    assert sent["Access-Control-Allow-Headers"] == "Authorization, Content-Type, Last-Event-ID, X-Reservation-Id"
    assert sent["Access-Control-Allow-Private-Network"] == "true"
    assert int(sent["Access-Control-Max-Age"]) > 0


def test_a_preflight_of_an_unknown_path_lets_the_page_see_the_404(page_app):
    answer = page_app.options("/api/v1/nothing", headers={"Origin": PAGE, "Access-Control-Request-Method": "GET"})
    assert answer.status_int == 204
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE


def test_private_network_access_is_granted_only_on_request(page_app):
    answer = page_app.options("/health", headers={"Origin": PAGE, "Access-Control-Request-Method": "GET"})
    assert "Access-Control-Allow-Private-Network" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/health", 200), ("GET", "/api/v1/gpu/status", 401), ("GET", "/api/v1/nothing", 401),
     ("PATCH", "/health", 401), ("POST", "/api/v1/session/save", 401)],
)  # fmt: skip
@pytest.mark.parametrize("origin", [PAGE, FOREIGN, None, "null"])
def test_only_an_allowed_page_may_read_responses(page_app, method, path, status, origin):
    headers = {"Origin": origin} if origin else {}
    answer = page_app.request(path, method=method, headers=headers, status=status)
    assert answer.headers.get("Access-Control-Allow-Origin") == (PAGE if origin == PAGE else None)
    assert ("Access-Control-Expose-Headers" in answer.headers) == (origin == PAGE)
    assert answer.headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_trusted_page_has_every_permission_but_admin_without_a_token(page_app):
    shown = page_app.get("/api/v1/auth/session", headers={"Origin": TRUSTED}).json
    assert shown["subject"] == f"origin:{TRUSTED}"
    assert set(shown["permissions"]) == set(service.PERMISSIONS) - {"admin"}
    page_app.get("/api/v1/notifications/check", headers={"Origin": TRUSTED}, status=200)
    body = {"subject": "a", "permissions": ["gpu:read"]}
    page_app.post_json("/api/v1/auth/session", body, headers={"Origin": TRUSTED}, status=403)
    page_app.delete("/api/v1/auth/session", headers={"Origin": TRUSTED}, status=409)


def test_on_a_trusted_page_a_valid_token_takes_precedence_and_an_unknown_one_is_ignored(page_app):
    path, origin = "/api/v1/auth/session", {"Origin": TRUSTED}
    assert page_app.get(path, headers={**origin, "Authorization": f"Bearer {TOKEN}"}).json["subject"] == "api-token"
    strange = page_app.get(path, headers={**origin, "Authorization": "Bearer of-another-backend"})
    assert strange.json["subject"] == f"origin:{TRUSTED}"


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        *[({"REMOTE_ADDR": address}, 200) for address in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1")],
        *[({"REMOTE_ADDR": address}, 401) for address in ("192.168.1.7", "")],
        *[({"HTTP_ORIGIN": origin}, 401) for origin in (PAGE, f"{TRUSTED}/", FOREIGN)],
        *[
            ({f"HTTP_{name}": "1.2.3.4"}, 401)
            for name in ("FORWARDED", "VIA", "X_FORWARDED_FOR", "X_FORWARDED_ANYTHING")
        ],
    ],
)
def test_only_a_trusted_page_on_this_pc_needs_no_token(page_app, changed, status):
    environ = {"HTTP_ORIGIN": TRUSTED, **changed}
    page_app.get("/api/v1/notifications/check", extra_environ=environ, status=status)


# ------------------------------------------------------------------------------ refused pages ----

REFUSED_PATH = "/api/v1/notifications/check"


def refusal(page_app: webtest.TestApp, origin: str, **environ: str) -> str:
    """The error of a refused poll by a page of this origin."""
    return page_app.get(REFUSED_PATH, headers={"Origin": origin}, extra_environ=environ, status=401).json["error"]


def pages_in_check(settings: service.Settings, **changed: Any) -> list[str]:
    """What `check` says about refused pages, with changed settings."""
    found = service.check_storyart(dataclasses.replace(settings, **changed))
    return [text for _, subject, text in found if subject == "pages"]


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3001", "https://localhost:3001", "http://localhost", "https://127.0.0.1", "http://[::1]:65535"],
)
def test_a_refused_page_on_this_pc_is_named_in_the_response_the_log_and_check(page_app, settings, caplog, origin):
    texts = [refusal(page_app, origin), *caplog.messages, *pages_in_check(settings)]
    assert len(texts) == 3
    assert all(f"{origin} " in text and "STORYTELLER_TRUSTED_ORIGINS" in text for text in texts)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"REMOTE_ADDR": "192.168.1.7"}, id="a request from another PC"),
        pytest.param({"HTTP_X_FORWARDED_FOR": "1.2.3.4"}, id="a forwarded request"),
        pytest.param({"HTTP_AUTHORIZATION": "Bearer unknown"}, id="a wrong token"),
        pytest.param({"HTTP_ORIGIN": TRUSTED, "REMOTE_ADDR": "192.168.1.7"}, id="a trusted page on another PC"),
        *[
            {"HTTP_ORIGIN": origin}
            for origin in [
                FOREIGN, "null", "http://localhost.evil.example", "http://evil.example#http://localhost",
                "http://localhost:3000/", "http://localhost:3000@evil.example", "http://127.0.0.2:3000",
                "http://[::1].evil.example", "file://localhost",
            ]
        ],
    ],
)  # fmt: skip
def test_a_page_that_trust_would_not_help_is_named_nowhere(page_app, settings, caplog, changed):
    environ = {"HTTP_ORIGIN": PAGE, **changed}
    error = page_app.get(REFUSED_PATH, extra_environ=environ, status=401).json["error"]
    assert environ["HTTP_ORIGIN"] not in error
    assert caplog.text == ""
    assert not (settings.data_dir / "refused_origins.json").exists()


def test_a_refused_page_is_logged_once_per_run(page_app, caplog):
    for origin in ("http://localhost:3001", "http://localhost:3002") * 3:
        assert origin in refusal(page_app, origin)
    assert [message.split()[1] for message in caplog.messages] == ["http://localhost:3001", "http://localhost:3002"]


def test_the_console_and_check_name_a_refused_page_until_it_is_trusted(start_service, run_module):
    running = start_service()
    for origin in (PAGE, PAGE, TRUSTED):
        assert running.call("GET", REFUSED_PATH, headers={"Origin": origin})[0] == 401
    wait_until(lambda: TRUSTED in running.printed)
    warned = [line for line in running.printed.splitlines() if PAGE in line]
    assert len(warned) == 1
    assert "STORYTELLER_TRUSTED_ORIGINS" in warned[0]
    lines = [line for line in run_module("check").stdout.splitlines() if line.startswith("WARN pages: ")]
    assert [(PAGE in line, TRUSTED in line) for line in lines] == [(True, False), (False, True)]
    assert "WARN pages: " not in run_module("check", STORYTELLER_TRUSTED_ORIGINS=f"{PAGE} {TRUSTED}").stdout


def test_check_names_a_page_that_an_earlier_run_refused(make_app, settings):
    for origin in (PAGE, TRUSTED):
        app = as_caller(make_app(), None)  # a new run
        refusal(app, origin, REMOTE_ADDR="127.0.0.1")
    assert [text.split()[0] for text in pages_in_check(settings)] == [PAGE, TRUSTED]
    assert [text.split()[0] for text in pages_in_check(settings, trusted_origins=(PAGE,))] == [TRUSTED]


def test_the_20_pages_refused_last_are_stored(make_app, settings):
    origins = [f"http://localhost:{port}" for port in range(5000, 5025)]
    for origin in [*origins, origins[10]]:
        refusal(as_caller(make_app(), None), origin, REMOTE_ADDR="127.0.0.1")
    assert json.loads((settings.data_dir / "refused_origins.json").read_text()) == [
        *origins[5:10],
        *origins[11:],
        origins[10],
    ]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\xff", b'["http://localhost:1"', b"5", b'{"a": 1}', pytest.param(b"[" * 100_000, id="nested"),
     b'[5, null, ["a"], {}, "a"]', b'["\\ud800"]', b'["http://evil.example"]',
     b'["http://localhost:1\\nhttp://evil.example"]'],
)  # fmt: skip
def test_a_damaged_list_of_refused_pages_is_replaced(page_app, settings, damaged):
    path = settings.data_dir / "refused_origins.json"
    path.write_bytes(damaged)
    assert pages_in_check(settings) == []
    refusal(page_app, PAGE)
    assert json.loads(path.read_text()) == [PAGE]


def test_a_list_of_refused_pages_that_cannot_be_written_changes_no_response(page_app, settings, caplog):
    (settings.data_dir / "refused_origins.json").mkdir()
    for _ in range(2):
        assert PAGE in refusal(page_app, PAGE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert pages_in_check(settings) == []
    assert [path.name for path in settings.data_dir.iterdir() if "refused" in path.name] == ["refused_origins.json"]


def test_pages_refused_at_the_same_time_are_all_stored(page_app, settings):
    origins = [f"http://localhost:{port}" for port in range(5000, 5016)]
    with ThreadPoolExecutor(len(origins)) as pool:
        list(pool.map(functools.partial(refusal, page_app), origins))
    assert sorted(json.loads((settings.data_dir / "refused_origins.json").read_text())) == origins


def test_a_refused_page_is_stored_once_per_run_and_not_by_the_event_loop(make_app, serving, monkeypatch):
    threads, real = [], service.write_private

    def write(*arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread().name.split("_")[0])
        real(*arguments, **options)

    monkeypatch.setattr(service, "write_private", write)
    server = serving(make_app().app)
    for _ in range(3):
        request = f"GET {REFUSED_PATH} HTTP/1.1\r\nHost: localhost\r\nOrigin: {PAGE}\r\nConnection: close\r\n\r\n"
        assert raw_exchange(server.port, request.encode())[0] == 401
    assert threads == ["pool"]


# ----------------------------------------------------------------------------- the Host header ----


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "192.168.1.7", "[::1]:8000", "render-pc:80", "Studio.Example"],
)
def test_a_host_header_that_names_this_pc_is_accepted(make_app, host):
    app = make_app(host="render-pc", allowed_hosts=("studio.example",))
    app.get("/health", headers={"Host": host}, status=200)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "localhost:80:80", "", "localhost, localhost", "127.0.0.1.evil.example",
     "local host", "localhost:x"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/health", "/api/v1/nothing"])
def test_a_host_header_that_names_another_machine_is_a_421(make_app, host, path):
    assert "STORYTELLER_ALLOWED_HOSTS" in make_app().get(path, headers={"Host": host}, status=421).json["error"]


# ------------------------------------------------------------------------------------ bad input ----


@pytest.mark.parametrize(
    ("kind", "status"),
    [("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("", 415), ("application/jsonx", 415),
     ("application/json; charset=utf-8", 200)],
)  # fmt: skip
def test_a_body_must_have_the_content_type_of_json(make_app, kind, status):
    body = json.dumps(SESSION).encode()
    answer = make_app().request("/api/v1/session/5", method="PUT", body=body, content_type=kind, status=status)
    assert answer.json["success"] is (status == 200)


def test_the_body_of_a_get_is_ignored(make_app):
    make_app().request("/api/v1/notifications/check", method="GET", body=b"\xff", content_type="text/plain", status=200)


def test_100_levels_and_whole_floats_are_stored_unchanged(make_app):
    app = make_app()
    body = b'{"scriptText": "a", "timestamp": 5.0, "b": ' + b"[" * 99 + b"]" * 99 + b"}"
    app.request("/api/v1/session/5", method="PUT", **as_json(body), status=200)
    assert app.get("/api/v1/session/5").json["data"] == json.loads(body)


def raw_exchange(port: int, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Send these bytes, and return the status, the headers and the JSON of the response."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(request)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.status, dict(answer.headers), json.loads(answer.read())


def test_waitresss_own_errors_have_our_shape_and_headers(start_service):
    running = start_service()
    origin = f"Host: localhost\r\nOrigin: {PAGE}\r\n".encode()
    cases = [
        (b"GET /health HTTP/1.1\r\n" + origin + b"Content-Length: x\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\n" + origin + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /health HTTP/1.1\r\n" + origin + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\n" + origin + b"X: " + b"x" * 300_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + origin + f"Authorization: Bearer {TOKEN}\nX: y\r\n\r\n".encode(), 400),
    ]
    for request, expected in cases:
        status, headers, body = raw_exchange(running.port, request)
        assert (status, list(body)) == (expected, ["error"])
        assert TOKEN not in body["error"]
        assert headers["Content-Type"] == "application/json"
        assert headers["Cache-Control"] == "no-store"
        assert "Server" not in headers
    assert raw_exchange(running.port, cases[1][0])[1]["Access-Control-Allow-Origin"] == PAGE
    assert running.call("GET", "/health")[0] == 200


def test_too_large_a_header_is_read_to_its_end_before_it_is_refused(start_service):
    """Closing a connection with unread data resets it, and the response is lost."""
    running = start_service()
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert running.call("GET", "/health")[0] == 200
        assert not select.select([client], [], [], 0)[0]
        client.sendall(b"\r\n\r\n")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 431


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n"], ids=["none", "two"])
def test_a_request_with_no_host_or_two_is_a_421(start_service, hosts):
    assert raw_exchange(start_service().port, b"GET /health HTTP/1.0\r\n" + hosts + b"\r\n")[0] == 421


# --------------------------------------------------------------------- the OpenAPI description ----


def test_every_route_is_described_and_nothing_else(make_app):
    app = as_caller(make_app(), None)
    described = app.get("/openapi.json").json
    assert described["openapi"].startswith("3.1")
    operations = [operation for methods in described["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(service.ROUTES)
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == {(route.method, re.sub("<(.*?)>", r"{\1}", route.path)) for route in service.ROUTES}
    for path, methods in described["paths"].items():
        for operation in methods.values():
            names = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert names == set(re.findall("{(.*?)}", path))
            assert operation.get("x-permission", "open") in (*service.PERMISSIONS, "any", "open")
            headers = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"]
            known = {"/api/v1/events": "Last-Event-ID", STATUS: "X-Reservation-Id", START: "X-Reservation-Id"}
            assert headers == [known.get(path)] * (path in known), path


def test_every_example_matches_its_schema():
    inputs = [schema for route in service.ROUTES for schema in [*route.query.values(), route.body] if schema]
    operations = [operation for methods in service.describe_api()["paths"].values() for operation in methods.values()]
    responses = [response for operation in operations for response in operation["responses"].values()]
    contents = [next(iter(response["content"].values())) for response in responses if "content" in response]
    examples = [(service.example_of(schema), schema) for schema in inputs]
    for example, schema in examples + [(content["example"], content["schema"]) for content in contents]:
        assert service.validation_error(example, schema, "example") is None


@pytest.fixture
def call_declared(make_app, store, nvidia_smi):
    """Calls the application, and checks each response, also an error, against what its route declares."""
    app = make_app(store, nvidia_smi=nvidia_smi(GOOD, {"print": "41\n"}))
    described = service.describe_api()["paths"]
    by_length = sorted(service.ROUTES, key=lambda route: "<" in route.path)
    seen: set[tuple[str, int]] = set()

    def call(method: str, path: str, body: Any = None, token: str | None = TOKEN) -> Any:
        request = as_json(b"" if body is None else body)
        answer = as_caller(app, token).request(path, method=method, **request, expect_errors=True)
        route = next(
            route
            for route in by_length
            if route.method == method and re.fullmatch(re.sub("<.*?>", "[^/]+", route.path), path.partition("?")[0])
        )
        seen.add((route_id(route), answer.status_int))
        operation = described[re.sub(r"<(\w+)>", r"{\1}", route.path)][method.lower()]
        content = operation["responses"][str(answer.status_int)].get("content")
        assert list(content or [""]) == [answer.content_type or ""]
        if content and answer.content_type == "application/json":
            assert service.validation_error(answer.json, content["application/json"]["schema"], "answer") is None
            return answer.json
        return None

    call.seen = seen
    return call


def test_real_responses_match_what_their_routes_declare(call_declared):
    token = call_declared("POST", "/api/v1/auth/session", {"subject": "a", "permissions": ["gpu:read"]})["token"]
    for route in service.ROUTES:
        path = re.sub("<timestamp>", "1738195200000", re.sub("<notification_id>", "notif_1", route.path))
        if route.handler is not service.swarmui_start:
            call_declared(route.method, path, {}, token=None)
            call_declared(route.method, path, {"scriptText": 5}, token)
        call_declared(route.method, path, {"timestamp": "x"})
    call_declared("GET", "/api/v1/auth/session", token=token)
    call_declared("DELETE", "/api/v1/auth/session", token=token)
    for document in (with_beats(OPEN), with_beats(DONE)):
        call_declared("PUT", "/api/v1/session/1738195200000", document)
        call_declared("GET", "/api/v1/session/1738195200000/prompts-status")
    call_declared("POST", "/api/v1/session/save", SESSION)
    made = call_declared("POST", "/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 1, "sessionTimestamp": 5})
    call_declared("POST", "/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 1, "sessionTimestamp": 5})
    for path in ("notifications/check?type=all", "session/latest", "session/list", "session/1738195200000"):
        call_declared("GET", f"/api/v1/{path}")
    call_declared("POST", f"/api/v1/notifications/{made['id']}/ack")
    call_declared("GET", "/api/v1/notifications/check?type=all&batch=true")
    call_declared("POST", "/api/v1/notifications/ack", {"ids": [made["id"], "x"]})
    second = call_declared("POST", "/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 1, "sessionTimestamp": 6})
    call_declared("DELETE", f"/api/v1/notifications/{second['id']}")
    call_declared("DELETE", "/api/v1/session/1738195200000")
    call_declared("GET", "/api/v1/session/x/prompts-status")
    reservation = call_declared("POST", RESERVATION, {"holder": "a", "ttlSeconds": 60})["reservationId"]
    call_declared("POST", RESERVATION, {"holder": "b", "ttlSeconds": 60})
    call_declared("GET", RESERVATION)
    call_declared("PUT", f"{RESERVATION}/{reservation}")
    call_declared("DELETE", f"{RESERVATION}/{reservation}")
    call_declared("POST", RESERVATION, {"holder": "b", "ttlSeconds": 60, "purpose": "p"})
    call_declared("DELETE", RESERVATION)
    names = {route_id(route) for route in service.ROUTES}
    assert {name for name, status in call_declared.seen if status < 300} == names - {"POST /api/v1/swarmui/start"}


# ---------------------------------------------------------------- the page that SwarmUI answers ----


@pytest.mark.parametrize(
    ("wanted", "before", "words", "after"),
    [
        (PAGE, None, f"; it now answers pages of {PAGE}", PAGE),
        (PAGE, "http://a", f"; it now answers pages of {PAGE} instead of http://a", PAGE),
        ("*", "http://a", "; it now answers pages of * instead of http://a", "*"),
        (PAGE, "*", "", "*"),
        (PAGE, PAGE, "", PAGE),
        (None, "http://a", "", "http://a"),
    ],
)
def test_a_start_makes_swarmui_answer_the_configured_page(
    make_supervisor, swarmui_folder, leash, wanted, before, words, after
):
    started = ready(make_supervisor(swarmui_path=swarmui_folder(allow_origin=before), swarmui_allow_origin=wanted))
    leash.next()
    assert (started.message, started.allow_origin) == (f"SwarmUI started successfully{words}", after)


def test_a_start_also_configures_a_running_swarmui(make_supervisor, swarmui_folder, leash):
    ready(make_supervisor(swarmui_path=swarmui_folder()))
    leash.next()
    started = ready(make_supervisor(swarmui_allow_origin=PAGE))
    message = f"SwarmUI is already running; it now answers pages of {PAGE}"
    assert (started.message, started.allow_origin) == (message, PAGE)


def test_swarmui_that_ignores_the_configured_page_is_still_ready(make_supervisor, swarmui_folder, leash):
    """Its `success` proves nothing, so the header that it sends is checked."""
    started = ready(make_supervisor(swarmui_path=swarmui_folder(stubborn=True), swarmui_allow_origin=PAGE))
    leash.next()
    assert started.allow_origin is None
    assert f"still does not answer pages of {PAGE}" in started.message


@pytest.mark.parametrize(("origin", "warns"), [(PAGE, True), (TRUSTED, True), (None, False)])
def test_a_start_warns_a_page_that_swarmui_does_not_answer(make_app, swarmui_folder, leash, origin, warns):
    app = make_app(swarmui_path=swarmui_folder(), cors_origins=(PAGE,), trusted_origins=(TRUSTED,))
    answer = as_caller(app, TOKEN, origin).post("/api/v1/swarmui/start")
    leash.next()
    assert answer.json["success"] is True
    assert ("SWARMUI_ALLOW_ORIGIN" in answer.json["message"]) == warns


def test_storyarts_own_calls_work_without_a_token(start_service, nvidia_smi, swarmui_folder, leash, settings):
    """Its four calls and its probe of SwarmUI, as the page sends them; without its origin they are a 401."""
    running = start_service(
        STORYTELLER_TRUSTED_ORIGINS=PAGE,  # SwarmUI answers its pages too
        NVIDIA_SMI=nvidia_smi(GOOD, {}),
        SWARMUI_PATH=str(swarmui_folder()),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_POLL_INTERVAL="0.05",
    )
    calls = [
        ("PUT", "/api/v1/session/1738195200000", with_beats(DONE)),
        ("GET", "/api/v1/gpu/status", None),
        ("POST", "/api/v1/swarmui/start", None),
        ("GET", "/api/v1/notifications/check", None),
        ("GET", "/api/v1/session/1738195200000/prompts-status", None),
    ]
    for method, path, body in calls:
        assert running.call(method, path, body, {"Origin": PAGE})[0] == 200
        assert running.call(method, path, body, {"Origin": "http://localhost:3001"})[0] == 401
        assert running.call(method, path, body, {})[0] == 401
    leash.next()
    url = f"http://127.0.0.1:{settings.swarmui_port}/API/GetNewSession"
    probe = urllib.request.Request(url, headers={"Origin": PAGE})
    with urllib.request.urlopen(probe, timeout=PATIENCE) as seen:
        assert (seen.status, seen.headers["Access-Control-Allow-Origin"]) == (200, PAGE)


# ======================================================================================================
# Metrics and alerts
# ======================================================================================================


def parse_metrics(text: str) -> dict[str, float]:
    """The samples by name and labels. The text must follow Prometheus's format: HELP, TYPE and samples of a metric
    stand together, and each metric occurs once."""
    found: dict[str, float] = {}
    families: dict[str, str] = {}
    name = described = ""
    label = r'[a-z]+="(?:[^"\\\n]|\\[\\"n])*"'
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if comment := re.fullmatch(r"# HELP ([a-z_]+) \S.*", line):
            described = comment[1]
        elif comment := re.fullmatch(r"# TYPE ([a-z_]+) (gauge|counter|summary)", line):
            name = comment[1]
            assert name == described and name not in families
            assert (comment[2] == "counter") == name.endswith("_total")
            families[name] = comment[2]
        else:
            sample = re.fullmatch(rf"([a-z_]+)((?:\{{{label}(?:,{label})*\}})?) (-?[0-9.]+(?:e[+-]?[0-9]+)?)", line)
            assert sample, line
            assert sample[1] in ([name] if families[name] != "summary" else [f"{name}_sum", f"{name}_count"])
            assert sample[1] + sample[2] not in found
            found[sample[1] + sample[2]] = float(sample[3])
    return found


def scrape(app: webtest.TestApp) -> dict[str, float]:
    return parse_metrics(app.get("/metrics").text)


def test_metrics_report_all_parts_of_the_service(make_app, store, nvidia_smi, plant, request):
    app = make_app(store, nvidia_smi=nvidia_smi({"print": "57, 819, 8192, 45, 1\n"}, {"print": "41\n"}))
    response = app.get("/metrics")
    assert (response.content_type, response.charset) == ("text/plain", "utf-8")
    before = parse_metrics(response.text)
    pending_beats = 'storyteller_notifications_pending{type="beats_ready"}'
    assert before[pending_beats] == before["storyteller_sessions_waiting"] == 0
    assert "storyteller_notifications_oldest_timestamp_seconds" not in before
    app.put_json(f"/api/v1/session/{T}", with_beats(OPEN, DONE))
    app.put_json(f"/api/v1/session/{T + 1}", with_beats(DONE))
    app.put_json(f"/api/v1/session/{T + 2}", with_beats(OPEN, promptMode="storyart"))
    app.put_json(f"/api/v1/session/{T + 3}", with_beats())
    a_minute_ago = service.now_ms() - 60_000
    if store.name == "redis":  # where other programs write times in seconds, and acknowledge only by a marker
        for id in ("a", "b"):
            plant({"id": id, "type": BEATS, "sessionTimestamp": 1, "totalBeats": 1}, a_minute_ago / 1000)
        request.getfixturevalue("other_program").set("notifications:ack:b", 1)
    expected = {
        "nvidia_smi_utilization_gpu_ratio": 0.57, "nvidia_smi_memory_used_bytes": 819 << 20,
        "nvidia_smi_memory_total_bytes": 8192 << 20, "nvidia_smi_temperature_gpu": 45, "storyteller_gpu_up": 1,
        'storyteller_swarmui_state{state="stopped"}': 1, 'storyteller_swarmui_state{state="ready"}': 0,
        "storyteller_swarmui_launches_total": 0, "storyteller_sessions_waiting": 1, "storyteller_listeners": 0,
        'storyteller_notifications_pending{type="prompts_ready"}': 1,
        pending_beats: 1 + (store.name == "redis"),
        f'storyteller_store_up{{store="{store.name}"}}': 1, 'storyteller_alerts{kind="stuck"}': 0,
        f'storyteller_build_info{{version="{service.__version__}"}}': 1,
    }  # fmt: skip
    wait_until(lambda: expected.items() <= scrape(app).items())
    after = scrape(app)
    oldest = a_minute_ago if store.name == "redis" else service.now_ms()
    assert abs(after["storyteller_notifications_oldest_timestamp_seconds"] - oldest / 1000) < PATIENCE
    assert sum(value for name, value in after.items() if "swarmui_state" in name) == 1
    assert len([name for name in after if name.startswith("storyteller_alerts{")]) == len(service.ALERTS)


def test_a_launch_of_swarmui_is_counted_and_its_wait_is_not_part_of_request_durations(make_app, swarmui_folder, leash):
    app = make_app(swarmui_path=swarmui_folder(delay=0.3))
    began = time.monotonic()
    app.post("/api/v1/swarmui/start")
    leash.next()
    elapsed, found = time.monotonic() - began, scrape(app)
    assert found["storyteller_swarmui_launches_total"] == found['storyteller_swarmui_state{state="ready"}'] == 1
    assert found["storyteller_http_request_duration_seconds_sum"] < elapsed / 2


def test_metrics_report_the_process(make_app):
    found = scrape(make_app())
    if sys.platform != "darwin" or "process_resident_memory_bytes" in found:
        assert 10e6 < found["process_resident_memory_bytes"] < 4e9
    assert 0 < found["process_cpu_seconds_total"] <= time.process_time()
    assert 0 <= time.time() - found["process_start_time_seconds"] < PATIENCE


@pytest.mark.parametrize(
    ("gpus", "up", "known"),
    [
        pytest.param("[N/A], 11125, 81559, [N/A], 1\n", 1, {"memory_used_bytes", "memory_total_bytes"}, id="MIG"),
        pytest.param("No devices were found\n", 0, set(), id="no GPU"),
        pytest.param("GPU is lost\n", 0, set(), id="a failure"),
        pytest.param(None, 0, set(), id="no nvidia-smi"),
    ],
)
def test_gpu_values_that_are_not_known_are_absent_from_the_metrics(make_app, nvidia_smi, monkeypatch, gpus, up, known):
    monkeypatch.setattr(service.Observer, "GPU_WAIT", PATIENCE)
    found = scrape(make_app(**({"nvidia_smi": nvidia_smi({"print": gpus}, {})} if gpus else {})))
    assert found["storyteller_gpu_up"] == up
    assert {name.removeprefix("nvidia_smi_") for name in found if name.startswith("nvidia_smi_")} == known


def test_metrics_are_served_while_the_store_is_away(make_app):
    with contextlib.closing(service.RedisStore(f"redis://127.0.0.1:{free_port()}/0")) as away:
        found = scrape(make_app(away))
    assert found['storyteller_store_up{store="redis"}'] == 0
    assert not [name for name in found if "notifications" in name or "sessions" in name]
    assert found["storyteller_listeners"] == 0


def test_scrapes_that_arrive_together_share_one_snapshot(make_services, monkeypatch):
    services, snapshots, may_go_on = make_services(), [], threading.Event()
    app = as_caller(webtest.TestApp(service.create_app(services)), TOKEN)
    take_snapshot = service.Observer.scrape

    def take_late_snapshot(observer: service.Observer) -> Any:
        snapshots.append(1)
        assert may_go_on.wait(PATIENCE)
        return take_snapshot(observer)

    monkeypatch.setattr(service.Observer, "scrape", take_late_snapshot)
    with ThreadPoolExecutor(8) as pool:
        try:
            scrapes = [pool.submit(app.get, "/metrics", status=200)]
            wait_until(lambda: snapshots)
            scrapes += [pool.submit(app.get, "/metrics", status=200) for _ in range(7)]
            wait_until(lambda: services.scrapes._queue.qsize() == 7)
        finally:
            may_go_on.set()
    assert not any(scraped.exception() for scraped in scrapes) and len(snapshots) == 2


def test_a_scrape_does_not_wait_for_a_slow_nvidia_smi(make_app, nvidia_smi, tmp_path, monkeypatch):
    monkeypatch.setattr(service.Observer, "GPU_WAIT", 0.05)
    app = make_app(nvidia_smi=nvidia_smi({**GOOD, "after": str(tmp_path / "go")}, {}), nvidia_smi_timeout=PATIENCE)
    assert "storyteller_gpu_up" not in scrape(app)
    (tmp_path / "go").touch()
    wait_until(lambda: scrape(app).get("storyteller_gpu_up"))


@pytest.mark.parametrize(
    ("setting", "environ", "status"),
    [
        pytest.param("token", {}, 401, id="no token"),
        pytest.param("token", {"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}, 200, id="the API token"),
        pytest.param("OPEN", {}, 200, id="open"),
        pytest.param("open", {"REMOTE_ADDR": "::1"}, 200, id="open, IPv6"),
        pytest.param("open", {"REMOTE_ADDR": "192.168.0.9"}, 401, id="open, another PC"),
        pytest.param("open", {"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, 401, id="open, a proxy"),
        pytest.param("open", {"HTTP_AUTHORIZATION": "Bearer wrong"}, 401, id="open, a wrong token"),
        pytest.param("open", {"HTTP_HOST": "evil.example"}, 421, id="open, rebound"),
    ],
)
def test_only_metrics_can_be_open_and_only_to_this_pc(make_app, setting, environ, status):
    app = webtest.TestApp(make_app(metrics=setting).app, extra_environ={"REMOTE_ADDR": "127.0.0.1", **environ})
    app.get("/metrics", status=status)
    if (setting, status) != ("token", 200):
        for method, path in (("GET", "/api/v1/gpu/status"), ("GET", "/api/v1/session/list"), ("POST", "/metrics")):
            app.request(path, method=method, status=[401, 421])


def test_responses_are_counted_by_method_route_template_and_status(make_app):
    app = make_app()
    for path in (f"/api/v1/session/{T}", f"/api/v1/session/{T + 1}", "/api/v1/session/x", "/x", "/y/z"):
        app.get(path, expect_errors=True)
    app.head("/health")
    app.post("/health", expect_errors=True)
    app.request("/health", method="PATCH", expect_errors=True)
    found = scrape(app)
    labels = [
        'method="GET",route="/api/v1/session/{timestamp}",status="404"',
        'method="GET",route="/api/v1/session/{timestamp}",status="400"', 'method="GET",route="other",status="404"',
        'method="HEAD",route="/health",status="200"', 'method="POST",route="/health",status="405"',
        'method="other",route="/health",status="405"',
    ]  # fmt: skip
    counted = {name: value for name, value in found.items() if name.startswith("storyteller_http_requests_total")}
    assert counted == {f"storyteller_http_requests_total{{{label}}}": 2 if "404" in label else 1 for label in labels}
    assert found["storyteller_http_request_duration_seconds_count"] == 8
    assert 0 < found["storyteller_http_request_duration_seconds_sum"] < PATIENCE


def test_a_wait_for_the_gpu_is_not_part_of_request_durations(make_app):
    app = make_app()
    first = app.post_json(RESERVATION, {"holder": "a", "ttlSeconds": 60}).json["reservationId"]
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(app.post_json, RESERVATION, {"holder": "b", "ttlSeconds": 60, "waitSeconds": 60})
        time.sleep(0.4)
        app.delete(f"{RESERVATION}/{first}")
        assert second.result(PATIENCE).status_int == 201
    assert scrape(app)["storyteller_http_request_duration_seconds_sum"] < (time.monotonic() - began) / 2


# -------------------------------------------------------------------------------------- snapshots ----


class ObserverRig:
    """An Observer and Alerts on a store. The test sets the status of the GPU and both clocks."""

    def __init__(self, services: service.Services, clock: Clock, wall: Clock, make_monitor: Any) -> None:
        self.runs, self.status, self.clock, self.wall, self.is_watched = 0, service.GpuStatus(True), clock, wall, False
        monitor = make_monitor(self._query, 0.0, clock)
        self.asked: list[Any] = []
        ask, monitor.ask = monitor.ask, lambda: self.asked.append(ask()) or self.asked[-1]
        self.observer = service.Observer(
            services.settings, services.store, monitor, services.swarmui, services.sessions, services.notifications,
            lambda type: int(type != "gpu" or self.is_watched), clock, wall,
        )  # fmt: skip
        self.alerts = service.Alerts(services.settings, self.observer, lambda *event: None, clock)

    def _query(self, running: set[service.Program]) -> service.GpuStatus:
        self.runs += 1
        return self.status

    def runs_in(self, seconds: int) -> int:
        """How often nvidia-smi ran in these seconds, with a look whenever the next one is due."""
        before, end = self.runs, self.clock.now + seconds
        while self.clock.now < end:
            pause = self.alerts.look()
            concurrent.futures.wait([asked for asked in self.asked if isinstance(asked, Future)], PATIENCE)
            self.clock.now += pause
        return self.runs - before


@pytest.fixture
def rig(make_services, store, make_monitor) -> ObserverRig:
    return ObserverRig(make_services(store), Clock(1000.0), Clock(T + 3_600_000), make_monitor)


def test_nvidia_smi_runs_every_5_s_while_watched_scraped_or_in_trouble_and_once_a_minute_otherwise(rig):
    assert rig.runs_in(1) == 1  # at the start
    assert rig.runs_in(120) == 2
    rig.is_watched = True
    assert rig.runs_in(60) == 12
    rig.is_watched = False
    assert rig.runs_in(60) == 1
    rig.observer.scrape()
    assert 5 <= rig.runs_in(29) <= 6
    assert rig.runs_in(60) <= 2
    for trouble, status in (
        (True, service.GpuStatus(True, temperature=91)), (True, service.GpuStatus(failed=True)),
        (False, service.GpuStatus(True, temperature=90)), (False, service.GpuStatus(failed=True, is_missing=True)),
    ):  # fmt: skip
        rig.status = status
        rig.runs_in(60)  # until the change is noticed
        assert rig.runs_in(60) == (12 if trouble else 1)


def test_the_gpu_history_has_a_status_every_5_s_of_the_last_15_minutes(make_monitor, monkeypatch):
    wall, use = Clock(T), itertools.count()
    monkeypatch.setattr(service, "now_ms", wall)
    monitor = make_monitor(lambda _: service.GpuStatus(True, utilization=next(use)), 0.0)
    for _ in range(1000):
        status_of(monitor)
        wall.now += 2500
    found = monitor.history(wall.now)
    assert len(found) == len(monitor.history(T)) == 180  # older ones are not kept
    assert [at for at, _ in found] == sorted({at for at, _ in found})
    assert (found[-1][1].utilization, found[0][0] > wall.now - 900_000) == (999, True)
    wall.now += 600_000
    assert len(monitor.history(wall.now)) == 60


def test_the_gpu_history_ends_with_the_newest_status_after_the_clock_was_set_back(make_monitor, monkeypatch):
    wall, use = Clock(T), itertools.count()
    monkeypatch.setattr(service, "now_ms", wall)
    monitor = make_monitor(lambda _: service.GpuStatus(True, utilization=next(use)), 0.0)
    for change in (5000, 5000, 5000, -8000, 0):
        status_of(monitor)
        wall.now += change
    assert [(at - T, status.utilization) for at, status in monitor.history(wall.now)] == [(0, 0), (7000, 4)]


def test_a_session_waits_since_its_last_new_prompt(rig, store):
    def save(at: int, *beats: dict[str, Any], **fields: Any) -> None:
        store.save(at, service.Change(json.dumps(with_beats(*beats, **fields)).encode()))

    def waiting() -> dict[int, int]:
        rig.clock.now += 100
        return {session.timestamp: session.since for session in rig.observer.look(0.0).waiting}

    minute = 60_000
    save(T, OPEN, OPEN)
    saved = store._clock()
    rig.wall.now = saved + minute
    assert waiting() == {T: saved}  # at the first look, as after a restart, it is as old as it says
    rig.wall.now += minute
    save(T, OPEN, OPEN, scriptText="edited")
    save(T + 1, OPEN)
    assert waiting() == {T: saved, T + 1: rig.wall.now}
    rig.wall.now += minute
    save(T, OPEN, DONE)
    assert waiting()[T] == rig.wall.now
    save(T, DONE, DONE)
    assert list(waiting()) == [T + 1]


def test_an_alert_of_what_the_store_has_is_raised_within_5_s_and_ends_within_1_s(rig, store):
    rig.alerts.look()
    id = json.loads(add(store, draft())[0])["id"]
    rig.wall.now, rig.clock.now = store._clock() + 30 * 60_000, rig.clock.now + 5
    rig.alerts.look()
    assert list(rig.alerts.raised) == ["unacknowledged"]
    acknowledge(store, id)
    rig.clock.now += 1
    rig.alerts.look()
    assert list(rig.alerts.raised) == []


def test_a_snapshot_reads_only_changed_sessions_and_new_notifications(rig, store, monkeypatch):
    for number in range(3):
        store.save(T + number, service.Change(json.dumps(with_beats(OPEN)).encode()))
        add(store, draft(session=T + number))
    assert len(rig.observer.look(0.0).pending) == 3
    read_sessions, read = store.read_sessions, []
    monkeypatch.setattr(store, "read_sessions", lambda wanted: read.extend(wanted) or read_sessions(wanted))
    monkeypatch.setattr(store, "pending", None)
    store.save(T + 1, service.Change(json.dumps(with_beats(OPEN, DONE)).encode()))
    added = json.loads(add(store, draft(session=T + 9))[0])
    situation = rig.observer.look(0.0)
    assert (read, len(situation.waiting)) == ([T + 1], 3)
    assert [found.episode for found in situation.pending if found.id == added["id"]] == [added["episodeNumber"]]


def test_a_snapshot_keeps_no_other_programs_members_in_memory(rig, store, plant):
    for number in range(20):
        plant({**MEMBER, "id": f"n{number}", "more": "x" * 1_000_000}, store._clock() - number)
    tracemalloc.start()
    try:
        assert len(rig.observer.look(0.0).pending) == 20
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("uuid", ["\ud83d", r'"a" \\'])
def test_a_first_snapshot_has_the_episode_of_a_notification_whatever_characters_its_story_contains(rig, store, uuid):
    add(store, service.Draft(PROMPTS, T, {"storyUuid": uuid, "episodeNumber": 7, "totalPrompts": 1}))
    assert [found.episode for found in rig.observer.look(0.0).pending] == [7]


# ------------------------------------------------------------------------------------- conditions ----


def pending_since(*minutes: float) -> list[service.Notification]:
    times = enumerate(T - int(age * 60_000) for age in minutes)
    return [service.Notification(f"x-{n}", PROMPTS, b"", True, "", T + n, 2, since) for n, since in times]


def waiting_since(*minutes: float) -> list[service.WaitingSession]:
    return [service.WaitingSession(T + n, 12, T - int(age * 60_000), "The end") for n, age in enumerate(minutes)]


def gpu_at(temperature: float, **fields: Any) -> dict[str, Any]:
    return {"gpu": service.GpuStatus(True, temperature=temperature, **fields)}


FAILING = {"gpu": service.GpuStatus(failed=True, error="GPU is lost")}


@pytest.mark.parametrize(
    ("situation", "changed", "kind", "words"),
    [
        pytest.param({}, {}, "gpu_hot", None, id="GPU unknown"),
        pytest.param(gpu_at(90), {}, "gpu_hot", "", id="GPU at the limit"),
        pytest.param(gpu_at(91), {}, "gpu_hot", "at 91 °C, above 90", id="GPU above the limit"),
        pytest.param(gpu_at(91), {"alert_gpu_temperature": 0}, "gpu_hot", "", id="no limit of the temperature"),
        pytest.param(FAILING, {}, "gpu_hot", None, id="temperature of a failing GPU"),
        pytest.param(gpu_at(0, unknown=("temperature",)), {}, "gpu_hot", None, id="temperature unknown"),
        pytest.param(FAILING, {}, "gpu_failing", "GPU is lost", id="GPU failing"),
        pytest.param(
            {"gpu": service.GpuStatus(failed=True, is_missing=True)}, {}, "gpu_failing", "", id="no nvidia-smi",
        ),
        pytest.param({"gpu": service.GpuStatus(error="none")}, {}, "gpu_failing", "", id="no GPU"),
        pytest.param({"fault": "Redis is away."}, {}, "store", "Redis is away.", id="store down"),
        pytest.param({}, {}, "store", "", id="store up"),
        pytest.param({"swarmui": {"state": "failed", "lastError": "exited"}}, {}, "swarmui", "exited", id="failed"),
        pytest.param({"swarmui": {"state": "starting", "lastError": "x"}}, {}, "swarmui", "", id="starting"),
        pytest.param({"free": 999_999_999}, {}, "disk", "1.00 GB are free", id="disk below the limit"),
        pytest.param({"free": 1_000_000_000}, {}, "disk", "", id="disk at the limit"),
        pytest.param({"free": 0}, {"alert_disk": 0}, "disk", "", id="no limit of the disk"),
        pytest.param({}, {}, "disk", None, id="disk unknown"),
        pytest.param({}, {}, "unacknowledged", None, id="notifications unknown"),
        pytest.param({"pending": pending_since(29.9, 1441)}, {}, "unacknowledged", "", id="too new and too old"),
        pytest.param(
            {"pending": pending_since(30, 1440, 5)}, {}, "unacknowledged",
            f"2 notifications not acknowledged for 30 min: prompts_ready of session {T} (episode 2), prompts_ready "
            f"of session {T + 1} (episode 2).", id="two notifications",
        ),
        pytest.param(
            {"pending": pending_since(*[40] * 8)}, {}, "unacknowledged", f"session {T + 4} (episode 2) and 3 more.",
            id="many notifications",
        ),
        pytest.param(
            {"pending": pending_since(0.5)}, {"alert_unacknowledged": 0.25}, "unacknowledged",
            "1 notification not acknowledged for 0.25 min", id="a fraction of a minute",
        ),
        pytest.param(
            {"pending": pending_since(40)}, {"alert_unacknowledged": 0}, "unacknowledged", "", id="no limit of age",
        ),
        pytest.param({}, {}, "stuck", None, id="sessions unknown"),
        pytest.param(
            {"waiting": waiting_since(31, 29, 1441)}, {}, "stuck",
            f"1 session without a new prompt for 30 min: {T} (The end, 12 prompts).", id="a stuck session",
        ),
        pytest.param({"waiting": waiting_since(31)}, {"alert_stuck": 0}, "stuck", "", id="no limit of waiting"),
    ],
)  # fmt: skip
def test_a_condition_says_what_is_wrong_or_nothing_or_that_it_is_unknown(settings, situation, changed, kind, words):
    found = service.find_conditions(service.Situation(**situation), dataclasses.replace(settings, **changed), T)
    assert found.keys() == service.ALERTS.keys()
    assert found[kind] == words if not words else words in found[kind]


class AlertsRig:
    """Alerts of the situations and clocks that the test sets; an Observer to them."""

    def __init__(self, settings: service.Settings) -> None:
        self.situation, self.clock, self.wall, self.events = service.Situation(), Clock(50.0), Clock(T), []
        self.alerts = service.Alerts(settings, self, lambda _, alert: self.events.append(alert), self.clock)

    def watch_gpu(self, *, is_bad: bool) -> float:
        return math.inf

    def look(self, *ages: float) -> service.Situation:
        return self.situation

    def events_in(self, seconds: int, **situation: Any) -> list[tuple[str, str]]:
        """The kinds and states of the events in these seconds of a situation, with a look in each."""
        self.situation, self.events[:] = service.Situation(**situation), []
        for _ in range(seconds):
            self.alerts.look()
            self.clock.now += 1
            self.wall.now += 1000
        return [(alert["kind"], alert["state"]) for alert in self.events]


@pytest.fixture
def alerts_rig(settings: service.Settings) -> AlertsRig:
    return AlertsRig(settings)


def test_an_alert_lasted_0_s_if_the_clock_was_set_back_before_it_ended(alerts_rig):
    alerts_rig.events_in(1, free=5)
    alerts_rig.wall.now -= 3_600_000
    alerts_rig.events_in(1, free=10**12)
    assert alerts_rig.events[0]["text"].startswith("Over after 0 s: ")


@pytest.mark.parametrize(
    ("kind", "bad", "good"),
    [
        ("gpu_hot", gpu_at(95), gpu_at(60)),
        ("gpu_failing", FAILING, gpu_at(60)),
        ("store", {"fault": "Redis is away."}, {}),
    ],
)
def test_a_transient_condition_raises_and_ends_its_alert_after_a_minute(alerts_rig, caplog, kind, bad, good):
    assert alerts_rig.events_in(60, **bad) == []
    assert alerts_rig.events_in(1, **good) == []
    assert alerts_rig.events_in(60, **bad) == []  # counted anew
    began = alerts_rig.wall.now - 60_000
    assert alerts_rig.events_in(100, **bad) == [(kind, "raised")]
    (event,) = alerts_rig.events
    assert (event["since"], event["until"]) == (service.iso_time(began), None)
    assert list(alerts_rig.alerts.raised) == [kind]
    ended = alerts_rig.wall.now
    assert alerts_rig.events_in(60, **good) == []
    assert alerts_rig.events_in(100, **good) == [(kind, "ended")]
    (event,) = alerts_rig.events
    assert (event["since"], event["until"]) == (service.iso_time(began), service.iso_time(ended))
    assert event["text"].startswith("Over after 3 min: ") and alerts_rig.alerts.raised == {}
    assert re.findall(r"alerts: (\S+ \S+): .", caplog.text) == [f"{kind} raised", f"{kind} ended"]


@pytest.mark.parametrize(
    ("kind", "bad", "good"),
    [
        ("swarmui", {"swarmui": {"state": "failed", "lastError": "dead"}}, {}),
        ("disk", {"free": 5}, {"free": 10**12}),
        ("unacknowledged", {"pending": pending_since(40)}, {"pending": []}),
        ("stuck", {"waiting": waiting_since(40)}, {"waiting": []}),
    ],
)
def test_any_other_condition_raises_and_ends_its_alert_at_once(alerts_rig, kind, bad, good):
    assert alerts_rig.events_in(5, **bad) == [(kind, "raised")]
    assert alerts_rig.events_in(5, **good) == [(kind, "ended")]


def test_a_transient_condition_has_not_lasted_while_the_pc_slept(alerts_rig):
    assert alerts_rig.events_in(2, fault="Redis is away.") == []
    alerts_rig.clock.now += 8 * 3600
    alerts_rig.wall.now += 8 * 3_600_000
    assert alerts_rig.events_in(60, fault="Redis is away.") == []
    assert alerts_rig.events_in(1, fault="Redis is away.") == [("store", "raised")]


def test_an_unknown_condition_neither_raises_nor_ends_an_alert(alerts_rig):
    assert alerts_rig.events_in(3, pending=pending_since(40)) == [("unacknowledged", "raised")]
    assert alerts_rig.events_in(100) == []
    assert alerts_rig.events_in(3, pending=pending_since(40)) == []
    assert alerts_rig.events_in(3, pending=[]) == [("unacknowledged", "ended")]


def test_a_raised_alert_shows_the_current_text_and_is_not_raised_again(alerts_rig):
    alerts_rig.events_in(1, pending=pending_since(40))
    assert alerts_rig.events_in(1, pending=pending_since(40, 40)) == []
    assert alerts_rig.alerts.shown()[0]["text"].startswith("2 notifications")


def test_the_last_3_ended_alerts_are_shown(alerts_rig):
    for free in (5, 10**12) * 5:
        alerts_rig.events_in(1, free=free)
    alerts_rig.events_in(1, pending=pending_since(40))
    states = [(alert["kind"], alert["state"]) for alert in alerts_rig.alerts.shown()]
    assert states == [("unacknowledged", "raised"), *[("disk", "ended")] * 3]


def test_metrics_contain_an_alert_while_it_is_raised(make_services, store, monkeypatch):
    monkeypatch.setattr(service.Alerts, "INTERVAL", 0.05)
    services = make_services(store, alert_unacknowledged=0.001)
    app = as_caller(webtest.TestApp(service.create_app(services)), TOKEN)
    services.start()
    id = make_pending(app)
    name = 'storyteller_alerts{kind="unacknowledged"}'
    wait_until(lambda: scrape(app)[name] == 1)
    app.post(f"/api/v1/notifications/{id}/ack")
    wait_until(lambda: scrape(app)[name] == 0)


# -------------------------------------------------------------------------------------- webhooks ----


@pytest.mark.parametrize(
    ("url", "setting", "format"),
    [
        ("https://ntfy.sh/topic", None, "ntfy"),
        ("https://ntfy.example.org/topic", None, "ntfy"),
        ("http://ntfy:8080/topic", None, "ntfy"),
        ("https://discord.com/api/webhooks/1/x", None, "discord"),
        ("https://canary.discord.com/api/webhooks/1/x", None, "discord"),
        ("https://hooks.slack.com/services/x", None, "slack"),
        ("https://notdiscord.com/x", None, "json"),
        ("http://127.0.0.1:9/discord.com", None, "json"),
        ("http://127.0.0.1:9/x", "Slack", "slack"),
        ("https://ntfy.sh/topic", "json", "json"),
    ],
)
def test_the_host_determines_the_format_of_alerts_unless_it_is_set(url, setting, format):
    assert service.format_of(url, setting) == format


@pytest.mark.parametrize(
    ("format", "text", "body"),
    [
        ("discord", "@everyone & <x> °", {"content": "@everyone & <x> °", "allowed_mentions": {"parse": []}}),
        ("discord", "x" * 3000, {"content": "x" * 2000, "allowed_mentions": {"parse": []}}),
        ("slack", "<!channel> & °", {"text": "&lt;!channel&gt; &amp; °"}),
        (
            "json", "<x> & °",
            {"kind": "disk", "state": "raised", "text": "<x> & °", "since": "2025-01-30T00:00:00Z", "until": None},
        ),
    ],
)  # fmt: skip
def test_an_alert_has_the_shape_of_its_format(format, text, body):
    data, headers = service.shape_alert(service.Alert("disk", "raised", text, T), format)
    assert (json.loads(data), headers) == (body, {"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("state", "priority", "tags"), [("raised", "high", "warning"), ("ended", "default", "white_check_mark")]
)
def test_ntfy_gets_the_text_as_body_and_headers_in_ascii(state, priority, tags):
    body, headers = service.shape_alert(service.Alert("gpu_hot", state, "95 °C", T), "ntfy")
    assert body.decode() == "95 °C"
    assert {name: headers[name] for name in ("Title", "Priority", "Tags")} == {
        "Title": f"StoryTeller: gpu_hot {state}", "Priority": priority, "Tags": tags,
    }  # fmt: skip
    assert all(value.isascii() for value in headers.values())


class Receiver:
    """A server for alerts and heartbeats. It responds with the statuses given, then with 200; nothing while paused."""

    def __init__(self, *statuses: int) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.resumed = threading.Event()
        self.resumed.set()
        left, receiver = list(statuses), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                receiver.requests.append((self.command, self.path, body))
                receiver.resumed.wait(PATIENCE)
                is_named = "StoryTeller/" in self.headers.get("User-Agent", "")  # Discord refuses Python's own
                self.send_response(left.pop(0) if left else 200 if is_named else 403)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-topic?key=secret"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def make_receiver() -> Iterator[Callable[..., Receiver]]:
    with contextlib.ExitStack() as stack:
        yield lambda *statuses: stack.enter_context(contextlib.closing(Receiver(*statuses)))


@contextlib.contextmanager
def running(alerts: service.Alerts) -> Iterator[None]:
    """Run its loops."""
    for loop in alerts.loops:
        loop.start()
    try:
        yield
    finally:
        for loop in alerts.loops:
            loop.close()


def test_alerts_are_posted_in_order_with_three_tries_each(settings, make_receiver, monkeypatch, caplog):
    monkeypatch.setattr(service.Alerts, "RETRY", 0.01)
    monkeypatch.setattr(service.Alerts, "INTERVAL", 3600.0)
    receiver = make_receiver(500, 302, 200, 500, 500, 404)
    alerts_rig = AlertsRig(dataclasses.replace(settings, alert_url=receiver.url))
    with running(alerts_rig.alerts):
        for free in (5, 10**12, 5):
            alerts_rig.events_in(1, free=free)
        wait_until(lambda: len(receiver.requests) == 7)
    states = [json.loads(body)["state"] for _, _, body in receiver.requests]
    assert states == ["raised"] * 3 + ["ended"] * 3 + ["raised"]
    assert {path for _, path, _ in receiver.requests} == {"/secret-topic?key=secret"}  # no redirect was followed
    assert "disk was not delivered to STORYTELLER_ALERT_URL: 404 Not Found" in caplog.text
    assert "secret" not in caplog.text


def test_a_silent_webhook_delays_nothing_and_at_most_100_alerts_wait(settings, make_receiver, monkeypatch):
    monkeypatch.setattr(service, "WEBHOOK_TIMEOUT", 2 * PATIENCE)
    receiver = make_receiver()
    receiver.resumed.clear()
    alerts_rig = AlertsRig(dataclasses.replace(settings, alert_url=receiver.url))
    with running(alerts_rig.alerts):
        for free in (5, 10**12) * 100 + (5,):
            assert alerts_rig.events_in(1, free=free) and len(receiver.requests) <= 1
        receiver.resumed.set()
        wait_until(lambda: len(receiver.requests) == 100)
        alerts_rig.events_in(1, free=10**12)
        wait_until(lambda: len(receiver.requests) == 101)
    assert [json.loads(body)["state"] for _, _, body in receiver.requests[98:]] == ["raised", "ended", "ended"]


def test_a_failure_and_a_recovery_of_heartbeats_are_logged_once(settings, make_receiver, monkeypatch, caplog):
    monkeypatch.setattr(service.Alerts, "HEARTBEAT", 0.02)
    receiver = make_receiver(200, 500, 500, 500)
    with running(AlertsRig(dataclasses.replace(settings, heartbeat_url=receiver.url)).alerts):
        wait_until(lambda: len(receiver.requests) > 6)
    assert {(method, path) for method, path, _ in receiver.requests} == {("GET", "/secret-topic?key=secret")}
    assert re.findall("heartbeat to .*: (.*)", caplog.text) == ["500 Internal Server Error", "200 OK"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("status", "code", "printed"), [(200, 0, "200 OK"), (403, 1, "403 Forbidden"), (302, 1, "302 Found")]
)
def test_the_alert_command_posts_a_test_and_prints_the_status(run_module, make_receiver, status, code, printed):
    receiver = make_receiver(status)
    done = run_module("alert", STORYTELLER_ALERT_URL=receiver.url, STORYTELLER_ALERT_FORMAT="slack")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, printed, "")
    ((method, _, body),) = receiver.requests
    assert (method, "test" in json.loads(body)["text"]) == ("POST", True)


def test_the_alert_command_fails_if_nothing_listens_or_no_url_is_set(run_module):
    done = run_module("alert", STORYTELLER_ALERT_URL=f"http://127.0.0.1:{free_port()}/secret")
    assert (done.returncode, done.stdout.strip()) == (1, "no answer (nothing listens there)")
    done = run_module("alert")
    assert (done.returncode, done.stdout) == (2, "")
    assert "set STORYTELLER_ALERT_URL" in done.stderr


def test_the_alert_command_says_that_a_certificate_is_not_trusted(run_module, make_receiver, certificate):
    receiver, context = make_receiver(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate("localhost"))
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    done = run_module("alert", STORYTELLER_ALERT_URL=f"https://localhost:{receiver.server.server_port}/secret")
    assert (done.returncode, done.stdout.strip()) == (1, "no answer (its TLS certificate is not trusted)")


def test_the_service_posts_alerts_and_heartbeats_from_its_start(start_service, make_receiver):
    alerts, heartbeats = make_receiver(), make_receiver()
    made = start_service(
        STORYTELLER_ALERT_URL=alerts.url, STORYTELLER_HEARTBEAT_URL=heartbeats.url, STORYTELLER_ALERT_DISK="86400"
    )
    wait_until(lambda: alerts.requests and heartbeats.requests)
    assert json.loads(alerts.requests[0][2])["kind"] == "disk"
    log_text = (made.folder / "data" / "storyteller.log").read_text("utf-8")
    assert "alerts: disk raised: " in log_text and "secret" not in log_text


# ======================================================================================================
# The bridge
# ======================================================================================================

# ------------------------------------------------------------------------------ merging two copies ----


def story(words: str, *prompts: Any, **fields: Any) -> dict[str, Any]:
    """A session with the text `words` and a beat for each prompt; None for a beat without one."""
    beats: list[dict[str, Any]] = [{"beatId": f"b{number}", "visual": words} for number in range(len(prompts))]
    for beat, prompt in zip(beats, prompts):
        beat.update({} if prompt is None else {"prompts": {"cinematic": prompt}})
    texts = {"timestamp": T, "scriptText": words, "episodeContext": "{}", "storyUuid": "u-1"}
    episode = {"episodeNumber": 2, "scenes": [{"beats": beats}]}
    return {**texts, "promptMode": "storyswarm", "analyzedEpisode": episode, **fields}


def spoken(words: str, *prompts: Any, **fields: Any) -> dict[str, Any]:
    """The same in StoryArt's dialect."""
    return story(words, *[{"prompt": text} if isinstance(text, str) else text for text in prompts], **fields)


def in_a_beat(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The document with these fields in its first beat."""
    document["analyzedEpisode"]["scenes"][0]["beats"][0] |= fields
    return document


def to_bytes(document: Any) -> bytes | None:
    return document if document is None or isinstance(document, bytes) else json.dumps(document).encode()


def copies_of(now: Any, before: Any = None, *, by_storyart: bool = False) -> service.Copies:
    """StorySwarm's copy and StoryArt's `now`, and `before`, when they were last in step; None if they never were."""
    synced = [service.fingerprint_of(to_bytes(copy)) for copy in before] if before else ["", ""]
    swarm, art = map(to_bytes, now)
    return service.Copies(T, swarm, art, (synced[0], synced[1]), by_storyart)


def copies_after(change: service.Change, now: Any) -> list[Any]:
    """Both copies after a change, which must write exactly those that it changes."""
    written = [change.storyswarm, change.storyart]
    after = [json.loads(new or to_bytes(old) or b"null") for new, old in zip(written, now)]
    assert [new is not None for new in written] == [new != old for new, old in zip(after, now)]
    return after


def both(words: str, *prompts: Any, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """StorySwarm's copy and StoryArt's of one session."""
    return story(words, *prompts, **fields), spoken(words, *prompts, **fields)


FLUX = {"prompt": "a", "model": "flux", "steps": 20}
IN_STEP = both("w", "a", None)

# Both copies when they were last in step, now, and afterwards.
CASES: dict[str, tuple[Any, Any, Any]] = {
    "StoryArt made a session": (None, (None, spoken("w", "a")), (spoken("w", "a"), spoken("w", "a"))),
    "StorySwarm made a session": (None, (story("w", "a"), None), both("w", "a")),
    "never in step": (None, (story("read", "b", "c"), spoken("edited", "d", None)), both("edited", "d", "c")),
    "both changed": (IN_STEP, (story("read", "b", "c"), spoken("edited", "d", None)), both("edited", "d", "c")),
    "StoryArt changed the text": (IN_STEP, (IN_STEP[0], spoken("edited", "a", None)), both("edited", "a", None)),
    "StoryArt changed a prompt": (IN_STEP, (IN_STEP[0], spoken("w", "b", None)), both("w", "b", None)),
    "StoryArt saved without prompts": (IN_STEP, (IN_STEP[0], story("edited", None, None)), both("edited", "a", None)),
    "StoryArt removed a beat": (IN_STEP, (IN_STEP[0], spoken("w", "a")), both("w", "a")),
    "StoryArt removed a field": (both("w", mood="dark"), (story("w", mood="dark"), story("w")), both("w")),
    "StorySwarm changed everything": (IN_STEP, (story("new", "b", seed=5), IN_STEP[1]), both("new", "b", seed=5)),
    "StorySwarm changed a prompt that has a model": (
        both("w", FLUX), (story("w", "b"), story("w", FLUX)), (story("w", "b"), story("w", {**FLUX, "prompt": "b"})),
    ),
    "StorySwarm's copy is gone": (IN_STEP, (None, IN_STEP[1]), (None, IN_STEP[1])),
    "StoryArt's copy is gone": (IN_STEP, (IN_STEP[0], None), (IN_STEP[0], None)),
    "both copies are gone": (IN_STEP, (None, None), (None, None)),
    "StorySwarm's copy was gone": ((None, IN_STEP[1]), (None, story("new")), both("new")),
    "StoryArt's copy was gone": ((IN_STEP[0], None), (story("new"), None), both("new")),
    "StorySwarm's copy is gone, StoryArt's changed": (IN_STEP, (None, story("new")), both("new")),
    "StoryArt's copy is gone, StorySwarm's changed": (IN_STEP, (story("new", "b"), None), both("new", "b")),
}  # fmt: skip
CASES_BY_STORYART: dict[str, tuple[Any, Any, Any]] = {
    "the text stays; prompts, missing fields and times are added": (
        both("w", None, None, lastUpdated=3), (
            story("read", "a", "b", lastUpdated=5, updatedAt="t", mood="dark"), story("w", None, None, lastUpdated=3),
        ), both("w", "a", "b", lastUpdated=5, updatedAt="t", mood="dark"),
    ),
    "StorySwarm's prompt wins": (IN_STEP, (story("w", "b", None), IN_STEP[1]), both("w", "b", None)),
    "a beat that StoryArt's copy lacks is not added": (IN_STEP, (story("w", "a", None, "c"), IN_STEP[1]), IN_STEP),
    "a missing prompt does not delete StoryArt's": (
        IN_STEP, (story("w", None, "b"), IN_STEP[1]), (story("w", {"prompt": "a"}, "b"), spoken("w", "a", "b")),
    ),
    "a blank prompt does not replace StoryArt's": (IN_STEP, (story("w", " ", None), IN_STEP[1]), IN_STEP),
    "a new prompt keeps StoryArt's model": (
        both("w", FLUX), (story("w", "b"), story("w", FLUX)), (story("w", "b"), story("w", {**FLUX, "prompt": "b"})),
    ),
    "a prompt that is an object replaces StoryArt's whole": (
        both("w", FLUX), (story("w", {"prompt": "b", "seed": 1}), story("w", FLUX)),
        both("w", {"prompt": "b", "seed": 1}),
    ),
    "a field emptied in StoryArt stays empty": (
        both("w", None, mood=""), (story("w", "a", mood="dark"), story("w", None, mood="")), both("w", "a", mood=""),
    ),
    "missing fields of a beat are added": (
        (in_a_beat(story("w", None), mood=None), in_a_beat(story("w", None), mood=None)),
        (in_a_beat(story("read", "a"), mood="dark", seed=1), in_a_beat(story("w", None), mood=None)),
        (in_a_beat(story("w", "a"), mood="dark", seed=1), in_a_beat(spoken("w", "a"), mood="dark", seed=1)),
    ),
    "StorySwarm's copy keeps its dialect": (
        both("w", None, storyUuid=""),
        (story("w", "a", storyUuid=None, timestamp=None), story("w", None, storyUuid="")),
        (story("w", "a", storyUuid=None, timestamp=None), spoken("w", "a", storyUuid="")),
    ),
    "a text field that StoryArt left empty is filled": (
        both("w", None, storyUuid=""), (story("w", "a"), story("w", None, storyUuid="")), both("w", "a"),
    ),
    "an episode that StoryArt lacked is added": (
        (None, story("w", analyzedEpisode=None)), (story("read", "a"), story("w", analyzedEpisode=None)),
        ({**story("read", "a"), "scriptText": "w"}, {**spoken("read", "a"), "scriptText": "w"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "before, now, after, by_storyart",
    [
        *(pytest.param(*case, False, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, True, id=f"StoryArt wrote it: {name}") for name, case in CASES_BY_STORYART.items()),
    ],
)
def test_two_copies_are_brought_in_step(before, now, after, by_storyart):
    change = service.decide(copies_of(now, before, by_storyart=by_storyart))
    assert copies_after(change, now) == list(after)
    assert service.decide(copies_of(after, after)) is None


def test_a_session_that_never_had_a_copy_needs_no_change():
    assert service.decide(copies_of((None, None))) is None


@pytest.mark.parametrize(
    "before, now, by_storyart, found",
    [
        pytest.param(None, (None, story("w")), False, True, id="StoryArt made it"),
        pytest.param(None, (story("w"), None), False, False, id="StorySwarm made it"),
        pytest.param(IN_STEP, (IN_STEP[0], spoken("new", "a", None)), False, True, id="StoryArt changed it"),
        pytest.param(IN_STEP, (story("new"), IN_STEP[1]), True, True, id="StoryArt wrote it before"),
    ],
)
def test_a_change_records_whether_storyart_ever_wrote_the_session(before, now, by_storyart, found):
    assert service.decide(copies_of(now, before, by_storyart=by_storyart)).by_storyart is found


@pytest.mark.parametrize(
    "now, latest, after",
    [
        pytest.param(IN_STEP, story("w", None, "c"), both("w", None, "c"), id="it replaces an unchanged copy"),
        pytest.param((b"junk", IN_STEP[1]), story("w", "c"), both("w", "c"), id="it replaces an unreadable copy"),
        pytest.param((None, IN_STEP[1]), story("w", "c"), both("w", "c"), id="it replaces a copy that is gone"),
        pytest.param(
            (story("w", "b", None), IN_STEP[1]), story("w", None, "c"), both("w", "b", "c"), id="both have a prompt"
        ),
        pytest.param((story("w", "b"), IN_STEP[1]), story("w", "c"), both("w", "c"), id="its prompt wins"),
        pytest.param((story("w", "b"), IN_STEP[1]), story("older", None), both("w", "b"), id="nothing new in it"),
        pytest.param(
            (IN_STEP[0], spoken("edited", "d", None)), story("w", "b", "c"), both("edited", "d", "c"),
            id="StoryArt's prompt wins if its copy was changed too",
        ),
        pytest.param(
            (story("w", "b", "b"), spoken("edited", "d", None)), story("w", "c", "c"), both("edited", "d", "b"),
            id="all three were changed",
        ),
    ],
)  # fmt: skip
def test_a_changed_latest_replaces_storyswarms_copy_or_is_merged_into_it_if_that_was_changed_too(now, latest, after):
    change = service.decide(dataclasses.replace(copies_of(now, IN_STEP), latest=to_bytes(latest)))
    assert copies_after(change, [None if copy == b"junk" else copy for copy in now]) == list(after)


@pytest.mark.parametrize(
    "own, other, pairs",
    [
        pytest.param([["a", "b"], ["c"]], [["c"], ["b", "x", "a"]], [(0, 3), (1, 1), (2, 0)], id="unique ids"),
        pytest.param([[None], [None]], [[None], [None]], [(0, 0), (1, 1)], id="no ids, the same layout"),
        pytest.param([[None], [None, None]], [[None, None], [None]], [], id="no ids, another layout"),
        pytest.param([["a", "a"], [1]], [["a", "a"], [1]], [(0, 0), (1, 1), (2, 2)], id="an id twice, the same layout"),
        pytest.param([["a", "a"]], [["a", "a", None]], [], id="an id twice, another layout"),
        pytest.param([["a", "b"]], [["a", "a"]], [(0, 0)], id="an id twice in one copy"),
        pytest.param([["a", "b"]], [["b", "a"]], [(0, 1), (1, 0)], id="another order"),
        pytest.param([["a", None]], [["b", None]], [(1, 1)], id="another id at the same position"),
        pytest.param([[None, "a"]], [["a"], [None]], [(1, 0)], id="an id missing once in each"),
        pytest.param([[None]], [["a"]], [], id="an id in one copy only"),
        pytest.param([[1, "2"]], [["1", 2]], [], id="a number is not a text"),
        pytest.param([], [["a"]], [], id="no scenes"),
    ],
)
def test_beats_are_paired_by_unique_id_or_position_and_never_guessed(own, other, pairs):
    def build(scenes: Any, start: Iterator[int]) -> dict[str, Any]:
        beats = [[{"number": next(start), **({} if id is None else {"beatId": id})} for id in ids] for ids in scenes]
        return {"analyzedEpisode": {"scenes": [{"beats": scene} for scene in beats]}}

    found = service.pair_beats(build(own, itertools.count()), build(other, itertools.count()))
    assert [(beat["number"], counterpart["number"]) for beat, counterpart in found] == pairs


@pytest.mark.parametrize(
    "prompts, own, converted",
    [
        pytest.param({"cinematic": "b"}, None, {"cinematic": {"prompt": "b"}}, id="a string"),
        pytest.param(
            {"cinematic": "b"},
            {"cinematic": FLUX},
            {"cinematic": {**FLUX, "prompt": "b"}},
            id="a string over an object",
        ),
        pytest.param(
            {"vertical": "b"}, {"cinematic": FLUX}, {"vertical": {"prompt": "b"}}, id="a string beside another kind"
        ),
        pytest.param(
            {"cinematic": "b"}, {"cinematic": "c"}, {"cinematic": {"prompt": "b"}}, id="a string over a string"
        ),
        pytest.param({"cinematic": FLUX}, {"cinematic": {"prompt": "c"}}, {"cinematic": FLUX}, id="an object stays"),
        pytest.param({"cinematic": FLUX, "vertical": None}, None, {"cinematic": FLUX}, id="null"),
        pytest.param({"cinematic": FLUX, "vertical": " \n"}, None, {"cinematic": FLUX}, id="blank"),
        pytest.param({"cinematic": FLUX, "vertical": {"prompt": ""}}, None, {"cinematic": FLUX}, id="a blank object"),
        pytest.param(
            {"cinematic": FLUX, "vertical": {"model": "m"}}, None, {"cinematic": FLUX}, id="an object without text"
        ),
        pytest.param({"cinematic": None}, None, None, id="nothing but null"),
        pytest.param({}, None, None, id="no prompts"),
        pytest.param({"square": None}, None, {"square": None}, id="a kind of another name"),
    ],
)
def test_prompts_are_objects_in_storyarts_dialect(prompts, own, converted):
    def build(prompts: Any) -> dict[str, Any]:
        return in_a_beat(story("w", None), **({} if prompts is None else {"prompts": prompts}))

    document = build(prompts)
    assert service.to_storyart(document, T, lambda: build(own)) is (prompts != converted)
    assert document == build(converted)


@pytest.mark.parametrize(
    "given, converted",
    [
        pytest.param({}, {}, id="nothing missing"),
        pytest.param({"timestamp": float(T)}, {}, id="a whole float"),
        *(
            pytest.param({"timestamp": value}, {"timestamp": T}, id=f"timestamp {value!r}")
            for value in (None, 5, str(T), True)
        ),
        pytest.param({"scriptText": None, "storyUuid": None}, {"scriptText": "", "storyUuid": ""}, id="null"),
        pytest.param({"episodeContext": {"a": ["ü"]}}, {"episodeContext": '{"a":["ü"]}'}, id="an object"),
        pytest.param({"storyUuid": 5}, {"storyUuid": "5"}, id="a number"),
        pytest.param({"promptMode": None, "other": None}, {}, id="fields that may be null"),
    ],
)
def test_texts_are_strings_and_the_timestamp_is_the_sessions_in_storyarts_dialect(given, converted):
    document = story("w", **given)
    assert service.to_storyart(document, T, lambda: None) is bool(converted)
    assert document == story("w", **given) | converted


def test_fields_missing_in_storyarts_dialect_are_added_at_the_end():
    document = {"promptMode": "storyart"}
    assert service.to_storyart(document, T, lambda: None) is True
    added = [("timestamp", T), ("scriptText", ""), ("episodeContext", ""), ("storyUuid", "")]
    assert list(document.items()) == [("promptMode", "storyart"), *added]


RAW = (
    rb'{ "z": 1e3, "timestamp": %d, "n": 123456789012345678901234567890, "d": 0.10, "half": "\ud83d", "u": "\u00fc",'
    b' "scriptText": "", "episodeContext": "", "storyUuid": "", "same": 1, "a": [null, true, -0.0], "\xc3\xbc": {} }'
    % T
)


def test_a_document_that_needs_no_conversion_is_copied_byte_for_byte():
    assert service.decide(copies_of((RAW, None))).storyart == RAW
    assert service.decide(copies_of((None, RAW))).storyswarm == RAW
    assert service.decide(copies_of((None, RAW))).storyart is None


def test_a_converted_document_keeps_order_fields_digits_and_half_a_surrogate_pair():
    written = service.decide(copies_of((RAW.replace(b'"storyUuid": ""', b'"storyUuid": null'), None))).storyart
    assert written == (
        b'{"z":1000.0,"timestamp":%d,"n":123456789012345678901234567890,"d":0.1,"half":"\\ud83d","u":"\xc3\xbc",'
        b'"scriptText":"","episodeContext":"","storyUuid":"","same":1,"a":[null,true,-0.0],"\xc3\xbc":{}}' % T
    )


NO_SESSION = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"no JSON", id="not JSON"),
    pytest.param(b"\xff", id="not UTF-8"),
    pytest.param(b"[]", id="not an object"),
    pytest.param(b'{"a": NaN}', id="NaN"),
    pytest.param(b'{"a": 1e999}', id="a float past a double"),
    pytest.param(b'{"a": 1' + b"0" * 400 + b"}", id="an integer past a double"),
    pytest.param(b'{"analyzedEpisode": {"scenes": [5]}}', id="a scene that is a number"),
    pytest.param(b'{"analyzedEpisode": {"scenes": [{"beats": [{"prompts": {"cinematic": 5}}]}]}}', id="broken beats"),
    pytest.param(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", id="nested too deeply"),
]


@pytest.mark.parametrize("junk", NO_SESSION)
def test_a_copy_that_is_not_a_session_raises_value_error(junk):
    for now in ((junk, None), (None, junk), (junk, story("w")), (story("w"), junk)):
        with pytest.raises(ValueError):
            service.decide(copies_of(now))


# ---------------------------------------------------------------------------- both programs on one Redis ----


class StoryArtServer:
    """StoryArt's own server: it uses only its two keys, and fails where the real one does."""

    INDEX = "storyart:sessions:index"

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def save(self, document: dict[str, Any]) -> None:
        key = f"storyart:session:{document['timestamp']}"
        self._redis.set(key, json.dumps(document), px=WEEK)
        self._redis.zadd(self.INDEX, {key: document["timestamp"]})

    def load(self, timestamp: int = T) -> Any:
        return json.loads(self._redis.get(f"storyart:session:{timestamp}"))

    def latest(self) -> Any:
        return json.loads(self._redis.get(self._redis.zrange(self.INDEX, -1, -1)[0]))

    def make_images(self, timestamp: int = T) -> list[str]:
        """The prompts of its images. Fails on a prompt that is a string or null, which has no `.prompt`."""
        document = self.load(timestamp)
        assert all(isinstance(document[name], str) for name in ("scriptText", "episodeContext", "storyUuid"))
        beats = [beat for scene in document["analyzedEpisode"]["scenes"] for beat in scene["beats"]]
        return [
            prompt["prompt"].strip() for beat in beats for prompt in beat.get("prompts", {"": {"prompt": ""}}).values()
        ]


class StorySwarm:
    """StorySwarm: it uses only `session:{timestamp}` and `session:latest`."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def write(self, document: dict[str, Any]) -> None:
        self._redis.set(f"session:{document['timestamp']}", json.dumps(document))

    def write_latest(self, document: dict[str, Any]) -> None:
        self._redis.set("session:latest", json.dumps(document))

    def load(self, timestamp: int = T) -> Any:
        """None without that key."""
        return json.loads(self._redis.get(f"session:{timestamp}") or "null")

    def latest(self) -> Any:
        return json.loads(self._redis.get("session:latest") or "null")


def by_put(app: webtest.TestApp, client: redis.Redis, document: dict[str, Any]) -> None:
    app.put_json(f"/api/v1/session/{document['timestamp']}", document)


def by_its_key(app: webtest.TestApp | None, client: redis.Redis, document: dict[str, Any]) -> None:
    StorySwarm(client).write(document)


def by_latest(app: webtest.TestApp | None, client: redis.Redis, document: dict[str, Any]) -> None:
    StorySwarm(client).write_latest(document)


def by_both(app: webtest.TestApp | None, client: redis.Redis, document: dict[str, Any]) -> None:
    by_its_key(app, client, document)
    by_latest(app, client, document)


class Bridged:
    """An instance of the service with a bridge, whose looks the test calls."""

    def __init__(self, store: service.RedisStore, services: service.Services) -> None:
        self.store, self.bridge = store, services.bridge
        self.look = self.bridge._look
        self.app = as_caller(webtest.TestApp(service.create_app(services)), TOKEN)

    def put(self, document: dict[str, Any]) -> None:
        self.app.put_json(f"/api/v1/session/{document['timestamp']}", document)

    def announced(self) -> list[tuple[str, int]]:
        """Types and sessions of the pending notifications, which it acknowledges."""
        found = pending(self.app, "?type=all")
        for notification in found:
            self.app.post(f"/api/v1/notifications/{notification['id']}/ack")
        return [(notification["type"], notification["sessionTimestamp"]) for notification in found]


@pytest.fixture
def make_bridged(redis_url: str, make_services: Any) -> Iterator[Callable[..., Bridged]]:
    with contextlib.ExitStack() as stack:

        def make(url: str = redis_url, **changed: Any) -> Bridged:
            store = stack.enter_context(contextlib.closing(service.BridgedStore(url)))
            return Bridged(store, make_services(store, **changed))

        yield make


@pytest.fixture
def bridged(make_bridged: Callable[..., Bridged]) -> Bridged:
    """One that has looked at its Redis, which is empty."""
    made = make_bridged()
    made.look()
    return made


@pytest.fixture
def storyart(other_program: redis.Redis) -> StoryArtServer:
    return StoryArtServer(other_program)


@pytest.fixture
def storyswarm(other_program: redis.Redis) -> StorySwarm:
    return StorySwarm(other_program)


@pytest.fixture(params=[by_put, by_its_key, by_latest])
def write(request: pytest.FixtureRequest, bridged: Bridged, other_program: redis.Redis) -> Callable[..., None]:
    """Each way by which StorySwarm writes a document."""
    return functools.partial(request.param, bridged.app, other_program)


@pytest.fixture
def connect() -> Iterator[Callable[[str], redis.Redis]]:
    """Another program's connections to the Redis of a URL."""
    with contextlib.ExitStack() as stack:
        yield lambda url: stack.enter_context(redis.Redis.from_url(url, protocol=2, decode_responses=True))


def replace_key(client: redis.Redis, key: str, value: Any) -> None:
    """With a string, or with a list, which makes it a key of another type."""
    client.delete(key)
    client.rpush(key, *value) if isinstance(value, list) else client.set(key, value)


def test_storyswarm_reads_what_storyarts_server_saved_through_the_api_and_its_keys(bridged, storyart, other_program):
    saved = story("w", None, None)
    storyart.save(saved)
    bridged.look()
    paths = [f"/api/v1/session/{T}", "/api/v1/session/latest"]
    assert [bridged.app.get(path).json["data"] for path in paths] == [saved, saved]
    assert other_program.mget(f"session:{T}", "session:latest") == [json.dumps(saved)] * 2


def test_a_deleted_session_leaves_no_key_and_is_not_brought_back(bridged, storyart, storyswarm, other_program):
    storyart.save(story("w", timestamp=T))
    bridged.put(story("v", timestamp=T + 1))
    bridged.look()
    assert storyswarm.latest()["timestamp"] == T + 1
    for timestamp in (T + 1, T):
        bridged.app.delete(f"/api/v1/session/{timestamp}")
        assert [key for key in other_program.keys("*") if str(timestamp) in key and "made" not in key] == []
        bridged.look()
        bridged.app.get(f"/api/v1/session/{timestamp}", status=404)
        latest = storyswarm.latest()
        assert latest is None or latest["timestamp"] == T < timestamp
    assert other_program.exists("session:latest", *service.RedisStore.INDEXES) == 0


def test_deleting_a_session_keeps_a_latest_of_another_session(bridged, storyswarm):
    bridged.put(story("w"))
    storyswarm.write_latest(story("v", timestamp=T + 1))
    bridged.app.delete(f"/api/v1/session/{T}")
    assert storyswarm.latest()["timestamp"] == T + 1


def test_a_session_that_is_only_in_latest_can_be_deleted(make_app, redis_store, storyswarm):
    app = make_app(redis_store)
    storyswarm.write_latest(story("v"))
    app.delete(f"/api/v1/session/{T}")
    app.get("/api/v1/session/latest", status=404)


def test_storyart_makes_images_of_the_prompts_that_storyswarm_wrote(bridged, storyart, storyswarm, write):
    storyart.save(story("w", None, None))
    bridged.look()
    document = story("w", "a cat", "a dog")
    write(document)
    bridged.look()
    assert storyart.make_images() == ["a cat", "a dog"]
    assert [storyswarm.load(), storyswarm.latest()] == [document, document]  # with strings, as it wrote them


def test_a_session_made_by_storyswarm_is_storyarts_newest(bridged, storyart, storyswarm, write):
    storyart.save(story("older", timestamp=T - 5))
    document = story("w", "a cat")
    write(document)
    if write.func is by_its_key:  # it is in no index
        bridged.app.get(f"/api/v1/session/{T}")
    bridged.look()
    assert storyart.latest() == spoken("w", "a cat")
    assert [storyswarm.load(), storyswarm.latest()] == [document, document]


@pytest.mark.parametrize("write", [by_its_key, by_latest, by_both], indirect=True)
def test_the_users_edit_survives_a_write_of_what_was_read_before(bridged, storyart, storyswarm, write):
    storyart.save(spoken("w", "a dog", None))
    bridged.look()
    storyart.save(spoken("edited", "a wolf", None))
    write(story("w", "a dog", "a cat"))
    bridged.look()
    assert storyart.load() == spoken("edited", "a wolf", "a cat")
    assert storyswarm.load() == story("edited", "a wolf", "a cat")


def test_a_put_replaces_even_an_edit_made_after_its_caller_read(bridged, storyart, storyswarm):
    storyart.save(story("w", None))
    bridged.look()
    storyart.save(story("edited", None))
    bridged.put(story("w", "a cat"))
    bridged.look()
    assert (storyart.load(), storyswarm.load()) == (spoken("w", "a cat"), story("w", "a cat"))


def test_a_save_without_prompts_by_storyarts_server_keeps_the_prompts(bridged, storyart, storyswarm):
    bridged.put(story("w", "a cat", None))
    storyart.save(story("edited", None, None))
    bridged.look()
    assert storyart.load() == spoken("edited", "a cat", None)
    assert storyswarm.load() == story("edited", "a cat", None)


@pytest.mark.parametrize("method, path", [("POST", "/api/v1/session/save"), ("PUT", f"/api/v1/session/{T}")])
def test_a_save_replaces_both_copies_and_the_latest_at_once(bridged, storyart, storyswarm, other_program, method, path):
    storyart.save(story("edited", {"prompt": "old", "model": "flux"}))
    bridged.look()
    document = story("w", "a cat", mood="dark")
    bridged.app.request(path, method=method, body=to_bytes(document), content_type="application/json")
    assert [storyswarm.load(), storyswarm.latest()] == [document, document]
    assert storyart.load() == story("w", {"prompt": "a cat", "model": "flux"}, mood="dark")
    assert storyart.latest() == storyart.load()
    assert other_program.zscore("storyteller:sessions", f"session:{T}") == T


@pytest.mark.parametrize(
    "method, path, kept",
    [("POST", "/api/v1/session/save", "StoryArt's"), ("PUT", f"/api/v1/session/{T}", "StorySwarm's")],
)
def test_a_post_makes_storyarts_text_stay_and_a_put_does_not(bridged, storyart, storyswarm, method, path, kept):
    body = to_bytes(story("StoryArt's", None))
    bridged.app.request(path, method=method, body=body, content_type="application/json")
    storyswarm.write(story("StorySwarm's", "a cat"))
    bridged.look()
    assert storyart.load() == spoken(kept, "a cat")


@pytest.mark.parametrize("is_known", [True, False])
def test_a_save_of_an_older_session_keeps_the_latest(bridged, storyart, other_program, is_known):
    storyart.save(story("newest"))
    if is_known:
        bridged.look()
    before = other_program.get("session:latest")
    bridged.put(story("w", timestamp=T - 1))
    assert other_program.get("session:latest") == before


def test_a_latest_without_a_ttl_is_replaced_by_one_without_a_ttl(bridged, other_program):
    bridged.put(story("w"))
    assert is_a_week(other_program.pttl("session:latest"))
    other_program.persist("session:latest")
    bridged.put(story("new"))
    assert other_program.pttl("session:latest") == -1


def test_writes_to_its_key_and_to_latest_are_merged(bridged, storyart, storyswarm):
    bridged.put(story("w", None, None))
    storyswarm.write(story("w", "a cat", None))
    storyswarm.write_latest(story("w", None, "a dog"))
    bridged.look()
    assert storyart.make_images() == ["a cat", "a dog"]
    assert storyswarm.load() == story("w", "a cat", "a dog")  # with strings, as it wrote them


def test_a_copy_that_is_written_just_before_a_latest_is_applied_is_merged_too(bridged, storyswarm, monkeypatch):
    bridged.put(story("w", None, None))
    storyswarm.write_latest(story("w", "a cat", None))
    sync = bridged.store.sync

    def sync_late(timestamp: int, decide: Any, latest: Any = None) -> Any:
        if latest:
            storyswarm.write(story("w", None, "a dog"))
        return sync(timestamp, decide, latest)

    monkeypatch.setattr(bridged.store, "sync", sync_late)
    bridged.look()
    assert storyswarm.load() == story("w", "a cat", "a dog")


def test_an_older_latest_changes_nothing_at_the_first_look(make_bridged, storyart, storyswarm, other_program):
    """StorySwarm may have left both so before there was a bridge."""
    storyswarm.write(story("w", "a cat"))
    storyswarm.write_latest(story("older", None))
    before = other_program.get(f"session:{T}")
    make_bridged().look()
    assert storyart.load() == spoken("w", "a cat")
    assert other_program.mget(f"session:{T}", "session:latest") == [before, before]


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(None, id="nothing"),
        pytest.param(story("older", "a dog", timestamp=T - 1), id="an older session"),
        pytest.param(story("the same", "a dog", None), id="the same session"),
        pytest.param(b"junk", id="not a session"),
        pytest.param(episode({"prompts": 5}, timestamp=T - 1), id="broken beats"),
        pytest.param([b"a list"], id="another type"),
    ],
)
def test_a_save_replaces_any_latest_and_loses_no_prompts(bridged, storyart, storyswarm, other_program, before):
    if before:
        replace_key(other_program, "session:latest", before if isinstance(before, list) else to_bytes(before))
    bridged.put(story("w", None))
    assert storyswarm.latest() == story("w", None)
    bridged.look()
    assert storyart.load() == story("w", None)
    if isinstance(before, dict) and before.get("scriptText") == "older":
        assert storyart.make_images(T - 1) == ["a dog"]


def test_a_prompt_goes_to_its_beat_even_if_that_was_moved(bridged, storyart, storyswarm):
    storyart.save(story("w", None, None))
    bridged.look()
    moved = story("w")
    moved["analyzedEpisode"]["scenes"][0]["beats"] = [{"beatId": id} for id in ("b1", "new", "b0")]
    storyart.save(moved)
    storyswarm.write(story("w", "of 0", "of 1"))
    bridged.look()
    assert storyart.make_images() == ["of 1", "", "of 0"]


# -------------------------------------------------------------------------------- noticing changes ----

ASKED = {
    "GET": f"/api/v1/session/{T}",
    "prompts-status": f"/api/v1/session/{T}/prompts-status",
    "latest": "/api/v1/session/latest",
}


@pytest.mark.parametrize("path", ASKED.values(), ids=ASKED)
def test_a_request_applies_at_once_what_storyarts_server_saved(make_bridged, storyart, storyswarm, path):
    app = make_bridged().app
    for words in ("w", "edited"):
        storyart.save(story(words, None))
        app.get(path)
        assert storyswarm.load() == story(words, None)


@pytest.mark.parametrize("path", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("write", [by_its_key, by_latest], indirect=True)
@pytest.mark.parametrize("dialect, headers", [(story, {}), (spoken, {"Origin": PAGE})], ids=["a program", "the page"])
def test_a_request_applies_at_once_what_storyswarm_wrote(bridged, storyart, write, path, dialect, headers):
    storyart.save(story("w", None))
    bridged.look()
    write(story("w", "a cat"))
    answer = bridged.app.get(path, headers=headers).json
    assert answer.get("promptsReady") or answer["data"] == dialect("w", "a cat")
    assert storyart.make_images() == ["a cat"]


@pytest.mark.parametrize(
    "write, asked",
    [(by_its_key, "GET"), (by_its_key, "prompts-status"), (by_latest, "GET"), (by_latest, "latest")],
    indirect=["write"],
)
def test_a_request_brings_a_session_in_step_that_is_in_no_index(bridged, storyart, other_program, write, asked):
    write(story("w", "a cat"))
    if write.func is by_its_key:
        bridged.look()
        assert other_program.exists(f"storyart:session:{T}") == 0  # no look finds it
    answer = bridged.app.get(ASKED[asked]).json
    assert answer.get("promptsReady") or answer["data"] == story("w", "a cat")
    assert storyart.latest() == spoken("w", "a cat")


def test_the_first_look_notices_earlier_changes(bridged, make_bridged, storyart, storyswarm, other_program):
    for number in range(3):
        storyart.save(story("old", None, timestamp=T + number))
    bridged.look()
    other_program.delete(bridged.store.LEASE)
    storyart.save(story("new", None))
    storyswarm.write(story("old", "a cat", timestamp=T + 1))
    storyswarm.write_latest(story("old", "a dog", timestamp=T + 2))
    make_bridged().look()
    assert storyswarm.load() == story("new", None)
    assert (storyart.make_images(T + 1), storyart.make_images(T + 2)) == (["a cat"], ["a dog"])


def test_a_look_reads_the_newest_and_the_waiting_sessions(bridged, storyart, storyswarm, monkeypatch):
    kinds = [("storyswarm", None), ("storyswarm", "a cat"), ("storyart", None), ("storyswarm", None)]
    for number, (mode, prompt) in enumerate(kinds):
        storyart.save(story("old", prompt, timestamp=T + number, promptMode=mode))
    bridged.look()
    monkeypatch.setattr(service.Bridge, "NEWEST", 1)
    bridged.look()
    for number, (mode, prompt) in enumerate(kinds):
        storyart.save(story("changed", prompt, timestamp=T + number, promptMode=mode))
    bridged.look()
    found = [storyswarm.load(T + number)["scriptText"] for number in range(len(kinds))]
    assert found == ["changed", "old", "old", "changed"]


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The monotonic clock, which the test moves."""
    clock = Clock(time.monotonic())
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.mark.parametrize("prompt, seconds", [(None, 10), ("a cat", 60)], ids=["it waits for prompts", "it is complete"])
def test_a_copy_of_the_same_length_is_noticed_in_time(bridged, storyart, storyswarm, monotonic, prompt, seconds):
    for number in range(20):  # the times are spread
        storyart.save(spoken("old", prompt, timestamp=T + number))
    bridged.look()
    bridged.look()
    for number in range(20):
        storyart.save(spoken("new", prompt, timestamp=T + number))
    bridged.look()
    assert {storyswarm.load(T + number)["scriptText"] for number in range(20)} == {"old"}
    monotonic.now += seconds - service.Bridge.INTERVAL
    bridged.look()
    assert {storyswarm.load(T + number)["scriptText"] for number in range(20)} == {"new"}


def test_a_latest_of_the_same_length_is_noticed_within_10_s(bridged, storyart, storyswarm, monotonic):
    storyart.save(story("w", {"prompt": "cat"}))
    bridged.look()
    bridged.look()
    storyswarm.write_latest(story("w", {"prompt": "dog"}))
    monotonic.now += 10 - service.Bridge.INTERVAL
    bridged.look()
    assert storyart.make_images() == ["dog"]


def test_only_a_request_notices_a_large_copy_of_the_same_length(bridged, storyart, storyswarm, monotonic, monkeypatch):
    monkeypatch.setattr(service.Bridge, "LARGE", 100)
    storyart.save(story("old", None))
    bridged.look()
    bridged.look()
    storyart.save(story("new", None))
    monotonic.now += 3600
    bridged.look()
    assert storyswarm.load()["scriptText"] == "old"
    assert bridged.app.get(ASKED["GET"]).json["data"] == story("new", None)


def test_the_bridge_needs_no_requests(make_bridged, storyart, storyswarm, monkeypatch):
    monkeypatch.setattr(service.Bridge, "INTERVAL", 0.01)
    with contextlib.closing(make_bridged().bridge) as bridge:
        bridge.start()
        for number in range(3):
            storyart.save(story("w", None, timestamp=T + number))
            wait_until(lambda: storyswarm.load(T + number))  # noqa: B023


# ------------------------------------------------------------------------- one bridge for all instances ----


def test_only_the_instance_with_the_lease_looks(bridged, make_bridged, storyart, storyswarm):
    storyart.save(story("w"))
    make_bridged().look()
    assert storyswarm.load() is None
    bridged.look()
    assert storyswarm.load() == story("w")


def test_another_instance_takes_over_when_the_lease_expires(make_bridged, storyart, storyswarm, monkeypatch):
    assert service.Bridge.INTERVAL < 3 and service.Bridge.LEASE / 1000 + service.Bridge.INTERVAL < 10
    monkeypatch.setattr(service.Bridge, "LEASE", 20)
    first, second = make_bridged(), make_bridged()
    first.look()
    storyart.save(story("w"))
    wait_until(lambda: second.look() and storyswarm.load())
    monkeypatch.setattr(service.Bridge, "LEASE", 50_000)
    second.look()
    storyart.save(story("new"))
    first.look()  # it is back, but without the lease
    assert storyswarm.load() == story("w")


def test_a_lease_that_outlived_a_clock_that_was_set_back_is_taken_over(bridged, storyart, storyswarm, other_program):
    other_program.set(bridged.store.LEASE, "an instance that is gone", px=5 * 3_600_000)
    storyart.save(story("w"))
    bridged.look()
    assert storyswarm.load() == story("w")


def test_an_instance_that_ends_releases_the_lease(make_bridged, storyart, storyswarm, other_program):
    first, second = make_bridged(), make_bridged()
    first.bridge.start()
    wait_until(lambda: other_program.exists(first.store.LEASE))
    first.bridge.close()
    assert other_program.pttl(first.store.LEASE) <= 1
    wait_until(lambda: not other_program.exists(first.store.LEASE))
    storyart.save(story("w"))
    second.look()
    assert storyswarm.load() == story("w")


def test_a_look_that_takes_too_long_stops_halfway_and_the_next_continues(bridged, storyart, storyswarm, monkeypatch):
    monkeypatch.setattr(service.Bridge, "INTERVAL", 0.0)
    documents = [story("w", timestamp=T + number) for number in range(3)]
    for document in documents:
        storyart.save(document)
    looks = [bridged.look() for _ in range(9)]
    assert (looks[0], looks[-1]) == (False, True)
    assert [storyswarm.load(T + number) for number in range(3)] == documents


def test_a_session_that_fails_does_not_stop_the_others(bridged, storyart, storyswarm, monkeypatch):
    sync = service.BridgedStore.sync

    def refuse_one(store: Any, timestamp: int, *arguments: Any, **options: Any) -> Any:
        if timestamp == T + 1:
            raise service.Unavailable("Session is written all the time.", 1)
        return sync(store, timestamp, *arguments, **options)

    monkeypatch.setattr(service.BridgedStore, "sync", refuse_one)
    for number in range(3):
        storyart.save(story("w", timestamp=T + number))
    bridged.look()
    assert [storyswarm.load(T + number) is not None for number in range(3)] == [True, False, True]
    monkeypatch.undo()
    bridged.look()
    assert storyswarm.load(T + 1) == story("w", timestamp=T + 1)


READING = {"eval", "get", "mget", "hget", "hmget", "strlen", "pttl", "exists", "zrevrange", "watch", "unwatch"}


def test_idle_instances_write_nothing_but_the_lease(make_bridged, storyart, storyswarm, other_program, monkeypatch):
    for name, value in (("RECHECK_WAITING", 0), ("RECHECK", 0), ("SPREAD", 1)):
        monkeypatch.setattr(service.Bridge, name, value)
    storyart.save(story("waits", None))
    storyart.save(story("of strings", "a cat", timestamp=T + 1))
    storyart.save({"timestamp": T + 2, "promptMode": "storyart"})
    storyart.save(story("both gone", None, timestamp=T + 3))
    storyart.save(story("one gone", timestamp=T + 4))
    storyswarm.write(story("a cat", timestamp=T + 4))
    storyart.save(story("junk beside it", timestamp=T + 5))
    storyart.save(story("a list beside it", timestamp=T + 6))
    instances = [make_bridged(), make_bridged()]
    instances[0].look()
    other_program.delete(f"session:{T + 3}", f"storyart:session:{T + 3}", f"storyart:session:{T + 4}")
    other_program.set(f"session:{T + 5}", "junk")
    replace_key(other_program, f"session:{T + 6}", ["a list"])
    other_program.set("session:latest", "junk")
    for _ in range(3):
        instances[0].look()
    other_program.config_resetstat()
    for _ in range(5):
        for instance in instances:
            instance.look()
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in other_program.info("commandstats").items()}
    assert calls.pop("set") == 5
    assert calls.pop("hmget") > 25  # each session was read as a whole each time
    assert set(calls) <= READING | {"config|resetstat", "config"}


# ---------------------------------------------------------------------------------- notifications ----


def test_a_session_announces_its_steps_with_no_page_open(bridged, storyart, storyswarm):
    storyart.save(story("w", None, None))
    bridged.look()
    assert bridged.announced() == [(BEATS, T)]
    storyswarm.write(story("w", "a cat", None))
    bridged.look()
    assert bridged.announced() == []
    storyswarm.write(story("w", "a cat", "a dog"))
    bridged.look()
    assert bridged.announced() == [(PROMPTS, T)]
    storyart.save(story("edited", None, None))
    bridged.look()
    assert (storyart.make_images(), bridged.announced()) == (["a cat", "a dog"], [])


def test_prompts_are_announced_once_storyarts_copy_is_complete_and_not_before(bridged, storyart, storyswarm):
    """StorySwarm's copy may have fewer beats."""
    storyart.save(story("w", None))
    bridged.look()
    storyart.save(story("w", None, None))
    storyswarm.write(story("w", "a cat"))
    bridged.look()
    assert bridged.announced() == [(BEATS, T)]
    storyswarm.write(story("w", "a cat", "a dog"))
    bridged.app.get(ASKED["prompts-status"])
    assert bridged.announced() == [(PROMPTS, T)]


def test_prompts_are_announced_once_storyarts_copy_is_a_session_again(bridged, storyart, storyswarm, other_program):
    storyart.save(story("w", None))
    bridged.look()
    other_program.set(f"storyart:session:{T}", "junk")
    storyswarm.write(story("w", "a cat"))
    assert bridged.app.get(ASKED["prompts-status"]).json["promptsReady"]
    assert bridged.announced() == [(BEATS, T)]
    storyart.save(story("w", None))
    bridged.look()
    assert bridged.announced() == [(PROMPTS, T)]


def test_a_step_is_announced_even_if_another_instance_has_used_a_later_time(bridged, storyart, other_program):
    other_program.set(service.RedisStore.NEWEST, service.now_ms() + 10_000)
    storyart.save(story("w", None))
    bridged.look()
    assert bridged.announced() == [(BEATS, T)]


def test_each_step_is_announced_once_even_if_noticed_in_many_places(bridged, make_bridged, storyart, write):
    apps = [bridged.app, make_bridged().app] * 2
    storyart.save(story("w", None))
    at_once(bridged.look, *[functools.partial(app.get, ASKED["prompts-status"]) for app in apps])
    assert bridged.announced() == [(BEATS, T)]
    write(story("w", "a cat"))
    at_once(bridged.look, *[functools.partial(app.get, ASKED["latest"]) for app in apps])
    bridged.look()
    assert bridged.announced() == [(PROMPTS, T)]


@pytest.mark.parametrize("mode", ["storyart", None])
def test_a_session_that_does_not_wait_for_storyswarm_is_not_announced(bridged, storyart, mode):
    storyart.save(story("w", "a cat", promptMode=mode))
    bridged.look()
    assert bridged.announced() == []


def test_in_a_redis_met_for_the_first_time_only_the_newest_session_is_announced(
    make_bridged, storyart, storyswarm, other_program
):
    for number, prompt in enumerate([None, "a cat", "a cat"]):
        storyart.save(story("w", prompt, timestamp=T + number))
    other_program.zadd("storyteller:sessions", {f"session:{T + 2}": T + 2})
    other_program.zadd(storyart.INDEX, {f"storyart:session:{T + 3}": T + 3})  # it has expired
    bridged = make_bridged()
    for _ in range(2):
        bridged.look()
    assert bridged.announced() == [(PROMPTS, T + 2)]
    bridged.app.get(f"/api/v1/session/{T + 1}/prompts-status")
    assert bridged.announced() == [(PROMPTS, T + 1)]
    storyswarm.write(story("w", "a cat"))
    storyart.save(story("w", None, timestamp=T - 1))
    bridged.look()
    assert bridged.announced() == [(PROMPTS, T), (BEATS, T - 1)]


def test_fractional_scores_in_an_index_hide_no_session(make_bridged, storyart, storyswarm, other_program):
    storyart.save(story("w", "a cat"))
    other_program.zadd(storyart.INDEX, {f"storyart:session:{T}": T + 0.5})
    bridged = make_bridged()
    bridged.look()
    assert bridged.announced() == [(PROMPTS, T)]
    assert storyswarm.load() == spoken("w", "a cat")
    other_program.zadd(storyart.INDEX, {"another member": T + 0.5})
    bridged.put(story("v", "a cat"))
    assert storyswarm.latest() == story("v", "a cat")


@pytest.mark.parametrize("timestamp", [str(T), T + 0.5], ids=["text", "half a ms"])
def test_a_latest_whose_timestamp_is_text_or_has_a_fraction_is_applied(bridged, storyart, storyswarm, timestamp):
    storyswarm.write_latest(story("w", "a cat", timestamp=timestamp))
    bridged.look()
    assert storyart.load() == spoken("w", "a cat")
    assert bridged.announced() == [(PROMPTS, T)]


def test_in_a_redis_that_was_emptied_only_the_newest_session_is_announced_again(bridged, storyart, other_program):
    storyart.save(story("w"))
    bridged.look()
    other_program.flushdb()
    for timestamp in (T, T - 1):
        storyart.save(story("w", None, timestamp=timestamp))
    bridged.look()
    assert bridged.announced() == [(BEATS, T)]
    storyart.save(story("w", None, timestamp=T - 2))
    bridged.look()
    assert bridged.announced() == [(BEATS, T - 2)]


def test_the_next_instance_announces_each_new_session(bridged, make_bridged, storyart, other_program):
    other_program.delete(bridged.store.LEASE)
    for number in range(3):
        storyart.save(story("w", None, timestamp=T + number))
    second = make_bridged()
    second.look()
    assert sorted(second.announced()) == [(BEATS, T + number) for number in range(3)]


# --------------------------------------------------------------------------------- deleted copies ----


@pytest.mark.parametrize("gone", ["session", "storyart:session"])
def test_a_copy_that_is_gone_stays_gone_until_the_other_changes(bridged, storyart, storyswarm, other_program, gone):
    bridged.put(story("w", "a cat"))
    bridged.look()
    other_program.delete(f"{gone}:{T}")
    bridged.look()
    for path in ASKED.values():
        bridged.app.get(path)
    bridged.look()
    assert other_program.exists(f"{gone}:{T}") == 0
    if gone == "session":
        storyart.save(spoken("new", "a dog"))
    else:
        storyswarm.write(story("new", "a dog"))
    bridged.look()
    assert (storyswarm.load()["scriptText"], storyart.load()) == ("new", spoken("new", "a dog"))


def test_a_session_without_copies_leaves_the_indexes_and_is_not_brought_back(bridged, other_program, monkeypatch):
    for number in (-2, -1, 0, 1):
        bridged.put(story("w", timestamp=T + number))
    bridged.look()
    monkeypatch.setattr(service.Bridge, "NEWEST", 1)
    for number in (-2, -1, 1):  # the oldest, which end first, and the newest
        other_program.delete(f"session:{T + number}", f"storyart:session:{T + number}")
    for _ in range(2):
        bridged.look()
    assert other_program.zrange("storyart:sessions:index", 0, -1) == [f"storyart:session:{T}"]
    assert other_program.zrange("storyteller:sessions", 0, -1) == [f"session:{T}"]
    assert bridged.app.get(ASKED["latest"]).json["data"] == story("w")
    bridged.look()
    assert not other_program.exists(f"session:{T + 1}", f"storyart:session:{T + 1}", f"storyteller:session:{T + 1}")


def test_a_changed_latest_brings_its_session_back(bridged, storyart, storyswarm, other_program):
    bridged.put(story("w", None))
    other_program.delete(f"session:{T}", f"storyart:session:{T}")
    bridged.look()
    storyswarm.write_latest(story("w", "a cat"))
    bridged.look()
    assert (storyart.make_images(), storyswarm.load()) == (["a cat"], story("w", "a cat"))


# ------------------------------------------------------------------------------------------- TTLs ----


@pytest.mark.parametrize(
    "swarm, art, changed, after",
    [
        pytest.param(None, 50, "art", (50, 50, 50), id="made from StoryArt's"),
        pytest.param(50, None, "swarm", (50, 50, 50), id="made from StorySwarm's"),
        pytest.param(-1, None, "swarm", (-1, WEEK // 1000, -1), id="made from one without a TTL"),
        pytest.param(90, 50, "art", (90, 50, 90), id="not shorter than before"),
        pytest.param(50, 90, "art", (90, 90, 90), id="longer than before"),
        pytest.param(-1, 50, "art", (-1, 50, -1), id="without a TTL as before"),
        pytest.param(50, -1, "art", (WEEK // 1000, -1, -1), id="made from StoryArt's without a TTL"),
    ],
)
def test_a_copy_gets_the_ttl_of_the_one_it_is_made_from_but_never_a_shorter_one(
    bridged, storyswarm, storyart, other_program, swarm, art, changed, after
):
    keys = [f"session:{T}", f"storyart:session:{T}", f"storyteller:session:{T}"]
    old, new = story("old"), story("edited")
    if swarm and art:
        bridged.put(old)
    for key, ttl, is_new in ((keys[0], swarm, changed == "swarm"), (keys[1], art, changed == "art")):
        if ttl:
            other_program.set(key, json.dumps(new if is_new else old), ex=ttl if ttl > 0 else None)
    bridged.app.get(ASKED["GET"])
    assert [storyswarm.load(), storyart.load()] == [new, new]
    assert [other_program.ttl(key) for key in keys] == [pytest.approx(ttl, abs=PATIENCE) for ttl in after]


def test_the_copies_get_the_ttl_of_the_latest_that_they_are_made_from(bridged, storyart, storyswarm, other_program):
    storyart.save(story("w", None))
    bridged.look()
    for key in (f"session:{T}", f"storyart:session:{T}"):
        other_program.pexpire(key, 60_000)
    storyswarm.write_latest(story("w", "a cat"))
    bridged.look()
    assert min(other_program.pttl(f"{place}:{T}") for place in ("session", "storyart:session")) > WEEK - 60_000


def test_the_latest_gets_the_newest_sessions_ttl_unless_shorter(bridged, storyart, storyswarm, other_program):
    storyart.save(story("w", None))
    other_program.expire(f"storyart:session:{T}", 500)
    bridged.look()
    assert other_program.ttl("session:latest") == pytest.approx(500, abs=PATIENCE)
    other_program.expire("session:latest", 900)
    other_program.set(f"session:{T}", json.dumps(story("w", "a cat")), ex=700)
    bridged.look()
    assert storyswarm.latest() == story("w", "a cat")
    assert other_program.ttl("session:latest") == pytest.approx(900, abs=PATIENCE)


@pytest.mark.parametrize("ttl", [None, WEEK])
def test_metadata_lives_as_long_as_a_copy_that_was_saved_again_unchanged(bridged, storyart, other_program, ttl):
    storyart.save(story("w", None))
    bridged.look()
    other_program.pexpire(f"storyteller:session:{T}", WEEK - 3_600_000)  # an hour later
    other_program.pexpire(f"session:{T}", 3_600_000)
    other_program.set(f"storyart:session:{T}", json.dumps(story("w", None)), px=ttl)
    bridged.look()
    left = other_program.pttl(f"storyteller:session:{T}")
    assert left == -1 if ttl is None else is_a_week(left)


def test_metadata_of_the_latest_has_no_ttl(bridged, other_program):
    bridged.put(story("w"))
    assert other_program.ttl(bridged.store.META_OF_LATEST) == -1


# --------------------------------------------------------------------------- never overwritten ----


@pytest.mark.parametrize("key", [f"session:{T}", f"storyart:session:{T}"])
def test_a_copy_that_changed_meanwhile_stays(make_bridged, storyart, storyswarm, other_program, monkeypatch, key):
    bridged, writes = make_bridged(), [story("meanwhile", {"prompt": "a dog"})]
    storyart.save(story("w", None))

    def write_meanwhile(timestamp: int, document: dict[str, Any]) -> None:
        if writes:
            other_program.set(key, json.dumps(writes.pop()))

    monkeypatch.setattr(service, "due_notification", write_meanwhile)
    bridged.look()
    assert storyart.make_images() == ["a dog"]
    text = "meanwhile" if key.startswith("storyart") else "w"
    assert (storyswarm.load()["scriptText"], storyart.load()["scriptText"]) == (text, text)


def test_a_put_is_not_overwritten_by_a_latest_that_was_read_before_it(bridged, storyswarm, monkeypatch):
    bridged.put(story("old"))
    bridged.put(story("newest", timestamp=T + 1))
    storyswarm.write_latest(story("from latest"))
    read = bridged.store.newest_copy()
    bridged.put(story("put"))
    monkeypatch.setattr(bridged.store, "newest_copy", lambda **_: read)
    bridged.bridge.sync_latest()
    assert storyswarm.load() == story("put")


def test_a_latest_that_changes_during_its_renewal_stays(bridged, storyart, storyswarm, monkeypatch):
    bridged.put(story("w", None))
    storyart.save(story("edited", None))
    bridged.app.get(ASKED["GET"])
    transact = bridged.store._redis.transact

    def transact_late(keys: Any, reads: Any, write: Any) -> Any:
        def write_late(replies: Any) -> Any:
            storyswarm.write_latest(story("w", "a cat"))
            return write(replies)

        return transact(keys, reads, write_late)

    monkeypatch.setattr(bridged.store._redis, "transact", transact_late)
    bridged.store.renew_latest(T)
    assert storyswarm.latest() == story("w", "a cat")


def test_a_copy_that_is_written_again_as_it_was_before_the_bridge_changed_it_is_noticed(bridged, storyart, storyswarm):
    storyart.save(spoken("the text of StoryArt", None))
    bridged.look()
    for _ in range(2):
        storyswarm.write(story("old text", None))
        bridged.look()
        assert storyswarm.load()["scriptText"] == "the text of StoryArt"


@pytest.mark.parametrize("junk", [*NO_SESSION, pytest.param(["a", "list"], id="another type")])
@pytest.mark.parametrize("broken, intact", list(itertools.permutations([f"session:{T}", f"storyart:session:{T}"])))
def test_a_copy_that_is_not_a_session_stays_and_is_logged_once_until_it_is_replaced(
    bridged, storyart, storyswarm, other_program, caplog, junk, broken, intact
):
    replace_key(other_program, broken, junk)
    other_program.set(intact, json.dumps(spoken("w", "a cat")))
    other_program.zadd("storyart:sessions:index", {f"storyart:session:{T}": T})
    before = [other_program.dump(key) for key in (broken, intact)]
    storyart.save(story("another", timestamp=T - 1))
    for _ in range(2):
        bridged.look()
        bridged.app.get(ASKED["GET"], expect_errors=True)
        bridged.app.get(ASKED["prompts-status"], expect_errors=True)
    assert [other_program.dump(key) for key in (broken, intact)] == before
    assert caplog.text.count(f"session {T} is left as it is") == 1
    assert storyswarm.load(T - 1) == story("another", timestamp=T - 1)  # it does not stop the others
    replace_key(other_program, broken, to_bytes(spoken("w", "a dog")))
    bridged.look()
    assert storyswarm.load() == storyart.load()


def test_a_session_that_is_not_a_string_never_becomes_the_latest(bridged, storyart, storyswarm, other_program):
    bridged.put(story("w"))
    storyart.save(story("edited"))
    bridged.app.get(ASKED["GET"])
    replace_key(other_program, f"session:{T}", ["a", "list"])
    bridged.look()
    assert storyswarm.latest() == story("w")


@pytest.mark.parametrize(
    "junk",
    [
        *NO_SESSION,
        pytest.param(["a", "list"], id="another type"),
        *(
            pytest.param(json.dumps(story("w", timestamp=value)), id=f"timestamp {value!r}")
            for value in (None, "soon", "1.5", -5, 2**70, 1e30)
        ),
    ],
)
def test_a_latest_that_is_not_a_session_stays_and_is_logged_once(bridged, storyart, other_program, caplog, junk):
    storyart.save(story("w", None))
    replace_key(other_program, "session:latest", junk)
    before = other_program.dump("session:latest")
    for _ in range(2):
        bridged.look()
        assert bridged.app.get(ASKED["latest"]).json["data"] == story("w", None)
    assert other_program.dump("session:latest") == before
    assert caplog.text.count(" bridge: ") == 1
    assert other_program.zcard("storyart:sessions:index") == 1


def test_while_redis_refuses_writes_reads_work_and_a_later_look_retries(make_bridged, own_redis, connect, caplog):
    own = own_redis("--save", "")
    bridged, client = make_bridged(own.url), connect(own.url)
    bridged.look()
    StoryArtServer(client).save(story("w", "a cat"))
    client.config_set("min-replicas-to-write", 1)
    for path in (ASKED["GET"], ASKED["latest"]):
        assert bridged.app.get(path).json["data"] == story("w", "a cat")
    assert bridged.app.get(ASKED["prompts-status"]).json["promptsReady"] is True
    with pytest.raises(service.Unavailable, match="NOREPLICAS"):  # the reason in the alert
        bridged.store.ping()
    with pytest.raises(service.Unavailable):
        bridged.look()
    bridged.bridge._turn()
    assert "refuses writes" in caplog.text and "sessions are not kept in step" not in caplog.text  # it is logged once
    client.config_set("min-replicas-to-write", 0)
    bridged.look()
    assert StoryArtServer(client).make_images() == ["a cat"]
    assert StorySwarm(client).load() == spoken("w", "a cat")


def test_only_an_unfinished_look_is_followed_by_the_next_at_once(bridged, monkeypatch):
    outcomes = [False, service.Unavailable("no", 1), True]

    def look() -> bool:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(bridged.bridge, "_look", look)
    pauses = [bridged.bridge._turn() for _ in range(len(outcomes))]
    assert pauses == [0, *[service.Bridge.INTERVAL] * 2]


def test_a_failed_look_is_logged_once_and_the_next_one_follows(make_bridged, storyart, storyswarm, monkeypatch, caplog):
    monkeypatch.setattr(service.Bridge, "INTERVAL", 0.01)
    bridged, look, faults = make_bridged(), service.BridgedStore.look, [service.Unavailable("no", 1, refusal="no")] * 3

    def look_or_fail(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return look(*arguments)

    monkeypatch.setattr(service.BridgedStore, "look", look_or_fail)
    storyart.save(story("w"))
    with contextlib.closing(bridged.bridge) as bridge:
        bridge.start()
        wait_until(storyswarm.load)
    assert caplog.text.count("sessions are not kept in step: no") == 1


# ----------------------------------------------------------------------------------------- by HTTP ----


@pytest.fixture(params=["sqlite", "redis", "bridged"])
def any_app(request: pytest.FixtureRequest, make_app: Callable[..., webtest.TestApp]) -> webtest.TestApp:
    """The application on each store, and on Redis with the bridge."""
    if request.param == "bridged":
        return request.getfixturevalue("bridged").app
    return make_app(request.getfixturevalue(f"{request.param}_store"))


@pytest.mark.parametrize("path", [ASKED["GET"], ASKED["latest"]])
def test_the_page_gets_a_session_in_storyarts_dialect_and_others_get_it_as_it_is_stored(any_app, path):
    stored = story("w", "a cat", " ")
    any_app.put_json(f"/api/v1/session/{T}", stored)
    assert any_app.get(path).json["data"] == stored
    assert any_app.get(path, headers={"Origin": "http://unknown"}).json["data"] == stored
    assert any_app.get(path, headers={"Origin": PAGE}).json["data"] == spoken("w", "a cat", None)


def test_the_page_gets_the_models_and_sizes_of_storyarts_copy(bridged, storyart, storyswarm):
    storyart.save(story("w", FLUX))
    bridged.look()
    storyswarm.write(story("w", "b"))
    assert bridged.app.get(ASKED["GET"], headers={"Origin": PAGE}).json["data"] == story("w", {**FLUX, "prompt": "b"})


def test_a_session_with_broken_beats_is_saved_and_returned_as_it_is(any_app):
    broken = {"timestamp": T, "scriptText": "w", "analyzedEpisode": {"scenes": [{"beats": [{"prompts": 5}]}]}}
    any_app.put_json(f"/api/v1/session/{T}", broken)
    assert any_app.get(ASKED["GET"]).json["data"] == broken
    assert any_app.get(ASKED["GET"], headers={"Origin": PAGE}).json["data"] == broken


def test_the_page_gets_storyswarms_copy_if_storyarts_is_not_a_session(bridged, other_program):
    bridged.put(story("w", "a cat"))
    other_program.set(f"storyart:session:{T}", "junk")
    assert bridged.app.get(ASKED["GET"], headers={"Origin": PAGE}).json["data"] == spoken("w", "a cat")


def test_without_the_bridge_only_saves_are_written(make_services, redis_url, storyart, storyswarm, other_program):
    def session_keys() -> set[str]:
        return {*other_program.scan_iter("session:*"), *other_program.scan_iter("storyart:*")}

    with contextlib.closing(service.open_store(service.Settings(redis_url=redis_url, bridge=False))) as store:
        services = make_services(store)
        app = as_caller(webtest.TestApp(service.create_app(services)), TOKEN)
        app.put_json(f"/api/v1/session/{T}", story("w", "a cat"))
        assert session_keys() == {f"session:{T}"}
        storyswarm.write_latest(story("newer", "a dog", timestamp=T + 1))
        storyart.save(story("edited", None))
        for path in ASKED.values():
            app.get(path)
        assert services.bridge is None
        assert app.get(ASKED["GET"], headers={"Origin": PAGE}).json["data"] == spoken("w", "a cat")
    assert session_keys() == {f"session:{T}", "session:latest", f"storyart:session:{T}", "storyart:sessions:index"}
    assert storyswarm.load() == story("w", "a cat")


HALF = (
    rb'{"timestamp":%d,"scriptText":"\ud83d.","storyUuid":"\ude00u","promptMode":"storyswarm","\udfff":1,"analyzedEpisode":'
    rb'{"title":"\ud83d.","scenes":[{"title":"\ud83d.","beats":[{"beatId":"\ud83d.","prompts":{"cinematic":"\ud83d."}}]}]}}'
    % T
)


@pytest.mark.parametrize(
    ("any_app", "method"),
    [("sqlite", "POST"), ("redis", "PUT"), ("redis", "SET"), ("bridged", "POST"), ("bridged", "SET")],
    indirect=["any_app"],
)
def test_a_session_with_halves_of_surrogate_pairs_is_like_any_other(any_app, request, method):
    """JSON.stringify writes such a half when a text was cut in the middle of an emoji."""
    if method == "SET":
        client = request.getfixturevalue("other_program")
        client.set(f"session:{T}", HALF)
        client.zadd("storyteller:sessions", {f"session:{T}": T})
    else:
        path = "/api/v1/session/save" if method == "POST" else ASKED["GET"]
        any_app.request(path, method=method, body=HALF, content_type="application/json")
    assert any_app.get(ASKED["prompts-status"]).json["totalPrompts"] == 1
    for path in (ASKED["GET"], ASKED["latest"]):
        assert HALF in any_app.get(path).body
        assert rb'"cinematic":{"prompt":"\ud83d."}' in any_app.get(path, headers={"Origin": PAGE}).body
    listed = any_app.get("/api/v1/session/list").body
    assert listed.count(rb'"\ud83d."') == 3 and rb'"\ude00u"' in listed
    check = any_app.get("/api/v1/notifications/check")
    assert rb'"storyUuid":"\ude00u"' in check.body
    any_app.post(f"/api/v1/notifications/{check.json['notifications'][0]['id']}/ack")


def test_a_notification_with_half_a_surrogate_pair_is_like_any_other(app):
    body = json.dumps({**NOTIFICATION, "totalPrompts": 1, "storyUuid": "\ud83d"}).encode()
    made = app.request("/api/v1/notifications", method="POST", body=body, content_type="application/json", status=201)
    assert rb'"storyUuid":"\ud83d"' in made.body
    assert pending(app) == [made.json]


def test_a_list_has_texts_as_strings_digits_as_numbers_and_200_sessions_by_default(app, store):
    scenes = [{}, {"sceneNumber": "2"}, {"sceneNumber": "2b"}]
    stored = {"title": 5, "episodeNumber": "3", "scenes": scenes}
    document = {"storyUuid": None, "scriptText": {"a": 1}, "analyzedEpisode": stored}
    for number in range(201):
        store.save(T + number, service.Change(to_bytes(document)))
    assert [app.get(f"/api/v1/session/list{query}").json["count"] for query in ("", "?limit=1000")] == [200, 201]
    scenes = [{"sceneNumber": number, "title": "", "totalBeats": 0} for number in (None, 2, "2b")]
    listed = {"episodeNumber": 3, "title": "5", "scenes": scenes}
    assert app.get("/api/v1/session/list?limit=1").json["sessions"] == [
        {"timestamp": T + 200, "storyUuid": "", "promptMode": "", "scriptText": '{"a":1}', "analyzedEpisode": listed}
    ]


# -------------------------------------------------------------------------------- killed services ----


@pytest.mark.slow
def test_another_service_takes_over_from_a_killed_one(start_service, own_redis, connect, tmp_path):
    own = own_redis("--save", "")
    client = connect(own.url)

    def start(name: str) -> Service:
        return start_service(REDIS_URL=own.url, STORYTELLER_DATA_DIR=str(tmp_path / name))

    def wait_until_noticed(words: str) -> None:
        wait_until(lambda: client.get(f"session:{T}") == json.dumps(story(words)))

    first = start("first")
    wait_until(lambda: client.exists(service.BridgedStore.LEASE))
    second = start("second")
    StoryArtServer(client).save(story("by the first"))
    wait_until_noticed("by the first")
    first.process.kill()
    StoryArtServer(client).save(story("by the second"))
    wait_until_noticed("by the second")
    second.process.kill()
    StoryArtServer(client).save(story("BY THE SECOND"))  # of the same length
    start("third")
    wait_until_noticed("BY THE SECOND")


def prompt_of(timestamp: int, beat: int) -> str:
    return f"the prompt of beat {beat} of {timestamp}"


@pytest.mark.slow
@pytest.mark.skipif(service.WINDOWS, reason="a start takes seconds there")
def test_services_killed_at_random_keep_both_programs_in_step(start_service, module_copy, own_redis, connect, tmp_path):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    text = module_copy.read_text("utf-8")
    for before, after in (
        ("INTERVAL, LEASE = 2.0, 6000", "INTERVAL, LEASE = 0.05, 300"),
        ("RECHECK_WAITING, RECHECK, SPREAD = 7.0, 44.0, 12", "RECHECK_WAITING, RECHECK, SPREAD = 0.2, 0.3, 1"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    module_copy.write_text(text, "utf-8")
    own = own_redis("--save", "")
    client = connect(own.url)
    storyart, storyswarm = StoryArtServer(client), StorySwarm(client)
    sessions = [T + number for number in range(3)]
    beats = 30
    edits = itertools.count()
    words: dict[int, str] = {}  # of the last edit, unless a PUT may have replaced it
    done: dict[int, set[int]] = {timestamp: set() for timestamp in sessions}  # the beats that have a prompt
    read = {timestamp: story("0", *[None] * beats, timestamp=timestamp) for timestamp in sessions}
    announced: dict[tuple[str, int], set[str]] = {}

    def start(number: int) -> Service:
        return start_service(REDIS_URL=own.url, STORYTELLER_DATA_DIR=str(tmp_path / f"instance {number}"))

    instances = [start(0), start(1)]
    wait_until(lambda: client.exists(service.BridgedStore.MET))

    def edit(timestamp: int) -> None:
        """StoryArt's page saves what it shows, which may be older than StorySwarm's last write."""
        shown: list[Any] = [None] * beats
        if chance.random() < 0.5 and client.exists(f"storyart:session:{timestamp}"):
            (scene,) = storyart.load(timestamp)["analyzedEpisode"]["scenes"]
            shown = [beat.get("prompts", {}).get("cinematic") for beat in scene["beats"]]
        words[timestamp] = f"{next(edits)} {'x' * 3_000}"
        storyart.save(story(words[timestamp], *shown, timestamp=timestamp))

    def read_it(timestamp: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, answer = chance.choice(instances).call("GET", f"/api/v1/session/{timestamp}")
            read[timestamp] = answer["data"] if status == 200 else read[timestamp]

    def prompt(timestamp: int) -> None:
        """StorySwarm writes all its prompts and a new one into the session as it read it some time ago."""
        beat = chance.randrange(beats)
        if write(timestamp, done[timestamp] | {beat}):
            done[timestamp].add(beat)

    def write(timestamp: int, written: set[int]) -> bool:
        document = json.loads(json.dumps(read[timestamp]))
        for number, beat in enumerate(document["analyzedEpisode"]["scenes"][0]["beats"]):
            if number in written:
                beat["prompts"] = {"cinematic": prompt_of(timestamp, number)}
        way = chance.choice(["PUT", "its key", "latest"])
        if way == "PUT":
            words.pop(timestamp, None)
            with contextlib.suppress(OSError, http.client.HTTPException):
                return chance.choice(instances).call("PUT", f"/api/v1/session/{timestamp}", document)[0] == 200
            return False
        if way == "latest" and timestamp == sessions[-1]:
            storyswarm.write_latest(document)
        else:
            storyswarm.write(document)
        return True

    def kill(timestamp: int) -> None:
        number = chance.randrange(2)
        instances[number].process.kill()
        instances[number].stop()
        instances[number] = start(number)

    def poll(timestamp: int) -> None:
        running = chance.choice(instances)
        with contextlib.suppress(OSError, http.client.HTTPException):
            _, answer = running.call("GET", "/api/v1/notifications/check?type=all")
            for found in answer.get("notifications", ()):
                announced.setdefault((found["type"], found["sessionTimestamp"]), set()).add(found["id"])
                running.call("POST", f"/api/v1/notifications/{found['id']}/ack")

    def are_in_step() -> bool:
        poll(0)
        swarms, arts = [list(map(program.load, sessions)) for program in (storyswarm, storyart)]
        for timestamp, document in zip(sessions, swarms):
            service.to_storyart(document, timestamp, lambda: None)
        is_final = {document["scriptText"] for document in arts} == {"final"}
        return is_final and swarms == arts and client.get("session:latest") == client.get(f"session:{sessions[-1]}")

    def images() -> list[list[str]]:
        return [storyart.make_images(timestamp) for timestamp in sessions]

    for timestamp in sessions:
        edit(timestamp)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        act = chance.choices([edit, read_it, prompt, poll, kill], [10, 10, 10, 5, 0.5])[0]
        act(chance.choice(sessions))
        time.sleep(chance.choice([0, 0, 0.005, 0.05]))
    for timestamp in sessions:
        assert storyart.load(timestamp)["scriptText"] == words.get(timestamp, storyart.load(timestamp)["scriptText"])
        wait_until(lambda: storyswarm.load(timestamp)["scriptText"] == storyart.load(timestamp)["scriptText"])  # noqa: B023
        storyart.save(story("final", *[None] * beats, timestamp=timestamp))
    wait_until(are_in_step)
    for timestamp, prompts in zip(sessions, images()):
        assert {prompt_of(timestamp, beat) for beat in done[timestamp]} <= set(prompts)
        read_it(timestamp)
        assert write(timestamp, set(range(beats)))
    complete = [[prompt_of(timestamp, beat) for beat in range(beats)] for timestamp in sessions]
    wait_until(lambda: images() == complete and are_in_step())
    wait_until(lambda: poll(0) or len([kind for kind, _ in announced if kind == PROMPTS]) == len(sessions))
    assert {kind: len(ids) for kind, ids in announced.items()} == dict.fromkeys(announced, 1)


# ======================================================================================================
# The server, in this process
# ======================================================================================================


class LocalService:
    """The service on a store, in this process, and a persistent connection to it."""

    def __init__(self, served: Serving, services: service.Services) -> None:
        self.port = served.port
        self.server = served.server
        self.services = services
        self.connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON. The whole request is sent at once, as by a browser."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Host": "localhost", **BEARER, "Content-Type": "application/json", **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self.connection.sendall("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        status, answered, content = answer_of(self.connection, method)
        return status, dict(answered), json.loads(content or b"null")

    def close(self) -> None:
        self.connection.close()

    def app(self) -> webtest.TestApp:
        """The same service without the server."""
        return webtest.TestApp(
            service.create_app(self.services), extra_environ={"HTTP_AUTHORIZATION": f"Bearer {TOKEN}"}
        )

    def in_flight(self) -> int:
        """The number of connections that wait for a response."""
        return sum(bool(channel.requests) for channel in self.server._channels())

    def check(self, query: str = "") -> list[str]:
        """The ids of the pending notifications."""
        status, _, answer = self.ask("GET", f"/api/v1/notifications/check{query}")
        assert status == 200, answer
        return [notification["id"] for notification in answer["notifications"]]

    def is_ready(self, timestamp: int = T) -> Any:
        status, _, answer = self.ask("GET", f"/api/v1/session/{timestamp}/prompts-status")
        assert status == 200, answer
        return answer["promptsReady"]


@pytest.fixture
def fail_once(monkeypatch) -> Callable[[Any, str, Exception], None]:
    """Makes the next call of a method raise this error."""

    def patch(owner: Any, name: str, error: Exception) -> None:
        method, errors = getattr(owner, name), [error]

        def call(*arguments: Any, **named: Any) -> Any:
            if errors:
                raise errors.pop()
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    return patch


@pytest.fixture
def poll_service(make_services, serving) -> Iterator[Callable[..., LocalService]]:
    with contextlib.ExitStack() as stack:

        def make(store: service.Store | None = None, **changed: Any) -> LocalService:
            services = make_services(store, **changed)
            return stack.enter_context(
                contextlib.closing(LocalService(serving(service.create_app(services)), services))
            )

        yield make


@pytest.fixture
def polled(poll_service, store) -> LocalService:
    """On both stores."""
    return poll_service(store)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/api/v1/gpu/status"),
        ("GET", "/api/v1/notifications/check?type=all&limit=2"),
        ("GET", f"/api/v1/session/{T}/prompts-status"),
        ("GET", f"/api/v1/session/{T}"),
        ("GET", "/api/v1/session/1"),
        ("OPTIONS", "/api/v1/gpu/status"),
        ("DELETE", "/api/v1/gpu/status"),
        ("GET", "/nothing%FF"),
    ],
)
def test_the_server_and_the_wsgi_application_give_the_same_response(polled, store, method, path):
    store.save(T, service.Change(json.dumps({**make_session(size=1000), "promptMode": "storyart"}).encode()))
    for number in range(3):
        add(store, service.Draft(PROMPTS, T + number, {"totalPrompts": number}))
    status, headers, body = polled.ask(method, path, Origin=PAGE)
    wsgi = webtest.TestApp(service.create_app(polled.services)).request(
        path, method=method, headers={**BEARER, "Origin": PAGE}, expect_errors=True
    )
    assert (status, body) == (wsgi.status_int, wsgi.json if wsgi.body else None)
    for received in (headers, wsgi.headers):
        assert re.fullmatch(r"[0-9a-f]{16}", received.pop("X-Request-Id"))
    assert abs(email.utils.mktime_tz(email.utils.parsedate_tz(headers.pop("Date"))) - time.time()) < 60
    headers.pop("Connection", None)
    assert headers == dict(wsgi.headers)


def test_a_request_takes_one_poll_of_the_sockets(polled, monkeypatch):
    """The server waits for its response before it polls again."""
    monkeypatch.setattr(service, "RESPONSE_WAIT", PATIENCE)
    polls = []
    poll = polled.server._dispatcher.poll
    monkeypatch.setattr(polled.server._dispatcher, "poll", lambda seconds: (polls.append(seconds), poll(seconds)))
    for _ in range(10):
        assert polled.check() == []
    assert len(polls) <= 12


@pytest.mark.parametrize(
    ("size", "thread"),
    [(100, "server"), (service.SMALL_BODY + 1, "pool_"), (service.LARGE_BODY + 1, "large-bodies_")],
)
def test_the_size_of_a_body_decides_which_thread_parses_it(poll_service, monkeypatch, size, thread):
    polled, parse, threads = poll_service(), service.parse_json, []

    def record_thread(data: bytes, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parse(data, **options)

    monkeypatch.setattr(service, "parse_json", record_thread)
    assert polled.ask("PUT", "/api/v1/session/5", {"scriptText": "x" * size})[0] == 200
    assert threads[0].startswith(thread)


def test_a_change_by_another_instance_is_seen_by_the_next_check(polled, twin):
    assert [polled.check(), polled.check()] == [[], []]
    ids = [json.loads(add(twin, draft(session=T + number))[0])["id"] for number in range(3)]
    assert polled.check() == polled.check() == ids
    acknowledge(twin, ids[1])
    assert polled.check() == [ids[0], ids[2]]


def test_an_expired_notification_is_gone_from_the_next_check(polled, store, clock):
    add(store, draft())
    assert len(polled.check()) == 1
    clock.now += WEEK
    assert polled.check() == []


def test_a_check_finds_a_notification_behind_many_of_another_type(polled, store):
    for number in range(250):
        add(store, draft(BEATS, T + number))
    id = json.loads(add(store, draft())[0])["id"]
    assert [polled.check() for _ in range(4)] == [[id]] * 4


UNREADY, READY = (json.dumps(episode({"prompts": {"cinematic": text}})).encode() for text in (" ", "x"))


def test_a_save_by_another_instance_is_seen_by_the_next_poll(polled, store, twin):
    """Even if the documents have the same length and the same time of update."""
    assert len(UNREADY) == len(READY)
    store.save(T, service.Change(UNREADY))
    assert [polled.is_ready(), polled.is_ready()] == [False, False]
    twin.save(T, service.Change(READY))
    assert [polled.is_ready(), polled.is_ready()] == [True, True]


@pytest.mark.parametrize("key", ["session:{}", "storyart:session:{}"])
def test_a_session_written_by_another_program_is_seen_by_the_next_poll(poll_service, redis_store, other_program, key):
    polled = poll_service(redis_store)
    longer = json.dumps(episode(READY_BEAT, {}))
    for document, ready in [(READY, True), (UNREADY, False), (READY, True), (longer, False)]:
        other_program.set(key.format(T), document)
        assert [polled.is_ready(), polled.is_ready()] == [ready, ready]
    other_program.delete(key.format(T))
    assert polled.ask("GET", f"/api/v1/session/{T}/prompts-status")[0] == 404


def test_a_session_that_a_poll_finds_ready_is_announced_once(poll_service, redis_store, other_program):
    polled = poll_service(redis_store)
    document = {**make_session(size=1000, prompts=0), "timestamp": T}
    redis_store.save(T, service.Change(json.dumps(document).encode()))
    assert [polled.is_ready() for _ in range(3)] == [False] * 3
    other_program.set(f"session:{T}", json.dumps({**make_session(size=1000), "timestamp": T}))
    assert [polled.is_ready() for _ in range(4)] == [True] * 4
    assert len(polled.check()) == 1


def test_a_failed_announcement_is_retried_by_the_next_poll(polled, store, fail_once):
    store.save(T, service.Change(json.dumps(make_session(size=1000)).encode()))
    fail_once(store, "announce", service.Unavailable("no room"))
    assert [polled.is_ready(), polled.check()] == [True, []]
    assert [polled.is_ready(), len(polled.check())] == [True, 1]


@pytest.mark.parametrize(
    ("path", "method"),
    [
        pytest.param("/api/v1/notifications/check", "snapshot", id="check"),
        pytest.param(f"/api/v1/session/{T}/prompts-status", "read_sessions", id="prompts-status"),
    ],
)
def test_requests_that_arrive_during_a_read_share_the_next_one(poll_service, sqlite_store, monkeypatch, path, method):
    polled, reads, may_continue = poll_service(sqlite_store), [], threading.Event()
    sqlite_store.save(T, service.Change(READY))
    read = getattr(sqlite_store, method)

    def read_slowly(*arguments: Any) -> Any:
        reads.append(arguments)
        assert may_continue.wait(PATIENCE)
        return read(*arguments)

    monkeypatch.setattr(sqlite_store, method, read_slowly)
    with send_requests(polled.port, [request_of("GET", path)] * 20) as clients:
        wait_until(lambda: polled.in_flight() == 20)
        may_continue.set()
        assert {answer_of(client)[0] for client in clients} == {200}
    assert len(reads) <= 3


@pytest.mark.parametrize(
    ("batcher", "method", "path", "status"),
    [
        ("checks", "GET", "/api/v1/notifications/check", 200),
        ("progress", "GET", f"/api/v1/session/{T}/prompts-status", 404),
        ("creations", "POST", "/api/v1/notifications", 201),
        ("acknowledgements", "POST", "/api/v1/notifications/nobody/ack", 404),
    ],
)
def test_a_failed_batch_is_a_500_and_the_next_one_succeeds(poll_service, fail_once, batcher, method, path, status):
    polled = poll_service()
    fail_once(getattr(polled.services, batcher), "_step", RuntimeError("an internal error"))
    assert [polled.ask(method, path, MADE)[0] for _ in range(2)] == [500, status]


def test_an_unusable_pending_set_fails_checks_but_not_prompts_status(poll_service, redis_store, other_program):
    other_program.set("notifications:pending", "of another program")
    polled = poll_service(redis_store)
    redis_store.save(T, service.Change(READY))
    with send_requests(polled.port, [POLL, request_of("GET", f"/api/v1/session/{T}/prompts-status")] * 10) as clients:
        assert [answer_of(client)[0] for client in clients] == [503, 200] * 10


def test_60_concurrent_gets_of_a_large_session_all_succeed(poll_service, redis_store):
    polled = poll_service(redis_store)
    redis_store.save(T, service.Change(json.dumps(make_session()).encode()))
    with send_requests(polled.port, [request_of("GET", f"/api/v1/session/{T}")] * 60) as clients:
        assert {answer_of(client)[0] for client in clients} == {200}


def test_a_request_that_gets_no_thread_in_time_is_a_503_with_retry_after(poll_service, monkeypatch):
    monkeypatch.setattr(service, "POOL_TIMEOUT", 0.0)
    status, headers, answer = poll_service().ask("GET", "/api/v1/session/latest")
    assert (status, headers["Retry-After"], answer["success"]) == (503, "1", False)


def test_a_thread_that_cannot_start_fails_only_one_request(poll_service, fail_once):
    polled = poll_service()
    fail_once(threading.Thread, "start", RuntimeError("can't start new thread"))
    assert [polled.ask("GET", "/api/v1/session/5")[0] for _ in range(2)] == [500, 404]


@pytest.mark.parametrize("uri", ["http://[/x", "http://[::1/api/v1/gpu/status"])
def test_a_malformed_absolute_uri_is_a_400(poll_service, uri):
    assert exchange(poll_service().port, f"GET {uri} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())[0] == 400


def pipelined_responses(port: int, paths: list[str]) -> list[dict[str, Any]]:
    """Status and JSON of the responses to GETs that are sent at once on one connection."""
    responses, requests = [], "".join(request_of("GET", path) for path in paths)
    with send_request(port, requests) as client, client.makefile("rb") as stream:
        for _ in paths:
            status = int(stream.readline().split()[1])
            length = int(http.client.parse_headers(stream)["Content-Length"])
            responses.append({"status": status, **json.loads(stream.read(length))})
    return responses


def test_pipelined_requests_are_answered_in_order(polled, store):
    store.save(T, service.Change(READY))
    paths = ["/api/v1/notifications/check", f"/api/v1/session/{T}/prompts-status", f"/api/v1/session/{T}"] * 10
    responses = pipelined_responses(polled.port, paths)
    assert {response["status"] for response in responses} == {200}
    keys = ["notifications", "promptsReady", "data"]
    assert [[key for key in keys if key in response] for response in responses] == [[key] for key in keys] * 10


def test_large_responses_to_pipelined_requests_arrive_whole(poll_service):
    polled = poll_service()
    assert polled.ask("PUT", "/api/v1/session/5", LARGE)[0] == 200
    responses = pipelined_responses(polled.port, ["/api/v1/session/5"] * 4)
    assert [response["data"] == {**LARGE, "timestamp": 5} for response in responses] == [True] * 4


def test_400_waiting_starts_need_no_threads_and_leave_nothing_behind(poll_service, swarmui_folder, leash, settings):
    polled = poll_service(swarmui_path=swarmui_folder(delay=3600), start_timeout=3600.0)
    start = request_of("POST", "/api/v1/swarmui/start", "Content-Length: 0")
    with send_request(polled.port, start):
        leash.next()
        threads = threading.active_count()
        with send_requests(polled.port, [start] * 399):
            wait_until(lambda: polled.in_flight() == 400)
            assert threading.active_count() == threads
            assert [polled.check() for _ in range(20)] == [[]] * 20
    wait_until(lambda: polled.in_flight() == 0)
    wait_until(lambda: len(polled.server._channels()) == 1)
    assert [polled.check() for _ in range(20)] == [[]] * 20
    assert leash.count_further() == 0


@pytest.mark.parametrize("size", [100, 200_000, service.LARGE_BODY + 1])
def test_a_request_is_carried_out_even_if_its_client_has_left(poll_service, store, size):
    polled = poll_service(store)
    body = json.dumps({"scriptText": "x" * size})
    head = request_of("PUT", "/api/v1/session/5", "Content-Type: application/json", f"Content-Length: {len(body)}")
    send_request(polled.port, head + body).close()
    wait_until(lambda: polled.ask("GET", "/api/v1/session/5")[0] == 200)
    id = json.loads(add(store, draft())[0])["id"]
    send_request(polled.port, request_of("POST", f"/api/v1/notifications/{id}/ack", "Content-Length: 0")).close()
    wait_until(lambda: polled.check() == [])


@pytest.mark.parametrize("path", ["/health", "/api/v1/notifications/check", "/api/v1/session/latest", "/nowhere"])
def test_a_client_that_shuts_down_its_sending_side_gets_its_response(poll_service, path):
    with send_request(poll_service().port, request_of("GET", path)) as client:
        client.shutdown(socket.SHUT_WR)
        assert answer_of(client)[0] in (200, 404)
        assert client.recv(1) == b""


def test_an_incomplete_request_does_not_time_out_behind_a_pending_one(poll_service, swarmui_folder, leash, monkeypatch):
    monkeypatch.setattr(service, "REQUEST_TIMEOUT", 0.1)
    polled = poll_service(swarmui_path=swarmui_folder(delay=1.5), start_timeout=PATIENCE)
    start = request_of("POST", "/api/v1/swarmui/start", "Content-Length: 0")
    with send_request(polled.port, start + POLL[:-2]) as client:
        assert answer_of(client)[0] == 200
        client.sendall(b"\r\n")
        assert answer_of(client)[0] == 200


def test_a_client_that_leaves_while_it_waits_does_not_affect_others(poll_service, forwarder):
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        polled = poll_service(store)
        assert polled.check() == []
        forwarder.hang()
        with send_requests(polled.port, [POLL] * 2) as (leaving, staying):
            wait_until(lambda: polled.in_flight() == 2)
            leaving.close()
            forwarder.restore()
            assert answer_of(staying)[0] == 200
            staying.sendall(POLL.encode())
            assert answer_of(staying)[0] == 200
        assert polled.check() == []


@pytest.mark.parametrize(("method", "level"), [("POST", "INFO"), ("GET", "DEBUG")])
def test_a_request_whose_client_leaves_while_it_waits_is_one_log_line_and_no_response(
    poll_service, store, nvidia_smi, tmp_path, caplog, method, level
):
    caplog.set_level("DEBUG", "storyteller")
    release = tmp_path / "release"
    polled = poll_service(store, nvidia_smi=nvidia_smi({**GOOD, "after": str(release)}, {}))
    assert polled.ask("POST", RESERVATION, {"holder": "first", "ttlSeconds": 60})[0] == 201
    status = request_of("GET", "/api/v1/gpu/status")
    with send_request(polled.port, status) as running:
        wait_until((tmp_path / "runs").exists)
        with wait_for_gpu(polled.port, "leaves") if method == "POST" else send_request(polled.port, status):
            wait_until(lambda: polled.in_flight() == 2)
        wait_until(lambda: polled.in_flight() == 1)
        release.touch()
        assert answer_of(running)[0] == 200
    path = RESERVATION if method == "POST" else "/api/v1/gpu/status"
    (record,) = [record for record in caplog.records if " 499 " in record.getMessage()]
    assert record.levelname == level
    assert re.fullmatch(rf"http: {method} {path} 499 api-token \d+\.\d ms [0-9a-f]{{16}}", record.getMessage())
    assert {status for _, _, status in polled.services.responses} == {200, 201}


def test_a_response_that_cannot_be_sent_closes_only_its_connection(poll_service, fail_once, caplog):
    polled = poll_service()
    fail_once(service.Activity, "responded", RuntimeError("an internal error"))
    with send_request(polled.port, POLL) as client, contextlib.suppress(ConnectionError):
        client.makefile("rb").read()  # until it is closed
    assert "an internal error" in caplog.text
    assert polled.check() == []


def test_waitress_has_the_internals_that_the_server_uses():
    """If this fails after an update, see the section "Server: waitress's internals"."""
    for names, reason in service.WAITRESS_NAMES.items():
        for name in names.split():
            module, *attributes = name.split(".")
            found = importlib.import_module(f"waitress.{module}")
            for attribute in attributes:
                found = getattr(found, attribute, None)
                assert found is not None or attribute == "error", f"{name}: {reason}"
    create = inspect.signature(service.waitress.server.create_server).parameters
    assert {"map", "_dispatcher"} <= set(create), next(iter(service.WAITRESS_NAMES.values()))
    channel = service.waitress.channel.HTTPChannel
    assert (channel.request, channel.total_outbufs_len, channel.close_when_flushed) == (None, 0, False)


# ======================================================================================================
# Live
# ======================================================================================================

EVENTS, CHECK = "/api/v1/events", "/api/v1/notifications/check"
MADE = {**NOTIFICATION, "totalPrompts": 1}


class EventStream:
    """A client of the event stream."""

    def __init__(self, port: int, query: str = "", last: str = "", token: str = TOKEN) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        headers = {"Authorization": f"Bearer {token}", **({"Last-Event-ID": last} if last else {})}
        self.connection.request("GET", EVENTS + query, headers=headers)
        self.response = self.connection.getresponse()
        self.last = last

    def next_block(self) -> dict[str, str]:
        """The fields of the next event or comment; none at the end."""
        found: dict[str, str] = {}
        while line := self.response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            found[name] = value
        self.last = found.get("id", self.last)
        return found

    def next_event(self, *types: str) -> dict[str, str]:
        """The fields of the next event of one of these types, of any if none is given; none at the end."""
        deadline = time.monotonic() + PATIENCE
        while found := self.next_block():
            assert time.monotonic() < deadline, "comments alone"
            if "event" in found and (not types or found["event"] in types):
                break
        return found

    def next(self, *types: str) -> Any:
        """The data of that event; None at the end."""
        found = self.next_event(*types)
        return json.loads(found["data"]) if found else None

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@pytest.fixture
def listen() -> Iterator[Callable[..., EventStream]]:
    with contextlib.ExitStack() as stack:

        def make(polled: Any, *arguments: Any, **named: Any) -> EventStream:
            return stack.enter_context(contextlib.closing(EventStream(polled.port, *arguments, **named)))

        yield make


@pytest.fixture
def fast_polling(monkeypatch) -> None:
    monkeypatch.setattr(service.Live, "INTERVAL", 0.02)


def create_notification(polled: LocalService, session: int = T, **fields: Any) -> Any:
    status, _, made = polled.ask("POST", "/api/v1/notifications", {**MADE, "sessionTimestamp": session, **fields})
    assert status == 201
    return made


def member_of_another_program(id: str, **fields: Any) -> str:
    return json.dumps({"id": id, "type": PROMPTS, "sessionTimestamp": T, "totalPrompts": 3, **fields})


def timestamps_in(state: dict[str, Any]) -> list[int]:
    return [session["sessionTimestamp"] for session in state["sessions"]]


def listeners(polled: LocalService) -> int:
    return polled.services.live.count_listeners(None)


def test_a_stream_starts_with_the_state_and_continues_with_changes(polled, listen):
    before = create_notification(polled, T)
    polled.ask("PUT", f"/api/v1/session/{T}", with_beats(OPEN, promptMode="storyart"))
    events = listen(polled)
    assert (events.response.status, events.response.headers["Content-Type"]) == (200, "text/event-stream")
    state = events.next()
    assert list(state) == [
        "gpu", "gpuHistory", "reservation", "swarmui", "notifications", "sessions", "alerts", "service",
    ]  # fmt: skip
    assert (state["notifications"], [session["step"] for session in state["sessions"]]) == ([before], ["beats_ready"])
    assert list(state["service"]) == ["version", "store", "storeUp", "startedAt", "addresses", "now", "tokensEnding"]
    assert (state["service"]["store"], state["service"]["storeUp"]) == (polled.services.store.name, True)
    assert [state["swarmui"].keys(), state["gpu"].keys()] == [
        polled.ask("GET", "/api/v1/swarmui/status")[2].keys(),
        {**polled.ask("GET", "/api/v1/gpu/status")[2], "at": 0}.keys(),
    ]
    made = create_notification(polled, T + 1)
    assert events.next("notification") == made
    polled.ask("POST", f"/api/v1/notifications/{made['id']}/ack")
    assert events.next("acknowledged") == {"id": made["id"], "type": PROMPTS, "sessionTimestamp": T + 1}


def test_what_this_service_changes_is_an_event_before_the_next_poll(polled, listen, monkeypatch):
    for name in ("INTERVAL", "PENDING_INTERVAL"):
        monkeypatch.setattr(service.Live, name, 3600.0)
    events, path = listen(polled, "?types=notification,acknowledged,session"), "/api/v1/notifications"
    events.next()
    ids = [create_notification(polled, T + number)["id"] for number in range(3)]
    polled.ask("POST", f"{path}/{ids[0]}/ack")
    polled.ask("POST", f"{path}/ack", {"ids": [ids[1]]})
    polled.ask("DELETE", f"{path}/{ids[2]}")
    assert [events.next()["id"] for _ in range(6)] == ids * 2
    for method, body, step in (("PUT", SESSION, "saved"), ("DELETE", None, "deleted")):
        polled.ask(method, f"/api/v1/session/{T}", body)
        assert events.next()["step"] == step
    polled.services.store.save(T, service.Change(json.dumps(with_beats(DONE)).encode()))  # as another program does
    assert polled.is_ready()
    assert events.next("notification")["type"] == PROMPTS


@pytest.mark.usefixtures("fast_polling")
def test_each_step_of_a_session_is_one_event_in_order(polled, listen):
    events = listen(polled, "?types=session")
    assert list(events.next()) == ["sessions", "service"]
    steps = []
    for document in (SESSION, with_beats(OPEN, OPEN), with_beats(DONE, OPEN), with_beats(DONE, DONE)):
        polled.ask("PUT", f"/api/v1/session/{T}", document)
        steps.append(events.next())
    for id in polled.check("?type=all"):
        polled.ask("POST", f"/api/v1/notifications/{id}/ack")
    steps.append(events.next())
    assert [(step["step"], step["totalPrompts"], step["promptsNeeded"]) for step in steps] == [
        ("saved", 0, 0), ("beats_ready", 0, 2), ("prompts", 1, 2), ("ready", 2, 2), ("acknowledged", 2, 2),
    ]  # fmt: skip
    assert list(steps[0]) == [
        "sessionTimestamp", "step", "totalBeats", "totalPrompts", "promptsNeeded", "title", "episodeNumber",
        "storyUuid", "lastUpdated",
    ]  # fmt: skip
    polled.ask("PUT", f"/api/v1/session/{T + 1}", SESSION)
    assert events.next()["sessionTimestamp"] == T + 1


@pytest.mark.usefixtures("fast_polling")
def test_a_session_whose_notification_could_not_be_read_yet_does_not_count_as_acknowledged(
    polled, twin, listen, monkeypatch
):
    events, acknowledged, faults = listen(polled, "?types=session"), polled.services.store.acknowledged, ["away"]
    events.next()

    def fail_first(ids: list[str]) -> set[str]:
        if ids and faults:
            raise service.Unavailable(faults.pop())
        return acknowledged(ids)

    monkeypatch.setattr(polled.services.store, "acknowledged", fail_first)
    twin.save(T, service.Change(json.dumps(with_beats(DONE)).encode(), draft=draft()))
    assert events.next("session")["step"] == "ready"
    assert not faults


@pytest.mark.usefixtures("fast_polling")
def test_deletions_are_events(polled, listen):
    made = create_notification(polled, T)
    for timestamp in (T, T + 1, 0):
        polled.ask("PUT", f"/api/v1/session/{timestamp}", SESSION)
    events = listen(polled)
    events.next()
    polled.ask("DELETE", f"/api/v1/notifications/{made['id']}")
    assert events.next("acknowledged")["id"] == made["id"]
    for timestamp in (T, 0):
        polled.ask("DELETE", f"/api/v1/session/{timestamp}")
        assert events.next("session") == {"sessionTimestamp": timestamp, "step": "deleted"}
    assert timestamps_in(listen(polled).next()) == [T + 1]


@pytest.mark.usefixtures("fast_polling")
def test_a_session_whose_document_becomes_invalid_is_published_as_deleted(
    poll_service, redis_store, other_program, listen
):
    redis_store.save(T, service.Change(b'{"scriptText": "x"}'))
    polled = poll_service(redis_store)
    events = listen(polled, "?types=session")
    assert timestamps_in(events.next()) == [T]
    other_program.set(f"session:{T}", "no JSON")
    assert events.next("session") == {"sessionTimestamp": T, "step": "deleted"}
    assert timestamps_in(listen(polled, "?types=session").next()) == []


@pytest.mark.usefixtures("fast_polling")
def test_a_session_that_leaves_the_newest_ones_is_not_published_as_deleted(poll_service, store, listen, monkeypatch):
    monkeypatch.setattr(service.SessionChanges, "NEWEST", 2)
    polled = poll_service(store)
    for timestamp in (T, T + 1):
        polled.ask("PUT", f"/api/v1/session/{timestamp}", SESSION)
    events = listen(polled, "?types=session")
    events.next()
    polled.ask("PUT", f"/api/v1/session/{T + 2}", SESSION)
    assert events.next()["sessionTimestamp"] == T + 2


@pytest.mark.usefixtures("fast_polling")
def test_changes_by_another_instance_are_events(polled, twin, listen):
    events = listen(polled, "?types=notification,acknowledged,session")
    events.next()
    id = json.loads(add(twin, draft())[0])["id"]
    assert events.next("notification")["id"] == id
    assert acknowledge(twin, id)
    assert events.next("acknowledged")["id"] == id
    twin.save(T, service.Change(json.dumps(with_beats(OPEN)).encode()))
    assert events.next("session")["step"] == "beats_ready"


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize(
    "score",
    [
        pytest.param(T, id="the same time"),
        pytest.param(service.now_ms() // 1000, id="seconds"),
        pytest.param(service.now_ms() + 3_000, id="the future"),
    ],
)
def test_members_added_by_another_program_are_events_whatever_their_score(
    poll_service, redis_store, other_program, score, listen
):
    polled = poll_service(redis_store)
    redis_store._clock = lambda: T if score == T else service.now_ms()
    events = listen(polled, "?types=notification,acknowledged")
    events.next()
    for number in range(2):
        member = member_of_another_program(f"x-{number}")
        other_program.zadd("notifications:pending", {member: score - number, b"no JSON": score})
        assert events.next("notification")["id"] == f"x-{number}"
    other_program.zrem("notifications:pending", member)
    assert events.next()["id"] == "x-1"
    other_program.set("notifications:ack:x-0", "1")
    assert events.next() == {"id": "x-0", "type": PROMPTS, "sessionTimestamp": T}
    other_program.delete("notifications:pending")
    made = create_notification(polled, T + 5)
    assert events.next() == made  # the end of x-0 was published already


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize("score", ["inf", 1e300])
def test_an_absurd_score_stops_neither_events_nor_alerts(poll_service, redis_store, other_program, listen, score):
    member = member_of_another_program("x", timestamp="2026-01-29T10:00:00Z")
    other_program.zadd("notifications:pending", {member: score})
    polled = poll_service(redis_store)
    events = listen(polled, "?types=notification")
    assert [notification["id"] for notification in events.next()["notifications"]] == ["x"]
    made = create_notification(polled)
    assert events.next() == made
    add(redis_store, draft(session=T + 1))
    assert events.next()["sessionTimestamp"] == T + 1
    assert len(polled.services.observer.look(0.0).pending) == 3


@pytest.mark.slow
def test_events_are_fast_even_with_50000_pending_notifications(poll_service, redis_store, other_program, listen):
    polled = poll_service(redis_store)

    def median_seconds() -> float:
        durations = []
        for number in range(20):
            began = time.monotonic()
            made = create_notification(polled, T + number)
            assert events.next("notification") == made
            polled.ask("POST", f"/api/v1/notifications/{made['id']}/ack")
            assert events.next("acknowledged")["id"] == made["id"]
            durations.append(time.monotonic() - began)
        return sorted(durations)[10]

    events = listen(polled, "?types=notification,acknowledged")
    median_without = median_seconds()
    for part in range(50):
        members = [member_of_another_program(f"x-{part}-{number}") for number in range(1000)]
        other_program.zadd("notifications:pending", dict.fromkeys(members, service.now_ms() - 1000))
    events = listen(polled, "?types=notification,acknowledged")
    assert len(events.next()["notifications"]) == 100
    assert median_seconds() < 40 * median_without  # a scan of them all takes several hundred times as long


def test_of_many_sessions_only_those_that_changed_are_read_again(polled, listen, monkeypatch):
    for number in range(60):
        polled.services.store.save(T + number, service.Change(json.dumps(SESSION).encode()))
    monkeypatch.setattr(service.Live, "INTERVAL", 0.02)
    events = listen(polled, "?types=session")
    assert timestamps_in(events.next()) == [T + 59 - number for number in range(50)]
    store, were_read = polled.services.store, []
    read = store.read_sessions
    monkeypatch.setattr(store, "read_sessions", lambda timestamps: were_read.extend(timestamps) or read(timestamps))
    polled.ask("PUT", f"/api/v1/session/{T + 1}", SESSION)  # not one of the newest
    for number in (15, 30):
        polled.ask("PUT", f"/api/v1/session/{T + number}", SESSION)
        assert events.next()["sessionTimestamp"] == T + number
    assert were_read == [T + 15, T + 30]


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize("failing", [(), (T,)])
def test_a_session_that_moves_up_into_the_newest_ones_is_not_an_event(
    poll_service, redis_store, other_program, listen, monkeypatch, failing
):
    monkeypatch.setattr(service.SessionChanges, "NEWEST", 3)
    polled = poll_service(redis_store)
    for number in range(4):
        redis_store.save(T + number, service.Change(json.dumps(SESSION).encode()))
    events = listen(polled, "?types=session")
    assert timestamps_in(events.next()) == [T + 3, T + 2, T + 1]
    read, left = polled.services.store.read_sessions, [*failing]

    def read_sessions(timestamps: list[int]) -> Any:
        if left and left[0] in timestamps:
            left.clear()
            raise service.Unavailable("Redis is away for a moment.", 1)
        return read(timestamps)

    monkeypatch.setattr(polled.services.store, "read_sessions", read_sessions)
    other_program.delete(f"session:{T + 3}")  # which leaves its index entry
    assert events.next("session") == {"sessionTimestamp": T + 3, "step": "deleted"}
    wait_until(lambda: T in polled.services.live._sessions._published)
    polled.ask("PUT", f"/api/v1/session/{T + 2}", SESSION)
    assert events.next("session")["sessionTimestamp"] == T + 2


@pytest.mark.usefixtures("fast_polling")
def test_a_session_that_another_program_completes_is_announced_without_a_poll(
    poll_service, redis_store, other_program, listen
):
    polled = poll_service(redis_store)
    polled.ask("PUT", f"/api/v1/session/{T}", with_beats(OPEN))
    events = listen(polled, "?types=notification,session")
    events.next()
    other_program.set(f"session:{T}", json.dumps(with_beats(DONE)))
    assert events.next("notification")["type"] == PROMPTS


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize("write", [by_its_key, by_latest])
def test_a_write_by_storyswarm_is_one_event_and_is_announced(
    poll_service, redis_url, other_program, storyart, listen, write
):
    with contextlib.closing(service.BridgedStore(redis_url)) as bridged_store:
        polled = poll_service(bridged_store)
        polled.services.bridge._look()
        storyart.save(story("w", None, None))
        events = listen(polled, "?types=session,notification")
        assert [session["step"] for session in events.next()["sessions"]] == ["beats_ready"]
        write(None, other_program, story("w", "a cat", "a dog"))
        assert [events.next("notification")["type"], events.next()["step"]] == [PROMPTS, "ready"]
        polled.services.bridge._look()
        polled.ask("PUT", f"/api/v1/session/{T + 1}", SESSION)
        assert events.next()["sessionTimestamp"] == T + 1


def test_a_notification_read_before_its_acknowledgement_is_not_published_again(store):
    notifications, events, created = service.Notifications(store), [], []

    def acknowledge_created() -> None:
        while created:
            changes.add(created[0])
            notifications.acknowledge_own([created[0].id])
            changes.forget(created.pop().id)

    changes = service.PendingChanges(store, notifications, lambda *event: events.append(event[0]), acknowledge_created)
    list(changes.look())
    changes.is_initial = False
    created.append(notifications.create([draft()])[0][0])
    list(changes.look())
    assert events == ["notification", "acknowledged"]


def test_a_notification_created_and_acknowledged_during_a_look_is_two_events(redis_store, monkeypatch):
    notifications, events, calls = service.Notifications(redis_store), [], []
    acknowledged = redis_store.acknowledged

    def acknowledge_first(ids: list[str]) -> set[str]:
        if ids and notifications.acknowledge_own(ids) == [True]:
            calls.append(lambda: changes.forget(ids[0]))
        return acknowledged(ids)

    changes = service.PendingChanges(
        redis_store,
        notifications,
        lambda *event: events.append(event[0]),
        lambda: [calls.pop(0)() for _ in tuple(calls)],
    )
    list(changes.look())
    changes.is_initial = False
    ((made, _),) = notifications.create([draft()])
    calls.append(lambda: changes.add(made))
    monkeypatch.setattr(redis_store, "acknowledged", acknowledge_first)
    list(changes.look())
    assert events == ["notification", "acknowledged"]


def test_a_client_that_reconnects_continues_after_its_last_event(polled, listen):
    events = listen(polled, "?types=notification,acknowledged")
    events.next()
    ids = [create_notification(polled, T + number)["id"] for number in range(3)]
    assert [events.next()["id"] for _ in range(2)] == ids[:2]
    last = events.last
    events.close()
    wait_until(lambda: not listeners(polled))
    for id in ids:
        polled.ask("POST", f"/api/v1/notifications/{id}/ack")
    brief = create_notification(polled, T + 9)["id"]
    polled.ask("POST", f"/api/v1/notifications/{brief}/ack")
    events = listen(polled, "?types=notification,acknowledged", last)
    missed = [events.next_event() for _ in range(6)]
    assert [(event["event"], json.loads(event["data"])["id"]) for event in missed] == [
        ("notification", ids[2]), *[("acknowledged", id) for id in ids],
        ("notification", brief), ("acknowledged", brief),
    ]  # fmt: skip
    assert len({event["id"] for event in missed}) == 6
    again = listen(polled, "?types=notification", events.last)
    assert (again.next_block()["id"], again.last) == (events.last, events.last)  # a comment: nothing is new


@pytest.mark.parametrize("last", ["nonsense", "0123abcd-1", "{run}-99999", "{run}--1", "{run}-\u0663", "{run}-1"])
def test_a_client_that_cannot_continue_gets_the_state_again(poll_service, listen, last):
    polled = poll_service()
    events = listen(polled, "?types=notification")
    assert "notifications" in events.next()
    live = polled.services.live
    for _ in range(service.Live.KEPT):
        live.publish("alert", {"kind": "disk"})
    last = last.replace("{run}", live._run_id).encode("utf-8").decode("latin-1")
    assert "notifications" in listen(polled, "?types=notification", last).next()
    number = live._number - service.Live.KEPT + 1
    assert "event" not in listen(polled, "?types=notification", f"{live._run_id}-{number}").next_block()


def test_a_silent_stream_gets_a_comment_with_the_newest_id(poll_service, listen, monkeypatch):
    polled = poll_service()
    events = listen(polled, "?types=session")
    events.next()
    create_notification(polled)
    wait_until(lambda: polled.services.live._events)
    monkeypatch.setattr(service.Live, "KEEPALIVE", 0.0)
    polled.services.live.look_soon()
    comment = events.next_block()
    newest = f"{polled.services.live._run_id}-{polled.services.live._number}"
    assert comment == {"": newest, "id": newest}


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [("?types=gpu,nothing", 400, "types"), ("?types=", 400, "types"), ("?types=gpu,", 400, "types"),
     ("?types=notification,gpu", 403, "gpu:read"), ("?types=session", 403, "sessions:read"), ("", 200, ""),
     ("?types=notification", 200, "")],
)  # fmt: skip
def test_a_stream_contains_only_known_and_permitted_types(make_app, query, status, word):
    app = make_app()
    caller = as_caller(app, make_token(app, "events:read", "notifications:read"))
    response = caller.get(EVENTS + query, status=status)
    if status == 200:
        state = json.loads(response.text.split("data: ")[1])
        assert list(state) == ["notifications", *(["alerts"] if not query else []), "service"]
    else:
        assert word in response.json["error"]


def test_an_event_is_sent_only_to_clients_with_its_permission(poll_service, listen):
    polled = poll_service()
    app = polled.app()
    polled.services.alerts.raised = {kind: service.Alert(kind, "raised", "", T) for kind in ("stuck", "gpu_hot")}
    own, other = listen(polled), listen(polled, token=make_token(app, "events:read", "gpu:read"))
    shown = [[alert["kind"] for alert in stream.next("state")["alerts"]] for stream in (own, other)]
    assert shown == [["stuck", "gpu_hot"], ["gpu_hot"]]
    live = polled.services.live
    live.publish("alert", {"kind": "stuck"})
    live.publish("alert", {"kind": "gpu_hot"})
    assert [own.next("alert")["kind"], own.next("alert")["kind"]] == ["stuck", "gpu_hot"]
    assert other.next("alert")["kind"] == "gpu_hot"


def test_only_who_may_do_what_the_page_may_gets_the_names_of_tokens_that_end_soon(poll_service, listen):
    polled = poll_service()
    polled.services.ending_tokens = "storyart (then)"
    tokens = service.page_token(TOKEN), TOKEN, make_token(polled.app(), *service.PERMISSIONS[1:-1])
    shown = [listen(polled, token=token).next()["service"]["tokensEnding"] for token in tokens]
    assert shown == ["storyart (then)", "storyart (then)", None]


@pytest.mark.usefixtures("fast_polling")
@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_ends_with_its_token(poll_service, listen, how, monkeypatch):
    polled = poll_service()
    app = polled.app()
    token = make_token(app, "events:read")
    ending, staying = listen(polled, token=token), listen(polled)
    for stream in (ending, staying):
        stream.next()
    if how == "revoked":
        as_caller(app, token).delete("/api/v1/auth/session")
    else:
        monkeypatch.setattr(polled.services.authenticator, "_wall_clock", lambda: service.now_ms() + 10**8)
    assert ending.next() is None
    assert create_notification(polled) == staying.next("notification")


@pytest.mark.usefixtures("fast_polling")
def test_changes_of_swarmui_the_gpu_and_its_reservation_are_events(
    poll_service, nvidia_smi, listen, answering, monkeypatch
):
    monkeypatch.setattr(service.Observer, "WATCHED", 0.1)
    monkeypatch.setattr(service.Live, "STATE_WAIT", PATIENCE)
    polled = poll_service(nvidia_smi=nvidia_smi(GOOD, {"print": "41\n"}))
    polled.services.start()
    events = listen(polled, "?types=gpu,reservation,swarmui")
    state = events.next()
    assert (state["gpu"]["available"], state["reservation"], state["swarmui"]["state"]) == (True, None, "stopped")
    assert events.next("gpu")["at"] > state["gpu"]["at"]
    reservation = polled.ask("POST", RESERVATION, {"holder": "a", "ttlSeconds": 60})[2]
    assert events.next("reservation") == {name: reservation[name] for name in ("fence", *HOLDER_KEYS)}
    polled.ask("DELETE", RESERVATION)
    assert events.next("reservation") is None
    answering(b"")  # another program at SwarmUI's port
    assert events.next("swarmui")["state"] == "failed"


@pytest.mark.usefixtures("fast_polling")
def test_what_always_changes_in_the_status_of_swarmui_is_not_an_event(polled, listen, monkeypatch):
    known, seconds = polled.services.swarmui.status(), itertools.count()
    monkeypatch.setattr(polled.services.swarmui, "status", lambda: {**known, "idleFor": next(seconds)})
    events = listen(polled, "?types=swarmui,notification")
    events.next()
    wait_until(lambda: next(seconds) > 20)
    assert create_notification(polled) == events.next()


@pytest.mark.usefixtures("fast_polling")
def test_with_gates_a_gpu_event_says_who_has_reserved_the_gpu_as_its_status_does(
    poll_service, nvidia_smi, listen, monkeypatch
):
    monkeypatch.setattr(service.Live, "STATE_WAIT", PATIENCE)
    polled = poll_service(nvidia_smi=nvidia_smi(GOOD, {"print": "41\n"}), gates=True)
    events = listen(polled, "?types=gpu")
    at = events.next()["gpu"]["at"]
    reservation = polled.ask("POST", RESERVATION, {"holder": "a", "ttlSeconds": 60})[2]
    assert events.next("gpu") == {**polled.ask("GET", STATUS)[2], "at": at}
    polled.ask("DELETE", f"{RESERVATION}/{reservation['reservationId']}")
    wait_until(lambda: events.next("gpu")["available"])


def test_a_listener_that_reads_nothing_is_disconnected_and_others_get_everything(poll_service, listen):
    polled, sent = poll_service(), 0
    with send_request(polled.port, request_of("GET", f"{EVENTS}?types=alert"), 4096):
        events = listen(polled, "?types=alert")
        events.next()
        wait_until(lambda: listeners(polled) == 2)
        while listeners(polled) == 2:
            polled.services.live.publish("alert", {"kind": "disk", "number": sent, "text": "x" * 10_000})
            assert events.next()["number"] == sent
            sent += 1
            assert sent < 200
    assert sent * 10_000 > service.Stream.LIMIT


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_stream_sends_nothing_after_its_end(is_chunked):
    stream = service.Stream()
    stream.open(lambda: None, is_chunked=is_chunked)
    stream.send(b"x")
    stream.close()
    stream.send(b"y")
    assert stream.take() == (b"1\r\nx\r\n0\r\n\r\n" if is_chunked else b"x", True)
    stream.send(b"z")
    assert stream.take() == (b"", True)


@pytest.mark.parametrize("path", [EVENTS, f"{CHECK}?wait=60"])
def test_past_the_limit_of_listeners_others_get_a_503_until_a_client_leaves(poll_service, listen, monkeypatch, path):
    monkeypatch.setattr(service, "LISTENERS", 2)
    polled = poll_service()
    with send_requests(polled.port, [request_of("GET", path)] * 2):
        wait_until(lambda: listeners(polled) + polled.in_flight() == 2)
        for refused in (EVENTS, f"{CHECK}?wait=60"):
            status, headers, _ = polled.ask("GET", refused)
            assert (status, int(headers["Retry-After"]) >= 1) == (503, True)
        assert polled.check() == []
    wait_until(lambda: listeners(polled) + polled.in_flight() == 0)
    assert listen(polled).response.status == 200


def test_a_check_that_has_an_answer_already_needs_no_place(poll_service, monkeypatch):
    monkeypatch.setattr(service, "LISTENERS", 0)
    polled = poll_service()
    assert polled.ask("GET", f"{CHECK}?wait=60")[0] == 503
    made = create_notification(polled)
    assert polled.check("?wait=60") == [made["id"]]


def test_listeners_and_waiting_checks_need_no_thread_each(polled, listen):
    streams = [listen(polled, "?types=notification")]
    threads = threading.active_count()
    streams += [listen(polled, "?types=notification") for _ in range(39)]
    with send_requests(polled.port, [request_of("GET", f"{CHECK}?wait=60")] * 40) as clients:
        wait_until(lambda: polled.in_flight() == 40)
        assert threading.active_count() < threads + 40
        made = create_notification(polled)
        assert [stream.next("notification") for stream in streams] == [made] * 40
        assert [json.loads(answer_of(client)[2])["notifications"] for client in clients] == [[made]] * 40


def test_a_waiting_check_is_answered_once_something_matches(polled):
    create_notification(polled, type=BEATS, totalBeats=1)
    with send_request(polled.port, request_of("GET", f"{CHECK}?wait=60")) as client:
        wait_until(lambda: polled.in_flight())
        create_notification(polled, T + 1, type=BEATS, totalBeats=1)
        made = create_notification(polled, T + 1)
        assert json.loads(answer_of(client)[2])["notifications"] == [made]
    assert polled.check("?wait=60") == [made["id"]]  # immediately


def test_a_waiting_check_gets_an_empty_list_after_its_timeout_or_at_a_shutdown(polled):
    began = time.monotonic()
    assert polled.check("?wait=1") == []
    assert time.monotonic() - began >= 1.0
    polled.services.live.close()
    assert polled.check("?wait=60") == []  # the service is stopping


@pytest.mark.parametrize(
    ("part", "step", "method", "path"),
    [
        ("live", "_look", "GET", EVENTS),
        ("live", "_look", "GET", f"{CHECK}?wait=60"),
        ("swarmui", "_act", "POST", "/api/v1/swarmui/stop"),
    ],
)
def test_an_internal_error_is_a_500_and_the_next_request_succeeds(poll_service, fail_once, part, step, method, path):
    polled = poll_service()
    polled.services.swarmui.status()  # not in its first probe
    fail_once(getattr(polled.services, part), step, RuntimeError("an internal error"))
    status, _, answer = polled.ask(method, path)
    assert (status, "RuntimeError" in answer["error"], "an internal error" in answer["error"]) == (500, True, False)
    assert polled.ask("POST", "/api/v1/swarmui/stop")[0] == 200
    assert polled.check("?wait=1") == []


@pytest.mark.parametrize("is_first", [True, False])
def test_a_notification_created_while_a_wait_begins_is_not_missed(polled, twin, listen, monkeypatch, is_first):
    services, is_made = polled.services, threading.Event()
    ask, look = services.checks.ask, services.live._pending.look
    if not is_first:
        listen(polled).next()  # its first look took place: what comes later is an event

    def ask_first(check: Any) -> Any:
        asked = ask(check)
        if not is_made.is_set() and threading.current_thread().name != "live":  # that one publishes the event
            assert asked.result(PATIENCE).body == service.NO_NOTIFICATIONS
            add(twin, draft())
            is_made.set()
            if not is_first:  # the event is published, and the checks that waited by then are answered
                live = services.live
                wait_until(lambda: any(event.type == "notification" for event in list(live._events)))
                wait_until(lambda: not live._is_more_pending)
        return asked

    def look_afterwards() -> Iterator[None]:
        assert is_made.wait(PATIENCE)
        return look()

    monkeypatch.setattr(services.checks, "ask", ask_first)
    monkeypatch.setattr(services.live._pending, "look", look_afterwards)
    assert len(polled.check("?wait=60")) == 1


@pytest.mark.parametrize("value", ["-1", "61", "x", "1.5"])
def test_a_wait_is_a_whole_number_of_seconds_up_to_60(app, value):
    assert "wait" in app.get(f"{CHECK}?wait={value}", status=400).json["error"]


def test_a_shutdown_answers_waiting_checks_and_ends_streams(start_service, change_module, redis_url):
    change_module(GRACE=3600.0)  # neither delays the end
    running = start_service(REDIS_URL=redis_url)
    with contextlib.closing(EventStream(running.port)) as events:
        assert f"http://127.0.0.1:{running.port}" in events.next()["service"]["addresses"]
        with send_request(running.port, request_of("GET", f"{CHECK}?wait=60")) as client:
            assert running.call("GET", "/health")[0] == 200  # so the check has arrived
            running.press_ctrl_c()
            status, _, body = answer_of(client)
            assert (status, json.loads(body)) == (200, {"notifications": []})
            while events.next() is not None:
                pass
        assert running.process.wait(PATIENCE) == 0


def test_events_continue_without_the_store_and_its_return_sends_the_state_again(
    poll_service, forwarder, listen, monkeypatch
):
    monkeypatch.setattr(service.Live, "INTERVAL", 0.05)
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        polled = poll_service(store)
        made = create_notification(polled)
        forwarder.cut()
        events = listen(polled, "?types=notification,alert")
        state = events.next()
        assert (state["notifications"], state["service"]["storeUp"]) == ([], False)
        polled.services.live.publish("alert", {"kind": "store"})
        assert events.next("alert") == {"kind": "store"}
        forwarder.restore()
        state = events.next("state")
        assert (state["notifications"], state["service"]["storeUp"]) == ([made], True)


def test_a_loss_of_the_store_sends_the_state_again(poll_service, forwarder, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "INTERVAL", 0.05)
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        polled = poll_service(store)
        create_notification(polled)
        events = listen(polled, "?types=notification")
        assert events.next()["service"]["storeUp"] is True
        forwarder.cut()
        state = events.next("state")
        assert (state["notifications"], state["service"]["storeUp"]) == ([], False)


def test_the_state_after_a_start_without_the_store_has_its_sessions(poll_service, forwarder, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "INTERVAL", PATIENCE)  # so the pending notifications alone are read before
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        store.save(T, service.Change(json.dumps(SESSION).encode()))
        polled = poll_service(store)
        forwarder.cut()
        events = listen(polled, "?types=session")
        assert timestamps_in(events.next()) == []
        forwarder.restore()
        assert timestamps_in(events.next("state")) == [T]


def test_a_notification_that_another_program_adds_while_a_state_is_made_is_only_an_event(
    poll_service, redis_store, other_program, listen, monkeypatch
):
    polled, made = poll_service(redis_store), {member_of_another_program("x"): service.now_ms()}
    check, add = polled.services.notifications.check, functools.partial(other_program.zadd, "notifications:pending")
    monkeypatch.setattr(polled.services.notifications, "check", lambda *query: add(made) and check(*query))
    events = listen(polled, "?types=notification")
    assert (events.next()["notifications"], events.next()["id"]) == ([], "x")


def test_a_read_only_store_is_not_up_and_its_recovery_sends_the_state_again(poll_service, store, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "INTERVAL", 0.05)
    polled = poll_service(store)
    store.writes.note("it is a replica")
    events, leaving = listen(polled, "?types=alert"), listen(polled, "?types=alert")
    assert [stream.next()["service"]["storeUp"] for stream in (events, leaving)] == [False, False]
    assert events.last != leaving.last  # each state has an id of its own
    leaving.close()
    store.writes.note()
    assert events.next("state")["service"]["storeUp"] is True
    assert listen(polled, "?types=alert", leaving.last).next()["service"]["storeUp"] is True


def test_a_state_made_while_the_store_failed_is_sent_again(polled, listen, fail_once):
    made = create_notification(polled)
    fail_once(polled.services.notifications, "check", service.Unavailable("away"))
    events = listen(polled, "?types=notification")
    states = [events.next("state") for _ in range(2)]
    assert [(state["service"]["storeUp"], state["notifications"]) for state in states] == [(False, []), (True, [made])]


def test_events_announce_no_session_that_was_complete_before_the_bridge_met_its_redis(
    poll_service, redis_url, storyart, listen
):
    for number in range(3):
        storyart.save(spoken("w", "a cat", timestamp=T + number))
    with contextlib.closing(service.BridgedStore(redis_url)) as store:
        state = listen(poll_service(store), "?types=notification,session").next()
    assert [session["step"] for session in state["sessions"]] == ["ready"] * 3
    assert [notification["sessionTimestamp"] for notification in state["notifications"]] == [T + 2]


def test_a_client_that_returns_to_an_unwatched_service_without_its_store_gets_the_state(
    poll_service, forwarder, listen, monkeypatch
):
    monkeypatch.setattr(service.Live, "LINGER", 0.0)
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        polled = poll_service(store)
        first = listen(polled)
        first.next()
        first.close()
        wait_until(lambda: polled.services.live._pending.is_initial)
        forwarder.cut()
        assert listen(polled, last=first.last).next_block()["event"] == "state"


@pytest.mark.usefixtures("fast_polling")
def test_an_acknowledgement_before_the_first_listener_is_not_an_event(poll_service, redis_store, other_program, listen):
    polled = poll_service(redis_store)
    for id in ("old", "new"):
        other_program.zadd("notifications:pending", {member_of_another_program(id): service.now_ms()})
    other_program.set("notifications:ack:old", "1")
    events = listen(polled, "?types=notification,acknowledged")
    assert [notification["id"] for notification in events.next()["notifications"]] == ["new"]
    poll_everything(polled)
    other_program.set("notifications:ack:new", "1")
    assert events.next()["id"] == "new"


@pytest.mark.usefixtures("fast_polling")
def test_an_acknowledgement_by_another_program_is_noticed_among_many_notifications(
    poll_service, redis_store, other_program, listen
):
    scores = {member_of_another_program(f"x-{number}"): T + number for number in range(2500)}
    other_program.zadd("notifications:pending", scores)
    redis_store._clock = lambda: T + 10_000
    events = listen(poll_service(redis_store), "?types=acknowledged")
    events.next()
    other_program.set("notifications:ack:x-1250", "1")
    assert events.next()["id"] == "x-1250"


def test_two_members_with_one_id_do_not_cause_a_scan_per_notification(
    poll_service, redis_store, other_program, listen, monkeypatch
):
    monkeypatch.setattr(service.Live, "PENDING_INTERVAL", 0.01)
    polled = poll_service(redis_store)
    create_notification(polled)
    (member,) = other_program.zrange("notifications:pending", 0, -1)
    double = member.replace('"acknowledged":false', '"acknowledged":true')
    other_program.zadd("notifications:pending", {double: service.now_ms()})
    events = listen(polled, "?types=notification")
    events.next()
    pending, scans = redis_store.pending, []
    monkeypatch.setattr(redis_store, "pending", lambda page: scans.append(page) or pending(page))
    for number in range(20):
        assert create_notification(polled, T + 1 + number) == events.next()
    assert len(scans) < 10  # one every 2 s, not one per notification


def poll_everything(polled: LocalService) -> None:
    """Wait until the store has been read, including the acknowledgements."""
    pending = polled.services.live._pending
    pending._markers_at = pending._scan_at = -math.inf
    polled.services.live.look_soon()
    wait_until(lambda: min(pending._markers_at, pending._scan_at) > 0)


def test_a_session_saved_during_a_scan_is_published_before_the_scan_ends(polled, listen, monkeypatch):
    for number in range(2):
        create_notification(polled, T + number)
    events, read, ends = listen(polled, "?types=session"), polled.services.store.pending, []
    events.next("state")

    def scan(page: int) -> Any:
        first, second = read(page)
        yield first
        if not ends:
            polled.ask("PUT", f"/api/v1/session/{T}", SESSION)
        yield second
        ends.append(polled.services.live._number)

    monkeypatch.setattr(service.PendingChanges, "PAGE", 1)
    monkeypatch.setattr(polled.services.store, "pending", scan)
    poll_everything(polled)
    event = events.next_event("session")
    assert int(event["id"].partition("-")[2]) <= ends[0]


def test_a_pipelined_request_that_expects_100_continue_does_not_disturb_events(polled, monkeypatch):
    monkeypatch.setattr(service.Channel, "send_continue", lambda channel: channel.handle_close())  # its client leaves
    head = f"HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    body = "Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n"
    received = b""
    with socket.create_connection(("127.0.0.1", polled.port), PATIENCE) as client:
        client.sendall(f"GET {EVENTS} {head}\r\nPOST /api/v1/notifications {head}{body}".encode())
        while b"event: state" not in received and (part := client.recv(65536)):
            received += part
    assert b"event: state" in received


def test_a_slow_check_delays_no_event(polled, listen, monkeypatch):
    events = listen(polled, "?types=notification")
    events.next()
    slow: Future[Any] = Future()
    outcomes = iter([service.Response(service.NO_NOTIFICATIONS)])
    monkeypatch.setattr(polled.services.checks, "ask", lambda check: next(outcomes, slow))
    with send_request(polled.port, request_of("GET", f"{CHECK}?wait=60&batch=true")) as client:
        wait_until(lambda: polled.in_flight())
        for number in range(3):
            assert create_notification(polled, T + number) == events.next()
        slow.set_result(service.Response(b"{}"))
        assert answer_of(client)[2] == b"{}"


def test_only_a_client_that_joins_waits_for_a_slow_nvidia_smi(poll_service, nvidia_smi, tmp_path, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "STATE_WAIT", PATIENCE)
    polled = poll_service(
        nvidia_smi=nvidia_smi({**GOOD, "after": str(tmp_path / "go")}, {}), nvidia_smi_timeout=2 * PATIENCE
    )
    events = listen(polled, "?types=notification")
    events.next()
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(listen, polled, "?types=gpu")
        wait_until(lambda: polled.services.live._loop.asked)
        assert create_notification(polled) == events.next()
        (tmp_path / "go").touch()
        assert joining.result(PATIENCE).next()["gpu"]["available"]


def test_a_slow_read_of_the_reservation_delays_no_event(polled, listen, monkeypatch):
    events = listen(polled, "?types=notification")
    events.next()
    monkeypatch.setattr(service.Live, "INTERVAL", 0.0)
    monkeypatch.setattr(polled.services.reservations, "ask", lambda: Future())
    for number in range(3):
        assert create_notification(polled, T + number) == events.next()


def test_a_cached_gpu_status_carries_the_time_of_its_measurement(poll_service, nvidia_smi, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "STATE_WAIT", PATIENCE)
    polled = poll_service(nvidia_smi=nvidia_smi(GOOD, {"print": "41\n"}))
    polled.services.gpu._ttl = 60.0
    polled.ask("GET", "/api/v1/gpu/status")
    answered_at = service.now_ms()
    wait_until(lambda: service.now_ms() > answered_at)
    assert listen(polled, "?types=gpu").next()["gpu"]["at"] <= answered_at


def test_an_event_during_the_making_of_a_state_follows_it(poll_service, forwarder, listen, monkeypatch):
    monkeypatch.setattr(service.Live, "INTERVAL", 0.05)
    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        polled = poll_service(store)
        forwarder.cut()
        events = listen(polled, "?types=notification,alert")
        events.next()
        check, live = polled.services.notifications.check, polled.services.live

        def publish_and_check(*arguments: Any) -> Any:
            live.publish("alert", {"kind": "disk"})
            return check(*arguments)

        monkeypatch.setattr(polled.services.notifications, "check", publish_and_check)
        forwarder.restore()
        assert [events.next_block()["event"] for _ in range(2)] == ["state", "alert"]


def test_unusable_data_is_logged_once_however_often_it_is_read(
    poll_service, redis_store, other_program, listen, caplog
):
    other_program.zadd("notifications:pending", {"no JSON\\": service.now_ms()})  # no search skips a backslash
    other_program.set(f"session:{T}", "no JSON")
    other_program.zadd("storyteller:sessions", {f"session:{T}": T})
    polled = poll_service(redis_store)
    listen(polled).next()
    for _ in range(3):
        poll_everything(polled)
        assert polled.ask("POST", "/api/v1/notifications/nobody/ack")[0] == 404
    (message,) = caplog.messages
    assert "no JSON" in message


def test_many_notifications_are_acknowledged_by_one_request(app, store, plant):
    foreign = {"id": "a#b", "type": PROMPTS, "sessionTimestamp": T, "totalPrompts": 1}
    plant(foreign, store._clock())
    ids = [json.loads(add(store, draft(session=T + number))[0])["id"] for number in range(3)]
    wanted = [ids[2], "x", ids[0], "\ud83d", ids[2], "a#b", "y" * 200]
    answer = app.post_json("/api/v1/notifications/ack", {"ids": wanted}).json
    assert answer == {
        "success": True, "acknowledged": [ids[2], ids[0], "a#b"], "notFound": ["x", "\ud83d", "y" * 200],
    }  # fmt: skip
    assert [notification["id"] for notification in pending(app)] == [ids[1]]
    again = app.post_json("/api/v1/notifications/ack", {"ids": ids}).json
    assert (again["acknowledged"], again["notFound"]) == (ids, [])


@pytest.mark.parametrize("ids", [[], ["x"] * 1001, [""], ["x" * 201], [5], "x", None])
def test_one_request_acknowledges_1_to_1000_ids(make_app, ids):
    answer = make_app().post_json("/api/v1/notifications/ack", {"ids": ids}, status=400).json
    assert (answer["success"], "ids" in answer["error"]) == (False, True)


@pytest.mark.parametrize("others", [0, 1200])
def test_a_batched_check_has_only_the_newest_notification_of_each_type_and_session(app, store, plant, clock, others):
    now = clock()
    for number, (kind, session) in enumerate([(PROMPTS, 1), (BEATS, 1), (PROMPTS, 2), (PROMPTS, 1), (PROMPTS, 1)]):
        total = {service.TOTALS[kind]: number}
        plant({"id": f"x-{number}", "type": kind, "sessionTimestamp": session, **total}, now - 100 + number)
    for number in range(others):
        plant({"id": f"y-{number}", "type": PROMPTS, "sessionTimestamp": 1, "totalPrompts": 1}, now - 50)
    found = pending(app, "?type=all&batch=true")
    assert [(newest["type"], newest["sessionTimestamp"], newest["count"]) for newest in found] == [
        (BEATS, 1, 1), (PROMPTS, 2, 1), (PROMPTS, 1, 3 + others),
    ]  # fmt: skip
    assert found[-1]["ids"][:3] == ["x-0", "x-3", "x-4"]
    assert found[-1]["id"] == found[-1]["ids"][-1]
    assert [newest["ids"] for newest in pending(app, "?type=all&batch=true&limit=2")] == [["x-1"], ["x-2"]]


# ======================================================================================================
# It keeps running
# ======================================================================================================

# ----------------------------------------------------------------- one client never blocks another ----


def send_request(port: int, request: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection over which a request, or the beginning of one, was sent."""
    client = socket.socket()
    client.settimeout(PATIENCE)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", port))
    client.sendall(request.encode())
    return client


@contextlib.contextmanager
def send_requests(port: int, requests: list[str]) -> Iterator[list[socket.socket]]:
    """A connection for each request; all are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(send_request(port, request)) for request in requests]


def answer_of(client: socket.socket, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of the next response."""
    answer = http.client.HTTPResponse(client, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def request_of(method: str, path: str, *headers: str) -> str:
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {TOKEN}", *headers, "", ""]
    )


POLL = request_of("GET", "/api/v1/notifications/check")
LARGE = {"scriptText": "x" * (8 << 20)}  # more than the buffers of two sockets hold


def is_cut_off(client: socket.socket) -> bool:
    """Send one more byte, to which a closed connection responds with a reset."""
    try:
        client.send(b"x")
    except OSError:
        return True
    return False


def test_a_gpu_call_does_not_wait_for_100_polls_when_redis_hangs(make_redis_app, serving, forwarder, monkeypatch):
    monkeypatch.setattr(service.RedisClient, "ANSWER_TIMEOUT", PATIENCE)
    port = serving(make_redis_app(forwarder.url).app).port
    forwarder.hang()
    with send_requests(port, [POLL] * 100) as polls, send_request(port, request_of("GET", "/api/v1/gpu/status")) as gpu:
        assert answer_of(gpu)[0] == 500
        assert not select.select(polls, [], [], 0)[0]
        forwarder.restore()
        assert [answer_of(poll)[0] for poll in polls] == [200] * 100


@pytest.mark.parametrize("continues", [False, True], ids=["then nothing", "then a byte now and then"])
@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param("G", id="a line"),
        pytest.param(POLL[:-2] + "X: ", id="headers"),
        pytest.param(request_of("PUT", "/api/v1/session/1", "Content-Length: 99999"), id="a body"),
    ],
)
def test_an_incomplete_request_times_out(serving, make_app, monkeypatch, beginning, continues):
    monkeypatch.setattr(service, "REQUEST_TIMEOUT", 0.2)
    with send_request(serving(make_app().app).port, beginning) as client:
        if continues:
            wait_until(lambda: is_cut_off(client))
        else:
            with contextlib.suppress(ConnectionError):
                assert client.recv(100) == b""


@pytest.mark.skipif(service.WINDOWS, reason="Wine closes a socket only once all sent data is received")
def test_a_response_that_its_client_does_not_read_times_out(serving, make_app, monkeypatch):
    monkeypatch.setattr(service, "REQUEST_TIMEOUT", 0.2)
    app = make_app()
    app.put_json("/api/v1/session/5", LARGE)
    with send_request(serving(app.app).port, request_of("GET", "/api/v1/session/5"), receive_buffer=4096) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: is_cut_off(client))


@pytest.mark.slow
def test_a_slow_but_steady_reader_gets_the_whole_response(serving, make_app, monkeypatch):
    """Whatever the time it takes: here more than twice the limit."""
    monkeypatch.setattr(service, "REQUEST_TIMEOUT", 1.0)
    app = make_app()
    app.put_json("/api/v1/session/5", {"scriptText": "x" * (24 << 20)})
    with send_request(serving(app.app).port, request_of("GET", "/api/v1/session/5"), receive_buffer=65536) as client:
        answer = http.client.HTTPResponse(client)
        answer.begin()
        size, taken, pause = int(answer.getheader("Content-Length")), 0, threading.Event()
        began = time.monotonic()
        while piece := answer.read(size // 50):
            taken += len(piece)
            pause.wait(max(0.0, began + 2.5 * taken / size - time.monotonic()))
        assert taken == size


@pytest.mark.slow
def test_a_slow_but_steady_upload_succeeds(serving, make_app, monkeypatch):
    """Whatever the time it takes: here more than twice the limit, at a rate above the lowest that is allowed."""
    monkeypatch.setattr(service, "REQUEST_TIMEOUT", 1.0)
    body, pause = json.dumps({"scriptText": "x" * 25_000}).encode(), threading.Event()
    head = request_of("PUT", "/api/v1/session/5", "Content-Type: application/json", f"Content-Length: {len(body)}")
    with send_request(serving(make_app().app).port, head) as client:
        for start in range(0, len(body), 1000):
            client.sendall(body[start : start + 1000])
            pause.wait(0.1)
        assert answer_of(client)[0] == 200


def test_a_connection_that_is_idle_for_too_long_is_closed(serving, make_app, monkeypatch):
    monkeypatch.setattr(service, "KEEPALIVE_TIMEOUT", 0.2)
    with send_request(serving(make_app().app).port, POLL) as client:
        assert answer_of(client)[0] == 200
        assert client.recv(1) == b""


def test_clients_can_use_their_idle_connections_for_a_second_after_the_pc_slept(serving, make_app, monkeypatch):
    clock = Clock(time.monotonic())
    monkeypatch.setattr(time, "monotonic", clock)
    with send_requests(serving(make_app().app).port, [POLL] * 3) as (resuming, silent, other):

        def take_a_turn() -> None:
            for _ in range(2):  # the sweep of the first is over by the second
                other.sendall(POLL.encode())
                assert answer_of(other)[0] == 200

        assert [answer_of(client)[0] for client in (resuming, silent, other)] == [200] * 3
        clock.now += 3600
        take_a_turn()
        resuming.sendall(POLL.encode())
        assert answer_of(resuming)[0] == 200
        clock.now += 1
        take_a_turn()
        assert silent.recv(1) == b""
        resuming.sendall(POLL.encode())
        assert answer_of(resuming)[0] == 200


def test_near_the_limit_of_connections_the_oldest_idle_ones_are_closed_first(
    start_service, change_module, nvidia_smi, tmp_path
):
    change_module(CONNECTIONS=20)
    running = start_service(
        NVIDIA_SMI=nvidia_smi({**GOOD, "after": str(tmp_path / "release")}, {}), NVIDIA_SMI_TIMEOUT=str(PATIENCE)
    )
    with contextlib.ExitStack() as stack:
        at_work = stack.enter_context(send_request(running.port, request_of("GET", "/api/v1/gpu/status")))
        wait_until((tmp_path / "runs").exists)
        idle = []
        for _ in range(100):  # waitress's own limit is 40 past ours
            idle.append(stack.enter_context(send_request(running.port, request_of("GET", "/health"))))
            assert answer_of(idle[-1])[0] == 200
        assert running.call("GET", "/api/v1/notifications/check")[0] == 200
        assert all(client.recv(1) == b"" for client in idle[:80])
        idle[-1].sendall(request_of("GET", "/health").encode())
        assert answer_of(idle[-1])[0] == 200
        (tmp_path / "release").touch()
        assert answer_of(at_work)[0] == 200


def test_silent_connections_past_the_limit_do_not_keep_a_poll_out(start_service, change_module):
    change_module(CONNECTIONS=20)
    running = start_service()
    with send_requests(running.port, [""] * 100):
        assert running.call("GET", "/api/v1/notifications/check")[0] == 200


def test_past_the_limit_the_oldest_incomplete_requests_are_closed(start_service, change_module):
    """A new request gets its response, and one that has just begun continues."""
    change_module(CONNECTIONS=20)
    running = start_service()
    with send_requests(running.port, [POLL[:-2]] * 100) as incomplete:
        assert running.call("GET", "/api/v1/notifications/check")[0] == 200
        with send_request(running.port, POLL[:-2]) as newest:
            assert running.call("GET", "/api/v1/notifications/check")[0] == 200
            newest.sendall(b"\r\n")
            assert answer_of(newest)[0] == 200
        wait_until(lambda: is_cut_off(incomplete[0]))


@pytest.mark.skipif(service.WINDOWS, reason="Windows has no limit of descriptors that can be lowered")
def test_a_low_soft_limit_of_descriptors_leaves_places_for_300_listeners():
    code = "import storyteller_automation; print(storyteller_automation.LISTENERS)"
    command = ["sh", "-c", 'ulimit -Sn 256; exec "$0" -c "$1"', sys.executable, code]
    assert int(subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, timeout=PATIENCE).stdout) >= 300


@pytest.mark.skipif(service.WINDOWS, reason="Windows has no limit of descriptors that can be lowered")
def test_silent_connections_past_the_limit_of_descriptors_do_not_keep_a_poll_out(module_copy, start_service):
    limit = "\nimport resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n__version__"
    module_copy.write_text(module_copy.read_text("utf-8").replace("\n__version__", limit, 1), "utf-8")
    running = start_service()
    with send_requests(running.port, [""] * 300):
        assert running.call("GET", "/api/v1/notifications/check")[0] == 200


@pytest.mark.slow
def test_200_slow_connections_do_not_slow_down_polls(start_service, swarmui_folder, settings):
    running = start_service(
        SWARMUI_PATH=str(swarmui_folder(delay=3600)),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_START_TIMEOUT="3600",
    )
    assert running.call("PUT", "/api/v1/session/5", make_session(prompts=0))[0] == 200
    slow = [
        (POLL[:-2],),
        (request_of("PUT", "/api/v1/session/6", "Content-Type: application/json", "Content-Length: 850000") + "{",),
        (request_of("GET", "/api/v1/session/5"), 4096),
        (request_of("POST", "/api/v1/swarmui/start"),),
    ]

    def seconds_of_200_polls() -> float:
        began = time.monotonic()
        for _ in range(200):
            assert running.call("GET", "/api/v1/notifications/check") == (200, {"notifications": []})
        return time.monotonic() - began

    seconds = seconds_of_200_polls()
    with contextlib.ExitStack() as stack:
        for number in range(200):
            stack.enter_context(send_request(running.port, *slow[number % 4]))
        assert seconds_of_200_polls() < 40 * seconds  # a poll that waits for one of them takes 1000 times as long


def test_large_bodies_are_parsed_one_at_a_time_and_small_ones_meanwhile(serving, make_app, monkeypatch):
    parse, small_is_done = service.parse_json, threading.Event()
    parsing: list[int] = []
    counts: list[int] = []  # of the large bodies that are being parsed, at the start of each

    def parse_slowly(raw: bytes, **options: Any) -> Any:
        if len(raw) <= service.LARGE_BODY:
            return parse(raw, **options)
        parsing.append(1)
        counts.append(len(parsing))
        small_is_done.wait(PATIENCE)
        try:
            return parse(raw, **options)
        finally:
            parsing.pop()

    monkeypatch.setattr(service, "parse_json", parse_slowly)
    call = functools.partial(Service.call, serving(make_app().app), "PUT")
    with ThreadPoolExecutor(4) as pool:
        body = {"scriptText": "x" * (service.LARGE_BODY + 1)}
        large = [pool.submit(call, f"/api/v1/session/{number}", body) for number in range(4)]
        wait_until(lambda: counts)
        assert call("/api/v1/session/9", {"scriptText": "x" * (service.LARGE_BODY // 4)})[0] == 200
        assert not any(upload.done() for upload in large)
        small_is_done.set()
        assert [upload.result(PATIENCE)[0] for upload in large] == [200] * 4
    assert counts == [1] * 4


# ------------------------------------------------------------------------------ the store goes away ----

ANSWER_BOUND = 3.0 + 1.5  # a call that needs the store ends within 3 s; the rest is for a busy PC
RETURN_BOUND = 1.5 + 1.5  # calls succeed within 1.5 s after its return
AT_ONCE = service.RedisClient.CONNECT_TIMEOUT  # a call that tried to reach a Redis that hangs would take longer

# The calls that need the store, each with the fields of its errors other than `error`.
READS = [
    ("GET", "/api/v1/notifications/check", None, {}),
    ("GET", f"/api/v1/session/{T}/prompts-status", None, {"promptsReady": False}),
    ("GET", "/api/v1/session/latest", None, {"success": False}),
    ("GET", "/api/v1/session/list", None, {"success": False}),
    ("GET", f"/api/v1/session/{T}", None, {"success": False}),
]
WRITES = [
    ("POST", "/api/v1/notifications", {**NOTIFICATION, "sessionTimestamp": T + 3, "totalPrompts": 1}, {}),
    ("POST", "/api/v1/session/save", {**SESSION, "timestamp": T + 1}, {"success": False}),
    ("PUT", f"/api/v1/session/{T + 2}", SESSION, {"success": False}),
    ("POST", "/api/v1/auth/session", {"subject": "a", "permissions": ["gpu:read"]}, {}),
]
HIDDEN = "a-word-of-the-session"  # must not appear in an error


def ask(app: webtest.TestApp, method: str, path: str, body: Any = None) -> tuple[webtest.TestResponse, float]:
    """The response, and after how many seconds."""
    data = b"" if body is None else json.dumps({**body, "storyUuid": HIDDEN} if "storyUuid" in body else body).encode()
    began = time.monotonic()
    response = app.request(
        path, method=method, body=data, headers={"Content-Type": "application/json"}, expect_errors=True
    )
    return response, time.monotonic() - began


def assert_refused(app: webtest.TestApp, calls: list[Any], bound: float = ANSWER_BOUND) -> None:
    """Each call is a 503 of its own shape in time, with Retry-After, and the error quotes no part of the request."""
    for method, path, body, shape in calls:
        response, seconds = ask(app, method, path, body)
        assert (path, response.status_int, {**response.json, "error": ""}) == (path, 503, {**shape, "error": ""})
        assert int(response.headers["Retry-After"]) >= 1
        if bound == AT_ONCE:  # the second time tells a call that is slow from a PC that was busy
            seconds = min(seconds, ask(app, method, path, body)[1])
        assert seconds < bound
        assert not [word for word in (HIDDEN, "EVAL", "ZRANGE", "Command #") if word in response.json["error"]]


def assert_successful(app: webtest.TestApp, calls: list[Any]) -> None:
    for method, path, body, _ in calls:
        assert (path, ask(app, method, path, body)[0].status_int // 100) == (path, 2)


def seconds_until_successful(app: webtest.TestApp, calls: list[Any]) -> float:
    began = time.monotonic()
    for method, path, body, _ in calls:
        wait_until(lambda method=method, path=path, body=body: ask(app, method, path, body)[0].status_int < 500)
    return time.monotonic() - began


@pytest.fixture
def make_redis_app(make_app) -> Iterator[Callable[..., webtest.TestApp]]:
    """Makes the application on the Redis of a URL, which contains the session T."""
    with contextlib.ExitStack() as stack:

        def make(url: str, **changed: Any) -> webtest.TestApp:
            store = stack.enter_context(contextlib.closing(service.RedisStore(url)))
            app = make_app(store, **changed)
            with contextlib.suppress(service.Unavailable):
                store.save(T, service.Change(json.dumps({**make_session(size=1000), "timestamp": T}).encode()))
            return app

        yield make


@pytest.mark.slow
@pytest.mark.parametrize("fail", [Forwarder.cut, Forwarder.hang], ids=["refused", "hung"])
def test_a_redis_that_goes_away_is_a_503_in_time_and_its_return_is_noticed(make_redis_app, forwarder, caplog, fail):
    app = make_redis_app(forwarder.url)
    assert_successful(app, READS)
    others = [("GET", "/api/v1/gpu/status"), ("POST", "/api/v1/swarmui/start")]
    before = [ask(app, *other)[0].json for other in others]

    fail(forwarder)
    assert_refused(app, READS[:1])
    assert ask(app, "GET", "/health")[0].json == {"status": "degraded", "store": "redis"}
    assert_refused(app, ALL, AT_ONCE)  # the outage is known by now
    assert [ask(app, *other)[0].json for other in others] == before

    forwarder.restore()
    assert seconds_until_successful(app, ALL) < RETURN_BOUND
    assert ask(app, "GET", "/health")[0].json == {"status": "ok", "store": "redis"}
    assert HIDDEN not in caplog.text
    assert re.findall("fail at once|answers again", caplog.text) == ["fail at once", "answers again"]


@pytest.mark.slow
def test_while_redis_is_away_it_is_probed_once_a_second(make_redis_app, forwarder):
    app = make_redis_app(forwarder.url)
    forwarder.cut()
    tried: list[float] = []
    with socket.create_server(("127.0.0.1", forwarder.port)) as listener:  # accepts connections and closes them

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        if connection.recv(1024):
                            tried.append(time.monotonic())

        threading.Thread(target=accept, daemon=True).start()
        assert_refused(app, READS)
        tried.clear()
        wait_until(lambda: assert_refused(app, READS, AT_ONCE) or len(tried) >= 3)
        assert tried[2] - tried[0] > 1.5 * service.RedisClient.PROBE_INTERVAL
        listener.close()


def replicate(own: OwnRedis) -> None:
    own.tell("REPLICAOF", "127.0.0.1", free_port())


def fail_to_save(own: OwnRedis) -> None:
    (own.folder / "dump.rdb").mkdir()  # Redis cannot replace it by its file
    own.tell("CONFIG", "SET", "save", "3600 1")
    own.tell("BGSAVE")
    wait_until(lambda: own.tell("INFO", "persistence")["rdb_last_bgsave_status"] == "err")


def save_again(own: OwnRedis) -> None:
    (own.folder / "dump.rdb").rmdir()
    own.tell("BGSAVE")


def keep_busy(own: OwnRedis) -> None:
    def run() -> None:
        with contextlib.suppress(redis.RedisError):
            own.tell("EVAL", "while true do end", 0)

    own.tell("CONFIG", "SET", "lua-time-limit", 1)
    threading.Thread(target=run, daemon=True).start()

    def is_busy() -> bool:
        try:
            return not own.tell("PING")
        except redis.ResponseError:
            return True

    wait_until(is_busy)


def end_clients(own: OwnRedis, *commands: tuple[Any, ...]) -> None:
    """Change how it accepts connections, and end the present ones."""
    with redis.Redis.from_url(own.url, protocol=2, single_connection_client=True) as client:
        for command in commands:
            client.execute_command(*command)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def load_slowly(own: OwnRedis) -> None:
    for number in range(40):
        own.tell("SET", f"filling:{number}", "x" * 2000)
    own.tell("SAVE")
    own.kill()
    own.start("--key-load-delay", "200000", "--loading-process-events-interval-bytes", "1024", wait=False)


def exhaust_clients(own: OwnRedis) -> None:
    own.only_client = redis.Redis.from_url(own.url, protocol=2, single_connection_client=True)
    own.only_client.execute_command("CONFIG", "SET", "maxclients", 1)
    own.only_client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def allow_clients(own: OwnRedis) -> None:
    own.only_client.execute_command("CONFIG", "SET", "maxclients", 100)
    own.only_client.close()


ALL = [*READS, *WRITES]
OWN_FAULTS = {
    "READONLY": (replicate, lambda own: own.tell("REPLICAOF", "NO", "ONE"), WRITES),
    "OOM": (
        lambda own: own.tell("CONFIG", "SET", "maxmemory", 1),
        lambda own: own.tell("CONFIG", "SET", "maxmemory", 0),
        WRITES,
    ),
    "MISCONF": (fail_to_save, save_again, WRITES),
    "NOPERM to write": (
        lambda own: own.tell("ACL", "SETUSER", "default", "-@write"),
        lambda own: own.tell("ACL", "SETUSER", "default", "+@all"),
        WRITES,
    ),
    "NOPERM at all": (
        lambda own: own.tell("ACL", "SETUSER", "default", "-@all", "+acl"),
        lambda own: own.tell("ACL", "SETUSER", "default", "+@all"),
        ALL,
    ),
    "BUSY": (keep_busy, lambda own: own.tell("SCRIPT", "KILL"), ALL),
    "out of clients": (exhaust_clients, allow_clients, ALL),
    "a password": (
        lambda own: end_clients(own, ("CONFIG", "SET", "requirepass", "pass-word")),
        lambda own: redis.Redis.from_url(own.url, protocol=2, password="pass-word").config_set("requirepass", ""),
        ALL,
    ),
    "LOADING": (load_slowly, lambda own: own.tell("CONFIG", "SET", "key-load-delay", 0), ALL),
    "killed": (OwnRedis.kill, OwnRedis.start, ALL),
    "stopped": (
        lambda own: own.process.send_signal(signal.SIGSTOP),
        lambda own: own.process.send_signal(signal.SIGCONT),
        ALL,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_calls_that_redis_refuses_are_a_503_in_time_and_others_succeed(make_redis_app, own_redis, caplog, fault):
    fail, repair, refused = OWN_FAULTS[fault]
    own = own_redis("--save", "", "--rdbcompression", "no")
    app = make_redis_app(own.url)
    assert_successful(app, READS)
    fail(own)
    try:
        assert_refused(app, refused)
        assert_successful(app, [call for call in READS if call not in refused])
        assert ask(app, "GET", "/health")[0].status_int == 503
        assert min(ask(app, "GET", "/api/v1/gpu/status")[1] for _ in range(2)) < AT_ONCE
    finally:
        repair(own)
    assert seconds_until_successful(app, ALL) < RETURN_BOUND + (1.0 if fault in ("LOADING", "killed") else 0.0)
    assert HIDDEN not in caplog.text


WRITE_FAULTS = {name: steps[:2] for name, steps in OWN_FAULTS.items() if steps[2] is WRITES} | {
    "NOREPLICAS": (
        lambda own: own.tell("CONFIG", "SET", "min-replicas-to-write", 1),
        lambda own: own.tell("CONFIG", "SET", "min-replicas-to-write", 0),
    ),
    "NOPERM for one command": (
        lambda own: own.tell("ACL", "SETUSER", "default", "-rename"),
        lambda own: own.tell("ACL", "SETUSER", "default", "+@all"),
    ),
    "NOPERM for some keys": (
        lambda own: own.tell("ACL", "SETUSER", "default", "resetkeys", "%R~*", "~storyteller:*"),
        lambda own: own.tell("ACL", "SETUSER", "default", "allkeys"),
    ),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_refused_writes_are_logged_once_with_the_reason_and_once_when_accepted_again(
    make_services, own_redis, monkeypatch, settings, caplog, fault
):
    fail, repair = WRITE_FAULTS[fault]
    own = own_redis("--save", "")
    monkeypatch.setattr(service.Services, "WATCH_INTERVAL", 0.02)
    with contextlib.closing(service.RedisStore(own.url)) as store:
        services = make_services(store)
        health = functools.partial(service.health, services, None)
        own.tell("ZADD", "notifications:pending", 1, "an old one")
        fail(own)
        ((level, _, text),) = service.check_store(dataclasses.replace(settings, redis_url=own.url))
        assert (level, fault.split()[0] in text) == ("FAIL", True), text
        caplog.clear()
        services.start()  # only the service itself writes
        wait_until(lambda: health().status == 503)
        repair(own)
        wait_until(lambda: health().status == 200)
        wait_until(lambda: len(caplog.records) >= 3)
        assert own.tell("KEYS", "*") == [b"notifications:pending"]
    expected = [fault.split()[0], "accepts writes again", "older than 7 days"]
    assert [words in message for words, message in zip(expected, caplog.messages)] == [True] * 3
    assert len(caplog.messages) == 3


def test_an_announcement_that_redis_refuses_is_made_by_a_later_poll(make_redis_app, own_redis):
    own = own_redis("--save", "")
    app = make_redis_app(own.url)  # T is ready, but not announced
    replicate(own)
    assert app.get(f"/api/v1/session/{T}/prompts-status").json["promptsReady"] is True
    assert app.get("/api/v1/notifications/check").json == {"notifications": []}
    own.tell("REPLICAOF", "NO", "ONE")
    assert app.get(f"/api/v1/session/{T}/prompts-status").json["promptsReady"] is True
    (announced,) = app.get("/api/v1/notifications/check").json["notifications"]
    assert announced["sessionTimestamp"] == T


@pytest.fixture
def pass_time(monkeypatch) -> Callable[[float], None]:
    """Advances the clock by which redis-py measures how long a connection was idle."""
    moved, now = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + moved[0])
    return lambda seconds: moved.append(moved.pop() + seconds)


@pytest.mark.parametrize("die", [Forwarder.end_connections, Forwarder.forget_connections], ids=["ended", "silent"])
def test_connections_that_died_while_idle_cause_no_503(make_redis_app, forwarder, pass_time, monkeypatch, die):
    monkeypatch.setattr(service.RedisClient, "ANSWER_TIMEOUT", 0.2)
    app = make_redis_app(forwarder.url)
    at_once(*[lambda: app.get("/api/v1/notifications/check") for _ in range(8)])
    die(forwarder)
    pass_time(60)
    answers = at_once(*[lambda: ask(app, "GET", "/api/v1/notifications/check")[0].status_int for _ in range(8)])
    assert answers == [200] * 8


def test_frequent_polls_reuse_a_connection_and_an_idle_one_is_checked_first(redis_store, other_program, pass_time):
    def made_and_checked() -> tuple[int, int]:
        counts = other_program.info("all")
        return counts["total_connections_received"], counts.get("cmdstat_ping", {"calls": 0})["calls"]

    other_program.config_resetstat()
    for _ in range(5):
        redis_store.ping()
        pass_time(5)
    assert made_and_checked() == (1, 0)
    pass_time(10)
    redis_store.ping()
    assert made_and_checked() == (1, 1)


def test_a_call_at_work_when_the_redis_store_closes_gets_its_reply(forwarder, monkeypatch):
    monkeypatch.setattr(service.RedisClient, "ANSWER_TIMEOUT", PATIENCE)
    with ThreadPoolExecutor(1) as pool, contextlib.closing(service.RedisStore(forwarder.url)) as store:
        read, is_reading = store._redis._read_reply, threading.Event()
        forwarder.hang()
        monkeypatch.setattr(store._redis, "_read_reply", lambda connection: is_reading.set() or read(connection))
        call = pool.submit(store.session, T)
        assert is_reading.wait(PATIENCE)
        store.close()
        forwarder.restore()
        assert call.result(PATIENCE) is None


def test_outages_leak_no_connections(forwarder, pass_time, monkeypatch):
    """A connection that cannot be made again must return to the pool."""
    monkeypatch.setattr(service.RedisClient, "PROBE_INTERVAL", 0.02)

    def answers(store: service.Store) -> bool:
        with contextlib.suppress(service.Unavailable):
            store.ping()
            return True
        return False

    with contextlib.closing(service.RedisStore(forwarder.url)) as store:
        store._redis._pool.max_connections = 4
        for _ in range(6):
            wait_until(lambda: answers(store))
            forwarder.cut()
            pass_time(60)
            with pytest.raises(service.Unavailable):
                store.ping()
            forwarder.restore()
        wait_until(lambda: answers(store))


def test_while_redis_is_away_calls_get_the_reason_of_the_last_probe(own_redis, monkeypatch):
    monkeypatch.setattr(service.RedisClient, "PROBE_INTERVAL", 0.02)
    own = own_redis("--save", "")

    def reason(store: service.Store) -> str:
        with pytest.raises(service.Unavailable) as raised:
            store.ping()
        return str(raised.value)

    with contextlib.closing(service.RedisStore(own.url)) as store:
        own.kill()
        assert "nothing listens there" in reason(store)
        own.start("--requirepass", "pass-word", wait=False)
        wait_until(lambda: "it requires a password" in reason(store))


@pytest.mark.parametrize(
    "option",
    ["max_connections=1", "socket_timeout=0.001", "socket_connect_timeout=0.0001", "protocol=3", "decode_responses=yes",
     "health_check_interval=1", "retry_on_timeout=yes", "encoding=utf-16", "client_name=a", "timeout=1"],
)  # fmt: skip
def test_options_in_the_url_do_not_change_how_redis_is_called(redis_url, other_program, option):
    with contextlib.closing(service.RedisStore(f"{redis_url}?{option}")) as store:
        store.save(T, service.Change("{ü}".encode(), draft=draft()))
        other_program.client_pause(50)
        assert at_once(*[lambda: store.session(T).document for _ in range(8)]) == ["{ü}".encode()] * 8


@pytest.mark.slow
def test_a_host_name_that_does_not_resolve_is_a_503_in_time(make_redis_app):
    assert_refused(make_redis_app("redis://redis.invalid:6379/0"), READS)


@pytest.mark.slow
def test_a_host_name_that_resolves_too_slowly_is_a_503_until_it_resolves(make_redis_app, forwarder, monkeypatch):
    """A look-up has no timeout of its own."""
    look_up, answers = socket.getaddrinfo, threading.Event()

    def slow_look_up(host, *arguments, **options):
        if host == "redis.test":
            answers.wait(PATIENCE)
            host = "127.0.0.1"
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    app = make_redis_app(forwarder.url.replace("127.0.0.1", "redis.test"))
    assert_refused(app, READS)
    answers.set()
    assert seconds_until_successful(app, READS[:1]) < RETURN_BOUND


# ----------------------------------------------------------------------------------- nothing is lost ----


def load(port: int, number: int, journal: dict[str, Any], lock: threading.Lock) -> None:
    """One client that creates, acknowledges and saves without pause, until the service is gone. `journal` records what
    was confirmed by a 2xx, and what was requested last."""
    bearer = {**BEARER, "Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:

        def call(method: str, path: str, body: Any = None) -> Any:
            connection.request(method, path, None if body is None else json.dumps(body), bearer)
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status in (200, 201), answer
            return answer

        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                with lock:
                    journal["count"] += 1
                    count = journal["count"]
                made = call("POST", "/api/v1/notifications", {**NOTIFICATION, "sessionTimestamp": T + count,
                                                              "totalPrompts": 1})["id"]  # fmt: skip
                with lock:
                    journal["created"].append(made)
                journal["requested"][number] = count
                call("PUT", f"/api/v1/session/{number}", {"scriptText": f"{count}," * 20_000})
                journal["saved"][number] = count
                if count % 2:
                    with lock:
                        journal["acknowledging"].add(made)
                    call("POST", f"/api/v1/notifications/{made}/ack")
                    with lock:
                        journal["acknowledged"].add(made)


@pytest.mark.slow
@pytest.mark.skipif(service.WINDOWS, reason="fifty starts take many minutes where a start takes seconds")
def test_a_service_killed_50_times_under_load_loses_nothing_that_it_confirmed(start_service, module_copy):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    clients = 3
    journal: dict[str, Any] = {"count": 0, "created": [], "requested": {}, "saved": {}}
    journal |= {"acknowledging": set(), "acknowledged": set()}
    lock = threading.Lock()
    for _ in range(50):
        running = start_service()
        until = len(journal["created"]) + chance.randint(1, 12)
        threads = [
            threading.Thread(target=load, args=[running.port, number, journal, lock]) for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda until=until: len(journal["created"]) >= until)
        running.process.kill()
        running.stop()
        for thread in threads:
            thread.join(PATIENCE)

        with contextlib.closing(service.SqliteStore(module_copy.parent / "data" / "storyteller.sqlite3")) as store:
            ids = [member["id"] for member in members_of(store)]
            for number in journal["requested"]:
                stored = store.session(number)
                assert stored or number not in journal["saved"]
                if stored:
                    count, _, rest = json.loads(stored.document)["scriptText"].partition(",")
                    assert rest == f"{count}," * 19_999
                    assert journal["saved"].get(number, 0) <= int(count) <= journal["requested"][number]
        assert len(ids) == len(set(ids))
        assert not set(ids) & journal["acknowledged"]
        assert set(journal["created"]) - journal["acknowledging"] <= set(ids)
    assert len(journal["acknowledged"]) > 50


# Operations on a store in a process that can be killed: each is a line of JSON, and so is its result.
STORE_PROCESS = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import storyteller_automation as service
service.RedisClient.PROBE_INTERVAL = 0.02
location = sys.argv[2]
store = service.RedisStore(location) if "://" in location else service.SqliteStore(pathlib.Path(location))
notifications = service.Notifications(store)
def draft(kind, session):
    return service.Draft(kind, session, {"totalPrompts": 1, "totalBeats": 1})
def state(sessions):
    found = notifications.check(list(service.TOTALS), 1000)
    stored = [store.session(timestamp) for timestamp in sessions]
    return [[[each.type, json.loads(each.text)["sessionTimestamp"], each.id] for each in found],
            [each and [each.document.decode(), each.announced] for each in stored]]
operations = {
    "create": lambda kind, session: notifications.create([draft(kind, session)])[0][0].id,
    "ack": lambda id: bool(notifications.acknowledge([id])),
    "save": lambda kind, session, text: store.save(session, service.Change(text.encode(), draft=draft(kind, session))),
    "check": state,
}
print("ready", flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        result = ["ok", operations[name](*arguments)]
    except service.Unavailable as fault:
        result = ["unavailable", str(fault)]
    print(json.dumps(result), flush=True)
"""


class StoreProcess:
    """A store in a process of its own."""

    def __init__(self, location: str) -> None:
        self._command = [sys.executable, "-c", STORE_PROCESS, str(HERE), location]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().strip() == b"ready"

    def send(self, *operation: Any) -> None:
        self.process.stdin.write(json.dumps(operation).encode() + b"\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        """["ok", ...], ["unavailable", reason], or None if it died before."""
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def ask(self, *operation: Any) -> Any:
        self.send(*operation)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


SESSIONS = [T, T + 1, T + 2]


def apply(model: dict[str, Any], verb: str, *arguments: Any) -> tuple[dict[str, Any], Any]:
    """The model after an operation, and its result. An id that only the store knows yet is None."""
    pending, acknowledged, sessions = list(model["pending"]), set(model["acknowledged"]), dict(model["sessions"])
    result: Any = True
    if verb == "ack":
        (id,) = arguments
        if removed := [entry for entry in pending if entry[2] == id]:
            pending.remove(removed[0])
            acknowledged.add(id)
        result = id in acknowledged
    elif verb != "check":
        kind, session, *text = arguments
        if verb == "create" or sessions.get(session, [None, None])[1] != kind:
            same = [entry for entry in pending if entry[:2] == [kind, session]]
            pending += [] if same else [[kind, session, None]]
            result = same[0][2] if same else None
        if verb == "save":
            sessions[session], result = [*text, kind], True
    return {"pending": pending, "acknowledged": acknowledged, "sessions": sessions}, result


def matches(model: dict[str, Any], state: Any) -> bool:
    """Whether the state of a store is that of the model; fills in the ids that only the store knew."""
    pending, stored = state
    if stored != [model["sessions"].get(timestamp) for timestamp in SESSIONS] or len(pending) != len(model["pending"]):
        return False
    known = {id for _, _, id in model["pending"]} | model["acknowledged"]
    for entry, (*fields, id) in zip(pending, model["pending"]):
        if entry[:2] != fields or (entry[2] in known if id is None else entry[2] != id):
            return False
    model["pending"] = pending
    return True


@pytest.mark.slow
@pytest.mark.skipif(service.WINDOWS, reason="fifty starts take many minutes where a start takes seconds")
@pytest.mark.parametrize("store_kind", ["sqlite", "redis"])
def test_a_store_agrees_with_a_model_in_500_random_sequences_with_kills(request, tmp_path, store_kind):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    own = None
    if store_kind == "redis":
        own = request.getfixturevalue("own_redis")("--save", "", "--appendonly", "yes", "--appendfsync", "always")
    model: dict[str, Any] = {"pending": [], "acknowledged": set(), "sessions": {}}
    with contextlib.closing(StoreProcess(own.url if own else str(tmp_path / "store.sqlite3"))) as process:

        def draw() -> list[Any]:
            verb = chance.choice(["create", "ack", "ack", "save", "check"])
            if verb == "check":
                return [verb, SESSIONS]
            if verb == "ack":
                ids = [id for _, _, id in model["pending"]] + sorted(model["acknowledged"])[-3:]
                return [verb, chance.choice([*ids, "notif_of_nobody"])]
            text = json.dumps({"text": str(chance.random()) * chance.choice([1, 10_000])})
            return [verb, chance.choice([BEATS, PROMPTS]), chance.choice(SESSIONS), *[text][: verb == "save"]]

        def state() -> Any:
            """The content of the store, once it answers."""
            found: list[Any] = []

            def answers() -> bool:
                found[:] = process.ask("check", SESSIONS)
                return found[0] == "ok"

            wait_until(answers)
            return found[1]

        for number in range(500):
            for _ in range(chance.randint(1, 6)):
                operation = draw()
                after, expected = apply(model, *operation)
                status, answer = process.ask(*operation)
                assert status == "ok", answer
                if operation[0] == "create":
                    assert expected in (None, answer)
                    after["pending"] = [[kind, session, id or answer] for kind, session, id in after["pending"]]
                elif operation[0] == "check":
                    assert matches(after, answer), number
                else:
                    assert answer is expected
                    assert operation[0] == "ack" or matches(after, state()), (number, operation)
                model = after
            if chance.random() < 0.1:
                operation = draw()
                process.send(*operation)
                kill_at = time.perf_counter() + chance.random() * 0.003
                while time.perf_counter() < kill_at:
                    pass
                (own or process).kill()
                result = process.result()
                if own:
                    own.repair_log()
                    own.start()
                else:
                    process.close()
                    process.start()
                after, _ = apply(model, *operation)
                found = state()
                if matches(after, found):
                    model = after
                else:  # an operation without a result happened completely or not at all
                    assert result is None or result[0] != "ok", (number, operation)
                    assert matches(model, found), (number, operation)


# --------------------------------------------------------------------- folders, disks and the clock ----


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_a_second_service_on_one_data_folder_says_where_the_first_is(request, start_service, run_module, kind):
    store = {"REDIS_URL": request.getfixturevalue("redis_url")} if kind == "redis" else {}
    first = start_service(**store)
    done = run_module(**store, STORYTELLER_PORT=str(first.port))  # the port is in use, too, but it is checked later
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"is in use by the service at http://localhost:{first.port}:" in done.stderr
    assert first.call("GET", "/health")[0] == 200


@pytest.mark.slow
def test_other_commands_work_beside_a_running_service(start_service, run_module):
    running = start_service()
    assert read_check(run_module("check", STORYTELLER_PORT=str(running.port)))["store"] == "OK"
    assert run_module("token", "--subject", "a", "--permission", "gpu:read").returncode == 0


def test_a_killed_service_leaves_no_lock(start_service):
    killed = start_service()
    killed.process.kill()
    killed.stop()
    assert start_service().call("GET", "/health")[0] == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a disk of so many bytes, with more options of mount."""
    with contextlib.ExitStack() as stack:

        def mount(size: int, *options: str) -> Path:
            folder = tmp_path / f"disk-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", str(folder)]
            if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("a small disk can be mounted by root on Linux only")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mount


def fill(folder: Path) -> Path:
    """Write a file that takes all the room; returns its path."""
    path = folder / "filler"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return path


@pytest.mark.parametrize(
    ("command", "has_store"),
    [
        *itertools.product(
            (["serve"], ["check"], ["token", "--subject", "a", "--permission", "gpu:read"]), (False, True)
        ),
        *itertools.product((["backup", "a backup"], ["move", "--to", "redis://127.0.0.1:1"]), [True]),
    ],
)
def test_each_command_reports_a_full_disk_and_its_folder(run_module, start_service, small_disk, command, has_store):
    disk = small_disk(4 << 20)
    if has_store:
        running = start_service(STORYTELLER_DATA_DIR=str(disk))
        assert running.call("PUT", "/api/v1/session/1", SESSION)[0] == 200
        running.stop()
    fill(disk)
    done = run_module(*command, STORYTELLER_DATA_DIR=str(disk))
    assert done.returncode == (1 if command == ["check"] else 2)
    assert f"The disk of the data folder {disk} is full: free space on it." in done.stdout + done.stderr
    assert not re.search(r"\bmove\b|STORYTELLER_API_TOKEN", done.stdout + done.stderr)


def test_on_a_full_disk_reads_continue_and_writes_resume_once_there_is_room(start_service, small_disk):
    disk = small_disk(4 << 20)
    running = start_service(STORYTELLER_DATA_DIR=str(disk))
    before = make_session(size=200_000)
    assert running.call("PUT", "/api/v1/session/1", before)[0] == 200
    filler = fill(disk)
    for number in (1, 2):
        status, answer = running.call("PUT", f"/api/v1/session/{number}", make_session(size=700_000))
        assert (status, "full" in answer["error"]) == (503, True)
    assert running.call("GET", "/api/v1/session/1") == (
        200,
        {"success": True, "data": {**before, "timestamp": 1}, "storage": "sqlite"},
    )
    assert running.call("GET", "/api/v1/session/2")[0] == 404
    assert running.call("GET", "/api/v1/notifications/check")[0] == 200
    assert running.call("GET", "/health") == (503, {"status": "degraded", "store": "sqlite"})
    filler.unlink()
    assert running.call("PUT", "/api/v1/session/2", make_session(size=700_000))[0] == 200
    assert running.call("GET", "/health")[0] == 200


def test_a_session_of_8_mib_needs_no_room_in_the_temporary_folder(serving, make_app, small_disk, monkeypatch):
    disk = small_disk(1 << 20)
    fill(disk)
    monkeypatch.setattr(service.tempfile, "tempdir", str(disk))
    call = functools.partial(Service.call, serving(make_app().app))
    for method, body in [("PUT", LARGE), ("GET", None)]:
        status, answer = call(method, "/api/v1/session/1", body)
        assert (status, answer["success"]) == (200, True)


def test_a_read_only_data_folder_prevents_the_start(run_module, small_disk):
    done = run_module(STORYTELLER_DATA_DIR=str(small_disk(1 << 20, "ro")))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "cannot be written" in done.stderr


def corrupt(path: Path, start: int, end: int | None = None) -> None:
    with open(path, "r+b") as file:
        end = end or path.stat().st_size
        file.seek(start)
        file.write(b"\xa5" * (end - start))


def make_corrupt(path: Path) -> None:
    with contextlib.closing(service.SqliteStore(path)) as store:
        for number in range(50):
            store.save(number, service.Change(b"x" * 10_000))
    corrupt(path, 8192)


@pytest.mark.parametrize(
    "make, words",
    [
        pytest.param(lambda path: make_database(path, "PRAGMA user_version = 99"), "newer version", id="newer"),
        pytest.param(lambda path: path.write_bytes(b"no database " * 500), "it is damaged", id="no database"),
        pytest.param(lambda path: make_database(path, "CREATE TABLE session (x)"), "another program's", id="another's"),
        pytest.param(make_corrupt, "damaged|malformed", id="damaged"),
    ],
)
def test_an_unusable_database_is_not_modified(tmp_path, make, words):
    path = tmp_path / "store.sqlite3"
    make(path)
    before = path.read_bytes()
    with pytest.raises(service.StartError, match=words):
        service.SqliteStore(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("first", [0, 4096], ids=["its header too", "its pages"])
def test_damage_found_at_run_time_is_a_503_and_health_is_degraded(make_app, tmp_path, first):
    path = tmp_path / "damaged.sqlite3"
    with contextlib.closing(service.SqliteStore(path)) as store:
        for number in range(300):
            store.save(number, service.Change(json.dumps({"scriptText": "x" * 20_000}).encode()))
    with contextlib.closing(service.SqliteStore(path)) as store:
        app = make_app(store)
        assert app.get("/health").json == {"status": "ok", "store": "sqlite"}
        corrupt(path, first)
        assert app.get("/api/v1/session/250", status=503).json["success"] is False
        assert app.get("/health", status=503).json == {"status": "degraded", "store": "sqlite"}


# Moves the wall clock of a process, but not its monotonic clock, by the number of seconds in a file.
MOVED_CLOCK = """
import os, time
def moved(read, unit):
    def now():
        with open(os.environ["CLOCK_MOVED_BY"]) as file:
            return read() + type(read())(file.read() or 0) * unit
    return now
time.time, time.time_ns = moved(time.time, 1), moved(time.time_ns, 1_000_000_000)
"""


@pytest.fixture
def moved_clock(tmp_path: Path) -> Iterator[tuple[Callable[[int], None], dict[str, str]]]:
    """A function that sets the clock of the services that are started with these variables."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(MOVED_CLOCK)

    def move(seconds: int) -> None:
        # In place and of constant length: Windows does not replace a file that the service has open.
        with open(place, "r+", encoding="ascii") as file:
            file.write(f"{seconds:+08d}")

    place = folder / "moved by"
    place.write_text("+0000000")
    return move, {"PYTHONPATH": str(folder), "CLOCK_MOVED_BY": str(place)}


HOUR = 3600


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_notifications_keep_their_order_when_the_clock_is_set(request, start_service, moved_clock, kind):
    move, variables = moved_clock
    store = {"REDIS_URL": request.getfixturevalue("redis_url")} if kind == "redis" else {}
    running = start_service(**store, **variables)
    made = []
    for number, seconds in enumerate([0, HOUR // 2, 0, 60 - HOUR // 2]):
        move(seconds)
        body = {**NOTIFICATION, "sessionTimestamp": number, "totalPrompts": 1}
        status, answer = running.call("POST", "/api/v1/notifications", body)
        assert status == 201
        made.append(answer["id"])
    running.stop()
    running = start_service(**store, **variables)  # the store keeps the newest time
    made.append(running.call("POST", "/api/v1/notifications", {**NOTIFICATION, "totalPrompts": 1})[1]["id"])
    found = running.call("GET", "/api/v1/notifications/check")[1]["notifications"]
    assert [notification["id"] for notification in found] == made
    times = [service.read_time(notification["timestamp"]) for notification in found]
    assert times == sorted(set(times))  # as text "...25Z" comes after "...25.001Z"


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_caches_limits_and_timeouts_do_not_depend_on_the_wall_clock(
    start_service, moved_clock, nvidia_smi, swarmui_folder, leash, settings, tmp_path, seconds
):
    move, variables = moved_clock
    running = start_service(
        **variables,
        NVIDIA_SMI=nvidia_smi(GOOD, {}),
        GPU_CACHE_SECONDS="600",
        SWARMUI_PATH=str(swarmui_folder(exit=3)),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_START_TIMEOUT="1",
        SWARMUI_POLL_INTERVAL="0.05",
        STORYTELLER_TOKEN_FAILURES="1",
    )
    wrong = {"Authorization": "Bearer wrong"}
    calls = [("GET", "/api/v1/gpu/status", BEARER), ("POST", "/api/v1/swarmui/start", BEARER), ("GET", "/x", wrong)]
    assert [running.call(method, path, headers=headers)[0] for method, path, headers in calls] == [200, 500, 401]
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert [running.call("GET", "/health")[0] for _ in range(10)] == [200] * 10  # so those bytes have arrived
        move(seconds)
        found = [running.call(method, path, headers=headers)[0] for method, path, headers in calls]
        assert found == ([200, 429, 429] if not service.WINDOWS else [200, found[1], 429])
        assert (tmp_path / "runs").read_text().split().count("gpus") == 1
        assert [running.call("GET", "/health")[0] for _ in range(10)] == [200] * 10
        slow.sendall(b"\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")


# ------------------------------------------------------------------------------- SwarmUI misbehaves ----


def zombies() -> list[str]:
    """Children of this process that ended and were not waited for; there are none on Windows."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if fields[:2] == ["Z", str(os.getpid())]:
                found.append(stat.parent.name)
    return found


@pytest.fixture
def nothing_left(leash: Leash) -> Iterator[Callable[[], None]]:
    """Fails if a completed start left a thread; at the end of the test, if anything left a thread or a zombie."""
    before = set(threading.enumerate())

    def further() -> set[str]:
        """Other threads than the two of the supervisor and the timer of its probe."""
        threads = set(threading.enumerate()) - before
        return {thread.name for thread in threads if not isinstance(thread, threading.Timer)} - {
            "swarmui",
            "swarmui-log",
        }

    def check() -> None:
        wait_until(lambda: further() <= {"swarmui-watch"})  # it waits for the end of a process

    yield check
    leash.close()
    wait_until(lambda: not further())
    wait_until(lambda: not zombies())


SLOW_START = {"start_timeout": 8.0} if service.WINDOWS else {"start_timeout": 1.0}


def fail_in_time(supervisor: service.SwarmUISupervisor) -> str:
    """Why a start failed: long before PATIENCE, which is a timeout or an interval in the tests that use this."""
    began = time.monotonic()
    message = failure(supervisor)
    assert time.monotonic() - began < PATIENCE / 2
    return message


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param({"exit": 1, "print": "no CUDA \x1b[0m\n"}, "exited with code 1: no CUDA  [0m", id="exits with 1"),
        pytest.param({"exit": 134}, f"exited with code {1 if service.WINDOWS else 134}: ", id="aborts"),
        pytest.param({"exit": 1, "print": "caf\udce9 \udcff\n"}, "exited with code 1: caf\ufffd \ufffd", id="no UTF-8"),
        pytest.param({"exit": 1, "flood": 1}, "exited with code 1: xxxx", id="exits with 1, and one endless line"),
        pytest.param({"exit": 1, "child": True}, "exited with code 1: ", id="a child lives on"),
    ],
)
def test_a_swarmui_that_fails_immediately_is_reported_immediately(
    make_supervisor, swarmui_folder, nothing_left, plan, words
):
    """The next probe is an hour away. On Windows its launch script pauses, and gets no key."""
    folder = swarmui_folder(**plan, leash_code=LEASH)
    message = fail_in_time(make_supervisor(swarmui_path=folder, poll_interval=3600.0, start_timeout=PATIENCE))
    assert words in message
    assert len(message) < 5000
    nothing_left()


@pytest.mark.parametrize("code", [0, 42])
def test_an_executable_that_exits_immediately_is_reported_with_its_code(
    make_supervisor, tmp_path, leash, nothing_left, code
):
    """Code 0 may be a wrapper's, so it is reported after the timeout; after 42, no script starts it again."""
    program = write_program(tmp_path / "SwarmUI", SWARMUI, {"leash": leash.port, "exit": code, "print": "bye\n"})
    message = fail_in_time(make_supervisor(swarmui_path=program, poll_interval=PATIENCE, **SLOW_START))
    assert message.endswith(f"it exited with code {code}: bye")
    nothing_left()


def test_a_swarmui_that_its_script_restarts_is_waited_for(make_supervisor, swarmui_folder, tmp_path, leash):
    folder = swarmui_folder(exit=42, once=str(tmp_path / "once"))
    assert ready(make_supervisor(swarmui_path=folder)).message == "SwarmUI started successfully"
    assert leash.next().has_ended()
    assert leash.next().is_alive()


def test_a_swarmui_that_prints_100_mb_starts(make_supervisor, swarmui_folder, settings, nothing_left, monkeypatch):
    monkeypatch.setattr(service, "LOG_LIMIT", 10**12)  # so its log is not rotated
    supervisor = make_supervisor(swarmui_path=swarmui_folder(flood=100))
    assert ready(supervisor).message == "SwarmUI started successfully"
    assert (settings.data_dir / "swarmui.log").stat().st_size >= 100_000_000
    nothing_left()


HEAD = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param({"answer": [200, {}, "<html>hello</html>"]}, "answered 200: <html>hello</html>", id="HTML"),
        pytest.param({"raw": [HEAD + '{"session_id"', "the end"]}, 'answered 200: {"session_id"', id="half a body"),
        pytest.param({"raw": [HEAD[:10], "the end"]}, "sent no valid response", id="half a head"),
        pytest.param({"raw": [HEAD, "silence"]}, "did not answer within 0.3 s", id="half, then silence"),
        pytest.param({"raw": ["", "silence"]}, "did not answer within 0.3 s", id="silence"),
        pytest.param(
            {"raw": [HEAD[:-4], "the last letter for ever"]}, "did not answer within 0.3 s", id="an endless head"
        ),
        pytest.param(
            {"raw": ["HTTP/1.1 200 OK\r\n\r\n{", "the last letter for ever"]}, "within 0.3 s", id="an endless body"
        ),
        pytest.param({"delay": 3600}, "nothing listens", id="never listens"),
    ],
)
def test_a_swarmui_that_responds_with_nonsense_is_reported_and_not_relaunched(
    make_supervisor, swarmui_folder, settings, leash, nothing_left, plan, words
):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(**plan), health_timeout=0.3, start_timeout=0.2)
    wait_until(lambda: words in fail_in_time(supervisor))  # until it listens, the words are different
    message = fail_in_time(supervisor)
    assert "no answer within 0.2 s (last: " in message
    assert message.endswith(f"it keeps running, so try again, or see {settings.data_dir / 'swarmui.log'}")
    nothing_left()
    assert leash.next().is_alive()
    assert leash.count_further() == 0


def test_a_swarmui_that_reads_a_key_gets_end_of_file(start_service, swarmui_folder, settings):
    """The service has a console of its own here, where no key is pressed."""
    running = start_service(
        SWARMUI_PATH=str(swarmui_folder(key=True, exit=1)),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_START_TIMEOUT="20",
    )
    status, answer = running.call("POST", "/api/v1/swarmui/start")
    assert (status, "exited with code 1" in answer["error"]) == (500, True)


def test_a_swarmui_that_answers_just_before_its_timeout_is_ready(make_supervisor, swarmui_folder, nothing_left):
    """It is probed once more at the end, although the next probe is due later."""
    supervisor = make_supervisor(
        swarmui_path=swarmui_folder(delay=0.05), poll_interval=PATIENCE, health_timeout=3600.0, **SLOW_START
    )
    began = time.monotonic()
    assert ready(supervisor).message == "SwarmUI started successfully"
    assert time.monotonic() - began < PATIENCE / 2
    nothing_left()


def test_a_swarmui_killed_during_its_start_is_reported_immediately(
    make_supervisor, swarmui_folder, leash, nothing_left
):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(delay=3600), poll_interval=3600.0, start_timeout=PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(failure, supervisor)
        kill(leash.next())
        assert "exited with code" in waiting.result(PATIENCE / 2)
    nothing_left()


def test_a_swarmui_that_exits_after_its_start_is_launched_again(make_supervisor, swarmui_folder, leash):
    supervisor = make_supervisor(swarmui_path=swarmui_folder(), start_interval=0.0)
    ready(supervisor)
    kill(leash.next())
    wait_until(lambda: not zombies() and "swarmui-watch" not in {thread.name for thread in threading.enumerate()})
    assert ready(supervisor).message == "SwarmUI started successfully"
    assert leash.next().is_alive()


def test_a_restarted_service_does_not_launch_a_second_swarmui_while_one_starts(
    start_service, swarmui_folder, leash, settings, tmp_path
):
    variables = {
        "SWARMUI_PATH": str(swarmui_folder(after=str(tmp_path / "now"))),
        "SWARMUI_API_URL": settings.swarmui_api_url,
        "SWARMUI_START_TIMEOUT": "0.2",
        "SWARMUI_POLL_INTERVAL": "0.05",
    }
    first = start_service(**variables)
    assert first.call("POST", "/api/v1/swarmui/start")[0] == 500
    swarmui = leash.next()
    first.stop()

    second = start_service(**variables)
    status, answer = second.call("POST", "/api/v1/swarmui/start")
    assert (status, "it keeps running, so try again" in answer["error"]) == (500, True)
    (tmp_path / "now").touch()
    wait_until(lambda: second.call("POST", "/api/v1/swarmui/start")[0] == 200)
    assert swarmui.is_alive()
    assert leash.count_further() == 0


@pytest.mark.parametrize(
    "record",
    [
        pytest.param({"pid": os.getpid(), "identity": "of an earlier one"}, id="the pid of another process"),
        pytest.param({"pid": os.getpid(), "identity": None}, id="an unknown identity"),
        pytest.param({"pid": 0x7FFFFFF0, "identity": "x"}, id="an unused pid"),
        pytest.param({"pid": "x"}, id="not a pid"),
        pytest.param({"pid": 1, "identity": "x", "launchedAt": "x", "serverId": 7}, id="wrong types"),
        pytest.param([], id="not an object"),
    ],
)
def test_a_stale_record_of_swarmui_does_not_prevent_a_launch(make_supervisor, settings, swarmui_folder, leash, record):
    (settings.data_dir / "swarmui.json").write_text(json.dumps(record))
    assert ready(make_supervisor(swarmui_path=swarmui_folder())).message == "SwarmUI started successfully"
    assert leash.next().is_alive()


def test_the_exit_of_a_swarmui_from_an_earlier_run_is_reported(make_supervisor, settings, swarmui_folder, leash):
    """Its exit code is unknown, as it is not a child of this service."""
    folder = swarmui_folder(delay=3600)
    first = make_supervisor(swarmui_path=folder, start_timeout=0.1)
    failure(first)
    first.close()
    swarmui = leash.next()
    again = make_supervisor(swarmui_path=folder, health_timeout=0.3, start_timeout=PATIENCE)
    waiting = again.start()
    with socket.create_server(("127.0.0.1", settings.swarmui_port)) as listener:
        for _ in range(3):  # the first probe may be from before the start, and the second may still run
            listener.accept()[0].close()
        kill(swarmui)
        assert "it exited" in str(waiting.exception(PATIENCE))
    assert leash.count_further() == 0


def test_the_exit_of_a_swarmui_from_an_earlier_run_is_noticed_between_two_probes(
    make_supervisor, swarmui_folder, leash
):
    first = make_supervisor(swarmui_path=swarmui_folder())
    ready(first)
    first.close()
    again = make_supervisor(poll_interval=3600.0)
    wait_until(lambda: again.status()["state"] == "ready")
    kill(leash.next())
    wait_until(lambda: again.status()["state"] == "failed")


# Prints numbered lines without end, faster than the log is checked.
CHATTER = """
import itertools
hold_leash(plan["leash"])
for number in itertools.count():
    print(f"line {number:09d}" + "." * 80, flush=True)
    if number % 2 == 0:  # Wine's append is not atomic: during a truncation it leaves zeros
        threading.Event().wait(0.001)
"""


def numbers_in(path: Path) -> list[int]:
    """The numbers of its complete lines; the first and the last may be incomplete."""
    assert b"\0" not in path.read_bytes()
    lines = path.read_bytes().splitlines()[1:-1]
    assert all(re.fullmatch(rb"line \d{9}\.{80}", line) for line in lines)
    return [int(line[5:14]) for line in lines]


def test_swarmuis_log_is_rotated_while_swarmui_writes_to_it(tmp_path, leash, monkeypatch):
    monkeypatch.setattr(service, "LOG_LIMIT", 20_000)
    program = write_program(tmp_path / "chatter", CHATTER, {"leash": leash.port})
    path = tmp_path / "swarmui.log"
    process = service.launch_detached(program, [], tmp_path, path).process
    chatter = leash.next()
    for _ in range(5):
        wait_until(lambda: path.stat().st_size > 20_000)
        service.shorten_log(path)
    wait_until(lambda: path.stat().st_size > 1000)
    assert chatter.is_alive()
    leash.close()
    process.wait(PATIENCE)
    older = sorted(tmp_path.glob("swarmui.log.*"))
    assert [(file.name, file.stat().st_size) for file in older] == [(f"swarmui.log.{n}", 20_000) for n in (1, 2, 3)]
    numbers = [number for file in [*reversed(older), path] for number in numbers_in(file)]
    assert numbers == sorted(set(numbers))  # none twice, all in order


def test_a_rotated_log_keeps_its_end_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "LOG_LIMIT", 1000)
    (tmp_path / "log").write_text("a" * 5000 + "b" * 999 + "c")
    service.shorten_log(tmp_path / "log")
    assert (tmp_path / "log.1").read_text() == "b" * 999 + "c"


def test_a_full_disk_keeps_the_older_logs_of_swarmui(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "LOG_LIMIT", 1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999))
    (tmp_path / "log").write_text("a" * 1001)
    (tmp_path / "log.1").write_text("b")
    assert service.shorten_log(tmp_path / "log") == 60.0
    assert "log cannot be shortened (No space left on device): free disk space" in caplog.text
    assert {file.name: file.read_text()[:1] for file in tmp_path.iterdir()} == {"log": "a", "log.1": "b"}


def test_a_log_that_cannot_be_shortened_is_a_warning_and_retried_after_a_minute(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "LOG_LIMIT", -1)
    path = tmp_path / "swarmui.log"
    path.mkdir()
    assert service.shorten_log(path) == 60.0
    assert re.search(r"swarmui\.log cannot be shortened \(.+\): free disk space", caplog.text)
    path.rmdir()
    assert service.shorten_log(path) == 1.0


def test_swarmuis_log_is_rotated_while_the_older_ones_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "LOG_LIMIT", 1000)
    path = tmp_path / "swarmui.log"
    with contextlib.ExitStack() as readers:
        for letter in "abcde":
            path.write_text(letter * 1001)
            service.shorten_log(path)
            assert path.stat().st_size == 0
            assert (tmp_path / "swarmui.log.1").read_text() == letter * 1000
            for older in tmp_path.glob("swarmui.log.*"):
                readers.enter_context(open(older))


def test_the_supervisor_rotates_swarmuis_log(make_supervisor, settings, monkeypatch):
    monkeypatch.setattr(service, "LOG_LIMIT", 20_000)
    supervisor = make_supervisor()
    (settings.data_dir / "swarmui.log").write_bytes(b"x" * 20_001)
    wait_until((settings.data_dir / "swarmui.log.1").exists)
    supervisor.close()
    wait_until(lambda: "swarmui-log" not in {thread.name for thread in threading.enumerate()})


def test_a_failed_start_does_not_quote_the_log_of_an_earlier_launch(make_supervisor, settings, swarmui_folder):
    (settings.data_dir / "swarmui.log").write_bytes(b"of the last run\n" * 2000)
    assert "of the last run" not in failure(make_supervisor(swarmui_path=swarmui_folder(exit=1)))


# ------------------------------------------------------------------------------------ shutting down ----


class Stopping:
    """A service with a request in flight, whose response comes once the test calls release()."""

    def __init__(self, running: Service, pool: ThreadPoolExecutor, release: Path, runs: Path) -> None:
        self.running = running
        self.release = release.touch
        self.in_flight = pool.submit(running.call, "GET", "/api/v1/gpu/status")
        wait_until(runs.exists)

    def tell(self) -> None:
        """Tell the service to stop; return once it accepts no more connections."""
        self.running.press_ctrl_c()
        wait_until(lambda: not can_connect(self.running.port))


@pytest.fixture
def stopping(start_service, change_module, nvidia_smi, tmp_path) -> Iterator[Stopping]:
    """With a grace period that suffices on any PC."""
    change_module(GRACE=PATIENCE)
    running = start_service(
        NVIDIA_SMI=nvidia_smi({**GOOD, "after": str(tmp_path / "release")}, {}), NVIDIA_SMI_TIMEOUT=str(PATIENCE)
    )
    with ThreadPoolExecutor(1) as pool:
        yield Stopping(running, pool, tmp_path / "release", tmp_path / "runs")


def test_a_shutdown_refuses_connections_and_completes_requests_in_flight(stopping):
    stopping.tell()
    assert not stopping.in_flight.done()
    stopping.release()
    status, answer = stopping.in_flight.result(PATIENCE)
    assert (status, answer["available"], answer["utilization"]) == (200, True, 8)
    assert stopping.running.process.wait(PATIENCE) == 0
    assert has_ended_in_order(stopping.running.folder)


def test_during_a_shutdown_new_requests_on_open_connections_are_a_503(stopping):
    with send_request(stopping.running.port, POLL) as client:
        assert answer_of(client)[2] == b'{"notifications":[]}'
        stopping.tell()
        client.sendall(POLL.encode())
        status, headers, body = answer_of(client)
        assert (status, "is stopping" in json.loads(body)["error"]) == (503, True)
        assert int(headers["Retry-After"]) >= 1
    stopping.release()
    assert stopping.running.process.wait(PATIENCE) == 0


def upload(port: int) -> tuple[socket.socket, bytes]:
    """A connection over which the beginning of a session was sent, and the rest."""
    body = json.dumps(SESSION).encode()
    head = request_of("PUT", "/api/v1/session/5", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return send_request(port, head + body[:9].decode()), body[9:]


def test_a_shutdown_completes_an_upload_that_has_begun(start_service, change_module):
    change_module(GRACE=PATIENCE)
    running = start_service()
    client, rest = upload(running.port)
    with client:
        assert running.call("GET", "/health")[0] == 200  # so those bytes have arrived
        running.press_ctrl_c()
        wait_until(lambda: not can_connect(running.port))
        client.sendall(rest)
        assert answer_of(client)[0] == 200
    assert running.process.wait(PATIENCE) == 0


@contextlib.contextmanager
def reading_slowly(port: int, path: str) -> Iterator[http.client.HTTPResponse]:
    """The response to a GET, of which only what the caller reads is received."""
    with send_request(port, request_of("GET", path), receive_buffer=4096) as client:
        response = http.client.HTTPResponse(client)
        response.begin()
        yield response


def test_a_shutdown_sends_the_whole_response_to_a_slow_reader(start_service, change_module):
    change_module(GRACE=PATIENCE)
    running = start_service()
    assert running.call("PUT", "/api/v1/session/5", LARGE)[0] == 200
    with reading_slowly(running.port, "/api/v1/session/5") as response:
        running.press_ctrl_c()
        wait_until(lambda: not can_connect(running.port))
        assert json.loads(response.read())["data"] == {**LARGE, "timestamp": 5}
    assert running.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("is_upload", [True, False], ids=["upload", "download"])
def test_a_stalled_client_delays_a_shutdown_only_for_the_grace_period(start_service, change_module, is_upload):
    change_module(GRACE=0.2)
    running = start_service()
    assert running.call("PUT", "/api/v1/session/5", LARGE)[0] == 200
    with upload(running.port)[0] if is_upload else reading_slowly(running.port, "/api/v1/session/5"):
        assert running.call("GET", "/health")[0] == 200  # so the bytes of the upload have arrived
        running.press_ctrl_c()
        assert running.process.wait(PATIENCE) == 0
    assert has_ended_in_order(running.folder)


def assert_start_is_refused(answer: tuple[int, str | None, Any]) -> None:
    status, retry_after, body = answer
    assert (status, body["success"], "is stopping" in body["error"]) == (503, False, True)
    assert int(retry_after) >= 1


def test_a_shutdown_answers_pending_starts_and_leaves_swarmui_running(start_service, swarmui_folder, leash, settings):
    folder = swarmui_folder(delay=3600)
    running = start_service(SWARMUI_PATH=str(folder), SWARMUI_API_URL=settings.swarmui_api_url)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(start_swarmui, running)
        swarmui = leash.next()
        running.press_ctrl_c()
        assert_start_is_refused(waiting.result(PATIENCE))
    assert running.process.wait(PATIENCE) == 0
    assert swarmui.is_alive()


def test_a_shutdown_answers_a_start_in_the_middle_of_a_probe(start_service, settings):
    """SwarmUI accepts the connection, and has an hour to respond."""
    with socket.create_server(("127.0.0.1", settings.swarmui_port)) as listener, ThreadPoolExecutor(1) as pool:
        running = start_service(SWARMUI_API_URL=settings.swarmui_api_url, SWARMUI_HEALTH_TIMEOUT="3600")
        waiting = pool.submit(start_swarmui, running)
        with listener.accept()[0]:
            running.press_ctrl_c()
            assert_start_is_refused(waiting.result(PATIENCE))
            assert running.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_a_running_nvidia_smi_ends_with_the_service(start_service, change_module, nvidia_smi, leash, twice):
    """After a second Ctrl+C the service ends at once, with code 1."""
    change_module(GRACE=3600.0 if twice else 0.2)
    running = start_service(NVIDIA_SMI=nvidia_smi({"hang": True}, {}), NVIDIA_SMI_TIMEOUT="3600")
    with send_request(running.port, request_of("GET", "/api/v1/gpu/status")):
        child = leash.next()
        running.press_ctrl_c()
        if twice:
            wait_until(lambda: not can_connect(running.port))
            running.press_ctrl_c()
        assert running.process.wait(PATIENCE) == (1 if twice else 0)
    assert child.has_ended()


# -------------------------------------------------------------------------------- seen from outside ----


def exchange(port: int, request: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of the response to these bytes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(request)
        return answer_of(client, request.split()[0].decode())


JSON_BODY = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n[]"


@pytest.mark.parametrize(
    ("line", "rest", "status"),
    [
        pytest.param("GET /health", "\r\n", 200, id="200"),
        pytest.param("OPTIONS /health", "\r\n", 204, id="204"),
        pytest.param("GET /api/v1/notifications/check?limit=x", "\r\n", 400, id="400"),
        pytest.param("GET /api/v1/session/1", "Authorization: Bearer wrong\r\n\r\n", 401, id="401"),
        pytest.param("GET /nowhere", "\r\n", 404, id="404"),
        pytest.param("HEAD /nowhere", "\r\n", 404, id="HEAD"),
        pytest.param("PATCH /health", "\r\n", 405, id="405"),
        pytest.param("PUT /api/v1/session/1", "\r\n", 415, id="415"),
        pytest.param("PUT /api/v1/session/1", JSON_BODY, 400, id="an invalid body"),
        pytest.param("GET /health", "Host: elsewhere\r\n\r\n", 421, id="421"),
        pytest.param("GET /openapi.json", "\r\n", 500, id="500"),
        pytest.param("POST /api/v1/swarmui/start", "\r\n", 500, id="an internal error"),
        pytest.param("GET /health", "no header\r\n\r\n", 400, id="not a header"),
        pytest.param("GET /health", "Content-Length: x\r\n\r\n", 400, id="not a length"),
        pytest.param("GET /health", f"X: {'x' * (65 * 1024)}\r\n\r\n", 431, id="headers too large"),
        pytest.param("PUT /api/v1/session/1", "Transfer-Encoding: gzip\r\n\r\n", 501, id="gzip"),
        pytest.param("PUT /api/v1/session/1", "Transfer-Encoding: chunked\r\n\r\nx\r\n", 400, id="not a chunk"),
    ],
)
def test_every_response_has_a_request_id(serving, make_app, monkeypatch, line, rest, status):
    monkeypatch.setattr(service, "describe_api", lambda: {}["unforeseen"])
    port = serving(make_app().app).port
    token = "" if "Bearer" in rest else f"Authorization: Bearer {TOKEN}\r\n"
    for own_id in ("", "my-own.1"):
        own = f"X-Request-Id: {own_id}\r\n" if own_id else ""
        answer = exchange(port, f"{line} HTTP/1.1\r\nHost: localhost\r\n{own}{token}{rest}".encode())
        assert answer[0] == status
        (request_id,) = answer[1].get_all("X-Request-Id")
        assert re.fullmatch(own_id or "[0-9a-f]{16}", request_id)


@pytest.mark.parametrize("own", ["a", "A" * 64, "0.9_b-C"])
def test_a_valid_request_id_is_kept(make_app, own):
    assert make_app().get("/health", headers={"X-Request-Id": own}).headers["X-Request-Id"] == own


@pytest.mark.parametrize("own", ["", "A" * 65, "a b", "a;b", "a\tb", "a, b", "\u00fc", "\u00e9"])
def test_an_invalid_request_id_is_replaced(make_app, own):
    app = make_app()
    ids = [app.get("/health", headers={"X-Request-Id": own}).headers["X-Request-Id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{16}", id) for id in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("method", "path", "status", "level"),
    [
        ("GET", "/health", 200, "DEBUG"),
        ("HEAD", "/health", 200, "DEBUG"),
        ("OPTIONS", "/health", 204, "DEBUG"),
        ("GET", "/api/v1/notifications/check", 200, "DEBUG"),
        ("PUT", "/api/v1/session/5", 200, "INFO"),
        ("POST", "/api/v1/notifications/nobody/ack", 404, "INFO"),
        ("GET", "/api/v1/session/6", 404, "INFO"),
        ("GET", "/api/v1/gpu/status", 500, "INFO"),
    ],
)
def test_each_request_is_one_log_line_and_polls_are_logged_at_debug(make_app, caplog, method, path, status, level):
    caplog.set_level("DEBUG", "storyteller")
    body = json.dumps(SESSION).encode() if method == "PUT" else b""
    headers = {"Content-Type": "application/json"}
    response = make_app().request(path, method=method, body=body, headers=headers, status=status)
    (record,) = [record for record in caplog.records if record.getMessage().startswith("http: ")]
    assert record.levelname == level
    caller = "-" if path == "/health" else "api-token"
    request_id = response.headers["X-Request-Id"]
    assert re.fullmatch(rf"http: {method} {path} {status} {caller} \d+\.\d ms {request_id}", record.getMessage())


def log_of(running: Service) -> str:
    return (running.folder / "data" / "storyteller.log").read_text("utf-8")


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 1), ("warning", 0)])
def test_the_log_level_is_a_setting(start_service, level, lines):
    running = start_service(STORYTELLER_LOG_LEVEL=level)
    assert running.call("GET", "/health")[0] == 200
    assert running.call("PUT", "/api/v1/session/5", SESSION)[0] == 200
    running.stop()
    assert log_of(running).count("http: ") == lines


def test_the_log_is_text_or_json_lines(start_service):
    for kind in ("text", "json"):
        running = start_service(STORYTELLER_LOG_FORMAT=kind)
        assert running.call("PUT", "/api/v1/session/5", SESSION)[0] == 200
        running.stop()
    lines = log_of(running).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("{"))
    assert [bool(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO \w+: ", line)) for line in lines] == [
        number < first for number in range(len(lines))
    ]
    records = [json.loads(line) for line in lines[first:]]
    assert all(list(record) == ["time", "level", "message"] for record in records)
    assert [record["level"] for record in records if "PUT /api/v1/session/5 200" in record["message"]] == ["INFO"]


@pytest.fixture
def error_record() -> logging.LogRecord:
    try:
        raise RuntimeError("unforeseen\nin \x1b[2J two lines")
    except RuntimeError:
        return logging.LogRecord("storyteller", logging.ERROR, __file__, 1, "http: failed", (), sys.exc_info())


def test_a_traceback_is_part_of_its_json_line(error_record):
    line = service.LogFormatter(as_json=True).format(error_record)
    assert "\n" not in line
    assert "RuntimeError: unforeseen" in json.loads(line)["traceback"]


def test_a_traceback_in_a_text_log_has_no_control_characters(error_record):
    lines = service.LogFormatter(as_json=False).format(error_record).split("\n")
    assert lines[-2:] == ["RuntimeError: unforeseen", r"in \x1b[2J two lines"]
    assert all(line.isprintable() for line in lines)


def test_neither_the_console_nor_the_log_beside_it_gets_control_characters_of_a_traceback(tmp_path):
    code = """if True:
        import sys, pathlib, storyteller_automation as service
        end = service.start_console()
        service.start_logging(pathlib.Path(sys.argv[1]), service.Settings())
        try:
            raise RuntimeError("unforeseen \\x1b[2J")
        except RuntimeError:
            service.log.exception("http: \\x1b[2J failed")
        end()
        """
    command = [sys.executable, "-c", code, tmp_path / "log"]
    folder = Path(service.__file__).parent
    done = subprocess.run(command, cwd=folder, timeout=PATIENCE, check=True, stderr=subprocess.PIPE, encoding="utf-8")
    for text in (done.stderr, (tmp_path / "log").read_text("utf-8")):
        lines = text.splitlines()
        assert lines[0].endswith(r"http: \x1b[2J failed")
        assert lines[-1] == r"RuntimeError: unforeseen \x1b[2J"
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_lone_surrogate_is_escaped_in_the_log(tmp_path, kind):
    code = """if True:
        import sys, pathlib, storyteller_automation as service
        service.start_logging(pathlib.Path(sys.argv[1]), service.Settings(log_format=sys.argv[2]))
        service.log.info("half \\ud83d of it")
        """
    subprocess.run([sys.executable, "-c", code, tmp_path / "log", kind], cwd=HERE, timeout=PATIENCE, check=True)
    (line,) = (tmp_path / "log").read_text("utf-8").splitlines()
    assert r"half \ud83d of it" in line
    assert kind == "text" or json.loads(line)["message"] == "half \ud83d of it"


@pytest.mark.parametrize("kind", ["text", "json"])
def test_control_characters_in_a_path_are_escaped_in_the_log(start_service, kind):
    running = start_service(STORYTELLER_LOG_FORMAT=kind)
    path = "/a%0A2026-01-01%2000:00:00,000%20INFO%20forged%1B[2J%7F%C2%85%E2%80%A8%0D"
    assert running.call("GET", path)[0] == 404
    running.stop()
    (line,) = [line for line in log_of(running).split("\n") if "forged" in line]
    assert line.isprintable()
    message = json.loads(line)["message"] if kind == "json" else line
    assert "http: GET /a\\n2026-01-01 00:00:00,000 INFO forged\\x1b[2J\\x7f" in message


def test_neither_a_body_nor_a_query_nor_a_token_reaches_the_log(start_service):
    running = start_service(STORYTELLER_LOG_LEVEL="debug")
    words = ["w0rd-of-a-body", "w0rd-of-a-query", "w0rd-of-a-token", TOKEN]
    body = {**SESSION, "scriptText": words[0]}
    assert running.call("PUT", "/api/v1/session/5", body)[0] == 200
    assert running.call("PUT", "/api/v1/session/5", {**body, "timestamp": words[0]})[0] == 400
    assert running.call("PUT", "/api/v1/session/5", words[0])[0] == 400
    assert running.call("POST", "/api/v1/notifications", {**NOTIFICATION, "type": words[0]})[0] == 400
    assert running.call("GET", f"/api/v1/session/5?token={words[1]}")[0] == 200
    assert running.call("GET", f"/api/v1/notifications/check?type={words[1]}")[0] == 400
    assert running.call("GET", "/api/v1/session/5", headers={"Authorization": f"Bearer {words[2]}"})[0] == 401
    assert running.call("GET", "/api/v1/session/5", headers={"Authorization": words[2]})[0] == 401
    running.stop()
    assert log_of(running).count("http: ") == 8
    assert not [word for word in words if word in log_of(running) + running.printed]


def test_the_services_log_is_rotated_and_three_older_files_are_kept(start_service, change_module):
    change_module(LOG_LIMIT=1000)
    running = start_service()
    data = running.folder / "data"
    for number in range(100):
        assert running.call("POST", f"/api/v1/notifications/{number:03d}/ack")[0] == 404
    running.stop()
    files = sorted(data.glob("storyteller.log*"))
    assert [file.name for file in files] == ["storyteller.log", *(f"storyteller.log.{number}" for number in (1, 2, 3))]
    assert all(file.stat().st_size <= 1000 for file in files)
    text = "".join(file.read_text("utf-8") for file in [*reversed(files[1:]), files[0]])
    logged = [int(number) for number in re.findall("notifications/(.*)/ack", text)]
    assert logged == [*range(logged[0], 100)]


# ======================================================================================================
# End to end
# ======================================================================================================


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_pipeline_runs_from_beats_to_images(
    request, start_service, nvidia_smi, swarmui_folder, leash, settings, kind
):
    """The End-to-End Test of the requirements, over a socket, against both stores."""
    store = {"REDIS_URL": request.getfixturevalue("redis_url")} if kind == "redis" else {}
    running = start_service(
        **store,
        NVIDIA_SMI=nvidia_smi(GOOD, {"print": "41\n42\n"}),
        SWARMUI_PATH=str(swarmui_folder(delay=0.3)),
        SWARMUI_API_URL=settings.swarmui_api_url,
        SWARMUI_POLL_INTERVAL="0.05",
    )
    assert running.call("GET", "/health", headers={}) == (200, {"status": "ok", "store": kind})

    # StoryArt saves the beats; StorySwarm gets a notification.
    status, saved = running.call("POST", "/api/v1/session/save", make_session(prompts=0))
    assert (status, saved["storage"]) == (200, kind)
    timestamp = saved["sessionKey"].removeprefix("session:")
    status, answer = running.call("GET", "/api/v1/notifications/check?type=beats_ready")
    (beats,) = answer["notifications"]
    assert (beats["sessionTimestamp"], beats["totalBeats"], beats["episodeNumber"]) == (int(timestamp), 249, 2)
    assert running.call("POST", f"/api/v1/notifications/{beats['id']}/ack")[0] == 200
    status, answer = running.call("GET", f"/api/v1/session/{timestamp}/prompts-status")
    assert (answer["promptsReady"], answer["totalBeats"], answer["totalPrompts"]) == (False, 249, 0)

    # StorySwarm reads the session, fills in the prompts, and writes it back; StoryArt gets a notification.
    status, answer = running.call("GET", f"/api/v1/session/{timestamp}")
    assert len(json.dumps(answer["data"])) == pytest.approx(850_000, rel=0.1)
    finished = {**make_session(), "timestamp": int(timestamp)}
    assert running.call("PUT", f"/api/v1/session/{timestamp}", finished)[0] == 200
    status, answer = running.call("GET", f"/api/v1/session/{timestamp}/prompts-status")
    assert (answer["promptsReady"], answer["totalBeats"], answer["totalPrompts"]) == (True, 249, 240)
    status, answer = running.call("GET", "/api/v1/notifications/check")
    (prompts,) = answer["notifications"]
    assert (prompts["type"], prompts["totalPrompts"]) == ("prompts_ready", 240)
    assert running.call("POST", f"/api/v1/notifications/{prompts['id']}/ack")[0] == 200
    assert running.call("GET", "/api/v1/notifications/check")[1] == {"notifications": []}

    # The GPU is free, and SwarmUI starts.
    status, gpu = running.call("GET", "/api/v1/gpu/status")
    assert (status, gpu["available"], gpu["utilization"], gpu["processCount"]) == (200, True, 8, 2)
    status, answer = running.call("POST", "/api/v1/swarmui/start")
    assert (status, answer["success"], answer["port"]) == (200, True, settings.swarmui_port)
    assert leash.next().is_alive()


def test_a_body_over_the_limit_is_a_413_over_the_socket(start_service):
    running = start_service()
    size = service.MAX_BODY + 1
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as client:
        head = f"POST /api/v1/session/save HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        client.sendall(f"{head}Content-Length: {size}\r\nContent-Type: application/json\r\n\r\n".encode())
        for _ in range(0, size, 1 << 20):
            client.sendall(b" " * min(1 << 20, size))
            size -= 1 << 20
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 413
        assert json.loads(answer.read()) == {"success": False, "error": "The body is too large: 50 MiB at most."}


def test_a_chunked_body_is_accepted(start_service):
    running = start_service()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        chunks = iter([json.dumps(SESSION)[:10].encode(), json.dumps(SESSION)[10:].encode()])
        headers = {**BEARER, "Content-Type": "application/json"}
        connection.request("PUT", "/api/v1/session/5", chunks, headers, encode_chunked=True)
        assert connection.getresponse().status == 200
    assert running.call("GET", "/api/v1/session/5")[1]["data"] == {**SESSION, "timestamp": 5}


# ======================================================================================================
# Server
# ======================================================================================================


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


LOCALHOST = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]


@contextlib.contextmanager
def opened(host: str, port: int = 0) -> Iterator[list[tuple[str, int]]]:
    """The addresses and ports that open_sockets listens on, while the block lasts."""
    sockets = service.open_sockets(host, port)
    try:
        yield [listener.getsockname()[:2] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def test_localhost_means_both_loopback_addresses_on_one_port(start_service):
    port = start_service().port
    for address in LOCALHOST:
        connection = http.client.HTTPConnection(address, port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    "error", ["ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT", 10047, 10049, 10051, 10065]
)
def test_localhost_without_ipv6_means_only_127_0_0_1(monkeypatch, error):
    listen = service.listen

    def no_ipv6(address, port):
        if ":" in address:
            raise OSError(vars(service.errno).get(error, error), "no IPv6")
        return listen(address, port)

    monkeypatch.setattr(service, "listen", no_ipv6)
    with opened("localhost") as found:
        assert [address for address, _ in found] == ["127.0.0.1"]


def test_a_port_that_is_free_on_only_one_address_is_not_chosen(monkeypatch):
    """The system chooses one for 127.0.0.1; on ::1 another program has it."""
    listen, refused = service.listen, []

    def listen_late(address, port):
        if ":" not in address:
            return listen(address, port)
        if not refused:
            refused.append(port)
            raise OSError(service.errno.EADDRINUSE, "in use")
        return listen("127.0.0.2", port)

    monkeypatch.setattr(service, "listen", listen_late)
    with opened("localhost") as found:
        assert [address for address, _ in found] == ["127.0.0.1", "127.0.0.2"]
        assert len({port for _, port in found}) == 1


@pytest.mark.parametrize("address", LOCALHOST)
def test_a_port_that_is_in_use_on_either_address_of_localhost_is_refused(address):
    with service.listen(address, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(service.StartError, match=f"^Port {port} is in use .* STORYTELLER_PORT") as refused:
            service.open_sockets("localhost", port)
    with opened("localhost", port):  # nothing was left open: the traceback would keep it open
        del refused


@pytest.mark.parametrize("number", [10013, pytest.param(service.errno.EACCES, marks=ONLY_WINDOWS)])
def test_a_port_that_windows_refuses_is_not_reported_as_in_use(monkeypatch, number):
    """Python gives either number for it."""

    def refuse(address, port):
        raise OSError(number, "access forbidden")

    monkeypatch.setattr(service, "listen", refuse)
    command = "netsh interface ipv4 show excludedportrange protocol=tcp"
    words = f"^Port 8000 .*another program holds it, or Windows reserves it: `{command}`.*STORYTELLER_PORT"
    with pytest.raises(service.StartError, match=words):
        service.open_sockets("localhost", 8000)


@ONLY_POSIX
def test_a_port_that_only_root_may_use_is_not_reported_as_in_use(run_as_user):
    result = run_as_user("--port", "1")
    assert result.returncode == 2
    assert re.fullmatch(
        r"Cannot listen on localhost port 1 \(Permission denied\): set .*STORYTELLER_PORT.\n", result.stderr
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        pytest.param("192.0.2.1", "^Cannot listen on 192.0.2.1 .*: set STORYTELLER_HOST", id="not of this PC"),
        pytest.param("256.1.1.1.1", "^STORYTELLER_HOST 256.1.1.1.1 is not known: set it", id="invalid address"),
        pytest.param("a..b", "^STORYTELLER_HOST a..b is not known: set it", id="invalid name"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_refused_by_name(host, words):
    with pytest.raises(service.StartError, match=words):
        service.open_sockets(host, 0)


def has_ended_in_order(folder: Path) -> bool:
    """Whether the store was closed (its WAL file is gone then), and the log reports the end."""
    data = folder / "data"
    reported = (data / "storyteller.log").read_text("utf-8").endswith("server: Stopped.\n")
    return reported and not (data / "storyteller.sqlite3-wal").exists()


NO_SIGNALS = pytest.mark.skipif(service.WINDOWS, reason="Windows has no signal that asks another process to end")


@pytest.mark.parametrize("kind", [*(pytest.param(name, marks=NO_SIGNALS) for name in ("SIGTERM", "SIGINT")), "Ctrl+C"])
def test_a_signal_or_ctrl_c_stops_the_service_in_order_with_code_0(start_service, kind):
    running = start_service()
    assert running.call("PUT", "/api/v1/session/5", SESSION)[0] == 200
    running.press_ctrl_c() if kind == "Ctrl+C" else running.process.send_signal(getattr(signal, kind))
    assert running.process.wait(PATIENCE) == 0
    assert has_ended_in_order(running.folder)
    with opened("localhost", running.port):  # its port is free again
        pass


@NO_SIGNALS
def test_a_closed_terminal_stops_the_service_in_order_however_often_it_is_said(start_service):
    running = start_service()
    wait_until(lambda: running.process.send_signal(signal.SIGHUP) or running.process.poll() is not None)
    assert running.process.returncode == 0
    assert has_ended_in_order(running.folder)


@NO_SIGNALS
def test_a_service_that_ignores_the_closed_terminal_runs_on(start_service):
    """As nohup starts it."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is inherited
    try:
        running = start_service()
    finally:
        signal.signal(signal.SIGHUP, earlier)
    running.process.send_signal(signal.SIGHUP)
    assert running.call("GET", "/health")[0] == 200


# The service, which calls its own console handler as Windows does, once it has read a line. When the handler of a
# closing console returns, Windows ends the process.
SELF_SIGNALLED = """
import ctypes, os, sys, threading
sys.path.insert(0, sys.argv[1])
import storyteller_automation as service
on_end_signal = service.on_end_signal
def wrapper(stop, ended):
    handler = on_end_signal(stop, ended)
    def call_handler():
        sys.stdin.readline()
        handler(int(sys.argv[2]))
        if int(sys.argv[2]) > 1:
            os._exit(0 if ended.is_set() else 70)
    threading.Thread(target=call_handler, daemon=True).start()
    return handler
service.on_end_signal = wrapper
sys.exit(service.main([]))
"""


@pytest.mark.skipif(not service.WINDOWS, reason="the other systems have only signals")
@pytest.mark.parametrize("event", [1, 2, 5, 6], ids=["Ctrl+Break", "window closed", "log-off", "shutdown"])
def test_each_console_event_of_windows_stops_the_service_in_order(module_copy, clean_environment, event):
    """Only Windows can send these to a single program, so a thread of the service calls its handler here."""
    environment = {**clean_environment, "STORYTELLER_API_TOKEN": TOKEN, "STORYTELLER_PORT": "0"}
    command = [sys.executable, "-c", SELF_SIGNALLED, str(module_copy.parent), str(event)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        while b"  log " not in process.stdout.readline():
            pass
        try:
            process.communicate(b"\n", timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0
    assert has_ended_in_order(module_copy.parent)


def test_a_start_after_a_kill_prints_no_warning_and_has_all_data(start_service):
    killed = start_service()
    assert killed.call("PUT", "/api/v1/session/5", SESSION)[0] == 200
    killed.process.kill()
    killed.stop()
    again = start_service("--port", str(killed.port))
    assert again.printed == killed.printed
    assert again.call("GET", "/api/v1/session/5")[1]["data"] == {**SESSION, "timestamp": 5}
    assert again.call("PUT", "/api/v1/session/5", SESSION)[0] == 200


def test_a_response_does_not_name_the_server(start_service):
    connection = http.client.HTTPConnection("127.0.0.1", start_service().port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        assert connection.getresponse().getheader("Server") is None


# ======================================================================================================
# Command line
# ======================================================================================================


@pytest.fixture
def run_module(module_copy: Path, clean_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the module to its end, as a user does, by default with neither nvidia-smi nor SwarmUI."""

    def run(*arguments: str, streams: Any = {}, **environment: str) -> subprocess.CompletedProcess[str]:
        nowhere = {"NVIDIA_SMI": str(module_copy / "none"), "SWARMUI_API_URL": f"http://localhost:{free_port()}"}
        return subprocess.run(
            [sys.executable, str(module_copy), *arguments], cwd=module_copy.parent.parent, timeout=PATIENCE,
            env={**clean_environment, "STORYTELLER_PORT": "0", **nowhere, **environment},
            encoding="utf-8", errors="replace",
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
        )  # fmt: skip

    return run


# Not by setpriv or the like: the Python that runs the tests may be in a folder that is root's alone.
AS_USER = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import encodings.ascii, encodings.idna, fcntl, pwd, storyteller_automation  # it could not find them later
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
sys.exit(storyteller_automation.main())
"""


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def run_as_user(module_copy: Path, clean_environment: dict[str, str], shared_folder: Path) -> Callable[..., Any]:
    """Runs the module to its end as a user who is not root, with `data` in the shared folder as its data folder."""
    if service.WINDOWS or os.geteuid() != 0:
        pytest.skip("only root can run a program as another user")
    module = Path(shutil.copy(module_copy, shared_folder))
    data = shared_folder / "data"
    data.mkdir()
    os.chown(data, 54321, 54321)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", AS_USER, str(module.parent), *arguments], cwd="/", timeout=PATIENCE,
            env={**clean_environment, "STORYTELLER_PORT": "0", "NVIDIA_SMI": "/none", **environment},
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
        )  # fmt: skip

    return run


@pytest.fixture
def other_program_port() -> Iterator[int]:
    """The port of a web server that is not this service but answers much like it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "ok"}')

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_start_prints_address_programs_and_files(start_service, module_copy, tmp_path):
    nvidia_smi = write_program(tmp_path / "an nvidia-smi", NVIDIA_SMI, {})
    swarmui = write_swarmui_folder(tmp_path / "SwarmUI", {})
    running = start_service(NVIDIA_SMI=str(nvidia_smi), SWARMUI_PATH=str(swarmui))
    data = module_copy.parent / "data"
    rows = dict(line.split(maxsplit=1) for line in running.printed.replace("API token", "token").splitlines()[1:])
    assert rows == {
        "address": f"http://localhost:{running.port}",
        "store": f"sqlite, {data / 'storyteller.sqlite3'}",
        "nvidia-smi": str(nvidia_smi),
        "SwarmUI": str(swarmui / service.LAUNCH_SCRIPT),
        "token": "in STORYTELLER_API_TOKEN",
        "log": str(data / "storyteller.log"),
    }


def test_a_start_says_which_programs_were_not_found(start_service, tmp_path):
    printed = start_service(NVIDIA_SMI=str(tmp_path / "none"), SWARMUI_PATH=str(tmp_path / "nowhere")).printed
    assert f"nvidia-smi  not found: NVIDIA_SMI is {tmp_path / 'none'}, " in printed
    assert "SwarmUI     cannot be launched: SWARMUI_PATH" in printed


def test_neither_a_start_nor_the_log_shows_a_secret(start_service, module_copy):
    running = start_service(REDIS_URL=f"redis://:pass-word@127.0.0.1:{free_port()}/1", SWARMUI_TOKEN="cookie-word")
    assert running.call("GET", "/health")[0] == 503
    running.call("GET", "/api/v1/session/1", headers={"Authorization": "Bearer wrong-token-0123456789"})
    written = running.printed + (module_copy.parent / "data" / "storyteller.log").read_text("utf-8")
    assert not any(word in written for word in (TOKEN, "pass-word", "cookie-word", "wrong-token"))


def test_the_first_start_creates_an_api_token_that_later_starts_use(start_service, module_copy):
    path = module_copy.parent / "data" / "api_token"
    tokens = []
    for _ in range(2):
        running = start_service(STORYTELLER_API_TOKEN="")
        tokens.append(path.read_text().strip())
        assert f"API token   in {path}" in running.printed
        assert tokens[-1] not in running.printed
        bearer = {"Authorization": f"Bearer {tokens[-1]}"}
        assert running.call("GET", "/api/v1/session/list", headers=bearer)[0] == 200
        assert running.call("GET", "/api/v1/session/list")[0] == 401
        running.stop()
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) >= 16
    assert is_its_owners(path)


def test_the_env_file_beside_the_module_is_read(start_service, module_copy):
    lines = "STORYTELLER_API_TOKEN=the-token-of-the-env-file\nSTORYTELLER_DATA_DIR=other"
    (module_copy.parent / ".env").write_text(lines)
    running = start_service(STORYTELLER_API_TOKEN="")
    bearer = {"Authorization": "Bearer the-token-of-the-env-file"}
    assert running.call("GET", "/api/v1/session/list", headers=bearer)[0] == 200
    assert (module_copy.parent / "other" / "storyteller.sqlite3").is_file()


def test_arguments_override_environment_variables(start_service, tmp_path, other_program_port):
    running = start_service(
        "--host", "127.0.0.1", "--port", "0", "--data-dir", str(tmp_path / "a"),
        STORYTELLER_PORT=str(other_program_port), STORYTELLER_DATA_DIR=str(tmp_path / "b"),
    )  # fmt: skip
    assert running.printed.count(f"http://127.0.0.1:{running.port}") == 1
    assert ((tmp_path / "a").is_dir(), (tmp_path / "b").exists()) == (True, False)


def test_an_empty_argument_counts_as_unset(run_module, module_copy):
    run_module("check", "--host", "", "--port", "", "--data-dir", "")
    assert (module_copy.parent / "data" / "storyteller.sqlite3").is_file()


@pytest.mark.parametrize("is_open", [False, True], ids=["nobody reads it", "another program reads it"])
def test_a_full_log_is_rotated_and_no_line_is_lost(tmp_path, is_open):
    path = tmp_path / "a log"
    log = service.LogFile(path, maxBytes=100, backupCount=2, encoding="utf-8")
    lines = [f"line {number} of the log" for number in range(12)]
    with contextlib.closing(log), open(path) if is_open else contextlib.nullcontext():
        for line in lines:
            log.emit(logging.makeLogRecord({"msg": line}))
        if not is_open:
            assert path.stat().st_size <= 100
    files = [tmp_path / name for name in ("a log.2", "a log.1", "a log")]
    assert "".join(file.read_text() for file in files if file.exists()).splitlines() == lines


@pytest.mark.skipif(service.WINDOWS, reason="a pipe is no file there")
def test_a_log_may_be_a_pipe_as_to_a_containers_output(tmp_path):
    os.mkfifo(path := tmp_path / "a log")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        with contextlib.closing(service.LogFile(path, maxBytes=5, backupCount=2, encoding="utf-8")) as log:
            for number in range(3):
                log.emit(logging.makeLogRecord({"msg": f"line {number}"}))
        assert reader.read() == b"line 0\nline 1\nline 2\n"


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """A pipe whose reader has closed it, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["check"], 0, id="check"),
        pytest.param(["check", "--host", "192.0.2.1"], 1, id="a check that fails"),
        pytest.param(["token", "--list"], 0, id="token --list"),
        pytest.param(["token", "--subject", "a", "--permission", "gpu:read"], 0, id="token"),
        pytest.param(["--help"], 0, id="--help"),
        pytest.param(["--version"], 0, id="--version"),
        pytest.param(["nonsense"], 2, id="a usage error"),
    ],
)
@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]], ids=["| head", "2>&1 | head"])
def test_a_command_whose_output_pipe_is_closed_ends_quietly_with_its_usual_code(
    run_module, closed_pipe, arguments, code, streams
):
    if arguments[0] == "token":
        run_module("token", "--subject", "a", "--permission", "gpu:read")
    result = run_module(*arguments, streams=dict.fromkeys(streams, closed_pipe))
    assert result.returncode == code
    assert "Traceback" not in (result.stderr or "")
    assert "Exception" not in (result.stderr or "")


def test_the_service_continues_when_its_output_pipe_is_closed(module_copy, clean_environment, closed_pipe):
    port = free_port()
    command = [sys.executable, str(module_copy), "--port", str(port)]
    environment = {**clean_environment, "REDIS_URL": f"redis://127.0.0.1:{free_port()}"}  # causes a warning
    with subprocess.Popen(command, env=environment, stdout=closed_pipe, stderr=closed_pipe) as process:
        try:
            log = module_copy.parent / "data" / "storyteller.log"
            wait_until(lambda: log.exists() and "listening on" in log.read_text("utf-8"))
            assert can_connect(port)
            assert process.poll() is None
            assert "Traceback" not in log.read_text("utf-8")
        finally:
            process.terminate()
        assert service.WINDOWS or process.wait(PATIENCE) == 0


def test_a_console_that_accepts_no_output_does_not_block_polls(start_service, redis_url, other_program):
    """Windows' console does that while its text is selected. Here nobody reads the pipe."""
    running = start_service(REDIS_URL=redis_url)
    running.reading.clear()
    for number in range(300):  # each is logged, with its first 200 bytes
        other_program.zadd("notifications:pending", {f"no JSON {number} {'x' * 1000}": service.now_ms()})
    assert running.call("GET", "/api/v1/notifications/check?limit=1000") == (200, {"notifications": []})
    assert running.call("GET", "/api/v1/notifications/check") == (200, {"notifications": []})


@pytest.fixture
def start_on_full_pipe(module_copy, clean_environment) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the service with its output in a pipe that accepts none; kills it after the test."""
    if service.WINDOWS:
        pytest.skip("Windows has no pipe that can be filled without blocking")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with contextlib.ExitStack() as stack:
        for end in (reader, writer):
            stack.callback(os.close, end)

        def start(**environment: str) -> subprocess.Popen[bytes]:
            command, variables = [sys.executable, str(module_copy)], {**clean_environment, **environment}
            process = stack.enter_context(subprocess.Popen(command, env=variables, stdout=writer, stderr=writer))
            stack.callback(process.kill)
            return process

        yield start


def test_the_service_starts_serves_and_stops_although_its_console_accepts_no_output(start_on_full_pipe, module_copy):
    data = module_copy.parent / "data"
    settings = {"STORYTELLER_API_TOKEN": TOKEN, "STORYTELLER_PORT": "0", "STORYTELLER_MISSPELT": "causes a warning"}
    process = start_on_full_pipe(**settings)
    wait_until(lambda: (data / "running").exists() and "http" in (data / "running").read_text())
    port = int((data / "running").read_text().rsplit(":", 1)[1])
    check = urllib.request.Request(f"http://127.0.0.1:{port}/api/v1/notifications/check", headers=BEARER)
    assert urllib.request.urlopen(check, timeout=PATIENCE).status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    log = (data / "storyteller.log").read_text("utf-8")
    assert "server: address http://" in log
    assert log.endswith("server: Stopped.\n")


@pytest.mark.parametrize("pause", [0.1, 0.0001], ids=["while it waits for its console", "at once"])
def test_ctrl_c_twice_ends_a_start_although_its_console_accepts_no_output(
    start_on_full_pipe, module_copy, lock_store, pause
):
    data = module_copy.parent / "data"
    data.mkdir()
    lock_store(data / "storyteller.sqlite3")
    process = start_on_full_pipe()
    log = data / "storyteller.log"
    wait_until(lambda: log.exists() and "locked" in log.read_text("utf-8"))
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0


def test_bytecode_that_a_full_disk_truncated_is_replaced(module_copy, clean_environment):
    begin = re.search(r'-c "(import.*)" "\$here"', (HERE / "run.sh").read_text())[1]
    cache = module_copy.parent / "bytecode"
    command = [sys.executable, "-X", f"pycache_prefix={cache}", "-c", begin, str(module_copy.parent), "--version"]
    for _ in range(2):
        result = subprocess.run(command, env=clean_environment, capture_output=True, timeout=PATIENCE, encoding="utf-8")
        assert (result.returncode, result.stderr) == (0, "")
        for path in cache.rglob("storyteller_automation*.pyc"):
            os.truncate(path, path.stat().st_size // 2)


def test_ctrl_c_prints_how_many_requests_the_service_waits_for(stopping):
    stopping.tell()
    wait_until(lambda: "Stopping: waiting for 1 request; Ctrl+C again stops at once." in stopping.running.printed)
    stopping.release()
    stopping.running.process.wait(PATIENCE)
    stopping.running.stop()
    assert stopping.running.printed.endswith(f"Stopped.{os.linesep}")


def test_ctrl_c_without_a_request_in_flight_prints_that_the_service_stops(start_service):
    running = start_service()
    running.press_ctrl_c()
    running.process.wait(PATIENCE)
    running.stop()
    assert running.printed.splitlines()[-2:] == ["Stopping.", "Stopped."]


def test_help_names_the_scripts_every_command_and_each_setting_with_its_default(run_module):
    text = run_module("--help").stdout
    assert [word for word in ("run.sh", "run.bat", *service.COMMANDS) if word not in text] == []
    rows = {line.split()[0]: line for line in text.split("\nsettings, ")[1].splitlines()[1:]}
    assert rows.keys() == {row.metadata["name"] for row in dataclasses.fields(service.Settings)}
    assert [name for name, row in rows.items() if "by default" not in row] == []
    shown = {
        "STORYTELLER_PORT": "8000", "STORYTELLER_BRIDGE": "on", "STORYTELLER_RESERVATION_GATES": "off",
        "GPU_CACHE_SECONDS": "5", "REDIS_HOST": "none",
        "STORYTELLER_CORS_ORIGINS": " ".join(service.STORYART_ORIGINS), "STORYTELLER_TRUSTED_ORIGINS": "none",
        "SWARMUI_ALLOW_ORIGIN": "the only trusted origin",
    }  # fmt: skip
    assert {name: rows[name].partition("by default ")[2] for name in shown} == shown


@pytest.mark.parametrize(
    ("command", "advice"),
    [("tset", "did you mean test?"), ("chekc", "did you mean check?"), ("tokne", "did you mean token?"),
     ("server", "did you mean serve?"), ("x", "one of serve, status, page, check, token, alert, move, backup,")],
)  # fmt: skip
def test_an_unknown_command_is_refused_with_the_nearest_one(run_module, command, advice):
    result = run_module(command, "-k", "swarmui")
    assert (result.returncode, result.stdout) == (2, "")
    assert advice in result.stderr.splitlines()[-1]


def test_only_the_start_scripts_run_the_tests(run_module):
    result = run_module("test", "-k", "swarmui")
    assert result.returncode == 2
    assert result.stderr == f"The tests need the start script: run {service.START_SCRIPT} test.\n"


@pytest.mark.parametrize("command", service.COMMANDS)
@pytest.mark.parametrize("words", ["help {}", "{} --help", "--port 1 {} --help"])
def test_each_command_has_its_own_help(command, words, capsys):
    with contextlib.suppress(SystemExit):
        service.main(words.format(command).split())
    assert f"usage: {service.START_SCRIPT} {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "port"),
    [("", None), ("check", None), ("--port 1 check", "1"), ("check --port 1", "1"), ("--port 1 check --port 2", "2"),
     ("--port 1", "1"), ("--data-dir a token --list --port 1", "1")],
)  # fmt: skip
def test_options_may_precede_or_follow_the_command(words, port):
    arguments = service.parse_arguments(words.split())
    assert (arguments["port"], arguments["host"]) == (port, None)


@pytest.mark.parametrize("arguments", [["help"], ["help", "move"], ["version"], ["--version"]])
def test_help_and_version_work_with_an_invalid_setting(run_module, arguments):
    result = run_module(*arguments, STORYTELLER_PORT="x")
    assert (result.returncode, result.stderr) == (0, "")
    assert "StoryTeller automation 1." in result.stdout


def test_the_version_is_the_one_of_the_api(run_module):
    result = run_module("version")
    assert (result.returncode, result.stdout) == (0, f"StoryTeller automation {service.__version__}\n")
    assert service.describe_api()["info"]["version"] == service.__version__


@pytest.fixture
def bad_values(tmp_path: Path, module_copy: Path, other_program_port: int) -> dict[str, str]:
    """Values of settings with which a start fails, by name."""
    data = tmp_path / "data"
    (data / "log is a folder" / "storyteller.log").mkdir(parents=True)
    for name, file, text in [
        ("short token", "api_token", "short"),
        ("binary token", "api_token", "\xff\xff"),
        ("store not a database", "storyteller.sqlite3", "this is not a database " * 100),
    ]:
        (data / name).mkdir()
        (data / name / file).write_text(text, "latin-1")
    (data / "a file").touch()
    paths = {path.name: str(path) for path in data.iterdir()}
    return {**paths, "port in use": str(other_program_port)}


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        pytest.param("STORYTELLER_PORT", "port in use", r"^Port \d+ is in use by another program", id="port in use"),
        pytest.param("GPU_CACHE_SECONDS", "five", "^GPU_CACHE_SECONDS is 'five': expected", id="bad setting"),
        pytest.param("STORYTELLER_HOST", "192.0.2.1", "^Cannot listen on 192.0.2.1", id="host"),
        pytest.param("STORYTELLER_DATA_DIR", "a file", "^The data folder .* cannot be written", id="data folder"),
        pytest.param("STORYTELLER_DATA_DIR", "short token", "api_token contains no valid token", id="short token"),
        pytest.param("STORYTELLER_DATA_DIR", "binary token", "api_token contains no valid token", id="binary token"),
        pytest.param("STORYTELLER_DATA_DIR", "store not a database", "^The store .* cannot be used", id="store"),
        pytest.param("STORYTELLER_DATA_DIR", "log is a folder", "log .*cannot be written", id="log"),
    ],
)
def test_a_start_that_fails_gives_one_sentence_and_exit_code_2(run_module, bad_values, setting, value, words):
    result = run_module(**{setting: bad_values.get(value, value)})
    assert result.returncode == 2
    assert [result.stdout, len(result.stderr.splitlines())] == ["", 1]
    assert re.search(words, result.stderr)


# What a setting may contain by mistake or by malice. The last two lines only fail when they are used.
ODD_VALUES = [
    *["", " ", "\0", "a\0b", "x" * 5000, "a/" * 1500, "9" * 400, "a\nb", "\u2028", "\udcff", "\ud83d", "\u0663"],
    *["-1", "1e999", "inf", "nan", "%", "%zz", "%s%(x)d{0}", ".", "..", "a..b", "-", "--", "~", "~nobody-here/x", "\\"],
    *["'", '"', "\"'", "#", "?", "@", ":", ";", ",", "*", "none", "null", "/", "//", "[::1", "[::1]", "::1%", "a:b:c"],
    *["::1%25lo", "127.0.0.1:6379", "fe80::1%1", "224.0.0.1", "http://[", "http://a..b", "http://%", "http://[v1.a]"],
    *["http://[::1%25lo]", "http://" + "a" * 64, "http://a:\u0663", "http://127.0.0.1:1/" + "a" * 20_000, "redis://"],
    *["redis://a..b", "redis://[::1", "redis://[fe80::1%25lo]:1", "redis://127.0.0.1?port=99999", "redis://%00:1"],
    *["redis://127.0.0.1:1?db=-1", f"redis://127.0.0.1:1/{10**30}", "redis://%ff:%ff@127.0.0.1:1", "unix:///a"],
    *["redis://127.0.0.1:1?protocol=9", "rediss://127.0.0.1:1?ssl_cert_reqs=x"],
    *[f"rediss://127.0.0.1:PORT?ssl_{key}=x" for key in ("keyfile", "certfile", "ca_certs", "ciphers", "min_version")],
]

# Runs commands with each value, of a setting or in place of VALUE; the service only until it would serve. Prints each
# end that is not an exit code.
TRY_VALUES = """
import json, os, sys, traceback
plan = json.load(sys.stdin)
sys.path.insert(0, plan["folder"])
import storyteller_automation as service
run = service.Server.run
service.Server.run = lambda server: (server.stop(0.0), run(server))
service.RedisClient.CONNECT_TIMEOUT = service.RedisClient.ANSWER_TIMEOUT = 0.1
def end(code):
    raise SystemExit(code)
os._exit = end
for value in plan["values"]:
    in_file = "\\0" in value  # no environment can hold it
    with open(os.path.join(plan["folder"], ".env"), "w", encoding="utf-8") as file:
        file.write(f"{plan['setting']}={value}" if in_file else "")
    try:
        os.environ[plan["setting"]] = "" if in_file else value
    except UnicodeEncodeError:  # nor this one on this system
        continue
    for command in plan["commands"]:
        try:
            assert service.main([value if word == "VALUE" else word for word in command]) in (0, 1, 2)
        except SystemExit as ended:
            assert ended.code in (0, 1, 2)
        except BaseException:
            print("FAULT", repr(value)[:80], command, traceback.format_exc(), flush=True)
print("DONE", flush=True)
"""

EVERYWHERE = [["check"], ["token", "--list"], ["serve"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "commands"),
    [
        *[pytest.param(row.metadata["name"], EVERYWHERE, id=row.name) for row in dataclasses.fields(service.Settings)],
        *[pytest.param("NONE", [[*command, f"--{name}", "VALUE"] for command in (["check"], ["serve"])], id=f"--{name}")
          for name in ("host", "port", "data-dir")],
        *[pytest.param("NONE", [["token", f"--{name}", "VALUE"]], id=f"--{name}") for name in ("permission", "revoke")],
        pytest.param("NONE", [["token", "--subject", "VALUE", "--permission", "gpu:read"]], id="--subject"),
        pytest.param("NONE", [["token", "--subject", "a", "--permission", "gpu:read", "--ttl", "VALUE"]], id="--ttl"),
        pytest.param("NONE", [["check", "VALUE"], ["check", "--VALUE"]], id="unknown argument"),
        pytest.param("NONE", [["backup", "VALUE"], ["restore", "VALUE"]], id="a file"),
        pytest.param("NONE", [["move", "--to", "VALUE"], ["token", "--ttl", "90d", "--renew", "VALUE"]], id="--to"),
    ],
)  # fmt: skip
def test_no_value_of_a_setting_or_an_argument_causes_a_traceback(module_copy, clean_environment, setting, commands):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and sends nothing
        values = [value.replace("PORT", str(silent.getsockname()[1])) for value in ODD_VALUES]
        plan = {"folder": str(module_copy.parent), "setting": setting, "commands": commands, "values": values}
        quick = {"STORYTELLER_PORT": "0", "NVIDIA_SMI": str(module_copy / "none"), "SWARMUI_HEALTH_TIMEOUT": "0.05"}
        result = subprocess.run(
            [sys.executable, "-c", TRY_VALUES], cwd=module_copy.parent, timeout=4 * PATIENCE,
            env={**clean_environment, **quick, "SWARMUI_API_URL": f"http://127.0.0.1:{free_port()}"},
            input=json.dumps(plan), capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    assert "FAULT" not in result.stdout
    assert result.stdout.endswith("DONE\n"), result.stderr
    assert not any("Traceback" in path.read_text("utf-8") for path in module_copy.parent.glob("data/*.log"))


@ONLY_POSIX
def test_a_relative_data_folder_in_a_deleted_folder_is_refused_in_one_sentence(module_copy, clean_environment):
    command = ["sh", "-c", 'cd "$(mktemp -d)"; rmdir "$PWD"; exec "$@"', "sh", sys.executable, str(module_copy)]
    command += ["token", "--list", "--data-dir", "a"]
    result = subprocess.run(command, env=clean_environment, timeout=PATIENCE, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stderr) == (
        2, "The current folder, the base of --data-dir, was deleted: change to another one.\n"
    )  # fmt: skip


def test_a_start_fails_if_the_env_file_is_not_utf_8(run_module, module_copy):
    (module_copy.parent / ".env").write_bytes(b"A=\xfc")
    result = run_module()
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{module_copy.parent / '.env'} is not UTF-8" in result.stderr


def test_the_service_uses_a_redis_that_starts_after_it(start_service, module_copy, forwarder):
    forwarder.cut()
    running = start_service(REDIS_URL=forwarder.url)
    assert f"redis, 127.0.0.1:{forwarder.port}" in running.printed
    assert running.call("GET", "/health") == (503, {"status": "degraded", "store": "redis"})
    status, answer = running.call("GET", "/api/v1/session/1/prompts-status")
    assert (status, answer["promptsReady"]) == (503, False)
    assert "WARNING store: Redis at 127.0.0.1" in (module_copy.parent / "data" / "storyteller.log").read_text("utf-8")
    forwarder.restore()
    wait_until(lambda: running.call("GET", "/api/v1/session/1/prompts-status")[0] == 404)


def read_check(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """OK, WARN or FAIL of each line of `check`, by subject."""
    assert result.stderr == ""
    levels = {}
    for line in result.stdout.splitlines():
        level, subject = line.split(":")[0].split(maxsplit=1)
        assert level in ("OK", "WARN", "FAIL")
        levels[subject] = level
    return levels


CHECKED = ["settings", "version", "store", "disk", "nvidia-smi", "SWARMUI_PATH", "SwarmUI", "port"]


def test_check_reports_ok_where_nothing_is_wrong(run_module, leash, redis_url, tmp_path):
    gpus = {"print": "8, 819, 8192, 45, 1\n"}
    nvidia_smi = write_program(
        tmp_path / "an nvidia-smi", NVIDIA_SMI, {"gpus": gpus, "processes": {}, "runs": str(tmp_path / "runs")}
    )
    swarmui = write_swarmui_folder(tmp_path / "SwarmUI", {"leash": leash.port})
    port = free_port()
    arguments = ["--port", str(port)]
    started = service.launch_detached(swarmui / service.LAUNCH_SCRIPT, arguments, swarmui, tmp_path / "log").process
    leash.next()
    url = f"http://localhost:{port}"
    wait_until(lambda: service.probe(service.Settings(swarmui_api_url=url)).ready)
    result = run_module(
        "check", NVIDIA_SMI=str(nvidia_smi), SWARMUI_PATH=str(swarmui), SWARMUI_API_URL=url, REDIS_URL=redis_url,
    )  # fmt: skip
    assert (read_check(result), result.returncode) == (dict.fromkeys(CHECKED, "OK"), 0)
    assert "store: redis, " in result.stdout
    assert "SwarmUI: ready, version 0.9.8.2" in result.stdout
    leash.close()
    started.wait(PATIENCE)


def test_check_warns_of_missing_programs(run_module, module_copy):
    result = run_module("check")
    warned = dict.fromkeys(["nvidia-smi", "SWARMUI_PATH", "SwarmUI"], "WARN")
    assert (read_check(result), result.returncode) == (dict.fromkeys(CHECKED, "OK") | warned, 0)
    assert f"NVIDIA_SMI is {module_copy / 'none'}, " in result.stdout


def test_check_warns_of_what_nvidia_smi_prints_besides_its_gpus(run_module, nvidia_smi):
    result = run_module("check", NVIDIA_SMI=nvidia_smi({**GOOD, "stderr": CORRUPT, "exit": 14}, {}))
    assert f"WARN nvidia-smi: 1 GPU(s), 8192 MiB; it says: {CORRUPT}" in result.stdout


@pytest.mark.parametrize(
    ("setting", "value", "subject", "advice"),
    [
        pytest.param("REDIS_PORT", "1", "store", "REDIS_PORT", id="no Redis"),
        pytest.param("STORYTELLER_DATA_DIR", "a file", "store", "set STORYTELLER_DATA_DIR", id="data folder"),
        pytest.param("SWARMUI_PATH", "nowhere", "SWARMUI_PATH", "does not exist: set it", id="SWARMUI_PATH missing"),
        pytest.param("SWARMUI_PATH", ".", "SWARMUI_PATH", "has no launch-", id="SWARMUI_PATH of something else"),
        pytest.param("STORYTELLER_PORT", "port in use", "port", "set STORYTELLER_PORT", id="port in use"),
    ],
)
def test_check_fails_for_what_would_prevent_a_start(run_module, bad_values, setting, value, subject, advice):
    result = run_module("check", **{setting: bad_values.get(value, value)})
    levels = read_check(result)
    assert list(levels) == CHECKED  # the other checks are still made
    assert ([name for name, level in levels.items() if level == "FAIL"], result.returncode) == ([subject], 1)
    assert advice in next(line for line in result.stdout.splitlines() if line.startswith("FAIL"))


@pytest.mark.parametrize("value", ["http://127.0.0.1:99999", "swarmui"])
def test_check_fails_for_an_invalid_setting(run_module, value):
    result = run_module("check", SWARMUI_API_URL=value)
    assert (read_check(result), result.returncode) == ({"settings": "FAIL"}, 1)
    assert f"SWARMUI_API_URL is '{value}'" in result.stdout


def test_check_finds_the_service_of_its_data_folder_on_any_port(start_service, run_module):
    running = start_service()
    result = run_module("check", STORYTELLER_PORT=str(free_port()))
    assert (read_check(result)["port"], result.returncode) == ("OK", 0)
    assert f"OK   port: this service runs at http://localhost:{running.port};" in result.stdout


def test_check_fails_if_the_service_of_its_data_folder_does_not_answer(run_module, settings):
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.closing(service.own_data_dir(settings)) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=running, flush=True)
        pool.submit(lambda: listener.accept()[0].close())
        result = run_module("check", STORYTELLER_DATA_DIR=str(settings.data_dir))
    assert (read_check(result)["port"], result.returncode) == ("FAIL", 1)
    assert "but does not answer: see " in result.stdout


def test_check_fails_if_a_service_with_another_data_folder_has_the_port(start_service, run_module):
    running = start_service(STORYTELLER_DATA_DIR="another")
    result = run_module("check", STORYTELLER_PORT=str(running.port))
    assert (read_check(result)["port"], result.returncode) == ("FAIL", 1)
    assert f"Port {running.port} is in use by this service with another data folder: stop that one" in result.stdout


@pytest.mark.parametrize(
    ("service_finds", "check_finds", "environment", "found"),
    [
        pytest.param(None, 8192, {}, "nvidia-smi not found", id="only check finds one"),
        pytest.param(8192, None, {}, "1 GPU(s), 8192 MiB", id="only the service finds one"),
        pytest.param(8192, 4096, {}, "1 GPU(s), 8192 MiB", id="another GPU"),
        pytest.param(8192, 8192, {}, None, id="the same"),
        pytest.param(None, None, {}, None, id="neither finds one"),
        pytest.param(None, 8192, {"STORYTELLER_API_TOKEN": "of-another-data-folder"}, None, id="another token"),
    ],
)
def test_check_warns_if_the_running_service_finds_other_gpus(
    start_service, run_module, tmp_path, service_finds, check_finds, environment, found
):
    @functools.cache  # a running program cannot be written
    def nvidia_smi(memory: int | None) -> str:
        if memory is None:
            return str(tmp_path / "none")
        gpus = {"print": f"8, 819, {memory}, 45, 1\n"}
        plan = {"gpus": gpus, "processes": {}, "runs": str(tmp_path / "runs")}
        return str(write_program(tmp_path / f"nvidia-smi {memory}", NVIDIA_SMI, plan))

    start_service(NVIDIA_SMI=nvidia_smi(service_finds), STORYTELLER_API_TOKEN="")
    result = run_module("check", NVIDIA_SMI=nvidia_smi(check_finds), **environment)
    warned = [line for line in result.stdout.splitlines() if "the running service gets another result" in line]
    assert len(warned) == bool(found)
    assert all(line.startswith("WARN nvidia-smi: ") and found in line for line in warned)
    assert (read_check(result)["port"], result.returncode) == ("OK", 0)


# ------------------------------------------------------------------------------ names of settings ----


def test_a_start_and_check_warn_of_unknown_settings_without_their_values(start_service, run_module, module_copy):
    (module_copy.parent / ".env").write_text("REDIS_ULR=redis://:pass-word@a\nREDIS_PORT=\nREDIS_PORT=")
    (module_copy.parent / ".env.txt").write_text("REDIS_URL=redis://:pass-word@a")
    running = start_service(STORYTELER_PORT="pass-word")
    result = run_module("check", STORYTELER_PORT="pass-word")
    path = module_copy.parent / "data" / "storyteller.log"
    wait_until(lambda: "listening on" in path.read_text("utf-8"))
    log = path.read_text("utf-8")
    for words in ("did you mean REDIS_URL?", "REDIS_PORT is set twice", ".env.txt is not", "mean STORYTELLER_PORT?"):
        wait_until(lambda words=words: words in running.printed)
        assert re.search(f"(?m)^WARN settings: .*{re.escape(words)}", result.stdout)
        assert re.search(f"WARNING settings: .*{re.escape(words)}", log)
    assert "pass-word" not in running.printed + result.stdout + log
    assert result.returncode == 0


# ---------------------------------------------------------------------------- files of other users ----


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[(name, ["serve"]) for name in ("", "running", "api_token", "storyteller.log", "swarmui.log")],
        *[("storyteller.sqlite3", command) for command in (["serve"], ["check"], ["token", "--list"])],
        ("storyteller.sqlite3-wal", ["serve"]),
    ],
)
def test_an_error_names_the_owner_of_a_file_and_the_command_that_helps(run_as_user, shared_folder, name, arguments):
    path = shared_folder / "data" / name
    if name:
        path.touch(0o600)
    else:
        os.chown(path, 0, 0)
    result = run_as_user(*arguments)
    assert result.returncode == (1 if arguments == ["check"] else 2)
    (line,) = [line for line in (result.stderr + result.stdout).splitlines() if "belongs to" in line]
    assert f"{path} belongs to root, and you may not use it: sudo chown -R " in line
    assert line.endswith(str(shared_folder / "data"))
    assert "Traceback" not in result.stderr


def test_a_command_succeeds_despite_files_of_root_that_it_does_not_need(run_as_user, shared_folder, redis_url):
    for name in ("running", "api_token", "storyteller.log", "storyteller.sqlite3"):
        (shared_folder / "data" / name).touch(0o600)
    assert run_as_user("token", "--list", REDIS_URL=redis_url).returncode == 0


@pytest.mark.parametrize("owner", [0, 54321])
def test_a_start_as_root_warns_of_files_of_another_user(start_service, module_copy, owner):
    if service.WINDOWS or os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    data = module_copy.parent / "data"
    data.mkdir()
    (data / "api_token").write_text(TOKEN)
    os.chown(data / "api_token", owner, owner)
    running = start_service()
    warning = "data: root runs the service, but its files belong to 54321"
    wait_until(lambda: "listening on" in (data / "storyteller.log").read_text("utf-8"))
    assert (warning in (data / "storyteller.log").read_text("utf-8")) == bool(owner)
    if owner:
        wait_until(lambda: warning in running.printed)


# --------------------------------------------------------------------------- StoryArt's sessions ----


@pytest.fixture
def storyarts_redis(redis_url: str, other_program: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a Redis with a session of StoryArt, at the place that StoryArt's own server uses by default."""
    other_program.zadd("storyart:sessions:index", {f"storyart:session:{T}": T})
    monkeypatch.setattr(service, "STORYARTS_REDIS", redis_url)
    return redis_url


def test_the_default_redis_of_storyarts_own_server_is_database_0_of_this_pc():
    assert service.STORYARTS_REDIS == "redis://127.0.0.1:6379/0"


def test_a_start_and_check_on_the_embedded_store_warn_of_storyarts_sessions_in_redis(
    start_service, run_module, change_module, storyarts_redis
):
    change_module(STORYARTS_REDIS=storyarts_redis)
    advice = f"StoryArt's sessions are in Redis, which is not used here: set REDIS_URL={storyarts_redis}"
    result = run_module("check")
    assert (read_check(result)["StoryArt"], result.returncode, advice in result.stdout) == ("WARN", 0, True)
    running = start_service()
    wait_until(lambda: f"store: {advice}" in running.printed)


@pytest.mark.parametrize("changed", [{"redis_url": "redis://127.0.0.1:1/0"}, {"redis_port": 1}, {"redis_host": "a"}])
def test_no_warning_about_storyarts_sessions_if_a_redis_is_set(settings, storyarts_redis, changed):
    assert service.missed_sessions(settings)
    assert service.missed_sessions(dataclasses.replace(settings, **changed)) is None


def test_no_warning_about_a_redis_without_storyarts_sessions(settings, storyarts_redis, other_program):
    other_program.rename("storyart:sessions:index", "session:latest")
    assert service.missed_sessions(settings) is None


def is_warned_in_time(settings: service.Settings) -> bool:
    """Whether there is a warning about StoryArt's sessions, after no longer than a start can wait."""
    began = time.monotonic()
    warning = service.missed_sessions(settings)
    assert time.monotonic() - began < PATIENCE / 10
    return bool(warning)


@pytest.mark.parametrize("answering", ["nobody", "silence", "another program"])
def test_no_warning_about_storyarts_sessions_if_no_redis_answers_soon(
    settings, monkeypatch, other_program_port, answering
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"nobody": free_port(), "silence": silent.getsockname()[1], "another program": other_program_port}
        monkeypatch.setattr(service, "STORYARTS_REDIS", f"redis://127.0.0.1:{ports[answering]}/0")
        assert not is_warned_in_time(settings)


def test_no_warning_about_a_redis_that_requires_a_password(settings, monkeypatch, own_redis):
    own = own_redis()
    own.tell("ZADD", "storyart:sessions:index", T, f"storyart:session:{T}")
    monkeypatch.setattr(service, "STORYARTS_REDIS", own.url)
    assert is_warned_in_time(settings)
    own.tell("CONFIG", "SET", "requirepass", "a-word")
    assert not is_warned_in_time(settings)


@pytest.mark.parametrize(
    ("url", "warned"),
    [("redis://a/1", True), ("redis://a:6380/15?db=3", True), ("redis://a/0", False), ("redis://a", False),
     ("rediss://user:word@a:6380/", False), ("redis://a/2?db=0", False), (None, False)],
)  # fmt: skip
def test_check_warns_of_a_database_other_than_the_one_of_storyarts_own_server(settings, monkeypatch, url, warned):
    monkeypatch.setattr(service, "STORYARTS_REDIS", f"redis://127.0.0.1:{free_port()}/0")
    found = list(service.check_storyart(dataclasses.replace(settings, redis_url=url)))
    advice = "its own server always uses database 0: use database 0 in REDIS_URL too"
    assert found == ([("WARN", "StoryArt", advice)] if warned else [])


# ======================================================================================================
# The start scripts: run.sh, on Windows run.bat
# ======================================================================================================

# The service that a script starts here: it prints how it was started; its first argument may be its exit code.
FAKE_SERVICE = """
import json, os, sys
report = {"arguments": sys.argv[1:], "folder": os.getcwd(), "prefix": sys.prefix, "pid": os.getpid()}
report["isolated"] = bool(sys.flags.isolated)
print(json.dumps({**report, "environment": dict(os.environ)}))
sys.exit(int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else 0)
"""

# Its requirements.txt, and the code of the package named there, which needs another package.
REQUIREMENTS, PACKAGE = "tiny==1\n", "import little\n"
PARTS = ("tiny.py", "tiny-1.dist-info", "little.py", "little-1.dist-info")
PACKAGES, PYTHON_IN_VENV = (
    ("Lib/site-packages", "Scripts/python.exe") if service.WINDOWS else ("lib/*/site-packages", "bin/python")
)

# pip, once the real one was seen to work: everything is installed already, except what it cannot find.
NO_ROOM = "ERROR: Could not install packages due to an OSError: [WinError 112] There is not enough space on the disk"
NO_SUCH_PACKAGE = "ERROR: No matching distribution found for no-such-package==1"
PIP = f"""
import sys
if __name__ == "__main__" and "no-such-package" in open(sys.argv[-1]).read():
    sys.exit({NO_SUCH_PACKAGE!r})
"""

# A venv's python, once the real ensurepip was seen to work.
VENV_PYTHON = """#!/bin/sh
case "$*" in *"-m ensurepip"*) exit ;; esac
exec "${0%/*}/python3" "$@"
"""

# A program that reports that it runs, and does nothing more.
HANG = "hold_leash(plan['leash'])\nthreading.Event().wait()"

# The Python on Windows' PATH: it answers the question about its version as a Python of `version`, and sets up with the
# real one. With a finished venv it makes a venv by copying that, and counts how often (or hangs in the middle), and
# its pip has installed everything already, except what it cannot find or has no room for.
PYTHON_PY = """
import json, os, shutil, subprocess, sys
plan = json.loads({plan!r})
real_run = subprocess.run
def stand_in(command, **options):
    if not plan["finished"] or not {{"venv", "ensurepip", "pip"}} & set(command):
        return real_run(command, **options)
    if "pip" in command:
        requirements = open(command[-1]).read()
        for name, output in plan["pip"].items():
            if name in requirements:
                return subprocess.CompletedProcess(command, 1, output + "\\n")
    if "venv" in command:
        make_venv()
    return subprocess.CompletedProcess(command, 0, "")
def make_venv():
    with open(plan["made"], "a") as made:
        made.write(".")
    if plan["leash"]:
        os.mkdir(".venv")
        exec(plan["leash_code"], globals())
        hold_leash(plan["leash"])
        threading.Event().wait()
    shutil.rmtree(".venv", ignore_errors=True)
    shutil.copytree(plan["finished"], ".venv", ignore=shutil.ignore_patterns("installed.txt"))
subprocess.run = stand_in
if sys.argv[1] == "-3":  # it is called as py
    del sys.argv[1]
if sys.argv[2] == "-c":
    sys.version_info = tuple(plan["version"])
    code = sys.argv[3]
else:
    sys.argv = sys.argv[3:]  # less -I -x
    __file__ = os.path.abspath(sys.argv[0])
    code = open(__file__, encoding="utf-8").read().split("\\n", 1)[1]
exec(code)
"""

# By variables, because cmd reads a batch file in its code page.
PYTHON_BAT = '@"%REAL_PYTHON%" -I "%PROGRAMS%\\python.py" %*\r\n'
STORE_STUB = (
    "@echo Python was not found; run without arguments to install from the Microsoft Store.\r\n@exit /b 9009\r\n"
)


def write_wheel(folder: Path, name: str, code: str, needs: str = "") -> None:
    """A wheel of version 1 of a package of one file, with further lines of its METADATA."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{needs}")
        wheel.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.dist-info/RECORD", f"{name}.py,,{len(code)}\n")


def variables_of_another_tool(folder: Path) -> dict[str, str]:
    """Environment variables that make Python and pip use, or install into, other folders than .venv."""
    (folder / "pipeline").mkdir()
    for name in ("csv", "encodings", "ensurepip", "hashlib", "pip", "pytest", "redis", "subprocess", "tiny", "venv"):
        (folder / "pipeline" / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    return {
        "PYTHONPATH": str(folder / "pipeline"), "PYTHONHOME": str(folder / "gone"),
        "PIP_TARGET": str(folder / "target"), "PIP_PREFIX": str(folder / "prefix"), "PIP_ROOT": str(folder / "root"),
        "PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1", "PIP_PYTHON": sys._base_executable,
    }  # fmt: skip


def write_pip_settings(path: Path, variables: dict[str, str]) -> dict[str, str]:
    """Moves the PIP_* of `variables` into a settings file of pip; returns variables that name this file instead."""
    moved = {name: value for name, value in variables.items() if name.startswith("PIP_")}
    lines = [f"{name[4:].lower().replace('_', '-')} = {value}\n" for name, value in moved.items()]
    path.write_text("[global]\n" + "".join(lines))
    return {name: variables[name] for name in variables.keys() - moved} | {"PIP_CONFIG_FILE": str(path)}


class Project:
    """A copy of the start script in such a path as people have, beside a small service that needs no packages. The PATH
    has one Python. If there is a finished venv, that Python copies it instead of making one, and counts the copies."""

    def __init__(self, folder: Path, finished: Path | None = None) -> None:
        self.outside = folder
        self.folder = folder / ("Müller & Co (1)" if service.WINDOWS else "render & (story) teller")
        self.programs = folder / "programs"
        self.venv = self.folder / ".venv"
        self.stamp = self.venv / "installed.txt"
        self.requirements = self.folder / "requirements.txt"
        self._finished, self._made = finished, folder / "made"
        self.folder.mkdir()
        self.programs.mkdir()
        self.script = Path(shutil.copy(HERE / service.START_SCRIPT, self.folder))
        (self.folder / "storyteller_automation.py").write_text(FAKE_SERVICE)
        self.requirements.write_text(REQUIREMENTS)
        write_wheel(folder / "wheels", "tiny", PACKAGE, "Requires-Dist: little\n")
        write_wheel(folder / "wheels", "little", "")
        for name in () if service.WINDOWS else ("cp", "dirname", "mkdir", "readlink", "rm"):
            (self.programs / name).symlink_to(shutil.which(name))
        self.set_python()

    if service.WINDOWS:

        def set_python(self, version: tuple[int, ...] = tuple(sys.version_info[:3]), leash: int = 0) -> None:
            """Puts a Python of `version` on the PATH. With a leash it hangs while it makes a venv."""
            plan = {"finished": str(self._finished or ""), "made": str(self._made), "version": version}
            plan |= {"leash": leash, "leash_code": LEASH}
            plan["pip"] = {"no-such-package": NO_SUCH_PACKAGE, "no-room": NO_ROOM}
            (self.programs / "python.py").write_text(PYTHON_PY.format(plan=json.dumps(plan)), encoding="utf-8")
            self.write_batch("python", PYTHON_BAT)

        def write_batch(self, name: str, lines: str | None) -> None:
            """Makes `python` or `py` on the PATH a batch file of these lines; None: it is missing."""
            (self.programs / f"{name}.bat").unlink(missing_ok=True)
            if lines:
                (self.programs / f"{name}.bat").write_bytes(lines.encode())

        def remove_python(self) -> None:
            self.write_batch("python", None)

        def _command(self, script: Path, arguments: tuple[str, ...]) -> tuple[str, dict[str, str]]:
            words = " ".join(f'"{word}"' for word in [str(script), *arguments])
            excluded = ("PYTHON", "PIP", "VIRTUAL", "SESSIONNAME")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(excluded)}
            path = rf"{self.programs};{os.environ['SYSTEMROOT']}\System32"
            python = {"REAL_PYTHON": sys._base_executable, "PROGRAMS": str(self.programs)}
            return f'cmd /d /s /c "{words}"', {**environment, **python, "PATH": path}

        def kill(self, process: subprocess.Popen[str]) -> None:
            """Ends a start as Windows does when its window is closed."""
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], check=True, capture_output=True)

    else:

        def set_python(self, version: tuple[int, ...] | None = None, leash: int = 0, making: str = "") -> None:
            """Puts a Python on the PATH that claims to be of `version`. It makes the venv $last by `making`; with a
            leash it hangs there."""
            if leash:
                hanging = write_program(self.outside / "hanging", HANG, {"leash": leash})
                making = f'mkdir "$last"; exec "{hanging}"'
            elif self._finished and not making:
                clear = 'case "$*" in *--clear*) rm -rf "$last" ;; esac'
                copy = f'cp -R "{self._finished}" "$last"; rm "$last/installed.txt"'
                making = f'echo >>"{self._made}"; {clear}; {copy}; exit'
            lines = f'case "$*" in *"-m venv"*) for last; do :; done; {making} ;; esac\n' if making else ""
            lines += f'exec "{sys.executable}" "$@"'
            if version:  # answers only the question about its version
                lines = f'exec "{sys.executable}" -c "import sys; sys.version_info = {version}; $3"'
            self.write_script("python3", lines)

        def write_script(self, name: str, lines: str) -> None:
            (self.programs / name).write_text(f"#!/bin/sh\n{lines}\n")
            (self.programs / name).chmod(0o755)

        def remove_python(self) -> None:
            (self.programs / "python3").unlink()

        def _command(self, script: Path, arguments: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
            environment = {name: value for name, value in os.environ.items() if name in ("HOME", "TMPDIR", "LANG")}
            return [str(script), *arguments], {**environment, "PATH": str(self.programs)}

        def kill(self, process: subprocess.Popen[str]) -> None:
            os.killpg(process.pid, signal.SIGKILL)

    def start(self, *arguments: str, script: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        command, system = self._command(script or self.script, arguments)
        offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(self.outside / "wheels")}
        return subprocess.Popen(
            command, cwd=self.outside, encoding="utf-8", errors="replace", env={**system, **offline, **environment},
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **options) as process:
            try:
                output = process.communicate(timeout=4 * PATIENCE)
            finally:
                process.kill()
            return subprocess.CompletedProcess(process.args, process.returncode, *output)

    def venvs_made(self) -> int:
        return len(self._made.read_text()) if self._made.exists() else 0


SETTING_UP = ("run.bat: setting up ", "run.bat: First start: setting up ") if service.WINDOWS else ("Setting up: ",)


def errors_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What a start printed to stderr, except that it sets up or waits for another start, or runs the tests."""
    expected = (*SETTING_UP, "Another start is ", "run.bat: waiting for another ", "These are the developers' tests")
    return [line for line in result.stderr.splitlines() if not line.startswith(expected)]


def report_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the service printed that a start without errors started."""
    assert errors_of(result) == []
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def sets_up(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether a successful start had to set up."""
    assert (result.returncode, errors_of(result)) == (0, [])
    return any(line.startswith(SETTING_UP) for line in result.stderr.splitlines())


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A venv that was really made, by a first start, and what that printed."""
    project = Project(tmp_path_factory.mktemp("first"))
    return project.venv, project.run("--port", "1")


@pytest.fixture(scope="session")
def finished_venv(first_start: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That venv, on Windows without pip, elsewhere with PIP in pip's place, so that copying and installing take no
    time."""
    copy = tmp_path_factory.mktemp("finished") / "venv"
    shutil.copytree(first_start[0], copy, symlinks=True, ignore=shutil.ignore_patterns("pip*", "setuptools*"))
    packages = next(copy.glob(PACKAGES))
    if service.WINDOWS:
        (packages / "pytest.py").write_text(f"def main(arguments):\n    exec({FAKE_SERVICE!r})")
        return copy
    (packages / "pip.py").write_text(PIP)
    (packages / "pytest.py").write_text(FAKE_SERVICE)
    for name in ("python", "python3"):
        (copy / "bin" / name).unlink()
    (copy / "bin" / "python").write_text(VENV_PYTHON)
    (copy / "bin" / "python").chmod(0o755)
    (copy / "bin" / "python3").symlink_to(sys._base_executable)
    return copy


@pytest.fixture
def fresh(finished_venv: Path, tmp_path: Path) -> Project:
    """A project that was never started."""
    return Project(tmp_path, finished_venv)


@pytest.fixture
def started(fresh: Project, finished_venv: Path) -> Project:
    """A project that is set up."""
    shutil.copytree(finished_venv, fresh.venv, symlinks=True)
    return fresh


def test_the_first_start_sets_up_and_starts(first_start):
    venv, result = first_start
    report = report_of(result)
    assert sets_up(result)
    steps = ["First start: setting up"] if service.WINDOWS else ["creating .venv", "installing"]
    assert all(step in result.stderr for step in steps)
    assert report["arguments"] == ["--port", "1"]
    assert Path(report["prefix"]).samefile(venv)


def test_a_second_start_needs_neither_python_nor_pip(started):
    started.remove_python()
    for pip in started.venv.glob(f"{PACKAGES}/pip.py"):  # on Windows there is none
        pip.unlink()
    result = started.run()
    assert (result.returncode, result.stderr) == (0, "")
    assert Path(report_of(result)["prefix"]).samefile(started.venv)


def test_changed_requirements_are_installed_once(started):
    started.requirements.write_text(REQUIREMENTS * 2)
    assert [sets_up(started.run()) for _ in range(2)] == [True, False]
    assert started.venvs_made() == 0


def test_a_failed_install_is_reported_and_repeated_by_the_next_start(started):
    started.requirements.write_text("no-such-package==1\n")
    advice = "run.sh: The packages could not be installed: see above, check the internet connection"
    if service.WINDOWS:
        advice = "run.bat: pip could not install the packages (see above): check the internet connection"
    for _ in range(2):
        result = started.run()
        of_pip, of_script = errors_of(result)
        assert (result.returncode, result.stdout, of_pip) == (1, "", NO_SUCH_PACKAGE)
        assert of_script.startswith(advice)
    started.requirements.write_text(REQUIREMENTS)
    assert sets_up(started.run())
    assert started.venvs_made() == 0  # a new venv would need the same download


def without(*patterns: str, stamp: bool = False) -> Callable[[Project], None]:
    """Removes what is at `patterns` in .venv, and the stamp of a finished setup, unless `stamp` keeps it."""

    def damage(project: Project) -> None:
        if not stamp:
            project.stamp.unlink()
        for pattern in patterns:
            path = next(project.venv.glob(pattern))
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncated(pattern: str, size: int = 0, stamp: bool = False) -> Callable[[Project], None]:
    """Truncates the file at `pattern` in .venv to `size` bytes."""

    def damage(project: Project) -> None:
        without(stamp=stamp)(project)
        os.truncate(next(project.venv.glob(pattern)), size)

    return damage


def lose_pip_before_an_update(project: Project) -> None:
    without(f"{PACKAGES}/pip.py", stamp=True)(project)
    project.requirements.write_text(REQUIREMENTS * 2)


def upgrade_in_place(project: Project) -> None:
    project.stamp.write_text(project.stamp.read_text().replace(sys.version, "3.10.0 (an older one)"))


def upgrade_to_the_next(project: Project) -> None:
    """Another version behind the same name: it looks for its packages in a folder of its own."""
    upgrade_in_place(project)
    next(project.venv.glob("lib/*")).rename(project.venv / "lib" / "python3.9")


def move_base_python(project: Project) -> None:
    if service.WINDOWS:
        settings = project.venv / "pyvenv.cfg"
        settings.write_text(settings.read_text("utf-8").replace(sys.base_prefix, r"C:\gone"), "utf-8")
    else:
        (project.venv / "bin" / "python").unlink()
        (project.venv / "bin" / "python").symlink_to(project.outside / "gone")


@pytest.mark.parametrize(
    ("damage", "venvs"),
    [
        pytest.param(without(), 0, id="install interrupted"),
        pytest.param(truncated("installed.txt", 5, stamp=True), 0, id="last step interrupted"),
        pytest.param(lambda project: project.stamp.write_bytes(b"\xff"), 0, id="garbage in the stamp"),
        pytest.param(without(PYTHON_IN_VENV.split("/")[0]), 1, id="venv interrupted"),
        pytest.param(without(f"{PACKAGES}/pip.py"), 1, marks=ONLY_POSIX, id="venv interrupted before pip"),
        pytest.param(without(f"{PACKAGES}/tiny.py"), 1, id="package interrupted"),
        pytest.param(truncated(f"{PACKAGES}/tiny.py"), 1, id="file interrupted"),
        pytest.param(without(f"{PACKAGES}/tiny.py", stamp=True), 1, id="package lost"),
        pytest.param(truncated(f"{PACKAGES}/tiny.py", stamp=True), 1, id="contents of a file lost"),
        pytest.param(without(PACKAGES.split("/")[0], stamp=True), 1, id="all packages lost"),
        pytest.param(without("pyvenv.cfg", stamp=True), 1, id="settings of the venv lost"),
        pytest.param(truncated(PYTHON_IN_VENV, stamp=True), 1, id="python lost"),
        pytest.param(lose_pip_before_an_update, 1, marks=ONLY_POSIX, id="pip lost before an update"),
        pytest.param(upgrade_in_place, 0, id="Python upgraded in place"),
        pytest.param(upgrade_to_the_next, 1, marks=ONLY_POSIX, id="Python upgraded to the next version"),
        pytest.param(move_base_python, 1, id="Python moved away"),
    ],
)
def test_a_start_repairs_a_venv_that_is_incomplete_or_of_another_python(started, damage, venvs):
    damage(started)
    assert (sets_up(started.run()), started.venvs_made()) == (True, venvs)
    assert not sets_up(started.run())


def test_a_start_looks_for_the_packages_without_importing_them(started):
    package = next(started.venv.glob(f"{PACKAGES}/tiny.py"))
    package.write_text("1 / 0".ljust(len(PACKAGE)))
    assert not sets_up(started.run())


def test_variables_for_another_tools_python_change_nothing(fresh):
    variables = variables_of_another_tool(fresh.outside)
    first, second, tests = fresh.run(**variables), fresh.run(**variables), fresh.run("test", **variables)
    assert [report_of(result)["isolated"] for result in (first, second, tests)] == [True] * 3
    assert report_of(first)["environment"].items() >= variables.items()  # SwarmUI may be that tool


@pytest.mark.slow
@pytest.mark.parametrize("place", ["environment", "settings file"])
def test_pip_installs_into_the_venv_whatever_its_settings_say(first_start, tmp_path, place):
    project = Project(tmp_path)
    shutil.copytree(first_start[0], project.venv, symlinks=True)
    without(*[f"{PACKAGES}/{name}" for name in PARTS])(project)
    variables = variables_of_another_tool(tmp_path)
    if place == "settings file":
        variables = write_pip_settings(tmp_path / "pip.conf", variables)
    before = {path.name for path in tmp_path.iterdir()}
    result = project.run(**variables)
    assert sets_up(result)
    assert Path(report_of(result)["prefix"]).samefile(project.venv)
    assert next(project.venv.glob(f"{PACKAGES}/tiny.py")).read_text() == PACKAGE
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [300 << 10, 6 << 20, 90 << 20], ids=["venv", "ensurepip", "pip"])
def test_a_setup_that_fills_the_disk_says_so_and_succeeds_once_there_is_room(small_disk, size):
    disk = small_disk(size)
    project = Project(disk)
    write_wheel(project.outside / "wheels", "huge", "#" * 70_000_000)
    project.requirements.write_text("huge==1\n")
    result = project.run()
    assert result.returncode == 1
    assert errors_of(result) == [
        f"run.sh: The disk is full: make room on the disk that holds {project.venv}, then try again."
    ]
    subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
    assert report_of(project.run())["prefix"] == str(project.venv)


@ONLY_WINDOWS
def test_a_setup_on_windows_that_fills_the_disk_says_so(started):
    started.requirements.write_text("no-room==1\n")
    result = started.run()
    (error,) = errors_of(result)
    assert result.returncode == 1
    assert error.startswith("run.bat: the disk is full: make room on the disk that holds C:")
    assert error.endswith(".venv, then start run.bat again.")


def use_no_ensurepip(project: Project) -> None:
    project.write_script("no-ensurepip", "echo No module named ensurepip >&2; exit 1")
    project.set_python(making='mkdir "$last" "$last/bin"; cp "${0%/*}/no-ensurepip" "$last/bin/python"; exit')


def use_no_venv(project: Project) -> None:
    project.set_python(making="echo No module named venv >&2; exit 1")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        pytest.param(Project.remove_python, "Python (is missing|was not found): install", id="no Python"),
        pytest.param(lambda project: project.set_python((3, 9, 25)), "Python is (too old|older than 3.10): install",
                     id="an old Python"),
        pytest.param(lambda project: project.write_batch("python", STORE_STUB), "Python was not found: install",
                     marks=ONLY_WINDOWS, id="the Store's stub"),
        pytest.param(use_no_ensurepip, "install it .*python3-venv", marks=ONLY_POSIX, id="no ensurepip"),
        pytest.param(use_no_venv, "install it .*python3-venv", marks=ONLY_POSIX, id="no venv module"),
    ],
)  # fmt: skip
def test_a_start_names_what_is_missing_in_one_sentence_and_a_later_one_succeeds(fresh, change, advice):
    change(fresh)
    result = fresh.run()
    (error,) = errors_of(result)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.search(f"^{service.START_SCRIPT}: .*{advice}", error)
    fresh.set_python()
    assert sets_up(fresh.run())


@ONLY_POSIX
def test_a_newer_python_is_found_beside_an_old_one(fresh):
    (fresh.programs / "python3").rename(fresh.programs / "python3.12")
    fresh.set_python((3, 9, 25))
    assert report_of(fresh.run())["prefix"] == str(fresh.venv)


@ONLY_WINDOWS
@pytest.mark.parametrize(
    ("py", "python"),
    [
        pytest.param(PYTHON_BAT, STORE_STUB, id="python is the Store's stub"),
        pytest.param(PYTHON_BAT, None, id="python is missing"),
        pytest.param("@echo No suitable Python runtime found>&2\r\n@exit /b 103\r\n", PYTHON_BAT, id="py has none"),
        pytest.param("@exit /b 3\r\n", PYTHON_BAT, id="py has an old one"),
    ],
)
def test_py_is_tried_first_and_then_python(fresh, py, python):
    fresh.write_batch("py", py)
    fresh.write_batch("python", python)
    assert sets_up(fresh.run())


@ONLY_WINDOWS
def test_a_folder_that_cannot_be_written_is_reported_in_one_sentence(fresh):
    (fresh.folder / ".venv.lock").mkdir()  # what a setup writes first of all
    result = fresh.run()
    (error,) = errors_of(result)
    assert (result.returncode, result.stdout) == (1, "")
    assert error.startswith("run.bat: this folder cannot be written to: move it to one of your own")


def test_arguments_exit_code_and_folder_are_passed_through(started):
    arguments = ["7", "two words", "", "*", "a&b", "^(c)", "100%", "!d!"]
    result = started.run(*arguments)
    assert (result.returncode, report_of(result)["arguments"]) == (7, arguments)
    assert Path(report_of(result)["folder"]).samefile(started.outside)


@ONLY_POSIX
def test_the_service_replaces_the_script_in_its_process(started):
    """So that a signal to what systemd started reaches it."""
    with started.start() as process:
        assert json.loads(process.communicate(timeout=PATIENCE)[0])["pid"] == process.pid


def test_the_venv_is_not_activated(started):
    environment = report_of(started.run())["environment"]
    assert environment["PATH"].split(os.pathsep)[0] == str(started.programs)
    assert "VIRTUAL_ENV" not in environment


@ONLY_POSIX
def test_the_script_finds_its_folder_through_links(started):
    (started.outside / "links").mkdir()
    (started.outside / "links" / "second").symlink_to("../render & (story) teller/run.sh")
    (started.outside / "first").symlink_to(started.outside / "links" / "second")
    result = started.run(script=started.outside / "first", CDPATH=str(started.outside))
    assert report_of(result)["prefix"] == str(started.venv)


def test_the_argument_test_runs_pytest_in_the_scripts_folder(started):
    result = started.run("test", "-k", "two words")
    assert "developers' tests" in result.stderr
    assert f"use {'' if service.WINDOWS else './'}{service.START_SCRIPT} check." in result.stderr
    assert report_of(result)["arguments"][-2:] == ["-k", "two words"]
    assert Path(report_of(result)["folder"]).samefile(started.folder)


def test_two_first_starts_at_once_set_up_once(fresh):
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(fresh.run) for _ in range(2)]
    assert [future.result().returncode for future in both] == [0, 0]
    assert fresh.venvs_made() == 1


def test_a_setup_that_was_killed_does_not_block_a_later_one(fresh, leash):
    fresh.set_python(leash=leash.port)
    with fresh.start() as process:
        setup = leash.next()
        fresh.kill(process)
        assert setup.has_ended()
    fresh.set_python()
    assert sets_up(fresh.run())


# ------------------------------------------------------------------------------ Windows' console ----

CLICKED = r'''"C:\Windows\system32\cmd.exe" /c ""C:\Some & (1)\run.bat" "'''


@ONLY_WINDOWS
@pytest.mark.parametrize(
    ("code", "environment", "waits"),
    [
        pytest.param("3", {"CMDCMDLINE": CLICKED, "SESSIONNAME": "Console"}, True, id="double-clicked"),
        pytest.param("0", {"CMDCMDLINE": CLICKED, "SESSIONNAME": "Console"}, False, id="without an error"),
        pytest.param("3", {"CMDCMDLINE": CLICKED}, False, id="a scheduled task"),
        pytest.param("3", {"CMDCMDLINE": "cmd", "SESSIONNAME": "Console"}, False, id="typed"),
        pytest.param("3", {"CMDCMDLINE": "cmd /c run.bat 3", "SESSIONNAME": "Console"}, False, id="called"),
    ],
)
def test_an_error_waits_for_a_key_where_the_window_would_close(started, code, environment, waits):
    result = started.run(code, **environment)
    assert waits or result.returncode == int(code)  # nobody asks for the code of a window that showed the error
    assert ("The service ended with an error, see above." in result.stdout) is waits
    assert ("Press any key" in result.stdout) is waits


@ONLY_WINDOWS
def test_a_failed_setup_waits_for_a_key_too(fresh):
    fresh.remove_python()
    result = fresh.run(CMDCMDLINE=CLICKED, SESSIONNAME="Console")
    assert result.returncode == 1
    assert "run.bat ended with an error, see above." in result.stdout
    assert "Press any key" in result.stdout


@ONLY_WINDOWS
@pytest.mark.parametrize("code", [0, 7], ids=["without an error", "an error"])
def test_in_a_console_without_a_window_nothing_waits_for_a_key(started, clean_environment, code):
    """A scheduled task that does not run on the desktop has such a console: a "pause" would wait there for ever."""
    clean_environment.pop("SESSIONNAME", None)
    command = f'cmd /c ""{started.script}" {code}"'
    process = subprocess.Popen(command, env=clean_environment, creationflags=subprocess.CREATE_NO_WINDOW)
    try:
        assert process.wait(PATIENCE) == code
    finally:
        process.kill()


# The title of the console of process N, as the desktop shows it.
READ_TITLE = """
import ctypes, sys
kernel32 = ctypes.WinDLL("kernel32")
kernel32.FreeConsole()
if not kernel32.AttachConsole(int(sys.argv[1])):
    sys.exit("no such console")
title = ctypes.create_unicode_buffer(260)
kernel32.GetConsoleTitleW(title, len(title))
print(title.value)
"""


@pytest.mark.skipif(not service.WINDOWS, reason="the other systems' terminals set their own titles")
def test_the_title_of_the_console_window_is_the_services_name_and_port(start_service):
    running = start_service()
    command = [sys.executable, "-c", READ_TITLE, str(running.process.pid)]
    read = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert read.stdout.strip() == f"StoryTeller automation, port {running.port}"


@pytest.mark.skipif(not service.WINDOWS, reason="only Windows starts programs that have no streams at all")
def test_the_service_runs_without_console_and_streams(module_copy, clean_environment):
    """As pythonw starts it: sys.stdout and sys.stderr are None."""
    port = free_port()
    environment = {**clean_environment, "STORYTELLER_PORT": str(port)}
    command = [str(Path(sys.executable).with_name("pythonw.exe")), "-I", str(module_copy)]
    process = subprocess.Popen(command, env=environment, creationflags=subprocess.DETACHED_PROCESS)
    try:
        wait_until(lambda: can_connect(port))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
    finally:
        process.kill()
        process.wait(PATIENCE)


# ------------------------------------------------------------------- without the start scripts ----


@pytest.fixture
def without_packages(module_copy: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in the module's folder, without any of its packages."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, cwd=module_copy.parent, capture_output=True, text=True, timeout=PATIENCE)

    return run


def test_the_module_without_its_packages_names_the_start_scripts(without_packages):
    result = without_packages("storyteller_automation.py", "check")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "The package bottle is missing: start the service by run.sh (on Windows: run.bat).\n"


def test_an_import_of_the_module_without_its_packages_raises_the_exception(without_packages):
    result = without_packages("-c", "import storyteller_automation")
    assert "ModuleNotFoundError: No module named 'bottle'" in result.stderr


# --------------------------------------------------------------------------------------- status ----


def test_status_prints_what_the_page_shows_in_ten_lines(start_service, run_module):
    running = start_service()
    running.call("PUT", f"/api/v1/session/{T}", with_beats(DONE, OPEN))
    running.call("POST", RESERVATION, {"holder": "storyart", "ttlSeconds": 60})
    result = run_module("status", STORYTELLER_API_TOKEN=TOKEN)
    title, *lines = result.stdout.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines)
    assert (result.returncode, result.stderr, len(lines)) == (0, "", 9)
    assert re.fullmatch(r"StoryTeller automation [0-9.]+, running for 0:00:[0-9]+", title)
    assert (rows["address"], rows["store"], rows["alerts"]) == (f"http://localhost:{running.port}", "sqlite", "none")
    assert rows["sessions"] == f"1 in progress; 1 of 2 prompts of session {T}"
    assert rows["notifications"].startswith("1 pending, the oldest for 0:00:")
    assert rows["reserved"].startswith("by storyart until 20")
    assert rows["SwarmUI"].startswith("stopped for 0:00:")
    assert (rows["tokens"], "nvidia-smi" in rows["GPU"]) == ("none ends within 3 days", True)


def test_status_marks_a_number_of_notifications_that_may_be_larger(start_service, run_module):
    running = start_service()
    for number in range(100):
        running.call("POST", "/api/v1/notifications", {**MADE, "sessionTimestamp": T + number})
    assert re.search(r"\n  notifications +100\+ pending, ", run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout)


@pytest.mark.parametrize(("token", "fault"), [("", "A token is needed"), ("another-token-0123456789", "is unknown")])
def test_status_says_why_the_service_refused_its_token(start_service, run_module, token, fault, module_copy):
    running = start_service(STORYTELLER_HOST="0.0.0.0")
    result = run_module("status", STORYTELLER_API_TOKEN=token)
    assert (result.returncode, result.stdout, result.stderr.count("\n"), fault in result.stderr) == (1, "", 1, True)
    assert f"The service at http://localhost:{running.port} refused the request: " in result.stderr
    assert not (module_copy.parent / "data" / "api_token").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8"])
def test_status_and_check_without_a_usable_token_file_send_no_token(start_service, run_module, module_copy, encoding):
    running = start_service()
    (module_copy.parent / "data" / "api_token").write_text("A token in UTF-16, as PowerShell\nwrites it", encoding)
    assert "refused the request: A token is needed" in run_module("status", STORYTELLER_API_TOKEN="").stderr
    found = run_module("check", STORYTELLER_API_TOKEN="").stdout
    assert "api_token contains no valid token" in found
    assert f"OK   port: this service runs at http://localhost:{running.port};" in found


def test_status_does_not_know_which_tokens_end_if_the_store_was_never_read(start_service, run_module):
    start_service(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert re.search(r"\n  tokens +not known\n", run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout)


def test_status_does_not_know_which_notifications_are_pending_while_the_store_is_away(start_service, run_module):
    start_service(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    assert re.search(r"\n  notifications +not known\n", run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout)


def test_status_and_check_print_an_address_that_can_be_opened(start_service, run_module):
    running = start_service(STORYTELLER_HOST="0.0.0.0")
    settings = {"STORYTELLER_API_TOKEN": TOKEN, "STORYTELLER_HOST": "0.0.0.0", "STORYTELLER_PORT": str(running.port)}
    for command in ("status", "check"):
        assert f" http://localhost:{running.port}" in run_module(command, **settings).stdout


def test_status_says_that_no_service_runs(run_module):
    result = run_module("status")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert re.search(r"^No service listens for the data folder .*: .*, or wait\.$", result.stderr)


# ---------------------------------------------------------------------------------------- move ----


@pytest.fixture
def open_store(module_copy: Path) -> Callable[[], contextlib.closing[service.SqliteStore]]:
    """Opens the embedded store in the data folder of `module_copy`."""
    path = module_copy.parent / "data" / "storyteller.sqlite3"
    path.parent.mkdir()
    return lambda: contextlib.closing(service.SqliteStore(path))


@pytest.fixture
def contents(open_store: Any) -> dict[str, Any]:
    """What the embedded store contains: two sessions; the notification of one is acknowledged."""
    with open_store() as store:
        document = with_beats(DONE, timestamp=T)
        for timestamp, saved in ((T, document), (T + 1, with_beats(OPEN, timestamp=T + 1))):
            draft = service.due_notification(timestamp, saved)
            store.save(timestamp, service.Change(service.to_json(saved), draft=draft))
        notifications = service.Notifications(store)
        acknowledged, waiting = (found.id for found in notifications.check(tuple(service.TOTALS), 9))
        assert notifications.acknowledge([acknowledged])
        token = service.issue_token(store, "storyart", ["gpu:read"], 86_400 * 90, service.now_ms())[0]
        saved = [store.session(timestamp).saved for timestamp in (T, T + 1)]
    return {"acknowledged": acknowledged, "waiting": waiting, "token": token, "saved": saved, "document": document}


def test_a_move_to_redis_keeps_everything_and_changes_nothing_in_the_embedded_store(
    run_module, contents, redis_url, make_bridged, module_copy
):
    path = module_copy.parent / "data" / "storyteller.sqlite3"
    before = path.read_bytes()
    result = run_module("move", "--to", redis_url)
    copied = {"tokens": 1, "acknowledgements": 1, "notifications": 1, "sessions": 2}
    lines = [f"{kind}: {count} copied, 0 already there\n" for kind, count in copied.items()]
    assert (result.returncode, result.stderr, result.stdout.startswith("".join(lines))) == (0, "", True)
    assert path.read_bytes() == before
    bridged = make_bridged()
    bridged.look()
    assert bridged.app.get(f"/api/v1/session/{T}").json["data"] == contents["document"]
    assert bridged.app.get(f"/api/v1/session/{T}/prompts-status").json["promptsReady"] is True
    assert [row["timestamp"] for row in bridged.app.get("/api/v1/session/list").json["sessions"]] == [T + 1, T]
    assert [row["id"] for row in pending(bridged.app, "?type=all")] == [contents["waiting"]]  # none is announced again
    assert bridged.store.acknowledged([contents["acknowledged"]]) == {contents["acknowledged"]}
    assert as_caller(bridged.app, contents["token"]).get("/api/v1/auth/session").json["subject"] == "storyart"
    assert [bridged.store.session(timestamp).saved for timestamp in (T, T + 1)] == contents["saved"]
    again = {"type": "beats_ready", "sessionTimestamp": T + 1, "storyUuid": "", "episodeNumber": 2, "totalBeats": 1}
    assert bridged.app.post_json("/api/v1/notifications", again, status=200).json["id"] == contents["waiting"]


def test_a_move_keeps_ttls_and_skips_what_has_expired(run_module, contents, redis_url, other_program, module_copy):
    hour = 3_600_000
    with contextlib.closing(sqlite3.connect(module_copy.parent / "data" / "storyteller.sqlite3")) as database, database:
        for table in ("session", "marker", "token"):
            database.execute(f"UPDATE {table} SET expires = ?", (service.now_ms() + hour,))
        database.execute("UPDATE session SET expires = 1 WHERE timestamp = ?", (T + 1,))
    result = run_module("move", "--to", redis_url)
    assert "sessions: 1 copied" in result.stdout
    (token,) = other_program.keys("auth:session:*")
    keys = [f"session:{T}", f"storyteller:session:{T}", f"notifications:ack:{contents['acknowledged']}", token]
    assert all(0 < hour - other_program.pttl(key) < 1000 * PATIENCE for key in keys)
    assert not other_program.exists(f"session:{T + 1}")


def test_a_second_move_restores_nothing_that_was_removed_since_the_first(run_module, contents, redis_url, redis_store):
    run_module("move", "--to", redis_url)
    redis_store.remove_session(T)
    assert service.Notifications(redis_store).remove(contents["waiting"])
    assert redis_store.revoke_token(service.digest_of(contents["token"]))
    result = run_module("move", REDIS_URL=redis_url)
    assert re.findall(r"(\d+) copied, (\d+) already", result.stdout) == [("0", "1"), ("0", "1"), ("0", "1"), ("0", "2")]
    assert [row.timestamp for row in redis_store.sessions()] == [T + 1]
    assert (members_of(redis_store), redis_store.tokens()) == ([], [])


@pytest.mark.parametrize("member", [b"no JSON", b"[]", b"{}"])
def test_a_move_copies_an_invalid_notification_unchanged(
    run_module, contents, redis_url, other_program, module_copy, member
):
    with contextlib.closing(sqlite3.connect(module_copy.parent / "data" / "storyteller.sqlite3")) as database, database:
        database.execute("INSERT INTO pending VALUES (?, ?, 'it')", (member, service.now_ms()))
    result = run_module("move", "--to", redis_url)
    assert result.stderr == ""
    assert "notifications: 2 copied, 0 already there\nsessions: 2 copied" in result.stdout
    assert other_program.zscore("notifications:pending", member)


def test_a_move_does_not_replace_a_session_in_redis(run_module, contents, redis_url, storyart, other_program):
    storyart.save(spoken("w", timestamp=T))
    other_program.set(f"session:{T + 1}", "theirs")
    result = run_module("move", "--to", redis_url)
    assert "sessions: 0 copied, 2 already there" in result.stdout
    assert (storyart.load()["scriptText"], other_program.get(f"session:{T + 1}")) == ("w", "theirs")
    assert not other_program.exists(f"session:{T}")


def test_a_later_move_copies_what_redis_refused(run_module, contents, redis_url, other_program):
    for key in ("notifications:pending", "storyteller:sessions"):
        other_program.set(key, "of another type")
        assert run_module("move", "--to", redis_url).returncode == 2
        assert f"{service.START_SCRIPT} move copies them" in run_module("check", REDIS_URL=redis_url).stdout
        other_program.delete(key)
    run_module("move", "--to", redis_url)
    assert other_program.zcard("storyteller:sessions") == 2
    assert other_program.zcard("notifications:pending") == 1


def test_rows_are_read_with_the_newest_session_last_whenever_it_was_saved(sqlite_store, clock):
    for timestamp in (T + 2, T, T + 1):
        sqlite_store.save(timestamp, service.Change(b"{}"))
        clock.now += 1
    assert [row[0] for row in sqlite_store.rows("session")] == [T, T + 1, T + 2]


@pytest.mark.slow
@pytest.mark.skipif(service.WINDOWS, reason="a redis-server of its own is slow to start there")
def test_a_later_move_completes_one_that_was_killed(open_store, module_copy, clean_environment, run_module, own_redis):
    count, target = 400, own_redis()
    with open_store() as store:
        for timestamp in range(T, T + count):
            document = service.to_json(with_beats(DONE, timestamp=timestamp))
            store.save(timestamp, service.Change(document, draft=draft(session=timestamp)))
    command = [sys.executable, str(module_copy), "move", "--to", target.url]
    for share in (1, count // 3, count // 2):
        process = subprocess.Popen(command, env=clean_environment, stdout=subprocess.DEVNULL)
        wait_until(lambda share=share: target.tell("ZCARD", "storyteller:sessions") >= share)
        process.kill()
        process.wait(PATIENCE)
    result = run_module("move", "--to", target.url)
    copied, there = map(int, re.search(r"sessions: (\d+) copied, (\d+)", result.stdout).groups())
    assert (copied + there, target.tell("ZCARD", "storyteller:sessions")) == (count, count)
    assert target.tell("ZCARD", "notifications:pending") == count
    assert all(target.tell("HGET", f"storyteller:session:{T + n}", "announced") for n in range(count))


@pytest.mark.parametrize("command", [["move", "--to", "redis://127.0.0.1:1/0"], ["restore", "a backup"]])
def test_move_and_restore_are_refused_while_the_service_runs(start_service, run_module, command):
    running = start_service()
    running.call("PUT", f"/api/v1/session/{T}", SESSION)
    run_module("backup", "a backup")
    result = run_module(*command)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"is in use by the service at http://localhost:{running.port}: " in result.stderr
    assert running.call("GET", f"/api/v1/session/{T}")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--to", "http://a"], "REDIS_URL cannot be used: expected redis://"), ([], "The Redis to copy to is not known"),
     (["--to", "redis://127.0.0.1:1/0"], "nothing listens there")],
)  # fmt: skip
def test_a_move_without_a_usable_redis_is_refused_in_one_sentence(run_module, contents, arguments, words):
    result = run_module("move", *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr


@pytest.mark.parametrize("command", [["move", "--to", "redis://127.0.0.1:1/0"], ["backup", "a backup"]])
def test_move_and_backup_do_not_create_a_missing_embedded_store(run_module, module_copy, command):
    result = run_module(*command)
    assert (result.returncode, "There is no embedded store in the data folder " in result.stderr) == (2, True)
    assert not (module_copy.parent / "data" / "storyteller.sqlite3").exists()


def test_a_start_and_check_recommend_move_while_redis_lacks_sessions_of_the_embedded_store(
    start_service, run_module, contents, redis_url
):
    advice = f"{service.START_SCRIPT} move copies them"
    assert advice in run_module("check", REDIS_URL=redis_url).stdout
    running = start_service(REDIS_URL=redis_url)
    wait_until(lambda: advice in running.printed)
    running.stop()
    run_module("move", "--to", redis_url)
    assert advice not in run_module("check", REDIS_URL=redis_url).stdout


# --------------------------------------------------------------------------- backup and restore ----


def sessions_in(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in database.execute("SELECT timestamp FROM session ORDER BY 1")]


def test_a_backup_is_complete_while_the_service_writes(start_service, run_module, tmp_path):
    running, stop = start_service(), threading.Event()

    def write() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            running.call("PUT", f"/api/v1/session/{T + number}", {**SESSION, "scriptText": "s" * 100_000})

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        results = [run_module("backup", "a backup.sqlite3") for _ in range(3)]  # the later ones replace it
        stop.set()
        writing.result(PATIENCE)
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
    found = sessions_in(tmp_path / "a backup.sqlite3")
    assert found == list(range(T, T + len(found)))
    assert sorted(path.name for path in tmp_path.iterdir() if "backup" in path.name) == ["a backup.sqlite3"]


@pytest.mark.parametrize("name", ["a document", "a folder", "data/storyteller.sqlite3"])
def test_a_backup_replaces_only_a_backup(run_module, contents, module_copy, name):
    folder = module_copy.parent
    (folder / "a document").write_bytes(b"a document" * 100)
    (folder / "a folder").mkdir()
    result = run_module("backup", str(folder / name))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert (folder / "a document").read_bytes() == b"a document" * 100
    assert sessions_in(folder / "data" / "storyteller.sqlite3") == [T, T + 1]
    assert not list(folder.glob(".*"))


def test_a_backup_does_not_replace_the_store_of_a_running_service(run_module, contents, tmp_path):
    with contextlib.closing(service.SqliteStore(tmp_path / "other.sqlite3")) as other:
        other.save(T + 5, service.Change(b"{}"))
        result = run_module("backup", str(tmp_path / "other.sqlite3"))
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert sessions_in(tmp_path / "other.sqlite3") == [T + 5]


def test_an_interrupted_command_ends_with_code_130(monkeypatch, tmp_path):
    def interrupt(*paths: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "storyteller.sqlite3").touch()
    monkeypatch.setattr(service, "copy_store", interrupt)
    assert service.main(["backup", str(tmp_path / "b"), "--data-dir", str(tmp_path)]) == 130


def test_a_backup_on_a_full_disk_leaves_the_previous_one(run_module, contents, small_disk):
    disk = small_disk(200_000)
    (disk / "b").write_bytes(b"")
    assert run_module("backup", str(disk / "good")).returncode == 0
    fill(disk)
    result = run_module("backup", str(disk / "good"))
    assert (result.returncode, "disk is full" in result.stderr) == (2, True)
    assert sessions_in(disk / "good") == [T, T + 1]
    assert sorted(path.name for path in disk.iterdir()) == ["b", "filler", "good"]


def test_a_restore_keeps_the_previous_store_with_the_contents_of_its_wal(run_module, contents, open_store, module_copy):
    assert run_module("backup", "b").returncode == 0
    data = module_copy.parent / "data"
    with open_store() as store:
        store.save(T + 2, service.Change(b"{}"))
        left = {data / name: (data / name).read_bytes() for name in service.STORE_FILES[:2]}
    for path, content in left.items():  # as a killed service leaves them
        path.write_bytes(content)
    result = run_module("restore", "b")
    assert (result.returncode, result.stderr) == (0, "")
    assert sessions_in(data / "storyteller.sqlite3") == [T, T + 1]
    kept = Path(re.search(r"is kept as (.*)\.$", result.stdout.strip())[1])
    assert sessions_in(kept) == [T, T + 1, T + 2]


# Ends the process, as SIGKILL would, before the n-th time that it renames, copies or removes a file.
KILL_BEFORE_STEP = """
import os, runpy, sys
left = int(sys.argv.pop(1))
def count(event, arguments):
    global left
    left -= event in ("os.rename", "os.remove", "os.link", "shutil.copyfile")
    if left < 0:
        os._exit(9)
sys.addaudithook(count)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_restore_leaves_the_previous_store_or_the_restored_one(
    run_module, contents, open_store, module_copy, clean_environment, tmp_path
):
    assert run_module("backup", str(tmp_path / "b")).returncode == 0
    data, killed = module_copy.parent / "data", tmp_path / "killed"
    with open_store() as store:
        store.save(T + 2, service.Change(b"{}"))
        shutil.copytree(data, killed, ignore=shutil.ignore_patterns("*-shm"))  # as a killed service leaves it
    for steps in range(20):
        shutil.rmtree(data)
        shutil.copytree(killed, data)
        command = [sys.executable, "-c", KILL_BEFORE_STEP, str(steps), str(module_copy), "restore", str(tmp_path / "b")]
        code = subprocess.run(command, env=clean_environment, timeout=PATIENCE).returncode
        with open_store() as store:
            found = [row.timestamp for row in store.sessions()]
        assert found in ([T + 2, T + 1, T], [T + 1, T])
        if code == 0:
            break
    assert (code, found, steps > 1) == (0, [T + 1, T], True)


def test_a_failed_restore_leaves_the_store_with_its_wal(contents, open_store, module_copy, tmp_path, monkeypatch):
    data, replace = module_copy.parent / "data", os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == data / "storyteller.sqlite3":
            raise PermissionError(13, "in use")
        replace(source, target)

    assert service.main(["backup", str(tmp_path / "b"), "--data-dir", str(data)]) == 0
    monkeypatch.setattr(os, "replace", refuse)
    with open_store() as store:
        store.save(T + 2, service.Change(b"{}"))
        before = {path.name for path in data.iterdir()}
        assert service.main(["restore", str(tmp_path / "b"), "--data-dir", str(data)]) == 2
        assert {path.name for path in data.iterdir()} - {"running"} == before - {"running"}
    assert sessions_in(data / "storyteller.sqlite3") == [T, T + 1, T + 2]


def test_a_restore_reads_a_copy_of_the_database_with_its_wal(run_module, open_store, module_copy, tmp_path):
    with open_store() as store:
        store.save(T, service.Change(b"{}"))
        for name in service.STORE_FILES[:2]:
            shutil.copy(module_copy.parent / "data" / name, tmp_path / name.replace("storyteller", "copy"))
    assert run_module("restore", "copy.sqlite3").returncode == 0
    assert sessions_in(module_copy.parent / "data" / "storyteller.sqlite3") == [T]


def write_changed(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Any]:
    return lambda good, path: path.write_bytes(change(good.read_bytes()))


def write_another_programs(good: Path, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE session (timestamp, expires)")
        database.execute("PRAGMA user_version = 1")


def write_newer_version(good: Path, path: Path) -> None:
    shutil.copy(good, path)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda good, path: None, id="missing"),
        pytest.param(lambda good, path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda good, path: path.write_bytes(b"garbage" * 1000), id="garbage"),
        pytest.param(lambda good, path: path.mkdir(), id="a folder"),
        pytest.param(write_changed(lambda data: data[: len(data) // 2]), id="half"),
        pytest.param(write_changed(lambda data: data[:4096] + bytes(len(data) - 4096)), id="zeros"),
        pytest.param(write_another_programs, id="another program's"),
        pytest.param(write_newer_version, id="a newer version's"),
    ],
)
def test_a_file_that_is_not_a_complete_store_is_not_restored(run_module, contents, module_copy, tmp_path, write):
    data = module_copy.parent / "data"
    write(data / "storyteller.sqlite3", tmp_path / "b")
    result = run_module("restore", str(tmp_path / "b"))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path / "b") in result.stderr
    assert sessions_in(data / "storyteller.sqlite3") == [T, T + 1]
    assert {path.name for path in data.iterdir()} <= {"running", "storyteller.sqlite3"}


def test_a_restore_warns_that_the_service_uses_redis(run_module, contents):
    run_module("backup", "b")
    result = run_module("restore", "b", REDIS_URL="redis://127.0.0.1:1/0")
    assert result.returncode == 0
    assert f"uses Redis, which this did not change: {service.START_SCRIPT} move copies" in result.stderr


def test_a_data_folder_that_a_command_uses_is_not_reported_as_in_use_by_an_earlier_service(
    start_service, run_module, settings, module_copy
):
    start_service().stop()
    run_module("backup", "b")
    data = module_copy.parent / "data"
    with contextlib.closing(service.own_data_dir(dataclasses.replace(settings, data_dir=data), "stop it")):
        result = run_module("restore", "b")
    assert result.returncode == 2
    assert "is in use by a service that is starting, or by `move` or `restore`: " in result.stderr


def test_a_restore_succeeds_without_a_previous_store(run_module, contents, module_copy):
    run_module("backup", "b")
    shutil.rmtree(module_copy.parent / "data")
    result = run_module("restore", "b")
    assert (result.returncode, "is kept" in result.stdout) == (0, False)
    assert sessions_in(module_copy.parent / "data" / "storyteller.sqlite3") == [T, T + 1]


# ---------------------------------------------------------------------------------------- token ----


def test_a_renewed_token_expires_later_and_keeps_its_permissions(start_service, run_module):
    running = start_service()
    token = run_module("token", "--subject", "storyart", "--permission", "gpu:read", "--ttl", "60s").stdout.strip()
    bearer = {"Authorization": f"Bearer {token}"}
    before = running.call("GET", "/api/v1/auth/session", headers=bearer)[1]["expiresAt"]
    result = run_module("token", "--renew", "storyart", "--ttl", "90d")
    assert (result.returncode, result.stdout.startswith("renewed: storyart, until 20")) == (0, True)
    wait_until(lambda: running.call("GET", "/api/v1/auth/session", headers=bearer)[1]["expiresAt"] > before)
    assert running.call("GET", "/api/v1/auth/session", headers=bearer)[1]["permissions"] == ["gpu:read"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--renew", "storyart"], 2, "--renew needs a --ttl"), (["--renew", "a", "--ttl", "90d"], 1, "a has no token."),
     (["--renew", "a", "--ttl", "90d", "--permission", "gpu:read"], 2, "--permission are only for a new token"),
     (["--list", "--subject", "a"], 2, "--subject and"), (["--revoke", "a", "--ttl", "90d"], 2, "also for --renew"),
     (["--list", "--revoke", "a"], 2, "one of --list, --renew and --revoke")],
)  # fmt: skip
def test_token_refuses_arguments_that_do_not_go_together(run_module, arguments, code, words):
    result = run_module("token", *arguments)
    assert (result.returncode, result.stdout, words in result.stderr) == (code, "", True)


@pytest.mark.slow
def test_a_running_service_soon_notices_tokens_that_end(start_service, run_module):
    start_service()
    wait_until(lambda: "none ends within 3 days" in run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout)
    run_module("token", "--subject", "storyart", "--permission", "gpu:read")
    wait_until(lambda: "end soon: storyart" in run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout)


def test_a_renewal_changes_the_expiry_in_the_store(store, clock):
    service.issue_token(store, "storyart", ["gpu:read"], 60, clock.now)
    (caller,) = service.session_tokens(store)
    service.keep_caller(store, caller, 3600, clock.now)
    clock.now += 600_000
    (found,) = service.session_tokens(store)
    assert (found.subject, found.expires) == ("storyart", clock.now + 3_000_000)


def test_a_token_that_is_revoked_during_its_renewal_stays_revoked(store, clock):
    service.issue_token(store, "storyart", ["gpu:read"], 60, clock.now)
    (caller,) = service.session_tokens(store)
    store.revoke_token(caller.digest)
    with pytest.raises(service.NotFound):
        service.keep_caller(store, caller, 60, clock.now, renews=True)
    assert store.tokens() == []


def test_the_tokens_that_end_within_3_days_are_listed_by_subject_with_the_first_end(store, clock):
    day = 86_400
    for subject, ttl in (("b", 2 * day), ("a", day), ("a", 2 * day), ("a", 90 * day), ("c", 4 * day)):
        service.issue_token(store, subject, ["gpu:read"], ttl, clock.now)
    ends = [service.iso_time(int(clock.now) + days * day * 1000) for days in (1, 2)]
    assert service.ending_tokens(store, clock.now) == f"a ({ends[0]}), b ({ends[1]})"
    assert service.ending_tokens(store, clock.now - 5 * day * 1000) == ""


def test_a_start_check_and_status_warn_of_a_token_that_ends_soon(start_service, run_module):
    run_module("token", "--subject", "storyart", "--permission", "gpu:read", "--ttl", "2d")
    result = run_module("check")
    assert (read_check(result)["tokens"], result.returncode) == ("WARN", 0)
    running = start_service()
    for printed in (lambda: running.printed, lambda: run_module("status", STORYTELLER_API_TOKEN=TOKEN).stdout):
        wait_until(lambda printed=printed: re.search(r"end soon: storyart \(20", printed()))
    assert f"{service.START_SCRIPT} token --renew NAME --ttl 90d" in running.printed


def test_the_log_warns_once_a_day_of_tokens_that_end_soon(make_services, sqlite_store, caplog, monkeypatch):
    services = make_services(sqlite_store)
    service.issue_token(sqlite_store, "storyart", ["gpu:read"], 3600, service.now_ms())
    times = Clock(time.perf_counter())
    monkeypatch.setattr(service.time, "perf_counter", times)
    for _ in range(50):  # two days and an hour
        services._check_tokens()
        service.issue_token(sqlite_store, "storyart", ["gpu:read"], 3600, service.now_ms())
        times.now += 3600
    assert caplog.text.count("tokens end soon: storyart") == 3


def test_a_token_from_the_command_line_is_valid_at_a_running_service_until_it_is_revoked(start_service, run_module):
    running = start_service()
    issued = run_module("token", "--subject", "storyswarm", "--permission", "notifications:read", "--ttl", "30d")
    (token,) = issued.stdout.split()
    bearer = {"Authorization": f"Bearer {token}"}
    assert running.call("GET", "/api/v1/notifications/check", headers=bearer)[0] == 200
    assert running.call("GET", "/api/v1/gpu/status", headers=bearer)[0] == 403
    listed = run_module("token", "--list").stdout
    assert "storyswarm" in listed
    assert "notifications:read" in listed
    assert token not in listed
    assert "storyswarm" in run_module("token", "--revoke", "storyswarm").stdout
    assert run_module("token", "--list").stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["--subject", "a"], ["--permission", "gpu:read"], ["--subject", "a b", "--permission", "gpu:read"],
     ["--subject", "a", "--permission", "root"], ["--subject", "a", "--permission", "gpu:read", "--ttl", "59s"],
     ["--subject", "a", "--permission", "gpu:read", "--ttl", "367d"]],
)  # fmt: skip
def test_an_invalid_request_for_a_token_is_refused_with_exit_code_2(run_module, arguments):
    result = run_module("token", *arguments)
    assert (result.returncode, result.stdout, bool(result.stderr)) == (2, "", True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("90s", 90), ("45m", 2700), ("12h", 43200), ("366d", 31622400)]
)
def test_a_ttl_is_read_in_its_unit(text, seconds):
    assert service.read_ttl(text) == seconds


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"swarmui_allow_origin": "*"}, "every page"),
        ({"trusted_origins": ("http://localhost:3000", "http://localhost:4000")}, "SWARMUI_ALLOW_ORIGIN"),
        ({}, None),
        ({"trusted_origins": ("http://localhost:3000",), "swarmui_allow_origin": "http://localhost:3000"}, None),
    ],
)
def test_check_warns_if_too_few_or_too_many_pages_may_use_swarmui(settings, changed, words):
    found = service.check_storyart(dataclasses.replace(settings, **changed))
    warnings = [text for _, subject, text in found if subject == "SwarmUI's pages"]
    assert (words in warnings[0]) if words else warnings == []


# ======================================================================================================
# The page; .ci/test_page.py tests it in a browser
# ======================================================================================================


def test_the_page_needs_no_token_and_may_load_only_its_own_script_and_style(make_app):
    response = as_caller(make_app(), None).get("/")
    assert response.content_type == "text/html"
    assert response.headers["Cache-Control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        **dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'"),
        "connect-src": "'self'",
        "img-src": "data:",
    }
    assert len(response.body) <= 60_000


def test_the_pages_token_has_every_permission_except_admin_and_needs_no_store(authenticator, settings, store_away):
    store_away()
    token = service.page_token(settings.api_token)
    caller = authenticator.known({"HTTP_AUTHORIZATION": f"Bearer {token}"})
    assert set(service.PERMISSIONS) - set(caller.permissions) == {"admin"}
    assert service.page_token("another-api-token") != token
    assert settings.api_token not in token


def page_token_of(link: str) -> str:
    return re.fullmatch(r"http://localhost:[0-9]+/#token=([0-9a-f]{64})", link)[1]


def test_the_command_page_prints_the_link_of_the_running_service(start_service, run_module):
    settings = {"STORYTELLER_API_TOKEN": TOKEN}
    stopped = run_module("page", **settings)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    assert stopped.stderr.startswith("STORYTELLER_PORT is 0")
    assert run_module("page", "--port", "5", **settings).stdout.startswith("http://localhost:5/#token=")
    running = start_service()
    (link,) = run_module("page", **settings).stdout.splitlines()
    assert link.startswith(f"http://localhost:{running.port}/#")
    bearer = {"Authorization": f"Bearer {page_token_of(link)}"}
    assert running.call("GET", "/api/v1/auth/session", headers=bearer)[1]["subject"] == "page"
    assert running.call("POST", "/api/v1/auth/session", {}, headers=bearer)[0] == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_that_means_all_addresses_has_a_link_for_each_address(host):
    first, *others = service.page_links(host, 5, TOKEN)
    assert page_token_of(first) == service.page_token(TOKEN)
    hosts = [urllib.parse.urlsplit(link).hostname for link in others]
    assert [name for name in hosts if service.is_loopback(name) or name in ("0.0.0.0", "::")] == []


@pytest.mark.skipif(service.WINDOWS, reason="needs a pseudo-terminal")
def test_a_start_in_a_terminal_prints_the_pages_link_but_does_not_log_it(module_copy, clean_environment):
    ours, theirs = os.openpty()
    environment = {**clean_environment, "STORYTELLER_API_TOKEN": TOKEN, "STORYTELLER_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, str(module_copy)], env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    printed = ""
    try:
        while "  log " not in printed:
            printed += os.read(ours, 4096).decode()
    finally:
        process.terminate()
        process.wait(PATIENCE)
        os.close(ours)
    (link,) = re.findall("http://localhost:[0-9]+/.*", printed)
    assert page_token_of(link.strip()) == service.page_token(TOKEN)
    log = (module_copy.parent / "data" / "storyteller.log").read_text("utf-8")
    assert "server: address http://localhost:" in log
    assert "token=" not in log


# ======================================================================================================
# README
# ======================================================================================================


@functools.cache
def readme() -> str:
    return (HERE / "README.md").read_text("utf-8")


def section(heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    (text,) = re.findall(rf"(?ms)^{heading}\n(.*?)(?=^##{'#?' * heading.startswith('###')} |\Z)", readme())
    return text


def code_in(text: str, language: str) -> str:
    """All fenced blocks of one language, one after another."""
    return "\n".join(re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", text))


def table_in(text: str) -> list[list[str]]:
    """The cells of the rows of its tables, without the headers."""
    rows = re.findall(r"(?m)^\| (.*) \|$", text.replace("| |", "|  |"))
    return [[cell.strip() for cell in row.split(" | ")] for row in rows if "---" not in row]


def endpoints_in_readme() -> dict[tuple[str, str], tuple[str, set[int]]]:
    """Permission and statuses by method and path."""
    found = {}
    for method, path, permission, statuses, _ in (row for row in table_in(section("## Use the API")) if len(row) == 5):
        if method:
            whole = path.strip("`") if permission == "none" or "metrics" in path else "/api/v1" + path.strip("`")
            found[method.strip("`"), whole] = permission.strip("`"), set(map(int, statuses.split(", ")))
    return found


def test_readme_has_each_endpoint_with_its_permission_and_statuses():
    found = endpoints_in_readme()
    assert found.keys() == {(route.method, route.template) for route in service.ROUTES}
    for route in service.ROUTES:
        permission, statuses = found[route.method, route.template]
        assert permission == ("none" if route.permission == "open" else route.permission), route.template
        assert {*route.responses, *route.errors} <= statuses, route.template
        assert statuses <= {*route.responses, *service.error_statuses(route)}, route.template


# curl, as far as README's examples use it, for Windows without curl.
CURL = """
import argparse, urllib.error, urllib.request
parser = argparse.ArgumentParser()
for name in ("-X", "-d", "-w", "-m", "-o"):
    parser.add_argument(name)
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-sS", action="store_true")
parser.add_argument("-N", action="store_true")
parser.add_argument("url")
arguments = parser.parse_args()
data = arguments.d.encode() if arguments.d else None
headers = dict(header.split(": ", 1) for header in arguments.H)
request = urllib.request.Request(arguments.url, data, headers, method=arguments.X)
try:
    response = urllib.request.urlopen(request, timeout=30)
except urllib.error.HTTPError as error:
    response = error
sys.stdout.buffer.write(response.readline() if arguments.m else response.read() if not arguments.o else b"")
print()
"""


def find_powershell() -> list[str] | None:
    """The start of a command line of PowerShell, if there is one that works (Wine's does nothing)."""
    for name in filter(None, map(shutil.which, ("pwsh", "powershell"))):
        options = ["-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass"]
        if subprocess.run([name, *options, "-Command", "exit 7"], timeout=PATIENCE).returncode == 7:
            return [name, *options]
    return None


def run_example(language: str, code: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run an example of README as a person would, in the service's folder."""
    if language == "sh" and not service.WINDOWS and shutil.which("curl"):
        command = ["sh", "-uc", code]
    elif language == "bat" and service.WINDOWS:
        if not shutil.which("curl"):
            write_program(folder / "curl", CURL, {})
        lines = re.sub("%(~?)i", r"%%\1i", code)  # at the prompt, the variable of a loop has one % less
        (folder / "example.bat").write_text(f"@echo off\n{lines}")
        command = ["cmd", "/d", "/c", "example.bat"]
    elif language == "python":
        command = [sys.executable, "-I", "-c", code]
    elif language == "js" and (node := shutil.which("node")):
        command = [node, "--input-type=module", "--eval", code]
    elif language == "powershell" and (start := find_powershell()):
        (folder / "example.ps1").write_text(code, "utf-8-sig")
        command = [*start, "-File", "example.ps1"]
    else:
        pytest.skip(f"nothing here runs {language}")
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=20 * PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["sh", "bat", "powershell", "python", "js"])
@pytest.mark.parametrize("place", ["an empty store", "a studio's Redis"])
def test_the_example_of_each_language_calls_every_endpoint(
    place, language, request, start_service, settings, swarmui_folder, nvidia_smi, module_copy
):
    """And leaves nothing behind. The service's own log shows the requests and the statuses."""
    is_studio = place != "an empty store"
    running = start_service(
        STORYTELLER_LOG_LEVEL="debug",
        NVIDIA_SMI=nvidia_smi(GOOD, {"print": ""}),
        SWARMUI_PATH=str(swarmui_folder()),
        SWARMUI_API_URL=settings.swarmui_api_url,
        REDIS_URL=request.getfixturevalue("redis_url") if is_studio else "",
    )
    data = module_copy.parent / "data"
    (data / "api_token").write_text(f"{TOKEN}\n")
    if is_studio:  # it announces that its beats are ready
        saved = episode({}, timestamp=T, promptMode="storyswarm")
        assert running.call("POST", "/api/v1/session/save", saved)[0] == 200

    def read_contents() -> Any:
        paths = ("session/list", "notifications/check?type=all", "gpu/reservation")
        return [running.call("GET", f"/api/v1/{path}")[1] for path in paths]

    before, log = read_contents(), data / "storyteller.log"
    assert len(before[1]["notifications"]) == is_studio
    begin = log.stat().st_size
    code = code_in(section("## Use the API"), language)
    assert code.count("http://localhost:8000") == 1
    result = run_example(language, code.replace("localhost:8000", f"localhost:{running.port}"), module_copy.parent)
    logged = log.read_bytes()[begin:].decode()
    assert read_contents() == before

    templates = sorted({route.template for route in service.ROUTES}, key=lambda template: template.count("{"))
    got: dict[tuple[str, str], list[int]] = {}
    for method, path, status in re.findall(r" http: (\w+) (\S+) (\d+) ", logged):
        template = next(known for known in templates if re.fullmatch(re.sub("{.*?}", "[^/]+", known), path))
        got.setdefault((method, template), []).append(int(status))
    documented = {key: statuses for key, (_, statuses) in endpoints_in_readme().items()}
    assert got.keys() == documented.keys(), result
    assert {key: statuses for key, statuses in got.items() if not set(statuses) <= documented[key]} == {}
    failed = [key for key, statuses in got.items() if max(statuses) >= 400]
    assert failed == [("DELETE", "/api/v1/gpu/reservation")]  # which has already ended


@pytest.mark.parametrize("heading", ["### StorySwarm", "## Security", "### Back up, restore, move to Redis"])
def test_the_commands_of_a_section_of_readme_succeed_one_after_another(
    heading, module_copy, clean_environment, redis_url, monkeypatch
):
    for name in os.environ.keys() - clean_environment.keys():
        monkeypatch.delenv(name)
    (module_copy.parent / "data").mkdir()
    service.SqliteStore(module_copy.parent / "data" / "storyteller.sqlite3").close()
    monkeypatch.setenv("RUN", sys.executable)  # by a variable, because cmd reads a .bat in its code page
    is_bat, module = service.WINDOWS, module_copy.name
    script = f'@"%RUN%" {module} %*\n' if is_bat else f'#!/bin/sh\nexec "$RUN" {module} "$@"\n'
    path = module_copy.with_name("run.bat" if is_bat else "run.sh")
    path.write_text(script)
    path.chmod(0o755)
    code = code_in(section(heading), "sh").replace("redis://127.0.0.1:6379/0", redis_url)
    code = code.replace("./run.sh", "call run.bat" if is_bat else "./run.sh")
    code = "".join(f"{line} || exit 1\n" for line in code.splitlines())
    result = run_example("bat" if is_bat else "sh", code, path.parent)
    assert result.returncode == 0, result


def test_powershell_parses_every_example(tmp_path):
    start = find_powershell() or pytest.skip("there is no PowerShell here")
    (tmp_path / "examples.ps1").write_text(code_in(readme(), "powershell"), "utf-8-sig")
    parse = "[Management.Automation.Language.Parser]::ParseFile('examples.ps1', [ref]$null, [ref]$errors)"
    command = [*start, "-Command", f"$errors = $null; $null = {parse}; $errors; exit $errors.Count"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout


def test_readme_shows_what_a_start_prints(start_service):
    def names(lines: list[str]) -> list[str]:
        return [lines[0], *(line[:12] for line in lines[1:])]

    (shown,) = re.findall(r"(?ms)Then you see:\n\n```\n(.*?)^```$", readme())
    assert names(shown.splitlines()) == names(start_service().printed.splitlines())


def test_readme_names_only_commands_that_exist():
    names = set(re.findall(r"(?:\./run\.sh|`run\.bat) ([a-z]+)", readme()))
    assert {"status", "token"} <= names <= {*service.COMMANDS, "test"}


def test_readme_has_each_setting_with_its_default():
    origins = "localhost and 127.0.0.1, ports 3000 and 5173, http"
    words = {True: "on", False: "off", (): "none", service.STORYART_ORIGINS: origins}
    found = {}
    for _, names, default, _ in (row for row in table_in(section("## Settings")) if len(row) == 4):
        for name in re.findall(r"`([A-Z_]+)`", names):
            assert name not in found
            found[name] = default.replace("`", "")
    settings = {row.metadata["name"]: row.default for row in dataclasses.fields(service.Settings)}
    assert found.keys() == settings.keys()
    for name, default in settings.items():
        if default is None or name == "STORYTELLER_DATA_DIR":  # in words
            continue
        text = f"{default:g}" if isinstance(default, float) else words.get(default, str(default))
        assert text in found[name].split(", ") or text == found[name], name


def anchors_of(text: str) -> set[str]:
    """The anchors of its headings on GitHub."""
    headings = re.findall(r"(?m)^##+ (.*)", re.sub(r"(?ms)^ *```.*?^ *```$", "", text))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", ".ci/README.md"])
def test_each_link_has_a_target(name):
    text = (HERE / name).read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert links
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = (HERE / name).parent / path if path else HERE / name
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text("utf-8")), link


def test_readme_is_short():
    """Not counting its examples: folded parts and blocks of code."""
    text = re.sub(r"(?s)<details>.*?</details>\n", "", readme())
    assert len(re.sub(r"(?ms)^ *```.*?^ *```\n", "", text).splitlines()) <= 360

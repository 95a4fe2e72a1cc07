#!/usr/bin/env python3
"""Measures the service beside what most people would have written for the same routes, the peer (peer.py).

    .venv/bin/python -I .ci/bench.py                 every row; about 14 minutes on 2 cores
    .venv/bin/python -I .ci/bench.py --quick         the short rows, once each, under a minute; no target counts
    .venv/bin/python -I .ci/bench.py --only check    the rows whose name matches

Run it by the Python of .venv, as users start the service. Prints a table in Markdown; exit code 1 when a target is
missed by more than a tenth, 2 when something could not be measured. Rates are those of 4 connections where a row names
no other number. Linux only: wrk, strace and redis-server come from Debian, the peer's packages go into a venv of their
own in the cache folder.

Sections: loads; servers; measures; the rows, one table; the report.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import http.client
import itertools
import json
import multiprocessing
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import redis  # noqa: E402

import test_storyteller_automation as tests  # noqa: E402

API = "/api/v1"
STORES, ALONE = ("Redis", "embedded"), "Redis without the bridge"

if not sys.platform.startswith("linux"):
    sys.exit("This bench needs what only Linux has (/proc, wrk, strace): run it on Linux.")


class BenchError(Exception):
    """Something could not be measured: one sentence."""


# ======================================================================================================
# Loads
# ======================================================================================================

Request = tuple[str, str, bytes | None]  # method, path, body

STAMP = 1_738_195_200_000  # the timestamp of the first session


def session_text(timestamp: int = STAMP, size: int = 850_000, beats: int = 249, prompts: int | None = None) -> bytes:
    """A session in the shape of a real episode, as a client sends it. By default half of its prompts are missing."""
    prompts = beats // 2 if prompts is None else prompts
    document = {"timestamp": timestamp, **tests.make_session(beats=beats, prompts=prompts, size=size)}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


NEW_NOTIFICATION = '{"type":"prompts_ready","storyUuid":"u","episodeNumber":2,"totalPrompts":48,"sessionTimestamp":%d}'


@dataclass(frozen=True)
class Load:
    """What wrk sends: GETs of `path`, or the requests of a Lua script, of which `body` is that of one POST."""

    path: str
    lua: str = ""
    body: bytes | None = None

    @property
    def sample(self) -> Request:
        return "POST" if self.body else "GET", self.path, self.body


GPU_STATUS = Load(f"{API}/gpu/status")
CHECK = Load(f"{API}/notifications/check")
PROMPTS_STATUS = Load(f"{API}/session/{STAMP}/prompts-status")
SESSION = Load(f"{API}/session/{STAMP}")
SAVE_STRINGS: Request = ("PUT", f"{API}/session/{STAMP}", session_text())
SAVE: Request = ("POST", f"{API}/session/save", session_text(prompts=0))
LIST_20 = Load(f"{API}/session/list?limit=20")

# `number` grows by a million from run to run, so that no run repeats what another one made.
_LUA_NUMBER = """
local number
function init(args)
  wrk.headers["Content-Type"] = "application/json"
  number = tonumber(args[1])
end
"""

# Each notification is acknowledged by the request after its creation, so few are pending at any moment.
_LUA_WRITE = f"""
local ids = {{}}
function response(status, headers, body)
  local id = status == 201 and string.match(body, '"id":"([^"]+)"')
  if id then table.insert(ids, id) end
end
function request()
  local id = table.remove(ids)
  if id then return wrk.format("POST", "{API}/notifications/" .. id .. "/ack") end
  number = number + 1
  return wrk.format("POST", nil, nil, string.format('{NEW_NOTIFICATION}', number))
end
"""
CREATE_AND_ACKNOWLEDGE = Load(f"{API}/notifications", _LUA_NUMBER + _LUA_WRITE, (NEW_NOTIFICATION % STAMP).encode())


def save_load(text: bytes) -> Load:
    """Saves of a session whose scriptText differs each time."""
    head, _, tail = text.decode().partition('"scriptText":"')
    lua = f"""
local head, tail = [==[{head}"scriptText":"]==], [==[{tail}]==]
function request()
  number = number + 1
  return wrk.format("POST", nil, nil, head .. string.format("%015d", number) .. tail)
end
"""
    return Load(f"{API}/session/save", _LUA_NUMBER + lua, text)


# ======================================================================================================
# Servers
# ======================================================================================================


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


PEER_PACKAGES = """
annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 click==8.5.1 fastapi==0.165.0 h11==0.16.0
hiredis==3.5.0 httptools==0.9.0 idna==3.20 opentelemetry-api==1.45.2 pydantic==2.14.4 pydantic_core==2.50.5
python-dotenv==1.2.4 PyYAML==6.0.4 redis==8.1.0 starlette==1.10.0 typing-inspection==0.4.5
typing_extensions==4.16.0 uvicorn==0.54.0 uvloop==0.23.0 watchfiles==1.3.0 websockets==17.4
"""


def peer_python() -> Path:
    """The Python of the peer's venv, which is made again when the pinned versions change."""
    folder = cache_folder() / "storyteller-bench"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{PEER_PACKAGES}{sys.version}\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        say("setting up the peer's venv")
        venv.create(folder, clear=True, with_pip=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, *PEER_PACKAGES.split()], check=True)
        stamp.write_text(wanted)
    return python


def need_program(name: str) -> None:
    """Install Debian's package of this name if the program is missing and we may."""
    if shutil.which(name):
        return
    if os.getuid() or not shutil.which("apt-get"):
        raise BenchError(f"{name} is missing: install it (on Debian and Ubuntu: sudo apt install {name}).")
    say(f"installing Debian's {name}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", name]):
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", *command]
        subprocess.run(apt, env=environment, stdout=subprocess.DEVNULL, check=True)


class Client(http.client.HTTPConnection):
    """One persistent connection."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=60)

    def begin(self, method: str, path: str, body: bytes | None = None) -> None:
        self.request(method, path, body, {"Content-Type": "application/json", **tests.BEARER})

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON."""
        self.begin(method, path, body)
        response = self.getresponse()
        return response.status, json.loads(response.read() or b"null")

    def ask(self, method: str, path: str, body: bytes | None = None, *, status: str = "2") -> Any:
        """The JSON of a response whose status begins with `status`."""
        found, value = self.call(method, path, body)
        if not str(found).startswith(status):
            raise BenchError(f"{method} {path} was answered {found}: {str(value)[:300]}")
        return value

    def is_readable(self) -> bool:
        """Whether a response, or the end of the connection, has arrived."""
        return bool(select.select([self.sock], [], [], 0)[0])


class Server(contextlib.AbstractContextManager["Server"]):
    """A process that listens on a port of 127.0.0.1, from its first 200 until close()."""

    def __init__(self, name: str, command: Sequence[Any], environment: dict[str, str], folder: Path, port: int) -> None:
        self.name = name
        self.port = port
        self._output = folder / f"{name}-{port}.txt"
        deadline = time.monotonic() + 30
        with open(self._output, "wb") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            command = [str(part) for part in command]
            self._process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **streams)
        self._proc = Path(f"/proc/{self._process.pid}")
        try:
            while not self._is_healthy():
                if self.has_ended() or time.monotonic() > deadline:
                    raise BenchError(f"{name} did not start: {self.output()}")
                time.sleep(0.002)
        except BaseException:
            self.close()
            raise

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/health")[0] == 200
        return False

    def call(self, *request: Any) -> tuple[int, Any]:
        """Status and JSON of one request, over a connection of its own."""
        with self.client() as client:
            return client.call(*request)

    def client(self) -> contextlib.closing[Client]:
        return contextlib.closing(Client(self.port))

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def output(self) -> str:
        """The end of what it printed."""
        return self._output.read_text(errors="replace")[-2000:]

    def status(self, field: str) -> int:
        """A number of /proc/PID/status; sizes are in KB."""
        return int(re.search(rf"{field}:\s+([0-9]+)", (self._proc / "status").read_text())[1])

    def megabytes(self) -> float:
        return self.status("VmRSS") / 1000

    def reset_peak_memory(self) -> None:
        (self._proc / "clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it and its children."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(10)
                return

    def __exit__(self, *_: object) -> None:
        self.close()


class Bench:
    """The servers and stores of one run of this program, started when they are first needed."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._stack = stack
        self._shared: dict[str, Server] = {}
        self._runs = itertools.count(1)
        # A copy in a folder of its own, so that no .env of this machine is read, started as run.sh does.
        shutil.copy(ROOT / "storyteller_automation.py", folder)
        begin = re.search(r'-c "(import.*)" "\$here"', (ROOT / "run.sh").read_text())[1]
        self.command = [sys.executable, "-I", "-X", f"pycache_prefix={folder / 'bytecode'}", "-c", begin, folder]
        subprocess.run([*self.command, "--help"], check=True, stdout=subprocess.DEVNULL)  # which keeps the bytecode
        ours = {field.metadata["name"] for field in fields(tests.service.Settings)}
        self._environment = {name: value for name, value in os.environ.items() if name not in ours}
        nvidia_smi = self.write_nvidia_smi("nvidia-smi")
        self._environment |= {"STORYTELLER_API_TOKEN": tests.TOKEN, "NVIDIA_SMI": str(nvidia_smi)}
        self.redis = tests.OwnRedis(folder, ["--save", ""])
        stack.callback(self.redis.kill)

    def write_nvidia_smi(self, name: str, seconds: float = 0) -> Path:
        """The stand-in of the tests, which takes `seconds`."""
        plan = {"gpus": tests.GOOD, "processes": {"print": "41\n"}, "runs": str(self.folder / "runs")}
        return tests.write_program(self.folder / name, f"import time; time.sleep({seconds})\n{tests.NVIDIA_SMI}", plan)

    def start(
        self, store: str = "Redis", database: int = 0, data: Path | None = None, command: Any = (), **settings: str
    ) -> Server:
        """A new service, started as users start it. `store`: Redis, ALONE or embedded; `data`: its folder; `command`:
        what starts it instead, or the peer."""
        port = tests.free_port()
        environment = {**self._environment, "STORYTELLER_PORT": str(port), "UVICORN_PORT": str(port)}
        environment["STORYTELLER_DATA_DIR"] = str(data or self.folder / f"data-{port}")
        environment["SWARMUI_API_URL"] = f"http://localhost:{tests.free_port()}"
        if store.startswith("Redis"):
            environment |= {
                "REDIS_URL": self.redis_url(database),
                "STORYTELLER_BRIDGE": ("off", "on")[store == "Redis"],
            }
        command = command or self.command
        name = "peer" if "uvicorn" in command else "service"
        return Server(name, command, {**environment, **settings}, self.folder, port)

    def _share(self, name: str, **options: Any) -> Server:
        """One server for several rows; its GPU status is cached throughout. If it ended, it failed a row, and must not
        fail the next one."""
        if name not in self._shared or self._shared[name].has_ended():
            self._shared[name] = self.start(GPU_CACHE_SECONDS="86400", **options)
            self._stack.callback(self._shared[name].close)
        return self._shared[name]

    def service(self, store: str = "Redis") -> Server:
        """For rows that leave nothing behind."""
        return self._share(store, store=store)

    def peer(self) -> Server:
        shutil.copy(ROOT / ".ci" / "peer.py", self.folder)
        # Without a line for each request: the service logs no polls either.
        options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
        return self._share("peer", command=[peer_python(), "-m", "uvicorn", "peer:app", *options])

    def redis_url(self, database: int = 0) -> str:
        return f"redis://127.0.0.1:{self.redis.port}/{database}"

    def flush(self) -> None:
        """Empty database 0, which most rows use."""
        self.redis.tell("FLUSHDB")

    def wrk(self, server: Server, load: Load, connections: int = 4) -> float:
        """Requests a second, during one second. A closed loop: each connection asks again once it is answered. A wrong
        status or a broken connection is an error."""
        script = self.folder / "load.lua"
        script.write_text(load.lua)
        command = ["wrk", "-t1", f"-c{connections}", "-d1s", "--timeout", "20s", "-s", str(script)]
        command += ["-H", f"Authorization: Bearer {tests.TOKEN}", f"http://127.0.0.1:{server.port}{load.path}"]
        command += ["--", str(next(self._runs) * 1_000_000)]
        done = subprocess.run(command, capture_output=True, text=True)
        wrong = re.search(r"Socket errors.*|Non-2xx.*", done.stdout)
        rate = re.search(r"Requests/sec:\s+([0-9.]*[1-9][0-9.]*)", done.stdout)
        if wrong or not rate:
            ended = f"; it ended: {server.output()}" if server.has_ended() else ""
            reason = wrong[0].strip() if wrong else f"{done.stdout[-300:]}{done.stderr[-300:]}"
            raise BenchError(f"{load.path} of {server.name} fails under load: {reason}{ended}")
        return float(rate[1])


# ======================================================================================================
# Measures
# ======================================================================================================


class Race(NamedTuple):
    """Rates of the service and of what stands beside it, and the ratio that the target is about."""

    ours: float
    other: float
    ratio: float


def race(bench: Bench, ours: Callable[[], float], other: Callable[[], float]) -> Race:
    """Both in turn (A B B A, five rounds), and the median of the rounds' ratios."""
    rounds = []
    for _ in range(1 if bench.quick else 6):
        mine, theirs = ours(), other()
        if not bench.quick:
            theirs, mine = (theirs + other()) / 2, (mine + ours()) / 2
        rounds.append((mine, theirs, mine / theirs))
    return Race(*(statistics.median(column) for column in zip(*rounds[-5:])))  # the first of six is the warm-up


def race_loads(bench: Bench, ours: Server, other: Server, load: Load, connections: int = 4) -> Race:
    return race(bench, lambda: bench.wrk(ours, load, connections), lambda: bench.wrk(other, load, connections))


def ask_when_due(port: int, path: str, rate: float, seconds: float, connections: int) -> list[float]:
    """Milliseconds from the moment at which each GET was due to its whole response. An open loop: the requests are due
    at a fixed rate, whatever became of those before."""
    clients = [Client(port) for _ in range(connections)]
    begin = time.perf_counter() + 0.1

    def ask(number: int) -> list[float]:
        took = []
        with contextlib.closing(clients[number]) as client:
            for turn in range(number, int(rate * seconds), connections):
                due = begin + turn / rate
                time.sleep(max(0.0, due - time.perf_counter()))
                client.ask("GET", path)
                took.append((time.perf_counter() - due) * 1000)
        return took[1:]  # without the one that opened the connection

    with concurrent.futures.ThreadPoolExecutor(connections) as threads:
        return [one for took in threads.map(ask, range(connections)) for one in took]


def p99_of_checks(service: Server, rate: float) -> float:
    """Milliseconds; the median of three runs of 5 s on 16 connections, in a process that nothing here delays."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        runs = [process.submit(ask_when_due, service.port, CHECK.path, rate, 5, 16).result() for _ in range(3)]
    return statistics.median(sorted(one)[int(len(one) * 0.99)] for one in runs)


@contextlib.contextmanager
def meanwhile(server: Server, *requests: Request, status: str = "2", clients: int = 1) -> Iterator[None]:
    """Each client sends these requests again and again, without a pause."""
    done = threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not done.is_set():
                for request in requests:
                    client.ask(*request, status=status)

    with concurrent.futures.ThreadPoolExecutor(clients) as threads:
        asked = [threads.submit(ask) for _ in range(clients)]
        try:
            yield
        finally:
            done.set()
    for one in asked:
        one.result()


def beside_peer(
    bench: Bench, connections: int, load: Load, store: str = "Redis", prepare: Callable[[Server], None] | None = None
) -> Race:
    """The same load on both, once `prepare` has filled an empty store and both answer alike."""
    bench.flush()
    ours, peer = bench.service(store), bench.peer()
    if prepare:
        prepare(ours)
    answers = []
    for server in (ours, peer):
        status, value = server.call(*load.sample)
        if status == 201:  # each chooses the id and the time by itself
            server.call("POST", f"{API}/notifications/{value.pop('id')}/ack")
            value.pop("timestamp")
        answers.append((status, value))
    if answers[0] != answers[1]:
        raise BenchError(f"{load.path} is answered differently: {' and '.join(str(one)[:500] for one in answers)}")
    return race_loads(bench, ours, peer, load, connections)


def create_100(service: Server) -> None:
    with service.client() as client:
        for number in range(100):
            client.ask("POST", f"{API}/notifications", (NEW_NOTIFICATION % (STAMP + number)).encode())


def save_sessions(service: Server, count: int = 1, first: int = STAMP, **shape: int) -> None:
    with service.client() as client:
        for timestamp in range(first, first + count):
            client.ask("PUT", f"{API}/session/{timestamp}", session_text(timestamp, **shape))


def fill_queue(bench: Bench, store: str, count: int) -> Server:
    """A service with so many pending notifications of the type that a check asks for."""
    data, database = bench.folder / f"queue-{store}-{count}", 1 if count > 1000 else 2
    data.mkdir(exist_ok=True)
    if store == "Redis":
        filled = tests.service.RedisStore(bench.redis_url(database))
    else:
        filled = tests.service.SqliteStore(data / "storyteller.sqlite3")
    with contextlib.closing(filled):
        for first in range(0, count, 1000):
            filled.add([tests.draft(session=STAMP + number) for number in range(first, min(first + 1000, count))])
    return bench.start(store, database, data)


@cache
def queues(bench: Bench, store: str) -> tuple[Race, Race, float]:
    """Checks, and creations and acknowledgements, of 100,000 pending beside 100; the p99 of checks while one client
    acknowledges an id that nobody has, which is looked for in all of them."""
    with fill_queue(bench, store, 100_000) as many, fill_queue(bench, store, 100) as few:
        checks = race_loads(bench, many, few, CHECK)
        writes = race_loads(bench, many, few, CREATE_AND_ACKNOWLEDGE)
        with meanwhile(many, ("POST", f"{API}/notifications/nobody/ack", None), status="404"):
            return checks, writes, p99_of_checks(many, 100)


def rate(call: Callable[[], Any]) -> float:
    """Calls a second."""
    return 1 / statistics.median(timeit.repeat(call, number=1, repeat=10))


def beside_no_bridge(bench: Bench, request: Request) -> Race:
    """One client's calls that concern a session of 850 KB, beside those of a service whose bridge is off."""
    bench.flush()
    with contextlib.ExitStack() as stack:
        services = [bench.start("Redis"), bench.start(ALONE, 1)]
        clients = [stack.enter_context(stack.enter_context(service).client()) for service in services]
        for client in clients:
            client.ask(*SAVE_STRINGS)
        return race(bench, *(lambda client=client: rate(lambda: client.ask(*request)) for client in clients))


def beside_reading(bench: Bench, load: Load, count: int, size: int) -> Race:
    """GETs by one client of `count` unchanged sessions, beside reading and hashing their documents: the least that a
    response costs that is always fresh."""
    bench.flush()
    keys = [f"session:{STAMP + number}" for number in range(count)]

    def read() -> list[bytes]:
        return [hashlib.sha256(document).digest() for document in bench.redis.tell("MGET", *keys)]

    with bench.start() as service, service.client() as client:
        save_sessions(service, count, size=size)
        return race(bench, lambda: rate(lambda: client.ask(*load.sample)), lambda: rate(read))


def list_memory(bench: Bench, store: str) -> float:
    """MB more at most, while the service lists 200 sessions of 850 KB for the first time."""
    bench.flush()
    data = bench.folder / f"list-{store}"
    with bench.start(store, data=data) as service:
        save_sessions(service, 200)
    with bench.start(store, data=data) as service, service.client() as client:
        client.ask("GET", CHECK.path)
        before = service.megabytes()
        service.reset_peak_memory()
        if client.ask("GET", f"{API}/session/list?limit=200")["count"] != 200:
            raise BenchError("the list does not hold the 200 sessions")
        return service.status("VmHWM") / 1000 - before


def shared_fsync(bench: Bench) -> Race:
    """16 writers beside one, while each fsync takes 10 ms more: strace delays it in the service, and stops nothing
    else (seccomp-bpf)."""
    need_program("strace")
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]
    command += ["-e", "inject=fsync,fdatasync:delay_enter=10000"]
    with bench.start("embedded", command=[*command, *bench.command]) as service:
        found = race(bench, *(lambda many=many: bench.wrk(service, CREATE_AND_ACKNOWLEDGE, many) for many in (16, 1)))
    if found.other > 100:
        raise BenchError("strace delayed no fsync: one writer alone made more than 100 a second")
    return found


def latency(bench: Bench, store: str, busy: bool = False) -> float:
    """The p99 of checks at 200 a second; `busy`: beside one client that lists 20 sessions of 850 KB and saves one of
    10 MB, in turn."""
    bench.flush()
    save = ("PUT", f"{API}/session/{STAMP + 99}", session_text(STAMP + 99, 10_000_000))
    with bench.start(store) as service:
        save_sessions(service, 20)
        with meanwhile(service, LIST_20.sample, save) if busy else contextlib.nullcontext():
            return p99_of_checks(service, 200)


def latency_beside_slow_gpu(bench: Bench) -> float:
    """The p99 of checks while 60 clients wait for an nvidia-smi that takes 3 s."""
    bench.flush()
    settings = {"NVIDIA_SMI": str(bench.write_nvidia_smi("slow-nvidia-smi", 3)), "GPU_CACHE_SECONDS": "0"}
    with bench.start(**settings) as service, meanwhile(service, GPU_STATUS.sample, clients=60):
        return p99_of_checks(service, 100)


def beside_idle(bench: Bench) -> Race:
    """Checks of a service with 400 idle connections, beside those of one without."""
    bench.flush()
    with bench.start() as service, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in range(400)]
        for client in clients:
            client.ask("GET", GPU_STATUS.path)
        found = race_loads(bench, service, bench.service(), CHECK)
        if closed := sum(client.is_readable() for client in clients):
            raise BenchError(f"{closed} of the 400 idle connections were closed meanwhile")
        return found


@cache
def waiting_starts(bench: Bench) -> tuple[Race, float]:
    """400 calls wait for a SwarmUI that never answers: checks beside those of a service without them; how many threads
    the last 300 calls added."""
    bench.flush()
    with contextlib.ExitStack() as stack:
        leash = stack.enter_context(contextlib.closing(tests.Leash()))
        folder = tests.write_swarmui_folder(bench.folder / "SwarmUI", {"leash": leash.port, "delay": 3600})
        service = stack.enter_context(bench.start(SWARMUI_PATH=str(folder), SWARMUI_START_TIMEOUT="600"))
        clients = [stack.enter_context(service.client()) for _ in range(400)]
        for number, client in enumerate(clients):
            if number == 100:
                leash.next()
                time.sleep(1)
                threads = service.status("Threads")
            client.begin("POST", f"{API}/swarmui/start")
        found = race_loads(bench, service, bench.service(), CHECK)
        if answered := sum(client.is_readable() for client in clients):
            raise BenchError(f"{answered} of the 400 calls were answered")
        return found, service.status("Threads") - threads


@contextlib.contextmanager
def listening(service: Server, count: int) -> Iterator[Callable[[bytes], None]]:
    """So many listeners to events; what is given reads from all of them until each has got that text."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in range(count)]
        poll, sockets = select.poll(), {}
        for client in clients:
            client.begin("GET", f"{API}/events")
            sockets[client.sock.fileno()] = client.sock
            poll.register(client.sock, select.POLLIN)

        def read_until(text: bytes) -> None:
            left, deadline = set(sockets), time.monotonic() + 10
            while left:
                if time.monotonic() > deadline:
                    raise BenchError(f"{len(left)} of {count} listeners did not get {text!r}")
                left -= {one for one, _ in poll.poll(100) if text in sockets[one].recv(1 << 20)}

        read_until(b"event: state")
        yield read_until


@cache
def told(bench: Bench, store: str) -> tuple[float, float, float]:
    """Ms from a create's beginning until the last of 300 listeners has the event, median and p99; MB that they take."""
    bench.flush()
    with bench.start(store) as service, service.client() as client:
        for _ in range(300):
            client.ask(*CHECK.sample)
        before, took = service.megabytes(), []
        with listening(service, 300) as read_until:
            time.sleep(2)
            memory = service.megabytes() - before
            for number in range(20 if bench.quick else 300):
                body = {**tests.NOTIFICATION, "sessionTimestamp": STAMP + number, "totalPrompts": 1}
                began = time.perf_counter()
                made = client.ask("POST", f"{API}/notifications", json.dumps(body).encode())
                read_until(made["id"].encode())
                took.append((time.perf_counter() - began) * 1000)
                client.ask("POST", f"{API}/notifications/{made['id']}/ack")
                time.sleep(0.02)
        return statistics.median(took), sorted(took)[int(len(took) * 0.99)], memory


def beside_listeners(bench: Bench, store: str) -> Race:
    """Checks of a service that tells 300 listeners of an event a second, beside those of one without."""
    bench.flush()
    with bench.start(store) as service, service.client() as client, listening(service, 300) as read_until:
        done = threading.Event()

        def tell() -> None:
            for number in itertools.count():
                body = {**tests.NOTIFICATION, "sessionTimestamp": STAMP + number, "totalPrompts": 1}
                made = client.ask("POST", f"{API}/notifications", json.dumps(body).encode())
                read_until(made["id"].encode())
                client.ask("POST", f"{API}/notifications/{made['id']}/ack")
                if done.wait(1):
                    return

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            telling = threads.submit(tell)
            try:
                return race_loads(bench, service, bench.service(store), CHECK)
            finally:
                done.set()
                telling.result()


def start_time(bench: Bench) -> float:
    """Seconds from the start of the process to its first 200, with an existing data folder."""
    took = []
    for _ in range(4 if bench.quick else 8):
        began = time.monotonic()
        with bench.start("embedded", data=bench.folder / "data-of-starts"):
            took.append(time.monotonic() - began)
    return statistics.median(took[1:])


def idle_memory(bench: Bench, store: str) -> float:
    with bench.start(store) as service:
        service.call(*CHECK.sample)
        time.sleep(1)
        return service.megabytes()


def idle_cpu(bench: Bench, store: str, sessions: int = 0) -> float:
    """Percent of a core during 20 s without a request, or longer beside sessions of 850 KB, a 20th of which wait."""
    bench.flush()
    with bench.start(store) as service:
        save_sessions(service, sessions // 20)
        save_sessions(service, sessions - sessions // 20, STAMP + sessions // 20, prompts=249)
        time.sleep(2 + sessions / 10)  # they are parsed once, by which the bridge knows those that wait
        before = service.cpu_seconds()
        time.sleep(20 + sessions / 2)
        return (service.cpu_seconds() - before) / (20 + sessions / 2) * 100


def memory_growth(bench: Bench) -> float:
    """MB more after the 200,000th request than after the 50,000th, of polls, reads and writes in turn."""
    bench.flush()
    small = {"size": 7_000, "beats": 20}  # 10 KB
    loads = [CHECK, PROMPTS_STATUS, SESSION, save_load(session_text(**small)), CREATE_AND_ACKNOWLEDGE, GPU_STATUS]
    turns, done, memory = itertools.cycle(loads), 0, []
    with bench.start() as service:
        save_sessions(service, **small)
        for wanted in (50_000, 200_000):
            while done < wanted:
                done += bench.wrk(service, next(turns))
            memory.append(service.megabytes())
    return memory[1] - memory[0]


# ======================================================================================================
# The rows
# ======================================================================================================


@dataclass(frozen=True)
class Row:
    """One line of the table. `target`: the least ratio of a race, or the highest figure allowed."""

    what: str
    other: str  # what it is measured beside; "" for nothing
    measure: Callable[[Bench], float | Race]
    target: float
    unit: str = "/s"
    quick: bool = False  # short enough for --quick


def rows(
    what: str, other: str, measure: Callable[..., Any], targets: Any, unit: str = "/s", quick: Sequence[Any] = ()
) -> list[Row]:
    """One for each number of connections in `targets`, or for each store if that is one number; --quick has those that
    `quick` names."""
    targets = targets if isinstance(targets, dict) else dict.fromkeys(STORES, targets)
    names = {key: key if key in STORES else f"{key} connection{'s' * (key > 1)}" for key in targets}
    calls = {key: partial(lambda key, bench: measure(bench, key), key) for key in targets}
    return [Row(f"{what}, {names[key]}", other, calls[key], targets[key], unit, key in quick) for key in targets]


def peer_rows(what: str, load: Load, targets: dict[int, float], quick: Sequence[int], **options: Any) -> list[Row]:
    return rows(what, "peer", partial(beside_peer, load=load, **options), targets, quick=quick)


ROWS = (
    *peer_rows("gpu/status, cached", GPU_STATUS, {1: 1.2, 8: 1.2}, quick=[8]),
    *peer_rows("check, empty queue, Redis", CHECK, {1: 1.1, 4: 1.4, 64: 1.5}, quick=[1, 64]),
    *peer_rows("check, empty queue, embedded", CHECK, {4: 1.5}, quick=[4], store="embedded"),
    *peer_rows("check, 100 pending", CHECK, {1: 3, 8: 3}, quick=[8], prepare=create_100),
    *peer_rows("prompts-status, 850 KB", PROMPTS_STATUS, {1: 1.1, 8: 2.5}, quick=[1, 8], prepare=save_sessions),
    *peer_rows("GET of an 850 KB session", SESSION, {4: 1.0}, quick=[4], prepare=save_sessions),
    *peer_rows("save of an 850 KB session, no bridge", save_load(session_text()), {4: 0.9}, quick=[4], store=ALONE),
    *peer_rows("create and ack, Redis", CREATE_AND_ACKNOWLEDGE, {1: 1.0, 8: 1.0}, quick=[1, 8]),
    *peer_rows("create and ack, embedded", CREATE_AND_ACKNOWLEDGE, {4: 0.7}, quick=[4], store="embedded"),
    *rows("check, 100,000 pending", "100 pending", lambda *which: queues(*which)[0], 0.7),
    *rows("create and ack, 100,000 pending", "100 pending", lambda *which: queues(*which)[1], 0.7),
    *rows("check's p99, ack of an unknown id", "", lambda *which: queues(*which)[2], 50, "ms"),
    Row("prompts-status, 10 MB", "reading it", lambda bench: beside_reading(bench, PROMPTS_STATUS, 1, 10_000_000), 0.7),
    Row("list of 20 of 850 KB", "reading them", lambda bench: beside_reading(bench, LIST_20, 20, 850_000), 0.7),
    *rows("list of 200 of 850 KB, more memory", "", list_memory, 30, "MB"),
    Row("create and ack, fsync of 10 ms, 16 connections", "1 connection", shared_fsync, 4.0),
    *rows("check's p99", "", latency, 8, "ms"),
    *rows("check's p99, lists and saves of 10 MB", "", partial(latency, busy=True), 100, "ms"),
    Row("check's p99, nvidia-smi taking 3 s", "", latency_beside_slow_gpu, 20, "ms"),
    Row("check, 400 idle connections", "without them", beside_idle, 0.6),
    Row("check, 400 waiting calls of swarmui/start", "without them", lambda bench: waiting_starts(bench)[0], 0.6),
    Row("threads for 300 more of these", "", lambda bench: waiting_starts(bench)[1], 4, "threads"),
    *rows("create to the last of 300 listeners, median", "", lambda *which: told(*which)[0], 20, "ms"),
    *rows("create to the last of 300 listeners, p99", "", lambda *which: told(*which)[1], 100, "ms"),
    *rows("memory of 300 listeners", "", lambda *which: told(*which)[2], 5, "MB"),
    *rows("check, 300 listeners, an event a second", "without them", beside_listeners, 0.7),
    Row("process start to the first 200", "", start_time, 0.4, "s", quick=True),
    *rows("memory, idle", "", idle_memory, 50, "MB", quick=STORES),
    Row("memory growth, 50,000th to 200,000th request", "", memory_growth, 5, "MB"),
    *rows("CPU, idle", "", idle_cpu, 0.2, "% of a core"),
    Row("CPU, the bridge, 100 sessions of 850 KB", "", lambda bench: idle_cpu(bench, "Redis", 100), 1.0, "% of a core"),
    Row("save of 850 KB, the bridge", "off", lambda bench: beside_no_bridge(bench, SAVE), 1 / 1.7),
    Row("PUT of strings, the bridge", "off", lambda bench: beside_no_bridge(bench, SAVE_STRINGS), 1 / 3),
    Row("prompts-status, the bridge", "off", lambda bench: beside_no_bridge(bench, PROMPTS_STATUS.sample), 1 / 1.5),
)


# ======================================================================================================
# The report
# ======================================================================================================


def figure(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit if unit.startswith('/') else f' {unit}'}"


def meets(row: Row, found: float | Race, slack: float = 0.0) -> bool:
    if isinstance(found, Race):
        return found.ratio >= row.target * (1 - slack)
    return found <= row.target * (1 + slack)


def line_of(row: Row, found: float | Race) -> str:
    if isinstance(found, Race):
        cells = [figure(found.ours, row.unit), f"{row.other}: {figure(found.other, row.unit)}", f"{found.ratio:.2f}"]
        cells.append(f"{row.target:g}")
    else:
        cells = [figure(found, row.unit), "", "", f"at most {row.target:g} {row.unit}"]
    return f"| {' | '.join([row.what, *cells, 'yes' if meets(row, found) else 'no'])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the service beside a peer.")
    parser.add_argument("--quick", action="store_true", help="the short rows, once each; no target counts")
    parser.add_argument("--only", metavar="REGEX", default="", help="the rows whose name matches")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended
    wanted = [row for row in ROWS if re.search(options.only, f"{row.what} {row.other}")]
    lines, missed, errors = [], 0, 0
    with contextlib.ExitStack() as stack:
        need_program("wrk")
        need_program("redis-server")
        # Not in /tmp, which may be memory, where an fsync costs nothing.
        cache_folder().mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="storyteller-bench-", dir=cache_folder())
        bench = Bench(Path(stack.enter_context(folder)), stack, options.quick)
        for row in (row for row in wanted if row.quick or not options.quick):
            began = time.monotonic()
            try:
                found = row.measure(bench)
            except (BenchError, OSError, http.client.HTTPException, redis.RedisError) as error:
                say(f"ERROR {row.what}: {type(error).__name__}: {error}")
                lines.append(f"| {row.what} | not measured | {row.other} | | | no |")
                errors += 1
                continue
            lines.append(line_of(row, found))
            missed += not meets(row, found, 0.1)
            say(f"{lines[-1]}  {time.monotonic() - began:.0f} s")
        redis_version = bench.redis.tell("INFO", "server")["redis_version"]
    cores, python = len(os.sched_getaffinity(0)), sys.version.split()[0]
    print(f"{time.strftime('%Y-%m-%d')}, {cores} cores, Python {python}, Redis {redis_version}:\n")
    head = ["| what | service | beside | ratio | target | met |", "| --- | --- | --- | --- | --- | --- |"]
    print("\n".join([*head, *lines]))
    return 2 if errors else int(missed > 0 and not options.quick)


if __name__ == "__main__":
    sys.exit(main())

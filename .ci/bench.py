#!/usr/bin/env python3
"""Measures the service beside what most people would have written, and beside a bare function under waitress.

    .venv/bin/python .ci/bench.py                 every row; about 15 minutes on 2 cores
    .venv/bin/python .ci/bench.py --quick         the short rows, once each, under a minute; no target counts
    .venv/bin/python .ci/bench.py --only check    the rows whose name matches

Run it by the Python of .venv, as users start the service. Prints a table in Markdown; exit code 1 when a target is
missed by more than a tenth, 2 when something could not be measured. Linux only. wrk, strace and redis-server come
from Debian, the peer's packages go into a venv of their own in the cache folder.

The rooms: the peer and the reference; what is asked of them; servers; load; measures; the rows, one table; the report.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import test_storyteller_automation as tests  # noqa: E402

MODULE = ROOT / "storyteller_automation.py"
API = "/api/v1"


class BenchError(Exception):
    """Something that could not be measured: one sentence."""


# ======================================================================================================
# The peer and the reference
# ======================================================================================================

PEER_PACKAGES = """\
annotated-doc==0.0.7
annotated-types==0.8.0
anyio==4.16.0
click==8.5.1
fastapi==0.165.0
h11==0.16.0
hiredis==3.5.0
httptools==0.9.0
idna==3.20
opentelemetry-api==1.45.2
pydantic==2.14.4
pydantic_core==2.50.5
python-dotenv==1.2.4
PyYAML==6.0.4
redis==8.1.0
starlette==1.10.0
typing-inspection==0.4.5
typing_extensions==4.16.0
uvicorn==0.54.0
uvloop==0.23.0
watchfiles==1.3.0
websockets==17.4
"""

# What most people would write for the same routes, with the same keys in Redis; nothing in it is slow on purpose.
# It trusts what is in Redis more than the service does, and has no SwarmUI, no limits and no log.
PEER = r'''
import asyncio, hashlib, json, os, secrets, time
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

import redis.asyncio as redis
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError

API_TOKEN = os.environ["STORYTELLER_API_TOKEN"]
NVIDIA_SMI = os.environ["NVIDIA_SMI"]
GPU_CACHE_SECONDS = float(os.environ.get("GPU_CACHE_SECONDS", "5"))
WEEK = 7 * 24 * 3600
PENDING = "notifications:pending"
TOTALS = {"prompts_ready": "totalPrompts", "beats_ready": "totalBeats"}
Kind = Literal["prompts_ready", "beats_ready"]

store = redis.Redis.from_url(os.environ["REDIS_URL"])


@asynccontextmanager
async def lifespan(app):
    yield
    await store.aclose()


bearer = HTTPBearer(auto_error=False)


async def authorize(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    if credentials is None:
        raise HTTPException(401, "A token is needed", {"WWW-Authenticate": "Bearer"})
    token = credentials.credentials
    if secrets.compare_digest(token.encode(), API_TOKEN.encode()):
        return
    digest = hashlib.sha256(token.encode()).hexdigest()
    if not await store.exists(f"auth:session:{digest}"):
        raise HTTPException(401, "The token is unknown or has expired", {"WWW-Authenticate": "Bearer"})


app = FastAPI(lifespan=lifespan)
api = APIRouter(prefix="/api/v1", dependencies=[Depends(authorize)])


def now_ms() -> int:
    return int(time.time() * 1000)


def iso(ms: int) -> str:
    moment = datetime.fromtimestamp(ms / 1000, timezone.utc)
    return moment.isoformat(timespec="milliseconds" if ms % 1000 else "seconds").replace("+00:00", "Z")


@app.get("/health")
async def health():
    await store.ping()
    return {"status": "ok", "store": "redis"}


class GpuStatus(BaseModel):
    available: bool
    gpuCount: int
    utilization: int
    memoryUsed: int
    memoryTotal: int
    temperature: int
    processCount: int
    error: str | None = None


gpu_lock = asyncio.Lock()
gpu_kept: tuple[float, GpuStatus] | None = None


async def run_nvidia_smi(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(NVIDIA_SMI, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 5)
    if process.returncode:
        raise HTTPException(500, "nvidia-smi failed")
    return output.decode()


async def query_gpus() -> GpuStatus:
    gpus, processes = await asyncio.gather(
        run_nvidia_smi(
            "--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,count",
            "--format=csv,noheader,nounits",
        ),
        run_nvidia_smi("--query-compute-apps=pid", "--format=csv,noheader"),
    )
    rows = [[float(cell) for cell in line.split(",")] for line in gpus.splitlines()]
    return GpuStatus(
        available=True,
        gpuCount=len(rows),
        utilization=round(sum(row[0] for row in rows) / len(rows)),
        memoryUsed=round(sum(row[1] for row in rows)),
        memoryTotal=round(sum(row[2] for row in rows)),
        temperature=round(max(row[3] for row in rows)),
        processCount=len(set(processes.split())),
    )


@api.get("/gpu/status")
async def gpu_status() -> GpuStatus:
    global gpu_kept
    if gpu_kept and time.monotonic() - gpu_kept[0] < GPU_CACHE_SECONDS:
        return gpu_kept[1]
    async with gpu_lock:
        if not gpu_kept or time.monotonic() - gpu_kept[0] >= GPU_CACHE_SECONDS:
            gpu_kept = (time.monotonic(), await query_gpus())
    return gpu_kept[1]


class NewNotification(BaseModel):
    type: Kind
    sessionTimestamp: int
    storyUuid: str = ""
    episodeNumber: int = 0
    totalPrompts: int | None = None
    totalBeats: int | None = None


class Notification(NewNotification):
    id: str
    timestamp: str


class Notifications(BaseModel):
    notifications: list[Notification]


def read_notification(member: bytes) -> Notification:
    value = json.loads(member)
    for kind, total in TOTALS.items():
        if kind != value["type"]:
            value.pop(total, None)
    return Notification(**value)


async def make_notification(new: NewNotification) -> tuple[Notification, bool]:
    """The pending one of the same type and session where there is one, else a new one."""
    made = f"storyteller:made:{new.type}:{new.sessionTimestamp}"
    before = await store.get(made)
    if before and await store.zscore(PENDING, before) is not None:
        return read_notification(before), False
    now = now_ms()
    value = {"id": f"notif_{now}_{secrets.token_hex(8)}", **new.model_dump(exclude_none=True), "timestamp": iso(now)}
    member = json.dumps({**value, "acknowledged": False}).encode()
    async with store.pipeline(transaction=True) as pipe:
        pipe.set(made, member, ex=WEEK)
        pipe.zadd(PENDING, {member: now})
        await pipe.execute()
    return read_notification(member), True


@api.get("/notifications/check", response_model_exclude_none=True)
async def check(
    type: Literal["prompts_ready", "beats_ready", "all"] = "prompts_ready",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Notifications:
    found = []
    for member in await store.zrangebyscore(PENDING, now_ms() - WEEK * 1000, "+inf"):
        try:
            notification = read_notification(member)
        except (ValueError, KeyError, TypeError):
            continue
        if type in ("all", notification.type):
            found.append(notification)
    if found:
        marked = await store.mget([f"notifications:ack:{one.id}" for one in found])
        found = [one for one, mark in zip(found, marked) if mark is None]
    return Notifications(notifications=found[:limit])


@api.post("/notifications", status_code=201, response_model_exclude_none=True)
async def create(new: NewNotification, response: Response) -> Notification:
    notification, made = await make_notification(new)
    if not made:
        response.status_code = 200
    return notification


@api.post("/notifications/{notification_id}/ack")
async def acknowledge(notification_id: str):
    marker = f"notifications:ack:{notification_id}"
    for member in await store.zrange(PENDING, 0, -1):
        if json.loads(member).get("id") == notification_id:
            async with store.pipeline(transaction=True) as pipe:
                pipe.zrem(PENDING, member)
                pipe.set(marker, "1", ex=WEEK)
                await pipe.execute()
            break
    else:
        if not await store.exists(marker):
            raise HTTPException(404, "Notification not found")
    return {"success": True, "notificationId": notification_id}


class PromptsStatus(BaseModel):
    promptsReady: bool
    sessionTimestamp: int
    totalBeats: int
    totalPrompts: int
    lastUpdated: str


def has_prompt(beat: dict[str, Any]) -> bool:
    prompt = (beat.get("prompts") or {}).get("cinematic")
    if isinstance(prompt, dict):
        prompt = prompt.get("prompt")
    return bool(prompt and prompt.strip())


def progress(session: dict[str, Any]) -> tuple[int, int, bool]:
    beats = [beat for scene in session["analyzedEpisode"]["scenes"] for beat in scene.get("beats") or []]
    prompts = [has_prompt(beat) for beat in beats]
    needed = [(beat.get("imageDecision") or {}).get("type") not in ("REUSE_IMAGE", "NO_IMAGE") for beat in beats]
    ready = bool(beats) and all(has for has, needs in zip(prompts, needed) if needs)
    return len(beats), sum(prompts), ready


async def read_session(timestamp: int) -> tuple[bytes, dict[bytes, bytes]]:
    async with store.pipeline(transaction=False) as pipe:
        pipe.get(f"session:{timestamp}")
        pipe.get(f"storyart:session:{timestamp}")
        pipe.hgetall(f"storyteller:session:{timestamp}")
        ours, storyart, meta = await pipe.execute()
    document = ours or storyart
    if document is None:
        raise HTTPException(404, "Session not found")
    return document, meta


async def announce(timestamp: int, session: dict[str, Any], announced: str | None) -> None:
    beats, prompts, ready = progress(session)
    kind = "prompts_ready" if ready else "beats_ready"
    if session.get("promptMode") != "storyswarm" or not beats or announced == kind:
        return
    episode = session["analyzedEpisode"].get("episodeNumber") or 0
    story = session.get("storyUuid") or ""
    await make_notification(
        NewNotification(
            type=kind, sessionTimestamp=timestamp, storyUuid=story, episodeNumber=episode,
            totalPrompts=prompts, totalBeats=beats,
        )
    )
    await store.hset(f"storyteller:session:{timestamp}", "announced", kind)


@api.get("/session/{timestamp}/prompts-status")
async def prompts_status(timestamp: int) -> PromptsStatus:
    document, meta = await read_session(timestamp)
    session = json.loads(document)
    try:
        beats, prompts, ready = progress(session)
    except (KeyError, TypeError, AttributeError):
        raise HTTPException(500, "Not a session")
    if ready:
        await announce(timestamp, session, meta.get(b"announced", b"").decode())
    return PromptsStatus(
        promptsReady=ready,
        sessionTimestamp=timestamp,
        totalBeats=beats,
        totalPrompts=prompts,
        lastUpdated=iso(int(meta.get(b"saved", timestamp))),
    )


async def newest_sessions(limit: int) -> list[tuple[int, dict[str, Any]]]:
    keys = await store.zrevrange("storyteller:sessions", 0, limit - 1)
    documents = await store.mget(keys) if keys else []
    return [(int(key.split(b":")[1]), json.loads(one)) for key, one in zip(keys, documents) if one]


@api.get("/session/list")
async def session_list(limit: Annotated[int, Query(ge=1, le=200)] = 20):
    sessions = []
    for timestamp, session in await newest_sessions(limit):
        episode = session.get("analyzedEpisode") or {}
        scenes = [
            {"sceneNumber": scene.get("sceneNumber"), "title": scene.get("title"), "totalBeats": len(scene["beats"])}
            for scene in episode.get("scenes") or []
        ]
        sessions.append(
            {
                "timestamp": timestamp,
                "storyUuid": session.get("storyUuid"),
                "promptMode": session.get("promptMode"),
                "scriptText": (session.get("scriptText") or "")[:500],
                "analyzedEpisode": {
                    "episodeNumber": episode.get("episodeNumber"), "title": episode.get("title"), "scenes": scenes
                },
            }
        )
    return {"success": True, "count": len(sessions), "sessions": sessions}


@api.get("/session/latest")
async def session_latest():
    for _, session in await newest_sessions(1):
        return JSONResponse({"success": True, "data": session, "storage": "redis"})
    raise HTTPException(404, "No session found")


@api.get("/session/{timestamp}")
async def session_get(timestamp: int):
    document, _ = await read_session(timestamp)
    return JSONResponse({"success": True, "data": json.loads(document), "storage": "redis"})


async def keep_session(timestamp: int, session: dict[str, Any]) -> dict[str, Any]:
    if "scriptText" not in session and "analyzedEpisode" not in session:
        raise HTTPException(400, "scriptText or analyzedEpisode is needed")
    session["timestamp"] = timestamp
    announced = await store.hget(f"storyteller:session:{timestamp}", "announced")
    async with store.pipeline(transaction=True) as pipe:
        pipe.set(f"session:{timestamp}", json.dumps(session), ex=WEEK)
        pipe.zadd("storyteller:sessions", {f"session:{timestamp}": timestamp})
        pipe.hset(f"storyteller:session:{timestamp}", "saved", now_ms())
        pipe.expire(f"storyteller:session:{timestamp}", WEEK)
        await pipe.execute()
    if (session.get("analyzedEpisode") or {}).get("scenes"):
        await announce(timestamp, session, (announced or b"").decode())
    return {
        "success": True, "message": "Session saved", "sessionKey": f"session:{timestamp}", "storage": "redis"
    }


@api.post("/session/save")
async def session_save(session: dict[str, Any]):
    return await keep_session(int(session.get("timestamp") or now_ms()), session)


@api.put("/session/{timestamp}")
async def session_put(timestamp: int, session: dict[str, Any]):
    return await keep_session(timestamp, session)


app.include_router(api)
'''

# A bare function: what waitress itself costs. Its answer is what the service answers to gpu/status.
REFERENCE = r"""
import logging, os
import waitress
body = os.environ["BODY"].encode()
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
logging.getLogger("waitress.queue").disabled = True
waitress.serve(app, host="127.0.0.1", port=int(os.environ["PORT"]), threads=4)
"""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "storyteller-bench"


def peer_python() -> Path:
    """The Python of the peer's venv; made once, and anew when other versions are wanted."""
    folder = cache_folder()
    stamp = folder / "installed.txt"
    wanted = f"{PEER_PACKAGES}{sys.version}\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        say("setting up the peer's venv")
        venv.create(folder, clear=True, with_pip=True)
        (folder / "packages.txt").write_text(PEER_PACKAGES)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "-r", folder / "packages.txt"], check=True)
        stamp.write_text(wanted)
    return folder / "bin" / "python"


def need_program(name: str, package: str | None = None) -> None:
    """One of Debian's, installed where it is missing and we may."""
    if shutil.which(name):
        return
    package = package or name
    if os.getuid() or not shutil.which("apt-get"):
        raise BenchError(f"{name} is missing: install it (on Debian and Ubuntu: sudo apt install {package}).")
    say(f"installing Debian's {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
    subprocess.run(install, env=environment, stdout=subprocess.DEVNULL, check=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ======================================================================================================
# What is asked of them
# ======================================================================================================

STAMP = 1_738_195_200_000  # of the first session


def session_text(timestamp: int = STAMP, size: int = 850_000, beats: int = 249) -> bytes:
    """A session in the shape of a real episode, half of whose prompts are still to be made, as it is saved."""
    document = {"timestamp": timestamp, **tests.make_session(beats=beats, prompts=beats // 2, size=size)}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


SMALL_SESSION = {"size": 7_000, "beats": 20}  # 10 KB
LARGE_SESSION = {"size": 10_000_000}


def pending_member(time: int, number: int, **changed: Any) -> bytes:
    """A notification as the service itself writes it."""
    value = {
        "id": f"notif_{time}_{number:016x}",
        "type": "prompts_ready",
        "sessionTimestamp": STAMP + number,
        "storyUuid": "59f64b1e-726a-439d-a6bc-0dfefcababdb",
        "episodeNumber": 2,
        "totalPrompts": 240,
        "totalBeats": 249,
        "timestamp": tests.service.iso_time(time),
        "acknowledged": False,
        **changed,
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def pending_members(count: int) -> dict[bytes, int]:
    """So many, with their times; the newest is some minutes old."""
    first = tests.service.now_ms() - 600_000 - count
    return {pending_member(first + number, number): first + number for number in range(count)}


@dataclass(frozen=True)
class Load:
    """What one wrk asks for: `path`, or what the Lua says. That finds in `args[1]` a number that grows by a million
    from run to run, so that nothing is made twice."""

    path: str
    lua: str = ""


GPU_STATUS = Load(f"{API}/gpu/status")
CHECK = Load(f"{API}/notifications/check")
PROMPTS_STATUS = Load(f"{API}/session/{STAMP}/prompts-status")
SESSION = Load(f"{API}/session/{STAMP}")


# ======================================================================================================
# Servers
# ======================================================================================================


class Server:
    """A process that answers on a port of 127.0.0.1, from its first 200 until close()."""

    PATIENCE = 30.0

    def __init__(self, name: str, command: Sequence[Any], environment: dict[str, str], folder: Path, port: int) -> None:
        self.name = name
        self.port = port
        self._output = folder / f"{name}-{port}.txt"
        began = time.monotonic()
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() - began > self.PATIENCE:
                    raise BenchError(f"{name} did not start: {self._output.read_text(errors='replace')[-2000:]}")
                time.sleep(0.002)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - began

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.call("GET", "/health")[0] == 200
        return False

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON of one request, over a connection of its own."""
        with contextlib.closing(Client(self)) as client:
            return client.call(method, path, body)

    def close(self) -> None:
        """Its children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Client:
    """One kept connection."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", **tests.BEARER}
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read() or b"null")

    def good(self, method: str, path: str, body: bytes | None = None) -> Any:
        status, value = self.call(method, path, body)
        if status // 100 != 2:
            raise BenchError(f"{method} {path} was answered {status}: {str(value)[:300]}")
        return value

    def close(self) -> None:
        self._connection.close()


class Bench:
    """The servers and stores of one run of this program, started when they are first asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._stack = stack
        self._kept: dict[str, Server] = {}
        self._numbers = itertools.count(1)
        self.wrks = Wrk(folder)
        # A copy, in a folder of its own, where no .env of this machine is read.
        self.module = Path(shutil.copy(MODULE, folder))
        plan = {"gpus": tests.GOOD, "processes": {"print": "41\n"}, "runs": str(folder / "runs")}
        self.nvidia_smi = tests.write_program(folder / "nvidia-smi", tests.NVIDIA_SMI, plan)
        ours = {row.metadata["name"] for row in dataclasses.fields(tests.service.Settings)}
        self._environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.redis = tests.OwnRedis(folder, ["--save", "", "--databases", "2"])
        stack.callback(self.redis.kill)

    def number(self) -> int:
        return next(self._numbers) * 1_000_000

    def start_service(
        self, store: str, database: int = 0, data: Path | None = None, prefix: Sequence[str] = (), **settings: str
    ) -> Server:
        """A fresh one, as users start it. `store` is redis or embedded."""
        port = tests.free_port()
        environment = {
            **self._environment,
            "STORYTELLER_API_TOKEN": tests.TOKEN,
            "STORYTELLER_PORT": str(port),
            "STORYTELLER_DATA_DIR": str(data or self.folder / f"data-{port}"),
            "NVIDIA_SMI": str(self.nvidia_smi),
            "SWARMUI_API_URL": f"http://localhost:{tests.free_port()}",
            **settings,
        }
        if store == "redis":
            environment["REDIS_URL"] = f"redis://127.0.0.1:{self.redis.port}/{database}"
        command = [*prefix, sys.executable, self.module]
        return Server(f"service-{store}", command, environment, self.folder, port)

    @contextlib.contextmanager
    def fresh(self, store: str, **options: Any) -> Iterator[Server]:
        """One for a single row."""
        with contextlib.closing(self.start_service(store, **options)) as server:
            yield server

    def _keep(self, name: str, start: Callable[[], Server]) -> Server:
        if name not in self._kept:
            self._kept[name] = start()
            self._stack.callback(self._kept[name].close)
        return self._kept[name]

    def service(self, store: str = "redis") -> Server:
        """One for all the rows that leave nothing behind; its GPU status is a kept one throughout."""
        return self._keep(store, lambda: self.start_service(store, GPU_CACHE_SECONDS="86400"))

    def peer(self) -> Server:
        return self._keep("peer", self._start_peer)

    def _start_peer(self) -> Server:
        port = tests.free_port()
        (self.folder / "peer.py").write_text(PEER)
        command = [peer_python(), "-m", "uvicorn", "peer:app", "--host", "127.0.0.1", "--port", port]
        environment = {
            **self._environment,
            "STORYTELLER_API_TOKEN": tests.TOKEN,
            "REDIS_URL": self.redis.url,
            "NVIDIA_SMI": str(self.nvidia_smi),
            "GPU_CACHE_SECONDS": "86400",
        }
        # Without a line for each request: the service writes none for a poll either.
        return Server("peer", [*command, "--no-access-log", "--log-level", "warning"], environment, self.folder, port)

    def reference(self) -> Server:
        return self._keep("reference", self._start_reference)

    def _start_reference(self) -> Server:
        port = tests.free_port()
        body = json.dumps(self.service().call("GET", GPU_STATUS.path)[1], separators=(",", ":"))
        environment = {**self._environment, "BODY": body, "PORT": str(port)}
        return Server("reference", [sys.executable, "-c", REFERENCE], environment, self.folder, port)

    def flush(self) -> None:
        self.redis.tell("FLUSHALL")


# ======================================================================================================
# Load
# ======================================================================================================


class Wrk:
    """Closed loops: each connection asks again as soon as it is answered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rate(self, server: Server, load: Load, connections: int, seconds: int, number: int) -> float:
        """Requests a second. A run with a wrong answer or a broken connection is void, and is repeated once."""
        for _ in range(2):
            printed = self._run(server, load, connections, seconds, number)
            wrong = re.search(r"Socket errors.*|Non-2xx.*", printed)
            if not wrong:
                found = re.search(r"Requests/sec:\s+([0-9.]+)", printed)
                if not found or float(found[1]) == 0:
                    raise BenchError(f"wrk against {server.name}, {load.path}, measured nothing: {printed[-500:]}")
                return float(found[1])
            say(f"  void, {server.name}: {wrong[0].strip()}")
        raise BenchError(f"{load.path} of {server.name} fails under load: {wrong[0].strip()}")

    def _run(self, server: Server, load: Load, connections: int, seconds: int, number: int) -> str:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
        command += ["-H", f"Authorization: Bearer {tests.TOKEN}"]
        if load.lua:
            script = self._folder / "load.lua"
            script.write_text(load.lua)
            command += ["-s", str(script)]
        command.append(f"http://127.0.0.1:{server.port}{load.path}")
        if load.lua:
            command += ["--", str(number)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"wrk failed: {done.stdout[-300:]}{done.stderr[-300:]}")
        return done.stdout


# ======================================================================================================
# Measures
# ======================================================================================================


@dataclass(frozen=True)
class Found:
    """What a row measured, in its own unit; `other` where it was measured beside another. `compared` is what the
    target is about: the ratio, or the figure itself."""

    ours: float
    other: float | None
    compared: float


Measure = Callable[[Bench], Found]


def race(
    bench: Bench,
    ours: tuple[Server, Load],
    other: tuple[Server, Load],
    connections: int = 4,
    seconds: int = 1,
    before_run: Callable[[], None] = lambda: None,
) -> Found:
    """Requests a second of both, in turns (A B B A, five rounds), and the median of the rounds' ratios."""
    order, rounds = ([0, 1], 1) if bench.quick else ([0, 1, 1, 0], 5)
    sides = [ours, other]
    if not bench.quick:  # what is only slow at first is not meant
        for side in sides:
            before_run()
            bench.wrks.rate(*side, connections, 1, bench.number())
    rates: list[list[list[float]]] = []
    for _ in range(rounds):
        rates.append([[], []])
        for which in order:
            before_run()
            rates[-1][which].append(bench.wrks.rate(*sides[which], connections, seconds, bench.number()))
    means = [[statistics.mean(side) for side in one] for one in rates]
    ratio = statistics.median(mine / theirs for mine, theirs in means)
    mine, theirs = (statistics.median(side) for side in zip(*means))
    return Found(mine, theirs, ratio)


def compare_answers(ours: Server, other: Server, *paths: str) -> None:
    """Both give the same status and the same value, or nothing is measured."""
    for path in paths:
        found = [server.call("GET", path) for server in (ours, other)]
        if found[0] != found[1]:
            words = " and ".join(f"{server.name}: {str(one)[:300]}" for server, one in zip((ours, other), found))
            raise BenchError(f"GET {path} is answered differently by {words}")


def beside_peer(
    load: Load, fill: Callable[[Bench], None] = Bench.flush, store: str = "redis", connections: int = 4
) -> Measure:
    """The same GET of both, after `fill` filled Redis."""

    def measure(bench: Bench) -> Found:
        fill(bench)
        compare_answers(bench.service(store), bench.peer(), load.path)
        return race(bench, (bench.service(store), load), (bench.peer(), load), connections)

    return measure


def beside_reference(bench: Bench) -> Found:
    compare_answers(bench.service(), bench.reference(), GPU_STATUS.path)
    return race(bench, (bench.service(), GPU_STATUS), (bench.reference(), GPU_STATUS))


def fill_pending(count: int) -> Callable[[Bench], None]:
    def fill(bench: Bench) -> None:
        bench.flush()
        members = pending_members(count)
        bench.redis.tell("ZADD", "notifications:pending", *itertools.chain(*((at, one) for one, at in members.items())))

    return fill


def fill_session(bench: Bench) -> None:
    bench.flush()
    put_session(bench.service(), session_text())
    bench.redis.tell("DEL", "notifications:pending")


def put_session(server: Server, text: bytes, timestamp: int = STAMP) -> None:
    with contextlib.closing(Client(server)) as client:
        client.good("PUT", f"{API}/session/{timestamp}", text)


def beside_own_check(bench: Bench) -> Found:
    fill_session(bench)
    return race(bench, (bench.service(), PROMPTS_STATUS), (bench.service(), CHECK))


def small_beside_large(bench: Bench) -> Found:
    """Polls of a session of 10 MB, measured by polls of one of 10 KB."""
    bench.flush()
    service, small, large = bench.service(), STAMP + 1, STAMP + 2
    put_session(service, session_text(small, **SMALL_SESSION), small)
    put_session(service, session_text(large, **LARGE_SESSION), large)
    loads = [Load(f"{API}/session/{timestamp}/prompts-status") for timestamp in (large, small)]
    for load in loads:
        service.call("GET", load.path)
    return race(bench, (service, loads[0]), (service, loads[1]))


# ======================================================================================================
# The rows
# ======================================================================================================


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` is the least that is wanted (of a ratio), or the most (of a figure in `unit`)."""

    what: str
    other: str  # who it is measured beside; "" for nobody
    measure: Measure
    target: float
    unit: str = "/s"
    most: bool = False
    quick: bool = True


ROWS = (
    Row("gpu/status, cached", "reference", beside_reference, 1.3),
    Row("gpu/status, cached", "peer", beside_peer(GPU_STATUS), 1.3),
    Row("check, empty queue, Redis", "peer", beside_peer(CHECK), 1.2),
    Row("check, empty queue, Redis, 1 connection", "peer", beside_peer(CHECK, connections=1), 1.0),
    Row("check, empty queue, Redis, 64 connections", "peer", beside_peer(CHECK, connections=64), 1.8),
    Row("check, empty queue, embedded", "peer on Redis", beside_peer(CHECK, store="embedded"), 1.5),
    Row("check, 100 pending", "peer", beside_peer(CHECK, fill_pending(100)), 5.0),
    Row("prompts-status, 850 KB, unchanged", "peer", beside_peer(PROMPTS_STATUS, fill_session), 10.0),
    Row("prompts-status, 850 KB, unchanged", "own empty check", beside_own_check, 0.8),
    Row("prompts-status, 10 MB, warm", "the same of 10 KB", small_beside_large, 0.8),
    Row("GET of an 850 KB session", "peer", beside_peer(SESSION, fill_session), 1.0),
)


# ======================================================================================================
# The report
# ======================================================================================================


def figure(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit if unit.startswith('/') else f' {unit}'}"


def line_of(row: Row, found: Found) -> str:
    words = ("at most " if row.most else "") + (f"{row.target:g}" if row.other else figure(row.target, row.unit))
    beside = f"{figure(found.other, row.unit)}, {row.other}" if found.other is not None else row.other
    ratio = f"{found.compared:.2f}" if row.other else ""
    cells = [row.what, figure(found.ours, row.unit), beside, ratio, words, "yes" if held(row, found) else "no"]
    return f"| {' | '.join(cells)} |"


def held(row: Row, found: Found, slack: float = 0.0) -> bool:
    if row.most:
        return found.compared <= row.target * (1 + slack)
    return found.compared >= row.target * (1 - slack)


HEAD = "| what | service | beside | ratio | target | held |\n| --- | --- | --- | --- | --- | --- |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the service beside a peer and a reference.")
    parser.add_argument("--quick", action="store_true", help="the short rows, once each; no target counts")
    parser.add_argument("--only", metavar="REGEX", default="", help="the rows whose name matches")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("This bench measures with what Linux alone has (/proc, wrk, strace): run it on Linux.")
    rows = [row for row in ROWS if re.search(options.only, f"{row.what} {row.other}")]
    rows = [row for row in rows if row.quick or not options.quick]
    lines, missed, errors = [], 0, 0
    with contextlib.ExitStack() as stack:
        need_program("wrk")
        need_program("redis-server")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="storyteller-bench-")))
        bench = Bench(folder, stack, options.quick)
        for row in rows:
            began = time.monotonic()
            try:
                found = row.measure(bench)
            except BenchError as error:
                say(f"ERROR {row.what}: {error}")
                lines.append(f"| {row.what} | not measured | {row.other} | | | no |")
                errors += 1
                continue
            lines.append(line_of(row, found))
            missed += not held(row, found, 0.1)
            say(f"{lines[-1]}  {time.monotonic() - began:.0f} s")
    print("\n".join([HEAD, *lines]))
    if errors:
        return 2
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())

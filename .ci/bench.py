#!/usr/bin/env python3
"""Measures the service beside what most people would have written, and beside a bare function under waitress.

    .venv/bin/python .ci/bench.py                 every row; about 15 minutes on 2 cores
    .venv/bin/python .ci/bench.py --quick         the short rows, once each, under a minute; no target counts
    .venv/bin/python .ci/bench.py --only check    the rows whose name matches

Run it by the Python of .venv, as users start the service. Prints a table in Markdown; exit code 1 when a target is
missed by more than a tenth, 2 when something could not be measured. Linux only. wrk, strace and redis-server come
from Debian, the peer's packages go into a venv of their own in the cache folder.

The rooms: the peer and the reference; setting up; what is asked of them; servers; load; measures; the rows, one table;
the report.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import multiprocessing
import os
import platform
import re
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import redis  # noqa: E402

import test_storyteller_automation as tests  # noqa: E402

MODULE = ROOT / "storyteller_automation.py"
API = "/api/v1"


if not sys.platform.startswith("linux"):
    sys.exit("This bench measures with what Linux alone has (/proc, fork, wrk, strace): run it on Linux.")


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


# ======================================================================================================
# Setting up
# ======================================================================================================


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def peer_python() -> Path:
    """The Python of the peer's venv; made once, and anew when other versions are wanted."""
    folder = cache_folder() / "storyteller-bench"
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
    """So many, oldest first, with their times; the newest is some minutes old."""
    first = tests.service.now_ms() - 600_000 - count
    return {pending_member(first + number, number): first + number for number in range(count)}


def useless_members(count: int) -> dict[bytes, int]:
    """In front of those of pending_members(): in turn one that is no JSON, one that names no total, and two of the
    other type."""
    first = tests.service.now_ms() - 3_600_000
    made = {}
    for number in range(count):
        time = first + number
        if number % 4 == 0:
            made[b"not JSON, %d" % number] = time
        else:
            changed = {"totalPrompts": None} if number % 4 == 1 else {"type": "beats_ready"}
            made[pending_member(time, number, **changed)] = time
    return made


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

NEW_NOTIFICATION = {"type": "prompts_ready", "storyUuid": "u", "episodeNumber": 2, "totalPrompts": 48}

_LUA_CREATE = """
local made
function init(args)
  wrk.headers["Content-Type"] = "application/json"
  made = tonumber(args[1])
end
local function create()
  made = made + 1
  local body = '{"type":"prompts_ready","storyUuid":"u","episodeNumber":2,"totalPrompts":48,"sessionTimestamp":'
  return wrk.format("POST", "/api/v1/notifications", nil, body .. string.format("%d}", made))
end
"""

CREATE = Load(f"{API}/notifications", _LUA_CREATE + "request = create")

# Each one that was made is acknowledged by the next request, so few are ever pending.
_LUA_ACKNOWLEDGE = """
local ids = {}
function response(status, headers, body)
  local id = status == 201 and string.match(body, '"id":"([^"]+)"')
  if id then table.insert(ids, id) end
end
local function acknowledge_or_create()
  local id = table.remove(ids)
  if id then return wrk.format("POST", "/api/v1/notifications/" .. id .. "/ack") end
  return create()
end
"""

CREATE_AND_ACKNOWLEDGE = Load(
    f"{API}/notifications", _LUA_CREATE + _LUA_ACKNOWLEDGE + "request = acknowledge_or_create"
)


def save_load(folder: Path, text: bytes) -> Load:
    """The session is saved, its scriptText another one each time."""
    head, _, tail = text.partition(b'"scriptText":"')
    (folder / "head").write_bytes(head + b'"scriptText":"')
    (folder / "tail").write_bytes(tail)
    lua = f"""
local head, tail = io.open("{folder}/head"):read("*a"), io.open("{folder}/tail"):read("*a")
local made
function init(args)
  wrk.headers["Content-Type"] = "application/json"
  made = tonumber(args[1])
end
function request()
  made = made + 1
  return wrk.format("POST", nil, nil, head .. string.format("%015d", made) .. tail)
end
"""
    return Load(f"{API}/session/save", lua)


def turns_load(count: int) -> Load:
    """The prompts-status of `count` sessions in turn, each run beginning at another one."""
    lua = f"""
local turn
function init(args) turn = tonumber(args[1]) / 1000000 * 389 end
function request()
  turn = turn + 1
  return wrk.format("GET", string.format("{API}/session/%d/prompts-status", {STAMP} + turn % {count}))
end
"""
    return Load(f"{API}/session", lua)


def mixed_load(text: bytes) -> Load:
    """As an evening's calls are, but without pause: of 20 requests 16 are polls, 1 reads and 1 saves `text`, 2 make a
    notification and acknowledge one."""
    lua = f"""
local turn = 0
local polls = {{"{CHECK.path}", "{PROMPTS_STATUS.path}", "{CHECK.path}", "{GPU_STATUS.path}"}}
local document = [==[{text.decode()}]==]
function request()
  turn = turn + 1
  local step = turn % 20
  if step == 0 then return wrk.format("GET", "{SESSION.path}") end
  if step == 5 then return wrk.format("POST", "{API}/session/save", nil, document) end
  if step == 10 or step == 15 then return acknowledge_or_create() end
  return wrk.format("GET", polls[turn % 4 + 1])
end
"""
    return Load(CHECK.path, _LUA_CREATE + _LUA_ACKNOWLEDGE + lua)


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
                if self.has_ended() or time.monotonic() - began > self.PATIENCE:
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

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def must_run(self) -> None:
        if self.has_ended():
            printed = self._output.read_text(errors="replace")[-1000:]
            raise BenchError(f"{self.name} ended with {self._process.returncode}: {printed}")

    def memory(self, what: str = "VmRSS") -> float:
        """MB that it holds; `VmHWM`: that it held at most since forget_peak()."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+([0-9]+) kB", text)[1]) / 1000

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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

    def was_closed(self) -> bool:
        return bool(select.select([self._connection.sock], [], [], 0)[0])

    def close(self) -> None:
        self._connection.close()


# Each data set that outlives a row has a database of its own; `shared` is emptied between rows.
DATABASES = ("shared", "few", "many", "list", "mixed")


class Bench:
    """The servers and stores of one run of this program, started when they are first asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self._stack = stack
        self._kept: dict[str, Server] = {}
        self.wrk = Wrk(folder)
        # A copy, in a folder of its own, where no .env of this machine is read.
        self.module = Path(shutil.copy(MODULE, folder))
        self.nvidia_smi = self.write_nvidia_smi("nvidia-smi")
        ours = {row.metadata["name"] for row in dataclasses.fields(tests.service.Settings)}
        self._environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.redis = tests.OwnRedis(folder, ["--save", "", "--databases", str(len(DATABASES))])
        stack.callback(self.redis.kill)

    def write_nvidia_smi(self, name: str, seconds: float = 0) -> Path:
        """The tests' stand-in, which takes so long."""
        plan = {"gpus": tests.GOOD, "processes": {"print": "41\n"}, "runs": str(self.folder / "runs")}
        code = f"import time; time.sleep({seconds})\n{tests.NVIDIA_SMI}"
        return tests.write_program(self.folder / name, code, plan)

    def start_service(
        self,
        store: str,
        database: str = "shared",
        data: Path | None = None,
        prefix: Sequence[str] = (),
        **settings: str,
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
            environment["REDIS_URL"] = self.redis_url(database)
        command = [*prefix, sys.executable, self.module]
        return Server(f"service-{store}", command, environment, self.folder, port)

    @contextlib.contextmanager
    def fresh(self, store: str, **options: Any) -> Iterator[Server]:
        """One for a single row."""
        with contextlib.closing(self.start_service(store, **options)) as server:
            yield server

    def keep(self, name: str, start: Callable[[], Server]) -> Server:
        """One that other rows ask for too, by its name. One that ended failed a row, and fails no further one."""
        if name not in self._kept or self._kept[name].has_ended():
            self._kept[name] = start()
            self._stack.callback(self._kept[name].close)
        return self._kept[name]

    def service(self, store: str = "redis") -> Server:
        """One for all the rows that leave nothing behind; its GPU status is a kept one throughout."""
        return self.keep(store, lambda: self.start_service(store, GPU_CACHE_SECONDS="86400"))

    def peer(self) -> Server:
        return self.keep("peer", self._start_peer)

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
        return self.keep("reference", self._start_reference)

    def _start_reference(self) -> Server:
        port = tests.free_port()
        body = json.dumps(self.service().call("GET", GPU_STATUS.path)[1], separators=(",", ":"))
        environment = {**self._environment, "BODY": body, "PORT": str(port)}
        return Server("reference", [sys.executable, "-c", REFERENCE], environment, self.folder, port)

    def redis_url(self, database: str) -> str:
        return f"redis://127.0.0.1:{self.redis.port}/{DATABASES.index(database)}"

    def write(self, database: str = "shared") -> redis.client.Pipeline:
        """Commands for Redis, which execute() sends together."""
        return redis.Redis.from_url(self.redis_url(database), protocol=2).pipeline(transaction=False)

    def flush(self, database: str = "shared") -> None:
        self.write(database).flushdb().execute()


# ======================================================================================================
# Load
# ======================================================================================================


class Run(NamedTuple):
    rate: float  # requests a second
    count: int


class Wrk:
    """Closed loops: each connection asks again as soon as it is answered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    def run(self, server: Server, load: Load, connections: int, seconds: int = 1) -> Run:
        """A run with a wrong answer or a broken connection is void, and is repeated once."""
        for _ in range(2):
            printed = self._run(server, load, connections, seconds)
            wrong = re.search(r"Socket errors.*|Non-2xx.*", printed)
            if not wrong:
                rate = re.search(r"Requests/sec:\s+([0-9.]+)", printed)
                count = re.search(r"([0-9]+) requests in", printed)
                if not rate or not count or count[1] == "0":
                    raise BenchError(f"wrk against {server.name}, {load.path}, measured nothing: {printed[-500:]}")
                return Run(float(rate[1]), int(count[1]))
            say(f"  void, {server.name}: {wrong[0].strip()}")
            server.must_run()
        raise BenchError(f"{load.path} of {server.name} fails under load: {wrong[0].strip()}")

    def _run(self, server: Server, load: Load, connections: int, seconds: int) -> str:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
        command += ["-H", f"Authorization: Bearer {tests.TOKEN}"]
        if load.lua:
            script = self._folder / "load.lua"
            script.write_text(load.lua)
            command += ["-s", str(script)]
        command.append(f"http://127.0.0.1:{server.port}{load.path}")
        if load.lua:
            command += ["--", str(next(self._numbers) * 1_000_000)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            server.must_run()
            raise BenchError(f"wrk failed: {done.stdout[-300:]}{done.stderr[-300:]}")
        return done.stdout


@dataclass(frozen=True)
class Stream:
    """GETs that are due at so many a second, whatever became of those before; each goes out on a free connection."""

    path: str
    rate: float
    connections: int


FORK = multiprocessing.get_context("fork")


def open_loop(server: Server, streams: Sequence[Stream], seconds: float) -> list[list[float]]:
    """For each stream the milliseconds from the moment each was due to its whole answer, in the order of answers.
    Asked by a process of its own, which nothing here delays."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_ask_when_due, args=[server.port, streams, seconds, sender])
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the client ended"
    process.join()
    if isinstance(result, str):
        raise BenchError(f"Open loop against {server.name}: {result}")
    return result


class _Asking:
    """A stream at work."""

    def __init__(self, stream: Stream, port: int) -> None:
        self.interval = 1 / stream.rate
        self.request = f"GET {stream.path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {tests.TOKEN}\r\n\r\n"
        made = (socket.create_connection(("127.0.0.1", port)) for _ in range(stream.connections))
        self.free = collections.deque(made)  # in turn: all of them are used
        self.waiting: collections.deque[float] = collections.deque()  # the moments of those that were due
        self.busy: dict[socket.socket, tuple[float, bytearray]] = {}
        self.next_due = 0.0
        self.took: list[tuple[float, float]] = []  # due, seconds

    def send(self, until: float, end: float) -> None:
        while self.next_due <= until and self.next_due < end:
            self.waiting.append(self.next_due)
            self.next_due += self.interval
        while self.waiting and self.free:
            connection = self.free.popleft()
            self.busy[connection] = (self.waiting.popleft(), bytearray())
            connection.sendall(self.request.encode())

    def receive(self, connection: socket.socket) -> None:
        due, buffer = self.busy[connection]
        data = connection.recv(1 << 20)
        buffer += data
        head, found, body = buffer.partition(b"\r\n\r\n")
        if not data or not head.startswith(b"HTTP/1.1 200"[: len(head)]):
            raise BenchError(f"an answer was {bytes(buffer[:200])!r}")
        if found and len(body) == int(re.search(rb"(?i)content-length: *([0-9]+)", head)[1]):
            self.took.append((due, time.perf_counter() - due))
            del self.busy[connection]
            self.free.append(connection)


def _ask_when_due(port: int, streams: Sequence[Stream], seconds: float, sender: Any) -> None:
    try:
        asking = [_Asking(stream, port) for stream in streams]
        begin = time.perf_counter() + 0.05
        end = begin + seconds
        for one in asking:
            one.next_due = begin
        while time.perf_counter() < end or any(one.busy or one.waiting for one in asking):
            now = time.perf_counter()
            if now > end + 30:
                raise BenchError("an answer is missing after 30 s")
            for one in asking:
                one.send(now, end)
            owners = {connection: one for one in asking for connection in one.busy}
            # select, whose time-out is one of microseconds; that of epoll and poll is one of milliseconds.
            wait = max(0.0, min([one.next_due for one in asking] + [end]) - time.perf_counter()) if now < end else 1.0
            for connection in select.select(list(owners), [], [], wait)[0]:
                owners[connection].receive(connection)
        # What is only slow at first, each connection's own start, is not meant.
        sender.send([[took * 1000 for due, took in one.took if due >= begin + seconds / 20] for one in asking])
    except (OSError, BenchError) as error:
        sender.send(str(error))


@contextlib.contextmanager
def meanwhile(server: Server, *requests: tuple[str, str, bytes | None], status: int = 200) -> Iterator[None]:
    """One client asks these again and again, without a pause, from a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_ask_without_end, args=[server, requests, status, sender], daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(60) or receiver.recv() != "begun":
            raise BenchError("The client beside did not get its first answers.")
        yield
        if receiver.poll(0):
            raise BenchError(f"The client beside: {receiver.recv()}")
    finally:
        process.terminate()
        process.join()


def _ask_without_end(
    server: Server, requests: Sequence[tuple[str, str, bytes | None]], status: int, sender: Any
) -> None:
    client = Client(server)
    for turn in itertools.count():
        for request in requests:
            found = client.call(*request)
            if found[0] != status:
                sender.send(f"{request[:2]} was answered {str(found)[:300]}")
                return
        if turn == 0:
            sender.send("begun")


def percentile_99(milliseconds: Sequence[float]) -> float:
    if len(milliseconds) < 100:
        raise BenchError(f"{len(milliseconds)} answers are too few for a p99")
    return sorted(milliseconds)[int(len(milliseconds) * 0.99)]


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


@dataclass(frozen=True)
class Side:
    """One of the two in a race."""

    server: Server
    load: Load
    connections: int = 4


def race(bench: Bench, ours: Side, other: Side, seconds: int = 1) -> Found:
    """Requests a second of both, in turns (A B B A, five rounds), and the median of the rounds' ratios."""
    order, rounds = ([0, 1], 1) if bench.quick else ([0, 1, 1, 0], 5)
    sides = [ours, other]
    if not bench.quick:  # what is only slow at first is not meant
        for side in sides:
            bench.wrk.run(side.server, side.load, side.connections)
    means: list[list[float]] = []
    for _ in range(rounds):
        rates: list[list[float]] = [[], []]
        for which in order:
            side = sides[which]
            rates[which].append(bench.wrk.run(side.server, side.load, side.connections, seconds).rate)
        means.append([statistics.mean(one) for one in rates])
    ratio = statistics.median(mine / theirs for mine, theirs in means)
    mine, theirs = (statistics.median(side) for side in zip(*means))
    return Found(mine, theirs, ratio)


def compare_answers(ours: Server, other: Server, *calls: tuple[str, str, bytes | None]) -> None:
    """Both give the same status and the same value, or nothing is measured. What each chooses by itself, the id and
    the time of a notification that it makes, is left out."""
    for method, path, body in calls:
        made: dict[str, tuple[int, Any]] = {}
        for server in (ours, other):
            status, value = server.call(method, path, body)
            if path == CREATE.path:
                id = value.pop("id")
                value.pop("timestamp")
                value["acknowledged"] = server.call("POST", f"{API}/notifications/{id}/ack")
                value["acknowledged"][1].pop("notificationId")
            made[server.name] = status, value
        if len({json.dumps(one, sort_keys=True) for one in made.values()}) > 1:
            words = " and ".join(f"{name}: {str(one)[:500]}" for name, one in made.items())
            raise BenchError(f"{method} {path} is answered differently by {words}")


def p99_of_checks(service: Server, rate: float) -> float:
    """Milliseconds; the median of three runs."""
    runs = [open_loop(service, [Stream(CHECK.path, rate, 16)], 5)[0] for _ in range(3)]
    return statistics.median(percentile_99(one) for one in runs)


def part(measure: Callable[[Bench], Sequence[Found]], number: int) -> Measure:
    """One of several figures that are measured together, once."""
    return lambda bench: measure(bench)[number]


def milliseconds_of(times: int, call: Callable[[], Any]) -> float:
    """The median of so many."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def alone(value: float) -> Found:
    return Found(value, None, value)


# -- Polls and reads, beside the peer and the reference


def beside_peer(
    load: Load, fill: Callable[[Bench], None] = Bench.flush, store: str = "redis", connections: int = 4
) -> Measure:
    """The same GET of both, after `fill` filled Redis."""

    def measure(bench: Bench) -> Found:
        fill(bench)
        ours, peer = bench.service(store), bench.peer()
        compare_answers(ours, peer, ("GET", load.path, None))
        return race(bench, Side(ours, load, connections), Side(peer, load, connections))

    return measure


def beside_reference(bench: Bench) -> Found:
    compare_answers(bench.service(), bench.reference(), ("GET", GPU_STATUS.path, None))
    return race(bench, Side(bench.service(), GPU_STATUS), Side(bench.reference(), GPU_STATUS))


def add_pending(bench: Bench, members: dict[bytes, int], database: str = "shared") -> None:
    bench.write(database).zadd("notifications:pending", members).execute()


def fill_pending(bench: Bench) -> None:
    bench.flush()
    add_pending(bench, pending_members(100))


def fill_session(bench: Bench) -> None:
    bench.flush()
    put_session(bench.service(), session_text())
    bench.write().delete("notifications:pending").execute()


def put_session(server: Server, text: bytes, timestamp: int = STAMP) -> None:
    with contextlib.closing(Client(server)) as client:
        client.good("PUT", f"{API}/session/{timestamp}", text)


def beside_own_check(bench: Bench) -> Found:
    fill_session(bench)
    return race(bench, Side(bench.service(), PROMPTS_STATUS), Side(bench.service(), CHECK))


def large_beside_small(bench: Bench) -> Found:
    """Polls of a session of 10 MB, measured by polls of one of 10 KB."""
    bench.flush()
    service, sides = bench.service(), []
    for timestamp, size in ((STAMP + 1, LARGE_SESSION), (STAMP + 2, SMALL_SESSION)):
        put_session(service, session_text(timestamp, **size), timestamp)
        sides.append(Side(service, Load(f"{API}/session/{timestamp}/prompts-status")))
        service.call("GET", sides[-1].load.path)
    return race(bench, *sides)


def add_sessions(bench: Bench, count: int, database: str) -> None:
    """Different ones, put straight into Redis as another program does, and into the service's index."""
    text, pipe = session_text(), bench.write(database)
    for number in range(count):
        timestamp = STAMP + number
        pipe.set(f"session:{timestamp}", text.replace(b"%d" % STAMP, b"%d" % timestamp, 1))
        pipe.zadd("storyteller:sessions", {f"session:{timestamp}": timestamp})
        if number % 20 == 19 or number == count - 1:
            pipe.execute()


@functools.cache
def sessions_in_turn(bench: Bench) -> list[Found]:
    """The race, from the second pass on, and what the service holds after it."""
    count, peer, load = 1000, bench.peer(), turns_load(1000)
    bench.flush()
    add_sessions(bench, count, "shared")
    with bench.fresh("redis") as service, contextlib.closing(Client(service)) as client:
        compare_answers(service, peer, ("GET", PROMPTS_STATUS.path, None))
        for number in range(count):
            client.good("GET", f"{API}/session/{STAMP + number}/prompts-status")
        found = [race(bench, Side(service, load), Side(peer, load), seconds=3), alone(service.memory())]
    bench.flush()
    return found


# -- Writes


def save_beside_peer(bench: Bench) -> Found:
    bench.flush()
    text, ours, peer = session_text(), bench.service(), bench.peer()
    compare_answers(ours, peer, ("POST", f"{API}/session/save", text))
    load = save_load(bench.folder, text)
    return race(bench, Side(ours, load), Side(peer, load))


def save_request(text: bytes, number: int) -> bytes:
    """All of a save, its scriptText another one for each number."""
    body = text.replace(b'"scriptText":"', b'"scriptText":"%015d' % number, 1)
    head = f"POST {API}/session/save HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {tests.TOKEN}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def milliseconds_of_requests(server: Server, requests: Iterable[bytes]) -> float:
    """The median, from the first byte sent to the last received; one after the other, over one connection."""
    took = []
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        for request in requests:
            began = time.perf_counter()
            client.sendall(request)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            told = answer.read()
            took.append((time.perf_counter() - began) * 1000)
            if answer.status != 200:
                raise BenchError(f"A save was answered {answer.status}: {told[:200]!r}")
    return statistics.median(took)


def save_embedded(bench: Bench) -> Found:
    """Milliseconds of a save at one connection, beside those of parsing its text three times and writing it once,
    by plain sqlite3 and as durably, to the same disk."""
    text = session_text()
    rounds = 1 if bench.quick else 5
    plain = sqlite3.connect(bench.folder / "plain.sqlite3", isolation_level=None)
    with contextlib.closing(plain):
        plain.execute("PRAGMA journal_mode = WAL")
        plain.execute("PRAGMA synchronous = FULL")
        plain.execute("CREATE TABLE session (timestamp INTEGER PRIMARY KEY, document BLOB NOT NULL)")
        numbers = itertools.count()

        def write() -> None:
            changed = b"%015d" % next(numbers) + text
            plain.execute("INSERT OR REPLACE INTO session VALUES (?, ?)", (STAMP, changed))

        found = []
        for _ in range(rounds):
            requests = (save_request(text, next(numbers)) for _ in itertools.count())
            save = milliseconds_of_requests(bench.service("embedded"), itertools.islice(requests, 60))
            found.append((save, 3 * milliseconds_of(20, lambda: json.loads(text)) + milliseconds_of(40, write)))
    ours, allowed = (statistics.median(side) for side in zip(*found))
    return Found(ours, allowed, statistics.median(allowed / save for save, allowed in found))


def write_beside_peer(store: str, connections: int) -> Measure:
    """A notification is made, and acknowledged by the next request."""

    def measure(bench: Bench) -> Found:
        bench.flush()
        ours, peer = bench.service(store), bench.peer()
        body = json.dumps({**NEW_NOTIFICATION, "sessionTimestamp": STAMP}).encode()
        compare_answers(ours, peer, ("POST", CREATE.path, body), ("POST", f"{API}/notifications", body))
        return race(bench, *(Side(server, CREATE_AND_ACKNOWLEDGE, connections) for server in (ours, peer)))

    return measure


def shared_fsync(bench: Bench) -> Found:
    """Notifications made a second by 16 writers, beside one, while each fsync takes 10 ms more: strace delays it in
    the service itself, and stops nothing else (seccomp-bpf)."""
    need_program("strace")
    command = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"]
    command += ["-e", "inject=fsync,fdatasync:delay_enter=10000"]
    with bench.fresh("embedded", prefix=command) as service:
        found = race(bench, Side(service, CREATE, 16), Side(service, CREATE, 1))
    if found.other > 100:
        raise BenchError("strace delayed no fsync: one writer alone made more than 100 a second")
    return found


# -- A queue of 100,000


def fill_embedded(folder: Path, members: dict[bytes, int]) -> Path:
    """A data folder whose store holds these. By SQL, since a commit for each would take minutes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "storyteller.sqlite3"
    tests.service.SqliteStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = [(member, time, f"prompts_ready:{number}") for number, (member, time) in enumerate(members.items())]
        database.executemany("INSERT INTO pending (member, time, made) VALUES (?, ?, ?)", rows)
        database.execute("UPDATE newest SET time = ?", (max(members.values()),))
    return folder


FOREIGN = "made-by-another-program-"


def queue_of(bench: Bench, store: str, size: str) -> Server:
    """A service with few (100) or many (100,000) pending notifications of the type that is asked for, the newest
    ones another program's."""

    def start() -> Server:
        members = pending_members(90 if size == "few" else 99_990)
        newest = max(members.values())
        for number in range(10):
            members[pending_member(newest + 1 + number, number, id=f"{FOREIGN}{number}")] = newest + 1 + number
        if store == "embedded":
            return bench.start_service(store, data=fill_embedded(bench.folder / f"queue-{size}", members))
        bench.flush(size)
        add_pending(bench, members, size)
        return bench.start_service(store, size)

    return bench.keep(f"queue {store} {size}", start)


def many_beside_few(load: Load) -> Callable[[str], Measure]:
    def of(store: str) -> Measure:
        return lambda bench: race(
            bench, Side(queue_of(bench, store, "many"), load), Side(queue_of(bench, store, "few"), load)
        )

    return of


def acknowledge_unknown(store: str) -> Measure:
    """Milliseconds of one for an id of another program, or of nobody: the slower of the two."""

    def measure(bench: Bench) -> Found:
        with contextlib.closing(Client(queue_of(bench, store, "many"))) as client:
            numbers = itertools.count()

            def foreign() -> None:
                client.good("POST", f"{API}/notifications/{FOREIGN}{next(numbers)}/ack")

            def unknown() -> None:
                if client.call("POST", f"{API}/notifications/nobody-{next(numbers)}/ack")[0] != 404:
                    raise BenchError("an unknown id was acknowledged")

            return alone(max(milliseconds_of(5, foreign), milliseconds_of(5, unknown)))

    return measure


def check_while_searching(store: str) -> Measure:
    def measure(bench: Bench) -> Found:
        service = queue_of(bench, store, "many")
        with meanwhile(service, ("POST", f"{API}/notifications/nobody/ack", None), status=404):
            return alone(p99_of_checks(service, 100))

    return measure


def check_behind_useless(store: str) -> Measure:
    """Milliseconds of a check whose 100 members stand behind 1,000 that are invalid or of the other type."""

    def measure(bench: Bench) -> Found:
        members = {**useless_members(1000), **pending_members(100)}
        if store == "redis":
            bench.flush()
            add_pending(bench, members)
            options = {}
        else:
            options = {"data": fill_embedded(bench.folder / "useless", members)}
        with bench.fresh(store, **options) as service, contextlib.closing(Client(service)) as client:
            if len(client.good("GET", CHECK.path)["notifications"]) != 100:
                raise BenchError("check does not give the 100 behind those that it leaves out")
            return alone(milliseconds_of(50, lambda: client.good("GET", CHECK.path)))

    return measure


# -- Latency, while much is going on


def latency(busy: bool) -> Callable[[str], Measure]:
    """The p99 of checks at 200 a second on 16 connections; `busy`: beside one client that lists 20 sessions of
    850 KB and saves one of 10 MB, in turns, without a pause."""

    def of(store: str) -> Measure:
        return lambda bench: alone(_latency(bench, store, busy))

    return of


def _latency(bench: Bench, store: str, busy: bool) -> float:
    bench.flush("mixed")
    with bench.fresh(store, database="mixed") as service, contextlib.ExitStack() as beside:
        if busy:
            for number in range(20):
                put_session(service, session_text(STAMP + number), STAMP + number)
            large = STAMP + 99
            save = ("PUT", f"{API}/session/{large}", session_text(large, **LARGE_SESSION))
            beside.enter_context(meanwhile(service, ("GET", f"{API}/session/list?limit=20", None), save))
        return p99_of_checks(service, 200)


def check_beside_slow_gpu(bench: Bench) -> Found:
    """The p99 of checks while 20 a second ask for the GPU of an nvidia-smi that takes 3 s."""
    bench.flush()
    slow = bench.write_nvidia_smi("slow-nvidia-smi", 3)
    streams = [Stream(CHECK.path, 100, 16), Stream(GPU_STATUS.path, 20, 100)]
    with bench.fresh("redis", NVIDIA_SMI=str(slow)) as service:
        return alone(percentile_99(open_loop(service, streams, 16)[0]))


def check_beside_idle(bench: Bench) -> Found:
    """Two services, of which one holds 400 connections that ask nothing more."""
    bench.flush()
    with bench.fresh("redis") as crowded, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(crowded))) for _ in range(400)]
        for client in clients:
            client.good("GET", GPU_STATUS.path)
        found = race(bench, Side(crowded, CHECK), Side(bench.service(), CHECK))
        if lost := sum(client.was_closed() for client in clients):
            raise BenchError(f"{lost} of the 400 idle connections were closed meanwhile")
        return found


# -- Start, memory, CPU


def start_time(bench: Bench) -> Found:
    """Seconds from the start of the process to its first 200, on a data folder that is there already."""
    took = []
    for _ in range(4 if bench.quick else 8):
        with bench.fresh("embedded", data=bench.folder / "data-of-starts") as service:
            took.append(service.start_seconds)
    return alone(statistics.median(took[1:]))


def idle_memory(store: str) -> Measure:
    def measure(bench: Bench) -> Found:
        with bench.fresh(store) as service:
            service.call("GET", CHECK.path)
            time.sleep(1)
            return alone(service.memory())

    return measure


@functools.cache
def idle_cpu(bench: Bench) -> list[Found]:
    """Percent of a core over 20 s in which nobody calls, of both stores."""
    with bench.fresh("redis") as one, bench.fresh("embedded") as other:
        time.sleep(2)
        before = [server.cpu_seconds() for server in (one, other)]
        time.sleep(20)
        return [alone((server.cpu_seconds() - used) / 20 * 100) for server, used in zip((one, other), before)]


def growth(bench: Bench) -> Found:
    """MB that it grew by from the 50,000th to the 200,000th request."""
    bench.flush()
    with bench.fresh("redis") as service:
        text = session_text(STAMP, **SMALL_SESSION)
        put_session(service, text)
        load, done, before = mixed_load(text), 0, 0.0
        while done < 200_000:
            done += bench.wrk.run(service, load, 4, 5).count
            if not before and done >= 50_000:
                before = service.memory()
        return alone(service.memory() - before)


@functools.cache
def list_of(bench: Bench, store: str) -> list[Found]:
    """MB more at the most while it lists 200 of 200 sessions of 850 KB, and the milliseconds of a list of 20."""
    data = None
    if store == "redis":
        add_sessions(bench, 200, "list")
    else:
        data = bench.folder / "list"
        data.mkdir()
        text = session_text()
        with contextlib.closing(tests.service.SqliteStore(data / "storyteller.sqlite3")) as made:
            for number in range(200):
                made.save(STAMP + number, text.replace(b"%d" % STAMP, b"%d" % (STAMP + number), 1), None)
    with bench.fresh(store, database="list", data=data) as service, contextlib.closing(Client(service)) as client:
        client.good("GET", CHECK.path)
        before = service.memory()
        service.forget_peak()
        if client.good("GET", f"{API}/session/list?limit=200")["count"] != 200:
            raise BenchError("the list does not hold the 200 sessions")
        memory = alone(service.memory("VmHWM") - before)
        client.good("GET", f"{API}/session/list?limit=20")
        return [memory, alone(milliseconds_of(15, lambda: client.good("GET", f"{API}/session/list?limit=20")))]


def lists(store: str) -> Callable[[Bench], list[Found]]:
    return lambda bench: list_of(bench, store)


# ======================================================================================================
# The rows
# ======================================================================================================


@dataclass(frozen=True)
class Row:
    """One line of the table. `target`: of what was measured beside another, the least ratio that is wanted; else the
    most of the figure."""

    what: str
    other: str  # who it is measured beside; "" for nobody
    measure: Measure
    target: float
    unit: str = "/s"
    quick: bool = True  # short enough for --quick


def each(what: str, other: str, measure: Callable[[str], Measure], *rest: Any, quick: bool = False) -> list[Row]:
    """One for each store."""
    names = {"redis": "Redis", "embedded": "embedded"}
    return [Row(f"{what}, {name}", other, measure(store), *rest, quick=quick) for store, name in names.items()]


ROWS = (
    Row("gpu/status, cached", "reference", beside_reference, 1.3),
    Row("gpu/status, cached", "peer", beside_peer(GPU_STATUS), 1.3),
    Row("check, empty queue, Redis", "peer", beside_peer(CHECK), 1.2),
    Row("check, empty queue, Redis, 1 connection", "peer", beside_peer(CHECK, connections=1), 1.0),
    Row("check, empty queue, Redis, 64 connections", "peer", beside_peer(CHECK, connections=64), 1.8),
    Row("check, empty queue, embedded", "peer on Redis", beside_peer(CHECK, store="embedded"), 1.5),
    Row("check, 100 pending", "peer", beside_peer(CHECK, fill_pending), 5.0),
    Row("prompts-status, 850 KB, unchanged", "peer", beside_peer(PROMPTS_STATUS, fill_session), 10.0),
    Row("prompts-status, 850 KB, unchanged", "own empty check", beside_own_check, 0.8),
    Row("prompts-status, 10 MB, warm", "one of 10 KB", large_beside_small, 0.8),
    Row("prompts-status, 1,000 of 850 KB in turn", "peer", part(sessions_in_turn, 0), 1.0, quick=False),
    Row("memory after these", "", part(sessions_in_turn, 1), 200, "MB", quick=False),
    Row("GET of an 850 KB session", "peer", beside_peer(SESSION, fill_session), 1.0),
    Row("save of an 850 KB session, Redis", "peer", save_beside_peer, 0.9),
    Row("save of an 850 KB session, embedded", "3 times parsing + a write", save_embedded, 1.0, "ms"),
    *each("list of 200 of 850 KB, more memory", "", lambda store: part(lists(store), 0), 30, "MB"),
    *each("list of 20 of 850 KB, unchanged", "", lambda store: part(lists(store), 1), 10, "ms"),
    *each("check, 100,000 pending", "100 pending", many_beside_few(CHECK), 0.7),
    *each("create and ack, 100,000 pending", "100 pending", many_beside_few(CREATE_AND_ACKNOWLEDGE), 0.7),
    *each("ack of an unknown id, 100,000 pending", "", acknowledge_unknown, 400, "ms"),
    *each("check's p99 meanwhile", "", check_while_searching, 50, "ms"),
    *each("check, 1,000 useless in front", "", check_behind_useless, 5, "ms", quick=True),
    Row("create and ack, Redis, 1 connection", "peer", write_beside_peer("redis", 1), 1.0),
    Row("create and ack, Redis", "peer", write_beside_peer("redis", 4), 0.9),
    Row("create and ack, embedded", "peer on Redis", write_beside_peer("embedded", 4), 0.7),
    Row("create, fsync of 10 ms, 16 writers", "1 writer", shared_fsync, 4.0, quick=False),
    Row("check's p99, nvidia-smi taking 3 s", "", check_beside_slow_gpu, 20, "ms", quick=False),
    *each("check's p99, open loop", "", latency(busy=False), 8, "ms"),
    *each("check's p99 beside lists and saves of 10 MB", "", latency(busy=True), 100, "ms"),
    Row("check, 400 idle connections", "without them", check_beside_idle, 0.7, quick=False),
    Row("process start to the first 200", "", start_time, 0.4, "s"),
    *each("memory, idle", "", idle_memory, 50, "MB", quick=True),
    Row("growth, 50,000th to 200,000th request", "", growth, 5, "MB", quick=False),
    *each("CPU, idle", "", lambda store: part(idle_cpu, ["redis", "embedded"].index(store)), 0.2, "% of a core"),
)


# ======================================================================================================
# The report
# ======================================================================================================


def figure(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit if unit.startswith('/') else f' {unit}'}"


def line_of(row: Row, found: Found) -> str:
    ours, answer = figure(found.ours, row.unit), "yes" if held(row, found) else "no"
    if row.other:
        cells = [row.what, ours, f"{row.other}: {figure(found.other, row.unit)}", f"{found.compared:.2f}"]
        cells += [f"{row.target:g}", answer]
    else:
        cells = [row.what, ours, "", "", f"at most {row.target:g} {row.unit}", answer]
    return f"| {' | '.join(cells)} |"


def held(row: Row, found: Found, slack: float = 0.0) -> bool:
    if row.other:
        return found.compared >= row.target * (1 - slack)
    return found.compared <= row.target * (1 + slack)


def circumstances() -> str:
    redis_version = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout.split()[2]
    cores = len(os.sched_getaffinity(0))
    day = time.strftime("%Y-%m-%d")
    return f"{day}, {cores} cores, Python {platform.python_version()}, Redis {redis_version.removeprefix('v=')}:"


HEAD = "| what | service | beside | ratio | target | held |\n| --- | --- | --- | --- | --- | --- |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the service beside a peer and a reference.")
    parser.add_argument("--quick", action="store_true", help="the short rows, once each; no target counts")
    parser.add_argument("--only", metavar="REGEX", default="", help="the rows whose name matches")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with this
    rows = [row for row in ROWS if re.search(options.only, f"{row.what} {row.other}")]
    rows = [row for row in rows if row.quick or not options.quick]
    lines, missed, errors = [], 0, 0
    with contextlib.ExitStack() as stack:
        need_program("wrk")
        need_program("redis-server")
        # Not in /tmp, which may be memory, where an fsync costs nothing.
        cache_folder().mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="storyteller-bench-", dir=cache_folder())
        folder = Path(stack.enter_context(made))
        bench = Bench(folder, stack, options.quick)
        for row in rows:
            began = time.monotonic()
            try:
                found = row.measure(bench)
            except (BenchError, OSError, http.client.HTTPException, redis.RedisError) as error:
                say(f"ERROR {row.what}: {type(error).__name__}: {error}")
                lines.append(f"| {row.what} | not measured | {row.other} | | | no |")
                errors += 1
                continue
            lines.append(line_of(row, found))
            missed += not held(row, found, 0.1)
            say(f"{lines[-1]}  {time.monotonic() - began:.0f} s")
    print("\n".join([circumstances(), "", HEAD, *lines]))
    if errors:
        return 2
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())

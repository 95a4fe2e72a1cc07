"""What most people would write for the same routes, with the same keys in Redis; nothing in it is slow on purpose.

It trusts what is in Redis more than the service does, knows one token, and has no SwarmUI, no limits and no log.
bench.py runs it under uvicorn, with its PEER_PACKAGES.
"""

import asyncio
import json
import os
import secrets
import time
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

import redis.asyncio as redis
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

API_TOKEN = os.environ["STORYTELLER_API_TOKEN"]
NVIDIA_SMI = os.environ["NVIDIA_SMI"]
GPU_CACHE_SECONDS = float(os.environ.get("GPU_CACHE_SECONDS", "5"))
WEEK = 7 * 24 * 3600
PENDING = "notifications:pending"
Kind = Literal["prompts_ready", "beats_ready"]

store = redis.Redis.from_url(os.environ["REDIS_URL"])

bearer = HTTPBearer(auto_error=False)


async def authorize(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    if credentials is None:
        raise HTTPException(401, "A token is needed", {"WWW-Authenticate": "Bearer"})
    if not secrets.compare_digest(credentials.credentials.encode(), API_TOKEN.encode()):
        raise HTTPException(401, "The token is unknown", {"WWW-Authenticate": "Bearer"})


app = FastAPI()
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
gpu_cached: tuple[float, GpuStatus] | None = None


async def run_nvidia_smi(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(NVIDIA_SMI, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 5)
    if process.returncode:
        raise HTTPException(500, "nvidia-smi failed")
    return output.decode()


async def query_gpus() -> GpuStatus:
    query = "--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,count"
    gpus, processes = await asyncio.gather(
        run_nvidia_smi(query, "--format=csv,noheader,nounits"),
        run_nvidia_smi("--query-compute-apps=pid", "--format=csv,noheader"),
    )
    rows = [[float(cell) for cell in line.split(",")] for line in gpus.splitlines()]
    utilization, used, total, temperatures, _ = zip(*rows)
    return GpuStatus(
        available=True,
        gpuCount=len(rows),
        utilization=round(sum(utilization) / len(rows)),
        memoryUsed=round(sum(used)),
        memoryTotal=round(sum(total)),
        temperature=round(max(temperatures)),
        processCount=len(set(processes.split())),
    )


@api.get("/gpu/status")
async def gpu_status() -> GpuStatus:
    global gpu_cached
    if gpu_cached and time.monotonic() - gpu_cached[0] < GPU_CACHE_SECONDS:
        return gpu_cached[1]
    async with gpu_lock:
        if not gpu_cached or time.monotonic() - gpu_cached[0] >= GPU_CACHE_SECONDS:
            gpu_cached = (time.monotonic(), await query_gpus())
    return gpu_cached[1]


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


async def make_notification(new: NewNotification) -> tuple[Notification, bool]:
    """The pending one of the same type and session where there is one, else a new one."""
    made = f"storyteller:made:{new.type}:{new.sessionTimestamp}"
    before = await store.get(made)
    if before and await store.zscore(PENDING, before) is not None:
        return Notification(**json.loads(before)), False
    now = now_ms()
    value = {"id": f"notif_{now}_{secrets.token_hex(8)}", **new.model_dump(exclude_none=True), "timestamp": iso(now)}
    member = json.dumps({**value, "acknowledged": False}).encode()
    async with store.pipeline(transaction=True) as pipe:
        pipe.set(made, member, ex=WEEK)
        pipe.zadd(PENDING, {member: now})
        await pipe.execute()
    return Notification(**value), True


@api.get("/notifications/check", response_model_exclude_none=True)
async def check(
    type: Literal["prompts_ready", "beats_ready", "all"] = "prompts_ready",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Notifications:
    found = []
    for member in await store.zrangebyscore(PENDING, now_ms() - WEEK * 1000, "+inf"):
        notification = Notification(**json.loads(member))
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
    found = {"totalPrompts": prompts, "totalBeats": beats, "storyUuid": session.get("storyUuid") or ""}
    await make_notification(NewNotification(type=kind, sessionTimestamp=timestamp, episodeNumber=episode, **found))
    await store.hset(f"storyteller:session:{timestamp}", "announced", kind)


@api.get("/session/{timestamp}/prompts-status")
async def prompts_status(timestamp: int) -> PromptsStatus:
    document, meta = await read_session(timestamp)
    session = json.loads(document)
    beats, prompts, ready = progress(session)
    if ready:
        await announce(timestamp, session, meta.get(b"announced", b"").decode())
    return PromptsStatus(
        promptsReady=ready,
        sessionTimestamp=timestamp,
        totalBeats=beats,
        totalPrompts=prompts,
        lastUpdated=iso(int(meta.get(b"saved", timestamp))),
    )


@api.get("/session/{timestamp}")
async def session_get(timestamp: int):
    document, _ = await read_session(timestamp)
    return JSONResponse({"success": True, "data": json.loads(document), "storage": "redis"})


@api.post("/session/save")
async def session_save(session: dict[str, Any]):
    timestamp = int(session.get("timestamp") or now_ms())
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
    return {"success": True, "message": "Session saved", "sessionKey": f"session:{timestamp}", "storage": "redis"}


app.include_router(api)

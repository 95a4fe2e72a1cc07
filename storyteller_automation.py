"""StoryTeller automation: the service that joins StoryArt, StorySwarm and SwarmUI on the render PC.

It says whether the GPU is free, starts SwarmUI and waits until it answers, hands notifications from one
program to the other until they are acknowledged, and says when a session's prompts are complete. One
process under waitress; sessions and notifications live in Redis, or in SQLite where no Redis is named.

The rooms of this file, each under a banner, each knowing only those above it:

    settings                    one table: name, default, how it is read, what it means
    errors                      the exceptions that mean an answer, each with its status
    values                      JSON that is strict, times, whole numbers
    this system                 what differs between Windows, Linux and macOS: files, sockets, the console; processes
    batching                    questions of one moment share one step
    stores: the interface       the verbs that both have; then Redis and SQLite, in the same order
    Redis                       connections and scripts, each one atomic step; the store
    sessions                    a document (pure): how many prompts, is it ready, its summary; its facts, cached
    notifications               what one is, which are valid, when a session announces one
    GPU                         the parser (pure) and the monitor (one run at a time, kept 5 s)
    SwarmUI: the probe          what answers at its URL, and whose pages it answers
    SwarmUI: the launcher       what to launch, and the one owner of the start
    authentication              tokens, permissions, trusted pages, names of this PC
    HTTP application            what comes in; the handlers; the routes, one table; who answers; the short way
    server                      sockets and waitress's settings with their reasons; connections; how it runs and ends
    command line                serve, check, token

The way of a request: a connection of the server, a thread, the routes of its path, who calls, the check of its input,
its handler, a verb of the store, a Response, JSON. The way of a poll is shorter: a connection, what its bytes meant the
last time, who calls, one glance of the store for all polls of that moment, a Response that is made already.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

import bottle
import redis
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.trigger
import waitress.wasyncore

T = TypeVar("T")

log = logging.getLogger("storyteller")
log.addHandler(logging.NullHandler())  # until the service starts its log nobody is told

# ======================================================================================================
# Settings
# ======================================================================================================

HERE = Path(__file__).resolve().parent


class SettingError(Exception):
    """A setting that cannot be used: one sentence that names it and says what was expected."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    """0 or more; finite, since a wait of `inf` seconds overflows in the system's own calls."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise ValueError("seconds, from 0 to 86400")
    return seconds


def _positive_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds == 0:
        raise ValueError("seconds, more than 0")
    return seconds


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", text):
        raise ValueError("a host name or an IP address")
    return text


def _path(text: str) -> Path:
    """Relative to this module: a relative path in .env must mean one folder, wherever the start came from."""
    try:
        path = HERE / Path(text).expanduser()
        os.fsencode(path)
    except (RuntimeError, UnicodeError):
        raise ValueError("a path") from None
    if "\0" in text:
        raise ValueError("a path")
    return path


def _program(text: str) -> str:
    """A bare name is looked up on PATH; anything with a folder in it is a path."""
    return text if os.path.basename(text) == text else str(_path(text))


def _token(text: str) -> str:
    if not re.fullmatch(r"[!-+\--~]{16,1024}", text):
        raise ValueError("16 to 1024 printable ASCII characters without spaces or commas")
    return text


def _cookie(text: str) -> str:
    if not re.fullmatch(r"[!#-+\--:<-\[\]-~]{1,4096}", text):
        raise ValueError("a cookie's value: printable ASCII without spaces, quotes, commas, semicolons, backslashes")
    return text


def _redis_url(text: str) -> str:
    try:
        if not re.fullmatch(r"unix://.*|rediss?://[^/]*(/[0-9]*)?(\?.*)?", text):
            raise ValueError  # redis-py takes a database that is no number for 0
        redis.ConnectionPool.from_url(text).make_connection()  # not connected yet; an unknown option is told here
    except (ValueError, TypeError, AttributeError):
        raise ValueError("redis://[user:password@]host[:port][/database]") from None
    return text


def _http_url(text: str) -> str:
    expected = ValueError("http://host[:port] or https://host[:port], without user, query or fragment")
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port  # raises for what is no port
    except ValueError:
        raise expected from None
    good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not good or parts.username is not None or re.search(r"[^!-~]|[?#]", text):
        raise expected
    return text.rstrip("/")


def _origin(text: str) -> str:
    """One origin, exactly as browsers send it: what differs from that would never match."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?", text)
    good = found and int(found[3] or 1) < 65536 and (found[1], found[3]) not in (("http", "80"), ("https", "443"))
    if good and re.search(r"\]$|(^|\.)[0-9]+\.?$", found[2]):  # an address has one spelling
        try:
            address = ipaddress.ip_address(found[2].strip("[]"))
            good = found[2] == (f"[{address.compressed}]" if address.version == 6 else str(address))
        except ValueError:
            good = False
    if not good or ".." in found[2]:
        raise ValueError("an origin as browsers send it, like http://localhost:3000, without a slash at its end")
    return text


def _origin_or_all(text: str) -> str:
    return text if text == "*" else _origin(text)


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text.lower()

    return read


def _list(text: str) -> list[str]:
    """Separated by commas or spaces; `none` is an empty one."""
    return [] if text.lower() == "none" else re.findall(r"[^,\s]+", text)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(_origin(one) for one in _list(text))


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(_host(one).lower() for one in _list(text))
    if any(":" in name for name in names):
        raise ValueError("names without ports")  # any port is allowed; an IP address need not be named
    return names


def _words(text: str) -> tuple[str, ...]:
    return split_arguments(text)  # of "this system": each system's shell has its own rules


def _option(name: str, default: Any, read: Callable[[str], Any], meaning: str, *, secret: bool = False) -> Any:
    """One row of the table below: a field of Settings with the name, the reader and the meaning beside it."""
    metadata = {"name": name, "read": read, "meaning": meaning, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. Seconds are floats; an unset path, URL or token is None."""

    host: str = _option(
        "STORYTELLER_HOST", "localhost", _host, "address to listen on; localhost is 127.0.0.1 and ::1, on one port"
    )
    port: int = _option("STORYTELLER_PORT", 8000, _whole(0, 65535), "port to listen on; 0 picks a free one")
    data_dir: Path = _option(
        "STORYTELLER_DATA_DIR", HERE / "data", _path, "folder for the embedded store, the API token and the logs"
    )
    api_token: str | None = _option(
        "STORYTELLER_API_TOKEN", None, _token, "the service's own token; made at first start unless set", secret=True
    )
    cors_origins: tuple[str, ...] = _option(
        "STORYTELLER_CORS_ORIGINS",
        ("http://localhost:3000", "http://localhost:5173", "http://127.0.0.1:3000", "http://127.0.0.1:5173"),
        _origins,
        "origins of pages that may call with a token; none switches it off",
    )
    trusted_origins: tuple[str, ...] = _option(
        "STORYTELLER_TRUSTED_ORIGINS", (), _origins, "origins of pages on this PC that may call without one"
    )
    allowed_hosts: tuple[str, ...] = _option(
        "STORYTELLER_ALLOWED_HOSTS", (), _hosts, "further names of this PC that a call's Host header may hold"
    )
    token_failures: int = _option(
        "STORYTELLER_TOKEN_FAILURES", 20, _whole(1, 1_000_000), "wrong tokens a minute that one address may send"
    )
    log_level: str = _option(
        "STORYTELLER_LOG_LEVEL", "info", _one_of("debug", "info", "warning", "error"), "debug shows each poll too"
    )
    log_format: str = _option("STORYTELLER_LOG_FORMAT", "text", _one_of("text", "json"), "text or json, a line each")
    redis_url: str | None = _option(
        "REDIS_URL", None, _redis_url, "the Redis to use; wins over the two below", secret=True
    )
    redis_host: str | None = _option("REDIS_HOST", None, _host, "the Redis to use; 127.0.0.1 when only the port is set")
    redis_port: int | None = _option("REDIS_PORT", None, _whole(1, 65535), "its port; 6379 when only the host is set")
    nvidia_smi: str | None = _option(
        "NVIDIA_SMI", None, _program, "the nvidia-smi program; looked for on PATH unless set"
    )
    gpu_cache_seconds: float = _option("GPU_CACHE_SECONDS", 5.0, _seconds, "how long a GPU status is kept")
    swarmui_api_url: str = _option(
        "SWARMUI_API_URL", "http://localhost:7801", _http_url, "where SwarmUI answers, http or https"
    )
    swarmui_path: Path | None = _option(
        "SWARMUI_PATH", None, _path, "SwarmUI's folder, its launch script or its executable"
    )
    swarmui_args: tuple[str, ...] = _option("SWARMUI_ARGS", (), _words, "further arguments for SwarmUI")
    swarmui_token: str | None = _option(
        "SWARMUI_TOKEN", None, _cookie, "sent to SwarmUI as the cookie swarm_token", secret=True
    )
    swarmui_allow_origin: str | None = _option(
        "SWARMUI_ALLOW_ORIGIN",
        None,
        _origin_or_all,
        "the page that SwarmUI is told to answer; * is every one",
    )
    start_timeout: float = _option(
        "SWARMUI_START_TIMEOUT", 30.0, _positive_seconds, "how long a start waits for SwarmUI to answer"
    )
    poll_interval: float = _option("SWARMUI_POLL_INTERVAL", 2.0, _positive_seconds, "seconds between two probes")
    health_timeout: float = _option("SWARMUI_HEALTH_TIMEOUT", 2.0, _positive_seconds, "seconds for one probe")
    start_interval: float = _option("SWARMUI_START_INTERVAL", 60.0, _positive_seconds, "seconds between two launches")

    @property
    def redis_address(self) -> str | None:
        """The URL of the Redis to use; None means the embedded store."""
        if self.redis_url or not (self.redis_host or self.redis_port):
            return self.redis_url
        host = self.redis_host or "127.0.0.1"
        return f"redis://{f'[{host}]' if ':' in host else host}:{self.redis_port or 6379}/0"

    @property
    def swarmui_port(self) -> int:
        parts = urllib.parse.urlsplit(self.swarmui_api_url)
        return parts.port or (443 if parts.scheme == "https" else 80)


def read_env_file(path: Path) -> dict[str, str]:
    """The KEY=VALUE lines of a .env file; {} when there is none. Backslashes are literal (Windows paths)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise SettingError(f"{path} is not UTF-8: save it as UTF-8 in your editor.") from None
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({error.strerror}): mend or remove it.") from None
    values = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", line)
        if not found:
            raise SettingError(f"{path}, line {number}: expected KEY=VALUE, or a comment that begins with #.")
        name, value = found.groups()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[name] = value
    return values


def load_settings(
    arguments: Mapping[str, str | None], environ: Mapping[str, str], env_file: Path = HERE / ".env"
) -> Settings:
    """Arguments (by field name) win over the environment, that over `env_file`; an empty value counts as unset."""
    from_file = read_env_file(env_file)
    values = {}
    for row in dataclasses.fields(Settings):
        name = row.metadata["name"]
        text = arguments.get(row.name) or environ.get(name) or from_file.get(name)
        if not text:
            continue
        try:
            values[row.name] = row.metadata["read"](text)
        except ValueError as expected:
            shown = "cannot be used" if row.metadata["secret"] else f"is {text!r}"
            raise SettingError(f"{name} {shown}: expected {expected}.") from None
    return Settings(**values)


# ======================================================================================================
# Errors
# ======================================================================================================


class ApiError(Exception):
    """An answer other than 2xx: a sentence for the caller, its status, and when to come back (seconds)."""

    status = 500

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


class BadRequest(ApiError):
    status = 400


class Unauthorized(ApiError):
    status = 401


class Forbidden(ApiError):
    status = 403


class NotFound(ApiError):
    status = 404


class Conflict(ApiError):
    status = 409


class ContentTooLarge(ApiError):
    status = 413


class UnsupportedMediaType(ApiError):
    """A body of another content type."""

    status = 415


class MisdirectedRequest(ApiError):
    """A Host header that names another machine."""

    status = 421


class TooManyRequests(ApiError):
    status = 429


class Unavailable(ApiError):
    """The store does not answer, or every place for a request that waits is taken."""

    status = 503


class StartError(Exception):
    """The service cannot start: one sentence for the person in front of it, exit code 2."""


# ======================================================================================================
# Values: JSON, times, numbers
# ======================================================================================================

MAX_DEPTH = 100  # levels of a request's body: writing back what is nested much deeper would fail


def parse_json(data: bytes, *, from_request: bool = False) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity (which browsers refuse), nothing that cannot be written back; in a
    request also no key twice, and MAX_DEPTH levels at most. Raises ValueError with what is wrong."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"the number {text[:40]} is too large")
        return number

    def whole(text: str) -> int:
        if len(text) > 300:  # it may be too large for a double, as which JavaScript reads it
            finite(text)
        return int(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=refuse,
            parse_float=finite,
            parse_int=whole,
            object_pairs_hook=unique if from_request else None,
        )
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written back
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a string") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if from_request and isinstance(value, (dict, list)) and _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"nested too deeply: {MAX_DEPTH} levels at most")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        if not level:
            break
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]
    return bool(level)


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def iso_time(ms: int) -> str:
    """ISO 8601 in UTC with `Z`; the milliseconds only where there are some. Raises OverflowError past year 9999."""
    moment = _EPOCH + timedelta(milliseconds=ms)  # Windows' own conversion ends at the year 3000
    return moment.isoformat(timespec="milliseconds" if ms % 1000 else "seconds").replace("+00:00", "Z")


def read_time(value: object) -> int | None:
    """Milliseconds of an ISO 8601 string (UTC unless it says otherwise) or of a number of them; None for the rest."""
    try:
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", value):
            moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", value))
            ms = round((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            ms = int(value)
        else:
            return None
        iso_time(ms)
    except (ValueError, OverflowError):
        return None
    return ms


def is_whole(value: object) -> bool:
    """5 and 5.0, not True: JSON has one kind of number, and JavaScript writes whole ones either way."""
    return value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


LARGEST = 2**53  # past it a whole number is not the same in JavaScript


def is_count(value: object) -> bool:
    return is_whole(value) and 0 <= value <= LARGEST


def bound(kept: dict[Any, Any], most: int) -> None:
    """Drop the oldest past so many."""
    while len(kept) > most:
        del kept[next(iter(kept))]


# ======================================================================================================
# This system: files, sockets, the console
# ======================================================================================================

WINDOWS = os.name == "nt"
MACOS = sys.platform == "darwin"

# Windows repeats a refused connection for about 2 s before it says so; a probe's time-out may come first.
REFUSAL_IS_SLOW = WINDOWS

LAUNCH_SCRIPTS = ("launch-windows.bat", "launch-linux.sh", "launch-macos.sh")
LAUNCH_SCRIPT = LAUNCH_SCRIPTS[0 if WINDOWS else 2 if MACOS else 1]


def split_arguments(text: str) -> tuple[str, ...]:
    """Split as this system's shell does. Raises ValueError, with what was expected."""
    if WINDOWS:
        count = ctypes.c_int()
        shell32 = ctypes.WinDLL("shell32")
        shell32.CommandLineToArgvW.restype = ctypes.POINTER(ctypes.c_wchar_p)
        # The first word follows other rules, as it names the program: put one there.
        words = shell32.CommandLineToArgvW(ctypes.c_wchar_p(f"program {text}"), ctypes.byref(count))
        return tuple(words[1 : count.value])  # a few hundred bytes a start, never freed
    try:
        return tuple(shlex.split(text))
    except ValueError:
        raise ValueError("arguments with quotes that are closed") from None


def nvidia_smi_places() -> list[str]:
    """Where nvidia-smi is when it is not on PATH (old Windows drivers put it beside the driver)."""
    if WINDOWS:
        system = os.environ.get("SYSTEMROOT", r"C:\Windows")
        programs = os.environ.get("PROGRAMW6432", r"C:\Program Files")
        return [rf"{system}\System32\nvidia-smi.exe", rf"{programs}\NVIDIA Corporation\NVSMI\nvidia-smi.exe"]
    return []


def write_private(path: Path, text: str) -> None:
    """Create `path`, readable by its owner only and whole or not at all. Raises FileExistsError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(draft, "x", encoding="ascii", opener=_open_private) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if WINDOWS:
            os.rename(draft, path)  # refuses to replace, unlike on POSIX
        else:
            os.link(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _open_private(path: str, flags: int) -> int:
    """An opener for open(..., "x"): private from the first moment, not made so afterwards."""
    if WINDOWS:
        return _open_windows(path, access=0x4000_0000, creation=1, owner_only=True)  # GENERIC_WRITE, CREATE_NEW
    return os.open(path, flags, 0o600)


def open_log(path: Path) -> int:
    """A descriptor that only appends, wherever another handle truncated the file meanwhile."""
    if WINDOWS:
        return _open_windows(str(path), access=0x0004 | 0x0010_0000, creation=4)  # FILE_APPEND_DATA, OPEN_ALWAYS
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _win32(library: str, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of Windows with its types: without them ctypes cuts handles and pointers to 32 bits."""
    function = getattr(ctypes.WinDLL(library, use_last_error=True), name)
    function.restype, function.argtypes = result, arguments
    return function


def _open_windows(path: str, access: int, creation: int, owner_only: bool = False) -> int:
    """CreateFileW: what `open` cannot say, namely who may read the file and an access that only appends."""
    import msvcrt

    void, word, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_wchar_p
    security = (ctypes.c_size_t * 3)(ctypes.sizeof(ctypes.c_size_t * 3), 0, 0)  # SECURITY_ATTRIBUTES
    if owner_only:
        # Protected from inheritance; all rights to this user, none to anybody else.
        convert = _win32(
            "advapi32", "ConvertStringSecurityDescriptorToSecurityDescriptorW", word, text, word, void, void
        )
        if not convert(f"D:P(A;;FA;;;{_user_sid()})", 1, ctypes.byref(security, ctypes.sizeof(void)), None):
            raise ctypes.WinError(ctypes.get_last_error())
    create = _win32("kernel32", "CreateFileW", void, text, word, word, void, word, word, void)
    every_share = 0x7  # read, write, delete: SwarmUI keeps its log open while others read or shorten it
    handle = create(path, access, every_share, ctypes.byref(security), creation, 0x80, None)
    if handle == void(-1).value:
        raise ctypes.WinError(ctypes.get_last_error())
    return msvcrt.open_osfhandle(handle, os.O_WRONLY | os.O_APPEND | os.O_BINARY)


def _user_sid() -> str:
    """The name by which Windows' access rights know the user that this process runs as."""
    void, word = ctypes.c_void_p, ctypes.c_uint32
    token, size, sid = void(), word(), ctypes.c_wchar_p()
    process = _win32("kernel32", "GetCurrentProcess", void)()
    _win32("advapi32", "OpenProcessToken", word, void, word, void)(process, 8, ctypes.byref(token))  # TOKEN_QUERY
    about = _win32("advapi32", "GetTokenInformation", word, void, word, void, word, void)
    about(token, 1, None, 0, ctypes.byref(size))  # TokenUser: first its size
    user = ctypes.create_string_buffer(size.value)
    if not about(token, 1, user, size, ctypes.byref(size)):
        raise ctypes.WinError(ctypes.get_last_error())
    _win32("kernel32", "CloseHandle", word, void)(token)
    first = ctypes.cast(user, ctypes.POINTER(void))[0]
    if not _win32("advapi32", "ConvertSidToStringSidW", word, void, void)(first, ctypes.byref(sid)):
        raise ctypes.WinError(ctypes.get_last_error())
    return sid.value or ""


def lock_file(path: Path) -> Any:
    """The open file, locked until it is closed or this process ends; None when another process holds the lock.
    What it contains can be read meanwhile."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the lock is held
    try:
        if WINDOWS:
            import msvcrt

            file.seek(1 << 20)  # past what is written: a locked byte could not be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def descriptor_limit() -> int:
    """How many sockets and files this process may hold; `select` on Windows takes 512 sockets."""
    if WINDOWS:
        return 512
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def listen(address: str, port: int) -> socket.socket:
    """A listening socket that no other program shares. Raises OSError."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if WINDOWS:
            # SO_REUSEADDR there lets two programs share a port; without either, a third may still take it over.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections in TIME_WAIT only
        if ":" in address:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == "::" else 1)
        made.bind((address, port))
        made.listen(1024)  # on Linux two sockets may bind one port; the second to listen is refused
        return made
    except OSError:
        made.close()
        raise


GRACE = 5.0  # seconds for requests in flight once told to stop
CLOSING_GRACE = 3.0  # the same where Windows ends us 5 s after the console's closing


def on_end_signal(stop: Callable[[float], None], ended: threading.Event) -> object:
    """Call stop(grace in seconds) when this process is told to end: SIGINT, SIGTERM; on Windows Ctrl+C, Ctrl+Break,
    and the console's closing. `ended` is to be set when all is done. Keep what it returns: Windows does not."""
    if not WINDOWS:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: stop(GRACE))
        return None

    # Python's own signals would wait there until the main thread's select has ended, and know no closing.
    @ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)
    def told(event: int) -> bool:
        if event in (0, 1):  # Ctrl+C, Ctrl+Break
            stop(GRACE)
        else:  # the window is closed, or its user logs off
            stop(CLOSING_GRACE)
            ended.wait(CLOSING_GRACE + 1.5)  # this process is ended as soon as this returns
        return True

    ctypes.WinDLL("kernel32").SetConsoleCtrlHandler(told, True)
    return told


def prepare_console(title: str | None = None) -> None:
    """Print what the code page lacks as an escape, since UnicodeEncodeError would end us; name the window."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")
    if WINDOWS and title:
        ctypes.WinDLL("kernel32").SetConsoleTitleW(ctypes.c_wchar_p(title))


# ======================================================================================================
# This system: processes
# ======================================================================================================


def _make_job(limits: int = 0x2000) -> int:
    """A job object; unless told otherwise one that ends every process in it when it is closed, be it by our own end."""
    void, word = ctypes.c_void_p, ctypes.c_uint32
    job = _win32("kernel32", "CreateJobObjectW", void, void, void)(None, None)
    about = ctypes.create_string_buffer(144 if ctypes.sizeof(void) == 8 else 112)  # ..._EXTENDED_LIMIT_INFORMATION
    struct.pack_into("<I", about, 16, limits)  # its LimitFlags; 0x2000 is ..._KILL_ON_JOB_CLOSE
    if not _win32("kernel32", "SetInformationJobObject", word, void, word, void, word)(job, 9, about, len(about)):
        raise ctypes.WinError(ctypes.get_last_error())
    return job


@contextlib.contextmanager
def bounded_child(command: Sequence[str], running: set[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program without input, its output in pipes; leaving the block ends it with all that it started. Meanwhile
    it is among those `running`, for end_children()."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with contextlib.ExitStack() as ending:
        if WINDOWS:
            void, word = ctypes.c_void_p, ctypes.c_uint32
            job = _make_job()
            ending.callback(_win32("kernel32", "CloseHandle", word, void), job)
            # Suspended until it is in the job: what it starts then is in it too.
            child = subprocess.Popen(command, creationflags=subprocess.CREATE_NO_WINDOW | 0x4, **options)
            ending.callback(_win32("kernel32", "TerminateJobObject", word, void, word), job, 1)
            _win32("kernel32", "AssignProcessToJobObject", word, void, void)(job, int(child._handle))
            _win32("ntdll", "NtResumeProcess", word, void)(int(child._handle))
        else:
            child = subprocess.Popen(command, start_new_session=True, **options)
            running.add(child.pid)
            ending.callback(running.discard, child.pid)
            ending.callback(_kill_group, child.pid)
        try:
            yield child
        finally:
            ending.close()
            # It may hang inside its driver, past any signal, and a pipe that is being read is closed only at its end.
            closing = threading.Thread(target=lambda: (child.stdout.close(), child.stderr.close()), daemon=True)
            closing.start()
            closing.join(1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)


def end_children(running: set[int]) -> None:
    """Before this process ends with some bounded ones at work. On Windows their jobs end with it."""
    for leader in list(running):
        _kill_group(leader)


MAX_OUTPUT = 256 * 1024  # bytes of a child's output; one that prints more is held up by its full pipe


def read_output(child: subprocess.Popen[bytes], timeout: float) -> tuple[str, str]:
    """What a bounded child prints until it ends. Raises TimeoutExpired."""
    found = [b"", b""]

    def read(number: int, pipe: Any) -> None:
        found[number] = pipe.read(MAX_OUTPUT)

    readers = [
        threading.Thread(target=read, args=(number, pipe), daemon=True)
        for number, pipe in enumerate((child.stdout, child.stderr))
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + timeout
    child.wait(timeout)
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))  # what it started may hold its pipes open
        if reader.is_alive():
            raise subprocess.TimeoutExpired(child.args, timeout)
    return found[0].decode("utf-8", "replace"), found[1].decode("utf-8", "replace")


def _kill_group(leader: int) -> None:
    """The group outlives its leader while a child of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def launch_detached(program: Path, arguments: Sequence[str], folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a program that outlives this one, its output appended to a file. Raises OSError or ValueError."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("STORYTELLER_")}
    command: str | list[str] = [str(program), *arguments]
    options: dict[str, Any] = {}
    if WINDOWS:
        # A console of its own, which is not seen: Ctrl+C in ours, and its closing, must not reach it.
        options["creationflags"] = subprocess.CREATE_NO_WINDOW
        if program.suffix.lower() in (".bat", ".cmd"):
            # cmd reads its line by rules of its own: every word in quotes, in which only these stay special.
            words = [str(program), *arguments]
            if any(re.search(r'["%\r\n]', word) for word in words):
                raise ValueError("a batch file's path and arguments cannot hold \" or %")
            quoted = " ".join(f'"{word}"' for word in words)
            # Of a batch file that ends in "pause" cmd tells no exit code by itself.
            code = "if errorlevel 1 (exit 1) else if not errorlevel 0 exit 1"
            command = f'"{os.environ.get("COMSPEC", "cmd.exe")}" /d /s /c "{quoted} & {code}"'
    else:
        options["start_new_session"] = True
        if program.suffix == ".sh" and not os.access(program, os.X_OK):
            command = ["bash", *command]
    log_file = open_log(output)
    options |= {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "stdout": log_file, "stderr": log_file}
    try:
        if WINDOWS:
            # The task scheduler, for one, runs us in a job that may end with us: out of it, where that is allowed.
            with contextlib.suppress(PermissionError):
                out_of_it = options["creationflags"] | subprocess.CREATE_BREAKAWAY_FROM_JOB
                return subprocess.Popen(command, **{**options, "creationflags": out_of_it})
        return subprocess.Popen(command, **options)
    finally:
        os.close(log_file)


def process_identity(pid: int) -> str | None:
    """What tells a process from a later one of the same number: when it started. None when there is none."""
    try:
        if WINDOWS:
            return _windows_start_time(pid)
        if MACOS:
            command = ["ps", "-o", "lstart=", "-p", str(pid)]
            found = subprocess.run(command, capture_output=True, timeout=5, check=False).stdout.strip()
            return found.decode("ascii", "replace") or None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # After the name, which may hold spaces and parentheses: state, then 19 on, the start in ticks since boot.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def _windows_start_time(pid: int) -> str | None:
    void, word = ctypes.c_void_p, ctypes.c_uint32
    process = _win32("kernel32", "OpenProcess", void, word, word, word)(0x1000, 0, pid)  # ..._LIMITED_INFORMATION
    if not process:
        return None
    times = (ctypes.c_uint64 * 4)()
    each = [ctypes.byref(times, 8 * number) for number in range(4)]
    code = word()
    done = _win32("kernel32", "GetProcessTimes", word, void, void, void, void, void)(process, *each)
    _win32("kernel32", "GetExitCodeProcess", word, void, void)(process, ctypes.byref(code))
    _win32("kernel32", "CloseHandle", word, void)(process)
    return str(times[0]) if done and code.value == 259 else None  # STILL_ACTIVE


# ======================================================================================================
# Batching
# ======================================================================================================

Q = TypeVar("Q")


def settle(future: Future[T], outcome: T | BaseException) -> None:
    """Give a future that is marked as running its result or its exception."""
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


class Batcher(Generic[Q, T]):
    """Answers questions many at a time, in one thread of its own: those that arrive while a step is at work share the
    next one. `step` gets at least one question and gives as many outcomes in the same order, a result or an exception
    for each; what it raises itself is the outcome of all of them. Cancelled questions are skipped."""

    def __init__(self, step: Callable[[list[Q]], Sequence[T | BaseException]], name: str) -> None:
        self._step = step
        self._queue: queue.SimpleQueue[tuple[Q, Future[T]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self, question: Q) -> Future[T]:
        """Not after close(). Cancelling the future withdraws a question that no step has taken yet."""
        future: Future[T] = Future()
        self._queue.put((question, future))
        return future

    def close(self, timeout: float) -> None:
        """End the thread once all questions are answered, or go on without it after `timeout` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while first := self._queue.get():
            asked = [first]
            with contextlib.suppress(queue.Empty):
                while one := self._queue.get_nowait():
                    asked.append(one)
                self._queue.put(None)  # close() was called: find it again once these are answered
            self._answer(asked)
            del asked, first  # hold on to nothing while waiting for the next question

    def _answer(self, asked: Sequence[tuple[Q, Future[T]]]) -> None:
        waiting = [(question, future) for question, future in asked if future.set_running_or_notify_cancel()]
        outcomes: Sequence[T | BaseException] = ()
        if waiting:
            try:
                outcomes = self._step([question for question, _ in waiting])
            except BaseException as error:
                outcomes = [error] * len(waiting)
        for (_, future), outcome in zip(waiting, outcomes):
            settle(future, outcome)


# ======================================================================================================
# Stores: the interface
# ======================================================================================================

TTL_MS = 7 * 24 * 3600 * 1000  # of sessions, pending notifications and marks of acknowledgement: 7 days
OWN_MEMBER = b'{"id":"%b",'  # how a member begins that this service wrote


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class StoredSession:
    """A session as the store has it."""

    timestamp: int
    document: bytes | None  # None: its key is of another type than text
    saved: int | None = None  # ms, when this service saved it last; a later save has a later time
    announced: str | None = None  # the type of the notification that it announced last


class Snapshot(NamedTuple):
    """The oldest pending members at one moment."""

    pending: list[tuple[bytes, float]]  # each with its time, oldest first
    marked: bool  # whether any of the ids in question is marked as acknowledged


@dataclass(frozen=True)
class Draft:
    """A notification without its time. The store sets the time, in the step that adds the notification."""

    type: str
    session: int
    member: Callable[[int], bytes]  # time in ms -> the JSON to store


def result_of(outcome: T | ApiError) -> T:
    """Raise an outcome that is an error."""
    if isinstance(outcome, ApiError):
        raise outcome
    return outcome


class Store(Protocol):
    """What both stores do. Times are ms since 1970. Each verb is one atomic step, safe from any thread and beside other
    instances on the same store. It raises Unavailable when the store does not answer. A verb that takes several
    questions is a step for each of them, and returns in place of an outcome the error of that question alone."""

    name: str
    place: str  # for people; without a password

    def ping(self) -> None:
        """Raise Unavailable unless the store answers."""

    def close(self) -> None:
        """End every connection and thread. The store is not used afterwards."""

    def session(self, timestamp: int) -> StoredSession | None:
        """None when there is none."""
        return result_of(self.read_sessions([timestamp])[0])

    def read_sessions(self, timestamps: Sequence[int]) -> list[StoredSession | ApiError | None]:
        """The same for several, in one round trip."""

    def sessions(self) -> Iterator[StoredSession]:
        """All of them, newest first, each read when the caller asks for it."""

    def newest_copy(self) -> bytes | None:
        """The copy of the newest session that StorySwarm's tools write; None when there is none."""

    def save(self, timestamp: int, document: bytes, draft: Draft | None, *, replace: bool = True) -> bool:
        """Store a session with its TTL, and announce `draft` as announce() does. With replace=False: False, and no
        change, when that timestamp is taken."""

    def announce(self, session: int, draft: Draft) -> bool:
        """Note the draft's type at the session and add its notification, unless that type was noted last (False)."""

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        """Add notifications as pending, each (member, time, True). While one that was made here for the same type and
        session is pending: that one, and False."""

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        """Members within their TTL with their times, oldest first, read about `page` at a time."""

    def snapshot(self, count: int, ids: Sequence[str]) -> Snapshot:
        """The oldest `count` of them, and whether any of `ids` is marked, in one round trip."""

    def acknowledged(self, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that are marked."""

    def acknowledge(self, id: str, members: Sequence[bytes]) -> bool:
        """Remove the members and mark the id. False, and no change, when none was there and the id is not marked."""

    def acknowledge_own(self, ids: Sequence[tuple[str, int]]) -> list[bool | ApiError]:
        """The same for the members of exactly that time that begin with OWN_MEMBER % id."""

    def keep_token(self, digest: str, record: bytes, ttl: int) -> None:
        """Store the record of a session token under its SHA-256, with a TTL in ms."""

    def token(self, digest: str) -> bytes | None:
        """None when it is unknown, has expired, or was revoked."""

    def tokens(self) -> list[tuple[str, bytes]]:
        """Each token's SHA-256 and record."""

    def revoke_token(self, digest: str) -> bool:
        """False when there was none."""


# ======================================================================================================
# Redis: connections and scripts
# ======================================================================================================

_Word = bytes | str | int | float  # of a command

_REDIS_CODES = r"\b(READONLY|OOM|MISCONF|BUSY|NOPERM|NOAUTH|WRONGPASS|LOADING|MASTERDOWN|WRONGTYPE)\b"


def is_address(host: str) -> bool:
    """An IP address, not a name."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


class _CheckedConnection(redis.connection.AbstractConnection):
    """Mixed into the connections of redis-py."""

    def connect(self) -> None:
        """A lookup of a name has no timeout of its own: it runs in a thread, which is not waited for if it is late."""
        if self.is_connected:
            return
        host = getattr(self, "host", None)  # a Unix socket has none
        if host is not None and not is_address(host):
            found = threading.Event()

            def look_up() -> None:
                with contextlib.suppress(OSError, UnicodeError):  # super().connect() fails in the same way
                    socket.getaddrinfo(host, None)
                found.set()

            threading.Thread(target=look_up, name="redis-lookup", daemon=True).start()
            if not found.wait(self.socket_connect_timeout):
                raise redis.TimeoutError("the lookup of its name took too long")
        self.next_health_check = int(time.monotonic()) + self.health_check_interval  # a new connection needs none
        super().connect()  # type: ignore[no-untyped-call]

    def check_health(self) -> None:
        """An error is an answer as well: Redis refuses PING with MISCONF where it refuses writes alone."""
        with contextlib.suppress(redis.ResponseError):
            super().check_health()  # type: ignore[no-untyped-call]


class RedisClient:
    """Redis by the public surface of redis-py, behind a circuit breaker. A client of redis-py costs 150 us a command,
    its connections 20."""

    # Seconds. A call ends within 3 s, also where an idle connection is dead and the next one is silent.
    CONNECT_TIMEOUT, ANSWER_TIMEOUT = 1.0, 1.4
    CHECK_INTERVAL = 10  # an idle connection is checked before its next use; one that a poll uses every 5 s is not
    PROBE_INTERVAL = 1.0  # between two probes while the circuit is open

    def __init__(self, url: str, probe: Sequence[_Word]) -> None:
        """`probe`: a command that reads, since Redis refuses PING where it refuses writes alone."""
        given = redis.connection.parse_url(url)
        base = given.pop("connection_class", redis.Connection)
        # The URL says where Redis is and who we are. How it is called is for us to say.
        where = {name: value for name, value in given.items() if re.match("(host|port|path|db|user|pass|ssl)", name)}
        place = where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"
        self.place = f"{place}, database {where.get('db', 0)}"
        self._pool = redis.ConnectionPool(
            connection_class=type("CheckedConnection", (_CheckedConnection, base), {}),
            max_connections=1000,  # the callers' threads are the limit
            protocol=2,  # Redis 5 refuses HELLO 3
            driver_info=None,  # CLIENT SETINFO costs two round trips
            socket_timeout=self.ANSWER_TIMEOUT,
            socket_connect_timeout=self.CONNECT_TIMEOUT,
            health_check_interval=self.CHECK_INTERVAL,
            **where,
        )
        self._pack: Callable[..., list[bytes]] = redis.Connection(protocol=2).pack_command
        self._probe = probe
        self._lock = threading.Lock()
        self._fault = ""  # why the circuit is open; "" while it is closed
        self._closing = threading.Event()

    def close(self) -> None:
        self._closing.set()
        self._pool.disconnect()

    def pack(self, *words: _Word) -> bytes:
        return b"".join(self._pack(*words))

    def exchange(self, *commands: Sequence[_Word] | bytes) -> list[Any]:
        """Send the commands (bytes: a packed one) in one round trip. The reply to each: bytes, int, None, a list of
        these, or a ResponseError. Raises Unavailable, at once while the circuit is open."""
        if self._fault:
            raise self.unavailable(self._fault)
        try:
            return self._exchange_now(commands)
        except (redis.RedisError, OSError, ValueError) as error:  # ValueError: what answers is no Redis
            reason = self._reason(error)
            if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
                self._open_circuit(reason)
            raise self.unavailable(reason) from None

    def _exchange_now(self, commands: Sequence[Sequence[_Word] | bytes]) -> list[Any]:
        packed = [command if isinstance(command, bytes) else self.pack(*command) for command in commands]
        connection = self._pool.get_connection()
        try:
            try:
                connection.check_health()
            except (redis.ConnectionError, redis.TimeoutError):
                self._pool.disconnect(inuse_connections=False)  # the other idle ones died with it
                connection.connect()
            connection.send_packed_command([b"".join(packed)], check_health=False)
            return [self._read_reply(connection) for _ in commands]
        except BaseException:
            connection.disconnect()  # a reply that was not read would be taken for the next one
            raise
        finally:
            self._pool.release(connection)

    @staticmethod
    def _read_reply(connection: Any) -> Any:
        try:
            return connection.read_response(disable_decoding=True)
        except redis.ResponseError as error:
            return error

    def outcome(self, reply: Any) -> Any:
        """The reply, or Unavailable in place of an error."""
        return self.unavailable(self._reason(reply)) if isinstance(reply, redis.ResponseError) else reply

    def ask(self, *commands: Sequence[_Word] | bytes) -> list[Any]:
        """The reply to each. Raises Unavailable for an error too."""
        return [result_of(self.outcome(reply)) for reply in self.exchange(*commands)]

    def text(self, reply: Any) -> bytes | ApiError | None:
        """The outcome of GET; None also for a key of another type."""
        is_wrong_type = isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")
        text: bytes | ApiError | None = None if is_wrong_type else self.outcome(reply)
        return text

    @staticmethod
    def _reason(error: Exception) -> str:
        """Not the error's text, which may hold the command and with it a session."""
        code = re.search(_REDIS_CODES, f"{getattr(error, 'status_code', '')} {error}")
        return code[1] if code else type(error).__name__

    def unavailable(self, reason: str) -> Unavailable:
        return Unavailable(f"Redis at {self.place} does not answer as it should ({reason}).", 1)

    def _open_circuit(self, reason: str) -> None:
        """Let calls fail at once until a probe is answered, or close() was called."""
        with self._lock:
            if self._fault or self._closing.is_set():
                return
            self._fault = reason
        log.warning("store: Redis at %s does not answer (%s): the circuit is open", self.place, reason)
        self._pool.disconnect(inuse_connections=False)
        threading.Thread(target=self._probe_until_answered, name="redis-probe", daemon=True).start()

    def _probe_until_answered(self) -> None:
        while not self._closing.wait(self.PROBE_INTERVAL):
            with contextlib.suppress(redis.RedisError, OSError, ValueError):
                self._exchange_now([self._probe])  # an error reply is an answer: each call gets its own
                self._fault = ""
                log.warning("store: Redis at %s answers again: the circuit is closed", self.place)
                return


# Each script is one atomic step. KEYS: 1 pending, 2 newest, 3 made. ARGV: 1 member, 2 its time, 3 now.
# `add` answers {"late", newest} when the time is not past the newest one that was given: the caller asks again
# with a later one, since the member's JSON contains its time and only the caller can write that.
_LUA_ADD = """
local week = 604800000
local function add()
  local before = redis.call('GET', KEYS[3])
  if before then
    local score = redis.call('ZSCORE', KEYS[1], before)
    local id = string.match(before, '^{"id":"([^"]+)"')
    if score and tonumber(score) > ARGV[3] - week and redis.call('EXISTS', 'notifications:ack:' .. id) == 0 then
      return {'pending', before, score}
    end
  end
  local newest = redis.call('GET', KEYS[2])
  if newest and tonumber(newest) >= tonumber(ARGV[2]) then return {'late', newest} end
  redis.call('SET', KEYS[2], ARGV[2], 'PX', week)
  redis.call('SET', KEYS[3], ARGV[1], 'PX', week)
  redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[3] - week)
  return {'added', ARGV[1], ARGV[2]}
end
"""
_LUA_ADD_ALONE = f"{_LUA_ADD} return add()"

# KEYS: 4 session, 5 StoryArt's key for it, 6 meta. ARGV: 4 type.
_LUA_ANNOUNCE = f"""{_LUA_ADD}
local function announce()
  if redis.call('HGET', KEYS[6], 'announced') == ARGV[4] then return {{'known'}} end
  local result = add()
  if result[1] ~= 'late' then redis.call('HSET', KEYS[6], 'announced', ARGV[4]) end
  return result
end
"""

# The meta key lives as long as its session, which another program may have written without an end.
_LUA_ANNOUNCE_ALONE = f"""{_LUA_ANNOUNCE}
if redis.call('EXISTS', KEYS[4], KEYS[5]) == 0 then return {{'known'}} end
local result = announce()
local left = redis.call('PTTL', KEYS[4])
if left == -2 then left = redis.call('PTTL', KEYS[5]) end
if left == -1 then redis.call('PERSIST', KEYS[6]) else redis.call('PEXPIRE', KEYS[6], left) end
return result
"""

# KEYS: 7 index, 8 the document under a name of its own, since a script takes 1 ms to be given 850 KB.
# ARGV: 5 timestamp, 6 '1' to replace.
_LUA_SAVE = f"""{_LUA_ANNOUNCE}
if ARGV[6] ~= '1' and redis.call('EXISTS', KEYS[4], KEYS[5]) > 0 then
  redis.call('DEL', KEYS[8])
  return {{'taken'}}
end
if redis.call('EXISTS', KEYS[8]) == 0 then return {{'gone'}} end
local result = {{'silent'}}
if ARGV[4] ~= '' then result = announce() end
if result[1] == 'late' then return result end
local saved = math.max(ARGV[3], (redis.call('HGET', KEYS[6], 'saved') or 0) + 1)
redis.call('RENAME', KEYS[8], KEYS[4])
redis.call('PEXPIRE', KEYS[4], week)
redis.call('ZADD', KEYS[7], ARGV[5], KEYS[4])
redis.call('HSET', KEYS[6], 'saved', string.format('%d', saved))
redis.call('PEXPIRE', KEYS[6], week)
return result
"""

# Of an id some of whose members were removed, or none.
_LUA_MARK = """
if removed == 0 then return redis.call('EXISTS', KEYS[2]) end
redis.call('SET', KEYS[2], '1', 'PX', 604800000)
return 1
"""

# KEYS: 1 pending, 2 marker. ARGV: members.
_LUA_ACKNOWLEDGE = f"""
local removed = 0
for _, member in ipairs(ARGV) do removed = removed + redis.call('ZREM', KEYS[1], member) end
{_LUA_MARK}"""

# The same for those members, from score ARGV[1] to ARGV[2], that begin with ARGV[3].
_LUA_ACKNOWLEDGE_OWN = f"""
local removed = 0
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], ARGV[2])) do
  if string.sub(member, 1, #ARGV[3]) == ARGV[3] then removed = removed + redis.call('ZREM', KEYS[1], member) end
end
{_LUA_MARK}"""

# KEYS: 1 session, 2 StoryArt's key for it, 3 index, 4 StoryArt's index. Checks again, as a save may have come between.
_LUA_TRIM = """
if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
  redis.call('ZREM', KEYS[3], KEYS[1])
  redis.call('ZREM', KEYS[4], KEYS[2])
end
"""


# ======================================================================================================
# Stores: Redis
# ======================================================================================================


class RedisStore(Store):
    """Redis 5 or later. The keys that other programs use are those that were agreed on; ours begin with
    `storyteller:`."""

    name = "redis"
    PENDING, LATEST, TOKEN = "notifications:pending", "session:latest", "auth:session:"
    INDEX, STORYART_INDEX = "storyteller:sessions", "storyart:sessions:index"
    NEWEST = "storyteller:newest"  # the newest time that a notification was given

    def __init__(self, url: str, clock: Callable[[], int] = now_ms) -> None:
        self._redis = RedisClient(url, probe=("EXISTS", self.NEWEST))
        self.place = self._redis.place
        self._clock = clock
        self._newest_given = 0  # ms; others may have given later ones
        self._pack_marks = functools.lru_cache(maxsize=2)(self._pack_exists)  # 100 ids take 0.1 ms to pack

    def ping(self) -> None:
        self._redis.ask(("EXISTS", self.NEWEST))

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _session_keys(timestamp: int) -> list[str]:
        return [f"session:{timestamp}", f"storyart:session:{timestamp}"]

    @staticmethod
    def _meta_key(timestamp: int) -> str:
        return f"storyteller:session:{timestamp}"

    def read_sessions(self, timestamps: Sequence[int]) -> list[StoredSession | ApiError | None]:
        commands: list[Sequence[_Word]] = []
        for timestamp in timestamps:
            # The meta key first: a document newer than what was announced is announced again, which changes nothing.
            commands.append(("HMGET", self._meta_key(timestamp), "saved", "announced"))
            commands += [("GET", key) for key in self._session_keys(timestamp)]  # MGET hides a key of another type
        replies = iter(self._redis.exchange(*commands)) if commands else iter(())
        return [self._read_session(timestamp, *parts) for timestamp, *parts in zip(timestamps, *[replies] * 3)]

    def _read_session(self, timestamp: int, meta: Any, ours: Any, storyarts: Any) -> StoredSession | ApiError | None:
        found = storyarts if ours is None else ours
        if found is None:
            return None
        document = self._redis.text(found)
        if isinstance(document, ApiError):
            return document
        saved, announced = (None, None) if isinstance(meta, redis.ResponseError) else meta
        return StoredSession(
            timestamp,
            document,
            int(saved) if saved else None,
            announced.decode("utf-8", "replace") if announced else None,
        )

    def sessions(self) -> Iterator[StoredSession]:
        page, below = 100, "+inf"
        while True:
            indexes = (self.INDEX, self.STORYART_INDEX)
            read = [("ZREVRANGEBYSCORE", index, below, "-inf", "WITHSCORES", "LIMIT", 0, page) for index in indexes]
            found = [[float(score) for score in values[1::2]] for values in self._redis.ask(*read)]
            # A full page says nothing of what lies below its last score: go no further down than that.
            floor = max((scores[-1] for scores in found if len(scores) == page), default=-math.inf)
            scores = {score for some in found for score in some if score >= floor and math.isfinite(score)}
            for timestamp in sorted(map(int, scores), reverse=True):
                session = self.session(timestamp)
                if session is not None:
                    yield session
                    continue
                keys = [*self._session_keys(timestamp), self.INDEX, self.STORYART_INDEX]
                with contextlib.suppress(Unavailable):  # a replica takes no writes: read on
                    self._run(_LUA_TRIM, [(keys, [])])
            if floor == -math.inf:
                return
            below = f"({floor!r}"

    def newest_copy(self) -> bytes | None:
        return self._get(self.LATEST)

    def _get(self, key: str) -> bytes | None:
        return result_of(self._redis.text(self._redis.exchange(("GET", key))[0]))

    def _run(self, script: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        """Run a script for each (keys, arguments), all in one round trip; the outcome of each."""
        digest = hashlib.sha1(script.encode()).hexdigest()  # by which Redis knows it once it has seen it
        rests = [(len(keys), *keys, *arguments) for keys, arguments in calls]
        replies = self._redis.exchange(*[("EVALSHA", digest, *rest) for rest in rests])
        missed = [at for at, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
        if missed:
            again = self._redis.exchange(*[("EVAL", script, *rests[at]) for at in missed])
            replies = [again.pop(0) if at in missed else reply for at, reply in enumerate(replies)]
        return [self._redis.outcome(reply) for reply in replies]

    def _run_with_times(
        self, script: str, drafts: Sequence[Draft | None], keys: Sequence[str] = (), *further: Any
    ) -> list[Any]:
        """Run a script that may add a notification, for each draft with a time past the newest one so far."""
        found: dict[int, Any] = {}
        now = self._clock()
        for _ in range(100):  # each further turn means that another instance was faster
            left = [number for number in range(len(drafts)) if number not in found]
            calls = []
            for at, number in enumerate(left, max(now, self._newest_given + 1)):
                draft = drafts[number]
                made = f"storyteller:made:{draft.type}:{draft.session}" if draft else "storyteller:made"
                arguments = [draft.member(at) if draft else b"", at, now, *further]
                calls.append(([self.PENDING, self.NEWEST, made, *keys], arguments))
            for number, outcome in zip(left, self._run(script, calls)):
                if isinstance(outcome, ApiError) or outcome[0] not in (b"late", b"added"):
                    found[number] = outcome
                    continue
                self._newest_given = max(self._newest_given, int(float(outcome[-1])))
                if outcome[0] == b"added":
                    found[number] = outcome
            if len(found) == len(drafts):
                break
        crowded = Unavailable("Too many notifications are being made at this moment: ask again.", 1)
        return [found.get(number, crowded) for number in range(len(drafts))]

    def save(self, timestamp: int, document: bytes, draft: Draft | None, *, replace: bool = True) -> bool:
        incoming = f"storyteller:incoming:{secrets.token_hex(8)}"
        self._redis.ask(("SET", incoming, document, "PX", 60_000))
        keys = [*self._session_keys(timestamp), self._meta_key(timestamp), self.INDEX, incoming]
        step = draft.type if draft else ""
        (outcome,) = self._run_with_times(_LUA_SAVE, [draft], keys, step, timestamp, int(replace))
        answer: bytes = result_of(outcome)[0]
        if answer == b"gone":
            raise self._redis.unavailable("it took a minute")
        return answer != b"taken"

    def announce(self, session: int, draft: Draft) -> bool:
        keys = [*self._session_keys(session), self._meta_key(session)]
        (outcome,) = self._run_with_times(_LUA_ANNOUNCE_ALONE, [draft], keys, draft.type)
        answer: bytes = result_of(outcome)[0]
        return answer != b"known"

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        return [
            outcome if isinstance(outcome, ApiError) else (outcome[1], int(float(outcome[2])), outcome[0] == b"added")
            for outcome in self._run_with_times(_LUA_ADD_ALONE, drafts)
        ]

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        lowest = self._oldest()
        while True:
            rows = self._rows(*self._redis.ask(self._pending_command(lowest, "+inf", page)))
            if len(rows) < page:
                yield from rows
                return
            last = rows[-1][1]
            lowest = repr(last)
            if rows[0][1] < last:  # there may be more of the last score: begin there again
                yield from (row for row in rows if row[1] < last)
            else:  # one score fills the page. Its members are read at once, since each page of them would begin anew
                yield from self._rows(*self._redis.ask(self._pending_command(lowest, lowest, -1)))
                lowest = f"({lowest}"

    def _oldest(self) -> str:
        """The lowest score within the TTL."""
        return str(self._clock() - TTL_MS + 1)

    def _pending_command(self, lowest: str, highest: str, count: int) -> Sequence[_Word]:
        return ("ZRANGEBYSCORE", self.PENDING, lowest, highest, "WITHSCORES", "LIMIT", 0, count)

    @staticmethod
    def _rows(values: list[bytes]) -> list[tuple[bytes, float]]:
        return list(zip(values[::2], map(float, values[1::2])))

    def snapshot(self, count: int, ids: Sequence[str]) -> Snapshot:
        marks = [self._pack_marks(tuple(ids))] if ids else []
        pending, *marked = self._redis.ask(self._pending_command(self._oldest(), "+inf", count), *marks)
        return Snapshot(self._rows(pending), any(marked))

    def _pack_exists(self, ids: Sequence[str]) -> bytes:
        return self._redis.pack("EXISTS", *map(self._marker, ids))

    def acknowledged(self, ids: Sequence[str]) -> set[str]:
        if not ids:
            return set()
        keys = [self._marker(id) for id in ids]
        if self._redis.ask(("EXISTS", *keys)) == [0]:  # the usual case, at the cost of one command
            return set()
        return {id for id, found in zip(ids, self._redis.ask(*[("EXISTS", key) for key in keys])) if found}

    def acknowledge(self, id: str, members: Sequence[bytes]) -> bool:
        (outcome,) = self._run(_LUA_ACKNOWLEDGE, [([self.PENDING, self._marker(id)], members)])
        return bool(result_of(outcome))

    def acknowledge_own(self, ids: Sequence[tuple[str, int]]) -> list[bool | ApiError]:
        oldest = self._clock() - TTL_MS + 1
        calls = [
            ([self.PENDING, self._marker(id)], [max(time, oldest), time, OWN_MEMBER % id.encode()]) for id, time in ids
        ]
        outcomes = self._run(_LUA_ACKNOWLEDGE_OWN, calls)
        return [outcome if isinstance(outcome, ApiError) else outcome == 1 for outcome in outcomes]

    @staticmethod
    def _marker(id: str) -> str:
        return f"notifications:ack:{id}"

    def keep_token(self, digest: str, record: bytes, ttl: int) -> None:
        self._redis.ask(("SET", self.TOKEN + digest, record, "PX", ttl))

    def token(self, digest: str) -> bytes | None:
        return self._get(self.TOKEN + digest)

    def tokens(self) -> list[tuple[str, bytes]]:
        keys: set[bytes] = set()
        cursor = b"0"
        while True:  # SCAN, since only people at the command line ask
            ((cursor, found),) = self._redis.ask(("SCAN", cursor, "MATCH", f"{self.TOKEN}*", "COUNT", 1000))
            keys.update(found)
            if cursor == b"0":
                break
        digests = [key.decode("utf-8", "replace").removeprefix(self.TOKEN) for key in sorted(keys)]
        return [(digest, record) for digest in digests if (record := self.token(digest)) is not None]

    def revoke_token(self, digest: str) -> bool:
        return self._redis.ask(("DEL", self.TOKEN + digest)) == [1]


# ======================================================================================================
# Stores: SQLite
# ======================================================================================================

# Each made the next version of the file out of the one before; a file's own version is how many it has had.
_SCHEMA_STEPS = (
    """
CREATE TABLE session (timestamp INTEGER PRIMARY KEY, document BLOB NOT NULL, saved INTEGER NOT NULL,
                      announced TEXT, expires INTEGER NOT NULL);
CREATE INDEX session_expires ON session (expires);
CREATE TABLE pending (member BLOB PRIMARY KEY, time INTEGER NOT NULL, made TEXT UNIQUE);
CREATE INDEX pending_time ON pending (time, member);
CREATE TABLE marker (id TEXT PRIMARY KEY, expires INTEGER NOT NULL);
CREATE INDEX marker_expires ON marker (expires);
CREATE TABLE newest (time INTEGER NOT NULL);
INSERT INTO newest VALUES (0);
""",
    """
CREATE TABLE token (digest TEXT PRIMARY KEY, record BLOB NOT NULL, expires INTEGER NOT NULL);
CREATE INDEX token_expires ON token (expires);
""",
)


_Change = Callable[[sqlite3.Connection], T]  # what one writes, in a transaction


class SqliteStore(Store):
    """One file in WAL mode: reads go on during a write, and what was committed survives a killed process."""

    name = "sqlite"
    WAIT = 3.0  # seconds for the lock of another process, and for a transaction that is under way

    def __init__(self, path: Path, clock: Callable[[], int] = now_ms) -> None:
        self.place = str(path)
        self._path = path
        self._clock = clock
        self._damaged = False  # seen at run time: the file is "malformed"
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()  # as many as threads that read at once
        self._closed = False
        try:
            self._writer = self._connect()
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(self._writer.close)
                self._prepare()
                on_failure.pop_all()
        except (sqlite3.Error, Unavailable) as error:
            raise StartError(f"The store {path} cannot be used ({error}): move it away, or repair it.") from None
        self._writes = Batcher(self._commit, "sqlite-writer")  # its thread alone uses the writer from here on

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self.WAIT, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()  # on Windows nobody could move the file away meanwhile
            raise
        return connection

    def _prepare(self) -> None:
        damage = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise StartError(f"The store {self.place} is damaged ({damage}): move it away, or repair it.")
        with self._transaction():
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version > len(_SCHEMA_STEPS):
                raise StartError(f"The store {self.place} was made by a newer version: start that one.")
            for statement in ";".join(_SCHEMA_STEPS[version:]).split(";"):
                self._writer.execute(statement)
            self._writer.execute(f"PRAGMA user_version = {len(_SCHEMA_STEPS)}")
        self._writer.execute("PRAGMA journal_mode = WAL")  # writes to the file: not before it is known to be ours

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._damaged = self._damaged or "malformed" in str(error)
            raise Unavailable(f"The store {self.place} does not answer as it should ({error}).", 1) from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            try:
                connection = self._readers.get_nowait()
            except queue.Empty:
                connection = self._connect()
            try:
                yield connection
            finally:
                self._readers.put(connection)
                if self._closed:  # while this one was out
                    self._close_readers()

    def _write(self, change: _Change[T]) -> T:
        """What the change returns, once it is durable."""
        outcome: T | BaseException = self._write_each([change])[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _write_each(self, changes: Sequence[_Change[Any]]) -> list[Any]:
        """What each change returns or raises, once all are durable. Each happens whole or not at all."""
        outcomes = self._writes.ask(changes)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            return outcomes.result(self.WAIT)
        if outcomes.cancel():
            raise Unavailable(f"The store {self.place} is busy: ask again.", 1)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            return outcomes.result(2 * self.WAIT)  # its transaction is under way
        raise Unavailable(f"The store {self.place} takes too long: the change may still be made.", 1)

    def _commit(self, asked: Sequence[Sequence[_Change[Any]]]) -> list[list[Any]]:
        """One transaction, and so one fsync, for all changes that wait."""
        alone = sum(map(len, asked)) == 1
        with self._transaction():
            self._purge(self._clock())
            return [[self._try(change, alone) for change in changes] for changes in asked]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors(), self._writer:  # commits at the end, or rolls back
            self._writer.execute("BEGIN IMMEDIATE")
            yield

    def _try(self, change: _Change[Any], alone: bool) -> Any:
        """What the change returns; or what it raises, and then nothing of it is left. One that is alone needs no
        savepoint, which costs a copy of each page that it changes: the whole transaction fails with it."""
        if alone:
            return change(self._writer)
        self._writer.execute("SAVEPOINT change")
        try:
            with self._errors():
                result = change(self._writer)
        except Exception as error:
            self._writer.execute("ROLLBACK TO change")  # fails when the whole transaction is gone, as on a full disk
            result = error
        self._writer.execute("RELEASE change")
        return result

    def ping(self) -> None:
        if self._damaged:
            raise Unavailable(f"The store {self.place} is damaged: stop the service, and move the file away.", 60)
        with self._reading() as database:
            database.execute("SELECT time FROM newest").fetchone()

    def close(self) -> None:
        self._closed = True
        self._close_readers()
        self._writes.close(2 * self.WAIT)
        self._writer.close()

    def _close_readers(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._readers.get_nowait().close()

    _SESSION = "SELECT timestamp, document, saved, announced FROM session"

    def read_sessions(self, timestamps: Sequence[int]) -> list[StoredSession | ApiError | None]:
        select = f"{self._SESSION} WHERE timestamp = ? AND expires > ?"
        found: list[StoredSession | ApiError | None] = []
        with self._reading() as database:
            for timestamp in timestamps:
                try:
                    with self._errors():
                        row = database.execute(select, (timestamp, self._clock())).fetchone()
                    found.append(StoredSession(*row) if row else None)
                except Unavailable as fault:
                    found.append(fault)
        return found

    def sessions(self) -> Iterator[StoredSession]:
        select = f"{self._SESSION} WHERE timestamp < ? AND expires > ? ORDER BY timestamp DESC LIMIT 1"
        below = 1 << 62
        while True:
            with self._reading() as database:
                row = database.execute(select, (below, self._clock())).fetchone()
            if not row:
                return
            yield StoredSession(*row)
            below = row[0]

    def newest_copy(self) -> bytes | None:
        return None  # no other program writes here

    def save(self, timestamp: int, document: bytes, draft: Draft | None, *, replace: bool = True) -> bool:
        now = self._clock()

        def change(database: sqlite3.Connection) -> bool:
            taken = "SELECT 1 FROM session WHERE timestamp = ?"
            if not replace and database.execute(taken, (timestamp,)).fetchone():
                return False
            database.execute(
                "INSERT INTO session (timestamp, document, saved, expires) VALUES (?, ?, ?, ?) ON CONFLICT (timestamp)"
                " DO UPDATE SET document = excluded.document, saved = max(excluded.saved, saved + 1),"
                " expires = excluded.expires",
                (timestamp, document, now, now + TTL_MS),
            )
            if draft:
                self._announce(database, now, timestamp, draft)
            return True

        return self._write(change)

    def announce(self, session: int, draft: Draft) -> bool:
        return self._write(functools.partial(self._announce, now=self._clock(), session=session, draft=draft))

    def _announce(self, database: sqlite3.Connection, now: int, session: int, draft: Draft) -> bool:
        changed = database.execute(
            "UPDATE session SET announced = ?1 WHERE timestamp = ?2 AND announced IS NOT ?1", (draft.type, session)
        ).rowcount
        if changed:
            self._add(database, now, draft)
        return bool(changed)

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        now = self._clock()
        return self._write_each([functools.partial(self._add, now=now, draft=draft) for draft in drafts])

    def _add(self, database: sqlite3.Connection, now: int, draft: Draft) -> tuple[bytes, int, bool]:
        made = f"{draft.type}:{draft.session}"
        if row := database.execute("SELECT member, time FROM pending WHERE made = ?", (made,)).fetchone():
            return *row, False
        newest = database.execute("SELECT time FROM newest").fetchone()[0]
        time = max(now, newest + 1)
        member = draft.member(time)
        database.execute("UPDATE newest SET time = ?", (time,))
        database.execute("INSERT INTO pending (member, time, made) VALUES (?, ?, ?)", (member, time, made))
        return member, time, True

    _PENDING = "SELECT member, time FROM pending WHERE (time, member) > (?, ?) ORDER BY time, member LIMIT ?"

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        last: tuple[int, bytes] = (self._clock() - TTL_MS, b"\xff")
        while True:
            with self._reading() as database:
                rows = database.execute(self._PENDING, (*last, page)).fetchall()
            yield from rows
            if len(rows) < page:
                return
            last = (rows[-1][1], rows[-1][0])

    def snapshot(self, count: int, ids: Sequence[str]) -> Snapshot:
        with self._reading() as database:
            rows = database.execute(self._PENDING, (self._clock() - TTL_MS, b"\xff", count)).fetchall()
        return Snapshot(rows, False)

    def acknowledged(self, ids: Sequence[str]) -> set[str]:
        return set()  # no other program writes here: what is marked is not pending

    def acknowledge(self, id: str, members: Sequence[bytes]) -> bool:
        rows = [(member,) for member in members]
        return self._write(lambda database: self._acknowledge(database, id, "member = ?", rows))

    def acknowledge_own(self, ids: Sequence[tuple[str, int]]) -> list[bool | ApiError]:
        of_own = functools.partial(self._acknowledge, which="time = ? AND substr(member, 1, ?) = ?")
        found = [(id, at, OWN_MEMBER % id.encode()) for id, at in ids]
        return self._write_each([functools.partial(of_own, id=id, rows=[(at, len(own), own)]) for id, at, own in found])

    def _acknowledge(self, database: sqlite3.Connection, id: str, which: str, rows: Sequence[tuple[Any, ...]]) -> bool:
        now = self._clock()
        removed = sum(database.execute(f"DELETE FROM pending WHERE {which}", row).rowcount for row in rows)
        if not removed:
            marked = "SELECT 1 FROM marker WHERE id = ? AND expires > ?"
            return database.execute(marked, (id, now)).fetchone() is not None
        database.execute("INSERT OR REPLACE INTO marker (id, expires) VALUES (?, ?)", (id, now + TTL_MS))
        return True

    def keep_token(self, digest: str, record: bytes, ttl: int) -> None:
        row = (digest, record, self._clock() + ttl)
        self._write(lambda database: database.execute("INSERT OR REPLACE INTO token VALUES (?, ?, ?)", row))

    def token(self, digest: str) -> bytes | None:
        select = "SELECT record FROM token WHERE digest = ? AND expires > ?"
        with self._reading() as database:
            row = database.execute(select, (digest, self._clock())).fetchone()
        return row[0] if row else None

    def tokens(self) -> list[tuple[str, bytes]]:
        with self._reading() as database:
            return database.execute("SELECT digest, record FROM token WHERE expires > ?", (self._clock(),)).fetchall()

    def revoke_token(self, digest: str) -> bool:
        return self._write(lambda file: file.execute("DELETE FROM token WHERE digest = ?", (digest,)).rowcount > 0)

    def _purge(self, now: int) -> None:
        """Delete what has expired, in each transaction; Redis does it by itself."""
        for table in ("session", "marker", "token"):
            self._writer.execute(f"DELETE FROM {table} WHERE expires <= ?", (now,))
        self._writer.execute("DELETE FROM pending WHERE time <= ?", (now - TTL_MS,))


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Redis is not asked yet; SQLite raises StartError."""
    if settings.redis_address:
        return RedisStore(settings.redis_address)
    return SqliteStore(settings.data_dir / "storyteller.sqlite3")


# ======================================================================================================
# Sessions: a document
# ======================================================================================================


class NotASession(ValueError):
    """What is wrong with a document, and where in it."""


_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def _part(parent: dict[str, Any], key: str, where: str, *kinds: type) -> Any:
    """parent[key], which is of one of `kinds`; None when it is missing or null. `where` is the parent's own place."""
    value = parent.get(key)
    if value is not None and type(value) not in kinds:
        place = f"{where}.{key}" if where else key
        raise NotASession(f"{place} is {_KINDS[type(value)]}, not {' or '.join(_KINDS[kind] for kind in kinds)}")
    return value


def _objects(parent: dict[str, Any], key: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of the array parent[key], with its place; none when it is missing or null."""
    for number, value in enumerate(_part(parent, key, where, list) or ()):
        place = f"{where}.{key}[{number}]"
        if type(value) is not dict:
            raise NotASession(f"{place} is {_KINDS.get(type(value), 'null')}, not an object")
        yield place, value


def read_session(stored: StoredSession) -> dict[str, Any]:
    """The document of a stored session. Raises NotASession."""
    if stored.document is None:
        raise NotASession("its key holds no text")
    try:
        document = parse_json(stored.document)
    except ValueError as error:
        raise NotASession(str(error)) from None
    if type(document) is not dict:
        raise NotASession(f"it is {_KINDS.get(type(document), 'null')}, not an object")
    return document


@dataclass(frozen=True)
class Progress:
    """How far a session's prompts are."""

    total_beats: int
    total_prompts: int
    ready: bool


def progress(document: dict[str, Any]) -> Progress:
    """Count beats and prompts. Ready: there is a beat, and each that needs a prompt has one. Raises NotASession."""
    beats = prompts = waiting = 0
    for place, scene in _scenes(document):
        for where, beat in _objects(scene, "beats", place):
            beats += 1
            has_one, needs_one = _has_prompt(beat, where), _needs_prompt(beat, where)
            prompts += has_one
            waiting += needs_one and not has_one
    return Progress(beats, prompts, ready=beats > 0 and waiting == 0)


def _scenes(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    episode = _part(document, "analyzedEpisode", "", dict)
    if episode is None or episode.get("scenes") is None:
        raise NotASession("it has no analyzedEpisode.scenes")
    return _objects(episode, "scenes", "analyzedEpisode")


def _has_prompt(beat: dict[str, Any], where: str) -> bool:
    """StorySwarm writes a plain string, StoryArt an object; the vertical one is optional and is checked for type."""
    prompts = _part(beat, "prompts", where, dict) or {}
    texts = {}
    for shape in ("cinematic", "vertical"):
        prompt = _part(prompts, shape, f"{where}.prompts", str, dict)
        if isinstance(prompt, dict):
            prompt = _part(prompt, "prompt", f"{where}.prompts.{shape}", str)
        texts[shape] = prompt or ""
    return not texts["cinematic"].isspace() and texts["cinematic"] != ""


def _needs_prompt(beat: dict[str, Any], where: str) -> bool:
    """An image that is reused, or none, needs no prompt: a finished session has fewer prompts than beats."""
    decision = _part(beat, "imageDecision", where, dict) or {}
    return _part(decision, "type", f"{where}.imageDecision", str) not in ("REUSE_IMAGE", "NO_IMAGE")


def last_updated(stored: StoredSession, written: int | None) -> str:
    """The newest of the last save here and the document's own time (ms); its timestamp when there is neither."""
    known = [time for time in (stored.saved, written) if time is not None]
    return iso_time(max(known, default=stored.timestamp))


PREVIEW_LENGTH = 500  # characters of scriptText in a list: whole sessions would make it hundreds of MB


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """What a list shows of a session beside its timestamp. Raises NotASession."""
    episode = _part(document, "analyzedEpisode", "", dict) or {}
    scenes = []
    for place, scene in _objects(episode, "scenes", "analyzedEpisode"):
        beats = sum(1 for _ in _objects(scene, "beats", place))
        scenes.append({"sceneNumber": scene.get("sceneNumber"), "title": scene.get("title"), "totalBeats": beats})
    return {
        "storyUuid": document.get("storyUuid"),
        "promptMode": document.get("promptMode"),
        "scriptText": (_part(document, "scriptText", "", str) or "")[:PREVIEW_LENGTH],
        "analyzedEpisode": {
            "episodeNumber": episode.get("episodeNumber"),
            "title": episode.get("title"),
            "scenes": scenes,
        },
    }


# ======================================================================================================
# Sessions: what is known of them
# ======================================================================================================


@dataclass(frozen=True)
class Facts:
    """What the answers need of a document. `fault`: it is no session at all; the parts have faults of their own."""

    fault: NotASession | None = None
    progress: Progress | NotASession | None = None
    summary: Mapping[str, Any] | NotASession | None = None
    updated: int | None = None  # ms, as the document says
    waits: bool = False  # for StorySwarm
    timestamp: int | None = None  # as the document says
    size: int = 0  # of the summary's JSON


def find_facts(stored: StoredSession) -> Facts:
    """Parse a document. Its faults are among the facts."""

    def attempt(part: Callable[[dict[str, Any]], T]) -> T | NotASession:
        try:
            return part(document)
        except NotASession as fault:
            return NotASession(str(fault))  # the one that was raised refers to the document

    try:
        document = read_session(stored)
    except NotASession as fault:
        return Facts(NotASession(str(fault)))
    times = [read_time(document.get(name)) for name in ("lastUpdated", "updatedAt")]
    own: Any = document.get("timestamp")
    shown = attempt(summary)
    return Facts(
        progress=attempt(progress),
        summary=shown,
        size=0 if isinstance(shown, NotASession) else len(json.dumps(shown)),
        updated=max((time for time in times if time is not None), default=None),
        waits=document.get("promptMode") == "storyswarm",
        timestamp=int(own) if is_whole(own) else None,
    )


class Sessions:
    """The sessions of a store. To parse a document of 850 KB takes 6 ms, its SHA-256 0.5: its facts are cached by that
    digest alone. The store is read each time, so nothing else tells whether a session has changed."""

    KEPT, LARGEST = 1000, 8192  # entries and bytes of one: 8 MB of JSON at most. A real summary has 1 to 2 KB
    SMALL = 1_000_000  # bytes of a document that does not delay others while it is parsed

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: dict[bytes, Facts] = {}  # by the document's SHA-256
        self._lock = threading.Lock()  # of the dictionary
        self._parsing = threading.Lock()

    def find(self, timestamp: int) -> tuple[StoredSession, Facts] | None:
        """None when there is none."""
        stored = self._store.session(timestamp)
        return None if stored is None else (stored, self.facts_of(stored))

    def find_many(self, timestamps: Sequence[int]) -> list[tuple[StoredSession, Facts | None] | ApiError | None]:
        """The same for several in one round trip. Without the facts where a large document has to be parsed: the caller
        asks facts_of(), where that delays nobody else."""
        found: list[tuple[StoredSession, Facts | None] | ApiError | None] = []
        for stored in self._store.read_sessions(timestamps):
            if isinstance(stored, StoredSession):
                digest = self._digest(stored)
                facts = self._cached(digest)
                if facts is None and len(stored.document or b"") <= self.SMALL:
                    facts = self._learn(stored, digest)
                found.append((stored, facts))
            else:
                found.append(stored)
        return found

    def facts_of(self, stored: StoredSession) -> Facts:
        """Documents that are not known are parsed one at a time, and so equal ones once."""
        digest = self._digest(stored)
        known = self._cached(digest)
        if known is not None:
            return known
        with self._parsing:
            return self._cached(digest) or self._learn(stored, digest)

    def listed(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Timestamps and summaries, newest first. What is no session is left out and logged."""
        for stored in self._store.sessions():
            facts = self.facts_of(stored)
            if isinstance(facts.summary, Mapping):
                yield stored.timestamp, facts.summary
            else:
                self._leave_out(f"session {stored.timestamp}", facts.fault or facts.summary)

    def latest(self) -> StoredSession | None:
        """The newest session that can be read: the first of the list, or the copy of a newer one."""
        newest = None
        for stored in self._store.sessions():
            fault = self.facts_of(stored).fault
            if fault is None:
                newest = stored
                break
            self._leave_out(f"session {stored.timestamp}", fault)
        copy = self._store.newest_copy()
        if copy is None:
            return newest
        facts = self.facts_of(StoredSession(0, copy))
        if facts.fault:
            self._leave_out("the copy of the newest session", facts.fault)
        if facts.timestamp is None or (newest and facts.timestamp <= newest.timestamp):
            return newest
        return StoredSession(facts.timestamp, copy)

    @staticmethod
    def _leave_out(what: str, fault: object) -> None:
        log.warning("sessions: %s is left out: %s", what, fault)

    @staticmethod
    def _digest(stored: StoredSession) -> bytes:
        return b"" if stored.document is None else hashlib.sha256(stored.document).digest()

    def _cached(self, digest: bytes) -> Facts | None:
        with self._lock:
            facts = self._facts.pop(digest, None)
            if facts is not None:
                self._facts[digest] = facts  # the one used last is the last to go
            return facts

    def _learn(self, stored: StoredSession, digest: bytes) -> Facts:
        facts = find_facts(stored)
        if facts.size <= self.LARGEST:
            with self._lock:
                self._facts[digest] = facts
                bound(self._facts, self.KEPT)
        return facts


# ======================================================================================================
# Notifications
# ======================================================================================================

# Each type's own total, by which a member of it is valid and which `check` shows.
TOTALS = {"prompts_ready": "totalPrompts", "beats_ready": "totalBeats"}

ID_PATTERN = r"[^\x00-\x1f\x7f-\x9f/\\]{1,200}"  # of anybody's id: it is put into a path, unescaped


@dataclass(frozen=True)
class Notification:
    """One member of the pending set that is valid. `total` is its type's own; `timestamp` is ISO 8601."""

    id: str
    type: str
    session_timestamp: int
    story_uuid: str
    episode_number: int
    total: int
    timestamp: str
    acknowledged: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.type,
            "sessionTimestamp": self.session_timestamp,
            "storyUuid": self.story_uuid,
            "episodeNumber": self.episode_number,
            TOTALS[self.type]: self.total,
            "timestamp": self.timestamp,
        }

    @functools.cached_property
    def text(self) -> bytes:
        """The same as bytes, made once: an answer of 100 is a join."""
        return json.dumps(self.as_json(), ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def read_member(member: bytes, time: float) -> Notification:
    """A member of the pending set, written by whomever. Raises ValueError with what makes it invalid."""
    value = parse_json(member)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    kind, id = value.get("type"), value.get("id")
    if not isinstance(id, str) or not re.fullmatch(ID_PATTERN, id):
        raise ValueError("no id, or one that does not fit into a path")
    if not isinstance(kind, str) or kind not in TOTALS:
        raise ValueError("no known type")
    for name in ("sessionTimestamp", TOTALS[kind]):
        if not is_count(value.get(name)):
            raise ValueError(f"{name} is not a whole number")
    episode: Any = value.get("episodeNumber")
    story, timestamp = value.get("storyUuid"), value.get("timestamp")
    return Notification(
        id=id,
        type=kind,
        session_timestamp=int(value["sessionTimestamp"]),
        story_uuid=story if isinstance(story, str) else "",
        episode_number=int(episode) if is_count(episode) else 0,
        total=int(value[TOTALS[kind]]),
        timestamp=timestamp if isinstance(timestamp, str) and read_time(timestamp) is not None else iso_time(int(time)),
        acknowledged=value.get("acknowledged") is True,
    )


def draft_notification(type: str, session_timestamp: int, **fields: Any) -> Draft:
    """A notification of ours. Its id carries its time, so that acknowledging finds it without a search."""
    chance = secrets.token_hex(8)

    def member(time: int) -> bytes:
        value = {"id": f"notif_{time}_{chance}", "type": type, "sessionTimestamp": session_timestamp, **fields}
        value |= {"timestamp": iso_time(time), "acknowledged": False}
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")

    return Draft(type, session_timestamp, member)


def due_notification(timestamp: int, document: dict[str, Any], found: Progress) -> Draft | None:
    """What a session has to announce as it stands: only one that waits for StorySwarm, and that has beats."""
    if document.get("promptMode") != "storyswarm" or not found.total_beats:
        return None
    episode: Any = document["analyzedEpisode"].get("episodeNumber")
    story = document.get("storyUuid")
    return draft_notification(
        "prompts_ready" if found.ready else "beats_ready",
        timestamp,
        storyUuid=story if isinstance(story, str) else "",
        episodeNumber=int(episode) if is_count(episode) else 0,
        totalPrompts=found.total_prompts,
        totalBeats=found.total_beats,
    )


class Notifications:
    """The pending notifications of a store."""

    SMALLEST_SNAPSHOT = 100  # members: as many as a check returns by default
    CACHED, LARGEST = 2000, 2048  # members, and bytes of one: 4 MB at most, and as much again of JSON
    REPORTED = 1000  # invalid members that are logged

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reported: dict[bytes, object] = {}  # by SHA-256
        self._cached = functools.lru_cache(maxsize=self.CACHED)(self._parse)
        self._last_ids: Sequence[str] = ()  # of the last snapshot

    def check(self, types: Sequence[str], limit: int) -> list[Notification]:
        """Those that are not acknowledged, oldest first, `limit` at most."""
        found: list[Notification] = []
        page = max(self.SMALLEST_SNAPSHOT, limit)
        unacknowledged = self._read(self._store.pending(page))
        while batch := list(itertools.islice(unacknowledged, page)):
            batch = [one for one in batch if one.type in types]
            marked = self._store.acknowledged([one.id for one in batch])
            found += [one for one in batch if one.id not in marked]
            if len(found) >= limit:
                break
        return found[:limit]

    def check_many(self, queries: Sequence[tuple[Sequence[str], int]]) -> list[list[Notification] | None]:
        """The same for several (types, limit), all from one snapshot. None for a query that has to look further."""
        count = max(self.SMALLEST_SNAPSHOT, *(limit for _, limit in queries))
        asked = self._last_ids
        pending, any_marked = self._store.snapshot(count, asked)
        found = list(self._read(pending))
        ids = self._last_ids = [one.id for one in found]
        if ids != asked or any_marked:
            known = () if any_marked else set(asked)
            marked = self._store.acknowledged([id for id in ids if id not in known])
            found = [one for one in found if one.id not in marked]
        answers = [[one for one in found if one.type in types][:limit] for types, limit in queries]
        whole = len(pending) < count
        return [shown if whole or len(shown) == limit else None for shown, (_, limit) in zip(answers, queries)]

    def create(self, drafts: Sequence[Draft]) -> list[tuple[Notification, bool] | ApiError]:
        """Add each, and True; or the one of the same type and session that is pending already, and False."""
        return [
            outcome if isinstance(outcome, ApiError) else (read_member(*outcome[:2]), outcome[2])
            for outcome in self._store.add(drafts)
        ]

    def acknowledge(self, id: str) -> bool:
        """True when it was pending, or is acknowledged already."""
        if result_of(self.acknowledge_own([id])[0]) or self._store.acknowledge(id, []):
            return True
        # Another program made it, or nobody did: look through all of them.
        rows = self._store.pending(page=2000)
        members = [member for member, time in rows if self._has_id(member, time, id)]
        return bool(members) and self._store.acknowledge(id, members)

    def acknowledge_own(self, ids: Sequence[str]) -> list[bool | ApiError]:
        """The same for ids that were made here, which hold their time: no search. False for any other."""
        times = [re.fullmatch(r"notif_([0-9]{1,14})_[0-9a-f]{16}", id) for id in ids]
        ours = [(found[0], int(found[1])) for found in times if found]
        outcomes = iter(self._store.acknowledge_own(ours) if ours else ())
        return [next(outcomes) if found else False for found in times]

    @staticmethod
    def _has_id(member: bytes, time: float, id: str) -> bool:
        if id.encode("utf-8") not in member and b"\\" not in member:  # JSON may also write it with escapes
            return False
        try:
            return read_member(member, time).id == id
        except (ValueError, OverflowError):
            return False

    def _read(self, rows: Iterable[tuple[bytes, float]]) -> Iterator[Notification]:
        """The valid ones that are not acknowledged by their own word. The others stay where they are."""
        for member, at in rows:
            found = self._cached(member, at) if len(member) <= self.LARGEST else self._parse(member, at)
            if found is not None and not found.acknowledged:
                yield found

    def _parse(self, member: bytes, time: float) -> Notification | None:
        """None for an invalid one, which is logged once."""
        try:
            return read_member(member, time)
        except (ValueError, OverflowError) as fault:
            ours = object()
            digest = hashlib.sha256(member).digest()
            if len(self._reported) < self.REPORTED and self._reported.setdefault(digest, ours) is ours:
                log.warning("notifications: a pending member is left out (%s): %.200r", fault, member)
            return None


# ======================================================================================================
# GPU
# ======================================================================================================

GPU_QUERY = (
    "--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,count",
    "--format=csv,noheader,nounits",
)
PROCESS_QUERY = ("--query-compute-apps=pid", "--format=csv,noheader")
NVIDIA_SMI_TIMEOUT = 5.0  # seconds; it takes 20 to 100 ms, seconds with many GPUs, minutes after a driver fault


@dataclass(frozen=True)
class GpuStatus:
    """Memory in MiB, utilization in percent, temperature in degrees Celsius. `fault`: nvidia-smi gave no answer
    that can be used; without it, an unavailable GPU is one that is not there."""

    available: bool = False
    gpu_count: int = 0
    utilization: int = 0
    memory_used: int = 0
    memory_total: int = 0
    temperature: int = 0
    process_count: int = 0
    error: str | None = None
    fault: bool = False


def _number(cell: str) -> float | None:
    """Whatever is not a number is unreadable: [N/A], [Not Supported], [GPU is lost], nothing."""
    return float(cell) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", cell) else None


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _words_of(*outputs: str) -> str:
    """nvidia-smi's own words, on one line. Driver trouble goes to stdout, so that comes first."""
    return next((" ".join(text.split())[:300] for text in outputs if text.strip()), "")


def parse_gpus(output: str) -> GpuStatus:
    """The answer to GPU_QUERY, a line for each GPU. One whose total memory cannot be read is not counted."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip()]
    if not rows:
        return GpuStatus(error="nvidia-smi printed nothing", fault=True)
    if any(len(row) != 5 for row in rows):
        return GpuStatus(error=f"nvidia-smi printed a line that cannot be read: {_words_of(output)}", fault=True)
    gpus = [[_number(cell) for cell in row] for row in rows]
    counted = [[cell or 0 for cell in gpu] for gpu in gpus if gpu[2] is not None]
    if not counted:
        return GpuStatus(error=f"nvidia-smi names no GPU with readable memory: {_words_of(output)}", fault=True)
    utilization, used, total, temperature, _ = zip(*counted)
    return GpuStatus(
        available=True,
        gpu_count=len(counted),
        utilization=_half_up(sum(utilization) / len(counted)),
        memory_used=_half_up(sum(used)),
        memory_total=_half_up(sum(total)),
        temperature=_half_up(max(temperature)),
    )


def count_processes(output: str) -> int:
    """The answer to PROCESS_QUERY, a pid a line. A process on two GPUs is listed twice."""
    return len({line.strip() for line in output.splitlines() if re.fullmatch(r"\s*[0-9]+\s*", line)})


def find_nvidia_smi(settings: Settings) -> str | None:
    """The program to run; None when there is none."""
    if settings.nvidia_smi:
        return shutil.which(settings.nvidia_smi)
    return next(filter(None, map(shutil.which, ["nvidia-smi", *nvidia_smi_places()])), None)


def query_gpus(program: str | None, running: set[int], timeout: float = NVIDIA_SMI_TIMEOUT) -> GpuStatus:
    """Run both queries at the same time, each among the children that are `running`. Never raises: what goes wrong is
    in `error`."""
    if not program:
        return GpuStatus(
            error="nvidia-smi not found or GPU not available: install NVIDIA's driver, or set NVIDIA_SMI", fault=True
        )
    deadline = time.monotonic() + timeout
    try:
        with (
            bounded_child([program, *GPU_QUERY], running) as gpus,
            bounded_child([program, *PROCESS_QUERY], running) as processes,
        ):
            try:
                outputs = read_output(gpus, timeout)
            except subprocess.TimeoutExpired:
                return GpuStatus(error=f"nvidia-smi did not answer within {timeout:g} s", fault=True)
            if any("no devices were found" in text.lower() for text in outputs):
                return GpuStatus(error=_words_of(*outputs))
            if gpus.returncode != 0:
                words = _words_of(*outputs) or "no words"
                return GpuStatus(error=f"nvidia-smi failed (exit code {gpus.returncode}): {words}", fault=True)
            status = parse_gpus(outputs[0])
            if status.fault:
                return status
            with contextlib.suppress(subprocess.TimeoutExpired):
                listed, _ = read_output(processes, max(0.0, deadline - time.monotonic()))
                if processes.returncode == 0:
                    return dataclasses.replace(status, process_count=count_processes(listed))
            return status
    except OSError as error:
        return GpuStatus(error=f"nvidia-smi cannot be run ({error.strerror}): {program}", fault=True)


class GpuMonitor:
    """The status, kept for `keep` seconds, good or bad. However many ask at once, one run answers them all."""

    def __init__(
        self, query: Callable[[], GpuStatus], keep: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._query = query
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._run: Future[GpuStatus] | None = None  # the run under way, or the last one
        self._ended = -math.inf

    def ask(self) -> Future[GpuStatus]:
        """The run under way, which a thread of its own makes; done already while its status is kept."""
        with self._lock:
            run = self._run
            if run is None or (run.done() and self._clock() - self._ended >= self._keep):
                run = self._run = Future()
                threading.Thread(target=self._answer, args=[run], name="gpu", daemon=True).start()
        return run

    def status(self) -> GpuStatus:
        return self.ask().result(timeout=NVIDIA_SMI_TIMEOUT * 2)

    def _answer(self, run: Future[GpuStatus]) -> None:
        try:
            status = self._query()
        except Exception as error:  # those who wait must not wait for ever
            log.exception("gpu: asking nvidia-smi failed")
            status = GpuStatus(error=f"asking nvidia-smi failed ({type(error).__name__})", fault=True)
        self._ended = self._clock()
        run.set_result(status)


# ======================================================================================================
# SwarmUI: the probe
# ======================================================================================================


@dataclass(frozen=True)
class Probe:
    """What SwarmUI's URL answered. `held`: somebody is there; without it, nobody is. `words`: for people."""

    ready: bool
    held: bool
    words: str
    session_id: str = ""  # what SwarmUI gave when it is ready
    allow_origin: str | None = None  # whose pages SwarmUI answers
    url: str = ""  # where it answered


@dataclass(frozen=True)
class Started:
    """SwarmUI is ready: what to tell, and whose pages it answers."""

    message: str
    allow_origin: str | None


class _UntilHandler(urllib.request.AbstractHTTPHandler):
    """urllib's HTTP with an end: a socket's own time-out starts anew with each byte that comes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._watchdog: threading.Timer | None = None

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection(http.client.HTTPSConnection), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _connection(self, kind: type[http.client.HTTPConnection]) -> Any:
        def connect(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = kind(host, **options)
            self._watchdog = threading.Timer(self._seconds, self._cut, [connection])
            self._watchdog.daemon = True
            self._watchdog.start()
            return connection

        return connect

    @staticmethod
    def _cut(connection: http.client.HTTPConnection) -> None:
        with contextlib.suppress(OSError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        if self._watchdog:
            self._watchdog.cancel()


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def call(url: str, seconds: float, *, data: bytes | None = None, headers: Mapping[str, str] = {}) -> Reply:
    """One HTTP call that ends within `seconds` of connecting: no proxy, no redirect followed, 64 KiB of body at most.
    Raises OSError (URLError before the request was sent), http.client.HTTPException."""
    deadline = time.monotonic() + seconds
    handler = _UntilHandler(seconds)
    opener = urllib.request.OpenerDirector()  # bare: it neither follows redirects nor raises for a status
    opener.add_handler(handler)
    try:
        request = urllib.request.Request(url, data=data, headers=dict(headers))
        with opener.open(request, timeout=seconds) as response:
            body = b""
            while time.monotonic() < deadline and (piece := response.read1(65536 - len(body))):
                body += piece
            if time.monotonic() >= deadline:  # what came before the cut is no answer
                raise TimeoutError("timed out")
            return Reply(response.status, response.headers, body)
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline and not _is_refusal(error):
            raise TimeoutError("timed out") from None
        raise
    finally:
        handler.end()


def _is_refusal(error: object) -> bool:
    """Nobody listens there. A connection that takes too long is one on Windows, which repeats refused ones."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else None
    return isinstance(reason, (ConnectionRefusedError, TimeoutError) if REFUSAL_IS_SLOW else ConnectionRefusedError)


def probe(settings: Settings) -> Probe:
    """Ask SwarmUI for a session, as everything that uses it does first: 200 with a session_id is ready."""
    urls = [settings.swarmui_api_url]
    parts = urllib.parse.urlsplit(settings.swarmui_api_url)
    if parts.hostname == "localhost" and parts.scheme == "http":
        # 127.0.0.1 first: where nothing listens on ::1, Windows takes 2 s to say so.
        hosts = [f"{address}:{settings.swarmui_port}" for address in ("127.0.0.1", "[::1]")]
        urls = [urllib.parse.urlunsplit(parts._replace(netloc=host)) for host in hosts]
    found = Probe(ready=False, held=False, words=f"nobody answers at {settings.swarmui_api_url}")
    for url in urls:
        answer = _probe_one(url, settings)
        if answer.ready or answer.held:
            return answer
    return found


def call_swarmui(url: str, route: str, body: Mapping[str, Any], settings: Settings) -> Reply:
    """One call of SwarmUI's API at `url`, which is POST with JSON and nothing else. Raises as call() does."""
    headers = {"Content-Type": "application/json", "Host": urllib.parse.urlsplit(settings.swarmui_api_url).netloc}
    if settings.swarmui_token:
        headers["Cookie"] = f"swarm_token={settings.swarmui_token}"
    return call(f"{url}/API/{route}", settings.health_timeout, data=json.dumps(body).encode(), headers=headers)


def _probe_one(url: str, settings: Settings) -> Probe:
    where = settings.swarmui_api_url
    try:
        reply = call_swarmui(url, "GetNewSession", {}, settings)
    except (OSError, http.client.HTTPException) as error:
        if _is_refusal(error):
            return Probe(ready=False, held=False, words=f"nobody answers at {where}")
        reason = getattr(error, "reason", error)
        if isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in _NOT_HERE:
            return Probe(ready=False, held=False, words=f"{where} cannot be reached ({reason})")
        if isinstance(reason, TimeoutError):
            return Probe(ready=False, held=True, words=f"{where} did not answer within {settings.health_timeout:g} s")
        return Probe(ready=False, held=True, words=f"{where} broke the connection off ({type(reason).__name__})")
    try:
        answer = json.loads(reply.body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        answer = {}
    session_id = answer.get("session_id")
    if reply.status == 200 and isinstance(session_id, str):
        allow_origin = reply.headers.get("Access-Control-Allow-Origin")
        return Probe(True, True, "SwarmUI answers", session_id, allow_origin, url)
    text = answer.get("error") or answer.get("error_id") or reply.body.decode("utf-8", "replace")
    words = f"{where} answered {reply.status}: {' '.join(str(text).split())[:200]}"
    if "unauthorized" in words.lower() or reply.status == 401:
        advice = "check SWARMUI_TOKEN" if settings.swarmui_token else "set SWARMUI_TOKEN"
        words += f" (SwarmUI has accounts on: {advice})"
    return Probe(ready=False, held=True, words=words)


def allow_page(found: Probe, settings: Settings) -> Started:
    """See to it that SwarmUI answers the page of SWARMUI_ALLOW_ORIGIN: as it is installed no page can see it."""
    wanted, before = settings.swarmui_allow_origin, found.allow_origin
    if wanted is None or before in ("*", wanted):
        return Started(found.words, before)
    instead = f" instead of {before}" if before else ""
    change = {"session_id": found.session_id, "settings": {"Network.AccessControlAllowOrigin": wanted}}
    try:
        call_swarmui(found.url, "ChangeServerSettings", change, settings)
    except (OSError, http.client.HTTPException) as error:
        log.warning("swarmui: its answer to ChangeServerSettings is missing (%s)", type(error).__name__)
    after = probe(settings).allow_origin  # its own `success` proves nothing
    if after != wanted:
        log.warning("swarmui: it would not answer pages of %s", wanted)
        return Started(f"{found.words}; but it would not be told to answer pages of {wanted}", after)
    log.info("swarmui: it now answers pages of %s%s", wanted, instead)
    return Started(f"{found.words}; it now answers pages of {wanted}{instead}", after)


# No route or no such address, as ::1 where there is no IPv6; WinSock has numbers of its own.
_NOT_HERE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, 10047, 10049, 10051, 10065}


# ======================================================================================================
# SwarmUI: the launcher
# ======================================================================================================

LOG_LIMIT = 5_000_000  # bytes of a log
LOGS_KEPT = 3  # older ones beside it


def shorten_log(path: Path) -> None:
    """Copy a log that is too long, and empty it: SwarmUI holds it open and outlives us, so it cannot be moved.
    Lines written in between are lost."""
    try:
        if path.stat().st_size <= LOG_LIMIT:
            return
        for number in range(LOGS_KEPT - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows moves none that somebody reads
                os.replace(older, path.with_name(f"{path.name}.{number + 1}"))
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("swarmui: %s cannot be shortened (%s)", path, error.strerror)


class LaunchError(Exception):
    """Why SwarmUI did not start, for the end of "SwarmUI failed to start: "."""


@dataclass(frozen=True)
class LaunchPlan:
    """What to run, and in which folder."""

    program: Path
    arguments: tuple[str, ...]
    folder: Path


def plan_launch(settings: Settings) -> LaunchPlan:
    """Raises LaunchError, naming SWARMUI_PATH, when there is nothing to launch."""
    host = urllib.parse.urlsplit(settings.swarmui_api_url).hostname or ""
    if not _is_this_machine(host):
        raise LaunchError(f"SWARMUI_API_URL names another machine ({host}): start SwarmUI there")
    path = settings.swarmui_path
    if path is None:
        raise LaunchError("SWARMUI_PATH is not set: set it to SwarmUI's folder")
    if path.is_dir():
        program = path / LAUNCH_SCRIPT
        if not program.is_file():
            raise LaunchError(f"SWARMUI_PATH {path} holds no {LAUNCH_SCRIPT}: set it to SwarmUI's folder")
    elif path.is_file():
        program = path
    else:
        raise LaunchError(f"SWARMUI_PATH {path} does not exist: set it to SwarmUI's folder")
    # In any other folder SwarmUI's executable aborts and leaves a stray Data/ there.
    roots = (up for up in program.parents if any((up / name).is_file() for name in LAUNCH_SCRIPTS))
    folder = next(roots, program.parent)
    arguments = ("--launch_mode", "none", "--port", str(settings.swarmui_port), *settings.swarmui_args)
    return LaunchPlan(program, arguments, folder)


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified or _is_own_address(host)
    return host.lower() in (socket.gethostname().lower(), socket.getfqdn().lower())


def _is_own_address(address: str) -> bool:
    """Only an address of this machine can be bound."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.bind((address, 0))
    except OSError:
        return False
    return True


def last_lines(path: Path, since: int, count: int = 5) -> str:
    """The last lines that a log got after byte `since`, on one line; "" when there are none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since if since <= size else 0, size - 4096))
            lines = file.read(4096).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    printable = ("".join(char if char.isprintable() else " " for char in line).strip() for line in lines)
    return " | ".join([line for line in printable if line][-count:])


class FoundProcess:
    """A process that an earlier run of this service launched. How it ended cannot be known: that counts as 0."""

    def __init__(self, pid: int, identity: str) -> None:
        self.pid = pid
        self._identity = identity

    def poll(self) -> int | None:
        return None if process_identity(self.pid) == self._identity else 0


@dataclass(frozen=True)
class _Launch:
    """A process that was launched, when (monotonic seconds), and where its part of the log begins."""

    process: subprocess.Popen[bytes] | FoundProcess
    at: float
    log_start: int


class SwarmUILauncher:
    """Makes SwarmUI ready. One attempt at a time, in a thread of its own that alone owns the state; whoever asks
    meanwhile gets that attempt's outcome. Nobody looks first and acts afterwards."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._output = settings.data_dir / "swarmui.log"
        self._lock = threading.Lock()
        self._attempt: Future[Started] | None = None
        self._record = settings.data_dir / "swarmui.json"
        self._launch: _Launch | None = self._find_launch()  # the last one; only the attempt's thread touches it
        self._failure = ""  # why the last launch failed; likewise
        self._wake = threading.Event()  # the process ended, or close() was called
        self._closed = threading.Event()

    def start(self) -> Started:
        """Return once SwarmUI answers. Raises ApiError with what went wrong, TooManyRequests between two launches."""
        with self._lock:
            attempt = self._attempt
            if attempt is None or attempt.done():
                attempt = self._attempt = Future()
                threading.Thread(target=self._run, args=[attempt], name="swarmui-start", daemon=True).start()
        return attempt.result(timeout=self._settings.start_timeout + 10 * self._settings.health_timeout + 60)

    def close(self) -> None:
        """End an attempt, and tell those who wait for it at once. SwarmUI goes on."""
        self._closed.set()
        self._wake.set()
        with self._lock:
            attempt = self._attempt
        if attempt:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has ended
                attempt.set_exception(Unavailable("SwarmUI failed to start: the service is stopping.", 5))

    def keep_log_short(self) -> None:
        """Look at SwarmUI's log about once a second, in a thread that ends with close()."""

        def look() -> None:
            while not self._closed.wait(1.0):
                shorten_log(self._output)

        threading.Thread(target=look, name="swarmui-log", daemon=True).start()

    def _find_launch(self) -> _Launch | None:
        """What an earlier run launched, when it is alive still: it may be starting, and must not be launched twice."""
        try:
            kept = json.loads(self._record.read_text(encoding="utf-8"))
            pid, identity = int(kept["pid"]), str(kept["identity"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if process_identity(pid) != identity:
            return None
        log.info("swarmui: found process %d, which was launched before", pid)
        return _Launch(FoundProcess(pid, identity), -math.inf, 0)

    def _keep_launch(self, pid: int) -> None:
        try:
            draft = self._record.with_suffix(".new")
            draft.write_text(json.dumps({"pid": pid, "identity": process_identity(pid)}), encoding="utf-8")
            os.replace(draft, self._record)
        except OSError as error:
            log.warning("swarmui: %s cannot be written (%s)", self._record, error.strerror)

    def _run(self, attempt: Future[Started]) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # close() was first
            self._settle(attempt)

    def _settle(self, attempt: Future[Started]) -> None:
        try:
            started = allow_page(self._make_ready(), self._settings)
        except ApiError as fault:
            attempt.set_exception(fault)
        except LaunchError as error:
            self._failure = str(error)
            log.error("swarmui: failed to start: %s", error)
            attempt.set_exception(ApiError(f"SwarmUI failed to start: {error}"))
        except Exception as error:
            log.exception("swarmui: failed to start")
            attempt.set_exception(ApiError(f"SwarmUI failed to start: {type(error).__name__}, see the service's log"))
        else:
            attempt.set_result(started)

    def _make_ready(self) -> Probe:
        found = probe(self._settings)
        if found.ready:
            return dataclasses.replace(found, words="SwarmUI is already running")
        launch = self._launch
        if launch is None or launch.process.poll() is not None:
            if found.held:
                raise LaunchError(f"its port is held by something that is not SwarmUI: {found.words}")
            launch = self._launch_it()
        return self._await_ready(launch)

    def _launch_it(self) -> _Launch:
        plan = plan_launch(self._settings)
        now = self._clock()
        if self._launch and now - self._launch.at < self._settings.start_interval:
            wait = self._settings.start_interval - (now - self._launch.at)
            why = f" ({self._failure})" if self._failure else ""
            raise TooManyRequests(f"SwarmUI was launched a moment ago{why}: ask again in {math.ceil(wait)} s.", wait)
        shorten_log(self._output)
        try:
            log_start = self._output.stat().st_size if self._output.exists() else 0
            process = launch_detached(plan.program, plan.arguments, plan.folder, self._output)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LaunchError(f"{plan.program} cannot be launched ({reason}): check SWARMUI_PATH") from None
        log.info("swarmui: launched %s as process %d", plan.program, process.pid)
        self._launch, self._failure = _Launch(process, now, log_start), ""
        self._keep_launch(process.pid)
        # Waits as long as the process lives, so that its end is seen at once and leaves no zombie.
        threading.Thread(target=self._watch, args=[process], name="swarmui-watch", daemon=True).start()
        return self._launch

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        log.info("swarmui: process %d ended with exit code %d", process.pid, code)
        self._wake.set()

    def _await_ready(self, launch: _Launch) -> Probe:
        deadline = self._clock() + self._settings.start_timeout
        while True:
            next_probe = self._clock() + self._settings.poll_interval
            self._wake.clear()
            found = probe(self._settings)
            if found.ready:
                return dataclasses.replace(found, words="SwarmUI started successfully")
            if self._clock() >= deadline:
                late = f"no answer within {self._settings.start_timeout:g} s (last: {found.words})"
                if launch.process.poll() is not None:
                    raise LaunchError(f"{late}; it exited with code 0: {self._last_words(launch)}")
                raise LaunchError(f"{late}; it keeps running, so ask again, or look into {self._output}")
            self._pause(launch, min(next_probe, deadline))

    def _pause(self, launch: _Launch, until: float) -> None:
        """Until the next probe is due. Raises LaunchError when the process fails meanwhile, or the service stops."""
        while True:
            if self._closed.is_set():
                raise Unavailable("SwarmUI failed to start: the service is stopping.", 5)
            code = launch.process.poll()
            if code:  # 0 counts as a wrapper that went to the background: it may still come
                raise LaunchError(f"it exited with code {code}: {self._last_words(launch)}")
            left = until - self._clock()
            if left <= 0:
                return
            self._wake.wait(left)
            self._wake.clear()

    def _last_words(self, launch: _Launch) -> str:
        return last_lines(self._output, launch.log_start) or "its log is empty"


# ======================================================================================================
# Authentication
# ======================================================================================================


PERMISSIONS = (
    "gpu:read",
    "swarmui:control",
    "notifications:read",
    "notifications:write",
    "sessions:read",
    "sessions:write",
    "admin",
)

SUBJECT_PATTERN = r"[A-Za-z0-9._-]{1,64}"
TOKEN_TTL = 12 * 3600  # seconds unless said
TOKEN_TTL_RANGE = (60, 30 * 24 * 3600)


@dataclass(frozen=True)
class Caller:
    """Who calls, and what for. `expires` in ms; None for the API token and for a trusted page."""

    subject: str
    permissions: tuple[str, ...]
    expires: int | None = None
    digest: str | None = None  # of the session token, where one was sent

    def may(self, permission: str) -> bool:
        return permission == "any" or permission in self.permissions or "admin" in self.permissions


def digest_of(token: str) -> str:
    """What is kept of a session token; it has 256 random bits, so a plain SHA-256 is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def issue_token(store: Store, subject: str, permissions: Iterable[str], ttl: int, now: int) -> tuple[str, Caller]:
    """Make a session token for `ttl` seconds. The token itself is kept nowhere."""
    token = secrets.token_urlsafe(32)
    given = set(permissions)
    caller = Caller(subject, tuple(one for one in PERMISSIONS if one in given), now + ttl * 1000, digest_of(token))
    record = {"subject": subject, "permissions": caller.permissions, "expiresAt": caller.expires}
    store.keep_token(caller.digest, json.dumps(record).encode("ascii"), ttl * 1000)
    return token, caller


def read_token(digest: str, record: bytes) -> Caller | None:
    """What the store holds under a token's digest; None for what cannot be read."""
    try:
        value = parse_json(record)
        subject, permissions, expires = value["subject"], value["permissions"], value["expiresAt"]
        iso_time(int(expires))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    good = isinstance(subject, str) and re.fullmatch(SUBJECT_PATTERN, subject) and is_whole(expires)
    if not good or not isinstance(permissions, list) or not all(one in PERMISSIONS for one in permissions):
        return None
    return Caller(subject, tuple(permissions), int(expires), digest)


class Authenticator:
    """Knows callers by their tokens, or by the trusted page that they are."""

    KEPT = 5.0  # seconds that a token looked up is good for without asking again

    def __init__(
        self,
        settings: Settings,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], int] = now_ms,
    ) -> None:
        self._settings = settings
        self._own_token = (settings.api_token or "").encode("ascii")
        self._owner = Caller("api-token", PERMISSIONS)
        self._store = store
        self._clock = clock
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Caller]] = {}  # digest -> when it was looked up; 1000 at most
        self._revoked: dict[str, None] = {}  # digests revoked here: also against a look-up under way; 1000 at most
        self._failures: dict[str, list[float]] = {}  # address -> when it sent wrong tokens; 1000 at most

    def identify(self, environ: Mapping[str, Any]) -> Caller:
        """Who sent this request. Raises Unauthorized, TooManyRequests, Unavailable."""
        found = self._token_of(environ)
        try:
            caller = self._by_token(found) if found else None
        except Unavailable:
            if not self._by_origin(environ):  # a trusted page needs no store, whatever token it sends
                raise
            caller = None
        caller = caller or self._by_origin(environ)
        if caller:
            return caller
        if not found:
            raise Unauthorized("A token is needed: send the header Authorization: Bearer <token>.")
        self._count_failure(str(environ.get("REMOTE_ADDR", "")))
        raise Unauthorized("The token is unknown, revoked or has expired: ask for another one.")

    def known(self, environ: Mapping[str, Any]) -> Caller | None:
        """The same where it can be told without the store; None where it cannot, or where there is nobody."""
        found = self._token_of(environ)
        return self._by_known_token(found) if found else self._by_origin(environ)

    @staticmethod
    def _token_of(environ: Mapping[str, Any]) -> str | None:
        header = environ.get("HTTP_AUTHORIZATION")  # not request.headers, which raises for what is no latin-1 text
        if header is not None and "," in header:
            raise BadRequest("Authorization: expected one header.")  # two of them arrive as one
        found = re.fullmatch(r"[Bb][Ee][Aa][Rr][Ee][Rr] +(\S+)", (header or "").strip(" \t"))
        return found[1] if found else None

    def revoke(self, digest: str) -> None:
        """At once for this instance; within KEPT seconds for others on the same store."""
        with self._lock:
            self._revoked[digest] = None
            self._known.pop(digest, None)
            bound(self._revoked, 1000)
        try:
            self._store.revoke_token(digest)
        except Unavailable:
            with self._lock:
                self._revoked.pop(digest, None)  # it is not revoked: the caller asks again
            raise

    def _by_token(self, token: str) -> Caller | None:
        caller = self._by_known_token(token)
        if caller:
            return caller
        digest = digest_of(token)
        at, caller = self._known.get(digest, (-math.inf, None))
        if caller is None or self._clock() - at >= self.KEPT:
            caller = self._look_up(digest, caller)
        return caller if caller and self._is_good(caller) else None

    def _by_known_token(self, token: str) -> Caller | None:
        # Bytes, since compare_digest refuses text beyond ASCII, which a header may hold.
        if hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._own_token):
            return self._owner
        at, caller = self._known.get(digest_of(token), (-math.inf, None))
        return caller if caller and self._clock() - at < self.KEPT and self._is_good(caller) else None

    def _is_good(self, caller: Caller) -> bool:
        return caller.digest not in self._revoked and caller.expires > self._wall_clock()

    def _look_up(self, digest: str, before: Caller | None) -> Caller | None:
        at = self._clock()
        try:
            record = self._store.token(digest)
        except Unavailable:
            if before is None:
                raise
            with self._lock:
                self._known[digest] = (at, before)  # it goes on while the store is away
            return before
        caller = read_token(digest, record) if record is not None else None
        with self._lock:
            self._known.pop(digest, None)
            if caller:
                self._known[digest] = (at, caller)
            bound(self._known, 1000)
        return caller

    def _by_origin(self, environ: Mapping[str, Any]) -> Caller | None:
        """A trusted page of this PC. Behind a proxy on this machine everybody would come from a loopback address."""
        origin = environ.get("HTTP_ORIGIN")
        if origin not in self._settings.trusted_origins or not is_loopback(str(environ.get("REMOTE_ADDR", ""))):
            return None
        if any(name in ("HTTP_FORWARDED", "HTTP_VIA") or name.startswith("HTTP_X_FORWARDED_") for name in environ):
            return None
        return Caller(f"origin:{origin}", tuple(one for one in PERMISSIONS if one != "admin"))

    def _count_failure(self, address: str) -> None:
        """Raises TooManyRequests past so many wrong tokens a minute; a missing one does not count."""
        now = self._clock()
        with self._lock:
            recent = [at for at in self._failures.pop(address, ()) if now - at < 60]
            full = len(recent) >= self._settings.token_failures
            self._failures[address] = recent if full else [*recent, now]
            bound(self._failures, 1000)
        if full:
            raise TooManyRequests("Too many wrong tokens from this address: ask again later.", recent[0] + 60 - now)


def is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    return False


def is_own_host(host: str | None, settings: Settings) -> bool:
    """Whether a Host header names this PC: by an IP address, which no page can rebind, or by a name that is known."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", host or "")
    if not found:
        return False
    name = found[1].strip("[]").lower()
    return is_address(name) or name in ("localhost", settings.host.lower(), *settings.allowed_hosts)


def own_token(settings: Settings) -> str:
    """The token that is set, else the one kept in the data folder, made at first start. Raises StartError."""
    if settings.api_token:
        return settings.api_token
    path = token_path(settings)
    try:
        with contextlib.suppress(FileExistsError):  # another start made it meanwhile
            if not path.exists():
                write_private(path, secrets.token_urlsafe(32) + "\n")
        return _token(path.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise StartError(f"{path} cannot be made or read ({error.strerror}): set STORYTELLER_API_TOKEN.") from None
    except ValueError:
        raise StartError(f"{path} holds no token: remove it, and a new one is made.") from None


def token_path(settings: Settings) -> Path:
    return settings.data_dir / "api_token"


# ======================================================================================================
# HTTP application: what comes in
# ======================================================================================================

MAX_BODY = 50 * 1024 * 1024  # bytes; as much as StoryArt's own server takes
WAITING_STARTS = 32  # calls that may wait for SwarmUI at once: half of the server's threads

# A subset of JSON Schema: type, const, enum, minimum, maximum, minLength, maxLength, pattern, items, minItems,
# properties, required, additionalProperties: False, anyOf whose `title` says in words what is expected.
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Services:
    """What the handlers work with."""

    settings: Settings
    store: Store
    gpu: GpuMonitor
    swarmui: SwarmUILauncher
    sessions: Sessions
    notifications: Notifications
    authenticator: Authenticator
    waiting_starts: threading.Semaphore
    large_bodies: threading.Lock
    stopping: threading.Event


@dataclass(frozen=True)
class Request:
    """A request whose input was checked against its route: path parameters and query by name, and the body."""

    caller: Caller | None  # None on a route that is open to all
    origin: str | None  # of the page that calls, when it is an allowed or a trusted one
    path: Mapping[str, Any]
    query: Mapping[str, Any]
    body: Any = None
    raw_body: bytes = b""


@dataclass(frozen=True)
class Response:
    """A status and what to send as JSON; bytes are JSON already."""

    body: Mapping[str, Any] | bytes
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """One endpoint: who may call it, what it takes, who answers, with what. All that is checked, and all that
    /openapi.json says, is made from this."""

    method: str
    path: str
    handler: Callable[[Services, Request], Response]
    permission: str  # one of PERMISSIONS; `any` is any good token, `open` is everybody
    summary: str
    answers: Mapping[int, Schema | None]  # status -> what is answered; None is no body
    error_shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what errors hold beside `error`
    errors: tuple[int, ...] = ()  # beside those that every route of its kind has
    query: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    body: Schema | None = None


def _expected(schema: Schema) -> str:
    """A schema in words."""
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if isinstance(schema.get("type"), list):
        return " or ".join(schema["type"])
    if schema.get("type") == "integer":
        return "a whole number" + (f" from {schema['minimum']} to {schema['maximum']}" if "maximum" in schema else "")
    if schema.get("type") == "string" and "maxLength" in schema:
        return f"a string of {schema.get('minLength', 0)} to {schema['maxLength']} characters" + (
            f" of the pattern {schema['pattern']}" if "pattern" in schema else ""
        )
    if schema.get("minItems"):
        return f"an array of at least {schema['minItems']}"
    return {"string": "a string", "object": "a JSON object", "array": "an array"}.get(
        schema.get("type"), "it otherwise"
    )


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "integer": is_whole,
    "string": lambda value: isinstance(value, str),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def _fits(value: Any, schema: Schema) -> bool:
    """Whether a value fits, but for what it holds."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, str):
        short, long = schema.get("minLength", 0), schema.get("maxLength", len(value))
        return short <= len(value) <= long and ("pattern" not in schema or bool(re.fullmatch(schema["pattern"], value)))
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0)
    return not is_whole(value) or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def find_misfit(value: Any, schema: Schema, name: str) -> str | None:
    """Which part of a value does not fit, and what was expected there; None when all does."""
    if not _fits(value, schema):
        return f"{name}: expected {_expected(schema)}."
    if isinstance(value, list):
        parts = ((part, schema.get("items", {}), f"{name}[{number}]") for number, part in enumerate(value))
        return next(filter(None, (find_misfit(*part) for part in parts)), None)
    if isinstance(value, dict):
        return _find_misfit_in_object(value, schema, name)
    return None


def _find_misfit_in_object(value: dict[str, Any], schema: Schema, name: str) -> str | None:
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in value:
            return f"{key} is missing: expected {_expected(properties.get(key, {}))}."
    if schema.get("additionalProperties") is False and (unknown := value.keys() - properties.keys()):
        return f"{min(unknown)} is not known: expected {', '.join(properties)}."
    for key, part in properties.items():
        if key in value and (found := find_misfit(value[key], part, key)):
            return found
    if "anyOf" in schema and all(find_misfit(value, part, name) for part in schema["anyOf"]):
        return f"{name}: expected {' or '.join(part['title'] for part in schema['anyOf'])}."
    return None


def check_body(value: object, schema: Schema) -> dict[str, Any]:
    """An object that fits; null at its top level counts as absent. Raises BadRequest."""
    given = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value
    if found := find_misfit(given, schema, "The body"):
        raise BadRequest(found)
    return value


def check_text(name: str, text: str, schema: Schema) -> Any:
    """A parameter of a path or a query. Raises BadRequest."""
    value: Any = text
    if schema["type"] == "integer":
        value = int(text) if re.fullmatch(rf"[0-9]{{1,{len(str(schema['maximum']))}}}", text) else None
    if found := find_misfit(value, schema, name):
        raise BadRequest(found)
    return value


def read_path(environ: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, Any]:
    try:  # Bottle drops bytes that are no UTF-8, and would answer for another path
        environ.get("bottle.raw_path", "").encode("latin-1").decode("utf-8")
    except UnicodeError:
        raise BadRequest("The path: expected UTF-8.") from None
    return {name: check_text(name, text, PATH_PARAMETERS[name]) for name, text in found.items()}


def read_query(environ: Mapping[str, Any], declared: Mapping[str, Schema]) -> dict[str, Any]:
    try:
        pairs = urllib.parse.parse_qsl(
            environ.get("QUERY_STRING", ""), keep_blank_values=True, errors="strict", max_num_fields=100
        )
    except ValueError:
        raise BadRequest("The query: expected at most 100 parameters in UTF-8.") from None
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in given or not text:
            raise BadRequest(f"{name}: expected one value.")
        given[name] = check_text(name, text, declared[name]) if name in declared else text
    return {name: given.get(name, schema["default"]) for name, schema in declared.items()}


def read_body(environ: Mapping[str, Any]) -> bytes:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > MAX_BODY:
        raise ContentTooLarge(f"The body is too large: {MAX_BODY // 1024**2} MiB at most.")
    return environ["wsgi.input"].read(length)


LARGE_BODY = 4 * 1024 * 1024  # bytes; parsing one holds every other thread up, so one at a time


def read_call(
    route: Route, environ: Mapping[str, Any], path: Mapping[str, str], large_bodies: threading.Lock, **known: Any
) -> Request:
    """The request as the route declares it. Raises BadRequest, ContentTooLarge, UnsupportedMediaType, Unavailable."""
    found, query = read_path(environ, path), read_query(environ, route.query)
    if route.body is None:
        return Request(**known, path=found, query=query)
    kind = str(environ.get("CONTENT_TYPE") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("The body: expected Content-Type application/json.")
    raw = read_body(environ)
    large = len(raw) > LARGE_BODY
    if large and not large_bodies.acquire(timeout=30):
        raise Unavailable("Other large bodies are being read: ask again.", 5)
    try:
        value = parse_json(raw, from_request=True)
    except ValueError as fault:
        raise BadRequest(f"The body: expected a JSON object ({fault}).") from None
    finally:
        if large:
            large_bodies.release()
    return Request(**known, path=found, query=query, body=check_body(value, route.body), raw_body=raw)


# ======================================================================================================
# HTTP application: the handlers
# ======================================================================================================


def health(parts: Services, call: Request) -> Response:
    try:
        parts.store.ping()
    except Unavailable as fault:
        return Response({"status": "degraded", "store": parts.store.name}, fault.status)
    return Response({"status": "ok", "store": parts.store.name})


def gpu_json(status: GpuStatus) -> dict[str, Any]:
    return {
        "available": status.available,
        "gpuCount": status.gpu_count,
        "utilization": status.utilization,
        "memoryUsed": status.memory_used,
        "memoryTotal": status.memory_total,
        "temperature": status.temperature,
        "processCount": status.process_count,
        "error": status.error,
    }


def gpu_status(parts: Services, call: Request) -> Response:
    status = parts.gpu.status()
    return Response(gpu_json(status), 500 if status.fault else 200)


def swarmui_start(parts: Services, call: Request) -> Response:
    """Nothing of the request is used: nothing in it can reach a command line."""
    if not parts.waiting_starts.acquire(blocking=False):
        raise Unavailable("Too many calls wait for SwarmUI already: ask again.", parts.settings.poll_interval)
    try:
        started = parts.swarmui.start()
    finally:
        parts.waiting_starts.release()
    settings, message = parts.settings, started.message
    told = settings.swarmui_allow_origin in ("*", call.origin)
    if call.origin and not told and started.allow_origin not in ("*", call.origin):
        message += (
            f"; but pages of {call.origin} cannot see it, since it answers "
            f"{started.allow_origin or 'no page'}: set SWARMUI_ALLOW_ORIGIN"
        )
    return Response(
        {"success": True, "message": message, "port": settings.swarmui_port, "apiUrl": settings.swarmui_api_url}
    )


def notifications_check(parts: Services, call: Request) -> Response:
    return check_answer(parts.notifications.check(types_of(call.query["type"]), call.query["limit"]))


def types_of(wanted: str) -> Sequence[str]:
    return list(TOTALS) if wanted == "all" else [wanted]


def check_answer(found: Sequence[Notification]) -> Response:
    return Response({"notifications": [one.as_json() for one in found]})


def notification_create(parts: Services, call: Request) -> Response:
    return created_answer(*result_of(parts.notifications.create([draft_of(call.body)])[0]))


def draft_of(body: Mapping[str, Any]) -> Draft:
    given = {
        name: body[name] for name in ("storyUuid", "episodeNumber", *TOTALS.values()) if body.get(name) is not None
    }
    fields = {name: int(value) if is_whole(value) else value for name, value in given.items()}
    return draft_notification(body["type"], int(body["sessionTimestamp"]), **fields)


def created_answer(notification: Notification, made: bool) -> Response:
    return Response(notification.as_json(), 201 if made else 200)


def notification_ack(parts: Services, call: Request) -> Response:
    id = call.path["notification_id"]
    if not parts.notifications.acknowledge(id):
        raise NotFound("Notification not found")
    return acknowledged_answer(id)


def acknowledged_answer(id: str) -> Response:
    return Response({"success": True, "notificationId": id})


def prompts_status(parts: Services, call: Request) -> Response:
    timestamp = call.path["timestamp"]
    stored, facts = _find_session(parts, timestamp)
    if isinstance(facts.progress, NotASession):
        raise ApiError(f"Session {timestamp} is not a session: {facts.progress}.")
    if is_announcement_due(stored, facts):  # StorySwarm may have written it behind our back
        draft = due_notification(timestamp, read_session(stored), facts.progress)
        try:
            if draft:
                parts.store.announce(timestamp, draft)
        except Unavailable as fault:
            log.warning("notifications: session %d announces its prompts at a later poll: %s", timestamp, fault)
    return Response(prompts_json(stored, facts))


def is_announcement_due(stored: StoredSession, facts: Facts) -> bool:
    return facts.waits and facts.progress.ready and stored.announced != "prompts_ready"


def prompts_json(stored: StoredSession, facts: Facts) -> dict[str, Any]:
    return {
        "promptsReady": facts.progress.ready,
        "sessionTimestamp": stored.timestamp,
        "totalBeats": facts.progress.total_beats,
        "totalPrompts": facts.progress.total_prompts,
        "lastUpdated": last_updated(stored, facts.updated),
    }


def _find_session(parts: Services, timestamp: int) -> tuple[StoredSession, Facts]:
    found = parts.sessions.find(timestamp)
    if found is None:
        raise NotFound("Session not found")
    if found[1].fault:
        raise ApiError(f"Session {timestamp} is not a session: {found[1].fault}.")
    return found


def _session_answer(parts: Services, stored: StoredSession) -> Response:
    """The document goes out as it is kept: it was read, and writing it anew would cost as much again."""
    return Response(b'{"success":true,"data":%b,"storage":"%b"}' % (stored.document, parts.store.name.encode()))


def session_get(parts: Services, call: Request) -> Response:
    stored, _ = _find_session(parts, call.path["timestamp"])
    return _session_answer(parts, stored)


def session_latest(parts: Services, call: Request) -> Response:
    stored = parts.sessions.latest()
    if stored is None:
        raise NotFound("No session found")
    return _session_answer(parts, stored)


def session_list(parts: Services, call: Request) -> Response:
    found = [
        {"timestamp": timestamp, **shown}
        for timestamp, shown in itertools.islice(parts.sessions.listed(), call.query["limit"])
    ]
    return Response({"success": True, "count": len(found), "sessions": found})


def session_save(parts: Services, call: Request) -> Response:
    """Without a timestamp it gets the next free one from now: two saves at one moment are two sessions."""
    if call.body.get("timestamp") is not None:
        return _keep_session(parts, int(call.body["timestamp"]), call.body, call.raw_body)
    now = now_ms()
    for timestamp in range(now, now + 1000):
        if answer := _keep_with_timestamp(parts, timestamp, call.body, replace=False):
            return answer
    raise Unavailable("Every timestamp of this second is taken: ask again.", 1)


def session_put(parts: Services, call: Request) -> Response:
    timestamp = call.path["timestamp"]
    if call.body.get("timestamp") is None:
        return _keep_with_timestamp(parts, timestamp, call.body)
    if call.body["timestamp"] != timestamp:
        raise BadRequest(f"timestamp: expected {timestamp}, as in the path, or none.")
    return _keep_session(parts, timestamp, call.body, call.raw_body)


def token_create(parts: Services, call: Request) -> Response:
    ttl = int(call.body.get("ttlSeconds") or TOKEN_TTL)
    token, caller = issue_token(parts.store, call.body["subject"], call.body["permissions"], ttl, now_ms())
    log.info("authentication: %s gave %s a token for %d s", call.caller.subject, caller.subject, ttl)
    return Response({"token": token, **caller_json(caller)}, 201)


def caller_json(caller: Caller) -> dict[str, Any]:
    expires = None if caller.expires is None else iso_time(caller.expires)
    return {"subject": caller.subject, "permissions": list(caller.permissions), "expiresAt": expires}


def token_show(parts: Services, call: Request) -> Response:
    return Response(caller_json(call.caller))


def token_revoke(parts: Services, call: Request) -> Response:
    if call.caller.digest is None:
        raise Conflict("No session token was sent, so there is none to revoke.")
    parts.authenticator.revoke(call.caller.digest)
    log.info("authentication: %s revoked its token", call.caller.subject)
    return Response(b"", 204)


def openapi(parts: Services, call: Request) -> Response:
    return Response(describe_api())


def _keep_with_timestamp(parts: Services, timestamp: int, body: Mapping[str, Any], *, replace: bool = True) -> Any:
    document = {**body, "timestamp": timestamp}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return _keep_session(parts, timestamp, document, text, replace=replace)


def _keep_session(
    parts: Services, timestamp: int, document: dict[str, Any], text: bytes, *, replace: bool = True
) -> Response | None:
    """None when the timestamp is taken and must not be replaced."""
    try:
        draft = due_notification(timestamp, document, progress(document))
    except NotASession:  # it may be a script alone; prompts-status says what is wrong with it
        draft = None
    if not parts.store.save(timestamp, text, draft, replace=replace):
        return None
    saved = {"success": True, "message": "Session saved", "sessionKey": f"session:{timestamp}"}
    return Response({**saved, "storage": parts.store.name})


# ======================================================================================================
# HTTP application: the routes
# ======================================================================================================

_TIMESTAMP: Schema = {"type": "integer", "minimum": 0, "maximum": 99_999_999_999_999, "example": 1738195200000}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1_000_000, "example": 48}
_STORY: Schema = {"type": "string", "maxLength": 200, "example": "59f64b1e-726a-439d-a6bc-0dfefcababdb"}
_ID: Schema = {
    "type": "string", "minLength": 1, "maxLength": 200, "pattern": ID_PATTERN,
    "example": "notif_1738195200000_0123456789abcdef",
}  # fmt: skip
_TIME: Schema = {"type": "string", "example": "2026-01-29T10:00:00Z"}
_TEXT: Schema = {"type": "string", "example": "..."}
_FLAG: Schema = {"type": "boolean", "example": True}
_ANY: Schema = {"example": None}

PATH_PARAMETERS: Mapping[str, Schema] = {"timestamp": _TIMESTAMP, "notification_id": _ID}


def _object(**properties: Schema) -> Schema:
    """Exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _total(kind: str) -> Schema:
    """A notification's own total, without which it is none."""
    part = {"type": {"const": kind}, TOTALS[kind]: {"type": "integer"}}
    return {"title": f"{TOTALS[kind]} with {kind}", "properties": part, "required": [TOTALS[kind]]}


_SESSION: Schema = {
    "type": "object",
    "properties": {
        "timestamp": _TIMESTAMP,
        "scriptText": _TEXT,
        "episodeContext": _TEXT,
        "storyUuid": _TEXT,
        "analyzedEpisode": {"type": "object", "example": {"scenes": []}},
        "promptMode": {"type": "string", "example": "storyswarm"},
        "retrievalMode": _TEXT,
        "selectedLLM": _TEXT,
    },
    "anyOf": [
        {"title": "scriptText", "properties": {"scriptText": {"type": "string"}}, "required": ["scriptText"]},
        {
            "title": "analyzedEpisode",
            "properties": {"analyzedEpisode": {"type": "object"}},
            "required": ["analyzedEpisode"],
        },
    ],
}
_SAVED = _object(success=_FLAG, message=_TEXT, sessionKey=_TEXT, storage={"enum": ["redis", "sqlite"]})
_WHOLE_SESSION = _object(success=_FLAG, data={"type": "object", "example": {}}, storage={"enum": ["redis", "sqlite"]})
_SUMMARY = _object(
    timestamp=_TIMESTAMP,
    storyUuid=_ANY,
    promptMode=_ANY,
    scriptText=_TEXT,
    analyzedEpisode=_object(
        episodeNumber=_ANY, title=_ANY, scenes=_array(_object(sceneNumber=_ANY, title=_ANY, totalBeats=_COUNT))
    ),
)

_NEW_NOTIFICATION: Schema = {
    "type": "object",
    "required": ["type", "sessionTimestamp", "storyUuid", "episodeNumber"],
    "properties": {
        "type": {"type": "string", "enum": list(TOTALS)},
        "sessionTimestamp": _TIMESTAMP,
        "storyUuid": _STORY,
        "episodeNumber": _COUNT,
        "totalPrompts": _COUNT,
        "totalBeats": _COUNT,
    },
    "anyOf": [_total(kind) for kind in TOTALS],
}
_NOTIFICATION: Schema = {
    "type": "object",
    "required": ["id", "type", "sessionTimestamp", "storyUuid", "episodeNumber", "timestamp"],
    "properties": {
        "id": _ID,
        "type": {"type": "string", "enum": list(TOTALS)},
        "sessionTimestamp": {"type": "integer", "example": 1738195200000},
        "storyUuid": {"type": "string", "example": "59f64b1e-726a-439d-a6bc-0dfefcababdb"},
        "episodeNumber": {"type": "integer", "example": 2},
        "totalPrompts": {"type": "integer", "example": 48},
        "totalBeats": {"type": "integer", "example": 48},
        "timestamp": _TIME,
    },
    "additionalProperties": False,
}

_CALLER: Mapping[str, Schema] = {
    "subject": {"type": "string", "example": "storyart"},
    "permissions": _array({"type": "string", "enum": list(PERMISSIONS)}),
    "expiresAt": {"type": ["string", "null"], "example": "2026-01-29T22:00:00Z"},
}
_TOKEN_WANTED: Schema = {
    "type": "object",
    "required": ["subject", "permissions"],
    "properties": {
        "subject": {
            "type": "string",
            "minLength": 1,
            "maxLength": 64,
            "pattern": SUBJECT_PATTERN,
            "example": "storyart",
        },
        "permissions": {"type": "array", "minItems": 1, "items": {"type": "string", "enum": list(PERMISSIONS)}},
        "ttlSeconds": {
            "type": "integer",
            "minimum": TOKEN_TTL_RANGE[0],
            "maximum": TOKEN_TTL_RANGE[1],
            "example": TOKEN_TTL,
        },
    },
}

_CHECK_QUERY: Mapping[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100, "example": 100},
    "type": {"type": "string", "enum": [*TOTALS, "all"], "default": "prompts_ready", "example": "all"},
}
_LIST_QUERY: Mapping[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 200, "default": 20, "example": 5}
}

_GPU: Schema = _object(
    available=_FLAG,
    **{name: {"type": "integer", "example": 8} for name in gpu_json(GpuStatus()) if name not in ("available", "error")},
    error={"type": ["string", "null"], "example": None},
)
_STARTED = _object(success=_FLAG, message=_TEXT, port={"type": "integer", "example": 7801}, apiUrl=_TEXT)
_PROMPTS = _object(
    promptsReady=_FLAG, sessionTimestamp=_TIMESTAMP, totalBeats=_COUNT, totalPrompts=_COUNT, lastUpdated=_TIME
)
_HEALTH = _object(status={"enum": ["ok", "degraded"]}, store={"enum": ["redis", "sqlite"]})

_FAILED = {"success": False}
_API = "/api/v1"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/health", health, "open", "Does the service answer, and its store?", {200: _HEALTH, 503: _HEALTH}),
    Route("GET", "/openapi.json", openapi, "open", "This description.", {200: {"type": "object", "example": {}}}),
    Route("GET", f"{_API}/gpu/status", gpu_status, "gpu:read", "Is the GPU free?", {200: _GPU}, gpu_json(GpuStatus())),
    Route(
        "POST", f"{_API}/swarmui/start", swarmui_start, "swarmui:control", "Make SwarmUI ready.", {200: _STARTED},
        _FAILED,
    ),
    Route(
        "GET", f"{_API}/notifications/check", notifications_check, "notifications:read",
        "What is not acknowledged, oldest first.", {200: _object(notifications=_array(_NOTIFICATION))},
        query=_CHECK_QUERY,
    ),
    Route(
        "POST", f"{_API}/notifications", notification_create, "notifications:write", "Make a notification.",
        {201: _NOTIFICATION, 200: _NOTIFICATION}, body=_NEW_NOTIFICATION,
    ),
    Route(
        "POST", f"{_API}/notifications/<notification_id>/ack", notification_ack, "notifications:read",
        "It was dealt with.", {200: _object(success=_FLAG, notificationId=_ID)}, _FAILED, (404,),
    ),
    Route(
        "GET", f"{_API}/session/<timestamp>/prompts-status", prompts_status, "sessions:read",
        "Are its prompts complete?", {200: _PROMPTS}, {"promptsReady": False}, (404,),
    ),
    Route(
        "POST", f"{_API}/session/save", session_save, "sessions:write", "Keep a session.", {200: _SAVED}, _FAILED,
        body=_SESSION,
    ),
    Route(
        "GET", f"{_API}/session/latest", session_latest, "sessions:read", "The newest session.", {200: _WHOLE_SESSION},
        _FAILED, (404,),
    ),
    Route(
        "GET", f"{_API}/session/list", session_list, "sessions:read", "Summaries, newest first.",
        {200: _object(success=_FLAG, count=_COUNT, sessions=_array(_SUMMARY))}, _FAILED, query=_LIST_QUERY,
    ),
    Route(
        "GET", f"{_API}/session/<timestamp>", session_get, "sessions:read", "A whole session.", {200: _WHOLE_SESSION},
        _FAILED, (404,),
    ),
    Route(
        "PUT", f"{_API}/session/<timestamp>", session_put, "sessions:write", "Create or replace a session.",
        {200: _SAVED}, _FAILED, body=_SESSION,
    ),
    Route(
        "POST", f"{_API}/auth/session", token_create, "admin", "Make a session token.",
        {201: _object(token=_TEXT, **_CALLER)}, body=_TOKEN_WANTED,
    ),
    Route("GET", f"{_API}/auth/session", token_show, "any", "Who am I?", {200: _object(**_CALLER)}),
    Route("DELETE", f"{_API}/auth/session", token_revoke, "any", "Revoke the token sent.", {204: None}, errors=(409,)),
)  # fmt: skip


def error_statuses(route: Route) -> list[int]:
    """Each status other than its answers that a route may give."""
    found = {400, 421, 500, 503, *route.errors}
    if route.permission != "open":
        found |= {401, 403, 429}
    if route.body is not None:
        found |= {413, 415}
    return sorted(found - route.answers.keys())


def error_schema(route: Route) -> Schema:
    shape = {name: {"const": value} for name, value in route.error_shape.items()}
    return _object(**{**shape, "error": {"type": "string", "example": "What happened, and what to do next."}})


def example_of(schema: Schema) -> Any:
    if "example" in schema or "default" in schema or "const" in schema:
        return schema.get("example", schema.get("default", schema.get("const")))
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "array":
        return [example_of(schema["items"])]
    return {name: example_of(part) for name, part in schema.get("properties", {}).items()}


def _for_openapi(schema: Any) -> Any:
    """JSON Schema 2020-12 has `examples` where we have one, and patterns that match anywhere."""
    if isinstance(schema, list):
        return [_for_openapi(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _for_openapi(value) for name, value in schema.items() if name != "example"}
    if "example" in schema:
        made["examples"] = [schema["example"]]
    if "pattern" in schema and isinstance(schema["pattern"], str):
        made["pattern"] = f"^{schema['pattern']}$"
    return made


@functools.cache
def describe_api() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes."""
    paths: dict[str, Any] = {}
    for route in ROUTES:

        def content(schema: Schema) -> dict[str, Any]:
            return {"application/json": {"schema": _for_openapi(schema), "example": example_of(schema)}}

        parameters = [
            {"name": name, "in": "path", "required": True, "schema": _for_openapi(PATH_PARAMETERS[name])}
            for name in re.findall(r"<(\w+)>", route.path)
        ] + [{"name": name, "in": "query", "schema": _for_openapi(schema)} for name, schema in route.query.items()]
        answers: dict[str, Any] = {}
        for status, schema in route.answers.items():
            answers[str(status)] = {"description": http.client.responses[status]}
            if schema:
                answers[str(status)]["content"] = content(schema)
        for status in error_statuses(route):
            answers[str(status)] = {
                "description": http.client.responses[status],
                "content": content(error_schema(route)),
            }
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": route.handler.__name__,
            "parameters": parameters,
            "responses": answers,
            "x-permission": route.permission,
            "security": [] if route.permission == "open" else [{"token": []}],
        }
        if route.body is not None:
            required = route.body.get("required", ())
            nullable = {
                name: part if name in required else {**part, "type": [part["type"], "null"]}
                for name, part in route.body["properties"].items()
            }
            body = {**route.body, "properties": nullable}
            operation["requestBody"] = {"required": True, "content": content(body)}
        paths.setdefault(re.sub(r"<(\w+)>", r"{\1}", route.path), {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "StoryTeller automation service", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


# ======================================================================================================
# HTTP application: who answers
# ======================================================================================================


def error_answer(shape: Mapping[str, Any], fault: ApiError) -> Response:
    """The one place that turns an error into an answer."""
    headers = {}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    if isinstance(fault, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response({**shape, "error": str(fault)}, fault.status, headers)


COMMON_HEADERS: Mapping[str, str] = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Origin",
}


def request_id_of(environ: Mapping[str, Any]) -> str:
    """A caller's own, when it is one that a log can hold; else a new one."""
    given = str(environ.get("HTTP_X_REQUEST_ID", ""))
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)


def log_request(environ: Mapping[str, Any], request_id: str, subject: str, status: int, began: float) -> None:
    """One line a request: polls are many, so they are shown only when asked for."""
    level = logging.DEBUG if status < 400 and environ["REQUEST_METHOD"] in ("GET", "HEAD", "OPTIONS") else logging.INFO
    if log.isEnabledFor(level):
        ms = (time.monotonic() - began) * 1000
        path = environ.get("bottle.raw_path", "")
        log.log(level, "http: %s %s %d %s %.1f ms %s", environ["REQUEST_METHOD"], path, status, subject, ms, request_id)


def known_origin(origin: str | None, settings: Settings) -> str | None:
    """The origin of a page that may read our answers, else None."""
    return origin if origin in (*settings.cors_origins, *settings.trusted_origins) else None


def headers_for(origin: str | None) -> dict[str, str]:
    """What every answer carries; `origin` is a known one or None. Without them an error is a network failure to
    the page."""
    if origin is None:
        return dict(COMMON_HEADERS)
    return {
        **COMMON_HEADERS,
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "Retry-After, WWW-Authenticate",
    }


def refusal(
    code: int, reason: str, words: str, headers: Mapping[str, str], settings: Settings
) -> tuple[bytes, dict[str, str]]:
    """Body and headers for a request that the server refuses before it comes to a route. Of its words only those
    before what it quotes, which is a header, perhaps the token's."""
    told = words.partition('"')[0].rstrip()
    request_id = request_id_of({"HTTP_X_REQUEST_ID": headers.get("X_REQUEST_ID", "")})
    log.info("http: refused %d %s %s", code, reason, request_id)
    common = headers_for(known_origin(headers.get("ORIGIN"), settings))
    return to_bytes(Response({"error": f"{reason}: {told}"})), {**common, "X-Request-Id": request_id}


def preflight(environ: Mapping[str, Any], origin: str | None, methods: Sequence[str]) -> Response:
    """A browser's question before it calls, without a token."""
    headers = {"Allow": ", ".join(methods)}
    if origin:
        headers["Access-Control-Allow-Methods"] = headers["Allow"]
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Last-Event-ID"
        headers["Access-Control-Max-Age"] = "600"
        if environ.get("HTTP_ACCESS_CONTROL_REQUEST_PRIVATE_NETWORK") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
    return Response(b"", 204, headers)


def to_bytes(answer: Response) -> bytes:
    body = answer.body
    return body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def make_services(settings: Settings, store: Store, gpu: GpuMonitor, swarmui: SwarmUILauncher) -> Services:
    return Services(
        settings,
        store,
        gpu,
        swarmui,
        Sessions(store),
        Notifications(store),
        Authenticator(settings, store),
        threading.BoundedSemaphore(WAITING_STARTS),
        threading.Lock(),
        threading.Event(),
    )


def create_app(parts: Services) -> bottle.Bottle:
    """The service as a WSGI application. Raises ValueError for an empty `settings.api_token` and for a route that
    names no permission. Once `parts.stopping` is set, new requests are answered 503."""
    settings, authenticator = parts.settings, parts.authenticator
    if not settings.api_token:
        raise ValueError("an API token is needed")
    for route in ROUTES:
        if route.permission not in (*PERMISSIONS, "any", "open"):
            raise ValueError(f"{route.method} {route.path} names no permission")

    def run(route: Route, caller: Caller | None, path: Mapping[str, str], origin: str | None) -> Response:
        if caller and not caller.may(route.permission):
            raise Forbidden(f"This token lacks the permission {route.permission}.")
        environ = bottle.request.environ
        call = read_call(route, environ, path, parts.large_bodies, caller=caller, origin=origin)
        return route.handler(parts, call)

    def answer(routes: Mapping[str, Route], **path: str) -> bottle.HTTPResponse:
        """The way of every request; `routes` are those of its path, by their methods."""
        began = time.monotonic()
        environ = bottle.request.environ
        origin = known_origin(environ.get("HTTP_ORIGIN"), settings)
        method, request_id = environ["REQUEST_METHOD"], request_id_of(environ)
        route = routes.get("GET" if method == "HEAD" else method)
        subject = "-"
        try:
            if parts.stopping.is_set() and not (route and route.permission == "open"):
                raise Unavailable("The service is stopping: ask again.", 5)
            if not is_own_host(environ.get("HTTP_HOST"), settings):
                raise MisdirectedRequest(
                    "The Host header names another machine: add its name to STORYTELLER_ALLOWED_HOSTS."
                )
            caller = None
            asks_first = method == "OPTIONS"
            if not asks_first and (route is None or route.permission != "open"):
                caller = authenticator.identify(environ)
                subject = caller.subject
            if route:
                found = run(route, caller, path, origin)
            elif asks_first:
                # Of a path that is none of ours too: else the page would never see the 404.
                found = preflight(environ, origin, sorted(routes or {"GET", "POST", "PUT", "DELETE"}))
            elif routes:
                allow = {"Allow": ", ".join(sorted(routes))}
                found = Response({"error": "Method not allowed on this path."}, 405, allow)
            else:
                found = Response({"error": "Not found: there is no such path."}, 404)
        except ApiError as fault:
            found = error_answer(route.error_shape if route else {}, fault)
        except Exception:
            log.exception("http: %s %s failed, request %s", method, route.path if route else "", request_id)
            found = Response({**(route.error_shape if route else {}), "error": "Internal server error"}, 500)
        log_request(environ, request_id, subject, found.status, began)
        headers = {**headers_for(origin), **found.headers, "X-Request-Id": request_id}
        return bottle.HTTPResponse(to_bytes(found), found.status, headers)

    app = bottle.Bottle()
    by_path: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        by_path.setdefault(route.path, {})[route.method] = route
    for path, routes in by_path.items():
        # One callback for every method: so a fixed path wins over one with a parameter whatever the method is.
        app.route(path, "ANY", functools.partial(answer, routes))
    app.default_error_handler = lambda error: answer({})  # Bottle's own are paths that are none of ours
    return app


# ======================================================================================================
# HTTP application: the short way
# ======================================================================================================


@dataclass(frozen=True, eq=False)
class Short:
    """A request that may go the short way: where it came from (as WSGI has it) and what it asks for."""

    route: Route
    environ: Mapping[str, Any]
    call: Request


class ShortWay:
    """How what programs ask all day is answered: no thread for each, and one step of the store for all that ask at
    one moment, which begins after they asked: one hand-over from thread to thread, however many they are. Whatever is
    neither plain success nor an absent store goes the long way, through the application. Both have the same answers."""

    LONGEST = 8192  # bytes of a request
    KEPT = 512  # polls whose bytes are remembered

    def __init__(self, parts: Services) -> None:
        self._parts = parts
        self._front = PendingFront(parts.store, parts.notifications)
        self._checked: dict[Any, Response] = {}  # answers to checks, until the front changes
        self._read: dict[Any, Short] = {}
        handlers = (gpu_status, notifications_check, prompts_status, notification_create, notification_ack)
        self._routes = [
            (route.method, re.compile(re.sub(r"<(\w+)>", r"(?P<\1>[^/]+)", route.path)), route)
            for route in ROUTES
            if route.handler in handlers
        ]

    def find(self, address: str, data: bytes, read: Callable[[], dict[str, Any] | None]) -> Short | None:
        """What these bytes of a client ask for; None when they go the long way. A poll is the same bytes each time,
        so what they mean is remembered."""
        if len(data) > self.LONGEST:
            return None
        key = (address, data)
        if key in self._read:
            return self._read[key]
        short = self._short_of(read())
        if short and short.route.method == "GET":
            self._read[key] = short
            bound(self._read, self.KEPT)
        return short

    def _short_of(self, environ: dict[str, Any] | None) -> Short | None:
        if environ is None or not is_own_host(environ.get("HTTP_HOST"), self._parts.settings):
            return None
        for method, pattern, route in self._routes:
            found = pattern.fullmatch(environ["PATH_INFO"])
            if found and method == environ["REQUEST_METHOD"]:
                with contextlib.suppress(ApiError):
                    origin = known_origin(environ.get("HTTP_ORIGIN"), self._parts.settings)
                    path = found.groupdict()
                    call = read_call(route, environ, path, self._parts.large_bodies, caller=None, origin=origin)
                    return Short(route, environ, call)
        return None

    def caller(self, short: Short) -> Caller | None:
        """Who asks, when that is known without the store and allowed."""
        with contextlib.suppress(ApiError):
            caller = self._parts.authenticator.known(short.environ)
            if caller and caller.may(short.route.permission) and not self._parts.stopping.is_set():
                return caller
        return None

    def ask_gpu(self) -> Future[GpuStatus]:
        return self._parts.gpu.ask()

    @staticmethod
    def tell_gpu(status: GpuStatus) -> Response | None:
        return None if status.fault else Response(gpu_json(status))

    def look(self, shorts: Sequence[Short]) -> list[Response | None]:
        """The answers to polls, in one round trip; further ones only where something changed. Not for two threads at
        once."""
        front, sessions = self._front, [one.call.path.get("timestamp") for one in shorts]
        timestamps = list(set(sessions) - {None})
        page, ids = (front.next_page(), front.ids) if None in sessions else (0, ())
        try:
            glance = self._parts.store.glance(page, ids, timestamps, front.members)
            if page and front.update(glance):
                self._checked.clear()
        except Unavailable as fault:
            return [error_answer(one.route.error_shape, fault) for one in shorts]
        states = dict(zip(timestamps, glance.sessions))
        return [
            self._check(one.call.query) if timestamp is None else self._prompts(timestamp, states[timestamp])
            for one, timestamp in zip(shorts, sessions)
        ]

    def _check(self, query: Mapping[str, Any]) -> Response | None:
        key = (query["type"], query["limit"])
        if key not in self._checked:
            found = self._front.check(types_of(query["type"]), query["limit"])
            if found is None:
                return None
            self._checked[key] = Response(to_bytes(check_answer(found)))
        return self._checked[key]

    def _prompts(self, timestamp: int, state: object) -> Response | None:
        sessions = self._parts.sessions
        with contextlib.suppress(Unavailable):
            known = sessions.known(timestamp, state) or sessions.renewed(timestamp, state)
            return known and _prompts_answer(known)
        return None

    def write(self, shorts: Sequence[Short]) -> list[Response | None]:
        """The answers to what was made and acknowledged, each in one step for all."""
        answers: dict[int, Response | None] = {}
        for handler, step in ((notification_ack, self._acknowledge), (notification_create, self._create)):
            numbers = [number for number, one in enumerate(shorts) if one.route.handler is handler]
            try:
                found = step([shorts[number].call for number in numbers]) if numbers else []
            except Unavailable as fault:  # as ever, it may have happened
                found = [error_answer(shorts[number].route.error_shape, fault) for number in numbers]
            answers.update(zip(numbers, found))
        return [answers[number] for number in range(len(shorts))]

    def _acknowledge(self, calls: Sequence[Request]) -> list[Response | None]:
        ids = [call.path["notification_id"] for call in calls]
        done = self._parts.notifications.acknowledge_own(ids)
        return [acknowledged_answer(id) if ours else None for id, ours in zip(ids, done)]

    def _create(self, calls: Sequence[Request]) -> list[Response | None]:
        made = self._parts.notifications.create([draft_of(call.body) for call in calls])
        return [created_answer(*one) for one in made]

    def respond(self, short: Short, caller: Caller, answer: Response, began: float) -> bytes:
        """All that is sent."""
        body, request_id = to_bytes(answer), request_id_of(short.environ)
        log_request(short.environ, request_id, caller.subject, answer.status, began)
        told = b"X-Request-Id: %b\r\nDate: %b\r\nContent-Length: %d\r\n\r\n"
        told %= (request_id.encode(), _http_date(int(time.time())), len(body))
        further = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items()).encode("latin-1")
        return _head(answer.status, short.call.origin) + further + told + body


@functools.lru_cache(maxsize=64)
def _head(status: int, origin: str | None) -> bytes:
    first = f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
    return "".join([first, *(f"{name}: {value}\r\n" for name, value in headers_for(origin).items())]).encode("latin-1")


@functools.lru_cache(maxsize=1)
def _http_date(second: int) -> bytes:
    return email.utils.formatdate(second, usegmt=True).encode()


@functools.lru_cache(maxsize=Sessions.KEPT)
def _prompts_answer(known: KnownSession) -> Response | None:
    """None where there is more to do than to answer."""
    stored, facts = known.stored, known.facts
    if facts.fault or isinstance(facts.progress, NotASession) or is_announcement_due(stored, facts):
        return None
    return Response(to_bytes(Response(prompts_json(stored, facts))))


# ======================================================================================================
# Server: settings and sockets
# ======================================================================================================

CONNECTIONS = min(450, descriptor_limit() - 100)  # below what `select` on Windows takes, files and Redis beside them
KEEPALIVE_TIMEOUT = 120.0  # seconds that a kept connection may be idle
REQUEST_TIMEOUT = 60.0  # seconds for a request to be whole, and for a client that takes nothing of its answer

# A thread costs 150 KB. Half of them may wait for SwarmUI, 24 more for Redis; the others serve what ends at once.
THREADS = 2 * WAITING_STARTS

WAITRESS: Mapping[str, Any] = {
    # At its limit waitress leaves new clients unanswered; ours is below it, and lets idle ones go first.
    "connection_limit": CONNECTIONS + 40,
    "backlog": 1024,
    # Never: waitress counts by the clock on the wall, whose setting would end requests half sent. See _sweep.
    "channel_timeout": 1_000_000_000,
    "max_request_header_size": 64 * 1024,  # browsers send 16 KiB at most
    # Above our own limit: waitress refuses with a reset, the application with a 413 that says why.
    "max_request_body_size": MAX_BODY + 16 * 1024 * 1024,
    # What is smaller stays in memory: a full temporary folder must not hold up a session.
    "inbuf_overflow": 9 * 1024 * 1024,
    "outbuf_overflow": 9 * 1024 * 1024,
    "recv_bytes": 256 * 1024,  # an 850 KB session in 4 reads instead of 104
    "ident": None,  # no Server header
    "clear_untrusted_proxy_headers": False,  # a request that came through a proxy is never trusted: see them
    "log_socket_errors": False,  # a client that leaves is no error
}


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, all on one port; localhost is 127.0.0.1 and, where there is IPv6, ::1. Raises StartError."""
    try:
        if host == "localhost":
            addresses = ["127.0.0.1", "::1"]
        else:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            addresses = [str(found[0][4][0])]
        for attempt in range(20):
            try:
                return _listen_on_all(addresses, port)
            except OSError as error:
                # The port that was free on the first address may be taken on the second: pick another.
                if port or error.errno not in _IN_USE or attempt == 19:
                    raise
        raise AssertionError
    except (socket.gaierror, UnicodeError):
        raise StartError(
            f"STORYTELLER_HOST {host} is not known: set it to localhost, or to this PC's address."
        ) from None
    except OSError as error:
        if error.errno in _IN_USE:
            raise StartError(f"Port {port} is in use by another program: stop it, or set STORYTELLER_PORT.") from None
        raise StartError(
            f"Cannot listen on {host} port {port} ({error.strerror}): set STORYTELLER_HOST or STORYTELLER_PORT."
        ) from None


_IN_USE = {errno.EADDRINUSE, 10048, 10013}  # Windows: in use; held by somebody who took it exclusively


def _listen_on_all(addresses: Iterable[str], port: int) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for address in addresses:
            try:
                made.append(listen(address, port))
            except OSError as error:
                if not made or error.errno not in _NOT_HERE:
                    raise
            port = made[0].getsockname()[1]
        return made
    except OSError:
        for one in made:
            one.close()
        raise


# ======================================================================================================
# Server: connections
# ======================================================================================================


class Parser(waitress.parser.HTTPRequestParser):
    """It lets a ValueError of urllib through, as of http://[/, which would end the connection without an answer."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise waitress.parser.ParsingError("Bad URI") from None


def environ_of(data: bytes, address: str, adjustments: Any) -> dict[str, Any] | None:
    """What a whole request of HTTP/1.1 says, as WSGI has it, when the bytes are one and nothing else."""
    if not data.startswith((b"GET ", b"POST ")):
        return None
    request, read = Parser(adjustments), 0
    while read < len(data) and not request.completed:
        read += request.received(data[read:])
    plain = request.completed and read == len(data) and not (request.error or request.empty or request.chunked)
    if not plain or request.version != "1.1" or request.expect_continue:
        return None
    if request.headers.get("CONNECTION", "keep-alive").lower() != "keep-alive":
        return None
    environ: dict[str, Any] = {f"HTTP_{name}": value for name, value in request.headers.items()}
    return environ | {
        "REQUEST_METHOD": request.command,
        "PATH_INFO": request.path,
        "bottle.raw_path": request.path,
        "QUERY_STRING": request.query,
        "REMOTE_ADDR": address,
        "CONTENT_TYPE": request.headers.get("CONTENT_TYPE", ""),
        "CONTENT_LENGTH": str(request.content_length),
        "wsgi.input": request.get_body_stream(),
    }


def make_channel_class(settings: Settings, take: Callable[[Any, bytes], bool]) -> type[waitress.channel.HTTPChannel]:
    """A connection that gives what waitress refuses by itself (bad chunks, malformed or too large headers) our
    shape and our headers, and that first offers to take() what came."""

    class JsonErrorTask(waitress.task.ErrorTask):
        def execute(self) -> None:
            error = self.request.error
            body, headers = refusal(error.code, error.reason, error.body, self.request.headers, settings)
            self.status = f"{error.code} {error.reason}"
            self.response_headers.extend(headers.items())
            self.set_close_on_finish()
            self.content_length = len(body)
            self.write(body)

    class Channel(waitress.channel.HTTPChannel):
        parser_class, error_task_class = Parser, JsonErrorTask
        active = math.inf  # when bytes last came or went
        begun: float | None = None  # when the first byte came of a request that is not whole yet
        taken: float | None = None  # when the client last took something of its answer

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.active = time.monotonic()

        def received(self, data: bytes) -> bool:
            if self.is_idle() and take(self, data):
                self.active = time.monotonic()
                return True
            return self.receive(data)

        def receive(self, data: bytes) -> bool:
            """The long way: parse it, and hand it to a thread."""
            result = super().received(data)
            self.active = time.monotonic()
            if self.request is None:
                self.begun = None
            elif self.begun is None:
                self.begun = self.active
            return result

        def reply(self, answer: bytes) -> None:
            """From the loop's thread, while no other thread has this connection."""
            try:
                sent = self.send(answer)
            except OSError:
                self.handle_close()
                return
            if sent < len(answer) and self.connected:
                self.write_soon(answer[sent:])

        def send(self, data: bytes, do_close: bool = True) -> int:
            sent = super().send(data, do_close)
            if sent:
                self.active = self.taken = time.monotonic()
            return sent

        def writable(self) -> bool:
            """A thread that answers sends by itself, under a lock that we would wait for without end; only past so
            much does it wait for us."""
            if self.requests and self.total_outbufs_len <= self.adj.outbuf_high_watermark:
                return False
            return super().writable()

        def is_idle(self) -> bool:
            return not (self.requests or self.total_outbufs_len or self.begun)

        def is_stuck(self, now: float) -> bool:
            if not self.total_outbufs_len:
                self.taken = now
            return now - min(self.begun or now, self.taken or now) >= REQUEST_TIMEOUT

    return Channel


class Watched(dict[int, Any]):
    """The map that waitress keeps of its sockets, each of them also in a selector. Its own loop asks all of them at
    every turn what they wait for, which costs 1 us each, 400 idle ones too; here only what something happened to
    is asked, and what a thread is working for."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        self._working: set[Any] = set()

    def __setitem__(self, descriptor: int, one: Any) -> None:
        super().__setitem__(descriptor, one)
        self._selector.register(descriptor, selectors.EVENT_READ, one)

    def __delitem__(self, descriptor: int) -> None:
        self._working.discard(self[descriptor])
        super().__delitem__(descriptor)
        with contextlib.suppress(KeyError):  # nothing of it was waited for
            self._selector.unregister(descriptor)

    def turn(self, seconds: float) -> None:
        """Wait until something happens, and see to it."""
        woken = False  # by a thread, which has done its work
        for key, events in self._selector.select(seconds):
            one = key.data
            woken = woken or isinstance(one, waitress.trigger.trigger)
            if events & selectors.EVENT_READ and self.get(key.fd) is one:
                if one.readable():
                    waitress.wasyncore.read(one)
                else:  # more came than is to be read now, or the client left: not to be told again
                    self.watch(one)
                    continue
            if events & selectors.EVENT_WRITE and self.get(key.fd) is one:
                waitress.wasyncore.write(one)
            if self.get(key.fd) is one and isinstance(one, waitress.channel.HTTPChannel):
                self.look_after(one)
                if key.events & selectors.EVENT_WRITE or one.writable():
                    self.watch(one)
        for one in list(self._working) if woken else ():
            if not one.requests:
                self._working.discard(one)
            self.watch(one)

    def look_after(self, channel: Any) -> None:
        """A thread that works for it may change what it waits for."""
        if not all(isinstance(request, _Asked) for request in channel.requests[:1]):
            self._working.add(channel)

    def watch(self, one: Any) -> None:
        """Wait for what it wants now. (That it wants to read no more is not said until something comes: mostly it
        wants to again by then.)"""
        descriptor = one._fileno
        if self.get(descriptor) is not one:
            return
        wanted = (selectors.EVENT_READ if one.readable() else 0) | (selectors.EVENT_WRITE if one.writable() else 0)
        key = self._selector.get_map().get(descriptor)
        if key and not wanted:
            self._selector.unregister(descriptor)
        elif key and wanted != key.events:
            self._selector.modify(descriptor, wanted, one)
        elif wanted and not key:
            self._selector.register(descriptor, wanted, one)

    def close(self) -> None:
        self._selector.close()


# ======================================================================================================
# Server: how it runs
# ======================================================================================================


class Workers:
    """As waitress's dispatcher of tasks, whose Condition costs 70 system calls a request. A thread is started when
    none is free, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def add_task(self, task: Any) -> None:
        self._queue.put(task)
        if not self._free.acquire(blocking=False) and len(self._threads) < self._limit:
            self._threads.append(threading.Thread(target=self._work, name="worker", daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                self._free.release()
                task = self._queue.get()
            if task is None:
                return
            try:
                task.service()
            except Exception:
                log.exception("server: a connection's request failed")

    def shutdown(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class _Asked(NamedTuple):
    """A request on the short way that waits for its answer."""

    channel: Any
    data: bytes
    short: Short
    caller: Caller
    began: float


class Lane:
    """A thread that serves what was gathered, all of it at once: what comes while it is at work is its next batch."""

    def __init__(self, serve: Callable[[list[_Asked]], None]) -> None:
        self.gathered: list[_Asked] = []  # in this turn of the loop
        self._queue: queue.SimpleQueue[list[_Asked] | None] = queue.SimpleQueue()
        self._serve = serve
        self._thread = threading.Thread(target=self._run, name="short-way", daemon=True)
        self._thread.start()

    def hand_over(self) -> None:
        if self.gathered:
            self._queue.put(self.gathered)
            self.gathered = []

    def close(self, timeout: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while batch := self._queue.get():
            with contextlib.suppress(queue.Empty):
                while more := self._queue.get_nowait():
                    batch += more
                self._queue.put(None)
            self._serve(batch)


class Server:
    """waitress with a loop of our own, so that it has a short way, and an end in order: its own shutdown drops what it
    holds, or leaves it unanswered."""

    def __init__(
        self,
        app: Callable[..., Any],
        sockets: Sequence[socket.socket],
        settings: Settings,
        short_way: ShortWay | None = None,
    ) -> None:
        self._map = Watched()
        self._workers = Workers(THREADS)
        sockets = list(sockets)
        waitress.server.create_server(app, map=self._map, sockets=sockets, _dispatcher=self._workers, **WAITRESS)
        listeners = self._listeners()
        for listener in listeners:
            listener.channel_class = make_channel_class(settings, self._take)
        self._trigger = listeners[0].trigger  # wakes the loop
        self._short_way = short_way
        self._looking, self._writing = Lane(self._look), Lane(self._write)
        self._grace: float | None = None
        self._closed = False

    def _listeners(self) -> list[Any]:
        return [one for one in self._map.values() if isinstance(one, waitress.server.BaseWSGIServer)]

    def stop(self, grace: float) -> None:
        """End within about `grace` seconds: no new connections, requests in flight are answered whole. May be called
        from a signal handler and from any thread."""
        self._grace = grace
        self._trigger.pull_trigger()

    def run(self) -> None:
        """Serve until stop() is called."""
        swept = time.monotonic()
        while self._grace is None:
            self._turn(1.0)
            if len(self._map) > CONNECTIONS or time.monotonic() - swept >= 1.0:
                swept = time.monotonic()
                self._sweep(swept)
                for listener in self._listeners():
                    self._map.watch(listener)  # one that had to refuse connections may take them again
        for listener in self._listeners():
            listener.accepting = False
            listener.del_channel()
            listener.socket.close()
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and any(map(self._is_busy, list(self._map.values()))):
            self._turn(0.05)
        for lane in (self._looking, self._writing):
            lane.close(max(0.0, deadline - time.monotonic()))
        self._workers.shutdown(timeout=0.5)
        self._closed = True
        waitress.wasyncore.close_all(self._map)
        self._map.close()

    def _turn(self, seconds: float) -> None:
        self._map.turn(seconds)
        self._looking.hand_over()
        self._writing.hand_over()

    def _take(self, channel: Any, data: bytes) -> bool:
        """Whether these bytes go the short way."""
        way, address = self._short_way, channel.addr[0]
        short = way and way.find(address, data, lambda: environ_of(data, address, channel.adj))
        caller = short and way.caller(short)
        if not caller:
            return False
        asked = _Asked(channel, data, short, caller, time.monotonic())
        with channel.requests_lock:  # a thread may be at the end of the request before
            if not channel.is_idle():
                return False
            channel.requests = [asked]  # nothing else is read from it until this is answered
        if short.route.handler is not gpu_status:
            lane = self._looking if short.route.method == "GET" else self._writing
            lane.gathered.append(asked)
            return True
        status = way.ask_gpu()
        if status.done():
            self._answer([asked], [way.tell_gpu(status.result())])
        else:
            status.add_done_callback(lambda done: self._tell([asked], [way.tell_gpu(done.result())]))
        return True

    def _look(self, batch: list[_Asked]) -> None:
        self._serve(batch, self._short_way.look)

    def _write(self, batch: list[_Asked]) -> None:
        self._serve(batch, self._short_way.write)

    def _serve(self, batch: list[_Asked], serve: Callable[[list[Short]], list[Response | None]]) -> None:
        try:
            answers = serve([asked.short for asked in batch])
        except Exception:
            log.exception("server: the short way failed")
            answers = [None] * len(batch)
        self._tell(batch, answers)

    def _tell(self, batch: list[_Asked], answers: list[Response | None]) -> None:
        """Have the loop answer: a connection is its own."""
        if not self._closed:  # its descriptor would be somebody else's
            self._trigger.pull_trigger(lambda: self._answer(batch, answers))

    def _answer(self, batch: list[_Asked], answers: list[Response | None]) -> None:
        for (channel, data, short, caller, began), answer in zip(batch, answers):
            with channel.requests_lock:
                channel.requests = []
            try:
                if answer is None and channel.connected:
                    channel.receive(data)
                    self._map.look_after(channel)
                elif channel.connected:
                    channel.reply(self._short_way.respond(short, caller, answer, began))
                self._map.watch(channel)
            except Exception:  # the others must not wait for ever
                log.exception("server: an answer on the short way failed")
                channel.handle_close()

    def _sweep(self, now: float) -> None:
        """Close what waitress's own time-outs miss (a byte a second, a client that stopped reading), and near the
        limit of connections those that are idle longest."""
        channels = [one for one in self._map.values() if isinstance(one, waitress.channel.HTTPChannel)]
        for channel in channels:
            if channel.is_stuck(now) or (channel.is_idle() and now - channel.active >= KEEPALIVE_TIMEOUT):
                channel.handle_close()
        idle = sorted((one for one in channels if one.is_idle()), key=lambda one: one.active)
        for channel in idle[: max(0, len(self._map) - CONNECTIONS)]:
            channel.handle_close()

    @staticmethod
    def _is_busy(one: Any) -> bool:
        """Whether a connection still has a request at work, or an answer that is not sent whole."""
        return isinstance(one, waitress.channel.HTTPChannel) and bool(one.requests or one.total_outbufs_len)


# ======================================================================================================
# Command line
# ======================================================================================================


def prepare_data_dir(path: Path) -> None:
    """Make it, and see that it can be written. Raises StartError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise StartError(
            f"The data folder {path} cannot be written ({error.strerror}): set STORYTELLER_DATA_DIR to one that can."
        ) from None


class LogFormatter(logging.Formatter):
    """A line a record, as text or as JSON; what would break a line or a terminal is escaped."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._as_json = as_json

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = re.sub(
            r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], record.message
        )
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._as_json:
            return text
        line = {"time": record.asctime, "level": record.levelname, "message": record.message}
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line, ensure_ascii=False)


class LogFile(logging.handlers.RotatingFileHandler):
    """Grows on while another program reads it: Windows renames no file that is open, and the line would be lost."""

    def doRollover(self) -> None:
        self.stream.close()
        self.stream = None  # the next line opens it again
        with contextlib.suppress(OSError):
            os.rename(self.baseFilename, self.baseFilename)  # refused here, before any older one was moved
            super().doRollover()


def own_data_dir(settings: Settings) -> Any:
    """Take the data folder for this process: the open lock file, to be closed at the end. Raises StartError when
    another service has it."""
    path = settings.data_dir / "running"
    file = lock_file(path)
    if file is None:
        where = path.read_text(encoding="utf-8").strip() or "an address that it has not told yet"
        raise StartError(
            f"The data folder {settings.data_dir} is in use by the service at {where}: use that one, stop it, or set "
            "STORYTELLER_DATA_DIR."
        )
    return file


def start_logging(path: Path, settings: Settings) -> None:
    """Into the file, 5 MB and three older ones; warnings to the console too. Raises StartError."""
    try:
        file = LogFile(path, maxBytes=LOG_LIMIT, backupCount=LOGS_KEPT, encoding="utf-8")
    except OSError as error:
        raise StartError(f"The log {path} cannot be written ({error.strerror}): move it away, or mend it.") from None
    file.setFormatter(LogFormatter(as_json=settings.log_format == "json"))
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[file, console], force=True)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits for a moment
    logging.raiseExceptions = False  # a log that cannot be written must not spoil what it tells of


def url_of(settings: Settings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}"


def describe_swarmui(settings: Settings) -> str:
    try:
        return str(plan_launch(settings).program)
    except LaunchError as error:
        return f"cannot be launched: {error}"


def serve(settings: Settings) -> int:
    """Run until told to stop. Raises StartError."""
    sys.setswitchinterval(0.001)  # 5 ms unless told: a thread that computes holds up each step of a poll for that long
    prepare_data_dir(settings.data_dir)
    running = own_data_dir(settings)
    start_logging(settings.data_dir / "storyteller.log", settings)
    token_place = "STORYTELLER_API_TOKEN" if settings.api_token else str(token_path(settings))
    settings = dataclasses.replace(settings, api_token=own_token(settings))
    ended = threading.Event()
    with contextlib.closing(open_store(settings)) as store:
        children: set[int] = set()
        gpu = GpuMonitor(lambda: query_gpus(find_nvidia_smi(settings), children), settings.gpu_cache_seconds)
        with contextlib.closing(SwarmUILauncher(settings)) as swarmui:
            parts = make_services(settings, store, gpu, swarmui)
            sockets = open_sockets(settings.host, settings.port)
            server = Server(create_app(parts), sockets, settings, ShortWay(parts))

            def stop(grace: float) -> None:
                if parts.stopping.is_set():  # told twice: at once
                    end_children(children)
                    os._exit(1)
                parts.stopping.set()
                swarmui.close()
                server.stop(grace)

            handler = on_end_signal(stop, ended)
            port = sockets[0].getsockname()[1]
            running.truncate(0)
            running.write(url_of(settings, port))
            running.flush()
            swarmui.keep_log_short()
            greet(settings, store, port, token_place)
            log.info("server: listening on %s", url_of(settings, port))
            server.run()
            end_children(children)  # what nvidia-smi would still say has nobody to go to
    log.info("server: stopped")
    running.close()
    ended.set()
    del handler
    return 0


def greet(settings: Settings, store: Store, port: int, token_place: str) -> None:
    """Print what a person in front of it needs; never the token."""
    prepare_console(f"StoryTeller automation, port {port}")
    rows = {
        "address": url_of(settings, port),
        "store": f"{store.name}, {store.place}",
        "nvidia-smi": find_nvidia_smi(settings) or "not found: install NVIDIA's driver, or set NVIDIA_SMI",
        "SwarmUI": describe_swarmui(settings),
        "API token": f"in {token_place}",
        "log": str(settings.data_dir / "storyteller.log"),
    }
    print("StoryTeller automation service. Ctrl+C stops it.")
    for name, text in rows.items():
        print(f"  {name:<11} {text}", flush=True)
    if settings.host.lower() != "localhost" and not is_loopback(settings.host):
        log.warning("server: what is sent over the network is not encrypted: set STORYTELLER_HOST=localhost if you can")
    try:
        store.ping()
    except Unavailable as fault:
        log.warning("store: %s Calls that need it get 503 until it does.", fault)


def check(arguments: Mapping[str, str | None]) -> int:
    """The doctor: a line for each thing that can be wrong. 0 when nothing FAILs, else 1."""
    failed = False

    def say(level: str, subject: str, text: str) -> None:
        nonlocal failed
        failed = failed or level == "FAIL"
        print(f"{level:<4} {subject}: {text}", flush=True)

    try:
        settings = load_settings(arguments, os.environ)
    except SettingError as error:
        say("FAIL", "settings", str(error))
        return 1
    env_file = HERE / ".env"
    say("OK", "settings", f"read from arguments, environment and {env_file if env_file.exists() else 'no .env file'}")
    say(*check_store(settings))
    status = query_gpus(find_nvidia_smi(settings), set())
    good = f"{status.gpu_count} GPU(s), {status.memory_total} MiB"
    say("OK" if status.available else "WARN", "nvidia-smi", status.error or good)
    say(*check_swarmui_path(settings))
    found = probe(settings)
    say("OK" if found.ready else "WARN", "SwarmUI", found.words)
    for words in describe_pages(settings):
        say("WARN", "SwarmUI's pages", words)
    say(*check_port(settings))
    return int(failed)


def describe_pages(settings: Settings) -> list[str]:
    """What is unwise about the pages that may see SwarmUI."""
    if settings.swarmui_allow_origin == "*":
        return ["SWARMUI_ALLOW_ORIGIN is *, which opens SwarmUI to every page: set it to StoryArt's origin"]
    if settings.trusted_origins and not settings.swarmui_allow_origin:
        return [
            f"a page of {settings.trusted_origins[0]} cannot see SwarmUI as installed: set SWARMUI_ALLOW_ORIGIN to it"
        ]
    return []


def check_store(settings: Settings) -> tuple[str, str, str]:
    try:
        prepare_data_dir(settings.data_dir)
        if token_path(settings).exists():
            own_token(settings)
        with contextlib.closing(open_store(settings)) as store:
            store.ping()
            return "OK", "store", f"{store.name}, {store.place}"
    except StartError as error:
        return "FAIL", "store", str(error)
    except Unavailable as error:
        return "FAIL", "store", f"{error} Start it, or unset REDIS_URL, REDIS_HOST and REDIS_PORT for the embedded one."


def check_swarmui_path(settings: Settings) -> tuple[str, str, str]:
    try:
        return "OK", "SWARMUI_PATH", str(plan_launch(settings).program)
    except LaunchError as error:
        wrong = settings.swarmui_path is not None and str(error).startswith("SWARMUI_PATH")
        return "FAIL" if wrong else "WARN", "SWARMUI_PATH", str(error)


def check_port(settings: Settings) -> tuple[str, str, str]:
    try:
        for one in open_sockets(settings.host, settings.port):
            one.close()
        return "OK", "port", f"{settings.port} is free"
    except StartError as error:
        host = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        url = url_of(dataclasses.replace(settings, host=host), settings.port)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            answer = json.loads(call(f"{url}/health", 6).body)  # a store that hangs takes 3 s to be told
            if isinstance(answer, dict) and answer.keys() == {"status", "store"}:
                return "OK", "port", f"this service runs on {settings.port} already"
        return "FAIL", "port", str(error)


def make_parser() -> argparse.ArgumentParser:
    rows = (row.metadata | {"default": row.default} for row in dataclasses.fields(Settings))
    table = "\n".join(f"  {row['name']:<24} {row['meaning']}" for row in rows)
    parser = argparse.ArgumentParser(
        description="The StoryTeller automation service.",
        epilog=f"settings, from the environment or a .env file beside this module:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = ("serve", "check", "token")
    parser.add_argument("command", nargs="?", choices=commands, default="serve", help="serve unless said")
    parser.add_argument("--host", help="wins over STORYTELLER_HOST")
    parser.add_argument("--port", help="wins over STORYTELLER_PORT")
    parser.add_argument("--data-dir", help="wins over STORYTELLER_DATA_DIR")
    tokens = parser.add_argument_group("token", "makes a session token, and prints it alone")
    tokens.add_argument("--subject", help="whom it is for: letters, digits, dot, hyphen, underscore; 64 at most")
    tokens.add_argument("--permission", action="append", choices=PERMISSIONS, default=[], help="as often as needed")
    tokens.add_argument("--ttl", type=read_ttl, default=TOKEN_TTL, help="like 90s, 45m, 12h (unless said), 30d")
    instead = tokens.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="show who has tokens, never the tokens")
    instead.add_argument("--revoke", metavar="SUBJECT", help="revoke every token of that subject")
    return parser


def read_ttl(text: str) -> int:
    """Seconds of a duration like 30d."""
    found = re.fullmatch(r"([0-9]{1,8})([smhd]?)", text)
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2] or "s"] if found else 0
    low, high = TOKEN_TTL_RANGE
    if not low <= seconds <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 60s to 30d")
    return seconds


def token_command(settings: Settings, given: Mapping[str, Any]) -> int:
    """Make, list or revoke session tokens; a running service sees it within 5 s. Raises StartError."""
    prepare_data_dir(settings.data_dir)
    try:
        with contextlib.closing(open_store(settings)) as store:
            if given["list"] or given["revoke"]:
                callers = [caller for digest, record in store.tokens() if (caller := read_token(digest, record))]
                callers.sort(key=lambda one: (one.subject, one.expires))
                if given["list"]:
                    for caller in callers:
                        print(caller.subject, iso_time(caller.expires), *caller.permissions)
                    return 0
                theirs = [caller for caller in callers if caller.subject == given["revoke"]]
                for caller in theirs:
                    store.revoke_token(caller.digest)
                    print(f"revoked: {caller.subject}, which would have expired {iso_time(caller.expires)}")
                if not theirs:
                    print(f"{given['revoke']} has no token.", file=sys.stderr)
                return int(not theirs)
            if not re.fullmatch(SUBJECT_PATTERN, given["subject"] or "") or not given["permission"]:
                raise StartError("A token needs --subject NAME and at least one --permission: see --help.")
            token, _ = issue_token(store, given["subject"], given["permission"], given["ttl"], now_ms())
            print(token)
            return 0
    except Unavailable as fault:
        raise StartError(str(fault)) from None


OWN_ARGUMENTS = ("host", "port", "data_dir")  # those that are settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 when `check` found a fault, 2 when the service cannot start."""
    prepare_console()
    given = vars(make_parser().parse_args(argv))
    if given["data_dir"]:  # one that is typed begins where it is typed, not at the module
        given["data_dir"] = os.path.abspath(given["data_dir"])
    arguments = {name: given[name] for name in OWN_ARGUMENTS}
    try:
        if given["command"] == "check":
            return check(arguments)
        settings = load_settings(arguments, os.environ)
        return token_command(settings, given) if given["command"] == "token" else serve(settings)
    except (SettingError, StartError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())

"""StoryTeller automation: the service that joins StoryArt, StorySwarm and SwarmUI on the render PC.

It reports whether the GPU is free, starts SwarmUI and waits until it answers, passes notifications from one
program to the other until they are acknowledged, and reports when a session's prompts are complete. One
process under waitress; sessions and notifications are stored in Redis, or in SQLite if no Redis is configured.

The sections, each under a banner, each depending only on those above it:

    Settings                                one table: name, default, parser, meaning
    Errors                                  the exceptions that become responses, each with its status
    Values: JSON, times, numbers            strict JSON, ISO 8601, whole numbers
    Platform: files, sockets, the console   what differs between Windows, Linux and macOS
    Platform: processes                     children bound to a `with` block; programs that outlive the service
    Logs                                    the service's own log, and SwarmUI's
    Batching and loops                      concurrent questions share one batch; threads that run periodically
    Stores: the interface                   what a store can do, and what is atomic
    Redis: connections                      addresses and timeouts, the circuit breaker, what is wrong with a Redis
    Redis: scripts                          the atomic operations, in Lua
    Stores: Redis                           the interface on Redis
    Stores: Redis with both copies          StoryArt's copy of a session beside StorySwarm's
    SQLite: the file                        its tables, and what may be wrong with it
    Stores: SQLite                          the same on SQLite, in the same order
    Sessions                                pure functions of a document; the cache of their results by SHA-256
    Bridge                                  keeps the two copies of a session in step: whose change wins, who looks
    Notifications                           their fields and ids, which are valid, and those of a store
    Changes                                 what is new in the store since the last look
    GPU                                     the parser (pure); the monitor (one run at a time, cached)
    GPU: reservations                       a lease with a fencing token, and who waits for it
    SwarmUI: the client                     probes of its URL, calls of its API, the origin that it allows
    SwarmUI: what was launched              the program, and how a later run recognizes it
    SwarmUI: its states                     which state follows from a probe and the process; how it is stopped
    SwarmUI: the supervisor                 one thread launches, probes and ends it
    Authentication                          tokens, permissions, trusted origins, allowed hosts
    Alerts: what is seen                    a snapshot of all parts; how often nvidia-smi runs
    Alerts: raised and ended                the conditions, and the webhook
    Metrics                                 the same snapshot for Prometheus
    HTTP: requests, and what serves them    validation against schemas; the thread pools and the batchers
    HTTP: handlers                          one function per endpoint
    HTTP: handlers of sessions and tokens   the same
    HTTP: routes                            one table, from which OpenAPI is generated
    HTTP: application                       the one path of every request
    Live: sessions                          which events the newest sessions cause
    Live: listeners and waiting checks      the stream of events, and checks that wait
    Page                                    the page as text
    Server: settings and sockets            waitress's settings with their reasons
    Server: waitress's internals            its undocumented API: connections and the event loop
    Server: how it runs                     until a signal, and through a graceful shutdown
    Command line: check and status          the data folder; what may be wrong; the page's data as text
    Command line: serve                     a service from its start to its end
    Command line: store, tokens, alerts     one function per command
    Command line: arguments                 the parsers, and the table of commands

How a request flows: waitress reads it from its socket; on the event loop the application finds its route,
identifies the caller and validates the input; the handler makes the Response, perhaps after a Future that a
batch of the store, the thread pool, nvidia-smi or SwarmUI completes; the event loop sends it. No thread waits for it.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import heapq
import hmac
import http.client
import io
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
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, NoReturn, Protocol, TextIO, TypeGuard, TypeVar, cast

try:
    import bottle
    import redis
    import waitress.channel
    import waitress.parser
    import waitress.server
    import waitress.task
    import waitress.trigger
    import waitress.wasyncore
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"The package {error.name} is missing: start the service by run.sh (on Windows: run.bat).", file=sys.stderr)
    sys.exit(2)

Q = TypeVar("Q")
T = TypeVar("T")
Clock = Callable[[], float]

__version__ = "1.0.0"
TITLE = f"StoryTeller automation {__version__}"

log = logging.getLogger("storyteller")
log.addHandler(logging.NullHandler())  # silent until start_console()

# ======================================================================================================
# Settings
# ======================================================================================================

HERE = Path(__file__).resolve().parent
ENV_FILE = HERE / ".env"
STORYART_ORIGINS = ("http://localhost:3000", "http://localhost:5173", "http://127.0.0.1:3000", "http://127.0.0.1:5173")


class StartError(Exception):
    """The service cannot start: the message is one sentence for the console, the exit code is 2."""


def _matching(pattern: str, expected: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return text

    return read


_token = _matching(r"[!-+\--~]{16,1024}", "16 to 1024 printable ASCII characters without spaces or commas")
_cookie = _matching(r"[!#-+\--:<-\[\]-~]{1,4096}", r'printable ASCII without spaces and without any of ",;\ in it')
_log_level = _matching("(?i)debug|info|warning|error", "debug, info, warning or error")
_log_format = _matching("(?i)text|json", "text or json")
_restart = _matching("(?i)no|on-failure", "no or on-failure")
_metrics = _matching("(?i)token|open", "token or open")
_alert_format = _matching("(?i)ntfy|discord|slack|json", "ntfy, discord, slack or json")


def _host(text: str) -> str:
    with contextlib.suppress(ValueError):
        name = re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text)
        if name or (re.fullmatch(r"[A-Za-z0-9:.%]+", text) and ipaddress.IPv6Address(text)):
            return text
    raise ValueError("a host name or an IP address, without a port")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return read


def _decimal(low: float, unit: str = "seconds") -> Callable[[str], float]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= 86_400:  # not inf, which overflows as a timeout
                return float(text)
        raise ValueError(f"{unit}, from {low} to 86400")

    return read


def _path(text: str) -> Path:
    """A relative path is relative to this module: .env must mean the same in whatever folder the service is started."""
    with contextlib.suppress(RuntimeError, UnicodeError):
        path = HERE / Path(text).expanduser()
        if b"\0" not in os.fsencode(path) and len(path.parts) < 400:  # mkdir() recurses for each part
            return path
    raise ValueError("a path")


def _program(text: str) -> str:
    """A bare name is looked up on PATH; anything with a folder in it is a path."""
    path = _path(text)
    return text if os.path.basename(text) == text else str(path)


def _redis_url(text: str) -> str:
    # redis-py reads a missing host as localhost, port 0 as 6379 and any other path as database 0, and ignores what
    # follows a #. OCSP needs further packages.
    form = r"rediss?://([^/?]*@)?[^/?@]+(?<!:0)(/[0-9]*)?(\?(?!.*(\b(host|port)=|ocsp)).*)?"
    with contextlib.suppress(ValueError, TypeError, AttributeError, redis.RedisError):
        good = "#" not in text and re.fullmatch(form, text) and ("ssl_certfile=" in text or "ssl_keyfile=" not in text)
        # This does not connect, but refuses an unknown option. A tab, and in Python 3.10 also [], leaves no host.
        if good and redis.ConnectionPool.from_url(text, host="").make_connection().host:
            return text
    raise ValueError("redis://[user:password@]host[:port][/database]; write # as %23 in a password, / as %2F, ? as %3F")


def _http_url(text: str) -> str:
    with contextlib.suppress(ValueError):  # raised by url.port, too, if it is out of range
        url = urllib.parse.urlsplit(text)
        good = url.scheme in ("http", "https") and url.port != 0 and url.username is None
        # The lookup encodes the name in the same way, and would raise for a..b.
        if good and (url.hostname or "").encode("idna") and not re.search(r"[^!-~]|#", text):
            return text
    raise ValueError("a URL that begins with http:// or https://, without user or fragment")


def _server_url(text: str) -> str:
    if "?" in text:
        raise ValueError("a URL without a query, like http://localhost:7801")
    return _http_url(text).rstrip("/")


def _origin(text: str) -> str:
    """One origin, exactly as browsers send it: any other spelling would never match."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?", text)
    with contextlib.suppress(ValueError):
        scheme, host, port = found.groups() if found else ("", "..", None)
        good = ".." not in host and int(port or 1) < 65536 and (scheme, port) not in (("http", "80"), ("https", "443"))
        if re.search(r"\]$|(^|\.)[0-9]+\.?$", host):  # an IP address in its one canonical spelling
            address = ipaddress.ip_address(host.strip("[]"))
            good = good and host == (f"[{address}]" if ":" in host else str(address))
        if good:
            return text
    raise ValueError("an origin as browsers send it, like http://localhost:3000, without a slash at its end")


def _origin_or_all(text: str) -> str:
    return text if text == "*" else _origin(text)


def _switch(text: str) -> bool:
    if text.lower() not in ("on", "off", "true", "false"):
        raise ValueError("on, off, true or false")
    return text.lower() in ("on", "true")


def _list_of(read: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of values separated by commas or spaces; `none` is the empty list."""
    return lambda text: () if text.lower() == "none" else tuple(map(read, re.findall(r"[^,\s]+", text)))


_minutes = _decimal(0, "minutes")
_origins = _list_of(_origin)
_host_names = _list_of(_matching(r"[A-Za-z0-9._%-]{1,253}", "host names without ports"))


def _row(name: str, default: Any, read: Callable[[str], Any], meaning: str, *, secret: bool = False) -> Any:
    """A field of Settings with its name, parser and meaning. `read` raises ValueError with what was expected."""
    metadata = {"name": name, "read": read, "meaning": meaning}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All settings. Seconds are floats; a path, URL or token that is not set is None."""

    host: str = _row("STORYTELLER_HOST", "localhost", _host, "address to listen on; localhost is 127.0.0.1 and ::1")
    port: int = _row("STORYTELLER_PORT", 8000, _whole(0, 65535), "port to listen on; 0 picks a free one")
    data_dir: Path = _row("STORYTELLER_DATA_DIR", HERE / "data", _path, "folder of the embedded store, token and logs")
    api_token: str | None = _row(
        "STORYTELLER_API_TOKEN", None, _token, "the API token; by default created at the first start", secret=True
    )
    cors_origins: tuple[str, ...] = _row(
        "STORYTELLER_CORS_ORIGINS", STORYART_ORIGINS, _origins, "origins of pages that may call with a token, or none"
    )
    trusted_origins: tuple[str, ...] = _row(
        "STORYTELLER_TRUSTED_ORIGINS", (), _origins, "origins of pages on this PC that may call without one"
    )
    allowed_hosts: tuple[str, ...] = _row(
        "STORYTELLER_ALLOWED_HOSTS", (), _host_names, "further names of this PC that a Host header may contain"
    )
    token_failures: int = _row(
        "STORYTELLER_TOKEN_FAILURES", 20, _whole(1, 1_000_000), "wrong tokens a minute that one address may send"
    )
    log_level: str = _row("STORYTELLER_LOG_LEVEL", "info", _log_level, "debug logs each poll too")
    log_format: str = _row("STORYTELLER_LOG_FORMAT", "text", _log_format, "text or json, one line per record")
    redis_url: str | None = _row("REDIS_URL", None, _redis_url, "the Redis to use; overrides the next two", secret=True)
    redis_host: str | None = _row("REDIS_HOST", None, _host, "the Redis to use; 127.0.0.1 when only the port is set")
    redis_port: int | None = _row("REDIS_PORT", None, _whole(1, 65535), "its port; 6379 when only the host is set")
    bridge: bool = _row("STORYTELLER_BRIDGE", True, _switch, "off: the copies of a session may differ; by default on")
    nvidia_smi: str | None = _row("NVIDIA_SMI", None, _program, "the nvidia-smi program; by default the one on PATH")
    nvidia_smi_timeout: float = _row("NVIDIA_SMI_TIMEOUT", 5.0, _decimal(0.001), "seconds that nvidia-smi may take")
    gpu_cache_seconds: float = _row("GPU_CACHE_SECONDS", 5.0, _decimal(0), "seconds for which a GPU status is cached")
    gates: bool = _row("STORYTELLER_RESERVATION_GATES", False, _switch, "true: reservations bar others; by default off")
    swarmui_api_url: str = _row("SWARMUI_API_URL", "http://localhost:7801", _server_url, "where SwarmUI answers")
    swarmui_path: Path | None = _row("SWARMUI_PATH", None, _path, "SwarmUI's folder, launch script or executable")
    swarmui_args: tuple[str, ...] = _row("SWARMUI_ARGS", (), lambda text: split_arguments(text), "further arguments")
    swarmui_token: str | None = _row("SWARMUI_TOKEN", None, _cookie, "sent to it as cookie swarm_token", secret=True)
    swarmui_allow_origin: str | None = _row(
        "SWARMUI_ALLOW_ORIGIN", None, _origin_or_all, "origin that it allows, or *; by default the only trusted origin"
    )
    start_timeout: float = _row("SWARMUI_START_TIMEOUT", 30.0, _decimal(0.001), "seconds until a start times out")
    poll_interval: float = _row("SWARMUI_POLL_INTERVAL", 2.0, _decimal(0.001), "seconds between two probes")
    health_timeout: float = _row("SWARMUI_HEALTH_TIMEOUT", 2.0, _decimal(0.001), "seconds for one probe")
    start_interval: float = _row("SWARMUI_START_INTERVAL", 60.0, _decimal(0.001), "seconds between two launches")
    autostart: bool = _row("SWARMUI_AUTOSTART", False, _switch, "on: launched when the service starts; by default off")
    idle_shutdown: float | None = _row(
        "SWARMUI_IDLE_SHUTDOWN", None, _decimal(0.001, "minutes"), "minutes without work after which it is stopped"
    )
    restart: str = _row("SWARMUI_RESTART", "no", _restart, "on-failure: launched again when it dies")
    metrics: str = _row("STORYTELLER_METRICS", "token", _metrics, "open: /metrics needs no token on this PC")
    alert_url: str | None = _row("STORYTELLER_ALERT_URL", None, _http_url, "where alerts are POSTed", secret=True)
    alert_format: str | None = _row(
        "STORYTELLER_ALERT_FORMAT", None, _alert_format, "ntfy, discord, slack or json; by default from the URL's host"
    )
    alert_after: float = _row("STORYTELLER_ALERT_AFTER", 60.0, _decimal(0), "seconds a GPU or store fault must last")
    alert_gpu_temperature: float = _row(
        "STORYTELLER_ALERT_GPU_TEMPERATURE", 90.0, _decimal(0, "degrees Celsius"), "above it the GPU is hot; 0 is off"
    )
    alert_disk: float = _row("STORYTELLER_ALERT_DISK", 1.0, _decimal(0, "GB"), "GB that must stay free; 0 is off")
    alert_unacknowledged: float = _row(
        "STORYTELLER_ALERT_UNACKNOWLEDGED", 30.0, _minutes, "minutes that a notification may wait; 0 is off"
    )
    alert_stuck: float = _row("STORYTELLER_ALERT_STUCK", 30.0, _minutes, "minutes without a new prompt; 0 is off")
    heartbeat_url: str | None = _row(
        "STORYTELLER_HEARTBEAT_URL", None, _http_url, "gets a GET each minute while the service runs", secret=True
    )

    @property
    def redis_address(self) -> str | None:
        """The URL of the Redis to use; None means the embedded store."""
        if self.redis_url or not (self.redis_host or self.redis_port):
            return self.redis_url
        host = (self.redis_host or "127.0.0.1").replace("%", "%25")
        return f"redis://{f'[{host}]' if ':' in host else host}:{self.redis_port or 6379}/0"

    @property
    def swarmui_port(self) -> int:
        parts = urllib.parse.urlsplit(self.swarmui_api_url)
        return parts.port or (443 if parts.scheme == "https" else 80)


def read_env_lines(path: Path) -> list[tuple[str, str]]:
    """The KEY=VALUE lines of a .env file; none when there is no file. Backslashes are literal (Windows paths)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise StartError(f"{path} is not UTF-8: save it as UTF-8 in your editor.") from None
    except OSError as error:
        raise StartError(f"{path} cannot be read ({error.strerror}): fix or remove it.") from None
    pairs = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?:(['\"])((?:(?!\2).)*)\2|(.*))", line)
        if not found:
            raise StartError(f"{path}, line {number}: expected KEY=VALUE, or a comment that begins with #.")
        pairs.append((found[1], found[3] if found[2] else found[4]))
    return pairs


def setting_warnings(environ: Mapping[str, str], file: Path = ENV_FILE) -> Iterator[str]:
    """Warnings about names that look like settings but have no effect, a sentence each; none shows a value."""
    known = [row.metadata["name"] for row in dataclasses.fields(Settings)]
    unread = file.with_name(f"{file.name}.txt")
    if unread.exists():
        yield f"{unread} is not read: rename it to {file.name}"
    in_file = collections.Counter(name for name, _ in read_env_lines(file))
    for name, count in in_file.items():
        if count > 1:
            yield f"{name} is set twice in {file}: the last one counts"
    ours = "(?i)STORYTELLER_(?!NO_PAUSE$).*"  # run.bat reads that one
    for place, names, cutoff, suspect in ((file, in_file, 0.6, ".*"), ("the environment", environ, 0.85, ours)):
        for name in [name for name in names if name not in known]:
            near = difflib.get_close_matches(name.upper(), known, 1, cutoff)
            if near or re.fullmatch(suspect, name):
                advice = f"did you mean {near[0]}?" if near else "--help lists all settings"
                yield f"{name} in {place} is not a setting: {advice}"


def load_settings(given: Mapping[str, str | None], environ: Mapping[str, str], file: Path = ENV_FILE) -> Settings:
    """Arguments (`given`) override `environ`, which overrides `file`. An empty value is not set. Raises StartError."""
    from_file = dict(read_env_lines(file))  # the last line of a name counts
    values = {}
    for row in dataclasses.fields(Settings):
        name = row.metadata["name"]
        text = given.get(row.name) or environ.get(name) or from_file.get(name)
        if not text:
            continue
        try:
            values[row.name] = row.metadata["read"](text)
        except ValueError as expected:
            shown = f"is {text!r}" if row.repr else "cannot be used"  # do not show a secret
            raise StartError(f"{name} {shown}: expected {expected}.") from None
    if len(trusted := values.get("trusted_origins", ())) == 1:  # SwarmUI allows one: the user must choose from several
        values.setdefault("swarmui_allow_origin", trusted[0])
    return Settings(**values)


# ======================================================================================================
# Errors
# ======================================================================================================


class ApiError(Exception):
    """A response other than 2xx: a message for the caller, the status, and the seconds until a retry. `refusal` is a
    store's reason to refuse a command ("" if it did not answer), `advice` what its operator can do."""

    status = 500

    def __init__(self, message: str, retry_after: float | None = None, refusal: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.refusal, self.advice = refusal, advice
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


def _error_class(name: str, status: int) -> type[ApiError]:
    return cast(type[ApiError], type(name, (ApiError,), {"status": status}))


BadRequest = _error_class("BadRequest", 400)
Unauthorized = _error_class("Unauthorized", 401)
Forbidden = _error_class("Forbidden", 403)
NotFound = _error_class("NotFound", 404)
Conflict = _error_class("Conflict", 409)
ContentTooLarge = _error_class("ContentTooLarge", 413)
UnsupportedMediaType = _error_class("UnsupportedMediaType", 415)
MisdirectedRequest = _error_class("MisdirectedRequest", 421)  # a Host header that is no known name of this PC
TooManyRequests = _error_class("TooManyRequests", 429)
Unavailable = _error_class("Unavailable", 503)  # the store does not answer, or the service is stopping or at a limit


def stopping() -> ApiError:
    return Unavailable("The service is stopping: try again.", 5)


# ======================================================================================================
# Values: JSON, times, numbers
# ======================================================================================================

MAX_DEPTH = 100  # nesting levels of a request's body; json cannot encode much deeper ones
LARGEST = 2**53  # JavaScript cannot represent every integer above it
SECONDS_BELOW = 10**11  # a time below this is in seconds, like time.time(): in ms it would be before March 1973


def parse_json(data: bytes, *, from_request: bool = False) -> Any:
    """Parse strict JSON: UTF-8, no NaN or Infinity (which browsers refuse), no value that cannot be encoded again; in a
    request also no duplicate key, and at most MAX_DEPTH levels. Raises ValueError with the reason."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"the number {text[:40]} is too large")
        return number

    def whole(text: str) -> int:
        if len(text) > 300:  # it may overflow a double, which JavaScript parses it to
            finite(text)
        return int(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    pairs = unique if from_request else None
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=refuse, parse_float=finite, parse_int=whole, object_pairs_hook=pairs)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value] if from_request and isinstance(value, (dict, list)) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested too deeply: {MAX_DEPTH} levels at most")
        inner = [node.values() if isinstance(node, dict) else node for node in level]
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]
    return value


def iso_time(ms: int) -> str:
    """ISO 8601 in UTC with `Z`, with milliseconds unless they are 0. Raises OverflowError after year 9999."""
    # Not datetime.fromtimestamp(), which ends at the year 3000 on Windows.
    moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=ms)
    return moment.isoformat(timespec="milliseconds" if ms % 1000 else "seconds").replace("+00:00", "Z")


def from_digits(value: Any) -> Any:
    """The integer that a string of 1 to 16 digits denotes; any other value unchanged."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value) else value


def to_ms(time: float) -> float:
    """Convert a time to milliseconds if it is in seconds, that is, less than SECONDS_BELOW."""
    return round(time * 1000, 3) if time < SECONDS_BELOW else time


def read_time(value: object) -> int | None:
    """Milliseconds of an ISO 8601 string (UTC by default) or of a number as for to_ms(); None for anything else."""
    value = from_digits(value)
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", value):
            moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", value))
            ms = round((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            ms = int(to_ms(value))
        else:
            return None
        iso_time(ms)
        return ms
    return None


def is_whole(value: object) -> TypeGuard[int | float]:
    """Whether it is an integer. 5.0 is one, because JSON has a single number type; True is not."""
    return value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)


def read_count(value: object, *, is_time: bool = False) -> int | None:
    """An integer from 0 to LARGEST, or a string of its digits; else None. With `is_time` a fraction is dropped."""
    value = math.floor(value) if isinstance(value, float) and is_time else from_digits(value)
    return int(value) if is_whole(value) and 0 <= value <= LARGEST else None


def name_some(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(itertools.islice(names, 5)) + more


def bound(entries: dict[Any, Any], limit: int) -> None:
    """Remove the oldest entries beyond `limit`."""
    while len(entries) > limit:
        del entries[next(iter(entries))]


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "backslashreplace")  # a lone surrogate as the escape that it was


@functools.lru_cache(maxsize=256)
def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address; None for a name."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def is_loopback(host: str) -> bool:
    found = address_of(host)
    return found is not None and (getattr(found, "ipv4_mapped", None) or found).is_loopback


# ======================================================================================================
# Platform: files, sockets, the console
# ======================================================================================================

WINDOWS = sys.platform == "win32"  # mypy understands only the comparison: it is repeated where types differ
START_SCRIPT = "run.bat" if WINDOWS else "run.sh"
IS_ROOT = sys.platform != "win32" and os.geteuid() == 0
# No route, or no such address, like ::1 without IPv6. WinSock has its own numbers.
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, 10047, 10049, 10051, 10065}
_IN_USE = {errno.EADDRINUSE, 10048}
# Windows' error for a port that another program uses exclusively, or that Windows reserves; in some Pythons EACCES.
_MAYBE_RESERVED = {10013, errno.EACCES} if WINDOWS else {10013}
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # the disk is full; the user's quota is used up

# Where nvidia-smi is on Windows if it is not on PATH; the second is the place of old drivers.
NVIDIA_SMI_PLACES = (r"%SYSTEMROOT%\System32\nvidia-smi.exe", r"%PROGRAMW6432%\NVIDIA Corporation\NVSMI\nvidia-smi.exe")
LAUNCH_SCRIPTS = ("launch-windows.bat", "launch-linux.sh", "launch-macos.sh")
LAUNCH_SCRIPT = {"win32": LAUNCH_SCRIPTS[0], "darwin": LAUNCH_SCRIPTS[2]}.get(sys.platform, LAUNCH_SCRIPTS[1])

if sys.platform == "win32":
    import msvcrt

    _C_TYPES = {"P": ctypes.c_void_p, "N": ctypes.c_uint32, "S": ctypes.c_wchar_p}  # pointer, number, string

    def _win32(name: str, types: str, *arguments: Any) -> Any:
        """Call a Windows function, named as library.function. `types` has a letter for its result and each argument:
        without them ctypes truncates handles and pointers to 32 bits."""
        library, _, name = name.partition(".")
        function = getattr(ctypes.WinDLL(library, use_last_error=True), name)
        function.restype, *function.argtypes = (_C_TYPES[letter] for letter in types)
        return function(*arguments)

    def _checked(name: str, types: str, *arguments: Any) -> Any:
        """The same for a function that returns 0 or INVALID_HANDLE_VALUE on failure. Raises OSError."""
        result = _win32(name, types, *arguments)
        if result in (None, 0, ctypes.c_void_p(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return result

    def _open_windows(path: str, access: int, creation: int, owner_only: bool = False) -> int:
        """A descriptor from CreateFileW: open() can neither make a file private nor request append-only access."""
        security = (ctypes.c_size_t * 3)(ctypes.sizeof(ctypes.c_size_t * 3), 0, 0)  # SECURITY_ATTRIBUTES
        if owner_only:
            # No inherited rights; full access for this user, none for anybody else.
            convert = "advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW"
            descriptor = ctypes.byref(security, ctypes.sizeof(ctypes.c_size_t))
            _checked(convert, "NSNPP", f"D:P(A;;FA;;;{_user_sid()})", 1, descriptor, None)
        share_all = 0x7  # read, write, delete: SwarmUI has its log open while others read or shorten it
        arguments = (path, access, share_all, ctypes.byref(security), creation, 0x80, None)
        handle = _checked("kernel32.CreateFileW", "PSNNPNNP", *arguments)
        return msvcrt.open_osfhandle(handle, os.O_WRONLY | os.O_APPEND | os.O_BINARY)

    def _user_sid() -> str:
        """The security identifier of the user that this process runs as."""
        this_process, token_user = -4, 1  # GetCurrentProcessToken(), TokenUser
        user, size, sid = (ctypes.c_void_p * 32)(), ctypes.c_uint32(), ctypes.c_wchar_p()
        arguments = (this_process, token_user, user, ctypes.sizeof(user), ctypes.byref(size))
        _checked("advapi32.GetTokenInformation", "NPNPNP", *arguments)
        _checked("advapi32.ConvertSidToStringSidW", "NPP", user[0], ctypes.byref(sid))
        return sid.value or ""


def split_arguments(text: str) -> tuple[str, ...]:
    """Split text as this platform's shell does. Raises ValueError with what was expected."""
    if sys.platform == "win32":
        count = ctypes.c_int()
        # The first word names the program and is parsed by other rules: put a dummy there.
        found = _win32("shell32.CommandLineToArgvW", "PSP", f"program {text}", ctypes.byref(count))
        words = ctypes.cast(found, ctypes.POINTER(ctypes.c_wchar_p))  # never freed: a few hundred bytes a start
        return tuple(words[1 : count.value])
    try:
        return tuple(shlex.split(text))
    except ValueError:
        raise ValueError("arguments with quotes that are closed") from None


def system_memory() -> tuple[int, int] | None:
    """The PC's memory, used and total, in MiB; None where it cannot be read, as on macOS."""
    with contextlib.suppress(OSError, KeyError):
        if sys.platform == "win32":
            status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, which begins with its size
            _checked("kernel32.GlobalMemoryStatusEx", "NP", status)
            total, available = status[1] >> 20, status[2] >> 20
        else:
            rows = dict(re.findall(r"(?m)^(\w+): +([0-9]+) kB$", Path("/proc/meminfo").read_text()))
            total, available = int(rows["MemTotal"]) >> 10, int(rows["MemAvailable"]) >> 10
        return total - available, total
    return None


def write_private(path: Path, text: str, *, replace: bool = False) -> None:
    """Create `path` atomically, readable by its owner only. Raises FileExistsError if it exists, unless `replace`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        if sys.platform == "win32":  # GENERIC_WRITE, CREATE_NEW
            descriptor = _open_windows(str(draft), access=0x4000_0000, creation=1, owner_only=True)
        else:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        (os.replace if replace else os.rename if WINDOWS else os.link)(draft, path)  # on POSIX os.rename replaces
    finally:
        draft.unlink(missing_ok=True)


def open_log(path: Path) -> int:
    """A descriptor that only appends, also after another program truncated the file."""
    if sys.platform == "win32":
        return _open_windows(str(path), access=0x0004 | 0x0010_0000, creation=4)  # FILE_APPEND_DATA, OPEN_ALWAYS
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def is_locked(path: Path) -> bool:
    """Whether another program prevents this one from opening or reading a file, which is possible on Windows only."""
    if sys.platform == "win32":
        try:
            os.close(_open_windows(str(path), access=0xC000_0000, creation=3))  # GENERIC_READ and WRITE, OPEN_EXISTING
            with open(path, "rb") as file:
                file.read(100)
        except OSError as error:
            return error.winerror in (None, 32, 33)  # a locked region; sharing violation, lock violation
    return False


def lock_file(path: Path) -> TextIO | None:
    """Open a file and lock it until it is closed or this process ends; others can read it. None if another has it."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the lock is needed
    try:
        if sys.platform == "win32":
            file.seek(1 << 20)  # beyond its contents, since locked bytes cannot be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def foreign_owner(path: Path) -> str | None:
    """The owner of a file, unless it is this user. None on Windows, where a file inherits its folder's rights."""
    with contextlib.suppress(OSError):  # there is no such file
        if sys.platform != "win32" and path.stat().st_uid != os.geteuid():
            with contextlib.suppress(KeyError):  # the owner is a number without a name
                return path.owner()
            return str(path.stat().st_uid)
    return None


def descriptor_limit() -> int:
    """How many sockets and files this process may open, 1024 if possible; on Windows how many `select` accepts."""
    if sys.platform == "win32":
        return 512
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < soft < 1024 and (hard >= 1024 or hard == resource.RLIM_INFINITY):  # macOS starts programs with 256
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft := 1024, hard))
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def listen(address: str, port: int) -> socket.socket:
    """A listening socket that no other program shares. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            # SO_REUSEADDR lets two programs share a port here; without either option, another one may take it over.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections in TIME_WAIT only
        if ":" in address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address != "::"))
        listener.bind((address, port))
        listener.listen(1024)  # on Linux two sockets may bind one port; the second to listen is refused
    except OSError:
        listener.close()
        raise
    return listener


GRACE = 5.0  # seconds that a shutdown gives requests in flight
CLOSING_GRACE = 3.0  # the same when the console closes: Windows ends this process 5 s later


def on_end_signal(stop: Callable[[float], None], ended: threading.Event) -> object:
    """Call stop(grace in seconds) on Ctrl+C, and when the console closes; elsewhere than on Windows also on SIGTERM.
    The caller sets `ended` after the shutdown, and keeps a reference to the result, because Windows keeps none."""
    if sys.platform == "win32":
        # Python would run its handlers only after the main thread's select, and has no signal for the closing.
        def handle(event: int) -> bool:
            if event in (0, 1):  # Ctrl+C, Ctrl+Break
                stop(GRACE)
            else:  # the window is closed, or its user logs off
                stop(CLOSING_GRACE)
                ended.wait(CLOSING_GRACE + 1.5)  # Windows ends this process as soon as this returns
            return True

        handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)(handle)
        _win32("kernel32.SetConsoleCtrlHandler", "NPN", handler, 1)
        return handler

    def end(number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # the shell of a terminal that closes sends it again
            signal.signal(number, signal.SIG_IGN)
        stop(GRACE)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, end)
    return None


def keep_freed_memory() -> None:
    """Keep freed memory: by default glibc returns it to the kernel, which triples the time to read a document."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
            for option, size in ((-3, 4 << 20), (-1, 8 << 20)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; bytes
                ctypes.CDLL(None).mallopt(option, size)


@contextlib.contextmanager
def _discard_after_error(stream: TextIO) -> Iterator[None]:
    """Discard what cannot be written: to a pipe that was closed, as by `| head -1`, or to a file on a full disk."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also for the flush when Python exits


def prepare_console() -> None:
    """Print characters that the code page lacks as escapes: UnicodeEncodeError would end the service."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            for name in ("write", "flush"):
                setattr(stream, name, _discard_after_error(stream)(getattr(stream, name)))


def name_window(title: str) -> None:
    if sys.platform == "win32":
        _win32("kernel32.SetConsoleTitleW", "NS", title)


# ======================================================================================================
# Platform: processes
# ======================================================================================================

if sys.platform == "win32":

    def _make_job(limits: int) -> int:
        """A Windows job object. With KILL_ON_JOB_CLOSE (0x2000) its processes end when this one does."""
        job: int = _checked("kernel32.CreateJobObjectW", "PPP", None, None)
        # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, with its LimitFlags.
        about = (ctypes.c_uint32 * (36 if sys.maxsize > 2**32 else 28))(0, 0, 0, 0, limits)
        _checked("kernel32.SetInformationJobObject", "NPNPN", job, 9, about, ctypes.sizeof(about))
        return job

    @contextlib.contextmanager
    def _open_process(pid: int, access: int) -> Iterator[int]:
        """A handle of a process. Raises OSError if there is no such process."""
        process = _checked("kernel32.OpenProcess", "PNNN", access, 0, pid)
        try:
            yield process
        finally:
            _win32("kernel32.CloseHandle", "NP", process)


def _start(command: Sequence[str] | str, *, outlives: bool, **options: Any) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program without input, in a process group of its own, on Windows in a job. Returns the process and the
    job's handle, 0 elsewhere. Raises OSError or ValueError."""
    options["stdin"] = subprocess.DEVNULL
    if sys.platform == "win32":
        with contextlib.ExitStack() as cleanup:
            job = _make_job(0 if outlives else 0x2000)
            cleanup.callback(_win32, "kernel32.CloseHandle", "NP", job)
            # In an invisible console of its own, so that Ctrl+C in ours, or closing ours, does not reach it. Suspended
            # (0x4) until it is in the job, so that everything it starts is in the job, too.
            flags = subprocess.CREATE_NO_WINDOW | 0x4
            try:  # the task scheduler runs us in a job that may end with us: leave it, if it permits that
                leaves = subprocess.CREATE_BREAKAWAY_FROM_JOB if outlives else 0
                child = subprocess.Popen(command, creationflags=flags | leaves, **options)
            except PermissionError:
                child = subprocess.Popen(command, creationflags=flags, **options)
            cleanup.callback(child.kill)
            with _open_process(child.pid, 0x0901) as process:  # SUSPEND_RESUME, SET_QUOTA, TERMINATE
                _win32("kernel32.AssignProcessToJobObject", "NPP", job, process)
                _win32("ntdll.NtResumeProcess", "NP", process)
            cleanup.pop_all()
            return child, job
    return subprocess.Popen(command, start_new_session=True, **options), 0


def has_crashed(code: int) -> bool:
    """Whether an exit code says that the system ended the program: by a signal, on Windows with an NTSTATUS error."""
    return code >= 0xC000_0000 if WINDOWS else code < 0


class Program:
    """A program and everything that it starts: its process group, on Windows its job. If an earlier run of the service
    launched it, `pid` and `identity` identify it; on Windows it is then the tree of processes below `pid`."""

    def __init__(self, pid: int, identity: str | None, process: subprocess.Popen[bytes] | None = None, job: int = 0):
        self.pid, self.identity, self.process, self._job = pid, identity, process, job
        if sys.platform == "win32" and job:
            weakref.finalize(self, _win32, "kernel32.CloseHandle", "NP", job)

    def has_exited(self) -> bool:
        """Whether its first process has exited; others may still run."""
        if self.process:
            return self.process.poll() is not None
        return self.identity is None or process_identity(self.pid) != self.identity

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs, or if an earlier run of the service launched it."""
        return self.process.returncode if self.process else None

    def is_alive(self) -> bool:
        """Whether any of its processes runs."""
        if not self.has_exited():
            return True
        if sys.platform == "win32":
            counts = (ctypes.c_uint32 * 12)()  # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION; the 11th is ActiveProcesses
            query = ("kernel32.QueryInformationJobObject", "NPNPNP", self._job, 1, counts, ctypes.sizeof(counts), None)
            return bool(self._job and _win32(*query) and counts[10])
        if process_identity(self.pid):
            return False  # another process has its pid, so its group is empty
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        if sys.platform != "linux":
            return True
        groups = (_read_stat(path)[:3] for path in Path("/proc").glob("[0-9]*/stat"))  # without zombies
        return any(fields[2] == str(self.pid) and fields[0] not in "ZX" for fields in groups if len(fields) == 3)

    def end(self, *, force: bool) -> None:
        """End all its processes, by SIGTERM or, with `force`, by SIGKILL; on Windows always by force."""
        if not self.is_alive():
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if sys.platform != "win32":
                os.killpg(self.pid, signal.SIGKILL if force else signal.SIGTERM)
            elif self._job:
                _win32("kernel32.TerminateJobObject", "NPN", self._job, 1)
            else:
                command = ["taskkill", "/T", "/F", "/PID", str(self.pid)]
                subprocess.run(command, capture_output=True, timeout=5, check=False, stdin=subprocess.DEVNULL)


def launch_detached(program: Path, arguments: Sequence[str], folder: Path, output: Path) -> Program:
    """Start a program that outlives this one, and append its output to a file. Raises OSError or ValueError."""
    command: Sequence[str] | str = [str(program), *arguments]
    if WINDOWS and program.suffix.lower() in (".bat", ".cmd"):
        command = _batch_command(command)
    elif not WINDOWS and program.suffix == ".sh" and not os.access(program, os.X_OK):
        command = ["bash", *command]
    private = re.compile(r"(?i)STORYTELLER_|REDIS_|SWARMUI_TOKEN\Z")
    environment = {name: value for name, value in os.environ.items() if not private.match(name)}
    with open(open_log(output), "ab") as log_file:
        options = {"stdout": log_file, "stderr": log_file, "cwd": folder, "env": environment}
        process, job = _start(command, outlives=True, **options)
    return Program(process.pid, process_identity(process.pid), process, job)


@contextlib.contextmanager
def bounded_child(command: Sequence[str], running: set[Program]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program during a `with` block, then kill it and all that it started. It is in `running` until it exits, so
    for ever if it hangs in its driver."""
    child, job = _start(command, outlives=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program = Program(child.pid, None, child, job)
    running.add(program)
    try:
        yield child
    finally:
        program.end(force=True)
        for pipe in filter(None, (child.stdout, child.stderr)):  # otherwise a thread of read_output() closes it
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
            running.discard(program)


def read_output(child: subprocess.Popen[bytes], deadline: float) -> tuple[str, str, int]:
    """Wait for a bounded child: its stdout, stderr and exit code. Raises TimeoutExpired at the deadline (monotonic)."""
    found = {"stdout": "", "stderr": ""}

    def read(name: str, pipe: IO[bytes]) -> None:
        with pipe:  # close() in another thread would wait for read(), for ever if the child hangs in its driver
            found[name] = pipe.read(256 * 1024).decode("utf-8", "replace")  # a child that prints more finds it closed

    readers = [threading.Thread(target=read, args=[name, getattr(child, name)], daemon=True) for name in found]
    for name, reader in zip(found, readers):
        reader.start()
        setattr(child, name, None)
    code = child.wait(max(0.0, deadline - time.monotonic()))
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))  # a grandchild may have the pipes open
        if reader.is_alive():
            raise subprocess.TimeoutExpired(child.args, 0.0)
    return found["stdout"], found["stderr"], code


def _batch_command(words: Sequence[str]) -> str:
    """A command line for cmd, which has its own parser: if every word is quoted, only these characters are special."""
    if any(re.search(r'["%\r\n]', word) for word in words):
        raise ValueError("a batch file's path and arguments cannot contain \", % or a line break")
    # For the program that gets them from the batch file, a backslash before a quote escapes it, and two are one.
    quoted = " ".join(re.sub(r"(?s)(.*?)(\\*)\Z", r'"\1\2\2"', word, count=1) for word in words)
    # cmd alone loses the exit code of a batch file that ends in "pause".
    code = "if errorlevel 1 (exit 1) else if not errorlevel 0 exit 1"
    return f'"{os.environ.get("COMSPEC", "cmd.exe")}" /d /s /c "{quoted} & {code}"'


def process_identity(pid: int) -> str | None:
    """The start time of a process, which tells it from a later one with its pid. None if there is no such process."""
    with contextlib.suppress(OSError, IndexError, subprocess.TimeoutExpired):
        if sys.platform == "win32":
            times, code = (ctypes.c_uint64 * 4)(), ctypes.c_uint32()
            with _open_process(pid, 0x1000) as process:  # QUERY_LIMITED_INFORMATION
                each = [ctypes.byref(times, 8 * number) for number in range(4)]
                _checked("kernel32.GetProcessTimes", "NPPPPP", process, *each)
                _checked("kernel32.GetExitCodeProcess", "NPP", process, ctypes.byref(code))
            return str(times[0]) if code.value == 259 else None  # STILL_ACTIVE
        if sys.platform == "darwin":
            command = ["env", "LC_ALL=C", "TZ=UTC", "ps", "-o", "lstart=", "-p", str(pid)]  # local time otherwise
            found = subprocess.run(command, capture_output=True, timeout=5, check=False).stdout.strip()
            return found.decode("ascii", "replace") or None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = _read_stat(Path(f"/proc/{pid}/stat"))
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    return None


def resident_memory() -> int | None:
    """Bytes of memory that this process occupies; None if unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        if sys.platform == "win32":
            size = ctypes.sizeof(ctypes.c_size_t)
            counters = (ctypes.c_size_t * 10)(10 * size)  # PROCESS_MEMORY_COUNTERS, which begins with its size
            this_process = -1
            _checked("kernel32.K32GetProcessMemoryInfo", "NPPN", this_process, counters, 10 * size)
            return int(counters[2 if size == 8 else 3])  # WorkingSetSize, after two 32-bit numbers and another size
        if sys.platform == "darwin":
            command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
            return int(subprocess.run(command, capture_output=True, timeout=5, check=False).stdout) << 10
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _read_stat(path: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may contain spaces and parentheses: state, parent, group; the
    20th is the start in ticks since boot. [] if there is no such process."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").rpartition(")")[2].split()
    return []


# ======================================================================================================
# Logs
# ======================================================================================================

LOG_LIMIT = 5_000_000  # bytes at which a log is rotated
LOGS_KEPT = 3  # older files beside it


class LogFormatter(logging.Formatter):
    """One line of JSON per record, or of text with any traceback below it. Escapes control characters."""

    def __init__(self, form: str = "%(asctime)s %(levelname)s %(message)s", *, as_json: bool = False) -> None:
        super().__init__(form)
        self._as_json = as_json

    @staticmethod
    def _escape(text: str) -> str:
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = self._escape(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(self._escape, super().formatException(ei).split("\n")))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._as_json:
            return text
        line = {"time": record.asctime, "level": record.levelname, "message": record.message}
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line, ensure_ascii=False)


class LogFile(logging.handlers.RotatingFileHandler):
    """Rotates unless another program has it open: Windows cannot rename it then, and the record would be lost."""

    def format(self, record: logging.LogRecord) -> str:
        """Cached in the record, because the handler needs the line twice: to measure it and to write it."""
        known = vars(record)
        line: str = known.get("line") or known.setdefault("line", super().format(record))
        return line

    def doRollover(self) -> None:
        if self.stream:
            self.stream.close()
        self.stream = None  # the next line opens it again
        with contextlib.suppress(OSError):
            os.rename(self.baseFilename, self.baseFilename)  # on Windows this fails before an older file is moved
            super().doRollover()


def say(text: str, logged: str = "") -> None:
    """Print text on the console, and log it, or `logged` instead."""
    log.info("server: %s", " ".join((logged or text).split()), extra={"console": text})


def start_console() -> Callable[[], None]:
    """Print warnings and what say() gets, in a thread, because a console whose text is selected, or a full pipe, blocks
    its writer; beyond 1000 records that wait, new ones are dropped. Returns a function that ends the thread."""
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(1000)

    def write() -> None:
        while record := records.get():
            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                print(getattr(record, "console", record.message), file=stream, flush=True)

    def end() -> None:
        with contextlib.suppress(queue.Full):
            records.put_nowait(None)
        thread.join(0.5)

    thread = threading.Thread(target=write, name="console", daemon=True)
    thread.start()
    handler = logging.handlers.QueueHandler(records)
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or hasattr(record, "console"))
    handler.setFormatter(LogFormatter("%(message)s"))  # a record keeps its formatted traceback, which the file uses too
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # its warnings are of what Server handles
    logging.raiseExceptions = False  # a log that cannot be written must not disturb the service
    return end


def start_logging(path: Path, settings: Settings) -> None:
    """Log to the file, too. Raises StartError if it cannot be written."""
    try:
        file = LogFile(path, maxBytes=LOG_LIMIT, backupCount=LOGS_KEPT, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StartError(f"The log {path} cannot be written ({error.strerror}): fix or remove it.") from None
    file.setFormatter(LogFormatter(as_json=settings.log_format.lower() == "json"))
    file.setLevel(settings.log_level.upper())
    logging.getLogger().addHandler(file)
    logging.getLogger().setLevel(min(file.level, logging.INFO))


def shorten_log(path: Path) -> float:
    """Rotate a log above LOG_LIMIT: copy its end, then truncate it, because SwarmUI has it open and outlives this
    service. Lines written between the two steps are lost. Returns the seconds until the next check."""
    try:
        if not path.exists() or path.stat().st_size <= LOG_LIMIT:
            return 1.0
        if shutil.disk_usage(path.parent).free < LOG_LIMIT:  # its copy would replace the older ones by a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for number in range(LOGS_KEPT - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # Windows moves no file that is open
                os.replace(f"{path}.{number}", f"{path}.{number + 1}")
        with open(path, "rb") as file, open(f"{path}.1", "wb") as copy:
            file.seek(-LOG_LIMIT, os.SEEK_END)
            copy.write(file.read(LOG_LIMIT))
        os.truncate(path, 0)
    except OSError as error:
        log.warning("swarmui: %s cannot be shortened (%s): free disk space, or close its readers", path, error.strerror)
        return 60.0
    return 1.0


def tail(path: Path, size: int, since: int = 0) -> list[str]:
    """The lines of a log after byte `since`, from its last `size` bytes at most; [] if there are none."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(since if since <= end else 0, end - size))
        if text := file.read(size).decode("utf-8", "replace"):
            return text.removesuffix("\n").split("\n")
    return []


def last_lines(path: Path, since: int = 0) -> list[str]:
    """The last 5 lines after byte `since` that are not empty, with spaces for what is not printable."""
    lines = ("".join(char if char.isprintable() else " " for char in line).strip() for line in tail(path, 4096, since))
    return [line for line in lines if line][-5:]


# ======================================================================================================
# Batching and loops
# ======================================================================================================


def claim(future: Future[Any]) -> bool:
    """Mark a future as running, so that it cannot be cancelled. False if it was cancelled before."""
    return future.running() or future.set_running_or_notify_cancel()


def settle(future: Future[T], outcome: T | BaseException) -> bool:
    """Set the result or the exception of a future. False if it was cancelled before."""
    if not claim(future):
        return False
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return True


def settle_by(future: Future[T], function: Callable[..., T], *arguments: Any) -> None:
    """Settle a future with what the function returns or raises."""
    try:
        settle(future, function(*arguments))
    except BaseException as error:
        settle(future, error)


def result_of(outcome: T | BaseException) -> T:
    """Return an outcome, or raise it if it is an exception."""
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def map_results(function: Callable[[Any], T], outcomes: Iterable[Any]) -> list[T | ApiError]:
    """function(outcome) for each; an ApiError stays as it is."""
    return [outcome if isinstance(outcome, ApiError) else function(outcome) for outcome in outcomes]


def awaited(outcome: T | Future[Any], waits: list[float] | None = None) -> Generator[Future[Any], None, T]:
    """For `yield from`: the outcome, or the future's result. `waits` gets the seconds that a cancellable wait took."""
    while isinstance(outcome, Future):
        began, is_cancellable = time.monotonic(), not outcome.running()
        if not outcome.done():
            yield outcome
        if waits is not None and is_cancellable:
            waits.append(time.monotonic() - began)
        outcome = outcome.result()
    return outcome


class Batcher(Generic[Q, T]):
    """Answers questions in batches, in a thread of its own: questions that arrive while a batch runs join the next one.
    `step` gets at least one question, without duplicates, and returns their outcomes in the same order, each a result
    or an exception. An exception that it raises is the outcome of all. Cancelled questions are skipped."""

    def __init__(self, step: Callable[[list[Q]], Sequence[T | BaseException]], name: str) -> None:
        self._step = step
        self._queue: queue.SimpleQueue[tuple[Q, Future[T]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self, question: Q, *, cancellable: bool = False) -> Future[T]:
        """A Future of the answer; a cancellable one can be cancelled until its batch runs. Invalid after close()."""
        future: Future[T] = Future()
        if not cancellable:
            future.set_running_or_notify_cancel()
        self._queue.put((question, future))
        return future

    def close(self, timeout: float) -> None:
        """Answer the remaining questions and end the thread; wait for that at most `timeout` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while first := self._queue.get():
            asked = [first]
            with contextlib.suppress(queue.Empty):
                while further := self._queue.get_nowait():
                    asked.append(further)
                self._queue.put(None)  # close() was called: end after this batch
            self._answer(asked)
            del asked, first  # keep none in memory while waiting for the next

    def _answer(self, asked: Sequence[tuple[Q, Future[T]]]) -> None:
        waiting = [(question, future) for question, future in asked if claim(future)]
        outcomes: dict[Q, Any] = dict.fromkeys(question for question, _ in waiting)
        if waiting:
            try:
                outcomes = dict(zip(outcomes, self._step(list(outcomes))))
            except BaseException as error:
                outcomes = dict.fromkeys(outcomes, error)
        for question, future in waiting:
            settle(future, outcomes[question])


class Loop:
    """A thread that calls `turn` again and again: after as many seconds as `turn` returned, or when woken. If `turn`
    raises, the error is logged, all who ask get it, and the next turn is 5 s later. After close() the thread calls
    `on_close`, and ends. `asked` maps each future that is not settled to its question, in the order of arrival."""

    def __init__(self, turn: Callable[[], float], name: str, on_close: Callable[[], Any] = lambda: None) -> None:
        self._turn, self._on_close, self.is_closing = turn, on_close, False
        self.asked: dict[Future[Any], Any] = {}
        self._lock = threading.Lock()  # guards is_closing: nothing is asked after close()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.start, self.wake = self._thread.start, self._woken.set

    def ask(self, question: Any, *, cancellable: bool = True) -> Future[Any]:
        """A Future of the answer to a question, which is not None. Unless it is cancellable, it is answered even if its
        client has left. Raises Unavailable after close()."""
        future: Future[Any] = Future()
        if not cancellable:
            future.set_running_or_notify_cancel()
        with self._lock:
            if self.is_closing:
                raise stopping()
            self.asked[future] = question
        future.add_done_callback(lambda done: self.asked.pop(done, None))
        self.wake()
        return future

    def answer(self, outcome: Any, *futures: Future[Any]) -> bool:
        """Settle the futures that are still pending. False if none was."""
        settled = [future for future in futures if self.asked.pop(future, None) is not None and settle(future, outcome)]
        return bool(settled)

    def close(self, timeout: float = 0.0) -> None:
        """End the thread after its turn; wait for that at most `timeout` seconds."""
        with self._lock:
            self.is_closing = True
        self.wake()
        if self._thread.ident:
            self._thread.join(timeout)

    def _run(self) -> None:
        is_closing = False
        while not is_closing:
            self._woken.clear()
            is_closing, seconds = self.is_closing, 5.0
            try:
                seconds = self._on_close() if is_closing else self._turn()
            except Exception as error:
                log.exception("%s: an unexpected error", self._thread.name)
                fault = f"{self._thread.name}: an unexpected error ({type(error).__name__}): see the service's log."
                self.answer(ApiError(fault), *self.asked)
            if not is_closing:
                self._woken.wait(seconds)


# ======================================================================================================
# Stores: the interface
# ======================================================================================================

AHEAD_MS = 3_600_000  # a stored time further ahead of the clock was written while the clock was wrong: it is ignored
TTL_MS = 7 * 24 * 3600 * 1000  # of sessions, pending notifications and acknowledgement markers: 7 days
OWN_MEMBER = b'{"id":"%b",'  # the first bytes of a member that this service wrote
OWN_ID = "notif_([0-9]{1,14})_[0-9a-f]{16}"  # the id in such a member; the digits are its time in ms


def own_member(id: str) -> tuple[int, bytes]:
    """The time (ms) and the first bytes of the member with an id that this service made; (-1, b"") for any other id."""
    found = re.fullmatch(OWN_ID, id)
    return (int(found[1]), OWN_MEMBER % id.encode()) if found else (-1, b"")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def next_time(stored: int, now: int) -> int:
    """`now`, or the ms after a stored time if that is later. A stored time over AHEAD_MS ahead is ignored."""
    return now if stored > now + AHEAD_MS else max(now, stored + 1)


def warn_of_clock(stored: int, now: int, place: str) -> None:
    """Log a stored time that next_time() ignores."""
    if stored > now + AHEAD_MS:
        ahead = "store: a time in %s is %.1f h ahead of this PC's clock, and is ignored: check the clock"
        log.warning(ahead, place, (stored - now) / 3_600_000)


def find_fault(faults: Iterable[tuple[str, str, str]], text: str) -> tuple[str, str]:
    """What is wrong and what to do, of the first row whose pattern starts a word (a host may be named SERVERROOM)."""
    return next((wrong, advice) for pattern, wrong, advice in faults if re.search(rf"(?<!\w)(?:{pattern})", text))


class WriteStatus:
    """Whether the store accepts writes, by the outcome of the last one. Reads may work while writes are refused."""

    def __init__(self, place: str) -> None:
        self.refusal: str | None = None  # why the last write was refused; "" if it succeeded; None before the first
        self.place = place
        self._lock = threading.Lock()

    def note(self, refusal: str = "") -> None:
        """Record the outcome of a write: why it was refused, "" if it was not. Each change is logged once."""
        with self._lock:
            before, self.refusal = self.refusal, refusal
        if refusal and not before:
            log.warning("store: %s refuses writes (%s): they get 503. `check` says what to do", self.place, refusal)
        elif before and not refusal:
            log.warning("store: %s accepts writes again", self.place)


@dataclass(frozen=True)
class StoredSession:
    """A session as it is stored."""

    timestamp: int
    document: bytes | None  # None: its key in Redis is not a string
    saved: int | None = None  # when this service last saved it, in ms; each save gets a later time
    announced: str | None = None  # the type of its last notification
    synced: tuple[str, str] | None = None  # as in Copies; None in a store with one copy
    storyart_size: int | None = None  # bytes of StoryArt's copy; None if `document` is that copy

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.document)

    @property
    def is_in_step(self) -> bool:
        """Whether neither copy has changed since they were last in step. Of StoryArt's only the length is compared."""
        if not self.synced or self.storyart_size is None:
            return self.synced in (None, ("0", self.fingerprint))
        return (self.synced[0], self.synced[1].partition(" ")[0]) == (self.fingerprint, str(self.storyart_size))


def fingerprint_of(document: bytes | None) -> str:
    """The length and the SHA-256 of a copy; "0" for no copy."""
    return f"{len(document)} {hashlib.sha256(document).hexdigest()}" if document is not None else "0"


@dataclass(frozen=True)
class Copies:
    """The two copies of a session, and their state when they were last in step."""

    timestamp: int
    storyswarm: bytes | None
    storyart: bytes | None
    synced: tuple[str, str] = ("", "")  # both fingerprints when they were last in step; "" if they never were
    by_storyart: bool = False  # whether StoryArt has written this session
    latest: bytes | None = None  # session:latest, if it was changed: StorySwarm's copy of this session as well

    @functools.cached_property
    def current(self) -> tuple[str, str]:
        """The fingerprints of both copies now."""
        return fingerprint_of(self.storyswarm), fingerprint_of(self.storyart)

    def is_changed(self, copy: int) -> bool:
        """Whether StorySwarm's (0) or StoryArt's copy (1) exists, and has changed since they were last in step."""
        return self.current[copy] not in ("0", self.synced[copy])


@dataclass(frozen=True)
class Change:
    """What to write for a session. A document that is None is not written."""

    storyswarm: bytes | None = None
    storyart: bytes | None = None
    by_storyart: bool = False
    draft: Draft | None = None


@dataclass(frozen=True, eq=False)  # a Batcher hashes its questions
class Draft:
    """A notification without its time. The store sets the time, in the step that adds the notification."""

    type: str
    session: int
    fields: Mapping[str, Any]  # its other JSON keys
    suffix: str = dataclasses.field(default_factory=functools.partial(secrets.token_hex, 8))

    def member(self, time: int) -> bytes:
        """The JSON to store. Its id contains its time (ms): acknowledge() finds the member by it, without a search."""
        value = {"id": f"notif_{time}_{self.suffix}", "type": self.type, "sessionTimestamp": self.session}
        return to_json({**value, **self.fields, "timestamp": iso_time(time), "acknowledged": False})


class Store(Protocol):
    """What both stores do. Times are in ms since 1970. Each write is one atomic step, also beside other threads and
    other instances on the same store. A method raises Unavailable if the store does not answer. A method that takes
    several items does one step for each, and if that step fails returns its error in place of its result."""

    name: str
    place: str  # where the data is, for messages; without a password
    writes: WriteStatus

    def ping(self) -> None:
        """Raise Unavailable unless the store answers and accepts writes, as far as is known."""
        self.token("")
        if refusal := self.writes.refusal:  # read once: another thread may reset it
            raise Unavailable(f"{self.writes.place} refuses writes ({refusal}).", 5)

    def try_write(self) -> None:
        """Write what a save writes, and remove it again. `writes` records the outcome."""

    def close(self) -> None:
        """Close all connections and end all threads. The store must not be used afterwards."""

    def session(self, timestamp: int) -> StoredSession | None:
        return result_of(next(self.read_sessions([timestamp])))

    def read_sessions(self, timestamps: Sequence[int]) -> Iterator[StoredSession | ApiError | None]:
        """Each session in turn; None if it does not exist. At most 8 documents are in memory at once."""

    def sessions(self) -> Iterator[StoredSession]:
        """All sessions, newest first. Each is read when the caller asks for it."""

    def newest_copy(self) -> bytes | None:
        """The copy of the newest session that StorySwarm's tools write; None in a store that only this service uses."""
        return None

    def save(self, timestamp: int, change: Change, *, replace: bool = True) -> bool:
        """Store a session with its TTL, and add its notification. With replace=False an existing session is not
        changed, and the result is False. A store with one copy writes StorySwarm's document only."""

    def storyarts_copy(self, timestamp: int) -> bytes | None:
        """None if it does not exist, and in a store with one copy."""
        return None

    def newest_sessions(self, count: int) -> list[tuple[int, Any]]:
        """Timestamps, newest first, each with a value that changes with its session. No document is read: a change by
        another program shows if it changed the length, or once the bridge has recorded it."""

    def remove_session(self, timestamp: int) -> bool:
        """Remove a session, its copies and its metadata, but not its notifications. False if there was no session."""

    def announce(self, draft: Draft) -> bool:
        """Add a notification, and record its type as its session's last. False if that is the last type already."""

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        """Add each: (member, time, True). If this service has one of its type and session pending: that, and False."""

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        """Members within their TTL with their times, oldest first, read about `page` at a time. Those that another
        program scored in seconds come before all others, since their scores are lower."""

    def pending_since(self, time: float) -> tuple[int, list[tuple[bytes, float]]]:
        """How many members are pending, and those after a time: at most 1000, and none that is scored in seconds."""

    def snapshot(self, count: int, ids: Sequence[str]) -> tuple[list[bytes], bool]:
        """The oldest `count` members, and whether any of `ids` is acknowledged, in one round trip."""

    def expired(self, count: int) -> list[bytes]:
        """Members of other programs past their TTL: among the oldest `count` scored in seconds, and in ms."""
        return []

    def acknowledged(self, ids: Sequence[str]) -> set[str]:
        """Which of `ids` are acknowledged. None in a store that only this service uses: they are no longer pending."""
        return set()

    def remove_pending(self, members: Sequence[bytes]) -> bool:
        """Remove pending members, without acknowledging them. False if none was pending."""

    def acknowledge(self, ids: Mapping[str, Sequence[bytes]]) -> list[bool | ApiError]:
        """Remove the members of each id and its own_member(), and mark it. False if it had no member and no marker."""

    def keep_token(self, digest: str, record: bytes, ttl: int, *, renews: bool = False) -> bool:
        """Store a token's record under its SHA-256, with a TTL in ms. `renews`: only if it is stored, else False."""

    def token(self, digest: str) -> bytes | None:
        """The record of a token; None if it is unknown, expired or revoked."""

    def tokens(self) -> list[tuple[str, bytes]]:
        """The SHA-256 and the record of each token."""

    def revoke_token(self, digest: str) -> bool:
        """False if there was no such token."""

    def swap_reservation(self, host: str, before: bytes | None, after: bytes | None) -> bytes | None:
        """Compare and swap: replace the record of a host's GPU by `after` (None: only read it) if it equals `before`.
        Returns the record that is stored then. It has no TTL, because the store's clock may differ from this PC's."""


# ======================================================================================================
# Redis: connections
# ======================================================================================================

_Command = Sequence[bytes | str | int] | bytes  # bytes: already packed

# What is wrong and what to do, by the text of an error of Redis, redis-py or the system. That text is never shown: it
# may contain the command, and with it a session.
_START_REDIS = "start it, or correct REDIS_URL, or REDIS_HOST and REDIS_PORT"
_REDIS_FAULTS = (
    ("WRONGPASS|invalid password|AUTH[ ,]", "it refuses the password", "correct user and password in REDIS_URL"),
    ("NOAUTH", "NOAUTH, it requires a password", "add it: REDIS_URL=redis://:PASSWORD@HOST:PORT/0"),
    ("DB index is out of range|invalid DB index", "it has no database with that number", "end REDIS_URL with /0"),
    ("CERTIFICATE_VERIFY", "its TLS certificate is not trusted", "add ?ssl_ca_certs=FILE to REDIS_URL"),
    ("CERTIFICATE_REQUIRED", "it requires a client certificate", "add ssl_certfile and ssl_keyfile to REDIS_URL"),
    (r"\[SSL|handshake", "it does not answer in TLS", "begin REDIS_URL with redis:// if it has no TLS"),
    ("DENIED|protected mode", "it accepts clients from its own PC only", "set a password there and in REDIS_URL"),
    ("max number of clients", "it has reached its limit of clients", "end some, or raise its maxclients"),
    ("READONLY", "READONLY, it is a replica", "set REDIS_URL to its primary"),
    ("MASTERDOWN", "MASTERDOWN, it is a replica without its primary", "set REDIS_URL to its primary"),
    ("OOM", "OOM, its memory is full", "free its memory, or raise its maxmemory"),
    ("MISCONF", "MISCONF, it cannot save to its disk", "free space there, and see its own log"),
    ("NOREPLICAS", "NOREPLICAS, it has too few replicas", "start them, or set its min-replicas-to-write to 0"),
    ("NOPERM|The user executing", "NOPERM, its ACL forbids that", "allow this user all keys and commands"),
    ("CROSSSLOT|MOVED|CLUSTERDOWN", "it is a cluster", "use a Redis that is not a cluster"),
    ("LOADING", "LOADING, it is loading its data", "wait until it has finished"),
    ("BUSY", "BUSY, it is running a script", "wait, or end the script with SCRIPT KILL"),
    ("WRONGTYPE", "WRONGTYPE, a key has the wrong type", "remove that key"),
    ("ERR", "ERR, it refuses the command", "use Redis 5 or later, and see its own log"),
    ("[Tt]imeout|took too long", "no response in time", "start it, or restart it"),
    (r"Error (-\d+|1100\d|8) connecting", "its host name is unknown", "correct it in REDIS_URL"),
    (r"Error (61|111|10061) connecting", "nothing listens there", _START_REDIS),
    ("Error 2 connecting", "a file that REDIS_URL names is missing", "correct REDIS_URL"),
    ("", "the connection failed", f"{_START_REDIS}; a Redis with TLS needs rediss://"),
)  # fmt: skip


def is_wrong_type(reply: Any) -> bool:
    """Whether a reply is Redis's WRONGTYPE error."""
    return isinstance(reply, ApiError) and "WRONGTYPE" in reply.refusal


class _TcpConnection(redis.Connection):
    """Splits the connect timeout among the addresses of a host name, because some of them may not respond."""

    def connect(self) -> None:
        """A new connection needs no health check. Redis refuses its PING (MISCONF) while it refuses writes only."""
        if not self.is_connected:
            self.next_health_check = int(time.monotonic()) + self.health_check_interval
            super().connect()

    def _connect(self) -> socket.socket:
        """Overridden because redis-py has no public way to choose an address. SSLConnection wraps its result."""
        deadline, first_error = time.monotonic() + self.socket_connect_timeout, None
        addresses = [self.host] if address_of(self.host) else self._look_up()
        for left, address in zip(range(len(addresses), 0, -1), addresses):
            try:
                sock = socket.create_connection((address, self.port), max(0.01, deadline - time.monotonic()) / left)
            except OSError as error:
                first_error = first_error or error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(self.socket_timeout)
            return sock
        raise first_error or OSError("its name has no address")

    def _look_up(self) -> list[str]:
        """The addresses of the host, 127.0.0.1 first: Windows takes 2 s to refuse ::1 if nothing listens there.
        getaddrinfo() has no timeout, so it runs in a thread, which is abandoned if it takes too long."""
        lookup: Future[list[Any]] = Future()
        arguments = (lookup, socket.getaddrinfo, self.host, self.port, 0, socket.SOCK_STREAM)
        threading.Thread(target=settle_by, args=arguments, name="redis-lookup", daemon=True).start()
        try:
            rows = lookup.result(self.socket_connect_timeout * 0.8)
        except concurrent.futures.TimeoutError:
            raise TimeoutError("the lookup of its name took too long") from None
        return sorted({str(row[4][0]): None for row in rows}, key=lambda address: address != "127.0.0.1")


class _TlsConnection(redis.SSLConnection, _TcpConnection): ...


class RedisClient:
    """redis-py's connections behind a circuit breaker: they take 20 us per command, redis-py's own client 150."""

    CONNECT_TIMEOUT, ANSWER_TIMEOUT = 0.6, 1.15  # seconds: a call that meets two dead connections ends within 3 s
    CHECK_INTERVAL = 10  # s: a connection idle for longer is checked before use; polls every 5 s need no check
    PROBE_INTERVAL = 1.0  # s between two probes while the circuit is open

    def __init__(self, url: str) -> None:
        given = redis.connection.parse_url(url).items()
        # From the URL come address, credentials and TLS. Timeouts and the protocol are set here.
        where = {name: value for name, value in given if re.match("host|port|db|user|pass|ssl", name)}
        self.place = f"{where['host']}:{where.get('port', 6379)}, database {where.get('db', 0)}"
        self._pool = redis.ConnectionPool(
            connection_class=_TlsConnection if url.startswith("rediss:") else _TcpConnection,
            max_connections=1000,  # the number of threads is the limit
            protocol=2,  # Redis 5 refuses HELLO 3
            driver_info=None,  # CLIENT SETINFO costs two round trips
            socket_timeout=self.ANSWER_TIMEOUT,
            socket_connect_timeout=self.CONNECT_TIMEOUT,
            health_check_interval=self.CHECK_INTERVAL,
            **where,
        )
        self._lock = threading.Lock()
        self._fault: Exception | None = None  # why the circuit is open; None while it is closed
        self._probes = Loop(self._probe, "redis-probe")
        self._probes.start()

    def close(self) -> None:
        self._probes.close()
        self._pool.disconnect(inuse_connections=False)  # the others end with their calls

    def exchange(self, commands: Sequence[_Command]) -> list[Any]:
        """Send commands, packed ones last, in one round trip. Returns the reply to each: bytes, int, None, a list of
        these, or Unavailable for an error. Raises Unavailable if no reply comes, and while the circuit is open."""
        return self._call(lambda connection: self._send(connection, commands))

    def ask(self, *commands: _Command) -> list[Any]:
        """As exchange(), but raises the first error."""
        return [result_of(reply) for reply in self.exchange(commands)]

    def transact(
        self, keys: Sequence[str], reads: Sequence[_Command], write: Callable[[list[Any]], Sequence[_Command]]
    ) -> list[Any]:
        """Pass the replies to the reads to `write`, and send its commands in one transaction; again if one of the keys
        was changed meanwhile. Returns the replies to the commands, [] if there are none. Raises what `write` raises."""

        def run(connection: Any) -> Any:
            for _ in range(10):
                watching, *replies = self._send(connection, [("WATCH", *keys), *reads])
                outcome: Any = []
                try:
                    commands = write(replies) if result_of(watching) else []
                except Exception as error:
                    commands, outcome = [], error
                if not commands:
                    self._send(connection, [("UNWATCH",)])
                    return outcome
                replies = self._send(connection, [("MULTI",), *commands, ("EXEC",)])
                if errors := [reply for reply in replies if isinstance(reply, ApiError)]:
                    return errors[:1]  # the reason: the last one is EXECABORT
                if (done := replies[-1]) is not None:
                    return [self.unavailable(reply) if isinstance(reply, Exception) else reply for reply in done]
            return Unavailable(f"{keys[0]} at {self.place} is changed all the time: try again.", 1)

        return result_of(self._call(run))

    def _call(self, run: Callable[[Any], T]) -> T:
        if self._probes.is_closing:
            raise stopping()
        if fault := self._fault:  # read once: the probe's thread may reset it
            raise self.unavailable(fault)
        try:
            return self._call_now(run)
        except (redis.RedisError, OSError, ValueError) as error:  # ValueError: the server is no Redis
            if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
                self._open_circuit(error)
            raise self.unavailable(error) from None

    def _call_now(self, run: Callable[[Any], T]) -> T:
        connection = self._pool.get_connection()
        try:
            try:
                connection.check_health()
            except redis.ResponseError:
                pass  # Redis is alive: it refuses PING (MISCONF) while it refuses writes only
            except (redis.ConnectionError, redis.TimeoutError):
                self._pool.disconnect(inuse_connections=False)  # the other idle connections are dead as well
                connection.connect()
            return run(connection)
        except BaseException:
            connection.disconnect()  # a reply that was not read would become the reply to the next command
            raise
        finally:
            self._pool.release(connection)

    def _send(self, connection: Any, commands: Sequence[_Command]) -> list[Any]:
        last = [command for command in commands if isinstance(command, bytes)]  # joined: each send() would wake Redis
        packed = connection.pack_commands([command for command in commands if not isinstance(command, bytes)])
        connection.send_packed_command([b"".join([*packed, *last])] if last else packed, check_health=False)
        return [self._read_reply(connection) for _ in commands]

    def _read_reply(self, connection: Any) -> Any:
        try:
            return connection.read_response(disable_decoding=True)
        except redis.ResponseError as error:
            return self.unavailable(error)

    def unavailable(self, error: Exception) -> ApiError:
        text = f"{getattr(error, 'status_code', '')} {error} {error.__context__}"
        wrong, advice = find_fault(_REDIS_FAULTS, text)
        message = f"Redis at {self.place} cannot be used ({wrong})."
        return Unavailable(message, 1, refusal=wrong if isinstance(error, redis.ResponseError) else "", advice=advice)

    def _open_circuit(self, fault: Exception) -> None:
        """Make calls fail at once until a probe succeeds."""
        with self._lock:
            if self._fault or self._probes.is_closing:
                return
            self._fault = fault
        unavailable = self.unavailable(fault)
        log.warning("store: %s Calls fail at once until it answers: %s", unavailable, unavailable.advice)
        self._pool.disconnect(inuse_connections=False)

    def _probe(self) -> float:
        """Close the circuit once Redis replies, even with an error. Not PING, which it refuses with MISCONF."""
        if self._fault:
            try:
                self._call_now(lambda connection: self._send(connection, [("EXISTS", "storyteller:newest")]))
                self._fault = None
                log.warning("store: Redis at %s answers again", self.place)
            except Exception as error:
                self._fault = error  # the reason may have changed
        return self.PROBE_INTERVAL


# ======================================================================================================
# Redis: scripts
# ======================================================================================================


def eval_command(script: str, keys: Sequence[str], *arguments: Any) -> tuple[Any, ...]:
    return ("EVAL", script, len(keys), *keys, *arguments)


# Each script is one atomic step. This one adds a notification. With KEYS[4] it adds it for a session, unless that
# session's last notification was of this type. With ARGV[5] it also saves the session.
# KEYS: 1 pending, 2 newest, 3 made; 4 session, 5 StoryArt's key for it, 6 meta; 7 index, 8 StoryArt's index, 9 latest,
# 10 its meta; 11 the document, with the bridge also 12 StoryArt's copy and 13 the copy for latest. These have temporary
# keys, because a script needs 1 ms to take 850 KB as an argument, or to copy them.
# ARGV: 1 member, 2 its time, 3 now; 4 type, "" for no notification; 5 timestamp, 6 "1" to replace; 7 and 8
# both fingerprints, 9 "1" if StoryArt wrote it, 10 the length of a latest that is no session.
# Returns a stored time that was ignored, or 0; then the outcome: "late" and the newest time, if ARGV[2] is not later.
# The caller retries with a later time, because the script cannot write it into the member's JSON.
_LUA_CHANGE = """
local week, ahead, own = 604800000, 0, '^{"id":"notif_[0-9]+_' .. string.rep('[0-9a-f]', 16) .. '",'
local function reply(...) return {ahead, ...} end
local function after(stored)  -- the first time after a stored one; 0 if that was written while the clock was wrong
  stored = math.floor(tonumber(stored) or 0)
  if stored <= ARGV[3] + 3600000 then return stored + 1 end
  ahead = stored
  return 0
end
local function add()
  local before = redis.call('GET', KEYS[3])
  if before then
    local score = redis.call('ZSCORE', KEYS[1], before)
    local id = string.match(before, '^{"id":"([^"]+)"')
    if score and tonumber(score) > ARGV[3] - week and redis.call('EXISTS', 'notifications:ack:' .. id) == 0 then
      return reply('pending', before, score)
    end
  end
  local newest = redis.call('GET', KEYS[2])
  if newest and after(newest) > tonumber(ARGV[2]) then return reply('late', newest) end
  redis.call('SET', KEYS[2], ARGV[2], 'PX', week)
  redis.call('SET', KEYS[3], ARGV[1], 'PX', week)
  redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
  -- Remove expired members, but only those of this service. The clock selects a page: there may be many others.
  local low, high = 100000000000, ARGV[3] - week
  local page = ARGV[3] % math.max(1, math.ceil(redis.call('ZCOUNT', KEYS[1], low, high) / 1000))
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], low, high, 'LIMIT', page * 1000, 1000)) do
    if string.match(member, own) then redis.call('ZREM', KEYS[1], member) end
  end
  return reply('added', ARGV[1], ARGV[2])
end
if not KEYS[4] then return add() end

local exists, result = redis.call('EXISTS', KEYS[4], KEYS[5]) > 0, reply('known')
if ARGV[5] and exists and ARGV[6] ~= '1' then
  redis.call('DEL', unpack(KEYS, 11))
  return reply('taken')
end
if ARGV[5] and redis.call('EXISTS', unpack(KEYS, 11)) < #KEYS - 10 then return reply('gone') end
if not ARGV[5] and not exists then return result end
if ARGV[4] ~= '' and redis.call('HGET', KEYS[6], 'announced') ~= ARGV[4] then
  result = add()
  if result[2] == 'late' then return result end
  redis.call('HSET', KEYS[6], 'announced', ARGV[4])
end
if ARGV[5] then
  local saved = math.max(ARGV[3], after(redis.call('HGET', KEYS[6], 'saved')))
  result[1] = ahead
  redis.call('RENAME', KEYS[11], KEYS[4])
  redis.call('PEXPIRE', KEYS[4], week)
  redis.call('ZADD', KEYS[7], ARGV[5], KEYS[4])
  redis.call('HSET', KEYS[6], 'saved', saved)
end
if ARGV[5] and KEYS[12] then
  redis.call('RENAME', KEYS[12], KEYS[5])
  redis.call('PEXPIRE', KEYS[5], week)
  redis.pcall('ZADD', KEYS[8], ARGV[5], KEYS[5])
  redis.call('HSET', KEYS[6], 'storyswarm', ARGV[7], 'storyart', ARGV[8])
  if ARGV[9] == '1' then redis.call('HSET', KEYS[6], 'byStoryArt', '1') end
  local is_newest = true
  for at = 7, 8 do
    local top = redis.pcall('ZREVRANGE', KEYS[at], 0, 0, 'WITHSCORES')
    is_newest = is_newest and math.floor(tonumber(top[2]) or 0) <= tonumber(ARGV[5])
  end
  -- A latest that another program has changed since the caller looked stays: the bridge reads it first.
  local synced, size = redis.call('HGET', KEYS[10], 'storyswarm') or '', redis.pcall('STRLEN', KEYS[9])
  local is_known = size == 0 or size == tonumber(string.match(synced, '^[0-9]+')) or size == tonumber(ARGV[10])
  if is_newest and (is_known or type(size) ~= 'number') then
    local left = redis.call('PTTL', KEYS[9])
    redis.call('RENAME', KEYS[13], KEYS[9])
    if left == -1 then redis.call('PERSIST', KEYS[9]) else redis.call('PEXPIRE', KEYS[9], week) end
    redis.call('HSET', KEYS[10], 'storyswarm', ARGV[7])
  else
    redis.call('DEL', KEYS[13])
  end
end
-- The meta key gets the longer TTL of the copies, and none if one has none, as another program may write it.
local left, other = redis.call('PTTL', KEYS[4]), redis.call('PTTL', KEYS[5])
if left == -1 or other == -1 then left = -1 else left = math.max(left, other) end
if left == -1 then redis.call('PERSIST', KEYS[6]) else redis.call('PEXPIRE', KEYS[6], left) end
return result
"""

# KEYS: 1 pending, 2 marker. ARGV: 1 the lowest score that has not expired; 2 and 3 own_member(); 4 ... members.
_LUA_ACKNOWLEDGE = """
local removed = 0
local function remove(member) removed = removed + redis.call('ZREM', KEYS[1], member) end
local low = math.max(ARGV[1], ARGV[2])
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], low, ARGV[2])) do
  if string.sub(member, 1, #ARGV[3]) == ARGV[3] then remove(member) end
end
for at = 4, #ARGV do remove(ARGV[at]) end
if removed == 0 then return redis.call('EXISTS', KEYS[2]) end
redis.call('SET', KEYS[2], '1', 'PX', 604800000)
return 1
"""

# KEYS: 1 session, 2 StoryArt's key for it, 3 meta, 4 index, 5 StoryArt's index, 6 latest, 7 its meta. ARGV: timestamp;
# without it, only the leftovers of a session that is gone are removed: it may have been saved again meanwhile.
_LUA_REMOVE = """
if not ARGV[1] and redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then return 0 end
local function time_of(latest)  -- cjson refuses half of a surrogate pair: the escape of a newline takes its place
  return math.floor(cjson.decode((string.gsub(latest, '\\\\u[dD][89a-fA-F]%x%x', '\\\\n'))).timestamp)
end
local is_read, time = pcall(time_of, ARGV[1] and redis.pcall('GET', KEYS[6]))
local removed = redis.call('DEL', KEYS[1], KEYS[2])
if is_read and time == tonumber(ARGV[1]) then
  removed = removed + redis.call('DEL', KEYS[6], KEYS[7])
end
redis.call('DEL', KEYS[3])
redis.pcall('ZREM', KEYS[4], KEYS[1])
redis.pcall('ZREM', KEYS[5], KEYS[2])
return removed
"""

# Every command and every kind of key that a save uses, since an ACL may forbid any of them. Leaves nothing. KEYS:
# 1 incoming, 2 session, 3 StoryArt's key for it, 4 meta, 5 ... sorted sets.
_LUA_TRY = """
redis.call('SET', KEYS[1], 'x', 'PX', 1000)  -- first: after its first write a script is not refused for memory
redis.call('RENAME', KEYS[1], KEYS[2])
for at = 5, #KEYS do
  redis.call('ZREM', KEYS[at], 'storyteller:try')
  redis.call('ZADD', KEYS[at], 0, 'storyteller:try')
  redis.call('ZREM', KEYS[at], 'storyteller:try')
end
redis.call('HSET', KEYS[4], 'saved', redis.call('HGET', KEYS[4], 'saved') or 0)
redis.call('PEXPIRE', KEYS[4], 1000)
return redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
"""

# Compare and swap. KEYS: 1 record. ARGV: 1 the expected record, "" for none; 2 the new one, "" to read only.
_LUA_SWAP = """
local is_same = (redis.call('GET', KEYS[1]) or '') == ARGV[1]
if is_same and ARGV[2] ~= '' then redis.call('SET', KEYS[1], ARGV[2]) end
return redis.call('GET', KEYS[1])
"""

# Take or extend the lease; one of over a minute outlived a clock that was set back. Returns "" if another owner has it,
# else what look() returns, as one text: redis-py needs 1.5 us per item. KEYS: 1 index, 2 StoryArt's index, 3 latest,
# 4 lease, 5 met. ARGV: 1 owner, 2 the lease's TTL, 3 how many sessions of each index, 4 ... further timestamps.
_LUA_LOOK = """
local holder = redis.call('GET', KEYS[4])
if holder and holder ~= ARGV[1] and redis.call('PTTL', KEYS[4]) <= 60000 then return '' end
redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[2])
local function size(key)
  local found = redis.pcall('STRLEN', key)
  return type(found) == 'number' and found or -1
end
local found, seen = {size(KEYS[3]), redis.call('EXISTS', KEYS[5])}, {}
local function look(score)
  local timestamp = string.match(score, '^([0-9]+)%.?[0-9]*$')
  if not timestamp or seen[timestamp] then return end
  seen[timestamp] = true
  for _, part in ipairs({timestamp, size('session:' .. timestamp), size('storyart:session:' .. timestamp)}) do
    found[#found + 1] = part
  end
end
for at = 1, 2 do
  local newest = redis.pcall('ZREVRANGE', KEYS[at], 0, ARGV[3] - 1, 'WITHSCORES')
  for score = 2, #newest, 2 do look(newest[score]) end
  local oldest = redis.pcall('ZREVRANGE', KEYS[at], -1, -1, 'WITHSCORES')[2] or ''  -- it may have expired
  if redis.call('EXISTS', 'session:' .. oldest, 'storyart:session:' .. oldest) == 0 then look(oldest) end
end
for at = 4, #ARGV do look(ARGV[at]) end
return table.concat(found, ' ')
"""


# ======================================================================================================
# Stores: Redis
# ======================================================================================================


class RedisStore(Store):
    """Redis 5 or later. Keys that only this service uses begin with `storyteller:`; other programs share the rest."""

    name = "redis"
    INDEXES = ("storyteller:sessions", "storyart:sessions:index")
    LATEST, META_OF_LATEST = "session:latest", "storyteller:session:latest"
    PENDING, ACK, TOKEN = "notifications:pending", "notifications:ack:", "auth:session:"
    NEWEST = "storyteller:newest"  # the time of the newest notification

    has_both_copies = False  # whether save() writes StoryArt's copy and session:latest as well
    unreadable_latest = 0  # the length of a session:latest that is no session, which a save may replace

    def __init__(self, url: str, clock: Callable[[], int] = now_ms) -> None:
        self._redis = RedisClient(url)
        self.place = self._redis.place
        self.writes = WriteStatus(f"Redis at {self.place}")
        self._clock = clock
        self._newest_time = 0  # ms, of the newest notification of this instance; other instances may have later ones
        self._pack = redis.Connection(driver_info=None).pack_command  # driver_info would take 0.3 ms
        # Packing 100 words takes 0.1 ms, and two polls are mostly the same.
        self._snapshot_commands = functools.lru_cache(maxsize=2)(self._pack_snapshot_commands)

    def _pack_snapshot_commands(self, count: int, now: int, ids: tuple[str, ...]) -> list[bytes]:
        """The commands that read the oldest members within their TTL, and whether one of the ids is acknowledged."""
        reads = [("ZRANGEBYSCORE", self.PENDING, *scores, "LIMIT", 0, count) for scores in self._scores(now)]
        markers = [("EXISTS", *[self.ACK + id for id in ids])] if ids else []
        return [b"".join(self._pack(*command)) for command in (*reads, *markers)]

    def try_write(self) -> None:
        self._run(_LUA_TRY, ["storyteller:incoming:try", *self._session_keys("try"), self.PENDING, *self.INDEXES])
        self.writes.note()

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _session_keys(timestamp: int | str) -> tuple[str, str, str]:
        """The key of a session, StoryArt's key for it, and the key of its metadata."""
        return f"session:{timestamp}", f"storyart:session:{timestamp}", f"storyteller:session:{timestamp}"

    def _keys_of(self, timestamp: int) -> tuple[str, ...]:
        """All keys that a change of a session may write."""
        return (*self._session_keys(timestamp), *self.INDEXES, self.LATEST, self.META_OF_LATEST)

    def _read_parts(self, timestamps: Sequence[int], verb: str) -> list[list[Any]]:
        """Of each session: timestamp, metadata, its key's reply to GET or STRLEN, and the length of StoryArt's copy."""
        commands: list[_Command] = []
        for key, storyart_key, meta in map(self._session_keys, timestamps):
            # Metadata first: if a save comes in between, the document is announced again, which changes nothing.
            # GET and not MGET, which does not report a key of the wrong type.
            commands.append(("HMGET", meta, "saved", "announced", "storyswarm", "storyart"))
            commands += [(verb, key), ("STRLEN", storyart_key)]
        replies = iter(self._redis.exchange(commands))
        return [list(parts) for parts in zip(timestamps, replies, replies, replies)]

    def read_sessions(self, timestamps: Sequence[int]) -> Iterator[StoredSession | ApiError | None]:
        for at in range(0, len(timestamps), 8):
            yield from self._read_batch(timestamps[at : at + 8])

    def _read_batch(self, timestamps: Sequence[int]) -> Iterator[StoredSession | ApiError | None]:
        """StorySwarm's copies, or StoryArt's for sessions without one."""
        sessions = self._read_parts(timestamps, "GET")
        if storyarts := [parts for parts in sessions if parts[2] is None and parts[3] != 0]:
            reads = [("GET", self._session_keys(parts[0])[1]) for parts in storyarts]
            for parts, document in zip(storyarts, self._redis.exchange(reads)):
                parts[2:] = document, None
        return itertools.starmap(self._read_session, sessions)

    def _read_session(self, timestamp: int, meta: Any, document: Any, size: Any) -> StoredSession | ApiError | None:
        if is_wrong_type(document):
            document = None
        elif document is None or isinstance(document, ApiError):
            return document
        fields = [None] * 4 if isinstance(meta, ApiError) else [one and one.decode("utf-8", "replace") for one in meta]
        saved = int(fields[0]) if fields[0] and fields[0].isdigit() else None
        synced = (fields[2] or "", fields[3] or "") if self.has_both_copies else None
        return StoredSession(timestamp, document, saved, fields[1], synced, -1 if isinstance(size, ApiError) else size)

    def sessions(self) -> Iterator[StoredSession]:
        for timestamp in self._timestamps():
            if session := self.session(timestamp):
                yield session
                continue
            with contextlib.suppress(Unavailable):  # a replica refuses writes: read on
                self.trim(timestamp)

    def _timestamps(self) -> Iterator[int]:
        """All timestamps in the indexes, newest first, each once even if its scores differ by fractions of a ms."""
        merged = heapq.merge(*map(self._read_index, self.INDEXES), reverse=True)
        return (timestamp for timestamp, _ in itertools.groupby(merged))

    def _read_index(self, key: str) -> Iterator[int]:
        page = 100
        scores = [math.inf] * page  # as if a full page came before the first one
        while len(scores) == page:
            read = ("ZREVRANGEBYSCORE", key, f"({scores[-1]!r}", "(-inf", "WITHSCORES", "LIMIT", 0, page)
            (reply,) = self._redis.exchange([read])
            scores = [] if is_wrong_type(reply) else [float(score) for score in result_of(reply)[1::2]]
            yield from map(int, scores)

    def newest_sessions(self, count: int) -> list[tuple[int, Any]]:
        found, timestamps = list[tuple[int, Any]](), self._timestamps()
        for _ in range(2):  # the second time in place of those that are gone: there may be many
            if part := list(itertools.islice(timestamps, count - len(found))):
                sessions = self._read_parts(part, "STRLEN")
                found += [(timestamp, str(version)) for timestamp, *version in sessions if version[1:] != [0, 0]]
        return found

    def trim(self, timestamp: int) -> None:
        """Remove the index entries and the metadata of a session that is gone."""
        self._run(_LUA_REMOVE, self._keys_of(timestamp))

    def newest_copy(self) -> bytes | None:
        return self._get(self.LATEST)

    def _get(self, key: str) -> bytes | None:
        """None if the key does not exist, or is not a string."""
        return cast("bytes | None", self._redis.ask(("MGET", key))[0][0])

    def _run(self, script: str, keys: Sequence[str], *arguments: Any) -> Any:
        return self._write(eval_command(script, keys, *arguments))

    def _write(self, *commands: _Command) -> Any:
        """The reply to the last command. Raises the first error."""
        return list(map(result_of, self._note_refusals(self._redis.exchange(commands))))[-1]

    def _transact(self, *call: Any) -> list[Any]:
        return list(map(result_of, self._note_refusals(self._redis.transact(*call))))

    def _note_refusals(self, replies: list[Any]) -> list[Any]:
        """Record refused writes in `writes`, and return the replies. WRONGTYPE concerns one key, not all writes."""
        for reply in replies:
            if isinstance(reply, ApiError) and reply.refusal and not is_wrong_type(reply):
                self.writes.note(reply.refusal)
        return replies

    def _change_command(self, draft: Draft | None, at: int, keys: Sequence[str], *further: Any) -> tuple[Any, ...]:
        kind, member = (draft.type, draft.member(at)) if draft else ("", b"")
        made = f"storyteller:made:{kind}:{draft.session if draft else ''}"
        keys = (self.PENDING, self.NEWEST, made, *keys)
        return eval_command(_LUA_CHANGE, keys, member, at, self._clock(), kind, *further)

    def _change(self, drafts: Sequence[Draft | None], keys: Sequence[str] = (), *further: Any) -> list[Any]:
        """Run _LUA_CHANGE for each draft, with a time after the newest so far. Returns the outcome of each."""
        first = next_time(self._newest_time, self._clock())
        commands = [self._change_command(draft, at, keys, *further) for at, draft in enumerate(drafts, first)]
        outcomes = self._note_refusals(self._redis.exchange(commands))
        ahead = max(0 if isinstance(outcome, ApiError) else outcome.pop(0) for outcome in outcomes)
        warn_of_clock(ahead, self._clock(), self.place)
        states = [None if isinstance(outcome, ApiError) else outcome[0] for outcome in outcomes]
        times = [int(float(outcome[-1])) for outcome, state in zip(outcomes, states) if state in (b"late", b"added")]
        self._newest_time = max([first - 1, *times])
        if b"added" in states:
            self.writes.note()
        if late := [draft for draft, state in zip(drafts, states) if state == b"late"]:  # another instance was faster
            retried = iter(self._change(late, keys, *further))
            outcomes = [next(retried) if state == b"late" else outcome for outcome, state in zip(outcomes, states)]
        return outcomes

    def save(self, timestamp: int, change: Change, *, replace: bool = True) -> bool:
        name, storyswarm, storyart = f"storyteller:incoming:{secrets.token_hex(8)}", change.storyswarm, change.storyart
        fingerprint = fingerprint_of(storyswarm) if self.has_both_copies else ""
        synced = (fingerprint, fingerprint if storyart == storyswarm else fingerprint_of(storyart))
        documents = [storyswarm, storyart, storyswarm] if self.has_both_copies else [storyswarm]
        incoming = {f"{name}:{number}": document or b"" for number, document in enumerate(documents)}
        self._write(*[("SET", key, document, "PX", 60_000) for key, document in incoming.items()])
        further = (timestamp, int(replace), *synced, int(change.by_storyart), self.unreadable_latest)
        state = result_of(self._change([change.draft], [*self._keys_of(timestamp), *incoming], *further)[0])[0]
        if state == b"gone":
            raise Unavailable("Redis took over a minute to store this session: try again.", 1)
        self.writes.note()
        return bool(state != b"taken")

    def remove_session(self, timestamp: int) -> bool:
        return bool(self._run(_LUA_REMOVE, self._keys_of(timestamp), timestamp))

    def announce(self, draft: Draft) -> bool:
        (outcome,) = self._change([draft], self._session_keys(draft.session))
        return bool(result_of(outcome)[0] != b"known")

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        return map_results(lambda reply: (reply[1], int(float(reply[2])), reply[0] == b"added"), self._change(drafts))

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        for lowest, highest in self._scores(self._clock()):
            is_full = True
            while is_full:
                rows = self._select(lowest, highest, page)
                if is_full := len(rows) == page:
                    last = rows[-1][1]
                    # There may be more with the last score. Read them all: a page can only begin after a score.
                    rows = [row for row in rows if row[1] < last] + self._select(repr(last), repr(last), -1)
                    lowest = f"({last!r}"
                yield from ((member, to_ms(score)) for member, score in rows)

    @staticmethod
    def _scores(now: int) -> list[tuple[str, str]]:
        """The ranges of scores within the TTL: first those in seconds, then those in ms."""
        ms = now - TTL_MS
        return [(f"({ms / 1000}", f"({SECONDS_BELOW}"), (f"({ms}", "+inf")]

    def _select(self, lowest: str, highest: str, count: int) -> list[tuple[bytes, float]]:
        (values,) = self._redis.ask(("ZRANGEBYSCORE", self.PENDING, lowest, highest, "WITHSCORES", "LIMIT", 0, count))
        return list(zip(values[::2], map(float, values[1::2])))

    def pending_since(self, time: float) -> tuple[int, list[tuple[bytes, float]]]:
        counts = [("ZCOUNT", self.PENDING, *scores) for scores in self._scores(self._clock())]
        later = f"({max(time, SECONDS_BELOW, self._clock() - TTL_MS)!r}"
        newer = ("ZRANGEBYSCORE", self.PENDING, later, "+inf", "WITHSCORES", "LIMIT", 0, 1000)
        *counted, values = self._redis.ask(*counts, newer)
        return sum(counted), list(zip(values[::2], map(float, values[1::2])))

    def snapshot(self, count: int, ids: Sequence[str]) -> tuple[list[bytes], bool]:
        # Whole seconds, so that the commands are packed once a second: packing costs more than Redis's reply.
        commands = self._snapshot_commands(count, self._clock() // 1000 * 1000, tuple(ids))
        by_seconds, by_ms, *markers = self._redis.ask(*commands)
        return (by_seconds + by_ms)[:count], any(markers)

    def expired(self, count: int) -> list[bytes]:
        ms = self._clock() - TTL_MS
        rows = self._select("-inf", f"{ms / 1000}", count) + self._select(f"{SECONDS_BELOW}", f"{ms}", count)
        return [member for member, _ in rows if not re.match(OWN_MEMBER % OWN_ID.encode(), member)]

    def acknowledged(self, ids: Sequence[str]) -> set[str]:
        if not ids or self._redis.ask(("EXISTS", *[self.ACK + id for id in ids])) == [0]:
            return set()
        return {id for id, exists in zip(ids, self._redis.ask(*[("EXISTS", self.ACK + id) for id in ids])) if exists}

    def remove_pending(self, members: Sequence[bytes]) -> bool:
        return bool(self._write(("ZREM", self.PENDING, *members)))

    def acknowledge(self, ids: Mapping[str, Sequence[bytes]]) -> list[bool | ApiError]:
        oldest = self._clock() - TTL_MS + 1
        commands = [
            eval_command(_LUA_ACKNOWLEDGE, (self.PENDING, self.ACK + id), oldest, *own_member(id), *members)
            for id, members in ids.items()
        ]
        return map_results(bool, self._note_refusals(self._redis.exchange(commands)))

    def keep_token(self, digest: str, record: bytes, ttl: int, *, renews: bool = False) -> bool:
        command = ("SET", self.TOKEN + digest, record, "PX", ttl, *(("XX",) if renews else ()))
        return self._write(command) is not None

    def token(self, digest: str) -> bytes | None:
        return self._get(self.TOKEN + digest)

    def tokens(self) -> list[tuple[str, bytes]]:
        records, cursor = dict[str, "bytes | None"](), b""
        while cursor != b"0":  # SCAN walks over all keys of the database
            ((cursor, keys),) = self._redis.ask(("SCAN", cursor or 0, "MATCH", f"{self.TOKEN}*", "COUNT", 1000))
            digests = [key.decode("utf-8", "replace").removeprefix(self.TOKEN) for key in keys]
            records.update(zip(digests, self._redis.ask(("MGET", *keys))[0] if keys else ()))
        return [(digest, record) for digest, record in sorted(records.items()) if record is not None]

    def revoke_token(self, digest: str) -> bool:
        return bool(self._write(("DEL", self.TOKEN + digest)))

    def swap_reservation(self, host: str, before: bytes | None, after: bytes | None) -> bytes | None:
        return cast("bytes | None", self._run(_LUA_SWAP, [f"storyteller:gpu:{host}"], before or b"", after or b""))

    TAKEN = "storyteller:taken"  # what take() has stored once: what was removed since is not stored again

    def take(self, table: str, row: sqlite3.Row) -> bool:
        """Copy a row of SqliteStore.rows() with its TTL. False if it exists already, or was copied before."""
        life, commands = ("PX", max(1, row["end"] - self._clock())), list[_Command]()
        if table == "session":
            (*keys, meta), value = self._session_keys(row["timestamp"]), row["document"]
            # As written by StoryArt: the bridge then makes StoryArt's copy, and StorySwarm's changes keep its texts.
            announced = ("announced", row["announced"]) if row["announced"] else ()
            fields = ("saved", row["saved"], "byStoryArt", 1, *announced)
            commands = [("ZADD", self.INDEXES[0], row["timestamp"], keys[0]), ("DEL", meta), ("HSET", meta, *fields)]
            commands.append(("PEXPIRE", meta, life[1]))
        elif table == "pending":
            keys, value = [f"storyteller:made:{row['made']}"], row["member"]
            with contextlib.suppress(ValueError, TypeError, KeyError):  # not a notification
                keys.append(self.ACK + str(parse_json(value)["id"]))
            commands = [("ZADD", self.PENDING, row["time"], value)]
        elif table == "token":
            keys, value = [self.TOKEN + row["digest"]], row["record"]
        else:
            keys, value = [self.ACK + row["id"]], "1"
        commands.append(("SET", keys[0], value, *life))
        year = 366 * 24 * 3600 * 1000  # the longest TTL of a token
        taken: list[_Command] = [("SADD", self.TAKEN, keys[0]), ("PEXPIRE", self.TAKEN, year)]
        # ZCARD, because a transaction does not undo its other commands if one meets a key of the wrong type.
        reads: list[_Command] = [("ZCARD", self.PENDING), ("ZCARD", self.INDEXES[0])]
        reads += [("EXISTS", *keys), ("SISMEMBER", self.TAKEN, keys[0])]

        def write(replies: list[Any]) -> list[_Command]:
            *_, exists, was_taken = map(result_of, replies)
            return taken if exists or was_taken else [*commands, *taken]

        return len(self._transact(keys, reads, write)) > len(taken)


# ======================================================================================================
# Stores: Redis with both copies
# ======================================================================================================


class BridgedStore(RedisStore):
    """For Bridge: StorySwarm's and StoryArt's copy of each session, and session:latest, StorySwarm's of the newest."""

    has_both_copies = True
    LEASE, MET = "storyteller:bridge", "storyteller:bridge:met"

    def newest_copy(self, *, whole: bool = True) -> bytes | None:
        """session:latest, if it changed since it was last in step; if not `whole`, only if its length changed."""
        size, synced = self._redis.exchange([("STRLEN", self.LATEST), ("HGET", self.META_OF_LATEST, "storyswarm")])
        before = (result_of(synced) or b"").decode()
        copy = None if not whole and str(size) == before.partition(" ")[0] else self._get(self.LATEST)
        return None if fingerprint_of(copy) == before else copy

    def storyarts_copy(self, timestamp: int) -> bytes | None:
        return self._get(self._session_keys(timestamp)[1])

    def look(self, owner: str, ttl: int, count: int, further: Iterable[int]) -> list[int]:
        """Take or extend the lease for `ttl` ms. Returns [] if another owner has it. Otherwise: the length of
        session:latest; 1 if note_met() was called, else 0; then timestamp and lengths of both copies of the newest
        `count` sessions of each index, of its oldest if that is gone, and of the `further` ones. The length of a key
        that is not a string is -1."""
        keys = (*self.INDEXES, self.LATEST, self.LEASE, self.MET)
        return list(map(int, self._run(_LUA_LOOK, keys, owner, ttl, count, *further).split()))

    def sync(self, timestamp: int, decide: Callable[[Copies], Change | None], latest: bytes | None = None) -> Copies:
        """Write what decide() returns for the copies, as transact() does, and return the copies that it was given.
        `latest` is a changed session:latest. A copy gets the TTL of the one that it is made from (7 days if that has
        none), but never a shorter one than it has. Raises the ValueError of decide(), and ValueError for a key that is
        not a string."""
        keys = self._session_keys(timestamp)
        reads: list[_Command] = [("HMGET", keys[2], "storyswarm", "storyart", "byStoryArt"), ("EXISTS", self.MET)]
        reads += [("PTTL", keys[2]), *((verb, key) for key in keys[:2] for verb in ("PTTL", "GET"))]
        watched = [*keys]
        if latest is not None:
            watched += [self.LATEST, self.META_OF_LATEST]
            reads += [("GET", self.LATEST), ("PTTL", self.LATEST), ("HGET", self.META_OF_LATEST, "storyswarm")]
        copies: Copies = Copies(timestamp, None, None)
        draft: Draft | None = None

        def write(replies: list[Any]) -> list[_Command]:
            nonlocal copies, draft
            draft = None  # this may be a retry
            if any(map(is_wrong_type, replies)):
                raise ValueError("its key is not a string")
            meta, is_met, meta_ttl, ttl, storyswarm, storyart_ttl, storyart, *of_latest = map(result_of, replies)
            if of_latest and (of_latest[0] != latest or of_latest[2] == fingerprint_of(latest).encode()):
                return []  # it was written again meanwhile, or is in step already
            *synced, by_storyart = [(field or b"").decode("utf-8", "replace") for field in meta]
            copies = Copies(timestamp, storyswarm, storyart, (synced[0], synced[1]), by_storyart == "1", latest)
            change = decide(copies)
            # A copy that was saved again unchanged outlives the metadata. Below a minute that does not matter.
            is_kept = meta_ttl == -1 or (-1 not in (ttl, storyart_ttl) and meta_ttl + 60_000 > max(ttl, storyart_ttl))
            if change is None and latest is None and is_kept:
                return []
            change = change or Change(by_storyart=copies.by_storyart)
            written = change.storyswarm, change.storyart
            synced = [old if new is None else fingerprint_of(new) for new, old in zip(written, copies.current)]
            fields = ("storyswarm", synced[0], "storyart", synced[1], "byStoryArt", int(change.by_storyart))
            commands: list[_Command] = [("HSET", keys[2], *fields)]
            ttls = (ttl, storyart_ttl), (storyart_ttl, ttl)
            for key, index, new, old, (own, other) in zip(keys, self.INDEXES, written, (storyswarm, storyart), ttls):
                source = of_latest[1] if of_latest else other
                life = max(own, source if source > 0 else TTL_MS)
                if new is not None:
                    commands.append(("SET", key, new, *(() if own == -1 else ("PX", life))))
                if new is not None or old is not None:
                    commands.append(("ZADD", index, timestamp, key))
            if latest is not None:
                commands.append(("HSET", self.META_OF_LATEST, "storyswarm", fingerprint_of(latest)))
            # In a Redis that the bridge sees for the first time, only the newest session is announced.
            if is_met or timestamp >= next(self._timestamps(), 0):
                draft = change.draft
            at = next_time(self._newest_time, self._clock())
            return [*commands, self._change_command(draft, at, keys)]

        if replies := self._transact(watched, reads, write):
            ahead, state, *_ = replies[-1]
            warn_of_clock(ahead, self._clock(), self.place)
            if draft and state == b"late":
                self.announce(draft)
        return copies

    def renew_latest(self, newest: int) -> None:
        """Write StorySwarm's copy of the newest session to session:latest, unless another program has changed that."""
        session, _, meta = self._session_keys(newest)
        synced, of_latest = self._redis.ask(("HGET", meta, "storyswarm"), ("HGET", self.META_OF_LATEST, "storyswarm"))
        if synced in (None, b"0", of_latest):
            return

        def write(replies: list[Any]) -> list[_Command]:
            if any(isinstance(reply, ApiError) for reply in replies):  # such as WRONGTYPE
                return []
            latest, ttl, document, document_ttl = replies
            current = [fingerprint_of(copy).encode() for copy in (latest, document)]
            if current[0] not in (b"0", of_latest) or current[1] != synced:
                return []
            life = () if ttl == -1 else ("PX", max(ttl, document_ttl if document_ttl > 0 else TTL_MS))
            return [("SET", self.LATEST, document, *life), ("HSET", self.META_OF_LATEST, "storyswarm", synced)]

        reads = [(verb, key) for key in (self.LATEST, session) for verb in ("GET", "PTTL")]
        self._transact((self.LATEST, self.META_OF_LATEST, session), reads, write)

    def note_met(self) -> None:
        self._redis.ask(("SET", self.MET, "1"))


# ======================================================================================================
# SQLite: the file
# ======================================================================================================

STORE_FILES = ("storyteller.sqlite3", "storyteller.sqlite3-wal", "storyteller.sqlite3-shm")  # in the data folder

# Each step upgrades the file by one version. PRAGMA user_version is the number of steps that a file has had.
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
    "CREATE TABLE reservation (host TEXT PRIMARY KEY, record BLOB NOT NULL);",
)

# What is wrong with the file and what to do, by the text of SQLite's error.
_SQLITE_FAULTS = (
    ("locked", "it is locked by another program", "end the program that uses it, like a backup or a virus scan"),
    ("is full", "the disk is full", "free space on it"),
    ("malformed|not a database", "it is damaged", "stop the service, then move storyteller.sqlite3* away"),
    ("already exists", "it is another program's", "set STORYTELLER_DATA_DIR to another folder"),
    ("", "", "check that its disk has room, and that this user may read and write it"),
)


# ======================================================================================================
# Stores: SQLite
# ======================================================================================================


class SqliteStore(Store):
    """One file in WAL mode: a write blocks no read, and committed data survives a killed process."""

    name = "sqlite"
    WAIT = 3.0  # seconds that a write waits for other threads and processes together

    def __init__(self, path: Path, clock: Callable[[], int] = now_ms, lock_timeout: float | None = None) -> None:
        """Waits `lock_timeout` seconds (default: WAIT) for a file that another program locks. Raises StartError."""
        self.place = str(path)
        self.writes = WriteStatus(str(path))
        self._clock = clock
        self._damaged = False  # whether SQLite has called the file malformed
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()  # idle; as many as threads read at once
        self._closed = False
        self._open(self.WAIT if lock_timeout is None else lock_timeout)
        self._writes = Batcher(self._commit, "sqlite-writes")  # from now on only its thread uses the writer

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.place, timeout=self.WAIT, isolation_level=None, check_same_thread=False)

    def _open(self, lock_timeout: float) -> None:
        deadline = time.monotonic() + lock_timeout
        for attempt in itertools.count():
            try:
                self._writer = self._connect()
                with contextlib.ExitStack() as on_failure:
                    on_failure.callback(self._writer.close)  # Windows does not move a file that is open
                    self._prepare()
                    on_failure.pop_all()
                return
            except sqlite3.Error as error:
                wrong, advice = self._fault_of(error)
                if "locked" not in wrong or time.monotonic() > deadline:
                    raise StartError(f"The store {self.place} cannot be used ({wrong}): {advice}.") from None
                if attempt == 0:
                    log.warning("store: %s cannot be used yet (%s): trying for %g s", self.place, wrong, lock_timeout)
            time.sleep(0.1)

    def _prepare(self) -> None:
        self._writer.execute("PRAGMA busy_timeout = 100")
        self._writer.execute("PRAGMA synchronous = FULL")
        damage = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        code = re.search(r"error code=(\d+)", damage)
        if code and int(code[1]) & 255 == 10:  # SQLITE_IOERR: the file may be locked
            raise sqlite3.OperationalError("disk I/O error")
        if damage != "ok":
            raise StartError(f"The store {self.place} is damaged ({damage}): move storyteller.sqlite3* away.")
        with self._writer:
            self._writer.execute("BEGIN IMMEDIATE")
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version > len(_SCHEMA_STEPS):
                raise StartError(f"The store {self.place} was made by a newer version: start that version.")
            for statement in ";".join(_SCHEMA_STEPS[version:]).split(";"):
                self._writer.execute(statement)
            if version < len(_SCHEMA_STEPS):
                self._writer.execute(f"PRAGMA user_version = {len(_SCHEMA_STEPS)}")
        self._writer.execute("PRAGMA journal_mode = WAL")  # last, since it writes to the file

    def _fault_of(self, error: sqlite3.Error) -> tuple[str, str]:
        """What is wrong and what to do. On Windows any error may mean that another program locks the file."""
        text = f"{error}{' locked' * is_locked(Path(self.place))}"
        wrong, advice = find_fault(_SQLITE_FAULTS, text)
        return wrong or text, advice

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._damaged = self._damaged or "malformed" in str(error)
            wrong, advice = self._fault_of(error)
            message = f"The store {self.place} cannot be used ({wrong})."
            raise Unavailable(message, 1, refusal=wrong, advice=advice) from None

    def _read(self, query: str, *values: object) -> list[Any]:
        """All rows of the result, read on a connection that no other thread uses at the same time."""
        if self._closed:
            raise stopping()
        with self._errors():
            try:
                connection = self._readers.get_nowait()
            except queue.Empty:
                connection = self._connect()
            try:
                return connection.execute(query, values).fetchall()
            finally:
                self._readers.put(connection)
                if self._closed:  # by another thread meanwhile
                    self._close_readers()

    def _write(self, change: Callable[[], T]) -> T:
        """Run a change, and return its result once it is durable."""
        return cast(T, result_of(self._write_each([change])[0]))

    def _write_each(self, changes: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run changes, and return the result or the exception of each once all are durable."""
        outcomes = self._writes.ask((time.monotonic() + self.WAIT, tuple(changes)), cancellable=True)
        for wait in (self.WAIT, 2 * self.WAIT):
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return outcomes.result(wait)
            if outcomes.cancel():  # else the commit is under way: wait for its outcome
                break
        raise Unavailable(f"The store {self.place} is busy: try again.", 1)

    def _commit(self, batch: Sequence[tuple[float, Sequence[Callable[[], Any]]]]) -> list[list[Any]]:
        """Run all changes of a batch in one transaction, and so with one fsync. It also deletes what has expired."""
        before, wait = self._writer.total_changes, min(deadline for deadline, _ in batch) - time.monotonic()
        is_alone = sum(len(changes) for _, changes in batch) == 1  # then it needs no savepoint
        try:
            with self._errors(), self._writer:
                self._writer.execute(f"PRAGMA busy_timeout = {max(0.0, wait) * 1000:.0f}")
                self._writer.execute("BEGIN IMMEDIATE")
                now = self._clock()
                for table in ("session", "marker", "token"):
                    self._writer.execute(f"DELETE FROM {table} WHERE expires <= ?", (now,))
                self._writer.execute("DELETE FROM pending WHERE time <= ?", (now - TTL_MS,))
                outcomes = [[one() if is_alone else self._in_savepoint(one) for one in changes] for _, changes in batch]
        except Unavailable as fault:
            self.writes.note(fault.refusal)
            raise
        if self._writer.total_changes > before:
            self.writes.note()
        return outcomes

    def _in_savepoint(self, change: Callable[[], Any]) -> Any:
        """The result of a change; or its exception, after what it wrote was rolled back."""
        self._writer.execute("SAVEPOINT change")
        try:
            with self._errors():
                result = change()
        except Exception as error:
            if not self._writer.in_transaction:  # SQLite has rolled back the transaction, as on a full disk
                raise
            self._writer.execute("ROLLBACK TO change")
            result = error
        self._writer.execute("RELEASE change")
        return result

    def ping(self) -> None:
        if self._damaged:
            raise Unavailable(f"The store {self.place} is damaged: stop the service, and move the file away.", 60)
        super().ping()

    def try_write(self) -> None:
        row = "INSERT OR REPLACE INTO session (timestamp, document, saved, expires) VALUES (-1, zeroblob(900000), 0, 0)"
        self._write(lambda: self._writer.execute(row))
        self._write(lambda: None)  # any commit deletes the row, which has expired

    def close(self) -> None:
        self._closed = True
        self._close_readers()
        self._writes.close(2 * self.WAIT)
        self._writer.close()

    def _close_readers(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._readers.get_nowait().close()

    def read_sessions(self, timestamps: Sequence[int]) -> Iterator[StoredSession | ApiError | None]:
        query = "SELECT timestamp, document, saved, announced FROM session WHERE timestamp = ? AND expires > ?"
        for timestamp in timestamps:
            rows = self._read(query, timestamp, self._clock())
            yield StoredSession(*rows[0]) if rows else None

    def sessions(self) -> Iterator[StoredSession]:
        rows = self._read("SELECT timestamp FROM session ORDER BY timestamp DESC")
        return filter(None, (self.session(timestamp) for (timestamp,) in rows))

    def newest_sessions(self, count: int) -> list[tuple[int, Any]]:
        query = "SELECT timestamp, saved, announced FROM session WHERE expires > ? ORDER BY timestamp DESC LIMIT ?"
        return [(row[0], row[1:]) for row in self._read(query, self._clock(), count)]

    _SAVE = (
        "INSERT INTO session (timestamp, document, saved, expires) VALUES (?, ?, ?, ?) ON CONFLICT (timestamp) DO"
        " UPDATE SET document = excluded.document, saved = excluded.saved, expires = excluded.expires WHERE ?"
    )

    def save(self, timestamp: int, change: Change, *, replace: bool = True) -> bool:
        def save() -> bool:
            now, before = self._clock(), "SELECT saved FROM session WHERE timestamp = ?"
            (saved,) = self._writer.execute(before, (timestamp,)).fetchone() or (0,)
            warn_of_clock(saved, now, self.place)
            row = (timestamp, change.storyswarm, next_time(saved, now), now + TTL_MS, replace)
            is_saved = self._writer.execute(self._SAVE, row).rowcount > 0
            if is_saved and change.draft:
                self._announce(change.draft)
            return is_saved

        return self._write(save)

    def remove_session(self, timestamp: int) -> bool:
        remove = "DELETE FROM session WHERE timestamp = ?"
        return self._write(lambda: self._writer.execute(remove, (timestamp,)).rowcount > 0)

    def announce(self, draft: Draft) -> bool:
        return self._write(lambda: self._announce(draft))

    def _announce(self, draft: Draft) -> bool:
        note = "UPDATE session SET announced = ? WHERE timestamp = ? AND announced IS NOT ?"
        if is_new := self._writer.execute(note, (draft.type, draft.session, draft.type)).rowcount > 0:
            self._add(draft)
        return is_new

    def add(self, drafts: Sequence[Draft]) -> list[tuple[bytes, int, bool] | ApiError]:
        return self._write_each([functools.partial(self._add, draft) for draft in drafts])

    def _add(self, draft: Draft) -> tuple[bytes, int, bool]:
        made = f"{draft.type}:{draft.session}"
        if row := self._writer.execute("SELECT member, time FROM pending WHERE made = ?", (made,)).fetchone():
            return *row, False
        (newest,) = self._writer.execute("SELECT time FROM newest").fetchone()
        warn_of_clock(newest, self._clock(), self.place)
        at = next_time(newest, self._clock())
        self._writer.execute("UPDATE newest SET time = ?", (at,))
        member = draft.member(at)
        self._writer.execute("INSERT INTO pending (member, time, made) VALUES (?, ?, ?)", (member, at, made))
        return member, at, True

    _PENDING = "SELECT member, time FROM pending WHERE (time, member) > (?, ?) ORDER BY time, member LIMIT ?"

    def pending(self, page: int) -> Iterator[tuple[bytes, float]]:
        last: tuple[int, bytes] = (self._clock() - TTL_MS, b"\xff")
        while rows := self._read(self._PENDING, *last, page):
            yield from rows
            last = rows[-1][::-1]

    def pending_since(self, time: float) -> tuple[int, list[tuple[bytes, float]]]:
        oldest = self._clock() - TTL_MS
        ((count,),) = self._read("SELECT count(*) FROM pending WHERE time > ?", oldest)
        return count, self._read(self._PENDING, max(time, oldest), b"\xff", 1000)

    def snapshot(self, count: int, ids: Sequence[str]) -> tuple[list[bytes], bool]:
        rows = self._read(self._PENDING, self._clock() - TTL_MS, b"\xff", count)
        return [member for member, _ in rows], False

    def remove_pending(self, members: Sequence[bytes]) -> bool:
        return self._write(lambda: self._remove(members) > 0)

    def _remove(self, members: Sequence[bytes]) -> int:
        return self._writer.executemany("DELETE FROM pending WHERE member = ?", [(one,) for one in members]).rowcount

    def acknowledge(self, ids: Mapping[str, Sequence[bytes]]) -> list[bool | ApiError]:
        return self._write_each([functools.partial(self._acknowledge, *one) for one in ids.items()])

    def _acknowledge(self, id: str, members: Sequence[bytes]) -> bool:
        remove, (time_ms, own) = "DELETE FROM pending WHERE time = ? AND substr(member, 1, ?) = ?", own_member(id)
        if not self._writer.execute(remove, (time_ms, len(own), own)).rowcount + self._remove(members):
            return bool(self._writer.execute("SELECT 1 FROM marker WHERE id = ?", (id,)).fetchone())
        self._writer.execute("INSERT OR REPLACE INTO marker VALUES (?, ?)", (id, self._clock() + TTL_MS))
        return True

    def keep_token(self, digest: str, record: bytes, ttl: int, *, renews: bool = False) -> bool:
        row = (record, self._clock() + ttl, digest)
        keep = "REPLACE INTO token (record, expires, digest) VALUES (?, ?, ?)"
        if renews:
            keep = "UPDATE token SET record = ?, expires = ? WHERE digest = ?"
        return self._write(lambda: self._writer.execute(keep, row).rowcount > 0)

    def token(self, digest: str) -> bytes | None:
        rows = self._read("SELECT record FROM token WHERE digest = ? AND expires > ?", digest, self._clock())
        return rows[0][0] if rows else None

    def tokens(self) -> list[tuple[str, bytes]]:
        return self._read("SELECT digest, record FROM token WHERE expires > ?", self._clock())

    def revoke_token(self, digest: str) -> bool:
        return self._write(lambda: self._writer.execute("DELETE FROM token WHERE digest = ?", (digest,)).rowcount > 0)

    def rows(self, table: str) -> Iterator[sqlite3.Row]:
        """All rows of a table that have not expired, for a copy of the store; sessions with the newest last."""
        end = f"time + {TTL_MS}" if table == "pending" else "expires"
        query = f"SELECT *, {end} AS end FROM {table} WHERE {end} > ? ORDER BY rowid"
        with self._errors(), contextlib.closing(self._connect()) as database:
            database.row_factory = sqlite3.Row
            yield from database.execute(query, (self._clock(),))

    def swap_reservation(self, host: str, before: bytes | None, after: bytes | None) -> bytes | None:
        record = "SELECT record FROM reservation WHERE host = ?"
        swap = f"REPLACE INTO reservation SELECT ?, ? WHERE ? IS ({record})"
        if after is not None:
            self._write(lambda: self._writer.execute(swap, (host, after, before, host)))
        return next((row[0] for row in self._read(record, host)), None)


def open_store(settings: Settings, lock_timeout: float | None = None) -> Store:
    """The store that the settings name. Does not connect to Redis yet. Raises StartError as SqliteStore does."""
    if settings.redis_address:
        return (BridgedStore if settings.bridge else RedisStore)(settings.redis_address)
    return SqliteStore(settings.data_dir / STORE_FILES[0], lock_timeout=lock_timeout)


# ======================================================================================================
# Sessions
# ======================================================================================================

PREVIEW_LENGTH = 500  # characters of scriptText in a list: with whole sessions it would have hundreds of MB

_TYPE_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number",
               float: "a number", type(None): "null"}  # fmt: skip
# A shape is a type, {key: shape}, [shape of each element], or a tuple of alternatives. Any key may be missing or null.
_PROMPT = (str, {"prompt": str})  # StorySwarm writes a plain string, StoryArt an object
_BEAT = {"prompts": {"cinematic": _PROMPT, "vertical": _PROMPT}, "imageDecision": {"type": str}}
_PROGRESS_SHAPE = {"analyzedEpisode": {"scenes": [{"beats": [_BEAT]}]}}
_SUMMARY_SHAPE: dict[str, Any] = {"analyzedEpisode": {"scenes": [{"beats": [{}]}]}}


def _check_shape(value: Any, shape: Any, place: str = "") -> None:
    """Raise ValueError, with its place, for the first value that does not fit."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    types = [one if isinstance(one, type) else type(one) for one in shapes]
    if type(value) not in types:
        expected = " or ".join(_TYPE_NAMES[one] for one in types)
        raise ValueError(f"{place or 'it'} is {_TYPE_NAMES[type(value)]}, not {expected}")
    fitting = shapes[types.index(type(value))]
    if isinstance(fitting, dict):
        for key, inner in fitting.items():
            if value.get(key) is not None:
                _check_shape(value[key], inner, f"{place}.{key}" if place else key)
    elif isinstance(fitting, list):
        for number, element in enumerate(value):
            _check_shape(element, fitting[0], f"{place}[{number}]")


def read_session(document: bytes | None, shape: Any = _PROGRESS_SHAPE) -> dict[str, Any]:
    """Parse a session's document. Raises ValueError with what is wrong with it."""
    if document is None:
        raise ValueError("its key is not a string")
    value: dict[str, Any] = parse_json(document)
    _check_shape(value, shape)
    return value


def prompt_text(prompt: Any) -> str:
    """The text of a prompt in either dialect; "" if the prompt is missing or blank."""
    text = prompt if isinstance(prompt, str) else (prompt or {}).get("prompt") or ""
    return text if text.strip() else ""


@dataclass(frozen=True)
class Progress:
    """How many beats and prompts a session has."""

    total_beats: int
    total_prompts: int
    ready: bool
    needed: int = dataclasses.field(default=0, compare=False)  # prompts that it has once it is ready


def progress(document: dict[str, Any]) -> Progress:
    """Count beats and prompts. Ready: there are beats, and each that needs a prompt has one. Raises ValueError."""
    _check_shape(document, _PROGRESS_SHAPE)
    scenes = (document.get("analyzedEpisode") or {}).get("scenes")
    if scenes is None:
        raise ValueError("it has no analyzedEpisode.scenes")
    beats = [beat for scene in scenes for beat in scene.get("beats") or ()]
    prompts = waiting = 0
    for beat in beats:
        if prompt_text((beat.get("prompts") or {}).get("cinematic")):  # the vertical one is optional
            prompts += 1
        # A beat without a new image needs no prompt, so a finished session may have fewer prompts than beats.
        elif (beat.get("imageDecision") or {}).get("type") not in ("REUSE_IMAGE", "NO_IMAGE"):
            waiting += 1
    return Progress(len(beats), prompts, bool(beats) and not waiting, prompts + waiting)


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a session's list entry, except its timestamp. Raises ValueError."""
    _check_shape(document, _SUMMARY_SHAPE)
    episode = document.get("analyzedEpisode") or {}

    def heading(part: dict[str, Any], number: str) -> dict[str, Any]:
        return {number: from_digits(part.get(number)), "title": to_text(part.get("title"))}

    found = episode.get("scenes") or ()
    scenes = [{**heading(scene, "sceneNumber"), "totalBeats": len(scene.get("beats") or ())} for scene in found]
    shown = {**heading(episode, "episodeNumber"), "scenes": scenes}
    texts = {name: to_text(document.get(name)) for name in ("storyUuid", "promptMode", "scriptText")}
    return {**texts, "scriptText": texts["scriptText"][:PREVIEW_LENGTH], "analyzedEpisode": shown}


def to_text(value: Any) -> str:
    """A value as a string, "" for None: StoryArt's page crashes on anything else."""
    return value if isinstance(value, str) else "" if value is None else to_json(value).decode()


def _story_fields(uuid: object, episode: object) -> dict[str, Any]:
    return {"storyUuid": uuid if isinstance(uuid, str) else "", "episodeNumber": read_count(episode) or 0}


def due_notification(timestamp: int, document: dict[str, Any]) -> Draft | None:
    """The notification that a session calls for; None unless it waits for StorySwarm and has beats."""
    try:
        counts = progress(document)
    except ValueError:  # perhaps it has only a script so far; prompts-status says what is wrong
        return None
    if document.get("promptMode") != "storyswarm" or not counts.total_beats:
        return None
    kind = "prompts_ready" if counts.ready else "beats_ready"
    story = _story_fields(document.get("storyUuid"), document["analyzedEpisode"].get("episodeNumber"))
    return Draft(kind, timestamp, {**story, "totalPrompts": counts.total_prompts, "totalBeats": counts.total_beats})


@dataclass(frozen=True)
class Facts:
    """What responses need from a document. A part that is a string says what is wrong with it in the document."""

    fault: str | None  # why the document is not a session: both parts say so, too
    progress: Progress | str
    summary: Mapping[str, Any] | str
    updated: int | None = None  # ms; the later of its lastUpdated and updatedAt
    waits: bool = False  # for StorySwarm
    timestamp: int | None = None  # the document's own


def find_facts(stored: StoredSession) -> Facts:
    """Parse a session's document."""

    def attempt(function: Callable[..., T], *arguments: Any) -> T | str:
        try:
            return function(*arguments)
        except ValueError as fault:
            return str(fault)  # the exception itself would keep the document in memory

    document = attempt(read_session, stored.document, {})
    if isinstance(document, str):
        return Facts(document, document, document)
    times = [read_time(document.get(name)) for name in ("lastUpdated", "updatedAt")]
    return Facts(
        fault=None,
        progress=attempt(progress, document),
        summary=attempt(summary, document),
        updated=max((time for time in times if time is not None), default=None),
        waits=document.get("promptMode") == "storyswarm",
        timestamp=read_count(document.get("timestamp"), is_time=True),  # never in seconds: it names the session
    )


class Sessions:
    """The sessions of a store. Parsing a document of 850 KB takes 6 ms and its SHA-256 takes 0.5 ms, so the facts are
    cached by that digest. Each call gets the document as the store has it now, so no entry becomes stale."""

    CACHE_SIZE, MAX_SUMMARY = 1000, 8192  # entries, and bytes of each: 8 MB of JSON at most. Real ones have 1 to 2 KB

    def __init__(self, store: Store) -> None:
        self._store = store
        self._facts: dict[str, Facts] = {}  # by the fingerprint of the document
        self._report = functools.lru_cache(1000)(functools.partial(log.warning, "sessions: %s is left out: %s"))  # once
        self._parse_lock = threading.Lock()

    def cached(self, stored: StoredSession) -> Facts | None:
        return self._facts.get(stored.fingerprint)

    def facts_of(self, stored: StoredSession) -> Facts:
        """From the cache, or parsed. Documents are parsed one at a time, so equal ones are parsed once."""
        facts = self.cached(stored)
        if facts is None:
            with self._parse_lock:
                facts = self.cached(stored) or find_facts(stored)
                if len(json.dumps(facts.summary)) <= self.MAX_SUMMARY:
                    self._facts[stored.fingerprint] = facts
                    bound(self._facts, self.CACHE_SIZE)
        return facts

    def listed(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Timestamps and summaries, newest first. A session without a summary is left out and logged once."""
        for stored in self._store.sessions():
            shown = self.facts_of(stored).summary
            if isinstance(shown, str):
                self._report(f"session {stored.timestamp}", shown)
            else:
                yield stored.timestamp, shown

    def latest(self) -> StoredSession | None:
        """The newest session that can be read, even if only session:latest contains it; None if there is none."""
        newest = None
        for stored in self._store.sessions():
            if (fault := self.facts_of(stored).fault) is None:
                newest = stored
                break
            self._report(f"session {stored.timestamp}", fault)
        if (copy := self._store.newest_copy()) is not None:
            facts = self.facts_of(StoredSession(0, copy))
            if facts.timestamp is None:
                self._report("session:latest", facts.fault or "it has no timestamp")
            elif newest is None or facts.timestamp > newest.timestamp:
                return StoredSession(facts.timestamp, copy)
        return newest


# ======================================================================================================
# Bridge
# ======================================================================================================

# StoryArt's own server uses only `storyart:session:{ts}`, and StorySwarm only `session:{ts}`. The bridge keeps the two
# copies in step and writes each in its reader's dialect: StoryArt fails on a prompt that is a plain string.
_PROMPT_KINDS = ("cinematic", "vertical")
_TEXT_FIELDS = ("scriptText", "episodeContext", "storyUuid")  # StoryArt's page crashes if one is not a string


def _beats_by_scene(document: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    scenes = (document.get("analyzedEpisode") or {}).get("scenes") or ()
    return [scene.get("beats") or [] for scene in scenes]


def pair_beats(document: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each beat of a document with its counterpart in `other`, if there is one: the beat with the same `beatId`, if
    that is unique in both; otherwise the beat at the same position, if the two ids are equal or both missing, and the
    documents have the same number of beats in each scene. A prompt must not go to a wrong beat."""
    layouts = [_beats_by_scene(document), _beats_by_scene(other)]
    beats, others = ([beat for scene in layout for beat in scene] for layout in layouts)
    ids, other_ids = ([to_json(beat.get("beatId")) for beat in side] for side in (beats, others))
    counts, other_counts = collections.Counter(ids), collections.Counter(other_ids)
    by_id = dict(zip(other_ids, others))
    has_same_layout = [len(scene) for scene in layouts[0]] == [len(scene) for scene in layouts[1]]
    for position, (beat, id) in enumerate(zip(beats, ids)):
        if id != b"null" and counts[id] == other_counts[id] == 1:
            yield beat, by_id[id]
        elif has_same_layout and id == other_ids[position]:
            yield beat, others[position]


def to_storyart(document: dict[str, Any], timestamp: int, own: Callable[[], Mapping[str, Any] | None]) -> bool:
    """Convert a document to StoryArt's dialect in place; False if it did not change. A prompt that is a string becomes
    an object, with the model, size and steps of that prompt in the document that own() returns, StoryArt's copy."""
    before = {name: document.get(name) for name in ("timestamp", *_TEXT_FIELDS)}
    if not is_whole(before["timestamp"]) or before["timestamp"] != timestamp:
        document["timestamp"] = timestamp
    for name in _TEXT_FIELDS:
        document[name] = to_text(document.get(name))
    changed = any(document[name] is not value for name, value in before.items())
    beats = [beat for scene in _beats_by_scene(document) for beat in scene if "prompts" in beat]
    has_strings = any(isinstance((beat["prompts"] or {}).get(kind), str) for beat in beats for kind in _PROMPT_KINDS)
    copy = own() if has_strings else None
    own_prompts = {id(beat): other.get("prompts") or {} for beat, other in pair_beats(document, copy)} if copy else {}
    for beat in beats:
        prompts = dict(beat["prompts"] or {})
        for kind in _PROMPT_KINDS:
            if prompt_text(prompts.get(kind)):
                prompts[kind] = _as_object(prompts[kind], own_prompts.get(id(beat), {}).get(kind))
            else:
                prompts.pop(kind, None)
        changed |= prompts != beat["prompts"] or not prompts
        beat["prompts"] = prompts
        if not prompts:
            del beat["prompts"]
    return changed


def _as_object(prompt: Any, own: Any) -> Any:
    """A prompt that is a string as an object, with the other fields of StoryArt's `own` one; any other as it is."""
    return {**(own if isinstance(own, dict) else {}), "prompt": prompt} if isinstance(prompt, str) else prompt


def _merge_into(document: dict[str, Any], other: Mapping[str, Any], *, wins: bool, fields: bool) -> None:
    """Add the prompts of `other` that a document lacks, or all of them if `other` wins; with `fields` also the other
    fields that it lacks, and the times of its last update."""
    for beat, other_beat in pair_beats(document, other):
        prompts = dict(beat.get("prompts") or {})
        for kind in _PROMPT_KINDS:
            prompt = (other_beat.get("prompts") or {}).get(kind)
            if prompt_text(prompt) and (wins or not prompt_text(prompts.get(kind))):
                prompts[kind] = _as_object(prompt, prompts.get(kind))
        if prompts != (beat.get("prompts") or {}):
            beat["prompts"] = prompts
        if fields:
            _add_missing(beat, other_beat)
    if fields:
        _add_missing(document, other)
        document.update({name: other[name] for name in ("lastUpdated", "updatedAt") if name in other})


def _add_missing(document: dict[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in other.items():
        if document.get(name) is None or (document[name] == "" and name in _TEXT_FIELDS):
            document[name] = value


def decide(copies: Copies) -> Change | None:
    """The change that brings the copies in step; None if they are. StorySwarm may have read a session before the user
    edited it in StoryArt: once StoryArt has written it, the text, beats and order of StoryArt's copy stay. They also
    stay if StorySwarm has written two copies. Raises ValueError if a copy is not a session, but an unreadable one of
    StorySwarm's is replaced by a `latest`."""
    if copies.latest is None:
        return _decide(copies)
    try:
        first, has_two = _decide(copies), copies.is_changed(0)
    except (ValueError, RecursionError):
        first, has_two = None, False
    first = first or Change(by_storyart=copies.by_storyart)
    swarm, art = first.storyswarm or copies.storyswarm, first.storyart or copies.storyart
    synced = fingerprint_of(swarm), "" if copies.is_changed(1) else fingerprint_of(art)  # "": StoryArt's prompts win
    swarm, second = (swarm, copies.latest) if has_two else (copies.latest, None)
    last = _decide(Copies(copies.timestamp, swarm, art, synced, first.by_storyart), second) or first
    swarm, art = last.storyswarm or swarm, last.storyart or art
    is_new = swarm != copies.storyswarm, art != copies.storyart
    return Change(swarm if is_new[0] else None, art if is_new[1] else None, last.by_storyart, last.draft)


def _decide(copies: Copies, latest: bytes | None = None) -> Change | None:
    """decide() without `copies.latest`. `latest` is one that is to be merged into StorySwarm's copy."""
    timestamp, swarm, art = copies.timestamp, copies.storyswarm, copies.storyart
    swarm_changed, art_changed = copies.is_changed(0) or latest not in (None, swarm), copies.is_changed(1)
    by_storyart = copies.by_storyart or art_changed
    if not swarm_changed and not art_changed:  # a copy that is gone stays so until the other one is written
        return None if copies.current == copies.synced or not any(copies.synced) else Change(by_storyart=by_storyart)
    theirs, own = (None if document is None else read_session(document) for document in (latest or swarm, art))
    carries_over = own is None or (theirs is not None and swarm_changed and not by_storyart and not latest)
    outcome, base = cast(tuple[dict[str, Any], bytes], (theirs, latest or swarm) if carries_over else (own, art))
    before = to_json(outcome)
    if theirs is not None and not carries_over:
        _merge_into(outcome, theirs, wins=swarm_changed and not art_changed, fields=swarm_changed)
    to_storyart(outcome, timestamp, lambda: own)
    text = to_json(outcome)
    if text == before:
        text = base  # byte for byte as it was written
    swarm_text = None if carries_over else text if swarm is None else _to_storyswarm(text, swarm, timestamp)
    if swarm_text and latest:
        swarm_text = _to_storyswarm(swarm_text, latest, timestamp) or latest
    return Change(swarm_text, None if text == art else text, by_storyart, due_notification(timestamp, outcome))


def _to_storyswarm(text: bytes, swarm: bytes, timestamp: int) -> bytes | None:
    """A document for StorySwarm, whose prompts are strings where its own copy's are; None if that says the same."""
    document, theirs, has_strings = read_session(text), read_session(swarm), False
    for beat, other in pair_beats(document, theirs):
        for kind, prompt in (beat.get("prompts") or {}).items():
            if isinstance((other.get("prompts") or {}).get(kind), str) and kind in _PROMPT_KINDS:
                beat["prompts"][kind], has_strings = prompt_text(prompt), True
    written = to_json(document) if has_strings else text
    for one in (document, theirs):  # they are compared in the same dialect
        to_storyart(one, timestamp, lambda: None)
    return None if json.dumps(document, sort_keys=True) == json.dumps(theirs, sort_keys=True) else written


class _LastRead(NamedTuple):
    """The bridge's last read of both copies of a session."""

    sizes: list[int]  # their lengths just before, from the store's look(); [] to read them at the next look, too
    due: float  # monotonic seconds, when they are read again
    waits: bool  # for prompts


class Bridge:
    """Keeps the copies in step: a session that a request asks for in sync(), and all others in a thread. A lease lets
    the thread of only one service on a Redis work."""

    INTERVAL, LEASE = 2.0, 6000  # seconds between two looks; the lease's TTL in ms
    NEWEST = 100  # sessions of each index that are looked at, and as many older ones that wait for prompts
    # Seconds until a copy of unchanged length is read again, since its contents may differ: 7, or 44 to 55.
    RECHECK_WAITING, RECHECK, SPREAD = 7.0, 44.0, 12
    LARGE = 5_000_000  # bytes; a larger copy of unchanged length is read again only for a request

    def __init__(self, store: BridgedStore, sessions: Sessions) -> None:
        self._store, self._sessions = store, sessions
        self._owner = secrets.token_hex(8)
        self._last_reads: dict[int, _LastRead] = {}
        self._latest = (-1, 0.0)  # the length of session:latest, and when it is read again
        self._report = functools.lru_cache(1000)(functools.partial(log.warning, "bridge: %s: %s"))  # each once
        self._loop = Loop(self._turn, "bridge", on_close=self._release_lease)
        self.start, self.close = self._loop.start, functools.partial(self._loop.close, 2.0)

    def sync(self, stored: StoredSession, *, whole: bool = False) -> StoredSession | None:
        """The session with its copies in step, None if it is gone; unchanged if Redis refuses writes. `whole`:
        notice even a large copy that was replaced by one of the same length."""
        if stored.is_in_step and not (whole and (stored.storyart_size or 0) > self.LARGE):
            return stored
        try:
            self._sync(stored.timestamp)
            return self._store.session(stored.timestamp)
        except Unavailable as fault:
            self._report(f"session {stored.timestamp} is not in step", str(fault))
            return stored

    def sync_latest(self, *, whole: bool = True) -> int:
        """Apply a changed session:latest to the session that its timestamp names. Returns that timestamp; 0 if there is
        nothing to apply, or if Redis refuses writes."""
        try:
            copy = self._store.newest_copy(whole=whole)
            self._store.unreadable_latest = 0
            if copy is None:
                return 0
            facts = self._sessions.facts_of(StoredSession(0, copy))
            if facts.timestamp is None:
                self._store.unreadable_latest, fault = len(copy), facts.fault or "it has no timestamp"
                self._report("session:latest is left as it is, because it is not a session", fault)
                return 0
            if not self._sync(facts.timestamp, copy):
                self._store.unreadable_latest = len(copy)
            return facts.timestamp
        except Unavailable as fault:
            self._report("session:latest is not in step", str(fault))
            return 0

    def _sync(self, timestamp: int, latest: bytes | None = None) -> Copies | None:
        try:
            return self._store.sync(timestamp, decide, latest)
        except (ValueError, RecursionError) as fault:  # json reads deeper nesting than it can write
            self._report(f"session {timestamp} is left as it is, because a copy is not a session", str(fault))
            return None

    def _turn(self) -> float:
        try:
            return self.INTERVAL if self._look() else 0.0
        except ApiError as error:
            if error.refusal and not self._store.writes.refusal:  # the store logs a refusal of writes itself
                self._report("sessions are not kept in step", str(error))
            return self.INTERVAL

    def _release_lease(self) -> None:
        with contextlib.suppress(ApiError):
            self._store.look(self._owner, 1, 1, ())  # its TTL becomes 1 ms

    def _look(self) -> bool:
        """Bring in step what has changed. False if it stopped halfway, to extend the lease before it goes on."""
        began, reads = time.monotonic(), self._last_reads
        waiting = sorted(timestamp for timestamp, read in reads.items() if read.waits)[-2 * self.NEWEST :]
        lengths = self._store.look(self._owner, self.LEASE, self.NEWEST, waiting)
        if not lengths:
            return True
        latest_size, is_met, *parts = lengths
        newest = 0
        if latest_size != self._latest[0] or time.monotonic() >= self._latest[1]:
            newest = self.sync_latest()
            self._latest = (latest_size, time.monotonic() + self.RECHECK_WAITING)
        rows = sorted(zip(parts[::3], parts[1::3], parts[2::3]), key=lambda row: any(row[1:]))  # gone ones first
        sessions = {timestamp: sizes for timestamp, *sizes in rows}
        self._last_reads = {timestamp: read for timestamp, read in reads.items() if any(sessions.get(timestamp, ()))}
        for timestamp, sizes in sessions.items():
            last = self._last_reads.get(timestamp)
            if sizes == [0, 0]:
                self._store.trim(timestamp)
            elif last is None or last.sizes != sizes or time.monotonic() >= last.due:
                self._read(timestamp, sizes)
                if self._loop.is_closing or time.monotonic() - began > self.INTERVAL:
                    return False
        if not is_met:
            self._store.note_met()
        newest = max([newest, *(timestamp for timestamp, sizes in sessions.items() if any(sizes))])
        if latest_size < 0:
            self._report("session:latest is left as it is, because it is not a session", "its key is not a string")
        else:
            self._store.renew_latest(newest)
        return True

    def _read(self, timestamp: int, sizes: list[int]) -> None:
        try:
            copies, waits = self._sync(timestamp), False
        except Unavailable as fault:  # the next look retries
            self._report("a session is not in step", str(fault))
            return
        if copies:
            facts = self._sessions.facts_of(StoredSession(timestamp, copies.storyswarm or copies.storyart))
            waits = facts.waits and not (isinstance(facts.progress, Progress) and facts.progress.ready)
        seconds = self.RECHECK_WAITING if waits else self.RECHECK + timestamp % self.SPREAD
        due = math.inf if max(sizes) > self.LARGE else time.monotonic() + seconds
        was_written = copies and copies.current != copies.synced  # perhaps just now: then `sizes` are outdated
        self._last_reads[timestamp] = _LastRead([] if was_written else sizes, due, waits)


# ======================================================================================================
# Notifications
# ======================================================================================================

# The total that a notification of each type must have, and that a check shows.
TOTALS = {"prompts_ready": "totalPrompts", "beats_ready": "totalBeats"}
ID_PATTERN = r"[^\x00-\x1f\x7f-\x9f/\\]{1,200}"  # of any program's id: StoryArt puts it into a path unescaped
# Ids that such a path changes: browsers (WHATWG URL) end the path at # and ?, resolve . and .., and send U+FFFD for
# half a surrogate pair; this service decodes %41.
_CHANGED_IN_PATH = re.compile(r"[#?\ud800-\udfff]|%[0-9A-Fa-f]{2}|^\.\.?$")
_IDS = re.compile(rb'"id"\s*:\s*"([^"\\]*)"')


class Notification(NamedTuple):
    """A valid member of the pending set."""

    id: str
    type: str
    text: bytes  # the JSON that clients get, serialized once: a response with 100 is a join
    is_shown: bool  # False if it calls itself acknowledged, or if a page could not acknowledge it
    fault: str = ""  # what is wrong with it though it is valid
    session: int = 0
    episode: int = 0
    since: int = 0  # ms; only in PendingChanges, which drops the text


def read_member(member: bytes, time: float | None) -> Notification:
    """Parse a member of the pending set, which any program may have written; `time` is its score in ms. Raises
    ValueError with what makes it invalid, and LookupError if it has no time of its own and `time` is None."""
    value = parse_json(member)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    kind, id, timestamp, episode = (value.get(name) for name in ("type", "id", "timestamp", "episodeNumber"))
    if not isinstance(id, str) or not re.fullmatch(ID_PATTERN, id):
        raise ValueError(f"its id {id!r:.250} cannot be in a path")
    if not isinstance(kind, str) or kind not in TOTALS:
        raise ValueError("its type is unknown")
    session, total = read_count(value.get("sessionTimestamp"), is_time=True), read_count(value.get(TOTALS[kind]))
    if session is None or total is None:
        raise ValueError(f"{'sessionTimestamp' if session is None else TOTALS[kind]} is not a whole number")
    if (ms := read_time(timestamp)) is None:
        if time is None:
            raise LookupError
        ms = int(time)
    shown = {
        "id": id,
        "type": kind,
        "sessionTimestamp": session,
        **_story_fields(value.get("storyUuid"), episode),
        TOTALS[kind]: total,
        "timestamp": iso_time(ms),  # always with a zone: JavaScript takes a time without one for local time
    }
    fault = "its episodeNumber is not a whole number" if episode is not None and read_count(episode) is None else ""
    if is_changed := _CHANGED_IN_PATH.search(id):
        fault = f"its id {id!r:.250} does not stay the same in an unescaped path"
    is_shown = value.get("acknowledged") is not True and not is_changed
    return Notification(id, kind, to_json(shown), is_shown, fault, session, shown["episodeNumber"])


def newest_of_each(notifications: Iterable[Notification]) -> list[bytes]:
    """The text of the newest notification of each type and session, with the ids of all of them; oldest first."""
    groups: dict[tuple[str, int], list[Notification]] = {}
    for notification in notifications:
        group = groups.pop((notification.type, notification.session), [])
        group.append(notification)
        groups[notification.type, notification.session] = group  # at the end: groups are in the order of their newest
    counted = ((group[-1].text, {"count": len(group), "ids": [one.id for one in group]}) for group in groups.values())
    return [b"%b,%b" % (text[:-1], to_json(count_and_ids)[1:]) for text, count_and_ids in counted]


class Notifications:
    """The pending notifications of a store."""

    SMALLEST_SNAPSHOT, LARGEST_SNAPSHOT = 100, 1000  # members: a check's default limit, and the largest
    CACHE_SIZE, MAX_SIZE = 2000, 2048  # members, and bytes of each: 4 MB at most, and as much again of JSON
    MAX_REPORTED = 1000  # invalid members that are logged

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reported: set[bytes] = set()  # by SHA-256
        self._cached = functools.lru_cache(maxsize=self.CACHE_SIZE)(self._parse)
        # The last snapshot, as the next one is usually the same: members, what they are parsed to, their ids.
        self._last: tuple[list[bytes], list[Notification], list[str]] = [], [], []

    def check(self, types: Sequence[str], limit: int) -> list[Notification]:
        """The pending notifications of these types that are not acknowledged, oldest first, `limit` at most."""
        # Members of other types are not parsed. A backslash may belong to a type that is written with escapes.
        wanted = re.compile("|".join(["\\\\", *types]).encode())
        other = re.compile("|".join(TOTALS.keys() - set(types)).encode() or b"(?!)")
        rows = (row for row in self._store.pending(page=1000) if wanted.search(row[0]) or not other.search(row[0]))
        matching = (one for one in self._read(rows) if one.type in types)
        found: list[Notification] = []
        while len(found) < limit and (batch := list(itertools.islice(matching, min(limit, 1000)))):
            marked = self._store.acknowledged([one.id for one in batch])
            found += [one for one in batch if one.id not in marked]
        return found[:limit]

    def check_many(self, queries: Sequence[tuple[Sequence[str], int]]) -> list[list[Notification] | None]:
        """check() for several (types, limit), all from one snapshot. None for a query that needs more than that."""
        count = max(self.SMALLEST_SNAPSHOT, *(min(limit, self.LARGEST_SNAPSHOT) for _, limit in queries))
        last, found, ids = self._last
        pending, is_marked = self._store.snapshot(count, ids)
        if pending != last or is_marked:
            try:
                found = list(self._read((member, None) for member in pending))
                ids = [one.id for one in found]
                self._last = (pending, found, ids) if sum(map(len, pending)) <= self.MAX_SIZE * count else ([], [], [])
            except LookupError:  # a member has no time of its own, and a snapshot no scores
                found = list(self._read(itertools.islice(self._store.pending(count), count)))
            marked = self._store.acknowledged([one.id for one in found])
            found = [one for one in found if one.id not in marked]
        answers = [[one for one in found if one.type in types][:limit] for types, limit in queries]
        return [one if len(pending) < count or len(one) == limit else None for one, (_, limit) in zip(answers, queries)]

    def create(self, drafts: Sequence[Draft]) -> list[tuple[Notification, bool] | ApiError]:
        """Add each: (notification, True); or (the pending one of the same type and session, False)."""
        return map_results(lambda made: (read_member(*made[:2]), made[2]), self._store.add(drafts))

    def acknowledge(self, ids: Sequence[str]) -> list[str]:
        """Acknowledge distinct ids, with one search for all. Returns the ids that were pending or acknowledged."""
        done = {id for id, outcome in zip(ids, self.acknowledge_own(ids)) if result_of(outcome)}
        if left := self._find_members(id for id in ids if id not in done):
            done.update(id for id, outcome in zip(left, self._store.acknowledge(left)) if result_of(outcome))
        return [id for id in ids if id in done]

    def acknowledge_own(self, ids: Sequence[str]) -> list[bool | ApiError]:
        """The same without a search: True for an id made here that was pending, or one that is acknowledged already."""
        return self._store.acknowledge(dict.fromkeys(ids, ()))

    def remove(self, id: str) -> bool:
        """Remove a pending notification; acknowledging it later fails. False if it is not pending."""
        found = self._find_members([id])[id]
        return bool(found) and self._store.remove_pending(found)

    def _find_members(self, ids: Iterable[str]) -> dict[str, list[bytes]]:
        """The pending members of each id, found in one pass over the pending set."""
        members: dict[str, list[bytes]] = {id: [] for id in ids}
        for member, at in self._store.pending(page=2000) if members else ():
            # A backslash may belong to an id that is written with escapes.
            if b"\\" in member or any(id.decode("utf-8", "replace") in members for id in _IDS.findall(member)):
                found = self._parse(member, at)
                if found and found.id in members:
                    members[found.id].append(member)
        return members

    def _read(self, rows: Iterable[tuple[bytes, float | None]]) -> Iterator[Notification]:
        return filter(None, itertools.starmap(self.read, rows))

    def read(self, member: bytes, at: float | None) -> Notification | None:
        """Parse a member. None if it is invalid or not to be shown; it stays in the store."""
        found = self._cached(member, at) if len(member) <= self.MAX_SIZE else self._parse(member, at)
        return found if found and found.is_shown else None

    def _parse(self, member: bytes, time: float | None) -> Notification | None:
        """Parse a member, shown or not. None if it is invalid. The fault of a member is logged once."""
        try:
            found = read_member(member, time)
        except (ValueError, OverflowError) as fault:
            self._report(str(fault), member)
            return None
        if found.fault:
            self._report(found.fault, member)
        return found

    def report_expired(self) -> None:
        """Log the members of other programs that are no longer shown because of their age."""
        for member in self._store.expired(self.MAX_REPORTED if len(self._reported) < self.MAX_REPORTED else 0):
            self._report("it is older than 7 days", member)

    def _report(self, fault: str, member: bytes) -> None:
        digest = hashlib.sha256(member).digest()
        if len(self._reported) < self.MAX_REPORTED and digest not in self._reported:
            self._reported.add(digest)
            log.warning("notifications: a pending member, or a part of it, is left out (%s): %.200r", fault, member)


# ======================================================================================================
# Changes
# ======================================================================================================

_OWN_PENDING = re.compile(
    OWN_MEMBER % b"(%b)" % OWN_ID.encode()
    + rb'"type":"(\w+)","sessionTimestamp":(\d+),(?:"storyUuid":"[^"\\]*(?:\\.[^"\\]*)*",)?(?:"episodeNumber":(\d+),)?'
)

Publish = Callable[[str, Any], None]  # takes an event's type and data


class PendingChanges:
    """Tracks the pending notifications, and publishes an event for each that is new and each that has ended. One
    thread calls look(). While `is_initial`, the owner ignores the events: what the first look finds is old."""

    PAGE = 2000  # members per read

    def __init__(
        self, store: Store, notifications: Notifications, publish: Publish, add_own: Callable[[], None] = lambda: None
    ) -> None:
        """`add_own` calls add() and forget() for what was made and acknowledged here since it was called last."""
        self._store, self._notifications, self._publish, self._add_own = store, notifications, publish, add_own
        self.is_initial = True  # the owner resets it after a look, and sets it to start over
        # The key is the id of one made here, else the member's SHA-256. None: it is invalid, or its end was published.
        self._known: dict[str | bytes, Notification | None] = {}
        self._ended: set[str | bytes] = set()  # keys that ended during this look, which may have read them before
        self.unread: dict[int, str] = {}  # by session, the id of the newest prompts_ready made here that is pending
        self._newest, self._duplicates = 0.0, 0  # the latest score read; members whose id another member has as well
        self._scan_at = self._markers_at = -math.inf  # monotonic seconds: when all members, all markers are read again

    def all(self) -> list[Notification]:
        return [known for known in self._known.values() if known]

    def add(self, one: Notification) -> None:
        """Track one that was made here, before a look finds it."""
        if one.id not in self._known:
            self._keep(one.id, one._replace(since=now_ms()))

    def add_newer(self) -> tuple[int, bool]:
        """Track and publish the newest members. How many are pending, and whether no newer ones are left to read."""
        count, newer = self._store.pending_since(self._newest)
        self._add_new(newer)
        return count, len(newer) < 1000

    def look(self) -> Iterator[None]:
        """Compare the store with what is known, in steps, and publish the differences. Raises Unavailable."""
        self._ended.clear()
        count, _ = self.add_newer()
        # Another instance marks what it removes, so most ends are found without a scan of the pending set.
        if (is_gone := count < self._count()) or time.monotonic() >= self._markers_at:
            yield from self._find_marked(is_gone=is_gone)
        if count != self._count() or time.monotonic() >= self._scan_at:
            yield from self._scan()

    def _count(self) -> int:
        return len(self._known) + self._duplicates

    def _add_new(self, rows: Iterable[tuple[bytes, float]]) -> list[str | bytes]:
        """Track and publish the members that are not known yet. Returns the key of each row."""
        keys, fresh, now = list[str | bytes](), dict[str | bytes, Notification | None](), now_ms()
        newest = self._newest
        for member, score in rows:
            at = min(int(min(score, LARGEST)), now)  # another program's score may be infinite or in the future
            newest = max(newest, at)
            own = _OWN_PENDING.match(member)
            keys.append(key := own[1].decode() if own else hashlib.sha256(member).digest())
            if key in self._known:
                continue
            if own and self.is_initial:  # parsing 100,000 would take 2 s
                id, kind = own[1].decode(), sys.intern(own[3].decode())
                fresh[key] = Notification(id, kind, b"", True, session=int(own[4]), episode=int(own[5] or 0), since=at)
            else:
                found = self._notifications.read(member, score)
                fresh[key] = found and found._replace(since=at)
        marked = self._store.acknowledged([found.id for found in fresh.values() if found])
        self._newest = newest  # not before: if the store fails above, add_newer() finds these rows again
        self._add_own()  # first: its events are published even if it is acknowledged by now
        for key, one in fresh.items():
            if key not in self._known and key not in self._ended:
                self._keep(key, None if one and one.id in marked else one)
        return keys

    def _keep(self, key: str | bytes, found: Notification | None) -> None:
        self._known[key] = found and found._replace(text=b"")
        if found:
            if found.type == "prompts_ready" and isinstance(key, str):
                self.unread[found.session] = key
            self._publish("notification", found.text)

    def forget(self, key: str | bytes, *, is_gone: bool = True) -> None:
        """Publish the end of a notification, once. Its key stays known, so it is not new again, unless `is_gone`."""
        if known := self._known.pop(key, None):
            self._ended.add(key)
            if not is_gone:
                self._known[key] = None
            if self.unread.get(known.session) == key:
                del self.unread[known.session]
            self._publish("acknowledged", {"id": known.id, "type": known.type, "sessionTimestamp": known.session})

    def _find_marked(self, *, is_gone: bool) -> Iterator[None]:
        """End the notifications that are marked as acknowledged. Another program may mark one without removing it."""
        began = time.monotonic()
        keys = {known.id: key for key, known in self._known.items() if known}
        ids = iter(keys)
        while part := list(itertools.islice(ids, 1000)):
            marked = self._store.acknowledged(part)
            for id in [one for one in part if one in marked]:
                self.forget(keys[id], is_gone=is_gone)
            yield
        ended = time.monotonic()
        self._markers_at = ended + max(1.0, 5 * (ended - began))

    def _scan(self) -> Iterator[None]:
        """Compare the whole pending set with what is known."""
        began, before, seen, count = time.monotonic(), list(self._known), set[str | bytes](), 0
        rows = self._store.pending(page=self.PAGE)
        while page := list(itertools.islice(rows, self.PAGE)):
            count += len(page)
            seen.update(self._add_new(page))
            yield
        for key in before:
            if key not in seen:
                self.forget(key)
        ended = time.monotonic()
        self._duplicates, self._scan_at = count - len(seen), ended + max(2.0, 10 * (ended - began))


class ChangedSessions:
    """The newest sessions of a store. A look reads only those that were changed since the last one."""

    def __init__(self, store: Store, count: int) -> None:
        self._store, self._count = store, count
        self.versions: dict[int, Any] = {}  # by timestamp, from Store.newest_sessions(); also of unreadable documents

    def look(self, again: Container[int] = ()) -> Iterator[StoredSession]:
        """The changed sessions, and those in `again`. A session counts as read once the caller takes the next one."""
        newest = dict(self._store.newest_sessions(self._count))
        changed = [one for one, version in newest.items() if self.versions.get(one) != version or one in again]
        for timestamp, outcome in zip(changed, self._store.read_sessions(changed)):
            if stored := result_of(outcome):
                yield stored
            self.versions[timestamp] = newest[timestamp]
        self.versions = {one: known for one, known in self.versions.items() if one in newest}  # last: a read may fail


# ======================================================================================================
# GPU
# ======================================================================================================

GPU_QUERY = (
    "--query-gpu=utilization.gpu,memory.used,memory.total,temperature.gpu,count",
    "--format=csv,noheader,nounits",
)
PID_QUERY = ("--query-compute-apps=pid", "--format=csv,noheader")
_NUMBER = re.compile(r"\s*[0-9]{1,12}(\.[0-9]{1,6})?\s*")  # not [N/A], [Not Supported], [GPU is lost] or nothing
_NO_MEMORY = re.compile(r"\s*\[?(N/A|Not Supported)\]?\s*")  # it has none of its own; not: it is lost, or unreadable


@dataclass(frozen=True)
class GpuStatus:
    """In MiB, percent and degrees Celsius. If neither `available` nor `failed`, nvidia-smi works but finds no GPU."""

    available: bool = False
    gpu_count: int = 0
    utilization: int = 0
    memory_used: int = 0
    memory_total: int = 0
    temperature: int = 0
    process_count: int = 0
    error: str | None = None
    failed: bool = False  # nvidia-smi gave no usable output
    remarks: str = ""  # what nvidia-smi printed in addition to GPUs that can be used
    unknown: tuple[str, ...] = ()  # fields that are 0 because no GPU reports them
    is_missing: bool = False  # there is no nvidia-smi


def _failed(error: str, *, is_missing: bool = False) -> GpuStatus:
    return GpuStatus(error=error, failed=True, is_missing=is_missing)


def _on_one_line(*texts: str) -> str:
    return " ".join(" ".join(texts).split())[:300]


def parse_gpus(output: str, errors: str = "", code: int = 0, memory: tuple[int, int] | None = None) -> GpuStatus:
    """Read what GPU_QUERY printed to stdout and stderr, and its exit code. A line is a GPU's if it has five cells and
    the last is a number; a faulty driver or GPU adds sentences to either stream. A GPU without readable total memory is
    not counted. If none has memory of its own (GB10), `memory` counts once: the system's, used and total, in MiB."""
    lines = [line.split(",") for line in output.splitlines()]
    rows = [cells for cells in lines if len(cells) == 5 and _NUMBER.fullmatch(cells[4])]
    own = [cells for cells in rows if _NUMBER.fullmatch(cells[2])]
    gpus = own or [cells for cells in rows if memory and _NO_MEMORY.fullmatch(cells[2]) and _NUMBER.fullmatch(cells[3])]
    if not gpus or has_crashed(code):
        printed = _on_one_line(output, errors)
        if "no devices were found" in (output + errors).lower():
            return GpuStatus(error=printed)
        fault = f"failed (exit code {code})" if code else "names no GPU with readable memory"
        return _failed(f"nvidia-smi {fault}: {printed or 'it printed nothing'}")
    use, used, total, degrees, _ = ([float(cell) for cell in cells if _NUMBER.fullmatch(cell)] for cells in zip(*gpus))
    if memory and not own:
        used, total = [memory[0]], [memory[1]]
    values = {"utilization": use, "memory_used": used, "memory_total": total, "temperature": degrees}
    return GpuStatus(
        available=True,
        gpu_count=len(gpus),
        utilization=int(sum(use) / len(gpus) + 0.5),
        memory_used=int(sum(used) + 0.5),
        memory_total=int(sum(total) + 0.5),
        temperature=int(max(degrees, default=0) + 0.5),
        remarks=_on_one_line(*(",".join(cells) for cells in lines if cells not in rows), errors),
        unknown=tuple(name for name, readable in values.items() if not readable),
    )


def find_nvidia_smi(settings: Settings) -> tuple[str | None, str]:
    """The program to run, or None; and what to do if it is None."""
    if given := settings.nvidia_smi:
        return shutil.which(given), f"NVIDIA_SMI is {given}, which cannot be run: correct that setting, or remove it"
    places = map(shutil.which, map(os.path.expandvars, ["nvidia-smi", *NVIDIA_SMI_PLACES]))
    return next(filter(None, places), None), "install NVIDIA's driver, or set NVIDIA_SMI"


def query_gpus(settings: Settings, running: set[Program]) -> GpuStatus:
    """Run both queries at the same time, as bounded children in `running`. A failure is a status that says so."""
    program, advice = find_nvidia_smi(settings)
    if not program:
        return _failed(f"nvidia-smi not found or GPU not available: {advice}", is_missing=True)
    if any(child.is_alive() for child in running):  # each further one would keep threads and pipes as well
        return _failed("nvidia-smi hangs and cannot be ended: restart this PC")
    running.clear()
    timeout = settings.nvidia_smi_timeout
    try:
        with (
            bounded_child([program, *GPU_QUERY], running) as gpu,
            bounded_child([program, *PID_QUERY], running) as pids,
        ):
            deadline = time.monotonic() + timeout
            status = parse_gpus(*read_output(gpu, deadline), system_memory())
            if status.available:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    listed, _, code = read_output(pids, deadline)
                    if not has_crashed(code):  # a process on two GPUs is listed twice
                        distinct = set(re.findall(r"(?m)^\s*([0-9]+)\s*$", listed))
                        return dataclasses.replace(status, process_count=len(distinct))
            return status
    except subprocess.TimeoutExpired:
        return _failed(f"nvidia-smi did not answer within {timeout:g} s: if it is only slow, raise NVIDIA_SMI_TIMEOUT")
    except (OSError, RuntimeError) as error:  # RuntimeError: no further thread can be started
        return _failed(f"{program} cannot be run ({getattr(error, 'strerror', None) or error}): try it in a console")


class GpuMonitor:
    """Caches the status, good or bad, for `ttl` seconds. Callers during a run share its result, or the next run's."""

    HISTORY_MS, STEP_MS = 900_000, 5_000  # the history's length, and its step: it has the last status of each

    def __init__(self, query: Callable[[set[Program]], GpuStatus], ttl: float, clock: Clock = time.monotonic) -> None:
        self._query, self._ttl, self._clock = query, ttl, clock
        self._running: set[Program] = set()  # the children of the current run, and of one that could not be ended
        self.last: tuple[GpuStatus, float] | None = None  # with the time by `clock` when its run ended
        self._history: dict[int, tuple[int, GpuStatus]] = {}  # by step: time in ms, status
        self._report = functools.lru_cache(100)(functools.partial(log.warning, "gpu: nvidia-smi works, but says: %s"))
        self._closed = False
        self._batcher: Batcher[None, GpuStatus] = Batcher(self._answer, "gpu")

    def ask(self) -> GpuStatus | Future[GpuStatus]:
        """The cached status, or a future, which the caller may cancel. Must not be called after close()."""
        return self._fresh() or self._batcher.ask(None, cancellable=True)

    def history(self, now: int) -> list[tuple[int, GpuStatus]]:
        """The statuses of the last 15 minutes with their times in ms, oldest first."""
        return [one for one in list(self._history.values()) if one[0] > now - self.HISTORY_MS]

    def close(self) -> None:
        """Kill the current run, start no other, and end the thread."""
        self._closed = True
        self.end_run()
        self._batcher.close(timeout=1.0)
        self.end_run()  # its children may have started after the first call

    def end_run(self) -> None:
        """Kill the children of the current run. A signal handler may call it."""
        for child in list(self._running):
            child.end(force=True)

    def _fresh(self) -> GpuStatus | None:
        last = self.last
        return last[0] if last and self._clock() - last[1] < self._ttl else None

    def _answer(self, _: Sequence[None]) -> list[GpuStatus]:
        status = _failed("the service is stopping") if self._closed else self._fresh()
        if status is None:
            status = self._query(self._running)
            self.last, at = (status, self._clock()), now_ms()
            # Without those of the future, if the clock was set back: the newest status must be the last one.
            self._history = {step: one for step, one in self._history.items() if one[0] < at}
            self._history[at // self.STEP_MS] = at, status
            bound(self._history, self.HISTORY_MS // self.STEP_MS)
            if status.remarks:
                self._report(status.remarks)  # each once
        return [status]


# ======================================================================================================
# GPU: reservations
# ======================================================================================================


@dataclass(frozen=True)
class Reservation:
    """A lease of the GPU, as it is stored. Its record stays after its end, since the next fence has to be larger."""

    digest: str  # SHA-256 of its id, which only its holder knows
    holder: str
    purpose: str | None
    ttl: float  # seconds; 0 once it was released
    since: int  # ms
    expires: int  # ms
    fence: int  # a fencing token: larger than that of each earlier reservation

    @property
    def description(self) -> str:
        return f"reserved by {self.holder} until {iso_time(self.expires)}"

    def seconds_left(self, now: float) -> float:
        """From `now` (ms, the PC's clock); negative after its end. At most its TTL, as that clock may be set back."""
        return min(self.ttl, (self.expires - now) / 1000)


def read_reservation(record: bytes | None) -> Reservation | None:
    """Parse a record. None if there is none, or if it cannot be read: the next reservation replaces it."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # a field is missing, or is no time or number
        found = Reservation(**parse_json(record or b""))
        if iso_time(found.since) and iso_time(found.expires) and max(found.seconds_left(0), found.fence + 1) < LARGEST:
            return found
    return None


def renewed(digest: str | None, ttl: float | None, known: Reservation | None, now: int, fence: int) -> Reservation:
    """`known`, renewed from `now` for `ttl` seconds (None: its TTL). NotFound unless it has that digest (None: any)."""
    if known is None or digest not in (None, known.digest):
        raise NotFound("There is no such reservation, or it has ended: reserve the GPU again.")
    ttl = known.ttl if ttl is None else ttl
    return dataclasses.replace(known, ttl=ttl, expires=now + int(ttl * 1000))


# Takes the current reservation or None, the time in ms and the next fence. Returns what to store; None for nothing.
_Change = Callable[["Reservation | None", int, int], "Reservation | None"]


class _Question(NamedTuple):
    change: _Change
    deadline: float | None  # a change that stores nothing is retried until then; None for one that does not wait


class Reservations:
    """The reservation of one host's GPU. One thread owns its state and the queue of those who wait. It times an end by
    the monotonic clock, from the first read of the record by this instance: setting the PC's clock does not move it."""

    INTERVAL, MAX_WAITING = 1.0, 200  # seconds between two reads of the record while somebody waits; how many may wait

    def __init__(
        self, store: Store, host: str, clock: Clock = time.monotonic, wall: Callable[[], int] = now_ms, *,
        watches: bool = False,
    ) -> None:  # fmt: skip
        """`watches`: read the record once a second even if nobody waits."""
        self._store, self._host, self._clock, self._wall, self._watches = store, host, clock, wall, watches
        self._record: bytes | None = None  # as last read
        self._parsed: tuple[Reservation | None, float] = (None, 0.0)  # the reservation in it, and its end by `clock`
        self._fence, self._read_at = 0, -math.inf  # the largest fence read; when the record was read, by `clock`
        self._unclaimed = ""  # digest of a reservation to release: it may be stored, but no client got its id
        self._loop = Loop(self._turn, "reservations", on_close=lambda: self._loop.answer(stopping(), *self._loop.asked))
        self._loop.start()
        self.close = self._loop.close  # it answers everyone who waits

    @property
    def known(self) -> Reservation | None:
        """The current reservation as last read, without asking the store."""
        found, end = self._parsed
        return found if self._clock() < end else None

    @property
    def seconds_left(self) -> float:
        """Until that reservation ends; negative after its end."""
        return self._parsed[1] - self._clock()

    def ask(self, change: _Change = lambda *_: None, wait: float | None = None) -> Any:
        """A future of the reservation that the change stored, or of the current one. A change that stores nothing is
        retried for `wait` seconds, in order of arrival, and may be cancelled. Raises Unavailable if too many wait."""
        now = self._clock()
        waiting = sum((one.deadline or now) > now for one in list(self._loop.asked.values()))
        if wait and waiting >= self.MAX_WAITING:
            raise Unavailable(f"{self.MAX_WAITING} others wait for the GPU: try again later.", 5)
        # A change that does not wait is made even if its client leaves.
        question = _Question(change, None if wait is None else now + wait)
        return self._loop.ask(question, cancellable=wait is not None)

    def _turn(self) -> float:
        asked = list(self._loop.asked.items())
        is_due = (self._watches or self._unclaimed) and self._clock() - self._read_at >= self.INTERVAL
        try:
            if asked or is_due:
                self._read()
            for future, one in sorted(asked, key=lambda pair: pair[1].deadline is not None):
                self._answer(future, one)
        except Unavailable as fault:  # who asked meanwhile gets an answer in the next turn
            self._loop.answer(fault, *(future for future, _ in asked))
        waiting = list(self._loop.asked.values())
        times = [self._clock() + 3600.0]
        times += [self._read_at + self.INTERVAL] if waiting or self._watches or self._unclaimed else []
        times += [self._parsed[1], *(one.deadline or 0.0 for one in waiting)] if waiting else []
        return max(0.0, min(times) - self._clock())

    def _answer(self, future: Future[Any], one: _Question) -> None:
        """Try its change, and answer it unless it goes on waiting."""
        is_stored, outcome = self._apply(one.change)
        if one.deadline is not None and not is_stored and self._clock() < one.deadline:
            return
        if not self._loop.answer(outcome, future) and is_stored:  # its client left meanwhile
            self._unclaimed = outcome.digest
            self._read()

    def _read(self) -> None:
        """Read the record, and release the reservation that nobody claimed, if there is one."""
        self._read_at = self._clock()
        self._swap(None)
        self._apply(functools.partial(renewed, self._unclaimed, 0))
        if self.known:  # another's is current: ours can come no more
            self._unclaimed = ""

    def _swap(self, after: bytes | None) -> None:
        """Store `after` unless another instance changed the record (None: only read it). Parse what is stored then."""
        record = self._store.swap_reservation(self._host, self._record, after)
        if record != self._record:
            self._record, found = record, read_reservation(record)
            self._parsed = (found, self._clock() + found.seconds_left(self._wall())) if found else (None, 0.0)
            self._fence = max(self._fence, found.fence if found else 0)

    def _apply(self, change: _Change) -> tuple[bool, Any]:
        """True and what the change stored; else False, and what is known or NotFound. Repeats if another was faster."""
        while True:
            known, now = self.known, self._wall()
            try:
                made = change(known, now, max(now, self._fence + 1))
            except NotFound as error:
                return False, error
            if made is None:
                return False, known
            record = to_json(dataclasses.asdict(made))
            if not known:
                self._unclaimed = made.digest  # in case the reply of the store is lost
            self._swap(record)
            self._unclaimed = ""
            if self._record == record:
                return True, made


# ======================================================================================================
# SwarmUI: the client
# ======================================================================================================


@dataclass(frozen=True)
class Probe:
    """The result of one probe of SwarmUI's URL. `occupied`: a program has the port, SwarmUI or another one."""

    ready: bool
    occupied: bool
    message: str
    allow_origin: str | None = None  # the origin of the pages that SwarmUI answers, or *
    responded: bool = False  # the program at the port sent an HTTP response
    # Only if it is ready:
    url: str = ""  # the one that answered: localhost has two addresses
    session_id: str = dataclasses.field(default="", repr=False)  # SwarmUI's, for further calls
    version: str = ""
    server_id: str = ""  # changes with each start of SwarmUI
    queue: Mapping[str, int] | None = None  # the numbers of COUNTS; None if not known
    backends: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # SwarmUI's backend_status

    @property
    def at_work(self) -> bool | None:
        """Whether SwarmUI has images to make; None if not known."""
        return None if self.queue is None else any(self.queue.values())

    @property
    def occupant(self) -> str:
        return f"the program at its port does not answer as SwarmUI does: {self.message}"


NO_ANSWER = Probe(False, False, "")
BACKENDS = ("status", "message")  # the fields of backend_status that status() shows
# Images that wait, are being made, wait for their model, wait for a backend: our name and SwarmUI's.
COUNTS = {"waiting": "waiting_gens", "live": "live_gens", "loading": "loading_models",
          "waitingBackends": "waiting_backends"}  # fmt: skip


def fetch(
    url: str, seconds: float, *, data: bytes | None = None, headers: Mapping[str, str] = {}
) -> tuple[http.client.HTTPResponse, bytes]:
    """Make an HTTP request that ends within `seconds` of connecting. Returns the response and up to 64 KiB of its body.
    It uses no proxy, follows no redirect. Raises OSError (URLError: it cannot connect), HTTPException or ValueError."""
    request = urllib.request.Request(url, data, {**headers, "Connection": "close"})
    kind = http.client.HTTPSConnection if request.type == "https" else http.client.HTTPConnection
    with contextlib.closing(kind(request.host, timeout=seconds)) as connection:
        try:
            connection.connect()  # of a host's addresses, the first may use up `seconds` before the second answers
        except OSError as error:
            raise urllib.error.URLError(error) from error
        sock, deadline = connection.sock, time.monotonic() + seconds

        def shut_down() -> None:  # the socket's own timeout starts again with each byte
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(seconds, shut_down)
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request(request.get_method(), request.selector, data, dict(request.header_items()))
            with connection.getresponse() as response:
                reply = response, response.read(65536)
            if time.monotonic() < deadline:
                return reply
        except (OSError, http.client.HTTPException):
            if time.monotonic() < deadline:
                raise
        finally:
            watchdog.cancel()
    raise TimeoutError("timed out")  # what arrived before the deadline is incomplete


def probe(settings: Settings) -> Probe:
    """Ask SwarmUI for a session, as its other clients do first. It is ready if it answers 200 with a session_id."""
    parts = urllib.parse.urlsplit(settings.swarmui_api_url)
    if parts.hostname != "localhost" or parts.scheme != "http":
        return _new_session(settings.swarmui_api_url, settings)
    # 127.0.0.1 first: where nothing listens on ::1, Windows takes 2 s to refuse.
    hosts = [f"{address}:{settings.swarmui_port}" for address in ("127.0.0.1", "[::1]")]
    ipv4, ipv6 = (urllib.parse.urlunsplit(parts._replace(netloc=host)) for host in hosts)
    first = _new_session(ipv4, settings)
    second = first if first.occupied else _new_session(ipv6, settings)
    return second if second.occupied else first


def _new_session(url: str, settings: Settings) -> Probe:
    found, answer = ask_swarmui(url, "GetNewSession", {}, settings)
    if not found.ready or not isinstance(answer.get("session_id"), str):
        return dataclasses.replace(found, ready=False)
    fields: dict[str, Any] = {name: str(answer.get(name, "")) for name in ("session_id", "version", "server_id")}
    return dataclasses.replace(found, message="SwarmUI answers", url=url, **fields)


def probe_status(settings: Settings, before: Probe) -> Probe:
    """Probe SwarmUI and ask for its queue and backends, in the session of the probe `before` if that has one."""
    found = before if before.session_id else probe(settings)
    for route in ("GetGlobalStatus", "GetCurrentStatus") if found.session_id else ():  # the second gives no queue
        asked, answer = ask_swarmui(found.url, route, {"session_id": found.session_id}, settings)
        error = answer.get("error_id")
        if error == "invalid_session_id" and found is before:
            return probe_status(settings, NO_ANSWER)
        if error in ("bad_route", "bad_permissions"):
            continue
        if not asked.ready and not error:
            return asked
        status, backends = answer.get("status"), answer.get("backend_status")
        counts = status if isinstance(status, dict) and route == "GetGlobalStatus" else {}
        known = {name: count for name, key in COUNTS.items() if (count := read_count(counts.get(key))) is not None}
        queue, backends = known if len(known) == len(COUNTS) else None, backends if isinstance(backends, dict) else {}
        return dataclasses.replace(found, allow_origin=asked.allow_origin, queue=queue, backends=backends)
    return dataclasses.replace(found, queue=None, backends={})


def ask_swarmui(url: str, route: str, body: Mapping[str, Any], settings: Settings) -> tuple[Probe, dict[str, Any]]:
    """POST to a route of SwarmUI's API at `url`. Returns a probe, which is ready if the response is 200 with a JSON
    object without an error; and that object, {} if there is none."""
    where = settings.swarmui_api_url
    headers = {"Content-Type": "application/json", "Host": urllib.parse.urlsplit(where).netloc}
    if settings.swarmui_token:
        headers["Cookie"] = f"swarm_token={settings.swarmui_token}"
    try:
        data = json.dumps(body).encode()
        response, text = fetch(f"{url}/API/{route}", settings.health_timeout, data=data, headers=headers)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # Windows retries a refused connection for about 2 s, so a probe may time out before.
        refusals = (ConnectionRefusedError, TimeoutError) if WINDOWS else ConnectionRefusedError
        if isinstance(error, urllib.error.URLError) and isinstance(reason, refusals):
            return Probe(False, False, f"nothing listens at {where}"), {}
        if isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in _NO_ROUTE:
            return Probe(False, False, f"{where} cannot be reached ({reason})"), {}
        if isinstance(reason, TimeoutError):
            return Probe(False, True, f"{where} did not answer within {settings.health_timeout:g} s"), {}
        return Probe(False, True, f"{where} sent no valid response ({_on_one_line(str(reason))})"), {}
    answer: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(text)
    answer = answer if isinstance(answer, dict) else {}
    detail = answer.get("error") or answer.get("error_id") or text.decode("utf-8", "replace")
    message = f"{where} answered {response.status}: {' '.join(str(detail).split())[:200]}"
    if "unauthorized" in message.lower() or response.status == 401:
        message += f" (SwarmUI has accounts on: {'check' if settings.swarmui_token else 'set'} SWARMUI_TOKEN)"
    is_good = response.status == 200 and bool(answer) and not answer.keys() & {"error", "error_id"}
    return Probe(is_good, True, message, response.headers["Access-Control-Allow-Origin"], responded=True), answer


def allow_page(found: Probe, settings: Settings) -> Probe:
    """Make SwarmUI answer the page of SWARMUI_ALLOW_ORIGIN: as installed, it answers no page."""
    wanted, before = settings.swarmui_allow_origin, found.allow_origin
    if wanted is None or before in ("*", wanted):
        return found
    body = {"session_id": found.session_id, "settings": {"Network.AccessControlAllowOrigin": wanted}}
    ask_swarmui(found.url, "ChangeServerSettings", body, settings)
    after = probe(settings).allow_origin  # SwarmUI reports `success` also if it ignores the setting
    if after == wanted:
        change = f"it now answers pages of {wanted}" + (f" instead of {before}" if before else "")
    else:
        change = f"it still does not answer pages of {wanted}: set AccessControlAllowOrigin in its server settings"
    log.log(logging.INFO if after == wanted else logging.WARNING, "swarmui: %s", change)
    return dataclasses.replace(found, message=f"{found.message}; {change}", allow_origin=after)


# ======================================================================================================
# SwarmUI: what was launched
# ======================================================================================================


class LaunchError(Exception):
    """Why SwarmUI cannot be launched. The text follows "SwarmUI failed to start: "."""


SWARMUI_LOG = "swarmui.log"  # in the data folder
STOP_LIMIT = 75_000  # ms: longer than all steps of end_swarmui() together


def find_swarmui(settings: Settings) -> Path:
    """The program to launch. Raises LaunchError when there is none, or SwarmUI is on another machine."""
    host = urllib.parse.urlsplit(settings.swarmui_api_url).hostname or ""
    if not _is_this_machine(host):
        raise LaunchError(f"SWARMUI_API_URL names another machine ({host}): start SwarmUI there")
    program = settings.swarmui_path
    if program is None:
        raise LaunchError("SWARMUI_PATH is not set: set it to SwarmUI's folder")
    if not os.path.exists(program):  # Path.exists() raises for a name that is too long
        raise LaunchError(f"SWARMUI_PATH {program} does not exist: set it to SwarmUI's folder")
    if os.path.isdir(program):
        program /= LAUNCH_SCRIPT
        if not os.path.isfile(program):
            raise LaunchError(f"SWARMUI_PATH {program.parent} has no {LAUNCH_SCRIPT}: set it to SwarmUI's folder")
    return program


def _is_this_machine(host: str) -> bool:
    """Whether a host is this machine: a socket can be bound only to the addresses of its own machine."""
    if not address_of(host):
        return host == "localhost" or host in (socket.gethostname().lower(), socket.getfqdn().lower())
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return True
    return is_loopback(host)


class LaunchedSwarmUI:
    """The SwarmUI that this service launched, in this run or an earlier one. Only the supervisor's thread uses it."""

    def __init__(self, settings: Settings, on_exit: Callable[[], None]) -> None:
        self._settings, self._on_exit = settings, on_exit
        self._log, self._file = settings.data_dir / SWARMUI_LOG, settings.data_dir / "swarmui.json"
        self._log_start = self._log_read = 0  # offsets in the log: where it begins, and what was checked
        self._record: dict[str, Any] = {}  # of the last launch: pid, identity, serverId; launchedAt, endingSince (ms)
        self.program: Program | None = None  # until clean_up()
        self.has_exited = False  # the process that was launched; SwarmUI may run on
        self.is_orphan = False  # SwarmUI answered after that process had exited
        self.was_ready = False  # since its launch
        self._server_id_only: str | None = None  # its server_id, if none of its processes was found
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # no valid record
            record = dict(json.loads(self._file.read_text(encoding="utf-8")))
            pid, identity, server_id = record["pid"], record["identity"], record.get("serverId", "")
            if type(pid) is int and 1 < pid < 1 << 31 and isinstance(identity, str) and isinstance(server_id, str):
                self._record, program = record, Program(pid, identity)
                self._log_read = self._log_size()
                if not program.has_exited():
                    self._adopt(program)
                    self.was_ready = bool(server_id)

    def _adopt(self, program: Program) -> None:
        self.program, self.has_exited, self.is_orphan, self.was_ready = program, program.has_exited(), False, False
        with contextlib.suppress(RuntimeError):  # no further thread can be started: the next look sees the exit
            threading.Thread(target=self._wait, args=[program], name="swarmui-watch", daemon=True).start()

    def _wait(self, program: Program) -> None:
        while not program.has_exited():
            program.process.wait() if program.process else time.sleep(0.5)
        self._on_exit()

    @property
    def started_at(self) -> str | None:
        at = read_time(self._record.get("launchedAt"))
        return None if at is None or self.program is None else iso_time(at)

    def launch(self, found: Probe) -> None:
        """`found`: the last probe of its port. Raises LaunchError."""
        self.was_ready = False  # a failed launch is not the death of the SwarmUI before it
        if found.occupied:
            raise LaunchError(found.occupant)
        program = find_swarmui(self._settings)
        # In any other folder SwarmUI's executable aborts and leaves a stray Data/ there.
        roots = (up for up in program.parents if any((up / name).is_file() for name in LAUNCH_SCRIPTS))
        arguments = ("--launch_mode", "none", "--port", str(self._settings.swarmui_port), *self._settings.swarmui_args)
        try:
            self._log_start = self._log_read = self._log_size()
            launched = launch_detached(program, arguments, next(roots, program.parent), self._log)
        except (OSError, ValueError) as error:
            raise LaunchError(f"{program} cannot be launched ({error}): check SWARMUI_PATH") from None
        log.info("swarmui: launched %s as process %d", program, launched.pid)
        self._adopt(launched)
        self._record, self._server_id_only = {"launchedAt": now_ms()}, None
        self.note(pid=launched.pid, identity=launched.identity)

    def note(self, **changed: Any) -> None:
        """Keep this for the service's next run: `serverId` once SwarmUI answers, `endingSince` while it is stopped."""
        if self.program is None:  # SwarmUI is not ours
            return
        self._record |= changed
        try:
            write_private(self._file, json.dumps(self._record), replace=True)  # on a full disk the old one stays
        except OSError as error:
            log.warning("swarmui: %s cannot be written (%s)", self._file, error.strerror)

    def lives(self, server_id: str) -> bool:
        """Whether any of its processes does. If none was found, the `server_id` of the SwarmUI that answers decides."""
        return self.program is not None and (self.program.is_alive() or server_id == self._server_id_only)

    def note_ready(self, server_id: str) -> None:
        """SwarmUI answers, and has that id. The id identifies ours even if the process that was launched has exited."""
        is_known = bool(server_id) and server_id == self._record.get("serverId")
        if self.program is None and is_known:
            program = Program(self._record["pid"], None)
            self._adopt(program)
            self._server_id_only = None if program.is_alive() else server_id
        if self.lives(server_id):
            self.was_ready, self.is_orphan = True, self.has_exited
            if not is_known:
                self.note(serverId=server_id)

    def poll_exit(self) -> bool:
        """Whether the process that was launched has exited since the last call."""
        before, self.has_exited = self.has_exited, self.program is not None and self.program.has_exited()
        return self.has_exited and not before

    def is_over(self, server_id: str, *, is_open: bool, is_ending: bool) -> bool:
        """Whether SwarmUI is gone. Its children may outlive it, and it may outlive its script if a signal ends that."""
        if self.program is None or not self.lives(server_id):
            return self.program is not None
        is_done = self.was_ready or (self.program.code or 0) > 0
        return self.has_exited and is_done and not (is_open or is_ending)

    def clean_up(self) -> str:
        """Forget a SwarmUI that is gone, and kill what it left. How it died; "" if it was stopped, or exited with 0."""
        if self.program is None:
            return ""
        self.program.end(force=True)
        code = None if self.is_orphan else self.program.code
        how = f"it exited with {'an unknown code' if code is None else f'code {code}'}: {self.last_lines()}"
        log.info("swarmui: process %d is gone: %s", self.program.pid, how)
        stopped_at = read_count(self._record.get("endingSince")) or 0  # perhaps by an earlier run of the service
        is_wanted = code == 0 or abs(now_ms() - stopped_at) < STOP_LIMIT
        self.note(serverId="", endingSince=0)
        self.program = None
        return "" if is_wanted else how

    def took_another_port(self) -> bool:
        """Whether its log has said so since the last call. What answers at the configured port is not ours then."""
        since, self._log_read = self._log_read, self._log_size()
        if self.program is None or since == self._log_read:
            return False
        notice = rf"(?m)\bPort {self._settings.swarmui_port} was taken, using [0-9]+ instead\.\s*$"
        return bool(re.search(notice, "\n".join(tail(self._log, 1 << 20, since))))

    def _log_size(self) -> int:
        with contextlib.suppress(OSError):  # there is none
            return self._log.stat().st_size
        return 0

    def last_lines(self) -> str:
        return " | ".join(last_lines(self._log, self._log_start)) or "its log is empty"


# ======================================================================================================
# SwarmUI: its states
# ======================================================================================================


@dataclass(frozen=True)
class SwarmUISnapshot:
    """What is known of SwarmUI at one time. Its state follows from this. "Ours" is what this service launched."""

    found: Probe = NO_ANSWER  # the last one
    misses: int = 0  # consecutive probes without an answer, while its port was open
    answered: bool = False  # since its port was last closed
    lives: bool = False  # ours
    was_ready: bool = False  # ours, since its launch
    is_ending: bool = False  # it is being stopped
    has_failed: bool = False  # ours died, or could not be launched

    @property
    def hangs(self) -> bool:
        is_foreign = self.found.responded and not self.found.ready  # another program answers there
        was_ready = self.answered or (self.lives and self.was_ready)
        return was_ready and self.misses >= UNRESPONSIVE_AFTER and (self.lives or not is_foreign)


UNRESPONSIVE_AFTER, ENDED_AFTER = 3, 60  # misses; the second only with SWARMUI_RESTART=on-failure

# The state is that of the first row whose condition is true. The second column: the states that cannot come before it.
_STATES: tuple[tuple[str, str, Callable[[SwarmUISnapshot], bool]], ...] = (
    ("stopping", "stopped failed", lambda now: now.is_ending),
    ("ready", "", lambda now: now.answered and now.misses < UNRESPONSIVE_AFTER),
    ("unresponsive", "stopped", lambda now: now.hangs),
    ("starting", "", lambda now: now.lives),
    ("failed", "", lambda now: now.has_failed or now.found.occupied),
    ("stopped", "", lambda now: True),
)


def next_state(before: str, now: SwarmUISnapshot) -> str:
    state, impossible = next((state, impossible) for state, impossible, applies in _STATES if applies(now))
    if before in impossible.split():
        log.error("swarmui: %s cannot follow %s: please report this with %s", state, before, now)
    return state


STOP_TIMEOUTS = {"ShutdownServer": 10.0, "terminate": 3.0}  # seconds before the next step
LAST_STOP_TIMEOUT = 60.0  # after the last: ShutdownServer takes 30 s beside an unfinished request, 5 s for each backend
RESTART_DELAYS = (1.0, 5.0, 25.0)  # seconds before each restart; a further death within an hour causes none


def end_swarmui(
    steps: Sequence[str], session: Probe, ours: LaunchedSwarmUI, settings: Settings, clock: Clock
) -> Iterator[str]:
    """Take each step once the previous one has timed out; yield "" meanwhile, and at last why SwarmUI did not end."""
    refusal = ""
    for step in steps:
        deadline = clock() + (LAST_STOP_TIMEOUT if step == steps[-1] else STOP_TIMEOUTS[step])
        if step == "ShutdownServer":
            asked, answer = ask_swarmui(session.url, step, {"session_id": session.session_id}, settings)
            if asked.responded and not answer.get("success"):
                refusal, deadline = asked.message, -math.inf
        elif ours.program:
            ours.program.end(force=step == "kill")
        while clock() < deadline:
            yield ""
    yield refusal or "it keeps running"


def why_force_is_needed(state: str, found: Probe, *, is_ours: bool) -> str:
    """Why a stop needs `force`; "" if it does not."""
    if state not in ("ready", "unresponsive"):
        return ""
    if not is_ours:
        return "SwarmUI was not launched by this service"
    at_work = found.at_work if state == "ready" else False
    return {True: "SwarmUI is at work", None: "Whether SwarmUI is at work is not known"}.get(at_work, "")


# ======================================================================================================
# SwarmUI: the supervisor
# ======================================================================================================


class SwarmUISupervisor:
    """Owns SwarmUI's state: only its thread launches, probes and ends SwarmUI. Each start() and stop() gets a future of
    its own for the outcome, which it may cancel. After close() they raise Unavailable."""

    def __init__(
        self, settings: Settings, clock: Clock = time.monotonic, is_reserved: Callable[[], bool] = lambda: False
    ) -> None:
        self._settings, self._is_reserved, self.clock = settings, is_reserved, clock
        self._restarts = settings.restart.lower() == "on-failure"
        self._log = settings.data_dir / SWARMUI_LOG
        self._has_looked = threading.Event()
        self._state, self._since, self._entered_at = "", 0, -math.inf  # when it was entered: in ms, and by the clock
        self._status: dict[str, Any] = {}  # what status() shows; startingFor and idleFor are starts, by the clock
        self._loop = Loop(self._turn, "swarmui")  # its questions: "start", "stop", "force"; "end" for a stop under way
        self._log_loop = Loop(functools.partial(shorten_log, self._log), "swarmui-log")
        # The rest is used by the thread only.
        self._ours = LaunchedSwarmUI(settings, self._loop.wake)
        self._probe, self._misses = NO_ANSWER, 0
        self._session = NO_ANSWER  # the last probe that was ready, until the port is closed
        self._looked_at = self._launched_at = self._last_used = self._idle_from = -math.inf  # by the clock
        self._error, self._has_failed, self._failure_ms = "", False, 0  # lastError; ours has failed, and when (ms)
        self._deadline = self._restart_at = math.inf  # of the starts that wait; of the next restart
        self._launched_for_starts = False  # launched while they waited, or already launched when they came
        self._is_restart = False  # the last launch was one
        self._deaths: list[float] = []  # their times within the last hour
        self._ending: Iterator[str] | None = None  # takes the steps of a stop
        self._end_reason = ""  # the failure for which SwarmUI is ended; "" if it was to be stopped
        self._warn_once = functools.cache(log.warning)
        self.launches = 0  # since the service started
        self._loop.start()
        self._log_loop.start()

    def start(self) -> Future[Probe]:
        """A future of the probe once SwarmUI is ready. ApiError if it fails, TooManyRequests between two launches."""
        return self._loop.ask("start")

    def stop(self, *, force: bool = False) -> Future[Any]:
        """A future of a message once SwarmUI is gone. ApiError if it does not end, Conflict if a stop needs `force`."""
        return self._loop.ask("force" if force else "stop")

    def status(self) -> dict[str, Any]:
        """The response of /swarmui/status. It waits for the first look."""
        self._has_looked.wait(60.0)
        known, now = self._status, self.clock()
        spans = {name: None if known[name] is None else round(now - known[name]) for name in ("startingFor", "idleFor")}
        return {**known, **spans, "logTail": last_lines(self._log)}

    def close(self) -> None:
        """End the threads, and answer all requests that wait at once. SwarmUI keeps running."""
        self._loop.close()
        self._log_loop.close()
        self._loop.answer(stopping(), *self._loop.asked)

    def _waiting(self, *questions: str) -> list[Future[Any]]:
        return [future for future, question in list(self._loop.asked.items()) if question in questions]

    def _answer(self, question: str, outcome: Any) -> None:
        self._publish()
        if question == "start":
            self._deadline = math.inf
        self._loop.answer(outcome, *self._waiting(question))

    def _turn(self) -> float:
        """Look if that is due, and act. Returns the seconds until the next turn."""
        try:
            self._act()
            self._publish()
        except Exception:
            self._ending, self._deadline = None, math.inf
            raise
        return 0.05 if self._ending else self._next_look() - self.clock()

    def _next_look(self) -> float:
        interval = self._settings.poll_interval * (5 if self._state in ("stopped", "failed") else 1)
        due = self._looked_at + (min(interval, 0.5) if self._ending else interval)
        return min(due, self._restart_at, self._deadline if self._looked_at < self._deadline else math.inf)

    def _act(self) -> None:
        if not (starts := self._waiting("start")):
            self._deadline = math.inf
        begins, stops = bool(starts) and self._deadline == math.inf, self._waiting("stop", "force")
        now, exits = self.clock(), self._ours.poll_exit()
        if exits:  # from now on another SwarmUI may answer
            self._session = dataclasses.replace(self._session, session_id="")
        if (is_due := now >= self._next_look()) or begins or stops or exits:
            self._look(is_due=is_due)
        self._notice_end()
        if begins:
            self._last_used, self._deadline = now, now + self._settings.start_timeout
            self._launched_for_starts = bool(self._ours.program and not self._ending)
        for future in stops:
            self._decide_stop(future)
        if self._looked_at >= now:  # SwarmUI may have been given work since an earlier look
            self._shut_down_idle()
        if self._ending:
            self._advance_end(self._ending)
        if now >= self._restart_at:
            self._launch(is_restart=True)
        if self._deadline < math.inf:
            self._advance_starts("SwarmUI is already running" if begins else "SwarmUI started successfully")

    def _look(self, *, is_due: bool = False) -> None:
        """Probe SwarmUI, and note what follows from the probe. Only one that was due can be a miss."""
        self._looked_at = self.clock()
        self._probe = found = probe_status(self._settings, self._session)
        if found.ready or not found.occupied:
            self._session, self._misses = found, 0
        elif is_due:
            self._misses += 1
        if found.ready:
            self._restart_at = math.inf
            if found.at_work is None:
                self._warn_once("swarmui: GetGlobalStatus does not say whether SwarmUI is at work: a stop needs force")
            if not self._ending:
                self._ours.note_ready(found.server_id)

    def _notice_end(self) -> None:
        """See whether SwarmUI is gone, or has to end. All of a turn acts on that; the next turn sees a later death."""
        ending, ours, is_open = self._ending, self._ours, self._probe.occupied
        is_over = ours.is_over(self._session.server_id, is_open=is_open, is_ending=ending is not None)
        if not ending and ours.took_another_port():
            self._end(f"its port {self._settings.swarmui_port} was taken by another program", ["kill"])
        elif is_over or (ending and not ours.program and not is_open):
            how_it_died = ours.clean_up()
            death = self._end_reason if ending else how_it_died
            self._ending, self._session = None, NO_ANSWER  # what answers now is another SwarmUI
            if death:
                self._fail(death)
            else:
                self._error, self._has_failed = "", False
            self._look()
            if ending:
                if self._waiting("start") and not death:
                    self._launched_at = -math.inf  # launch it at once
                self._answer("end", "SwarmUI is stopped")
        elif self._misses >= ENDED_AFTER and self._restarts and ours.was_ready and ours.program and not ending:
            self._end(f"it did not answer {ENDED_AFTER} probes in a row", ["terminate", "kill"])

    def _fail(self, reason: str) -> None:
        """Note that SwarmUI died, or could not be launched, and schedule its restart if it gets one."""
        self._error, self._has_failed, self._failure_ms = reason, True, now_ms()
        log.error("swarmui: failed: %s", reason)
        if not self._restarts or not (self._ours.was_ready or self._is_restart):
            return
        now = self.clock()
        self._deaths = [at for at in self._deaths if now - at < 3600] + [now]
        if len(self._deaths) <= len(RESTART_DELAYS):
            self._restart_at = now + RESTART_DELAYS[len(self._deaths) - 1]
        else:
            self._error += f"; given up after {len(self._deaths)} deaths within an hour"
            self._deaths = []
            log.error("swarmui: %s: it is not launched again before the next start", self._error)

    def _decide_stop(self, future: Future[Any]) -> None:
        self._publish()
        state, found, is_ours = self._state, self._probe, self._ours.program is not None
        if self._loop.asked.get(future) != "force" and (reason := why_force_is_needed(state, found, is_ours=is_ours)):
            self._loop.answer(Conflict(f"{reason}: add ?force=true to stop it anyway."), future)
            return
        self._restart_at = math.inf
        self._answer("start", ApiError("SwarmUI failed to start: it was stopped."))
        if future in self._loop.asked:
            self._loop.asked[future] = "end"
        if state in ("stopped", "failed"):
            self._error, self._has_failed = "", False
            self._answer("end", "SwarmUI is not running")
        elif not self._ending:
            self._end("", ["ShutdownServer"] * (found.ready or not is_ours) + ["terminate", "kill"] * is_ours)
        self._end_reason = ""

    def _shut_down_idle(self) -> None:
        now, limit, at_work = self.clock(), self._settings.idle_shutdown, self._probe.at_work
        if at_work:
            self._last_used = now
        is_idle = at_work is False and self._state == "ready" and not (self._ending or self._waiting("start"))
        if limit is None or not is_idle or not self._ours.program:
            return
        if self._probe.backends.get("any_loading") or self._is_reserved():
            self._idle_from = now
        elif now - max(self._last_used, self._idle_from) >= limit * 60:
            log.info("swarmui: idle for %g min", limit)
            self._end("", ["ShutdownServer", "terminate", "kill"])

    def _end(self, failure: str, steps: list[str]) -> None:
        log.info("swarmui: ending SwarmUI%s", failure and f", because {failure}")
        ending = end_swarmui(steps, self._session, self._ours, self._settings, self.clock)
        self._ending, self._end_reason = ending, failure
        self._ours.note(endingSince=0 if failure else now_ms())

    def _advance_end(self, ending: Iterator[str]) -> None:
        if reason := next(ending):
            self._ending = None
            self._misses = min(self._misses, UNRESPONSIVE_AFTER)
            self._ours.note(endingSince=0)
            self._error = f"SwarmUI cannot be ended ({reason}): end it by hand"
            log.error("swarmui: %s", self._error)
            self._answer("end", ApiError(f"{self._error}."))

    def _advance_starts(self, message: str) -> None:
        """Launch SwarmUI if that is needed, and answer the starts: once it is ready with `message`."""
        now, found = self.clock(), self._probe
        if self._ending or self._restart_at < math.inf:
            self._launched_for_starts = bool(self._ending and self._end_reason)
            return
        if found.ready:
            if found.backends.get("class") == "error":
                message += f"; but it says: {_on_one_line(str(found.backends.get('message')))}"
            self._answer("start", allow_page(dataclasses.replace(found, message=message), self._settings))
            return
        if not (self._ours.program or self._launched_for_starts or found.occupied):
            if (wait := self._launched_at + self._settings.start_interval - now) > 0:
                died = f" and died at {iso_time(self._failure_ms)} ({self._error})" if self._has_failed else ""
                refusal = f"SwarmUI was launched a moment ago{died}: try again in {math.ceil(wait)} s."
                self._answer("start", TooManyRequests(refusal, wait))
                return
            self._launch()
        if reason := self._why_not_started():
            self._error = reason
            log.error("swarmui: failed to start: %s", reason)
            self._answer("start", ApiError(f"SwarmUI failed to start: {reason}"))

    def _why_not_started(self) -> str:
        """Why the starts that wait have failed; "" while they wait on."""
        lives = self._ours.program is not None
        if not lives and self._launched_for_starts and self._has_failed:
            return self._error
        if not lives and self._probe.occupied:
            return self._probe.occupant
        if self._looked_at < self._deadline:
            return ""
        late = f"no answer within {self._settings.start_timeout:g} s (last: {self._probe.message})"
        advice = f"it keeps running, so try again, or see {self._log}"
        return f"{late}; {advice if lives else f'it exited with code 0: {self._ours.last_lines()}'}"

    def _launch(self, *, is_restart: bool = False) -> None:
        self._launched_for_starts, self._is_restart, self._restart_at = True, is_restart, math.inf
        try:
            self._ours.launch(self._probe)
        except LaunchError as error:
            self._fail(str(error))
            return
        self.launches += 1
        self._launched_at, self._has_failed = self.clock(), False
        self._deadline = self._launched_at + self._settings.start_timeout

    def _publish(self) -> None:
        """Derive the state from what is known, log it if it changed, and update what status() shows."""
        ours, lives, before, settings = self._ours, self._ours.program is not None, self._state, self._settings
        known = self._probe, self._misses, self._session.ready, lives, ours.was_ready, self._ending is not None
        state = self._state = next_state(before, SwarmUISnapshot(*known, self._has_failed))
        if state != before:
            log.info("swarmui: %s%s", state, before and f", after {before}")
            self._since, self._entered_at = now_ms(), self.clock()
        if state == "ready":
            self._error, self._has_failed = "", False
            self._last_used = max(self._last_used, self._entered_at)
        shown = self._session if state == "ready" else NO_ANSWER
        error = self._probe.occupant if state == "failed" and not self._has_failed else self._error
        self._status = {
            "state": state, "since": iso_time(self._since), "ours": None if state in ("stopped", "failed") else lives,
            "pid": ours.program and ours.program.pid, "port": settings.swarmui_port, "apiUrl": settings.swarmui_api_url,
            "version": shown.version or None, "startedAt": ours.started_at,
            "startingFor": self._entered_at if state == "starting" else None, "lastError": error or None,
            "idleFor": None if shown.queue is None else self._last_used, "queue": shown.queue,
            "backends": {name: str(shown.backends.get(name, "")) for name in BACKENDS} if shown.backends else None,
        }  # fmt: skip
        self._has_looked.set()


# ======================================================================================================
# Authentication
# ======================================================================================================

PERMISSIONS = (
    "gpu:read", "gpu:reserve", "swarmui:read", "swarmui:control", "notifications:read", "notifications:write",
    "sessions:read", "sessions:write", "events:read", "metrics:read", "admin",
)  # fmt: skip
_ALL_BUT_ADMIN = tuple(one for one in PERMISSIONS if one != "admin")
SUBJECT_PATTERN = r"[A-Za-z0-9._-]{1,64}"
TOKEN_TTL = 12 * 3600  # seconds, by default
TOKEN_TTL_RANGE = (60, 366 * 24 * 3600)
ENDS_SOON = 3 * 24 * 3_600_000  # ms: with less time left, a warning names the token's subject
LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"
TOKEN_FILE, REFUSED_ORIGINS = "api_token", "refused_origins.json"  # in the data folder
RENEW_ADVICE = f"{START_SCRIPT} token --renew NAME --ttl 90d renews the tokens of NAME"
TOKEN_ADVICE = "A token is needed: send the header Authorization: Bearer <token>."
TRUST_ADVICE = "to trust its pages without a token, add it to STORYTELLER_TRUSTED_ORIGINS"


@dataclass(frozen=True)
class Caller:
    """Who sent a request, and what it may do."""

    subject: str
    permissions: tuple[str, ...]
    expires: int | None = None  # ms; None if the caller has no session token
    digest: str | None = None  # SHA-256 of the session token

    def may(self, permission: str) -> bool:
        if permission == "swarmui:read" and "swarmui:control" in self.permissions:
            return True
        return permission in ("open", "any", *self.permissions) or "admin" in self.permissions


ANONYMOUS = Caller("-", ())  # on a route that is open to all
SCRAPER = Caller("scraper", ("metrics:read",))  # without a token, where STORYTELLER_METRICS is open


def digest_of(token: str) -> str:
    """What the store has of a session token. The token is 256 random bits, so a plain SHA-256 is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def issue_token(store: Store, subject: str, permissions: Iterable[str], ttl: int, now: int) -> tuple[str, Caller]:
    """Make a session token that is valid for `ttl` seconds. The token itself is not stored."""
    token, given = secrets.token_urlsafe(32), set(permissions)
    caller = Caller(subject, tuple(one for one in PERMISSIONS if one in given), digest=digest_of(token))
    return token, keep_caller(store, caller, ttl, now)


def keep_caller(store: Store, caller: Caller, ttl: int, now: int, *, renews: bool = False) -> Caller:
    """Store the caller under its token's digest for `ttl` seconds. `renews`: raises NotFound if it is not there."""
    caller = dataclasses.replace(caller, expires=now + ttl * 1000)
    record = {"subject": caller.subject, "permissions": caller.permissions, "expiresAt": caller.expires}
    if not store.keep_token(caller.digest or "", json.dumps(record).encode("ascii"), ttl * 1000, renews=renews):
        raise NotFound("The token was revoked, or has expired.")
    return caller


def page_token(api_token: str) -> str:
    """The token of the page. It is derived from the API token, so it stays the same, and is not stored."""
    return hmac.new(api_token.encode("ascii"), b"page", hashlib.sha256).hexdigest()


def read_token(digest: str, record: bytes) -> Caller | None:
    """The caller that the store has under a token's digest; None if the record is not valid."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        value = parse_json(record)
        subject, permissions, expires = value["subject"], value["permissions"], value["expiresAt"]
        iso_time(int(expires))
        good = re.fullmatch(SUBJECT_PATTERN, subject) and is_whole(expires) and isinstance(permissions, list)
        if good and all(one in PERMISSIONS for one in permissions):
            return Caller(subject, tuple(permissions), int(expires), digest)
    return None


def session_tokens(store: Store) -> list[Caller]:
    """The callers of all session tokens, by subject, then by expiry. Raises Unavailable."""
    callers = [caller for digest, record in store.tokens() if (caller := read_token(digest, record))]
    return sorted(callers, key=lambda caller: (caller.subject, caller.expires))


def ending_tokens(store: Store, now: int) -> str:
    """The subjects whose tokens expire soon, each with its first expiry; "" for none. Raises Unavailable."""
    ends: dict[str, str] = {}
    for caller in session_tokens(store):
        if (caller.expires or 0) - now < ENDS_SOON:
            ends.setdefault(caller.subject, f"{caller.subject} ({iso_time(caller.expires or 0)})")
    return name_some(ends.values())


class Authenticator:
    """Identifies callers by their token, or as a page of a trusted origin."""

    # Seconds for which the cache has a session token after the store confirmed it: normally; while the store is away.
    TTL, TTL_WITHOUT_STORE = 5.0, 60.0
    ENTRIES = 1000  # of each dictionary; an entry takes less than 1 KB

    def __init__(self, settings: Settings, store: Store, clock: Clock = time.monotonic, wall: Clock = now_ms) -> None:
        self._settings, self._store, self._clock, self._wall_clock = settings, store, clock, wall
        api_token = settings.api_token or ""
        self._own = {  # by digest; these tokens are not in the store
            digest_of(api_token): Caller("api-token", PERMISSIONS),
            digest_of(page_token(api_token)): Caller("page", _ALL_BUT_ADMIN),
        }
        self._lock = threading.Lock()
        # By digest: when the store was asked, math.inf if this instance revoked the token; None if it is not valid.
        self._cache: dict[str, tuple[float, Caller | None]] = {}
        self._failures: dict[str, list[float]] = {}  # by address: when it sent wrong tokens
        self._reported: dict[str, None] = {}  # refused origins, in this run

    def known(self, environ: Mapping[str, Any], permission: str = "") -> Caller | None:
        """The caller; None if only identify() can find or refuse it, which may wait for the store and for files. Raises
        Unauthorized, BadRequest. `permission`: the one that the request needs."""
        token = self._token_of(environ)
        if token is not None:
            digest = digest_of(token)
            owners = (owner for own, owner in self._own.items() if hmac.compare_digest(digest, own))
            return next(owners, None) or self._cached(digest)
        is_open = permission == "metrics:read" and self._settings.metrics.lower() == "open"
        if is_open and "HTTP_AUTHORIZATION" not in environ and is_from_this_pc(environ):
            return SCRAPER
        if caller := self._trusted_page(environ):
            return caller
        if re.fullmatch(LOCAL_ORIGIN, environ.get("HTTP_ORIGIN", "")) and is_from_this_pc(environ):
            return None  # only such an origin, which the settings could trust, is repeated anywhere
        raise Unauthorized(TOKEN_ADVICE)

    def identify(self, environ: Mapping[str, Any]) -> Caller:
        """The caller, from the store if need be. Raises Unauthorized, TooManyRequests, Unavailable, BadRequest."""
        caller, page, token = self.known(environ), self._trusted_page(environ), self._token_of(environ)
        if not caller and token is None:
            self._report(origin := environ["HTTP_ORIGIN"])
            raise Unauthorized(f"{TOKEN_ADVICE} {origin} is not trusted: {TRUST_ADVICE}.")
        try:
            caller = caller or self._look_up(digest_of(token or "")) or page
        except Unavailable:
            caller = page  # a trusted page needs no token, so a token that cannot be looked up does not matter
            if caller is None:
                raise
        if caller is None:
            self._count_failure(str(environ.get("REMOTE_ADDR", "")))
            raise Unauthorized("The token is unknown, revoked or has expired: ask for another one.")
        return caller

    def is_still_good(self, caller: Caller) -> bool:
        """Whether the token of a caller that stays connected is valid, by an answer of the store at most TTL old."""
        with contextlib.suppress(Unavailable):
            return caller.digest is None or bool(self._cached(caller.digest) or self._look_up(caller.digest))
        return False

    def revoke(self, digest: str) -> None:
        """Takes effect at once in this instance, and within TTL seconds in others on the same store."""
        with self._lock:
            self._cache.pop(digest, None)
            self._cache[digest] = (math.inf, None)  # overrides a look-up in progress
            bound(self._cache, self.ENTRIES)
        try:
            self._store.revoke_token(digest)
        except Unavailable:
            with self._lock:
                self._cache.pop(digest, None)  # it is not revoked: the caller has to repeat the request
            raise

    @staticmethod
    def _token_of(environ: Mapping[str, Any]) -> str | None:
        header = environ.get("HTTP_AUTHORIZATION")  # request.headers raises if a header is not latin-1
        if header is not None and "," in header:
            raise BadRequest("Authorization: expected one header.")  # two of them arrive as one
        found = re.fullmatch(r"[Bb][Ee][Aa][Rr][Ee][Rr] +(\S+)", (header or "").strip(" \t"))
        return found[1] if found else None

    def _cached(self, digest: str) -> Caller | None:
        at, caller = self._cache.get(digest, (-math.inf, None))
        return self._unless_expired(caller) if self._clock() - at < self.TTL else None

    def _unless_expired(self, caller: Caller | None) -> Caller | None:
        return caller if caller and (caller.expires or 0) > self._wall_clock() else None

    def _look_up(self, digest: str) -> Caller | None:
        at = self._clock()
        confirmed, before = self._cache.get(digest, (at, None))
        try:
            record = self._store.token(digest)
            caller = read_token(digest, record) if record is not None else None
        except Unavailable:
            if before is None or at - confirmed >= self.TTL_WITHOUT_STORE:
                raise
            at, caller = confirmed, before
        with self._lock:
            kept = self._cache.pop(digest, None)
            if kept and kept[0] > at:  # revoked, or looked up, meanwhile
                at, caller = kept
            if kept or caller:
                self._cache[digest] = (at, caller)
            bound(self._cache, self.ENTRIES)
        return self._unless_expired(caller)

    def _trusted_page(self, environ: Mapping[str, Any]) -> Caller | None:
        """The caller, if it is a page of a trusted origin on this PC."""
        origin = environ.get("HTTP_ORIGIN")
        if origin not in self._settings.trusted_origins or not is_from_this_pc(environ):
            return None
        return Caller(f"origin:{origin}", _ALL_BUT_ADMIN)

    def _report(self, origin: str) -> None:
        """Once per run, name a refused origin on the console, and store it for `check` with the 19 before it."""
        with self._lock:  # also for the file: of two writes at the same time one would be lost
            if origin not in self._reported:
                self._reported[origin] = None
                bound(self._reported, self.ENTRIES)
                log.warning("http: %s sent no token and is not trusted: %s", origin, TRUST_ADVICE)
                kept = [one for one in refused_origins(self._settings) if one != origin][-19:]
                with contextlib.suppress(OSError):  # the console has named it
                    write_private(self._settings.data_dir / REFUSED_ORIGINS, json.dumps([*kept, origin]), replace=True)

    def _count_failure(self, address: str) -> None:
        """Raises TooManyRequests after `token_failures` wrong tokens within a minute; a missing one does not count."""
        now = self._clock()
        with self._lock:
            recent = [at for at in self._failures.pop(address, ()) if now - at < 60]
            is_full = len(recent) >= self._settings.token_failures
            self._failures[address] = recent if is_full else [*recent, now]
            bound(self._failures, self.ENTRIES)
        if is_full:
            raise TooManyRequests("Too many wrong tokens from this address: try again later.", recent[0] + 60 - now)


def is_from_this_pc(environ: Mapping[str, Any]) -> bool:
    """Whether the client is on this PC. If a proxy forwarded the request, its loopback address does not prove that."""
    forwarded = any(name in ("HTTP_FORWARDED", "HTTP_VIA") or name.startswith("HTTP_X_FORWARDED_") for name in environ)
    return not forwarded and is_loopback(str(environ.get("REMOTE_ADDR", "")))


def is_own_host(host: str | None, settings: Settings) -> bool:
    """Whether a Host header has a known name of this PC, or any IP address, for which DNS rebinding is impossible."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", host or "")
    if not found:
        return False
    name = found[1].strip("[]").lower()
    return bool(address_of(name)) or name in map(str.lower, ("localhost", settings.host, *settings.allowed_hosts))


def own_token(settings: Settings, *, makes: bool = True) -> str:
    """The API token: of the settings, else of the data folder. `makes`: make it if there is none. Raises StartError."""
    if settings.api_token:
        return settings.api_token
    path = settings.data_dir / TOKEN_FILE
    try:
        with contextlib.suppress(FileExistsError):  # another process made it meanwhile
            if makes and not path.exists():
                write_private(path, secrets.token_urlsafe(32) + "\n")
        return _token(path.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise StartError(f"{path} cannot be made or read ({error.strerror}): set STORYTELLER_API_TOKEN.") from None
    except ValueError:
        raise StartError(f"{path} contains no valid token: remove it, and the next start makes a new one.") from None


def refused_origins(settings: Settings) -> list[str]:
    """The stored refused origins, without those that are trusted now; [] if there is no valid file."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        origins = list(parse_json((settings.data_dir / REFUSED_ORIGINS).read_bytes()))[-20:]
        return [one for one in origins if re.fullmatch(LOCAL_ORIGIN, str(one)) and one not in settings.trusted_origins]
    return []


# ======================================================================================================
# Alerts: what is seen
# ======================================================================================================

DAY_MS = 86_400_000
# The kinds of alerts, and the permission that a caller needs to receive each.
ALERTS: Mapping[str, str] = {
    "gpu_hot": "gpu:read", "gpu_failing": "gpu:read", "store": "any", "swarmui": "swarmui:read", "disk": "any",
    "unacknowledged": "notifications:read", "stuck": "sessions:read",
}  # fmt: skip
TRANSIENT = ("gpu_hot", "gpu_failing", "store")  # raised, and ended, only after STORYTELLER_ALERT_AFTER
WEBHOOK_TIMEOUT = 5.0  # seconds


class WaitingSession(NamedTuple):
    """A session that waits for StorySwarm."""

    timestamp: int
    prompts: int
    since: int  # ms, when it got its last prompt, or the best estimate
    title: str


@dataclass(frozen=True)
class Situation:
    """A snapshot of all parts of the service. None means not known."""

    gpu: GpuStatus | None = None
    swarmui: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its status
    launches: int = 0
    store: str = ""
    fault: str = ""  # why the store does not answer or refuses writes
    pending: Sequence[Notification] | None = None
    waiting: Sequence[WaitingSession] | None = None
    free: int | None = None  # bytes on the disk of the data folder
    listeners: int = 0


class Observer:
    """Takes snapshots of all parts, and runs nvidia-smi more often while somebody watches the GPU."""

    WATCHED, UNWATCHED = 5.0, 60.0  # seconds between two runs of nvidia-smi
    SCRAPE_LASTS, GPU_WAIT = 30.0, 1.0  # seconds for which a scrape counts as watching; that it waits for nvidia-smi
    SESSIONS = 1000  # the newest, among which it finds those that wait

    def __init__(
        self, settings: Settings, store: Store, gpu: GpuMonitor, swarmui: SwarmUISupervisor, sessions: Sessions,
        notifications: Notifications, count_listeners: Callable[[str | None], int], clock: Clock = time.monotonic,
        wall: Callable[[], int] = now_ms,
    ) -> None:  # fmt: skip
        """`count_listeners`: how many clients listen to that type of events; None: to any."""
        self._settings, self._store, self._gpu, self._swarmui, self._sessions = settings, store, gpu, swarmui, sessions
        self._count_listeners, self._clock, self.wall = count_listeners, clock, wall
        self._lock = threading.Lock()  # for what look() finds in the store
        self._pending = PendingChanges(store, notifications, lambda type, data: None)
        self._changed = ChangedSessions(store, self.SESSIONS)
        self._waiting: dict[int, WaitingSession] = {}
        self._found: tuple[Sequence[Notification], Sequence[WaitingSession]] | None = None  # None: it failed
        self._looked_at, self._took = -math.inf, 0.0  # when the last look began, and how long it took
        self._scraped_at = -math.inf

    def look(self, age: float) -> Situation:
        """Take a snapshot; this waits for the store. `pending` and `waiting` may be `age` seconds old, or 100 times
        the duration of the last look if that is longer, so that looks take at most 1 % of the time."""
        fault, free = "", None
        try:
            self._store.ping()
        except ApiError as error:
            fault = str(error)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self._settings.data_dir).free
        with self._lock:
            began = self._clock()
            oldest = max(age, 100 * self._took) if age else 0.0
            if began - self._looked_at >= oldest or not self._found:
                self._looked_at, self._found = began, None
                with contextlib.suppress(ApiError):  # after a failed ping() too: reads may still succeed
                    for _ in self._pending.look():
                        pass
                    self._find_waiting()
                    self._found, self._pending.is_initial = (self._pending.all(), list(self._waiting.values())), False
                self._took = self._clock() - began
            pending, waiting = self._found or (None, None)
        last, swarmui = self._gpu.last, self._swarmui
        return Situation(
            last[0] if last else None, swarmui.status(), swarmui.launches, self._store.name, fault, pending, waiting,
            free, self._count_listeners(None),
        )  # fmt: skip

    def scrape(self) -> Situation:
        """A new snapshot for a scrape, also of the GPU if its status comes in time."""
        self._scraped_at = self._clock()
        if isinstance(asked := self._gpu.ask(), Future):
            concurrent.futures.wait([asked], timeout=self.GPU_WAIT)
        return self.look(0.0)

    def watch_gpu(self, *, is_bad: bool) -> float:
        """Start a run of nvidia-smi if one is due, which is more often while somebody watches or the status `is_bad`.
        Returns the seconds until it is due; inf if it was started."""
        last, now = self._gpu.last, self._clock()
        is_watched = is_bad or self._count_listeners("gpu") > 0 or now - self._scraped_at < self.SCRAPE_LASTS
        if last and (left := last[1] + (self.WATCHED if is_watched else self.UNWATCHED) - now) > 0:
            return left
        self._gpu.ask()
        return math.inf

    def _find_waiting(self) -> None:
        now = self.wall()
        for stored in self._changed.look():
            before, facts = self._waiting.pop(stored.timestamp, None), self._sessions.facts_of(stored)
            counts = facts.progress
            if not facts.waits or isinstance(counts, str) or counts.ready or not counts.total_beats:
                continue
            # A session of the first look has the age that it says. Later, a new session or prompt has just come.
            since = now
            if self._pending.is_initial:
                since = min(now, max(stored.saved or 0, facts.updated or 0, stored.timestamp))
            elif before and counts.total_prompts <= before.prompts:
                since = before.since
            title = "" if isinstance(facts.summary, str) else facts.summary["analyzedEpisode"]["title"]
            self._waiting[stored.timestamp] = WaitingSession(stored.timestamp, counts.total_prompts, since, title[:60])
        self._waiting = {one: session for one, session in self._waiting.items() if one in self._changed.versions}


# ======================================================================================================
# Alerts: raised and ended
# ======================================================================================================


def find_conditions(seen: Situation, settings: Settings, now: int) -> dict[str, str | None]:
    """What is wrong, by kind of alert: "" for nothing, None for not known. `now` in ms."""

    def overdue(rows: Iterable[tuple[int, str]], minutes: float, noun: str, words: str) -> str:
        late = [name for since, name in rows if 0 < minutes * 60_000 <= now - since <= DAY_MS]
        subject = f"{len(late)} {noun}{'s' if len(late) > 1 else ''}"
        return f"{subject} {words} for {minutes:g} min: {name_some(late)}." if late else ""

    found: dict[str, str | None] = dict.fromkeys(ALERTS)
    found["store"] = seen.fault
    found["swarmui"] = f"SwarmUI failed: {seen.swarmui['lastError']}" if seen.swarmui.get("state") == "failed" else ""
    if gpu := seen.gpu:
        limit, fails = settings.alert_gpu_temperature, gpu.failed and not gpu.is_missing
        found["gpu_failing"] = f"The GPU cannot be read: {gpu.error}" if fails else ""
        is_hot = gpu.available and 0 < limit < gpu.temperature
        hot = f"The GPU is at {gpu.temperature} °C, above {limit:g} °C." if is_hot else ""
        found["gpu_hot"] = None if fails or "temperature" in gpu.unknown else hot
    if seen.free is not None:
        low = f"{seen.free / 10**9:.2f} GB are free for {settings.data_dir}: free space on that disk."
        found["disk"] = low if seen.free < settings.alert_disk * 10**9 else ""
    if seen.pending is not None:
        named = ((one.since, f"{one.type} of session {one.session} (episode {one.episode})") for one in seen.pending)
        found["unacknowledged"] = overdue(named, settings.alert_unacknowledged, "notification", "not acknowledged")
    if seen.waiting is not None:
        titles = ((one, one.title and f"{one.title}, ") for one in seen.waiting)
        named = ((one.since, f"{one.timestamp} ({title}{one.prompts} prompts)") for one, title in titles)
        found["stuck"] = overdue(named, settings.alert_stuck, "session", "without a new prompt")
    return found


@dataclass(frozen=True)
class Alert:
    kind: str
    state: str  # raised or ended
    text: str
    since: int  # ms, when its cause began
    until: int | None = None  # ms, when its cause ended


def alert_json(alert: Alert) -> dict[str, Any]:
    return {**dataclasses.asdict(alert), "since": iso_time(alert.since), "until": alert.until and iso_time(alert.until)}


def format_of(url: str, given: str | None) -> str:
    """The format of alerts for a URL: the `given` one, else that of a known host, else json."""
    host = urllib.parse.urlsplit(url).hostname or ""
    hosts = {"ntfy": r"(.+\.)?ntfy(\..+)?", "discord": r"(.+\.)?discord(app)?\.com", "slack": r"(.+\.)?slack\.com"}
    return (given or next((name for name, pattern in hosts.items() if re.fullmatch(pattern, host)), "json")).lower()


def shape_alert(alert: Alert, format: str) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of the POST."""
    if format == "ntfy":
        priority, tags = ("high", "warning") if alert.state == "raised" else ("default", "white_check_mark")
        headers = {"Title": f"StoryTeller: {alert.kind} {alert.state}", "Priority": priority, "Tags": tags}
        return alert.text.encode("utf-8", "backslashreplace"), {**headers, "Content-Type": "text/plain; charset=utf-8"}
    body = alert_json(alert)
    if format == "discord":
        body = {"content": alert.text[:2000], "allowed_mentions": {"parse": []}}
    elif format == "slack":  # unescaped, <!channel> would notify everybody
        body = {"text": alert.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
    return to_json(body), {"Content-Type": "application/json"}


def call_webhook(url: str, data: bytes | None = None, headers: Mapping[str, str] = {}) -> tuple[bool, str]:
    """Whether the URL answered 2xx; and its status, or why there is none. The URL is a secret, so this text contains
    neither the URL nor the message of an error, which may quote it."""
    try:
        agent = {"User-Agent": f"StoryTeller/{__version__}"}  # Discord refuses Python's own
        status = fetch(url, WEBHOOK_TIMEOUT, data=data, headers={**agent, **headers})[0].status
        return 200 <= status < 300, f"{status} {http.client.responses.get(status, '')}".rstrip()
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = type(error.reason if isinstance(error, urllib.error.URLError) else error).__name__
        known = {"TimeoutError": f"not within {WEBHOOK_TIMEOUT:g} s", "ConnectionRefusedError": "nothing listens there",
                 "gaierror": "its host name is not known",
                 "SSLCertVerificationError": "its TLS certificate is not trusted"}  # fmt: skip
        return False, f"no answer ({known.get(cause, 'the connection failed')})"


def deliver(settings: Settings, alert: Alert) -> tuple[bool, str]:
    """POST an alert. Returns what call_webhook() does."""
    url = settings.alert_url or ""
    return call_webhook(url, *shape_alert(alert, format_of(url, settings.alert_format)))


class Alerts:
    """Raises and ends the alerts of this instance in one loop; two more POST them and send the heartbeat."""

    INTERVAL, RETRY, HEARTBEAT = 1.0, 2.0, 60.0  # seconds between two looks, two tries of a POST, two heartbeats
    KEPT, UNSENT, TRIES = 3, 100, 3  # ended alerts that are shown; alerts that wait for their POST; tries of one

    def __init__(self, settings: Settings, observer: Observer, publish: Publish, clock: Clock = time.monotonic) -> None:
        self._settings, self._observer, self._publish, self._clock = settings, observer, publish, clock
        # Both are replaced, never changed in place, so any thread may read them.
        self.raised: Mapping[str, Alert] = {}  # by kind
        self.ended: tuple[Alert, ...] = ()  # the newest first
        self._looked_at = clock()
        self._changed: dict[str, float] = {}  # by kind: since when the condition differs from `raised`, by the clock
        self._unsent: collections.deque[Alert] = collections.deque()
        self._tries = 0  # of the oldest one
        self._is_beating = True  # the last heartbeat was answered with 2xx
        self._posts = Loop(self._post, "webhooks")  # closing it drops the alerts that are not sent
        self.loops = [Loop(self.look, "alerts")]
        if settings.alert_url:
            self.loops.append(self._posts)
        if settings.heartbeat_url:
            self.loops.append(Loop(self._beat, "heartbeat"))

    def shown(self) -> list[dict[str, Any]]:
        return [alert_json(one) for one in (*self.raised.values(), *self.ended)]

    def look(self) -> float:
        """Raise and end alerts by a new snapshot. Returns the seconds until the next look."""
        age = self.INTERVAL if self.raised else 5 * self.INTERVAL  # so that an end is noticed soon
        found = find_conditions(self._observer.look(age), self._settings, self._observer.wall())
        if self._clock() - self._looked_at > 30:  # the PC slept: a condition has not lasted for that time
            self._changed.clear()
        self._looked_at = self._clock()
        for kind, text in found.items():
            if text is not None:
                self._advance(kind, text)
        is_bad = bool(found["gpu_hot"] or found["gpu_failing"])
        return min(self.INTERVAL, self._observer.watch_gpu(is_bad=is_bad))

    def _advance(self, kind: str, text: str) -> None:
        alert, now = self.raised.get(kind), self._clock()
        if bool(text) == bool(alert):
            self._changed.pop(kind, None)
            if alert and alert.text != text:
                self.raised = {**self.raised, kind: dataclasses.replace(alert, text=text)}
            return
        lasts = now - self._changed.setdefault(kind, now)
        if lasts < self._settings.alert_after and kind in TRANSIENT:
            return
        del self._changed[kind]
        began = self._observer.wall() - int(lasts * 1000)
        others = {name: one for name, one in self.raised.items() if name != kind}
        if alert:
            seconds = max(0, began - alert.since) / 1000  # the clock may have been set back
            lasted = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            alert = dataclasses.replace(alert, state="ended", text=f"Over after {lasted}: {alert.text}", until=began)
            self.raised, self.ended = others, (alert, *self.ended)[: self.KEPT]
        else:
            alert = Alert(kind, "raised", text, began)
            self.raised = {**others, kind: alert}
        log.warning("alerts: %s %s: %s", kind, alert.state, alert.text)
        self._publish("alert", alert_json(alert))
        if self._settings.alert_url and len(self._unsent) < self.UNSENT:  # full after half an hour of failed POSTs
            self._unsent.append(alert)
            self._posts.wake()

    def _post(self) -> float:
        """POST the oldest alert. Returns the seconds until the next turn."""
        if not self._unsent:
            return 3600.0
        is_delivered, answer = deliver(self._settings, self._unsent[0])
        self._tries += 1
        if not is_delivered and self._tries < self.TRIES:
            return self.RETRY
        alert, self._tries = self._unsent.popleft(), 0
        if not is_delivered:
            log.warning("alerts: %s was not delivered to STORYTELLER_ALERT_URL: %s", alert.kind, answer)
        return 0.0

    def _beat(self) -> float:
        began = self._clock()
        is_beating, answer = call_webhook(self._settings.heartbeat_url or "")
        if is_beating != self._is_beating:
            log.warning("alerts: the heartbeat to STORYTELLER_HEARTBEAT_URL now gets: %s", answer)
        self._is_beating = is_beating
        return began + self.HEARTBEAT - self._clock()


# ======================================================================================================
# Metrics
# ======================================================================================================


def labels(**given: str) -> str:
    """Labels in the text format. The values must not need escaping, and none of this service's do."""
    return "{" + ",".join(f'{name}="{value}"' for name, value in given.items()) + "}"


def metrics_text(
    seen: Situation, raised: Container[str], responses: Mapping[tuple[str, str, int], int], seconds: float,
    started_at: int,
) -> bytes:  # fmt: skip
    """The metrics in the text format of Prometheus. One whose value is not known is left out. `responses`: their
    numbers by method, route and status; `seconds`: the time to all of them."""
    gpu = seen.gpu
    units = {"utilization": 0.01, "memory_used": 1 << 20, "memory_total": 1 << 20, "temperature": 1}
    use, used, total, warmest = (
        {"": round(getattr(gpu, name) * unit, 2) if gpu and gpu.available and name not in gpu.unknown else None}
        for name, unit in units.items()
    )
    pending = collections.Counter(one.type for one in seen.pending or ())
    # Name, type, help, and the samples: each has a suffix of the name or labels, and a value, None if not known.
    metrics: tuple[tuple[str, str, str, Mapping[str, float | None]], ...] = (
        ("nvidia_smi_utilization_gpu_ratio", "gauge", "Use of the GPUs, on average.", use),
        ("nvidia_smi_memory_used_bytes", "gauge", "Used memory of all GPUs.", used),
        ("nvidia_smi_memory_total_bytes", "gauge", "Memory of all GPUs.", total),
        ("nvidia_smi_temperature_gpu", "gauge", "Temperature of the warmest GPU in degrees Celsius.", warmest),
        ("storyteller_gpu_up", "gauge", "Whether nvidia-smi finds a GPU.", {"": gpu.available if gpu else None}),
        ("storyteller_swarmui_state", "gauge", "1 for the state that SwarmUI is in.",
         {labels(state=state): state == seen.swarmui.get("state") for state, *_ in _STATES}),
        ("storyteller_swarmui_launches_total", "counter", "Launches of SwarmUI by this service.", {"": seen.launches}),
        ("storyteller_notifications_pending", "gauge", "Notifications that are not acknowledged.",
         {labels(type=type): None if seen.pending is None else pending[type] for type in TOTALS}),
        ("storyteller_notifications_oldest_timestamp_seconds", "gauge", "When the oldest of them was made.",
         {"": min(one.since for one in seen.pending) / 1000 if seen.pending else None}),
        ("storyteller_sessions_waiting", "gauge", "Sessions that wait for prompts by StorySwarm.",
         {"": None if seen.waiting is None else len(seen.waiting)}),
        ("storyteller_store_up", "gauge", "Whether the store answers, and accepts writes.",
         {labels(store=seen.store): not seen.fault}),
        ("storyteller_alerts", "gauge", "1 for an alert that is raised.",
         {labels(kind=kind): kind in raised for kind in ALERTS}),
        ("storyteller_listeners", "gauge", "Clients that listen to events.", {"": seen.listeners}),
        ("storyteller_http_requests_total", "counter", "Responses.",
         {labels(method=method, route=route, status=str(status)): count
          for (method, route, status), count in responses.items()}),
        ("storyteller_http_request_duration_seconds", "summary", "Time to the responses, without waiting for an event.",
         {"_sum": seconds, "_count": sum(responses.values())}),
        ("storyteller_build_info", "gauge", "The version of the service.", {labels(version=__version__): 1}),
        ("process_resident_memory_bytes", "gauge", "Memory of the service.", {"": resident_memory()}),
        ("process_cpu_seconds_total", "counter", "CPU time of the service.", {"": time.process_time()}),
        ("process_start_time_seconds", "gauge", "When the service started.", {"": started_at / 1000}),
    )  # fmt: skip
    lines = []
    for name, type, help, samples in metrics:
        known = [f"{name}{suffix} {value + 0!r}" for suffix, value in samples.items() if value is not None]
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {type}", *known] if known else []
    return "".join(f"{line}\n" for line in lines).encode()


# ======================================================================================================
# HTTP: requests, and what serves them
# ======================================================================================================

MAX_BODY = 50 * 1024 * 1024  # bytes; as much as StoryArt's own server takes

# A subset of JSON Schema: type, enum, minimum, maximum, minLength, maxLength, pattern with ^ and $, items,
# minItems, maxItems, properties, required, additionalProperties: False, anyOf. Error messages describe a schema by its
# `title`, which each schema in an anyOf needs.
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A request whose path parameters, query and body have passed the validation of its route."""

    caller: Caller
    origin: str | None  # the Origin header, if it is an allowed or trusted one
    path: Mapping[str, Any]
    query: Mapping[str, Any]
    waits: list[float]  # gets the seconds of each wait for an event, which metrics do not count
    blocked_by: Reservation | None = None  # the reservation that blocks it, see Route.gated
    last_event_id: str = ""  # the Last-Event-ID header
    body: Any = None
    raw_body: bytes = b""


class Stream:
    """A response body of unknown length: any thread sends parts, and the event loop takes them."""

    LIMIT, SEND_BUFFER = 256 * 1024, 64 * 1024  # bytes: more unsent disconnects the client; the socket's own buffer

    def __init__(self) -> None:
        self._parts: collections.deque[bytes] = collections.deque()
        self._notify: Callable[[], None] = lambda: None
        self._is_chunked = False
        self.is_closed = False  # by the sender or by the client

    def open(self, notify: Callable[[], None], *, is_chunked: bool) -> None:
        """Call `notify` now, and whenever take() has more. `is_chunked`: use HTTP/1.1's chunked transfer coding."""
        self._notify, self._is_chunked = notify, is_chunked
        notify()

    def send(self, part: bytes) -> None:
        if not self.is_closed:
            self._parts.append(part)
            self._notify()

    def close(self) -> None:
        """End the body after the parts sent so far. May be called again."""
        self.is_closed = True
        self._notify()

    def take(self) -> tuple[bytes, bool]:
        """The bytes sent since the last call, and whether they are the last."""
        is_last = self.is_closed
        data = b"".join([self._parts.popleft() for _ in range(len(self._parts))])
        if self._is_chunked:
            data = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + b"0\r\n\r\n" * is_last
            self._is_chunked = not is_last
        return data, is_last


@dataclass(frozen=True)
class Response:
    """Status, body, and the headers that add to COMMON_HEADERS or replace them."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stream: Stream | None = None  # replaces the body

    def whole(self) -> Response:
        """Close the stream, if any, and use the parts sent so far as the body."""
        if not self.stream:
            return self
        self.stream.close()
        return dataclasses.replace(self, body=self.stream.take()[0], stream=None)


# The steps of a request: a generator that yields each future to wait for, and returns the response.
Steps = Generator[Future[Any], None, Response]


def json_response(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    return Response(to_json(body), status, headers)


def _expected(schema: Schema) -> str:
    """Describe a schema in words, for an error message."""
    if "title" in schema:
        return str(schema["title"])
    kind = schema.get("type")
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if kind == "integer":
        return "a whole number" + (f" from {schema['minimum']} to {schema['maximum']}" if "maximum" in schema else "")
    if kind == "string" and "maxLength" in schema:
        pattern = f" of the pattern {schema['pattern'][1:-1]}" if "pattern" in schema else ""
        return f"a string of {schema.get('minLength', 0)} to {schema['maxLength']} characters{pattern}"
    if "minItems" in schema:
        most = schema.get("maxItems")
        return f"an array of {schema['minItems']} to {most}" if most else f"an array of at least {schema['minItems']}"
    return {"string": "a string", "object": "a JSON object", "array": "an array"}.get(str(kind), "another value")


_TYPES = {"string": str, "object": dict, "array": list, "boolean": bool, "null": type(None)}


def _is_valid(value: Any, schema: Schema) -> bool:
    """Whether a value fits the schema. Does not check elements and properties, nor anyOf."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_whole(value) if kind == "integer" else isinstance(value, _TYPES[kind]) for kind in kinds):
        return False
    if value not in schema.get("enum", [value]):
        return False
    if isinstance(value, str):
        shortest, longest = schema.get("minLength", 0), schema.get("maxLength", len(value))
        return bool(shortest <= len(value) <= longest and re.fullmatch(schema.get("pattern", "(?s:.*)"), value))
    if isinstance(value, list):
        return bool(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    return not is_whole(value) or bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))


def validation_error(value: Any, schema: Schema, name: str) -> str | None:
    """Name the first part of a value that violates the schema, and what was expected; None if the value is valid."""
    if not _is_valid(value, schema):
        return f"{name}: expected {_expected(schema)}."
    parts: list[tuple[Any, Schema, str]] = []
    if isinstance(value, list):
        parts = [(part, schema.get("items", {}), f"{name}[{number}]") for number, part in enumerate(value)]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in value:
                return f"{key} is missing: expected {_expected(properties.get(key, {}))}."
        if schema.get("additionalProperties") is False and (unknown := value.keys() - properties.keys()):
            return f"{min(unknown)} is not known: expected {', '.join(properties)}."
        parts = [(value[key], part, key) for key, part in properties.items() if key in value]
    for part in parts:
        if fault := validation_error(*part):
            return fault
    if "anyOf" in schema and all(validation_error(value, option, name) for option in schema["anyOf"]):
        return f"{name}: expected {' or '.join(option['title'] for option in schema['anyOf'])}."
    return None


def parse_parameter(name: str, text: str, schema: Schema) -> Any:
    """Convert a path or query parameter to its schema's type: int or str. Raises BadRequest."""
    value: Any = text
    if schema["type"] == "integer":
        value = int(text) if re.fullmatch(rf"[0-9]{{1,{len(str(schema['maximum']))}}}", text) else None
    if fault := validation_error(value, schema, name):
        raise BadRequest(fault)
    return value


def read_path(environ: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    try:  # Bottle drops bytes that are not UTF-8, and so would match another path
        environ.get("bottle.raw_path", "").encode("latin-1").decode("utf-8")
    except UnicodeError:
        raise BadRequest("The path: expected UTF-8.") from None
    return {name: parse_parameter(name, text, PATH_PARAMETERS[name]) for name, text in given.items()}


def read_query(environ: Mapping[str, Any], declared: Mapping[str, Schema]) -> dict[str, Any]:
    try:
        text = environ.get("QUERY_STRING", "")
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise BadRequest("The query: expected at most 100 parameters in UTF-8.") from None
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in given or not text:
            raise BadRequest(f"{name}: expected one value.")
        given[name] = parse_parameter(name, text, declared[name]) if name in declared else text
    return {name: given.get(name, schema["default"]) for name, schema in declared.items()}


SMALL_BODY = 64 * 1024  # bytes; a larger one is read in the thread pool
LARGE_BODY = 4 * 1024 * 1024  # bytes; larger ones are read one at a time: parsing one delays every other thread


def read_body(environ: Mapping[str, Any], size: int, schema: Schema) -> tuple[dict[str, Any], bytes]:
    """The body as a dict, and as bytes. A top-level property that is null counts as absent. Raises ApiError."""
    if str(environ.get("CONTENT_TYPE") or "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("The body: expected Content-Type application/json.")
    if size > MAX_BODY:
        raise ContentTooLarge(f"The body is too large: {MAX_BODY // 1024**2} MiB at most.")
    raw: bytes = environ["wsgi.input"].read(size)
    try:
        value = parse_json(raw, from_request=True)
    except ValueError as error:
        raise BadRequest(f"The body: expected a JSON object ({error}).") from None
    given = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value
    if fault := validation_error(given, schema, "The body"):
        raise BadRequest(fault)
    return value, raw


POOL_THREADS = 24  # the bulkhead: at most this many requests use the store at once, besides the batchers
POOL_TIMEOUT = 2.0  # seconds that a request may wait for a thread of the pool
LARGE_BODY_TIMEOUT = 30.0  # seconds that it may wait for the thread that reads large bodies

Check = tuple[tuple[str, ...], int, bool]  # the types, limit and batch of a request to /notifications/check
Outcome = Response | ApiError | Future[Any]  # what a batcher answers; the result of the Future is an Outcome again


class Services:
    """The parts of the service, as every handler gets them. Owns the batchers, thread pools and background loops."""

    WATCH_INTERVAL = 5.0  # seconds between two probes of the store

    def __init__(
        self, settings: Settings, store: Store, gpu: GpuMonitor, swarmui: SwarmUISupervisor, reservations: Reservations
    ) -> None:
        self.settings, self.store, self.gpu, self.swarmui = settings, store, gpu, swarmui
        self.reservations, self.authenticator = reservations, Authenticator(settings, store)
        self.sessions, self.notifications = Sessions(store), Notifications(store)
        self.bridge = Bridge(store, self.sessions) if isinstance(store, BridgedStore) else None
        self.live = Live(self)
        observed = settings, store, gpu, swarmui, self.sessions, self.notifications
        self.observer = Observer(*observed, self.live.count_listeners)
        self.alerts = Alerts(settings, self.observer, self.live.publish)
        self.started_at = now_ms()
        # Of the responses so far, the numbers by method, route and status, and the time to all. Only the loop counts.
        self.responses, self.response_seconds = collections.Counter[tuple[str, str, int]](), 0.0
        self.pool = ThreadPoolExecutor(POOL_THREADS, "pool")
        self.large_bodies = ThreadPoolExecutor(1, "large-bodies")
        # The questions to `progress` are timestamps of sessions, those to `acknowledgements` ids of notifications.
        self.checks = Batcher[Check, Outcome](functools.partial(answer_checks, self), "checks")
        self.progress = Batcher[int, Outcome](functools.partial(answer_progress, self), "progress")
        self.creations = Batcher[Draft, tuple[Notification, bool]](self.notifications.create, "creations")
        self.acknowledgements = Batcher[str, bool](self.notifications.acknowledge_own, "acknowledge")
        self.scrapes = Batcher[None, Outcome](functools.partial(answer_scrapes, self), "scrapes")
        loops = Loop(self._watch, "store-watch"), Loop(self._check_tokens, "tokens"), *self.alerts.loops
        self._background: list[Loop | Bridge] = [*loops, *filter(None, [self.bridge])]
        self.ending_tokens: str | None = None  # from ending_tokens(); None while unknown
        self._warned_at = -math.inf  # when the log last warned of them, by time.perf_counter()

    def start(self) -> None:
        for loop in self._background:
            loop.start()

    def _watch(self) -> float:
        """Try a write, unless the last one succeeded; report expired notifications."""
        with contextlib.suppress(Unavailable):  # each request reports the reason itself
            if self.store.writes.refusal != "":
                self.store.try_write()
            self.notifications.report_expired()
        return self.WATCH_INTERVAL

    def _check_tokens(self) -> float:
        """Find the tokens that end soon, and warn once a day. A slow search, as in a large Redis, is repeated less."""
        began, ending = time.perf_counter(), None  # time.monotonic() has ticks of 16 ms on Windows
        with contextlib.suppress(Unavailable):
            ending = ending_tokens(self.store, now_ms())
        self.ending_tokens, took = ending, time.perf_counter() - began
        if ending and began - self._warned_at >= 86_400:
            self._warned_at = began
            log.warning("authentication: tokens end soon: %s: %s", ending, RENEW_ADVICE)
        return self.WATCH_INTERVAL if ending is None else max(self.WATCH_INTERVAL, 500 * took)

    def close(self) -> None:
        """End the threads. What the pools have not begun is dropped; all else ends within the timeouts of the store."""
        self.live.close(timeout=0.5)
        for loop in self._background:
            loop.close()
        for batcher in (self.checks, self.progress, self.creations, self.acknowledgements, self.scrapes):
            batcher.close(timeout=0.5)
        for pool in (self.pool, self.large_bodies):
            pool.shutdown(wait=False, cancel_futures=True)

    def sync_latest(self, *, whole: bool = False) -> None:
        """Call Bridge.sync_latest(), if there is a bridge. Do so before you read sessions."""
        if self.bridge:
            self.bridge.sync_latest(whole=whole)

    def sync(self, stored: StoredSession | None, *, whole: bool = False) -> StoredSession | None:
        """Bring the session's copies in step by Bridge.sync(); without a bridge, return the session unchanged."""
        return self.bridge.sync(stored, whole=whole) if stored and self.bridge else stored

    def submit(self, function: Callable[..., T], *arguments: Any, is_large: bool = False) -> Future[T]:
        """Call `function` in a thread pool, even if the client leaves. Unavailable when no thread is free in time."""
        deadline = time.monotonic() + (LARGE_BODY_TIMEOUT if is_large else POOL_TIMEOUT)
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()

        def work() -> T:
            if time.monotonic() > deadline:
                raise Unavailable("Too many requests wait for a free thread: try again.", 1)
            return function(*arguments)

        (self.large_bodies if is_large else self.pool).submit(settle_by, result, work)
        return result


# ======================================================================================================
# HTTP: handlers
# ======================================================================================================


def health(services: Services, request: Request) -> Response:
    name = services.store.name
    try:
        services.store.ping()
        return json_response({"status": "ok", "store": name})
    except Unavailable as error:
        return json_response({"status": "degraded", "store": name}, error.status)


def openapi(services: Services, request: Request) -> Response:
    return json_response(describe_api())


def page(services: Services, request: Request) -> Response:
    return Response(PAGE.encode(), 200, page_headers())


def metrics(services: Services, request: Request) -> Future[Any]:
    return services.scrapes.ask(None)


def answer_scrapes(services: Services, _: Sequence[None]) -> list[Outcome]:
    """A batcher's step: all waiting scrapes share one response."""
    seen, raised, responses = services.observer.scrape(), services.alerts.raised, dict(services.responses)
    text = metrics_text(seen, raised, responses, services.response_seconds, services.started_at)
    return [Response(text, 200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})]


def gpu_json(status: GpuStatus) -> dict[str, Any]:
    keys = ["available", "gpuCount", "utilization", "memoryUsed", "memoryTotal", "temperature", "processCount", "error"]
    return dict(zip(keys, vars(status).values()))  # the first fields of GpuStatus, in their order


def gpu_status(services: Services, request: Request) -> Steps:
    status = yield from awaited(services.gpu.ask())
    if request.blocked_by and not status.failed:
        status = dataclasses.replace(status, available=False, error=request.blocked_by.description)
    return json_response(gpu_json(status), 500 if status.failed else 200)


def reservation_json(reservation: Reservation) -> dict[str, Any]:
    times = {"since": iso_time(reservation.since), "expiresAt": iso_time(reservation.expires)}
    return {"fence": reservation.fence, "holder": reservation.holder, "purpose": reservation.purpose, **times}


def refuse(services: Services, other: Reservation, **shape: Any) -> Response:
    """409 for a request that `other` blocks."""
    body = {**shape, "error": f"The GPU is {other.description}: try again then.", **reservation_json(other)}
    del body["fence"]
    return json_response(body, 409, {"Retry-After": str(max(1, math.ceil(services.reservations.seconds_left)))})


def reservation_create(services: Services, request: Request) -> Steps:
    body, id = request.body, secrets.token_urlsafe(32)
    digest, ttl, wait = digest_of(id), int(body["ttlSeconds"]), body.get("waitSeconds") or 0

    def take(known: Reservation | None, now: int, fence: int) -> Reservation | None:
        given = (digest, body["holder"], body.get("purpose"), ttl)
        return None if known else Reservation(*given, now, now + ttl * 1000, fence)

    stored = yield from awaited(services.reservations.ask(take, wait), request.waits)
    if stored.digest != digest:
        return refuse(services, stored)
    return json_response({"reservationId": id, **reservation_json(stored)}, 201)


def reservation_show(services: Services, request: Request) -> Steps:
    known = yield from awaited(services.reservations.ask())
    return json_response({"reservation": known and reservation_json(known)})


def reservation_renew(services: Services, request: Request) -> Steps:
    change = functools.partial(renewed, digest_of(request.path["reservation_id"]), None)
    known = yield from awaited(services.reservations.ask(change))
    return json_response(reservation_json(known))


def reservation_end(services: Services, request: Request) -> Steps:
    """End that of the path's id; anybody's, if the path has none."""
    id = request.path.get("reservation_id")
    yield from awaited(services.reservations.ask(functools.partial(renewed, id and digest_of(id), 0)))
    return Response(b"", 204)


def swarmui_start(services: Services, request: Request) -> Steps:
    """Security: no part of the request may reach the command line of SwarmUI."""
    settings = services.settings
    if request.blocked_by:
        return refuse(services, request.blocked_by, success=False)
    started: Probe = yield from awaited(services.swarmui.start(), request.waits)
    text, port, url = started.message, settings.swarmui_port, settings.swarmui_api_url
    if request.origin and not {"*", request.origin} & {settings.swarmui_allow_origin, started.allow_origin}:
        who = started.allow_origin or "no page"
        text += f"; but pages of {request.origin} cannot use it, as it allows {who}: set SWARMUI_ALLOW_ORIGIN"
    return json_response({"success": True, "message": text, "port": port, "apiUrl": url})


def swarmui_stop(services: Services, request: Request) -> Steps:
    stopped = services.swarmui.stop(force=request.query["force"] == "true")
    message: str = yield from awaited(stopped, request.waits)
    return json_response({"success": True, "message": message})


def swarmui_status(services: Services, request: Request) -> Response:
    return json_response(services.swarmui.status())


def swarmui_logs(services: Services, request: Request) -> Response:
    lines = tail(services.settings.data_dir / SWARMUI_LOG, 1 << 20)[-request.query["lines"] :]
    return Response("".join(f"{line}\n" for line in lines).encode(), 200, {"Content-Type": "text/plain; charset=utf-8"})


NO_NOTIFICATIONS = b'{"notifications":[]}'


def notifications_check(services: Services, request: Request) -> Steps | Future[Any]:
    kind, limit, wait = request.query["type"], request.query["limit"], request.query["wait"]
    check = tuple(TOTALS) if kind == "all" else (kind,), limit, request.query["batch"] == "true"
    return services.live.wait(check, wait, request.waits) if wait else services.checks.ask(check)


def notification_create(services: Services, request: Request) -> Steps:
    body, names = request.body, ("storyUuid", "episodeNumber", *TOTALS.values())
    given = {name: body[name] for name in names if body.get(name) is not None}
    fields = {name: int(value) if is_whole(value) else value for name, value in given.items()}
    draft = Draft(body["type"], int(body["sessionTimestamp"]), fields)
    made: tuple[Notification, bool] = yield from awaited(services.creations.ask(draft))
    notification, is_new = made
    if is_new:
        services.live.note(notification)
    return Response(notification.text, 201 if is_new else 200)


def notification_ack(services: Services, request: Request) -> Steps:
    id = request.path["notification_id"]
    is_done: bool = yield from awaited(services.acknowledgements.ask(id))
    if not is_done:  # the search for an id that another program made takes longer
        found: list[str] = yield from awaited(services.submit(services.notifications.acknowledge, [id]))
        if not found:
            raise NotFound("Notification not found")
    services.live.note(id)
    return json_response({"success": True, "notificationId": id})


def notification_ack_all(services: Services, request: Request) -> Response:
    wanted = list(dict.fromkeys(request.body["ids"]))
    valid = [id for id in wanted if re.fullmatch(r"[^\ud800-\udfff]+", id)]  # UTF-8 has no half surrogate pairs
    done = dict.fromkeys(services.notifications.acknowledge(valid))
    services.live.note(*done)
    missing = [id for id in wanted if id not in done]
    return json_response({"success": True, "acknowledged": list(done), "notFound": missing})


def notification_delete(services: Services, request: Request) -> Response:
    id = request.path["notification_id"]
    if not services.notifications.remove(id):
        raise NotFound("Notification not found")
    services.live.note(id)
    return json_response({"success": True, "notificationId": id})


# Each type of event, and the permission that a client needs to get it.
EVENTS: Mapping[str, str] = {
    "state": "events:read", "notification": "notifications:read", "acknowledged": "notifications:read",
    "session": "sessions:read", "gpu": "gpu:read", "reservation": "gpu:read", "swarmui": "swarmui:read",
    "alert": "events:read",
}  # fmt: skip


def events(services: Services, request: Request) -> Future[Response]:
    wanted = request.query["types"].split(",") if request.query["types"] else []
    allowed = [name for name in EVENTS if request.caller.may(EVENTS[name])]
    if lacking := [EVENTS[name] for name in wanted if name not in allowed]:
        raise Forbidden(f"This token lacks the permission {lacking[0]}.")
    return services.live.join(request.caller, frozenset(wanted or allowed), request.last_event_id)


def prompts_status(services: Services, request: Request) -> Future[Any]:
    return services.progress.ask(request.path["timestamp"])


def answer_checks(services: Services, checks: list[Check]) -> list[Outcome]:
    """A batcher's step: all checks share one snapshot of the store. A check that needs more reads runs in the pool."""

    def respond(check: Check, found: Sequence[Notification]) -> Response:
        _, limit, is_batched = check
        texts = newest_of_each(found)[:limit] if is_batched else [one.text for one in found]
        return Response(b'{"notifications":[%b]}' % b",".join(texts))

    def read_more(check: Check, query: tuple[Sequence[str], int]) -> Response:
        return respond(check, services.notifications.check(*query))

    queries = [(types, LARGEST if is_batched else limit) for types, limit, is_batched in checks]
    return [
        services.submit(read_more, check, query) if found is None else respond(check, found)
        for check, query, found in zip(checks, queries, services.notifications.check_many(queries))
    ]


def answer_progress(services: Services, timestamps: list[int]) -> list[Outcome]:
    """A batcher's step: all questions about one session share one read. Work that takes longer than a SHA-256 runs in
    the pool: an announcement, copies that are not in step, a document that is not in the cache."""

    def respond(stored: StoredSession | ApiError | None) -> Outcome:
        if not isinstance(stored, StoredSession):
            return stored or NotFound("Session not found")
        facts = services.sessions.cached(stored)
        if facts is None or not stored.is_in_step or is_announcement_due(stored, facts):
            return services.submit(announce_progress, services, stored)
        return progress_response(stored, facts)

    services.sync_latest()
    return list(map(respond, services.store.read_sessions(timestamps)))


def is_announcement_due(stored: StoredSession, facts: Facts) -> bool:
    """Whether the prompts are complete but not announced: StorySwarm may write them straight to Redis."""
    counts = facts.progress
    return facts.waits and isinstance(counts, Progress) and counts.ready and stored.announced != "prompts_ready"


def announce_progress(services: Services, asked: StoredSession) -> Outcome:
    stored = services.sync(asked)
    if stored is None:
        return NotFound("Session not found")
    facts = services.sessions.facts_of(stored)
    if stored.is_in_step and is_announcement_due(stored, facts):  # else StoryArt's copy may lack them
        try:
            if draft := due_notification(stored.timestamp, read_session(stored.document)):
                services.store.announce(draft)
                services.live.look_soon()
        except Unavailable as error:
            log.warning("notifications: session %d is announced by a later poll: %s", stored.timestamp, error)
    return progress_response(stored, facts)


def last_update(stored: StoredSession, facts: Facts) -> str:
    times = [ms for ms in (stored.saved, facts.updated) if ms is not None]
    return iso_time(max(times, default=stored.timestamp))


def progress_response(stored: StoredSession, facts: Facts) -> Outcome:
    counts = facts.progress
    if not isinstance(counts, Progress):
        return ApiError(f"Session {stored.timestamp} cannot be read ({counts}): save it again.")
    shown = {"promptsReady": counts.ready, "sessionTimestamp": stored.timestamp, "totalBeats": counts.total_beats}
    return json_response({**shown, "totalPrompts": counts.total_prompts, "lastUpdated": last_update(stored, facts)})


# ======================================================================================================
# HTTP: handlers of sessions and tokens
# ======================================================================================================


def _session_response(services: Services, request: Request, found: StoredSession | None, missing: str) -> Response:
    """Send the bytes of the document as they are stored, which saves parsing it. A page gets StoryArt's dialect."""
    stored = services.sync(found, whole=True)
    if stored is None:
        raise NotFound(missing)
    if fault := services.sessions.facts_of(stored).fault:
        raise ApiError(f"Session {stored.timestamp} cannot be read ({fault}): save it again.")
    document, name = stored.document or b"", services.store.name.encode()
    for copy in (services.store.storyarts_copy(stored.timestamp), document) if request.origin else ():
        with contextlib.suppress(ValueError):  # the copy is not a session
            value = read_session(copy)
            document = to_json(value) if to_storyart(value, stored.timestamp, lambda: None) else copy or b""
            break
    return Response(b'{"success":true,"data":%b,"storage":"%b"}' % (document, name))


def session_get(services: Services, request: Request) -> Response:
    services.sync_latest()
    return _session_response(services, request, services.store.session(request.path["timestamp"]), "Session not found")


def session_latest(services: Services, request: Request) -> Response:
    services.sync_latest(whole=True)
    return _session_response(services, request, services.sessions.latest(), "No session found")


def session_list(services: Services, request: Request) -> Response:
    listed = itertools.islice(services.sessions.listed(), request.query["limit"])
    sessions = [{"timestamp": timestamp, **shown} for timestamp, shown in listed]
    return json_response({"success": True, "count": len(sessions), "sessions": sessions})


def session_save(services: Services, request: Request) -> Response:
    """A session without a timestamp gets the first free one from now on: two saves in one ms are two sessions."""
    if request.body.get("timestamp") is not None:
        return _save(services, request, int(request.body["timestamp"]), by_storyart=True)
    now = now_ms()
    for timestamp in range(now, now + 1000):
        with contextlib.suppress(Conflict):
            return _save(services, request, timestamp, by_storyart=True, replace=False)
    raise Unavailable("Every timestamp of the next second is taken: save again.", 1)


def session_put(services: Services, request: Request) -> Response:
    timestamp = request.path["timestamp"]
    if request.body.get("timestamp") not in (None, timestamp):
        raise BadRequest(f"timestamp: expected {timestamp}, as in the path, or none.")
    return _save(services, request, timestamp, by_storyart=False)


def session_delete(services: Services, request: Request) -> Response:
    timestamp = request.path["timestamp"]
    if not services.store.remove_session(timestamp):
        raise NotFound("Session not found")
    services.live.look_soon()
    return json_response({"success": True, "sessionTimestamp": timestamp})


def _save(services: Services, request: Request, timestamp: int, *, by_storyart: bool, replace: bool = True) -> Response:
    """Raises Conflict if the session exists and `replace` is False."""
    document, text = request.body, request.raw_body
    if document.get("timestamp") is None:
        document = {**document, "timestamp": timestamp}
        text = to_json(document)
    storyart, draft = text, due_notification(timestamp, document)
    services.sync_latest()
    if services.bridge:
        with contextlib.suppress(ValueError):  # a document with invalid beats is stored unchanged
            _check_shape(document, _PROGRESS_SHAPE)
            if to_storyart(document, timestamp, lambda: _read_storyarts_copy(services, timestamp)):
                storyart = to_json(document)
    if not services.store.save(timestamp, Change(text, storyart, by_storyart, draft), replace=replace):
        raise Conflict(f"Session {timestamp} exists.")
    services.live.look_soon()
    body = {"success": True, "message": "Session saved", "sessionKey": f"session:{timestamp}"}
    return json_response({**body, "storage": services.store.name})


def _read_storyarts_copy(services: Services, timestamp: int) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):  # there is no copy, or it is not a session: it will be replaced
        return read_session(services.store.storyarts_copy(timestamp))
    return None


def caller_json(caller: Caller) -> dict[str, Any]:
    expires = None if caller.expires is None else iso_time(caller.expires)
    return {"subject": caller.subject, "permissions": list(caller.permissions), "expiresAt": expires}


def token_create(services: Services, request: Request) -> Response:
    body, ttl = request.body, int(request.body.get("ttlSeconds") or TOKEN_TTL)
    token, caller = issue_token(services.store, body["subject"], body["permissions"], ttl, now_ms())
    log.info("authentication: %s issued a token for %s, valid for %d s", request.caller.subject, caller.subject, ttl)
    return json_response({"token": token, **caller_json(caller)}, 201)


def token_show(services: Services, request: Request) -> Response:
    return json_response(caller_json(request.caller))


def token_revoke(services: Services, request: Request) -> Response:
    if request.caller.digest is None:
        raise Conflict("No session token was sent, so there is none to revoke.")
    services.authenticator.revoke(request.caller.digest)
    log.info("authentication: %s revoked its token", request.caller.subject)
    return Response(b"", 204)


# ======================================================================================================
# HTTP: routes
# ======================================================================================================


@dataclass(frozen=True)
class Route:
    """One endpoint: the source of the validation of its requests and of its part of /openapi.json."""

    method: str
    path: str
    handler: Callable[[Services, Request], Response | Future[Response] | Steps]
    permission: str  # one of PERMISSIONS; or "any" for every identified caller, "open" for everybody
    summary: str
    responses: Mapping[int, Schema | None]  # by status; None: no body
    error_shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # properties of errors besides `error`
    errors: tuple[int, ...] = ()  # statuses in addition to those in error_statuses()
    query: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    body: Schema | None = None
    gated: bool = False  # with STORYTELLER_RESERVATION_GATES, a reservation blocks requests that do not send its id
    in_pool: bool = False  # the handler blocks or computes, so it runs in the thread pool

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return re.sub(r"<(\w+)>", r"{\1}", self.path)


def _schema(kind: str | list[str], example: Any, **limits: Any) -> Schema:
    return {"type": kind, **limits, "examples": [example]}


def _object(**properties: Schema) -> dict[str, Any]:
    """An object with exactly these properties, all of them required."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _body(required: Sequence[str], either: Sequence[Schema] = (), **properties: Schema) -> dict[str, Any]:
    """An object that may have other properties too. It must also fit one of `either`, each of which has a `title`."""
    needed = {"required": list(required)} if required else {}
    return {"type": "object", **needed, "properties": properties, **({"anyOf": list(either)} if either else {})}


def _array(items: Schema, **limits: Any) -> Schema:
    return {"type": "array", **limits, "items": items}


_TIMESTAMP = _schema("integer", 1738195200000, minimum=0, maximum=99_999_999_999_999)
_COUNT = _schema("integer", 48, minimum=0, maximum=1_000_000)
_UUID = "59f64b1e-726a-439d-a6bc-0dfefcababdb"
_STORY = _schema("string", _UUID, maxLength=200)
_ID = _schema("string", "notif_1738195200000_0123456789abcdef", minLength=1, maxLength=200, pattern=f"^{ID_PATTERN}$")
_TIME = _schema("string", "2026-01-29T10:00:00Z")
_TEXT = _schema("string", "...")
_TEXT_OR_NULL = _schema(["string", "null"], None)
_NUMBER_OR_NULL = _schema(["integer", "null"], None)
_FLAG = _schema("boolean", True)
_OBJECT = _schema("object", {})
_ANY: Schema = {"examples": [None]}
_TYPE: Schema = {"type": "string", "enum": list(TOTALS)}
_STORE: Schema = {"enum": ["redis", "sqlite"]}
_PERMISSION: Schema = {"type": "string", "enum": list(PERMISSIONS)}

PATH_PARAMETERS: Mapping[str, Schema] = {"timestamp": _TIMESTAMP, "notification_id": _ID, "reservation_id": _TEXT}

_SESSION = _body(
    [],
    [{"title": name, "properties": {name: {"type": kind}}, "required": [name]}
     for name, kind in (("scriptText", "string"), ("analyzedEpisode", "object"))],
    timestamp=_TIMESTAMP, scriptText=_TEXT, episodeContext=_TEXT, storyUuid=_TEXT,
    analyzedEpisode=_schema("object", {"scenes": []}), promptMode=_schema("string", "storyswarm"),
    retrievalMode=_TEXT, selectedLLM=_TEXT,
)  # fmt: skip
_SAVED = _object(success=_FLAG, message=_TEXT, sessionKey=_TEXT, storage=_STORE)
_WHOLE_SESSION = _object(success=_FLAG, data=_OBJECT, storage=_STORE)
_SCENE = _object(sceneNumber=_ANY, title=_TEXT, totalBeats=_COUNT)
_EPISODE = _object(episodeNumber=_ANY, title=_TEXT, scenes=_array(_SCENE))
_SUMMARY = _object(timestamp=_TIMESTAMP, storyUuid=_TEXT, promptMode=_TEXT, scriptText=_TEXT, analyzedEpisode=_EPISODE)
_PROMPTS = _object(
    promptsReady=_FLAG, sessionTimestamp=_TIMESTAMP, totalBeats=_COUNT, totalPrompts=_COUNT, lastUpdated=_TIME
)

# Each type requires its own total.
_NEW_NOTIFICATION = _body(
    ["type", "sessionTimestamp", "storyUuid", "episodeNumber"],
    [{"title": f"{total} with {kind}", "properties": {"type": {"enum": [kind]}, total: {"type": "integer"}},
      "required": [total]} for kind, total in TOTALS.items()],
    type=_TYPE, sessionTimestamp=_TIMESTAMP, storyUuid=_STORY, episodeNumber=_COUNT, totalPrompts=_COUNT,
    totalBeats=_COUNT,
)  # fmt: skip
_NOTIFICATION: Schema = {
    **_object(
        id=_ID, type=_TYPE, sessionTimestamp=_schema("integer", 1738195200000), storyUuid=_schema("string", _UUID),
        episodeNumber=_schema("integer", 2), **{total: _schema("integer", 48) for total in TOTALS.values()},
        timestamp=_TIME, count=_schema("integer", 1), ids=_array(_schema("string", "notif_1")),
    ),
    "required": ["id", "type", "sessionTimestamp", "storyUuid", "episodeNumber", "timestamp"],
}  # fmt: skip

_END = _schema(["string", "null"], "2026-01-29T22:00:00Z")
_CALLER = _object(subject=_schema("string", "storyart"), permissions=_array(_PERMISSION), expiresAt=_END)
_NEW_TOKEN = _body(
    ["subject", "permissions"],
    subject=_schema("string", "storyart", minLength=1, maxLength=64, pattern=f"^{SUBJECT_PATTERN}$"),
    permissions=_array(_PERMISSION, minItems=1),
    ttlSeconds=_schema("integer", TOKEN_TTL, minimum=TOKEN_TTL_RANGE[0], maximum=TOKEN_TTL_RANGE[1]),
)

_CHECK_QUERY: Mapping[str, Schema] = {
    "limit": _schema("integer", 100, minimum=1, maximum=1000, default=100),
    "type": _schema("string", "all", enum=[*TOTALS, "all"], default="prompts_ready"),
    "wait": _schema("integer", 4, minimum=0, maximum=60, default=0),
    "batch": _schema("string", "true", enum=["true", "false"], default="false"),
}
_ANY_EVENT, _SOME_EVENTS = "|".join(EVENTS), f"some of {', '.join(EVENTS)}, with commas between them"
_EVENTS_PATTERN = f"^({_ANY_EVENT})(,({_ANY_EVENT}))*$"
_EVENTS_QUERY: Mapping[str, Schema] = {
    "types": _schema("string", "gpu,alert", title=_SOME_EVENTS, maxLength=200, pattern=_EVENTS_PATTERN, default="")
}
_ANY_ID = _schema("string", "notif_1", minLength=1, maxLength=200)
_ACKNOWLEDGED = _body(["ids"], ids=_array(_ANY_ID, minItems=1, maxItems=1000))
_STOP_QUERY: Mapping[str, Schema] = {"force": _schema("string", "false", enum=["true", "false"], default="false")}
_LOGS_QUERY: Mapping[str, Schema] = {"lines": _schema("integer", 200, minimum=1, maximum=5000, default=200)}
_LIST_QUERY: Mapping[str, Schema] = {"limit": _schema("integer", 5, minimum=1, maximum=1000, default=200)}

_GPU_FIGURES = {name: _schema("integer", 8) for name in gpu_json(GpuStatus())}
_GPU = _object(**{**_GPU_FIGURES, "available": _FLAG, "error": _TEXT_OR_NULL})
_HOLDER: Mapping[str, Schema] = {
    "holder": _schema("string", "storyart"), "purpose": _schema(["string", "null"], "episode 2"),
    "since": _TIME, "expiresAt": _TIME,
}  # fmt: skip
_RESERVATION = _object(fence=_TIMESTAMP, **_HOLDER)
_NEW_RESERVATION = _body(
    ["holder", "ttlSeconds"], holder=_schema("string", "storyart", minLength=1, maxLength=100),
    waitSeconds=_schema("integer", 5, minimum=0, maximum=60),
    ttlSeconds=_schema("integer", 60, minimum=1, maximum=3600), purpose=_schema("string", "render", maxLength=200),
)  # fmt: skip
_STARTED = _object(success=_FLAG, message=_TEXT, port=_schema("integer", 7801), apiUrl=_TEXT)
_QUEUE = {**_object(**dict.fromkeys(COUNTS, _COUNT)), "type": ["object", "null"]}
_SWARMUI = _object(
    state={"enum": [state for state, *_ in _STATES]}, since=_TIME, ours=_schema(["boolean", "null"], True),
    pid=_NUMBER_OR_NULL, port=_schema("integer", 7801), apiUrl=_TEXT, version=_TEXT_OR_NULL, startedAt=_TEXT_OR_NULL,
    startingFor=_NUMBER_OR_NULL, lastError=_TEXT_OR_NULL, idleFor=_NUMBER_OR_NULL, queue=_QUEUE,
    backends={**_object(**dict.fromkeys(BACKENDS, _TEXT)), "type": ["object", "null"]}, logTail=_array(_TEXT),
)  # fmt: skip
_HEALTH = _object(status={"enum": ["ok", "degraded"]}, store=_STORE)

_FAILED = {"success": False}
_API = "/api/v1"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/health", health, "open", "Do the service and its store answer?",
          {200: _HEALTH, 503: _HEALTH}, in_pool=True),
    Route("GET", "/openapi.json", openapi, "open", "This description.", {200: _OBJECT}),
    Route("GET", "/", page, "open", "The status page.", {200: {**_TEXT, "contentMediaType": "text/html"}}),
    Route("GET", "/metrics", metrics, "metrics:read", "Metrics for Prometheus.",
          {200: {**_TEXT, "contentMediaType": "text/plain"}}),
    Route("GET", f"{_API}/gpu/status", gpu_status, "gpu:read", "Is the GPU free?", {200: _GPU}, gpu_json(GpuStatus()),
          gated=True),
    Route("POST", f"{_API}/gpu/reservation", reservation_create, "gpu:reserve", "Reserve the GPU.",
          {201: _object(reservationId=_TEXT, **_RESERVATION["properties"]), 409: _object(error=_TEXT, **_HOLDER)},
          body=_NEW_RESERVATION),
    Route("GET", f"{_API}/gpu/reservation", reservation_show, "gpu:read", "Who has reserved the GPU?",
          {200: _object(reservation={**_RESERVATION, "type": ["object", "null"]})}),
    Route("DELETE", f"{_API}/gpu/reservation", reservation_end, "admin", "End any reservation.",
          {204: None}, errors=(404,)),
    Route("PUT", f"{_API}/gpu/reservation/<reservation_id>", reservation_renew, "gpu:reserve", "Renew a reservation.",
          {200: _RESERVATION}, errors=(404,)),
    Route("DELETE", f"{_API}/gpu/reservation/<reservation_id>", reservation_end, "gpu:reserve", "End a reservation.",
          {204: None}, errors=(404,)),
    Route("POST", f"{_API}/swarmui/start", swarmui_start, "swarmui:control", "Start SwarmUI.",
          {200: _STARTED, 409: _object(success={"enum": [False]}, error=_TEXT, **_HOLDER)}, _FAILED, gated=True),
    Route("GET", f"{_API}/swarmui/status", swarmui_status, "swarmui:read", "The state of SwarmUI.",
          {200: _SWARMUI}, in_pool=True),
    Route("POST", f"{_API}/swarmui/stop", swarmui_stop, "swarmui:control", "Stop SwarmUI.",
          {200: _object(success=_FLAG, message=_TEXT)}, _FAILED, (409,), query=_STOP_QUERY),
    Route("GET", f"{_API}/swarmui/logs", swarmui_logs, "swarmui:read", "The last lines of SwarmUI's log.",
          {200: {**_TEXT, "contentMediaType": "text/plain"}}, query=_LOGS_QUERY, in_pool=True),
    Route("GET", f"{_API}/notifications/check", notifications_check, "notifications:read",
          "Pending notifications, oldest first.", {200: _object(notifications=_array(_NOTIFICATION))},
          query=_CHECK_QUERY),
    Route("POST", f"{_API}/notifications/ack", notification_ack_all, "notifications:read", "Acknowledge notifications.",
          {200: _object(success=_FLAG, acknowledged=_array(_ID), notFound=_array(_TEXT))}, _FAILED,
          body=_ACKNOWLEDGED, in_pool=True),
    Route("GET", f"{_API}/events", events, "events:read", "Changes, as server-sent events.",
          {200: {**_TEXT, "contentMediaType": "text/event-stream"}}, query=_EVENTS_QUERY),
    Route("POST", f"{_API}/notifications", notification_create, "notifications:write", "Create a notification.",
          {201: _NOTIFICATION, 200: _NOTIFICATION}, body=_NEW_NOTIFICATION),
    Route("POST", f"{_API}/notifications/<notification_id>/ack", notification_ack, "notifications:read",
          "Acknowledge a notification.", {200: _object(success=_FLAG, notificationId=_ID)}, _FAILED, (404,)),
    Route("DELETE", f"{_API}/notifications/<notification_id>", notification_delete, "notifications:write",
          "Remove a notification.", {200: _object(success=_FLAG, notificationId=_ID)}, _FAILED, (404,), in_pool=True),
    Route("GET", f"{_API}/session/<timestamp>/prompts-status", prompts_status, "sessions:read",
          "Are the prompts of a session complete?", {200: _PROMPTS}, {"promptsReady": False}, (404,)),
    Route("POST", f"{_API}/session/save", session_save, "sessions:write", "Save a session.",
          {200: _SAVED}, _FAILED, body=_SESSION, in_pool=True),
    Route("GET", f"{_API}/session/latest", session_latest, "sessions:read", "The newest session.",
          {200: _WHOLE_SESSION}, _FAILED, (404,), in_pool=True),
    Route("GET", f"{_API}/session/list", session_list, "sessions:read", "Summaries of sessions, newest first.",
          {200: _object(success=_FLAG, count=_COUNT, sessions=_array(_SUMMARY))}, _FAILED, query=_LIST_QUERY,
          in_pool=True),
    Route("GET", f"{_API}/session/<timestamp>", session_get, "sessions:read", "A whole session.",
          {200: _WHOLE_SESSION}, _FAILED, (404,), in_pool=True),
    Route("PUT", f"{_API}/session/<timestamp>", session_put, "sessions:write", "Create or replace a session.",
          {200: _SAVED}, _FAILED, body=_SESSION, in_pool=True),
    Route("DELETE", f"{_API}/session/<timestamp>", session_delete, "sessions:write", "Remove a session.",
          {200: _object(success=_FLAG, sessionTimestamp=_TIMESTAMP)}, _FAILED, (404,), in_pool=True),
    Route("POST", f"{_API}/auth/session", token_create, "admin", "Create a session token.",
          {201: _object(token=_TEXT, **_CALLER["properties"])}, body=_NEW_TOKEN, in_pool=True),
    Route("GET", f"{_API}/auth/session", token_show, "any", "Who am I?", {200: _CALLER}),
    Route("DELETE", f"{_API}/auth/session", token_revoke, "any", "Revoke the token sent.",
          {204: None}, errors=(409,), in_pool=True),
)  # fmt: skip


def error_statuses(route: Route) -> list[int]:
    """The statuses that a route may respond besides those in `responses`."""
    statuses = {400, 421, 500, 503, *route.errors}
    statuses |= set() if route.permission == "open" else {401, 403, 429}
    statuses |= {413, 415} if route.body else set()
    return sorted(statuses - route.responses.keys())


def example_of(schema: Schema) -> Any:
    if examples := [*schema.get("examples", ()), *schema.get("enum", ())]:
        return examples[0]
    if schema.get("type") == "array":
        return [example_of(schema["items"])]
    return {name: example_of(part) for name, part in schema.get("properties", {}).items()}


def _describe(route: Route) -> dict[str, Any]:
    def content(schema: Schema | None) -> dict[str, Any]:
        shown = {"schema": schema, "example": example_of(schema)} if schema else None
        return {"content": {schema.get("contentMediaType", "application/json"): shown}} if schema and shown else {}

    path = [(name, PATH_PARAMETERS[name]) for name in re.findall(r"<(\w+)>", route.path)]
    shape = {name: {"enum": [value]} for name, value in route.error_shape.items()}
    error = _object(**{**shape, "error": _schema("string", "What happened, and what to do next.")})
    responses = {**route.responses, **dict.fromkeys(error_statuses(route), error)}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": schema} for name, schema in path),
            *({"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()),
            *[{"name": "X-Reservation-Id", "in": "header", "schema": _TEXT}] * route.gated,
            *[{"name": "Last-Event-ID", "in": "header", "schema": _TEXT}] * (route.handler is events),
        ],
        "responses": {
            str(status): {"description": http.client.responses[status], **content(schema)}
            for status, schema in responses.items()
        },
        "x-permission": route.permission,
        "security": [] if route.permission == "open" else [{"token": []}],
    }
    if route.body:
        properties = {**route.body["properties"]}
        for name in properties.keys() - route.body.get("required", ()):
            properties[name] = {**properties[name], "type": [properties[name]["type"], "null"]}
        operation["requestBody"] = {"required": True, **content({**route.body, "properties": properties})}
    return operation


@functools.cache
def describe_api() -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.template, {})[route.method.lower()] = _describe(route)
    info = {"title": "StoryTeller automation service", "version": __version__}
    components = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


# ======================================================================================================
# HTTP: application
# ======================================================================================================

COMMON_HEADERS: Mapping[str, str] = {
    "Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Vary": "Origin",
}  # fmt: skip


class Exchange:
    """Runs the steps of a request in the event loop: `call_soon` resumes them there. `finish` gets the response."""

    def __init__(self, steps: Steps, call_soon: Callable[[Any], None], finish: Callable[[Response], None]) -> None:
        self._steps, self._call_soon, self._finish = steps, call_soon, finish
        self._future: Future[Any] | None = None
        self.is_cancellable = False  # whether the future is; if not, its work goes on after the client has left

    def advance(self) -> None:
        try:
            self._future = next(self._steps)
        except StopIteration as end:
            if end.value is not None:  # None: cancel() has closed the steps
                self._finish(end.value)
            return
        self.is_cancellable = not self._future.running()  # kept, because the event loop reads it in each turn
        self._future.add_done_callback(lambda _: self._call_soon(self.advance))

    def cancel(self) -> bool:
        """Cancel the request if its future can be cancelled. Returns whether it was."""
        if is_cancelled := bool(self._future and self._future.cancel()):
            self._steps.close()
        return is_cancelled


@dataclass(frozen=True)
class Endpoint:
    """The routes of one path by method, as a callback for Bottle; without any for a path that does not exist."""

    METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")  # with a label of their own in metrics
    services: Services
    template: str  # the label of the path in metrics
    routes: Mapping[str, Route]

    def __call__(self, **path: str) -> bottle.HTTPResponse:
        steps = self.respond(bottle.request.environ, path)
        while True:
            try:
                concurrent.futures.wait([next(steps)], timeout=86_400)
            except StopIteration as end:
                whole = end.value.whole()
                return bottle.HTTPResponse(whole.body, whole.status, whole.headers)

    def respond(self, environ: Mapping[str, Any], path: Mapping[str, str], *, refused: ApiError | None = None) -> Steps:
        """The steps of every request. `refused`: why the server cannot serve it: unreadable, or stopping."""
        began, services, settings = time.monotonic(), self.services, self.services.settings
        method, origin = environ["REQUEST_METHOD"], environ.get("HTTP_ORIGIN")
        if origin not in (*settings.cors_origins, *settings.trusted_origins):
            origin = None  # a page of this origin may not read the response
        request_id = str(environ.get("HTTP_X_REQUEST_ID", ""))
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request_id):
            request_id = secrets.token_hex(8)
        route = self.routes.get("GET" if method == "HEAD" else method)
        shape, is_open = (route.error_shape, route.permission == "open") if route else ({}, False)
        caller = ANONYMOUS
        waits: list[float] = []
        try:
            if refused and not is_open:
                raise refused
            if not is_own_host(environ.get("HTTP_HOST"), settings):
                fault = "The Host header is not a known name of this PC: add it to STORYTELLER_ALLOWED_HOSTS."
                raise MisdirectedRequest(fault)
            if method != "OPTIONS" and not is_open:
                known = services.authenticator.known(environ, route.permission if route else "")
                caller = known or (yield from awaited(services.submit(services.authenticator.identify, environ)))
            if route:
                if not caller.may(route.permission):
                    raise Forbidden(f"This token lacks the permission {route.permission}.")
                last_id, query = environ.get("HTTP_LAST_EVENT_ID", ""), read_query(environ, route.query)
                request = Request(caller, origin, read_path(environ, path), query, waits, last_event_id=last_id)
                response = yield from self._handle(route, request, environ)
            elif method == "OPTIONS":
                response = Response(b"", 204, self._preflight(origin, environ))
            elif self.routes:
                allow = {"Allow": ", ".join(sorted(self.routes))}
                response = json_response({"error": "Method not allowed on this path."}, 405, allow)
            else:
                raise NotFound("Not found: there is no such path.")
        except ApiError as error:
            retry = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            challenge = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
            response = json_response({**shape, "error": str(error)}, error.status, retry | challenge)
        except Exception:
            log.exception("http: %s %s failed, request %s", method, route.path if route else "", request_id)
            response = json_response({**shape, "error": "Internal server error"}, 500)
        except GeneratorExit:  # the client left during a wait: no response is sent, so metrics count none
            response = Response(b"", 0)
        # Polls would fill the log, so they are logged at DEBUG.
        level = logging.DEBUG if response.status < 400 and method in ("GET", "HEAD", "OPTIONS") else logging.INFO
        seconds = time.monotonic() - began
        if response.status:
            services.responses[method if method in self.METHODS else "other", self.template, response.status] += 1
            services.response_seconds += seconds - sum(waits)
        if log.isEnabledFor(level):
            # The id of a reservation is a secret: it is masked, also in a misspelt path.
            masked = re.sub(r"(?is)(?<=/reservation/).+|[\w-]{43,}", "...", environ.get("bottle.raw_path", ""))
            values = method, masked, response.status or 499, caller.subject, seconds * 1000, request_id
            log.log(level, "http: %s %s %d %s %.1f ms %s", *values)
        headers = {**COMMON_HEADERS, **response.headers, "X-Request-Id": request_id}
        if origin:  # without these headers the page sees a network error, whatever the status is
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After, WWW-Authenticate"
        if not response.body and "Content-Type" not in response.headers:
            del headers["Content-Type"]
        return Response(response.body, response.status, headers, response.stream)  # replace() takes twice as long

    def _handle(self, route: Route, request: Request, environ: Mapping[str, Any]) -> Steps:
        if route.body:
            size = int(environ.get("CONTENT_LENGTH") or 0)
            read = functools.partial(read_body, environ, size, route.body)
            body: Any = read() if size <= SMALL_BODY else self.services.submit(read, is_large=size > LARGE_BODY)
            value, raw = yield from awaited(body)
            request = dataclasses.replace(request, body=value, raw_body=raw)
        other = self.services.reservations.known if route.gated and self.services.settings.gates else None
        if other and other.digest != digest_of(environ.get("HTTP_X_RESERVATION_ID", "")):
            request = dataclasses.replace(request, blocked_by=other)
        handle = functools.partial(route.handler, self.services, request)
        outcome: Any = self.services.submit(handle) if route.in_pool else handle()
        steps: Steps = outcome if isinstance(outcome, Generator) else awaited(outcome)
        return (yield from steps)

    def _preflight(self, origin: str | None, environ: Mapping[str, Any]) -> dict[str, str]:
        """The headers, also for a path that does not exist: without them the page could not read the 404."""
        headers = {"Allow": ", ".join(sorted(self.routes or {"GET", "POST", "PUT", "DELETE"}))}
        if origin:
            headers |= {"Access-Control-Allow-Methods": headers["Allow"], "Access-Control-Max-Age": "600"}
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Last-Event-ID, X-Reservation-Id"
            if environ.get("HTTP_ACCESS_CONTROL_REQUEST_PRIVATE_NETWORK") == "true":
                headers["Access-Control-Allow-Private-Network"] = "true"
        return headers


def unreadable_environ(headers: Mapping[str, str]) -> dict[str, Any]:
    """The WSGI environ of a request that the server cannot read."""
    return {f"HTTP_{name}": value for name, value in headers.items()} | {"REQUEST_METHOD": "-", "PATH_INFO": "-"}


def create_app(services: Services) -> bottle.Bottle:
    """The service as a WSGI application, whose calls block; the event loop calls respond() instead. Raises ValueError
    for an empty `settings.api_token` and for a route without a permission."""
    if not services.settings.api_token:
        raise ValueError("an API token is needed")
    by_path: dict[tuple[str, str], dict[str, Route]] = {}
    for route in ROUTES:
        if route.permission not in (*PERMISSIONS, "any", "open"):
            raise ValueError(f"{route.method} {route.path} names no permission")
        by_path.setdefault((route.path, route.template), {})[route.method] = route
    app = bottle.Bottle()
    for (path, template), routes in by_path.items():
        # One callback for all methods: a fixed path then wins over one with a parameter, whatever the method is.
        app.route(path, "ANY", Endpoint(services, template, routes))
    app.route("<path:re:(?s:.*)>", "ANY", Endpoint(services, "other", {}))
    return app


def respond(app: bottle.Bottle, environ: dict[str, Any], *, error: Any = None, is_late: bool = False) -> Steps:
    """The steps of a request, whose endpoint is looked up in the application. `error`: why waitress cannot read the
    request; `is_late`: it began after the service was told to stop."""
    refused = stopping() if is_late else None
    if error:  # omit what the error quotes: it is a header, which may contain the token
        refused = ApiError(f"{error.reason}: " + error.body.partition('"')[0].rstrip())
        refused.status = error.code
    path = environ["bottle.raw_path"] = environ["PATH_INFO"]
    environ["PATH_INFO"] = path.encode("latin-1").decode("utf-8", "ignore")  # as Bottle does under WSGI
    route, parameters = app.match(environ)
    return cast(Endpoint, route.callback).respond(environ, parameters, refused=refused)


# ======================================================================================================
# Live: sessions
# ======================================================================================================


class SessionChanges:
    """Publishes an event for each change of the newest sessions. `unread` is PendingChanges.unread. Not thread-safe."""

    NEWEST = 50

    def __init__(self, services: Services, unread: Mapping[int, str], publish: Publish) -> None:
        self._services, self._unread, self._publish = services, unread, publish
        self._changed = ChangedSessions(services.store, self.NEWEST)
        self._unannounced: set[int] = set()  # complete sessions, to be announced once the store accepts writes
        self._current: dict[int, tuple[str, bool, dict[str, Any]]] = {}  # by timestamp: fingerprint, is announced, data
        self._published: dict[int, tuple[str, dict[str, Any]]] = {}  # by timestamp: both of its newest event

    def look(self) -> None:
        """Read the sessions that changed; without a bridge, announce those that are complete. Raises Unavailable."""
        services, before = self._services, self._changed.versions
        services.sync_latest()
        oldest = min(before) if len(before) >= self.NEWEST else 0
        for changed in self._changed.look(() if services.store.writes.refusal else self._unannounced):
            if stored := services.sync(changed):
                with contextlib.suppress(OverflowError):  # a time after the year 9999
                    self._read(stored)
            if changed.timestamp < oldest and changed.timestamp in self._current:  # only moved up: a newer one is gone
                self._published.setdefault(changed.timestamp, self._data(changed.timestamp))
        newest = self._changed.versions.keys()
        self._unannounced &= newest
        lowest = min(newest) if len(newest) >= self.NEWEST else -1  # below it a session may exist without being read
        self._current = {one: current for one, current in self._current.items() if one in newest}
        gone = sorted(one for one in self._published if one not in self._current)  # or its document is no session now
        for deleted in [one for one in gone if one > lowest or one in newest]:
            self._publish("session", {"sessionTimestamp": deleted, "step": "deleted"})
        self._published = {one: published for one, published in self._published.items() if one in self._current}

    def _read(self, stored: StoredSession) -> None:
        services, timestamp = self._services, stored.timestamp
        facts = services.sessions.facts_of(stored)
        if not services.bridge and is_announcement_due(stored, facts):  # the bridge announces what is not old
            if not services.store.writes.refusal:
                announce_progress(services, stored)
            (self._unannounced.add if services.store.writes.refusal else self._unannounced.discard)(timestamp)
        if isinstance(facts.summary, str):  # the document is not a session
            self._current.pop(timestamp, None)
            return
        counts = facts.progress if isinstance(facts.progress, Progress) else Progress(0, 0, False)
        steps = [("ready", counts.ready), ("prompts", counts.total_prompts), ("beats_ready", counts.total_beats)]
        episode = facts.summary["analyzedEpisode"]
        data = {
            "sessionTimestamp": timestamp,
            "step": next((step for step, is_reached in steps if is_reached), "saved"),
            "totalBeats": counts.total_beats,
            "totalPrompts": counts.total_prompts,
            "promptsNeeded": counts.needed,
            "title": episode["title"],
            "episodeNumber": episode["episodeNumber"],
            "storyUuid": facts.summary["storyUuid"],
            "lastUpdated": last_update(stored, facts),
        }
        self._current[timestamp] = stored.fingerprint, stored.announced == "prompts_ready", data

    def _data(self, timestamp: int) -> tuple[str, dict[str, Any]]:
        fingerprint, is_announced, data = self._current[timestamp]
        is_over = is_announced and data["step"] == "ready" and not self._unread.get(timestamp)
        return fingerprint, {**data, "step": "acknowledged"} if is_over else data

    def publish_changes(self) -> None:
        """Call after the newest members were read: an announced session that has none unread is acknowledged."""
        for timestamp in sorted(self._current):
            if (data := self._data(timestamp)) != self._published.get(timestamp):
                self._published[timestamp] = data
                self._publish("session", data[1])

    def shown(self) -> list[dict[str, Any]]:
        """The data of the newest event of each session, newest session first."""
        return [self._published[timestamp][1] for timestamp in sorted(self._published, reverse=True)]


# ======================================================================================================
# Live: listeners and waiting checks
# ======================================================================================================

LISTENERS = min(350, descriptor_limit() - 200)  # places for listeners and waiting checks together
STREAM_HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}  # nginx would buffer the events
# The type of the events that update a part of `state`, where it differs from the part's name.
STATE_PARTS = {"gpuHistory": "gpu", "notifications": "notification", "sessions": "session", "alerts": "alert"}


class Event(NamedTuple):
    number: int
    type: str
    permission: str
    text: bytes  # as it is sent


@dataclass(eq=False)
class Listener:
    """A client of the event stream. The stream is closed when the client leaves."""

    caller: Caller
    types: frozenset[str]
    last_id: str  # of the last event that the client has received, "" for none
    needs: Sequence[Future[Any]]  # what its `state` waits for,
    deadline: float  # and until when, in monotonic seconds
    stream: Stream = dataclasses.field(default_factory=Stream)
    sent_at: float = -math.inf  # monotonic seconds
    store_up: bool = True  # as its last `state` says

    def is_ready(self, now: float) -> bool:
        return now >= self.deadline or all(need.done() for need in self.needs)

    def wants(self, event: Event) -> bool:
        return event.type in self.types and self.caller.may(event.permission)

    def send(self, text: bytes) -> None:
        self.sent_at = time.monotonic()
        self.stream.send(text)


class WaitingCheck(NamedTuple):
    check: Check
    deadline: float  # monotonic seconds


class Live:
    """Sends changes to listeners, and answers checks that wait. While there are any, and for LINGER seconds afterwards,
    a thread polls the store and compares it with what it knew; a change by this service itself wakes the thread. Only
    this thread sends, so events and states are in order."""

    INTERVAL, PENDING_INTERVAL = 0.75, 0.25  # seconds between two polls of everything, and of the pending notifications
    KEPT = 1000  # events that are kept for clients that reconnect
    KEEPALIVE, LINGER = 15.0, 60.0  # seconds of silence before a comment; of polling after the last client has left
    NOTIFICATIONS = 100  # in `state`
    STATE_WAIT = 1.0  # seconds that `state` waits for nvidia-smi and the reservation

    def __init__(self, services: Services) -> None:
        self._services = services
        self.addresses: Sequence[str] = ()  # the URLs of the service
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # to be made in the thread
        self._loop = Loop(self._turn, "live")
        self.publish = functools.partial(self._call_soon, self._publish)  # from any thread
        # Only the thread writes these; others may read them.
        self._listeners: Sequence[Listener] = ()  # replaced, never modified
        self._run_id, self._states = secrets.token_hex(4), itertools.count(1)
        self._number = 0  # of the newest event
        self._events: collections.deque[Event] = collections.deque(maxlen=self.KEPT)
        self._pending = PendingChanges(services.store, services.notifications, self._publish_change, self._run_calls)
        self._sessions = SessionChanges(services, self._pending.unread, self._publish_change)
        # The parts of `state` that are not from the store; and of these the values whose change is an event.
        self._others, self._compared = dict[str, Any](), dict[str, Any]()
        self._is_more_pending = False  # waiting checks may have an answer
        self._used_at = self._looked_at = -math.inf  # when there were clients, when everything was polled
        self._store_up = True
        self._loop.start()

    # ---- from any thread ----

    def note(self, *changes: Notification | str) -> None:
        """This service has made these notifications, or has acknowledged or removed those with these ids."""
        for change in () if self._pending.is_initial else changes:
            self._call_soon(self._pending.forget if isinstance(change, str) else self._pending.add, change)

    def look_soon(self) -> None:
        """Poll everything at once: this service has changed a session, or announced one."""
        self._looked_at = -math.inf
        self._loop.wake()

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        self._calls.put(functools.partial(function, *arguments))
        self._loop.wake()

    def count_listeners(self, type: str | None) -> int:
        """Count the listeners to that type of event; all of them for None."""
        return sum(not one.stream.is_closed and type in (None, *one.types) for one in self._listeners)

    def join(self, caller: Caller, types: frozenset[str], last_id: str) -> Future[Response]:
        """A stream of the events after `last_id`, or of `state` and what follows. Unavailable if no place is free."""
        asks = {"gpu": self._services.gpu.ask, "reservation": self._services.reservations.ask}
        needs = [need for type in types & asks.keys() if isinstance(need := asks[type](), Future)]
        joining = self._register(Listener(caller, types, last_id, needs, time.monotonic() + self.STATE_WAIT))
        for need in needs:
            need.add_done_callback(lambda _: self._loop.wake())
        return joining

    def wait(self, check: Check, seconds: float, waits: list[float]) -> Steps:
        """The response once something matches; an empty list after `seconds` or at close(). Unavailable like join()."""
        try:
            waiting = self._register(WaitingCheck(check, time.monotonic() + seconds))
        except Unavailable:  # a check that has an answer already does not have to wait
            response: Response = yield from awaited(self._services.checks.ask(check))
            if self._loop.is_closing or response.body != NO_NOTIFICATIONS:
                return response
            raise
        # Only once it is registered: else it could miss a new notification.
        self._answer_check(waiting, self._services.checks.ask(check))
        return (yield from awaited(waiting, waits))

    def _register(self, client: Listener | WaitingCheck) -> Future[Any]:  # only in the event loop: so the limit holds
        if self.count_listeners(None) + len(self._loop.asked) >= LISTENERS:
            raise Unavailable(f"{LISTENERS} clients listen or wait already: try again later.", 5)
        return self._loop.ask(client)

    def close(self, timeout: float = 0.0) -> None:
        """End the streams, answer waiting checks with an empty list, and end the thread. May be called again."""
        self._loop.close()
        for future, client in list(self._loop.asked.items()):
            self._loop.answer(stopping() if isinstance(client, Listener) else Response(NO_NOTIFICATIONS), future)
        for listener in self._listeners:
            listener.stream.close()
        self._loop.close(timeout)

    # ---- in the thread ----

    def _turn(self) -> float:
        self._run_calls()
        now = time.monotonic()
        self._listeners = [one for one in self._listeners if not one.stream.is_closed]
        asked = list(self._loop.asked.items())
        if self._listeners or asked:
            self._used_at = now
        if now - self._used_at > self.LINGER:
            self._pending.is_initial = True
            return 3600.0
        ready = [(joining, one) for joining, one in asked if isinstance(one, Listener) and one.is_ready(now)]
        is_whole = bool(ready) or self._pending.is_initial or now - self._looked_at >= self.INTERVAL
        self._store_up = self._look(is_whole=is_whole)
        if is_whole:
            self._look_at_others()
            is_good = functools.cache(self._services.authenticator.is_still_good)
            for one in self._listeners:
                if not is_good(one.caller):
                    one.stream.close()
        self._admit(ready)
        self._ask_again()
        now = time.monotonic()
        for listener in self._listeners:
            if now - listener.sent_at >= self.KEEPALIVE:
                listener.send(self._comment())
        due = [now + self.PENDING_INTERVAL, self._looked_at + self.INTERVAL]
        due += [client.deadline for client in list(self._loop.asked.values())]
        return max(0.0, min(due) - now)

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def _look_at_sessions(self) -> None:
        self._looked_at = time.monotonic()
        self._sessions.look()
        _, is_complete = self._pending.add_newer()
        if is_complete:  # else one whose notification is not read yet would count as acknowledged
            self._sessions.publish_changes()

    def _look(self, *, is_whole: bool) -> bool:
        """Poll the store. Whether it answers and accepts writes."""
        try:
            if is_whole:
                self._look_at_sessions()
            for _ in self._pending.look():  # what is changed here does not wait for 100,000 notifications
                self._run_calls()
                if self._looked_at == -math.inf:
                    self._look_at_sessions()
        except Unavailable:
            return False
        self._sessions.publish_changes()
        is_up = not self._services.store.writes.refusal
        if self._pending.is_initial or (is_up and not self._store_up):  # who reconnects from before it gets `state`
            self._pending.is_initial, self._is_more_pending, self._number = False, True, self._number + 1
            self._events.clear()
        return is_up

    def _look_at_others(self) -> None:
        services, before = self._services, self._compared
        with contextlib.suppress(Unavailable):
            services.reservations.ask()  # not waited for: the next poll finds the result in `known`
        history = [{**gpu_json(status), "at": at} for at, status in services.gpu.history(now_ms())]
        gpu, known, swarmui = history[-1] if history else None, services.reservations.known, services.swarmui.status()
        reservation = known and reservation_json(known)
        if known and gpu and gpu["available"] and services.settings.gates:  # as gpu/status without the reservation's id
            gpu = {**gpu, "available": False, "error": known.description}
        self._others = {"gpu": gpu, "gpuHistory": history, "reservation": reservation, "swarmui": swarmui}
        volatile = ("startingFor", "idleFor", "logTail")  # they change all the time: not worth an event
        steady = {name: value for name, value in swarmui.items() if name not in volatile}
        self._compared = {"gpu": gpu, "reservation": reservation, "swarmui": steady}
        for type, part in self._compared.items() if before else ():
            if part != before[type]:
                self._publish(type, self._others[type])

    def _publish_change(self, type: str, data: Any) -> None:
        if not self._pending.is_initial:
            self._publish(type, data)
        self._is_more_pending |= type == "notification"

    def _publish(self, type: str, data: Any) -> None:
        self._number += 1
        text = self._frame(type, data if isinstance(data, bytes) else to_json(data), f"{self._number}")
        event = Event(self._number, type, ALERTS[data["kind"]] if type == "alert" else EVENTS[type], text)
        self._events.append(event)
        for listener in self._listeners:
            if listener.wants(event):
                listener.send(event.text)

    def _admit(self, ready: Sequence[tuple[Future[Any], Listener]]) -> None:
        """Send `state`, or what they missed, to those that join, and `state` to all when the store goes or is back."""
        outdated = [one for one in self._listeners if one.store_up != self._store_up]
        parts = self._state_parts() if ready or outdated else {}
        for listener in outdated:
            listener.send(self._state(listener, parts))
        for joining, listener in ready:
            found = re.fullmatch(rf"{self._run_id}-([0-9]{{1,15}})(\.[0-9]+)?", listener.last_id)
            last = int(found[1]) if found else -1
            is_kept = self._number - min(len(self._events), self.KEPT - 1) <= last <= self._number
            if is_kept and not self._pending.is_initial:
                missed = [event.text for event in self._events if event.number > last and listener.wants(event)]
                listener.send(b"".join(missed) or self._comment())
            else:
                listener.send(self._state(listener, parts))
            self._listeners = [*self._listeners, listener]
            response = Response(b"", 200, STREAM_HEADERS, listener.stream)
            if not self._loop.answer(response, joining) or self._loop.is_closing:
                listener.stream.close()

    def _state_parts(self) -> dict[str, Any]:
        services, pending = self._services, list[Any]()
        try:
            found = services.notifications.check(tuple(TOTALS), self.NOTIFICATIONS)
            published = {one.id for one in self._pending.all()}  # what is newer follows as an event
            pending = [json.loads(one.text) for one in found if one.id in published]
        except Unavailable:  # since _look()
            self._store_up = False
        service = {
            "version": __version__, "store": services.store.name, "storeUp": self._store_up,
            "startedAt": iso_time(services.started_at), "addresses": list(self.addresses), "now": now_ms(),
            "tokensEnding": services.ending_tokens,
        }  # fmt: skip
        changing = {"notifications": pending, "sessions": self._sessions.shown(), "alerts": services.alerts.shown()}
        return {**self._others, **changing, "service": service}

    def _state(self, listener: Listener, parts: Mapping[str, Any]) -> bytes:
        listener.store_up = self._store_up
        wanted = {"service", *listener.types}
        shown = {name: part for name, part in parts.items() if STATE_PARTS.get(name, name) in wanted}
        if "alerts" in shown:
            shown["alerts"] = [one for one in shown["alerts"] if listener.caller.may(ALERTS[one["kind"]])]
        if not all(map(listener.caller.may, _ALL_BUT_ADMIN)):  # its tokens' names are for the page
            shown["service"] = {**shown["service"], "tokensEnding": None}
        return self._frame("state", to_json(shown), f"{self._number}.{next(self._states)}")

    def _frame(self, type: str, text: bytes, number: str) -> bytes:
        return b"id: %b-%b\nevent: %b\ndata: %b\n\n" % (self._run_id.encode(), number.encode(), type.encode(), text)

    def _comment(self) -> bytes:
        """A comment whose id field moves the client's last event id on to the newest event."""
        return f": {self._run_id}-{self._number}\nid: {self._run_id}-{self._number}\n\n".encode()

    def _ask_again(self) -> None:
        """Repeat the waiting checks if they may have an answer; otherwise answer those whose deadline has passed."""
        is_due, self._is_more_pending = self._is_more_pending, False
        for waiting, client in list(self._loop.asked.items()):
            if isinstance(client, WaitingCheck) and is_due:
                self._answer_check(waiting, self._services.checks.ask(client.check))
            elif isinstance(client, WaitingCheck) and time.monotonic() >= client.deadline:
                self._loop.answer(Response(NO_NOTIFICATIONS), waiting)

    def _answer_check(self, waiting: Future[Any], outcome: Any) -> None:
        """Answer a waiting check, once the outcome is there. With an empty outcome it waits on."""
        if isinstance(outcome, Future):
            outcome.add_done_callback(lambda done: self._answer_check(waiting, done.exception() or done.result()))
        elif not isinstance(outcome, Response) or outcome.body != NO_NOTIFICATIONS:
            self._loop.answer(outcome, waiting)


# ======================================================================================================
# Page
# ======================================================================================================

# The response to GET /. It contains no data: its script requests all data with the token of the page's link. What the
# service sends is inserted as text, never as HTML.
PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>StoryTeller</title>
<link rel="icon" href="data:,">
<style>
:root {
  --back: #f3f4f7; --card: #fff; --edge: #d8dbe3; --track: #e2e5ec; --text: #171a21; --muted: #545b6d;
  --blue: #2f5bd8; --green: #0d7341; --amber: #7a4f00; --red: #b3261a; --violet: #7a3fd0; --orange: #a34a08; }
@media (prefers-color-scheme: dark) { :root {
  --back: #0e0f13; --card: #181a21; --edge: #2b2e39; --track: #2b2e39; --text: #eceef4; --muted: #9fa6b8;
  --blue: #809dff; --green: #4cd48c; --amber: #f2b84b; --red: #ff7b6b; --violet: #c49bff; --orange: #ff9a66; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
[hidden] { display: none !important; } .stale { filter: grayscale(1); --text: var(--muted); }
body { max-width: 1800px; margin: 0 auto; padding: 12px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
ul, ol { list-style: none; } :focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
h1, h2, h3 { font-size: 1rem; } h1, h2, .muted, dt { color: var(--muted); } h2, .muted, dt { font-size: .87rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 0 14px; min-height: 44px; padding: 0 6px 8px; }
header::before { content: ""; width: 12px; height: 12px; margin-right: -6px; border-radius: 50%; background: var(--c); }
#status { flex: 1 1 16rem; font-size: 1.3rem; font-weight: 700; } header, .chip { --c: var(--muted); }
header.good, .chip.good { --c: var(--green); } header.bad, .chip.bad { --c: var(--red); } .work { --c: var(--amber); }
.bad #status, #alerts b, [role=alert], .error { color: var(--red); }
section, #entry, dialog, #log { padding: 12px; background: var(--card); border: 1px solid var(--edge);
  border-radius: 12px; }
section, .figures > div, .steps li { min-width: 0; display: flex; flex-direction: column; } section { gap: 8px; }
#parts { display: grid; gap: 14px; grid-template-columns: 100%; } .row, .top { justify-content: space-between; }
.denied > :not(.head, .why), .denied .head > :not(h2), :not(.denied) > .why, p:empty, .chip:empty { display: none; }
.head, .top, .row { display: flex; align-items: center; gap: 4px 12px; }
.head { flex-wrap: wrap; min-height: 40px; } .head button { margin-left: auto; }
.row + .row, .session + .session { border-top: 1px solid var(--edge); margin-top: 8px; padding-top: 8px; }
.top h3 { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; } .top .muted { flex: none; }
.chip { padding: 2px 12px; border-radius: 99px; font-size: .87rem; font-weight: 600; color: var(--c);
  background: color-mix(in srgb, var(--c) 14%, var(--card)); }
button, [type=password] { flex: none; min-height: 40px; padding: 6px 14px; border: 1px solid var(--edge);
  border-radius: 8px; background: var(--back); color: inherit; font: inherit; font-weight: 600; }
button:hover { border-color: var(--muted); cursor: pointer; }
#alerts .head, #alerts .on { min-height: 1.5em; } #alerts.bad { border-color: var(--red); }
#alerts .on:empty::before { content: "None"; color: var(--muted); } .ended:empty { display: none; }
.steps { display: grid; grid-template-columns: 3fr 3fr 7fr 2fr 4fr; gap: 5px; margin-top: 4px; }
.steps li { font-size: .8rem; color: var(--muted); white-space: nowrap; }
.steps li:not(:nth-child(3))::before { content: ""; height: 4px; margin: 2px 0; background: var(--c); }
.steps li { --c: var(--track); } .steps .done { --c: var(--green); } .steps [aria-current] { --c: var(--blue); }
.steps [aria-current] { color: var(--text); font-weight: 700; }
progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px; overflow: hidden;
  --c: var(--blue); background: var(--track); }
.done progress { --c: var(--green); } ::-webkit-progress-bar { background: var(--track); }
progress::-webkit-progress-value { background: var(--c); } progress::-moz-progress-bar { background: var(--c); }
.figures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; flex: 1; }
.figures p { color: var(--muted); } .figures b { color: var(--text); font-size: 1.75rem; line-height: 1.3; }
svg { --c: var(--blue); } div + div > svg { --c: var(--violet); } div:last-child > svg { --c: var(--orange); }
svg { width: 100%; height: 66px; flex: 1 0 66px; margin-top: 8px; border-bottom: 1px solid var(--edge); }
path { fill: none; stroke: var(--c); stroke-width: 1.5; stroke-linecap: round; vector-effect: non-scaling-stroke; }
path:first-child { fill: var(--c); fill-opacity: .2; stroke: none; }
#log { height: 150px; overflow: auto; background: var(--back); color: var(--muted);
  font: .8rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 4px 14px; align-items: baseline; }
label { display: flex; align-items: center; gap: 8px; min-height: 32px; } [type=password] { max-width: 70vw; }
#entry { max-width: 40rem; display: grid; gap: 10px; justify-items: start; }
dialog { margin: auto; max-width: min(32rem, calc(100vw - 24px)); color: var(--text); }
dialog::backdrop { background: rgb(0 0 0 / .55); } dialog h2 { color: var(--text); font-size: 1.1rem; }
dialog p { margin: 8px 0 16px; white-space: pre-line; } dialog form { display: flex; justify-content: end; gap: 10px; }
@media (max-width: 699px) {
  .steps { grid-template-columns: 2fr 2fr 5fr 2fr 2fr; }
  .steps li:nth-child(n + 4) span { align-self: flex-end; }
  .steps li:not([aria-current]) span { position: absolute; clip-path: inset(50%); }
}
@media (min-width: 1000px) {
  #parts { grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); grid-template-rows: auto auto 1fr auto; }
  #alerts { grid-column: 1 / 3; } #sessions { grid-column: 2; grid-row: 2 / 4; } #notifications { grid-column: 2; }
  #service { grid-column: 1; grid-row: 4; align-self: start; } #log { flex: 1 0 150px; height: 0; }
}
</style>
</head><body>
<header><h1>StoryTeller</h1><p id="status" role="status">Connecting</p><span id="clock" class="muted"></span></header>
<main><form id="entry" hidden>
  <p>This page needs a token. <code>./run.sh page</code> (on Windows <code>run.bat page</code>) prints a link with one,
    and so does a start in a terminal. The API token, in the file api_token of the data folder, works too.</p>
  <label>Token <input id="token" type="password" autocomplete="off" required></label>
  <label><input type="checkbox" class="remember"> Remember on this device</label>
  <p role="alert"></p><button>Open</button>
</form><div id="parts" hidden>
<section id="alerts" aria-label="Alerts"><div class="head"><h2 tabindex="-1">Alerts</h2></div>
  <ul class="on"></ul><ul class="ended muted"></ul></section>
<section id="sessions" aria-label="Sessions"><div class="head"><h2 tabindex="-1">Sessions</h2></div>
  <p class="why">This token lacks the permission sessions:read.</p><p class="none muted"></p><ul></ul></section>
<section id="gpu" aria-label="GPU"><div class="head"><h2 tabindex="-1">GPU</h2><span class="chip"></span></div>
  <p class="why">This token lacks the permission gpu:read.</p>
  <div class="figures">
    <div><p><b id="use"></b> %</p><p>use</p>
      <svg role="img" viewBox="0 -2 900 104" preserveAspectRatio="none"
        aria-label="GPU use over the last 15 minutes"><path /><path /></svg></div>
    <div><p><b id="memory"></b> GB</p><p>memory <span id="total"></span></p>
      <svg role="img" viewBox="0 -2 900 104" preserveAspectRatio="none"
        aria-label="GPU memory over the last 15 minutes"><path /><path /></svg></div>
    <div><p><b id="heat"></b> °C</p><p>temperature</p>
      <svg role="img" viewBox="0 -2 900 104" preserveAspectRatio="none"
        aria-label="GPU temperature over the last 15 minutes"><path /><path /></svg></div>
  </div>
  <p class="error"></p><p class="holder muted"></p></section>
<section id="swarmui" aria-label="SwarmUI"><div class="head"><h2 tabindex="-1">SwarmUI</h2><span class="chip"></span>
    <button id="start" type="button">Start SwarmUI</button><button id="stop" type="button">Stop SwarmUI</button></div>
  <p class="why">This token lacks the permission swarmui:read.</p>
  <p class="does muted"></p><p class="error"></p><p role="alert"></p>
  <div id="log" role="log" aria-label="SwarmUI log" tabindex="0"></div></section>
<section id="notifications" aria-label="Notifications">
  <div class="head"><h2 tabindex="-1">Notifications</h2><span class="chip"></span>
    <button id="all" type="button">Acknowledge all</button></div>
  <p class="why">This token lacks the permission notifications:read.</p>
  <p role="alert"></p><p class="none muted"></p><ul></ul></section>
<section id="service" aria-label="Service"><div class="head"><h2 tabindex="-1">Service</h2>
    <button id="forget" type="button">Forget the token</button></div>
  <dl><dt>Store</dt><dd id="store"></dd><dt>Version</dt><dd id="version"></dd><dt>Running for</dt><dd id="running"></dd>
    <dt>Addresses</dt><dd id="addresses"></dd><dt>Tokens</dt><dd id="ending"></dd></dl>
  <label><input type="checkbox" class="remember"> Remember on this device</label></section>
</div></main>
<dialog aria-labelledby="question" aria-describedby="details">
  <h2 id="question"></h2><p id="details"></p>
  <form method="dialog"><button>Cancel</button><button id="yes" value="yes"></button></form>
</dialog>
<template id="of-sessions"><li class="session"><div class="top"><h3></h3><span class="muted"></span></div>
  <ol class="steps"><li><span>Saved</span></li><li><span>Beats ready</span></li>
    <li><progress></progress><span></span></li><li><span>Ready</span></li><li><span>Acknowledged</span></li></ol>
</li></template>
<template id="of-notifications"><li class="row"><div><h3></h3><span class="muted"></span></div>
  <button type="button">Acknowledge</button></li></template>
<template id="of-alerts"><li class="row"><b></b><span class="muted"></span></li></template>
<script>
const API = "/api/v1/", KEY = "storyteller-token", STEPS = ["saved", "beats_ready", "prompts", "ready", "acknowledged"];
const SILENCE_TIMEOUT = 40_000, HIDDEN_TIMEOUT = 10_000;  // ms without data, or hidden, until the page disconnects
let token = "", data = {}, clockOffset = 0;  // `clockOffset`: the service's clock minus the browser's, in ms
let generation = 0, aborter = null, timer = 0, receivedAt = Date.now(), lostSince = null, isOpen = false;

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector) => [...document.querySelectorAll(selector)];
const show = (node, text) => { if (node.textContent !== text) node.textContent = text; };  // else it is read out again
const dotted = (...parts) => parts.filter(Boolean).join(" · ");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replaceAll("_", " ");
const clock = (time) => new Date(time).toLocaleTimeString();  // from ISO 8601 or ms
const since = (time) => {
  const s = Math.max(0, Math.round((Date.now() + clockOffset - new Date(time)) / 1000));
  const min = Math.floor(s / 60), h = Math.floor(s / 3600);
  return h > 23 ? `${Math.floor(h / 24)} d ${h % 24} h` : h ? `${h} h ${min % 60} min` : min ? `${min} min` : `${s} s`;
};

// Rendering -------------------------------------------------------------------------------------------
const visibleButtons = (section) => [...section.querySelectorAll("button")].filter((one) => one.checkVisibility());

// Returns a function that, if the focused node is gone, moves the focus to the button in its place, or to the heading.
function keepFocus() {
  const node = document.activeElement, section = node.closest("section");
  const index = section ? visibleButtons(section).indexOf(node) : -1;
  return () => {
    if (!section || node.checkVisibility()) return;
    const buttons = visibleButtons(section);
    (buttons[index] ?? buttons.at(-1) ?? $("h2", section)).focus();
  };
}

// Reuses each row by its key, so a row keeps the focus.
function fill(list, items, keyOf, update) {
  const template = $(`#of-${list.closest("section").id}`).content.firstElementChild;
  const rows = new Map([...list.children].map((row) => [row.dataset.key, row])), wanted = new Set(items.map(keyOf));
  for (const [key, row] of rows) if (!wanted.has(key)) row.remove();
  items.forEach((item, index) => {
    const row = rows.get(keyOf(item)) ?? template.cloneNode(true);
    row.dataset.key = keyOf(item);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    update(row, item);
  });
}

function showHeader(raised) {
  const active = [...data.sessions?.values() ?? []].filter(({ step }) => /beats_ready|prompts/.test(step)).length;
  const well = data.sessions ? `All is well: ${plural(active || "no", "session")} in progress` : "All is well";
  const more = raised.length > 1 ? ` (and ${raised.length - 1} more)` : "";
  const [level, text] = !token ? ["", "A token is needed"]
    : lostSince ? ["", `No connection since ${clock(lostSince)}`]
    : !isOpen ? ["", document.hidden ? "Not connected while hidden" : "Connecting"]
    : raised.length ? ["bad", raised[0].text + more] : ["good", well];
  show($("#status"), text), show($("title"), `${text} · StoryTeller`);
  show($("#clock"), new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  $("header").className = level;
  const colour = { good: "#2aa866", bad: "#e0402f" }[level] ?? "#808590", circle = "<circle cx='4' cy='4' r='3.5'";
  const svg = `<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'>${circle} fill='${colour}'/></svg>`;
  const icon = `data:image/svg+xml,${encodeURIComponent(svg)}`;
  if ($("link").href !== icon) $("link").href = icon;
}

function showAlerts(raised) {
  const key = (alert) => `${alert.kind} ${alert.since}`;
  const ended = data.alerts.filter(({ until }) => until).sort((a, b) => new Date(b.until) - new Date(a.until));
  const update = (row, { text, since: from, until: to }) => {
    show($("b", row), text), show($("span", row), to ? `ended ${since(to)} ago` : `for ${since(from)}`);
  };
  $("#alerts").classList.toggle("bad", raised.length > 0);
  fill($("#alerts .on"), raised, key, update), fill($("#alerts .ended"), ended.slice(0, 3), key, update);
}

function showSessions() {
  const newest = [...data.sessions.values()].sort((a, b) => b.sessionTimestamp - a.sessionTimestamp).slice(0, 8);
  show($("#sessions .none"), newest.length ? "" : "None");
  fill($("#sessions ul"), newest, (session) => `${session.sessionTimestamp}`, (row, session) => {
    const { episodeNumber: episode, title } = session, current = STEPS.indexOf(session.step);
    const name = dotted(episode == null ? "" : `Episode ${episode}`, title) || `Session ${session.sessionTimestamp}`;
    const count = session.totalPrompts ?? 0, needed = session.promptsNeeded ?? 0, bar = $("progress", row);
    show($("h3", row), name), show($(".top span", row), `${since(session.lastUpdated)} ago`);
    show($("progress + span", row), `${count} of ${needed} prompts`);
    bar.ariaLabel = title || name, bar.max = needed || 1, bar.value = count;
    for (const [index, step] of [...$("ol", row).children].entries()) {
      step.className = index < current ? "done" : "", step.ariaCurrent = index === current ? "step" : null;
    }
  });
}

function showGpu() {
  const { reservation, gpuHistory } = data, gpu = data.gpu ?? {}, chip = $("#gpu .chip"), isKnown = gpu.memoryTotal > 0;
  const { utilization: use, memoryUsed: used, memoryTotal: total, temperature: heat } = gpu;
  const isFree = gpu.available && use < 80 && total - used > 4096 && heat < 85;  // StoryArt's rule
  const [word, level] = !isKnown ? ["Unknown", ""] : isFree ? ["Free", "good"] : ["Busy", "work"];
  show(chip, word), chip.className = `chip ${level}`;
  show($("#use"), isKnown ? `${use}` : "?"), show($("#heat"), isKnown ? `${heat}` : "?");
  show($("#memory"), isKnown ? (used / 1024).toFixed(1) : "?"), show($("#gpu .error"), gpu.error ?? "");
  show($("#total"), isKnown ? `of ${(total / 1024).toFixed(1)} GB` : "");
  const { holder, purpose, expiresAt } = reservation ?? {}, what = purpose ? ` (${purpose})` : "";
  show($("#gpu .holder"), holder ? `Reserved by ${holder}${what} until ${clock(expiresAt)}` : "Not reserved");
  const heights = [(one) => one.utilization, (one) => 100 * one.memoryUsed / one.memoryTotal, (one) => one.temperature];
  $$("svg").forEach((svg, index) => drawChart(svg, gpuHistory, heights[index]));
}

function drawChart(svg, history, heightOf) {  // heights are 0 to 100
  if (svg.history === history) return;
  svg.history = history;
  const segments = [], end = history.at(-1)?.at;  // a new one starts after an unknown GPU, or a gap of over 90 s
  let knownAt = -Infinity;
  for (const gpu of history) {
    const isKnown = gpu.memoryTotal > 0, y = 100 - Math.min(100, Math.max(0, heightOf(gpu)));
    if (isKnown && gpu.at - knownAt > 90_000) segments.push([]);
    if (isKnown) segments.at(-1).push(`${(900 - (end - gpu.at) / 1000).toFixed(1)} ${y.toFixed(1)}`);
    knownAt = isKnown ? gpu.at : -Infinity;
  }
  const lines = segments.map((points) => `M${points.join("L")}h.1`);  // h.1 makes a single point visible
  const areas = segments.map((points, index) => `${lines[index]}V100H${parseFloat(points[0])}z`);
  svg.firstChild.setAttribute("d", areas.join("")), svg.lastChild.setAttribute("d", lines.join(""));
}

function showSwarmUI() {
  const { state, since: from, queue, backends, lastError } = data.swarmui, chip = $("#swarmui .chip");
  show(chip, capital(state) + (state === "starting" ? ` for ${since(from)}` : ""));
  chip.className = `chip ${{ ready: "good", starting: "work", stopping: "work", stopped: "" }[state] ?? "bad"}`;
  const work = queue ? `${queue.live} generating, ${queue.waiting} waiting` +
    (queue.loading ? `, ${queue.loading} loading a model` : "") +
    (queue.waitingBackends ? `, ${queue.waitingBackends} waiting for a backend` : "") : "queue unknown";
  const health = backends && `backends ${backends.status}${backends.message ? ` (${backends.message})` : ""}`;
  const first = state === "ready" ? work : state === "starting" ? "usually ready within 30 s" : "";
  show($("#swarmui .does"), capital(dotted(first, health, `for ${since(from)}`)));
  show($("#swarmui .error"), lastError ?? "");
  const canStart = ["stopped", "failed"].includes(state);
  $("#start").hidden = !canStart, $("#stop").hidden = canStart;
}

function showNotifications() {
  const items = [...data.notifications.values()];
  show($("#notifications .none"), items.length ? "" : data.service.storeUp ? "None pending" : "Not known");
  show($("#notifications .chip"), items.length ? `${items.length}${data.isPartial ? "+" : ""}` : "");
  $("#all").hidden = items.length < 2;
  fill($("#notifications ul"), items, (one) => one.id, (row, one) => {
    const { type, sessionTimestamp: session, episodeNumber: episode } = one, button = $("button", row);
    show($("h3", row), dotted(`${capital(type)}, episode ${episode}`, data.sessions?.get(session)?.title));
    const total = type === "beats_ready" ? plural(one.totalBeats, "beat") : plural(one.totalPrompts, "prompt");
    show($("span", row), `${total} · waiting for ${since(one.timestamp)}`);
    button.ariaLabel = `Acknowledge ${type}, episode ${episode}, session ${session}`;
    button.onclick = () => acknowledge([one]);
  });
}

function showService() {
  const { store, storeUp, version, startedAt, addresses, tokensEnding: ending } = data.service;
  show($("#store"), store + (storeUp ? "" : " (unavailable or read-only)")), show($("#version"), version);
  show($("#running"), since(startedAt)), show($("#addresses"), addresses.join(" "));
  show($("#ending"), ending ? `End soon: ${ending}` : ending === null ? "Not known" : "None ends within 3 days");
}

function render() {
  const raised = (data.alerts ?? []).filter((alert) => alert.state === "raised"), restoreFocus = keepFocus();
  showHeader(raised);
  $("#entry").hidden = Boolean(token), $("#parts").hidden = !token || !data.service;
  $("#parts").classList.toggle("stale", !isOpen);
  const shows = { alerts: () => showAlerts(raised), sessions: showSessions, gpu: showGpu, swarmui: showSwarmUI,
    notifications: showNotifications, service: showService };
  for (const [name, draw] of Object.entries(data.service ? shows : {})) {
    $(`#${name}`).classList.toggle("denied", data[name] === undefined);
    if (data[name] !== undefined) draw();
  }
  restoreFocus();
}

// Events, and SwarmUI's log ---------------------------------------------------------------------------
const byKey = (items, key) => items && new Map(items.map((item) => [item[key], item]));
const EVENTS = {
  state(given) {
    data = { gpuHistory: [], alerts: [], ...given, sessions: byKey(given.sessions, "sessionTimestamp"),
      notifications: byKey(given.notifications, "id"), isPartial: given.notifications?.length >= 100 };
    clockOffset = given.service.now - Date.now(), isOpen = true, lostSince = null;
  },
  notification: (given) => data.notifications.set(given.id, given),
  acknowledged: ({ id }) => data.notifications.delete(id) && data.isPartial && !data.notifications.size && reconnect(),
  session: (given) => data.sessions[given.step === "deleted" ? "delete" : "set"](given.sessionTimestamp, given) &&
    data.sessions.size > 50 && data.sessions.delete(Math.min(...data.sessions.keys())),  // `state` has the newest 50
  gpu: (given) => given && Object.assign(data, { gpu: given,  // null: nothing is known of the last 15 minutes
    gpuHistory: [...data.gpuHistory.filter(({ at }) => at < given.at && given.at - at <= 900_000), given] }),
  reservation: (given) => data.reservation = given,
  swarmui: (given) => data.swarmui = given,
  alert(given) {
    const others = data.alerts.filter((one) => one.kind !== given.kind || one.state === "ended");
    data.alerts = [...others, given].filter((one, index, all) => one.state !== "ended" || index >= all.length - 50);
  },
};

async function readEvents(reader) {
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    receivedAt = Date.now();
    abortAfter(SILENCE_TIMEOUT);  // the service sends a comment every 15 s when there is no event
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const field = (name) => new RegExp(`^${name}: ?([^\n]*)`, "m").exec(block)?.[1];
      EVENTS[field("event")]?.(JSON.parse(field("data")));
    }
    if (blocks.length) render();
  }
}

const sleep = (delay) => new Promise((done) => setTimeout(done, delay));
const abortAfter = (delay) => { clearTimeout(timer), timer = setTimeout((one) => one.abort(), delay, aborter); };
const request = (path, more) => fetch(API + path, { ...more, headers: { Authorization: `Bearer ${token}` } });
const errorOf = async (response) => (await response.json().catch(() => ({}))).error ?? `HTTP error ${response.status}.`;

// Stays connected until `generation` changes. Each connection begins with the event `state`, so needs no Last-Event-ID.
async function connect() {
  const mine = ++generation;
  for (let pause = 1000; mine === generation; pause = Math.min(pause + 1000, 3000)) {
    aborter = new AbortController();
    abortAfter(7000);
    try {
      const response = await request("events", { signal: aborter.signal });
      const reason = response.ok ? "" : await errorOf(response);
      if (response.ok) await readEvents(response.body.pipeThrough(new TextDecoderStream()).getReader());
      else if ([400, 401, 403].includes(response.status) && mine === generation) askForToken(reason);
    } catch { /* the service cannot be reached, or was silent for too long */ }
    if (mine !== generation) return;
    aborter.abort();
    if (lostSince === null) [pause, lostSince] = [1000, receivedAt];
    isOpen = false, render();
    await sleep(pause);
  }
}

function disconnect() {
  generation++, isOpen = false;
  clearTimeout(timer);
  aborter?.abort();
}

async function followLog() {
  for (; ; await sleep(2000)) {
    if (!isOpen || !data.swarmui) continue;
    try {
      const response = await request("swarmui/logs?lines=200", { signal: AbortSignal.timeout(5000) });
      if (response.ok && isOpen) showLog((await response.text()).split("\n").slice(0, -1));
    } catch { /* retried in 2 s */ }
  }
}

function showLog(lines) {  // adds the new lines only: a screen reader reads out what is added
  const log = $("#log"), follows = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
  let same = Math.min(log.lines?.length ?? 0, lines.length);
  while (same > 0 && log.lines.slice(-same).join("\n") !== lines.slice(0, same).join("\n")) same--;
  for (const text of lines.slice(same)) log.appendChild(document.createElement("div")).textContent = text || " ";
  while (log.childElementCount > lines.length) log.firstChild.remove();
  log.lines = lines;
  if (follows) log.scrollTop = log.scrollHeight;
}

// Buttons ---------------------------------------------------------------------------------------------
async function post(path) {  // `error` is empty if it succeeded
  try {
    const response = await request(path, { method: "POST" }), error = response.ok ? "" : await errorOf(response);
    if (response.status === 401) askForToken(error);
    return { status: response.status, error };
  } catch {
    return { error: "The service does not answer: try again once it does." };
  }
}

$("#start").onclick = async () => showError("swarmui", await post("swarmui/start"));
$("#all").onclick = () => acknowledge([...data.notifications.values()]);
$("#stop").onclick = stopSwarmUI, $("#forget").onclick = () => (localStorage[KEY] &&= "", askForToken(""));

const showError = (name, { error = "" }) => { $(`#${name} [role=alert]`).textContent = error; };

function confirm(question, details, yes) {
  const dialog = $("dialog"), restoreFocus = keepFocus();
  show($("#question"), question), show($("#details"), details), show($("#yes"), yes);
  dialog.returnValue = "", dialog.showModal();
  return new Promise((done) => dialog.onclose = () => {
    if (dialog.open) return;  // the event belongs to the previous question
    restoreFocus(), done(dialog.returnValue === "yes");
  });
}

async function stopSwarmUI() {
  const { live, waiting } = data.swarmui.queue ?? {};
  let details = live + waiting === 0 ? "Its queue is empty, so no image will be lost."
    : live + waiting ? `${live} running and ${plural(waiting, "waiting image")} will be lost.`
    : "Its queue is unknown: running and waiting images, if any, will be lost.";
  for (let force = ""; await confirm("Stop SwarmUI?", details, "Stop"); force = "?force=true") {
    showError("swarmui", {});
    const failed = await post(`swarmui/stop${force}`);
    if (failed.status !== 409 || force) return showError("swarmui", failed);
    details = `${failed.error}\nStop it anyway?`;
  }
}

async function acknowledge(items) {
  const [{ type, episodeNumber: episode }] = items;
  const what = items.length > 1 ? `all ${items.length} notifications` : `${type} of episode ${episode}`;
  if (!await confirm(`Acknowledge ${what}?`, "Acknowledged notifications are not sent again.", "Acknowledge")) return;
  showError("notifications", {});
  for (const { id } of items) {
    const failed = await post(`notifications/${encodeURIComponent(id)}/ack`);
    if (failed.error && failed.status !== 404) return showError("notifications", failed);  // 404: it is gone
    if (data.notifications) EVENTS.acknowledged({ id });
    render();
  }
}

// The token: from the link, then stored for the tab or for the device ---------------------------------
function storeToken(given, isForDevice) {
  token = given;
  for (const [storage, isWanted] of [[sessionStorage, !isForDevice], [localStorage, isForDevice]]) {
    token && isWanted ? storage.setItem(KEY, token) : storage.removeItem(KEY);
  }
  for (const box of $$(".remember")) box.checked = isForDevice;
}

function reconnect() {
  disconnect(), lostSince = null, render();
  if (token && !document.hidden) connect();
}

function askForToken(reason) {
  if ($("dialog").open) $("dialog").close();
  storeToken("", false), data = {}, showLog([]), reconnect();
  $("#entry [role=alert]").textContent = reason;
  $("#token").focus();
}

function takeTokenFromLink() {  // whether there was one
  const found = /^#token=([!-~]+)$/.exec(location.hash);
  if (!found) return false;
  history.replaceState(null, "", location.pathname + location.search);
  storeToken(found[1], KEY in localStorage);
  return true;
}

$("#entry").onsubmit = (event) => {
  event.preventDefault();
  const given = $("#token").value.trim(), isForDevice = $("#entry .remember").checked;
  $("#token").value = $("#entry [role=alert]").textContent = "";
  if (!/^[!-~]+$/.test(given)) return askForToken("A token consists of ASCII characters without spaces.");
  storeToken(given, isForDevice), reconnect();
};
for (const box of $$("section .remember")) box.onchange = () => storeToken(token, box.checked);

let hiddenTimer = 0;
document.onvisibilitychange = () => {  // a browser opens at most six connections to a host, for all its tabs
  clearTimeout(hiddenTimer);
  if (document.hidden) hiddenTimer = setTimeout(() => (disconnect(), render()), HIDDEN_TIMEOUT);
  else if (token && !isOpen) reconnect();
};
addEventListener("hashchange", () => takeTokenFromLink() && reconnect());
addEventListener("storage", ({ key, newValue: kept }) =>  // by another tab: "" if it forgets the token, else null
  key === KEY && (kept === "" ? askForToken("") : kept ?? storeToken(token, false)));
addEventListener("pagehide", disconnect), addEventListener("pageshow", ({ persisted }) => persisted && reconnect());

takeTokenFromLink() || storeToken(sessionStorage[KEY] ?? localStorage[KEY] ?? "", KEY in localStorage);
reconnect(), followLog();
setInterval(render, 1000);
</script>
</body>
</html>
"""


@functools.cache
def page_headers(page: str = PAGE) -> dict[str, str]:
    """They allow only the page's own style and script, by their SHA-256, and no frame around it."""
    policy = [f"{name} 'none'" for name in ("default-src", "base-uri", "form-action", "frame-ancestors")]
    policy += ["connect-src 'self'", "img-src data:"]
    for tag in ("script", "style"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        policy.append(f"{tag}-src 'sha256-{digest}'")
    return {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": "; ".join(policy)}


# ======================================================================================================
# Server: settings and sockets
# ======================================================================================================

CONNECTIONS = LISTENERS + 100  # at most 450: select() on Windows takes 512 sockets
KEEPALIVE_TIMEOUT = 120.0  # seconds that a connection may be idle
REQUEST_TIMEOUT = 60.0  # seconds that a transfer may stall, and over which its rate is measured
MIN_RATE = 1024  # bytes a second of a transfer, on average
RESPONSE_WAIT = 0.0005  # seconds that the event loop waits for the responses to requests that it just started
MAX_HEADER = 64 * 1024  # bytes of a request's headers; browsers send 16 KiB at most

WAITRESS: Mapping[str, Any] = {
    # At this limit waitress stops accepting. The server's own limit is lower, and closes idle connections instead.
    "connection_limit": CONNECTIONS + 40,
    # Off: waitress uses the wall clock, so setting the clock would end requests half sent. See Activity.
    "channel_timeout": 1_000_000_000,
    # Above the service's own limits: waitress does not read what it refuses, so a reset may overtake its response.
    "max_request_header_size": 512 * 1024,
    "max_request_body_size": MAX_BODY + 16 * 1024 * 1024,
    # Smaller bodies stay in memory: a full temporary folder must not affect a session.
    "inbuf_overflow": 9 * 1024 * 1024,
    "outbuf_overflow": 9 * 1024 * 1024,
    "recv_bytes": 256 * 1024,  # an 850 KB session in 4 reads instead of 104
    "ident": None,  # no Server header
    "clear_untrusted_proxy_headers": False,  # keep them: a forwarded request is never trusted
    "log_socket_errors": False,  # a client that disconnects is not an error
}

# As documented, waitress runs each request in a thread. Here only its event loop touches a channel (a connection). The
# next section needs these undocumented names for that:
WAITRESS_NAMES = {
    "server.create_server server.BaseWSGIServer.add_task": "adds listeners to map=; passes requests to _dispatcher=",
    "server.BaseWSGIServer.channel_class channel.HTTPChannel.parser_class": "the classes of a connection, its parser",
    "channel.HTTPChannel.received": "parses bytes into `request`, then `requests`, and calls add_task() for the first",
    "channel.HTTPChannel.readable channel.HTTPChannel.will_close": "whether the loop reads; whether it closes",
    "channel.HTTPChannel.write_soon": "adds to the output buffer, or sends; blocks while the buffer is over its limit",
    "channel.HTTPChannel.send": "sends what the system takes, returns its size; closes the channel if the client left",
    "channel.HTTPChannel.total_outbufs_len channel.HTTPChannel.close_when_flushed": "bytes to send; the close after",
    "channel.HTTPChannel.current_outbuf_count": "at the limit, the next response gets a buffer of its own",
    "channel.HTTPChannel.handle_write channel.HTTPChannel.handle_close": "sends output; runs when the client leaves",
    "channel.HTTPChannel.send_continue": "answers the Expect: 100-continue of a request that followed another one",
    "parser.HTTPRequestParser.parse_header parser.HTTPRequestParser.error": "ParsingError; its code, reason, body",
    "parser.RequestHeaderFieldsTooLarge": "the error of too many bytes of headers",
    "task.WSGITask.get_environment task.WSGITask.build_response_header": "for WSGI; with Date and Connection",
    "task.WSGITask.chunked_response": "whether a response without content_length is sent chunked",
    "wasyncore.loop wasyncore.close_all trigger.trigger.pull_trigger": "polls the map; closes it; wakes the loop",
}


class Activity:
    """The progress of a connection. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.responded_at = now  # the end of the last response; before the first one, the start of the connection
        self.request_began = now  # when the latest request, or the connection, began; -inf once that is answered
        self._moved_at = now  # when bytes were last received or sent
        self._counted_from, self._count = now, 0  # bytes since then, to measure their rate

    def moved(self, size: int) -> None:
        if size:
            self._moved_at = time.monotonic()
            self._count += size

    def responded(self) -> None:
        self.responded_at = self._moved_at = time.monotonic()
        self.request_began = -math.inf

    def has_timed_out(self, now: float, *, is_due: bool, in_transfer: bool) -> bool:
        """Whether it was idle or slow for too long. The flags are those of Channel.state()."""
        idle, measured, count = now - self._moved_at, now - self._counted_from, self._count
        if not in_transfer or measured >= REQUEST_TIMEOUT:
            self._counted_from, self._count = now, 0
        if not in_transfer:
            return not is_due and idle >= KEEPALIVE_TIMEOUT
        is_slow = measured >= REQUEST_TIMEOUT and count < REQUEST_TIMEOUT * MIN_RATE
        return is_slow or idle >= REQUEST_TIMEOUT


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, all on one port; localhost is 127.0.0.1 and, where there is IPv6, ::1. Raises StartError."""
    try:
        if host == "localhost":
            addresses = ["127.0.0.1", "::1"]
        else:
            addresses = [str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])]
        for _ in range(0 if port else 19):  # a port that is free on the first address may be taken on the second
            with contextlib.suppress(OSError):
                return _listen_on_all(addresses, port)
        return _listen_on_all(addresses, port)
    except (socket.gaierror, UnicodeError):
        raise StartError(f"STORYTELLER_HOST {host} is not known: set it to localhost or this PC's address.") from None
    except OSError as error:
        fault = f"Cannot listen on {host} port {port} ({error.strerror}): set STORYTELLER_HOST or STORYTELLER_PORT."
        if error.errno in _IN_USE:
            fault = f"Port {port} is in use by another program: stop it, or set STORYTELLER_PORT."
        elif error.errno in _MAYBE_RESERVED:
            advice = "`netsh interface ipv4 show excludedportrange protocol=tcp` lists these. Set STORYTELLER_PORT."
            fault = f"Port {port} is refused: another program holds it, or Windows reserves it: {advice}"
        raise StartError(fault) from None


def _listen_on_all(addresses: Iterable[str], port: int) -> list[socket.socket]:
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as on_failure:
        for address in addresses:
            try:
                opened.append(on_failure.enter_context(listen(address, port)))
            except OSError as error:
                if not opened or error.errno not in _NO_ROUTE:
                    raise
            port = opened[0].getsockname()[1]
        on_failure.pop_all()
    return opened


# ======================================================================================================
# Server: waitress's internals
# ======================================================================================================


class Channel(waitress.channel.HTTPChannel):
    class parser_class(waitress.parser.HTTPRequestParser):
        def parse_header(self, header_plus: bytes) -> None:
            try:
                super().parse_header(header_plus)
            except ValueError:  # from urllib, as for http://[/: it would close the connection without a response
                raise waitress.parser.ParsingError("Bad URI") from None
            if len(header_plus) >= MAX_HEADER:
                self.error = waitress.parser.RequestHeaderFieldsTooLarge(f"exceeds max_header of {MAX_HEADER}")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.exchange: Exchange | None = None  # of requests[0]
        self.stream: Stream | None = None  # the body of the response being sent, if that is a stream
        self.activity = Activity(time.monotonic())

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self.activity.request_began = time.monotonic()
        self.activity.moved(len(data))
        return self.stream is None and bool(super().received(data))

    def readable(self) -> bool:
        """Twice as fast as waitress's. Also reads during a cancellable wait or a stream, to notice a disconnect."""
        if self.requests:
            return len(self.requests) == 1 and self.exchange is not None and self.exchange.is_cancellable
        return bool(self.stream) or not (self.total_outbufs_len or self.close_when_flushed or self.will_close)

    def service(self) -> None:
        """Start requests[0] once the previous response is sent, so write_soon() never blocks."""
        if not self.requests or self.exchange or self.total_outbufs_len or self.close_when_flushed:
            return
        request, dispatcher = self.requests[0], self.server.task_dispatcher
        task = waitress.task.WSGITask(self, request)
        task.start()
        environ = unreadable_environ(request.headers) if request.error else task.get_environment()
        is_late = self.activity.request_began > dispatcher.stopped_at
        steps = respond(self.server.application, environ, error=request.error, is_late=is_late)
        finish = functools.partial(self._finish, task, environ["REQUEST_METHOD"])
        self.exchange = Exchange(steps, functools.partial(dispatcher.call_soon, self), finish)
        self.exchange.advance()

    def _finish(self, task: Any, method: str, response: Response) -> None:
        self.exchange = None
        response = response if self.connected and method != "HEAD" else response.whole()
        if not self.connected:
            task.request.close()
            return
        task.status = f"{response.status} {http.client.responses[response.status]}"
        task.content_length = None if response.stream else len(response.body)
        task.response_headers += response.headers.items()
        if task.request.error:
            task.set_close_on_finish()
            with contextlib.suppress(OSError):  # unread input would turn the close into a reset, which loses this
                self.socket.recv(1 << 20)
        self.write_soon(task.build_response_header() + (b"" if method == "HEAD" else response.body))
        self.current_outbuf_count = self.adj.outbuf_high_watermark
        self.activity.responded()
        self.requests.pop(0).close()
        self.close_when_flushed = task.close_on_finish and not response.stream
        if response.stream:
            self.stream = response.stream
            del self.requests[:]  # requests that were sent after it get no response
            more = functools.partial(self.server.task_dispatcher.call_soon, self, self.send_parts)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, Stream.SEND_BUFFER)
            self.stream.open(more, is_chunked=task.chunked_response)
        self.handle_write()
        if self.connected and not (self.stream or self.requests) and self.request and self.request.expect_continue:
            self.send_continue()  # last, because it closes the channel of a client that left

    def send_parts(self) -> None:
        if self.stream and self.connected:
            part, self.close_when_flushed = self.stream.take()
            if part and not self.total_outbufs_len:  # twice as fast as by the buffer
                self.activity.moved(sent := self.send(part))
                part = part[sent:]
            if self.connected and (part or self.close_when_flushed):
                self.will_close = bool(self.total_outbufs_len) and self.total_outbufs_len + len(part) > Stream.LIMIT
                self.write_soon(part)
                self.current_outbuf_count = self.adj.outbuf_high_watermark
                self.handle_write()

    def handle_write(self) -> None:
        unsent = self.total_outbufs_len
        super().handle_write()
        self.activity.moved(unsent - self.total_outbufs_len)
        if self.requests:
            self.server.add_task(self)

    def handle_close(self) -> None:
        super().handle_close()
        if self.stream:
            self.stream.close()
        if self.exchange and not self.exchange.cancel():
            del self.requests[:1]  # it runs on, and _finish() closes it
        while self.requests:
            self.requests.pop().close()

    def state(self) -> tuple[bool, bool]:
        """Whether a response is due or partly sent; whether bytes of a request or response are still to move."""
        unsent = self.total_outbufs_len
        return bool(self.requests or unsent or self.stream), bool(unsent or (self.request and not self.requests))


class Dispatcher:
    """Takes complete requests from waitress. Owns the sockets, and the queue of calls to make in the event loop."""

    def __init__(self, app: bottle.Bottle, sockets: Sequence[socket.socket]) -> None:
        self.stopped_at = math.inf  # monotonic seconds; requests that began later are refused
        self.is_awake = False  # the event loop will check `ready` before it waits again
        self.ready: queue.SimpleQueue[tuple[Channel, Callable[[], None]]] = queue.SimpleQueue()
        self.map: dict[int, Any] = {}  # by descriptor: channels, listeners, and the trigger of each listener
        waitress.server.create_server(app, map=self.map, sockets=list(sockets), _dispatcher=self, **WAITRESS)
        self._listeners = [one for one in self.map.values() if isinstance(one, waitress.server.BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = Channel

    def add_task(self, channel: Channel) -> None:
        self.ready.put((channel, channel.service))  # no wake(): this is the loop's own thread

    def call_soon(self, channel: Channel, function: Callable[[], None]) -> None:
        """Call it in the event loop; may be used from any thread. An exception of the function closes the channel."""
        self.ready.put((channel, function))
        self.wake()

    def wake(self) -> None:
        if not self.is_awake:
            self.is_awake = True
            with contextlib.suppress(OSError):  # the loop has ended
                self._listeners[0].trigger.pull_trigger()

    def poll(self, seconds: float) -> None:
        waitress.wasyncore.loop(seconds if self.ready.empty() else 0.0, use_poll=True, map=self.map, count=1)

    def stop_listening(self) -> None:
        self.stopped_at = time.monotonic()
        for listener in self._listeners:
            listener.del_channel()
            listener.socket.close()

    def close(self) -> None:
        self.is_awake = True  # wake() must not write to a descriptor that may be another file's by then
        waitress.wasyncore.close_all(self.map)


# ======================================================================================================
# Server: how it runs
# ======================================================================================================


class Server:
    """The event loop. Unlike waitress, it answers the requests in flight after stop(); `on_stop` gets their number."""

    def __init__(self, app: bottle.Bottle, sockets: Sequence[socket.socket], on_stop: Callable[[int], None]) -> None:
        self._dispatcher = Dispatcher(app, sockets)
        self._on_stop = on_stop
        self._grace, self.is_stopping = GRACE, False

    def _channels(self) -> list[Channel]:
        return [channel for channel in self._dispatcher.map.values() if isinstance(channel, Channel)]

    def stop(self, grace: float) -> None:
        """End run() in about `grace` seconds. Takes no lock, so signal handlers and any thread may call it."""
        self._grace, self.is_stopping = grace, True
        self._dispatcher.wake()

    def run(self) -> None:
        swept_at = time.monotonic()
        while not self.is_stopping:
            self._turn(1.0)
            now = time.monotonic()
            if now - swept_at >= 1.0 or len(self._dispatcher.map) > CONNECTIONS:
                if now - swept_at < 10.0:  # else the PC slept: clients get a second to send, or they lose a request
                    self._sweep(now)
                swept_at = now
        for _ in range(100):  # connections made before stop() may still be in the backlog
            self._turn(0.0)
        self._dispatcher.stop_listening()
        self._on_stop(sum(any(one.state()) and not one.stream for one in self._channels()))
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and any(any(one.state()) for one in self._channels()):
            self._turn(0.05)
        self._dispatcher.close()

    def _turn(self, seconds: float) -> None:
        """Poll once, which costs 0.6 us for each connection, then make the calls in `ready`. Most requests that start
        here have their response within RESPONSE_WAIT: to wait for it saves them a second poll."""
        self._dispatcher.poll(seconds)
        self._dispatcher.is_awake, unanswered = True, 0
        left, deadline = RESPONSE_WAIT, time.monotonic() + RESPONSE_WAIT
        with contextlib.suppress(queue.Empty):
            while left > 0:
                channel, function = self._dispatcher.ready.get(unanswered > 0, left)
                was_unanswered = bool(channel.exchange)
                try:
                    function()
                except Exception:
                    log.exception("server: a request failed")
                    channel.handle_close()
                unanswered += bool(channel.exchange) - was_unanswered
                left = deadline - time.monotonic()
        self._dispatcher.is_awake = False

    def _sweep(self, now: float) -> None:
        """Close connections that timed out. Above CONNECTIONS, also close those with no response due, least recently
        used first, except in the first second of a connection or a request: an arrival must not close itself."""
        closable, channels = [], self._channels()
        for channel in channels:
            is_due, in_transfer = channel.state()
            if channel.activity.has_timed_out(now, is_due=is_due, in_transfer=in_transfer):
                channel.handle_close()
            elif not is_due and now - channel.activity.request_began >= 1.0:
                closable.append(channel)
        closable.sort(key=lambda channel: channel.activity.responded_at)
        for channel in closable[: max(0, len(channels) - CONNECTIONS)]:
            channel.handle_close()


# ======================================================================================================
# Command line: check and status
# ======================================================================================================


def prepare_data_dir(settings: Settings, *, serves: bool = True) -> None:
    """Create the data folder, and check that it and the files needed in it can be used. Raises StartError."""
    path = settings.data_dir
    names = ["", *(() if settings.redis_address else STORE_FILES)]
    if serves:
        names += ["running", "storyteller.log", "swarmui.log", *(() if settings.api_token else (TOKEN_FILE,))]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for needed in [path / name for name in names]:
            access = os.R_OK if needed.name == TOKEN_FILE else os.R_OK | os.W_OK
            if (owner := foreign_owner(needed)) and not os.access(needed, access):
                advice = f"sudo chown -R $(id -un) {shlex.quote(str(path))}"
                raise StartError(f"{needed} belongs to {owner}, and you may not use it: {advice}")
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(250_000))
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise StartError(f"The disk of the data folder {path} is full: free space on it.") from None
        fault = f"The data folder {path} cannot be written ({error.strerror})"
        raise StartError(f"{fault}: set STORYTELLER_DATA_DIR to one that can.") from None


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def page_url(host: str, port: int) -> str:
    """The page's URL for a browser on this PC. 0.0.0.0 and :: stand for all addresses."""
    return url_of("localhost" if host in ("0.0.0.0", "::") else host, port)


def page_links(host: str, port: int, api_token: str) -> Iterator[str]:
    """The page's URLs with its token: for this PC, then for others."""
    fragment, addresses = f"/#token={page_token(api_token)}", list[str]()
    yield page_url(host, port) + fragment
    family, remote = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    if host in ("0.0.0.0", "::"):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((remote, 9))  # sends nothing, but selects the address that the network sees
            addresses.append(probe.getsockname()[0])
        with contextlib.suppress(OSError, UnicodeError):  # a name that IDNA cannot encode
            addresses += [str(row[4][0]) for row in socket.getaddrinfo(socket.gethostname(), None, family)]
    for address in dict.fromkeys(addresses):
        if not is_loopback(address) and "%" not in address:  # an address with a zone (%) works on this PC only
            yield url_of(address, port) + fragment


def running_address(settings: Settings) -> tuple[str, int] | None:
    """Host and port of the service that uses the data folder, from its file `running`; None if there is none."""
    path = settings.data_dir / "running"
    with contextlib.suppress(OSError, ValueError):
        if path.exists():
            if file := lock_file(path):
                file.close()
            else:
                found = urllib.parse.urlsplit(path.read_text(encoding="utf-8").strip())
                return (found.hostname, found.port) if found.hostname and found.port else None
    return None


def connect_host(host: str) -> str:
    """Where this PC connects to a service on that host. Not ::1 for localhost: on Windows that may take seconds."""
    return {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.lower(), host)


def print_links(given: Mapping[str, Any]) -> None:
    """Print the page's link for each address of the service, whether it runs or not. Raises StartError."""
    settings = load_settings(given, os.environ)
    prepare_data_dir(settings, serves=False)
    host, port = running_address(settings) or (settings.host, settings.port)
    if not port:
        raise StartError("STORYTELLER_PORT is 0, so the port is picked at the start: start the service first.")
    print(*page_links(host, port, own_token(settings)), sep="\n")


def check(arguments: Mapping[str, Any]) -> int:
    """Print a line for each check. The exit code is 1 when one FAILs."""
    failed = False
    for level, subject, text in run_checks(arguments):
        failed = failed or level == "FAIL"
        print(f"{level:<4} {subject}: {text}", flush=True)
    return int(failed)


STORYARTS_REDIS = "redis://127.0.0.1:6379/0"  # the one that StoryArt's own server uses by default
Finding = tuple[str, str, str]  # OK, WARN or FAIL; the subject; what was found, and what to do


def run_checks(arguments: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        settings = load_settings(arguments, os.environ)
    except StartError as error:
        yield "FAIL", "settings", str(error)
        return
    yield "OK", "settings", f"read from arguments, environment and {ENV_FILE if ENV_FILE.exists() else 'no .env file'}"
    for text in setting_warnings(os.environ):
        yield "WARN", "settings", text
    yield "OK", "version", __version__
    yield from check_store(settings)
    folder = next((one for one in (settings.data_dir, *settings.data_dir.parents) if os.path.isdir(one)), HERE)
    free = shutil.disk_usage(folder).free / 10**9
    yield "WARN" if free < settings.alert_disk else "OK", "disk", f"{free:.2f} GB are free for {settings.data_dir}"
    status = query_gpus(settings, set())
    good = f"{status.gpu_count} GPU(s), {status.memory_total} MiB" + (status.remarks and f"; it says: {status.remarks}")
    yield "OK" if status.available and not status.remarks else "WARN", "nvidia-smi", status.error or good
    yield check_swarmui_path(settings)
    found = probe(settings)
    yield ("OK", "SwarmUI", f"ready, version {found.version}") if found.ready else ("WARN", "SwarmUI", found.message)
    yield from check_storyart(settings)
    yield from check_port(settings, status)


def missed_sessions(settings: Settings) -> str | None:
    """A warning if sessions are in the store that is not used: StoryArt's in Redis, or those of the embedded store,
    which `move` copies. None if not, or if that store cannot be read within 0.6 s."""
    url, newest = settings.redis_address, "SELECT max(timestamp) FROM session WHERE expires > ?"
    limits: dict[str, Any] = {"socket_connect_timeout": 0.2, "socket_timeout": 0.2}  # from_url() does not retry
    client = redis.Redis.from_url(url or STORYARTS_REDIS, protocol=2, driver_info=None, **limits)
    # ValueError: the server is not a Redis. StartError: there is no embedded store.
    with contextlib.suppress(redis.RedisError, OSError, ValueError, StartError, sqlite3.Error), client:
        if not url:
            advice = f"StoryArt's sessions are in Redis, which is not used here: set REDIS_URL={STORYARTS_REDIS}"
            return advice if client.exists(RedisStore.INDEXES[1]) else None
        with contextlib.closing(sqlite3.connect(embedded_store(settings), timeout=0.2)) as database:
            ((timestamp,),) = database.execute(newest, (now_ms(),))
        if timestamp is not None and not client.sismember(RedisStore.TAKEN, f"session:{timestamp}"):
            return f"the embedded store has sessions that Redis lacks: {START_SCRIPT} move copies them"
    return None


def embedded_store(settings: Settings) -> Path:
    """The embedded store's file, used or not. Raises StartError if there is none."""
    if not os.path.isfile(path := settings.data_dir / STORE_FILES[0]):
        raise StartError(f"There is no embedded store in the data folder {settings.data_dir}.")
    return path


def check_storyart(settings: Settings) -> Iterator[Finding]:
    """Whether StoryArt's sessions are in this service's store, and its pages may call this service and SwarmUI."""
    if missed := missed_sessions(settings):
        yield "WARN", "store" if settings.redis_address else "StoryArt", missed
    if settings.redis_address and redis.connection.parse_url(settings.redis_address).get("db"):
        yield "WARN", "StoryArt", "its own server always uses database 0: use database 0 in REDIS_URL too"
    for origin in refused_origins(settings):
        yield "WARN", "pages", f"{origin} sent no token and is not trusted: {TRUST_ADVICE}"
    allowed, pages = settings.swarmui_allow_origin, settings.trusted_origins
    if allowed == "*":
        yield "WARN", "SwarmUI's pages", "* lets every page use SwarmUI: set SWARMUI_ALLOW_ORIGIN to StoryArt's origin"
    elif pages and not allowed:
        yield "WARN", "SwarmUI's pages", f"{pages[0]} cannot read SwarmUI's responses: set SWARMUI_ALLOW_ORIGIN to it"


def check_store(settings: Settings) -> Iterator[Finding]:
    try:
        prepare_data_dir(settings)
        if (settings.data_dir / TOKEN_FILE).exists():
            own_token(settings)
        with contextlib.closing(open_store(settings)) as store:
            store.ping()
            store.try_write()
            yield "OK", "store", f"{store.name}, {store.place}"
            if ending := ending_tokens(store, now_ms()):
                yield "WARN", "tokens", f"they end soon: {ending}: {RENEW_ADVICE}"
    except (StartError, Unavailable) as error:
        yield "FAIL", "store", with_advice(error)


def with_advice(error: Exception) -> str:
    advice = error.advice if isinstance(error, ApiError) else ""
    return f"{str(error).rstrip('.')}: {advice}." if advice else str(error)


def check_swarmui_path(settings: Settings) -> Finding:
    try:
        return "OK", "SWARMUI_PATH", str(find_swarmui(settings))
    except LaunchError as error:
        wrong = settings.swarmui_path is not None and str(error).startswith("SWARMUI_PATH")
        return "FAIL" if wrong else "WARN", "SWARMUI_PATH", str(error)


def check_port(settings: Settings, status: GpuStatus) -> Iterator[Finding]:
    """Whether the service runs or its port is free, and whether a running one finds the GPUs of `status`, too."""
    link = f"{START_SCRIPT} page prints the link of its page, with a token"
    running = running_address(settings)
    host, port = running or (settings.host, settings.port)
    address = page_url(host, port) if port else "an address that it chooses"
    if not running:
        try:
            for sock in open_sockets(host, port):
                sock.close()
            yield "OK", "port", f"{port} is free: the service will run at {address}; {link}"
        except StartError as error:
            fault, url = str(error), f"{url_of(connect_host(host), port)}/health"
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError, RecursionError):
                if json.loads(fetch(url, 6)[1]).keys() == {"status", "store"}:  # 3 s if the store hangs
                    advice = "stop that one, or set STORYTELLER_PORT"
                    fault = f"Port {port} is in use by this service with another data folder: {advice}."
            yield "FAIL", "port", fault
    elif (state := read_state(settings, host, port)) is None:
        log_file = settings.data_dir / "storyteller.log"
        yield "FAIL", "port", f"this service runs at {address}, but does not answer: see {log_file}, and restart it"
    else:
        yield "OK", "port", f"this service runs at {address}; {link}"
        theirs, ours = state.get("gpu"), gpu_json(status)  # none if it refused the token
        if theirs and any(theirs[key] != ours[key] for key in ("gpuCount", "memoryTotal")):
            found = theirs["error"] or f"{theirs['gpuCount']} GPU(s), {theirs['memoryTotal']} MiB"
            advice = "it has another PATH or NVIDIA_SMI: set NVIDIA_SMI in .env, then restart it"
            yield "WARN", "nvidia-smi", f"the running service gets another result ({found}): {advice}"


def print_status(given: Mapping[str, Any]) -> int:
    """Print what the page shows. The exit code is 1 when the service of this data folder does not answer."""
    settings = load_settings(given, os.environ)
    if not (found := running_address(settings)):
        fault = f"No service listens for the data folder {settings.data_dir}: start it with {START_SCRIPT}, or wait."
    elif (state := read_state(settings, *found)) is None:
        fault = f"The service at {page_url(*found)} does not answer: see {settings.data_dir / 'storyteller.log'}."
    elif "error" in state:
        fault = f"The service at {page_url(*found)} refused the request: {state['error']}"
    else:
        print(*status_lines(state, page_url(*found)), sep="\n")
        return 0
    print(fault, file=sys.stderr)
    return 1


def read_state(settings: Settings, host: str, port: int) -> dict[str, Any] | None:
    """The data of a service's event `state`, or an object with `error`; None if it does not answer."""
    bearer: dict[str, str] = {}
    with contextlib.suppress(StartError):  # without a token the service refuses the request, and says so
        bearer["Authorization"] = f"Bearer {own_token(settings, makes=False)}"
    connection = http.client.HTTPConnection(connect_host(host), port, timeout=10)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError), contextlib.closing(connection):
        connection.request("GET", "/api/v1/events", headers=bearer)
        with connection.getresponse() as response:  # a stream without an end
            line = next((one for one in response if response.status != 200 or one.startswith(b"data: ")), b"")
            return cast("dict[str, Any]", json.loads(line.removeprefix(b"data: ")))
    return None


def status_lines(state: Mapping[str, Any], url: str) -> Iterator[str]:
    """The ten lines that `status` prints, from the data of the event `state`."""
    service, pending, swarmui, lease = (state[name] for name in ("service", "notifications", "swarmui", "reservation"))

    def since(time: object) -> str:
        return str(timedelta(seconds=max(0, service["now"] - (read_time(time) or service["now"])) // 1000))

    gpu, queue, ending = state["gpu"] or {"error": "not known yet"}, swarmui["queue"], service["tokensEnding"]
    figures = "{utilization} % use, {memoryUsed} of {memoryTotal} MiB, {temperature} °C"
    active = [session for session in state["sessions"] if session["step"] in ("beats_ready", "prompts")]
    newest = "; {totalPrompts} of {promptsNeeded} prompts of session {sessionTimestamp} {title}"
    none = "none" if service["storeUp"] else "not known"  # a `state` without the store has an empty list
    error = f": {swarmui['lastError']}" if swarmui["lastError"] else ""
    queued = f", {queue['live']} generating, {queue['waiting']} waiting" if queue else ""
    count = f"{len(pending)}{'+' * (len(pending) >= Live.NOTIFICATIONS)}"  # `state` has no more of them
    yield f"StoryTeller automation {service['version']}, running for {since(service['startedAt'])}"
    for name, text in {
        "address": url,
        "store": service["store"] + ("" if service["storeUp"] else " (unavailable or read-only)"),
        "alerts": "; ".join(one["text"].rstrip(".") for one in state["alerts"] if one["state"] == "raised") or "none",
        "sessions": f"{len(active) or 'none'} in progress{newest.format_map(active[0]) if active else ''}",
        "notifications": f"{count} pending, the oldest for {since(pending[0]['timestamp'])}" if pending else none,
        "GPU": gpu["error"] or figures.format_map(gpu),
        "reserved": f"by {lease['holder']} until {lease['expiresAt']}" if lease else "by nobody",
        "SwarmUI": f"{swarmui['state']} for {since(swarmui['since'])}{queued}{error}",
        "tokens": f"end soon: {ending}" if ending else "not known" if ending is None else "none ends within 3 days",
    }.items():
        yield f"  {name:<14} {' '.join(text.split())}"


# ======================================================================================================
# Command line: serve
# ======================================================================================================


def own_data_dir(settings: Settings, advice: str = "stop it, then try again") -> TextIO:
    """Lock the data folder, by the file into which a service writes its address. StartError ends with `advice`."""
    path = settings.data_dir / "running"
    try:
        for _ in range(10):  # `status` and `check` lock it for a moment
            if file := lock_file(path):
                file.truncate(0)
                return file
            time.sleep(0.05)
    except OSError as error:
        raise StartError(f"{path} cannot be written ({error.strerror}): fix or remove it.") from None
    found = running_address(settings)
    by = f"the service at {url_of(*found)}" if found else "a service that is starting, or by `move` or `restore`"
    raise StartError(f"The data folder {settings.data_dir} is in use by {by}: {advice}.")


def serve(settings: Settings) -> None:
    """Run until a signal ends it. Raises StartError."""
    sys.setswitchinterval(0.001)  # with the default, a thread that computes delays each step of a poll by 5 ms
    keep_freed_memory()
    prepare_data_dir(settings)
    running = own_data_dir(settings, "use that one, stop it, or set STORYTELLER_DATA_DIR and STORYTELLER_PORT")
    start_logging(settings.data_dir / "storyteller.log", settings)
    token_place = "STORYTELLER_API_TOKEN" if settings.api_token else str(settings.data_dir / TOKEN_FILE)
    settings = dataclasses.replace(settings, api_token=own_token(settings))
    ended = threading.Event()
    watches = settings.gates or settings.idle_shutdown is not None  # they need to know who has reserved the GPU
    with (
        contextlib.closing(open_store(settings, 30.0)) as store,  # seconds to wait while, say, a backup locks it
        contextlib.closing(GpuMonitor(functools.partial(query_gpus, settings), settings.gpu_cache_seconds)) as gpu,
        contextlib.closing(Reservations(store, socket.gethostname().lower(), watches=watches)) as reservations,
        contextlib.closing(SwarmUISupervisor(settings, is_reserved=lambda: bool(reservations.known))) as swarmui,
        contextlib.closing(Services(settings, store, gpu, swarmui, reservations)) as services,
    ):
        sockets = open_sockets(settings.host, settings.port)

        def on_stop(requests: int) -> None:
            waits = f": waiting for {requests} request{'s' * (requests > 1)}; Ctrl+C again stops at once"
            say(f"Stopping{waits * (requests > 0)}.")
            services.live.close()
            swarmui.close()
            reservations.close()

        server = Server(create_app(services), sockets, on_stop)

        def stop(grace: float) -> None:
            if server.is_stopping:  # this is the second signal
                gpu.end_run()
                os._exit(1)
            server.stop(grace)

        _handler = on_end_signal(stop, ended)
        port = sockets[0].getsockname()[1]
        print(url_of(settings.host, port), file=running, flush=True)
        greet(settings, store, port, token_place)
        services.live.addresses = [url_of(*sock.getsockname()[:2]) for sock in sockets]
        services.start()
        if settings.autostart:
            swarmui.start()  # the log has its result
        log.info("server: listening on %s", url_of(settings.host, port))
        server.run()
    say("Stopped.")
    running.close()
    ended.set()


def greet(settings: Settings, store: Store, port: int, token_place: str) -> None:
    """Print what a person at the console needs: never the API token; the page's link on a terminal only, not logged."""
    name_window(f"StoryTeller automation, port {port}")
    level, _, program = check_swarmui_path(settings)
    nvidia_smi, advice = find_nvidia_smi(settings)
    rows = {
        "address": url_of(settings.host, port),
        "store": f"{store.name}, {store.place}",
        "nvidia-smi": nvidia_smi or f"not found: {advice}",
        "SwarmUI": program if level == "OK" else f"cannot be launched: {program}",
        "API token": f"in {token_place}",
        "log": str(settings.data_dir / "storyteller.log"),
    }
    say(f"{TITLE}. Ctrl+C stops it.")
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    link = next(page_links(settings.host, port, settings.api_token or "")) if is_terminal else rows["address"]
    for name, text in rows.items():
        say(f"  {name:<11} {link if name == 'address' else text}", f"{name} {text}")
    for text in setting_warnings(os.environ):
        log.warning("settings: %s", text)
    places = [settings.data_dir.parent, settings.data_dir, *settings.data_dir.iterdir()] if IS_ROOT else []
    if others := sorted(set(filter(None, map(foreign_owner, places)))):
        log.warning("data: root runs the service, but its files belong to %s: start it as that user", ", ".join(others))
    if settings.host.lower() != "localhost" and not is_loopback(settings.host):
        log.warning("server: the network traffic is not encrypted: set STORYTELLER_HOST=localhost if you can")
    if missed := missed_sessions(settings):
        log.warning("store: %s", missed)
    try:
        store.ping()
    except Unavailable as fault:
        log.warning("store: %s Until it answers, requests that need it get 503.", fault)


def serve_until_stopped(given: Mapping[str, Any]) -> NoReturn:
    """Run serve(), then end the process. All output goes through the log."""
    end_console, code = start_console(), 0
    try:
        try:
            serve(load_settings(given, os.environ))
        except StartError as error:
            code = 2
            log.error("server: %s", error, extra={"console": str(error)})
        except Exception:
            code = 1
            log.exception("server: the service ended with an unexpected error")
        finally:
            end_console()
    finally:  # also after Ctrl+C and a second one; a normal exit would wait for a console that takes no output
        os._exit(code)


# ======================================================================================================
# Command line: store, tokens, alerts
# ======================================================================================================


def move(given: Mapping[str, Any]) -> None:
    """Copy the embedded store into a Redis, in atomic steps that may be repeated. Raises StartError, Unavailable."""
    settings = load_settings(given, os.environ)
    url, path = settings.redis_address, embedded_store(settings)
    if not url:
        raise StartError("The Redis to copy to is not known: give it, like --to redis://127.0.0.1:6379/0.")
    prepare_data_dir(settings, serves=False)
    # The newest session comes last: until it is there, missed_sessions() says that some are missing.
    kinds = {"token": "tokens", "marker": "acknowledgements", "pending": "notifications", "session": "sessions"}
    with (
        contextlib.closing(own_data_dir(settings)),
        contextlib.closing(SqliteStore(path)) as source,
        contextlib.closing(RedisStore(url)) as target,
    ):
        for table, kind in kinds.items():
            copied = [target.take(table, row) for row in source.rows(table)]
            print(f"{kind}: {sum(copied)} copied, {len(copied) - sum(copied)} already there", flush=True)
    print(f"The embedded store is unchanged. Set REDIS_URL to that Redis ({target.place}), then start the service.")


@contextlib.contextmanager
def open_snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that reads one snapshot of a store, even while others write. Raises StartError, sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(path, timeout=SqliteStore.WAIT)) as database:
        database.execute("BEGIN")
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if not tables >= {"session", "pending", "marker", "newest"} or version > len(_SCHEMA_STEPS):
            raise StartError(f"{path} is not a store of this service, or is from a newer version.")
        yield database


def copy_store(source: Path, target: Path) -> None:
    """Copy a store to a file, which is then complete, or unchanged if this fails. Raises StartError."""
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        if os.path.exists(target):
            with open_snapshot(target):
                pass  # a file of another kind is never overwritten
            if os.path.exists(f"{target}-wal") or target.samefile(source):
                raise StartError(f"{target} is a store in use: give another name.")
        with open_snapshot(source) as old, contextlib.closing(sqlite3.connect(draft)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # in WAL mode it could become three files
            if (damage := new.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise StartError(f"{source} is damaged ({' '.join(damage.split())}): restore a backup that is not.")
        os.replace(draft, target)
    except (sqlite3.Error, OSError, ValueError) as error:
        raise StartError(f"{source} cannot be copied to {target} ({error}).") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            draft.unlink()


def backup(given: Mapping[str, Any]) -> None:
    """Copy the embedded store to a file, also while the service runs. Raises StartError."""
    settings, target = load_settings(given, os.environ), Path(given["file"])
    source = embedded_store(settings)
    try:
        copy_store(source, target)
    except StartError:
        prepare_data_dir(settings, serves=False)  # SQLite reads no store on a full disk, and calls that an I/O error
        raise
    print(f"{source} is backed up to {target}.")
    if settings.redis_address:
        print("The service uses Redis, which is not in that file: back up Redis separately.", file=sys.stderr)


def restore(given: Mapping[str, Any]) -> None:
    """Replace the embedded store by a backup; the previous store is kept beside it. Raises StartError."""
    settings, source = load_settings(given, os.environ), Path(given["file"])
    if not os.path.isfile(source):
        raise StartError(f"There is no file {source}.")
    prepare_data_dir(settings, serves=False)
    stamp, draft = re.sub("[^0-9]", "", iso_time(now_ms())), settings.data_dir / ".restored.sqlite3"
    store, *logs = [settings.data_dir / name for name in STORE_FILES]
    kept, *kept_logs = [path.with_name(path.name.replace(".", f"-{stamp}.", 1)) for path in (store, *logs)]
    with contextlib.closing(own_data_dir(settings)):
        copy_store(source, draft)
        try:
            if store.exists():
                with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(store)) as old:
                    old.execute("PRAGMA journal_mode = DELETE")  # moves the WAL into the file
                shutil.copyfile(store, kept)  # not renamed: without it, a service would start with an empty store
            for path, aside in zip(logs, kept_logs):  # there if the store is damaged or in use
                if path.exists():
                    path.rename(aside)
            os.replace(draft, store)
        except OSError as error:
            for path, aside in zip(logs, kept_logs):
                with contextlib.suppress(OSError):
                    aside.rename(path)
            for path in (draft, kept):
                path.unlink(missing_ok=True)
            advice = "close the program that uses it, or free space on its disk"
            raise StartError(f"{store} cannot be replaced ({error.strerror}): {advice}.") from None
    print(f"{source} is restored to {store}{f'; the previous one is kept as {kept}' * kept.exists()}.")
    if settings.redis_address:
        advice = f"{START_SCRIPT} move copies the restored store there, except what was moved before"
        print(f"The service uses Redis, which this did not change: {advice}.", file=sys.stderr)


def read_ttl(text: str) -> int:
    """Seconds of a duration like 30d."""
    found = re.fullmatch(r"([0-9]{1,8})([smhd]?)", text)
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2] or "s"] if found else 0
    if not TOKEN_TTL_RANGE[0] <= seconds <= TOKEN_TTL_RANGE[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration from 60s to 366d")
    return seconds


def token_command(given: Mapping[str, Any]) -> int:
    """Make, list, renew or revoke session tokens, also while the service runs. Raises StartError, Unavailable."""
    settings = load_settings(given, os.environ)
    prepare_data_dir(settings, serves=False)
    subject, ttl, renewed, revoked = (given[name] for name in ("subject", "ttl", "renew", "revoke"))
    actions = [one for one in (given["list"], renewed, revoked) if one]
    if len(actions) > 1:
        raise StartError("Give only one of --list, --renew and --revoke.")
    if renewed and not ttl:
        raise StartError("--renew needs a --ttl that begins now, like --ttl 90d.")
    if actions and (subject or given["permission"] or (ttl and not renewed)):
        raise StartError("--subject and --permission are only for a new token, --ttl also for --renew.")
    with contextlib.closing(open_store(settings)) as store:
        if not actions:
            if not re.fullmatch(SUBJECT_PATTERN, subject or "") or not given["permission"]:
                form = "--subject NAME (at most 64 letters, digits, dots, hyphens, underscores)"
                raise StartError(f"A token needs {form} and at least one --permission: see --help.")
            print(issue_token(store, subject, given["permission"], ttl or TOKEN_TTL, now_ms())[0])
            return 0
        wanted = renewed or revoked
        callers = [caller for caller in session_tokens(store) if wanted in (None, caller.subject)]
        for caller in callers:
            end = iso_time(caller.expires or 0)
            if revoked:
                store.revoke_token(caller.digest or "")
                print(f"revoked: {revoked}, which would have expired {end}")
            elif renewed:
                with contextlib.suppress(NotFound):  # it was revoked meanwhile
                    until = keep_caller(store, caller, ttl, now_ms(), renews=True).expires
                    print(f"renewed: {renewed}, until {iso_time(until or 0)} instead of {end}")
            else:
                print(caller.subject, end, *caller.permissions)
    if not callers:
        print(f"{wanted} has no token." if wanted else "There are no tokens.", file=sys.stderr)
    return int(bool(wanted and not callers))


def alert_command(given: Mapping[str, Any]) -> int:
    """Send a test alert, and print the answer. The exit code is 1 if it was refused. Raises StartError."""
    settings = load_settings(given, os.environ)
    if not settings.alert_url:
        raise StartError("There is no address for alerts: set STORYTELLER_ALERT_URL.")
    text = "This is a test. Alerts of this service arrive here."
    is_taken, answer = deliver(settings, Alert("test", "raised", text, now_ms()))
    print(answer)
    return int(not is_taken)


# ======================================================================================================
# Command line: arguments
# ======================================================================================================


class Command(NamedTuple):
    run: Callable[[Mapping[str, Any]], int | None]  # takes the parsed arguments; gives the exit code, None for 0
    meaning: str
    arguments: Sequence[str] = ()  # besides --host, --port and --data-dir


def read_command(text: str) -> str:
    if text in COMMANDS:
        return text
    near = difflib.get_close_matches(text, COMMANDS, 1) or [f"one of {', '.join(COMMANDS)}"]
    raise argparse.ArgumentTypeError(f"{text!r} is not a command: did you mean {near[0]}?")


ARGUMENTS: Mapping[str, Mapping[str, Any]] = {  # the options of argparse's add_argument()
    "--subject": {"help": "the program's name: at most 64 letters, digits, dots, hyphens, underscores"},
    "--permission": {"action": "append", "choices": PERMISSIONS, "default": [], "help": "may be repeated"},
    "--ttl": {"type": read_ttl, "help": "like 90s, 45m, 90d; by default 12h"},
    "--list": {"action": "store_true", "help": "list who has tokens, never the tokens"},
    "--renew": {"metavar": "SUBJECT", "help": "make every token of that subject end --ttl from now"},
    "--revoke": {"metavar": "SUBJECT", "help": "revoke every token of that subject"},
    "--to": {"metavar": "URL", "dest": "redis_url", "help": "the Redis to copy to; overrides REDIS_URL"},
    "file": {"metavar": "FILE"},
    "topic": {"nargs": "?", "type": read_command},
}
TOKEN_ARGUMENTS = ["--subject", "--permission", "--ttl", "--list", "--renew", "--revoke"]


def refer_to_scripts(given: Mapping[str, Any]) -> NoReturn:
    raise StartError(f"The tests need the start script: run {START_SCRIPT} test.")


COMMANDS: Mapping[str, Command] = {
    "serve": Command(serve_until_stopped, "run the service (the default)"),
    "status": Command(print_status, "show what the running service does, in ten lines"),
    "page": Command(print_links, "print the link of its page, with a token"),
    "check": Command(check, "look for problems on this PC"),
    "token": Command(token_command, "print a new session token, or list, renew or revoke tokens", TOKEN_ARGUMENTS),
    "alert": Command(alert_command, "send a test alert to STORYTELLER_ALERT_URL"),
    "move": Command(move, "copy the embedded store into a Redis", ["--to"]),
    "backup": Command(backup, "copy the embedded store to FILE", ["file"]),
    "restore": Command(restore, "replace the embedded store by the backup FILE", ["file"]),
    "version": Command(lambda given: print(TITLE), "print the version"),
    "help": Command(lambda given: make_parser(given["topic"]).print_help(), "show this or a command's help", ["topic"]),
    "test": Command(refer_to_scripts, f"run the developers' tests; to check this PC, use {START_SCRIPT} check"),
}


def describe_all() -> Iterator[str]:
    """The lines of --help on commands and settings."""
    yield "commands (COMMAND --help describes one):"
    for name, command in COMMANDS.items():
        yield f"  {name:<33} {command.meaning}"
    yield "\nsettings, from the environment or a .env file beside this module:"
    for row in dataclasses.fields(Settings):
        default = " ".join(row.default) if isinstance(row.default, tuple) else row.default
        shown = f"; by default {default or 'none'}".removesuffix(".0")
        meaning = row.metadata["meaning"]
        yield f"  {row.metadata['name']:<33} {meaning}{'' if 'by default' in meaning else shown}"


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command's arguments; without one, of the command line up to and with the command."""
    meaning = COMMANDS[command].meaning if command else "run.sh starts it, on Windows run.bat"
    parser = argparse.ArgumentParser(
        prog=f"{START_SCRIPT} {command or ''}".rstrip(),
        description=f"{TITLE}: {meaning}.",
        epilog=None if command else "\n".join(describe_all()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("host", "port", "data-dir"):
        parser.add_argument(f"--{name}", help=f"overrides STORYTELLER_{name.upper().replace('-', '_')}")
    for name in COMMANDS[command].arguments if command else ():
        parser.add_argument(name, **ARGUMENTS[name])
    if not command:
        parser.add_argument("--version", action="version", version=TITLE)
        parser.add_argument("command", nargs="?", type=read_command, default="serve", help="see below")
        parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    """The command and its arguments, by name. Exits with 2 if they are wrong. Raises StartError."""
    given = make_parser().parse_args(argv)
    parser = make_parser(given.command)
    _, unknown = parser.parse_known_args(given.rest, given)  # keeps what was given before the command
    if unknown and given.command != "test":  # those are pytest's
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:  # relative to the current folder, not to the module's as in a setting
        given.data_dir = given.data_dir and os.path.abspath(given.data_dir)
    except FileNotFoundError:
        raise StartError("The current folder, the base of --data-dir, was deleted: change to another one.") from None
    return vars(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0; 1 if a check failed, nothing answered, no token was found or an alert was refused;
    2 if the command is wrong or cannot be carried out; 130 if Ctrl+C ended it."""
    prepare_console()
    try:
        given = parse_arguments(argv)
        return COMMANDS[given["command"]].run(given) or 0
    except (StartError, Unavailable) as error:
        print(with_advice(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

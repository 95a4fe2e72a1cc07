#!/bin/sh
# Sets up .venv when that is needed, then starts the service. Linux and macOS; run.bat is its twin for Windows.
#
#   ./run.sh                  start the service
#   ./run.sh test [...]       run the tests (further arguments go to pytest)
#   ./run.sh check            checks everything once; any other arguments go to the service as well
set -eu

# The folder of this script, also when it was called through a link or from another folder.
script=$0
while [ -h "$script" ]; do
    target=$(readlink "$script")
    case $target in /*) script=$target ;; *) script=$(dirname -- "$script")/$target ;; esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd -P)
venv=$here/.venv
stamp=$venv/installed.txt
lock=$here/.venv.lock
unset PYTHONHOME # one that is meant for another Python would break ours

fail() {
    echo "run.sh: $1" >&2
    exit 1
}

# Written last of all: says for which requirements.txt, and for which Python, the last install was finished.
stamp_code='
import hashlib, pathlib, sys
digest = hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()
wanted = f"{digest}\n{sys.version}\n{sys.base_prefix}\n"
stamp = pathlib.Path(sys.argv[2])
if sys.argv[3] == "write":
    stamp.write_text(wanted, encoding="utf-8")
elif not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
    sys.exit(1)
'

is_ready() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$stamp_code" "$here/requirements.txt" "$stamp" read 2>/dev/null
}

find_python() {
    found=
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && return
        found=yes
    done
    [ -z "$found" ] || fail "Python is older than 3.10: install a newer one (on Debian and Ubuntu: sudo apt install python3)."
    fail "Python is missing: install Python 3.10 or newer (on Debian and Ubuntu: sudo apt install python3 python3-venv)."
}

# One set-up at a time. The lock is a folder, since making one is atomic everywhere; it holds its owner's number.
take_lock() {
    waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ -w "$here" ] || fail "The folder $here cannot be written: move the files to one that can."
        owner=$(cat "$lock/owner" 2>/dev/null || true)
        # No owner yet, or one that is at work, is waited for; what a killed set-up left is removed.
        if { [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; } || { [ -z "$owner" ] && [ $waited -ge 5 ]; }; then
            rm -rf "$lock"
            continue
        fi
        [ $waited -gt 0 ] || echo "Another start is setting up: waiting for it." >&2
        [ $waited -lt 600 ] || fail "Another start has been setting up for 10 minutes: end it, then try again."
        sleep 1
        waited=$((waited + 1))
    done
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT TERM HUP
    echo $$ >"$lock/owner"
}

set_up() {
    find_python
    take_lock
    if is_ready; then # another start did it meanwhile
        return
    fi
    rm -f "$stamp" || fail "The folder $venv cannot be written: give it to your user, or remove it."
    wanted=$("$name" -c 'import sys; print(sys.version, sys.base_prefix)')
    if [ "$("$venv/bin/python" -c 'import sys, pip; print(sys.version, sys.base_prefix)' 2>/dev/null)" != "$wanted" ]; then
        echo "Setting up: making .venv with Python $("$name" -c 'import platform; print(platform.python_version())')." >&2
        output=$("$name" -m venv --clear "$venv" 2>&1) || {
            case $output in
            *ensurepip* | *"No module named venv"*) fail "Python's venv is missing: install it (on Debian and Ubuntu: sudo apt install python3-venv)." ;;
            *) fail "Python's venv could not make $venv: $output" ;;
            esac
        }
    fi
    echo "Setting up: installing the packages of requirements.txt, which takes up to a minute." >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r "$here/requirements.txt" ||
        fail "The packages could not be installed: see above, check the internet connection, then try again."
    "$venv/bin/python" -c "$stamp_code" "$here/requirements.txt" "$stamp" write
}

if ! is_ready; then
    (set_up) # in a shell of its own, whose end gives the lock back
fi

# The venv is not activated: SwarmUI would inherit it.
if [ "${1-}" = test ]; then
    shift
    cd -- "$here"
    exec "$venv/bin/python" -m pytest "$@"
fi
exec "$venv/bin/python" "$here/storyteller_automation.py" "$@"

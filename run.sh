#!/bin/sh
# Sets up .venv if needed, then starts the service on Linux and macOS. On Windows use run.bat.
#
#   ./run.sh                  start the service
#   ./run.sh help             list the service's other commands
#   ./run.sh test [...]       run the developers' tests (further arguments go to pytest)
set -eu

# The folder of this script, also when it was called through a link or from another folder.
script=$0
while [ -h "$script" ]; do
    target=$(readlink "$script")
    case $target in /*) script=$target ;; *) script=$(dirname -- "$script")/$target ;; esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd -P)
venv=$here/.venv stamp=$here/.venv/installed.txt

fail() {
    echo "run.sh: $1" >&2
    exit 1
}

# A setup writes to the disk of .venv only, including pip's temporary files.
stop_if_full() {
    case $output in *"[Errno 28]"* | *"No space left"* | *"quota exceeded"* | *"No usable temporary directory"*)
        fail "The disk is full: make room on the disk that holds $venv, then try again." ;;
    esac
}

# The stamp is written last, once the packages could be imported. It names the Python and requirements.txt, and the size
# of each imported file according to its wheel. Each start compares it with the files in place, without an import.
stamp_code='
import hashlib, os, sys
command, requirements, stamp = sys.argv[1:]
os.chdir(sys.prefix)
wanted = open(requirements, "rb").read()
end = f"{sys.version!a}\n{sys.base_prefix!a}\n{hashlib.sha256(wanted).hexdigest()}"
if command == "read":
    text = open(stamp, encoding="utf-8").read()
    paths = [line.split(" ", 1)[1] for line in text.split("\n")[:-3]]
    now = "".join(f"{os.path.getsize(path)} {path}\n" for path in paths) + end
    print("ready" if text == now and sys.prefix != sys.base_prefix else "")
else:
    import csv, importlib.metadata, re
    for name in re.findall(r"(?m)^([\w-]+)==", wanted.decode()):
        importlib.import_module(name.replace("-", "_"))
    imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open(stamp, "w", encoding="utf-8") as file:
        for package in importlib.metadata.distributions():
            for name, _, size in csv.reader(package.read_text("RECORD").splitlines()):
                if str(package.locate_file(name)) in imported:
                    file.write(f"{size} {os.path.relpath(package.locate_file(name), sys.prefix)}\n")
        file.write(end)
'

# By the output, not the exit code: sh runs an empty bin/python as a script that succeeds.
is_ready() {
    [ "$("$venv/bin/python" -I -c "$stamp_code" read "$here/requirements.txt" "$stamp" 2>/dev/null)" = ready ]
}

find_python() {
    fault="is missing"
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        command -v "$name" >/dev/null 2>&1 || continue
        "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && return
        fault="is older than 3.10"
    done
    fail "Python $fault: install Python 3.10 or newer (on Debian and Ubuntu: sudo apt install python3 python3-venv)."
}

# One setup at a time. The lock on the folder belongs to descriptor 9: it ends with this shell and its children.
take_lock() {
    [ -w "$here" ] || fail "The folder $here cannot be written: move the files to another one."
    "$name" -I -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    echo "Another start is setting up: waiting for it." >&2
    "$name" -I -c 'import fcntl, signal; signal.alarm(600); fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null ||
        [ $? -lt 128 ] || fail "Another start has been setting up for 10 minutes: end it, then try again."
}

# Installs into .venv whatever PIP_* and pip.conf say (the first variable disables PIP_PYTHON). They may set the index.
install() {
    echo "Setting up: installing the packages of requirements.txt, which takes up to a minute." >&2
    output=$(
        export _PIP_RUNNING_IN_SUBPROCESS=1 PIP_PYTHON_VERSION= PIP_PLATFORM= PIP_IMPLEMENTATION= PIP_ABI= PIP_DRY_RUN=0 PIP_NO_DEPS=0
        "$venv/bin/python" -I -m pip install --disable-pip-version-check --quiet --no-user --target= --prefix "$venv" \
            --root / -r "$here/requirements.txt" 2>&1 &&
            "$venv/bin/python" -I -c "$stamp_code" write "$here/requirements.txt" "$stamp" 2>&1
    ) && is_ready && return
    stop_if_full
    case ${1-}$output in anew* | *"No matching distribution"* | *"ConnectionPool("*) # pip works, but not the download
        printf '%s\n' "$output" >&2
        fail "The packages could not be installed: see above, check the internet connection, then try again." ;;
    *) return 1 ;;
    esac
}

set_up() {
    find_python
    take_lock
    ! is_ready || return 0 # another start has done it meanwhile
    rm -f "$stamp" || fail "The folder $venv cannot be written: give it to your user, or remove it."
    export TMPDIR="$venv"
    # Complete the existing .venv. If that fails, create it anew, in two steps: venv hides the output of ensurepip.
    "$venv/bin/python" -I -c 'import pip' 2>/dev/null && install && return
    echo "Setting up: creating .venv with Python $("$name" -I -c 'import platform; print(platform.python_version())')." >&2
    output=$("$name" -I -m venv --clear --without-pip "$venv" 2>&1 && "$venv/bin/python" -I -m ensurepip --default-pip 2>&1) || {
        stop_if_full
        case $output in
        *"No module named ensurepip"* | *"No module named venv"*) fail "Python's venv is missing: install it (on Debian and Ubuntu: sudo apt install python3-venv)." ;;
        *) fail "Python's venv could not create $venv: $output" ;;
        esac
    }
    install anew
}

is_ready || (set_up) 9<"$here" # in a subshell, whose end releases the lock

# The venv is not activated: SwarmUI would inherit it.
if [ "${1-}" = test ]; then
    shift && cd -- "$here"
    echo "These are the developers' tests, about 8 minutes. To check this PC, use ./run.sh check." >&2
    exec "$venv/bin/python" -I -m pytest "$@"
fi
# As a module, to keep its bytecode: compiling a script leaves 13 MB in memory. A full disk can truncate the bytecode.
exec "$venv/bin/python" -I -X pycache_prefix="$venv/bytecode" -c "import sys; sys.path.insert(0, sys.argv.pop(1)); exec('try: import storyteller_automation as it\nexcept (EOFError, ValueError, TypeError): import shutil; shutil.rmtree(sys.pycache_prefix, True); sys.dont_write_bytecode = True; import storyteller_automation as it'); sys.exit(it.main())" "$here" "$@"

@goto batch
r"""Starts the service, with what it needs in the folder .venv beside this file.

run.bat ARGUMENTS...       starts storyteller_automation.py with them; run.bat help lists its commands
run.bat test ARGUMENTS...  runs the developers' tests

Two programs read this file: cmd from :batch on; Python (with -x) the part after the quotes.

:batch
@echo off
setlocal EnableExtensions DisableDelayedExpansion
set "here=%~dp0"
set "venv_python=%~dp0.venv\Scripts\python.exe"

rem The window of a double-click closes with this script, so an error waits for a key there. Only Explorer
rem quotes like this; a scheduled task has neither a SESSIONNAME nor somebody to press a key.
set "keep_open="
setlocal EnableDelayedExpansion
set "line=none !cmdcmdline!"
set "clicked=1"
if "!line:/c ""=!" == "!line!" set "clicked="
if "!line:%~nx0=!" == "!line!" set "clicked="
if not defined SESSIONNAME set "clicked="
if defined STORYTELLER_NO_PAUSE set "clicked="
if defined clicked (endlocal & set "keep_open=1") else endlocal

"%venv_python%" -I -x "%~f0" check 2>nul && goto start

set "python="
set "fault=was not found"
call :try py -3
call :try python
if defined python goto set_up
set "code=1"
>&2 echo run.bat: Python %fault%: install 3.10 or newer from python.org, then start run.bat again.
goto end

:try
if defined python exit /b
rem Microsoft Store's stub exits 9009, after a misleading hint. With "call", python may be a batch file.
call %* -I -c "import sys; sys.exit(3 if sys.version_info < (3, 10) else 0)" >nul 2>nul
if %errorlevel% equ 3 set "fault=is too old"
if %errorlevel% equ 0 set "python=%*"
exit /b

:set_up
pushd "%here%"
call %python% -I -x "%~nx0" set_up
set "code=%errorlevel%"
popd
if not %code% equ 0 goto end

:start
if "%~1" == "test" goto test
rem As a module, to keep its bytecode: compiling a script leaves 13 MB in memory. A full disk can truncate the bytecode.
set run="%venv_python%" -I -X "pycache_prefix=%here%.venv\bytecode" -c "import sys; sys.path.insert(0, sys.argv.pop(1)); exec('try: import storyteller_automation as it\nexcept (EOFError, ValueError, TypeError): import shutil; shutil.rmtree(sys.pycache_prefix, True); sys.dont_write_bytecode = True; import storyteller_automation as it'); sys.exit(it.main())" "%here%."
rem A goto to no label makes cmd leave this file. So it has no next line to run when Python has ended, and
rem does not ask "Terminate batch job (Y/N)?" after Ctrl+C. The exit code is Python's.
if defined keep_open goto start_in_window
endlocal & goto #nowhere 2>nul || title %COMSPEC% & %run% %*
:start_in_window
endlocal & goto #nowhere 2>nul || title %COMSPEC% & %run% %* || (echo The service ended with an error, see above. & pause)

:test
pushd "%here%"
>&2 echo These are the developers' tests, about 8 minutes. To check this PC, use run.bat check.
rem Not "-m pytest": cmd cannot remove the word "test" from the arguments without damage to quotes.
"%venv_python%" -I -c "import sys, pytest; sys.exit(pytest.main(['test_storyteller_automation.py'] + sys.argv[2:]))" %*
set "code=%errorlevel%"
popd

:end
if not "%code%" == "0" if defined keep_open (echo run.bat ended with an error, see above. & pause)
exit /b %code%
"""
import hashlib, msvcrt, os, subprocess, sys, time

os.chdir(os.path.dirname(os.path.abspath(__file__)))
requirements, venv, stamp = "requirements.txt", os.path.abspath(".venv"), r".venv\installed.txt"
venv_python = [os.path.join(venv, r"Scripts\python.exe"), "-I", "-X", "utf8"]
DISK_FULL = ("[Errno 28]", "[WinError 112]", "No usable temporary directory")


def wanted():
    with open(requirements, "rb") as file:
        return [ascii(sys.version), ascii(sys.base_prefix), hashlib.sha256(file.read()).hexdigest()]


def check():  # run by the venv's Python: 0 if every file of the stamp is in place; imports none of them
    with open(stamp, encoding="utf-8") as file:
        lines = file.read().split("\n")
    paths = [line.split(" ", 1)[1] for line in lines[:-3]]
    return int(lines != [f"{os.path.getsize(os.path.join(sys.prefix, path))} {path}" for path in paths] + wanted())


def finish():  # run by the venv's Python: imports the packages, then lists in the stamp each imported file, with its wheel's size
    import csv, importlib.metadata, re
    for name in re.findall(r"(?m)^([\w-]+)==", open(requirements, encoding="utf-8").read()):
        importlib.import_module(name.replace("-", "_"))
    imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with open(stamp, "w", encoding="utf-8") as file:
        for package in importlib.metadata.distributions():
            for name, _, size in csv.reader(package.read_text("RECORD").splitlines()):
                if str(package.locate_file(name)) in imported:
                    file.write(f"{size} {os.path.relpath(package.locate_file(name), sys.prefix)}\n")
        file.write("\n".join(wanted()))
    return check()


def run(*commands):  # one after another, until one fails; the exit code and output of the last one
    try:
        for command in commands:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
            if done.returncode != 0:
                break
    except OSError as error:
        return -1, str(error)
    return done.returncode, done.stdout


def stop(sentence, reason):  # `reason` is an exception, or the output of a program
    if any(word in str(reason) for word in DISK_FULL):
        sentence = f"the disk is full: make room on the disk that holds {venv}, then start run.bat again."
    elif isinstance(reason, str):
        print(reason.rstrip(), file=sys.stderr)
    sys.exit("run.bat: " + sentence)


def lock():  # Windows releases it when the process ends, however it ends
    file = open(".venv.lock", "a")
    for second in range(600):
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return file
        except OSError:
            if second == 0:
                print("run.bat: waiting for another start to finish its setup, at most 10 minutes ...", file=sys.stderr)
        time.sleep(1)
    sys.exit("run.bat: another start has been setting up for 10 minutes: close its window, then start run.bat again.")


def set_up():
    try:
        _file = lock()  # closing it would release the lock
    except OSError as error:
        stop("this folder cannot be written to: move it to one of your own, then start run.bat again.", error)
    if run([*venv_python, "-x", __file__, "check"])[0] == 0:
        return 0  # another start has done it meanwhile
    if os.path.exists(stamp):
        os.remove(stamp)  # there again once everything is installed
    first = "" if os.path.exists(venv) else "First start: "
    print(f"run.bat: {first}setting up Python packages, this takes about a minute ...", file=sys.stderr)
    # Installs into .venv whatever PIP_* and pip.ini say (the first disables PIP_PYTHON). They may set the index.
    os.environ.update(_PIP_RUNNING_IN_SUBPROCESS="1", PIP_PYTHON_VERSION="", PIP_PLATFORM="", PIP_IMPLEMENTATION="", PIP_ABI="")
    os.environ.update(PIP_DRY_RUN="0", PIP_NO_DEPS="0", TMPDIR=venv)
    target = ["--no-user", "--target=", "--prefix", venv, "--root", os.path.splitdrive(venv)[0] + "\\"]
    pip = [*venv_python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *target, "-r", requirements]
    install = [pip, [*venv_python, "-x", __file__, "finish"]]
    code, output = run(*install)  # this completes an existing .venv
    if code != 0 and not any(word in output for word in (*DISK_FULL, "No matching distribution", "ConnectionPool(")):
        # pip or the existing .venv is broken: create it anew, in two steps, as venv hides the output of ensurepip.
        create = [sys.executable, *venv_python[1:], "-m", "venv", "--clear", "--without-pip", venv]
        code, output = run(create, [*venv_python, "-m", "ensurepip", "--default-pip"])
        if code != 0:
            stop("Python could not create the folder .venv (see above): close what uses it, delete it, then start run.bat again.", output)
        code, output = run(*install)
    if code != 0:
        stop("pip could not install the packages (see above): check the internet connection, then start run.bat again.", output)
    return 0


try:
    sys.exit({"check": check, "finish": finish, "set_up": set_up}[sys.argv[1]]())
except KeyboardInterrupt:
    sys.exit("run.bat: stopped before the setup was finished.")

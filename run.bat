@goto batch
r"""Starts the service, with what it needs in the folder .venv beside this file.

run.bat ARGUMENTS...       starts storyteller_automation.py with them
run.bat test ARGUMENTS...  runs its tests

Two programs read this file: cmd the part from :batch on, Python (with -x) the one after the quotes.

:batch
@echo off
setlocal EnableExtensions DisableDelayedExpansion
set "here=%~dp0"
set "venv_python=%~dp0.venv\Scripts\python.exe"

rem A window opened by double-click closes with us: there, an error waits for a key. Only Explorer
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

rem The one thing that a start costs when all is set up.
"%venv_python%" -I -x "%~f0" check 2>nul && goto start

set "python="
set "old="
call :try py -3
call :try python
if defined python goto set_up
set "code=1"
if defined old (
    >&2 echo run.bat: this computer's Python is too old: install 3.10 or newer from python.org, then start run.bat again.
) else (
    >&2 echo run.bat: Python was not found: install 3.10 or newer from python.org, then start run.bat again.
)
goto end

:try
if defined python exit /b
rem The Store's stub exits 9009, after a hint that would mislead. With "call", python may be a batch file.
call %* -c "import sys; sys.exit(3 if sys.version_info < (3, 10) else 0)" >nul 2>nul
if %errorlevel% equ 3 set "old=1"
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
if defined PYTHONHOME goto start_plain
rem By a goto to nowhere cmd leaves this file, so it has nothing to go on with when Python has ended, and
rem does not ask "Terminate batch job (Y/N)?" after Ctrl+C. The exit code is Python's.
if defined keep_open goto start_in_window
endlocal & goto #nowhere 2>nul || title %COMSPEC% & "%venv_python%" "%here%storyteller_automation.py" %*
:start_in_window
endlocal & goto #nowhere 2>nul || title %COMSPEC% & "%venv_python%" "%here%storyteller_automation.py" %* || (echo The service ended with an error, see above. & pause)

:start_plain
rem PYTHONHOME would send the venv's Python to another one's library, and is to be gone in here only.
set "PYTHONHOME="
"%venv_python%" "%here%storyteller_automation.py" %*
set "code=%errorlevel%"
goto end

:test
set "PYTHONHOME="
pushd "%here%"
rem "-m pytest" less the word "test", which cannot be cut from the arguments here without harm to quotes.
"%venv_python%" -c "import sys, pytest; sys.exit(pytest.main(['test_storyteller_automation.py'] + sys.argv[2:]))" %*
set "code=%errorlevel%"
popd

:end
if not "%code%" == "0" if defined keep_open (echo run.bat ended with an error, see above. & pause)
exit /b %code%
"""
import hashlib, msvcrt, os, subprocess, sys, time

here = os.path.dirname(os.path.abspath(__file__))
os.chdir(here)
requirements, stamp = "requirements.txt", r".venv\installed.txt"
venv_python = [r".venv\Scripts\python.exe", "-I"]  # -I: what PYTHONPATH holds does not count as installed


def wanted():
    with open(requirements, "rb") as file:
        return [hashlib.sha256(file.read()).hexdigest(), ascii(sys.version), ascii(sys.base_prefix)]


def check():  # by the venv's Python: 0 all is installed, 3 for other requirements, 4 by another Python or in part
    try:
        with open(stamp, encoding="ascii") as file:
            installed = file.read().splitlines()
    except (OSError, ValueError):
        installed = []
    return 0 if installed == wanted() else 3 if installed[1:] == wanted()[1:] else 4


def finish():  # by the venv's Python
    with open(stamp, "w", encoding="ascii") as file:
        file.write("\n".join(wanted()) + "\n")


def run(*command, **options):
    try:
        return subprocess.call(command, **options)
    except OSError:
        return -1


def say(text):
    print("run.bat:", text, file=sys.stderr, flush=True)


def lock():  # Windows takes it back from a process that ends, however it ends
    file = open(".venv.lock", "a")
    for second in range(600):
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return file
        except OSError:
            if second == 0:
                say("waiting for another start to finish its set-up, 10 minutes at most ...")
        time.sleep(1)


def set_up():
    try:
        held = lock()
    except OSError:
        sys.exit("run.bat: this folder cannot be written to: move it to one of your own, then start run.bat again.")
    if not held:
        sys.exit("run.bat: another start has been at its set-up for 10 minutes: close its window, then start run.bat again.")
    state = run(*venv_python, "-x", __file__, "check", stderr=subprocess.DEVNULL)
    if state == 0:
        return 0  # the start that was waited for has done it
    if os.path.exists(stamp):
        os.remove(stamp)  # until all is installed
    first = "" if os.path.exists(".venv") else "First start: "
    say(first + "setting up Python packages, this takes about a minute ...")
    if state != 3 and run(sys.executable, "-I", "-m", "venv", "--clear", ".venv") != 0:
        sys.exit("run.bat: Python could not make the folder .venv (see above): close what uses it, delete it, then start run.bat again.")
    if run(*venv_python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", requirements) != 0:
        sys.exit("run.bat: pip could not install the packages (see above): check the internet connection, then start run.bat again.")
    return run(*venv_python, "-x", __file__, "finish")


try:
    sys.exit({"check": check, "finish": finish, "set_up": set_up}[sys.argv[1]]())
except KeyboardInterrupt:
    sys.exit("run.bat: stopped before the set-up was finished.")

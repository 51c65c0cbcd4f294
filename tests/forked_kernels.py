"""Kernels and commands that are forked from one process which has imported PyTorch and the package already.

A new Python needs three to four seconds for its imports, a forked one a tenth of that, and every notebook has a kernel of its
own. `forked_kernels()` lets jupyter_client ask that process for them; the first who asks starts it, all workers share it, and
where a system cannot fork (Windows, and macOS, whose libraries may not survive it), plain processes start. `tl(…)` runs the
command line in the same way: a process of its own, with its own streams, folder, variables and exit code. And `python()` names
a program that does what `sys.executable` does (`-c CODE`, `-m MODULE`, a file), in a fork: for tests whose processes must be
killed, run side by side or under torchrun. What asks for another Python (`-O`, PYTHONHASHSEED, a light import) starts that one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "TL_FORKED_KERNELS"
# What a tensor has freed is given to the next one, and not to the system and back with new pages: a twelfth of a chapter's time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_TOP_PAD_": str(64 << 20)}
CLIENT = """#!{python} -SE
import os, sys
sys.path.append({tests!r})
from forked_python import main
sys.exit(main({address!r}, sys.argv[1:]))
"""
PRELOADED = "numpy, torch, torchvision, sklearn.metrics, matplotlib.pyplot, ipykernel.kernelapp, ipykernel.zmqshell, tl_tutorial.fine_tuning"


# The process that forks

def serve(address: str) -> None:
    "Import what notebooks import, then fork a kernel for each request, for as long as the tests run."
    try:
        for name in PRELOADED.split(", "):
            __import__(name)
    except BaseException:
        Path(address).with_suffix(".failed").touch() # whoever waits starts plain kernels
        raise
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # the system buries kernels that have ended
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address + ".draft")
        listening.listen(64)
        os.rename(address + ".draft", address)
        listening.settimeout(5)
        owner = int(Path(address).parent.name.split("-")[1])
        while os.path.exists(address) and os.path.exists(f"/proc/{owner}"): # the folder goes when the tests have ended, if they were not killed
            with contextlib.suppress(OSError): # nobody asked for a while; or who asked was killed, and others are still to be answered
                answer(listening)


def answer(listening: socket.socket) -> None:
    "Fork one kernel, and tell its number once it has a session of its own, so that a signal to it reaches nobody else."
    connection, _ = listening.accept()
    with connection:
        connection.settimeout(60) # who asks sends all of it at once, or was killed
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while not text.endswith(b"\n") and (more := connection.recv(1 << 16)):
            text += more
        if not text.endswith(b"\n"):
            for stream in streams:
                os.close(stream)
            return
        connection.settimeout(None)
        asked = json.loads(text)
        hears, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(says, b".")
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                if streams:
                    python_in_fork(**asked, connection=connection, streams=streams)
                else:
                    (kernel if "arguments" in asked else command)(**asked)
            finally:
                os._exit(70)
        for stream in streams:
            os.close(stream)
        os.close(says)
        os.read(hears, 1)
        os.close(hears)
        if not streams:
            connection.sendall(f"{pid}\n".encode())


def spend(env: dict[str, str], seconds: float) -> None:
    "Write down core seconds that no process of the tests has waited for; tests/seconds.py reads them."
    with contextlib.suppress(OSError), open(spent_file(env), "a") as file: # the tests have ended
        file.write(f"{seconds}\n")


def spent_file(env: Any) -> Path:
    "Where the core seconds of one worker's forks are written."
    return Path(env.get(VARIABLE, "")).with_name(f"spent-{env.get('PYTEST_XDIST_WORKER', '')}")


def python_in_fork(words: list[str], cwd: str, env: dict[str, str], connection: socket.socket, streams: list[int]) -> None:
    "In the fork: fork the program, and stay to tell its number and how it ended. It is killed when nobody listens any more."
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        settle(cwd, env, [])
        end(program, words)
    for stream in (0, 1, 2, *streams): # a pipe ends when its last holder has closed it
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if connection in select.select([connection, ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    spend(env, used.ru_utime + used.ru_stime)
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def end(program: Callable[[list[str]], None], words: list[str]) -> None:
    "Run a program and end as Python does, but for taking apart what was imported, which needs two seconds. Does not return."
    code = 0
    try:
        program(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and code != stop.code:
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    with contextlib.suppress(Exception):
        threading._shutdown() # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def program(words: list[str]) -> None:
    "What `python WORDS` does; an error or an exit goes up."
    while words[0] in ("-u", "-W"): # -u: streams are flushed below; -W: takes the next word
        if words[0] == "-W":
            import warnings
            warnings.simplefilter(words[1]) # type: ignore[arg-type]
        words = words[1 if words[0] == "-u" else 2:]
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False) # noqa: SIM115
    sys.path[0] = str(Path(words[0]).resolve().parent) if words[0] not in ("-c", "-m") else ""
    sys.path[1:1] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in sys.path]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def settle(cwd: str | None, env: dict[str, str], streams: list[str]) -> None:
    "In the fork: the folder, the variables and the three streams of the new process."
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or ".")
    for number, name in enumerate(streams):
        opened = os.open(name, os.O_RDWR if name == os.devnull else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)


def kernel(arguments: list[str], cwd: str | None, env: dict[str, str]) -> None:
    "In the fork: become a kernel. Does not return."
    try:
        settle(cwd, env, [os.devnull] * 3)
        sys.argv = ["ipykernel_launcher", *arguments]
        from ipykernel.kernelapp import IPKernelApp
        IPKernelApp.launch_instance()
    finally:
        os._exit(0)


def command(words: list[str], cwd: str | None, env: dict[str, str], folder: str) -> None:
    "In the fork: run the command line in a child, leave its exit code in a file. Does not return."
    pid = os.fork()
    if pid == 0:
        settle(cwd, env, [os.devnull, f"{folder}/out", f"{folder}/err"])
        sys.argv = ["tl-tutorial", *words]
        code = 70
        try:
            from tl_tutorial.cli import main
            code = main()
        except SystemExit as stop: # argparse
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status, used = os.wait4(pid, 0)
    spend(env, used.ru_utime + used.ru_stime)
    Path(folder, "code.draft").write_text(str(os.waitstatus_to_exitcode(status)))
    os.rename(f"{folder}/code.draft", f"{folder}/code")
    os._exit(0)


# The side of the tests

class Forked:
    "A kernel's process, with as much of subprocess.Popen as jupyter_client uses."
    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return None
        self.returncode = 0
        return 0

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.02)
        return 0

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ask(address: str, **wanted: Any) -> int:
    "Have a kernel forked; its process number."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall((json.dumps(wanted) + "\n").encode())
        return int(connection.makefile("r").readline())


def launcher(address: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    "In the place of jupyter_client's own function: a Python kernel is forked, any other starts as before."
    def launch(cmd: list[str], *args: Any, **kwargs: Any) -> Any:
        if cmd[1:3] != ["-m", "ipykernel_launcher"] or not ready(address):
            return plain(cmd, *args, **kwargs)
        env = {**os.environ, **(kwargs.get("env") or {})}
        return Forked(ask(address, arguments=cmd[3:], cwd=str(kwargs.get("cwd") or os.getcwd()), env=env))
    return launch


def ready(address: str, patience: float = 120) -> bool:
    "See that the process is there: the first who asks starts it, the others wait. False where it could not start."
    if not address:
        return False
    if not os.path.exists(address):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(address + ".begun", os.O_CREAT | os.O_EXCL))
            inline = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"} | KEEP_MEMORY
            subprocess.run([sys.executable, __file__, address], env=inline, cwd=Path(__file__).parents[1], start_new_session=True)
    began = time.monotonic()
    while not os.path.exists(address):
        if time.monotonic() - began > patience or os.path.exists(Path(address).with_suffix(".failed")):
            return False
        time.sleep(0.05)
    return True


def tl(*words: object, timeout: float = 300, cwd: str | Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    "Run the command line, `tl-tutorial WORDS`, in a forked process; in a new one where there is none to fork from."
    arguments, place = list(map(str, words)), str(cwd or os.getcwd())
    if not ready(os.environ.get(VARIABLE, "")):
        plain = [sys.executable, "-m", "tl_tutorial", *arguments]
        return subprocess.run(plain, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)
    with tempfile.TemporaryDirectory() as folder:
        pid, began = ask(os.environ[VARIABLE], words=arguments, cwd=place, env=dict(env or os.environ), folder=folder), time.monotonic()
        while not os.path.exists(f"{folder}/code"):
            if time.monotonic() - began > timeout:
                os.killpg(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(arguments, timeout)
            time.sleep(0.02)
        out, err, code = (Path(folder, name).read_text(encoding="utf-8", errors="surrogateescape") for name in ("out", "err", "code"))
        return subprocess.CompletedProcess(arguments, int(code), out, err)


def python() -> str:
    """The program to run instead of sys.executable; sys.executable itself where there is nothing to fork from.

    Signals go on to the fork, but nobody can pass on SIGKILL: the fork ends a moment after the program that was killed."""
    address = os.environ.get(VARIABLE, "")
    if " " in sys.executable or not hasattr(os, "pidfd_open") or not ready(address):
        return sys.executable
    place = Path(address).with_name("python")
    if not place.exists():
        draft = place.with_name(f"python-{os.getpid()}")
        draft.write_text(CLIENT.format(python=sys.executable, tests=str(Path(__file__).parent), address=address))
        draft.chmod(0o755)
        draft.rename(place)
    return str(place)


@contextlib.contextmanager
def forked_kernels() -> Iterator[None]:
    "From here on jupyter_client's Python kernels are forked. Workers share the process of those who started them."
    if not sys.platform.startswith("linux"):
        yield
        return
    from jupyter_client.provisioning import local_provisioner
    folder = None
    if VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix=f"kernels-{os.getpid()}-")
        os.environ[VARIABLE] = os.path.join(folder, "socket")
    plain = local_provisioner.launch_kernel
    local_provisioner.launch_kernel = launcher(os.environ[VARIABLE], plain)
    try:
        yield
    finally:
        local_provisioner.launch_kernel = plain
        if folder:
            shutil.rmtree(folder) # and so the process ends
            del os.environ[VARIABLE]


if __name__ == "__main__":
    if os.fork() == 0: # nobody's child, so that no worker's time holds that of everybody's kernels
        serve(sys.argv[1])

"""Kernels and commands that are forked from one process which has imported PyTorch and the package already.

A new Python needs three to four seconds for its imports, a forked one a tenth of that, and every notebook has a kernel of its
own. `forked_kernels()` lets jupyter_client ask that process for them; the first who asks starts it, all workers share it, and
where a system cannot fork (Windows, and macOS, whose libraries may not survive it), plain processes start. `tl(…)` runs the
command line in the same way: a process of its own, with its own streams, folder, variables and exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIABLE = "TL_FORKED_KERNELS"
SPENT: list[float] = [] # core seconds of forked commands since somebody looked (tests/seconds.py)
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
        listening.listen(16)
        os.rename(address + ".draft", address)
        listening.settimeout(5)
        while os.path.exists(address): # the folder goes when the tests have ended
            with contextlib.suppress(TimeoutError):
                answer(listening)


def answer(listening: socket.socket) -> None:
    "Fork one kernel, and tell its number once it has a session of its own, so that a signal to it reaches nobody else."
    connection, _ = listening.accept()
    with connection:
        connection.settimeout(None)
        asked = json.loads(connection.makefile("r").readline())
        hears, says = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.write(says, b".")
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            (kernel if "arguments" in asked else command)(**asked)
        os.close(says)
        os.read(hears, 1)
        os.close(hears)
        connection.sendall(f"{pid}\n".encode())


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
    Path(folder, "code.draft").write_text(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}")
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
            inline = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            subprocess.Popen([sys.executable, __file__, address], env=inline, cwd=Path(__file__).parents[1], start_new_session=True)
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
        SPENT[:] = [sum(SPENT) + float(code.split()[1])]
        return subprocess.CompletedProcess(arguments, int(code.split()[0]), out, err)


@contextlib.contextmanager
def forked_kernels() -> Iterator[None]:
    "From here on jupyter_client's Python kernels are forked. Workers share the process of those who started them."
    if not sys.platform.startswith("linux"):
        yield
        return
    from jupyter_client.provisioning import local_provisioner
    folder = None
    if VARIABLE not in os.environ:
        folder = tempfile.mkdtemp(prefix="kernels-")
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
    serve(sys.argv[1])

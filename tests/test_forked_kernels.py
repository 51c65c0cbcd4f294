"""The process that forks kernels and commands for all tests goes on, whatever one of those who ask does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked_kernels import VARIABLE, python

WHOLE = {"words": ["--version"], "cwd": "/", "env": {}, "folder": "/nowhere"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["before a word", "in the middle", "before the answer"])
def test_who_hangs_up_keeps_nobody_waiting(share: float, tmp_path: Path) -> None:
    if python() == sys.executable:
        pytest.skip("nothing forks here: plain Pythons start")
    request = (json.dumps({**WHOLE, "folder": str(tmp_path)}) + "\n").encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[VARIABLE])
        connection.sendall(request[:round(share * len(request))])
    done = subprocess.run([python(), "-c", "print('here')"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "here\n", done.stderr

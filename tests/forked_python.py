"""What a test starts in the place of Python: asks the process that forks for a fork, and is as if it were that fork.

Its streams, folder and variables are the fork's; signals go on to it; it ends as the fork ends. Started by the program that
`forked_kernels.python()` writes, without `site`, so that it needs 20 ms.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def main(address: str, words: list[str]) -> int:
    "The fork's exit code; a signal that ended it ends this process too."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        asked = json.dumps({"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}) + "\n"
        socket.send_fds(connection, [asked.encode()[:1]], [0, 1, 2])
        connection.sendall(asked.encode()[1:])
        answers = connection.makefile("r")
        pid = int(answers.readline())
        for name in FORWARDED:
            if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(pid, number))
        for stream in (0, 1, 2):
            os.close(stream)
        code = int(answers.readline() or 70)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

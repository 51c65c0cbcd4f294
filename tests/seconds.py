"""Where the seconds of a test run went: printed at its end, by part, by notebook and by test file.

Two numbers for each: the seconds that passed while its tests ran, and the *core seconds*, the processor time that they used. The
second hardly changes when something else is busy on the machine, so the budgets of `tools/times.py` are about it. Processor time
is that of the process that runs the test and of all below it, of the notebook's kernel, and of forked commands.
`--keep-seconds FILE` writes the table as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import forked_kernels
import psutil
import pytest

LINES = 12 # as many pages and files are named on the screen


def living(pid: int) -> list[int]:
    "A process and all below it; where the system has no such list (only Linux has), the process alone."
    below = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        # The thread may have ended; and a test may have put something else in the place of `read_text`.
        with contextlib.suppress(OSError), open(path) as file:
            below += map(int, file.read().split())
    return [pid, *(each for child in below for each in living(child))]


def used(pid: int) -> float:
    "Core seconds of a process and of all below it: what has ended is counted with the one who waited for it."
    total = 0.0
    for each in living(pid):
        with contextlib.suppress(psutil.Error): # it has ended
            total += sum(psutil.Process(each).cpu_times()[:4])
    return total


def forks() -> float:
    "Core seconds of forked programs that have ended since the last call."
    place, total = forked_kernels.spent_file(os.environ), 0.0
    with contextlib.suppress(OSError):
        mine = place.rename(place.with_suffix(".read"))
        with open(mine) as file:
            total = sum(map(float, file.read().split()))
    return total


def kernel(item: pytest.Item) -> int | None:
    "The process of the kernel that runs a notebook's cell."
    manager = getattr(getattr(item.parent, "kernel", None), "km", None)
    return getattr(getattr(getattr(manager, "provisioner", None), "process", None), "pid", None)


class Seconds:
    "A plugin of pytest: every worker measures, the process that they report to adds up."

    def __init__(self, config: pytest.Config) -> None:
        self.me = os.getpid() # noted once: a test may have put something else in its place
        self.here, self.there = used(self.me), dict[int, float]()
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.cells: dict[str, list[float]] = {}
        self.kept = config.getoption("keep_seconds")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        "Note the core seconds since the report before this one."
        report = yield
        here, commands = used(self.me), forks()
        report.core_seconds = max(here - self.here, 0.0) + commands # less than before: somebody's child was waited for by nobody
        self.here, pid = here, kernel(item)
        if pid is not None and pid not in living(self.me): # a plain kernel is a child, and counted
            before = self.there.get(pid, 0.0)
            self.there[pid] = max(used(pid), before) # it has ended when the last cell's report is made
            report.core_seconds += self.there[pid] - before
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        "Add one report to its file's seconds."
        for table, name in ((self.spent, report.nodeid.split("::")[0]), (self.cells, report.nodeid)):
            row = table.setdefault(name, [0.0, 0.0])
            row[0] += report.duration
            row[1] += getattr(report, "core_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        "Print the table, the dearest first."
        if self.kept:
            Path(self.kept).write_text(json.dumps({"files": self.spent, "tests": self.cells}, indent=0))
        if sum(seconds for seconds, _ in self.spent.values()) < 30:
            return
        terminalreporter.write_sep("=", "where the seconds went: passed, and used on a core")
        for rows in (parts(self.spent), self.spent):
            dearest = sorted(rows.items(), key=lambda row: -row[1][1])
            for name, (seconds, cores) in dearest[:LINES]:
                terminalreporter.write_line(f"{seconds:7.1f} s {cores:7.1f} s  {name}")
            if left := dearest[LINES:]:
                total = [sum(row[column] for _, row in left) for column in (0, 1)]
                terminalreporter.write_line(f"{total[0]:7.1f} s {total[1]:7.1f} s  {len(left)} others")


def parts(spent: dict[str, list[float]]) -> dict[str, list[float]]:
    "The seconds of each part of the course, of the Python tests, and of all."
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, row in spent.items():
        for part in (name.rsplit("/", 1)[0] + "/", "all"):
            found[part] = [a + b for a, b in zip(found[part], row, strict=True)]
    return found

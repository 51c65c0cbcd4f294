"""Peace between nbdev and nbval: marks are read from `#|` lines, and outputs that nbdev-clean left without a count are compared."""

import os
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent / "tests"
LONG = ("nbs/transfer/", "nbs/beyond/", "nbs/repairs/", "nbs/ideas/")
TOGETHER = {"tests/test_browser.py": "tests/test_site.py"} # both need the site, which one worker builds once
SKIP = {"eval: false", "gpu", "network"}
UNTIL_THE_END = ExitStack()

# Two notebooks run side by side; each keeps to one core so that they do not fight, and sums come in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
sys.path.insert(0, str(TESTS))


def pytest_addoption(parser: pytest.Parser) -> None:
    "See tests/seconds.py."
    parser.addoption("--keep-seconds", metavar="FILE", help="write the seconds of each notebook, file and test to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    "Of another library's message only its type is compared, and notebooks get kernels that are forked where that can be."
    if getattr(config.option, "nbval_sanitize_with", "") is None:
        config.option.nbval_sanitize_with = str(TESTS / "foreign_messages.cfg") # from whatever folder pytest is started
    config.option.loadscopereorder = False # the order below, not that of pytest-xdist
    from forked_kernels import forked_kernels
    from seconds import Seconds
    config.pluginmanager.register(Seconds(config), "seconds")
    UNTIL_THE_END.enter_context(forked_kernels())


def pytest_unconfigure() -> None:
    "The process that forks kernels ends with the tests."
    UNTIL_THE_END.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    "Give each notebook cell its marks, and a run count so that nbval compares every stored output."
    cell = getattr(item, "cell", None)
    if cell is None:
        return
    marks = {line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")}
    cell.execution_count = 1
    if marks & SKIP:
        item.options["skip"] = True
    if "varies" in marks:
        item.options["check"] = False


def pytest_terminal_summary(terminalreporter: Any) -> None:
    "Say in words what was not tested, and why; what a notebook marks as not to be run is no news."
    found = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
                    if report.nodeid.startswith("tests/") and isinstance(report.longrepr, tuple))
    for reason, times in found.items():
        terminalreporter.write_line(f"skipped{f' ({times} tests)' if times > 1 else ''}: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    "As `--dist loadscope`, file by file, but files that share something dear go to one worker."
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return TOGETHER.get(file, file)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The longest notebooks first, so that at the end no worker is left alone with one of them."
    items.sort(key=lambda item: next((place for place, part in enumerate(LONG) if item.nodeid.startswith(part)), len(LONG)))

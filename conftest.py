"""Peace between nbdev and nbval: marks are read from `#|` lines, and outputs that nbdev-clean left without a count are compared."""

import os
from pathlib import Path

import pytest

SKIP = {"eval: false", "gpu", "network"}

# Two notebooks run side by side; each keeps to one core so that they do not fight, and sums come in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def pytest_configure(config: pytest.Config) -> None:
    "Of another library's message only its type is compared, from whatever folder pytest is started."
    if getattr(config.option, "nbval_sanitize_with", "") is None:
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests/foreign_messages.cfg")


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

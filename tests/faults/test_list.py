"""The list of faults and the tests that show them agree."""

import csv
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from forked_kernels import python

HERE = Path(__file__).parent
FILES = {path.relative_to(HERE.parents[1]).as_posix() for path in HERE.glob("test_*.py")}
COUNTS = {"A": 35, "B": 10, "C": 17, "D": 14, "E": 20, "F": 14, "G": 9, "H": 12, "I": 8, "J": 12, "K": 8, "L": 22, "M": 40}


def test_every_fault_has_a_test_and_every_test_its_fault(request: pytest.FixtureRequest) -> None:
    rows = list(csv.DictReader((HERE / "faults.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert Counter(row["identifier"][0] for row in rows) == COUNTS and len({row["identifier"] for row in rows}) == sum(COUNTS.values())
    assert all(row["group"] and row["fault"] and row["expected"] for row in rows)
    elsewhere = [row["test"] for row in rows if not row["test"].startswith("tests/faults/")] # L and M: tests that stand beside others of their room
    found = {item.nodeid for item in request.session.items}
    whole = {item.split("::")[0] for item in found} >= FILES and found >= set(elsewhere)
    lines = sorted(found) if whole else collected(elsewhere)
    shown = {found[1] for line in lines if (found := re.search(r"\[([A-K]\d\d) ", line))}
    assert shown == {row["identifier"] for row in rows if row["identifier"][0] < "L"}
    for row in rows:
        assert row["test"] in lines and (row["test"] in elsewhere or f"[{row['identifier']} " in row["test"]), row


def collected(elsewhere: list[str]) -> list[str]:
    "The tests of this folder and those that stand elsewhere, where this run has only some of them."
    command = [python(), "-m", "pytest", "--collect-only", "-q", "-n", "0", "-o", "addopts=", str(HERE), *elsewhere, f"--rootdir={HERE.parents[1]}"]
    return subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=200).stdout.splitlines()

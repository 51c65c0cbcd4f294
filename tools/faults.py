"""Run the fault suite and keep its results for the fault table of the docs.

    python -m tools.faults             writes nbs/reference/fault_results.tsv
    python -m tools.faults --fuzz N    tries N inputs in each fuzz test, and writes nbs/reference/fuzz_results.tsv
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST, RESULTS = ROOT / "tests/faults/faults.tsv", ROOT / "nbs/reference/fault_results.tsv"
FUZZED = ROOT / "nbs/reference/fuzz_results.tsv"


def rows(path: Path) -> list[dict[str, str]]:
    "The rows of a table with tabs."
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def outcomes() -> dict[str, str]:
    "Each test of the suite, as pytest names it, and how it ended."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        elsewhere = [row["test"] for row in rows(LIST) if not row["test"].startswith("tests/faults/")]
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"--junitxml={file}", "tests/faults", *elsewhere]
        subprocess.run(command, cwd=ROOT, check=False)
        found = {}
        for case in xml.parse(file).iter("testcase"):
            name = f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
            bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[name] = {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad[0]] if bad else "passed"
    return found


def fuzz(inputs: int) -> int:
    "Try so many inputs in each fuzz test, and keep what Hypothesis counted."
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-o", "addopts=", "--hypothesis-show-statistics", "tests/faults/test_fuzz.py"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=os.environ | {"TL_FUZZ": str(inputs)})
    counted = fuzz_counts(done.stdout)
    lines = ["promise\tinputs tried\tbroken by", *("\t".join(map(str, row)) for row in counted)]
    if counted:
        FUZZED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(done.stdout[-300:], *lines, sep="\n")
    return done.returncode


def fuzz_counts(text: str) -> list[tuple[str, int, int]]:
    "For each test in Hypothesis' statistics: its promise, the inputs tried and those that broke it."
    found = []
    for name, rest in re.findall(r"::test_(\w+):\n(.*?)(?=\n\S|\Z)", text, re.S):
        ended = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", rest)
        found.append((name.replace("_", " "), sum(int(good) + int(bad) for good, bad in ended), sum(int(bad) for _, bad in ended)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults")
    parser.add_argument("--fuzz", type=int, metavar="N", help="inputs for each fuzz test")
    if inputs := parser.parse_args().fuzz:
        return fuzz(inputs)
    found, faults = outcomes(), rows(LIST)
    lines = [f"{row['identifier']}\t{found.get(row['test'], 'not run')}" for row in faults]
    RESULTS.write_text("\n".join(["identifier\tresult", *lines]) + "\n", encoding="utf-8")
    passed = sum(line.endswith("\tpassed") for line in lines)
    print(f"{passed} of {len(lines)} faults passed; wrote {RESULTS.relative_to(ROOT)}")
    return 0 if passed == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run the fault suite and keep its results for the fault table of the docs.

    python -m tools.faults      writes nbs/reference/fault_results.tsv
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST, RESULTS = ROOT / "tests/faults/faults.tsv", ROOT / "nbs/reference/fault_results.tsv"


def rows(path: Path) -> list[dict[str, str]]:
    "The rows of a table with tabs."
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def outcomes() -> dict[str, str]:
    "Each test of the suite, as pytest names it, and how it ended."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"--junitxml={file}", "tests/faults"]
        subprocess.run(command, cwd=ROOT, check=False)
        found = {}
        for case in xml.parse(file).iter("testcase"):
            name = f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
            bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[name] = {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad[0]] if bad else "passed"
    return found


def main() -> int:
    found, faults = outcomes(), rows(LIST)
    lines = [f"{row['identifier']}\t{found.get(row['test'], 'not run')}" for row in faults]
    RESULTS.write_text("\n".join(["identifier\tresult", *lines]) + "\n", encoding="utf-8")
    passed = sum(line.endswith("\tpassed") for line in lines)
    print(f"{passed} of {len(lines)} faults passed; wrote {RESULTS.relative_to(ROOT)}")
    return 0 if passed == len(lines) else 1


if __name__ == "__main__":
    sys.exit(main())

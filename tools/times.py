"""What each page and each test file costs in core seconds, held to a budget; and how many cells assert, are compared, or are not.

    python -m tools.times                      run the whole test command, keep the core seconds of every file
    python -m tools.times nbs/ideas tests/…    run and keep only these
    python -m tools.times --from FILE          keep what `pytest --keep-seconds FILE` wrote
    python -m tools.times --cells              count the cells again; the number that vary may only fall, the others only rise

The first three write tests/times.tsv, the last one tests/cells.json; tests/test_times.py holds the pages to both. Core seconds
are processor time (tests/seconds.py): they hardly change when the machine has something else to do. The run time that a page
states at its top is checked against them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES, CELLS = ROOT / "tests/times.tsv", ROOT / "tests/cells.json"
BUDGET = {"nbs/module/": 5.0, "nbs/": 45.0} # core seconds of a page in the test run; the first that fits
STATED = re.compile(r"(?:takes|runs|runs offline) (?:in )?about (\d+) s(?:econds)?\b|Everything runs offline in about (\d+) seconds")


def budget(page: str) -> float:
    "How many core seconds a page may need."
    return next(seconds for part, seconds in BUDGET.items() if page.startswith(part))


def kept(path: Path = TIMES) -> dict[str, float]:
    "Core seconds by file, as they were kept last."
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return {file: float(seconds) for file, seconds in (line.split("\t") for line in lines)}


def keep(found: dict[str, float], path: Path = TIMES) -> None:
    "Add new core seconds to the table; files that are gone leave it."
    rows = {file: seconds for file, seconds in {**kept(path), **found}.items() if (ROOT / file).exists()}
    path.write_text("".join(["file\tcore seconds\n", *(f"{file}\t{seconds:.1f}\n" for file, seconds in sorted(rows.items()))]))


def pages() -> list[str]:
    "Every notebook, as pytest names it."
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if "/." not in path.as_posix())


def stated(page: str) -> int | None:
    "The run time that a page's introduction promises, in seconds."
    cells = json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"][:3]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return int(next(filter(None, found.groups()))) if (found := STATED.search(text)) else None


def reader(cores: float) -> int:
    "What to state for so many core seconds: a reader's kernel imports PyTorch itself, and waits for its figures. In steps of five."
    return 5 * math.ceil((cores + 5) / 5)


def cells() -> dict[str, dict[str, int]]:
    "For each part of the course: cells that assert, cells with a stored output that is compared, and cells that say `#| varies`."
    found: dict[str, dict[str, int]] = {}
    for page in pages():
        count = found.setdefault(page.split("/")[1] if page.count("/") > 1 else "home", {"asserting": 0, "compared": 0, "varies": 0})
        for text, outputs in code(page):
            marks = {line[2:].strip() for line in text.splitlines() if line.startswith("#|")}
            run = not marks & {"eval: false", "gpu", "network"}
            count["asserting"] += run and bool(re.search(r"^\s*assert\b|; assert\b", text, re.M))
            count["varies"] += "varies" in marks
            count["compared"] += run and bool(outputs) and "varies" not in marks
    return found


def code(page: str) -> Iterator[tuple[str, list]]:
    "The text and the stored outputs of each code cell."
    for cell in json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), cell["outputs"]


def tightened(old: dict[str, dict[str, int]], new: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    "The limits after a count: fewer cells vary, more assert and are compared; never the other way."
    best = {"asserting": max, "compared": max, "varies": min}
    return {part: {kind: best[kind](count, old.get(part, counts)[kind]) for kind, count in counts.items()} for part, counts in new.items()}


def measure(paths: list[str], result: Path) -> int:
    "Run the tests with the seconds kept; their exit code."
    return subprocess.run([sys.executable, "-m", "pytest", "--keep-seconds", str(result), *paths], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.times", description="Keep the core seconds of pages and tests.")
    parser.add_argument("paths", nargs="*", help="notebooks and test files to run; without any, all")
    parser.add_argument("--from", dest="source", type=Path, help="a file written by pytest --keep-seconds")
    parser.add_argument("--cells", action="store_true", help="count cells instead")
    asked = parser.parse_args()
    if asked.cells:
        old = json.loads(CELLS.read_text()) if CELLS.exists() else {}
        CELLS.write_text(json.dumps(tightened(old, cells()), indent=1) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = asked.source or Path(folder, "seconds.json")
        if not asked.source and (code := measure(asked.paths, source)):
            return code # what failed was not measured
        found = {file: row[1] for file, row in json.loads(source.read_text())["files"].items()}
    keep(found)
    for page in pages():
        if page in found:
            over = f"   over its budget of {budget(page):g} s" if found[page] > budget(page) else ""
            print(f"{found[page]:6.1f} s  {page}" + (f"   states {stated(page)} s, should be {reader(found[page])} s" if stated(page) else "") + over)
    return 0


if __name__ == "__main__":
    sys.exit(main())

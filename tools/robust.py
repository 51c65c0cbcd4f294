"""Run the notebooks with every random seed shifted, and count how often each claim fails.

    python -m tools.robust                            every notebook with 20 shifts: 1000, 2000, …; hours on two cores
    python -m tools.robust --shifts 2 transfer/03…    two shifts of one notebook
    python -m tools.robust --first 7 --step 1         other shifts
    python -m tools.robust --margins transfer/03…     how far each comparison in an assertion is from failing

Outputs are not compared, assertions count. What was found is added to nbs/reference/robust_results.json after each notebook;
a notebook and shift that stand there are not run again unless the notebook has changed. Needs fork (Linux, macOS).
With `--margins` nothing fails and nothing is kept: the room that each comparison has is written down, run by run, and its mean is
given in standard deviations between the runs. A claim with less than two and a half will fail under some seed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import nbformat

from tools.seed_shift import environment, install

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/reference/robust_results.json"
SKIP = {"eval: false", "gpu", "network"}


def sources(path: Path) -> list[str]:
    "The code cells of a notebook, in nbval's numbering; a skipped one is empty."
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return ["" if {line[2:].strip() for line in cell.splitlines() if line.startswith("#|")} & SKIP else cell for cell in cells]


def asserting(path: Path) -> list[int]:
    "The cells that assert something."
    trees = [(number, ast.parse(re.sub(r"^\s*[%!].*$", "", cell, flags=re.M))) for number, cell in enumerate(sources(path))]
    return [number for number, tree in trees if any(isinstance(node, ast.Assert) for node in ast.walk(tree))]


def digest(path: Path) -> str:
    "Tells whether a notebook's code has changed since it was run."
    return hashlib.sha256("\0".join(sources(path)).encode()).hexdigest()[:16]


class Margins(ast.NodeTransformer):
    "Turns a cell's assertions into statements in which each comparison tells its room, and none ends the cell."

    def __init__(self) -> None:
        self.cell, self.rooms = 0, dict[str, list[float]]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        "One statement for each part of an `and`."
        parts = node.test.values if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And) else [node.test]
        told = [ast.Expr(Told(self.cell).whole(part)) for part in parts]
        return [ast.fix_missing_locations(ast.copy_location(statement, node)) for statement in told]

    def tell(self, key: str, signs: str, *sides: Any) -> Any:
        "Write down the smallest room of a comparison, or of the best place inside `any`; give what the comparison gives."
        import operator

        import numpy as np
        does = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
        truth, rooms = True, [] if signs else [1.0 if sides[0] else -1.0]
        for sign, left, right in zip(signs.split(), sides, sides[1:], strict=False):
            truth = truth & does[sign](left, right)
            left, right = (side.detach().cpu().numpy() if hasattr(side, "detach") else side for side in (left, right))
            rooms.append(float(np.min(np.subtract(right, left, dtype=float) * (1 if "<" in sign else -1))))
        best = max if key.endswith("any") else min
        self.rooms[key] = [best([min(rooms), *self.rooms.get(key, [])])]
        return truth if signs else sides[0]


class Told(ast.NodeTransformer):
    "Replaces the comparisons of size inside one assertion."

    def __init__(self, cell: int) -> None:
        self.cell, self.inside = cell, ""

    def whole(self, part: ast.expr) -> ast.expr:
        "A part of an assertion that tells its comparisons, and whether it holds."
        words = [ast.Constant(f"{self.cell:3} {ast.unparse(part)} as a whole"), ast.Constant("")]
        return ast.Call(ast.Name("__tell__", ast.Load()), [*words, self.visit(part)], [])

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        before, self.inside = self.inside, getattr(node.func, "id", "") if getattr(node.func, "id", "") in ("any", "all") else self.inside
        found = self.generic_visit(node)
        self.inside = before
        return found

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        signs = {ast.Lt: "<", ast.Gt: ">", ast.LtE: "<=", ast.GtE: ">="}
        if any(type(op) not in signs for op in node.ops):
            return node
        key = f"{self.cell:3} {ast.unparse(node)} {self.inside}"
        words = [ast.Constant(key), ast.Constant(" ".join(signs[type(op)] for op in node.ops))]
        return ast.Call(ast.Name("__tell__", ast.Load()), [*words, node.left, *node.comparators], [])


def failures(path: Path, shift: int, margins: Margins | None = None) -> dict[str, str]:
    "In this process: run a notebook's cells with the shift, and give the cells that failed with their errors."
    os.environ.update(environment(shift), MPLBACKEND="agg")
    install(shift)
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    matplotlib.use("agg")
    matplotlib.rcParams["figure.max_open_warning"] = 0
    InteractiveShell.enable_gui = lambda self, gui=None: None # figures are drawn, and nobody looks
    shell, found = InteractiveShell.instance(), {}
    shell.colors = "nocolor"
    if margins:
        shell.ast_transformers.append(margins)
        shell.user_ns["__tell__"] = margins.tell
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    for number, source in enumerate(sources(path)):
        if margins:
            margins.cell = number
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            done = shell.run_cell(source, store_history=False)
        if error := (done.error_in_exec or done.error_before_exec):
            where = traceback.extract_tb(error.__traceback__)
            line = next((entry.line for entry in reversed(where) if "assert" in (entry.line or "")), "")
            found[str(number)] = f"{type(error).__name__}: {str(error)[:160]} {line}".strip()
    return found


def child(path: Path, shift: int, file: Path, margins: Margins | None) -> None:
    "Run a notebook and leave what was found in a file."
    found = failures(path, shift, margins)
    file.write_text(json.dumps([found, margins.rooms if margins else {}]))


def run(name: str, shift: int, margins: Margins | None = None, limit: float = 1500) -> dict[str, Any]:
    "Run one notebook with one shift in a forked process and a copy of the notebooks; give its row."
    with tempfile.TemporaryDirectory() as place:
        for part in ("nbs", "tests", "tools", "benchmarks"):
            shutil.copytree(ROOT / part, Path(place) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "settings.ini", "_quarto.yml", "CHANGELOG.md"):
            shutil.copy(ROOT / part, place)
        (Path(place) / "tl_tutorial").symlink_to(ROOT / "tl_tutorial")
        file, began = Path(place) / "found.json", time.perf_counter()
        process = multiprocessing.get_context("fork").Process(target=child, args=(Path(place, "nbs", f"{name}.ipynb"), shift, file, margins))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        found, rooms = json.loads(file.read_text()) if file.exists() else [{"all": f"ended with {process.exitcode}"}, {}]
        return {"notebook": name, "shift": shift, "failed": found, "seconds": round(time.perf_counter() - began, 1),
                "code": digest(ROOT / "nbs" / f"{name}.ipynb")} | ({"rooms": rooms} if margins else {})


def show_margins(name: str, shifts: list[int], least: float) -> None:
    "Run a notebook with each shift, and print the comparisons whose room is less than `least` standard deviations."
    import numpy as np
    rows = []
    for shift in shifts:
        rows.append(run(name, shift, Margins()))
        print(f"{name} +{shift}: {rows[-1]['seconds']} s, errors {rows[-1]['failed'] or 'none'}", flush=True)
    for key in dict.fromkeys(key for row in rows for key in row["rooms"]):
        found = np.array([row["rooms"][key][0] for row in rows if key in row["rooms"]])
        spread = found.std(ddof=1) if len(found) > 1 else 0.0
        if found.min() < 0 or spread > 0 and found.mean() < least * spread:
            print(f"  cell {key}: room {found.mean():.3g} = {found.mean() / max(spread, 1e-12):.1f} sd, "
                  f"least {found.min():.3g}, fails {(found < 0).sum()} of {len(found)}", flush=True)


def notebooks(asked: Iterable[str]) -> list[str]:
    "The notebooks that were asked for, or all that assert something, the longest first."
    known = [str(path.relative_to(ROOT / "nbs").with_suffix("")) for path in (ROOT / "nbs").rglob("*.ipynb") if asserting(path)]
    chosen = [name for name in known if not asked or any(name.startswith(part) for part in asked)]
    heavy = {"transfer": 0, "beyond": 1, "repairs": 2, "ideas": 3}
    return sorted(chosen, key=lambda name: (heavy.get(name.split("/")[0], 4), name))


def load() -> list[dict[str, Any]]:
    "The rows that were kept."
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def keep(row: dict[str, Any]) -> None:
    "Add a row in the place of an older one, with the versions that it was made with."
    import torch
    import torchvision
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__}
    rows = {(r["notebook"], r["shift"]): r for r in load()} | {(row["notebook"], row["shift"]): row}
    lines = ",\n".join(json.dumps(rows[key], ensure_ascii=False) for key in sorted(rows))
    RESULTS.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


def table(rows: list[dict[str, Any]]) -> list[tuple[str, str, int, int, str]]:
    "Notebook, cell, in how many shifts it failed, of how many, and one of its errors."
    found = []
    for name in sorted({row["notebook"] for row in rows}):
        mine = [row for row in rows if row["notebook"] == name]
        for cell in sorted({cell for row in mine for cell in row["failed"]}, key=lambda cell: (len(cell), cell)):
            bad = [row for row in mine if cell in row["failed"]]
            found.append((name, cell, len(bad), len(mine), bad[0]["failed"][cell]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.robust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="such as transfer/03; all, if none is named")
    parser.add_argument("--shifts", type=int, default=20, help="how many shifts")
    parser.add_argument("--first", type=int, default=1000, help="the first number to add")
    parser.add_argument("--step", type=int, default=1000, help="from one shift to the next")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at the same time")
    parser.add_argument("--margins", type=float, nargs="?", const=3.0, help="show what has less room than so many standard deviations (3)")
    parser.add_argument("--again", action="store_true", help="run also what stands in the results")
    asked = parser.parse_intermixed_args()
    import torch
    import torchvision  # noqa: F401  imported before the fork, so that no notebook waits for them

    import tl_tutorial.fine_tuning  # noqa: F401
    torch.set_num_threads(1)
    names = notebooks(asked.notebooks)
    shifts = [asked.first + asked.step * number for number in range(asked.shifts)]
    if asked.margins:
        for name in names:
            show_margins(name, shifts, asked.margins)
        return 0
    there = {(row["notebook"], row["shift"], row["code"]) for row in load()}
    todo = [(name, shift) for shift in shifts for name in names
            if asked.again or (name, shift, digest(ROOT / "nbs" / f"{name}.ipynb")) not in there]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for row in pool.map(lambda pair: run(*pair), todo):
            keep(row)
            print(f"{row['notebook']} +{row['shift']}: {row['seconds']} s, failed {row['failed'] or 'none'}", flush=True)
    wanted = [row for row in load() if row["notebook"] in names and row["shift"] in shifts]
    for name, cell, bad, count, why in table(wanted):
        print(f"{name} cell {cell}: {bad} of {count}   {why}")
    return int(any(row["failed"] for row in wanted))


if __name__ == "__main__":
    sys.exit(main())

"""Plant small mistakes in the package, one at a time, and see whether the fast tests notice.

    python -m tools.mutate                            100 mistakes over all rooms
    python -m tools.mutate --room steps --count 10    ten in one room
    python -m tools.mutate --survivors                once more those of the table that nobody noticed or explained

Works on a copy of the repository in a temporary folder; the working tree is only read. Each mistake (a comparison
turned, a constant moved, a call left out, …) gets the fast unit tests, then its room's notebook, then the other tests
concerned, until the first one fails. Which mistakes are tried depends on the seed and the source alone.

The table RESULTS has one line per mistake that was tried: killed (a test failed), timeout (the tests hung, which is noticed
too) or survived. Its last column, `why`, is written by hand: why a survivor does no harm. It is kept when the same mistake
is tried again. The exit code is 1 when a survivor has no such reason.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_SECONDS = 120 # for each process of one mistake's tests; those that are sound need 30 at most
RESULTS = ROOT / "tools/mutation_results.tsv"

# Tests concerned, quick ones first, beside the room's own notebook; test_house and the like would notice every edit.
CONCERNED = {
    "settings": "units_basics oracles settings_in", "figures": "units_basics", "exercises": "units_basics", "claims": "units_basics",
    "datasets": "units_pictures faults/test_files", "pixels": "units_pictures faults/test_files", "cli": "units_cli faults/test_misuse",
    "folder": "units_pictures faults/test_folders folders_in", "report": "units_pictures faults/test_folders",
    "material": "units_pictures second_reading", "batches": "units_pictures oracles", "efficientnet": "units_network",
    "explaining": "units_result gradcam_kinds", "backbones": "units_network networks", "freezing": "units_network networks depth",
    "metrics": "units_result oracles", "checkpoints": "units_result faults/test_checkpoints",
    "classifier": "units_result units_onnx second_reading", "steps": "units_learning second_reading",
    "training": "units_learning second_reading", "recipes": "units_learning second_reading", "fine_tuning": "units_learning second_reading",
    "formats": "pictures_in", "opening": "pictures_in", "splits": "folders_in", "entries": "folders_in", "facts": "units_pictures pictures_in",
    "weights": "backbone_kinds third_reading", "network": "units_network third_reading", "own": "backbone_kinds", "inference": "units_learning heads",
    "processes": "units_learning distributed_kinds", "resuming": "units_learning resume_kinds", "files": "files_out", "answers": "answers",
    "heads": "automatic heads", "panel": "automatic moments networks", "moments": "moments", "evidence": "moments automatic",
    "automatic": "automatic", "exporting": "units_onnx", "demo": "command_line", "streams": "command_line", "results": "files_out command_line",
}
OTHERWISE = "units_learning units_result units_network units_pictures" # for a room not named above
SLOW = "not vgg16 and not a_world_without_torchrun and not report_draws_what_it_allowed"

COMPARISONS: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
                                 ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
ARITHMETIC: dict[type, type] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
                                ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmax": "argmin", "argmin": "argmax", "sum": "mean",
         "mean": "sum", "sorted": "list", "ceil": "floor", "floor": "ceil", "add": "discard", "append": "count"}


@dataclass(frozen=True)
class Mutant:
    "One planted mistake, and what became of it."
    room: str
    line: int # Where, when it was tried; the next column finds it again
    source: str # The line of code
    operator: str # Which kind of mistake
    change: str # Old → new
    outcome: str = "" # killed, timeout or survived
    by: str = "" # The first test that failed
    seconds: float = 0.0
    why: str = "" # By hand: why a survivor does no harm

    @property
    def key(self) -> tuple[str, ...]:
        return self.room, self.source, self.operator, self.change


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    "Every mistake that can be made at this node: the operator's name, and the node's new text."
    text = lambda new: f"({ast.unparse(new)})"
    match node:
        case ast.Compare(left, [op], right):
            yield "comparison", text(ast.Compare(left, [COMPARISONS[type(op)]()], right))
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield "arithmetic", text(ast.BinOp(left, ARITHMETIC[type(op)](), right))
        case ast.AugAssign(target, op, value) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.unparse(ast.AugAssign(target, ARITHMETIC[type(op)](), value))
        case ast.Constant(bool() as value):
            yield "constant", repr(not value)
        case ast.Constant(int() as value):
            yield from (("constant", f"({other})") for other in (value + 1, value - 1))
        case ast.Constant(float() as value):
            yield from (("constant", repr(other)) for other in (value * 2 or 1.0, value / 2) if other != value)
        case ast.UnaryOp(ast.Not() | ast.USub(), inner):
            yield "not or minus dropped", text(inner)
        case ast.BoolOp(op, values):
            yield "and, or", text(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
            yield from (("condition dropped", text(ast.BoolOp(op, [v for v in values if v is not gone]))) for gone in values if len(values) > 2)
            yield from (("condition dropped", text(kept)) for kept in values if len(values) == 2)
        case ast.IfExp(test, one, other):
            yield "branches swapped", text(ast.IfExp(test, other, one))
        case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield "returns None", "return None"
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield "statement left out", "pass"
        case ast.Break() | ast.Continue():
            yield "break, continue", "continue" if isinstance(node, ast.Break) else "break"
        case ast.Slice(lower, upper, step) if lower or upper:
            yield from (("slice", ast.unparse(new)) for new in (ast.Slice(None, upper, step), ast.Slice(lower, None, step))
                        if ast.unparse(new) != ast.unparse(node))
        case ast.Call(ast.Name(name), _, _) if name in NAMES and (name != "sorted" or not node.keywords):
            yield "other function", text(ast.Call(ast.Name(NAMES[name]), node.args, node.keywords))
        case ast.Call(ast.Attribute(value, name), _, _) if name in NAMES:
            yield "other function", text(ast.Call(ast.Attribute(value, NAMES[name]), node.args, node.keywords))
    if isinstance(node, ast.Call):
        for gone in node.keywords:
            yield "argument dropped", text(ast.Call(node.func, node.args, [k for k in node.keywords if k is not gone]))
    if isinstance(node, ast.If):
        yield "condition negated", f"not {text(node.test)}"


def inside(node: ast.AST) -> Iterator[ast.AST]:
    "The node and all below it that is executed when it matters: no annotations, messages, decorators or lists of names."
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or (isinstance(node, ast.Raise | ast.JoinedStr)):
            continue
        for child in value if isinstance(value, list) else [value]:
            named = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) in ("__all__",)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.AST) and not named and not typing:
                yield from inside(child)


def mutants(room: str, source: str) -> list[tuple[Mutant, str]]:
    "Every mistake that can be planted in a room, with the room's source once it is there."
    data, lines, found, seen = source.encode(), source.split("\n"), [], Counter()
    starts = [0, *itertools.accumulate(len(line) for line in data.splitlines(keepends=True))]
    for node in inside(ast.parse(source)):
        for operator, new in changes(node):
            place: Any = node.test if operator == "condition negated" else node  # type: ignore[attr-defined]
            begin, end = starts[place.lineno - 1] + place.col_offset, starts[place.end_lineno - 1] + place.end_col_offset
            changed = (data[:begin] + new.encode() + data[end:]).decode()
            old = " ".join(data[begin:end].decode().split())
            mutant = Mutant(room, place.lineno, lines[place.lineno - 1].strip(), operator, f"{old} → {new}")
            seen[mutant.key] += 1 # the same change may be possible twice in a line
            again = f" [{seen[mutant.key]}]" if seen[mutant.key] > 1 else ""
            found.append((replace(mutant, change=mutant.change + again), changed))
    return found


def chosen(rooms: dict[str, str], count: int, seed: int) -> list[tuple[Mutant, str]]:
    "So many mistakes, spread over the rooms, and within a room over the operators."
    queues = []
    for room, source in rooms.items():
        rng, kinds = random.Random(f"{seed} {room}"), {}
        for mutant in mutants(room, source):
            kinds.setdefault(mutant[0].operator, []).append(mutant)
        lists = [rng.sample(kind, len(kind)) for kind in rng.sample(list(kinds.values()), len(kinds))]
        queues.append([m for layer in itertools.zip_longest(*lists) for m in layer if m])
    turns = (m for layer in itertools.zip_longest(*queues) for m in layer if m)
    return list(itertools.islice(turns, count))


def tests_of(room: str, copy: Path) -> list[str]:
    "The files with tests that concern a room: its unit tests, its notebook, others."
    names = [name if "/" in name else f"test_{name}" for name in CONCERNED.get(room, OTHERWISE).split()]
    units, others = ([f"tests/{name}.py" for name in names if ("units" in name) == kind] for kind in (True, False))
    notebook = [str(p.relative_to(copy)) for p in (copy / "nbs/module").glob(f"[0-9]*_{room}.ipynb")]
    return [name for name in [*units, *notebook, *others] if (copy / name).exists()]


@contextmanager
def planted(mutant: Mutant, changed: str, copy: Path) -> Iterator[None]:
    "Inside, the copy's module and the cell it was exported from have the mistake; a notebook tests the code of its own cells."
    module = copy / "tl_tutorial" / f"{mutant.room}.py"
    kept = {file: file.read_text() for file in (module, *(copy / "nbs/module").glob(f"[0-9]*_{mutant.room}.ipynb"))}
    old, new = (re.split(r"^# %% .*#(\w+)$", text, flags=re.M) for text in (kept[module], changed))
    cells = {identifier: after for identifier, before, after in zip(new[1::2], old[2::2], new[2::2], strict=True) if before != after}
    module.write_text(changed)
    for file in list(kept)[1:]:
        notebook = json.loads(kept[file])
        for cell in notebook["cells"]:
            if cell["id"] in cells:
                marks = [line for line in cell["source"] if line.startswith("#|")]
                cell["source"] = [*marks, *cells[cell["id"]].strip("\n").splitlines(keepends=True)]
        file.write_text(json.dumps(notebook))
    try:
        yield
    finally:
        for file, text in kept.items():
            file.write_text(text)


def _pytest(copy: Path, files: list[str], witness: Path) -> None:
    "In a process of its own: run pytest in the copy until something fails, and write down what that was."
    import pytest

    class Witness:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not witness.exists():
                witness.write_text(report.nodeid)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            self.pytest_runtest_logreport(report)  # type: ignore[arg-type]

    os.setsid()
    os.chdir(copy)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 9)) # a loop without end, however busy the machine
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    code = pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-k", SLOW, *files], plugins=[Witness()])
    if code != 0 and not witness.exists():
        witness.write_text(f"pytest ended with {int(code)}")
    os._exit(0)


def first_failure(copy: Path, files: list[str], limit: float) -> str | None:
    "The first test that fails, 'timeout', or None."
    witness = copy.parent / "witness"
    witness.unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(copy, files, witness))
    child.start()
    child.join(limit)
    if late := child.is_alive():
        os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
    if late or child.exitcode:
        return "timeout" if late or child.exitcode == -signal.SIGXCPU else f"the tests ended with {child.exitcode}"
    return witness.read_text() if witness.exists() else None


def tried(mutant: Mutant, changed: str, copy: Path, limit: float, broken: dict[str, bool]) -> Mutant:
    "Plant one mistake in the copy and run the tests; those that fail without it (`broken`) are left out."
    began = time.perf_counter()
    while True:
        files = [name for name in tests_of(mutant.room, copy) if not broken.get(name)]
        with planted(mutant, changed, copy):
            by = first_failure(copy, files, limit)
        suspect = (by or "").partition("::")[0]
        if suspect in files and suspect not in broken:
            broken[suspect] = first_failure(copy, [suspect], limit) is not None
        if not broken.get(suspect):
            break
        print(f"{suspect} fails without any mistake; it is left out", file=sys.stderr)
    outcome = "survived" if by is None else "timeout" if by == "timeout" else "killed"
    return replace(mutant, outcome=outcome, by=by or "", seconds=round(time.perf_counter() - began, 1))


def read_results(path: Path) -> list[Mutant]:
    "The table of an earlier run, if there is one."
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Mutant(**row | {"line": int(row["line"]), "seconds": float(row["seconds"])}) for row in csv.DictReader(file, delimiter="\t")]


def write_results(path: Path, results: Iterable[Mutant]) -> None:
    "The table, by room and line."
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Mutant)], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(m) for m in sorted(results, key=lambda m: (m.room, m.line, m.change)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description="Plant small mistakes and see whether the tests notice.")
    parser.add_argument("--room", action="append", help="only this room (may be given several times)")
    parser.add_argument("--count", type=int, default=100, help="how many mistakes in all (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other mistakes (default 0)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one mistake; longer counts as noticed (default 600)")
    parser.add_argument("--survivors", action="store_true", help="try again what survived without a reason")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table (default tools/mutation_results.tsv)")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in ("matplotlib.figure", "sklearn.metrics", "scipy.optimize", "safetensors.torch", "torchvision", "torch._dynamo"):
        importlib.import_module(name) # once, before the tests' processes fork off

    names = args.room or sorted(p.stem for p in (ROOT / "tl_tutorial").glob("[!_]*.py"))
    rooms = {room: (ROOT / f"tl_tutorial/{room}.py").read_text() for room in names}
    known = {m.key: m for m in read_results(args.out)}
    wanted = [m for m in chosen(rooms, args.count, args.seed) if m[0].key not in known]
    if args.survivors:
        again = {key for key, m in known.items() if m.outcome == "survived" and not m.why}
        wanted = [m for room, source in rooms.items() for m in mutants(room, source) if m[0].key in again]
    with tempfile.TemporaryDirectory() as place:
        copy, broken = Path(place) / "copy", {}
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "_site", "node_modules", "__pycache__", ".venv", "build", "*.egg-info"))
        for number, (mutant, changed) in enumerate(wanted, 1):
            result = tried(mutant, changed, copy, args.limit, broken)
            known[result.key] = replace(result, why=known[result.key].why if result.key in known else "")
            write_results(args.out, known.values())
            print(f"{number}/{len(wanted)} {result.outcome:8} {result.seconds:5.1f} s  {result.room}:{result.line} {result.change}  {result.by}", flush=True)
    open_ones = [m for m in known.values() if m.outcome == "survived" and not m.why]
    print(f"{len(known)} in {args.out}: {sum(m.outcome != 'survived' for m in known.values())} noticed, "
          f"{sum(bool(m.why) for m in known.values())} explained, {len(open_ones)} open")
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run chapters at scale = full and keep what they found for the page nbs/reference/full_scale.ipynb.

    python -m tools.full FOLDER                      every chapter that has a full scale; hours on a CPU
    python -m tools.full FOLDER transfer/01_why …    only these
    python -m tools.full FOLDER --jobs 8             eight chapters at a time, each on one thread of the CPU

The notebooks, run, are written into FOLDER. A line for each goes into nbs/reference/full_results.json and replaces an older
line of that chapter. The chapters themselves, with their outputs at quick, are not touched.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/reference/full_results.json"
REPORT = "At this scale it does not hold that "


def chapters() -> list[str]:
    "The chapters whose experiments grow with the scale, such as transfer/01_why."
    found = [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb")) if any(asks(cell) for cell in code(nbformat.read(path, 4)))]
    return [str(path.relative_to(ROOT / "nbs").with_suffix("")) for path in found if path.parent.name != "module"]


def code(notebook: Any) -> list[str]:
    "The sources of the code cells."
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def asks(source: str) -> bool:
    "Does this cell switch the reports on?"
    return re.search(r"^report_claims\(full\)", source, re.M) is not None


def claims(sources: list[str]) -> int:
    "Assertions outside functions in the cells below the one that switches the reports on."
    start = next(place for place, source in enumerate(sources) if asks(source))
    trees = [ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)) for source in sources[start + 1:]]
    return sum(1 for tree in trees for statement in tree.body if not isinstance(statement, ast.FunctionDef | ast.ClassDef)
               for node in ast.walk(statement) if isinstance(node, ast.Assert))


def reports(notebook: Any) -> list[str]:
    "What did not hold, as the notebook printed it: the claim, then the numbers."
    printed = "".join(output.text for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == "stream")
    return [re.sub(r"\s+", " ", claim).strip().removesuffix(" the numbers:") for claim in re.findall(re.escape(REPORT) + r"(.*\n(?:   the numbers:.*)?)", printed)]


def run(chapter: str, folder: Path) -> dict[str, Any]:
    "Run a chapter at full scale in a copy, save it, and give its line."
    with tempfile.TemporaryDirectory() as place:
        for name in ("nbs", "tests"):
            shutil.copytree(ROOT / name, Path(place) / name)
        Path(place, "settings.ini").write_text("[run]\nscale = full\n")
        path = Path(place, "nbs", f"{chapter}.ipynb")
        notebook, began, stopped = nbformat.read(path, 4), time.perf_counter(), ""
        try:
            NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
        except CellExecutionError as error:
            stopped = f"{error.ename}: {error.evalue}"
        seconds = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{chapter.replace('/', '_')}.ipynb")
    return line(chapter, notebook, seconds) | ({"stopped": stopped} if stopped else {})


def line(chapter: str, notebook: Any, seconds: float) -> dict[str, Any]:
    "What the page shows of one chapter."
    moves = any(re.search(r"pick_device\(.*if full", source) for source in code(notebook)) # the others compute on the CPU at any scale
    device = torch.cuda.get_device_name() if moves and torch.cuda.is_available() else "CPU"
    return {"chapter": chapter, "device": device, "seconds": round(seconds), "claims": claims(code(notebook)), "not held": reports(notebook)}


def keep(found: dict[str, Any], file: Path = RESULTS) -> None:
    "Put a chapter's line in the place of its older one."
    lines = {row["chapter"]: row for row in (json.loads(file.read_text()) if file.exists() else [])} | {found["chapter"]: found}
    file.write_text(json.dumps([lines[name] for name in sorted(lines)], indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    "Run the chapters that were asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the notebooks, run, are written here")
    parser.add_argument("chapters", nargs="*", help="such as transfer/01_why; all, if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="chapters that run at the same time")
    asked = parser.parse_intermixed_args()
    known = chapters()
    if unknown := sorted(set(asked.chapters) - set(known)):
        parser.error(f"{', '.join(unknown)} has no full scale; these have: {', '.join(known)}")
    if asked.jobs > 1: # libraries beside PyTorch would each take all cores, and the chapters would get in one another's way
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with ThreadPoolExecutor(asked.jobs) as pool: # each chapter computes in a process of its own, its kernel
        for done in as_completed([pool.submit(run, chapter, asked.folder) for chapter in asked.chapters or known]):
            keep(found := done.result())
            print(f"{found['chapter']}: {found['seconds']} s, {len(found['not held'])} of {found['claims']} claims do not hold "
                  f"{found.get('stopped', '')}".rstrip(), flush=True)


if __name__ == "__main__":
    main()

"""Run the README's test command in fresh environments that differ: versions, Pythons, processor levels, threads.

    python -m tools.matrix                    every row whose Python is here; a quarter of an hour each
    python -m tools.matrix lowest newest      these rows
    python -m tools.matrix --list             the rows, and which of them passed last

Each row gets a clone of the last commit, an environment of its own, and the command from README.md word for word. What came
out stands in nbs/reference/matrix_results.json, with the versions that were installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs/reference/matrix_results.json"
BADGE = ROOT / "nbs/reference/tried.svg"
SHOWN = ("torch", "torchvision", "numpy", "pillow", "matplotlib", "scikit-learn", "safetensors", "nbdev", "nbval", "pytest", "onnxruntime", "timm")


@dataclass(frozen=True)
class Row:
    "One environment."
    name: str
    python: str = "3.11"
    lowest: bool = False # the lowest version of every direct dependency that pyproject.toml allows; else the newest
    variables: Mapping[str, str] = field(default_factory=dict)


ROWS = (
    Row("newest"),
    Row("lowest", lowest=True),
    Row("python 3.12", python="3.12"),
    Row("python 3.13", python="3.13"),
    Row("python 3.14", python="3.14"),
    Row("processor avx2", variables={"ATEN_CPU_CAPABILITY": "avx2"}),
    Row("processor default", variables={"ATEN_CPU_CAPABILITY": "default"}),
    Row("lowest, processor default", lowest=True, variables={"ATEN_CPU_CAPABILITY": "default"}),
    Row("2 threads", variables={"OMP_NUM_THREADS": "2"}),
    Row("4 threads", variables={"OMP_NUM_THREADS": "4"}),
)


def requirements() -> Iterator[str]:
    "Every requirement of the project and its extras."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (line for line in group if not line.startswith(project["name"]))


def constraints() -> str:
    "The lower bound of every requirement, as pip's constraints."
    found = (re.match(r"([\w-]+)\s*[>=]=\s*([\w.]+)", line) for line in requirements())
    return "".join(sorted({f"{bound[1]}=={bound[2]}\n" for bound in found if bound}))


def interpreter(version: str) -> Path | None:
    "A Python of this version: on the PATH, or among pyenv's."
    places = [shutil.which(f"python{version}")]
    places += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))]
    for place in filter(None, places):
        done = subprocess.run([place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version: # pyenv's stand-in is on the PATH also where its Python is not chosen
            return Path(place)
    return None


def command() -> str:
    "The test command of the README."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- command: test -->\s*```bash\n(.*?)```", text, re.S)
    assert found, "README.md has no test command"
    return found[1].strip()


def run(row: Row, python: Path, folder: Path) -> dict[str, Any]:
    "Clone, install and test one row; give what the results keep."
    clone, tools = folder / "clone", folder / "bin"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    tools.mkdir()
    (tools / "python3").symlink_to(python)
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    variables = plain | dict(row.variables) | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    if row.lowest:
        (folder / "lowest.txt").write_text(constraints())
        variables["PIP_CONSTRAINT"] = str(folder / "lowest.txt")
    install, _, test = command().rpartition(" && ")
    seconds = []
    for part in (install, test):
        began = time.perf_counter()
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", part], cwd=clone, env=variables, capture_output=True, text=True, check=False)
        seconds.append(round(time.perf_counter() - began))
        if done.returncode:
            break
    return {"row": row.name, "python": row.python, "variables": dict(row.variables), "ended": done.returncode,
            "outcome": outcome(done.stdout + done.stderr), "seconds": dict(zip(("install", "test"), seconds, strict=False)),
            "versions": versions(clone), "machine": f"{platform.machine()}, {processor()}, {os.cpu_count()} cores",
            "day": f"{datetime.date.today()}", "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M),
            "tail": "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]}


def outcome(printed: str) -> str:
    "pytest's closing line without its seconds."
    found = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", printed, re.M)
    return found[-1] if found else "no test ran"


def versions(clone: Path) -> dict[str, str]:
    "What was installed."
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {SHOWN}}}))"
    done = subprocess.run([clone / ".venv/bin/python", "-c", ask], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def processor() -> str:
    "The vector instructions that PyTorch finds, without an import of PyTorch here."
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), platform.processor() or "unknown")


def load() -> list[dict[str, Any]]:
    "What is known of earlier runs."
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def keep(found: dict[str, Any]) -> None:
    "The two newest runs of each row stand in the results."
    names = [row.name for row in ROWS]
    rows = [*load(), {key: value for key, value in found.items() if key != "tail"}]
    mine = [row for name in names for row in [old for old in rows if old["row"] == name][-2:]]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in mine) + "\n]\n", encoding="utf-8")
    BADGE.write_text(badge(tried(mine)), encoding="utf-8")


def tried(rows: list[dict[str, Any]]) -> str:
    "What passed when each row was last run, in a few words."
    last = {row["row"]: row for row in rows}
    good = [row for row in last.values() if row["ended"] == 0]
    if not good:
        return "nothing yet"
    order = lambda text: tuple(map(int, re.findall(r"\d+", text)[:3]))
    def span(found: set[str]) -> str:
        ends = sorted(found, key=order)
        return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"
    torch = span({row["versions"]["torch"].split("+")[0] for row in good})
    return f"PyTorch {torch}, Python {span({row['python'] for row in good})}, {max(row['day'] for row in good)}"


def badge(words: str) -> str:
    "A small picture for the README, readable on light and on dark pages."
    width = 34 + round(6.4 * len(words))
    text = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 12}" height="20" role="img" aria-label="passed: {words}">'
            f'<title>passed: {words}</title><rect width="{width + 12}" height="20" rx="3" fill="#2b6a45"/>'
            f'<rect width="50" height="20" rx="3" fill="#444"/><text x="6" y="14" {text}>passed</text>'
            f'<text x="56" y="14" textLength="{width - 50}" lengthAdjust="spacingAndGlyphs" {text}>{words}</text></svg>\n')


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; all, if none is named")
    parser.add_argument("--list", action="store_true", help="show the rows and run nothing")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - {row.name for row in ROWS}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    last = {row["row"]: row for row in load()}
    bad = 0
    for row in (row for row in ROWS if not asked.rows or row.name in asked.rows):
        python = interpreter(row.python)
        if asked.list or python is None:
            print(f"{row.name}: {'' if python else 'no Python ' + row.python + ' here; '}last {last.get(row.name, {}).get('outcome', 'never run')}")
            continue
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            found = run(row, python, Path(folder))
        keep(found)
        bad += found["ended"] != 0
        print(f"{row.name}: {found['outcome']}, {found['seconds']} s {found['tail']}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

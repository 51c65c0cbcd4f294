"""What passes here passes elsewhere: foreign wordings are not compared, seeds can be shifted, the matrix tries what pyproject allows."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from tools import matrix, robust
from tools.seed_shift import environment

ROOT = Path(__file__).parents[1]
DRAWS = """
import json, random, sys
import numpy as np
import torch
torch.manual_seed(3)
found = [torch.rand(1).item(), torch.rand(1, generator=torch.Generator().manual_seed(3)).item()]
found += [np.random.default_rng(3).random(), np.random.default_rng([3, 5]).random(), random.Random(3).random()]
print(json.dumps(found))
"""


def draws(seed: int) -> list[float]:
    "The numbers that DRAWS draws, with this seed in the place of 3."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = [torch.rand(1).item(), torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()]
    return [*found, np.random.default_rng(seed).random(), np.random.default_rng([seed, 5]).random(), random.Random(seed).random()]


def test_a_shift_reaches_every_seed_of_a_process_and_of_its_children() -> None:
    script = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {DRAWS!r}], capture_output=True, text=True, check=True).stdout)"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment(1000), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == draws(1003) != draws(3)


def test_the_robust_tool_finds_a_claim_that_hangs_on_one_draw(tmp_path: Path) -> None:
    from nbformat import v4, write

    lucky = "import torch\nvalue = torch.rand(1, generator=torch.Generator().manual_seed(0)).item()\nassert abs(value - 0.4963) < 1e-3"
    book = v4.new_notebook(cells=[v4.new_code_cell(text) for text in (lucky, "#| gpu\nraise SystemError", "assert 0 <= value < 1")])
    write(book, tmp_path / "lucky.ipynb")
    assert robust.asserting(tmp_path / "lucky.ipynb") == [0, 2]
    code = f"import json, pathlib\nfrom tools.robust import failures\nprint(json.dumps(failures(pathlib.Path({str(tmp_path / 'lucky.ipynb')!r}), 1000)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert list(json.loads(done.stdout.splitlines()[-1])) == ["0"]


def test_foreign_wordings_are_cut_and_our_own_compared() -> None:
    from nbval.plugin import get_sanitize_patterns

    def cut(text: str) -> str:
        for pattern, replacement in get_sanitize_patterns((ROOT / "tests/foreign_messages.cfg").read_text()):
            text = re.sub(pattern, replacement, text)
        return text

    old, new = "RuntimeError: addmm: mat1 and mat2 shapes\n[1.0, 2.0]", "RuntimeError: mat1 and mat2 shapes\n[1.0, 2.0]"
    assert cut(old) == cut(new) != cut(new.replace("2.0", "3.0")) and cut(new) != cut(new.replace("Runtime", "Value"))
    assert cut("UserWarning: Using a target") == cut("UserWarning: another") and cut("SettingsError: lr = -1") == "SettingsError: lr = -1"
    wrong = "✗ Your answer raised TypeError: unsupported operand. Hint: add x to itself"
    assert cut(wrong) == "✗ Your answer raised TypeError: (foreign message). Hint: add x to itself"


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    pins = dict(line.split("==") for line in matrix.constraints().split())
    assert set(pins) == {re.split(r"[>=]", line)[0] for line in matrix.requirements()}
    assert re.search(rf'"torch>={re.escape(pins["torch"])}"', (ROOT / "pyproject.toml").read_text())


def test_the_matrix_runs_the_readmes_own_command_each_week() -> None:
    assert matrix.command().startswith("python3 -m venv .venv && ") and matrix.command().endswith(" && .venv/bin/python -m pytest")
    weekly = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text())["jobs"]["matrix"]["strategy"]["matrix"]["include"]
    assert [(entry["row"], entry["python"]) for entry in weekly] == [(row.name, row.python) for row in matrix.ROWS]


def test_the_badge_says_what_passed_last() -> None:
    rows = [{"row": name, "python": python, "ended": ended, "day": day, "versions": {"torch": torch_version}} for name, python, ended, day, torch_version in
            (("newest", "3.11", 1, "2026-01-01", "2.9.0"), ("newest", "3.11", 0, "2026-02-01", "2.14.1+cu130"), ("lowest", "3.11", 0, "2026-01-15", "2.10.0"),
             ("python 3.13", "3.13", 1, "2026-03-01", "2.15.0"))]
    assert matrix.tried(rows) == "PyTorch 2.10.0 to 2.14.1, Python 3.11, 2026-02-01" and matrix.tried(rows) in matrix.badge(matrix.tried(rows))
    assert matrix.outcome("===== 4 failed, 2486 passed, 1 skipped in 12.34s =====\n") == "4 failed, 2486 passed, 1 skipped"

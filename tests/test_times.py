"""Every page keeps to its budget of core seconds, states a run time that is true, and hides no more outputs than before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import times

OVER: dict[str, float] = { # pages that are allowed more; each is still to be shortened
    "nbs/module/11_freezing.ipynb": 20, "nbs/module/146_processes.ipynb": 10, "nbs/module/17_recipes.ipynb": 15, # they train
    "nbs/module/18_explaining.ipynb": 8, "nbs/module/20_fine_tuning.ipynb": 15,
    "nbs/module/185_exporting.ipynb": 8, # a real export
    "nbs/module/196_suspects.ipynb": 8, # three networks look at thirty pictures, at both sides
}


@pytest.mark.parametrize("page", times.pages())
def test_a_page_keeps_to_its_budget(page: str) -> None:
    kept = times.kept()
    assert page in kept, f"python -m tools.times {page}"
    assert kept[page] <= OVER.get(page, times.budget(page)), f"{page} needs {kept[page]:.0f} core seconds: shorten it"


@pytest.mark.parametrize("page", [page for page in times.pages() if times.stated(page)])
def test_the_stated_run_time_is_that_of_the_test_run(page: str) -> None:
    "Machines differ by some tens of percent, so a page is corrected when it is wrong by a third."
    wanted, stated = times.reader(times.kept()[page]), times.stated(page)
    assert wanted / 1.5 - 5 <= stated <= wanted * 1.5 + 5, f"{page}: write {wanted} s"


def test_every_chapter_states_its_run_time() -> None:
    chapters = [page for page in times.pages() if page.split("/")[1] in ("ideas", "transfer", "repairs", "beyond") and not page.endswith("index.ipynb")]
    assert [page for page in chapters if times.stated(page) is None] == [] and len(chapters) > 25


def test_no_more_cells_vary_than_before() -> None:
    "By part. `python -m tools.times --cells` takes a better count for the new limit; a worse one is written by hand, with its reason."
    limits, found = json.loads(times.CELLS.read_text()), times.cells()
    assert set(limits) == set(found)
    for part, counts in found.items():
        assert counts["varies"] <= limits[part]["varies"], f"{part}: more cells say `#| varies` than before"
        for kind in ("asserting", "compared"):
            assert counts[kind] >= limits[part][kind], f"{part}: fewer cells are {kind} than before"


def test_limits_are_only_tightened() -> None:
    old, new = {"a": {"asserting": 5, "compared": 7, "varies": 3}}, {"a": {"asserting": 6, "compared": 6, "varies": 4}, "b": {"asserting": 1, "compared": 1, "varies": 1}}
    assert times.tightened(old, new) == {"a": {"asserting": 6, "compared": 7, "varies": 3}, "b": new["b"]}


def test_a_table_is_added_to_and_forgets_what_is_gone(tmp_path: Path) -> None:
    times.keep({"README.md": 1.26, "nbs/gone.ipynb": 3.0}, tmp_path / "t.tsv")
    times.keep({"CHANGELOG.md": 2.0}, tmp_path / "t.tsv")
    assert times.kept(tmp_path / "t.tsv") == {"README.md": 1.3, "CHANGELOG.md": 2.0}
    assert times.reader(21.0) == 30 and times.budget("nbs/module/x.ipynb") == 5 and times.budget("nbs/ideas/x.ipynb") == 45


def test_the_seconds_of_a_run_are_told_and_kept(tmp_path: Path) -> None:
    "A run of its own: a test that works, and a child of it that works; both are counted."
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(times.ROOT / 'tests')!r})\nfrom seconds import Seconds\n"
        "def pytest_addoption(parser): parser.addoption('--keep-seconds')\n"
        "def pytest_configure(config): config.pluginmanager.register(Seconds(config), 'seconds')\n")
    work = "import time\nwhile time.process_time() < 0.6: pass"
    (tmp_path / "test_x.py").write_text(f"import subprocess, sys\ndef test_one():\n    subprocess.run([sys.executable, '-c', {work!r}], check=True)\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--keep-seconds", "kept.json", "test_x.py"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert done.returncode == 0 and 0.5 < kept["files"]["test_x.py"][1] < 5 and "test_x.py::test_one" in kept["tests"], done.stdout

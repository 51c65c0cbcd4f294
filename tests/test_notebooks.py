"""Every notebook keeps the house's form: run, clean, explained, no star imports, figures with alt text."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [{**c, "text": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


def bare(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(("#|", "%")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path: Path) -> None:
    first = json.loads(path.read_text())["cells"][0]
    assert "".join(first["source"]).startswith("# ") and "\n> " in "".join(first["source"]), "begin with a title and a question"
    for cell in code_cells(path):
        outputs, tree = cell["outputs"], ast.parse(bare(cell["text"]))
        assert not any(o["output_type"] == "error" for o in outputs), cell["text"]
        assert not any(o.get("name") == "stderr" for o in outputs), f"output on stderr: {cell['text']}"
        assert not any("widget" in kind for o in outputs for kind in o.get("data", {})), cell["text"]
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not any(a.name == "*" for n in imports for a in n.names), "star import"
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert not pictures or "#| fig-alt:" in cell["text"], f"figure without alt text: {cell['text'][:80]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_clean_and_run(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) <= {"kernelspec"} and path.stat().st_size < 800_000
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    cells = code_cells(path)
    assert all(c["execution_count"] is None for c in cells), "run nbdev-clean"
    shown = [c for c in cells if "#| hide" not in c["text"] and "#| export" not in c["text"]]
    assert not shown or any(c["outputs"] for c in cells), "no outputs at all: run the notebook and save it"


def test_no_machine_paths() -> None:
    for path in NOTEBOOKS:
        assert not re.search(r"/(root|home|work|tmp)/\w", path.read_text()), f"{path.name} holds a path of a machine"


def test_readme_is_made_from_the_home_page() -> None:
    from tools.readme import markdown

    assert (ROOT / "README.md").read_text() == markdown(json.loads((ROOT / "nbs/index.ipynb").read_text())), "run python -m tools.readme"


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    demo, test = (re.search(rf"<!-- command: {name} -->\n```bash\n(.+)\n```", text) for name in ("demo", "test"))
    assert demo and "tl-tutorial demo" in demo[1] and test and "python -m pytest" in test[1]
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_at_full_a_chapter_reports_its_claims() -> None:
    for path in NOTEBOOKS:
        lines = [line for cell in code_cells(path) for line in cell["text"].splitlines()]
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("full ="):
                assert below.startswith("report_claims(full)"), f"{path.name}: write report_claims(full) below {line!r}"


@pytest.mark.parametrize("full", [False, True])
def test_an_assertion_stops_a_kernel_at_quick_and_reports_at_full(full: bool) -> None:
    from nbclient import NotebookClient
    from nbformat import v4

    first = f"from tl_tutorial.claims import report_claims\nreport_claims({full})\nreport_claims({full})"
    second = "low, high = 0.3, 0.25\nassert high > low + 0.1\nprint('the next table')"
    third = "def check(x):\n    assert x > 0\ncheck(-1)"
    notebook = v4.new_notebook(cells=[v4.new_code_cell(text) for text in (first, second, third)])
    NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True).execute()
    said, inside = notebook.cells[1].outputs, notebook.cells[2].outputs
    assert inside[0].ename == "AssertionError", "an assertion in a function stops at every scale"
    if full:
        assert said[0].text == "At this scale it does not hold that high > low + 0.1\n   the numbers: 0.25 0.4\nthe next table\n"
    else:
        assert said[0].ename == "AssertionError"


def test_the_full_scale_page_speaks_of_chapters_that_have_one(tmp_path: Path) -> None:
    from nbformat import v4

    from tools import full

    kept = json.loads(full.RESULTS.read_text())
    assert {row["chapter"] for row in kept} <= set(full.chapters()) and len(kept) == len({row["chapter"] for row in kept})
    cells = [v4.new_code_cell(text) for text in ("report_claims(full)", "def f():\n    assert 1\nassert a > b\nfor x in y:\n    assert x", "assert c")]
    cells[1].outputs = [v4.new_output("stream", text=f"before\n{full.REPORT}a > b\n   the numbers: 1 2\nafter\n{full.REPORT}x\n")]
    line = full.line("transfer/01_why", v4.new_notebook(cells=cells), 12.4)
    assert line["claims"] == 3 and line["not held"] == ["a > b the numbers: 1 2", "x"] and line["seconds"] == 12
    for seconds in (1, 2):
        full.keep(line | {"seconds": seconds}, tmp_path / "kept.json")
    assert [row["seconds"] for row in json.loads((tmp_path / "kept.json").read_text())] == [2]

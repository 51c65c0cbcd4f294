"""The real JupyterLab, driven by a headless Chromium: two chapters run from top to bottom, and "Interrupt Kernel" keeps the work.

One server, and one page that is loaded once: the notebooks are opened in it one after the other, by its menus.
"""

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
from forked_kernels import python

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'tl-tutorial[dev]'")
api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'tl-tutorial[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no Chromium: JupyterLab was not driven (apt-get install chromium)", allow_module_level=True)

NBS = Path(__file__).parents[1] / "nbs"
CHAPTERS = ("ideas/01_convolution.ipynb", "module/08_batches.ipynb")
TOKEN = "only-for-this-test"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"] # other hosts are not waited for
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# The notebook in front: is it this one, with a kernel that waits; and has every code cell of it run, or one failed?
OPEN = """name => { const front = jupyterapp.shell.currentWidget;
  return front?.context?.path === name && front.sessionContext.session?.kernel?.status === "idle"; }"""
RAN = """() => { const front = jupyterapp.shell.currentWidget, code = front.content.widgets.filter(cell => cell.model.type === "code");
  const failed = cell => [...Array(cell.model.outputs.length).keys()].some(number => cell.model.outputs.get(number).type === "error");
  return front.sessionContext.session.kernel.status === "idle" && (code.some(failed) || code.every(cell => cell.model.executionCount)); }"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    "JupyterLab on a loopback port, with copies of the chapters, and its folder."
    folder = tmp_path_factory.mktemp("lab")
    for name in CHAPTERS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(NBS / name, folder / name)
    (folder / "share/kernels/python3").mkdir(parents=True) # a kernel that is forked where that can be
    (folder / "share/kernels/python3/kernel.json").write_text(json.dumps(KERNEL | {"argv": [python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {"HOME": str(folder), "JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTER_RUNTIME_DIR": str(folder / ".run"),
            "IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(folder / "share")}
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}",
               f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=os.environ | home)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", folder / "server.log")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def page(lab: tuple[str, Path]) -> Iterator[api.Page]:
    "JupyterLab in a browser, loaded once."
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.goto(f"{lab[0]}/lab?token={TOKEN}&reset", wait_until="load")
        opened.get_by_role("menuitem", name="File", exact=True).wait_for(timeout=120_000)
        yield opened
        browser.close()


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


def open_and_run_all(page: api.Page, name: str) -> None:
    "Open a notebook by its path, wait for its kernel, and choose Run > Run All Cells."
    choose(page, "File", "Open from Path")
    page.locator(".jp-Dialog input").fill(name)
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    page.wait_for_function(OPEN, arg=name, polling=200, timeout=120_000)
    choose(page, "Run", "Run All Cells")


def saved_when_run(page: api.Page, path: Path) -> list[dict]:
    "Wait until every code cell has run or one has failed, and save the notebook; its code cells, as the file has them."
    # The kernel is shown as idle between two cells too, so the cells are asked.
    page.wait_for_function(RAN, polling=300, timeout=240_000)
    before = path.stat().st_mtime_ns
    choose(page, "File", "Save Notebook")
    for _ in range(100):
        if path.stat().st_mtime_ns > before:
            break
        page.wait_for_timeout(100)
    return [cell for cell in saved(path) if cell["cell_type"] == "code"]


def choose(page: api.Page, menu: str, entry: str) -> None:
    "Choose an entry of a menu."
    page.get_by_role("menuitem", name=menu, exact=True).click(timeout=10_000)
    # An entry's name may end in its shortcut ("Save Notebook Ctrl S"); "Save Notebook As…" is another entry.
    page.get_by_role("menuitem", name=re.compile(rf"^{entry}(?! As)")).first.click(timeout=10_000)


@pytest.mark.parametrize("name", CHAPTERS)
def test_run_all(lab: tuple[str, Path], page: api.Page, name: str) -> None:
    before = json.loads((NBS / name).read_text())["cells"]
    open_and_run_all(page, name)
    code = saved_when_run(page, lab[1] / name)
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


def test_interrupt_kernel_keeps_the_work(lab: tuple[str, Path], page: api.Page) -> None:
    "The first Ctrl-C of a run, as a reader of the notebook sends it: the cell ends well, and the cells after it work."
    folder = lab[1]
    cells = [{"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
             for number, source in enumerate(LONG)]
    (folder / "long.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}))
    open_and_run_all(page, "long.ipynb")
    for _ in range(240):
        page.wait_for_timeout(200)
        if (folder / "begun").exists():
            break
    choose(page, "Kernel", "Interrupt Kernel")
    code = saved_when_run(page, folder / "long.ipynb")
    assert all(cell["execution_count"] for cell in code), "the kernel went on with the cells below"
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert "".join(code[-1]["outputs"][-1]["data"]["text/plain"]) in ("'dark'", "'light'")

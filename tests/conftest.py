"""Small labelled folders that tests train on."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tl_tutorial.datasets import clipart


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Each test works in a folder of its own, so that no settings.ini of somebody else is found."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TL_TUTORIAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    "The site and what is wrong with it. The conftest.py above gives those who ask for it to one worker."
    from tools import site

    out = tmp_path_factory.mktemp("site") / "out"
    return out, site.build(out)


@pytest.fixture
def quick_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    "PyTorch's exporter, which takes seconds, gives a graph that does nothing: for tests of where the file goes, not of what it computes."
    helper = pytest.importorskip("onnx").helper
    ends = [helper.make_tensor_value_info(name, 1, [None]) for name in ("images", "probabilities")]

    def export(*_: object, **__: object) -> SimpleNamespace:
        graph = helper.make_graph([helper.make_node("Identity", ["images"], ["probabilities"])], "nothing", ends[:1], ends[1:])
        return SimpleNamespace(model_proto=helper.make_model(graph))
    monkeypatch.setattr(torch.onnx, "export", export)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    "Three classes that anything can tell apart: 12 noisy pictures each of red, green and blue."
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 120, (40, 44, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "colours" / name / f"{number}.png")
    return tmp_path / "colours"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    "Clip art with train/ and test/: three classes, 14 and 8 pictures each."
    for name in ("fruit", "tools", "vehicles"):
        for number, file in enumerate(sorted((clipart() / name).glob("*.jpg"))[:22]):
            place = tmp_path / "photos" / ("train" if number < 14 else "test") / name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return tmp_path / "photos"

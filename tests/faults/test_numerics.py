"""Numbers that go wrong: NaN and infinity stop the run by name, and the last good weights are kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from making import SMALL, coloured, fault, picture, untouched
from PIL import Image, PngImagePlugin
from torch import nn

import tl_tutorial as tl
from tl_tutorial import cli
from tl_tutorial.batches import Batches

PLAIN = {"size": 32, "progress": False, "epochs": 3}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return coloured(tmp_path / "colours")


class Broken(torch.autograd.Function):
    "Passes numbers on; from some step on their gradient is broken."
    @staticmethod
    def forward(context: object, x: torch.Tensor, value: float) -> torch.Tensor:
        context.value = value
        return x.clone()

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> tuple:
        return gradient * context.value, None


class Own(nn.Module):
    "A network of a user's own that goes wrong in its fifth training step."
    def __init__(self, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.wrong, self.seen = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), wrong, 0
        self.last = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        x = self.second(self.first(images).relu().mean((2, 3)))
        return self.last(self.wrong(x) if self.training and self.seen > 4 else x)


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "H03 NaN in the loss": lambda x: x * float("nan"),
    "H04 infinity in the loss": lambda x: x + float("inf"),
    "H05 NaN in the gradient": lambda x: Broken.apply(x, float("nan")),
    "H06 infinity in the gradient": lambda x: Broken.apply(x, float("inf")),
    "H11 half precision that overflows": lambda x: ((x.abs() + 1).half() * 60_000 * 2).float(),
}


@pytest.mark.parametrize("name", WRONG)
def test_stopped_with_the_last_good_weights(name: str, root: Path) -> None:
    with untouched(root), pytest.raises(tl.TrainingError) as caught:
        tl.fine_tune(root, arch=Own(WRONG[name]), checkpoint="run", **PLAIN)
    said = str(caught.value)
    for word in ("not finite", "step 4", "epoch 2", "learning rate", ".png", "last good weights are kept", "lower lr"):
        assert word in said, word
    kept = caught.value.classifier
    assert all(bool(value.isfinite().all()) for value in kept.network.state_dict().values())
    assert kept.save("kept.safetensors").exists() and len(kept.predict(root)) == 24
    from tl_tutorial.checkpoints import restore

    tensors, state = restore("run")
    assert state["step"] == 3 and all(bool(value.isfinite().all()) for value in tensors.values())


@fault("H07 learning rate of a million")
def test_a_wild_rate(fault: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    "On the command line: one sentence, exit code 1, and the last good weights beside the place of the result."
    Path("settings.ini").write_text("[model]\nweights = none\n[train]\nlr = 1e6\n")
    assert cli.main(["train", str(root), "--out", "m.safetensors", "--arch", "small_cnn", "--size", "16", "--epochs", "4"]) == 1
    said = capsys.readouterr().err
    assert "not finite" in said and "lower lr" in said and "m.last-good.safetensors" in said and not Path("m.safetensors").exists()
    assert len(tl.load("m.last-good.safetensors").predict(root)) == 24


class Never(nn.Module):
    "Good while it learns; its answers in evaluation are NaN from the first epoch on."
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.steps = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        x = self.last(self.first(images).relu().mean((2, 3)))
        return x if self.training or self.steps == 0 else x * float("nan")


@fault("H03 NaN in the validation loss")
def test_nan_is_never_best(fault: str, root: Path) -> None:
    from tl_tutorial.backbones import create
    from tl_tutorial.training import fit

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (24, 16, 16, 3), dtype=np.uint8), np.arange(24) % 3
    network = create(Never(), 3)
    outcome = fit(network, Batches(images, labels, 16, 8), valid=Batches(images, labels, 16, 24), settings=tl.Settings(), epochs=2, lr=1e-3)
    assert outcome.best_epoch == 0 and len(outcome.history) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["H01 NaN in the input", "H02 infinity in the input"])
def test_input_that_is_no_number(value: float, root: Path) -> None:
    values = np.full((32, 32), 0.5, np.float32)
    values[3, 3] = value
    Image.fromarray(values).save(root / "red" / "x.tiff")
    with untouched(root):
        (problem,) = tl.check(root).problems
        assert problem.kind == "value range" and problem.path.endswith("x.tiff") and problem.remedy
        with pytest.raises(tl.DataError, match=r"x\.tiff"):
            tl.fine_tune(root, epochs=1, **SMALL)
        clf = tl.fine_tune(root, epochs=1, on_bad="skip", **SMALL)
    with pytest.raises(tl.DataError, match="float32.*give uint8"):
        clf.predict(np.stack([values] * 3, 2))


@pytest.mark.parametrize("label", [-1, -100, 3], ids=["H08 label -1", "H08 label -100", "H09 label beyond the classes"])
def test_labels_that_are_no_class(label: int) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (24, 16, 16, 3), dtype=np.uint8), np.arange(24) % 3
    wrong = labels.copy()
    wrong[7] = label
    network = tl.create("small_cnn", 3)
    good = Batches(images, labels, 16, 8)
    for train, valid in ((Batches(images, wrong, 16, 8, names=[f"{n}.png" for n in range(24)]), None),
                         (good, Batches(images, wrong, 16, 8, names=[f"{n}.png" for n in range(24)]))):
        with pytest.raises(tl.DataError, match=rf"7\.png: its label {label} is no class number; give labels from 0 to 2"):
            tl.fit(network, train, valid=valid, settings=tl.Settings(), epochs=1, lr=1e-3)
    with pytest.raises(ValueError, match="3 classes"):
        tl.evaluation(np.full((24, 3), 1 / 3), wrong, classes=("a", "b", "c"))


@pytest.mark.parametrize("arch", ["small_cnn", "efficientnet_lite0"])
@fault("H10 pictures of one colour")
def test_constant_pictures(fault: str, arch: str, tmp_path: Path) -> None:
    for row, name in enumerate(("cat", "dog")):
        for number in range(4):
            (tmp_path / "p" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (100 * row + number, 0, 0)).save(tmp_path / "p" / name / f"{number}.png")
    clf = tl.fine_tune(tmp_path / "p", arch=arch, epochs=1, size=32, progress=False)
    assert all(bool(value.isfinite().all()) for value in clf.network.state_dict().values())
    assert all(0 <= p.probability <= 1 for p in clf.predict(tmp_path / "p"))


@fault("H12 a class without variance")
def test_a_class_of_equal_pictures(fault: str, tmp_path: Path) -> None:
    "Five different files with equal pixels; the probe divides by a spread of zero."
    for number in range(5):
        picture(tmp_path / "p" / "cat" / f"{number}.png", number)
        note = PngImagePlugin.PngInfo()
        note.add_text("number", str(number))
        (tmp_path / "p" / "dog").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "p" / "dog" / f"{number}.png", pnginfo=note)
    assert [p.kind for p in tl.check(tmp_path / "p").problems] == ["near duplicate"] * 4
    clf = tl.fine_tune(tmp_path / "p", epochs=1, size=32, progress=False)
    assert all(bool(value.isfinite().all()) for value in clf.network.state_dict().values())
    assert np.isfinite(clf.history[0]["train_loss"]) and np.isfinite(clf.evaluate(tmp_path / "p").loss)

"""Heads at any scale of features, in short numbers, with any loss and optimiser; PyTorch's switches; arguments of every kind."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tl_tutorial as tl
from tl_tutorial import cli, inference
from tl_tutorial.batches import Augmentation, Batches
from tl_tutorial.datasets import shapes
from tl_tutorial.recipes import SGD, default_rate, fit_head, probe
from tl_tutorial.steps import Run, losses, seeded

QUICK = {"arch": "small_cnn", "weights": "none", "size": 32, "epochs": 1, "progress": False}


def spread(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Features of three classes, hard enough that one wrong scale shows."
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(np.arange(240) % 3)
    centres = rng.normal(size=(3, 12))
    return torch.from_numpy(centres[labels] + 1.5 * rng.normal(size=(240, 12)) + rng.normal(size=12)).float(), labels


@pytest.mark.parametrize("power", [-30, -20, -12, -9, -3, -1, 2, 6, 12, 30])
def test_a_head_fits_features_of_any_scale(power: int) -> None:
    inputs, labels = spread()
    weight, bias = fit_head(inputs, labels, classes=3, settings=tl.Settings())
    expected = inputs @ weight.T + bias
    scaled = (inputs.double() * 10.0**power).float()
    weight, bias = fit_head(scaled, labels, classes=3, settings=tl.Settings())
    found = (scaled.double() @ weight.double().T + bias.double()).float()
    assert 0.7 < (expected.argmax(1) == labels).float().mean() < 1
    assert (found.argmax(1) == expected.argmax(1)).all() and torch.allclose(found, expected, atol=1e-2)


def test_columns_of_very_different_scales_and_constant_ones() -> None:
    inputs, labels = spread()
    mixed = torch.cat([inputs[:, :6] * 1e-3, torch.full((240, 2), 7.0), inputs[:, 6:]], 1)
    for features in (mixed, mixed * 1e-9, mixed * 1e9):
        weight, bias = fit_head(features, labels, classes=3, settings=tl.Settings())
        assert ((features @ weight.T + bias).argmax(1) == labels).float().mean() > 0.7
    weight, bias = fit_head(torch.zeros(240, 4), labels, classes=3, settings=tl.Settings())
    assert weight.isfinite().all() and bias.isfinite().all()


def test_usual_features_are_standardised_as_ever() -> None:
    "The unit of usual features is exactly 1, so that not a bit of a fitted head changes."
    from tl_tutorial.recipes import _unit

    assert [_unit(torch.tensor([[size], [-size]])) for size in (0.02, 1.0, 6.0, 90.0)] == [1.0] * 4
    assert _unit(torch.tensor([1e-8])) == pytest.approx(1e-8) and _unit(torch.tensor([float("nan")])) == 1.0


def test_a_head_is_fitted_in_any_state_of_the_notebook() -> None:
    inputs, labels = spread()
    expected = fit_head(inputs, labels, classes=3, settings=tl.Settings())
    with torch.no_grad():
        found = fit_head(inputs.double().requires_grad_(), labels, classes=3, settings=tl.Settings())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_probe_of_a_network_with_tiny_features(tmp_path: Path) -> None:
    "A body whose features are of the size 1e-8, as those of deep networks at random weights."
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten())
            self.weak = nn.Linear(27, 27, bias=False)
            self.fc = nn.Linear(27, 2)
            nn.init.eye_(self.weak.weight)
            self.weak.weight.data *= 1e-8

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.weak(self.body(images)))

    photos = tmp_path / "photos"
    for channel, name in enumerate(("blue", "red")):
        (photos / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng(10 * channel + number).integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 * channel - 1] += 100
            Image.fromarray(pixels).save(photos / name / f"{number}.png")
    clf = tl.fine_tune(photos, arch=Faint(), epochs=0, size=32, progress=False)
    assert clf.history[0]["stage"] == "probe" and clf.history[0]["train_accuracy"] == 1.0 and clf.metrics["valid_accuracy"] == 1.0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_head_works_in_full_precision(kind: torch.dtype) -> None:
    "With classes that differ by less than bfloat16 can tell, 16 bits would make ties."
    network = tl.create("small_cnn", 50).eval()
    network.head.bias.data += 8 + torch.arange(50) * 1e-3
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        whole = network(images)
        with torch.autocast("cpu", kind):
            found = network(images)
            assert network.features(images).shape == (6, 256)
    assert found.dtype == torch.float32 and all(len(row.unique()) > 40 for row in found)
    assert torch.allclose(found, whole, atol=5e-2)


def test_smoothing_holds_for_squared_error_too() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    plain, smooth = (losses(logits, labels, settings=tl.Settings(loss="mse", label_smoothing=s)) for s in (0.0, 0.3))
    target = torch.eye(4)[labels] * 0.7 + 0.3 / 4
    assert torch.allclose(smooth, (logits - target).square().mean(1), atol=1e-6) and not torch.allclose(plain, smooth)
    assert torch.equal(plain, (logits - torch.eye(4)[labels]).square().mean(1))
    weighted = losses(logits, labels, settings=tl.Settings(loss="mse", label_smoothing=0.3), class_weights=torch.tensor([2.0, 1, 1, 1]))
    assert torch.allclose(weighted[0], 2 * smooth[0]) and torch.equal(weighted[1], smooth[1])


def test_sgd_has_a_rate_of_its_own(tmp_path: Path) -> None:
    photos = shapes(tmp_path / "photos", ("circle", "triangle"), per_class=12, size=32)
    peaks = {}
    for optimizer in ("adamw", "sgd"):
        clf = tl.fine_tune(photos, **QUICK | {"epochs": 2}, optimizer=optimizer)
        peaks[optimizer] = clf.history[1]["lr"]
    assert peaks["sgd"] == pytest.approx(SGD[False] * peaks["adamw"])
    assert default_rate(100, optimizer="sgd") == pytest.approx(SGD[True] * default_rate(100)) and default_rate(100) == 2e-4
    assert tl.fine_tune(photos, **QUICK, optimizer="sgd", lr=1e-4).history[1]["lr"] <= 1e-4


def images(count: int = 16) -> Batches:
    rng = np.random.default_rng(0)
    return Batches(rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8), np.arange(count) % 2, 16, 8, how=Augmentation())


def test_dropout_on_mps_leaves_its_random_numbers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    "There is no Apple GPU here: its functions are played by others."
    told: list[object] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", told.append)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1, 2, device=torch.device("mps")):
        assert told == []
        first = torch.rand(3)
        raise KeyError
    with seeded(1, 2, device=torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
    assert told == ["before"] and torch.equal(torch.get_rng_state(), before)


def as_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    "The CPU plays a GPU that has float16 and no bfloat16."
    from tl_tutorial import steps

    for module in (inference, steps):
        monkeypatch.setattr(module, "half_type", lambda device, settings: torch.float16 if settings.amp else None)


def test_the_kind_of_short_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able or including_emulation)
        assert inference.half_type(torch.device("cuda"), tl.Settings()) == expected
        assert inference.half_type(torch.device("cuda"), tl.Settings(amp=False)) is None
    assert inference.half_type(torch.device("cpu"), tl.Settings()) is None


def plain() -> tl.Network:
    "Without convolutions, which a CPU computes very slowly in float16."
    torch.manual_seed(0)
    return tl.create(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 2)), 2)


def test_float16_learns_through_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    "Nearly the step of full precision; gradients that overflow halve the scale, and the step is repeated."
    def learned() -> tuple[dict[str, torch.Tensor], Run]:
        network = plain()
        run = Run(network, images(), tl.Settings(optimizer="sgd", momentum=0), 1, 1e-2)
        run.learn(next(run.train.epoch()))
        return network.state_dict(), run

    start = plain().state_dict()
    whole, run = learned()
    assert run.scale == 1
    as_old_gpu(monkeypatch)
    half, run = learned()
    assert run.step == 1 and run.scale > 1
    for name in ("head.weight", "body.2.weight"):
        moved = (whole[name] - start[name]).norm()
        assert (half[name] - whole[name]).norm() < 0.1 * moved
    real = Run._part
    monkeypatch.setattr(Run, "_part", lambda run, *a: (setattr(run, "tries", getattr(run, "tries", 0) + 1), real(run, *a))[1])
    run = Run(plain(), images(), tl.Settings(), 1, 1e-2)
    run.scale = 2.0**60 # far too large
    run.learn(next(run.train.epoch()))
    assert run.tries > 20 and 1 < run.scale < 2.0**45 and run.sums[2] == 8 and run.step == 1
    assert run.state()[1]["scale"] == run.scale


def test_a_scale_hides_no_number_that_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    as_old_gpu(monkeypatch)
    run = Run(plain(), images(), tl.Settings(), 1, 1e-2)
    batch = next(run.train.epoch())
    batch.images[0] = float("nan")
    with pytest.raises(tl.TrainingError, match="not finite"):
        run.learn(batch)
    assert run.step == 0


def test_looking_falls_back_to_full_precision_where_float16_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows = images.mean((2, 3)) * 1e6
            return rows.half().float() if loud else rows

    batches = Batches(images().images, images().labels, 16, 8)
    loud = False
    expected = inference.predict_logits(Loud(), batches)
    as_old_gpu(monkeypatch)
    loud = True

    @contextlib.contextmanager
    def half(device: torch.device, settings: tl.Settings):
        nonlocal loud
        loud = True
        yield
        loud = False

    monkeypatch.setattr(inference, "half_precision", half)
    assert torch.equal(inference.predict_logits(Loud(), batches), expected)


SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "no_grad": torch.no_grad, "inference mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
}


@contextlib.contextmanager
def default_type(kind: torch.dtype):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def gradients_off():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


SWITCHES |= {"float64": lambda: default_type(torch.float64), "bfloat16": lambda: default_type(torch.bfloat16), "gradients off": gradients_off}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("p") / "photos", ("circle", "triangle"), per_class=10, size=32)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_notebook_change_nothing(switch: str, photos: Path) -> None:
    expected = tl.fine_tune(photos, **QUICK).network.state_dict()
    with SWITCHES[switch]():
        before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.get_default_device())
        found = tl.fine_tune(photos, **QUICK).network.state_dict()
        assert before == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.get_default_device())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("knobs", "words"), [
    ({"arch": 123}, "arch = 123: give the name"), ({"arch": Path("net.pth")}, "weights="), ({"arch": True}, "arch = True"),
    ({"arch": nn.Identity}, r"call it first.*arch=Identity\(\)"), ({"arch": lambda: None}, "call it first"), ({"arch": ["resnet18"]}, "arch = "),
    ({"resume": True}, "resume = True: needs checkpoint"), ({"resume": "yes", "checkpoint": "c"}, "resume = 'yes': give True or False"),
    ({"progress": "no"}, "progress = 'no'"), ({"progress": None}, "progress = None"), ({"valid": True}, "valid = True: give the path"),
    ({"valid": 0.2}, "valid = 0.2: give the path"), ({"valid": ""}, "valid = '': this is empty"), ({"checkpoint": True}, "checkpoint = True"),
    ({"checkpoint": "  "}, "checkpoint = '  ': this is empty"), ({"weights": 3}, "weights = 3"), ({"weights": nn.Identity()}, "weights = "),
    ({"listeners": print}, "listeners = .*give a list"), ({"listeners": [1]}, "listeners = "), ({"listeners": None}, "listeners = None"),
    ({"stop": True}, "stop = True: give a function"), ({"epoch": 1}, "unknown setting epoch"), ({"size": "big"}, "size = 'big'"),
    ({"epochs": True}, "epochs = True"), ({"seed": [1]}, r"seed = \[1\]"), ({"lr": "fast"}, "lr = 'fast'"),
])
def test_arguments_of_another_kind_are_refused_by_name(knobs: dict, words: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(tl.SettingsError, match=words):
        tl.fine_tune(photos, **QUICK | knobs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, 5, True, ["a"], {"cat": []}, b"photos", "", np.zeros(3)], ids=str)
def test_a_folder_of_another_kind_is_refused_by_name(folder: object) -> None:
    with pytest.raises(tl.SettingsError, match="folder = "):
        tl.fine_tune(folder, **QUICK)


def test_kinds_that_are_right_are_taken(photos: Path, tmp_path: Path) -> None:
    clf = tl.fine_tune(tl.scan(photos), None, **QUICK | {"seed": np.int64(3), "size": np.float64(32)}, listeners=(lambda e: None,),
                       stop=lambda: False, checkpoint=str(tmp_path / "run"), resume=np.bool_(False))
    assert clf.settings.seed == 3 and (tmp_path / "run/state.safetensors").exists()


def test_a_tilde_is_the_home_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tl.fine_tune(photos, checkpoint="~/run", **QUICK)
    assert (tmp_path / "home/run/state.safetensors").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("knobs", [{"batch_size": 1}, {"batch_size": 1, "arch": "resnet18"}])
def test_one_picture_for_a_batchnorm_that_learns(knobs: dict, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "Where the maps have shrunk to one place there is no variance: one sentence, whose remedies work."
    arch = {"arch": "efficientnet_lite0", **knobs}
    with pytest.raises(tl.SettingsError, match="batch_size = 1: one picture of 32 pixels.*raise batch_size, or size"):
        tl.fine_tune(photos, **QUICK | arch)
    (tmp_path / "settings.ini").write_text("[model]\nweights = none\n[train]\nbatch_size = 1\n")
    assert cli.main(["train", str(photos), "--out", "m.safetensors", "--arch", arch["arch"], "--size", "32", "--epochs", "1"]) == 2
    assert "batch_size" in capsys.readouterr().err and not Path("m.safetensors").exists()
    if arch["arch"] == "resnet18":
        return
    (tmp_path / "settings.ini").unlink()
    assert np.isfinite(tl.fine_tune(photos, **QUICK | arch | {"batch_size": 2}).history[-1]["train_loss"])
    assert np.isfinite(tl.fine_tune(photos, **QUICK | arch | {"size": 64}).history[-1]["train_loss"])


def test_the_old_head_is_a_candidate(colours: Path) -> None:
    "Asked to keep it, the probe takes a head that is better than what it can fit itself."
    settings = tl.Settings(size=32, arch="small_cnn")
    from tl_tutorial.material import gather

    network = tl.create("small_cnn", 3)
    material, _, _ = gather(colours, None, settings=settings, preprocess=network.preprocess)
    probe(network, material, settings=settings)
    good = network.head.weight.detach().clone()
    probe(network, material, settings=settings, keep=True)
    assert torch.equal(network.head.weight, good)
    network.head.weight.data *= -1
    probe(network, material, settings=settings, keep=True)
    assert torch.equal(network.head.weight, good)

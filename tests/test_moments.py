"""Moments of the maps: what they say, when they are asked for, and that a panel with them is a network like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tl_tutorial as tl
import tl_tutorial.evidence as room
from tl_tutorial.efficientnet import EfficientNetLite0
from tl_tutorial.evidence import Evidence, look
from tl_tutorial.explaining import grad_cam
from tl_tutorial.exporting import to_onnx
from tl_tutorial.inference import folded
from tl_tutorial.material import Material
from tl_tutorial.moments import moments
from tl_tutorial.network import Network, Preprocess
from tl_tutorial.panel import Panel, load_lite
from tl_tutorial.settings import Settings

SIDE, SIZE = 110, 96


def spotted(count: int, seed: int = 0) -> tuple[Material, np.ndarray]:
    "Noise, in every second picture with a bright spot of 6 pixels, and where each spot is."
    rng, pictures, places = np.random.default_rng(seed), [], []
    for number in range(count):
        grey, (y, x) = rng.normal(120, 25, (SIDE, SIDE)), rng.integers(20, 90, 2)
        grey[y - 3:y + 3, x - 3:x + 3] += 70 * (number % 2)
        pictures.append(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2))
        places.append((y, x))
    images, labels = np.stack(pictures), np.arange(count) % 2
    return Material(images, labels, images[:0], labels[:0], SIZE, 2), np.array(places)


@pytest.fixture(scope="module")
def found() -> Evidence:
    "Evidence by moments alone."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "best_share", lambda *_, **__: (0.0, 1.0))
        return look(spotted(24)[0], Settings(size=SIZE))


def crops(material: Material) -> torch.Tensor:
    edge = (SIDE - SIZE) // 2
    return torch.from_numpy(material.images[:, edge:edge + SIZE, edge:edge + SIZE]).permute(0, 3, 1, 2).float() / 255


def test_moments_do_not_mind_where() -> None:
    maps = torch.randn(2, 5, 12, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(moments(maps), moments(maps.flip(2).roll(4, 3)), atol=1e-5)
    assert moments(maps.half()).dtype == torch.float32 and moments(maps).shape == (2, 20)
    mean, spread, lean, tails = moments(3 * maps + 2).unflatten(1, (4, 5)).unbind(1)
    plain = moments(maps).unflatten(1, (4, 5)).unbind(1)
    assert torch.allclose(mean, 3 * plain[0] + 2, atol=1e-4) and torch.allclose(spread, 3 * plain[1], atol=1e-4)
    assert torch.allclose(lean, plain[2], atol=1e-3) and torch.allclose(tails, plain[3], atol=1e-3)
    assert torch.allclose(moments(-maps)[:, 10:15], -plain[2], atol=1e-5)


def test_moments_have_slopes_everywhere() -> None:
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 1] = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    maps.requires_grad_(True)
    moments(maps).sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_a_panel_with_moments_begins_like_one_without() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, fine = (Panel([load_lite("efficientnet_lite0"), load_lite("efficientnet_lite2")], fine=fine).eval() for fine in (False, True))
    with torch.no_grad():
        short, long = plain(images), fine(images)
        assert torch.equal(long[:, :2560], short) and long.shape[1] == fine.width == 2560 + 4 * (256 + 280) and plain.width == 2560
        assert torch.allclose(folded(fine)(images), long, atol=1e-4)
        stage = fine.members[0].blocks[:3](fine.members[0].stem(images))  # type: ignore[index, operator]
        assert torch.allclose(long[:, 2560:2656] * 4 * 96**0.5, moments(stage), atol=1e-4) # 4 stages, 4 x 24 numbers


def test_the_head_decides_by_what_was_measured(found: Evidence) -> None:
    "What the network says is what the head on its features says, moments and their spreads included."
    material, _ = spotted(24)
    assert found.share == 1 and found.network.arch == "panel_moments" and found.accuracy == 1
    with torch.no_grad():
        logits = found.network(crops(material))
    assert float((logits.argmax(1) == found.labels).float().mean()) == found.fitted["train_accuracy"] == 1
    assert torch.nn.functional.cross_entropy(logits, found.labels) == pytest.approx(found.fitted["train_loss"], abs=1e-3)
    assert not found.network.head.weight[:, :3840].any() # all by moments


def test_a_fault_is_found_where_it_is(found: Evidence) -> None:
    material, places = spotted(24)
    heat = grad_cam(found.network, crops(material), target=1).numpy()
    assert heat.shape == (24, SIZE, SIZE) and heat.min() >= 0 and heat.max() <= 1
    peaks = np.array([np.unravel_index(one.argmax(), one.shape) for one in heat]) + (SIDE - SIZE) // 2
    away = np.hypot(*(peaks - places).T)[1::2]
    assert np.median(away) < 14 # pixels, of 96; a cell of the last maps has 32


def test_without_moments_both_ways_show_the_same() -> None:
    network = tl.create("panel", 3, seed=1).eval()
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    plain = grad_cam(network, images, target=2)
    assert network.body.depths() == []  # type: ignore[operator]
    fine = tl.create("panel_moments", 3).eval()
    with torch.no_grad():
        fine.head.weight.zero_()
        fine.head.weight[:, :3840] = network.head.weight
    heat = grad_cam(fine, images, target=2)
    plain, heat = (torch.nn.functional.adaptive_avg_pool2d(one[:, None], 3).flatten() for one in (plain, heat))
    assert float(torch.corrcoef(torch.stack([plain, heat]))[0, 1]) > 0.8 # drawn on a finer grid, so not to the digit


def test_a_file_with_moments_comes_back(found: Evidence, tmp_path: Path) -> None:
    clf = tl.Classifier(found.network, ("plain", "spot"), SIZE, Settings(arch="panel_moments"))
    image = spotted(24)[0].images[3]
    twin = tl.load(clf.save(tmp_path / "m.safetensors"), device="cpu")
    before, after = (one.predict(image)[0].probabilities for one in (clf, twin))
    assert after == pytest.approx(before, abs=1e-5) and twin.network.arch == "panel_moments"
    again = tl.create(None, 3, weights=tmp_path / "m.safetensors")
    assert again.arch == "panel_moments" and again.head.in_features == 7008


def test_onnx_has_the_moments_too(tmp_path: Path) -> None:
    "A panel of two small networks: one block in each stage."
    onnxruntime = pytest.importorskip("onnxruntime")

    class Small(EfficientNetLite0):
        stages = tuple((expand, channels, 1, stride, kernel) for expand, channels, _, stride, kernel in EfficientNetLite0.stages)

    torch.manual_seed(0)
    panel = Panel([Small(0), Small(0)], fine=True)
    network = Network(panel, panel.width, 3, Preprocess(), "panel_moments").eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[1] = 0.5 # without any spread
    with torch.no_grad(): # answers that differ
        network.head.weight.mul_(400)
        network.head.bias.sub_(network(images).mean(0))
    file = to_onnx(network, tmp_path / "m.onnx", size=64, description={"classes": ["a", "b", "c"]})
    with torch.no_grad():
        wanted = network(images).softmax(1).numpy()
    assert np.ptp(wanted, axis=0).max() > 0.05
    assert np.abs(onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})[0] - wanted).max() < 1e-3


def test_of_many_pictures_some_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    monkeypatch.setattr(room, "head_on", lambda seen, share, *, material, settings: rows.append((len(seen.last), np.bincount(material.labels).tolist()))
                        or room.Head(torch.zeros(1), torch.zeros(1), torch.zeros(len(seen.last), 2), 1.0))
    monkeypatch.setattr(room, "ENOUGH", 10)
    labels = np.repeat([0, 1], [30, 10])
    material = Material(np.zeros((40, 1, 1, 3), np.uint8), labels, np.zeros((0, 1, 1, 3), np.uint8), labels[:0], 1, 2, groups=np.arange(40))
    assert room.best_share(room.Seen(torch.zeros(40, 3), torch.zeros(40, 2)), material, settings=Settings())[1] == 0 # at equal losses, the simpler
    assert rows == [(10, [7, 3])] * 4 or rows == [(10, [8, 2])] * 4


def test_shares_and_features_that_do_not_vary_do_no_harm() -> None:
    seen = room.Seen(torch.ones(6, 3), torch.zeros(6, 4))
    for share in room.SHARES:
        assert room._factors(seen, share).isfinite().all()
    assert len(room._factors(seen, 0.0)) == 3 and len(room._factors(seen.rows(torch.arange(1)), 0.5)) == 3


def test_moments_can_be_named(tmp_path: Path) -> None:
    "As any network can: a head by gradient descent, on pictures set aside."
    from PIL import Image
    material, _ = spotted(24)
    for number, (image, label) in enumerate(zip(material.images, material.labels, strict=True)):
        place = tmp_path / ("plain", "spot")[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    clf = tl.fine_tune(tmp_path, arch="panel_moments", epochs=0, size=SIZE, progress=False)
    assert clf.metrics["valid_accuracy"] >= 0.5 and clf.network.arch == "panel_moments"


@pytest.mark.parametrize("loss, chosen", [((1.0, 0.95, 0.97, 2.0), 0.0), ((1.0, 0.95, 0.5, 0.6), 0.5), ((1.0, 1.0, 1.0, 0.1), 1.0)])
def test_moments_are_taken_where_they_clearly_help(loss: tuple[float, ...], chosen: float, monkeypatch: pytest.MonkeyPatch) -> None:
    by_share = dict(zip(room.SHARES, loss, strict=True))
    def head(seen: object, share: float, **_: object) -> room.Head: # logits whose loss is the one wanted: log(1 + exp(-margin))
        margin = -float(np.log(np.expm1(by_share[share])))
        return room.Head(torch.zeros(1), torch.zeros(1), torch.tensor([[margin, 0.0]] * 4), 1.0)
    monkeypatch.setattr(room, "head_on", head)
    none = np.zeros((0, 1, 1, 3), np.uint8)
    material = Material(none, np.zeros(4, int), none, np.zeros(0, int), 1, 2)
    found = room.best_share(room.Seen(torch.zeros(4, 2), torch.zeros(4, 2)), material, settings=Settings())
    assert found == (pytest.approx(by_share[chosen], abs=1e-4), chosen)

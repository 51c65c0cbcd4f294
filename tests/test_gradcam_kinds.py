"""Grad-CAM on every kind of body: channels first, channels last, tokens; where there is nothing to show, one sentence."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tl_tutorial as tl
from tl_tutorial.classifier import Classifier
from tl_tutorial.explaining import as_maps, evidence, grad_cam
from tl_tutorial.inference import folded
from tl_tutorial.network import Network, Preprocess


def picture(side: int = 64, wide: int | None = None) -> torch.Tensor:
    "Noise, always the same."
    return torch.rand(1, 3, side, wide or side, generator=torch.Generator().manual_seed(0))


def agreement(network: Network, images: torch.Tensor) -> float:
    "Does a corner of the maps depend most on the same corner of the picture? Smallest share of its own quarter in the gradient."
    images = images.clone().requires_grad_(True)
    with torch.enable_grad():
        maps, _ = evidence(network.eval(), images)
    high, wide = images.shape[2] // 2, images.shape[3] // 2
    shares = []
    for down in (0, 1):
        for across in (0, 1):
            weight = torch.randn(maps.shape[1], generator=torch.Generator().manual_seed(1))
            slope, = torch.autograd.grad((maps[0, :, -down, -across] * weight).sum(), images, retain_graph=True)
            power = slope[0].square().sum(0)
            quarter = power[down * high:(down + 1) * high, across * wide:(across + 1) * wide]
            shares.append(float(quarter.sum() / power.sum()))
    return min(shares)


class Attention(nn.Module):
    "One head over tokens, whose inner outputs have axes that look like maps."
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(part.unflatten(2, (4, -1)).transpose(1, 2)) for part in self.qkv(x).chunk(3, 2))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Tokens(nn.Module):
    "A vision transformer in small: patches of 8 pixels, registers, two blocks; what is pooled can be chosen."
    def __init__(self, registers: int = 1, pool: str = "class") -> None:
        super().__init__()
        self.patch, self.norms, self.pool = nn.Conv2d(3, 64, 8, 8), nn.ModuleList(nn.LayerNorm(64) for _ in range(4)), pool
        self.attentions = nn.ModuleList(Attention(64) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.first = nn.Parameter(torch.randn(1, registers, 64) * 0.02)
        self.registers, self.fc = registers, nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        for k in range(2):
            x = x + self.attentions[k](self.norms[2 * k](x))
            x = x + self.mlps[k](self.norms[2 * k + 1](x))
        return self.fc(x[:, 0] if self.pool == "class" else x[:, self.registers:].mean(1))


class Last(nn.Module):
    "Channels last, as in Swin; 48 channels on 56 columns look nearly square."
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.fc = nn.Conv2d(3, 48, 4, 4), nn.LayerNorm(48), nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize(("body", "grid"), [
    (Tokens(1), (8, 8)), (Tokens(5), (8, 8)), (Tokens(1, "mean"), (8, 8)), (Tokens(0, "mean"), (8, 8)), (Last(), (16, 16))])
def test_tokens_and_channels_last_are_read_as_maps(body: nn.Module, grid: tuple[int, int]) -> None:
    network = tl.create(body, 2, preprocess=Preprocess(size=64))
    maps, slope = evidence(network.eval(), picture().requires_grad_(True))
    assert tuple(maps.shape[2:]) == grid and slope.shape == maps.shape and bool(slope.any())
    assert agreement(network, picture()) > 0.6
    heat = grad_cam(network, picture())
    assert heat.shape == (1, 64, 64) and bool(heat.isfinite().all()) and float(heat.max()) == pytest.approx(1, abs=0.3)


def test_pictures_that_are_not_square() -> None:
    network = tl.create(Tokens(1, "mean"), 2, preprocess=Preprocess(size=64))
    images = picture(48, 80)
    assert tuple(evidence(network.eval(), images.clone().requires_grad_(True))[0].shape[2:]) == (6, 10)
    assert agreement(network, images) > 0.6 and grad_cam(network, images).shape == (1, 48, 80)


@pytest.mark.parametrize(("shape", "wanted"), [
    ((2, 8, 7, 7), (2, 8, 7, 7)), ((2, 7, 7, 8), (2, 8, 7, 7)), ((2, 56, 56, 48), (2, 48, 56, 56)), ((2, 49, 8), (2, 8, 7, 7)),
    ((2, 50, 8), (2, 8, 7, 7)), ((2, 12, 197, 64), None), ((2, 51, 8), None), ((2, 8, 1, 1), None), ((128, 49, 8), None),
    ((2, 8), None), ((2, 1, 8), None), ((2, 300, 300, 8), None)])
def test_which_axes_are_those_of_a_picture(shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    found = as_maps(torch.zeros(shape), torch.zeros(2, 3, 224, 224))
    assert wanted == (None if found is None else tuple(found.shape))


def test_the_grid_of_patches_tells_registers_from_patches() -> None:
    tokens = torch.arange(2 * 54 * 3.0).view(2, 54, 3)
    maps = as_maps(tokens, torch.zeros(2, 3, 224, 224), patches=(7, 7))
    assert maps is not None and torch.equal(maps[1, :, 2, 4], tokens[1, 5 + 2 * 7 + 4])


@pytest.mark.parametrize("arch", ["timm:vit_tiny_patch16_224", "timm:deit_tiny_distilled_patch16_224", "swin_t"])
def test_published_kinds(arch: str) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    network = tl.create(arch, 2, weights="none")
    assert agreement(network, picture(max(64, network.preprocess.least))) > 0.6


def test_where_there_is_nothing_to_show_a_sentence_says_so(tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 3))
    network = tl.create(flat, 2, preprocess=Preprocess(size=32))
    with pytest.raises(tl.ModelError, match="custom: no layer .* rows and columns of a picture of 32 x 32 pixels.*Grad-CAM has nothing to show"):
        grad_cam(network, picture(32))
    with pytest.raises(tl.ModelError, match="resnet18: no layer.*give a larger picture"):
        grad_cam(tl.create("resnet18", 2, weights="none"), picture(2))


def test_tokens_in_another_order_are_refused() -> None:
    class Unrolled(Tokens):
        def reroll(self) -> None: ...

    with pytest.raises(tl.ModelError, match="order of its tokens is not that of the picture"):
        grad_cam(tl.create(Unrolled(), 2, preprocess=Preprocess(size=64)), picture())


def test_explaining_while_others_use_the_network() -> None:
    clf = Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("a", "b"), 32, tl.Settings(arch="small_cnn"))
    images = [np.full((32, 32, 3), k * 20, np.uint8) for k in range(8)]
    wanted = [clf.explain(image).data["heat"] for image in images]
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(what: str) -> None:
        try:
            while not stop.is_set():
                clf.predict(images[0]) if what == "predict" else grad_cam(clf.network, torch.rand(1, 3, 32, 32))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(what,)) for what in ("predict", "explain")]
    for thread in threads:
        thread.start()
    try:
        for image, heat in zip(images, wanted, strict=True):
            assert np.array_equal(clf.explain(image).data["heat"], heat)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_gradients_may_be_off_outside() -> None:
    network = tl.create("small_cnn", 2, weights="none")
    wanted = grad_cam(network, picture(32))
    with torch.inference_mode():
        assert torch.equal(grad_cam(network, picture(32)), wanted)
    torch.set_grad_enabled(False)
    try:
        assert torch.equal(grad_cam(network, picture(32)), wanted)
    finally:
        torch.set_grad_enabled(True)


def test_a_network_that_calls_something_else_depths_is_explained_too() -> None:
    "Swin and its relatives keep a tuple of that name."
    network = tl.create("small_cnn", 2).eval()
    network.body.depths = (2, 2, 6, 2)  # type: ignore[assignment]
    assert tl.grad_cam(network, torch.rand(1, 3, 64, 64)).shape == (1, 64, 64)


def test_who_explains_in_another_thread_changes_no_bit_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    "Its hooks hang on every layer meanwhile; the convolutions take in their BatchNorm all the same."
    import tl_tutorial.explaining as room

    clf = Classifier(tl.create("small_cnn", 2).eval(), ("cat", "dog"), 64, tl.Settings(arch="small_cnn"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    alone = clf.predict(image)[0].probabilities
    inside, go_on, given = threading.Event(), threading.Event(), room._Given

    def slow(*args: object) -> object:
        inside.set()
        assert go_on.wait(60)
        return given(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "_Given", slow)
    other = threading.Thread(target=clf.explain, args=(image,))
    other.start()
    assert inside.wait(60)
    folds = clf.network.body is not folded(clf.network.body)
    meanwhile = clf.predict(image)[0].probabilities
    go_on.set()
    other.join(60)
    assert folds and meanwhile == alone and not other.is_alive()

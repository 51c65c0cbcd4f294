"""Networks of every kind: torchvision's odd ones, timm's odd ones, modules of one's own, weights files, sizes, heads."""

import copy
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tl_tutorial as tl
from tl_tutorial import backbones
from tl_tutorial.classifier import Classifier
from tl_tutorial.efficientnet import EfficientNetLite0, load_lite0
from tl_tutorial.network import Network, Preprocess, small_cnn

FAST: dict[str, Any] = {"size": 32, "epochs": 1, "progress": False, "device": "cpu"}


def saved(network: Network, path: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 32) -> Path:
    "A classifier's file without training."
    return Classifier(network.eval(), classes, size, tl.Settings(arch="small_cnn")).save(path)


# ---- torchvision

@pytest.mark.parametrize("arch", ["inception_v3", "googlenet"])
def test_networks_that_torchvision_feeds_otherwise_get_the_same_input(arch: str, tmp_path: Path) -> None:
    from torchvision import models

    extra = {"aux_logits": True} if arch == "googlenet" else {}
    theirs = models.get_model(arch, weights=None, transform_input=True, init_weights=False, **extra).eval()
    for part in theirs.modules(): # at its beginning its features are nearly zero
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    recipe = models.get_model_weights(arch).DEFAULT.transforms()
    images = torch.rand(1, 3, 96, 96)
    normal = (images - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
    theirs.fc = nn.Identity()
    with patch.object(backbones, "_fetch", lambda url: tmp_path / "w.pth"), torch.no_grad():
        fetched, local = tl.create(arch, 2).eval(), tl.create(arch, 2, weights=tmp_path / "w.pth").eval()
        wanted = theirs(normal)
        assert wanted.std() > 0.01
        for ours in (fetched, local):
            assert torch.allclose(ours.features(images), wanted, rtol=1e-3, atol=1e-4)
        again = tl.load(saved(fetched, tmp_path / "m.safetensors"), device="cpu").network
        assert torch.allclose(again.features(images), wanted, rtol=1e-3, atol=1e-4)


def tiny_vit(**kwargs: Any) -> nn.Module:
    "torchvision's vision transformer, one layer and narrow."
    from torchvision.models import VisionTransformer

    kwargs.pop("weights", None)
    return VisionTransformer(**{"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "image_size": 224, **kwargs})


def test_the_size_of_a_vision_transformer_belongs_to_its_weights(tmp_path: Path) -> None:
    torch.save(tiny_vit(image_size=384).state_dict(), tmp_path / "swag.pth")
    with patch("torchvision.models.get_model", lambda name, **kwargs: tiny_vit(**kwargs)), \
            patch.object(backbones, "_fetch", lambda url: tmp_path / "swag.pth"):
        by_name = tl.create("vit_b_16", 3, weights="IMAGENET1K_SWAG_E2E_V1")
        by_file = tl.create("vit_b_16", 3, weights=tmp_path / "swag.pth")
        for network in (by_name, by_file):
            assert network.preprocess.size == network.preprocess.least == 384 and network.preprocess.fixed
            assert network(torch.rand(1, 3, 384, 384)).shape == (1, 3)
        again = tl.load(saved(by_file, tmp_path / "m.safetensors", ("a", "b", "c"), 384), device="cpu")
        assert torch.equal(again.network.body.encoder.pos_embedding, by_file.body.encoder.pos_embedding)
        assert tl.create("vit_h_14", 3, weights="none").preprocess.size == 224
        assert tl.create(None, 3, weights=tmp_path / "m.safetensors").preprocess.size == 384


def test_states_of_networks_that_ask_for_a_version_come_back(tmp_path: Path) -> None:
    from torchvision.models import mnasnet0_5

    network = tl.create("mnasnet0_5", 2, weights="none")
    network.load_state_dict(dict(network.state_dict()))
    file = saved(network, tmp_path / "m.safetensors")
    assert torch.equal(tl.load(file, device="cpu").network.head.weight, network.head.weight)
    theirs = mnasnet0_5()
    torch.save(theirs.state_dict(), tmp_path / "w.pth") # its version is in the file
    save_file(theirs.state_dict(), tmp_path / "w.safetensors") # and here it is not
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(tl.create("mnasnet0_5", 2, weights=tmp_path / name).body.layers[0].weight, theirs.layers[0].weight)


# ---- timm

@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientformer_l1", "mobilenetv3_small_050", "efficientvit_b0"])
def test_timm_features_are_measured(name: str) -> None:
    pytest.importorskip("timm")
    network = tl.create(f"timm:{name}", 4, weights="none")
    side = network.preprocess.least
    with torch.no_grad():
        assert network.eval()(torch.rand(2, 3, side, side)).shape == (2, 4)


def test_timm_sentences() -> None:
    pytest.importorskip("timm")
    with pytest.raises(tl.ModelError, match=r"timm:no_such_network: timm has no network of this name; timm\.list_models"):
        tl.create("timm:no_such_network", 2)
    with pytest.raises(tl.ModelError, match="timm:resnet10t has no weights called 'defualt'; choose"):
        tl.create("timm:resnet10t", 2, weights="defualt")


# ---- sizes

@pytest.mark.parametrize(("arch", "size", "said"), [
    ("vit_b_16", 256, "takes pictures of 224 pixels only; give size=224"), ("vit_b_16", 96, "takes pictures of 224 pixels only"),
    ("inception_v3", 64, "at least 75 pixels; raise size"), ("efficientnet_lite0", 16, "at least 32 pixels; raise size")])
def test_a_size_that_does_not_fit_is_refused_before_any_picture_is_read(
        arch: str, size: int, said: str, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("pictures were read")

    for room in ("material", "report"):
        monkeypatch.setattr(f"tl_tutorial.{room}.{'load_pixels' if room == 'material' else 'check'}", read)
    monkeypatch.setattr("tl_tutorial.material.check", read)
    with pytest.raises(tl.ModelError, match=f"size={size}: .*{said}"):
        tl.fine_tune(colours, arch=arch, weights="none", size=size, progress=False)


def test_a_size_that_only_the_layers_know_is_refused() -> None:
    whole = nn.Sequential(small_cnn(), nn.Flatten(), nn.Linear(256 * 16, 5)) # made for 32 pixels
    network = tl.create(whole, 3)
    assert network.preprocess.size == 32
    network.check_size(32)
    with pytest.raises(tl.ModelError, match=r"size=48: custom cannot take pictures of this size \(.*\); its own is size=32"):
        network.check_size(48)
    tl.create("resnet18", 2, weights="none").check_size(97)


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "resnet18"])
def test_a_step_of_one_small_picture_is_one_sentence(arch: str, colours: Path) -> None:
    with pytest.raises(tl.SettingsError, match="batch_size = 1: one picture of 32 pixels .* raise batch_size, or size") as caught:
        tl.fine_tune(colours, arch=arch, weights="none", batch_size=1, **FAST)
    assert isinstance(caught.value.__cause__, tl.TrainingError) and isinstance(caught.value.__cause__.__cause__, ValueError)


# ---- modules of one's own

class Base(nn.Module):
    "Two convolutions and a head."
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()).mean((2, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.pooled(x))


class Tied(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)
        self.b.weight = self.a.weight


class Dictionary(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x), "loss": None}


class Pair(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Lazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(5)


class Half(Base):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class Double(Base):
    def __init__(self) -> None:
        super().__init__()
        self.double()


class Odd(Base):
    "Its head is written before another linear layer."
    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.squeeze(self.pooled(x)))


class Headless(Odd):
    "Its head is off already; a linear layer stands inside."
    def forward(self, x: torch.Tensor) -> Any:
        return torch.cat([self.pooled(x), self.squeeze(self.pooled(x))], 1)


@pytest.mark.parametrize("kind", [Base, Tied, Dictionary, Pair, Lazy, Half, Double, Odd, Headless])
def test_modules_of_ones_own_train_and_come_back(kind: type[nn.Module], colours: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clf = tl.fine_tune(colours, arch=kind(), checkpoint=tmp_path / "run", **FAST)
    picture = np.zeros((32, 32, 3), np.uint8)
    again = tl.load(clf.save(tmp_path / "m.safetensors"), arch=kind(), device="cpu")
    assert again.predict(picture)[0].probabilities == pytest.approx(clf.predict(picture)[0].probabilities)
    assert clf.network.head.in_features == {Tied: 3, Headless: 8}.get(kind, 4)
    assert all(value.dtype == torch.float32 for value in clf.network.parameters())
    if kind is Odd:
        assert isinstance(clf.network.body.fc, nn.Identity) and isinstance(clf.network.body.squeeze, nn.Linear)


class Several(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x), "features": self.pooled(x)}


class Functional(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).log_softmax(1)


class NoHead(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.fc

    def forward(self, x: torch.Tensor) -> Any:
        return self.pooled(x)


class Broken(Base):
    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("make", "said"), [
    (Several, r"Several gives \(2, 4\), \(2, 4\), and one tensor \[B, F\].*wrap it"), (Functional, "Functional: its forward ends in a softmax.*logits"),
    (NoHead, r"NoHead: no linear layer to replace; give Network\(body, features"), (Broken, r"Broken cannot take pictures of 3 x 224 x 224 \(.*preprocess="),
    (lambda: nn.Linear(3, 2), "Linear"), (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3)), "channels.*preprocess=")])
def test_modules_that_cannot_be_used_are_one_sentence(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(tl.ModelError, match=said) as caught:
        tl.create(make(), 2)
    assert "\n" not in str(caught.value)


def test_the_remedies_for_modules_work(colours: Path) -> None:
    body = NoHead()
    clf = tl.fine_tune(colours, arch=Network(body, 4, 2, Preprocess()), **FAST)
    assert clf.network.head.in_features == 4
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    network = tl.create(grey, 2, preprocess=Preprocess((0.5,), (0.5,), size=28))
    assert network(torch.rand(2, 3, 28, 28)).shape == (2, 2)


@pytest.mark.parametrize(("arch", "said"), [(123, "give the name of a network"), (Base, "a class; give a network made from it"),
                                            ("", "give the name"), (len, "give the name")])
def test_what_is_no_network_is_refused(arch: Any, said: str) -> None:
    with pytest.raises(tl.ModelError, match=f"arch=.*{said}"):
        tl.create(arch, 2)
    for classes in (0, -1, 2.5, "3", True):
        with pytest.raises(tl.ModelError, match="classes=.*whole number"):
            tl.create("small_cnn", classes)  # type: ignore[arg-type]
    with pytest.raises(tl.ModelError, match="preprocess=.*Preprocess"):
        tl.create("small_cnn", 2, preprocess=(0.5, 0.5))  # type: ignore[arg-type]


def fresh() -> nn.Module:
    "A small CNN that nobody trained."
    torch.manual_seed(0)
    return nn.Sequential(small_cnn(width=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def test_whether_a_module_is_pretrained_is_said_or_seen(caplog: pytest.LogCaptureFixture) -> None:
    used = fresh().train()
    used(torch.rand(4, 3, 32, 32))
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        assert not tl.create(fresh(), 2).pretrained
    assert "taken as not pretrained; pretrained=True" in caplog.text
    assert tl.create(used, 2).pretrained and tl.create(Base(), 2).pretrained # no BatchNorm that could tell
    assert not tl.create(used, 2, weights="none").pretrained and not tl.create(Base(), 2, pretrained=False).pretrained
    assert tl.create(fresh(), 2, pretrained=True).pretrained and not tl.create("resnet18", 2, weights="none").pretrained


def test_a_module_that_starts_from_nothing_learns_as_a_whole(colours: Path) -> None:
    for kwargs in ({}, {"weights": "none"}):
        clf = tl.fine_tune(colours, arch=fresh(), **FAST, **kwargs)
        assert not clf.network.pretrained and all(p.requires_grad for p in clf.network.parameters())
    used = fresh().train()
    used(torch.rand(4, 3, 32, 32))
    clf = tl.fine_tune(colours, arch=used, **FAST)
    assert clf.network.pretrained and not all(p.requires_grad for p in clf.network.parameters())


def test_a_network_is_normalised_once_and_learns_again() -> None:
    first = tl.create("efficientnet_lite0", 4)
    tl.freeze(first.body)
    second = tl.create(first, 3)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first.eval().features(images), second.eval().features(images))
    assert second.arch == "efficientnet_lite0" and second.pretrained and second.head.out_features == 3
    assert second.train().body.training and all(p.requires_grad for p in second.parameters())
    assert first.body is not second.body and not any(p.requires_grad for p in first.body.parameters())
    assert not tl.create(tl.create("small_cnn", 2), 2).pretrained


def test_what_is_wrapped_is_unwrapped() -> None:
    first = tl.create("small_cnn", 2)
    for wrapped in (nn.DataParallel(first), torch.compile(first)):
        second = tl.create(wrapped, 3)
        assert second.arch == "small_cnn" and isinstance(second.body, nn.Sequential)


def test_preprocessing_of_ones_own_module(colours: Path) -> None:
    mine = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    network = tl.fine_tune(colours, arch=Base(), preprocess=mine, **FAST).network
    assert network.preprocess.mean == mine.mean and torch.allclose(network.std.flatten(), torch.tensor(mine.std))


# ---- weights files

def wrapped(tmp_path: Path) -> tuple[nn.Module, dict[str, Path]]:
    "A ResNet's weights as people keep them."
    from torchvision.models import resnet18

    model = resnet18(num_classes=7) # trained elsewhere, on other classes
    state = dict(model.state_dict())
    forms: dict[str, Any] = {
        "plain.pth": state, "ddp.pth": {f"module.{k}": v for k, v in state.items()}, "epoch.pth": {"state_dict": state, "epoch": 3},
        "lightning.ckpt": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "optimizer_states": [{"state": {}}]},
        "compiled.pt": {"model": {f"_orig_mod.{k}": v for k, v in state.items()}, "args": None},
        "half.bin": {k: v.half() if v.is_floating_point() else v for k, v in state.items()}}
    for name, form in forms.items():
        torch.save(form, tmp_path / name)
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "headless.safetensors")
    save_file(state, tmp_path / "no-ending")
    return model, {name: tmp_path / name for name in (*forms, "headless.safetensors", "no-ending")}


def test_weights_in_every_wrapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, files = wrapped(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (*files.values(), "~/plain.pth"):
        network = tl.create("resnet18", 3, weights=file)
        assert torch.allclose(network.body.conv1.weight, model.conv1.weight, atol=1e-2) and network.pretrained


def test_weights_of_something_else_are_explained(tmp_path: Path) -> None:
    from torchvision.models import resnet18, resnet34

    torch.save(resnet34().state_dict(), tmp_path / "larger.pth") # holds all names of resnet18, and more
    torch.save(resnet18(), tmp_path / "pickled.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # files of this kind are around, whatever PyTorch says of them
        torch.jit.trace(small_cnn().eval(), torch.rand(1, 3, 16, 16)).save(tmp_path / "script.pt")
    save_file({k: v * torch.nan if v.is_floating_point() else v for k, v in resnet18().state_dict().items()}, tmp_path / "nan.safetensors")
    (tmp_path / "folder.pth").mkdir()
    for name, said in {"larger.pth": r"not the weights of resnet18 \(\d+ tensors differ.*holds 218 tensors, from conv1.weight \(64, 3, 7, 7\)",
                       "pickled.pth": r"a Python object, torchvision\.models\.resnet\.ResNet.*keep its state_dict",
                       "empty.pth": "no content", "pointer.safetensors": "git-lfs", "nothing.pth": "not a table of tensors",
                       "script.pt": "TorchScript", "nan.safetensors": "NaN or infinity", "folder.pth": "a folder"}.items():
        with pytest.raises(tl.ModelError, match=said) as caught:
            tl.create("resnet18", 2, weights=tmp_path / name)
        assert str(caught.value).isprintable() and name in str(caught.value), name


def test_the_embedded_network_takes_its_own_tensors(tmp_path: Path) -> None:
    trained = EfficientNetLite0(12)
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    assert torch.equal(tl.create("efficientnet_lite0", 2, weights=tmp_path / "mine.pth").body.stem[0].weight, trained.stem[0].weight)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(tl.ModelError, match=r"other\.pth: not the weights of efficientnet_lite0.*holds 1 tensors"):
        tl.create("efficientnet_lite0", 2, weights=tmp_path / "other.pth")
    from tl_tutorial.efficientnet import lite0_file

    network = tl.create("efficientnet_lite0", 2, weights=lite0_file())
    assert torch.equal(network.body.stem[0].weight, load_lite0().stem[0].weight)


# ---- going on from what was learned

def test_a_saved_classifier_is_a_start(tmp_path: Path) -> None:
    before = tl.create("small_cnn", 2, seed=7, preprocess=Preprocess((0.1,) * 3, (0.2,) * 3, 64, 8))
    file = saved(before, tmp_path / "mine.safetensors")
    for arch in (None, "small_cnn", small_cnn):
        after = tl.create(nn.Sequential(*small_cnn(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3)) if callable(arch) else arch,
                          3, weights=str(file))
        assert torch.equal(after.body[0][0].weight, before.body[0][0].weight)
        assert after.pretrained and after.preprocess.mean == (0.1,) * 3 and list(after.known) == ["cat", "dog"]
    with pytest.raises(tl.ModelError, match="a classifier made from small_cnn for 2 classes, not from resnet18; give arch='small_cnn'"):
        tl.create("resnet18", 3, weights=file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(tl.ModelError, match=r"bad\.safetensors: damaged, its SHA-256"):
        tl.create("small_cnn", 3, weights=tmp_path / "bad.safetensors")


def test_fine_tuning_goes_on_from_a_file_in_one_argument(colours: Path, tmp_path: Path) -> None:
    clf = tl.fine_tune(colours, arch="small_cnn", **FAST)
    file = clf.save(tmp_path / "first.safetensors")
    assert not clf.network.pretrained and not tl.load(file, device="cpu").network.pretrained
    after = tl.fine_tune(colours, weights=str(file), **{**FAST, "epochs": 0})
    assert after.settings.arch == "small_cnn" and after.network.pretrained and after.metrics["valid_accuracy"] == 1
    assert torch.equal(after.network.body[0][0].weight, clf.network.body[0][0].weight)
    assert tl.load(after.save(tmp_path / "second.safetensors"), device="cpu").network.pretrained
    mine = tl.fine_tune(colours, arch=fresh(), **FAST).save(tmp_path / "own.safetensors")
    with pytest.raises(tl.ModelError, match="module of its own; give that module with arch="):
        tl.fine_tune(colours, weights=str(mine), **FAST)
    assert tl.fine_tune(colours, arch=fresh(), weights=str(mine), **FAST).network.pretrained


def test_the_state_of_a_run_is_no_start(colours: Path, tmp_path: Path) -> None:
    tl.fine_tune(colours, arch="small_cnn", checkpoint=tmp_path / "run", **FAST)
    with pytest.raises(tl.ModelError, match=r"state\.safetensors: the state of a run.*resume=True"):
        tl.create("small_cnn", 2, weights=tmp_path / "run" / "state.safetensors")


def test_a_new_head_keeps_rows_by_name(tmp_path: Path) -> None:
    before = tl.create("small_cnn", 2, seed=7)
    after = tl.create("small_cnn", 2, weights=saved(before, tmp_path / "m.safetensors"))
    head = after.with_head(3, 5, names=["dog", "owl", "cat"]).head
    assert torch.equal(head.weight[[2, 0]], before.head.weight) and torch.equal(head.bias[[2, 0]], before.head.bias)
    plain = before.with_head(3, 5)
    assert plain.body is before.body and torch.equal(head.weight[1], plain.head.weight[1])
    assert torch.equal(plain.head.weight, before.with_head(3, 5).head.weight)
    assert not torch.equal(plain.head.weight, before.with_head(3, 6).head.weight)


# ---- the notebook's state

def test_what_the_notebook_has_set_changes_nothing(tmp_path: Path) -> None:
    usual = tl.create("small_cnn", 2)
    file, mine = saved(copy.deepcopy(usual), tmp_path / "m.safetensors"), Base()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    try:
        loaded = tl.load(file, device="cpu").network
        with torch.inference_mode():
            network, own = tl.create("small_cnn", 2), tl.create(mine, 2)
            headed = network.with_head(3, 1)
        assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    for one in (network, loaded, own, headed):
        assert {value.dtype for value in (*one.parameters(), one.mean, one.std)} == {torch.float32}
        one.train()(torch.rand(2, 3, 32, 32)).sum().backward()
        assert one.head.weight.grad is not None
    assert torch.equal(network.head.weight, usual.head.weight)


def test_errors_keep_their_cause(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Base(), buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue())
    with pytest.raises(tl.ModelError) as caught:
        tl.create("resnet18", 2, weights=tmp_path / "w.pth")
    assert caught.value.__cause__ is not None

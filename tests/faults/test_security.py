"""Hostile files, names and servers: no code runs, nothing outside is written, and names stay text."""

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from making import SMALL, cheap, fault, picture, tree
from PIL import Image

import tl_tutorial as tl
from tl_tutorial.checkpoints import read_file, write_file
from tl_tutorial.classifier import Classifier
from tl_tutorial.pixels import ImageProblem


class Reduce:
    def __reduce__(self) -> tuple:
        return os.system, ("touch it-ran",)


class Build:
    "Harmless to make; its state is set by a call of exec."
    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"x": Reduce()}


class SetItems:
    "Items that are put into something which is not a dictionary of tensors."
    def __reduce__(self) -> tuple:
        return eval, ("dict()",), None, None, iter([("A", Reduce())])


def zipped(**entries: bytes) -> bytes:
    "The zip container of torch.save, with these records."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def replaced(name: str, old: bytes, new: bytes) -> bytes:
    "A sound file of weights, one record of which is changed."
    with zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(4.0)}))) as file:
        entries = {n: file.read(n) for n in file.namelist()}
    key = next(n for n in entries if n.endswith(name))
    assert old in entries[key]
    return zipped(**{**entries, key: entries[key].replace(old, new, 1)})


def legacy_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Reduce())
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


HEAD = {"archive/version": b"3\n", "archive/byteorder": b"little"}
PICKLES: dict[str, Callable[[], bytes]] = {
    "F01 pickle: reduce": lambda: saved(Reduce()),
    "F01 pickle: reduce without a container": lambda: pickle.dumps(Reduce()),
    "F02 pickle: build": lambda: saved(Build()),
    "F03 pickle: nested zip": lambda: zipped(**HEAD, **{"archive/data.pkl": zipped(**HEAD, **{"archive/data.pkl": pickle.dumps(Reduce(), 2)})}),
    "F04 pickle: legacy tar": legacy_tar,
    "F05 pickle: TorchScript": lambda: zipped(**HEAD, **{
        "archive/constants.pkl": pickle.dumps(Reduce(), 2), "archive/data.pkl": pickle.dumps(Reduce(), 2),
        "archive/code/__torch__.py": b"import os\nos.system('touch it-ran')\n"}),
    "F06 pickle: a lie about a storage's size": lambda: replaced("data.pkl", b"K\x04t", b"J\x40\x42\x0f\x00t"),
    "F06 pickle: a lie about a tensor's shape": lambda: replaced("data.pkl", b"K\x00K\x04\x85", b"K\x00J\x40\x42\x0f\x00\x85"),
    "F07 pickle: setitems": lambda: saved(SetItems()),
    "F08 pickle: records outside (zip-slip)": lambda: zipped(**HEAD, **{
        "archive/data.pkl": pickle.dumps(Reduce(), 2), "../it-ran": b"x", "archive/../../it-ran": b"x", "/tmp/it-ran-absolute": b"x"}),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_run_nothing(name: str, tmp_path: Path) -> None:
    "Neither as a saved classifier nor as the weights of a network, whatever the file is called."
    (tmp_path / "in").mkdir()
    os.chdir(tmp_path / "in")
    for suffix in ("pth", "pt", "safetensors"):
        Path(f"evil.{suffix}").write_bytes(PICKLES[name]())
    tl.create("squeezenet1_1", 2, weights="none") # imports what is needed
    before = tree(tmp_path)
    with cheap(3, 100):
        for suffix in ("pth", "pt", "safetensors"):
            with pytest.raises(tl.ModelError, match=f"evil.{suffix}.*; "):
                tl.load(f"evil.{suffix}")
            for arch in ("squeezenet1_1", "efficientnet_lite0"):
                with pytest.raises(tl.ModelError, match=f"evil.{suffix}.*; "):
                    tl.create(arch, 2, weights=f"./evil.{suffix}")
    assert tree(tmp_path) == before and not Path("/tmp/it-ran-absolute").exists()


@pytest.mark.parametrize("name", ["F01 pickle: reduce", "F02 pickle: build", "F07 pickle: setitems"])
def test_the_hostile_files_would_run_elsewhere(name: str, tmp_path: Path) -> None:
    "The control: read without care, these files do run code."
    (tmp_path / "evil.pth").write_bytes(PICKLES[name]())
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert Path("it-ran").exists()


def test_sound_weights_of_the_same_kind_are_read(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    source = squeezenet1_1(weights=None)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    network = tl.create("squeezenet1_1", 2, weights=str(tmp_path / "w.pth"))
    assert torch.equal(network.body.features[0].weight, source.features[0].weight)
    torch.save({**source.state_dict(), "extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(tl.ModelError, match=r"w\.pth: not the weights of squeezenet1_1 \(1 tensors differ, e\.g\. extra\)"):
        tl.create("squeezenet1_1", 2, weights=str(tmp_path / "w.pth"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    clf = Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))
    return clf.save(tmp_path / "m.safetensors")


def headed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def table(**entries: tuple[list[int], int, int]) -> bytes:
    "The header of a safetensors file of 32-bit numbers: shape, first and last byte."
    return json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
                       for name, (shape, start, stop) in entries.items()}).encode()


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "F09 header of more than 100 MB": lambda data: struct.pack("<Q", 10**8 + 1) + data[8:],
    "F09 header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "F09 header longer than the file": lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
    "F09 header that really has 100 MB": lambda data: headed(b" " * (10**8 + 1)),
    "F10 overlapping tensors": lambda data: headed(table(a=([2], 0, 8), b=([1], 4, 8)), b"\0" * 8),
    "F10 tensors beyond the end": lambda data: headed(table(a=([2**40], 0, 2**42)), b"\0" * 8),
    "F10 a gap between tensors": lambda data: headed(table(a=([1], 0, 4), b=([1], 8, 12)), b"\0" * 12),
    "F10 sizes that overflow": lambda data: headed(table(a=([2**32, 2**32], 0, 4)), b"\0" * 4),
    "F11 JSON ten thousand deep": lambda data: headed(b"[" * 10_000 + b"]" * 10_000),
    "F11 description ten thousand deep": lambda data: headed(json.dumps({"__metadata__": {"tl_tutorial": "[" * 10_000 + "]" * 10_000}}).encode()),
    "F11 description with a number of a million digits": lambda data: headed(json.dumps({"__metadata__": {"tl_tutorial": "[" + "9" * 10**6 + "]"}}).encode()),
    "F11 no JSON at all": lambda data: data[:8] + b"x" * 50 + data[58:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(name: str, file: Path) -> None:
    file.write_bytes(HEADERS[name](file.read_bytes()))
    with cheap(1, 200), pytest.raises(tl.ModelError, match=r"m\.safetensors.*; .*save"):
        tl.load(file)


@fault("F12 path in the network's name", "F12 path in the settings", "F12 paths as classes")
def test_paths_in_a_description_lead_nowhere(fault: str, file: Path, tmp_path: Path) -> None:
    tensors, metadata = read_file(file)
    outside = tmp_path.parent / "outside"
    if "name" in fault:
        metadata["arch"] = "../../etc/passwd"
    elif "settings" in fault:
        metadata["settings"] |= {"weights": "/etc/passwd", "device": "cpu"}
    else:
        metadata["classes"] = [str(outside), "../../outside"]
    write_file(file, tensors, metadata=metadata)
    if "name" in fault:
        with pytest.raises(tl.ModelError, match=r"arch = \.\./\.\./etc/passwd: a path, not the name of a network"):
            tl.load(file)
        return
    image = picture(tmp_path / "x" / "1.png")
    clf = tl.load(file)
    before = tree(tmp_path)
    assert clf.predict(image)[0].label in clf.classes # only a word
    assert clf.predict(image)._repr_html_() and clf._repr_html_() and clf.explain(image)
    assert tree(tmp_path) == before and not outside.exists()


EVIL = "<img src=x onerror=alert(1)>\"'&lt;"


@fault("F13 markup in class and file names")
def test_names_are_escaped(fault: str, tmp_path: Path) -> None:
    for name in (EVIL, "$\\bad$ x^2_\x1b[31m"):
        for number in range(4):
            picture(tmp_path / "p" / name / f"{name[:28]}{number}.png", len(name) * 10 + number)
    (tmp_path / "p" / EVIL / f"{EVIL}.png").write_bytes(b"no picture")
    clf = tl.fine_tune(tmp_path / "p", epochs=1, on_bad="skip", **SMALL)
    found = clf.predict(tmp_path / "p", on_bad="skip")
    shown = {"classifier": clf, "evaluation": clf.evaluate(tmp_path / "p", on_bad="skip"), "predictions": found, "report": tl.check(tmp_path / "p")}
    for name, thing in shown.items():
        page = thing._repr_html_()
        assert "<img src=x" not in page and "<script" not in page and "\x1b" not in page and "onerror=alert(1)>" not in page, name
        assert "&lt;img src=x onerror=alert(1)&gt;" in page, name
        assert "\x1b" not in repr(thing), name
    with pytest.raises(ImageProblem) as caught:
        clf.predict(tmp_path / "p" / EVIL / f"{EVIL}.png")
    assert str(caught.value).isprintable()


class Answer(io.BytesIO):
    "What a server sends that was taken over."
    headers: dict[str, str] = {}

    def info(self) -> object:
        return type("Headers", (), {"get_all": lambda *_: None})()


@fault("F14 fetched weights with a wrong hash")
def test_fetched_weights_are_checked(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", lambda request, *_, **__: asked.append(request.full_url) or Answer(saved(Reduce())))
    with pytest.raises(tl.ModelError, match="squeezenet1_1.*not the published ones.*weights=FILE"):
        tl.create("squeezenet1_1", 2)
    assert len(asked) == 1 and asked[0].startswith("https://") and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_fetched_file_is_checked_by_its_whole_sum_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from torchvision import models

    from tl_tutorial import backbones

    published = io.BytesIO()
    torch.save(models.squeezenet1_1().state_dict(), published)
    known = hashlib.sha256(published.getvalue()).hexdigest()
    name = models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(backbones._PUBLISHED, name, known)
    asked: list[str] = []
    monkeypatch.setattr("torch.hub.urlopen", lambda request, *_, **__: asked.append(request.full_url) or Answer(published.getvalue()))
    for _ in range(2):
        tl.create("squeezenet1_1", 2)
    file = tmp_path / "hub" / "checkpoints" / name
    assert len(asked) == 1 and file.read_bytes() == published.getvalue(), "fetched once, then kept"
    monkeypatch.setitem(backbones._PUBLISHED, name, known[:8] + "0" * 56)
    with pytest.raises(tl.ModelError, match=f"{name} is not the published file.*{known}.*delete it.*weights=FILE"):
        tl.create("squeezenet1_1", 2)
    monkeypatch.setitem(backbones._PUBLISHED, name, known[:8])
    capfd.readouterr()
    tl.create("squeezenet1_1", 2)
    assert f"checked by 8 of its 64 digits; its SHA-256 is {known}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_fetched_data_set_is_checked_before_it_is_unpacked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_tutorial import datasets

    asked = []

    def served(url: str, root: str, *_: object, **__: object) -> None:
        asked.append(url)
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, url.rsplit("/", 1)[-1]).write_bytes(b"forged")

    def unpacked(*_: object, **__: object) -> None:
        raise AssertionError("a forged archive was opened")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", served)
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", unpacked)
    forged = hashlib.sha256(b"forged").hexdigest()
    for _ in range(2): # and what lies there already is checked as well
        with pytest.raises(tl.DataError, match=f"gz is not the published file: its SHA-256 is {forged}, not .*delete it and try again"):
            getattr(datasets, name)(tmp_path, download=True)
    assert len(asked) == 1 and asked[0].startswith("http")
    with pytest.raises(tl.DataError, match="download=True where there is a network"):
        getattr(datasets, name)(tmp_path / "empty")


def test_a_data_set_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_tutorial import datasets

    def down(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", down)
    with pytest.raises(tl.DataError, match=r"CIFAR10 is not in .*no network.*root= a folder that holds it"):
        datasets.cifar10(tmp_path, download=True)


def test_the_published_sums_belong_to_files_that_torchvision_names() -> None:
    from torchvision import models

    from tl_tutorial import backbones

    named = {one.url.rsplit("/", 1)[-1] for arch in models.list_models(module=models) for one in models.get_model_weights(arch)}
    for name, whole in backbones._PUBLISHED.items():
        assert name in named, f"torchvision has no {name} any more"
        assert len(whole) == 64 and f"-{whole[:8]}." in name


@fault("F14 an address as weights", "F14 embedded weights that were changed")
def test_nothing_is_fetched_unless_asked(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no)
    if "address" in fault:
        with pytest.raises(tl.ModelError, match="no such weights file"):
            tl.create("squeezenet1_1", 2, weights="https://example.org/w.pth")
        return
    from tl_tutorial.efficientnet import lite0_file

    data = bytearray(lite0_file().read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(tl.ModelError, match=r"w\.pth.*SHA-256.*reinstall"):
        tl.create("efficientnet_lite0", 2, weights=str(tmp_path / "w.pth"))


def test_formulas_in_names_are_drawn_as_text() -> None:
    drawn = Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("$\\bad$", "a$b"), 32, tl.Settings(arch="small_cnn")).explain(np.zeros((32, 32, 3), np.uint8))
    assert Image.open(io.BytesIO(drawn._repr_png_())).size[0] > 100

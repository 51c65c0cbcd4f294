"""Saved files that are damaged, foreign or hostile, and saves that fail: nothing runs, the last good one loads."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch

import tl_tutorial as tl
from tl_tutorial.checkpoints import read_file, restore, store, write_file
from tl_tutorial.classifier import Classifier


@pytest.fixture
def file(tmp_path: Path) -> Path:
    clf = Classifier(tl.create("small_cnn", 2, "none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))
    return clf.save(tmp_path / "m.safetensors")


def changed(file: Path, **entries: object) -> Path:
    tensors, metadata = read_file(file)
    write_file(file, tensors, {**metadata, **entries})
    return file


class Ran:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch it-ran",))


DAMAGE = {
    "empty": lambda data: b"",
    "cut by one byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte more": lambda data: data + b"x",
    "a pickle": lambda data: pickle.dumps(Ran()),
    "header of 100 MB": lambda data: struct.pack("<Q", 10**8 + 1) + data[8:],
    "header longer than the file": lambda data: struct.pack("<Q", len(data) * 2) + data[8:],
    "header no json": lambda data: data[:8] + b"x" * 50 + data[58:],
    "a zip": lambda data: b"PK\x03\x04" + data,
    "deep json": lambda data: struct.pack("<Q", 20_000) + b"[" * 10_000 + b"]" * 10_000,
    "overlapping tensors": lambda data: (lambda h: struct.pack("<Q", len(h)) + h + b"\0" * 8)(
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_by_name(name: str, file: Path) -> None:
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    with pytest.raises(tl.ModelError, match="m.safetensors"):
        tl.load(file)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("entries", [
    {"format": 99}, {"format": None}, {"classes": ["cat"]}, {"classes": ["cat", "cat"]}, {"classes": "cd"}, {"classes": [1, 2]}, {"size": -3},
    {"size": "x"}, {"arch": "resnet18"}, {"arch": "no_such_net"}, {"arch": "../../etc/passwd"}, {"preprocess": {}}, {"temperature": float("nan")},
    {"preprocess": {"mean": [0, 0, 0], "std": [0, 0, 0]}}, {"settings": {"seed": "x"}}, {"settings": {"unknown": 1}}, {"history": 3},
], ids=str)
def test_descriptions_that_cannot_be_true(entries: dict, file: Path) -> None:
    if entries == {"classes": "cd"}: # a word reads as a list of letters; what matters is that nothing else happens
        assert tl.load(changed(file, **entries)).classes == ("c", "d")
        return
    with pytest.raises(tl.ModelError):
        tl.load(changed(file, **entries))


def test_weights_that_do_not_fit(file: Path) -> None:
    tensors, metadata = read_file(file)
    name = "head.weight"
    for wrong in ({**tensors, "extra": torch.zeros(1)}, {k: v for k, v in tensors.items() if k != name},
                  {**tensors, name: torch.zeros(3, 3)}, {**tensors, name: tensors[name].double()}, {**tensors, name: tensors[name] * float("nan")}):
        write_file(file, wrong, metadata)
        with pytest.raises(tl.ModelError, match="m.safetensors"):
            tl.load(file)


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(tl.ModelError, match="not written by tl_tutorial"):
        tl.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_save_that_fails_is_an_error_and_the_old_file_stays(step: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, clf = file.read_bytes(), tl.load(file)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr("os.fdopen", full)
    else:
        monkeypatch.setattr(f"os.{step}", full)
    with pytest.raises(tl.TrainingError, match="No space left"):
        clf.save(file)
    assert file.read_bytes() == good and [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("crash", ["before the first rename", "between the renames", "state cut off", "new state cut off"])
def test_the_newest_whole_state_wins(crash: str, tmp_path: Path) -> None:
    for step in (1, 2):
        store(tmp_path / "run", {"w": torch.tensor([float(step)])}, {"step": step})
    state, new = tmp_path / "run/state.safetensors", tmp_path / "run/state.new.safetensors"
    if crash == "before the first rename":
        write_file(new, {"w": torch.tensor([3.0])}, {"step": 3})
    elif crash == "between the renames":
        write_file(new, {"w": torch.tensor([3.0])}, {"step": 3})
        os.replace(state, tmp_path / "run/state.previous.safetensors")
    elif crash == "state cut off":
        state.write_bytes(state.read_bytes()[:-3])
    else:
        new.write_bytes(b"half a file")
    found = restore(tmp_path / "run")
    assert found is not None
    assert found[1]["step"] == {"before the first rename": 3, "between the renames": 3, "state cut off": 1, "new state cut off": 2}[crash]


def test_no_state_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(tl.ModelError):
        restore(tmp_path)
    assert restore(tmp_path / "nothing") is None

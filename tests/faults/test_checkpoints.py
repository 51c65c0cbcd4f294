"""Saves that fail or are killed, and saved files that are damaged or do not fit: the last good one always loads."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from making import SMALL, coloured, fault, fingerprint, tree, unprivileged

import tl_tutorial as tl
from tl_tutorial import files
from tl_tutorial.checkpoints import read_file, restore, store, write_file
from tl_tutorial.classifier import Classifier


@pytest.fixture
def file(tmp_path: Path) -> Path:
    clf = Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))
    return clf.save(tmp_path / "m.safetensors")


def changed(file: Path, **entries: object) -> Path:
    tensors, metadata = read_file(file)
    write_file(file, tensors, metadata={**metadata, **entries})
    return file


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(name: str, count: int) -> None:
    "In this process, die just before the count-th call of a function of os."
    real, calls = getattr(os, name), iter(range(100))
    setattr(os, name, lambda *a, **k: die() if next(calls) + 1 == count else real(*a, **k))


def half_written() -> None:
    "Die when half of the bytes are in the file."
    class Half:
        def __init__(self, handle: int, *_: object) -> None:
            self.handle = handle

        def __enter__(self) -> "Half":
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, data: bytes) -> None:
            os.write(self.handle, data[: len(data) // 2])
            die()
    os.fdopen = Half


POINTS: dict[str, tuple[Callable[[], None], int]] = { # how it dies, and the newest state that is whole
    "E01 before the new file is made": (lambda: setattr(files, "_draft", die), 2),
    "E02 before the first byte": (lambda: before("fdopen", 1), 2),
    "E03 half written": (half_written, 2),
    "E04 before it is forced to disk": (lambda: before("fsync", 1), 2),
    "E05 before it has its name": (lambda: before("replace", 1), 2),
    "E06 before the old state steps aside": (lambda: before("replace", 2), 3),
    "E07 between the two renames": (lambda: before("replace", 3), 3),
    "E08 before the folder is forced to disk": (lambda: before("fsync", 2), 3),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_a_save(point: str, tmp_path: Path) -> None:
    "kill -9 of a process that really saves; afterwards the newest whole state loads, and the next save works."
    arm, expected = POINTS[point]
    for step in (1, 2):
        store(tmp_path / "run", {"w": torch.full((50_000,), float(step))}, metadata={"step": step})
    child = os.fork()
    if child == 0:
        arm()
        store(tmp_path / "run", {"w": torch.full((50_000,), 3.0)}, metadata={"step": 3})
        os._exit(7) # not reached
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the child hangs")
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    tensors, metadata = restore(tmp_path / "run")
    assert metadata["step"] == expected and tensors["w"].unique().tolist() == [expected]
    store(tmp_path / "run", {"w": torch.full((10,), 4.0)}, metadata={"step": 4})
    assert restore(tmp_path / "run")[1]["step"] == 4


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    "A file system of 64 kB, or None where this process may not mount one."
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def refused_and_kept(clf: Classifier, file: Path, word: str) -> None:
    "The save fails with a sentence, the older file is as it was, and no scrap is left."
    kept, names = file.read_bytes(), sorted(os.listdir(file.parent))
    with pytest.raises(tl.TrainingError, match=word) as caught:
        clf.save(file)
    assert file.name in str(caught.value) and "choose another place" in str(caught.value)
    assert file.read_bytes() == kept and sorted(os.listdir(file.parent)) == names


@fault("E09 disk full")
def test_disk_full(fault: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A file system that is really full where one may be mounted; and a device that is always full."
    clf = tl.load(file)
    with small_disk(tmp_path / "disk") as disk:
        if disk:
            (disk / "m.safetensors").write_bytes(b"an older file")
            refused_and_kept(clf, disk / "m.safetensors", "No space left")
    real = files._draft
    monkeypatch.setattr(files, "_draft", lambda *a, **k: (os.open("/dev/full", os.O_WRONLY), real(*a, **k)[1]))
    refused_and_kept(clf, file, "No space left")
    assert fingerprint(tl.load(file)) == fingerprint(clf)


@fault("E09 disk full in training")
def test_disk_full_in_training(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The run says so at its first save, and what was learned so far comes with the error."
    root, real = coloured(tmp_path / "colours"), files._draft
    monkeypatch.setattr(files, "_draft", lambda *a, **k: (os.open("/dev/full", os.O_WRONLY), real(*a, **k)[1]))
    with pytest.raises(tl.TrainingError, match=r"state.*No space left") as caught:
        tl.fine_tune(root, epochs=2, checkpoint=tmp_path / "run", **SMALL)
    monkeypatch.undo()
    assert caught.value.classifier.predict(root / "red")[0].label in ("red", "green", "blue")


@fault("E10 read-only folder")
def test_read_only_folder(fault: str, file: Path, tmp_path: Path) -> None:
    clf, place = tl.load(file), tmp_path / "locked"
    place.mkdir()
    shutil.copy(file, place)
    place.chmod(0o555)
    with unprivileged():
        refused_and_kept(clf, place / "m.safetensors", "Permission denied")
        with pytest.raises(tl.TrainingError, match="locked"):
            store(place / "run", {}, metadata={})
    place.chmod(0o755)


@fault("E11 quota")
def test_quota(fault: str, file: Path) -> None:
    "The kernel itself ends the write after 4 kB."
    clf, old = tl.load(file), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        refused_and_kept(clf, file, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def flipped(place: float) -> Callable[[bytes], bytes]:
    def work(data: bytes) -> bytes:
        found = bytearray(data)
        found[int(place * (len(data) - 1))] ^= 0x10
        return bytes(found)
    return work


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "E12 cut by one byte": lambda data: data[:-1],
    "E12 cut in half": lambda data: data[: len(data) // 2],
    "E12 one byte more": lambda data: data + b"x",
    "E13 a bit flipped in the length": flipped(0.0),
    "E13 a bit flipped in the header": lambda data: data.replace(b"small_cnn", b"small_cno", 1),
    "E13 a bit flipped in the weights": flipped(0.5),
    "E13 a bit flipped in the last byte": flipped(1.0),
    "E14 empty": lambda data: b"",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_by_name(name: str, file: Path, tmp_path: Path) -> None:
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    seen = tree(tmp_path)
    with pytest.raises(tl.ModelError, match=r"m\.safetensors.*; .*save"):
        tl.load(file)
    assert tree(tmp_path) == seen
    for step in (1, 2):
        store(tmp_path / "run", {"w": torch.full((5000,), float(step))}, metadata={"step": step})
    state = tmp_path / "run" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(DAMAGE[name](whole))
    if state.read_bytes() != whole: # this one has no network's name in it
        assert restore(tmp_path / "run")[1]["step"] == 1


@fault("E15 another network's name")
def test_another_network(fault: str, file: Path) -> None:
    with pytest.raises(tl.ModelError, match=r"m\.safetensors: its weights do not fit squeezenet1_1"):
        tl.load(changed(file, arch="squeezenet1_1"))


@fault("E16 another list of classes")
def test_another_list_of_classes(fault: str, file: Path) -> None:
    with pytest.raises(tl.ModelError, match=r"m\.safetensors: its weights do not fit small_cnn \(2 tensors differ, e\.g\. head"):
        tl.load(changed(file, classes=["cat", "dog", "fox"]))


@fault("E15 state of another network", "E16 state with another list of classes", "E17 state of another version")
def test_a_state_that_belongs_elsewhere(fault: str, tmp_path: Path) -> None:
    root, run = coloured(tmp_path / "colours", 4), tmp_path / "run"
    tl.fine_tune(root, epochs=1, checkpoint=run, **SMALL)
    seen = tree(run)
    other = {**SMALL, "arch": "squeezenet1_1"} if "network" in fault else SMALL
    if "classes" in fault:
        (root / "red").rename(root / "rouge")
        (root / "blue").rename(root / "zinnober")
    if "version" in fault:
        tensors, metadata = restore(run)
        store(run, tensors, metadata={**metadata, "key": "something else"})
        seen = tree(run)
    with pytest.raises(tl.ModelError, match="run.*other pictures or settings; use the same ones, or another checkpoint folder"):
        tl.fine_tune(root, epochs=1, checkpoint=run, resume=True, **other)
    assert tree(run) == seen


DESCRIPTIONS = {
    "E17 a newer format": {"format": 99}, "E17 no format": {"format": None}, "E16 one class too few": {"classes": ["cat"]},
    "E16 a class twice": {"classes": ["cat", "cat"]}, "E16 numbers as classes": {"classes": [1, 2]}, "E17 negative size": {"size": -3},
    "E17 a word as size": {"size": "x"}, "E15 unknown network": {"arch": "no_such_net"}, "E17 no preprocessing": {"preprocess": {}},
    "E17 temperature NaN": {"temperature": float("nan")}, "E17 preprocessing with zero": {"preprocess": {"mean": [0, 0, 0], "std": [0, 0, 0]}},
    "E17 a setting's value": {"settings": {"seed": "x"}}, "E17 a setting's name": {"settings": {"unknown": 1}}, "E17 no history": {"history": 3},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_cannot_be_true(name: str, file: Path) -> None:
    with pytest.raises(tl.ModelError):
        tl.load(changed(file, **DESCRIPTIONS[name]))


def test_a_word_as_classes_reads_as_its_letters(file: Path) -> None:
    assert tl.load(changed(file, classes="cd")).classes == ("c", "d")


WEIGHTS: dict[str, Callable[[dict], dict]] = {
    "E18 a tensor more": lambda found: {**found, "extra": torch.zeros(1)},
    "E19 a tensor less": lambda found: {name: value for name, value in found.items() if name != "head.weight"},
    "E19 another shape": lambda found: {**found, "head.weight": torch.zeros(3, 3)},
    "E19 another type": lambda found: {**found, "head.weight": found["head.weight"].double()},
    "E20 NaN weights": lambda found: {**found, "head.weight": found["head.weight"] * float("nan")},
    "E20 infinite weights": lambda found: {**found, "head.weight": found["head.weight"] + float("inf")},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name: str, file: Path) -> None:
    tensors, metadata = read_file(file)
    write_file(file, WEIGHTS[name](tensors), metadata=metadata)
    with pytest.raises(tl.ModelError, match=r"m\.safetensors.*(head\.weight|extra).*save it again" if "E20" not in name else "NaN or infinity; train again"):
        tl.load(file)


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(tl.ModelError, match="not written by tl_tutorial"):
        tl.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("crash", ["state cut off", "new state cut off"])
def test_the_newest_whole_state_wins(crash: str, tmp_path: Path) -> None:
    for step in (1, 2):
        store(tmp_path / "run", {"w": torch.tensor([float(step)])}, metadata={"step": step})
    state, new = tmp_path / "run/state.safetensors", tmp_path / "run/state.new.safetensors"
    if crash == "state cut off":
        state.write_bytes(state.read_bytes()[:-3])
    else:
        new.write_bytes(b"half a file")
    assert restore(tmp_path / "run")[1]["step"] == {"state cut off": 1, "new state cut off": 2}[crash]


def test_no_state_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(tl.ModelError):
        restore(tmp_path)
    assert restore(tmp_path / "nothing") is None

"""The same run, whatever interrupts it and wherever it happens: final weights that are equal to the bit."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import SMALL, coloured, command, fault, fingerprint
from torch import nn

import tl_tutorial as tl
from tl_tutorial import pixels
from tl_tutorial.batches import Augmentation, Batches
from tl_tutorial.pixels import load_pixels, read_image, to_square

KNOBS = {**SMALL, "epochs": 2, "size": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured(tmp_path_factory.mktemp("photos") / "colours")


@pytest.fixture(scope="module")
def whole(root: Path) -> str:
    "The weights of the run that nobody interrupts: two epochs of three steps."
    clf = tl.fine_tune(root, **KNOBS)
    assert clf.metrics["steps"] == 6 and fingerprint(tl.fine_tune(root, **KNOBS)) == fingerprint(clf)
    return fingerprint(clf)


def after(steps: int) -> Callable[[], bool]:
    "Ask to stop when so many steps are done; the first question comes before any step."
    calls = itertools.count()
    return lambda: next(calls) >= steps


POINTS = [f"J0{3 * epoch + place + 1} resumed after the {word} step of epoch {epoch + 1}" for epoch in range(2) for place, word in enumerate(("first", "middle", "last"))]


@pytest.mark.parametrize("point", POINTS)
def test_resumed_is_bit_equal(point: str, root: Path, whole: str) -> None:
    steps = int(point[1:3])
    first = tl.fine_tune(root, checkpoint="run", stop=after(steps), **KNOBS)
    assert first.interrupted and first.metrics["steps"] == steps
    second = tl.fine_tune(root, checkpoint="run", resume=True, **KNOBS)
    assert fingerprint(second) == whole and not second.interrupted and second.metrics["steps"] == 6


RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 255, (14, 8, 8, 3), dtype=np.uint8), np.arange(14) % 2


def tiny() -> torch.nn.Module:
    "BatchNorm and dropout, because both hold or draw something that a resumed run must find again."
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def ended(folder: Path, stops: list[int], batch: int, optimizer: str, seed: int) -> dict[str, torch.Tensor]:
    "Three epochs, interrupted after each of these numbers of steps (counted from the last start) and resumed in a new network."
    for stop in [*map(after, stops), lambda: False]:
        torch.manual_seed(seed)
        network = tl.create(tiny(), 2, seed=seed)
        train = Batches(IMAGES[:10], LABELS[:10], 8, batch, seed, Augmentation())
        tl.fit(network, train, valid=Batches(IMAGES[10:], LABELS[10:], 8, 4), settings=tl.Settings(optimizer=optimizer, seed=seed, patience=99), epochs=3, lr=1e-2,
               folder=folder, resume=True, stop=stop)
    return network.state_dict()


@given(st.lists(st.integers(0, 16), min_size=1, max_size=3), st.sampled_from([2, 3, 5, 10]), st.sampled_from(["adamw", "sgd"]), st.integers(0, 2**62))
@settings(max_examples=int(os.environ.get("TL_FUZZ", 25)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@fault("J05 resumed after any steps")
def test_any_interruption_is_bit_equal(fault: str, stops: list[int], batch: int, optimizer: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        expected = ended(Path(one), [], batch, optimizer, seed)
        found = ended(Path(two), stops, batch, optimizer, seed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("count", [1, 2, 4], ids=["J07 one worker", "J08 two workers", "J09 four workers"])
def test_workers_change_nothing(count: int, root: Path, whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Against no worker at all: each picture read here, one after the other."
    files = sorted(root.rglob("*.png"))
    alone = np.stack([np.asarray(to_square(read_image(file, at_least=19), 19)) for file in files])
    real = pixels.ThreadPoolExecutor
    monkeypatch.setattr(pixels, "ThreadPoolExecutor", lambda *_, **__: real(count))
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert (load_pixels(files, 19).images == alone).all() and fingerprint(tl.fine_tune(root, **KNOBS)) == whole


@fault("J10 spawn and fork")
def test_spawn_and_fork(fault: str, root: Path, whole: str) -> None:
    "A fresh process that forks one child and spawns another; each trains and says its weights."
    places = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, str(root)], capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": places})
    assert done.returncode == 0, done.stderr[-2000:]
    assert dict(line.split() for line in done.stdout.splitlines()) == {"fork": whole, "spawn": whole}


@fault("J11 another path")
def test_another_path(fault: str, root: Path, whole: str, tmp_path: Path) -> None:
    "The folder and the half-done run move to a place with another name."
    tl.fine_tune(root, checkpoint=tmp_path / "run", stop=after(4), **KNOBS)
    shutil.copytree(root, tmp_path / "z" / "\u00e9 other")
    (tmp_path / "run").rename(tmp_path / "z" / "run")
    assert fingerprint(tl.fine_tune(tmp_path / "z" / "\u00e9 other", **KNOBS)) == whole
    assert fingerprint(tl.fine_tune(tmp_path / "z" / "\u00e9 other", checkpoint=tmp_path / "z" / "run", resume=True, **KNOBS)) == whole


@fault("J12 another PYTHONHASHSEED")
def test_another_hash_seed(fault: str, root: Path, whole: str) -> None:
    Path("settings.ini").write_text("[model]\nweights = none\n")
    done = command("train", root, "--out", "m.safetensors", "--arch", "small_cnn", "--size", 16, "--epochs", 2, env={**os.environ, "PYTHONHASHSEED": "12345"})
    assert done.returncode == 0 and fingerprint(tl.load("m.safetensors")) == whole, done.stderr


def say(name: str, place: str) -> None:
    "Train, and print the weights' fingerprint."
    print(name, fingerprint(tl.fine_tune(place, **KNOBS)), flush=True)


if __name__ == "__main__":
    import multiprocessing

    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=say, args=(method, sys.argv[1]))
        child.start()
        child.join()

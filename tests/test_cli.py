"""The command line as a user runs it: exit codes, streams, interruption, resume, several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forked_kernels import python, tl

from tl_tutorial import demo as rooms
from tl_tutorial.checkpoints import read_file
from tl_tutorial.cli import main

SMALL = ("--arch", "small_cnn", "--size", "32")


@pytest.fixture
def model(colours: Path, tmp_path: Path) -> Path:
    (tmp_path / "settings.ini").write_text("[model]\nweights = none\n")
    done = tl("train", colours, "--out", "m.safetensors", "--epochs", 6, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "saved m.safetensors" in done.stdout and "epoch 1:" in done.stderr and "epoch" not in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "m.history.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 6
    return tmp_path / "m.safetensors"


def test_the_whole_way(model: Path, colours: Path, tmp_path: Path) -> None:
    judged = json.loads(tl("evaluate", model, colours, "--json").stdout)
    assert judged["accuracy"] > 0.9 and set(judged["per_class"]) == {"red", "green", "blue"}
    found = tl("predict", model, colours / "red", "--json")
    assert {row["label"] for row in json.loads(found.stdout)} == {"red"} and found.stderr == ""
    tl("predict", model, colours, "--csv", "p.csv")
    assert len(list(csv.DictReader((tmp_path / "p.csv").open()))) == 36
    assert "accuracy" in tl("evaluate", model, colours).stdout
    exported = tl("export", model, "--onnx", "m.onnx")
    assert exported.returncode == 0 and (tmp_path / "m.onnx").stat().st_size > 1000, exported.stderr


def test_bad_pictures_do_not_stop_the_good_ones(model: Path, colours: Path) -> None:
    (colours / "red" / "bad.png").write_bytes(b"")
    found = tl("predict", model, colours / "red", "--json")
    rows = json.loads(found.stdout)
    assert found.returncode == 1 and sum(row["label"] is not None for row in rows) == 12 and rows[-1]["problem"]["kind"] == "empty"
    assert "bad.png" in found.stderr and "Traceback" not in found.stderr


def test_check(colours: Path) -> None:
    sound = tl("check", colours, "--json")
    assert sound.returncode == 0 and json.loads(sound.stdout)["counts"] == {"blue": 12, "green": 12, "red": 12}
    (colours / "empty").mkdir()
    unsound = tl("check", colours)
    assert unsound.returncode == 1 and "empty" in unsound.stderr


def sentences(tmp_path: Path) -> dict[str, tuple[tuple, int, str]]:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    return {
        "missing folder": (("check", "no-folder"), 1, "no-folder"),
        "empty folder": (("train", "nothing", "--out", "x.safetensors"), 1, "nothing"),
        "a file as folder": (("check", "text.safetensors"), 1, "not a folder"),
        "one class": (("train", "one", "--out", "x.safetensors"), 1, "one class"),
        "not a classifier": (("predict", "text.safetensors", "one"), 1, "text.safetensors"),
        "no such model": (("evaluate", "gone.safetensors", "one"), 1, "gone.safetensors"),
        "unknown network": (("train", "one", "--out", "x.safetensors", "--arch", "resnet19"), 1, "resnet19"),
        "no GPU": (("train", "one", "--out", "x.safetensors", "--device", "cuda:9"), 1, "cuda:9"),
        "no such place": (("train", "one", "--out", "no/where/x.safetensors"), 2, "no/where"),
        "wrong device": (("train", "one", "--out", "x.safetensors", "--device", "toaster"), 2, "toaster"),
        "resume without checkpoint": (("train", "one", "--out", "x.safetensors", "--resume"), 2, "--checkpoint"),
        "wrong usage": (("train", "one"), 2, "--out"),
        "negative size": (("train", "one", "--out", "x.safetensors", "--size", "-3"), 2, "size"),
    }


def test_every_refusal_is_a_sentence(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (colours / "red").rename(tmp_path / "one" / "red")
    for name, (arguments, code, word) in sentences(tmp_path).items():
        done = tl(*arguments)
        assert done.returncode == code, (name, done.returncode, done.stderr)
        assert word in done.stderr and "Traceback" not in done.stderr and done.stdout == "", (name, done.stderr)
    assert not (tmp_path / "x.safetensors").exists()


def test_no_network_is_one_sentence(colours: Path) -> None:
    offline = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "TORCH_HOME": str(colours.parent / "torch")}
    done = tl("train", colours, "--out", "x.safetensors", "--arch", "resnet18", env=offline)
    assert done.returncode == 1 and "resnet18" in done.stderr and "weights=FILE" in done.stderr and "Traceback" not in done.stderr


# The command line, by a process that tells its number first: SIGKILL must go to it, nobody could pass that on.
TOLD = "import os, sys; print(os.getpid(), file=sys.stderr, flush=True); from tl_tutorial.cli import main; sys.exit(main())"


def interrupted(colours: Path, number: signal.Signals, name: str) -> int:
    "Start a long run, wait for its second epoch, send a signal; the exit code."
    command = [python(), "-c", TOLD, "train", colours, "--out", f"{name}.safetensors", "--epochs", "10", "--checkpoint", name, *SMALL]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr
    told = int(process.stderr.readline())
    for line in process.stderr:
        if line.startswith("epoch 2"):
            os.kill(told, number) if number == signal.SIGKILL else process.send_signal(number)
            break
    process.stderr.read()
    return process.wait(120)


@pytest.fixture(scope="module")
def whole() -> list[dict]:
    "The weights of a run that nobody interrupts; empty until a test has made it."
    return []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_and_resumed_is_bit_equal(colours: Path, tmp_path: Path, whole: list[dict], number: signal.Signals, code: int) -> None:
    (tmp_path / "settings.ini").write_text("[model]\nweights = none\n[train]\npatience = 99\n")
    assert interrupted(colours, number, "run") == code
    if code > 0:
        assert (tmp_path / "run.safetensors").exists()
    assert tl("train", colours, "--out", "resumed.safetensors", "--epochs", 10, "--checkpoint", "run", "--resume", *SMALL).returncode == 0
    if not whole: # the pictures of `colours` are the same each time
        assert tl("train", colours, "--out", "whole.safetensors", "--epochs", 10, *SMALL).returncode == 0
        whole.append(read_file(tmp_path / "whole.safetensors")[0])
    resumed = read_file(tmp_path / "resumed.safetensors")[0]
    assert all(resumed[name].equal(whole[0][name]) for name in whole[0])


def test_two_processes_equal_one(colours: Path, tmp_path: Path) -> None:
    "DistributedDataParallel over gloo with the same global batch gives the same network, up to the order of sums."
    # BatchNorm's statistics are pinned when pretrained weights are tuned, so processes see the same normalisation
    (tmp_path / "settings.ini").write_text("[train]\nbatch_size = 8\nclip = 0\n[data]\naugment = none\n")
    common = ["train", str(colours), "--arch", "efficientnet_lite0", "--epochs", "1", "--size", "32", "--device", "cpu"]
    one = tl(*common, "--out", "one.safetensors")
    assert one.returncode == 0, one.stderr
    two = subprocess.run([python(), "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "tl_tutorial", *common, "--out", "two.safetensors"],
                         capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()})
    assert two.returncode == 0, two.stderr[-2000:]
    (a, first), (b, second) = (read_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all((a[name].float() - b[name].float()).abs().max() < 1e-3 for name in a)
    # The kept weights may be those of the start; the history tells of the epoch in any case.
    (start, tuned), (_, other) = first["history"][:2], second["history"][:2]
    assert tuned["stage"] == "fine-tune" and tuned["valid_loss"] != start["valid_loss"]
    assert all(abs(tuned[name] - other[name]) < 1e-3 for name in ("train_loss", "valid_loss"))


def test_help_is_quick_and_light() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tl_tutorial", "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "demo" in done.stdout and time.perf_counter() - began < 10


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "The whole demo, on three of its classes: a few of the pictures are enough to see every line of it."
    whole = rooms._halves(42)
    assert len(whole.items) == 483 and len(whole.classes) == 10
    few = [item for name in ("fruit", "tools", "vehicles") for item in [i for i in whole.items if i.label == name][:12]]
    monkeypatch.setattr(rooms, "_halves", lambda seed: replace(whole, classes=("fruit", "tools", "vehicles"), items=tuple(few)))
    assert main(["demo", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    for word in ("36 images", "probe", "epoch 1", "pretrained", "from scratch", "interval", "clipart.safetensors", "next:"):
        assert word in said, word
    assert (tmp_path / "clipart.safetensors").exists()

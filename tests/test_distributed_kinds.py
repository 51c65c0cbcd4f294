"""Two and three processes on one machine, and two machines played on one: they decide alike, fail in words, and never wait for ever."""

import json
import os
import socket
import subprocess
import textwrap
from pathlib import Path

import pytest
from forked_kernels import python

from tl_tutorial.datasets import draw_shapes, write_folder

# Each program is run by every process. `say` writes a line that the test reads; a process group's waits end after 30 s.
HEAD = """
import datetime, hashlib, json, os, sys
import torch, torch.distributed as dist
import tl_tutorial as tl
from tl_tutorial import steps, training
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
out = open(f"{os.environ['SAID']}.{rank}", "a")
def say(name, **facts): print(json.dumps({"name": name, "rank": rank, **facts}), file=out, flush=True)
def weights(clf): return hashlib.sha256(b"".join(v.numpy().tobytes() for v in clf.network.state_dict().values())).hexdigest()
KNOBS = dict(arch="small_cnn", weights="none", size=32, epochs=2, batch_size=16, device="cpu", progress=False)
def train(name, **knobs):
    rows, loss = [], []
    hear = [*knobs.pop("listeners", []), lambda e: rows.append(e.row["valid_calibrated"]) if e.kind == "epoch" else loss.append(e.row.get("loss"))]
    try:
        clf = tl.fine_tune("photos", listeners=hear, **{**KNOBS, **knobs})
        say(name, weights=weights(clf), rows=rows, steps=clf.metrics["steps"], best=clf.metrics["best_epoch"], loss=loss[:3])
        return clf
    except Exception as error:
        say(name, error=type(error).__name__, text=str(error), cause=type(error.__cause__).__name__, kept=getattr(error, "classifier", None) is not None)
"""


def port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def launch(place: Path, *how: object, cwd: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAID": str(place / "said"), "PYTHON_EXEC": python(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [python(), "-m", "torch.distributed.run", *map(str, how), str(place / "program.py")]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(place: Path) -> dict[str, list[dict]]:
    "Name of a case → what each process said of it, by rank."
    found: dict[str, list[dict]] = {}
    for file in sorted(place.glob("said.*")):
        for line in file.read_text().splitlines():
            found.setdefault(json.loads(line)["name"], []).append(json.loads(line))
    return found


def run(place: Path, program: str, processes: int) -> dict[str, list[dict]]:
    "Run a program in several processes of one machine."
    images, labels = draw_shapes(per_class=8, size=32, seed=1, label_noise=0.8)
    write_folder(images, labels, classes=[str(i) for i in range(8)], folder=place / "photos")
    (place / "program.py").write_text(HEAD + textwrap.dedent(program))
    one = launch(place, "--standalone", f"--nproc-per-node={processes}", cwd=place)
    text, _ = one.communicate(timeout=240)
    assert one.returncode == 0, text[-3000:]
    return said(place)


CASES = """
train("scratch", seed=world - 1, patience=1, epochs=6)
train("deep scratch", arch="efficientnet_lite0", seed=5, epochs=1)

train("a batch too small", arch="efficientnet_lite0", epochs=1, batch_size=world)

real, count = steps.Run._part, [0]
def short(run, *arguments):
    count[0] += 1
    if rank == world - 1 and count[0] == 2: raise torch.OutOfMemoryError("simulated: memory is short once")
    return real(run, *arguments)
steps.Run._part = short
train("memory short once")
def empty(run, *arguments):
    if rank == world - 1 and run.step == 1: raise torch.OutOfMemoryError("simulated: memory is always short")
    return real(run, *arguments)
steps.Run._part = empty
train("memory short for good")
steps.Run._part = real

def bug(event):
    if event.kind == "step" and event.step == 2 and rank == 0: raise RuntimeError("a bug of mine")
train("a bug in one", listeners=[bug])
def bugs(event):
    if event.kind == "end": raise RuntimeError("a bug of mine")
train("a bug in all", listeners=[bugs])
def wrong(event):
    if event.kind == "end" and rank == world - 1: raise KeyError("late")
train("a bug at the very end", listeners=[wrong])

train("another epochs", epochs=2 + rank)
train("another seed", seed=7 + rank)
train("a folder that one cannot find", **({"valid": "gone"} if rank else {}))
predict = training.predict_logits
training.predict_logits = lambda *a, **k: predict(*a, **k) + rank * torch.randn(1)
train("judgements that differ", patience=1, epochs=4)
training.predict_logits = predict
stop = iter(range(100))
train("one asked to stop", stop=lambda: rank == world - 1 and next(stop) == 3)
train("kept", checkpoint="run", epochs=1)
train("kept again", checkpoint="run", epochs=1)
train("more epochs", checkpoint="run", resume=True, epochs=2)
train("pretrained", arch="efficientnet_lite0", weights="default", size=32, epochs=1, batch_size=32)
"""


@pytest.fixture(scope="module", params=[2, 3])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    found = run(tmp_path_factory.mktemp("processes"), CASES, request.param)
    assert all(len(each) == request.param for each in found.values())
    return found


@pytest.mark.parametrize("name", ["scratch", "deep scratch", "memory short once", "judgements that differ", "one asked to stop", "kept", "more epochs", "pretrained"])
def test_all_do_the_same(cases: dict[str, list[dict]], name: str) -> None:
    "Equal weights, equal judgements, an equal number of steps, in every process."
    first, *others = cases[name]
    assert "weights" in first, first
    for other in others:
        assert (other["weights"], other["rows"], other["steps"], other["best"]) == (first["weights"], first["rows"], first["steps"], first["best"])


def test_the_processes_learn_from_different_pictures(cases: dict[str, list[dict]]) -> None:
    assert len({each["loss"][0] for each in cases["scratch"]}) > 1


def test_short_memory_in_one_changes_nothing_but_rounding(cases: dict[str, list[dict]]) -> None:
    assert cases["memory short once"][0]["steps"] > 2


def test_memory_that_is_never_enough_ends_all(cases: dict[str, list[dict]]) -> None:
    *others, last = cases["memory short for good"]
    assert last["error"] == "DeviceError" and "out of memory even with one image" in last["text"] and last["cause"] == "OutOfMemoryError"
    for each in others:
        assert each["error"] == "LostContact" and f"process {last['rank']} of" in each["text"] and "out of memory" in each["text"]


def test_a_bug_of_ones_own_stays_one(cases: dict[str, list[dict]]) -> None:
    first, *others = cases["a bug in one"]
    assert first["error"] == "RuntimeError" and first["text"] == "a bug of mine"
    for each in others:
        assert each["error"] == "LostContact" and "process 0 of" in each["text"] and "RuntimeError: a bug of mine" in each["text"]
        assert "cannot reach" not in each["text"] and each["kept"]
    assert all(each["error"] == "RuntimeError" and each["text"] == "a bug of mine" for each in cases["a bug in all"])
    *others, last = cases["a bug at the very end"]
    assert last["error"] == "KeyError" and all(each["error"] == "LostContact" and "KeyError" in each["text"] for each in others)


@pytest.mark.parametrize(("name", "words"), [("another epochs", "epochs was 2, now 3"), ("another seed", "seed was 7, now 8")])
def test_processes_that_were_started_differently(cases: dict[str, list[dict]], name: str, words: str) -> None:
    "What differs is named by the process that differs; the others end with it."
    first, second, *_ = cases[name]
    assert second["error"] == "DataError" and words in second["text"] and "process 1 of" in second["text"]
    assert first["error"] == "LostContact" and "DataError" in first["text"]


def test_what_one_cannot_read_ends_all(cases: dict[str, list[dict]]) -> None:
    first, *others = cases["a folder that one cannot find"]
    assert all(each["error"] == "DataError" and "gone" in each["text"] for each in others)
    assert first["error"] == "LostContact" and "gone" in first["text"]


def test_a_state_is_not_overwritten(cases: dict[str, list[dict]]) -> None:
    first, *others = cases["kept again"]
    assert first["error"] == "SettingsError" and "go on from it with resume" in first["text"]
    assert all(each["error"] == "LostContact" and "SettingsError" in each["text"] for each in others)


def test_one_picture_for_each_is_too_little_for_batchnorm(cases: dict[str, list[dict]]) -> None:
    "Maps of one place: refused in all alike. The odd rest of an epoch ('deep scratch', three processes) is not refused."
    assert all(each["error"] == "SettingsError" and "raise batch_size, or size" in each["text"] for each in cases["a batch too small"])


def test_one_stop_stops_all(cases: dict[str, list[dict]]) -> None:
    assert {each["steps"] for each in cases["one asked to stop"]} == {3}


def test_two_machines_without_a_shared_disk(tmp_path: Path) -> None:
    "Two agents; each machine has the pictures, and only the first one has the state. It is resumed by both."
    program = """
    stopped = iter(range(100))
    train("stopped", epochs=3, patience=9, checkpoint="run", stop=lambda: next(stopped) == 5)
    say("disk", state=os.path.exists("run/state.safetensors"))
    train("resumed", epochs=3, patience=9, checkpoint="run", resume=True)
    train("whole", epochs=3, patience=9)
    """
    (tmp_path / "program.py").write_text(HEAD + textwrap.dedent(program))
    images, labels = draw_shapes(per_class=8, size=32, seed=1)
    where, agents = port(), []
    for node in (0, 1):
        (tmp_path / f"disk{node}").mkdir()
        write_folder(images, labels, classes=[str(i) for i in range(8)], folder=tmp_path / f"disk{node}" / "photos")
        agents.append(launch(tmp_path, "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1",
                             f"--master-port={where}", cwd=tmp_path / f"disk{node}"))
    for agent in agents:
        text, _ = agent.communicate(timeout=240)
        assert agent.returncode == 0, text[-3000:]
    found = said(tmp_path)
    assert [each["state"] for each in found["disk"]] == [True, False]
    assert len({each["weights"] for name in ("resumed", "whole") for each in found[name]}) == 1, found
    assert found["resumed"][0]["rows"] == found["whole"][0]["rows"][1:] # it heard of the epochs after the first


def test_a_process_that_dies_is_missed(tmp_path: Path) -> None:
    "Killed without a word: only then is it a lost connection; what was learned comes with the error."
    program = """
    def die(event):
        if event.kind == "step" and event.step == 3 and rank == 1: os.kill(os.getpid(), 9)
    train("one dies", listeners=[die])
    """
    images, labels = draw_shapes(per_class=8, size=32, seed=1)
    write_folder(images, labels, classes=[str(i) for i in range(8)], folder=tmp_path / "photos")
    (tmp_path / "program.py").write_text(HEAD + textwrap.dedent(program))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAID": str(tmp_path / "said"), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    both = [subprocess.Popen([python(), "program.py"], cwd=tmp_path, env={**env, "RANK": rank}, stderr=subprocess.DEVNULL) for rank in "01"]
    assert [one.wait(120) for one in both] == [0, -9]
    only, = said(tmp_path)["one dies"]
    assert only["error"] == "LostContact" and "process 0 of 2 cannot reach the others" in only["text"] and "--resume" in only["text"]
    assert only["cause"] != "NoneType" and only["kept"]


@pytest.mark.parametrize(("env", "words"), [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two asks for several processes"), ({"WORLD_SIZE": "2"}, "start with torchrun, or unset WORLD_SIZE"),
    ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "asks for several processes"),
])
def test_a_world_that_cannot_be(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import tl_tutorial as tl
    from tl_tutorial.processes import join

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tl.DeviceError, match=words) as caught:
        join(torch.device("cpu"))
    assert caught.value.__cause__ is not None

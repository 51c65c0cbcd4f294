"""Ctrl-C, SIGTERM and kill -9 at every point of a run: the work is kept, the exit code is right, nothing is half written."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_kernels import python
from making import SMALL, coloured, fault, fingerprint, tree, untouched

import tl_tutorial as tl
from tl_tutorial import checkpoints, cli, material, pixels, steps, training

WORDS = ("--arch", "small_cnn", "--size", "32")
# The command line, by a process that tells its number first: SIGKILL must go to it, nobody could pass that on.
TOLD = "import os, sys; print(os.getpid(), file=sys.stderr, flush=True); from tl_tutorial.cli import main; sys.exit(main())"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "settings.ini").write_text("[model]\nweights = none\n[train]\npatience = 99\n")
    return coloured(tmp_path / "colours")


def at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, call: int, number: int = signal.SIGINT) -> None:
    "Send this process a signal just before the call-th call of a function, as somebody's Ctrl-C at that moment would."
    real, calls = getattr(module, name), iter(range(1, 10_000))

    def watched(*arguments: object, **options: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, watched)


def train(root: Path, *more: object) -> int:
    "The command line, in this process: its exit code."
    return cli.main(["train", str(root), "--out", "m.safetensors", "--epochs", "3", "--checkpoint", "run", *WORDS, *map(str, more)])


def whole(root: Path) -> str:
    "The weights of the run that nobody interrupts."
    return fingerprint(tl.fine_tune(root, epochs=3, **SMALL))


@pytest.mark.parametrize(("module", "name", "call", "done"), [(steps.Run, "learn", 5, 5), (training, "predict_logits", 2, 4), (checkpoints, "write_whole", 1, 4)],
                         ids=["G01 Ctrl-C in an epoch", "G02 Ctrl-C in validation", "G03 Ctrl-C in the save of the state"])
def test_the_first_ctrl_c_keeps_everything(module: object, name: str, call: int, done: int, root: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture) -> None:
    expected = whole(root)
    at(monkeypatch, module, name, call)
    with untouched(root):
        assert train(root) == 130
    monkeypatch.undo()
    os.chdir(root.parent)
    said = capsys.readouterr()
    assert "saved m.safetensors" in said.out and "interrupted" in said.out and "--resume" in said.err
    kept = tl.load("m.safetensors")
    assert kept.interrupted and len(kept.predict(root)) == 24
    assert checkpoints.restore("run")[1]["step"] == done
    assert train(root, "--resume") == 0 and fingerprint(tl.load("m.safetensors")) == expected


@fault("G03 Ctrl-C in the last save")
def test_ctrl_c_while_the_result_is_written(fault: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The training is over; the file is finished, and the exit code still says that somebody asked to stop."
    expected = whole(root)
    at(monkeypatch, checkpoints, "write_whole", 4)
    assert train(root) == 130
    assert fingerprint(tl.load("m.safetensors")) == expected and not [p for p in Path().iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["G04 Ctrl-C while pictures are decoded", "G04 SIGTERM while pictures are decoded"])
def test_stopped_before_there_is_anything_to_keep(number: signal.Signals, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    "Nothing was trained yet: it ends at once, and says so."
    at(monkeypatch, material, "load_pixels", 2, number)
    with untouched(root):
        assert train(root) == 128 + number
    assert "stopped at once; no classifier was saved" in capsys.readouterr().err
    assert not Path("m.safetensors").exists() and not Path("run").exists()
    assert threading.active_count() < 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_demo_stopped_early_tells_by_which_signal(number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    at(monkeypatch, material, "load_pixels", 1, number)
    assert cli.main(["demo", "--out", "d.safetensors"]) == 128 + number
    assert "stopped" in capsys.readouterr().err and not Path("d.safetensors").exists()


@fault("G05 Ctrl-C while the cache is written")
def test_ctrl_c_in_the_cache(fault: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Pixels beyond the budget go to an unnamed file; after Ctrl-C nothing of it is left."
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    (root.parent / "settings.ini").write_text("[model]\nweights = none\n[data]\ncache_mb = 0\n")
    at(monkeypatch, pixels, "to_square", 20)
    assert train(root) == 130 and list(place.iterdir()) == [] and not Path("m.safetensors").exists()
    assert train(root) == 0 and list(place.iterdir()) == []


@fault("G06 Ctrl-C while the network is compiled")
@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_in_compile(fault: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "PyTorch really traces the network; the signal comes when it hands over the graph, and only code generation is left out."
    sent = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        if not sent:
            os.kill(os.getpid(), signal.SIGINT)
        sent.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=backend))
    (root.parent / "settings.ini").write_text("[model]\nweights = none\n[train]\ncompile = true\n")
    assert train(root) == 130 and sent
    assert checkpoints.restore("run")[1]["step"] == 1 and tl.load("m.safetensors").interrupted
    torch._dynamo.reset()


@fault("G07 Ctrl-C twice")
def test_the_second_ctrl_c_stops_at_once(fault: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    expected, real, calls = whole(root), steps.Run.learn, iter(range(1, 100))

    def twice(run: steps.Run, batch: object) -> float:
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, batch)

    monkeypatch.setattr(steps.Run, "learn", twice)
    assert train(root) == 130
    monkeypatch.undo()
    os.chdir(root.parent)
    assert "stopped at once" in capsys.readouterr().err and not Path("m.safetensors").exists()
    assert checkpoints.restore("run")[1]["step"] == 3 # the end of the epoch before
    assert train(root, "--resume") == 0 and fingerprint(tl.load("m.safetensors")) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["G08 SIGTERM", "G08 kill -9"])
def test_signals_from_outside(number: signal.Signals, code: int, root: Path) -> None:
    "A process of its own, stopped as a scheduler stops it."
    command = [python(), "-c", TOLD, "train", root, "--out", "m.safetensors", "--epochs", "200", "--checkpoint", "run", *WORDS]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    told = int(process.stderr.readline())
    for line in process.stderr:
        if line.startswith("epoch 2"):
            os.kill(told, number) if number == signal.SIGKILL else process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert ("saved m.safetensors" in out) == Path("m.safetensors").exists() == (code > 0)
    assert checkpoints.restore("run")[1]["epoch"] >= 1
    assert code < 0 or [json.loads(row) for row in Path("m.history.jsonl").read_text().splitlines()][-1]["epoch"] >= 1


@fault("G09 stop button in Jupyter")
def test_interrupted_in_a_notebook(fault: str, root: Path) -> None:
    "A real kernel, interrupted as JupyterLab does it: the cell gives a usable classifier, and the kernel lives on."
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(root.parent))
    said = []

    def listen(message: dict) -> None:
        text = message["content"].get("text", "")
        said.append(text)
        if "epoch 2:" in text and "epoch 2:" not in "".join(said[:-1]):
            kernel.interrupt_kernel()

    def run(code: str) -> dict:
        return client.execute_interactive(code, timeout=120, output_hook=listen)["content"]

    try:
        code = "import tl_tutorial as tl\nclf = tl.fine_tune('colours', arch='small_cnn', size=32, epochs=500)"
        assert run(code)["status"] == "ok", said
        run("print(clf.interrupted, len(clf.history) < 400, clf.predict('colours')[0].label in clf.classes)")
        assert "True True True" in "".join(said)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_handlers_are_put_back(root: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    tl.fine_tune(root, epochs=1, **SMALL)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before and tree(root)

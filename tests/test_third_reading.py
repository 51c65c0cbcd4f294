"""What a third reading found: threads that draw, a folder that is gone, files in the wrong place, a rate after a resume."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tl_tutorial as tl
from tl_tutorial import cli
from tl_tutorial.batches import Batches, drawing
from tl_tutorial.network import Network, Preprocess, trial
from tl_tutorial.steps import Run, rate_factor

QUICK = {"arch": "small_cnn", "weights": "none", "size": 32, "epochs": 2, "progress": False, "patience": 99}


def same(one: tl.Classifier, other: tl.Classifier) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True))


class Dropping(nn.Module):
    "A network of one's own, most of which is dropout."

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.drop, self.head = nn.Conv2d(3, 8, 3, 2), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.maps(images)).mean((2, 3)))


def dropping() -> Dropping:
    with drawing(0):
        return Dropping()


# Threads that draw from PyTorch's one generator


def test_a_thread_that_draws_waits_for_the_other() -> None:
    inside, drawn = threading.Event(), threading.Event()

    def other() -> torch.Tensor:
        inside.wait(10)
        with drawing(2):
            numbers = torch.rand(3)
            drawn.set()
            return numbers

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(other)
        with drawing(1):
            first = torch.rand(3)
            inside.set()
            assert not drawn.wait(0.2)
            with drawing(2): # in the same thread it may be entered once more
                nested = torch.rand(3)
            then = torch.rand(3)
        assert torch.equal(waiting.result(10), nested)
    with drawing(1):
        assert torch.equal(torch.cat([first, then]), torch.cat([torch.rand(3), torch.rand(3)]))


def test_trainings_at_once_end_as_they_would_alone(colours: Path) -> None:
    "Others create networks and change heads meanwhile; your own numbers go on as if nothing had happened."
    train = lambda: tl.fine_tune(colours, **QUICK | {"arch": dropping(), "weights": "default", "augment": "none"})
    alone, small = train(), tl.create("small_cnn", 2)
    heads = small.with_head(3, 5).head.weight
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with ThreadPoolExecutor(3) as threads:
        two = [threads.submit(train) for _ in range(2)]
        others = [threads.submit(lambda: tl.create("small_cnn", 2).with_head(3, 5)) for _ in range(20)]
        assert all(same(one.result(), alone) for one in two)
        assert all(torch.equal(one.result().head.weight, heads) for one in others)
        assert all(torch.equal(a, b) for one in others for a, b in zip(one.result().body.parameters(), small.body.parameters(), strict=True))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with drawing(1):
            inside.set()
            done.wait(30)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        assert inside.wait(10)
        child = os.fork()
        if child == 0:
            with drawing(2):
                os._exit(7)
        timer = threading.Timer(20, os.kill, (child, 9))
        timer.start()
        status = os.waitpid(child, 0)[1]
        timer.cancel()
        done.set()
    assert os.waitstatus_to_exitcode(status) == 7


def test_an_export_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    clf = tl.Classifier(tl.create("small_cnn", 2).eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0) # the picture that it is shown is made by now
    before = torch.get_rng_state()
    with pytest.raises(tl.ModelError, match="division by zero"):
        clf.export_onnx(tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), before)


# A working folder that is gone


@pytest.mark.parametrize("call", ["fine_tune('/x')", "probe"])
def test_pytorch_is_not_woken_in_a_folder_that_is_gone(call: str, tmp_path: Path) -> None:
    "It would end the process without a word that helps."
    code = (f"import os, tl_tutorial as tl; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')\n"
            f"try: tl.{call}\nexcept tl.DataError as error: print(error)\nos.chdir(os.sep); tl.create('small_cnn', 2); print('now it works')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, works = done.stdout.splitlines()
    assert "the working folder was deleted" in said and "os.chdir" in said and works == "now it works"


def test_what_needs_no_pytorch_needs_no_working_folder(tmp_path: Path, colours: Path) -> None:
    code = f"import os, tl_tutorial as tl; os.mkdir('x'); os.chdir('x'); os.rmdir('../x'); print(tl.check({str(colours)!r}).ok)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout == "True\n"


# A file in the place of a name


@pytest.mark.parametrize("name", ["mine.safetensors", "gone.pth", "m.onnx", "colours", "./colours", "photo", "~/w.pt"])
def test_a_file_as_arch_is_sent_to_weights(name: str, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tl.fine_tune(colours, **QUICK | {"epochs": 0}).save("mine.safetensors")
    Path("photo").write_bytes(b"something")
    for arch in (name, Path(name)):
        if arch != "colours": # a name may be that of a folder, too
            with pytest.raises(tl.TLError, match="weights"):
                tl.fine_tune(colours, arch=arch, progress=False)
            with pytest.raises(tl.ModelError, match=r"not the name of a network; give weights with weights=FILE"):
                tl.create(arch, 2)
    assert cli.main(["train", str(colours), "--out", "x.safetensors", "--arch", name]) == 1
    said = capsys.readouterr().err
    assert "--weights" in said or name == "colours"


def test_the_named_remedy_works(colours: Path) -> None:
    tl.fine_tune(colours, **QUICK | {"epochs": 0}).save("mine.safetensors")
    assert cli.main(["train", str(colours), "--out", "x.safetensors", "--weights", "mine.safetensors", "--epochs", "0"]) == 0
    assert tl.load("x.safetensors").settings.arch == "small_cnn"


def test_a_name_stays_a_name_where_a_folder_is_called_so() -> None:
    Path("small_cnn").mkdir()
    assert tl.create("small_cnn", 2).arch == "small_cnn"


# A classifier that is loaded where nothing can learn


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_classifier_loaded_in_inference_mode_can_go_on_learning(mode: type, colours: Path) -> None:
    tl.fine_tune(colours, **QUICK | {"epochs": 0}).save("mine.safetensors")
    with mode():
        clf, start = tl.load("mine.safetensors"), tl.create(None, 3, weights="mine.safetensors")
    for network in (clf.network, start, start.with_head(3)):
        assert not any(value.is_inference() for value in [*network.parameters(), *network.buffers()])
        network(torch.rand(2, 3, 32, 32)).sum().backward()
        assert all(value.requires_grad and value.grad is not None for value in network.parameters())


# A description that cannot be


def described(path: Path, **preprocess: object) -> Path:
    "The classifier of a file with other numbers in its preprocessing, under a right fingerprint."
    from safetensors import safe_open
    from safetensors.torch import save_file

    from tl_tutorial.weights import fingerprint

    with safe_open(path, framework="pt") as opened:
        about = json.loads(opened.metadata()["tl_tutorial"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    about["preprocess"] |= preprocess
    text = json.dumps(about)
    save_file(tensors, "odd.safetensors", {"tl_tutorial": text, "sha256": fingerprint(tensors, text)})
    return Path("odd.safetensors")


@pytest.mark.parametrize("odd", [{"std": [0, 0, 0]}, {"std": [0.5, 0.5, -1]}, {"std": [0.5, 0.5, float("nan")]}, {"std": []}, {"std": [0.5]},
                                 {"mean": [float("inf")] * 3}, {"mean": ["a", "b", "c"]}, {"bias": 3}], ids=str)
def test_preprocessing_that_cannot_be_names_the_file(odd: dict, colours: Path) -> None:
    tl.fine_tune(colours, **QUICK | {"epochs": 0}).save("mine.safetensors")
    file = described(Path("mine.safetensors"), **odd)
    for use in (lambda: tl.load(file), lambda: tl.create(None, 3, weights=file), lambda: tl.create(Dropping(), 3, weights=file)):
        with pytest.raises(tl.ModelError, match="odd.safetensors: its description cannot be used.*save it again"):
            use()


# A rate after a resume, and a rate that was found


@pytest.mark.parametrize("last", [0, 1], ids=["first epoch", "second epoch"])
def test_an_epoch_that_is_closed_after_a_resume_has_the_rate_of_its_last_step(last: int, colours: Path) -> None:
    whole = tl.fine_tune(colours, **QUICK)
    steps, epoch = [0], whole.metrics["steps"] // 2
    stop = lambda: steps.__setitem__(0, steps[0] + 1) or steps[0] > (last + 1) * epoch # asked once before the first step
    halted = tl.fine_tune(colours, checkpoint="run", stop=stop, **QUICK)
    assert halted.interrupted and halted.history[-1]["epoch"] == last
    resumed = tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK)
    timeless = lambda clf: [{name: value for name, value in row.items() if name != "seconds"} for row in clf.history]
    assert timeless(resumed) == timeless(whole) and same(resumed, whole)
    assert whole.history[1]["lr"] > whole.history[2]["lr"] > 0


@pytest.mark.parametrize("size", [-1.0, 0.0, 1.0], ids=["lucky", "usual", "unlucky"])
def test_one_batch_does_not_decide_which_rate_is_suggested(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = 1e-6 ** (1 - np.arange(60) / 59)
    falling = 2 - 1 / (1 + np.exp(-2.5 * (np.log10(rates) + 3))) + np.maximum(0, 3 * np.log10(rates / 0.05)) # around 1e-3
    network, batches = tl.create("small_cnn", 2), Batches(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], 8, 4)
    for odd in range(25 if size else 1):
        loss = falling + np.random.default_rng(0).normal(0, 0.05, 60)
        loss[odd] += size
        given = iter(loss)
        monkeypatch.setattr(Run, "learn", lambda run, batch, given=given: float(next(given)))
        curve = tl.find_rate(network, batches, settings=tl.Settings())
        assert len(curve.rates) > 40 and 2e-4 < curve.suggestion < 2e-2, odd


def test_few_steps_give_a_suggestion_too() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    for steps in (1, 2, 3, 5):
        curve = tl.find_rate(tl.create("small_cnn", 2), Batches(images, [0, 1, 0, 1], 8, 4), settings=tl.Settings(), steps=steps)
        assert curve.suggestion in curve.rates and len(curve.rates) == steps


def test_the_rate_of_a_run_is_that_of_its_latest_step() -> None:
    images = np.zeros((8, 8, 8, 3), np.uint8)
    run = Run(tl.create("small_cnn", 2), Batches(images, [0, 1] * 4, 8, 4), replace(tl.Settings(), weights="none"), 10, 0.5)
    assert run.rate() == pytest.approx(0.5 * rate_factor(0, 20))
    for batch in run.train.epoch(0):
        run.learn(batch)
    assert run.rate() == max(group["lr"] for group in run.optimizer.param_groups) == pytest.approx(0.5 * rate_factor(1, 20))


# A size is tried without computing


def test_a_size_is_tried_without_computing() -> None:
    seen: list[str] = []

    class Body(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.device.type)
            return images

    Network(Body(), 3, 2, Preprocess()).check_size(64)
    assert seen == ["meta"]


def test_a_layer_that_is_used_at_two_places_is_whole_after_a_trial() -> None:
    "timm's CoaT has such layers; and two layers may share a weight."

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.again = nn.Conv2d(3, 3, 3, padding=1)
            self.other = nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.one.weight
            self.register_buffer("shift", torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.device.type)
            return self.other(self.again(self.one(images))) + self.shift

    seen: list[str] = []
    body = Body()
    before = {name: value.clone() for name, value in body.state_dict().items()}
    assert trial(body, torch.Size((2, 3, 16, 16))) == (torch.Size((2, 3, 16, 16)), "") and seen == ["meta"]
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    assert body(torch.rand(1, 3, 16, 16)).device.type == "cpu" and body.other.weight is body.one.weight

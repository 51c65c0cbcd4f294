"""A state goes on as it should, says what differs, and is never overwritten by another run; a classifier of one's own is a start."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_kernels import python
from PIL import Image
from safetensors.torch import save_file

import tl_tutorial as tl
from tl_tutorial import checkpoints, cli, resuming, training
from tl_tutorial.batches import Augmentation, Batches
from tl_tutorial.resuming import States
from tl_tutorial.training import StopSignals

QUICK = {"arch": "small_cnn", "weights": "none", "size": 32, "epochs": 2, "progress": False, "patience": 99}


def same(one: tl.Classifier, other: tl.Classifier) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True))


def epochs(clf: tl.Classifier) -> list[int]:
    return [row["epoch"] for row in clf.history]


def test_more_epochs_go_on_from_a_finished_run(colours: Path) -> None:
    first = tl.fine_tune(colours, checkpoint="run", **QUICK)
    longer = tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": 4})
    assert epochs(longer) == [0, 1, 2, 3, 4] and longer.history[:3] == first.history and longer.metrics["steps"] == 2 * first.metrics["steps"]
    rates = [row["lr"] for row in longer.history[1:]]
    assert rates[2] > rates[1] and rates[3] == min(rates[2:]) # the schedule is that of four epochs from here on


def test_fewer_epochs_give_what_is_there(colours: Path) -> None:
    first = tl.fine_tune(colours, checkpoint="run", **QUICK)
    for fewer in (0, 1, 2):
        again = tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": fewer})
        assert same(first, again) and epochs(again) == [0, 1, 2]


def test_a_longer_run_can_itself_be_interrupted(colours: Path) -> None:
    tl.fine_tune(colours, checkpoint="run", **QUICK)
    shutil.copytree("run", "copy")
    whole = tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": 3})
    steps = iter(range(100))
    tl.fine_tune(colours, checkpoint="copy", resume=True, stop=lambda: next(steps) == 2, **QUICK | {"epochs": 3})
    assert same(whole, tl.fine_tune(colours, checkpoint="copy", resume=True, **QUICK | {"epochs": 3}))


@pytest.mark.parametrize("knobs", [{"patience": 3}, {"cache_mb": 0}, {"max_megapixels": 9.0}, {"on_bad": "skip"}, {"device": "cpu"}], ids=str)
def test_what_does_not_change_the_result_may_change(knobs: dict, colours: Path) -> None:
    first = tl.fine_tune(colours, checkpoint="run", **QUICK)
    assert same(first, tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | knobs))


def test_a_network_that_was_tuned_goes_on_too(colours: Path) -> None:
    "Pretrained weights: the mean of the epochs counts those of both runs."
    knobs = {**QUICK, "arch": "efficientnet_lite0", "weights": "default", "epochs": 1}
    tl.fine_tune(colours, checkpoint="run", **knobs)
    longer = tl.fine_tune(colours, checkpoint="run", resume=True, **knobs | {"epochs": 2})
    assert [row["stage"] for row in longer.history] == ["probe", "fine-tune", "fine-tune", "mean of epochs"]


@pytest.mark.parametrize(("knobs", "words"), [
    ({"seed": 1}, "seed was 42, now 1"), ({"lr": 0.01}, "lr was 0.0, now 0.01"), ({"optimizer": "sgd"}, "optimizer was 'adamw', now 'sgd'"),
    ({"size": 40}, "size was 32, now 40"), ({"batch_size": 4}, "batch_size was 0, now 4"), ({"weights": "default"}, "weights was 'none', now 'default'"),
    ({"valid_fraction": 0.4}, "valid_fraction was 0.2, now 0.4"), ({"augment": "none"}, "augment was 'auto', now 'none'"),
    ({"arch": "squeezenet1_1"}, "arch was 'small_cnn', now 'squeezenet1_1'"), ({"lr": 0.01, "seed": 1}, "seed was 42, now 1; lr was 0.0, now 0.01"),
])
def test_the_setting_that_differs_is_named(knobs: dict, words: str, colours: Path) -> None:
    tl.fine_tune(colours, checkpoint="run", **QUICK | {"epochs": 0})
    before = Path("run/state.safetensors").read_bytes()
    with pytest.raises(tl.ModelError, match="run: this state belongs to other pictures or settings") as caught:
        tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": 0} | knobs)
    assert words in str(caught.value) and Path("run/state.safetensors").read_bytes() == before


def test_other_pictures_are_named_as_such(colours: Path) -> None:
    tl.fine_tune(colours, checkpoint="run", **QUICK | {"epochs": 0})
    Image.new("RGB", (40, 40), "pink").save(colours / "red" / "new.png")
    with pytest.raises(tl.ModelError, match="the pictures, or which of them are set aside differ") as caught:
        tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": 0})
    assert "seed" not in str(caught.value)


def test_a_state_is_not_overwritten_in_silence(colours: Path, capsys: pytest.CaptureFixture) -> None:
    "Finished or not: refused before the pictures are read; each remedy of the message works."
    steps = iter(range(100))
    tl.fine_tune(colours, checkpoint="run", stop=lambda: next(steps) == 2, **QUICK)
    before = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    for knobs in (QUICK, QUICK | {"seed": 1}):
        with pytest.raises(tl.SettingsError, match="checkpoint = run: a run has kept its state there.*resume.*another folder"):
            tl.fine_tune(colours, checkpoint="run", **knobs)
    Path("settings.ini").write_text("[model]\nweights = none\n[train]\npatience = 99\n")
    words = ["train", str(colours), "--out", "m.safetensors", "--arch", "small_cnn", "--size", "32", "--epochs", "2", "--checkpoint"]
    assert cli.main([*words, "run"]) == 2
    assert "--resume" in capsys.readouterr().err and not Path("m.safetensors").exists()
    assert {file.name: file.read_bytes() for file in Path("run").iterdir()} == before
    assert cli.main([*words, "run", "--resume"]) == 0 and cli.main([*words, "other"]) == 0
    assert same(tl.load("m.safetensors"), tl.fine_tune(colours, **QUICK))


def test_a_damaged_state_counts_as_a_state(colours: Path) -> None:
    Path("run").mkdir()
    Path("run/state.safetensors").write_bytes(b"half")
    with pytest.raises(tl.SettingsError, match="a run has kept its state there"):
        tl.fine_tune(colours, checkpoint="run", **QUICK)
    assert Path("run/state.safetensors").read_bytes() == b"half"


def test_a_folder_with_other_things_is_used(colours: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK | {"epochs": 0})
    assert Path("run/notes.txt").read_text() == "mine" and Path("run/state.safetensors").exists()
    assert "no state is kept there; the run starts from its beginning" in caplog.text


def test_a_file_as_checkpoint_is_refused(colours: Path) -> None:
    Path("run").write_text("mine")
    for resume in (False, True):
        with pytest.raises(tl.SettingsError, match="checkpoint = run: this is a file; give a folder"):
            tl.fine_tune(colours, checkpoint="run", resume=resume, **QUICK)
    assert Path("run").read_text() == "mine"


def test_a_run_that_fails_leaves_no_empty_folder(colours: Path) -> None:
    def bug(event: tl.Event) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        tl.fine_tune(colours, checkpoint="run", listeners=[bug], **QUICK)
    assert not Path("run").exists()


def test_two_runs_at_once_in_one_folder(colours: Path) -> None:
    "The second is told, from this process and from another one; the first goes on undisturbed."
    expected, told = tl.fine_tune(colours, **QUICK), []
    code = f"import tl_tutorial as tl; tl.fine_tune({str(colours)!r}, checkpoint='run', resume=True, **{QUICK!r})"

    def second(event: tl.Event) -> None:
        if event.kind == "epoch" and event.epoch == 1:
            for resume in (True, False):
                with pytest.raises(tl.TrainingError, match="run: another run keeps its state in this folder; wait until it has ended, or give"):
                    tl.fine_tune(colours, checkpoint="run", resume=resume, **QUICK)
            done = subprocess.run([python(), "-c", code], capture_output=True, text=True, timeout=120)
            told.append(done.stderr.splitlines()[-1])

    first = tl.fine_tune(colours, checkpoint="run", listeners=[second], **QUICK)
    assert same(first, expected) and "another run keeps its state in this folder" in told[0]
    assert same(first, tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK))


def test_a_disk_without_locks(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Then the second writer is noticed at the first one's next write; what was learned comes with the error."
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)

    def second(event: tl.Event) -> None:
        if event.kind == "epoch" and event.epoch == 2:
            checkpoints.store("run", {"w": torch.zeros(1)}, metadata={"key": "another run"})

    with pytest.raises(tl.TrainingError, match="another run keeps its state in this folder") as caught:
        tl.fine_tune(colours, checkpoint="run", listeners=[second], **QUICK)
    assert len(caught.value.classifier.predict(colours)) == 36 and checkpoints.restore("run")[1]["key"] == "another run"
    with pytest.raises(tl.ModelError, match="other pictures or settings"):
        tl.fine_tune(colours, checkpoint="run", resume=True, **QUICK)


def test_without_locks_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    "As on Windows, where Python has no fcntl."
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with States(Path("run")) as states:
        states.keep({"w": torch.zeros(1)}, {"key": 1})
    with States(Path("run"), resume=True) as states:
        assert states.load(1)[1] == {"key": 1}


def test_the_lock_ends_with_its_process(colours: Path) -> None:
    code = ("import os, time; from pathlib import Path; from tl_tutorial.resuming import States\n"
            "States(Path('run')).__enter__(); print(os.getpid(), flush=True); time.sleep(60)")
    other = subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    number = int(other.stdout.readline())
    with pytest.raises(tl.TrainingError, match="another run"):
        States(Path("run")).__enter__()
    os.kill(number, signal.SIGKILL) # the process itself: nobody could pass this on to it
    assert other.wait() == -signal.SIGKILL
    with States(Path("run")):
        pass
    assert not Path("run").exists() or not list(Path("run").iterdir())


def test_differences_are_one_phrase_each() -> None:
    assert resuming.differences({"a": 1}, {"a": 1}) == []
    assert resuming.differences({"a": 1, "old": 2}, {"a": 2, "new": 3}) == ["a was 1, now 2", "new was None, now 3", "old was 2, now None"]
    assert resuming.differences("abc", {"a": 1}) == resuming.differences(None, "x") == ["it was kept by another version, or for another purpose"]


def test_resume_of_fit_itself() -> None:
    "Without fine_tune: the key may be any plain data, and is compared."
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 2

    def run(key: object, **knobs: object) -> tl.training.Outcome:
        train = Batches(images, labels, 16, 4, how=Augmentation())
        return tl.fit(tl.create("small_cnn", 2), train, valid=None, settings=tl.Settings(), epochs=1, lr=1e-3, folder=Path("run"), key=key, **knobs)

    assert run({"mine": 1}).steps == 3
    assert run({"mine": 1}, resume=True).steps == 3
    with pytest.raises(tl.ModelError, match="mine was 1, now 2"):
        run({"mine": 2}, resume=True)
    with pytest.raises(tl.SettingsError, match="a run has kept its state there"):
        run({"mine": 1})


def test_after_an_error_the_network_holds_the_best_weights(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A save that fails in the last epoch: what comes with the error is the best epoch, not the weights of the moment."
    whole = tl.fine_tune(colours, **QUICK)
    monkeypatch.setattr(training, "_keep", lambda run, journal, *_: (_ for _ in ()).throw(tl.TrainingError("full")) if journal.at.epoch == 2 else None)
    with pytest.raises(tl.TrainingError, match="full") as caught:
        tl.fine_tune(colours, checkpoint="run", **QUICK)
    assert same(caught.value.classifier, whole)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A classifier of red, green and blue pictures, made with a small network."
    place = tmp_path_factory.mktemp("own")
    paint(place / "photos", {"red": 0, "green": 1, "blue": 2})
    clf = tl.fine_tune(place / "photos", **QUICK | {"epochs": 6})
    assert clf.metrics["valid_accuracy"] == 1
    return clf.save(place / "mine.safetensors")


def paint(root: Path, classes: dict[str, int], each: int = 10, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, channel in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 120, (40, 44, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


START = {"size": 32, "epochs": 0, "progress": False}


@pytest.mark.parametrize("classes", [{"red": 0, "green": 1, "blue": 2}, {"red": 0, "blue": 2}, {"azure": 2, "red": 0, "green": 1, "violet": 0}, {"x": 0, "y": 1}], ids=",".join)
def test_a_classifier_of_ones_own_is_a_start(classes: dict[str, int], mine: Path, tmp_path: Path) -> None:
    "The same classes, fewer, more, or others: one argument, and the body is the old one."
    before = mine.read_bytes()
    clf = tl.fine_tune(paint(tmp_path / "p", classes, seed=1), weights=str(mine), **START)
    assert clf.settings.arch == "small_cnn" and set(clf.classes) == set(classes) and clf.history[0]["stage"] == "probe"
    old = tl.load(mine).network
    assert all(torch.equal(a, b) for a, b in zip(clf.network.body.state_dict().values(), old.body.state_dict().values(), strict=True))
    if "violet" not in classes:
        assert clf.metrics["valid_accuracy"] == 1
    tuned = tl.fine_tune(tmp_path / "p", weights=mine, **START | {"epochs": 1})
    assert tuned.metrics["steps"] > 0 and mine.read_bytes() == before
    assert tl.load(tuned.save(tmp_path / "next.safetensors")).classes == tuned.classes


def test_known_classes_keep_their_head_when_it_is_better(mine: Path, tmp_path: Path) -> None:
    "Two pictures of each class are too few to fit a head; the old one is taken, its rows in the new order."
    photos = paint(tmp_path / "p", {"blue": 2, "red": 0}, each=4, seed=3)
    clf, old = tl.fine_tune(photos, weights=mine, **START), tl.load(mine)
    rows = [old.classes.index(name) for name in clf.classes]
    kept = torch.equal(clf.network.head.weight, old.network.head.weight[rows])
    from tl_tutorial.material import gather
    from tl_tutorial.recipes import probe

    material, _, classes = gather(photos, None, settings=clf.settings, preprocess=old.network.preprocess)
    fresh = tl.create("small_cnn", 2)
    fresh.body.load_state_dict(old.network.body.state_dict())
    probe(fresh, material, settings=clf.settings)
    loss = tl.training.losses
    judged = [float(loss(tl.training.predict_logits(net, material.valid()), torch.from_numpy(material.valid_labels), settings=clf.settings).mean())
              for net in (clf.network, fresh)]
    assert judged[0] <= judged[1] and (kept or judged[0] == pytest.approx(judged[1]))


def test_the_wrong_start_is_explained(mine: Path, tmp_path: Path, colours: Path) -> None:
    with pytest.raises(tl.ModelError, match="made from small_cnn for 3 classes, not from resnet18; give arch='small_cnn'"):
        tl.fine_tune(colours, arch="resnet18", weights=mine, **START)
    tl.fine_tune(colours, arch="small_cnn", weights=mine, **START) # said twice
    data = bytearray(mine.read_bytes())
    data[-3] ^= 16
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(tl.ModelError, match=r"damaged\.safetensors: damaged"):
        tl.fine_tune(colours, weights=tmp_path / "damaged.safetensors", **START)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(tl.ModelError, match=r"other\.safetensors"):
        tl.fine_tune(colours, weights=str(tmp_path / "other.safetensors"), **START)
    with pytest.raises(tl.ModelError, match=r"gone\.safetensors"):
        tl.fine_tune(colours, weights=str(tmp_path / "gone.safetensors"), **START)


def test_a_start_of_a_module_of_ones_own(colours: Path, tmp_path: Path) -> None:
    own: Callable[[], torch.nn.Module] = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
                                                                     torch.nn.Flatten(), torch.nn.Linear(32, 5))
    first = tl.fine_tune(colours, arch=own(), **START | {"epochs": 1})
    file = first.save(tmp_path / "own.safetensors")
    again = tl.fine_tune(colours, arch=own(), weights=file, **START)
    assert all(torch.equal(a, b) for a, b in zip(again.network.body.state_dict().values(), first.network.body.state_dict().values(), strict=True))
    with pytest.raises(tl.ModelError, match="give that module with arch="):
        tl.fine_tune(colours, weights=file, **START)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hang_up_is_a_polite_stop_unless_it_was_to_be_ignored() -> None:
    with StopSignals() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert asked() and asked.signal == signal.SIGHUP
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN) # as nohup does
    try:
        with StopSignals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_run_survives_a_terminal_that_is_gone(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None: ...

    from tl_tutorial.fine_tuning import say

    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        say(tl.Event("epoch", 1, 1, {"epoch": 1, "train_loss": 1.0, "seconds": 1.0}))


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("a file").write_text("")
    with pytest.raises(tl.TrainingError, match=r"a file/run: cannot keep the run's state \(Not a directory\); choose another folder"), States(Path("a file/run")):
        pass

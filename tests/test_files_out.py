"""What goes out: whole or not at all, through links, never over what was read, and never lost."""

import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import tl_tutorial as tl
from tl_tutorial import cli, files, fine_tuning, steps, training
from tl_tutorial.files import write_whole

SMALL = ["--arch", "small_cnn", "--weights", "none", "--size", "32", "--epochs", "0"]


def train(root: Path, out: object, *more: object) -> int:
    return cli.main(["train", str(root), *SMALL, "--out", str(out), *map(str, more)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, (name, colour) in enumerate((("cat", (200, 40, 40)), ("dog", (40, 40, 200)))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            Image.effect_noise((40, 36), 30 + 5 * k + 40 * number).convert("RGB").save(tmp_path / "photos" / name / f"{k}.jpg")
            Image.blend(Image.open(tmp_path / "photos" / name / f"{k}.jpg"), Image.new("RGB", (40, 36), colour), 0.5).save(tmp_path / "photos" / name / f"{k}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    clf = tl.Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))
    return clf.save(tmp_path / "m.safetensors")


def refusing(number: int) -> Callable:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))
    return call


def full_disk(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    "Files whose path holds one of these names do not fit on the disk."
    real = files._commit

    def commit(data: bytes, path: Path) -> None:
        if any(name in str(path) for name in names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(data, path)
    monkeypatch.setattr(files, "_commit", commit)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("name", ["chmod", "fsync"])
def test_a_drive_that_lacks_chmod_or_fsync_loses_nothing(
        name: str, number: int, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch, quick_onnx: None) -> None:
    monkeypatch.setattr(os, name, refusing(number))
    Path("old.csv").write_text("older")
    assert tl.load(model).save("again.safetensors").exists()
    assert cli.main(["predict", str(model), str(root), "--csv", "old.csv"]) == 0 and len(Path("old.csv").read_text().splitlines()) == 9
    assert train(root, "t.safetensors") == 0 and Path("t.history.jsonl").exists()
    assert cli.main(["export", str(model), "--onnx", "m.onnx"]) == 0 and Path("m.onnx").stat().st_size > 1000


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_bytes_that_are_really_lost_are_an_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole("a.txt", b"older")
    monkeypatch.setattr(os, "fsync", refusing(number))
    with pytest.raises(tl.TrainingError, match=r"a\.txt: cannot be saved .*choose another place; an older file there is untouched"):
        write_whole("a.txt", b"newer")
    assert Path("a.txt").read_bytes() == b"older" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_cannot_be_opened_for_syncing_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *a: refusing(errno.EACCES)() if flags & os.O_DIRECTORY else real(path, flags, *a))
    assert write_whole("a.txt", b"x").read_bytes() == b"x"


def test_rights_are_those_of_any_new_file_and_stay_those_of_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", refusing(errno.EPERM)) # it belongs to the whole process
        write_whole("new.txt", b"x")
        Path("private.txt").touch(0o600)
        write_whole("private.txt", b"x")
    finally:
        monkeypatch.undo()
        os.umask(old)
    os.chdir(tmp_path)
    mode = lambda name: stat.S_IMODE(os.stat(name).st_mode)
    assert mode("new.txt") == 0o640 and mode("private.txt") == 0o600


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_links_are_followed(there: bool, root: Path, model: Path, tmp_path: Path, quick_onnx: None) -> None:
    (tmp_path / "disk2").mkdir()
    for name in ("a.safetensors", "a.history.jsonl", "a.csv", "a.onnx"):
        if there:
            (tmp_path / "disk2" / name).write_bytes(b"old")
        Path(name).symlink_to(tmp_path / "disk2" / name)
    assert train(root, "a.safetensors") == 0
    assert cli.main(["predict", str(model), str(root), "--csv", "a.csv"]) == 0
    tl.load(model).export_onnx("a.onnx")
    for name in ("a.safetensors", "a.history.jsonl", "a.csv", "a.onnx"):
        assert Path(name).is_symlink() and (tmp_path / "disk2" / name).read_bytes()[:3] not in (b"old", b"")
    assert tl.load("a.safetensors").classes == ("cat", "dog")


def test_links_in_a_circle_and_things_that_keep_nothing(model: Path) -> None:
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    os.mkfifo("pipe")
    clf = tl.load(model)
    for place, word in (("one", "circle|Too many levels"), ("pipe", "a pipe or a device"), ("/dev/null", "a pipe or a device"), (".", "a folder; give a file in it")):
        with pytest.raises((tl.SettingsError, tl.TrainingError), match=word):
            clf.save(place)
        assert cli.main(["predict", str(model), "x.jpg", "--csv", place]) == 2
    assert Path("one").is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_each_run_has_its_history(root: Path) -> None:
    for name in ("run.1", "run.2", "m.safetensors"):
        assert train(root, name) == 0
    for name in ("run.1.history.jsonl", "run.2.history.jsonl", "m.history.jsonl"):
        assert json.loads(Path(name).read_text().splitlines()[0])["epoch"] == 0
    said = Path("m.history.jsonl").read_bytes()
    assert train(root, "m") == 2 and Path("m.history.jsonl").read_bytes() == said and not Path("m").exists()


CASES = {
    "a photograph as --out": ("photos/cat/0.jpg", lambda m, p: ["train", "photos", *SMALL, "--out", p]),
    "a photograph as --csv": ("photos/cat/0.jpg", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "a photograph as --onnx": ("photos/cat/0.jpg", lambda m, p: ["export", m, "--onnx", p]),
    "a photograph by its name": ("photos/cat/x.HEIC", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "a link to a photograph": ("link.csv", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "the model as --csv": ("m.safetensors", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "the model as --onnx": ("m.safetensors", lambda m, p: ["export", m, "--onnx", p]),
    "another model as --csv": ("n.safetensors", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "the settings as --csv": ("settings.ini", lambda m, p: ["predict", m, "photos", "--csv", p]),
    "the settings as --out": ("settings.ini", lambda m, p: ["train", "photos", *SMALL, "--out", p]),
    "the first weights as --out": ("n.safetensors", lambda m, p: ["train", "photos", *SMALL[:2], "--weights", p, "--out", p]),
    "the run's state as --out": ("ck/state.safetensors", lambda m, p: ["train", "photos", *SMALL, "--checkpoint", "ck", "--out", p]),
    "somebody's archive as --out": ("old.pth", lambda m, p: ["train", "photos", *SMALL, "--out", p]),
    "a photograph as --checkpoint": ("photos/cat/0.jpg", lambda m, p: ["train", "photos", *SMALL, "--out", "x", "--checkpoint", p]),
    "a folder as --out": ("photos", lambda m, p: ["train", "photos", *SMALL, "--out", p]),
}


@pytest.mark.parametrize("name", CASES)
def test_no_output_is_ever_an_input(name: str, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(fine_tuning, "fine_tune", lambda *_, **__: pytest.fail("it trained first"))
    (root / "cat" / "x.HEIC").write_bytes(b"a phone wrote this")
    Path("link.csv").symlink_to(root / "dog" / "1.jpg")
    Path("settings.ini").write_text("[run]\nseed = 7\n")
    Path("n.safetensors").write_bytes(model.read_bytes())
    Path("ck").mkdir()
    Path("ck/state.safetensors").write_bytes(model.read_bytes())
    torch.save({"a": torch.zeros(1)}, "old.pth")
    place, command = CASES[name]
    seen = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert cli.main(command("m.safetensors", place)) == 2
    said = capsys.readouterr().err
    assert place in said and said.count("\n") == 1 and "give" in said
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == seen


def test_no_output_is_ever_an_input_in_python(root: Path, model: Path) -> None:
    clf, photo = tl.load(model), root / "cat" / "0.jpg"
    seen = photo.read_bytes()
    for write in (clf.save, clf.export_onnx):
        with pytest.raises(tl.SettingsError, match="a JPEG picture stands there and would be lost; give another name"):
            write(photo)
    with pytest.raises(tl.SettingsError, match="a safetensors file stands there"):
        clf.export_onnx(model)
    assert photo.read_bytes() == seen and tl.load(model)


def test_names_are_judged_before_the_training(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(fine_tuning, "fine_tune", lambda *_, **__: pytest.fail("it trained first"))
    assert train(root, "results/") == 2 and "ends like a folder" in capsys.readouterr().err
    for name in ("m" * 250, "m" * 240 + ".safetensors", "é" * 130, "no/where.safetensors"):
        assert train(root, name) == 2
        said = capsys.readouterr().err
        assert "cannot be written" in said and "give a" in said and "Traceback" not in said
    Path("x.history.jsonl").mkdir()
    assert train(root, "x.safetensors") == 2 and "x.history.jsonl: a folder" in capsys.readouterr().err


def test_a_table_that_does_not_fit_keeps_the_old_one_and_shows_the_answers(root: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    Path("old.csv").write_text("last month's answers\n")
    real = files._draft
    monkeypatch.setattr(files, "_draft", lambda path: (os.open("/dev/full", os.O_WRONLY), real(path)[1]))
    assert cli.main(["predict", str(model), str(root), "--csv", "old.csv"]) == 1
    said = capsys.readouterr()
    assert Path("old.csv").read_text() == "last month's answers\n" and not list(Path().glob(".old*"))
    assert said.out.count(".jpg") == 8 and "No space left" in said.err and "Traceback" not in said.err
    monkeypatch.undo()
    os.chdir(root.parent)
    assert cli.main(["predict", str(model), str(root), "--csv", "other.csv"]) == 0 # the remedy: another place


def test_a_result_that_does_not_fit_is_rescued(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    full_disk(monkeypatch, "full.safetensors")
    monkeypatch.setattr("tl_tutorial.results.os.getpid", lambda: 7)
    real = files._commit
    monkeypatch.setattr(files, "_commit", lambda data, path: real(data, path) if "tmp/tl-tutorial-" not in str(path) else Path(path).write_bytes(data))
    assert train(root, "full.safetensors") == 1
    said = capsys.readouterr().err
    kept, = (tmp_path / "tmp").glob("tl-tutorial-*")
    assert str(kept) in said and "No space left" in said and "Traceback" not in said and not Path("full.safetensors").exists()
    kept.rename("moved.safetensors") # the remedy
    assert tl.load("moved.safetensors").classes == ("cat", "dog")


def test_a_result_that_fits_nowhere_is_said(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    full_disk(monkeypatch, "safetensors")
    assert train(root, "x.safetensors") == 1
    said = capsys.readouterr().err
    assert "could not be saved anywhere" in said and "free some space" in said and "Traceback" not in said


def test_a_history_that_does_not_fit_leaves_the_classifier(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    full_disk(monkeypatch, ".history.jsonl")
    assert train(root, "x.safetensors") == 1
    assert "the classifier itself is saved in x.safetensors" in capsys.readouterr().err and tl.load("x.safetensors").history


def test_the_last_good_weights_find_a_place_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    full_disk(monkeypatch, "/ck/", "last-good")
    assert train(root, "run.1", "--epochs", 1, "--checkpoint", "ck") == 1
    said = capsys.readouterr().err
    assert "cannot be saved" in said
    kept = said.split("the last good weights are in ")[1].splitlines()[0]
    assert tl.load(kept).classes == ("cat", "dog") and str(tmp_path / "tmp") in kept


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("times", [1, 3])
def test_a_hang_up_is_answered_like_sigterm(times: int, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    real = steps.Run.learn

    def learn(run: steps.Run, batch: object) -> float:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGHUP)
        return real(run, batch)
    monkeypatch.setattr(steps.Run, "learn", learn)
    assert train(root, "m.safetensors", "--epochs", 3) == 129
    assert tl.load("m.safetensors").interrupted and "saved m.safetensors" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_signals_that_were_ignored_stay_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN) # as under nohup
    try:
        with training.StopSignals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() and asked.signal == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


class Dead:
    "A terminal that is closed after some writes."
    def __init__(self, left: int, number: int) -> None:
        self.left, self.number = left, number

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return len(text)

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError(errno.EBADF, "no descriptor")


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_standard_error_that_goes_away_costs_no_training(number: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Dead(1, number))
    assert train(root, "m.safetensors", "--epochs", 3) == 0 and len(tl.load("m.safetensors").history) >= 4


def test_a_hang_up_with_both_streams_dead_still_saves_and_says_129(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps.Run.learn

    def learn(run: steps.Run, batch: object) -> float:
        os.kill(os.getpid(), signal.SIGHUP)
        monkeypatch.setattr(sys.stdout, "left", 0)
        return real(run, batch)
    monkeypatch.setattr(sys, "stderr", Dead(1, errno.EIO))
    monkeypatch.setattr(sys, "stdout", Dead(99, errno.EIO))
    monkeypatch.setattr(steps.Run, "learn", learn)
    assert train(root, "m.safetensors", "--epochs", 3) == 129
    assert tl.load("m.safetensors").interrupted and Path("m.history.jsonl").exists()


def test_weights_that_settings_ini_names_are_an_input_too() -> None:
    from safetensors.torch import save_file

    from tl_tutorial.results import places

    save_file({"w": torch.zeros(1)}, "start.safetensors")
    assert places("start.safetensors") == Path("start.safetensors") # an older result may be replaced
    for said in ("start.safetensors", "./start.safetensors"):
        Path("settings.ini").write_text(f"[model]\nweights = {said}\n")
        with pytest.raises(tl.SettingsError, match="is read in this run and would be lost"):
            places("start.safetensors")
    assert places("start.safetensors", weights="none") == Path("start.safetensors") # the argument wins

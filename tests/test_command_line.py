"""The command line among other programs: pipes, closed streams, tables for spreadsheets, odd names, and remedies that work."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked_kernels import python
from PIL import Image

import tl_tutorial as tl
from tl_tutorial import cli
from tl_tutorial.checkpoints import read_file, write_file

SMALL = ["--arch", "small_cnn", "--weights", "none", "--size", "32", "--epochs", "0"]


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        for k in range(3):
            photo(tmp_path / "photos" / name / f"{k}.jpg", 10 * number + k)
    return tmp_path / "photos"


def saved(place: Path, classes: tuple[str, ...] = ("cat", "dog")) -> str:
    network = tl.create("small_cnn", len(classes), weights="none").eval()
    return str(tl.Classifier(network, classes, 32, tl.Settings(arch="small_cnn", weights="none")).save(place))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return saved(tmp_path / "m.safetensors")


def heic(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"IMG_{k}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 200)


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_what_was_passed_over_is_counted_and_named(form: str, root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    heic(root / "cat")
    (root / "link.jpg").symlink_to("/etc/hosts")
    assert cli.main(["predict", model, "photos", *{"text": [], "json": ["--json"], "csv": ["--csv", "t.csv"]}[form]]) == 1
    said = capsys.readouterr()
    for name in ("IMG_0.HEIC", "IMG_1.HEIC", "IMG_2.HEIC", "link.jpg"):
        assert f"photos/cat/{name}" in said.err or f"photos/{name}" in said.err
    assert "4 files were left out" in said.err
    if form == "json":
        rows = json.loads(said.out)
        assert sum(row["label"] is not None for row in rows) == 6
        assert sorted(Path(row["path"]).name for row in rows if "problem" in row) == ["IMG_0.HEIC", "IMG_1.HEIC", "IMG_2.HEIC", "link.jpg"]
    if form == "csv":
        assert len(Path("t.csv").read_text().splitlines()) == 7
    if form == "text":
        assert len(said.out.splitlines()) == 6


def test_a_text_beside_the_pictures_is_no_failure_but_a_picture_under_another_name_is(root: Path) -> None:
    from tl_tutorial.folder import Problem
    (root / "notes.txt").write_text("bought in May")
    (root / "picture.download").write_bytes((root / "cat" / "0.jpg").read_bytes())
    note = lambda name, severity="note": Problem(str(root / name), "other file", "no ending of a picture", "nothing", severity)
    assert not cli._serious(note("notes.txt")) and cli._serious(note("picture.download")) and cli._serious(note("notes.txt", "warning"))


def test_of_thousands_the_first_are_named_and_all_are_counted(model: str, root: Path, capsys: pytest.CaptureFixture) -> None:
    heic(root / "cat", 2000)
    assert cli.main(["predict", model, "photos"]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 51 and "2,000 files were left out, of which 1,950 are not named here" in said.err and len(said.out.splitlines()) == 6
    assert cli.main(["predict", model, "photos", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 2006 # the remedy


def test_one_missing_path_of_many(root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    (root / "empty").mkdir()
    Path("dangling.jpg").symlink_to("nowhere")
    paths = ["photos/cat/0.jpg", "gone.jpg", "photos/empty", "dangling.jpg", "https://example.com/a.jpg", "photos/dog/0.jpg"]
    assert cli.main(["predict", model, *paths]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and all(path in said.err for path in paths[1:5])
    assert cli.main(["predict", model, *paths, "--on-bad", "error"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "gone.jpg: there is no such file" in said.err


FORMULAS = ("=1+1", "@SUM(1)", "-2", "+3", "\t=1", "a,b\"c")


def test_a_table_runs_nothing_and_leads_back_to_the_files(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", FORMULAS)
    (tmp_path / "new").mkdir()
    os.chdir(tmp_path / "new")
    for k, name in enumerate(('=HYPERLINK("x").jpg', "-2.jpg", "+1.jpg", "@a.jpg", "é😀.jpg")):
        photo(Path(name), k)
    assert cli.main(["predict", "../m.safetensors", ".", "--csv", "../o.csv"]) == 0
    raw = Path("../o.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf") and raw.count(b"\r\n") == 6
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    assert all(os.path.exists(row["path"]) for row in rows)
    assert not [cell for row in rows for cell in row.values() if cell[:1] in "=+-@\t\r"]
    assert all(row["label"].removeprefix("'") in FORMULAS for row in rows)


def test_names_that_are_not_utf8_lead_back_to_their_files(root: Path, model: str) -> None:
    bad = os.fsencode(root / "cat") + b"/caf\xe9.png"
    Path("x.png").write_bytes(photo(Path("x.png")).read_bytes())
    os.rename("x.png", bad)
    assert cli.main(["predict", model, "photos", "--csv", "t.csv"]) == 0
    with open("t.csv", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and all(os.path.exists(row["path"]) for row in rows)


def test_a_table_of_plain_letters_has_no_mark(root: Path, model: str) -> None:
    assert cli.main(["predict", model, "photos", "--csv", "t.csv"]) == 0
    assert Path("t.csv").read_bytes().startswith(b"path,label,probability\r\n")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_a_table_on_standard_output(name: str, root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["predict", model, "photos", "--csv", name]) == 0
    said = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(said.out)))
    assert rows[0] == ["path", "label", "probability"] and len(rows) == 7 and said.err == "" and not Path("-").exists()


def test_a_picture_from_a_pipe(root: Path, model: str) -> None:
    data = (root / "cat" / "0.jpg").read_bytes()
    line = [python(), "-m", "tl_tutorial", "predict", model, "-", "photos/dog/0.jpg", "--json"]
    done = subprocess.run(line, input=data, capture_output=True, timeout=200)
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and [row["path"] for row in rows] == ["-", "photos/dog/0.jpg"]
    direct = tl.load(model).predict("photos/cat/0.jpg")[0].probability
    assert rows[0]["probability"] == pytest.approx(direct, abs=1e-6)


class Input:
    "Standard input in this process."
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["nothing", "no picture", "closed"])
def test_a_pipe_without_a_picture(content: bytes | None, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "stdin", None if content is None else Input(content))
    assert cli.main(["predict", model, "-"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("tl-tutorial: bytes: ") and said.err.count("\n") == 1


def test_an_endless_pipe_is_refused(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    class Endless:
        def read(self, count: int) -> bytes:
            return bytes(count)
    monkeypatch.setattr(sys, "stdin", Input(b""))
    sys.stdin.buffer = Endless()
    assert cli.main(["predict", model, "-"]) == 1
    assert "more than 256 MB came through the pipe" in capsys.readouterr().err


EMPTY = [["predict", "MODEL", ""], ["predict", "", "photos"], ["predict", "MODEL", "photos", ""], ["check", ""], ["check", "  "], ["evaluate", "MODEL", ""],
         ["train", "", "--out", "x"], ["train", "photos", "--out", ""], ["train", "photos", "--out", "x", "--valid", ""],
         ["train", "photos", "--out", "x", "--checkpoint", ""], ["predict", "MODEL", "photos", "--csv", ""], ["export", "MODEL", "--onnx", ""]]


@pytest.mark.parametrize("line", EMPTY, ids=" ".join)
def test_an_empty_path_is_refused(line: list[str], root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([model if word == "MODEL" else word for word in line]) == 2
    said = capsys.readouterr()
    assert "is empty" in said.err and said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_streams_that_are_not_there(closed: tuple[str, ...], root: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["check", "photos"]) == 0
    assert cli.main(["predict", model, "photos", "--csv", "t.csv"]) == 0
    assert cli.main(["train", "photos", *SMALL, "--out", "t.safetensors"]) == 0
    assert cli.main(["check", "nothing"]) == 1
    assert all(getattr(sys, name) is None for name in closed)
    assert tl.load("t.safetensors") and len(Path("t.csv").read_text().splitlines()) == 7


def test_closed_descriptors_do_not_swallow_a_result(root: Path, model: str) -> None:
    "The next file to be opened would get the number of the closed stream, and what is printed would go into it."
    line = f"exec {sys.executable} -m tl_tutorial predict {model} photos --csv t.csv >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", line], timeout=200).returncode == 0
    assert len(Path("t.csv").read_text().splitlines()) == 7


def test_no_bars_in_a_log(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from tl_tutorial.pixels import track

    def slow() -> list[int]:
        for k in range(12):
            time.sleep(0.1)
            yield k
    assert list(track(slow(), 12, label="looking")) == list(range(12))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track(slow(), 12, label="looking")) == list(range(12))
    assert "looking" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track([1], 1)) == [1]


def test_evaluate_with_a_broken_file(root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    (root / "cat" / "bad.jpg").write_bytes(b"x")
    heic(root / "dog", 2)
    assert cli.main(["evaluate", model, "photos"]) == 1
    said = capsys.readouterr()
    assert "bad.jpg" in said.err and "--on-bad skip" in said.err
    assert cli.main(["evaluate", model, "photos", "--on-bad", "skip"]) == 0 # the remedy
    said = capsys.readouterr()
    assert "on 6 images" in said.out and "bad.jpg" in said.err and "IMG_0.HEIC" in said.err
    Path("settings.ini").write_text("[data]\non_bad = skip\n") # and the other place for it
    assert cli.main(["evaluate", model, "photos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == 6 and sorted(Path(p["path"]).name for p in found["problems"]) == ["IMG_0.HEIC", "IMG_1.HEIC", "bad.jpg"]


def test_limits_in_settings_ini_reach_predict_and_evaluate(root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    photo(root / "cat" / "large.png", 5, (300, 200))
    Path("settings.ini").write_text("[data]\nmax_megapixels = 0.05\n")
    assert cli.main(["predict", model, "photos"]) == 1
    assert "large.png" in (said := capsys.readouterr().err) and "raise max_megapixels in settings.ini" in said
    assert cli.main(["evaluate", model, "photos"]) == 1
    with pytest.raises(tl.DataError, match="max_megapixels"):
        tl.load(model).predict("photos/cat/large.png")
    with pytest.raises(tl.DataError, match="max_megapixels"):
        tl.load(model).predict(Path("photos/cat/large.png").read_bytes())
    Path("settings.ini").write_text("[data]\nmax_megapixels = 1\n") # the remedy
    assert cli.main(["predict", model, "photos"]) == 0 and cli.main(["evaluate", model, "photos"]) == 0
    assert tl.load(model).predict("photos/cat/large.png")


def test_the_device_in_settings_ini_reaches_predict(root: Path, model: str, capsys: pytest.CaptureFixture) -> None:
    Path("settings.ini").write_text("[run]\ndevice = cuda:99\n")
    assert cli.main(["predict", model, "photos"]) == 1
    assert "--device auto" in capsys.readouterr().err
    assert cli.main(["predict", model, "photos", "--device", "auto"]) == 0 # the remedy


def test_a_tilde_is_the_home_folder(root: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_onnx: None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w").mkdir()
    os.chdir(tmp_path / "w")
    assert cli.main(["check", "~/photos"]) == 0
    assert cli.main(["predict", "~/m.safetensors", "~/photos/cat/0.jpg", "--csv", "~/t.csv"]) == 0
    assert cli.main(["evaluate", "~/m.safetensors", "~/photos"]) == 0
    assert cli.main(["export", "~/m.safetensors", "--onnx", "~/m.onnx"]) == 0
    assert cli.main(["train", "~/photos", *SMALL, "--out", "~/n.safetensors", "--checkpoint", "~/ck"]) == 0
    clf = tl.load("~/m.safetensors")
    assert clf.save("~/again.safetensors") == tmp_path / "again.safetensors" and clf.predict("~/photos") and clf.evaluate("~/photos").total == 6
    assert clf.export_onnx("~/b.onnx").exists() and len(clf.predict(["~/photos/cat/0.jpg", Path("~/photos/dog/0.jpg")])) == 2
    assert {"t.csv", "m.onnx", "again.safetensors", "b.onnx"} <= set(os.listdir(tmp_path)) and os.listdir(tmp_path / "w") == []


def test_a_working_folder_that_was_deleted_is_one_sentence(root: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        for line in (["check", str(root)], ["predict", model, str(root)], ["train", str(root), *SMALL, "--out", str(tmp_path / "x.safetensors")]):
            assert cli.main(line) == 1
            said = capsys.readouterr().err
            assert "the working folder was deleted; change into another one" in said and said.count("\n") == 1
        assert len(tl.load(model).predict(root)) == 6 # a server that lost its folder goes on
    finally:
        os.chdir(tmp_path)


def test_the_wrong_file_as_model_is_called_what_it_is(root: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture, quick_onnx: None) -> None:
    (tmp_path / "ck").mkdir()
    tensors, described = read_file(model)
    write_file("ck/state.safetensors", {"sums": tensors["head.weight"]}, metadata={"key": "k", "step": 3, "epoch": 1, "history": []})
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>not found")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    tl.load(model).export_onnx("m.onnx")
    import torch
    torch.save({"a": torch.zeros(1)}, "m.pth")
    wrong = {"ck/state.safetensors": "the state of a run, not a classifier", "ck": "the state of a run, which --resume goes on from", "photos": "a folder, not a saved classifier",
             "photos/cat/0.jpg": "a JPEG picture, not a saved classifier", "m.onnx": "an ONNX file, not", "m.pth": "a zip archive", "page.safetensors": "a web page", "lfs.safetensors": "git lfs pull",
             "x" * 5000: "there is no such file", "gone": "there is no such file"}
    for name, said in wrong.items():
        for line in (["predict", name, model], ["evaluate", name, "photos"], ["export", name, "--onnx", "y.onnx"]):
            assert cli.main(line) == 1
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1 and len(err) < 700, (name, err)


def test_every_flag_that_a_message_names_is_a_flag() -> None:
    "A remedy that names a flag or a command names one that this command line has."
    parser, flags, commands = cli._parser(), set(), set()
    for action in parser._subparsers._group_actions[0].choices.items():
        commands.add(action[0])
        flags |= {option for one in action[1]._actions for option in one.option_strings}
    text = "\n".join(path.read_text() for path in Path(cli.__file__).parent.glob("*.py"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--nproc-per-node", "--force-reinstall"} # torchrun's and pip's
    assert named <= flags | {"--help", "--upgrade"}, named - flags
    assert set(re.findall(r"tl-tutorial ([a-z]{4,})\b", text)) <= commands | {"serve"}


def test_arguments_in_messages_are_named_as_flags_too(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "cat" / "bad.jpg").write_bytes(b"")
    assert cli.main(["train", "photos", *SMALL, "--out", "t.safetensors"]) == 1
    assert "on_bad='skip' (--on-bad skip)" in capsys.readouterr().err
    assert cli.main(["train", "photos", *SMALL, "--out", "t.safetensors", "--on-bad", "skip"]) == 0 # the remedy


def test_the_demo_gives_its_rival_as_many_epochs_as_fit_into_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from tl_tutorial import demo

    asked: list[dict] = []
    now = [0.0]
    rows = [{"stage": "probe", "seconds": 9.0}, *({"stage": "fine-tune", "seconds": 2.0} for _ in range(2))]

    def train(folder: object, **knobs: object) -> object:
        asked.append(knobs)
        now[0] = 20.0
        return SimpleNamespace(history=rows) if len(asked) == 1 else 1 / 0

    for name, stand_in in {"fine_tune": train, "_halves": str, "check": str, "time": SimpleNamespace(monotonic=lambda: now[0])}.items():
        monkeypatch.setattr(demo, name, stand_in)
    with pytest.raises(ZeroDivisionError):
        demo.demo(tmp_path / "m.safetensors", 2, seed=7)
    assert asked[0]["epochs"] == 2 and asked[1]["epochs"] == asked[1]["patience"] == 10 and asked[0]["seed"] == asked[1]["seed"] == 7
    signals, stop = asked[0]["stop"], asked[1]["stop"] # it ends after as long again, or when somebody asks
    said = [(now.__setitem__(0, second), stop())[1] for second in (20.0, 39.0, 41.0, 30.0)]
    signals.signal = 15
    assert said == [False, False, True, False] and stop()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open cannot be counted here")
def test_a_command_leaves_nothing_open(capsys: pytest.CaptureFixture) -> None:
    opened = lambda: len(list(Path("/proc/self/fd").iterdir()))
    before = opened()
    for _ in range(3):
        cli.main(["check", "no such folder"])
    assert opened() == before


def test_the_demo_calls_epochs_and_other_rows_by_their_names(capsys: pytest.CaptureFixture) -> None:
    from types import SimpleNamespace

    from tl_tutorial import demo

    rows = [{"stage": stage, "epoch": epoch, "valid_loss": 0.5, "valid_accuracy": 0.9} for epoch, stage in enumerate(("probe", "fine-tune"))]
    one = SimpleNamespace(history=rows, evaluate=lambda folder: SimpleNamespace(accuracy=0.9, interval=(0.8, 0.95), total=10))
    demo._compared(one, one, None, 5.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("probe ") and lines[1].startswith("epoch 1 ")

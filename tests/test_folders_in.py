"""Folders as they come in: layouts, links, system folders, runs among the photographs, names that look alike, long reports."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tl_tutorial as tl
from tl_tutorial import cli, material
from tl_tutorial.entries import Problem
from tl_tutorial.folder import Folder, Item, find_images, scan
from tl_tutorial.material import gather, merged
from tl_tutorial.report import Report
from tl_tutorial.splits import Branch, layout, read_name

SMALL = {"arch": "small_cnn", "weights": "none", "size": 32, "epochs": 0, "progress": False}
SEEDS = iter(range(10**6))


def picture(path: Path) -> Path:
    "A new picture of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(next(SEEDS)).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def photos(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    "A labelled folder of new pictures."
    for name in classes:
        for number in range(each):
            picture(root / name / f"{number}.png")
    return root


def collected(root: Path, valid: Path | None = None, **knobs: object) -> tuple:
    return gather(root, valid, settings=tl.Settings(size=32, **knobs), preprocess=tl.create("small_cnn", 2, weights="none").preprocess)


PAIRS = [
    ("Training", "Testing", "test"), ("training_set", "test_set", "test"), ("train", "eval", "valid"), ("train", "dev", "valid"), ("seg_train", "seg_test", "test"),
    ("train", "holdout", "test"), ("TRAIN", "VAL", "valid"), ("train_images", "val_images", "valid"), ("images_train", "images_test", "test"), ("train", "valid_old", "valid"),
    ("dogs_train", "dogs_test", "test"), ("trainingSet", "testSet", "test"), ("trainset", "testset", "test"), ("train2017", "val2017", "valid"), ("Train", "Validation", "valid"),
    ("my-data-train", "my-data-test", "test"), ("训练集", "测试集", "test"), ("train_data", "validation_data", "valid"), ("trainval", "test", "test"), ("train", "hold-out", "test"),
    ("1_train", "2_test", "test"), ("Training Data", "Testing Data", "test"), ("train", "evaluation", "valid"), ("traindata", "testdata", "test"),
]


@pytest.mark.parametrize(("first", "second", "role"), PAIRS, ids=[f"{a} {b}" for a, b, _ in PAIRS])
def test_names_of_splits(first: str, second: str, role: str, tmp_path: Path) -> None:
    photos(tmp_path / "p" / first)
    photos(tmp_path / "p" / second, each=2)
    found = scan(tmp_path / "p")
    assert found.classes == ("cat", "dog") and len(found.part("train")) == 6 and len(found.part(role)) == 4 and tl.check(tmp_path / "p").ok


def test_three_splits_of_which_two_could_be_one(tmp_path: Path) -> None:
    for name, each in (("train", 3), ("val", 2), ("eval", 1)):
        photos(tmp_path / name, each=each)
    assert [len(scan(tmp_path).part(role)) for role in ("train", "valid", "test")] == [6, 4, 2]


@pytest.mark.parametrize("name", ["trains", "tests", "trainer", "evaluator", "train station", "test tube", "validity", "stest", "data", "images", "device", "strain", "cat"])
def test_names_that_are_no_splits(name: str) -> None:
    other = "cat" if name != "cat" else "dog"
    assert layout([Branch(name, pictures=True), Branch(other, pictures=True)]).parts == {}
    assert not layout([Branch(name, pictures=True), Branch(other, pictures=True)]).question
    assert not read_name(name).roles or read_name(name).rest


@pytest.mark.parametrize("classes", [("train", "bus", "car"), ("training", "match"), ("dev", "design", "sales"), ("holdout", "dugout"), ("train station", "test tube")])
def test_a_class_with_such_a_name_stays_a_class(classes: tuple[str, ...], tmp_path: Path) -> None:
    assert set(scan(photos(tmp_path, classes)).classes) == set(classes) and tl.check(tmp_path).ok


MIXED = {
    "splits and a class": ["train/cat/1", "train/dog/1", "test/cat/1", "test/dog/1", "bus/1"], "splits and a folder like them": ["train/cat/1", "train/dog/1", "val/cat/1", "extra/cat/1"],
    "unlabelled test beside classes": ["cat/1", "cat/2", "dog/1", "dog/2", "test/1"], "labelled test beside classes": ["cat/1", "dog/1", "test/cat/1", "test/dog/1"],
    "only train beside a plot": ["train/cat/1", "train/dog/1", "docs/plot"], "train and test without classes": ["train/1", "test/1"], "train alone without classes": ["train/1", "train/2"],
    "class and split at once": ["cat_train/1", "cat_test/1", "dog_train/1", "dog_test/1"], "two validation folders": ["train/cat/1", "train/dog/1", "val/cat/1", "valid_old/dog/1"],
    "unlabelled validation": ["train/cat/1", "train/dog/1", "valid/1"], "test below each class": ["cat/train/1", "cat/test/1", "dog/train/1", "dog/test/1"],
    "test below one class": ["cat/1", "cat/test/2", "dog/1", "dog/2"], "deep below a class": ["cat/a/b/Train/1", "cat/a/b/Test/2", "dog/1"], "each class another split": ["cat/train/1", "dog/test/1"],
    "splits of two folds": ["fold1/train/cat/1", "fold1/test/cat/1", "fold2/train/cat/1", "fold2/test/cat/1"], "class first inside a split": ["train/cat/train/1", "train/cat/test/2", "train/dog/1", "valid/cat/1"],
    "extra level": ["photos/cat/1", "photos/dog/1"], "two extra levels": ["a/b/cat/1", "a/b/dog/1"], "extra level above splits": ["set/train/cat/1", "set/test/cat/1"], "extra level above train alone": ["set/train/cat/1", "set/train/dog/1"],
}


@pytest.mark.parametrize("name", MIXED)
def test_what_could_mean_two_things_is_one_question(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "root"
    for file in MIXED[name]:
        picture(root / f"{file}.png")
    with pytest.raises(tl.DataError, match="; (give|put|move|keep|make)"):
        scan(root)
    with pytest.raises(tl.DataError):
        tl.fine_tune(root, **SMALL)
    assert cli.main(["check", str(root)]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_remedy_of_an_extra_level_works(tmp_path: Path) -> None:
    photos(tmp_path / "zip" / "photos" / "inner")
    problem, = (p for p in tl.check(tmp_path / "zip").problems if p.kind == "extra level")
    assert not any(p.kind == "one class" for p in tl.check(tmp_path / "zip").problems)
    assert scan(problem.remedy.removeprefix("give ")).classes == ("cat", "dog")


def test_one_class_with_folders_inside_is_no_extra_level(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "all" / "1.png")
    assert [p.kind for p in tl.check(tmp_path).problems if p.severity == "error"] == ["one class", "one image"]


def test_a_doubled_level_inside_splits_is_stepped_over(tmp_path: Path) -> None:
    for part in ("seg_train", "seg_test"):
        photos(tmp_path / part / part)
    picture(tmp_path / "seg_pred" / "seg_pred" / "1.png")
    report = tl.check(tmp_path)
    assert report.ok and report.classes == ("cat", "dog") and report.splits["train"] == {"cat": 3, "dog": 3} and [p.kind for p in report.problems] == ["unlabelled"]


@pytest.mark.parametrize("test", ["test", "test1", "Testing", "test/test", "test/unknown", "test/images", "predict", "unlabeled"])
def test_an_unlabelled_test_folder_is_left_aside(test: str, tmp_path: Path) -> None:
    photos(tmp_path / "train")
    for number in range(5):
        picture(tmp_path / test / f"{number}.png")
    report = tl.check(tmp_path)
    assert report.ok and report.classes == ("cat", "dog") and [p.kind for p in report.problems] == ["unlabelled"] and "1 folder without labels" in repr(report)
    assert tl.fine_tune(tmp_path, **SMALL).classes == ("cat", "dog")


def test_a_flat_folder_says_what_it_holds(tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / f"cat.{number}.png")
    with pytest.raises(tl.DataError, match="5 images outside of any class folder; put images into one folder per class"):
        scan(tmp_path)


def test_only_test_pictures_are_said_to_be_so(tmp_path: Path) -> None:
    photos(tmp_path / "test")
    with pytest.raises(tl.DataError, match="no training pictures"):
        tl.fine_tune(tmp_path, **SMALL)


SYSTEM = ["$RECYCLE.BIN", "#recycle", "System Volume Information", "lost+found", ".Trash-1000", "@eaDir", "__MACOSX", "found.000", "#snapshot", ".thumbnails", "RECYCLER", "LOST.DIR", "$WinREAgent"]


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("filled", [False, True])
def test_folders_of_the_system_are_not_seen(name: str, filled: bool, tmp_path: Path) -> None:
    root = photos(tmp_path / "stick")
    for place in (root / name, root / "cat" / name):
        place.mkdir()
        if filled:
            picture(place / "S-1-5" / "1.png")
    report = tl.check(root)
    assert report.counts == {"cat": 3, "dog": 3} and report.problems == () and len(find_images(root)) == 6


@pytest.mark.parametrize("file", ["state.safetensors", "state.previous.safetensors"])
@pytest.mark.parametrize("place", ["ckpt", "cat/ckpt", "runs/one"])
def test_the_folder_of_a_run_is_no_class(file: str, place: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    picture(root / place / "plot.png")
    (root / place / file).write_bytes(b"x")
    report = tl.check(root)
    assert report.classes == ("cat", "dog") and report.counts == {"cat": 3, "dog": 3}
    assert "run folder" in {p.kind for p in report.problems} and "1 folder of a training run" in repr(report)
    splits = tmp_path / "s"
    photos(splits / "train")
    photos(splits / "valid")
    shutil.copytree(root / place, splits / "runs")
    assert tl.check(splits).ok and set(tl.check(splits).splits) == {"train", "valid"}


@pytest.mark.parametrize("names", [("m.safetensors", "m.history.jsonl"), ("m.onnx",)])
def test_results_of_training_are_no_class(names: tuple[str, ...], tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    for name in names:
        for place in (root / "out", root / "cat", root):
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(b"x")
    report = tl.check(root)
    assert report.ok and report.classes == ("cat", "dog") and report.counts == {"cat": 3, "dog": 3}


def test_training_twice_into_the_folder_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = photos(tmp_path / "p")
    command = ["train", str(root), "--arch", "small_cnn", "--size", "32", "--epochs", "1", "--out", str(root / "m.safetensors"), "--checkpoint", str(root / "ckpt")]
    assert cli.main(command) == 0 and cli.main([*command, "--resume"]) == 0 and tl.check(root).classes == ("cat", "dog")


def test_links_are_counted_and_the_remedy_works(tmp_path: Path) -> None:
    store = photos(tmp_path / "store")
    files, folders = tmp_path / "files", tmp_path / "folders"
    for name in ("cat", "dog"):
        (files / name).mkdir(parents=True)
        folders.mkdir(exist_ok=True)
        (folders / name).symlink_to(store / name, target_is_directory=True)
        for file in (store / name).iterdir():
            (files / name / file.name).symlink_to(file)
    for root, number in ((files, "6 links"), (folders, "2 links")):
        with pytest.raises(tl.DataError, match=f"passed over: {number} that lead out .*cp -rL"):
            scan(root)
        shutil.copytree(root, tmp_path / f"{root.name} copied", symlinks=False) # what cp -rL does
        assert tl.check(tmp_path / f"{root.name} copied").ok
    passed: list[Problem] = []
    assert find_images(files, passed) == [] and [p.kind for p in passed] == ["link"] * 6 and all(p.path and p.why and p.remedy for p in passed)


def test_some_links_among_files_are_told_in_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = photos(tmp_path / "p")
    (root / "cat" / "away.png").symlink_to("/nowhere.png")
    (root / "cat" / "phone.heic").write_bytes(b"x")
    for name in ("notes.txt", "labels.csv", "no ending"):
        (root / "dog" / name).write_text("x")
    (root / "labels.csv").write_text("x")
    assert cli.main(["check", str(root)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("passed over"))
    assert "1 link" in line and "1 file in a format that is not read (.heic)" in line and "4 other files (.csv, .txt, no ending)" in line
    assert cli.main(["check", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed_over"] in line and {Path(p).name for p in found["other_files"]} == {"notes.txt", "labels.csv", "no ending"}
    assert "1 link" in tl.check(root)._repr_html_() and [p.severity for p in tl.check(root).problems] == ["warning"] * 2


def test_a_folder_of_heic_alone_names_what_is_missing(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / "p" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / "cat" / f"{number}.HEIC").write_bytes(b"x")
    with pytest.raises(tl.DataError, match=r"8 files in formats that are not read \(\.heic\); install pillow-heif .*convert"):
        scan(tmp_path / "p")


@pytest.mark.parametrize("one", ["cat ", " cat", "cat\u200b", "c\u0430t", "Cat", "ｃａｔ", "CAT\u00ad", "c\u0430T"])
def test_names_that_look_alike(one: str, tmp_path: Path) -> None:
    problem, = (p for p in tl.check(photos(tmp_path, ("cat", one, "dog"))).problems if p.kind == "twin names")
    assert problem.severity == "warning" and problem.why.isascii() and "cat" in problem.why


def test_names_that_do_not_look_alike(tmp_path: Path) -> None:
    assert not tl.check(photos(tmp_path, ("nan", "None", "True", "1", "01", "1.0", "a b", "a_b", "été", "ete", "猫", "狗"), 2)).problems


@pytest.mark.parametrize("value", [None, 5, True, ["cat"], {"cat": []}, "", b""])
def test_a_folder_of_the_wrong_kind_is_named(value: object, tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    for work in (scan, tl.check, lambda folder: tl.fine_tune(folder, **SMALL), lambda folder: merged(folder)):
        with pytest.raises(tl.SettingsError, match="^folder"):
            work(value)
    if value is not None:
        with pytest.raises(tl.SettingsError, match="^valid"):
            tl.fine_tune(root, valid=value, **SMALL)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    photos(tmp_path / "photos")
    assert scan("~/photos").classes == ("cat", "dog") and tl.check("~/photos").ok and len(find_images("~/photos")) == 6
    assert merged("~/photos").root == tmp_path / "photos" and cli.main(["check", "~/photos"]) == 0


def test_validation_must_be_other_pictures(tmp_path: Path) -> None:
    root = photos(tmp_path / "s" / "train")
    photos(tmp_path / "s" / "val")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    for valid in (root, tmp_path / "link", scan(root), root / ".." / "train", os.path.relpath(root)):
        with pytest.raises(tl.SettingsError, match="valid = .*names the training folder; give a folder with other pictures, or leave valid out"):
            merged(root, valid)
    (tmp_path / "around").mkdir()
    shutil.copytree(tmp_path / "s" / "val", tmp_path / "around" / "val")
    for folder, valid in ((root, tmp_path / "s"), (tmp_path / "s", tmp_path / "s" / "val"), (root, tmp_path / "s" / "val"), (tmp_path / "s", tmp_path / "s")):
        found = merged(folder, valid)
        assert len(found.part("train")) == len(found.part("valid")) == 6
    items = tuple(scan(root).items)
    with pytest.raises(tl.SettingsError, match="holds pictures of the training folder, such as"):
        merged(root, Folder(tmp_path, ("cat", "dog"), items[:2]))


def test_a_class_that_vanishes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "p")
    for number in range(3):
        (root / "zebra").mkdir(exist_ok=True)
        (root / "zebra" / f"{number}.png").write_bytes(b"broken %d" % number)
    assert "class zebra is gone: all its 3 files are bad" in repr(tl.check(root))
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        assert collected(root, on_bad="skip")[2] == ("cat", "dog")
    assert "class zebra is gone: all its 3 files are bad" in caplog.text


@pytest.mark.parametrize("how", ["one picture", "one sound picture", "one picture twice"])
def test_a_class_too_small_can_be_skipped(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "p")
    first = picture(root / "yak" / "1.png")
    if how == "one sound picture":
        (root / "yak" / "2.png").write_bytes(b"broken")
    if how == "one picture twice":
        shutil.copy(first, root / "yak" / "2.png")
    with pytest.raises(tl.DataError, match="yak"):
        collected(root)
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        assert collected(root, on_bad="skip")[2] == ("cat", "dog")
    assert "left out: class yak" in caplog.text
    photos(tmp_path / "valid", ("cat", "dog", "yak"), 1)
    assert collected(root, tmp_path / "valid", on_bad="skip")[2] == ("cat", "dog", "yak") # nothing need be set aside


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_files_that_change_between_check_and_decoding(on_bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    root = photos(tmp_path / "p", each=6)
    real = material.refuse_or_skip

    def then_change(*arguments: object) -> set[str]:
        found = real(*arguments)
        (root / "cat" / "3.png").unlink()
        (root / "dog" / "4.png").write_bytes(b"half")
        return found

    monkeypatch.setattr(material, "refuse_or_skip", then_change)
    if on_bad == "error":
        with pytest.raises(tl.DataError, match=r"3\.png|4\.png"):
            collected(root, on_bad=on_bad)
        return
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        found, _, _ = collected(root, on_bad=on_bad)
    assert len(found.labels) + len(found.valid_labels) == 10 and len(found.names) == len(found.labels) == len(found.images)
    assert "3.png" in caplog.text and "4.png" in caplog.text


def test_disputed_files_are_known_by_their_paths(tmp_path: Path) -> None:
    "Names that hold the report's own words change nothing."
    root = photos(tmp_path / "p")
    odd = root / "cat" / "x, of another class.png"
    shutil.copy(root / "cat" / "0.png", odd)
    shutil.copy(odd, root / "dog" / "the same picture as y.png")
    problem, = (p for p in tl.check(root).problems if p.kind == "two labels")
    assert problem.other and Path(problem.other).exists()
    found, _, _ = collected(root, on_bad="skip")
    assert len(found.labels) + len(found.valid_labels) == 5


def made_report(count: int, problems: int = 0) -> Report:
    "A report of many classes, without files."
    classes = tuple(f"item {number}" for number in range(count))
    found = Folder(Path("p"), classes, tuple(Item(Path(f"p/{name}/1.png"), name) for name in classes))
    some = tuple(Problem(f"p/{n}", "dark" if n % 2 else "light", "why", "remedy", "warning") for n in range(problems))
    return Report(found, {"": dict.fromkeys(classes, 2)}, {"RGB": count}, (9, 9, 9), some)


def test_reports_of_many_classes_stay_short() -> None:
    report = made_report(300, 600)
    assert len(repr(report).splitlines()) < 50 and "270 more classes with 2 to 2 images each" in repr(report) and "297 more of [dark]" in repr(report)
    assert len(report._repr_html_()) < 10_000 and "270 more" in report._repr_html_() and len(report.as_dict()["counts"]) == 300
    assert len(repr(made_report(40)).splitlines()) == 42 and len(made_report(1)._repr_html_()) < 1000
    long = Folder(Path("p"), ("x" * 200,), ())
    assert max(map(len, repr(Report(long, {"": {}}, {}, (9, 9, 9), ())).splitlines())) < 100


def test_what_tells_of_the_pictures_is_not_counted(tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    for name in ("README.md", "LICENSE", "cat/readme.txt"):
        (root / name).write_text("x")
    assert tl.scan(root).passed_over == "" and tl.check(root).problems == ()
    with pytest.raises(tl.SettingsError, match="max_megapixels"):
        tl.check(root, max_megapixels="50")


def test_a_report_outlives_its_folder(tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    report = tl.check(root)
    before = report._repr_html_()
    shutil.rmtree(root / "cat")
    assert 0 < len(report._repr_html_()) < len(before)
    shutil.rmtree(root)
    assert "<td>3</td>" in report._repr_html_() and "no picture can be read" in report._repr_html_() and repr(report)


def test_limits_of_comparing_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photos(tmp_path / "p")
    monkeypatch.setattr("tl_tutorial.report.COMPARED", 4)
    problem, = tl.check(root).problems
    assert problem.severity == "warning" and "the first 4 of 6 pictures" in problem.why


def test_names_that_are_not_utf8_lead_back_to_the_file(tmp_path: Path) -> None:
    root = photos(tmp_path / "p")
    bad = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(bad)
    for number in range(3):
        shutil.copy(picture(tmp_path / f"{number}.png"), bad + b"/%d.png" % number)
    report = tl.check(root)
    assert report.ok and len(report.counts) == 3 and repr(report).isascii()
    assert all(os.path.exists(item.path) for item in report.folder.items) and json.loads(json.dumps(report.as_dict()))["counts"] == report.counts


def test_each_file_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = photos(tmp_path / "p"), []
    import tl_tutorial.facts as facts
    import tl_tutorial.folder as folder

    real = folder.digest
    for room in (facts, folder):
        monkeypatch.setattr(room, "digest", lambda path: seen.append(path) or real(path))
    collected(root)
    assert len(seen) == 6


def test_folders_inside_each_other_are_read_to_a_depth_that_is_said(tmp_path: Path) -> None:
    from tl_tutorial.entries import DEEPEST, Problem, endings, image_files

    place, passed = tmp_path / "root", list[Problem]()
    for number in range(DEEPEST + 2): # the root, fifty folders, and one more
        place.mkdir()
        if number >= DEEPEST:
            Image.new("RGB", (8, 8)).save(place / f"{number}.png")
        place = place / "in"
    root = tmp_path / "root"
    found = [path.name for path in image_files(root, root.resolve(), read=endings(), passed=passed)]
    assert found == [f"{DEEPEST}.png"] and [problem.kind for problem in passed] == ["too deep"]

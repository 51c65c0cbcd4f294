"""Folders, splits and labels that are not what they seem: a defined order, a clear report, or a stop by name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import SMALL, coloured, fault, labelled, picture, unprivileged, untouched
from PIL import Image

import tl_tutorial as tl
from tl_tutorial import cli
from tl_tutorial.datasets import clipart
from tl_tutorial.folder import Problem, find_images
from tl_tutorial.material import gather


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return labelled(tmp_path / "photos")


def found(folder: Path, kind: str) -> Problem:
    "The one problem of a kind, which has everything it needs; looking for it changes nothing."
    with untouched(folder):
        (problem,) = (p for p in tl.check(folder).problems if p.kind == kind)
    assert problem.path and problem.why and problem.remedy and str(problem).isprintable()
    return problem


def refused(folder: Path, word: str, **knobs: object) -> str:
    "The sentence with which training refuses."
    with untouched(folder), pytest.raises(tl.DataError, match=word) as caught:
        tl.fine_tune(folder, **SMALL, **knobs)
    return str(caught.value)


@pytest.mark.parametrize("name", ["C01 missing", "C02 a file instead", "C03 empty", "C03 only text files"])
def test_no_labelled_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if "file instead" in name:
        place.write_text("hello")
    elif "missing" not in name:
        place.mkdir()
    if "text" in name:
        (place / "cat").mkdir()
        (place / "cat" / "a.txt").write_text("hello")
    for work in (tl.check, lambda folder: tl.fine_tune(folder, **SMALL)):
        with pytest.raises(tl.DataError, match="place.*; ?|place.*: .*") as caught:
            work(place)
        assert "check the path" in str(caught.value) or "give the folder" in str(caught.value) or "put images" in str(caught.value)


@fault("C04 one class")
def test_one_class(fault: str, root: Path) -> None:
    shutil.rmtree(root / "dog")
    assert "cat" in found(root, "one class").why and "second class" in refused(root, "cat")


@fault("C05 empty class")
def test_empty_class(fault: str, root: Path) -> None:
    (root / "fox").mkdir()
    assert "fox" in found(root, "empty class").why and "remove the folder" in refused(root, "fox")


@pytest.mark.parametrize("hidden", [".git", ".hidden", ".ipynb_checkpoints", "__MACOSX"],
                         ids=["C06 .git", "C06 hidden folder", "C07 .ipynb_checkpoints", "C08 __MACOSX"])
def test_hidden_folders_are_no_classes(root: Path, hidden: str) -> None:
    picture(root / hidden / "x.png", 99)
    picture(root / "cat" / hidden / "x.png", 98)
    report = tl.check(root)
    assert report.classes == ("cat", "dog") and report.ok and report.counts == {"cat": 3, "dog": 3}
    assert tl.fine_tune(root, epochs=1, **SMALL).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["Thumbs.db", ".DS_Store", "desktop.ini", "._1.png"])
def test_system_files_are_passed_over(root: Path, name: str) -> None:
    (root / "cat" / name).write_bytes(b"x")
    assert tl.check(root).counts == {"cat": 3, "dog": 3} and tl.check(root).ok


@fault("C09 nested folders")
def test_nested_images_count(fault: str, root: Path) -> None:
    picture(root / "cat" / "deep" / "deeper" / "4.png", 20)
    assert tl.check(root).counts == {"cat": 4, "dog": 3} and tl.check(root).ok


@fault("C09 folders nested sixty times")
def test_nesting_has_an_end(fault: str, root: Path) -> None:
    picture(root / "cat" / "/".join("d" * 60) / "4.png", 20)
    assert "inside more than 50" in found(root, "too deep").why and tl.check(root).counts["cat"] == 3


@fault("C10 images at the root")
def test_stray_images_are_reported(fault: str, root: Path) -> None:
    picture(root / "stray.png", 21)
    problem = found(root, "no class")
    assert problem.path.endswith("stray.png") and problem.severity == "warning" and tl.check(root).classes == ("cat", "dog")


@fault("C11 links that go round")
def test_links_that_go_round(fault: str, root: Path) -> None:
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    (root / "fox").symlink_to(root, target_is_directory=True)
    (root / "ox").symlink_to(root / "ox", target_is_directory=True)
    report = tl.check(root)
    assert report.counts == {"cat": 3, "dog": 3} and sorted(p.kind for p in report.problems) == ["link"] * 4


@fault("C12 link that leads nowhere")
def test_dangling_link(fault: str, root: Path, tmp_path: Path) -> None:
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert found(root, "link").path.endswith("gone.png") and tl.check(root).counts["cat"] == 3


def test_links_do_not_lead_out(root: Path, tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret" / "s.png", 30)
    (root / "cat" / "out.png").symlink_to(secret)
    (root / "fox").symlink_to(tmp_path / "secret", target_is_directory=True)
    report = tl.check(root)
    assert report.counts == {"cat": 3, "dog": 3} and [p.kind for p in report.problems] == ["link"] * 2
    assert secret not in find_images(root) and root / "cat" / "out.png" not in find_images(root)


@fault("C14 unreadable folder")
def test_unreadable_folder(fault: str, root: Path) -> None:
    (root / "dog").chmod(0)
    with unprivileged():
        for work in (tl.check, lambda folder: tl.fine_tune(folder, **SMALL)):
            with pytest.raises(tl.DataError, match=r"dog.*Permission denied.*permissions"):
                work(root)
    assert (root / "dog").stat().st_mode & 0o777 == 0
    (root / "dog").chmod(0o755)


@fault("C15 suffixes that differ in case")
def test_suffixes_in_any_case(fault: str, root: Path) -> None:
    picture(root / "cat" / "0.PNG", 50)
    picture(root / "cat" / "1.Png", 51)
    assert tl.check(root).counts == {"cat": 5, "dog": 3} and tl.check(root).ok
    assert len({item.path for item in tl.scan(root).items}) == 8


@fault("C16 one name in two Unicode spellings")
def test_unicode_twins(fault: str, root: Path) -> None:
    for number, name in enumerate(("caf\u00e9", "cafe\u0301")):
        picture(root / name / "1.png", 60 + number)
    problem = found(root, "twin names")
    assert tl.check(root).counts == {"cat": 3, "dog": 3, "caf\u00e9": 2} and "taken as one class" in problem.why and tl.check(root).ok
    picture(root / "Cat" / "1.png", 40)
    assert "Cat" in next(p.why for p in tl.check(root).problems if "case" in p.why)


@fault("C17 numbers as names")
def test_numbers_in_order(fault: str, tmp_path: Path) -> None:
    labelled(tmp_path / "p", ("10", "2", "1"))
    assert tl.scan(tmp_path / "p").classes == ("1", "2", "10")
    assert tl.fine_tune(tmp_path / "p", epochs=1, **SMALL).classes == ("1", "2", "10")


def test_a_class_called_train_stays_a_class(root: Path) -> None:
    picture(root / "train" / "1.png", 50)
    assert tl.scan(root).classes == ("cat", "dog", "train")


def test_formats_that_are_not_read_are_reported(root: Path) -> None:
    (root / "cat" / "5.heic").write_bytes(b"x")
    assert "convert" in found(root, "format").remedy and tl.check(root).ok


def split(root: Path, part: str, label: str, number: int, seed: int) -> Path:
    return picture(root / part / label / f"{number}.png", seed)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    root, seed = tmp_path / "parts", 0
    for part, count in (("train", 4), ("valid", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                seed += 1
                split(root, part, label, number, seed)
    return root


def test_sound_splits(parts: Path) -> None:
    assert tl.check(parts).ok and tl.check(parts).counts == {"cat": 6, "dog": 6}


@fault("D01 validation lacks a class")
def test_validation_that_lacks_a_class_keeps_the_order(fault: str, parts: Path) -> None:
    shutil.rmtree(parts / "valid" / "cat")
    assert "cat" in found(parts, "missing class").why and tl.check(parts).ok
    material, _, classes = gather(parts, None, settings=tl.Settings(arch="small_cnn"), preprocess=tl.create("small_cnn", 2).preprocess)
    assert classes == ("cat", "dog") and set(material.valid_labels) == {1}


@fault("D02 validation has a class more")
def test_validation_with_an_unknown_class(fault: str, parts: Path, capsys: pytest.CaptureFixture) -> None:
    split(parts, "valid", "ape", 0, 60)
    assert "ape" in found(parts, "unknown class").why and "add it to train" in refused(parts, "ape")
    assert cli.main(["train", str(parts), "--out", "x.safetensors", "--arch", "small_cnn"]) == 1
    assert "ape" in capsys.readouterr().err and not Path("x.safetensors").exists()


@fault("D03 classes in another order")
def test_classes_in_another_order(fault: str, tmp_path: Path) -> None:
    "The validation folder lists dog before cat, and has no ape: names decide, not places."
    labelled(tmp_path / "train", ("ape", "cat", "dog"))
    for number, name in enumerate(("dog", "cat")):
        picture(tmp_path / "aside" / name / "1.png", 70 + number)
    material, _, classes = gather(tmp_path / "train", tmp_path / "aside", settings=tl.Settings(arch="small_cnn"), preprocess=tl.create("small_cnn", 2).preprocess)
    assert classes == ("ape", "cat", "dog") and material.valid_labels.tolist() == [1, 2]
    assert (material.valid_images[0] != material.valid_images[1]).any()


@fault("D04 a class under another name")
def test_a_renamed_class(fault: str, parts: Path) -> None:
    (parts / "valid" / "cat").rename(parts / "valid" / "kitten")
    assert "kitten" in found(parts, "unknown class").why and "cat" in found(parts, "missing class").why
    assert "rename" in refused(parts, "kitten") or "remove it there" in refused(parts, "kitten")


@fault("D05 two classes swapped")
def test_swapped_classes_show_in_the_confusion(fault: str, tmp_path: Path) -> None:
    "Nobody can see that labels are swapped but by the result; there every picture of both classes counts as wrong, under its name."
    root = coloured(tmp_path / "colours")
    clf = tl.fine_tune(root, epochs=4, **SMALL)
    assert clf.evaluate(root).accuracy == 1
    (root / "red").rename(root / "x")
    (root / "green").rename(root / "red")
    (root / "x").rename(root / "green")
    result = clf.evaluate(root)
    red, green = clf.classes.index("red"), clf.classes.index("green")
    assert result.confusion[red, green] == result.confusion[green, red] == 8 and result.per_class["blue"]["recall"] == 1


@fault("D06 a picture twice in one split")
def test_duplicates(fault: str, parts: Path) -> None:
    shutil.copy(parts / "train/cat/0.png", parts / "train/cat/again.png")
    assert "again.png" in str(found(parts, "duplicate")) and tl.check(parts).ok


@fault("D07 a picture in two splits")
def test_a_leak_is_refused_unless_told(fault: str, parts: Path, tmp_path: Path) -> None:
    shutil.copy(parts / "train/cat/0.png", parts / "valid/cat/copy.png")
    assert "0.png" in found(parts, "leak").why
    for on_bad in ("error", "skip"):
        assert "allow_leaks" in refused(parts, "another split", on_bad=on_bad)
    assert tl.fine_tune(parts, epochs=1, allow_leaks=True, **SMALL).classes == ("cat", "dog")


@fault("D08 a picture with two labels")
def test_two_labels(fault: str, parts: Path) -> None:
    shutil.copy(parts / "train/cat/1.png", parts / "train/dog/wrong.png")
    assert "of another class" in found(parts, "two labels").why and "wrong.png" in refused(parts, "another class")
    material, _, _ = gather(parts, None, settings=tl.Settings(arch="small_cnn", on_bad="skip"), preprocess=tl.create("small_cnn", 2).preprocess)
    assert len(material.labels) == 7 and not any("wrong.png" in name or "train/cat/1.png" in name for name in material.names)


@pytest.mark.parametrize("name", ["D09 nearly the same picture", "D10 the same picture in another format"])
def test_near_duplicates(name: str, parts: Path) -> None:
    source = Image.open(sorted((clipart() / "vehicles").glob("*.jpg"))[0]).convert("RGB")
    source.save(parts / "train" / "cat" / "a.png")
    if "another format" in name:
        source.save(parts / "valid" / "cat" / "b.jpg", quality=60)
    else:
        pixels = (np.asarray(source) * 0.99).astype(np.uint8)
        pixels[:6, :6] = 128
        Image.fromarray(pixels).save(parts / "valid" / "cat" / "b.png")
    problem = found(parts, "near duplicate")
    assert "b." in problem.path and "a.png in another split" in problem.why and "look at both" in problem.remedy


def test_many_near_duplicates_are_told_once_each(tmp_path: Path) -> None:
    for number in range(60):
        grey = Image.new("L", (32, 32), 200)
        grey.putpixel((number % 32, number // 32), 100)
        (tmp_path / "p" / "cat").mkdir(parents=True, exist_ok=True)
        grey.save(tmp_path / "p" / "cat" / f"{number}.png")
    labelled(tmp_path / "p", ("dog",))
    assert len([p for p in tl.check(tmp_path / "p").problems if p.kind == "near duplicate"]) == 59


@fault("D11 empty validation folder", "D11 validation folder with empty classes")
def test_empty_validation(fault: str, parts: Path) -> None:
    shutil.rmtree(parts / "valid")
    if "classes" in fault:
        (parts / "valid" / "cat").mkdir(parents=True)
        (parts / "valid" / "dog").mkdir(parents=True)
    else:
        (parts / "valid").mkdir()
    assert found(parts, "empty split").path == str(parts / "valid") and "remove the folder" in refused(parts, "valid")
    with pytest.raises(tl.DataError, match="valid"):
        tl.fine_tune(parts / "train", parts / "valid", **SMALL)


@fault("D12 one image of a class")
def test_one_image_of_a_class(fault: str, root: Path) -> None:
    picture(root / "fox" / "1.png", 77)
    assert "fox" in found(root, "one image").why and "at least 2" in refused(root, "fox")


@fault("D13 a thousand to one")
def test_imbalance(fault: str, tmp_path: Path) -> None:
    for number in range(1000):
        picture(tmp_path / "p" / "train" / "cat" / f"{number}.png", number, side=9)
    for seed, name in enumerate(("train/dog", "valid/dog", "valid/cat")):
        picture(tmp_path / "p" / name / "1.png", 2000 + seed, side=9)
    problem = found(tmp_path / "p", "imbalance")
    assert "1000 of cat, 1 of dog" in problem.why and "class_weights" in problem.remedy and tl.check(tmp_path / "p").ok


@fault("D14 share too small for a class")
def test_a_small_share_still_takes_one_of_each(fault: str, root: Path) -> None:
    first, second = tl.split(tl.scan(root).items, 0.01, seed=1)
    assert {item.label for item in second} == {"cat", "dog"} and len(second) == 2 and len(first) == 4
    clf = tl.fine_tune(root, epochs=1, valid_fraction=0.01, **SMALL)
    assert clf.metrics["valid_total"] == 2
    with pytest.raises(tl.SettingsError, match="valid_fraction"):
        tl.fine_tune(root, valid_fraction=0.0, **SMALL)


def test_equal_files_stay_on_one_side(root: Path) -> None:
    for number in range(10):
        shutil.copy(root / "cat/1.png", root / "cat" / f"copy{number}.png")
    first, second = tl.split(tl.scan(root).items, 0.3, seed=1)
    sides = [{item.path.read_bytes() for item in part} for part in (first, second)]
    assert not sides[0] & sides[1]


@fault("D02 a test folder has a class more")
def test_evaluate_matches_classes_by_name(fault: str, parts: Path, tmp_path: Path) -> None:
    clf = tl.fine_tune(parts, epochs=1, **SMALL)
    picture(tmp_path / "later" / "dog" / "1.png", 90)
    assert clf.evaluate(tmp_path / "later").confusion[1].sum() == 1
    picture(tmp_path / "later" / "wolf" / "1.png", 91)
    with untouched(tmp_path / "later"), pytest.raises(tl.DataError, match="wolf.*cat, dog.*rename"):
        clf.evaluate(tmp_path / "later")


def test_report_is_plain_data(parts: Path) -> None:
    assert json.loads(json.dumps(tl.check(parts).as_dict()))["ok"] is True


def test_a_name_too_long_is_no_folder() -> None:
    with pytest.raises(tl.DataError, match="no such folder"):
        tl.check(Path("x" * 5000))
    assert os.path.exists(".")

"""Folders, splits and labels that are not what they seem: a defined order, a clear report, or a stop by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tl_tutorial as tl
from tl_tutorial.folder import find_images
from tl_tutorial.material import gather


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(["cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png", "dog/3.png"]):
        picture(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"


def kinds(folder: Path) -> set[str]:
    return {problem.kind for problem in tl.check(folder).problems}


@pytest.mark.parametrize("name", ["missing", "a file", "empty", "only text files"])
def test_no_labelled_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if name == "a file":
        place.write_text("hello")
    elif name != "missing":
        place.mkdir()
    if name == "only text files":
        (place / "cat").mkdir()
        (place / "cat" / "a.txt").write_text("hello")
    with pytest.raises(tl.DataError, match="place"):
        tl.check(place)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git", "__MACOSX", ".hidden"])
def test_hidden_folders_are_no_classes(root: Path, hidden: str) -> None:
    picture(root / hidden / "x.png", 99)
    assert tl.check(root).classes == ("cat", "dog") and tl.check(root).ok


@pytest.mark.parametrize("name", ["Thumbs.db", ".DS_Store", "desktop.ini", "._1.png"])
def test_system_files_are_passed_over(root: Path, name: str) -> None:
    (root / "cat" / name).write_bytes(b"x")
    assert tl.check(root).counts == {"cat": 3, "dog": 3} and tl.check(root).ok


def test_numbers_in_order(tmp_path: Path) -> None:
    for seed, name in enumerate(["10", "2", "1"]):
        picture(tmp_path / "p" / name / "a.png", seed)
    assert tl.scan(tmp_path / "p").classes == ("1", "2", "10")


def test_a_class_called_train_stays_a_class(root: Path) -> None:
    picture(root / "train" / "1.png", 50)
    assert tl.scan(root).classes == ("cat", "dog", "train")


def test_one_class(root: Path) -> None:
    shutil.rmtree(root / "dog")
    assert "one class" in kinds(root) and not tl.check(root).ok


def test_empty_class(root: Path) -> None:
    (root / "fox").mkdir()
    assert "empty class" in kinds(root)
    with pytest.raises(tl.DataError, match="fox"):
        tl.fine_tune(root, arch="small_cnn", progress=False)


def test_one_image_of_a_class(root: Path) -> None:
    picture(root / "fox" / "1.png", 77)
    with pytest.raises(tl.DataError, match="fox"):
        tl.fine_tune(root, arch="small_cnn", progress=False)


def test_nested_images_count_and_stray_images_are_reported(root: Path) -> None:
    picture(root / "cat" / "deep" / "4.png", 20)
    picture(root / "stray.png", 21)
    report = tl.check(root)
    assert report.counts["cat"] == 4 and "no class" in kinds(root) and report.ok


def test_formats_that_are_not_read_are_reported(root: Path) -> None:
    (root / "cat" / "5.heic").write_bytes(b"x")
    assert "format" in kinds(root) and tl.check(root).ok


def test_links_do_not_lead_out(root: Path, tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret" / "s.png", 30)
    (root / "cat" / "out.png").symlink_to(secret)
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    (root / "fox").symlink_to(tmp_path / "secret", target_is_directory=True)
    report = tl.check(root)
    assert report.counts == {"cat": 3, "dog": 3} and len([p for p in report.problems if p.kind == "link"]) == 4
    assert secret not in find_images(root)


def test_names_that_differ_in_case(root: Path) -> None:
    picture(root / "Cat" / "1.png", 40)
    assert "twin names" in kinds(root)


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


def test_validation_with_an_unknown_class(parts: Path) -> None:
    split(parts, "valid", "fox", 0, 60)
    assert "unknown class" in kinds(parts)
    with pytest.raises(tl.DataError, match="fox"):
        tl.fine_tune(parts, arch="small_cnn", progress=False)


def test_validation_that_lacks_a_class_keeps_the_order(parts: Path) -> None:
    shutil.rmtree(parts / "valid" / "cat")
    assert "missing class" in kinds(parts) and tl.check(parts).ok
    material, _, classes = gather(parts, None, tl.Settings(arch="small_cnn"), tl.create("small_cnn", 2).preprocess)
    assert classes == ("cat", "dog") and set(material.valid_labels) == {1}


def test_a_leak_is_refused_unless_told(parts: Path) -> None:
    shutil.copy(parts / "train/cat/0.png", parts / "valid/cat/copy.png")
    for on_bad in ("error", "skip"):
        with pytest.raises(tl.DataError, match="another split"):
            tl.fine_tune(parts, arch="small_cnn", on_bad=on_bad, progress=False)
    assert tl.fine_tune(parts, arch="small_cnn", epochs=1, allow_leaks=True, progress=False).classes == ("cat", "dog")


def test_duplicates_and_two_labels(parts: Path) -> None:
    shutil.copy(parts / "train/cat/0.png", parts / "train/cat/again.png")
    assert "duplicate" in kinds(parts) and tl.check(parts).ok
    shutil.copy(parts / "train/cat/1.png", parts / "train/dog/wrong.png")
    assert "two labels" in kinds(parts) and not tl.check(parts).ok


def test_near_duplicates(root: Path) -> None:
    from tl_tutorial.datasets import clipart

    source = Image.open(sorted((clipart() / "vehicles").glob("*.jpg"))[0])
    source.save(root / "cat" / "a.jpg", quality=95)
    source.save(root / "cat" / "b.jpg", quality=60)
    assert "near duplicate" in kinds(root) and tl.check(root).ok


def test_imbalance(root: Path) -> None:
    for number in range(4, 40):
        picture(root / "cat" / f"{number}.png", 100 + number)
    assert "imbalance" in kinds(root) and tl.check(root).ok


def test_equal_files_stay_on_one_side(root: Path) -> None:
    for number in range(10):
        shutil.copy(root / "cat/1.png", root / "cat" / f"copy{number}.png")
    first, second = tl.split(tl.scan(root).items, 0.3, seed=1)
    sides = [{item.path.read_bytes() for item in part} for part in (first, second)]
    assert not sides[0] & sides[1]


def test_evaluate_matches_classes_by_name(parts: Path, tmp_path: Path) -> None:
    clf = tl.fine_tune(parts, arch="small_cnn", epochs=1, progress=False)
    picture(tmp_path / "later" / "dog" / "1.png", 90)
    assert clf.evaluate(tmp_path / "later").confusion[1].sum() == 1
    picture(tmp_path / "later" / "wolf" / "1.png", 91)
    with pytest.raises(tl.DataError, match="wolf"):
        clf.evaluate(tmp_path / "later")


def test_report_is_plain_data(parts: Path) -> None:
    assert json.loads(json.dumps(tl.check(parts).as_dict()))["ok"] is True

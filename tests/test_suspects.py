"""Wrong labels: found by heads that had not seen the picture, told in text, JSON and pictures, and never acted upon."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tl_tutorial as tl
import tl_tutorial.suspects as room
from tl_tutorial import cli
from tl_tutorial.datasets import draw_shapes
from tl_tutorial.evidence import Evidence
from tl_tutorial.report import Suspect

CLASSES, WRONG = ("circle", "star5"), {"circle/3.png", "star5/10.png"}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Twelve drawings of each of two shapes; two lie in the wrong folder, and one file is no picture."
    root = tmp_path_factory.mktemp("drawings")
    images, labels = draw_shapes(CLASSES, per_class=12, size=64, seed=1, noise=0.1)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = root / CLASSES[1 - label if number in (3, 10) else label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    moved = {str(file.relative_to(root)) for file in root.glob("*/*.png")} - {
        f"{CLASSES[label]}/{number}.png" for number, label in enumerate(labels)}
    WRONG.clear()
    WRONG.update(moved)
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    "A working folder whose settings.ini asks for small crops."
    place = tmp_path_factory.mktemp("work")
    (place / "settings.ini").write_text("[train]\nsize = 64\n")
    monkeypatch.chdir(place)


def tree(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_wrong_labels_come_first_and_nothing_is_changed(drawings: Path, small: None, capsys: pytest.CaptureFixture) -> None:
    before = tree(drawings)
    assert cli.main(["check", str(drawings), "--suspects", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["suspects"]
    assert {str(Path(one["path"]).relative_to(drawings)) for one in found[:2]} == WRONG
    assert all(one["label"] != one["better"] and one["probability"] > one["given"] for one in found)
    assert tree(drawings) == before
    report = tl.check(drawings, suspects=True)
    assert report.ok and [vars(one) for one in report.suspects or ()] == found
    assert f"suspect: {report.suspects[0]}" in repr(report) and "looks like" in repr(report)  # type: ignore[index]
    assert "suspicious pictures: label, and the one that would suit" in report._repr_html_()


def test_who_does_not_ask_gets_the_report_of_before(drawings: Path) -> None:
    report = tl.check(drawings)
    assert report.suspects is None and "suspect" not in repr(report) and "suspects" not in report.as_dict()


def stand_in(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor) -> None:
    "Evidence that says these logits of the pictures in their order."
    monkeypatch.setattr("tl_tutorial.evidence.look", lambda material, *_, **__: Evidence(
        None, material, logits, torch.from_numpy(material.labels), "leave-one-out", left_out=logits))  # type: ignore[arg-type]


def test_files_that_cannot_be_read_and_other_splits_are_passed_over(drawings: Path, tmp_path: Path, small: None,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    for part, names in {"train": ("a", "b"), "valid": ("a", "b")}.items():
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                shade = np.random.default_rng(hash((part, name, number)) % 2**32).integers(0, 255, (64, 64, 3))
                Image.fromarray(shade.astype(np.uint8)).save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "train/a/0.png").write_bytes(b"no picture")
    stand_in(monkeypatch, torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.5, 0.0]]))
    report = tl.check(tmp_path, suspects=True)
    assert not report.ok # the file is named as before
    assert [(Path(one.path).relative_to(tmp_path).as_posix(), one.better) for one in report.suspects or ()] == [
        ("train/a/1.png", "b"), ("train/b/2.png", "a")] # the surest first


def test_where_too_little_is_there_a_warning_says_so(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "only/1.png")
    report = tl.check(tmp_path, suspects=True)
    assert report.suspects is None and any(p.kind == "not looked for" for p in report.problems)
    assert {p.kind for p in report.problems if p.severity == "error"} == {p.kind for p in tl.check(tmp_path).problems if p.severity == "error"}


def test_too_many_pictures_are_refused_in_a_sentence(drawings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_tutorial.evidence.MOST", 20)
    report = tl.check(drawings, suspects=True)
    assert report.suspects is None and "24 pictures are more than" in repr(report)


def test_many_suspects_stay_short(drawings: Path) -> None:
    from dataclasses import replace
    report = replace(tl.check(drawings), suspects=tuple(Suspect(f"{drawings}/gone{k}.png", "<b>", "ü" * 90, 0.9, 0.1) for k in range(30)))
    assert repr(report).count("suspect: ") == 20 and "10 more suspects" in repr(report)
    shown = report._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown and len(report.as_dict()["suspects"]) == 30
    assert "no suspicious label found" in repr(replace(report, suspects=()))


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_suspects_is_a_question_of_yes_or_no(bad: object, drawings: Path) -> None:
    with pytest.raises(tl.TLError, match="suspects"):
        room.check(drawings, suspects=bad)  # type: ignore[arg-type]

"""Settings and arguments as they come in: files of other programs, values as people write them, and wrong kinds of arguments."""

import copy
import logging
import os
import pickle
from pathlib import Path

import pytest

import tl_tutorial as tl
from tl_tutorial.settings import as_path, find_settings, of_kind, pick_device, read_settings

FOREIGN = {
    "nbdev 2": b"[DEFAULT]\nlib_name = birds\nversion = 0.0.1\nmin_python = 3.7\n", "a game": b"[Display]\r\nwidth=1920\r\n",
    "nothing": b"", "bytes": bytes(range(256)), "a game in UTF-16": "[Display]\r\nwidth=1\r\n".encode("utf-16"), "no section": b"width = 3\n",
    "desktop": b"[.ShellClassInfo]\nIconResource=x\n", "latin-1": "[Größe]\nx = é\n".encode("latin-1"), "broken": b"[[[\n[ ]\n",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("level", [".", "..", "../.."])
def test_files_of_other_programs_are_passed_over(name: str, level: str, own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = own_place / "a" / "b"
    deep.mkdir(parents=True)
    (own_place / "settings.ini").write_text("[run]\nseed = 7\n")
    (own_place / "a").joinpath(level if level == "." else "b" if level == ".." else ".", "settings.ini").write_bytes(FOREIGN[name])
    monkeypatch.chdir(deep)
    assert read_settings().seed == 7 and find_settings() == own_place / "settings.ini"


def test_a_folder_or_a_locked_file_of_that_name_stops_nothing(own_place: Path) -> None:
    (own_place / "settings.ini").mkdir()
    assert find_settings() is None and read_settings().seed == 42


def test_settings_under_a_foreign_heading_are_not_passed_over_in_silence(own_place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own_place / "settings.ini").write_text("[hyperparameters]\nepochs = 3\n")
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        assert read_settings().epochs == -1
    assert "epochs" in caplog.text and "[train]" in caplog.text


def test_another_tool_may_share_our_file(own_place: Path) -> None:
    (own_place / "settings.ini").write_text("[DEFAULT]\nlib_name = birds\n[run]\nseed = 7\n")
    assert read_settings().seed == 7
    (own_place / "settings.ini").write_text("[DEFAULT]\nseed = 3\n[run]\nseed = 7\n")
    with pytest.raises(tl.SettingsError, match=r"\[DEFAULT\] seed"):
        read_settings()


@pytest.mark.parametrize("text", ["[trian]\nepochs = 3\n", "[RUN]\nseed = 3\n", "[run]\nsede = 3\n", "seed = 3\n", "[models]\narch = small_cnn\n"])
def test_ours_misspelt_is_refused(text: str, own_place: Path) -> None:
    (own_place / "settings.ini").write_text(text)
    with pytest.raises(tl.SettingsError, match="settings.ini"):
        read_settings()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings_of_our_file(encoding: str, own_place: Path) -> None:
    (own_place / "settings.ini").write_bytes("[run]\r\nseed = 3\r\n[model]\r\nweights = é.pth\r\n".encode(encoding))
    if encoding == "utf-16-le": # without its mark nobody can tell
        with pytest.raises(tl.SettingsError, match="UTF-8"):
            read_settings()
    else:
        assert read_settings().seed == 3 and read_settings().weights == "é.pth"


VALUES = {
    "/a/my #1 weights; 100%.safetensors": "/a/my #1 weights; 100%.safetensors", '"small one.pth"': "small one.pth", "'x # y.pth'": "x # y.pth",
    "w.pth # the best": "w.pth", "w.pth ; the best": "w.pth", '"x ; y.pth"  # the best': "x ; y.pth", "“x.pth”": "x.pth", "~/w.pth": None, "#1.pth": "#1.pth",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_path_is_taken_whole(text: str, own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_place))
    (own_place / "settings.ini").write_text(f"[model]\nweights = {text}\n", encoding="utf-8")
    assert read_settings().weights == (VALUES[text] or str(own_place / "w.pth"))
    assert tl.Settings(weights="~/w.pth").weights == str(own_place / "w.pth")


def test_a_path_that_is_there_is_taken_whole(own_place: Path) -> None:
    (own_place / "my # weights ; old.pth").write_bytes(b"x")
    (own_place / "settings.ini").write_text("[model]\nweights = my # weights ; old.pth\n")
    assert read_settings().weights == "my # weights ; old.pth"


def test_values_of_other_knobs(own_place: Path) -> None:
    (own_place / "settings.ini").write_text("[run]\nseed = '7'\ndevice = \"cpu\" # here\n[model]\narch = \"small_cnn\"\n[train]\nlr=0.1 #fast\nepochs = 3;4\n")
    with pytest.raises(tl.SettingsError, match="epochs"):
        read_settings()
    text = (own_place / "settings.ini").read_text()
    (own_place / "settings.ini").write_text(text.replace("3;4", "3 ;4"))
    found = read_settings()
    assert (found.seed, found.device, found.arch, found.lr, found.epochs) == (7, "cpu", "small_cnn", 0.1, 3)


def test_a_near_miss_is_named(own_place: Path) -> None:
    with pytest.raises(tl.SettingsError, match="did you mean epochs"):
        read_settings(epoch=3)
    (own_place / "settings.ini").write_text("[run]\narch = small_cnn\n")
    with pytest.raises(tl.SettingsError, match=r"did you mean arch in \[model\]"):
        read_settings()


@pytest.mark.parametrize("value", [123, None, 1.5, True, ["a"], {"a": 1}, b"a", len, tl.Settings])
@pytest.mark.parametrize("knob", ["arch", "weights", "device", "augment"])
def test_a_text_setting_takes_text_only(knob: str, value: object) -> None:
    with pytest.raises(tl.SettingsError, match=knob):
        tl.Settings(**{knob: value})


def test_what_says_its_name_is_taken() -> None:
    import torch
    from torchvision.models import ResNet18_Weights

    assert tl.Settings(device=torch.device("cpu"), weights=ResNet18_Weights.IMAGENET1K_V1).weights == "IMAGENET1K_V1"
    assert tl.Settings(weights=Path("w.pth")).weights == "w.pth" and str(pick_device(torch.device("cpu"))) == "cpu"


@pytest.mark.parametrize("value", [None, 5, True, ["a"], {"cat": []}, "", b"", " ", "a\0b", object()])
def test_a_path_argument_is_named(value: object) -> None:
    with pytest.raises(tl.SettingsError, match=r"^folder.*; give a folder$"):
        as_path(value, "folder", remedy="give a folder")


def test_kinds_of_arguments(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_place))
    assert as_path("~/x", "folder") == own_place / "x" and as_path(Path("x"), "folder") == Path("x")
    assert of_kind(3, "epochs", kinds=int, remedy="give a number") == 3 and of_kind(True, "resume", kinds=bool, remedy="give True or False") is True
    with pytest.raises(tl.SettingsError, match="epochs = True is of type bool; give a number"):
        of_kind(True, "epochs", kinds=int, remedy="give a number")
    with pytest.raises(tl.SettingsError) as caught:
        of_kind(["x" * 1000] * 1000, "top", kinds=int, remedy="give a number")
    assert len(str(caught.value)) < 300


def test_a_working_folder_that_is_gone_is_named(own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_place / "gone").mkdir()
    monkeypatch.chdir(own_place / "gone")
    (own_place / "gone").rmdir()
    with pytest.raises(tl.SettingsError, match="working folder"):
        read_settings()
    os.chdir(own_place)
    assert read_settings().seed == 42


@pytest.mark.parametrize("kind", ["TLError", "SettingsError", "DataError", "ModelError", "DeviceError", "TrainingError"])
def test_errors_are_copied_and_sent(kind: str) -> None:
    error = getattr(tl, kind)("a: b; c")
    error.classifier = "kept"
    error.add_note("seen by a reader")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error) and str(again) == "a: b; c" and again.classifier == "kept" and again.__notes__ == error.__notes__

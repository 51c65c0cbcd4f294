"""The command line in miniature, without a process of its own."""

import json
from pathlib import Path

import pytest

from tl_tutorial import cli
from tl_tutorial.settings import DataError, SettingsError, TrainingError

SMALL = ("--arch", "small_cnn", "--size", "16", "--epochs", "1", "--device", "cpu")


def test_from_a_folder_to_answers(colours: Path, own_place: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", str(colours), "--out", "m.safetensors", *SMALL]) == 0
    rows = [json.loads(line) for line in (own_place / "m.history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and "saved m.safetensors" in capsys.readouterr().out
    assert cli.main(["evaluate", "m.safetensors", str(colours), "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["total"] == 36 and judged["classes"] == ["blue", "green", "red"]
    assert cli.main(["evaluate", "m.safetensors", str(colours)]) == 0 and "on 36 images" in capsys.readouterr().out
    assert cli.main(["predict", "m.safetensors", str(colours / "red"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 12 and all(row["probability"] == max(row["probabilities"].values()) for row in found)
    assert cli.main(["predict", "m.safetensors", str(colours / "red")]) == 0 and "11.png" in capsys.readouterr().out
    assert cli.main(["predict", "m.safetensors", str(colours / "red"), "--csv", "p.csv"]) == 0
    assert len((own_place / "p.csv").read_text().splitlines()) == 13 and "12 predictions in p.csv" in capsys.readouterr().out


def test_another_seed_gives_another_network(colours: Path, own_place: Path) -> None:
    for number, seed in enumerate(("1", "1", "2")):
        assert cli.main(["train", str(colours), "--out", f"{number}.safetensors", "--seed", seed, *SMALL]) == 0
    from tl_tutorial.checkpoints import read_file

    one, two, three = (read_file(f"{number}.safetensors")[0]["head.weight"] for number in range(3))
    assert one.equal(two) and not one.equal(three)


def test_exit_codes(colours: Path, own_place: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", str(colours)]) == 0 and "36 images, 3 classes" in capsys.readouterr().out
    (colours / "red" / "bad.png").write_bytes(b"x")
    assert cli.main(["check", str(colours)]) == 1 and "bad.png" in capsys.readouterr().err
    assert cli.main(["check", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err
    assert cli.main(["train", str(colours), "--out", "m.safetensors", "--resume", *SMALL]) == 2 and "--checkpoint" in capsys.readouterr().err
    assert cli.main(["train", str(colours), "--out", "no/m.safetensors", *SMALL]) == 2 and "no/m" in capsys.readouterr().err
    assert cli.main(["train", str(colours), "--out", "m.safetensors", *SMALL]) == 1 and "bad.png" in capsys.readouterr().err
    assert cli.main(["train", str(colours), "--out", "m.safetensors", "--on-bad", "skip", *SMALL]) == 0
    assert cli.main(["predict", "m.safetensors", str(colours / "red")]) == 1, "one could not be read"
    said = capsys.readouterr()
    assert "bad.png" in said.err and "11.png" in said.out
    for usage in (["train", str(colours)], ["fly"], []):
        with pytest.raises(SystemExit) as ended:
            cli.main(usage)
        assert ended.value.code == 2


def test_the_exit_code_of_an_interrupt_tells_its_signal() -> None:
    assert [cli._ended(error) for error in (KeyboardInterrupt(), KeyboardInterrupt(15), MemoryError(), SettingsError("a"), DataError("b"))] == [130, 143, 1, 2, 1]


def test_a_training_that_fails_before_it_learned_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("a: b; c")

    monkeypatch.setattr("tl_tutorial.fine_tuning.fine_tune", fail)
    assert cli.main(["train", "photos", "--out", "m.safetensors"]) == 1
    assert capsys.readouterr().err.splitlines() == ["tl-tutorial: a: b; c"] # no last good weights are promised

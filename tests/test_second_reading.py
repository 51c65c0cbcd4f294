"""Defects that a second reading of the code found, each with the input that showed it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_kernels import python
from PIL import Image

import tl_tutorial as tl
from tl_tutorial.batches import AUGMENTATIONS, Batches
from tl_tutorial.freezing import freeze, parameter_groups, unfreeze
from tl_tutorial.material import gather, merged
from tl_tutorial.pixels import load_pixels
from tl_tutorial.settings import SettingsError

QUICK = {"arch": "small_cnn", "epochs": 1, "size": 32, "device": "cpu", "progress": False}


def gathered(folder: Path, **knobs: object) -> tuple:
    settings = tl.read_settings(size=32, **knobs)
    return gather(folder, None, settings=settings, preprocess=tl.create("small_cnn", 3, weights="none").preprocess)


def test_one_thawed_part_trains_inside_a_frozen_body() -> None:
    network = tl.create("small_cnn", 3, weights="none")
    freeze(network.body)
    unfreeze(network.body[3])
    network.train()
    assert network.body[3].training and network.body[3][1].training
    assert not network.body.training and not any(part.training for part in network.body[0].modules())


def test_tokens_of_a_transformer_learn_and_it_says_its_size() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(1, 8, 1, 1))
            self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)
            self.fc = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc((self.second(self.first(x) + self.token)).mean((2, 3)))

    network = tl.create(Small(), 3)
    groups = parameter_groups(network, 1.0, decay_rate=0.5)
    tokens = next(group for group in groups if group["name"] == "0 tokens")
    assert tokens["params"][0] is network.body.token and tokens["peak"] == 0.5 and tokens["weight_decay"] == 0
    everything = {id(p) for group in groups for p in group["params"]}
    assert everything == {id(p) for p in network.parameters()}
    freeze(network.body.first)
    assert not any(group["name"] == "0 tokens" for group in parameter_groups(network, 1.0, decay_rate=0.5))
    assert tl.create("vit_b_16", 3, weights="none").preprocess.least == 224


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0", "small_cnn", "timm:resnet18"])
def test_unknown_weights_are_never_silently_random(arch: str) -> None:
    with pytest.raises(tl.ModelError, match="defualt.*(choose|leave)"):
        tl.create(arch, 3, weights="defualt")


def test_a_module_of_your_own_takes_no_second_weights(tmp_path: Path) -> None:
    (tmp_path / "some.pth").write_bytes(b"x")
    with pytest.raises(tl.ModelError, match="comes with its weights"):
        tl.create(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), 3, weights=str(tmp_path / "some.pth"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_split_that_is_a_link_is_not_followed(colours: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(colours, root / "valid")
    os.symlink(colours, root / "train")
    report = tl.check(root)
    assert any(p.kind == "link" and p.path.endswith("train") and p.severity == "error" for p in report.problems)
    assert {item.split for item in report.folder.items} == {"valid"}


def test_a_folder_beside_the_splits_is_told(colours: Path, tmp_path: Path) -> None:
    for name in ("train", "test", "extra"):
        shutil.copytree(colours, tmp_path / "root" / name)
    report = tl.check(tmp_path / "root")
    assert [p for p in report.problems if p.kind == "mixed" and p.path.endswith("extra") and p.severity == "error"]
    os.rename(colours / "red", colours / "train") # a class may be called train
    assert not [p for p in tl.check(colours).problems if p.kind == "mixed"]


def test_empty_files_are_no_twins_and_contradictions_are_no_mere_leaks(colours: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split in ("train", "valid"):
        shutil.copytree(colours, root / split)
        for file in (root / split / "red").iterdir():
            Image.fromarray(np.random.default_rng(len(split) * 100 + int(file.stem)).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
        (root / split / "red" / "none.png").write_bytes(b"")
    kinds = [p.kind for p in tl.check(root).problems if "none.png" in p.path]
    assert kinds == ["empty", "empty"]
    shutil.copy(root / "train/red/0.png", root / "valid/blue/other.png")
    assert [p.kind for p in tl.check(root).problems if p.path.endswith("other.png")] == ["two labels"]


def test_all_files_of_a_picture_with_two_labels_are_left_out(colours: Path) -> None:
    for place in ("red/a.png", "red/a.png.png", "blue/c.png"):
        shutil.copy(colours / "red/0.png", colours / place)
    material, _, _ = gathered(colours, on_bad="skip", valid_fraction=0.1)
    disputed = {"red/0.png", "red/a.png", "red/a.png.png", "blue/c.png"}
    names = {"/".join(Path(name).parts[-2:]) for name in material.names}
    assert len(material.images) + len(material.valid_images) == 35 and not names & disputed


def test_a_class_without_a_training_picture_is_named(colours: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split in ("train", "valid"):
        shutil.copytree(colours, root / split)
    for number, file in enumerate((root / "valid").rglob("*.png")):
        Image.fromarray(np.random.default_rng(1000 + number).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    for file in (root / "train/red").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(tl.DataError, match="class red has validation pictures, but no training picture"):
        gathered(root, on_bad="skip")


def test_a_folder_with_test_alone_and_a_validation_folder_is_refused(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "root" / "test")
    with pytest.raises(tl.DataError, match="no training pictures"):
        merged(tmp_path / "root", colours)


@pytest.mark.parametrize("shard", [(rank, world) for world in (2, 3, 4) for rank in range(world)])
@pytest.mark.parametrize("how", ["none", "light"])
def test_no_process_gets_an_empty_batch(shard: tuple[int, int], how: str) -> None:
    for count in range(4, 14):
        images = np.zeros((count, 8, 8, 3), np.uint8)
        seen = list(Batches(images, np.zeros(count), 8, 4, how=AUGMENTATIONS[how], shard=shard).epoch())
        assert all(len(batch.labels) for batch in seen) and sum(batch.total for batch in seen) == count


def test_more_processes_than_pictures_in_a_batch_are_refused(colours: Path) -> None:
    settings = tl.read_settings(size=32, batch_size=4)
    material, _, _ = gather(colours, None, settings=settings, preprocess=tl.create("small_cnn", 3, weights="none").preprocess, shard=(0, 5))
    with pytest.raises(tl.DeviceError, match="5 processes cannot share batches of 4"):
        material.train(settings)


@pytest.mark.parametrize("on_bad", ["Skip", "ignore"])
def test_on_bad_knows_two_words(on_bad: str) -> None:
    with pytest.raises(SettingsError, match="'error' or 'skip'"):
        load_pixels([np.zeros((9, 9, 3), np.uint8)], 8, on_bad=on_bad)


def test_a_missing_file_is_called_missing() -> None:
    from tl_tutorial.pixels import read_image

    with pytest.raises(tl.DataError, match=r"no-such\.jpg: there is no such file; check the path"):
        read_image("no-such.jpg")


@pytest.mark.parametrize(("knobs", "words"), [({"batch_size": -1}, "a finite number, 0 or more"), ({"tuned": 2}, "between 0 and 1")])
def test_limits_are_said_in_words(knobs: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        tl.Settings(**knobs)


def test_an_unknown_section_is_refused_also_when_empty(own_place: Path) -> None:
    (own_place / "settings.ini").write_text("[trian]\n")
    with pytest.raises(SettingsError, match=r"unknown section \[trian\]; there are run, data, model, train"):
        tl.read_settings()


def test_a_report_draws_what_it_allowed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        Image.new("L", (8000, 6500) if name == "a" else (20, 20)).save(tmp_path / "p" / name / "0.png", compress_level=1)
        Image.new("RGB", (20, 20), name == "a" and "red" or "blue").save(tmp_path / "p" / name / "1.png")
    assert tl.check(tmp_path / "p", max_megapixels=60).plot()


def test_problems_name_the_split_as_it_is_on_the_disk(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "root" / "train")
    shutil.copytree(colours / "red", tmp_path / "root" / "val" / "fox")
    unknown = next(p for p in tl.check(tmp_path / "root").problems if p.kind == "unknown class")
    assert Path(unknown.path) == tmp_path / "root" / "val" / "fox" and Path(unknown.path).is_dir()


def test_wrong_counts_and_shapes_are_refused_in_judging() -> None:
    from tl_tutorial.metrics import wilson

    with pytest.raises(ValueError, match="30 right of 20"):
        wilson(30, 20)
    for probabilities, labels in ((np.eye(4), [0, 1, 2, 2]), (np.zeros((0, 3)), [])):
        with pytest.raises(ValueError, match="one row for each label"):
            tl.evaluation(probabilities, labels, classes=("a", "b", "c"))
    assert "ROC-AUC –" in repr(tl.evaluation(np.eye(2)[[0, 0]], [0, 0], classes=("a", "b")))


def test_the_rate_finder_keeps_its_curve_when_a_rate_explodes(colours: Path) -> None:
    settings = tl.read_settings(size=32, optimizer="sgd", clip=0)
    network = tl.create("small_cnn", 3, weights="none")
    material, _, _ = gathered(colours)
    found = tl.find_rate(network, material.train(settings), settings=settings, low=1e-3, high=1e30, steps=8)
    assert 1 <= len(found.rates) < 8 and np.isfinite(found.losses).all()
    assert len(tl.find_rate(network, material.train(settings), settings=settings, steps=1).rates) == 1


def test_a_classifier_says_what_it_left_out_and_draws_epochs_only(colours: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = tl.fine_tune(colours, **QUICK)
    one.history.append({**one.history[-1], "stage": "mean of epochs"})
    assert len(one.plot().data["training"]) == len(one.history) - 1
    (colours / "red" / "0.png").write_bytes(b"no image")
    assert one.evaluate(colours, on_bad="skip").total == 35
    assert "left out" in caplog.text and "0.png" in caplog.text
    with pytest.raises(tl.DataError, match="0 pictures were given; explain takes one"):
        one.explain([])
    drawn = one.explain(colours / "blue" / "0.png")
    assert drawn.data["label"] == one.predict(colours / "blue" / "0.png")[0].label


def test_a_folder_that_cannot_be_forced_to_disk_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_tutorial.checkpoints import read_file, write_file

    real = os.fsync

    def refusing(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    write_file(tmp_path / "x.safetensors", {"a": torch.ones(2)}, metadata={"b": 1})
    assert read_file(tmp_path / "x.safetensors")[1] == {"b": 1}


def test_a_world_without_torchrun_is_one_sentence(colours: Path) -> None:
    code = f"import tl_tutorial as tl; tl.fine_tune({str(colours)!r}, arch='small_cnn', epochs=1, size=32, device='cpu')"
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([python(), "-c", code], env=keep | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=120)
    assert "DeviceError: WORLD_SIZE=2 asks for several processes" in done.stderr and "unset WORLD_SIZE" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize(("end", "code", "said"), [("| true", 0, ""), ("> /dev/full", 1, "No space left")])
def test_output_that_nobody_takes(colours: Path, end: str, code: int, said: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m tl_tutorial check {colours} {end}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and said in done.stderr and "Exception ignored" not in done.stderr


def test_bfloat16_is_taken_only_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_tutorial.inference import half_precision

    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: dtype)
    assert half_precision(torch.device("cuda"), tl.Settings()) == torch.float16 and asked == [False]



def test_a_softmax_behind_the_old_head_goes_with_it() -> None:
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    whole = torch.nn.Sequential(inner, torch.nn.Linear(8, 5), torch.nn.Softmax(1))
    network = tl.create(whole, 3)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(network.features(x), inner((x - 0.5) / 0.5))
    assert isinstance(whole[2], torch.nn.Softmax) # the caller's module stays as it is


def test_one_number_per_channel_is_not_pulled_to_zero() -> None:
    network = tl.create("convnext_tiny", 3, weights="none")
    scales = {id(p) for name, p in network.named_parameters() if name.endswith("layer_scale")}
    assert len(scales) == 18
    for group in parameter_groups(network, 1.0):
        assert not group["weight_decay"] or not scales & {id(p) for p in group["params"]}


def test_equal_files_stay_in_one_fold(tmp_path: Path) -> None:
    from tl_tutorial.folder import Item
    from tl_tutorial.recipes import cross_validate
    items = []
    for label in "ab":
        for number in range(12):
            path = tmp_path / f"{label}{number}.png"
            path.write_bytes(f"{label}{number // 2}".encode()) # two of each
            items.append(Item(path, label, ""))
    parts: list[tuple[list[Item], list[Item]]] = []
    assert len(cross_validate(items, lambda train, test: float(parts.append((train, test)) or 0), folds=3)) == 3
    for train, test in parts:
        assert not {item.path.read_bytes() for item in train} & {item.path.read_bytes() for item in test}
        assert len(train) + len(test) == len(items)
    assert sorted(item.path for _, test in parts for item in test) == sorted(item.path for item in items)


def test_a_state_is_not_taken_for_another_module(tmp_path: Path) -> None:
    def own(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 3))

    photos = tl.datasets.shapes(tmp_path / "photos", ("circle", "triangle"), per_class=8, size=32)
    tl.fine_tune(photos, checkpoint=tmp_path / "run", **QUICK | {"arch": own(8)})
    with pytest.raises(tl.ModelError, match="belongs to other pictures or settings"):
        tl.fine_tune(photos, checkpoint=tmp_path / "run", resume=True, **QUICK | {"arch": own(9)})


def test_a_cut_off_image_object_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(tl.DataError, match=r"cut\.png: damaged or cut off"):
        load_pixels([Image.open(tmp_path / "cut.png")], 32)
    with pytest.raises(tl.DataError, match="5 channels"):
        load_pixels([np.zeros((8, 8, 5), np.uint8)], 32)


def test_a_transparent_grey_of_16_bits_becomes_white(tmp_path: Path) -> None:
    grey = np.full((32, 32), 30000, np.uint16)
    grey[:16] = 0
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=0)
    found = load_pixels([tmp_path / "grey.png"], 32).images[0]
    assert (found[:14] == 255).all() and (found[18:] == round(30000 / 257)).all()


def test_an_unfinished_draft_leaves_nothing(tmp_path: Path) -> None:
    from tl_tutorial.datasets import write_folder
    with pytest.raises(IndexError):
        write_folder(np.zeros((2, 8, 8), np.uint8), [0, 7], classes=["a"], folder=tmp_path / "photos")
    assert list(tmp_path.iterdir()) == []


def test_dollar_signs_in_legends() -> None:
    from tl_tutorial.figures import curves, intervals
    assert curves({"$5 or $6": [1, 2]})._repr_png_()[:4] == b"\x89PNG"
    assert curves({r"$\frac$": [1, 2]})._repr_png_() and intervals({r"$\frac$": (0.5, 0.4, 0.6)})._repr_png_()

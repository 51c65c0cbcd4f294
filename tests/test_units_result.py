"""The result in miniature: what temperature, size, seed and state do to answers, files and explanations."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tl_tutorial as tl
from tl_tutorial.backbones import Network, Preprocess
from tl_tutorial.checkpoints import read_file, restore, store, write_file
from tl_tutorial.classifier import Classifier, Prediction, Predictions
from tl_tutorial.explaining import as_maps, grad_cam, nearest, overlay
from tl_tutorial.metrics import calibration_bins, calibration_error, evaluation, fit_temperature, softmax

CLASSES = ("blue", "green", "red")


def network(side: int = 0) -> Network:
    "A body that hands on the mean of each colour (side 0), or the pixels as maps; a head that tells the colours apart."
    body = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    body[0].weight.data = torch.eye(3)[:, :, None, None]
    found = Network(body, 3, 3, Preprocess((0.0,) * 3, (1.0,) * 3, least=8))
    found.head.weight.data = 9 * torch.eye(3).flip(0)
    return found.eval()


def classifier(temperature: float = 1.0) -> Classifier:
    return Classifier(network(), CLASSES, 16, tl.Settings(arch="custom"), temperature=temperature)


def expected(folder: Path, temperature: float) -> np.ndarray:
    "Probabilities worked out from the logits, without the classifier."
    logits, *_ = classifier().logits(sorted(folder.rglob("*.png")))
    return softmax(logits, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_reaches_predict(colours: Path, temperature: float) -> None:
    found = classifier(temperature).predict(sorted(colours.rglob("*.png")))
    assert np.allclose([list(p.probabilities.values()) for p in found], expected(colours, temperature))
    assert all(p.probability == max(p.probabilities.values()) == p.probabilities[p.label] for p in found)
    assert all(p.label == p.path.parent.name for p in found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_reaches_evaluate(colours: Path, temperature: float) -> None:
    found = classifier(temperature).evaluate(colours)
    labels = np.repeat(np.arange(3), 12)
    right = evaluation(expected(colours, temperature), labels, classes=CLASSES)
    assert found.loss == pytest.approx(right.loss) and found.ece == pytest.approx(right.ece) and found.accuracy == right.accuracy == 1
    assert abs(found.loss - evaluation(expected(colours, 2.0), labels, classes=CLASSES).loss) > 0.01


def test_everything_about_a_classifier_survives_its_file(tmp_path: Path) -> None:
    one = classifier(3.0)
    one.history, one.metrics, one.interrupted = [{"epoch": 0, "valid_loss": 0.5}], {"valid_accuracy": 0.75, "valid_total": 8}, True
    two = tl.load(one.save(tmp_path / "m.safetensors"), arch=network().body.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(3, 2)))
    for name in ("classes", "size", "settings", "history", "metrics", "temperature", "interrupted"):
        assert getattr(two, name) == getattr(one, name), name
    assert two.network.preprocess == one.network.preprocess and not two.network.training
    assert "0.750 right on 8 validation images" in repr(two) and "interrupted" in repr(two) and "16 pixels" in repr(two)


def test_prediction_and_evaluation_look_at_the_same_centre() -> None:
    "The middle 7/8 of a square picture count, its border does not."
    picture = np.zeros((160, 160, 3), np.uint8)
    picture[..., 0], picture[16:-16, 16:-16] = 255, (0, 0, 255)
    (found,) = classifier().predict(picture)
    assert found.label == "blue" and found.path is None
    inner = classifier().logits(picture)[0]
    assert np.allclose(inner, classifier().logits(np.where(np.indices((160, 160)).min(0)[..., None] < 4, 7, picture).astype(np.uint8))[0], atol=0.05)


def test_evaluate_takes_the_test_part_then_the_validation_part(colours: Path, tmp_path: Path) -> None:
    import shutil

    for split, names in (("train", range(12)), ("valid", range(5)), ("test", range(3))):
        for name in CLASSES:
            (tmp_path / "p" / split / name).mkdir(parents=True)
            for number in names:
                shutil.copy(colours / name / f"{number}.png", tmp_path / "p" / split / name)
    assert classifier().evaluate(tmp_path / "p").total == 9
    shutil.rmtree(tmp_path / "p" / "test")
    assert classifier().evaluate(tmp_path / "p").total == 15


def test_explain_points_at_the_evidence() -> None:
    "Blue stands in one corner only; the evidence for blue lies there and not elsewhere."
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[36:52, 36:52] = (0, 0, 255)
    picture[10:26, 10:26] = (255, 0, 0)
    for label, near, far in (("blue", (11, 11), (4, 4)), ("red", (4, 4), (11, 11))):
        drawn = classifier().explain(Image.fromarray(picture), label)
        assert drawn.data["heat"].shape == (16, 16) and drawn.data["label"] == label
        assert drawn.data["heat"][near] > 0.9 and drawn.data["heat"][far] < 0.1 and drawn.data["heat"].max() == pytest.approx(1)
    assert classifier().explain(Image.fromarray(picture)).data["label"] == classifier().predict(Image.fromarray(picture))[0].label


def test_grad_cam_weighs_maps_by_their_mean_gradient() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    heat = grad_cam(network(), images, target=0) # class 0 is blue, the third colour
    assert torch.allclose(heat, images[:, 2] / images[:, 2].amax((1, 2), keepdim=True), atol=1e-5)
    own = grad_cam(network(), images)
    best = network()(images).argmax(1)
    assert all(torch.allclose(own[k], grad_cam(network(), images[k:k + 1], target=int(best[k]))[0], atol=1e-5) for k in range(2))
    assert not any(part._forward_hooks for part in network().modules())


def test_overlay_and_nearest() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    warm = overlay(image, np.array([[0.0, 1.0], [0.5, 0.0]]))
    assert warm[0, 0].tolist() == [100] * 3 and warm[0, 1].tolist() == [179, 96, 30] and warm.dtype == np.uint8
    assert (warm[1, 0] > image[1, 0])[0] and warm[1, 0].tolist() != warm[0, 1].tolist()
    known = torch.tensor([[1.0, 0.0], [5.0, 5.0], [-1.0, 0.0], [0.0, 1.0]])
    places, values = nearest(torch.tensor([[2.0, 0.1], [0.0, 3.0]]), known, count=2)
    assert places.tolist() == [[0, 1], [3, 1]] and values[1, 0] == pytest.approx(1) and (values[:, 0] >= values[:, 1]).all()
    assert nearest(known, known, count=9)[0].shape == (4, 4) and nearest(known, known)[0].shape == (4, 4)


# Metrics worked out by hand


def test_calibration_of_ten_answers() -> None:
    probabilities = np.array([[0.95, 0.05]] * 4 + [[0.65, 0.35]] * 6)
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 1, 1, 1])
    confidence, accuracy, count = calibration_bins(probabilities, labels)
    assert np.allclose(confidence, [0.65, 0.95]) and np.allclose(accuracy, [0.5, 0.75]) and count.tolist() == [6, 4]
    assert calibration_error(probabilities, labels) == pytest.approx(0.6 * 0.15 + 0.4 * 0.2)
    assert calibration_bins(np.array([[1.0, 0.0]]), np.array([0]))[2].tolist() == [1], "a confidence of 1 belongs to the last bin"


def test_the_temperature_is_found_again() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=(4000, 3)) * 2
    labels = np.array([generator.choice(3, p=row) for row in softmax(true)])
    for temperature in (0.5, 2.0, 4.0):
        assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.1)
    assert fit_temperature(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2])) == pytest.approx(0.05, rel=0.05), "never without bound"


def test_an_evaluation_worked_out_by_hand() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2]])
    found = evaluation(probabilities, [0, 0, 1, 1], classes=("a", "b", "c"))
    assert found.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]] and found.accuracy == 0.75 and found.total == 4
    assert found.per_class["a"] == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2, "auc": 1})
    assert found.per_class["b"] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 0.8, "support": 2, "auc": 1})
    assert found.macro == pytest.approx({"precision": 5 / 6, "recall": 0.75, "f1": (2 / 3 + 0.8) / 2}), "a class that does not occur is left out"
    assert found.auc == 1 and np.isnan(found.per_class["c"]["auc"])
    assert found.loss == pytest.approx(-np.log([0.7, 0.4, 0.8, 0.6]).mean())
    assert found.as_dict()["per_class"]["c"]["auc"] is None and found.as_dict()["confusion"] == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


# Checkpoints


def test_the_newest_whole_state_is_restored(tmp_path: Path) -> None:
    assert restore(tmp_path / "none") is None
    for number in range(3):
        store(tmp_path / "run", {"a": torch.full((2,), float(number))}, metadata={"number": number})
    assert restore(tmp_path / "run")[1] == {"number": 2} and restore(tmp_path / "run")[0]["a"].tolist() == [2, 2]
    (tmp_path / "run" / "state.safetensors").write_bytes(b"cut off")
    assert restore(tmp_path / "run")[1] == {"number": 1}
    (tmp_path / "run" / "state.previous.safetensors").write_bytes(b"")
    with pytest.raises(tl.ModelError, match="damaged"):
        restore(tmp_path / "run")


def test_a_file_has_the_rights_that_the_user_gives_to_new_files(tmp_path: Path) -> None:
    for mask in (0o000, 0o027):
        before = os.umask(mask)
        try:
            write_file(tmp_path / "m.safetensors", {"a": torch.ones(2)}, metadata={})
            (tmp_path / "plain").write_text("x")
        finally:
            os.umask(before)
        assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "plain"], "no draft is left"
        (tmp_path / "plain").unlink()
        (tmp_path / "m.safetensors").unlink()


BAD = {"classes": [["a", "a", "b"], [1, 2, 3], []], "size": [7, 4097, "x"], "temperature": [0.0, 0.01, 100.0, float("nan")], "format": [2],
       "settings": [{"sed": 1}], "preprocess": [{"mean": 0.5}]}


@pytest.mark.parametrize("name", BAD)
def test_a_description_that_makes_no_sense_is_refused(name: str, tmp_path: Path) -> None:
    tensors, found = read_file(tl.fine_tune(colours_of(tmp_path), arch="small_cnn", epochs=0, size=8, progress=False).save(tmp_path / "m.safetensors"))
    for value in BAD[name]:
        write_file(tmp_path / "bad.safetensors", tensors, metadata=found | {name: value})
        with pytest.raises(tl.ModelError, match=r"bad\.safetensors: .*; (save it again|update)"):
            tl.load(tmp_path / "bad.safetensors")


def colours_of(place: Path) -> Path:
    for name in ("a", "b", "c"):
        (place / "p" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.random.default_rng([ord(name), number]).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place / "p" / name / f"{number}.png")
    return place / "p"


def test_what_cannot_be_judged_is_refused() -> None:
    for probabilities, labels in ((np.zeros((0, 3)), []), (np.eye(3), [0, 1]), (np.eye(3)[:, :2], [0, 1, 1])):
        with pytest.raises(ValueError, match="one row for each label"):
            evaluation(probabilities, labels, classes=("a", "b", "c"))
    for labels in ([0, 1, 3], [0, -1, 2]):
        with pytest.raises(ValueError, match="number them from 0"):
            evaluation(np.eye(3), labels, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        evaluation(np.full((1, 3), np.nan), [0], classes=("a", "b", "c"))


def test_predictions_are_a_table() -> None:
    found = Predictions([Prediction(Path("a long name.png"), "cat", 0.25, {"cat": 0.25}), Prediction(None, "dog", 0.5, {})])
    assert repr(found) == "a long name.png  0.250  cat\nimage 1          0.500  dog" and repr(Predictions()) == "no pictures"


def test_grad_cam_looks_with_finished_statistics_and_changes_none() -> None:
    learner = network()
    learner.body.append(nn.BatchNorm2d(3))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = grad_cam(learner.eval(), images, target=0)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert torch.equal(grad_cam(learner.train(), images, target=0), expected)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_what_belongs_to_other_pictures_is_no_map() -> None:
    assert as_maps(torch.zeros(3, 4, 7, 7), torch.zeros(2, 3, 224, 224)) is None
    assert as_maps(torch.zeros(2, 4, 7, 7), torch.zeros(2, 3, 224, 224)) is not None

"""The public contract: from a folder to a classifier, saved, loaded, judged, explained and exported."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tl_tutorial as tl

SMALL = {"arch": "small_cnn", "weights": "none", "size": 32, "progress": False}


@pytest.fixture
def classifier(colours: Path) -> "tl.Classifier":
    return tl.fine_tune(colours, epochs=6, **SMALL)


def test_fine_tune_on_real_weights(photos: Path) -> None:
    clf = tl.fine_tune(photos, epochs=1, size=96, progress=False)
    assert clf.classes == ("fruit", "tools", "vehicles") and [row["epoch"] for row in clf.history] == [0, 1]
    result = clf.evaluate(photos)
    assert result.total == 24 and result.accuracy >= 0.6
    assert result.interval[0] < result.accuracy <= result.interval[1]
    assert set(result.per_class) == set(clf.classes) and result.confusion.sum() == 24 and 0 <= result.ece <= 1


def test_same_seed_same_weights_another_seed_others(colours: Path) -> None:
    weights = [tl.fine_tune(colours, epochs=2, seed=seed, **SMALL).network.state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_it_learns_and_every_input_form_gives_an_answer(classifier: "tl.Classifier", colours: Path) -> None:
    assert classifier.evaluate(colours).accuracy > 0.9
    file = colours / "red" / "0.png"
    image = Image.open(file)
    for thing in (file, str(file), [file], image, np.asarray(image), image.convert("RGBA"), image.convert("P")):
        (answer,) = classifier.predict(thing)
        assert answer.label == "red" and answer.probability == max(answer.probabilities.values())
    assert len(classifier.predict(colours)) == 36
    assert {answer.path.parent.name for answer in classifier.predict([colours / "red", colours / "blue"])} == {"red", "blue"}
    assert len(classifier.predict(np.stack([np.asarray(image)] * 2))) == 2


def test_save_and_load_say_the_same(classifier: "tl.Classifier", colours: Path, tmp_path: Path) -> None:
    file = classifier.save(tmp_path / "m.safetensors")
    again = tl.load(file)
    assert again.classes == classifier.classes and again.settings == classifier.settings and again.history == classifier.history
    assert [p.probabilities for p in again.predict(colours)] == [p.probabilities for p in classifier.predict(colours)]


def test_onnx_agrees_within_1e_4(classifier: "tl.Classifier", tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = classifier.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(file))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = (classifier.network(images) / classifier.temperature).softmax(1).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - ours).max() < 1e-4
    kept = session.get_modelmeta().custom_metadata_map
    assert json.loads(kept["classes"]) == list(classifier.classes) and "0..1" in kept["preprocessing"]


def test_onnx_of_the_embedded_network(tmp_path: Path) -> None:
    "The first block of each stage, and one that repeats it: the exporter needs twice the time for the others, which are alike."
    onnxruntime = pytest.importorskip("onnxruntime")
    from tl_tutorial.classifier import Classifier

    network = tl.create("efficientnet_lite0", 3).eval()
    network.body.blocks = torch.nn.Sequential(*(network.body.blocks[number] for number in (0, 1, 2, 3, 5, 8, 11, 15)))
    clf = Classifier(network, ("a", "b", "c"), 96, tl.Settings())
    session = onnxruntime.InferenceSession(str(clf.export_onnx(tmp_path / "m.onnx")))
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = clf.network(images).softmax(1).numpy()
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - ours).max() < 1e-4 and np.ptp(ours) > 0.05


def test_explain_and_forms(classifier: "tl.Classifier", colours: Path) -> None:
    drawn = classifier.explain(colours / "red" / "0.png")
    assert drawn.data["heat"].shape == (32, 32) and drawn.data["label"] == "red"
    assert Image.open(io.BytesIO(drawn._repr_png_())).size[0] > 100
    for shown in (classifier, classifier.evaluate(colours), classifier.predict(colours), tl.check(colours)):
        assert "red" in repr(shown) and shown._repr_html_().count("<") >= 3
    with pytest.raises(tl.DataError, match="purple"):
        classifier.explain(colours / "red" / "0.png", label="purple")


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    for name in (evil, "plain"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng([number, len(name)]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{name[:4]}{number}.png")
    clf = tl.fine_tune(tmp_path / "p", epochs=1, **SMALL)
    for shown in (clf, clf.evaluate(tmp_path / "p"), clf.predict(tmp_path / "p"), tl.check(tmp_path / "p")):
        assert "<img src=x" not in shown._repr_html_()


def test_validation_folder_and_splits(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    for name in ("red", "green", "blue"):
        (tmp_path / "aside" / name).mkdir()
        for number in range(3):
            shutil.move(colours / name / f"{number}.png", tmp_path / "aside" / name)
    clf = tl.fine_tune(colours, tmp_path / "aside", epochs=1, **SMALL)
    assert clf.metrics["valid_total"] == 9


def test_a_module_of_your_own(colours: Path, tmp_path: Path) -> None:
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5))
    clf = tl.fine_tune(colours, arch=own, epochs=2, size=32, progress=False)
    file = clf.save(tmp_path / "own.safetensors")
    assert isinstance(own[4], torch.nn.Linear), "the caller's module stays as it is"
    with pytest.raises(tl.ModelError, match="arch="):
        tl.load(file)
    assert [p.label for p in tl.load(file, arch=own).predict(colours)] == [p.label for p in clf.predict(colours)]


@pytest.mark.parametrize("knobs", [{"loss": "mse"}, {"optimizer": "sgd", "lr": 0.05}, {"label_smoothing": 0.1}, {"class_weights": True}, {"cache_mb": 0}])
def test_options_train(colours: Path, knobs: dict) -> None:
    clf = tl.fine_tune(colours, epochs=3, **SMALL, **knobs)
    assert clf.history[-1]["train_loss"] < clf.history[1]["train_loss"]


def test_on_bad_skip_leaves_the_bad_file_out(colours: Path, caplog: pytest.LogCaptureFixture) -> None:
    (colours / "red" / "bad.jpg").write_text("not a picture")
    with pytest.raises(tl.DataError, match="bad.jpg"):
        tl.fine_tune(colours, epochs=1, **SMALL)
    clf = tl.fine_tune(colours, epochs=1, on_bad="skip", **SMALL)
    assert clf.classes == ("blue", "green", "red") and "bad.jpg" in caplog.text
    assert (colours / "red" / "bad.jpg").read_text() == "not a picture"


def test_digits_reach_97_percent() -> None:
    from dataclasses import replace

    from tl_tutorial.datasets import digits

    found = tl.scan(digits())
    train, test = tl.split(found.items, 0.25, seed=0)
    folder = replace(found, items=(*(replace(i, split="train") for i in train), *(replace(i, split="test") for i in test)))
    clf = tl.fine_tune(folder, arch="small_cnn", weights="none", size=16, epochs=4, progress=False)
    assert clf.evaluate(folder).accuracy >= 0.97

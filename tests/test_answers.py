"""What may be asked, what comes back, and how large it may become."""

import csv
import io
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tl_tutorial as tl
from tl_tutorial import figures
from tl_tutorial.answers import Prediction, Predictions, listed
from tl_tutorial.checkpoints import read_file, write_file
from tl_tutorial.figures import curves, intervals, lettered, matrix, show_images
from tl_tutorial.folder import scan
from tl_tutorial.metrics import evaluation


@pytest.fixture(scope="module")
def clf() -> tl.Classifier:
    torch.manual_seed(0)
    return tl.Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(10 * number + k).integers(0, 255, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    return tmp_path / "photos"


def forms(root: Path) -> dict:
    pd = pytest.importorskip("pandas")
    p = root / "cat" / "0.png"
    data, pixels = p.read_bytes(), np.asarray(Image.open(p))
    written = io.BytesIO()
    Image.open(p).save(written, "png") # stands at its end, as after writing
    chw = torch.from_numpy(pixels.copy()).movedim(2, 0)
    temporary = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    temporary.write(data)
    return {
        "str": str(p), "bytes path": os.fsencode(p), "PathLike": os.scandir(root / "cat"), "Path.glob": root.glob("cat/0.png"), "generator": (one for one in [p]),
        "set": {p}, "dict values": {1: p}.values(), "deque": deque([p]), "map": map(str, [p]), "Series": pd.Series([str(p)]), "Index": pd.Index([str(p)]),
        "array of str": np.array([str(p)]), "array of objects": np.array([p], object), "2-d array of str": np.array([[str(p)]]), "np.str_": np.str_(p),
        "bytes": data, "bytearray": bytearray(data), "memoryview": memoryview(data), "BytesIO": io.BytesIO(data), "BytesIO at its end": written,
        "open file": open(p, "rb"), "spooled file": temporary, "tensor CHW": chw, "tensor NCHW": chw[None], "tensor HWC": chw.movedim(0, 2), "tensor 0..1": chw / 255,
        "tensor with a gradient": (chw / 255).requires_grad_(), "array": pixels, "batch of arrays": pixels[None], "PIL": Image.open(p), "nested": [[[p]]],
        "item": next(item for item in scan(root).items if item.path == p), "prediction": Prediction(p, "cat", 1.0, {}),
    }


def test_pictures_in_every_form_give_the_same_answer(clf: tl.Classifier, root: Path) -> None:
    expected = clf.predict(root / "cat" / "0.png")[0].probability
    for name, thing in forms(root).items():
        first = clf.predict(thing)[0]
        assert first.probability == pytest.approx(expected, abs=2e-3), name
    assert len(clf.predict(scan(root))) == len(clf.predict(clf.predict(root))) == 6
    assert clf.predict([]) == [] and clf.predict(iter(())) == []


WRONG = {
    "None": (None, "NoneType"), "a number": (5, "of type int"), "a dict": ({"a": 1}, "give its values"), "a URL": ("https://example.com/a.jpg", "download it first"),
    "a URL in a Path": (Path("https://example.com/a.jpg"), "download it first"), "a bucket": ("s3://a/b.jpg", "download it first"), "an empty path": ("", "is empty"),
    "a NUL": ("a\0b.jpg", "NUL"), "a long name": ("x" * 5000, "no such file"), "text bytes": (b"hello", "5 bytes that are no image"), "no bytes": (b"", "0 bytes"),
    "text file": (io.StringIO("x"), "opened as text"), "closed file": ("CLOSED", "closed file"), "a pattern": ("photos/*/*.png", "no such file"),
    "normalised tensor": (torch.full((3, 9, 9), -2.0), "0..1"), "NaN tensor": (torch.full((3, 9, 9), float("nan")), "0..1"), "float array": (np.zeros((9, 9, 3)), "uint8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_named_and_can_be_left_out(name: str, clf: tl.Classifier, root: Path) -> None:
    thing, words = WRONG[name]
    if isinstance(thing, str) and thing == "CLOSED":
        with open(root / "cat" / "0.png", "rb") as thing:
            pass
    with pytest.raises(tl.DataError) as caught:
        clf.predict(thing)
    assert words in str(caught.value) and "; " in str(caught.value) and len(str(caught.value)) < 400
    found = clf.predict([root / "cat" / "0.png", thing, root / "dog" / "0.png"], on_bad="skip")
    assert len(found) == 2 and len(found.problems) == 1 and words in str(found.problems[0])


def test_a_data_frame_is_asked_for_its_column(clf: tl.Classifier, root: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"path": [str(root / "cat" / "0.png")]})
    with pytest.raises(tl.DataError, match="the one column that holds the paths"):
        clf.predict(frame)
    assert len(clf.predict(frame["path"])) == 1 # the remedy


def test_on_bad_knows_two_words_whatever_is_asked(clf: tl.Classifier) -> None:
    for things in ([], "gone.jpg", None):
        with pytest.raises(tl.SettingsError, match="choose 'error' or 'skip'"):
            clf.predict(things, on_bad="ignore")


def test_a_flood_of_answers_is_capped_and_says_so(clf: tl.Classifier) -> None:
    found = clf.predict([np.zeros((9, 9, 3), np.uint8)] * 3000)
    assert len(found) == 3000 and len(repr(found).splitlines()) == 21 and "2,980 more" in repr(found)
    assert found._repr_html_().count("<tr>") == 21 and "2,980 more" in found._repr_html_() and len(found._repr_html_()) < 5000
    assert len(found.text().splitlines()) == 3000
    bad = clf.predict(["gone.jpg"] * 3000, on_bad="skip")
    assert len(bad.problems) == 3000 and len(repr(bad).splitlines()) == 21 and bad._repr_html_().count("<li>") == 21
    few = Predictions(found[:60])
    assert len(repr(few).splitlines()) == 60 == few._repr_html_().count("<tr>") - 1 and "more" not in repr(few) + few._repr_html_()


def test_hundreds_of_classes_stay_small() -> None:
    n = 300
    result = evaluation(np.full((n, n), 1 / n), np.arange(n), classes=[f"item {k}" for k in range(n)])
    assert len(repr(result).splitlines()) < 30 and "300 classes" in repr(result) and len(result.per_class) == n
    began = time.process_time()
    drawn = result.plot()
    assert max(drawn.figure.get_size_inches()) <= 12 and drawn.data["counts"].shape == (n, n)
    drawn.figure.savefig(io.BytesIO(), dpi=72)
    assert len(result._repr_html_()) < 300_000 and time.process_time() - began < 20


def test_other_figures_have_their_caps() -> None:
    many = {f"series {k}": (0.5, 0.4, 0.6) for k in range(400)}
    assert max(intervals(many).figure.get_size_inches()) < 30 and len(intervals(many).data) == 400
    assert len(curves({name: [1, 2] for name in many}).figure.axes[0].get_legend().get_texts()) == 12
    tiles = show_images([np.zeros((4, 4), np.uint8)] * 500, columns=20)
    assert len(tiles.figure.axes) == 200 and "200 of 500" in tiles.figure.get_suptitle() and len(tiles.data["images"]) == 500
    assert len(matrix(np.eye(40), [str(k) for k in range(40)]).figure.axes[0].texts) == 40


NAMES = ("猫", "狗", "ไทย", "_x", "a$b_{c$", "n" * 200, "\x07")


def test_names_of_any_kind_are_drawn_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own) # no other font is installed
    labels, key, font = lettered(NAMES)
    assert labels[0] == "1" and key["1"] == "猫" and key["3"] == "ไทย" and key["7"] == "\x07" and labels[3] == "_x" and len(labels[5]) == 40 and font == {}
    rng = np.random.default_rng(0)
    probabilities = rng.random((40, 7))
    result = evaluation(probabilities / probabilities.sum(1, keepdims=True), rng.integers(0, 7, 40), classes=NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = result._repr_html_()
        figures_ = [result.plot(), curves({name: [1, 2] for name in NAMES}), intervals({name: (1, 0, 2) for name in NAMES}),
                    show_images([np.zeros((4, 4))] * 7, NAMES)]
        for drawn in figures_:
            assert drawn._repr_png_()[:4] == b"\x89PNG" and drawn.key["2"] == "狗" and "1 = 猫" in drawn._repr_html_()
    assert "1 = 猫" in html and "<td>猫</td>" in html
    box = figures_[0].figure.axes[0].get_window_extent()
    assert box.width > 120 # a long name does not eat the matrix
    assert matrix(np.eye(2), ["a", "b"])._repr_html_() is None


def test_a_font_that_has_the_letters_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager
    real = figures._has
    monkeypatch.setattr(figures, "_has", lambda file: frozenset({ord("猫")}) if "Mono" in file else real(file))
    wanted = [font for font in font_manager.fontManager.ttflist if font.name in ("DejaVu Sans", "DejaVu Sans Mono")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", wanted)
    labels, key, font = lettered(["猫"])
    assert labels == ["猫"] and key == {} and font["family"][-1] == "DejaVu Sans Mono"


def test_explain_and_predict_at_once(root: Path) -> None:
    clf = tl.Classifier(tl.create("small_cnn", 2, weights="none").eval(), ("cat", "dog"), 32, tl.Settings(arch="small_cnn", weights="none"))
    files = sorted(root.rglob("*.png"))
    alone = [clf.predict(file)[0].probability for file in files]
    heat = clf.explain(files[0]).data["heat"]
    import matplotlib as mpl
    before = dict(mpl.rcParams)
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            drawn = [pool.submit(clf.explain, files[0]) for _ in range(12)]
            said = [pool.submit(lambda: [clf.predict(file)[0].probability for file in files]) for _ in range(6)]
            assert all(job.result() == alone for job in said)
            assert all(np.allclose(job.result().data["heat"], heat) for job in drawn)
    finally:
        sys.setswitchinterval(old)
    assert dict(mpl.rcParams) == before and threading.active_count() < 20


def test_explain_takes_what_can_be_read_only_once(clf: tl.Classifier, root: Path) -> None:
    for thing in (io.BytesIO((root / "cat" / "0.png").read_bytes()), iter([root / "cat" / "0.png"]), (root / "cat" / "0.png").read_bytes()):
        assert clf.explain(thing).data["label"] == clf.predict(root / "cat" / "0.png")[0].label


@pytest.mark.parametrize("call", [
    lambda clf: clf.save(5), lambda clf: clf.save(None), lambda clf: clf.save(""), lambda clf: clf.save("a\0b"), lambda clf: clf.save(["a"]), lambda clf: clf.save("."),
    lambda clf: clf.export_onnx(None), lambda clf: clf.export_onnx("."), lambda clf: clf.evaluate(None), lambda clf: clf.evaluate(5), lambda clf: clf.evaluate(["a"]), lambda clf: clf.evaluate(""),
    lambda clf: tl.load(None), lambda clf: tl.load(True), lambda clf: tl.load("a\0b"), lambda clf: tl.load(""), lambda clf: tl.load("m", device=5), lambda clf: tl.load("m", arch="resnet18"),
])
def test_wrong_kinds_of_arguments_are_one_sentence(call: object, clf: tl.Classifier) -> None:
    with pytest.raises(tl.SettingsError) as caught:
        call(clf)
    assert "; " in str(caught.value) and os.listdir() == []


def test_bytes_and_long_names_as_paths(clf: tl.Classifier) -> None:
    assert tl.load(os.fsencode(clf.save(b"m.safetensors"))).classes == ("cat", "dog")
    for work in (lambda: tl.load("x" * 5000), lambda: clf.save("x" * 5000)):
        with pytest.raises(tl.TLError) as caught:
            work()
        assert len(str(caught.value)) < 500


CHANGES = {
    "one more setting": lambda d: {"settings": {**d["settings"], "mixup": 0.2}}, "a choice that is new": lambda d: {"settings": {**d["settings"], "optimizer": "lion"}},
    "an unknown network": lambda d: {"arch": "resnet2000"}, "one more preprocess": lambda d: {"preprocess": {**d["preprocess"], "crop": 0.9}}, "another format": lambda d: {"format": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_a_newer_version_says_so(name: str, clf: tl.Classifier) -> None:
    tensors, described = read_file(clf.save("m.safetensors"))
    write_file("n.safetensors", tensors, metadata={**described, **CHANGES[name](described), "versions": {"tl_tutorial": "9.10.0"}})
    with pytest.raises(tl.ModelError, match=r"^n\.safetensors: .*9\.10\.0.*; update tl_tutorial"):
        tl.load("n.safetensors")
    if name != "another format": # the same from this version is no reason to update
        write_file("n.safetensors", tensors, metadata={**described, **CHANGES[name](described)})
        with pytest.raises(tl.ModelError, match=r"^n\.safetensors: ") as caught:
            tl.load("n.safetensors")
        assert "update tl_tutorial" not in str(caught.value)
    write_file("n.safetensors", tensors, metadata={**described, "more": 1, "versions": {"tl_tutorial": "9.10.0"}})
    assert tl.load("n.safetensors").classes == clf.classes # one more field harms nobody


def test_listed_gives_what_a_folder_held_besides(root: Path) -> None:
    (root / "cat" / "a.heic").write_bytes(b"x")
    items, problems = listed([root, root / "cat" / "0.png"])
    assert len(items) == 7 and [Path(p.path).name for p in problems] == ["a.heic"]


@pytest.mark.parametrize("kind", ["ico", "tga", "pcx"])
def test_bytes_are_opened_as_the_formats_that_are_read_and_as_no_other(kind: str) -> None:
    written = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(written, kind)
    items, left = listed([written.getvalue()], "skip", max_megapixels=50)
    assert not items and "no image which can be read" in str(left[0])


@pytest.mark.parametrize("pattern", ["photos/*.jpg", "photos/?.jpg", "photos/cat/*"])
def test_a_pattern_that_no_shell_has_expanded_is_called_one(pattern: str) -> None:
    _, left = listed([pattern], "skip", max_megapixels=50)
    assert "the files that the pattern means" in str(left[0])
    assert "the pattern" not in str(listed(["photos/gone.jpg"], "skip", max_megapixels=50)[1][0])


@pytest.mark.parametrize("name", ["=1+1", " =1+1", "\t=1", "\tplain", "\u3000@sum", "+1", "-2", "@a", "plain", " plain", "a=b"])
def test_what_a_spreadsheet_would_run_is_guarded_also_behind_spaces(name: str) -> None:
    from tl_tutorial.answers import table

    cells = {"path": Prediction(Path(name), "cat", 1.0, {}), "label": Prediction(None, name, 1.0, {})}
    for column, guard in (("path", "./"), ("label", "'")):
        row, = csv.DictReader(io.StringIO(table(Predictions([cells[column]]))))
        assert row[column] == (name if name in ("plain", " plain", "a=b") else guard + name)

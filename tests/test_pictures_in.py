"""Pictures as they come in: formats, files that are something else, damage that decodes, deep pixels, limits of Pillow, full disks."""

import copy
import io
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import tl_tutorial as tl
from tl_tutorial import opening, pixels
from tl_tutorial.entries import Problem, find_images
from tl_tutorial.facts import inspect
from tl_tutorial.folder import Item
from tl_tutorial.formats import content, endings, jpeg_damage
from tl_tutorial.opening import look
from tl_tutorial.pixels import ImageProblem, load_pixels, read_image

NOISE = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE).resize((12, 9)).resize((400, 300), Image.Resampling.BICUBIC)


def encoded(kind: str, image: Image.Image = SMOOTH, **options: object) -> bytes:
    room = io.BytesIO()
    image.save(room, kind, **options)
    return room.getvalue()


def kinds(file: Path) -> list[str]:
    "What `check` says of a file."
    return [problem.kind for problem in inspect(Item(file, "cat")).problems]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


ENDINGS = {"JPEG": (".jpg", ".JPE", ".jfif", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp", ".dib"), "GIF": (".gif",), "TIFF": (".tif", ".TIFF"),
           "AVIF": (".avif",), "JPEG2000": (".jp2", ".j2k", ".jpx"), "PPM": (".ppm", ".pnm")}


def skip_unwritable(kind: str) -> None:
    "Pillow has AVIF since version 11.3, and not in every build."
    Image.init()
    if kind == "AVIF" and kind not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")


@pytest.mark.parametrize(("kind", "ending"), [(kind, ending) for kind, found in ENDINGS.items() for ending in found])
def test_formats_are_listed_read_and_checked(kind: str, ending: str, photos: Path) -> None:
    skip_unwritable(kind)
    file = photos / "cat" / f"x{ending}"
    file.write_bytes(encoded(kind))
    assert np.abs(np.asarray(read_image(file)).astype(int) - np.asarray(SMOOTH)).mean() < (12 if kind == "GIF" else 6)
    report = tl.check(photos)
    assert report.ok and report.counts["cat"] == 4 and not [p for p in report.problems if p.path == str(file)]
    wrong = photos / "cat" / ("y.png" if kind != "PNG" else "y.jpg")
    wrong.write_bytes(encoded(kind, SMOOTH.rotate(180)))
    problem, = (p for p in tl.check(photos).problems if p.path == str(wrong))
    right = wrong.with_suffix(problem.remedy.rpartition(" ")[2])
    wrong.rename(right) # the remedy works
    assert problem.kind == "wrong suffix" and not [p for p in tl.check(photos).problems if p.path == str(right)]


@pytest.mark.parametrize("kind", [*ENDINGS, "progressive"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("switch", [False, True])
def test_cut_files_are_refused_whatever_another_library_switched_on(kind: str, share: float, switch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unwritable(kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", switch)
    data = encoded("JPEG", progressive=True) if kind == "progressive" else encoded(kind)
    (tmp_path / "x.png").write_bytes(data[:int(len(data) * share)])
    with pytest.raises(ImageProblem):
        read_image(tmp_path / "x.png")
    with pytest.raises(ImageProblem):
        load_pixels([tmp_path / "x.png"], 32)
    assert set(kinds(tmp_path / "x.png")) <= {"damaged", "not an image"} and kinds(tmp_path / "x.png")
    assert switch is ImageFile.LOAD_TRUNCATED_IMAGES


def test_switches_of_pillow_are_put_back_also_among_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded("JPEG")
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    found = load_pixels([tmp_path / "whole.jpg", tmp_path / "cut.jpg"] * 50, 32, on_bad="skip")
    assert len(found.kept) == len(found.problems) == 50 and ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(tmp_path / "cut.jpg") as cut, pytest.raises(ImageProblem):
        load_pixels([cut], 32)
    assert ImageFile.LOAD_TRUNCATED_IMAGES and opening.SWITCHES.readers == 0 and threading.active_count() >= 1


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"optimize": True}, {"restart_marker_rows": 2}, {"subsampling": 0}, {"grey": True}, {"cmyk": True}], ids=str)
@pytest.mark.parametrize("share", [0.34, 0.5, 0.8])
@pytest.mark.parametrize("at_least", [0, 64])
def test_a_jpeg_cut_and_closed_is_refused(options: dict, share: float, at_least: int, tmp_path: Path) -> None:
    image = SMOOTH.convert("L") if "grey" in options else SMOOTH.convert("CMYK") if "cmyk" in options else SMOOTH
    data = encoded("JPEG", image, **{key: value for key, value in options.items() if key not in ("grey", "cmyk")})
    start = data.rfind(b"\xff\xda")
    (tmp_path / "x.jpg").write_bytes(data[:start + int((len(data) - start) * share)] + b"\xff\xd9")
    with pytest.raises(ImageProblem, match="cut off, and closed"):
        read_image(tmp_path / "x.jpg", at_least=at_least)
    assert kinds(tmp_path / "x.jpg") == ["damaged"]
    (tmp_path / "whole.jpg").write_bytes(data)
    assert kinds(tmp_path / "whole.jpg") == [] and jpeg_damage(data) == ("", "")


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_pictures_are_no_damage(options: dict, mode: str, tmp_path: Path) -> None:
    wall = Image.new(mode, (300, 200), 128 if mode == "L" else (128, 128, 128))
    half = SMOOTH.convert(mode)
    half.paste(wall, (0, 150))
    flat = Image.new(mode, (2000, 2000), 255 if mode == "L" else "white")
    for number, image in enumerate((wall, half, flat)):
        image.save(tmp_path / f"{number}.jpg", **options)
        assert read_image(tmp_path / f"{number}.jpg").size == image.size and "damaged" not in kinds(tmp_path / f"{number}.jpg")


def test_a_hole_of_zero_bytes_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded("JPEG", Image.fromarray(NOISE), exif=b"Exif\0\0" + bytes(5000)))
    (tmp_path / "x.jpg").write_bytes(data)
    assert kinds(tmp_path / "x.jpg") == [] # zeros in a note are none of our business
    data[-5000:-2000] = bytes(3000)
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageProblem, match="hole of zero bytes"):
        read_image(tmp_path / "x.jpg")


def test_a_progressive_jpeg_without_its_last_passes_is_told(tmp_path: Path) -> None:
    data = encoded("JPEG", Image.fromarray(NOISE), progressive=True)
    (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    assert kinds(tmp_path / "x.jpg") in (["blurred"], ["damaged"])
    (tmp_path / "whole.jpg").write_bytes(data)
    assert kinds(tmp_path / "whole.jpg") == []


def test_scaled_decoding_gives_the_same_verdicts(tmp_path: Path) -> None:
    big = SMOOTH.resize((1600, 1200))
    for number, options in enumerate(({}, {"progressive": True}, {"restart_marker_rows": 1})):
        data = encoded("JPEG", big, **options)
        for share in (*np.linspace(0.02, 0.99, 13), 1.0):
            file = tmp_path / f"{number}.jpg"
            file.write_bytes(data[:int(len(data) * share)])
            verdicts = []
            for at_least in (0, 128):
                try:
                    verdicts.append(look(file, at_least=at_least).size)
                except ImageProblem as problem:
                    verdicts.append(problem.kind)
            assert verdicts[0] == verdicts[1] and (verdicts[0] == (1600, 1200)) == (share == 1.0)


SAID = {
    "pdf": (b"%PDF-1.7 x", "PDF"), "mp4": (b"\0\0\0\x20ftypisom" + bytes(99), "video"), "mov": (b"\0\0\0\x14ftypqt  " + bytes(99), "QuickTime"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS.*git lfs pull"), "html": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "html 2": (b"\xef\xbb\xbf\n <HTML><body>", "HTML"), "xml": (b"<?xml version='1.0'?><Error>", "XML"), "svg": (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"), "zip": (b"PK\3\4" + bytes(50), "ZIP.*unpack"),
    "json": (b'{"error": "quota"}', "JSON"), "gzip": (b"\x1f\x8b\x08" + bytes(9), "gzip"), "psd": (b"8BPS\0\1", "Photoshop"), "icon": (b"\0\0\1\0\1\0", "icon"), "jxl": (b"\xff\x0a" + bytes(9), "JPEG XL"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"), "fits": (b"SIMPLE  =     T", "FITS"), "dicom": (bytes(128) + b"DICM", "DICOM"), "npy": (b"\x93NUMPY\1\0", "NumPy"), "text": (b"hello world", "begins with 'hello world'"),
    "zeros": (bytes(5000), "zero bytes.*copy the file again"), "cr2": (b"II*\0\x10\0\0\0CR\2\0", "raw"), "annex": (b"/annex/objects/SHA256E-s1\n", "git-annex"), "dvc": (b"outs:\n- md5: 1\n", "DVC"),
    "apple double": (b"\0\5\x16\7\0\2\0\0", "macOS"), "avi": (b"RIFF\0\0\0\0AVI LIST", "AVI"), "exe": (b"MZ\x90\0", "program"), "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "damaged JPEG"), "noise": (b"\x91\x82\x93\x01\x02", "no known format"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC.*pip install pillow-heif"), "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC"), "bm text": (b"BMW is a car", "begins with"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_file_is_called_what_it_is(name: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for package in ("pillow_heif", "pi_heif"):
        monkeypatch.setitem(sys.modules, package, None)
    data, words = SAID[name]
    file = photos / "cat" / "x.jpg"
    file.write_bytes(data)
    with pytest.raises(ImageProblem, match=words) as caught:
        read_image(file)
    assert caught.value.kind == "not an image" and "on_bad='skip'" in caught.value.remedy and str(caught.value).isprintable()
    assert content(data)[0] in caught.value.why and not tl.check(photos).ok


def test_the_plug_in_for_heic_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A stand-in for pillow-heif, which decodes to red."
    class Red(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode, self.tile = (64, 64), "RGB", []

        def load(self) -> object:
            self.im = Image.new("RGB", self.size, "red").im
            return Image.Image.load(self)

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    Image.OPEN.pop("HEIF", None)
    (tmp_path / "x.heic").write_bytes(SAID["heic"][0])
    passed: list[Problem] = []
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    assert find_images(tmp_path, passed) == [] and [p.kind for p in passed] == ["format"] and "pillow-heif" in passed[0].remedy
    plug_in = types.ModuleType("pillow_heif")
    plug_in.register_heif_opener = lambda: Image.register_open("HEIF", Red, lambda head: head[4:8] == b"ftyp")
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    assert [path.name for path in find_images(tmp_path)] == ["x.heic"] and ".heic" in endings()
    assert read_image(tmp_path / "x.heic").getpixel((3, 3)) == (255, 0, 0) and kinds(tmp_path / "x.heic") == ["blank"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_our_limit_and_not_pillows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(encoded(kind))
    for limit in (1000, 60_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_image(tmp_path / "x").size == SMOOTH.size and limit == Image.MAX_IMAGE_PIXELS
    for limit in (1000, 89478485, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageProblem, match="more than 0.1 million") as caught:
            read_image(tmp_path / "x", 0.1)
        assert caught.value.kind == "too large"


def test_the_remedy_for_large_pictures_works(photos: Path, own_place: Path) -> None:
    SMOOTH.save(photos / "cat" / "large.png")
    (own_place / "settings.ini").write_text("[data]\nmax_megapixels = 0.1\n")
    settings = {"arch": "small_cnn", "weights": "none", "size": 32, "epochs": 0, "progress": False}
    with pytest.raises(tl.DataError, match="large.png.*raise max_megapixels in settings.ini"):
        tl.fine_tune(photos, **settings)
    (own_place / "settings.ini").write_text("[data]\nmax_megapixels = 0.2\n")
    clf = tl.fine_tune(photos, **settings)
    assert len(clf.predict(photos / "cat" / "large.png")) == 1


def grey(values: np.ndarray, path: Path, **options: object) -> tuple[int, list[str]]:
    "The first grey value of an array saved as TIFF, and what check says."
    Image.fromarray(values).save(path, **options)
    return int(np.asarray(read_image(path))[0, 0, 0]), kinds(path)


@pytest.mark.parametrize(("value", "top", "kind", "shown", "doubt"), [
    (32896, 65535, np.uint16, 128, False), (2000, 4000, np.uint16, 8, True), (100, 200, np.uint16, 0, True), (0, 0, np.uint16, 0, False), (0.5, 1.0, np.float32, 128, False),
    (0.25, 0.9, np.float32, 64, False), (100, 255, np.float32, 100, True), (100, 255, np.int32, 100, True), (32896, 65535, np.int32, 128, True)], ids=str)
def test_one_rule_for_each_kind_of_pixel(value: float, top: float, kind: type, shown: int, doubt: bool, tmp_path: Path) -> None:
    values = np.full((60, 60), top, kind)
    values[:30] = value
    found, said = grey(values, tmp_path / "x.tif")
    assert found == shown and ("depth" in said) == doubt
    if kind != np.int32: # Pillow reads no such file the other way round
        turned, _ = grey(values, tmp_path / "y.tif", tiffinfo={262: 0}) # white is zero
        assert abs(turned - (255 - shown)) <= 1


@pytest.mark.parametrize("values", [np.full((9, 9), 300, np.float32), np.full((9, 9), -1, np.float32), np.full((9, 9), np.nan, np.float32), np.full((9, 9), 70000, np.int32), np.full((9, 9), -5, np.int32)], ids=str)
def test_values_without_a_meaning_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ImageProblem, match="save it as 8-bit or 16-bit"):
        read_image(tmp_path / "x.tif")


def alpha(mode: str, visible: int) -> Image.Image:
    image = Image.fromarray(NOISE).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(NOISE.shape[0] * NOISE.shape[1]).reshape(NOISE.shape[:2]) < visible, 255, 0).astype(np.uint8)))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_transparency_hides_is_told(mode: str, tmp_path: Path) -> None:
    for visible, said in ((0, "wholly transparent"), (50, "nearly wholly transparent"), (6000, "")):
        alpha(mode, visible).save(tmp_path / "x.png")
        found = [p for p in inspect(Item(tmp_path / "x.png", "cat")).problems if p.kind == "transparent"]
        assert (found[0].why.startswith(said) if said else not found) and all(p.severity == "warning" for p in found)


USELESS = {"dark": (0, 0, 0), "light": (255, 255, 255), "blank": (200, 30, 60)}


@pytest.mark.parametrize("kind", USELESS)
@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_pictures_that_show_nothing_are_told(kind: str, noise: int, ending: str, tmp_path: Path) -> None:
    values = np.full((200, 300, 3), USELESS[kind], int) + np.random.default_rng(0).integers(-noise, noise + 1, (200, 300, 3))
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(tmp_path / f"x.{ending}")
    assert kinds(tmp_path / f"x.{ending}") == [kind]
    drawn = Image.open(tmp_path / f"x.{ending}").convert("RGB")
    drawn.paste((90, 160, 120), (40, 40, 120, 120))
    drawn.save(tmp_path / "y.png")
    assert kinds(tmp_path / "y.png") == []


@pytest.mark.parametrize(("size", "said"), [((20000, 10), ["odd shape"]), ((4000, 120), ["odd shape"]), ((120, 4000), ["odd shape"]), ((300, 100), []), ((5000, 1), ["tiny"])])
def test_strips_are_told(size: tuple[int, int], said: list[str], tmp_path: Path) -> None:
    Image.fromarray(NOISE).resize(size).save(tmp_path / "x.png")
    assert kinds(tmp_path / "x.png") == said


def failing(path: str) -> None:
    read_image(path)


def test_an_image_problem_crosses_processes(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nonsense")
    with pytest.raises(ImageProblem) as caught:
        read_image(tmp_path / "bad.jpg")
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value), copy.deepcopy(caught.value)):
        assert type(again) is ImageProblem and str(again) == str(caught.value) and vars(again) == vars(caught.value)
    found = load_pixels([tmp_path / "bad.jpg"], 9, on_bad="skip")
    assert str(pickle.loads(pickle.dumps(found)).problems[0]) == str(caught.value)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool, pytest.raises(ImageProblem, match=r"bad\.jpg"):
        pool.submit(failing, str(tmp_path / "bad.jpg")).result(timeout=60)


def test_home_is_expanded_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    SMOOTH.save(tmp_path / "x.png")
    assert read_image("~/x.png").size == SMOOTH.size


@pytest.mark.parametrize("name", ["a folder", "a pipe", "nothing", "a\0b"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    os.mkfifo(tmp_path / "a pipe")
    with pytest.raises(ImageProblem) as caught:
        read_image(tmp_path / name)
    assert caught.value.remedy and str(caught.value).isprintable()


SQUARES = [np.full((40, 40, 3), number % 255, np.uint8) for number in range(300)]


@pytest.mark.parametrize("preallocated", [True, False])
def test_a_full_disk_is_one_sentence(preallocated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    if not preallocated: # as on macOS
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(tl.DeviceError, match="MB of pixels .*; free some space, set cache_dir .*TMPDIR .*cache_mb"):
            load_pixels(SQUARES, 32, budget_mb=0, cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_pixels(SQUARES, 32, budget_mb=100).images.shape == (300, 32, 32, 3) # the remedies work
    assert (load_pixels(SQUARES, 32, budget_mb=0, cache_dir=tmp_path).images[7] == 7).all() and not list(tmp_path.iterdir())


def test_the_place_of_the_pixels_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, photos: Path) -> None:
    with caplog.at_level(logging.INFO, "tl_tutorial"):
        load_pixels(SQUARES, 32, budget_mb=0, cache_dir=tmp_path)
    assert str(tmp_path) in caplog.text
    with pytest.raises(tl.DeviceError, match="nowhere"):
        tl.fine_tune(photos, arch="small_cnn", weights="none", size=32, epochs=0, progress=False, cache_mb=0, cache_dir=str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    caplog.clear()
    with caplog.at_level(logging.INFO, "tl_tutorial"):
        load_pixels(SQUARES, 32, budget_mb=0)
    assert str(tmp_path) in caplog.text


def test_a_place_in_memory_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "/dev/x / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n")
    with caplog.at_level(logging.WARNING, "tl_tutorial"):
        pixels._tell("/dev/shm", 2**28)
        pixels._tell("/home", 2**28)
        pixels._tell("/dev/shm", 2**20)
    assert len(caplog.records) == 1 and "lies in memory" in caplog.text and "TMPDIR" in caplog.text

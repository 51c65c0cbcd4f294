"""Files that are broken, odd or hostile: each is read as stated pixels, or refused by name. Nothing is changed."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tl_tutorial.pixels import ImageProblem, load_pixels, read_image, shown

NOISE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def encoded(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    "A PNG that claims a size, with hardly any data behind it."
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def wrong_crc() -> bytes:
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "A" * 20_000_000, zip=True)
    return encoded("PNG", pnginfo=info)


JPEG, PNG = encoded("JPEG"), encoded("PNG")
REFUSED: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "jpeg cut at 10 %": ("a.jpg", JPEG[: len(JPEG) // 10], "damaged|not an image"),
    "jpeg cut at 50 %": ("a.jpg", JPEG[: len(JPEG) // 2], "damaged"),
    "jpeg cut at 90 %": ("a.jpg", JPEG[: len(JPEG) * 9 // 10], "damaged"),
    "png cut at 50 %": ("a.png", PNG[: len(PNG) // 2], "damaged"),
    "png cut at 90 %": ("a.png", PNG[: len(PNG) * 9 // 10], "damaged"),
    "no bytes": ("a.jpg", b"", "empty"),
    "text": ("a.jpg", b"hello world", "not an image"),
    "a web page": ("a.png", b"<!doctype html><html></html>", "not an image"),
    "wrong checksum": ("a.png", wrong_crc, "damaged"),
    "100 megapixel png": ("a.png", png_header(10_000, 10_000), "too large"),
    "200 megapixel png": ("a.png", png_header(20_000, 10_000), "too large"),
    "text-chunk bomb": ("a.png", text_bomb, "damaged|not an image"),
    "fits": ("a.png", b"SIMPLE  =                    T" + b" " * 2850, "not an image"),
    "postscript": ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not an image"),
    "svg": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "zero wide": ("a.png", png_header(0, 10), "damaged|not an image"),
    "tiff that loops": ("a.tif", b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00", "damaged|not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    file, data, kinds = REFUSED[name]
    data = data() if callable(data) else data
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ImageProblem) as caught:
        read_image(tmp_path / file)
    assert caught.value.kind in kinds.split("|") and file in str(caught.value) and caught.value.remedy
    assert (tmp_path / file).read_bytes() == data


def grey(value: int) -> Image.Image:
    return Image.new("L", (20, 20), value)


def two_frames(kind: str) -> bytes:
    return encoded(kind, Image.new("RGB", (20, 20), "red"), save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")])


def with_alpha(mode: str) -> Image.Image:
    "Fully transparent, with black hidden underneath."
    return Image.new("RGBA", (20, 20), (0, 0, 0, 0)).convert(mode)


def palette_with_transparency() -> bytes:
    return encoded("PNG", Image.new("P", (20, 20), 0), transparency=0)


READ: dict[str, tuple[str, bytes | Callable[[], bytes], tuple[int, int, int]]] = {
    "png named jpg": ("a.jpg", encoded("PNG", Image.new("RGB", (20, 20), (10, 20, 30))), (10, 20, 30)),
    "jpeg named png": ("a.png", encoded("JPEG", grey(90)), (90, 90, 90)),
    "16-bit grey": ("a.png", lambda: encoded("PNG", Image.fromarray(np.full((20, 20), 257 * 77, np.uint16))), (77, 77, 77)),
    "1-bit": ("a.png", encoded("PNG", Image.new("1", (20, 20), 1)), (255, 255, 255)),
    "cmyk": ("a.jpg", encoded("JPEG", Image.new("CMYK", (20, 20), (0, 0, 0, 0)), quality=95), (255, 255, 255)),
    "palette": ("a.png", encoded("PNG", Image.new("RGB", (20, 20), (200, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)), (200, 0, 0)),
    "palette with transparency": ("a.png", palette_with_transparency, (255, 255, 255)),
    "grey with alpha": ("a.png", encoded("PNG", with_alpha("LA")), (255, 255, 255)),
    "rgba": ("a.png", encoded("PNG", with_alpha("RGBA")), (255, 255, 255)),
    "half transparent": ("a.png", encoded("PNG", Image.new("RGBA", (20, 20), (0, 0, 0, 128))), (127, 127, 127)),
    "floating-point tiff": ("a.tiff", encoded("TIFF", Image.fromarray(np.full((20, 20), 0.5, np.float32))), (128, 128, 128)),
    "progressive": ("a.jpg", encoded("JPEG", grey(60), progressive=True), (60, 60, 60)),
    "animated gif": ("a.gif", lambda: two_frames("GIF"), (255, 0, 0)),
    "animated png": ("a.png", lambda: two_frames("PNG"), (255, 0, 0)),
    "one pixel": ("a.png", encoded("PNG", Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "1 x 5000": ("a.png", encoded("PNG", Image.new("RGB", (1, 5000), (9, 9, 9))), (9, 9, 9)),
    "bmp": ("a.bmp", encoded("BMP", Image.new("RGB", (20, 20), (5, 6, 7))), (5, 6, 7)),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_stated_pixels(name: str, tmp_path: Path) -> None:
    file, data, expected = READ[name]
    (tmp_path / file).write_bytes(data() if callable(data) else data)
    image = read_image(tmp_path / file)
    assert image.mode == "RGB" and np.abs(np.asarray(image)[0, 0].astype(int) - expected).max() <= 1
    assert load_pixels([tmp_path / file], 32).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    "Each of the eight orientations gives the same upright picture."
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = PICTURE.transpose(back[orientation]) if orientation > 1 else PICTURE
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "a.png")) == NOISE).all()


def test_huge_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00" + b"\xff" * 60_000)
    assert read_image(tmp_path / "a.jpg").size == (80, 60)


def test_a_bomb_costs_no_memory_and_no_time(tmp_path: Path) -> None:
    import resource
    import time

    (tmp_path / "a.png").write_bytes(png_header(9_000, 9_000))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ImageProblem, match="81|9000"):
        read_image(tmp_path / "a.png")
    assert time.perf_counter() - began < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("name", ["line\nbreak.png", "bell\x07.png", "é" * 120 + ".png", "\x1b[31mred.png"])
def test_strange_names_are_shown_on_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ImageProblem) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).isprintable() and shown(name).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageProblem, match="permission"):
        read_image(tmp_path / "a.png")


@given(st.binary(max_size=300), st.sampled_from([JPEG, PNG, encoded("GIF"), encoded("BMP"), encoded("TIFF"), encoded("WEBP")]), st.integers(0, 3000))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_a_picture_or_a_named_problem(noise: bytes, base: bytes, place: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.png"
        file.write_bytes(base[:place] + noise + base[place + len(noise):])
        try:
            assert read_image(file, max_megapixels=5).mode == "RGB"
        except ImageProblem as problem:
            assert "x.png" in str(problem)

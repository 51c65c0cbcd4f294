"""Files that are broken, odd or hostile: each is read as stated pixels, or refused by name. Nothing is changed."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from making import NOISE, PICTURE, SMALL, cheap, encoded, fault, labelled, picture, png, unprivileged, untouched
from PIL import Image, ImageCms, PngImagePlugin

import tl_tutorial as tl
from tl_tutorial.pixels import ImageProblem, load_pixels, read_image, shown

Bytes = bytes | Callable[[], bytes]


def wrong_crc() -> bytes:
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "A" * 20_000_000, zip=True)
    return encoded("PNG", pnginfo=info)


JPEG, PNG = encoded("JPEG"), encoded("PNG")
REFUSED: dict[str, tuple[str, Bytes, str]] = {
    "A01 JPEG cut at 10 %": ("a.jpg", JPEG[: len(JPEG) // 10], "damaged|not an image"),
    "A02 JPEG cut at 50 %": ("a.jpg", JPEG[: len(JPEG) // 2], "damaged"),
    "A02 PNG cut at 50 %": ("a.png", PNG[: len(PNG) // 2], "damaged"),
    "A03 JPEG cut at 90 %": ("a.jpg", JPEG[: len(JPEG) * 9 // 10], "damaged"),
    "A03 PNG cut at 90 %": ("a.png", PNG[: len(PNG) * 9 // 10], "damaged"),
    "A04 JPEG without its last byte": ("a.jpg", JPEG[:-1], "damaged"),
    "A05 no bytes": ("a.jpg", b"", "empty"),
    "A06 text": ("a.jpg", b"hello world", "not an image"),
    "A07 a web page": ("a.png", b"<!doctype html><html></html>", "not an image"),
    "A10 PNG with a wrong checksum": ("a.png", wrong_crc, "damaged"),
    "A25 floating-point TIFF out of range": ("a.tiff", encoded("TIFF", Image.fromarray(np.full((20, 20), 1e9, np.float32))), "value range"),
    "B01 PNG of 100 megapixels": ("a.png", png(10_000, 10_000), "too large"),
    "B02 PNG of 200 megapixels": ("a.png", png(20_000, 10_000), "too large"),
    "B03 PNG with a text bomb": ("a.png", text_bomb, "damaged|not an image"),
    "B04 TIFF directory without entries": ("a.tif", b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00", "damaged|not an image"),
    "B05 FITS": ("a.png", b"SIMPLE  =                    T" + b" " * 2850, "not an image"),
    "B06 PostScript": ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "not an image"),
    "B07 SVG": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "B zero wide": ("a.png", png(0, 10), "damaged|not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    root = labelled(tmp_path / "photos")
    word, data, kinds = REFUSED[name]
    file = root / "cat" / word
    file.write_bytes(data() if callable(data) else data)
    with untouched(root), cheap():
        with pytest.raises(ImageProblem) as caught:
            read_image(file)
        assert caught.value.kind in kinds.split("|") and word in str(caught.value) and caught.value.remedy
    with untouched(root):
        (found,) = tl.check(root).problems
        assert (found.path, found.severity) == (str(file), "error") and found.kind in kinds.split("|") and found.why and found.remedy
        with pytest.raises(tl.DataError, match=word):
            tl.fine_tune(root, **SMALL)


def grey(value: int) -> Image.Image:
    return Image.new("L", (20, 20), value)


def two_frames(kind: str, **options: object) -> bytes:
    return encoded(kind, Image.new("RGB", (20, 20), "red"), save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")], **options)


def with_alpha(mode: str) -> Image.Image:
    "Fully transparent, with black hidden underneath."
    return Image.new("RGBA", (20, 20), (0, 0, 0, 0)).convert(mode)


def sixteen_bits() -> bytes:
    "Three channels of 16 bits: 257 times 10, 200 and 30."
    row = b"\0" + struct.pack(">HHH", 2570, 51400, 7710) * 20
    return png(20, 20, row * 20, depth=16)


def looped_tiff() -> bytes:
    "A TIFF whose first directory says that the next one is itself."
    data = bytearray(encoded("TIFF", Image.new("RGB", (20, 20), (5, 6, 7))))
    (start,) = struct.unpack("<I", data[4:8])
    (entries,) = struct.unpack("<H", data[start:start + 2])
    data[start + 2 + 12 * entries:start + 6 + 12 * entries] = struct.pack("<I", start)
    return bytes(data)


def profiled() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return encoded("PNG", Image.new("RGB", (20, 20), (200, 30, 60)), icc_profile=profile)


READ: dict[str, tuple[str, Bytes, tuple[int, int, int]]] = {
    "A04 PNG without its last byte": ("a.png", encoded("PNG", Image.new("RGB", (20, 20), (10, 20, 30)))[:-1], (10, 20, 30)),
    "A08 PNG named jpg": ("a.jpg", encoded("PNG", Image.new("RGB", (20, 20), (10, 20, 30))), (10, 20, 30)),
    "A09 JPEG named png": ("a.png", encoded("JPEG", grey(90)), (90, 90, 90)),
    "A11 animated PNG": ("a.png", lambda: two_frames("PNG"), (255, 0, 0)),
    "A12 animated GIF": ("a.gif", lambda: two_frames("GIF"), (255, 0, 0)),
    "A13 animated WEBP": ("a.webp", lambda: two_frames("WEBP", lossless=True), (255, 0, 0)),
    "A14 one pixel": ("a.png", encoded("PNG", Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "A15 1 x 5000": ("a.png", encoded("PNG", Image.new("RGB", (1, 5000), (9, 9, 9))), (9, 9, 9)),
    "A16 16-bit grey": ("a.png", lambda: encoded("PNG", Image.fromarray(np.full((20, 20), 257 * 77, np.uint16))), (77, 77, 77)),
    "A17 16-bit RGB": ("a.png", sixteen_bits, (10, 200, 30)),
    "A18 plain CMYK": ("a.tif", encoded("TIFF", Image.new("CMYK", (20, 20), (0, 255, 255, 0))), (255, 0, 0)),
    "A19 Adobe's inverted CMYK": ("a.jpg", encoded("JPEG", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), quality=95), (255, 0, 0)),
    "A20 palette": ("a.png", encoded("PNG", Image.new("RGB", (20, 20), (200, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)), (200, 0, 0)),
    "A21 palette with transparency": ("a.png", encoded("PNG", Image.new("P", (20, 20), 0), transparency=0), (255, 255, 255)),
    "A22 grey with alpha": ("a.png", encoded("PNG", with_alpha("LA")), (255, 255, 255)),
    "A23 RGBA": ("a.png", encoded("PNG", with_alpha("RGBA")), (255, 255, 255)),
    "A23 RGBA half transparent": ("a.png", encoded("PNG", Image.new("RGBA", (20, 20), (0, 0, 0, 128))), (127, 127, 127)),
    "A24 1-bit": ("a.png", encoded("PNG", Image.new("1", (20, 20), 1)), (255, 255, 255)),
    "A25 floating-point TIFF": ("a.tiff", encoded("TIFF", Image.fromarray(np.full((20, 20), 0.5, np.float32))), (128, 128, 128)),
    "A26 progressive JPEG": ("a.jpg", encoded("JPEG", grey(60), progressive=True), (60, 60, 60)),
    "A35 colour profile": ("a.png", profiled, (200, 30, 60)),
    "B04 TIFF directory that points to itself": ("a.tif", looped_tiff, (5, 6, 7)),
    "B08 huge EXIF": ("a.jpg", lambda: encoded("JPEG", grey(80), exif=b"Exif\x00\x00" + b"\xff" * 60_000), (80, 80, 80)),
    "A bmp": ("a.bmp", encoded("BMP", Image.new("RGB", (20, 20), (5, 6, 7))), (5, 6, 7)),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_stated_pixels(name: str, tmp_path: Path) -> None:
    root = labelled(tmp_path / "photos")
    word, data, expected = READ[name]
    file = root / "cat" / word
    file.write_bytes(data() if callable(data) else data)
    with untouched(root), cheap():
        image = read_image(file)
        pixels = np.asarray(image).astype(int)
        assert image.mode == "RGB" and np.abs(pixels - expected).max() <= (1 if word.endswith("jpg") or "half" in name else 0)
        assert np.abs(load_pixels([file], 32).images.astype(int) - expected).max() <= 1
    report = tl.check(root)
    assert report.ok and report.counts["cat"] == 4
    odd = {"A08": "wrong suffix", "A09": "wrong suffix", "A14": "tiny", "A15": "tiny"}.get(name[:3])
    assert [p.kind for p in report.problems if p.path == str(file)] == ([odd] if odd else [])


@fault(*(f"A{26 + n} EXIF orientation {n}" for n in range(1, 9)))
def test_exif_orientation(fault: str, tmp_path: Path) -> None:
    "Each of the eight orientations gives the same upright picture."
    orientation = int(fault[-1])
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = PICTURE.transpose(back[orientation]) if orientation > 1 else PICTURE
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "a.png")) == NOISE).all()


@fault("B01 PNG of 81 megapixels that is whole")
def test_a_bomb_costs_little_time_and_memory(fault: str, tmp_path: Path) -> None:
    "All its data is there, in a tiny file; decoding it would take 81 MB at once and 243 MB as RGB."
    (tmp_path / "a.png").write_bytes(png(9000, 9000, b"\0" * (9000 // 8 + 1) * 9000, depth=1, colour=0))
    assert (tmp_path / "a.png").stat().st_size < 20_000
    with cheap(megabytes=50), pytest.raises(ImageProblem, match="9000 x 9000"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["line\nbreak.png", "bell\x07.png", "\x1b[31mred.png", "é" * 125 + "x.png"],
                         ids=["B09 a line break in a name", "B09 a bell in a name", "B09 a terminal command in a name", "B10 name of 255 bytes"])
def test_strange_names_are_shown_on_one_line(name: str, tmp_path: Path) -> None:
    root = labelled(tmp_path / "photos")
    file = root / "cat" / name
    file.write_bytes(b"")
    assert len(os.fsencode(name)) == 255 or not name.isprintable()
    with untouched(root):
        with pytest.raises(ImageProblem) as caught:
            read_image(file)
        assert str(caught.value).isprintable() and shown(name) in str(caught.value)
        assert shown(name) in repr(tl.check(root)) and "\x1b" not in repr(tl.check(root))
    file.unlink()
    picture(file, 77)
    assert tl.check(root).ok and tl.check(root).counts == {"cat": 4, "dog": 3}


@fault("C13 unreadable file")
def test_unreadable_file(fault: str, tmp_path: Path) -> None:
    root = labelled(tmp_path / "photos")
    (root / "cat" / "0.png").chmod(0)
    with unprivileged():
        with pytest.raises(ImageProblem, match="permission"):
            read_image(root / "cat" / "0.png")
        (found,) = tl.check(root).problems
        assert found.kind == "unreadable" and "permission" in found.remedy
        with pytest.raises(tl.DataError, match=r"0\.png"):
            tl.fine_tune(root, **SMALL)
        assert tl.fine_tune(root, on_bad="skip", epochs=1, **SMALL).classes == ("cat", "dog")
    assert (root / "cat" / "0.png").stat().st_mode & 0o777 == 0

"""Remake the pictures of tl_tutorial/clipart from the Debian package openclipart-png.

    apt-get download openclipart-png
    dpkg -x openclipart-png_*.deb UNPACKED_DIR
    python tools/make_clipart.py UNPACKED_DIR OUT_DIR

The chosen originals stand in clipart_sources.tsv, next to this file: class, name, path and SHA-256, one a line.
"""

import argparse
import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

PACKAGE = "openclipart-png 1:0.18+dfsg-19"
SOURCES = Path(__file__).with_name("clipart_sources.tsv")
SIDE = 128
QUALITY = 85


class Source(NamedTuple):
    """One line of the list of chosen originals."""

    label: str
    name: str
    path: str
    sha256: str


def read_sources(file: Path) -> list[Source]:
    """The chosen originals, in the order of the list."""
    if not file.is_file():
        raise SystemExit(f"{file} is missing: restore it from the repository (git checkout).")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t"))[1:]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(Source._fields):
            raise SystemExit(f"{file}, line {number}: give {', '.join(Source._fields)}, with a tab between each two.")
    return [Source(*row) for row in rows]


def check_original(file: Path, sha256: str) -> None:
    """Stop unless `file` is the original that the list names."""
    if not file.is_file():
        raise SystemExit(f"{file} is missing: unpack {PACKAGE} with `dpkg -x` and give that folder.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file} is not the listed original: unpack {PACKAGE}, the version that the list is for.")


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent."""
    colours = picture.convert("RGBA")
    paper = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(paper, colours).convert("RGB")


def trim(picture: Image.Image) -> Image.Image:
    """The picture without its empty white border."""
    empty = Image.new("RGB", picture.size, "white")
    return picture.crop(ImageChops.difference(picture, empty).getbbox())


def fit(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture scaled into a white square, its aspect ratio kept."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new("RGB", (side, side), "white")
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


def make(source: Source, unpacked: Path, out: Path) -> None:
    """Write one picture of the set."""
    original = unpacked / source.path
    check_original(original, source.sha256)
    target = out / source.label / f"{source.name}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(original) as picture:
        fit(trim(on_white(picture))).save(target, quality=QUALITY, optimize=True)


def main() -> None:
    """Make every picture of the list."""
    parser = argparse.ArgumentParser(description="Remake the pictures of tl_tutorial/clipart.")
    parser.add_argument("unpacked", type=Path, metavar="UNPACKED_DIR", help=f"where {PACKAGE} is unpacked")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="where the class folders go")
    arguments = parser.parse_args()
    sources = read_sources(SOURCES)
    for source in sources:
        make(source, arguments.unpacked, arguments.out)
    print(f"{len(sources)} pictures written to {arguments.out}")


if __name__ == "__main__":
    main()

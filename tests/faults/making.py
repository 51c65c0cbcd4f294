"""What the fault tests share: small pictures and folders, eyes for what changed, and a process without root's rights."""

import ctypes
import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from forked_kernels import python
from PIL import Image

SMALL = {"arch": "small_cnn", "weights": "none", "size": 32, "progress": False}
NOISE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def fault(*names: str) -> pytest.MarkDecorator:
    "One test, run once for each fault of the list that it shows; the names begin with the faults' identifiers."
    return pytest.mark.parametrize("fault", names)


def encoded(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    "An image file's bytes."
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    "A PNG put together by hand; it may claim a size that its data does not have."
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(path: Path, seed: int = 0, side: int = 32) -> Path:
    "Write a picture of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def labelled(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    "A labelled folder of noise."
    for row, name in enumerate(classes):
        for number in range(each):
            picture(root / name / f"{number}.png", 100 * row + number)
    return root


def coloured(root: Path, each: int = 8) -> Path:
    "Three classes that anything can tell apart."
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def tree(root: Path) -> dict[str, tuple]:
    "Everything below a folder: kind, mode, time of change and content."
    found = {}
    for path in sorted(root.rglob("*")):
        kind = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        found[str(path)] = (kind.st_mode, kind.st_mtime_ns, content)
    return found


@contextmanager
def untouched(root: Path) -> Iterator[None]:
    "Whatever happens inside, nothing below the folder changes."
    before = tree(root)
    yield
    assert tree(root) == before


@contextmanager
def unprivileged() -> Iterator[None]:
    "Permissions count inside, also for root: the two capabilities that pass them over are set aside."
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, words) == 0
    kept = words[0]
    words[0] &= ~0b110 # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, words) == 0
    try:
        yield
    finally:
        words[0] = kept
        assert libc.capset(header, words) == 0


def peak() -> int:
    "The process's largest memory so far (kB), counted anew where Linux can do that."
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def cheap(seconds: float = 1.0, megabytes: int = 200) -> Iterator[None]:
    "What happens inside takes little time and little memory."
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.process_time()
    yield
    assert time.process_time() - began < seconds and peak() - before < megabytes * 1000


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    "Run the command line in a process of its own."
    options = {"capture_output": True, "text": True, "timeout": 200, **options}
    fixed = {"PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONUTF8"} & set(options.get("env") or ()) # a fork keeps what it was forked with
    start = sys.executable if fixed else python()
    return subprocess.run([start, "-m", "tl_tutorial", *map(str, arguments)], **options)


def fingerprint(classifier: object) -> str:
    "SHA-256 of a classifier's weights."
    found = hashlib.sha256()
    for name, value in sorted(classifier.network.state_dict().items()):
        found.update(name.encode() + value.reshape(-1).contiguous().numpy().tobytes())
    return found.hexdigest()

"""Ratios measured side by side in one run: `python -m benchmarks [--rounds N] [--out FILE.json]`.

Each comparison runs A and B in turn, N times, and reports the median of the ratios A/B with their smallest and largest.
B is always the honest floor: a bare PyTorch loop, one forward pass, or an empty Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from tl_tutorial.backbones import create
from tl_tutorial.batches import AUGMENTATIONS, Batches
from tl_tutorial.datasets import clipart
from tl_tutorial.folder import scan
from tl_tutorial.freezing import freeze_statistics, parameter_groups
from tl_tutorial.material import Material
from tl_tutorial.pixels import load_pixels, read_image, to_square
from tl_tutorial.recipes import probe
from tl_tutorial.settings import Settings
from tl_tutorial.steps import quick_format
from tl_tutorial.training import fit


def timed(work: Callable[[], object]) -> float:
    "Seconds of one call."
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, float]:
    "Median, smallest and largest ratio of A's time to B's, measured in turn."
    pairs = [(timed(a), timed(b)) for _ in range(rounds + 1)][1:] # the first round warms up
    ratios = [x / y for x, y in pairs]
    return {"ratio": median(ratios), "low": min(ratios), "high": max(ratios),
            "a_seconds": median(x for x, _ in pairs), "b_seconds": median(y for _, y in pairs)}


def pictures(count: int = 160) -> Material:
    "Clip art, decoded once."
    found = scan(clipart())
    items = found.items[:: max(1, len(found.items) // count)][:count]
    labels = np.array([found.classes.index(item.label) for item in items])
    images = load_pixels([item.path for item in items], 147).images
    return Material(images, labels, images[:0], labels[:0], 128, len(found.classes))


def probe_against_one_pass(rounds: int) -> dict[str, float]:
    "The probe (features once, head to convergence) against one forward pass over the same pictures."
    material = pictures()
    network = create("efficientnet_lite0", material.classes).to(memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def one_pass() -> None:
        for batch in material.train(Settings(), still=True).epoch():
            network(batch.images.to(memory_format=torch.channels_last))

    return compare(lambda: probe(network, material, settings=Settings()), one_pass, rounds)


def ours() -> None:
    "One epoch with `fit`."
    material, settings = pictures(96), Settings(batch_size=16, patience=99)
    network = freeze_statistics(create("efficientnet_lite0", material.classes)).to(memory_format=quick_format(torch.device("cpu")))
    fit(network, material.train(settings), valid=None, settings=settings, epochs=1, lr=5e-4)


def bare() -> None:
    "The same epoch in bare PyTorch: same network, groups, batches and steps."
    material, settings, form = pictures(96), Settings(batch_size=16, patience=99), quick_format(torch.device("cpu"))
    network = freeze_statistics(create("efficientnet_lite0", material.classes)).to(memory_format=form)
    optimizer = torch.optim.AdamW(parameter_groups(network, 5e-4, decay_rate=settings.decay_rate or 1.0))
    network.train()
    for batch in material.train(settings).epoch(0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch.images.to(memory_format=form)), batch.labels).backward()
        optimizer.step()


def peak_memory(rounds: int) -> dict[str, float]:
    "Peak memory of a process that runs `fit`, against one that runs the bare loop (both with the cached pictures). Linux only."
    def peak(name: str) -> float:
        # Not `ru_maxrss`: a process inherits that peak from the one that started it.
        code = f"import benchmarks.__main__ as b, re; b.{name}(); print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) / 1024

    pairs = [(peak("ours"), peak("bare")) for _ in range(rounds)]
    ratios = [x / y for x, y in pairs]
    return {"ratio": median(ratios), "low": min(ratios), "high": max(ratios),
            "a_mb": median(x for x, _ in pairs), "b_mb": median(y for _, y in pairs)}


def photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    "JPEG files of soft random pictures, quality 90."
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(size).save(file, quality=90)
    return files


def pipeline_against_decoding(rounds: int, jitter: float = 0.0, size: tuple[int, int] = (500, 375), count: int = 64) -> dict[str, float]:
    "Decoding every epoch (JPEG, crop, flip, normalise) against cached batches that are cropped and flipped; higher is better."
    from torchvision.transforms import v2

    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), count, size)
        change = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.ToImage(),
                             v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)])
        stored = np.stack([np.asarray(to_square(read_image(f), 256)) for f in files])
        cached = Batches(stored, np.zeros(count), 224, 32, how=replace(AUGMENTATIONS["full"], jitter=jitter))

        def decode() -> None: # batches are used and dropped, as in training
            for start in range(0, count, 32):
                torch.stack([change(Image.open(f).convert("RGB")) for f in files[start:start + 32]])

        def kept() -> None:
            for batch in cached.epoch(1):
                del batch

        return compare(decode, kept, rounds)


def start_of(command: str, rounds: int) -> dict[str, float]:
    "Seconds that a Python command takes beyond an empty Python."
    run = lambda code: timed(lambda: subprocess.run([sys.executable, *code], check=True, capture_output=True))
    pairs = [(run(command.split("\0")), run(["-c", "pass"])) for _ in range(max(5, rounds))]
    extra = sorted(x - y for x, y in pairs)
    return {"extra_seconds": median(extra), "low": extra[0], "high": extra[-1]}


def main() -> None:
    "Run every comparison and print one line each."
    parser = argparse.ArgumentParser("python -m benchmarks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work: dict[str, Callable[[int], dict[str, float]]] = {
        "import tl_tutorial beyond python": lambda rounds: start_of("-c\0import tl_tutorial", rounds),
        "tl-tutorial --help beyond python": lambda rounds: start_of("-m\0tl_tutorial\0--help", rounds),
        "decode every epoch / cached batches, 500 x 375": pipeline_against_decoding,
        "the same with colour jitter": lambda rounds: pipeline_against_decoding(rounds, 0.2),
        "the same without jitter, 3000 x 2000": lambda rounds: pipeline_against_decoding(rounds, 0.0, (3000, 2000), 16),
        "probe / one forward pass": probe_against_one_pass,
        "fit / bare loop": lambda rounds: compare(ours, bare, rounds),
        "peak memory, fit / bare loop": peak_memory,
    }
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(about)
    found = {}
    for name, run in work.items():
        found[name] = run(args.rounds)
        print(f"{name:38}", "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True)
        if args.out: # after each comparison, so that an interrupted run keeps what it has
            args.out.write_text(json.dumps({"about": about, "results": found}, indent=1))


if __name__ == "__main__":
    main()

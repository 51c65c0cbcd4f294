"""Pictures in miniature: which pixels are kept, which files are set aside, what a batch holds."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tl_tutorial as tl
from tl_tutorial.backbones import Preprocess
from tl_tutorial.batches import AUGMENTATIONS, Augmentation, Batches, augment, augmentation_for, uniforms
from tl_tutorial.datasets import SHAPES, cache_home, cifar10, digits, draw_shapes, shapes, write_folder
from tl_tutorial.facts import near
from tl_tutorial.folder import Item, find_images
from tl_tutorial.material import Material, gather, pick_size
from tl_tutorial.pixels import load_pixels, read_image, to_square

# Batches

SLOPE = torch.stack([torch.arange(64.0).expand(64, 64), torch.arange(64.0)[:, None].expand(64, 64), torch.zeros(64, 64)])[None] / 63 # across, down
CROP = Augmentation(area=0.25, stretch=1.0, flip=False, jitter=0.0)


def view(how: Augmentation = CROP, **numbers: float) -> torch.Tensor:
    "The slope, changed by these random numbers; those not named are at the middle."
    names = ("area", "ratio", "left", "top", "flip", "bright", "contrast", "colour")
    return augment(SLOPE, np.array([[numbers.get(name, 0.5) for name in names]]), size=64, how=how)[0]


def edges(picture: torch.Tensor) -> tuple[float, float, float, float]:
    "Left, right, top and bottom end of a view of the slope, in pixels of the whole."
    return tuple(round(float(x) * 63) for x in (picture[0].min(), picture[0].max(), picture[1].min(), picture[1].max()))


def test_a_crop_lies_where_its_numbers_say() -> None:
    assert edges(view(area=0, left=0, top=0)) == pytest.approx((0, 31, 0, 31), abs=1)
    assert edges(view(area=0, left=0.999, top=0)) == pytest.approx((32, 63, 0, 31), abs=1)
    assert edges(view(area=0, left=0, top=0.999)) == pytest.approx((0, 31, 32, 63), abs=1)
    assert edges(view(area=0)) == pytest.approx((16, 47, 16, 47), abs=1)
    assert edges(view(area=1)) == (0, 63, 0, 63), "the whole picture"
    half = edges(view(area=1 / 3, left=0, top=0)) # a quarter and a third of the rest is a half
    assert half == pytest.approx((0, 64 * 0.5**0.5 - 1, 0, 64 * 0.5**0.5 - 1), abs=1)


def test_a_crop_is_stretched_at_most_so_far() -> None:
    how = replace(CROP, stretch=2.0)
    for ratio, wide in ((1, 2**0.5), (0, 2**-0.5), (0.5, 1)):
        left, right, top, bottom = edges(view(how, area=0, ratio=ratio))
        assert (right - left + 1, bottom - top + 1) == pytest.approx((32 * wide, 32 / wide), abs=2)
    assert edges(view(how, area=1, ratio=1))[:2] == (0, 63), "never wider than the picture"


def test_half_of_the_pictures_are_mirrored() -> None:
    turned, straight = (view(replace(CROP, flip=True), area=1, flip=flip) for flip in (0.49, 0.5))
    assert torch.allclose(turned, straight.flip(-1), atol=1e-6) and straight[0, 0, 0] < straight[0, 0, -1]
    assert torch.equal(view(area=1, flip=0.1), straight), "not where flip is off"


def test_jitter_changes_light_contrast_and_colour() -> None:
    how, grey = replace(CROP, jitter=0.2), view(area=1)
    assert torch.allclose(view(how, area=1), grey, atol=1e-6), "the middle changes nothing"
    assert torch.allclose(view(how, area=1, bright=0), 0.8 * grey, atol=1e-5)
    assert torch.allclose(view(how, area=1, bright=1), (1.2 * grey).clamp(0, 1), atol=1e-5)
    flat = view(how, area=1, contrast=0)
    assert torch.allclose(flat, grey.mean() + 0.8 * (grey - grey.mean()), atol=1e-5)
    pale = view(how, area=1, colour=0)
    assert torch.allclose(pale, grey.mean(0) + 0.8 * (grey - grey.mean(0)), atol=1e-5)


def test_bytes_and_fractions_give_the_same_view() -> None:
    numbers = uniforms(3, 1, index=np.arange(1), count=8)
    one, two = (augment(images, numbers, size=32, how=AUGMENTATIONS["full"]) for images in ((SLOPE * 255).round(), SLOPE * 255))
    bytes_, fractions = augment((SLOPE * 255).round().to(torch.uint8), numbers, size=32, how=AUGMENTATIONS["full"]), augment((SLOPE * 255).round() / 255, numbers, size=32, how=AUGMENTATIONS["full"])
    assert (bytes_ - fractions).abs().max() < 0.02 and bytes_.dtype == torch.float32 and one.max() <= 1 and two.max() <= 1


def test_random_numbers_are_even_and_independent() -> None:
    numbers = uniforms(42, 0, index=np.arange(4000), count=4)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 1600 - 1).max() < 0.1
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.06
    assert np.abs(np.corrcoef(numbers[:, 0], uniforms(42, 1, index=np.arange(4000), count=1)[:, 0])[0, 1]) < 0.06
    assert np.abs(np.corrcoef(numbers[:, 0], uniforms(43, 0, index=np.arange(4000), count=1)[:, 0])[0, 1]) < 0.06
    assert np.array_equal(uniforms(42, 0, index=np.array([7, 3]), count=4), numbers[[7, 3]]) and np.array_equal(uniforms(42, 0, index=np.arange(9), count=2), numbers[:9, :2])


def test_still_batches_are_the_centre_in_order() -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 10, 10, 3), dtype=np.uint8)
    found = list(Batches(images, [0, 1, 2, 1, 0], 8, 2).epoch(7))
    assert [batch.index.tolist() for batch in found] == [[0, 1], [2, 3], [4]] and [batch.total for batch in found] == [2, 2, 1]
    for batch in found:
        assert np.allclose(batch.images.permute(0, 2, 3, 1), images[batch.index, 1:9, 1:9] / np.float32(255)) and batch.labels.dtype == torch.int64
    assert torch.cat([batch.labels for batch in found]).tolist() == [0, 1, 2, 1, 0]
    for size in (0, 11):
        with pytest.raises(ValueError, match="have 10 pixels"):
            Batches(images, [0] * 5, size)


def test_training_batches_depend_on_seed_and_epoch() -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 10, 10, 3), dtype=np.uint8)
    orders = [Batches(images, range(12), 8, 4, seed, CROP).order(epoch).tolist() for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3] and sorted(orders[3]) == list(range(12))
    one = next(Batches(images, range(12), 8, 4, 1, CROP).epoch(1))
    assert one.labels.tolist() == orders[2][:4] and one.images.shape == (4, 3, 8, 8)
    expected = augment(torch.from_numpy(images[one.index]).permute(0, 3, 1, 2), uniforms(1, 1, index=one.index, count=8), size=8, how=CROP)
    assert torch.equal(one.images, expected)
    assert [b.index.tolist() for b in Batches(images, range(12), 8, 4, 1, CROP, shard=(1, 2)).epoch(0)] == [orders[0][k:k + 4][1::2] for k in (0, 4, 8)]


def test_one_picture_is_no_batch_of_its_own_in_training() -> None:
    images = np.zeros((9, 8, 8, 3), np.uint8)
    assert [len(b.index) for b in Batches(images, [0] * 9, 8, 4, how=CROP).epoch()] == [4, 5]
    assert [len(b.index) for b in Batches(images, [0] * 9, 8, 4).epoch()] == [4, 4, 1], "in judging it may stand alone"
    assert len(Batches(images[:1], [0], 8, 4, how=CROP)) == 1 and len(Batches(images[:8], [0] * 8, 8, 4)) == 2


def test_grey_pictures_get_little_augmentation() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 253, (70, 8, 8, 1), dtype=np.uint8), 3, 3)
    coloured = grey.copy()
    coloured[0, 0, 0, 1] += 3
    nearly = grey.copy()
    nearly[0, 0, 0, 1] += 2
    assert [augmentation_for("auto", found) for found in (grey, nearly, coloured)] == [AUGMENTATIONS[name] for name in ("light", "light", "full")]
    assert augmentation_for("none", grey) is None and augmentation_for("full", grey) == Augmentation(0.5, 1.2, True, 0.2)
    assert augmentation_for("light", coloured) == Augmentation(0.75, 1.1, False, 0.0)


# Pixels


def test_the_largest_centred_square_is_kept() -> None:
    picture = Image.fromarray((SLOPE[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    wide, high = picture.resize((128, 64)), picture.resize((64, 128))
    for image, channel in ((wide, 0), (high, 1)):
        square = np.asarray(to_square(image, 64))[..., channel]
        assert square.shape == (64, 64) and (int(square.min()), int(square.max())) == pytest.approx((64, 191), abs=2)
    assert to_square(picture, 17).size == (17, 17)


def test_an_upright_picture_whatever_the_camera_held(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6 # to be turned by a quarter, clockwise: what was left is above
    picture.save(tmp_path / "a.png", exif=exif)
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert found.shape == (40, 20, 3) and found[0, 0].tolist() == [255, 0, 0] and found[-1, 0].tolist() == [255, 255, 255]


def test_a_jpeg_decoded_smaller_is_still_large_enough(tmp_path: Path) -> None:
    Image.effect_noise((640, 480), 90).convert("RGB").save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").size == (640, 480)
    small = read_image(tmp_path / "a.jpg", at_least=100).size
    assert 100 <= min(small) < 240 and read_image(tmp_path / "a.jpg", at_least=400).size == (640, 480)


def test_the_limit_in_megapixels_is_exact(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 0.01).size == (100, 100)
    with pytest.raises(tl.DataError, match="100 x 100 pixels, more than 0.0099 million"):
        read_image(tmp_path / "a.png", 0.0099)


def test_what_is_kept_and_left_out_is_told(tmp_path: Path) -> None:
    for number in (0, 2, 3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"x")
    for budget in (2048, 0):
        found = load_pixels([tmp_path / f"{number}.png" for number in range(4)], 8, budget_mb=budget, on_bad="skip")
        assert found.kept.tolist() == [0, 2, 3] and found.images[:, 0, 0, 0].tolist() == [0, 2, 3] and found.images.shape == (3, 8, 8, 3)
        assert [Path(problem.path).name for problem in found.problems] == ["1.png"] and isinstance(found.images, np.memmap) == (budget == 0)
    arrays = [np.full((8, 8), 9, np.uint8), np.full((8, 8, 1), 9, np.uint8), np.full((8, 8, 4), (9, 9, 9, 255), np.uint8)]
    assert (load_pixels(arrays, 8).images == 9).all()


# Folders, splits, material


def items(folder: Path) -> tuple[Item, ...]:
    return tl.scan(folder).items


def test_a_split_follows_its_seed_and_its_share(colours: Path) -> None:
    parts = [tl.split(items(colours), fraction, seed=seed) for fraction, seed in ((0.25, 1), (0.25, 1), (0.25, 2), (0.5, 1), (0.01, 1), (0.99, 1))]
    assert parts[0] == parts[1] and set(parts[0][1]) != set(parts[2][1])
    for (first, second), each in zip(parts, (3, 3, 3, 6, 1, 11), strict=True):
        assert sorted([*first, *second], key=lambda i: i.path) == sorted(items(colours), key=lambda i: i.path)
        assert all(sum(i.label == name for i in second) == each for name in ("red", "green", "blue"))
    assert set(parts[0][1]) <= set(parts[3][1]), "a larger part holds the smaller one"
    default = tl.split(items(colours))
    assert default == tl.split(items(colours), 0.2, seed=42) and default != tl.split(items(colours), 0.2, seed=43)


def test_a_class_of_one_cannot_be_split(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        write_folder(np.random.default_rng(count).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8), [0] * count, classes=[name], folder=tmp_path / f"{name}")
    both = [Item(path, path.parent.name) for path in sorted(tmp_path.rglob("*.png"))]
    assert [len(part) for part in tl.split([i for i in both if i.label == "a"])] == [1, 1]
    with pytest.raises(tl.DataError, match="class b has 1 distinct image"):
        tl.split(both)


def test_classes_and_files_stand_in_natural_order(tmp_path: Path) -> None:
    for name in ("10", "9", "b2", "b10", "a"):
        for number in (10, 9):
            (tmp_path / "p" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "p" / name / f"{number}.png")
    found = tl.scan(tmp_path / "p")
    assert found.classes == ("9", "10", "a", "b2", "b10") and [i.path.name for i in found.items] == ["9.png", "10.png"] * 5
    assert [p.name for p in find_images(tmp_path / "p")] == ["9.png", "10.png"] * 5


def test_the_size_suits_pictures_and_network() -> None:
    natural, small = Preprocess(), Preprocess(size=64, least=8)
    settings = tl.Settings()
    assert [pick_size(settings, side, preprocess=natural) for side in (8, 110, 113, 128, 200, 500)] == [96, 96, 128, 128, 192, 224]
    assert [pick_size(settings, side, preprocess=small) for side in (8, 40, 47, 49, 500)] == [32, 32, 32, 64, 64]
    assert pick_size(settings, 50, preprocess=Preprocess(size=299, least=299)) == 299 and pick_size(tl.Settings(size=8), 50, preprocess=small) == 8
    with pytest.raises(tl.ModelError, match="at least 32 pixels"):
        pick_size(tl.Settings(size=31), 50, preprocess=natural)
    assert pick_size(tl.Settings(size=32), 50, preprocess=natural) == 32


def test_material_holds_each_picture_once_under_its_label(colours: Path) -> None:
    material, report, classes = gather(colours, None, settings=tl.read_settings(size=16), preprocess=Preprocess(least=8))
    assert classes == ("blue", "green", "red") and len(material.labels) == 30 and len(material.valid_labels) == 6 and report.ok
    assert material.images.shape == (30, 19, 19, 3) and material.classes == 3 and material.size == 16
    strongest = lambda images: 2 - images.mean((1, 2)).argmax(1) # classes stand in the order blue, green, red
    assert (strongest(material.images) == material.labels).all() and (strongest(material.valid_images) == material.valid_labels).all()
    assert all(classes[label] in name for label, name in zip(material.labels, material.names, strict=True))
    train, still = material.train(tl.Settings()), material.train(tl.Settings(), still=True)
    assert train.batch_size == 8 and train.how and still.how is None and still.order(3).tolist() == list(range(30))
    assert material.train(tl.Settings(batch_size=5)).batch_size == 5 and material.train(tl.Settings(seed=3)).seed == 3
    many = replace(material, images=np.zeros((600, 19, 19, 3), np.uint8), labels=np.zeros(600, np.int64))
    assert many.train(tl.Settings()).batch_size == 32
    assert replace(many, images=many.images[:240], labels=many.labels[:240]).train(tl.Settings()).batch_size == 20


def test_material_of_another_kind_has_another_fingerprint(colours: Path) -> None:
    material = gather(colours, None, settings=tl.read_settings(size=16), preprocess=Preprocess(least=8))[0]
    other = material.images.copy()
    other[3, 0, 0] ^= 1
    turned = material.labels.copy()
    turned[0] = (turned[0] + 1) % 3
    changed = [replace(material, images=other), replace(material, labels=turned), replace(material, size=17), replace(material, valid_images=other[:6])]
    assert len({found.digest() for found in (material, *changed)}) == 5 and replace(material, names=()).digest() == material.digest()


# What can be tried offline


def test_drawn_shapes_are_what_they_were() -> None:
    images, labels = draw_shapes(("circle", "ring", "crescent", "cross"), 6, size=24, seed=3)
    assert images.shape == (24, 24, 24, 3) and images.dtype == np.uint8 and np.bincount(labels).tolist() == [6] * 4
    assert not np.array_equal(draw_shapes(("circle", "ring"), 3, seed=1)[0], draw_shapes(("circle", "ring"), 3, seed=2)[0])
    everything = draw_shapes(tuple(SHAPES), 2, size=32, seed=0)
    assert hashlib.sha256(everything[1].tobytes()).hexdigest()[:16] == hashlib.sha256(draw_shapes(tuple(SHAPES), 2, size=32, seed=0)[1].tobytes()).hexdigest()[:16]


def test_knobs_of_drawn_shapes() -> None:
    plain = draw_shapes(("circle", "square"), 20, size=24, noise=0.0)[0].astype(int)
    assert draw_shapes(("circle", "square"), 20, size=24, noise=0.0, brightness=0.3)[0].mean() > plain.mean() + 30
    assert draw_shapes(("circle", "square"), 20, size=24, noise=0.0, contrast=0.5)[0].std() < 0.6 * plain.std()
    assert np.abs(np.diff(draw_shapes(("circle", "square"), 20, size=24, noise=0.2)[0].astype(int), axis=2)).mean() > 2 * np.abs(np.diff(plain, axis=2)).mean()
    clean, noisy = (draw_shapes(("circle", "square"), 200, size=8, label_noise=share)[1] for share in (0.0, 0.4))
    assert 0.12 < (clean != noisy).mean() < 0.28, "half of those drawn anew are right by chance"
    with pytest.raises(tl.DataError, match="unknown shapes"):
        draw_shapes(("circle", "potato"), 1)


def test_arrays_and_labels_of_other_lengths_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        write_folder(np.zeros((3, 8, 8), np.uint8), [0, 0], classes=["a"], folder=tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    first = shapes(tmp_path / "p", ("circle", "square"), per_class=2, size=8)
    assert first == tmp_path / "p" and len(list(first.rglob("*.png"))) == 4 and shapes(first, ("ring",)) == first, "what is there stays"
    one, two = shapes(None, ("circle",), per_class=1, size=8), shapes(None, ("circle",), per_class=1, size=9)
    assert one != two and one.parent == cache_home() and Image.open(next(two.rglob("*.png"))).size == (9, 9)


def test_digits_go_where_they_are_told(tmp_path: Path) -> None:
    folder = digits(tmp_path / "d")
    assert folder == tmp_path / "d" and sorted(p.name for p in folder.iterdir()) == list("0123456789") and not cache_home().exists()
    pictures = [np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))]
    assert len(pictures) == 1797 and {p.shape for p in pictures} == {(8, 8)} and max(p.max() for p in pictures) == 255


def test_the_borders_of_shapes() -> None:
    angles = np.arange(8) * np.pi / 4
    assert np.allclose(SHAPES["circle"](angles), 1) and np.allclose(SHAPES["flower4"](angles), [1, 0.1] * 4)
    assert np.allclose(SHAPES["square"](angles), [1, 0.5**0.5] * 4) and np.allclose(SHAPES["ellipse"](angles[:3]), [1, 0.45 / ((1 + 0.45**2) / 2) ** 0.5, 0.45])
    assert np.allclose(SHAPES["triangle"](np.array([0, 1, 2]) * np.pi / 3), [1, 0.5, 1]) and np.allclose(SHAPES["cross"](angles), [1, 0.35] * 4)
    assert np.allclose(SHAPES["star8"](np.array([0, 1]) * np.pi / 8), [1, 0.5]) and np.allclose(SHAPES["flower6"](np.array([0, 1]) * np.pi / 6), [1, 0.2])
    assert np.allclose(SHAPES["heart"](np.array([0, 0.5, 1.5]) * np.pi), [0.62, 0.24, 1.0])


def test_an_archive_that_is_there_is_checked_and_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as known

    monkeypatch.setattr(known.utils, "download_url", lambda *_: pytest.fail("it is there"))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(tl.DataError, match="cifar-10-python.tar.gz is not the published file"):
        cifar10(tmp_path, download=True)


# Reports


def ramp(path: Path, turned: int) -> None:
    "Nine columns and eight rows of grey that grow to the right; in so many rows, one step goes down."
    grid = np.tile(100 + 4 * np.arange(9, dtype=np.uint8), (8, 1))
    grid[:turned, 4] -= 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(grid, np.ones((10, 10), np.uint8))).save(path)


@pytest.mark.parametrize(("turned", "near"), [(1, True), (3, True), (4, False)])
def test_pictures_that_differ_in_three_of_64_comparisons_look_alike(tmp_path: Path, turned: int, near: bool) -> None:
    ramp(tmp_path / "p/a/0.png", 0)
    ramp(tmp_path / "p/a/1.png", turned)
    for number in range(2):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "p/a" / f"noise{number}.png")
    ramp(tmp_path / "p/b/0.png", 8)
    found = [p for p in tl.check(tmp_path / "p").problems if p.kind == "near duplicate" and p.path.endswith("1.png")]
    assert bool(found) == near


def test_fewer_than_two_classes_after_leaving_out(colours: Path) -> None:
    for name in ("red", "green"):
        for file in (colours / name).iterdir():
            file.write_bytes(b"no image")
    with pytest.raises(tl.DataError, match="fewer than two classes"):
        gather(colours, None, settings=tl.read_settings(size=16, on_bad="skip"), preprocess=Preprocess(least=8))


def test_classes_keep_their_order_beside_a_validation_folder(colours: Path, tmp_path: Path) -> None:
    import shutil

    for place in ("one", "two"):
        for name, colour in (("2", "red"), ("10", "blue")):
            shutil.copytree(colours / colour, tmp_path / place / name)
            for number, file in enumerate(sorted((tmp_path / place / name).iterdir())):
                (file.unlink if (number < 6) == (place == "one") else file.touch)()
    material, _, classes = gather(tmp_path / "one", tmp_path / "two", settings=tl.read_settings(size=16), preprocess=Preprocess(least=8))
    assert classes == ("2", "10") and len(material.labels) == len(material.valid_labels) == 12


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, words in (("file", "not a folder"), ("gone", "there is no such folder")):
        with pytest.raises(tl.DataError, match=words):
            tl.scan(tmp_path / name)


def test_batches_are_made_where_the_network_is() -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    material = Material(images, labels, images, labels, 8, 2, device="meta")
    for made in (material.train(tl.Settings()), material.train(tl.Settings(), still=True), material.valid()):
        assert made is not None and made.device == torch.device("meta")


@pytest.mark.parametrize("splits", [("train", "train"), ("train", "valid")])
def test_of_pictures_that_look_alike_it_is_said_whether_they_stand_in_two_splits(splits: tuple[str, str]) -> None:
    facts = [SimpleNamespace(hash=7, thumbnail=np.zeros((8, 8)), digest=name, item=SimpleNamespace(path=Path(name), split=split))
             for name, split in zip(("a.png", "b.png"), splits, strict=True)]
    found, = near(facts)
    assert found.path == "b.png" and found.why == "looks like a.png" + (" in another split" if splits[1] == "valid" else "")


@pytest.mark.parametrize("limit", ["big", True, None])
def test_a_limit_for_pictures_is_a_number(limit: object, tmp_path: Path) -> None:
    with pytest.raises(tl.SettingsError, match="max_megapixels = .*; give a number of million pixels"):
        tl.check(tmp_path, max_megapixels=limit)


def test_many_processes_share_the_steps_and_look_at_all_pictures() -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
    material = Material(images, labels, images, labels, 8, 2, shard=(0, 99))
    assert material.train(tl.Settings(), still=True).shard == (0, 1)
    with pytest.raises(tl.DeviceError, match="99 processes cannot share batches of 4 pictures"):
        material.train(tl.Settings())


@pytest.mark.parametrize(("bits", "white"), [(12, 4095), (16, 65535), (24, 65535)])
def test_white_is_as_many_bits_as_the_file_says(bits: int, white: int) -> None:
    from tl_tutorial.opening import _white

    assert _white(SimpleNamespace(mode="I;16", format="TIFF", tag_v2={258: (bits,)}), 0.9 * white) == (white, "")

"""Networks: every family gets the right head, frozen is frozen, odd inputs are refused, ImageNet is really known."""

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tl_tutorial as tl
from tl_tutorial.backbones import Preprocess, blocks
from tl_tutorial.freezing import freeze_statistics, snapshot

FAMILIES = ["resnet18", "resnet50", "vgg16", "alexnet", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "densenet121",
            "inception_v3", "squeezenet1_1", "googlenet", "shufflenet_v2_x0_5", "small_cnn", "efficientnet_lite0"]


@pytest.mark.parametrize("arch", FAMILIES)
def test_head_is_replaced_and_gradients_reach_the_first_layer(arch: str) -> None:
    network = tl.create(arch, 5, weights="none")
    images = torch.rand(2, 3, max(64, network.preprocess.least), max(64, network.preprocess.least))
    logits = network(images)
    assert logits.shape == (2, 5) and network.features(images).shape == (2, network.head.in_features)
    logits.sum().backward()
    assert next(network.body.parameters()).grad is not None
    assert sum(p.numel() for part in blocks(network.body) for p in part.parameters()) == sum(p.numel() for p in network.body.parameters())


def test_timm_by_name() -> None:
    pytest.importorskip("timm")
    assert tl.create("timm:resnet10t", 4, weights="none")(torch.rand(2, 3, 64, 64)).shape == (2, 4)


def test_a_local_file_of_weights(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    network = tl.create("resnet18", 3, weights=str(tmp_path / "w.pth"))
    assert torch.equal(network.body.conv1.weight, model.conv1.weight)
    assert network.preprocess.mean == (0.485, 0.456, 0.406)


def test_weights_files_of_old_have_other_names(tmp_path: Path) -> None:
    "torchvision's DenseNet files name their layers `norm.1`, and files from before 2019 lack BatchNorm's count of batches."
    from torchvision.models import densenet121

    model = densenet121(weights=None)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): value
           for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = (thing.eval() for thing in (tl.create("densenet121", 3, weights=str(tmp_path / "w.pth")), model))
        normal = (images - torch.tensor(ours.preprocess.mean).view(3, 1, 1)) / torch.tensor(ours.preprocess.std).view(3, 1, 1)
        assert torch.allclose(ours.features(images), torch.relu(theirs.features(normal)).mean((2, 3)), atol=1e-5)


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("it-ran"),))


def test_a_hostile_weights_file_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Bomb()}))
    torch.save({"conv1.weight": Bomb()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(tl.ModelError):
            tl.create("resnet18", 3, weights=str(tmp_path / name))
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0", "vgg16"])
def test_frozen_survives_train(arch: str) -> None:
    network = tl.create(arch, 3, weights="none")
    tl.freeze(network.body)
    before = snapshot(network.body)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(network(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert tl.check_frozen(network.body, before) == []
    tl.unfreeze(network.body)
    network.train()(torch.rand(4, 3, 64, 64))
    assert arch == "vgg16" or tl.check_frozen(network.body, before)


def test_statistics_alone() -> None:
    network = freeze_statistics(tl.create("resnet18", 3, weights="none")).train()
    before = snapshot(network.body)
    network(torch.rand(4, 3, 64, 64))
    assert tl.check_frozen(network.body, before) == [] and network.body.conv1.weight.requires_grad


def test_bad_preprocessing_is_refused() -> None:
    for mean, std in (((0.5,) * 3, (0.0,) * 3), ((0.5,), (0.5,) * 3), ((), ())):
        with pytest.raises(tl.ModelError):
            Preprocess(mean, std)


def test_lite0_knows_imagenet_from_memory_and_from_a_png() -> None:
    from sklearn.datasets import load_sample_images

    from tl_tutorial.classifier import Classifier
    from tl_tutorial.efficientnet import load_lite0

    network = tl.create("efficientnet_lite0", 1000)
    network.head.load_state_dict(load_lite0().classifier.state_dict())
    clf = Classifier(network.eval(), tuple(map(str, range(1000))), 224, tl.Settings())
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[1]).save(buffer, "png")
    found = clf.predict([load_sample_images().images[0], Image.open(buffer)])
    assert [p.label for p in found] == ["698", "985"]
    assert np.allclose([p.probability for p in found], [0.31, 0.36], atol=0.05)

"""Networks in miniature: sizes, normalisation, heads, freezing and rates, with bodies of a few numbers."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import tl_tutorial as tl
from tl_tutorial.backbones import Network, Preprocess, blocks, replace_head, small_cnn
from tl_tutorial.efficientnet import LITE0_SHA256, EfficientNetLite0, InvertedResidual, SameConv, lite0_file, load_lite0
from tl_tutorial.freezing import check_frozen, freeze, freeze_statistics, layers, parameter_groups, snapshot, unfreeze

# EfficientNet-Lite0


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 1), (7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 2), (1, 3, 2), (6, 5, 1)])
def test_same_padding_is_tensorflows(side: int, kernel: int, stride: int) -> None:
    "Output = ceil(input / stride); what cannot be shared out evenly is added at the end, below and on the right."
    convolution = SameConv(1, 1, kernel, stride, bias=True)
    images = torch.rand(1, 1, side, side + 1, generator=torch.Generator().manual_seed(0))
    pad = []
    for length in (side + 1, side): # torch's order: width first
        whole = max(0, (-(-length // stride) - 1) * stride + kernel - length)
        pad += [whole // 2, whole - whole // 2]
    expected = nn.functional.conv2d(nn.functional.pad(images, pad), convolution.weight, convolution.bias, stride)
    assert torch.allclose(convolution(images), expected, atol=1e-6) and expected.shape[2:] == (-(-side // stride), -(-(side + 1) // stride))
    grouped = SameConv(4, 4, kernel, stride, groups=4, bias=False)
    assert torch.allclose(grouped(images.expand(1, 4, -1, -1))[:, :1], nn.functional.conv2d(nn.functional.pad(images, pad), grouped.weight[:1], None, stride), atol=1e-6)


def test_a_block_adds_its_input_only_where_shapes_allow() -> None:
    images = torch.rand(1, 8, 6, 6)
    for outside, stride, added in ((8, 1, True), (8, 2, False), (12, 1, False)):
        block = InvertedResidual(8, outside, 3, 3, stride).eval()
        for part in block.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.zeros_(part.weight)
        found = block(images)
        assert found.shape == (1, outside, 6 // stride, 6 // stride)
        assert torch.allclose(found, images, atol=1e-6) if added else not found.any()
    assert isinstance(InvertedResidual(8, 8, 1, 3, 1).expand, nn.Identity) and not isinstance(InvertedResidual(8, 8, 2, 3, 1).expand, nn.Identity)


def test_the_embedded_network_has_the_published_shape() -> None:
    network = EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 and len(network.state_dict()) == 296 and len(network.blocks) == 16
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(part.eps, part.momentum) for part in norms} == {(1e-3, 0.01)} and not any(p.bias is not None for p in network.modules() if isinstance(p, nn.Conv2d))
    network = network.eval()
    with torch.no_grad():
        assert network.maps(torch.rand(1, 3, 64, 40)).shape == (1, 1280, 2, 2) and network(torch.rand(1, 3, 32, 32)).shape == (1, 1000)
    assert isinstance(EfficientNetLite0(0).classifier, nn.Identity)
    assert not [part for part in network.blocks[3].project if isinstance(part, nn.ReLU6)], "narrow layers stay linear"


def test_only_the_published_weights_are_read(tmp_path: Path) -> None:
    assert hashlib.sha256(lite0_file().read_bytes()).hexdigest() == LITE0_SHA256
    data = bytearray(lite0_file().read_bytes())
    data[100_000] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(tl.ModelError, match="w.pth: damaged or not the published file"):
        load_lite0(tmp_path / "w.pth")
    assert not load_lite0().training


# Networks


def test_a_network_normalises_its_pictures_itself() -> None:
    body = nn.Sequential(nn.Identity())
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = Network(body, 3, 2, Preprocess((0.1, 0.2, 0.3), (0.5, 0.25, 2.0)))
    expected = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert torch.allclose(found.features(images), expected.mean((2, 3)), atol=1e-6)
    grey = Network(body, 1, 2, Preprocess((0.5,), (0.25,)))
    assert torch.allclose(grey.features(images), ((images.mean(1, keepdim=True) - 0.5) / 0.25).mean((2, 3)), atol=1e-6)
    assert torch.equal(found(images), found.head(found.features(images))) and not found.head.bias.any() and 0 < found.head.weight.std() < 0.02
    assert set(found.state_dict()) == {"head.weight", "head.bias"}, "mean and std belong to the preprocessing, not to the weights"


def test_a_new_head_stands_in_the_place_of_the_old() -> None:
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9), nn.LogSoftmax(1))
    assert replace_head(body) == 5 and body(torch.rand(2, 3, 8, 8)).shape == (2, 5) and body(torch.rand(2, 3, 8, 8)).min() >= 0
    assert isinstance(body[3], nn.Linear) and isinstance(body[5], nn.Identity) and isinstance(body[6], nn.Identity)
    for bad, words in ((nn.Linear(3, 2), "single linear layer"), (nn.Sequential(nn.Conv2d(3, 3, 1)), "no linear layer")):
        with pytest.raises(tl.ModelError, match=words):
            replace_head(bad)


def test_the_small_network_halves_three_times() -> None:
    body = small_cnn(1, 4)
    assert body(torch.rand(2, 1, 16, 24)).shape == (2, 32, 2, 3) and len(blocks(body)) == 4
    assert [part.weight.shape[:2] for part in body.modules() if isinstance(part, nn.Conv2d)] == [(4, 1), (8, 4), (16, 8), (32, 16)]
    assert tl.create("small_cnn", 3).head.in_features == 256 and not tl.create("small_cnn", 3).pretrained
    assert tl.create("small_cnn", 3).preprocess.size == 64 and tl.create("small_cnn", 3).preprocess.least == 8


def test_what_starts_at_random_follows_the_seed() -> None:
    torch.manual_seed(5)
    one, two, three = (tl.create("small_cnn", 3, weights="none", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["head.weight"], three["head.weight"])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5))), "the caller's random numbers stay"
    assert torch.equal(tl.create("small_cnn", 3, weights="none").head.weight, tl.create("small_cnn", 3, weights="none", seed=42).head.weight)


def test_timm_is_asked_for_weights_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    real, asked = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: asked.append(pretrained) or real(name, pretrained=False, **more))
    for weights in ("default", "none"):
        network = tl.create("timm:test_resnet", 3, weights=weights)
        assert network.pretrained == (weights == "default") and network.head.in_features == network.features(torch.rand(1, 3, 64, 64)).shape[1]
    assert any(asked[:-1]) and not asked[-1]


def test_blocks_open_containers_and_lose_nothing() -> None:
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))
    body = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), inner, nn.BatchNorm2d(2))
    assert [part is expected for part, expected in zip(blocks(body), (body[0], inner[0], inner[1], body[3]), strict=True)] == [True] * 4
    flat = nn.Conv2d(3, 3, 1)
    assert blocks(flat) == [flat]


# Freezing and rates


def tiny() -> Network:
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)) for _ in range(3)))
    return Network(body, 3, 2, Preprocess())


def test_frozen_means_no_gradients_no_statistics_no_dropout() -> None:
    network, images = tiny(), torch.rand(4, 3, 4, 4)
    assert freeze(network.body[0]) is network.body[0]
    before = snapshot(network)
    network.train()
    assert network.training and network.body[1].training and not any(part.training for part in network.body[0].modules())
    network(images).sum().backward()
    changed = check_frozen(network, before)
    assert changed and all(name.startswith(("body.1.1.", "body.2.1.")) for name in changed), "statistics of the others follow the pictures"
    assert {name for name, p in network.named_parameters() if p.grad is None} == {name for name, _ in network.named_parameters() if name.startswith("body.0.")}
    assert torch.equal(network.body[0](images), network.body[0](images)), "no dropout"
    unfreeze(network.body[0])
    assert network.body[0].training and all(p.requires_grad for p in network.parameters())
    network.eval()
    assert not network.body[0].training and not torch.equal(before["body.1.1.running_mean"], network.body[1][1].running_mean)


def test_frozen_statistics_leave_the_weights_free() -> None:
    network = tiny()
    before = snapshot(network)
    assert freeze_statistics(network) is network
    network.train()(torch.rand(4, 3, 4, 4)).sum().backward()
    assert check_frozen(network, before) == [] and all(p.requires_grad for p in network.parameters()) and network.body[0][2].training


def test_a_snapshot_is_a_copy() -> None:
    network = tiny()
    before = snapshot(network)
    with torch.no_grad():
        network.head.bias += 1
        network.body[0][1].running_var *= 2
    assert check_frozen(network, before) == ["body.0.1.running_var", "head.bias"]


def test_groups_shrink_towards_the_picture_and_pull_weights_alone() -> None:
    groups = {group["name"]: group for group in parameter_groups(tiny(), 1.0, decay_rate=0.5, weight_decay=0.03)}
    assert {name: group["peak"] for name, group in groups.items() if "weights" in name} == {"3 weights": 1, "2 weights": 1, "1 weights": 0.5, "0 weights": 0.25}
    assert all(group["weight_decay"] == (0.03 if "weights" in name else 0) and group["lr"] == group["peak"] for name, group in groups.items())
    assert all((p.ndim > 1) == ("weights" in name) for name, group in groups.items() for p in group["params"])
    assert len({id(p) for group in groups.values() for p in group["params"]}) == 3 * 4 + 2
    default = {group["name"]: group for group in parameter_groups(tiny(), 2.0)}
    assert default["0 weights"]["peak"] == pytest.approx(2 * 0.7**2) and default["0 weights"]["weight_decay"] == 0.01
    network = tiny()
    freeze(network.body[0])
    assert not [group for group in parameter_groups(network, 1.0) if group["name"].startswith("0")]
    assert {group["name"][0] for group in parameter_groups(tiny(), 1.0, decay_rate=0.0)} == {"3", "2"}, "a rate of 0 learns nothing"


def test_one_number_alone_learns_without_a_pull() -> None:
    "A parameter without a shape, as a learned temperature is."
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return maps * self.scale

    body = nn.Sequential(nn.Conv2d(3, 3, 1), Scale())
    (group,) = (g for g in parameter_groups(Network(body, 3, 2, Preprocess()), 1.0) if any(p is body[1].scale for p in g["params"]))
    assert group["weight_decay"] == 0


def test_preprocessing_is_sound() -> None:
    for mean, std in (((0.5,) * 3, (0.5, 0.0, 0.5)), ((0.5,) * 3, (0.5, -1.0, 0.5)), ((0.5,) * 2, (0.5,) * 2), ((0.5,) * 3, (0.5,)), ((0.5,), ())):
        with pytest.raises(tl.ModelError, match="1 or 3 numbers each, std above 0"):
            Preprocess(mean, std)
    assert Preprocess((0.5,), (0.5,)).size == 224 and Preprocess().least == 32


def test_a_norm_that_stands_first_is_a_layer_of_its_own() -> None:
    body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    assert [len(row) for row in layers(body)] == [2, 4] # the other belongs to the convolution before it


def test_what_belongs_to_no_layer_learns_with_the_first() -> None:
    class Tokens(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Sequential(nn.Conv2d(3, 3, 1)) for _ in range(3)))
            self.token = nn.Parameter(torch.zeros(1, 3, 1, 1))

    learner = Network(Tokens(), 3, 2, Preprocess())
    groups = parameter_groups(learner, 1.0, decay_rate=0.5)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in learner.parameters()}
    own, = (group for group in groups if any(p is learner.body.token for p in group["params"]))
    assert own["lr"] == own["peak"] == min(group["lr"] for group in groups) == 0.5**2 and own["weight_decay"] == 0

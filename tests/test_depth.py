"""Relative depth: `tuned` and `decay_rate` mean the same for every network, and for EfficientNet-Lite0 what they meant before."""

import pytest
import torch
from torch import nn

import tl_tutorial as tl
from tl_tutorial.backbones import Network, Preprocess, blocks
from tl_tutorial.freezing import freeze_start, layers, parameter_groups

LONG = ["efficientnet_lite0", "alexnet", "vgg11", "resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "googlenet",
        "swin_t", "convnext_tiny", "timm:vit_tiny_patch16_224", "timm:resnet10t", "timm:efficientformer_l1"]


def made(arch: str) -> Network:
    "A network at random weights; timm's where it is installed."
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    return tl.create(arch, 3, weights="none")


@pytest.mark.parametrize("arch", LONG)
def test_rates_and_shares_mean_the_same(arch: str) -> None:
    network = made(arch)
    groups = parameter_groups(network, 2.0, decay_rate=0.8)
    rates = {group["name"].split()[0]: group["lr"] for group in groups}
    assert min(rates.values()) == pytest.approx(2 * 0.8**17) and max(rates.values()) == 2
    ordered = [rates[key] for key in sorted(rates, key=int)]
    assert ordered == sorted(ordered) and ordered[-1] == ordered[-2] == 2 # the head and the last layer
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in network.parameters()}
    rows, shares = layers(network.body), []
    assert len(rows) >= 6 and sum(p.numel() for row in rows for p in row) <= sum(p.numel() for p in network.body.parameters())
    for tuned in (0, 0.02, 0.25, 0.5, 0.75, 1):
        freeze_start(tl.unfreeze(network.body), tuned)
        shares.append(sum(any(p.requires_grad for p in row) for row in rows) / len(rows))
        learning = [any(p.requires_grad for p in row) for row in rows]
        assert learning == sorted(learning) # the end of the body
        assert all(p.requires_grad for row, on in zip(rows, learning, strict=True) if on for p in row)
    assert shares[0] == 0 and shares[1] > 0 and shares[-1] == 1
    for share, tuned in zip(shares[2:5], (0.25, 0.5, 0.75), strict=True):
        assert abs(share - tuned) <= 0.5 / len(rows) + 1e-9


def test_the_embedded_network_keeps_its_rates_and_its_frozen_share() -> None:
    network = tl.create("efficientnet_lite0", 3, weights="none")
    parts = blocks(network.body)
    assert len(parts) == len(layers(network.body)) == 18
    rate = {id(p): group["lr"] for group in parameter_groups(network, 1e-3, decay_rate=0.8) for p in group["params"]}
    for place, part in enumerate(parts):
        assert {rate[id(p)] for p in part.parameters()} == {1e-3 * 0.8 ** (17 - place)}
    for tuned in (1.0, 0.75, 0.6, 0.5, 0.25, 0.1, 0.0):
        freeze_start(tl.unfreeze(network.body), tuned)
        for place, part in enumerate(parts):
            frozen = place < round(18 * (1 - tuned))
            assert all(p.requires_grad != frozen for p in part.parameters())
            network.train()
            assert all(inner.training != frozen for inner in part.modules())


def small(count: int) -> Network:
    "A body of a few convolutions."
    return Network(nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(count))), 3, 2, Preprocess())


def test_in_a_body_of_a_few_layers_each_is_one_step() -> None:
    for count in (1, 2, 4, 6):
        rates = sorted({group["lr"] for group in parameter_groups(small(count), 1.0, decay_rate=0.5)}, reverse=True)
        assert rates == [0.5**k for k in range(count)]
    assert min(group["lr"] for group in parameter_groups(small(4), 1.0, decay_rate=0.5, steps=17)) == 0.5**17
    assert min(group["lr"] for group in parameter_groups(small(7), 1.0, decay_rate=0.5, steps=6)) == 0.5**6


def test_wrappers_attributes_and_rows_of_layers_are_opened() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(5):
                setattr(self, f"conv{number}", nn.Conv2d(3, 3, 3))
                setattr(self, f"norm{number}", nn.BatchNorm2d(3))

    row = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())))
    for body in (Wrapper(row), Wrapper(Wrapper(ByName())), nn.ModuleDict({"a": row})):
        assert len(layers(body)) == 5 and all(len(part) == 4 for part in layers(body)) # with the norm that follows
    lite0 = tl.create("efficientnet_lite0", 2, weights="none").body
    assert len(blocks(Wrapper(lite0))) == 18
    assert len(blocks(tl.create("googlenet", 2, weights="none").body)) == 12 # Inception modules stay whole


def test_tied_weights_belong_to_their_first_place() -> None:
    network = small(3)
    network.body[2][0].weight = network.body[0][0].weight
    groups = parameter_groups(network, 1.0, decay_rate=0.5)
    found = [group["lr"] for group in groups for p in group["params"] if p is network.body[0][0].weight]
    assert found == [0.25]
    torch.optim.AdamW(groups)


def test_tokens_are_frozen_with_the_beginning() -> None:
    class Tokens(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*small(4).body)
            self.token = nn.Parameter(torch.zeros(1, 3, 1, 1))

    body = freeze_start(Tokens(), 0.5)
    assert not body.token.requires_grad and not body[0][0].weight.requires_grad and body[3][0].weight.requires_grad
    assert freeze_start(Tokens(), 1).token.requires_grad


def test_learned_positions_are_not_pulled_where_timm_says_so() -> None:
    pytest.importorskip("timm")
    network = made("timm:vit_tiny_patch16_224")
    pulled = {id(p) for group in parameter_groups(network, 1.0) if group["weight_decay"] for p in group["params"]}
    assert id(network.body.pos_embed) not in pulled and id(network.body.blocks[0].mlp.fc1.weight) in pulled

"""What a third reading found: threads that draw, a folder that is gone, files in the wrong place, a rate after a resume."""

import torch
from torch import nn

from tl_tutorial.network import Network, Preprocess


def test_a_size_is_tried_without_computing() -> None:
    seen: list[str] = []

    class Body(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.device.type)
            return images

    Network(Body(), 3, 2, Preprocess()).check_size(64)
    assert seen == ["meta"]

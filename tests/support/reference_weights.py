"""A small detector, and weights in the layout of the MLPerf reference for it."""

import torch
import torchvision
from torch import Tensor, nn

from ssd_fast.config.sections import ModelConfig

CONFIG = ModelConfig(
    image_size=64,
    backbone="resnet18",
    backbone_weights="none",
    extra_channels=((16, 32), (8, 16)),
    extra_strides=(2, 2),
    extra_paddings=(1, 1),
    head_stride=1,
    anchor_steps=(8.0, 16.0, 32.0),
    anchor_scales=(8.0, 16.0, 32.0, 64.0),
    aspect_ratios=((2.0,), (2.0, 3.0), (2.0,)),
)
BOXES_PER_CELL = (4, 6, 4)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.rand(shape, generator=generator) - 0.4 for name, shape in shapes.items()}
    return {
        name: torch.tensor(7) if name.endswith("tracked") else tensor.abs() if name.endswith("var") else tensor
        for name, tensor in state.items()
    }


def reference_shapes(
    resnet: nn.Module, channels: list[int], narrow: list[int], boxes: tuple[int, ...], num_logits: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint in the layout of the MLPerf reference.

    There the backbone is the ResNet's children by number, the first six and the seventh apart.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (_, child) in enumerate(resnet.named_children()):
        prefix = {6: "model.layer2.0"}.get(number, f"model.layer1.{number}")
        if number < 7:
            shapes |= {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in child.state_dict().items()}
    for block, (inputs, middle, outputs) in enumerate(zip(channels[:-1], narrow, channels[1:], strict=True)):
        for place, shape in ((0, (middle, inputs, 1, 1)), (2, (outputs, middle, 3, 3))):
            shapes[f"additional_blocks.{block}.{place}.weight"] = shape
            shapes[f"additional_blocks.{block}.{place}.bias"] = shape[:1]
    for head, width in (("loc", 4), ("conf", num_logits)):
        for level, (inputs, count) in enumerate(zip(channels, boxes, strict=True)):
            shapes[f"{head}.{level}.weight"] = (count * width, inputs, 3, 3)
            shapes[f"{head}.{level}.bias"] = (count * width,)
    return shapes


def reference_state(num_classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    resnet = torchvision.models.resnet18(weights=None)
    return random_state(reference_shapes(resnet, [256, 32, 16], [16, 8], BOXES_PER_CELL, num_classes + 1), seed)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

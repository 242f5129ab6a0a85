"""The detector: a ResNet without its last stage, extra blocks, and two 3x3 heads on every feature map."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck, ResNet

from ssd_fast.config.sections import ModelConfig


class Predictions(NamedTuple):
    """Predictions for every anchor, in the order of `ssd_fast.model.anchors`.

    deltas: [B, A, 4], as `kernels.boxes.encode_deltas` returns them; under autocast in its dtype.
    logits: [B, A, C], same dtype; class 0 is background.
    """

    deltas: Tensor
    logits: Tensor


class SSD(nn.Module):
    """Single-shot detector whose feature maps, grids and number of predictions follow from its config.

    num_classes: without background, so that C = num_classes + 1.
    Both arguments are kept as attributes.
    All weights are freshly initialised: those of the backbone as in torchvision, those of extra blocks and heads
    Xavier-uniform with zero bias.
    Source: Liu et al. 2016 with the ResNet backbone of the MLPerf reference; no normalisation outside the backbone.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes = {num_classes}: expected at least 1, not counting background")
        self.config = config
        self.num_classes = num_classes
        per_cell = config.anchors_per_cell()
        self.num_anchors = sum(count * size**2 for count, size in zip(per_cell, config.grid_sizes(), strict=True))

        self.backbone, channels = _make_backbone(config.backbone)
        self.extras = nn.ModuleList()
        level_channels = [channels]
        extras = zip(config.extra_channels, config.extra_strides, config.extra_paddings, strict=True)
        for (narrow, wide), stride, padding in extras:
            self.extras.append(_make_extra(level_channels[-1], narrow, wide, stride, padding))
            level_channels.append(wide)
        self.box_heads = _make_heads(level_channels, per_cell, 4, config.head_stride)
        self.class_heads = _make_heads(level_channels, per_cell, num_classes + 1, config.head_stride)
        for part in (self.extras, self.box_heads, self.class_heads):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, but leave BatchNorm in that of evaluation if config.frozen_statistics."""
        super().train(mode)
        if self.config.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Predictions:
        """Predictions for normalised images [B, 3, S, S], where S is the config's image_size.

        With images and weights in channels_last, the only copy is the one that joins the levels.
        Raises ValueError for images of another shape.
        """
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images is {list(images.shape)}: expected [B, 3, {size}, {size}] (model.image_size)")
        feature_maps = [self.backbone(images)]
        for extra in self.extras:
            feature_maps.append(extra(feature_maps[-1]))
        deltas = [_rows(head(x), 4) for head, x in zip(self.box_heads, feature_maps, strict=True)]
        logits = [_rows(head(x), self.num_classes + 1) for head, x in zip(self.class_heads, feature_maps, strict=True)]
        predictions = Predictions(deltas=torch.cat(deltas, dim=1), logits=torch.cat(logits, dim=1))
        assert predictions.deltas.shape[1] == self.num_anchors, "the config's grid sizes differ from the network's"
        return predictions


def on_device(model: SSD, device: torch.device) -> SSD:
    """Move the model to a device, with its weights in channels_last, and return it."""
    return model.to(device).to(memory_format=torch.channels_last)


def _make_backbone(name: str) -> tuple[nn.Sequential, int]:
    """Return a torchvision ResNet up to layer3, which gets stride 1, and its number of output channels."""
    resnet = get_model(name, weights=None)
    assert isinstance(resnet, ResNet)
    first = resnet.layer3[0]
    strided = first.conv2 if isinstance(first, Bottleneck) else first.conv1
    for conv in (strided, first.downsample[0]):
        conv.stride = (1, 1)
    first.stride = 1
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone = nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in names))
    return backbone, first.downsample[0].out_channels


def _make_extra(channels: int, narrow: int, wide: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, narrow, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, wide, 3, stride=stride, padding=padding),
        nn.ReLU(inplace=True),
    )


def _make_heads(channels: Sequence[int], per_cell: Sequence[int], width: int, stride: int) -> nn.ModuleList:
    """Return one convolution per level; its output channels are `width` values for each anchor of a cell in turn."""
    return nn.ModuleList(
        nn.Conv2d(inputs, count * width, 3, stride=stride, padding=1)
        for inputs, count in zip(channels, per_cell, strict=True)
    )


def _rows(output: Tensor, width: int) -> Tensor:
    """Reshape a head's output [B, per_cell x width, H, W] to [B, H x W x per_cell, width]; a view if channels_last."""
    return output.permute(0, 2, 3, 1).reshape(output.shape[0], -1, width)

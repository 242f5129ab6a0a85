"""The network: shapes, sizes and costs that are published, and the order of its predictions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import REPOSITORY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import ModelConfig
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.loss import multibox_loss_mean
from ssd_fast.model.ssd import SSD, on_device

RECIPE = REPOSITORY / "configs" / "ssd300.toml"


def ssd300(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(load_config(RECIPE).model.model_dump() | changes)


def ssd1200() -> ModelConfig:
    return ssd300(
        image_size=1200,
        extra_strides=(2, 2, 2, 2, 1),
        head_stride=3,
        anchor_steps=(24.0, 48.0, 1200 / 13, 1200 / 7, 400.0, 400.0),
        anchor_scales=(84.0, 180.0, 396.0, 612.0, 828.0, 1044.0, 1260.0),
    )


def small(**changes: Any) -> ModelConfig:
    """Three levels of 8, 4 and 2 cells a side: 64 x 4 + 16 x 6 + 4 x 4 = 368 anchors."""
    values = {
        "image_size": 64,
        "backbone": "resnet18",
        "backbone_weights": "none",
        "extra_channels": ((16, 32), (8, 16)),
        "extra_strides": (2, 2),
        "extra_paddings": (1, 1),
        "head_stride": 1,
        "anchor_steps": (8.0, 16.0, 32.0),
        "anchor_scales": (8.0, 16.0, 32.0, 64.0),
        "aspect_ratios": ((2.0,), (2.0, 3.0), (2.0,)),
    }
    return ModelConfig.model_validate(values | changes)


def on_meta(config: ModelConfig, num_classes: int = 80) -> SSD:
    with torch.device("meta"):
        return SSD(config, num_classes)


def gigaflops(model: SSD) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        size = model.config.image_size
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize(("config", "num_anchors", "cost"), [(ssd300(), 8732, 31.72), (ssd1200(), 15130, 432.8)])
def test_the_published_models_have_their_size_and_cost(config: ModelConfig, num_anchors: int, cost: float) -> None:
    model = on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(19.97, abs=0.005)
    assert model.num_anchors == num_anchors == len(model_anchors(config))
    assert gigaflops(model) == pytest.approx(cost, rel=2e-4)


@pytest.mark.parametrize(("backbone", "channels"), [("resnet18", 256), ("resnet34", 256), ("resnet50", 1024)])
def test_every_backbone_ends_with_layer3_at_stride_8(backbone: str, channels: int) -> None:
    model = on_meta(ssd300(backbone=backbone))
    assert model.backbone(torch.empty(1, 3, 300, 300, device="meta")).shape == (1, channels, 38, 38)
    assert not any(name.startswith(("backbone.layer4", "backbone.fc")) for name in model.state_dict())
    assert model(torch.empty(2, 3, 300, 300, device="meta")).logits.shape == (2, 8732, 81)


@settings(max_examples=12, deadline=None)
@given(st.integers(64, 700), st.integers(1, 3), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1)), max_size=4))
def test_configuration_and_network_agree_on_the_grids(
    size: int, head_stride: int, extras: list[tuple[int, int]]
) -> None:
    levels = len(extras) + 1
    changes = {
        "image_size": size,
        "extra_channels": ((2, 2),) * len(extras),
        "extra_strides": tuple(stride for stride, _ in extras),
        "extra_paddings": tuple(padding for _, padding in extras),
        "head_stride": head_stride,
        "anchor_steps": (1.0,) * levels,
        "anchor_scales": tuple(float(8 + level) for level in range(levels + 1)),
        "aspect_ratios": ((2.0,),) * levels,
    }
    draft = ModelConfig.model_construct(**small().model_dump() | changes)
    if min(draft.feature_sizes()) < 1 or min(draft.grid_sizes()) < 1:
        return
    config = small(**changes | {"anchor_steps": tuple(size / grid for grid in draft.grid_sizes())})
    predictions = on_meta(config, num_classes=1)(torch.empty(1, 3, size, size, device="meta"))
    assert predictions.deltas.shape == (1, len(model_anchors(config)), 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictions_come_in_the_order_level_row_column_shape(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = SSD(small(), num_classes=3).eval()
    model.to(memory_format=memory_format)
    images = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    with torch.no_grad():
        deltas, logits = model(images)
        row_of_prediction, features = 0, model.backbone(images)
        for level, (grid_size, shapes) in enumerate(((8, 4), (4, 6), (2, 4))):
            boxes, classes = model.box_heads[level](features), model.class_heads[level](features)
            for row in range(grid_size):
                for column in range(grid_size):
                    for shape in range(shapes):
                        box = boxes[:, shape * 4 : shape * 4 + 4, row, column]
                        scores = classes[:, shape * 4 : shape * 4 + 4, row, column]  # 3 classes and background
                        assert torch.equal(deltas[:, row_of_prediction], box)
                        assert torch.equal(logits[:, row_of_prediction], scores)
                        row_of_prediction += 1
            features = model.extras[level](features) if level < 2 else features
    assert row_of_prediction == deltas.shape[1] == logits.shape[1]


def test_channels_last_goes_through_and_the_heads_output_is_the_prediction_matrix() -> None:
    torch.manual_seed(0)
    model = SSD(small(), num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        model = on_device(model, torch.device("cpu"))
        outputs = []
        for head in (*model.box_heads, *model.class_heads):
            head.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        found = model(images.to(memory_format=torch.channels_last))
    assert len(outputs) == 6
    assert all(output.permute(0, 2, 3, 1).is_contiguous() for output in outputs)
    torch.testing.assert_close(found.deltas, expected.deltas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_its_dtype_and_trains() -> None:
    torch.manual_seed(0)
    model = on_device(SSD(small(), num_classes=3), torch.device("cpu"))
    labels = torch.zeros(2, 368, dtype=torch.int32)
    labels[:, ::3] = 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
        assert predictions.deltas.dtype == predictions.logits.dtype == torch.bfloat16
        loss = multibox_loss_mean(predictions, torch.zeros(2, 368, 4), labels)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_extras_and_heads_start_xavier_uniform_with_zero_bias_and_without_normalisation() -> None:
    torch.manual_seed(0)
    model = SSD(small(), num_classes=20)
    for part in (model.extras, model.box_heads, model.class_heads):
        for module in part.modules():
            assert isinstance(module, (nn.ModuleList, nn.Sequential, nn.ReLU, nn.Conv2d))
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                bound = math.sqrt(6 / (area * (module.in_channels + module.out_channels)))
                assert module.weight.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
                assert module.bias is not None
                assert module.bias.eq(0).all()


def test_names_of_the_state_dict_are_stable() -> None:
    names = set(on_meta(small(), num_classes=3).state_dict())
    expected = {"backbone.conv1.weight", "backbone.bn1.running_mean", "backbone.layer3.0.conv1.weight"}
    expected |= {"extras.0.0.weight", "extras.1.2.bias", "box_heads.0.weight", "class_heads.2.bias"}
    assert expected <= names
    assert {name.split(".")[0] for name in names} == {"backbone", "extras", "box_heads", "class_heads"}


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(SSD(small(), num_classes=3).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["class_heads.0.weight"], states[2]["class_heads.0.weight"])


@pytest.mark.parametrize("shape", [(1, 3, 300, 300), (1, 3, 64, 63), (1, 1, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images is \[.*\]: expected \[B, 3, 64, 64\] \(model.image_size\)"):
        on_meta(small(), num_classes=3)(torch.empty(shape, device="meta"))


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes = 0"):
        SSD(small(), num_classes=0)

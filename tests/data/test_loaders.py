"""The loaders of a recipe: which encoder they take."""

from pathlib import Path

import torch
from pipelines import CPU
from repository import REPOSITORY
from tiny import tiny_config

from kernels.reference import encode_boxes
from ssd_fast.config.recipe import load_config
from ssd_fast.data.coco import load_coco
from ssd_fast.data.loaders import box_encoder, make_encode, make_train_loader
from ssd_fast.distributed.world import World
from ssd_fast.model.anchors import model_anchors, reference_order


def test_the_recipe_names_the_encoder_and_auto_is_ours_on_the_cpu(synthetic_set: Path) -> None:
    images = load_coco(synthetic_set / "annotations" / "instances_train2017.json", synthetic_set / "train2017")
    states = {}
    for setting in ("auto", "dali", "kernels"):
        config = tiny_config([f"data.box_encoder={setting}"])
        with make_train_loader(config, images, model_anchors(config.model), CPU, World()) as loader:
            states[setting] = loader.state().partition(b"\n")[0]
    assert b'"box encoder": "dali"' in states["dali"]
    assert b'"box encoder": "kernels"' in states["kernels"]
    assert states["auto"] == states["kernels"]
    assert box_encoder("auto", torch.device("cuda")) == "dali"


def test_in_training_ties_fall_as_in_the_mlperf_reference() -> None:
    config = load_config(REPOSITORY / "configs" / "ssd300.toml", ["data.box_encoder=kernels"])
    anchors, model = model_anchors(config.model), config.model
    corners = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) * 0.98
    boxes = torch.cat((corners, corners + 0.02), dim=1)  # so small that they lie within several anchors of an area
    ground_truths = boxes, torch.arange(1, 65, dtype=torch.int32), torch.arange(65)
    encode = make_encode(config, anchors)
    assert encode is not None
    labels = encode(*ground_truths)[1]
    order = reference_order(grid_sizes=model.grid_sizes(), anchors_per_cell=model.anchors_per_cell())
    assert torch.equal(labels, encode_boxes(*ground_truths, anchors, tie_ranks=order).labels)
    assert not torch.equal(labels, encode_boxes(*ground_truths, anchors).labels)

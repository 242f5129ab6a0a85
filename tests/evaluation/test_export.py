"""ONNX: what onnxruntime computes is what PyTorch and the operators compute, to the rules."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from tiny import tiny_config
from torch import Tensor, nn
from typer.testing import CliRunner

import kernels
from ssd_fast.__main__ import app
from ssd_fast.config.recipe import dump_toml
from ssd_fast.config.sections import DetectionConfig
from ssd_fast.data.annotations import Category
from ssd_fast.evaluation.detector import Detector
from ssd_fast.evaluation.export import ExportError, check_onnx, to_onnx
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD, Predictions

CATEGORIES = (Category(3, "disc"), Category(7, "bar"), Category(9, "ring"))
NUM_ANCHORS, NUM_LOGITS = 340, len(CATEGORIES) + 1
RULES = DetectionConfig(score_threshold=0.05, iou_threshold=0.5, max_per_class=40, max_detections=60)


class Echo(nn.Module):
    """A network whose predictions are its input's first values."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_config().model
        self.num_anchors, self.num_classes = NUM_ANCHORS, len(CATEGORIES)

    def forward(self, images: Tensor) -> Predictions:
        deltas, logits, _ = images.flatten(1).split(
            [NUM_ANCHORS * 4, NUM_ANCHORS * NUM_LOGITS, 3 * 64 * 64 - NUM_ANCHORS * (4 + NUM_LOGITS)], dim=1
        )
        return Predictions(deltas.unflatten(1, (-1, 4)), logits.unflatten(1, (-1, NUM_LOGITS)))


def echoed(deltas: Tensor, logits: Tensor) -> np.ndarray:
    values = torch.cat([deltas.flatten(1), logits.flatten(1)], dim=1)
    return nn.functional.pad(values, (0, 3 * 64 * 64 - values.shape[1])).unflatten(1, (3, 64, 64)).numpy()


def detector_of(model: Any, anchors_cxcywh: Tensor, detection: DetectionConfig = RULES) -> Detector:
    return Detector(model, anchors_cxcywh, detection=detection, categories=CATEGORIES, dtype=torch.float32)


def detect(session: InferenceSession, deltas: Tensor, logits: Tensor) -> kernels.Detections:
    return kernels.Detections(*map(torch.from_numpy, session.run(None, {"images": echoed(deltas, logits)})))


@pytest.fixture(scope="module")
def grid_anchors() -> Tensor:
    """Anchors on a grid of eighths: many overlap by exactly a half, in numbers that rounding leaves alone."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randint(0, 5, (NUM_ANCHORS, 2), generator=generator)
    high = low + torch.tensor([1, 2, 4])[torch.randint(0, 3, (NUM_ANCHORS, 2), generator=generator)]
    return torch.cat([low + high, 2 * (high - low)], dim=1) / 16


@pytest.fixture(scope="module")
def decoding(grid_anchors: Tensor) -> InferenceSession:
    """Decoding alone, of predictions that are given as pixels."""
    detector = detector_of(Echo(), grid_anchors)
    content = to_onnx(detector, with_decode=True)
    assert check_onnx(content, detector, with_decode=True, batch_size=2) == (
        "onnxruntime and PyTorch agree on 120 of 120 detections"
    )
    other_rules = detector_of(Echo(), grid_anchors, RULES.model_copy(update={"iou_threshold": 0.9}))
    with pytest.raises(ExportError, match=r"agree on .* detections: expected nearly all of 60"):
        check_onnx(content, other_rules, with_decode=True)
    return InferenceSession(content)


def test_the_command_writes_a_network_that_agrees_in_batches_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model = SSD(config.model, len(CATEGORIES)).eval()
    detector = detector_of(model, model_anchors(config.model))
    weights, recipe, names, path = (tmp_path / name for name in ("weights.pth", "tiny.toml", "names.json", "m.onnx"))
    torch.save(model.state_dict(), weights)
    recipe.write_text(dump_toml(config))
    categories = [category._asdict() for category in CATEGORIES]
    names.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    given = ["--checkpoint", str(weights), "--config", str(recipe), "--annotations", str(names)]
    result = CliRunner().invoke(app, ["export", *given, "--output", str(tmp_path / "nowhere" / "model.onnx")])
    assert "expected a file in a folder that exists" in str(result.exception)
    result = CliRunner().invoke(app, ["export", *given, "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert re.search(r"m\.onnx: 11\.\d MB; onnxruntime's predictions differ from PyTorch's by ", result.stdout)

    session = InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["deltas", "logits"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["categories"]) == categories
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, 64, 64)
        with torch.no_grad():
            expected = model(images)
        for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.state_dict()["class_heads.1.bias"][5] += 0.5
    with pytest.raises(ExportError, match=r"predictions differ from PyTorch's by .*: expected at most 0\.0001"):
        check_onnx(path.read_bytes(), detector, with_decode=False)


def test_ties_and_overlaps_of_exactly_the_threshold_fall_as_in_the_operator(
    decoding: InferenceSession, grid_anchors: Tensor
) -> None:
    levels = torch.tensor([-3.0, 0.0, 1.0, 2.0])  # few values: most scores are equal to many others
    logits = levels[torch.randint(0, 4, (4, NUM_ANCHORS, NUM_LOGITS), generator=torch.Generator().manual_seed(2))]
    deltas = torch.zeros(4, NUM_ANCHORS, 4)
    expected = kernels.decode_nms(deltas, logits, grid_anchors, **RULES.model_dump())
    just_above = {**RULES.model_dump(), "iou_threshold": float(np.nextafter(np.float32(0.5), np.float32(1)))}
    assert not torch.equal(kernels.decode_nms(deltas, logits, grid_anchors, **just_above).labels, expected.labels)
    found = detect(decoding, deltas, logits)
    assert expected.counts.tolist() == [60] * 4
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.boxes_ltrb, expected.boxes_ltrb)
    torch.testing.assert_close(found.scores, expected.scores)


def test_only_the_best_of_a_class_enter_suppression(decoding: InferenceSession, grid_anchors: Tensor) -> None:
    deltas, logits = torch.zeros(1, NUM_ANCHORS, 4), torch.zeros(1, NUM_ANCHORS, NUM_LOGITS)
    logits[0, :, 0] = 9
    deltas[0, :40, :2] = (0.5 - grid_anchors[:40, :2]) / grid_anchors[:40, 2:] / 0.1  # the best 40 are one box
    deltas[0, :40, 2:] = (0.25 / grid_anchors[:40, 2:]).log() / 0.2
    logits[0, :40, 2], logits[0, 40:50, 2] = 12, 11
    expected = kernels.decode_nms(deltas, logits, grid_anchors, **RULES.model_dump())
    found = detect(decoding, deltas, logits)
    assert found.counts.tolist() == expected.counts.tolist() == [1]
    torch.testing.assert_close(found.boxes_ltrb[0, 0], torch.tensor([0.375, 0.375, 0.625, 0.625]))


def test_images_without_detections_are_empty_beside_others(decoding: InferenceSession, grid_anchors: Tensor) -> None:
    deltas, logits = torch.zeros(3, NUM_ANCHORS, 4), torch.zeros(3, NUM_ANCHORS, NUM_LOGITS)
    logits[:, :, 0] = 20
    assert detect(decoding, deltas, logits).counts.tolist() == [0, 0, 0]
    logits[1, 5, 3] = 25
    found = detect(decoding, deltas, logits)
    assert found.counts.tolist() == [0, 1, 0]
    assert found.labels[1, 0] == 3
    assert (found.boxes_ltrb[1] != 0).any(dim=1).sum() == 1
    assert not found.scores[[0, 2]].any()
    assert not found.boxes_ltrb[[0, 2]].any()


def test_the_operator_and_onnx_agree_on_predictions_as_of_a_network(
    decoding: InferenceSession, grid_anchors: Tensor
) -> None:
    generator = torch.Generator().manual_seed(3)
    deltas = torch.randn(5, NUM_ANCHORS, 4, generator=generator)
    logits = 3 * torch.randn(5, NUM_ANCHORS, NUM_LOGITS, generator=generator)
    expected = kernels.decode_nms(deltas, logits, grid_anchors, **RULES.model_dump())
    found = detect(decoding, deltas, logits)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes_ltrb, expected.boxes_ltrb, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_what_onnx_cannot_say_is_refused(grid_anchors: Tensor) -> None:
    with pytest.raises(ExportError, match=r"detection\.iou_threshold = 0: expected more"):
        to_onnx(detector_of(Echo(), grid_anchors, RULES.model_copy(update={"iou_threshold": 0.0})), with_decode=True)
    with pytest.raises(ExportError, match=r"detection\.max_detections = 1021: expected at most 1020"):
        to_onnx(detector_of(Echo(), grid_anchors, RULES.model_copy(update={"max_detections": 1021})), with_decode=True)

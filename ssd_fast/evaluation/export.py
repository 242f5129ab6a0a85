"""Export of a detector as ONNX: the network alone, or with decoding and non-maximum suppression.

Owner of ONNX's packages. The file consists of standard operators of opset 18, in float32, and takes any batch size.
Decoding follows the rules of `kernels.decode_nms`, including IoUs equal to the threshold and the order of equal scores,
as long as all numbers are finite.
"""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import kernels
from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE
from ssd_fast.config.sections import Config, DetectionConfig
from ssd_fast.data.annotations import read_categories
from ssd_fast.evaluation.detector import Detector, load_detector
from ssd_fast.files import check_writable, write_atomically
from ssd_fast.model.ssd import SSD, Predictions

_PRODUCER = "ssd_fast"
_NETWORK_TOLERANCE = 1e-4  # as a fraction of an output's largest value
_SCORE_TOLERANCE, _BOX_TOLERANCE = 1e-4, 1e-3
_SHARE_TO_AGREE = 0.99  # rounding may decide differently where a score or an IoU is close to its threshold


class ExportError(ValueError):
    """A detector that ONNX cannot express, or an ONNX file whose results differ; the message says why."""


class _Decoding(nn.Module):
    """A network followed by the operator that decodes its predictions."""

    anchors_cxcywh: Tensor

    def __init__(self, network: SSD, anchors_cxcywh: Tensor, detection: DetectionConfig) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("anchors_cxcywh", anchors_cxcywh)
        self.detection = detection

    def forward(self, images: Tensor) -> kernels.Detections:
        deltas, logits = self.network(images)
        return kernels.decode_nms(deltas, logits, self.anchors_cxcywh, **self.detection.model_dump())


class Exported(NamedTuple):
    """num_bytes: size of the file. agreement: the result of `check_onnx`."""

    num_bytes: int
    agreement: str | None


def export_onnx(
    checkpoint: Path,
    output: Path,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    annotations: Path | None = None,
    with_decode: bool = False,
) -> Exported:
    """Write the detector of a checkpoint to an ONNX file, after comparing it with PyTorch.

    checkpoint, config, overrides: as for `load_detector`.
    annotations: COCO JSON with the class names, for weights without names whose classes are not COCO's.
    with_decode: include decoding and non-maximum suppression.
    Raises ValueError for a checkpoint that cannot be used, and ExportError.
    """
    _require_packages()
    check_writable(output, "--output", _is_export)
    categories = read_categories(annotations) if annotations else None
    detector, _ = load_detector(
        checkpoint, torch.device("cpu"), config=config, overrides=overrides, categories=categories
    )
    content = to_onnx(detector, with_decode=with_decode)
    agreement = check_onnx(content, detector, with_decode=with_decode)
    write_atomically(output, content)
    return Exported(len(content), agreement)


def to_onnx(detector: Detector, *, with_decode: bool) -> bytes:
    """Return the content of an ONNX file.

    detector: on the CPU.
    The file's input is `images` [B, 3, S, S] float32, normalised. Its outputs are `deltas` and `logits`, as in
    `Predictions`, or with_decode `boxes_ltrb`, `scores`, `labels` and `counts`, as in `kernels.Detections`. Metadata
    hold the categories as JSON.
    Raises ExportError when a package is missing or ONNX cannot express the configuration.
    """
    _require_packages()
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if with_decode:
        _require_expressible(detector)
    module, outputs = _module(detector, with_decode=with_decode)
    size = detector.model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, size, size),),  # traced, not computed; a batch of one would become a constant
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes={"images": {0: "batch"}},
            opset_version=18,
            dynamo=True,
            custom_translation_table={torch.ops.ssd_fast.decode_nms.default: _decode_nms},
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # removes the source line of each operator
    content = program.model_proto
    categories = json.dumps([category._asdict() for category in detector.categories])
    content.producer_name = _PRODUCER
    content.metadata_props.add(key="categories", value=categories)
    return content.SerializeToString()


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ExportError(f"{names} not installed: expected after pip install '.[export]' in the project's folder")


def _is_export(path: Path) -> bool:
    """Whether to_onnx has made a file."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False).producer_name == _PRODUCER
    except Exception:  # errors of several packages, on files of others
        return False


def check_onnx(content: bytes, detector: Detector, *, with_decode: bool) -> str | None:
    """Compare onnxruntime with PyTorch on random images; return the result as a sentence.

    Return None if onnxruntime is not installed.
    content: of `to_onnx` with the same detector and with_decode.
    Raises ExportError when predictions differ by more than 1e-4 of the largest one, or when fewer than 99% of the
    detections are the same.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    module, names = _module(detector, with_decode=with_decode)
    size = detector.model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(value) for value in session.run(names, {"images": images.numpy()})]
    with torch.inference_mode():
        expected = list(module(images))
    for name, theirs, ours in zip(names, found, expected, strict=True):
        if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
            raise ExportError(
                f"onnxruntime's {name} is {theirs.dtype} {list(theirs.shape)}: expected {ours.dtype} {list(ours.shape)}"
            )
    if with_decode:
        return _compare_detections(kernels.Detections(*found), kernels.Detections(*expected))
    return _compare_predictions(found, expected)


def _module(detector: Detector, *, with_decode: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the module to export and the names of its outputs."""
    if not with_decode:
        return detector.model.eval(), Predictions._fields
    decoding = _Decoding(detector.model, detector.anchors_cxcywh, detector.detection)
    return decoding.eval(), kernels.Detections._fields


def _require_expressible(detector: Detector) -> None:
    if detector.detection.iou_threshold == 0:
        raise ExportError("detection.iou_threshold = 0: expected more, as ONNX cannot drop all but the best of a class")
    most = detector.model.num_anchors * detector.model.num_classes
    if detector.detection.max_detections > most:
        raise ExportError(
            f"detection.max_detections = {detector.detection.max_detections}: expected at most {most}, the number of "
            "anchors times that of classes"
        )


def _decode_nms(
    deltas: Any,
    logits: Any,
    anchors_cxcywh: Any,
    score_threshold: float,
    iou_threshold: float,
    max_per_class: int,
    max_detections: int,
) -> tuple[Any, Any, Any, Any]:
    """Translate `torch.ops.ssd_fast.decode_nms` to ONNX operators; all tensors are symbols of the graph."""
    from onnxscript import opset18

    op: Any = opset18  # takes Python numbers, which its type hints do not allow
    _, num_anchors, num_logits = logits.shape
    num_classes = num_logits - 1

    delta_centres, delta_sizes, anchor_centres, anchor_sizes = (
        op.Slice(tensor, [start], [start + 2], [-1]) for tensor in (deltas, anchors_cxcywh) for start in (0, 2)
    )
    centres = op.Add(op.Mul(op.Mul(delta_centres, CENTRE_VARIANCE), anchor_sizes), anchor_centres)
    half_sizes = op.Mul(op.Mul(op.Exp(op.Mul(delta_sizes, SIZE_VARIANCE)), anchor_sizes), 0.5)
    boxes_ltrb = op.Concat(op.Sub(centres, half_sizes), op.Add(centres, half_sizes), axis=-1)  # [B, A, 4]

    probabilities = op.Softmax(logits, axis=-1)
    scores = op.Slice(probabilities, [1], [num_logits], [2])  # [B, A, K]
    by_class = op.Transpose(scores, perm=[0, 2, 1])  # [B, K, A]
    nothing = op.Mul(by_class, 0.0)
    best_scores, best_anchors = op.TopK(by_class, [min(max_per_class, num_anchors)], axis=-1)
    entering = op.ScatterElements(nothing, best_anchors, best_scores, axis=-1)
    # ONNX drops IoUs above its threshold, decode_nms those at or above it: lower the threshold by one bit.
    threshold_before = float(np.nextafter(np.float32(iou_threshold), np.float32(0)))
    kept = op.NonMaxSuppression(  # [N, 3]: image, class, anchor
        boxes_ltrb, entering, [max_per_class], threshold_before, score_threshold
    )
    survivors = op.ScatterND(nothing, kept, op.GatherND(by_class, kept))  # [B, K, A], 0 where suppressed

    # Among equal scores TopK prefers the lower place: the lower anchor, then the lower class.
    flat = op.Reshape(op.Transpose(survivors, perm=[0, 2, 1]), [0, num_anchors * num_classes])
    best, places = op.TopK(flat, [max_detections], axis=-1)  # [B, D] each
    found = op.Greater(best, 0.0)
    boxes = op.GatherND(boxes_ltrb, op.Unsqueeze(op.Div(places, num_classes), [-1]), batch_dims=1)
    labels = op.Add(op.Mod(places, num_classes), 1)
    return (
        op.Where(op.Unsqueeze(found, [-1]), boxes, 0.0),
        best,
        op.Cast(op.Where(found, labels, 0), to=6),  # int32
        op.ReduceSum(op.Cast(found, to=6), [1], keepdims=0),
    )


def _compare_predictions(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    pairs = zip(found, expected, strict=True)
    worst = max(float((theirs - ours).abs().max() / ours.abs().max()) for theirs, ours in pairs)
    if not worst <= _NETWORK_TOLERANCE:
        raise ExportError(
            f"onnxruntime's predictions differ from PyTorch's by {worst:.1e} of the largest one: expected at most "
            f"{_NETWORK_TOLERANCE:g}"
        )
    return f"onnxruntime's predictions differ from PyTorch's by {worst:.1e} of the largest one"


def _compare_detections(found: kernels.Detections, expected: kernels.Detections) -> str:
    num_same = 0
    for image, counts in enumerate(zip(found.counts.tolist(), expected.counts.tolist(), strict=True)):
        both = list(zip((found, expected), counts, strict=True))
        labels, other_labels = (values.labels[image, :count] for values, count in both)
        scores, other_scores = (values.scores[image, :count] for values, count in both)
        boxes, other_boxes = (values.boxes_ltrb[image, :count] for values, count in both)
        same = labels[:, None] == other_labels
        same &= (scores[:, None] - other_scores).abs() <= _SCORE_TOLERANCE
        same &= ((boxes[:, None] - other_boxes).abs() <= _BOX_TOLERANCE).all(dim=-1)
        num_same += int(torch.minimum(same.any(dim=0).sum(), same.any(dim=1).sum()))
    most = int(torch.maximum(found.counts, expected.counts).sum())
    if num_same < _SHARE_TO_AGREE * most:
        raise ExportError(f"onnxruntime and PyTorch agree on {num_same} detections: expected nearly all of {most}")
    return f"onnxruntime and PyTorch agree on {num_same} of {most} detections"

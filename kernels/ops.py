"""The compiled operators, for the CPU and for CUDA, with support for torch.compile and autograd.

Arguments, results and rules are those of `kernels.reference`; each docstring states the differences.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.types import Detections, LossParts, Targets


def _load_library() -> None:
    path = Path(__file__).with_name("_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if not path.is_file():
        raise ImportError(f"{path}: the kernels are not built: expected after `make install` or `pip install -e .`")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"{path}: not built for PyTorch {torch.__version__}: build it again ({error})") from None


_load_library()


def cuda_build() -> str:
    """GPUs that the operators were compiled for, or the reason why there are none."""
    return torch.ops.ssd_fast.cuda_build()


def encode_boxes(
    boxes_ltrb: Tensor,
    labels: Tensor,
    offsets: Tensor,
    anchors_cxcywh: Tensor,
    *,
    iou_threshold: float = 0.5,
    tie_ranks: Tensor | None = None,
) -> Targets:
    """Targets of every anchor from the ground truths of a batch, as in `kernels.reference.encode_boxes`.

    boxes_ltrb: [T, 4] float32; labels: [T] and offsets: [B + 1] int32 or int64; anchors_cxcywh: [A, 4]; tie_ranks: [A]
    int32 or int64. All on one device. Returns deltas [B, A, 4] float32 and labels [B, A] int32.

    On a GPU two launches serve the batch. The host neither waits nor reads values, so ground truths without area or
    with a label below 1 are left out there, where the CPU raises ValueError.
    Never holds the matrix of IoUs. Labels and ties equal those of the plain version in float32 exactly.
    """
    ranks = {} if tie_ranks is None else {"tie_ranks": tie_ranks}
    _require_one_device(boxes_ltrb=boxes_ltrb, labels=labels, offsets=offsets, anchors_cxcywh=anchors_cxcywh, **ranks)
    return Targets(
        *torch.ops.ssd_fast.encode_boxes(boxes_ltrb, labels, offsets, anchors_cxcywh, iou_threshold, tie_ranks)
    )


def multibox_loss(deltas: Tensor, logits: Tensor, target_deltas: Tensor, target_labels: Tensor) -> LossParts:
    """Box and class loss of every image, as in `kernels.reference.multibox_loss`; differentiable once.

    deltas: [B, A, 4] and logits: [B, A, C] float16, bfloat16, float32 (all computed in float32) or float64.
    target_deltas: [B, A, 4] floating point; target_labels: [B, A] int32 or int64.
    Returns box and class_ [B], float32 (float64 for float64).

    Fuses log-softmax, SmoothL1, hard-negative mining and the sums. Reads the logits once, and those of the anchors in
    the loss once more in the backward pass. Holds nothing of size [B, A, C] except the gradient, and never sorts. A
    label outside 0 to C - 1 makes its image's loss NaN. Deterministic; ties as in the plain version.
    """
    _require_one_device(deltas=deltas, logits=logits, target_deltas=target_deltas, target_labels=target_labels)
    deltas, logits = _of_one_dtype(deltas, logits)
    box, class_, _, _ = torch.ops.ssd_fast.multibox_loss(deltas, logits, target_deltas, target_labels)
    return LossParts(box=box, class_=class_)


def resize_normalise(
    images: Sequence[Tensor], size: int, *, matrices: Tensor, mirrored: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The network's input from decoded images, as in `kernels.reference.resize_normalise`; on the CPU only.

    images: B times uint8 [H, W, 3], of any sizes. matrices: [B, 3, 4], low and high: [3], float32.
    mirrored: [B] bool. Returns [B, size, size, 3] float32.
    """
    return torch.ops.ssd_fast.resize_normalise(list(images), size, matrices, mirrored, low, high)


def decode_nms(
    deltas: Tensor,
    logits: Tensor,
    anchors_cxcywh: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_per_class: int = 200,
    max_detections: int = 200,
) -> Detections:
    """Detections in a batch of images, as in `kernels.reference.decode_nms`; not differentiable.

    deltas: [B, A, 4] and logits: [B, A, C] float16, bfloat16 or float32; all are computed in float32.
    anchors_cxcywh: [A, 4] floating point.

    Fuses softmax, threshold, decoding, suppression and the choice of the best. Most anchors cost one comparison for
    each logit: exponentials are computed only if the logit of a class comes within log(1 / score_threshold) of the
    background's. On a GPU the host does not wait and sizes do not depend on values, so a CUDA graph can capture the
    call. Deterministic; ties and values that are not finite as in the plain version.
    """
    _require_one_device(deltas=deltas, logits=logits, anchors_cxcywh=anchors_cxcywh)
    deltas, logits = _of_one_dtype(deltas, logits)
    return Detections(
        *torch.ops.ssd_fast.decode_nms(
            deltas, logits, anchors_cxcywh, score_threshold, iou_threshold, max_per_class, max_detections
        )
    )


def _require_one_device(**tensors: Tensor) -> None:
    """Raise ValueError for tensors on several devices, RuntimeError if the operators lack a build for their device."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}: expected {device}, like the others")
    if device.type == "cuda" and cuda_build().startswith("CUDA not built"):
        raise RuntimeError(f"the kernels were installed without CUDA ({cuda_build()})")


def _of_one_dtype(deltas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    if deltas.dtype == logits.dtype or not (deltas.is_floating_point() and logits.is_floating_point()):
        return deltas, logits
    dtype = torch.promote_types(deltas.dtype, logits.dtype)
    return deltas.to(dtype), logits.to(dtype)


@torch.library.register_fake("ssd_fast::encode_boxes")
def _encode_boxes_shapes(
    boxes_ltrb: Tensor,
    labels: Tensor,
    offsets: Tensor,
    anchors_cxcywh: Tensor,
    iou_threshold: float,
    tie_ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, anchors_cxcywh.shape[0])
    return boxes_ltrb.new_empty(*shape, 4), boxes_ltrb.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("ssd_fast::multibox_loss")
def _multibox_loss_shapes(
    deltas: Tensor, logits: Tensor, target_deltas: Tensor, target_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    batch_size, num_anchors, _ = deltas.shape
    return (
        deltas.new_empty(batch_size, dtype=dtype),
        deltas.new_empty(batch_size, dtype=dtype),
        deltas.new_empty(batch_size, num_anchors, dtype=dtype),
        deltas.new_empty(batch_size, dtype=torch.int32),
    )


@torch.library.register_fake("ssd_fast::multibox_loss_backward")
def _multibox_loss_backward_shapes(
    grad_box: Tensor,
    grad_class: Tensor,
    deltas: Tensor,
    logits: Tensor,
    target_deltas: Tensor,
    target_labels: Tensor,
    log_normalisers: Tensor,
    num_positives: Tensor,
) -> tuple[Tensor, Tensor]:
    return deltas.new_empty(deltas.shape), logits.new_empty(logits.shape)


@torch.library.register_fake("ssd_fast::resize_normalise")
def _resize_normalise_shape(
    images: list[Tensor], size: int, matrices: Tensor, mirrored: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    return matrices.new_empty(len(images), size, size, 3)


@torch.library.register_fake("ssd_fast::decode_nms")
def _decode_nms_shapes(
    deltas: Tensor,
    logits: Tensor,
    anchors_cxcywh: Tensor,
    score_threshold: float,
    iou_threshold: float,
    max_per_class: int,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size = deltas.shape[0]
    return (
        deltas.new_empty(batch_size, max_detections, 4, dtype=torch.float32),
        deltas.new_empty(batch_size, max_detections, dtype=torch.float32),
        deltas.new_empty(batch_size, max_detections, dtype=torch.int32),
        deltas.new_empty(batch_size, dtype=torch.int32),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, _, log_normalisers, num_positives = output
    ctx.save_for_backward(*inputs, log_normalisers, num_positives)


def _multibox_loss_gradient(
    ctx: Any, grad_box: Tensor, grad_class: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, None, None]:
    gradients = torch.ops.ssd_fast.multibox_loss_backward(grad_box, grad_class, *ctx.saved_tensors)
    return *gradients, None, None


torch.library.register_autograd("ssd_fast::multibox_loss", _multibox_loss_gradient, setup_context=_save_for_backward)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("multibox_loss is differentiable once")


torch.library.register_autograd("ssd_fast::multibox_loss_backward", _no_second_derivative)

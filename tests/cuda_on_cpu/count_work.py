"""Work of each emulated CUDA kernel at SSD300's size: PYTHONPATH=build/cuda_on_cpu/package python count_work.py

Barriers and collectives are those of blocks and of threads; bytes are of global memory: at each access, and each once.
"""

import torch
from operator_samples import (
    DecodeInput,
    decode_input,
    ground_truths,
    loss_input,
    pyramid_anchors,
    random_predictions,
    run_loss,
)

from kernels import decode_nms, encode_boxes, multibox_loss

COLUMNS = ("launches", "threads", "barriers", "collectives", "atomics", "accesses", "read", "written", "once", "once ")
NUM_ANCHORS, NUM_CLASSES = 8_732, 81


def show(what: str) -> None:
    """Print the counters since the last call."""
    names, rows = torch.ops.emulation.count()
    print(f"\n{what}\n{'':18}" + "".join(f"{column:>13}" for column in COLUMNS))
    for name, row in zip(names, rows, strict=True):
        print(f"{name:18}" + "".join(f"{value:13,}" for value in row))
    torch.ops.emulation.reset()


def main() -> None:
    anchors = pyramid_anchors(NUM_ANCHORS)
    torch.ops.emulation.reset()
    for count in (8, 93):
        encode_boxes(*ground_truths([count]), anchors)
        show(f"encode_boxes, an image of {count} boxes")
    values = loss_input(1, NUM_ANCHORS, NUM_CLASSES, torch.float16, positive_share=0.003)
    run_loss(multibox_loss, values, *torch.ones(2, 1))
    show("multibox_loss, forward and backward, an image in float16")
    decode_nms(*decode_input(1, NUM_ANCHORS, NUM_CLASSES, torch.float16))
    show("decode_nms, an image in float16, like a trained network's output")
    plain = random_predictions(1, NUM_ANCHORS, NUM_CLASSES)
    decode_nms(*DecodeInput(plain.deltas.half(), plain.logits.half(), plain.anchors_cxcywh))
    show("decode_nms, an image in float16, like an untrained network's output")


if __name__ == "__main__":
    main()

"""Images on disk to batches on the device; the only package that imports nvidia.dali.

In: LabelledImages, an Augmentation, a device. Out: TrainBatch, EvalBatch.
May be imported by every room of ssd_fast; imports kernels alone.
"""

import os

# DALI reads this when it is loaded: it then keeps and reuses buffers of up to 1 MB, the size of a COCO image, instead
# of asking the system for memory each time.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

"""The only package that imports nvidia.dali."""

import os

# Before DALI is loaded: buffers of up to an image of COCO are kept and used again, not asked of the system each time.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")

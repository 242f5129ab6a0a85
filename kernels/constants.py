"""Constants of the detector's rules. The C++ and CUDA sources get them from here: setup.py defines a macro for each.

Nothing is imported here, so that setup.py can read the file before PyTorch is there.
"""

CENTRE_VARIANCE = 0.1
"""Deltas of a box's centre are divided by this (Liu et al. 2016, the authors' Caffe release)."""

SIZE_VARIANCE = 0.2
"""Deltas of a box's size are divided by this (same source)."""

NEGATIVES_PER_POSITIVE = 3
"""Hard background anchors in the loss for each positive one (Liu et al. 2016, section 2.2)."""

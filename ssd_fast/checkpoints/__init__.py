"""Files of weights: our checkpoints, torchvision's backbones, the MLPerf reference's detectors.

In: a path. Out: a Checkpoint, or a network filled from it.
May be imported by every room above; imports data, model and the leaves.
"""

"""Files of weights: checkpoints of this program, torchvision's backbones, detectors of the MLPerf reference.

In: a path. Out: a Checkpoint, or a network with the file's weights.
May be imported by every room above; imports data, model and the leaves.
"""

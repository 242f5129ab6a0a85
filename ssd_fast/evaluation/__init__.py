"""Detection and its scores.

In: a checkpoint or a network, and images. Out: detections, COCO's scores, annotated images, ONNX files.
May be imported by every room above; imports checkpoints, data, model, distributed and the leaves.
"""

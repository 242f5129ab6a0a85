"""From images to detections, and from detections to COCO's numbers.

In: a checkpoint or a network, images. Out: detections, scores, annotated images, ONNX.
May be imported by every room above; imports checkpoints, data, model, distributed and the leaves.
"""

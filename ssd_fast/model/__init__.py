"""The network, its anchors and its loss.

In: ModelConfig, images [B, 3, S, S]. Out: predictions of all anchors, and the loss of a batch.
May be imported by every room above; imports kernels and the leaves.
"""

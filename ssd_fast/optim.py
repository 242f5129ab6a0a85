"""The optimizer, built so that a step with a non-finite gradient is skipped on the device, without asking the host."""

import torch
from torch import nn

from ssd_fast.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """Fused SGD with momentum over the parameters of a model, as one or two groups (with and without weight decay).

    Momentum starts as zeros instead of being made by the first step, which gives the same weights: torch's fused SGD
    leaves that buffer uninitialised when a gradient scaler skips the first step.
    """
    decay_all = config.weight_decay_on_norm_and_bias
    decayed = [parameter for parameter in model.parameters() if decay_all or parameter.ndim > 1]
    spared = [parameter for parameter in model.parameters() if not decay_all and parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        momentum=config.momentum,
        fused=True,
    )
    if config.momentum > 0:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """The gradient scaler of a precision: a loss scale for float16; for others a constant 1, which only skips steps."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

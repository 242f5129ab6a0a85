"""The optimizer. A step with a non-finite gradient is skipped on the device, without waiting for the host.

NVIDIA's apex is imported only where the configuration asks for it.
"""

import importlib.util

import torch
from torch import nn

from ssd_fast.config.sections import OptimizerConfig
from ssd_fast.distributed.world import World


def make_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Fused SGD with momentum over the parameters of a model, in one or two groups (with and without weight decay).

    Momentum starts as zeros. If the first step made it, the weights would be the same, but torch's fused SGD leaves the
    buffer uninitialised when a gradient scaler skips that step.
    """
    decay_all = config.weight_decay_on_norm_and_bias
    decayed = [parameter for parameter in model.parameters() if decay_all or parameter.ndim > 1]
    spared = [parameter for parameter in model.parameters() if not decay_all and parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.implementation == "apex":
        _require_apex("optimizer.implementation = 'apex'", device)
        optimizer = _make_apex_sgd(groups, config)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    if config.momentum > 0:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """The gradient scaler of a precision. Except for float16 its scale stays 1 and it only skips steps."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def group_batch_norm(model: nn.Module, group: int, *, device: torch.device, dtype: torch.dtype, world: World) -> None:
    """Replace a model's BatchNorm layers by layers that share their statistics among neighbouring ranks.

    model: on the device, in channels_last. group: 2, 4 or 8 ranks, of one node.
    Raises ValueError where apex's kernels, which read the memory of neighbouring GPUs, cannot run.
    """
    key = f"distributed.batch_norm_group = {group}"
    _require_apex(key, device)
    if dtype != torch.float16:
        raise ValueError(f"{key}: expected training.precision = 'fp16', the only one that apex's groupbn has")
    if world.local_size % group:
        raise ValueError(f"{key}: expected a divisor of the {world.local_size} processes of a node")
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    class GroupBatchNorm(BatchNorm2d_NHWC):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    with world.torch_process_group():  # through which apex hands out the addresses
        for parent in list(model.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    grouped = GroupBatchNorm(layer.num_features, bn_group=group).to(device)
                    grouped.load_state_dict(layer.state_dict())
                    setattr(parent, name, grouped)


def _make_apex_sgd(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    from apex.optimizers import FusedSGD

    class SkippingSGD(FusedSGD):
        _step_supports_amp_scaling = True  # the scaler leaves it to step() to skip, and says so in found_inf
        found_inf: torch.Tensor

        def step(self, closure: None = None) -> None:
            self._dummy_overflow_buf.copy_(self.found_inf)  # where this is not zero, apex's kernels change nothing
            super().step(closure)

    return SkippingSGD(groups, lr=config.learning_rate, momentum=config.momentum)


def _require_apex(key: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"{key}: expected a GPU")
    if importlib.util.find_spec("amp_C") is None:  # PyPI's package of the name apex is another one
        raise ValueError(f"{key}: NVIDIA's apex is not installed (./build_apex.sh)")

"""One rank of the jobs in tests/distributed: `distributed_worker.py cases|run ARGUMENTS…`."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config
from torch import nn

from dali_pipelines.batch import TrainBatch
from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.launch import connect
from ssd_fast.distributed.world import World
from ssd_fast.model.loss import Loss
from ssd_fast.model.ssd import SSD
from ssd_fast.training.step import LossMeter, TrainStep

GLOBAL_BATCH_SIZE = 8
BAD_STEP = 2


def make_trainer(world: World, overrides: Sequence[str] = (), *, frozen: bool = True) -> TrainStep:
    """A trainer of the tiny detector; frozen: BatchNorm uses its running statistics and does not update them."""
    config = tiny_config(overrides)
    torch.manual_seed(0)
    trainer = TrainStep(
        SSD(config.model, num_classes=3),
        config.optimizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
        world=world,
        distributed=config.distributed,
    )
    for module in trainer.model.modules():
        if frozen and isinstance(module, nn.BatchNorm2d):
            module.eval()
    return trainer


def make_batch(trainer: TrainStep, seed: int) -> TrainBatch:
    """This rank's part of the global batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (GLOBAL_BATCH_SIZE, trainer.model.num_anchors)
    labels = torch.zeros(shape, dtype=torch.int32)
    labels[:, ::20] = torch.randint(1, 4, labels[:, ::20].shape, generator=generator, dtype=torch.int32)
    images = torch.randn(shape[0], 3, 64, 64, generator=generator).to(memory_format=torch.channels_last)
    deltas = torch.randn(*shape, 4, generator=generator) * (labels > 0)[..., None]
    world = trainer.world
    return TrainBatch(*(whole.chunk(world.size)[world.rank] for whole in (images, deltas, labels)))


def train(world: World, overrides: Sequence[str] = (), *, frozen: bool = True, bad_rank: int = -1) -> dict[str, Any]:
    """Train five steps, and return what they left; bad_rank: the rank that gets NaN images in step BAD_STEP."""
    trainer = make_trainer(world, ("optimizer.clip_norm=5.0", *overrides), frozen=frozen)
    meter = LossMeter(world)
    windows, digests, statistics = [], [], []
    for step in range(5):
        batch = make_batch(trainer, step)
        if step == BAD_STEP and world.rank == bad_rank:
            batch = batch._replace(images=batch.images * float("nan"))
        meter.add(trainer(batch, 0.01), step)
        windows.append(tuple(meter.read()))
        digests.append(trainer.weights_digest())
        statistics.append(trainer.running_statistics.clone())
    with trainer.averaged_statistics():
        averaged = trainer.running_statistics.clone()
    tensors = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors[f"momentum {index}"] = state["momentum_buffer"]
    return {
        "windows": windows,
        "digests": digests,
        "statistics": statistics,
        "averaged": averaged,
        "tensors": tensors,
    }


def average_layouts(world: World) -> dict[str, Any]:
    """Average gradients of convolutions in both memory layouts by the optimizer, and compare with means of copies."""
    found = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 3))
        model = model.to(memory_format=layout)
        optimizer = world.wrap(torch.optim.SGD(model.parameters()), model.named_parameters(), DistributedConfig())
        images = torch.randn(world.rank + 2, 3, 9, 9).to(memory_format=layout)
        own = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        expected = [world.average_(gradient.contiguous().clone()) for gradient in own]
        model(images).square().sum().backward()
        with world.averaged_gradients(optimizer):
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found[str(layout)] = {
            "equal": [torch.equal(*pair) for pair in zip(gradients, expected, strict=True)],
            "strides": [
                gradient.stride() == p.stride() for gradient, p in zip(gradients, model.parameters(), strict=True)
            ],
        }
    return found


def find_slow(world: World) -> list[str | None]:
    """What is said of ranks that have waited for other shares of the time."""
    found = []
    for waited_s in ((0.9, 0.1), (0.9, 0.1), (0.9, 0.8), (0.1, 0.7)):
        world._waited_s = waited_s[world.rank]  # type: ignore[attr-defined]
        found.append(world.find_slow(1.0))
    return found


CASES: dict[str, Callable[[World], dict[str, Any]]] = {
    "frozen": train,
    "live": lambda world: train(world, frozen=False),
    "bad": lambda world: train(world, frozen=False, bad_rank=1),
    "fp16": lambda world: train(world, ("distributed.fp16_compression=true",)),
    "predivided": lambda world: train(world, ("distributed.gradient_predivide=2.0",)),
    "layouts": average_layouts,
    "collectives": lambda world: {
        "gathered": world.gather({"rank": world.rank, "ballast": b"x" * 1000 * world.rank}),
        "broadcast": world.broadcast(f"from {world.rank}"),
        "cycle": (world.cores, os.environ.get("HOROVOD_CYCLE_TIME")),
        "slow": find_slow(world),
        "agreed": [world.agree(world.rank * (step == 1), step) for step in range(4)],
    },
}


def run_cases(folder: str) -> None:
    """Write the results of all cases to a file of this rank."""
    with connect(DistributedConfig(timeout_s=60)) as world:
        torch.save({name: case(world) for name, case in CASES.items()}, Path(folder) / f"{world.rank}.pt")


def run(data: str, output: str, resume: str, rank: str, step: str, how: str, *overrides: str) -> None:
    """Train as `ssd-fast train` does; in one step, counted from 1 in this process, one rank does what `how` says."""
    from ssd_fast.training.run import train

    original, count = TrainStep.__call__, 0

    def train_step(self: TrainStep, batch: TrainBatch, learning_rate: float) -> Loss:
        nonlocal count
        count += 1
        if count == int(step) and self.world.rank == int(rank):
            act(how)
        return original(self, batch, learning_rate)

    TrainStep.__call__ = train_step  # type: ignore[method-assign]
    config = tiny_config(("training.batch_size=4", "distributed.timeout_s=60", *overrides))
    outcome = train(config, Path(data), Path(output), resume=resume == "resume")
    sys.exit(128 + outcome.stopped_by if outcome.stopped_by else 0)


def act(how: str) -> None:
    """Kill this process, send it a TERM, cut an image short, or put another interpreter in the place of Python."""
    match how:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case image if image.endswith(".jpg"):
            os.truncate(image, 200)
        case interpreter:  # of the process that scores
            sys.executable = interpreter


if __name__ == "__main__":
    run_cases(*sys.argv[2:]) if sys.argv[1] == "cases" else run(*sys.argv[2:])

"""Compare the speed of this project's training with that of torchvision_training.py, in one run.

    python benchmarks/torchvision_peer.py --config configs/ssd300.toml --data DATA

Both do the same work: same images and boxes, augmentation, layers, anchors, precision, batch and learning rate. They
share a process and take turns: while one is timed, the other one and its workers are idle.
"""

import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ssd_fast.openmp import wait_briefly

wait_briefly()  # before torch is imported, as `ssd-fast` does; for both sides

import numpy as np
import torch
import torchvision
import typer
from torchvision_training import (
    PREFETCHED_PER_WORKER,
    PeerDataset,
    PeerTrainer,
    make_peer_loader,
    synthetic_peer_batch,
)

from dali_pipelines.synthetic import SyntheticTrainLoader
from ssd_fast.config.recipe import load_config, override_config
from ssd_fast.config.sections import Config
from ssd_fast.data.loaders import make_train_loader
from ssd_fast.data.sets import load_sets
from ssd_fast.distributed.slurm import launched_by_slurm
from ssd_fast.distributed.world import World
from ssd_fast.files import write_atomically
from ssd_fast.hardware import compute_dtype, device_name, input_threads, synchronize, usable_cores
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.options import DataOption, RecipeOption, SetOption
from ssd_fast.progress import setup_logging
from ssd_fast.training.step import TrainStep

MEASURES = {"input": "input alone", "step": "step alone", "both": "both together"}
UNTIMED_STEPS = 2
IDLE_LIMIT_S = 60.0


class Side(NamedTuple):
    """One side of the comparison.

    batches: endless, on the device. num_prefetched: batches prepared ahead. step: trains on a batch.
    fixed: a batch that needs no input.
    """

    batches: Iterator[Any]
    num_prefetched: int
    step: Callable[[Any], object]
    fixed: Any


class Row(NamedTuple):
    """Images per second of every turn, by side, and the ratios of ours to the peer's."""

    measure: str
    steps: int
    images_per_s: dict[str, list[float]]
    ratio_of_medians: float
    ratios: list[float]


@contextmanager
def both_sides(config: Config, data_dir: Path, device: torch.device, peer_precision: str) -> Iterator[dict[str, Side]]:
    """Set up our side and the peer's, by name; tear both down at the end."""
    batch_size, seed = config.training.batch_size, config.training.seed
    coco_set, _ = load_sets(config, data_dir, World())
    dataset = PeerDataset(coco_set.images, config.augmentation, config.model.image_size)
    num_workers = usable_cores()
    # The peer comes first: its workers are forks, which must be made before DALI and the operators start threads.
    peer_batches = iter(make_peer_loader(dataset, batch_size, num_workers, pin_memory=device.type == "cuda"))
    anchors_cxcywh = model_anchors(config.model)
    train_loader = make_train_loader(config, coco_set, anchors_cxcywh, device, World())

    num_classes, dtype = len(coco_set.categories), compute_dtype(config.training.precision, device)
    torch.manual_seed(seed)
    model, peer_model = (SSD(config.model, num_classes) for _ in range(2))
    peer_model.load_state_dict(model.state_dict())
    ours = TrainStep(model, config.optimizer, device=device, dtype=dtype)
    synthetic = SyntheticTrainLoader(
        num_anchors=len(anchors_cxcywh),
        num_classes=num_classes,
        image_size=config.model.image_size,
        batch_size=batch_size,
        device=device,
        steps_per_epoch=1,
        seed=seed,
    )
    fixed = next(synthetic.epoch())
    # The rate of the warm-up's second step: with meaningless targets, training diverges at a higher one.
    learning_rate = config.optimizer.learning_rate_at(
        1,
        global_batch_size=batch_size,
        steps_per_epoch=train_loader.steps_per_epoch,
        epochs=config.training.epochs,
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        peer_dtype = compute_dtype(peer_precision, device)
        peer = PeerTrainer(peer_model, config.optimizer, anchors_cxcywh, device=device, dtype=peer_dtype)
        yield {
            "ours": Side(
                batches=chain.from_iterable(train_loader.epoch() for _ in count()),
                num_prefetched=config.data.prefetch_batches,
                step=lambda batch: ours(batch, learning_rate),
                fixed=fixed,
            ),
            "peer": Side(
                batches=(batch.to(device) for batch in peer_batches),
                num_prefetched=PREFETCHED_PER_WORKER * num_workers,
                step=lambda batch: peer.train_step(batch, learning_rate),
                fixed=synthetic_peer_batch(fixed.images, num_classes, seed),
            ),
        }
    finally:
        torch.distributed.destroy_process_group()
        train_loader.close()


def compare(sides: dict[str, Side], measure: str, *, steps: int, rounds: int, images: int, device: torch.device) -> Row:
    """Time both sides in turns. images: of a step."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(images * steps / seconds(side, measure, steps, device))
    ours, peer = rates["ours"], rates["peer"]
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Row(measure, steps, rates, statistics.median(ours) / statistics.median(peer), ratios)


def seconds(side: Side, measure: str, steps: int, device: torch.device) -> float:
    """Time of the steps, begun when everything else is idle and no batch prepared earlier is left."""
    wait_until_idle(device)
    if measure != "step":
        for _ in range(
            2 * side.num_prefetched
        ):  # those prepared ahead, and as many again, until the workers are out of phase
            next(side.batches)
    for step in range(-UNTIMED_STEPS, steps):
        if step == 0:
            synchronize(device)
            start = time.perf_counter()
        batch = side.fixed if measure == "step" else next(side.batches)
        if measure != "input":
            side.step(batch)
    synchronize(device)
    return time.perf_counter() - start


def wait_until_idle(device: torch.device) -> None:
    """Return when neither this process nor a worker of the DataLoader has anything left to do.

    On a busy machine a worker may have work but get no CPU time, so a thread that is ready to run counts as busy.
    """
    synchronize(device)
    used = cpu_seconds()
    deadline = time.monotonic() + IDLE_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        before, used = used, cpu_seconds()
        if used - before <= 0.02 and not anybody_runs():
            return
    raise TimeoutError(f"batches are still being prepared after {IDLE_LIMIT_S:g} s: expected idle workers by then")


def cpu_seconds() -> float:
    """CPU time that this process and its children have used so far."""
    fields = [_stat(Path(f"/proc/{pid}/stat")) for pid in _pids()]
    return sum(int(row[11]) + int(row[12]) for row in fields) / os.sysconf("SC_CLK_TCK")  # user and system


def anybody_runs() -> bool:
    """True if a thread of this process or its children, other than the calling one, runs or is ready to run."""
    for pid in _pids():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if thread.name != str(threading.get_native_id()):
                with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                    if _stat(thread / "stat")[0] == "R":
                        return True
    return False


def _pids() -> list[int | None]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


def _stat(path: Path) -> list[str]:
    """Fields of a process or thread from its state on, see proc(5)."""
    return path.read_text().rpartition(")")[2].split()


def format_row(row: Row) -> str:
    """A line of the table."""
    cells = []
    for rates in row.images_per_s.values():
        low, median, high = np.percentile(rates, (25, 50, 75))
        median, low, high = (f"{rate:.4g}" if rate < 1000 else f"{rate:.0f}" for rate in (median, low, high))
        cells.append(f"{median} ({low} - {high})")
    ratio = f"{row.ratio_of_medians:.2f} ({min(row.ratios):.2f} - {max(row.ratios):.2f})"
    return _format_cells(MEASURES[row.measure], *cells, ratio)


def _format_cells(*cells: str) -> str:
    return "{:<14}  {:>26}  {:>26}  {:>24}".format(*cells)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    config: RecipeOption,
    data: DataOption,
    overrides: SetOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a turn.")] = 10,
    input_steps: Annotated[int, typer.Option(min=1, help="Batches of a turn of the input alone.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    peer_precision: Annotated[
        str | None, typer.Option(help="training.precision of the peer, if not that of the recipe.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for every turn.", show_default=False)
    ] = None,
) -> None:
    """Train as `ssd-fast train` does and as one would with torchvision, in turns; print how their speeds compare."""
    recipe = load_config(config, overrides or ())
    if peer_precision is not None:
        override_config(recipe, [f"training.precision={peer_precision}"], source="--peer-precision")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: expected a file in a folder that exists")
    if launched_by_slurm() or {"RANK", "HOROVOD_RANK"} & os.environ.keys():
        raise ValueError("started by a launcher, as one of several processes: expected to be started alone")
    setup_logging(None)
    device, cores = World().device(), usable_cores()
    images, size = recipe.training.batch_size, recipe.model.image_size
    precisions = recipe.training.precision, peer_precision or recipe.training.precision
    dtypes = [str(compute_dtype(precision, device)).removeprefix("torch.") for precision in precisions]
    environment = (
        f"{device_name(device, cores)}; {' and '.join(dict.fromkeys(dtypes))}; "
        f"{images} images of {size} x {size} a step; ours: {input_threads(recipe.data.num_threads, cores)} threads, "
        f"peer: {cores} workers; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"torchvision {torchvision.__version__}; load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    with both_sides(recipe, data, device, precisions[1]) as sides:
        print(environment, _format_cells("images/s", "ours", "peer", "ours / peer"), sep="\n\n", flush=True)
        for measure in MEASURES:
            num_steps = input_steps if measure == "input" else steps
            rows.append(compare(sides, measure, steps=num_steps, rounds=rounds, images=images, device=device))
            print(format_row(rows[-1]), flush=True)
    print(f"\nturns of each: {rounds}; medians with quartiles, and ratios of the medians with the range over the turns")
    if json_file is not None:
        content = {"environment": environment, "rows": [row._asdict() for row in rows]}
        write_atomically(json_file, json.dumps(content, indent=1).encode())


def main() -> None:
    """Run the command. An error that the user can correct is one line on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

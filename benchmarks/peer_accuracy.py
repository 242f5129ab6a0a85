"""Compare what this project's training and torchvision_training.py reach, at equal images and at equal time.

    python benchmarks/peer_accuracy.py configs/demo.toml --data output/demo/data --seeds 3

Both train the same network from the same weights, by the same schedule and augmentation, on the same images. The peer
has torchvision's loss and its usual input pipeline. At equal time, its schedule is compressed into as many steps as it
makes in the time that ours takes. Everything is scored by `ssd-fast evaluate`. What has been trained is kept.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated

from ssd_fast.openmp import wait_briefly

wait_briefly()  # before torch is imported, as `ssd-fast` does; for both sides

import torch
import torchvision
import typer
from recipes import COLUMNS, Result, key_of, row, train
from torchvision_training import PeerDataset, PeerTrainer, make_peer_loader

from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import Config
from ssd_fast.data.sets import load_sets
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.evaluate import evaluate
from ssd_fast.files import write_atomically
from ssd_fast.hardware import compute_dtype, device_name, usable_cores
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.tables import Table, format_table


def train_peer(config: Config, data: Path, seconds: float | None, results: Path) -> Result:
    """Train the peer, if it has not been done yet, and return how it ended.

    seconds: that it may take; None for as many steps as the recipe asks for.
    """
    amount = "all" if seconds is None else f"{seconds:.0f}s"
    kept = results / f"peer_{key_of(config, data)}_{amount}.json"
    if kept.exists():
        return Result(**json.loads(kept.read_text()))
    device, batch_size = World().device(), config.training.batch_size
    coco_set, _ = load_sets(config, data, World())
    dataset = PeerDataset(coco_set.images, config.augmentation, config.model.image_size)
    batches = iter(make_peer_loader(dataset, batch_size, usable_cores(), pin_memory=device.type == "cuda"))
    torch.manual_seed(config.training.seed)
    model = SSD(config.model, len(coco_set.categories))
    dtype = compute_dtype(config.training.precision, device)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        peer = PeerTrainer(model, config.optimizer, model_anchors(config.model), device=device, dtype=dtype)
        all_steps = len(dataset) // batch_size * config.training.epochs
        start = time.perf_counter()
        for step, batch in enumerate(islice(batches, all_steps)):
            passed = time.perf_counter() - start
            if seconds is not None and passed >= seconds:
                break
            done = step if seconds is None else int(passed / seconds * all_steps)
            rate = config.optimizer.learning_rate_at(
                done,
                global_batch_size=batch_size,
                steps_per_epoch=len(dataset) // batch_size,
                epochs=config.training.epochs,
            )
            peer.train_step(batch.to(device), rate)
        passed = time.perf_counter() - start
    finally:
        torch.distributed.destroy_process_group()
        del batches
    weights = kept.with_suffix(".pth")
    torch.save(model.state_dict(), weights)
    evaluation = evaluate(weights, data, config=config)
    assert evaluation is not None
    assert evaluation.scores is not None
    result = Result(evaluation.scores.map_50, evaluation.scores.map, passed, config.training.epochs)
    write_atomically(kept, json.dumps(result._asdict()).encode())
    return result


def in_new_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Call a function where no thread runs yet: DataLoader's workers are forks, which DALI's threads break."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main(
    recipe: Annotated[Path, typer.Argument(help="The recipe of both.")],
    data: Annotated[Path, typer.Option(help="Folder of the data.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("output/recipes"),
) -> None:
    """Print a table."""
    results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Result]] = {"ours": [], "peer, equal images": [], "peer, equal time": []}
    for seed in range(seeds):
        overrides = (f"training.seed={seed}", "evaluation.epochs=[]")
        config = load_config(recipe, overrides)
        ours = train(recipe, data, overrides, results)
        peers = [in_new_process(train_peer, config, data, limit, results) for limit in (None, ours.seconds)]
        for name, result in zip(runs, (ours, *peers), strict=True):
            runs[name].append(result)
            print(f"seed {seed}, {name}: AP50 {result.ap50:.4f}, {result.seconds:.0f} s", flush=True)
    title = f"{device_name(torch.device('cpu'), usable_cores())}; torchvision {torchvision.__version__}; {data}"
    print(format_table(Table(title, COLUMNS, [row(name, done) for name, done in runs.items()])))


if __name__ == "__main__":
    typer.run(main)

"""Train changes of a recipe over several seeds, and print what each one is worth.

    python benchmarks/recipes.py configs/demo.toml --data output/demo/data --seeds 5 \
        --change optimizer.learning_rate=0.02 --change "optimizer.schedule=cosine training.epochs=6"

The recipe itself is the first line. A run that has finished is not repeated, whatever asks for it, and an interrupted
one goes on: what was trained is kept in --results by its configuration, annotations and initial weights.
"""

import hashlib
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from ssd_fast.config.recipe import ConfigError, dump_toml, load_config
from ssd_fast.config.sections import Config
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.tables import Row, Table, format_table
from ssd_fast.training.history import read_metrics

COLUMNS = ("", "runs", "AP50", "worst", "spread", "mAP", "training, s")


class Result(NamedTuple):
    """The best evaluation of a run, by mAP, and what the run took.

    seconds: of training, without start, evaluation and checkpoints. epochs: that were begun.
    """

    ap50: float
    map: float
    seconds: float
    epochs: int


def key_of(config: Config, data: Path) -> str:
    """Name of what is trained by a configuration: its annotations and initial weights count by their content."""
    digest = hashlib.sha256(f"{torch.__version__}\n{dump_toml(config)}".encode())
    for path in (config.data.train_annotations, config.data.val_annotations, config.model.initial_checkpoint):
        if path is not None:
            digest.update((data / path).read_bytes())
    return digest.hexdigest()[:16]


def train(recipe: Path, data: Path, overrides: Sequence[str], results: Path) -> Result:
    """Train, if it has not been done yet, and return how it ended."""
    config = load_config(recipe, overrides)
    key = key_of(config, data)
    run = results / key
    metrics = run / "metrics.jsonl"
    if not metrics.exists() or (run / "checkpoints").exists():
        places = ("--config", recipe, "--data", data, "--output", run, "--resume")
        sets = [part for override in overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "ssd_fast", "train", *map(str, places), *sets]
        with (results / f"{key}.log").open("ab") as log:
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                sys.exit(f"the training failed: see {log.name}")
        shutil.rmtree(run / "checkpoints")
    records = read_metrics(metrics)
    windows = [record for record in records if record["kind"] == "train"]
    best = max((record for record in records if record["kind"] == "eval"), key=lambda record: record["map"])
    steps = [after["step"] - before for after, before in zip(windows, [0, *(w["step"] for w in windows)], strict=False)]
    batch_size = config.training.batch_size
    seconds = sum(batch_size * n / window["images_per_second"] for n, window in zip(steps, windows, strict=True))
    return Result(best["map_50"], best["map"], seconds, math.ceil(windows[-1]["epoch"]))


def row(name: str, runs: Sequence[Result]) -> Row:
    """The line of the table for a change."""
    ap50 = [run.ap50 for run in runs]
    mean, mean_map = statistics.mean(ap50), statistics.mean(run.map for run in runs)
    figures = [f"{value:.3f}" for value in (mean, min(ap50), max(ap50) - min(ap50), mean_map)]
    return Row((name, str(len(runs)), *figures, f"{statistics.median(run.seconds for run in runs):.0f}"))


def main(
    recipe: Annotated[Path, typer.Argument(help="The recipe that the changes are made to.")],
    data: Annotated[Path, typer.Option(help="Folder of the data.")],
    change: Annotated[list[str], typer.Option(help="Keys and values as --set takes them, separated by spaces.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("output/recipes"),
) -> None:
    """Print a table. All changes are tried with one seed before the next one."""
    try:
        for name in change:
            load_config(recipe, name.split())
    except ConfigError as error:
        sys.exit(f"error: {error}")
    results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Result]] = {name: [] for name in ("", *change)}
    for seed in range(seeds):
        for name, done in runs.items():
            overrides = (*name.split(), f"training.seed={seed}", "evaluation.epochs=[]")
            done.append(train(recipe, data, overrides, results))
            print(f"seed {seed}, {name or recipe}: AP50 {done[-1].ap50:.4f}, {done[-1].seconds:.0f} s", flush=True)
    cpu = device_name(torch.device("cpu"), usable_cores())
    rows = [row(name or str(recipe), done) for name, done in runs.items()]
    print(format_table(Table(f"{cpu}; PyTorch {torch.__version__}; {data}", COLUMNS, rows)))


if __name__ == "__main__":
    typer.run(main)

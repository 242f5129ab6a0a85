"""Compare the network's speed on a CPU, as this project computes it, with OpenVINO and onnxruntime, in one run.

    python benchmarks/inference_peers.py --config configs/ssd300.toml

All compute the same network, of random weights, from the same normalised images to predictions in host memory. The
peers get the ONNX file of `ssd-fast export` and images in its layout; their settings are those that their documents
name for a low latency. They take turns (A B C A B C …), so that a machine that becomes slower does so for all of them.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ssd_fast.openmp import wait_briefly

wait_briefly()  # before torch is imported, as `ssd-fast` does; for all sides

import numpy as np
import onnxruntime
import torch
import typer

from ssd_fast.config.recipe import load_config, override_config
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import Category
from ssd_fast.evaluation.detector import Detector, make_random_detector
from ssd_fast.evaluation.export import to_onnx
from ssd_fast.evaluation.openvino_network import OpenVINONetwork, convert, core, quantize_network
from ssd_fast.files import write_atomically
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.tables import Row, Table, format_table

CPU = torch.device("cpu")
CATEGORIES = tuple(Category(number, str(number)) for number in range(1, 81))
FIRST = "ours, torch, float32"

Network = Callable[[], Any]


def make_networks(config: Config, batch_size: int) -> dict[str, Network]:
    """What is compared, by name. Each call computes the same images."""
    size = config.model.image_size
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    in_our_layout = images.to(memory_format=torch.channels_last)
    networks: dict[str, Network] = {}

    def ours(name: str, network: Callable[[torch.Tensor], Any]) -> None:
        networks[name] = torch.inference_mode()(lambda: network(in_our_layout))

    for backend in ("torch", "openvino"):
        for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            settings = [f"inference.backend={backend}", f"inference.precision={precision}"]
            detector = make_random_detector(override_config(config, settings, source="--config"), CATEGORIES, CPU)
            ours(f"ours, {backend}, {dtype}", detector.network)
    calibration = [image[None] for image in images]
    quantized = quantize_network(convert(detector.model), calibration, len(calibration))
    ours("ours, openvino, int8", OpenVINONetwork(quantized, "int8", torch.get_num_threads()))
    return networks | _peers(detector, images.numpy())


def _peers(detector: Detector, images: np.ndarray) -> dict[str, Network]:
    content = to_onnx(detector, with_decode=False)
    threads = torch.get_num_threads()
    networks: dict[str, Network] = {}
    for precision, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
        model = core().read_model(content, b"")
        model.reshape(list(images.shape))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
        }
        request = core().compile_model(model, "CPU", settings).create_infer_request()
        networks[f"OpenVINO, {dtype}"] = partial(request.infer, [images], share_inputs=True, share_outputs=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    networks["onnxruntime, float32"] = partial(session.run, None, {"images": images})
    return networks


def time_in_turns(networks: dict[str, Network], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by name, after a call of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def make_table(seconds: dict[str, list[float]]) -> Table:
    """Median, quartiles, and how many times as fast as ours in float32."""
    first = statistics.median(seconds[FIRST])
    rows = []
    for name, samples in seconds.items():
        low, median, high = np.percentile(samples, (25, 50, 75))
        rows.append(Row([name, f"{1e3 * median:.1f}", f"{1e3 * low:.1f} - {1e3 * high:.1f}", f"{first / median:.2f}"]))
    return Table(title="", columns=["", "ms a batch", "quartiles", "times as fast"], rows=rows)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    config: Annotated[list[Path], typer.Option(help="Recipe (TOML). Repeatable.", show_default=False)],
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for every call.", show_default=False)
    ] = None,
) -> None:
    """Time the network of random weights in each way that it can be computed on this CPU, in turns."""
    recipes = [load_config(path, ["model.backbone_weights=none"]) for path in config]
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: expected a file in a folder that exists")
    environment = (
        f"{device_name(CPU, usable_cores())}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"OpenVINO {importlib.metadata.version('openvino')}; onnxruntime {onnxruntime.__version__}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(environment)
    content: dict[str, Any] = {"environment": environment}
    for path, recipe in zip(config, recipes, strict=True):
        seconds = time_in_turns(make_networks(recipe, batch_size), rounds)
        print(
            f"\n{path.stem}, batches of {batch_size}, {rounds} turns\n{format_table(make_table(seconds))}", flush=True
        )
        content[path.stem] = seconds
    if json_file is not None:
        write_atomically(json_file, json.dumps(content, indent=1).encode())


def main() -> None:
    """Run the command. An error that the user can correct is one line on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

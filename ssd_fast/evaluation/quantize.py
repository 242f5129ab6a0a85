"""Post-training quantization: a network in int8 for CPUs, used only if it is as accurate as in float32."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ssd_fast.config.recipe import override_config
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import read_categories
from ssd_fast.data.coco import CocoSet, load_coco
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation import coco_eval
from ssd_fast.evaluation.detector import Detector, load_detector
from ssd_fast.evaluation.openvino_network import (
    LEAST_SHARE,
    OpenVINONetwork,
    Quantization,
    convert,
    is_quantized,
    quantize_network,
    quantized_path,
    require,
    sha256_of,
    write_quantized,
)
from ssd_fast.files import check_writable
from ssd_fast.progress import track

_CPU = torch.device("cpu")
_IN_TORCH = ("inference.backend=torch", "inference.precision=auto")  # until there is a network in int8


class Quantized(NamedTuple):
    """path: the file that was written; None if the network in int8 is not accurate enough."""

    path: Path | None
    record: Quantization


def quantize(
    checkpoint: Path,
    data_dir: Path,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    num_images: int = 500,
    image_list: Path | None = None,
) -> Quantized:
    """Quantize the network of a checkpoint, score it in float32 and in int8, and keep it beside the checkpoint.

    config, overrides: as for `load_detector`. data_dir: in COCO's layout.
    num_images: training images, evenly spread over the set, whose values give the ranges of int8.
    image_list: file that names them instead, one in each line.
    Raises ValueError for a checkpoint or a data set that cannot be used.
    """
    for package in ("openvino", "nncf"):
        require(package, "quantization")
    path = quantized_path(checkpoint)
    check_writable(path, "--checkpoint", is_quantized)
    categories = read_categories(data_dir / config.data.val_annotations) if config else None
    config = override_config(config, _IN_TORCH, source="--config") if config else None
    detector, config = load_detector(
        checkpoint, _CPU, config=config, overrides=[*overrides, *_IN_TORCH], categories=categories
    )
    val_set = _load(config, data_dir, config.data.val_annotations, config.data.val_images)
    if not val_set.has_boxes_of(detector.categories):
        raise DataError(f"{val_set.annotation_file}: no image has a box of the network's classes to score by")
    train_set = _load(config, data_dir, config.data.train_annotations, config.data.train_images)
    chosen = _choose(train_set, num_images, image_list)
    network = convert(detector.model)
    single = override_config(config, ["evaluation.batch_size=1"], source="--config")
    loader = make_eval_loader(single, train_set.images.take(chosen), _CPU)
    images = [batch.images.clone() for batch in track(loader, "calibrating", total=len(loader))]
    loader.close()
    quantized = quantize_network(network, images, len(images))
    num_threads = torch.get_num_threads()
    map_float32, map_int8 = (
        _map(detector, OpenVINONetwork(model.clone(), precision, num_threads), config, val_set)
        for model, precision in ((network, "fp32"), (quantized, "int8"))
    )
    record = Quantization(
        checkpoint_sha256=sha256_of(checkpoint),
        num_images=len(images),
        map_float32=map_float32,
        map_int8=map_int8,
        openvino=importlib.metadata.version("openvino"),
        nncf=importlib.metadata.version("nncf"),
    )
    if not record.is_accurate():
        return Quantized(None, record)
    write_quantized(path, quantized, record)
    return Quantized(path, record)


def format_quantized(quantized: Quantized) -> str:
    """The two scores and what follows from them, in two lines."""
    record = quantized.record
    share = record.map_int8 / record.map_float32 if record.map_float32 else 1.0
    scores = f"mAP {record.map_int8:.4f} in int8, {share:.2%} of float32's {record.map_float32:.4f}"
    if quantized.path is None:
        return f"{scores}: expected at least {LEAST_SHARE:.0%}; nothing was written"
    return f"{scores}\n{quantized.path}: for --set inference.backend=openvino --set inference.precision=int8"


def _load(config: Config, data_dir: Path, annotations: str, images: str) -> CocoSet:
    data = config.data
    return load_coco(
        data_dir / annotations,
        data_dir / images,
        bad_images=data.bad_images,
        bad_boxes=data.bad_boxes,
        max_pixels=data.max_image_pixels,
    )


def _choose(train_set: CocoSet, num_images: int, image_list: Path | None) -> np.ndarray:
    """Positions of the images that give the ranges."""
    names = [Path(name).name for name in train_set.images.file_names]
    if image_list is None:
        return np.unique(np.linspace(0, len(names) - 1, min(num_images, len(names))).round().astype(np.int64))
    positions = {name: position for position, name in enumerate(names)}
    wanted = [line.strip() for line in image_list.read_text(encoding="utf-8").splitlines() if line.strip()]
    unknown = [name for name in wanted if name not in positions]
    if unknown or not wanted:
        found = f"{unknown[0]!r} is no image of {train_set.annotation_file}" if unknown else "is empty"
        raise DataError(f"{image_list}: {found}: expected file names of training images, one in each line")
    return np.array([positions[name] for name in dict.fromkeys(wanted)])


def _map(detector: Detector, network: OpenVINONetwork, config: Config, val_set: CocoSet) -> float:
    scored = Detector(
        detector.model,
        detector.anchors_cxcywh,
        detection=detector.detection,
        categories=detector.categories,
        dtype=detector.dtype,
        network=network,
    )
    loader = make_eval_loader(config, val_set.images, _CPU)
    ids = detector.category_ids_in(val_set)
    table = scored.detect_all(track(loader, f"scoring, {network.number_format}", total=len(loader)), ids)
    loader.close()
    return coco_eval.score(val_set.annotation_file, table, val_set.images.image_ids, ids).map

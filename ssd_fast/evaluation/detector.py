"""A network with the rules that turn its predictions into detections: of a batch, of many images, of a data set."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from dali_pipelines.batch import EvalBatch
from ssd_fast.checkpoints.checkpoint import CheckpointError, is_checkpoint, parse_checkpoint
from ssd_fast.checkpoints.weights import class_count, load_weights, read_torch_file
from ssd_fast.config.recipe import override_config
from ssd_fast.config.sections import Config, DetectionConfig
from ssd_fast.data.annotations import Category
from ssd_fast.data.boxes import ltrb_to_xywh
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.coco_classes import COCO_CATEGORIES
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import DetectionTable
from ssd_fast.evaluation.openvino_network import OpenVINONetwork, make_network
from ssd_fast.hardware import compute_dtype
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD, Predictions, on_device
from ssd_fast.parts import DECODING, MODEL, PREPROCESSING
from ssd_fast.timing import NULL_TIMELINE, NullTimeline


class TorchNetwork:
    """A network as PyTorch computes it, under autocast unless in float32."""

    def __init__(self, model: SSD, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self.number_format = str(dtype).removeprefix("torch.")

    def __call__(self, images: Tensor) -> Predictions:
        """images: [B, 3, S, S], normalised. A model in training mode is in it again afterwards."""
        autocast = self._dtype != torch.float32
        was_training = self._model.training
        if was_training:  # only then: eval() and train() walk through all modules
            self._model.eval()
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=autocast):
            predictions: Predictions = self._model(images if autocast else images.float())
        if was_training:
            self._model.train()
        return predictions


class Detector:
    """A network, its anchors and the rules of detection.

    number_format: what the network computes in, in words.
    """

    def __init__(
        self,
        model: SSD,
        anchors_cxcywh: Tensor,
        *,
        detection: DetectionConfig,
        categories: tuple[Category, ...],
        dtype: torch.dtype,
        network: OpenVINONetwork | None = None,
    ) -> None:
        """Make a detector.

        model, anchors_cxcywh: on the device that computes. dtype: float32, or the type of autocast.
        categories: class of label k is categories[k - 1]. network: computes the predictions in place of the model.
        """
        self.model = model
        self.anchors_cxcywh = anchors_cxcywh
        self.detection = detection
        self.categories = categories
        self.dtype = dtype
        self.network = network or TorchNetwork(model, dtype)
        self.number_format = self.network.number_format

    @torch.inference_mode()
    def detect(self, images: Tensor, timeline: NullTimeline = NULL_TIMELINE) -> kernels.Detections:
        """Return the detections of a batch of normalised images [B, 3, S, S].

        timeline: receives the regions MODEL and DECODING.
        """
        with timeline.region(MODEL):
            predictions = self.network(images)
        with timeline.region(DECODING):
            return kernels.decode_nms(
                predictions.deltas,
                predictions.logits,
                self.anchors_cxcywh,
                score_threshold=self.detection.score_threshold,
                iou_threshold=self.detection.iou_threshold,
                max_per_class=self.detection.max_per_class,
                max_detections=self.detection.max_detections,
            )

    def detect_all(
        self,
        batches: Iterable[EvalBatch],
        category_ids: np.ndarray | None = None,
        timeline: NullTimeline = NULL_TIMELINE,
    ) -> DetectionTable:
        """Return the detections of many images, in pixels. They are read from the device once, at the end.

        category_ids: [K] int64, the id to report for label k + 1; None for the ids of the detector's categories.
        timeline: receives the regions PREPROCESSING (the part of it that did not overlap with the model), MODEL and
            DECODING.
        """
        found, image_ids, sizes_hw = [], [], []
        for batch in timeline.waits(batches, PREPROCESSING):
            found.append(self.detect(batch.images, timeline))
            image_ids.append(batch.image_ids)
            sizes_hw.append(batch.sizes_hw)
        if category_ids is None:
            category_ids = np.array([category.id for category in self.categories], dtype=np.int64)
        return _to_table(found, image_ids, sizes_hw, category_ids)

    def detect_set(
        self, batches: Iterable[EvalBatch], coco_set: CocoSet, world: World, timeline: NullTimeline = NULL_TIMELINE
    ) -> DetectionTable:
        """Return the detections of all ranks' batches in the order of the set; on other ranks than 0, of its own."""
        table = self.detect_all(batches, self.category_ids_in(coco_set), timeline)
        tables = world.gather(table)
        return _merge(tables, coco_set.images.image_ids) if world.is_main else table

    def category_ids_in(self, coco_set: CocoSet) -> np.ndarray:
        """Return [K] int64, the ids that a set gives to the network's categories, by their names.

        Raises DataError when the set lacks a category.
        """
        return coco_set.ids_of(self.categories)


def _to_table(
    found: list[kernels.Detections], image_ids: list[Tensor], sizes_hw: list[Tensor], category_ids: np.ndarray
) -> DetectionTable:
    if not found:  # a rank may have no batch
        return DetectionTable(np.empty(0, np.int64), np.empty((0, 4)), np.empty(0), np.empty(0, np.int64))
    boxes = torch.cat([item.boxes_ltrb for item in found]).cpu().double().numpy()  # [N, D, 4]
    scores = torch.cat([item.scores for item in found]).cpu().double().numpy()
    labels = torch.cat([item.labels for item in found]).cpu().numpy()
    counts = torch.cat([item.counts for item in found]).cpu().numpy()
    sizes = torch.cat(sizes_hw).numpy()[:, [1, 0, 1, 0]]
    boxes = boxes * sizes[:, None, :]
    used = np.arange(boxes.shape[1]) < counts[:, None]  # [N, D]
    return DetectionTable(
        image_ids=np.repeat(torch.cat(image_ids).numpy(), counts),
        boxes_xywh=ltrb_to_xywh(boxes[used]),
        scores=scores[used],
        category_ids=category_ids[labels[used] - 1],
    )


def _merge(tables: list[DetectionTable], image_ids: np.ndarray) -> DetectionTable:
    """Return one table, sorted by the positions of the images; the rows of an image keep their order."""
    table = DetectionTable(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))
    order = np.argsort(image_ids)
    positions = order[np.searchsorted(image_ids[order], table.image_ids)]
    rows = np.argsort(positions, kind="stable")
    return DetectionTable(*(column[rows] for column in table))


def load_detector(
    path: Path,
    device: torch.device,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    categories: tuple[Category, ...] | None = None,
) -> tuple[Detector, Config]:
    """Return a detector and its configuration.

    path: checkpoint of this program, or weights of the MLPerf reference.
    config: None for the checkpoint's own configuration, changed by overrides ("section.key=value" each).
    categories: classes for weights of the reference, which hold no class names; None for COCO's.
    Raises ValueError that names the file and what does not fit.
    """
    content = read_torch_file(path)
    weights: Mapping[str, Any]
    if is_checkpoint(content):
        checkpoint = parse_checkpoint(content, path)
        config = config or override_config(checkpoint.config, overrides, source=str(path))
        categories, weights = checkpoint.categories, checkpoint.model
    elif config is None:
        raise CheckpointError(f"{path}: holds weights only: expected a recipe (--config) with it")
    else:
        weights = content
        categories = _categories_of(path, config, weights, categories)
    model = SSD(config.model, num_classes=len(categories))
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return make_detector(model, config, categories, device, path), config


def _categories_of(
    path: Path, config: Config, weights: Mapping[str, Any], given: tuple[Category, ...] | None
) -> tuple[Category, ...]:
    """The classes of weights without names, in label order: COCO's for 80 of them, else those that are given.

    Given ones that are not COCO's are taken for 80 classes, too.
    """
    try:
        count = class_count(config.model, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = {category.name for category in given or COCO_CATEGORIES}
    if count == len(COCO_CATEGORIES) and names == {category.name for category in COCO_CATEGORIES}:
        return COCO_CATEGORIES  # whatever ids, and so whatever order, a file gives them
    if given is None:
        raise CheckpointError(
            f"{path}: holds weights of {count} classes without their names: expected COCO's {len(COCO_CATEGORIES)}, or "
            "an annotation file that names them (--annotations)"
        )
    if count != len(given):
        raise CheckpointError(f"{path}: holds weights of {count} classes: expected {len(given)}, as the data has")
    return given


def make_detector(
    model: SSD, config: Config, categories: tuple[Category, ...], device: torch.device, checkpoint: Path | None = None
) -> Detector:
    """Return a detector of a network, which is moved to the device.

    checkpoint: the file that holds the weights. Raises ValueError where the section `inference` cannot be followed.
    """
    precision = config.inference.precision
    on_torch = config.inference.backend == "torch"
    own = config.training.precision if precision == "auto" or not on_torch else precision
    return Detector(
        on_device(model, device).eval(),
        model_anchors(config.model).to(device),
        detection=config.detection,
        categories=categories,
        dtype=compute_dtype(own, device),
        network=None if on_torch else make_network(model, config, device, checkpoint),
    )


def make_random_detector(config: Config, categories: tuple[Category, ...], device: torch.device) -> Detector:
    """Return a detector of random weights, to measure its time. Its detections mean nothing."""
    torch.manual_seed(config.training.seed)
    return make_detector(SSD(config.model, num_classes=len(categories)), config, categories, device)

"""The evaluation of a checkpoint on the validation images of a data set."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssd_fast import timing
from ssd_fast.config.sections import Config, DistributedConfig
from ssd_fast.data.annotations import read_categories
from ssd_fast.data.coco import CocoSet, load_coco
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.data.policy import DataError
from ssd_fast.distributed.launch import connect
from ssd_fast.evaluation import coco_eval
from ssd_fast.evaluation.detector import Detector, load_detector
from ssd_fast.hardware import device_name
from ssd_fast.progress import track


class Evaluation(NamedTuple):
    """The result of an evaluation.

    scores: COCO's numbers; None for a set without annotations.
    table: the detections of all images, in the order of the set.
    config: the configuration that was used, which is the checkpoint's own unless another was given.
    num_images: number of images of all ranks. num_left_out: of bad ones, which the scores do not know of.
    parts: seconds of each part of the evaluation, as in `timing.Timeline.parts`.
    device, number_format: the device that computed, by name, and the number format it used, in words.
    """

    scores: coco_eval.CocoScores | None
    table: coco_eval.DetectionTable
    config: Config
    num_images: int
    num_left_out: int
    parts: Mapping[str, Sequence[float]]
    device: str
    number_format: str


def evaluate(
    checkpoint: Path,
    data_dir: Path,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    only_annotated: bool = False,
    needs_scores: bool = True,
    start_s: float | None = None,
) -> Evaluation | None:
    """Detect objects on all validation images of a data set and score the detections.

    Every rank of a parallel launch calls this and detects on its share of the images. Only rank 0 scores them; the
    other ranks get None.

    checkpoint: file of this program, or weights of the MLPerf reference, which need a config.
    data_dir: in COCO's layout.
    config: replaces the checkpoint's own. overrides: changes of the checkpoint's own ("section.key=value" each).
    only_annotated: leave out images without annotations, as the MLPerf reference does.
    needs_scores: refuse a set without annotations, such as a test set.
    start_s: moment, of time.perf_counter, at which the first part begins; None for the time of the call.
    Raises ValueError for a checkpoint, a data set or a configuration that cannot be used.
    """
    start_s = time.perf_counter() if start_s is None else start_s
    with connect(config.distributed if config else DistributedConfig()) as world:
        device = world.device()
        categories = read_categories(data_dir / config.data.val_annotations) if config else None
        detector, config = load_detector(checkpoint, device, config=config, overrides=overrides, categories=categories)
        val_set = load_coco(
            data_dir / config.data.val_annotations,
            data_dir / config.data.val_images,
            only_annotated=only_annotated,
            bad_images=config.data.bad_images,
            bad_boxes=config.data.bad_boxes,
            max_pixels=config.data.max_image_pixels,
            world=world,
        )
        category_ids = detector.category_ids_in(val_set)
        has_truths = _has_truths(val_set, detector, needed=needs_scores)
        loader = make_eval_loader(config, val_set.images, device, world=world)
        timeline = timing.Timeline(device, start_s)
        timeline.settle("load")
        table = detector.detect_set(track(loader, "evaluating", total=len(loader)), val_set, world, timeline)
        timeline.settle("collecting")
    if not world.is_main:
        return None
    ids = val_set.images.image_ids, category_ids
    scores = coco_eval.score(val_set.annotation_file, table, *ids) if has_truths else None
    timeline.settle("scoring")
    return Evaluation(
        scores=scores,
        table=table,
        config=config,
        num_images=len(val_set.images.file_names),
        num_left_out=val_set.num_left_out_images,
        parts=timeline.parts(),
        device=device_name(device, world.cores),
        number_format=detector.number_format,
    )


def _has_truths(val_set: CocoSet, detector: Detector, *, needed: bool) -> bool:
    """Whether there is anything to score detections by. Raises DataError where there is nothing and it is needed."""
    found = val_set.has_boxes_of(detector.categories)
    if needed and not found:
        raise DataError(
            f"{val_set.annotation_file}: no image has a box of the network's classes: expected some to score "
            "detections by, or --output without --target"
        )
    return found


def format_evaluation(evaluation: Evaluation, *, per_class: bool = False) -> str:
    """Return COCO's twelve lines, if there was something to score, and how many images do not count in them."""
    lines = ["no boxes of the network's classes: nothing to score"]
    if evaluation.scores:
        lines = [coco_eval.format_scores(evaluation.scores, per_class=per_class)]
    if evaluation.num_left_out:
        lines.append(f"{evaluation.num_left_out} bad images are left out, with their boxes")
    return "\n".join(lines)


def format_timing(evaluation: Evaluation) -> str:
    """Return the device, the number format and the image size in a line, and a table of where the time went."""
    size, batch_size = evaluation.config.model.image_size, evaluation.config.evaluation.batch_size
    report = timing.format_report(evaluation.parts, num_images=evaluation.num_images, batch_size=batch_size)
    return f"{evaluation.device}, {evaluation.number_format}, {size} x {size} pixels\n{report}"

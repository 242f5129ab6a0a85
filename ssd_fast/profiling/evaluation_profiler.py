"""The evaluation: its time by its parts, on as many validation images as there is time for."""

import json
import logging
import tempfile
import time
from collections.abc import Collection
from contextlib import closing
from itertools import islice
from pathlib import Path

from ssd_fast.config.sections import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation import coco_eval
from ssd_fast.evaluation.coco_eval import DetectionTable
from ssd_fast.evaluation.detector import Detector
from ssd_fast.parts import DECODING, MODEL, PREPROCESSING
from ssd_fast.profiling.profile import EVALUATION, Stage
from ssd_fast.profiling.stopwatch import Stopwatch
from ssd_fast.timing import Timeline

logger = logging.getLogger(__name__)

COLLECTING, SCORING = "collect", "score"


def profile_evaluation(
    config: Config, detector: Detector, val_set: CocoSet, world: World, clock: Stopwatch, *, seconds: float
) -> Stage | None:
    """Time of a batch of the evaluation; None on ranks other than 0, which may have no batch.

    seconds: for the whole; at least one batch is taken.
    """
    logger.info("evaluation")
    device = world.device()
    with closing(make_eval_loader(config, val_set.images, device, world=world)) as loader:
        clock.settle()
        clock.start()
        detector.detect_all(islice(loader, 1))
        num_batches = world.broadcast(min(max(round(seconds / clock.stop().seconds), 1), len(loader)))
        clock.settle()
        clock.start()
        timeline = Timeline(device, time.perf_counter())
        timeline.settle("before")
        table = detector.detect_set(islice(loader, num_batches), val_set, world, timeline)
        timeline.settle(COLLECTING)
        busy = clock.stop().busy
    if not world.is_main:
        return None
    num_images = min(num_batches * world.size * config.evaluation.batch_size, len(val_set.images.image_ids))
    scored_s = _score(detector, val_set, table, num_images)
    parts = timeline.parts()
    samples = {part: parts[part] for part in (PREPROCESSING, MODEL, DECODING)}
    num_batches = len(samples[MODEL])
    samples[COLLECTING] = [parts[COLLECTING][0] / num_batches] * num_batches
    samples[SCORING] = [scored_s / num_batches] * num_batches
    return Stage.of(EVALUATION, samples, images=num_images / num_batches, busy=busy)


def _score(detector: Detector, val_set: CocoSet, table: DetectionTable, num_images: int) -> float:
    """Seconds to score the detections of the first images of a set."""
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder, "measured.json")
        _write_part(val_set.annotation_file, val_set.images.image_ids[:num_images].tolist(), annotations)
        category_ids = detector.category_ids_in(val_set).tolist()
        begin = time.perf_counter()
        coco_eval.score(annotations, table, category_ids=category_ids)
        return time.perf_counter() - begin


def _write_part(annotation_file: Path, image_ids: Collection[int], target: Path) -> None:
    """Write a COCO annotation file with some of the images of another."""
    content, wanted = json.loads(annotation_file.read_bytes()), set(image_ids)
    content["images"] = [image for image in content["images"] if image["id"] in wanted]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in wanted]
    target.write_text(json.dumps(content))

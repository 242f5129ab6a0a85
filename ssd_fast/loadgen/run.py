"""A run of MLPerf LoadGen against the detector.

Owner of mlcommons-loadgen. LoadGen calls back, in threads of its own, to have images loaded and queries answered.
"""

import importlib.util
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from ssd_fast import exit_status
from ssd_fast.config.recipe import dump_toml, is_dumped
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import NUMBERED_CATEGORIES, read_categories
from ssd_fast.data.coco import CocoSet, load_coco
from ssd_fast.data.policy import DataError
from ssd_fast.distributed.world import World
from ssd_fast.evaluation import coco_eval
from ssd_fast.evaluation.detector import Detector, load_detector, make_random_detector
from ssd_fast.files import check_folder, write_atomically
from ssd_fast.loadgen.logs import (
    ACCURACY_LOG,
    DETAIL_LOG,
    LOGS,
    Measured,
    label_numbers,
    read_accuracy_log,
    read_figures,
)
from ssd_fast.loadgen.settings import Mode, Scenario, largest_batch, make_settings, warm_up_sizes
from ssd_fast.loadgen.system import Answers, SampleLibrary, SystemUnderTest

logger = logging.getLogger(__name__)

RECIPE = "benchmark.toml"  # the configuration, beside the logs
_REPORT_INTERVAL_S = 30.0

Events = queue.SimpleQueue[BaseException | None]
"""An error ends the run; None says that LoadGen has finished."""


def benchmark(
    checkpoint: Path | None,
    data_dir: Path | None,
    output: Path,
    *,
    scenario: Scenario,
    mode: Mode,
    config: Config | None = None,
    overrides: Sequence[str] = (),
) -> Measured:
    """Load a detector and its images, let LoadGen measure them, and score the accuracy log of an accuracy run.

    checkpoint: None for random weights, which need a config. data_dir: in COCO's layout; None for random images.
    output: folder for LoadGen's logs. overrides: of the checkpoint's own recipe, where config is None.
    Raises ValueError for settings that cannot be measured.
    """
    check_folder(output, "--output", (RECIPE, *LOGS), lambda folder: is_dumped(folder / RECIPE))
    device = World().device()
    detector, config = _load(checkpoint, data_dir, config, overrides, device)
    coco_set = None
    if data_dir is not None:
        coco_set = load_coco(
            data_dir / config.data.val_annotations,
            data_dir / config.data.val_images,
            bad_images=config.data.bad_images,
            bad_boxes=config.data.bad_boxes,
            max_pixels=config.data.max_image_pixels,
        )
        if mode == "accuracy" and not coco_set.has_boxes_of(detector.categories):
            raise DataError(
                f"{coco_set.annotation_file}: no image has a box of the network's classes: expected some for --accuracy"
            )
    measured = run(detector, config, scenario=scenario, mode=mode, coco_set=coco_set, output=output, device=device)
    if mode != "accuracy" or coco_set is None:
        return measured
    table = read_accuracy_log(output / ACCURACY_LOG, coco_set)
    category_ids = detector.category_ids_in(coco_set).tolist()
    return measured._replace(scores=coco_eval.score(coco_set.annotation_file, table, category_ids=category_ids))


def run(
    detector: Detector,
    config: Config,
    *,
    scenario: Scenario,
    mode: Mode,
    coco_set: CocoSet | None,
    output: Path,
    device: torch.device,
) -> Measured:
    """Let LoadGen measure the detector, or detect on all images for the accuracy log; the logs go to a folder.

    coco_set: the images; None for random ones, which have no accuracy.
    Raises ValueError for settings that cannot be measured. An error while LoadGen runs, and Ctrl-C, end the process.
    """
    loadgen = _import_loadgen()
    settings = config.benchmark
    if mode == "accuracy" and coco_set is not None and coco_set.num_left_out_images:
        raise DataError(
            f"{coco_set.annotation_file}: {coco_set.num_left_out_images} of its images are left out, but the "
            "accuracy log counts images by their position in the file: expected all of them to be usable"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / RECIPE, dump_toml(config).encode())
    for name in LOGS:
        (output / name).unlink(missing_ok=True)

    library = SampleLibrary(config, None if coco_set is None else coco_set.images, device)
    events: Events = queue.SimpleQueue()
    system = SystemUnderTest(
        detector,
        library,
        largest_batch=largest_batch(settings, scenario),
        label_numbers=None if coco_set is None else label_numbers(detector, coco_set),
        complete=lambda answers: _complete(loadgen, answers),
        on_error=events.put,
    )
    logger.info("warming up")
    batch_seconds = system.start(warm_up_sizes(settings, scenario))
    test_settings = make_settings(loadgen, settings, scenario, mode, batch_seconds=batch_seconds)

    logger.info("%s, %s run: LoadGen's logs are in %s", scenario, mode, output)
    test = partial(
        _run_test,
        loadgen,
        system,
        library,
        num_loaded=min(settings.performance_samples, library.num_images),
        test_settings=test_settings,
        output=output,
        events=events,
    )
    threading.Thread(target=_guarded(test, events.put), name="loadgen", daemon=True).start()
    _wait(events, system)
    system.close()
    figures = read_figures(output / DETAIL_LOG)
    return Measured(scenario, mode, settings, figures, system.num_answered, system.num_batches)


def _load(
    checkpoint: Path | None,
    data_dir: Path | None,
    config: Config | None,
    overrides: Sequence[str],
    device: torch.device,
) -> tuple[Detector, Config]:
    categories = NUMBERED_CATEGORIES
    if data_dir is not None and config is not None:
        categories = read_categories(data_dir / config.data.val_annotations)
    if checkpoint is not None:
        return load_detector(checkpoint, device, config=config, overrides=overrides, categories=categories)
    if config is None:
        raise ValueError("expected --checkpoint, or --config for a network of random weights")
    return make_random_detector(config, categories, device), config


def _run_test(
    loadgen: ModuleType,
    system: SystemUnderTest,
    library: SampleLibrary,
    *,
    num_loaded: int,
    test_settings: Any,
    output: Path,
    events: Events,
) -> None:
    """Run LoadGen to its end, in the thread that calls. num_loaded: images in memory at a time."""
    sut = loadgen.ConstructFastSUT(_guarded(system.issue, events.put), lambda: None)
    qsl = loadgen.ConstructQSL(
        library.num_images,
        num_loaded,
        _guarded(library.load, events.put),
        _guarded(library.unload, events.put),
    )
    log_settings = loadgen.LogSettings()
    log_settings.log_output.outdir = str(output)
    log_settings.enable_trace = False
    loadgen.StartTestWithLogSettings(sut, qsl, test_settings, log_settings)
    loadgen.DestroyQSL(qsl)
    loadgen.DestroyFastSUT(sut)
    events.put(None)


def _wait(events: Events, system: SystemUnderTest) -> None:
    """Wait until LoadGen has finished, and report how far it is; end the process on an error and on Ctrl-C."""
    try:
        while True:
            try:
                error = events.get(timeout=_REPORT_INTERVAL_S)
                break
            except queue.Empty:
                logger.info("%d images answered in %d batches", system.num_answered, system.num_batches)
    except KeyboardInterrupt as interrupt:
        _abandon(interrupt)
    if error is not None:
        _abandon(error)


def _complete(loadgen: ModuleType, answers: Answers) -> None:
    """Hand answers to LoadGen, which copies what it logs."""
    size = 7 * answers.rows.itemsize
    loadgen.QuerySamplesComplete(
        [
            loadgen.QuerySampleResponse(id_, rows.ctypes.data, int(count) * size)
            for id_, rows, count in zip(answers.query_ids, answers.rows, answers.counts, strict=True)
        ]
    )


def _guarded(function: Callable[..., None], on_error: Callable[[BaseException], None]) -> Callable[..., None]:
    """Wrap a function that LoadGen's C++ calls, which no exception may reach.

    An exception is reported, and the calling thread then waits for ever: `_abandon` ends the process.
    """

    def call(*arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            on_error(error)
            threading.Event().wait()

    return call


def _abandon(error: BaseException) -> NoReturn:
    """Print an error and end the process at once.

    LoadGen cannot be told to stop, and its threads would crash an orderly end.
    """
    if isinstance(error, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    elif isinstance(error, (ValueError, OSError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else exit_status.ERROR)


def _import_loadgen() -> ModuleType:
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise ValueError("MLPerf LoadGen is not installed: pip install '.[loadgen]' in the project's folder")
    import mlperf_loadgen

    return mlperf_loadgen

"""MLPerf LoadGen drives the detector: its four scenarios, its settings for this model, its accuracy log.

Owner of mlcommons-loadgen. LoadGen calls back to have images loaded and queries answered. Images are decoded,
resized and normalised when it has them loaded, which MLPerf does not time, and lie in host memory in the network's own
layout; a query is answered when its detections are in host memory.
"""

import importlib.util
import json
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.batch import LabelledImages
from dali_pipelines.evaluate import EvalLoader
from dali_pipelines.synthetic import SyntheticEvalLoader
from ssd_fast.config import BenchmarkConfig, Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import DetectionTable
from ssd_fast.evaluation.detector import Detector

logger = logging.getLogger(__name__)

Scenario = Literal["Offline", "SingleStream", "Server", "MultiStream"]
Mode = Literal["performance", "accuracy", "find-load"]

ACCURACY_LOG = "mlperf_log_accuracy.json"
_DETAIL_LOG = "mlperf_log_detail.txt"
_LOGS = (ACCURACY_LOG, _DETAIL_LOG, "mlperf_log_summary.txt")
_TEST_MODES = {"performance": "PerformanceOnly", "accuracy": "AccuracyOnly", "find-load": "FindPeakPerformance"}
# of MLPerf Inference v2.0, like the defaults in BenchmarkConfig
_SEEDS = {
    "qsl_rng_seed": 6655344265603136530,
    "sample_index_rng_seed": 15863379492028895792,
    "schedule_rng_seed": 12662793979680847247,
}
_BATCHES_IN_FLIGHT = 2  # one that is computed, and one that waits on the device
_REPORT_INTERVAL_S = 30.0


class Measured(NamedTuple):
    """What a run gave.

    figures: LoadGen's own, by the names in its detail log; of an accuracy run, none that count.
    num_queries: of the whole run; each is one image, and was answered. num_batches: in which they were computed.
    """

    scenario: Scenario
    mode: Mode
    figures: dict[str, Any]
    num_queries: int
    num_batches: int

    def is_valid(self) -> bool:
        """Whether the run counts: LoadGen says so of a performance run."""
        match self.mode:
            case "performance":
                return self.figures["result_validity"] == "VALID"
            case "find-load":
                return _highest_load(self.figures) is not None
            case "accuracy":
                return True


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
    """Lets LoadGen measure the detector, or has all images detected for the accuracy log; its logs go to a folder.

    coco_set: what the images are; None for random ones, which have no accuracy.
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
    for name in _LOGS:
        (output / name).unlink(missing_ok=True)

    library = SampleLibrary(config, None if coco_set is None else coco_set.images, device)
    events: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
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

    def start_test() -> None:
        sut = loadgen.ConstructFastSUT(_guarded(system.issue, events.put), lambda: None)
        qsl = loadgen.ConstructQSL(
            library.num_images,
            min(settings.performance_samples, library.num_images),
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

    logger.info("%s, %s run: LoadGen's logs are in %s", scenario, mode, output)
    threading.Thread(target=_guarded(start_test, events.put), name="loadgen", daemon=True).start()
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
    system.close()
    return Measured(scenario, mode, read_figures(output / _DETAIL_LOG), system.num_answered, system.num_batches)


class SampleLibrary:
    """LoadGen's query sample library: images by their position in the set, ready for the network in host memory."""

    def __init__(self, config: Config, images: LabelledImages | None, device: torch.device) -> None:
        """images: None for random images, config.benchmark.performance_samples of them."""
        self._config = config
        self._images = images
        self._device = device
        self._samples = torch.empty(0)  # [N, S, S, 3], normalised; pinned and float16 for a GPU, else float32
        self._rows: dict[int, int] = {}  # of samples, by position in the set
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_images = config.benchmark.performance_samples if images is None else len(images.file_names)

    def load(self, indices: Sequence[int]) -> None:
        """Has these images in memory, and no others. LoadGen names some twice, in MultiStream."""
        self._rows = {index: row for row, index in enumerate(dict.fromkeys(indices))}
        size = self._config.model.image_size
        gpu = self._device.type == "cuda"
        self._samples = torch.empty(
            (len(self._rows), size, size, 3), dtype=torch.float16 if gpu else torch.float32, pin_memory=gpu
        )
        first = 0
        loader = self._loader(list(self._rows))
        for batch in loader:
            last = first + len(batch.images)
            self._samples[first:last] = batch.images.permute(0, 2, 3, 1)
            first = last
        loader.close()
        assert first == len(self._rows)

    def unload(self, indices: Sequence[int]) -> None:
        """Frees the memory: LoadGen unloads what it has loaded, all at once."""
        self._samples, self._rows = torch.empty(0), {}

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Loaded images on the device [B, 3, S, S], channels_last; on a GPU ordered on the current stream.

        There they are copied one by one from where they lie, on a stream of their own, while another batch is computed.
        """
        rows = [self._rows[index] for index in indices]
        if self._copies is None:
            return self._samples.index_select(0, torch.tensor(rows)).permute(0, 3, 1, 2)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            images = torch.empty((len(rows), *self._samples.shape[1:]), dtype=torch.float16, device=self._device)
            for target, row in zip(images, rows, strict=True):
                target.copy_(self._samples[row], non_blocking=True)
        current.wait_stream(self._copies)
        images.record_stream(current)
        return images.permute(0, 3, 1, 2)

    def random_batch(self, batch_size: int) -> Tensor:
        """A batch to warm up with, before anything is loaded."""
        return next(iter(self._synthetic(batch_size, batch_size))).images

    def _loader(self, indices: list[int]) -> EvalLoader | SyntheticEvalLoader:
        if self._images is None:
            return self._synthetic(len(indices), self._config.evaluation.batch_size)
        chosen = self._images._replace(
            file_names=tuple(self._images.file_names[index] for index in indices),
            image_ids=self._images.image_ids[indices],
            sizes_hw=self._images.sizes_hw[indices],
        )
        return make_eval_loader(self._config, chosen, self._device)

    def _synthetic(self, num_images: int, batch_size: int) -> SyntheticEvalLoader:
        return SyntheticEvalLoader(
            num_images=num_images,
            image_size=self._config.model.image_size,
            batch_size=min(num_images, batch_size),
            device=self._device,
            seed=self._config.training.seed,
        )


class Answers(NamedTuple):
    """The answers to a batch of queries.

    query_ids: LoadGen's, B of them. counts: [B] int32, detections of each.
    rows: [B, D, 7] float32: position of the image in the set, top, left, bottom and right as fractions of it, score,
        label number; those of image b are the first counts[b].
    """

    query_ids: Sequence[int]
    counts: np.ndarray
    rows: np.ndarray


class _Query(NamedTuple):
    id: int
    image: int


class _Computed(NamedTuple):
    """A batch on its way to the host; `done` is None where the host computed it."""

    queries: list[_Query]
    rows: Tensor  # [B, D, 6], those of Answers without the first column
    counts: Tensor  # [B]
    done: torch.cuda.Event | None


class SystemUnderTest:
    """LoadGen's system under test: a thread forms batches and has them computed, another answers.

    As soon as the device has room for a batch it gets one of the queries that are there, the oldest first: batches grow
    with the load. To let an idle device wait 5 to 40 ms for a fuller batch never raised the load at which p99 reaches
    100 ms, in simulations with Poisson arrivals of devices that take 0.5 to 5 ms for a batch and 0.6 to 8 ms for each
    image in it; it cost latency. The host waits for the device only where it answers.
    """

    def __init__(
        self,
        detector: Detector,
        library: SampleLibrary,
        *,
        largest_batch: int,
        label_numbers: Tensor | None,
        complete: Callable[[Answers], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """label_numbers: [K + 1], what to report for label k; None for k itself. complete: hands answers to LoadGen.

        on_error: called in one of the threads, which then ends.
        """
        self._detector = detector
        self._library = library
        self._largest_batch = largest_batch
        self._label_numbers = None if label_numbers is None else label_numbers.to(detector.anchors_cxcywh.device)
        self._complete = complete
        self._on_error = on_error
        self._arrived = threading.Condition()
        self._waiting: deque[_Query] = deque()
        self._closed = False
        self._room = threading.Semaphore(_BATCHES_IN_FLIGHT)
        self._computed: queue.SimpleQueue[_Computed | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.num_answered = 0
        self.num_batches = 0

    def start(self, warm_up_sizes: Sequence[int]) -> float:
        """Computes random batches of these sizes, then waits for queries. Returns seconds, for one of the last size."""
        measured: Future[float] = Future()
        self._threads = [
            threading.Thread(target=target, args=arguments, name=name, daemon=True)
            for name, target, arguments in (
                ("compute", self._compute, (warm_up_sizes, measured)),
                ("answer", self._answer, ()),
            )
        ]
        for thread in self._threads:
            thread.start()
        return measured.result()

    def issue(self, query_ids: Sequence[int], indices: Sequence[int]) -> None:
        """Takes queries from LoadGen; they are answered later, each once."""
        queries = map(_Query, query_ids, indices)
        with self._arrived:
            self._waiting.extend(queries)
            self._arrived.notify()

    def close(self) -> None:
        """Ends the threads, when all queries have been answered."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        for thread in self._threads:
            thread.join()

    def _compute(self, warm_up_sizes: Sequence[int], measured: "Future[float]") -> None:
        try:
            # here, because each thread that computes on the CPU has threads of its own to warm
            measured.set_result(self._warm_up(warm_up_sizes))
        except BaseException as error:
            measured.set_exception(error)
            return
        try:
            while True:
                self._room.acquire()
                queries = self._collect()
                if not queries:
                    self._computed.put(None)
                    return
                self._computed.put(self._detect(queries))
        except BaseException as error:
            self._on_error(error)

    def _answer(self) -> None:
        try:
            while (batch := self._computed.get()) is not None:
                if batch.done is not None:
                    batch.done.synchronize()
                rows = np.empty((*batch.rows.shape[:2], 7), np.float32)
                rows[:, :, 0] = np.array([query.image for query in batch.queries])[:, None]
                rows[:, :, 1:] = batch.rows.numpy()
                self._complete(Answers([query.id for query in batch.queries], batch.counts.numpy(), rows))
                self.num_answered += len(batch.queries)
                self.num_batches += 1
                self._room.release()
        except BaseException as error:
            self._on_error(error)

    def _collect(self) -> list[_Query]:
        """The queries of the next batch, waited for; none when the run is over."""
        with self._arrived:
            while not self._waiting and not self._closed:
                self._arrived.wait()
            return [self._waiting.popleft() for _ in range(min(self._largest_batch, len(self._waiting)))]

    def _detect(self, queries: list[_Query]) -> _Computed:
        return self._to_host(queries, self._library.batch([query.image for query in queries]))

    @torch.inference_mode()
    def _to_host(self, queries: list[_Query], images: Tensor) -> _Computed:
        found = self._detector.detect(images)
        labels = found.labels if self._label_numbers is None else self._label_numbers[found.labels.long()]
        boxes_tlbr = found.boxes_ltrb.unflatten(-1, (2, 2)).flip(-1).flatten(-2)
        rows = torch.cat((boxes_tlbr, found.scores[..., None], labels[..., None].float()), dim=-1)
        if not rows.is_cuda:
            return _Computed(queries, rows, found.counts, None)
        computed = _Computed(
            queries,
            rows.to("cpu", non_blocking=True),
            found.counts.to("cpu", non_blocking=True),
            torch.cuda.Event(),
        )
        assert computed.done is not None
        computed.done.record()
        return computed

    def _warm_up(self, sizes: Sequence[int]) -> float:
        seconds = []
        for size in [*sizes, *[sizes[-1]] * 2]:
            images = self._library.random_batch(size)
            if images.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            computed = self._to_host([], images)
            if computed.done is not None:
                computed.done.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[-2:])


def largest_batch(settings: BenchmarkConfig, scenario: Scenario) -> int:
    """Most images that a scenario computes together."""
    return {
        "SingleStream": 1,
        "MultiStream": settings.multi_stream_samples,
        "Server": settings.server_batch_size,
        "Offline": settings.offline_batch_size,
    }[scenario]


def warm_up_sizes(settings: BenchmarkConfig, scenario: Scenario) -> Sequence[int]:
    """The batch sizes that a run will meet, but for an odd last one; the usual one last."""
    if scenario == "Server":
        return range(1, settings.server_batch_size + 1)
    if scenario == "Offline":
        return (min(settings.offline_batch_size, settings.offline_min_samples),)
    return (largest_batch(settings, scenario),)


def make_settings(
    loadgen: ModuleType, settings: BenchmarkConfig, scenario: Scenario, mode: Mode, *, batch_seconds: float
) -> Any:
    """LoadGen's TestSettings.

    batch_seconds: measured for the scenario's batches. LoadGen makes its queries beforehand and wants to know how many
    there can be: it is told twice as many as that, since it stops by itself; Offline, where all are sent, a tenth more.
    """
    made = loadgen.TestSettings()
    made.scenario = getattr(loadgen.TestScenario, scenario)
    made.mode = getattr(loadgen.TestMode, _TEST_MODES[mode])
    made.min_duration_ms = round(settings.min_duration_s * 1000)
    for name, seed in _SEEDS.items():
        setattr(made, name, seed)
    match scenario:
        case "SingleStream":
            made.min_query_count = settings.single_stream_min_queries
            made.single_stream_expected_latency_ns = batch_seconds / 2 * 1e9
            made.single_stream_target_latency_percentile = settings.single_stream_percentile / 100
        case "MultiStream":
            made.min_query_count = settings.multi_stream_min_queries
            made.multi_stream_samples_per_query = settings.multi_stream_samples
            made.multi_stream_expected_latency_ns = batch_seconds / 2 * 1e9
            made.multi_stream_target_latency_percentile = settings.multi_stream_percentile / 100
        case "Server":
            made.min_query_count = settings.server_min_queries
            made.server_target_qps = settings.server_qps
            made.server_target_latency_ns = round(settings.server_latency_ms * 1e6)
            made.server_target_latency_percentile = settings.server_percentile / 100
            made.server_find_peak_qps_decimals_of_precision = 0
        case "Offline":
            made.min_query_count = settings.offline_min_samples
            made.offline_expected_qps = (
                settings.offline_qps or 1.1 * warm_up_sizes(settings, scenario)[-1] / batch_seconds
            )
    return made


def label_numbers(detector: Detector, coco_set: CocoSet) -> Tensor:
    """[K + 1] int64, what MLPerf's logs hold for label k: its category's position (from 1) in the annotation file."""
    content = json.loads(coco_set.annotation_file.read_bytes())
    positions = {category["id"]: position for position, category in enumerate(content["categories"], 1)}
    return torch.tensor([0, *(positions[id_] for id_ in detector.category_ids_in(coco_set).tolist())])


def read_accuracy_log(path: Path, coco_set: CocoSet) -> DetectionTable:
    """The detections in an accuracy log, in pixels; of an image that is in it several times, the first.

    coco_set: the whole annotation file of the run.
    Raises DataError for a log that is of another set, or not whole.
    """
    images = coco_set.images
    category_ids = [category["id"] for category in json.loads(coco_set.annotation_file.read_bytes())["categories"]]
    rows_of: dict[int, np.ndarray] = {}
    for entry in json.loads(path.read_bytes()):
        index = entry["qsl_idx"]
        rows = np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 7).astype(np.float64)
        if (rows[:, 0] != index).any():
            raise DataError(f"{path}: qsl_idx {index} has rows of another image")
        rows_of.setdefault(index, rows)
    if sorted(rows_of) != list(range(len(images.file_names))):
        raise DataError(
            f"{path}: holds {len(rows_of)} images: expected each of the {len(images.file_names)} of "
            f"{coco_set.annotation_file}"
        )
    found = np.concatenate([rows_of[index] for index in range(len(rows_of))])
    indices = found[:, 0].astype(np.int64)
    tops, lefts, bottoms, rights = (found[:, 1:5] * images.sizes_hw[indices][:, [0, 1, 0, 1]]).T
    return DetectionTable(
        image_ids=images.image_ids[indices],
        boxes_xywh=np.stack((lefts, tops, rights - lefts, bottoms - tops), axis=1),
        scores=found[:, 5],
        category_ids=np.array(category_ids, np.int64)[found[:, 6].astype(np.int64) - 1],
    )


def read_figures(detail_log: Path) -> dict[str, Any]:
    """What LoadGen's detail log says last under each key; errors are joined."""
    figures: dict[str, Any] = {}
    for line in detail_log.read_text("utf-8", "replace").splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "), strict=False)
        figures[entry["key"]] = entry["value"]
    return figures


def format_measured(measured: Measured, settings: BenchmarkConfig) -> str:
    """A table of what LoadGen found, with what made a run invalid."""
    figures, scenario = measured.figures, measured.scenario
    each = measured.num_queries / max(measured.num_batches, 1)
    rows = [("scenario", f"{scenario}, LoadGen {str(figures.get('loadgen_version')).split()[0]}")]
    if measured.mode == "performance":
        rows += [("result", figures["result_validity"]), *_metric(figures, scenario, settings)]
        rows += [("invalid because", reason) for reason in _reasons(figures)]
    elif measured.mode == "find-load":
        load = _highest_load(figures)
        trials = f"by trials of {settings.min_duration_s:g} s each: a run must confirm it"
        too_much = f"not found: benchmark.server_qps = {settings.server_qps:g}, where the search starts, is too much"
        rows.append(("highest load", too_much if load is None else f"{load:.0f} queries/s, {trials}"))
    rows.append(("images", f"{measured.num_queries} in {measured.num_batches} batches, on average of {each:.1f}"))
    if measured.mode == "performance" and scenario != "Offline":
        kind = "per_query_latency_ns" if scenario == "MultiStream" else "latency_ns"
        query = "query_" if scenario == "MultiStream" else ""
        rows += [
            (f"latency {name}", f"{figures[key] / 1e6:.2f} ms")
            for name, key in (
                ("min", f"result_min_{query}latency_ns"),
                ("mean", f"result_mean_{query}latency_ns"),
                *(
                    (f"p{percentile}", f"result_{percentile}.00_percentile_{kind}")
                    for percentile in (50, 90, 95, 97, 99)
                ),
                ("max", f"result_max_{query}latency_ns"),
            )
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _metric(figures: dict[str, Any], scenario: Scenario, settings: BenchmarkConfig) -> list[tuple[str, str]]:
    """The rows of the figure that a scenario is about."""
    match scenario:
        case "Offline":
            return [("throughput", f"{figures['result_samples_per_second']:.4g} images/s")]
        case "SingleStream":
            percentile = settings.single_stream_percentile
            latency = figures[f"result_{percentile}.00_percentile_latency_ns"]
            return [(f"p{percentile} of the latency", f"{latency / 1e6:.2f} ms")]
        case "MultiStream":
            percentile = settings.multi_stream_percentile
            latency = figures[f"result_{percentile}.00_percentile_per_query_latency_ns"]
            name = f"p{percentile} of the latency"
            return [(name, f"{latency / 1e6:.2f} ms for {settings.multi_stream_samples} images")]
        case "Server":
            percentile = settings.server_percentile
            latency = figures[f"result_{percentile}.00_percentile_latency_ns"]
            late, total = figures["result_overlatency_query_count"], figures["result_query_count"]
            return [
                (
                    "load",
                    f"{settings.server_qps:g} queries/s asked for, "
                    f"{figures['result_scheduled_samples_per_sec']:.2f} came, "
                    f"{figures['result_completed_samples_per_sec']:.2f} were answered",
                ),
                (
                    f"p{percentile} of the latency",
                    f"{latency / 1e6:.2f} ms, at most {settings.server_latency_ms:g} ms allowed; "
                    f"{late} of {total} queries took longer",
                ),
            ]


def _reasons(figures: dict[str, Any]) -> list[str]:
    """What a valid run lacks, in LoadGen's words where it has some."""
    early_stopping = figures.get("early_stopping_result", "").replace(" * ", " ")
    texts = {
        "result_perf_constraints_met": "the latency exceeds its bound",
        "result_min_duration_met": "it was shorter than benchmark.min_duration_s",
        "result_min_queries_met": "there were too few queries",
        "early_stopping_met": f"early stopping: {early_stopping}",
    }
    reasons = [text for key, text in texts.items() if figures.get(key) is False]
    if "error_runtime" in figures:
        reasons.append(figures["error_runtime"])
    return [" ".join(reason.split()) for reason in reasons]


def _highest_load(figures: dict[str, Any]) -> float | None:
    found = re.search(r"peak performance field: ([\d.]+)", str(figures.get("generic_message")))
    return float(found[1]) if found else None


def _complete(loadgen: ModuleType, answers: Answers) -> None:
    size = 7 * answers.rows.itemsize
    loadgen.QuerySamplesComplete(  # copies what it logs
        [
            loadgen.QuerySampleResponse(id_, rows.ctypes.data, int(count) * size)
            for id_, rows, count in zip(answers.query_ids, answers.rows, answers.counts, strict=True)
        ]
    )


def _guarded(function: Callable[..., None], on_error: Callable[[BaseException], None]) -> Callable[..., None]:
    """A callback for LoadGen, whose C++ an exception must not reach: it is reported, and LoadGen stays where it is."""

    def call(*arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            on_error(error)
            threading.Event().wait()

    return call


def _abandon(error: BaseException) -> NoReturn:
    """Ends the process: LoadGen cannot be told to stop, and its threads would crash an orderly end."""
    if isinstance(error, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    elif isinstance(error, (ValueError, OSError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _import_loadgen() -> ModuleType:
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise ValueError("MLPerf LoadGen is not installed: pip install 'ssd_fast[loadgen]'")
    import mlperf_loadgen

    return mlperf_loadgen

"""The two sides that LoadGen sees: a library of samples, and a system that answers queries about them.

MLPerf does not time the loading of samples: there, images are decoded, resized, normalised and laid out in host memory
as the network reads them. A query is answered when its detections are in host memory.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.batch import LabelledImages
from dali_pipelines.evaluate import EvalLoader
from dali_pipelines.synthetic import SyntheticEvalLoader
from ssd_fast.config.sections import Config
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.evaluation.detector import Detector
from ssd_fast.hardware import synchronize

_BATCHES_IN_FLIGHT = 2  # one that is computed, and one that waits on the device


class SampleLibrary:
    """LoadGen's query sample library: images in host memory, ready for the network, by their position in the set."""

    def __init__(self, config: Config, images: LabelledImages | None, device: torch.device) -> None:
        """images: None for config.benchmark.performance_samples random images."""
        self._config = config
        self._images = images
        self._device = device
        self._samples = torch.empty(0)  # [N, S, S, 3], normalised; pinned and float16 for a GPU, else float32
        self._rows: dict[int, int] = {}  # rows of _samples by position in the set
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_images = config.benchmark.performance_samples if images is None else len(images.file_names)

    def load(self, indices: Sequence[int]) -> None:
        """Load these images and drop all others. In MultiStream, LoadGen names some images twice."""
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
        """Free the memory. LoadGen always unloads all that it has loaded."""
        self._samples, self._rows = torch.empty(0), {}

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return loaded images on the device [B, 3, S, S], channels_last.

        On a GPU, images are copied one by one on a separate stream, while another batch is computed. The current stream
        waits for the copies.
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
        """Return random images [B, 3, S, S] to warm up with, before any sample is loaded."""
        return next(iter(self._synthetic(batch_size, batch_size))).images

    def _loader(self, indices: list[int]) -> EvalLoader | SyntheticEvalLoader:
        if self._images is None:
            return self._synthetic(len(indices), self._config.evaluation.batch_size)
        return make_eval_loader(self._config, self._images.take(np.array(indices)), self._device)

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

    query_ids: B ids, given by LoadGen. counts: [B] int32, number of detections of each image.
    rows: [B, D, 7] float32: position of the image in the set; top, left, bottom and right as fractions of its size;
        score; label number. The first counts[b] rows of image b are its detections.
    """

    query_ids: Sequence[int]
    counts: np.ndarray
    rows: np.ndarray


class _Query(NamedTuple):
    id: int
    image: int


class _Computed(NamedTuple):
    """A batch on its way to the host. `done` is None if the host itself computed it."""

    queries: list[_Query]
    rows: Tensor  # [B, D, 6], columns 1 to 6 of Answers.rows
    counts: Tensor  # [B]
    done: torch.cuda.Event | None


class SystemUnderTest:
    """LoadGen's system under test: one thread forms batches and starts their computation, another one answers.

    When the device has room for a batch, it gets the oldest waiting queries: batches grow with the load. Letting an
    idle device wait 5 to 40 ms for a fuller batch cost latency and never raised the load at which p99 reaches 100 ms
    (simulated: Poisson arrivals, devices that take 0.5 to 5 ms for a batch and 0.6 to 8 ms for each image in it). Only
    the answering thread waits for the device.
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
        """Make a system that is not serving yet.

        label_numbers: [K + 1], the number to report for label k; None reports k itself.
        complete: passes answers to LoadGen.
        on_error: called in the thread that failed, which then ends.
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
        """Start the threads and compute random batches of these sizes. Return the seconds for one of the last size."""
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
        """Take queries from LoadGen. Each is answered once, later."""
        queries = map(_Query, query_ids, indices)
        with self._arrived:
            self._waiting.extend(queries)
            self._arrived.notify()

    def close(self) -> None:
        """End the threads after all queries have been answered."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        for thread in self._threads:
            thread.join()

    def _compute(self, warm_up_sizes: Sequence[int], measured: "Future[float]") -> None:
        try:
            # In this thread, because on a CPU every thread that computes has its own worker threads to warm up.
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
        """Wait for queries and return those of the next batch; return none when the run is over."""
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
            synchronize(images.device)
            start = time.perf_counter()
            computed = self._to_host([], images)
            if computed.done is not None:
                computed.done.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[-2:])

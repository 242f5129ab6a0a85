"""The system under test: every query is answered once, in batches that grow with the load."""

import threading
from collections.abc import Sequence

import numpy as np
import torch

import kernels
from ssd_fast.loadgen.system import Answers, SystemUnderTest


class Library:
    """Images that hold nothing but their position."""

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1)

    def random_batch(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 1, 1, 1)


class Finder:
    """Finds one box in image n, of score n / 1000 and label 1, and waits while it is told to."""

    def __init__(self) -> None:
        self.anchors_cxcywh = torch.zeros(1, 4)
        self.batch_sizes: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.started = threading.Semaphore(0)

    def detect(self, images: torch.Tensor) -> kernels.Detections:
        size = len(images)
        self.batch_sizes.append(size)
        self.started.release()
        self.may_go_on.wait()
        return kernels.Detections(
            boxes_ltrb=torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(size, 2, 4),
            scores=images[:, 0, 0] / 1000 * torch.tensor([1, 0]),
            labels=torch.tensor([1, 0], dtype=torch.int32).expand(size, 2),
            counts=torch.ones(size, dtype=torch.int32),
        )


class Served:
    """A system under test, and what it answered: rows by query id."""

    def __init__(self, **options: int) -> None:
        self.finder = Finder()
        self.answers: list[tuple[int, np.ndarray]] = []
        self.errors: list[BaseException] = []
        self.system = SystemUnderTest(
            self.finder,  # type: ignore[arg-type]
            Library(),  # type: ignore[arg-type]
            label_numbers=torch.tensor([0, 7]),
            complete=self.complete,
            on_error=self.errors.append,
            **options,
        )
        self.system.start([1])
        self.finder.batch_sizes.clear()
        while self.finder.started.acquire(blocking=False):
            pass

    def complete(self, answers: Answers) -> None:
        for id_, rows, count in zip(answers.query_ids, answers.rows, answers.counts, strict=True):
            self.answers.append((id_, rows[:count].copy()))


def test_every_query_is_answered_once_with_its_own_rows() -> None:
    served = Served(largest_batch=5)

    def issue(first: int) -> None:
        for start in range(first, first + 300, 3):
            ids = range(start, start + 3)
            served.system.issue([*ids], [id_ % 500 for id_ in ids])

    issuers = [threading.Thread(target=issue, args=(first,)) for first in range(0, 1200, 300)]
    for issuer in issuers:
        issuer.start()
    for issuer in issuers:
        issuer.join()
    served.system.close()
    assert not served.errors
    assert sorted(id_ for id_, _ in served.answers) == list(range(1200))
    assert max(served.finder.batch_sizes) <= 5
    assert served.system.num_answered == 1200
    assert served.system.num_batches == len(served.finder.batch_sizes)
    for id_, rows in served.answers:
        np.testing.assert_allclose(rows, [[id_ % 500, 0.2, 0.1, 0.4, 0.3, id_ % 500 / 1000, 7]], rtol=1e-6)


def test_a_batch_is_what_came_while_the_one_before_was_computed() -> None:
    served = Served(largest_batch=4)
    served.finder.may_go_on.clear()
    served.system.issue([0], [0])
    served.finder.started.acquire()  # a lone query does not wait for others
    for id_ in range(1, 7):
        served.system.issue([id_], [id_])
    served.finder.may_go_on.set()
    served.system.close()
    assert served.finder.batch_sizes == [1, 4, 2]
    assert [id_ for id_, _ in served.answers] == list(range(7))

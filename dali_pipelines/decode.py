"""One image file at a time, decoded on the CPU as the pipelines decode it there."""

import atexit
import os
import threading
from pathlib import Path

import numpy as np
from nvidia.dali import Pipeline, fn, types

_own = threading.local()
atexit.register(lambda: _own.__dict__.clear())  # while DALI, which the main thread's pipeline needs, is still there


def decode_image(path: str | Path) -> np.ndarray:
    """Pixels [H, W, 3] uint8 RGB of an image file, as it stores them: not turned as its metadata say.

    May be called by many threads at a time. Raises OSError where the file cannot be read, and ValueError that names it
    where it cannot be decoded; the libraries that decode say on stderr why.
    """
    encoded = np.fromfile(os.fspath(path), np.uint8)
    pipeline: Pipeline = getattr(_own, "pipeline", None) or _make_pipeline()
    _own.pipeline = None  # it cannot be used after an error
    try:
        pipeline.feed_input("encoded", [encoded])
        (decoded,) = pipeline.run()
    except RuntimeError:
        raise ValueError(f"{path}: cannot be decoded: its content is damaged, or of a rare kind") from None
    _own.pipeline = pipeline
    return np.array(decoded.at(0))


def _make_pipeline() -> Pipeline:
    pipeline = Pipeline(
        batch_size=1, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, exec_dynamic=False
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False))
    return pipeline

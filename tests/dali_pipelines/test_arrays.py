"""Images in memory: their batches equal those of the same pixels in lossless files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.arrays import ArrayLoader
from dali_pipelines.batch import LabelledImages
from dali_pipelines.evaluate import EvalLoader

SIZES_HW = ((40, 70), (129, 64), (64, 64), (1, 200), (300, 90))
DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CPU only")
    ),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_arrays_and_lossless_files_give_the_same_batches(tmp_path: Path, device: torch.device) -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in SIZES_HW]
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
    files = LabelledImages(
        image_dir=tmp_path,
        file_names=tuple(f"{number}.png" for number in range(len(arrays))),
        image_ids=np.arange(len(arrays), dtype=np.int64),
        sizes_hw=np.array(SIZES_HW, dtype=np.int32),
        boxes_ltrb=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(len(arrays) + 1, dtype=np.int64),
    )
    expected = EvalLoader(images=files, image_size=64, batch_size=2, device=device, num_threads=2, prefetch_batches=1)
    loader = ArrayLoader(image_size=64, batch_size=2, device=device, num_threads=2)
    for _ in range(2):  # one pipeline serves all calls, whatever was left of the last batch
        batches = list(loader.batches(arrays))
        assert [len(batch.images) for batch in batches] == [2, 2, 1]
        for found, wanted in zip(batches, expected, strict=True):
            assert torch.equal(found.images, wanted.images)
            assert (found.images.dtype, found.images.stride()) == (wanted.images.dtype, wanted.images.stride())
            assert torch.equal(found.image_ids, wanted.image_ids)
            assert torch.equal(found.sizes_hw, wanted.sizes_hw)
    assert list(loader.batches([])) == []

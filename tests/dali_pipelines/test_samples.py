"""Files and ground truths of batches, as DALI is given them."""

import os
from pathlib import Path

import numpy as np
from pipelines import Item, image_set

from dali_pipelines.order import TrainingOrder
from dali_pipelines.samples import SampleSource


def test_a_batch_holds_files_boxes_and_labels_of_its_images() -> None:
    items = [
        Item("a.jpg", (300, 700), [[0, 0, 700, 300, 3], [70, 30, 140, 150, 5]]),
        Item("folder/é.jpg", (90, 30), [[3, 9, 30, 90, 1]]),
        Item(os.fsdecode(b"\xff.jpg"), (11, 13), [[1, 2, 3, 4, 2]] * 3),
    ]
    order = TrainingOrder(3, batch_size=2, rank=0, world_size=1, seed=4)
    source = SampleSource(image_set(Path("images"), items), order)
    for batch in range(6):
        names, boxes, labels, positions = source(batch)
        chosen = [items[position] for position in order.positions(batch)]
        assert positions.tolist() == [[items.index(item)] for item in chosen]
        assert [name.tobytes() for name in names] == [os.fsencode(f"images/{item.name}") for item in chosen]
        assert list(source.paths(batch)) == [f"images/{item.name}" for item in chosen]
        for item, found, classes in zip(chosen, boxes, labels, strict=True):
            height, width = item.size_hw
            rows = np.array(item.boxes, np.float32)
            assert found.dtype == np.float32
            assert (found == rows[:, :4] / np.array([width, height, width, height], np.float32)).all()
            assert classes.tolist() == rows[:, 4].tolist()

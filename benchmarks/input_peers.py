"""Compare the speed of this project's training input on a CPU with that of two others, in one run.

    pip install albumentations opencv-python-headless
    python benchmarks/input_peers.py --config configs/ssd300.toml --data DATA

All read the same images and boxes and make batches of normalised images of one size with SSD's crop, colours and flips.
Ours also encodes the targets of every anchor; the peers leave that to their loss. The peers are DataLoaders with a
worker for each core: one of PIL and torchvision.transforms.v2, one of OpenCV and albumentations. They take turns; while
one is timed, the others and their workers are idle.
"""

import itertools
import statistics
import sys
from typing import Annotated, Any

from ssd_fast.openmp import wait_briefly

wait_briefly()  # before torch is imported, as `ssd-fast` does; for all sides

import albumentations
import cv2
import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils.data import Dataset
from torchvision_peer import Side, seconds
from torchvision_training import PREFETCHED_PER_WORKER, PeerDataset, make_peer_loader

from dali_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Augmentation, LabelledImages
from ssd_fast.config.recipe import load_config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import make_train_loader
from ssd_fast.data.sets import load_sets
from ssd_fast.distributed.world import World
from ssd_fast.hardware import device_name, usable_cores
from ssd_fast.model.anchors import model_anchors
from ssd_fast.options import DataOption, RecipeOption, SetOption
from ssd_fast.progress import setup_logging
from ssd_fast.tables import Row, Table, format_table

CPU = torch.device("cpu")


class OpenCVDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Augmented images of a set, read by OpenCV; colours and normalisation by albumentations."""

    def __init__(self, images: LabelledImages, augmentation: Augmentation, image_size: int) -> None:
        self._images = images
        self._augmentation = augmentation
        self._with_boxes = np.flatnonzero(np.diff(images.offsets))
        hue = augmentation.hue_degrees / 360
        self._transforms = albumentations.Compose(
            [
                albumentations.Resize(image_size, image_size, interpolation=cv2.INTER_AREA),
                albumentations.ColorJitter(
                    augmentation.brightness, augmentation.contrast, augmentation.saturation, (-hue, hue), p=1.0
                ),
                albumentations.HorizontalFlip(p=augmentation.flip_probability),
                albumentations.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ],
            bbox_params=albumentations.BboxParams("pascal_voc", label_fields=["labels"]),
        )

    def __len__(self) -> int:
        return len(self._with_boxes)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        cv2.setNumThreads(0)  # the workers are processes
        index = self._with_boxes[position]
        truths = slice(self._images.offsets[index], self._images.offsets[index + 1])
        stored = cv2.imread(str(self._images.image_dir / self._images.file_names[index]), cv2.IMREAD_COLOR)
        assert stored is not None, "load_sets has looked at every file"
        boxes, labels = self._images.boxes_ltrb[truths], self._images.labels[truths]
        crop, boxes, labels = crop_of_ssd(stored.shape[:2], boxes, labels, self._augmentation)
        left, top, right, bottom = crop
        image = cv2.cvtColor(stored[top:bottom, left:right], cv2.COLOR_BGR2RGB)
        found = self._transforms(image=image, bboxes=boxes, labels=labels)
        pixels = torch.from_numpy(found["image"]).permute(2, 0, 1)
        boxes_ltrb = torch.tensor(np.asarray(found["bboxes"], np.float32).reshape(-1, 4))
        return pixels, boxes_ltrb, torch.tensor(np.asarray(found["labels"], np.int64))


def crop_of_ssd(
    size_hw: tuple[int, int], boxes_ltrb: np.ndarray, labels: np.ndarray, augmentation: Augmentation
) -> tuple[tuple[int, int, int, int], np.ndarray, np.ndarray]:
    """A crop in pixels, with the boxes whose centre it holds, cut to it."""
    height, width = size_hw
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    options: list[float | None] = [*augmentation.crop_min_ious]
    options += [None] if augmentation.crop_allow_none else []
    while True:
        least = options[random.integers(len(options))]
        if least is None:
            return (0, 0, width, height), boxes_ltrb, labels
        for _ in range(augmentation.crop_attempts):
            wide, high = random.uniform(*augmentation.crop_sides, 2)
            if not augmentation.crop_aspect[0] <= wide / high <= augmentation.crop_aspect[1]:
                continue
            left, top = int(random.uniform(0, 1 - wide) * width), int(random.uniform(0, 1 - high) * height)
            crop = np.array([left, top, left + max(1, int(wide * width)), top + max(1, int(high * height))])
            centres = (boxes_ltrb[:, :2] + boxes_ltrb[:, 2:]) / 2
            kept = ((centres > crop[:2]) & (centres < crop[2:])).all(axis=1)
            if not kept.any():
                continue
            inside = np.concatenate(
                (np.maximum(boxes_ltrb[:, :2], crop[:2]), np.minimum(boxes_ltrb[:, 2:], crop[2:])), axis=1
            )
            common = (inside[:, 2:] - inside[:, :2]).clip(0).prod(axis=1)
            areas = (boxes_ltrb[:, 2:] - boxes_ltrb[:, :2]).prod(axis=1)
            ious = common / (areas + (crop[2:] - crop[:2]).prod() - common)
            if ious[kept].min() >= least:
                left, top, right, bottom = crop.tolist()
                return (left, top, right, bottom), inside[kept] - np.tile(crop[:2], 2), labels[kept]


def make_sides(config: Any, coco_set: CocoSet, num_workers: int) -> dict[str, Side]:
    """The peers first: their workers are forks, which must be made before DALI and the operators start threads."""
    batch_size, size = config.training.batch_size, config.model.image_size
    datasets = {
        "PIL, torchvision": PeerDataset(coco_set.images, config.augmentation, size),
        "OpenCV, albumentations": OpenCVDataset(coco_set.images, config.augmentation, size),
    }
    sides = {}
    for name, dataset in datasets.items():
        batches = iter(make_peer_loader(dataset, batch_size, num_workers, pin_memory=False))  # type: ignore[arg-type]
        next(batches)
        sides[name] = Side(batches, PREFETCHED_PER_WORKER * num_workers, _no_step, None)
    loader = make_train_loader(config, coco_set, model_anchors(config.model), CPU, World())
    endless = itertools.chain.from_iterable(loader.epoch() for _ in itertools.count())
    return {"ours": Side(endless, config.data.prefetch_batches, _no_step, None), **sides}


def _no_step(_batch: object) -> None:
    pass


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    config: RecipeOption,
    data: DataOption,
    overrides: SetOption = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches of a turn.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
) -> None:
    """Make batches as `ssd-fast train` does and as the peers do, in turns; print how their speeds compare."""
    recipe = load_config(config, overrides or ())
    setup_logging(None)
    cores = usable_cores()
    coco_set, _ = load_sets(recipe, data, World())
    sides = make_sides(recipe, coco_set, cores)
    images = recipe.training.batch_size
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(images * batches / seconds(side, "input", batches, CPU))
    ours = statistics.median(rates["ours"])
    rows = [
        Row([name, f"{statistics.median(found):.0f}", f"{min(found):.0f} - {max(found):.0f}",
             f"{ours / statistics.median(found):.2f}"])
        for name, found in rates.items()
    ]  # fmt: skip
    print(
        f"{device_name(CPU, cores)}; {images} images of {recipe.model.image_size} x {recipe.model.image_size} a batch; "
        f"{cores} workers; torch {torch.__version__}; OpenCV {cv2.__version__}; "
        f"albumentations {albumentations.__version__}; {rounds} turns of {batches} batches\n"
    )
    print(format_table(Table(title="", columns=["", "images/s", "range", "ours is faster by"], rows=rows)))


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""Detection on a user's own images: from Python, or from files to annotated copies and one JSON file."""

import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import torch
from PIL import Image

from dali_pipelines.arrays import ArrayLoader
from dali_pipelines.batch import EvalBatch
from dali_pipelines.evaluate import EvalLoader
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import read_categories
from ssd_fast.data.boxes import xywh_to_ltrb
from ssd_fast.data.images import UserImages, find_images, orientation_of, read_image, turned
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import DetectionTable
from ssd_fast.evaluation.detector import Detector, load_detector
from ssd_fast.evaluation.draw import draw_detections
from ssd_fast.files import write_atomically
from ssd_fast.hardware import input_threads, usable_cores
from ssd_fast.progress import track
from ssd_fast.timing import Timeline

RESULTS = "detections.json"
_COMMENT = b"annotated by ssd-fast detect"
_LONGEST_NAME = 240  # bytes of a copy's name without number and ending

ImageInput: TypeAlias = str | Path | Image.Image | np.ndarray
"""An image file, a PIL image, or a uint8 array [H, W, 3] RGB."""


class ImageDetections(NamedTuple):
    """The detections on one image, best first.

    boxes_ltrb: [D, 4] float64, pixels of the upright image: left, top, right, bottom. A box may reach over the edge.
    scores: [D] float64, probabilities.
    labels: D class names.
    image: the image file, or the image.
    class_names: all classes that the network knows.
    """

    boxes_ltrb: np.ndarray
    scores: np.ndarray
    labels: list[str]
    image: Path | Image.Image
    class_names: tuple[str, ...]

    def draw(self, min_score: float = 0.3) -> Image.Image:
        """Return a copy of the image with the boxes of at least this score, their class names and scores."""
        image = read_image(str(self.image), None) if isinstance(self.image, Path) else self.image
        rows = np.flatnonzero(self.scores >= min_score)
        labels = [self.labels[row] for row in rows]
        return draw_detections(image, self.boxes_ltrb[rows], labels, self.scores[rows], class_names=self.class_names)


class ImageDetector:
    """A detector to call with images; `ssd_fast.load_detector` makes one.

    categories, config: class ids and names in label order, and the configuration of the network.
    """

    def __init__(self, detector: Detector, config: Config, device: torch.device) -> None:
        """Wrap a detector whose network is on the device."""
        self.categories = detector.categories
        self.config = config
        self._detector = detector
        self._device = device
        self._array_loader: ArrayLoader | None = None

    @overload
    def __call__(self, images: ImageInput) -> ImageDetections: ...  # type: ignore[overload-overlap]  # a str is one path

    @overload
    def __call__(self, images: Sequence[ImageInput]) -> list[ImageDetections]: ...

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> ImageDetections | list[ImageDetections]:
        """Return the detections on an image, or a list of them for a list or tuple of images.

        Files are decoded as on the command line. Images are turned upright as their EXIF entry says.
        Raises ValueError for what is not an image of 8 bits per channel.
        """
        given = images if isinstance(images, (list, tuple)) else [images]
        inputs = [_check_input(image, f"image {number} of {len(given)}") for number, image in enumerate(given, 1)]
        files = [image for image in inputs if isinstance(image, Path)]
        pixels = [image for image in inputs if isinstance(image, Image.Image)]
        of_files = iter(self._detect(self._file_batches(files), files) if files else ())
        of_pixels = iter(self._detect(self._pixel_batches(pixels), pixels) if pixels else ())
        found = [next(of_files if isinstance(image, Path) else of_pixels) for image in inputs]
        return found if isinstance(images, (list, tuple)) else found[0]

    def _detect(self, batches: Iterable[EvalBatch], sources: Sequence[Path | Image.Image]) -> list[ImageDetections]:
        table = self._detector.detect_all(batches)
        names = {category.id: category.name for category in self.categories}
        results = []
        for index, source in enumerate(sources):
            rows = np.flatnonzero(table.image_ids == index)
            results.append(
                ImageDetections(
                    boxes_ltrb=xywh_to_ltrb(table.boxes_xywh[rows]),
                    scores=table.scores[rows],
                    labels=[names[category_id] for category_id in table.category_ids[rows].tolist()],
                    image=source,
                    class_names=tuple(names.values()),
                )
            )
        return results

    def _file_batches(self, files: Sequence[Path]) -> EvalLoader:
        found = find_images(files, bad_images=None, max_pixels=self.config.data.max_image_pixels)
        return _make_loader(self.config, found, self._device)

    def _pixel_batches(self, images: Sequence[Image.Image]) -> Iterable[EvalBatch]:
        if self._array_loader is None:
            self._array_loader = ArrayLoader(
                image_size=self.config.model.image_size,
                batch_size=self.config.evaluation.batch_size,
                device=self._device,
                num_threads=input_threads(self.config.data.num_threads, usable_cores()),
            )
        return self._array_loader.batches([np.asarray(image) for image in images])


def load_image_detector(
    path: Path,
    *,
    config: Config | None,
    overrides: Sequence[str] = (),
    annotations: Path | None,
    device: str | torch.device | None,
) -> ImageDetector:
    """Return the detector of a checkpoint. Arguments: those of `ssd_fast.load_detector`."""
    chosen = World().device() if device is None else torch.device(device)
    categories = read_categories(annotations) if annotations else None
    detector, config = load_detector(path, chosen, config=config, overrides=overrides, categories=categories)
    return ImageDetector(detector, config, chosen)


class FilesDetected(NamedTuple):
    """num_images: number of images. parts: seconds of each part of the work, as in `timing.Timeline.parts`."""

    num_images: int
    parts: Mapping[str, Sequence[float]]


def detect_files(
    checkpoint: Path,
    paths: Iterable[Path],
    output: Path,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    annotations: Path | None = None,
    drawn_score: float = 0.3,
) -> FilesDetected:
    """Write an annotated copy of every image to a folder, and all detections to detections.json in it.

    The JSON is a list with an object per image: file (absolute, with the names that were given), annotated (its copy),
    width and height (pixels of the upright image) and detections, best first: category_id, category, score, bbox [x, y,
    width, height] in pixels. Of the files in the folder, only those that an earlier call made are replaced.

    checkpoint, config, overrides: as for `load_detector`.
    paths: image files, folders of them, or patterns. output: folder, made if missing.
    annotations: COCO JSON with the class names, for weights without names whose classes are not COCO's.
    drawn_score: detections under this probability are written to the JSON only.
    """
    device = World().device()
    categories = read_categories(annotations) if annotations else None
    detector, config = load_detector(checkpoint, device, config=config, overrides=overrides, categories=categories)
    found_images = find_images(paths, bad_images=config.data.bad_images, max_pixels=config.data.max_image_pixels)
    images, orientations = found_images
    copies = _copy_names(images.file_names)
    _check_output(output, copies, images.file_names)
    timeline = Timeline(device, time.perf_counter())
    output.mkdir(parents=True, exist_ok=True)
    loader = _make_loader(config, found_images, device)
    timeline.settle("preparing")
    table = detector.detect_all(track(loader, "detecting", total=len(loader)), timeline=timeline)
    loader.close()
    timeline.settle("collecting")
    names = {category.id: category.name for category in detector.categories}
    results = []
    for index, copy_name in enumerate(track(copies, "drawing")):
        rows = np.flatnonzero(table.image_ids == index)
        found = DetectionTable(*(column[rows] for column in table))
        file_name, (height, width) = images.file_names[index], images.sizes_hw[index].tolist()
        image = {"file": file_name, "annotated": copy_name, "width": width, "height": height}
        results.append(image | {"detections": _describe(found, names)})
        upright = read_image(file_name, orientations[index])
        _write_annotated(upright, output / copy_name, found, names, drawn_score)
    write_atomically(output / RESULTS, json.dumps(results, indent=1).encode())
    timeline.settle("drawing")
    return FilesDetected(len(images.file_names), timeline.parts())


def _make_loader(config: Config, found: UserImages, device: torch.device) -> EvalLoader:
    return make_eval_loader(config, found.images, device, orientations=found.orientations)


def _check_output(output: Path, copies: Sequence[str], inputs: Sequence[str]) -> None:
    """Raise ValueError where results would replace a file that an earlier call did not make, or an image given now."""
    given = {(status.st_dev, status.st_ino) for status in map(os.stat, inputs)}
    for name in (RESULTS, *copies):
        path = output / name
        if not path.exists() and not path.is_symlink():
            continue
        is_own = path.is_file() and not path.is_symlink() and (_is_results if name == RESULTS else _is_copy)(path)
        if not is_own or (path.stat().st_dev, path.stat().st_ino) in given:
            raise ValueError(
                f"--output {output}: {path} exists and would be replaced, but is not the result of an earlier "
                "detection: expected another folder"
            )


def _is_copy(path: Path) -> bool:
    """Return True for an annotated copy, which carries a comment."""
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return image.info.get("comment") == _COMMENT
    except Exception:  # Pillow raises errors of many kinds on files of others
        return False


def _is_results(path: Path) -> bool:
    """Return True for a file of detections as detect_files writes it."""
    try:
        found = json.loads(path.read_bytes())
        return bool(found) and all(image.keys() >= {"file", "annotated", "detections"} for image in found)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _check_input(image: object, name: str) -> Path | Image.Image:
    """Return the path of a file, or an upright RGB image. name: of the image in an error."""
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            found = "a folder" if Path(image).is_dir() else "no such file"
            raise ValueError(f"{image}: {found}: expected an image file")
        return Path(image)
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{name}: a PIL image of mode {image.mode}: expected one of 8 bits per channel")
        return turned(image, orientation_of(image))
    if not isinstance(image, np.ndarray):
        found = type(image).__name__
    elif image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return Image.fromarray(image)
    else:
        found = f"an array of {image.dtype} {list(image.shape)}"
    raise ValueError(f"{name}: {found}: expected a path, a PIL image, or a uint8 array [H, W, 3] RGB")


def _describe(found: DetectionTable, names: Mapping[int, str]) -> list[dict[str, object]]:
    """Return an object of detections.json for each detection on an image. names: by category id."""
    rows = zip(found.category_ids.tolist(), found.scores.tolist(), found.boxes_xywh.tolist(), strict=True)
    return [
        {"category_id": category_id, "category": names[category_id], "score": score, "bbox": box}
        for category_id, score, box in rows
    ]


def _write_annotated(
    upright: Image.Image, target: Path, found: DetectionTable, names: Mapping[int, str], drawn_score: float
) -> None:
    drawn = found.scores >= drawn_score
    image = draw_detections(
        upright,
        xywh_to_ltrb(found.boxes_xywh[drawn]),
        [names[category_id] for category_id in found.category_ids[drawn].tolist()],
        found.scores[drawn],
        class_names=list(names.values()),
    )
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, comment=_COMMENT)
    write_atomically(target, buffer.getvalue())


def _copy_names(file_names: Sequence[str]) -> list[str]:
    """Return the file name of each annotated copy: that of the image, numbered where two images have the same.

    It is cut where it would be longer than a file system takes.
    """
    names: list[str] = []
    taken = {RESULTS}
    for file_name in file_names:
        stem, number = os.fsencode(Path(file_name).stem), 1
        name = stem[:_LONGEST_NAME] + b".jpg"
        while os.fsdecode(name).lower() in taken:
            number += 1
            name = stem[:_LONGEST_NAME] + b"_%d.jpg" % number
        names.append(os.fsdecode(name))
        taken.add(names[-1].lower())  # some file systems do not tell them apart
    return names

"""A synthetic detection set in COCO's format, for demonstrations and tests without any download.

Five classes, each one silhouette with one texture; colours mean nothing. Distractors have a class's texture on a
shapeless blob, or the silhouette without the texture. Objects hide parts of each other; the image's edge cuts some.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[Any]
Texture = Callable[[Array, Array], Array]

MIN_VISIBLE = 0.55
"""Smallest visible share of an object. A nearly hidden object could not be recognised."""

PLACEMENT_ATTEMPTS = 8


class Kind(NamedTuple):
    """The look of a figure in its own coordinates u, v, inside u^2 + v^2 <= 1.

    outline: [V, 2], a polygon. texture: of u and v, the share of the figure's second colour, 0..1.
    """

    category_id: int
    name: str
    outline: Array
    texture: Texture


class Figure(NamedTuple):
    """One figure in the image's plane.

    x, y: centre, pixels. radius: of the circle around it, pixels. angle: radians. squeeze: v is shrunk by it.
    detail: the texture is finer by it, relative to the figure.
    colours: [2, 3] float32 in 0..1.
    """

    kind: Kind
    x: float
    y: float
    radius: float
    angle: float
    squeeze: float
    detail: float
    colours: Array


class SyntheticImage(NamedTuple):
    """A finished image with its ground truth.

    image: RGB or greyscale, width and height 160 to 320 pixels. quality: of the JPEG.
    things: painted in this order; one figure is an object, several together are a crowd.
    owners: [H, W] int, 1 + the index of the thing that is seen at a pixel, 0 where none is.
    """

    image: Image.Image
    quality: int
    things: tuple[tuple[Figure, ...], ...]
    owners: Array


def _star(points: int, inner: float) -> Array:
    """Outline of a star of outer radius 1. [2 * points, 2]"""
    angles = np.arange(2 * points) * (math.pi / points)
    radii = np.where(np.arange(2 * points) % 2, inner, 1)
    return np.stack((radii * np.cos(angles), radii * np.sin(angles)), 1)


def _polygon(points: int) -> Array:
    return _star(points, math.cos(math.pi / points))


def _checks(u: Array, v: Array) -> Array:
    return (np.floor(2.5 * u) + np.floor(2.5 * v)) % 2


def _stripes(u: Array, _v: Array) -> Array:
    return np.floor(3.5 * u) % 2


def _dots(u: Array, v: Array) -> Array:
    return np.hypot(2.8 * u % 1 - 0.5, 2.8 * v % 1 - 0.5) < 0.33


def _facets(u: Array, v: Array) -> Array:
    return np.floor(np.arctan2(v, u) * (5 / math.pi)) % 2


def _rings(u: Array, v: Array) -> Array:
    return np.floor(4 * np.hypot(u, v)) % 2


KINDS = (
    Kind(1, "checkered disc", _polygon(30), _checks),
    Kind(3, "striped bar", np.array([(-0.9, -0.43), (0.9, -0.43), (0.9, 0.43), (-0.9, 0.43)]), _stripes),
    Kind(7, "dotted triangle", _polygon(3), _dots),
    Kind(18, "faceted star", _star(5, 0.5), _facets),
    Kind(44, "ringed hexagon", _polygon(6), _rings),
)
OTHER_KINDS = tuple(
    Kind(a.category_id + 1, f"{b.name.split()[0]} {a.name.split()[1]}", a.outline, b.texture)
    for a, b in zip(KINDS, KINDS[1:] + KINDS[:1], strict=True)
)
"""Classes of the same silhouettes and textures in other pairs."""


def _distractor_kind(rng: Generator, kinds: tuple[Kind, ...]) -> Kind:
    """A blob with the texture of a class, or a blob or the silhouette of a class with a smooth shade."""
    angles = np.arange(60) * (math.pi / 30)
    phases = rng.uniform(0, 2 * math.pi, 4)
    ripple = np.sin(angles[:, None] * (2, 3, 4, 5) + phases) @ rng.uniform(0, 0.1, 4)
    blob = (0.6 + ripple)[:, None] * _polygon(30)

    def shade(u: Array, v: Array) -> Array:
        return 0.5 + 0.3 * np.sin(u + phases[0]) + 0.2 * np.sin(2 * v + phases[1])

    kind = kinds[rng.integers(len(kinds))]
    outline, texture = ((blob, kind.texture), (kind.outline, shade), (blob, shade))[rng.integers(3)]
    return Kind(0, "distractor", outline, texture)


def _colours(rng: Generator) -> Array:
    """Two random colours of clearly different brightness. [2, 3] float32 in 0..1."""
    luma = np.array([0.3, 0.59, 0.11])
    while True:
        pair = rng.uniform(0, 1, (2, 3))
        if abs((pair[0] - pair[1]) @ luma) > 0.45:
            return pair.astype(np.float32)


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _figure(rng: Generator, kind: Kind, x: float, y: float, radius: float, colours: Array) -> Figure:
    angle, squeeze = rng.uniform(-0.4, 0.4), rng.uniform(0.8, 1)
    detail = math.sqrt(radius / 36) * rng.uniform(0.85, 1.2)
    return Figure(kind, x, y, radius, angle, squeeze, detail, colours)


class Stamp(NamedTuple):
    """A figure's share of every pixel of the part of the image that it may touch.

    rows, columns: that part. coverage: [h, w] float32 in 0..1. area: pixels at least half covered, also outside.
    """

    rows: slice
    columns: slice
    coverage: Array
    area: int


def _stamp(figure: Figure, height: int, width: int) -> Stamp:
    left, top = math.floor(figure.x - figure.radius), math.floor(figure.y - figure.radius)
    size = 2 * math.ceil(figure.radius) + 1
    cos, sin = math.cos(figure.angle), math.sin(figure.angle)
    u, v = figure.radius * figure.kind.outline.T * ((1,), (figure.squeeze,))
    corners = np.stack((cos * u - sin * v + figure.x - left, sin * u + cos * v + figure.y - top), 1)
    fine = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(fine).polygon((2 * corners - 0.5).ravel().tolist(), fill=255)
    coverage = np.asarray(fine.reduce(2), np.float32) / 255
    rows, columns = slice(max(top, 0), max(top + size, 0)), slice(max(left, 0), max(left + size, 0))
    inside = coverage[rows.start - top : max(height - top, 0), columns.start - left : max(width - left, 0)]
    return Stamp(rows, columns, inside, int((coverage >= 0.5).sum()))


def _paint(canvas: Array, figure: Figure) -> None:
    """Blend the figure into a canvas [H, W, 3] float32."""
    stamp = _stamp(figure, *canvas.shape[:2])
    part = canvas[stamp.rows, stamp.columns]
    # Textures are sampled twice as finely as pixels: their edges would be ragged otherwise.
    dx, dy = (
        ((start + (np.arange(2 * n, dtype=np.float32) + 0.5) / 2 - centre) / figure.radius)
        for start, n, centre in (
            (stamp.columns.start, part.shape[1], figure.x),
            (stamp.rows.start, part.shape[0], figure.y),
        )
    )
    cos, sin = math.cos(figure.angle) * figure.detail, math.sin(figure.angle) * figure.detail
    u, v = cos * dx + sin * dy[:, None], (cos * dy[:, None] - sin * dx) / figure.squeeze
    fine = np.asarray(figure.kind.texture(u, v), np.float32)
    texture = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2])[..., None] / 4
    colour = figure.colours[0] + texture * (figure.colours[1] - figure.colours[0])
    part += stamp.coverage[..., None] * (colour - part)


def _claim(owners: Array, figures: Iterable[Figure], owner: int) -> int:
    """Write owner wherever a figure covers at least half of a pixel; return all pixels covered, visible or not."""
    area = 0
    for figure in figures:
        stamp = _stamp(figure, *owners.shape)
        owners[stamp.rows, stamp.columns][stamp.coverage >= 0.5] = owner
        area += stamp.area
    return area


def _propose(
    rng: Generator, kind: Kind, width: int, height: int, things: list[tuple[Figure, ...]]
) -> tuple[Figure, ...]:
    """One object anywhere or close to another one; now and then a crowd of them."""
    limits = ((13, 20), (28, 64), (64, 110))[rng.choice(3, p=(0.06, 0.76, 0.18))]
    radius = _log_uniform(rng, *limits)
    x, y = rng.uniform(0.15, 0.85, 2) * (width, height)
    if things and rng.random() < 0.3:
        neighbour = things[rng.integers(len(things))][0]
        direction, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1) * (radius + neighbour.radius)
        x, y = neighbour.x + distance * math.cos(direction), neighbour.y + distance * math.sin(direction)
    if rng.random() >= 0.02:
        return (_figure(rng, kind, x, y, radius, _colours(rng)),)
    spread = rng.uniform(25, 45)
    return tuple(
        _figure(rng, kind, x + dx, y + dy, rng.uniform(7, 13), _colours(rng))
        for dx, dy in rng.normal(0, spread, (rng.integers(10, 20), 2))
    )


def _arrange(
    rng: Generator, width: int, height: int, kinds: tuple[Kind, ...]
) -> tuple[list[tuple[Figure, ...]], Array]:
    """Objects of which enough is visible, and the owner of every pixel, as in SyntheticImage."""
    things: list[tuple[Figure, ...]] = []
    areas: list[int] = []
    owners = np.zeros((height, width), np.int64)
    for _ in range(rng.choice(8, p=(0.06, 0.08, 0.14, 0.2, 0.2, 0.14, 0.1, 0.08))):
        kind = kinds[rng.integers(len(kinds))]
        for _ in range(PLACEMENT_ATTEMPTS):
            thing, tentative = _propose(rng, kind, width, height, things), owners.copy()
            area = _claim(tentative, thing, len(things) + 1)
            seen = np.bincount(tentative.ravel(), minlength=len(things) + 2)[1:]
            if all(seen >= MIN_VISIBLE * np.array([*areas, area])):
                things.append(thing)
                areas.append(area)
                owners = tentative
                break
    return things, owners


def _noise(rng: Generator, width: int, height: int, cell: float) -> Array:
    """Smooth random field [H, W] float32 in about 0..1 with features `cell` pixels wide."""
    grid = rng.random((math.ceil(height / cell) + 2, math.ceil(width / cell) + 2), np.float32)
    box = (0.5, 0.5, 0.5 + width / cell, 0.5 + height / cell)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _background(rng: Generator, width: int, height: int) -> Array:
    """Noise of several octaves between two colours, sometimes with stripes [H, W, 3] float32."""
    weights = rng.dirichlet((1.5, 1, 1, 0.7))
    field = sum(w * _noise(rng, width, height, c) for w, c in zip(weights, (90, 35, 12, 4), strict=True))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 60)
        field = field + 0.25 * np.sin((math.cos(angle) * x + math.sin(angle) * y) * (2 * math.pi / period))
    ends = rng.uniform(0, 1, (2, 3)).astype(np.float32)
    return ends[0] + np.asarray(field, np.float32)[..., None] * (ends[1] - ends[0])


def _photograph(rng: Generator, canvas: Array) -> Image.Image:
    """The canvas under uneven light, hazy and grainy, sometimes out of focus; one in thirty is greyscale."""
    height, width, _ = canvas.shape
    slope_x, slope_y = rng.uniform(-0.35, 0.35, 2)
    light = 1 + slope_x * np.linspace(-1, 1, width)[None] + slope_y * np.linspace(-1, 1, height)[:, None]
    haze = rng.uniform(0, 0.25)
    lit = canvas * (light * (1 - haze)).astype(np.float32)[..., None] + np.float32(rng.uniform(0.2, 0.8) * haze)
    lit += np.float32(rng.uniform(0, 0.035)) * rng.standard_normal(canvas.shape, np.float32)
    image = Image.fromarray((lit.clip(0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3)))
    return image.convert("L") if rng.random() < 1 / 30 else image


def make_image(seed: int, number: int, kinds: tuple[Kind, ...] = KINDS) -> SyntheticImage:
    """Image `number` of the series of a seed; the same on every call with one version of NumPy."""
    rng = np.random.default_rng((seed, number))
    width, height = (int(n) for n in rng.integers(160, 321, 2))
    canvas = _background(rng, width, height)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, 1, 2) * (width, height)
        _paint(canvas, _figure(rng, _distractor_kind(rng, kinds), x, y, _log_uniform(rng, 12, 70), _colours(rng)))
    things, owners = _arrange(rng, width, height, kinds)
    for thing in things:
        for figure in thing:
            _paint(canvas, figure)
    image = _photograph(rng, canvas)
    return SyntheticImage(image, int(rng.integers(70, 96)), tuple(things), owners)


def annotate(synthetic: SyntheticImage, image_id: int) -> list[dict[str, Any]]:
    """COCO annotations: box and area are those of the visible part, in pixels. Ids are image_id * 100 onwards."""
    annotations = []
    for index, thing in enumerate(synthetic.things):
        mask = synthetic.owners == index + 1
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        left, top = float(columns[0]), float(rows[0])
        annotations.append(
            {
                "id": image_id * 100 + index,
                "image_id": image_id,
                "category_id": thing[0].kind.category_id,
                "bbox": [left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top],
                "area": float(mask.sum()),
                "iscrowd": int(len(thing) > 1),
            }
        )
    return annotations


def split_of(number: int) -> str:
    """The folder of an image: every fifth belongs to the validation set, number 2 first."""
    return "val2017" if number % 5 == 2 else "train2017"


def _write_image(
    directory: Path, seed: int, kinds: tuple[Kind, ...], number: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    synthetic = make_image(seed, number, kinds)
    name = f"{number:012d}.jpg"
    synthetic.image.save(directory / split_of(number) / name, quality=synthetic.quality)
    width, height = synthetic.image.size
    entry = {"license": 1, "file_name": name, "height": height, "width": width, "id": number}
    return entry, annotate(synthetic, number)


def _write_set(
    directory: Path, num_images: int, seed: int, kinds: tuple[Kind, ...], on_progress: Callable[[int], object] | None
) -> None:
    splits: dict[str, dict[str, Any]] = {
        name: {
            "info": {"description": f"Textured figures, seed {seed}", "version": "1.0", "year": 2017},
            "licenses": [{"id": 1, "name": "CC0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
            "images": [],
            "annotations": [],
            "categories": [{"supercategory": "figure", "id": k.category_id, "name": k.name} for k in kinds],
        }
        for name in ("train2017", "val2017")
    }
    for name in (*splits, "annotations"):
        (directory / name).mkdir()
    # Threads suffice: NumPy and Pillow give up the interpreter's lock for most of the work.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        numbers = range(1, num_images + 1)
        written = pool.map(partial(_write_image, directory, seed, kinds), numbers)
        for number, (entry, annotations) in zip(numbers, written, strict=True):
            content = splits[split_of(number)]
            content["images"].append(entry)
            content["annotations"] += annotations
            if on_progress:
                on_progress(number)
    finally:
        pool.shutdown(cancel_futures=True)
    for name, content in splits.items():
        (directory / "annotations" / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def synthesize(
    directory: Path,
    *,
    num_images: int,
    seed: int,
    kinds: tuple[Kind, ...] = KINDS,
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Write a set of images in COCO's layout, a fifth of them for validation.

    directory: must not exist, or be empty; it appears only when the set is complete.
    num_images: at least 2. A larger set of the same seed begins with the same images in the same split.
    kinds: the classes.
    on_progress: called with the number of images done.
    Raises ValueError if an argument is out of range or directory holds something already, OSError if writing fails.
    """
    directory = directory.resolve()
    if num_images < 2:
        raise ValueError(f"num_images = {num_images}: expected at least 2, one to train on and one to validate on")
    if seed < 0:
        raise ValueError(f"seed = {seed}: expected 0 or more")
    if directory.is_mount() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory}: expected the name of a folder to make (not a file, not a mount point)")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: expected a new or an empty folder, nothing is overwritten")
    partial_set = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial_set.mkdir(parents=True)
    try:
        _write_set(partial_set, num_images, seed, kinds, on_progress)
        partial_set.rename(directory)
    except BaseException:
        shutil.rmtree(partial_set)
        raise

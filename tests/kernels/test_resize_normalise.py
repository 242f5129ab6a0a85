"""The network's input from decoded images: the plain version's pixels, Pillow's resize, whatever the threads."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from box_samples import seeded
from PIL import Image
from torch import Tensor

from kernels import reference, resize_normalise

SIZES_HW = [(480, 640), (300, 300), (17, 301), (1, 1), (1, 50), (90, 1), (299, 301), (640, 480)]
BOUNDS = {"low": torch.tensor([-2.0, -1.5, -1.0]), "high": torch.tensor([2.0, 1.0, 1.5])}


def images(sizes_hw: list[tuple[int, int]]) -> list[Tensor]:
    """Smooth colours with an edge, as photographs have."""
    made = []
    for height, width in sizes_hw:
        y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
        planes = [255 * x.expand(height, width), 255 * y.expand(height, width), 120 + 80 * torch.sin(9 * x + 5 * y)]
        image = torch.stack(planes, dim=-1)
        image[height // 3 : height // 2, width // 4 : width // 2] = 250
        made.append(image.round().clamp(0, 255).to(torch.uint8))
    return made


def matrices(count: int) -> Tensor:
    return torch.randn(count, 3, 4, generator=seeded(2)) * torch.tensor([0.01, 0.01, 0.01, 1.0])


def unchanged(count: int) -> dict[str, Tensor]:
    return {
        "matrices": torch.eye(3, 4).repeat(count, 1, 1),
        "mirrored": torch.zeros(count, dtype=torch.bool),
        "low": torch.zeros(3),
        "high": torch.full((3,), 255.0),
    }


@pytest.mark.parametrize("size", [1, 31, 300])
def test_pixels_are_those_of_the_plain_version(size: int) -> None:
    decoded, own = images(SIZES_HW), matrices(len(SIZES_HW))
    mirrored = torch.tensor([True, False] * 4)
    found = resize_normalise(decoded, size, matrices=own, mirrored=mirrored, **BOUNDS)
    exact = {name: bound.double() for name, bound in BOUNDS.items()}
    expected = reference.resize_normalise(decoded, size, matrices=own.double(), mirrored=mirrored, **exact)
    assert found.shape == (8, size, size, 3)
    assert found.is_contiguous()
    one_level = own[:, :, :3].abs().sum(dim=2)[:, None, None, :]  # rounding to 8 bits, once in each direction
    assert ((found - expected).abs() <= 1.01 * one_level + 1e-5).all()
    assert (found - expected).abs().mean() < 0.1 * one_level.mean()


def test_the_resize_is_pillows() -> None:
    decoded = images(SIZES_HW)
    found = resize_normalise(decoded, 300, **unchanged(len(decoded)))
    for image, levels in zip(decoded, found, strict=True):
        pillows = np.asarray(Image.fromarray(image.numpy()).resize((300, 300), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(levels.numpy() - pillows).max() <= 1


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    (image,) = images([(64, 64)])
    assert torch.equal(resize_normalise([image], 64, **unchanged(1))[0], image.float())


def test_mirroring_exchanges_left_and_right() -> None:
    decoded, options = images([(70, 50)] * 2), unchanged(2)
    options["mirrored"] = torch.tensor([False, True])
    straight, mirrored = resize_normalise(decoded, 33, **options)
    assert torch.equal(straight.flip(1), mirrored)


def test_the_number_of_threads_and_the_layout_do_not_matter(set_num_threads: Callable[[int], None]) -> None:
    decoded, options = images(SIZES_HW), unchanged(8) | {"matrices": matrices(8), **BOUNDS}
    set_num_threads(1)
    one = resize_normalise(decoded, 65, **options)
    set_num_threads(3)
    assert torch.equal(resize_normalise(decoded, 65, **options), one)
    views = [image.permute(2, 0, 1).contiguous().permute(1, 2, 0) for image in decoded]
    assert torch.equal(resize_normalise(views, 65, **options), one)
    alone = resize_normalise(decoded[2:3], 65, **options | {k: options[k][2:3] for k in ("matrices", "mirrored")})
    assert torch.equal(alone[0], one[2])


def test_schema_and_shape_are_those_of_the_operator() -> None:
    options = unchanged(3) | {"matrices": matrices(3), **BOUNDS}
    arguments = (images(SIZES_HW[:3]), 12, *(options[name] for name in ("matrices", "mirrored", "low", "high")))
    torch.library.opcheck(torch.ops.ssd_fast.resize_normalise.default, arguments)


def test_no_images_give_an_empty_batch() -> None:
    assert resize_normalise([], 8, **unchanged(0)).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [torch.zeros(4, 4, 3)]}, "images is torch.float32: expected uint8"),
        (
            {"images": [torch.zeros(4, 4, 1, dtype=torch.uint8)]},
            r"images has shape \[4, 4, 1\]: expected \[any, any, 3\]",
        ),
        ({"images": [torch.zeros(0, 4, 3, dtype=torch.uint8)]}, r"shape \[0, 4, 3\]: expected at least a pixel"),
        ({"size": 0}, "size = 0: expected at least 1"),
        ({"matrices": torch.zeros(2, 3, 4)}, r"matrices has shape \[2, 3, 4\]: expected \[1, 3, 4\]"),
        ({"matrices": torch.zeros(1, 3, 4).double()}, "matrices is torch.float64: expected float32"),
        ({"mirrored": torch.zeros(1)}, "mirrored is torch.float32: expected bool"),
        ({"mirrored": torch.zeros(3, dtype=torch.bool)}, r"mirrored has shape \[3\]: expected \[1\]"),
        ({"low": torch.zeros(1)}, r"low has shape \[1\]: expected \[3\]"),
        ({"high": torch.zeros(3).double()}, "high is torch.float64: expected float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"images": [torch.zeros(4, 4, 3, dtype=torch.uint8)], "size": 5, **unchanged(1)} | change
    with pytest.raises(ValueError, match=message):
        resize_normalise(**arguments)  # type: ignore[arg-type]

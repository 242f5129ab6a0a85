"""Detection on a user's images: which files are taken, how they are turned, and that none of theirs is replaced."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_weights, tiny_config

from ssd_fast.data.annotations import Category
from ssd_fast.data.images import find_images
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.predict import RESULTS, detect_files, load_image_detector
from ssd_fast.model.ssd import SSD

CLASSES = (Category(1, "disc"), Category(2, "bar"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of random weights."""
    config = tiny_config(("detection.score_threshold=0.0", "data.bad_images=skip"))
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("random") / "random.pt"
    save_weights(path, config, CLASSES, SSD(config.model, num_classes=len(CLASSES)))
    return path


def picture() -> Image.Image:
    colours = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((90, 60), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def with_segment(content: bytes, payload: bytes) -> bytes:
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + content[2:]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + b"\0\0\0\0"


def short(value: int) -> bytes:
    return struct.pack("<HH", value, 0)


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)
METADATA: dict[str, Callable[[int], bytes]] = {
    "EXIF": lambda turn: exif((0x0112, 3, 1, short(turn))),
    "EXIF beside an odd entry": lambda turn: exif((0x0100, 99, 7, b"\xff" * 4), (0x0112, 3, 1, short(turn))),
    "XMP alone": lambda turn: b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(turn).encode(),
}
IGNORED: dict[str, bytes] = {
    "byte": exif((0x0112, 1, 1, b"\6\0\0\0")),
    "text": exif((0x0112, 2, 4, b"top\0")),
    "nine": exif((0x0112, 3, 1, short(9))),
    "cut short": exif((0x0112, 3, 1, short(6)))[:20],
    "noise": b"Exif\0\0" + bytes(range(200)),
}


def test_turned_images_are_detected_on_and_drawn_as_viewers_show_them(checkpoint: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "upright.jpg"]
    paths[0].write_bytes(jpeg(picture()))
    turns = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}
    for turn, back in turns.items():
        for name, metadata in METADATA.items():
            paths.append(tmp_path / f"{turn} {name}.jpg")
            paths[-1].write_bytes(with_segment(jpeg(picture().transpose(back)), metadata(turn)))
    for name, payload in IGNORED.items():
        paths.append(tmp_path / f"{name}.jpg")
        paths[-1].write_bytes(with_segment(jpeg(picture()), payload))
    detect_files(checkpoint, paths, tmp_path / "out", drawn_score=1.0)
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert len(results) == len(paths)
    expected = results[0]["detections"]
    for result in results:
        assert (result["width"], result["height"]) == (90, 60)
        best = np.array([found["bbox"] for found in result["detections"][:5]])  # random weights: scores lie close
        assert (np.abs(best - expected[0]["bbox"]) < 2).all(axis=1).any(), result["file"]
        with Image.open(tmp_path / "out" / result["annotated"]) as copy:
            assert np.abs(np.asarray(copy, float) - np.asarray(picture(), float)).mean() < 6, result["file"]
    detector = load_image_detector(checkpoint, config=None, annotations=None, device="cpu")
    turned = paths[-len(IGNORED) - 1]
    by_path, by_image = detector([turned, Image.open(turned)])
    assert np.allclose(by_path.boxes_ltrb[0], by_image.boxes_ltrb[0], atol=2)


def test_files_of_the_user_are_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(jpeg(picture()))
    (folder / "a.jpg").write_bytes(b"not given")
    with pytest.raises(ValueError, match=r"--output .*a\.jpg exists and would be replaced"):
        detect_files(checkpoint, [folder / "a.png"], folder)
    (folder / "a.jpg").write_bytes(jpeg(picture()))
    with pytest.raises(ValueError, match=r"--output .*a\.jpg exists and would be replaced"):
        detect_files(checkpoint, [folder], folder)
    (folder / "a.jpg").unlink()
    other = tmp_path / "b.jpg"
    other.write_bytes(jpeg(picture()))
    (folder / RESULTS).write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match=r"detections\.json exists and would be replaced"):
        detect_files(checkpoint, [other], folder)
    (folder / RESULTS).unlink()
    (folder / "b.jpg").symlink_to(other)
    with pytest.raises(ValueError, match=r"b\.jpg exists and would be replaced"):
        detect_files(checkpoint, [other], folder)
    assert {path.name for path in folder.iterdir()} == {"a.png", "b.jpg"}
    assert other.read_bytes() == jpeg(picture())


def test_own_results_are_replaced_unless_they_are_given_as_images(checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(jpeg(picture()))
    output = tmp_path / "out"
    for _ in range(2):
        detect_files(checkpoint, [image], output)
    assert {path.name for path in output.iterdir()} == {"a.jpg", RESULTS}
    before = (output / "a.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"a\.jpg exists and would be replaced"):
        detect_files(checkpoint, [output], output)
    assert (output / "a.jpg").read_bytes() == before
    (output / RESULTS).unlink()  # as after a kill before it was written
    detect_files(checkpoint, [image], output)
    (output / "a.jpg").write_bytes(jpeg(picture()))  # by the user, under the name of a copy
    with pytest.raises(ValueError, match=r"a\.jpg exists and would be replaced"):
        detect_files(checkpoint, [image], output)
    assert (output / "a.jpg").read_bytes() == jpeg(picture())


def test_results_carry_the_names_that_were_given(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "f3a9c").write_bytes(jpeg(picture()))
    names = ["holiday.jpg", "x" * 250 + ".jpg", "Holiday.jpeg", "hol\udce9day.png"]
    for name in names:
        (tmp_path / name).symlink_to("store/f3a9c")
    detect_files(checkpoint, [tmp_path / name for name in names], tmp_path / "out")
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert [Path(result["file"]).name for result in results] == names
    copies = [result["annotated"] for result in results]
    assert [copies[0], copies[2], copies[3]] == ["holiday.jpg", "Holiday_2.jpg", "hol\udce9day.jpg"]
    assert copies[1].startswith("x" * 200)
    assert all((tmp_path / "out" / copy).is_file() for copy in copies)


def test_a_folder_gives_its_images_and_says_what_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jfif", "b.JPE", "c.Jpg", "._c.jpg", ".hidden.png", "d.webp", "e.heic", "f.txt"):
        (tmp_path / name).write_bytes(jpeg(picture()))
    (tmp_path / "g.jpg").mkdir()
    found = find_images([tmp_path], bad_images="error").images
    assert [Path(name).name for name in found.file_names] == ["a.jfif", "b.JPE", "c.Jpg"]
    assert "left out 2 files that are no JPEG or PNG: {'.webp': 1, '.heic': 1}" in caplog.text


def test_pixels_that_cannot_be_meant_are_refused_with_their_file(tmp_path: Path) -> None:
    cmyk = jpeg(picture().convert("CMYK"))
    start = cmyk.index(b"\xff\xee")
    length = int.from_bytes(cmyk[start + 2 : start + 4])
    thumbnail = jpeg(picture().resize((9, 6)))
    png = io.BytesIO()
    picture().save(png, "PNG")
    damaged = bytearray(png.getvalue())
    place = damaged.index(b"IDAT") + 20
    damaged[place : place + 40] = bytes(40)
    bad = {
        "damaged.png": (bytes(damaged), "cannot be decoded"),
        "cmyk.jpg": (cmyk[:start] + cmyk[start + 2 + length :], "CMYK image without Adobe's marker"),
        "cut.jpg": (with_segment(jpeg(picture()), exif() + thumbnail)[: len(thumbnail) + 1500], "cannot be decoded"),
        "cut.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "cannot be decoded|not an image"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: .*({message})"):
            find_images([tmp_path / name], bad_images="error")
    (tmp_path / "cmyk.jpg").write_bytes(cmyk)
    assert len(find_images([tmp_path / "cmyk.jpg"], bad_images="error").images.file_names) == 1


def test_the_recipe_says_how_large_an_image_may_be(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(picture()))
    find_images([path], bad_images="error", max_pixels=90 * 60)
    with pytest.raises(DataError, match=r"a\.jpg: .* 90 x 60 .*max_image_pixels = 5399"):
        find_images([path], bad_images="error", max_pixels=90 * 60 - 1)

"""The benchmark against torchvision: its peer does the same work as ours, and the command prints the ratios."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import REPOSITORY
from tiny import TINY, tiny_config
from torch import Tensor

import kernels
from dali_pipelines.batch import LabelledImages
from ssd_fast.config.recipe import dump_toml
from ssd_fast.data.coco import load_coco
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.loss import multibox_loss_mean
from ssd_fast.model.ssd import SSD

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import torchvision_peer
from torchvision_training import PeerBatch, PeerDataset, PeerTrainer, make_peer_loader

CPU = torch.device("cpu")
DEMO = str(REPOSITORY / "configs" / "demo.toml")
SIZE, NUM_CLASSES = 64, 3


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_peer(dtype: torch.dtype = torch.float32) -> tuple[PeerTrainer, SSD, Tensor]:
    config = tiny_config()
    torch.manual_seed(0)
    model = SSD(config.model, NUM_CLASSES)
    anchors_cxcywh = model_anchors(config.model)
    return PeerTrainer(model, config.optimizer, anchors_cxcywh, device=CPU, dtype=dtype), model, anchors_cxcywh


def make_batch(seed: int, boxes_per_image: tuple[int, ...]) -> PeerBatch:
    """Boxes in different quarters of the image, at least half as wide and high: anchors never overlap one equally."""
    generator = torch.Generator().manual_seed(seed)
    boxes_ltrb, labels = [], []
    for count in boxes_per_image:
        sides = 0.25 + 0.25 * torch.rand(count, 2, generator=generator)
        corners = 0.5 * torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])[:count]
        corners = corners + (0.5 - sides) * torch.rand(count, 2, generator=generator)
        boxes_ltrb.append(SIZE * torch.cat((corners, corners + sides), dim=1))
        labels.append(torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator))
    images = torch.randn(len(boxes_per_image), 3, SIZE, SIZE, generator=generator)
    return PeerBatch(images, boxes_ltrb, labels)


def labelled_images(directory: Path) -> LabelledImages:
    return load_coco(directory / "annotations" / "instances_train2017.json", directory / "train2017").images


@pytest.mark.parametrize("seed", range(4))
def test_loss_of_one_image_and_its_gradients_are_ours(seed: int) -> None:
    peer, model, anchors_cxcywh = make_peer()
    batch = make_batch(seed, (4,))
    peer_loss = peer.loss(batch)
    peer_loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    boxes_ltrb = batch.boxes_ltrb[0] / SIZE
    targets = kernels.encode_boxes(boxes_ltrb, batch.labels[0], torch.tensor([0, 4]), anchors_cxcywh)
    assert 4 <= int((targets.labels > 0).sum()) < len(anchors_cxcywh) / 4
    model.zero_grad()
    loss = multibox_loss_mean(model(batch.images), targets.deltas, targets.labels).total
    loss.backward()
    assert peer_loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert len(gradients) == len(list(model.parameters()))
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_loss_of_a_batch_is_divided_by_its_positives_together() -> None:
    peer, model, anchors_cxcywh = make_peer()
    batch = make_batch(7, (3, 0, 4))  # one of the images has lost its boxes
    offsets = torch.tensor([0, 3, 3, 7])
    targets = kernels.encode_boxes(torch.cat(batch.boxes_ltrb) / SIZE, torch.cat(batch.labels), offsets, anchors_cxcywh)
    predictions = model(batch.images)
    parts = kernels.multibox_loss(predictions.deltas, predictions.logits, targets.deltas, targets.labels)
    positives = (targets.labels > 0).sum(dim=1)
    expected = ((parts.box + parts.class_) * positives).sum() / positives.sum()
    assert peer.loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peer_learns_a_batch(dtype: torch.dtype) -> None:
    peer, model, _ = make_peer(dtype)
    batch = make_batch(0, (4,))
    before = peer.loss(batch).item()
    for _ in range(2):
        peer.train_step(batch, 0.005)
    assert peer.loss(batch).item() < 0.8 * before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dataset_gives_augmented_images_with_their_boxes(synthetic_set: Path) -> None:
    images = labelled_images(synthetic_set)
    torch.manual_seed(0)
    dataset = PeerDataset(images, tiny_config().augmentation, SIZE)
    assert len(dataset) == np.count_nonzero(np.diff(images.offsets))
    samples = [dataset[position] for position in range(len(dataset))]
    pixels = torch.stack([image for image, _, _ in samples])
    assert pixels.shape == (len(dataset), 3, SIZE, SIZE)
    assert pixels.dtype == torch.float32
    assert -2.2 < pixels.min() < -1  # (0 - 0.485) / 0.229 = -2.1 is the least
    assert 1 < pixels.max() < 2.7  # (1 - 0.406) / 0.225 = 2.6 the most
    boxes_ltrb = torch.cat([boxes for _, boxes, _ in samples])
    labels = torch.cat([labels for _, _, labels in samples])
    assert len(boxes_ltrb) == len(labels) > len(dataset)
    assert boxes_ltrb.min() >= 0
    assert boxes_ltrb.max() <= SIZE
    assert (boxes_ltrb[:, 2:] - boxes_ltrb[:, :2]).min() >= 1
    assert set(labels.tolist()) == set(range(1, int(images.labels.max()) + 1))


def test_boxes_follow_their_images(synthetic_set: Path) -> None:
    images = labelled_images(synthetic_set)
    still = [f"augmentation.{key}=[1.0, 1.0]" for key in ("brightness", "contrast", "saturation")]
    still += ["augmentation.hue_degrees=0.0", "augmentation.crop_min_ious=[]"]
    plain, flipped = (
        PeerDataset(images, tiny_config([*still, f"augmentation.flip_probability={chance}"]).augmentation, SIZE)[0]
        for chance in (0.0, 1.0)
    )
    torch.testing.assert_close(flipped[0].flip(-1), plain[0])
    first = int(np.flatnonzero(np.diff(images.offsets))[0])
    truths = slice(images.offsets[first], images.offsets[first + 1])
    height, width = images.sizes_hw[first]
    expected = torch.from_numpy(images.boxes_ltrb[truths] * SIZE / np.array([width, height, width, height]))
    left, top, right, bottom = expected.float().unbind(1)
    torch.testing.assert_close(plain[1], torch.stack((left, top, right, bottom), dim=1))
    torch.testing.assert_close(flipped[1], torch.stack((SIZE - right, top, SIZE - left, bottom), dim=1))
    assert plain[2].tolist() == flipped[2].tolist() == images.labels[truths].tolist()


def test_batches_go_on_beyond_an_epoch(synthetic_set: Path) -> None:
    images = labelled_images(synthetic_set)
    loader = make_peer_loader(PeerDataset(images, tiny_config().augmentation, SIZE), 48, 1, pin_memory=False)
    batches = iter(loader)
    for _ in range(2):
        batch = next(batches)
        assert batch.images.shape == (48, 3, SIZE, SIZE)
        assert len(batch.boxes_ltrb) == len(batch.labels) == 48


def burn(event: Event) -> None:
    event.set()
    while time.process_time() < 0.5:
        pass
    time.sleep(60)


def test_a_turn_begins_when_the_workers_have_nothing_left_to_do() -> None:
    used, burning = torchvision_peer.cpu_seconds(), multiprocessing.Event()
    worker = multiprocessing.Process(target=burn, args=(burning,), daemon=True)
    worker.start()
    try:
        burning.wait()
        torchvision_peer.wait_until_idle(CPU)
        assert torchvision_peer.cpu_seconds() - used >= 0.45
    finally:
        worker.kill()
        worker.join()


def test_a_row_of_high_rates_keeps_its_columns_apart() -> None:
    rates = {"ours": [98765.4321, 123456.7], "peer": [1234.5678, 999.99]}
    row = torchvision_peer.Row("input", 2, rates, 100.0, [80.0, 123.4])
    assert re.search(r"\) +\d+ \(\d+ - \d+\) +100.00", torchvision_peer.format_row(row))


def test_command_prints_three_ratios_and_writes_every_turn(synthetic_set: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "turns.json"
    command = [sys.executable, torchvision_peer.__file__, "--config", DEMO, "--data", synthetic_set]
    for override in (*TINY, "training.batch_size=2"):
        command += ["--set", override]
    command += ["--steps", "1", "--input-steps", "2", "--rounds", "1", "--json", json_file]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "float32; 2 images of 64 x 64" in result.stdout
    number = r"[\d.e+]+"
    cell = rf"({number}) \({number} - {number}\)"
    found = re.findall(rf"^(\w+ \w+) +{cell} +{cell} +{cell}$", result.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == ["input alone", "step alone", "both together"]
    rows = json.loads(json_file.read_text())["rows"]
    for (_, ours, peer, ratio), row in zip(found, rows, strict=True):
        assert float(ratio) == pytest.approx(float(ours) / float(peer), abs=0.01, rel=0.01)
        assert [len(rates) for rates in row["images_per_s"].values()] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, r"error: .*instances_train2017\.json: no such file: expected COCO instances"),
        (("--json", "nowhere/turns.json"), {}, r"error: --json nowhere/turns\.json: expected a file in a folder"),
        (("--set", "training.batch=2"), {}, r"error: .*demo\.toml: training\.batch = 2: unknown key"),
        ((), {"RANK": "0"}, r"error: started by a launcher.*: expected to be started alone"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["torchvision_peer.py", "--config", DEMO, "--data", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message) as exit_info:
        torchvision_peer.main()
    assert "\n" not in str(exit_info.value)
    assert capsys.readouterr().out == ""


def test_the_inference_benchmark_computes_the_same_with_every_network_and_prints_the_ratios(tmp_path: Path) -> None:
    import inference_peers

    config = tiny_config(["model.backbone_weights=none"])
    networks = inference_peers.make_networks(config, 2)
    expected, *others = (networks[name]() for name in networks)
    for name, found in zip([*networks][1:], others, strict=True):
        for index, right in enumerate(expected):
            values = torch.as_tensor(
                np.asarray(found[index].float() if torch.is_tensor(found[index]) else found[index])
            )
            rounding = 0.3 if "int8" in name else 0.05 if "bfloat16" in name else 1e-4
            assert (values - right).abs().max() < rounding * right.abs().max(), name
    (tmp_path / "tiny.toml").write_text(dump_toml(config))
    command = ["benchmarks/inference_peers.py", "--config", str(tmp_path / "tiny.toml"), "--rounds", "1"]
    result = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert all(
        re.search(rf"^{re.escape(name)} +[\d.]+ +[\d.]+ - [\d.]+ +[\d.]+$", result.stdout, re.M) for name in networks
    )

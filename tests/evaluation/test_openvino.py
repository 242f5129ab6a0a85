"""Networks that OpenVINO computes: equal to PyTorch's, in int8 nearly so, and never used where they are not."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY
from short_benchmark import load_set
from tiny import save_weights, tiny_config

import ssd_fast
from ssd_fast.config.recipe import load_config, override_config
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import Category
from ssd_fast.evaluation import openvino_network, quantize
from ssd_fast.evaluation.detector import load_detector, make_detector, make_random_detector
from ssd_fast.evaluation.evaluate import evaluate
from ssd_fast.evaluation.openvino_network import BackendError, Quantization
from ssd_fast.exit_status import NOT_REACHED
from ssd_fast.model.ssd import SSD, Predictions

pytest.importorskip("openvino")
assert sys.modules["openvino_telemetry"] is None, "OpenVINO was imported before it was told to keep its use to itself"
pytest.importorskip("nncf")

CPU = torch.device("cpu")
OPENVINO, INT8 = "inference.backend=openvino", "inference.precision=int8"
MANY = ("detection.score_threshold=0.2", "detection.max_detections=20")
COMMAND = [sys.executable, "-m", "ssd_fast"]


@pytest.fixture(scope="module")
def checkpoint(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which detect something."""
    config, categories = tiny_config(MANY), load_set(synthetic_set).categories
    path = tmp_path_factory.mktemp("openvino") / "random.pt"
    save_weights(path, config, categories, make_random_detector(config, categories, CPU).model)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, synthetic_set: Path) -> Path:
    """The checkpoint, with its network in int8 beside it."""
    made = quantize.quantize(checkpoint, synthetic_set, num_images=12)
    assert made.path == checkpoint.with_name("random.int8.zip")
    assert made.record.num_images == 12
    return checkpoint


def predictions(model: SSD, config: Config, images: torch.Tensor, *changes: str) -> Predictions:
    config = override_config(config, changes, source="test")
    detector = make_detector(model, config, load_categories(model), CPU)
    with torch.inference_mode():
        return detector.network(images)


def load_categories(model: SSD) -> tuple[Category, ...]:
    return tuple(Category(number, str(number)) for number in range(1, model.num_classes + 1))


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_predictions_are_those_of_pytorch(batch_size: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model = SSD(config.model, num_classes=7)
    images = torch.randn(batch_size, 3, 64, 64).to(memory_format=layout)
    expected = predictions(model, config, images)
    for found, right in zip(predictions(model, config, images, OPENVINO), expected, strict=True):
        assert found.shape == right.shape
        assert found.dtype == torch.float32
        assert relative_difference(found, right) < 1e-5


def test_in_bfloat16_they_are_as_near_as_pytorchs() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model = SSD(config.model, num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    exact = predictions(model, config, images)
    theirs = predictions(model, config, images, OPENVINO, "inference.precision=bf16")
    ours = predictions(model, config, images, "inference.precision=bf16")
    for right, found, reference in zip(exact, theirs, ours, strict=True):
        assert relative_difference(found, right) < max(2 * relative_difference(reference.float(), right), 0.02)


def test_detections_of_a_checkpoint_are_those_of_pytorch(checkpoint: Path, synthetic_set: Path) -> None:
    expected, found = evaluate(checkpoint, synthetic_set), evaluate(checkpoint, synthetic_set, overrides=[OPENVINO])
    assert expected
    assert found
    assert found.number_format == "float32 by OpenVINO"
    assert len(expected.table.scores) > 100
    assert (found.table.image_ids == expected.table.image_ids).mean() > 0.99
    assert sorted(found.table.scores) == pytest.approx(sorted(expected.table.scores), abs=1e-4)


def test_int8_serves_evaluation_images_and_loadgen(quantized: Path, synthetic_set: Path, tmp_path: Path) -> None:
    found = evaluate(quantized, synthetic_set, overrides=[OPENVINO, INT8])
    assert found
    assert found.number_format == "int8 by OpenVINO"
    assert len(found.table.scores) > 100
    photo = min((synthetic_set / "val2017").iterdir())
    exact = ssd_fast.load_detector(quantized, device="cpu")(photo)
    fast = ssd_fast.load_detector(quantized, overrides=[OPENVINO, INT8], device="cpu")(photo)
    assert fast.scores != pytest.approx(exact.scores, abs=1e-6), "int8 rounds"
    assert fast.scores == pytest.approx(exact.scores, abs=0.05)
    sets = [word for key in (OPENVINO, INT8, "benchmark.min_duration_s=0") for word in ("--set", key)]
    sets += ["--set", "benchmark.single_stream_min_queries=64", "--set", "benchmark.performance_samples=4"]
    command = ["benchmark", "--scenario", "SingleStream", "--checkpoint", str(quantized), "--data", str(synthetic_set)]
    ended = subprocess.run(
        [*COMMAND, *command, "--output", str(tmp_path / "logs"), *sets], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_quantizing_leaves_nothing_else(checkpoint: Path, synthetic_set: Path, tmp_path: Path) -> None:
    """The libraries would report their use to their maker, and keep an identity in the home directory for that."""
    own = tmp_path / "own.pt"
    own.write_bytes(checkpoint.read_bytes())
    home = tmp_path / "home"
    home.mkdir()
    ended = subprocess.run(
        [*COMMAND, "quantize", "--checkpoint", str(own), "--data", str(synthetic_set), "--images", "3"],
        capture_output=True,
        text=True,
        timeout=300,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": ""},
    )
    assert ended.returncode == 0, ended.stderr
    assert "of float32's" in ended.stdout
    assert list(home.rglob("*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "own.int8.zip", "own.pt"]


def test_a_signal_is_handled_after_a_network_is_gone() -> None:
    """OpenVINO's plugin leaves the stack for signals behind, unmapped."""
    code = """
import gc, os, signal, torch
from tiny import tiny_config
from ssd_fast.evaluation.openvino_network import OpenVINONetwork, convert, quantize_network
from ssd_fast.model.ssd import SSD
model, images = SSD(tiny_config().model, num_classes=2), torch.randn(1, 3, 64, 64)
networks = [OpenVINONetwork(convert(model), "fp32", 1)]
networks.append(OpenVINONetwork(quantize_network(convert(model), [images], 1), "int8", 1))
for network in networks:
    network(images)
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
while networks:
    del networks[0], network
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
    network = None
"""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'tests' / 'support'}:{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("handled") == 2


def test_a_network_that_loses_accuracy_is_not_kept(
    checkpoint: Path,
    synthetic_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own.pt"
    own.write_bytes(checkpoint.read_bytes())
    monkeypatch.setattr(
        quantize, "_map", lambda _detector, network, *_: 0.97 if "int8" in network.number_format else 1.0
    )
    from ssd_fast.__main__ import main

    arguments = ["quantize", "--checkpoint", str(own), "--data", str(synthetic_set), "--images", "2"]
    monkeypatch.setattr(sys, "argv", ["ssd-fast", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == NOT_REACHED
    assert "97.00% of float32's 1.0000: expected at least 99%; nothing was written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (("inference.precision=int8",), "precision = 'int8': expected backend = 'openvino'"),
            ((OPENVINO, "inference.precision=fp16"), "precision = 'fp16': expected backend = 'torch'"),
            (("inference.backend=tensorrt",), "backend = 'tensorrt': expected 'torch' or 'openvino'"),
        ],
    )
    def test_settings_that_contradict_each_other(self, changes: tuple[str, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_config(Path("demo"), changes)

    def test_a_gpu(self) -> None:
        config = tiny_config([OPENVINO])
        with pytest.raises(BackendError, match=r"computes on a CPU, not on cuda:0: expected 'torch'"):
            openvino_network.make_network(SSD(config.model, num_classes=2), config, torch.device("cuda", 0), None)

    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(openvino_network.importlib.util, "find_spec", lambda name: None)
        config = tiny_config([OPENVINO])
        with pytest.raises(BackendError, match=r"needs the package openvino: pip install 'ssd_fast\[openvino\]'"):
            openvino_network.make_network(SSD(config.model, num_classes=2), config, CPU, None)

    def test_random_weights_in_int8(self) -> None:
        with pytest.raises(BackendError, match="expected a checkpoint, not random weights"):
            make_random_detector(tiny_config([OPENVINO, INT8]), load_categories(SSD(tiny_config().model, 2)), CPU)

    def test_a_checkpoint_that_was_not_quantized(self, checkpoint: Path, tmp_path: Path) -> None:
        own = tmp_path / "own.pt"
        own.write_bytes(checkpoint.read_bytes())
        with pytest.raises(
            BackendError, match=r"own.int8.zip: expected the network in int8; ssd-fast quantize --checkp"
        ):
            load_detector(own, CPU, overrides=[OPENVINO, INT8])

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("other checkpoint", "was made from another checkpoint than"),
            ("not accurate", "has mAP 0.9700 in int8: expected at least 99% of float32's 1.0000"),
            ("no zip", "is no network in int8"),
            ("cut off", "is no network in int8"),
            ("no record", "is no network in int8"),
            ("no network", "does not read it"),
        ],
    )
    def test_a_file_that_does_not_fit(self, quantized: Path, tmp_path: Path, damage: str, message: str) -> None:
        own, path = tmp_path / "own.pt", tmp_path / "own.int8.zip"
        own.write_bytes(quantized.read_bytes())
        whole = openvino_network.quantized_path(quantized).read_bytes()
        path.write_bytes(whole)
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        record = Quantization(**json.loads(content["quantization.json"]))
        if damage == "other checkpoint":
            record = record._replace(checkpoint_sha256="0" * 64)
        elif damage == "not accurate":
            record = record._replace(map_float32=1.0, map_int8=0.97)
        elif damage == "no network":
            content["network.xml"] = b"<net>"
        content["quantization.json"] = json.dumps(record._asdict()).encode() if damage != "no record" else b"{}"
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in content.items():
                archive.writestr(name, part)
        if damage == "no zip":
            path.write_bytes(b"notes")
        elif damage == "cut off":
            path.write_bytes(whole[: len(whole) // 2])

        with pytest.raises(BackendError, match=message) as error:
            load_detector(own, CPU, overrides=[OPENVINO, INT8])
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(("content", "message"), [("a.jpg\n", "'a.jpg' is no image of"), ("\n", "is empty")])
    def test_a_list_of_other_images(
        self, checkpoint: Path, synthetic_set: Path, tmp_path: Path, content: str, message: str
    ) -> None:
        names = tmp_path / "list.txt"
        names.write_text(content)
        with pytest.raises(ValueError, match=f"{names}: {message}"):
            quantize.quantize(checkpoint, synthetic_set, image_list=names)

    def test_a_file_of_something_else_in_the_way(self, checkpoint: Path, synthetic_set: Path, tmp_path: Path) -> None:
        own, path = tmp_path / "own.pt", tmp_path / "own.int8.zip"
        own.write_bytes(checkpoint.read_bytes())
        path.write_bytes(b"notes")
        with pytest.raises(ValueError, match=r"own.int8.zip: exists, and is not such a file"):
            quantize.quantize(own, synthetic_set)
        assert path.read_bytes() == b"notes"

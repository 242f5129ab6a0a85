"""Weights from elsewhere: what fits is loaded as it was meant, what does not is named."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from repository import REPOSITORY
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ssd_fast.checkpoints.weights import (
    layout_of,
    load_backbone_weights,
    load_for_finetuning,
    load_weights,
    read_state_dict,
)
from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import ModelConfig
from ssd_fast.model.ssd import SSD

RECIPE = REPOSITORY / "configs" / "ssd300.toml"
CONFIG = ModelConfig(
    image_size=64,
    backbone="resnet18",
    backbone_weights="none",
    extra_channels=((16, 32), (8, 16)),
    extra_strides=(2, 2),
    extra_paddings=(1, 1),
    head_stride=1,
    anchor_steps=(8.0, 16.0, 32.0),
    anchor_scales=(8.0, 16.0, 32.0, 64.0),
    aspect_ratios=((2.0,), (2.0, 3.0), (2.0,)),
)
BOXES_PER_CELL = (4, 6, 4)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.rand(shape, generator=generator) - 0.4 for name, shape in shapes.items()}
    return {
        name: torch.tensor(7) if name.endswith("tracked") else tensor.abs() if name.endswith("var") else tensor
        for name, tensor in state.items()
    }


def reference_shapes(
    resnet: nn.Module, channels: list[int], narrow: list[int], boxes: tuple[int, ...], num_logits: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint in the layout of the MLPerf reference.

    There the backbone is the ResNet's children by number, the first six and the seventh apart.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (_, child) in enumerate(resnet.named_children()):
        prefix = {6: "model.layer2.0"}.get(number, f"model.layer1.{number}")
        if number < 7:
            shapes |= {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in child.state_dict().items()}
    for block, (inputs, middle, outputs) in enumerate(zip(channels[:-1], narrow, channels[1:], strict=True)):
        for place, shape in ((0, (middle, inputs, 1, 1)), (2, (outputs, middle, 3, 3))):
            shapes[f"additional_blocks.{block}.{place}.weight"] = shape
            shapes[f"additional_blocks.{block}.{place}.bias"] = shape[:1]
    for head, width in (("loc", 4), ("conf", num_logits)):
        for level, (inputs, count) in enumerate(zip(channels, boxes, strict=True)):
            shapes[f"{head}.{level}.weight"] = (count * width, inputs, 3, 3)
            shapes[f"{head}.{level}.bias"] = (count * width,)
    return shapes


def reference_state(num_classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    resnet = torchvision.models.resnet18(weights=None)
    return random_state(reference_shapes(resnet, [256, 32, 16], [16, 8], BOXES_PER_CELL, num_classes + 1), seed)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestReferenceLayout:
    def test_a_checkpoint_of_ssd300_is_read_completely(self) -> None:
        channels, narrow = [256, 512, 512, 256, 256, 256], [256, 256, 128, 128, 128]
        resnet = torchvision.models.resnet34(weights=None)
        shapes = reference_shapes(resnet, channels, narrow, (4, 6, 6, 6, 4, 4), 81)
        assert len(shapes) == 218
        state = random_state(shapes)
        model = SSD(load_config(RECIPE).model, num_classes=80)
        load_weights(model, {"model": state})
        found = model.state_dict()
        assert len(found) == 218
        assert torch.equal(found["backbone.conv1.weight"], state["model.layer1.0.weight"])
        assert torch.equal(found["backbone.layer3.5.bn2.running_var"], state["model.layer2.0.5.bn2.running_var"])
        assert torch.equal(found["extras.4.2.bias"], state["additional_blocks.4.2.bias"])

    def test_the_backbone_gets_the_tensors_of_the_same_torchvision_layers(self) -> None:
        resnet = torchvision.models.resnet18(weights=None)
        state, model = reference_state(), SSD(CONFIG, num_classes=3)
        load_weights(model, state)
        for number, (name, _) in enumerate(resnet.named_children()):
            theirs = {6: "model.layer2.0."}.get(number, f"model.layer1.{number}.")
            for key, tensor in state.items():
                if key.startswith(theirs):
                    assert torch.equal(model.state_dict()[f"backbone.{name}.{key.removeprefix(theirs)}"], tensor)

    def test_predictions_are_those_of_class_major_heads(self) -> None:
        state, model = reference_state(), SSD(CONFIG, num_classes=3).eval()
        load_weights(model, state)
        with torch.no_grad():
            predictions = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
            features = model.backbone(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
            first = 0
            for level, (grid_size, boxes) in enumerate(zip((8, 4, 2), BOXES_PER_CELL, strict=True)):
                for head, found in (("loc", predictions.deltas), ("conf", predictions.logits)):
                    output = conv2d(features, state[f"{head}.{level}.weight"], state[f"{head}.{level}.bias"], padding=1)
                    for anchor in range(grid_size * grid_size * boxes):
                        cell, box = divmod(anchor, boxes)
                        expected = output[0, box::boxes, cell // grid_size, cell % grid_size]
                        torch.testing.assert_close(found[0, first + anchor], expected, rtol=1e-5, atol=1e-5)
                first += grid_size * grid_size * boxes
                features = model.extras[level](features) if level < 2 else features

    @pytest.mark.parametrize("name", ["weights.pth", "weights.pytorch"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_files_with_and_without_wrapping_and_prefix_are_the_same(
        self, tmp_path: Path, name: str, prefix: str, wrapped: bool
    ) -> None:
        plain, other, state = SSD(CONFIG, num_classes=3), SSD(CONFIG, num_classes=3), reference_state()
        load_weights(plain, state)
        content = {prefix + key: tensor for key, tensor in state.items()}
        torch.save({"model": content, "epoch": 61} if wrapped else content, tmp_path / name)
        assert layout_of(tmp_path / name) == "reference"
        load_weights(other, tmp_path / name)
        assert equal(plain.state_dict(), other.state_dict())

    def test_missing_batch_counters_and_saved_default_boxes_do_not_matter(self) -> None:
        state, model = reference_state(), SSD(CONFIG, num_classes=3)
        old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        load_weights(model, old | {"dboxes_xywh": torch.zeros(1, 368, 4), "loss.dboxes": torch.zeros(4)})
        assert torch.equal(model.state_dict()["backbone.conv1.weight"], state["model.layer1.0.weight"])

    def test_half_precision_weights_become_float32(self) -> None:
        state, model = reference_state(), SSD(CONFIG, num_classes=3)
        load_weights(model, {k: v.half() if v.is_floating_point() else v for k, v in state.items()})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        expected = state["model.layer1.0.weight"].half().float()
        assert torch.equal(model.state_dict()["backbone.conv1.weight"], expected)

    def test_everything_that_does_not_fit_is_named_at_once_and_nothing_is_loaded(self) -> None:
        state, model = reference_state(), SSD(CONFIG, num_classes=3)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        del state["model.layer2.0.1.conv2.weight"], state["loc.2.bias"]
        state["conf.1.weight"] = torch.zeros(25, 32, 3, 3)
        state["model.layer1.0.weight"] = state["model.layer1.0.weight"].to(torch.int8)
        state["conf.3.bias"] = torch.zeros(16)
        state["mbox.weight"] = torch.zeros(2, 3)
        with pytest.raises(ValueError, match="6 entries") as error:
            load_weights(model, state)
        lines = sorted(line.strip() for line in str(error.value).splitlines()[1:])
        assert lines == [
            "conf.1.weight is float32 [25, 32, 3, 3]: expected float32 [24, 32, 3, 3]",
            "conf.3.bias is unexpected: float32 [16]",
            "loc.2.bias is missing: expected float32 [16]",
            "mbox.weight is unexpected: float32 [2, 3]",
            "model.layer1.0.weight is int8 [64, 3, 7, 7]: expected float32 [64, 3, 7, 7]",
            "model.layer2.0.1.conv2.weight is missing: expected float32 [256, 256, 3, 3]",
        ]
        assert equal(before, model.state_dict())


class TestLayouts:
    def test_either_layout_is_recognised_and_loaded(self) -> None:
        model, other = SSD(CONFIG, num_classes=3), SSD(CONFIG, num_classes=3)
        assert layout_of(reference_state()) == "reference"
        assert layout_of({"model": model.state_dict()}) == "ours"
        load_weights(model, reference_state())
        assert not equal(model.state_dict(), other.state_dict())
        load_weights(other, model.state_dict())
        assert equal(model.state_dict(), other.state_dict())

    def test_a_detector_of_other_classes_does_not_load(self) -> None:
        with pytest.raises(ValueError, match=r"class_heads.0.bias is float32 \[24\]: expected float32 \[16\]"):
            load_weights(SSD(CONFIG, num_classes=3), SSD(CONFIG, num_classes=5).state_dict())

    @pytest.mark.parametrize(
        "state", [{"fc.weight": torch.zeros(1)}, {"loc.0.bias": torch.zeros(1), "box_heads.0.bias": torch.zeros(1)}]
    )
    def test_neither_or_both_layouts_are_an_error(self, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="expected the state dict of this detector"):
            layout_of(state)

    @pytest.mark.parametrize(
        "content", [{}, [1, 2], {"epoch": 3}, {"weight": torch.zeros(1), "step": 3}, {3: torch.zeros(1)}]
    )
    def test_what_is_not_a_state_dict_is_refused(self, content: object, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "file.pt")) + ": expected a"):
            read_state_dict(tmp_path / "file.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_damaged_and_foreign_files_are_one_error_that_names_them(self, tmp_path: Path, zipped: bool) -> None:
        path = tmp_path / "weights.pt"
        state = {f"layer{n}.weight": torch.zeros(20) for n in range(20)}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        contents = [whole[:length] for length in range(0, len(whole) - 1, len(whole) // 40)]
        contents += [b"{}", b"\xff\xd8\xff\xe0 not weights", pickle.dumps({"a": 1}, protocol=2)]
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read_state_dict(path)

    def test_a_missing_file_and_a_folder_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing\.pt: cannot be read: No such file"):
            read_state_dict(tmp_path / "nothing.pt")
        with pytest.raises(ValueError, match="cannot be read: Is a directory"):
            read_state_dict(tmp_path)

    def test_what_is_neither_tensors_nor_a_module_is_not_unpickled(self, tmp_path: Path) -> None:
        torch.save({"model": {"weight": torch.zeros(1)}, "recipe": CONFIG}, tmp_path / "run.pytorch")
        with pytest.raises(ValueError, match=r"run\.pytorch: expected a file of torch.save that holds only tensors"):
            read_state_dict(tmp_path / "run.pytorch")


class TestFinetuning:
    def test_heads_of_other_classes_stay_fresh_and_are_named_and_all_else_is_loaded(self) -> None:
        source, model = SSD(CONFIG, num_classes=5), SSD(CONFIG, num_classes=3)
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert load_for_finetuning(model, source.state_dict()) == ["class_heads.0", "class_heads.1", "class_heads.2"]
        for name, tensor in model.state_dict().items():
            expected = fresh if name.startswith("class_heads") else source.state_dict()
            assert torch.equal(tensor, expected[name]), name

    def test_with_as_many_classes_every_head_is_loaded(self) -> None:
        source, model = SSD(CONFIG, num_classes=3), SSD(CONFIG, num_classes=3)
        assert load_for_finetuning(model, {"model": source.state_dict()}) == []
        assert equal(model.state_dict(), source.state_dict())

    def test_a_reference_checkpoint_is_a_source_too(self) -> None:
        strict, model = SSD(CONFIG, num_classes=8), SSD(CONFIG, num_classes=3)
        load_weights(strict, reference_state(num_classes=8))
        assert len(load_for_finetuning(model, reference_state(num_classes=8))) == 3
        for name in ("backbone.conv1.weight", "extras.1.2.bias", "box_heads.1.weight"):
            assert torch.equal(model.state_dict()[name], strict.state_dict()[name])

    def test_a_head_with_half_of_its_tensors_stays_fresh_whole(self) -> None:
        source, model = SSD(CONFIG, num_classes=3).state_dict(), SSD(CONFIG, num_classes=3)
        fresh = model.state_dict()["box_heads.1.weight"].clone()
        del source["box_heads.1.bias"]
        assert load_for_finetuning(model, source) == ["box_heads.1"]
        assert torch.equal(model.state_dict()["box_heads.1.weight"], fresh)

    def test_a_misfit_outside_the_heads_is_an_error(self) -> None:
        source = SSD(CONFIG.model_copy(update={"extra_channels": ((16, 32), (8, 24))}), num_classes=5)
        with pytest.raises(ValueError, match="2 entries") as error:
            load_for_finetuning(SSD(CONFIG, num_classes=3), source.state_dict())
        assert "extras.1.2.weight is float32 [24, 8, 3, 3]: expected float32 [16, 8, 3, 3]" in str(error.value)
        assert "heads" not in str(error.value)


@pytest.fixture
def empty_hub(tmp_path: Path) -> Iterator[Path]:
    """torch's download cache, empty and out of the way; yields the folder where it keeps weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


class TestBackbone:
    def test_a_local_torchvision_file_fills_the_backbone(self, tmp_path: Path) -> None:
        resnet, model = torchvision.models.resnet18(weights=None), SSD(CONFIG, num_classes=3)
        torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
        load_backbone_weights(model, str(tmp_path / "resnet18.pth"))
        own = model.backbone.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in resnet.state_dict().items() if name in own)
        assert set(resnet.state_dict()) - set(own) == {
            name for name in resnet.state_dict() if name.startswith(("layer4", "fc"))
        }

    def test_none_leaves_the_backbone_as_it_is(self) -> None:
        model = SSD(CONFIG, num_classes=3)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_backbone_weights(model, "none")
        assert equal(before, model.state_dict())

    def test_a_file_of_another_resnet_is_refused_with_names(self, tmp_path: Path) -> None:
        torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
        with pytest.raises(ValueError, match=r"resnet34.pth is not of a resnet18") as error:
            load_backbone_weights(SSD(CONFIG, num_classes=3), str(tmp_path / "resnet34.pth"))
        assert "layer3.5.conv1.weight is unexpected" in str(error.value)

    def test_imagenet_weights_come_from_the_cache_if_they_are_there(self, empty_hub: Path) -> None:
        resnet, model = torchvision.models.resnet18(weights=None), SSD(CONFIG, num_classes=3)
        empty_hub.mkdir(parents=True)
        url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
        torch.save(resnet.state_dict(), empty_hub / url.rpartition("/")[2])
        load_backbone_weights(model, "imagenet")
        assert torch.equal(model.state_dict()["backbone.conv1.weight"], resnet.conv1.weight)

    def test_without_network_the_error_names_address_file_and_alternatives(
        self, empty_hub: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_arguments: object, **_options: object) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr(torch.hub, "urlopen", unreachable)
        with pytest.raises(ValueError, match="cannot download") as error:
            load_backbone_weights(SSD(CONFIG, num_classes=3), "imagenet")
        for part in ("https://download.pytorch.org/models/resnet18-", str(empty_hub), "no route", '"none"', "its path"):
            assert part in str(error.value)
        assert not list(empty_hub.glob("resnet18*"))

    def test_a_download_with_another_hash_is_refused_and_not_kept(
        self, empty_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "wrong").write_bytes(b"something else")
        local = (tmp_path / "wrong").as_uri()
        urlopen = torch.hub.urlopen
        monkeypatch.setattr(torch.hub, "urlopen", lambda _request: urlopen(local))
        with pytest.raises(ValueError, match="invalid hash value"):
            load_backbone_weights(SSD(CONFIG, num_classes=3), "imagenet")
        assert list(empty_hub.iterdir()) == []

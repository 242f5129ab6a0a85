"""Weights from elsewhere: what fits is loaded as it was meant, what does not is named."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from reference_weights import BOXES_PER_CELL, CONFIG, equal, random_state, reference_shapes, reference_state
from repository import REPOSITORY
from torch import Tensor
from torch.nn.functional import conv2d

from ssd_fast.checkpoints.weights import (
    layout_of,
    load_backbone_weights,
    load_weights,
    read_state_dict,
)
from ssd_fast.config.recipe import load_config
from ssd_fast.model.ssd import SSD

RECIPE = REPOSITORY / "configs" / "ssd300.toml"


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

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"model": {"state_dict": state}, "epoch": 3},
            lambda state: {"ema": state},
            lambda state: {"n_averaged": torch.tensor(7)} | {f"module.{name}": state[name] for name in state},
            lambda state: {name.replace("model.", "model._orig_mod.", 1): state[name] for name in state},
            lambda state: {"net": {f"module._orig_mod.{name}": state[name] for name in state}},
        ],
    )
    def test_what_trainers_put_around_weights_does_not_matter(self, wrap: Callable[[dict], dict]) -> None:
        state = reference_state()
        assert read_state_dict(wrap(state)).keys() == state.keys()

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
        "content",
        [
            {},
            [1, 2],
            {"epoch": 3},
            {"weight": torch.zeros(1), "step": 3},
            {3: torch.zeros(1)},
            {"n_averaged": torch.tensor(7)},
            {"model": {"state_dict": {}}},
        ],
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
        with pytest.raises(OSError, match=r"cannot be read: No such file.*nothing\.pt"):
            read_state_dict(tmp_path / "nothing.pt")
        with pytest.raises(OSError, match="cannot be read: Is a directory"):
            read_state_dict(tmp_path)

    @pytest.mark.parametrize("message", ["Could not allocate bytes object!", "can't allocate memory: you tried to"])
    def test_a_refusal_of_memory_is_no_damage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
    ) -> None:
        torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError(message)  # as torch does, depending on what it was about to read

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(MemoryError, match=rf"weights\.pt: {message}"):
            read_state_dict(tmp_path / "weights.pt")

    def test_what_is_neither_tensors_nor_a_module_is_not_unpickled(self, tmp_path: Path) -> None:
        torch.save({"model": {"weight": torch.zeros(1)}, "recipe": CONFIG}, tmp_path / "run.pytorch")
        with pytest.raises(ValueError, match=r"run\.pytorch: expected a file of torch.save that holds only tensors"):
            read_state_dict(tmp_path / "run.pytorch")


class TestBackbone:
    @pytest.mark.parametrize("before", ["", "encoder.", "module.encoder_q.", "backbone._orig_mod."])
    def test_a_resnet_is_found_within_another_network(self, tmp_path: Path, before: str) -> None:
        resnet, model = torchvision.models.resnet18(weights=None), SSD(CONFIG, num_classes=3)
        state = {before + name: tensor for name, tensor in resnet.state_dict().items()}
        if before:
            state[f"{before.split('.')[0]}_head.weight"] = torch.zeros(3)
        torch.save({"state_dict": state}, tmp_path / "weights.pth")
        load_backbone_weights(model, str(tmp_path / "weights.pth"))
        for name, tensor in model.backbone.state_dict().items():
            assert torch.equal(tensor, resnet.state_dict()[name])

    def test_what_is_no_such_resnet_is_refused(self, tmp_path: Path) -> None:
        torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"(?s)weights\.pth is not of a resnet18: .*layer1\.2\..* is unexpected"):
            load_backbone_weights(SSD(CONFIG, num_classes=3), str(tmp_path / "weights.pth"))
        (tmp_path / "weights.safetensors").write_bytes(b"{}")
        with pytest.raises(ValueError, match=r"weights\.safetensors: expected a file of torch\.save"):
            load_backbone_weights(SSD(CONFIG, num_classes=3), str(tmp_path / "weights.safetensors"))

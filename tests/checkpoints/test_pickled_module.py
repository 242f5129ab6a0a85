"""Whole modules that were pickled: their weights are read, their code is not."""

import io
import os
import pickle
import sys
import tarfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssd_fast.checkpoints.pickled_module import read_pickled_module
from ssd_fast.checkpoints.weights import read_state_dict, read_torch_file


class Encoder:
    """A module with parameters, buffers and plain attributes."""

    def __init__(self) -> None:
        self.anchors = torch.rand(3, 4)


class Net(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.loc = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)])
        self.model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.weight = nn.Parameter(self.loc.state_dict()["0.weight"].double())
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.register_buffer("nothing", None)
        self.encoder = Encoder()
        vars(self).update(attributes)


class Called:
    """Unpickled by Python, calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def save(content: Any, path: Path, zipped: bool) -> Path:
    """torch.save from a program whose classes are not here: they were defined in a module that is gone."""
    gone = types.ModuleType("models.ssd_r34")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        for name in ("models", "models.ssd_r34"):
            patch.setitem(sys.modules, name, gone)
        for cls in (Encoder, Net):
            patch.setattr(cls, "__module__", "models.ssd_r34")
            setattr(gone, cls.__name__, cls)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
class TestPickledModule:
    def test_its_state_dict_is_read_without_its_classes(self, tmp_path: Path, zipped: bool) -> None:
        net = Net()
        expected = net.state_dict()
        state = read_pickled_module(save(net, tmp_path / "net.pytorch", zipped))
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype
            assert not state[name].requires_grad
        assert "models" not in sys.modules

    def test_the_loader_of_weights_takes_it_in_the_place_of_a_state_dict(self, tmp_path: Path, zipped: bool) -> None:
        net = Net()
        state = read_state_dict(save(nn.DataParallel(net), tmp_path / "net.pytorch", zipped))
        assert state.keys() == net.state_dict().keys()

    @pytest.mark.parametrize(
        ("function", "argument"), [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (os.mkdir, "{}")]
    )
    def test_what_it_names_is_not_called(
        self, tmp_path: Path, zipped: bool, function: Callable[[str], Any], argument: str
    ) -> None:
        trace = tmp_path / "trace"
        net = Net(called=Called(function, argument.format(trace)))
        state = read_torch_file(save(net, tmp_path / "net.pytorch", zipped))
        assert "model.0.running_mean" in state
        assert not trace.exists()

    @pytest.mark.parametrize("content", [Encoder(), [Net()], {"model": Net()}, Net(_modules={"model": Encoder()})])
    def test_what_is_no_module_is_refused(self, tmp_path: Path, zipped: bool, content: Any) -> None:
        path = save(content, tmp_path / "other.pytorch", zipped)
        with pytest.raises(pickle.UnpicklingError, match="no module: "):
            read_pickled_module(path)
        with pytest.raises(ValueError, match=r"other\.pytorch: expected a file of torch.save"):
            read_torch_file(path)

    def test_a_damaged_one_is_one_error_that_names_it(self, tmp_path: Path, zipped: bool) -> None:
        path = save(Net(), tmp_path / "net.pytorch", zipped)
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, len(whole) // 30):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"net\.pytorch: "):
                read_torch_file(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript is
def test_archives_of_other_kinds_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "script.pytorch"
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        read_pickled_module(path)
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"script\.pytorch: "):
        read_torch_file(path)

"""Reader of nn.Modules that were pickled whole, such as the weights that MLPerf Inference published."""

import collections
import io
import pickle
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _Placeholder:
    """A stand-in for any class or function that a file names: it takes all arguments and keeps attributes."""

    dump_patches = False  # torch reads this attribute of classes whose source code is in the file

    def __init__(self, *_: Any) -> None: ...


# Every global that a pickle names becomes one of these or a placeholder; torch itself finds the types of storages.
_TENSORS_AND_CONTAINERS = {
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,  # before torch 0.4
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _TENSORS_AND_CONTAINERS.get((module, name), _Placeholder)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = types.SimpleNamespace(__name__="pickle", Unpickler=_Unpickler, load=_load)


def read_pickled_module(path: Path) -> dict[str, Tensor]:
    """Return the state dict of an nn.Module that torch.save wrote to a file, on the CPU.

    No code runs that the file holds or names, and no module is imported for it.
    Raises pickle.UnpicklingError if the file holds something else; for damaged files, also the errors of torch.load.
    """
    content = io.BytesIO(path.read_bytes())  # torch.load opens tar archives, but not from memory
    try:
        if zipfile.is_zipfile(content) and any("constants.pkl" in name for name in zipfile.ZipFile(content).namelist()):
            raise pickle.UnpicklingError("a TorchScript archive")
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the placeholders have other source code than the classes
            module = torch.load(content, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except (zipfile.BadZipFile, MemoryError) as error:  # MemoryError: a damaged pickle asks for a huge buffer
        raise pickle.UnpicklingError(str(error)) from None
    return dict(_state(module, ""))


def _state(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of the module's state_dict(), in its order."""
    attributes = vars(module) if isinstance(module, _Placeholder) else {}
    if not {"_parameters", "_buffers", "_modules"} <= attributes.keys():
        raise pickle.UnpicklingError(f"no module: {prefix.rstrip('.') or type(module).__name__}")
    transient = attributes.get("_non_persistent_buffers_set", ())
    for name, tensor in (attributes["_parameters"] | attributes["_buffers"]).items():
        if tensor is not None and name not in transient:
            yield prefix + name, tensor.detach()
    for name, child in attributes["_modules"].items():
        if child is not None:
            yield from _state(child, f"{prefix}{name}.")

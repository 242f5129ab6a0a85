"""The weights of a module that was pickled whole, without its code: such is the published file of MLPerf Inference."""

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
    """Stands for any class or function that a file names: takes what it is given, keeps attributes, does nothing."""

    dump_patches = False  # torch asks this of classes whose source code was saved along

    def __init__(self, *_: Any) -> None: ...


# all that a pickle is made of is one of these, a placeholder, or a storage, for which torch finds the type itself
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
    """The state dict of the nn.Module that torch.save wrote to a file, on the CPU.

    No code in the file, and none that it names, runs; nothing is imported for it.
    Raises pickle.UnpicklingError if the file holds something else; of damaged files, whatever torch.load raises.
    """
    content = io.BytesIO(path.read_bytes())  # torch.load takes tar archives from the disk, but not from memory
    try:
        if zipfile.is_zipfile(content) and any("constants.pkl" in name for name in zipfile.ZipFile(content).namelist()):
            raise pickle.UnpicklingError("a TorchScript archive")
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a placeholder's source code is not that of the class
            module = torch.load(content, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except (zipfile.BadZipFile, MemoryError) as error:  # MemoryError: a number in a damaged pickle
        raise pickle.UnpicklingError(str(error)) from None
    return dict(_state(module, ""))


def _state(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What state_dict() of the module gives, in its order."""
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

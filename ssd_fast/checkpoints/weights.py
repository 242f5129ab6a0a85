"""Loading of weights into a network: own ones, those of the MLPerf reference, torchvision's backbones."""

import errno
import pickle
import re
import struct
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from ssd_fast.checkpoints.pickled_module import read_pickled_module
from ssd_fast.config.sections import ModelConfig
from ssd_fast.model.ssd import SSD

Source = Path | Mapping[str, Any]

# Own prefix: prefix of the MLPerf reference.
_REFERENCE_PREFIXES = {
    "backbone.conv1.": "model.layer1.0.",
    "backbone.bn1.": "model.layer1.1.",
    "backbone.layer1.": "model.layer1.4.",
    "backbone.layer2.": "model.layer1.5.",
    "backbone.layer3.": "model.layer2.0.",
    "extras.": "additional_blocks.",
    "box_heads.": "loc.",
    "class_heads.": "conf.",
}
# Keys under which programs save a state dict beside other things; of several, the first one here counts.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "weights", "net", "network", "module", "ema", "model_ema")
# Before all names: of DistributedDataParallel and AveragedModel, and of a network that is an attribute of another.
_WRAPPERS = ("module.", "model.", "net.", "network.")
_COMPILED = "_orig_mod."  # of torch.compile, before the names of each module that was compiled
_NUM_AVERAGED = "n_averaged"  # of AveragedModel, beside its network
_MOST_NESTED = 3  # dicts within dicts
_FIRST_BLOCK = "layer1.0.conv1.weight"  # of a ResNet
# Errors that torch.load was seen to raise for truncated files and for files with changed bytes.
_DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error)
_DAMAGE_NUMBERS = (errno.EIO, errno.EINVAL)  # of the disk; in the file, which names a place before its beginning
_NO_MEMORY = re.compile(r"(can't|not) allocate|allocation failed", re.IGNORECASE)  # in a RuntimeError
HEAD = re.compile(r"(?P<head>(box|class)_heads\.(?P<level>\d+))\.(weight|bias)")


def read_torch_file(path: Path) -> Any:
    """Return the content of a file of torch.save, on the CPU. Only tensors and plain containers are unpickled.

    For a whole nn.Module, return its state dict.
    Raises OSError that names the file if it cannot be read, ValueError if it is damaged or holds something else, and
    MemoryError.
    """
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: expected a file of torch.save: load it with safetensors.torch and save that")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno in _DAMAGE_NUMBERS:
            raise ValueError(f"{path}: damaged: {error.strerror}") from None
        raise OSError(error.errno, f"cannot be read: {error.strerror or error}", str(path)) from None
    except pickle.UnpicklingError as error:
        try:
            return read_pickled_module(path)
        except (pickle.UnpicklingError, *_DAMAGED) as other:
            _check_memory(path, other)
            raise ValueError(
                f"{path}: expected a file of torch.save that holds only tensors in plain containers, or a module; "
                f"torch says: {str(error).splitlines()[0]}"
            ) from None
    except _DAMAGED as error:
        _check_memory(path, error)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: damaged, or not a file of torch.save: {reason}") from None


def _check_memory(path: Path, error: Exception) -> None:
    """Raise MemoryError where that was the reason of an error in reading a file."""
    if _NO_MEMORY.search(str(error)):
        raise MemoryError(f"{path}: {str(error).splitlines()[0]}") from None


def read_state_dict(source: Source) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, without prefixes that wrappers put before all names.

    source: a file of torch.save, or its content: a state dict, or a dict that holds one under a usual key.
    Raises OSError for a file that cannot be read and ValueError for one that holds something else.
    """
    where = str(source) if isinstance(source, Path) else "state dict"
    state = read_torch_file(source) if isinstance(source, Path) else source
    for _ in range(_MOST_NESTED):
        if isinstance(state, Mapping):
            state = next((state[key] for key in _STATE_KEYS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state.keys() - {_NUM_AVERAGED}:
        keys = " or ".join(f'"{key}"' for key in _STATE_KEYS)
        raise ValueError(f"{where}: expected a state dict, or one under the key {keys}; found {_describe(state)}")
    foreign = [
        f"{name!r}: {_describe(value)}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if foreign:
        raise ValueError(f"{where}: expected a tensor under every name; found {', '.join(foreign[:5])}")
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items() if name != _NUM_AVERAGED}
    while prefix := next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def layout_of(source: Source) -> Literal["ours", "reference"]:
    """Return "ours" for a state dict with the names of `SSD`, "reference" for the names of the MLPerf reference.

    Raises ValueError if it has neither or both.
    """
    names = list(read_state_dict(source))
    ours = any(name.startswith(tuple(_REFERENCE_PREFIXES)) for name in names)
    reference = any(name.startswith(tuple(_REFERENCE_PREFIXES.values())) for name in names)
    if ours == reference:
        raise ValueError(
            "expected the state dict of this detector (names like 'backbone.conv1.weight') or of the MLPerf reference "
            f"('model.layer1.0.weight'); found the {'names of both' if ours else 'names ' + ', '.join(names[:3])}"
        )
    return "ours" if ours else "reference"


def load_weights(model: SSD, source: Source) -> None:
    """Fill the whole model from a state dict of this detector or of the MLPerf reference (at 300 or 1200 pixels).

    Default boxes in the file are ignored: anchors follow from the configuration.
    Raises ValueError that names every entry that is missing, unexpected, or of the wrong shape.
    """
    state = read_state_dict(source)
    is_reference = layout_of(state) == "reference"
    fill(model, _from_reference(model, state) if is_reference else state, reference_names=is_reference)


def load_backbone_weights(model: SSD, source: str) -> None:
    """Fill the backbone as the configuration's key model.backbone_weights says.

    source: "imagenet" for torchvision's IMAGENET1K_V1 weights, downloaded once into torch's cache; "none" to leave the
        backbone as it is; else the path of a state dict of the same torchvision ResNet, with or without layer4 and fc,
        or of a network that holds one.
    Raises ValueError if the file cannot be downloaded or read. Its message names every entry that does not fit.
    """
    if source == "none":
        return
    path = _imagenet_file(model.config.backbone) if source == "imagenet" else Path(source)
    state = read_state_dict(path)
    first = next((name for name in state if name.endswith(_FIRST_BLOCK)), _FIRST_BLOCK)
    prefix = first.removesuffix(_FIRST_BLOCK)  # of a backbone within a larger network
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        fill(model.backbone, {name: state[name] for name in state if not name.startswith(("layer4.", "fc."))})
    except ValueError as error:
        raise ValueError(f"{path} is not of a {model.config.backbone}: {error}") from None


def _imagenet_file(backbone: str) -> Path:
    url = get_model_weights(backbone)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.split("-")[-1], progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
        raise ValueError(
            f'model.backbone_weights = "imagenet": cannot download {url} to {path}: {error}. Without network: put that '
            'file there, or set model.backbone_weights to its path, or to "none"'
        ) from None
    return path


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, list(value)[:5])) or '(none)'}"
    return type(value).__name__


def _own_name(reference_name: str) -> str:
    for ours, theirs in _REFERENCE_PREFIXES.items():
        if reference_name.startswith(theirs):
            return ours + reference_name.removeprefix(theirs)
    return reference_name


def _reference_name(own_name: str) -> str:
    for ours, theirs in _REFERENCE_PREFIXES.items():
        if own_name.startswith(ours):
            return theirs + own_name.removeprefix(ours)
    return own_name


def own_layout(model: SSD, source: Source) -> dict[str, Tensor]:
    """Return a state dict under our names, also one of the MLPerf reference."""
    state = read_state_dict(source)
    return _from_reference(model, state) if layout_of(state) == "reference" else state


def class_count(model_config: ModelConfig, source: Source) -> int:
    """Return the number of classes of a state dict, without the background. Raises ValueError as layout_of does."""
    state = read_state_dict(source)
    bias = state.get("class_heads.0.bias" if layout_of(state) == "ours" else "conf.0.bias")
    return 0 if bias is None else len(bias) // model_config.anchors_per_cell()[0] - 1


def _from_reference(model: SSD, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference's tensors under our names, with box-major heads. Unknown names stay as they are.

    The reference's heads are class-major: channel = class x boxes per cell + box, and coordinates likewise.
    """
    converted = {}
    boxes_per_cell = dict(enumerate(model.config.anchors_per_cell()))
    for reference_name, tensor in state.items():
        if reference_name.rpartition(".")[2].startswith("dboxes"):
            continue
        name = _own_name(reference_name)
        match = HEAD.fullmatch(name)
        converted[name] = _box_major(tensor, boxes_per_cell.get(int(match["level"]), 1)) if match else tensor
    return converted


def _box_major(tensor: Tensor, boxes_per_cell: int) -> Tensor:
    """Reorder [values x boxes, ...] to [boxes x values, ...]. `fill` rejects sizes that do not divide."""
    if tensor.dim() == 0 or tensor.shape[0] % boxes_per_cell:
        return tensor
    return tensor.unflatten(0, (-1, boxes_per_cell)).transpose(0, 1).flatten(0, 1)


def fill(module: nn.Module, state: dict[str, Tensor], *, reference_names: bool = False) -> None:
    """Load all entries into a module, or none with a ValueError that names all entries that do not fit.

    num_batches_tracked may be missing: old versions of torch did not save it, and nothing here reads it.
    reference_names: name the entries as in the reference.
    """
    own = module.state_dict()
    shown = {name: _reference_name(name) if reference_names else name for name in own | state}
    problems = []
    for name, tensor in own.items():
        found = state.get(name)
        if found is None:
            if not name.endswith(".num_batches_tracked"):
                problems.append(f"{shown[name]} is missing: expected {_form(tensor)}")
        elif found.shape != tensor.shape or found.is_floating_point() != tensor.is_floating_point():
            problems.append(f"{shown[name]} is {_form(found)}: expected {_form(tensor)}")
    problems += [f"{shown[name]} is unexpected: {_form(state[name])}" for name in state if name not in own]
    if problems:
        raise ValueError(f"{len(problems)} entries of the state dict do not fit:\n  " + "\n  ".join(problems))
    module.load_state_dict(state, strict=False)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

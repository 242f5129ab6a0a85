"""A counter of the calls that pass PyTorch's dispatcher: their memory traffic, and the values that the host reads."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PACKAGES = Path(torch.__file__).parent.parent  # installed code, torch's and others'
_HOME = Path(__file__).parents[2]
_WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}  # with any arguments
_UNWRITTEN = ("aten::empty", "aten::new_empty")


class CallCounter(TorchDispatchMode):
    """Counts calls while it is entered.

    num_bytes: arguments and results of the operators, each tensor once per call; views are free.
    host_reads: calls that read a value of a tensor (item, bool, nonzero, a blocking copy to the host), by their line in
    the code, "file:line". On a CPU such a read costs nothing; on a GPU the host would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func in _WAITING or _leaves_device(given, made, kwargs or {}):
            self.host_reads[_calling_line()] += 1
        elif not func.is_view:
            self.num_bytes += sum(tensor.nbytes for tensor in given)
            if not func.name().startswith(_UNWRITTEN):
                self.num_bytes += sum(tensor.nbytes for tensor in made)
        return result


def _leaves_device(given: list[Tensor], made: list[Tensor], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("non_blocking"):
        return False
    return any(tensor.is_cuda for tensor in given) and any(not tensor.is_cuda for tensor in made)


def _calling_line() -> str:
    """The innermost line that is neither in installed code nor in this file."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _PACKAGES not in path.parents and path != Path(__file__) and path.suffix == ".py":
            name = path.relative_to(_HOME) if _HOME in path.parents else path
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "code outside Python"

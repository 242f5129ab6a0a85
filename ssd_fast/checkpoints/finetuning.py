"""Fine-tuning: a detector's weights in a network of other classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_fast.checkpoints.checkpoint import is_checkpoint
from ssd_fast.checkpoints.weights import HEAD, fill, layout_of, own_layout, read_torch_file
from ssd_fast.data.coco_classes import COCO_CATEGORIES
from ssd_fast.model.ssd import SSD


class Adapted(NamedTuple):
    """What became of a detector's classes and heads.

    kept: classes whose weights were taken over. new: classes that begin anew. dropped: classes that are not wanted.
    fresh_heads: heads that begin anew, because theirs have another form.
    by_position: the file has no names, and classes were taken over in their order.
    """

    kept: list[str]
    new: list[str]
    dropped: list[str]
    fresh_heads: list[str]
    by_position: bool = False

    def describe(self) -> str:
        """One line for the log."""
        how = "kept in their order, for the file has no names" if self.by_position else "kept by name"
        parts = [f"classes {how}: {_listed(self.kept)}"]
        if self.new:
            parts.append(f"begun anew: {_listed(self.new)}")
        if self.dropped:
            parts.append(f"not used: {_listed(self.dropped)}")
        if self.fresh_heads:
            parts.append(f"heads initialised anew: {self.fresh_heads}")
        return "; ".join(parts)


def load_for_finetuning(model: SSD, source: Path | Any, classes: Sequence[str]) -> Adapted:
    """Fill a freshly initialised model from a detector of any classes.

    source: a checkpoint of this program, weights of this detector or of the MLPerf reference; a file or its content.
    classes: names of the model's classes, in label order.
    The class heads take the rows of the classes that both have, and the background's; a head (such as "class_heads.0")
    is left as it is, weight and bias, if one of the two is missing or of another form. Weights without names are
    COCO's if they have 80 classes; else their classes are taken in their order if there are as many.
    Raises ValueError that names every other entry that is missing, unexpected, or of the wrong shape.
    """
    content = read_torch_file(source) if isinstance(source, Path) else source
    state = own_layout(model, content)
    anchors = model.config.anchors_per_cell()
    own = model.state_dict()
    bias = state.get("class_heads.0.bias")
    count = 0 if bias is None else len(bias) // anchors[0] - 1
    known, by_position = _class_names(content, count, classes)
    rows = {name: row for row, name in enumerate(known, 1)}
    pairs = [(0, 0), *((new, rows[name]) for new, name in enumerate(classes, 1) if name in rows)]
    new_rows, old_rows = (torch.tensor(column) for column in zip(*pairs, strict=True))

    heads: dict[str, dict[str, Tensor | None]] = {}
    for name, tensor in own.items():
        if match := HEAD.fullmatch(name):
            adapted = state.get(name)
            if adapted is not None and match["head"].startswith("class") and known:
                sizes = anchors[int(match["level"])], len(known) + 1
                adapted = _with_rows(tensor, adapted, sizes, new_rows, old_rows)
            is_alike = adapted is not None and adapted.shape == tensor.shape
            heads.setdefault(match["head"], {})[name] = adapted if is_alike else None
    fresh = [head for head, tensors in heads.items() if None in tensors.values()]
    for head, tensors in heads.items():
        state |= {name: own[name] if head in fresh else tensor for name, tensor in tensors.items()}  # type: ignore[misc]
    fill(model, state, reference_names=layout_of(content) == "reference")
    has_rows = not all(head in fresh for head in heads if head.startswith("class"))
    kept = [name for name in classes if name in rows] if has_rows else []
    return Adapted(
        kept=kept,
        new=[name for name in classes if name not in kept],
        dropped=[name for name in known if name not in classes],
        fresh_heads=[name for name, _ in model.named_modules() if name in fresh],
        by_position=by_position,
    )


def _class_names(content: Any, count: int, classes: Sequence[str]) -> tuple[list[str], bool]:
    """The names of a file's classes, as far as they can be known, and whether they are just the wanted ones."""
    if is_checkpoint(content) and "categories" in content:
        return [category["name"] for category in content["categories"]], False
    if count == len(COCO_CATEGORIES):
        return [category.name for category in COCO_CATEGORIES], False
    return (list(classes), True) if count == len(classes) else ([], False)


def _with_rows(
    fresh: Tensor, found: Tensor, sizes: tuple[int, int], new_rows: Tensor, old_rows: Tensor
) -> Tensor | None:
    """A fresh head [boxes x classes, ...] with rows of a found one, or None where that has another form."""
    if found.dim() != fresh.dim() or found.shape[1:] != fresh.shape[1:] or found.shape[0] != sizes[0] * sizes[1]:
        return None
    adapted = fresh.clone().unflatten(0, (sizes[0], -1))
    adapted[:, new_rows] = found.unflatten(0, sizes)[:, old_rows].to(fresh.dtype)
    return adapted.flatten(0, 1)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return (f"{shown}, … ({len(names)})" if len(names) > 20 else shown) or "none"

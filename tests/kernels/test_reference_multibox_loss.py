"""The plain loss against a loop over Python numbers, and rule by rule."""

import math

import pytest
import torch
from box_samples import FLOAT64, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import multibox_loss


def loss_input(
    labels: list[list[int]], num_classes: int = 4, seed: int = 0, dtype: torch.dtype = FLOAT64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    target_labels = torch.tensor(labels, dtype=torch.int32)
    batch_size, num_anchors = target_labels.shape
    deltas, targets = (torch.randn(2, batch_size, num_anchors, 4, generator=generator, dtype=FLOAT64) * 1.5).to(dtype)
    logits = torch.randn(batch_size, num_anchors, num_classes, generator=generator, dtype=FLOAT64).to(dtype)
    return deltas, logits, targets, target_labels


def loop_loss(deltas: Tensor, logits: Tensor, targets: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    box_losses, class_losses = [], []
    for d_image, l_image, t_image, labels_image in zip(
        *(x.tolist() for x in (deltas, logits, targets, labels)), strict=True
    ):
        box = 0.0
        chosen: list[float] = []
        negatives: list[float] = []
        for delta, logit, target, label in zip(d_image, l_image, t_image, labels_image, strict=True):
            cross_entropy = math.log(sum(math.exp(x) for x in logit)) - logit[label]
            (chosen if label else negatives).append(cross_entropy)
            if label:
                errors = [abs(x - y) for x, y in zip(delta, target, strict=True)]
                box += sum(e * e / 2 if e < 1 else e - 0.5 for e in errors)
        positives = len(chosen)
        chosen += sorted(negatives, reverse=True)[: 3 * positives]
        box_losses.append(box / positives if positives else 0.0)
        class_losses.append(sum(chosen) / positives if positives else 0.0)
    return box_losses, class_losses


@settings(deadline=None)
@given(
    st.integers(1, 14).flatmap(
        lambda anchors: st.lists(
            st.lists(st.integers(-6, 3), min_size=anchors, max_size=anchors), min_size=1, max_size=4
        )
    ),
    st.integers(0, 10**6),
)
def test_loss_equals_a_loop_over_anchors(labels: list[list[int]], seed: int) -> None:
    values = loss_input([[max(label, 0) for label in row] for row in labels], seed=seed)  # mostly background
    parts, (box, class_) = multibox_loss(*values), loop_loss(*values)
    assert parts.box.tolist() == pytest.approx(box)
    assert parts.class_.tolist() == pytest.approx(class_)


def test_gradients_are_those_of_finite_differences() -> None:
    deltas, logits, targets, labels = loss_input([[1, 0, 0, 3, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0, 0, 0]])

    def loss(deltas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return multibox_loss(deltas, logits, targets, labels)

    assert torch.autograd.gradcheck(loss, (deltas.requires_grad_(), logits.requires_grad_()))


def test_an_image_without_positives_has_no_loss_and_no_gradient() -> None:
    deltas, logits, targets, labels = loss_input([[0] * 8, [0, 2, 0, 0, 0, 0, 0, 0]])
    parts = multibox_loss(deltas.requires_grad_(), logits.requires_grad_(), targets, labels)
    (parts.box.sum() + parts.class_.sum()).backward()
    assert parts.box[0] == parts.class_[0] == 0
    for gradient in (deltas.grad, logits.grad):
        assert gradient is not None
        assert gradient[0].eq(0).all()
        assert gradient[1].any()


def test_where_negatives_run_out_every_anchor_counts_once() -> None:
    deltas, logits, targets, labels = loss_input([[1, 2, 3, 0, 0]])
    every = torch.nn.functional.cross_entropy(logits[0], labels[0].long(), reduction="sum")
    assert multibox_loss(deltas, logits, targets, labels).class_[0] == pytest.approx(every.item() / 3)


def test_only_positives_and_the_hardest_negatives_have_gradients() -> None:
    deltas, logits, targets, labels = loss_input([[0, 0, 1, 0, 0, 0, 0]], num_classes=2)
    difficulty = [5.0, -1.0, 0.0, 3.0, 4.0, 2.0, -2.0]  # logit of class 1 over background
    logits = torch.stack((torch.zeros(7), torch.tensor(difficulty)), dim=-1)[None].double().requires_grad_()
    parts = multibox_loss(deltas.requires_grad_(), logits, targets, labels)
    (parts.box + parts.class_).sum().backward()
    assert logits.grad is not None
    assert deltas.grad is not None
    assert logits.grad[0].ne(0).any(dim=1).tolist() == [True, False, True, True, True, False, False]
    assert deltas.grad[0].ne(0).any(dim=1).tolist() == [False, False, True, False, False, False, False]


def test_equally_hard_negatives_are_taken_in_the_order_of_their_index() -> None:
    deltas, _, targets, labels = loss_input([[0, 0, 0, 0, 0, 0, 1, 0, 0]])
    logits = torch.zeros(1, 9, 4, dtype=FLOAT64, requires_grad=True)
    multibox_loss(deltas, logits, targets, labels).class_.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].ne(0).any(dim=1).nonzero().flatten().tolist() == [0, 1, 2, 6]


def test_what_is_predicted_and_targeted_for_background_boxes_does_not_matter() -> None:
    deltas, logits, targets, labels = loss_input([[0, 1, 0, 2]])
    other, other_targets = deltas.clone(), targets.clone()
    other[labels == 0] += 9
    other_targets[labels == 0] -= 7
    assert torch.equal(
        multibox_loss(deltas, logits, targets, labels).box, multibox_loss(other, logits, other_targets, labels).box
    )


def test_float32_agrees_with_float64() -> None:
    generator = seeded(1)
    labels = (torch.randint(0, 20, (3, 400), generator=generator) - 16).clamp(min=0).tolist()
    values = loss_input(labels, num_classes=21)
    double = multibox_loss(*values)
    single = multibox_loss(*(x.float() if x.is_floating_point() else x for x in values))
    assert single.box.dtype == single.class_.dtype == torch.float32
    torch.testing.assert_close(single.box.double(), double.box, rtol=1e-6, atol=0)
    torch.testing.assert_close(single.class_.double(), double.class_, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_predictions_are_computed_in_float32(dtype: torch.dtype) -> None:
    deltas, logits, targets, labels = loss_input([[0, 1, 0, 2, 0, 0, 0, 0, 0, 0]], dtype=dtype)
    parts = multibox_loss(deltas, logits, targets.float(), labels)
    expected = multibox_loss(deltas.float(), logits.float(), targets.float(), labels)
    assert parts.box.dtype == parts.class_.dtype == torch.float32
    assert torch.equal(parts.box, expected.box)
    assert torch.equal(parts.class_, expected.class_)


def test_non_contiguous_input_gives_the_same() -> None:
    values = loss_input([[0, 1, 0, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]])
    odd = multibox_loss(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in values))
    for part, expected in zip(odd, multibox_loss(*values), strict=True):
        torch.testing.assert_close(part, expected)


def test_an_empty_batch_has_an_empty_loss() -> None:
    parts = multibox_loss(
        torch.zeros(0, 5, 4), torch.zeros(0, 5, 3), torch.zeros(0, 5, 4), torch.zeros(0, 5, dtype=torch.int32)
    )
    assert parts.box.shape == parts.class_.shape == (0,)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (0, "deltas", torch.zeros(2, 5, 3)),
        (0, "deltas", torch.zeros(2, 5, 4, dtype=torch.int32)),
        (1, "logits", torch.zeros(2, 6, 3)),
        (1, "logits", torch.zeros(2, 5, 1)),
        (1, "logits", torch.zeros(2, 5, 3, device="meta")),
        (2, "target_deltas", torch.zeros(2, 4, 5)),
        (3, "target_labels", torch.zeros(2, 5)),
        (3, "target_labels", torch.zeros(2, 5, 1, dtype=torch.int32)),
        (3, "target_labels", torch.zeros(2, 5, dtype=torch.bool)),
    ],
)
def test_bad_input_is_named(place: int, name: str, value: Tensor) -> None:
    values = [
        torch.zeros(2, 5, 4),
        torch.zeros(2, 5, 3),
        torch.zeros(2, 5, 4),
        torch.zeros(2, 5, dtype=torch.int32),
    ]
    values[place] = value
    with pytest.raises(ValueError, match=rf"^{name} (is|has) "):
        multibox_loss(*values)

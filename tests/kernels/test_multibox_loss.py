"""The compiled loss and its gradient against the plain version in float64, on every device at hand."""

import pytest
import torch
from box_samples import seeded
from operator_samples import (
    FLOATS,
    INF,
    NAN,
    LossInput,
    assert_loss_equals_plain,
    assert_same_bits,
    loss_input,
    loss_of_labels,
    run_loss,
    strided,
)
from torch import Tensor

from kernels import multibox_loss


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(2, 8_732, 81), (1, 15_130, 81), (1, 100_000, 3), (2, 130, 1_000), (3, 37, 5), (2, 1, 2), (1, 257, 91)],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_plain_version(
    device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    found = assert_loss_equals_plain(device, loss_input(*sizes, dtype, positive_share=0.02 + 2 / sizes[1]))
    assert sizes[1] == 1 or (found.box > 0).all()


def test_gradients_are_those_of_finite_differences(device: torch.device) -> None:
    values = loss_of_labels([[1, 0, 0, 3, 0, 0, 0, 0, 0, 0], [0, 2, *[0] * 8], [0] * 10], dtype=torch.float64)
    deltas, logits, *targets = values.to(device)
    assert torch.autograd.gradcheck(
        lambda *predictions: tuple(multibox_loss(*predictions, *targets)),
        (deltas.requires_grad_(), logits.requires_grad_()),
    )


@pytest.mark.parametrize("part", ["box", "class_"])
def test_each_part_has_the_gradient_of_its_own_prediction_alone(device: torch.device, part: str) -> None:
    values = loss_input(2, 50, 4, positive_share=0.2).to(device)
    deltas, logits = (x.clone().requires_grad_() for x in values[:2])
    getattr(multibox_loss(deltas, logits, *values[2:]), part).sum().backward()
    grads = {"box": deltas.grad, "class_": logits.grad}
    own = grads.pop(part)
    assert own is not None
    assert own.any()
    (other,) = grads.values()
    assert other is None or not other.any()


def test_a_frozen_prediction_gets_no_gradient_and_leaves_the_other_as_it_is(device: torch.device) -> None:
    values = loss_input(2, 50, 4, positive_share=0.2).to(device)
    both = run_loss(multibox_loss, values, *torch.ones(2, 2))
    logits = values.logits.clone().requires_grad_()
    parts = multibox_loss(values.deltas, logits, *values[2:])
    (parts.box.sum() + parts.class_.sum()).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, both.grad_logits)


def test_a_second_derivative_is_an_error(device: torch.device) -> None:
    values = loss_input(1, 20, 3, torch.float64, positive_share=0.3).to(device)
    logits = values.logits.clone().requires_grad_()
    loss = multibox_loss(values.deltas, logits, *values[2:]).class_.sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), logits)


def test_an_image_without_positives_has_no_loss_and_no_gradient(device: torch.device) -> None:
    found = assert_loss_equals_plain(device, loss_of_labels([[0] * 8, [0, 2, 0, 0, 0, 0, 0, 0]]))
    for result in found:
        assert result[0].eq(0).all()
        assert result[1].ne(0).any()


@pytest.mark.parametrize("positive_share", [0.4, 0.9, 1.0])
def test_where_negatives_run_out_every_anchor_counts_once(device: torch.device, positive_share: float) -> None:
    found = assert_loss_equals_plain(device, loss_input(3, 200, 6, positive_share=positive_share))
    assert found.grad_logits.ne(0).any(dim=-1).all()


@pytest.mark.parametrize("num_anchors", [9, 8_732])
@pytest.mark.parametrize("levels", [1, 3])
def test_equally_hard_negatives_are_taken_in_the_order_of_their_index(
    device: torch.device, num_anchors: int, levels: int
) -> None:
    deltas, _, target_deltas, labels = loss_input(2, num_anchors, 2)
    labels[:, num_anchors // 2] = 1
    hardness = torch.randint(0, levels, labels.shape, generator=seeded(2)).float()
    logits = torch.stack((torch.zeros_like(hardness), hardness), dim=-1)
    assert_loss_equals_plain(device, LossInput(deltas, logits, target_deltas, labels))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_logits_overflow_nowhere(device: torch.device, dtype: torch.dtype) -> None:
    deltas, logits, *targets = loss_input(2, 60, 7, dtype, positive_share=0.1)
    found = assert_loss_equals_plain(device, LossInput(deltas, (logits * 5_000).clamp(-6e4, 6e4), *targets))
    assert all(result.isfinite().all() for result in found)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["positive", "background"])
@pytest.mark.parametrize("name", ["deltas", "logits"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_reaches_loss_and_gradient_as_in_the_plain_version(
    device: torch.device, name: str, place: str, value: float, dtype: torch.dtype
) -> None:
    values = loss_of_labels([[0, 2, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10, [1] + [0] * 9], dtype=dtype)
    tensor, anchor = getattr(values, name), 1 if place == "positive" else 5
    tensor[:2, anchor, 2] = value
    found = assert_loss_equals_plain(device, values)
    assert all(result[1].eq(0).all() for result in found)  # no positives: nothing counts
    assert all(result[2].isfinite().all() for result in found)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_upstream_gradient_that_is_not_finite_reaches_every_row_that_counts(
    device: torch.device, value: float, dtype: torch.dtype
) -> None:
    values = loss_input(3, 70, 5, dtype, positive_share=0.05, seed=3)
    upstream = torch.tensor([value, 1.0, 1.0])
    for grad_box, grad_class in ((upstream, None), (None, upstream), (upstream, upstream)):
        found = assert_loss_equals_plain(device, values, grad_box, grad_class)
        grads = [found.grad_deltas] * (grad_box is not None) + [found.grad_logits] * (grad_class is not None)
        assert not any(grad[0].isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("label", "dtype"),
    [(label, dtype) for label in (-1, 4, 5, 2**31 - 1, -(2**31)) for dtype in (torch.int32, torch.int64)]
    + [(label, torch.int64) for label in (2**31, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -(2**63))],
    ids=str,
)
@pytest.mark.parametrize("has_positive", [True, False])
def test_a_label_out_of_range_makes_the_loss_of_its_image_nan(
    device: torch.device, label: int, dtype: torch.dtype, *, has_positive: bool
) -> None:
    good = loss_of_labels([[0, 2 * has_positive, 0, 0, 0, 0, 0], [1, 0, 0, 0, 3, 0, 0]])
    labels = good.target_labels.to(dtype)
    labels[0, 3] = label
    bad = good._replace(target_labels=labels)
    found, expected = (run_loss(multibox_loss, x.to(device), *torch.ones(2, 2)) for x in (bad, good))
    assert found.class_[0].isnan()
    assert found.grad_logits[0, 3].isnan().all()
    assert_same_bits(*(tuple(part[1] for part in result) for result in (found, expected)))


@pytest.mark.parametrize("targets", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("labels", [torch.int32, torch.int64], ids=str)
def test_targets_of_any_number_type_will_do(device: torch.device, targets: torch.dtype, labels: torch.dtype) -> None:
    deltas, logits, target_deltas, target_labels = loss_input(2, 60, 5, torch.float16, positive_share=0.1)
    rounded = target_deltas.to(targets)
    found = assert_loss_equals_plain(device, LossInput(deltas, logits, rounded, target_labels.to(labels)))
    plain = LossInput(deltas, logits, rounded.float(), target_labels).to(device)
    assert_same_bits(found, run_loss(multibox_loss, plain, *torch.rand(2, 2, generator=seeded(9)) + 0.5))


def test_predictions_of_two_types_are_computed_in_the_wider(device: torch.device) -> None:
    deltas, logits, *targets = loss_input(2, 60, 5, torch.float16, positive_share=0.1).to(device)
    for mixed in ((deltas.float(), logits), (deltas, logits.float())):
        assert_same_bits(multibox_loss(*mixed, *targets), multibox_loss(deltas.float(), logits.float(), *targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_storage_of_the_input_does_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    values = loss_input(3, 61, 7, dtype, positive_share=0.1).to(device)
    ones = torch.ones(2, 3)
    plain = run_loss(multibox_loss, values, *ones)
    assert_same_bits(run_loss(multibox_loss, LossInput(*(strided(x) for x in values)), *ones), plain)
    # what a head that shares its storage with its neighbour gives: rows that start at any element
    wide = torch.cat((values.deltas, values.logits), dim=-1)
    views = LossInput(wide[..., :4], wide[..., 4:], *values[2:])
    assert_same_bits(run_loss(multibox_loss, views, *ones), plain)
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in values]
    assert_same_bits(run_loss(multibox_loss, LossInput(*shifted), *ones), plain)
    # an upstream gradient of one number, as .mean().backward() makes it
    expanded = run_loss(multibox_loss, values, *(x.expand(3) for x in torch.ones(2, 1)))
    assert_same_bits(expanded, plain)


@pytest.mark.parametrize(("batch_size", "num_anchors"), [(0, 5), (2, 0), (0, 0)])
def test_empty_input_has_no_loss(device: torch.device, batch_size: int, num_anchors: int) -> None:
    values = loss_input(batch_size, num_anchors, 3).to(device)
    found = run_loss(multibox_loss, values, *torch.ones(2, batch_size))
    assert found.box.tolist() == found.class_.tolist() == [0] * batch_size
    assert found.grad_logits.shape == values.logits.shape


bad_input = pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("deltas", torch.zeros(2, 5, 3), r"has shape \[2, 5, 3\]: expected \[any, any, 4\]"),
        ("deltas", torch.zeros(2, 5, 4, dtype=torch.int32), "is torch.int32: expected float16, bfloat16"),
        ("deltas", torch.zeros(2, 5, 4, dtype=torch.complex64), "is torch.complex64: expected float16, bfloat16"),
        ("logits", torch.zeros(2, 6, 3), r"has shape \[2, 6, 3\]: expected \[2, 5, any\]"),
        ("logits", torch.zeros(2, 5, 1), r"has shape \[2, 5, 1\]: expected at least 2 classes"),
        ("logits", torch.zeros(2, 5, 3, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
        ("target_deltas", torch.zeros(2, 4, 5), r"has shape \[2, 4, 5\]: expected \[2, 5, 4\]"),
        ("target_deltas", torch.zeros(2, 5, 4, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
        ("target_labels", torch.zeros(2, 5), "is torch.float32: expected int32 or int64"),
        ("target_labels", torch.zeros(2, 5, 1, dtype=torch.int32), r"has shape \[2, 5, 1\]: expected \[2, 5\]"),
        ("target_labels", torch.zeros(2, 5, dtype=torch.bool), "is torch.bool: expected int32 or int64"),
    ],
)


@bad_input
def test_bad_input_is_named(device: torch.device, name: str, value: Tensor, complaint: str) -> None:
    inputs = loss_input(2, 5, 3)._asdict() | {name: value}
    with pytest.raises(ValueError, match=f"^{name} {complaint}"):
        multibox_loss(**{key: tensor.to(device) for key, tensor in inputs.items()})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_box", torch.zeros(3)),
        ("grad_box", torch.zeros(2).double()),
        ("grad_class", torch.zeros(2, 1)),
        ("grad_class", torch.zeros(2).half()),
        ("logits", torch.zeros(2, 5, 3).double()),
        ("logits", torch.zeros(2, 4, 3)),
        ("target_labels", torch.zeros(2, 4, dtype=torch.int32)),
        ("log_normalisers", torch.zeros(2, 4)),
        ("log_normalisers", torch.zeros(2, 5).half()),
        ("num_positives", torch.zeros(1, dtype=torch.int32)),
        ("num_positives", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_bad_input_of_the_backward_pass_is_named(device: torch.device, name: str, value: Tensor) -> None:
    values = loss_input(2, 5, 3)._asdict()
    inputs = {"grad_box": torch.zeros(2), "grad_class": torch.zeros(2), **values}
    inputs |= {"log_normalisers": torch.zeros(2, 5), "num_positives": torch.ones(2, dtype=torch.int32)}
    inputs[name] = value
    with pytest.raises(ValueError, match=f"^{name} (has|is) .*: expected "):
        torch.ops.ssd_fast.multibox_loss_backward(*(tensor.to(device) for tensor in inputs.values()))

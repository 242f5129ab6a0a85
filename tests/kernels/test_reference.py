"""The plain-torch operators against loops over Python numbers, and rule by rule."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.boxes import cxcywh_to_ltrb, decode_deltas, encode_deltas, iou_matrix, ltrb_to_cxcywh
from kernels.reference import decode_nms, encode_boxes, multibox_loss
from kernels.types import Detections
from ssd_fast.model.loss import multibox_loss_mean
from ssd_fast.model.ssd import Predictions

FLOAT64 = torch.float64


def boxes_of(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=FLOAT64).view(-1, 4)


def random_boxes(count: int, generator: torch.Generator, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Corners of boxes in the unit square, sides 0.05 to 0.65."""
    sides = 0.05 + 0.6 * torch.rand(count, 2, generator=generator, dtype=FLOAT64)
    corners = torch.rand(count, 2, generator=generator, dtype=FLOAT64) * (1 - sides)
    return torch.cat((corners, corners + sides), dim=1).to(dtype)


def loop_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


class TestBoxes:
    def test_formats_undo_each_other(self) -> None:
        boxes = random_boxes(20, torch.Generator().manual_seed(0))
        torch.testing.assert_close(cxcywh_to_ltrb(ltrb_to_cxcywh(boxes)), boxes)
        assert ltrb_to_cxcywh(boxes_of((0.1, 0.2, 0.5, 1.0))).tolist() == [pytest.approx([0.3, 0.6, 0.4, 0.8])]

    def test_iou_of_known_boxes(self) -> None:
        box = boxes_of((0, 0, 2, 2))
        others = boxes_of((0, 0, 2, 2), (1, 1, 3, 3), (0, 0, 2, 1), (2, 0, 4, 2), (0.5, 0.5, 1.5, 1.5))
        assert iou_matrix(box, others)[0].tolist() == pytest.approx([1, 1 / 7, 0.5, 0, 0.25])

    def test_iou_of_boxes_apart_in_both_directions_is_zero(self) -> None:
        assert iou_matrix(boxes_of((0, 0, 1, 1)), boxes_of((2, 3, 4, 5))).item() == 0

    def test_iou_of_boxes_without_area_is_zero(self) -> None:
        empty = boxes_of((1, 1, 1, 1))
        assert iou_matrix(empty, empty).item() == 0
        assert iou_matrix(empty, boxes_of((0, 0, 2, 2))).item() == 0

    def test_iou_takes_leading_dimensions(self) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = random_boxes(12, generator).view(3, 4, 4), random_boxes(6, generator).view(3, 2, 4)
        expected = [[[loop_iou(x, y) for y in ys] for x in xs] for xs, ys in zip(a.tolist(), b.tolist(), strict=True)]
        torch.testing.assert_close(iou_matrix(a, b), torch.tensor(expected, dtype=FLOAT64))

    def test_deltas_of_a_known_box(self) -> None:
        anchor = torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=FLOAT64)
        box = cxcywh_to_ltrb(torch.tensor([0.6, 0.4, 0.4, 0.2], dtype=FLOAT64))
        expected = [0.1 / 0.2 / 0.1, -0.1 / 0.4 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]
        assert encode_deltas(box, anchor).tolist() == pytest.approx(expected)

    @settings(deadline=None)
    @given(st.integers(0, 10**6))
    def test_decoding_undoes_encoding(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        boxes, anchors = random_boxes(8, generator), ltrb_to_cxcywh(random_boxes(8, generator))
        torch.testing.assert_close(decode_deltas(encode_deltas(boxes, anchors), anchors), boxes)


def encode_one(boxes: Tensor, anchors_ltrb: Tensor, **options: object) -> list[int]:
    """Labels of the anchors for one image whose ground truths are labelled 1, 2, 3, ..."""
    labels = torch.arange(1, len(boxes) + 1)
    offsets = torch.tensor([0, len(boxes)])
    return encode_boxes(boxes, labels, offsets, ltrb_to_cxcywh(anchors_ltrb), **options).labels[0].tolist()


def loop_match(boxes: list[list[float]], anchors_ltrb: list[list[float]], ranks: list[int]) -> list[int]:
    """1 + the ground truth of every anchor, or 0."""
    ious = [[loop_iou(box, anchor) for anchor in anchors_ltrb] for box in boxes]
    owners = []
    for anchor in range(len(anchors_ltrb)):
        best, best_iou = 0, 0.5
        for number, row in enumerate(ious, start=1):
            if row[anchor] > best_iou:
                best, best_iou = number, row[anchor]
        owners.append(best)
    for number, row in enumerate(ious, start=1):
        wanted = None
        for anchor in sorted(range(len(anchors_ltrb)), key=ranks.__getitem__):
            if wanted is None or row[anchor] > row[wanted]:
                wanted = anchor
        owners[wanted] = number
    return owners


# corners on a coarse grid of binary fractions: many exact ties, and IoUs of exactly one half
grid_boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: (box[0] / 8, box[1] / 8, (box[0] + box[2]) / 8, (box[1] + box[3]) / 8)
)


class TestEncodeBoxes:
    @settings(deadline=None)
    @given(st.lists(grid_boxes, min_size=1, max_size=6), st.lists(grid_boxes, min_size=1, max_size=12), st.randoms())
    def test_matching_equals_a_loop_over_all_pairs(self, boxes: list, anchors: list, shuffler: random.Random) -> None:
        ranks = list(range(len(anchors)))
        assert encode_one(boxes_of(*boxes), boxes_of(*anchors)) == loop_match(boxes, anchors, ranks)
        shuffler.shuffle(ranks)
        found = encode_one(boxes_of(*boxes), boxes_of(*anchors), tie_ranks=torch.tensor(ranks))
        assert found == loop_match(boxes, anchors, ranks)

    def test_iou_of_exactly_the_threshold_is_background(self) -> None:
        box = boxes_of((0, 0, 1, 1))
        half, more = (0, 0, 1, 0.5), (0, 0, 1, 0.5625)
        assert encode_one(box, boxes_of((0, 0, 1, 1), half, more)) == [1, 0, 1]
        assert encode_one(box, boxes_of((0, 0, 1, 1), half, more), iou_threshold=0.5625) == [1, 0, 0]

    def test_every_ground_truth_forces_its_best_anchor(self) -> None:
        tiny = boxes_of((0.5, 0.5, 0.5625, 0.5625))
        assert encode_one(tiny, boxes_of((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (0, 0, 1, 1))) == [0, 1, 0]

    def test_forcing_takes_an_anchor_from_a_ground_truth_that_overlaps_it_better(self) -> None:
        boxes = boxes_of((0, 0, 1, 1), (0, 0, 0.5, 0.5))
        assert encode_one(boxes, boxes_of((0, 0, 1, 1), (0, 0, 1, 0.875))) == [1, 2]
        assert encode_one(boxes, boxes_of((0, 0, 1, 1))) == [2]

    def test_the_last_ground_truth_gets_a_shared_best_anchor(self) -> None:
        boxes = boxes_of((0, 0, 0.5, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1))
        assert encode_one(boxes, boxes_of((0, 0, 1, 1), (2, 2, 3, 3))) == [3, 0]

    def test_the_first_ground_truth_wins_an_equal_overlap_that_neither_forces(self) -> None:
        same = (0, 0, 0.5, 1)
        assert encode_one(boxes_of(same, same), boxes_of(same, (0, 0, 0.5, 0.75))) == [2, 1]

    def test_tie_ranks_decide_between_equally_good_anchors(self) -> None:
        box, anchors = boxes_of((0, 0, 0.25, 0.25)), boxes_of((0, 0, 0.5, 1), (0, 0, 1, 0.5), (0, 0, 1, 1))
        assert encode_one(box, anchors) == [1, 0, 0]
        assert encode_one(box, anchors, tie_ranks=torch.tensor([1, 0, 2])) == [0, 1, 0]
        assert encode_one(box, anchors, tie_ranks=torch.tensor([2, 1, 0])) == [0, 1, 0]  # the last overlaps less

    def test_images_of_a_batch_do_not_mix_and_those_without_boxes_are_background(self) -> None:
        generator = torch.Generator().manual_seed(3)
        counts = [2, 0, 5, 1, 0]
        boxes, anchors = random_boxes(sum(counts), generator), ltrb_to_cxcywh(random_boxes(30, generator))
        labels = torch.randint(1, 9, (sum(counts),), generator=generator)
        offsets = torch.tensor([0, *counts]).cumsum(0)
        batch = encode_boxes(boxes, labels, offsets, anchors)
        assert batch.labels.dtype == torch.int32
        for image, (begin, end) in enumerate(pairwise(offsets.tolist())):
            alone = encode_boxes(boxes[begin:end], labels[begin:end], torch.tensor([0, end - begin]), anchors)
            assert torch.equal(batch.labels[image], alone.labels[0])
            assert torch.equal(batch.deltas[image], alone.deltas[0])
            assert bool(batch.labels[image].any()) == (end > begin)

    def test_positive_rows_decode_to_their_ground_truth_and_background_rows_are_zero(self) -> None:
        generator = torch.Generator().manual_seed(4)
        boxes, anchors = random_boxes(6, generator), ltrb_to_cxcywh(random_boxes(200, generator))
        targets = encode_boxes(boxes, torch.arange(1, 7), torch.tensor([0, 6]), anchors)
        labels, positive = targets.labels[0], targets.labels[0] > 0
        assert 6 <= positive.sum() < 200
        torch.testing.assert_close(
            decode_deltas(targets.deltas[0, positive], anchors[positive]), boxes[labels[positive].long() - 1]
        )
        assert targets.deltas[0, ~positive].eq(0).all()

    def test_an_empty_batch_gives_empty_targets(self) -> None:
        anchors = ltrb_to_cxcywh(boxes_of((0, 0, 1, 1)))
        none = torch.zeros(0, dtype=torch.int64)
        assert encode_boxes(boxes_of(), none, torch.tensor([0]), anchors).labels.shape == (0, 1)
        assert encode_boxes(boxes_of(), none, torch.tensor([0, 0, 0]), anchors).deltas.eq(0).all()

    def test_float32_agrees_with_float64(self) -> None:
        generator = torch.Generator().manual_seed(5)
        boxes, anchors = random_boxes(9, generator, torch.float32), ltrb_to_cxcywh(random_boxes(300, generator))
        labels, offsets = torch.arange(1, 10), torch.tensor([0, 4, 9])
        single, double = (
            encode_boxes(boxes, labels, offsets, anchors),
            encode_boxes(boxes.double(), labels, offsets, anchors),
        )
        assert single.deltas.dtype == torch.float32
        assert torch.equal(single.labels, double.labels)
        torch.testing.assert_close(single.deltas.double(), double.deltas, rtol=0, atol=2e-5)

    def test_non_contiguous_input_gives_the_same(self) -> None:
        generator = torch.Generator().manual_seed(6)
        boxes, anchors = random_boxes(5, generator), ltrb_to_cxcywh(random_boxes(40, generator))
        labels, offsets = torch.arange(1, 6), torch.tensor([0, 2, 5])
        plain = encode_boxes(boxes, labels, offsets, anchors)
        odd = encode_boxes(boxes.T.contiguous().T, labels.repeat_interleave(2)[::2], offsets, anchors.T.contiguous().T)
        assert torch.equal(plain.deltas, odd.deltas)
        assert torch.equal(plain.labels, odd.labels)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0.5, 0, 0.5, 1))),
            ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0.5, 1, 0.25))),
            ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, math.inf))),
            ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, math.nan))),
            ("boxes_ltrb", torch.ones(2, 5)),
            ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, 1)).half()),
            ("labels", torch.tensor([1, 0])),
            ("labels", torch.tensor([1.0, 2.0])),
            ("labels", torch.tensor([1])),
            ("offsets", torch.tensor([0, 1])),
            ("offsets", torch.tensor([1, 2])),
            ("offsets", torch.tensor([0, 2, 1, 2])),
            ("offsets", torch.tensor([], dtype=torch.int64)),
            ("offsets", torch.tensor([0.0, 2.0])),
            ("anchors_cxcywh", torch.ones(3)),
            ("anchors_cxcywh", torch.ones(0, 4)),
            ("tie_ranks", torch.tensor([0, 1])),
            ("boxes_ltrb", torch.ones(2, 4, device="meta")),
        ],
    )
    def test_bad_input_is_named(self, name: str, value: Tensor) -> None:
        good = {
            "boxes_ltrb": boxes_of((0, 0, 1, 1), (0, 0, 0.5, 0.5)),
            "labels": torch.tensor([1, 2]),
            "offsets": torch.tensor([0, 2]),
            "anchors_cxcywh": ltrb_to_cxcywh(boxes_of((0, 0, 1, 1), (0, 0, 1, 0.5), (0.5, 0, 1, 1))),
        }
        with pytest.raises(ValueError, match=r"^labels is on" if value.is_meta else f"^{name}"):
            encode_boxes(**{**good, name: value})


def loss_input(
    labels: list[list[int]], num_classes: int = 4, seed: int = 0, dtype: torch.dtype = FLOAT64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
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
        box, chosen, negatives = 0.0, [], []
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


class TestMultiboxLoss:
    @settings(deadline=None)
    @given(
        st.integers(1, 14).flatmap(
            lambda anchors: st.lists(
                st.lists(st.integers(-6, 3), min_size=anchors, max_size=anchors), min_size=1, max_size=4
            )
        ),
        st.integers(0, 10**6),
    )
    def test_loss_equals_a_loop_over_anchors(self, labels: list[list[int]], seed: int) -> None:
        values = loss_input([[max(label, 0) for label in row] for row in labels], seed=seed)  # mostly background
        parts, (box, class_) = multibox_loss(*values), loop_loss(*values)
        assert parts.box.tolist() == pytest.approx(box)
        assert parts.class_.tolist() == pytest.approx(class_)

    def test_gradients_are_those_of_finite_differences(self) -> None:
        deltas, logits, targets, labels = loss_input([[1, 0, 0, 3, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0, 0, 0, 0]])
        inputs = (deltas.requires_grad_(), logits.requires_grad_())
        assert torch.autograd.gradcheck(lambda *predictions: multibox_loss(*predictions, targets, labels), inputs)

    def test_an_image_without_positives_has_no_loss_and_no_gradient(self) -> None:
        deltas, logits, targets, labels = loss_input([[0] * 8, [0, 2, 0, 0, 0, 0, 0, 0]])
        parts = multibox_loss(deltas.requires_grad_(), logits.requires_grad_(), targets, labels)
        (parts.box.sum() + parts.class_.sum()).backward()
        assert parts.box[0] == parts.class_[0] == 0
        for gradient in (deltas.grad, logits.grad):
            assert gradient[0].eq(0).all()
            assert gradient[1].any()

    def test_where_negatives_run_out_every_anchor_counts_once(self) -> None:
        deltas, logits, targets, labels = loss_input([[1, 2, 3, 0, 0]])
        every = torch.nn.functional.cross_entropy(logits[0], labels[0].long(), reduction="sum")
        assert multibox_loss(deltas, logits, targets, labels).class_[0] == pytest.approx(every.item() / 3)

    def test_only_positives_and_the_hardest_negatives_have_gradients(self) -> None:
        deltas, logits, targets, labels = loss_input([[0, 0, 1, 0, 0, 0, 0]], num_classes=2)
        difficulty = [5.0, -1.0, 0.0, 3.0, 4.0, 2.0, -2.0]  # logit of class 1 over background
        logits = torch.stack((torch.zeros(7), torch.tensor(difficulty)), dim=-1)[None].double().requires_grad_()
        parts = multibox_loss(deltas.requires_grad_(), logits, targets, labels)
        (parts.box + parts.class_).sum().backward()
        assert logits.grad[0].ne(0).any(dim=1).tolist() == [True, False, True, True, True, False, False]
        assert deltas.grad[0].ne(0).any(dim=1).tolist() == [False, False, True, False, False, False, False]

    def test_equally_hard_negatives_are_taken_in_the_order_of_their_index(self) -> None:
        deltas, _, targets, labels = loss_input([[0, 0, 0, 0, 0, 0, 1, 0, 0]])
        logits = torch.zeros(1, 9, 4, dtype=FLOAT64, requires_grad=True)
        multibox_loss(deltas, logits, targets, labels).class_.sum().backward()
        assert logits.grad[0].ne(0).any(dim=1).nonzero().flatten().tolist() == [0, 1, 2, 6]

    def test_what_is_predicted_and_targeted_for_background_boxes_does_not_matter(self) -> None:
        deltas, logits, targets, labels = loss_input([[0, 1, 0, 2]])
        other, other_targets = deltas.clone(), targets.clone()
        other[labels == 0] += 9
        other_targets[labels == 0] -= 7
        assert torch.equal(
            multibox_loss(deltas, logits, targets, labels).box, multibox_loss(other, logits, other_targets, labels).box
        )

    def test_float32_agrees_with_float64(self) -> None:
        generator = torch.Generator().manual_seed(1)
        labels = (torch.randint(0, 20, (3, 400), generator=generator) - 16).clamp(min=0).tolist()
        values = loss_input(labels, num_classes=21)
        double = multibox_loss(*values)
        single = multibox_loss(*(x.float() if x.is_floating_point() else x for x in values))
        assert single.box.dtype == single.class_.dtype == torch.float32
        torch.testing.assert_close(single.box.double(), double.box, rtol=1e-6, atol=0)
        torch.testing.assert_close(single.class_.double(), double.class_, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_predictions_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        deltas, logits, targets, labels = loss_input([[0, 1, 0, 2, 0, 0, 0, 0, 0, 0]], dtype=dtype)
        parts = multibox_loss(deltas, logits, targets.float(), labels)
        expected = multibox_loss(deltas.float(), logits.float(), targets.float(), labels)
        assert parts.box.dtype == parts.class_.dtype == torch.float32
        assert torch.equal(parts.box, expected.box)
        assert torch.equal(parts.class_, expected.class_)

    def test_non_contiguous_input_gives_the_same(self) -> None:
        values = loss_input([[0, 1, 0, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]])
        odd = multibox_loss(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in values))
        for part, expected in zip(odd, multibox_loss(*values), strict=True):
            torch.testing.assert_close(part, expected)

    def test_an_empty_batch_has_an_empty_loss(self) -> None:
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
    def test_bad_input_is_named(self, place: int, name: str, value: Tensor) -> None:
        values = [
            torch.zeros(2, 5, 4),
            torch.zeros(2, 5, 3),
            torch.zeros(2, 5, 4),
            torch.zeros(2, 5, dtype=torch.int32),
        ]
        values[place] = value
        with pytest.raises(ValueError, match=rf"^{name} (is|has) "):
            multibox_loss(*values)

    def test_the_mean_counts_images_without_positives(self) -> None:
        deltas, logits, targets, labels = loss_input([[0, 1, 0, 2, 0], [0] * 5])
        parts = multibox_loss(deltas, logits, targets, labels)
        loss = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets, labels)
        assert loss.box.item() == pytest.approx(parts.box[0].item() / 2)
        assert loss.class_.item() == pytest.approx(parts.class_[0].item() / 2)
        assert loss.total.item() == pytest.approx(loss.box.item() + loss.class_.item())

    def test_the_mean_under_autocast_is_float32(self) -> None:
        deltas, logits, targets, labels = loss_input([[0, 1, 0, 2, 0]], dtype=torch.bfloat16)
        expected = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets.float(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = multibox_loss_mean(Predictions(deltas=deltas, logits=logits), targets.float(), labels)
        assert loss.total.dtype == torch.float32
        assert torch.equal(loss.total, expected.total)


Row = tuple[list[float], float, int]


def loop_detect(
    deltas: Tensor, logits: Tensor, anchors: Tensor, threshold: float, iou: float, per_class: int, most: int
) -> list[Row]:
    """Boxes, scores and labels of one image, from Python numbers."""
    boxes = decode_deltas(deltas, anchors).tolist()
    scores = logits.softmax(-1).tolist()
    survivors = []
    for label in range(1, len(scores[0])):
        order = sorted((-row[label], anchor) for anchor, row in enumerate(scores) if row[label] > threshold)
        kept: list[int] = []
        for negative_score, anchor in order[:per_class]:
            if all(loop_iou(boxes[other], boxes[anchor]) < iou for other in kept):
                kept.append(anchor)
                survivors.append((negative_score, anchor, label))
    return [(boxes[anchor], -negative_score, label) for negative_score, anchor, label in sorted(survivors)[:most]]


def rows_of(detections: Detections, image: int) -> list[Row]:
    count = int(detections.counts[image])
    columns = (detections.boxes_ltrb, detections.scores, detections.labels)
    return list(zip(*(column[image, :count].tolist() for column in columns), strict=True))


def detect_one(anchors_ltrb: Tensor, probabilities: list[list[float]], **options: float) -> list[Row]:
    """Detections of one image that predicts the anchors themselves; probabilities of background and classes."""
    anchors = ltrb_to_cxcywh(anchors_ltrb)
    logits = torch.tensor([probabilities], dtype=FLOAT64).log().clamp(min=-1000)
    return rows_of(decode_nms(torch.zeros(1, len(anchors), 4, dtype=FLOAT64), logits, anchors, **options), 0)


FAR_APART = boxes_of((0, 0, 0.25, 0.25), (0.5, 0, 0.75, 0.25), (0, 0.5, 0.25, 0.75), (0.5, 0.5, 0.75, 0.75))


class TestDecodeNms:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        levels=st.sampled_from([3, 40]),
        per_class=st.sampled_from([1, 4, 200]),
        most=st.sampled_from([1, 7, 200]),
    )
    def test_detections_equal_a_loop_over_boxes(self, seed: int, levels: int, per_class: int, most: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        anchors = ltrb_to_cxcywh(random_boxes(24, generator))
        deltas = torch.randn(2, 24, 4, generator=generator, dtype=FLOAT64)
        logits = (
            torch.randint(0, levels, (2, 24, 4), generator=generator).double() * 4 / levels
        )  # few levels: many ties
        detections = decode_nms(
            deltas,
            logits,
            anchors,
            score_threshold=0.2,
            iou_threshold=0.3,
            max_per_class=per_class,
            max_detections=most,
        )
        for image in range(2):
            expected = loop_detect(deltas[image], logits[image], anchors, 0.2, 0.3, per_class, most)
            found = rows_of(detections, image)
            assert [row[2] for row in found] == [row[2] for row in expected]
            for (box, score, _), (expected_box, expected_score, _) in zip(found, expected, strict=True):
                assert box == pytest.approx(expected_box)
                assert score == pytest.approx(expected_score)

    def test_probability_of_exactly_the_threshold_is_dropped(self) -> None:
        even = [[0.5, 0.5]] * 4
        assert detect_one(FAR_APART, even, score_threshold=0.5) == []
        assert len(detect_one(FAR_APART, even, score_threshold=0.4999)) == 4

    def test_overlap_of_exactly_the_threshold_is_dropped(self) -> None:
        boxes = boxes_of((0, 0, 1, 1), (0, 0, 1, 0.5), (0, 0, 1, 0.4375))
        found = detect_one(boxes, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], iou_threshold=0.5)
        assert [row[0] for row in found] == boxes[[0, 2]].tolist()

    def test_a_dropped_box_drops_none(self) -> None:
        chain = boxes_of((0, 0, 0.5, 1), (0.125, 0, 0.625, 1), (0.25, 0, 0.75, 1))  # neighbours overlap by 0.6
        found = detect_one(chain, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
        assert [row[0] for row in found] == chain[[0, 2]].tolist()

    def test_classes_do_not_suppress_each_other(self) -> None:
        found = detect_one(
            boxes_of((0, 0, 1, 1), (0, 0, 1, 1)), [[0.1, 0.8, 0.1], [0.1, 0.2, 0.7]], score_threshold=0.15
        )
        assert [row[2] for row in found] == [1, 2]

    def test_the_best_of_a_class_are_taken_before_suppression(self) -> None:
        boxes = boxes_of((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))
        scores = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]
        assert len(detect_one(boxes, scores, max_per_class=2)) == 1
        assert len(detect_one(boxes, scores, max_per_class=3)) == 2

    def test_the_best_of_the_image_are_kept_in_descending_order(self) -> None:
        scores = [[0.4, 0.5, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1]]
        found = detect_one(FAR_APART, scores, max_detections=3)
        assert [(row[1], row[2]) for row in found] == [
            (pytest.approx(0.8), 1),
            (pytest.approx(0.7), 2),
            (pytest.approx(0.6), 1),
        ]

    def test_equal_scores_come_in_the_order_of_anchor_then_class(self) -> None:
        found = detect_one(FAR_APART, [[0.25, 0.25, 0.25, 0.25]] * 4, max_detections=7)
        boxes = FAR_APART.tolist()
        assert [(boxes.index(row[0]), row[2]) for row in found] == [
            (0, 1),
            (0, 2),
            (0, 3),
            (1, 1),
            (1, 2),
            (1, 3),
            (2, 1),
        ]

    def test_of_equal_overlapping_boxes_the_lower_anchor_remains(self) -> None:
        boxes = boxes_of((0, 0, 1, 1), (0, 0, 1, 0.75))
        assert [row[0] for row in detect_one(boxes, [[0.5, 0.5]] * 2)] == [[0, 0, 1, 1]]

    def test_boxes_are_not_clipped_to_the_image(self) -> None:
        outside = boxes_of((-0.5, 0.25, 0.25, 1.75))
        assert detect_one(outside, [[0.1, 0.9]])[0][0] == outside[0].tolist()

    def test_an_image_without_detections_is_empty_and_leaves_the_others_alone(self) -> None:
        anchors = ltrb_to_cxcywh(FAR_APART)
        logits = torch.zeros(3, 4, 2, dtype=FLOAT64)
        logits[[0, 2], :, 0] = 9
        detections = decode_nms(torch.zeros(3, 4, 4, dtype=FLOAT64), logits, anchors, max_detections=6)
        assert detections.counts.tolist() == [0, 4, 0]
        assert detections.boxes_ltrb.shape == (3, 6, 4)
        assert detections.labels.dtype == detections.counts.dtype == torch.int32
        for values in (detections.boxes_ltrb, detections.scores, detections.labels):
            assert values[[0, 2]].eq(0).all()
            assert values[1, 4:].eq(0).all()
            assert values[1, :4].ne(0).any()

    def test_an_empty_batch_has_empty_detections(self) -> None:
        detections = decode_nms(torch.zeros(0, 4, 4), torch.zeros(0, 4, 3), torch.ones(4, 4))
        assert detections.scores.shape == (0, 200)
        assert detections.counts.shape == (0,)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", ["logits", "deltas"])
    def test_an_anchor_with_a_number_that_is_not_finite_gives_no_detection(self, place: str, value: float) -> None:
        inputs = {"logits": torch.zeros(1, 4, 3), "deltas": torch.zeros(1, 4, 4)}
        inputs[place][0, 1, 2] = value
        found = rows_of(decode_nms(anchors_cxcywh=ltrb_to_cxcywh(FAR_APART), **inputs), 0)
        assert {FAR_APART.tolist().index(row[0]) for row in found} == {0, 2, 3}

    def test_a_box_too_large_for_its_precision_gives_no_detection(self) -> None:
        deltas = torch.zeros(1, 4, 4)
        deltas[0, 2, 3] = 1000
        found = rows_of(decode_nms(deltas, torch.zeros(1, 4, 2), ltrb_to_cxcywh(FAR_APART)), 0)
        assert {FAR_APART.tolist().index(row[0]) for row in found} == {0, 1, 3}

    def test_float32_agrees_with_float64_and_16_bit_is_computed_in_float32(self) -> None:
        generator = torch.Generator().manual_seed(0)
        anchors = ltrb_to_cxcywh(random_boxes(200, generator))
        deltas = torch.randn(2, 200, 4, generator=generator).bfloat16()
        logits = torch.randn(2, 200, 5, generator=generator).mul(2).bfloat16()
        half, single, double = (
            decode_nms(deltas.to(t), logits.to(t), anchors) for t in (deltas.dtype, torch.float32, FLOAT64)
        )
        assert half.scores.dtype == half.boxes_ltrb.dtype == torch.float32
        for found, expected in zip(half, single, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(single.counts, double.counts)
        assert torch.equal(single.labels, double.labels)
        torch.testing.assert_close(single.boxes_ltrb.double(), double.boxes_ltrb, rtol=0, atol=1e-5)
        torch.testing.assert_close(single.scores.double(), double.scores, rtol=0, atol=1e-6)

    def test_non_contiguous_input_gives_the_same_and_no_input_is_changed(self) -> None:
        generator = torch.Generator().manual_seed(0)
        anchors = ltrb_to_cxcywh(random_boxes(50, generator))
        deltas, logits = torch.randn(2, 50, 4, generator=generator), torch.randn(2, 50, 5, generator=generator)
        copies = deltas.mT.contiguous().mT, logits.mT.contiguous().mT, anchors.T.contiguous().T
        plain = decode_nms(deltas, logits, anchors)
        assert plain.counts.gt(0).all()
        for found, expected in zip(decode_nms(*copies), plain, strict=True):
            assert torch.equal(found, expected)
        for copy, original in zip(copies, (deltas, logits, anchors), strict=True):
            assert torch.equal(copy, original)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("deltas", torch.zeros(2, 4)),
            ("deltas", torch.zeros(2, 5, 4, dtype=torch.int64)),
            ("logits", torch.zeros(2, 4, 3)),
            ("logits", torch.zeros(2, 5, 1)),
            ("anchors_cxcywh", torch.zeros(4, 4)),
            ("anchors_cxcywh", torch.zeros(5, 4, device="meta")),
            ("max_per_class", 0),
            ("max_detections", 0),
        ],
    )
    def test_bad_input_is_named(self, name: str, value: Tensor | int) -> None:
        good = {"deltas": torch.zeros(2, 5, 4), "logits": torch.zeros(2, 5, 3), "anchors_cxcywh": torch.ones(5, 4)}
        with pytest.raises(ValueError, match=f"^{name} "):
            decode_nms(**{**good, name: value})

"""Properties of every compiled operator: equal bits, independent images, devices, schemas, compilation."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from operator_samples import (
    ON_A_GPU,
    LossInput,
    assert_same_bits,
    decode_input,
    ground_truths,
    loss_input,
    pyramid_anchors,
    run_loss,
)
from torch import Tensor

from kernels import decode_nms, encode_boxes, multibox_loss


class Call(NamedTuple):
    """One call of an operator: its public function, the registered operator, and arguments that suit both."""

    function: Callable
    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def calls(device: torch.device, num_images: int = 2, num_anchors: int = 130) -> dict[str, Call]:
    truths = ground_truths([3, 0, 5, 1, 40, 2, 7, 1][:num_images]).to(device)
    values = loss_input(num_images, num_anchors, 7, positive_share=0.05).to(device)
    predictions = decode_input(num_images, num_anchors, 7).to(device)
    limits = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_per_class": 20, "max_detections": 30}
    operators = torch.ops.ssd_fast
    return {
        "encode_boxes": Call(
            encode_boxes,
            operators.encode_boxes.default,
            (*truths, pyramid_anchors(num_anchors).to(device)),
            {"iou_threshold": 0.5, "tie_ranks": torch.arange(num_anchors, device=device).flip(0)},
        ),
        "multibox_loss": Call(multibox_loss, operators.multibox_loss.default, (*values,), {}),
        "decode_nms": Call(decode_nms, operators.decode_nms.default, (*predictions,), limits),
    }


OPERATORS = ["encode_boxes", "multibox_loss", "decode_nms"]


@pytest.mark.parametrize("name", OPERATORS)
def test_two_runs_give_the_same_bits_whatever_the_number_of_threads(
    device: torch.device, name: str, set_num_threads: Callable[[int], None]
) -> None:
    call = calls(device, 8, 8_732)[name]
    set_num_threads(1)
    first = call.function(*call.arguments, **call.options)
    for num_threads in (1, 2, 2, 3):
        set_num_threads(num_threads)
        assert_same_bits(call.function(*call.arguments, **call.options), first)


def test_two_backward_passes_give_the_same_bits_whatever_the_number_of_threads(
    device: torch.device, set_num_threads: Callable[[int], None]
) -> None:
    values = LossInput(*calls(device, 8, 8_732)["multibox_loss"].arguments)
    set_num_threads(1)
    first = run_loss(multibox_loss, values, *torch.ones(2, 8))
    for num_threads in (1, 2, 2, 3):
        set_num_threads(num_threads)
        assert_same_bits(run_loss(multibox_loss, values, *torch.ones(2, 8)), first)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_batch_gives_what_its_images_give_alone(device: torch.device, name: str) -> None:
    arguments = calls(device, 4, 500)[name].arguments
    if name == "encode_boxes":
        boxes, labels, offsets, anchors = arguments
        whole = encode_boxes(*arguments)
        alone = [
            encode_boxes(boxes[begin:end], labels[begin:end], torch.tensor([0, end - begin], device=device), anchors)
            for begin, end in pairwise(offsets.tolist())
        ]
    else:
        function = calls(device)[name].function
        whole = function(*arguments)
        alone = [
            function(*(x[i : i + 1] if x.dim() == 3 or name == "multibox_loss" else x for x in arguments))
            for i in range(4)
        ]
    assert_same_bits(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)), whole)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_input_is_changed(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    before = [x.clone() for x in call.arguments]
    call.function(*call.arguments, **call.options)
    assert_same_bits(call.arguments, tuple(before))


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_of_two_devices_are_an_error_that_names_one(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    elsewhere = torch.device("meta" if device.type == "cpu" else "cpu")
    places = [*range(len(call.arguments)), *(key for key, x in call.options.items() if isinstance(x, Tensor))]
    for place in places:
        arguments = dict(enumerate(call.arguments)) | call.options
        arguments[place] = arguments[place].to(elsewhere)
        options = {key: arguments.pop(key) for key in call.options}
        with pytest.raises(ValueError, match=r"^\w+ is on (meta|cpu|cuda:0): expected (meta|cpu|cuda:0), like"):
            call.function(*arguments.values(), **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_no_tensor_or_no_dense_one_is_an_error(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    for place in range(len(call.arguments)):
        for value in (None, "text", 3, call.arguments[place].to_sparse()):
            arguments = list(call.arguments)
            arguments[place] = value
            with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
                call.operator(*arguments, *call.options.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_fake_implementation_and_autograd_agree_with_the_operator(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    arguments = call.arguments
    if name == "multibox_loss":
        arguments = tuple(x.requires_grad_(place < 2) for place, x in enumerate(arguments))
    torch.library.opcheck(call.operator, (*arguments, *call.options.values()))


def test_schema_and_fake_implementation_agree_with_the_backward_pass(device: torch.device) -> None:
    values = loss_input(2, 130, 7, torch.float16, positive_share=0.05).to(device)
    _, _, log_normalisers, num_positives = torch.ops.ssd_fast.multibox_loss(*values)
    ones = torch.ones(2, device=device)
    arguments = (ones, ones.clone(), *values, log_normalisers, num_positives)
    torch.library.opcheck(torch.ops.ssd_fast.multibox_loss_backward.default, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_by_torch_in_one_graph_it_gives_the_same(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    compiled = torch.compile(lambda *arguments: call.function(*arguments, **call.options), fullgraph=True)
    if name == "multibox_loss":
        ones = torch.ones(2, 2, device=device)
        values = LossInput(*call.arguments)
        assert_same_bits(run_loss(compiled, values, *ones), run_loss(multibox_loss, values, *ones))
    else:
        assert_same_bits(compiled(*call.arguments), call.function(*call.arguments, **call.options))


@ON_A_GPU
@pytest.mark.parametrize("name", OPERATORS)
def test_replayed_as_a_cuda_graph_it_gives_what_it_gives_for_the_new_input(device: torch.device, name: str) -> None:
    call = calls(device, 4, 8_732)[name]
    fresh = [x.flip(0) if place < 2 else x.clone() for place, x in enumerate(call.arguments)]

    def run(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if name != "multibox_loss":
            return call.function(*arguments, **call.options)
        return run_loss(multibox_loss, LossInput(*arguments), *torch.ones(2, 4, device=device))

    expected = run(tuple(fresh))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(call.arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(call.arguments)
    for static, new in zip(call.arguments, fresh, strict=True):
        static.copy_(new)
    graph.replay()
    assert_same_bits(results, expected)


@ON_A_GPU
@pytest.mark.parametrize("name", OPERATORS)
def test_the_host_does_not_wait_for_the_gpu(device: torch.device, name: str) -> None:
    call = calls(device, 4, 8_732)[name]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.function(*call.arguments, **call.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")

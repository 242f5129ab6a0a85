"""The bottleneck of a run, from its profile: the time lost in each known way, and what to change.

A loss is the time of a step beyond the time that it should need:
- input: a step takes longer with batches from images than with a batch that is there;
- allreduce: the part that backward does not hide, on the rank that waits least; uneven ranks: the others wait longer;
- optimizer: more than a few times the time that its bytes need at the measured copy rate;
- loss: more than a small share of the time of forward and backward;
- batch: half a step with twice the images is shorter;
- host: time between the parts, and time in which a GPU is idle though its input is there.
The largest loss bounds the run if it is more than 15% of the time. Otherwise the arithmetic does.
"""

from collections.abc import Iterator
from statistics import median

from ssd_fast.parts import BACKWARD, FORWARD, INPUT, LOSS, OPTIMIZER
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, REST, STEP_ALONE, Finding, Profile, Stage

_BOUNDING, _WORTH_NAMING = 0.15, 0.03  # of the time
_SGD_TRANSFERS = 7  # per weight: gradient checked; weight, gradient and momentum read; gradient and two more written
_SLACK = 3.0  # times that the optimizer may take longer than its bytes
_USUAL_LOSS = 0.15  # of forward and backward
_SLOW_READING = 0.3  # of the input's time
_FASTER_BF16 = 1.3
_NEAR_ROOF = 0.5


def find_bottlenecks(profile: Profile) -> list[Finding]:
    """Return what bounds the run, then what else is worth naming. Empty if only the evaluation was measured."""
    whole, fed = profile.stage(BOTH) or profile.stage(STEP_ALONE), profile.stage(INPUT_ALONE)
    found: list[Finding] = []
    if whole is not None:
        losses = sorted(_losses(profile, whole), key=lambda finding: finding.lost, reverse=True)
        found = [finding for finding in losses if finding.lost >= _WORTH_NAMING]
        if not found or found[0].lost < _BOUNDING:
            found.insert(0, _arithmetic(profile, whole))
        found += _host_reads(profile)
    elif fed is not None:
        found = [Finding(name="input", lost=0, sentence=f"the input: {_explain_part(profile, fed)}")]
    return [
        finding.model_copy(update={"sentence": ("Also: " if number else "Bound by ") + finding.sentence})
        for number, finding in enumerate(found)
    ]


def _losses(profile: Profile, whole: Stage) -> Iterator[Finding]:
    step_s, alone, input_s = whole.whole.median_s, profile.stage(STEP_ALONE), 0.0
    if whole.name == BOTH:
        input_s = max(whole.seconds(INPUT), step_s - alone.whole.median_s if alone else 0.0)
        yield _input(profile, whole, input_s / step_s)
    if profile.machine.ranks > 1:
        yield from _ranks(profile, step_s)
    parts = alone or whole
    if profile.work:
        yield _optimizer(profile, parts, step_s)
        yield _loss(parts, step_s)
    if profile.doubled and alone:
        yield _batch(profile, alone, step_s)
    yield _host(profile, parts.seconds(REST) / step_s, input_s / step_s)


def _input(profile: Profile, both: Stage, lost: float) -> Finding:
    fed, alone = profile.stage(INPUT_ALONE), profile.stage(STEP_ALONE)
    if fed is None or alone is None:
        text = f"{lost:.0%} of a step waits for it. --stage all shows which part of it is slow."
    elif fed.whole.median_s > alone.whole.median_s:
        text = f"alone it makes {fed.images_per_s:.4g} images/s, the step could train {alone.images_per_s:.4g}. "
        text += _explain_part(profile, fed)
    else:
        text = (
            f"alone it makes {fed.images_per_s:.4g} images/s, more than the {alone.images_per_s:.4g} of the step, but "
            f"together they train {both.images_per_s:.4g}: both want the same cores. More cores for each rank help."
        )
    return Finding(name="input", lost=lost, sentence=f"the input: {text}")


def _explain_part(profile: Profile, fed: Stage) -> str:
    """Name the slow part of the input, and what to change."""
    cores, threads = profile.machine.cores, profile.config["data"]["num_threads"]
    longest = max(fed.parts, key=lambda part: part.median_s)
    read = fed.parts[0]
    if read.median_s > _SLOW_READING * fed.whole.median_s:
        return (
            f"{read.name} takes {read.median_s / fed.whole.median_s:.0%} of its time: the disk. Put the data on a "
            "faster disk, or into memory."
        )
    share = f"{longest.name} takes {longest.median_s / fed.whole.median_s:.0%} of its time"
    if 0 < threads < cores:
        return f"{share}, on {threads} of {cores} cores: data.num_threads = 0 takes all."
    if longest is fed.parts[-1]:
        return f"{share}: try the other data.box_encoder."
    return f"{share}, on all {cores} cores. More cores for each rank help, or images that are stored smaller."


def _ranks(profile: Profile, step_s: float) -> Iterator[Finding]:
    waits_s = [rank.allreduce_s or 0.0 for rank in profile.ranks]
    lost = min(waits_s) / step_s
    yield Finding(
        name="allreduce",
        lost=lost,
        sentence=f"averaging the gradients: after backward {lost:.0%} of a step waits for it. A larger "
        "training.batch_size makes it rarer, distributed.fp16_compression = true halves its bytes. run.slurm explains "
        "the variables of the network.",
    )
    slowest = max(range(len(waits_s)), key=lambda rank: profile.ranks[rank].compute_s or 0.0)
    lost = (median(waits_s) - min(waits_s)) / step_s
    yield Finding(
        name="uneven ranks",
        lost=lost,
        sentence=f"uneven ranks: {lost:.0%} of a step waits for the slowest, rank {slowest} on "
        f"{profile.ranks[slowest].host}. Look at its clocks, its cores and other programs there.",
    )


def _sgd_bytes_s(profile: Profile) -> float:
    """Time that the bytes of the optimizer need at the measured copy rate."""
    parameter_bytes = profile.work.parameter_bytes if profile.work else 0
    return _SGD_TRANSFERS * parameter_bytes / profile.machine.copy_bytes_per_s


def _optimizer(profile: Profile, parts: Stage, step_s: float) -> Finding:
    assert profile.work is not None
    bytes_s, seconds = _sgd_bytes_s(profile), parts.seconds(OPTIMIZER)
    return Finding(
        name="optimizer",
        lost=(seconds - _SLACK * bytes_s) / step_s,
        sentence=f"the optimizer: it takes {1e3 * seconds:.3g} ms a step, but reading and writing "
        f"{profile.work.parameter_bytes / 1e6:.0f} MB of weights, gradients and momentum takes {1e3 * bytes_s:.2g} ms. "
        "Look for other work in it (ssd_fast/training/optim.py, TrainStep.__call__).",
    )


def _loss(parts: Stage, step_s: float) -> Finding:
    arithmetic_s, seconds = parts.seconds(FORWARD) + parts.seconds(BACKWARD), parts.seconds(LOSS)
    return Finding(
        name="loss",
        lost=(seconds - _USUAL_LOSS * arithmetic_s) / step_s,
        sentence=f"the loss: it takes {seconds / arithmetic_s:.0%} of the time of forward and backward. Look for other "
        "work in it than kernels.multibox_loss (ssd_fast/model/loss.py, TrainStep.__call__).",
    )


def _batch(profile: Profile, alone: Stage, step_s: float) -> Finding:
    once = sum(alone.seconds(part) for part in (FORWARD, LOSS, BACKWARD))
    twice = sum(profile.doubled[part] for part in (FORWARD, LOSS, BACKWARD))
    saved_s = once - twice / 2 + min(alone.seconds(OPTIMIZER), _SLACK * _sgd_bytes_s(profile)) / 2
    faster = 2 * alone.whole.median_s / sum(profile.doubled.values())
    return Finding(
        name="batch",
        lost=saved_s / step_s,
        sentence=f"a small batch: with training.batch_size = {2 * profile.batch_size} in place of "
        f"{profile.batch_size} the step alone trains {faster:.2f} times as many images a second.",
    )


def _host(profile: Profile, between: float, waiting: float) -> Finding:
    busy = profile.work.gpu_busy if profile.work else None
    idle = 0.0 if busy is None else 1 - busy - waiting
    if idle <= between:
        text = f"{between:.0%} of a step lies between its parts. Look into the loop (ssd_fast/training/loop.py)."
    elif reads := _list_host_reads(profile):
        text = f"{idle:.0%} of the time the GPU has nothing to do though its input is there. "
        text += f"The host waits for the device to read a value, {reads}: remove these reads."
    else:
        text = f"{idle:.0%} of the time the GPU has nothing to do though its input is there. "
        text += "Kernels are shorter than the host takes to launch them: a larger training.batch_size helps."
    return Finding(name="host", lost=max(idle, between), sentence=f"the host: {text}")


def _host_reads(profile: Profile) -> list[Finding]:
    reads = _list_host_reads(profile)
    if not reads:
        return []
    cost = "every step waits for that" if profile.machine.is_gpu else "free on a CPU, on a GPU every step waits for it"
    sentence = f"the host reads values of the device, {reads}: {cost}. Read them once in a window of steps."
    return [Finding(name="host reads", lost=0, sentence=sentence)]


def _list_host_reads(profile: Profile) -> str:
    reads = profile.work.host_reads if profile.work else ()
    return ", ".join(f"{read.times} a step at {read.place}" for read in reads)


def _arithmetic(profile: Profile, whole: Stage) -> Finding:
    machine, work = profile.machine, profile.work
    assert work is not None
    parts = profile.stage(STEP_ALONE) or whole
    seconds = parts.seconds(FORWARD) + parts.seconds(BACKWARD)
    flop_per_s = work.train_flop * profile.batch_size / seconds
    near_matrix, near_copy = flop_per_s / machine.matrix_flop_per_s, work.bytes / seconds / machine.copy_bytes_per_s
    rate = f"{flop_per_s / 1e12:.3g} TFLOP/s" if flop_per_s >= 1e12 else f"{flop_per_s / 1e9:.3g} GFLOP/s"
    text = (
        f"the arithmetic: forward and backward are {seconds / parts.whole.median_s:.0%} of a step. They reach {rate}, "
        f"{near_matrix:.0%} of the {machine.dtype} rate of the largest products here, and {near_copy:.0%} of the "
        "memory's copy rate. "
    )
    gain = machine.bf16_flop_per_s / machine.matrix_flop_per_s
    if machine.dtype == "float32" and gain > _FASTER_BF16:
        text += f'training.precision = "bf16" may help: products in it are {gain:.1f} times as fast.'
    elif max(near_matrix, near_copy) < _NEAR_ROOF:
        text += "Its layers are too small for either: a larger training.batch_size may help."
    else:
        more = "GPUs" if machine.is_gpu else "cores, or a GPU"
        text += f"Nothing in the recipe holds it back: more {more} would help."
    return Finding(name="arithmetic", lost=0, sentence=text)

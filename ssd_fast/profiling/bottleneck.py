"""What bounds a run, from its profile: for each known way to lose time, how much is lost to it, and the way out.

A loss is what a step takes beyond what it would have to:
- input: what a step takes longer when its batches come from images than when they are there;
- allreduce: what backward does not hide, on the rank that waits least; uneven ranks: what others wait longer;
- optimizer: beyond a few times what its bytes take at the measured copy rate;
- loss: beyond a small share of what forward and backward take;
- batch: what half a step with twice the images takes less;
- host: what lies between the parts, and where a GPU is idle though its input is there.
The largest loss bounds the run if it is more than a seventh of it. Otherwise the arithmetic does.
"""

from collections.abc import Iterator
from statistics import median

from ssd_fast.parts import BACKWARD, FORWARD, INPUT, LOSS, OPTIMIZER
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, REST, STEP_ALONE, Finding, Profile, Stage

BOUNDING, WORTH_NAMING = 0.15, 0.03  # of the time
_SGD_TRANSFERS = 7  # per weight: gradient checked, then weight, gradient and momentum read and two of them written
_SLACK = 3.0  # times that the optimizer may take longer than its bytes
_USUAL_LOSS = 0.15  # of forward and backward
_SLOW_READING = 0.3  # of the input's time
_FASTER_BF16 = 1.3
_NEAR_ROOF = 0.5


def find_bottlenecks(profile: Profile) -> list[Finding]:
    """The first bounds the run, the others are worth to be named; empty if only evaluation was measured."""
    whole = profile.stage(BOTH) or profile.stage(STEP_ALONE)
    if whole is None:
        fed = profile.stage(INPUT_ALONE)
        found = [Finding(name="input", lost=0, sentence=f"the input: {_explain_part(profile, fed)}")] if fed else []
    else:
        losses = sorted(_losses(profile, whole), key=lambda finding: finding.lost, reverse=True)
        found = [finding for finding in losses if finding.lost >= WORTH_NAMING]
        if not found or found[0].lost < BOUNDING:
            found.insert(0, _arithmetic(profile, whole))
        found += _host_reads(profile)
    return [
        finding.model_copy(update={"sentence": ("Also: " if number else "Bound by ") + finding.sentence})
        for number, finding in enumerate(found)
    ]


def _losses(profile: Profile, whole: Stage) -> Iterator[Finding]:
    step_s = whole.whole.median_s
    alone, work = profile.stage(STEP_ALONE), profile.work
    parts = alone or whole
    input_s = 0.0
    if whole.name == BOTH:
        input_s = max(whole.seconds(INPUT), step_s - alone.whole.median_s if alone else 0.0)
        yield _input(profile, whole, input_s / step_s)
    if profile.machine.ranks > 1:
        yield from _ranks(profile, step_s)
    ideal_s = 0.0
    if work:
        bytes_s = _SGD_TRANSFERS * work.parameter_bytes / profile.machine.copy_bytes_per_s
        ideal_s = _SLACK * bytes_s
        yield Finding(
            name="optimizer",
            lost=(parts.seconds(OPTIMIZER) - ideal_s) / step_s,
            sentence=f"the optimizer: it takes {1e3 * parts.seconds(OPTIMIZER):.3g} ms a step, where to read and write "
            f"{work.parameter_bytes / 1e6:.0f} MB of weights, gradients and momentum takes {1e3 * bytes_s:.2g} ms. "
            "Look for what else happens in it (ssd_fast/training/optim.py, TrainStep.__call__).",
        )
        arithmetic_s = parts.seconds(FORWARD) + parts.seconds(BACKWARD)
        yield Finding(
            name="loss",
            lost=(parts.seconds(LOSS) - _USUAL_LOSS * arithmetic_s) / step_s,
            sentence=f"the loss: it takes {parts.seconds(LOSS) / arithmetic_s:.0%} of what forward and backward take. "
            "Look for what else happens in it than kernels.multibox_loss (ssd_fast/model/loss.py, TrainStep.__call__).",
        )
    if profile.doubled and alone:
        doubled_s = sum(profile.doubled.values())
        once, twice = (
            sum(seconds(part) for part in (FORWARD, LOSS, BACKWARD))
            for seconds in (alone.seconds, lambda part: profile.doubled[part])
        )
        saved_s = once - twice / 2 + min(alone.seconds(OPTIMIZER), ideal_s) / 2
        yield Finding(
            name="batch",
            lost=saved_s / step_s,
            sentence=f"a small batch: with training.batch_size = {2 * profile.batch_size} in place of "
            f"{profile.batch_size} the step alone trains {2 * alone.whole.median_s / doubled_s:.2f} times as many "
            "images a second.",
        )
    yield _host(profile, parts.seconds(REST) / step_s, input_s / step_s)


def _input(profile: Profile, both: Stage, lost: float) -> Finding:
    fed, alone = profile.stage(INPUT_ALONE), profile.stage(STEP_ALONE)
    if fed is None or alone is None:
        text = f"{lost:.0%} of a step waits for it. --stage all says which part of it is slow."
    elif fed.whole.median_s > alone.whole.median_s:
        text = (
            f"alone it makes {fed.images_per_s:.4g} images/s, the step could train {alone.images_per_s:.4g}. "
            + _explain_part(profile, fed)
        )
    else:
        text = (
            f"alone it makes {fed.images_per_s:.4g} images/s, more than the {alone.images_per_s:.4g} of the step, but "
            f"together they train {both.images_per_s:.4g}: both want the same cores. More of them for each rank help."
        )
    return Finding(name="input", lost=lost, sentence=f"the input: {text}")


def _explain_part(profile: Profile, fed: Stage) -> str:
    """Which part of the input is slow, and what to change."""
    cores, threads = profile.machine.cores, profile.config["data"]["num_threads"]
    longest = max(fed.parts, key=lambda part: part.median_s)
    read = fed.parts[0]
    if read.median_s > _SLOW_READING * fed.whole.median_s:
        return (
            f"{read.name} takes {read.median_s / fed.whole.median_s:.0%} of its time: the disk. Put the data where it "
            "is read faster, or into memory."
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
        "training.batch_size makes it rarer, distributed.fp16_compression = true halves its bytes; the variables of "
        "the network are explained in run.slurm.",
    )
    slowest = max(range(len(waits_s)), key=lambda rank: profile.ranks[rank].compute_s or 0.0)
    lost = (median(waits_s) - min(waits_s)) / step_s
    yield Finding(
        name="uneven ranks",
        lost=lost,
        sentence=f"uneven ranks: {lost:.0%} of a step waits for the slowest, rank {slowest} on "
        f"{profile.ranks[slowest].host}. Look at its clocks, its cores and what else runs there.",
    )


def _host(profile: Profile, between: float, waiting: float) -> Finding:
    busy = profile.work.gpu_busy if profile.work else None
    idle = 0.0 if busy is None else 1 - busy - waiting
    if idle > between:
        reads = profile.work.host_reads if profile.work else ()
        text = f"the host: {idle:.0%} of the time the GPU has nothing to do though its input is there. "
        if reads:
            text += f"It waits for the device to read a value, {_listed(profile)}: leave that out."
        else:
            text += "Kernels are shorter than the host takes to launch them: a larger training.batch_size helps."
        return Finding(name="host", lost=idle, sentence=text)
    text = f"the host: {between:.0%} of a step lies between its parts. "
    text += "Look into the loop around it (ssd_fast/training/loop.py)."
    return Finding(name="host", lost=between, sentence=text)


def _host_reads(profile: Profile) -> list[Finding]:
    if not profile.work or not profile.work.host_reads:
        return []
    cost = "every step waits for that" if profile.machine.is_gpu else "free on a CPU, on a GPU every step waits for it"
    sentence = f"the host reads values of the device, {_listed(profile)}: {cost}. Read them once in a window of steps."
    return [Finding(name="host reads", lost=0, sentence=sentence)]


def _listed(profile: Profile) -> str:
    reads = profile.work.host_reads if profile.work else ()
    return ", ".join(f"{read.times} a step at {read.place}" for read in reads)


def _arithmetic(profile: Profile, whole: Stage) -> Finding:
    machine, work = profile.machine, profile.work
    assert work is not None
    parts = profile.stage(STEP_ALONE) or whole
    seconds = parts.seconds(FORWARD) + parts.seconds(BACKWARD)
    share = seconds / parts.whole.median_s
    flop_per_s = work.train_flop * profile.batch_size / seconds
    near_matrix, near_copy = flop_per_s / machine.matrix_flop_per_s, work.bytes / seconds / machine.copy_bytes_per_s
    text = (
        f"the arithmetic: forward and backward are {share:.0%} of a step. They reach {_flops(flop_per_s)}, "
        f"{near_matrix:.0%} of the {machine.dtype} rate that the largest products reach here, and {near_copy:.0%} of "
        "the memory's copy rate. "
    )
    gain = machine.bf16_flop_per_s / machine.matrix_flop_per_s
    if machine.dtype == "float32" and gain > _FASTER_BF16:
        text += f'training.precision = "bf16" may help: in it products are {gain:.1f} times as fast.'
    elif max(near_matrix, near_copy) < _NEAR_ROOF:
        text += "Its layers are too small for either: a larger training.batch_size may help."
    else:
        text += (
            f"Nothing in the recipe holds it back: more {'GPUs' if machine.is_gpu else 'cores, or a GPU'} would help."
        )
    return Finding(name="arithmetic", lost=0, sentence=text)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"

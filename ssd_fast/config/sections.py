"""The configuration of a run: frozen, validated classes, one for each section of a recipe.

Every key has its default here and nowhere else; the defaults are the SSD300 recipe of MLPerf Training. Values that
follow from others (grid sizes, the learning rate of a step) are functions, never keys.
"""

import math
from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from dali_pipelines.batch import Augmentation, Fraction

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Percentile = Literal[50, 90, 95, 97, 99]


class _Section(BaseModel):
    model_config = Augmentation.model_config  # frozen and strict; unknown keys are errors


class ModelConfig(_Section):
    """The network and its anchors. Feature maps, anchors and heads follow from these keys."""

    image_size: Annotated[int, Field(ge=64)] = 300
    """Width and height of the network's input, pixels."""
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet34"
    """Name of the torchvision ResNet. It is cut after layer3, whose first block gets stride 1."""
    backbone_weights: Annotated[str, Field(min_length=1)] = "imagenet"
    """"imagenet" (torchvision's, downloaded once), "none", or the path of a state dict of that ResNet."""
    initial_checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """Path of a detector to fine-tune: a checkpoint of ssd_fast or weights of the MLPerf reference. It replaces
    backbone_weights. Heads of other classes are initialised afresh."""
    frozen_statistics: bool = False
    """Normalise by the BatchNorm statistics of the initial weights in training too, and leave them as they are. For
    fine-tuning: those of a few images are noise."""
    extra_channels: tuple[tuple[PositiveInt, PositiveInt], ...] = (
        (256, 512),
        (256, 512),
        (128, 256),
        (128, 256),
        (128, 256),
    )
    """Output channels of the 1x1 and the 3x3 convolution of each extra block."""
    extra_strides: tuple[PositiveInt, ...] = (2, 2, 2, 1, 1)
    """Stride of the 3x3 convolution of each extra block."""
    extra_paddings: tuple[Annotated[int, Field(ge=0)], ...] = (1, 1, 1, 0, 0)
    """Padding of the 3x3 convolution of each extra block."""
    head_stride: PositiveInt = 1
    """Stride of every 3x3 head convolution (padding 1): 1 for training at 300, 3 for the benchmark at 1200."""
    anchor_steps: tuple[PositiveFloat, ...] = (8, 16, 32, 64, 100, 300)
    """Distance between anchor centres on each level, pixels of the network's input."""
    anchor_scales: tuple[PositiveFloat, ...] = (21, 45, 99, 153, 207, 261, 315)
    """Anchor size of each level, pixels, and one more, which enters the geometric mean of the last level."""
    aspect_ratios: tuple[tuple[PositiveFloat, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    """Per level: ratios a other than 1; each gives an a:1 and a 1:a anchor."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.aspect_ratios)
        if levels == 0:
            raise ValueError("aspect_ratios = []: expected at least one level")
        expected = {
            "extra_channels": levels - 1,
            "extra_strides": levels - 1,
            "extra_paddings": levels - 1,
            "anchor_steps": levels,
            "anchor_scales": levels + 1,
        }
        for key, count in expected.items():
            found = len(getattr(self, key))
            if found != count:
                raise ValueError(
                    f"{key} has {found} entries: expected {count}, because aspect_ratios has {levels} levels"
                )
        if list(self.anchor_scales) != sorted(set(self.anchor_scales)):
            raise ValueError(f"anchor_scales = {list(self.anchor_scales)}: expected strictly increasing sizes")
        for level, (size, step) in enumerate(zip(self.grid_sizes(), self.anchor_steps, strict=True)):
            if size < 1:
                raise ValueError(
                    f"image_size = {self.image_size}: the feature map of level {level} would be empty; "
                    "expected a larger image, or fewer or less strided extra blocks"
                )
            if abs(self.image_size / step - size) >= 1:
                raise ValueError(
                    f"anchor_steps[{level}] = {step:g}: expected about {self.image_size / size:.4g}, because "
                    f"image_size = {self.image_size} gives this level a grid of {size} x {size}"
                )
        return self

    def feature_sizes(self) -> tuple[int, ...]:
        """Width (and height) of every level's feature map, before the heads' stride."""
        size = self.image_size
        for kernel, padding in ((7, 3), (3, 1), (3, 1)):  # stem, max-pool, layer2; layer3 keeps its input's size
            size = _conv_size(size, kernel, 2, padding)
        sizes = [size]
        for stride, padding in zip(self.extra_strides, self.extra_paddings, strict=True):
            sizes.append(_conv_size(sizes[-1], 3, stride, padding))
        return tuple(sizes)

    def grid_sizes(self) -> tuple[int, ...]:
        """Width (and height) of every level's grid of predictions, after the heads' stride."""
        return tuple(_conv_size(size, 3, self.head_stride, 1) for size in self.feature_sizes())

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Number of anchor shapes of every level: two of ratio 1 and two for each other ratio."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)


def _conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


class DataConfig(_Section):
    """The data set and the input pipeline. Paths are relative to the folder given by --data."""

    train_images: str = "train2017"
    """Folder of the training images."""
    train_annotations: str = "annotations/instances_train2017.json"
    """COCO instances JSON of the training images."""
    val_images: str = "val2017"
    """Folder of the validation images."""
    val_annotations: str = "annotations/instances_val2017.json"
    """COCO instances JSON of the validation images."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to learn, in label order. Unset: all categories of the annotation file."""
    train_on_crowds: bool = False
    """Use boxes with iscrowd = 1 as ground truths in training."""
    bad_images: Literal["error", "skip"] = "error"
    """Reaction to a missing or undecodable image: "error" ends the run, "skip" leaves the image out and reports it."""
    max_image_pixels: PositiveInt = 178_956_970
    """Pixels of the largest image that is accepted; a larger one is a bad image. The default is Pillow's own limit."""
    bad_boxes: Literal["error", "skip"] = "skip"
    """Reaction to a box without area inside its image: "error" ends the run, "skip" leaves it out and reports it."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the input pipeline of each rank; 0 means one more than the rank's cores."""
    prefetch_batches: PositiveInt = 2
    """Batches prepared ahead of the training step."""
    hw_decoder_load: Fraction = 0.9
    """Share of the JPEG images that the GPU's hardware decoder takes, on GPUs that have one (A100, H100 and later)."""
    box_encoder: Literal["auto", "dali", "kernels"] = "auto"
    """Encoder of the targets: "dali" runs in the pipeline; "kernels" is this project's operator, which breaks ties
    between anchors of equal IoU as the MLPerf reference does; "auto" is "kernels" on a CPU and "dali" on a GPU."""

    @model_validator(mode="after")
    def _classes_are_different(self) -> Self:
        repeated = [name for name, count in Counter(self.classes or ()).items() if count > 1]
        if repeated:
            raise ValueError(f"classes names {repeated} more than once: expected every class once")
        return self


class OptimizerConfig(_Section):
    """SGD and its learning-rate schedule."""

    learning_rate: PositiveFloat = 2.5e-3
    """Learning rate for a global batch of 32; it is scaled in proportion to the global batch."""
    learning_rate_quantum: Annotated[float, Field(ge=0)] = 2.5e-3
    """The scaled learning rate is rounded to a multiple of this, at least one; 0 turns rounding off."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty on the weights."""
    weight_decay_on_norm_and_bias: bool = True
    """Apply weight decay to BatchNorm parameters and biases too, as the published recipes do."""
    warmup_steps: Annotated[int, Field(ge=0)] = 300
    """Steps of linear warm-up from 0."""
    schedule: Literal["steps", "cosine"] = "steps"
    """Fall of the learning rate: "steps" after decay_epochs, as in the published recipes, or "cosine", along half a
    period of it to 0 at the end of training.epochs."""
    decay_epochs: tuple[PositiveFloat, ...] = (44, 55)
    """Epochs after which the learning rate is multiplied by decay_factor, with schedule = "steps"."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor by which the learning rate falls after each of decay_epochs."""
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of the gradient. Unset: no clipping."""
    implementation: Literal["torch", "apex"] = "torch"
    """Fused SGD of PyTorch, or of NVIDIA apex (GPU only)."""

    @model_validator(mode="after")
    def _epochs_ascend(self) -> Self:
        if list(self.decay_epochs) != sorted(set(self.decay_epochs)):
            raise ValueError(f"decay_epochs = {list(self.decay_epochs)}: expected strictly increasing epochs")
        return self

    def effective_learning_rate(self, global_batch_size: int) -> float:
        """Learning rate after warm-up and before decay (NVIDIA's MLPerf rule of scaling and rounding)."""
        scaled = self.learning_rate * global_batch_size / 32
        if self.learning_rate_quantum == 0:
            return scaled
        return self.learning_rate_quantum * max(1, round(scaled / self.learning_rate_quantum))

    def learning_rate_at(self, step: int, *, global_batch_size: int, steps_per_epoch: int, epochs: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run. epochs: of the whole run."""
        rate = self.effective_learning_rate(global_batch_size)
        if step < self.warmup_steps:
            rate *= step / self.warmup_steps
        if self.schedule == "cosine":
            return rate * (1 + math.cos(math.pi * min(1.0, step / (steps_per_epoch * epochs)))) / 2
        decays = sum(step >= math.ceil(epoch * steps_per_epoch) for epoch in self.decay_epochs)
        return rate * self.decay_factor**decays


class TrainingConfig(_Section):
    """The training loop and its checkpoints."""

    epochs: PositiveInt = 80
    """Largest number of epochs; training stops earlier at evaluation.target_map."""
    batch_size: PositiveInt = 32
    """Images in a step of each rank; the global batch is this times the number of ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights, shuffling and augmentation."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the network. "auto" is bf16 where the CPU or GPU has instructions for it; else fp32 on a CPU,
    and fp16 with loss scaling on a GPU."""
    log_every_steps: PositiveInt = 20
    """Steps between two readings of the losses, the only moments at which the host waits for the device."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 20
    """Consecutive steps with a non-finite loss that the run survives. Such steps do not change the weights."""
    checkpoint_every_epochs: PositiveInt = 1
    """Epochs between checkpoints. Every evaluation is followed by a checkpoint as well."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints within an epoch. Unset: none."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints that are kept, besides the best."""


class EvaluationConfig(_Section):
    """When and how a model is scored."""

    epochs: tuple[PositiveInt, ...] = (33, 44, 50, 55, 61, 66, 71, 77)
    """Epochs after which the model is evaluated. The last epoch of a run is always evaluated."""
    target_map: Fraction = 0.23
    """COCO mAP at which training stops; 1 trains to the last epoch."""
    patience: PositiveInt | None = None
    """Number of evaluations in a row without a better mAP after which training stops. Unset: it does not."""
    batch_size: PositiveInt = 32
    """Images in an evaluation batch of each rank."""


class DetectionConfig(_Section):
    """Decoding of predictions and non-maximum suppression."""

    score_threshold: Fraction = 0.05
    """Detections at or below this probability are dropped."""
    iou_threshold: Fraction = 0.5
    """Non-maximum suppression drops a box that overlaps a better box of its class by this IoU or more."""
    max_per_class: PositiveInt = 200
    """Number of best boxes of a class that enter non-maximum suppression."""
    max_detections: PositiveInt = 200
    """Number of best detections of an image that are kept."""


class InferenceConfig(_Section):
    """How a trained network is computed by evaluate, detect, benchmark, and from Python. Training is not affected."""

    backend: Literal["torch", "openvino"] = "torch"
    """Library that computes the network. "openvino" is faster on a CPU; it needs the package openvino."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Number format of the network. "auto" is that of training.precision. "int8" needs the backend openvino and a
    network from `ssd-fast quantize`."""

    @model_validator(mode="after")
    def _backend_has_precision(self) -> Self:
        lacking = {"torch": "int8", "openvino": "fp16"}[self.backend]
        if self.precision == lacking:
            other = "openvino" if lacking == "int8" else "torch"
            raise ValueError(f"precision = '{lacking}': expected backend = '{other}' with it, not '{self.backend}'")
        return self


class SystemConfig(_Section):
    """The machines that a recipe was written for. Unset: any."""

    nodes: PositiveInt | None = None
    """Number of nodes that run.slurm expects."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each node; each GPU has one rank."""


class DistributedConfig(_Section):
    """Training on several ranks. A single process ignores these keys."""

    fp16_compression: bool = False
    """Send gradients as float16: half the traffic, less exact means."""
    gradient_predivide: PositiveFloat = 1.0
    """Divisor of gradients before they are summed over the ranks; afterwards they are divided by ranks / this, so that
    float16 does not overflow. Unless it is 1, the last bits of a sum over more than two ranks depend on timing."""
    batch_norm_group: Literal[1, 2, 4, 8] = 1
    """Number of neighbouring ranks that share BatchNorm statistics, for small batches per rank. Above 1 it needs apex's
    groupbn, fp16, and GPUs of one node."""
    timeout_s: Annotated[float, Field(ge=5)] = 300.0
    """Seconds after which a lost or hanging rank ends the run."""


class BenchmarkConfig(_Section):
    """MLPerf LoadGen's settings. The defaults are those of MLPerf Inference v2.0, the last round with this detector.

    Source: that round's mlperf.conf and inference_rules.adoc.
    """

    performance_samples: PositiveInt = 64
    """Number of images held in memory, from which LoadGen draws at random in a performance run."""
    min_duration_s: Annotated[float, Field(ge=0)] = 600.0
    """Shortest duration of a valid run, seconds."""
    single_stream_min_queries: PositiveInt = 1024
    """SingleStream: least number of queries, of one image each."""
    single_stream_percentile: Percentile = 90
    """SingleStream: percentile of the latency that is reported."""
    multi_stream_min_queries: PositiveInt = 270336
    """MultiStream: least number of queries."""
    multi_stream_samples: PositiveInt = 8
    """MultiStream: images in a query, which are one batch."""
    multi_stream_percentile: Percentile = 99
    """MultiStream: percentile of the latency of a query that is reported."""
    server_min_queries: PositiveInt = 270336
    """Server: least number of queries, of one image each, which arrive at random times."""
    server_percentile: Percentile = 99
    """Server: percentile of the latency that must stay within server_latency_ms."""
    server_latency_ms: PositiveFloat = 100.0
    """Server: bound on the latency, milliseconds."""
    server_qps: PositiveFloat = 1.0
    """Server: load of a run, queries per second; --find-load searches upwards from it."""
    server_batch_size: PositiveInt = 8
    """Server: largest batch. Twice its time should lie within server_latency_ms."""
    offline_min_samples: PositiveInt = 24576
    """Offline: least number of images, all in one query."""
    offline_batch_size: PositiveInt = 32
    """Offline: images in a batch."""
    offline_qps: PositiveFloat | None = None
    """Offline: expected images per second, which determines the number of images. Unset: measured beforehand."""


class Config(_Section):
    """The configuration of a run: one field for each section of a recipe."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augmentation: Augmentation = Augmentation()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    detection: DetectionConfig = DetectionConfig()
    inference: InferenceConfig = InferenceConfig()
    system: SystemConfig = SystemConfig()
    distributed: DistributedConfig = DistributedConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

"""A run is one complete configuration: TOML recipes read into frozen, validated classes.

A recipe may name one other as its `base` and hold only the keys that differ. Values that follow from others (grid
sizes, the learning rate of a step) are functions, never keys.
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Range = tuple[PositiveFloat, PositiveFloat]
Percentile = Literal[50, 90, 95, 97, 99]


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the file, the key, its value and what was expected."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ModelConfig(_Section):
    """Network and anchors; feature maps, anchors and heads all follow from these keys."""

    image_size: Annotated[int, Field(ge=64)]
    """Width and height of the network's input, pixels."""
    backbone: Literal["resnet18", "resnet34", "resnet50"]
    """torchvision ResNet, used up to layer3, whose first block has stride 1."""
    backbone_weights: Annotated[str, Field(min_length=1)]
    """"imagenet" (torchvision's, downloaded once), "none", or the path of a state dict of that ResNet."""
    initial_checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """Path of a detector to fine-tune (a checkpoint of this program, or weights of the MLPerf reference), in place of
    backbone_weights; heads of other classes are initialised anew."""
    extra_channels: tuple[tuple[PositiveInt, PositiveInt], ...]
    """Per extra block: channels of its 1x1 and of its 3x3 convolution."""
    extra_strides: tuple[PositiveInt, ...]
    """Per extra block: stride of the 3x3 convolution."""
    extra_paddings: tuple[Annotated[int, Field(ge=0)], ...]
    """Per extra block: padding of the 3x3 convolution."""
    head_stride: PositiveInt
    """Stride of every 3x3 head convolution (padding 1): 1 for training at 300, 3 for the benchmark at 1200."""
    anchor_steps: tuple[PositiveFloat, ...]
    """Per level: distance between anchor centres, pixels of the network's input."""
    anchor_scales: tuple[PositiveFloat, ...]
    """Anchor sizes in pixels, one per level and one more for the last level's geometric mean."""
    aspect_ratios: tuple[tuple[PositiveFloat, ...], ...]
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
    """Where images come from. Paths are relative to the data folder of the command line (COCO's own layout)."""

    train_images: str
    """Folder of the training images."""
    train_annotations: str
    """COCO instances JSON of the training images."""
    val_images: str
    """Folder of the validation images."""
    val_annotations: str
    """COCO instances JSON of the validation images."""
    classes: tuple[str, ...] | None = None
    """Names of the categories to learn, in label order; left out, all categories of the annotation file."""
    train_on_crowds: bool
    """Whether boxes with iscrowd = 1 are ground truths in training."""
    bad_images: Literal["error", "skip"]
    """What a missing or undecodable image does: end the run, or be left out with a counted warning."""
    bad_boxes: Literal["error", "skip"]
    """What a box without area or outside its image does: end the run, or be left out with a counted warning."""
    num_threads: Annotated[int, Field(ge=0)]
    """CPU threads of the input pipeline of each rank; 0 is one more than the cores that the process may use."""
    prefetch_batches: PositiveInt
    """Batches prepared ahead of the training step."""
    hw_decoder_load: Fraction = 0.9
    """Share of the JPEG images that a GPU's hardware decoder takes, where there is one (from A100 and H100 on)."""
    box_encoder: Literal["auto", "dali", "kernels"] = "auto"
    """Who turns boxes into targets: DALI, in the pipeline, or this project's operator, which decides between anchors of
    equal IoU as the MLPerf reference does; "auto" takes the faster one of the device."""


class AugmentationConfig(_Section):
    """Random changes of training images (SSD crop and photometric distortion)."""

    crop_min_ious: tuple[Fraction, ...]
    """The crop's options: every kept box must overlap it by at least this IoU; 0 leaves the crop unconstrained."""
    crop_allow_none: bool
    """Whether "no crop" is one more option, as likely as each of crop_min_ious."""
    crop_sides: tuple[Fraction, Fraction]
    """Range of the crop's width and height, fractions of the image's."""
    crop_aspect: Range
    """Range of the crop's width / height, both taken as fractions."""
    crop_attempts: PositiveInt
    """Crops tried per option before another option is drawn."""
    brightness: Range
    """Range of the brightness factor."""
    contrast: Range
    """Range of the contrast factor."""
    saturation: Range
    """Range of the saturation factor."""
    hue_degrees: Annotated[float, Field(ge=0, le=180)]
    """Largest rotation of the hue, degrees, either way."""
    flip_probability: Fraction
    """Chance of a horizontal flip."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for key in ("crop_sides", "crop_aspect", "brightness", "contrast", "saturation"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} = [{low:g}, {high:g}]: expected [low, high] with low <= high")
        if not self.crop_min_ious and not self.crop_allow_none:
            raise ValueError("crop_min_ious = [] with crop_allow_none = false: expected at least one option")
        return self


class OptimizerConfig(_Section):
    """SGD and its schedule."""

    learning_rate: PositiveFloat
    """Learning rate for a global batch of 32; the effective one grows with the global batch."""
    learning_rate_quantum: Annotated[float, Field(ge=0)]
    """The effective learning rate is rounded to a multiple of this, at least one; 0 does not round."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    weight_decay_on_norm_and_bias: bool
    """Whether BatchNorm parameters and biases decay too, as in the published recipes."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up from 0."""
    decay_epochs: tuple[PositiveFloat, ...]
    """Epochs after which the learning rate is multiplied by decay_factor."""
    decay_factor: Annotated[float, Field(gt=0, le=1)]
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of the gradient; left out, no clipping."""
    implementation: Literal["torch", "apex"] = "torch"
    """Whose fused SGD it is, PyTorch's or NVIDIA apex's (GPU only)."""

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

    def learning_rate_at(self, step: int, *, global_batch_size: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        rate = self.effective_learning_rate(global_batch_size)
        if step < self.warmup_steps:
            rate *= step / self.warmup_steps
        decays = sum(step >= math.ceil(epoch * steps_per_epoch) for epoch in self.decay_epochs)
        return rate * self.decay_factor**decays


class TrainingConfig(_Section):
    """The loop."""

    epochs: PositiveInt
    """Most epochs to train."""
    batch_size: PositiveInt
    """Images per step on each rank."""
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    """Of weights, shuffling and augmentation."""
    precision: Literal["auto", "fp32", "fp16", "bf16"]
    """Arithmetic of the network; "auto" is fp32 on a CPU, bf16 on a GPU that has it, else fp16 with loss scaling."""
    log_every_steps: PositiveInt
    """Steps between two readings of the metrics (the only moments at which the host waits for the device)."""
    max_nonfinite_steps: Annotated[int, Field(ge=0)]
    """Steps in a row with a loss that is not finite that the run survives; they leave the weights as they were."""
    checkpoint_every_epochs: PositiveInt
    """Epochs between checkpoints; there is one after every evaluation, too."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints within an epoch; left out, none."""
    keep_checkpoints: PositiveInt
    """Newest checkpoints kept, besides the best."""


class EvaluationConfig(_Section):
    """When and how a model is scored."""

    epochs: tuple[PositiveInt, ...]
    """Epochs after which the model is evaluated, besides the run's last; those beyond it are not reached."""
    target_map: Fraction
    """COCO mAP at which training stops; 1 lets it go on to its last epoch."""
    batch_size: PositiveInt
    """Images per evaluation batch on each rank."""


class DetectionConfig(_Section):
    """From predictions to boxes."""

    score_threshold: Fraction
    """Detections at or under this probability are dropped."""
    iou_threshold: Fraction
    """Non-maximum suppression drops a box that overlaps a better one of its class by this IoU or more."""
    max_per_class: PositiveInt
    """Best boxes of a class that enter suppression."""
    max_detections: PositiveInt
    """Best boxes of an image that are kept."""


class DistributedConfig(_Section):
    """How several processes train together; one alone has no use for it."""

    fp16_compression: bool = False
    """Whether gradients travel as float16; their means are then less exact."""
    gradient_predivide: PositiveFloat = 1.0
    """Gradients are divided by this before they are added up over the ranks, and by size / this after it, so that
    float16 does not overflow. Unless 1, the last bits of a sum over more than two ranks depend on timing."""
    batch_norm_group: Literal[1, 2, 4, 8] = 1
    """Neighbouring ranks over which BatchNorm takes its statistics (apex's groupbn; GPUs of one node, fp16): for few
    images per rank."""
    timeout_s: Annotated[float, Field(ge=5)] = 300.0
    """Seconds after which a rank that is lost or hangs ends the run."""


class BenchmarkConfig(_Section):
    """MLPerf LoadGen's settings. The defaults are those of MLPerf Inference v2.0, the last round with this detector.

    Source: that round's mlperf.conf and inference_rules.adoc.
    """

    performance_samples: PositiveInt = 64
    """Images that are held in memory and asked for at random when performance is measured."""
    min_duration_s: Annotated[float, Field(ge=0)] = 600.0
    """Least duration of a valid run, seconds."""
    single_stream_min_queries: PositiveInt = 1024
    """Least number of queries, one image each and one at a time."""
    single_stream_percentile: Percentile = 90
    """Percentile of the latency that is the result."""
    multi_stream_min_queries: PositiveInt = 270336
    """Least number of queries, one at a time."""
    multi_stream_samples: PositiveInt = 8
    """Images of a query; they are one batch."""
    multi_stream_percentile: Percentile = 99
    """Percentile of a query's latency that is the result."""
    server_min_queries: PositiveInt = 270336
    """Least number of queries, one image each, which come at random times."""
    server_percentile: Percentile = 99
    """Percentile of the latency that must not exceed the bound."""
    server_latency_ms: PositiveFloat = 100.0
    """The bound, milliseconds."""
    server_qps: PositiveFloat = 1.0
    """Queries a second: the load that a run claims, and the one from which --find-load goes up."""
    server_batch_size: PositiveInt = 8
    """Most queries that are computed together; twice the time of such a batch should lie within the bound."""
    offline_min_samples: PositiveInt = 24576
    """Least number of images, all in one query."""
    offline_batch_size: PositiveInt = 32
    """Images that are computed together."""
    offline_qps: PositiveFloat | None = None
    """Expected images a second, from which follows how many there are; left out, measured before."""


class Config(_Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    augmentation: AugmentationConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    detection: DetectionConfig
    distributed: DistributedConfig = DistributedConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a recipe.

    path: TOML file; its top-level key `base` may name another, relative to it, which has no `base` of its own.
    overrides: "section.key=value" each, the value in TOML's own notation (a bare word is a string).
    Raises ConfigError, which lists every key that is unknown, missing, ill-typed or in contradiction with another.
    """
    values = _read_toml(path)
    base = values.pop("base", None)
    if base is not None:
        base_path = path.parent / str(base)
        base_values = _read_toml(base_path)
        if "base" in base_values:
            raise ConfigError(
                f"{base_path}: base = {base_values['base']!r}: the base of {path} may not have a base itself"
            )
        values = _merge(base_values, values)
    return validate_config(values, source=str(path), overrides=overrides)


def override_config(config: Config, overrides: Sequence[str], *, source: str) -> Config:
    """The configuration with some keys changed, as `load_config` does; source is named in errors."""
    return validate_config(config.model_dump(exclude_none=True), source=source, overrides=overrides)


def validate_config(values: dict[str, Any], *, source: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a plain dictionary with overrides; source is named in errors."""
    values = _merge({}, values)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(problem)}" for problem in error.errors())) from None


def dump_toml(config: Config) -> str:
    """The configuration as a complete recipe; `load_config` gives an equal one back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not separator or not dot or not section or not name or "." in name:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = values.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override}: {section} is not a section")
    values[section] = table | {name: value}


def _tuples(value: Any) -> Any:
    """TOML's arrays as tuples, which strict validation wants."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    match problem["type"]:
        case "missing":
            return f"{key} is missing: expected a value"
        case "extra_forbidden":
            return f"{key} = {problem['input']!r}: unknown key"
        case "value_error":  # of a whole section: the message begins with the key
            return f"{key}.{message}" if key else message
        case _:
            return f"{key} = {problem['input']!r}: expected {message}"

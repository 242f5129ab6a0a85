"""The network as OpenVINO computes it on a CPU. Owner of OpenVINO's and NNCF's packages.

A batch of one image uses all cores for it. Of a larger batch, OpenVINO computes several images side by side.
"""

import functools
import hashlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssd_fast.config.sections import Config
from ssd_fast.files import write_atomically
from ssd_fast.hardware import compute_dtype
from ssd_fast.model.ssd import SSD, Predictions

if TYPE_CHECKING:
    import openvino

# With this module, both packages would report their use to their maker, from forks that end in crashes where DALI is in
# use, and leave files in the home directory.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

LEAST_SHARE = 0.99  # of float32's mAP, which MLPerf asks of a quantized network
_RECORD, _GRAPH, _WEIGHTS = "quantization.json", "network.xml", "network.bin"


@functools.cache
def core() -> "openvino.Core":
    """The one OpenVINO runtime of the process.

    Its CPU plugin gives the thread a stack for signals. When a plugin ends, that stack is unmapped but stays the
    thread's, and the next signal ends the process. So one plugin is loaded before any other and never ends.
    """
    import openvino

    runtime = openvino.Core()
    runtime.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return runtime


class BackendError(ValueError):
    """A network that OpenVINO cannot compute here; the message says why and what to do."""


class Quantization(NamedTuple):
    """How a network was quantized.

    checkpoint_sha256: of the file that it was made from. num_images: images that its ranges come from.
    map_float32, map_int8: COCO mAP on the validation images.
    """

    checkpoint_sha256: str
    num_images: int
    map_float32: float
    map_int8: float
    openvino: str
    nncf: str

    def is_accurate(self) -> bool:
        return self.map_int8 >= LEAST_SHARE * self.map_float32


class OpenVINONetwork:
    """A network on the CPU, called like `SSD` in evaluation mode.

    number_format: what it computes in, in words.
    """

    def __init__(self, model: "openvino.Model", precision: str, num_threads: int) -> None:
        """model: for one image, as `convert` makes it; changed. precision: fp32, bf16, or int8 of a quantized one."""
        import openvino
        from openvino.preprocess import PrePostProcessor

        prepared = PrePostProcessor(model)
        prepared.input().tensor().set_layout(openvino.Layout("NHWC"))  # as the input pipeline lays images out
        prepared.input().model().set_layout(openvino.Layout("NCHW"))
        self._model = prepared.build()
        self._settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # other processes and the input pipeline use the same cores
        }
        self._requests: dict[str, list[Any]] = {}
        shapes = [output.get_partial_shape().to_shape()[1:] for output in self._model.outputs]
        self._found = [torch.empty((0, *shape)) for shape in shapes]
        self.number_format = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, precision) + " by OpenVINO"

    def __call__(self, images: Tensor) -> Predictions:
        """Return predictions that hold until the next call, so that their memory need not be cleared for each one.

        images: [B, 3, S, S] float32, normalised; not copied if in channels_last.
        """
        import openvino

        rows = images.float().permute(0, 2, 3, 1).contiguous().numpy()
        if len(rows) > len(self._found[0]):
            self._found = [torch.empty((len(rows), *tensor.shape[1:])) for tensor in self._found]
        found = [tensor[: len(rows)] for tensor in self._found]
        requests = self._requests_for("LATENCY" if len(rows) == 1 else "THROUGHPUT")
        for row in range(len(rows)):
            request = requests[row % len(requests)]
            request.wait()
            request.set_input_tensor(openvino.Tensor(rows[row : row + 1], shared_memory=True))
            for index, tensor in enumerate(found):
                request.set_output_tensor(index, openvino.Tensor(tensor[row : row + 1].numpy(), shared_memory=True))
            request.start_async()
        for request in requests:
            request.wait()
        return Predictions(*found)

    def _requests_for(self, hint: str) -> list[Any]:
        if hint not in self._requests:
            compiled = core().compile_model(self._model, "CPU", {**self._settings, "PERFORMANCE_HINT": hint})
            count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
            self._requests[hint] = [compiled.create_infer_request() for _ in range(count)]
        return self._requests[hint]


def make_network(model: SSD, config: Config, device: torch.device, checkpoint: Path | None) -> OpenVINONetwork:
    """Return the network for the section `inference` of a recipe.

    checkpoint: the file that the weights come from, beside which a quantized network is kept.
    Raises BackendError.
    """
    require("openvino", "inference.backend = 'openvino'")
    if device.type != "cpu":
        raise BackendError(
            f"inference.backend = 'openvino' computes on a CPU, not on {device}: expected 'torch', or no visible GPU "
            "(CUDA_VISIBLE_DEVICES=)"
        )
    precision = config.inference.precision
    if precision == "int8":
        return OpenVINONetwork(read_quantized(checkpoint), precision, torch.get_num_threads())
    if precision == "auto":
        precision = "bf16" if compute_dtype(config.training.precision, device) == torch.bfloat16 else "fp32"
    return OpenVINONetwork(convert(model), precision, torch.get_num_threads())


def convert(model: SSD) -> "openvino.Model":
    """The network for one image, [1, 3, S, S] to [1, A, 4] and [1, A, C], in float32."""
    require("openvino", "OpenVINO")
    import openvino

    size = model.config.image_size
    example = (torch.zeros(1, 3, size, size),)
    model.eval()
    with torch.no_grad():
        converted = openvino.convert_model(torch.export.export(model, example), example_input=example)
    converted.reshape([1, 3, size, size])
    return converted


def quantize_network(network: "openvino.Model", images: Iterable[Tensor], num_images: int) -> "openvino.Model":
    """Return a network whose convolutions compute in int8; their ranges are those of some images [1, 3, S, S]."""
    require("nncf", "quantization")
    for name, level in (("nncf", logging.WARNING), ("torch.utils.cpp_extension", logging.ERROR)):  # which nncf imports
        logging.getLogger(name).setLevel(level)
    import nncf

    core()
    calibration = nncf.Dataset([image.contiguous().numpy() for image in images])
    return nncf.quantize(network, calibration, subset_size=num_images)


def quantized_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint that holds its quantized network."""
    return checkpoint.with_suffix(".int8.zip")


def is_quantized(path: Path) -> bool:
    """Whether a file is a quantized network, which a later one may replace."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _RECORD in archive.namelist()


def write_quantized(path: Path, network: "openvino.Model", record: Quantization) -> None:
    """Write a quantized network and its record to one file."""
    import openvino

    content = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w") as archive:
        openvino.save_model(network, Path(folder, _GRAPH), compress_to_fp16=False)
        archive.writestr(_RECORD, json.dumps(record._asdict(), indent=1))
        for name in (_GRAPH, _WEIGHTS):
            archive.write(Path(folder, name), name)
    write_atomically(path, content.getvalue())


def read_quantized(checkpoint: Path | None) -> "openvino.Model":
    """Return the quantized network of a checkpoint. Raises BackendError if there is none that may be used."""
    if checkpoint is None:
        raise BackendError("inference.precision = 'int8': expected a checkpoint, not random weights")
    path, how = quantized_path(checkpoint), f"ssd-fast quantize --checkpoint {checkpoint} --data DATA makes it"
    if not path.exists():
        raise BackendError(f"{path}: expected the network in int8; {how}")
    try:
        with zipfile.ZipFile(path) as archive:
            record = Quantization(**json.loads(archive.read(_RECORD)))
            graph, weights = archive.read(_GRAPH), archive.read(_WEIGHTS)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{path}: is no network in int8 ({error}); {how}") from error
    if record.checkpoint_sha256 != sha256_of(checkpoint):
        raise BackendError(f"{path}: was made from another checkpoint than {checkpoint}; {how} anew")
    if not record.is_accurate():
        raise BackendError(
            f"{path}: has mAP {record.map_int8:.4f} in int8: expected at least {LEAST_SHARE:.0%} of float32's "
            f"{record.map_float32:.4f}"
        )
    import openvino

    try:
        return core().read_model(graph, weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BackendError(
            f"{path}: OpenVINO {openvino.__version__} does not read it ({reason}); {how} anew"
        ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(package: str, what: str) -> None:
    """Raise BackendError if a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise BackendError(f"{what} needs the package {package}: pip install 'ssd_fast[openvino]', or openvino nncf")

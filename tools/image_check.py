"""Check that a container image is complete, as the last step of its build; no GPU is needed.

`python tools/image_check.py inference|training` prints one line for each part, and fails at the first missing one.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

import torch
import torchvision


def check_common() -> None:
    import nvidia.dali

    import kernels
    import ssd_fast.__main__  # noqa: F401 — imports what the verbs share

    cuda = torch.version.cuda
    assert cuda is not None, f"PyTorch {torch.__version__} was built without CUDA"
    print(f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, CUDA {cuda}")
    assert kernels.cuda_build().startswith(f"CUDA {cuda}"), f"kernels: CUDA {kernels.cuda_build()}"
    print(f"kernels: {kernels.cuda_build()}")
    importlib.metadata.version(f"nvidia-dali-cuda{cuda.split('.')[0]}0")
    print(f"DALI {nvidia.dali.__version__}")
    capabilities = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "")
    assert "video" in capabilities.split(","), (
        f"NVIDIA_DRIVER_CAPABILITIES = {capabilities}: expected video among them, for the hardware JPEG decoder"
    )


def check_versions(purpose: str) -> None:
    """Compare what is installed with the lock file, where there is one for this CUDA."""
    lock = Path(__file__).with_name("locks") / f"{purpose}-cuda{torch.version.cuda}.txt"
    found = reversed(list(importlib.metadata.distributions()))  # of two of a name, the first one counts
    installed = {dist.name: dist.version for dist in found}
    for name in ("pip", "ssd_fast"):
        installed.pop(name, None)
    if not lock.exists():
        print(f"versions: no {lock.name}; {len(installed)} packages")
        return
    locked = dict(line.split("==") for line in lock.read_text().split())
    changed = {name: version for name, version in sorted(installed.items()) if locked.get(name) != version}
    wrong = [f"{name} {version}" for name, version in changed.items() if name in locked]
    assert not wrong, f"{lock.name}: expected its versions, found {', '.join(wrong)}"
    print(f"versions: as in {lock.name}")
    for text, names in (("not in it", changed), ("in it alone", locked.keys() - installed.keys())):
        if names:
            print(f"versions: {text}: {', '.join(sorted(names))}")


def check_inference() -> None:
    import mlperf_loadgen  # noqa: F401
    import onnxruntime

    print(f"LoadGen {importlib.metadata.version('mlcommons-loadgen')}, ONNX Runtime {onnxruntime.__version__}")


def check_training() -> None:
    import horovod
    import horovod.torch

    assert horovod.torch.gloo_built(), "Horovod was built without Gloo"
    assert horovod.torch.nccl_built(), "Horovod was built without NCCL"
    print(f"Horovod {horovod.__version__}: Gloo, NCCL {horovod.torch.nccl_built()}")

    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC  # noqa: F401
    from apex.optimizers import FusedSGD  # noqa: F401

    # apex can be imported without its kernels
    amp_C, bnp = (importlib.import_module(name) for name in ("amp_C", "bnp"))
    assert hasattr(amp_C, "multi_tensor_sgd"), "apex: FusedSGD's kernel is missing"
    assert hasattr(bnp, "bn_fwd_nhwc"), "apex: the kernels of groupbn are missing"
    print("apex: FusedSGD, groupbn")


if __name__ == "__main__":
    if sys.argv[1:] not in (["inference"], ["training"]):
        raise SystemExit("usage: image_check.py inference|training")
    check_common()
    check_versions(sys.argv[1])
    {"inference": check_inference, "training": check_training}[sys.argv[1]]()

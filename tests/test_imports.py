"""The house's rule: which package may import which, and one owner for each heavy dependency."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("kernels", "dali_pipelines", "ssd_fast")
ALLOWED = {"kernels": {"kernels"}, "dali_pipelines": {"dali_pipelines"}, "ssd_fast": set(PACKAGES)}
OWNERS = {
    "horovod": {"ssd_fast/distributed.py"},
    "nvidia": {f"dali_pipelines/{name}.py" for name in ("train", "evaluate", "loader", "box_encoder")},
    "pycocotools": {"ssd_fast/coco_eval.py"},
    "hotcoco": {"ssd_fast/coco_eval.py"},
    "apex": {"ssd_fast/optim.py"},
    "mlperf_loadgen": {"ssd_fast/loadgen.py"},
    "mlperf_logging": {"ssd_fast/mlperf_log.py"},
    "matplotlib": {"ssd_fast/visualize.py", "ssd_fast/profile_charts.py"},
    "jinja2": {"ssd_fast/profile_report.py"},
    "torch.utils.tensorboard": {"ssd_fast/metrics.py"},
    "onnx": {"ssd_fast/export.py"},
    "onnx_ir": {"ssd_fast/export.py"},
    "onnxscript": {"ssd_fast/export.py"},
    "onnxruntime": {"ssd_fast/export.py"},
    "rich": {"ssd_fast/progress.py"},
    "pydantic": {"ssd_fast/config.py", "ssd_fast/profile_model.py"},
    "typer": {"ssd_fast/__main__.py"},
    "msgspec": {"ssd_fast/dataset.py", "ssd_fast/coco_eval.py"},
}


def imports(source: str) -> Iterator[str]:
    """Dotted names of all modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    found = []
    for name in imports(source):
        top = name.split(".")[0]
        if top in PACKAGES and top not in ALLOWED[path.split("/")[0]]:
            found.append(f"{path} imports {name} against the direction of the layers")
        for dependency, owners in OWNERS.items():
            if (name + ".").startswith(dependency + ".") and path not in owners:
                found.append(f"{path} imports {name}, which belongs to {sorted(owners)}")
    return found


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))


def test_no_import_goes_up_and_every_dependency_has_one_owner() -> None:
    assert len(sources()) > 10
    found = [
        line for path in sources() for line in violations(str(path.relative_to(REPOSITORY)), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "from ssd_fast.model import SSD"),
        ("dali_pipelines/train.py", "import kernels.reference"),
        ("ssd_fast/model.py", "def f():\n    import horovod.torch as hvd"),
        ("ssd_fast/train.py", "from torch.utils import tensorboard"),
        ("ssd_fast/train.py", "from nvidia.dali import fn"),
    ],
)
def test_the_rule_notices_a_break(path: str, source: str) -> None:
    assert violations(path, source)

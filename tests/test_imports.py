"""The rule of the house: the order of its rooms, and one owner for each heavy dependency."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY

# From the ground up: a room imports only itself and the rooms before it. A file of ssd_fast/ is a room of its own.
ROOMS = (
    "kernels",
    "dali_pipelines",
    "ssd_fast.exit_status",
    "ssd_fast.background",
    "ssd_fast.streams",
    "ssd_fast.files",
    "ssd_fast.tables",
    "ssd_fast.parts",
    "ssd_fast.options",
    "ssd_fast.config",
    "ssd_fast.progress",
    "ssd_fast.hardware",
    "ssd_fast.timing",
    "ssd_fast.distributed",
    "ssd_fast.model",
    "ssd_fast.data",
    "ssd_fast.checkpoints",
    "ssd_fast.evaluation",
    "ssd_fast.training",
    "ssd_fast.loadgen",
    "ssd_fast.profiling",
    "ssd_fast",
    "ssd_fast.inference_verbs",
    "ssd_fast.__main__",
)
OWNERS = {
    "horovod": {"ssd_fast/distributed/horovod.py", "ssd_fast/distributed/slurm.py"},
    "nvidia": {
        f"dali_pipelines/{name}.py"
        for name in ("train", "samples", "augment", "arrays", "evaluate", "loader", "decode", "box_encoder")
    },
    "pycocotools": {"ssd_fast/evaluation/coco_eval.py"},
    "hotcoco": {"ssd_fast/evaluation/coco_eval.py"},
    "apex": {"ssd_fast/training/optim.py"},
    "mlperf_loadgen": {"ssd_fast/loadgen/run.py"},
    "mlperf_logging": {"ssd_fast/training/mlperf_log.py"},
    "matplotlib": {"ssd_fast/evaluation/fonts.py", "ssd_fast/training/curves.py", "ssd_fast/profiling/charts.py"},
    "jinja2": {"ssd_fast/profiling/report.py"},
    "torch.utils.tensorboard": {"ssd_fast/training/history.py"},
    "onnx": {"ssd_fast/evaluation/export.py"},
    "onnx_ir": {"ssd_fast/evaluation/export.py"},
    "onnxscript": {"ssd_fast/evaluation/export.py"},
    "onnxruntime": {"ssd_fast/evaluation/export.py"},
    "rich": {"ssd_fast/progress.py", "ssd_fast/tables.py"},
    "pydantic": {
        "dali_pipelines/batch.py",
        "ssd_fast/config/sections.py",
        "ssd_fast/config/recipe.py",
        "ssd_fast/profiling/profile.py",
    },
    "openvino": {"ssd_fast/evaluation/openvino_network.py"},
    "nncf": {"ssd_fast/evaluation/openvino_network.py"},
    "typer": {"ssd_fast/__main__.py", "ssd_fast/inference_verbs.py", "ssd_fast/options.py"},
    "msgspec": {"ssd_fast/data/annotations.py", "ssd_fast/evaluation/coco_eval.py"},
}


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in; None outside the house."""
    parts = module.split(".")
    if parts[0] != "ssd_fast":
        return parts[0] if parts[0] in ROOMS else None
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ROOMS else "ssd_fast"


def imports(source: str) -> Iterator[str]:
    """Dotted names of all modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    own = room_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert own is not None, f"{path} lies in no room"
    found = []
    for name in imports(source):
        room = room_of(name)
        if room is not None and ROOMS.index(room) > ROOMS.index(own):
            found.append(f"{path} imports {name} against the order of the rooms")
        for dependency, owners in OWNERS.items():
            if (name + ".").startswith(dependency + ".") and path not in owners:
                found.append(f"{path} imports {name}, which belongs to {sorted(owners)}")
    return found


def sources() -> list[Path]:
    return sorted(
        path for top in ("kernels", "dali_pipelines", "ssd_fast") for path in (REPOSITORY / top).rglob("*.py")
    )


def test_no_import_goes_up_and_every_dependency_has_one_owner() -> None:
    assert len(sources()) > 40
    found = [
        line for path in sources() for line in violations(str(path.relative_to(REPOSITORY)), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def test_every_room_says_what_comes_in_what_leaves_and_who_may_import_it() -> None:
    for room in (REPOSITORY / "ssd_fast").glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(room.read_text("utf-8"))) or ""
        assert "\n\nIn: " in text, room
        assert " Out: " in text, room
        assert "May be imported by" in text, room


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/ops.py", "from ssd_fast.model.ssd import SSD"),
        ("kernels/ops.py", "import dali_pipelines.batch"),
        ("ssd_fast/model/ssd.py", "def f():\n    import horovod.torch as hvd"),
        ("ssd_fast/model/ssd.py", "from ssd_fast.data import coco"),
        ("ssd_fast/data/coco.py", "from ssd_fast.evaluation.coco_eval import score"),
        ("ssd_fast/evaluation/detector.py", "import ssd_fast.training.run"),
        ("ssd_fast/config/sections.py", "from ssd_fast.distributed.world import World"),
        ("ssd_fast/training/run.py", "from torch.utils import tensorboard"),
        ("ssd_fast/training/run.py", "from nvidia.dali import fn"),
    ],
)
def test_the_rule_notices_a_break(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    "module",
    [
        "ssd_fast.evaluation.draw",
        "ssd_fast.training.curves",
        "ssd_fast.profiling.report",
        "ssd_fast.profiling.bottleneck",
        "ssd_fast.data.coco",
        "ssd_fast.config.sections",
        "ssd_fast.config.recipe",
    ],
)
def test_what_draws_and_what_reads_files_loads_nothing_heavy(module: str) -> None:
    heavy = ("nvidia.dali", "kernels.ops", "horovod", "ssd_fast.training.run", "ssd_fast.training.step")
    code = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout.split() == []

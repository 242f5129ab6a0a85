"""Shell scripts and container definitions, as far as they can be checked where no image can be built."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from fake_toolkit import fake_toolkit
from repository import REPOSITORY

import kernels

TOOLS = Path(sys.executable).parent
SHEBANG = re.compile(r"#!.*\b(ba)?sh$")
NOT_OURS = {".git", ".venv", "build", "output"}
DEFINITION = (REPOSITORY / "Singularity.def").read_text("utf-8")


def shell_scripts() -> list[str]:
    found = []
    for directory, folders, files in os.walk(REPOSITORY):
        folders[:] = set(folders) - NOT_OURS
        for path in (Path(directory, name) for name in files):
            with path.open("rb") as file:
                if SHEBANG.match(file.readline(80).decode("latin-1").strip()):
                    found.append(str(path.relative_to(REPOSITORY)))
    return sorted(found)


SCRIPTS = shell_scripts()
USER_SCRIPTS = [script for script in SCRIPTS if "/" not in script and os.access(REPOSITORY / script, os.X_OK)]


def run(
    *command: str | Path, path: str | None = None, text: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository. path: replaces PATH; text: standard input."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={**os.environ, **environment} | ({"PATH": path} if path else {}),
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )


def section(name: str) -> str:
    """The body of a section of Singularity.def."""
    match = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, re.MULTILINE | re.DOTALL)
    assert match is not None, f"Singularity.def has no %{name}"
    return match[1]


def test_all_scripts_were_found() -> None:
    assert {"build_container.sh", "build_horovod.sh", "install_image.sh", "run.slurm", ".ci/run"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    done = run(TOOLS / "shellcheck", "--external-sources", "--check-sourced", "--source-path=SCRIPTDIR", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", USER_SCRIPTS)
def test_every_script_says_how_it_is_used(script: str) -> None:
    for option in ("--help", "-h"):
        done = run(f"./{script}", option)
        assert done.returncode == 0
        assert re.match(rf"usage: .*{re.escape(script)}", done.stdout)


@pytest.mark.parametrize("script", ["build_apex.sh", "build_container.sh", "build_horovod.sh", "install_image.sh"])
def test_an_unknown_option_is_refused_with_the_usage(script: str) -> None:
    done = run(f"./{script}", "--fast")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("name", ["post", "environment", "test", "runscript"])
def test_shellcheck_has_nothing_to_say_about_the_definition(name: str) -> None:
    done = run(TOOLS / "shellcheck", "--shell=sh", "-", text=section(name))
    assert done.returncode == 0, done.stdout


def test_hadolint_has_nothing_to_say() -> None:
    done = run(TOOLS / "hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_definition_takes_along_all_that_is_built_and_used(tmp_path: Path) -> None:
    sources = [line.split() for line in section("files").splitlines() if line.strip()]
    for source, destination in sources:
        assert (REPOSITORY / source).exists(), source
        assert destination == f"/opt/ssd_fast/{f'{parent}/' if (parent := Path(source).parent.name) else ''}"
    taken = {Path(source).parts[0] for source, _ in sources}
    packages = {"ssd_fast", "dali_pipelines", "kernels"}
    to_build = {"setup.py", "cuda_toolkit.py", "pyproject.toml", "README.md", "LICENSE", "requirements.lock"}
    assert taken == packages | to_build | {"configs", "tools", "install_image.sh", "build_horovod.sh", "build_apex.sh"}
    assert "install_image.sh training /opt/venv" in section("post")


@pytest.mark.parametrize(
    "text", [DEFINITION, (REPOSITORY / "Dockerfile").read_text("utf-8")], ids=["def", "Dockerfile"]
)
def test_the_decoder_of_jpeg_in_hardware_is_asked_for(text: str) -> None:
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in text
    assert "image_check.py" in text


def test_labels_have_the_version_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for separator, text in ((" ", DEFINITION), ("=", (REPOSITORY / "Dockerfile").read_text())):
        labels = dict(re.findall(rf"org\.opencontainers\.image\.(\w+){separator}(\S+)", text))
        assert labels.keys() == {"title", "version", "revision", "licenses"}
        assert (labels["title"], labels["version"], labels["licenses"]) == (
            project["name"],
            project["version"],
            project["license"],
        )


@pytest.mark.parametrize(("options", "cuda"), [([], "12.6"), (["--cuda", "13.0"], "13.0"), (["--cuda=13.0"], "13.0")])
def test_the_container_is_built_for_the_cuda_that_was_asked_for(tmp_path: Path, options: list[str], cuda: str) -> None:
    builder = tmp_path / "apptainer"
    builder.write_text(f'#!/bin/sh\necho "$1 $(pwd)"\nfor last; do true; done\ncp "$last" {tmp_path}/definition\n')
    builder.chmod(0o755)
    image = tmp_path / "image.sif"
    done = run("./build_container.sh", *options, image, path=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, f"build {REPOSITORY}\n"), done.stderr
    built = (tmp_path / "definition").read_text()
    assert re.findall(r"^From: (.*)$", built, re.MULTILINE) == [
        f"nvidia/cuda:{cuda}.{'3' if cuda == '12.6' else '2'}-devel-ubuntu24.04"
    ]
    assert re.search(r"^    org\.opencontainers\.image\.revision [0-9a-f]{40}(-dirty)?$", built, re.MULTILINE)
    changed = re.compile(r"^From: .*|(?<=revision ).*", re.MULTILINE)
    assert changed.sub("", built) == changed.sub("", DEFINITION)


def test_build_container_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    image = tmp_path / "there.sif"
    image.touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    for arguments, message in {
        ("--cuda", "11.8"): "--cuda 11.8: expected 12.6 or 13.0",
        ("--cuda",): "--cuda : expected 12.6 or 13.0",
        (image,): f"{image} exists: remove it, or name another image",
        (tmp_path / "new.sif",): "neither apptainer nor singularity is installed",
    }.items():
        done = run("./build_container.sh", *arguments, path=str(tools))
        assert (done.returncode, done.stderr) == (1, f"build_container.sh: {message}\n")
    assert run("./build_container.sh", "one.sif", "two.sif").returncode == 2


def test_install_image_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    assert run("./install_image.sh", "fun", tmp_path / "venv").returncode == 2
    assert run("./install_image.sh", "training").returncode == 2
    done = run(
        "./install_image.sh", "training", tmp_path / "venv", CUDA_HOME=str(fake_toolkit(tmp_path / "cuda", "11.8"))
    )
    assert done.returncode == 1
    assert "is CUDA 11.8: expected 12.6 or 13.0" in done.stderr
    done = run("./install_image.sh", "training", tmp_path / "venv", CUDA_HOME=str(tmp_path / "none"))
    assert done.returncode == 1
    assert f"no CUDA toolkit in {tmp_path}/none" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_is_built_for_a_pytorch_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    for script in ("build_apex.sh", "build_horovod.sh"):
        done = run(f"./{script}", python)
        assert (done.returncode, done.stderr) == (
            1,
            f"{script}: {python}: expected a Python with PyTorch (make install)\n",
        )
    if torch.version.cuda is None:
        pytest.skip("this PyTorch was built without CUDA")
    toolkit = fake_toolkit(tmp_path / "cuda", "9.2")
    done = run("./build_horovod.sh", sys.executable, SSD_FAST_CUDA="1", CUDA_HOME=str(toolkit))
    assert done.returncode == 1
    reason = f"{toolkit} is CUDA 9.2, PyTorch was built with {torch.version.cuda}"
    assert f"build_horovod.sh: SSD_FAST_CUDA=1, but {reason}" in done.stderr
    done = run("./build_apex.sh", sys.executable, CUDA_HOME=str(toolkit))
    assert done.returncode == 1
    assert f"build_apex.sh: {reason}" in done.stderr


def skip_unless_locked() -> None:
    if (version := importlib.metadata.version("torch")) not in (REPOSITORY / "requirements.lock").read_text():
        pytest.skip(f"PyTorch {version}: the images have another one")


def test_an_image_for_inference_is_checked_for_all_that_it_is_for(tmp_path: Path) -> None:
    if not kernels.cuda_build().startswith("CUDA 1"):
        pytest.skip(kernels.cuda_build())
    skip_unless_locked()
    check = (sys.executable, "tools/image_check.py")
    done = run(*check, "inference", NVIDIA_DRIVER_CAPABILITIES="compute,utility,video")
    assert done.returncode == 0, done.stderr
    heads = [line.split()[0] for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(heads)) == ["PyTorch", "kernels:", "DALI", "versions:", "LoadGen"]
    done = run(*check, "inference", NVIDIA_DRIVER_CAPABILITIES="compute,utility")
    assert done.returncode == 1
    assert "NVIDIA_DRIVER_CAPABILITIES = compute,utility: expected video" in done.stderr
    assert run(*check).returncode == 1
    other = tmp_path / "pillow-1.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 1.2\n")
    done = run(*check, "inference", NVIDIA_DRIVER_CAPABILITIES="video", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "inference-cuda13.0.txt: expected its versions, found pillow 1.2" in done.stderr


def test_an_image_for_training_is_checked_for_horovod_and_apex() -> None:
    hvd = pytest.importorskip("horovod.torch", reason="make horovod")
    if not (hvd.nccl_built() and kernels.cuda_build().startswith("CUDA 1")):
        pytest.skip("Horovod without NCCL, or kernels without CUDA")
    skip_unless_locked()
    capabilities = "compute,utility,video"
    done = run(sys.executable, "tools/image_check.py", "training", NVIDIA_DRIVER_CAPABILITIES=capabilities)
    assert re.search(r"^Horovod 0\.28\.1: Gloo, NCCL \d+$", done.stdout, re.MULTILINE), done.stderr
    if done.returncode != 0:  # apex is not on PyPI
        assert "No module named 'apex'" in done.stderr

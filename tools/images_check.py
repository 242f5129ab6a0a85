"""Build both container images without a GPU, Docker or Apptainer, and try what is in them: make images-check.

It needs root on Debian, with the packages buildah and mmdebstrap, this project's environment, and a CUDA toolkit. The
base images are stood in for by a root of this machine's distribution with its toolkit, Docker by buildah, and Apptainer
by buildah and tests/support/apptainer.sh. A table at the end says which steps ran as a user runs them. All files are in
build/images, which can be deleted.
"""

import argparse
import difflib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ssd_fast.config.recipe import load_config
from ssd_fast.model.ssd import SSD

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = REPOSITORY / "build" / "images"
SOURCE = WORK / "source"
CUDA = "13.0"
TAG = "inference/single_stage_detector"
INFERENCE_GB = 6.0  # the inference image may not be larger
BUILDAH = ("buildah", "--root", WORK / "storage", "--runroot", WORK / "run", "--storage-driver", "overlay")
CHROOT = ("--isolation", "chroot", "--network", "host")
AUTHORITIES = Path("/usr/local/share/ca-certificates")
NO_CACHES = 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";\n'  # as in the base images that are stood in for
COPIED = "etc/images_check"  # folder in the base images
ENVIRONMENT_SCRIPT = "/.singularity.d/env/90-environment.sh"
APEX = "https://github.com/NVIDIA/apex"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--apex", type=Path, help="a clone of NVIDIA's apex with the pinned commit, where GitHub cannot be reached"
    )
    parser.add_argument(
        "--cuda-home",
        type=Path,
        default=Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        help="default: %(default)s",
    )
    parser.add_argument("--write", action="store_true", help="keep the versions of the images in tools/locks")
    options = parser.parse_args()
    if missing := [program for program in ("buildah", "mmdebstrap", "git") if not shutil.which(program)]:
        sys.exit(f"images_check: {', '.join(missing)} not found; Debian: apt-get install {' '.join(missing)}")
    if os.geteuid():
        sys.exit("images_check: expected root, for the images' own users and mounts")
    source = options.apex or APEX
    if subprocess.run(
        ["git", "ls-remote", "--quiet", str(source), "HEAD"], stdout=subprocess.DEVNULL, check=False
    ).returncode:
        sys.exit(f"images_check: {source} cannot be read: expected --apex with a clone (make images-check APEX=CLONE)")
    check = ImagesCheck(options.apex, options.cuda_home.resolve())
    check.base()
    check.inference()
    check.training()
    check.cluster()
    check.compare_versions(write=options.write)
    check.report()


class ImagesCheck:
    """The steps, in their order, and what they found."""

    def __init__(self, apex: Path | None, cuda_home: Path) -> None:
        self._apex = apex.resolve() if apex else None
        self._cuda_home = cuda_home
        self._stands_in: list[tuple[str, str]] = []
        self._ran: list[tuple[str, str]] = []
        self._pip, self._named = pip_settings()
        indexes = [path.parent if path.name == "simple" else path for path in self._named]  # files are beside it
        mounted = [path for path in (*indexes, self._apex) if path and path.is_dir()]
        self._volumes = [part for path in mounted for part in ("--volume", f"{path}:{path}:ro")]
        shutil.rmtree(SOURCE, ignore_errors=True)
        WORK.mkdir(parents=True, exist_ok=True)
        run("git", "clone", "--quiet", REPOSITORY, SOURCE)

    def base(self) -> None:
        """Make the images that the two definitions begin with, under the names that they ask for."""
        names = re.findall(r"^FROM (\S+)", (SOURCE / "Dockerfile").read_text(), re.MULTILINE)
        devel, plain = (f"docker.io/{name}".replace("${CUDA}", f"{CUDA}.2") for name in names)
        root = WORK / "root.tar"
        if not root.exists():
            run("mmdebstrap", "--variant=minbase", "--quiet", release()["VERSION_CODENAME"], root.with_name("part.tar"))
            root.with_name("part.tar").rename(root)
        with container("scratch") as (name, folder):
            run("tar", "-xf", root, "-C", folder)
            for file, text in self._settings().items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(text)
            if AUTHORITIES.is_dir():
                shutil.copytree(AUTHORITIES, folder / AUTHORITIES.relative_to("/"), dirs_exist_ok=True)
            buildah("commit", "--quiet", name, plain.replace("docker.io/", "docker.io/library/"))
            toolkit = folder / "usr/local/cuda"
            headers = next(Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/cu{CUDA.split('.')[0]}/include"))
            shutil.copytree(self._cuda_home, toolkit, symlinks=True)
            shutil.copytree(headers, toolkit / "include", dirs_exist_ok=True)
            buildah("commit", "--quiet", name, devel)
        self._stands_in += [
            (names[1], f"{release()['PRETTY_NAME']}, made by mmdebstrap"),
            (names[0], "the same with this machine's CUDA toolkit, and its libraries' headers from PyPI"),
            ("settings of pip, certificates", "this machine's own"),
        ]

    def inference(self) -> None:
        """Build the Dockerfile, and run the benchmark in the image as its users do."""
        commit = output("git", "-C", SOURCE, "rev-parse", "HEAD")
        arguments = ("--build-arg", f"CUDA={CUDA}.2", "--build-arg", f"COMMIT={commit}")
        with self._step(f"docker build -t {TAG} --build-arg COMMIT=… .", "buildah bud, every step"):
            buildah("bud", *CHROOT, "--layers", "--pull-never", *self._volumes, *arguments, "--tag", TAG, SOURCE)
        labels = json.loads(output(*BUILDAH, "inspect", TAG))["OCIv1"]["config"]["Labels"]
        assert labels["org.opencontainers.image.revision"] == commit, labels
        folder = self._benchmark_data()
        with container(TAG) as (name, root):
            size = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_dir()) / 1e9
            shutil.copy(root / "opt/venv/installed.txt", WORK / "inference.txt")
            mounts = (
                "--volume",
                f"{folder}/coco:/mlperf/coco:ro",
                "--volume",
                f"{folder}/pretrained:/mlperf/pretrained:ro",
            )
            within = ("run", "--isolation", "chroot", *mounts, name, "--")
            assert output(*BUILDAH, *within, "id", "-u") == "1000"
            buildah(*within, "python", "/opt/ssd_fast/tools/image_check.py", "inference")
            with self._step(
                f"docker run -v coco -v pretrained {TAG} ./run_and_time.sh", "buildah run, as user 1000, 4 images"
            ):
                buildah(*within, "./run_and_time.sh", "1", "-1")
            with self._step("docker run --user 4242 …", "buildah run"):
                buildah("run", "--user", "4242", *within[1:], "./run_and_time.sh", "2", "-1", "--only-annotated")
        self._ran.append(("size of the inference image", f"{size:.2f} GB of files"))
        if size > INFERENCE_GB:
            sys.exit(f"the inference image has {size:.2f} GB: expected less than {INFERENCE_GB}")

    def training(self) -> None:
        """Build Singularity.def, as build_container.sh hands it on, and keep the result as an image."""
        sections = self._definition()
        base = re.search(r"^From: (\S+)", sections[""], re.MULTILINE)
        assert base
        with container(f"docker.io/{base[1]}") as (name, root):
            for line in sections["files"].split("\n"):
                if line.strip():
                    source, target = line.split()
                    buildah("copy", "--quiet", name, SOURCE / source, f"{target}{Path(source).name}")
            script = WORK / "environment.sh"
            script.write_text(sections["environment"])
            buildah("copy", "--quiet", name, script, ENVIRONMENT_SCRIPT)
            shell = ("run", *CHROOT, *self._volumes, name, "--", "/bin/sh", "-ec")
            with self._step("./build_container.sh --cuda 13.0: %files, %post", "buildah copy, buildah run"):
                buildah(*shell, sections["post"])
            with self._step("%environment, %test", "buildah run"):
                buildah(*shell, f". {ENVIRONMENT_SCRIPT}\n{sections['test']}")
            shutil.copy(root / "opt/venv/installed.txt", WORK / "training.txt")
            buildah("commit", "--quiet", name, "training")
        if self._apex:
            self._stands_in.append((APEX, "a local clone"))

    def cluster(self) -> None:
        """Run run.slurm's tests, of what is committed, with the training image for CONT."""
        for library in (REPOSITORY / "kernels").glob("_C*.so"):
            shutil.copy(library, SOURCE / "kernels")
        what, how = "CONT=… sbatch -N 2 -n 4 run.slurm", "Slurm on pretended nodes, a chroot for Apptainer"
        with container("training") as (_, root), self._step(what, how):
            run(
                *(sys.executable, "-m", "pytest", "-x", "tests/launch/test_slurm.py"),
                *("-k", "four_ranks or cut_by or does_not_see"),
                cwd=SOURCE,
                env={**os.environ, "PYTHONPATH": str(SOURCE), "SSD_FAST_IMAGE": str(root)},
            )

    def compare_versions(self, *, write: bool) -> None:
        """Compare what the builds installed with the lock files, or write these."""
        for purpose in ("inference", "training"):
            lock = REPOSITORY / "tools" / "locks" / f"{purpose}-cuda{CUDA}.txt"
            installed = (WORK / f"{purpose}.txt").read_text()
            if write:
                lock.write_text(installed)
            locked = lock.read_text() if lock.exists() else ""
            drift = "".join(
                difflib.unified_diff(locked.splitlines(True), installed.splitlines(True), str(lock), "the image")
            )
            if drift:
                sys.exit(f"{drift}expected the locked versions; to keep these: make images-check CHECK=--write")
            self._ran.append((f"versions of the {purpose} image", f"as in {lock.relative_to(REPOSITORY)}"))

    def report(self) -> None:
        """Print what stood in, and what ran."""
        for title, rows in (("stood in for", self._stands_in), ("ran", self._ran)):
            print(f"\n{title}:")
            for name, text in rows:
                print(f"  {name:<60} {text}")

    def _settings(self) -> dict[str, str]:
        """Return the text of files in the base images, by path without the first slash."""
        settings = {"etc/pip.conf": self._pip, "etc/apt/apt.conf.d/no-caches": NO_CACHES}
        settings |= {f"{COPIED}/{path.name}": path.read_text() for path in self._named if path.is_file()}
        if self._apex:
            settings["etc/gitconfig"] = f'[url "file://{self._apex}"]\n\tinsteadOf = {APEX}\n[safe]\n\tdirectory = *\n'
        return settings

    def _benchmark_data(self) -> Path:
        """Return a folder with four images and random weights, as the download scripts leave COCO and the weights."""
        folder = WORK / "benchmark"
        shutil.rmtree(folder, ignore_errors=True)
        run(Path(sys.executable).with_name("ssd-fast"), "synthesize", folder / "coco", "--images", "20")
        categories = json.loads((folder / "coco/annotations/instances_val2017.json").read_text())["categories"]
        model = SSD(load_config(REPOSITORY / "configs" / "ssd1200.toml").model, len(categories))
        (folder / "pretrained").mkdir()
        torch.save(model.state_dict(), folder / "pretrained" / "resnet34-ssd1200.pytorch")
        return folder

    def _definition(self) -> dict[str, str]:
        """Return the sections of the definition that build_container.sh hands to Apptainer, "" for its head."""
        programs = WORK / "programs"
        programs.mkdir(exist_ok=True)
        builder, definition = programs / "apptainer", WORK / "definition"
        builder.write_text(f'#!/bin/sh\nfor last; do true; done\ncp "$last" {definition}\n')
        builder.chmod(0o755)
        path = f"{programs}:{os.environ['PATH']}"
        run(SOURCE / "build_container.sh", "--cuda", CUDA, WORK / "none.sif", env={**os.environ, "PATH": path})
        parts = re.split(r"^%(\w+)\n", definition.read_text(), flags=re.MULTILINE)
        return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))

    @contextmanager
    def _step(self, name: str, how: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        yield
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        self._ran.append((name, f"{how}; {time.monotonic() - begin:.0f} s; largest process so far {largest:.1f} GiB"))


def pip_settings() -> tuple[str, list[Path]]:
    """Return a pip.conf with this machine's settings of pip, and the files and folders that they name.

    The files are expected in COPIED, the folders where they are here.
    """
    listed = output(sys.executable, "-m", "pip", "config", "list")
    values = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    paths = {Path(word.removeprefix("file://")) for value in values.values() for word in value.split()}
    named = sorted(path for path in paths if path.is_absolute() and path.exists())
    text = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
    for path in named:
        if path.is_file():
            text = text.replace(str(path), f"/{COPIED}/{path.name}")
    return text, named


@contextmanager
def container(image: str) -> Iterator[tuple[str, Path]]:
    """Make a container of an image while this context lasts; yields its name and the folder of its files."""
    name = output(*BUILDAH, "from", "--pull-never", image) if image != "scratch" else output(*BUILDAH, "from", image)
    try:
        yield name, Path(output(*BUILDAH, "mount", name))
    finally:
        buildah("rm", name)


def buildah(*arguments: str | Path) -> None:
    run(*BUILDAH, *arguments)


def run(*command: str | Path, **options: Any) -> None:
    """Run a program that must succeed."""
    subprocess.run([str(part) for part in command], check=True, **options)


def output(*command: str | Path) -> str:
    """Return what a program that must succeed prints."""
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def release() -> dict[str, str]:
    """Return what /etc/os-release says."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}


if __name__ == "__main__":
    main()

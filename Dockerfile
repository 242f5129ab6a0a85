# The inference image, for CPUs and for GPUs from Turing on: docker build -t inference/single_stage_detector .
# Add --build-arg CUDA=12.6.3 for Volta to Hopper. Run the image with --gpus all, or without it on the CPU.
# --build-arg COMMIT=$(git rev-parse HEAD) puts the commit into its labels.
ARG CUDA=13.0.2

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/ssd_fast
RUN PIP_NO_CACHE_DIR=1 /opt/ssd_fast/install_image.sh inference /opt/venv

FROM ubuntu:24.04
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/ssd_fast /opt/ssd_fast
# "video" gives DALI the hardware JPEG decoder; without it, DALI silently decodes elsewhere
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
WORKDIR /opt/ssd_fast
RUN python tools/image_check.py inference
# The folder in which users of the benchmark mount coco and pretrained
WORKDIR /mlperf
RUN ln -s /opt/ssd_fast/configs /opt/ssd_fast/run_and_time.sh . && chmod 1777 .
# Anyone: docker run --user $(id -u) writes to mounted folders as oneself
USER 1000
ENV HOME=/mlperf
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=ssd_fast \
    org.opencontainers.image.version=0.1.0 \
    org.opencontainers.image.revision=$COMMIT \
    org.opencontainers.image.licenses=Apache-2.0
CMD ["ssd-fast", "--help"]

# Image for NVIDIA GPUs: JAX's plugin for CUDA 13 and this package. Its command checks the GPU. From the repository's root:
#
#   docker build -f scripts/docker/cuda.Dockerfile -t hipgpt-cuda .
#   docker run --rm --gpus all hipgpt-cuda >gpu_check.json
#
# The host needs Linux with an NVIDIA driver of version 580 or later, Docker, and the NVIDIA Container Toolkit. CUDA comes
# with the plugin's packages, and the driver's libraries and nvidia-smi from the host.

FROM ubuntu:24.04
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# hadolint ignore=DL3008 # Ubuntu's archive keeps no old versions to pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
WORKDIR /hipgpt_jax
COPY . .
RUN . scripts/environment.sh && environment .venv-gpu cuda,dev
ENV PATH=/hipgpt_jax/.venv-gpu/bin:${PATH}
CMD ["scripts/gpu_check.sh"]

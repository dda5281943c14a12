# Image for AMD GPUs: ROCm, JAX's plugin for it, and this package. Its command checks the GPU. From the repository's root:
#
#   docker build -f scripts/docker/rocm.Dockerfile -t hipgpt-rocm .
#   docker run --rm --device=/dev/kfd --device=/dev/dri --security-opt seccomp=unconfined hipgpt-rocm >gpu_check.json
#
# The host needs x86-64 Linux with the amdgpu driver (/dev/kfd and /dev/dri), Docker, and 40 GB of disk; ROCm itself is
# in the image. Rootless Docker also needs --group-add with the group of /dev/kfd, mostly render.
# Neither the build nor the image has been tried on AMD hardware.

# The newest plugin, jax-rocm7-plugin 0.12.0, is built for ROCm 7.14.
ARG ROCM=7.14.0-full
FROM rocm/dev-ubuntu-24.04:${ROCM}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# hadolint ignore=DL3008 # Ubuntu's archive keeps no old versions to pin
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# XLA links GPU code with ROCm's own LLVM.
ENV LLVM_PATH=/opt/rocm/llvm PIP_NO_CACHE_DIR=1
WORKDIR /hipgpt_jax
COPY . .
RUN . scripts/environment.sh && environment .venv-gpu dev,rocm
ENV PATH=/hipgpt_jax/.venv-gpu/bin:${PATH}
CMD ["scripts/gpu_check.sh"]

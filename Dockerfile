# Image for GPU clusters, on the vendor's PyTorch image: torch, CUDA, NCCL and Transformer Engine are the image's own. Any
# release with Python 3.12 and torch 2.11 to 2.13 will do.
#   docker build -t megatron_omni --build-arg BASE=.../nvidia/pytorch:26.06-py3 .   # ...: the host of the vendor's catalogue, or of your mirror
#   enroot import -o omni.sqsh dockerd://megatron_omni                # for pyxis; apptainer: apptainer build omni.sif docker-daemon://megatron_omni:latest
# Not built where this project is tested (docs/verification.yaml): `megatron-omni doctor` inside says whether it is sound.
ARG BASE
FROM ${BASE}

WORKDIR /workspace/megatron_omni
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY megatron_omni megatron_omni
COPY tools tools
COPY recipes recipes
COPY examples/slurm examples/slurm

# What the image brings must stay: it is pinned as it is, and csrc is built against its torch. The image's own constraints
# may forbid packages that are needed here; the pins take their place.
ENV PIP_CONSTRAINT=/tmp/pins.txt OMNI_BUILD_CUDA=1
RUN PIP_CONSTRAINT= pip list --format=freeze | grep -iE '^(torch|numpy|transformer[-_]engine)==' > /tmp/pins.txt && \
    pip install --no-cache-dir --no-deps nvidia-cutlass==4.2.0.0 && \
    pip install --no-cache-dir --no-build-isolation --editable '.[serve]'

CMD ["megatron-omni", "doctor"]

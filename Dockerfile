# Letheon on an image of PyTorch (BASE; 2.12 or newer, for torchrun's signals).
# Build: docker build -t letheon .
# Run:   docker run --gpus all --shm-size=8g -v /data:/data letheon letheon doctor --data /data/set
ARG BASE=pytorch/pytorch:2.14.1-cuda13.0-cudnn9-runtime
FROM ${BASE}

# A C++ compiler for --compile, which the runtime image lacks.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/letheon
COPY . .
RUN python -m pip install --no-cache-dir ".[fast]"

# Signals reach the ranks: no shell between.
WORKDIR /work
CMD ["letheon", "--help"]

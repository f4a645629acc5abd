# The service in an image: `docker build --target cpu .` (the default) or `--target gpu`. It writes nothing but /tmp:
# `docker run --read-only --tmpfs /tmp --publish 8000:8000 streamrec`.
# Pinned by digest, so that the same lines make the same image. To update, run `docker pull python:3.11-slim-bookworm` and
# put the digest that it prints here.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

# The lock is complete, so nothing is resolved, and pip refuses a file whose hash it does not have. Wheels only: nothing of a
# package runs while it is installed.
FROM ${PYTHON_IMAGE} AS packages
COPY requirements/serving.lock /tmp/serving.lock
COPY requirements/torch.lock /tmp/torch.lock
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --only-binary=:all: --require-hashes -r /tmp/serving.lock

FROM packages AS packages-cpu
# torch for Linux brings several gigabytes of CUDA by default; PyTorch's installation page names the package index of the
# build without: `docker build --build-arg TORCH_INDEX=...` keeps the image small. torch is the one package taken from it,
# and it is taken from nowhere else.
ARG TORCH_INDEX=""
RUN /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} -r /tmp/torch.lock

FROM packages AS packages-gpu
RUN /opt/venv/bin/pip install --no-cache-dir -r /tmp/torch.lock

FROM ${PYTHON_IMAGE} AS service
# A fixed number, so that a cluster can check runAsNonRoot without /etc/passwd.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin streamrec
WORKDIR /srv
COPY LICENSE ./
COPY serving ./serving
COPY app ./app
COPY bundles/demo ./bundles/demo
# PATH: the packages live in a virtual environment that the stages below copy in.
ENV PATH=/opt/venv/bin:$PATH \
    # Log lines appear when they are written and not when a buffer is full.
    PYTHONUNBUFFERED=1 \
    # The root file system is read-only in the chart, so there is nowhere to write bytecode to.
    PYTHONDONTWRITEBYTECODE=1 \
    # One thread a process: at this model's size a second one costs more than it gains.
    OMP_NUM_THREADS=1 \
    # Idle OpenMP threads must not spin; they would take cores from other processes.
    OMP_WAIT_POLICY=PASSIVE \
    # Two threads allocate, the event loop's and the engine's. glibc would give every thread an arena of its own,
    # up to eight per core, and each keeps what was freed in it.
    MALLOC_ARENA_MAX=2
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
# The exec form: the service itself receives SIGTERM and finishes the requests in flight.
CMD ["python", "-m", "app", "serve", "--bundle", "bundles/demo", "--host", "0.0.0.0", "--port", "8000"]

FROM service AS gpu
# The CUDA libraries come with torch; the driver is the host's, and its container toolkit reads these two. An image
# that is not based on one of CUDA's has to request the driver itself.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    # Without a GPU it says so and exits, instead of serving slowly on the CPU.
    STREAMREC_RUNTIME=cuda
COPY --from=packages-gpu /opt/venv /opt/venv

FROM service AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv

# Two stages: the first makes a virtual environment, the second takes only the result. So nothing that builds packages
# is in the image that runs.

FROM python:3.11-slim-bookworm AS builder

COPY requirements.txt constraints.txt /tmp/
# The environment gets no pip of its own: the base image's installs into it. Bytecode is written here, once, since the
# worker can't write any (not root, read-only). It is never compared with its source again.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-compile \
        -r /tmp/requirements.txt -c /tmp/constraints.txt \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

# Optional packages, for example --build-arg EXTRA_PACKAGES=s3fs for artifacts on S3. They come last, so that images with
# different ones share what stands above.
ARG EXTRA_PACKAGES=""
RUN test -z "$EXTRA_PACKAGES" \
    || pip --python /opt/venv/bin/python install --no-cache-dir -c /tmp/constraints.txt $EXTRA_PACKAGES


FROM python:3.11-slim-bookworm

# A fixed uid, so that the owner of files on a volume is known beforehand. A new volume that is mounted at /artifacts
# takes over that folder's owner (ARTIFACT_URL=file:///artifacts).
RUN groupadd --gid 10001 worker \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin worker \
    && install --directory --owner=worker --group=worker /artifacts

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001

# Exec form: the worker is process 1 and gets SIGTERM itself, on which it hands its jobs back.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 CMD ["python", "worker.py", "health"]
ENTRYPOINT ["python", "worker.py"]
CMD ["run"]

# Last, what changes most. Docker copies a folder's contents, so each folder has a line of its own.
COPY --from=builder /opt/venv /opt/venv
COPY worker.py /app/
COPY workerkit /app/workerkit
COPY worker_commands /app/worker_commands

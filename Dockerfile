# Two stages: the first makes a virtual environment out of requirements.txt, the second takes only the result,
# so that nothing that builds packages is in the image that runs.

FROM python:3.11-slim-bookworm AS builder

# Optional packages, for example --build-arg EXTRA_PACKAGES=s3fs for artifacts on S3.
ARG EXTRA_PACKAGES=""
COPY requirements.txt /tmp/requirements.txt
# The environment gets no pip of its own: the base image's installs into it. Bytecode is written here, once, since the
# worker can't write any (not root, read-only); that of packages is never compared with its source again.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -r /tmp/requirements.txt $EXTRA_PACKAGES \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib
COPY worker.py demo.py screens.py /app/
RUN python -m compileall -q --invalidation-mode checked-hash /app


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

# Last, what changes most.
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app /app

# The image of every process beside one machine: code server, run and step of Kubernetes, worker of Ray.
# Build it in the project's folder: docker build -f deploy/worker.Dockerfile -t dmr-worker .

FROM python:3.11-slim AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
# The wheel from PyPI brings CUDA's libraries; the node needs nothing but NVIDIA's driver and container runtime.
# A layer of its own: it is large and changes seldom.
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY dmr_pipeline dmr_pipeline
RUN pip install -c constraints.txt '.[ray,kubernetes,postgres,ui]'

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 1000 --create-home dmr \
    && install -d -o dmr -g dmr /opt/dmr /opt/dmr/.dvc /opt/dmr/dagster_home /opt/dmr/data /opt/dmr/dvc-remote
USER 1000
# The project's folder, in which every command works.
WORKDIR /opt/dmr
COPY --chown=dmr dvc.yaml dvc.lock .dvcignore ./
COPY --chown=dmr .dvc/config .dvc/config
COPY --chown=dmr recipes recipes
COPY --chown=dmr dagster_home/dagster.yaml dagster_home/dagster.yaml
ENV PATH=/opt/venv/bin:$PATH DMR_HOME=/opt/dmr DAGSTER_HOME=/opt/dmr/dagster_home PYTHONUNBUFFERED=1
# An image has no Git, so DVC must not look for a repository.
RUN dvc config --local core.no_scm true && dvc remote add --local volume /opt/dmr/dvc-remote
EXPOSE 4000
# No entry point: runs and steps of Kubernetes, and workers of Ray, bring the whole command that takes this one's place.
CMD ["dagster", "code-server", "start", "--host", "0.0.0.0", "--port", "4000", "--module-name", "dmr_pipeline.definitions", "--location-name", "dmr_pipeline"]

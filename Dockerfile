# docker build -t fwlora . ; README, "In a pipeline", says how to run it. All that Python needs is installed here.
FROM python:3.11-slim-bookworm

# git names the commit that a run records.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /workspace

# A home that any user of the host can write to: `docker run --user "$(id -u)"` has none of its own.
ENV HOME=/home/fwlora
RUN mkdir -m 777 /home/fwlora && pip install --no-cache-dir uv==0.13.9

WORKDIR /workspace
ENV UV_LINK_MODE=copy UV_NO_CACHE=1
COPY pyproject.toml README.md LICENSE ./
COPY fwlora/__init__.py fwlora/__init__.py
RUN uv sync --no-install-project
COPY . .
RUN uv sync && mkdir -p .cache .research/results && chmod -R a+rwX .cache .research

# From here on uv fetches nothing.
ENV UV_NO_SYNC=1 UV_OFFLINE=1 RESULTS_DIR=.research/results
# What a container writes on a mount, the host's user may read and remove.
ENTRYPOINT ["/bin/sh", "-c", "umask 0000 && exec \"$@\"", "--"]
CMD ["uv", "run", "python", "-m", "src.main", "--help"]

# syntax=docker/dockerfile:1
# One image for coordinator and lab machines. What is large and seldom changes comes first: torch, then the other
# dependencies, then Molehill, which is the only layer that a change of its code replaces.
#
#   docker build -t molehill .                                        CPU, with the sample base model of the how-to
#   docker build -t molehill --build-arg EXTRAS=client .              a lab machine with a base model of its own
#   docker build -t molehill --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .     for NVIDIA GPUs

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheels
WORKDIR /stub
# The same distribution without its code: it has the same dependencies, and stays the same when only code changes.
COPY pyproject.toml LICENSE ./
RUN touch README.md \
 && for each in molehill protos/molehill_protos server/molehill_server client/molehill_client \
                simulation/molehill_simulation edge/molehill_edge edge/molehill_export; do mkdir -p "$each" && touch "$each/__init__.py"; done \
 && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels/stub .
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels/molehill .

FROM python:${PYTHON}-slim
# simulation is client and server, demo adds the sample base model; a coordinator needs simulation, for its report.
ARG EXTRAS=demo,privacy
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /opt/constraints.txt
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' /opt/constraints.txt)"
RUN --mount=type=bind,from=wheels,source=/wheels/stub,target=/wheels \
    pip install --no-cache-dir -c /opt/constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"
RUN --mount=type=bind,from=wheels,source=/wheels/molehill,target=/wheels \
    pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl \
 && useradd --uid 1000 --create-home --shell /usr/sbin/nologin molehill \
 && install -d -m 1777 /var/lib/molehill
# Everything that is written lies below /var/lib/molehill: mount a volume there. Any user id may run the image, so that
# it can be that of the keys' owner.
ENV HOME=/var/lib/molehill \
    LOGNAME=molehill \
    HF_HOME=/var/lib/molehill/huggingface \
    MOLEHILL_STATE_DIR=/var/lib/molehill/state \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/molehill
USER 1000:1000
EXPOSE 9440 9441
ENTRYPOINT ["molehill"]
CMD ["--help"]

# syntax=docker/dockerfile:1
# One image for coordinator and lab machines. What is large and seldom changes comes first: torch, then the other
# dependencies, then Molehill, which is the only layer that a change of its code replaces.
#
#   docker build -t molehill --build-arg BASE=python@sha256:... .                   CPU, with the how-to's sample base model
#       ... --build-arg EXTRAS=client .                                             a lab machine with a base of its own
#       ... --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .        for NVIDIA GPUs
#
# BASE is an image of Python 3.11 or newer by its digest, so that the same is built again tomorrow; a tag, behind which
# the image changes, is refused. Look the digest up once and keep it:
#
#   docker pull python:3.11-slim && docker image inspect --format '{{index .RepoDigests 0}}' python:3.11-slim
#
# Whatever pip installs has its SHA-256 in requirements/, except torch: every index has builds of its own, and the
# version is all that is compared.

ARG BASE=python:3.11-slim

FROM ${BASE} AS wheels
ARG BASE
RUN echo "${BASE}" | grep -Eq '@sha256:[0-9a-f]{64}$' \
 || { echo "BASE is ${BASE} and no digest: give --build-arg BASE=python@sha256:..." >&2; exit 1; }
COPY requirements/build.txt /opt/build.txt
RUN pip install --no-cache-dir --require-hashes --no-deps -r /opt/build.txt
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE}
# simulation is client and server, demo adds the sample base model; a coordinator needs simulation, for its report.
# Others than these, client, edge and simulation have no file in requirements/.
ARG EXTRAS=demo,privacy
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt requirements /opt/
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' /opt/constraints.txt)"
RUN pip install --no-cache-dir --require-hashes --no-deps -r "/opt/$(echo "${EXTRAS}" | tr , -).txt"
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
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

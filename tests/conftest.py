"""For all tests."""

from __future__ import annotations

import logging
import signal
from collections import Counter

import pytest

from molehill import logs
from molehill.cache import cache_folder

# A shell that starts the tests in the background has them ignore Ctrl-C, and every program they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What runs leave in the cache folder for later ones stays with these tests; downloads are there already."""
    own = tmp_path_factory.mktemp("cache")
    for name in ("samples", "npm"):
        (cache_folder() / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(cache_folder() / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLEHILL_CACHE", str(own))
        yield


@pytest.fixture(autouse=True)
def _alike_wherever_they_run(monkeypatch):
    """What a command sets up for its process ends with its test, and what pytest-xdist sets for its own begins none.

    Later tests would have their log records captured, and tables would be as wide as the lines of the processes.
    """
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in logs.OURS]
    levels = [logger.level for logger in loggers]
    yield
    logging.captureWarnings(capture=False)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_terminal_summary(terminalreporter):
    """Say which files took the time, when there was much of it; ``--durations`` says which tests."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if seconds.total() < 120:
        return
    terminalreporter.section(f"{len(seconds)} files, {seconds.total():.0f} s of test time; the longest 15")
    for file, taken in seconds.most_common(15):
        terminalreporter.write_line(f"{taken:7.1f} s  {file}")

"""Where lies what was downloaded or measured once for all runs of a user."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The folder: ``MOLEHILL_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("MOLEHILL_CACHE") or platformdirs.user_cache_path("molehill"))

"""The libraries of the page, from the cache or npm."""

from __future__ import annotations

import functools

from molehill.errors import DeployError
from molehill_web import vendor


@functools.cache
def lacking() -> str:
    """Why they are not to be had; empty when they are there."""
    try:
        for _ in vendor.parts():
            pass
    except DeployError as error:
        return str(error)
    return ""

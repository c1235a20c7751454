"""Federated and edge fine-tuning of language models with mixtures of LoRA experts (MoLoRA).

>>> import molehill
>>> with molehill.load("runs/demo", "client-1") as model:
...     model.classify(["a lovely little film"])
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "MolehillError", "load", "methods", "simulate"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: this package imports no part, and a device has not all of them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from molehill import plugins  # noqa: PLC0415  (as above)
    from molehill.extras import needs  # noqa: PLC0415

    with needs("simulation"):
        return next(
            point for point in plugins.points("molehill.api") if plugins.ours(point) and point.name == name
        ).load()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

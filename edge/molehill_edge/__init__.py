"""The device runtime: verify, load, route, generate. Needs onnxruntime, tokenizers, numpy and tuf, never torch.

>>> from molehill_edge import Bundle, InsecureLocal
>>> with Bundle.open("bundle", trust=InsecureLocal()) as bundle:
...     bundle.classify(["some text"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molehill.decoding.stream import Answer
    from molehill.predictions import Class, Entities, Entity, Flags, Number, Prediction
    from molehill_edge.added import Added
    from molehill_edge.bundle import Bundle
    from molehill_edge.chat import Chat
    from molehill_edge.gates import Gate
    from molehill_edge.personalise import Outcome
    from molehill_edge.routes import RouterReport
    from molehill_edge.store import Store
    from molehill_edge.trust import Admitted, InsecureLocal, Trust
    from molehill_edge.view import View

__all__ = [
    "Added", "Admitted", "Answer", "Bundle", "Chat", "Class", "Entities", "Entity", "Flags", "Gate", "InsecureLocal",
    "Number", "Outcome", "Prediction", "RouterReport", "Store", "Trust", "View",
]  # fmt: skip

# Importing the package takes no time; onnxruntime and tuf wait until they are needed.
_HOMES = {
    "Added": "added",
    "Admitted": "trust",
    "Answer": "molehill.decoding.stream",
    "Bundle": "bundle",
    "Chat": "chat",
    "Class": "molehill.predictions",
    "Entities": "molehill.predictions",
    "Entity": "molehill.predictions",
    "Flags": "molehill.predictions",
    "Gate": "gates",
    "InsecureLocal": "trust",
    "Number": "molehill.predictions",
    "Outcome": "personalise",
    "Prediction": "molehill.predictions",
    "RouterReport": "routes",
    "Store": "store",
    "Trust": "trust",
    "View": "view",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    return getattr(importlib.import_module(home if "." in home else f"{__name__}.{home}"), name)

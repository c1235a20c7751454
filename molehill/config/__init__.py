"""The configuration of a run: one TOML file, validated before anything starts.

A method is named by a string or, when it has parameters, by a table with ``name``::

    selector = "dense"
    selector = { name = "top_k", k = 2 }

A preset fills in the keys of its section; keys given beside it win. Unknown keys are errors.
"""

from molehill.config.methods import Axis, MethodRef
from molehill.config.reading import load, parse
from molehill.config.sections import (
    Base,
    Data,
    Engine,
    Evaluate,
    Federation,
    MoLoRA,
    Personal,
    Privacy,
    Rounds,
    Run,
    Scenario,
    Section,
    Split,
    Task,
    Train,
    Wire,
)
from molehill.config.whole import Config, method_refs

__all__ = [
    "Axis",
    "Base",
    "Config",
    "Data",
    "Engine",
    "Evaluate",
    "Federation",
    "MethodRef",
    "MoLoRA",
    "Personal",
    "Privacy",
    "Rounds",
    "Run",
    "Scenario",
    "Section",
    "Split",
    "Task",
    "Train",
    "Wire",
    "load",
    "method_refs",
    "parse",
]

"""Assignments (axis ``assignment``): which experts an owner leans on and trains.

An assignment sees, after a round, the sum of every client's changes of a few tensors, which the server has anyway
unless sums are masked, and says which experts are whose from then on; see `molehill_server.planning.assigning`. What
it decided is part of the checkpoint.
"""

from __future__ import annotations

from molehill_server.planning.assigning import Assignment

INTERFACE = Assignment
WORDS = ("cluster", "clustering", "specialisation")

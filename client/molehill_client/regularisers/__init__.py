"""What acts on the gradients of local training beside the objective, named in ``train.rules``."""

from __future__ import annotations

from molehill_client.interfaces import Regulariser

INTERFACE = Regulariser
WORDS = ("regularizer", "penalty", "proximal")

"""What an owner could make of the final model, named in ``personal.candidates``."""

from __future__ import annotations

from molehill_client.making import Candidate

INTERFACE = Candidate
WORDS = ("personalisation", "personalization", "choice", "fallback")

"""Combinations that cannot work, found before anything starts, with the reason.

Every rule is a small function of the configuration; each subject has a module with a table of its own.
"""

from __future__ import annotations

from molehill.config import Config
from molehill.errors import ConfigError
from molehill_server.check import aggregation, assignments, draw, kinds, masked, model, personal, privacy
from molehill_server.check.conflict import Conflict

__all__ = ["Conflict", "check", "require"]

_SUBJECTS = (aggregation, assignments, model, personal, kinds, privacy, masked, draw)
RULES = tuple(rule for subject in _SUBJECTS for rule in subject.RULES)


def check(config: Config) -> list[Conflict]:
    """All conflicts in a configuration, refusals first."""
    found = [conflict for rule in RULES for conflict in rule(config)]
    return sorted(found, key=lambda conflict: conflict.verdict)


def require(config: Config) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: Names the first refusal.
    """
    for conflict in check(config):
        if conflict.verdict == "refuse":
            raise ConfigError(conflict.why, where=" with ".join(conflict.keys), mend=conflict.mend)

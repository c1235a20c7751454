"""What learns from rows shows how far it is, whatever it is."""

from __future__ import annotations

import pytest
from number_passes import HostPasses, sure

from molehill import catalogue
from molehill.decoding import options
from molehill.decoding.interfaces import Example, Learns

SAYS = {"e0": lambda ids: sure(ids[0] % 2, 2), "e1": lambda ids: sure((ids[0] + 1) % 2, 2)}
ROWS = [Example((n % 3, n % 2), (n % 2,), {"expert": f"e{n % 2}"}) for n in range(8)]
PICKERS = [method.name for method in catalogue.methods("picker") if method.target.fitted]


def _learners():
    """Keys of every strategy that learns from rows, and with every picker that does."""
    found = []
    for method in catalogue.methods("decoding"):
        known = method.params.__dataclass_fields__
        if "rows" in known:
            picked = [{"by": by} for by in PICKERS] if "by" in known else [{}]
            found += [pytest.param(method.name, keys, id=" ".join([method.name, *keys.values()])) for keys in picked]
    return found


class Watched(HostPasses):
    """Counts passes that were taken for a row that was given, and for none."""

    row = None

    def _count(self):
        self.counts[self.row is not None] += 1

    def logits(self, ids, *rest):
        self._count()
        return super().logits(ids, *rest)

    def condition(self, ids):
        self._count()
        return super().condition(ids)


@pytest.mark.parametrize(("name", "keys"), _learners())
def test_every_pass_is_for_a_row_that_is_gone_through(name, keys):
    strategy, passes = options.build("decoding", name, {"rows": "rows", **keys}), Watched(SAYS)
    assert isinstance(strategy, Learns)
    passes.counts = {True: 0, False: 0}

    def through(rows):
        for passes.row in rows:
            yield passes.row
        passes.row = None

    strategy.learn(passes, ROWS, through)
    assert passes.counts[False] == 0
    assert passes.counts[True] >= len(ROWS)

"""Client selectors (axis ``client_selector``): who takes part in a round.

A selector is a pure function ``(pool, round_number, attempt, seed) -> chosen`` over client ids, so a resumed run
chooses the same clients without any saved state. ``attempt`` counts the retries of a round, from 0.

A selector that draws declares how in its parameters, see `molehill.draws.Drawn`. Only what is declared counts for
privacy.
"""

WORDS = ("sampler", "sampling", "participation")

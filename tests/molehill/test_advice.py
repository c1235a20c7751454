"""Who is told to use another method is told of those that would do, also of those that came later."""

from __future__ import annotations

import plug_in

from molehill import registry

RULE = '''
from molehill.registry import register
from molehill_server.aggregation.rules import mean

@register("rule", "a_sum", paper="house")
class ASum(mean.Mean):
    """One of others."""
'''
CODEC = '''
from molehill.registry import register
from molehill.wire.codecs import fp32

@register("codec", "a_codec", paper="house")
class ACodec(fp32.Fp32):
    """One of others."""
'''
ASKED = """
from molehill import config
from molehill_client.policy import Policy
from molehill_server.check import check
asked = config.parse({
    "privacy": {"secure_aggregation": True}, "federation": {"rule": "norm_weights"}, "wire": {"up": "int4"},
})
print(*Policy().share.codecs)
print(*(conflict.why for conflict in check(asked)), sep="\\n")
"""


def test_methods_that_came_later_are_offered_and_taken(tmp_path):
    modules = {"a_sum/__init__.py": RULE, "a_codec/__init__.py": CODEC}
    plug_in.add(tmp_path, "others", "molehill.methods", {"rule": "a_sum", "codec": "a_codec"}, modules)
    done = plug_in.python(tmp_path, ASKED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n", 1)[0].split() == [
        "a_codec", *(method.name for method in registry.methods("codec"))
    ]  # fmt: skip
    assert "use rule 'a_sum' or 'mean'" in done.stdout
    assert "use 'a_codec' or 'fp32'" in done.stdout


def test_where_none_would_do_the_advice_is_still_a_sentence():
    assert registry.those("rule", sums="?") == "another that is registered"
    assert registry.either(["a", "b", "c"]) == "'a', 'b' or 'c'"

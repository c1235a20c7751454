"""The registry blames what is to blame: a module that is missing, a plug-in that fails, or ourselves."""

from __future__ import annotations

import importlib

import plug_in
import pytest

from molehill.errors import ConfigError
from molehill.extras import bringing, lacking, needs

CODEC = '''
from molehill.registry import register

@register("codec", "{name}", paper="house")
class Codec:
    """One of others."""
'''
NAMES = """
from molehill import registry
from molehill.errors import ConfigError
print(*(f"{method.name}:{method.target.__module__}" for method in registry.methods("codec")))
try:
    registry.get("codec", "half")
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """One plug-in that is whole, one that fails after it registered something, one that takes a name of ours."""
    site = tmp_path_factory.mktemp("site")
    group = "molehill.methods"
    plug_in.add(
        site, "whole", group, {"codec": "whole"}, {"whole/__init__.py": "", "whole/a.py": CODEC.format(name="a1")}
    )
    files = {
        "a_half/__init__.py": "",
        "a_half/a.py": CODEC.format(name="half"),
        "a_half/b.py": "import not_there_at_all\n",
    }
    plug_in.add(site, "a-half", group, {"codec": "a_half"}, files)
    plug_in.add(site, "thief", group, {"codec": "thief"}, {"thief.py": CODEC.format(name="int4")})
    return site


def test_a_plug_in_that_fails_is_named_and_left_out(site):
    done = plug_in.python(site, NAMES)
    names, error = done.stdout.splitlines()
    assert "a1:whole.a" in names.split()
    assert "int4:molehill.wire.codecs.int4" in names.split()
    assert "half" not in names
    assert error.startswith("unknown codec 'half'. Did you mean")
    assert "plug-in a-half" in error
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert said[0].startswith("left out: plug-in a-half: molehill.methods 'codec' (a_half) cannot be used: ")
    assert "No module named 'not_there_at_all'" in said[0]
    assert "plug-in thief" in said[1]
    assert "codec/int4 is already registered by molehill.wire.codecs.int4" in said[1]


@pytest.mark.parametrize(
    ("blocked", "kind", "mend"),
    [
        ("zstandard", "molehill.errors.ConfigError: cannot import zstandard", "Run: pip install 'molehill'"),
        ("molehill.wire.codecs.int4", "ModuleNotFoundError: import of molehill.wire.codecs.int4 halted", ""),
    ],
)
def test_what_is_ours_and_fails_is_an_error(tmp_path, blocked, kind, mend):
    code = f"import sys; sys.modules[{blocked!r}] = None; from molehill import registry; registry.load('codec')"
    done = plug_in.python(tmp_path, code)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(kind)
    assert last.endswith(mend)


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn", "simulation"),  # the one that is asked for, when it brings the module
        ("dp_accounting.rdp", "privacy"),
        ("onnxscript", "export"),
        ("tuf.api", "edge"),
        ("grpc_health", "simulation"),
        ("pydantic", ""),
        ("something_that_datasets_needs", "simulation"),
    ],
)
def test_the_extra_that_brings_a_module(module, extra):
    assert bringing(module, "simulation") == extra
    with pytest.raises(ConfigError) as caught, needs("simulation"):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert module in caught.value.what
    assert caught.value.mend == f"Run: pip install '{f'molehill[{extra}]' if extra else 'molehill'}'"


def test_our_own_import_errors_are_bugs():
    with pytest.raises(ModuleNotFoundError), needs("simulation"):
        importlib.import_module("molehill.no_such_module")


def test_what_an_installation_lacks():
    assert lacking("export") == ()  # the tests have everything
    assert lacking("no such extra") == ()

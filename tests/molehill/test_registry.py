"""The registry blames what is to blame: a module that is missing, a plug-in that fails, or ourselves."""

from __future__ import annotations

import importlib

import plug_in
import pytest

from molehill import catalogue, registry
from molehill.errors import ConfigError
from molehill.extras import bringing, lacking, needs

CODEC = '''
from molehill.registry import register
from molehill.wire.codecs import fp32

@register("codec", "{name}", paper="house")
class Codec(fp32.Fp32):
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


def refused(site, axis, code):
    """What is said of a plug-in, where nothing else of the axis is lost by it."""
    plug_in.add(site, "theirs", "molehill.methods", {axis: "theirs"}, {"theirs.py": code})
    ask = f"from molehill import registry; print(len(list(registry.methods({axis!r}))))"
    done = plug_in.python(site, ask)
    assert (done.returncode, done.stdout) == (0, f"{len(list(registry.methods(axis)))}\n"), done.stderr
    (line,) = done.stderr.splitlines()
    said = f"left out: plug-in theirs: molehill.methods {axis!r} (theirs) cannot be used: "
    assert line.startswith(said)
    return line.removeprefix(said)


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "exit()", "import sys; sys.exit('no licence')"])
def test_a_plug_in_that_ends_the_program_is_left_out(tmp_path, ending):
    assert refused(tmp_path, "codec", ending).startswith("SystemExit: ")


# Every axis whose methods are classes, and where their class is.
INTERFACES = {
    axis: wanted for axis in registry.axes() if (wanted := getattr(catalogue._package(axis), "INTERFACE", None))
}


def test_methods_of_an_axis_are_all_classes_of_its_own_or_all_functions():
    for method in registry.methods():
        assert isinstance(method.target, type) is (method.axis in INTERFACES), method
    assert len(INTERFACES) == 23


@pytest.mark.parametrize("axis", INTERFACES)
@pytest.mark.parametrize("target", [type("Theirs", (), {}), lambda: None], ids=["class", "function"])
def test_what_does_not_derive_from_the_class_of_its_axis_is_told_the_class(axis, target):
    wanted = f"{INTERFACES[axis].__module__}.{INTERFACES[axis].__name__}"
    with pytest.raises(TypeError, match=f"^{axis}/theirs must be a class derived from {wanted}$"):
        registry.register(axis, "theirs", paper="house")(target)
    assert "theirs" not in {method.name for method in registry.methods(axis)}


def test_a_method_that_lacks_what_its_class_wants_is_told_what():
    class Half(INTERFACES["codec"]):
        def encode(self, tree, memory=None):
            return b""

    with pytest.raises(TypeError, match=r"^codec/half lacks decode, see molehill\.wire\.codecs\.Codec$"):
        registry.register("codec", "half", paper="house")(Half)


CHECK = "import sys; from molehill.cli import main; sys.argv[1:] = ['check', *sys.argv[1:]]; main()"


def test_check_blames_the_plug_in_whose_scorer_is_none(tmp_path):
    code = "import molehill.registry as r\n@r.register('scorer', 'theirs', paper='house')\nclass M:\n    pass\n"
    assert "must be a class derived from molehill.molora.interfaces.Scorer" in refused(tmp_path, "scorer", code)
    path = tmp_path / "run.toml"
    for text in ('[personal]\ngate = "split"\n', '[molora]\nscorer = "theirs"\n'):
        path.write_text(f'[base]\nmodel = "some/model"\n{text}', encoding="utf-8")
        done = plug_in.python(tmp_path, CHECK, str(path))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: {path}:")
        assert "plug-in theirs" in done.stderr


def test_an_axis_of_which_nothing_is_installed_is_not_answered_with_a_question():
    with pytest.raises(
        ConfigError, match=r"^unknown nothing 'some'\. No nothing is installed at all: install Molehill anew\.$"
    ):
        registry.get("nothing", "some")

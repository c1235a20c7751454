"""The command line finds its verbs: those of the parts that are there, and those of others."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import device_venv
import plug_in
import pytest
from typer.testing import CliRunner

from molehill import plugins
from molehill.cli import app

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
DECLARED = PYPROJECT["project"]["entry-points"]["molehill.commands"]
VERBS = sorted(name for name in DECLARED if "." not in name)
HEAVY = {"torch", "flwr", "transformers", "pydantic", "numpy", "onnxruntime", "tuf", "grpc"}
MAIN = "from molehill.cli import main; main()"


def listed(text):
    return re.findall(r"^│ ([\w-]+)", text[text.index("Commands") :], re.MULTILINE)


def test_all_verbs_are_listed_and_can_be_imported():
    assert {point.name: point.value for point in plugins.points("molehill.commands") if plugins.ours(point)} == DECLARED
    assert listed(CliRunner().invoke(app, ["--help"]).stdout) == VERBS
    assert "run" in listed(CliRunner().invoke(app, ["server", "--help"]).stdout)
    for verb in VERBS:
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0


def test_help_takes_at_most_two_and_a_half_times_what_any_program_of_typer_takes():
    """The 0.5 s of a machine on which the smallest takes 0.2 s; seconds alone would judge the machine."""
    smallest = "import typer; app = typer.Typer(); app.command('a')(lambda: 0); app.command('b')(lambda: 0); app()"

    def seconds(code):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds(MAIN) for _ in range(3)) < 2.5 * min(seconds(smallest) for _ in range(3))


def test_a_verb_is_imported_when_it_is_asked_for(tmp_path):
    code = """
import sys
from typer.testing import CliRunner
from molehill.cli import app
assert CliRunner().invoke(app, sys.argv[1:]).exit_code == 0
print(*sys.modules)
"""
    everything = set(plug_in.python(tmp_path, code, "--help").stdout.split())
    assert not HEAVY & everything
    assert "molehill_edge.commands.group" in everything
    one = set(plug_in.python(tmp_path, code, "pki", "--help").stdout.split())
    assert {name for name in one if name.startswith("molehill_")} == set()


def test_a_typo_is_told_what_is_similar():
    result = CliRunner().invoke(app, ["simulat"])
    assert result.exit_code == 2
    assert "Did you mean 'simulate'?" in result.stderr


@pytest.fixture(scope="module")
def plugged(tmp_path_factory):
    """Plug-ins of others: one is whole, one fails on import, one asks for names that are taken or make no sense."""
    site = tmp_path_factory.mktemp("site")
    plug_in.add(
        site,
        "acme",
        "molehill.commands",
        {"greet": "acme_verbs:greet", "edge.shout": "acme_verbs:shout"},
        {
            "acme_verbs.py": '''
            import typer

            def greet(name: str) -> None:
                """Greet somebody."""
                typer.echo(f"hello {name}")

            def shout() -> None:
                """Shout."""
                typer.echo("HELLO")
            '''
        },
    )
    plug_in.add(
        site,
        "bad-luck",
        "molehill.commands",
        {"fail": "bad_luck:fail", "server.fail": "bad_luck:fail"},
        {"bad_luck.py": "import not_installed_anywhere\n"},
    )
    plug_in.add(site, "script", "molehill.commands", {"script": "script:it"}, {"script.py": "raise SystemExit(3)\n"})
    points = {"simulate": "greedy:it", "server.up": "greedy:it", "audits.it": "greedy:it", "number": "greedy:NUMBER"}
    plug_in.add(
        site,
        "greedy",
        "molehill.commands",
        points,
        {"greedy.py": "NUMBER = 3\n\ndef it() -> None:\n    raise SystemExit('this is not yours')\n"},
    )
    return site


def test_plug_ins_bring_verbs_and_a_broken_one_says_so(plugged):
    done = plug_in.python(plugged, MAIN, "--help")
    assert done.returncode == 0
    assert listed(done.stdout) == sorted([*VERBS, "greet"])
    said = done.stderr.splitlines()
    assert len(said) == 7
    assert any("plug-in script" in line and "SystemExit: 3" in line for line in said)
    assert any("bad-luck" in line and "'fail'" in line and "not_installed_anywhere" in line for line in said)
    assert any("bad-luck" in line and "'server.fail'" in line for line in said)
    assert any(
        "greedy" in line and "'simulate'" in line and "molehill has that command already" in line for line in said
    )
    assert any("greedy" in line and "'audits.it'" in line and "there is no command 'audits'" in line for line in said)
    assert any("greedy" in line and "'number'" in line for line in said)
    assert "Traceback" not in done.stderr
    assert plug_in.python(plugged, MAIN, "greet", "you").stdout == "hello you\n"


def test_plug_ins_extend_a_group(plugged):
    assert plug_in.python(plugged, MAIN, "edge", "shout").stdout == "HELLO\n"
    done = plug_in.python(plugged, MAIN, "server", "--help")
    assert listed(done.stdout) == ["up", "status", "stop", "run"]
    assert "bad-luck" in done.stderr
    assert "molehill has that command already" in done.stderr


def test_a_broken_verb_that_is_called_is_an_error(plugged):
    done = plug_in.python(plugged, MAIN, "fail")
    assert done.returncode == 2
    assert "error: plug-in bad-luck: molehill.commands 'fail' (bad_luck:fail) cannot be used: " in done.stderr
    assert "not_installed_anywhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_shells_are_told_what_can_be_typed(plugged):
    def typed(words):
        asked = {"_MOLEHILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = plug_in.python(plugged, MAIN, **asked)
        assert done.stderr == ""
        return done.stdout.split()

    assert typed("molehill si") == ["simulate"]
    assert typed("molehill edge pu") == ["pull"]
    assert typed("molehill edge run --gat") == ["--gate"]
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_once_it_was_installed(tmp_path):
    """What a shell keeps in its start-up files, and calls when somebody presses Tab."""
    press_tab = """
        source ~/.bashrc
        read -ra COMP_WORDS <<< "$TYPED"
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        $(complete -p molehill | sed 's/.*-F \\([^ ]*\\).*/\\1/') molehill
        echo "${COMPREPLY[@]}"
    """
    programs = str(Path(sys.executable).parent)

    def bash(code, **variables):
        env = {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}", **variables}
        return subprocess.run(
            ["bash", "--norc", "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout

    assert "bash completion installed" in bash("molehill --install-completion; true")
    assert bash(press_tab, TYPED="molehill si").split() == ["simulate"]
    assert bash(press_tab, TYPED="molehill simulate --res").split() == ["--resume"]


@pytest.mark.skipif(sys.platform == "win32", reason="an environment of links")
def test_a_device_lists_what_it_has_and_says_what_brings_the_rest(tmp_path):
    programs = device_venv.make(tmp_path / "device")

    def molehill(*words):
        return subprocess.run(
            [programs / "molehill", *words],
            env=device_venv.environment(tmp_path), capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = molehill("--help")
    assert listed(done.stdout) == ["audit", "edge", "pki"]
    assert done.stderr == ""
    for words, extra in (
        (["simulate"], "simulation"),
        (["server", "stop"], "server"),
        (["methods"], "simulation"),
        (["export", "run", "--out", "bundle"], "export"),
    ):
        done = molehill(*words)
        assert done.returncode == 2
        assert f"pip install 'molehill[{extra}]'" in done.stderr
    (part,) = (tmp_path / "device").glob("lib/*/site-packages/molehill_server")
    part.unlink()
    done = molehill("--help")
    assert listed(done.stdout) == ["edge", "pki"]
    assert done.stderr == ""
    done = molehill("audit", "verify", "audit.jsonl")
    assert done.returncode == 2
    assert "this installation has no molehill_server" in done.stderr

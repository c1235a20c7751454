"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from molehill import __version__
from molehill.cli import app
from molehill.errors import TrainingError
from molehill.terminal import explained


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def engine(monkeypatch):
    """Stands for the engine, so that what the command line makes of its ending can be seen; records the calls."""
    calls = []

    class Ends:
        outcome: object = None

        def __call__(self, config, out, **options):
            calls.append((config, out, options))
            options["observer"]({"event": "progress", "stage": "train", "done": 1, "total": 2, "client": "a"})
            sys.stdout.write("chatter of a library\n")
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

    ends = Ends()
    module = ModuleType("molehill_simulation.simulate")
    module.simulate = ends
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ends.calls = calls
    return ends


@pytest.fixture
def summary():
    from molehill_simulation.summary import BaseModelInfo, summarise

    return summarise([], BaseModelInfo(id="sample:minilm", digest="0"), "1")


def test_the_version():
    assert run("--version").stdout == f"molehill {__version__}\n"


def test_a_mistake_is_one_paragraph_and_a_code(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nlearning_rate = 1\n")
    result = run("check", path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path}:2: unknown key 'train.learning_rate'")
    assert result.stderr.count("\n") == 1


def test_a_mistake_as_json_is_an_envelope(tmp_path):
    result = run("simulate", "--json", "--out", tmp_path / "run", "--set", "molora.selector=best")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "ConfigError"
    assert error["code"] == 2
    assert set(error) == {"kind", "code", "what", "where", "mend"}


def test_an_unknown_engine_is_refused():
    assert run("simulate", "--engine", "magic").exit_code == 2


def test_an_install_without_extras_is_told_what_to_install(tmp_path):
    (tmp_path / "run.toml").write_text("[run]\nrounds = 1\n")
    script = """
import json, sys
sys.modules["torch"] = sys.modules["jinja2"] = None
from typer.testing import CliRunner
from molehill.cli import app
for words in (["methods"], ["check", "run.toml"], ["simulate", "run.toml"], ["simulate"], ["report", "."]):
    result = CliRunner().invoke(app, words)
    print(json.dumps([words, result.exit_code, result.stderr]))
"""
    seen = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in seen.stdout.splitlines()]
    assert len(results) == 5
    for words, code, text in results:
        assert code == 2, words
        assert "cannot import" in text
        assert text.endswith("Run: pip install 'molehill[simulation]'\n")
    assert not (tmp_path / "runs").exists()


def test_the_ray_engine_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("simulate", "--engine", "ray", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "molehill[ray]" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_used_run_folder_is_not_overwritten(tmp_path, engine):
    (tmp_path / "precious").write_text("x")
    result = run("simulate", "--out", tmp_path)
    assert result.exit_code == 7
    assert "not empty" in result.stderr
    file = run("simulate", "--out", tmp_path / "precious")
    assert file.exit_code == 2
    nothing = run("simulate", "--out", tmp_path / "absent", "--resume")
    assert nothing.exit_code == 7
    assert "no run to resume" in nothing.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    nothing = run("simulate", "--out", foreign, "--resume")
    assert nothing.exit_code == 7
    assert "no run to resume" in nothing.stderr
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]
    assert engine.calls == []


@pytest.mark.parametrize("folder", ["/proc/none/run", "file/run", "dangling", "x" * 300, "new/" + "x" * 300])
def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path, engine, folder):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    result = run("simulate", "--out", tmp_path / folder)
    assert result.exit_code == 2, result.output
    assert "cannot use the run folder" in result.stderr
    assert engine.calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_trying_a_run_folder_leaves_no_trace(tmp_path, engine, summary):
    engine.outcome = summary
    assert run("simulate", "--out", tmp_path / "new" / "run").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_simulate_hands_the_configuration_to_the_engine(tmp_path, engine, summary):
    engine.outcome = summary
    result = run("simulate", "--out", tmp_path / "run", "--set", "run.rounds=3", "--set", "train.lr=1e-4")
    assert result.exit_code == 0, result.output
    ((config, out, options),) = engine.calls
    assert (config.run.rounds, config.train.lr, out) == (3, 1e-4, tmp_path / "run")
    assert options["engine"] == "local"
    assert "report.html" in result.stdout


def test_the_default_run_folder_bears_the_name_of_the_run(tmp_path, engine, summary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine.outcome = summary
    assert run("simulate", "--set", "run.name=mine").exit_code == 0
    assert str(engine.calls[0][1]) == "runs/mine"


def test_json_is_alone_on_standard_output(tmp_path, engine, summary):
    engine.outcome = summary
    result = run("simulate", "--json", "--out", tmp_path / "run")
    assert json.loads(result.stdout) == json.loads(summary.to_json())
    assert "chatter" in result.stderr


def test_resume_takes_the_configuration_of_the_run(tmp_path, engine, summary):
    (tmp_path / "config.toml").write_text("[run]\nrounds = 9\n")
    engine.outcome = summary
    assert run("simulate", "--out", tmp_path, "--resume").exit_code == 0
    assert engine.calls[0][0].run.rounds == 9


def test_ctrl_c_says_how_to_go_on(tmp_path, engine):
    engine.outcome = KeyboardInterrupt()
    folder = tmp_path / "a run"
    result = run("simulate", "--out", folder)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped before the run began"
    assert not folder.exists()
    folder.mkdir()
    (folder / "config.toml").write_text("")
    result = run("simulate", "--out", folder, "--resume")
    assert result.exit_code == 130
    assert result.stderr == f"stopped; resume with: molehill simulate --out '{folder}' --resume\n"
    as_json = run("simulate", "--json", "--engine", "ray", "--out", folder, "--resume")
    assert as_json.exit_code == 130
    error = json.loads(as_json.stdout)["error"]
    assert error["kind"] == "Interrupted"
    assert error["mend"] == f"molehill simulate --out '{folder}' --engine ray --resume"


def test_ctrl_c_while_the_engine_is_imported(tmp_path, engine, monkeypatch):
    class Slow(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "molehill_simulation.simulate", Slow("molehill_simulation.simulate"))
    result = run("simulate", "--json", "--out", tmp_path / "run")
    assert result.exit_code == 130
    error = {"kind": "Interrupted", "code": 130, "what": "stopped before the run began", "mend": ""}
    assert json.loads(result.stdout) == {"error": error}
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_run_keeps_its_code(tmp_path, engine):
    engine.outcome = TrainingError("the loss is NaN", where="client a, round 2", mend="Lower train.lr.")
    result = run("simulate", "--out", tmp_path / "run")
    assert result.exit_code == 8
    assert result.stderr.endswith("error: client a, round 2: the loss is NaN. Lower train.lr.\n")


def test_a_bug_is_not_hidden(tmp_path, engine):
    engine.outcome = ZeroDivisionError()
    assert isinstance(run("simulate", "--out", tmp_path / "run").exception, ZeroDivisionError)


def test_report_of_another_folder(tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 7
    assert "not a run folder" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("words", [["--version"], ["pki", "show", "nothing", "--json"]], ids=" ".join)
def test_an_output_that_takes_nothing_is_no_traceback(words):
    with Path("/dev/full").open("w") as full:
        code = "from molehill.cli import main; main()"
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode > 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_what_the_system_refuses_is_told_in_one_sentence(as_json, capsys):
    with pytest.raises(typer.Exit) as caught, explained(as_json):
        raise OSError(errno.ENOSPC, "No space left on device", "out/summary.json")
    assert caught.value.exit_code == 11
    said = capsys.readouterr()
    assert "the system refuses it: No space left on device" in (said.out if as_json else said.err)
    assert "out/summary.json" in (said.out if as_json else said.err)
    with pytest.raises(BrokenPipeError), explained(as_json):  # whoever read the output has gone
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_name_too_long_to_go_on_from_is_a_sentence(tmp_path, engine):
    result = run("simulate", "--resume", "--out", tmp_path / ("x" * 300))
    assert isinstance(result.exception, SystemExit)
    assert "File name too long" in result.stderr
    assert engine.calls == []

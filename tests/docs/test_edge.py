"""A run reaches a device as the pages say: every line, in its order, the device's in an environment without torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import device_venv
import page_libraries
import pytest
import tiny_world
from lab import free_ports
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from molehill.cli import app
from molehill.config import load

ROOT = Path(__file__).parents[2]
README, PAGE, AFTER = "README.md", "docs/how-to/edge.md", "docs/how-to/after-training.md"
TUTORIAL = "docs/tutorial.md"
FENCE = re.compile(r"^```(sh|python) (owner|device)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```csv (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # a page says to write it
TALK = re.compile(r"^```text chat\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # what is typed in a chat follows the prompt
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUICK = ("run.rounds=1", "train.steps=1", "base.device=cpu", "base.precision=fp32", "engine.workers=1", "molora.rank=2")
INSTALL = 'python3 -m venv device && device/bin/pip install -c constraints.txt ".[edge]"'
MORE = 'device/bin/pip install -c constraints.txt ".[serve]"'
ELSEWHERE = ("torch", "transformers", "peft", "flwr", "grpc", "onnx", "onnxscript", "onnxruntime_genai", "datasets")
MINE = "".join(
    json.dumps({"text": f"{text} {word}", "label": label}) + "\n"
    for label, words in tiny_world.LABELS.items()
    for word in words
    for text in ("the plot was", "we saw the scene and it was")
)


def blocks(page):
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def tiny_run(folder, name, base, rows, *settings):
    """Finish the run of a shipped configuration on a tiny base."""
    source = tiny_world.write_rows(folder / f"{name}.jsonl", rows)
    tiny = (f"base.model={base}", f"data.source={source}", "run.rounds=1", "train.steps=1", "base.device=cpu")
    tiny += ("base.precision=fp32", "evaluate.baselines=false", "engine.workers=1", *settings)
    text = load(ROOT / f"configs/{name}.toml", tiny).to_toml()
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    arguments = ["simulate", str(folder / f"{name}.toml"), "--out", str(folder / "runs" / name)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def bytes_tokenizer(base):
    """Another tokenizer for a base: one of bytes, as onnxruntime-genai knows them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" ".join(tiny_world.WORDS[6:])], trainer)
    inner.save(str(base / "tokenizer.json"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``runs/demo`` and ``runs/causal-lm``, and beside them the environment of a device."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{**row, "domain": ("amazon", "movie", "nyt", "tweets")[i % 4]} for i, row in enumerate(tiny_world.rows(96))]
    tiny_run(folder, "demo", tiny_world.save_base(folder / "bert", "bert"), rows)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    llama = tiny_world.save_base(folder / "llama", "llama", vocab_size=384, max_position_embeddings=512, **shape)
    bytes_tokenizer(llama)
    config = llama / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 512}))
    settings = ("task.max_length=64", "molora.rank=2", 'molora.targets=["q_proj","up_proj"]', "molora.scope=layer")
    tiny_run(folder, "causal-lm", llama, tiny_world.rows(24, "llama"), *settings)
    for extra in ("edge", "serve"):
        device_venv.make(folder / f"device-{extra}", extra)
    return folder


class Desk:
    """A clone on which the lines of a page are typed."""

    def __init__(self, folder, runs):
        self.folder = folder
        (folder / "runs").symlink_to(runs / "runs")
        (folder / "mine.jsonl").write_text(MINE, encoding="utf-8")
        self._devices = runs
        self._ports = dict(zip(("8080", "8000"), map(str, free_ports(2)), strict=True))
        self._servers = []
        self._talk = []
        owner = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self._environments = {"owner": owner, "device": device_venv.environment(folder / "home")}

    def type(self, who, line):
        """Run a line, which must end well; returns what it said."""
        line = self._here(line)
        if line.endswith("&"):
            return self._serve(who, shlex.split(line)[:-1])
        if who == "owner" and line.startswith("molehill "):  # here, where torch is loaded already
            words = shlex.split(line)[1:]
            if words[0] in {"check", "simulate"}:  # smaller than the page has it
                words += [word for each in QUICK for word in ("--set", each)]
            done = CliRunner().invoke(app, words, input="\n".join(self._talk) if words[0] == "chat" else None)
            assert done.exit_code == 0, f"{line}\n{done.output}"
            return done.output
        return self.run(who, ["bash", "-c", line])

    def run(self, who, command):
        done = subprocess.run(
            command, cwd=self.folder, env=self._environments[who], input="hello\nis it good\n", capture_output=True,
            text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _here(self, text):
        """The same with ports that are free, and a base that is here."""
        for theirs, ours in self._ports.items():
            text = text.replace(theirs, ours)
        return text.replace(SMOL, str(self._devices / "llama"))

    def install(self, extra):
        """Give the device what an extra brings."""
        (self.folder / "device").unlink(missing_ok=True)
        (self.folder / "device").symlink_to(self._devices / f"device-{extra}")

    def play(self, page):
        """Do all that a page says; returns what each line and each program said, in order."""
        said, whole = [], (ROOT / page).read_text(encoding="utf-8")
        for name, text in FILE.findall(whole):
            (self.folder / name).write_text(text, encoding="utf-8")
        self._talk = re.findall(r"^> (.+)$", "".join(TALK.findall(whole)), re.MULTILINE)
        for kind, who, text in blocks(page):
            if kind == "python":
                python = "device/bin/python" if who == "device" else sys.executable
                said.append((text, self.run(who, [python, "-c", self._here(text)])))
                continue
            for line in text.splitlines():
                if line in {INSTALL, MORE}:
                    self.install("edge" if line == INSTALL else "serve")
                elif " edge site " in line and page_libraries.lacking():
                    said.append((line, ""))
                elif line != "make demo" and not line.startswith(". "):  # both were made already
                    said.append((line, self.type(who, line)))
        return said

    def _serve(self, who, words):
        if words[0] == "python":
            words[0] = sys.executable
        port = next(int(word) for word in words if word in self._ports.values())
        server = subprocess.Popen(
            words, cwd=self.folder, env=self._environments[who], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._servers.append(server)
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)
            else:
                return ""

    def close(self):
        for server in self._servers:
            server.kill()
            server.wait(10)


@pytest.fixture
def desk(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Desk(tmp_path, runs)
    yield found
    found.close()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_device_has_nothing_of_the_training(runs, name):
    python = runs / "device-edge/bin/python"
    code = f"import importlib.util; assert importlib.util.find_spec({name!r}) is None"
    subprocess.run([python, "-c", code], env=device_venv.environment(runs), check=True)


def test_a_device_loads_what_it_needs_when_it_needs_it(runs):
    code = (
        "import sys, molehill.cli\n"
        "heavy = {'onnxruntime', 'tokenizers', 'tuf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import molehill_edge\n"
        "assert not {'onnxruntime', 'tuf', 'numpy'} & set(sys.modules)\n"
    )
    python = runs / "device-edge/bin/python"
    subprocess.run([python, "-c", code], env=device_venv.environment(runs), check=True)
    done = subprocess.run(
        [runs / "device-edge/bin/molehill", "--help"],
        env=device_venv.environment(runs), capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = set(re.findall(r"^│ (\w+)", done.stdout, re.MULTILINE))
    assert listed == {"audit", "edge", "pki"}  # what works without the parts that a device has not
    done = subprocess.run(
        [runs / "device-edge/bin/molehill", "export", "runs/demo", "--out", "nowhere"],
        env=device_venv.environment(runs), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "molehill[export]" in done.stderr


def test_the_readme_works_as_typed(desk):
    said = dict(desk.play(README))
    (pulled,) = (text for line, text in said.items() if " pull " in line)
    assert "version 1 is in use now" in pulled
    (answer,) = (text for line, text in said.items() if " run " in line)
    assert answer.split()[0] in tiny_world.LABELS
    assert (desk.folder / "home/.local/share/molehill/bundles/bundles/demo/current.json").is_file()


@pytest.mark.slow
def test_the_page_works_as_typed(desk):
    said = desk.play(PAGE)
    labels = [text for line, text in said if "edge run demo" in line and "--json" not in line]
    assert len(labels) == 7
    assert all(text.split()[0] in tiny_world.LABELS for text in labels)
    (found,) = (json.loads(text) for line, text in said if "--json" in line)
    assert [row["text"] for row in found["predictions"]] == ["It does what it says."]
    updates = [text for line, text in said if line.endswith("edge update")]
    assert "version 2 is in use now, before: 1" in updates[0]
    assert "base" not in updates[0]
    assert re.search(r"; [12] files, ", updates[0])  # not the base, which is there
    assert "version 2 is the newest" in updates[1]
    assert "check" in next(text for line, text in said if "--check" in line)
    assert (desk.folder / "mine.gate.safetensors").stat().st_mode & 0o777 == 0o600
    listed = [text for line, text in said if line.endswith(("edge experts demo", "edge info demo", "edge add demo e3"))]
    assert "version 1" in listed[0]
    assert "signed, is added" in listed[1]
    assert "e3 (signed, version 1)" in listed[2]
    (experts,) = (text for line, text in said if "add_expert" in line)
    assert "['', 'e1', 'e2', 'e3']" in experts
    assert any("version 1 is in use now" in text for line, text in said if "--id chat" in line and " pull " in line)
    (served,) = (json.loads(text) for line, text in said if line.startswith("curl "))
    assert [model["id"] for model in served["data"]] == ["chat", "chat@default"]
    assert list((desk.folder / "keys/retired").iterdir())
    if not page_libraries.lacking():
        assert all((desk.folder / page / "shell.js").is_file() for page in ("repo/page", "site"))


def test_what_was_trained_is_asked_as_typed(desk):
    said = desk.play(AFTER)
    shown = dict(said)
    (two,) = (text for line, text in said if line.endswith('"It does what it says."'))
    assert [line.split()[0] in tiny_world.LABELS for line in two.splitlines()] == [True, True]
    rows = [json.loads(text) for line, text in said if line.endswith(" --json")]
    assert [len(found.get("predictions") or found["answers"]) for found in rows] == [MINE.count("\n")] * 2
    assert "self_contrast" in shown["molehill methods decoding"]
    (talk,) = (text for line, text in said if line.startswith("printf "))
    assert "router" in talk


@pytest.mark.slow
def test_the_first_hour_is_as_typed(desk):
    said = desk.play(TUTORIAL)
    shown = dict(said)
    labels = [text.split()[0] for line, text in said if "generate runs/demo" in line and "--json" not in line]
    assert len(labels) == 5
    assert set(labels) <= tiny_world.LABELS.keys()
    (found,) = (json.loads(text) for line, text in said if line.endswith("--json"))
    assert len(found["predictions"]) == 2
    (started,) = (text for line, text in said if line.startswith("molehill init "))
    assert started in (ROOT / TUTORIAL).read_text(encoding="utf-8")
    (talk,) = (text for line, text in said if line.startswith("molehill chat "))
    assert "router" in talk
    privacy = (desk.folder / "runs/faq/card/privacy.md").read_text(encoding="utf-8")
    assert "| north | 1 | 1 | 1 | 0 | 0 |" in privacy
    assert "exact match" in (desk.folder / "runs/faq/report.html").read_text(encoding="utf-8")
    (python,) = (text for line, text in said if "molehill.methods" in line)
    assert python.splitlines()[0].split()[0] in tiny_world.LABELS
    assert "'top_k'" in python.splitlines()[-1]
    assert shown["molehill card runs/demo"] in (ROOT / TUTORIAL).read_text(encoding="utf-8")


def test_messages_of_the_page_are_those_of_the_code():
    folders = ("edge", "molehill", "simulation")
    code = "\n".join(path.read_text(encoding="utf-8") for name in folders for path in (ROOT / name).rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| .* \|$", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 20
    assert [message for message in messages if message not in code] == []


def test_the_installation_is_one_that_the_project_has():
    for page, wanted in ((README, [INSTALL]), (PAGE, [INSTALL, MORE])):
        assert [line for _, _, text in blocks(page) for line in text.splitlines() if "pip install" in line] == wanted
    assert {"edge", "serve"} <= device_venv.PROJECT["project"]["optional-dependencies"].keys()
    assert (ROOT / "constraints.txt").is_file()

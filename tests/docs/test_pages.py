"""The documentation does what it says: every block is run, every link leads somewhere, every configuration loads."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from molehill import config
from molehill.cli import app
from molehill.tasks.conversations import columns_read
from molehill.tasks.schema import load_rows
from molehill_simulation.commands import simulate

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; ``info`` is what stands behind the fence."""

    page: str
    info: str
    text: str


BLOCKS = [
    Block(str(page.relative_to(ROOT)), match[1], match[2])
    for page in PAGES
    for match in FENCE.finditer(page.read_text(encoding="utf-8"))
]


METHODS = ("sparsemax", "bias", "alike")


def blocks(info):
    return [pytest.param(block.text, id=f"{block.page}-{i}") for i, block in enumerate(BLOCKS) if block.info == info]


def test_every_block_is_of_a_kind_that_is_run():
    terminals = {"sh terminal 1", "sh terminal 2", "sh terminal 3", "sh terminal 1 2 3"}
    run_in_test_lab = {"sh host", "sh lab", *terminals}
    run_in_test_edge = {"sh owner", "sh device", "python owner", "python device"}
    assert {block.info for block in BLOCKS} <= {
        "sh",
        "toml",
        *(f"python {part} {method}" for method in METHODS for part in ("method", "test")),
        *run_in_test_lab,
        *run_in_test_edge,
        *("json rows", "json rows token-classification"),
        "measured",  # what a benchmark printed
        "python signature",  # written by scripts/docs.py
        *("text", "text chat"),  # what was seen; what is typed in a chat is typed in test_edge
        *("csv texts.csv", "csv faq.csv"),  # files that a page says to write
        *("csharp", "java", "swift"),  # for devices without Python; the page says that they were not compiled
    }


def test_the_first_page_leads_to_every_decision():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/adr/{page.name}" in text for page in ROOT.glob("docs/adr/*.md"))


@pytest.mark.parametrize("text", blocks("toml"))
def test_configurations_in_pages_load(text, tmp_path):
    path = tmp_path / "page.toml"
    path.write_text(text, encoding="utf-8")
    config.load(path)


CONTRACTS = {  # the suites that try every method of the registry, and those of the page that each of them has to try
    "molehill/molora/test_methods_contract.py": ("sparsemax", "bias"),
    "molehill/molora/test_experts_contract.py": ("bias",),
    "server/aggregation/test_rules_contract.py": ("alike",),
}


def test_the_methods_of_the_contributing_page_pass_their_own_tests_and_the_contracts(tmp_path):
    for name in METHODS:
        (method,) = (block.text for block in BLOCKS if block.info == f"python method {name}")
        (tests,) = (block.text for block in BLOCKS if block.info == f"python test {name}")
        (tmp_path / f"{name}.py").write_text(method, encoding="utf-8")
        (tmp_path / f"test_{name}.py").write_text(f"import {name}\n{tests}", encoding="utf-8")
    (tmp_path / "conftest.py").write_text(f"import {', '.join(METHODS)}\n", encoding="utf-8")
    for suite in CONTRACTS:
        (tmp_path / suite).parent.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "tests" / suite, (ROOT / "tests" / suite).with_name("conftest.py")):
            shutil.copy(path, (tmp_path / suite).parent)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rp",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "-k", " or ".join(METHODS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/support")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for name in METHODS:
        assert f"PASSED test_{name}.py::" in done.stdout
    for suite, names in CONTRACTS.items():
        for name in names:
            assert re.search(rf"^PASSED {suite}::.*[\[-]{name}[\]-]", done.stdout, re.MULTILINE), (suite, name)
    files = [f"{name}.py" for name in METHODS]
    lint = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *files]
    # As in the folder it is for, where methods take what their interface gives.
    done = subprocess.run(
        [*lint, "--ignore", "INP001,ARG002"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("text", blocks("json rows"))
def test_rows_in_pages_are_read(text, tmp_path):
    for line in text.splitlines():
        (tmp_path / "row.jsonl").write_text(line, encoding="utf-8")
        data, task = config.Data(source=str(tmp_path / "row.jsonl")), config.Task(kind="causal-lm")
        assert {*columns_read(load_rows(data, task)[0].columns)} == json.loads(line).keys()


@pytest.mark.parametrize("text", blocks("json rows token-classification"))
def test_rows_of_words_in_pages_are_read_together(text, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    rows, task = load_rows(config.Data(source=str(tmp_path / "rows.jsonl")), config.Task(kind="token-classification"))
    assert len(rows) == len(text.splitlines())
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_in_pages_run(text, tmp_path, monkeypatch, tiny_settings):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in BLOCKS:  # what a page says to write
        if block.info == "toml" and "run" in (written := tomllib.loads(block.text)):
            (tmp_path / f"{written['run']['name']}.toml").write_text(block.text, encoding="utf-8")
    rows = [f"{word} {shop},{label},{shop}" for shop in range(5) for word in "abcdef" for label in ("good", "bad")]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars,shop", *rows]), encoding="utf-8")
    news = [f"word {n},{'|'.join(['sport', 'money', 'war'][: n % 4])}" for n in range(32)]
    (tmp_path / "news.csv").write_text("\n".join(["text,labels", *news]), encoding="utf-8")
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]
    (tmp_path / "talks").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"conversations": [{**talk[0], "value": f"Hello {n}"}, talk[1]]}) for n in range(16)]
        (tmp_path / "talks" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tagged = [{"tokens": ["Anna", f"number{n}"], "ner_tags": ["B-PER", "O"]} for n in range(16)]
    (tmp_path / "names.jsonl").write_text("\n".join(map(json.dumps, tagged)), encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert arguments[0] in targets
        elif program == ".":
            assert arguments == [".venv/bin/activate"]  # which `make demo` and `make test` make
        elif program.startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(program).name).exists()
        else:
            assert program == "molehill"
            extra = tiny_settings if arguments[0] == "simulate" else []
            result = CliRunner().invoke(app, [*arguments, *extra])
            assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_survives_being_written(path, tmp_path):
    loaded = config.load(path)
    again = tmp_path / "again.toml"
    again.write_text(loaded.to_toml(), encoding="utf-8")
    assert config.load(again) == loaded


def test_what_runs_without_a_configuration_is_the_demo_file():
    assert simulate._demo().read_bytes() == (ROOT / "configs/demo.toml").read_bytes()

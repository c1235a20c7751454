"""What the repository promises about itself: pins, targets, licence."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
SPEC = importlib.util.spec_from_file_location("pins", ROOT / "scripts/pins.py")
SCRIPT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)
DIRECT = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]


def test_pins_are_exact_and_named_once():
    assert all([spec.operator for spec in pin.specifier] == ["=="] for pin in PINS)
    assert len({canonicalize_name(pin.name) for pin in PINS}) == len(PINS)


@pytest.mark.parametrize("line", sorted(set(DIRECT)))
def test_every_dependency_is_pinned_within_its_range(line):
    requirement = Requirement(line)
    if requirement.name == "molehill":
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
        return
    (pin,) = (pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(requirement.name))
    (version,) = (spec.version for spec in pin.specifier)
    assert requirement.specifier.contains(version)


def entries(path):
    """Requirement and hashes of every entry of a hashed file."""
    text = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[0] != "#")
    for entry in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        yield Requirement(requirement.strip()), [each.strip() for each in hashes]


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.stem)
def test_every_hashed_requirement_is_the_pinned_one_and_has_hashes(path):
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in PINS}
    for requirement, hashes in entries(path):
        assert str(requirement.specifier).startswith("==")
        assert pins.get(canonicalize_name(requirement.name), str(requirement.specifier)) == str(requirement.specifier)
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes)


def test_what_people_install_can_be_installed_by_hash():
    named = {extra for extras in SCRIPT.EXTRAS for extra in extras.split(",")}
    assert {"client", "simulation", "edge", "parquet", "serve", "export", "gguf", "demo", "privacy"} == named
    files = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    assert files == {*(extras.replace(",", "-") for extras in SCRIPT.EXTRAS), "torch", "build"}


@pytest.mark.parametrize("extras", SCRIPT.EXTRAS)
def test_a_hashed_file_has_all_that_its_extra_needs(extras):
    needed: dict[str, frozenset[str]] = {}
    SCRIPT.needed("molehill", frozenset(extras.split(",")), needed)
    files = [ROOT / "requirements" / f"{name}.txt" for name in (extras.replace(",", "-"), "torch")]
    named = {canonicalize_name(each.name) for path in files for each, _ in entries(path)}
    assert set(needed) - named == {"molehill"}
    builds = {canonicalize_name(each.name) for each, _ in entries(ROOT / "requirements/build.txt")}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert {canonicalize_name(Requirement(line).name) for line in wanted} <= builds


def test_the_demo_can_be_made_again(tmp_path):
    program = tmp_path / "bin" / "molehill"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >> calls\nmkdir -p "$3"\ntouch "$3/config.toml"\n')
    program.chmod(0o755)
    make = ["make", "-C", tmp_path, "-f", ROOT / "Makefile", "-o", ".venv/demo.stamp", "demo", "BIN=bin"]
    said = []
    for finished in ("demo", None, "demo-2", None):
        said.append(subprocess.run(make, capture_output=True, text=True, check=True).stdout)
        if finished:
            subprocess.run(make, capture_output=True, check=True)  # as after Ctrl-C
            (tmp_path / "runs" / finished / "summary.json").touch()
    calls = (tmp_path / "calls").read_text().splitlines()
    folders = [f"simulate --out runs/{name}" for name in ("demo", "demo-2", "demo-3")]
    assert calls == [
        folders[0],
        f"{folders[0]} --resume",
        folders[1],
        f"{folders[1]} --resume",
        f"{folders[1]} --resume",
        folders[2],
    ]
    assert "Earlier demos are finished" not in said[0]
    assert "This one goes to runs/demo-2" in said[1]


def test_the_page_of_the_demo_is_one_command(tmp_path):
    program = tmp_path / "bin" / "molehill"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$1" "$2" >> calls\n[ "$1" = edge ] || { mkdir -p "$4"; touch "$4/manifest.pb"; }\n'
    )
    program.chmod(0o755)
    make = ["make", "-C", tmp_path, "-f", ROOT / "Makefile", "-o", ".venv/demo.stamp", "page", "BIN=bin"]
    early = subprocess.run(make, capture_output=True, text=True, check=False)
    assert early.returncode != 0
    assert "There is no finished demo yet: make demo" in early.stderr
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/summary.json").touch()
    for _ in range(2):
        subprocess.run(make, capture_output=True, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == ["export runs/demo", "edge site", "edge site"]


def test_ci_runs_what_people_run():
    commands = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert commands[-1] == "make test"
    assert "scripts/check\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")

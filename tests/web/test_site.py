"""The command that writes the page, and the libraries that it needs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import edge_graphs
import pytest
from typer.testing import CliRunner

from molehill.cache import cache_folder
from molehill.cli import app
from molehill_web import vendor
from molehill_web.site import PAGE


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    edge_graphs.classifier(folder, tokenizer=edge_graphs.pieces_tokenizer())
    return folder


def site(*words, code=0):
    result = CliRunner().invoke(app, ["edge", "site", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def digests(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def archives(tmp_path, libraries):
    """A folder of the libraries' archives."""
    folder = tmp_path / "archives"
    folder.mkdir()
    for package in vendor.PACKAGES:
        shutil.copy(cache_folder() / "npm" / package.archive, folder)
    return folder


def test_a_page_is_the_same_each_time_and_what_is_old_goes(bundle, tmp_path, archives):
    out = tmp_path / "site"
    said = json.loads(site(bundle, "--insecure-local", "--out", out, "--vendor", archives, "--json"))
    first = digests(out)
    assert (said["bundle"], said["signed"], said["weights"]) == ({"id": "tiny-classifier", "version": 1}, False, "fp32")
    assert said["files"] == len([path for path in first if not path.startswith("bundle/")])
    assert said["bytes"] == sum((out / path).stat().st_size for path in first if path != "shell.js")
    shell = json.loads((out / "shell.js").read_text().removeprefix("self.SHELL = ").rstrip(";\n"))
    listed = shell["files"] | shell["lazy"]
    assert listed == {path: digest for path, digest in first.items() if path != "shell.js" and path[:7] != "bundle/"}
    assert {path.partition("/")[2] for path in listed if path.startswith("vendor/") and "LICENSE" in path} == {
        "onnxruntime-web/LICENSE.txt", "tokenizers/LICENSE.txt", "jinja/LICENSE.txt"
    }  # fmt: skip
    (out / "js/old.js").write_text("of an earlier version")
    shell["files"]["js/old.js"] = shell["files"]["../outside"] = "0" * 64
    (out / "shell.js").write_text(f"self.SHELL = {json.dumps(shell)};\n")
    (out / "mine.txt").write_text("of somebody else")
    (tmp_path / "outside").write_text("of somebody else")
    site(bundle, "--insecure-local", "--out", out, "--vendor", archives)
    (out / "mine.txt").unlink()
    assert digests(out) == first
    assert (tmp_path / "outside").is_file()


def test_weights_that_are_slow_in_a_browser_are_said_to_be(tmp_path, libraries):
    manifest = edge_graphs.classifier(tmp_path / "bundle")
    manifest.quantisation.base, manifest.quantisation.block = "int4", 32
    edge_graphs.sign(tmp_path / "bundle", manifest)
    said = site(tmp_path / "bundle", "--insecure-local", "--out", tmp_path / "site")
    assert "int4 takes several times as long as int8" in said


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--repo", "repo"], 2, "--root is missing"),
        (["--root", "root.json"], 2, "--repo is missing"),
        (["--repo", "repo", "--root", "root.json", "--insecure-local"], 2, "Leave out --insecure-local"),
        (["--open", "--json"], 2, "--open and --json together"),
        (["--repo", "repo", "--root", "root.json"], 14, "cannot read it"),
        (["--insecure-local"], 13, "there is no bundle here"),
        ([], 13, "there is no bundle"),
    ],
)
def test_mistakes_are_said(tmp_path, monkeypatch, words, code, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLEHILL_STORE", str(tmp_path / "store"))
    result = CliRunner().invoke(app, ["edge", "site", "nothing", "--out", "site", *words])
    assert result.exit_code == code, result.output
    assert what in result.output.replace("\n", " ")
    assert not Path("site").exists()


def test_an_archive_of_other_bytes_is_refused(bundle, tmp_path, archives):
    package = vendor.PACKAGES[1]
    path = archives / package.archive
    path.write_bytes(path.read_bytes() + b"!")
    said = site(bundle, "--insecure-local", "--out", tmp_path / "site", "--vendor", archives, code=11)
    assert f"{path}: this is not the archive of @huggingface/tokenizers@{package.version}: its SHA-512 differs." in said
    assert not (tmp_path / "site").exists()
    path.unlink()
    said = site(bundle, "--insecure-local", "--out", tmp_path / "site", "--vendor", archives, code=11)
    assert f"{path}: cannot read it: No such file or directory. Make it on a machine with npm: npm pack" in said


def test_a_page_does_not_go_into_a_bundle(bundle, libraries):
    before = digests(bundle)
    assert "this is the folder of a bundle" in site(bundle, "--insecure-local", "--out", bundle, code=13)
    assert digests(bundle) == before


def test_the_libraries_come_through_npm_once(bundle, tmp_path, archives, monkeypatch):
    """A program in npm's place, so that nothing is asked of a registry: it does what ``npm pack`` does."""
    tool = tmp_path / "bin/npm"
    tool.parent.mkdir()
    log = tmp_path / "asked"
    tool.write_text(
        f"""#!{sys.executable}
import pathlib, shutil, sys
pathlib.Path({str(log)!r}).open("a").write(sys.argv[2] + "\\n")
name, version = sys.argv[2].rsplit("@", 1)
archive = name.lstrip("@").replace("/", "-") + "-" + version + ".tgz"
shutil.copy({str(archives)!r} + "/" + archive, sys.argv[sys.argv.index("--pack-destination") + 1])
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert len({part.path for part in vendor.parts()}) == 11
    pins = [package.pin for package in vendor.PACKAGES]
    assert log.read_text().split() == pins
    damaged = tmp_path / "cache/npm" / vendor.PACKAGES[2].archive
    damaged.write_bytes(b"cut")
    list(vendor.parts())  # gets it anew
    assert log.read_text().split() == [*pins, pins[2]]
    damaged.write_bytes(b"cut")
    (archives / vendor.PACKAGES[2].archive).unlink()
    words = (bundle, "--insecure-local", "--out", tmp_path / "site")
    said = site(*words, code=11)
    assert f"npm does not fetch {pins[2]}: " in said
    tool.unlink()
    said = site(*words, code=11)
    assert f"npm, which fetches {pins[2]}, is not installed." in said
    assert f"npm pack {pins[2]}, and give --vendor DIR." in said


def test_what_npm_says_is_passed_on(bundle, tmp_path, monkeypatch):
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path / "cache"))
    said = site(bundle, "--insecure-local", "--out", tmp_path / "site", code=11)
    assert f"npm does not fetch {vendor.PACKAGES[0].pin}: FetchError: request to http://127.0.0.1:9" in said
    assert not (tmp_path / "site").exists()


def test_it_is_served_to_this_machine_until_ctrl_c(bundle, tmp_path, libraries):
    command = [sys.executable, "-c", "from molehill.cli import main; main()", "edge", "site", str(bundle)]
    with subprocess.Popen(
        [*command, "--insecure-local", "--out", str(tmp_path / "site"), "--open"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "BROWSER": "true"},
    ) as process:  # fmt: skip
        address = next(found[1] for line in process.stdout if (found := re.match(r"(http:\S+) until Ctrl-C", line)))
        with urllib.request.urlopen(f"{address}vendor/onnxruntime-web/ort.wasm.min.mjs") as answer:
            assert answer.headers["Content-Type"] == "text/javascript"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_files_of_the_page_are_short_and_name_no_other_server():
    for path in PAGE.rglob("*"):
        if path.suffix in {".js", ".html", ".css"}:
            text = path.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 400
            assert not re.search(r"""(src|href|from|import|fetch)\W{1,3}https?://""", text)

"""The command that writes the page, and the libraries that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import edge_graphs
import httpx
import pytest
from edge_attacks import World
from typer.testing import CliRunner

from molehill.cache import cache_folder
from molehill.cli import app
from molehill_edge import fetch_experts
from molehill_export.keys import Keys
from molehill_export.repository import Repository
from molehill_web import site as pages
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


def test_a_page_is_not_written_for_a_bundle_that_it_would_refuse(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RUNTIME", dataclasses.replace(vendor.RUNTIME, version="1.19.2"))
    said = site(bundle, "--insecure-local", "--out", tmp_path / "site", code=13)
    assert "the bundle needs onnxruntime 1.20 or newer, and the page has 1.19.2. Update molehill" in said
    assert not (tmp_path / "site").exists()


def test_a_page_does_not_go_into_a_bundle(bundle, libraries):
    before = digests(bundle)
    assert "this is the folder of a bundle" in site(bundle, "--insecure-local", "--out", bundle, code=13)
    assert digests(bundle) == before


@pytest.mark.parametrize("theirs", ["index.html", "bundle/mine.txt", "js/app.js"])
def test_what_is_not_of_a_page_is_not_written_over(bundle, tmp_path, libraries, theirs):
    path = tmp_path / "site" / theirs
    path.parent.mkdir(parents=True)
    path.write_text("of somebody else")
    before = digests(tmp_path)
    said = site(bundle, "--insecure-local", "--out", tmp_path / "site", code=13)
    assert f"{tmp_path / 'site' / theirs.removesuffix('/mine.txt')}: something else has this place." in said
    assert digests(tmp_path) == before


def test_a_bundle_may_lie_where_the_page_keeps_its_own(bundle, tmp_path, libraries):
    shutil.copytree(bundle, tmp_path / "bundle")
    before = digests(tmp_path)
    said = site(tmp_path / "bundle", "--insecure-local", "--out", tmp_path, code=13)
    assert "something else has this place" in said
    assert digests(tmp_path) == before
    site(bundle, "--insecure-local", "--out", tmp_path / "site")
    first = digests(tmp_path / "site")
    site(tmp_path / "site/bundle", "--insecure-local", "--out", tmp_path / "site")
    assert digests(tmp_path / "site") == first


def test_a_page_that_is_not_finished_leaves_nothing(bundle, tmp_path, libraries, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in site(bundle, "--insecure-local", "--out", tmp_path / "site", code=11)
    assert not list(tmp_path.iterdir())


def test_what_lies_beside_a_page_is_not_for_everybody(tmp_path, libraries):
    """The repository is found under any name, and of the folder that has both nothing else is shown."""
    (tmp_path / "keys").mkdir()
    keys = Keys.create(tmp_path / "keys/owner", b"secret")
    edge_graphs.classifier(tmp_path / "one")
    Repository(tmp_path / "my 100% #1", keys).publish(tmp_path / "one")
    words = ["--repo", tmp_path / "my 100% #1", "--root", tmp_path / "keys/owner/root.json", "--out", tmp_path / "page"]
    told = site("tiny-classifier", *words)
    assert f"Serve my 100% #1 and page of {tmp_path}, beside each other" in told
    way = json.loads((tmp_path / "page/site.json").read_text())["repository"]
    assert way == "../my%20100%25%20%231/"
    with served("tiny-classifier", *words) as address:
        assert address.endswith("/page/")
        there, elsewhere = ("", f"{way}metadata/timestamp.json"), ("../keys/owner/root.json", "..")
        for path, status in [*((path, 200) for path in there), *((path, 404) for path in elsewhere)]:
            assert httpx.get(httpx.URL(address).join(path)).status_code == status


def test_a_page_of_a_bundle_in_the_store_says_what_it_leaves_out(tmp_path, libraries):
    Keys.create(tmp_path / "keys", b"secret")
    world = World(tmp_path)
    manifest = edge_graphs.classifier(tmp_path / "one")
    Repository(world.repo, world.keys).publish(tmp_path / "one")
    world.show()
    world.pull(root=world.root)
    edge_graphs.write_expert(tmp_path / "owls.expert.safetensors", manifest)
    fetch_experts.add_file(world.store, "tiny-classifier", tmp_path / "owls.expert.safetensors")
    words = ["tiny-classifier", "--store", tmp_path / "store", "--out", tmp_path / "site"]
    result = CliRunner().invoke(app, ["edge", "site", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "without owls, added on this device" in result.stderr
    assert digests(tmp_path / "site/bundle") == digests(tmp_path / "one")


@contextlib.contextmanager
def served(*words):
    """The address at which the command serves a page."""
    start = [sys.executable, "-c", "from molehill.cli import main; main()", "edge", "site"]
    command = [*start, *map(str, words), "--open"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "BROWSER": "true"}
    ) as process:
        yield next(found[1] for line in process.stdout if (found := re.match(r"(http:\S+) until Ctrl-C", line)))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


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
    with served(bundle, "--insecure-local", "--out", tmp_path / "site") as address:
        answer = httpx.get(f"{address}vendor/onnxruntime-web/ort.wasm.min.js")
    assert answer.headers["Content-Type"] == "text/javascript"
    assert not [*(tmp_path / "site").rglob("*.mjs")]  # which many servers do not take for scripts


def test_the_files_of_the_page_are_short_and_name_no_other_server():
    for path in PAGE.rglob("*"):
        if path.suffix in {".js", ".html", ".css"}:
            text = path.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 400
            assert not re.search(r"""(src|href|from|import|fetch)\W{1,3}https?://""", text)

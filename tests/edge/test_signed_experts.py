"""Experts as signed targets: published, pulled by name, kept over openings and updates; and unsigned ones refused."""

from __future__ import annotations

import json
import shutil
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import edge_graphs
import numpy as np
import pytest
import safetensors.numpy
import typer
from edge_attacks import World
from securesystemslib.signer import CryptoSigner
from typer.testing import CliRunner

from molehill.errors import BundleError, TrustError
from molehill_edge import fetch, fetch_experts
from molehill_edge import manifest as manifests
from molehill_edge.bundle import Bundle
from molehill_edge.commands import group
from molehill_edge.store import Store
from molehill_edge.trust import InsecureLocal
from molehill_export.commands import publish as publishing
from molehill_export.keys import Keys
from molehill_export.repository import Repository

NAME, TARGET = "tiny-classifier", "experts/tiny-classifier/owls.expert.safetensors"
TEXTS = ["the film was great", "awful plot", "boring"]


class Owner(World):
    """Publishes a real graph, and experts for it."""

    def bundle(self, version, change=None):
        folder = self.folder / f"v{version}"
        manifest = edge_graphs.classifier(folder)
        manifest.version = version
        if change is not None:
            change(manifest)
            manifest.layout = manifests.layout_digest(manifest)
            for path in (folder / "gate.safetensors", *(folder / "gates").iterdir()):
                about = edge_graphs.gate_metadata(manifest, path.stem)
                safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, about)
        edge_graphs.sign(folder, manifest)
        with Bundle.open(folder, trust=InsecureLocal(lambda _: None), threads=1) as bundle:
            ids = bundle.encode(TEXTS[0])
            logits = bundle.logits([ids])[0]
        manifest.golden.add(input_ids=ids, logits=logits, best=int(logits.argmax()))
        edge_graphs.sign(folder, manifest)
        return folder

    def expert(self, name="owls", seed=1):
        path = self.folder / f"{name}-{seed}.expert.safetensors"
        if not path.exists():
            edge_graphs.write_expert(path, edge_graphs.classifier(self.folder / "shape"), name, seed=seed)
        return path

    def publish(self, bundle=None, *experts, now=None, **options):
        done = Repository(self.repo, self.keys, now=now).publish(bundle, experts, **options)
        self.show()
        return done

    def add(self, name="owls"):
        return fetch_experts.add(self.store, NAME, name, fetcher=self.server)

    def update(self):
        return fetch.update(self.store, NAME, fetcher=self.server)

    def says(self):
        """The experts in use, and what the bundle answers."""
        with Bundle.open(NAME, trust=self.store, threads=1) as bundle:
            names = [slot.id for slot in bundle.manifest.slots if slot.id]
            return names, np.array([list(each.probabilities.values()) for each in bundle.classify(TEXTS)])

    def expert_file(self):
        """Path of the newest expert file on the server."""
        digest = self.signed("targets").signed.targets[TARGET].hashes["sha256"]
        return f"targets/experts/{NAME}/{digest}.owls.expert.safetensors"

    def refused(self, what, kind=TrustError, call=None):
        before = self.says()
        with pytest.raises(kind) as caught:
            (call or self.add)()
        assert what in str(caught.value)
        assert "\n" not in str(caught.value)
        names, answers = self.says()
        assert names == before[0]
        assert np.array_equal(answers, before[1])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    Keys.create(folder / "keys", b"secret")
    owner = Owner(folder)
    owner.publish(owner.bundle(1), owner.expert())
    owner.pull(root=owner.root)
    return folder


@pytest.fixture
def owner(template, tmp_path):
    shutil.copytree(template, tmp_path / "world", symlinks=True)
    made = Owner(tmp_path / "world")
    made.show()
    return made


def test_a_signed_expert_is_pulled_by_name_and_stays(owner):
    names, plain = owner.says()
    with Bundle.open(NAME, trust=owner.store, threads=1) as bundle:  # as it would be by hand
        bundle.add_expert(owner.expert())
        by_hand = np.array([list(each.probabilities.values()) for each in bundle.classify(TEXTS)])
    (choice,) = fetch_experts.choices(owner.store, NAME, fetcher=owner.server)
    entry = owner.signed("targets").signed.targets[TARGET]
    about = {"format": 1, "kind": "expert", "id": "owls", "bundle": NAME, "version": 1, "base": edge_graphs.BASE}
    assert entry.custom == {**about, "layout": choice.offer.layout}
    assert (choice.fits, choice.added, choice.offer.length) == (True, None, owner.expert().stat().st_size)

    added = owner.add()
    assert (added.id, added.version, added.signed) == ("owls", 1, True)
    assert fetch_experts.choices(owner.store, NAME, fetcher=owner.server)[0].added == 1
    for _ in range(2):  # each opening
        found, answers = owner.says()
        assert found == [*names, "owls"]
        assert np.array_equal(answers, by_hand)
    with Bundle.open(NAME, trust=owner.store) as bundle:
        assert [each.signed for each in bundle.added] == [True]
    owner.server.asked.clear()
    owner.add()  # again: nothing is downloaded
    assert not [path for path in owner.server.asked if path.startswith("targets/")]

    owner.store.remove_expert(NAME, "owls")
    found, answers = owner.says()
    assert found == names
    assert np.array_equal(answers, plain)
    assert not (owner.store.folder / "experts").exists() or not list((owner.store.folder / "experts").iterdir())
    assert not (owner.store.folder / "blobs" / "sha256" / added.sha256).exists()
    with pytest.raises(BundleError, match="no expert 'owls' was added to bundle tiny-classifier on this device"):
        owner.store.remove_expert(NAME, "owls")


def test_a_device_that_takes_signed_experts_only(owner, tmp_path):
    path = owner.expert()
    with Bundle.open(NAME, trust=owner.store, threads=1) as bundle:
        bundle.add_expert(path)
        bundle.save_state(tmp_path / "unsigned")
    owner.store.require_signed_experts()
    strict = Store(owner.store.folder)  # another program
    assert strict.signed_experts_only
    with Bundle.open(NAME, trust=strict, threads=1) as bundle:
        with pytest.raises(TrustError, match=r"takes signed experts only.*molehill edge add tiny-classifier EXPERT"):
            bundle.add_expert(path)
        with pytest.raises(TrustError, match=r"takes signed experts only, and expert owls of this state is not signed"):
            bundle.load_state(tmp_path / "unsigned")
        assert "owls" not in [slot.id for slot in bundle.manifest.slots]
    with pytest.raises(TrustError, match="takes signed experts only, and a file is not signed"):
        fetch_experts.add_file(strict, NAME, path)
    owner.add()
    names, answers = owner.says()
    assert "owls" in names
    with Bundle.open(NAME, trust=strict, threads=1) as bundle:
        bundle.remove_expert("cats")
        bundle.save_state(tmp_path / "state")
    # What the state says of the numbers of experts does not count: only which of the signed ones are left out.
    kept = tmp_path / "state" / "experts.safetensors"
    data = bytearray(kept.read_bytes())
    data[-64:] = np.full(16, 9, np.float32).tobytes()
    kept.write_bytes(data)
    with Bundle.open(NAME, trust=strict, threads=1) as bundle:
        bundle.remove_expert("cats")
        wanted = [list(each.probabilities.values()) for each in bundle.classify(TEXTS)]
    with Bundle.open(NAME, trust=strict, threads=1) as bundle:
        bundle.load_state(tmp_path / "state")
        assert [slot.id for slot in bundle.manifest.slots] == ["", "dogs", "newts", "owls"]
        assert np.allclose([list(each.probabilities.values()) for each in bundle.classify(TEXTS)], wanted, atol=1e-6)
    strict.require_signed_experts(required=False)
    with Bundle.open(NAME, trust=Store(owner.store.folder), threads=1) as bundle:
        bundle.remove_expert("owls")
        bundle.add_expert(owner.expert("bats", 2))
    assert np.array_equal(owner.says()[1], answers)


def test_an_unsigned_file_is_usable_until_the_device_asks_for_signatures(owner):
    added = fetch_experts.add_file(owner.store, NAME, owner.expert("bats", 2))
    assert not added.signed
    assert owner.says()[0][-1] == "bats"
    with pytest.raises(BundleError, match=r"an expert bats already.*molehill edge remove tiny-classifier bats"):
        fetch_experts.add_file(owner.store, NAME, owner.expert("bats", 3))
    owner.refused("no empty slot", BundleError)
    owner.store.require_signed_experts()
    for call in (owner.says, owner.add):
        with pytest.raises(TrustError, match=r"expert bats of bundle .* is not signed.*molehill edge remove"):
            call()
    owner.store.remove_expert(NAME, "bats")
    owner.add()
    assert owner.says()[0][-1] == "owls"


def test_who_may_write_a_record_cannot_forge_a_signature(owner):
    """A record that claims a signature is checked against the pinned root, also without a network."""
    fetch_experts.add_file(owner.store, NAME, owner.expert("owls", 2))
    owner.store.require_signed_experts()
    record = owner.store.folder / "experts" / NAME / "owls" / "added.json"
    (known,) = owner.store.repositories()
    version = owner.signed("targets").signed.version
    claimed = json.loads(record.read_text()) | {"repository": known.name, "version": 1, "root": 1, "listed": version}
    record.write_text(json.dumps(claimed))
    with pytest.raises(TrustError, match=r"signatures of expert owls of bundle tiny-classifier do not hold"):
        owner.says()
    shutil.copyfile(known.metadata / "targets.json", record.with_name(f"{version}.targets.json"))
    with pytest.raises(TrustError, match=r"do not hold"):
        owner.says()  # the list is signed, and names another file
    record.write_text("{}")
    with pytest.raises(BundleError, match=r"the record of an added expert is damaged.*molehill edge remove"):
        owner.says()
    owner.store.remove_expert(NAME, "owls")
    owner.says()
    (owner.store.folder / "settings.json").write_text("{}")
    with pytest.raises(BundleError, match=r"cannot read the settings of the store"):
        owner.says()


def test_a_blob_of_an_expert_that_was_changed(owner):
    added = owner.add()
    blob = owner.store.folder / "blobs" / "sha256" / added.sha256
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"expert owls is damaged: its SHA-256 differs.*molehill edge update"):
        owner.says()
    owner.update()
    assert owner.says()[0][-1] == "owls"


def test_a_new_version_of_an_expert_comes_with_an_update(owner):
    owner.add()
    _, old = owner.says()
    done = owner.publish(None, owner.expert(seed=2))
    assert [(offer.version, new) for offer, new in done.experts] == [(2, True)]
    assert owner.update().experts == (("owls", 2),)
    names, new = owner.says()
    assert names[-1] == "owls"
    assert not np.allclose(new, old, atol=1e-3)
    assert len(list((owner.store.folder / "experts" / NAME / "owls").iterdir())) == 2


def test_an_expert_survives_an_update_of_its_bundle(owner):
    owner.add()
    done = owner.publish(owner.bundle(2))
    assert done.left == ()
    done = owner.update()
    assert (done.version, done.experts, done.set_aside) == (2, (), ())
    assert owner.says()[0][-1] == "owls"


def test_bundle_and_expert_in_one_update(owner):
    owner.add()
    owner.publish(owner.bundle(2), owner.expert(seed=2))
    done = owner.update()
    assert (done.version, done.experts) == (2, (("owls", 2),))
    assert owner.says()[0][-1] == "owls"


def test_an_expert_that_came_with_the_new_version_or_was_withdrawn_is_set_aside(owner):
    owner.add()
    owner.publish(owner.bundle(2, lambda manifest: setattr(manifest.slots[1], "id", "owls")))
    (gone,) = owner.update().set_aside
    assert (gone.id, gone.why) == ("owls", "the bundle has an expert owls already")
    owner.publish(owner.bundle(3))
    owner.update()
    owner.add()
    made = owner.signed("targets")
    del made.signed.targets[TARGET]
    made.signed.version += 1
    owner.put("targets", made)
    (gone,) = owner.update().set_aside
    assert (gone.id, gone.why) == ("owls", "its owner offers it no more")
    assert "owls" not in owner.says()[0]


def test_an_update_while_a_bundle_is_opened(owner):
    """What an update exchanges in the middle of an opening is read again."""
    owner.add()
    owner.publish(None, owner.expert(seed=2))
    shelf, verified = owner.store._shelf, owner.store._shelf._verified

    def first(added):
        shelf._verified = verified
        fetch.update(Store(owner.store.folder), NAME, fetcher=owner.server)
        return verified(added)

    shelf._verified = first
    with owner.store.admit(NAME) as admitted:
        assert [added.version for added, _ in admitted.experts] == [2]


def test_an_expert_that_fits_no_more_is_set_aside_aloud(owner):
    def other(manifest):
        manifest.base.revision = "another"

    owner.add()
    assert owner.publish(owner.bundle(2, other)).left == ("owls",)
    (gone,) = owner.update().set_aside
    assert gone.id == "owls"
    assert "is for another layout of bundle tiny-classifier" in gone.why
    assert "owls" not in owner.says()[0]
    owner.refused("for another layout", BundleError)
    assert owner.publish(None, owner.expert()).experts[0][0].version == 2
    assert owner.add().version == 2
    assert owner.says()[0][-1] == "owls"


def test_rollback_of_an_expert_by_who_may_sign(owner):
    """No tool of ours does; the device refuses it all the same."""
    owner.publish(None, owner.expert(seed=2))
    assert owner.add().version == 2
    for version, what in ((1, "shows version 1 of expert owls, older than"), (2, "shows another expert owls as")):
        made = owner.signed("targets")
        data = owner.expert(seed=3).read_bytes()
        entry = type(made.signed.targets[TARGET]).from_data(TARGET, data, ["sha256"])
        entry.unrecognized_fields["custom"] = {**made.signed.targets[TARGET].custom, "version": version}
        made.signed.targets[TARGET] = entry
        made.signed.version += 1
        owner.server.files[f"targets/{entry.get_prefixed_paths()[0]}"] = data
        owner.put("targets", made)
        owner.refused(what)
        owner.refused(what, call=owner.update)


def test_rollback_and_freeze_of_the_repository(owner):
    shutil.copytree(owner.repo, owner.folder / "old")
    owner.publish(None, owner.expert(seed=2))
    owner.add()
    owner.server.load(owner.folder / "old")
    owner.refused("refused a state that is older than the known one")
    owner.publish(None, owner.expert(seed=3), now=datetime.now(UTC) - timedelta(days=2))
    owner.refused("refused an old state, or one that its owner must sign anew")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "refused a file other than the signed one"),
        (lambda data: data + b"!", "refused a file that is longer than it may be"),
        (lambda data: data * 1000, "refused a file that is longer than it may be"),
        (lambda data: data[:-1], "ends after"),
        (lambda _: b"", "ends after 0 of"),
    ],
)
def test_the_file_on_the_server_is_another(owner, change, what, monkeypatch):
    opened = []
    monkeypatch.setattr("molehill_edge.experts.parse", lambda *_: opened.append(1))
    path = owner.expert_file()
    owner.server.files[path] = change(owner.server.files[path])
    with pytest.raises(TrustError, match=what):
        owner.add()
    assert opened == []  # nothing was, before it is right
    monkeypatch.undo()
    assert "owls" not in owner.says()[0]
    assert not list((owner.store.folder / "partial").iterdir())


def test_keys_of_somebody_else(owner):
    made = owner.signed("targets")
    made.signed.version += 1
    owner.put("targets", made, signer=CryptoSigner.generate_ed25519())
    owner.refused("refused what is not signed by the keys of its owner")


def resigned(owner, change):
    """Have the owner's own key sign something odd about the expert."""
    made = owner.signed("targets")
    change(made.signed.targets[TARGET])
    made.signed.version += 1
    owner.put("targets", made)


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 0), ("version", "1"), ("id", "../owls"), ("bundle", "other"), ("layout", 3), ("format", 2)],
)
def test_what_is_signed_is_read_with_care(owner, field, value):
    resigned(owner, lambda entry: entry.custom.update({field: value}))
    assert fetch_experts.choices(owner.store, NAME, fetcher=owner.server) == []
    owner.refused("what is signed about expert owls cannot be used")


def test_an_expert_that_is_too_large_to_be_one(owner):
    resigned(owner, lambda entry: setattr(entry, "length", (1 << 30) + 1))
    owner.refused("cannot be used by this version")


def test_what_the_repository_does_not_have(owner):
    owner.refused(
        "the repository has no expert 'bats' for bundle tiny-classifier, only: owls", call=lambda: owner.add("bats")
    )
    with pytest.raises(BundleError, match="there is no bundle other in this store"):
        fetch_experts.add(owner.store, "other", "owls", fetcher=owner.server)


def test_ids_that_are_none(owner):
    for odd in ("../..", "/etc", "*", ""):
        with pytest.raises(BundleError, match=r"no expert 'owls' was added|there is no bundle"):
            owner.store.remove_expert(odd, "owls")
        with pytest.raises(BundleError, match="no expert"):
            owner.store.remove_expert(NAME, odd)
        with pytest.raises(BundleError, match="there is no bundle"):
            fetch_experts.add(owner.store, odd, "owls", fetcher=owner.server)


def test_an_expert_whose_numbers_are_none_or_too_large(owner, tmp_path):
    found = safetensors.numpy.load_file(owner.expert())
    about = {"format": "1", "kind": "expert", "id": "owls", "base": edge_graphs.BASE}
    found["layers.0.up/A"][0, 0] = np.inf
    path = tmp_path / "odd.expert.safetensors"
    safetensors.numpy.save_file(found, path, about)
    with pytest.raises(BundleError, match=r"A of layers.0.up holds numbers that are not finite"):
        owner.publish(None, path)
    with pytest.raises(BundleError, match=r"A of layers.0.up holds numbers that are not finite"):
        fetch_experts.add_file(owner.store, NAME, path)
    assert owner.store.added(NAME) == []


def test_what_cannot_be_published(owner, tmp_path):
    manifest = edge_graphs.classifier(tmp_path / "shape")
    before = {path: path.read_bytes() for path in owner.repo.rglob("*") if path.is_file()}
    path = tmp_path / "x.expert.safetensors"
    bad = {"rank": 3}, {"name": "../x"}, {"drop": ("layers.0.up/A",)}
    for fields, what in zip(bad, ("has rank 3", "cannot be the id", "which the bundle does not know"), strict=True):
        edge_graphs.write_expert(path, manifest, **{"name": "bats", **fields})
        with pytest.raises(BundleError, match=what):
            owner.publish(owner.bundle(2), path)
    edge_graphs.write_expert(path, manifest, "bats", base="cd" * 32)
    for options, what in (({}, "no bundle of the repository has the base"), ({"fits": NAME}, "another base model")):
        with pytest.raises(BundleError, match=what):
            owner.publish(None, path, **options)
    edge_graphs.write_gate(path, manifest)
    with pytest.raises(BundleError, match="not an expert file"):
        owner.publish(None, path)
    with pytest.raises(BundleError, match=r"the repository has no bundle other.*there are: tiny-classifier"):
        owner.publish(None, owner.expert(), fits="other")
    with pytest.raises(BundleError, match="is an expert of the same id"):
        owner.publish(None, owner.expert(), owner.expert(seed=2))
    assert {path: path.read_bytes() for path in owner.repo.rglob("*") if path.is_file()} == before
    (offer, new), *_ = owner.publish(None, owner.expert()).experts
    assert (offer.version, new) == (1, False)
    assert {path: path.read_bytes() for path in owner.repo.rglob("*") if path.is_file()} == before
    owner.publish(owner.bundle(3, lambda manifest: setattr(manifest, "id", "second")))
    with pytest.raises(BundleError, match=r"may be for several bundles: second, tiny-classifier.*--for ID"):
        owner.publish(None, owner.expert())
    assert owner.publish(None, owner.expert(), fits="second").experts[0][0].bundle == "second"


def test_a_bundle_that_nobody_signed_takes_files(tmp_path):
    manifest = edge_graphs.classifier(tmp_path / "made")
    with Bundle.open(tmp_path / "made", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", manifest))
        assert bundle.added == ()


@pytest.fixture
def served(owner):
    handler = partial(SimpleHTTPRequestHandler, directory=str(owner.repo))
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_commands(owner, served, tmp_path, monkeypatch):
    monkeypatch.setenv("MOLEHILL_STORE", str(tmp_path / "store"))
    app = typer.Typer()
    app.add_typer(group.app, name="edge")
    app.command()(publishing.publish)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)

    def call(*words, code=0):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return " ".join((done.stdout if code == 0 else done.stderr).split())

    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    publish = ("publish", "--repo", owner.repo, "--keys", owner.keys.folder, "--passphrase-file", tmp_path / "secret")
    said = call(*publish, "--expert", owner.expert(), "--expert", owner.expert("bats", 2))
    assert "expert owls version 1 for bundle tiny-classifier, is there already" in said
    assert "expert bats version 1 for bundle tiny-classifier, 0.0 MB" in said
    assert "with --expert" in call(*publish, owner.expert(), code=2)

    call("edge", "pull", served, "--root", owner.keys.root_path(1))
    assert call("edge", "policy") == "experts: any, signed or not"
    call("edge", "add", NAME, "--file", owner.expert())
    assert "owls (NOT SIGNED)" in call("edge", "list")
    assert "owls (NOT SIGNED)" in call("edge", "info", NAME)
    said = call("edge", "policy", "--experts", "signed")
    assert "does not open any more, since owls is not signed; run: molehill edge remove tiny-classifier owls" in said
    assert "is not signed" in call("edge", "run", NAME, "--text", "boring", code=14)
    assert call("edge", "remove", NAME, "owls") == "bundle tiny-classifier: expert owls is removed"
    assert "takes signed experts only" in call("edge", "add", NAME, "--file", owner.expert(), code=14)
    assert "expert owls, version 1, signed, is added" in call("edge", "add", NAME, "owls")
    assert "owls (signed, version 1)" in call("edge", "info", NAME)
    told = json.loads(call("edge", "info", NAME, "--json", "--check"))
    assert told["check"]["inputs"] == 1
    assert told["added"] == [{"id": "owls", "version": 1, "signed": True}]
    assert told["experts"] == ["cats", "dogs", "newts", "owls"]
    told = json.loads(call("edge", "experts", NAME, "--json"))
    assert told["signed_only"]
    assert [(row["id"], row["offered"], row["version"], row["fits"]) for row in told["experts"]] == [
        ("bats", 1, None, True), ("owls", 1, 1, True)
    ]  # fmt: skip
    assert "owls version 1 0.0 yes version 1 yes" in call("edge", "experts", NAME)
    assert "no empty slot" in call("edge", "add", NAME, "bats", code=13)
    call(*publish, "--expert", owner.expert(seed=4))
    assert "expert owls: version 2 is in use now" in call("edge", "update")
    assert "one expert is to be added" in call("edge", "add", NAME, code=2)
    assert "cannot use the store" in call("edge", "policy", "--experts", "any", "--store", owner.expert(), code=13)
    assert "this is a PEFT folder" in call(*publish, "--expert", peft, code=13)

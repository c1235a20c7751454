"""An owner, a repository in memory and a device, and what a thief of keys may show to the device."""

from __future__ import annotations

import pytest
from edge_bundles import Memory, make_bundle
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from molehill.errors import TrustError
from molehill_edge import fetch
from molehill_edge.store import Store
from molehill_export.keys import Keys
from molehill_export.repository import Repository

NEW = {"experts.safetensors": b"experts of the second version"}


class World:
    """An owner with keys, a repository that shows version 1, and a device that has pulled it."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.keys = Keys(folder / "keys", b"secret")
        self.root = self.keys.root_path(1).read_bytes()
        self.repo = folder / "repo"
        self.server = Memory(self.repo)
        self.store = Store(folder / "store")

    def publish(self, version, files=None, now=None, **fields):
        bundle = make_bundle(
            self.folder / f"bundle-{fields.get('id', 'reviews')}-{version}", files, version=version, **fields
        )
        return Repository(self.repo, self.keys, now=now).publish(bundle)

    def refresh(self, now=None):
        return Repository(self.repo, self.keys, now=now).refresh()

    def pull(self, **options):
        return fetch.pull(self.store, self.server.address, fetcher=self.server, **options)

    def show(self):
        """The server shows what is published now."""
        self.server.load(self.repo)

    def signed(self, role):
        """The newest metadata of a role in the server."""
        names = [name for name in self.server.files if name.endswith(f"{role}.json")]
        name = max(names, key=lambda name: (len(name), name))
        return Metadata.from_bytes(self.server.files[name])

    def put(self, role, made, *, signer=None, up=True):
        """Sign metadata with a key of the owner, or another, and list it in all that is above it, as a thief could."""
        root = self.keys.roots()[-1].signed
        made.signatures.clear()
        for each in [signer] if signer else self.keys.signers(role if role in root.roles else "targets", root):
            made.sign(each, append=True)
        prefix = "" if role == "timestamp" else f"{made.signed.version}."
        data = made.to_bytes()
        self.server.files[f"metadata/{prefix}{role}.json"] = data
        if role == "timestamp" or not up:
            return
        above = "timestamp" if role == "snapshot" else "snapshot"
        parent = self.signed(above)
        meta = MetaFile.from_data(made.signed.version, data, ["sha256"])
        if role == "snapshot":
            parent.signed.snapshot_meta = meta
        else:
            parent.signed.meta[f"{role}.json"] = meta
        parent.signed.version += 1
        self.put(above, parent)

    def list(self, bundle):
        """Show the folder of a bundle as the newest, under the usual name, whatever its manifest says."""
        data = (bundle / "manifest.pb").read_bytes()
        made = self.signed("targets")
        entry = TargetFile.from_data("bundles/reviews/manifest.pb", data, ["sha256"])
        made.signed.targets[entry.path] = entry
        made.signed.version += 1
        self.server.files[f"targets/{entry.get_prefixed_paths()[0]}"] = data
        self.put("targets", made)

    def refused(self, what, kind=TrustError, before=1, **options):
        """A pull is refused in one sentence, and the device goes on with what it had."""
        with pytest.raises(kind) as caught:
            self.pull(**options)
        text = str(caught.value)
        assert what in text
        assert "\n" not in text
        assert text.endswith(f"Version {before} of bundle reviews stays in use.") or "bundle" in options
        assert caught.value.exit_code == (14 if kind is TrustError else 13)
        self.still(before)

    def still(self, version):
        with self.store.admit("reviews") as admitted:
            assert admitted.manifest.version == version
        assert not list((self.store.folder / "partial").iterdir())
        versions = [path for path in (self.store.folder / "bundles" / "reviews").iterdir() if path.is_dir()]
        assert len(versions) == 1


class Shown(World):
    """The same before the device has pulled anything; the server shows at once what is published."""

    def publish(self, version, files=None, now=None, **fields):
        super().publish(version, files, now, **fields)
        self.show()

    def opened(self, name="reviews"):
        with self.store.admit(name) as admitted:
            return admitted.manifest.version

    @property
    def version(self):
        current = self.store.current("reviews")
        return self.store.folder / "bundles" / "reviews" / current.folder


def shown(folder) -> Shown:
    """A repository that shows version 1, and a device."""
    Keys.create(folder / "keys", b"secret")
    made = Shown(folder)
    made.publish(1)
    return made

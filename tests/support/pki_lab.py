"""An authority and machines with identities of it, as owners make them."""

from __future__ import annotations

from molehill import pki

HOSTS = ("localhost", "127.0.0.1", "::1")


class Lab:
    """An authority and machines, each in a folder of its own."""

    def __init__(self, folder, **options):
        self.folder = folder
        self.authority = pki.Authority.create(folder / "ca", **options)

    def join(self, name, hosts=(), folder=None, now=None, **options):
        folder = self.folder / (folder or name)
        csr = pki.request(folder, name, hosts=hosts)
        _, bundle = self.authority.sign(csr, server=bool(hosts), now=now, **options)
        return pki.install(bundle, folder, now=now)

"""The app bundle of every deployed run: names of what all machines have installed, and no code.

A coordinator sends it along with a run, since Flower has no run without one; a lab machine builds it itself and takes
no other, so that nobody who controls a coordinator runs code on it.
"""

from __future__ import annotations

import io
import zipfile

NAME = "pyproject.toml"  # the bundle's only file of ours

TEXT = """[project]
name = "molehill-run"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "molehill"

[tool.flwr.app.components]
serverapp = "molehill_server.app:app"
clientapp = "molehill_client.deploy.thin:app"

[tool.flwr.app.config]
config = ""
out = ""
exchange = ""
grants = ""
introduction = ""
clients = 1
"""


def same(given: bytes, own: bytes) -> bool:
    """Whether two bundles hold the same files; how they are compressed does not matter.

    Args:
        given: Bytes from a network.
        own: A bundle that was built here.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(given)) as theirs, zipfile.ZipFile(io.BytesIO(own)) as ours:
            sizes = [[(info.filename, info.file_size) for info in each.infolist()] for each in (theirs, ours)]
            if sizes[0] != sizes[1]:  # before anything is unpacked
                return False
            return all(theirs.read(info) == ours.read(info.filename) for info in theirs.infolist())
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False

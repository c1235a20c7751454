"""Whom a device believes: what stands between a name and a folder whose every file was checked."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from molehill.errors import BundleError
from molehill_edge import archive
from molehill_edge import manifest as manifests
from molehill_edge.added import Added
from molehill_protos.v1.bundle_pb2 import Manifest

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Admitted:
    """A bundle that may be opened: every file had its length and SHA-256 when it was admitted.

    Args:
        folder: Its files. They stay until `close`, whatever is updated or removed meanwhile.
        manifest: What they are.
        release: Called once by `close`, or when the object is gone.
        experts: Those that this device adds, checked too, each with the bytes of its file.
        signed_experts_only: Whether experts of any other origin are refused.
    """

    folder: Path
    manifest: Manifest
    release: Callable[[], None] = lambda: None
    experts: Sequence[tuple[Added, bytes]] = ()
    signed_experts_only: bool = False

    def __post_init__(self) -> None:
        self._release = weakref.finalize(self, self.release)

    def close(self) -> None:
        """Let the folder go; call it after the session that reads the files is gone."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Trust(Protocol):
    """Turns a name into a bundle that may be opened: a `molehill_edge.store.Store`, or `InsecureLocal`."""

    def admit(self, name: str | Path) -> Admitted:
        """The bundle of this name, all of it checked.

        Raises:
            BundleError: It is damaged, expired, or does not fit this machine.
            TrustError: It is not what somebody trusted has signed.
        """


class InsecureLocal:
    """A bundle of a folder or archive that nobody signed: whoever could write there decides what runs.

    All but the signature is checked all the same.

    Args:
        warn: Gets the warning, once; a log record of level WARNING when None, which Python prints to standard error
            unless the program has set up something else.
    """

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self._warn = warn or _log.warning
        self._warned = False

    def admit(self, name: str | Path) -> Admitted:
        """The bundle of a folder or archive; what an archive holds lies in a temporary folder until it is closed.

        Raises:
            BundleError: It is damaged, expired, or does not fit this machine.
        """
        path = Path(name)
        if not self._warned:
            self._warned = True
            self._warn(f"INSECURE: {path} is opened without any signature; whoever could write it decides what runs")
        if path.is_dir():
            manifest, _ = manifests.load(path)
            manifests.check_files(path, manifest)
            return Admitted(path, manifest)
        if not path.exists():
            raise BundleError("there is no bundle here", where=str(path), mend="Name its folder or .molehill archive.")
        temporary = Path(tempfile.mkdtemp(prefix="molehill-"))
        try:
            manifest = archive.unpack(path, temporary / "bundle")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Admitted(temporary / "bundle", manifest, lambda: shutil.rmtree(temporary, ignore_errors=True))

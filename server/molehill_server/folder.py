"""The run folder: for one process at a time, and for one configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from molehill import files, locks
from molehill.config import Config, load
from molehill.errors import DeployError, ResumeError

if TYPE_CHECKING:  # its module needs transformers, and the server does not
    from molehill.tasks.base_model import BaseInfo


def take(out: Path, patience: float | None = None) -> TextIO:
    """Take the run folder for this process, until the file that is returned is closed or the process ends.

    Args:
        out: The folder.
        patience: Seconds to wait for whoever has it; None for those in which somebody only looks.

    Raises:
        DeployError: Another process has it.
    """
    error = elsewhere(out)
    return locks.hold(out, error.what, error.mend, patience=patience)


def elsewhere(out: Path) -> DeployError:
    """What is said to the second process in a run folder."""
    mend = "Let it end, or choose another --out."
    return DeployError("another process works in this run folder", where=str(out), mend=mend)


@contextlib.contextmanager
def working(out: Path, patience: float | None = 0) -> Iterator[None]:
    """Have the run folder for this process alone; one that nothing was put into is gone afterwards.

    Args:
        out: The folder.
        patience: See `take`.

    Raises:
        DeployError: Another process has it.
    """
    new = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = take(out, patience)
    try:
        files.sweep(out)
        yield
    finally:
        if [path.name for path in out.iterdir()] == [locks.LOCK]:
            (out / locks.LOCK).unlink()
        lock.close()
        for path in new:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def write_config(config: Config, out: Path) -> Path:
    """Write the resolved configuration into the run folder, once; both apps read it from there.

    Returns:
        The absolute path of the file.

    Raises:
        ResumeError: The folder holds a run with another configuration.
    """
    path = out.resolve() / "config.toml"
    if path.exists():
        differ = _differences(load(path).substance, config.substance)
        if differ:
            raise ResumeError(
                f"the run was started with another configuration, {', '.join(differ[:5])} differ",
                where=str(out),
                mend="Resume with the configuration it was started with, or start a new run in another folder.",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # somebody else's, who lets us write there
        path.parent.chmod(0o700)
    files.write(path, config.to_toml().encode())
    return path


def require_base(meta: Mapping[str, str], base: BaseInfo, out: Path) -> None:
    """Refuse a run folder whose start values are of another base model.

    Args:
        meta: Of ``initial.safetensors``.
        base: The base that was loaded.
        out: The folder.

    Raises:
        ResumeError: They are.
    """
    if meta.get("base") != base.digest:
        raise ResumeError(
            f"the run was started on a base with weight digest {meta.get('base', '')[:12]}, "
            f"{base.id} has {base.digest[:12]}",
            where=str(out),
            mend="Resume with the same base model, or start a new run in another folder.",
        )


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Dotted keys under which two nested configurations differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [at]
    keys = sorted({*before, *now})
    return [path for key in keys for path in _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)]

"""The machine around us: commands, proxies and places for sockets, whatever its environment variables say.

Flower starts its commands by bare name, and its processes talk to each other over loopback with libraries that heed
proxy variables. So what we start gets the folder of this Python first on its ``PATH``, and no proxy on loopback.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from molehill.errors import DeployError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EXEMPT = ("no_proxy", "NO_PROXY", "no_grpc_proxy")  # gRPC looks at the last one only, where it is set
_SOCKET = 103  # bytes that the path of a Unix socket may have on every system
_GATEWAY = "gateway.sock.4294967295"  # the longest name of ours: the door numbers its connections


def variables(*, outside: bool = True) -> dict[str, str]:
    """The environment of a process that we start.

    Args:
        outside: Whether it may have to reach other machines. One that does not gets no proxy at all: the libraries of
            Flower fail at proxies and exceptions that they do not understand, whether they are needed or not.
    """
    found = {**os.environ, "PATH": path()}
    if not outside:
        return {key: value for key, value in found.items() if not key.lower().endswith("_proxy")}
    for name in _EXEMPT:
        # Where only one of the first two is set, it counts; both say the same then.
        listed = found.get(name) or ("" if name == _EXEMPT[2] else os.environ.get(name.swapcase(), ""))
        if (name == _EXEMPT[2] and not listed) or listed.strip() == "*":
            continue
        hosts = [host.strip() for host in listed.split(",") if host.strip()]
        found[name] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    return found


def path() -> str:
    """``PATH`` with the commands of this Python first: those beside it (not where it links to), then installed ones."""
    places = [str(Path(sys.executable).parent)] if sys.executable else []
    places.append(sysconfig.get_path("scripts"))
    if site.ENABLE_USER_SITE:
        places.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    places += os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(place for place in places if place))


def require_commands(*names: str) -> None:
    """Look for commands now, and not when something fails for want of one.

    Args:
        names: Commands that are to be started by bare name.

    Raises:
        DeployError: One is not there.
    """
    here = path()
    for name in names:
        if shutil.which(name, path=here) is None:
            raise DeployError(
                f"the command {name} is not there",
                where=str(Path(sys.executable).parent),
                mend="It comes with Molehill's extras client, server and simulation: install them again here.",
            )


@contextlib.contextmanager
def short_folder(longest: str = _GATEWAY) -> Iterator[Path]:
    """A folder that only we may enter, in memory where possible, for Unix sockets: their paths must be short.

    Args:
        longest: The longest path that will be made below it.

    Raises:
        DeployError: There is no place for one.
    """
    places = [Path("/dev/shm"), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - mkdtemp makes a folder of our own there
    with contextlib.suppress(OSError):  # there is no place for temporary files at all
        places.insert(1, Path(tempfile.gettempdir()))
    folder = _made(places, longest)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_short(folder: str, longest: str) -> bool:
    """Whether a Unix socket may have the path ``longest`` below a folder."""
    return len(os.fsencode(f"{folder}/{longest}")) <= _SOCKET


def _made(places: Sequence[Path], longest: str) -> Path:
    why = []
    for place in places:
        if not is_short(f"{place}/molehill-12345678", longest):
            why.append(f"{place}: its path is too long")
            continue
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="molehill-", dir=place))
            (folder / "try").write_bytes(bytes(2**14))  # a full one would fail later, with less clear words
            (folder / "try").unlink()
        except OSError as error:
            why.append(f"{place}: {error.strerror}")
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    most = _SOCKET - len(longest) - len("/molehill-12345678/")
    raise DeployError(
        f"there is no place for sockets ({'; '.join(why)})",
        mend=f"Let TMPDIR name a folder that can be written, with a path of at most {most} bytes.",
    )

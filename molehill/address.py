"""Addresses ``HOST:PORT``, in which an address of IPv6 stands in brackets: ``[::1]:9440``."""

from __future__ import annotations

import ipaddress

from molehill.errors import ConfigError


def parse(text: str) -> tuple[str, int]:
    """Host and port of an address; the host without brackets.

    Raises:
        ConfigError: It is none.
    """
    host, _, port = text.rpartition(":")
    good = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
    if not host or not good or (":" in host and not host.startswith("[")):
        mend = "Give HOST:PORT, as in lab.example.org:9440, without https:// and the like."
        if _is_v6(bare(text)) or _is_v6(host):
            mend = "An address of IPv6 stands in brackets, with the port behind them: [::1]:9440."
        raise ConfigError(f"{text!r} is no address", mend=mend)
    return require_host(host), int(port)


def require_host(host: str) -> str:
    """A name or address as sockets take it: without brackets.

    Raises:
        ConfigError: It cannot be one.
    """
    plain = bare(host)
    try:
        good = _is_v6(plain) if plain != host or ":" in plain else bool(plain.encode("idna"))
    except UnicodeError:
        good = False
    if not good or any(each.isspace() or each == "/" for each in plain):
        mend = "Give a name as lab.example.org, or an address as 192.0.2.7 or ::1; without port and scheme."
        raise ConfigError(f"{host!r} is neither a host name nor an address", mend=mend)
    return plain


def join(host: str, port: int) -> str:
    """The address as it is written: a host of IPv6 gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bare(host: str) -> str:
    """A host without the brackets that an address of IPv6 may have."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_v6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True

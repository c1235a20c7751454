"""Names of tensors on the wire."""

from __future__ import annotations

import re
from typing import NamedTuple

from molehill.errors import MessageError

NO_EXPERT = "-"
KINDS = ("A", "B", "dense", "gate", "head")  # of tensors; policies of rounds and of owners name them
PLACES, OWN_PLACES = "gate.places", "gate.own.mine"  # roles; see `molehill.molora.interfaces.Settles`
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*|-")
_MAX_NAME = 512  # characters


class Key(NamedTuple):
    """The name of one tensor; keys are totally ordered and their wire name is ``site/expert/role``.

    Attributes:
        site: Path of the adapted module in the base model (``encoder.layer.0.attention.self.query``), or ``head``.
        expert: Expert id given by the server (``e0``, ``shared0``), or ``-`` for a tensor that belongs to none.
        role: ``A`` ``[r, d_in]``, ``B`` ``[d_out, r]`` (scale absorbed), ``gate[.name]``, ``head[.name]``, or
            ``dense[.name]`` for anything else.
    """

    site: str
    expert: str
    role: str

    @property
    def kind(self) -> str:
        """The role without its suffix: ``A``, ``B``, ``gate``, ``head`` or ``dense``."""
        return self.role.partition(".")[0]

    @property
    def residual(self) -> bool:
        """Whether this is the part of a router or head that stays with its client (``gate.residual.weight``)."""
        return self.role.partition(".")[2].startswith("residual")

    @property
    def own(self) -> bool:
        """Whether this is a part of a router that stays with its client when gates are split (``gate.own.main``)."""
        return self.role.partition(".")[2].startswith("own.")

    @property
    def routed(self) -> bool:
        """Whether this is of an expert that a router chooses."""
        return self.expert != NO_EXPERT and not self.expert.startswith("shared")

    @property
    def name(self) -> str:
        """The wire name, ``site/expert/role``."""
        return "/".join(self)

    @classmethod
    def parse(cls, name: str) -> Key:
        """Parse a wire name.

        Raises:
            MessageError: ``name`` is not three well-formed parts.
        """
        parts = name.split("/") if len(name) <= _MAX_NAME else []
        if len(parts) != 3 or not all(_PART.fullmatch(part) for part in parts):
            raise MessageError(f"bad tensor name {name[:80]!r}", mend="Expected site/expert/role.")
        return cls(*parts)

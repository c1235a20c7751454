"""What each node may do, as the coordinator's current plan for it has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molehill.errors import MessageError
from molehill.files import write
from molehill.pki.certificate import require_name

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Grant(BaseModel):
    """What one node may do until its next grant.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Tells apart attempts at one round: a delta delivered in another one does not count in this one.
        read: Digests it may get.
        write: Whether it may put its delta of the round.
        max_bytes: Largest delta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    round: int = Field(ge=0, lt=2**32)
    attempt: int = Field(default=0, ge=0)
    read: tuple[Digest, ...] = ()
    write: bool = False
    max_bytes: int = Field(default=0, ge=0)


class Grants:
    """The grants of all nodes, one file each; a file is replaced at once.

    Args:
        folder: Where they lie; it is made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def give(self, node: str, grant: Grant) -> None:
        """Let a node do this, and no longer what it could before."""
        write(self._file(node), grant.model_dump_json().encode())

    def take(self, node: str) -> None:
        """Let a node do nothing."""
        self._file(node).unlink(missing_ok=True)

    def renew(self, grants: Mapping[str, Grant]) -> None:
        """Give these grants, and take those of all other nodes."""
        for node in self.all().keys() - grants.keys():
            self.take(node)
        for node, grant in grants.items():
            self.give(node, grant)

    def attempt(self, run: str, round_: int) -> int:
        """The highest attempt at a round that any node has a grant to write for; 0 when there is none."""
        grants = [grant for grant in self.all().values() if grant is not None and grant.write]
        return max((grant.attempt for grant in grants if (grant.run, grant.round) == (run, round_)), default=0)

    def of(self, node: str) -> Grant | None:
        """What a node may do; None is nothing.

        Raises:
            MessageError: The file is damaged.
            IdentityError: The name cannot be a node's.
        """
        path = self._file(node)
        try:
            return Grant.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise MessageError(f"the grant is damaged ({error})", where=str(path), mend="Give it again.") from None

    def all(self) -> dict[str, Grant | None]:
        """The grant of every node that has one; None where the file is damaged."""
        grants: dict[str, Grant | None] = {}
        for path in self._folder.glob("[!.]*.json"):
            try:
                grants[path.stem] = self.of(path.stem)
            except MessageError:
                grants[path.stem] = None
        return grants

    def _file(self, node: str) -> Path:
        return self._folder / f"{require_name(node)}.json"

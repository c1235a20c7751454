"""Errors a user can cause, and what to do about them.

Every mistake in a config, data file, model, adapter or message ends in one of these. The command line prints
`str(error)` and exits with `exit_code`; nothing else in the project may end in a traceback for bad input.

MolehillError
├── ConfigError       a key, value or combination in the configuration
├── DataError         a data file, column, row or label
├── ModelError        a base model or a target module
├── AdapterError      a saved adapter folder
├── MessageError      bytes that came over a wire
├── ResumeError       a run folder that does not fit the run to resume
├── TrainingError     training itself failed (for example a NaN loss)
├── FederationError   the round cannot go on (for example below quorum)
├── IdentityError     a key, certificate or certificate authority
├── DeployError       a process of a deployment cannot start or be reached, or the system refuses something
├── PrivacyError      the privacy budget is spent
├── BundleError       a bundle, gate or expert of a device
├── AnswerError       what is asked of a model: a strategy, how tokens are drawn, a text that does not fit
├── TrustError        a signature, a repository of bundles, or what it says
└── ConsentError      a run or plan that asks for more than the owner of the rows agreed to
"""

from __future__ import annotations

from collections.abc import Mapping


class MolehillError(Exception):
    """What went wrong, where, and how to mend it, in one paragraph.

    Args:
        what: One clause that says what is wrong.
        where: The file and line, key, client or message concerned; empty when there is none.
        mend: One sentence that says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what = what
        self.where = where
        self.mend = mend
        super().__init__(self._text())

    def _text(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        head = head if head.endswith((".", "!", "?")) else f"{head}."
        return f"{head} {self.mend}".strip()

    def as_dict(self) -> dict[str, str]:
        """What `from_dict` in another process makes the same error of."""
        return {"kind": type(self).__name__, "what": self.what, "where": self.where, "mend": self.mend}


def from_dict(said: Mapping[str, str]) -> MolehillError:
    """Undo `MolehillError.as_dict`; a kind that is not known here becomes a plain `MolehillError`."""
    kinds = {kind.__name__: kind for kind in MolehillError.__subclasses__()}
    return kinds.get(said["kind"], MolehillError)(said["what"], where=said["where"], mend=said["mend"])


def first_line(error: BaseException) -> str:
    """What an error of a library says, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(MolehillError):
    """A key, value or combination in the configuration cannot be used."""

    exit_code = 2


class DataError(MolehillError):
    """A data source cannot be read, or a row, column or label does not fit the task."""

    exit_code = 3


class ModelError(MolehillError):
    """A base model cannot be loaded, or its modules do not fit the adapter."""

    exit_code = 4


class AdapterError(MolehillError):
    """A saved adapter is damaged, or does not fit this base model."""

    exit_code = 5


class MessageError(MolehillError):
    """Bytes from a network are truncated, too large, foreign or not what the plan asked for."""

    exit_code = 6


class ResumeError(MolehillError):
    """A run folder cannot be resumed with this configuration or base model."""

    exit_code = 7


class TrainingError(MolehillError):
    """Training produced a value that cannot be used, for example a NaN loss."""

    exit_code = 8


class FederationError(MolehillError):
    """A round could not be completed, for example because too few clients answered."""

    exit_code = 9


class IdentityError(MolehillError):
    """A key or certificate is missing, expired, revoked, open to others or not what it is used for."""

    exit_code = 10


class DeployError(MolehillError):
    """A process of the deployment cannot start or be reached, or the system refuses what a command needs."""

    exit_code = 11


class PrivacyError(MolehillError):
    """A round would spend more privacy than the run's budget allows."""

    exit_code = 12


class BundleError(MolehillError):
    """A bundle, gate or expert is damaged, expired, too new, or does not fit; or an input does not fit the bundle."""

    exit_code = 13


class AnswerError(MolehillError):
    """What is asked of a model cannot be answered so."""

    exit_code = 16


class TrustError(MolehillError):
    """A repository of bundles is unsigned, expired, older than what is known, or signed by somebody else."""

    exit_code = 14


class ConsentError(MolehillError):
    """A run or a plan asks for more than the owner of the rows agreed to."""

    exit_code = 15

"""Another causal LM that answers beside a trained one: as it is, for the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from molehill import config
from molehill.errors import AnswerError
from molehill.molora.build import bare
from molehill.molora.decode import TorchPasses
from molehill.tasks.base_model import load_base
from molehill_simulation.source import Source


@dataclass(frozen=True)
class Beside:
    """Another model.

    Attributes:
        passes: What strategies ask.
        limit: The longest text it takes, in tokens.
    """

    passes: TorchPasses
    limit: int


def open_beside(source: Source, model: str, where: str) -> Beside:
    """Load another causal LM.

    Args:
        source: What was trained; both must have the same tokens.
        model: Folder or hub id.
        where: What asked for it, for errors.

    Raises:
        AnswerError: Its tokens are others.
        ModelError: It cannot be loaded, or does not write text.
    """
    settings = config.Base(model=model, precision="fp32", device="cpu")  # as what was trained
    loaded = load_base(settings, source.task.model_copy(update={"kind": "causal-lm"}))
    ours, theirs = source.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
    if ours != theirs:
        what = f"{model} has another vocabulary than {source.base.id}: {_difference(ours, theirs)}"
        raise AnswerError(what, where=where, mend="Give a model with the same tokenizer.")
    return Beside(TorchPasses(bare(loaded.model)), loaded.limit)


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """One difference of two vocabularies."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} tokens in place of {len(ours)}"
    token = min((word for word in ours if theirs.get(word) != ours[word]), key=ours.__getitem__)
    number = theirs.get(token)
    return f"{token!r} is {'not there' if number is None else f'token {number}'}, where here it is {ours[token]}"

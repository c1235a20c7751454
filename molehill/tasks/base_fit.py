"""Whether a base that was loaded is all of what was stored, and fits its tokenizer and the task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molehill import config
from molehill.errors import ModelError
from molehill.molora.trial import is_numbered, stack_of, takes, trial_of
from molehill.tasks.kind import kind_of
from molehill.tasks.weights import Stored

_ENDLESS = 1 << 30  # tokens, of a model that says nothing and has no table of positions
# Masks, angles and numbers of positions that older versions of transformers stored; the model makes them itself.
_MADE = re.compile(r"(^|\.)(inv_freq|position_ids|token_type_ids|(attn|attention)\.(masked_)?bias)$")


def require_used(model: PreTrainedModel, left: Iterable[str], origin: str) -> None:
    """Refuse weights of the model's own parts that its configuration leaves out; heads and other towers may be.

    Args:
        model: What was made of the weights.
        left: Names of those that it did not take.
        origin: What the user called the base.

    Raises:
        ModelError: There are some.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {name.removeprefix(prefix) for name, _ in model.named_modules()} - {""}
    made = {name.removeprefix(prefix) for name, _ in model.named_buffers()}

    def is_inside(name: str) -> bool:
        """Whether it would be part of a module that the model has, or lie beside one within another."""
        if is_numbered(name):
            return stack_of(name).removeprefix(prefix) in parts
        module = name.removeprefix(prefix).rpartition(".")[0]
        return module in parts or module.rpartition(".")[0] in parts

    lost = sorted(
        name for name in left if is_inside(name) and name.removeprefix(prefix) not in made and not _MADE.search(name)
    )
    if lost:
        raise ModelError(
            f"the configuration leaves out {lost[0]} and {len(lost) - 1} more of the weights",
            where=origin,
            mend="Give the config.json that the weights were saved with.",
        )


def require_floats(model: PreTrainedModel, left: Iterable[str], stored: Stored) -> None:
    """Refuse weights that are stored as whole numbers, which would be taken for the weights themselves.

    Args:
        model: What was made of the weights.
        left: Names of those that it did not take.
        stored: All of them.

    Raises:
        ModelError: There are some.
    """
    prefix = f"{model.base_model_prefix}."
    others = {name.removeprefix(prefix) for name in (*left, *(name for name, _ in model.named_buffers()))}
    for name, kind in sorted(stored.whole_numbers().items()):
        if name.removeprefix(prefix) not in others and not _MADE.search(name):
            raise ModelError(
                f"the base is quantised ({name} is stored as {kind}); experts are trained on weights in full precision",
                where=stored.origin,
                mend="Give the full-precision checkpoint it was made of.",
            )


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: config.Task, origin: str) -> int:
    """Compare model, tokenizer and task.

    Args:
        model: The base.
        tokenizer: Its own.
        task: What is learnt.
        origin: What the user called the base.

    Returns:
        How many tokens the model takes.

    Raises:
        ModelError: They do not fit each other, or experts cannot be trained on the model.
    """
    embeddings: Any = model.get_input_embeddings().weight
    vocabulary = embeddings.shape[0]
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}",
            where=origin,
            mend="Give the tokenizer the model was trained with.",
        )
    with _named(origin):
        found = trial_of(model)
    if kind_of(task).head is not None and not found.states:
        raise ModelError(
            f"{model.config.model_type} gives no token states for {task.kind}", where=origin, mend="Give another base."
        )
    if found.calls and not any(any(found.on_tokens(name)) for name in found.calls):
        name, shapes = next(iter(found.calls.items()))
        raise ModelError(
            f"the layers of {model.config.model_type} do not run on the tokens of a batch, row by row: {name} got "
            f"{list(shapes[0])} for {[2, 3]}, so its experts cannot be told which token they work on",
            where=origin,
            mend="Give a base whose layers neither pad nor turn their rows.",
        )
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(
        size
        for size in (_ENDLESS, tokenizer.model_max_length, stated, found.positions)
        if size is not None and size > 0
    )
    if limit >= task.max_length and not takes(model, task.max_length):
        limit = _longest(model, task.max_length)
    if task.max_length > limit:
        raise ModelError(
            f"task.max_length is {task.max_length}, but the model takes {limit} tokens",
            where=origin,
            mend=f"Set task.max_length to at most {limit}.",
        )
    return limit


def _longest(model: PreTrainedModel, tokens: int) -> int:
    """The longest input that the model takes, when it does not take one of ``tokens``."""
    low = 1
    while tokens - low > 1:
        middle = (low + tokens) // 2
        low, tokens = (middle, tokens) if takes(model, middle) else (low, middle)
    return low


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Say which base an error is about, as its user called it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{error.where}: {error.what}", where=origin, mend=error.mend) from None

"""From a configuration to base model, adapter and task: the same on a server, a client and in a simulation."""

from __future__ import annotations

from typing import NamedTuple

from molehill.config import Config
from molehill.molora.attention import use_fast_attention
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.model import MoLoRAModel
from molehill.tasks.base_model import BaseInfo, load_base
from molehill.tasks.task import Task, make_task


class Adapted(NamedTuple):
    """A base with its adapter.

    Attributes:
        model: Base and adapter, with the start values that follow from the run's seed.
        base: Which base.
        task: Encodes rows.
    """

    model: MoLoRAModel
    base: BaseInfo
    task: Task


def open_model(config: Config) -> Adapted:
    """Load the base and wrap it; the task's labels must be known.

    Raises:
        ModelError: The base cannot be loaded, or the targets do not fit it.
        ConfigError: Parts of the adapter do not fit each other.
    """
    loaded = load_base(config.base, config.task)
    use_fast_attention(loaded.model, config.task.max_length)
    head = None
    if config.task.kind == "classification":
        width = int(loaded.model.config.hidden_size)
        classes = len(config.task.labels)
        head = Head(width, classes, loaded.pooling, anchored=config.personal.head == "anchored")
    model = wrap(loaded.model, config.molora, gate=config.personal.gate, head=head, seed=config.run.seed)
    return Adapted(model, loaded.info, make_task(config.task, loaded.tokenizer))

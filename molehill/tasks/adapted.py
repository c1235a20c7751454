"""From a configuration to base model, adapter and task: the same on a server, a client and in a simulation."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from molehill.config import Config
from molehill.errors import ModelError, first_line
from molehill.molora.attention import use_fast_attention
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.molora.model import MoLoRAModel
from molehill.molora.trial import plain_tokens, trial_of
from molehill.tasks.base_model import BaseInfo, load_base
from molehill.tasks.kernels import Kernels, fast_attention
from molehill.tasks.kind import kind_of, make_task
from molehill.tasks.task import Task


class Adapted(NamedTuple):
    """A base with its adapter.

    Attributes:
        model: Base and adapter, with the start values that follow from the run's seed.
        base: Which base.
        task: Encodes rows.
        kernels: How it is computed on this machine.
    """

    model: MoLoRAModel
    base: BaseInfo
    task: Task
    kernels: Kernels


def open_model(config: Config, *, offline: bool = False) -> Adapted:
    """Load the base and wrap it.

    Args:
        config: The run. Without labels, which may not be known yet, a head has none either.
        offline: Take a hub model as it is on this machine.

    Raises:
        ModelError: The base cannot be loaded, the targets do not fit it, or it cannot be trained with them.
        ConfigError: Parts of the adapter do not fit each other.
    """
    loaded = load_base(config.base, config.task, offline=offline)
    width = trial_of(loaded.model).width
    tokens = config.task.max_length
    ours = use_fast_attention(loaded.model, tokens, partial(fast_attention, loaded.kernels, tokens))
    computed = loaded.kernels._replace(attention="products" if ours else "torch")
    task, head = make_task(config.task, loaded.tokenizer), None
    if kind_of(config.task).head is not None:
        head = Head(width, task.outputs, loaded.pooling, anchored=config.personal.head_residual is not None)
    model = wrap(loaded.model, config.molora, gate=config.personal.gate, head=head, seed=config.run.seed)
    model.likelihood = task.likelihood
    _try(model, config.base.model)
    return Adapted(model, loaded.info, task, computed)


def _try(model: MoLoRAModel, origin: str) -> None:
    """Train on two short rows, without changing anything: what fails here would fail on every client."""
    tokens = plain_tokens(model.base, 3)
    ids = torch.tensor([tokens, tokens], device=model.flat.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -1] = False
    labels = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if model.head and model.head.pools else ids
    try:
        with torch.random.fork_rng(devices=[]):
            model(ids, mask, labels).scores.float().sum().backward()
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  (the code of some hundred architectures: it raises what it likes)
        raise ModelError(
            f"the model cannot be trained with adapters: {first_line(error)}",
            where=origin,
            mend="Choose other molora.targets, or give another base.",
        ) from None
    finally:
        model.grads.zero_()
        for group in model.routers.values():
            group.forget()

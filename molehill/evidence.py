"""What clients tell beside the delta itself, declared kind by kind, so that an owner can say what may leave.

Every field of a message from a client to the server either belongs to a kind of this list or is in `ADDRESS`; a test
holds every message to that. A new kind is one more entry: policies that do not name it refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from molehill.config import Config

Moment = Literal["run", "evaluate", "train.baseline"]

# What a reply needs to be matched with its question, or why there is none; lengths in bytes follow from the delta.
ADDRESS = {
    "Hello": {"client", "version"},
    "ClientReply": {"client", "round", "delta", "bytes_up", "bytes_down", "unusable", "started"},
    "EvaluationReply": {"client", "started"},
    "Delta": {"run", "round", "client", "base", "tree", "codec"},
}


@dataclass(frozen=True)
class Evidence:
    """A kind of evidence.

    Attributes:
        name: As a policy names it.
        meaning: What it is, in words.
        fields: Fields of messages that hold it, as ``Message.field``.
        asked: Whether a run with this configuration has every client tell it by itself; what only enters a masked sum
            is not told.
        moment: When it is told: ``run``, so that there is no taking part without it, or at a request of its own.
    """

    name: str
    meaning: str
    fields: tuple[str, ...]
    asked: Callable[[Config], bool]
    moment: Moment = "run"


def _always(_: Config) -> bool:
    return True


def _in_the_open(config: Config) -> bool:
    return not config.privacy.secure_aggregation


def probed(config: Config) -> bool:
    """Whether clients tell what the run's probes add up: nobody does where the server may learn nothing of one."""
    return bool(config.evaluate.probes) and _in_the_open(config) and config.privacy.clip is None


def chosen(config: Config) -> bool:
    """Whether clients tell which candidate their personalised model is; see `probed`."""
    return bool(config.personal.candidates) and _in_the_open(config) and config.privacy.clip is None


def embedded(config: Config) -> bool:
    """Whether clients tell embeddings: where an assignment goes by them, and the server may learn of single clients."""
    asks: bool = config.federation.assign.declared("assignment", "asks")
    return asks and _in_the_open(config) and config.privacy.clip is None


def placed(config: Config) -> bool:
    """Whether clients that train apart tell where their rows lie; see `embedded`."""
    gathers: bool = config.federation.assign.declared("assignment", "gathers")
    return gathers and _in_the_open(config) and config.privacy.clip is None


KINDS = (
    Evidence(
        "rows",
        "how many rows there are, to train on, set aside and held out, and how many are cut, left out or not learnt",
        (
            *("Hello.n_train", "Hello.n_test", "ClientReply.examples", "Delta.examples"),
            *("EvaluationReply.n_train", "EvaluationReply.n_test", "Hello.cut", "Hello.lost"),
            *("Hello.unlearnt", "Hello.aside", "EvaluationReply.aside"),
        ),
        _always,
    ),
    Evidence("time", "how long the local work took", ("ClientReply.seconds", "EvaluationReply.seconds"), _always),
    Evidence("loss", "the mean training loss of every round", ("ClientReply.loss",), _in_the_open),
    Evidence(
        "routing",
        "the routing losses of every round",
        ("ClientReply.metrics",),
        lambda config: _in_the_open(config) and bool(config.molora.losses),
    ),
    Evidence(
        "tokens",
        "how many tokens went to which expert, by site, which says something of the topics of the rows",
        ("Delta.tokens", "EvaluationReply.tokens"),
        _in_the_open,
    ),
    Evidence(
        "embeddings",
        "where the tokens of a round lie in mean in a space of as many axes as an expert has ranks, and what every "
        "expert makes of them, by site, which says something of the topics of the rows",
        ("ClientReply.embeddings",),
        embedded,
    ),
    Evidence(
        "places",
        "the centres of a few clusters of the rows, each the mean over rows of what the base makes of their prompts, "
        "which says what the rows are about, and of a cluster of one row what that row is about",
        ("ClientReply.places",),
        placed,
    ),
    Evidence(
        "probes",
        "what `evaluate.probes` add up over the held-out rows: how tokens were routed, by site",
        ("EvaluationReply.probes",),
        probed,
    ),
    Evidence(
        "scores",
        "how good the models are on the held-out rows: accuracy, F1 and loss, or what else the task measures, such as "
        "errors of numbers and F1 of entities, each with the interval that it is in",
        ("EvaluationReply.stages",),
        _always,
        "evaluate",
    ),
    Evidence(
        "choice",
        "which of `personal.candidates` the owner made of the final model",
        ("EvaluationReply.chosen",),
        chosen,
        "evaluate",
    ),
    Evidence(
        "answers",
        "how alike the answers that the models write to `evaluate.generate` held-out rows are to the right ones, as "
        "sums; never a text",
        ("EvaluationReply.answers",),
        lambda config: config.evaluate.generate > 0,
        "evaluate",
    ),
    Evidence(
        "baselines",
        "the same scores of models that are trained on these rows alone, and by how much the personalised model is "
        "better than these",
        ("EvaluationReply.stages", "EvaluationReply.gains", "EvaluationReply.remembered"),
        lambda config: bool(config.evaluate.baselines),
        "train.baseline",
    ),
)


def asked(config: Config, moment: Moment) -> list[str]:
    """Names of the kinds that a run has every client tell at a moment."""
    return [kind.name for kind in KINDS if kind.moment == moment and kind.asked(config)]

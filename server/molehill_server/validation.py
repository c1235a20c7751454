"""Judges what a client sent. Nothing of an update is used before it has passed here."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from molehill import evidence
from molehill.config import Config
from molehill.errors import MessageError
from molehill.molora.probes import require_fitting
from molehill.plan import HUGE, ClientPlan, ClientReply, EvaluationReply, Scores
from molehill.tasks.kind import kind_of
from molehill.wire.clipping import norm
from molehill.wire.keys import NO_EXPERT, OWN_PLACES
from molehill.wire.message import Delta, decode_delta, digest, largest_delta
from molehill.wire.tree import Layout
from molehill_server.planning.planner import expected

_TOLERANCE = 2.0  # a codec may round a clipped delta up; beyond this times the clip, its client did not clip
_STAGES = {"train.baseline": {"base", "local"}, "evaluate": {"global", "personalised"}}


@dataclass(frozen=True)
class Limits:
    """How large an update may be.

    Attributes:
        max_bytes: Largest blob.
        norm_bound: Largest L2 norm of the delta, where it is known before a round; None accepts any finite one here.
            Under privacy a delta that is clearly above the clip is refused as well.
        tokens: Largest gate mass of one expert at one site, in tokens.
    """

    max_bytes: int
    norm_bound: float | None
    tokens: float

    @classmethod
    def from_config(cls, config: Config) -> Limits:
        """The limits of a run.

        No gate weighs more than its selector's bound, so an expert cannot get more tokens in a round than so many times
        those of its batches.
        """
        train, selector = config.train, config.molora.selector
        bound = max(1.0, selector.build("selector").bound)  # 1 where it is always on
        rows = train.steps * train.accumulation * train.batch_size * kind_of(config.task).sequences
        rounding = 1.01  # the mass is summed in float32
        clipped = None if config.privacy.clip is None else _TOLERANCE * config.privacy.clip
        bounds = [bound for bound in (config.round.fixed_bound, clipped) if bound is not None]
        return cls(config.wire.max_bytes, min(bounds, default=None), rounding * bound * rows * config.task.max_length)

    def delta(self, model: Layout) -> int:
        """Most bytes of a delta of a model: what it takes as float32, and no more than the limit."""
        return min(self.max_bytes, largest_delta(model, model))


def parse_reply(text: str) -> ClientReply:
    """Read a reply.

    Args:
        text: JSON of the reply.

    Returns:
        The reply.

    Raises:
        MessageError: It is malformed.
    """
    try:
        return ClientReply.model_validate_json(text)
    except ValidationError as error:
        raise MessageError(f"malformed reply, {_first(error)}") from None


def parse_scores(text: str, client: str, kind: str, model: Layout, config: Config) -> EvaluationReply:
    """Read what a client answers when it is to be scored.

    Args:
        text: JSON of the reply.
        client: Who was asked.
        kind: For what, ``train.baseline`` or ``evaluate``.
        model: Layout of the shared model.
        config: The run.

    Raises:
        MessageError: It is malformed, of another client, of other stages, answers or probes than those that were asked
            for, or of experts that the model does not have.
    """
    try:
        reply = EvaluationReply.model_validate_json(text)
    except ValidationError as error:
        raise MessageError(f"malformed answer, {_first(error)}") from None
    if reply.client != client:
        raise MessageError(f"the answer is of client {reply.client!r}")
    if reply.stages.keys() != _STAGES[kind]:
        raise MessageError(f"its scores are of {sorted(reply.stages)}, not of {sorted(_STAGES[kind])}")
    most = config.evaluate.generate if kind == "evaluate" else 0
    if reply.answers.keys() - reply.stages.keys() or any(said.n > most for said in reply.answers.values()):
        raise MessageError(f"it has answers of {sorted(reply.answers)}, where those to {most} rows were asked for")
    for stage, scores in reply.stages.items():
        _require_measured(scores, stage, config)
    _require_gains(reply, kind, config)
    choosing = kind == "evaluate" and evidence.chosen(config)
    if reply.chosen and not (choosing and reply.chosen in [each.name for each in config.personal.candidates]):
        raise MessageError(f"it chose {reply.chosen!r:.80}, which it was not asked to")
    foreign = reply.tokens.keys() - {key.expert for key in model}
    if foreign:
        raise MessageError(f"it counts tokens for the foreign expert {min(foreign)!r:.80}")
    asked = config.evaluate.probes if kind == "evaluate" and evidence.probed(config) else ()
    require_fitting(reply.probes, asked, model)
    return reply


def _require_measured(scores: Scores, stage: str, config: Config) -> None:
    """Refuse figures that the task does not measure or that cannot be, and scores without what a run is judged by."""
    measures, told = {measure.name: measure for measure in kind_of(config.task).measures}, scores.model_dump()
    if unknown := scores.figures.keys() - measures.keys():
        raise MessageError(f"it measures {min(unknown)!r:.80}, which means nothing of a {config.task.kind}")
    for name, figure in scores.figures.items():
        if not all(map(measures[name].holds, (figure.value, *(figure.interval or ())))):
            raise MessageError(f"its {name} of stage {stage} is {figure.value:g}, which cannot be")
    first = next(iter(measures.values()))
    if first.of(told) is None:
        raise MessageError(f"it does not tell the {first.title} of stage {stage}")


def _require_gains(reply: EvaluationReply, kind: str, config: Config) -> None:
    """Refuse gains that nobody asked for, that the task does not measure or that cannot be."""
    if reply.gains and not (kind == "evaluate" and config.evaluate.baselines):
        raise MessageError("it tells gains over a baseline, where there is none")
    measures = {measure.name: measure for measure in kind_of(config.task).measures}
    if unknown := reply.gains.keys() - measures.keys():
        raise MessageError(f"it tells a gain of {min(unknown)!r:.80}, which means nothing of a {config.task.kind}")
    for name, gain in reply.gains.items():
        low, high = gain.interval or (gain.value, gain.value)
        if not low <= gain.value <= high or not measures[name].spans(low, high):
            raise MessageError(f"its gain in {name} is {gain.value:g} ({low:g} to {high:g}), which cannot be")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def check_reply(reply: ClientReply, plan: ClientPlan, rows: int) -> None:
    """Check that a reply answers ``plan``.

    Args:
        reply: The client's reply.
        plan: What the client was told to do.
        rows: Training rows the client named when it joined. It is weighed by them, and cannot take more weight once
            it knows the others.

    Raises:
        MessageError: It is not finite, of another client or round, or trained on other rows.
    """
    require_addressed(reply, plan)
    if plan.company is not None and (reply.loss is not None or reply.metrics):
        raise MessageError("it tells its losses, which under secure aggregation are part of the sum")
    if plan.company is None and (reply.loss is None or not abs(reply.loss) <= HUGE):
        raise MessageError(f"its training loss is {reply.loss}")
    if reply.examples != rows:
        raise MessageError(f"it trains on {reply.examples} rows, and joined with {rows}")


def require_embeddings(reply: ClientReply, plan: ClientPlan, model: Layout, *, asked: bool) -> None:
    """Refuse embeddings that nobody asked for, or that this model cannot have.

    Args:
        reply: The client's reply; its numbers are finite, or it could not have been read.
        plan: What the client was told to do.
        model: Layout of the shared model.
        asked: Whether the run has clients tell them.

    Raises:
        MessageError: There are some, or some are missing.
    """
    gates = {key.site for key in model if key.kind == "gate"}
    if reply.embeddings.keys() != (gates if asked else set()):
        raise MessageError(f"it tells embeddings of {len(reply.embeddings)} sites, not of {len(gates) if asked else 0}")
    trained = plan.trained(model)
    for site, rows in reply.embeddings.items():
        rank = next(shape[0] for key, shape in model.items() if key.site == site and key.routed and key.role == "A")
        if rows.keys() != {NO_EXPERT, *trained.get(site, ())} or {*map(len, rows.values())} != {rank}:
            raise MessageError(f"its embeddings of {site} are not of its tokens and experts, {rank} numbers each")


def require_places(reply: ClientReply, plan: ClientPlan, model: Layout, *, asked: bool) -> None:
    """Refuse places of rows that nobody asked for, or that this model cannot have.

    Args:
        reply: The client's reply; its numbers are finite, or it could not have been read.
        plan: What the client was told to do.
        model: Layout of the shared model.
        asked: Whether the client is to tell them.

    Raises:
        MessageError: There are some, or some are missing.
    """
    widths = {key.site: shape[1] for key, shape in model.items() if key.role == OWN_PLACES} if asked else {}
    if reply.places.keys() != widths.keys():
        raise MessageError(f"it tells where its rows lie at {len(reply.places)} routers, not at {len(widths)}")
    count = len({expert for experts in plan.trained(model).values() for expert in experts})
    for site, rows in reply.places.items():
        if len(rows) != count or {*map(len, rows)} != {widths[site]}:
            raise MessageError(f"it does not tell {count} places of {widths[site]} numbers at {site}")
    if reply.places and not all(any(rows[0]) for rows in reply.places.values()):
        raise MessageError("it tells no place of its rows")


def require_addressed(reply: ClientReply, plan: ClientPlan) -> None:
    """Refuse a reply to another plan.

    Raises:
        MessageError: It is of another client or round.
    """
    if (reply.client, reply.round) != (plan.client, plan.round):
        raise MessageError(f"the reply is of client {reply.client!r} in round {reply.round}")


def require_announced(blob: bytes, reply: ClientReply) -> None:
    """Refuse a blob that is not what the reply said.

    Raises:
        MessageError: It has another length or digest.
    """
    if len(blob) != reply.bytes_up:
        raise MessageError(f"its delta is {len(blob)} bytes, it reported {reply.bytes_up}")
    if digest(blob) != reply.delta:
        raise MessageError(f"its delta does not have the digest {reply.delta[:12]} it was announced with")


def open_delta(blob: bytes, reply: ClientReply, plan: ClientPlan, model: Layout, limits: Limits) -> Delta:
    """Decode and judge the delta a reply points at.

    Args:
        blob: The delta as it lay in the exchange.
        reply: The client's reply.
        plan: What the client was told to do.
        model: Layout of the shared model.
        limits: How large it may be.

    Returns:
        The delta, fit to be used.

    Raises:
        MessageError: The delta is damaged, too large, of another run, round, client or base, has other names or shapes
            than asked for, is not finite, too far from the broadcast, in another codec than asked for, or counts
            impossible tokens.
    """
    require_announced(blob, reply)
    experts = model.experts
    delta = decode_delta(blob, limits.max_bytes, expected(plan, model), plan.codec, len(experts))
    told = {"run": plan.run, "round": plan.round, "client": plan.client, "base": plan.base, "examples": reply.examples}
    for name, value in told.items():
        if getattr(delta, name) != value:
            raise MessageError(f"its delta says {name} = {getattr(delta, name)!r}, not {value!r}")
    size = norm(delta.tree.require_finite().flat)
    if limits.norm_bound is not None and size > limits.norm_bound:
        raise MessageError(f"its delta has norm {size:.3g}, above the bound of {limits.norm_bound:g}")
    for pair, tokens in delta.tokens.items():
        if not 0 <= tokens <= limits.tokens:  # NaN fails too
            raise MessageError(f"it counts {tokens} tokens for {'/'.join(pair)}")
        if pair not in experts:
            raise MessageError(f"it counts tokens for the foreign expert {'/'.join(pair)}")
    return delta

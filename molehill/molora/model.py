"""A base model with MoLoRA experts, routers and a head; every trainable number lies in one flat vector."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from molehill.errors import AdapterError, ModelError
from molehill.molora import reading
from molehill.molora.adapted import Adapted
from molehill.molora.banks import Bank, FittedMixer, PairBank
from molehill.molora.blocks import Block
from molehill.molora.forward import Forward
from molehill.molora.head import Head
from molehill.molora.interfaces import NOTHING, Adapts, OfK, Seen, Selector, Told
from molehill.molora.likelihoods import Likelihood, of_class
from molehill.molora.routes import ForwardState, RouteGroup
from molehill.molora.trial import keeps_logits
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Array, Layout, Tree


class Slot(NamedTuple):
    """Where one wire tensor lives in the flat vector.

    Attributes:
        start: First number.
        shape: Shape in memory.
        transposed: Whether the wire holds the transpose (B does).
        scale: Factor from memory to wire (alpha / rank for B).
    """

    start: int
    shape: tuple[int, ...]
    transposed: bool
    scale: float

    @property
    def stop(self) -> int:
        """One past the last number."""
        return self.start + int(np.prod(self.shape))

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """Shape on the wire."""
        return self.shape[::-1] if self.transposed else self.shape


class MoLoRAModel(nn.Module):
    """A frozen base with adapted linears, routers and, for classification, a head. Build one with `wrap`.

    Args:
        base: The base model with its adapted linears in place.
        sites: The adapted linears, and the banks beside blocks, by name.
        groups: The routers by the name of their first site.
        experts: Ids of all experts, shared ones first, in the order of the banks.
        head: The head of a task, or None where the base's own predicts the next token.
        state: State the sites share.
        remarks: Sentences about what the targets name and the adapter leaves out.
        blocks: The blocks that some of the sites are banks of.

    Several clients can be in the model at once, see `stack`; C is their number, 1 at first.

    Attributes:
        values: All trainable numbers, ``[C, P]`` float32; every parameter is a view of it.
        grads: Their gradients, ``[C, P]``; every parameter's ``.grad`` is a view of it.
        flat: The row of ``values`` that belongs to the selected client, ``[P]``.
        grad: The same of ``grads``.
        slots: Where each wire tensor lies.
        places: Every parameter with its start and stop in a row.
        layout: Wire names and shapes.
        fixed: Keys of what no training moves, see `molehill.molora.interfaces.Scorer.fixed`.
        likelihood: Of the labels, given the scores; a task says which.
    """

    def __init__(
        self,
        base: nn.Module,
        sites: Mapping[str, Adapted],
        groups: Mapping[str, RouteGroup],
        experts: tuple[str, ...],
        head: Head | None,
        state: ForwardState,
        remarks: tuple[str, ...] = (),
        blocks: Sequence[Block] = (),
    ) -> None:
        super().__init__()
        self.base = base
        self.remarks = remarks
        self.sites = dict(sites)
        self.blocks = tuple(blocks)
        self.groups = nn.ModuleDict({name.replace(".", "__"): group for name, group in groups.items()})
        self.routers = dict(groups)
        self.experts = experts
        self.head = head
        self.likelihood: Likelihood = of_class
        self.state = state
        self._selectors = {name: group.router.selector for name, group in groups.items()}
        reads = frozenset[str]().union(*(group.router.scorer.reads for group in groups.values()))
        state.reads_base, state.embeds = bool(reads & {"base", "prompt"}), "prompt" in reads
        self._keeps = keeps_logits(base)
        base.register_forward_pre_hook(state.begin, with_kwargs=True)
        self.slots: dict[Key, Slot] = {}
        self.places: list[tuple[nn.Parameter, int, int]] = []
        self._flatten()
        self.layout = Layout({key: slot.wire_shape for key, slot in self.slots.items()})
        self.fixed = frozenset(
            Key(name, NO_EXPERT, role)
            for name, group in self.routers.items()
            for part, role in group.router.roles().items()
            if part in group.router.scorer.fixed
        )

    # ---- parameters ------------------------------------------------------------------------------------------

    def expert_ids(self, site: Adapted) -> tuple[str, ...]:
        """Ids of the experts of one site (a site may have fewer than the model)."""
        shared = [e for e in self.experts if e.startswith("shared")][: site.shared]
        routed = [e for e in self.experts if not e.startswith("shared")]
        return (*shared, *routed[: site.bank.n_experts - site.shared])

    @property
    def marks(self) -> list[str]:
        """Paths in the base of the modules whose inputs or outputs sites are at."""
        return list(dict.fromkeys(name for site in self.sites.values() for name in site.span))

    def site_of(self, group: RouteGroup) -> Adapted:
        """The first site that a router weighs the experts of."""
        return next(site for site in self.sites.values() if group in site.groups)

    def banks_of(self, expert: str) -> dict[str, tuple[Bank, int]]:
        """Where an expert is: its bank and its index there, by site."""
        found = {name: (site.bank, self.expert_ids(site)) for name, site in self.sites.items()}
        return {name: (bank, ids.index(expert)) for name, (bank, ids) in found.items() if expert in ids}

    def _tensors(self) -> Iterator[tuple[nn.Parameter, list[tuple[Key, slice | None, bool, float]]]]:
        """Every parameter with the wire tensors it holds: key, its rows (None for all), transposed, scale."""
        for name, site in self.sites.items():
            ids = self.expert_ids(site)
            for parameter, parts in groupby(site.bank.parts(), lambda part: part.parameter):
                yield (
                    site.bank.get_parameter(parameter),
                    [
                        (
                            Key(name, NO_EXPERT if each.expert is None else ids[each.expert], each.role),
                            each.rows,
                            each.transposed,
                            each.scale,
                        )
                        for each in parts
                    ],
                )
        # residuals apart, so that what is trained alike lies together
        for name, group in self.routers.items():
            for part, role in group.router.roles().items():
                yield group.router.parameter(part), [(Key(name, NO_EXPERT, role), None, False, 1.0)]
        for name, site in self.sites.items():
            if site.gain is not None:
                yield site.gain.change, [(Key(name, NO_EXPERT, "gate.own.gain"), None, False, 1.0)]
        for key, parameter in self._residuals():
            yield parameter, [(key, None, False, 1.0)]
        if self.head is not None:
            for part, parameter in self.head.named_parameters():
                yield parameter, [(Key("head", NO_EXPERT, f"head.{part}"), None, False, 1.0)]

    def _residuals(self) -> Iterator[tuple[Key, nn.Parameter]]:
        """What owners fit of routers and mixers."""
        for name, group in self.routers.items():
            for part, parameter in group.router.residual.items():
                yield Key(name, NO_EXPERT, f"gate.residual.{part.replace('__', '.')}"), parameter
        for name, mixer in self._fitted():
            for part, parameter in mixer.named_parameters():
                yield Key(name, NO_EXPERT, f"gate.residual.mix.{part}"), parameter

    def _fitted(self) -> Iterator[tuple[str, FittedMixer]]:
        """Mixers that owners fit, by site."""
        return ((name, site.mixer) for name, site in self.sites.items() if isinstance(site.mixer, FittedMixer))

    def _flatten(self) -> None:
        """Move all trainable parameters into one vector, with one vector of gradients."""
        at = 0
        for parameter, parts in self._tensors():
            for key, rows, transposed, scale in parts:
                start, shape = at, tuple(parameter.shape)
                if rows is not None:
                    width = parameter[0].numel()
                    start, shape = at + rows.start * width, (rows.stop - rows.start, *parameter.shape[1:])
                self.slots[key] = Slot(start, shape, transposed, scale)
            self.places.append((parameter, at, at + parameter.numel()))
            at += parameter.numel()
        nothing = torch.empty(0, device=next(self.base.parameters()).device)
        self._bind(torch.cat([nothing, *(parameter.data.flatten() for parameter, _, _ in self.places)]).unsqueeze(0))

    def _bind(self, values: Tensor) -> None:
        """Make the parameters views of ``values [C, P]``, with a leading client axis when C is not 1."""
        self.values, self.grads = values, torch.zeros_like(values)
        self._point(values, self.grads)
        self.count_tokens(on=False)
        self.select(0)

    def _point(self, values: Tensor, grads: Tensor) -> None:
        """Make the parameters views of ``values [C, P]``, and their gradients of ``grads``."""
        stacked, clients = self.state.clients > 1, len(values)
        self.state.clients = clients
        self.state.records = Seen()
        for group in self.routers.values():
            group.forget()
        for site in self.sites.values():
            site.forget()
        for parameter, start, stop in self.places:
            shape = parameter.shape[1:] if stacked else parameter.shape
            part = (slice(None) if clients > 1 else 0, slice(start, stop))
            full = (clients, *shape) if clients > 1 else shape
            parameter.grad = None
            parameter.data = values[part].view(full)
            parameter.grad = grads[part].view(full)

    @property
    def stackable(self) -> bool:
        """Whether several clients fit in at once: all experts are fused LoRAs, all scores one product with x."""
        return all(site.stackable for site in self.sites.values())

    def stack(self, clients: int) -> None:
        """Make room for several clients, who all start with the values of the selected one.

        Until ``stack(1)``, which keeps the selected client's values, a batch holds equal runs of rows, one per client,
        and every client's rows see its own parameters only. Patches are not possible meanwhile.

        Args:
            clients: Number of clients.

        Raises:
            ModelError: The model is not `stackable`.
        """
        if clients > 1 and not self.stackable:
            raise ModelError("this model holds one client at a time", mend="Set engine.together to 1.")
        if clients != len(self.values):
            self._bind(self.flat.detach().repeat(clients, 1))

    @contextmanager
    def only(self, clients: Sequence[int]) -> Iterator[None]:
        """Let passes be of some of the stacked clients: a batch then holds the rows of these, in this order."""
        if list(clients) == list(range(len(self.values))):
            yield
            return
        alone = len(clients) == 1
        values = self.values[clients[0] :][:1] if alone else self.values[list(clients)]
        grads = self.grads[clients[0] :][:1] if alone else torch.zeros_like(values)
        self._point(values, grads)
        self.state.members = list(clients)
        try:
            yield
            if not alone:
                self.grads[list(clients)] += grads
        finally:
            self._point(self.values, self.grads)
            self.state.members = slice(None)

    def select(self, client: int) -> None:
        """Choose the client that `load`, `tree`, `tokens`, `flat` and `grad` are about."""
        self.flat, self.grad, self._selected = self.values[client], self.grads[client], client

    def tree(self, keep: Layout | Callable[[Key], bool] | None = None) -> Tree:
        """Copy tensors out in wire form (float32; B transposed back, scale absorbed).

        Args:
            keep: Which keys; all when None.
        """
        layout = self.layout if keep is None else keep if isinstance(keep, Layout) else self.layout.where(keep)
        tree = Tree(layout)
        values = self.flat.detach().cpu().numpy()
        for key, view in tree.items():
            slot = self.slots[key]
            memory = values[slot.start : slot.stop].reshape(slot.shape)
            np.multiply(memory.T if slot.transposed else memory, np.float32(slot.scale), out=view)
        return tree

    def load(self, tree: Mapping[Key, Array]) -> None:
        """Copy tensors in from wire form; keys that ``tree`` lacks keep their value.

        An expert tensor of a lower rank fills its first ranks and zeroes the rest (which then get no gradient).

        Raises:
            AdapterError: A key is unknown here or has another shape.
        """
        for key, value in tree.items():
            slot = self.slots.get(key)
            if slot is None:
                raise AdapterError(f"tensor {key.name} does not exist in this model", mend="Use the run's own layout.")
            rows = value.T if slot.transposed else value
            low = key.kind in {"A", "B"} and rows.shape[0] < slot.shape[0]
            if rows.shape[1:] != slot.shape[1:] or (rows.shape[0] != slot.shape[0] and not low):
                raise AdapterError(
                    f"tensor {key.name} has shape {list(value.shape)}, this model needs {list(slot.wire_shape)}"
                )
            memory = self.flat.data[slot.start : slot.stop].view(slot.shape)
            memory[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(memory.device)
            if slot.scale != 1.0:
                memory[: len(rows)] /= slot.scale
            if low:
                memory[len(rows) :].zero_()

    def set_patches(self, patches: Mapping[tuple[str, str], tuple[Array, Array]]) -> None:
        """Replace the frozen additions to experts.

        Args:
            patches: ``(A [p, d_in], B [d_out, p])`` by (site, expert id), scale absorbed.

        Raises:
            AdapterError: A site or expert is unknown or has no low-rank experts.
        """
        by_site: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in self.sites}
        for (name, expert), (A, B) in patches.items():
            site = self.sites.get(name)
            if site is None or expert not in self.expert_ids(site) or not isinstance(site.bank, PairBank):
                raise AdapterError(f"patch for {name}/{expert}, which this model does not have")
            index = self.expert_ids(site).index(expert)
            by_site[name][index] = (torch.from_numpy(np.array(A)), torch.from_numpy(np.array(B)))
        for name, by_expert in by_site.items():
            bank = self.sites[name].bank
            if isinstance(bank, PairBank):
                bank.set_patches(by_expert)

    @property
    def n_parameters(self) -> int:
        """Trainable numbers."""
        return self.flat.numel()

    @property
    def highest_rank(self) -> int:
        """Size of the largest expert, of whatever kind."""
        return max(max(site.bank.ranks) for site in self.sites.values())

    @property
    def base_parameters(self) -> int:
        """Frozen numbers."""
        return sum(p.numel() for p in self.base.parameters()) - self.n_parameters

    # ---- switches --------------------------------------------------------------------------------------------

    def use_personal(self, gate: bool, head: bool) -> None:
        """Turn the personal residuals of routers and head, and what owners fit of mixers, on or off."""
        for group in self.routers.values():
            group.router.personal = gate
        for _, mixer in self._fitted():
            mixer.personal = gate
        if self.head is not None:
            self.head.personal = head

    def use_k(self, k: int | None) -> None:
        """Have routers choose k experts per token, or as many as they were built for.

        Args:
            k: So many; None for what each was built for. With several clients in the model it is that of all.

        Raises:
            ModelError: A selector takes no k.
        """
        made: dict[int, Selector] = {}  # routers that share one go on to share one
        for name, built in self._selectors.items():
            if k is None:
                made[id(built)] = built
            elif not isinstance(built, OfK):
                raise ModelError(
                    f"a client has {k} experts per token, and the selector of {name} takes no such number",
                    mend="Use a selector with k.",
                )
            elif id(built) not in made:
                made[id(built)] = built.with_k(k)
            self.routers[name].router.selector = made[id(built)]

    def adapt(self) -> None:
        """Let routers follow what their experts had to do since tokens are counted; see `Adapts`."""
        for group in self.routers.values():
            if isinstance(group.router.scorer, Adapts):
                group.router.scorer.adapt(group.mass[self._selected])

    def use_uniform_gate(self, uniform: bool) -> None:
        """Weigh all experts alike instead of asking the routers."""
        for group in self.routers.values():
            group.router.uniform = uniform

    def count_tokens(self, on: bool) -> None:
        """Start (from zero) or stop counting the gate mass of experts."""
        self.state.count = on
        if on:
            for group in self.routers.values():
                group.reset_counts()

    def tokens(self) -> dict[tuple[str, str], float]:
        """Counted gate mass over real tokens of the selected client by (site, expert id)."""
        counts: dict[tuple[str, str], float] = {}
        for name, site in self.sites.items():
            if masses := site.tokens(self._selected):
                counts |= {(name, e): mass for e, mass in zip(self.expert_ids(site), masses, strict=True)}
        return counts

    def embeddings(self) -> dict[str, Array]:
        """Mean embeddings over the tokens that were counted, ``[1 + E, r]`` by router; see `Embeds`."""
        return {
            name: (group.embedded / group.tokens.sum().clamp_min(1)).float().cpu().numpy()
            for name, group in self.routers.items()
            if group.embedded is not None
        }

    # ---- forward ---------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, told: Told = NOTHING) -> Forward:
        """Predict.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: True for real tokens, ``[B, T]``.
            labels: One of every row, ``[B, ...]``, or one of every token, ``[B, T]``, with -100 where no loss counts:
                of the token itself, or without a head of the next one.
            told: What else is told of the rows.

        Returns:
            Logits and labels of the predictions.
        """
        run = self._predict_tokens if self.head is None else self._of_rows if self.head.pools else self._of_tokens
        mask = attention_mask.bool()
        scores, targets, rows = run(input_ids, mask, labels, told)
        records = self.state.records

        def reference() -> Tensor:
            enabled, self.state.enabled = self.state.enabled, False
            count, self.state.count = self.state.count, False
            try:
                with torch.no_grad():
                    return run(input_ids, mask, labels, told)[0].float()
            finally:
                self.state.enabled, self.state.count = enabled, count

        return Forward(scores, targets, rows, records, reference, self.likelihood)

    def states_of(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """What routers that read the base see of rows, ``[B, w]`` float32; see `RouteContext.base`.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: True for real tokens, ``[B, T]``.
            labels: As for a pass.
        """
        mask = attention_mask.bool()
        some = mask if self.head is not None else reading.prompts(mask, labels)
        return self.state.read(self.base, (), {"input_ids": input_ids, "attention_mask": mask.long()}, some)

    def hidden(self, input_ids: Tensor, mask: Tensor, told: Told = NOTHING) -> Tensor:
        """Last token states of the base, ``[B, T, d]`` (classification backbones)."""
        self.state.announce(mask, told)
        kwargs = {"attention_mask": mask.long()} if not bool(mask.all()) else {}
        return self.base(input_ids=input_ids, **kwargs).last_hidden_state  # type: ignore[no-any-return]  # its callee is untyped

    def _of_rows(self, input_ids: Tensor, mask: Tensor, labels: Tensor, told: Told) -> tuple[Tensor, Tensor, Tensor]:
        assert self.head is not None
        logits = self.head(self.head.pool(self.hidden(input_ids, mask, told), mask))
        return logits, labels, torch.arange(len(labels), device=labels.device)

    def _of_tokens(self, input_ids: Tensor, mask: Tensor, labels: Tensor, told: Told) -> tuple[Tensor, Tensor, Tensor]:
        assert self.head is not None
        scores = self.head(self.head.pool(self.hidden(input_ids, mask, told), mask).flatten(0, 1))
        keep = (labels != -100).flatten()
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
        return scores[keep], labels.flatten()[keep], rows[keep]

    def _predict_tokens(
        self, input_ids: Tensor, mask: Tensor, labels: Tensor, told: Told
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.state.announce(mask, told, reading.prompts(mask, labels) if self.state.reads_base else None)
        wanted = labels[:, 1:] != -100
        positions = wanted.any(0).nonzero().squeeze(1)  # the head runs only where some row has an answer token
        kept = {"logits_to_keep": positions} if self._keeps else {}
        out = self.base(input_ids=input_ids, attention_mask=mask.long(), use_cache=False, **kept).logits
        out = out if self._keeps else out[:, positions]
        keep = wanted[:, positions]
        if bool(keep.all()):  # a selection would copy the logits, the largest tensor of the pass, and their gradient
            rows = torch.arange(len(labels), device=labels.device).repeat_interleave(len(positions))
            return out.flatten(0, 1), labels[:, 1:][:, positions].flatten(), rows
        rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(keep)[keep]
        return out[keep], labels[:, 1:][:, positions][keep], rows


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

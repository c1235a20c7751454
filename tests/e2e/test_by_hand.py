"""Two rounds of the real server and clients against a federated loop written out plainly."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import tiny_world
import torch
from torch.nn import functional

from molehill.molora.model import seed_for
from molehill.tasks.batches import Batches
from molehill.wire.store import load_tree
from molehill_server.planning.planner import seed
from molehill_simulation.world import open_world

ROUNDS, STEPS, OWN_STEPS, LR, DECAY, CLIP, EXPERTS = 2, 3, 2, 5e-3, 0.3, 0.05, 3
EXACT = {
    "run": {"rounds": ROUNDS},
    "train": {"steps": STEPS, "lr": LR, "clip": CLIP, "batch_size": 6},
    "personal": {"decay": DECAY, "steps": OWN_STEPS, "gate_lr": LR, "head_lr": LR},
    "molora": {"selector": {"name": "top_k", "k": 1}, "experts": EXPERTS},
    "wire": {"up": "fp32", "down": "fp32"},
}


class ByHand:
    """Plain AdamW on the model's own parameters, and weighted means of them."""

    def __init__(self, config):
        self.config, self.world = config, open_world(config)
        self.model = self.world.model
        self.model.state.collect = True
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.personal = {name for name in self.parameters if "residual" in name}
        assert 0 < len(self.personal) < len(self.parameters)
        start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.shared = {name: value for name, value in start.items() if name not in self.personal}
        self.own = {owner.name: {name: start[name] for name in self.personal} for owner in self.world.owners}
        # Rows of A, and of B transposed, belong to the experts one after the other.
        self.site_of = {f"base.{site}.bank.{part}": site for site in self.model.sites for part in ("A", "Bt")}
        assert set(self.site_of) <= set(self.shared)

    def set(self, values):
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def train(self, number, owner):
        """One client's round: number of rows, tokens by site and expert, values."""
        self.set({**self.shared, **self.own[owner.name]})
        rows = self.world.task.encode(owner.train)
        tokens = self.steps(rows, seed(self.config, number, owner.name), STEPS, set(self.shared))
        return len(rows), tokens, {name: p.detach().clone() for name, p in self.parameters.items()}

    def fit(self, owner):
        """One client's residuals, fitted to the final model."""
        self.set({**self.shared, **self.own[owner.name]})
        number = seed_for(seed(self.config, ROUNDS, owner.name), "personal")
        self.steps(self.world.task.encode(owner.train), number, OWN_STEPS, self.personal)
        self.own[owner.name] = {name: self.parameters[name].detach().clone() for name in self.personal}

    def steps(self, rows, number, count, names):
        """AdamW on some of the parameters; returns the tokens that went to every expert."""
        learning = [self.parameters[name] for name in names]
        own = names == self.personal
        optimiser = torch.optim.AdamW(learning, lr=LR, weight_decay=DECAY if own else 0.0, fused=False, foreach=False)
        part = self.config.train
        batches = iter(Batches(rows, part.batch_size, number, self.world.task))
        tokens = {site: torch.zeros(EXPERTS) for site in self.model.sites}
        for step in range(count):
            if own:
                optimiser.param_groups[0]["lr"] = LR * (1 - 0.9 * step / count)
            for p in self.parameters.values():
                p.grad.zero_()
            for batch in islice(batches, part.accumulation):
                out = self.model(batch.input_ids, batch.attention_mask, batch.labels)
                for record in out.records:
                    tokens[record.site.name] += record.route.weights.detach()[batch.attention_mask].sum(0)
                (functional.cross_entropy(out.logits, batch.labels) / part.accumulation).backward()
            torch.nn.utils.clip_grad_norm_(learning, CLIP)
            optimiser.step()
        return tokens

    def mean(self, name, results):
        total = value = torch.zeros(())
        for rows, tokens, values in results:
            weight = torch.tensor(float(rows))
            if name in self.site_of:
                routed = tokens[self.site_of[name]]
                weight = (rows * routed / routed.sum()).repeat_interleave(self.config.molora.rank).unsqueeze(1)
            total, value = total + weight, value + weight * values[name]
        return torch.where(total > 0, value / total, self.shared[name])

    def run(self):
        for number in range(1, ROUNDS + 1):
            results = [self.train(number, owner) for owner in self.world.owners]
            self.shared = {name: self.mean(name, results) for name in self.shared}
        for owner in self.world.owners:
            self.fit(owner)
        return self


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_rounds_equal_a_loop_written_by_hand(config, finished, accumulation):
    settings = {**EXACT, "train": {**EXACT["train"], "accumulation": accumulation}}
    _, out = finished(**settings)
    hand = ByHand(config(**settings)).run()
    final, _ = load_tree(out / "final.safetensors")
    initial, _ = load_tree(out / "initial.safetensors")
    hand.set(hand.shared)
    want = hand.model.tree(final.layout)
    assert np.abs(want.flat - initial.flat).max() > LR
    for key in final:
        np.testing.assert_allclose(final[key], want[key], atol=LR / 250, rtol=0, err_msg=key.name)
    for client, residuals in hand.own.items():
        saved = tiny_world.states(out)[f"{client}/{ROUNDS}"].tree
        hand.set(residuals)
        want = hand.model.tree(saved.layout)
        assert np.abs(want.flat).max() > LR
        np.testing.assert_allclose(saved.flat, want.flat, atol=LR / 250, rtol=0)

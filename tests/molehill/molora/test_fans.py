"""Linears that read one tensor, computed at once, against the same linears one by one."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from molehill.molora.fused import Output, down, up
from molehill.molora.layer import Fan
from molehill.molora.trial import trial_of
from molehill_client.objectives.sft import SFT


def together(model):
    """Last names of the sites of every fan."""
    return {tuple(site.site.name.rpartition(".")[2] for site in each.fan.sites) for each in model.sites.values()}


def alone(model):
    for site in model.sites.values():
        site.fan = Fan([site])
    return model


def step(model, batch):
    """Loss, records and gradients of a training step."""
    model = tiny_models.training(model)
    model.state.collect = True
    model.count_tokens(on=True)
    model.grad.zero_()
    torch.manual_seed(5)
    loss = SFT()(model(**batch))
    loss.backward()
    weights = [record.route.weights for record in model.state.records]
    return loss.detach(), model.grad.clone(), weights, model.tokens()


@pytest.mark.parametrize(
    ("architecture", "fans"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}),
        ("bert", {("query", "key", "value"), ("dense",)}),
        ("gpt2", {("c_attn",), ("c_proj",), ("c_fc",)}),
    ],
)
def test_the_trial_shows_who_reads_one_tensor(architecture, fans):
    assert together(tiny_models.adapted(architecture)) == fans


def test_targets_and_dropout_part_them():
    assert together(tiny_models.adapted(targets=["q_proj", "v_proj", "up_proj"])) == {
        ("q_proj", "v_proj"),
        ("up_proj",),
    }
    assert {len(names) for names in together(tiny_models.adapted(dropout=0.1))} == {1}


@pytest.mark.parametrize("gate", ["global", "anchored"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scope": "block"},
        {"shared": 1, "selector": {"name": "top_p", "p": 0.6}},
        {"scorer": {"name": "mixture", "m": 2}},
        {"transforms": [{"name": "temperature", "start": 2.0}]},
        {"selector": "switch"},
        {"targets": ["q_proj", "v_proj"]},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_together_is_one_by_one(architecture, keys, gate):
    if architecture == "bert" and "targets" in keys:
        keys = {"targets": ["query", "value"]}
    batch = tiny_models.batch(architecture)
    made = [
        tiny_models.separate(tiny_models.shake(tiny_models.adapted(architecture, gate=gate, **keys))) for _ in range(2)
    ]
    ours, theirs = step(made[0], batch), step(alone(made[1]), batch)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5 * float(theirs[1].abs().max()))
    assert len(ours[2]) == len(theirs[2])
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert ours[3] == pytest.approx(theirs[3], rel=1e-4)


def test_routers_that_do_the_same_take_one_call(monkeypatch):
    model = tiny_models.shake(tiny_models.adapted(layers=[0]))
    calls = []
    kind = type(next(iter(model.routers.values())).router.selector)
    own = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, z, ctx: calls.append(len(z)) or own(self, z, ctx))
    model(**tiny_models.batch())
    assert sorted(calls) == [3, 3, 6, 9]  # o and down; gate and up; q, k and v: three rows each
    calls.clear()
    name = next(name for name in model.routers if name.endswith("k_proj"))
    model.routers[name].overrides.bias = torch.ones(model.routers[name].router.n_experts)
    model(**tiny_models.batch())
    assert sorted(calls) == [3, 3, 3, 6, 6]  # what one caller changes is no other's


def test_a_site_called_with_another_tensor_computes_its_own():
    model = tiny_models.shake(tiny_models.adapted())
    q, k = (next(s for n, s in model.sites.items() if n.endswith(f"0.self_attn.{name}_proj")) for name in "qk")
    x, z = torch.randn(2, 1, 4, tiny_models.WIDTH)
    model.state.version += 1
    wanted = k(x)
    model.state.version += 1
    q(z)
    torch.testing.assert_close(k(x), wanted)  # its route as well
    assert not torch.equal(k(z), wanted)
    model.state.version += 1
    q(z)
    model.state.version += 1  # another pass: what waits is of no use
    torch.testing.assert_close(k(x), wanted)
    model.state.version += 1
    q(x)
    x.add_(1.0)
    assert not torch.equal(k(x), wanted)


def test_the_trial_leaves_apart_what_is_written_to_or_called_twice():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny_models.base("bert").config
            self.embeddings = torch.nn.Embedding(tiny_models.VOCAB, 8)
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in "abcd"})])

        def get_input_embeddings(self):
            return self.embeddings

        def forward(self, input_ids, attention_mask):
            x = self.embeddings(input_ids)
            part = self.layers[0]
            first = part["a"](x) + part["b"](x) + part["d"](x)
            x = x + 0
            y = part["d"](x) + part["c"](x.mul_(2))
            return type("Out", (), {"last_hidden_state": first + y})

    odd = Odd().requires_grad_(requires_grad=False)
    assert trial_of(odd).together == (("layers.0.a", "layers.0.b"),)


# ---- the pair of functions in float64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [None, 2])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_gradients_of_two_outputs_are_those_of_finite_differences(clients, used):
    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    lead = () if clients is None else (clients,)
    x, A, A2, gate, gate2 = make(6, 5), make(*lead, 4, 5), make(*lead, 3, 5), make(*lead, 2, 5), make(*lead, 3, 5)
    Bt, Bt2, W, W2 = make(*lead, 4, 4), make(*lead, 3, 7), torch.randn(4, 5).double(), torch.randn(7, 5).double()
    spread = torch.tensor([[2.0, 2, 0, 0], [0, 0, 1, 1]]).double()
    spread2 = torch.eye(3).double()

    def fused(x, A, A2, gate, gate2, Bt, Bt2):
        projection = down(x, [A, A2], [gate, gate2])
        first, second = projection.logits.split([2, 3], -1)
        ys = up(
            x,
            projection,
            [Output(W, None, first.softmax(-1), Bt, spread), Output(W2, None, second.sigmoid(), Bt2, spread2)],
        )
        return tuple(ys[index] for index in used)

    def plain(x, A, A2, gate, gate2, Bt, Bt2):
        def by(t, weight):
            return t @ weight.mT if clients is None else (t.view(clients, -1, t.shape[-1]) @ weight.mT).flatten(0, 1)

        y = F.linear(x, W) + by(by(x, A) * (by(x, gate).softmax(-1) @ spread), Bt.mT)
        y2 = F.linear(x, W2) + by(by(x, A2) * (by(x, gate2).sigmoid() @ spread2), Bt2.mT)
        return tuple((y, y2)[index] for index in used)

    operands = (x, A, A2, gate, gate2, Bt, Bt2)
    assert torch.autograd.gradcheck(fused, operands)
    for mine, other in zip(fused(*operands), plain(*operands), strict=True):
        torch.testing.assert_close(mine, other)


def test_every_preset_has_its_fans():
    """No preset loses the fast path where its experts take it."""
    together = set()
    for preset in tiny_models.presets():
        model = tiny_models.adapted(preset=preset)
        plain = [site for site in model.sites.values() if site.fused]
        if plain and all(site.dropout.p == 0 for site in plain):
            assert any(len(site.fan.sites) > 1 for site in plain), preset
            together.add(preset)
    assert {"molora", "mola", "lora"} <= together


def test_in_inference_mode_nobody_counts_what_was_written():
    model = tiny_models.shake(tiny_models.adapted())
    with torch.no_grad():
        wanted = model(**tiny_models.batch()).scores
    with torch.inference_mode():
        torch.testing.assert_close(model(**tiny_models.batch()).scores, wanted)


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    model = tiny_models.shake(tiny_models.adapted())
    q = next(site for name, site in model.sites.items() if name.endswith("q_proj"))
    q(torch.randn(1, 3, tiny_models.WIDTH))
    assert q.fan._made is not None
    model.stack(2)
    assert q.fan._made is None

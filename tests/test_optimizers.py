"""Optimizer rules, Newton-Schulz, Muon against PyTorch's own and over ranks, the average, clipping, accumulation."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import train_gpt
from train_gpt import GPT, HEADS, Muon, Trainer, World, newton_schulz, parameter_roles

SMALL = dict(
    vocab_size=40,
    num_layers=3,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    bigram_vocab_size=20,
    bigram_dim=8,
    ve_dim=8,
    ve_layers="1",
    xsa_last_n=1,
    train_seq_len=12,
    train_batch_tokens=96,
    head_rank=4,
    head_dim=8,
    compile="0",
    compute_dtype="fp32",
)


def small(preset="study", **changes):
    return dataclasses.replace(
        train_gpt.from_env({"PRESET": preset, "DATA_PATH": "x"}), **{**SMALL, **changes}
    )


class Ranks:
    """Several ranks as threads of this process: collectives meet at a barrier."""

    def __init__(self, size):
        self.size, self.barrier, self.parts = size, threading.Barrier(size), [None] * size

    def exchange(self, rank, part):
        self.parts[rank] = part.clone()
        self.barrier.wait(60)
        parts = list(self.parts)
        self.barrier.wait(60)
        return parts

    def run(self, job):
        """The results of job(world) on every rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: job(ThreadWorld(rank, self)), range(self.size)))


class ThreadWorld(World):
    def __init__(self, rank=0, ranks=None):
        super().__init__()
        self.device, self.rank, self.ranks = torch.device("cpu"), rank, ranks
        self.size = ranks.size if ranks else 1

    def heed_together(self):
        self.heed()

    def sum(self, tensor):
        return tensor.copy_(sum(self.ranks.exchange(self.rank, tensor))) if self.ranks else tensor

    def gather(self, part):
        return torch.cat(self.ranks.exchange(self.rank, part)) if self.ranks else part


def trainer(seed=0, world=None, double=False, **changes):
    torch.manual_seed(seed)
    s = small(**changes)
    model = GPT(s)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Trainer(model.double() if double else model, s, world or ThreadWorld())


def batch(B=8, seed=0):
    tokens = torch.randint(40, (B, 13), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


# ---- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_parameter_is_in_exactly_one_group_with_the_rate_of_its_role(preset, head):
    s = small(preset, head_type=head)
    model = GPT(s)
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    optimizers = train_gpt.build_optimizers(model, s, ThreadWorld())
    grouped = [
        (p, optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(id(p) for p, _, _ in grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    rates = dict(
        tied=s.tied_embed_lr,
        table=s.tied_embed_lr,
        matrix=s.matrix_lr,
        scalar=s.scalar_lr,
        vocab=HEADS[head].head_lr,
    )
    for p, optimizer, group in grouped:
        role = roles[names[id(p)]]
        assert isinstance(optimizer, Muon) == (role == "matrix"), names[id(p)]
        own = role == "matrix" and names[id(p)].startswith("head.")
        assert (
            group["lr"] == group["base_lr"] == (HEADS[head].head_matrix_lr if own else rates[role])
        ), names[id(p)]
        assert group["weight_decay"] == (s.muon_weight_decay if role == "matrix" else s.adam_wd), (
            names[id(p)]
        )


def test_roles_are_those_of_the_design():
    roles = parameter_roles(GPT(small(head_type="mos")))
    expected = {
        "tok_emb.weight": "tied",
        "bigram.table.weight": "table",
        "value_embed.table.weight": "table",
        "bigram.proj.weight": "matrix",
        "blocks.0.attn.q.weight": "matrix",
        "blocks.2.mlp.down.weight": "matrix",
        "smear.gate": "scalar",
        "skip_weights": "scalar",
        "blocks.1.resid_mix": "scalar",
        "head.U_KDR": "matrix",
        "head.V_KRD": "matrix",
        "head.gate_KD": "scalar",
        "head.gate_bias_K": "scalar",
    }
    assert {name: roles[name] for name in expected} == expected
    for head in HEADS:  # an embedding that makes no logits is a table
        role = "table" if head in ("untied", "factorized", "simplex") else "tied"
        assert parameter_roles(GPT(small(head_type=head)))["tok_emb.weight"] == role


class WithExtra(HEADS["tied"]):
    """A new head: one class and one line in HEADS. `extra` takes part in no loss."""

    def build(self, settings, D, V, R):
        self.add(vocab=dict(extra=torch.zeros(V, 4)))


class WithoutRule(HEADS["tied"]):
    def build(self, settings, D, V, R):
        self.extra = nn.Parameter(torch.zeros(V, 4))


def test_a_parameter_without_a_rule_is_named(monkeypatch):
    monkeypatch.setitem(HEADS, "extra", WithoutRule)
    with pytest.raises(RuntimeError, match=r"head\.extra"):
        trainer(head_type="extra")
    model = GPT(small())
    model.blocks[1].surprise = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.surprise"):
        parameter_roles(model)


def test_a_parameter_that_no_gradient_reaches_is_named_at_the_first_step(monkeypatch):
    monkeypatch.setitem(HEADS, "extra", WithExtra)
    with pytest.raises(RuntimeError, match=r"head\.extra"):
        trainer(head_type="extra").step([batch()], 1.0)
    lost = trainer()
    lost.model.skip_weights.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match="skip_weights"):
        lost.step([batch()], 1.0)
    frozen = trainer()
    frozen.model.skip_weights.requires_grad_(False)
    frozen.step([batch()], 1.0)


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(64, 16), (16, 64), (96, 48), (5, 40, 20), (3, 12, 48), (2, 3, 8, 32)], ids=str
)
def test_newton_schulz_brings_singular_values_near_one_and_treats_matrices_alone(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X = newton_schulz(G * 7, torch.float32)
    singular = torch.linalg.svdvals(X)
    assert X.shape == G.shape and singular.min() > 0.6 and singular.max() < 1.3
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert (
        (U @ Vh - X).square().sum() / X.square().sum()
    ).sqrt() < 0.35  # the orthogonal factor of G itself
    if len(shape) > 2:
        alone = torch.stack([newton_schulz(g, torch.float32) for g in (G * 7).flatten(0, -3)]).view(
            shape
        )
        torch.testing.assert_close(X, alone, rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_zero_is_zero():
    G = torch.zeros(2, 6, 4)
    G[1] = torch.randn(6, 4)
    X = newton_schulz(G, torch.float32)
    assert not X[0].any() and X[1].any()


def steps(make, shapes, count=5):
    """Parameters after `count` steps on fixed gradients that are not scaled alike."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    optimizer = make(params)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g) * 10 ** torch.empty(1).uniform_(
                -2, 2, generator=g
            )
        optimizer.step()
    return [p.detach() for p in params]


def ours(world=None, **options):
    options = dict(lr=0.05, momentum=0.9, weight_decay=0.3) | options
    return lambda params: Muon(
        [dict(params=params)], world or ThreadWorld(), torch.float32, **options
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_pytorchs_at_constant_momentum(monkeypatch, weight_decay):
    import torch.optim._muon as reference

    monkeypatch.setattr(
        reference, "_zeropower_via_newtonschulz", lambda G, *_: newton_schulz(G, torch.float32)
    )
    shapes = [(8, 8), (24, 6), (6, 24), (24, 6), (40, 4)]
    found = steps(ours(weight_decay=weight_decay), shapes)
    expected = steps(
        lambda params: torch.optim.Muon(params, lr=0.05, momentum=0.9, weight_decay=weight_decay),
        shapes,
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_muon_over_several_ranks_equals_one_rank(size):
    shapes = [
        (8, 8),
        (24, 6),
        (8, 8),
        (8, 8),
        (3, 6, 4),
        (8, 8),
        (8, 8),
    ]  # 5 + 1 + 3 matrices: not divisible
    expected = steps(ours(), shapes)
    for found in Ranks(size).run(lambda world: steps(ours(world), shapes)):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_takes_a_stack_as_separate_matrices():
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 12, 4, generator=g), torch.randn(5, 3, 12, 4, generator=g)
    stack, parts = nn.Parameter(start.clone()), [nn.Parameter(m.clone()) for m in start]
    optimizers = ours()([stack]), ours()(parts)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for p, own in zip(parts, gradient):
            p.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack(parts).detach(), rtol=1e-5, atol=1e-6)
    assert (stack - start).abs().amax(dim=(1, 2)).min() > 0.01


# ---- The training step -----------------------------------------------------------------------------------------------


class Spy(torch.optim.Optimizer):
    """Records the gradients that reach the optimizers."""

    def __init__(self, parameters):
        super().__init__([dict(params=list(parameters), base_lr=0.0)], dict(lr=0.0))

    def step(self):
        self.seen = torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]])


def gradient(trainer, batches):
    """The mean loss and the whole gradient as the optimizers get it."""
    trainer.optimizers = [Spy(trainer.parameters)]
    loss = trainer.step(batches, 1.0)
    return loss.item(), trainer.optimizers[0].seen


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    x, y = batch()
    whole = gradient(trainer(double=True, grad_clip_norm=0.0), [(x, y)])
    for size in (1, 2, 4):
        parts = gradient(
            trainer(double=True, grad_clip_norm=0.0), list(zip(x.split(size), y.split(size)))
        )
        assert parts[0] == pytest.approx(whole[0], rel=1e-6)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_give_the_gradient_and_loss_of_the_whole_batch(size):
    x, y = batch()
    whole = gradient(trainer(), [(x, y)])
    shares = list(zip(x.split(8 // size), y.split(8 // size)))
    made = [trainer() for _ in range(size)]

    def job(world):
        made[world.rank].world = world
        return gradient(made[world.rank], [shares[world.rank]])

    for loss, found in Ranks(size).run(job):
        assert loss == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(found, whole[1], rtol=1e-4, atol=1e-6)


def test_the_whole_gradient_is_clipped_by_its_norm():
    free = gradient(trainer(grad_clip_norm=0.0), [batch()])[1]
    norm = free.norm().item()
    torch.testing.assert_close(gradient(trainer(grad_clip_norm=2 * norm), [batch()])[1], free)
    clipped = gradient(trainer(grad_clip_norm=norm / 4), [batch()])[1]
    torch.testing.assert_close(clipped, free / 4, rtol=1e-4, atol=1e-7)


def test_learning_rate_scale_and_momentum_warm_up_reach_every_group():
    t = trainer(muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=10)
    for index, scale, momentum in [
        (0, 1.0, 0.85),
        (5, 0.5, 0.90),
        (10, 0.25, 0.95),
        (99, 0.125, 0.95),
    ]:
        t.steps = index
        t.step([batch()], scale)
        assert t.steps == index + 1
        for optimizer in t.optimizers:
            for group in optimizer.param_groups:
                assert group["lr"] == group["base_lr"] * scale
                assert not isinstance(optimizer, Muon) or group["momentum"] == pytest.approx(
                    momentum
                )


def test_a_learning_rate_scale_of_zero_changes_nothing_and_gradients_do_not_pile_up():
    t = trainer()
    before = [p.detach().clone() for p in t.parameters]
    first = t.step([batch()], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, t.parameters))
    assert all(p.grad is None or not p.grad.any() for p in t.parameters)
    assert torch.equal(t.step([batch()], 0.0), first)


@pytest.mark.parametrize("alpha", [0.5, 0.997])
def test_average_follows_its_decay_formula(alpha):
    t = trainer(ema_alpha=alpha)
    expected = [p.detach().clone() for p in t.parameters]
    for step in range(20):
        t.step([batch(seed=step)], 1.0)
        decay = min(alpha, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, t.parameters)]
    for found, e in zip(t.average, expected):
        torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-5)


def test_adam_moves_by_its_own_rates_and_settings():
    """One step from zero moments moves each entry by about its role's rate, on top of the decoupled decay."""
    t = trainer(grad_clip_norm=0.0, adam_wd=0.1, tied_embed_lr=0.02, scalar_lr=0.03)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    t.step([batch()], 0.5)
    for name, rate in [
        ("tok_emb.weight", 0.01),
        ("skip_weights", 0.015),
        ("blocks.0.attn.q_gain", 0.015),
    ]:
        p = dict(t.model.named_parameters())[name]
        move = (p - before[name] * (1 - rate * 0.1)).abs()
        assert (
            move.max().item() == pytest.approx(rate, rel=1e-2) and move.median().item() > 0.9 * rate
        ), name

"""Every parameter's rule, Newton-Schulz, Muon against PyTorch's own, ranks and their messages, the training step."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import cpu_world, random_tokens, small
from torch import nn

from train_gpt import (
    GPT,
    HEADS,
    VARIANTS,
    Head,
    Interrupted,
    Muon,
    RunLog,
    Trainer,
    UserError,
    World,
    newton_schulz,
)


class Ranks:
    """Several ranks as threads of this process: collectives meet at a barrier."""

    def __init__(self, size):
        self.size, self.barrier, self.parts = size, threading.Barrier(size), [None] * size

    def exchange(self, rank, part):
        """Every rank's part, on every rank."""
        self.parts[rank] = part
        self.barrier.wait(60)
        parts = list(self.parts)
        self.barrier.wait(60)
        return parts

    def run(self, job):
        """The results of job(world), by rank."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: job(ThreadWorld(rank, self)), range(self.size)))


class ThreadWorld(World):
    """A rank whose collectives are what torch.distributed documents, between threads."""

    def __init__(self, rank, ranks):
        super().__init__({})
        self.device, self.rank, self.size = torch.device("cpu"), rank, ranks.size
        self.ranks = ranks

    def collective(self, operation, *arguments, **options):
        if operation is dist.all_reduce:
            tensor, kind = arguments if len(arguments) == 2 else (*arguments, dist.ReduceOp.SUM)
            parts = torch.stack(self.ranks.exchange(self.rank, tensor.clone()))
            tensor.copy_(parts.amax(0) if kind == dist.ReduceOp.MAX else parts.sum(0))
        elif operation is dist.all_gather:
            outputs, part = arguments
            for output, other in zip(outputs, self.ranks.exchange(self.rank, part.clone())):
                output.copy_(other)
        elif operation is dist.broadcast_object_list:
            (box,) = arguments
            box[:] = self.ranks.exchange(self.rank, list(box))[0]
        else:
            raise NotImplementedError(operation)


def trainer(world=None, double=False, **changes):
    torch.manual_seed(0)
    s = small(**changes)
    model = GPT(s)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Trainer(model.double() if double else model, s, world or cpu_world())


def batch(B=8, seed=0):
    tokens = random_tokens(B * 13, seed=seed).view(B, 13)
    return tokens[:, :-1], tokens[:, 1:]


# ---- Every parameter meets the rule of its role ----

# settings that tell by its rate, decay and start which rule a parameter got
TELLING = dict(
    matrix_lr=0.1,
    scalar_lr=0.2,
    tied_embed_lr=0.3,
    head_matrix_lr=0.4,
    head_lr=0.5,
    muon_weight_decay=0.6,
    adam_wd=0.7,
    scalar_wd=0.8,
    head_start_frac=0.9,
)


def expected_rule(name):
    """Optimizer, rate, decay and start by the design: matrices to Muon, all else to Adam."""
    owner, _, own = name.rpartition(".")
    if owner == "head":
        if own.startswith("gate") or own == "g":
            return "adam", 0.2, 0.8, 0.9
        axes = own.partition("_")[2]  # of C_VR one is the vocabulary
        return ("adam", 0.5, 0.7, 0.9) if "V" in axes else ("muon", 0.4, 0.6, 0.9)
    if owner == "tok_emb" or owner.endswith(".table"):
        return "adam", 0.3, 0.7, 0.0
    return ("muon", 0.1, 0.6, 0.0) if own == "weight" else ("adam", 0.2, 0.8, 0.0)


def rules(trainer):
    """By the name of each parameter, the rule of the group that holds it."""
    names, found = {id(p): name for name, p in trainer.model.named_parameters()}, {}
    for optimizer in trainer.optimizers:
        kind = "muon" if isinstance(optimizer, Muon) else "adam"
        for group in optimizer.param_groups:
            assert group["lr"] == group["base_lr"]
            for p in group["params"]:
                assert names[id(p)] not in found, "in two groups"
                rule = kind, group["base_lr"], group["weight_decay"], group["start"]
                found[names[id(p)]] = rule
    return found


def all_heads():
    """Settings that choose each head and variant."""
    for name in (*HEADS, *VARIANTS):
        head, _, variant = name.partition("/")
        yield dict(head_type=head, head_variant=variant)


def test_every_parameter_is_in_one_group_with_optimizer_rate_decay_and_start_of_its_role():
    everything = dict(skip_gates=True, parallel_from=3, loop_layers="1,2")
    for kind in [*all_heads(), dict(head_type="delta", head_rank=0)]:
        t = trainer(**kind, **TELLING, **everything)
        expected = {name: expected_rule(name) for name, _ in t.model.named_parameters()}
        assert rules(t) == expected, kind


def test_what_is_not_trained_is_in_no_group():
    for kind in all_heads():
        if kind["head_type"] == "tied":
            continue
        everything = set(rules(trainer(**kind)))
        own = {name for name in everything if name.startswith("head.")}
        assert own and set(rules(trainer(**kind, train_only="head"))) == own, kind
        assert set(rules(trainer(**kind, head_trainable=False))) == everything - own, kind


def test_the_embedding_is_a_table_where_it_makes_no_logits():
    for kind in all_heads():
        model = GPT(small(**kind))
        h, x = torch.randn(5, 32), torch.arange(5)
        E = model.tok_emb.weight
        head = model.head
        for p in head.parameters():
            nn.init.normal_(p)
        same = torch.equal(head.log_probs(h, x, E), head.log_probs(h, x, torch.randn_like(E)))
        assert model.parameter_roles()["tok_emb.weight"] == ("table" if same else "tied"), kind


class Declared(Head):
    """The tied head, and a parameter that takes part in no loss."""

    def build(self, s, D, V, R):
        self.add("head_vocab", extra=torch.zeros(V, 4))

    logits = HEADS["tied"].logits


class Undeclared(Declared):
    def build(self, s, D, V, R):
        self.extra = nn.Parameter(torch.zeros(V, 4))


def test_a_parameter_that_no_module_declares_is_named(monkeypatch):
    monkeypatch.setitem(HEADS, "extra", Undeclared)
    with pytest.raises(RuntimeError, match=r"head\.extra"):
        trainer(head_type="extra")
    model = GPT(small())
    model.blocks[1].surprise = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"blocks\.1\.surprise"):
        Trainer(model, small(), cpu_world())
    model = GPT(small())
    model.plain = nn.Linear(2, 2)  # a module that knows of no roles
    with pytest.raises(RuntimeError, match=r"plain\.weight"):
        model.parameter_roles()


def test_a_parameter_that_no_gradient_reaches_is_named_at_the_first_step(monkeypatch):
    monkeypatch.setitem(HEADS, "extra", Declared)
    with pytest.raises(RuntimeError, match=r"head\.extra"):
        trainer(head_type="extra").step([batch()], 1.0, 0.0)
    lost = trainer()
    lost.model.skip_weights.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(RuntimeError, match="skip_weights"):
        lost.step([batch()], 1.0, 0.0)
    trainer(head_type="mos", head_trainable=False).step([batch()], 1.0, 0.0)  # none is due


# ---- Muon ----


def test_newton_schulz_brings_singular_values_near_one_and_treats_matrices_alone():
    for shape in [(64, 16), (16, 64), (96, 48), (5, 40, 20), (3, 12, 48), (2, 3, 8, 32)]:
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        X = newton_schulz(G * 7, torch.float32)
        singular = torch.linalg.svdvals(X)
        assert X.shape == G.shape and singular.min() > 0.6 and singular.max() < 1.3
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)  # U Vh is G's orthogonal factor
        assert ((U @ Vh - X).square().sum() / X.square().sum()).sqrt() < 0.35
        for g, x in zip(G.view(-1, *shape[-2:]), X.view(-1, *shape[-2:])):
            torch.testing.assert_close(newton_schulz(g, torch.float32), x, rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_zero_is_zero():
    G = torch.zeros(2, 6, 4)
    G[1] = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    X = newton_schulz(G, torch.float32)
    assert not X[0].any() and X[1].any()


def steps(make, shapes, count=5):
    """Parameters after `count` steps on fixed gradients that are not scaled alike."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    optimizer = make(params)
    for _ in range(count):
        for p in params:
            scale = 10 ** torch.empty(1).uniform_(-2, 2, generator=g)
            p.grad = torch.randn(p.shape, generator=g) * scale
        optimizer.step()
    return [p.detach() for p in params]


def muon(world=None, weight_decay=0.3):
    """A maker of Muon over parameters, in groups of one shape."""

    def make(params):
        groups = {}
        for p in params:
            facts = dict(lr=0.05, momentum=0.9, weight_decay=weight_decay)
            groups.setdefault(p.shape, dict(params=[], **facts))["params"].append(p)
        return Muon([*groups.values()], world or cpu_world(), torch.float32)

    return make


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_equals_pytorchs_at_constant_momentum(monkeypatch):
    import torch.optim._muon as reference

    def orthogonalise(G, *_):
        return newton_schulz(G, torch.float32)

    monkeypatch.setattr(reference, "_zeropower_via_newtonschulz", orthogonalise)
    shapes = [(8, 8), (24, 6), (6, 24), (24, 6), (40, 4)]
    for decay in (0.0, 0.3):
        facts = dict(lr=0.05, momentum=0.9, weight_decay=decay)
        expected = steps(lambda params, facts=facts: torch.optim.Muon(params, **facts), shapes)
        for a, b in zip(steps(muon(weight_decay=decay), shapes), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_muon_over_several_ranks_equals_one_rank():
    square, tall, stack = (8, 8), (24, 6), (3, 6, 4)
    shapes = [square, tall, square, square, stack, square, square]  # 5 + 1 + 3 matrices
    expected = steps(muon(), shapes)
    for size in (2, 3, 4):  # none divides them all
        for found in Ranks(size).run(lambda world: steps(muon(world), shapes)):
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_takes_a_stack_as_separate_matrices():
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 12, 4, generator=g), torch.randn(5, 3, 12, 4, generator=g)
    stack, parts = nn.Parameter(start.clone()), [nn.Parameter(m.clone()) for m in start]
    optimizers = muon()([stack]), muon()(parts)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for p, own in zip(parts, gradient):
            p.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack(parts).detach(), rtol=1e-5, atol=1e-6)
    assert (stack - start).abs().amax(dim=(1, 2)).min() > 0.01


def test_with_row_norm_the_scale_of_a_gradients_row_does_not_matter():
    g = torch.Generator().manual_seed(0)
    gradient, scale = torch.randn(24, 6, generator=g), 10 ** torch.randn(24, 1, generator=g)
    for row_norm in (False, True):
        moves = []
        for scaled in (gradient, gradient * scale):
            p = nn.Parameter(torch.zeros(24, 6))
            group = dict(params=[p], lr=0.05, momentum=0.9, weight_decay=0.0)
            p.grad = scaled.clone()
            Muon([group], cpu_world(), torch.float32, row_norm).step()
            moves.append(p.detach())
        assert torch.allclose(*moves, rtol=1e-4, atol=1e-6) == row_norm
    expected = -0.05 * 2 * newton_schulz(nn.functional.normalize(gradient), torch.float32)
    torch.testing.assert_close(moves[0], expected, rtol=1e-4, atol=1e-6)
    for optimizer in trainer(muon_row_norm=True).optimizers:
        assert not isinstance(optimizer, Muon) or optimizer.row_norm


# ---- What the ranks tell each other ----


def test_one_rank_tells_itself_its_time_and_its_signal():
    world = cpu_world()
    assert world.time_and_signal(12.25) == (12.25, 0)
    world.signal = 15
    assert world.time_and_signal(13.5) == (13.5, 15)


def test_every_rank_hears_rank_zeros_time_and_any_ranks_signal():
    for signalled in ([], [0], [1], [2], [0, 1, 2]):

        def job(world, signalled=signalled):
            world.signal = 15 if world.rank in signalled else 0
            return world.time_and_signal(100.0 + world.rank)  # rank 0's clock is behind

        number = 15 if signalled else 0
        assert Ranks(3).run(job) == [(100.0, number)] * 3, signalled


def test_sums_means_and_agreements_are_the_same_on_every_rank():
    def job(world):
        mine = torch.full((2, 2), float(world.rank))
        scalar = torch.tensor(float(world.rank**2))
        total, parts = world.sum(mine.clone()), world.gather(mine)
        world.average([mine, scalar])
        return total, parts, mine, scalar, world.agree(f"rank {world.rank}")

    for total, parts, mean, scalar, word in Ranks(3).run(job):
        assert (total == 3.0).all() and parts[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        assert (mean == 1.0).all() and scalar.item() == pytest.approx(5 / 3) and word == "rank 0"


def test_a_lost_rank_is_told_in_one_line_unless_a_signal_ended_it():
    def broken(*_):
        raise RuntimeError("connection closed by peer")

    world = cpu_world()
    world.collective(broken)  # alone there is nobody to lose
    world.size = 2
    with pytest.raises(UserError, match="^rank 0: .*another rank.*connection closed"):
        world.collective(broken)
    world.signal = 15
    with pytest.raises(Interrupted):
        world.collective(broken)


# ---- The training step ----


class Spy(torch.optim.Optimizer):
    """Records the gradients that reach the optimizers."""

    def __init__(self, parameters):
        super().__init__([dict(params=list(parameters), base_lr=0.0, start=0.0)], dict(lr=0.0))

    def step(self):
        self.seen = torch.cat([p.grad.flatten().clone() for p in self.param_groups[0]["params"]])


def gradient(trainer, batches):
    """The mean loss and the whole gradient as the optimizers get it."""
    trainer.optimizers = [Spy(trainer.parameters)]
    loss = trainer.step(batches, 1.0, 0.0)
    return loss.item(), trainer.optimizers[0].seen


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    x, y = batch()
    whole = gradient(trainer(double=True, grad_clip_norm=0.0), [(x, y)])
    for size in (1, 2, 4):
        parts = list(zip(x.split(size), y.split(size)))
        loss, found = gradient(trainer(double=True, grad_clip_norm=0.0), parts)
        assert loss == pytest.approx(whole[0], rel=1e-6)
        torch.testing.assert_close(found, whole[1], rtol=1e-9, atol=1e-13)


def test_ranks_together_give_the_gradient_and_loss_of_the_whole_batch():
    x, y = batch()
    whole = gradient(trainer(), [(x, y)])
    for size in (2, 4):
        shares = list(zip(x.split(8 // size), y.split(8 // size)))
        trainers = [trainer() for _ in range(size)]  # here, as threads share torch's generator

        def job(world, trainers=trainers, shares=shares):
            trainers[world.rank].world = world
            return gradient(trainers[world.rank], [shares[world.rank]])

        for loss, found in Ranks(size).run(job):
            assert loss == pytest.approx(whole[0], rel=1e-5)
            torch.testing.assert_close(found, whole[1], rtol=1e-4, atol=1e-6)


def test_the_whole_gradient_is_clipped_by_its_norm():
    free = gradient(trainer(grad_clip_norm=0.0), [batch()])[1]
    norm = free.norm().item()
    unclipped = gradient(trainer(grad_clip_norm=2 * norm), [batch()])[1]
    torch.testing.assert_close(unclipped, free)
    clipped = gradient(trainer(grad_clip_norm=norm / 4), [batch()])[1]
    torch.testing.assert_close(clipped, free / 4, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_no_number_shows_in_the_next_loss_and_is_never_saved(tmp_path):
    for value in (math.nan, math.inf):
        broken = trainer()
        broken.model.skip_weights.register_hook(lambda g, value=value: g * value)
        broken.step([batch()], 1.0, 0.0)
        assert not broken.save(RunLog(tmp_path)) and not any(tmp_path.iterdir())
        assert not broken.step([batch()], 1.0, 0.0).isfinite()


def test_learning_rate_scale_and_momentum_warm_up_reach_every_group():
    t = trainer(muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=10)
    for index, scale, momentum in [(0, 1, 0.85), (5, 0.5, 0.9), (10, 0.25, 0.95), (99, 0.1, 0.95)]:
        t.steps = index
        t.step([batch()], scale, 0.0)
        assert t.steps == index + 1
        for optimizer in t.optimizers:
            for group in optimizer.param_groups:
                assert group["lr"] == group["base_lr"] * scale
                if isinstance(optimizer, Muon):
                    assert group["momentum"] == pytest.approx(momentum)


def test_a_learning_rate_scale_of_zero_changes_nothing_and_gradients_do_not_pile_up():
    t = trainer()
    before = [p.detach().clone() for p in t.parameters]
    first = t.step([batch()], 0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, t.parameters))
    assert all(p.grad is None or not p.grad.any() for p in t.parameters)
    assert torch.equal(t.step([batch()], 0.0, 0.0), first)


def test_the_average_follows_its_decay_formula_and_is_what_is_exported():
    for alpha in (0.5, 0.997):
        t = trainer(ema_alpha=alpha)
        expected = {name: p.detach().clone() for name, p in t.model.named_parameters()}
        for step in range(12):
            t.step([batch(seed=step)], 1.0, 0.0)
            decay = min(alpha, (1 + step) / (10 + step))
            for name, p in t.model.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()
        for name, average in t.exported().items():
            torch.testing.assert_close(average, expected[name], rtol=1e-4, atol=1e-5)
    last = trainer(use_ema=False)
    last.step([batch()], 1.0, 0.0)
    for name, p in last.model.named_parameters():
        assert torch.equal(last.exported()[name], p)


def test_averaging_changes_no_weight():
    with_average, without = trainer(), trainer(use_ema=False)
    for t in (with_average, without):
        t.step([batch()], 1.0, 0.0)
        t.step([batch(seed=1)], 1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(with_average.parameters, without.parameters))


def test_adam_equals_a_few_lines_of_its_paper():
    """AdamW with decays 0.9 and 0.95, epsilon 1e-8 and its own rates, on the gradients that it got."""
    t = trainer(grad_clip_norm=0.0, adam_wd=0.1, scalar_wd=0.1, tied_embed_lr=0.02, scalar_lr=0.03)
    names = {"tok_emb.weight": 0.02, "skip_weights": 0.03, "blocks.0.attn.q_gain": 0.03}
    state, gradients = {}, {}
    for name in names:
        p = t.model.get_parameter(name)
        state[name] = [p.detach().double(), torch.zeros_like(p), torch.zeros_like(p)]

        def keep(p, name=name):
            gradients[name] = p.grad.double()

        p.register_post_accumulate_grad_hook(keep)
    for step, scale in enumerate((1.0, 0.5, 0.25), start=1):
        t.step([batch(seed=step)], scale, 0.0)
        for name, rate in names.items():
            p, m, v = state[name]
            g = gradients[name]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            move = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            p = p * (1 - scale * rate * 0.1) - scale * rate * move
            state[name] = [p, m, v]
            found = t.model.get_parameter(name).detach().double()
            torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-6)

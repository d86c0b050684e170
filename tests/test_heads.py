"""Every entry of HEADS, in float64: probabilities, gradients, the start at the tied head, rank, and that it trains."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from train_gpt import GPT, HEADS, Hyperparameters, Trainer, World

each_head = pytest.mark.parametrize("name", HEADS)
D, V, K, R, M = 6, 11, 3, 2, 4
REPLACEMENTS = {"factorized", "simplex"}  # the heads that cannot start as the tied head


def settings(name, **changes):
    small = dict(
        head_type=name, vocab_size=V, num_layers=2, model_dim=D, num_heads=1, num_kv_heads=1, rope_dims=4,
        bigram_vocab_size=20, bigram_dim=8, ve_dim=8, ve_layers="1", xsa_last_n=1, train_seq_len=12,
        train_batch_tokens=48, head_k=K, head_rank=R, head_dim=M, compile="0", compute_dtype="fp32")
    return dataclasses.replace(Hyperparameters(), **{**small, **changes})


def random_head(name, seed=0, **changes):
    """A float64 head none of whose parameters is zero."""
    torch.manual_seed(seed)
    head = HEADS[name](settings(name, **changes)).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return head


def inputs(N=5, d=D, v=V, seed=1):
    """h_ND, x_N, y_N, E_VD with gradients."""
    g = torch.Generator().manual_seed(seed)
    h, E = (torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for n in (N, v))
    x, y = (torch.randint(v, (N,), generator=g) for _ in range(2))
    return h, x, y, E


@each_head
def test_probabilities_sum_to_one(name):
    h, x, _, E = inputs()
    total = random_head(name).log_probs(h, x, E).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@each_head
@pytest.mark.parametrize("changes", [{}, dict(logit_softcap=0.0), dict(head_k=1, head_rank=1)], ids=str)
def test_nll_and_its_gradients_are_those_of_the_naive_target_log_probability(name, changes):
    head, (h, x, y, E) = random_head(name, **changes), inputs()
    found, naive = head.nll(h, x, y, E), -head.log_probs(h, x, E)[torch.arange(len(y)), y]
    assert found.shape == y.shape
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-12)
    wanted = [h, E, *head.parameters()]
    weight = torch.linspace(1, 2, len(y), dtype=torch.float64)  # unequal, so that no token's gradient can hide
    pairs = zip(*(torch.autograd.grad((nll * weight).sum(), wanted, allow_unused=True) for nll in (found, naive)))
    for leaf, (ours, theirs) in zip(wanted, pairs):
        if ours is None and theirs is None:
            assert leaf is E  # a head may do without the embedding, not without its own parameters
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert leaf is E or ours.abs().max() > 1e-6


@each_head
def test_gradients_equal_finite_differences(name):
    head, (h, x, y, E) = random_head(name), inputs(N=2)
    leaves = [h, E, *head.parameters()]
    assert torch.autograd.gradcheck(lambda *_: head.nll(h, x, y, E), leaves)


def cap(z, c=30.0):
    return c * torch.tanh(z / c)


def tied(head, h, E):
    return F.log_softmax(cap(h @ E.T), -1)


def factorized(head, h, E):
    return F.log_softmax(cap(head.g * (h @ head.A_RD.T @ head.C_VR.T)), -1)


def simplex(head, h, E):
    corners = M * F.softmax(h @ head.S_MD.T, -1) - 1
    return F.log_softmax(cap(head.g * corners @ head.C_VM.T), -1)


def mos(head, h, E):
    pi = F.softmax(h @ head.gate_KD.T + head.gate_bias_K, -1)
    p = sum(pi[:, k, None] * F.softmax(cap((h + h @ head.V_KRD[k].T @ head.U_KDR[k].T) @ E.T), -1) for k in range(K))
    return p.log()


@pytest.mark.parametrize("formula", [tied, factorized, simplex, mos], ids=lambda f: f.__name__)
def test_log_probs_follow_the_published_formula(formula):
    head, (h, x, _, E) = random_head(formula.__name__), inputs()
    h, E = 5 * h, 3 * E  # far into the cap
    torch.testing.assert_close(head.log_probs(h, x, E), formula(head, h, E), rtol=0, atol=1e-11)


@each_head
def test_the_cap_bounds_log_odds_and_zero_means_no_cap(name):
    h, x, _, E = inputs(N=20)

    def spread(c):
        log_p = random_head(name, logit_softcap=c).log_probs(100 * h, x, 10 * E)
        return (log_p.amax(-1) - log_p.amin(-1)).max().item()

    assert spread(3.0) <= 6.0 + 1e-9 < spread(20.0) <= 40.0 + 1e-9
    assert spread(0.0) == pytest.approx(spread(1e9), rel=1e-3)


OWN_PARAMETERS = dict(
    tied=0, factorized=R * (D + V) + 1, mos=K * (2 * D * R + D + 1), simplex=M * (D + V) + 1, untied=V * D,
    delta=R * (D + V), wide=R * (D + V), bigram=2 * R * V)


@each_head
def test_head_has_the_published_number_of_parameters(name):
    assert sum(p.numel() for p in HEADS[name](settings(name)).parameters()) == OWN_PARAMETERS[name]


def test_mos_with_one_component_has_no_gate():
    names = dict(HEADS["mos"](settings("mos", head_k=1)).named_parameters())
    assert sum(p.numel() for p in names.values()) == 2 * D * R and not any("gate" in name for name in names)


# ---- The start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HEADS if name not in REPLACEMENTS])
@pytest.mark.parametrize("changes", [{}, dict(head_k=1), dict(logit_softcap=0.0)], ids=str)
def test_head_starts_as_the_tied_head(name, changes):
    torch.manual_seed(0)
    model = GPT(settings(name, tied_embed_init_std=1.0, **changes)).double()
    h, x, y, _ = inputs(N=40)
    E = model.tok_emb.weight
    expected = HEADS["tied"](settings("tied", **changes)).log_probs(h, x, E)
    torch.testing.assert_close(model.head.log_probs(h, x, E), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.head.nll(h, x, y, E), -expected[torch.arange(40), y], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(REPLACEMENTS))
@pytest.mark.parametrize("seed", [0, 1])
def test_replacement_starts_with_the_tied_heads_spread_of_logits(name, seed):
    size = dict(model_dim=512, vocab_size=1024, head_rank=64, head_dim=128)
    torch.manual_seed(seed)
    h, x = F.rms_norm(torch.randn(512, 512), (512,)), torch.zeros(512, dtype=torch.int64)
    E = 0.005 * torch.randn(1024, 512)

    def spread(head):
        return HEADS[head](settings(head, **size)).log_probs(h, x, E).std(dim=-1).mean().item()

    assert spread(name) == pytest.approx(spread("tied"), rel=0.15)


def test_mos_components_get_different_gradients_at_the_start():
    torch.manual_seed(0)
    s = settings("mos", model_dim=64, vocab_size=50, head_rank=8)
    head = HEADS["mos"](s).double()
    h, x, y, E = inputs(N=64, d=64, v=50)
    head.nll(h, x, y, E).mean().backward()
    g = F.normalize(head.U_KDR.grad.flatten(1), dim=1)
    off_diagonal = (g @ g.T)[~torch.eye(K, dtype=torch.bool)]
    assert head.U_KDR.grad.abs().amax(dim=(1, 2)).min() > 0 and off_diagonal.abs().max() < 0.5


# ---- Rank ------------------------------------------------------------------------------------------------------------


def centred_rank(log_p):
    singular = torch.linalg.svdvals(log_p - log_p.mean(-1, keepdim=True))
    return int((singular > 1e-9 * singular[0]).sum())


def test_mos_exceeds_the_rank_that_bounds_single_softmaxes():
    d, v = 8, 60
    size = dict(model_dim=d, vocab_size=v, head_rank=3, logit_softcap=0.0)
    h, x, _, E = inputs(N=300, d=d, v=v)
    ranks = {name: centred_rank(random_head(name, **size).log_probs(h, x, E).detach())
             for name in ("tied", "factorized", "mos")}
    assert ranks["tied"] == d and ranks["factorized"] == 3 and ranks["mos"] > d + 1


# ---- Training --------------------------------------------------------------------------------------------------------


@each_head
def test_every_parameter_of_the_head_has_a_role_and_moves_within_three_steps(name):
    torch.manual_seed(0)
    s = settings(name, model_dim=16, vocab_size=40, muon_weight_decay=0.0, adam_wd=0.0)  # only gradients move it
    model, world = GPT(s), World()
    world.device = torch.device("cpu")
    trainer = Trainer(model, s, world)
    own = dict(model.head.named_parameters())
    before = {key: p.detach().clone() for key, p in own.items()}
    assert all(trainer.roles[f"head.{key}"] in ("matrix", "vocab", "scalar") for key in own)
    x, y = torch.randint(40, (2, 4, 12))
    losses = [trainer.step([(x, y)], 1.0).item() for _ in range(3)]
    assert losses[2] < losses[0]
    for key, p in own.items():
        per_component = (p - before[key]).abs().flatten(1 if p.ndim == 3 else 0)
        assert (per_component.amax(-1) > 1e-4).all(), key

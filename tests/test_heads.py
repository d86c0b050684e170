"""Every head and variant, in float64: formula, probabilities, gradients, the start at the tied head, rank, training, settings."""

import copy
import dataclasses
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import (
    GPT,
    HEADS,
    VARIANTS,
    Hyperparameters,
    Trainer,
    UserError,
    World,
    from_env,
    head_class,
    spectrum,
)

# What a head is called here, and the settings that choose it.
KINDS = {
    name: dict(zip(("head_type", "head_variant"), f"{name}/".split("/")))
    for name in (*HEADS, *VARIANTS)
}
KINDS["delta, full"] = dict(head_type="delta", head_rank=0)
STARTS_ELSEWHERE = {
    "factorized",
    "simplex",
    *VARIANTS,
}  # the heads that cannot start as the tied head
OWN = [kind for kind in KINDS if kind != "tied"]  # the heads with parameters of their own
each_head = pytest.mark.parametrize("kind", HEADS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_own = pytest.mark.parametrize("kind", OWN)
D, V, K, R, M = 6, 11, 3, 2, 4


def settings(kind, **changes):
    small = dict(
        vocab_size=V,
        num_layers=2,
        model_dim=D,
        num_heads=1,
        num_kv_heads=1,
        rope_dims=4,
        bigram_vocab_size=20,
        bigram_dim=8,
        ve_dim=8,
        ve_layers="1",
        xsa_last_n=1,
        train_seq_len=12,
        train_batch_tokens=48,
        head_k=K,
        head_rank=R,
        head_dim=M,
        compile="0",
        compute_dtype="fp32",
    )
    return dataclasses.replace(Hyperparameters(), **{**small, **KINDS[kind], **changes})


def new_head(kind, **changes):
    return head_class(settings(kind, **changes))(settings(kind, **changes)).double()


def randomise(head):
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return head


def random_head(kind, seed=0, **changes):
    """A float64 head none of whose parameters is zero."""
    torch.manual_seed(seed)
    return randomise(new_head(kind, **changes))


def inputs(N=5, d=D, v=V, seed=1):
    """h_ND, x_N, y_N, E_VD with gradients."""
    g = torch.Generator().manual_seed(seed)
    h, E = (torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for n in (N, v))
    x, y = (torch.randint(v, (N,), generator=g) for _ in range(2))
    return h, x, y, E


@every_kind
def test_probabilities_sum_to_one(kind):
    h, x, _, E = inputs()
    total = random_head(kind).log_probs(h, x, E).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@every_kind
@pytest.mark.parametrize(
    "changes", [{}, dict(logit_softcap=0.0), dict(head_k=1, head_rank=1)], ids=str
)
def test_nll_and_its_gradients_are_those_of_the_naive_target_log_probability(kind, changes):
    head, (h, x, y, E) = random_head(kind, **changes), inputs()
    found, naive = head.nll(h, x, y, E), -head.log_probs(h, x, E)[torch.arange(len(y)), y]
    assert found.shape == y.shape
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-12)
    wanted = dict(h=h, E=E, **dict(head.named_parameters()))
    weight = torch.linspace(
        1, 2, len(y), dtype=torch.float64
    )  # unequal, so that no token's gradient can hide
    pairs = zip(
        *(
            torch.autograd.grad((nll * weight).sum(), wanted.values(), allow_unused=True)
            for nll in (found, naive)
        )
    )
    idle = {"E"} | ({"gate_KD"} if "head_k" in changes else set())  # a gate alone is always open
    for name, (ours, theirs) in zip(wanted, pairs):
        if ours is None and theirs is None:
            assert (
                name == "E"
            )  # a head may do without the embedding, not without its own parameters
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert name in idle or ours.abs().max() > 1e-6, name


@every_kind
def test_gradients_equal_finite_differences(kind):
    head, (h, x, y, E) = random_head(kind), inputs(N=2)
    leaves = [h, E, *head.parameters()]
    assert torch.autograd.gradcheck(lambda *_: head.nll(h, x, y, E), leaves)


# The published formulas, each written without the script's help, up to a constant a row: p is the head, C its cap.
def mixture(gate_NK, logits_KNV):
    return sum(
        pi[:, None] * F.softmax(z, -1) for pi, z in zip(F.softmax(gate_NK, -1).T, logits_KNV)
    ).log()


FORMULAS = {
    "tied": lambda p, h, x, E, C: C(h @ E.T),
    "untied": lambda p, h, x, E, C: C(h @ p.D_VD.T),
    "factorized": lambda p, h, x, E, C: C(p.g * h @ (p.C_VR @ p.A_RD).T),
    "simplex": lambda p, h, x, E, C: C(p.g * (M * F.softmax(h @ p.S_MD.T, -1) - 1) @ p.C_VM.T),
    "delta": lambda p, h, x, E, C: C(h @ (E + p.C_VR @ p.A_RD).T),
    "delta, full": lambda p, h, x, E, C: C(h @ (E + p.C_VR).T),
    "wide": lambda p, h, x, E, C: C(h @ E.T + (h @ p.A_RD.T).clamp(min=0) ** 2 @ p.C_VR.T),
    "bigram": lambda p, h, x, E, C: C(
        h @ E.T + torch.stack([p.C_VR @ p.a_VR[token] for token in x])
    ),
    "mos": lambda p, h, x, E, C: mixture(
        h @ p.gate_KD.T + p.gate_bias_K,
        [C((h + h @ (U @ A).T) @ E.T) for U, A in zip(p.U_KDR, p.V_KRD)],
    ),
    "factorized/pr908": lambda p, h, x, E, C: C(h @ (p.C_VR @ p.A_RD).T),
    "simplex/pr908": lambda p, h, x, E, C: C(F.softmax(h @ p.S_MD.T, -1) @ p.C_VM.T),
    "mos/pr908": lambda p, h, x, E, C: C(
        torch.einsum("nk,kvr,krd,nd->nv", F.softmax(h @ p.gate_KD.T, -1), p.C_KVR, p.A_KRD, h)
    ),
    "mos/pr266": lambda p, h, x, E, C: mixture(
        h @ p.gate_KD.T, [h @ (U @ p.V_RD).T @ E.T for U in p.U_MR.view(K, D, R)]
    ),
}


def published(kind, head, h, x, E, c):
    return F.log_softmax(
        FORMULAS[kind](head, h, x, E, lambda z: c * torch.tanh(z / c) if c else z), -1
    )


@every_kind
@pytest.mark.parametrize("c", [30.0, 2.0, 0.0])
def test_log_probs_follow_the_published_formula(kind, c):
    head, (h, x, _, E) = random_head(kind, logit_softcap=c), inputs()
    h, E = 5 * h, 3 * E  # far into the cap
    torch.testing.assert_close(
        head.log_probs(h, x, E), published(kind, head, h, x, E, c), rtol=0, atol=1e-11
    )


@each_head
def test_the_cap_bounds_log_odds_and_zero_means_no_cap(kind):
    h, x, _, E = inputs(N=20)

    def spread(c):
        log_p = random_head(kind, logit_softcap=c).log_probs(100 * h, x, 10 * E)
        return (log_p.amax(-1) - log_p.amin(-1)).max().item()

    assert spread(3.0) <= 6.0 + 1e-9 < spread(20.0) <= 40.0 + 1e-9
    assert spread(0.0) == pytest.approx(spread(1e9), rel=1e-3)


OWN_PARAMETERS = {
    "tied": 0,
    "factorized": R * (D + V) + 1,
    "mos": K * (2 * D * R + D + 1),
    "simplex": M * (D + V) + 1,
    "untied": V * D,
    "delta": R * (D + V),
    "delta, full": V * D,
    "wide": R * (D + V),
    "bigram": 2 * R * V,
}


@pytest.mark.parametrize("kind", OWN_PARAMETERS)
def test_head_has_the_published_number_of_parameters(kind):
    assert sum(p.numel() for p in new_head(kind).parameters()) == OWN_PARAMETERS[kind]


@pytest.mark.parametrize(
    "env, count",
    [
        ("HEAD_TYPE=standard", 26_993_766),
        ("HEAD_TYPE=standard RANK_DIM=64 HEAD_VARIANT=pr908", 27_092_070),
        ("HEAD_TYPE=standard RANK_DIM=128 HEAD_VARIANT=pr908", 27_190_374),
        (
            "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=2 MIXTURE_RANK_DIM=64 HEAD_VARIANT=pr908",
            27_191_398,
        ),
        (
            "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=64 HEAD_VARIANT=pr908",
            27_389_030,
        ),
        (
            "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=128 HEAD_VARIANT=pr908",
            27_782_246,
        ),
        ("HEAD_TYPE=simplex SIMPLEX_DIM=128 HEAD_VARIANT=pr908", 27_190_374),
        ("USE_MOS=1 MOS_K=2 MOS_RANK=64 HEAD_VARIANT=pr266", 17_159_240),
    ],
)
def test_reproduction_has_the_published_number_of_parameters(env, count):
    with torch.device("meta"):
        model = GPT(from_env(env_of(env)))
    assert sum(p.numel() for p in model.parameters()) == count


def test_mos_with_one_component_has_no_gate():
    names = dict(new_head("mos", head_k=1).named_parameters())
    assert sum(p.numel() for p in names.values()) == 2 * D * R and not any(
        "gate" in name for name in names
    )


# ---- The start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STARTS_ELSEWHERE])
@pytest.mark.parametrize("changes", [{}, dict(head_k=1), dict(logit_softcap=0.0)], ids=str)
def test_head_starts_as_the_tied_head(kind, changes):
    torch.manual_seed(0)
    model = GPT(settings(kind, tied_embed_init_std=1.0, **changes)).double()
    h, x, y, _ = inputs(N=40)
    E = model.tok_emb.weight
    expected = new_head("tied", **changes).log_probs(h, x, E)
    torch.testing.assert_close(model.head.log_probs(h, x, E), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model.head.nll(h, x, y, E), -expected[torch.arange(40), y], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["factorized", "simplex"])
@pytest.mark.parametrize("seed", [0, 1])
def test_replacement_starts_with_the_tied_heads_spread_of_logits(kind, seed):
    size = dict(model_dim=512, vocab_size=1024, head_rank=64, head_dim=128)
    torch.manual_seed(seed)
    h, x = F.rms_norm(torch.randn(512, 512).double(), (512,)), torch.zeros(512, dtype=torch.int64)
    E = 0.005 * torch.randn(1024, 512).double()

    def spread(kind):
        return new_head(kind, **size).log_probs(h, x, E).std(dim=-1).mean().item()

    assert spread(kind) == pytest.approx(spread("tied"), rel=0.15)


def test_mos_components_get_different_gradients_at_the_start():
    torch.manual_seed(0)
    head = new_head("mos", model_dim=64, vocab_size=50, head_rank=8)
    h, x, y, E = inputs(N=64, d=64, v=50)
    head.nll(h, x, y, E).mean().backward()
    g = F.normalize(head.U_KDR.grad.flatten(1), dim=1)
    off_diagonal = (g @ g.T)[~torch.eye(K, dtype=torch.bool)]
    assert head.U_KDR.grad.abs().amax(dim=(1, 2)).min() > 0 and off_diagonal.abs().max() < 0.5


# ---- Rank ------------------------------------------------------------------------------------------------------------


def singular_values(log_p):
    """Of the centred log-probabilities, over the largest."""
    found = torch.linalg.svdvals(log_p - log_p.mean(-1, keepdim=True))
    return found / found[0].item()


@pytest.mark.parametrize("kind, rank", [("tied", 8), ("factorized", 3), ("wide", 11), ("mos", 59)])
def test_rank_of_random_log_probabilities_without_a_cap(kind, rank):
    d, v = 8, 60
    h, x, _, E = inputs(N=300, d=d, v=v)
    head = random_head(kind, model_dim=d, vocab_size=v, head_rank=3, logit_softcap=0.0)
    assert (singular_values(head.log_probs(h, x, E).detach()) > 1e-9).sum() == rank


def test_mos_learns_a_planted_target_beyond_the_rank_bound_that_holds_single_softmaxes():
    d, v, n, k, r = 4, 24, 48, 2, 2
    target = F.softmax(
        2 * torch.randn(n, v, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1
    )
    assert (singular_values(target.log()) > 0.1).sum() > d + 1

    def fit(kind):
        """Divergence from the target and singular values after Adam on head, hidden states and embedding."""
        torch.manual_seed(0)
        head = new_head(kind, model_dim=d, vocab_size=v, head_k=k, head_rank=r, logit_softcap=0.0)
        h, x, _, E = inputs(N=n, d=d, v=v)
        adam = torch.optim.Adam([h, E, *head.parameters()], lr=0.03)
        for _ in range(400):
            adam.zero_grad()
            log_p = head.log_probs(h, x, E)
            loss = F.kl_div(log_p, target, reduction="batchmean")
            loss.backward()
            adam.step()
        return loss.item(), singular_values(log_p.detach())

    (tied, tied_values), (mixed, mixed_values), (logits, logits_values) = map(
        fit, ("tied", "mos", "mos/pr908")
    )
    assert tied_values[d] < 1e-12 and logits_values[k * r] < 1e-12 and mixed_values[d + 1] > 0.05
    assert mixed < 0.9 * min(tied, logits)


def on_the_cpu():
    world = World()
    world.device = torch.device("cpu")
    return world


def spectrum_case(kind, compute_dtype=None, **changes):
    """Model, tokens, settings."""
    s = settings(
        kind,
        **dict(model_dim=8, vocab_size=40, tied_embed_init_std=1.0, val_batch_size=100) | changes,
    )
    torch.manual_seed(0)
    model = GPT(s, compute_dtype)
    randomise(model.head)
    return model, torch.randint(40, (500,)), s


@pytest.mark.parametrize("kind", ["tied", "mos", "bigram", "mos/pr908"])
def test_spectrum_is_that_of_all_contexts_log_probabilities(kind):
    model, tokens, s = spectrum_case(kind)
    with mock.patch.object(
        head_class(s), "log_probs", autospec=True, side_effect=head_class(s).log_probs
    ) as spy:
        found = spectrum(model, tokens, s, on_the_cpu())
    assert (
        max(len(call.args[1]) for call in spy.call_args_list) < 499
    )  # never all contexts' vocabulary at once
    with torch.no_grad():
        x = tokens[:-1]
        h = torch.cat([model.hidden(part[None])[0] for part in x.split(12)]).double()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        log_p = published(
            kind, model.head.double(), h, x, model.tok_emb.weight.double(), 30.0
        ).numpy()
    energy = np.linalg.svd(log_p - log_p.mean(1, keepdims=True), compute_uv=False) ** 2
    share = energy.cumsum() / energy.sum()
    rank = 1 + np.searchsorted(share, 0.9999)
    expected = dict(
        contexts=499, rank_9999=rank, energy_beyond_model_dim=energy[8:].sum() / energy.sum()
    )
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectrum_finds_nothing_beyond_the_width_of_the_tied_head_without_a_cap_but_of_mos(dtype):
    tied, mos = (
        spectrum(*spectrum_case(kind, dtype, logit_softcap=0.0), on_the_cpu())
        for kind in ("tied", "mos")
    )
    assert tied["rank_9999"] <= 8 < mos["rank_9999"]
    assert 0 <= tied["energy_beyond_model_dim"] < 1e-12 and mos["energy_beyond_model_dim"] > 1e-3


def test_spectrum_reads_65536_contexts_of_a_longer_split():
    model, _, s = spectrum_case(
        "tied", num_layers=1, ve_layers="0", train_seq_len=1000, val_batch_size=10000
    )
    assert spectrum(model, torch.randint(40, (70000,)), s, on_the_cpu())["contexts"] == 66000


# ---- Training --------------------------------------------------------------------------------------------------------


def start(kind, **changes):
    """A trainer of a small model whose weights only gradients move."""
    torch.manual_seed(0)
    s = settings(
        kind, model_dim=16, vocab_size=40, head_dim=8, muon_weight_decay=0.0, adam_wd=0.0, **changes
    )
    return Trainer(GPT(s), s, on_the_cpu())


def batch(seed):
    """Two micro-batches."""
    return list(torch.randint(40, (2, 2, 2, 12), generator=torch.Generator().manual_seed(seed)))


def snapshot(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(trainer, before):
    """How far each parameter is from where it was; of a stack, its laziest matrix."""
    return {
        name: (p - before[name]).abs().flatten(1 if p.ndim == 3 else 0).amax(-1).min().item()
        for name, p in trainer.model.named_parameters()
    }


@every_own
def test_every_parameter_of_the_head_has_a_role_and_moves_within_three_steps(kind):
    trainer = start(kind)
    before = snapshot(trainer)
    losses = [trainer.step(batch(0), 1.0).item() for _ in range(3)]
    assert losses[2] < losses[0]
    for name, distance in moved(trainer, before).items():
        if name.startswith("head."):
            assert trainer.roles[name] in ("matrix", "vocab", "scalar") and distance > 1e-4, name


@every_own
def test_untrainable_head_stays_where_it_starts_while_the_trunk_moves(kind):
    trainer = start(kind, head_trainable=False)
    before = snapshot(trainer)
    for seed in range(3):
        trainer.step(batch(seed), 1.0)
    for name, distance in moved(trainer, before).items():
        assert (distance == 0) == name.startswith("head."), name
    for name, averaged in zip(trainer.roles, trainer.average):
        assert torch.equal(averaged, before[name]) == name.startswith("head."), name


@every_own
def test_train_only_head_moves_the_head_alone(kind):
    trainer = start(kind, train_only="head")
    before = snapshot(trainer)
    for seed in range(3):
        trainer.step(batch(seed), 1.0)
    for name, distance in moved(trainer, before).items():
        assert (distance > 0) == name.startswith("head."), name
    for name, averaged in zip(trainer.roles, trainer.average):
        assert torch.equal(averaged, before[name]) != name.startswith("head."), name


def test_untied_head_trains_as_the_tied_one_until_it_leaves_the_embedding():
    tied, untied = start("tied"), start("untied", head_untie_frac=0.5)
    D, E = untied.model.head.D_VD, untied.model.tok_emb.weight
    for seed in range(4):
        losses = [
            trainer.step(batch(seed), 1.0, **how).item()
            for trainer, how in ((tied, {}), (untied, dict(tied=True)))
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert torch.equal(D, E)
        torch.testing.assert_close(E, tied.model.tok_emb.weight, rtol=0, atol=1e-6)
    averages = dict(zip(untied.roles, untied.average))
    assert torch.equal(averages["head.D_VD"], averages["tok_emb.weight"])
    for trainer in (tied, untied):
        trainer.step(batch(4), 1.0)
    assert (D - E).abs().max() > 1e-3 and (E - tied.model.tok_emb.weight).abs().max() > 1e-3


def test_checkpoint_of_a_tied_stage_goes_on_bit_equal_after_it():
    whole, resumed = start("untied", head_untie_frac=0.5), start("untied", head_untie_frac=0.5)
    for seed in range(4):
        whole.step(batch(seed), 1.0, tied=seed < 2)
        if seed == 1:
            resumed.restore(copy.deepcopy(whole.state()))
    for seed in (2, 3):
        resumed.step(batch(seed), 1.0)
    assert max(moved(resumed, snapshot(whole)).values()) == 0


# ---- Settings --------------------------------------------------------------------------------------------------------


def env_of(text):
    return dict(pair.split("=", 1) for pair in text.split())


@pytest.mark.parametrize(
    "env",
    [  # the first variable is the wrong one
        "HEAD_K=0 HEAD_TYPE=mos",
        "HEAD_K=65 HEAD_TYPE=mos",
        "HEAD_K=2.0 HEAD_TYPE=mos",
        "HEAD_K= HEAD_TYPE=mos",
        *(f"HEAD_K=2 HEAD_TYPE={kind}" for kind in HEADS if kind != "mos"),
        *(f"HEAD_DIM=8 HEAD_TYPE={kind}" for kind in HEADS if kind != "simplex"),
        *(f"HEAD_RANK=8 HEAD_TYPE={kind}" for kind in ("tied", "untied", "simplex")),
        *(f"HEAD_UNTIE_FRAC=0.5 HEAD_TYPE={kind}" for kind in HEADS if kind != "untied"),
        *(f"HEAD_RANK=0 HEAD_TYPE={kind}" for kind in ("factorized", "mos", "wide", "bigram")),
        *(f"HEAD_RANK=513 HEAD_TYPE={kind}" for kind in ("factorized", "mos", "delta")),
        "HEAD_RANK=0 HEAD_TYPE=mos HEAD_VARIANT=pr908",
        "HEAD_RANK=513 HEAD_TYPE=mos HEAD_VARIANT=pr266",
        "HEAD_RANK=300 HEAD_TYPE=mos MODEL_DIM=256",
        "RANK_DIM=513",
        "MIXTURE_RANK_DIM=513 HEAD_TYPE=mixture_softmax",
        "HEAD_RANK=1025 HEAD_TYPE=bigram",
        "HEAD_RANK=-1 HEAD_TYPE=delta",
        "HEAD_RANK=1e1 HEAD_TYPE=delta",
        "HEAD_DIM=1 HEAD_TYPE=simplex",
        "HEAD_DIM=65537 HEAD_TYPE=simplex",
        "HEAD_UNTIE_FRAC=1.5 HEAD_TYPE=untied",
        "HEAD_UNTIE_FRAC=-0.1 HEAD_TYPE=untied",
        "HEAD_UNTIE_FRAC=nan HEAD_TYPE=untied",
        "HEAD_UNTIE_FRAC=0.5 HEAD_TYPE=untied HEAD_TRAINABLE=0",
        "HEAD_UNTIE_FRAC=0.5 HEAD_TYPE=untied TRAIN_ONLY=head",
        "HEAD_LR=0.01",
        "HEAD_LR=0.01 HEAD_TYPE=mos",
        "HEAD_LR=0.01 HEAD_TYPE=mos HEAD_VARIANT=pr266",
        *(f"HEAD_MATRIX_LR=0.01 HEAD_TYPE={kind}" for kind in ("tied", "untied", "bigram")),
        "HEAD_MATRIX_LR=-1 HEAD_TYPE=mos",
        "HEAD_LR=-1 HEAD_TYPE=untied",
        "HEAD_LR=inf HEAD_TYPE=untied",
        *(
            f"HEAD_VARIANT=pr908 HEAD_TYPE={kind}"
            for kind in HEADS
            if f"{kind}/pr908" not in VARIANTS
        ),
        *(f"HEAD_VARIANT=pr266 HEAD_TYPE={kind}" for kind in HEADS if kind != "mos"),
        "HEAD_VARIANT=pr1 HEAD_TYPE=mos",
        "HEAD_TRAINABLE=0",
        "HEAD_TRAINABLE=2 HEAD_TYPE=mos",
        "HEAD_TRAINABLE= HEAD_TYPE=mos",
        "TRAIN_ONLY=head",
        "TRAIN_ONLY=trunk HEAD_TYPE=mos",
        "TRAIN_ONLY=head HEAD_TYPE=mos HEAD_TRAINABLE=0",
        "HEAD_TYPE=Tied",
        "HEAD_TYPE=",
        "HEAD_TYPE=mos/pr908",
        "EVAL_SPECTRUM=yes",
    ],
)
def test_wrong_setting_of_a_head_is_refused_in_one_line_that_names_it(env):
    with pytest.raises(UserError) as error:
        from_env(env_of(env))
    assert re.fullmatch(
        re.escape(env.split()[0]) + ": .+", str(error.value)
    ) and "..=inf" not in str(error.value)


@pytest.mark.parametrize(
    "env, expected",
    [
        ("HEAD_TYPE=delta HEAD_RANK=0", dict(head_rank=0)),
        ("HEAD_TYPE=delta HEAD_RANK=512", dict(head_rank=512)),
        ("HEAD_TYPE=wide HEAD_RANK=2048", dict(head_rank=2048)),
        ("HEAD_TYPE=bigram HEAD_RANK=1024", dict(head_rank=1024)),
        ("HEAD_TYPE=simplex HEAD_DIM=2", dict(head_dim=2)),
        ("HEAD_TYPE=mos HEAD_K=1 HEAD_RANK=512", dict(head_k=1)),
        ("HEAD_TYPE=untied HEAD_UNTIE_FRAC=1", dict(head_untie_frac=1.0)),
        ("MODEL_DIM=32 ROPE_DIMS=4", dict(head_rank=64)),
        ("HEAD_TYPE=untied HEAD_TRAINABLE=0", dict(head_trainable=False)),
        ("HEAD_TYPE=wide TRAIN_ONLY=head", dict(train_only="head")),
        ("HEAD_TYPE=untied HEAD_LR=0.5", dict(head_lr=0.5)),
        ("HEAD_TYPE=mos HEAD_VARIANT=pr908 HEAD_LR=0.5", dict(head_lr=0.5)),
    ],
)
def test_setting_at_the_edge_of_a_heads_range_is_accepted(env, expected):
    got = from_env(env_of(env))
    assert {name: getattr(got, name) for name in expected} == expected


@every_kind
@pytest.mark.parametrize("rate, role", [("head_lr", "vocab"), ("head_matrix_lr", "matrix")])
def test_unset_rate_of_a_head_is_its_own_and_reaches_its_parameters(kind, rate, role):
    cls = head_class(settings(kind))
    resolved = from_env({name.upper(): str(value) for name, value in KINDS[kind].items()})
    assert getattr(resolved, rate) == (getattr(cls, rate) if rate in cls.uses else 0.0)
    trainer = start(kind, **{rate: 0.123})
    rates = {
        id(p): group["base_lr"]
        for o in trainer.optimizers
        for group in o.param_groups
        for p in group["params"]
    }
    found = {
        rates[id(p)]
        for name, p in trainer.model.named_parameters()
        if name.startswith("head.") and trainer.roles[name] == role
    }
    needed = role in trainer.model.head.roles.values()
    assert found == ({0.123} if needed else set()) and (rate in cls.uses or not needed)


# ---- A new head ------------------------------------------------------------------------------------------------------


def test_readmes_example_of_a_new_head_trains():
    readme = (Path(train_gpt.__file__).parent / "README.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
        if "(Head)" in block
    ]
    if not blocks:
        pytest.skip("README.md has no ```python block with a class of (Head) yet")
    (example,) = blocks
    with mock.patch.dict(HEADS):
        known = set(HEADS)
        exec(example, dict(vars(train_gpt)))
        (name,) = HEADS.keys() - known
        assert from_env({"HEAD_TYPE": name}).head_type == name
        with mock.patch.dict(KINDS, {name: dict(head_type=name)}):
            test_every_parameter_of_the_head_has_a_role_and_moves_within_three_steps(name)
            test_probabilities_sum_to_one(name)

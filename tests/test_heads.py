"""Every head and variant, in float64: formula, probabilities, gradients, the start at the tied head, rank, training, settings."""

import copy
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, cpu_world, from_env, random_tokens, small

import train_gpt
from train_gpt import GPT, HEADS, VARIANTS, Trainer, UserError, head_class, spectrum

# what a head is called here, and the settings that choose it
KINDS = {name: dict(head_type=name) for name in HEADS}
KINDS["delta, full"] = dict(head_type="delta", head_rank=0)
for variant in VARIANTS:
    KINDS[variant] = dict(zip(("head_type", "head_variant"), variant.split("/")))

OWN = [kind for kind in KINDS if kind != "tied"]  # heads with parameters of their own
AS_TIED = ["tied", "untied", "mos", "delta", "delta, full", "wide", "bigram"]  # at the start
LATE = ["mos", "delta", "delta, full", "wide", "bigram"]  # heads that HEAD_START_FRAC is for
D, V, K, R, M = 6, 11, 3, 2, 4


def new_head(kind, **changes):
    """A float64 head of a small size at its start."""
    size = dict(vocab_size=V, model_dim=D, head_k=K, head_rank=R, head_dim=M)
    s = small(**{**size, **KINDS[kind], **changes})
    return head_class(s)(s).double()


def random_head(kind, **changes):
    """A float64 head none of whose parameters is zero."""
    torch.manual_seed(0)
    head = new_head(kind, **changes)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return head


def inputs(N=5, d=D, v=V):
    """h_ND, x_N, y_N, E_VD, with gradients."""
    g = torch.Generator().manual_seed(1)
    h, E = (torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for n in (N, v))
    x, y = (torch.randint(v, (N,), generator=g) for _ in range(2))
    return h, x, y, E


def close(found, expected, what, rtol=0.0, atol=1e-12):
    """Assert that two tensors agree; a failure says for which head."""
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


# ---- The published formulas, each written without the script's help, up to a constant a row ----


def mixture(gate_NK, logits_KNV):
    pi_KN = F.softmax(gate_NK, -1).T
    return sum(pi[:, None] * F.softmax(z, -1) for pi, z in zip(pi_KN, logits_KNV)).log()


# p is the head, C its cap
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
    def cap(z):
        return c * torch.tanh(z / c) if c else z

    return F.log_softmax(FORMULAS[kind](head, h, x, E, cap), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_follow_the_published_formula(kind):
    h, x, _, E = inputs()
    h, E = 5 * h, 3 * E  # far into the cap
    for c in (30.0, 2.0, 0.0):
        head = random_head(kind, logit_softcap=c)
        close(head.log_probs(h, x, E), published(kind, head, h, x, E, c), c, atol=1e-11)


def test_probabilities_sum_to_one():
    h, x, _, E = inputs()
    for kind in KINDS:
        total = random_head(kind).log_probs(h, x, E).exp().sum(-1)
        close(total, torch.ones_like(total), kind)


def test_the_cap_bounds_log_odds_and_zero_means_no_cap():
    h, x, _, E = inputs(N=20)

    def spread(kind, c):
        log_p = random_head(kind, logit_softcap=c).log_probs(100 * h, x, 10 * E)
        return (log_p.amax(-1) - log_p.amin(-1)).max().item()

    for kind in HEADS:
        assert spread(kind, 3.0) <= 6.0 + 1e-9 < spread(kind, 20.0) <= 40.0 + 1e-9, kind
        assert spread(kind, 0.0) == pytest.approx(spread(kind, 1e9), rel=1e-3), kind


# ---- The loss ----


def check_loss(kind, idle, **changes):
    """nll and its gradients against the target's naive log-probability; `idle` ones may be zero."""
    head, (h, x, y, E) = random_head(kind, **changes), inputs()
    found, naive = head.nll(h, x, y, E), -head.log_probs(h, x, E)[torch.arange(len(y)), y]
    close(found, naive, kind)

    # unequal weights, so that no token's gradient can hide behind another's
    weight = torch.linspace(1, 2, len(y), dtype=torch.float64)
    leaves = dict(h=h, E=E, **dict(head.named_parameters()))
    ours, theirs = (
        torch.autograd.grad((nll * weight).sum(), leaves.values(), allow_unused=True)
        for nll in (found, naive)
    )
    for name, a, b in zip(leaves, ours, theirs):
        what = f"{kind}, {name}"
        if a is None and b is None:
            assert name == "E", what  # a head may do without E, not without its own parameters
            continue
        close(a, b, what, rtol=1e-9)
        assert name in idle or a.abs().max() > 1e-6, what


def test_nll_and_its_gradients_are_those_of_the_naive_target_log_probability():
    for kind in KINDS:
        check_loss(kind, idle=[])
        check_loss(kind, idle=[], logit_softcap=0.0)
        if kind.startswith("mos"):
            idle = ["gate_KD", "gate_bias_K"]  # one gate is always open
            check_loss(kind, idle=idle, head_k=1, head_rank=1)


def test_gradients_equal_finite_differences():
    for kind in KINDS:
        head, (h, x, y, E) = random_head(kind), inputs(N=2)

        def loss(*_, head=head, arguments=(h, x, y, E)):
            return head.nll(*arguments)

        assert torch.autograd.gradcheck(loss, [h, E, *head.parameters()]), kind


# ---- Sizes ----


def test_a_head_has_the_published_number_of_parameters():
    expected = {
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
    for kind, count in expected.items():
        assert sum(p.numel() for p in new_head(kind).parameters()) == count, kind


def env_of(text):
    return dict(pair.split("=", 1) for pair in text.split())


def test_the_studies_models_have_the_published_number_of_parameters():
    mixture_of_a = "HEAD_TYPE=mixture_softmax HEAD_VARIANT=pr908"
    for command, count in {
        "HEAD_TYPE=standard": 26_993_766,
        "HEAD_TYPE=standard RANK_DIM=64 HEAD_VARIANT=pr908": 27_092_070,
        "HEAD_TYPE=standard RANK_DIM=128 HEAD_VARIANT=pr908": 27_190_374,
        f"{mixture_of_a} MIXTURE_SOFTMAX_K=2 MIXTURE_RANK_DIM=64": 27_191_398,
        f"{mixture_of_a} MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=64": 27_389_030,
        f"{mixture_of_a} MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=128": 27_782_246,
        "HEAD_TYPE=simplex SIMPLEX_DIM=128 HEAD_VARIANT=pr908": 27_190_374,
        "PRESET=pilot": 17_059_912,
        "USE_MOS=1 MOS_K=2 MOS_RANK=64 HEAD_VARIANT=pr266": 17_159_240,
    }.items():
        with torch.device("meta"):
            model = GPT(from_env(env_of(command)))
        assert sum(p.numel() for p in model.parameters()) == count, command


# ---- The start ----


def test_a_head_starts_as_the_tied_head():
    h, x, y, _ = inputs(N=40, d=32, v=48)
    for kind in AS_TIED:
        for changes in ({}, dict(head_k=1), dict(logit_softcap=0.0)):
            torch.manual_seed(0)
            s = small(**{**KINDS[kind], **changes, "tied_embed_init_std": 1.0})
            model = GPT(s).double()
            E, tied = model.tok_emb.weight, HEADS["tied"](s)
            expected = tied.log_probs(h, x, E)
            close(model.head.log_probs(h, x, E), expected, kind)
            close(model.head.nll(h, x, y, E), -expected[torch.arange(40), y], kind)


def test_a_replacement_starts_with_the_tied_heads_spread_of_logits():
    size = dict(model_dim=512, vocab_size=1024, head_rank=64, head_dim=128)
    for seed in (0, 1):
        torch.manual_seed(seed)
        h = F.rms_norm(torch.randn(512, 512).double(), (512,))
        E = 0.005 * torch.randn(1024, 512).double()
        spread = {}
        for kind in ("tied", "factorized", "simplex"):
            log_p = new_head(kind, **size).log_probs(h, None, E)
            spread[kind] = log_p.std(dim=-1).mean().item()
        assert spread["factorized"] == pytest.approx(spread["tied"], rel=0.15)
        assert spread["simplex"] == pytest.approx(spread["tied"], rel=0.15)


def test_a_mixtures_components_get_different_gradients_at_the_start():
    torch.manual_seed(0)
    head = new_head("mos", model_dim=64, vocab_size=50, head_rank=8)
    h, x, y, E = inputs(N=64, d=64, v=50)
    head.nll(h, x, y, E).mean().backward()
    g = F.normalize(head.U_KDR.grad.flatten(1), dim=1)
    cosines = (g @ g.T)[~torch.eye(K, dtype=torch.bool)]
    assert head.U_KDR.grad.abs().amax(dim=(1, 2)).min() > 0 and cosines.abs().max() < 0.5


# ---- Rank ----


def singular_values(log_p):
    """Of the centred log-probabilities, over the largest."""
    found = torch.linalg.svdvals(log_p - log_p.mean(-1, keepdim=True))
    return found / found[0].item()


def test_rank_of_random_log_probabilities_without_a_cap():
    d, v = 8, 60
    h, x, _, E = inputs(N=300, d=d, v=v)
    for kind, rank in dict(tied=d, factorized=3, wide=d + 3, mos=v - 1).items():
        head = random_head(kind, model_dim=d, vocab_size=v, head_rank=3, logit_softcap=0.0)
        assert (singular_values(head.log_probs(h, x, E).detach()) > 1e-9).sum() == rank, kind


def test_mos_learns_a_planted_target_beyond_the_rank_bound_that_holds_single_softmaxes():
    d, v, n, k, r = 4, 24, 48, 2, 2
    g = torch.Generator().manual_seed(0)
    target = F.softmax(2 * torch.randn(n, v, generator=g, dtype=torch.float64), -1)
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

    tied, tied_values = fit("tied")
    mixed, mixed_values = fit("mos")
    logits, logits_values = fit("mos/pr908")
    assert tied_values[d] < 1e-12 and logits_values[k * r] < 1e-12 and mixed_values[d + 1] > 0.05
    assert mixed < 0.9 * min(tied, logits)


def spectrum_case(kind, compute_dtype=None, **changes):
    """A model of width 8 with a random head, and tokens."""
    size = dict(model_dim=8, num_heads=1, num_kv_heads=1, vocab_size=40, head_k=K, head_rank=R)
    start = dict(tied_embed_init_std=1.0, train_seq_len=12)
    s = small(**{**size, **start, **KINDS[kind], **changes})
    torch.manual_seed(0)
    model = GPT(s, compute_dtype)
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return model, random_tokens(500, 40), s


def test_the_spectrum_is_that_of_all_whole_sequences_log_probabilities():
    for kind in ("tied", "mos", "bigram", "mos/pr908"):
        model, tokens, s = spectrum_case(kind)
        found = spectrum(model, tokens, s)
        assert {p.dtype for p in model.parameters()} == {torch.float32}  # left as they were
        x_BT = tokens[: 41 * 12].view(41, 12)
        with torch.no_grad():
            h, E = model.hidden(x_BT).flatten(0, 1).double(), model.tok_emb.weight.double()
            log_p = published(kind, model.head.double(), h, x_BT.flatten(), E, 30.0).numpy()
        energy = np.linalg.svd(log_p - log_p.mean(1, keepdims=True), compute_uv=False) ** 2
        share = energy.cumsum() / energy.sum()
        rank, beyond = 1 + np.searchsorted(share, 0.9999), energy[8:].sum() / energy.sum()
        expected = dict(contexts=492, rank_9999=rank, energy_beyond_model_dim=beyond)
        assert found == pytest.approx(expected, rel=1e-6), kind


def test_the_spectrum_finds_nothing_beyond_the_width_of_the_tied_head_without_a_cap_but_of_mos():
    for dtype in (torch.float32, torch.bfloat16):
        tied = spectrum(*spectrum_case("tied", dtype, logit_softcap=0.0))
        mos = spectrum(*spectrum_case("mos", dtype, logit_softcap=0.0))
        assert tied["rank_9999"] <= 8 < mos["rank_9999"]
        assert 0 <= tied["energy_beyond_model_dim"] < 1e-12
        assert mos["energy_beyond_model_dim"] > 1e-3


def test_the_spectrum_takes_65536_contexts_of_a_longer_split_and_few_at_once():
    one = dict(num_layers=1, value_embed=False, xsa_last_n=0, train_seq_len=1000)
    model, _, s = spectrum_case("tied", **one)
    sizes, log_probs = [], model.head.log_probs

    def spy(head, h, x, E):
        sizes.append(len(h))
        return log_probs(h, x, E)

    with mock.patch.object(type(model.head), "log_probs", spy):
        assert spectrum(model, random_tokens(70_000, 40), s)["contexts"] == 66_000
    assert sum(sizes) == 66_000 and max(sizes) <= 2000


# ---- Training ----


def start(kind, **changes):
    """A trainer of a small model whose weights only gradients move."""
    torch.manual_seed(0)
    s = small(**{**KINDS[kind], "muon_weight_decay": 0.0, "adam_wd": 0.0, **changes})
    return Trainer(GPT(s), s, cpu_world())


def batch(seed):
    """Two micro-batches."""
    tokens = random_tokens(100, seed=seed).view(2, 2, 25)
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


def snapshot(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def moved(trainer, before):
    """How far each parameter is from where it was; of a stack, its laziest matrix."""
    distances = {}
    for name, p in trainer.model.named_parameters():
        each = (p.detach() - before[name]).abs().flatten(1 if p.ndim == 3 else 0)
        distances[name] = each.amax(-1).min().item()
    return distances


def test_every_parameter_of_a_head_moves_within_three_steps():
    for kind in OWN:
        trainer = start(kind)
        before = snapshot(trainer)
        losses = [trainer.step(batch(0), 1.0, 0.0).item() for _ in range(3)]
        assert losses[2] < losses[0], kind
        for name, distance in moved(trainer, before).items():
            assert distance > 1e-4 or not name.startswith("head."), (kind, name)


def check_which_move(kind, moving, **changes):
    """Three steps move the parameters for whose name `moving` is true, and their averages; no others."""
    trainer = start(kind, **changes)
    before = snapshot(trainer)
    for seed in range(3):
        trainer.step(batch(seed), 1.0, 0.0)
    for name, distance in moved(trainer, before).items():
        assert (distance > 0) == moving(name), (kind, name)
    for name, average in trainer.exported().items():
        assert torch.equal(average, before[name]) != moving(name), (kind, name)


def test_an_untrainable_head_stays_where_it_starts_while_the_trunk_moves():
    for kind in OWN:
        check_which_move(kind, lambda name: not name.startswith("head."), head_trainable=False)


def test_train_only_head_moves_the_head_alone():
    for kind in OWN:
        check_which_move(kind, lambda name: name.startswith("head."), train_only="head")


def test_a_late_heads_parameters_move_from_its_share_of_training_on_and_not_before():
    decay = dict(muon_weight_decay=0.5, adam_wd=0.5)  # it does not decay either
    for kind in LATE:
        trainer = start(kind, head_start_frac=0.5, **decay)
        before = snapshot(trainer)
        for seed, share in enumerate((0.0, 0.25, 0.499)):
            trainer.step(batch(seed), 1.0, share)
        for name, distance in moved(trainer, before).items():
            assert (distance == 0) == name.startswith("head."), (kind, name)

        for seed, share in enumerate((0.5, 0.75, 1.0)):
            trainer.step(batch(seed), 1.0, share)
        for name, distance in moved(trainer, before).items():
            assert distance > 1e-4, (kind, name)


def compare_with_tied(kind, clip):
    """Largest distance of a late head's run to the tied run, by step: of losses, weights or averages."""
    decay = dict(muon_weight_decay=0.04, adam_wd=0.04, grad_clip_norm=clip)
    tied, late = start("tied", **decay), start(kind, head_start_frac=0.5, **decay)
    for step in range(6):  # the head starts at the fifth
        losses = [trainer.step(batch(step), 1.0, step / 8).item() for trainer in (tied, late)]
        apart = [abs(losses[0] - losses[1])]
        for name, p in tied.model.named_parameters():
            apart.append((p - late.model.get_parameter(name)).abs().max().item())
            apart.append((tied.exported()[name] - late.exported()[name]).abs().max().item())
        yield max(apart)


def test_a_run_with_a_late_head_equals_the_tied_run_until_the_head_starts():
    for kind in LATE:
        apart = list(compare_with_tied(kind, clip=0.0))
        bound = 1e-5 if kind == "mos" else 0.0  # a mixture of equals is tied but for rounding
        assert max(apart[:5]) <= bound and apart[5] > 1e-4, (kind, apart)


def test_gradients_of_a_head_that_has_not_started_do_not_count_in_the_clipped_norm():
    for kind in ("mos", "delta"):
        apart = list(compare_with_tied(kind, clip=0.3))
        assert max(apart[:4]) <= 1e-5 and apart[5] > 1e-4, (kind, apart)


def test_a_checkpoint_before_a_late_head_starts_goes_on_bit_equal():
    for kind in ("mos", "delta"):
        whole, resumed = start(kind, head_start_frac=0.5), start(kind, head_start_frac=0.5)
        whole.step(batch(0), 1.0, 0.0)
        resumed.restore(copy.deepcopy(whole.state()))
        for step in (1, 2, 3):
            whole.step(batch(step), 1.0, step / 4)
            resumed.step(batch(step), 1.0, step / 4)
        assert not any(moved(resumed, snapshot(whole)).values()), kind


def test_an_unset_rate_is_the_heads_own_and_a_set_one_reaches_its_parameters():
    for kind, chosen in KINDS.items():
        s = small(**chosen)
        cls, resolved = head_class(s), from_env({n.upper(): str(v) for n, v in chosen.items()})
        for setting, role in (("head_lr", "head_vocab"), ("head_matrix_lr", "head_matrix")):
            default = getattr(cls, setting) if setting in cls.uses else 0.0
            assert getattr(resolved, setting) == default, (kind, setting)
            for value in (default, 0.123):
                trainer, rates = start(kind, **{setting: value}), set()
                for optimizer in trainer.optimizers:
                    for group in optimizer.param_groups:
                        ids = {id(p) for p in group["params"]}
                        for name, p in trainer.model.named_parameters():
                            if id(p) in ids and trainer.roles[name] == role:
                                rates.add(group["base_lr"])
                has = role in trainer.model.head.roles.values()
                assert rates == ({value} if has else set()), (kind, setting)
                assert setting in cls.uses or not has, (kind, setting)


# ---- Settings ----


def test_a_wrong_setting_of_a_head_is_refused_in_one_line_that_names_it():
    for command in [  # the first variable is the wrong one
        "HEAD_K=0 HEAD_TYPE=mos",
        "HEAD_K=65 HEAD_TYPE=mos",
        "HEAD_K=2.0 HEAD_TYPE=mos",
        "HEAD_K= HEAD_TYPE=mos",
        *(f"HEAD_K=2 HEAD_TYPE={kind}" for kind in HEADS if kind != "mos"),
        *(f"HEAD_DIM=8 HEAD_TYPE={kind}" for kind in HEADS if kind != "simplex"),
        *(f"HEAD_RANK=8 HEAD_TYPE={kind}" for kind in ("tied", "untied", "simplex")),
        *(f"HEAD_RANK=0 HEAD_TYPE={kind}" for kind in ("factorized", "mos", "wide", "bigram")),
        "HEAD_RANK=0 HEAD_TYPE=mos HEAD_VARIANT=pr908",
        "HEAD_RANK=-1 HEAD_TYPE=delta",
        "HEAD_RANK=1e1 HEAD_TYPE=delta",
        "HEAD_DIM=1 HEAD_TYPE=simplex",
        "HEAD_DIM=65537 HEAD_TYPE=simplex",
        "HEAD_START_FRAC=0.5",
        *(f"HEAD_START_FRAC=0.5 HEAD_TYPE={kind}" for kind in HEADS if kind not in LATE),
        *(f"HEAD_START_FRAC=0.5 HEAD_TYPE=mos HEAD_VARIANT={name}" for name in ("pr908", "pr266")),
        "HEAD_START_FRAC=1.5 HEAD_TYPE=delta",
        "HEAD_START_FRAC=-0.1 HEAD_TYPE=delta",
        "HEAD_START_FRAC=nan HEAD_TYPE=delta",
        "HEAD_LR=0.01",
        "HEAD_LR=0.01 HEAD_TYPE=mos",
        "HEAD_LR=0.01 HEAD_TYPE=mos HEAD_VARIANT=pr266",
        *(f"HEAD_MATRIX_LR=0.01 HEAD_TYPE={kind}" for kind in ("tied", "untied", "bigram")),
        "HEAD_MATRIX_LR=-1 HEAD_TYPE=mos",
        "HEAD_LR=-1 HEAD_TYPE=untied",
        "HEAD_LR=inf HEAD_TYPE=untied",
        *(
            f"HEAD_VARIANT=pr908 HEAD_TYPE={kind}"
            for kind in {*HEADS} - {"factorized", "mos", "simplex"}
        ),
        *(f"HEAD_VARIANT=pr266 HEAD_TYPE={kind}" for kind in HEADS if kind != "mos"),
        "HEAD_VARIANT=pr1 HEAD_TYPE=mos",
        "HEAD_TRAINABLE=2 HEAD_TYPE=mos",
        "HEAD_TRAINABLE= HEAD_TYPE=mos",
        "TRAIN_ONLY=head",
        "TRAIN_ONLY=trunk HEAD_TYPE=mos",
        "TRAIN_ONLY=head HEAD_TYPE=mos HEAD_TRAINABLE=0",
        "HEAD_TYPE=Tied",
        "HEAD_TYPE=",
        "HEAD_TYPE=best",
        "HEAD_TYPE=mos/pr908",
        "EVAL_SPECTRUM=yes",
    ]:
        with pytest.raises(UserError) as error:
            from_env(env_of(command))
        line = re.escape(command.split()[0]) + ": must .+"
        assert re.fullmatch(line, str(error.value)), (command, str(error.value))


def test_a_setting_at_the_edge_of_a_heads_range_is_accepted():
    for command, expected in {
        "HEAD_TYPE=delta HEAD_RANK=0": dict(head_rank=0),
        "HEAD_TYPE=delta HEAD_RANK=512": dict(head_rank=512),
        "HEAD_TYPE=wide HEAD_RANK=2048": dict(head_rank=2048),
        "HEAD_TYPE=bigram HEAD_RANK=1024": dict(head_rank=1024),
        "HEAD_TYPE=simplex HEAD_DIM=2": dict(head_dim=2),
        "HEAD_TYPE=mos HEAD_K=1 HEAD_RANK=512": dict(head_k=1),
        "HEAD_TYPE=mos HEAD_START_FRAC=1": dict(head_start_frac=1.0),
        "HEAD_TYPE=delta HEAD_RANK=0 HEAD_START_FRAC=0.67": dict(head_start_frac=0.67),
        "MODEL_DIM=32 ROPE_DIMS=4": dict(head_rank=64),
        "HEAD_TYPE=untied HEAD_TRAINABLE=0": dict(head_trainable=False),
        "HEAD_TYPE=wide TRAIN_ONLY=head": dict(train_only="head"),
        "HEAD_TYPE=untied HEAD_LR=0.5": dict(head_lr=0.5),
        "HEAD_TYPE=mos HEAD_VARIANT=pr908 HEAD_LR=0.5": dict(head_lr=0.5),
    }.items():
        s = from_env(env_of(command))
        assert {name: getattr(s, name) for name in expected} == expected, command


# ---- A new head ----


def test_the_readmes_example_of_a_new_head_trains():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    (example,) = (block for block in blocks if "(Head)" in block)
    with mock.patch.dict(HEADS):
        known = set(HEADS)
        exec(example, dict(vars(train_gpt)))
        (name,) = HEADS.keys() - known
        assert from_env({"HEAD_TYPE": name}).head_type == name
        with mock.patch.dict(KINDS, {name: dict(head_type=name)}):
            trainer = start(name)
            before = snapshot(trainer)
            losses = [trainer.step(batch(0), 1.0, 0.0).item() for _ in range(3)]
            assert losses[0] == pytest.approx(math.log(48), abs=0.05) and losses[2] < losses[0]
            assert min(moved(trainer, before).values()) > 1e-4

"""The trunk against an independent float64 implementation in numpy, its initial values, causality and its switches."""

import itertools
import math
from unittest import mock

import numpy as np
import torch
from conftest import cpu_world, small

import train_gpt
from train_gpt import GPT, HEADS, Trainer, build_model

BOS = 1
SWITCHES = [
    dict(),
    dict(smear_gate=False),
    dict(bigram_hash=False),
    dict(value_embed=False),
    dict(ln_scale=False),
    dict(train_seq_len=2048),
    dict(train_seq_len=2048, use_ntk_rope=False),
    dict(xsa_last_n=0),
    dict(xsa_last_n=4),
    dict(rope_dims=0),
    dict(num_kv_heads=4),
    dict(num_kv_heads=1),
    dict(logit_softcap=0.0),
    dict(init_type="default"),
    dict(num_layers=5, ve_layers="4,0,2"),
    dict(num_layers=2, ve_layers="0", xsa_last_n=1),
    dict(num_layers=1, ve_layers="0", xsa_last_n=1),
    dict(mlp_mult=1, mlp_slope=0.5),
    dict(attn_window=5, num_layers=6),
    dict(bigram_at="input"),
    dict(skip_gates=True),
    dict(loop_layers="1,2"),
    dict(loop_layers="0,2"),
    dict(loop_layers="0,1,2,3", skip_gates=True),
    dict(parallel_from=2),
    dict(  # as in PRESET=best
        num_layers=6,
        loop_layers="2,3",
        parallel_from=4,
        ve_layers="3,5",
        xsa_last_n=6,
        attn_window=7,
        bigram_at="input",
        skip_gates=True,
        mlp_slope=0.5,
    ),
]


def random_model(s):
    """A float64 model in which no parameter has a special value, and exact rotary tables."""
    torch.manual_seed(0)
    model = GPT(s).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.4 if p.ndim == 1 else 0.2))
    angles = torch.from_numpy(rotary_angles(s))
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            exact = torch.stack((angles.cos(), angles.sin())).view_as(table)
            torch.testing.assert_close(table, exact, rtol=0, atol=2e-4)  # made in float32
            module.register_buffer(name, exact, persistent=False)
    return model


def documents(s):
    """Tokens and targets with document starts at the beginning, inside, twice in a row, and at the end."""
    B, T = 2, 24
    tokens = torch.randint(2, s.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    tokens[0, [0, 7, 8, T - 1]] = BOS
    tokens[1, 12] = BOS
    return tokens[:, :-1], tokens[:, 1:]


def other_token(tokens, t, s):
    """Targets and tokens with every sequence's token t replaced."""
    changed = tokens.clone()
    changed[:, t] = 2 + (changed[:, t] + 1) % (s.vocab_size - 2)
    return changed[:, :-1], changed[:, 1:]


# ---- The independent implementation: one sequence, loops, numpy ----


def rotary_angles(s):
    r = s.rope_dims or s.model_dim // s.num_heads
    base = 10000.0
    if s.use_ntk_rope and s.train_seq_len > 1024:
        base = base * (s.train_seq_len / 1024) ** (r / (r - 2))
    return np.arange(s.train_seq_len)[:, None] * np.array(
        [base ** (-2 * i / r) for i in range(r // 2)]
    )


def rms(v):
    return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-7)


def rotate(v, angles):
    half = angles.size
    out = v.copy()
    for i, angle in enumerate(angles):
        a, b = v[i], v[i + half]
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + half] = b * math.cos(angle) - a * math.sin(angle)
    return out


def naive_attention(w, s, layer, x, value):
    """T x D -> T x D, one query head and one position at a time."""
    prefix = f"blocks.{layer}.attn"
    window = s.attn_window if s.attn_window and layer < s.num_layers - 3 else len(x)
    H, G, C = s.num_heads, s.num_kv_heads, s.model_dim // s.num_heads
    q, k, v = (x @ w[f"{prefix}.{name}.weight"].T for name in "qkv")
    v = v if value is None else v + value
    angles, y = rotary_angles(s), np.zeros_like(x)
    for h in range(H):
        g = h // (H // G)
        mine, theirs = slice(h * C, (h + 1) * C), slice(g * C, (g + 1) * C)
        keys = [rotate(rms(k[t, theirs]), angles[t]) for t in range(len(x))]
        for t in range(len(x)):
            query = rotate(rms(q[t, mine]), angles[t]) * w[f"{prefix}.q_gain"][h]
            seen = range(max(0, t + 1 - window), t + 1)
            scores = np.array([query @ keys[i] for i in seen]) / math.sqrt(C)
            p = np.exp(scores - scores.max())
            y[t, mine] = (p / p.sum()) @ v[seen.start : seen.stop, theirs]
            if layer >= s.num_layers - s.xsa_last_n:
                own = v[t, theirs]
                y[t, mine] -= (y[t, mine] @ own) / (own @ own + 1e-7) * own
    return y @ w[f"{prefix}.out.weight"].T


def naive_embeddings(w, s, tokens):
    """The first stream, and the bigram's part, T x D."""
    first = [t == 0 or tokens[t] == BOS for t in range(len(tokens))]

    def smeared(x):
        if not s.smear_gate:
            return x
        gate = 1 / (1 + np.exp(-w["smear.gate"]))
        before = [np.zeros_like(x[0]) if first[t] else x[t - 1] for t in range(len(x))]
        return (1 - gate) * x + gate * np.stack(before)

    x, bigram = w["tok_emb.weight"][tokens], 0.0
    if s.bigram_hash:
        rows = []
        for t, token in enumerate(tokens):
            hashed = (36313 * token ^ 27191 * tokens[t - 1]) % (s.bigram_vocab_size - 1)
            rows.append(s.bigram_vocab_size - 1 if first[t] else hashed)
        bigram = w["bigram.table.weight"][rows] @ w["bigram.proj.weight"].T
    if s.bigram_hash and s.bigram_at == "input":
        return smeared(rms(x + w["bigram.layer_scale"][0] * bigram)), 0.0
    return rms(smeared(x)), bigram


def naive_logits(w, s, tokens):
    """Logits T x V of the tied head for a list of tokens."""
    L = s.num_layers
    x, bigram = naive_embeddings(w, s, tokens)
    x0, lane, stored = x, None, []
    value_layers = sorted(map(int, s.ve_layers.split(","))) if s.value_embed else []
    loop = [int(text) for text in s.loop_layers.split(",")] if s.loop_layers else []
    order = [*range(loop[-1] + 1), *loop, *range(loop[-1] + 1, L)] if loop else [*range(L)]
    half = len(order) // 2
    for place, i in enumerate(order):
        # back come the layers before the middle, the last first, as far as there are weights
        index = place - half
        if 0 <= index < min(half, L // 2) and lane is None:
            skipped = w["skip_weights"][index] * stored[half - 1 - index]
            if s.skip_gates:
                gate = 1 / (1 + np.exp(-w["skip_gates"][index]))
                x = gate * x + (1 - gate) * skipped
            else:
                x = x + skipped
        if s.bigram_hash and s.bigram_at == "layers":
            x = x + w["bigram.layer_scale"][i] * bigram
        if i >= s.parallel_from and lane is None:
            lane = x

        b = f"blocks.{i}"
        x = w[f"{b}.resid_mix"][0] * x + w[f"{b}.resid_mix"][1] * x0
        damp = 1 / math.sqrt(i + 1) if s.ln_scale else 1.0
        value = None
        if i in value_layers:
            value = w["value_embed.table.weight"][tokens] @ w["value_embed.proj.weight"].T
            value = value * w["value_embed.scale"]
            value = value * w["value_embed.layer_scale"][value_layers.index(i)]
        x = x + w[f"{b}.attn_scale"] * naive_attention(w, s, i, rms(x) * damp, value)

        y = x if lane is None else lane
        up = rms(y) * damp @ w[f"{b}.mlp.up.weight"].T
        hidden = np.where(up > 0, up, s.mlp_slope * up) ** 2
        y = y + w[f"{b}.mlp_scale"] * (hidden @ w[f"{b}.mlp.down.weight"].T)
        if lane is None:
            x = y
        else:
            lane = y
        stored.append(x)
    if lane is not None:
        x = w["lane_share"] * x + (1 - w["lane_share"]) * lane
    z = rms(x) @ w["tok_emb.weight"].T
    return s.logit_softcap * np.tanh(z / s.logit_softcap) if s.logit_softcap else z


def test_nll_equals_an_independent_implementation_with_every_switch():
    for switch in SWITCHES:
        s = small(**switch)
        model = random_model(s)
        w = {name: value.numpy() for name, value in model.state_dict().items()}
        x, y = documents(s)
        for tokens, targets, found in zip(x.tolist(), y.numpy(), model.nll(x, y).detach().numpy()):
            z = naive_logits(w, s, tokens)
            expected = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), targets]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=str(switch))


# ---- What a token may see ----


def check_causality(s, places):
    """A replaced token t changes the loss as a target and as an input, and no loss before."""
    model, (x, y) = random_model(s), documents(s)
    tokens = torch.cat((x, y[:, -1:]), dim=1)
    before = model.nll(x, y).detach()
    for t in places:
        after = model.nll(*other_token(tokens, t, s)).detach()
        torch.testing.assert_close(after[:, : t - 1], before[:, : t - 1], rtol=0, atol=1e-12)
        assert (after[:, t - 1 : t + 1] != before[:, t - 1 : t + 1]).all()


def test_a_token_changes_nothing_before_it():
    for switch in SWITCHES:
        check_causality(small(**switch), (1, 7, 13, 23))


def test_no_head_sees_the_target():
    for head in HEADS:
        check_causality(small(head_type=head), (13,))


def test_smear_gate_and_bigram_hash_stop_at_a_document_boundary():
    for switch in SWITCHES[:3] + [dict(bigram_at="input")]:
        model = random_model(small(**switch))
        for block in model.blocks:  # attention alone may look across documents
            torch.nn.init.zeros_(block.attn_scale)
        x = torch.tensor([[5, 9, 11, 13, BOS, 17]])
        other = torch.tensor([[5, 9, 11, 40, BOS, 17]])
        changed = (model.hidden(x) - model.hidden(other)).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [False, False, False, True, False, False], switch
        x[0, 4] = other[0, 4] = 23  # no boundary: what comes before now counts
        assert (model.hidden(x) - model.hidden(other)).abs().amax(-1)[0, 4] > 1e-6, switch


def test_the_last_targets_alone_have_the_same_losses():
    for head in ("tied", "mos", "bigram"):  # the last reads the current tokens too
        s = small(head_type=head)
        model, (x, y) = random_model(s), documents(s)
        whole = model.nll(x, y)
        for last in (1, 5, 24):
            torch.testing.assert_close(model.nll(x, y, last), whole[:, -last:], rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x, y), whole.mean())


def test_a_large_vocabularys_losses_and_gradients_chunk_by_chunk_are_those_of_the_whole():
    for head in HEADS:
        s = small(head_type=head)
        model, (x, y) = random_model(s), documents(s)
        results = []
        for most in (2**27, 7 * s.vocab_size):  # all tokens at once, or 7 at a time
            with mock.patch.object(train_gpt, "MOST_LOGITS", most):
                nll = model.nll(x, y, 20)
            weight = torch.linspace(1, 2, nll.numel(), dtype=torch.float64).view_as(nll)
            model.zero_grad()
            (nll * weight).sum().backward()
            results.append([nll.detach(), *(p.grad.clone() for p in model.parameters())])
        for whole, chunks in zip(*results):
            torch.testing.assert_close(chunks, whole, rtol=1e-9, atol=1e-12)


# ---- Initial values ----


def test_called_as_reviewers_do_the_loss_is_a_scalar_near_ln_vocab():
    x, y = torch.randint(1024, (2, 1, 16))
    loss = train_gpt.GPT(train_gpt.Hyperparameters())(x, y)
    assert loss.shape == () and abs(loss.item() - math.log(1024)) < 0.05


def test_every_head_starts_near_ln_vocab_with_either_initialisation():
    x, y = torch.randint(200, (2, 2, 24), generator=torch.Generator().manual_seed(0))
    for head, init in itertools.product(HEADS, ("ortho", "default")):
        torch.manual_seed(0)
        loss = GPT(small(vocab_size=200, init_type=init, head_type=head))(x, y)
        assert abs(loss.item() - math.log(200)) < 0.05, (head, init)


def test_the_seed_alone_decides_the_initial_trunk_whatever_the_head():
    def trunk(**changes):
        weights = build_model(small(**changes), cpu_world()).named_parameters()
        return torch.cat([p.flatten() for name, p in weights if not name.startswith("head.")])

    first = trunk(seed=5)
    assert not torch.equal(first, trunk(seed=6))
    for head in HEADS:
        torch.rand(7)  # the generator's state before does not matter
        assert torch.equal(first, trunk(seed=5, head_type=head)), head


def initial(**changes):
    size = dict(model_dim=64, num_layers=3, vocab_size=512, ve_dim=24, ve_layers="1,2")
    torch.manual_seed(0)
    return {name: p.detach() for name, p in GPT(small(**size, **changes)).named_parameters()}


RESIDUAL = ("attn.out.weight", "mlp.down.weight", "value_embed.proj.weight")


def matrices(weights):
    """Those of the blocks, and the projections of bigram and value embedding."""
    found = {n: w for n, w in weights.items() if n.endswith(".weight") and n != "tok_emb.weight"}
    return {name: w for name, w in found.items() if "table" not in name}


def test_ortho_matrices_are_orthogonal_and_damped_where_they_join_the_stream():
    found = matrices(initial(init_type="ortho"))
    assert len(found) == 3 * 6 + 2
    for name, w in found.items():
        gain = 1 / math.sqrt(2 * 3) if name.endswith(RESIDUAL) else 1.0
        singular = torch.linalg.svdvals(w)
        expected = torch.full_like(singular, gain)
        torch.testing.assert_close(singular, expected, rtol=1e-5, atol=0, msg=name)


def test_default_matrices_are_pytorchs_and_zero_where_they_join_the_stream():
    for name, w in matrices(initial(init_type="default")).items():
        if name.endswith(RESIDUAL):
            assert not w.any(), name
        else:  # uniform within 1 / sqrt(n_in)
            bound = w.size(1) ** -0.5
            assert w.abs().max() <= bound and abs(w.std().item() * 3**0.5 / bound - 1) < 0.05, name


def test_initial_values_are_the_published_ones():
    constants = {
        "smear.gate": 0.0,
        "bigram.table.weight": 0.0,
        "bigram.layer_scale": 0.05,
        "q_gain": 1.5,
        "attn_scale": 1.0,
        "mlp_scale": 1.0,
        "skip_weights": 1.0,
        "skip_gates": 0.0,
        "lane_share": 0.5,
        "value_embed.scale": 0.1,
        "value_embed.layer_scale": 1.0,
    }
    deviations = {"tok_emb.weight": 0.005, "value_embed.table.weight": 0.01}
    weights = initial(skip_gates=True, parallel_from=2)
    for name, w in weights.items():
        constant = [value for end, value in constants.items() if name.endswith(end)]
        if constant:
            assert (w == constant[0]).all(), name
        elif name.endswith("resid_mix"):
            assert (w[0] == 1).all() and (w[1] == 0).all(), name
        elif name in deviations:
            assert abs(w.std().item() / deviations[name] - 1) < 0.03, name
        else:
            assert name in matrices(weights), name


def test_embedding_std_and_query_gain_follow_their_settings():
    weights = initial(tied_embed_init_std=0.02, qk_gain_init=4.0)
    assert abs(weights["tok_emb.weight"].std().item() / 0.02 - 1) < 0.03
    assert (weights["blocks.2.attn.q_gain"] == 4.0).all()


# ---- Training and arithmetic ----


def test_a_model_learns_with_every_switch():
    for switch in SWITCHES:
        s = small(**switch)
        torch.manual_seed(0)
        trainer = Trainer(GPT(s), s, cpu_world())
        losses = [trainer.step([documents(s)], 1.0, 0.0).item() for _ in range(3)]
        assert losses[0] - 0.05 > losses[1] > losses[2] + 0.05, (switch, losses)


def test_the_looped_layers_run_once_until_their_share_of_training_and_then_twice():
    plain, looped = (small(loop_layers=layers, loop_start_frac=0.5) for layers in ("", "1,2"))
    trainers = []
    for s in (plain, looped):
        torch.manual_seed(0)
        trainers.append(Trainer(GPT(s), s, cpu_world()))
    for share, same in ((0.0, True), (0.499, True), (0.5, False), (1.0, False)):
        losses = [trainer.step([documents(plain)], 1.0, share).item() for trainer in trainers]
        assert (losses[0] == losses[1]) == same, share


def test_bf16_arithmetic_stays_near_float32_and_keeps_float32_masters():
    for head in HEADS:
        s = small(head_type=head)
        torch.manual_seed(0)
        exact = GPT(s)
        coarse = GPT(s, torch.bfloat16)
        coarse.load_state_dict(exact.state_dict())
        x, y = documents(s)
        assert coarse.hidden(x).dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in coarse.parameters())
        assert coarse.nll(x, y).dtype == torch.float32, head
        torch.testing.assert_close(coarse(x, y), exact(x, y), rtol=0, atol=2e-3)

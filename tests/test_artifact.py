"""The export's grid, its size against the cap, its round trip, late QAT on it, and what a hostile file can do."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import struct
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    FINEST,
    GPT,
    HEADS,
    LARGEST,
    LONGEST_HEADER,
    MAGIC,
    VARIANTS,
    Hyperparameters,
    UserError,
    World,
    build_model,
    encode,
    from_codes,
    integer_bytes,
    pack,
    quantized,
    read_artifact,
    read_integers,
    read_payloads,
    to_codes,
    unpack,
    write_payloads,
)

SMALL = dict(
    vocab_size=64,
    num_layers=3,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    bigram_vocab_size=40,
    bigram_dim=16,
    ve_dim=16,
    ve_layers="1",
    xsa_last_n=1,
    train_seq_len=16,
    train_batch_tokens=64,
    head_rank=16,
    head_dim=16,
    eval_stride=8,
    compile="0",
    compute_dtype="fp32",
)
ROLES = ("matrix", "table", "tied", "vocab")  # scalars are not rounded
CODECS = ("zlib", "zstd")
LIMIT = 16_000_000


def small(**changes):
    return dataclasses.replace(Hyperparameters(), **{**SMALL, **changes})


def need_codec(codec):
    return pytest.importorskip("zstandard") if codec == "zstd" else None


def cpu_world():
    world = World()
    world.device = torch.device("cpu")
    return world


def head_settings(name):
    """Of "mos" or "mos/pr908"."""
    head, _, variant = name.partition("/")
    return dict(head_type=head, head_variant=variant)


def random_model(**changes):
    torch.manual_seed(0)
    model = GPT(small(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def whole(model, settings, step=FINEST):
    """The artifact of a model."""
    return encode(model.state_dict(), train_gpt.parameter_roles(model), settings, step)


def gaussian(rows=768, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def student_t(rows=768, columns=512, seed=0):
    """Heavy tails: 3 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns))).float()


KINDS = dict(gaussian=gaussian, student_t=student_t)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_role = pytest.mark.parametrize("role", ROLES)
each_codec = pytest.mark.parametrize("codec", CODECS)


def packed(weight, limit, codec="zlib", role="matrix"):
    return pack({"w": weight}, {"w": role}, small(compress_algo=codec), limit)


def codes_and_scale(weight, role, step, hessian=None):
    """Of one matrix or stack, as rows."""
    hessians = {} if hessian is None else {"w": hessian}
    ((_, (codes,), (scale,)),) = quantized({"w": weight}, {"w": role}, step, hessians)
    return codes, scale.item()


def on_grid(weight, role, step, hessian=None):
    """The weight as it will be after export at this step."""
    codes, scale = codes_and_scale(weight, role, step, hessian)
    return (from_codes(codes) * scale).view_as(weight)


def payload_bytes(weight, role, step, codec="zlib"):
    return sum(map(len, write_payloads({"w": weight}, {"w": role}, step, codec)))


def stored_and_read(weight, role, step, codec="zlib"):
    state, roles = {"w": weight}, {"w": role}
    return read_payloads(write_payloads(state, roles, step, codec), codec, state, roles)["w"]


def as_exported(weight, role, step):
    """The design's rule: scalars exactly, whatever their shape; all else on the grid of its role."""
    return weight if role == "scalar" else on_grid(weight, role, step)


def error_of(found, weight):
    return ((found - weight).square().sum() / weight.square().sum()).item()


# ---- The grid --------------------------------------------------------------------------------------------------------


def roots():
    """The 240 shortest vectors of E8: whoever is nearer than each of them to a point is in its Voronoi cell."""
    whole = [
        [i == j and a or i == k and b for i in range(8)]
        for j in range(8)
        for k in range(j)
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    half = [signs for signs in itertools.product((-0.5, 0.5), repeat=8) if sum(signs) % 2 == 0]
    return torch.tensor(whole + half, dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.3, 2.0, 50.0])
def test_the_point_of_the_codes_is_the_nearest_one_of_the_lattice(spread):
    x = spread * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    points = from_codes(to_codes(x))
    twice = (2 * points).long()
    assert len(roots()) == 240 and torch.equal(twice, (2 * points).round())
    assert ((twice % 2 == twice[0] % 2).all(0)).all() and (
        points.sum(0) % 2 == 0
    ).all()  # all whole or all half, of even sum
    miss = (x - points).double()
    others = (miss.T[:, None] - roots()).square().sum(-1)
    assert (miss.square().sum(0)[:, None] <= others + 1e-4).all()


def test_the_lattice_saves_the_fourteen_percent_of_its_second_moment():
    """0.0716821 a dimension (Conway and Sloane, Sphere Packings, table 2.3) against 1 / 12."""
    x = 100 * torch.rand(8, 40000, generator=torch.Generator().manual_seed(0))
    assert (from_codes(to_codes(x)) - x).square().mean().item() == pytest.approx(
        0.0716821, rel=0.01
    )


@budget(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([1, 3, 100, LARGEST]),
    st.integers(0, 99),
)
def test_any_codes_have_points_whose_codes_they_are(stacked, rows, columns, largest, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, largest + 1, (stacked, rows, columns), generator=draw).float()
    points = from_codes(codes.clone())
    assert torch.equal(to_codes(points), codes)
    assert torch.equal(
        points[:, rows // 8 * 8 :], codes[:, rows // 8 * 8 :]
    )  # the last, fewer than eight rows are plain integers


@each_role
@pytest.mark.parametrize("step", [FINEST, 0.05, 0.15, 1.0, 8.0])
@each_kind
def test_no_weight_is_clipped_and_eight_are_within_a_step_of_their_point(kind, step, role):
    for seed in range(3):
        w = KINDS[kind](203, 64, seed)
        w[5, 3] = 3e5  # an outlier
        q, scale = codes_and_scale(w, role, step)
        assert torch.equal(q, q.round()) and q.abs().max() < 2**15
        miss = (on_grid(w, role, step) - w) / scale
        slack = 1e-6 * (w / scale).abs().max()  # of float32
        assert (
            miss[:200].view(25, 8, 64).square().sum(1).max() <= (1 + slack) ** 2
        )  # E8's covering radius
        assert miss[200:].abs().max() <= 0.5 + slack


@each_role
@pytest.mark.parametrize("kind", [*KINDS, "sign"])
def test_the_finest_step_is_finer_than_plain_int8(kind, role):
    """Integers of 8 bits on a scale by the largest entry, whatever the row."""
    w = torch.sign(gaussian()) if kind == "sign" else KINDS[kind]()
    scale = w.abs().amax(1, keepdim=True) / 127
    off = w + 0.4 * scale * (kind == "sign")  # plain int8 is exact for signs alone
    plain = (off / scale).round() * scale
    assert error_of(on_grid(off, role, FINEST), off) < error_of(plain, off)


@each_role
@pytest.mark.parametrize("step", [FINEST, 0.2])
def test_the_relative_error_does_not_depend_on_a_matrix_s_size_or_its_neighbours(role, step):
    """No floor: down to what float32 can hold."""
    w = gaussian(43, 64)
    usual = on_grid(w, role, step)
    for power in (-109, -90, -30, 30, 90):
        state = {"w": w * 2.0**power, "alike": w, "noise": gaussian(43, 64, seed=1)}
        ((names, codes, scales),) = quantized(state, dict.fromkeys(state, role), step)
        found = dict(zip(names, from_codes(codes) * scales))
        torch.testing.assert_close(found["w"] / 2.0**power, usual, rtol=0, atol=0)
        torch.testing.assert_close(found["alike"], usual, rtol=0, atol=0)


@each_role
def test_a_matrix_of_zeros_stays_zero(role):
    for step in (FINEST, 0.3):
        for zeros in (torch.zeros(20, 32), torch.zeros(3, 32)):
            found = on_grid(zeros, role, step)
            assert not found.any() and torch.isfinite(found).all()


def test_a_stack_is_rounded_as_its_matrices_and_what_makes_logits_more_finely():
    w = gaussian(72, 32).view(3, 24, 32)
    torch.testing.assert_close(
        on_grid(w, "matrix", 0.2), on_grid(w.view(72, 32), "matrix", 0.2).view_as(w), rtol=0, atol=0
    )
    for role, gain in (("table", 3), ("tied", 200), ("vocab", 50)):
        assert error_of(on_grid(w, role, 0.2), w) < error_of(on_grid(w, "matrix", 0.2), w) / gain, (
            role
        )


def test_matrices_rounded_together_are_rounded_as_alone():
    state = {
        name: gaussian(*shape)
        for name, shape in dict(a=(40, 16), b=(16, 40), c=(40, 16), s=(3, 3), d=(40, 16)).items()
    }
    roles = dict(a="matrix", b="matrix", c="matrix", d="tied", s="scalar")
    stacks = [*quantized(state, roles, 0.2)]
    assert sorted(names for names, _, _ in stacks) == [["a", "c"], ["b"], ["d"]]
    for names, codes, scales in stacks:
        for name, code, scale in zip(names, codes, scales):
            alone = codes_and_scale(state[name], roles[name], 0.2)
            assert torch.equal(code, alone[0]) and scale.item() == alone[1], name


# ---- GPTQ ------------------------------------------------------------------------------------------------------------


def correlated(columns, seed=0, rank=None):
    """sum x x^T over inputs whose channels are correlated and of very different sizes, and the inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or columns, columns, generator=draw) * torch.logspace(-1, 1, columns)
    x = torch.randn(4 * columns, rank or columns, generator=draw) @ mix
    return x.T @ x, x


def output_error(found, w, x):
    return ((x @ (found - w).T).square().sum() / (x @ w.T).square().sum()).item()


@pytest.mark.parametrize("step", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("columns", [20, 32, 33, 150])
def test_gptq_at_least_halves_the_error_of_the_outputs_of_correlated_inputs(columns, step):
    w = gaussian(64, columns)
    H, x = correlated(columns, rank=columns // 2)
    assert output_error(on_grid(w, "matrix", step, H), w, x) < 0.5 * output_error(
        on_grid(w, "matrix", step), w, x
    )


def test_gptq_of_inputs_alike_and_uncorrelated_is_plain_rounding():
    w = gaussian(64, 96)
    assert torch.equal(
        codes_and_scale(w, "matrix", 0.2, 3.0 * torch.eye(96))[0],
        codes_and_scale(w, "matrix", 0.2)[0],
    )


def plain_gptq(w, H):
    """Frantar et al. 2022, equation (3), without blocks or a Cholesky factor: the inverse of what remains, column by column."""
    w, order = w.double(), H.diagonal().argsort(descending=True).tolist()
    H = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(len(H), dtype=torch.float64)
    codes = torch.empty_like(w)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        codes[:, column] = to_codes(w[:, column, None])[:, 0]
        error = (w[:, column] - from_codes(codes[:, column, None].clone())[:, 0]) / inverse[0, 0]
        w[:, rest[1:]] -= error[:, None] * inverse[0, 1:]
    return codes


def test_gptq_is_the_paper_s_column_by_column_rule():
    H, _ = correlated(70)
    exact = 4 * gaussian(24, 70)
    found = train_gpt.gptq(exact[None].double(), H[None])[0]
    assert torch.equal(found, plain_gptq(exact, H))


def test_gptq_of_a_stack_is_that_of_its_matrices_and_survives_inputs_that_never_vary():
    w = gaussian(48, 40).view(3, 16, 40)
    hessians = [correlated(40)[0], torch.zeros(40, 40), correlated(40, rank=1)[0]]
    together = train_gpt.gptq(6 * w, torch.stack(hessians))
    for m, H, found in zip(w, hessians, together):
        assert (
            torch.equal(found, train_gpt.gptq(6 * m[None], H[None])[0]) and found.isfinite().all()
        )


def test_calibration_sums_the_inputs_of_every_linear_and_of_the_logits(demo):
    s = small(
        vocab_size=1024,
        train_seq_len=64,
        train_batch_tokens=2**15,
        data_path=str(demo),
        head_type="bigram",
    )
    shards, world = train_gpt.Shards(demo, "train", 1024), cpu_world()
    trainer = train_gpt.Trainer(build_model(s, world), s, world)
    found, seen = trainer.hessians(shards), {}
    model = build_model(s, world, trainer.exported())
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, train_gpt.Linear)
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0])
        )
    with torch.no_grad():
        for step in (0, 1):  # 65,536 tokens
            for x, _ in train_gpt.train_batch(shards, step, s, world):
                seen.setdefault("tok_emb.weight", []).append(model.hidden(x))
    assert (
        found.keys() == seen.keys() == {"tok_emb.weight", *(f"{name}.weight" for name in linears)}
    )
    for name, inputs in seen.items():
        x = torch.cat([part.flatten(0, -2) for part in inputs])
        assert len(x) == 2**16
        torch.testing.assert_close(found[name], x.T @ x, rtol=1e-4, atol=1e-3)


def test_an_artifact_by_gptq_meets_its_limit_and_loses_less():
    model = random_model(model_dim=64, vocab_size=64, head_type="tied")
    state, roles, s = model.state_dict(), train_gpt.parameter_roles(model), small(model_dim=64)
    hessians = {
        name: correlated(weight.size(-1), rank=weight.size(-1) // 2)[0]
        for name, weight in state.items()
        if roles[name] == "matrix"
    }
    limit = int(0.6 * len(pack(state, roles, s, 10**9)[0]))
    (plain, _), (blob, _) = pack(state, roles, s, limit), pack(state, roles, s, limit, hessians)
    assert 0.995 * limit <= len(blob) <= limit and pack(state, roles, s, limit, hessians)[0] == blob
    found, usual = unpack(blob)[1], unpack(plain)[1]
    for name in hessians:
        x = correlated(state[name].size(-1), rank=state[name].size(-1) // 2)[1]
        assert output_error(found[name], state[name], x) < 0.5 * output_error(
            usual[name], state[name], x
        ), name


def test_only_what_makes_logits_has_the_fine_role():
    for head in (*HEADS, *VARIANTS):
        model = random_model(**head_settings(head))
        roles = train_gpt.parameter_roles(model)
        unused = head in ("untied", "factorized", "simplex") or head.endswith("pr908")
        assert roles["tok_emb.weight"] == ("table" if unused else "tied"), head
        assert {role for name, role in roles.items() if ".table." in name} == {"table"}


# ---- Size ------------------------------------------------------------------------------------------------------------


@each_codec
@each_kind
def test_pack_uses_the_limit_to_within_half_a_percent_and_is_deterministic(kind, codec):
    need_codec(codec)
    w = KINDS[kind]()
    plain = len(packed(w, 10**9, codec)[0])
    for share in (0.9, 0.7, 0.5, 0.3):
        limit = int(share * plain)
        blob, step = packed(w, limit, codec)
        assert 0.995 * limit <= len(blob) <= limit and step > FINEST
    assert packed(w, limit, codec) == (blob, step)


@each_codec
@pytest.mark.parametrize("slack", [0, 1, 10**6])
def test_pack_takes_the_finest_step_where_that_fits(slack, codec):
    need_codec(codec)
    w = gaussian(200, 100)
    blob, step = packed(w, 10**9, codec)
    assert step == FINEST
    assert packed(w, len(blob) + slack, codec) == (blob, FINEST)
    assert packed(w, len(blob) - 1, codec)[1] > FINEST


def test_the_fit_finds_the_finest_step_and_says_where_there_is_none():
    for scale in (1, 1e3, 1e9):

        def size(step, scale=scale):
            return scale * (100 - 7 * math.log2(step) + step**-0.5)

        for step in (0.01, 0.1, 1.0, 5.0):
            found = train_gpt.fit(size, size(step))
            assert step <= found and 0.999 * size(step) <= size(found) <= size(step)

        def shelf(step, scale=scale):  # as where the largest entry and not the step sets the scale
            return scale * (100 if step < 0.3 else 30 / step)

        assert 0.999 * 99 * scale <= shelf(train_gpt.fit(shelf, 99 * scale)) <= 99 * scale
        assert train_gpt.fit(size, size(FINEST)) == FINEST == train_gpt.fit(size, 1e30)
        assert train_gpt.fit(size, 0.9 * size(train_gpt.COARSEST)) == train_gpt.COARSEST


def test_a_mixed_model_also_meets_its_limit():
    model = random_model(model_dim=128, vocab_size=512, bigram_vocab_size=512, head_type="mos")
    state, roles, s = model.state_dict(), train_gpt.parameter_roles(model), small()
    limit = int(0.6 * len(pack(state, roles, s, 10**9)[0]))
    assert 0.995 * limit <= len(pack(state, roles, s, limit)[0]) <= limit


def entropy(integers):
    """Of order 0, in bytes for all of them."""
    _, counts = np.unique(integers.numpy(), return_counts=True)
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


@each_codec
@each_role
@each_kind
@pytest.mark.parametrize("step", [FINEST, 0.03, 0.05, 0.12, 0.158, 0.3])
def test_payloads_are_near_the_order_0_entropy_of_the_integers(step, kind, role, codec):
    """Within 1.5% for deflate, 1.7% where an integer has less than 4 bits; 3% for zstd, whose Huffman tables cost a little more."""
    need_codec(codec)
    w = KINDS[kind](1024, 512)
    ideal = entropy(codes_and_scale(w, role, step)[0])
    allowed = dict(zlib=1.015 if ideal >= w.numel() / 2 else 1.017, zstd=1.03)[codec]
    assert payload_bytes(w, role, step, codec) <= allowed * ideal


@each_codec
@pytest.mark.parametrize("step", [0.1, 0.158, 0.3])
def test_payloads_of_a_model_are_near_the_order_0_entropy_of_its_integers(step, codec):
    """All tensors together, at the study's shares of roles (heavy tails)."""
    need_codec(codec)
    state, roles, ideal = {}, {}, 0
    for i, (role, rows) in enumerate(
        [*[("matrix", 1536)] * 8, ("table", 512), ("tied", 256), ("scalar", 8)]
    ):
        state[f"{i}"], roles[f"{i}"] = student_t(rows, 512, seed=i), role
        ideal += (
            2048 * rows
            if role == "scalar"
            else entropy(codes_and_scale(state[f"{i}"], role, step)[0])
        )
    assert (
        sum(map(len, write_payloads(state, roles, step, codec)))
        <= dict(zlib=1.015, zstd=1.03)[codec] * ideal
    )


QUANTIZERS = {  # levels, clipping quantile, codec at its highest level: study A with either codec, study B
    "int6 zlib": (31, 1.0, "zlib"),
    "int6 zstd": (31, 1.0, "zstd"),
    "int8 zlib": (127, 0.9999984, "zlib"),
}
SHORT = {  # where the 25% are not reached, what was measured, and why
    (
        "student_t",
        0.04,
        "int6 zstd",
    ): "19%: their floor makes an even grid of 2 levels a deviation, as ours is; the rest is E8"
}


def studies_rounding(weight, levels, quantile):
    """What both studies store of a matrix: integers of rows scaled by absmax or a quantile, and scales with their floor."""
    top = torch.quantile(weight.abs(), quantile, dim=1, keepdim=True)
    scale = (top / levels).clamp_min(1 / levels).half()
    q = (weight.clamp(-top, top) / scale.float()).round().clamp(-levels, levels)
    return q.to(torch.int8).numpy().tobytes() + scale.numpy().tobytes(), q * scale.float()


@pytest.mark.parametrize(
    "kind, size, quantizer",
    [
        pytest.param(
            *case,
            marks=[pytest.mark.xfail(reason=SHORT[case], raises=AssertionError, strict=True)]
            if case in SHORT
            else [],
        )
        for case in (
            (kind, size, quantizer)
            for kind in KINDS
            for size in (1.0, 0.04)
            for quantizer in QUANTIZERS
        )
    ],
)
def test_error_at_equal_bytes_is_well_below_that_of_the_studies_quantizers(kind, size, quantizer):
    levels, quantile, codec = QUANTIZERS[quantizer]
    w = size * KINDS[kind](1024, 512)
    raw, theirs = studies_rounding(w, levels, quantile)
    limit = len(
        zlib.compress(raw, 9)
        if codec == "zlib"
        else need_codec(codec).ZstdCompressor(level=22).compress(raw)
    )
    ours = on_grid(w, "matrix", train_gpt.fit(lambda step: payload_bytes(w, "matrix", step), limit))
    assert error_of(ours, w) <= (1 - dict(gaussian=0.10, student_t=0.25)[kind]) * error_of(
        theirs, w
    )


# ---- Round trip ------------------------------------------------------------------------------------------------------


@budget(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(0, 15), st.integers(0, 15), st.integers(0, 99))
def test_integers_survive_however_they_are_spread(count, bits, outlier, seed):
    codes = torch.randint(
        -(2**bits) + 1, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)
    ).float()
    codes[seed % count] = (-1) ** seed * (2**outlier - 1)
    raw = integer_bytes(codes)
    assert torch.equal(read_integers(raw, count), codes)
    for bad in (
        raw + b"x",
        raw + b"xy",
        raw[:-1],
        raw[:-2],
        bytes([raw[0] + 1]) + raw[1:],
        bytes([13]) + raw[1:],
    ):
        with pytest.raises((ValueError, IndexError)):
            read_integers(bad, count)


def test_scalars_survive_bit_for_bit():
    """Of all patterns of bits, those of numbers."""
    values = torch.from_numpy(
        np.random.default_rng(0).integers(-(2**31), 2**31, 10**5, dtype=np.int32)
    ).view(torch.float32)
    state = dict(
        a=values[values.isfinite()],
        b=torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [3.4e38, 0.1]]),
        c=torch.tensor(0.3),
    )
    roles = dict.fromkeys(state, "scalar")
    found = read_payloads(write_payloads(state, roles, 0.3, "zlib"), "zlib", state, roles)
    for name, value in state.items():
        assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name


@each_codec
@pytest.mark.parametrize("head", [*HEADS, *VARIANTS])
@pytest.mark.parametrize("step", [FINEST, 0.13])
def test_unpacked_weights_are_those_of_the_grid_and_settings_survive(step, head, codec):
    need_codec(codec)
    s = small(compress_algo=codec, rope_base=12345.5, **head_settings(head))
    model = random_model(compress_algo=codec, **head_settings(head))
    state, roles = model.state_dict(), train_gpt.parameter_roles(model)
    stored, found = unpack(encode(state, roles, s, step))
    assert list(found) == list(state)
    for name, weight in state.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], as_exported(weight, roles[name], step)), name
    for field in dataclasses.fields(s):
        if field.metadata["scope"] == "model":
            assert stored[field.name] == getattr(s, field.name)
    assert stored["eval_stride"] == s.eval_stride and "seed" not in stored


def test_the_default_batch_does_not_bear_on_an_artifact():
    """A sequence length that does not divide it, though it divided the run's own."""
    changes = dict(train_seq_len=100, train_batch_tokens=400)
    stored, _ = unpack(whole(random_model(**changes), small(**changes)))
    assert train_gpt.from_env({"MODE": "eval"}, defaults=stored).train_seq_len == 100


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(num_layers=40), "skip_weights"),
        (dict(head_type="mos", head_k=20), "head.gate_KD"),
        ({}, "blocks.0.resid_mix"),
    ],
)
def test_scalars_are_exact_whatever_their_shape_and_size(changes, name):
    model = random_model(**changes)
    weight = dict(model.named_parameters())[name].detach()
    weight.view(-1)[:6] = torch.tensor([1e6, -3.0000002, 1e-3, 1e-45, 3e38, 0.1])
    found = unpack(whole(model, small(**changes), step=0.3))[1][name]
    assert weight.ndim == 2 and torch.equal(found, weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_layers=1, ve_layers="0"),
        dict(head_type="mos"),
        dict(value_embed=False, bigram_hash=False, smear_gate=False),
    ],
    ids=str,
)
def test_a_loaded_artifact_computes_what_the_rounded_model_does(changes, tmp_path):
    model, world = random_model(**changes), cpu_world()
    roles, s, path = (
        train_gpt.parameter_roles(model),
        small(**changes),
        tmp_path / "final_model.int8.ptz",
    )
    blob, step = pack(model.state_dict(), roles, s, 10**9)
    path.write_bytes(blob)
    stored, state = read_artifact("ARTIFACT", path, len(blob), world)
    loaded = build_model(train_gpt.from_env({}, defaults=stored), world, state)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(as_exported(p, roles[name], step))
    x, y = torch.randint(64, (2, 3, 16))
    assert torch.equal(loaded(x, y), model(x, y))


@pytest.mark.parametrize(
    "changes",
    [dict(num_layers=4), dict(mlp_mult=2), dict(head_type="mos"), dict(head_type="untied")],
    ids=str,
)
def test_an_artifact_of_other_tensors_than_its_settings_is_refused(changes):
    """The last case differs from its settings in the tied embedding's role and one tensor."""
    assert refused(whole(random_model(), small(**changes))) and refused(
        whole(random_model(**changes), small())
    )


@pytest.mark.parametrize("variable", ["ARTIFACT", "INIT_FROM"])
def test_an_artifact_above_the_size_limit_is_refused_before_it_is_read(variable, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(GENUINE)
    assert read_artifact(variable, path, len(GENUINE), cpu_world())
    with pytest.raises(
        UserError,
        match=f"^{variable}={re.escape(str(path))}: .*SIZE_LIMIT_BYTES={len(GENUINE) - 1}",
    ):
        read_artifact(variable, path, len(GENUINE) - 1, cpu_world())
    os.truncate(path, 2**26)

    def attempt():
        with pytest.raises(UserError, match=f"{2**26} bytes"):
            read_artifact(variable, path, LIMIT, cpu_world())

    assert peak_bytes(attempt) < 2**20


# ---- Late QAT --------------------------------------------------------------------------------------------------------


def test_rounded_weights_lie_on_the_grid_inside_and_come_back_bit_for_bit():
    model = random_model()
    roles, before = train_gpt.parameter_roles(model), copy.deepcopy(model.state_dict())
    with train_gpt.rounded_weights(model, roles, 0.3):
        for name, p in model.named_parameters():
            assert torch.equal(p, as_exported(before[name], roles[name], 0.3)), name
            assert torch.equal(p, before[name]) == (roles[name] == "scalar"), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with train_gpt.rounded_weights(model, roles, None):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rounded_weights_come_back_when_the_body_raises():
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(KeyError),
        train_gpt.rounded_weights(model, train_gpt.parameter_roles(model), 0.3),
    ):
        raise KeyError("an interruption")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_are_taken_at_the_rounded_weights():
    model, x, y = random_model(), *torch.randint(64, (2, 3, 16))
    roles, rounded = train_gpt.parameter_roles(model), random_model()
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            p.copy_(as_exported(p, roles[name], 0.5))
    with train_gpt.rounded_weights(model, roles, 0.5):
        model(x, y).backward()
    rounded(x, y).backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters()):
        assert torch.equal(p.grad, q.grad), name


# ---- Hostile files ---------------------------------------------------------------------------------------------------


def sealed(body):
    return MAGIC + hashlib.sha256(body).digest() + body


def forged(header, payloads, length=None):
    """An artifact with a right checksum around any header (an object, or its bytes) and payloads."""
    header = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return sealed(struct.pack("<I", len(header) if length is None else length) + header + payloads)


def header_of(blob):
    size = struct.unpack("<I", blob[40:44])[0]
    return json.loads(blob[44 : 44 + size]), blob[44 : 44 + size], blob[44 + size :]


def genuine(codec="zlib"):
    if codec == "zstd":
        need_codec(codec)
    changes = dict(bigram_hash=False, value_embed=False, num_layers=2, compress_algo=codec)
    return whole(random_model(**changes), small(**changes))


GENUINE = genuine()
HEADER, RAW_HEADER, PAYLOADS = header_of(GENUINE)


def parts_of(header, payloads):
    """The compressed codes of each matrix, and the compressed rest."""
    return [payloads[start:stop] for start, stop in itertools.pairwise(header["ends"])]


ENDS, (*PARTS, LAST) = HEADER["ends"], parts_of(HEADER, PAYLOADS)
RAW_CODES, REST = [*map(zlib.decompress, PARTS)], zlib.decompress(LAST)
CODES = b"".join(RAW_CODES)


def open_artifact(blob):
    """As MODE=eval opens it: the settings, and the model that they are for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(blob)
        stored, state = read_artifact("ARTIFACT", path, LIMIT, cpu_world())
    settings = train_gpt.from_env({}, defaults=stored)
    return settings, build_model(settings, cpu_world(), state)


def refused(blob):
    """True for a UserError of one line that names the file; any other exception passes through."""
    try:
        open_artifact(blob)
    except UserError as error:
        assert str(error).isprintable() and str(error).startswith("ARTIFACT=/")
        return True
    return False


def altered(**changes):
    return forged({**HEADER, **changes}, PAYLOADS)


def with_tensor(index=1, name=None, role=None, shape=None):
    """Another entry for the token embedding (tied, 64 x 32), or for another tensor."""
    tensors = copy.deepcopy(HEADER["tensors"])
    for place, value in enumerate((name, role, shape)):
        if value is not None:
            tensors[index][place] = value
    return altered(tensors=tensors)


def with_settings(**changes):
    return altered(settings={**HEADER["settings"], **changes})


def with_parts(parts, header=HEADER):
    return forged({**header, "ends": [0, *itertools.accumulate(map(len, parts))]}, b"".join(parts))


def with_payloads(codes, rest, codec="zlib", header=HEADER):
    """Other codes of all matrices, cut where the genuine ones are, and another rest."""
    cuts = [0, *itertools.accumulate(map(len, RAW_CODES[:-1])), len(codes)]
    return with_parts(
        [
            train_gpt.compress(raw, codec)
            for raw in (*(codes[a:b] for a, b in itertools.pairwise(cuts)), rest)
        ],
        header,
    )


def test_the_forgers_tools_can_make_a_genuine_artifact():
    assert forged(RAW_HEADER, PAYLOADS) == GENUINE == altered() == with_parts([*PARTS, LAST])
    assert not any(
        map(
            refused,
            (GENUINE, with_settings(rope_base=500.0), with_tensor(), with_payloads(CODES, REST)),
        )
    )


def shaped(tensor_shape, count):
    """A header whose only tensor claims a shape, over payloads of `count` bytes."""
    return with_payloads(
        bytes(count), bytes(count), header={**HEADER, "tensors": [["w", "matrix", tensor_shape]]}
    )


def twins():
    """Whole in every length, but two tensors bear one name."""
    tensors = [*HEADER["tensors"], HEADER["tensors"][0]]
    state = {f"{i}": torch.randn(shape) for i, (_, _, shape) in enumerate(tensors)}
    roles = {f"{i}": role for i, (_, role, _) in enumerate(tensors)}
    return with_parts(write_payloads(state, roles, FINEST, "zlib"), {**HEADER, "tensors": tensors})


VECTOR = next(
    i
    for i, (_, role, shape) in enumerate(HEADER["tensors"])
    if role == "scalar" and len(shape) == 1
)
HOSTILE = {
    "empty": b"",
    "magic only": MAGIC,
    "wrong magic": b"GPTHEAD9" + GENUINE[8:],
    "no body": sealed(b""),
    "newer magic": MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + GENUINE[8:],
    "three bytes of body": sealed(b"abc"),
    "no header": sealed(bytes(4)),
    "zip": b"PK\x03\x04" + bytes(100),
    "wrong checksum": GENUINE[:8] + bytes(32) + GENUINE[40:],
    "trailing byte": GENUINE + b"x",
    "header longer than file": forged(RAW_HEADER, PAYLOADS, 2**32 - 1),
    "header cut": forged(RAW_HEADER, PAYLOADS, 100),
    "header takes payload": forged(RAW_HEADER, PAYLOADS, len(RAW_HEADER) + 5),
    "not json": forged(b"{ends:1}", PAYLOADS),
    "header longer than any": forged(RAW_HEADER + b" " * LONGEST_HEADER, PAYLOADS),
    "not utf-8": forged(b"\xff\xfe\xfa" + RAW_HEADER, PAYLOADS),
    "deep json": forged(b"[" * 200000, PAYLOADS),
    "deep settings": forged(b'{"settings":' + b'{"a":' * 100000, PAYLOADS),
    "deep closed": forged(
        RAW_HEADER[:-1] + b',"x":' + b"[" * 100000 + b"]" * 100000 + b"}", PAYLOADS
    ),
    "huge number": forged(b'{"ends":' + b"9" * 10000 + b"}", PAYLOADS),
    "trailing payload": forged(RAW_HEADER, PAYLOADS + b"x"),
    "no payload": forged(RAW_HEADER, b""),
    "gap between payloads": with_parts([PARTS[0] + b"x", *PARTS[1:], LAST]),
    "payloads in turn": with_parts([LAST, *PARTS]),
    "payload lost": with_parts([*PARTS[1:], LAST]),
    "payload too many": with_parts([*PARTS, PARTS[0], LAST]),
    "payloads overlap": altered(ends=[0, *ENDS]),
    "payload cut": forged(RAW_HEADER, PAYLOADS[:-9]),
    "payload not deflate": forged(RAW_HEADER, b"\0" * 50),
    **{
        f"payloads of {low} and {high} bytes too many": with_payloads(
            (CODES + b"x")[: len(CODES) + low], (REST + b"x")[: len(REST) + high]
        )
        for low in (-1, 0, 1)
        for high in (-1, 0, 1)
        if low or high
    },
    "one number for all scales and scalars": with_payloads(CODES, REST[:4]),
    **{
        f"header is {value!r}": forged(json.dumps(value).encode(), PAYLOADS)
        for value in (None, 3, [], {}, "x", [[]])
    },
    **{
        f"no {key}": forged({k: v for k, v in HEADER.items() if k != key}, PAYLOADS)
        for key in HEADER
    },
    **{
        f"codec {value!r}": with_settings(compress_algo=value)
        for value in ("lzma", "zstd", "", None, 1, [], {})
    },
    **{
        f"ends {value!r}": altered(ends=value)
        for value in (
            None,
            3,
            "abc",
            {},
            [],
            [0],
            [0, len(PAYLOADS)],
            ENDS[1:],
            ENDS[:-1],
            ENDS[::-1],
            [ENDS],
            ["0", *ENDS[1:]],
            [*ENDS, len(PAYLOADS)],
        )
    },
    **{
        f"end {value!r}": altered(ends=[*ENDS[:2], value, *ENDS[3:]])
        for value in (
            -1,
            -ENDS[2],
            ENDS[2] - len(PAYLOADS),
            0,
            1,
            ENDS[2] - 1,
            ENDS[2] + 1,
            len(PAYLOADS),
            len(PAYLOADS) + 1,
            ENDS[2] + 2**32,
            10**30,
            True,
            False,
            float(ENDS[2]),
            ENDS[2] + 0.5,
            math.nan,
            math.inf,
            str(ENDS[2]),
            None,
            [ENDS[2]],
            {},
        )
    },
    **{
        f"tensors {value!r}": altered(tensors=value)
        for value in (None, 3, "abc", {}, [], [1], [[]], [["a"]], {"abc": 1})
    },
    **{
        f"role {value!r}": with_tensor(role=value)
        for value in (
            "int4",
            "int8",
            "matrix",
            "table",
            "vocab",
            "scalar",
            "float32",
            "load",
            "",
            7,
            ["tied"],
            {},
        )
    },
    **{
        f"codes of {8 + n} bits": with_payloads(bytes([n]) + CODES[1:], REST)
        for n in range(256)
        if n != CODES[0]
    },
    **{
        f"name {value!r}": with_tensor(name=value)
        for value in (3, ["a"], {}, True, "", "tok_emb", "__class__")
    },
    **{
        f"shape {value!r}": with_tensor(shape=value)
        for value in (
            [-64, 32],
            [64, -32],
            [-64, -32],
            [0, 32],
            [64, 0],
            [True, 2048],
            [64.0, 32],
            ["64", 32],
            [None],
            "ab",
            5,
            {},
            {"a": 1},
            [[64, 32]],
            [64, 33],
            [63, 32],
            [32, 64],
            [64, 32, 2],
            [10**12],
            [10**6, 10**6],
            [2**63, 2],
            [2**64],
            [10**30],
            [1] * 500 + [64, 32],
        )
    },
    "integers without shape": shaped([], 3),
    "vector of integers": shaped([4], 6),
    "many dimensions": shaped([1] * 2000, 3),
    "wrong row length": with_tensor(VECTOR, shape=[7]),
    "duplicated name": with_tensor(1, name=HEADER["tensors"][0][0]),
    "duplicated tensor": altered(tensors=HEADER["tensors"] + HEADER["tensors"][:1]),
    "two tensors of one name": twins(),
    "other order": altered(tensors=HEADER["tensors"][::-1]),
    "extra tensor": altered(tensors=[*HEADER["tensors"], ["extra", "scalar", [4]]]),
    "missing tensor": altered(tensors=HEADER["tensors"][:-1]),
    **{
        f"settings {value!r}": altered(settings=value)
        for value in (None, 3, "abc", [], [["a", 1]], [1], True)
    },
    "missing setting": altered(
        settings={k: v for k, v in HEADER["settings"].items() if k != "mlp_mult"}
    ),
    **{
        f"setting {name}={value!r}": with_settings(**{name: value})
        for name, value in (
            ("unknown", 1),
            ("seed", 1),
            ("artifact", "x"),
            ("size_limit_bytes", 2**50),
            ("data_path", "/"),
            ("__class__", 1),
            ("num_layers", "3"),
            ("num_layers", 2.0),
            ("num_layers", 0),
            ("num_layers", -1),
            ("num_layers", True),
            ("num_layers", None),
            ("num_layers", [2]),
            ("num_layers", 10**9),
            ("vocab_size", 2**40),
            ("model_dim", 33),
            ("model_dim", 0),
            ("num_heads", 0),
            ("rope_base", "x"),
            ("rope_base", None),
            ("rope_base", math.nan),
            ("rope_base", math.inf),
            ("rope_base", -1.0),
            ("head_type", "none"),
            ("head_type", 3),
            ("head_type", ["tied"]),
            ("head_type", "untied"),
            ("head_variant", "pr908"),
            ("smear_gate", 2),
            ("smear_gate", "yes"),
            ("init_type", "x"),
            ("logit_softcap", -1.0),
            ("eval_stride", 10**6),
            ("eval_stride", "64"),
        )
    },
    **{
        f"value layers {value!r}": with_settings(value_embed=True, ve_layers=value)
        for value in (9, "x", None, "1")
    },
}
TOLERATED = {"shape [64.0, 32]"}  # may be refused or loaded; all others must be refused


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_artifact_is_a_users_error(case):
    assert refused(HOSTILE[case]) or case in TOLERATED


@each_codec
def test_bytes_hidden_behind_a_payload_are_refused(codec):
    header, _, payloads = header_of(genuine(codec))
    parts = parts_of(header, payloads)
    assert not refused(with_parts(parts, header))
    for i in range(len(parts)):
        assert refused(with_parts([*parts[:i], parts[i] + b"hidden", *parts[i + 1 :]], header))


@pytest.mark.parametrize("case", ["trailing payload", "payload cut", "no payload"])
def test_hostile_zstd_payload_is_a_users_error(case):
    need_codec("zstd")
    blob = genuine("zstd")
    _, header, payload = header_of(blob)
    assert not refused(blob)
    change = {"trailing payload": payload + b"x", "payload cut": payload[:-9], "no payload": b""}
    assert refused(forged(header, change[case]))
    assert refused(forged(header, PAYLOADS)) and refused(forged(RAW_HEADER, payload))


@each_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["skip_weights", "smear.gate", "tok_emb.weight", "blocks.1.mlp.down.weight"]
)
def test_weights_that_are_no_numbers_are_refused(name, value, codec):
    """The last two have scales that are no numbers."""
    need_codec(codec)
    changes = dict(bigram_hash=False, value_embed=False, num_layers=2, compress_algo=codec)
    model = random_model(**changes)
    dict(model.named_parameters())[name].data.view(-1)[-1] = value
    for step in (FINEST, 0.3):
        assert refused(whole(model, small(**changes), step))


def peak_bytes(action):
    """Of Python, numpy, zlib and zstandard; torch's tensors are not seen."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@functools.cache
def bomb(codec):
    """1 GiB of zeros."""
    if codec == "zstd":
        return need_codec(codec).ZstdCompressor(level=1).compress(bytes(2**30))
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(2**20)) for _ in range(1024)) + deflate.flush()


def claim(codec="zlib", **changes):
    """The true header of a model of any size."""
    s = small(compress_algo=codec, **changes)
    with torch.device("meta"):
        model = GPT(s)
    tensors = train_gpt.layout(dict(model.named_parameters()), train_gpt.parameter_roles(model))
    return {
        **HEADER,
        "tensors": tensors,
        "settings": {name: getattr(s, name) for name in HEADER["settings"]},
    }


@each_codec
@pytest.mark.parametrize("place", ["codes", "rest", "both"])
def test_a_bomb_is_not_inflated(place, codec):
    need_codec(codec)
    header, _, payloads = header_of(genuine(codec))
    first, *others, last = parts_of(header, payloads)
    parts = [
        first if place == "rest" else bomb(codec),
        *others,
        last if place == "codes" else bomb(codec),
    ]
    larger = claim(
        codec, vocab_size=2**16, model_dim=256, bigram_hash=False, value_embed=False, num_layers=2
    )
    own = 4 * sum(math.prod(shape) for _, _, shape in larger["tensors"])
    floats = sum(
        math.prod(shape) if role == "scalar" else 1 for _, role, shape in larger["tensors"]
    )
    fitting = [
        *parts[:-1],
        train_gpt.compress(bytes(4 * floats), codec) if place == "codes" else parts[-1],
    ]
    for lie, packed, room in (
        (header, parts, 0),
        ({**header, "tensors": [["w", "matrix", [2**30]]]}, parts, 0),
        (larger, fitting, 2 * LIMIT + own),
    ):
        blob = with_parts(packed, lie)
        with mock.patch.object(train_gpt, "inflate", wraps=train_gpt.inflate) as inflate:
            assert (
                peak_bytes(lambda blob=blob: refused(blob) or pytest.fail("loaded"))
                < 2 * len(blob) + 2**21 + room
            )
        assert inflate.call_count == (
            0 if len(lie["tensors"]) == 1 else 1 + (place == "codes")
        )  # it got as far as the bomb


def wordy(unit):
    """A header as long as may be, a list of these."""
    return forged(
        b"[" + unit + (b"," + unit) * ((LONGEST_HEADER - len(unit) - 8) // (len(unit) + 1)) + b"]",
        b"",
    )


GREEDY = {
    **{
        f"{shape} of {role} and {codec}": lambda shape=shape, role=role, codec=codec: altered(
            settings={**HEADER["settings"], "compress_algo": codec}, tensors=[["w", role, shape]]
        )
        for shape in ([10**12], [10**6, 10**6], [1, 10**12], [10**12, 1])
        for role in (*ROLES, "scalar", "int8")
        for codec in CODECS
    },
    **{
        f"header of {length} bytes": lambda length=length: forged(RAW_HEADER, PAYLOADS, length)
        for length in (2**20 - 4, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
    },
    **{
        f"settings {changes}": lambda changes=changes: with_settings(**changes)
        for changes in (
            dict(num_layers=1000),
            dict(num_layers=1000, bigram_hash=True, value_embed=True),
            dict(model_dim=2**16),
            dict(vocab_size=2**16, model_dim=2**16, mlp_mult=64, num_heads=2**10),
            *(
                dict(head_type=head, head_k=64, head_rank=2**16, head_dim=2**16, model_dim=2**16)
                for head in HEADS
            ),
        )
    },
    **{
        f"a long {name}": lambda name=name, value=value: with_settings(
            **{"value_embed": True, name: value * (400_000 // len(value))}
        )
        for name, value in (
            ("head_type", "tied"),
            ("head_type", "t"),
            ("init_type", "x"),
            ("num_layers", "1"),
            ("num_layers", " "),
            ("rope_base", "1"),
            ("ve_layers", "0,"),
        )
    },
    **{
        f"JSON of {unit}": lambda unit=unit: wordy(unit)
        for unit in (b"[]", b"{}", b"[{}]", b'{"":0}', b"1.5", b'"ab"')
    },
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_lie_costs_neither_memory_nor_time(case):
    if "zstd" in case:
        need_codec("zstd")
    blob = GREEDY[case]()
    assert not refused(GENUINE)  # imports what PyTorch imports with the first model
    begin = time.process_time()
    assert refused(blob)
    assert time.process_time() - begin < 1
    assert peak_bytes(lambda: refused(blob)) < (2 * LIMIT if len(blob) > len(GENUINE) else 2**20)


PEAK = """
import sys, train_gpt as t
from pathlib import Path
world, (small, large) = t.World(), map(Path, sys.argv[1:])
def now(figure):
    return 1024 * int(Path("/proc/self/status").read_text().split(figure + ":")[1].split()[0])
t.read_artifact("", small, 16e6, world)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = now("VmRSS")
try:
    t.read_artifact("", large, 16e6, world)
except t.UserError as error:
    print(now("VmHWM") - before, error)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of a process is not measured here",
)
def test_memory_for_a_file_as_large_as_may_be_that_turns_out_bad_at_its_end(tmp_path, run):
    """Noise at the study's size, refused for its last scalar. The variable lets glibc return freed memory at once."""
    with torch.device("meta"):
        shapes = GPT(Hyperparameters())
    roles, draw = train_gpt.parameter_roles(shapes), torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=draw) for name, p in shapes.named_parameters()}
    own = 4 * sum(p.numel() for p in state.values())
    state[[name for name in state if roles[name] == "scalar"][-1]].view(-1)[-1] = math.nan
    large, small_one = tmp_path / "large", tmp_path / "small"
    large.write_bytes(encode(state, roles, Hyperparameters(), 0.175))
    small_one.write_bytes(GENUINE)
    assert 0.97 * LIMIT < large.stat().st_size <= LIMIT
    done = run(
        dict(PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536"),
        "-c",
        PEAK,
        str(small_one),
        str(large),
        cwd=tmp_path,
    )
    assert "no number" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) < 2 * LIMIT + own


@budget(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, len(GENUINE) - 1),
    st.sampled_from(["cut", "flip", "drop", "double"]),
    st.integers(0, 7),
)
def test_damage_anywhere_is_a_users_error(place, damage, bit):
    blob = dict(
        cut=GENUINE[:place],
        drop=GENUINE[:place] + GENUINE[place + 1 :],
        flip=GENUINE[:place] + bytes([GENUINE[place] ^ 1 << bit]) + GENUINE[place + 1 :],
        double=GENUINE[:place] + GENUINE[place : place + 1] + GENUINE[place:],
    )[damage]
    assert refused(blob)


@budget(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_users_error(noise):
    for blob in (
        noise,
        MAGIC + noise,
        sealed(noise),
        forged(noise, PAYLOADS),
        forged(RAW_HEADER, noise),
    ):
        assert refused(blob)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["matrix", "zlib"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@budget(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), value=JSON)
def test_any_json_in_any_place_of_the_header_is_read_or_a_users_error(data, value):
    header = copy.deepcopy(HEADER)
    place = data.draw(
        st.sampled_from(
            ["ends", "end", "settings", "tensors", "tensor", "field", "setting", "whole"]
        )
    )
    if place == "whole":
        header = value
    elif place == "end":
        header["ends"][data.draw(st.integers(0, len(ENDS) - 1))] = value
    elif place == "tensor":
        header["tensors"][data.draw(st.integers(0, 5))] = value
    elif place == "field":
        header["tensors"][data.draw(st.integers(0, 5))][data.draw(st.integers(0, 2))] = value
    elif place == "setting":
        header["settings"][data.draw(st.sampled_from(sorted(header["settings"])))] = value
    else:
        header[place] = value
    blob = forged(header, PAYLOADS)
    if not refused(blob):  # a harmless change, as of a number within its range
        settings, model = open_artifact(blob)
        assert isinstance(settings, Hyperparameters) and isinstance(model, GPT)
        for field in dataclasses.fields(settings):
            assert type(getattr(settings, field.name)).__name__ == field.type, field.name


@each_codec
@pytest.mark.parametrize("flip", range(5, 200, 13))
def test_damage_under_a_right_checksum_is_read_or_a_users_error(flip, codec):
    """A forger can also corrupt the compressed stream and seal it again."""
    _, header, payload = header_of(genuine(codec))
    damaged = forged(header, payload[:flip] + bytes([payload[flip] ^ 16]) + payload[flip + 1 :])
    assert refused(damaged) or isinstance(open_artifact(damaged)[1], GPT)


def mutated(data, rng):
    """A bit flipped, bytes overwritten, inserted or removed, an end cut off, or two ranges in turn."""
    a, b, c, d = sorted(rng.choices(range(len(data)), k=4))
    noise = rng.randbytes(rng.randint(1, 9))
    return rng.choice(
        [
            data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :],
            data[:a] + noise + data[a + len(noise) :],
            data[:a] + noise + data[a:],
            data[:a] + data[b:],
            data[:a],
            data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:],
        ]
    )


def lying(header, rng):
    """One number, string or constant of a JSON text is another."""
    tokens = [*re.finditer(rb'"[^"]*"|-?\d[\d.e+-]*|true|false', header)]
    old, other = rng.choices(tokens, k=2)
    new = rng.choice(
        [
            other.group(),
            mutated(old.group(), rng),
            b"%d" % rng.randrange(1001),
            b"%.6g" % rng.expovariate(0.01),
            b"-1",
            b"1e999",
            b"NaN",
            b"null",
            b"true",
            b'"\\n\\u0000"',
            b'"1"',
            b"9" * 30,
            b"[]",
        ]
    )
    return header[: old.start()] + new + header[old.end() :]


@each_codec
def test_2000_mutated_artifacts_are_refused_or_loaded_exactly(codec):
    """Without and with the checksum made right again; the last kind is whole but for its integers, scales and scalars."""
    need_codec(codec)
    rng, blob = random.Random(0), genuine(codec)
    header, raw, payloads = header_of(blob)
    (settings, original), loaded = unpack(blob), [0] * 5
    for i in range(2000):
        kind = i % len(loaded)
        mutant = (
            lambda: mutated(blob, rng),
            lambda: forged(lying(raw, rng), payloads),
            lambda: sealed(mutated(blob[40:], rng)),
            lambda: forged(raw, mutated(payloads, rng)),
            lambda: with_payloads(mutated(CODES, rng), mutated(REST, rng), codec, header),
        )[kind]()
        begin = time.process_time()
        try:
            stored, found = unpack(mutant)
        except UserError as error:
            assert str(error).isprintable()
        else:
            loaded[kind] += 1
            assert list(found) == list(original) and (kind > 0 or stored == settings), i
            for name, weight in original.items():
                assert found[name].shape == weight.shape and found[name].isfinite().all(), (i, name)
                assert kind > 1 or torch.equal(found[name], weight), (i, name)
        assert time.process_time() - begin < 1, i
    assert loaded[1] > 9 and loaded[4] > 25  # the test sees both outcomes


@pytest.mark.parametrize(
    "case", ["corrupt", "truncated", "foreign", "empty", "large", "directory", "pipe", "missing"]
)
def test_eval_mode_refuses_what_is_no_artifact_in_one_line(case, tmp_path, run):
    path = tmp_path / "artifact"
    blobs = dict(
        corrupt=GENUINE[:-5] + b"x" + GENUINE[-4:],
        truncated=GENUINE[:-9],
        foreign=b"PK\x03\x04" + bytes(99),
        empty=b"",
        large=GENUINE + bytes(LIMIT),
    )
    if case in blobs:
        path.write_bytes(blobs[case])
    elif case == "directory":
        path.mkdir()
    elif case == "pipe":
        os.mkfifo(path)  # endless; so is /dev/zero
    done = run(dict(MODE="eval", ARTIFACT=str(path)), cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: ARTIFACT={re.escape(str(path))}: .+\n", done.stderr)


@pytest.mark.parametrize("head", ["tied", "bigram"])
def test_late_qat_finds_the_export_s_step_from_a_sample_of_the_rows_of_a_large_model(head):
    s = small(
        vocab_size=1024,
        model_dim=256,
        bigram_vocab_size=2**14,
        bigram_dim=128,
        size_limit_bytes=3_000_000,
        head_type=head,
    )
    trainer = train_gpt.Trainer(build_model(s, cpu_world()), s, cpu_world())
    assert sum(p.numel() for p in trainer.parameters) > 2**21  # so only some rows are looked at
    with torch.no_grad():
        for p in trainer.parameters:
            p.normal_()
    limit = s.size_limit_bytes - len(train_gpt.source())
    exact = pack(
        trainer.exported() | dict(trainer.model.named_parameters()), trainer.roles, s, limit
    )[1]
    assert trainer.late_grid(train_gpt.RunLog(None)) == pytest.approx(exact, rel=0.02)

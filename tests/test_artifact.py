"""The export's grid, its fit under the cap, the file and its readers, late QAT on the grid, and what a hostile file can do."""

import copy
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, cpu_world, environment, from_env, run, run_here, small
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    COARSEST,
    FIELDS,
    FINEST,
    GPT,
    HEADS,
    LARGEST,
    MAGIC,
    PLAIN_ABOVE,
    ROLES,
    VARIANTS,
    Hyperparameters,
    UserError,
    artifact_weights,
    build_model,
    decode_floats,
    decode_integers,
    dequantized,
    encode,
    encode_floats,
    encode_integers,
    encode_payload,
    fit,
    fit_sample,
    from_codes,
    open_artifact,
    pack,
    quantized,
    read_artifact,
    rounded_weights,
    to_codes,
)

STORED = tuple(train_gpt.Hyperparameters().as_dict(train_gpt.STORED))  # names in the header

CODECS = ("zlib", "zstd")
ON_GRID = ("matrix", "table", "tied", "head_vocab")  # a role of each fineness
ALL_HEADS = [*HEADS, *VARIANTS]
STEPS = (FINEST, 0.13, 0.6, 1.1 * PLAIN_ABOVE, COARSEST)  # the last two: plain rounding of matrices
each_codec = pytest.mark.parametrize("codec", CODECS)
quick = budget(max_examples=60, deadline=None, derandomize=True)


def gaussian(rows=768, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def student_t(rows=768, columns=512, seed=0):
    """Heavy tails: 3 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns))).float()


KINDS = dict(gaussian=gaussian, student_t=student_t)


def head_settings(name):
    """Of "mos" or "mos/pr908"."""
    head, _, variant = name.partition("/")
    return dict(head_type=head, head_variant=variant)


def random_model(**changes):
    """A small model none of whose weights is a round number."""
    torch.manual_seed(0)
    model = GPT(small(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def weights_of(model):
    """Its weights and their roles, by name."""
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    return state, model.parameter_roles()


def artifact_of(model, step=FINEST, **changes):
    return encode(*weights_of(model), small(**changes), step)


def opened(blob):
    return artifact_weights(open_artifact("ARTIFACT=x", blob))


def codes_and_scale(weight, role, step):
    """Of one matrix or stack, as rows."""
    ((_, (codes,), (scale,)),) = quantized({"w": weight}, {"w": role}, step)
    return codes, scale.item()


def on_grid(weight, role, step):
    """The weight as it will be after export at this step."""
    ((_, codes, scale),) = quantized({"w": weight}, {"w": role}, step)
    return dequantized(codes, scale).view_as(weight)


def as_exported(weight, role, step):
    """The rule: scalars exactly, whatever their shape; all else on the grid of its role."""
    return on_grid(weight, role, step) if ROLES[role].finer else weight


def payload_bytes(weight, role, step, codec="zlib"):
    return len(encode_payload({"w": weight}, {"w": role}, step, codec))


def packed(weight, limit, codec="zlib"):
    return pack({"w": weight}, {"w": "matrix"}, small(compress_algo=codec), limit)


def error_of(found, weight):
    return ((found - weight).square().sum() / weight.square().sum()).item()


def bits_each(integers):
    """Their entropy of order 0."""
    _, counts = np.unique(integers.numpy(), return_counts=True)
    return -(counts * np.log2(counts / counts.sum())).sum() / counts.sum()


# ---- the grid ----


def roots():
    """The 240 shortest vectors of E8: a point nearer to x than all its neighbours is the nearest of all."""
    pairs = list(itertools.combinations(range(8), 2))
    whole = torch.zeros(len(pairs), 4, 8, dtype=torch.float64)
    for (i, j), vectors in zip(pairs, whole):
        vectors[:, i] = torch.tensor([1.0, 1.0, -1.0, -1.0])
        vectors[:, j] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    half = [signs for signs in itertools.product((-0.5, 0.5), repeat=8) if sum(signs) % 2 == 0]
    return torch.cat((whole.view(-1, 8), torch.tensor(half, dtype=torch.float64)))


def test_the_point_of_the_codes_is_the_nearest_one_of_the_lattice():
    assert len(roots()) == 240 and (roots().square().sum(1) == 2).all()
    for spread in (0.3, 2.0, 50.0):
        x = spread * gaussian(24, 200)
        points = from_codes(to_codes(x)).view(3, 8, -1)
        twice = (2 * points).long()
        assert torch.equal(twice, 2 * points)
        assert (twice % 2 == twice[:, :1] % 2).all(), "neither all whole nor all half"
        assert (points.sum(1) % 2 == 0).all()
        miss = (x.view_as(points) - points).transpose(1, 2).reshape(-1, 1, 8).double()
        others = (miss - roots()).square().sum(-1)
        assert (miss.square().sum(-1) <= others + 1e-4).all()


def test_the_lattice_saves_the_fourteen_percent_of_its_second_moment():
    """0.0716821 a dimension (Conway and Sloane, Sphere Packings, table 2.3) against 1 / 12."""
    x = 100 * torch.rand(8, 40000, generator=torch.Generator().manual_seed(0))
    second_moment = (from_codes(to_codes(x)) - x).square().mean().item()
    assert second_moment == pytest.approx(0.0716821, rel=0.01)


@quick
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
    points, whole = from_codes(codes.clone()), rows // 8 * 8
    assert torch.equal(to_codes(points), codes)
    assert torch.equal(points[:, whole:], codes[:, whole:])  # the last, fewer than eight rows
    eights = points[:, :whole].unflatten(1, (-1, 8))
    assert (eights.sum(2) % 2 == 0).all() and ((eights - eights[:, :, :1]) % 1 == 0).all()


def test_no_weight_is_clipped_and_eight_are_within_a_step_of_their_point():
    cases = itertools.product(KINDS, ON_GRID, STEPS)
    for kind, role, step in cases:
        w = KINDS[kind](203, 64)
        w[5, 3] = 3e4  # an outlier
        codes, scale = codes_and_scale(w, role, step)
        assert torch.equal(codes, codes.round()) and codes.abs().max() < 2**15
        miss = (on_grid(w, role, step) - w) / scale
        slack = 1e-6 * (w / scale).abs().max()  # of float32
        eights = miss[:200].view(25, 8, 64).square().sum(1)
        assert eights.max() <= (1 + slack) ** 2 or scale < 0  # 1 is E8's covering radius
        assert miss[200 * (scale > 0) :].abs().max() <= 0.5 + slack


def test_the_finest_step_is_finer_than_plain_int8():
    """Integers of 8 bits on a scale by the largest entry, whatever the row."""
    for role, kind in itertools.product(ON_GRID, [*KINDS, "sign"]):
        w = torch.sign(gaussian(256, 256)) if kind == "sign" else KINDS[kind](256, 256)
        scale = w.abs().amax(1, keepdim=True) / 127
        off = w + 0.4 * scale * (kind == "sign")  # plain int8 is exact for signs alone
        plain = (off / scale).round() * scale
        assert error_of(on_grid(off, role, FINEST), off) < error_of(plain, off), (role, kind)


def test_the_relative_error_depends_neither_on_a_matrix_s_size_nor_on_its_neighbours():
    """No floor: down to what float32 can hold."""
    w = gaussian(43, 64)
    for role, step in itertools.product(ON_GRID, STEPS):
        usual = on_grid(w, role, step)
        for power in (-109, -90, -30, 30, 90):
            state = {"w": w * 2.0**power, "alike": w, "noise": gaussian(43, 64, seed=1)}
            ((names, codes, scales),) = quantized(state, dict.fromkeys(state, role), step)
            found = dict(zip(names, dequantized(codes, scales)))
            assert torch.equal(found["w"] / 2.0**power, usual), (role, step, power)
            assert torch.equal(found["alike"], usual), (role, step, power)


def test_a_matrix_of_zeros_stays_zero():
    for role, step, shape in itertools.product(ON_GRID, STEPS, [(20, 32), (3, 32)]):
        found = on_grid(torch.zeros(shape), role, step)
        assert not found.any() and found.isfinite().all()


def test_matrices_rounded_together_are_rounded_as_alone():
    """Stacks are of one role and shape; a stack of matrices has one scale."""
    shapes = dict(a=(40, 16), b=(16, 40), c=(40, 16), s=(3, 3), d=(40, 16), e=(3, 24, 16))
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state["c"] *= 100
    roles = dict(a="matrix", b="matrix", c="matrix", d="tied", e="matrix", s="scalar")
    stacks = [*quantized(state, roles, 0.2)]
    assert sorted(names for names, _, _ in stacks) == [["a", "c"], ["b"], ["d"], ["e"]]
    for names, codes, scales in stacks:
        for name, code, scale in zip(names, codes, scales):
            rows = state[name].view(-1, state[name].size(-1))
            alone = codes_and_scale(rows, roles[name], 0.2)
            assert torch.equal(code, alone[0]) and scale.item() == alone[1], name


def test_a_matrix_of_zeros_does_not_bear_on_those_rounded_with_it():
    state = dict(zeros=torch.zeros(16, 24), other=gaussian(16, 24))
    for step in STEPS:
        ((_, codes, scales),) = quantized(state, dict.fromkeys(state, "matrix"), step)
        zeros, other = dequantized(codes, scales)
        assert not zeros.any() and torch.equal(other, on_grid(state["other"], "matrix", step))


def test_a_role_s_grid_is_finer_than_the_matrices_and_less_so_for_a_large_vocabulary():
    """Squared errors go with the square of the step, on fine grids."""
    for rows, tied, vocab in ((72, 16, 8), (1024, 16, 8), (2048, 8, 4), (8192, 2, 2)):
        w = gaussian(rows, 16)
        expected = dict(table=2, tied=tied, head_vocab=vocab, head_matrix=1)
        for role, finer in expected.items():
            times = error_of(on_grid(w, "matrix", 0.1), w) / error_of(on_grid(w, role, 0.1), w)
            assert times == pytest.approx(finer**2, rel=0.1), (role, rows)


def test_the_embedding_is_on_the_finest_grid_exactly_where_it_makes_the_logits():
    for name in ALL_HEADS:
        model = random_model(**head_settings(name))
        x, h, E = torch.arange(9), torch.randn(9, 32), model.tok_emb.weight.detach()
        with torch.no_grad():
            logits, others = (model.head.log_probs(h, x, table) for table in (E, E.flip(0)))
        role = "table" if torch.equal(logits, others) else "tied"
        assert model.parameter_roles()["tok_emb.weight"] == role, name


def test_steps_above_plain_above_round_plainly_and_say_so_by_a_negative_scale():
    """The step that counts is a matrix's own, after its role's fineness."""
    w = gaussian(40, 24)
    rms = w.double().square().mean().sqrt()
    for role in ON_GRID:
        finer = ROLES[role].finer
        for own in (0.9 * PLAIN_ABOVE, PLAIN_ABOVE, 1.1 * PLAIN_ABOVE, 2 * PLAIN_ABOVE):
            codes, scale = codes_and_scale(w, role, own * finer)
            size = (own * rms).float()
            plain = own > PLAIN_ABOVE
            assert scale == (-size if plain else size), (role, own)
            assert torch.equal(codes, (w / size).round()) == plain, (role, own)
            if plain:
                assert torch.equal(on_grid(w, role, own * finer), codes * size)


def test_the_lattice_pays_at_equal_entropy_up_to_about_plain_above():
    """Its squared error over that of plain rounding at as many bits, for Gaussian weights."""
    w = gaussian(1024, 512)
    steps = np.geomspace(0.08, 2.5, 40)
    plain = [(w / step).round() for step in steps]
    bits = [-bits_each(codes) for codes in plain]  # ascending
    errors = [math.log(error_of(codes * step, w)) for codes, step in zip(plain, steps)]

    def ratio(step):
        codes = to_codes(w / step)
        at_equal_bits = math.exp(np.interp(-bits_each(codes), bits, errors))
        return error_of(from_codes(codes) * step, w) / at_equal_bits

    assert ratio(0.1) < 0.865 and ratio(0.3) < 0.87 and ratio(0.6) < 0.89 and ratio(1.0) < 0.93
    assert ratio(1.5) > 1 and ratio(PLAIN_ABOVE) == pytest.approx(1, abs=0.04)


# ---- the fit ----


@each_codec
def test_pack_uses_the_limit_to_a_fifth_of_a_percent_and_is_deterministic(codec):
    for kind in KINDS:
        w = KINDS[kind](512, 256)
        finest = len(packed(w, 10**9, codec)[0])
        for share in (0.8, 0.4):
            limit = int(share * finest)
            blob, step = packed(w, limit, codec)
            assert 0.998 * limit <= len(blob) <= limit and FINEST < step < COARSEST, (kind, share)
        assert packed(w, limit, codec) == (blob, step)


def test_a_whole_model_also_meets_its_limit():
    s = small(model_dim=64, vocab_size=256, head_type="mos", head_rank=16)
    torch.manual_seed(0)
    state, roles = weights_of(GPT(s))
    finest = len(pack(state, roles, s, 10**9)[0])
    for share in (0.8, 0.5):
        blob, step = pack(state, roles, s, int(share * finest))
        assert 0.995 * share * finest <= len(blob) <= share * finest
        assert blob == encode(state, roles, s, step)


@each_codec
def test_pack_takes_the_finest_step_where_that_fits_and_no_other(codec):
    w = gaussian(200, 100)
    blob, step = packed(w, 10**9, codec)
    assert step == FINEST
    for slack in (0, 1, 10**6):
        assert packed(w, len(blob) + slack, codec) == (blob, FINEST)
    smaller, step = packed(w, len(blob) - 1, codec)
    assert step > FINEST and len(smaller) < len(blob)


def test_the_fit_finds_the_finest_step_of_any_smooth_size():
    for scale in (1, 1e3, 1e9):

        def size(step, scale=scale):
            return scale * (100 - 7 * math.log2(step) + step**-0.5)

        for step in (1.01 * FINEST, 0.01, 0.1, 1.0, 5.0, COARSEST):
            found = fit(size, size(step))
            assert step <= found * (1 + 1e-9)
            assert 0.999 * size(step) <= size(found) <= size(step)

        def shelf(step, scale=scale):  # as where the largest entry and not the step sets the scale
            return scale * (100 if step < 0.3 else 30 / step)

        assert 0.999 * 99 * scale <= shelf(fit(shelf, 99 * scale)) <= 99 * scale


def test_the_fit_at_its_ends():
    """The finest step where it fits; the coarsest where nothing does; few sizes are ever computed."""

    def size(step):
        sizes.append(step)
        return 100 / step

    for limit, expected in (
        (100 / FINEST, FINEST),
        (math.inf, FINEST),
        (100 / COARSEST, COARSEST),
        (99 / COARSEST, COARSEST),
        (0, COARSEST),
        (-1e6, COARSEST),
    ):
        sizes = []
        assert fit(size, limit) == pytest.approx(expected, rel=1e-3), limit
        assert len(sizes) < 40 and all(FINEST <= step <= COARSEST for step in sizes)


def test_the_fit_ends_with_the_first_size_within_a_thousandth_of_the_limit():
    sizes = []

    def size(step):
        sizes.append(100 / step)
        return sizes[-1]

    fit(size, 300)
    assert [299.7 < found <= 300 for found in sizes].index(True) == len(sizes) - 1


def test_the_fit_keeps_to_the_limit_where_sizes_jump_or_fall_and_rise():
    """It need not be the finest step there, but it fits, and is no octave coarser than the first that does."""

    def jump(step):
        return 100 if step < 0.2 else 10

    def comb(step):  # on every fifth of an octave a grid that the weights lie on already
        return 50 / step * (0.5 if round(50 * math.log2(step)) % 10 == 0 else 1)

    def dip(step):  # fits in one place far below the others
        return 30 if abs(step - 2**-5) < 1e-9 else 100 / (1 + step)

    assert 0.2 <= fit(jump, 50) < 0.2 * 1.001
    for limit in (60, 300, 1000):
        assert comb(fit(comb, limit)) <= limit and fit(comb, limit) <= 2 * 50 / limit
    assert fit(dip, 40) <= 2**-5


@each_codec
def test_weights_that_lie_on_an_artifact_s_grid_already_keep_about_its_step(codec):
    """As when a run is packed that started from an artifact. The finest grids cost them less than middling ones."""
    s = small(model_dim=64, vocab_size=128, compress_algo=codec)
    state, roles = weights_of(random_model(model_dim=64, vocab_size=128))
    finest = len(pack(state, roles, s, 10**9)[0])
    for share in (0.7, 0.35):
        limit = int(share * finest)
        blob, step = pack(state, roles, s, limit)
        again, step_again = pack(opened(blob), roles, s, limit)
        assert len(again) <= limit
        assert step_again < 1.2 * step, (share, step, step_again)
        for name, weight in opened(again).items():
            assert error_of(weight, state[name]) < 0.1, name


def test_late_qat_trains_through_the_step_at_which_the_present_weights_would_fit():
    s = small(size_limit_bytes=len(train_gpt.source()) + 30_000, use_ema=True)
    trainer = train_gpt.Trainer(random_model(), s, cpu_world())
    with torch.no_grad():
        for p in trainer.parameters:  # the average is still of the weights before
            p.add_(torch.randn_like(p))
    state, roles = weights_of(trainer.model)
    trainer.start_late_qat(train_gpt.RunLog(None))
    expected = fit(lambda step: len(encode_payload(state, roles, step, "zlib")), 30_000)
    assert trainer.grid == expected and FINEST < expected < COARSEST


def test_a_sample_of_the_rows_of_a_large_model_tells_its_step():
    """Also where the vocabulary is large: its grid depends on the number of its rows."""
    matrices = [("matrix", (768, 512)), ("matrix", (512, 768)), ("tied", (4096, 128))]
    shapes = [*matrices, ("scalar", (9,))]
    state = {str(i): torch.randn(shape) for i, (_, shape) in enumerate(shapes)}
    roles = {str(i): role for i, (role, _) in enumerate(shapes)}
    count = sum(weight.numel() for weight in state.values())
    with mock.patch.object(train_gpt, "encode_payload", wraps=encode_payload) as encoded:
        found = fit_sample(state, roles, "zlib", 700_000)
    assert sum(w.numel() for w in encoded.call_args.args[0].values()) < 0.6 * count
    exact = fit(lambda step: len(encode_payload(state, roles, step, "zlib")), 700_000)
    assert found == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
def test_late_qat_s_step_is_the_export_s_for_the_study_s_model_and_a_large_vocabulary():
    """Of which a fiftieth is sampled: 512 rows or columns hold no whole number of fiftieths."""
    for variables in ({}, dict(VOCAB_SIZE="8192", NUM_LAYERS="9", VE_LAYERS="7,8")):
        with torch.device("meta"):
            model = GPT(from_env(variables))
        roles, draw = model.parameter_roles(), torch.Generator().manual_seed(0)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        step = fit_sample(state, roles, "zlib", 15_850_000)
        found = len(encode_payload(state, roles, step, "zlib"))
        assert 0.98 * 15_850_000 < found < 1.02 * 15_850_000, variables


@each_codec
def test_payloads_are_near_the_order_0_entropy_of_the_integers(codec):
    """Within 1.5% for deflate, 1.7% where an integer has less than 4 bits; 3% for zstd's Huffman tables."""
    for kind, step in itertools.product(KINDS, [FINEST, 0.03, 0.05, 0.12, 0.158, 0.3]):
        w = KINDS[kind](1024, 512)
        bits = bits_each(codes_and_scale(w, "matrix", step)[0])
        allowed = dict(zlib=1.015 if bits >= 4 else 1.017, zstd=1.03)[codec]
        found = payload_bytes(w, "matrix", step, codec)
        assert found <= allowed * bits * w.numel() / 8, (kind, step)


@each_codec
def test_payloads_of_a_model_are_near_the_order_0_entropy_of_its_integers(codec):
    """All tensors together, at the study's shares of roles (heavy tails)."""
    shares = [*[("matrix", 768)] * 8, ("table", 256), ("tied", 128), ("scalar", 4)]
    allowed = {"zlib": {0.05: 1.011, 0.3: 1.018}, "zstd": {0.05: 1.025, 0.3: 1.032}}
    for step, bound in allowed[codec].items():
        state, roles, ideal = {}, {}, 0
        for i, (role, rows) in enumerate(shares):
            w = state[f"{i}"] = student_t(rows, 512, seed=i)
            roles[f"{i}"] = role
            bits = bits_each(codes_and_scale(w, role, step)[0]) if ROLES[role].finer else 32
            ideal += bits * w.numel() / 8
        found = len(encode_payload(state, roles, step, codec))
        assert found <= bound * ideal, step


def studies_rounding(weight, levels, quantile):
    """What both studies store of a matrix: integers of rows scaled by absmax or a quantile, and scales with their floor."""
    top = torch.quantile(weight.abs(), quantile, dim=1, keepdim=True)
    scale = (top / levels).clamp_min(1 / levels).half()
    q = (weight.clamp(-top, top) / scale.float()).round().clamp(-levels, levels)
    return q.to(torch.int8).numpy().tobytes() + scale.numpy().tobytes(), q * scale.float()


def test_error_at_equal_bytes_is_well_below_that_of_the_studies_quantizers():
    """At most 0.9 of theirs for Gaussian weights, 0.75 for heavy tails.

    But for small heavy-tailed weights, where the floor of their scales makes an even grid of two levels a
    deviation, as ours is: there the lattice alone is left, 0.81 as measured.
    """
    cases = itertools.product(KINDS, (1.0, 0.04), ("int6 zlib", "int6 zstd", "int8 zlib"))
    for kind, size, theirs in cases:
        levels, quantile = (31, 1.0) if theirs.startswith("int6") else (127, 0.9999984)
        w = size * KINDS[kind](512, 512)
        raw, rounded = studies_rounding(w, levels, quantile)
        smallest = zstandard.ZstdCompressor(level=22).compress
        limit = len(smallest(raw) if theirs.endswith("zstd") else zlib.compress(raw, 9))
        step = fit(lambda step, w=w: payload_bytes(w, "matrix", step), limit)
        allowed = dict(gaussian=0.9, student_t=0.75)[kind]
        if (kind, size, theirs) == ("student_t", 0.04, "int6 zstd"):
            allowed = 0.83
        share = error_of(on_grid(w, "matrix", step), w) / error_of(rounded, w)
        assert share <= allowed, (kind, size, theirs)


# ---- the file and its readers ----


def lattice_points(codes):
    """Eight codes of an odd sum stand for a half-integer point: their first less 1, then 1/2 more each."""
    points = codes.astype(np.float32)
    for first in range(0, len(codes) // 8 * 8, 8):
        eight = points[first : first + 8]
        odd = eight.sum(0) % 2 == 1
        eight[0] -= odd
        eight += odd / 2
    return points


def read_by_the_picture(blob):
    """The settings and weights of a file, by the picture at the top of the Artifact section alone."""
    assert blob[:8] == b"GPTHEAD6" and blob[8:40] == hashlib.sha256(blob[40:]).digest()
    header, _, payload = blob[40:].partition(b"\n")
    settings = json.loads(header)
    inflate = gzip.decompress
    if settings["compress_algo"] == "zstd":
        inflate = zstandard.ZstdDecompressor().decompressobj().decompress
    raw = io.BytesIO(inflate(payload))
    model = GPT(small(**settings))
    roles, parameters = model.parameter_roles(), dict(model.named_parameters())

    # scales and scalars
    sizes = {name: p.numel() if "scalar" in roles[name] else 1 for name, p in parameters.items()}
    planes = np.frombuffer(raw.read(4 * sum(sizes.values())), np.uint8).reshape(4, -1)
    floats, weights = iter(planes.T.copy().view("<f4").flatten()), {}
    floats_of = {name: [next(floats) for _ in range(size)] for name, size in sizes.items()}

    # integers of the matrices
    for name, p in parameters.items():
        if "scalar" in roles[name]:
            weights[name] = torch.tensor(np.array(floats_of[name])).view(p.shape)
            continue
        (n,) = raw.read(1)
        upper = np.frombuffer(raw.read(p.numel()), np.int8).astype(int)
        for i in np.flatnonzero(upper == -128):
            (upper[i],) = struct.unpack("<h", raw.read(2))
        low = np.zeros(p.numel(), dtype=int)
        for bit in reversed(range(n)):
            plane = np.frombuffer(raw.read(math.ceil(p.numel() / 8)), np.uint8)
            low += np.unpackbits(plane)[: p.numel()].astype(int) << bit
        codes, (scale,) = ((upper << n) + low).reshape(-1, p.size(-1)), floats_of[name]
        points = codes.astype(np.float32) if scale < 0 else lattice_points(codes)
        weights[name] = torch.from_numpy(abs(scale) * points).view(p.shape)
    assert raw.read() == b""
    return settings, weights


@each_codec
def test_the_file_is_as_its_picture_says(codec):
    changes = dict(head_type="mos", compress_algo=codec, logit_softcap=12.345)
    model, s = random_model(**changes), small(**changes)
    model.blocks[1].mlp.up.weight.data[5, 3] = -30.0  # far from the others
    for step in STEPS:
        blob = artifact_of(model, step, **changes)
        settings, weights = read_by_the_picture(blob)
        assert settings == {name: getattr(s, name) for name in STORED}
        for name, weight in opened(blob).items():
            assert torch.equal(weight, weights[name]), (name, step)


def test_what_is_read_are_the_weights_of_the_grid_and_the_settings():
    cases = itertools.product(ALL_HEADS, (FINEST, 0.13, 2 * PLAIN_ABOVE))
    for (head, step), codec in zip(cases, itertools.cycle(CODECS)):
        s = small(compress_algo=codec, **head_settings(head))
        state, roles = weights_of(random_model(**head_settings(head)))
        artifact = open_artifact("ARTIFACT=x", encode(state, roles, s, step))
        found = artifact_weights(artifact)
        assert list(found) == list(state)
        for name, weight in state.items():
            assert found[name].dtype == torch.float32, name
            assert torch.equal(found[name], as_exported(weight, roles[name], step)), (head, name)
        assert artifact.stored == {name: getattr(s, name) for name in STORED}
        for name, kind in Hyperparameters.__annotations__.items():
            assert name not in STORED or type(artifact.stored[name]) is kind
    assert "seed" not in STORED and "eval_stride" in STORED and "num_layers" in STORED


def test_encoding_is_deterministic_and_leaves_the_weights_alone():
    state, roles = weights_of(random_model())
    before = copy.deepcopy(state)
    for step in STEPS:
        blobs = {encode(state, roles, small(), step) for _ in range(3)}
        assert len(blobs) == 1
        assert all(torch.equal(state[name], before[name]) for name in state)


@quick
@given(st.integers(1, 50), st.integers(0, 15), st.integers(0, 14), st.integers(0, 99))
def test_integers_survive_however_they_are_spread(count, bits, outlier, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 - 2**bits, 2**bits, (count,), generator=draw).float()
    codes[seed % count] = (-1) ** seed * 2**outlier - seed // 50  # about where bytes end
    raw = b"".join(encode_integers(codes))
    stream = io.BytesIO(raw + b"next")
    assert torch.equal(decode_integers(stream, count), codes) and stream.read() == b"next"
    for bad in (b"", raw[:-1], bytes([13]) + raw[1:] + bytes(99)):
        with pytest.raises((ValueError, IndexError)):
            decode_integers(io.BytesIO(bad), count)


def test_floats_survive_bit_for_bit():
    """Of all patterns of bits."""
    patterns = np.random.default_rng(0).integers(-(2**31), 2**31, 10**5, dtype=np.int32)
    values = torch.from_numpy(patterns).view(torch.float32)
    rare = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [3.4e38, 0.1]])
    raw = b"".join(encode_floats([values, rare, torch.tensor(0.3)]))
    found = decode_floats(io.BytesIO(raw + b"next"), len(values) + 7)
    expected = torch.cat((values, rare.flatten(), torch.tensor([0.3])))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    with pytest.raises(ValueError):
        decode_floats(io.BytesIO(raw[:-1]), len(values) + 7)


def test_scalars_are_exact_whatever_their_shape_and_size():
    cases = (
        (dict(num_layers=40), "skip_weights"),
        (dict(head_type="mos", head_k=20), "head.gate_KD"),
        ({}, "blocks.0.resid_mix"),
    )
    for changes, name in cases:
        model = random_model(**changes)
        weight = dict(model.named_parameters())[name].detach()
        weight.view(-1)[:6] = torch.tensor([1e6, -3.0000002, 1e-3, 1e-45, 3e38, 0.1])
        found = opened(artifact_of(model, 0.3, **changes))[name]
        assert weight.ndim == 2 and torch.equal(found, weight), name


@each_codec
def test_the_least_model_and_one_of_zeros_come_back(codec):
    """Where a matrix has fewer weights than its stretch of the file has other bytes."""
    least = dict(vocab_size=2, num_layers=1, model_dim=4, num_heads=1, num_kv_heads=1, mlp_mult=1)
    tables = dict(bigram_vocab_size=2, bigram_dim=1, ve_dim=1, ve_layers="0", xsa_last_n=0)
    heads = dict(head_k=1, head_rank=1, head_dim=2)
    for head in ALL_HEADS:
        changes = dict(least, **tables, **heads, **head_settings(head), compress_algo=codec)
        model = random_model(**changes)
        for _ in range(2):
            state, roles = weights_of(model)
            for step in (FINEST, COARSEST):
                found = opened(artifact_of(model, step, **changes))
                for name, weight in state.items():
                    assert torch.equal(found[name], as_exported(weight, roles[name], step)), name
            for p in model.parameters():
                p.data.zero_()


def test_a_large_table_that_training_hardly_touched_comes_back():
    changes = dict(bigram_vocab_size=2**16, bigram_dim=64)
    model = random_model(**changes)
    model.bigram.table.weight.data[100:] = 0
    found = opened(artifact_of(model, **changes))["bigram.table.weight"]
    assert found.shape == (2**16, 64) and found[:96].all() and not found[104:].any()


def test_a_loaded_artifact_computes_what_the_rounded_model_does(tmp_path):
    world, path = cpu_world(), tmp_path / "final_model.int8.ptz"
    bare = dict(value_embed=False, bigram_hash=False, smear_gate=False)
    for changes in ({}, dict(num_layers=1, ve_layers="0"), dict(head_type="mos"), bare):
        model = random_model(**changes)
        state, roles = weights_of(model)
        blob, step = pack(state, roles, small(**changes), 10**9)
        path.write_bytes(blob)
        artifact = read_artifact("ARTIFACT", path, world)
        s = from_env(dict(MODE="eval", ARTIFACT="x"), artifact.stored)
        loaded = build_model(s, world, artifact_weights(artifact))
        model.load_state_dict({n: as_exported(w, roles[n], step) for n, w in state.items()})
        x, y = torch.randint(48, (2, 3, 24))
        assert torch.equal(loaded(x, y), model(x, y)), changes


def test_the_default_batch_does_not_bear_on_an_artifact():
    """A sequence length that does not divide it, though it divided the run's own."""
    changes = dict(train_seq_len=100, train_batch_tokens=400)
    artifact = open_artifact("x", artifact_of(random_model(**changes), **changes))
    assert from_env(dict(MODE="eval", ARTIFACT="x"), artifact.stored).train_seq_len == 100
    assert artifact_weights(artifact)


# ---- late QAT ----


def test_rounded_weights_lie_on_exactly_the_export_s_grid_and_come_back_bit_for_bit():
    for head, step in itertools.product(("tied", "mos", "untied"), STEPS):
        model = random_model(head_type=head)
        before, roles = weights_of(model)
        exported = opened(artifact_of(model, step, head_type=head))
        with rounded_weights(model, roles, step):
            for name, p in model.named_parameters():
                assert torch.equal(p, exported[name]), (step, name)
                assert torch.equal(p, before[name]) == ("scalar" in roles[name]), (step, name)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_before_late_qat_weights_stay_as_they_are():
    model = random_model()
    before, roles = weights_of(model)
    with rounded_weights(model, roles, 0.0):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rounded_weights_come_back_when_the_body_raises():
    model = random_model()
    before, roles = weights_of(model)
    with pytest.raises(KeyError), rounded_weights(model, roles, 0.3):
        raise KeyError("an interruption")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_are_taken_at_the_rounded_weights():
    model, rounded = random_model(), random_model()
    x, y = torch.randint(48, (2, 3, 24))
    state, roles = weights_of(model)
    rounded.load_state_dict({n: as_exported(w, roles[n], 0.5) for n, w in state.items()})
    with rounded_weights(model, roles, 0.5):
        model(x, y).backward()
    rounded(x, y).backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters()):
        assert torch.equal(p.grad, q.grad), name


# ---- hostile files ----


def sealed(body):
    return MAGIC + hashlib.sha256(body).digest() + body


def forged(header, payload):
    """An artifact with a right checksum around any header (an object, or its bytes) and payload."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return sealed(header + b"\n" + payload)


def header_and_payload(blob):
    header, _, payload = blob[40:].partition(b"\n")
    return json.loads(header), header, payload


LITTLE = dict(bigram_hash=False, value_embed=False, num_layers=2)
GENUINE = artifact_of(random_model(**LITTLE), **LITTLE)
HEADER, RAW_HEADER, PAYLOAD = header_and_payload(GENUINE)
RAW = gzip.decompress(PAYLOAD)
FLOATS = sum(
    1 if ROLES[role].finer else weight.numel()
    for weight, role in zip(*map(dict.values, weights_of(random_model(**LITTLE))))
)
COMPRESS = dict(zlib=gzip.compress, zstd=zstandard.ZstdCompressor().compress)


def with_settings(**changes):
    return forged({**HEADER, **changes}, PAYLOAD)


def with_raw(raw, codec="zlib"):
    """Other contents of the payload, well compressed."""
    settings = dict(HEADER, compress_algo=codec)
    return forged(settings, COMPRESS[codec](raw))


def reason(blob):
    """Why a file is refused, or ''. Any exception but a UserError of one line that names the file passes through."""
    try:
        opened(blob)
    except UserError as error:
        assert str(error).isprintable() and str(error).startswith("ARTIFACT=x: ")
        return str(error)
    return ""


def accepted(cases):
    """The names of those that are not refused."""
    return [name for name, blob in cases.items() if not reason(blob)]


def without(name):
    return {key: value for key, value in HEADER.items() if key != name}


def test_the_forger_s_tools_can_make_a_genuine_artifact():
    assert forged(RAW_HEADER, PAYLOAD) == GENUINE == with_settings()
    harmless = with_raw(RAW), with_raw(RAW, "zstd"), with_settings(logit_softcap=20.0)
    assert not any(map(reason, (GENUINE, *harmless)))


def test_another_format_is_refused_in_one_line_that_says_so():
    for version in (b"5", b"7", b"\n"):
        other = MAGIC[:7] + version
        line = reason(other + GENUINE[8:])
        assert "format" in line and ascii(MAGIC) in line, line
        assert version == b"\n" or ascii(other) in line, line


def test_artifacts_outlive_new_settings_and_unknown_settings_are_refused():
    """A setting that is newer than the file has its default."""
    expected = opened(GENUINE)
    for name in STORED:
        default, own = FIELDS[name.upper()].default, HEADER[name]
        blob = forged(without(name), PAYLOAD)
        if name in ("rope_dims", "value_embed"):  # their defaults do not fit the little model
            assert "must be" in reason(blob)
            continue
        stored = open_artifact("x", blob).stored
        assert stored == {**HEADER, name: default}
        if default == own:
            assert all(torch.equal(w, expected[n]) for n, w in opened(blob).items()), name
    refusals = {
        name: with_settings(**{name: value})
        for name, value in dict(unknown=1, seed=1, artifact="x", data_path="/", __class__=1).items()
    }
    assert not accepted(refusals) and all("unknown" in reason(blob) for blob in refusals.values())


def test_a_container_that_is_not_whole_is_refused():
    cases = {
        "empty": b"",
        "magic only": MAGIC,
        "wrong magic": b"GPTHEAP6" + GENUINE[8:],
        "zip": b"PK\x03\x04" + bytes(100),
        "no body": sealed(b""),
        "three bytes of body": sealed(b"abc"),
        "no header": sealed(bytes(4)),
        "wrong checksum": GENUINE[:8] + bytes(32) + GENUINE[40:],
        "trailing byte": GENUINE + b"x",
        "cut": GENUINE[:-9],
        "a header without end": sealed(RAW_HEADER),
        "header cut": forged(RAW_HEADER[:100], PAYLOAD),
        "header takes payload": forged(RAW_HEADER + PAYLOAD[:5], PAYLOAD[5:]),
        "header longer than any": forged(RAW_HEADER + b" " * 100_000, PAYLOAD),
        "not json": forged(b"{ends:1}", PAYLOAD),
        "not utf-8": forged(b"\xff\xfe\xfa" + RAW_HEADER, PAYLOAD),
        "deep json": forged(b"[" * 90_000, PAYLOAD),
        "deep settings": forged(b'{"a":' * 10_000, PAYLOAD),
        "huge number": forged(b'{"head_k":' + b"9" * 10_000 + b"}", PAYLOAD),
    }
    for value in (None, 3, [], {}, "x", [[]], [["a", 1]], True, dict(settings=HEADER)):
        cases[f"header is {value!r}"[:40]] = forged(value, PAYLOAD)
    assert not accepted(cases)


def test_settings_that_no_run_could_have_are_refused():
    wrong = dict(
        num_layers=[2.0, 0, -1, 3, 1001, None, [2], {}, "x", math.nan],
        model_dim=[33, 64, 0],
        vocab_size=[49, 2**40],
        num_heads=[0, 3],
        mlp_mult=[4],
        qk_gain_init=["x", None, math.nan, math.inf, -1.0],
        head_type=["none", 3, ["tied"], "untied", "mos", "t" * 50_000, "tied\n\x1b[2J\u202e"],
        head_variant=["pr908", "x"],
        smear_gate=[2, "yes", False],
        init_type=["x", ""],
        logit_softcap=[-1.0],
        eval_stride=[-1, "x"],
        compress_algo=["lzma", "zstd", "", None, 1, []],
        value_embed=[True],
        bigram_hash=[True],
    )
    cases = {}
    for name, values in wrong.items():
        for value in values:
            cases[f"{name}={value!r}"[:40]] = with_settings(**{name: value})
    for layers in (9, "x", None, "2", "-1", "", "0," * 20_000):
        cases[f"ve_layers={layers!r}"[:40]] = with_settings(value_embed=True, ve_layers=layers)
    assert not accepted(cases)


def test_stored_settings_that_contradict_each_other_are_refused_under_the_file_s_name(tmp_path):
    (tmp_path / "odd").write_bytes(with_settings(num_heads=3))
    for variable, mode in (("ARTIFACT", "eval"), ("INIT_FROM", "train")):
        err = run_here(tmp_path, {variable: "odd", "MODE": mode}, code=2)
        assert err.startswith(f"error: {variable}=odd: ") and err.count("\n") == 1
        assert "NUM_HEADS=3: must divide" in err


@each_codec
def test_a_payload_of_other_length_than_its_tensors_is_refused(codec):
    """Whatever its place: hidden behind the stream, inside it, between its stretches, or missing."""
    settings = dict(HEADER, compress_algo=codec)
    stream, middle = COMPRESS[codec](RAW), len(RAW) // 2
    payloads = {
        "none": b"",
        "cut": stream[:-9],
        "cut by one": stream[:-1],
        "hidden behind": stream + b"hidden",
        "a second stream behind": stream + stream,
        "of the other codec": COMPRESS["zstd" if codec == "zlib" else "zlib"](RAW),
        "of zeros": bytes(500),
        "as it is": RAW,
        "a number too many": COMPRESS[codec](RAW + bytes(4)),
        "a byte too many": COMPRESS[codec](RAW + b"x"),
        "a byte too few": COMPRESS[codec](RAW[:-1]),
        "a byte between": COMPRESS[codec](RAW[:middle] + b"x" + RAW[middle:]),
        "empty stream": COMPRESS[codec](b""),
    }
    cases = {name: forged(settings, payload) for name, payload in payloads.items()}
    # n and the first code of the first matrix follow the floats
    n_at, cut = 4 * FLOATS, RAW[4 * FLOATS + 1 :]
    for n in (*range(16), 128, 255):
        if n != RAW[n_at]:
            cases[f"n is {n}"] = with_raw(RAW[:n_at] + bytes([n]) + cut, codec)
    cases["a code far off that is not there"] = with_raw(RAW[: n_at + 1] + b"\x80" + cut[1:], codec)
    assert not accepted(cases)


def peak_bytes(action):
    """Of Python, numpy, zlib and zstandard; torch's tensors are not seen."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_peak():
    """Of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_weights_for_which_a_file_has_too_few_bytes_are_refused_before_anything_is_inflated():
    """32 a byte and 2^26, however many they are: 80 GB would be allocated for the first claim."""
    with mock.patch.object(train_gpt, "inflate", wraps=train_gpt.inflate) as inflate:
        claims = (
            dict(vocab_size=2**16, model_dim=2**16, head_type="untied"),
            dict(vocab_size=2**16, model_dim=2**16, mlp_mult=64, num_heads=2**10),
            dict(num_layers=100, model_dim=2**12),
            dict(bigram_hash=True, bigram_vocab_size=10**12),
            *(
                dict(
                    head_settings(head),
                    head_k=64,
                    head_rank=2**16,
                    head_dim=2**16,
                    vocab_size=2**16,
                    model_dim=2**10,
                )
                for head in ALL_HEADS
                if head not in ("tied", "untied")
            ),
        )
        before = resident_peak()
        for claim in claims:
            blob = with_settings(**claim)
            assert peak_bytes(lambda blob=blob: reason(blob)) < 2**22, claim
            assert "cannot hold" in reason(blob), claim
        assert resident_peak() - before < 2**26
        assert not inflate.called

        # at the bound
        claim = dict(HEADER, bigram_hash=True, bigram_vocab_size=2**21, bigram_dim=36)
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(small(**claim)).parameters())
        fewest = math.ceil((count - 2**26) / 32)
        assert "cannot hold" in reason(forged(claim, bytes(fewest - 1))) and not inflate.called
        assert reason(forged(claim, bytes(fewest))) and inflate.called


@each_codec
def test_a_file_of_more_than_32_weights_a_byte_is_read_where_they_are_equal(codec):
    """A large table that was never touched takes zstd next to nothing."""
    changes = dict(LITTLE, bigram_hash=True, bigram_vocab_size=2**17, compress_algo=codec)
    model = random_model(**changes)
    model.bigram.table.weight.data.zero_()
    blob = artifact_of(model, **changes)
    assert codec == "zlib" or 2**21 > 32 * len(blob)
    assert opened(blob)["bigram.table.weight"].shape == (2**17, 16)


@each_codec
def test_a_bomb_is_inflated_no_further_than_its_tensors_reach(codec):
    """128 MiB of zeros, for a model of a few weights and for a larger one."""
    bomb = COMPRESS[codec](bytes(2**27))
    for vocab_size, dim in ((48, 32), (2**14, 64)):
        settings = dict(HEADER, compress_algo=codec, vocab_size=vocab_size, model_dim=dim)
        with torch.device("meta"):
            count = sum(p.numel() for p in GPT(small(**settings)).parameters())
        blob = forged(settings, bomb)
        with mock.patch.object(train_gpt, "inflate", wraps=train_gpt.inflate) as inflate:
            assert peak_bytes(lambda blob=blob: reason(blob)) < 2 * len(blob) + 10 * count + 2**20
            assert reason(blob) and inflate.called


def test_a_long_header_costs_no_memory():
    names = dict(head_type="tied", init_type="x", num_layers="1", qk_gain_init="1", ve_layers="0,")
    cases = {
        name: with_settings(**{"value_embed": True, name: (value * 90_000)[:90_000]})
        for name, value in names.items()
    }
    for unit in (b"[]", b"{}", b"[{}]", b'{"":0}', b"1.5", b'"ab"'):
        units = b",".join([unit] * (99_000 // (len(unit) + 1)))
        cases[f"a list of {unit}"] = forged(b"[" + units + b"]", PAYLOAD)
    cases["without end"] = sealed(b"[" * 2**20)
    cases["of a megabyte"] = forged(RAW_HEADER + b" " * 2**20, PAYLOAD)
    assert not accepted(cases)
    for name, blob in cases.items():
        assert peak_bytes(lambda blob=blob: reason(blob)) < 2**23, name


def test_a_hostile_artifact_to_start_from_is_refused_before_a_model_is_built(
    data, tmp_path, monkeypatch
):
    """INIT_FROM: the model has the artifact's sizes, so its weights are looked at first."""
    changes = dict(LITTLE, vocab_size=1024)
    header, _, payload = header_and_payload(artifact_of(random_model(**changes), **changes))
    header.update(model_dim=2**12, num_layers=20)
    path = tmp_path / "hostile"
    path.write_bytes(forged(header, payload))
    environ = dict(data, INIT_FROM=path, TRAIN_BATCH_TOKENS=96, ITERATIONS=1, RUN_ID="x")
    environ = {name: str(value) for name, value in environ.items()}
    artifact = read_artifact("INIT_FROM", path, cpu_world())
    s = from_env(environ, artifact.stored)
    monkeypatch.chdir(tmp_path)
    built = mock.Mock(side_effect=UserError("a model was built"))
    monkeypatch.setattr(train_gpt, "build_model", built)
    with pytest.raises(UserError, match="cannot hold"):
        train_gpt.run_train(s, cpu_world(), artifact)


@quick
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
    assert reason(blob)


@quick
@given(st.binary(max_size=300))
def test_random_bytes_are_a_users_error(noise):
    for blob in (noise, MAGIC[:7] + noise, MAGIC + noise, sealed(noise)):
        assert reason(blob)
    assert reason(forged(noise, PAYLOAD)) and reason(forged(RAW_HEADER, noise))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def check_any_json(data, value):
    """In any place of the header it is read or a UserError; what is read has the types of its fields."""
    header = copy.deepcopy(HEADER)
    place = data.draw(st.sampled_from(["whole", *HEADER]))
    if place == "whole":
        header = value
    else:
        header[place] = value
    blob = forged(header, PAYLOAD)
    if not reason(blob):  # a harmless change, as of a number within its range
        for name, found in open_artifact("x", blob).stored.items():
            assert type(found) is FIELDS[name.upper()].type, name


@quick
@given(data=st.data(), value=ANY_JSON)
def test_any_json_in_any_place_of_the_header_is_read_or_a_users_error(data, value):
    check_any_json(data, value)


@pytest.mark.slow
@budget(max_examples=2000, deadline=None, derandomize=True)
@given(data=st.data(), value=ANY_JSON)
def test_much_more_json_in_any_place_of_the_header(data, value):
    check_any_json(data, value)


@each_codec
def test_a_bit_flipped_under_a_right_checksum_is_read_or_a_users_error(codec):
    """A forger can also corrupt the compressed stream, and the stretches in it, and seal them again."""
    settings, stream = dict(HEADER, compress_algo=codec), COMPRESS[codec](RAW)
    for flip in range(3, 300, 13):
        damaged = bytearray(stream)
        damaged[flip] ^= 16
        blob = forged(settings, bytes(damaged))
        assert reason(blob) or opened(blob).keys() == opened(GENUINE).keys()
    for flip in range(0, len(RAW), len(RAW) // 20):
        damaged = bytearray(RAW)
        damaged[flip] ^= 64
        assert reason(with_raw(damaged, codec)) or opened(with_raw(damaged, codec))


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
    strange = [b"-1", b"1e999", b"NaN", b"null", b"true", b'"\\n\\u0000"', b'"1"', b"9" * 30, b"[]"]
    numbers = [b"%d" % rng.randrange(1001), b"%.6g" % rng.expovariate(0.01)]
    new = rng.choice([other.group(), mutated(old.group(), rng), *strange, *numbers])
    return header[: old.start()] + new + header[old.end() :]


@pytest.mark.slow
@each_codec
def test_2000_mutated_artifacts_are_refused_or_loaded_whole(codec):
    """Without and with the checksum made right again; the last kind is whole but for its integers and numbers."""
    rng = random.Random(0)
    raw_header = RAW_HEADER.replace(b'"zlib"', f'"{codec}"'.encode())
    stream, original = COMPRESS[codec](RAW), opened(GENUINE)
    blob, loaded = forged(raw_header, stream), [0] * 5
    for i in range(2000):
        kind = i % len(loaded)
        if kind == 0:
            mutant = mutated(blob, rng)
        elif kind == 1:
            mutant = forged(lying(raw_header, rng), stream)
        elif kind == 2:
            mutant = sealed(mutated(blob[40:], rng))
        elif kind == 3:
            mutant = forged(raw_header, mutated(stream, rng))
        else:
            mutant = with_raw(mutated(RAW, rng), codec)
        if reason(mutant):
            continue
        loaded[kind] += 1
        found = opened(mutant)
        assert list(found) == list(original), i
        for name, weight in original.items():
            assert found[name].shape == weight.shape, (i, name)
            assert kind > 1 or torch.equal(found[name], weight), (i, name)
    assert loaded[1] > 9 and loaded[4] > 25  # the test sees both outcomes


PEAK = """
import sys, train_gpt as t
from pathlib import Path
def now(figure):
    return 1024 * int(Path("/proc/self/status").read_text().split(figure + ":")[1].split()[0])
def read(path):
    return t.artifact_weights(t.read_artifact("ARTIFACT", path, t.World({})))
read(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = now("VmRSS")
try:
    read(sys.argv[2])
except t.UserError as error:
    print(now("VmHWM") - before, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of a process is not measured here",
)
def test_memory_for_a_file_as_large_as_may_be_that_turns_out_bad_at_its_end(tmp_path):
    """Noise at the study's size, with a byte too many. The variable lets glibc return freed memory at once."""
    s = from_env({})
    with torch.device("meta"):
        shapes = GPT(s)
    roles, draw = shapes.parameter_roles(), torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=draw) for name, p in shapes.named_parameters()}
    own = 4 * sum(p.numel() for p in state.values())
    large, little = tmp_path / "large", tmp_path / "little"
    compress = train_gpt.compress
    with mock.patch.object(
        train_gpt, "compress", lambda parts, codec: compress([*parts, b"x"], codec)
    ):
        large.write_bytes(encode(state, roles, s, 0.175))
    little.write_bytes(GENUINE)
    size = large.stat().st_size
    assert 15_500_000 < size < 16_000_000
    variables = environment(dict(PYTHONPATH=ROOT, MALLOC_MMAP_THRESHOLD_=65536))
    command = [sys.executable, "-c", PEAK, str(little), str(large)]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert "more than its tensors" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) < 2 * size + 1.2 * own


def test_eval_mode_refuses_what_is_no_artifact_in_one_line(tmp_path):
    path = tmp_path / "artifact"
    path.write_bytes(GENUINE[:-5] + b"x" + GENUINE[-4:])
    error = run(tmp_path, dict(MODE="eval", ARTIFACT=path), code=2)
    assert re.fullmatch(f"error: ARTIFACT={re.escape(str(path))}: .+\n", error)


def test_what_cannot_be_read_is_refused_by_its_variable(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for variable, name in itertools.product(("ARTIFACT", "INIT_FROM"), ("empty", "folder", "none")):
        path = tmp_path / name
        with pytest.raises(UserError, match=f"^{variable}={re.escape(str(path))}: .+$"):
            read_artifact(variable, str(path), cpu_world())

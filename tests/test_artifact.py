"""The export's grid, its size against the cap, its round trip, late QAT on it, and what a hostile file can do."""

import copy
import dataclasses
import hashlib
import json
import math
import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

import train_gpt
from train_gpt import GPT, HEADS, MAGIC, Hyperparameters, UserError, World, encode, load_artifact, on_grid, pack, unpack

SMALL = dict(
    vocab_size=64, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, rope_dims=4, bigram_vocab_size=40,
    bigram_dim=16, ve_dim=16, ve_layers="1", xsa_last_n=1, train_seq_len=16, train_batch_tokens=64, head_rank=16,
    head_dim=16, eval_stride=8, compile="0", compute_dtype="fp32")
LEVELS = dict(int8=127, int16=32767)
CODECS = ("zlib", "zstd")


def small(**changes):
    return dataclasses.replace(Hyperparameters(), **{**SMALL, **changes})


def need_codec(codec):
    return pytest.importorskip("zstandard") if codec == "zstd" else None


def cpu_world():
    world = World()
    world.device = torch.device("cpu")
    return world


def random_model(**changes):
    torch.manual_seed(0)
    model = GPT(small(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def gaussian(rows=768, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def student_t(rows=768, columns=512, seed=0):
    """Heavy tails: 3 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns))).float()


KINDS = dict(gaussian=gaussian, student_t=student_t)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_integer = pytest.mark.parametrize("integer", LEVELS)
each_codec = pytest.mark.parametrize("codec", CODECS)
MATRIX, TABLE = "blocks.0.mlp.up.weight", "tok_emb.weight"


def packed(weight, limit, codec="zlib", role="matrix"):
    name = MATRIX if role == "matrix" else TABLE
    return pack({name: weight}, {name: role}, small(compress_algo=codec), limit)


def stored_as(weight, role):
    """The design's rule: matrices as integers, those of the vocabulary side more finely; all else in half precision."""
    if weight.ndim >= 2 and min(weight.shape[-2:]) >= 16:
        return "int16" if role in ("embed", "vocab") else "int8"
    return "float16"


def as_exported(weight, role, step):
    kind = stored_as(weight, role)
    return weight.half().float() if kind == "float16" else on_grid(weight, kind, step)


def error_of(found, weight):
    return ((found - weight).square().sum() / weight.square().sum()).item()


# ---- The grid --------------------------------------------------------------------------------------------------------


@each_integer
@pytest.mark.parametrize("step", [0.0, 0.05, 0.15, 1.0, 8.0])
@each_kind
def test_every_weight_is_within_half_a_step_and_none_is_clipped(kind, step, integer):
    for seed in range(3):
        w = KINDS[kind](200, 64, seed)
        w[5, 3] = 300.0  # an outlier
        q, scale = train_gpt.to_grid(w, integer, step)
        assert torch.equal(q, q.round()) and q.abs().max() <= LEVELS[integer]
        found = on_grid(w, integer, step)
        torch.testing.assert_close(found, q * scale.float(), rtol=0, atol=0)
        assert ((found - w).abs() <= scale.float() / 2 * (1 + 1e-3)).all()


@each_integer
def test_step_zero_is_plain_absmax(integer):
    w = gaussian(100, 64)
    _, scale = train_gpt.to_grid(w, integer, 0.0)
    torch.testing.assert_close(scale.float(), w.abs().amax(1, keepdim=True) / LEVELS[integer], rtol=2**-7, atol=0)
    assert train_gpt.to_grid(w, integer, 0.0)[0].abs().amax(1).min() >= 0.98 * LEVELS[integer]


@each_integer
@pytest.mark.parametrize("step", [0.0, 0.2])
def test_the_relative_error_of_a_row_does_not_depend_on_its_size(integer, step):
    w = gaussian(40, 64)
    usual = on_grid(w, integer, step)
    for size in (1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30):
        mixed = w.clone()
        mixed[::2] *= size  # the neighbours stay as they are
        found = on_grid(mixed, integer, step)
        torch.testing.assert_close(found[1::2], usual[1::2], rtol=0, atol=0)
        error = error_of(found[::2].double() / size, w[::2].double())
        assert error <= 1.1 * error_of(usual[::2], w[::2]), size


@each_integer
def test_zero_rows_stay_zero(integer):
    w = gaussian(20, 32)
    w[7] = 0
    for step in (0.0, 0.3):
        found = on_grid(w, integer, step)
        assert not found[7].any() and found[6].any() and torch.isfinite(found).all()


def test_a_stack_is_rounded_as_its_matrices_and_the_vocabulary_side_more_finely():
    w = gaussian(60, 32).view(3, 20, 32)
    torch.testing.assert_close(on_grid(w, "int8", 0.2), torch.stack([on_grid(m, "int8", 0.2) for m in w]))
    assert error_of(on_grid(w, "int16", 0.2), w) < error_of(on_grid(w, "int8", 0.2), w) / 30


# ---- Size ------------------------------------------------------------------------------------------------------------


@each_codec
@each_kind
def test_pack_uses_the_limit_to_within_half_a_percent_and_is_deterministic(kind, codec):
    need_codec(codec)
    w = KINDS[kind]()
    plain = len(packed(w, 10**9, codec)[0])
    for share in (0.9, 0.7, 0.5):
        limit = int(share * plain)
        blob, step = packed(w, limit, codec)
        assert 0.995 * limit <= len(blob) <= limit and step > 0
    assert packed(w, limit, codec) == (blob, step)


@each_codec
@pytest.mark.parametrize("slack", [0, 1, 10**6])
def test_pack_rounds_plainly_where_that_fits(slack, codec):
    need_codec(codec)
    w = gaussian(200, 100)
    blob, step = packed(w, 10**9, codec)
    assert step == 0.0
    assert packed(w, len(blob) + slack, codec) == (blob, 0.0)
    assert packed(w, len(blob) - 1, codec)[1] > 0


def test_a_mixed_model_also_meets_its_limit():
    model = random_model(model_dim=128, vocab_size=512, bigram_vocab_size=512, head_type="mos")
    state, roles, s = model.state_dict(), train_gpt.parameter_roles(model), small()
    limit = int(0.6 * len(pack(state, roles, s, 10**9)[0]))
    assert 0.995 * limit <= len(pack(state, roles, s, limit)[0]) <= limit


def entropy(integers):
    _, counts = np.unique(integers.numpy(), return_counts=True)
    p = counts / counts.sum()
    return -(p * np.log2(p)).sum() / 8


@each_codec
@each_kind
@pytest.mark.parametrize("step", [0.0, 0.05, 0.12, 0.158, 0.3])
def test_payload_is_near_the_order_0_entropy_of_the_integers(step, kind, codec):
    """Within 1.5% for deflate; zstd's Huffman tables (one for 128 KiB) cost a little more."""
    need_codec(codec)
    w = KINDS[kind](1024, 512)
    blob = encode({MATRIX: w}, {MATRIX: "matrix"}, small(compress_algo=codec), step)
    payload = len(blob) - 44 - len(header_of(blob)[1])
    ideal = w.numel() * entropy(train_gpt.to_grid(w, "int8", step)[0]) + 2 * len(w)
    assert payload <= dict(zlib=1.015, zstd=1.03)[codec] * ideal


@pytest.mark.parametrize("kind, gain", [("gaussian", 0.10), ("student_t", 0.25)])
def test_error_at_equal_bytes_is_well_below_int6_absmax_with_zlib(kind, gain):
    w = KINDS[kind](1024, 512)
    scale = (w.abs().amax(1, keepdim=True) / 31).half().float()
    q = (w / scale).round().clamp(-31, 31)
    raw = q.to(torch.int8).numpy().tobytes() + scale.half().numpy().tobytes()
    blob, _ = packed(w, len(zlib.compress(raw, 9)))
    assert error_of(unpack(blob, "")[1][MATRIX], w) <= (1 - gain) * error_of(q * scale, w)


# ---- Round trip ------------------------------------------------------------------------------------------------------


@each_codec
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("step", [0.0, 0.13])
def test_unpacked_weights_are_those_of_the_grid_and_settings_survive(step, head, codec):
    need_codec(codec)
    model = random_model(head_type=head, compress_algo=codec)
    state, roles = model.state_dict(), train_gpt.parameter_roles(model)
    s = small(head_type=head, compress_algo=codec, rope_base=12345.5)
    settings, found = unpack(encode(state, roles, s, step), "x")
    assert list(found) == list(state)
    for name, weight in state.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], as_exported(weight, roles[name], step)), name
    for field in dataclasses.fields(s):
        if field.metadata["scope"] == "model":
            assert settings[field.name] == getattr(s, field.name)
    assert settings["eval_stride"] == s.eval_stride and "seed" not in settings


def test_values_beyond_float16_survive():
    w = torch.tensor([1e6, -3.0, 1e-3])
    found = unpack(encode({"skip_weights": w}, {"skip_weights": "scalar"}, small(), 0.0), "x")[1]["skip_weights"]
    torch.testing.assert_close(found, w, rtol=1e-3, atol=0)


@pytest.mark.parametrize("changes", [{}, dict(num_layers=1, ve_layers="0"), dict(head_type="mos"),
                                     dict(value_embed=False, bigram_hash=False, smear_gate=False)], ids=str)
def test_a_loaded_artifact_computes_what_the_rounded_model_does(changes, tmp_path):
    model, world = random_model(**changes), cpu_world()
    roles, s, path = train_gpt.parameter_roles(model), small(**changes), tmp_path / "final_model.int8.ptz"
    blob, step = pack(model.state_dict(), roles, s, 10**9)
    path.write_bytes(blob)
    loaded = load_artifact(path, train_gpt.from_env({}, defaults=unpack(blob, path)[0]), world)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(as_exported(p, roles[name], step))
    x, y = torch.randint(64, (2, 3, 16))
    assert torch.equal(loaded(x, y), model(x, y))


def test_an_artifact_of_other_tensors_is_refused(tmp_path):
    model, world, path = random_model(), cpu_world(), tmp_path / "a"
    path.write_bytes(pack(model.state_dict(), train_gpt.parameter_roles(model), small(), 10**9)[0])
    for changes in (dict(num_layers=4), dict(mlp_mult=2), dict(head_type="mos")):
        with pytest.raises(UserError):
            load_artifact(path, small(**changes), world)


# ---- Late QAT --------------------------------------------------------------------------------------------------------


def test_rounded_weights_lie_on_the_grid_inside_and_come_back_bit_for_bit():
    model = random_model()
    roles, before = train_gpt.parameter_roles(model), copy.deepcopy(model.state_dict())
    with train_gpt.rounded_weights(model, roles, 0.3):
        for name, p in model.named_parameters():
            if stored_as(p, roles[name]) == "float16":
                assert torch.equal(p, before[name]), name
            else:
                assert torch.equal(p, as_exported(before[name], roles[name], 0.3)), name
                assert not torch.equal(p, before[name]), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with train_gpt.rounded_weights(model, roles, None):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rounded_weights_come_back_when_the_body_raises():
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), train_gpt.rounded_weights(model, train_gpt.parameter_roles(model), 0.3):
        raise KeyError("an interruption")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_are_taken_at_the_rounded_weights():
    model, x, y = random_model(), *torch.randint(64, (2, 3, 16))
    roles, rounded = train_gpt.parameter_roles(model), random_model()
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if stored_as(p, roles[name]) != "float16":
                p.copy_(as_exported(p, roles[name], 0.5))
    with train_gpt.rounded_weights(model, roles, 0.5):
        model(x, y).backward()
    rounded(x, y).backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters()):
        assert torch.equal(p.grad, q.grad), name


# ---- Hostile files ---------------------------------------------------------------------------------------------------


def sealed(body):
    return MAGIC + hashlib.sha256(body).digest() + body


def forged(header, payload, length=None):
    """An artifact with a right checksum around any header (an object, or its bytes) and payload."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return sealed(struct.pack("<I", len(header) if length is None else length) + header + payload)


def header_of(blob):
    size = struct.unpack("<I", blob[40:44])[0]
    return json.loads(blob[44:44 + size]), blob[44:44 + size], blob[44 + size:]


def genuine(codec="zlib"):
    if codec == "zstd":
        need_codec(codec)
    model = random_model(bigram_hash=False, value_embed=False, num_layers=2)
    return pack(model.state_dict(), train_gpt.parameter_roles(model),
                small(bigram_hash=False, value_embed=False, num_layers=2, compress_algo=codec), 10**9)[0]


GENUINE = genuine()
HEADER, RAW_HEADER, PAYLOAD = header_of(GENUINE)


def open_artifact(blob):
    """As MODE=eval opens it: the settings, and the model that they are for."""
    settings, _ = unpack(blob, "some/path")
    settings = train_gpt.from_env({}, defaults=settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        path.write_bytes(blob)
        return settings, load_artifact(path, settings, cpu_world())


def refused(blob):
    """True for a UserError of one line that names the file; any other exception passes through."""
    try:
        open_artifact(blob)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def altered(**changes):
    return forged({**HEADER, **changes}, PAYLOAD)


def with_tensor(index=0, name=None, kind=None, shape=None):
    tensors = copy.deepcopy(HEADER["tensors"])
    for place, value in enumerate((name, kind, shape)):
        if value is not None:
            tensors[index][place] = value
    return altered(tensors=tensors)


def with_settings(**changes):
    return altered(settings={**HEADER["settings"], **changes})


def test_the_forgers_tools_can_make_a_genuine_artifact():
    assert forged(RAW_HEADER, PAYLOAD) == GENUINE
    assert not refused(GENUINE) and not refused(altered()) and not refused(with_settings(rope_base=500.0))


def shaped(tensor_shape, count):
    """A header whose only tensor claims a shape, over a payload of `count` bytes."""
    return forged(dict(HEADER, tensors=[["w", "int8", tensor_shape]]), train_gpt.compress(bytes(count), "zlib"))


def twins():
    """Whole in every length, but two tensors bear one name."""
    state = {f"{i}": torch.randn(shape) for i, (_, _, shape) in enumerate([*HEADER["tensors"], HEADER["tensors"][0]])}
    roles = {f"{i}": "embed" if kind == "int16" else "matrix" for i, (_, kind, _) in
             enumerate([*HEADER["tensors"], HEADER["tensors"][0]])}
    header, _, payload = header_of(encode(state, roles, small(), 0.0))
    for tensor, (name, _, _) in zip(header["tensors"], [*HEADER["tensors"], HEADER["tensors"][0]]):
        tensor[0] = name
    return forged(dict(header, settings=HEADER["settings"]), payload)


VECTOR = next(i for i, (_, kind, _) in enumerate(HEADER["tensors"]) if kind == "float16")
HOSTILE = {
    "empty": b"", "magic only": MAGIC, "wrong magic": b"GPTHEAD9" + GENUINE[8:], "no body": sealed(b""),
    "three bytes of body": sealed(b"abc"), "no header": sealed(bytes(4)), "zip": b"PK\x03\x04" + bytes(100),
    "wrong checksum": GENUINE[:8] + bytes(32) + GENUINE[40:], "trailing byte": GENUINE + b"x",
    "header longer than file": forged(RAW_HEADER, PAYLOAD, 2**32 - 1), "header cut": forged(RAW_HEADER, PAYLOAD, 100),
    "header takes payload": forged(RAW_HEADER, PAYLOAD, len(RAW_HEADER) + 5), "not json": forged(b"{codec:1}", PAYLOAD),
    "not utf-8": forged(b"\xff\xfe\xfa" + RAW_HEADER, PAYLOAD), "deep json": forged(b"[" * 200000, PAYLOAD),
    "deep settings": forged(b'{"settings":' + b'{"a":' * 100000, PAYLOAD),
    "huge number": forged(b'{"codec":' + b"9" * 10000 + b"}", PAYLOAD),
    "trailing payload": forged(RAW_HEADER, PAYLOAD + b"x"), "no payload": forged(RAW_HEADER, b""),
    "payload cut": forged(RAW_HEADER, PAYLOAD[:-9]), "payload not deflate": forged(RAW_HEADER, b"\0" * 50),
    "payload too long": forged(RAW_HEADER, train_gpt.compress(zlib.decompress(PAYLOAD) + b"x", "zlib")),
    "payload too short": forged(RAW_HEADER, train_gpt.compress(zlib.decompress(PAYLOAD)[:-1], "zlib")),
    **{f"header is {value!r}": forged(json.dumps(value).encode(), PAYLOAD) for value in (None, 3, [], {}, "x", [[]])},
    **{f"no {key}": forged({k: v for k, v in HEADER.items() if k != key}, PAYLOAD) for key in HEADER},
    **{f"codec {value!r}": altered(codec=value) for value in ("lzma", "zstd", "", None, 1, [], {})},
    **{f"tensors {value!r}": altered(tensors=value) for value in (
        None, 3, "abc", {}, [], [1], [[]], [["a"]], {"abc": 1})},
    **{f"kind {value!r}": with_tensor(kind=value) for value in ("int4", "int64", "load", "", None, 7, ["int8"], {})
       if value is not None},
    **{f"name {value!r}": with_tensor(name=value) for value in (3, ["a"], {}, True)},
    **{f"shape {value!r}": with_tensor(shape=value) for value in (
        [-64, 32], [64, -32], [-64, -32], [0, 32], [64, 0], [True, 2048], [64.0, 32], ["64", 32], [None], "ab", 5, {},
        {"a": 1}, [[64, 32]], [64, 33], [63, 32], [32, 64], [64, 32, 2], [10**12], [10**6, 10**6], [2**63, 2], [2**64],
        [10**30], [1] * 500 + [64, 32])},
    "integers without shape": shaped([], 3), "vector of integers": shaped([4], 6),
    "many dimensions": shaped([1] * 2000, 3), "wrong row length": with_tensor(VECTOR, shape=[7]),
    "duplicated name": with_tensor(1, name=HEADER["tensors"][0][0]),
    "duplicated tensor": altered(tensors=HEADER["tensors"] + HEADER["tensors"][:1]),
    "two tensors of one name": twins(),
    "extra tensor": altered(tensors=[*HEADER["tensors"], ["extra", "float16", [4]]]),
    "missing tensor": altered(tensors=HEADER["tensors"][:-1]),
    **{f"settings {value!r}": altered(settings=value) for value in (None, 3, "abc", [], [["a", 1]], [1], True)},
    **{f"setting {name}={value!r}": with_settings(**{name: value}) for name, value in (
        ("unknown", 1), ("num_layers", "3"), ("num_layers", 2.0), ("num_layers", 0), ("num_layers", -1),
        ("num_layers", True), ("num_layers", None), ("num_layers", [2]), ("num_layers", 10**9), ("vocab_size", 2**40),
        ("model_dim", 33), ("model_dim", 0), ("num_heads", 0), ("rope_base", "x"), ("rope_base", None),
        ("rope_base", math.nan), ("rope_base", math.inf), ("rope_base", -1.0), ("head_type", "none"), ("head_type", 3),
        ("head_type", ["tied"]), ("smear_gate", 2), ("smear_gate", "yes"),
        ("init_type", "x"), ("logit_softcap", -1.0), ("eval_stride", 10**6), ("eval_stride", "64"))},
    **{f"value layers {value!r}": with_settings(value_embed=True, ve_layers=value) for value in (9, "x", None, "1")},
}
# A vector of integers is odd, but whole: it may be read or refused, never crash. All others must be refused.
TOLERATED = {"vector of integers"}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_artifact_is_a_users_error(case):
    assert refused(HOSTILE[case]) or case in TOLERATED


@pytest.mark.parametrize("case", ["trailing payload", "payload cut", "no payload"])
def test_hostile_zstd_payload_is_a_users_error(case):
    need_codec("zstd")
    blob = genuine("zstd")
    _, header, payload = header_of(blob)
    assert not refused(blob)
    change = {"trailing payload": payload + b"x", "payload cut": payload[:-9], "no payload": b""}
    assert refused(forged(header, change[case]))
    assert refused(forged(header, PAYLOAD)) and refused(forged(RAW_HEADER, payload))


def peak_bytes(blob):
    tracemalloc.start()
    try:
        assert refused(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@each_codec
def test_nothing_large_is_allocated_for_a_lie(codec):
    """Neither for claimed sizes, nor for a payload that inflates to 300 MB."""
    need_codec(codec)
    zeros = bytes(300 * 2**20)
    bomb = zlib.compress(zeros, 1) if codec == "zlib" else need_codec(codec).ZstdCompressor(level=1).compress(zeros)
    for claimed in (2**16, len(zeros)):
        blob = forged(dict(HEADER, codec=codec, tensors=[["w", "float16", [claimed // 2]]]), bomb)
        assert peak_bytes(blob) < 4 * len(blob) + 2**22
    for shape in ([10**12], [10**6, 10**6], [1, 10**12], [10**12, 1]):
        for kind in ("int8", "int16", "float16", "float32"):
            lie = forged(dict(HEADER, codec=codec, tensors=[["w", kind, shape]]), PAYLOAD)
            assert peak_bytes(lie) < 2**20


@budget(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(GENUINE) - 1), st.sampled_from(["cut", "flip", "drop", "double"]), st.integers(0, 7))
def test_damage_anywhere_is_a_users_error(place, damage, bit):
    blob = dict(
        cut=GENUINE[:place], drop=GENUINE[:place] + GENUINE[place + 1:],
        flip=GENUINE[:place] + bytes([GENUINE[place] ^ 1 << bit]) + GENUINE[place + 1:],
        double=GENUINE[:place] + GENUINE[place:place + 1] + GENUINE[place:])[damage]
    assert refused(blob)


@budget(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_users_error(noise):
    for blob in (noise, MAGIC + noise, sealed(noise), forged(noise, PAYLOAD), forged(RAW_HEADER, noise)):
        assert refused(blob)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["int8", "zlib"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)


@budget(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), value=JSON)
def test_any_json_in_any_place_of_the_header_is_read_or_a_users_error(data, value):
    header = copy.deepcopy(HEADER)
    place = data.draw(st.sampled_from(["codec", "settings", "tensors", "tensor", "field", "setting", "whole"]))
    if place == "whole":
        header = value
    elif place == "tensor":
        header["tensors"][data.draw(st.integers(0, 5))] = value
    elif place == "field":
        header["tensors"][data.draw(st.integers(0, 5))][data.draw(st.integers(0, 2))] = value
    elif place == "setting":
        header["settings"][data.draw(st.sampled_from(sorted(header["settings"])))] = value
    else:
        header[place] = value
    blob = forged(header, PAYLOAD)
    if not refused(blob):  # a harmless change, as of a name or of a number within its range
        settings, model = open_artifact(blob)
        assert isinstance(settings, Hyperparameters) and isinstance(model, GPT)
        for field in dataclasses.fields(settings):
            assert type(getattr(settings, field.name)).__name__ == field.type, field.name


@each_codec
@pytest.mark.parametrize("flip", range(5, 200, 13))
def test_damage_under_a_right_checksum_is_read_or_a_users_error(flip, codec):
    """A forger can also corrupt the compressed stream and seal it again."""
    blob = GENUINE if codec == "zlib" else genuine(codec)
    _, header, payload = header_of(blob)
    damaged = forged(header, payload[:flip] + bytes([payload[flip] ^ 16]) + payload[flip + 1:])
    assert refused(damaged) or isinstance(open_artifact(damaged)[1], GPT)

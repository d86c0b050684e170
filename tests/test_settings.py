"""Settings: what is accepted, what is refused and with which words, and that nothing else reads the environment."""

import ast
import dataclasses
import glob
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg
from train_gpt import Hyperparameters, UserError, from_env

SCRIPT = Path(tg.__file__)
FIELDS = tg.FIELDS
NUMBERS = [name for name, field in FIELDS.items() if type(field.default) in (int, float)]
SWITCHES = [name for name, field in FIELDS.items() if type(field.default) is bool]
CHOICES = {
    name: field.metadata["choices"] for name, field in FIELDS.items() if field.metadata["choices"]
}
CHOICES["HEAD_TYPE"] = tuple(tg.HEADS)

STUDY_A = dict(
    pair.split("=")
    for pair in """
    NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 VOCAB_SIZE=1024
    USE_EMA=1 EMA_FROM_INIT=1 EMA_ALPHA=0.997 XSA_LAST_N=4 SMEAR_GATE=1
    BIGRAM_HASH=1 BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 USE_NTK_ROPE=1 ROPE_DIMS=16 LN_SCALE=1
    VALUE_EMBED=1 VE_DIM=128 VE_LAYERS=9,10 LATE_QAT=1 QAT_THRESHOLD=0.15 QAT_BITS=6 USE_QAT=0
    MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 GRAD_CLIP_NORM=0.3
    MUON_WEIGHT_DECAY=0.04 ADAM_WD=0.04 INIT_TYPE=ortho WARMDOWN_ITERS=3500
    TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_STRIDE=64 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=200
    COMPRESS_ALGO=zstd QUANT_BITS_MIDDLE=6 QUANT_BITS_MLP=6 GRAD_GUIDED_QUANT=0 MAX_WALLCLOCK_SECONDS=600
    USE_FA3=1 FLASH_ATTN_BACKEND=fa3 FLASH_ATTN_STRICT=1 FLASH_ATTN_ARCH_LIST=9.0 SKIP_COMPILE=0 SKIP_QUANT=0
    DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
""".split()
)
STUDY_B = dict(
    VOCAB_SIZE="1024",
    SEED="42",
    USE_MOS="1",
    MOS_K="2",
    MOS_RANK="64",
    MAX_WALLCLOCK_SECONDS="600",
    VAL_LOSS_EVERY="500",
    TRAIN_LOG_EVERY="100",
)
TORCHRUN = """RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID
    TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS""".split()
MACHINE = """PATH HOME USER SHELL LANG TERM PWD HOSTNAME PYTHONPATH CUDA_VISIBLE_DEVICES NCCL_DEBUG SLURM_JOB_ID
    VIRTUAL_ENV TMPDIR LD_LIBRARY_PATH""".split()


def env_of(text):
    return dict(pair.split("=", 1) for pair in text.split())


def text_of(value):
    return str(int(value)) if isinstance(value, bool) else str(value)


def head_for(name):
    """The head that uses this setting, where it is a head's own."""
    head = {
        "HEAD_K": "mos",
        "HEAD_RANK": "mos",
        "HEAD_DIM": "simplex",
        "HEAD_LR": "delta",
        "HEAD_UNTIE_FRAC": "untied",
        "HEAD_MATRIX_LR": "mos",
    }.get(name)
    return {"HEAD_TYPE": head} if head else {}


def refusal(env):
    with pytest.raises(UserError) as error:
        from_env(env)
    return str(error.value)


# ---- accepted ----


def test_an_empty_environment_gives_the_dataclass_defaults():
    assert from_env({}) == Hyperparameters()


def test_without_an_argument_the_process_environment_is_read(monkeypatch):
    monkeypatch.setenv("SEED", "4242")
    assert from_env().seed == 4242


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_accepted_at_its_default(name):
    head = head_for(name)
    assert from_env({name: text_of(FIELDS[name].default), **head}) == from_env(head)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_documentation(name):
    assert FIELDS[name].metadata["doc"].strip()


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_accepted(name):
    low, high = (FIELDS[name].metadata[end] for end in ("low", "high"))
    assert (tg.parse(name, repr(low)), tg.parse(name, repr(high))) == (low, high)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_0_or_1(name):
    assert [tg.parse(name, text) for text in "01"] == [False, True]


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted(name):
    assert [tg.parse(name, choice) for choice in CHOICES[name]] == list(CHOICES[name])


@pytest.mark.parametrize(
    "env, expected",
    [
        ("MODE=bench", dict(mode="bench")),
        (
            "MODE=eval ARTIFACT=x.ptz EVAL_SPLIT=test",
            dict(mode="eval", artifact="x.ptz", eval_split="test"),
        ),
        ("CHECKPOINT_SECONDS=30", dict(checkpoint_seconds=30)),
    ],
)
def test_the_promised_modes_and_their_variables_are_settings(env, expected):
    got = from_env(env_of(env))
    assert {name: getattr(got, name) for name in expected} == expected


# ---- refused ----


def outside(name):
    low, high = (FIELDS[name].metadata[end] for end in ("low", "high"))
    if type(FIELDS[name].default) is int:
        return str(low - 1), str(high + 1)
    return repr(float(np.nextafter(low, -np.inf))), repr(float(np.nextafter(high, np.inf)))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("side, words", [(0, "must be at least "), (1, "must be at most ")])
def test_a_number_outside_its_range_is_refused_with_a_bound_that_is_right(name, side, words):
    text = outside(name)[side]
    message = refusal({name: text, **head_for(name)})
    assert message.startswith(f"{name}={text}: {words}")
    bound, meta = float(message.split(words)[1].split()[0].rstrip(";,.")), FIELDS[name].metadata
    assert meta["low"] <= bound <= meta["high"], message


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "1e", "0x10", "nan", "inf", "-inf", "1e999", "9" * 400, "9" * 5000, "--1"],
    ids=lambda text: repr(text[:5]) + f" x {len(text)}" * (len(text) > 5),
)
def test_what_is_no_finite_number_is_refused(name, text):
    assert refusal({name: text, **head_for(name)}).startswith(f"{name}={text}: must be ")


@pytest.mark.parametrize("name", [name for name in NUMBERS if type(FIELDS[name].default) is int])
@pytest.mark.parametrize("text", ["1.5", "1e3"])
def test_a_fraction_is_refused_where_a_whole_number_is_due(name, text):
    assert refusal({name: text, **head_for(name)}) == f"{name}={text}: must be a whole number"


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("text", ["", "2", "true", "yes", "-1", " 1"])
def test_a_switch_takes_nothing_but_0_and_1(name, text):
    assert refusal({name: text}) == f"{name}={text}: must be 0 or 1"


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("text", [" ", "nothing of the kind"])
def test_a_wrong_choice_is_refused_with_all_choices(name, text):
    message = refusal({name: text})
    assert message.startswith(f"{name}={text}: must be one of ")
    assert all(choice in message for choice in CHOICES[name])


@pytest.mark.parametrize(
    "env, hint",
    [
        ("HEAD_TYPE=simplx", "simplex"),
        ("HEAD_TYPE=factorised", "factorized"),
        ("COMPRESS_ALGO=zlb", "zlib"),
        ("MODE=evel", "eval"),
        ("PRESET=pilott", "pilot"),
        ("INIT_TYPE=otho", "ortho"),
        ("COMPUTE_DTYPE=bf6", "bf16"),
    ],
)
def test_a_misspelt_choice_is_refused_with_a_hint(env, hint):
    message = refusal(env_of(env))
    assert message.startswith(f"{env}: must be one of ")
    assert f"did you mean {hint}?" in message


@pytest.mark.parametrize(
    "name, likely",
    [
        ("HEAD_TPYE", "HEAD_TYPE"),
        ("HEADTYPE", "HEAD_TYPE"),
        ("SEEED", "SEED"),
        ("MODEL_DIR", "MODEL_DIM"),
        ("MATRIX_LRS", "MATRIX_LR"),
        ("MOSK", "MOS_K"),
        ("SIMPLEX_DIMS", "SIMPLEX_DIM"),
        ("QUANT_BITS_MIDLE", "QUANT_BITS_MIDDLE"),
        ("USE_MOSS", "USE_MOS"),
        ("RANK_DIMS", "RANK_DIM"),
    ],
)
def test_a_near_miss_names_the_likely_variable_and_how_to_go_on(name, likely):
    message = refusal({name: "7"})
    assert message.startswith(f"{name}=7: ")
    assert likely in message.split(": ", 1)[1]
    assert "ALLOW_NEAR_MISSES=1" in message
    assert from_env({name: "7", "ALLOW_NEAR_MISSES": "1"}) == Hyperparameters(
        allow_near_misses=True
    )


@pytest.mark.parametrize("allow", ["0", "", "yes"])
def test_only_1_allows_near_misses(allow):
    refusal({"HEAD_TPYE": "mos", "ALLOW_NEAR_MISSES": allow})


@pytest.mark.parametrize("name", [*TORCHRUN, *MACHINE])
def test_the_variables_of_torchrun_and_of_any_machine_are_no_near_misses(name):
    assert from_env({name: "1"}) == Hyperparameters()


# ---- presets ----


@pytest.mark.parametrize(
    "env, expected",
    [
        ("PRESET=study", dict(preset="study", num_layers=11, model_dim=512)),
        ("PRESET=pilot", dict(preset="pilot", num_layers=9, model_dim=512)),
        ("PRESET=pilot NUM_LAYERS=3", dict(preset="pilot", num_layers=3, mlp_mult=2)),
        ("PRESET=demo", dict(preset="demo", data_path="demo", num_layers=11, model_dim=128)),
        ("PRESET=demo DATA_PATH=mine", dict(preset="demo", data_path="mine", model_dim=128)),
        ("DATA_PATH=demo", dict(preset="demo", data_path="demo", model_dim=128)),
        ("DATA_PATH=demo MODEL_DIM=64", dict(preset="demo", model_dim=64, num_heads=4)),
        ("DATA_PATH=demo PRESET=study", dict(preset="study", data_path="demo", model_dim=512)),
        ("USE_MOS=1", dict(preset="pilot", head_type="mos", num_layers=9)),
        ("USE_MOS=1 PRESET=study", dict(preset="study", head_type="mos", num_layers=11)),
        ("USE_MOS=1 NUM_LAYERS=5", dict(preset="pilot", head_type="mos", num_layers=5)),
        ("USE_MOS=0", dict(preset="pilot", head_type="tied", num_layers=9)),
        ("USE_MOS=0 MOS_K=4 MOS_RANK=8", dict(preset="pilot", head_type="tied", num_layers=9)),
    ],
)
def test_an_explicit_variable_beats_the_preset_which_beats_the_default(env, expected):
    got = from_env(env_of(env))
    assert {name: getattr(got, name) for name in expected} == expected


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_a_preset_changes_exactly_what_it_lists(preset):
    assert from_env({"PRESET": preset}) == Hyperparameters(
        **{**tg.PRESETS[preset], "preset": preset}
    )


def test_defaults_stand_between_the_preset_and_the_explicit_variables():
    stored = dict(num_layers=3, num_heads=16, num_kv_heads=2, eval_stride=32)
    got = from_env({"PRESET": "pilot", "EVAL_STRIDE": "128", "NUM_HEADS": "16"}, defaults=stored)
    assert (got.num_layers, got.num_heads, got.num_kv_heads, got.mlp_mult, got.eval_stride) == (
        3,
        16,
        2,
        2,
        128,
    )
    with pytest.raises(
        UserError, match="^NUM_HEADS=2: the artifact has NUM_HEADS=16; leave it unset$"
    ):
        from_env({"NUM_HEADS": "2"}, defaults=stored)


# ---- the published commands ----


HEADS = [
    ("HEAD_TYPE=standard RANK_DIM=0", dict(head_type="tied")),
    ("HEAD_TYPE=standard RANK_DIM=64", dict(head_type="factorized", head_rank=64)),
    ("HEAD_TYPE=standard RANK_DIM=128", dict(head_type="factorized", head_rank=128)),
    (
        "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=2 MIXTURE_RANK_DIM=64 RANK_DIM=0",
        dict(head_type="mos", head_k=2, head_rank=64),
    ),
    (
        "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=64 RANK_DIM=0",
        dict(head_type="mos", head_k=4, head_rank=64),
    ),
    (
        "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=128 RANK_DIM=0",
        dict(head_type="mos", head_k=4, head_rank=128),
    ),
    ("HEAD_TYPE=simplex SIMPLEX_DIM=128 RANK_DIM=0", dict(head_type="simplex", head_dim=128)),
]


@pytest.mark.parametrize("command, head", HEADS, ids=[f"H{i}" for i in range(7)])
def test_study_a_s_commands_run_as_published_and_are_the_defaults_but_for_head_codec_and_kernel(
    command, head
):
    got = from_env(STUDY_A | env_of(command) | {"SEED": "42"})
    cls = tg.HEADS[head["head_type"]]
    rates = {name: getattr(cls, name) for name in ("head_lr", "head_matrix_lr") if name in cls.uses}
    assert got == Hyperparameters(
        **head, **rates, seed=42, compress_algo="zstd", use_fa3=True, compile=got.compile
    )
    assert got.compile != "0"


def test_study_b_s_command_gets_the_mixture_on_the_challenge_s_baseline():
    got = from_env(STUDY_B)
    assert got.preset == "pilot"
    expected = dict(
        head_type="mos",
        head_k=2,
        head_rank=64,
        seed=42,
        vocab_size=1024,
        max_wallclock_seconds=600.0,
        val_loss_every=500,
        train_log_every=100,
        num_layers=9,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=2,
        train_seq_len=1024,
        train_batch_tokens=524288,
        warmdown_iters=1200,
        matrix_lr=0.04,
        scalar_lr=0.04,
        tied_embed_lr=0.05,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=500,
        rope_dims=0,
        use_ema=False,
        xsa_last_n=0,
        smear_gate=False,
        bigram_hash=False,
        value_embed=False,
        late_qat=False,
        eval_stride=0,
        compress_algo="zlib",
        init_type="default",
        logit_softcap=30.0,
    )
    assert {name: getattr(got, name) for name in expected} == expected


@pytest.mark.parametrize(
    "env, head",
    [
        ("RANK_DIM=32", dict(head_type="factorized", head_rank=32)),
        ("RANK_DIM=32 HEAD_RANK=32", dict(head_type="factorized", head_rank=32)),
        ("HEAD_TYPE=best", dict(head_type="untied")),
        ("HEAD_TYPE=mos MIXTURE_SOFTMAX_K=3", dict(head_type="mos", head_k=3)),
        ("HEAD_TYPE=mixture_softmax HEAD_K=3 MIXTURE_SOFTMAX_K=3", dict(head_type="mos", head_k=3)),
        ("HEAD_TYPE=mixture_softmax USE_MOS=1 MOS_K=5", dict(head_type="mos", head_k=5)),
        ("USE_MOS=1 MOS_RANK=16 MIXTURE_RANK_DIM=16", dict(head_type="mos", head_rank=16)),
        ("SKIP_COMPILE=1", dict(compile="0")),
        ("SKIP_COMPILE=1 COMPILE=0", dict(compile="0")),
        ("SKIP_COMPILE=0 COMPILE=0", dict(compile="0")),
    ],
)
def test_aliases_may_agree_with_our_own_names(env, head):
    got = from_env(env_of(env))
    assert {name: getattr(got, name) for name in head} == head


@pytest.mark.parametrize(
    "env, named",
    [
        ("HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=2 HEAD_K=4", "MIXTURE_SOFTMAX_K=2"),
        ("HEAD_TYPE=mos MIXTURE_RANK_DIM=64 HEAD_RANK=32", "MIXTURE_RANK_DIM=64"),
        ("HEAD_TYPE=simplex SIMPLEX_DIM=64 HEAD_DIM=128", "SIMPLEX_DIM=64"),
        ("RANK_DIM=64 HEAD_RANK=32", "RANK_DIM=64"),
        ("USE_MOS=1 MOS_K=2 HEAD_K=4", "MOS_K=2"),
        ("USE_MOS=1 MOS_K=2 MIXTURE_SOFTMAX_K=4", "=2"),
        ("USE_MOS=1 HEAD_TYPE=standard", "USE_MOS=1"),
        ("USE_MOS=0 HEAD_TYPE=mos", "USE_MOS=0"),
        ("USE_MOS=0 HEAD_TYPE=mixture_softmax MOS_K=4", "USE_MOS=0"),
        ("USE_MOS=1 HEAD_TYPE=simplex", "USE_MOS=1"),
        ("USE_MOS=1 RANK_DIM=64", "=1"),
        ("SKIP_COMPILE=1 COMPILE=1", "SKIP_COMPILE=1"),
        ("HEAD_TYPE=mixture_softmax RANK_DIM=64", "RANK_DIM=64"),
        ("HEAD_TYPE=simplex RANK_DIM=64", "RANK_DIM=64"),
    ],
)
def test_an_alias_that_contradicts_another_variable_is_refused(env, named):
    assert named in refusal(env_of(env))


@pytest.mark.parametrize(
    "env",
    [
        "RANK_DIM=-1",
        "RANK_DIM=x",
        "RANK_DIM=",
        "RANK_DIM=6.4",
        "RANK_DIM=" + "9" * 400,
        "USE_MOS=2",
        "USE_MOS=",
        "SKIP_COMPILE=2",
        "SKIP_COMPILE=",
    ],
    ids=lambda env: env[:12],
)
def test_a_published_variable_with_a_senseless_value_is_refused(env):
    assert refusal(env_of(env)).startswith(f"{env}: must be ")


@pytest.mark.parametrize(
    "env, named",
    [
        ("USE_MOS=1 MOS_K=0", "MOS_K=0"),
        ("USE_MOS=1 MOS_RANK=x", "MOS_RANK=x"),
        ("HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=65", "MIXTURE_SOFTMAX_K=65"),
        ("HEAD_TYPE=mixture_softmax SIMPLEX_DIM=64", "SIMPLEX_DIM=64"),
        ("HEAD_TYPE=standard MIXTURE_RANK_DIM=64", "MIXTURE_RANK_DIM=64"),
        ("RANK_DIM=65537", "RANK_DIM=65537"),
        ("HEAD_TYPE=standrd", "HEAD_TYPE=standrd"),
    ],
)
def test_a_wrong_value_is_reported_under_the_name_that_the_user_wrote(env, named):
    assert re.search(rf"(?<![A-Z_]){named}(?![0-9])", refusal(env_of(env)))


@pytest.mark.parametrize("env", ["MOS_K=4", "MOS_RANK=32", "MOS_K=nonsense"])
def test_mos_settings_without_use_mos_build_the_mixture_or_are_refused_but_never_ignored(env):
    try:
        got = from_env(env_of(env))
    except UserError:
        return
    ((name, text),) = env_of(env).items()
    assert (got.head_type, str(got.head_k if name == "MOS_K" else got.head_rank)) == ("mos", text)


@pytest.mark.parametrize("name, value", tg.PUBLISHED_CONSTANTS.items())
def test_a_published_constant_is_accepted_at_its_value_and_refused_at_any_other(
    name, value, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert from_env({name: value}) == Hyperparameters()
    for other in ("", "no such value", "1" if value == "0" else "0"):
        message = refusal({name: other})
        assert message.startswith(f"{name}={other}: ")
        assert f"{name}={value}" in message


@pytest.mark.parametrize(
    "name",
    [
        "USE_QAT",
        "GRAD_GUIDED_QUANT",
        "EMA_FROM_INIT",
        "QAT_BITS",
        "QUANT_BITS_MIDDLE",
        "QUANT_BITS_MLP",
        "SKIP_QUANT",
        "FLASH_ATTN_BACKEND",
        "FLASH_ATTN_STRICT",
        "FLASH_ATTN_ARCH_LIST",
    ],
)
def test_study_a_s_constants_are_known_at_the_values_it_used(name):
    assert tg.PUBLISHED_CONSTANTS[name] == STUDY_A[name]


@pytest.mark.parametrize(
    "env", ["FLASH_ATTN_BACKEND=fa2", "FLASH_ATTN_STRICT=0", "FLASH_ATTN_ARCH_LIST=8.0"]
)
def test_without_cuda_the_kernel_s_variables_are_accepted_at_any_value(env, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert from_env(env_of(env)) == Hyperparameters()


# ---- between settings ----


@pytest.mark.parametrize(
    "env, named, words",
    [
        ("NUM_HEADS=7", "NUM_HEADS=7", "MODEL_DIM=512"),
        ("MODEL_DIM=510", "NUM_HEADS=8", "MODEL_DIM=510"),
        ("NUM_KV_HEADS=3", "NUM_KV_HEADS=3", "NUM_HEADS=8"),
        ("NUM_KV_HEADS=16", "NUM_KV_HEADS=16", "NUM_HEADS=8"),
        ("MODEL_DIM=8 ROPE_DIMS=0", "NUM_HEADS=8", "even"),
        ("ROPE_DIMS=15", "ROPE_DIMS=15", "even"),
        ("ROPE_DIMS=66", "ROPE_DIMS=66", "64"),
        ("ROPE_DIMS=2", "ROPE_DIMS=2", "USE_NTK_ROPE"),
        ("NUM_LAYERS=10", "VE_LAYERS=9,10", "VALUE_EMBED=0"),
        ("VE_LAYERS=11", "VE_LAYERS=11", "0..10"),
        ("VE_LAYERS=-1", "VE_LAYERS=-1", "0..10"),
        ("VE_LAYERS=", "VE_LAYERS=", "commas"),
        ("VE_LAYERS=9,", "VE_LAYERS=9,", "commas"),
        ("VE_LAYERS=9;10", "VE_LAYERS=9;10", "commas"),
        ("TRAIN_BATCH_TOKENS=786433", "TRAIN_BATCH_TOKENS=786433", "TRAIN_SEQ_LEN=2048"),
        ("TRAIN_BATCH_TOKENS=1024", "TRAIN_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN=2048"),
        ("EVAL_STRIDE=2049", "EVAL_STRIDE=2049", "TRAIN_SEQ_LEN=2048"),
        ("TRAIN_SEQ_LEN=32", "EVAL_STRIDE=64", "TRAIN_SEQ_LEN=32"),
        ("TIED_EMBED_INIT_STD=0", "TIED_EMBED_INIT_STD=0", "must be"),
        ("HEAD_K=4", "HEAD_K=4", "mos"),
        ("HEAD_RANK=64", "HEAD_RANK=64", "factorized, mos"),
        ("HEAD_DIM=64", "HEAD_DIM=64", "simplex"),
        ("HEAD_TYPE=factorized HEAD_K=2", "HEAD_K=2", "HEAD_TYPE=factorized"),
        ("ARTIFACT=x", "ARTIFACT=x", "MODE=eval"),
        ("EVAL_SPECTRUM=1", "EVAL_SPECTRUM=1", "MODE=eval"),
        ("RUNS=x", "RUNS=x", "MODE=table"),
        ("MODE=bench INIT_FROM=x", "INIT_FROM=x", "MODE=train"),
        ("DATA_PATH=demo TOKENIZER_PATH=x", "TOKENIZER_PATH=x", "DATA_PATH=demo"),
        ("HEAD_TYPE=mos HEAD_DIM=128", "HEAD_DIM=128", "HEAD_TYPE=mos"),
        ("HEAD_TYPE=simplex HEAD_RANK=64", "HEAD_RANK=64", "HEAD_TYPE=simplex"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(env, named, words):
    message = refusal(env_of(env))
    assert message.startswith(named)
    assert words in message


@pytest.mark.parametrize(
    "env",
    [
        "EVAL_STRIDE=2048",
        "EVAL_STRIDE=0",
        "ROPE_DIMS=64",
        "ROPE_DIMS=0",
        "ROPE_DIMS=2 USE_NTK_ROPE=0",
        "VE_LAYERS=0,10",
        "NUM_LAYERS=1 VALUE_EMBED=0 XSA_LAST_N=1",
        "XSA_LAST_N=11",
        "NUM_KV_HEADS=8",
        "NUM_KV_HEADS=1",
        "TRAIN_BATCH_TOKENS=2048",
        "HEAD_TYPE=mos HEAD_K=4 HEAD_RANK=8",
        "HEAD_TYPE=factorized HEAD_RANK=8",
        "HEAD_TYPE=simplex HEAD_DIM=8",
        "RUN_ID=mos-42_a.b",
    ],
)
def test_settings_at_the_edge_of_fitting_are_accepted(env):
    from_env(env_of(env))


@pytest.mark.parametrize(
    "run_id",
    ["a/b", "/tmp/a", "../a", "..", ".", "a b", "a\n", "a\\b", "a\0b", "x" * 256, "\u00e9" * 200],
)
def test_a_run_id_that_is_no_plain_folder_name_is_refused(run_id):
    assert refusal({"RUN_ID": run_id}).startswith("RUN_ID=")


KNOWN = [*FIELDS, *tg.PUBLISHED_CONSTANTS, *tg.ALIASES, "RANK_DIM", "USE_MOS", "SKIP_COMPILE"]
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers(-3, 3000).map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "0",
            "1",
            "2",
            "64",
            "9" * 400,
            "9" * 5000,
            "1_0",
            "\u0663",
            "1e400",
            "-0",
            "nan",
            "demo",
            "mos",
            "tied",
            "pilot",
            "eval",
            "5,3",
        ]
    ),
)


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(KNOWN), VALUES, min_size=1, max_size=4))
def test_any_text_for_any_variable_parses_or_is_a_user_error_that_names_a_variable(env):
    try:
        got = from_env(env)
    except UserError as error:
        assert re.match(r"[A-Z][A-Z0-9_]*=", str(error))
    else:
        for name in FIELDS:
            assert type(getattr(got, name.lower())) is type(FIELDS[name].default)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=10), st.text(max_size=5), max_size=3))
def test_any_other_variable_is_let_alone_or_a_near_miss(env):
    try:
        assert from_env({name: env[name] for name in env.keys() - set(KNOWN)}) == Hyperparameters()
    except UserError as error:
        assert "ALLOW_NEAR_MISSES=1" in str(error)


@pytest.mark.parametrize("name", ["head_type", "Seed", "data_path", "mos_k"])
def test_a_variable_in_lower_case_is_a_near_miss(name):
    assert refusal({name: "1"}).startswith(f"{name}=1: did you mean {name.upper()}?")


# ---- the program as a whole ----


@pytest.mark.parametrize(
    "env, words",
    [
        ({"HEAD_K": "0"}, ["error: HEAD_K=0: must be at least 1\n"]),
        ({"HEAD_TPYE": "mos"}, ["error: HEAD_TPYE=mos: ", "HEAD_TYPE", "ALLOW_NEAR_MISSES=1"]),
        ({"SEED": "1\n2"}, ["error: SEED=1"]),
        ({"DATA_PATH": "nowhere"}, ["error: DATA_PATH=nowhere: "]),
        ({"MODE": "eval"}, ["error: ARTIFACT=: "]),
        ({"RANK": "x"}, ["error: RANK=x: "]),
        ({"WORLD_SIZE": "2"}, ["error: "]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_ends_the_program_with_code_2_and_one_line_on_standard_error(
    run, tmp_path, env, words
):
    done = run(env, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(words[0]) and all(word in done.stderr for word in words)
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
    assert list(tmp_path.iterdir()) == []


def test_importing_has_no_side_effect_and_needs_no_optional_package(run, tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['zstandard', 'triton', 'flash_attn_interface']));"
        "import os; before = dict(os.environ); import train_gpt, torch; assert dict(os.environ) == before;"
        "assert not torch.distributed.is_initialized()"
    )
    env = dict(
        PYTHONPATH=str(SCRIPT.parent),
        PYTHONDONTWRITEBYTECODE="1",
        HEAD_TYPE="nonsense",
        SEED="x",
        RANK="x",
    )
    done = run(env, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- the source ----


def reads_environment(node):
    """os.environ, os.getenv and their kin, or a name of theirs imported from os."""
    kin = {"environ", "environb", "getenv", "getenvb"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and bool(kin & {alias.name for alias in node.names})
    return (
        isinstance(node, ast.Attribute)
        and node.attr in kin
        and getattr(node.value, "id", "") == "os"
    )


def test_only_from_env_and_world_read_the_environment():
    tops = ast.parse(SCRIPT.read_text()).body
    readers = {
        getattr(top, "name", "module") for top in tops if any(map(reads_environment, ast.walk(top)))
    }
    assert readers == {"from_env", "World"}


def test_the_script_is_pure_ascii():
    assert SCRIPT.read_bytes().isascii()


def python_310():
    """The path of a CPython 3.10 that runs (a pyenv shim may not), or None."""
    homes = [os.environ.get("PYENV_ROOT", ""), os.path.expanduser("~/.pyenv")]
    pyenvs = [
        path
        for home in filter(None, homes)
        for path in sorted(glob.glob(f"{home}/versions/3.10.*/bin/python"))
    ]
    for path in filter(None, [shutil.which("python3.10"), *pyenvs]):
        probe = subprocess.run(
            [path, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
        )
        if probe.stdout.strip() == "(3, 10)":
            return path
    return None


def test_the_script_compiles_under_python_3_10():
    python = python_310() or pytest.skip("no Python 3.10")
    code = f"import pathlib; compile(pathlib.Path({str(SCRIPT)!r}).read_bytes(), 'train_gpt.py', 'exec')"
    done = subprocess.run([python, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters().seed = 2

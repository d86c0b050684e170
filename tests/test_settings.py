"""Settings: what is accepted, what is refused and in which words, and that nothing else reads the environment."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, cpu_world, environment, from_env, run, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import FIELDS, HEADS, MODE_OF, PUBLISHED, Hyperparameters, UserError, pairs

NUMBERS = [name for name, field in FIELDS.items() if field.type in (int, float)]
SWITCHES = [name for name, field in FIELDS.items() if field.type is bool]
ALLOWED = {name: field.metadata["allowed"] for name, field in FIELDS.items()}
CHOICES = {name: ALLOWED[name].split(", ") for name, f in FIELDS.items() if f.type is str}
CHOICES = {name: choices for name, choices in CHOICES.items() if choices != [""]}
ARTIFACT_OF = {"eval": {"ARTIFACT": "x"}}  # what a mode needs
CONSTANTS = {name: value for name, value in PUBLISHED.items() if "," not in value}

STUDY_A = pairs("""
    NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 VOCAB_SIZE=1024
    USE_EMA=1 EMA_FROM_INIT=1 EMA_ALPHA=0.997 XSA_LAST_N=4 SMEAR_GATE=1
    BIGRAM_HASH=1 BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 USE_NTK_ROPE=1 ROPE_DIMS=16 LN_SCALE=1
    VALUE_EMBED=1 VE_DIM=128 VE_LAYERS=9,10 LATE_QAT=1 QAT_THRESHOLD=0.15 QAT_BITS=6 USE_QAT=0
    MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 GRAD_CLIP_NORM=0.3
    MUON_WEIGHT_DECAY=0.04 ADAM_WD=0.04 INIT_TYPE=ortho WARMDOWN_ITERS=3500
    TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 EVAL_STRIDE=64 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=200
    COMPRESS_ALGO=zstd QUANT_BITS_MIDDLE=6 QUANT_BITS_MLP=6 GRAD_GUIDED_QUANT=0
    MAX_WALLCLOCK_SECONDS=600 USE_FA3=1 FLASH_ATTN_BACKEND=fa3 FLASH_ATTN_STRICT=1
    FLASH_ATTN_ARCH_LIST=9.0 SKIP_COMPILE=0 SKIP_QUANT=0 SEED=42
    DATA_PATH=./data/datasets/fineweb10B_sp1024
    TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model
""")
STUDY_B = pairs("""
    VOCAB_SIZE=1024 SEED=42 USE_MOS=1 MOS_K=2 MOS_RANK=64 MAX_WALLCLOCK_SECONDS=600
    VAL_LOSS_EVERY=500 TRAIN_LOG_EVERY=100
""")
TORCHRUN = """RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE
    GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT
    TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE
    TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS"""
MACHINE = """PATH HOME USER SHELL LANG TERM PWD HOSTNAME PYTHONPATH CUDA_VISIBLE_DEVICES NCCL_DEBUG
    SLURM_JOB_ID VIRTUAL_ENV TMPDIR LD_LIBRARY_PATH"""


def variables(text):
    """`NAME=value NAME=` as a dict; a value may be empty and may hold `=`."""
    return dict(pair.split("=", 1) for pair in text.split())


def head_for(name):
    """A head that uses this setting, where it is not every head's."""
    users = [head for head, cls in HEADS.items() if name.lower() in cls.uses]
    return {"HEAD_TYPE": users[-1]} if users else {}


def refusal(environ, stored=None):
    """The one line that these variables earn."""
    with pytest.raises(UserError) as error:
        from_env(environ, stored)
    return str(error.value)


def expect_settings(cases):
    """Each line: variables, `->`, and the settings that they give."""
    for case in filter(str.strip, cases.splitlines()):
        environ, expected = map(variables, case.split("->"))
        got = from_env(environ)
        for name, text in expected.items():
            assert train_gpt.as_text(getattr(got, name.lower())) == text, (case, name)


def expect_refusals(cases):
    """Each line: variables, `->`, how the error begins, `...` and what else it holds."""
    for case in filter(str.strip, cases.splitlines()):
        environ, words = case.split(" -> ")
        first, *others = map(str.strip, words.split(" ... "))
        message = refusal(variables(environ))
        assert message.startswith(first), (case, message)
        assert all(other in message for other in others), (case, message)


# ---- accepted, and the bounds of it ----


def test_an_empty_environment_gives_the_dataclass_s_defaults_which_cannot_be_changed():
    assert from_env({}) == Hyperparameters()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters().seed = 2


def test_every_setting_is_documented_and_accepted_at_its_default():
    for name, field in FIELDS.items():
        default, others = train_gpt.as_text(field.default), head_for(name)
        assert field.metadata["doc"].strip()
        if name in MODE_OF:
            others = {"MODE": MODE_OF[name], **ARTIFACT_OF.get(MODE_OF[name], {})}
        assert from_env({name: default, **others}) == from_env(others), name


def test_the_ends_of_a_range_are_accepted_and_the_next_numbers_refused_with_the_bound():
    for name in NUMBERS:
        kind, bounds = FIELDS[name].type, ALLOWED[name].split(" to ")
        low, high = (kind(float(bound)) for bound in bounds)
        below, above = low - 1, high + 1
        if kind is float:
            below, above = (float(np.nextafter(*ends)) for ends in ((low, -np.inf), (high, np.inf)))
        for value in (low, high):
            assert train_gpt.parse(name, repr(value), name) == value
        ends = zip((below, above), ("at least", "at most"), bounds)
        for value, words, bound in ends:
            text = repr(value)
            message = refusal({name: text, **head_for(name)})
            assert message == f"{name}={text}: must be {words} {bound}"


def test_what_is_no_finite_number_is_refused_and_a_fraction_where_a_whole_one_is_due():
    texts = [
        "",
        " ",
        "x",
        "1e",
        "0x10",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "9" * 400,
        "9" * 5000,
        "--1",
    ]
    for name in NUMBERS:
        for text in texts:
            message = refusal({name: text, **head_for(name)})
            assert message.startswith(f"{name}={text}: must be "), (name, text)
        for text in ("1.5", "1e3") if FIELDS[name].type is int else ():
            message = refusal({name: text, **head_for(name)})
            assert message == f"{name}={text}: must be a whole number"


def test_a_switch_takes_nothing_but_0_and_1():
    for name in SWITCHES:
        assert [train_gpt.parse(name, text, name) for text in "01"] == [False, True]
        for text in ("", "2", "true", "yes", "-1", " 1"):
            assert refusal({name: text}) == f"{name}={text}: must be one of 0, 1"


def test_every_choice_is_accepted_and_a_wrong_one_refused_with_all_choices():
    for name, choices in {**CHOICES, "HEAD_TYPE": tuple(HEADS)}.items():
        assert [train_gpt.parse(name, choice, name) for choice in choices] == list(choices)
        for text in (" ", "nothing of the kind"):
            message = refusal({name: text})
            assert message.startswith(f"{name}={text}: must be one of {', '.join(choices)}")


def test_a_near_miss_names_the_likely_variable_and_how_to_go_on():
    likely = pairs("""
        HEAD_TPYE=HEAD_TYPE HEADTYPE=HEAD_TYPE SEEED=SEED MODEL_DIR=MODEL_DIM MATRIX_LRS=MATRIX_LR
        MOSK=MOS_K SIMPLEX_DIMS=SIMPLEX_DIM QUANT_BITS_MIDLE=QUANT_BITS_MIDDLE USE_MOSS=USE_MOS
        RANK_DIMS=RANK_DIM head_type=HEAD_TYPE Seed=SEED data_path=DATA_PATH mos_k=MOS_K
    """)
    allowing = Hyperparameters(allow_near_misses=True)
    for name, meant in likely.items():
        message = refusal({name: "7"})
        assert message.startswith(f"{name}=7: did you mean {meant}?")
        assert "ALLOW_NEAR_MISSES=1" in message
        assert from_env({name: "7", "ALLOW_NEAR_MISSES": "1"}) == allowing
        for text in ("0", "", "yes"):
            refusal({name: "7", "ALLOW_NEAR_MISSES": text})


def test_the_variables_of_torchrun_and_of_any_machine_are_no_near_misses():
    assert from_env(dict.fromkeys((TORCHRUN + MACHINE).split(), "1")) == Hyperparameters()


# ---- presets, and what an artifact stores ----


def test_an_explicit_variable_beats_the_preset_which_beats_the_default():
    expect_settings("""
        PRESET=study -> PRESET=study NUM_LAYERS=11 MODEL_DIM=512
        PRESET=pilot -> PRESET=pilot NUM_LAYERS=9 MODEL_DIM=512 MLP_MULT=2
        PRESET=pilot NUM_LAYERS=3 -> PRESET=pilot NUM_LAYERS=3 MLP_MULT=2
        PRESET=demo -> PRESET=demo DATA_PATH=demo NUM_LAYERS=11 MODEL_DIM=128
        PRESET=demo DATA_PATH=mine -> PRESET=demo DATA_PATH=mine MODEL_DIM=128
        DATA_PATH=demo -> PRESET=demo DATA_PATH=demo MODEL_DIM=128
        DATA_PATH=demo MODEL_DIM=64 -> PRESET=demo MODEL_DIM=64 NUM_HEADS=4
        DATA_PATH=demo PRESET=study -> PRESET=study DATA_PATH=demo MODEL_DIM=512
        USE_MOS=1 -> PRESET=pilot HEAD_TYPE=mos NUM_LAYERS=9
        USE_MOS=1 PRESET=study -> PRESET=study HEAD_TYPE=mos NUM_LAYERS=11
        USE_MOS=1 NUM_LAYERS=5 -> PRESET=pilot HEAD_TYPE=mos NUM_LAYERS=5
        USE_MOS=0 -> PRESET=pilot HEAD_TYPE=tied NUM_LAYERS=9
        USE_MOS=0 MOS_K=4 MOS_RANK=8 -> PRESET=pilot HEAD_TYPE=tied NUM_LAYERS=9
        MOS_K=4 -> PRESET=pilot HEAD_TYPE=mos HEAD_K=4
        MOS_RANK=32 -> PRESET=pilot HEAD_TYPE=mos HEAD_RANK=32
    """)


def test_a_preset_is_what_one_would_write_before_the_command():
    for preset, changes in train_gpt.PRESETS.items():
        written = from_env({**changes, "PRESET": "study"})
        assert from_env({"PRESET": preset}) == dataclasses.replace(written, preset=preset)


def stored(**changes):
    """The settings that the artifact of a run with the defaults, and with these changes, holds."""
    s = dataclasses.replace(Hyperparameters(), **changes)
    return s.as_dict(train_gpt.STORED)


def test_mode_eval_takes_what_the_artifact_stores_and_lets_the_user_choose_how_to_score():
    changes = dict(num_layers=3, value_embed=False, head_type="mos", head_k=3, eval_stride=32)
    environ = dict(MODE="eval", PRESET="pilot", ARTIFACT="x")
    for extra, stride in ({}, 32), (dict(EVAL_STRIDE="128", NUM_LAYERS="3", HEAD_K="3"), 128):
        got = from_env({**environ, **extra}, stored(**changes))
        assert {n: getattr(got, n) for n in changes} == {**changes, "eval_stride": stride}
        assert (got.mlp_mult, got.warmdown_iters) == (3, 1200)  # the artifact's; the preset's


def test_a_run_with_init_from_takes_the_artifact_s_trunk_and_neither_its_head_nor_its_evaluation():
    then = stored(num_layers=3, value_embed=False, head_type="mos", head_k=3, eval_stride=32)
    got = from_env(dict(INIT_FROM="x"), then)
    assert (got.num_layers, got.value_embed, got.head_type, got.head_k) == (3, False, "tied", 2)
    assert got.eval_stride == 64
    assert from_env(dict(INIT_FROM="x", HEAD_TYPE="delta"), then).head_type == "delta"


def test_what_contradicts_the_artifact_is_refused_under_the_name_that_the_user_wrote():
    then = stored(num_heads=16, head_type="mos", head_k=3)
    heads = "NUM_HEADS=2: the artifact has NUM_HEADS=16; leave it unset"
    assert refusal(dict(NUM_HEADS="2", INIT_FROM="x"), then) == heads
    evaluating = dict(MODE="eval", ARTIFACT="x")
    assert refusal(dict(evaluating, NUM_HEADS="2"), then) == heads
    for environ in (dict(HEAD_K="2"), dict(MOS_K="2"), dict(HEAD_TYPE="tied")):
        ((name, text),) = environ.items()
        assert refusal({**evaluating, **environ}, then).startswith(f"{name}={text}: ")


# ---- the published commands ----


def test_study_a_s_commands_are_the_defaults_but_for_head_codec_and_kernel():
    commands = {
        "HEAD_TYPE=standard RANK_DIM=0": dict(head_type="tied"),
        "HEAD_TYPE=standard RANK_DIM=64": dict(head_type="factorized", head_rank=64),
        "HEAD_TYPE=standard RANK_DIM=128": dict(head_type="factorized", head_rank=128),
        "HEAD_TYPE=simplex SIMPLEX_DIM=128 RANK_DIM=0": dict(head_type="simplex", head_dim=128),
    }
    for K, R in ((2, 64), (4, 64), (4, 128)):
        mixture = f"MIXTURE_SOFTMAX_K={K} MIXTURE_RANK_DIM={R}"
        head = dict(head_type="mos", head_k=K, head_rank=R)
        commands[f"HEAD_TYPE=mixture_softmax {mixture} RANK_DIM=0"] = head
    for command, head in commands.items():
        got, cls = from_env({**STUDY_A, **pairs(command)}), HEADS[head["head_type"]]
        rates = {n: getattr(cls, n) for n in ("head_lr", "head_matrix_lr") if n in cls.uses}
        others = dict(seed=42, compress_algo="zstd", attn_backend="fa3")
        assert got == Hyperparameters(**head, **rates, **others), command


def test_study_b_s_command_gets_the_mixture_on_the_challenge_s_baseline():
    got = from_env(STUDY_B)
    expected = pairs("""
        PRESET=pilot HEAD_TYPE=mos HEAD_K=2 HEAD_RANK=64 SEED=42 VOCAB_SIZE=1024
        MAX_WALLCLOCK_SECONDS=600.0 VAL_LOSS_EVERY=500 TRAIN_LOG_EVERY=100 NUM_LAYERS=9
        MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 TRAIN_SEQ_LEN=1024
        TRAIN_BATCH_TOKENS=524288 WARMDOWN_ITERS=1200 MATRIX_LR=0.04 SCALAR_LR=0.04
        TIED_EMBED_LR=0.05 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85
        MUON_MOMENTUM_WARMUP_STEPS=500 MUON_WEIGHT_DECAY=0.0 ADAM_WD=0.0 GRAD_CLIP_NORM=0.0
        ROPE_DIMS=0 USE_NTK_ROPE=0 USE_EMA=0 XSA_LAST_N=0 SMEAR_GATE=0 BIGRAM_HASH=0 LN_SCALE=0
        VALUE_EMBED=0 LATE_QAT=0 EVAL_STRIDE=0 COMPRESS_ALGO=zlib INIT_TYPE=default
        LOGIT_SOFTCAP=30.0
    """)
    assert {n: train_gpt.as_text(getattr(got, n.lower())) for n in expected} == expected


def test_the_best_preset_is_the_recipe_of_the_strongest_published_run():
    expect_settings("""
        PRESET=best -> NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4 MLP_SLOPE=0.5
        PRESET=best -> HEAD_TYPE=tied LOGIT_SOFTCAP=30.0 VOCAB_SIZE=1024 TRAIN_SEQ_LEN=2048
        PRESET=best -> TRAIN_BATCH_TOKENS=786432 SHUFFLE=1 MAX_WALLCLOCK_SECONDS=600.0
        PRESET=best -> QK_GAIN_INIT=5.0 ROPE_DIMS=16 USE_NTK_ROPE=0 XSA_LAST_N=11 LN_SCALE=1
        PRESET=best -> VALUE_EMBED=1 VE_DIM=128 VE_LAYERS=9,10 SMEAR_GATE=1 BIGRAM_HASH=1
        PRESET=best -> BIGRAM_AT=input BIGRAM_VOCAB_SIZE=1536 BIGRAM_DIM=112 SKIP_GATES=1
        PRESET=best -> LOOP_LAYERS=4,5 LOOP_START_FRAC=0.5 PARALLEL_FROM=7
        PRESET=best -> MATRIX_LR=0.02 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
        PRESET=best -> MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_WEIGHT_DECAY=0.09 MUON_ROW_NORM=1
        PRESET=best -> TIED_EMBED_LR=0.03 ADAM_WD=0.09 SCALAR_LR=0.02 SCALAR_WD=0.02
        PRESET=best -> GRAD_CLIP_NORM=0.3 WARMDOWN_FRAC=0.667 EMA_ALPHA=0.9965 LATE_QAT=0
    """)


def test_aliases_may_agree_with_our_own_names():
    expect_settings("""
        RANK_DIM=32 -> HEAD_TYPE=factorized HEAD_RANK=32
        RANK_DIM=32 HEAD_RANK=32 -> HEAD_TYPE=factorized HEAD_RANK=32
        HEAD_TYPE=mos MIXTURE_SOFTMAX_K=3 -> HEAD_TYPE=mos HEAD_K=3
        HEAD_TYPE=mixture_softmax HEAD_K=3 MIXTURE_SOFTMAX_K=3 -> HEAD_TYPE=mos HEAD_K=3
        HEAD_TYPE=mixture_softmax USE_MOS=1 MOS_K=5 -> HEAD_TYPE=mos HEAD_K=5
        USE_MOS=1 MOS_RANK=16 MIXTURE_RANK_DIM=16 -> HEAD_TYPE=mos HEAD_RANK=16
        SKIP_COMPILE=1 -> COMPILE=0
        SKIP_COMPILE=1 COMPILE=0 -> COMPILE=0
        SKIP_COMPILE=0 COMPILE=0 -> COMPILE=0
        SKIP_COMPILE=0 -> COMPILE=auto
        USE_FA3=1 -> ATTN_BACKEND=fa3
        USE_FA3=0 ATTN_BACKEND=math -> ATTN_BACKEND=math
    """)


def test_variables_that_contradict_each_other_are_refused():
    expect_refusals("""
        HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=2 HEAD_K=4 -> HEAD_K=4: ... MIXTURE_SOFTMAX_K=2
        HEAD_TYPE=mos MIXTURE_RANK_DIM=64 HEAD_RANK=32 -> HEAD_RANK=32: ... MIXTURE_RANK_DIM=64
        HEAD_TYPE=simplex SIMPLEX_DIM=64 HEAD_DIM=128 -> HEAD_DIM=128: ... SIMPLEX_DIM=64
        RANK_DIM=64 HEAD_RANK=32 -> HEAD_RANK=32: ... RANK_DIM=64
        USE_MOS=1 MOS_K=2 HEAD_K=4 -> HEAD_K=4: ... MOS_K=2
        USE_MOS=1 MOS_K=2 MIXTURE_SOFTMAX_K=4 -> MOS_K=2: ... MIXTURE_SOFTMAX_K=4
        USE_MOS=1 HEAD_TYPE=standard -> HEAD_TYPE=standard: ... USE_MOS=1
        USE_MOS=1 HEAD_TYPE=simplex -> HEAD_TYPE=simplex: ... USE_MOS=1
        MOS_K=2 HEAD_TYPE=simplex -> HEAD_TYPE=simplex: ... MOS_K=2
        USE_MOS=1 RANK_DIM=64 -> USE_MOS=1: ... RANK_DIM=64
        SKIP_COMPILE=1 COMPILE=1 -> COMPILE=1: ... SKIP_COMPILE=1
        USE_FA3=1 ATTN_BACKEND=math -> ATTN_BACKEND=math: ... USE_FA3=1
        HEAD_TYPE=mixture_softmax RANK_DIM=64 -> HEAD_TYPE=mixture_softmax: ... RANK_DIM=64
        HEAD_TYPE=simplex RANK_DIM=64 -> HEAD_TYPE=simplex: ... RANK_DIM=64
    """)


def test_a_wrong_value_is_reported_under_the_name_that_the_user_wrote():
    expect_refusals(f"""
        RANK_DIM=-1 -> RANK_DIM=-1: must be at least 0
        RANK_DIM=x -> RANK_DIM=x: must be a whole number
        RANK_DIM= -> RANK_DIM=: must be a whole number
        RANK_DIM=6.4 -> RANK_DIM=6.4: must be a whole number
        RANK_DIM={"9" * 400} -> RANK_DIM=999 ... 999: must be at most
        USE_MOS=2 -> USE_MOS=2: only USE_MOS=0,1
        USE_MOS= -> USE_MOS=: only USE_MOS=0,1
        SKIP_COMPILE=2 -> SKIP_COMPILE=2: only SKIP_COMPILE=0,1
        SKIP_COMPILE= -> SKIP_COMPILE=: only SKIP_COMPILE=0,1
        USE_FA3=yes -> USE_FA3=yes: only USE_FA3=0,1
        MOS_K=nonsense -> MOS_K=nonsense: must be a whole number
        USE_MOS=1 MOS_K=0 -> MOS_K=0: must be at least 1
        USE_MOS=1 MOS_RANK=0 -> MOS_RANK=0: must be at least 1
        HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=65 -> MIXTURE_SOFTMAX_K=65: must be at most 64
        HEAD_TYPE=mixture_softmax SIMPLEX_DIM=64 -> SIMPLEX_DIM=64: ... HEAD_TYPE=mos ... simplex
        HEAD_TYPE=standard MIXTURE_RANK_DIM=64 -> MIXTURE_RANK_DIM=64: ... HEAD_TYPE=tied ... mos
    """)


def test_a_published_constant_is_accepted_at_its_value_and_refused_at_any_other():
    assert from_env(CONSTANTS) == Hyperparameters()
    for name, value in CONSTANTS.items():
        assert STUDY_A.get(name, value) == value
        for other in ("", "no such value", "1" if value == "0" else "0"):
            message = refusal({name: other})
            assert message.startswith(f"{name}={other}: ") and f"{name}={value}" in message


# ---- between settings ----


def test_settings_that_do_not_fit_together_are_refused():
    expect_refusals("""
        NUM_HEADS=7 -> NUM_HEADS=7: must divide MODEL_DIM=512
        MODEL_DIM=510 -> NUM_HEADS=8: must divide MODEL_DIM=510
        NUM_KV_HEADS=3 -> NUM_KV_HEADS=3: must divide NUM_HEADS=8
        NUM_KV_HEADS=16 -> NUM_KV_HEADS=16: must divide NUM_HEADS=8
        MODEL_DIM=24 ROPE_DIMS=0 -> ROPE_DIMS=0: ... even ... 3
        ROPE_DIMS=15 -> ROPE_DIMS=15: ... even
        ROPE_DIMS=66 -> ROPE_DIMS=66: ... at most 64
        ROPE_DIMS=2 -> ROPE_DIMS=2: ... at least 4
        NUM_LAYERS=10 -> VE_LAYERS=9,10: ... 0..9 ... VALUE_EMBED=0
        VE_LAYERS=11 -> VE_LAYERS=11: ... 0..10
        VE_LAYERS=-1 -> VE_LAYERS=-1: ... 0..10
        VE_LAYERS= -> VE_LAYERS=: ... commas
        VE_LAYERS=9, -> VE_LAYERS=9,: ... commas
        VE_LAYERS=9;10 -> VE_LAYERS=9;10: ... commas
        TIED_EMBED_INIT_STD=0 -> TIED_EMBED_INIT_STD=0: must be at least
        LOOP_LAYERS=10,11 -> LOOP_LAYERS=10,11: ... 0..10
        LOOP_LAYERS=4, -> LOOP_LAYERS=4,: ... commas
        LOOP_LAYERS=4,4 -> LOOP_LAYERS=4,4: ... distinct
        VE_LAYERS=9,09 -> VE_LAYERS=9,09: ... distinct
        PARALLEL_FROM=4 -> PARALLEL_FROM=4: must be at least 5
        LOOP_LAYERS=4,5 PARALLEL_FROM=5 -> PARALLEL_FROM=5: must be at least 6
        DATA_PATH=demo TOKENIZER_PATH=x -> TOKENIZER_PATH=x: ... DATA_PATH=demo
        HEAD_K=4 -> HEAD_K=4: ... HEAD_TYPE=tied ... mos
        HEAD_RANK=64 -> HEAD_RANK=64: ... factorized, mos
        HEAD_DIM=64 -> HEAD_DIM=64: ... simplex
        HEAD_TYPE=factorized HEAD_K=2 -> HEAD_K=2: ... HEAD_TYPE=factorized
        HEAD_TYPE=mos HEAD_DIM=128 -> HEAD_DIM=128: ... HEAD_TYPE=mos
        HEAD_TYPE=simplex HEAD_RANK=64 -> HEAD_RANK=64: ... HEAD_TYPE=simplex
        HEAD_TYPE=untied HEAD_START_FRAC=0.5 -> HEAD_START_FRAC=0.5: ... HEAD_TYPE=untied
        HEAD_TYPE=mos HEAD_RANK=0 -> HEAD_RANK=0: must be at least 1
        HEAD_TYPE=untied HEAD_VARIANT=pr908 -> HEAD_VARIANT=pr908: ... mos/pr266
        TRAIN_ONLY=head -> TRAIN_ONLY=head: ... all
        HEAD_TYPE=mos TRAIN_ONLY=head HEAD_TRAINABLE=0 -> TRAIN_ONLY=head: ... all
        ARTIFACT=x -> ARTIFACT=x: ... MODE=eval
        EVAL_SPECTRUM=1 -> EVAL_SPECTRUM=1: ... MODE=eval
        RUNS=x -> RUNS=x: ... MODE=table
        MODE=bench INIT_FROM=x -> INIT_FROM=x: ... MODE=train
        MODE=eval -> ARTIFACT=: must name an artifact
    """)


def test_settings_at_the_edge_of_fitting_are_accepted():
    expect_settings("""
        TRAIN_SEQ_LEN=32 -> EVAL_STRIDE=64
        EVAL_STRIDE=0 -> EVAL_STRIDE=0
        ROPE_DIMS=64 -> ROPE_DIMS=64
        VE_LAYERS=0,10 -> VE_LAYERS=0,10
        NUM_LAYERS=1 VALUE_EMBED=0 XSA_LAST_N=1 -> NUM_LAYERS=1 VALUE_EMBED=0
        XSA_LAST_N=11 LOOP_LAYERS=10,9 -> XSA_LAST_N=11 LOOP_LAYERS=10,9
        PARALLEL_FROM=5 -> PARALLEL_FROM=5
        LOOP_LAYERS=4,5 PARALLEL_FROM=6 -> LOOP_LAYERS=4,5 PARALLEL_FROM=6
        NUM_KV_HEADS=8 -> NUM_KV_HEADS=8
        NUM_KV_HEADS=1 -> NUM_KV_HEADS=1
        TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=2048 -> TRAIN_BATCH_TOKENS=2048
        HEAD_TYPE=delta HEAD_RANK=0 -> HEAD_RANK=0
        HEAD_TYPE=mos HEAD_VARIANT=pr266 -> HEAD_VARIANT=pr266
        HEAD_TYPE=mos TRAIN_ONLY=head -> TRAIN_ONLY=head
        RUN_ID=mos-42_a.b -> RUN_ID=mos-42_a.b
        MODE=eval ARTIFACT=x.ptz EVAL_SPLIT=test EVAL_SPECTRUM=1 -> EVAL_SPLIT=test ARTIFACT=x.ptz
        MODE=table RUNS=here/* -> RUNS=here/*
    """)


def test_a_run_id_that_is_no_plain_folder_name_is_refused():
    names = ["a/b", "/tmp/a", "../a", "..", ".", "a b", "a\n", "a\\b", "a\0b"]
    for name in [*names, "x" * 256, "\u00e9" * 200]:
        assert refusal({"RUN_ID": name}).startswith("RUN_ID=")


def test_a_place_that_no_rank_can_have_is_refused():
    places = ["RANK=x", "WORLD_SIZE=", "LOCAL_RANK=1.5", "RANK=1", "RANK=-1", "WORLD_SIZE=0"]
    for place in [*places, "RANK=2 WORLD_SIZE=2", "RANK=1 LOCAL_RANK=2 WORLD_SIZE=4"]:
        with pytest.raises(
            UserError, match="^RANK=.* LOCAL_RANK=.* WORLD_SIZE=.*: is no rank's place"
        ):
            train_gpt.World(variables(place))


KNOWN = [*FIELDS, *PUBLISHED, *train_gpt.ALIASES]
TEXTS = """0 1 2 64 1_0 \u0663 1e400 -0 nan demo mos tied pilot eval 5,3""".split()
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers(-3, 3000).map(str),
    st.floats().map(str),
    st.sampled_from([*TEXTS, "9" * 400, "9" * 5000]),
)


def test_a_gpu_that_cannot_be_used_is_told_by_the_rank_that_has_none(monkeypatch):
    def no_such_device(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(train_gpt.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train_gpt.torch.cuda, "set_device", no_such_device)
    with pytest.raises(UserError, match="^RANK=2 LOCAL_RANK=2 WORLD_SIZE=3: cannot use its GPU"):
        train_gpt.World(variables("RANK=2 LOCAL_RANK=2 WORLD_SIZE=3"))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(KNOWN), VALUES, min_size=1, max_size=4))
def test_any_text_for_any_variable_parses_or_is_a_user_error_that_names_a_variable(environ):
    try:
        got = from_env(environ)
    except UserError as error:
        assert re.match(r"[A-Z][A-Z0-9_]*=", str(error))
    else:
        for name, field in FIELDS.items():
            assert type(getattr(got, name.lower())) is field.type


@settings(max_examples=100)
@given(st.dictionaries(st.text(min_size=1, max_size=10), st.text(max_size=5), max_size=3))
def test_any_other_variable_is_let_alone_or_a_near_miss(environ):
    others = {name: environ[name] for name in environ.keys() - set(KNOWN)}
    try:
        assert from_env(others) == Hyperparameters()
    except UserError as error:
        assert "ALLOW_NEAR_MISSES=1" in str(error)


# ---- the program as a whole ----


def test_a_mistake_ends_the_program_with_code_2_and_one_line(tmp_path):
    mistakes = {
        "HEAD_TPYE=mos": "error: HEAD_TPYE=mos: did you mean HEAD_TYPE?",
        "SEED=1\n2": "error: SEED=1",
        "DATA_PATH=nowhere": "error: DATA_PATH=nowhere: ",
        "ARTIFACT=nowhere": "error: ARTIFACT=nowhere: ",
        "INIT_FROM=nowhere": "error: INIT_FROM=nowhere: ",
        "RANK=x": "error: RANK=x LOCAL_RANK=0 WORLD_SIZE=1: ",
        "WORLD_SIZE=2": "error: WORLD_SIZE=2: ",
        "RUNS=x": "error: RUNS=x: ",
    }
    for mistake, words in mistakes.items():
        line = run_here(tmp_path, dict([mistake.split("=", 1)]), code=2)
        assert line.startswith(words) and line.count("\n") == 1 and line.endswith("\n"), line
    assert list(tmp_path.iterdir()) == []


def test_mode_eval_without_an_artifact_asks_for_one(data, tmp_path):
    environ = dict(MODE="eval", TRAIN_SEQ_LEN=64)
    assert run_here(tmp_path, environ, data, code=2).startswith("error: ARTIFACT=: ")


def test_an_argument_is_refused_because_settings_are_variables(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--seed=3"])
    with pytest.raises(UserError, match="^--seed=3: settings are environment variables"):
        train_gpt.run({}, cpu_world())


def test_the_script_itself_says_a_mistake_in_one_line_and_leaves_nothing(tmp_path):
    assert run(tmp_path, {"HEAD_K": "0"}, code=2) == "error: HEAD_K=0: must be at least 1\n"
    assert list(tmp_path.iterdir()) == []


def test_importing_has_no_side_effect_and_needs_no_optional_package(tmp_path):
    code = """
import os, sys
sys.modules.update(dict.fromkeys(["zstandard", "triton", "flash_attn_interface", "matplotlib"]))
before = dict(os.environ)
import train_gpt, torch
assert dict(os.environ) == before and not torch.distributed.is_initialized()
"""
    nonsense = dict(HEAD_TYPE="nonsense", SEED="x", RANK="x", PYTHONDONTWRITEBYTECODE=1)
    environ = environment(nonsense, dict(PYTHONPATH=ROOT))
    facts = dict(cwd=tmp_path, env=environ, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **facts)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- the source ----

SOURCE = SCRIPT.read_text()


def test_only_main_reads_the_environment():
    def reads(node):
        kin = {"environ", "environb", "getenv", "getenvb"}
        if isinstance(node, ast.ImportFrom):
            return node.module == "os" and bool(kin & {alias.name for alias in node.names})
        return isinstance(node, ast.Attribute) and node.attr in kin

    tops = ast.parse(SOURCE).body
    readers = {getattr(top, "name", "module") for top in tops if any(map(reads, ast.walk(top)))}
    assert readers == {"main"}


def test_each_section_needs_only_those_above_it():
    banners = re.findall(r"^# ---- (\w[\w ]*?)(?::.*)? -+$", SOURCE, re.M)
    promised = re.search(r"each needing only those above it:\n\n(.*?)\n\n", SOURCE, re.S)[1]
    assert banners == re.split(r"\s{2,}", promised.strip())

    starts = [SOURCE[: m.start()].count("\n") for m in re.finditer("^# ---- ", SOURCE, re.M)]
    section, needs = {}, set()
    for top in ast.parse(SOURCE).body:
        place = int(np.searchsorted(starts, top.lineno))
        names = [node for node in ast.walk(top) if isinstance(node, ast.Name)]
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            section[top.name] = place
            local = stored | {node.arg for node in ast.walk(top) if isinstance(node, ast.arg)}
            needs |= {(place, node.id) for node in names if node.id not in local}
        else:
            section |= dict.fromkeys(stored, place)
            needs |= {(place, node.id) for node in names}
    assert len(section) > 150 and len(needs) >= 500
    assert not {(name, place) for place, name in needs if section.get(name, place) > place}


def test_the_script_is_ascii_and_compiles_under_python_3_10():
    assert SCRIPT.read_bytes().isascii()
    home = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = [str(path) for path in home.glob("versions/3.10.*/bin/python")]
    code = "import pathlib, sys; print(sys.version_info[:2]); "
    code += f"compile(pathlib.Path({str(SCRIPT)!r}).read_bytes(), 'train_gpt.py', 'exec')"
    for python in filter(None, [shutil.which("python3.10"), *found]):
        done = subprocess.run([python, "-W", "error", "-c", code], capture_output=True, text=True)
        if done.stdout == "(3, 10)\n":  # pyenv's shim may be of a Python that is not chosen
            assert (done.returncode, done.stderr) == (0, "")
            return
    pytest.skip("no Python 3.10")

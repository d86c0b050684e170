"""Train a small GPT with a chosen output head, pack it under 16,000,000 bytes, reload it, score it in bits per byte.

One script, in the style of OpenAI's parameter-golf challenge, built to answer one question: does an output head of
higher rank than the tied softmax earn its bytes and its time?  Everything is chosen by environment variables.

    DATA_PATH=demo python train_gpt.py                              # any machine, no data, about two minutes
    python train_gpt.py                                             # one GPU, DATA_PATH as in the challenge
    torchrun --standalone --nproc_per_node=8 train_gpt.py           # the real run
    MODE=table RUNS='runs/*' python train_gpt.py                    # compare finished runs; also MODE=eval, MODE=bench

Sections, each needing only those above it: settings, world, data, byte counts, trunk, heads, optimizers, schedule,
evaluate, artifact, log and files, train, table, main.

Shape suffixes of tensor names: B sequences, T positions, N = B T tokens, D model width, V vocabulary, H query heads,
G key-value heads, C channels of one head, K mixture components, R rank, M simplex corners, L layers.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until World.start listens, Ctrl-C simply ends the program

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import zstandard
except ImportError:
    zstandard = None  # COMPRESS_ALGO=zstd needs it


class UserError(Exception):
    """A mistake of the user's: main prints it as one line, `error: ...`, and exits with code 2."""


class Interrupted(Exception):
    """A signal asked the run to stop; `args[0]` is its number."""


# ---- Settings: environment variables, read here and nowhere else ----------------------------------------------------
def setting(default, doc: str, low=None, high=None, choices=(), scope: str = "run"):
    """A field with its documentation, range, choices and scope: "model" and "eval" travel in the artifact."""
    return dataclasses.field(
        default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices, scope=scope)
    )


model_setting = functools.partial(setting, scope="model")


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """All settings of a run. The defaults are the `study` preset; the variable of a field is its name in capitals."""

    mode: str = setting("train", "what to do", choices=("train", "eval", "table", "bench"))
    preset: str = setting(
        "study", "defaults: study A's, study B's, a CPU's", choices=("study", "pilot", "demo")
    )
    run_id: str = setting("", "folder under runs/; empty: time, head and seed")
    seed: int = setting(1337, "seed of the initial weights", 0, 2**32 - 1)
    author: str = setting("", "author named in submission.json")
    github_id: str = setting("", "GitHub account named in submission.json")
    allow_near_misses: bool = setting(False, "accept variables that look like misspelt settings")
    data_path: str = setting(
        "./data/datasets/fineweb10B_sp1024",
        "folder of fineweb_{train,val}_*.bin, or `demo`: Python's docs",
    )
    tokenizer_path: str = setting(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards"
    )
    vocab_size: int = model_setting(1024, "tokens in the vocabulary", 2, 65536)
    num_layers: int = model_setting(11, "transformer blocks", 1, 1000)
    model_dim: int = model_setting(512, "width of the residual stream", 4, 65536)
    num_heads: int = model_setting(8, "query heads", 1, 1024)
    num_kv_heads: int = model_setting(
        4, "key-value heads; each serves NUM_HEADS / NUM_KV_HEADS query heads", 1, 1024
    )
    mlp_mult: int = model_setting(3, "hidden width of the MLP over MODEL_DIM", 1, 64)
    rope_base: float = model_setting(10000.0, "base of the rotary frequencies", 1.0, 1e12)
    rope_dims: int = model_setting(16, "rotated channels of a head; 0: all", 0, 65536)
    use_ntk_rope: bool = model_setting(True, "raise the rotary base for TRAIN_SEQ_LEN above 1024")
    qk_gain_init: float = model_setting(1.5, "initial gain of the normed queries", 0.0, 1000.0)
    xsa_last_n: int = model_setting(
        4, "last layers whose attention output drops its own value direction", 0, 1000
    )
    smear_gate: bool = model_setting(True, "blend each embedding with the token before")
    bigram_hash: bool = model_setting(True, "add a hashed bigram embedding before each layer")
    bigram_vocab_size: int = model_setting(2048, "rows of the bigram table", 2, 2**24)
    bigram_dim: int = model_setting(128, "width of the bigram table", 1, 65536)
    ln_scale: bool = model_setting(True, "scale the norms of layer i by 1 / sqrt(i + 1)")
    value_embed: bool = model_setting(True, "add a token embedding to the values of VE_LAYERS")
    ve_dim: int = model_setting(128, "width of the value embedding table", 1, 65536)
    ve_layers: str = model_setting(
        "9,10", "layers with a value embedding, from 0, separated by commas"
    )
    logit_softcap: float = model_setting(
        30.0, "c in c tanh(z / c) on the logits; 0: no cap", 0.0, 1e6
    )
    init_type: str = model_setting(
        "ortho",
        "orthogonal, or PyTorch's own with zero output projections",
        choices=("ortho", "default"),
    )
    tied_embed_init_std: float = model_setting(
        0.005, "standard deviation of the initial token embedding", 1e-9, 10.0
    )
    head_type: str = model_setting("tied", "output head")  # its choices are the keys of HEADS
    head_variant: str = model_setting(
        "", "the head as a study ran it", choices=("", "pr908", "pr266")
    )
    head_k: int = model_setting(2, "components of the mixture", 1, 64)
    head_rank: int = model_setting(64, "rank of the head's own factors; 0 (delta): full", 0, 65536)
    head_dim: int = model_setting(128, "corners of the simplex", 2, 65536)
    head_untie_frac: float = setting(
        0.0, "share of training after which the untied head leaves the embedding", 0.0, 1.0
    )
    head_trainable: bool = setting(
        True, "train the head's own parameters; 0: they stay as they start"
    )
    train_batch_tokens: int = setting(786432, "tokens a step, over all ranks", 1, 2**30)
    train_seq_len: int = model_setting(
        2048, "tokens a sequence, in training and evaluation", 1, 2**24
    )
    micro_batch_tokens: int = setting(
        0, "tokens of one forward pass on one rank; 0: 131072 on CUDA, else 4096", 0, 2**30
    )
    iterations: int = setting(
        20000, "steps at most; 0: export and score the untrained model", 0, 2**40
    )
    max_wallclock_seconds: float = setting(
        600.0, "cap on training time, seconds; 0: none", 0.0, 1e9
    )
    init_from: str = setting(
        "", "artifact whose trunk, and head where it is the same, training starts from"
    )
    train_only: str = setting("all", "what is trained", choices=("all", "head"))
    warmup_steps: int = setting(
        20, "steps that prime the compiled code, then are undone; outside the cap", 0, 10000
    )
    warmdown_iters: int = setting(
        3500, "steps of linear warm-down of the learning rates at the end", 0, 2**40
    )
    warmdown_frac: float = setting(0.8, "the warm-down's longest share of the run", 0.0, 1.0)
    val_loss_every: int = setting(0, "steps between validations; 0: at the end only", 0, 2**40)
    train_log_every: int = setting(200, "steps between log lines; 0: none", 0, 2**40)
    checkpoint_seconds: float = setting(
        0.0, "seconds between checkpoints; 0: at signals and at the end only", 0.0, 1e9
    )
    compute_dtype: str = setting(
        "auto",
        "of products; auto: bf16 where it is fast",
        choices=("auto", "bf16", "fp32"),
        scope="eval",
    )
    compile: str = setting(
        "auto", "torch.compile; auto: on CUDA", choices=("auto", "0", "1"), scope="eval"
    )
    use_fa3: bool = setting(
        False,
        "flash-attention 3 (package flash_attn_interface) on CUDA; off: PyTorch's SDPA",
        scope="eval",
    )
    matrix_lr: float = setting(0.025, "Muon's learning rate: matrices of the trunk", 0.0, 100.0)
    scalar_lr: float = setting(
        0.025, "Adam's learning rate: scales, gains, gates, biases", 0.0, 100.0
    )
    tied_embed_lr: float = setting(
        0.035, "Adam's learning rate: token, bigram and value tables", 0.0, 100.0
    )
    head_matrix_lr: float = setting(
        0.0, "Muon's learning rate: the head's own matrices; 0: the head's default", 0.0, 100.0
    )
    head_lr: float = setting(
        0.0,
        "Adam's learning rate: the head's own vocabulary-side matrices; 0: the head's default",
        0.0,
        100.0,
    )
    muon_momentum: float = setting(0.99, "Muon's momentum after its warm-up", 0.0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at step 0", 0.0, 0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "steps of the momentum's warm-up", 0, 2**40)
    muon_weight_decay: float = setting(0.04, "decoupled weight decay of Muon", 0.0, 100.0)
    adam_wd: float = setting(0.04, "decoupled weight decay of Adam", 0.0, 100.0)
    beta1: float = setting(0.9, "Adam's first decay", 0.0, 0.9999)
    beta2: float = setting(0.95, "Adam's second decay", 0.0, 0.9999999)
    adam_eps: float = setting(1e-8, "Adam's epsilon", 1e-20, 1.0)
    grad_clip_norm: float = setting(
        0.3, "largest norm of the whole gradient; 0: no clipping", 0.0, 1e9
    )
    use_ema: bool = setting(True, "export the exponential moving average of the weights")
    ema_alpha: float = setting(
        0.997, "the average's decay a step, min(EMA_ALPHA, (1 + t) / (10 + t))", 0.0, 0.999999
    )
    late_qat: bool = setting(True, "train through the export's rounding at the end")
    qat_threshold: float = setting(
        0.15, "learning-rate scale below which late QAT starts", 0.0, 1.0
    )
    eval_stride: int = setting(
        64,
        "tokens scored a window in the final evaluation; 0: TRAIN_SEQ_LEN",
        0,
        2**24,
        scope="eval",
    )
    val_batch_size: int = setting(
        524288, "tokens of one evaluation batch, over all ranks", 1, 2**30, scope="eval"
    )
    quant: str = setting(
        "plain", "rounding of the matrices to the artifact's grid", choices=("plain", "gptq")
    )
    eval_spectrum: bool = setting(False, "measure the rank of the log-probabilities (MODE=eval)")
    eval_split: str = setting("val", "split that is scored", choices=("val", "test"))
    artifact: str = setting("", "artifact to score (MODE=eval)")
    runs: str = setting("runs/*", "folders of the runs to compare (MODE=table)")
    compress_algo: str = setting(
        "zlib", "codec; zlib is deflate, Huffman only", choices=("zlib", "zstd"), scope="eval"
    )
    size_limit_bytes: int = setting(
        16_000_000, "cap on this script's bytes plus the artifact's", 1, 2**50
    )


PRESETS: dict[str, dict[str, object]] = dict(
    study={},
    pilot=dict(
        num_layers=9,
        mlp_mult=2,
        rope_dims=0,
        use_ntk_rope=False,
        xsa_last_n=0,
        smear_gate=False,
        use_ema=False,
        ln_scale=False,
        value_embed=False,
        init_type="default",
        train_batch_tokens=524288,
        train_seq_len=1024,
        bigram_hash=False,
        warmdown_iters=1200,
        matrix_lr=0.04,
        scalar_lr=0.04,
        tied_embed_lr=0.05,
        muon_momentum=0.95,
        late_qat=False,
        adam_wd=0.0,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=500,
        muon_weight_decay=0.0,
        grad_clip_norm=0.0,
        eval_stride=0,
    ),
    demo=dict(
        data_path="demo",
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        bigram_dim=32,
        ve_dim=32,
        train_batch_tokens=4096,
        train_seq_len=256,
        max_wallclock_seconds=75.0,
        warmup_steps=0,
        warmdown_iters=100000,
        warmdown_frac=0.5,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100,
        muon_weight_decay=0.0,
        adam_wd=0.0,
        ema_alpha=0.98,
        train_log_every=20,
    ),
)
PUBLISHED_CONSTANTS = (
    dict(  # published variables with one implemented behaviour: accepted at these values only
        TIE_EMBEDDINGS="1",
        EMA_FROM_INIT="1",
        USE_QAT="0",
        GRAD_GUIDED_QUANT="0",
        SKIP_QUANT="0",
        QAT_BITS="6",
        QUANT_BITS_MIDDLE="6",
        QUANT_BITS_MLP="6",
        MUON_BACKEND_STEPS="5",
        FLASH_ATTN_BACKEND="fa3",
        FLASH_ATTN_STRICT="1",
        FLASH_ATTN_ARCH_LIST="9.0",
    )
)
ALIASES = dict(
    MIXTURE_SOFTMAX_K="HEAD_K",
    MIXTURE_RANK_DIM="HEAD_RANK",
    SIMPLEX_DIM="HEAD_DIM",
    MOS_K="HEAD_K",
    MOS_RANK="HEAD_RANK",
)
STUDY_B, SWITCHES = (
    ("USE_MOS", "MOS_K", "MOS_RANK"),
    dict(RANK_DIM="int", USE_MOS="bool", SKIP_COMPILE="bool"),
)  # see `translate`
FIELDS = {
    field.name.upper(): field for field in dataclasses.fields(Hyperparameters)
}  # by environment variable
SCOPES = {field.name: field.metadata["scope"] for field in FIELDS.values()}
READERS = dict(  # by type: text to value, and what the text must be
    str=(str, "text"),
    bool=({"0": False, "1": True}.__getitem__, "0 or 1"),
    int=(int, "a whole number"),
    float=(float, "a number"),
)


def from_env(
    environ: Mapping[str, str] = os.environ, defaults: Mapping[str, object] = {}
) -> Hyperparameters:
    """Settings from variables, then `defaults` (an artifact's; its model's cannot be contradicted), then the preset, then the
    fields. UserError names variable, value, remedy."""
    given = translate(environ)
    for name, (source, text) in given.items():
        known = defaults.get(name.lower())
        if (
            known is not None
            and SCOPES[name.lower()] == "model"
            and parse(name, text, source) != known
        ):
            raise UserError(
                f"{source}={environ[source]}: the artifact has {name}={as_text(known)}; leave it unset"
            )
    implied = (
        "demo"
        if environ.get("DATA_PATH") == "demo"
        else "pilot"
        if environ.keys() & {*STUDY_B}
        else "study"
    )
    explicit = dict(preset=implied) | {
        name.lower(): parse(name, text, source) for name, (source, text) in given.items()
    }
    on_cpu = environ.get("MODE") == "bench" and not torch.cuda.is_available()
    small = dict(train_batch_tokens=4096, train_seq_len=256) if on_cpu else {}
    settings = Hyperparameters(**{**PRESETS[explicit["preset"]], **small, **defaults, **explicit})
    if not defaults and (
        settings.mode == "eval" or settings.mode == "train" and settings.init_from
    ):  # it is still in the artifact
        return settings
    check(settings, given)
    head = head_class(settings)
    own = {
        name: getattr(settings, name) or getattr(head, name)
        for name in ("head_lr", "head_matrix_lr")
        if name in head.uses
    }
    return dataclasses.replace(settings, **own)


def as_text(value: object) -> str:
    """A setting's value as its environment variable would hold it."""
    return str(int(value) if isinstance(value, bool) else value)


def variables(settings: Hyperparameters) -> dict[str, str]:
    """All settings as environment variables."""
    return {name.upper(): as_text(value) for name, value in dataclasses.asdict(settings).items()}


def translate(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Per setting the variable that says it and its text; UserError for one that is misspelt, not implemented or contradicts."""
    known = {*FIELDS, *PUBLISHED_CONSTANTS, *ALIASES, *SWITCHES}
    for name in sorted(environ.keys() - known if environ.get("ALLOW_NEAR_MISSES") != "1" else ()):
        for likely in difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
            raise UserError(
                f"{name}={environ[name]}: did you mean {likely}? If not, set ALLOW_NEAR_MISSES=1"
            )
    for name, value in PUBLISHED_CONSTANTS.items():
        if environ.get(name, value) != value and (
            torch.cuda.is_available() or not name.startswith("FLASH_ATTN")
        ):
            raise UserError(
                f"{name}={environ[name]}: only {name}={value} is implemented; leave it unset"
            )
    head = environ.get("HEAD_TYPE", "standard")
    rank, _, eager = (
        convert(name, environ.get(name, "0"), kind) for name, kind in SWITCHES.items()
    )
    if rank < 0 or rank > 0 and head != "standard":
        raise UserError(
            f"RANK_DIM={rank}: must be 0 or unset, or above 0 with HEAD_TYPE=standard (factorized)"
        )
    heard = environ.keys() - {
        *(STUDY_B if environ.get("USE_MOS") == "0" else ()),
        *(["HEAD_TYPE"] if rank else ()),
    }
    ours = {
        **environ,
        "HEAD_TYPE": dict(standard="tied", mixture_softmax="mos", best="untied").get(head, head),
    }
    said = [(name, name, ours[name]) for name in FIELDS if name in heard]
    said += (
        [("RANK_DIM", "HEAD_TYPE", "factorized"), ("RANK_DIM", "HEAD_RANK", str(rank))]
        if rank
        else []
    )
    said += [(name, "HEAD_TYPE", "mos") for name in STUDY_B if name in heard]
    said += (
        [("USE_MOS", "HEAD_TYPE", "another")]
        if environ.get("USE_MOS") == "0" and ours["HEAD_TYPE"] == "mos"
        else []
    )
    said += [(alias, name, environ[alias]) for alias, name in ALIASES.items() if alias in heard]
    said += [("SKIP_COMPILE", "COMPILE", "0")] if eager else []
    given: dict[str, tuple[str, str]] = {}
    for source, name, text in said:
        first, agreed = given.setdefault(name, (source, text))
        if text != agreed:
            raise UserError(
                f"{source}={environ[source]}: contradicts {first}={environ[first]}; set only one"
            )
    return given


def convert(name: str, text: str, kind: str):
    """The value of a variable's text, by its type's name; UserError where it is none."""
    read, remedy = READERS[kind]
    try:
        return read(text)
    except (KeyError, ValueError):
        raise UserError(f"{name}={text}: must be {remedy}") from None


def parse(name: str, text: str, source: str = ""):
    """The typed value of one setting; UserError, naming the variable that it came from, outside its range or choices."""
    field, source = FIELDS[name], source or name
    low, high = field.metadata["low"], field.metadata["high"]
    choices = HEADS if name == "HEAD_TYPE" else field.metadata["choices"]
    if choices and text not in choices:
        hint = "".join(
            f"; did you mean {near}?" for near in difflib.get_close_matches(text, choices, n=1)
        )
        raise UserError(f"{source}={text}: must be one of {', '.join(choices)}{hint}")
    value = convert(source, text, field.type)
    if low is not None and not low <= value <= high:  # false for nan, too
        bound = (
            "finite"
            if not abs(value) < math.inf
            else f"at least {low}"
            if value < low
            else f"at most {high}"
        )
        raise UserError(f"{source}={text}: must be {bound}")
    return value


def value_layers(s: Hyperparameters) -> tuple[int, ...]:
    """The layers that get a value embedding, ascending; UserError where VE_LAYERS names none of the model's."""
    texts = s.ve_layers.split(",") if s.value_embed else ()
    if not all(re.fullmatch(r"\s*\d{1,4}\s*", text) and int(text) < s.num_layers for text in texts):
        raise UserError(
            f"VE_LAYERS={s.ve_layers}: must be layers in 0..{s.num_layers - 1} between commas; or set VALUE_EMBED=0"
        )
    return tuple(sorted({*map(int, texts)}))


def check(s: Hyperparameters, given: Mapping[str, tuple[str, str]]) -> None:
    """What must hold between settings; raises UserError."""

    def need(true: object, name: str, remedy: str) -> None:
        if not true:
            source, text = given.get(name, (name, variables(s)[name]))
            raise UserError(f"{source}={text}: must {remedy}")

    need(s.model_dim % s.num_heads == 0, "NUM_HEADS", f"divide MODEL_DIM={s.model_dim}")
    need(s.num_heads % s.num_kv_heads == 0, "NUM_KV_HEADS", f"divide NUM_HEADS={s.num_heads}")
    channels, T = s.model_dim // s.num_heads, s.train_seq_len
    need(
        channels % 2 == 0,
        "NUM_HEADS",
        f"leave each head an even width (MODEL_DIM / NUM_HEADS is {channels})",
    )
    need(
        s.rope_dims % 2 == 0 and s.rope_dims <= channels,
        "ROPE_DIMS",
        f"be even and at most {channels}, a head's width",
    )
    need(
        (s.rope_dims or channels) > 2 or not s.use_ntk_rope,
        "ROPE_DIMS",
        "rotate more than 2 channels with USE_NTK_ROPE=1",
    )
    value_layers(s)
    need(
        s.compress_algo != "zstd" or zstandard,
        "COMPRESS_ALGO",
        "be zlib, or the package zstandard be installed",
    )
    need(
        s.mode == "eval" or s.train_batch_tokens % T == 0,
        "TRAIN_BATCH_TOKENS",
        f"be a multiple of TRAIN_SEQ_LEN={T}",
    )
    need(
        not 0 < s.micro_batch_tokens < T,
        "MICRO_BATCH_TOKENS",
        f"be 0 or hold a sequence, TRAIN_SEQ_LEN={T}",
    )
    need(
        not s.use_fa3 or s.compute_dtype != "fp32",
        "COMPUTE_DTYPE",
        "be auto or bf16 with USE_FA3=1",
    )
    need(
        s.data_path != "demo" or "TOKENIZER_PATH" not in given,
        "TOKENIZER_PATH",
        "be unset with DATA_PATH=demo, which has its own",
    )
    need(s.eval_stride <= T, "EVAL_STRIDE", f"be at most TRAIN_SEQ_LEN={T}")
    need(
        re.fullmatch(r"(?!\.+\Z)[\w.-]{0,200}", s.run_id, re.A),
        "RUN_ID",
        "be a folder name of letters, digits, '.', '_' and '-'",
    )
    for name, mode in dict(
        ARTIFACT="eval", EVAL_SPECTRUM="eval", RUNS="table", INIT_FROM="train"
    ).items():
        need(
            s.mode == mode or variables(s)[name] == as_text(FIELDS[name].default),
            name,
            f"be unset but for MODE={mode}",
        )
    head = head_class(s)
    for name, (source, text) in given.items():
        users = ", ".join(other for other, cls in HEADS.items() if name.lower() in cls.uses)
        if users and name.lower() not in head.uses:
            raise UserError(
                f"{source}={text}: HEAD_TYPE={s.head_type} does not use it ({users} does); leave it unset"
            )
    least, bound = head.ranks if "head_rank" in head.uses else (0, "")
    most = getattr(s, bound, math.inf)
    need(least <= s.head_rank, "HEAD_RANK", f"be at least {least} with HEAD_TYPE={s.head_type}")
    need(
        s.head_rank <= most,
        "HEAD_RANK",
        f"be at most {bound.upper()}={most} with HEAD_TYPE={s.head_type}",
    )
    need(
        s.head_trainable or s.head_type != "tied",
        "HEAD_TRAINABLE",
        "be 1 with HEAD_TYPE=tied, which has no parameters of its own",
    )
    need(
        s.train_only == "all" or s.head_type != "tied" and s.head_trainable,
        "TRAIN_ONLY",
        "be all where no head is trained",
    )
    follows = s.head_trainable and s.train_only == "all"
    need(
        s.head_untie_frac == 0 or follows,
        "HEAD_UNTIE_FRAC",
        "be 0 with HEAD_TRAINABLE=0 or TRAIN_ONLY=head",
    )


# ---- World: one process or torchrun's many; with one, communication is skipped --------------------------------------
PROMPT, PATIENT = (
    50,
    600,
)  # seconds until a silent rank counts as lost: in general, and where code is compiled or gptq runs


class World:
    """Rank, size and device; the few collectives that the program needs; the signals that ask it to stop."""

    def __init__(self) -> None:
        names = dict(
            RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=os.environ.get("WORLD_SIZE", 1)
        )
        self.rank, self.size, self.local_rank, self.local_size = (
            convert(name, os.environ.get(name, str(default)), "int")
            for name, default in names.items()
        )
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size):
            raise UserError(
                f"RANK={self.rank} LOCAL_RANK={self.local_rank}: must lie in 0..WORLD_SIZE-1 (WORLD_SIZE={self.size},"
                f" LOCAL_WORLD_SIZE={self.local_size}); use torchrun, or unset them"
            )
        if torch.cuda.device_count() and not torch.cuda.is_available():
            raise UserError(
                f"torch {torch.__version__} cannot use the GPU: install one for its driver or set CUDA_VISIBLE_DEVICES="
            )
        self.device = (
            torch.device("cuda", self.local_rank)
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.signal, self.signalled = 0, math.inf

    def start(self) -> None:
        """Join the process group, NCCL for CUDA tensors and gloo for CPU tensors; listen to signals."""
        if cuda := self.device.type == "cuda":
            if self.local_rank >= (count := torch.cuda.device_count()):
                raise UserError(
                    f"LOCAL_RANK={self.local_rank}: this node has {count} GPUs; lower torchrun's --nproc_per_node"
                )
            torch.cuda.set_device(self.device)
        if self.size > 1:
            try:
                socket.getaddrinfo(
                    os.environ.get("MASTER_ADDR") or None, 0
                )  # fails at once where the process group would wait
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo",
                    timeout=datetime.timedelta(seconds=PROMPT),
                )
                dist.all_reduce(
                    torch.zeros(1, device=self.device)
                )  # NCCL starts now, while PROMPT is enough
            except (OSError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"WORLD_SIZE={self.size}: the ranks cannot meet ({error}); use torchrun, or unset it"
                ) from None

        def receive(number: int, frame: object) -> None:
            if (
                time.monotonic() - self.signalled > 2
            ):  # a second one; sooner, it is torchrun that repeats the first
                os._exit(128 + number)
            self.signal, self.signalled = number, min(self.signalled, time.monotonic())
            if self.size == 1 and number != signal.SIGHUP:  # a closed terminal may hang up twice
                signal.signal(
                    number, signal.SIG_DFL
                )  # a second one is not kept waiting by a long operation

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, receive)

    def wait_at_most(self, seconds: float) -> None:
        """From now on, a collective in which another rank is silent for so long fails."""
        if self.size > 1:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))

    def heed(self) -> None:
        """Interrupted, if a signal has come to this rank. Called where the state is whole."""
        if self.signal:
            raise Interrupted(self.signal)

    def heed_together(self) -> None:
        """Interrupted on every rank, if a signal has come to any."""
        flag = torch.tensor(self.signal)
        self.collective(dist.all_reduce, flag, dist.ReduceOp.MAX)
        if flag:
            raise Interrupted(int(flag))

    def collective(self, operation: Callable, *arguments: object, **options: object) -> None:
        """Talk with the other ranks, if any; a failure says in one line that one is gone, or that a signal ended it."""
        try:
            if self.size > 1:
                operation(*arguments, **options)
        except RuntimeError as error:
            self.heed()
            cause = str(error).splitlines()[0][:200]
            raise UserError(
                f"rank {self.rank}: lost touch with another rank ({cause}); the same command resumes"
            ) from None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.collective(dist.all_reduce, tensor)
        return tensor

    def agree(self, value):
        """Rank 0's value, on every rank. It travels as a CPU message: the GPU is not waited for."""
        box = [value]
        self.collective(dist.broadcast_object_list, box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' equally shaped parts, concatenated along the first dimension in the order of ranks."""
        whole = (
            part if self.size == 1 else part.new_empty(self.size * part.shape[0], *part.shape[1:])
        )
        self.collective(dist.all_gather_into_tensor, whole, part.contiguous())
        return whole

    def average(self, tensors: list[Tensor]) -> None:
        """Mean over ranks of many tensors, in place, in one message."""
        if self.size > 1:
            flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors])).div_(self.size)
            torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))

    def hardware(self) -> str:
        if self.device.type == "cpu":
            return f"{self.size} x CPU {os.uname().machine}, {torch.get_num_threads()} threads"
        return f"{self.size} x {torch.cuda.get_device_name(self.device)}, cuDNN {torch.backends.cudnn.version()}"

    def peak_memory(self) -> str:
        """The log line: peak MiB allocated and reserved of the GPU, or of this process (twice the same)."""
        if self.device.type == "cuda":
            allocated, reserved = (
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
            )
        else:
            import resource

            allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
        return f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB"

    def compute_dtype(self, settings: Hyperparameters) -> torch.dtype:
        """bf16 where the chip multiplies it fast (CUDA, AMX, AVX512-BF16), else float32, unless COMPUTE_DTYPE says so."""
        chip = any(
            getattr(torch.cpu, f"_is_{name}_supported", bool)()
            for name in ("amx_tile", "avx512_bf16")
        )
        auto = torch.bfloat16 if chip or self.device.type == "cuda" else torch.float32
        return dict(auto=auto, bf16=torch.bfloat16, fp32=torch.float32)[settings.compute_dtype]

    def compiled(self, function: Callable, settings: Hyperparameters) -> Callable:
        """The function compiled, where COMPILE says so, as one graph of static shapes. Its first calls may take minutes."""
        if settings.compile == "0" or settings.compile == "auto" and self.device.type == "cpu":
            return function
        self.wait_at_most(PATIENT)
        return torch.compile(function, dynamic=False, fullgraph=True)


# ---- Data: shards, the batch stream, the demo corpus ----------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS_ID = 1  # stands before every document


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped tokens (uint16) of a shard: 256 little-endian int32 (magic, version, count), tokens. UserError if damaged."""
    try:
        header, size = (
            np.fromfile(path if path.is_file() else "", dtype="<i4", count=HEADER_INTS),
            path.stat().st_size,
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if header.size < HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(
            f"{path}: is no token shard of version {SHARD_VERSION} (wrong header); export the data again"
        )
    wanted = 4 * HEADER_INTS + 2 * int(header[2])
    if size != wanted or header[2] < 1:
        raise UserError(
            f"{path}: has {size} bytes where its header promises {wanted}; it is truncated, fetch it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def write_shard(path: Path, tokens: list[int] | np.ndarray) -> None:
    """The counterpart of open_shard."""
    header = np.array(
        [SHARD_MAGIC, SHARD_VERSION, len(tokens), *[0] * (HEADER_INTS - 3)], dtype="<i4"
    )
    write_whole(path, header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an operating system's error becomes a UserError about this path."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free the disk or use another folder"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, sync and rename: the file is there whole or not at all. UserError if it cannot be."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            with open(partial, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class Shards:
    """All tokens of one split as one endless sequence: after the last token comes the first again."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        if not folder.is_dir():
            raise UserError(
                f"DATA_PATH={folder}: no such folder; see README for the data, or use DATA_PATH=demo"
            )
        self.paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        if not self.paths:
            raise UserError(f"DATA_PATH={folder}: holds no fineweb_{split}_*.bin shard")
        self.parts = [open_shard(path) for path in self.paths]
        self.starts = np.cumsum([0, *(part.size for part in self.parts)])
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 (int64), wrapping; UserError for an id outside the vocabulary."""
        chunks = []
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.starts, start, side="right")) - 1
            path, chunk = self.paths[index], self.parts[index][start - self.starts[index] :][:count]
            if path.stat().st_size != 4 * HEADER_INTS + self.parts[index].nbytes:
                raise UserError(
                    f"{path}: its size has changed; leave the data alone while a run uses it"
                )
            if (top := int(chunk.max())) >= self.vocab_size:
                raise UserError(
                    f"{path}: holds token id {top}, but VOCAB_SIZE={self.vocab_size}; use the tokenizer of the data"
                )
            chunks.append(chunk)
            start, count = start + chunk.size, count - chunk.size
        return np.concatenate(chunks).astype(np.int64)

    def unigram_bpb(self, val_N: Tensor, byte_counts: ByteCounts) -> float:
        """Bits per byte of add-one unigram frequencies of this split's start: the mark that any model must beat."""
        seen = np.bincount(self.take(0, min(len(self), 10_000_000)), minlength=self.vocab_size) + 1
        bits_V = torch.from_numpy(-np.log2(seen / seen.sum())).to(val_N.device)
        return (bits_V[val_N[1:]].sum() / byte_counts(val_N[:-1], val_N[1:]).sum()).item()

    def fingerprint(self, val_N: Tensor) -> str:
        """SHA-256 that tells data apart: of the train split's (this one's) length and ends, and of the whole validation split."""
        ends = self.take(len(self) - 32768, 65536)
        return hashlib.sha256(
            f"{len(self)} ".encode() + ends.tobytes() + val_N.cpu().numpy().tobytes()
        ).hexdigest()


def train_batch(
    shards: Shards, step: int, settings: Hyperparameters, world: World
) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches (x_BT, y_BT): step s trains on the targets s n + 1 .. (s + 1) n for any number of ranks."""
    n, T, B = (
        settings.train_batch_tokens,
        settings.train_seq_len,
        micro_batch_sequences(settings, world),
    )
    tokens = torch.from_numpy(shards.take(step * n, n + 1))
    x, y = (part.view(-1, T).chunk(world.size)[world.rank] for part in (tokens[:-1], tokens[1:]))
    if world.device.type == "cuda":  # the copy is not waited for
        x, y = (part.pin_memory().to(world.device, non_blocking=True) for part in (x, y))
    return list(zip(x.split(B), y.split(B)))


def micro_batch_sequences(settings: Hyperparameters, world: World) -> int:
    """Sequences of one forward pass on one rank: the largest divisor of its share within MICRO_BATCH_TOKENS."""
    n, T = settings.train_batch_tokens, settings.train_seq_len
    share, rest = divmod(n // T, world.size)
    if rest:
        raise UserError(
            f"TRAIN_BATCH_TOKENS={n}: must be a multiple of {world.size * T}, whole sequences for {world.size} ranks"
        )
    limit = settings.micro_batch_tokens or (131072 if world.device.type == "cuda" else 4096)
    return max(B for B in range(1, max(1, min(share, limit // T)) + 1) if share % B == 0)


def demo_documents() -> list[str]:
    """English text that every Python has: the topics of `help()` and the standard library's docstrings, mixed in a fixed order."""
    from pydoc_data.topics import topics

    documents, library = [*topics.values()], Path(os.__file__).parent
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in library.rglob("*.py"):
        with contextlib.suppress(SyntaxError, ValueError, OSError):
            if {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}.isdisjoint(
                path.relative_to(library).parts
            ):
                nodes = (
                    node
                    for node in ast.walk(ast.parse(path.read_bytes()))
                    if isinstance(node, documented)
                )
                documents.append("\n".join(filter(None, map(ast.get_docstring, nodes))))
    return sorted(
        (text for text in documents if len(text) > 200),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )


def build_demo(folder: Path, vocab_size: int) -> None:
    """Write train, val and test shards and a BPE tokenizer (byte fallback) to `folder`, once, under a lock."""
    import fcntl

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "tokenizer.model").exists():  # written last
            return
        documents, model = demo_documents(), io.BytesIO()
        splits = dict(
            val=documents[::25],
            test=documents[1::25],
            train=[text for i, text in enumerate(documents) if i % 25 > 1],
        )
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(
                    line for text in splits["train"] for line in text.splitlines() if line.strip()
                ),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.999,
                add_dummy_prefix=False,
                pad_id=0,
                bos_id=BOS_ID,
                eos_id=2,
                unk_id=3,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError:
            raise UserError(
                f"VOCAB_SIZE={vocab_size}: the demo's text does not fit that many tokens; use 1024"
            ) from None
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for split, texts in splits.items():
            write_shard(
                folder / f"fineweb_{split}_000000.bin",
                np.concatenate(processor.encode(texts, add_bos=True)),
            )
        write_whole(folder / "tokenizer.model", model.getvalue())


def prepare_demo(settings: Hyperparameters, world: World) -> Hyperparameters:
    """Settings with DATA_PATH=demo replaced by the cached corpus; a rank of each node builds it where it is missing."""
    if settings.data_path != "demo":
        return settings
    folder = Path(
        "data/demo" if settings.vocab_size == 1024 else f"data/demo-{settings.vocab_size}"
    )
    if world.local_rank == 0:
        build_demo(folder, settings.vocab_size)
    world.wait_at_most(PATIENT)
    world.sum(torch.zeros(1))  # all wait for all
    return dataclasses.replace(
        settings, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model")
    )


# ---- Byte counts: how many UTF-8 bytes of text each token stands for ------------------------------------------------
ByteCounts = Callable[
    [Tensor, Tensor], Tensor
]  # (token before, token) -> bytes, int64, of any one shape


def load_byte_counts(path: Path, vocab_size: int, device: torch.device) -> ByteCounts:
    """A token's bytes after another token; they add up to a document's decoded text. UserError for a bad or other-sized model."""
    ids = range(vocab_size)

    def sizes(prefix: list[int]) -> list[int]:
        base = len(processor.decode(prefix).encode())
        texts = processor.decode([[*prefix, i] for i in ids])
        return [
            0 if control[i] else 1 if processor.is_byte(i) else len(texts[i].encode()) - base
            for i in ids
        ]

    try:
        processor = sentencepiece.SentencePieceProcessor(
            model_proto=path.read_bytes() if path.is_file() else b"?"
        )
        if processor.vocab_size() != vocab_size:
            raise UserError(
                f"VOCAB_SIZE={vocab_size}: the tokenizer {path} has {processor.vocab_size()} tokens"
            )
        control = [processor.is_control(i) or processor.is_unused(i) for i in ids]
        regular = [
            i for i in ids if not (control[i] or processor.is_byte(i) or processor.is_unknown(i))
        ]
        anchor = max(
            regular, key=lambda i: len(processor.decode([i]))
        )  # any piece that decodes to visible text
        inside, first = sizes([anchor]), sizes([])
    except (
        RuntimeError,
        OSError,
        ValueError,
        TypeError,
    ):  # whatever sentencepiece raises for a damaged model
        raise UserError(
            f"TOKENIZER_PATH={path}: {'is no SentencePiece model' if path.is_file() else 'no such file'}"
        ) from None
    inside_or_first_2V, control_V = (
        torch.tensor(x, dtype=torch.int64, device=device) for x in ([inside, first], control)
    )
    return lambda before, token: inside_or_first_2V[control_V[before], token]


# ---- Trunk: from tokens to the final normed hidden states -----------------------------------------------------------
NORM_EPS = 1e-7  # explicit, so that it does not depend on the dtype


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Linear(nn.Linear):
    """Matrix product in the input's dtype, with float32 master weights; `scale` multiplies the output channels.
    INIT_TYPE=ortho: orthogonal, over sqrt(2 L) where the output joins the residual stream; `default`: PyTorch's own, there zero."""

    def __init__(
        self, settings: Hyperparameters, n_in: int, n_out: int, residual: bool = False
    ) -> None:
        super().__init__(n_in, n_out, bias=False)
        if settings.init_type == "ortho":
            nn.init.orthogonal_(
                self.weight, gain=(2 * settings.num_layers) ** -0.5 if residual else 1.0
            )
        elif residual:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.linear(
            x, (self.weight if scale is None else self.weight * scale[:, None]).to(x.dtype)
        )


class Rotary(nn.Module):
    """Rotary position embedding of the first ROPE_DIMS channels (Su et al. 2021), NTK-aware base above 1,024 tokens."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.dims = settings.rope_dims or settings.model_dim // settings.num_heads
        stretched = settings.use_ntk_rope and settings.train_seq_len > 1024
        base = settings.rope_base * (
            (settings.train_seq_len / 1024) ** (self.dims / (self.dims - 2)) if stretched else 1
        )
        frequency = base ** (-torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims)
        angle_TC = torch.outer(torch.arange(settings.train_seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos_T1C", angle_TC.cos()[:, None], persistent=False)
        self.register_buffer("sin_T1C", angle_TC.sin()[:, None], persistent=False)

    def forward(self, x_BTHC: Tensor) -> Tensor:
        T, half = x_BTHC.size(1), self.dims // 2
        cos, sin = self.cos_T1C[:T].to(x_BTHC.dtype), self.sin_T1C[:T].to(x_BTHC.dtype)
        a, b, rest = x_BTHC.split([half, half, x_BTHC.size(-1) - self.dims], dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attention_kernel(settings: Hyperparameters) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of q_BTHC on k_BTGC, v_BTGC: PyTorch's SDPA, or flash-attention 3 (Shah et al. 2024) with USE_FA3=1."""

    def sdpa(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if q.is_cuda and q.dtype.itemsize > 2:  # there, only the 16-bit kernels know grouped heads
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)
        ).transpose(1, 2)

    if not (settings.use_fa3 and torch.cuda.is_available()):
        return sdpa
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        raise UserError(
            "USE_FA3=1: the package flash_attn_interface is not installed; install it or set USE_FA3=0"
        ) from None
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True) if q.is_cuda else sdpa(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention with RMS-normed queries and keys; `exclusive` removes each token's own value direction."""

    def __init__(self, settings: Hyperparameters, rotary: Rotary, exclusive: bool) -> None:
        super().__init__()
        D, self.H, self.G = settings.model_dim, settings.num_heads, settings.num_kv_heads
        self.C = D // self.H
        self.q, self.k, self.v = (
            Linear(settings, D, heads * self.C) for heads in (self.H, self.G, self.G)
        )
        self.out = Linear(settings, D, D, residual=True)
        self.q_gain = nn.Parameter(torch.full((self.H,), settings.qk_gain_init))
        self.rotary, self.exclusive, self.kernel = rotary, exclusive, attention_kernel(settings)

    def forward(self, x_BTD: Tensor, embedded: Tensor | None, scale_D: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTHC = (
            self.rotary(norm(self.q(x_BTD).view(B, T, self.H, self.C)))
            * self.q_gain.to(x_BTD.dtype)[:, None]
        )
        k_BTGC = self.rotary(norm(self.k(x_BTD).view(B, T, self.G, self.C)))
        v = self.v(x_BTD)
        v_BTGC = (v if embedded is None else v + embedded).view(B, T, self.G, self.C)
        y = self.kernel(q_BTHC, k_BTGC, v_BTGC)
        if self.exclusive:  # y - (y . v) v / |v|^2; a value head is shared by H / G query heads
            y, v = y.reshape(B, T, self.G, -1, self.C), v_BTGC.unsqueeze(3)
            y = (
                y
                - (y * v).sum(-1, keepdim=True) / (v.square().sum(-1, keepdim=True) + NORM_EPS) * v
            )
        return self.out(y.reshape(B, T, D), scale_D)


class Block(nn.Module):
    """Mix with the first stream x0, then attention, then relu^2 MLP (So et al. 2021), each behind a norm and a scale per channel."""

    def __init__(self, settings: Hyperparameters, layer: int, rotary: Rotary) -> None:
        super().__init__()
        D, hidden = settings.model_dim, settings.mlp_mult * settings.model_dim
        self.attn = Attention(
            settings, rotary, exclusive=layer >= settings.num_layers - settings.xsa_last_n
        )
        self.mlp = nn.ModuleDict(
            dict(up=Linear(settings, D, hidden), down=Linear(settings, hidden, D, residual=True))
        )
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))
        self.norm_scale = (layer + 1) ** -0.5 if settings.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, value: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(norm(x) * self.norm_scale, value, self.attn_scale)
        return x + self.mlp.down(
            F.relu(self.mlp.up(norm(x) * self.norm_scale)).square(), self.mlp_scale
        )


class SmearGate(nn.Module):
    """(1 - g) x_t + g x_{t-1}, g = sigmoid per channel; nothing crosses into a document (BOS) or a sequence."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(settings.model_dim))

    def forward(self, x_BTD: Tensor, starts_BT: Tensor) -> Tensor:
        before = F.pad(x_BTD, (0, 0, 1, -1)).masked_fill(starts_BT[..., None], 0.0)
        return torch.lerp(x_BTD, before, torch.sigmoid(self.gate).to(x_BTD.dtype))


class BigramHash(nn.Module):
    """Embedding of the hashed pair (x_{t-1}, x_t), one factor a layer; the last row is for firsts of a sequence or document."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.table = nn.Embedding(settings.bigram_vocab_size, settings.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = Linear(settings, settings.bigram_dim, settings.model_dim)
        self.layer_scale = nn.Parameter(torch.full((settings.num_layers,), 0.05))

    def forward(self, x_BT: Tensor, starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
        last = self.table.num_embeddings - 1
        pair_BT = torch.bitwise_xor(36313 * x_BT, 27191 * F.pad(x_BT, (1, -1))) % last
        return self.proj(self.table(pair_BT.masked_fill(starts_BT, last)).to(dtype))


class ValueEmbedding(nn.Module):
    """Token embedding added to the attention values of some layers, with one scale a layer."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.layers = value_layers(settings)
        self.table = nn.Embedding(settings.vocab_size, settings.ve_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = Linear(
            settings,
            settings.ve_dim,
            settings.model_dim // settings.num_heads * settings.num_kv_heads,
            residual=True,
        )
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scale = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, x_BT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        value = self.proj(self.table(x_BT).to(dtype)) * self.scale.to(dtype)
        return {
            layer: value * scale for layer, scale in zip(self.layers, self.layer_scale.to(dtype))
        }


class GPT(nn.Module):
    """U-Net of blocks over token embeddings, and one output head. `compute_dtype` is that of activations and matrix products;
    None: the weights' own. Tokens x_BT and targets y_BT (int64) give the mean negative log-likelihood in nats, a scalar."""

    def __init__(self, settings: Hyperparameters, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        L, D = settings.num_layers, settings.model_dim
        self.compute_dtype = compute_dtype
        self.tok_emb = nn.Embedding(settings.vocab_size, D)
        nn.init.normal_(self.tok_emb.weight, std=settings.tied_embed_init_std)
        self.smear = SmearGate(settings) if settings.smear_gate else None
        self.bigram = BigramHash(settings) if settings.bigram_hash else None
        rotary = Rotary(settings)
        self.blocks = nn.ModuleList(Block(settings, layer, rotary) for layer in range(L))
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D)) if L > 1 else None
        self.value_embed = ValueEmbedding(settings) if settings.value_embed else None
        self.requires_grad_(settings.train_only == "all")
        self.head = head_class(settings)(settings).requires_grad_(settings.head_trainable)
        self.head.copy_embedding(self.tok_emb.weight)

    def hidden(self, x_BT: Tensor) -> Tensor:
        """The final normed hidden states h_BTD: the first half of the blocks stores skips, the second adds them back."""
        starts_BT = (x_BT == BOS_ID).index_fill(1, x_BT.new_zeros(1), True)
        dtype = self.compute_dtype or self.tok_emb.weight.dtype
        x = self.tok_emb(x_BT).to(dtype)
        if self.smear is not None:
            x = self.smear(x, starts_BT)
        x = x0 = norm(x)
        bigram = None if self.bigram is None else self.bigram(x_BT, starts_BT, dtype)
        values = {} if self.value_embed is None else self.value_embed(x_BT, dtype)
        half, skips = len(self.blocks) // 2, []
        for layer, block in enumerate(self.blocks):
            if layer >= half and skips:
                x = x + self.skip_weights[layer - half].to(dtype) * skips.pop()
            if bigram is not None:
                x = x + bigram * self.bigram.layer_scale[layer].to(dtype)
            x = block(x, x0, values.get(layer))
            if layer < half:
                skips.append(x)
        return norm(x)

    def nll(self, x_BT: Tensor, y_BT: Tensor, last: int | None = None) -> Tensor:
        """Negative log-likelihoods in nats of the last `last` targets of each sequence (all by default), B x last."""
        first = 0 if last is None else x_BT.size(1) - last
        h_BTD, x_BT, y_BT = self.hidden(x_BT)[:, first:], x_BT[:, first:], y_BT[:, first:]
        return self.head.nll(
            h_BTD.flatten(0, 1), x_BT.flatten(), y_BT.flatten(), self.tok_emb.weight
        ).view(y_BT.shape)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        return self.nll(x_BT, y_BT).mean()


# ---- Heads: from hidden states to log-probabilities -----------------------------------------------------------------
class Head(nn.Module):
    """A head is its own parameters, their initial values and its logits; a mixture overrides `nll` and `log_probs` instead.
    h_ND are normed hidden states, x_N current tokens, y_N targets, E_VD the token embedding."""

    uses: tuple[str, ...] = ()  # the settings that it reads
    ranks = (1, "model_dim")  # its least HEAD_RANK, and the setting that bounds it ("": none does)
    head_lr, head_matrix_lr = 0.01, 0.001  # where the settings of these names are not set
    products_with_E = (
        1  # how often it multiplies by E: its FLOPs beside those of its own parameters
    )

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.softcap = settings.logit_softcap
        self.tied_logit_std = (
            settings.tied_embed_init_std * settings.model_dim**0.5
        )  # of E h at step 0
        self.roles: dict[str, str] = {}  # of its parameters, by name
        self.build(settings, settings.model_dim, settings.vocab_size, settings.head_rank)

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        """Declare the head's own parameters with `add`; the tied head has none."""

    def add(self, **roles: dict[str, Tensor]) -> None:
        """Initial values by role, which chooses the optimizer, and name: `matrix` (Muon), `vocab` (Adam at HEAD_LR), `scalar`."""
        for role, name, value in (
            (role, *item) for role, values in roles.items() for item in values.items()
        ):
            setattr(self, name, nn.Parameter(value))
            self.roles[name] = role

    def copy_embedding(self, E_VD: Tensor) -> None:
        """What the head takes over from a new embedding; for most heads nothing."""

    def cap(self, z: Tensor) -> Tensor:
        """c tanh(z / c) in float32 or float64; the identity for c = 0."""
        z = at_least_fp32(z)
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        raise NotImplementedError

    def nll(self, h_ND: Tensor, x_N: Tensor, y_N: Tensor, E_VD: Tensor) -> Tensor:
        """Negative log-likelihood of each target in nats, nll_N."""
        return F.cross_entropy(self.logits(h_ND, x_N, E_VD), y_N, reduction="none")

    def log_probs(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        """Normalised log-probabilities of the whole vocabulary in nats, NxV."""
        return F.log_softmax(self.logits(h_ND, x_N, E_VD), dim=-1)


def project(x: Tensor, *weights: Tensor) -> Tensor:
    """x W^T for one weight after the other, in the dtype of x."""
    for weight in weights:
        x = F.linear(x, weight.to(x.dtype))
    return x


def fan_in_normal(*shape: int) -> Tensor:
    """Normal entries of variance 1 / fan-in: a product with a unit-variance vector keeps its variance."""
    return torch.randn(*shape) / shape[-1] ** 0.5


def orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


class Tied(Head):
    """cap(E h) (Press and Wolf 2017)."""

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(h_ND, E_VD))


class Untied(Head):
    """cap(D h); D is a copy of E, and follows it until HEAD_UNTIE_FRAC of training is over (modded-nanogpt)."""

    uses, products_with_E, head_lr = ("head_lr", "head_untie_frac"), 0, 0.004

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(vocab=dict(D_VD=torch.zeros(V, D)))

    @torch.no_grad()
    def copy_embedding(self, E_VD: Tensor) -> None:
        self.D_VD.copy_(E_VD)

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(h_ND, self.D_VD))


class Factorized(Head):
    """cap(g C A h): a softmax bottleneck of rank R with a learned scale g (study A, H1 and H2, made trainable)."""

    uses, products_with_E = ("head_lr", "head_matrix_lr", "head_rank"), 0

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        g = torch.tensor(self.tied_logit_std)
        self.add(
            matrix=dict(A_RD=fan_in_normal(R, D)),
            vocab=dict(C_VR=fan_in_normal(V, R)),
            scalar=dict(g=g),
        )

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(h_ND, self.A_RD, self.C_VR * self.g))


class Simplex(Head):
    """cap(g C s) with s = M softmax(S h) - 1, a point of the simplex centred and scaled (study A, H6, made trainable)."""

    uses, products_with_E = ("head_dim", "head_lr", "head_matrix_lr"), 0

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        # S h is standard normal at step 0, so M softmax(S h) is about lognormal, with variance e - 1.
        self.add(
            matrix=dict(S_MD=fan_in_normal(settings.head_dim, D)),
            vocab=dict(C_VM=fan_in_normal(V, settings.head_dim)),
            scalar=dict(g=torch.tensor(self.tied_logit_std / (math.e - 1) ** 0.5)),
        )

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        s_NM = (
            self.S_MD.size(0) * torch.softmax(at_least_fp32(project(h_ND, self.S_MD)), dim=-1) - 1
        )
        return self.cap(project(s_NM.to(h_ND.dtype), self.C_VM * self.g))


class Delta(Head):
    """cap((E + C A) h): the tied head and a correction of rank R; R = 0: a full one, C alone."""

    uses, ranks, head_matrix_lr = ("head_lr", "head_matrix_lr", "head_rank"), (0, "model_dim"), 0.01

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(
            matrix=dict(A_RD=fan_in_normal(R, D)) if R else {},
            vocab=dict(C_VR=torch.zeros(V, R or D)),
        )

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        factors = [getattr(self, name) for name in self.roles]
        return self.cap(project(h_ND, E_VD) + project(h_ND, *factors))


class Wide(Head):
    """cap(E h + C relu(A h)^2): R more features than the width, so logits of true rank D + R, at their least price."""

    uses, ranks, head_matrix_lr = ("head_lr", "head_matrix_lr", "head_rank"), (1, ""), 0.01

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(matrix=dict(A_RD=fan_in_normal(R, D)), vocab=dict(C_VR=torch.zeros(V, R)))

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(
            project(h_ND, E_VD) + project(F.relu(project(h_ND, self.A_RD)).square(), self.C_VR)
        )


class Bigram(Head):
    """cap(E h + C a[x]): the tied head and a factored bigram bias on the current token x."""

    uses, ranks, head_lr = ("head_lr", "head_rank"), (1, "vocab_size"), 0.004

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(vocab=dict(a_VR=torch.randn(V, R), C_VR=torch.zeros(V, R)))

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(
            project(h_ND, E_VD) + project(F.embedding(x_N, self.a_VR).to(h_ND.dtype), self.C_VR)
        )


class MixtureOfSoftmaxes(Head):
    """log sum_k pi_k softmax(cap(E (h + U_k V_k h))), pi = softmax(G h + b) (Yang et al. 2018; tied, low-rank).
    U = 0 starts at the tied head, where independent V_k let gradients differ; the V-wide mixture is never formed in training."""

    uses = ("head_k", "head_matrix_lr", "head_rank")

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.products_with_E = K = settings.head_k
        self.gate_KD = self.gate_bias_K = None  # one component needs no gate
        self.add(
            matrix=dict(U_KDR=torch.zeros(K, D, R), V_KRD=fan_in_normal(K, R, D)),
            scalar=dict(gate_KD=torch.zeros(K, D), gate_bias_K=torch.zeros(K)) if K > 1 else {},
        )

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.U_KDR, self.V_KRD)

    def component_logits(self, h_ND: Tensor, E_VD: Tensor, U_DR: Tensor, V_RD: Tensor) -> Tensor:
        return self.cap(project(h_ND + project(h_ND, V_RD, U_DR), E_VD))

    def log_pi(self, h_ND: Tensor) -> Tensor:
        """Log mixture weights, NxK."""
        if self.gate_KD is None:
            return at_least_fp32(h_ND.new_zeros(h_ND.size(0), 1))
        return F.log_softmax(F.linear(at_least_fp32(h_ND), self.gate_KD, self.gate_bias_K), dim=-1)

    def nll(self, h_ND: Tensor, x_N: Tensor, y_N: Tensor, E_VD: Tensor) -> Tensor:
        def component(h: Tensor, E: Tensor, U: Tensor, V: Tensor, y: Tensor) -> Tensor:
            return -F.cross_entropy(self.component_logits(h, E, U, V), y, reduction="none")

        log_p_NK = torch.stack(
            [
                checkpoint(component, h_ND, E_VD, U, V, y_N, use_reentrant=False)
                for U, V in self.factors()
            ],
            dim=-1,
        )
        return -torch.logsumexp(self.log_pi(h_ND) + log_p_NK, dim=-1)

    def log_probs(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        parts_KNV = torch.stack(
            [
                F.log_softmax(self.component_logits(h_ND, E_VD, U, V), dim=-1)
                for U, V in self.factors()
            ]
        )
        return torch.logsumexp(self.log_pi(h_ND).T[..., None] + parts_KNV, dim=0)


# The heads of both studies as they ran them, to show the cause of their figures: HEAD_VARIANT.
class FactorizedPR908(Factorized):
    """cap(C A h), orthogonal factors and no scale: |C A h| <= |h|, which bounds the logits."""

    g = 1.0

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(matrix=dict(A_RD=orthogonal(R, D)), vocab=dict(C_VR=orthogonal(V, R)))


class SimplexPR908(Simplex):
    """cap(C softmax(S h)), orthogonal S and C: a mean of the columns of C, so almost uniform."""

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.add(
            matrix=dict(S_MD=orthogonal(settings.head_dim, D)),
            vocab=dict(C_VM=orthogonal(V, settings.head_dim)),
        )

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(torch.softmax(project(h_ND, self.S_MD), dim=-1), self.C_VM))


class MixturePR908(Head):
    """cap(sum_k pi_k C_k A_k h), pi = softmax(G h): a mixture of logits, so one softmax of rank K R."""

    uses, products_with_E = ("head_k", "head_lr", "head_matrix_lr", "head_rank"), 0

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        A_KRD, C_KVR = (
            torch.stack([orthogonal(n, m) for _ in range(settings.head_k)])
            for n, m in ((R, D), (V, R))
        )
        gate_KD = (2 * torch.rand(settings.head_k, D) - 1) / D**0.5
        self.add(matrix=dict(A_KRD=A_KRD), vocab=dict(C_KVR=C_KVR), scalar=dict(gate_KD=gate_KD))

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        pi_KN1 = torch.softmax(project(h_ND, self.gate_KD), dim=-1).T[..., None]
        return self.cap(
            sum(pi_N1 * project(h_ND, A, C) for pi_N1, A, C in zip(pi_KN1, self.A_KRD, self.C_KVR))
        )


class MixturePR266(MixtureOfSoftmaxes):
    """log sum_k pi_k softmax(E U_k V h), pi = softmax(G h): all components share one V of rank R, and there is no cap."""

    head_matrix_lr = 0.04  # study B's MATRIX_LR

    def build(self, settings: Hyperparameters, D: int, V: int, R: int) -> None:
        self.products_with_E, self.gate_bias_K = settings.head_k, None
        self.add(
            matrix=dict(
                V_RD=0.02 * torch.randn(R, D), U_MR=0.02 * torch.randn(settings.head_k * D, R)
            ),
            scalar=dict(gate_KD=0.02 * torch.randn(settings.head_k, D)),
        )

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((U_DR, self.V_RD) for U_DR in self.U_MR.chunk(self.products_with_E))

    def component_logits(self, h_ND: Tensor, E_VD: Tensor, U_DR: Tensor, V_RD: Tensor) -> Tensor:
        return at_least_fp32(project(h_ND, V_RD, U_DR, E_VD))


HEADS: dict[str, type[Head]] = dict(
    tied=Tied,
    untied=Untied,
    factorized=Factorized,
    mos=MixtureOfSoftmaxes,
    simplex=Simplex,
    delta=Delta,
    wide=Wide,
    bigram=Bigram,
)
VARIANTS = {
    "factorized/pr908": FactorizedPR908,
    "simplex/pr908": SimplexPR908,
    "mos/pr908": MixturePR908,
    "mos/pr266": MixturePR266,
}


def head_class(s: Hyperparameters) -> type[Head]:
    """The class of HEAD_TYPE, or of its HEAD_VARIANT; UserError where it has no such variant."""
    found = (
        VARIANTS.get(f"{s.head_type}/{s.head_variant}") if s.head_variant else HEADS[s.head_type]
    )
    if found is None:
        raise UserError(
            f"HEAD_VARIANT={s.head_variant}: HEAD_TYPE={s.head_type} has none of that name; known: {', '.join(VARIANTS)}"
        )
    return found


# ---- Optimizers: Muon for matrices, Adam for the rest; every parameter in exactly one group -------------------------
TRUNK_ROLES = dict(
    table=r"(bigram|value_embed)\.table\.weight",
    matrix=r"(blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(up|down))|(bigram|value_embed)\.proj)\.weight",
    scalar=r"smear\.gate|skip_weights|(bigram|value_embed)\.(layer_)?scale|blocks\.\d+\.(attn\.q_gain|(attn|mlp)_scale|resid_mix)",
)


def parameter_roles(model: GPT) -> dict[str, str]:
    """By name: tied or table (embeddings that also make logits, or do not), matrix, scalar or vocab. RuntimeError unless just one."""
    rules = [
        *TRUNK_ROLES.items(),
        ("tied" if model.head.products_with_E else "table", r"tok_emb\.weight"),
        *((role, rf"head\.{name}") for name, role in model.head.roles.items()),
    ]
    roles = {}
    for name, _ in model.named_parameters():
        found = [role for role, pattern in rules if re.fullmatch(pattern, name)]
        if len(found) != 1:
            raise RuntimeError(
                f"parameter {name} meets {len(found)} optimizer rules; it must meet exactly one"
            )
        roles[name] = found[0]
    return roles


def newton_schulz(G: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of each matrix of a batch: singular values near 1 (Jordan et al. 2024, Muon)."""
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with decoupled weight decay; equals torch.optim.Muon at constant momentum.
    Parameters of one shape (in 3-D: stacks) are one batch of matrices, split over the ranks, which must hold equal gradients."""

    def __init__(
        self, groups: list[dict], world: World, dtype: torch.dtype, **defaults: float
    ) -> None:
        self.world, self.dtype = world, dtype
        super().__init__(
            [
                dict(group, params=[p for p in group["params"] if p.shape == shape])
                for group in groups
                for shape in dict.fromkeys(p.shape for p in group["params"])
            ],
            defaults,
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([p.grad for p in params])
            momentum = self.state[params[0]].setdefault(
                "momentum", torch.zeros_like(gradient)
            )  # stacked, of the whole group
            momentum.mul_(group["momentum"]).add_(gradient)
            stack = gradient.add_(momentum, alpha=group["momentum"]).flatten(0, -3)
            padded = F.pad(stack, (0, 0, 0, 0, 0, -len(stack) % self.world.size))
            mine = padded.chunk(self.world.size)[self.world.rank]
            update = self.world.gather(newton_schulz(mine, self.dtype))[: len(stack)]
            stretch = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                params,
                list(update.view_as(gradient).to(params[0].dtype)),
                alpha=-group["lr"] * stretch,
            )


def build_optimizers(model: GPT, s: Hyperparameters, world: World) -> list[torch.optim.Optimizer]:
    """Muon and Adam over all trainable parameters, by role; every group carries its unscaled rate as `base_lr`."""
    roles, head = parameter_roles(model), model.head
    rates = dict(
        tied=s.tied_embed_lr,
        table=s.tied_embed_lr,
        vocab=s.head_lr or head.head_lr,
        scalar=s.scalar_lr,
        matrix=s.matrix_lr,
    )
    groups: dict[tuple[bool, float], dict] = {}
    for name, p in model.named_parameters():
        matrix = roles[name] == "matrix"
        rate = (
            s.head_matrix_lr or head.head_matrix_lr
            if matrix and name.startswith("head.")
            else rates[roles[name]]
        )
        if p.requires_grad:
            groups.setdefault((matrix, rate), dict(params=[], lr=rate, base_lr=rate))[
                "params"
            ].append(p)
    adam, muon = (
        [group for (matrix, _), group in groups.items() if matrix == wanted]
        for wanted in (False, True)
    )
    made = (
        [
            torch.optim.AdamW(
                adam, betas=(s.beta1, s.beta2), eps=s.adam_eps, weight_decay=s.adam_wd, fused=True
            )
        ]
        if adam
        else []
    )
    dtype = model.compute_dtype or torch.float32
    return made + (
        [Muon(muon, world, dtype, momentum=s.muon_momentum, weight_decay=s.muon_weight_decay)]
        if muon
        else []
    )


# ---- Schedule: pure functions of step and time ----------------------------------------------------------------------
def learning_rate_scale(step: int, seconds: float, s: Hyperparameters) -> float:
    """1, then linear to 0 over min(WARMDOWN_ITERS steps, WARMDOWN_FRAC of the run), by whichever end comes first."""

    def ramp(remaining: float, length: float) -> float:
        return min(1.0, max(remaining, 0.0) / length) if length > 0 else 1.0

    by_steps = ramp(s.iterations - step, min(s.warmdown_iters, s.warmdown_frac * s.iterations))
    cap, step_seconds = s.max_wallclock_seconds, seconds / max(step, 1)
    by_time = (
        ramp(cap - seconds, min(s.warmdown_iters * step_seconds, s.warmdown_frac * cap))
        if cap
        else 1.0
    )
    return min(by_steps, by_time)


def progress(step: int, seconds: float, s: Hyperparameters) -> float:
    """The share of the run that is over, by whichever end comes first; 1 at the end."""
    return max(
        step / s.iterations if s.iterations else 1.0,
        seconds / (s.max_wallclock_seconds or math.inf),
    )


def momentum_at(step: int, s: Hyperparameters) -> float:
    """Muon's momentum: linear from its start to its end over the warm-up."""
    done = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return (1 - done) * s.muon_momentum_warmup_start + done * s.muon_momentum


# ---- Evaluate: exact bits per byte, plain or sliding ----------------------------------------------------------------
Validation = tuple[
    Tensor, ByteCounts
]  # the split that is scored, int64 on the device, and its tokens' bytes


@torch.inference_mode()
def evaluate(
    model: GPT,
    tokens_N: Tensor,
    byte_counts: ByteCounts,
    stride: int,
    s: Hyperparameters,
    world: World,
) -> list[float]:
    """Mean loss in nats a token, and bits per byte, over all targets of tokens_N, each scored once; stride 0: TRAIN_SEQ_LEN."""
    nll = world.compiled(model.nll, s)
    total = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, bytes, tokens
    for x_BT, y_BT, inside_BT, scored in windows(tokens_N, stride or s.train_seq_len, s, world):
        inside = inside_BT[:, -scored:].double()
        text_bytes = byte_counts(x_BT[:, -scored:], y_BT[:, -scored:])
        total += torch.stack(
            ((nll(x_BT, y_BT, scored) * inside).sum(), (text_bytes * inside).sum(), inside.sum())
        )
    nats, text_bytes, count = world.sum(total.cpu()).tolist()
    return [nats / count, nats / math.log(2) / text_bytes]


def windows(
    tokens_N: Tensor, stride: int, s: Hyperparameters, world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """This rank's batches, all of one shape: x_BT, y_BT, which targets exist, how many of the last ones each window scores. Window
    k reads T tokens from k stride on and scores what none before it did; the first that reaches the end is the last."""
    T, end, device = s.train_seq_len, len(tokens_N), world.device
    limit = 131072 if device.type == "cuda" else 16384
    B, count = (
        max(1, min(s.val_batch_size // world.size, limit) // T),
        1 + max(0, -(-(end - 1 - T) // stride)),
    )
    alone = stride < T  # then window 0, which scores T targets, is a batch of its own
    mine = range(
        *(alone + (count - alone) * rank // world.size for rank in (world.rank, world.rank + 1))
    )
    for batch in [range(1)] * (alone and world.rank == 0) + [
        mine[k : k + B] for k in range(0, len(mine), B)
    ]:
        world.heed()
        starts_B = F.pad(
            torch.arange(batch.start, batch.stop, device=device) * stride,
            (0, B - len(batch)),
            value=end,
        )
        index = starts_B[:, None] + torch.arange(T + 1, device=device)
        sequence = tokens_N[index.clamp(max=end - 1)]
        yield (
            sequence[:, :-1],
            sequence[:, 1:],
            index[:, 1:] < end,
            T if batch.start == 0 else stride,
        )


@torch.inference_mode()
def spectrum(model: GPT, tokens_N: Tensor, s: Hyperparameters, world: World) -> dict[str, float]:
    """How far the log-probabilities exceed rank D: over at least 65,536 contexts (where the split has them), in float64
    from the hidden states on, each context's mean over V subtracted; from the eigenvalues of the V x V Gram matrix."""
    head, E_VD, T = (
        copy.deepcopy(model.head).double(),
        model.tok_emb.weight.double(),
        s.train_seq_len,
    )
    gram_VV = torch.zeros(s.vocab_size, s.vocab_size, dtype=torch.float64, device=world.device)
    contexts = tokens_N[: -(-65536 // T) * T + 1]
    for x_BT, _, inside_BT, _ in windows(contexts, T, s, world):
        h_ND, x_N = model.hidden(x_BT)[inside_BT].double(), x_BT[inside_BT]
        for h, x in zip(
            h_ND.split(1024), x_N.split(1024)
        ):  # never all contexts' vocabulary at once
            z_NV = head.log_probs(h, x, E_VD)
            z_NV -= z_NV.mean(dim=-1, keepdim=True)
            gram_VV.addmm_(z_NV.T, z_NV)
    energy_V = torch.linalg.eigvalsh(world.sum(gram_VV).cpu()).flip(0).clamp_min(0)
    share_V = energy_V.cumsum(0) / energy_V.sum()
    return dict(
        contexts=len(contexts) - 1,
        rank_9999=1 + int((share_V < 0.9999).sum()),
        energy_beyond_model_dim=(energy_V[s.model_dim :].sum() / energy_V.sum()).item(),
    )


# ---- Artifact: quantize, fit under the cap, pack, unpack ------------------------------------------------------------
MAGIC = b"GPTHEAD4"  # magic and version; then SHA-256 of the rest, header length (uint32), JSON header, payloads
LONGEST_HEADER = 800_000  # bytes; 1,000 layers need 620,000
STORED = [name for name, scope in SCOPES.items() if scope != "run"]  # the settings in the header
FINER = dict(
    matrix=1.0, table=2.0, tied=16.0, vocab=8.0
)  # than the step, by role: what makes logits is the most sensitive
FINEST, COARSEST = (
    2.0**-7,
    8.0,
)  # steps over a matrix's RMS; the finest is never coarser than int8 scaled by the largest entry
LARGEST = 32000  # of a matrix over its scale: codes have 16 bits
Tensors = Mapping[str, Tensor]  # by the parameter's name
Roles = Mapping[str, str]


def to_codes(x: Tensor) -> Tensor:
    """Integers for the nearest points of the lattice E8, D8 and D8 + 1/2 (Conway and Sloane 1982), to 8 rows of a column each: at
    equal entropy their squared error is 14% below that of plain rounding, which the last, fewer than 8 rows get."""
    whole = x.size(-2) // 8 * 8
    x_8 = x[..., :whole, :].unflatten(-2, (whole // 8, 8))
    both = torch.stack((x_8, x_8 - 0.5))
    q = both.round()
    rest = both.sub_(q)
    worst, index = rest.abs().max(
        -2, keepdim=True
    )  # what to round the other way where the sum is odd, so not in D8
    odd = q.sum(-2, keepdim=True) % 2
    q.scatter_add_(-2, index, odd * torch.copysign(torch.ones_like(worst), rest.gather(-2, index)))
    whole_8, half_8 = rest.square_().sum(-2, keepdim=True) + odd * (
        1 - 2 * worst
    )  # squared distances
    half = half_8 < whole_8
    q = torch.where(half, q[1], q[0])
    q[..., :1, :] += (
        half.float() - q[..., 1:, :].sum(-2, keepdim=True) % 2
    )  # the others tell its parity; it tells `half`
    return torch.cat((q.flatten(-3, -2), x[..., whole:, :].round()), dim=-2)


def from_codes(codes: Tensor) -> Tensor:
    """The points of these codes, in their place."""
    whole = codes.size(-2) // 8 * 8
    q = codes[..., :whole, :].unflatten(-2, (whole // 8, 8))
    half = q[..., :1, :] % 2
    q[..., :1, :] += q[..., 1:, :].sum(-2, keepdim=True) % 2 - half
    q += half / 2
    return codes


def gptq(exact: Tensor, hessian: Tensor) -> Tensor:
    """Codes column by column, largest inputs first; later columns make up for the error of earlier ones on inputs x with
    sum x x^T = hessian (Frantar et al. 2022: damping of 1%, Cholesky factor of the inverse, blocks of columns). Of a stack."""
    order = hessian.diagonal(dim1=1, dim2=2).argsort(descending=True)
    H = hessian.take_along_dim(order[:, None], 2).take_along_dim(order[..., None], 1).double()
    H.diagonal(dim1=1, dim2=2).add_(0.01 * H.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-10)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).to(
        exact.dtype
    )
    W, codes = exact.take_along_dim(order[:, None], 2), torch.empty_like(exact)
    for start in range(0, W.size(2), 32):
        stop = min(start + 32, W.size(2))
        errors = torch.empty_like(W[..., start:stop])
        for i in range(start, stop):
            column = W[..., i : i + 1].clamp(-LARGEST, LARGEST)
            codes[..., i : i + 1] = to_codes(column)
            errors[..., i - start : i - start + 1] = error = (
                column - from_codes(codes[..., i : i + 1].clone())
            ) / U[:, i : i + 1, i : i + 1]
            W[..., i + 1 : stop].baddbmm_(error, U[:, i : i + 1, i + 1 : stop], alpha=-1)
        W[..., stop:].baddbmm_(errors, U[:, start:stop, stop:], alpha=-1)
    return codes.take_along_dim(order.argsort()[:, None], 2)


def quantized(
    state: Tensors, roles: Roles, step: float, hessians: Mapping = {}
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """In stacks of one role and shape: names of matrices, codes and scales; the codes' points times a scale are about the weights.
    A scale is `step` times its matrix's RMS over FINER[role], or what its largest entry needs where that is coarser."""
    stacks: dict[tuple, list[str]] = {}
    for name, weight in state.items():
        if roles[name] in FINER:
            stacks.setdefault((roles[name], weight.shape, name in hessians), []).append(name)
    for (role, _, calibrated), names in stacks.items():
        rows = torch.stack([state[name].flatten(0, -2) for name in names])
        rms = (
            torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True, dtype=torch.float64)
            / rows[0].numel() ** 0.5
        )
        scale = torch.maximum(
            (rms * (step / FINER[role])).float(),
            rows.abs().amax(dim=(1, 2), keepdim=True) / LARGEST,
        )
        exact = rows.div_(scale.clamp_min_(torch.finfo(torch.float32).tiny)).nan_to_num_()
        yield (
            names,
            gptq(exact, torch.stack([hessians[name] for name in names]))
            if calibrated
            else to_codes(exact),
            scale,
        )


@contextlib.contextmanager
def rounded_weights(model: GPT, roles: Roles, step: float | None) -> Iterator[None]:
    """Inside, matrices lie on the export's grid of this step (None: as they are); gradients are taken there (late QAT)."""
    named = model.named_parameters() if step is not None else ()
    masters = {name: (p.detach(), p.detach().clone()) for name, p in named if roles[name] in FINER}
    try:
        for names, codes, scale in quantized(
            {name: master for name, (_, master) in masters.items()}, roles, step
        ):
            for name, rounded in zip(names, from_codes(codes).mul_(scale)):
                masters[name][0].view(rounded.shape).copy_(rounded)
        yield
    finally:
        for p, master in masters.values():
            p.copy_(master)


def integer_bytes(codes: Tensor) -> bytes:
    """n, chosen by their spread; the integers over 2^n, plus 128, a byte each; their n lower bits, a plane each; where a byte is 0,
    what it could not hold, as int16."""
    n = max(0, int(1.25 * codes.abs().mean()).bit_length() - 4)
    integers = codes.flatten().int().numpy()
    upper, planes = (integers >> n) + 128, [np.packbits(integers >> bit & 1) for bit in range(n)]
    far = (upper < 1) | (upper > 255)
    return b"".join(
        [bytes([n]), np.where(far, 0, upper).astype(np.uint8), *planes, upper[far].astype("<i2")]
    )


def read_integers(raw: bytes, count: int) -> Tensor:
    """The inverse of integer_bytes: a flat float32 tensor."""
    n, plane = raw[0], -(-count // 8)
    upper = np.frombuffer(raw, np.uint8, count, offset=1).astype(np.float32)
    far = np.frombuffer(raw, "<i2", offset=1 + count + n * plane)
    expect(n <= 12 and len(far) == (upper == 0).sum(), "a payload has not the size of its tensor")
    upper[upper == 0] = far
    upper -= 128
    for bit in reversed(range(n)):
        upper *= 2
        upper += np.unpackbits(
            np.frombuffer(raw, np.uint8, plane, offset=1 + count + bit * plane), count=count
        )
    return torch.from_numpy(upper)


def compress(raw: bytes, codec: str, repeats: bool = False) -> bytes:
    """Deflate or zstd. Rounded weights hold no repeats: a search for them costs bytes over Huffman's code alone."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=19 if repeats else 1).compress(raw)
    deflate = zlib.compressobj(
        9,
        zlib.DEFLATED,
        zlib.MAX_WBITS,
        9,
        zlib.Z_DEFAULT_STRATEGY if repeats else zlib.Z_HUFFMAN_ONLY,
    )
    return deflate.compress(raw) + deflate.flush()


def expect(true: object, otherwise: str) -> None:
    """ValueError, saying what is otherwise, unless true."""
    if not true:
        raise ValueError(otherwise)


def inflate(packed: memoryview, codec: str, most: int) -> bytes:
    """The inverse of compress for up to `most` bytes; no more are ever inflated. Raises anything for damage."""
    if codec == "zstd":
        expect(
            0 <= zstandard.frame_content_size(packed) <= most,
            "a payload holds more than its tensors",
        )
        raw = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    else:
        deflate = zlib.decompressobj()
        raw = deflate.decompress(packed, most + 1)
        expect(deflate.eof and not deflate.unused_data, "a payload does not end where it should")
    expect(len(raw) <= most, "a payload holds more than its tensors")
    return raw


def layout(tensors: Tensors, roles: Roles) -> list[list]:
    """Name, role and shape of every tensor, as the header holds them."""
    return [[name, roles[name], list(tensor.shape)] for name, tensor in tensors.items()]


def write_payloads(
    state: Tensors, roles: Roles, step: float, codec: str, hessians: Mapping = {}
) -> list[bytes]:
    """Compressed: the codes of each matrix; last, all scales and scalars as float32: their lowest bytes, their next ones ..."""
    grids = {
        name: grid
        for names, *stacks in quantized(state, roles, step, hessians)
        for name, *grid in zip(names, *stacks)
    }
    floats = torch.cat(
        [(grids[name][1] if name in grids else weight).flatten() for name, weight in state.items()]
    )
    last = compress(floats.view(torch.uint8).view(-1, 4).T.numpy().tobytes(), codec, repeats=True)
    return [
        *(compress(integer_bytes(grids[name][0]), codec) for name in state if name in grids),
        last,
    ]


def read_payloads(
    packed: list[memoryview], codec: str, tensors: Tensors, roles: Roles
) -> dict[str, Tensor]:
    """The inverse of write_payloads, for the shapes of (meta) tensors."""
    sizes = [1 if roles[name] in FINER else p.numel() for name, p in tensors.items()]
    *parts, last = packed
    expect(
        len(parts) == sum(roles[name] in FINER for name in tensors),
        "it has not one payload for each matrix",
    )
    raw, state = inflate(last, codec, 4 * sum(sizes)), {}
    floats = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(4, -1).T.flatten()).view(
        torch.float32
    )
    for (name, p), part in zip(tensors.items(), floats.split(sizes)):
        if roles[name] in FINER:
            codes = read_integers(inflate(parts.pop(0), codec, 99 + 3 * p.numel()), p.numel())
            part = from_codes(codes.view(-1, p.size(-1))).mul_(part)
        expect(all(map(math.isfinite, part.aminmax())), f"{name} holds a value that is no number")
        state[name] = part.view(p.shape)
    return state


def encode(
    state: Tensors, roles: Roles, settings: Hyperparameters, step: float, hessians: Mapping = {}
) -> bytes:
    """The artifact's bytes, a pure function of the arguments: weights, and the settings of the model and its evaluation."""
    payloads = write_payloads(state, roles, step, settings.compress_algo, hessians)
    facts = dict(
        settings={name: getattr(settings, name) for name in STORED},
        tensors=layout(state, roles),
        ends=np.cumsum([0, *map(len, payloads)]).tolist(),
    )
    header = json.dumps(facts, separators=(",", ":")).encode()
    body = b"".join([len(header).to_bytes(4, "little"), header, *payloads])
    return MAGIC + hashlib.sha256(body).digest() + body


def unpack(blob: bytes) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse of encode, weights in float32. UserError for anything else, before a byte is inflated that has no place."""
    try:
        magic, digest, body = blob[:8], blob[8:40], memoryview(blob)[40:]
        expect(magic == MAGIC, "wrong magic or another version")
        expect(hashlib.sha256(body).digest() == digest, "checksum mismatch")
        end = 4 + int.from_bytes(body[:4], "little")
        expect(
            end <= min(len(body), LONGEST_HEADER), "its header claims more bytes than it can have"
        )
        header = json.loads(bytes(body[4:end]))
        expect(header["settings"].keys() == {*STORED}, "its settings are not those of this program")
        stored = {
            name: parse(name.upper(), as_text(value)) for name, value in header["settings"].items()
        }
        settings = Hyperparameters(**stored, mode="eval")
        check(settings, {})
        expect(
            settings.num_layers <= len(header["tensors"]),
            "its tensors are not those of its settings",
        )
        with torch.device("meta"):  # names and shapes, no memory
            model, payloads, ends = (
                GPT(dataclasses.replace(settings, use_fa3=False)),
                body[end:],
                header["ends"],
            )
        tensors, roles = dict(model.named_parameters()), parameter_roles(model)
        expect(
            header["tensors"] == layout(tensors, roles), "its tensors are not those of its settings"
        )
        expect(
            ends == sorted(ends) and ends[0] == 0 and ends[-1] == len(payloads),
            "its payloads do not lie side by side",
        )
        packed = [payloads[start:stop] for start, stop in zip(ends, ends[1:])]
        return stored, read_payloads(packed, settings.compress_algo, tensors, roles)
    except UserError as error:
        raise UserError(
            f"was made for settings that this program refuses ({ascii(str(error))[:300]})"
        ) from None
    except (
        Exception
    ) as error:  # whatever a hostile file can provoke in json, struct, zlib or zstandard
        raise UserError(
            f"is no artifact of this program, or a damaged one ({ascii(str(error))[:300]})"
        ) from None


def read_artifact(
    variable: str, name: str, limit: float, world: World
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """`unpack` of a file on rank 0's disk; UserError, naming the variable, also where it is missing or above `limit` bytes."""
    path = Path(name)
    try:
        if world.rank == 0 and path.exists() and not path.is_file():
            raise UserError("must name an artifact to read, a regular file")
        if world.rank == 0 and path.stat().st_size > limit:
            raise UserError(
                f"has {path.stat().st_size} bytes, more than SIZE_LIMIT_BYTES={limit}; raise that if it is meant"
            )
        return unpack(world.agree(path.read_bytes() if world.rank == 0 else b""))
    except (OSError, UserError) as error:
        fault = (
            f"must name an artifact to read ({error.strerror})"
            if isinstance(error, OSError)
            else error
        )
        raise UserError(f"{variable}={name}: {fault}") from None


def fit(size: Callable[[float], float], limit: float) -> float:
    """The finest step with size(step) <= limit, to 0.1% of it; COARSEST if nothing fits. Bytes are almost linear in the step's
    logarithm, so by false position; every third try halves the bracket instead, should they not be."""
    low, high, over, under = FINEST, COARSEST, size(FINEST) - limit, limit - size(COARSEST)
    for tries in range(1, 31):
        if over <= 0 or under <= 0.001 * limit:
            break
        found = (
            size(middle := low * (high / low) ** (over / (over + under) if tries % 3 else 0.5))
            - limit
        )
        low, over, high, under = (
            (middle, found, high, under) if found > 0 else (low, over, middle, -found)
        )
    return low if over <= 0 else high


def pack(
    state: Tensors, roles: Roles, settings: Hyperparameters, limit: int, hessians: Mapping = {}
) -> tuple[bytes, float]:
    """The finest artifact within `limit` bytes, and its step. Deterministic: the same weights give the same bytes."""
    state, room = {name: weight.detach().float().cpu() for name, weight in state.items()}, limit
    while True:
        step = fit(lambda step: len(encode(state, roles, settings, step)), room)
        blob = encode(state, roles, settings, step, hessians)
        if len(blob) <= limit or not hessians or step == COARSEST:
            return blob, step
        room -= len(blob) - limit + limit // 2000  # gptq's codes are a little wider spread


def build_model(settings: Hyperparameters, world: World, state: Tensors | None = None) -> GPT:
    """The model on the world's device, with given weights, or with the seed's."""
    torch.manual_seed(settings.seed)
    model = GPT(settings, world.compute_dtype(settings)).to(world.device)
    if state is not None:
        model.load_state_dict(state)
    return model


def adopt(
    model: GPT, stored: Mapping[str, object], weights: Tensors, settings: Hyperparameters
) -> str:
    """Start a model from an artifact's trunk, and from its head where that is of the same type and size; says which."""
    shapes, own = (
        {name: tensor.shape for name, tensor in tensors}
        for tensors in (weights.items(), model.named_parameters())
    )
    same = (
        shapes == own
        and all(stored[name] == getattr(settings, name) for name in ("head_type", "head_variant"))
        and (settings.head_untie_frac == 0)
    )  # a head that still follows the embedding starts from it
    model.load_state_dict(
        {name: w for name, w in weights.items() if same or not name.startswith("head.")},
        strict=same,
    )
    if not same:
        model.head.copy_embedding(model.tok_emb.weight)
    return "trunk and head" if same else "trunk"


# ---- Log and files: everything of a run lies in runs/<RUN_ID>/ ------------------------------------------------------
source = functools.cache(
    Path(__file__).read_bytes
)  # this script's own bytes: they count against the size limit


class RunLog:
    """train.log and metrics.jsonl of one run, and the console. Silent where the folder is None (ranks above 0)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def append(self, name: str, line: str) -> None:
        if self.folder is not None:
            with (
                writing(self.folder / name),
                open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as out,
            ):
                out.write(line + "\n")

    def write(self, line: str, console: bool = True, **metrics: object) -> None:
        """One log line; `metrics`, where given, become one JSON object."""
        if console and self.folder is not None:
            with contextlib.suppress(
                OSError, UnicodeError
            ):  # the console may be gone; the log is not
                print(line, flush=True)
        self.append("train.log", line)
        if metrics:
            self.append("metrics.jsonl", json.dumps(metrics))

    def sizes(self) -> dict[str, int]:
        """Bytes of both files, where they exist, as a checkpoint remembers them."""
        return {
            name: path.stat().st_size
            for name in ("train.log", "metrics.jsonl")
            for path in self.folder.glob(name)
        }

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Forget what was written after the checkpoint; with no sizes, everything."""
        for name, size in self.sizes().items() if self.folder else ():
            os.truncate(self.folder / name, min(sizes.get(name, 0), size))

    def check_finite(self, loss: float, step: int) -> float:
        """The loss; UserError where it is no number."""
        if not math.isfinite(loss):
            good = (
                saved if (saved := Path(self.folder or "") / "checkpoint.pt").exists() else "none"
            )
            raise UserError(
                f"step {step}: the loss is {loss}; lower the learning rates; the last good checkpoint: {good}"
            )
        return loss

    def step(
        self, step: int, loss: float, seconds: float, scale: float, s: Hyperparameters
    ) -> None:
        speed = step * s.train_batch_tokens / seconds
        left = min(
            (s.iterations - step) * seconds / step, (s.max_wallclock_seconds or math.inf) - seconds
        )
        self.write(
            f"step:{step}/{s.iterations} train_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms"
            f" step_avg:{1000 * seconds / step:.2f}ms lr_scale:{scale:.3f} tokens/s:{speed:.0f} eta:{max(left, 0.0):.0f}s",
            kind="train",
            step=step,
            train_loss=loss,
            train_seconds=seconds,
            lr_scale=scale,
            tokens_per_second=speed,
        )

    def opening(
        self, settings: Hyperparameters, world: World, data: str, facts: Mapping[str, str]
    ) -> None:
        """Versions, hashes, machine, data and every resolved setting: all that is needed to run it again."""
        self.write(
            f"python {sys.version.split()[0]} numpy {np.__version__} sentencepiece {sentencepiece.__version__} "
            + " ".join(f"{name}:{value}" for name, value in facts.items())
            + f"\nhardware: {world.hardware()}; compute dtype {world.compute_dtype(settings)}"
        )
        self.write(
            "\n".join(f"{name}={text}" for name, text in variables(settings).items()), console=False
        )
        unused = "\nno CUDA: USE_FA3, FLASH_ATTN_* and SKIP_COMPILE=0 are accepted and unused"
        self.write(data + (unused if world.device.type == "cpu" else ""))


def command(settings: Hyperparameters, world: World) -> str:
    """The shell command that starts this run again."""
    default = variables(Hyperparameters(**PRESETS[settings.preset])) | {
        "PRESET": ""
    }  # so that it is always said
    changed = " ".join(
        f"{name}={shlex.quote(text)}"
        for name, text in variables(settings).items()
        if text != default[name]
    )
    nodes = world.size // world.local_size
    meeting = "--standalone" if nodes == 1 else f"--nnodes={nodes} [your rendezvous options]"
    program = (
        "python" if world.size == 1 else f"torchrun {meeting} --nproc_per_node={world.local_size}"
    )
    return f"{changed} {program} {shlex.quote(sys.argv[0])}"


def claim_run(
    settings: Hyperparameters, facts: Mapping[str, str]
) -> tuple[dict | None, dict | None]:
    """Make the run's folder ours until this process ends; the result of a finished run of this name, or the checkpoint of an
    interrupted one. UserError where that is damaged, in progress, or of other settings or `facts`, or where the disk is full."""
    import fcntl

    run, folder = f"RUN_ID={settings.run_id}", Path("runs") / settings.run_id
    with torch.device("meta"):  # no memory
        needed = 50 * sum(
            p.numel() for p in GPT(settings).parameters()
        )  # two checkpoints and the artifact
    with writing(folder):
        new = not any((folder / file).exists() for file in ("submission.json", "checkpoint.pt"))
        if (
            new
            and shutil.disk_usage(
                next(path for path in (folder, *folder.parents) if path.exists())
            ).free
            < needed
        ):
            raise UserError(
                f"{folder}: has less than {needed} bytes free; free the disk or use another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(
            folder / ".lock", os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o666
        )  # until the process ends, however
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{run}: that run is in progress; wait for it or choose another name"
        ) from None
    for stale in folder.glob(".*.part"):  # of a run that was killed while it wrote
        stale.unlink()
    result, state, theirs, same = None, None, {}, True
    try:
        if (folder / "submission.json").is_file():
            result = json.loads((folder / "submission.json").read_text())
            theirs, same = (
                result["settings"],
                all(result.get(n) == facts.get(n) for n in ("data_sha256", "init_sha256")),
            )
            expect(
                "seed" in theirs and math.isfinite(result["val_bpb"] + result["bytes_total"]),
                "no result",
            )
        elif (folder / "checkpoint.pt").is_file():
            expect(not zipfile.ZipFile(folder / "checkpoint.pt").testzip(), "checksum mismatch")
            state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            theirs, same = state["settings"], state["facts"] == facts
        other = {
            name.upper(): as_text(theirs[name])
            for name, value in vars(settings).items()
            if theirs.get(name, value) != value
        }
    except Exception as error:  # whatever a damaged file can provoke
        raise UserError(
            f"{folder}: holds a damaged submission.json or checkpoint.pt, delete it ({type(error).__name__})"
        ) from None
    for field, value in other.items():
        raise UserError(
            f"{field}={variables(settings)[field]}: {run} is a run with {field}={value}; choose another RUN_ID"
        )
    if not same:
        raise UserError(
            f"{run}: was run on other data, or with another INIT_FROM, source or torch; choose another RUN_ID"
        )
    return result, state


# ---- Train: the loop, and the bench that times its step -------------------------------------------------------------
class Clock:
    """Seconds between `start` and `stop`, added up; the device is waited for at both."""

    def __init__(self, world: World, seconds: float = 0.0) -> None:
        self.world, self.banked, self.started = world, seconds, None

    def seconds(self) -> float:
        return self.banked + (0.0 if self.started is None else time.perf_counter() - self.started)

    def start(self) -> Clock:
        torch.get_device_module(self.world.device).synchronize()
        self.started = time.perf_counter()
        return self

    def stop(self) -> float:
        torch.get_device_module(self.world.device).synchronize()
        self.banked, self.started = self.seconds(), None
        return self.banked


class Trainer:
    """A model, its optimizers, average, step count and clock: all that changes in training and a checkpoint holds."""

    def __init__(
        self, model: GPT, settings: Hyperparameters, world: World, facts: Mapping[str, str] = {}
    ) -> None:
        self.model, self.settings, self.world, self.facts = (
            model,
            settings,
            world,
            facts,
        )  # facts: hashes of source and data
        self.roles, self.parameters = parameter_roles(model), list(model.parameters())
        self.loss = world.compiled(model, settings)
        self.optimizers = build_optimizers(model, settings, world)
        self.average = [p.detach().clone() for p in self.parameters] if settings.use_ema else []
        self.steps, self.clock, self.schedule = (
            0,
            Clock(world),
            settings,
        )  # schedule: less a reserve for calibration
        self.grid, self.validated, self.whole = (
            None,
            -1,
            True,
        )  # step of late QAT; last validated; False while a step is applied

    def step(
        self, batches: list[tuple[Tensor, Tensor]], scale: float, tied: bool = False
    ) -> Tensor:
        """Train on this rank's share of a batch; all ranks' mean loss. `tied`: the head's copy of the embedding still follows it."""
        s, total, E, head = (
            self.settings,
            torch.zeros((), device=self.world.device),
            self.model.tok_emb.weight,
            self.model.head,
        )
        with rounded_weights(self.model, self.roles, self.grid):
            for x_BT, y_BT in batches:
                self.world.heed_together()
                loss = self.loss(x_BT, y_BT) / len(batches)
                loss.backward()
                total += loss.detach()
        if self.steps == 0 and (
            missing := [
                n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None
            ]
        ):
            raise RuntimeError(f"no gradient reached {', '.join(missing)}: it would never train")
        if tied:
            E.grad.add_(head.D_VD.grad)
            head.D_VD.grad = None
        self.world.average([p.grad for p in self.parameters if p.grad is not None] + [total])
        if s.grad_clip_norm:  # a norm of inf or nan makes the loss nan, so that it is noticed without waiting for it here
            total += 0 * torch.nn.utils.clip_grad_norm_(self.parameters, s.grad_clip_norm)
        self.whole = False
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum_at(self.steps, s)
            optimizer.step()
            optimizer.zero_grad()
        if tied:
            head.copy_embedding(E)
        if s.use_ema:  # short runs do not average their initial weights
            decay = min(s.ema_alpha, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.steps, self.whole = self.steps + 1, True
        return total

    def exported(self) -> dict[str, Tensor]:
        """The weights that the artifact will hold: the average, or the last ones."""
        return dict(zip(self.roles, self.average or [p.detach() for p in self.parameters]))

    def hessians(self, shards: Shards) -> dict[str, Tensor]:
        """For gptq, from at least 65,536 training tokens: sums of x x^T over all inputs x of each Linear and of the embedding that
        makes logits, by the name of its weight, in the model that will be exported."""
        self.world.wait_at_most(PATIENT)
        model, sums = build_model(self.settings, self.world, self.exported()), {}
        names = {
            module: f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, Linear)
        }
        names[model.head] = "tok_emb.weight" if model.head.products_with_E else "head.D_VD"

        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name := names.get(module):
                x_ND = inputs[0].flatten(0, -2).float()
                sums[name] = (
                    torch.addmm(sums[name], x_ND.T, x_ND) if name in sums else x_ND.T @ x_ND
                )

        with torch.no_grad(), nn.modules.module.register_module_forward_pre_hook(add):
            for index in range(-(-65536 // self.settings.train_batch_tokens)):
                for x_BT, _ in train_batch(shards, index, self.settings, self.world):
                    add(model.head, (model.hidden(x_BT),))
        return {name: self.world.sum(total).cpu() for name, total in sums.items()}

    def begin(self, shards: Shards, state: Mapping[str, object] | None, log: RunLog) -> None:
        """The start, or a checkpoint's state; then WARMUP_STEPS steps that prime compiled code and caches, and are undone."""
        if state is None:
            trained = sum(p.numel() for p in self.parameters if p.requires_grad)
            log.write(
                f"model_params:{sum(p.numel() for p in self.parameters)}\ntrained_params:{trained}"
            )
        else:
            self.restore(state)
            log.write(f"resumed at step {self.steps}")
        before = copy.deepcopy(self.state())
        try:
            for index in range(min(self.settings.warmup_steps, self.settings.iterations)):
                self.step(train_batch(shards, index, self.settings, self.world), 1.0)
        finally:
            self.restore(before)
        if self.settings.quant == "gptq" and self.settings.max_wallclock_seconds:
            self.reserve(shards, log)

    def reserve(self, shards: Shards, log: RunLog) -> None:
        """Keep free of the time cap what gptq's calibration takes, measured; UserError where that is more than half."""
        cap = self.settings.max_wallclock_seconds
        clock = Clock(self.world).start()
        self.hessians(shards)
        seconds = self.world.agree(clock.stop())  # the first time is the slowest
        if seconds > cap / 2:
            raise UserError(
                f"MAX_WALLCLOCK_SECONDS={cap}: QUANT=gptq needs {seconds:.1f} s of it; raise it, or set QUANT=plain"
            )
        self.schedule = dataclasses.replace(self.settings, max_wallclock_seconds=cap - seconds)
        log.write(
            f"gptq: {seconds:.2f} s of MAX_WALLCLOCK_SECONDS are reserved for its calibration"
        )

    def state(self) -> dict[str, object]:
        """What a checkpoint holds, beside the settings and the log's sizes."""
        return dict(
            facts=dict(self.facts),
            steps=self.steps,
            seconds=self.clock.seconds(),
            grid=self.grid,
            validated=self.validated,
            average=self.average,
            parameters=[p.detach() for p in self.parameters],
            optimizers=[o.state_dict() for o in self.optimizers],
        )

    @torch.no_grad()
    def restore(self, state: Mapping[str, object]) -> None:
        self.steps, self.grid, self.validated, self.whole = (
            state["steps"],
            state["grid"],
            state["validated"],
            True,
        )
        self.clock = Clock(self.world, state["seconds"])
        torch._foreach_copy_(
            [*self.parameters, *self.average], [*state["parameters"], *state["average"]]
        )
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def save(self, log: RunLog) -> None:
        """Write checkpoint.pt (rank 0; all ranks hold the same state), unless the state is broken: the one before stays."""
        if (
            log.folder is not None
            and self.whole
            and all(p.isfinite().all() for p in self.parameters)
        ):
            buffer = io.BytesIO()
            torch.save(
                dict(self.state(), settings=dataclasses.asdict(self.settings), sizes=log.sizes()),
                buffer,
            )
            write_whole(log.folder / "checkpoint.pt", buffer.getvalue())

    def validate(self, validation: Validation, seconds: float, log: RunLog) -> None:
        """Score the present weights, plainly, and log it; UserError where the loss is no number."""
        s, step, world = self.schedule, self.steps, self.world
        loss, bpb = evaluate(self.model, *validation, 0, s, world)
        log.write(
            f"step:{step}/{s.iterations} val_loss:{log.check_finite(loss, step):.4f} val_bpb:{bpb:.4f}"
            f" train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms",
            kind="val",
            step=step,
            val_loss=loss,
            val_bpb=bpb,
            train_seconds=seconds,
        )
        if step < s.iterations and progress(step, seconds, s) >= 1:
            log.write(
                f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{s.iterations}"
                + (" (the first step alone took longer than the cap)" if step == 1 else "")
            )
        self.validated = step

    def late_grid(self, log: RunLog) -> float:
        """The quantization step at which the present weights would fit the cap: what late QAT rounds to."""
        roles, codec, limit = (
            self.roles,
            self.settings.compress_algo,
            self.settings.size_limit_bytes - len(source()),
        )
        every = max(
            1, sum(p.numel() for p in self.parameters) // 2**21
        )  # so many rows tell the size well enough
        sample = {
            name: rows[torch.arange(0, len(rows), every)].cpu()
            for name, p in self.model.named_parameters()
            for rows in [p.detach().flatten(0, -2 if roles[name] in FINER else -1)]
        }
        grid = self.world.agree(
            fit(
                lambda step: every * sum(map(len, write_payloads(sample, roles, step, codec))),
                limit,
            )
        )
        log.write(f"late_qat: from step {self.steps}, quantization step {grid:.4g}")
        return grid


def later(value: Tensor) -> Callable[[], float]:
    """Starts to copy a scalar to the host; the call waits for that copy, not for the work queued behind it."""
    host, event = (
        value.to("cpu", non_blocking=True),
        torch.cuda.current_stream().record_event() if value.is_cuda else None,
    )
    return lambda: (event is None or event.synchronize(), host.item())[1]


def train(
    trainer: Trainer, shards: Shards, validation: Validation, log: RunLog
) -> dict[str, Tensor]:
    """Train until ITERATIONS or the time cap; ends with a checkpoint. Returns gptq's Hessians, if it is to be used."""
    s, world, clock = trainer.schedule, trainer.world, trainer.clock.start()
    loss, value, saved = None, math.inf, clock.seconds()
    while True:
        step, seconds = trainer.steps, world.agree(clock.seconds())
        done = (share := progress(step, seconds, s)) >= 1
        if (
            done or s.val_loss_every and step % s.val_loss_every == 0
        ) and trainer.validated != step:
            trainer.validate(validation, clock.stop(), log)
            clock.start()
        if done:
            break
        if 0 < s.checkpoint_seconds <= seconds - saved:
            saved = clock.stop()
            trainer.save(log)
            clock.start()
        scale = learning_rate_scale(step, seconds, s)
        if s.late_qat and trainer.grid is None and scale < s.qat_threshold:
            trainer.grid = trainer.late_grid(log)
        tied = share < s.head_untie_frac
        before, loss = loss, later(trainer.step(train_batch(shards, step, s, world), scale, tied))
        world.wait_at_most(PROMPT)
        if before is not None:  # waits for the step before: the host runs one step ahead, no more
            last, value = value, log.check_finite(before(), step)
            if value > last + 1:
                log.write(f"loss_spike: step:{step} train_loss:{last:.4f} -> {value:.4f}")
        if s.train_log_every and (trainer.steps <= 10 or trainer.steps % s.train_log_every == 0):
            log.step(
                trainer.steps, log.check_finite(loss(), trainer.steps), clock.seconds(), scale, s
            )
    hessians = trainer.hessians(shards) if s.quant == "gptq" else {}
    log.write(
        f"trained for {clock.stop():.2f} s" + (", gptq's calibration included" if hessians else "")
    )
    try:
        trainer.save(log)
    except UserError as error:  # a disk too full for a checkpoint may still hold the artifact
        log.write(f"no checkpoint: {error}")
    return hessians


def flops_per_token(model: GPT, s: Hyperparameters) -> float:
    """Forward and backward: 6 a weight of the blocks' matrices and of the head, 6 L D T for causal attention."""
    matrices = [
        name
        for name, role in parameter_roles(model).items()
        if re.match("blocks|head", name) and role != "scalar"
    ]
    weights = (
        sum(model.get_parameter(name).numel() for name in matrices)
        + model.head.products_with_E * s.vocab_size * s.model_dim
    )
    return 6 * weights + 6 * s.num_layers * s.model_dim * s.train_seq_len


def bench(s: Hyperparameters, world: World) -> int:
    """MODE=bench: time training steps of the tied head and of the chosen one, in turn, on random tokens; print medians."""
    tied = dataclasses.replace(
        s,
        head_type="tied",
        head_variant="",
        head_trainable=True,
        train_only="all",
        head_untie_frac=0.0,
    )
    trainers = [
        Trainer(build_model(choice, world), choice, world)
        for choice in ([tied] if s.head_type == "tied" else [tied, s])
    ]
    T, n = s.train_seq_len, s.train_batch_tokens
    tokens = torch.randint(s.vocab_size, (n // T // world.size, T + 1), device=world.device)
    batches = [
        (part[:, :-1], part[:, 1:]) for part in tokens.split(micro_batch_sequences(s, world))
    ]

    def measured(trainer: Trainer) -> float:
        clock = Clock(world).start()
        trainer.step(batches, 1.0)
        return clock.stop()

    medians = np.median(
        [[measured(trainer) for trainer in trainers] for _ in range(13)][3:], axis=0
    ).tolist()
    for trainer, seconds in zip(trainers, medians):
        flops = flops_per_token(trainer.model, trainer.settings)
        rate = flops * n / seconds / world.size
        share = f"{rate / 989e12:.1%}" if re.search("H[12]00", world.hardware()) else "unknown peak"
        print(
            f"bench head:{trainer.settings.head_type} {1000 * seconds:.1f} ms/step (median of 10; {n} tokens, sequence {T})"
            f" tokens/s:{n / seconds:.0f} FLOP/token:{flops / 1e6:.1f}M TFLOP/s/rank:{rate / 1e12:.3f} MFU:{share}"
            f" time to tied:{seconds / medians[0]:.3f}"
        )
    print(
        f"{world.hardware()}, {world.compute_dtype(s)}, torch {torch.__version__}; {world.peak_memory()}"
    )
    return 0


# ---- Table: compare finished runs -----------------------------------------------------------------------------------
NOT_COMPARED = (
    "seed",
    "run_id",
    "author",
    "github_id",
    "allow_near_misses",
    "mode",
    "checkpoint_seconds",
    "runs",
)


def welch(a: list[float], b: list[float]) -> tuple[float, float]:
    """Welch's t of mean(a) - mean(b), and its two-sided p (Welch 1947). Needs two values in each, not all equal."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = (np.mean(a) - np.mean(b)) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    angle = np.linspace(
        0, math.pi / 2, 200_001
    )  # with t = sqrt(freedom) tan(angle), Student's density is a power of cos
    density = np.cos(angle).clip(0) ** (freedom - 1)
    return float(t), float(
        density[angle >= math.atan(abs(t) / math.sqrt(freedom))].sum() / density.sum()
    )


def read_results(pattern: str) -> tuple[list[dict], list[str]]:
    """The results of finished runs, and a line about each folder that holds none and each difference in circumstances."""
    results, remarks = [], []
    for folder in sorted(filter(Path.is_dir, map(Path, glob.glob(pattern)))):
        if not (folder / "submission.json").is_file():
            remarks.append(f"{folder}: not finished")
            continue
        try:
            result = json.loads((folder / "submission.json").read_text())
            key = {
                name: value
                for name, value in result["settings"].items()
                if name not in NOT_COMPARED
            }
            ms, bpb = (
                1000 * result["wallclock_seconds"] / max(result["step_stop"], 1),
                float(result["val_bpb"]),
            )
            over, seed, head = (
                result["bytes_total"] > key["size_limit_bytes"],
                int(result["seed"]),
                str(result["head"]),
            )
            expect(math.isfinite(bpb + ms + result["step_stop"]), "a figure is no number")
            results.append(
                dict(
                    result,
                    val_bpb=bpb,
                    seed=seed,
                    head=head,
                    folder=folder,
                    key=key,
                    ms=ms,
                    over=over,
                )
            )
        except Exception as error:  # whatever a damaged file can provoke
            remarks.append(
                f"{folder}: its submission.json cannot be read ({type(error).__name__}: {error})"
            )
    for name in ("source_sha256", "data_sha256", "hardware", "pytorch_version"):
        values = sorted({str(result.get(name)) for result in results})
        remarks += (
            [f"the runs differ in {name}: {', '.join(value[:40] for value in values)}"]
            if len(values) > 1
            else []
        )
    return results, remarks


def against_tied(runs: list[dict], groups: list[list[dict]]) -> str:
    """The difference of the mean bpb to that of the tied runs whose settings are the most alike, with Welch's t and p."""
    tied = [group for group in groups if group[0]["head"] == "tied"]
    alike = max(
        tied,
        default=runs,
        key=lambda group: sum(
            group[0]["key"].get(n) == value for n, value in runs[0]["key"].items()
        ),
    )
    if alike is runs:
        return "-"
    ours, theirs = ([run["val_bpb"] for run in group] for group in (runs, alike))
    tested = min(len(ours), len(theirs)) > 1 and len({*ours}) + len({*theirs}) > 2
    return f"{np.mean(ours) - np.mean(theirs):+.5f}" + (
        " (t {:.2f}, p {:.2g})".format(*welch(ours, theirs)) if tested else ""
    )


def run_table(settings: Hyperparameters, world: World) -> int:
    """MODE=table: one Markdown row for each configuration, its seeds against those of `tied`; learning curves as a PNG."""
    results, remarks = read_results(settings.runs)
    if not results:
        raise UserError("; ".join([f"RUNS={settings.runs}: matches no finished run", *remarks[:3]]))
    keys = [result["key"] for result in results]
    groups = [
        [result for result in results if result["key"] == key]
        for i, key in enumerate(keys)
        if key not in keys[:i]
    ]
    differing = [
        n
        for n in dict.fromkeys(n for key in keys for n in key)
        if any(key.get(n) != keys[0].get(n) for key in keys)
    ]
    columns = (
        "head",
        "settings that differ",
        "seeds",
        "val_bpb mean +- std",
        "against tied (Welch)",
        "bytes",
        "ms/step",
        "steps",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * 8 + "|"]
    for runs in groups:
        bpb, size, ms, steps = (
            [run[name] for run in runs] for name in ("val_bpb", "bytes_total", "ms", "step_stop")
        )
        differs = " ".join(
            f"{n.upper()}={as_text(runs[0]['key'].get(n))}" for n in differing if n != "head_type"
        )
        seeds, over = (
            " ".join(str(run["seed"]) for run in runs),
            " OVER" if any(run["over"] for run in runs) else "",
        )
        if len({run["seed"] for run in runs}) < len(runs):
            remarks.append(
                f"{runs[0]['folder']}: another run has its settings and its seed; Welch's test takes them for independent"
            )
        spread = f" +- {np.std(bpb, ddof=1):.5f}" if len(runs) > 1 else ""
        lines.append(
            f"| {runs[0]['head']} | {differs} | {seeds} | {np.mean(bpb):.5f}{spread}"
            f" | {against_tied(runs, groups)} | {max(size)}{over} | {np.mean(ms):.1f} | {np.mean(steps):.0f} |"
        )
    print("\n".join([*lines, "", *remarks]))
    try:
        print(draw_curves(results) if world.rank == 0 else "")
    except (
        Exception
    ) as error:  # no matplotlib, no right to write, whatever a strange folder provokes
        print("no learning curves:", " ".join(str(error).split())[:200])
    return 0


def draw_curves(results: list[dict]) -> str:
    """Draw the training losses of all runs beside their folders; a line that says where. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure, picture, path = (
        Figure(figsize=(9, 6)),
        io.BytesIO(),
        results[0]["folder"].parent / "learning_curves.png",
    )
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="training loss (nats a token)")
    for result in (result for result in results if (result["folder"] / "metrics.jsonl").is_file()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            records = map(json.loads, (result["folder"] / "metrics.jsonl").read_text().splitlines())
            points = [
                (record["train_seconds"], record["train_loss"])
                for record in records
                if record["kind"] == "train"
            ]
            axes.plot(*zip(*points), label=result["folder"].name.replace("$", r"\$"))
    axes.legend(handles=axes.lines, fontsize=7)
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())
    return f"learning curves: {path}"


# ---- Main -----------------------------------------------------------------------------------------------------------
def load_validation(settings: Hyperparameters, world: World) -> Validation:
    """Open and check the split that is scored, and the tokenizer; UserError where either is wrong."""
    shards = Shards(Path(settings.data_path), settings.eval_split, settings.vocab_size)
    if len(shards) <= settings.train_seq_len:
        raise UserError(
            f"TRAIN_SEQ_LEN={settings.train_seq_len}: the {settings.eval_split} split has only {len(shards)} tokens"
        )
    byte_counts = load_byte_counts(Path(settings.tokenizer_path), settings.vocab_size, world.device)
    tokens_N = torch.from_numpy(shards.take(0, len(shards))).to(world.device)
    if not byte_counts(tokens_N[:-1], tokens_N[1:]).any():
        raise UserError(
            f"DATA_PATH={settings.data_path}: the {settings.eval_split} split holds no text, only control tokens"
        )
    return tokens_N, byte_counts


def score(
    weights: Mapping[str, Tensor], validation: Validation, s: Hyperparameters, world: World
) -> tuple[GPT, float, float, float]:
    """A fresh model with these weights; its loss, bits per byte and seconds of evaluation at EVAL_STRIDE."""
    model, clock = build_model(s, world, weights), Clock(world).start()
    return model, *evaluate(model, *validation, s.eval_stride, s, world), clock.stop()


def final_lines(codec: str, loss: float, bpb: float, seconds: float) -> str:
    """The two lines that the ecosystem's tools look for."""
    return (
        f"final_int8_{codec}_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms\n"
        f"final_int8_{codec}_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}"
    )


def run_eval(settings: Hyperparameters, world: World) -> int:
    """MODE=eval: score an artifact; the architecture and, unless given, the evaluation's settings are its own."""
    stored, weights = read_artifact("ARTIFACT", settings.artifact, settings.size_limit_bytes, world)
    settings = prepare_demo(from_env(defaults=stored), world)
    validation = load_validation(settings, world)
    model, *figures = score(weights, validation, settings, world)
    print(final_lines(str(stored["compress_algo"]), *figures))
    if settings.eval_spectrum:
        found = spectrum(model, validation[0], settings, world)
        print("spectrum " + " ".join(f"{name}:{value:.6g}" for name, value in found.items()))
        log = RunLog(Path(settings.artifact).parent if world.rank == 0 else None)
        log.append(
            "metrics.jsonl", json.dumps(dict(kind="spectrum", split=settings.eval_split, **found))
        )
    return 0


def run_train(settings: Hyperparameters, world: World) -> int:
    """MODE=train: claim the folder, resume or start, train, finish. Exit code 0, 3 above the size limit, 128 + signal."""
    start = None
    if settings.init_from:
        start = read_artifact("INIT_FROM", settings.init_from, settings.size_limit_bytes, world)
        settings = from_env(
            defaults={
                n: v
                for n, v in start[0].items()
                if SCOPES[n] == "model" and not n.startswith("head_")
            }
        )
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}-{settings.head_type}-{settings.seed}"
    settings = dataclasses.replace(
        prepare_demo(settings, world), run_id=settings.run_id or world.agree(stamp)
    )
    micro_batch_sequences(settings, world)
    shards, validation = (
        Shards(Path(settings.data_path), "train", settings.vocab_size),
        load_validation(settings, world),
    )
    facts = dict(
        source_sha256=hashlib.sha256(source()).hexdigest(),
        data_sha256=shards.fingerprint(validation[0]),
        pytorch_version=str(torch.__version__),
    )
    facts |= (
        dict(
            init_sha256=hashlib.sha256(
                b"".join(w.numpy().tobytes() for w in start[1].values())
            ).hexdigest()
        )
        if start
        else {}
    )
    log = RunLog(Path("runs") / settings.run_id if world.rank == 0 else None)
    result, state = world.agree(claim_run(settings, facts) if world.rank == 0 else None)
    if result is None:
        log.rewind(state["sizes"] if state else {})
        if state is None:
            log.opening(
                settings,
                world,
                f"data: {settings.data_path} train_tokens:{len(shards)} {settings.eval_split}_tokens:"
                f"{len(validation[0])} unigram_val_bpb:{shards.unigram_bpb(*validation):.4f}",
                facts,
            )
        model = build_model(settings, world)
        if start and state is None:
            log.write(f"init_from: {adopt(model, *start, settings)} of {settings.init_from}")
        trainer = Trainer(model, settings, world, facts)
        try:
            trainer.begin(shards, state, log)
            result = finish(trainer, train(trainer, shards, validation, log), validation, log)
        except (Interrupted, UserError) as stop:
            if trainer.steps or isinstance(
                stop, Interrupted
            ):  # a run that could not begin leaves nothing to resume
                trainer.save(log)
                log.write(
                    f"stopped at step {trainer.steps}; resume with: {command(settings, world)}"
                )
            raise
    else:
        print(
            f"runs/{settings.run_id} is finished: val_bpb:{result['val_bpb']:.8f} bytes_total:{result['bytes_total']}"
        )
    return 3 if result["bytes_total"] > settings.size_limit_bytes else 0


def export(
    trainer: Trainer, hessians: Mapping[str, Tensor], path: Path, log: RunLog
) -> dict[str, object]:
    """Write the artifact, log its quality and size; returns the sizes, measured from the files."""
    s, weights, roles, code = trainer.settings, trainer.exported(), trainer.roles, len(source())
    blob, step = pack(weights, roles, s, s.size_limit_bytes - code, hessians)
    write_whole(path, blob)
    packed, codec, unpacked = path.stat().st_size, s.compress_algo, unpack(blob)[1]
    for role, finer in ((role, finer) for role, finer in FINER.items() if role in roles.values()):
        part = {
            name: weight.float().cpu() for name, weight in weights.items() if roles[name] == role
        }
        exact, rounded = (
            torch.cat([tensors[name].flatten() for name in part]) for tensors in (part, unpacked)
        )
        sizes = " ".join(
            f"{codec} {sum(map(len, write_payloads(part, roles, step, codec))) / len(exact):.4f}"
            for codec in ("zlib", "zstd")
            if zstandard or codec == "zlib"
        )
        error = (rounded - exact).square().sum() / exact.square().sum().clamp_min(1e-30)
        log.write(
            f"quantized {role}: {len(exact)}, step {step / finer:.4g} RMS, error {error:.3g}, plain bytes each {sizes}"
        )
    total, limit = code + packed, s.size_limit_bytes
    over = "; over the cap, so this run exits with code 3" if total > limit else ""
    log.write(
        f"Code size: {code} bytes\nSerialized model int8+{codec}: {packed} bytes\n"
        f"Total submission size int8+{codec}: {total} bytes\nsize_limit: {limit} bytes headroom: {limit - total} bytes{over}"
    )
    return dict(bytes_total=total, bytes_code=code, bytes_model_int8_zlib=packed)


def finish(
    trainer: Trainer, hessians: Mapping[str, Tensor], validation: Validation, log: RunLog
) -> dict[str, object]:
    """Score the final weights, export, reload from disk, score again, write submission.json."""
    s, world, path = (
        trainer.settings,
        trainer.world,
        Path("runs") / trainer.settings.run_id / "final_model.int8.ptz",
    )
    log.write(world.peak_memory())
    _, pre_loss, pre_bpb, _ = score(trainer.exported(), validation, s, world)
    log.write(
        f"pre_quant val_loss:{log.check_finite(pre_loss, trainer.steps):.8f} val_bpb:{pre_bpb:.8f}"
    )
    world.wait_at_most(PATIENT)  # rank 0 packs alone
    sizes = world.agree(export(trainer, hessians, path, log) if world.rank == 0 else None)
    _, loss, bpb, eval_seconds = score(
        read_artifact("ARTIFACT", str(path), math.inf, world)[1], validation, s, world
    )
    log.write(final_lines(s.compress_algo, loss, bpb, eval_seconds))
    result = dict(
        author=s.author,
        github_id=s.github_id,
        name=f"{s.num_layers}L {s.head_type} head",
        track="non-record-16mb",
        blurb=f"{s.num_layers} layers x {s.model_dim}, {s.head_type} head, {s.eval_split} split of {s.data_path}",
        seed=s.seed,
        date=f"{datetime.date.today()}",
        val_loss=loss,
        val_bpb=bpb,
        pre_quant_val_loss=pre_loss,
        pre_quant_val_bpb=pre_bpb,
        step_stop=trainer.steps,
        wallclock_seconds=trainer.clock.seconds(),
        eval_time_seconds=eval_seconds,
        **sizes,
        hardware=world.hardware(),
        head=s.head_type,
        **trainer.facts,
    )
    log.write(f"results: {path.parent}", kind="final", **result)
    result["settings"] = dataclasses.asdict(s)
    if world.rank == 0:
        write_whole(path.with_name("submission.json"), json.dumps(result, indent=1).encode())
        path.with_name("checkpoint.pt").unlink(missing_ok=True)
    return result


def as_user_error(error: Exception) -> Exception:
    """What a user can mend, in words for a user; anything else is a defect of this program, and is raised again."""
    if isinstance(error, MemoryError) or re.search(
        "out of memory|can't allocate memory", str(error)
    ):
        return UserError(
            "out of memory; lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or the sizes of the model"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserError(f"torch.compile fails here ({str(error)[:200]}); set COMPILE=0")
    if not isinstance(error, (UserError, OSError, Interrupted)):
        raise error
    return error


def main() -> int:
    """Run the chosen mode; the exit code. A user's mistake is one line on standard error, said by rank 0, and code 2."""
    rank = 0
    try:
        world = World()
        rank = world.rank
        sys.stdout = (
            open(os.devnull, "w") if rank or sys.stdout is None else sys.stdout
        )  # rank 0 speaks for all
        with contextlib.suppress(AttributeError):  # a notebook's
            sys.stdout.reconfigure(errors="backslashreplace")
        if sys.argv[1:]:
            raise UserError(
                f"{sys.argv[1]}: settings are environment variables; write them before the command"
            )
        settings = from_env()
        world.start()
        code = dict(train=run_train, eval=run_eval, table=run_table, bench=bench)[settings.mode](
            settings, world
        )
        if settings.mode != "train":  # what the others say is nowhere else
            sys.stdout.flush()
        if world.size > 1:
            dist.destroy_process_group()
        return code
    except Exception as error:
        stop = as_user_error(error)
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(
                0 if world.signal and isinstance(stop, UserError) else 10
            )  # rank 0 speaks, saves and ends first
        if isinstance(stop, Interrupted) or rank and world.signal:
            return 128 + (world.signal or stop.args[0])
        print("error:", " ".join(str(stop).split()), file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_code)  # a process group that lost a rank would abort in Python's own teardown

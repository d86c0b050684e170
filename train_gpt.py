"""Train a small GPT with a chosen output head, pack it in 16,000,000 bytes, score it (bits a byte).

One script, in the style of OpenAI's parameter-golf challenge, built to answer one question: does an
output head of higher rank than the tied softmax earn its bytes and its time?  Everything is chosen
by environment variables.

    DATA_PATH=demo python train_gpt.py                       any machine, no data, two minutes
    python train_gpt.py                                      one GPU, DATA_PATH as in the challenge
    torchrun --standalone --nproc_per_node=8 train_gpt.py    the real run
    MODE=eval ARTIFACT=runs/x/final_model.int8.ptz python train_gpt.py     score an artifact again
    MODE=table RUNS='runs/*' python train_gpt.py             compare finished runs
    MODE=bench HEAD_TYPE=mos python train_gpt.py             time a step against the tied head's

One batch on its way, in training and in evaluation alike:

    shards --> x_BT, y_BT --> blocks --> h_ND --> head.nll --> nll_N --+--> mean: training loss
               tokens and     GPT.hidden          GPT.nll              |
               their targets                                           +--> sums: bits per byte

The whole run:

    settings --> data --> model --> train --> export (round, fit, encode) --> reload --> score

Sections, each needing only those above it:

    Settings    World    Data    Byte counts    Modules    Heads    GPT    Optimizers    Schedule
    Evaluate    Artifact    Run folder    Train    Finish    Compare    Main

Names: s are the settings, `world` is this process among the ranks, `state` weights by name. Shape
suffixes: B sequences, T positions, N = B T tokens, D model width, V vocabulary, H query heads,
G key-value heads, C channels of one head, K mixture components, R rank, M simplex corners.
"""

# Python's own
import ast
import copy
import datetime
import difflib
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib

# ... of which single names
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until World.start listens, Ctrl-C simply ends it

import filelock
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import zstandard
except ImportError:
    zstandard = None  # COMPRESS_ALGO=zstd needs it


# ---- Settings: environment variables, read once and here -----------------------------------------


class UserError(Exception):
    """A mistake of the user's: main prints it as one line, `error: ...`, and exits with code 2."""


USUAL = {bool: "0, 1", int: "0 to 1e12", float: "0 to 1e12", str: ""}  # allowed values, by type


def setting(default, doc, allowed="", scope="run"):
    """A field with its documentation and its allowed values: `low to high`, or choices.

    Its scope says who else must know it: "model" and "eval" travel in the artifact (the model's
    cannot be contradicted), "run" makes a run what it is, "free" may change when one is resumed.
    """
    facts = dict(doc=doc, allowed=allowed or USUAL[type(default)], scope=scope)
    return field(default=default, metadata=facts)


model_setting = functools.partial(setting, scope="model")
eval_setting = functools.partial(setting, scope="eval")
free_setting = functools.partial(setting, scope="free")

KERNELS = ("fa3", "cudnn", "flash", "efficient", "math")  # of attention, fastest first


# fmt: off
@dataclass(frozen=True)
class Hyperparameters:
    """All settings of a run. The defaults are the `study` preset; a field's variable is its name in capitals."""

    # Mode
    mode: str = free_setting("train", "what to do", "train, eval, table, bench")
    preset: str = setting("study", "defaults: study A's, study B's, the strongest published, a CPU's", "study, pilot, best, demo")
    run_id: str = free_setting("", "folder under runs/; empty: time, head and seed")
    seed: int = setting(1337, "seed of the initial weights and of SHUFFLE's order")
    author: str = free_setting("", "author named in submission.json")
    github_id: str = free_setting("", "GitHub account named in submission.json")
    allow_near_misses: bool = free_setting(False, "accept variables that look like misspelt settings")

    # Data
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of the shards; demo: Python's own texts")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    vocab_size: int = model_setting(1024, "tokens in the vocabulary", "2 to 65536")

    # Model shape
    num_layers: int = model_setting(11, "transformer blocks", "1 to 1000")
    model_dim: int = model_setting(512, "width of the residual stream", "4 to 65536")
    num_heads: int = model_setting(8, "query heads", "1 to 1024")
    num_kv_heads: int = model_setting(4, "key-value heads; each serves NUM_HEADS / NUM_KV_HEADS query heads", "1 to 1024")
    mlp_mult: int = model_setting(3, "hidden width of the MLP over MODEL_DIM", "1 to 64")
    mlp_slope: float = model_setting(0.0, "the MLP's activation is leaky_relu(x, MLP_SLOPE)^2", "0 to 1")
    # ... attention
    rope_dims: int = model_setting(16, "rotated channels of a head; 0: all")
    use_ntk_rope: bool = model_setting(True, "raise the rotary base for TRAIN_SEQ_LEN above 1024")
    qk_gain_init: float = model_setting(1.5, "initial gain of the normed queries")
    xsa_last_n: int = model_setting(4, "last layers whose attention output drops its own value direction")
    attn_window: int = model_setting(0, "keys that a query sees, its own included, in all but the last 3 layers; 0: all")
    skip_gates: bool = model_setting(False, "skips are mixed in by learned gates instead of added")
    loop_layers: str = model_setting("", "layers that run twice, from 0, separated by commas; empty: none")
    loop_start_frac: float = setting(0.5, "share of training from which LOOP_LAYERS run twice", "0 to 0.99")
    parallel_from: int = model_setting(1000, "first layer of those whose attention and MLP have a lane each")
    # ... embeddings
    smear_gate: bool = model_setting(True, "blend each embedding with the token before")
    bigram_hash: bool = model_setting(True, "add a hashed bigram embedding")
    bigram_at: str = model_setting("layers", "where: before each layer, or once, at the input", "layers, input")
    bigram_vocab_size: int = model_setting(2048, "rows of the bigram table", "2 to 1e12")
    bigram_dim: int = model_setting(128, "width of the bigram table", "1 to 65536")
    ln_scale: bool = model_setting(True, "scale the norms of layer i by 1 / sqrt(i + 1)")
    value_embed: bool = model_setting(True, "add a token embedding to the values of VE_LAYERS")
    ve_dim: int = model_setting(128, "width of the value embedding table", "1 to 65536")
    ve_layers: str = model_setting("9,10", "layers with a value embedding, from 0, separated by commas")
    init_type: str = model_setting("ortho", "orthogonal, or PyTorch's own with zero output projections", "ortho, default")
    tied_embed_init_std: float = model_setting(0.005, "standard deviation of the initial token embedding", "1e-9 to 1e12")

    # Output head
    head_type: str = model_setting("tied", "output head")
    head_variant: str = model_setting("", "the head as a study ran it", ", pr908, pr266")
    head_k: int = model_setting(2, "components of the mixture", "1 to 64")
    head_rank: int = model_setting(64, "rank of the head's own factors; 0 (delta): full")
    head_dim: int = model_setting(128, "corners of the simplex", "2 to 65536")
    logit_softcap: float = model_setting(30.0, "c in c tanh(z / c) on the logits; 0: no cap")
    head_start_frac: float = setting(0.0, "share of training until which the head's own learning rates are zero", "0 to 1")
    head_trainable: bool = setting(True, "train the head's own parameters; 0: they stay as they start")
    train_only: str = setting("all", "what is trained", "all, head")
    init_from: str = setting("", "artifact whose trunk, and head where it is the same, training starts from")

    # Training length
    train_batch_tokens: int = setting(786432, "tokens a step, over all ranks", "1 to 1e12")
    shuffle: bool = setting(False, "a new order of the sequences in each pass over the data; 0: the files' order")
    train_seq_len: int = model_setting(2048, "tokens a sequence, in training and evaluation", "1 to 16777216")
    micro_batch_tokens: int = setting(0, "tokens of a forward pass on a rank; 0: 131072 on CUDA, else 4096")
    iterations: int = setting(20000, "steps at most; 0: export and score the untrained model")
    max_wallclock_seconds: float = setting(600.0, "cap on training time, seconds; 0: none")
    warmup_steps: int = setting(20, "steps that prime the compiled code (2: both graphs of LOOP_LAYERS), then are undone; outside the cap")
    warmdown_iters: int = setting(3500, "steps of linear warm-down at the end")
    warmdown_frac: float = setting(0.8, "the warm-down's longest share of the run", "0 to 1")
    val_loss_every: int = setting(0, "steps between validations; 0: at the end only")
    train_log_every: int = free_setting(200, "steps between log lines; 0: none")
    checkpoint_seconds: float = free_setting(0.0, "seconds between checkpoints; 0: at signals and at the end only")
    compute_dtype: str = eval_setting("auto", "of products; auto: bf16 where it is fast", "auto, bf16, fp32")
    compile: str = eval_setting("auto", "torch.compile; auto: on CUDA", "auto, 0, 1")
    attn_backend: str = setting("auto", "kernel on CUDA; auto: the first that runs", f"auto, {', '.join(KERNELS)}")

    # Optimizers
    matrix_lr: float = setting(0.025, "Muon's learning rate: matrices of the trunk")
    scalar_lr: float = setting(0.025, "Adam's learning rate: scales, gains, gates, biases")
    tied_embed_lr: float = setting(0.035, "Adam's learning rate: token, bigram and value tables")
    head_matrix_lr: float = setting(0.0, "Muon's learning rate: the head's own matrices; 0: the head's default")
    head_lr: float = setting(0.0, "Adam's learning rate: the head's own vocabulary-side matrices; 0: the head's default")
    muon_momentum: float = setting(0.99, "Muon's momentum after its warm-up", "0 to 0.9999")
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at step 0", "0 to 0.9999")
    muon_momentum_warmup_steps: int = setting(1500, "steps of the momentum's warm-up")
    muon_weight_decay: float = setting(0.04, "decoupled weight decay of Muon")
    muon_row_norm: bool = setting(False, "bring the rows of Muon's update to one norm before it is orthogonalised")
    adam_wd: float = setting(0.04, "decoupled weight decay of Adam, but for scalars")
    scalar_wd: float = setting(0.04, "weight decay of scales, gains, gates, biases")
    grad_clip_norm: float = setting(0.3, "largest norm of the whole gradient; 0: no clipping")
    use_ema: bool = setting(True, "export the exponential moving average of the weights")
    ema_alpha: float = setting(0.997, "the average's decay, at most (1 + t) / (10 + t)", "0 to 0.999999")

    # Evaluation
    eval_stride: int = eval_setting(64, "tokens scored a window in the end; 0, or above TRAIN_SEQ_LEN: all")
    val_batch_size: int = eval_setting(524288, "tokens of one evaluation batch, over all ranks", "1 to 1e12")
    eval_split: str = setting("val", "split that is scored", "val, test")
    eval_spectrum: bool = setting(False, "measure the rank of the log-probabilities (MODE=eval)")
    artifact: str = free_setting("", "artifact to score (MODE=eval)")
    runs: str = free_setting("runs/*", "folders of the runs to compare (MODE=table)")

    # Artifact
    late_qat: bool = setting(True, "train through the export's rounding at the end")
    qat_threshold: float = setting(0.15, "learning-rate scale below which late QAT starts", "0 to 1")
    compress_algo: str = eval_setting("zlib", "codec; zlib is deflate, Huffman only", "zlib, zstd")
    size_limit_bytes: int = setting(16_000_000, "cap on this script's bytes plus the artifact's", "1 to 1e12")

    # what the user said: by setting in capitals, the variable and its text
    given: dict = field(default_factory=dict, compare=False, repr=False)

    def wrong(self, name, remedy):
        """The error of one setting, under the variable that the user wrote."""
        source, text = self.given.get(name, (name, as_text(getattr(self, name.lower()))))
        return UserError(f"{source}={text}: must {remedy}")

    def as_dict(self, scopes=("model", "eval", "run", "free")):
        """The settings of these scopes by name."""
        return {name: getattr(self, name) for name in SCOPES if SCOPES[name] in scopes}


def pairs(text):
    """`NAME=value NAME=value ...` as a dict."""
    return dict(pair.split("=") for pair in text.split())


# a preset is what one would write before the command
PRESETS = dict(
    study={},

    pilot=pairs("""
        NUM_LAYERS=9 MLP_MULT=2 ROPE_DIMS=0 USE_NTK_ROPE=0 XSA_LAST_N=0 SMEAR_GATE=0 BIGRAM_HASH=0 LN_SCALE=0
        VALUE_EMBED=0 INIT_TYPE=default TRAIN_BATCH_TOKENS=524288 TRAIN_SEQ_LEN=1024 WARMDOWN_ITERS=1200 MATRIX_LR=0.04
        SCALAR_LR=0.04 TIED_EMBED_LR=0.05 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85
        MUON_MOMENTUM_WARMUP_STEPS=500 MUON_WEIGHT_DECAY=0 ADAM_WD=0 SCALAR_WD=0 GRAD_CLIP_NORM=0 USE_EMA=0 LATE_QAT=0 EVAL_STRIDE=0
    """),

    best=pairs("""
        MLP_MULT=4 MLP_SLOPE=0.5 QK_GAIN_INIT=5 USE_NTK_ROPE=0 XSA_LAST_N=11 SKIP_GATES=1 LOOP_LAYERS=4,5 PARALLEL_FROM=7
        BIGRAM_AT=input BIGRAM_VOCAB_SIZE=1536 BIGRAM_DIM=112 SHUFFLE=1 WARMDOWN_ITERS=1000000 WARMDOWN_FRAC=0.667
        MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_ROW_NORM=1 MUON_WEIGHT_DECAY=0.09 ADAM_WD=0.09
        SCALAR_WD=0.02 EMA_ALPHA=0.9965 LATE_QAT=0
    """),

    demo=pairs("""
        DATA_PATH=demo MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 BIGRAM_DIM=32 VE_DIM=32 TRAIN_BATCH_TOKENS=4096
        TRAIN_SEQ_LEN=256 MAX_WALLCLOCK_SECONDS=75 WARMUP_STEPS=0 WARMDOWN_ITERS=100000 WARMDOWN_FRAC=0.5
        MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=100 MUON_WEIGHT_DECAY=0
        ADAM_WD=0 SCALAR_WD=0 EMA_ALPHA=0.98 TRAIN_LOG_EVERY=20
    """),
)

# Published variables and the values at which they are accepted: no other behaviour is implemented.
PUBLISHED = pairs("""
    TIE_EMBEDDINGS=1 EMA_FROM_INIT=1 USE_QAT=0 GRAD_GUIDED_QUANT=0 SKIP_QUANT=0 QAT_BITS=6 QUANT_BITS_MIDDLE=6
    QUANT_BITS_MLP=6 MUON_BACKEND_STEPS=5 ROPE_BASE=10000.0 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8
    FLASH_ATTN_BACKEND=fa3 FLASH_ATTN_STRICT=1 FLASH_ATTN_ARCH_LIST=9.0 USE_MOS=0,1 SKIP_COMPILE=0,1 USE_FA3=0,1
""")
# What published variables say of our settings: one alone has their value, `NAME=value` this one.
ALIASES = dict(
    MIXTURE_SOFTMAX_K="HEAD_K", MIXTURE_RANK_DIM="HEAD_RANK", SIMPLEX_DIM="HEAD_DIM",
    RANK_DIM="HEAD_RANK HEAD_TYPE=factorized",
    USE_MOS="HEAD_TYPE=mos", MOS_K="HEAD_K HEAD_TYPE=mos", MOS_RANK="HEAD_RANK HEAD_TYPE=mos",
    SKIP_COMPILE="COMPILE=0", USE_FA3="ATTN_BACKEND=fa3",
)
HEAD_WORDS = dict(standard="tied", mixture_softmax="mos")
SWITCHES = ("RANK_DIM", "USE_MOS", "SKIP_COMPILE", "USE_FA3")  # 0 says nothing
STUDY_B = {"USE_MOS", "MOS_K", "MOS_RANK"}
# fmt: on

FIELDS = {f.name.upper(): f for f in fields(Hyperparameters) if f.metadata}
SCOPES = {f.name: f.metadata["scope"] for f in FIELDS.values()}
MODE_OF = dict(ARTIFACT="eval", EVAL_SPECTRUM="eval", RUNS="table", INIT_FROM="train")


def as_text(value):
    """A setting's value as its environment variable would hold it."""
    if isinstance(value, bool):
        value = int(value)
    return str(value)


def parse(name, text, source):
    """The typed value of a setting, if it is allowed; UserError names the variable that said it."""
    kind, allowed = FIELDS[name].type, FIELDS[name].metadata["allowed"]
    if kind in (bool, str):
        if allowed and text not in allowed.split(", "):
            raise UserError(f"{source}={text}: must be one of {allowed}")
        return text if kind is str else text == "1"

    try:
        value = kind(text)
    except ValueError:
        number = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{source}={text}: must be {number}") from None
    low, high = allowed.split(" to ")
    if value < float(low):
        raise UserError(f"{source}={text}: must be at least {low}")
    if not value <= float(high):  # nor may it be nan
        raise UserError(f"{source}={text}: must be at most {high}")
    return value


def check_names(environ):
    """UserError for a variable that looks misspelt or is not implemented."""
    known = {*FIELDS, *PUBLISHED, *ALIASES}
    if environ.get("ALLOW_NEAR_MISSES") != "1":
        for name in sorted(environ.keys() - known):
            for likely in difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
                meant = f"did you mean {likely}? If not, set ALLOW_NEAR_MISSES=1"
                raise UserError(f"{name}={environ[name]}: {meant}")

    for name in environ.keys() & PUBLISHED.keys():
        text, values = environ[name], PUBLISHED[name]
        if text not in values.split(","):
            raise UserError(f"{name}={text}: only {name}={values} is implemented; leave it unset")


def translate(environ):
    """What the user said, in our names: by setting, the variable that says it and its text."""
    check_names(environ)

    # study A: with RANK_DIM above 0, the standard head is the factorized one
    heads = dict(HEAD_WORDS)
    if environ.get("RANK_DIM", "0") != "0":
        heads["standard"] = "factorized"

    # what is off says nothing; USE_MOS=0 silences all of study B's
    silent = {name for name in SWITCHES if environ.get(name) == "0"}
    if "USE_MOS" in silent:
        silent |= STUDY_B

    given = {}
    for source in [*ALIASES, *FIELDS]:
        if source not in environ or source in silent:
            continue
        for meaning in ALIASES.get(source, source).split():
            name, _, text = meaning.partition("=")
            text = text or environ[source]
            if name == "HEAD_TYPE":
                text = heads.get(text, text)
            first, agreed = given.setdefault(name, (source, text))
            if text != agreed:
                contradiction = f"contradicts {first}={environ[first]}; set only one"
                raise UserError(f"{source}={environ[source]}: {contradiction}")
    return given


def from_env(environ, stored):
    """Settings from variables, then from an artifact's, then the preset's, then the fields'.

    MODE=eval takes all that the artifact stores, a run with INIT_FROM only the trunk's. The model
    that is taken cannot be contradicted. UserError names variable, value and remedy.
    """
    given = translate(environ)
    values = {}
    for name, (source, text) in given.items():
        values[name.lower()] = parse(name, text, source)

    # the artifact's
    scoring = environ.get("MODE") == "eval"
    for name, value in stored.items():
        fixed = SCOPES[name] == "model" and (scoring or not name.startswith("head_"))
        if fixed and values.get(name, value) != value:
            source, text = given[name.upper()]
            has = f"the artifact has {name.upper()}={as_text(value)}"
            raise UserError(f"{source}={text}: {has}; leave it unset")
        if fixed or scoring:
            values.setdefault(name, value)

    # the preset's: chosen, or implied
    implied = "study"
    if environ.keys() & STUDY_B:
        implied = "pilot"
    if environ.get("DATA_PATH") == "demo":
        implied = "demo"
    for name, text in PRESETS[values.setdefault("preset", implied)].items():
        values.setdefault(name.lower(), parse(name, text, name))

    s = Hyperparameters(**values, given=given)
    check(s)
    return s


def layer_list(s, name, remedy):
    """The layers that a setting names, ascending; UserError where one is none of the model's."""
    texts = getattr(s, name.lower()).split(",")
    layers = [layer for layer in range(s.num_layers) if str(layer) in texts]
    if len(layers) < len(texts):
        raise s.wrong(name, f"be distinct layers 0..{s.num_layers - 1} between commas; or {remedy}")
    return layers


def value_layers(s):
    """The layers with a value embedding, ascending."""
    return layer_list(s, "VE_LAYERS", "set VALUE_EMBED=0") if s.value_embed else []


def layer_order(s):
    """The layers as they run: after the last of LOOP_LAYERS, all of these again."""
    order = list(range(s.num_layers))
    if s.loop_layers:
        loop = layer_list(s, "LOOP_LAYERS", "leave it empty")
        after = loop[-1] + 1
        order[after:after] = loop
    return order


def check(s):
    """What must hold between settings, but for the head's, which are its own; raises UserError."""

    def need(condition, name, remedy):
        if not condition:
            raise s.wrong(name, remedy)

    # shapes
    width = s.model_dim // s.num_heads
    need(s.model_dim % s.num_heads == 0, "NUM_HEADS", f"divide MODEL_DIM={s.model_dim}")
    need(s.num_heads % s.num_kv_heads == 0, "NUM_KV_HEADS", f"divide NUM_HEADS={s.num_heads}")
    rotated = s.rope_dims or width
    fits = rotated % 2 == 0 and 4 <= rotated <= width
    need(fits, "ROPE_DIMS", f"be even, at least 4 and at most {width} (0: the head's {width})")
    value_layers(s)
    order = layer_order(s)
    least = len(set(order[: len(order) // 2]))  # the first half stores skips
    need(s.parallel_from >= least, "PARALLEL_FROM", f"be at least {least}, where skips come back")

    # codecs, paths
    codec = s.compress_algo == "zlib" or zstandard
    need(codec, "COMPRESS_ALGO", "be zlib, or the package zstandard be installed")
    own = s.data_path == "demo" and "TOKENIZER_PATH" in s.given
    need(not own, "TOKENIZER_PATH", "be unset with DATA_PATH=demo, which has its own")
    plain = re.fullmatch(r"(?!\.+\Z)[\w.-]{0,200}", s.run_id, re.ASCII)
    need(plain, "RUN_ID", "be a folder name of letters, digits, '.', '_' and '-'")

    # settings of one mode
    need(s.artifact or s.mode != "eval", "ARTIFACT", "name an artifact to read")
    for name, mode in MODE_OF.items():
        unset = getattr(s, name.lower()) == FIELDS[name].default
        need(unset or s.mode == mode, name, f"be unset but for MODE={mode}")


# ---- World: one process or torchrun's many; with one, communication is skipped -------------------

# a rank that is silent for so long counts as lost: rank 0 may pack for minutes
HANG = datetime.timedelta(minutes=10)
MEETING = datetime.timedelta(seconds=30)  # for ranks to find each other at the start


class Interrupted(Exception):
    """A signal asked the run to stop; `args[0]` is its number."""


class Diverged(UserError):
    """The loss is no number any more, so the state is not worth a checkpoint."""


@contextmanager
def blaming(what, damaged=""):
    """Inside, the system's errors become a UserError about `what`.

    Any other error, too, where it would mean that `what` is `damaged`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from None
    except Exception as error:
        if not damaged:
            raise
        raise UserError(f"{what}: {damaged} ({ascii(str(error) or error)[:300]})") from None


def in_words(error):
    """What a user can mend, in words for a user; None for a defect of this program."""
    if isinstance(error, Interrupted):
        return f"stopped by {signal.Signals(error.args[0]).name}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        return "out of memory; lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE or the sizes of the model"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        remedy = "ATTN_BACKEND=flash" if "flash_attn" in text else "COMPILE=0"
        return f"torch.compile fails here ({text[:200]}); set {remedy}"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or text}"
    if isinstance(error, UserError):
        return text
    return None


class World:
    """Rank, size and device; the collectives that the program needs; the signals that end it."""

    def __init__(self, environ):
        """One process on the CPU or the first GPU, or the place that torchrun's variables name."""
        self.signal, self.alone = 0, "WORLD_SIZE" not in environ
        self.say = functools.partial(print, flush=True)  # a run's log, where there is one
        rank, local_rank = environ.get("RANK", 0), environ.get("LOCAL_RANK", 0)
        size = environ.get("WORLD_SIZE", 1)
        place = f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={size}"
        with blaming(place, "is no rank's place; use torchrun, or unset them"):
            self.rank, self.local_rank, self.size = int(rank), int(local_rank), int(size)
            if not 0 <= self.local_rank <= self.rank < self.size:
                raise ValueError("a rank is below WORLD_SIZE")
        self.device = torch.device("cpu")
        if torch.cuda.device_count():
            self.device = torch.device("cuda", self.local_rank)
        with blaming(place, "cannot use its GPU; lower --nproc_per_node, or update the driver"):
            self.use_device()

    def use_device(self):
        """Make the GPU this thread's own; elsewhere nothing."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def start(self):
        """Join the process group (NCCL for CUDA tensors, gloo for others); listen to signals."""
        if self.size > 1:
            with blaming(f"WORLD_SIZE={self.size}: the ranks cannot meet", "use torchrun"):
                # the client of the store tries twice
                store, rank, size = next(dist.rendezvous("env://", timeout=MEETING / 2.5))
                store.set_timeout(MEETING)
                backend = dict(cuda="cpu:gloo,cuda:nccl", cpu="gloo")[self.device.type]
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=HANG
                )
                dist.all_reduce(torch.zeros(1, device=self.device))  # NCCL starts now, not later

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        """Note a signal; the loop looks at it once a step. Alone, a second one stops at once."""
        self.signal = number
        if self.alone:  # torchrun repeats signals; a closed terminal may hang up twice
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.signal(again, signal.SIG_DFL)

    def heed(self):
        """Interrupted, if a signal has come to this rank. Called where the state is whole."""
        if self.signal:
            raise Interrupted(self.signal)

    def collective(self, operation, *arguments, **options):
        """Talk with the other ranks, if any; UserError where one is gone."""
        try:
            if self.size > 1:
                operation(*arguments, **options)
        except RuntimeError as error:
            self.heed()
            raise UserError(
                f"rank {self.rank}: lost touch with another rank: {error}; the same command resumes"
            ) from None

    def time_and_signal(self, seconds):
        """Rank 0's clock and any rank's signal, on every rank: the one message of a step's start.

        It travels between CPUs: the GPU is not waited for.
        """
        if self.rank > 0:
            seconds = 0.0
        message = torch.tensor([seconds, self.signal], dtype=torch.float64)
        self.collective(dist.all_reduce, message, dist.ReduceOp.MAX)
        return message[0].item(), int(message[1])

    def agree(self, value):
        """Rank 0's value, on every rank; sent between CPUs."""
        box = [value]
        self.collective(dist.broadcast_object_list, box, device=torch.device("cpu"))
        return box[0]

    def sum(self, tensor):
        """Sum over ranks, in place."""
        self.collective(dist.all_reduce, tensor)
        return tensor

    def gather(self, part):
        """The ranks' equally shaped parts, concatenated along the first dimension in rank order."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self.collective(dist.all_gather, parts, part)
        return torch.cat(parts)

    def average(self, tensors):
        """Mean over ranks of many tensors, in place, in one message."""
        if self.size > 1:
            flat = self.sum(nn.utils.parameters_to_vector(tensors)) / self.size
            nn.utils.vector_to_parameters(flat, tensors)

    def progress(self, done, total):
        """Of a long evaluation, which starts with done = 0, a line every 30 seconds."""
        now = time.monotonic()
        if done == 0:
            self.began = self.spoke = now
        if now - self.spoke > 30:
            left = (now - self.began) / done * (total - done)
            self.say(f"scoring batches of windows: {done} of {total}, eta:{left:.0f}s")
            self.spoke = now

    def hardware(self):
        if self.device.type == "cpu":
            return f"{self.size} x CPU {os.uname().machine}, {torch.get_num_threads()} threads"
        return f"{self.size} x {torch.cuda.get_device_name(self.device)}"

    def peak_memory(self):
        """The log line: peak MiB allocated and reserved of the GPU, or resident of this process."""
        import resource  # Unix only; importing this file needs none

        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated() >> 20
            reserved = torch.cuda.max_memory_reserved() >> 20
        return f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"

    def compute_dtype(self, s):
        """COMPUTE_DTYPE; auto is bf16 where the chip multiplies it fast, else float32."""
        fast = s.compute_dtype == "bf16"
        if s.compute_dtype == "auto" and self.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        elif s.compute_dtype == "auto" and hasattr(torch.cpu, "get_capabilities"):
            fast = torch.cpu.get_capabilities().get("avx512_bf16")
        return torch.bfloat16 if fast else torch.float32

    def compiled(self, function, s):
        """The function compiled, where COMPILE says so, as one graph of static shapes."""
        if s.compile == "0" or s.compile == "auto" and self.device.type == "cpu":
            return function
        return torch.compile(function, dynamic=False, fullgraph=True)


# ---- Data: shards, the batch stream, the demo corpus ---------------------------------------------

SHARD_FORMAT = [20240520, 1]  # magic number, version
HEADER_BYTES = 1024
BOS_ID = 1  # stands before every document


def write_whole(path, data):
    """Write under a temporary name, sync and rename: the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with blaming(f"{path}: cannot be written"):
        try:
            with open(partial, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def count_tokens(path):
    """Tokens of a shard; UserError where it is damaged.

    A shard is 256 little-endian int32 (magic, version, count, zeros), then uint16 tokens.
    """
    header, size = np.fromfile(path, dtype="<i4", count=3), path.stat().st_size
    count, rest = divmod(size - HEADER_BYTES, 2)
    if count < 1 or rest or header.tolist() != [*SHARD_FORMAT, count]:
        raise UserError(f"{path}: is truncated, or no token shard of version 1; fetch it again")
    return count


def write_shard(path, tokens):
    """The counterpart of count_tokens and Shards.read."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = *SHARD_FORMAT, len(tokens)
    write_whole(path, header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


@functools.lru_cache(1)
def order_of_pass(number, count, seed):
    """The permutation of `count` sequences in one pass over the data."""
    return np.random.default_rng([seed, number]).permutation(count)


class Shards:
    """All tokens of one split as an endless sequence: after the last comes the first again."""

    def __init__(self, folder, split, vocab_size):
        self.variable, self.vocab_size = f"DATA_PATH={folder}", vocab_size
        with blaming(self.variable):
            os.listdir(folder)  # glob says nothing where there is no folder, or no right to read it
        name = f"fineweb_{split}_*.bin"
        self.paths = sorted(Path(folder).glob(name))
        if not self.paths:
            raise UserError(f"{self.variable}: holds no {name}; see README, or use DATA_PATH=demo")
        self.starts = np.cumsum([0, *map(count_tokens, self.paths)])

    def __len__(self):
        return self.starts[-1]

    def take(self, start, count):
        """Tokens start .. start + count - 1 (int64), wrapping; UserError for a bad id."""
        tokens = np.empty(0, dtype=np.int64)
        while len(tokens) < count:
            place = (start + len(tokens)) % len(self)
            shard = np.searchsorted(self.starts, place, side="right") - 1
            first, end = self.starts[shard : shard + 2]
            most = min(count - len(tokens), end - place)
            tokens = np.append(tokens, self.read(self.paths[shard], place - first, most))
        return tokens

    def read(self, path, first, count):
        with blaming(f"{self.variable}: {path.name} cannot be read"):
            tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES + 2 * first)
        if len(tokens) < count:
            raise UserError(f"{path}: has become shorter; leave the data alone while a run uses it")
        if tokens.max() >= self.vocab_size:
            fault = f"holds token id {tokens.max()}, but VOCAB_SIZE={self.vocab_size}"
            raise UserError(f"{path}: {fault}; use the tokenizer of the data")
        return tokens

    def shuffled(self, place, T, seed):
        """The place in file order of a sequence of T tokens of the endless shuffled stream."""
        count = max(1, (len(self) - 1) // T)
        number, place = divmod(place, count)
        return order_of_pass(number, count, seed)[place]

    def fingerprint(self, val_N):
        """SHA-256 that tells data apart: of this split's length and ends, all validation tokens."""
        ends = self.take(len(self) - 32768, 65536)
        return hashlib.sha256(np.concatenate((ends, val_N.cpu(), [len(self)]))).hexdigest()


def micro_batch_sequences(s, world):
    """Sequences of a forward pass: the largest divisor of a rank's share in MICRO_BATCH_TOKENS."""
    T, size = s.train_seq_len, world.size
    share, rest = divmod(s.train_batch_tokens, size * T)
    if rest:
        raise s.wrong("TRAIN_BATCH_TOKENS", f"be a multiple of {size * T}, for {size} ranks")
    default = dict(cuda=131072, cpu=4096)[world.device.type]
    B = max(1, min(share, (s.micro_batch_tokens or default) // T))
    while share % B:
        B -= 1
    return B


def train_batch(shards, step, s, world):
    """This rank's micro-batches (x_BT, y_BT) of a step, its part of TRAIN_BATCH_TOKENS.

    A sequence is T tokens and the one behind. In file order, or with SHUFFLE in each pass's own.
    """
    T = s.train_seq_len
    share = s.train_batch_tokens // T // world.size
    first = (step * world.size + world.rank) * share
    rows = []
    for place in range(first, first + share):
        if s.shuffle:
            place = shards.shuffled(place, T, s.seed)
        rows.append(shards.take(place * T, T + 1))
    tokens = torch.from_numpy(np.stack(rows))
    if world.device.type == "cuda":  # the copy is not waited for
        tokens = tokens.pin_memory().to(world.device, non_blocking=True)
    B = micro_batch_sequences(s, world)
    return [(part[:, :-1], part[:, 1:]) for part in tokens.split(B)]


def demo_documents():
    """English text that every Python has: the long strings of its library, mostly documentation."""
    library, documents = Path(os.__file__).parent, set()
    for name in glob.glob("**/*.py", root_dir=library, recursive=True):
        if re.search("test|encodings|config|custom|packages", name):  # no prose, or not its own
            continue
        for node in ast.walk(ast.parse((library / name).read_bytes())):
            text = getattr(node, "value", None)
            if isinstance(text, str) and 100 < len(text) < 20_000:
                documents.add(" ".join(text.split()))
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())  # mixed


def build_demo(folder, vocab_size):
    """Write train, val and test shards and a tokenizer to `folder`, unless they are there.

    Without a lock: who builds at the same time writes the same bytes, each file whole.
    """
    finished = folder / "tokenizer.model"  # written last
    if finished.exists():  # perhaps another user's
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = demo_documents()
    splits = dict(val=texts[:200], test=texts[200:400], train=texts[400:])

    # a BPE with byte fallback, as the challenge's; 2 ends a text
    model = io.BytesIO()
    with blaming(f"VOCAB_SIZE={vocab_size}", "does not suit the demo's text, use 1024"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(splits["train"]),
            max_sentence_length=1_000_000,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.999,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=BOS_ID,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )

    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for split, documents in splits.items():
        tokens = np.concatenate(processor.encode(documents, add_bos=True))
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    write_whole(finished, model.getvalue())


def prepare_demo(s, world):
    """Settings with DATA_PATH=demo replaced by the cached corpus; a rank of each node builds it."""
    if s.data_path != "demo":
        return s
    folder = Path("data", f"demo-{s.vocab_size}")
    if world.local_rank == 0:
        build_demo(folder, s.vocab_size)
    world.sum(torch.zeros(1))  # all wait for all
    return replace(s, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))


# ---- Byte counts: how many UTF-8 bytes of text each token stands for -----------------------------


def load_tokenizer(path, vocab_size):
    """UserError, naming the variable, for a file that is missing, no model, or of another size."""
    with blaming(f"TOKENIZER_PATH={path}", "is no SentencePiece model"):
        # an empty file would make the library speak for itself
        model = Path(path).read_bytes() or b"?"
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = processor.vocab_size()
    if size != vocab_size:
        raise UserError(f"VOCAB_SIZE={vocab_size}: the tokenizer {path} has {size} tokens")
    return processor


def load_byte_counts(path, vocab_size, device):
    """A function of int64 tensors: (token before, token) -> the token's bytes there.

    They add up to a document's decoded text. SentencePiece drops the leading space of a text, so a
    token counts less after a control token.
    """
    processor, ids = load_tokenizer(path, vocab_size), list(range(vocab_size))

    def sizes(before):
        """The bytes that each token adds behind these."""
        start = len(processor.decode(before).encode())
        texts = processor.decode([[*before, i] for i in ids])
        return [len(text.encode()) - start for text in texts]

    inside_or_first_2V = torch.tensor([sizes(processor.encode("a")), sizes([])], device=device)
    inside_or_first_2V[:, torch.tensor(processor.is_byte(ids))] = 1
    control_V = torch.tensor(processor.is_control(ids), device=device).long()
    return lambda before, token: inside_or_first_2V[control_V[before], token]


# ---- Modules: norm, linear, rotary, attention, MLP, block, embeddings ----------------------------

NORM_EPS = 1e-7  # explicit, so that it does not depend on the dtype


class Module(nn.Module):
    """A module that names the role of each of its own parameters; ROLES says what follows."""

    roles = {}

    def add(self, role, **values):
        """Own parameters of one role by name, with their initial values."""
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value))
            self.roles = {**self.roles, name: role}


def norm(x):
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()


def project(x, *weights):
    """x W^T for one weight after the other, in the dtype of x."""
    for weight in weights:
        x = F.linear(x, weight.to(x.dtype))
    return x


class Linear(nn.Linear, Module):
    """Matrix product in the input's dtype, with float32 master weights.

    INIT_TYPE=ortho: orthogonal, over sqrt(2 L) where the output joins the residual stream;
    INIT_TYPE=default: PyTorch's own, zero where it joins.
    """

    roles = dict(weight="matrix")

    def __init__(self, s, n_in, n_out, residual=False):
        super().__init__(n_in, n_out, bias=False)
        if s.init_type == "ortho":
            gain = (2 * s.num_layers) ** -0.5 if residual else 1.0
            nn.init.orthogonal_(self.weight, gain=gain)
        elif residual:
            nn.init.zeros_(self.weight)

    def forward(self, x, scale=None):
        """x W^T; `scale` multiplies the output channels, folded into the weights."""
        weight = self.weight if scale is None else self.weight * scale[:, None]
        return project(x, weight)


class Table(nn.Embedding, Module):
    """An embedding table; its initial values are its owner's."""

    roles = dict(weight="table")


class Rotary(Module):
    """Rotary position embedding of the first ROPE_DIMS channels (Su et al. 2021).

    Above 1,024 tokens the base is NTK-aware: base (T / 1024)^(r / (r - 2)).
    """

    def __init__(self, s):
        super().__init__()
        T, r = s.train_seq_len, s.rope_dims or s.model_dim // s.num_heads
        base = 10000.0
        if s.use_ntk_rope:
            base *= max(1.0, T / 1024) ** (r / (r - 2))
        frequency = base ** (-torch.arange(0, r, 2) / r)
        angle_T1C = torch.outer(torch.arange(T).float(), frequency)[:, None]
        cos_sin_2T1C = torch.stack((angle_T1C.cos(), angle_T1C.sin()))
        self.register_buffer("cos_sin_2T1C", cos_sin_2T1C, persistent=False)

    def forward(self, x_BTHC):
        cos, sin = self.cos_sin_2T1C[:, : x_BTHC.size(1)].to(x_BTHC.dtype)
        half = cos.size(-1)
        a, b, rest = x_BTHC.tensor_split((half, 2 * half), dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def attend(q_BTHC, k_BTGC, v_BTGC, window=0, fa3=False):
    """Causal attention; a query sees `window` keys, its own included (0: all).

    By PyTorch's kernels, of which choose_attention enables one. Flash-attention 3 (Shah et al.
    2024) knows windows, through its own package; elsewhere they are a mask.
    """
    if window and fa3 and q_BTHC.is_cuda:
        from flash_attn_interface import flash_attn_func

        y = flash_attn_func(q_BTHC, k_BTGC, v_BTGC, causal=True, window_size=(window - 1, 0))
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTGC, v_BTGC))
    mask, T = None, q.size(2)
    if window:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    options = dict(attn_mask=mask, is_causal=not window, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def choose_attention(s, world):
    """Enable one attention kernel, ATTN_BACKEND's or the first that runs.

    Returns settings that name it, and its version.
    """
    if world.device.type == "cpu":
        return s, "PyTorch's on the CPU"
    wanted = KERNELS if s.attn_backend == "auto" else [s.attn_backend]
    for name in wanted:
        chosen = replace(s, attn_backend=name)
        try:
            try_attention(chosen, world)
            cudnn = torch.backends.cudnn.version()
            return chosen, f"{name} (torch {torch.__version__}, cuDNN {cudnn})"
        except Exception as error:  # whatever keeps a kernel from running
            fault = str(error)[:200]
    remedy = "fa3 needs an H100, its package, and torch.nn.attention.activate_flash_attention_impl"
    raise s.wrong("ATTN_BACKEND", f"run here, but does not ({fault}); {remedy}")


def try_attention(s, world):
    """Enable the kernel of ATTN_BACKEND alone, and run it once, forward and backward."""
    name, cuda = s.attn_backend, torch.backends.cuda
    cuda.enable_cudnn_sdp(name == "cudnn")
    cuda.enable_flash_sdp(name in ("fa3", "flash"))
    cuda.enable_mem_efficient_sdp(name == "efficient")
    cuda.enable_math_sdp(name == "math" or s.attn_window > 0)  # windows are masks
    if name == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    attention = Attention(s, 0, Rotary(s)).to(world.device)
    x_BTD = torch.zeros(1, s.train_seq_len, s.model_dim, device=world.device)
    attention(x_BTD.to(world.compute_dtype(s)), None, None).sum().backward()


class Attention(Module):
    """Grouped-query attention with RMS-normed queries and keys.

    In the last XSA_LAST_N layers each token's own value direction goes: y - (y . v) v / |v|^2.
    """

    def __init__(self, s, layer, rotary):
        super().__init__()
        D, H, self.G = s.model_dim, s.num_heads, s.num_kv_heads
        self.C = D // H
        self.q = Linear(s, D, D)
        self.k = Linear(s, D, self.G * self.C)
        self.v = Linear(s, D, self.G * self.C)
        self.out = Linear(s, D, D, residual=True)
        self.add("scalar", q_gain=torch.full((H,), s.qk_gain_init))
        self.rotary, self.fa3 = rotary, s.attn_backend == "fa3"
        self.exclusive = layer >= s.num_layers - s.xsa_last_n
        self.window = s.attn_window if layer < s.num_layers - 3 else 0  # as in PR 1512

    def forward(self, x_BTD, value, scale_D):
        """`value` is added to the values; `scale_D` multiplies the output."""
        # one product for queries, keys and values; all heads together
        H, G = len(self.q_gain), self.G
        weight = torch.cat((self.q.weight, self.k.weight, self.v.weight))
        heads = project(x_BTD, weight).unflatten(-1, (-1, self.C))
        qk, v_BTGC = heads.split((H + G, G), dim=2)
        if value is not None:
            v_BTGC = v_BTGC + value.view_as(v_BTGC)

        # norm and gain of queries and keys in one factor, by head
        square = at_least_fp32(qk).square().mean(-1, keepdim=True)
        gain = F.pad(self.q_gain, (0, G), value=1.0)[:, None]
        scale = torch.rsqrt(square + NORM_EPS) * gain
        q_BTHC, k_BTGC = self.rotary(qk * scale.to(qk.dtype)).split((H, G), dim=2)

        y = attend(q_BTHC, k_BTGC, v_BTGC, self.window, self.fa3)
        if self.exclusive:  # a value head is shared by H / G query heads
            y, v = y.unflatten(2, (G, -1)), v_BTGC.unsqueeze(3)
            dot, square = (y * v).sum(-1, keepdim=True), v.square().sum(-1, keepdim=True)
            y = y - dot / (square + NORM_EPS) * v
        return self.out(y.flatten(2), scale_D)


class MLP(Module):
    """relu(x)^2, or a leaky one, between two matrices (So et al. 2021)."""

    def __init__(self, s):
        super().__init__()
        hidden = s.mlp_mult * s.model_dim
        self.up = Linear(s, s.model_dim, hidden)
        self.down = Linear(s, hidden, s.model_dim, residual=True)
        self.slope = s.mlp_slope

    def forward(self, x_BTD, scale_D):
        return self.down(F.leaky_relu(self.up(x_BTD), self.slope).square(), scale_D)


class Block(Module):
    """Attention, after a mix with the first stream x0, and MLP: each behind a norm, with a scale
    a channel, added to the stream that it reads."""

    def __init__(self, s, layer, rotary):
        super().__init__()
        D = s.model_dim
        self.attn = Attention(s, layer, rotary)
        self.mlp = MLP(s)
        self.add("scalar", attn_scale=torch.ones(D), mlp_scale=torch.ones(D))
        self.add("scalar", resid_mix=torch.stack((torch.ones(D), torch.zeros(D))))
        self.norm_scale = (layer + 1) ** -0.5 if s.ln_scale else 1.0

    def attend(self, x, x0, value):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        return x + self.attn(norm(x) * self.norm_scale, value, self.attn_scale)

    def feed_forward(self, x):
        return x + self.mlp(norm(x) * self.norm_scale, self.mlp_scale)


class SmearGate(Module):
    """(1 - g) x_t + g x_{t-1}, g = sigmoid a channel; nothing crosses into a document."""

    def __init__(self, s):
        super().__init__()
        self.add("scalar", gate=torch.zeros(s.model_dim))

    def forward(self, x_BTD, starts_BT):
        before = F.pad(x_BTD, (0, 0, 1, -1)).masked_fill(starts_BT[..., None], 0.0)
        return torch.lerp(x_BTD, before, torch.sigmoid(self.gate).to(x_BTD.dtype))


class BigramHash(Module):
    """Embedding of the hashed pair (x_{t-1}, x_t), with a factor for each place where it is added.

    The last row is for the first token of a sequence or document.
    """

    def __init__(self, s):
        super().__init__()
        self.table = Table(s.bigram_vocab_size, s.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = Linear(s, s.bigram_dim, s.model_dim)
        places = dict(layers=s.num_layers, input=1)[s.bigram_at]
        self.add("scalar", layer_scale=torch.full((places,), 0.05))

    def forward(self, x_BT, starts_BT, dtype):
        """What is added, by place."""
        last = self.table.num_embeddings - 1
        hash_BT = torch.bitwise_xor(36313 * x_BT, 27191 * F.pad(x_BT, (1, -1))) % last
        rows = self.table(hash_BT.masked_fill(starts_BT, last)).to(dtype)
        bigram = self.proj(rows)
        return [bigram * scale for scale in self.layer_scale.to(dtype)]


class ValueEmbedding(Module):
    """Token embedding added to the attention values of VE_LAYERS, with one scale a layer."""

    def __init__(self, s):
        super().__init__()
        self.layers = value_layers(s)
        width = s.model_dim // s.num_heads * s.num_kv_heads
        self.table = Table(s.vocab_size, s.ve_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        self.proj = Linear(s, s.ve_dim, width, residual=True)
        self.add("scalar", scale=torch.tensor(0.1), layer_scale=torch.ones(len(self.layers)))

    def forward(self, x_BT, dtype):
        """By layer, what is added to its values."""
        value = self.proj(self.table(x_BT).to(dtype)) * self.scale.to(dtype)
        scales = self.layer_scale.to(dtype)
        return {layer: value * scale for layer, scale in zip(self.layers, scales)}


# ---- Heads: from hidden states to log-probabilities ----------------------------------------------


class Head(Module):
    """An output head: its own parameters, their initial values and roles, and its logits.

    h_ND are normed hidden states, x_N current tokens, y_N targets, E_VD the token embedding. A head
    gives `logits(h_ND, x_N, E_VD)`, NxV; or, where it is no softmax of logits, `nll` and `log_probs`
    of its own. It may declare:
    """

    uses = ()  # the settings that it reads, beside those of every head
    head_lr = 0.01  # for HEAD_LR=0
    head_matrix_lr = 0.001  # for HEAD_MATRIX_LR=0
    products_with_E = 1  # matrix products with E for a token; 0: E makes no logits

    def __init__(self, s):
        super().__init__()
        self.softcap = s.logit_softcap
        self.tied_logit_std = s.tied_embed_init_std * s.model_dim**0.5  # of E h at step 0
        self.build(s, s.model_dim, s.vocab_size, s.head_rank)

    def build(self, s, D, V, R):
        """`add` the head's own parameters: head_matrix, head_vocab, head_scalar; tied has none."""

    def copy_embedding(self, E_VD):
        """What the head takes over from a new embedding; for most heads nothing."""

    def cap(self, z):
        """c tanh(z / c) in float32 or float64; the identity for c = 0."""
        z = at_least_fp32(z)
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def nll(self, h_ND, x_N, y_N, E_VD):
        """Negative log-likelihood of each target in nats, nll_N."""
        return F.cross_entropy(self.logits(h_ND, x_N, E_VD), y_N, reduction="none")

    def log_probs(self, h_ND, x_N, E_VD):
        """Normalised log-probabilities of the whole vocabulary in nats, NxV."""
        return F.log_softmax(self.logits(h_ND, x_N, E_VD), dim=-1)


def fan_in_normal(*shape):
    """Normal entries of variance 1 / fan-in: a product with them keeps a vector's variance."""
    return torch.randn(*shape) / shape[-1] ** 0.5


def orthogonal(rows, columns):
    return nn.init.orthogonal_(torch.empty(rows, columns))


class Tied(Head):
    """cap(E h) (Press and Wolf 2017)."""

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(h_ND, E_VD))


class Untied(Head):
    """cap(D h); D starts as a copy of E."""

    uses, head_lr = ("head_lr",), 0.004
    products_with_E = 0

    def build(self, s, D, V, R):
        self.add("head_vocab", D_VD=torch.zeros(V, D))

    @torch.no_grad()
    def copy_embedding(self, E_VD):
        self.D_VD.copy_(E_VD)

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(h_ND, self.D_VD))


class Factorized(Head):
    """cap(g C A h): a softmax bottleneck of rank R, g a learned scale (study A, H1 and H2)."""

    uses = ("head_lr", "head_matrix_lr", "head_rank")
    products_with_E = 0

    def build(self, s, D, V, R):
        self.add("head_matrix", A_RD=fan_in_normal(R, D))
        self.add("head_vocab", C_VR=fan_in_normal(V, R))
        self.add("head_scalar", g=torch.tensor(self.tied_logit_std))

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(h_ND, self.A_RD, self.C_VR * self.g))


class Simplex(Head):
    """cap(g C s), s = M softmax(S h) - 1, a point of the simplex, centred (study A, H6)."""

    uses = ("head_dim", "head_lr", "head_matrix_lr")
    products_with_E = 0

    def build(self, s, D, V, R):
        M = s.head_dim
        self.add("head_matrix", S_MD=fan_in_normal(M, D))
        self.add("head_vocab", C_VM=fan_in_normal(V, M))
        # S h is standard normal at step 0, so M softmax(S h) about lognormal, with variance e - 1
        self.add("head_scalar", g=torch.tensor(self.tied_logit_std / (math.e - 1) ** 0.5))

    def logits(self, h_ND, x_N, E_VD):
        corner_NM = torch.softmax(at_least_fp32(project(h_ND, self.S_MD)), dim=-1)
        s_NM = self.S_MD.size(0) * corner_NM - 1
        return self.cap(project(s_NM.to(h_ND.dtype), self.C_VM * self.g))


class Delta(Head):
    """cap((E + C A) h): the tied head and a correction of rank R; R = 0: a full one, C alone."""

    uses = ("head_lr", "head_matrix_lr", "head_rank", "head_start_frac")
    head_matrix_lr = 0.01

    def build(self, s, D, V, R):
        if R:
            self.add("head_matrix", A_RD=fan_in_normal(R, D))
        self.add("head_vocab", C_VR=torch.zeros(V, R or D))

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(h_ND, E_VD) + project(h_ND, *self.parameters()))


class Wide(Head):
    """cap(E h + C relu(A h)^2): R more features than the width, so logits of rank D + R."""

    uses = ("head_lr", "head_matrix_lr", "head_rank", "head_start_frac")
    head_matrix_lr = 0.01

    def build(self, s, D, V, R):
        self.add("head_matrix", A_RD=fan_in_normal(R, D))
        self.add("head_vocab", C_VR=torch.zeros(V, R))

    def logits(self, h_ND, x_N, E_VD):
        features_NR = F.relu(project(h_ND, self.A_RD)).square()
        return self.cap(project(h_ND, E_VD) + project(features_NR, self.C_VR))


class Bigram(Head):
    """cap(E h + C a[x]): the tied head and a factored bigram bias on the current token x."""

    uses = ("head_lr", "head_rank", "head_start_frac")
    head_lr = 0.004

    def build(self, s, D, V, R):
        self.add("head_vocab", a_VR=torch.randn(V, R), C_VR=torch.zeros(V, R))

    def logits(self, h_ND, x_N, E_VD):
        a_NR = F.embedding(x_N, self.a_VR).to(h_ND.dtype)
        return self.cap(project(h_ND, E_VD) + project(a_NR, self.C_VR))


class MixtureOfSoftmaxes(Head):
    """log sum_k pi_k softmax(cap(E (h + U_k V_k h))), pi = softmax(G h + b).

    Yang et al. 2018, with the tied embedding and low-rank projections. U = 0 starts at the tied
    head, where independent V_k let the components' gradients differ. The mixture over the
    vocabulary is never formed in training: log p(y) needs K cross-entropies.
    """

    uses = ("head_k", "head_matrix_lr", "head_rank", "head_start_frac")

    def build(self, s, D, V, R):
        K = self.products_with_E = s.head_k
        self.add("head_matrix", U_KDR=torch.zeros(K, D, R), V_KRD=fan_in_normal(K, R, D))
        self.add("head_scalar", gate_KD=torch.zeros(K, D), gate_bias_K=torch.zeros(K))

    def components(self, h_ND, E_VD):
        """The logits of one component after the other, NxV."""
        for U_DR, V_RD in zip(self.U_KDR, self.V_KRD):
            yield self.cap(project(h_ND + project(h_ND, V_RD, U_DR), E_VD))

    def log_pi(self, h_ND):
        """Log mixture weights, NxK."""
        gate_NK = at_least_fp32(project(h_ND, self.gate_KD)) + self.gate_bias_K
        return F.log_softmax(gate_NK, dim=-1)

    def nll(self, h_ND, x_N, y_N, E_VD):
        log_p = []
        for logits_NV in self.components(h_ND, E_VD):
            log_p.append(-F.cross_entropy(logits_NV, y_N, reduction="none"))
        return -torch.logsumexp(self.log_pi(h_ND) + torch.stack(log_p, dim=-1), dim=-1)

    def log_probs(self, h_ND, x_N, E_VD):
        log_p = [F.log_softmax(logits, dim=-1) for logits in self.components(h_ND, E_VD)]
        log_pi_KN1 = self.log_pi(h_ND).T[..., None]
        return torch.logsumexp(log_pi_KN1 + torch.stack(log_p), dim=0)


# The heads of both studies as they ran them, to show the cause of their figures: HEAD_VARIANT.


class FactorizedPR908(Factorized):
    """cap(C A h), orthogonal factors and no scale: |C A h| <= |h|, which bounds the logits."""

    g = 1.0

    def build(self, s, D, V, R):
        self.add("head_matrix", A_RD=orthogonal(R, D))
        self.add("head_vocab", C_VR=orthogonal(V, R))


class SimplexPR908(Simplex):
    """cap(C softmax(S h)), orthogonal S and C: a mean of the columns of C, so almost uniform."""

    def build(self, s, D, V, R):
        self.add("head_matrix", S_MD=orthogonal(s.head_dim, D))
        self.add("head_vocab", C_VM=orthogonal(V, s.head_dim))

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(torch.softmax(project(h_ND, self.S_MD), dim=-1), self.C_VM))


class MixturePR908(Head):
    """cap(sum_k pi_k C_k A_k h), pi = softmax(G h): a mixture of logits, so of rank K R."""

    uses = ("head_k", "head_lr", "head_matrix_lr", "head_rank")
    products_with_E = 0

    def build(self, s, D, V, R):
        K = s.head_k
        self.add("head_matrix", A_KRD=torch.stack([orthogonal(R, D) for _ in range(K)]))
        self.add("head_vocab", C_KVR=torch.stack([orthogonal(V, R) for _ in range(K)]))
        self.add("head_scalar", gate_KD=(2 * torch.rand(K, D) - 1) / D**0.5)

    def logits(self, h_ND, x_N, E_VD):
        pi_KN1 = torch.softmax(project(h_ND, self.gate_KD), dim=-1).T[..., None]
        z_NV = 0.0
        for pi_N1, A_RD, C_VR in zip(pi_KN1, self.A_KRD, self.C_KVR):
            z_NV = z_NV + pi_N1 * project(h_ND, A_RD, C_VR)
        return self.cap(z_NV)


class MixturePR266(MixtureOfSoftmaxes):
    """log sum_k pi_k softmax(E U_k V h), pi = softmax(G h): one V for all components, no cap."""

    uses = ("head_k", "head_matrix_lr", "head_rank")
    head_matrix_lr = 0.04  # study B's MATRIX_LR
    gate_bias_K = 0.0

    def build(self, s, D, V, R):
        K = self.products_with_E = s.head_k
        self.add("head_matrix", V_RD=0.02 * torch.randn(R, D), U_MR=0.02 * torch.randn(K * D, R))
        self.add("head_scalar", gate_KD=0.02 * torch.randn(K, D))

    def components(self, h_ND, E_VD):
        for U_DR in self.U_MR.chunk(self.products_with_E):
            yield at_least_fp32(project(h_ND, self.V_RD, U_DR, E_VD))


HEADS = dict(
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


def head_class(s):
    """The class of HEAD_TYPE, or of its HEAD_VARIANT; UserError where there is none."""
    if s.head_type not in HEADS:
        raise s.wrong("HEAD_TYPE", f"be one of {', '.join(HEADS)}")
    if not s.head_variant:
        return HEADS[s.head_type]
    variant = f"{s.head_type}/{s.head_variant}"
    if variant not in VARIANTS:
        raise s.wrong("HEAD_VARIANT", f"be empty, or one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def check_head(s):
    """Settings with the head's own rates filled in; UserError where its rules are broken."""
    head, named = head_class(s), f"HEAD_TYPE={s.head_type}"
    for name in s.given:
        users = [other for other, cls in HEADS.items() if name.lower() in cls.uses]
        if users and name.lower() not in head.uses:
            raise s.wrong(name, f"be unset: {named} does not use it ({', '.join(users)} does)")
    if s.head_rank == 0 and head is not Delta:
        raise s.wrong("HEAD_RANK", f"be at least 1 with {named}")
    if s.train_only == "head" and (s.head_type == "tied" or not s.head_trainable):
        raise s.wrong("TRAIN_ONLY", "be all where no head is trained")

    rates = {}
    for name in {"head_lr", "head_matrix_lr"} & set(head.uses):
        rates[name] = getattr(s, name) or getattr(head, name)
    return replace(s, **rates)


# ---- GPT: embeddings, blocks, head; the one place where a loss is computed -----------------------


MOST_LOGITS = 2**27  # of a softmax at a time: 131,072 tokens of 1,024, 16,384 of 8,192


class GPT(Module):
    """U-Net of blocks over token embeddings, and one output head.

    The blocks run in the order of `layers`, some twice while `looped`. From PARALLEL_FROM on
    attention and MLP have a lane each, which a learned share joins at the end (PR 1204).

    Tokens x_BT and targets y_BT (int64) give the mean negative log-likelihood in nats, a scalar.
    `compute_dtype` is that of activations and matrix products; None: the weights' own.
    """

    def __init__(self, s, compute_dtype=None):
        super().__init__()
        L, D = s.num_layers, s.model_dim
        self.settings, self.compute_dtype = s, compute_dtype
        self.tok_emb = Table(s.vocab_size, D)
        nn.init.normal_(self.tok_emb.weight, std=s.tied_embed_init_std)

        # what a setting leaves out is not there
        if s.smear_gate:
            self.smear = SmearGate(s)
        if s.bigram_hash:
            self.bigram = BigramHash(s)

        # the blocks, their order, and what leads past them
        rotary = Rotary(s)
        self.blocks = nn.ModuleList(Block(s, layer, rotary) for layer in range(L))
        self.layers, self.looped = layer_order(s), True
        if L > 1:
            self.add("scalar", skip_weights=torch.ones(L // 2, D))
            if s.skip_gates:
                self.add("scalar", skip_gates=torch.zeros(L // 2, D))
        if s.parallel_from < L:
            self.add("scalar", lane_share=torch.tensor(0.5))
        if s.value_embed:
            self.value_embed = ValueEmbedding(s)
        self.requires_grad_(s.train_only == "all")

        self.head = head_class(s)(s).requires_grad_(s.head_trainable)
        self.head.copy_embedding(self.tok_emb.weight)
        if self.head.products_with_E:
            self.tok_emb.roles = dict(weight="tied")

    def hidden(self, x_BT):
        """The final normed hidden states h_BTD."""
        s, L = self.settings, len(self.blocks)
        starts_BT = (x_BT == BOS_ID).index_fill(1, x_BT.new_zeros(1), True)
        dtype = self.compute_dtype or self.tok_emb.weight.dtype

        # embeddings: of the token, of the token before, of their pair, and for the values
        x, bigrams, values = self.tok_emb(x_BT).to(dtype), [], {}
        if s.bigram_hash:
            bigrams = self.bigram(x_BT, starts_BT, dtype)
        if s.value_embed:
            values = self.value_embed(x_BT, dtype)
        bigram_at_input = s.bigram_hash and s.bigram_at == "input"
        if bigram_at_input:  # as in PR 1435, which norms before the gate
            x = norm(x + bigrams.pop())
        if s.smear_gate:
            x = self.smear(x, starts_BT)
        if not bigram_at_input:
            x = norm(x)
        x0 = x

        # the first half of the layers stores skips; as many layers as there are weights take them
        # back, the last one first: a loop stores more
        layers = self.layers if self.looped else range(L)
        half, skips, lane = len(layers) // 2, [], None
        for place, layer in enumerate(layers):
            block = self.blocks[layer]
            if half <= place < half + L // 2 and lane is None:
                x = self.skip(x, skips.pop(), place - half)
            if bigrams:
                x = x + bigrams[layer]
            if lane is None and layer >= s.parallel_from:
                lane = x
            x = block.attend(x, x0, values.get(layer))
            if lane is None:
                x = block.feed_forward(x)
            else:
                lane = block.feed_forward(lane)
            if place < half:
                skips.append(x)
        if lane is not None:
            x = torch.lerp(lane, x, self.lane_share.to(dtype))
        return norm(x)

    def skip(self, x, skipped, index):
        """The stream with what an early layer has stored."""
        skipped = self.skip_weights[index].to(x.dtype) * skipped
        if not self.settings.skip_gates:
            return x + skipped
        return torch.lerp(skipped, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype))

    def nll(self, x_BT, y_BT, last=0):
        """Negative log-likelihoods in nats, of each sequence's last `last` targets; 0: of all."""
        h_ND = self.hidden(x_BT)[:, -last:].flatten(0, 1)
        x_N, y_N = x_BT[:, -last:].flatten(), y_BT[:, -last:].flatten()
        E_VD = self.tok_emb.weight
        chunk = MOST_LOGITS // len(E_VD)
        if len(h_ND) <= chunk:
            return self.head.nll(h_ND, x_N, y_N, E_VD).view(len(x_BT), -1)

        # with a large vocabulary, a chunk of tokens at a time, recomputed in backward
        nll = []
        for h, x, y in zip(h_ND.split(chunk), x_N.split(chunk), y_N.split(chunk)):
            nll.append(checkpoint(self.head.nll, h, x, y, E_VD, use_reentrant=False))
        return torch.cat(nll).view(len(x_BT), -1)

    def forward(self, x_BT, y_BT):
        return self.nll(x_BT, y_BT).mean()

    def parameter_roles(self):
        """The role of every parameter by its name; RuntimeError for one that no module declares."""
        roles = {}
        for name, _ in self.named_parameters():
            owner, _, own = name.rpartition(".")
            declared = getattr(self.get_submodule(owner), "roles", {})
            if own not in declared:
                raise RuntimeError(f"parameter {name} has no role: no optimizer would train it")
            roles[name] = declared[own]
        return roles


def build_model(s, world, state=None):
    """The model on the world's device, with given weights, or with the seed's."""
    torch.manual_seed(s.seed)
    model = GPT(s, world.compute_dtype(s)).to(world.device)
    if state is not None:
        model.load_state_dict(state)
    return model


# ---- Optimizers: Muon for matrices, Adam for the rest; every parameter in exactly one group ------


@dataclass(frozen=True)
class Role:
    """How a parameter is trained and stored: names of settings, and its grid's fineness.

    The grid is `finer` than the artifact's common step by so much; 0: exact float32.
    """

    optimizer: str
    learning_rate: str
    weight_decay: str
    finer: float
    start: str = ""  # the setting that says from which share of training on it is trained

    def fineness(self, rows):
        """Of a matrix of so many rows: where they make logits, one of many matters less often."""
        return max(min(self.finer, 2), self.finer * 1024 / max(rows, 1024))


# fmt: off
ROLES = dict(
    #                optimizer  learning rate     weight decay         finer
    matrix=Role(     "muon",   "matrix_lr",      "muon_weight_decay",  1),
    table=Role(      "adam",   "tied_embed_lr",  "adam_wd",            2),
    tied=Role(       "adam",   "tied_embed_lr",  "adam_wd",           16),  # it also makes the logits
    scalar=Role(     "adam",   "scalar_lr",      "scalar_wd",          0),
    head_matrix=Role("muon",   "head_matrix_lr", "muon_weight_decay",  1, "head_start_frac"),
    head_vocab=Role( "adam",   "head_lr",        "adam_wd",            8, "head_start_frac"),
    head_scalar=Role("adam",   "scalar_lr",      "scalar_wd",          0, "head_start_frac"),
)
# fmt: on


def newton_schulz(G, dtype):
    """Nearly the orthogonal factor of each matrix of a batch (Muon, Jordan et al. 2024)."""
    if G.size(-2) > G.size(-1):
        return newton_schulz(G.mT, dtype).mT
    X = G.to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with decoupled weight decay.

    Equals torch.optim.Muon at constant momentum, but takes all parameters of a group, which have
    one shape (in 3-D: stacks), as one batch of matrices, split over the ranks. These must hold
    equal gradients. `row_norm` brings the rows of the update to one norm first (MuonEq-R).
    """

    def __init__(self, groups, world, dtype, row_norm=False):
        super().__init__(groups, dict(momentum=0.95))
        self.world, self.dtype, self.row_norm = world, dtype, row_norm
        for group in self.param_groups:
            params = group["params"]
            self.state[params[0]]["momentum"] = torch.zeros_like(torch.stack(params))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, mu, world = group["params"], group["momentum"], self.world
            gradient = torch.stack([p.grad for p in params])
            momentum = self.state[params[0]]["momentum"]
            momentum.mul_(mu).add_(gradient)

            # each rank orthogonalises its share of the stack
            stack = gradient.add_(momentum, alpha=mu).flatten(0, -3)
            if self.row_norm:
                stack = F.normalize(stack, dim=-1, eps=1e-7)
            padded = F.pad(stack, (0, 0, 0, 0, 0, -len(stack) % world.size))
            share = padded.chunk(world.size)[world.rank]
            update = world.gather(newton_schulz(share, self.dtype))[: len(stack)]

            stretch = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            updates = update.view_as(gradient).to(params[0].dtype).unbind()
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"] * stretch)


def adam_with_state(groups):
    """AdamW whose state is there before the first step: a checkpoint is compared with it."""
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for group in groups:
        for p in group["params"]:
            adam.state[p] = dict(
                step=torch.zeros((), device=p.device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
    return adam


def build_optimizers(model, s, world):
    """Adam and Muon over all trainable parameters, a group for each role and shape.

    Every group carries its unscaled rate, `base_lr`, and the share of training at which it starts.
    """
    adam, muon, roles = {}, {}, model.parameter_roles()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        role = ROLES[roles[name]]
        rate, decay = getattr(s, role.learning_rate), getattr(s, role.weight_decay)
        facts = dict(lr=rate, base_lr=rate, weight_decay=decay, start=getattr(s, role.start, 0.0))
        groups = dict(adam=adam, muon=muon)[role.optimizer]
        group = groups.setdefault((role, p.shape), dict(params=[], **facts))
        group["params"].append(p)

    optimizers = []
    if adam:
        optimizers.append(adam_with_state([*adam.values()]))
    if muon:
        dtype = model.compute_dtype or torch.float32
        optimizers.append(Muon([*muon.values()], world, dtype, s.muon_row_norm))
    return optimizers


# ---- Schedule: pure functions of step and time ---------------------------------------------------


def ramp(remaining, length):
    """1, then linear to 0 over the last `length`."""
    if length <= 0:
        return 1.0
    return min(1.0, max(remaining, 0.0) / length)


def learning_rate_scale(step, seconds, s):
    """1, then linear to 0 over the warm-down, by whichever end comes first.

    The warm-down lasts WARMDOWN_ITERS steps, or WARMDOWN_FRAC of the run if that is shorter.
    """
    by_steps = ramp(s.iterations - step, min(s.warmdown_iters, s.warmdown_frac * s.iterations))
    cap, step_seconds = s.max_wallclock_seconds, seconds / max(step, 1)
    if not cap:
        return by_steps
    by_time = ramp(cap - seconds, min(s.warmdown_iters * step_seconds, s.warmdown_frac * cap))
    return min(by_steps, by_time)


def share_done(step, seconds, s):
    """The share of the run that is over, by whichever end comes first; 1 or more at the end."""
    if step >= s.iterations:
        return 1.0
    return max(step / s.iterations, seconds / (s.max_wallclock_seconds or math.inf))


def is_over(step, seconds, ahead, s):
    """Whether training ends: at ITERATIONS, or where the cap is nearer than after another step.

    `ahead` steps are enqueued on the device that the clock has not seen.
    """
    expected = seconds + (ahead + 0.5) * seconds / max(step, 1)
    return step >= s.iterations or 0 < s.max_wallclock_seconds <= expected


def momentum_at(step, s):
    """Muon's momentum: linear from its start to its end over the warm-up."""
    if step >= s.muon_momentum_warmup_steps:
        return s.muon_momentum
    done = step / s.muon_momentum_warmup_steps
    return (1 - done) * s.muon_momentum_warmup_start + done * s.muon_momentum


def average_decay(step, s):
    """Of the weights' moving average: short runs do not average their initial weights."""
    return min(s.ema_alpha, (1 + step) / (10 + step))


# ---- Evaluate: exact bits per byte, plain or sliding ---------------------------------------------


def windows(tokens_N, stride, s, world):
    """This rank's batches, of one shape: x_BT, y_BT, which targets exist, how many last ones count.

    Window k reads T tokens from k stride on and scores what none before it did; the first that
    reaches the end is the last.
    """
    T, end, device = s.train_seq_len, len(tokens_N), world.device
    limit = dict(cuda=131072, cpu=16384)[device.type]
    B = max(1, min(s.val_batch_size // world.size, limit) // T)
    starts = torch.arange(0, max(end - 1 - T + stride, 1), stride, device=device)
    first = B
    if stride < T:  # the first window scores more than the others: it is a batch of its own
        first = 1
    batches = [starts[:first], *filter(len, starts[first:].split(B))]

    share = batches[world.rank :: world.size]
    for i, batch in enumerate(share):
        world.heed()
        world.progress(i, len(share))
        # what fills up the batch lies behind all targets
        starts_B = F.pad(batch, (0, B - len(batch)), value=end)
        index = starts_B[:, None] + torch.arange(T + 1, device=device)
        sequence = tokens_N[index.clamp(max=end - 1)]
        scored = T if batch is batches[0] else stride
        yield sequence[:, :-1], sequence[:, 1:], index[:, 1:] < end, scored


@torch.inference_mode()
def evaluate(model, validation, stride, s, world):
    """Mean loss in nats a token, and bits per byte, over all targets, each scored once."""
    tokens_N, byte_counts = validation
    nll = world.compiled(model.nll, s)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, bytes, tokens
    for x_BT, y_BT, exists_BT, scored in windows(tokens_N, stride, s, world):
        exists = exists_BT[:, -scored:].double()
        text_bytes = byte_counts(x_BT[:, -scored:], y_BT[:, -scored:])
        nats = nll(x_BT, y_BT, scored)
        sums += torch.stack(((nats * exists).sum(), (text_bytes * exists).sum(), exists.sum()))
    nats, text_bytes, count = world.sum(sums).tolist()
    if not text_bytes:
        raise UserError(f"EVAL_SPLIT={s.eval_split}: holds control tokens and no text")
    return nats / count, nats / math.log(2) / text_bytes


@torch.inference_mode()
def spectrum(model, tokens_N, s):
    """How far the log-probabilities exceed rank D, over 65,536 contexts or all there are.

    In float64 from the hidden states on, each context's mean over V subtracted; by the eigenvalues
    of the V x V Gram matrix.
    """
    head, E_VD = copy.deepcopy(model.head).double(), model.tok_emb.weight.double()
    T, V = s.train_seq_len, s.vocab_size
    contexts = min(math.ceil(65536 / T), len(tokens_N) // T) * T
    gram_VV = E_VD.new_zeros(V, V)
    for x_T in tokens_N[:contexts].split(T):
        h_TD = model.hidden(x_T[None])[0].double()
        z_TV = head.log_probs(h_TD, x_T, E_VD)
        z_TV -= z_TV.mean(dim=-1, keepdim=True)
        gram_VV.addmm_(z_TV.T, z_TV)

    energy_V = torch.linalg.eigvalsh(gram_VV).flip(0)
    share_V = energy_V / energy_V.sum()
    return dict(
        contexts=contexts,
        rank_9999=1 + int((share_V.cumsum(0) < 0.9999).sum()),
        energy_beyond_model_dim=share_V[s.model_dim :].sum().item(),
    )


# ---- Artifact: round, fit, encode, decode --------------------------------------------------------
#
# The file, in its order; numbers are little-endian:
#
#     8 bytes     "GPTHEAD6"
#     32          SHA-256 of all that follows
#     a line      JSON: the settings of model and evaluation; the tensors follow from them
#     ...         payload, packed by gzip (COMPRESS_ALGO=zlib) or zstd:
#                     float32, all first bytes, then all second ...: for each parameter, in the
#                     model's order, a matrix's scale or all values of what is no matrix
#                     for each matrix, in the model's order:
#                         1 byte          n, how many low bits are apart
#                         a byte each     int8: code >> n, or -128 where that does not fit
#                         2 bytes each    int16: what did not fit, in order
#                         n bits each     bit n - 1 of all codes ..., bit 0, padded to whole bytes
#
# A weight is its matrix's scale times a coordinate of the lattice point that its code stands for,
# with the codes of seven others; with a negative scale (a coarse grid), its size times the code.

MAGIC = b"GPTHEAD6"  # its last byte is the version
STORED = ("model", "eval")  # the scopes of the settings in the header
FINEST, COARSEST = 2.0**-7, 2.0**3  # steps over a matrix's RMS; the finest is finer than int8
# a step where plain rounding gets better: 0.95 for Laplace weights, 1.44 for Gaussian ones
PLAIN_ABOVE = 1.25
LARGEST = 32000  # of a matrix over its scale: codes have 16 bits
NO_ARTIFACT = "is no artifact of this program, or a damaged one"


def nearest_d8(x):
    """Nearest integers of even sum over dimension -2, and their squared distances.

    Where the sum is odd, the one rounded worst gives way.
    """
    q = x.round()
    error = x - q
    worst = error.abs().argmax(-2, keepdim=True)
    other_way = torch.copysign(q.sum(-2, keepdim=True) % 2, error.gather(-2, worst))
    q.scatter_add_(-2, worst, other_way)
    return q, (x - q).square().sum(-2, keepdim=True)


def to_codes(x):
    """Integers for the nearest points of the lattice E8: D8 and D8 + 1/2 (Conway and Sloane 1982).

    A point is 8 rows of a column. At equal entropy the squared error is 14% below that of plain
    rounding on fine grids, up to about 0.3 RMS. The last rows, fewer than 8, are rounded plainly.
    """
    whole = x.size(-2) // 8 * 8
    x_8 = x[..., :whole, :].unflatten(-2, (whole // 8, 8))
    q, q_error = nearest_d8(x_8)
    half, half_error = nearest_d8(x_8 - 0.5)
    half[..., :1, :] += 1  # both sums are even: an odd one says D8 + 1/2
    q = torch.where(half_error < q_error, half, q)
    return torch.cat((q.flatten(-3, -2), x[..., whole:, :].round()), dim=-2)


def from_codes(codes):
    """The points of these codes, in their place."""
    whole = codes.size(-2) // 8 * 8
    q = codes[..., :whole, :].unflatten(-2, (whole // 8, 8))
    odd = q.sum(-2, keepdim=True) % 2
    q[..., :1, :] -= odd
    q += odd / 2
    return codes


def quantized(state, roles, step):
    """In stacks of one role and shape: names of matrices, their codes and their scales.

    A scale is `step` times its matrix's RMS over the role's fineness, or what its largest entry
    needs where that is coarser.
    """
    stacks = {}
    for name, weight in state.items():
        if ROLES[roles[name]].finer:
            stacks.setdefault((roles[name], weight.shape), []).append(name)
    for (role, shape), names in stacks.items():
        own_step = step / ROLES[role].fineness(shape[-2])
        rows = torch.stack([state[name].flatten(0, -2) for name in names])
        rms = rows.double().square().mean((1, 2), keepdim=True).sqrt()
        largest = rows.abs().amax((1, 2), keepdim=True)
        scale = torch.maximum((rms * own_step).float(), largest / LARGEST)
        exact = rows.div_(scale).nan_to_num_()  # 0 / 0 in a matrix of zeros
        if own_step > PLAIN_ABOVE:
            yield names, exact.round(), -scale
        else:
            yield names, to_codes(exact), scale


def dequantized(codes, scale):
    """The weights of a matrix's codes, or a stack's, in the place of the codes."""
    if (scale < 0).any():
        return codes.mul_(-scale)
    return from_codes(codes).mul_(scale)


@contextmanager
def rounded_weights(model, roles, step):
    """Inside, matrices lie on the export's grid of this step (0: as they are).

    Gradients are taken there: late QAT.
    """
    if not step:
        yield
        return
    weights = model.state_dict()
    masters = copy.deepcopy(weights)
    try:
        for names, codes, scales in quantized(masters, roles, step):
            for name, rounded in zip(names, dequantized(codes, scales)):
                weights[name].copy_(rounded.view_as(weights[name]))
        yield
    finally:
        model.load_state_dict(masters)


# each of these pairs is one stretch of the file, written and read


def encode_floats(tensors):
    floats = torch.cat([tensor.flatten() for tensor in tensors])
    return [plane.numpy().tobytes() for plane in floats.view(torch.uint8).view(-1, 4).T]


def decode_floats(raw, count):
    planes = np.frombuffer(raw.read(4 * count), np.uint8).reshape(4, count)
    return torch.from_numpy(planes.T.copy()).view(torch.float32).flatten()


def encode_integers(codes):
    """The parts of a matrix's codes; n follows from their spread."""
    n = int(codes.abs().mean() / 12.8).bit_length()
    integers = codes.flatten().int().numpy()
    upper = integers >> n
    far = abs(upper) > 127
    parts = [bytes([n]), np.where(far, -128, upper).astype(np.int8).tobytes()]
    parts.append(upper[far].astype("<i2").tobytes())
    for bit in reversed(range(n)):
        parts.append(np.packbits(integers >> bit & 1).tobytes())
    return parts


def decode_integers(raw, count):
    """The next `count` codes, flat, float32."""
    n, size = raw.read(1)[0], math.ceil(count / 8)
    expect(n <= 12, "a code has more than 16 bits")
    codes = np.frombuffer(raw.read(count), np.int8, count).astype(np.float32)
    far = codes == -128
    codes[far] = np.frombuffer(raw.read(2 * far.sum()), "<i2")
    for _ in range(n):
        codes *= 2
        codes += np.unpackbits(np.frombuffer(raw.read(size), np.uint8, size), count=count)
    return torch.from_numpy(codes)


def compress(parts, codec):
    """One stream, each part with statistics of its own.

    Rounded weights hold no repeats: a search for them costs bytes over Huffman's code alone.
    """
    if codec == "zstd":
        stream = zstandard.ZstdCompressor(level=1).compressobj()
        block = zstandard.COMPRESSOBJ_FLUSH_BLOCK
    else:
        stream = zlib.compressobj(wbits=31, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)  # 31: gzip
        block = zlib.Z_FULL_FLUSH
    packed = bytearray()
    for part in filter(None, parts):
        packed += stream.compress(part) + stream.flush(block)
    return packed + stream.flush()


def inflate(packed, codec):
    """The parts as a file, inflated only as far as it is read."""
    if codec == "zstd":
        zstd = zstandard.ZstdDecompressor(max_window_size=2**23)
        return zstd.stream_reader(packed, read_across_frames=True)
    return gzip.GzipFile(fileobj=io.BytesIO(packed))


def encode_payload(state, roles, step, codec):
    """The compressed floats, then the codes of all matrices."""
    codes_of, floats = {}, dict(state)
    for names, codes, scales in quantized(state, roles, step):
        codes_of.update(zip(names, codes))
        floats.update(zip(names, scales))
    parts = encode_floats(floats.values())
    for name in state:
        if name in codes_of:
            parts += encode_integers(codes_of[name])
    return compress(parts, codec)


def decode_payload(s, payload):
    """The weights, float32, of the model of these settings; raises anything for damage."""
    with torch.device("meta"):  # names and shapes, no memory
        model = GPT(s)
    roles, count = model.parameter_roles(), count_values(model.parameters())
    # Huffman's code takes a bit a weight or more; zstd less in a table that training never touched
    expect(count <= 32 * len(payload) + 2**26, f"{len(payload)} bytes cannot hold {count} weights")

    sizes = []
    for name, p in model.named_parameters():
        sizes.append(1 if ROLES[roles[name]].finer else p.numel())
    raw, state = inflate(payload, s.compress_algo), {}
    floats = decode_floats(raw, sum(sizes)).split(sizes)
    for (name, p), weight in zip(model.named_parameters(), floats):
        if ROLES[roles[name]].finer:
            codes = decode_integers(raw, p.numel()).view(-1, p.size(-1))
            weight = dequantized(codes, weight)
        state[name] = weight.view(p.shape)
    expect(not raw.read(1), "the payload holds more than its tensors")
    return state


def encode(state, roles, s, step):
    """The artifact's bytes, a pure function of the arguments."""
    header = json.dumps(s.as_dict(STORED)).encode()
    body = header + b"\n" + encode_payload(state, roles, step, s.compress_algo)
    return MAGIC + hashlib.sha256(body).digest() + body


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: where it comes from, as `VARIABLE=path`, its settings, its payload."""

    origin: str
    stored: dict
    payload: bytes


def open_artifact(origin, blob):
    """The Artifact of a file's bytes; UserError for what is none, or is damaged."""
    with blaming(origin, NO_ARTIFACT):
        expect(blob[:8] == MAGIC, f"its format is {blob[:8]}, not {MAGIC}")
        expect(hashlib.sha256(blob[40:]).digest() == blob[8:40], "checksum mismatch")
        end = blob.index(b"\n", 40, 100_000)
        settings = json.loads(blob[40:end])
        stored = Hyperparameters().as_dict(STORED)  # for settings that are newer than the file
        expect(settings.keys() <= stored.keys(), "it has settings unknown here")
        for name, value in settings.items():
            stored[name] = parse(name.upper(), as_text(value), name)
        check(check_head(Hyperparameters(**stored)))
    return Artifact(origin, stored, blob[end + 1 :])


def artifact_weights(artifact):
    """The weights of an artifact by name, float32; UserError for damage."""
    with blaming(artifact.origin, NO_ARTIFACT):
        return decode_payload(check_head(Hyperparameters(**artifact.stored)), artifact.payload)


def count_values(tensors):
    return sum(tensor.numel() for tensor in tensors)


def expect(condition, otherwise):
    """ValueError, saying what is otherwise."""
    if not condition:
        raise ValueError(otherwise)


def fit(size, limit):
    """The finest step with size(step) <= limit, to 0.1% of it; COARSEST if nothing fits.

    Weights that lie on a grid already take fewer bytes on it than on a coarser one, so a ladder of
    octaves is climbed from the finest step on; then its last octave is bisected.
    """
    fitting = FINEST
    while fitting < COARSEST and size(fitting) > limit:
        fitting *= 2
    if fitting == FINEST:
        return FINEST

    too_fine, found = fitting / 2, 0
    for _ in range(20):
        if found > 0.999 * limit:
            break
        middle = math.sqrt(too_fine * fitting)
        bytes_there = size(middle)
        if bytes_there > limit:
            too_fine = middle
        else:
            fitting, found = middle, bytes_there
    return fitting


def fit_sample(state, roles, codec, limit):
    """`fit` of every n-th column: half a million weights tell the step well enough."""
    count = count_values(state.values())
    every, sample = max(1, count // 2**19), {}
    for name, weight in state.items():
        sample[name] = torch.atleast_1d(weight)[..., ::every].cpu()
    share = count_values(sample.values()) / count
    return fit(lambda step: len(encode_payload(sample, roles, step, codec)), limit * share)


def pack(state, roles, s, limit):
    """The finest artifact within `limit` bytes, and its step; the same for the same weights."""
    state = {name: weight.cpu() for name, weight in state.items()}
    step = fit(lambda step: len(encode(state, roles, s, step)), limit)
    return encode(state, roles, s, step), step


def read_artifact(variable, name, world):
    """The Artifact of a file on rank 0's disk; UserError, naming the variable."""
    origin, blob = f"{variable}={name}", b""
    with blaming(f"{origin}: must name an artifact to read"):
        if world.rank == 0:
            blob = Path(name).read_bytes()
    return open_artifact(origin, world.agree(blob))


def adopt(model, artifact, weights, s):
    """Start a model from an artifact's trunk, and from its head if that is the same; says which."""
    if s.as_dict(("model",)).items() <= artifact.stored.items():
        model.load_state_dict(weights)
        return "trunk and head"
    own_head = model.head.state_dict(prefix="head.")
    model.load_state_dict({**weights, **own_head}, strict=False)
    model.head.copy_embedding(model.tok_emb.weight)
    return "trunk"


# ---- Run folder: everything of a run lies in runs/<RUN_ID>/ --------------------------------------

# this script's bytes: they count against the cap
source = functools.cache(Path(__file__).read_bytes)


class RunLog:
    """train.log and metrics.jsonl of a run, and the console; without a folder the console alone."""

    def __init__(self, folder):
        self.folder = folder

    def append(self, name, line):
        if self.folder is not None:
            path = self.folder / name
            with blaming(f"{path}: cannot be written"):
                with open(path, "a", encoding="utf-8", errors="backslashreplace") as out:
                    out.write(line + "\n")

    def write(self, line, **metrics):
        """One log line; `metrics`, where given, become one JSON object."""
        with suppress(OSError, ValueError):  # the console may be gone; the log is not
            print(line, flush=True)
        self.append("train.log", line)
        if metrics:
            self.append("metrics.jsonl", json.dumps(metrics))

    def opening(self, s, world, data, facts):
        """Versions, hashes, machine, data and every resolved setting: enough to run it again."""
        versions = f"numpy {np.__version__} sentencepiece {sentencepiece.__version__}"
        self.write(f"python {sys.version.split()[0]} {versions}")
        for name, value in facts.items():
            self.write(f"{name}:{value}")
        self.write(f"hardware: {world.hardware()}; compute dtype {world.compute_dtype(s)}")
        for name, value in s.as_dict().items():
            self.append("train.log", f"{name.upper()}={as_text(value)}")
        self.write(data)
        if world.device.type == "cpu":
            self.write("no CUDA: ATTN_BACKEND, USE_FA3, FLASH_ATTN_*, SKIP_COMPILE=0 are unused")


def check_finite(loss, step):
    if not math.isfinite(loss):
        raise Diverged(
            f"step {step}: the loss is {loss}; "
            "lower the learning rates; the last good checkpoint, if any, stays"
        )


def claim_folder(s):
    """The run's folder and its lock, ours while this process lives; UserError if it is in use."""
    folder = Path("runs") / s.run_id
    with blaming(f"RUN_ID={s.run_id}: {folder} cannot be used"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"RUN_ID={s.run_id}: that run is in progress; wait for it or choose another name"
            ) from None
        for path in folder.iterdir():
            if path.suffix == ".part":  # of a run that was killed while it wrote
                path.unlink()
    return folder, lock


def earlier_run(folder, s, facts):
    """A finished run's result and an interrupted one's checkpoint, None where there is none.

    UserError for a damaged one, or one of other settings, data, source or torch.
    """
    finished, saved = folder / "submission.json", folder / "checkpoint.pt"
    result = checkpoint = None
    then = {}
    if finished.exists():
        with blaming(finished, "is damaged, delete it"):
            result = json.loads(finished.read_text())
            data, start = result["data_sha256"], result["init_sha256"]
            then = dict(result["settings"], data_sha256=data, init_sha256=start)
            figures = result["val_bpb"] + result["bytes_total"]
            expect(math.isfinite(figures), "a figure is no number")
    elif saved.exists():
        with blaming(saved, "is damaged, delete it"):
            with zipfile.ZipFile(saved) as archive:  # torch does not look at its checksums
                expect(archive.testzip() is None, "checksum mismatch")
            checkpoint = torch.load(saved, map_location="cpu", weights_only=True)
            then = {**checkpoint["settings"], **checkpoint["facts"]}
            numbers = checkpoint["seconds"] + checkpoint["grid"]
            expect(math.isfinite(numbers), "a number is none")

    now = {**s.as_dict(), **facts}
    for name, value in now.items():
        if SCOPES.get(name) != "free" and then.get(name, value) != value:
            earlier = f"was run with {name.upper()}={as_text(then[name])}, not {as_text(value)}"
            raise UserError(f"RUN_ID={s.run_id}: {earlier}; choose another RUN_ID")
    return result, checkpoint


# ---- Train: the loop reads like the algorithm ----------------------------------------------------


class Clock:
    """Seconds between `start` and `stop`, added up; the device is waited for at both."""

    def __init__(self, world, seconds=0.0):
        self.device = torch.get_device_module(world.device)
        self.banked, self.started = seconds, math.inf  # inf: it stands still

    def seconds(self):
        return self.banked + max(0.0, time.perf_counter() - self.started)

    def start(self):
        self.device.synchronize()
        self.started = time.perf_counter()
        return self

    def stop(self):
        self.device.synchronize()
        self.banked, self.started = self.seconds(), math.inf
        return self.banked


class Trainer:
    """All that changes in training and a checkpoint holds: model, optimizers, average, clock."""

    def __init__(self, model, s, world, facts=()):
        self.model, self.settings, self.world = model, s, world
        self.facts = dict(facts)  # hashes of source and data, versions
        self.roles, self.parameters = model.parameter_roles(), list(model.parameters())
        self.loss = world.compiled(model, s)
        self.optimizers = build_optimizers(model, s, world)
        self.weights = [*model.state_dict().values()]  # the parameters, detached
        self.average = copy.deepcopy(self.weights) if s.use_ema else []
        self.steps, self.clock = 0, Clock(world)
        self.grid = 0.0  # the export's step that late QAT trains through; 0: not yet
        self.whole = True  # False while a step is applied

    def step(self, batches, scale, share):
        """Train on this rank's micro-batches; the mean loss of all ranks, a scalar on the device.

        `scale` is that of the learning rates, `share` the share of the run that is over.
        """
        s = self.settings
        self.model.looped = share >= s.loop_start_frac

        # gradient of the mean loss
        total = torch.zeros((), device=self.world.device)
        with rounded_weights(self.model, self.roles, self.grid):
            for x_BT, y_BT in batches:
                loss = self.loss(x_BT, y_BT) / len(batches)
                loss.backward()
                total += loss.detach()
        if self.steps == 0:
            self.check_gradients()

        # this step's rates; what is not yet trained has no part in the gradient's norm
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if share < group["start"]:
                    group["lr"] = 0.0
                    torch._foreach_zero_([p.grad for p in group["params"]])
                group["momentum"] = momentum_at(self.steps, s)  # Adam has its own

        # over all ranks
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.world.average([*gradients, total])
        if s.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, s.grad_clip_norm)

        # the step itself, and the moving average
        self.whole = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if s.use_ema:
            torch._foreach_lerp_(self.average, self.weights, 1 - average_decay(self.steps, s))
        self.steps, self.whole = self.steps + 1, True
        return total

    def check_gradients(self):
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.grad is None:
                raise RuntimeError(f"no gradient reached {name}: it would never train")

    def exported(self):
        """The weights that the artifact will hold, by name: the average, or the last ones."""
        return dict(zip(self.roles, self.average or self.weights))

    def tensors(self):
        """All that training changes on the device, in a fixed order."""
        tensors = [*self.weights, *self.average]
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                tensors += state.values()
        return tensors

    def state(self):
        """What a checkpoint holds, beside the settings."""
        return dict(
            facts=self.facts,
            steps=self.steps,
            seconds=self.clock.seconds(),
            grid=self.grid,
            tensors=self.tensors(),
        )

    def restore(self, state):
        """Take over a state; raises anything, and changes nothing, where that is none of this run."""
        pairs = list(zip(self.tensors(), state["tensors"], strict=True))
        for tensor, saved in pairs:
            same = (tensor.shape, tensor.dtype) == (saved.shape, saved.dtype)
            expect(same, "it has other tensors")
        expect(state["steps"] in range(self.settings.iterations + 1), "its step is not the run's")

        for tensor, saved in pairs:
            tensor.copy_(saved)
        self.grid, self.clock = state["grid"], Clock(self.world, state["seconds"])
        self.steps, self.whole = state["steps"], True

    def save(self, log):
        """Write checkpoint.pt on rank 0, unless the state is broken: then the one before stays."""
        good = self.whole and nn.utils.get_total_norm(self.weights).isfinite()
        if good and log.folder is not None:
            buffer = io.BytesIO()
            torch.save(dict(self.state(), settings=self.settings.as_dict()), buffer)
            write_whole(log.folder / "checkpoint.pt", buffer.getvalue())
        return good

    def begin(self, checkpoint, shards, log):
        """The start, or a checkpoint's state; then WARMUP_STEPS steps, which are undone."""
        s, count = self.settings, count_values(self.parameters)
        needed = 50 * count  # bytes: two checkpoints and the artifact
        if log.folder is not None and shutil.disk_usage(log.folder).free < needed:
            raise UserError(f"{log.folder}: has less than {needed} bytes free; free the disk")

        if checkpoint is None:
            log.write(f"model_params:{count}")
        else:
            with blaming(f"runs/{s.run_id}/checkpoint.pt", "is damaged, delete it"):
                self.restore(checkpoint)
            log.write(f"resumed at step {self.steps}")
        if self.loss is not self.model:
            log.write("compiling: the first steps take minutes, outside the clock")
        before = copy.deepcopy(self.state())
        try:
            for step in range(min(s.warmup_steps, s.iterations)):
                share = float(step % 2)  # both graphs, where LOOP_LAYERS run twice later on
                self.step(train_batch(shards, step, s, self.world), 1.0, share)
        finally:
            self.restore(before)

    def validate(self, validation, log):
        """Score the present weights, plainly, and log it."""
        s = self.settings
        loss, bpb = evaluate(self.model, validation, s.train_seq_len, s, self.world)
        check_finite(loss, self.steps)
        text = f"val_loss:{loss:.4f} val_bpb:{bpb:.4f}"
        self.record(log, "val", text, val_loss=loss, val_bpb=bpb)

    def record(self, log, kind, text, **figures):
        """A line of the log about the present step, and its figures in metrics.jsonl."""
        s, step, seconds = self.settings, self.steps, self.clock.seconds()
        each = 1000 * seconds / max(step, 1)
        left = max(0.0, seconds / (share_done(step, seconds, s) or 1.0) - seconds)
        timing = f"train_time:{1000 * seconds:.0f}ms step_avg:{each:.2f}ms eta:{left:.0f}s"
        line = f"step:{step}/{s.iterations} {text} {timing}"
        log.write(line, kind=kind, step=step, train_seconds=seconds, **figures)

    def start_late_qat(self, log):
        """From now on train through the rounding at which the present weights would fit the cap."""
        s, weights = self.settings, self.model.state_dict()
        limit = s.size_limit_bytes - len(source())
        step = fit_sample(weights, self.roles, s.compress_algo, limit)
        self.grid = self.world.agree(step)
        log.write(f"late_qat: from step {self.steps}, quantization step {self.grid:.4g}")


def send_loss(loss, step):
    """A step's loss on its way to the host, and the event after which it is there."""
    host, event = loss.to("cpu", non_blocking=True), torch.get_device_module(loss.device).Event()
    event.record()
    return step, host, event


def await_loss(step, host, event):
    """That loss: it waits for its step, not for later ones. UserError where it is no number."""
    event.synchronize()
    check_finite(host.item(), step)
    return host.item()


def train(trainer, shards, validation, log):
    """Train until ITERATIONS or the time cap; ends with a validation and a checkpoint."""
    s, world, clock = trainer.settings, trainer.world, trainer.clock.start()
    sent, last_save = [], clock.seconds()  # losses on their way, seconds
    thread = ThreadPoolExecutor(1, initializer=world.use_device)  # prepares the next batch
    upcoming = thread.submit(train_batch, shards, trainer.steps, s, world)
    while True:
        # what all ranks must agree on: the time, and whether a signal has come
        step = trainer.steps
        seconds, number = world.time_and_signal(clock.seconds())
        if number:
            raise Interrupted(number)
        share = share_done(step, seconds, s)
        ahead = dict(cuda=len(sent), cpu=0)[world.device.type]
        over = is_over(step, seconds, ahead, s)

        # once in a while, and at the end: score the present weights
        due = s.val_loss_every > 0 and step % s.val_loss_every == 0
        if due or over:
            trainer.model.looped = share >= s.loop_start_frac  # as it is trained, resumed or not
            clock.stop()
            trainer.validate(validation, log)
            clock.start()
        if over:
            break

        # once in a while: a checkpoint
        if 0 < s.checkpoint_seconds <= seconds - last_save:
            clock.stop()
            trainer.save(log)
            clock.start()
            last_save = seconds

        # one step
        scale = learning_rate_scale(step, seconds, s)
        if s.late_qat and scale < s.qat_threshold and trainer.grid == 0:
            trainer.start_late_qat(log)
        batches = upcoming.result()
        upcoming = thread.submit(train_batch, shards, step + 1, s, world)
        sent.append(send_loss(trainer.step(batches, scale, share), step + 1))

        # the host runs one step ahead of the device, or none where this step is logged
        if len(sent) > 1:
            await_loss(*sent.pop(0))
        if s.train_log_every and (step < 10 or (step + 1) % s.train_log_every == 0):
            loss = await_loss(*sent.pop())
            trainer.record(log, "train", f"train_loss:{loss:.4f}", train_loss=loss, lr_scale=scale)

    if step < s.iterations:
        spent = f"train_time:{1000 * clock.seconds():.0f}ms step:{step}/{s.iterations}"
        log.write(f"stopping_early: wallclock_cap {spent}")
    clock.stop()
    with suppress(UserError):  # a disk too full for a checkpoint may still hold the artifact
        trainer.save(log)


# ---- Finish: score, export, reload from disk, score, write submission.json -----------------------


def load_validation(s, world):
    """Tokens (int64, on the device) and byte counts of the split that is scored; UserError."""
    shards = Shards(s.data_path, s.eval_split, s.vocab_size)
    if len(shards) <= s.train_seq_len:
        raise UserError(
            f"TRAIN_SEQ_LEN={s.train_seq_len}: "
            f"the {s.eval_split} split has only {len(shards)} tokens"
        )
    byte_counts = load_byte_counts(s.tokenizer_path, s.vocab_size, world.device)
    return torch.from_numpy(shards.take(0, len(shards))).to(world.device), byte_counts


def score(what, model, validation, stride, s, world, log):
    """A model's figures under the names of submission.json; logged."""
    clock = Clock(world).start()
    loss, bpb = evaluate(model, validation, stride, s, world)
    log.write(f"{what} val_loss:{loss:.8f} val_bpb:{bpb:.8f} stride:{stride}")
    return dict(val_loss=loss, val_bpb=bpb, eval_time_seconds=clock.stop())


def final_lines(codec, val_loss, val_bpb, eval_time_seconds):
    """The two lines that the ecosystem's tools look for."""
    name, ms = f"final_int8_{codec}_roundtrip", 1000 * eval_time_seconds
    return (
        f"{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{ms:.0f}ms\n"
        f"{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}"
    )


def export(trainer, path, log):
    """Write the artifact, log its grid and size; returns the sizes as submission.json has them."""
    s, code = trainer.settings, len(source())
    log.write("packing: looking for the finest grid under the cap")
    blob, step = pack(trainer.exported(), trainer.roles, s, s.size_limit_bytes - code)
    write_whole(path, blob)
    packed = len(blob)
    total = code + packed
    over = "; over the cap, so this run exits with code 3" if total > s.size_limit_bytes else ""
    log.write(
        f"rounded: step {step:.4g} RMS\n"
        f"Code size: {code} bytes\n"
        f"Serialized model int8+{s.compress_algo}: {packed} bytes\n"
        f"Total submission size int8+{s.compress_algo}: {total} bytes\n"
        f"size_limit: {s.size_limit_bytes} bytes headroom: {s.size_limit_bytes - total} bytes{over}"
    )
    return dict(bytes_total=total, bytes_code=code, bytes_model_int8_zlib=packed)


def finish(trainer, validation, log):
    """Score the final weights, export, reload from disk, score again, write submission.json.

    Before packing and after, on plain windows: the difference is what rounding lost. The artifact
    alone is scored at EVAL_STRIDE.
    """
    s, world, T = trainer.settings, trainer.world, trainer.settings.train_seq_len
    folder = Path("runs") / s.run_id
    path = folder / "final_model.int8.ptz"
    log.write(world.peak_memory())
    model = build_model(s, world, trainer.exported())
    before = score("pre_quant", model, validation, T, s, world, log)

    # the artifact: written by rank 0, read back from its disk by all
    sizes = world.agree(export(trainer, path, log) if world.rank == 0 else None)
    model = build_model(s, world, artifact_weights(read_artifact("ARTIFACT", path, world)))
    final = plain = score("plain", model, validation, T, s, world, log)
    if 0 < s.eval_stride < T:
        final = score("sliding", model, validation, s.eval_stride, s, world, log)

    result = dict(
        author=s.author,
        github_id=s.github_id,
        name=f"{s.num_layers}L {s.head_type} head",
        blurb=f"{s.num_layers} x {s.model_dim}, {s.head_type} head, {s.data_path} {s.eval_split}",
        date=f"{datetime.date.today()}",
        track="non-record-16mb",
        seed=s.seed,
        # the artifact at EVAL_STRIDE, on plain windows, and the weights before packing
        **final,
        plain_val_loss=plain["val_loss"],
        plain_val_bpb=plain["val_bpb"],
        pre_quant_val_loss=before["val_loss"],
        pre_quant_val_bpb=before["val_bpb"],
        step_stop=trainer.steps,
        wallclock_seconds=trainer.clock.seconds(),
        **sizes,
        # circumstances
        hardware=world.hardware(),
        head=s.head_type,
        **trainer.facts,
        chosen=sorted(s.given),
        settings=s.as_dict(),
    )
    log.write(final_lines(s.compress_algo, **final), kind="final", **result)
    if s.preset == "demo":
        log.write(
            "val_bpb: this model needs so many bits for a byte of unseen text, plain text has 8\n"
            "try next: the same with HEAD_TYPE=mos, then MODE=table python train_gpt.py"
        )
    if world.rank == 0:
        write_whole(folder / "submission.json", json.dumps(result, indent=1).encode())
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return result


def run_eval(s, world, artifact):
    """MODE=eval: score an artifact, by its own settings where nothing else is said."""
    s, _ = choose_attention(prepare_demo(s, world), world)
    validation = load_validation(s, world)  # first: a strange vocabulary costs no memory
    model, T = build_model(s, world, artifact_weights(artifact)), s.train_seq_len
    stride = min(s.eval_stride or T, T)
    figures = score("artifact", model, validation, stride, s, world, RunLog(None))
    print(final_lines(artifact.stored["compress_algo"], **figures))
    if s.eval_spectrum:
        print(json.dumps(spectrum(model, validation[0], s)))
    return 0


def run_train(s, world, artifact):
    """MODE=train: claim the folder, resume or start, train, finish; exit code 0, 3 if too large."""
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}-{s.head_type}-{s.seed}"
    s, attention = choose_attention(prepare_demo(s, world), world)
    s = replace(s, run_id=s.run_id or world.agree(stamp))
    micro_batch_sequences(s, world)

    # data, and the facts that make a run what it is beside its settings
    shards = Shards(s.data_path, "train", s.vocab_size)
    validation = load_validation(s, world)
    facts = dict(
        source_sha256=hashlib.sha256(source()).hexdigest(),
        data_sha256=shards.fingerprint(validation[0]),
        pytorch_version=str(torch.__version__),
        attention=attention,
        init_sha256="",
    )
    if artifact:
        weights = artifact_weights(artifact)  # before a model of its sizes is made
        facts["init_sha256"] = hashlib.sha256(artifact.payload).hexdigest()

    # what an earlier run of this name has left
    log, earlier = RunLog(None), None
    if world.rank == 0:
        folder, lock = claim_folder(s)  # the lock goes with the process
        log, earlier = RunLog(folder), earlier_run(folder, s, facts)
        world.say = log.write
    result, checkpoint = world.agree(earlier)
    if result is not None:
        print(
            f"runs/{s.run_id} is finished: val_bpb:{result['val_bpb']:.8f}"
            f" bytes_total:{result['bytes_total']}"
        )
        return 3 if result["bytes_total"] > s.size_limit_bytes else 0

    # train; the log's last line says why the run ended
    trainer = None
    try:
        model = build_model(s, world)
        if checkpoint is None:
            sizes = f"train_tokens:{len(shards)} {s.eval_split}_tokens:{len(validation[0])}"
            log.opening(s, world, f"data: {s.data_path} {sizes}", facts)
            if artifact:
                part = adopt(model, artifact, weights, s)
                log.write(f"init_from: {part} of {s.init_from}")
        trainer = Trainer(model, s, world, facts)
        trainer.begin(checkpoint, shards, log)
        train(trainer, shards, validation, log)
        result = finish(trainer, validation, log)
    except BaseException as error:
        end_early(error, trainer, log)
        raise
    log.write(f"ended: finished, results in runs/{s.run_id}")
    return 3 if result["bytes_total"] > s.size_limit_bytes else 0


def end_early(error, trainer, log):
    """Save what was trained, and say in the log why the run ended; nothing here hides the error."""
    reason = in_words(error) or f"a defect of this program, {type(error).__name__}: {error}"
    begun = trainer and (trainer.steps or isinstance(error, Interrupted))
    if begun and not isinstance(error, Diverged):
        try:
            if trainer.save(log):
                again = f"the same command with RUN_ID={trainer.settings.run_id} goes on"
                reason += f"; saved at step {trainer.steps}, {again}"
        except Exception as failure:
            reason += f"; no checkpoint: {in_words(failure) or failure}"
    with suppress(UserError):
        log.write(f"ended: {reason}")


# ---- Compare: MODE=bench and MODE=table; a reader of the program may skip this -------------------


H100_FLOPS = 989e12  # a second, dense bf16; an H200's as well


def flops_per_token(model, s):
    """Forward and backward: 6 a weight of blocks and head, 6 D T a layer for causal attention."""
    weights = model.head.products_with_E * model.tok_emb.weight.numel()
    weights += count_values(model.head.parameters())
    for layer in model.layers:  # some run twice
        weights += count_values(model.blocks[layer].parameters()) + s.model_dim * s.train_seq_len
    return 6 * weights


def bench(s, world, artifact):
    """MODE=bench: time training steps of tied and of the chosen head, in turn, on random tokens."""
    if world.device.type == "cpu" and not {"TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"} & s.given.keys():
        s = replace(s, train_batch_tokens=4096, train_seq_len=256)
    s, attention = choose_attention(s, world)
    tied = replace(s, head_type="tied", head_variant="", head_trainable=True, train_only="all")
    trainers = []
    for own in dict.fromkeys((tied, s)):  # once, where they are the same
        trainers.append(Trainer(build_model(own, world), own, world))
    n, T, B = s.train_batch_tokens, s.train_seq_len, micro_batch_sequences(s, world)
    x_BT, y_BT = torch.randint(s.vocab_size, (2, B, T), device=world.device)
    batches = [(x_BT, y_BT)] * (n // T // B // world.size)

    # every trainer in turn: a noisy machine is noisy for all
    seconds = np.zeros((13, len(trainers)))
    for row in seconds:
        for i, trainer in enumerate(trainers):
            clock = Clock(world).start()
            trainer.step(batches, 1.0, 1.0)
            row[i] = clock.stop()
    medians = np.median(seconds[3:], axis=0)

    for trainer, median in zip(trainers, medians):
        flops, weights = flops_per_token(trainer.model, s), count_values(trainer.parameters)
        mfu = flops * n / median / world.size / H100_FLOPS
        print(
            f"bench head:{trainer.settings.head_type} {1000 * median:.1f} ms/step"
            f" (median of 10; {n} tokens, sequence {T}) tokens/s:{n / median:.0f}"
            f" model_params:{weights}"
            f" bytes/weight under the cap:{(s.size_limit_bytes - len(source())) / weights:.3f}"
            f" FLOP/token:{flops / 1e6:.1f}M MFU:{mfu:.1%}"
            f" time to tied:{median / medians[0]:.3f}"
        )
    print(f"{world.hardware()}, {world.compute_dtype(s)}, torch {torch.__version__}, {attention}")
    print(world.peak_memory())
    return 0


def welch(a, b):
    """t of mean(a) - mean(b), its two-sided p, and half the difference's 95% interval (Welch 1947).

    Needs two values in each, not all equal. With t = sqrt(freedom) tan(angle), the density of
    Student's t is a power of cos(angle).
    """
    free = np.array([len(a), len(b)]) - 1
    variances = np.array([np.var(a), np.var(b)]) / free  # of the means
    variance = variances.sum()
    freedom = variance**2 / (variances**2 / free).sum()
    error = math.sqrt(variance)
    t = (np.mean(a) - np.mean(b)) / error

    # the chance of a smaller |t| than each of a grid
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    grid, chances = math.sqrt(freedom) * np.tan(angles), density.cumsum() / density.sum()
    p = 1 - np.interp(abs(t), grid, chances)
    return t, p, error * np.interp(0.95, chances, grid)


def printable(text):
    """A stranger's string in ASCII, without Markdown's columns and TeX's dollars."""
    return re.sub("[^ -#%-{}~]", "?", str(text))[:120]


def read_run(folder):
    """A finished run's result, with its configuration; raises anything for a damaged file."""
    run = json.loads((folder / "submission.json").read_text())
    for name in ("val_bpb", "val_loss", "bytes_total", "step_stop", "wallclock_seconds", "seed"):
        expect(abs(run[name]) < 1e15, f"{name} is no number")

    # what runs that differ in the seed alone have in common
    config = {}
    for name, value in run["settings"].items():
        if name != "seed" and SCOPES.get(name) != "free":
            config[name.upper()] = as_text(value)
    return dict(
        run,
        folder=folder,
        config=config,
        head=printable(run["head"]),
        chosen=FIELDS.keys() & run.get("chosen", ()),
    )


class Row:
    """The runs of one configuration, and how they compare with tied ones."""

    differs = ""  # its settings that somebody chose, and in which not all rows agree
    gain, half = None, 0.0  # mean bpb less that of tied, and half its 95% interval
    against = "-"  # the gain and Welch's test, in words

    def __init__(self, runs):
        self.runs, self.head, self.config = runs, runs[0]["head"], runs[0]["config"]
        self.bpb = self.all("val_bpb")
        self.mean, self.spread = np.mean(self.bpb), np.std(self.bpb)

    def all(self, name):
        """A figure of all its runs."""
        return [run[name] for run in self.runs]

    def compare(self, tied):
        """Against the row of `tied` whose settings are the most alike."""
        other = max(tied, key=lambda row: len(row.config.items() & self.config.items()))
        self.gain = self.mean - other.mean
        self.against = f"{self.gain:+.5f}"
        if self.spread and other.spread:  # seeds, and not all alike
            t, p, self.half = welch(self.bpb, other.bpb)
            self.against += f" (t {t:.2f}, p {p:.2g})"

    def markdown(self):
        spread = f" +- {np.std(self.bpb, ddof=1):.5f}" if self.spread else ""
        seconds, steps = np.mean(self.all("wallclock_seconds")), np.mean(self.all("step_stop"))
        ms = 1000 * seconds / max(steps, 1)
        return (
            f"| {self.head} | {self.differs} | {self.all('seed')} | {self.mean:.5f}{spread}"
            f" | {self.against} | {max(self.all('bytes_total'))} | {ms:.1f} | {steps:.0f} |"
        )


def table_rows(runs):
    """A Row for each configuration, its seeds together; tied first, then by mean bpb."""
    groups, chosen = {}, set()
    for run in runs:
        groups.setdefault(str(run["config"]), []).append(run)
        chosen |= run["chosen"]
    rows = sorted(map(Row, groups.values()), key=lambda row: (row.head != "tied", row.mean))

    for name in sorted(chosen - {"HEAD_TYPE"}):
        if len({row.config.get(name) for row in rows}) > 1:
            for row in rows:
                row.differs += f" {name}={printable(row.config.get(name))}"

    tied = [row for row in rows if row.head == "tied"]
    for row in rows[len(tied) :]:
        if tied:
            row.compare(tied)
    return rows


def run_table(s, world, artifact):
    """MODE=table: a row of Markdown for each configuration, and a picture."""
    runs, remarks = [], []
    for folder in map(Path, sorted(glob.glob(f"{s.runs}/"))):
        try:
            runs.append(read_run(folder))
        except Exception as error:  # whatever a damaged file can provoke
            remarks.append(printable(f"{folder}: not finished, or damaged ({error!r})"))
    if not runs:
        raise s.wrong("RUNS", "; ".join(["match a finished run", *remarks[:3]]))
    rows = table_rows(runs)
    print(
        "| head | settings that differ | seeds | val_bpb mean +- std | against tied (Welch)"
        " | bytes | ms/step | steps |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(row.markdown())

    # what makes the figures less comparable than they look
    for fact in ("source_sha256", "data_sha256", "hardware", "pytorch_version", "attention"):
        values = {printable(run.get(fact)) for run in runs}
        if len(values) > 1:
            remarks.append(f"the runs differ in {fact}: {', '.join(sorted(values))}")
    print("", *remarks, sep="\n")
    try:
        print(f"picture: {draw(rows, runs[0]['folder'].parent)}")
    except Exception as error:  # no matplotlib, no right to write
        print("no picture:", printable(error))
    return 0


def draw(rows, folder):
    """Losses by time, and each row's gain over tied with its 95% interval; the PNG's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, gains = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        color, label = f"C{i}", f"{i} {row.head}{row.differs}"[:60]
        for run in row.runs:
            with suppress(OSError, ValueError, LookupError, TypeError):  # a damaged metrics.jsonl
                curves.plot(*zip(*training_curve(run)), color=color, linewidth=0.8)
        ends = row.all("wallclock_seconds"), row.all("val_loss")
        curves.plot(*ends, ".", color=color, label=label)
        if row.gain is not None:
            gains.errorbar(row.gain, label, xerr=row.half, fmt="o", color=color)

    # what the axes say
    curves.set(xlabel="seconds of training", ylabel="loss, nats a token (dot: validation)")
    curves.legend()
    gains.axvline(0, color="grey")
    gains.set(xlabel="val_bpb less that of tied, 95% interval; left of 0 is better")
    gains.invert_yaxis()
    picture, path = io.BytesIO(), folder / "learning_curves.png"
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())
    return path


def training_curve(run):
    """Points (seconds, training loss) after the first 5% of a run."""
    points, start = [], 0.05 * run["wallclock_seconds"]
    for line in (run["folder"] / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train_loss" in record and record["train_seconds"] > start:
            points.append((record["train_seconds"], record["train_loss"]))
    return points


# ---- Main ----------------------------------------------------------------------------------------


def run(environ, world):
    """Read the artifact that is named, the settings, and run the mode; its exit code."""
    if sys.argv[1:]:
        raise UserError(
            f"{sys.argv[1]}: settings are environment variables; write them before the command"
        )
    world.start()
    artifact, stored = None, {}
    for name in ("ARTIFACT", "INIT_FROM"):
        if environ.get(name):
            artifact = read_artifact(name, environ[name], world)
            stored = artifact.stored
    s = check_head(from_env(environ, stored))
    modes = dict(train=run_train, eval=run_eval, table=run_table, bench=bench)
    code = modes[s.mode](s, world, artifact)
    if s.mode != "train":  # what the others say is nowhere else
        print(end="", flush=True)
    return code


def main():
    """Run the chosen mode; its exit code. A user's mistake is one line, from rank 0, and code 2."""
    world = None
    try:
        world = World(os.environ)
        if world.rank > 0:  # rank 0 speaks for all
            sys.stdout = open(os.devnull, "w")

        code = run(os.environ, world)
        if world.size > 1:
            dist.destroy_process_group()
        return code
    except Interrupted as interruption:
        return 128 + interruption.args[0]
    except Exception as error:
        words = in_words(error)
        if words is None:  # a defect, which shows its traceback
            raise
        if world is None or world.rank == 0:
            with suppress(OSError, ValueError):  # a full or closed stderr
                print(f"error: {words}", file=sys.stderr)
        else:
            time.sleep(10)  # rank 0 speaks, saves and ends first
        return 2


if __name__ == "__main__":
    exit_code = main()
    with suppress(OSError):
        print(end="", flush=True)
    os._exit(exit_code)  # a process group that lost a rank would abort in Python's own teardown

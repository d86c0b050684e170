"""Train a small GPT with a chosen output head, pack it under 16,000,000 bytes, reload it, score it in bits per byte.

One script, in the style of OpenAI's parameter-golf challenge, built to answer one question: does an output head of
higher rank than the tied softmax earn its bytes and its time?  Everything is chosen by environment variables.

    DATA_PATH=demo python train_gpt.py                              # any machine, no data, about two minutes
    python train_gpt.py                                             # one GPU, DATA_PATH as in the challenge
    torchrun --standalone --nproc_per_node=8 train_gpt.py           # the real run
    HEAD_TYPE=mos HEAD_K=2 HEAD_RANK=64 SEED=42 RUN_ID=mos-42 torchrun --standalone --nproc_per_node=8 train_gpt.py
    MODE=eval ARTIFACT=runs/mos-42/final_model.int8.ptz python train_gpt.py
    MODE=bench python train_gpt.py                                  # speed on synthetic tokens

Sections, each needing only those above it: settings, world, data, byte counts, trunk, heads, optimizers, schedule,
evaluate, artifact, log and files, train, main.

Shape suffixes of tensor names: B sequences, T positions, N = B T tokens, D model width, V vocabulary, H query heads,
G key-value heads, C channels of one head, K mixture components, R rank, M simplex corners, L layers.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """A mistake of the user's: main prints it as one line, `error: ...`, and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings: environment variables, read here and nowhere else
# ---------------------------------------------------------------------------------------------------------------------


def setting(default, doc: str, low=None, high=None, choices=None, scope: str = "run"):
    """A field with its documentation, its range and its scope ("model": part of the artifact, "eval", or "run")."""
    return dataclasses.field(default=default, metadata=dict(doc=doc, low=low, high=high, choices=choices, scope=scope))


def model_setting(default, doc: str, low=None, high=None, choices=None):
    return setting(default, doc, low, high, choices, scope="model")


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """All settings of a run. The defaults are the `study` preset; the variable of a field is its name in capitals."""

    # The run
    mode: str = setting("train", "what to do", choices=("train", "eval", "bench"))
    preset: str = setting("study", "set of defaults: study A's stack, study B's baseline, a small CPU model",
                          choices=("study", "pilot", "demo"))
    run_id: str = setting("", "folder under runs/; empty: time, head and seed")
    seed: int = setting(1337, "seed of the initial weights", 0, 2**63 - 1)
    author: str = setting("", "author named in submission.json")
    github_id: str = setting("", "GitHub account named in submission.json")
    allow_near_misses: bool = setting(False, "accept variables that look like misspelt settings")

    # Data
    data_path: str = setting("./data/datasets/fineweb10B_sp1024",
                             "folder of fineweb_{train,val}_*.bin shards, or `demo`: built from Python's own docs")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    vocab_size: int = model_setting(1024, "tokens in the vocabulary", 2, 65536)

    # Trunk
    num_layers: int = model_setting(11, "transformer blocks", 1, 1000)
    model_dim: int = model_setting(512, "width of the residual stream", 4, 65536)
    num_heads: int = model_setting(8, "query heads", 1, 1024)
    num_kv_heads: int = model_setting(4, "key-value heads; each serves NUM_HEADS / NUM_KV_HEADS query heads", 1, 1024)
    mlp_mult: int = model_setting(3, "hidden width of the MLP over MODEL_DIM", 1, 64)
    rope_base: float = model_setting(10000.0, "base of the rotary frequencies", 1.0, 1e12)
    rope_dims: int = model_setting(16, "rotated channels of a head; 0: all", 0, 65536)
    use_ntk_rope: bool = model_setting(True, "raise the rotary base for TRAIN_SEQ_LEN above 1024")
    qk_gain_init: float = model_setting(1.5, "initial gain of the normed queries", 0.0, 1000.0)
    xsa_last_n: int = model_setting(4, "last layers whose attention output drops its own value direction", 0, 1000)
    smear_gate: bool = model_setting(True, "blend each embedding with the token before")
    bigram_hash: bool = model_setting(True, "add a hashed bigram embedding before each layer")
    bigram_vocab_size: int = model_setting(2048, "rows of the bigram table", 2, 2**24)
    bigram_dim: int = model_setting(128, "width of the bigram table", 1, 65536)
    ln_scale: bool = model_setting(True, "scale the norms of layer i by 1 / sqrt(i + 1)")
    value_embed: bool = model_setting(True, "add a token embedding to the values of VE_LAYERS")
    ve_dim: int = model_setting(128, "width of the value embedding table", 1, 65536)
    ve_layers: str = model_setting("9,10", "layers with a value embedding, from 0, separated by commas")
    logit_softcap: float = model_setting(30.0, "c in c tanh(z / c) on the logits; 0: no cap", 0.0, 1e6)
    init_type: str = model_setting("ortho", "initial matrices: orthogonal, or PyTorch's with zero output projections",
                                   choices=("ortho", "default"))
    tied_embed_init_std: float = model_setting(0.005, "standard deviation of the initial token embedding", 0.0, 10.0)

    # Head
    head_type: str = model_setting("tied", "output head", choices=())  # the choices are the keys of HEADS
    head_k: int = model_setting(2, "components of the mixture (mos)", 1, 64)
    head_rank: int = model_setting(64, "rank of the head's own factors (factorized, mos)", 1, 65536)
    head_dim: int = model_setting(128, "corners of the simplex (simplex)", 2, 65536)

    # Training
    train_batch_tokens: int = setting(786432, "tokens a step, over all ranks", 1, 2**40)
    train_seq_len: int = model_setting(2048, "tokens a sequence, in training and evaluation", 1, 2**24)
    micro_batch_tokens: int = setting(0, "tokens of one forward pass on one rank; 0: 131072 on CUDA, else 4096", 0, 2**40)
    iterations: int = setting(20000, "steps at most; 0: export and score the untrained model", 0, 2**40)
    max_wallclock_seconds: float = setting(600.0, "cap on training time, seconds; 0: none", 0.0, 1e9)
    warmup_steps: int = setting(20, "steps that prime the compiled code, then are undone; outside the cap", 0, 10000)
    warmdown_iters: int = setting(3500, "steps of linear warm-down of the learning rates at the end", 0, 2**40)
    warmdown_frac: float = setting(0.8, "the warm-down's longest share of the run", 0.0, 1.0)
    val_loss_every: int = setting(0, "steps between validations; 0: at the end only", 0, 2**40)
    train_log_every: int = setting(200, "steps between log lines; 0: none", 0, 2**40)
    compute_dtype: str = setting("auto", "arithmetic of matrix products; auto: bf16 where the chip has it",
                                 choices=("auto", "bf16", "fp32"), scope="eval")
    compile: str = setting("auto", "torch.compile; auto: on CUDA", choices=("auto", "0", "1"))
    use_fa3: bool = setting(False, "flash-attention 3 (package flash_attn_interface) on CUDA; off: PyTorch's SDPA")

    # Optimizers
    matrix_lr: float = setting(0.025, "Muon's learning rate: matrices of the trunk and the head", 0.0, 100.0)
    scalar_lr: float = setting(0.025, "Adam's learning rate: scales, gains, gates, biases", 0.0, 100.0)
    tied_embed_lr: float = setting(0.035, "Adam's learning rate: token, bigram and value tables", 0.0, 100.0)
    head_lr: float = setting(0.008, "Adam's learning rate: the head's own vocabulary-side matrices", 0.0, 100.0)
    muon_momentum: float = setting(0.99, "Muon's momentum after its warm-up", 0.0, 0.9999)
    muon_momentum_warmup_start: float = setting(0.92, "Muon's momentum at step 0", 0.0, 0.9999)
    muon_momentum_warmup_steps: int = setting(1500, "steps of the momentum's warm-up", 0, 2**40)
    muon_weight_decay: float = setting(0.04, "decoupled weight decay of Muon", 0.0, 100.0)
    adam_wd: float = setting(0.04, "decoupled weight decay of Adam", 0.0, 100.0)
    beta1: float = setting(0.9, "Adam's first decay", 0.0, 0.9999)
    beta2: float = setting(0.95, "Adam's second decay", 0.0, 0.9999999)
    adam_eps: float = setting(1e-8, "Adam's epsilon", 1e-20, 1.0)
    grad_clip_norm: float = setting(0.3, "largest norm of the whole gradient; 0: no clipping", 0.0, 1e9)
    use_ema: bool = setting(True, "export the exponential moving average of the weights")
    ema_alpha: float = setting(0.997, "the average's decay a step, min(EMA_ALPHA, (1 + t) / (10 + t))", 0.0, 0.999999)
    late_qat: bool = setting(True, "train through the export's rounding at the end")
    qat_threshold: float = setting(0.15, "learning-rate scale below which late QAT starts", 0.0, 1.0)

    # Evaluation and artifact
    eval_stride: int = setting(64, "tokens scored a window in the final evaluation; 0: TRAIN_SEQ_LEN", 0, 2**24, scope="eval")
    val_batch_size: int = setting(524288, "tokens of one evaluation batch, over all ranks", 1, 2**40, scope="eval")
    eval_split: str = setting("val", "split that is scored", choices=("val", "test"))
    artifact: str = setting("", "artifact to score (MODE=eval)")
    compress_algo: str = setting("zlib", "codec of the artifact; zlib is deflate, Huffman only", choices=("zlib", "zstd"))
    size_limit_bytes: int = setting(16_000_000, "cap on this script's bytes plus the artifact's", 1, 2**50)


PRESETS: dict[str, dict[str, object]] = {
    "study": {},
    "pilot": dict(
        num_layers=9, mlp_mult=2, rope_dims=0, use_ntk_rope=False, xsa_last_n=0, smear_gate=False, bigram_hash=False,
        ln_scale=False, value_embed=False, init_type="default", train_batch_tokens=524288, train_seq_len=1024,
        warmdown_iters=1200, matrix_lr=0.04, scalar_lr=0.04, tied_embed_lr=0.05, muon_momentum=0.95,
        muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500, muon_weight_decay=0.0, adam_wd=0.0,
        grad_clip_norm=0.0, use_ema=False, late_qat=False, eval_stride=0),
    "demo": dict(
        data_path="demo", model_dim=128, num_heads=4, num_kv_heads=2, rope_dims=16, bigram_dim=32, ve_dim=32,
        train_batch_tokens=4096, train_seq_len=256, max_wallclock_seconds=75.0, warmup_steps=0, warmdown_iters=100000,
        warmdown_frac=0.5, muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=100,
        muon_weight_decay=0.0, adam_wd=0.0, ema_alpha=0.98, train_log_every=50, val_loss_every=200, eval_stride=64),
}

# Published variables with one implemented behaviour: accepted at these values only.
PUBLISHED_CONSTANTS = dict(
    TIE_EMBEDDINGS="1", EMA_FROM_INIT="1", USE_QAT="0", GRAD_GUIDED_QUANT="0", SKIP_QUANT="0", QAT_BITS="6",
    QUANT_BITS_MIDDLE="6", QUANT_BITS_MLP="6", MUON_BACKEND_STEPS="5", FLASH_ATTN_BACKEND="fa3",
    FLASH_ATTN_STRICT="1", FLASH_ATTN_ARCH_LIST="9.0")
ALIASES = dict(MIXTURE_SOFTMAX_K="HEAD_K", MIXTURE_RANK_DIM="HEAD_RANK", SIMPLEX_DIM="HEAD_DIM", MOS_K="HEAD_K",
               MOS_RANK="HEAD_RANK")
STUDY_HEADS = dict(standard="tied", mixture_softmax="mos")
STUDY_B = ("USE_MOS", "MOS_K", "MOS_RANK")
OTHER_PUBLISHED = ("RANK_DIM", "USE_MOS", "SKIP_COMPILE")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
            "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def fields() -> dict[str, dataclasses.Field]:
    """The settings by the name of their environment variable."""
    return {field.name.upper(): field for field in dataclasses.fields(Hyperparameters)}


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    return tuple(HEADS) if field.name == "head_type" else field.metadata["choices"] or ()


def from_env(environ: Mapping[str, str] | None = None, defaults: Mapping[str, object] | None = None) -> Hyperparameters:
    """Settings from environment variables: an explicit one beats `defaults`, which beat the preset, which beats the field.

    Raises UserError, naming the variable, its value and the remedy.
    """
    environ = dict(os.environ if environ is None else environ)
    reject_near_misses(environ)
    reject_unimplemented(environ)
    given = {name: environ[name] for name in fields() if name in environ}
    apply_aliases(environ, given)
    preset = given.get("PRESET") or implied_preset(environ, given)
    if preset not in PRESETS:
        raise UserError(f"PRESET={preset}: must be one of {', '.join(PRESETS)}")
    values = dict(PRESETS[preset], preset=preset, **defaults or {})
    values.update((fields()[name].name, parse(name, text)) for name, text in given.items())
    settings = Hyperparameters(**values)
    check(settings)
    check_head_settings(settings, given)
    return settings


def reject_near_misses(environ: Mapping[str, str]) -> None:
    known = [*fields(), *PUBLISHED_CONSTANTS, *ALIASES, *OTHER_PUBLISHED]
    if environ.get("ALLOW_NEAR_MISSES") == "1":
        return
    for name in sorted(environ.keys() - {*known, *TORCHRUN}):
        for likely in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise UserError(f"{name}={environ[name]}: did you mean {likely}? If not, set ALLOW_NEAR_MISSES=1")


def reject_unimplemented(environ: Mapping[str, str]) -> None:
    for name, value in PUBLISHED_CONSTANTS.items():
        if environ.get(name, value) != value and not (name.startswith("FLASH_ATTN") and not torch.cuda.is_available()):
            raise UserError(f"{name}={environ[name]}: only {name}={value} is implemented; leave it unset")


def apply_aliases(environ: Mapping[str, str], given: dict[str, str]) -> None:
    """Translate both studies' variables into ours, in place; a contradiction raises UserError."""

    def put(source: str, name: str, value: str) -> None:
        if given.setdefault(name, value) != value:
            raise UserError(f"{source}={environ[source]}: contradicts {name}={given[name]}; set only one of them")

    head = environ.get("HEAD_TYPE", "")
    given.update({"HEAD_TYPE": STUDY_HEADS[head]} if head in STUDY_HEADS else {})
    rank = environ.get("RANK_DIM", "0")
    if parse_number("RANK_DIM", rank, int) > 0:
        if head not in ("", "standard"):
            raise UserError(f"RANK_DIM={rank}: belongs to HEAD_TYPE=standard; leave it unset or 0")
        given.update(HEAD_TYPE="factorized")
        put("RANK_DIM", "HEAD_RANK", rank)
    if environ.get("USE_MOS", "0") not in ("0", "1"):
        raise UserError(f"USE_MOS={environ['USE_MOS']}: must be 0 or 1")
    if environ.get("USE_MOS") == "1":
        put("USE_MOS", "HEAD_TYPE", "mos")
    for alias, name in ALIASES.items():
        if alias in environ and not (alias in STUDY_B and environ.get("USE_MOS") != "1"):
            put(alias, name, environ[alias])
    if environ.get("SKIP_COMPILE", "0") not in ("0", "1"):
        raise UserError(f"SKIP_COMPILE={environ['SKIP_COMPILE']}: must be 0 or 1")
    if environ.get("SKIP_COMPILE") == "1":
        put("SKIP_COMPILE", "COMPILE", "0")


def implied_preset(environ: Mapping[str, str], given: Mapping[str, str]) -> str:
    if given.get("DATA_PATH") == "demo":
        return "demo"
    return "pilot" if any(name in environ for name in STUDY_B) else "study"


def parse_number(name: str, text: str, kind: type):
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name}={text}: must be {'a whole number' if kind is int else 'a number'}") from None
    if not math.isfinite(value):
        raise UserError(f"{name}={text}: must be finite")
    return value


def parse(name: str, text: str):
    """The typed value of one variable; UserError outside its range or its choices."""
    field = fields()[name]
    meta, choices = field.metadata, choices_of(field)
    if choices and text not in choices:
        near = difflib.get_close_matches(text, choices, n=1)
        raise UserError(f"{name}={text}: must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else ""))
    if field.type == "str":
        return text
    if field.type == "bool":
        if text not in ("0", "1"):
            raise UserError(f"{name}={text}: must be 0 or 1")
        return text == "1"
    value = parse_number(name, text, dict(int=int, float=float)[field.type])
    if meta["low"] is not None and value < meta["low"]:
        raise UserError(f"{name}={text}: must be at least {meta['low']:g}")
    if meta["high"] is not None and value > meta["high"]:
        raise UserError(f"{name}={text}: must be at most {meta['high']:g}")
    return value


def value_layers(settings: Hyperparameters) -> tuple[int, ...]:
    """The layers that get a value embedding, ascending."""
    if not settings.value_embed:
        return ()
    try:
        layers = sorted({int(text) for text in settings.ve_layers.split(",")})
    except ValueError:
        raise UserError(f"VE_LAYERS={settings.ve_layers}: must be layer numbers separated by commas, as in 9,10") from None
    if layers[0] < 0 or layers[-1] >= settings.num_layers:
        raise UserError(f"VE_LAYERS={settings.ve_layers}: must lie in 0..{settings.num_layers - 1} (NUM_LAYERS - 1),"
                        " or set VALUE_EMBED=0")
    return tuple(layers)


def check(s: Hyperparameters) -> None:
    """What must hold between settings; raises UserError."""

    def need(true: bool, name: str, remedy: str) -> None:
        if not true:
            raise UserError(f"{name}={getattr(s, name.lower())}: must {remedy}")

    need(s.model_dim % s.num_heads == 0, "NUM_HEADS", f"divide MODEL_DIM={s.model_dim}")
    need(s.num_heads % s.num_kv_heads == 0, "NUM_KV_HEADS", f"divide NUM_HEADS={s.num_heads}")
    channels = s.model_dim // s.num_heads
    need(channels % 2 == 0, "NUM_HEADS", f"leave each head an even width (MODEL_DIM / NUM_HEADS is {channels})")
    need(s.rope_dims % 2 == 0 and s.rope_dims <= channels, "ROPE_DIMS", f"be even and at most {channels}, a head's width")
    need(s.rope_dims != 2 or not s.use_ntk_rope, "ROPE_DIMS", "be above 2 with USE_NTK_ROPE=1")
    need(s.xsa_last_n <= s.num_layers, "XSA_LAST_N", f"be at most NUM_LAYERS={s.num_layers}")
    value_layers(s)
    need(s.train_batch_tokens % s.train_seq_len == 0, "TRAIN_BATCH_TOKENS", f"be a multiple of TRAIN_SEQ_LEN={s.train_seq_len}")
    need(s.eval_stride <= s.train_seq_len, "EVAL_STRIDE", f"be at most TRAIN_SEQ_LEN={s.train_seq_len}")
    need(s.tied_embed_init_std > 0, "TIED_EMBED_INIT_STD", "be above 0")
    need(s.run_id == "" or re.fullmatch(r"[\w.-]{1,200}", s.run_id) and s.run_id.strip("."), "RUN_ID",
         "be a folder name of letters, digits, '.', '_' and '-'")
    need(s.mode != "eval" or s.artifact != "", "ARTIFACT", "name the artifact to score")


def check_head_settings(settings: Hyperparameters, given: Mapping[str, str]) -> None:
    uses = HEADS[settings.head_type].uses
    for name in ("head_k", "head_rank", "head_dim"):
        if name.upper() in given and name not in uses:
            fitting = ", ".join(key for key, head in HEADS.items() if name in head.uses)
            raise UserError(f"{name.upper()}={given[name.upper()]}: HEAD_TYPE={settings.head_type} does not use it ({fitting} does)")


# ---------------------------------------------------------------------------------------------------------------------
# World: one process or torchrun's many; with one, communication is skipped
# ---------------------------------------------------------------------------------------------------------------------


class World:
    """Rank, size and device, and the few collectives that the program needs. Errors: UserError for wrong world sizes."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def start(self) -> None:
        """Join the process group: NCCL for CUDA tensors, gloo for CPU tensors (control messages among them)."""
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"LOCAL_RANK={self.local_rank}: this node has {torch.cuda.device_count()} GPUs;"
                                " lower torchrun's --nproc_per_node")
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: float) -> float:
        """Rank 0's number, on every rank (a CPU message: the device is not waited for)."""
        if self.size == 1:
            return value
        message = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(message, src=0)
        return message.item()

    def agree_text(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        message = [text]
        if self.size > 1:
            dist.broadcast_object_list(message, src=0)
        return message[0]

    def gather(self, part: Tensor) -> Tensor:
        """The ranks' equally shaped parts, concatenated along the first dimension in the order of ranks."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    def average(self, tensors: list[Tensor]) -> None:
        """Mean over ranks of many tensors, in place, in one message."""
        if self.size == 1:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors])).div_(self.size)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors)])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Data: shards, the batch stream, the demo corpus
# ---------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
BOS_ID = 1  # stands before every document


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped tokens (uint16) of one shard: 256 little-endian int32 (magic, version, count), then the tokens.

    Raises UserError for a file that is truncated or no shard.
    """
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if header.size < HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: is no token shard of version {SHARD_VERSION} (wrong header); export the data again")
    wanted = 4 * HEADER_INTS + 2 * int(header[2])
    if size != wanted or header[2] < 1:
        raise UserError(f"{path}: has {size} bytes where its header promises {wanted}; it is truncated, fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS)


def write_shard(path: Path, tokens: list[int]) -> None:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_whole(path, header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it: it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_tokens(tokens: np.ndarray, vocab_size: int, where: object) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{where}: holds token id {int(tokens.max())}, but VOCAB_SIZE={vocab_size}; use the data's own tokenizer")


class Shards:
    """All tokens of one split as one endless sequence: after the last token comes the first again."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        if not folder.is_dir():
            raise UserError(f"DATA_PATH={folder}: no such folder; see README for the data, or use DATA_PATH=demo")
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
            offset = start - int(self.starts[index])
            chunk = self.parts[index][offset:offset + count]
            check_tokens(chunk, self.vocab_size, self.paths[index])
            chunks.append(chunk)
            start, count = start + chunk.size, count - chunk.size
        return np.concatenate(chunks).astype(np.int64)

    def fingerprint(self) -> str:
        """Hash of names, sizes and ends of the shards: tells data sets apart without reading them whole."""
        digest = hashlib.sha256()
        for path, part in zip(self.paths, self.parts):
            digest.update(f"{path.name} {part.size}".encode() + part[:32768].tobytes() + part[-32768:].tobytes())
        return digest.hexdigest()[:16]


def train_batch(shards: Shards, step: int, settings: Hyperparameters, world: World) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches (x_BT, y_BT) of a step: the same global batch for any number of ranks.

    Step s trains on the targets s n + 1 .. (s + 1) n of the endless sequence, n = TRAIN_BATCH_TOKENS.
    """
    n, T = settings.train_batch_tokens, settings.train_seq_len
    tokens = shards.take(step * n, n + 1)
    x, y = (torch.from_numpy(part).view(-1, T) for part in (tokens[:-1], tokens[1:]))
    per_rank = n // T // world.size
    mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    B = micro_batch_sequences(settings, world)
    return [(to_device(x_BT, world.device), to_device(y_BT, world.device))
            for x_BT, y_BT in zip(x[mine].split(B), y[mine].split(B))]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def micro_batch_sequences(settings: Hyperparameters, world: World) -> int:
    """Sequences of one forward pass on one rank: the largest divisor of its share within MICRO_BATCH_TOKENS."""
    sequences = settings.train_batch_tokens // settings.train_seq_len
    if sequences % world.size:
        raise UserError(f"TRAIN_BATCH_TOKENS={settings.train_batch_tokens}: its {sequences} sequences do not divide"
                        f" evenly among {world.size} ranks; use a multiple of {world.size * settings.train_seq_len}")
    share = sequences // world.size
    limit = settings.micro_batch_tokens or (131072 if world.device.type == "cuda" else 4096)
    return max(B for B in range(1, share + 1) if share % B == 0 and (B == 1 or B * settings.train_seq_len <= limit))


def demo_documents() -> list[str]:
    """English text that every Python has: the topics of `help()` and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    documents = [text for _, text in sorted(topics.items())]
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError, OSError):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            texts = (ast.get_docstring(node) for node in nodes
                     if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
            documents.append("\n".join(text for text in texts if text))
    # The order is fixed, but mixes topics and modules: the validation split must look like the rest.
    return sorted((text for text in documents if len(text) > 200), key=lambda text: hashlib.sha256(text.encode()).digest())


def build_demo(folder: Path, vocab_size: int) -> None:
    """Write train, val and test shards and a BPE tokenizer (byte fallback) to `folder`, once, under a lock."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); run in a writable folder") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "tokenizer.model").exists():  # written last
            return
        splits: dict[str, list[str]] = {"val": [], "test": [], "train": []}
        for i, text in enumerate(demo_documents()):
            splits[{0: "val", 1: "test"}.get(i % 25, "train")].append(text)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in splits["train"] for line in text.splitlines() if line.strip()),
            model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True, character_coverage=0.999,
            add_dummy_prefix=False, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3, num_threads=1, minloglevel=2)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for split, texts in splits.items():
            tokens = [token for ids in processor.encode(texts) for token in (BOS_ID, *ids)]
            write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
        write_whole(folder / "tokenizer.model", model.getvalue())


def prepare_demo(settings: Hyperparameters, world: World) -> Hyperparameters:
    """Settings with DATA_PATH=demo replaced by the cached corpus; rank 0 builds it where it is missing."""
    if settings.data_path != "demo":
        return settings
    folder = Path("data/demo")
    if world.rank == 0:
        build_demo(folder, settings.vocab_size)
    world.barrier()
    return dataclasses.replace(settings, data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"))


# ---------------------------------------------------------------------------------------------------------------------
# Byte counts: how many UTF-8 bytes of text each token stands for
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByteCounts:
    """UTF-8 bytes of each token inside a document and at its start, as SentencePiece itself decodes them.

    The sum over a document's tokens is the length of its decoded text: its first piece loses its leading space.
    """

    inner_V: Tensor
    first_V: Tensor
    control_V: Tensor

    def __call__(self, before_N: Tensor, token_N: Tensor) -> Tensor:
        """Bytes (int64) of each token, given the token before it."""
        return torch.where(self.control_V[before_N], self.first_V[token_N], self.inner_V[token_N])


def load_byte_counts(path: Path, vocab_size: int, device: torch.device) -> ByteCounts:
    """The table of a SentencePiece model; UserError if it is missing, corrupt or of another vocabulary size."""
    if not path.is_file():
        raise UserError(f"TOKENIZER_PATH={path}: no such file")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"TOKENIZER_PATH={path}: is no SentencePiece model, or a corrupt one") from None
    if processor.vocab_size() != vocab_size:
        raise UserError(f"VOCAB_SIZE={vocab_size}: the tokenizer {path} has {processor.vocab_size()} tokens")
    ids = range(vocab_size)
    control = [processor.is_control(i) or processor.is_unused(i) for i in ids]
    regular = [i for i in ids if not (control[i] or processor.is_byte(i) or processor.is_unknown(i))]
    anchor = max(regular, key=lambda i: len(processor.decode([i])))  # any piece that decodes to visible text

    def counts(prefix: list[int]) -> Tensor:
        base = len(processor.decode(prefix).encode())
        texts = processor.decode([[*prefix, i] for i in ids])
        sizes = [0 if control[i] else 1 if processor.is_byte(i) else len(texts[i].encode()) - base for i in ids]
        return torch.tensor(sizes, dtype=torch.int64, device=device)

    return ByteCounts(counts([anchor]), counts([]), torch.tensor(control, device=device))


def unigram_bpb(train: Shards, val_N: Tensor, byte_counts: ByteCounts, sample: int = 10_000_000) -> float:
    """Bits per byte of add-one unigram frequencies of the train split: the mark that any model must beat."""
    seen = np.bincount(train.take(0, min(len(train), sample)), minlength=train.vocab_size) + 1
    bits_V = torch.from_numpy(-np.log2(seen / seen.sum()))
    bytes_N = byte_counts(val_N[:-1], val_N[1:])
    return (bits_V.to(val_N.device)[val_N[1:]].sum() / bytes_N.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Trunk: from tokens to the final normed hidden states
# ---------------------------------------------------------------------------------------------------------------------

NORM_EPS = 1e-7  # explicit: PyTorch's default depends on the dtype and would damp small embeddings in bf16


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Linear(nn.Linear):
    """Matrix product in the input's dtype, with float32 master weights and no bias.

    INIT_TYPE=ortho: orthogonal, times 1 / sqrt(2 L) where the output joins the residual stream; `default`: PyTorch's
    own, zero where it joins the stream. `scale` multiplies the output channels (folded into the weight).
    """

    def __init__(self, settings: Hyperparameters, n_in: int, n_out: int, residual: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        if settings.init_type == "ortho":
            nn.init.orthogonal_(self.weight, gain=(2 * settings.num_layers) ** -0.5 if residual else 1.0)
        elif residual:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        weight = self.weight if scale is None else self.weight * scale[:, None]
        return F.linear(x, weight.to(x.dtype))


class Rotary(nn.Module):
    """Rotary position embedding of the first ROPE_DIMS channels (Su et al. 2021), NTK-aware base above 1,024 tokens."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.dims = settings.rope_dims or settings.model_dim // settings.num_heads
        base = settings.rope_base
        if settings.use_ntk_rope and settings.train_seq_len > 1024:
            base *= (settings.train_seq_len / 1024) ** (self.dims / (self.dims - 2))
        frequency = base ** (-torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims)
        angle_TC = torch.outer(torch.arange(settings.train_seq_len, dtype=torch.float32), frequency)
        self.register_buffer("cos_T1C", angle_TC.cos()[:, None], persistent=False)
        self.register_buffer("sin_T1C", angle_TC.sin()[:, None], persistent=False)

    def forward(self, x_BTHC: Tensor) -> Tensor:
        T, half = x_BTHC.size(1), self.dims // 2
        cos, sin = self.cos_T1C[:T].to(x_BTHC.dtype), self.sin_T1C[:T].to(x_BTHC.dtype)
        a, b, rest = x_BTHC.split([half, half, x_BTHC.size(-1) - self.dims], dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def sdpa(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """Causal attention by PyTorch; query head h reads key-value head h // (H / G)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTGC, v_BTGC))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def flash_attention_3(q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor) -> Tensor:
    """Causal attention by the flash_attn_interface package (Shah et al. 2024)."""
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(q_BTHC, k_BTGC, v_BTGC, causal=True)


def attention_kernel(settings: Hyperparameters) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel asked for; UserError where USE_FA3=1 meets a CUDA machine without the package."""
    if not (settings.use_fa3 and torch.cuda.is_available()):
        return sdpa
    try:
        import flash_attn_interface  # noqa: F401
    except ImportError:
        raise UserError("USE_FA3=1: the package flash_attn_interface is not installed; install it or set USE_FA3=0") from None
    return flash_attention_3


class Attention(nn.Module):
    """Grouped-query attention with RMS-normed queries and keys; `exclusive` removes each token's own value direction."""

    def __init__(self, settings: Hyperparameters, rotary: Rotary, exclusive: bool) -> None:
        super().__init__()
        D, self.H, self.G = settings.model_dim, settings.num_heads, settings.num_kv_heads
        self.C = D // self.H
        self.q = Linear(settings, D, D)
        self.k = Linear(settings, D, self.G * self.C)
        self.v = Linear(settings, D, self.G * self.C)
        self.out = Linear(settings, D, D, residual=True)
        self.q_gain = nn.Parameter(torch.full((self.H,), settings.qk_gain_init))
        self.rotary, self.exclusive, self.kernel = rotary, exclusive, attention_kernel(settings)

    def forward(self, x_BTD: Tensor, value_BTV: Tensor | None, scale_D: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTHC = self.rotary(norm(self.q(x_BTD).view(B, T, self.H, self.C))) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTGC = self.rotary(norm(self.k(x_BTD).view(B, T, self.G, self.C)))
        v = self.v(x_BTD)
        v_BTGC = (v if value_BTV is None else v + value_BTV).view(B, T, self.G, self.C)
        y_BTHC = self.kernel(q_BTHC, k_BTGC, v_BTGC)
        if self.exclusive:
            y_BTHC = exclude_own_value(y_BTHC, v_BTGC)
        return self.out(y_BTHC.reshape(B, T, D), scale_D)


def exclude_own_value(y_BTHC: Tensor, v_BTGC: Tensor) -> Tensor:
    """y - (y . v) v / |v|^2: the attention output without its component along the token's own value vector."""
    y = y_BTHC.reshape(*v_BTGC.shape[:3], -1, v_BTGC.size(-1))
    v = v_BTGC.unsqueeze(3)
    share = (y * v).sum(-1, keepdim=True) / (v.square().sum(-1, keepdim=True) + NORM_EPS)
    return (y - share * v).view_as(y_BTHC)


class MLP(nn.Module):
    """relu^2 MLP (So et al. 2021)."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        hidden = settings.mlp_mult * settings.model_dim
        self.up = Linear(settings, settings.model_dim, hidden)
        self.down = Linear(settings, hidden, settings.model_dim, residual=True)

    def forward(self, x: Tensor, scale_D: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square(), scale_D)


class Block(nn.Module):
    """Mix with the first stream x0, then attention, then MLP, each behind a norm and a scale per channel."""

    def __init__(self, settings: Hyperparameters, layer: int, rotary: Rotary) -> None:
        super().__init__()
        D = settings.model_dim
        self.attn = Attention(settings, rotary, exclusive=layer >= settings.num_layers - settings.xsa_last_n)
        self.mlp = MLP(settings)
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))
        self.norm_scale = (layer + 1) ** -0.5 if settings.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, value: Tensor | None) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(norm(x) * self.norm_scale, value, self.attn_scale)
        return x + self.mlp(norm(x) * self.norm_scale, self.mlp_scale)


class SmearGate(nn.Module):
    """(1 - g) x_t + g x_{t-1}, g = sigmoid per channel; nothing crosses into a document (BOS) or a sequence."""

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(settings.model_dim))

    def forward(self, x_BTD: Tensor, starts_BT: Tensor) -> Tensor:
        before = F.pad(x_BTD, (0, 0, 1, -1)).masked_fill(starts_BT[..., None], 0.0)
        return torch.lerp(x_BTD, before, torch.sigmoid(self.gate).to(x_BTD.dtype))


class BigramHash(nn.Module):
    """Embedding of the hashed pair (x_{t-1}, x_t), projected to the width, with one factor a layer.

    The last row stands for positions without a predecessor (the first of a sequence or of a document).
    """

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.table = nn.Embedding(settings.bigram_vocab_size, settings.bigram_dim)
        nn.init.zeros_(self.table.weight)
        self.proj = Linear(settings, settings.bigram_dim, settings.model_dim)
        self.layer_scale = nn.Parameter(torch.full((settings.num_layers,), 0.05))

    def rows(self, x_BT: Tensor, starts_BT: Tensor) -> Tensor:
        last = self.table.num_embeddings - 1
        pair = torch.bitwise_xor(36313 * x_BT, 27191 * F.pad(x_BT, (1, -1))) % last
        return pair.masked_fill(starts_BT, last)

    def forward(self, x_BT: Tensor, starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(self.rows(x_BT, starts_BT)).to(dtype))


class ValueEmbedding(nn.Module):
    """Token embedding added to the attention values of some layers, with one scale a layer."""

    def __init__(self, settings: Hyperparameters, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(settings.vocab_size, settings.ve_dim)
        nn.init.normal_(self.table.weight, std=0.01)
        kv_dim = settings.model_dim // settings.num_heads * settings.num_kv_heads
        self.proj = Linear(settings, settings.ve_dim, kv_dim, residual=True)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scale = nn.Parameter(torch.ones(count))

    def forward(self, x_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table(x_BT).to(dtype)) * self.scale.to(dtype)


class GPT(nn.Module):
    """The model: U-Net of blocks over token embeddings, and one output head.

    Called with tokens x_BT and targets y_BT (int64) it returns the mean negative log-likelihood in nats, a scalar.
    `compute_dtype` is that of activations and matrix products; None: the weights' own.
    """

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
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D))
        self.value_layers = value_layers(settings)
        self.value_embed = ValueEmbedding(settings, len(self.value_layers)) if self.value_layers else None
        self.head = HEADS[settings.head_type](settings)

    def hidden(self, x_BT: Tensor) -> Tensor:
        """The final normed hidden states h_BTD: the first half of the blocks stores skips, the second adds them back."""
        starts_BT = (x_BT == BOS_ID).index_fill(1, x_BT.new_zeros(1), True)
        x = self.tok_emb(x_BT)
        dtype = self.compute_dtype or x.dtype
        x = x.to(dtype)
        if self.smear is not None:
            x = self.smear(x, starts_BT)
        x = x0 = norm(x)
        bigram = None if self.bigram is None else self.bigram(x_BT, starts_BT, dtype)
        values = None if self.value_embed is None else self.value_embed(x_BT, dtype)
        L, skips = len(self.blocks), []
        for layer, block in enumerate(self.blocks):
            if layer >= L // 2 and skips:
                x = x + self.skip_weights[layer - L // 2].to(dtype) * skips.pop()
            if bigram is not None:
                x = x + bigram * self.bigram.layer_scale[layer].to(dtype)
            x = block(x, x0, self.layer_value(values, layer))
            if layer < L // 2:
                skips.append(x)
        return norm(x)

    def layer_value(self, values: Tensor | None, layer: int) -> Tensor | None:
        if values is None or layer not in self.value_layers:
            return None
        return values * self.value_embed.layer_scale[self.value_layers.index(layer)].to(values.dtype)

    def nll(self, x_BT: Tensor, y_BT: Tensor, last: int | None = None) -> Tensor:
        """Negative log-likelihoods in nats of the last `last` targets of each sequence (all by default), B x last."""
        first = 0 if last is None else x_BT.size(1) - last
        h_ND = self.hidden(x_BT)[:, first:].flatten(0, 1)
        x, y = x_BT[:, first:], y_BT[:, first:]
        return self.head.nll(h_ND, x.flatten(), y.flatten(), self.tok_emb.weight).view(y.shape)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        return self.nll(x_BT, y_BT).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Heads: from hidden states to log-probabilities
# ---------------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A head is its logits, unless it overrides `nll` and `log_probs`, as a mixture must.

    `roles` maps each of its own parameters to its optimizer: "matrix" (Muon), "vocab" (Adam, HEAD_LR) or "scalar".
    `uses` names the settings that it reads. h_ND are normed hidden states, x_N current tokens, y_N targets, E_VD the
    token embedding. A head initialises itself, to equal the tied head at step 0 wherever that is possible.
    """

    uses: tuple[str, ...] = ()
    roles: Mapping[str, str] = {}

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__()
        self.softcap = settings.logit_softcap
        self.tied_logit_std = settings.tied_embed_init_std * settings.model_dim ** 0.5  # of E h at step 0

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

    def macs(self, D: int, V: int) -> int:
        """Multiply-accumulates of one token's logits; those of E h by default."""
        return V * D


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x."""
    return F.linear(x, weight.to(x.dtype))


class Tied(Head):
    """cap(E h) (Press and Wolf 2017)."""

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(h_ND, E_VD))


class Factorized(Head):
    """cap(g C A h): a softmax bottleneck of rank R with a learned scale g (study A, H1 and H2, made trainable)."""

    uses = ("head_rank",)
    roles = dict(A_RD="matrix", C_VR="vocab", g="scalar")

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__(settings)
        D, V, R = settings.model_dim, settings.vocab_size, settings.head_rank
        self.A_RD = nn.Parameter(torch.randn(R, D) / D ** 0.5)
        self.C_VR = nn.Parameter(torch.randn(V, R) / R ** 0.5)
        self.g = nn.Parameter(torch.tensor(self.tied_logit_std))

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        return self.cap(project(project(h_ND, self.A_RD), self.C_VR * self.g))

    def macs(self, D: int, V: int) -> int:
        return self.A_RD.numel() + self.C_VR.numel()


class Simplex(Head):
    """cap(g C s) with s = M softmax(S h) - 1, a point of the simplex centred and scaled (study A, H6, made trainable)."""

    uses = ("head_dim",)
    roles = dict(S_MD="matrix", C_VM="vocab", g="scalar")

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__(settings)
        D, V, M = settings.model_dim, settings.vocab_size, settings.head_dim
        self.S_MD = nn.Parameter(torch.randn(M, D) / D ** 0.5)
        self.C_VM = nn.Parameter(torch.randn(V, M) / M ** 0.5)
        # S h is standard normal at step 0, so M softmax(S h) is about lognormal, with variance e - 1.
        self.g = nn.Parameter(torch.tensor(self.tied_logit_std / (math.e - 1) ** 0.5))

    def logits(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        corners = self.S_MD.size(0)
        s_NM = corners * torch.softmax(at_least_fp32(project(h_ND, self.S_MD)), dim=-1) - 1
        return self.cap(project(s_NM.to(h_ND.dtype), self.C_VM * self.g))

    def macs(self, D: int, V: int) -> int:
        return self.S_MD.numel() + self.C_VM.numel()


class MixtureOfSoftmaxes(Head):
    """log sum_k pi_k softmax(cap(E (h + U_k V_k h))), pi = softmax(G h + b) (Yang et al. 2018; tied, low-rank).

    U = 0 starts all components at the tied head; independent V_k let their gradients differ from the first step.
    Training needs only the K target log-probabilities, so the V-wide mixture is never formed.
    """

    uses = ("head_k", "head_rank")
    roles = dict(U_KDR="matrix", V_KRD="matrix", gate_KD="scalar", gate_bias_K="scalar")

    def __init__(self, settings: Hyperparameters) -> None:
        super().__init__(settings)
        K, D, R = settings.head_k, settings.model_dim, settings.head_rank
        self.U_KDR = nn.Parameter(torch.zeros(K, D, R))
        self.V_KRD = nn.Parameter(torch.randn(K, R, D) / D ** 0.5)
        self.gate_KD = nn.Parameter(torch.zeros(K, D)) if K > 1 else None
        self.gate_bias_K = nn.Parameter(torch.zeros(K)) if K > 1 else None

    def log_pi(self, h_ND: Tensor) -> Tensor:
        """Log mixture weights, NxK; zero for one component, which needs no gate."""
        if self.gate_KD is None:
            return at_least_fp32(h_ND.new_zeros(h_ND.size(0), 1))
        return F.log_softmax(F.linear(at_least_fp32(h_ND), self.gate_KD, self.gate_bias_K), dim=-1)

    def component_logits(self, h_ND: Tensor, E_VD: Tensor, U_DR: Tensor, V_RD: Tensor) -> Tensor:
        return self.cap(project(h_ND + project(project(h_ND, V_RD), U_DR), E_VD))

    def nll(self, h_ND: Tensor, x_N: Tensor, y_N: Tensor, E_VD: Tensor) -> Tensor:
        def component(h: Tensor, E: Tensor, U: Tensor, V: Tensor, y: Tensor) -> Tensor:
            return -F.cross_entropy(self.component_logits(h, E, U, V), y, reduction="none")

        log_p_NK = torch.stack([checkpoint(component, h_ND, E_VD, U, V, y_N, use_reentrant=False)
                                for U, V in zip(self.U_KDR, self.V_KRD)], dim=-1)
        return -torch.logsumexp(self.log_pi(h_ND) + log_p_NK, dim=-1)

    def log_probs(self, h_ND: Tensor, x_N: Tensor, E_VD: Tensor) -> Tensor:
        parts_KNV = torch.stack([F.log_softmax(self.component_logits(h_ND, E_VD, U, V), dim=-1)
                                 for U, V in zip(self.U_KDR, self.V_KRD)])
        return torch.logsumexp(self.log_pi(h_ND).T[..., None] + parts_KNV, dim=0)

    def macs(self, D: int, V: int) -> int:
        return self.U_KDR.numel() + self.V_KRD.numel() + self.U_KDR.size(0) * V * D


HEADS: dict[str, type[Head]] = dict(tied=Tied, factorized=Factorized, mos=MixtureOfSoftmaxes, simplex=Simplex)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers: Muon for matrices, Adam for the rest; every parameter in exactly one group
# ---------------------------------------------------------------------------------------------------------------------

TRUNK_ROLES = (
    ("embed", r"(tok_emb|(bigram|value_embed)\.table)\.weight"),
    ("matrix", r"(blocks\.\d+\.(attn\.(q|k|v|out)|mlp\.(up|down))|(bigram|value_embed)\.proj)\.weight"),
    ("scalar", r"smear\.gate|skip_weights|(bigram|value_embed)\.(layer_)?scale"
               r"|blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)"),
)


def parameter_roles(model: GPT) -> dict[str, str]:
    """The role of every parameter by name: embed, matrix, scalar or vocab. RuntimeError unless each has exactly one."""
    roles = {}
    for name, _ in model.named_parameters():
        if name.startswith("head."):
            found = [role for own, role in model.head.roles.items() if name == f"head.{own}"]
        else:
            found = [role for role, pattern in TRUNK_ROLES if re.fullmatch(pattern, name)]
        if len(found) != 1:
            raise RuntimeError(f"parameter {name} meets {len(found)} optimizer rules; it must meet exactly one")
        roles[name] = found[0]
    return roles


def newton_schulz(G: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of each matrix of a batch: singular values near 1 (Jordan et al. 2024, Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with decoupled weight decay.

    Matrices of one shape are one group and one batch, split over the ranks; a parameter of 3 dimensions is a stack of
    matrices. Gradients must be the same on every rank. At constant momentum it equals torch.optim.Muon.
    """

    def __init__(self, params: list[nn.Parameter], world: World, dtype: torch.dtype, **defaults: float) -> None:
        self.world, self.dtype = world, dtype
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([dict(params=group) for group in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([p.grad for p in params])
            state = self.state[params[0]]  # one stacked buffer for the whole group
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
            update = self.orthogonalise(gradient.add_(momentum, alpha=group["momentum"]).flatten(0, -3))
            stretch = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.view_as(gradient).to(params[0].dtype)), alpha=-group["lr"] * stretch)

    def orthogonalise(self, stack: Tensor) -> Tensor:
        """Each rank does its share of the stack; all get the whole."""
        count, share = len(stack), -(-len(stack) // self.world.size)
        padded = F.pad(stack, (0, 0, 0, 0, 0, share * self.world.size - count))
        mine = padded[self.world.rank * share:(self.world.rank + 1) * share]
        return self.world.gather(newton_schulz(mine, self.dtype))[:count]


def build_optimizers(model: GPT, settings: Hyperparameters, world: World) -> list[torch.optim.Optimizer]:
    """Muon and Adam over all trainable parameters, by role; every group carries its unscaled rate as `base_lr`."""
    by_role: dict[str, list[nn.Parameter]] = dict(embed=[], vocab=[], scalar=[], matrix=[])
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        by_role[roles[name]].append(parameter)
    rates = dict(embed=settings.tied_embed_lr, vocab=settings.head_lr, scalar=settings.scalar_lr)
    adam = torch.optim.AdamW([dict(params=by_role[role], lr=lr) for role, lr in rates.items() if by_role[role]],
                             betas=(settings.beta1, settings.beta2), eps=settings.adam_eps,
                             weight_decay=settings.adam_wd, fused=True)
    dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
    muon = Muon(by_role["matrix"], world, dtype, lr=settings.matrix_lr, momentum=settings.muon_momentum,
                weight_decay=settings.muon_weight_decay)
    for group in adam.param_groups + muon.param_groups:
        group["base_lr"] = group["lr"]
    return [adam, muon]


def require_gradients(model: nn.Module) -> None:
    """RuntimeError naming every trainable parameter that the first backward pass left without a gradient."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached {', '.join(missing)}: it would never train")


@torch.no_grad()
def update_average(average: list[Tensor], parameters: list[Tensor], step: int, alpha: float) -> None:
    """Exponential moving average in float32, in place; short runs do not average their initial weights."""
    decay = min(alpha, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, parameters, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Schedule: pure functions of step and time
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate_scale(step: int, seconds: float, s: Hyperparameters) -> float:
    """1, then linear to 0 over min(WARMDOWN_ITERS steps, WARMDOWN_FRAC of the run), by whichever end comes first."""

    def ramp(remaining: float, length: float) -> float:
        return min(1.0, max(remaining, 0.0) / length) if length > 0 else 1.0

    by_steps = ramp(s.iterations - step, min(s.warmdown_iters, s.warmdown_frac * s.iterations))
    if s.max_wallclock_seconds == 0:
        return by_steps
    cap, step_seconds = s.max_wallclock_seconds, seconds / max(step, 1)
    return min(by_steps, ramp(cap - seconds, min(s.warmdown_iters * step_seconds, s.warmdown_frac * cap)))


def momentum_at(step: int, s: Hyperparameters) -> float:
    """Muon's momentum: linear from its start to its end over the warm-up."""
    done = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return (1 - done) * s.muon_momentum_warmup_start + done * s.muon_momentum


def finished(step: int, seconds: float, s: Hyperparameters) -> bool:
    return step >= s.iterations or 0 < s.max_wallclock_seconds <= seconds


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate: exact bits per byte, plain or sliding
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model: GPT, tokens_N: Tensor, byte_counts: ByteCounts, stride: int, s: Hyperparameters, world: World,
             ) -> tuple[float, float]:
    """Mean loss in nats a token, and bits per byte, over every target after the first token, each scored once.

    Window k reads T tokens from token k stride and scores the targets that no window before it scored; the first that
    reaches the end is the last. Stride 0 means T. tokens_N: the split, int64, on the world's device.
    """
    T = s.train_seq_len
    stride = stride or T
    windows = 1 + max(0, -(-(len(tokens_N) - 1 - T) // stride))
    nll = maybe_compile(model.nll, s, world)
    total = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, bytes, tokens
    for starts, scored in window_batches(windows, stride, s, world):
        index = starts[:, None] + torch.arange(T + 1, device=world.device)
        sequence = tokens_N[index.clamp(max=len(tokens_N) - 1)]  # positions beyond the end are never scored
        x, y = sequence[:, :-1], sequence[:, 1:]
        inside = (index[:, 1:] < len(tokens_N))[:, -scored:]
        losses = nll(x, y, scored)[inside].double()
        total += torch.stack((losses.sum(), byte_counts(x[:, -scored:][inside], y[:, -scored:][inside]).sum().double(),
                              inside.sum().double()))
    nats, count_bytes, count = world.sum(total).tolist()
    return nats / count, nats / math.log(2) / count_bytes


def window_batches(windows: int, stride: int, s: Hyperparameters, world: World) -> Iterator[tuple[Tensor, int]]:
    """This rank's windows, as (start tokens_B, targets that each scores): the first window scores T, the rest `stride`."""
    limit = s.micro_batch_tokens or (131072 if world.device.type == "cuda" else 16384)
    B = max(1, min(s.val_batch_size // world.size, limit) // s.train_seq_len)
    if world.rank == 0:
        yield torch.zeros(1, dtype=torch.int64, device=world.device), s.train_seq_len
    bounds = [1 + (windows - 1) * rank // world.size for rank in (world.rank, world.rank + 1)]
    for first in range(bounds[0], bounds[1], B):
        yield torch.arange(first, min(first + B, bounds[1]), device=world.device) * stride, stride


def maybe_compile(function: Callable, settings: Hyperparameters, world: World) -> Callable:
    wanted = settings.compile == "1" or settings.compile == "auto" and world.device.type == "cuda"
    return torch.compile(function, dynamic=False) if wanted else function


# ---------------------------------------------------------------------------------------------------------------------
# Artifact: quantize, fit under the cap, pack, unpack
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"GPTHEAD1"  # magic and version; then SHA-256 of the rest, header length (uint32), JSON header, payload
FINER = 8.0  # vocabulary-side matrices are the most sensitive: their step is this much finer, in 16 bits


def is_quantized(shape: tuple[int, ...]) -> bool:
    """Matrices are rounded to a grid; vectors and the few rows of scales stay in float16."""
    return len(shape) >= 2 and min(shape[-2:]) >= 16


def to_grid(weight: Tensor, role: str, step: float) -> tuple[Tensor, Tensor]:
    """Integers and row scales (bfloat16) of a matrix or a stack of them: weight is about integers * scales.

    A row's scale is `step` times its RMS (FINER for the vocabulary side), or what its largest entry needs in 8 bits
    (16 for the vocabulary side), whichever is coarser; step = 0 is plain absmax rounding.
    """
    fine = role in ("embed", "vocab")
    levels = 32767 if fine else 127
    rows = weight.detach().float().flatten(0, -2)
    rms = rows.square().mean(dim=1, keepdim=True).sqrt()
    scale = torch.maximum(rms * (step / FINER if fine else step), rows.abs().amax(dim=1, keepdim=True) / levels)
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    return (rows / scale.float()).round_().clamp_(-levels, levels), scale


def on_grid(weight: Tensor, role: str, step: float) -> Tensor:
    """The weight as it will be after export at this step."""
    integers, scale = to_grid(weight, role, step)
    return integers.mul_(scale.float()).view_as(weight).to(weight.dtype)


@contextlib.contextmanager
def rounded_weights(model: GPT, roles: Mapping[str, str], step: float | None) -> Iterator[None]:
    """Inside: the model's matrices lie on the export's grid, so gradients are taken there (straight-through, late QAT).

    step None: nothing happens.
    """
    chosen = [] if step is None else [(p, roles[name]) for name, p in model.named_parameters() if is_quantized(p.shape)]
    masters = [p.detach().clone() for p, _ in chosen]
    with torch.no_grad():
        for p, role in chosen:
            p.copy_(on_grid(p, role, step))
    yield
    with torch.no_grad():
        for (p, _), master in zip(chosen, masters):
            p.copy_(master)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def compress(raw: bytes, codec: str) -> bytes:
    """Entropy coding: rounded weights hold no repeats, so deflate runs Huffman-only, still readable by any inflater."""
    if codec == "zstd":
        return zstd().ZstdCompressor(level=9).compress(raw)
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(raw) + deflate.flush()


def decompress(packed: bytes, codec: str, size: int) -> bytes:
    """Exactly `size` bytes, allocating no more; ValueError for anything else."""
    if codec == "zstd":
        module = zstd()
        try:
            raw = module.ZstdDecompressor().stream_reader(packed).read(size + 1)
        except module.ZstdError as error:
            raise ValueError(str(error)) from None
    else:
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(packed, size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if not inflate.eof or inflate.unused_data:
            raise ValueError("the payload does not end where it should")
    if len(raw) != size:
        raise ValueError(f"the payload holds {len(raw)} bytes instead of {size}")
    return raw


def zstd():
    try:
        import zstandard
    except ImportError:
        raise UserError("COMPRESS_ALGO=zstd: the package zstandard is not installed; install it or use zlib") from None
    return zstandard


def stored_settings(settings: Hyperparameters) -> dict[str, object]:
    """What the artifact must know to be scored alone: the model's settings and the evaluation's."""
    return {field.name: getattr(settings, field.name) for field in fields().values() if field.metadata["scope"] != "run"}


def encode(state: Mapping[str, Tensor], roles: Mapping[str, str], settings: Hyperparameters, step: float) -> bytes:
    """The artifact's bytes at one quantization step: a pure function of its arguments."""
    tensors, integers, rest = [], [], []
    for name, weight in state.items():
        if is_quantized(weight.shape):
            q, scale = to_grid(weight, roles[name], step)
            planes = 2 if roles[name] in ("embed", "vocab") else 1
            kind = "int16" if planes == 2 else "int8"
            integers.append(bytes_of(q.to(getattr(torch, kind)).view(torch.uint8).view(-1, planes).T))  # low bytes, then high
            rest.append(bytes_of(scale))
        else:
            kind = "float16" if weight.abs().max() < 65504 else "float32"
            rest.append(bytes_of(weight.to(getattr(torch, kind))))
        tensors.append([name, kind, list(weight.shape)])
    header = json.dumps(dict(codec=settings.compress_algo, settings=stored_settings(settings), tensors=tensors),
                        separators=(",", ":")).encode()
    body = struct.pack("<I", len(header)) + header + compress(b"".join(integers + rest), settings.compress_algo)
    return MAGIC + hashlib.sha256(body).digest() + body


def fit(size: Callable[[float], int], limit: int) -> float:
    """The finest quantization step whose size is within the limit and 0.1% of it; 0 where even plain rounding fits.

    Returns the coarsest step tried, 64, where nothing fits.
    """
    if size(0.0) <= limit:
        return 0.0
    low, high = 0.01, 0.02
    while size(high) > limit and high < 64:
        low, high = high, 2 * high
    for _ in range(16):
        middle = (low * high) ** 0.5
        bytes_now = size(middle)
        low, high = (low, middle) if bytes_now <= limit else (middle, high)
        if 0.999 * limit <= bytes_now <= limit:
            break
    return high


def entropy_bytes(state: Mapping[str, Tensor], roles: Mapping[str, str], step: float) -> int:
    """The artifact's size by the order-0 entropy of each tensor's integers: an estimate good to about 1%, and fast."""
    total = 0.0
    for name, weight in state.items():
        total += 2 * weight.numel() / (weight.shape[-1] if is_quantized(weight.shape) else 1)
        if is_quantized(weight.shape):
            q = to_grid(weight, roles[name], step)[0].to(torch.int32).flatten()
            p = torch.bincount(q - q.min()).double() / q.numel()
            total += q.numel() * -(p * p.clamp_min(1e-300).log2()).sum().item() / 8
    return int(total)


def pack(state: Mapping[str, Tensor], roles: Mapping[str, str], settings: Hyperparameters, limit: int) -> tuple[bytes, float]:
    """The finest artifact within `limit` bytes, and its step. Deterministic: the same weights give the same bytes."""
    state = {name: weight.detach().float().cpu() for name, weight in state.items()}
    step = fit(lambda step: len(encode(state, roles, settings, step)), limit)
    return encode(state, roles, settings, step), step


def describe_packing(state: Mapping[str, Tensor], roles: Mapping[str, str], step: float) -> Iterator[str]:
    """A log line for each role: parameters, bytes a parameter by either codec, relative squared error."""
    for role in dict.fromkeys(roles.values()):
        weights = [weight.detach().float().cpu() for name, weight in state.items()
                   if roles[name] == role and is_quantized(weight.shape)]
        if weights:
            kind = torch.int16 if role in ("embed", "vocab") else torch.int8
            raw = b"".join(bytes_of(to_grid(w, role, step)[0].to(kind).view(torch.uint8).view(-1, kind.itemsize).T) for w in weights)
            count = sum(w.numel() for w in weights)
            error = sum((on_grid(w, role, step) - w).square().sum().item() for w in weights)
            energy = max(sum(w.square().sum().item() for w in weights), 1e-30)
            yield (f"quantized {role}: {count} parameters, step {step:.4g}, deflate {len(compress(raw, 'zlib')) / count:.4f}"
                   f" bytes a parameter, relative squared error {error / energy:.3g}")


def unpack(blob: bytes, where: object) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Settings and float32 weights of an artifact; UserError for a corrupt, foreign or newer one. Executes nothing."""
    try:
        return decode(blob)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"ARTIFACT={where}: is no artifact of this program, or a damaged one ({error})") from None


def decode(blob: bytes) -> tuple[dict[str, object], dict[str, Tensor]]:
    if blob[:len(MAGIC)] != MAGIC:
        raise ValueError("wrong magic or another version")
    body = blob[len(MAGIC) + 32:]
    if hashlib.sha256(body).digest() != blob[len(MAGIC):len(MAGIC) + 32]:
        raise ValueError("checksum mismatch")
    header_end = 4 + struct.unpack("<I", body[:4])[0]
    header = json.loads(body[4:header_end])
    layout = [(name, getattr(torch, kind), tuple(shape)) for name, kind, shape in header["tensors"]
              if kind in ("int8", "int16", "float16", "float32") and all(type(n) is int and n > 0 for n in shape)]
    if len(layout) != len(header["tensors"]):
        raise ValueError("unknown tensor kind or shape")
    sizes = [kind.itemsize * math.prod(shape) for _, kind, shape in layout]
    scales = [2 * math.prod(shape[:-1]) if not kind.is_floating_point else 0 for _, kind, shape in layout]
    if sum(sizes) + sum(scales) > 64 * len(blob):
        raise ValueError("claims more weights than it can hold")
    raw = memoryview(bytearray(decompress(body[header_end:], header["codec"], sum(sizes) + sum(scales))))
    position = [0, sum(size for size, scale in zip(sizes, scales) if scale)]  # of the integers, and of the rest

    def take(kind: torch.dtype, count: int, part: int) -> Tensor:
        start = position[part]
        position[part] += count * kind.itemsize
        return torch.frombuffer(raw[start:position[part]], dtype=kind)

    state = {}
    for name, kind, shape in layout:
        if kind.is_floating_point:
            state[name] = take(kind, math.prod(shape), 1).float().view(shape)
        else:
            planes = take(torch.uint8, math.prod(shape) * kind.itemsize, 0).view(kind.itemsize, -1)
            q = planes.T.contiguous().view(kind).float().view(-1, shape[-1])
            state[name] = q.mul_(take(torch.bfloat16, len(q), 1).float()[:, None]).view(shape)
    return header["settings"], state


def load_artifact(path: Path, settings: Hyperparameters, world: World) -> GPT:
    """A fresh model with the weights of an artifact on disk, for settings that agree with it."""
    _, state = unpack(path.read_bytes(), path)
    model = GPT(settings, compute_dtype(settings, world)).to(world.device)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"ARTIFACT={path}: its tensors are not those of its own settings") from None
    return model


def compute_dtype(settings: Hyperparameters, world: World) -> torch.dtype:
    """bf16 where the chip multiplies it fast (CUDA, AMX, AVX512-BF16), else float32, unless COMPUTE_DTYPE says so."""
    fast = world.device.type == "cuda" or any(getattr(torch.cpu, f"_is_{name}_supported", bool)()
                                              for name in ("amx_tile", "avx512_bf16"))
    auto = torch.bfloat16 if fast else torch.float32
    return dict(auto=auto, bf16=torch.bfloat16, fp32=torch.float32)[settings.compute_dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Log and files: everything of a run lies in runs/<RUN_ID>/
# ---------------------------------------------------------------------------------------------------------------------


def source() -> bytes:
    return Path(__file__).read_bytes()


def hardware(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"{world.size} x CPU process, {platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(world: World) -> tuple[int, int]:
    """Peak MiB allocated and reserved: of the GPU, or (twice the same) of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak >> 20, peak >> 20


class RunLog:
    """train.log and metrics.jsonl of one run, and the console. Silent on ranks above 0."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder  # None: silent

    def write(self, line: str, console: bool = True, **metrics: object) -> None:
        """One log line; `metrics`, where given, become one JSON object."""
        if self.folder is None:
            return
        if console:
            print(line, flush=True)
        with open(self.folder / "train.log", "a", encoding="utf-8") as out:
            out.write(line + "\n")
        if metrics:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as out:
                out.write(json.dumps(metrics) + "\n")

    def opening(self, settings: Hyperparameters, world: World) -> None:
        """Versions, source, machine and every resolved setting: all that is needed to run it again."""
        self.write(f"python {platform.python_version()} torch {torch.__version__} numpy {np.__version__} sentencepiece"
                   f" {sentencepiece.__version__} source_sha256:{hashlib.sha256(source()).hexdigest()}")
        self.write(f"hardware: {hardware(world)}; compute dtype {compute_dtype(settings, world)}")
        for name, field in fields().items():
            value = getattr(settings, field.name)
            self.write(f"{name}={int(value) if isinstance(value, bool) else value}", console=False)
        if world.device.type == "cpu":
            self.write("no CUDA: USE_FA3, FLASH_ATTN_* and SKIP_COMPILE=0 are accepted and unused")


def claim_run(settings: Hyperparameters, world: World) -> tuple[Path, dict[str, object] | None, object]:
    """The run's folder, the result of a finished run of this name, and the lock that says it is in progress.

    Raises UserError where the name belongs to a run with other settings or to one in progress. On rank 0 only.
    """
    import fcntl

    folder = Path("runs") / settings.run_id
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"RUN_ID={settings.run_id}: that run is in progress; wait for it or choose another name") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); run in a writable folder") from None
    done = folder / "submission.json"
    if done.exists():
        result = json.loads(done.read_text())
        for name, value in dataclasses.asdict(settings).items():
            if result["settings"].get(name, value) != value:
                raise UserError(f"RUN_ID={settings.run_id}: is a finished run with {name.upper()}={result['settings'][name]},"
                                f" not {value}; choose another name")
        return folder, result, lock
    for leftover in ("train.log", "metrics.jsonl"):  # of a run that was killed before it could write a result
        (folder / leftover).unlink(missing_ok=True)
    return folder, None, lock


# ---------------------------------------------------------------------------------------------------------------------
# Train: the loop, and the bench that times its step
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of training: runs between `start` and `stop`, on the wall clock, once the device is done."""

    def __init__(self, world: World) -> None:
        self.world, self.banked, self.started = world, 0.0, None

    def start(self) -> None:
        self.world.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.world.synchronize()
        self.banked, self.started = self.seconds(), None

    def seconds(self) -> float:
        return self.banked + (0.0 if self.started is None else time.perf_counter() - self.started)


class Trainer:
    """A model, its optimizers, and one step of both."""

    def __init__(self, model: GPT, settings: Hyperparameters, world: World) -> None:
        self.model, self.settings, self.world = model, settings, world
        self.roles = parameter_roles(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss = maybe_compile(model, settings, world)
        self.optimizers = build_optimizers(model, settings, world)

    def step(self, batches: list[tuple[Tensor, Tensor]], index: int, scale: float, grid: float | None = None) -> Tensor:
        """Train on this rank's share of one batch; the mean loss over all ranks (a tensor: nothing is waited for)."""
        s = self.settings
        total = torch.zeros((), device=self.world.device)
        with rounded_weights(self.model, self.roles, grid):
            for x_BT, y_BT in batches:
                loss = self.loss(x_BT, y_BT) / len(batches)
                loss.backward()
                total += loss.detach()
        if index == 0:
            require_gradients(self.model)
        self.world.average([p.grad for p in self.parameters] + [total])
        if s.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, s.grad_clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum_at(index, s)
            optimizer.step()
            optimizer.zero_grad()
        return total

    def warm_up(self, shards: Shards) -> None:
        """WARMUP_STEPS steps that prime compiled code and caches, then are undone."""
        initial = [p.detach().clone() for p in self.parameters]
        for index in range(self.settings.warmup_steps):
            self.step(train_batch(shards, index, self.settings, self.world), index, 1.0)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, initial)
        self.optimizers = build_optimizers(self.model, self.settings, self.world)


def check_finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise UserError(f"step {step}: the loss is {value}; the run stops and writes no artifact (lower the learning rates)")
    return value


def train(trainer: Trainer, shards: Shards, validate: Callable[[int, float], None], log: RunLog) -> tuple[int, float]:
    """Train until ITERATIONS or the time cap; leaves the averaged weights in the model. Returns steps and seconds."""
    s, world = trainer.settings, trainer.world
    trainer.warm_up(shards)
    average = [p.detach().clone() for p in trainer.parameters] if s.use_ema else []
    clock, step, grid, loss = Clock(world), 0, None, None
    clock.start()
    while True:
        seconds = world.agree(clock.seconds())
        done = finished(step, seconds, s)
        if done or s.val_loss_every and step % s.val_loss_every == 0:
            clock.stop()
            validate(step, clock.seconds())
            clock.start()
        if done:
            break
        scale = learning_rate_scale(step, seconds, s)
        if s.late_qat and grid is None and scale < s.qat_threshold:
            grid = late_grid(trainer, log, step)
        before, loss = loss, trainer.step(train_batch(shards, step, s, world), step, scale, grid)
        if s.use_ema:
            update_average(average, trainer.parameters, step, s.ema_alpha)
        if before is not None:
            check_finite(before, step)  # waits for the step before this one: the host runs one step ahead, no more
        step += 1
        if s.train_log_every and (step <= 10 or step % s.train_log_every == 0):
            log_step(log, step, check_finite(loss, step), clock.seconds(), scale, s)
    clock.stop()
    if loss is not None:
        check_finite(loss, step)
    if step < s.iterations:
        log.write(f"stopping_early: wallclock_cap train_time:{1000 * clock.seconds():.0f}ms step:{step}/{s.iterations}")
    with torch.no_grad():
        torch._foreach_copy_(trainer.parameters[:len(average)], average)
    return step, clock.seconds()


def late_grid(trainer: Trainer, log: RunLog, step: int) -> float:
    """The quantization step at which the present weights would fit the cap: what late QAT rounds to."""
    limit = trainer.settings.size_limit_bytes - len(source())
    state = trainer.model.state_dict()
    grid = trainer.world.agree(fit(lambda size: entropy_bytes(state, trainer.roles, size), limit))
    log.write(f"late_qat: from step {step}, quantization step {grid:.4g}")
    return grid


def log_step(log: RunLog, step: int, loss: float, seconds: float, scale: float, s: Hyperparameters) -> None:
    speed = step * s.train_batch_tokens / seconds
    left = (s.iterations - step) * seconds / step
    left = min(left, s.max_wallclock_seconds - seconds) if s.max_wallclock_seconds else left
    log.write(f"step:{step}/{s.iterations} train_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms"
              f" step_avg:{1000 * seconds / step:.2f}ms lr_scale:{scale:.3f} tokens/s:{speed:.0f} eta:{max(left, 0):.0f}s",
              kind="train", step=step, train_loss=loss, train_seconds=seconds, lr_scale=scale, tokens_per_second=speed)


def flops_per_token(model: GPT, s: Hyperparameters) -> float:
    """6 multiply-adds' worth a weight of blocks and head, and 6 L D T for causal attention (forward and backward)."""
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2 and p.size(0) > 2)
    return 6 * (blocks + model.head.macs(s.model_dim, s.vocab_size)) + 6 * s.num_layers * s.model_dim * s.train_seq_len


def bench(settings: Hyperparameters, world: World) -> None:
    """Time training steps of the chosen head and of the tied one, in turn, on random tokens; print medians."""
    peak = 989e12 if world.device.type == "cuda" and "H100" in torch.cuda.get_device_name() else None
    heads = list(dict.fromkeys(("tied", settings.head_type)))
    trainers = []
    for head in heads:
        torch.manual_seed(settings.seed)
        s = dataclasses.replace(settings, head_type=head)
        trainers.append(Trainer(GPT(s, compute_dtype(s, world)).to(world.device), s, world))
    T, share = settings.train_seq_len, settings.train_batch_tokens // settings.train_seq_len // world.size
    tokens = torch.randint(settings.vocab_size, (share, T + 1), device=world.device)
    B = micro_batch_sequences(settings, world)
    batches = [(part[:, :-1], part[:, 1:]) for part in tokens.split(B)]
    times: dict[str, list[float]] = {head: [] for head in heads}
    for index in range(13):
        for head, trainer in zip(heads, trainers):
            clock = Clock(world)
            clock.start()
            trainer.step(batches, index, 1.0)
            clock.stop()
            times[head] += [clock.seconds()] if index >= 3 else []
    for head, trainer in zip(heads, trainers):
        seconds = float(np.median(times[head]))
        flops = flops_per_token(trainer.model, settings) * settings.train_batch_tokens
        share_of_peak = f"{flops / seconds / peak / world.size:.1%}" if peak else "n/a (known for H100)"
        if world.rank == 0:
            print(f"bench head:{head} {1000 * seconds:.1f} ms/step (median of 10, {settings.train_batch_tokens} tokens, sequence {T})"
                  f" tokens/s:{settings.train_batch_tokens / seconds:.0f} FLOP/token:{flops / settings.train_batch_tokens / 1e6:.1f}M"
                  f" TFLOP/s:{flops / seconds / 1e12:.2f} MFU:{share_of_peak} to tied:{seconds / np.median(times['tied']):.3f}")
    if world.rank == 0:
        print("peak memory allocated: {} MiB reserved: {} MiB".format(*peak_memory(world)))


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def load_validation(settings: Hyperparameters, world: World) -> tuple[Tensor, ByteCounts]:
    """The split that is scored, as int64 tokens on the device, and the bytes that its tokens stand for."""
    shards = Shards(Path(settings.data_path), settings.eval_split, settings.vocab_size)
    if len(shards) <= settings.train_seq_len:
        raise UserError(f"TRAIN_SEQ_LEN={settings.train_seq_len}: the {settings.eval_split} split has only {len(shards)} tokens")
    byte_counts = load_byte_counts(Path(settings.tokenizer_path), settings.vocab_size, world.device)
    return torch.from_numpy(shards.take(0, len(shards))).to(world.device), byte_counts


def score(model: GPT, tokens_N: Tensor, byte_counts: ByteCounts, s: Hyperparameters, world: World) -> tuple[float, float, float]:
    """Loss, bits per byte and seconds of the evaluation at EVAL_STRIDE."""
    clock = Clock(world)
    clock.start()
    loss, bpb = evaluate(model, tokens_N, byte_counts, s.eval_stride, s, world)
    clock.stop()
    return loss, bpb, clock.seconds()


def final_lines(codec: str, loss: float, bpb: float, seconds: float) -> Iterator[str]:
    yield f"final_int8_{codec}_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms"
    yield f"final_int8_{codec}_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}"


def run_eval(settings: Hyperparameters, world: World) -> int:
    """MODE=eval: score an artifact; the architecture and the evaluation's settings are its own."""
    path = Path(settings.artifact)
    if not path.is_file():
        raise UserError(f"ARTIFACT={path}: no such file")
    settings = prepare_demo(from_env(defaults=unpack(path.read_bytes(), path)[0]), world)
    tokens_N, byte_counts = load_validation(settings, world)
    for line in final_lines(settings.compress_algo, *score(load_artifact(path, settings, world), tokens_N, byte_counts, settings, world)):
        if world.rank == 0:
            print(line)
    return 0


def export(model: GPT, settings: Hyperparameters, world: World, path: Path, log: RunLog) -> tuple[int, int]:
    """Write the artifact (rank 0) and log its size; returns bytes of code and of the artifact, measured from the files."""
    code = len(source())
    if world.rank == 0:
        blob, step = pack(model.state_dict(), parameter_roles(model), settings, settings.size_limit_bytes - code)
        write_whole(path, blob)
        for line in describe_packing(model.state_dict(), parameter_roles(model), step):
            log.write(line)
    world.barrier()
    packed, codec = path.stat().st_size, settings.compress_algo
    log.write(f"Code size: {code} bytes")
    log.write(f"Serialized model int8+{codec}: {packed} bytes")
    log.write(f"Total submission size int8+{codec}: {code + packed} bytes")
    log.write(f"size_limit: {settings.size_limit_bytes} bytes headroom: {settings.size_limit_bytes - code - packed} bytes")
    return code, packed


def run_train(settings: Hyperparameters, world: World) -> int:
    """MODE=train: train, export, reload, score. Exit code 0, or 3 for a submission above the size limit."""
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{settings.head_type}-{settings.seed}"
    settings = dataclasses.replace(settings, run_id=settings.run_id or world.agree_text(stamp))
    settings = prepare_demo(settings, world)
    shards = Shards(Path(settings.data_path), "train", settings.vocab_size)
    tokens_N, byte_counts = load_validation(settings, world)
    micro_batch_sequences(settings, world)
    torch.manual_seed(settings.seed)
    model = GPT(settings, compute_dtype(settings, world)).to(world.device)
    folder, finished_run, lock = claim_run(settings, world) if world.rank == 0 else (Path("runs") / settings.run_id, None, None)
    log = RunLog(folder if world.rank == 0 else None)
    finished_run = json.loads(world.agree_text(json.dumps(finished_run)))
    if finished_run:
        if world.rank == 0:
            print(f"{folder} is finished: val_bpb:{finished_run['val_bpb']:.8f}, {finished_run['bytes_total']} bytes")
        return 3 if finished_run["bytes_total"] > settings.size_limit_bytes else 0

    log.opening(settings, world)
    log.write(f"data: {settings.data_path} train {len(shards)} tokens {shards.fingerprint()}; {settings.eval_split} {len(tokens_N)}"
              f" tokens {Shards(Path(settings.data_path), settings.eval_split, settings.vocab_size).fingerprint()};"
              f" unigram bpb {unigram_bpb(shards, tokens_N, byte_counts):.4f}")
    log.write(f"model_params:{sum(p.numel() for p in model.parameters())}")

    def validate(step: int, seconds: float) -> None:
        loss, bpb = evaluate(model, tokens_N, byte_counts, 0, settings, world)
        log.write(f"step:{step}/{settings.iterations} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * seconds:.0f}ms"
                  f" step_avg:{1000 * seconds / max(step, 1):.2f}ms", kind="val", step=step, val_loss=loss, val_bpb=bpb,
                  train_seconds=seconds)

    step, seconds = train(Trainer(model, settings, world), shards, validate, log)
    log.write("peak memory allocated: {} MiB reserved: {} MiB".format(*peak_memory(world)))
    before = score(model, tokens_N, byte_counts, settings, world)
    log.write(f"pre_quant val_loss:{before[0]:.8f} val_bpb:{before[1]:.8f}")
    path = folder / "final_model.int8.ptz"
    code, packed = export(model, settings, world, path, log)
    loss, bpb, eval_seconds = score(load_artifact(path, settings, world), tokens_N, byte_counts, settings, world)
    for line in final_lines(settings.compress_algo, loss, bpb, eval_seconds):
        log.write(line)
    result = dict(
        author=settings.author, github_id=settings.github_id, name=f"{settings.num_layers}L {settings.head_type} head",
        blurb=f"{settings.num_layers} layers x {settings.model_dim}, {settings.head_type} head, data {settings.data_path}",
        date=f"{datetime.date.today()}", track="non-record-16mb", seed=settings.seed, val_loss=loss, val_bpb=bpb,
        pre_quant_val_loss=before[0], pre_quant_val_bpb=before[1], step_stop=step, wallclock_seconds=seconds,
        eval_time_seconds=eval_seconds, bytes_total=code + packed, bytes_code=code, bytes_model_int8_zlib=packed,
        hardware=hardware(world), pytorch_version=torch.__version__, head=settings.head_type,
        source_sha256=hashlib.sha256(source()).hexdigest(), settings=dataclasses.asdict(settings))
    if world.rank == 0:
        write_whole(folder / "submission.json", json.dumps(result, indent=1).encode())
    log.write(f"run folder: {folder}", kind="final", **{k: v for k, v in result.items() if k != "settings"})
    if code + packed > settings.size_limit_bytes:
        log.write(f"over the cap: {code + packed} bytes of {settings.size_limit_bytes}; the run exits with code 3")
        return 3
    return 0


def main() -> int:
    """Run the chosen mode; the exit code. A user's mistake is one line on standard error, said by rank 0, and code 2."""
    rank = 0
    try:
        world = World()
        rank = world.rank
        settings = from_env()
        world.start()
        if settings.mode == "bench":
            bench(settings, world)
            code = 0
        else:
            code = dict(train=run_train, eval=run_eval)[settings.mode](settings, world)
        world.close()
        return code
    except UserError as error:
        if rank:
            time.sleep(10)  # rank 0 speaks first; torchrun then ends this process
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())

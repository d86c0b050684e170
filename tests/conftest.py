"""What the test files share: small models, small data, and the script run as a user runs it."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import filelock
import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# a small model in this process, by field; and a small run, by environment variable
SMALL_MODEL = dict(
    vocab_size=48,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    bigram_vocab_size=40,
    bigram_dim=16,
    ve_dim=8,
    ve_layers="1,3",
    xsa_last_n=2,
    train_seq_len=24,
    train_batch_tokens=96,
    eval_stride=0,
    head_k=3,
    head_rank=4,
    head_dim=8,
    compile="0",
    compute_dtype="fp32",
)
SMALL_RUN = dict(
    NUM_LAYERS=4,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    ROPE_DIMS=4,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=16,
    VE_DIM=16,
    VE_LAYERS="2,3",
    TRAIN_BATCH_TOKENS=512,
    TRAIN_SEQ_LEN=64,
    MAX_WALLCLOCK_SECONDS=0,
    ITERATIONS=6,
    WARMUP_STEPS=0,
    WARMDOWN_ITERS=4,
    EVAL_STRIDE=0,
    VAL_BATCH_SIZE=2048,
    TRAIN_LOG_EVERY=1,
    COMPUTE_DTYPE="fp32",
)


def from_env(environ, stored=None):
    """All settings as the program resolves them from these variables."""
    return train_gpt.check_head(train_gpt.from_env(environ, stored or {}))


def small(**changes):
    """Resolved settings of a small model."""
    s = dataclasses.replace(train_gpt.Hyperparameters(), **{**SMALL_MODEL, **changes})
    return train_gpt.check_head(s)


def cpu_world():
    """One process on the CPU, wherever the tests run."""
    world = train_gpt.World({})
    world.device = torch.device("cpu")
    return world


# ---- whole runs ----


def environment(*settings):
    """A bare environment, one thread, and these variables."""
    bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    merged = {name: value for part in settings for name, value in part.items()}
    return dict(bare, OMP_NUM_THREADS="1", **{name: str(value) for name, value in merged.items()})


def command(ranks=0, script=SCRIPT):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks else []), str(script)]


def start(cwd, *settings, ranks=0, script=SCRIPT):
    """The script as a process, alone or under torchrun."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(ranks, script), cwd=cwd, env=environment(*settings), **pipes)


def run(cwd, *settings, ranks=0, code=0):
    """The script to its end; its standard output. Its exit code must be `code` (torchrun's own is 1)."""
    process = start(cwd, *settings, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out if code == 0 else err


def run_here(cwd, *settings, code=0, at=MappingProxyType({}), program=train_gpt):
    """`run` in this process, which spares the start-up: standard output, or standard error.

    `at` holds by step what is done just before it, with `world`. Signals are not listened to:
    `stop` stands for one.
    """
    step = program.Trainer.step

    def step_with_action(trainer, batches, scale, share):
        if trainer.steps in at:
            at[trainer.steps](trainer.world)
        return step(trainer, batches, scale, share)

    locks, new_lock = [], filelock.FileLock

    def lock(path):
        locks.append(new_lock(path))
        return locks[-1]

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ, environment(*settings), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["train_gpt.py"])
        patch.setattr(signal, "signal", lambda number, handler: None)
        patch.setattr(program.Trainer, "step", step_with_action)
        patch.setattr(filelock, "FileLock", lock)
        try:
            found = program.main()
        finally:  # a process would end here, and its locks with it
            for held in locks:
                held.release(force=True)
    assert found == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def stop(world):
    """What SIGTERM does."""
    world.signal = signal.SIGTERM


def last_line(folder):
    """The last line of a run's log: why it ended."""
    return (folder / "train.log").read_text().splitlines()[-1]


def losses(folder):
    """The training losses of a run, by step, and its final figure."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r["train_loss"] for r in records if r["kind"] == "train"}
    final = json.loads((folder / "submission.json").read_text())["val_bpb"]
    return by_step, final


def wait_for(path, text, process, seconds=100):
    """Until this text stands in a file that the process writes."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder of the demo corpus: tokenizer.model and the train, val and test shards."""
    folder = tmp_path_factory.mktemp("demo")
    train_gpt.build_demo(folder, 1024)
    return folder


@pytest.fixture(scope="session")
def data(demo, tmp_path_factory):
    """Variables that name a small corpus: the demo's tokenizer, 40,000 training tokens, 2,000 and 1,000 others."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40_000), ("val", 2_000), ("test", 1_000)):
        shards = train_gpt.Shards(demo, split, 1024)
        train_gpt.write_shard(folder / f"fineweb_{split}_000000.bin", shards.take(0, count))
    return dict(DATA_PATH=folder, TOKENIZER_PATH=demo / "tokenizer.model")


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder in which a small run named `done` has finished, a mixture of softmaxes."""
    cwd = tmp_path_factory.mktemp("finished")
    run(cwd, SMALL_RUN, data, dict(RUN_ID="done", HEAD_TYPE="mos", HEAD_RANK=8, EVAL_STRIDE=16))
    return cwd


def random_tokens(count, vocab_size=48, seed=0):
    """int64 tokens with a document start here and there."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab_size, count)
    tokens[rng.random(count) < 0.05] = train_gpt.BOS_ID
    return torch.from_numpy(tokens)

"""Losses of 20 steps that every source since 8aa96f6 must repeat: a small study stack, float32, one thread.

`python tests/test_golden.py` writes tests/golden.json anew; do that only where a commit means to change the arithmetic, and say so.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
SETTINGS = dict(
    DATA_PATH=".",
    TOKENIZER_PATH="tokenizer.model",
    RUN_ID="golden",
    VOCAB_SIZE="320",
    NUM_LAYERS="4",
    MODEL_DIM="64",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    BIGRAM_VOCAB_SIZE="128",
    BIGRAM_DIM="16",
    VE_DIM="16",
    VE_LAYERS="2,3",
    HEAD_RANK="16",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="1024",
    MICRO_BATCH_TOKENS="512",
    EVAL_STRIDE="32",
    ITERATIONS="20",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="1",
    WARMUP_STEPS="2",
    COMPUTE_DTYPE="fp32",
    COMPILE="0",
    SEED="42",
)
HEADS = dict(
    tied=dict(HEAD_TYPE="tied"), mos=dict(HEAD_TYPE="mos"), untied=dict(HEAD_TYPE="untied")
)
UNUSED = dict(tied=("HEAD_RANK",), mos=(), untied=("HEAD_RANK",))


def write_data(folder):
    """Shards of a Markov chain that depend on numpy's generator alone, and a tokenizer of as many tokens."""
    rng = np.random.default_rng(0)
    following = rng.integers(4, 320, (320, 4))
    choices = rng.integers(0, 4, 40_000)
    tokens = [1]
    for choice in choices:
        tokens.append(int(following[tokens[-1], choice]))
    for split, part in (("train", tokens[:36_000]), ("val", tokens[36_000:])):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(part)
        data = header.tobytes() + np.asarray(part, dtype="<u2").tobytes()
        (folder / f"fineweb_{split}_000000.bin").write_bytes(data)
    (folder / "text").write_text("\n".join(f"{i} {i * i} {i**3:x} letters abc" for i in range(2000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )


def losses(folder, head):
    """The training losses of 20 steps and the final validation loss at stride 32."""
    kept = {name: value for name, value in SETTINGS.items() if name not in UNUSED[head]}
    environ = dict(kept, **HEADS[head], OMP_NUM_THREADS="1", PATH=os.environ["PATH"])
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = (folder / "runs/golden/metrics.jsonl").read_text().splitlines()
    training = [r["train_loss"] for r in map(json.loads, records) if r["kind"] == "train"]
    return training + [json.loads((folder / "runs/golden/submission.json").read_text())["val_loss"]]


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_those_of_the_first_source(head, tmp_path):
    write_data(tmp_path)
    np.testing.assert_allclose(
        losses(tmp_path, head), json.loads(GOLDEN.read_text())[head], rtol=0, atol=1e-4
    )


if __name__ == "__main__":
    found = {}
    for name in HEADS:
        with tempfile.TemporaryDirectory() as scratch:
            write_data(Path(scratch))
            found[name] = losses(Path(scratch), name)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")

"""Whole runs, started as a user starts them: plain processes, torchrun on gloo, signals."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt

SCRIPT = Path(train_gpt.__file__).resolve()
STUDY_A = dict(
    NUM_LAYERS=4,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=3,
    VOCAB_SIZE=1024,
    USE_EMA=1,
    EMA_FROM_INIT=1,
    EMA_ALPHA=0.997,
    XSA_LAST_N=4,
    SMEAR_GATE=1,
    BIGRAM_HASH=1,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=16,
    USE_NTK_ROPE=1,
    ROPE_DIMS=4,
    LN_SCALE=1,
    VALUE_EMBED=1,
    VE_DIM=16,
    VE_LAYERS="2,3",
    LATE_QAT=1,
    QAT_THRESHOLD=0.15,
    QAT_BITS=6,
    USE_QAT=0,
    MATRIX_LR=0.025,
    SCALAR_LR=0.025,
    TIED_EMBED_LR=0.035,
    MUON_MOMENTUM=0.99,
    MUON_MOMENTUM_WARMUP_START=0.92,
    MUON_MOMENTUM_WARMUP_STEPS=1500,
    GRAD_CLIP_NORM=0.3,
    MUON_WEIGHT_DECAY=0.04,
    ADAM_WD=0.04,
    INIT_TYPE="ortho",
    WARMDOWN_ITERS=3500,
    TRAIN_BATCH_TOKENS=512,
    TRAIN_SEQ_LEN=64,
    EVAL_STRIDE=64,
    VAL_LOSS_EVERY=0,
    TRAIN_LOG_EVERY=200,
    COMPRESS_ALGO="zstd",
    QUANT_BITS_MIDDLE=6,
    QUANT_BITS_MLP=6,
    GRAD_GUIDED_QUANT=0,
    MAX_WALLCLOCK_SECONDS=600,
    USE_FA3=1,
    FLASH_ATTN_BACKEND="fa3",
    FLASH_ATTN_STRICT=1,
    FLASH_ATTN_ARCH_LIST="9.0",
    SKIP_COMPILE=0,
    SKIP_QUANT=0,
    SEED=42,
)
HEADS_OF_A = {
    "H0": dict(HEAD_TYPE="standard", RANK_DIM=0),
    "H1": dict(HEAD_TYPE="standard", RANK_DIM=64),
    "H2": dict(HEAD_TYPE="standard", RANK_DIM=128),
    "H3": dict(HEAD_TYPE="mixture_softmax", MIXTURE_SOFTMAX_K=2, MIXTURE_RANK_DIM=64, RANK_DIM=0),
    "H4": dict(HEAD_TYPE="mixture_softmax", MIXTURE_SOFTMAX_K=4, MIXTURE_RANK_DIM=64, RANK_DIM=0),
    "H5": dict(HEAD_TYPE="mixture_softmax", MIXTURE_SOFTMAX_K=4, MIXTURE_RANK_DIM=128, RANK_DIM=0),
    "H6": dict(HEAD_TYPE="simplex", SIMPLEX_DIM=128, RANK_DIM=0),
}
STUDY_B = dict(
    VOCAB_SIZE=1024,
    SEED=42,
    USE_MOS=1,
    MOS_K=2,
    MOS_RANK=64,
    MAX_WALLCLOCK_SECONDS=600,
    VAL_LOSS_EVERY=500,
    TRAIN_LOG_EVERY=100,
    NUM_LAYERS=3,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_BATCH_TOKENS=512,
    TRAIN_SEQ_LEN=64,
)
SMALL = dict(
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
    EVAL_STRIDE=0,
    TRAIN_LOG_EVERY=1,
    COMPUTE_DTYPE="fp32",
    WARMDOWN_ITERS=4,
)


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """A folder with the demo's train shard and a short validation split, as a user's own data would lie."""
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 40000), ("val", 3001), ("test", 2001)):
        tokens = train_gpt.open_shard(Path(demo) / f"fineweb_{split}_000000.bin")[:count]
        train_gpt.write_shard(folder / f"fineweb_{split}_000000.bin", tokens.tolist())
    (folder / "tokenizer.model").write_bytes((Path(demo) / "tokenizer.model").read_bytes())
    return dict(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model")


def environment(*settings):
    base = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    base["OMP_NUM_THREADS"] = "1"
    return base | {name: str(value) for each in settings for name, value in each.items()}


def start(cwd, *settings, ranks=0, script=SCRIPT):
    program = [sys.executable]
    if ranks:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*program, str(script)],
        cwd=cwd,
        env=environment(*settings),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(cwd, *settings, ranks=0, code=0):
    process = start(cwd, *settings, ranks=ranks)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out, err


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train_loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("head", HEADS_OF_A)
def test_published_commands_of_study_a_train_at_reduced_size(head, data, tmp_path):
    wide = dict(MODEL_DIM=128)  # no factor may be wider than the model
    out, _ = run(
        tmp_path,
        STUDY_A,
        wide,
        HEADS_OF_A[head],
        data,
        dict(ITERATIONS=3, RUN_ID=head, WARMUP_STEPS=1),
    )
    for form in (
        r"^model_params:\d+$",
        r"^step:3/3 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"^step:3/3 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$",
        r"^Code size: \d+ bytes$",
        r"^Serialized model int8\+zstd: \d+ bytes$",
        r"^Total submission size int8\+zstd: \d+ bytes$",
        r"^final_int8_zstd_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms$",
        r"^final_int8_zstd_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    ):
        assert re.search(form, out, re.M), form
    result = json.loads((tmp_path / "runs" / head / "submission.json").read_text())
    assert result["head"] == {
        "H0": "tied",
        "H1": "factorized",
        "H2": "factorized",
        "H6": "simplex",
    }.get(head, "mos")


def test_published_command_of_study_b_trains_at_reduced_size(data, tmp_path):
    out, _ = run(
        tmp_path, STUDY_B, data, dict(ITERATIONS=3, RUN_ID="b", MODEL_DIM=64)
    )  # no factor may be wider than the model
    settings = json.loads((tmp_path / "runs/b/submission.json").read_text())["settings"]
    assert (
        settings["preset"],
        settings["head_type"],
        settings["head_k"],
        settings["head_rank"],
    ) == ("pilot", "mos", 2, 64)
    assert (
        settings["eval_stride"] == 0
        and not settings["use_ema"]
        and "final_int8_zlib_roundtrip_exact" in out
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A small finished run: its folder's parent, its output."""
    cwd = tmp_path_factory.mktemp("finished")
    out, _ = run(cwd, SMALL, data, dict(RUN_ID="one", EVAL_STRIDE=24))
    return cwd, out


def test_untrained_model_is_exported_and_scored(data, tmp_path):
    out, _ = run(tmp_path, SMALL, data, dict(ITERATIONS=0, RUN_ID="zero"))
    loss = float(re.search(r"roundtrip_exact val_loss:(\S+)", out).group(1))
    assert abs(loss - math.log(1024)) < 0.1


def test_eval_mode_needs_only_artifact_and_validation_data_and_repeats_the_figure(
    finished, data, tmp_path
):
    cwd, out = finished
    alone = tmp_path / "data"
    alone.mkdir()
    (alone / "fineweb_val_000000.bin").write_bytes(
        (data["DATA_PATH"] / "fineweb_val_000000.bin").read_bytes()
    )
    again, _ = run(
        tmp_path,
        dict(
            MODE="eval",
            ARTIFACT=cwd / "runs/one/final_model.int8.ptz",
            DATA_PATH=alone,
            TOKENIZER_PATH=data["TOKENIZER_PATH"],
        ),
    )
    assert (
        re.search("roundtrip_exact.*", out).group() == re.search("roundtrip_exact.*", again).group()
    )
    assert not (tmp_path / "runs").exists()


def test_eval_mode_refuses_another_architecture_and_scores_the_test_split(finished, data, tmp_path):
    artifact = dict(MODE="eval", ARTIFACT=finished[0] / "runs/one/final_model.int8.ptz")
    for given, named in (
        ("MODEL_DIM=64", "MODEL_DIM=32"),
        ("NUM_LAYERS=1", "NUM_LAYERS=4"),
        ("USE_MOS=1", "HEAD_TYPE=tied"),
        ("RANK_DIM=8", "HEAD_TYPE=tied"),
        ("TRAIN_SEQ_LEN=16", "TRAIN_SEQ_LEN=64"),
    ):
        _, err = run(tmp_path, artifact, data, dict([given.split("=")]), code=2)
        assert err == f"error: {given}: the artifact has {named}; leave it unset\n"
    out, _ = run(tmp_path, artifact, data, dict(EVAL_SPLIT="test"))
    assert "val_bpb" in out


def test_bpb_recomputed_from_the_artifact_by_hand_agrees_to_six_digits(finished, data):
    cwd, out = finished
    settings, state = train_gpt.unpack((cwd / "runs/one/final_model.int8.ptz").read_bytes())
    model = train_gpt.GPT(train_gpt.Hyperparameters(**settings))
    model.load_state_dict(state)
    tokens = torch.from_numpy(
        np.fromfile(data["DATA_PATH"] / "fineweb_val_000000.bin", "<u2", offset=1024).astype(
            np.int64
        )
    )
    T, stride, done, nats = 64, 24, 0, 0.0
    with torch.no_grad():
        for first in range(0, len(tokens), stride):
            window = tokens[first : first + T + 1]
            log_p = model.head.log_probs(
                model.hidden(window[None, :-1])[0], window[:-1], model.tok_emb.weight
            )
            for position in range(done - first, len(window) - 1):
                nats -= log_p[position, window[position + 1]].item()
                done += 1
            if first + T >= len(tokens) - 1:
                break
    assert done == len(tokens) - 1
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data["TOKENIZER_PATH"]))
    documents = "".join(chr(t) for t in tokens.tolist()).split(chr(1))  # document starts are id 1
    size = sum(len(processor.decode([ord(c) for c in document]).encode()) for document in documents)
    bpb = float(re.search(r"roundtrip_exact.*val_bpb:(\S+)", out).group(1))
    assert nats / math.log(2) / size == pytest.approx(bpb, rel=1e-6)


def test_submission_and_files_are_complete_and_sizes_are_those_on_disk(finished):
    folder = finished[0] / "runs/one"
    result = json.loads((folder / "submission.json").read_text())
    packed, code = (folder / "final_model.int8.ptz").stat().st_size, SCRIPT.stat().st_size
    assert (result["bytes_model_int8_zlib"], result["bytes_code"], result["bytes_total"]) == (
        packed,
        code,
        packed + code,
    )
    assert result["source_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert {p.name for p in folder.iterdir()} == {
        "train.log",
        "metrics.jsonl",
        "final_model.int8.ptz",
        "submission.json",
        ".lock",
    }
    log = (folder / "train.log").read_text()
    assert all(f"\n{name}=" in log for name in train_gpt.FIELDS)


def test_finished_run_is_not_repeated_and_its_name_not_reused(finished, data):
    cwd, _ = finished
    before = (cwd / "runs/one/train.log").read_bytes()
    out, _ = run(cwd, SMALL, data, dict(RUN_ID="one", EVAL_STRIDE=24))
    assert "is finished" in out and (cwd / "runs/one/train.log").read_bytes() == before
    _, err = run(cwd, SMALL, data, dict(RUN_ID="one", EVAL_STRIDE=24, SEED=7), code=2)
    assert err.startswith("error: SEED=7: RUN_ID=one") and err.count("\n") == 1


def test_a_finished_run_of_other_data_or_another_start_is_not_taken_for_this_one(
    finished, data, tmp_path
):
    start = tmp_path / "start"
    shutil.copy(finished[0] / "runs/one/final_model.int8.ptz", start)
    settings = dict(RUN_ID="two", INIT_FROM=start, ITERATIONS=1)
    small = {
        name: value for name, value in SMALL.items() if train_gpt.SCOPES[name.lower()] != "model"
    }
    run(tmp_path, small, data, settings)
    assert "is finished" in run(tmp_path, small, data, settings)[0]
    run(tmp_path, SMALL, data, dict(RUN_ID="one", SEED=7))
    shutil.copy(tmp_path / "runs/one/final_model.int8.ptz", start)
    _, err = run(tmp_path, small, data, settings, code=2)
    assert err.startswith("error: RUN_ID=two: ") and "INIT_FROM" in err and err.count("\n") == 1
    other = tmp_path / "shards"
    shutil.copytree(data["DATA_PATH"], other)
    same = dict(data, DATA_PATH=other)
    run(tmp_path, SMALL, same, dict(RUN_ID="three"))
    tokens = train_gpt.open_shard(other / "fineweb_val_000000.bin").tolist()
    train_gpt.write_shard(other / "fineweb_val_000000.bin", tokens[::-1])
    _, err = run(tmp_path, SMALL, same, dict(RUN_ID="three"), code=2)
    assert err.startswith("error: RUN_ID=three: ") and "data" in err and err.count("\n") == 1


@pytest.mark.parametrize("head", ["tied", "untied", "mos"])
def test_gptq_trains_packs_and_scores_within_its_time(head, data, tmp_path):
    settings = dict(
        RUN_ID="one",
        QUANT="gptq",
        MAX_WALLCLOCK_SECONDS=60,
        ITERATIONS=5,
        SIZE_LIMIT_BYTES=200_000,
        HEAD_TYPE=head,
        **(dict(HEAD_RANK=8) if head == "mos" else {}),
    )
    out, _ = run(tmp_path, SMALL, data, settings)
    reserved = float(
        re.search(r"gptq: (\S+) s of MAX_WALLCLOCK_SECONDS are reserved", out).group(1)
    )
    assert 0 < reserved < 60 and "gptq's calibration included" in out
    figure = re.search("roundtrip_exact.*", out).group()
    again, _ = run(tmp_path, dict(MODE="eval", ARTIFACT="runs/one/final_model.int8.ptz"), data)
    assert re.search("roundtrip_exact.*", again).group() == figure
    size = json.loads((tmp_path / "runs/one/submission.json").read_text())["bytes_total"]
    assert 0.99 * 200_000 < size <= 200_000


def test_no_limit_is_no_reason_to_ask_for_a_larger_disk(data, tmp_path):
    run(tmp_path, SMALL, data, dict(RUN_ID="one", ITERATIONS=0, SIZE_LIMIT_BYTES=2**50))


def test_over_the_cap_everything_is_written_and_the_exit_code_is_3(data, tmp_path):
    for _ in range(2):  # the second start only repeats the verdict
        run(
            tmp_path,
            SMALL,
            data,
            dict(RUN_ID="big", SIZE_LIMIT_BYTES=100_000, ITERATIONS=1),
            code=3,
        )
    assert (tmp_path / "runs/big/final_model.int8.ptz").exists() and (
        tmp_path / "runs/big/submission.json"
    ).exists()


def test_fitted_artifact_uses_the_cap_to_half_a_percent(data, tmp_path):
    limit = SCRIPT.stat().st_size + 60_000
    run(tmp_path, SMALL, data, dict(RUN_ID="fit", SIZE_LIMIT_BYTES=limit, ITERATIONS=4))
    total = json.loads((tmp_path / "runs/fit/submission.json").read_text())["bytes_total"]
    assert 0.995 * 60_000 <= total - SCRIPT.stat().st_size <= 60_000


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_losses_within_1e_5(ranks, data, tmp_path):
    sizes = dict(ITERATIONS=20, HEAD_TYPE="mos", HEAD_RANK=8, VAL_LOSS_EVERY=10, GRAD_CLIP_NORM=0.3)
    run(tmp_path, SMALL, data, sizes, dict(RUN_ID="one"))
    run(tmp_path, SMALL, data, sizes, dict(RUN_ID="many"), ranks=ranks)
    one, many = (losses(tmp_path / "runs" / name) for name in ("one", "many"))
    assert len(one) == len(many) == 20 and max(abs(a - b) for a, b in zip(one, many)) < 1e-5
    a, b = (
        json.loads((tmp_path / "runs" / name / "submission.json").read_text())["val_bpb"]
        for name in ("one", "many")
    )
    assert a == pytest.approx(b, abs=1e-4)


def test_under_torchrun_one_rank_says_what_is_wrong_and_all_stop(data, tmp_path):
    _, err = run(tmp_path, SMALL, data, dict(HEAD_TYPE="moss"), ranks=2, code=1)
    assert err.count("error: HEAD_TYPE=moss") == 1
    _, err = run(tmp_path, SMALL, data, dict(TRAIN_BATCH_TOKENS=192), ranks=2, code=1)
    assert err.count("error: TRAIN_BATCH_TOKENS=192") == 1
    assert not (tmp_path / "runs").exists()


def wait_for(path, text, process):
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{text} never appeared in {path}")


@pytest.mark.parametrize(
    "number, ranks, code",
    [(signal.SIGTERM, 0, 143), (signal.SIGINT, 0, 130), (signal.SIGTERM, 2, 1)],
)
def test_interrupted_run_resumes_bit_equal(number, ranks, code, data, tmp_path):
    long = dict(
        ITERATIONS=60,
        RUN_ID="stopped",
        LATE_QAT=1,
        WARMDOWN_ITERS=30,
        VAL_LOSS_EVERY=25,
        HEAD_TYPE="mos",
        HEAD_RANK=8,
    )
    process = start(tmp_path, SMALL, data, long, ranks=ranks)
    wait_for(tmp_path / "runs/stopped/train.log", "step:8/60", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert (
        re.search(r"resume with: .*RUN_ID=stopped", out)
        and (tmp_path / "runs/stopped/checkpoint.pt").exists()
    )
    out, _ = run(tmp_path, SMALL, data, long, ranks=ranks)
    assert "resumed at step" in out
    run(tmp_path, SMALL, data, long, dict(RUN_ID="whole"), ranks=ranks)
    stopped, whole = tmp_path / "runs/stopped", tmp_path / "runs/whole"
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 60
    assert (stopped / "final_model.int8.ptz").read_bytes() == (
        whole / "final_model.int8.ptz"
    ).read_bytes()
    assert not (stopped / "checkpoint.pt").exists()


def test_printed_resume_command_resumes(data, tmp_path):
    long = dict(ITERATIONS=40, RUN_ID="stopped")
    process = start(tmp_path, SMALL, data, long)
    wait_for(tmp_path / "runs/stopped/train.log", "step:5/40", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    command = (
        re.search(r"resume with: (.*)", out).group(1).replace(" python ", f" {sys.executable} ")
    )
    again = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert again.returncode == 0 and "resumed at step" in again.stdout, again.stdout + again.stderr


def test_killed_run_resumes_from_its_last_checkpoint_bit_equal(data, tmp_path):
    long = dict(ITERATIONS=50, RUN_ID="killed", CHECKPOINT_SECONDS=0.2)
    process = start(tmp_path, SMALL, data, long)
    wait_for(tmp_path / "runs/killed/train.log", "step:20/50", process)
    process.kill()
    process.communicate()
    out, _ = run(tmp_path, SMALL, data, long)
    assert "resumed at step" in out
    run(tmp_path, SMALL, data, long, dict(RUN_ID="whole"))
    assert losses(tmp_path / "runs/killed") == losses(tmp_path / "runs/whole")
    a, b = (tmp_path / "runs" / name / "final_model.int8.ptz" for name in ("killed", "whole"))
    assert a.read_bytes() == b.read_bytes()


def test_run_in_progress_is_refused(data, tmp_path):
    process = start(tmp_path, SMALL, data, dict(ITERATIONS=2000, RUN_ID="busy"))
    wait_for(tmp_path / "runs/busy/train.log", "step:2/", process)
    _, err = run(tmp_path, SMALL, data, dict(ITERATIONS=2000, RUN_ID="busy"), code=2)
    process.kill()
    process.communicate()
    assert (
        err == "error: RUN_ID=busy: that run is in progress; wait for it or choose another name\n"
    )


def test_diverged_run_stops_with_the_step_and_writes_no_artifact(data, tmp_path):
    wild = dict(
        MATRIX_LR=90,
        SCALAR_LR=90,
        TIED_EMBED_LR=1e2,
        ADAM_EPS=1e-20,
        GRAD_CLIP_NORM=0,
        LOGIT_SOFTCAP=0,
        QK_GAIN_INIT=1000,
        ITERATIONS=400,
        RUN_ID="nan",
        ADAM_WD=100,
        MUON_WEIGHT_DECAY=100,
    )
    _, err = run(tmp_path, SMALL, data, wild, code=2)
    assert re.fullmatch(r"error: step \d+: the loss is (nan|inf); .*\n", err), err
    assert not (tmp_path / "runs/nan/final_model.int8.ptz").exists()


def test_time_cap_stops_training_and_says_so(data, tmp_path):
    out, _ = run(
        tmp_path, SMALL, data, dict(MAX_WALLCLOCK_SECONDS=1.0, ITERATIONS=100000, RUN_ID="cap")
    )
    assert re.search(r"^stopping_early: wallclock_cap train_time:\d+ms step:\d+/100000$", out, re.M)


def test_bench_reports_tied_and_the_chosen_head_without_data(tmp_path):
    sizes = {k: v for k, v in SMALL.items() if k not in ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")}
    out, _ = run(tmp_path, sizes, dict(MODE="bench", HEAD_TYPE="mos", HEAD_K=3, HEAD_RANK=8))
    assert re.search(r"^bench head:tied \d+\.\d ms/step", out, re.M) and re.search(
        r"^bench head:mos .*time to tied:\d", out, re.M
    )
    assert "peak memory allocated" in out and list(tmp_path.iterdir()) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("head", train_gpt.HEADS)
def test_on_cuda_every_head_trains_and_round_trips(head, data, tmp_path):
    settings = {
        **SMALL,
        "COMPUTE_DTYPE": "auto",
        "MODEL_DIM": 128,
        "ROPE_DIMS": 16,
        "ITERATIONS": 30,
        "COMPILE": "0",
    }
    run(tmp_path, settings, data, dict(HEAD_TYPE=head, RUN_ID=head))
    found = losses(tmp_path / "runs" / head)
    assert all(math.isfinite(loss) for loss in found) and found[-1] < found[0] - 0.5

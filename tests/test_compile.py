"""What torch.compile is asked for in whole runs, and the kernels of a GPU where there is one."""

import json
import math
import re

import pytest
import torch
import train_gpt
from conftest import SMALL_RUN, losses, run, run_here, start, stop
from torch import _dynamo as dynamo
from torch._dynamo.backends import debugging  # noqa: F401  imports filelock, which run_here replaces

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
CUDA_RUN = {**SMALL_RUN, **dict(COMPUTE_DTYPE="auto", MODEL_DIM=256, ROPE_DIMS=16, ITERATIONS=30)}


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled: shapes and code of the graph, whether for training, whether the clock ran."""
    dynamo.reset()
    found, trainers, compile_really = [], [], torch.compile

    def backend(graph, inputs):
        running = any(trainer.clock.started < math.inf for trainer in trainers)
        shapes = tuple(x.shape for x in inputs if isinstance(x, torch.Tensor))
        found.append((shapes, graph.code, torch.is_grad_enabled(), running))
        return graph.forward

    class Watched(train_gpt.Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append(self)

    monkeypatch.setattr(train_gpt, "Trainer", Watched)
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_really(f, backend=backend, **options)
    )
    yield found
    dynamo.reset()


def test_a_whole_run_compiles_only_while_the_clock_stands_and_nothing_twice(
    compilations, data, tmp_path
):
    shape = dict(NUM_LAYERS=2, VE_LAYERS="1", COMPILE=1)
    loop = dict(LOOP_LAYERS="1", LOOP_START_FRAC=0.5, LATE_QAT=1, QAT_THRESHOLD=0.9)
    length = dict(ITERATIONS=8, WARMUP_STEPS=2, VAL_LOSS_EVERY=3, EVAL_STRIDE=16)
    run_here(tmp_path, SMALL_RUN, data, shape, loop, length, dict(RUN_ID="one"))
    assert "late_qat: from step" in (tmp_path / "runs/one/train.log").read_text()

    # with and without the loop for training and for scoring; of the former the last 16 targets too
    training = [graph for *graph, grad, _ in compilations if grad]
    assert (len(training), len(compilations)) == (2, 5)
    assert len(set(compilations)) == len(compilations)
    assert not any(running for *_, running in compilations)

    # the artifact is scored by the same code
    artifact = tmp_path / "runs/one/final_model.int8.ptz"
    run_here(tmp_path, data, dict(MODE="eval", ARTIFACT=artifact, COMPILE=1, VAL_BATCH_SIZE=2048))
    assert len(compilations) == 5


def test_late_qat_starts_where_the_rate_falls_below_its_threshold(data, tmp_path):
    rates = dict(WARMDOWN_ITERS=8, WARMDOWN_FRAC=1, ITERATIONS=8, TRAIN_LOG_EVERY=1)  # 1 - step / 8
    for name, qat in dict(late=dict(LATE_QAT=1), never=dict(LATE_QAT=0)).items():
        run_here(tmp_path, SMALL_RUN, data, rates, qat, dict(QAT_THRESHOLD=0.5, RUN_ID=name))
    log = (tmp_path / "runs/late/train.log").read_text()
    assert re.findall("late_qat: from step (.*), ", log) == ["5"]  # 3 / 8; 4 / 8 is not below it
    assert "late_qat: " not in (tmp_path / "runs/never/train.log").read_text()


def test_a_kernel_that_cannot_be_compiled_is_no_reason_to_compile_nothing():
    fault = dynamo.exc.Unsupported("cannot trace flash_attn_interface.flash_attn_func")
    assert train_gpt.in_words(fault).endswith("set ATTN_BACKEND=flash")
    assert train_gpt.in_words(dynamo.exc.Unsupported("no C++")).endswith("set COMPILE=0")


# ---- where there is a GPU: `pytest -m cuda` ----


@pytest.mark.cuda
@on_cuda
def test_on_cuda_every_head_trains_and_round_trips(data, tmp_path):
    for head in train_gpt.HEADS:
        run(tmp_path, CUDA_RUN, data, dict(HEAD_TYPE=head, RUN_ID=head, COMPILE=0))
        by_step, _ = losses(tmp_path / "runs" / head)
        assert math.isfinite(by_step[30]) and by_step[30] < by_step[1] - 0.5


@pytest.mark.cuda
@on_cuda
def test_on_cuda_every_attention_kernel_has_the_losses_of_the_plain_one_or_says_why_not(
    data, tmp_path
):
    run(tmp_path, CUDA_RUN, data, dict(ATTN_BACKEND="math", RUN_ID="math", COMPILE=0))
    plain, _ = losses(tmp_path / "runs/math")
    for kernel in ("auto", *train_gpt.KERNELS):
        settings = dict(ATTN_BACKEND=kernel, RUN_ID=f"{kernel}-again", COMPILE=0)
        process = start(tmp_path, CUDA_RUN, data, settings)
        out, err = process.communicate(timeout=300)
        if process.returncode == 2 and kernel not in ("auto", "math"):
            assert err.startswith(f"error: ATTN_BACKEND={kernel}: must run here, but does not")
            continue
        assert process.returncode == 0, out + err
        result = json.loads((tmp_path / f"runs/{kernel}-again/submission.json").read_text())
        assert result["attention"].split()[0] in (kernel, *train_gpt.KERNELS)
        by_step, _ = losses(tmp_path / f"runs/{kernel}-again")
        assert by_step == pytest.approx(plain, abs=0.05)  # bf16


@pytest.mark.cuda
@on_cuda
def test_on_cuda_a_compiled_looped_run_resumes(data, tmp_path):
    loop = dict(LOOP_LAYERS="1,2", LATE_QAT=1, COMPILE=1, WARMUP_STEPS=2)
    run_here(tmp_path, CUDA_RUN, data, loop, dict(RUN_ID="whole"))
    stopped = dict(RUN_ID="stopped")
    run_here(tmp_path, CUDA_RUN, data, loop, stopped, code=143, at={12: stop})
    run_here(tmp_path, CUDA_RUN, data, loop, stopped)
    whole, final = losses(tmp_path / "runs/whole")
    again, final_again = losses(tmp_path / "runs/stopped")
    assert again == pytest.approx(whole, abs=0.02)
    assert final_again == pytest.approx(final, abs=0.02)

"""Whole runs that start from another: INIT_FROM, TRAIN_ONLY=head; heads that leave the embedding; the measured rank."""

import contextlib
import io
import json
import os
import re
from unittest import mock

import pytest
import torch
from test_runs import SMALL, data, environment, losses, run  # noqa: F401

import train_gpt

SMALL = dict(SMALL, WARMDOWN_ITERS=0)
SIZES = dict.fromkeys(("factorized", "mos", "delta", "wide", "bigram"), dict(HEAD_RANK=8)) | dict(
    simplex=dict(HEAD_DIM=16)
)


def head(name, **more):
    return dict(HEAD_TYPE=name, **SIZES.get(name, {})) | more


def run_here(cwd, *settings, code=0):
    """`run` in this process: the same, but for two seconds of start-up."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ, environment(*settings), clear=True),
        mock.patch("signal.signal"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr("sys.argv", ["train_gpt.py"])
        assert train_gpt.main() == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def bpb(cwd, name):
    return json.loads((cwd / "runs" / name / "submission.json").read_text())["val_bpb"]


def artifact(name):
    return f"runs/{name}/final_model.int8.ptz"


def weights(cwd, name):
    return train_gpt.unpack((cwd / artifact(name)).read_bytes())[1]


@pytest.fixture(scope="module")
def cwd(data, tmp_path_factory):  # noqa: F811
    """A folder with two finished runs, `tied` and `mos`, and two damaged artifacts."""
    cwd = tmp_path_factory.mktemp("probe")
    for name in ("tied", "mos"):
        run_here(cwd, SMALL, data, head(name, RUN_ID=name))
    blob = (cwd / artifact("tied")).read_bytes()
    (cwd / "cut.ptz").write_bytes(blob[:-100])
    (cwd / "flipped.ptz").write_bytes(blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:])
    return cwd


@pytest.mark.parametrize(
    "source, name",
    [
        ("tied", "tied"),
        ("mos", "mos"),
        *(("tied", name) for name in ("delta", "wide", "bigram", "mos", "untied")),
    ],
)
def test_init_from_without_training_scores_as_the_run_it_starts_from(source, name, cwd, data):  # noqa: F811
    again = f"{source}-{name}"
    out, _ = run_here(
        cwd, SMALL, data, head(name, RUN_ID=again, INIT_FROM=artifact(source), ITERATIONS=0)
    )
    assert bpb(cwd, again) == pytest.approx(bpb(cwd, source), abs=5e-5)
    assert re.search(
        rf"^init_from: trunk{' and head' * (name == source)} of {artifact(source)}$", out, re.M
    )


def test_init_from_leaves_a_head_of_another_size_as_it_starts(cwd, data):  # noqa: F811
    wider = head("mos", HEAD_K=3, RUN_ID="wider", INIT_FROM=artifact("mos"), ITERATIONS=0)
    out, _ = run_here(cwd, SMALL, data, wider)
    found = weights(cwd, "wider")
    assert f"init_from: trunk of {artifact('mos')}\n" in out
    assert (
        found["head.U_KDR"].shape == (3, 32, 8)
        and not found["head.U_KDR"].any()
        and weights(cwd, "mos")["head.U_KDR"].any()
    )


@pytest.mark.parametrize("name", ["untied", "factorized", "mos"])
def test_train_only_head_moves_the_head_and_leaves_the_trunk(name, cwd, data):  # noqa: F811
    for steps in (0, 3):
        refit = head(
            name,
            RUN_ID=f"{name}-{steps}-steps",
            INIT_FROM=artifact("tied"),
            ITERATIONS=steps,
            TRAIN_ONLY="head",
        )
        out, _ = run_here(cwd, SMALL, data, refit)
    before, after = (weights(cwd, f"{name}-{steps}-steps") for steps in (0, 3))
    own = {tensor: weight for tensor, weight in before.items() if tensor.startswith("head.")}
    assert {
        tensor for tensor in before if not torch.equal(before[tensor], after[tensor])
    } == own.keys()
    for tensor, weight in weights(cwd, "tied").items():
        assert (after[tensor] - weight).norm() <= 0.01 * weight.norm(), tensor
    assert f"\ntrained_params:{sum(weight.numel() for weight in own.values())}\n" in out


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(INIT_FROM="no/such/file.ptz"), "INIT_FROM=no/such/file.ptz: "),
        (dict(INIT_FROM="runs"), "INIT_FROM=runs: "),
        (dict(INIT_FROM="cut.ptz"), "INIT_FROM=cut.ptz: "),
        (dict(INIT_FROM="flipped.ptz"), "INIT_FROM=flipped.ptz: "),
        (dict(INIT_FROM="runs/tied/submission.json"), "INIT_FROM=runs/tied/submission.json: "),
        (dict(NUM_LAYERS=5), "NUM_LAYERS=5: the artifact has NUM_LAYERS=4"),
        (dict(SMEAR_GATE=0), "SMEAR_GATE=0: the artifact has SMEAR_GATE=1"),
        (dict(TRAIN_ONLY="head"), "TRAIN_ONLY=head: "),
        (head("mos", TRAIN_ONLY="head", HEAD_TRAINABLE=0), "TRAIN_ONLY=head: "),
        (head("wide", HEAD_RANK=0), "HEAD_RANK=0: "),
        (head("wide", HEAD_K=3), "HEAD_K=3: "),
    ],
    ids=str,
)
def test_wrong_start_is_one_line_and_writes_nothing(settings, named, cwd, data):  # noqa: F811
    out, err = run_here(
        cwd, SMALL, data, dict(RUN_ID="wrong", INIT_FROM=artifact("tied")), settings, code=2
    )
    assert err.startswith(f"error: {named}") and err.count("\n") == 1 and not out
    assert not (cwd / "runs/wrong").exists()


@pytest.mark.parametrize("share, alike", [(0, 1), (0.5, 4), (1.0, 6)])
def test_untied_run_follows_the_tied_run_until_its_share_of_training_is_over(
    share, alike, cwd, data  # noqa: F811
):  # noqa: F811
    name = f"untied-after-{share}"
    run(cwd, SMALL, data, head("untied", RUN_ID=name, HEAD_UNTIE_FRAC=share))
    pairs = zip(losses(cwd / "runs/tied"), losses(cwd / "runs" / name), strict=True)
    assert [abs(a - b) < 1e-6 for a, b in pairs] == [step < alike for step in range(6)]
    found = weights(cwd, name)
    D, E = found["head.D_VD"], found["tok_emb.weight"]
    apart = (
        ((D - E).abs().amax(1) / D.abs().amax(1)).max().item()
    )  # E may be rounded to int8: half a step of 1 / 127
    assert apart < 0.005 if share == 1.0 else apart > 0.1


def test_eval_prints_the_spectrum_and_appends_it_to_the_runs_metrics_the_same_on_two_ranks(
    cwd, data  # noqa: F811
):  # noqa: F811
    path, records = cwd / "runs/mos/metrics.jsonl", []
    before = path.read_text()
    for ranks in (0, 2):
        out, _ = run(
            cwd,
            dict(MODE="eval", ARTIFACT=artifact("mos"), EVAL_SPECTRUM=1, COMPUTE_DTYPE="fp32"),
            data,
            ranks=ranks,
        )
        earlier, before = before, path.read_text()
        assert before.startswith(earlier)
        record = json.loads(before[len(earlier) :])
        assert (
            record["kind"] == "spectrum"
            and record["contexts"] == 3000
            and 0 < record["energy_beyond_model_dim"] < 1
        )
        (line,) = re.findall("^spectrum (.*)$", out, re.M)
        assert line.split() == [
            f"{name}:{record[name]:.6g}"
            for name in ("contexts", "rank_9999", "energy_beyond_model_dim")
        ]
        assert re.search("^final_int8_zlib_roundtrip_exact val_loss:", out, re.M)
        records.append({name: value for name, value in record.items() if type(value) is not str})
    assert records[1] == pytest.approx(records[0], rel=1e-6)


@pytest.mark.parametrize(
    "more", [dict(HEAD_VARIANT="pr908"), dict(HEAD_TRAINABLE=0), dict(TRAIN_ONLY="head")], ids=str
)
def test_bench_times_a_special_head_against_the_plain_tied_one(more, tmp_path):
    out, _ = run_here(tmp_path, SMALL, head("mos", MODE="bench", **more))
    assert re.findall("^bench head:([a-z]+) ", out, re.M) == ["tied", "mos"]

"""Runs that start from an artifact (INIT_FROM, TRAIN_ONLY=head), late heads, the measured rank."""

import json
import re

import pytest
import torch
from conftest import SMALL_RUN, losses, run, run_here

import train_gpt

PROBE = dict(SMALL_RUN, WARMDOWN_ITERS=0)
SIZES = dict.fromkeys(("factorized", "mos", "delta", "wide", "bigram"), dict(HEAD_RANK=8))
SIZES["simplex"] = dict(HEAD_DIM=16)


def head(name, **more):
    return dict(HEAD_TYPE=name, RUN_ID=name, **SIZES.get(name, {})) | more


def bpb(cwd, name):
    return losses(cwd / "runs" / name)[1]


def artifact(name):
    return f"runs/{name}/final_model.int8.ptz"


def weights(cwd, name):
    opened = train_gpt.open_artifact(name, (cwd / artifact(name)).read_bytes())
    return train_gpt.artifact_weights(opened)


@pytest.fixture(scope="module")
def cwd(data, tmp_path_factory):
    """A folder with two finished runs, `tied` and `mos`, and two damaged artifacts."""
    cwd = tmp_path_factory.mktemp("probe")
    for name in ("tied", "mos"):
        run_here(cwd, PROBE, data, head(name))
    blob = (cwd / artifact("tied")).read_bytes()
    (cwd / "cut.ptz").write_bytes(blob[:-100])
    (cwd / "flipped.ptz").write_bytes(blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:])
    return cwd


def test_init_from_without_training_scores_as_the_run_it_starts_from(cwd, data):
    """With the same head, and with heads that start at the tied one."""
    for source, name in (("mos", "mos"), ("tied", "untied"), ("tied", "delta")):
        start = dict(RUN_ID=f"{source}-{name}", INIT_FROM=artifact(source), ITERATIONS=0)
        out = run_here(cwd, PROBE, data, head(name, **start))
        assert bpb(cwd, f"{source}-{name}") == pytest.approx(bpb(cwd, source), abs=5e-5)
        what = "trunk and head" if name == source else "trunk"
        assert f"\ninit_from: {what} of {artifact(source)}\n" in out

    # the trunk's shape is the artifact's, where nobody says it
    model = {name.upper() for name, scope in train_gpt.SCOPES.items() if scope == "model"}
    free = {name: value for name, value in PROBE.items() if name not in model}
    run_here(cwd, free, data, dict(RUN_ID="same", INIT_FROM=artifact("tied"), ITERATIONS=0))
    assert bpb(cwd, "same") == pytest.approx(bpb(cwd, "tied"), abs=5e-5)


def test_init_from_leaves_a_head_of_another_size_as_it_starts(cwd, data):
    start = dict(RUN_ID="wider", INIT_FROM=artifact("mos"), ITERATIONS=0)
    out = run_here(cwd, PROBE, data, head("mos", HEAD_K=3, **start))
    assert f"\ninit_from: trunk of {artifact('mos')}\n" in out
    before, after = weights(cwd, "mos"), weights(cwd, "wider")
    assert after["head.U_KDR"].shape == (3, 32, 8)
    assert before["head.U_KDR"].any() and not after["head.U_KDR"].any()


def test_train_only_head_moves_the_head_and_leaves_the_trunk(cwd, data):
    for name in ("untied", "mos"):
        refit = dict(INIT_FROM=artifact("tied"), TRAIN_ONLY="head")
        for steps in (0, 3):
            settings = head(name, RUN_ID=f"{name}-{steps}", ITERATIONS=steps, **refit)
            run_here(cwd, PROBE, data, settings)
        before, after = weights(cwd, f"{name}-0"), weights(cwd, f"{name}-3")
        own = {key for key in before if key.startswith("head.")}
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == own
        for key, weight in weights(cwd, "tied").items():
            assert (after[key] - weight).norm() <= 0.01 * weight.norm(), key


def test_a_wrong_start_is_one_line_and_writes_nothing(cwd, data):
    start = dict(RUN_ID="wrong", INIT_FROM=artifact("tied"))
    for wrong, named in (
        (dict(INIT_FROM="no/such/file.ptz"), "INIT_FROM=no/such/file.ptz: "),
        (dict(INIT_FROM="runs"), "INIT_FROM=runs: "),
        (dict(INIT_FROM="cut.ptz"), "INIT_FROM=cut.ptz: "),
        (dict(INIT_FROM="flipped.ptz"), "INIT_FROM=flipped.ptz: "),
        (dict(INIT_FROM="runs/tied/submission.json"), "INIT_FROM=runs/tied/submission.json: "),
        (dict(NUM_LAYERS=5), "NUM_LAYERS=5: the artifact has NUM_LAYERS=4"),
        (dict(SMEAR_GATE=0), "SMEAR_GATE=0: the artifact has SMEAR_GATE=1"),
        (dict(TRAIN_ONLY="head"), "TRAIN_ONLY=head: "),
        (head("mos", RUN_ID="wrong", TRAIN_ONLY="head", HEAD_TRAINABLE=0), "TRAIN_ONLY=head: "),
        (head("wide", RUN_ID="wrong", HEAD_RANK=0), "HEAD_RANK=0: "),
        (head("wide", RUN_ID="wrong", HEAD_K=3), "HEAD_K=3: "),
        (head("untied", RUN_ID="wrong", HEAD_START_FRAC=0.5), "HEAD_START_FRAC=0.5: "),
    ):
        err = run_here(cwd, PROBE, data, start, wrong, code=2)
        assert err.startswith(f"error: {named}") and err.count("\n") == 1, err
        assert not (cwd / "runs/wrong").exists()


def test_a_late_head_follows_the_tied_run_until_its_share_of_training_is_over(cwd, data):
    # without clipping, which looks at the head's gradient too
    free = dict(PROBE, GRAD_CLIP_NORM=0, ITERATIONS=6)
    run_here(cwd, free, data, head("tied", RUN_ID="unclipped"))
    tied, _ = losses(cwd / "runs/unclipped")
    for name, share, alike in (
        ("delta", 0.5, 4),  # steps 1 to 3 leave the head as it is, so that losses 1 to 4 agree
        ("mos", 0.51, 5),
        ("wide", 1, 6),
    ):
        run_id = f"late-{name}-{share}"
        run_here(cwd, free, data, head(name, RUN_ID=run_id, HEAD_START_FRAC=share))
        late, _ = losses(cwd / "runs" / run_id)
        apart = [step for step in tied if abs(late[step] - tied[step]) > 2e-6]
        assert apart == [*range(alike + 1, 7)], run_id


def test_heads_as_they_start_are_not_trained_where_head_trainable_is_0(cwd, data):
    for steps in (0, 3):
        frozen = dict(RUN_ID=f"frozen-{steps}", HEAD_TRAINABLE=0, ITERATIONS=steps)
        run_here(cwd, PROBE, data, head("factorized", **frozen))
    before, after = weights(cwd, "frozen-0"), weights(cwd, "frozen-3")
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("head.")} <= still
    assert "tok_emb.weight" not in still


def spectrum_of(cwd, data, ranks=0):
    """What MODE=eval prints of the rank, in its last line."""
    measure = dict(MODE="eval", ARTIFACT=artifact("mos"), EVAL_SPECTRUM=1)
    if ranks:
        out = run(cwd, measure, data, ranks=ranks)
    else:
        out = run_here(cwd, measure, data)
    *_, last, record = out.splitlines()
    assert last.startswith("final_int8_zlib_roundtrip_exact ")
    return [*json.loads(record).values()]


def test_eval_prints_the_spectrum(cwd, data):
    contexts, rank, beyond = spectrum_of(cwd, data)

    # by hand: the singular values of all centred log-probabilities
    opened = train_gpt.open_artifact("mos", (cwd / artifact("mos")).read_bytes())
    model = train_gpt.GPT(train_gpt.Hyperparameters(**opened.stored))
    model.load_state_dict(train_gpt.artifact_weights(opened))
    x = torch.from_numpy(train_gpt.Shards(data["DATA_PATH"], "val", 1024).take(0, 31 * 64))
    with torch.no_grad():
        h_ND = model.hidden(x.view(31, 64)).flatten(0, 1).double()
        z_NV = model.head.double().log_probs(h_ND, x, model.tok_emb.weight.double())
    energy = torch.linalg.svdvals(z_NV - z_NV.mean(1, keepdim=True)) ** 2
    assert contexts == 31 * 64
    assert rank == 1 + (energy.cumsum(0) < 0.9999 * energy.sum()).sum()
    assert beyond == pytest.approx((energy[32:].sum() / energy.sum()).item(), rel=1e-6)


@pytest.mark.slow
def test_the_spectrum_is_the_same_on_two_ranks(cwd, data):
    assert spectrum_of(cwd, data, ranks=2) == pytest.approx(spectrum_of(cwd, data), rel=1e-6)


@pytest.mark.slow
def test_bench_times_a_special_head_against_the_plain_tied_one(tmp_path):
    for more in (dict(HEAD_VARIANT="pr908"), dict(HEAD_TRAINABLE=0), dict(TRAIN_ONLY="head")):
        settings = head("mos", MODE="bench", RUN_ID="", **more)
        rows = re.findall(
            r"^bench head:(\w+) .* FLOP/token:(\S+)M", run_here(tmp_path, SMALL_RUN, settings), re.M
        )
        assert [row[0] for row in rows] == ["tied", "mos"] and rows[0][1] == "0.5"

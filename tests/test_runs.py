"""Whole runs, as a user starts them: published commands, results, files, ranks, interruptions."""

import hashlib
import importlib.util
import json
import math
import re
import shutil
import signal
import sys

import filelock
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    SCRIPT,
    SMALL_RUN,
    cpu_world,
    last_line,
    losses,
    run,
    run_here,
    small,
    start,
    stop,
    wait_for,
)

import train_gpt

ARTIFACT = "final_model.int8.ptz"

# a run with all that may go wrong in a resumed one: shuffled data, a mixture, validations, late QAT on
# a grid that bites from the middle on, and the export under a cap
LONG = dict(
    SMALL_RUN,
    SHUFFLE=1,
    ITERATIONS=40,
    WARMDOWN_ITERS=30,
    TRAIN_BATCH_TOKENS=256,
    QAT_THRESHOLD=0.6,
    VAL_LOSS_EVERY=15,
    HEAD_TYPE="mos",
    HEAD_RANK=8,
    SIZE_LIMIT_BYTES=SCRIPT.stat().st_size + 60_000,
)


def result_of(folder):
    return json.loads((folder / "submission.json").read_text())


def exact(out):
    """The final figure, as it is printed."""
    return re.search(r"^final_int8_\w+_roundtrip_exact (.*)$", out, re.M).group(1)


def records(folder):
    """The log lines of a run that have figures."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lines(folder):
    """Kind and step of every record: nothing is done twice."""
    return [(record["kind"], record.get("step")) for record in records(folder)]


def assert_same_run(one, other):
    """The same losses, final figure and artifact, bit for bit; nothing else is left."""
    assert losses(one) == losses(other)
    assert (one / ARTIFACT).read_bytes() == (other / ARTIFACT).read_bytes()
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a finished run of LONG that nothing has interrupted."""
    cwd = tmp_path_factory.mktemp("whole")
    run_here(cwd, LONG, data, dict(RUN_ID="whole"))
    return cwd / "runs/whole"


# ---- the published commands, at reduced size ----

STUDY_A = train_gpt.pairs("""
    SEED=42 VOCAB_SIZE=1024 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3
    USE_EMA=1 EMA_FROM_INIT=1 EMA_ALPHA=0.997 XSA_LAST_N=4 SMEAR_GATE=1 BIGRAM_HASH=1
    BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 USE_NTK_ROPE=1 ROPE_DIMS=16 LN_SCALE=1 VALUE_EMBED=1
    VE_DIM=128 VE_LAYERS=9,10 LATE_QAT=1 QAT_THRESHOLD=0.15 QAT_BITS=6 USE_QAT=0 MATRIX_LR=0.025
    SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
    MUON_MOMENTUM_WARMUP_STEPS=1500 GRAD_CLIP_NORM=0.3 MUON_WEIGHT_DECAY=0.04 ADAM_WD=0.04
    INIT_TYPE=ortho WARMDOWN_ITERS=3500 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048
    EVAL_STRIDE=64 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=200 COMPRESS_ALGO=zstd QUANT_BITS_MIDDLE=6
    QUANT_BITS_MLP=6 GRAD_GUIDED_QUANT=0 MAX_WALLCLOCK_SECONDS=600 USE_FA3=1
    FLASH_ATTN_BACKEND=fa3 FLASH_ATTN_STRICT=1 FLASH_ATTN_ARCH_LIST=9.0 SKIP_COMPILE=0
    SKIP_QUANT=0
""")
STUDY_B = train_gpt.pairs("""
    SEED=42 VOCAB_SIZE=1024 USE_MOS=1 MOS_K=2 MOS_RANK=64 MAX_WALLCLOCK_SECONDS=600
    VAL_LOSS_EVERY=500 TRAIN_LOG_EVERY=100
""")
HEADS_OF_A = {  # and our names for them
    "HEAD_TYPE=standard RANK_DIM=0": "tied",
    "HEAD_TYPE=standard RANK_DIM=64": "factorized",
    "HEAD_TYPE=standard RANK_DIM=128": "factorized",
    "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=2 MIXTURE_RANK_DIM=64 RANK_DIM=0": "mos",
    "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=64 RANK_DIM=0": "mos",
    "HEAD_TYPE=mixture_softmax MIXTURE_SOFTMAX_K=4 MIXTURE_RANK_DIM=128 RANK_DIM=0": "mos",
    "HEAD_TYPE=simplex SIMPLEX_DIM=128 RANK_DIM=0": "simplex",
}
REDUCED = dict(
    NUM_LAYERS=4,
    MODEL_DIM=64,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_BATCH_TOKENS=512,
    TRAIN_SEQ_LEN=64,
    ITERATIONS=3,
    WARMUP_STEPS=1,
    VAL_BATCH_SIZE=2048,
)
REDUCED_A = dict(REDUCED, VE_LAYERS="2,3", BIGRAM_VOCAB_SIZE=64)


@pytest.mark.parametrize("heads", ["first", pytest.param("other", marks=pytest.mark.slow)])
def test_published_commands_of_study_a_train_at_reduced_size(heads, data, tmp_path):
    chosen = dict([*HEADS_OF_A.items()][3:4] if heads == "first" else HEADS_OF_A)
    for i, (command, head) in enumerate(chosen.items()):
        settings = dict(train_gpt.pairs(command), RUN_ID=f"run{i}")
        out = run_here(tmp_path, STUDY_A, REDUCED_A, data, settings)
        assert result_of(tmp_path / f"runs/run{i}")["head"] == head
        for form in (
            r"model_params:\d+",
            r"step:3/3 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms.*",
            r"step:3/3 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d+ms.*",
            r"peak memory allocated: \d+ MiB reserved: \d+ MiB",
            r"Code size: \d+ bytes",
            r"Serialized model int8\+zstd: \d+ bytes",
            r"Total submission size int8\+zstd: \d+ bytes",
            r"final_int8_zstd_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
            r"final_int8_zstd_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
        ):
            assert len(re.findall(f"^{form}$", out, re.M)) == 1, form


def test_published_command_of_study_b_trains_at_reduced_size(data, tmp_path):
    out = run_here(tmp_path, STUDY_B, REDUCED, data, dict(RUN_ID="b"))
    settings = result_of(tmp_path / "runs/b")["settings"]
    expected = dict(preset="pilot", head_type="mos", head_k=2, head_rank=64, eval_stride=0)
    assert expected.items() <= settings.items() and not settings["use_ema"]
    assert "\nfinal_int8_zlib_roundtrip_exact " in out


# ---- results and files ----


def test_untrained_model_is_exported_and_scored(data, tmp_path):
    run_here(tmp_path, SMALL_RUN, data, dict(ITERATIONS=0, RUN_ID="zero"))
    assert abs(result_of(tmp_path / "runs/zero")["val_loss"] - math.log(1024)) < 0.1
    assert last_line(tmp_path / "runs/zero") == "ended: finished, results in runs/zero"


def test_submission_and_files_are_complete_and_sizes_are_those_on_disk(finished):
    folder = finished / "runs/done"
    result = result_of(folder)
    code, packed = SCRIPT.stat().st_size, (folder / ARTIFACT).stat().st_size
    sizes = [result[name] for name in ("bytes_code", "bytes_model_int8_zlib", "bytes_total")]
    assert sizes == [code, packed, code + packed]
    assert result["source_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    names = {"train.log", "metrics.jsonl", ARTIFACT, "submission.json", ".lock"}
    assert {path.name for path in folder.iterdir()} == names
    promised = """author github_id name blurb date track seed val_loss val_bpb pre_quant_val_loss
        pre_quant_val_bpb step_stop wallclock_seconds eval_time_seconds hardware pytorch_version
        head settings"""
    assert set(promised.split()) <= result.keys() and result["step_stop"] == 6


def test_the_log_says_all_that_is_needed_to_run_it_again(finished):
    folder = finished / "runs/done"
    log, result = (folder / "train.log").read_text(), result_of(folder)
    for fact in ("source_sha256", "data_sha256", "pytorch_version"):
        assert f"\n{fact}:{result[fact]}\n" in log
    said = dict(re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", log, re.M))
    settings = {name.upper(): value for name, value in result["settings"].items()}
    assert said == {name: train_gpt.as_text(value) for name, value in settings.items()}
    assert said.keys() == train_gpt.FIELDS.keys()
    assert said["HEAD_TYPE"] == "mos" and said["HEAD_MATRIX_LR"] != "0.0"  # resolved


def test_metrics_hold_every_figure_of_the_log(finished):
    folder = finished / "runs/done"
    log, result = (folder / "train.log").read_text(), result_of(folder)
    by_step, final = losses(folder)
    told = re.findall(r"^step:(\d+)/6 train_loss:(\S+)", log, re.M)
    assert told == [(str(step), f"{loss:.4f}") for step, loss in by_step.items()]
    found = records(folder)
    assert [record["kind"] for record in found] == [*["train"] * 6, "val", "final"]
    assert found[-1] == dict(kind="final", **result)
    assert f"val_bpb:{final:.8f}" == exact(log).split()[1]


def test_bpb_recomputed_from_the_artifact_by_hand_agrees_to_six_digits(finished, data):
    blob = (finished / "runs/done" / ARTIFACT).read_bytes()
    artifact = train_gpt.open_artifact("ARTIFACT", blob)
    model = train_gpt.GPT(train_gpt.Hyperparameters(**artifact.stored))
    model.load_state_dict(train_gpt.artifact_weights(artifact))
    shard = np.fromfile(data["DATA_PATH"] / "fineweb_val_000000.bin", "<u2", offset=1024)
    tokens = torch.from_numpy(shard.astype(np.int64))

    # a window every 16 tokens; each scores the targets that none before it has scored
    T, stride, done, nats, k = 64, 16, 0, 0.0, 0
    while done < len(tokens) - 1:
        window = tokens[k * stride : k * stride + T + 1]
        with torch.no_grad():
            h_ND = model.hidden(window[None, :-1])[0]
            log_p = model.head.log_probs(h_ND, window[:-1], model.tok_emb.weight)
        for position in range(done - k * stride, len(window) - 1):
            nats -= log_p[position, window[position + 1]].item()
            done += 1
        k += 1

    # bytes of the documents' text; token 1 starts a document
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data["TOKENIZER_PATH"]))
    size, document = 0, []
    for token in [*tokens.tolist(), 1]:
        if token == 1:
            size += len(processor.decode(document).encode())
            document = []
        else:
            document.append(token)
    final = result_of(finished / "runs/done")
    assert nats / done == pytest.approx(final["val_loss"], rel=1e-6)
    assert nats / math.log(2) / size == pytest.approx(final["val_bpb"], rel=1e-6)


def test_eval_needs_only_the_artifact_and_validation_data_and_repeats_the_figure(
    finished, data, tmp_path
):
    (tmp_path / "data").mkdir()
    shutil.copy(data["DATA_PATH"] / "fineweb_val_000000.bin", tmp_path / "data")
    own = dict(DATA_PATH="data", TOKENIZER_PATH=data["TOKENIZER_PATH"])
    artifact = dict(MODE="eval", ARTIFACT=finished / "runs/done" / ARTIFACT)
    out = run_here(tmp_path, artifact, own)
    assert exact(out) == exact((finished / "runs/done/train.log").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    # another stride, and the other split
    plain = run_here(tmp_path, artifact, own, dict(EVAL_STRIDE=0))
    figure = result_of(finished / "runs/done")["plain_val_bpb"]
    assert exact(plain).endswith(f" val_bpb:{figure:.8f}")
    test = run_here(tmp_path, artifact, data, dict(EVAL_SPLIT="test"))
    assert exact(test) != exact(out)


def test_eval_refuses_another_architecture_and_no_artifact_at_all(finished, data, tmp_path):
    artifact = dict(MODE="eval", ARTIFACT=finished / "runs/done" / ARTIFACT)
    for said in ("MODEL_DIM=64", "NUM_LAYERS=1", "TRAIN_SEQ_LEN=16", "VOCAB_SIZE=512"):
        name, _ = said.split("=")
        err = run_here(tmp_path, artifact, data, train_gpt.pairs(said), code=2)
        has = f"{name}={dict(SMALL_RUN, VOCAB_SIZE=1024)[name]}"
        assert err == f"error: {said}: the artifact has {has}; leave it unset\n"
    for name in ({}, dict(ARTIFACT="")):
        err = run_here(tmp_path, dict(MODE="eval", TRAIN_SEQ_LEN=64), name, data, code=2)
        assert err.startswith("error: ARTIFACT=: ") and err.count("\n") == 1


def test_table_compares_finished_runs_and_draws_them(finished, data, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    run_here(tmp_path, SMALL_RUN, data, dict(RUN_ID="tied", EVAL_STRIDE=16))
    out = run_here(tmp_path, dict(MODE="table"))
    tied, mos = (line.split("|") for line in out.splitlines()[2:4])
    assert tied[1].strip() == "tied" and mos[1].strip() == "mos"
    for name, row in (("tied", tied), ("done", mos)):
        figures = result_of(tmp_path / "runs" / name)
        assert row[4].strip() == f"{figures['val_bpb']:.5f}"
        assert row[6].strip() == str(figures["bytes_total"])
    gain = float(mos[4]) - float(tied[4])
    assert float(mos[5]) == pytest.approx(gain, abs=2e-5)
    assert out.endswith("picture: runs/learning_curves.png\n")
    picture = (tmp_path / "runs/learning_curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")


def test_finished_run_is_not_repeated_and_its_name_not_reused(finished, data):
    same = dict(RUN_ID="done", HEAD_TYPE="mos", HEAD_RANK=8, EVAL_STRIDE=16)
    before = (finished / "runs/done/train.log").read_bytes()
    out = run_here(finished, SMALL_RUN, data, same, dict(TRAIN_LOG_EVERY=3, AUTHOR="me"))
    assert out.startswith("runs/done is finished: val_bpb:") and out.count("\n") == 1
    err = run_here(finished, SMALL_RUN, data, same, dict(SEED=7), code=2)
    assert (
        err.startswith("error: RUN_ID=done: was run with SEED=1337, not 7") and err.count("\n") == 1
    )
    assert (finished / "runs/done/train.log").read_bytes() == before


def test_a_finished_run_is_of_its_data_and_of_the_artifact_it_started_from(finished):
    result = result_of(finished / "runs/done")
    s = train_gpt.Hyperparameters(**result["settings"])
    facts = {name: result[name] for name in ("data_sha256", "init_sha256")}
    assert train_gpt.earlier_run(finished / "runs/done", s, facts) == (result, None)
    for name in facts:
        with pytest.raises(train_gpt.UserError, match=f"was run with {name.upper()}=.*, not 0a; "):
            train_gpt.earlier_run(finished / "runs/done", s, facts | {name: "0a"})


def test_without_a_name_a_run_is_called_after_time_head_and_seed(data, tmp_path):
    for _ in range(2):
        run_here(tmp_path, SMALL_RUN, data, dict(ITERATIONS=0, HEAD_TYPE="untied", SEED=5))
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2  # never the same folder
    for name in names:
        assert re.fullmatch(r"\d{8}-\d{6}-\d+-untied-5", name)


@pytest.mark.slow
def test_a_finished_run_of_other_data_or_another_start_is_not_taken_for_this_one(
    finished, data, tmp_path
):
    # INIT_FROM, the same name for another artifact
    free = {n: v for n, v in SMALL_RUN.items() if train_gpt.SCOPES[n.lower()] != "model"}
    two = dict(RUN_ID="two", INIT_FROM="start", ITERATIONS=1)
    shutil.copy(finished / "runs/done" / ARTIFACT, tmp_path / "start")
    run_here(tmp_path, free, data, two)
    assert "is finished" in run_here(tmp_path, free, data, two)
    run_here(tmp_path, SMALL_RUN, data, dict(RUN_ID="one", SEED=7))
    shutil.copy(tmp_path / "runs/one" / ARTIFACT, tmp_path / "start")
    err = run_here(tmp_path, free, data, two, code=2)
    assert err.startswith("error: RUN_ID=two: was run with INIT_SHA256=") and err.count("\n") == 1

    # DATA_PATH, the same name for other tokens
    shutil.copytree(data["DATA_PATH"], tmp_path / "shards")
    three = dict(RUN_ID="three", DATA_PATH="shards")
    run_here(tmp_path, SMALL_RUN, data, three)
    tokens = train_gpt.Shards(tmp_path / "shards", "val", 1024).take(0, 2000)
    train_gpt.write_shard(tmp_path / "shards/fineweb_val_000000.bin", tokens[::-1])
    err = run_here(tmp_path, SMALL_RUN, data, three, code=2)
    assert err.startswith("error: RUN_ID=three: was run with DATA_SHA256=") and err.count("\n") == 1


def test_over_the_cap_everything_is_written_and_the_exit_code_is_3(data, tmp_path):
    big = dict(RUN_ID="big", SIZE_LIMIT_BYTES=100_000, ITERATIONS=1)
    for _ in range(2):  # the second start only repeats the verdict
        run_here(tmp_path, SMALL_RUN, data, big, code=3)
    folder = tmp_path / "runs/big"
    assert (folder / ARTIFACT).exists() and result_of(folder)["bytes_total"] > 100_000
    log = (folder / "train.log").read_text()
    assert re.search(r"^size_limit: 100000 bytes headroom: -\d+ bytes; over the cap", log, re.M)
    assert last_line(folder) == "ended: finished, results in runs/big"


def test_fitted_artifact_uses_the_cap_to_half_a_percent(whole):
    used = (whole / ARTIFACT).stat().st_size
    assert 0.995 * 60_000 <= used <= 60_000


def test_a_short_sequence_alone_runs_and_is_scored_plainly(data, tmp_path):
    small = {name: value for name, value in SMALL_RUN.items() if name != "EVAL_STRIDE"}
    short = dict(TRAIN_SEQ_LEN=32, ITERATIONS=1, RUN_ID="short")
    out = run_here(tmp_path, small, data, short)
    result = result_of(tmp_path / "runs/short")
    assert result["plain_val_bpb"] == result["val_bpb"]
    again = dict(MODE="eval", ARTIFACT=f"runs/short/{ARTIFACT}", COMPUTE_DTYPE="fp32")
    assert exact(run_here(tmp_path, again, data)) == exact(out)


def test_time_cap_stops_training_and_says_so(data, tmp_path):
    cap = dict(MAX_WALLCLOCK_SECONDS=0.5, ITERATIONS=100_000, RUN_ID="cap")
    out = run_here(tmp_path, SMALL_RUN, data, cap)
    said = re.search(
        r"^stopping_early: wallclock_cap train_time:\d+ms step:(\d+)/100000", out, re.M
    )
    assert int(said[1]) == result_of(tmp_path / "runs/cap")["step_stop"]
    assert last_line(tmp_path / "runs/cap") == "ended: finished, results in runs/cap"


def test_diverged_run_stops_with_the_step_and_writes_no_artifact(data, tmp_path):
    wild = dict(MATRIX_LR=1e12, SCALAR_LR=1e12, TIED_EMBED_LR=1e12, LOGIT_SOFTCAP=0)
    settings = dict(wild, GRAD_CLIP_NORM=0, ITERATIONS=60, RUN_ID="nan")
    err = run_here(tmp_path, SMALL_RUN, data, settings, code=2)
    said = re.fullmatch(r"error: step (\d+): the loss is (nan|inf); .*\n", err)
    folder = tmp_path / "runs/nan"
    assert said and int(said.group(1)) == records(folder)[-1]["step"] + 1, err
    assert last_line(folder).startswith(f"ended: {err[len('error: ') : -1]}")
    assert {path.name for path in folder.iterdir()} <= {"train.log", "metrics.jsonl", ".lock"}


def test_bench_reports_tied_and_the_chosen_head_without_data(tmp_path):
    chosen = dict(MODE="bench", HEAD_TYPE="mos", HEAD_K=3, HEAD_RANK=8)
    out = run_here(tmp_path, SMALL_RUN, chosen)
    rows = re.findall(
        r"^bench head:(\w+) \d+\.\d ms/step .* tokens/s:\d+ model_params:(\d+) .*"
        r" FLOP/token:(\S+)M .* time to tied:(\S+)$",
        out,
        re.M,
    )
    assert [row[0] for row in rows] == ["tied", "mos"] and rows[0][3] == "1.000"
    own = 3 * 2 * 32 * 8 + 3 * 33  # U_k, V_k and the gate
    assert int(rows[1][1]) - int(rows[0][1]) == own
    more = 6 * (2 * 1024 * 32 + own) / 1e6  # and two more products with E
    assert float(rows[1][2]) - float(rows[0][2]) == pytest.approx(more, abs=0.11)
    assert "peak memory allocated" in out and not any(tmp_path.iterdir())


def test_bench_divides_medians_by_the_tied_head_s_and_rates_by_the_ranks(monkeypatch, capsys):
    s, world = small(head_type="mos", head_variant="pr908"), cpu_world()
    monkeypatch.setattr(train_gpt.Trainer, "step", lambda *_: None)
    for size in (1, 2):
        world.size, times = size, iter([9.0] * 6 + [5e-7, 7.5e-7] * 10)  # three rows do not count
        monkeypatch.setattr(train_gpt.Clock, "stop", lambda clock, times=times: next(times))
        train_gpt.bench(s, world, None)
        rows = re.findall(
            r"tokens/s:(\d+) .* FLOP/token:(\S+)M MFU:(\S+)% time to tied:(\S+)$",
            capsys.readouterr().out,
            re.M,
        )
        tokens, flop, shares, ratios = zip(*rows)
        assert (tokens, ratios) == (("8192000000", "5461333333"), ("1.000", "1.500"))
        for n, each, percent in zip(tokens, flop, shares):
            share = int(n) * float(each) * 1e6 / size / 989e12  # of what an H100 can do
            assert float(percent) / 100 == pytest.approx(share, rel=0.2)


def test_layers_that_run_twice_are_counted_twice_in_a_token_s_flop():
    plain, looped = small(), small(loop_layers="1,2")
    model, again = train_gpt.GPT(plain), train_gpt.GPT(looped)
    more = train_gpt.flops_per_token(again, looped) - train_gpt.flops_per_token(model, plain)
    twice = train_gpt.count_values(model.blocks[1:3].parameters())
    assert more == 6 * (twice + 2 * 32 * 24)


# ---- a head of one's own ----

NEW_FIELD = '    head_weight: float = model_setting(1.0, "weight of the bias")\n'
NEW_CLASS = '''
class Biased(Head):
    """cap(E h + w b): the tied head and a weighted bias."""

    uses = ("head_weight",)

    def build(self, s, D, V, R):
        self.weight = s.head_weight
        self.add("head_scalar", b_V=torch.zeros(V))

    def logits(self, h_ND, x_N, E_VD):
        return self.cap(project(h_ND, E_VD) + self.weight * self.b_V)


'''


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The program with one field, one class and one line more: the head `biased`."""
    text = SCRIPT.read_text()
    for anchor, more in (
        ("    head_dim: int = ", NEW_FIELD),
        ("HEADS = dict(\n", NEW_CLASS),
        ("    tied=Tied,\n", "    biased=Biased,\n"),
    ):
        assert text.count(anchor) == 1
        text = text.replace(anchor, more + anchor)
    (tmp_path / "extended.py").write_text(text)
    spec = importlib.util.spec_from_file_location("extended", tmp_path / "extended.py")
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "extended", program)
    spec.loader.exec_module(program)
    return program


def test_a_new_head_with_a_setting_of_its_own_is_one_class_one_line_and_one_field(
    extended, finished, data, tmp_path
):
    biased = dict(HEAD_TYPE="biased", HEAD_WEIGHT=2, RUN_ID="new")
    out = run_here(tmp_path, SMALL_RUN, data, biased, program=extended)
    new = dict(MODE="eval", ARTIFACT=f"runs/new/{ARTIFACT}")
    assert exact(run_here(tmp_path, new, data, program=extended)) == exact(out)
    blob = (tmp_path / new["ARTIFACT"]).read_bytes()
    weights = extended.artifact_weights(extended.open_artifact("new", blob))
    assert weights["head.b_V"].abs().max() > 0.01  # it was trained
    wrong = dict(HEAD_TYPE="mos", HEAD_WEIGHT=2)
    err = run_here(tmp_path, SMALL_RUN, data, wrong, program=extended, code=2)
    assert err == (
        "error: HEAD_WEIGHT=2: must be unset: HEAD_TYPE=mos does not use it (biased does)\n"
    )

    # an artifact from before the field scores as ever; the older program refuses the newer one
    old = dict(MODE="eval", ARTIFACT=finished / "runs/done" / ARTIFACT)
    figure = exact((finished / "runs/done/train.log").read_text())
    assert exact(run_here(tmp_path, old, data, program=extended)) == figure
    err = run_here(tmp_path, new, data, code=2)
    assert err.startswith(f"error: ARTIFACT=runs/new/{ARTIFACT}: ") and err.count("\n") == 1


# ---- ranks ----


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_losses_within_1e_5(ranks, data, tmp_path):
    sizes = dict(
        ITERATIONS=12,
        SHUFFLE=1,
        HEAD_TYPE="mos",
        HEAD_RANK=8,
        VAL_LOSS_EVERY=8,
        EVAL_STRIDE=48,
    )
    run_here(tmp_path, SMALL_RUN, data, sizes, dict(RUN_ID="one"))
    run(tmp_path, SMALL_RUN, data, sizes, dict(RUN_ID="many"), ranks=ranks)
    (one, bpb), (many, other) = (losses(tmp_path / "runs" / name) for name in ("one", "many"))
    assert [*one] == [*many] == [*range(1, 13)]
    assert max(abs(one[step] - many[step]) for step in one) < 1e-5
    assert bpb == pytest.approx(other, abs=1e-4)
    assert (tmp_path / "runs/many/train.log").read_text().count("\nmodel_params:") == 1


@pytest.mark.slow
def test_under_torchrun_one_rank_says_what_is_wrong_and_all_stop(data, tmp_path):
    for wrong in ("HEAD_TYPE=moss", "TRAIN_BATCH_TOKENS=192"):
        err = run(tmp_path, SMALL_RUN, data, train_gpt.pairs(wrong), ranks=2, code=1)
        assert err.count(f"error: {wrong}: ") == 1 and 'train_gpt.py", line' not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_artifact_scores_the_same_on_four_ranks(finished, data, tmp_path):
    artifact = dict(MODE="eval", ARTIFACT=finished / "runs/done" / ARTIFACT)
    out = run(tmp_path, artifact, data, ranks=4)
    figure = float(exact(out).split("val_bpb:")[1])
    assert figure == pytest.approx(result_of(finished / "runs/done")["val_bpb"], abs=1e-6)


# ---- interruptions ----


def test_a_run_stopped_again_and_again_is_bit_equal_to_one_never_stopped(whole, data, tmp_path):
    folder = tmp_path / "runs/parts"
    # after the first step, in late QAT, after the last step; CHECKPOINT_SECONDS is free
    for step, seconds in ((0, 0), (28, 1e-9), (39, 1000)):
        part = dict(RUN_ID="parts", CHECKPOINT_SECONDS=seconds)
        run_here(tmp_path, LONG, data, part, code=143, at={step: stop})
        assert last_line(folder) == (
            f"ended: stopped by SIGTERM; saved at step {step + 1},"
            " the same command with RUN_ID=parts goes on"
        )
        assert (folder / "checkpoint.pt").exists() and not (folder / ARTIFACT).exists()
    out = run_here(tmp_path, LONG, data, dict(RUN_ID="parts"))
    assert out.startswith("resumed at step 40\n")
    assert_same_run(folder, whole)

    assert lines(folder) == lines(whole)

    # the clock goes on
    seconds = [record["train_seconds"] for record in records(folder)[:-1]]
    assert seconds == sorted(seconds)
    assert last_line(folder) == "ended: finished, results in runs/parts"


def test_a_looped_model_is_scored_as_it_is_trained_also_where_a_resumed_run_begins(data, tmp_path):
    loops = dict(LOOP_LAYERS="1,2", LOOP_START_FRAC=0.7, VAL_LOSS_EVERY=2)
    for name, at in (("whole", {}), ("parts", {3: stop})):
        code = 143 if at else 0
        run_here(tmp_path, SMALL_RUN, data, loops, dict(RUN_ID=name), code=code, at=at)
    # step 4 is scored first, before the loop starts
    run_here(tmp_path, SMALL_RUN, data, loops, dict(RUN_ID="parts"))
    for kind in ("train", "val"):
        whole, parts = (
            [r[f"{kind}_loss"] for r in records(tmp_path / "runs" / name) if r["kind"] == kind]
            for name in ("whole", "parts")
        )
        assert whole == parts


@pytest.mark.slow
def test_a_run_stopped_while_it_is_scored_is_bit_equal_too(whole, data, tmp_path, monkeypatch):
    export = train_gpt.export

    def stopped(trainer, path, log):
        stop(trainer.world)
        return export(trainer, path, log)

    monkeypatch.setattr(train_gpt, "export", stopped)
    run_here(tmp_path, LONG, data, dict(RUN_ID="late"), code=143)
    monkeypatch.undo()
    assert "saved at step 40" in last_line(tmp_path / "runs/late")
    run_here(tmp_path, LONG, data, dict(RUN_ID="late"))
    assert_same_run(tmp_path / "runs/late", whole)
    again = lines(tmp_path / "runs/late")
    again.remove(("val", 40))  # scored once more, and to the same figures
    assert again == lines(whole)


def test_a_run_killed_and_then_stopped_resumes_bit_equal(whole, data, tmp_path):
    folder = tmp_path / "runs/parts"
    settings = (LONG, data, dict(RUN_ID="parts", CHECKPOINT_SECONDS=1e-9))
    process = start(tmp_path, *settings)
    wait_for(folder / "train.log", "step:6/40", process)
    process.kill()
    process.communicate()
    (folder / ".checkpoint.pt.12345.part").write_bytes(b"half")  # killed while it wrote

    process = start(tmp_path, *settings)
    wait_for(folder / "train.log", "step:10/40", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err == ""
    assert int(re.match("resumed at step (.*)\n", out).group(1)) >= 5
    assert out.splitlines()[-1] == last_line(folder)

    run_here(tmp_path, *settings)
    assert_same_run(folder, whole)


@pytest.fixture
def hangup():
    """SIGHUP as a terminal sends it; the children of nohup, where the tests run, ignore it."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, ignored)


@pytest.mark.slow
def test_a_signal_stops_the_run_which_resumes_bit_equal(whole, data, tmp_path, hangup):
    for name in ("SIGINT", "SIGHUP", "SIGTERM"):
        folder, number = tmp_path / "runs" / name, getattr(signal, name)
        process = start(tmp_path, LONG, data, dict(RUN_ID=name))
        wait_for(folder / "train.log", "step:8/40", process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number and err == ""
        again = f"the same command with RUN_ID={name} goes on"
        assert re.fullmatch(
            f"ended: stopped by {name}; saved at step \\d+, {again}", last_line(folder)
        )
        assert out.splitlines()[-1] == last_line(folder)
        run_here(tmp_path, LONG, data, dict(RUN_ID=name))
        assert_same_run(folder, whole)


@pytest.mark.slow
def test_sigterm_at_torchrun_saves_and_the_run_resumes_bit_equal(data, tmp_path):
    process = start(tmp_path, LONG, data, dict(RUN_ID="stopped"), ranks=2)
    wait_for(tmp_path / "runs/stopped/train.log", "step:8/40", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "ended: stopped by SIGTERM; saved at step" in out, err
    for name in ("stopped", "whole"):
        run(tmp_path, LONG, data, dict(RUN_ID=name), ranks=2)
    assert_same_run(tmp_path / "runs/stopped", tmp_path / "runs/whole")


def test_a_run_in_progress_is_refused(data, tmp_path):
    (tmp_path / "runs/busy").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "runs/busy/.lock"):
        err = run_here(tmp_path, SMALL_RUN, data, dict(RUN_ID="busy"), code=2)
    assert err == (
        "error: RUN_ID=busy: that run is in progress; wait for it or choose another name\n"
    )
    assert [path.name for path in (tmp_path / "runs/busy").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_sweep_started_twice_in_parallel_repeats_and_loses_nothing(data, tmp_path):
    settings = (SMALL_RUN, data)
    names = ["a", "b"] * 2
    sweep = [start(tmp_path, *settings, dict(RUN_ID=n, SEED=ord(n), ITERATIONS=20)) for n in names]
    for process in sweep:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0 or process.returncode == 2 and "in progress" in err, err
    for name in "ab":
        assert len(losses(tmp_path / "runs" / name)[0]) == 20

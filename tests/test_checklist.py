"""What a reviewer of a submission checks, in that order; and that the study's figures agree with each other."""

import hashlib
import json
import math
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, SMALL_RUN, environment, run_here

import train_gpt

SUBMISSION = json.loads((ROOT / "submission.json").read_text())
RESULTS = [json.loads(line) for line in (ROOT / ".study/results.jsonl").read_text().splitlines()]


def test_one_ascii_file_is_imported_without_a_gpu_or_flash_attention_and_says_nothing(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(SCRIPT.read_bytes())
    hidden = "import sys; sys.modules.update(flash_attn=None, flash_attn_interface=None); import train_gpt"
    environ = environment(dict(CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE=1))
    done = subprocess.run(
        [sys.executable, "-c", hidden], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"]
    assert SCRIPT.read_bytes().isascii()


def test_the_untrained_model_is_as_good_as_guessing_and_its_export_is_under_the_cap():
    s = train_gpt.Hyperparameters()
    assert (s.num_layers, s.model_dim, s.num_heads, s.vocab_size) == (11, 512, 8, 1024)
    torch.manual_seed(s.seed)
    model = train_gpt.GPT(s)
    tokens = torch.randint(2, s.vocab_size, (1, 65))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(s.vocab_size), abs=0.1)
    code = len(SCRIPT.read_bytes())
    room = s.size_limit_bytes - code
    step = train_gpt.fit_sample(model.state_dict(), model.parameter_roles(), "zlib", room)
    blob = train_gpt.encode(model.state_dict(), model.parameter_roles(), s, 1.01 * step)
    assert 0.98 * s.size_limit_bytes < code + len(blob) <= s.size_limit_bytes


def test_no_token_that_is_scored_is_trained_on(data, tmp_path, monkeypatch):
    """Training text of even ids, validation text of odd ones."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for split, odd in dict(train=0, val=1).items():
        tokens = 2 * rng.integers(2, 500, 5000) + odd
        train_gpt.write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    step, seen = train_gpt.Trainer.step, []

    def watched(trainer, batches, *arguments):
        seen.extend(torch.cat((x, y), dim=1) for x, y in batches)
        return step(trainer, batches, *arguments)

    monkeypatch.setattr(train_gpt.Trainer, "step", watched)
    often = dict(ITERATIONS=4, VAL_LOSS_EVERY=1, WARMUP_STEPS=1, LATE_QAT=1, EVAL_STRIDE=16)
    run_here(tmp_path, SMALL_RUN, data, dict(DATA_PATH=folder, RUN_ID="even"), often)
    assert len(seen) >= 5 and not any((batch % 2).any() for batch in seen)


def test_the_submission_names_its_author_data_bytes_and_seed():
    promised = """author name blurb date track seed val_loss val_bpb pre_quant_val_bpb step_stop hardware
        wallclock_seconds bytes_total pytorch_version source_sha256 data_sha256 settings study"""
    assert set(promised.split()) <= SUBMISSION.keys()
    assert SUBMISSION["bytes_total"] <= SUBMISSION["settings"]["size_limit_bytes"] == 16_000_000
    assert SUBMISSION["bytes_code"] == len(SCRIPT.read_bytes())
    assert SUBMISSION["source_sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert SUBMISSION["author"] and 0.5 < SUBMISSION["val_bpb"] < 8


def test_the_study_in_the_submission_is_that_of_the_results_and_each_row_is_there_once():
    rows = [result["row"] for result in RESULTS]
    assert len(set(rows)) == len(rows) == len(SUBMISSION["study"])
    for run, result in zip(SUBMISSION["study"], RESULTS):
        assert run.items() <= result.items()
        assert result["row"].endswith(f"-{result['seed']}")


@pytest.fixture
def figures(monkeypatch):
    """The module that makes the study's tables."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / ".study")
    return __import__("figures")


def test_the_tables_of_the_study_are_made_of_its_results(figures):
    readme, text = ((ROOT / name).read_text() for name in ("README.md", ".study/RESULTS.md"))
    tables = {
        "law": figures.law_table(),
        "file order": figures.law_table("file_order"),
        "rate": figures.rate_table(),
        "rank": figures.rank_table(),
        "frozen": figures.frozen_table(),
        "best": figures.best_table(),
    }
    for name, table in tables.items():
        assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in text, name
    assert figures.answer_table() in readme


def test_what_the_law_compares_has_three_seeds_one_source_one_cap_and_one_precision(figures):
    cells = figures.read_cells()
    compared = figures.compared(cells)
    assert len(compared) >= 6
    for c in compared:
        assert cells[c.cell]["tied"].keys() == cells[c.cell][c.head].keys() and c.seeds >= 3

    facts = defaultdict(set)
    for result in RESULTS:
        row, settings = result["row"], result["settings"]
        if row.startswith(("v", "cpu", "long")):
            facts["source"].add(result["source_sha256"])
            facts[row.split("-s")[0], "cap"].add(settings["size_limit_bytes"])
            facts[row.rsplit("-", 1)[0], "hardware"].add(result["hardware"])  # of a head's seeds
            facts[figures.machine(result)].add(
                (result["pytorch_version"], settings["compute_dtype"])
            )
            assert result["bytes_total"] <= settings["size_limit_bytes"]
    assert all(len(values) == 1 for values in facts.values()), facts


def test_a_cell_s_tokens_and_rate_are_those_of_its_rows_own_settings(figures):
    lengths = set()
    for cell, heads in figures.read_cells().items():
        for head, results in heads.items():
            for result in results.values():
                s = result["settings"]
                steps = s["iterations"]
                if head == "tied+10%":
                    steps -= round(steps / 11)
                assert (steps, s["train_batch_tokens"]) == (cell.steps, cell.batch), result["row"]
                assert (s["tied_embed_lr"], s.get("model_dim", 512)) == (cell.rate, cell.dim)
                lengths.add((s["iterations"], s["train_batch_tokens"]))
    assert len(lengths) >= 8


def test_of_cells_that_differ_in_the_rate_alone_one_is_shown(figures):
    def comparisons(steps, rate, tied, *heads):
        cell = figures.Cell(1024, 64, steps, 2048, "GPU", rate)
        return [figures.Comparison(cell, h, tied, None, None, None, 3, "H100") for h in heads]

    best_for_tied = comparisons(1, 0.02, 1.9, "untied", "mos2")
    fewer_heads = comparisons(1, 0.03, 1.8, "untied")
    another_cell = comparisons(2, 0.01, 2.5, "mos2")
    found = comparisons(1, 0.01, 2.0, "untied", "mos2") + best_for_tied + fewer_heads
    found += comparisons(1, 0.04, 1.95, "untied", "mos2") + another_cell
    assert figures.at_one_rate(found) == best_for_tied + another_cell


def test_a_comparison_is_welch_s_and_scipy_s_paired_one(figures):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    seeds = np.array([1.98, 2.0, 2.02])  # what tied and the head share
    heads = {}
    for head, shift in dict(tied=0.0, untied=-0.02, **{"tied+10%": -0.01}).items():
        sample = seeds + shift + 0.001 * rng.standard_normal(3)
        heads[head] = {
            seed: dict(val_bpb=bpb, pre_quant_val_bpb=bpb - 0.001, hardware="CPU")
            for seed, bpb in zip("abc", sample)
        }
    c = figures.compare(figures.Cell(1024, 64, 1500, 2048, "CPU"), heads, "untied")
    tied, untied = ([run["val_bpb"] for run in heads[head].values()] for head in ("tied", "untied"))
    assert c.gain.mean == pytest.approx(np.mean(tied) - np.mean(untied))
    assert c.gain.p == pytest.approx(
        stats.ttest_ind(untied, tied, equal_var=False).pvalue, abs=1e-4
    )
    interval = stats.ttest_rel(tied, untied).confidence_interval(0.95)
    assert c.gain.paired == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert c.gain.paired < 0.3 * c.gain.welch and (c.seeds, c.devices) == (3, "CPU")
    assert c.gain.wider == c.gain.welch
    one_more = {**heads["untied"], "d": dict(heads["untied"]["a"], val_bpb=9.0)}
    assert figures.difference(heads["tied"], one_more) == c.gain  # in the seeds of both


def test_fieller_s_interval_holds_the_ratios_that_welch_like_tests_do_not_reject(figures):
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):  # a true ratio of 1.2: a gain of twice what a tenth more steps give
        tied, longer, head = (mean + 0.001 * rng.standard_normal(3) for mean in (2.0, 1.99, 1.98))
        ratio, low, high = figures.break_even(tied, longer, head)
        assert low < ratio < high
        inside += low < 1.2 < high
    assert 0.91 < inside / 400 < 0.98

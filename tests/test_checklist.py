"""What a reviewer of a submission checks, in that order; and that the study's figures agree with each other."""

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
    room = s.size_limit_bytes - len(SCRIPT.read_bytes())
    step = train_gpt.fit_sample(model.state_dict(), model.parameter_roles(), "zlib", room)
    assert train_gpt.FINEST < step < 0.3  # a grid that a model survives: see RESULTS.md


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
    promised = """author name blurb date track seed val_loss val_bpb pre_quant_val_bpb step_stop
        wallclock_seconds bytes_total bytes_code hardware pytorch_version source_sha256 settings study"""
    assert set(promised.split()) <= SUBMISSION.keys()
    assert SUBMISSION["bytes_total"] <= SUBMISSION["settings"]["size_limit_bytes"] == 16_000_000
    assert SUBMISSION["author"] and 0.5 < SUBMISSION["val_bpb"] < 8


def test_the_study_in_the_submission_is_that_of_the_results_and_each_row_is_there_once():
    rows = [result["row"] for result in RESULTS]
    assert len(set(rows)) == len(rows) == len(SUBMISSION["study"])
    for run, result in zip(SUBMISSION["study"], RESULTS):
        assert run.items() <= result.items()
        assert result["row"].endswith(f"-{result['seed']}")


def test_every_claim_of_the_law_has_three_seeds_one_source_one_cap_and_one_machine():
    groups = defaultdict(list)
    for result in RESULTS:
        if result["row"].startswith("v"):
            groups[result["row"].rsplit("-", 1)[0]].append(result)
    claimed = (ROOT / ".study/RESULTS.md").read_text().split("<!-- law: begin -->")[1]
    claimed = claimed.split("<!-- law: end -->")[0].count("\n|") - 1
    compared = [group for group in groups.values() if len(group) >= 3]
    assert 3 <= claimed < len(compared)
    for group in compared:
        for fact in ("source_sha256", "hardware", "head"):
            assert len({result[fact] for result in group}) == 1, group[0]["row"]
        assert len({result["settings"]["size_limit_bytes"] for result in group}) == 1
        assert all(r["bytes_total"] <= r["settings"]["size_limit_bytes"] for r in group)

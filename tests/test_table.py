"""MODE=table: what it computes, and what it says about runs that it cannot compare."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import train_gpt as tg

values = st.lists(st.floats(0.9, 1.5), min_size=2, max_size=6).filter(lambda v: np.std(v) > 1e-4)


@given(values, values)
def test_welch_equals_scipy(a, b):
    t, p = tg.welch(a, b)
    want = stats.ttest_ind(a, b, equal_var=False)
    assert t == pytest.approx(want.statistic, rel=1e-9, abs=1e-9)
    assert p == pytest.approx(want.pvalue, rel=1e-3, abs=1e-6)


def finished(root, name, head="tied", seed=1, bpb=1.5, **changes):
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    settings = dict(
        json.loads(json.dumps(tg.dataclasses.asdict(tg.Hyperparameters()))),
        head_type=head,
        seed=seed,
        run_id=name,
    )
    result = dict(
        val_bpb=bpb,
        head=head,
        seed=seed,
        step_stop=100,
        wallclock_seconds=20.0,
        bytes_total=15_900_000,
        source_sha256="a" * 64,
        data_sha256="d" * 64,
        hardware="1 x CPU",
        pytorch_version="2.13.0",
        settings=settings,
    )
    result.update({k: v for k, v in changes.items() if k in result})
    result["settings"].update({k: v for k, v in changes.items() if k in settings})
    (folder / "submission.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps(dict(kind="train", step=i, train_loss=7 / i, train_seconds=i)) + "\n"
            for i in range(1, 9)
        )
    )


def table(root, run):
    out = run({"MODE": "table", "RUNS": "runs/*"}, cwd=root)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_rows_group_seeds_and_test_heads_against_tied(tmp_path, run):
    for seed, a, b in ((42, 1.500, 1.490), (1337, 1.502, 1.493), (2024, 1.501, 1.491)):
        finished(tmp_path, f"tied-{seed}", seed=seed, bpb=a)
        finished(tmp_path, f"mos-{seed}", head="mos", seed=seed, bpb=b, head_k=4)
    rows = [line for line in table(tmp_path, run).splitlines() if line.startswith("| ")]
    want = stats.ttest_ind([1.490, 1.493, 1.491], [1.500, 1.502, 1.501], equal_var=False)
    mos = next(row for row in rows if row.startswith("| mos "))
    assert (
        "HEAD_K=4" in mos
        and "1337 2024 42" in mos
        and "1.49133 +- 0.00153" in mos
        and "-0.00967" in mos
    )
    assert f"(t {want.statistic:.2f}, p {want.pvalue:.2g})" in mos
    assert "| 15900000 | 200.0 | 100 |" in mos
    tied = next(row for row in rows if row.startswith("| tied "))
    assert "| - |" in tied and len(rows) == 3


def test_one_seed_gets_no_p_value_and_an_artifact_over_the_cap_is_marked(tmp_path, run):
    finished(tmp_path, "a")
    finished(tmp_path, "b", head="simplex", bpb=2.0, bytes_total=16_000_001)
    row = next(line for line in table(tmp_path, run).splitlines() if line.startswith("| simplex"))
    assert "+0.50000 |" in row and "16000001 OVER" in row and " p " not in row


def test_unfinished_and_corrupt_runs_are_named_and_do_not_stop_the_table(tmp_path, run):
    finished(tmp_path, "good")
    texts = dict(
        cut='{"val_bpb": 1.',
        other="[1, 2]",
        old='{"val_bpb": 1.4}',
        odd='{"settings": 3, "step_stop": 1}',
    )
    genuine = json.loads((tmp_path / "runs/good/submission.json").read_text())
    strange = dict(
        seed=[1], val_bpb=float("nan"), step_stop=10**400, wallclock_seconds="x", bytes_total=None
    )
    texts |= {name: json.dumps(genuine | {name: value}) for name, value in strange.items()}
    for name, text in texts.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "submission.json").write_text(text)
    (tmp_path / "runs" / "busy").mkdir()
    out = table(tmp_path, run)
    assert out.count("| tied ") == 1 and "runs/busy: not finished" in out
    for name in texts:
        assert f"runs/{name}: its submission.json cannot be read" in out


def test_differences_of_source_data_and_machine_are_said(tmp_path, run):
    finished(tmp_path, "a")
    finished(
        tmp_path, "b", seed=2, source_sha256="b" * 64, data_sha256="e" * 64, hardware="8 x H100"
    )
    out = table(tmp_path, run)
    for name in ("source_sha256", "data_sha256", "hardware"):
        assert f"the runs differ in {name}" in out
    assert "differ in pytorch_version" not in out


@pytest.mark.parametrize("seeds, said", [((1, 2, 2), True), ((1, 2, 3), False)])
def test_a_seed_that_counts_twice_is_said(seeds, said, tmp_path, run):
    for name, seed in zip("abc", seeds):
        finished(tmp_path, name, seed=seed, bpb=1.5 + seed / 10)
    finished(tmp_path, "d", head="mos", seed=2)
    assert ("runs/a: another run has its settings and its seed" in table(tmp_path, run)) == said


def test_a_folder_s_name_is_not_read_as_mathematics(tmp_path, run):
    finished(tmp_path, "a$x_{$")
    assert "learning curves: runs/" in table(tmp_path, run) or "No module" in table(tmp_path, run)


def test_what_hinders_the_picture_does_not_hinder_the_table(tmp_path, run):
    finished(tmp_path, "a")
    (tmp_path / "runs/learning_curves.png").mkdir()
    for changes in ({}, dict(MPLBACKEND="nonsense")):
        out = run({"MODE": "table", **changes}, cwd=tmp_path)
        assert (
            out.returncode == 0
            and "| tied |" in out.stdout
            and "no learning curves: " in out.stdout
        ), out.stderr


def test_pipes_are_not_waited_for(tmp_path, run):
    finished(tmp_path, "a")
    (tmp_path / "runs/a/metrics.jsonl").unlink()
    (tmp_path / "runs/b").mkdir()
    for path in ("runs/a/metrics.jsonl", "runs/b/submission.json"):
        os.mkfifo(tmp_path / path)
    assert "runs/b: not finished" in table(tmp_path, run)


def test_why_no_run_could_be_read_is_said(tmp_path, run):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/submission.json").write_text("[")
    (tmp_path / "runs/b").mkdir()
    out = run({"MODE": "table"}, cwd=tmp_path)
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert (
        out.stderr.startswith("error: RUNS=runs/*: matches no finished run; runs/a: ")
        and "runs/b: not finished" in out.stderr
    )


def test_learning_curves_are_drawn_or_it_says_why_not(tmp_path, run):
    finished(tmp_path, "a")
    out = table(tmp_path, run)
    drawn = (tmp_path / "runs/learning_curves.png").exists()
    assert (
        "learning curves: runs/learning_curves.png"
        if drawn
        else "no learning curves: No module named 'matplotlib'"
    ) in out


def test_no_run_at_all_is_an_error(tmp_path, run):
    out = run({"MODE": "table", "RUNS": "nothing/*"}, cwd=tmp_path)
    assert out.returncode == 2 and out.stderr == "error: RUNS=nothing/*: matches no finished run\n"

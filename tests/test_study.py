"""The sweep `.study/run`, with an interpreter that trains nothing and writes down what it was asked for."""

import dataclasses
import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT, from_env

import train_gpt

PARTS = ("law", "long", "cpu", "file_order", "rate", "frozen", "best")
LINES = (ROOT / ".study/results.jsonl").read_text().splitlines()
RESULTS = {result["row"]: result for result in map(json.loads, LINES)}
DEFAULTS = dataclasses.asdict(train_gpt.Hyperparameters())

# as `train_gpt.py`: a run's environment to a file, or a failure, or a spectrum; as `record.py`: a line of results
INTERPRETER = """#!/usr/bin/env bash
case $1 in
  train_gpt.py)
    [ "${MODE:-train}" != eval ] || [ -z "${BLIND:-}" ] || exit 2
    [ "${MODE:-train}" != eval ] || { echo loading; echo "{\\"of\\": \\"$ARTIFACT\\"}"; exit; }
    [ "$RUN_ID" != "${FAILING:-}" ] || exit 2
    env > "$RUN_ID.env" ;;
  */record.py) echo "{\\"row\\": \\"$2\\", \\"folder\\": \\"$3\\", \\"spectrum\\": ${4:-null}}" ;;
esac
"""

pytestmark = pytest.mark.skipif(
    not shutil.which("git")
    or subprocess.run(
        ["git", "cat-file", "-e", "9d6f88d"], cwd=ROOT, capture_output=True
    ).returncode,
    reason="needs git and this repository's history",
)


@pytest.fixture
def sweep(tmp_path):
    """Starts the sweep with its results in tmp_path; returns its exit code and the rows that it made."""
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    results = tmp_path / "results.jsonl"

    def start(part, pattern, **variables):
        had = results.read_text().splitlines() if results.exists() else []
        paths = dict(PYTHON=str(interpreter), RESULTS=str(results), WORK=str(tmp_path))
        environment = {**os.environ, "JOBS": "4", **variables, **paths}
        command = ["bash", ROOT / ".study/run", part, tmp_path, pattern]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = results.read_text().splitlines() if results.exists() else []
        made = [json.loads(line)["row"] for line in lines]
        assert made[: len(had)] == [json.loads(line)["row"] for line in had]
        return done.returncode, made[len(had) :]

    return start


def environment_of(tmp_path, row):
    """The variables that a row's run was started with."""
    lines = (tmp_path / f"{row}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def without_machine(settings):
    """Settings without what is of the machine that a run was made on."""
    paths = ("given", "run_id", "data_path", "tokenizer_path", "size_limit_bytes")
    elsewhere = (*paths, "compute_dtype", "attn_backend", "allow_near_misses")
    return {name: value for name, value in settings.items() if name not in elsewhere}


def test_a_row_is_made_once_and_what_is_missing_is_made_later(sweep, tmp_path):
    pattern = "^1024 64 1500 .* (untied|mos2) "
    rows = {f"v1024-d64-s1500-{head}-{seed}" for head in ("untied", "mos2") for seed in (3, 5, 7)}
    failing = "v1024-d64-s1500-mos2-5"
    code, made = sweep("law", pattern, SEEDS="3 5", FAILING=failing)
    assert code != 0 and set(made) == rows - {failing} and len(made) == len(rows) - 1
    assert sweep("law", pattern, SEEDS="3 5") == (0, [failing])
    assert sweep("law", pattern, SEEDS="3 5") == (0, [])


def test_the_rank_is_measured_on_the_row_s_own_artifact_where_it_is_asked_for(sweep, tmp_path):
    for row, asked in (("v1024-d64-s1500-tied-3", "0"), ("v1024-d64-s1500-untied-3", "1")):
        pattern = f" {row.split('-')[3]} "
        assert sweep("law", "^1024 64 1500 3" + pattern, SEEDS="3", SPECTRUM=asked) == (0, [row])
    blind = dict(SEEDS="3", SPECTRUM="1", BLIND="1")
    code, made = sweep("law", "^1024 64 1500 3 mos2 ", **blind)
    assert code != 0 and not made  # no row without the figure that was asked for
    first, second = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert first["spectrum"] is None
    assert second["spectrum"] == {"of": f"runs/{second['row']}/final_model.int8.ptz"}


def test_a_row_s_run_gets_the_cell_s_settings_and_not_the_sweep_s_own(sweep, tmp_path):
    assert sweep("law", "^1024 64 1500 5 mos2 ", SEEDS="3 5") == (0, ["v1024-d64-s1500-mos2-5"])
    got = environment_of(tmp_path, "v1024-d64-s1500-mos2-5")
    code = len((tmp_path / "train_gpt.py").read_bytes())
    wanted = dict(
        SEED="5", MODEL_DIM="64", HEAD_TYPE="mos", HEAD_K="2", HEAD_RANK="64", ITERATIONS="1500"
    )
    wanted |= dict(SIZE_LIMIT_BYTES=str(code + 132000), COMPUTE_DTYPE="fp32", SHUFFLE="1")
    assert wanted.items() <= got.items()
    assert "SEEDS" not in got


@pytest.mark.parametrize("part", PARTS)
def test_the_rows_of_a_part_are_made_as_the_committed_ones_were(part, sweep, tmp_path):
    code, made = sweep(part, ".")
    assert code == 0

    code_bytes = len((tmp_path / "train_gpt.py").read_bytes())
    compared = 0
    for row in made:
        s = dataclasses.asdict(from_env(environment_of(tmp_path, row)))
        assert s["run_id"] == row and row.endswith(f"-{s['seed']}")
        if row not in RESULTS:
            continue
        then = RESULTS[row]["settings"]
        budget = then["size_limit_bytes"] - RESULTS[row]["bytes_code"]
        assert s["size_limit_bytes"] - code_bytes == budget
        changed = {name: value for name, value in s.items() if value != DEFAULTS[name]}
        assert without_machine(changed) == without_machine(then), row
        compared += 1
    assert compared, "no row of this part is committed"


def test_a_wrong_part_or_pattern_ends_it_before_anything_runs(sweep):
    assert sweep("laws", ".") == (2, [])
    assert sweep("law", "no such row") == (2, [])


@pytest.mark.parametrize(
    "known, unknown, message",
    [
        ("tied untied mos2 tied+10%", "tied untide", "no head untide"),
        ("1024-64) budget=", "1024-63) budget=", "no budget for V = 1024, D = 64"),
    ],
)
def test_a_head_or_a_size_that_the_sweep_does_not_know_is_no_row(
    known, unknown, message, sweep, tmp_path
):
    script = tmp_path / "run"
    script.write_text((ROOT / ".study/run").read_text().replace(known, unknown))
    results = tmp_path / "results.jsonl"
    paths = dict(PYTHON=str(tmp_path / "python"), RESULTS=str(results), WORK=str(tmp_path))
    environment = {**os.environ, **paths, "GIT_DIR": str(ROOT / ".git")}
    command = ["bash", script, "law", tmp_path, "^1024 64 1500 .* (tied|unti..) "]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr and not results.exists()

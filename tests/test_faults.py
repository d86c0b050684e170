"""Faults while a run goes on: ranks that die, files that vanish, disks that fill, files that are damaged."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_runs import SCRIPT, SMALL, data, environment, losses, run, start, wait_for  # noqa: F401

import train_gpt

SLOW = dict(ITERATIONS=3000, RUN_ID="slow")


def workers(process):
    """Process ids of torchrun's ranks."""
    out = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in out]


def test_a_rank_that_dies_ends_the_others_with_a_line_and_the_run_resumes(data, tmp_path):  # noqa: F811
    settings = dict(ITERATIONS=60, RUN_ID="lost", CHECKPOINT_SECONDS=0.1)
    process = start(tmp_path, SMALL, data, settings, ranks=2)
    wait_for(tmp_path / "runs/lost/train.log", "step:20/", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and 'train_gpt.py", line' not in err, err
    out, _ = run(tmp_path, SMALL, data, settings, ranks=2)
    assert "resumed at step" in out and len(losses(tmp_path / "runs/lost")) == 60


def test_ctrl_c_at_torchrun_saves_a_checkpoint(data, tmp_path):  # noqa: F811
    process = start(tmp_path, SMALL, data, SLOW, ranks=2)
    wait_for(tmp_path / "runs/slow/train.log", "step:8/", process)
    for pid in workers(
        process
    ):  # a terminal signals every process of its group, and torchrun repeats it
        os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert "resume with:" in out and (tmp_path / "runs/slow/checkpoint.pt").exists(), out + err


def test_a_second_signal_stops_at_once(data, tmp_path):  # noqa: F811
    heavy = dict(
        SLOW, TRAIN_SEQ_LEN=1024, TRAIN_BATCH_TOKENS=1024 * 256, MICRO_BATCH_TOKENS=1024 * 256
    )
    process = start(
        tmp_path, SMALL, data, heavy
    )  # one micro-batch takes many seconds, and inside none is a signal heeded
    wait_for(tmp_path / "runs/slow/train.log", "model_params", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (
        process.returncode in (143, -signal.SIGTERM)
        and not (tmp_path / "runs/slow/checkpoint.pt").exists()
    )


def test_a_folder_that_vanishes_stops_the_run_in_one_line(data, tmp_path):  # noqa: F811
    process = start(tmp_path, SMALL, data, SLOW)
    wait_for(tmp_path / "runs/slow/train.log", "step:8/", process)
    shutil.rmtree(tmp_path / "runs")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch(
        r"error: runs/slow/\S+: cannot be written \(.*\n", err
    ), err


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"settings": {}, "val_bpb": 1.5, "bytes_total": 1}',
        '{"settings": {"seed": 1337}, "val_bpb": NaN, "bytes_total": 1}',
        '{"settings": {"seed": 1337}, "bytes_total": 1}',
        '{"settings": 3, "val_bpb": 1.5, "bytes_total": 1}',
    ],
)
def test_nonsense_is_no_result(text, data, tmp_path):  # noqa: F811
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/submission.json").write_text(text)
    _, err = run(tmp_path, SMALL, data, dict(RUN_ID="one"), code=2)
    assert err.startswith("error: runs/one: holds a damaged") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["checkpoint.pt", "submission.json"])
def test_damaged_files_of_an_earlier_run_are_named(name, data, tmp_path):  # noqa: F811
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one" / name).write_bytes(b"\x00\x01 not what it should be")
    _, err = run(tmp_path, SMALL, data, dict(RUN_ID="one"), code=2)
    assert err.startswith("error: runs/one: holds a damaged") and err.count("\n") == 1


def test_a_read_only_place_is_an_error_before_training(data, tmp_path):  # noqa: F811
    (tmp_path / "runs").write_text("a file where the folder should be")
    _, err = run(tmp_path, SMALL, data, dict(RUN_ID="one"), code=2)
    assert err.startswith("error: runs/one: cannot be written") and err.count("\n") == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A mounted tmpfs of 8 MB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_found_before_training_or_stops_the_run_in_one_line(data, tiny_disk):  # noqa: F811
    _, err = run(tiny_disk, SMALL, data, dict(RUN_ID="one", MODEL_DIM=128), code=2)
    assert re.fullmatch(r"error: runs/one: has less than \d+ bytes free; .*\n", err), err
    assert not [*tiny_disk.iterdir()]  # nothing is written
    process = start(
        tiny_disk, SMALL, data, SLOW, dict(SIZE_LIMIT_BYTES=1000, CHECKPOINT_SECONDS=0.5)
    )
    while not (tiny_disk / "runs/slow/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    with contextlib.suppress(OSError), open(tiny_disk / "fill", "wb", buffering=0) as fill:
        while True:
            fill.write(b"x" * 4096)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(
        r"error: runs/slow/\S+: cannot be written \(No space left on device\); .*\n", err
    ), err
    files = {path.name for path in (tiny_disk / "runs/slow").iterdir()}
    assert files == {".lock", "train.log", "metrics.jsonl", "checkpoint.pt"}
    torch.load(tiny_disk / "runs/slow/checkpoint.pt", weights_only=True)  # the one before is whole


def test_leftovers_of_a_killed_write_are_removed(data, tmp_path):  # noqa: F811
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/.checkpoint.pt.12345.part").write_bytes(b"half")
    run(tmp_path, SMALL, data, dict(RUN_ID="one"))
    assert not list((tmp_path / "runs/one").glob(".*.part"))


@pytest.mark.parametrize("what", ["source", "data"])
def test_a_run_is_not_resumed_under_another_source_or_data(what, data, tmp_path):  # noqa: F811
    script, own = tmp_path / "train_gpt.py", tmp_path / "shards"
    shutil.copy(SCRIPT, script)
    shutil.copytree(data["DATA_PATH"], own)
    settings = (SMALL, data, SLOW, dict(CHECKPOINT_SECONDS=0.1, DATA_PATH=own))
    process = start(tmp_path, *settings, script=script)
    wait_for(tmp_path / "runs/slow/train.log", "step:20/", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    changed = script if what == "source" else next(own.glob("fineweb_val_*.bin"))
    changed.write_bytes(changed.read_bytes()[:-2] + (b"#\n" if what == "source" else b"\x07\x01"))
    process = start(tmp_path, *settings, script=script)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch(
        r"error: RUN_ID=slow: was run on other data, or .*\n", err
    ), err


def test_a_world_that_cannot_meet_is_an_error(data, tmp_path):  # noqa: F811
    place = dict(RANK=0, MASTER_PORT=29511)
    for world in (
        dict(WORLD_SIZE=2),
        dict(place, WORLD_SIZE=2, MASTER_ADDR="nowhere.invalid"),
        dict(place, WORLD_SIZE=10**20, MASTER_ADDR="127.0.0.1"),
    ):
        _, err = run(tmp_path, SMALL, data, world, code=2)
        assert (
            err.startswith(f"error: WORLD_SIZE={world['WORLD_SIZE']}: the ranks cannot meet")
            and err.count("\n") == 1
        ), err


@pytest.mark.parametrize(
    "world",
    [
        dict(RANK=-1),
        dict(RANK=1),
        dict(LOCAL_RANK=-1),
        dict(LOCAL_RANK=1),
        dict(LOCAL_WORLD_SIZE=0),
    ],
    ids=str,
)
def test_an_impossible_place_in_the_world_is_an_error(world, data, tmp_path):  # noqa: F811
    _, err = run(tmp_path, SMALL, data, world, code=2)
    named = " ".join(f"{name}={value}" for name, value in world.items())
    assert (
        err.startswith("error: ")
        and named in err
        and err.count("\n") == 1
        and not [*tmp_path.iterdir()]
    )


def test_a_sweep_started_twice_in_parallel_repeats_and_loses_nothing(data, tmp_path):  # noqa: F811
    names = ["p0", "p1", "p2"]
    loops = [
        [start(tmp_path, SMALL, data, dict(RUN_ID=name, SEED=i)) for i, name in enumerate(names)]
        for _ in range(2)
    ]
    for process in (p for loop in loops for p in loop):
        _, err = process.communicate(timeout=240)
        assert process.returncode in (0, 2) and (process.returncode == 0 or "in progress" in err), (
            err
        )
    for name in names:
        assert (tmp_path / "runs" / name / "submission.json").exists() and len(
            losses(tmp_path / "runs" / name)
        ) == 6


# ---- Faults of the surroundings --------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_flipped_bit_is_refused(data, tmp_path):  # noqa: F811
    process = start(tmp_path, SMALL, data, SLOW)
    wait_for(tmp_path / "runs/slow/train.log", "step:8/", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    path = tmp_path / "runs/slow/checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4  # inside a tensor, which PyTorch would load as it is
    path.write_bytes(content)
    _, err = run(tmp_path, SMALL, data, SLOW, code=2)
    assert err.startswith("error: runs/slow: holds a damaged") and err.count("\n") == 1


def test_a_token_outside_the_vocabulary_in_mid_training_costs_no_finished_step(data, tmp_path):  # noqa: F811
    folder, name = tmp_path / "shards", "fineweb_train_000000.bin"
    shutil.copytree(data["DATA_PATH"], folder)
    settings = dict(data, DATA_PATH=folder, ITERATIONS=60, RUN_ID="token", TRAIN_BATCH_TOKENS=128)
    process = start(tmp_path, SMALL, settings, dict(TRAIN_BATCH_TOKENS=128, ITERATIONS=100_000))
    wait_for(tmp_path / "runs/token/train.log", "step:3/", process)
    with open(folder / name, "r+b") as shard:
        shard.seek(1024 + 2 * 39_000)  # at the end, which step 300 reaches
        shard.write(b"\xff\xff")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "holds token id 65535" in err and err.count("\n") == 1
    assert (tmp_path / "runs/token/checkpoint.pt").exists()


def test_a_shard_that_shrinks_is_an_error(data, tmp_path):  # noqa: F811
    shutil.copytree(data["DATA_PATH"], tmp_path / "shards")
    shards = train_gpt.Shards(tmp_path / "shards", "train", 1024)
    shards.take(39_000, 500)
    os.truncate(tmp_path / "shards/fineweb_train_000000.bin", 50_000)
    with pytest.raises(train_gpt.UserError, match="its size has changed"):
        shards.take(39_000, 500)


def test_a_closed_standard_output_does_not_matter(data, tmp_path):  # noqa: F811
    env = environment(SMALL, data, dict(ITERATIONS=1, RUN_ID="closed"))
    assert (
        subprocess.run(
            f"exec {sys.executable} {SCRIPT} >&-", shell=True, cwd=tmp_path, env=env
        ).returncode
        == 0
    )
    assert (tmp_path / "runs/closed/submission.json").exists()


def test_nohup_outlives_its_terminal(data, tmp_path):  # noqa: F811
    env = environment(SMALL, data, dict(ITERATIONS=200, RUN_ID="nohup"))
    process = subprocess.Popen(
        ["nohup", sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "runs/nohup/train.log", "step:3/", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0


def test_a_model_beyond_memory_is_a_users_error(tmp_path):
    _, err = run(
        tmp_path, SMALL, dict(MODE="bench", BIGRAM_VOCAB_SIZE=2**24, BIGRAM_DIM=2**16), code=2
    )
    assert err.startswith("error: out of memory; lower ") and err.count("\n") == 1


def test_a_missing_compiler_is_a_users_error(data, tmp_path):  # noqa: F811
    env = dict(
        environment(SMALL, data, dict(ITERATIONS=1, COMPILE=1, CXX="/nonexistent", HOME=tmp_path)),
        PATH="/nonexistent",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and re.fullmatch("error: .*set COMPILE=0\n", done.stderr), (
        done.stderr[-2000:]
    )


def test_arguments_are_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "HEAD_TYPE=mos"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: HEAD_TYPE=mos: ")
        and not any(tmp_path.iterdir())
    )


def test_a_table_that_cannot_be_printed_is_an_error(data, tmp_path):  # noqa: F811
    run(tmp_path, SMALL, data, dict(ITERATIONS=0, RUN_ID="one"))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPT)],
            cwd=tmp_path,
            env=environment(dict(MODE="table")),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "name", ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, data, tmp_path):  # noqa: F811
    folder = tmp_path / "shards"
    shutil.copytree(data["DATA_PATH"], folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    _, err = run(
        tmp_path,
        SMALL,
        dict(DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", RUN_ID="one"),
        code=2,
    )
    assert name in err and err.count("\n") == 1


@pytest.mark.parametrize("name, code", [(".lock", 2), ("checkpoint.pt", 0), ("submission.json", 0)])
def test_a_pipe_in_a_run_s_folder_is_not_waited_for(name, code, data, tmp_path):  # noqa: F811
    (tmp_path / "runs/one").mkdir(parents=True)
    os.mkfifo(tmp_path / "runs/one" / name)
    _, err = run(tmp_path, SMALL, data, dict(RUN_ID="one", ITERATIONS=0), code=code)
    assert err.count("\n") == (code == 2) and (code == 0 or err.startswith("error: runs/one"))


@pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="what a process has loaded is not seen here"
)
@pytest.mark.parametrize("library", ["numpy", "libtorch"])
def test_ctrl_c_while_the_program_starts_leaves_no_traceback(library, data, tmp_path):  # noqa: F811
    process = start(tmp_path, SMALL, data, dict(ITERATIONS=3000, RUN_ID="early"))
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and err == ""


def test_a_run_that_could_not_begin_leaves_its_name_free(data, tmp_path):  # noqa: F811
    settings = dict(QUANT="gptq", RUN_ID="one", ITERATIONS=2)
    _, err = run(tmp_path, SMALL, data, settings, dict(MAX_WALLCLOCK_SECONDS=0.001), code=2)
    assert (
        err.startswith("error: MAX_WALLCLOCK_SECONDS=0.001: QUANT=gptq needs ")
        and err.count("\n") == 1
    )
    assert not (tmp_path / "runs/one/checkpoint.pt").exists()

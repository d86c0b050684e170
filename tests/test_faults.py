"""Faults while a run goes on: data that vanish, disks that fill, damaged files, ranks that die."""

import builtins
import contextlib
import errno
import io
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
import torch
from conftest import (
    ROOT,
    SCRIPT,
    SMALL_RUN,
    command,
    environment,
    last_line,
    losses,
    run,
    run_here,
    start,
    stop,
    wait_for,
)
from test_runs import ARTIFACT, assert_same_run

import train_gpt

TWENTY = dict(SMALL_RUN, ITERATIONS=20)
ENDLESS = dict(SMALL_RUN, ITERATIONS=100_000, RUN_ID="slow")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a finished run of TWENTY without a fault."""
    cwd = tmp_path_factory.mktemp("whole")
    run_here(cwd, TWENTY, data, dict(RUN_ID="whole"))
    return cwd / "runs/whole"


@pytest.fixture
def shards(data, tmp_path):
    """A copy of the data that a test may damage; the training tokens lie in two shards."""
    folder = tmp_path / "shards"
    shutil.copytree(data["DATA_PATH"], folder)
    tokens = train_gpt.Shards(folder, "train", 1024).take(0, 40_000)
    train_gpt.write_shard(folder / "fineweb_train_000000.bin", tokens[:7000])
    train_gpt.write_shard(folder / "fineweb_train_000001.bin", tokens[7000:])
    return folder


def one_line(err):
    """The error of a program that ended with code 2; it has one line on standard error."""
    assert re.fullmatch(r"error: .*\n", err), err
    return err[len("error: ") : -1]


# ---- the data ----


def test_data_that_vanish_in_mid_run_cost_no_finished_step(
    whole, data, shards, tmp_path, monkeypatch
):
    settings = (TWENTY, data, dict(DATA_PATH=shards, RUN_ID="lost"))
    folder, second = tmp_path / "runs/lost", shards / "fineweb_train_000001.bin"

    def vanish(world):
        second.rename(tmp_path / "away")

    # the shard that step 13 reads for the first time: deleted, or moved
    error = one_line(run_here(tmp_path, *settings, code=2, at={8: vanish}))
    for said in (f"DATA_PATH={shards}: ", second.name, os.strerror(errno.ENOENT)):
        assert said in error
    again = "saved at step 13, the same command with RUN_ID=lost goes on"
    assert last_line(folder) == f"ended: {error}; {again}"

    # while it is away the run is refused and its checkpoint kept
    before = (folder / "checkpoint.pt").read_bytes()
    one_line(run_here(tmp_path, *settings, code=2))
    assert (folder / "checkpoint.pt").read_bytes() == before
    (tmp_path / "away").rename(second)

    # a disk or a server that fails
    fromfile = np.fromfile
    for step, number in ((15, errno.ESTALE), (17, errno.EIO)):

        def fail(*arguments, number=number, **options):
            raise OSError(number, os.strerror(number))

        def unmount(world, fail=fail):
            monkeypatch.setattr(np, "fromfile", fail)

        error = one_line(run_here(tmp_path, *settings, code=2, at={step: unmount}))
        monkeypatch.setattr(np, "fromfile", fromfile)
        for said in (f"DATA_PATH={shards}: ", second.name, os.strerror(number)):
            assert said in error
        assert f"ended: {error}; saved at step " in last_line(folder)
    run_here(tmp_path, *settings)
    assert_same_run(folder, whole)


def test_data_that_turn_out_wrong_in_mid_run_cost_no_finished_step(whole, data, shards, tmp_path):
    settings = (TWENTY, data, dict(DATA_PATH=shards, RUN_ID="wrong"))
    second = shards / "fineweb_train_000001.bin"
    good = second.read_bytes()

    def put_a_strange_token(world):
        with open(second, "r+b") as shard:
            shard.seek(1024 + 2 * 1000)  # read in step 15
            shard.write(b"\xff\xff")

    def cut(world):
        os.truncate(second, 1024 + 2 * 1000)

    # a thread reads a batch ahead
    token, size = "holds token id 65535", "become shorter"
    for fault, step, words in ((put_a_strange_token, 3, token), (cut, 15, size)):
        error = one_line(run_here(tmp_path, *settings, code=2, at={step: fault}))
        assert str(second) in error and words in error
        assert re.search("; saved at step 1[567], ", last_line(tmp_path / "runs/wrong"))
        second.write_bytes(good)
    run_here(tmp_path, *settings)
    assert_same_run(tmp_path / "runs/wrong", whole)


def test_an_empty_path_and_an_empty_tokenizer_are_one_line(data, tmp_path, capfd):
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        error = one_line(run_here(tmp_path, SMALL_RUN, data, {name: ""}, code=2))
        assert error.startswith(f"{name}=: ")
    (tmp_path / "empty").touch()
    error = one_line(run_here(tmp_path, SMALL_RUN, data, dict(TOKENIZER_PATH="empty"), code=2))
    assert error.startswith("TOKENIZER_PATH=empty: is no SentencePiece model")
    assert capfd.readouterr() == ("", "")  # nor does the library speak for itself
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_validation_split_without_text_is_one_line(data, shards, tmp_path):
    train_gpt.write_shard(
        shards / "fineweb_val_000000.bin", [1, 2] * 2000
    )  # both are control tokens
    said = dict(DATA_PATH=shards, EVAL_SPLIT="val", ITERATIONS=1)
    error = one_line(run_here(tmp_path, SMALL_RUN, data, said, code=2))
    assert error.startswith("EVAL_SPLIT=val: ") and "no text" in error


def test_without_permission_is_not_damaged(finished, data, shards, tmp_path, monkeypatch):
    """The tests may run as root, who may read everything: so `open` refuses, not the file."""
    run_here(tmp_path, TWENTY, data, dict(RUN_ID="part"), code=143, at={3: stop})
    shutil.copytree(finished / "runs/done", tmp_path / "runs/done")
    shutil.copy(data["TOKENIZER_PATH"], tmp_path / "tokenizer.model")
    done = dict(RUN_ID="done", HEAD_TYPE="mos", HEAD_RANK=8, EVAL_STRIDE=16)
    kept = (tmp_path / "runs/part/checkpoint.pt").read_bytes()

    def refusing(function, path):
        def refuse(file=".", *arguments, **options):
            if isinstance(file, (str, Path)) and Path(file).resolve() == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return function(file, *arguments, **options)

        return refuse

    for path, settings, named in (
        ("runs/part/checkpoint.pt", dict(TWENTY, RUN_ID="part"), "runs/part/checkpoint.pt: "),
        ("runs/done/submission.json", dict(SMALL_RUN, **done), "runs/done/submission.json: "),
        ("tokenizer.model", dict(TOKENIZER_PATH="tokenizer.model"), "TOKENIZER_PATH="),
        ("shards", dict(DATA_PATH="shards"), "DATA_PATH=shards: "),
        ("shards/fineweb_train_000000.bin", dict(DATA_PATH="shards"), "shards/fineweb_train"),
        (f"runs/done/{ARTIFACT}", dict(INIT_FROM=f"runs/done/{ARTIFACT}"), "INIT_FROM=runs"),
        ("runs/part/.lock", dict(TWENTY, RUN_ID="part"), "RUN_ID=part: "),
    ):
        with monkeypatch.context() as patch:
            for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "listdir")):
                patch.setattr(module, name, refusing(getattr(module, name), tmp_path / path))
            error = one_line(run_here(tmp_path, SMALL_RUN, data, settings, code=2))
        assert error.startswith(named) and os.strerror(errno.EACCES) in error, error
        assert "damaged" not in error and "delete" not in error
    assert (tmp_path / "runs/part/checkpoint.pt").read_bytes() == kept


# ---- memory, and defects ----


def test_memory_that_runs_out_in_mid_run_costs_no_finished_step(whole, data, tmp_path, monkeypatch):
    settings = (TWENTY, data, dict(RUN_ID="memory"))
    folder = tmp_path / "runs/memory"
    muon = train_gpt.Muon.step

    def on_the_host(world):
        raise MemoryError

    def on_the_device(world):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    # before a step is applied: it is done again
    for step, fault in ((5, on_the_host), (9, on_the_device)):
        error = one_line(run_here(tmp_path, *settings, code=2, at={step: fault}))
        assert error.startswith("out of memory; lower MICRO_BATCH_TOKENS")
        assert last_line(folder).startswith(f"ended: {error}; saved at step {step}, ")

    # in the middle of a step: the checkpoint before it stays
    def half(optimizer):
        muon(optimizer)
        raise MemoryError

    half_step = {14: lambda world: monkeypatch.setattr(train_gpt.Muon, "step", half)}
    often = dict(CHECKPOINT_SECONDS=1e-9)
    error = one_line(run_here(tmp_path, *settings, often, code=2, at=half_step))
    monkeypatch.setattr(train_gpt.Muon, "step", muon)
    assert last_line(folder) == f"ended: {error}"
    assert run_here(tmp_path, *settings).startswith("resumed at step 14\n")
    assert_same_run(folder, whole)


def test_a_fault_in_warm_up_leaves_no_state_of_the_warm_up(whole, data, tmp_path):
    # its steps are undone at its end, so no checkpoint may hold them
    def run_out(world):
        raise MemoryError

    settings = (TWENTY, data, dict(RUN_ID="warm", WARMUP_STEPS=3))
    checkpoint = tmp_path / "runs/warm/checkpoint.pt"
    one_line(run_here(tmp_path, *settings, code=2, at={1: run_out}))
    assert not checkpoint.exists()
    run_here(tmp_path, *settings, code=143, at={7: stop})
    before = checkpoint.read_bytes()
    one_line(run_here(tmp_path, *settings, code=2, at={9: run_out}))  # the second after step 8
    assert checkpoint.read_bytes() == before
    run_here(tmp_path, *settings)
    assert_same_run(tmp_path / "runs/warm", whole)


def test_a_failing_save_does_not_hide_why_the_run_ended(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(torch, "save", fail)
    run_here(tmp_path, TWENTY, data, dict(RUN_ID="unsaved"), code=143, at={3: stop})
    assert last_line(tmp_path / "runs/unsaved").startswith("ended: stopped by SIGTERM; ")


def test_a_defect_of_the_program_shows_its_traceback_and_keeps_what_was_trained(
    whole, data, tmp_path
):
    def defect(world):
        raise ZeroDivisionError("a defect")

    settings = (TWENTY, data, dict(RUN_ID="defect"))
    with pytest.raises(ZeroDivisionError):
        run_here(tmp_path, *settings, at={7: defect})
    last = last_line(tmp_path / "runs/defect")
    assert "ZeroDivisionError: a defect" in last and "; saved at step 7, " in last
    run_here(tmp_path, *settings)
    assert_same_run(tmp_path / "runs/defect", whole)


def test_a_model_beyond_memory_is_a_users_error(tmp_path):
    huge = dict(MODE="bench", BIGRAM_VOCAB_SIZE=2**24, BIGRAM_DIM=2**16)
    error = one_line(run_here(tmp_path, SMALL_RUN, huge, code=2))
    assert error.startswith("out of memory; lower ")


# ---- files of an earlier run ----


def test_a_checkpoint_with_wrong_content_is_refused_and_kept(whole, data, tmp_path):
    settings = (TWENTY, data, dict(RUN_ID="part"))
    run_here(tmp_path, *settings, code=143, at={3: stop})
    path = tmp_path / "runs/part/checkpoint.pt"
    good, log = path.read_bytes(), (tmp_path / "runs/part/train.log").read_text()
    content = torch.load(path, weights_only=True)
    tensors = content["tensors"]
    longest = max(range(len(tensors)), key=lambda i: tensors[i].numel())

    def with_tensor(tensor):
        return dict(content, tensors=[*tensors[:longest], tensor, *tensors[longest + 1 :]])

    wrong = {f"without {k}": {n: v for n, v in content.items() if n != k} for k in content}
    wrong |= {
        "other shape": with_tensor(tensors[longest].flatten()),
        "other dtype": with_tensor(tensors[longest].double()),
        "no tensor": with_tensor(None),
        "no tensors": dict(content, tensors=[]),
        "one too few": dict(content, tensors=tensors[:-1]),
        "one too many": dict(content, tensors=[*tensors, tensors[-1]]),
        "beyond the end": dict(content, steps=21),
        "before the start": dict(content, steps=-1),
        "in the middle of a step": dict(content, steps=3.5),
        "no time": dict(content, seconds=float("nan")),
        "no grid": dict(content, grid=None),
        "a list": [*content],
        "nothing": None,
    }
    for name, other in wrong.items():
        torch.save(other, path)
        bad = path.read_bytes()
        error = one_line(run_here(tmp_path, *settings, code=2))
        assert error.startswith("runs/part/checkpoint.pt: is damaged, delete it"), name
        assert path.read_bytes() == bad, name

    # bits that have changed on the disk; a file that is none
    for damaged in (good[:-100], good.replace(b"data", b"date"), b"\0 not what it should be"):
        path.write_bytes(damaged)
        error = one_line(run_here(tmp_path, *settings, code=2))
        assert error.startswith("runs/part/checkpoint.pt: is damaged, delete it")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4  # inside a tensor, which PyTorch would load as it is
    path.write_bytes(flipped)
    error = one_line(run_here(tmp_path, *settings, code=2))
    assert error.startswith("runs/part/checkpoint.pt: is damaged, delete it")

    path.write_bytes(good)
    assert (tmp_path / "runs/part/train.log").read_text().startswith(log)
    run_here(tmp_path, *settings)
    assert_same_run(tmp_path / "runs/part", whole)


def test_nonsense_is_no_result(data, tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    for text in (
        "\0 not what it should be",
        "[]",
        "null",
        '{"settings": {}, "val_bpb": 1.5, "bytes_total": 1}',
        '{"settings": {"seed": 1337}, "val_bpb": NaN, "bytes_total": 1}',
        '{"settings": {"seed": 1337}, "bytes_total": 1}',
        '{"settings": 3, "val_bpb": 1.5, "bytes_total": 1}',
    ):
        (tmp_path / "runs/one/submission.json").write_text(text)
        error = one_line(run_here(tmp_path, SMALL_RUN, data, dict(RUN_ID="one"), code=2))
        assert error.startswith("runs/one/submission.json: is damaged, delete it"), text
        assert (tmp_path / "runs/one/submission.json").read_text() == text


def test_a_file_where_the_run_s_folder_belongs_is_found_before_training(data, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/runs").touch()
    for cwd in (tmp_path, tmp_path / "elsewhere"):
        error = one_line(run_here(cwd, SMALL_RUN, data, dict(RUN_ID="file"), code=2))
        assert error.startswith("RUN_ID=file: runs/file cannot be used")


def test_a_run_is_not_resumed_under_another_source_or_data(data, shards, tmp_path, monkeypatch):
    settings = (TWENTY, data, dict(DATA_PATH=shards, RUN_ID="part"))
    run_here(tmp_path, *settings, code=143, at={3: stop})
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "source", lambda: SCRIPT.read_bytes() + b"#\n")
        error = one_line(run_here(tmp_path, *settings, code=2))
    assert error.startswith("RUN_ID=part: was run with SOURCE_SHA256=")
    validation = shards / "fineweb_val_000000.bin"
    validation.write_bytes(validation.read_bytes()[:-2] + b"\x07\x01")
    error = one_line(run_here(tmp_path, *settings, code=2))
    assert error.startswith("RUN_ID=part: was run with DATA_SHA256=")
    error = one_line(run_here(tmp_path, *settings, dict(MATRIX_LR=0.1), code=2))
    assert error.startswith("RUN_ID=part: was run with MATRIX_LR=0.025, not 0.1; ")


# ---- the disk ----


@pytest.fixture
def tiny_disk(tmp_path):
    """A mounted tmpfs of 8 MB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk):
    with contextlib.suppress(OSError), open(disk / "fill", "wb", buffering=0) as out:
        while True:
            out.write(b"x" * 4096)


def test_a_disk_too_small_is_found_before_training(data, tiny_disk):
    error = one_line(
        run_here(tiny_disk, SMALL_RUN, data, dict(RUN_ID="one", MODEL_DIM=128), code=2)
    )
    assert re.match(r"runs/one: has less than \d+ bytes free; ", error), error
    assert not [*tiny_disk.glob("runs/one/*.pt*")]


def test_a_disk_that_fills_stops_the_run_and_leaves_the_checkpoint(whole, data, tiny_disk):
    settings = (TWENTY, data, dict(RUN_ID="full"))
    folder = tiny_disk / "runs/full"
    run_here(tiny_disk, *settings, code=143, at={3: stop})
    before = (folder / "checkpoint.pt").read_bytes()

    often = dict(CHECKPOINT_SECONDS=1e-9, TRAIN_LOG_EVERY=0)
    full = {8: lambda world: fill(tiny_disk)}
    error = one_line(run_here(tiny_disk, *settings, often, code=2, at=full))
    assert error == "runs/full/checkpoint.pt: cannot be written: No space left on device"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["steps"] == 8
    (folder / "checkpoint.pt").write_bytes(before)
    (tiny_disk / "fill").unlink()

    # the signal ends the run, not the disk
    def fill_and_stop(world):
        fill(tiny_disk)
        stop(world)

    quiet = dict(TRAIN_LOG_EVERY=0)
    run_here(tiny_disk, *settings, quiet, code=143, at={8: fill_and_stop})
    assert (folder / "checkpoint.pt").read_bytes() == before
    (tiny_disk / "fill").unlink()
    run_here(tiny_disk, *settings)
    assert_same_run(folder, whole)


def test_a_folder_that_vanishes_stops_the_run_in_one_line(data, tmp_path):
    gone = {8: lambda world: shutil.rmtree(tmp_path / "runs")}
    error = one_line(run_here(tmp_path, TWENTY, data, dict(RUN_ID="gone"), code=2, at=gone))
    assert re.match(r"runs/gone/\S+: cannot be written: No such file", error), error


# ---- the console, arguments, the surroundings ----


def shell(cwd, redirection, *settings):
    """The script with its streams redirected."""
    line = f"exec {sys.executable} {SCRIPT} {redirection}"
    env = environment(*settings)
    return subprocess.run(line, shell=True, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_exit_code_is_2_where_standard_error_takes_nothing(tmp_path):
    for redirection in ("2>/dev/full", "2>&- >&-"):
        assert shell(tmp_path, redirection, dict(HEAD_K=0)).returncode == 2


def test_arguments_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "HEAD_TYPE=mos"])
    assert train_gpt.main() == 2
    assert one_line(capsys.readouterr().err).startswith("HEAD_TYPE=mos: settings are environment")


@pytest.mark.slow
def test_a_closed_standard_output_does_not_matter_but_to_a_table(data, tmp_path):
    settings = (SMALL_RUN, data, dict(ITERATIONS=1))
    for name, redirection in (("closed", ">&-"), ("full", ">/dev/full")):
        done = shell(tmp_path, redirection, *settings, dict(RUN_ID=name))
        assert done.returncode == 0 and done.stderr == ""
        assert (tmp_path / "runs" / name / "submission.json").exists()
    done = shell(tmp_path, ">/dev/full", dict(MODE="table"))
    assert done.returncode == 2 and "No space left" in one_line(done.stderr)


@pytest.mark.slow
def test_nohup_outlives_its_terminal(data, tmp_path):
    env = environment(SMALL_RUN, data, dict(ITERATIONS=40, RUN_ID="nohup"))
    nothing = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(["nohup", *command()], cwd=tmp_path, env=env, **nothing)
    wait_for(tmp_path / "runs/nohup/train.log", "step:3/", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0


@pytest.mark.slow
def test_a_missing_compiler_is_a_users_error(data, tmp_path):
    env = environment(SMALL_RUN, data, dict(ITERATIONS=1, COMPILE=1, CXX="/nonexistent"))
    env |= dict(PATH="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(command(), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and one_line(done.stderr).endswith("set COMPILE=0")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody sees what is loaded")
def test_ctrl_c_while_the_program_starts_leaves_no_traceback(data, tmp_path):
    for library in ("numpy", "libtorch"):
        process = start(tmp_path, ENDLESS, data)
        while library not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT) and err == ""


@pytest.mark.slow
def test_a_second_signal_stops_at_once(data, tmp_path):
    # a step that never ends: the first signal is noted in it, and no more
    (tmp_path / "endless.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt

def step(trainer, *arguments):
    print("step", flush=True)
    while True:
        time.sleep(0.01)
        if trainer.world.signal:
            print("noted", trainer.world.signal, flush=True)
            trainer.world.signal = 0

train_gpt.Trainer.step = step
os._exit(train_gpt.main())
""")
    settings = (SMALL_RUN, data, dict(RUN_ID="endless"))
    process = start(tmp_path, *settings, script=tmp_path / "endless.py")
    for line in process.stdout:
        if line == "step\n":
            process.send_signal(signal.SIGTERM)
        if line == f"noted {int(signal.SIGTERM)}\n":
            process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM)
    assert not (tmp_path / "runs/endless/checkpoint.pt").exists()


# ---- ranks ----


def ranks_of(process):
    """Process ids of torchrun's ranks."""
    out = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in out.split()]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_line_and_the_run_resumes(data, tmp_path):
    settings = (TWENTY, data, dict(RUN_ID="lost", CHECKPOINT_SECONDS=1e-9, ITERATIONS=60))
    process = start(tmp_path, *settings, ranks=2)
    wait_for(tmp_path / "runs/lost/train.log", "step:10/", process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and 'train_gpt.py", line' not in err, err
    assert "lost touch with another rank" in last_line(tmp_path / "runs/lost")
    assert "resumed at step" in run(tmp_path, *settings, ranks=2)
    assert [*losses(tmp_path / "runs/lost")[0]] == [*range(1, 61)]


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_before_they_meet_end_soon(data, tmp_path):
    process = start(tmp_path, ENDLESS, data, ranks=2)
    while len(ranks := ranks_of(process)) < 2:
        time.sleep(0.01)
    process.kill()
    deadline = time.monotonic() + 75  # the start, two tries of 12 s, 10 s for rank 0
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    err = process.communicate()[1]
    assert err.count("error: WORLD_SIZE=2: the ranks cannot meet") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_at_torchrun_saves_a_checkpoint(ranks, data, tmp_path):
    process = start(tmp_path, ENDLESS, data, ranks=ranks)
    wait_for(tmp_path / "runs/slow/train.log", "step:8/", process)
    for pid in (*ranks_of(process), process.pid):  # a terminal signals all; torchrun repeats it
        os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert "ended: stopped by SIGINT; saved at step" in out, out + err
    assert (tmp_path / "runs/slow/checkpoint.pt").exists()


@pytest.mark.slow
def test_a_world_that_cannot_meet_is_an_error(data, tmp_path):
    place = dict(RANK=0, MASTER_PORT=29511)
    for world in (
        dict(WORLD_SIZE=2),
        dict(place, WORLD_SIZE=10**20, MASTER_ADDR="127.0.0.1"),
    ):
        error = one_line(run(tmp_path, SMALL_RUN, data, world, code=2))
        assert error.startswith(f"WORLD_SIZE={world['WORLD_SIZE']}: the ranks cannot meet")
    error = one_line(run(tmp_path, SMALL_RUN, data, dict(RANK=2, WORLD_SIZE=2), code=2))
    assert error.startswith("RANK=2 LOCAL_RANK=0 WORLD_SIZE=2: ")

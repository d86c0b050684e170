"""Data: shards on disk, the endless token sequence, the batches of all ranks, and the demo corpus."""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg
from train_gpt import Hyperparameters, Shards, UserError, micro_batch_sequences, train_batch

MAGIC = 20240520


def shard_bytes(tokens, magic=MAGIC, version=1, count=None):
    """A shard in the challenge's format, written without the script's help."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def put(folder, *parts, split="train"):
    for i, tokens in enumerate(parts):
        (folder / f"fineweb_{split}_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    return folder


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))


# ---- shards ----


def test_a_good_shard_is_read_as_it_was_written(tmp_path):
    put(tmp_path, [5, 0, 65535, 1023])
    assert tg.open_shard(tmp_path / "fineweb_train_000000.bin").tolist() == [5, 0, 65535, 1023]


def test_the_script_writes_the_format_of_the_challenge(tmp_path):
    tg.write_shard(tmp_path / "a.bin", [5, 0, 65535, 1023])
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes([5, 0, 65535, 1023])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 10,
        shard_bytes([1, 2])[:1023],
        shard_bytes([1, 2, 3])[:-1],
        shard_bytes([1, 2, 3])[:-2],
        shard_bytes([1, 2]) + b"\0",
        shard_bytes([1, 2]) + b"\0\0",
        shard_bytes([1, 2], magic=20240521),
        shard_bytes([1, 2], magic=0),
        shard_bytes([1, 2], version=2),
        shard_bytes([1, 2], version=0),
        shard_bytes([1, 2], count=-1),
        shard_bytes([1, 2], count=2**31 - 1),
        shard_bytes([]),
    ],
    ids=[
        "empty file",
        "ten bytes",
        "header cut",
        "cut by a byte",
        "cut by a token",
        "a byte more",
        "a token more",
        "wrong magic",
        "no magic",
        "newer version",
        "no version",
        "negative count",
        "huge count",
        "no token",
    ],
)
def test_a_damaged_shard_is_refused_and_named(tmp_path, data):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"fineweb_val_000000\.bin: "):
        Shards(tmp_path, "val", 1024)


def test_one_damaged_shard_among_good_ones_is_found_at_once(tmp_path):
    put(tmp_path, [1, 2, 3], [4, 5], [6])
    (tmp_path / "fineweb_train_000001.bin").write_bytes(shard_bytes([4, 5])[:-2])
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: "):
        Shards(tmp_path, "train", 1024)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.write_text("file"),
        lambda path: path.mkdir(),
        lambda path: put(path.mkdir() or path, [1], split="val"),
        lambda path: (path.mkdir(), (path / "fineweb_train_0.bin").mkdir()),
    ],
    ids=["missing", "a file", "empty", "another split only", "a folder in place of a shard"],
)
def test_a_folder_without_shards_is_refused_and_named(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(UserError, match="data"):
        Shards(tmp_path / "data", "train", 1024)


@pytest.mark.parametrize("vocab_size, fits", [(1025, True), (1024, False), (7, False)])
def test_a_token_outside_the_vocabulary_is_refused_with_shard_and_token(tmp_path, vocab_size, fits):
    shards = Shards(put(tmp_path, [1, 2, 3], [4, 1024]), "train", vocab_size)
    assert shards.take(0, 4).tolist() == [1, 2, 3, 4]  # only what is read is checked
    if fits:
        assert shards.take(0, 5).tolist() == [1, 2, 3, 4, 1024]
    else:
        with pytest.raises(UserError, match=r"fineweb_train_000001\.bin.* 1024\b.*VOCAB_SIZE="):
            shards.take(0, 5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=7), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 60)), min_size=1, max_size=5),
)
def test_take_reads_the_endless_repetition_of_all_shards_in_order(parts, cuts):
    whole = [token for part in parts for token in part]
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(put(Path(folder), *parts), "train", 65536)
        assert len(shards) == len(whole)
        for start, count in cuts:
            taken = shards.take(start, count)
            assert taken.dtype == np.int64
            assert taken.tolist() == [whole[i % len(whole)] for i in range(start, start + count)]


def test_shards_are_read_in_the_order_of_their_names_whatever_the_order_of_writing(tmp_path):
    for i in (10, 2, 0):
        (tmp_path / f"fineweb_train_{i:06d}.bin").write_bytes(shard_bytes([i]))
    assert Shards(tmp_path, "train", 1024).take(0, 3).tolist() == [0, 2, 10]


# ---- batches ----


def plan(sequences, T=4, micro=0):
    return Hyperparameters(
        train_batch_tokens=sequences * T, train_seq_len=T, micro_batch_tokens=micro
    )


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Three shards that hold 0, 1, 2, ... 191."""
    folder = put(tmp_path_factory.mktemp("counting"), range(50), range(50, 51), range(51, 192))
    return Shards(folder, "train", 65536)


def joined(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 4, 8, 12, 10**6])
@pytest.mark.parametrize("step", [0, 3, 17])
def test_the_ranks_parts_in_order_are_the_same_global_batch_for_any_number_of_ranks(
    counting, size, micro, step
):
    s = plan(sequences=8, micro=micro)
    x, y = joined(
        [pair for rank in range(size) for pair in train_batch(counting, step, s, world(rank, size))]
    )
    first = torch.arange(step * 32, (step + 1) * 32).view(8, 4)
    assert torch.equal(x, first % 192)
    assert torch.equal(y, (first + 1) % 192)
    assert x.dtype == y.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_pass_over_the_data_trains_on_every_target_exactly_once(counting, size):
    targets = [
        y
        for step in range(6)
        for rank in range(size)
        for _, y in train_batch(counting, step, plan(8), world(rank, size))
    ]
    assert sorted(torch.cat(targets).flatten().tolist()) == list(range(192))


@pytest.mark.parametrize(
    "sequences, size, micro, expected",
    [
        (8, 1, 4, 1),
        (8, 1, 8, 2),
        (8, 1, 12, 2),
        (8, 1, 16, 4),
        (8, 1, 10**6, 8),
        (8, 2, 10**6, 4),
        (8, 4, 10**6, 2),
        (8, 8, 10**6, 1),
        (7, 1, 24, 1),
        (12, 2, 16, 3),
        (12, 2, 15, 3),
        (12, 2, 11, 2),
        (4096, 1, 0, 1024),
    ],
)
def test_a_micro_batch_is_the_largest_equal_part_of_the_share_within_its_tokens(
    sequences, size, micro, expected
):
    assert micro_batch_sequences(plan(sequences, micro=micro), world(0, size)) == expected


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 4]), st.integers(4, 300))
def test_the_micro_batches_cover_the_share_in_equal_parts_that_respect_their_tokens(
    share, size, micro
):
    B = micro_batch_sequences(plan(share * size, micro=micro), world(0, size))
    assert share % B == 0
    assert 4 * B <= micro


@pytest.mark.parametrize("sequences, size", [(7, 2), (6, 4), (2, 4), (1, 8)])
def test_sequences_that_do_not_divide_among_the_ranks_are_refused_with_a_size_that_would(
    sequences, size
):
    with pytest.raises(UserError, match=rf"^TRAIN_BATCH_TOKENS={4 * sequences}: .*\b{4 * size}\b"):
        micro_batch_sequences(plan(sequences), world(0, size))


# ---- files ----


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_a_write_that_fails_leaves_the_earlier_file_and_no_partial_one(
    tmp_path, monkeypatch, where, earlier
):
    path = tmp_path / "file"
    if earlier:
        path.write_bytes(earlier)
    with monkeypatch.context() as broken:
        broken.setattr(where, fail)
        if where.endswith("replace"):
            broken.setattr(os, "replace", fail)
        with pytest.raises((OSError, UserError), match="No space left"):
            tg.write_whole(path, b"new")
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == (
        {"file": earlier} if earlier else {}
    )


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for data in (b"one", b"two"):
        tg.write_whole(tmp_path / "file", data)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("file", b"two")]


def test_a_write_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    seen, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (seen.append((tmp_path / "file").exists()), sync(number))
    )
    tg.write_whole(tmp_path / "file", b"data")
    assert seen and seen[0] is False


# ---- the demo corpus ----


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


def test_the_demo_corpus_holds_three_splits_and_their_tokenizer(demo):
    shards = {f"fineweb_{split}_000000.bin" for split in ("train", "val", "test")}
    assert set(contents(demo)) == {"tokenizer.model"} | shards
    assert (
        sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model")).vocab_size()
        == 1024
    )


@pytest.mark.parametrize("split, least", [("train", 300_000), ("val", 10_000), ("test", 10_000)])
def test_a_demo_split_is_a_row_of_documents_each_behind_a_bos(demo, split, least):
    shards = Shards(demo, split, 1024)
    tokens = shards.take(0, len(shards))  # checks the vocabulary
    starts = np.flatnonzero(tokens == tg.BOS_ID)
    assert len(tokens) > least
    assert starts[0] == 0 and len(starts) > 10
    assert np.diff([*starts, len(tokens)]).min() > 1  # no empty document
    assert not {0, 2, 3} & set(tokens.tolist())  # neither padding, end nor unknown


def test_no_demo_document_is_in_two_splits(demo):
    documents = {}
    for split in ("train", "val", "test"):
        shards = Shards(demo, split, 1024)
        text = np.split(
            shards.take(0, len(shards)),
            np.flatnonzero(shards.take(0, len(shards)) == tg.BOS_ID)[1:],
        )
        documents[split] = {tuple(document.tolist()) for document in text}
    train, val, test = documents.values()
    assert not train & (val | test) and not val & test


def test_the_demo_corpus_is_built_once(demo, monkeypatch):
    monkeypatch.setattr(tg, "demo_documents", lambda: pytest.fail("built again"))
    before = {path: path.stat().st_mtime_ns for path in demo.glob("[!.]*")}
    tg.build_demo(demo, 1024)
    assert {path: path.stat().st_mtime_ns for path in demo.glob("[!.]*")} == before and len(
        before
    ) == 4


def test_the_demo_corpus_is_the_same_bytes_in_another_process_and_place(demo, run, tmp_path):
    code = "import pathlib, train_gpt; train_gpt.build_demo(pathlib.Path('again/deep'), 1024)"
    done = run(
        dict(PYTHONPATH=str(Path(tg.__file__).parent), PYTHONHASHSEED="12345"),
        "-c",
        code,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "again" / "deep") == contents(demo)


def test_a_build_that_was_killed_before_its_end_is_repeated(tmp_path, monkeypatch):
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"half")
    monkeypatch.setattr(tg, "demo_documents", few_documents)
    tg.build_demo(tmp_path, 512)
    assert len(Shards(tmp_path, "train", 512)) > 1000


def few_documents():
    return [
        Path(path).read_text(encoding="utf-8")
        for path in (tempfile.__file__, os.__file__, sentencepiece.__file__)
    ]


def build_beside_another(folder, ready, calls, codes):
    def documents():
        with calls.get_lock():
            calls.value += 1
        time.sleep(0.5)  # long enough for the other to come
        return few_documents()

    tg.demo_documents = documents
    ready.wait(60)
    tg.build_demo(folder, 512)
    codes.put(contents(folder))


def test_two_processes_that_build_at_the_same_time_do_not_clash(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, calls, results = context.Barrier(2), context.Value("i", 0), context.Queue()
    builders = [
        context.Process(target=build_beside_another, args=(tmp_path, ready, calls, results))
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    first, second = (results.get(timeout=60) for _ in builders)
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert calls.value == 1
    assert first == second and len(first) == 4


@pytest.mark.parametrize("vocab_size", [2, 100, 60000])
def test_a_vocabulary_that_the_demo_text_cannot_fill_is_refused(tmp_path, monkeypatch, vocab_size):
    monkeypatch.setattr(tg, "demo_documents", few_documents)
    with pytest.raises(UserError, match=f"VOCAB_SIZE={vocab_size}"):
        tg.build_demo(tmp_path, vocab_size)


def test_a_demo_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        tg.build_demo(tmp_path / "file" / "demo", 1024)


# ---- the program as a whole ----


@pytest.mark.parametrize(
    "val, env, words",
    [
        ([1, *range(5, 300), 1024], {}, ["fineweb_val_000000.bin", "1024", "VOCAB_SIZE"]),
        ([1, *range(5, 69)], {"TRAIN_SEQ_LEN": "65"}, ["TRAIN_SEQ_LEN=65", "val"]),
        (
            [1, *range(5, 300)],
            {"TOKENIZER_PATH": "nowhere.model"},
            ["TOKENIZER_PATH=nowhere.model"],
        ),
    ],
    ids=["token outside the vocabulary", "validation shorter than a sequence", "no tokenizer"],
)
def test_bad_data_ends_the_program_with_code_2_and_one_line_before_training(
    demo, run, tmp_path, val, env, words
):
    put(tmp_path, [1, *range(5, 400)])
    put(tmp_path, val, split="val")
    env = dict(
        dict(
            PRESET="demo",
            DATA_PATH=".",
            TOKENIZER_PATH=str(demo / "tokenizer.model"),
            TRAIN_SEQ_LEN="64",
            TRAIN_BATCH_TOKENS=str(64 * 65),
            MAX_WALLCLOCK_SECONDS="1",
            ITERATIONS="1",
        ),
        **env,
    )
    done = run(env, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: "), (
        done.stderr
    )
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "runs").exists()

"""Data: shards on disk, the endless token sequence, the batches of all ranks, and the demo corpus."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, cpu_world, environment, from_env
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
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


def rank_of(size, rank=0, device="cpu"):
    return SimpleNamespace(rank=rank, size=size, device=torch.device(device))


def all_tokens(folder, split, vocab_size=1024):
    shards = Shards(folder, split, vocab_size)
    return shards.take(0, len(shards))


# ---- shards ----


def test_the_script_writes_and_reads_the_format_of_the_challenge(tmp_path):
    tokens = [5, 0, 65535, 1023]
    path = tmp_path / "fineweb_train_000000.bin"
    train_gpt.write_shard(path, tokens)
    assert path.read_bytes() == shard_bytes(tokens)
    assert all_tokens(tmp_path, "train", 65536).tolist() == tokens


def test_a_damaged_shard_is_refused_and_named_even_among_good_ones(tmp_path):
    damages = {
        "empty file": b"",
        "ten bytes": b"\0" * 10,
        "header cut": shard_bytes([1, 2])[:1023],
        "cut by a byte": shard_bytes([1, 2, 3])[:-1],
        "cut by a token": shard_bytes([1, 2, 3])[:-2],
        "a byte more": shard_bytes([1, 2]) + b"\0",
        "a token more": shard_bytes([1, 2]) + b"\0\0",
        "wrong magic": shard_bytes([1, 2], magic=20240521),
        "no magic": shard_bytes([1, 2], magic=0),
        "newer version": shard_bytes([1, 2], version=2),
        "no version": shard_bytes([1, 2], version=0),
        "negative count": shard_bytes([1, 2], count=-1),
        "huge count": shard_bytes([1, 2], count=2**31 - 1),
        "no token": shard_bytes([]),
    }
    put(tmp_path, [1, 2, 3], [4, 5], [6])
    path = tmp_path / "fineweb_train_000001.bin"
    for damage in damages.values():
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: "):
            Shards(tmp_path, "train", 1024)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError) as error:
        Shards(tmp_path, "train", 1024)
    assert train_gpt.in_words(error.value) == f"{path}: Is a directory"


def test_a_folder_without_shards_is_refused_and_named(tmp_path):
    (tmp_path / "file").write_text("file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    put(tmp_path / "other", [1], split="val")
    for name in ("missing", "file", "empty", "other"):
        with pytest.raises(UserError, match=f"^DATA_PATH={tmp_path / name}: "):
            Shards(tmp_path / name, "train", 1024)


def test_a_token_outside_the_vocabulary_is_refused_where_it_is_read(tmp_path):
    put(tmp_path, [1, 2, 3], [4, 1024])
    assert Shards(tmp_path, "train", 1025).take(0, 5).tolist() == [1, 2, 3, 4, 1024]
    for vocab_size in (1024, 7):
        shards = Shards(tmp_path, "train", vocab_size)
        assert shards.take(0, 4).tolist() == [1, 2, 3, 4]
        words = rf"fineweb_train_000001\.bin.* 1024\b.*VOCAB_SIZE={vocab_size}"
        with pytest.raises(UserError, match=words):
            shards.take(0, 5)


def test_a_shard_that_shrinks_or_goes_while_it_is_used_is_refused_and_named(tmp_path):
    shards = Shards(put(tmp_path, range(9)), "train", 1024)
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(shard_bytes(range(7)))
    assert shards.take(0, 7).tolist() == list(range(7))
    with pytest.raises(UserError, match=r"fineweb_train_000000\.bin: has become shorter"):
        shards.take(0, 9)
    path.unlink()
    with pytest.raises(UserError, match=r"fineweb_train_000000\.bin"):
        shards.take(0, 1)


@settings(max_examples=60)
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
    assert all_tokens(tmp_path, "train").tolist() == [0, 2, 10]


def test_the_fingerprint_tells_lengths_and_validation_tokens_apart(tmp_path):
    val_N = torch.arange(500)

    def fingerprint(length, val_N=val_N):
        put(tmp_path, range(200), range(200, length))
        return Shards(tmp_path, "train", 1024).fingerprint(val_N)

    prints = [fingerprint(1000), fingerprint(999)]
    for place in (0, 250, 499):
        prints.append(fingerprint(1000, torch.where(val_N == place, 7, val_N)))
    prints.append(fingerprint(1000, val_N[:-1]))
    assert len(set(prints)) == len(prints) and fingerprint(1000, val_N.clone()) == prints[0]


# ---- batches ----


def plan(sequences, T=4, micro=0, **changes):
    sizes = dict(train_batch_tokens=sequences * T, train_seq_len=T, micro_batch_tokens=micro)
    return Hyperparameters(**sizes, **changes)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Three shards that hold 0, 1, 2, ... 191."""
    folder = put(tmp_path_factory.mktemp("counting"), range(50), range(50, 51), range(51, 192))
    return Shards(folder, "train", 65536)


def test_the_ranks_parts_in_order_are_the_same_global_batch_for_any_number_of_ranks(counting):
    for size in (1, 2, 4):
        for micro in (4, 8, 12, 10**6):
            for step in (0, 3, 17):
                s, batches = plan(sequences=8, micro=micro), []
                for rank in range(size):
                    batches += train_batch(counting, step, s, rank_of(size, rank))
                x, y = (torch.cat(parts) for parts in zip(*batches))
                first = torch.arange(step * 32, (step + 1) * 32).view(8, 4)
                assert torch.equal(x, first % 192) and torch.equal(y, (first + 1) % 192)
                assert x.dtype == y.dtype == torch.int64
                B = micro_batch_sequences(s, rank_of(size))
                assert {part.shape for part, _ in batches} == {(B, 4)}


def test_a_pass_over_the_data_trains_on_every_target_exactly_once(counting):
    for size in (1, 2, 4):
        targets = []
        for step in range(6):
            for rank in range(size):
                batches = train_batch(counting, step, plan(8), rank_of(size, rank))
                targets += [y.flatten() for _, y in batches]
        assert sorted(torch.cat(targets).tolist()) == list(range(192))


def test_a_shuffled_pass_holds_every_sequence_once_in_an_order_of_its_own(counting):
    def firsts(seed, size=1, steps=range(12)):
        """The first tokens of 96 sequences; there are 47 in a pass."""
        rows = []
        for step in steps:
            for rank in range(size):
                shards = Shards(counting.paths[0].parent, "train", 65536)  # as after a resume
                s = plan(8, shuffle=True, seed=seed, micro=8)
                for x, y in train_batch(shards, step, s, rank_of(size, rank)):
                    assert torch.equal(x, x[:, :1] + torch.arange(4)) and torch.equal(y, x + 1)
                    rows += x[:, 0].tolist()
        return rows

    stream = firsts(seed=1)
    first, second = stream[:47], stream[47:94]
    assert sorted(first) == sorted(second) == list(range(0, 188, 4))
    other = firsts(seed=2)[:47]
    assert len({tuple(order) for order in (first, second, other, sorted(first))}) == 4
    assert firsts(1, size=2) == firsts(1, size=4) == stream
    assert firsts(1, steps=[7]) == stream[56:64]


def test_a_training_split_shorter_than_a_sequence_is_one_that_wraps(tmp_path):
    shards = Shards(put(tmp_path, range(4)), "train", 1024)
    for shuffle in (False, True):
        batches = train_batch(shards, 0, plan(1, shuffle=shuffle), cpu_world())
        assert batches[0][1].tolist() == [[1, 2, 3, 0]]


def test_a_micro_batch_is_the_largest_equal_part_of_the_share_within_its_tokens():
    for size in (1, 2, 8):
        for share in range(1, 25):
            for micro in (4, 7, 11, 12, 16, 47, 48, 10**6):
                fitting = [B for B in range(1, share + 1) if share % B == 0 and 4 * B <= micro]
                s = plan(share * size, micro=micro)
                assert micro_batch_sequences(s, rank_of(size)) == max(fitting)
    for device, tokens in ("cpu", 4096), ("cuda", 131072):
        assert micro_batch_sequences(plan(2**20), rank_of(1, device=device)) * 4 == tokens


def test_sequences_that_do_not_divide_among_the_ranks_are_refused_with_a_size_that_would():
    for sequences, size in (7, 2), (6, 4), (2, 4), (1, 8):
        words = rf"^TRAIN_BATCH_TOKENS={4 * sequences}: .*\b{4 * size}\b"
        with pytest.raises(UserError, match=words):
            micro_batch_sequences(plan(sequences), rank_of(size))


# ---- files ----


def test_a_write_that_fails_leaves_the_earlier_file_and_no_partial_one(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    for earlier in ({}, {"file": b"earlier"}):
        for name, data in earlier.items():
            (tmp_path / name).write_bytes(data)
        for kind, name in (os, "fsync"), (Path, "replace"):
            with monkeypatch.context() as broken:
                broken.setattr(kind, name, fail)
                with pytest.raises(UserError, match=r"file: .*No space left"):
                    train_gpt.write_whole(path, b"new")
            assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == earlier


def test_a_write_is_synced_before_it_takes_its_name_and_leaves_nothing_else(tmp_path, monkeypatch):
    seen, sync, path = [], os.fsync, tmp_path / "file"
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(path.exists()), sync(number)))
    for data in (b"one", b"two"):
        train_gpt.write_whole(path, data)
        assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("file", data)]
    assert seen == [False, True]


# ---- the demo corpus ----


def contents(folder):
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in paths}


def few_documents():
    paths = (tempfile.__file__, os.__file__, sentencepiece.__file__)
    text = "\n\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
    return text.split("\n\n")


def test_the_demo_corpus_holds_three_splits_and_their_tokenizer(demo):
    shards = {f"fineweb_{split}_000000.bin" for split in ("train", "val", "test")}
    assert set(contents(demo)) == {"tokenizer.model"} | shards
    sp = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    assert sp.vocab_size() == 1024


def test_a_demo_split_is_a_row_of_documents_each_behind_a_bos_and_in_one_split_only(demo):
    documents = {}
    for split, least in dict(train=300_000, val=10_000, test=10_000).items():
        tokens = all_tokens(demo, split)
        starts = np.flatnonzero(tokens == train_gpt.BOS_ID)
        assert len(tokens) > least
        assert starts[0] == 0 and len(starts) > 10
        assert np.diff([*starts, len(tokens)]).min() > 1  # no empty document
        assert not {0, 2, 3} & set(tokens.tolist())  # neither padding, end nor unknown
        documents[split] = {tuple(text.tolist()) for text in np.split(tokens, starts[1:])}
    train, val, test = documents.values()
    assert not train & (val | test) and not val & test


def test_the_demo_corpus_is_built_once_and_may_be_another_user_s(demo, monkeypatch):
    monkeypatch.setattr(train_gpt, "demo_documents", lambda: pytest.fail("built again"))
    monkeypatch.setattr(Path, "mkdir", lambda *_: pytest.fail("written to"))
    before = {path: path.stat().st_mtime_ns for path in demo.glob("[!.]*")}
    train_gpt.build_demo(demo, 1024)
    assert {path: path.stat().st_mtime_ns for path in demo.glob("[!.]*")} == before
    assert len(before) == 4


@pytest.mark.slow
def test_the_demo_corpus_is_the_same_bytes_in_another_process_and_place(demo, tmp_path):
    code = "import pathlib, train_gpt; train_gpt.build_demo(pathlib.Path('again/deep'), 1024)"
    environ = environment(dict(PYTHONPATH=ROOT, PYTHONHASHSEED=12345))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)
    assert contents(tmp_path / "again" / "deep") == contents(demo)


def test_a_build_that_was_killed_before_its_end_is_repeated(tmp_path, monkeypatch):
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"half")
    monkeypatch.setattr(train_gpt, "demo_documents", few_documents)
    train_gpt.build_demo(tmp_path, 512)
    assert len(Shards(tmp_path, "train", 512)) > 1000 and len(contents(tmp_path)) == 4


def build_beside_another(folder, ready, results):
    train_gpt.demo_documents = few_documents
    ready.wait(60)
    train_gpt.build_demo(folder, 512)
    results.put(contents(folder))


def test_two_processes_that_build_at_the_same_time_leave_one_corpus(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(2), context.Queue()
    facts = dict(target=build_beside_another, args=(tmp_path, ready, results))
    builders = [context.Process(**facts) for _ in range(2)]
    for builder in builders:
        builder.start()
    first, second = (results.get(timeout=100) for _ in builders)
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert first == second and len(first) == 4


def test_a_vocabulary_that_the_demo_text_cannot_fill_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "demo_documents", few_documents)
    for size in (2, 100, 60000):
        with pytest.raises(UserError, match=f"^VOCAB_SIZE={size}: "):
            train_gpt.build_demo(tmp_path, size)


def test_a_demo_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "demo"
    with pytest.raises(OSError) as error:
        train_gpt.build_demo(folder, 1024)
    assert train_gpt.in_words(error.value) == f"{folder}: Not a directory"


def test_the_demo_is_cached_by_vocabulary_and_built_by_one_rank_of_a_node(monkeypatch):
    built = []
    monkeypatch.setattr(train_gpt, "build_demo", lambda *arguments: built.append(arguments))
    for size, local_rank, folder in (1024, 0, "data/demo-1024"), (512, 1, "data/demo-512"):
        world = cpu_world()
        world.local_rank = local_rank
        s = from_env(dict(DATA_PATH="demo", VOCAB_SIZE=str(size)))
        paths = dict(data_path=folder, tokenizer_path=f"{folder}/tokenizer.model")
        assert train_gpt.prepare_demo(s, world) == dataclasses.replace(s, **paths)
    assert built == [(Path("data/demo-1024"), 1024)]
    assert train_gpt.prepare_demo(Hyperparameters(), cpu_world()) == Hyperparameters()


# ---- the program as a whole ----


def test_bad_data_is_refused_before_anything_is_trained_or_written(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, [1, *range(5, 400)])
    text = [1, *range(5, 300)]
    small = dict(TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="128", ITERATIONS="1")
    cases = [
        ([*text, 1024], {}, r"fineweb_val_000000\.bin: .*1024.*VOCAB_SIZE="),
        (text[:64], {}, "^TRAIN_SEQ_LEN=64: the val split has only 64 tokens"),
        (text, dict(TOKENIZER_PATH="nowhere.model"), r"^TOKENIZER_PATH=nowhere\.model: "),
        (text, dict(VOCAB_SIZE="2000"), "^VOCAB_SIZE=2000: .*1024"),
        (text, dict(EVAL_SPLIT="test"), r"^DATA_PATH=\.: holds no fineweb_test_"),
    ]
    for tokens, changes, words in cases:
        put(tmp_path, tokens, split="val")
        own = dict(DATA_PATH=".", TOKENIZER_PATH=str(demo / "tokenizer.model"), PRESET="demo")
        s = from_env({**own, **small, **changes})
        with pytest.raises(UserError, match=words):
            train_gpt.run_train(s, cpu_world(), None)
    assert not (tmp_path / "runs").exists()

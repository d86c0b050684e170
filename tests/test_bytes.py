"""Byte counts: over a document's tokens they add up to its decoded text in UTF-8, for any tokenizer."""

import io
import os
import random

import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train_gpt import BOS_ID, UserError, load_byte_counts

SPACE = "\u2581"  # SentencePiece's mark of a space
BPE = dict(model_type="bpe", byte_fallback=True)
UNIGRAM = dict(model_type="unigram", hard_vocab_limit=False)
EXACT = dict(BPE, normalization_rule_name="identity", remove_extra_whitespaces=False)
TOKENIZERS = {
    "dummy prefix": BPE,
    "no dummy prefix": dict(BPE, add_dummy_prefix=False),
    "identity": dict(BPE, normalization_rule_name="identity"),
    "all spaces kept": EXACT,
    "all spaces kept, no dummy prefix": dict(EXACT, add_dummy_prefix=False),
    "pieces of spaces": dict(EXACT, allow_whitespace_only_pieces=True),
    "unigram, unknown tokens": UNIGRAM,
    "unigram, byte fallback": dict(UNIGRAM, byte_fallback=True),
    "space as suffix": dict(BPE, treat_whitespace_as_suffix=True),
    "own symbols": dict(BPE, user_defined_symbols=["<x>", "os"], control_symbols=["<c>"]),
    "no lone space": dict(BPE, add_dummy_prefix=False, spaces=False),
}
TEXTS = [
    "",
    " ",
    "  ",
    "x",
    " x",
    "x ",
    "The quick brown fox.",
    "two  spaces   three    four",
    " leading",
    "\nnewline first",
    "\n the\n\n",
    "<x> the<x>the",
    "a\u2581b",
    "control \x01\x7f",
    "\ufffd",
    "tab\there",
    "caf\u00e9 na\u00efve Stra\u00dfe",
    "\u65e5\u672c\u8a9e \u0442\u0435\u043a\u0441\u0442",
    "\U0001f600 smile \U0001f469\u200d\U0001f467",
    "\u0301 combining e\u0301",
    "\ufb01ne ligature",
    "nbsp\u00a0here\u3000wide",
]


def train_tokenizer(lines, vocab_size=400, spaces=True, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines if spaces else ["".join(line.split()) for line in lines]),
        model_writer=model,
        vocab_size=vocab_size,
        pad_id=0,
        bos_id=BOS_ID,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


class Tokenizer:
    """A SentencePiece model, `sp`, and the script's counts of its bytes."""

    def __init__(self, path, name=""):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.counts = load_byte_counts(path, self.sp.vocab_size(), torch.device("cpu"))
        self.name = name

    def suits(self, text):
        """With extra spaces removed and nothing normalised, a text that itself holds SentencePiece's mark is decoded
        by the whole row of marks before it; no table of pairs can follow that, and no real tokenizer is built so."""
        return self.name != "identity" or SPACE not in text

    def check(self, texts):
        """The counts over BOS, document, BOS, document, ... are the bytes of the documents as decoded."""
        documents = [self.sp.encode(text) for text in texts if self.suits(text)]
        stream = torch.tensor([token for ids in documents for token in (BOS_ID, *ids)] + [BOS_ID])
        true = sum(len(self.sp.decode(ids).encode()) for ids in documents)
        assert self.counts(stream[:-1], stream[1:]).sum() == true, (self.name, texts)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, demo):
    """The tokenizers above and the demo's, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    with open(os.__file__, encoding="utf-8") as source:
        lines = [line.strip() for line in source if line.strip()]
    for name, options in TOKENIZERS.items():
        (folder / name).write_bytes(train_tokenizer(lines, **options))
    (folder / "demo").symlink_to(demo / "tokenizer.model")
    return {name: Tokenizer(folder / name, name) for name in (*TOKENIZERS, "demo")}


# ---- the counts ----


def test_the_bytes_of_documents_are_those_of_their_decoded_texts(tokenizers):
    for tokenizer in tokenizers.values():
        for text in TEXTS:
            tokenizer.check([text])
        tokenizer.check(TEXTS * 2)


PIECES = st.sampled_from(
    [" ", "  ", "\n", "\t", "the", " the", "def ", "os", ".", "(", "<x>", "\0"]
)
STRANGE = st.sampled_from([SPACE, *"\u00e9\u65e5\U0001f600\u0301\u00a0\u200d\ufb01"])
DOCUMENT = st.one_of(st.text(max_size=20), st.lists(PIECES | STRANGE, max_size=12).map("".join))


@settings(max_examples=100)
@given(texts=st.lists(DOCUMENT, min_size=1, max_size=4))
@example(texts=[SPACE, SPACE * 3 + "a", " " + SPACE])
def test_any_documents_are_counted_exactly(tokenizers, texts):
    for tokenizer in tokenizers.values():
        tokenizer.check(texts)


def test_the_tokenizers_of_these_tests_differ_as_meant(tokenizers):
    lone = [name for name, t in tokenizers.items() if t.sp.piece_to_id(SPACE) == t.sp.unk_id()]
    assert lone == ["no lone space"]
    sps = [tokenizers[name].sp for name in ("demo", "identity", "all spaces kept")]
    assert [sp.decode(sp.encode("  a  b")) for sp in sps] == ["a b", "a b", "  a  b"]
    unigram, demo = tokenizers["unigram, unknown tokens"].sp, tokenizers["demo"].sp
    assert unigram.unk_id() in unigram.encode("\U0001f600")
    assert any(map(demo.is_byte, demo.encode("\U0001f600")))


def test_where_no_space_is_lost_the_text_s_own_bytes_are_counted(tokenizers):
    rnd = random.Random(0)
    texts = ["".join(rnd.choices("ab e\u00e9\u65e5\n .\U0001f600", k=30)) for _ in range(50)]
    for name in ("all spaces kept", "all spaces kept, no dummy prefix", "pieces of spaces"):
        sp, kept = tokenizers[name].sp, 0
        for text in texts:
            ids = torch.tensor([BOS_ID, *sp.encode(text)])
            if sp.decode(ids[1:].tolist()) == text:
                kept += 1
                assert tokenizers[name].counts(ids[:-1], ids[1:]).sum() == len(text.encode())
        assert kept > 25


def test_the_demo_s_counts_are_those_of_the_challenge_s_rule(tokenizers):
    """A piece's own bytes, and one for its leading space unless the token before is a control token."""
    sp, counts = tokenizers["demo"].sp, tokenizers["demo"].counts
    ids = torch.tensor([i for i in range(sp.vocab_size()) if i != sp.unk_id()])
    inside, start = [], []
    for i in ids.tolist():
        piece = sp.id_to_piece(i)
        own = 1 if sp.is_byte(i) else len(piece.lstrip(SPACE).encode())
        start.append(0 if sp.is_control(i) else own)
        inside.append(start[-1] + piece.startswith(SPACE))
    assert counts(torch.full_like(ids, 500), ids).tolist() == inside
    for control in (BOS_ID, 0, 2):
        assert counts(torch.full_like(ids, control), ids).tolist() == start
    assert sum(inside) - sum(start) > 100


def test_counts_are_int64_controls_weigh_nothing_and_a_byte_token_1(tokenizers):
    for tokenizer in tokenizers.values():
        sp = tokenizer.sp
        ids = torch.arange(sp.vocab_size())
        for before in (BOS_ID, sp.vocab_size() - 1):
            counts = tokenizer.counts(torch.full_like(ids, before), ids)
            assert counts.dtype == torch.int64 and counts.min() >= 0
            assert counts[[BOS_ID, 0, 2]].tolist() == [0, 0, 0]
            assert {counts[i].item() for i in ids.tolist() if sp.is_byte(i)} <= {1}


def test_a_tokenizer_of_bytes_and_two_letters_counts_too(tmp_path):
    model = train_tokenizer(["ab"] * 10, vocab_size=262, add_dummy_prefix=False, **BPE)
    (tmp_path / "t.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path / "t.model")
    for text in ("abba", "xyz", "a\u00e9"):
        ids = torch.tensor([BOS_ID, *tokenizer.sp.encode(text)])
        assert tokenizer.counts(ids[:-1], ids[1:]).sum() == len(text.encode())


# ---- what is no tokenizer, or another's ----


def test_a_missing_or_damaged_tokenizer_is_refused_and_named(demo, tmp_path):
    path = tmp_path / "t.model"
    named = r"^TOKENIZER_PATH=.*t\.model: "
    with pytest.raises(UserError, match=named):
        load_byte_counts(path, 1024, torch.device("cpu"))
    good = (demo / "tokenizer.model").read_bytes()
    damaged = [b"", b"no model", good[: len(good) // 2], good[:-1], b"\0" * 1000, good[1000:]]
    for model in damaged:
        path.write_bytes(model)
        with pytest.raises(UserError, match=named):
            load_byte_counts(path, 1024, torch.device("cpu"))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=named):
        load_byte_counts(path, 1024, torch.device("cpu"))


def test_a_tokenizer_of_another_vocabulary_size_is_refused_with_both_sizes(demo):
    for size in (1023, 1025, 2, 65536):
        with pytest.raises(UserError, match=rf"^VOCAB_SIZE={size}: .*\b1024\b"):
            load_byte_counts(demo / "tokenizer.model", size, torch.device("cpu"))

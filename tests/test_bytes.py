"""Byte counts: the sum over a document's tokens is the length of its decoded text in UTF-8, for any tokenizer."""

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
EXACT = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
TOKENIZERS = {
    "dummy prefix": BPE,
    "no dummy prefix": dict(BPE, add_dummy_prefix=False),
    "identity": dict(BPE, normalization_rule_name="identity"),
    "all spaces kept": dict(BPE, **EXACT),
    "all spaces kept, no dummy prefix": dict(BPE, **EXACT, add_dummy_prefix=False),
    "pieces of spaces": dict(BPE, **EXACT, allow_whitespace_only_pieces=True),
    "unigram, unknown tokens": dict(model_type="unigram", hard_vocab_limit=False),
    "unigram, byte fallback": dict(
        model_type="unigram", byte_fallback=True, hard_vocab_limit=False
    ),
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
# With extra spaces removed and nothing normalised, a text that itself holds SentencePiece's mark is decoded by the
# whole row of marks before it; no table of pairs can follow that, and no real tokenizer is built so.
FOLLOWS_ROWS = {"identity"}


def train_tokenizer(spaces=True, vocab_size=400, **options):
    with open(os.__file__, encoding="utf-8") as source:
        lines = [line.strip() for line in source if line.strip()]
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
    """A SentencePiece model, `sp`, and the script's table of its bytes."""

    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.table = load_byte_counts(path, self.sp.vocab_size(), torch.device("cpu"))

    def counted_and_true(self, texts):
        """Bytes by the table over BOS, document, BOS, document, ..., and the bytes of the documents as decoded."""
        documents = [self.sp.encode(text) for text in texts]
        stream = torch.tensor([token for ids in documents for token in (BOS_ID, *ids)] + [BOS_ID])
        true = sum(len(self.sp.decode(ids).encode()) for ids in documents)
        return int(self.table(stream[:-1], stream[1:]).sum()), true


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, demo):
    """The tokenizers above and the demo's, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, options in TOKENIZERS.items():
        (folder / name).write_bytes(train_tokenizer(**options))
    return {name: Tokenizer(folder / name) for name in TOKENIZERS} | {
        "demo": Tokenizer(demo / "tokenizer.model")
    }


def suits(name, text):
    return name not in FOLLOWS_ROWS or SPACE not in text


@pytest.mark.parametrize("name", [*TOKENIZERS, "demo"])
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_the_bytes_of_a_document_are_those_of_its_decoded_text(tokenizers, name, text):
    if suits(name, text):
        counted, true = tokenizers[name].counted_and_true([text])
        assert counted == true


@pytest.mark.parametrize("name", [*TOKENIZERS, "demo"])
def test_the_bytes_of_a_row_of_documents_are_the_sum_of_theirs(tokenizers, name):
    counted, true = tokenizers[name].counted_and_true(
        [text for text in TEXTS if suits(name, text)] * 2
    )
    assert counted == true > 100


PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\t",
        "the",
        " the",
        "def ",
        "os",
        ".",
        "(",
        SPACE,
        "<x>",
        "\u00e9",
        "\u65e5",
        "\U0001f600",
        "\u0301",
        "\u00a0",
        "\u200d",
        "\ufb01",
        "\0",
    ]
)
DOCUMENT = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=12).map("".join))


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(DOCUMENT, min_size=1, max_size=4))
@example(texts=[SPACE, SPACE * 3 + "a", " " + SPACE])
def test_any_documents_are_counted_exactly(tokenizers, texts):
    for name, tokenizer in tokenizers.items():
        counted, true = tokenizer.counted_and_true([text for text in texts if suits(name, text)])
        assert counted == true, name


def test_the_tokenizers_of_these_tests_differ_as_meant(tokenizers):
    def has_lone_space(name):
        sp = tokenizers[name].sp
        return sp.piece_to_id(SPACE) != sp.unk_id()

    assert [name for name in tokenizers if not has_lone_space(name)] == ["no lone space"]
    sps = [tokenizers[name].sp for name in ("demo", "identity", "all spaces kept")]
    decoded = [sp.decode(sp.encode("  a  b")) for sp in sps]
    assert decoded == ["a b", "a b", "  a  b"]
    unigram, demo = tokenizers["unigram, unknown tokens"].sp, tokenizers["demo"].sp
    assert unigram.unk_id() in unigram.encode("\U0001f600")
    assert any(map(demo.is_byte, demo.encode("\U0001f600")))


def test_identity_without_lost_spaces_counts_the_text_s_own_bytes(tokenizers):
    rnd = random.Random(0)
    texts = ["".join(rnd.choices("ab e\u00e9\u65e5\n .\U0001f600", k=30)) for _ in range(50)]
    for name in ("all spaces kept", "all spaces kept, no dummy prefix", "pieces of spaces"):
        sp = tokenizers[name].sp
        texts_kept = [text for text in texts if sp.decode(sp.encode(text)) == text]
        assert len(texts_kept) > 25
        assert tokenizers[name].counted_and_true(texts_kept)[0] == sum(
            len(text.encode()) for text in texts_kept
        )


@pytest.mark.parametrize("name", [*TOKENIZERS, "demo"])
def test_counts_are_int64_controls_weigh_nothing_and_every_byte_token_1(tokenizers, name):
    sp, table = tokenizers[name].sp, tokenizers[name].table
    ids = torch.arange(sp.vocab_size())
    for before in (torch.full_like(ids, BOS_ID), torch.full_like(ids, sp.vocab_size() - 1)):
        counts = table(before, ids)
        assert counts.dtype == torch.int64 and int(counts.min()) >= 0
        assert counts[[BOS_ID, 0, 2]].tolist() == [0, 0, 0]
        assert {counts[i].item() for i in range(sp.vocab_size()) if sp.is_byte(i)} <= {1}


def test_a_leading_space_counts_inside_a_document_and_not_at_its_start(tokenizers):
    sp, table = tokenizers["dummy prefix"].sp, tokenizers["dummy prefix"].table
    token = sp.piece_to_id(SPACE + "the")
    assert token != sp.unk_id()
    inside, start = table(
        torch.tensor([sp.vocab_size() - 1, BOS_ID]), torch.tensor([token, token])
    ).tolist()
    assert (inside, start) == (4, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no model",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"\0" * 1000,
        lambda data: data[1000:],
    ],
    ids=["empty", "text", "half", "cut by a byte", "zeros", "beginning lost"],
)
def test_a_corrupt_tokenizer_is_refused_and_named(demo, tmp_path, damage):
    path = tmp_path / "t.model"
    path.write_bytes(damage((demo / "tokenizer.model").read_bytes()))
    with pytest.raises(UserError, match=r"t\.model"):
        load_byte_counts(path, 1024, torch.device("cpu"))


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "a folder"]
)
def test_a_missing_tokenizer_is_refused_and_named(tmp_path, make):
    make(tmp_path / "t.model")
    with pytest.raises(UserError, match=r"^TOKENIZER_PATH=.*t\.model: "):
        load_byte_counts(tmp_path / "t.model", 1024, torch.device("cpu"))


@pytest.mark.parametrize("vocab_size", [1023, 1025, 2, 65536])
def test_a_tokenizer_of_another_vocabulary_size_is_refused_with_both_sizes(demo, vocab_size):
    with pytest.raises(UserError, match=rf"VOCAB_SIZE={vocab_size}: .*\b1024\b"):
        load_byte_counts(demo / "tokenizer.model", vocab_size, torch.device("cpu"))


def test_a_tokenizer_of_bytes_and_two_letters_counts_too(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab"] * 10),
        model_writer=model,
        vocab_size=262,
        pad_id=0,
        bos_id=BOS_ID,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
        **BPE,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path / "t.model")
    for texts in (["abba"], ["xyz", "", "a\u00e9"]):
        assert tokenizer.counted_and_true(texts) == (sum(len(text.encode()) for text in texts),) * 2

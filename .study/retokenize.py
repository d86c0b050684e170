"""The study's data: `python retokenize.py WIKI DEST`, once, from the folder of 1,024-token shards and their tokenizer.

DEST/v1024  the training shards as they are, and the first 524,289 validation tokens
DEST/v4096  the same text, training and validation, in a BPE of 4,096 tokens learned on the start of the training text
DEST/v8192  and in one of 8,192

Bits per byte compare across them, since all score the same text.
"""

import io
import sys
from pathlib import Path

import numpy as np
import sentencepiece

VAL_TOKENS = 524_289  # of 1,024; their last 524,288 are the targets
HEADER = 256  # int32: magic, version, count, zeros
BOS = 1


def read(path):
    return np.fromfile(path, dtype="<u2", offset=4 * HEADER)


def write(path, tokens):
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def documents(tokens, processor):
    """The text of every document, in order; each begins with BOS."""
    for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:]):
        yield processor.decode(part[1:].tolist())


def train_tokenizer(texts, vocab_size):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=BOS,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=1,
        max_sentence_length=1 << 20,
    )
    return model.getvalue()


def main(wiki, dest):
    tokenizer = (wiki.parent / "fineweb_1024_bpe.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    train = read(wiki / "fineweb_train_000000.bin")
    val = read(wiki / "fineweb_val_000000.bin")[:VAL_TOKENS]

    (dest / "v1024").mkdir(parents=True)
    write(dest / "v1024/fineweb_train_000000.bin", train)
    write(dest / "v1024/fineweb_val_000000.bin", val)
    (dest / "v1024/tokenizer.model").write_bytes(tokenizer)

    texts, val_texts = list(documents(train, processor)), list(documents(val, processor))
    for size in (4096, 8192):
        folder = dest / f"v{size}"
        folder.mkdir()
        tokenizer = train_tokenizer(texts[:600], size)
        larger = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        for split, parts in (("train", texts), ("val", val_texts)):
            encoded = larger.encode(parts, add_bos=True)
            write(folder / f"fineweb_{split}_000000.bin", np.concatenate(encoded))
        (folder / "tokenizer.model").write_bytes(tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

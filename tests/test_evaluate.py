"""Evaluation against a loop over windows by the rule in words: window k starts at token k s and scores what is new."""

import contextlib
import math

import pytest
import torch
from conftest import random_tokens, small
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from train_gpt import GPT, HEADS, Interrupted, UserError, World, evaluate, windows

VOCAB = 30


def settings(**changes):
    return small(**{**dict(vocab_size=VOCAB, num_layers=2, ve_layers="1", model_dim=16), **changes})


def random_model(head="tied"):
    torch.manual_seed(0)
    model = GPT(settings(head_type=head)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


MODEL = random_model()


class Rank(World):
    """One of several ranks that run one after another; the last to call `sum` gets the whole."""

    def __init__(self, rank, size, total):
        super().__init__({})
        self.rank, self.size, self.total, self.device = rank, size, total, torch.device("cpu")

    def sum(self, tensor):
        self.total += tensor
        return tensor.copy_(self.total)


def evaluate_over_ranks(model, validation, stride, s, size):
    total = torch.zeros(3, dtype=torch.float64)
    for rank in range(size - 1):
        with contextlib.suppress(UserError):  # only the last rank's totals are all
            evaluate(model, validation, stride, s, Rank(rank, size, total))
    return evaluate(model, validation, stride, s, Rank(size - 1, size, total))


def byte_counts(before, token):
    return 1 + (3 * before + token) % 7


def by_the_rule(model, tokens, stride, T):
    """Mean nats and bits per byte, window by window, each sequence at its own length."""
    last, scored, start, nats, size = len(tokens) - 1, 0, 0, 0.0, 0
    while scored < last:
        end = min(start + T, last)
        losses = model.nll(tokens[None, start:end], tokens[None, start + 1 : end + 1])[0].tolist()
        for target, loss in zip(range(start + 1, end + 1), losses):
            if target > scored:
                nats += loss
                size += int(byte_counts(tokens[target - 1], tokens[target]))
        scored, start = end, start + stride
    return nats / last, nats / math.log(2) / size


@budget(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    length=st.integers(2, 70),
    T=st.integers(1, 24),
    val_batch=st.integers(1, 150),
    size=st.integers(1, 4),
)
def test_evaluation_follows_the_window_rule(data, length, T, val_batch, size):
    stride = data.draw(st.integers(1, T), label="stride")
    s = settings(train_seq_len=T, val_batch_size=val_batch)
    tokens = random_tokens(length, VOCAB, seed=length)
    found = evaluate_over_ranks(MODEL, (tokens, byte_counts), stride, s, size)
    with torch.no_grad():
        assert found == pytest.approx(by_the_rule(MODEL, tokens, stride, T), rel=1e-9)


class Weighing:
    """A model whose loss is the target's own weight: one left out or counted twice shows in the sum."""

    def __init__(self, weight):
        self.weight = weight

    def nll(self, x, y, last):
        losses = torch.where(y == x + 1, self.weight[y], 1e9)  # tokens count up; padding does not
        return losses[:, -last:]


@budget(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), length=st.integers(2, 200), T=st.integers(1, 32), size=st.integers(1, 5))
@example(data=None, length=33, T=32, size=2)
def test_every_target_is_scored_exactly_once(data, length, T, size):
    stride = data.draw(st.integers(1, T), label="stride") if data else T
    weight = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def as_many_bytes(before, token):
        return torch.where(token == before + 1, token**2, 10**9)

    s = settings(train_seq_len=T, val_batch_size=4 * T)
    validation = torch.arange(length), as_many_bytes
    loss, bpb = evaluate_over_ranks(Weighing(weight), validation, stride, s, size)
    nats, text_bytes = weight[1:].sum().item(), sum(token**2 for token in range(length))
    assert loss == pytest.approx(nats / (length - 1), rel=1e-12)
    assert bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-12)


def test_every_head_evaluates_as_it_trains_and_float32_agrees():
    tokens, s = random_tokens(150, VOCAB), settings(val_batch_size=72)
    for head in HEADS:
        model = random_model(head)
        with torch.no_grad():
            expected = by_the_rule(model, tokens, 7, 24)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
            model.to(dtype)
            for size in (1, 3):
                found = evaluate_over_ranks(model, (tokens, byte_counts), 7, s, size)
                assert found == pytest.approx(expected, rel=tolerance), (head, dtype, size)


def test_context_reaches_before_the_scored_targets():
    """With stride 1 every target but the first T has T tokens of context, so the figures must differ."""
    validation = random_tokens(80, VOCAB), byte_counts
    plain, sliding = (
        evaluate_over_ranks(MODEL, validation, stride, settings(), 1)[0] for stride in (24, 1)
    )
    assert abs(plain - sliding) > 1e-4


def test_ranks_share_the_fewest_batches_evenly_in_one_shape_within_the_batch_size():
    T, total = 8, torch.zeros(3)
    for length, stride, val_batch in [(12, 4, 64), (17, 8, 8), (74, 3, 40), (401, 8, 999)]:
        for size in (1, 2, 3, 7):
            s = settings(train_seq_len=T, val_batch_size=val_batch)
            counts, scored, shapes = [], 0, set()
            for rank in range(size):
                batches = list(windows(torch.arange(length), stride, s, Rank(rank, size, total)))
                counts.append(len(batches))
                for x, y, exists, last in batches:
                    shapes |= {x.shape, y.shape, exists.shape}
                    scored += int(exists[:, -last:].sum())
            B = max(1, val_batch // size // T)
            assert shapes == {(B, T)} and scored == length - 1 and max(counts) - min(counts) <= 1

            # the first window scores T targets, each of the others `stride`
            others = max(0, math.ceil((length - 1 - T) / stride))
            needed = 1 + math.ceil(others / B) if stride < T else math.ceil((1 + others) / B)
            assert sum(counts) == needed, (length, stride, val_batch, size)


def test_a_signal_stops_an_evaluation():
    world = Rank(0, 1, torch.zeros(3))
    world.signal = 15
    with pytest.raises(Interrupted):
        evaluate(MODEL, (random_tokens(80, VOCAB), byte_counts), 24, settings(), world)

"""Evaluation against a loop over windows by the rule in words: window k starts at token k s and scores what is new."""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from train_gpt import GPT, HEADS, Hyperparameters, World, evaluate

VOCAB = 30
SMALL = dict(
    vocab_size=VOCAB,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    bigram_vocab_size=20,
    bigram_dim=8,
    ve_dim=8,
    ve_layers="1",
    xsa_last_n=1,
    train_seq_len=24,
    train_batch_tokens=240,
    head_rank=3,
    head_dim=5,
    compile="0",
    compute_dtype="fp32",
)


def small(**changes):
    return dataclasses.replace(Hyperparameters(), **{**SMALL, **changes})


def random_model(head="tied", **changes):
    torch.manual_seed(0)
    model = GPT(small(head_type=head, **changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


MODEL = random_model()


class Rank(World):
    """One of several ranks that run one after another; the last to call `sum` gets the whole."""

    def __init__(self, rank, size, total):
        super().__init__()
        self.rank, self.size, self.total, self.device = rank, size, total, torch.device("cpu")

    def sum(self, tensor):
        self.total += tensor
        return tensor.copy_(self.total)


def evaluate_over_ranks(model, tokens, byte_counts, stride, s, size):
    total = torch.zeros(3, dtype=torch.float64)
    for rank in range(size - 1):
        with contextlib.suppress(
            ZeroDivisionError
        ):  # only the last rank sees all: totals may still be empty here
            evaluate(model, tokens, byte_counts, stride, s, Rank(rank, size, total))
    return evaluate(model, tokens, byte_counts, stride, s, Rank(size - 1, size, total))


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
                nats, size = (
                    nats + loss,
                    size + int(byte_counts(tokens[target - 1], tokens[target])),
                )
        scored, start = end, start + (stride or T)
    return nats / last, nats / math.log(2) / size


@budget(max_examples=120, deadline=None, derandomize=True)
@given(
    data=st.data(),
    length=st.integers(2, 90),
    T=st.integers(1, 24),
    val_batch=st.integers(1, 150),
    micro=st.integers(0, 90),
    size=st.integers(1, 4),
)
def test_evaluation_follows_the_window_rule(data, length, T, val_batch, micro, size):
    stride = data.draw(st.integers(0, T), label="stride")
    s = small(train_seq_len=T, val_batch_size=val_batch, micro_batch_tokens=micro)
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    found = evaluate_over_ranks(MODEL, tokens, byte_counts, stride, s, size)
    with torch.no_grad():
        assert found == pytest.approx(by_the_rule(MODEL, tokens, stride, T), rel=1e-9)


@budget(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), length=st.integers(2, 200), T=st.integers(1, 32), size=st.integers(1, 5))
@example(data=None, length=33, T=32, size=2)
def test_every_target_is_scored_exactly_once(data, length, T, size):
    stride = data.draw(st.integers(0, T), label="stride") if data else 0
    weight = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Weighing:
        """Each target has a weight of its own as its loss: one left out or counted twice shows in the sum."""

        def nll(self, x, y, last=None):
            scored = slice(-(last or y.size(1)), None)
            return torch.where(y == x + 1, weight[y], 1e9)[
                :, scored
            ]  # tokens count upward; padding does not

    def as_many_bytes(before, token):
        return torch.where(token == before + 1, token**2, 10**9)

    s = small(train_seq_len=T, val_batch_size=4 * T)
    loss, bpb = evaluate_over_ranks(
        Weighing(), torch.arange(length), as_many_bytes, stride, s, size
    )
    nats, text_bytes = weight[1:].sum().item(), sum(token**2 for token in range(length))
    assert loss == pytest.approx(nats / (length - 1), rel=1e-12)
    assert bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_evaluates_as_it_trains(head):
    model = random_model(head)
    tokens = torch.randint(VOCAB, (70,), generator=torch.Generator().manual_seed(0))
    s = small(val_batch_size=72)
    expected = by_the_rule(model, tokens, 7, 24)
    assert evaluate_over_ranks(model, tokens, byte_counts, 7, s, 2) == pytest.approx(
        expected, rel=1e-9
    )


def test_float32_and_ranks_agree_with_float64():
    exact, tokens = (
        random_model(),
        torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(0)),
    )
    expected = by_the_rule(exact, tokens, 5, 24)
    coarse = random_model().float()
    for size in (1, 3):
        assert evaluate_over_ranks(coarse, tokens, byte_counts, 5, small(), size) == pytest.approx(
            expected, rel=1e-6
        )


def test_context_reaches_before_the_scored_targets():
    """With stride 1 every target but the first T - 1 has T tokens of context, so the figures must differ."""
    tokens = torch.randint(VOCAB, (80,), generator=torch.Generator().manual_seed(1))
    plain, sliding = (
        evaluate_over_ranks(MODEL, tokens, byte_counts, stride, small(), 1)[0] for stride in (0, 1)
    )
    assert abs(plain - sliding) > 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "length, stride, val_batch", [(7, 4, 64), (17, 8, 8), (74, 3, 40), (401, 8, 999)]
)
def test_ranks_share_the_windows_evenly_and_within_the_batch_size(length, stride, val_batch, size):
    T = 8
    s, work = small(train_seq_len=T, val_batch_size=val_batch), []

    class Counting:
        def nll(self, x, y, last=None):
            assert len(x) <= max(1, val_batch // size // T)
            return torch.ones(y.shape)[:, -(last or T) :]

    for rank in range(size):
        total = torch.ones(3, dtype=torch.float64)
        evaluate(
            Counting(),
            torch.arange(length),
            lambda before, _: before,
            stride,
            s,
            Rank(rank, size, total),
        )
        work.append((total[0].item() - 1) / stride)  # in windows, as every loss is 1
    assert (
        sum(work) == pytest.approx((length - 1) / stride)
        and max(work) - min(work) <= 2 + T / stride
    )

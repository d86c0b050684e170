"""The schedule: learning-rate scale, momentum, average, late QAT and the end of a run, as numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    Hyperparameters,
    average_decay,
    is_over,
    learning_rate_scale,
    momentum_at,
    share_done,
)

COUNTS, SECONDS, SHARES = st.integers(1, 10**6), st.floats(0.001, 1e5), st.floats(0.01, 1)


def plan(iterations=10**9, iters=0, frac=1.0, cap=0.0):
    return Hyperparameters(
        iterations=iterations, warmdown_iters=iters, warmdown_frac=frac, max_wallclock_seconds=cap
    )


def warmup(steps, start=0.85, end=0.95):
    return Hyperparameters(
        muon_momentum=end, muon_momentum_warmup_start=start, muon_momentum_warmup_steps=steps
    )


# ---- the scale of the learning rates ----


def test_without_a_cap_the_rate_falls_linearly_over_the_last_steps_and_at_most_their_share():
    s = plan(iterations=100, iters=20)
    for step, scale in {0: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0, 150: 0}.items():
        assert learning_rate_scale(step, 0.0, s) == pytest.approx(scale)
    assert [learning_rate_scale(step, 0.0, plan(iterations=100)) for step in (0, 99)] == [1, 1]
    s = plan(iterations=100, iters=1000, frac=0.5)
    for step, scale in {0: 1, 50: 1, 60: 0.8, 75: 0.5, 100: 0}.items():
        assert learning_rate_scale(step, 0.0, s) == pytest.approx(scale)


def test_under_a_cap_the_warmdown_lasts_its_steps_at_the_mean_speed_but_at_most_its_share():
    cases = [
        (0, 0.0, 1),  # nothing known of the speed yet
        (10, 10.0, 1),  # 1 s a step: the last 20 s
        (80, 80.0, 1),
        (90, 90.0, 0.5),
        (100, 100.0, 0),
        (360, 90.0, 1),  # 0.25 s a step: the last 5 s
        (388, 97.0, 0.6),
        (2, 20.0, 1),  # 10 s a step: 20 steps would be 200 s, the share allows 80
        (4, 40.0, 0.75),
        (8, 80.0, 0.25),
        (10, 105.0, 0),  # the last step ended behind the cap
    ]
    for step, seconds, scale in cases:
        s = plan(iters=20, frac=0.8, cap=100.0)
        assert learning_rate_scale(step, seconds, s) == pytest.approx(scale), (step, seconds)


def test_a_run_that_reaches_its_last_step_before_the_cap_warms_down_to_that_step():
    s = plan(iterations=100, iters=20, cap=600.0)
    scales = [learning_rate_scale(step, 0.01 * step, s) for step in (80, 90, 100)]
    assert scales == pytest.approx([1, 0.5, 0])


@given(COUNTS, COUNTS, SHARES, SECONDS, st.floats(0, 2))
def test_under_a_cap_the_rate_is_the_time_left_over_the_warmdown_s_length(
    step, iters, frac, cap, elapsed
):
    seconds = cap * elapsed
    length = min(iters * seconds / step, frac * cap)
    expected = min(1.0, max(cap - seconds, 0.0) / length) if length else 1.0
    scale = learning_rate_scale(step, seconds, plan(10**12, iters, frac, cap))
    assert scale == pytest.approx(expected)
    if elapsed >= 1:
        assert scale == 0


@settings(max_examples=50)
@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.floats(0, 1),
    st.sampled_from([0.0, 50.0]),
    st.floats(0.01, 2),
)
def test_at_any_steady_speed_the_rate_starts_at_1_never_rises_and_ends_at_0(
    iterations, iters, frac, cap, pace
):
    s = plan(iterations, iters, frac, cap)
    end = iterations if not cap else min(iterations, int(cap / pace))
    rates = [learning_rate_scale(step, step * pace, s) for step in range(end)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(later <= rate + 1e-9 for rate, later in zip(rates, rates[1:]))
    assert not rates or rates[0] == 1
    if iters and frac and iterations:
        assert learning_rate_scale(iterations, 0.0, s) == 0


@given(COUNTS, SECONDS, SECONDS)
def test_without_a_cap_time_changes_nothing(step, seconds, more):
    s = plan(1000, 300, 0.5)
    assert learning_rate_scale(step, seconds, s) == learning_rate_scale(step, seconds + more, s)
    assert share_done(step, seconds, s) == share_done(step, seconds + more, s)


# ---- momentum, average, late QAT, the end ----


def test_the_momentum_goes_linearly_from_its_start_to_its_end():
    for step, mu in {0: 0.85, 25: 0.875, 50: 0.9, 99: 0.949, 100: 0.95, 10**9: 0.95}.items():
        assert momentum_at(step, warmup(100)) == pytest.approx(mu, abs=1e-12)
    assert [momentum_at(step, warmup(0)) for step in (0, 1)] == [0.95, 0.95]


@given(COUNTS, COUNTS, COUNTS, st.floats(0, 0.99), st.floats(0, 0.99))
def test_the_momentum_is_monotone_between_its_ends_and_exact_at_both(step, more, steps, start, end):
    s, (low, high) = warmup(steps, start, end), sorted((start, end))
    first, later = momentum_at(step, s), momentum_at(step + more, s)
    assert low - 1e-12 <= first <= high + 1e-12
    assert (later - first) * (end - start) >= -1e-12
    assert (momentum_at(0, s), momentum_at(steps, s)) == (start, end)


def test_the_average_s_decay_grows_from_a_tenth_to_ema_alpha():
    decays = [
        average_decay(step, Hyperparameters(ema_alpha=0.9)) for step in (0, 1, 8, 79, 80, 10**6)
    ]
    assert decays == pytest.approx([0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9])


def test_the_share_of_a_run_is_that_of_its_steps_or_of_its_time_where_that_is_capped():
    cases = [
        (10, 0.0, 0, 0.0, 0),
        (10, 0.0, 9, 1e9, 0.9),
        (10, 60.0, 0, 0.0, 0),
        (10, 60.0, 5, 59.0, 59 / 60),
        (10, 60.0, 9, 30.0, 0.9),
        (10, 60.0, 10, 1.0, 1),
        (0, 0.0, 0, 0.0, 1),
        (0, 60.0, 0, 0.0, 1),
    ]
    for iterations, cap, step, seconds, share in cases:
        got = share_done(step, seconds, plan(iterations, cap=cap))
        assert got == pytest.approx(share), (iterations, cap, step, seconds)


def test_a_run_ends_with_its_steps_or_where_the_cap_is_nearer_than_after_another_step():
    cases = [
        (10, 0.0, 0, 0.0, 0, False),
        (10, 0.0, 9, 1e9, 1, False),
        (10, 0.0, 10, 0.0, 0, True),
        (0, 0.0, 0, 0.0, 0, True),
        (0, 60.0, 0, 0.0, 0, True),
        (100, 60.0, 0, 0.0, 0, False),
        (100, 60.0, 5, 50.0, 0, False),  # the next step would end at 60
        (100, 60.0, 5, 54.0, 0, False),  # at 64.8: nearer than 54
        (100, 60.0, 5, 55.0, 0, True),  # at 66
        (100, 60.0, 5, 61.0, 0, True),
        (100, 60.0, 100, 1.0, 0, True),
        (100, 60.0, 5, 40.0, 1, False),  # a step of 8 is on its way: 48, then 56
        (100, 60.0, 5, 50.0, 1, True),  # 60, then 70
    ]
    for iterations, cap, step, seconds, ahead, over in cases:
        got = is_over(step, seconds, ahead, plan(iterations, cap=cap))
        assert bool(got) is over, (iterations, cap, step, seconds, ahead)


@given(st.integers(0, 100), st.sampled_from([0.1, 0.45, 0.55, 0.9]), SECONDS)
def test_at_a_steady_speed_a_run_ends_within_half_a_step_of_its_cap(whole, part, pace):
    s, step = plan(cap=(whole + part) * pace), 0
    while not is_over(step, step * pace, 0, s):
        step += 1
    assert step == max(1, round(whole + part))

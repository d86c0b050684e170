"""The schedule: learning-rate scale, momentum and the end of a run, as numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import Hyperparameters, learning_rate_scale, momentum_at, progress


def plan(iterations=10**9, iters=0, frac=1.0, cap=0.0):
    return Hyperparameters(
        iterations=iterations, warmdown_iters=iters, warmdown_frac=frac, max_wallclock_seconds=cap
    )


@pytest.mark.parametrize(
    "step, expected",
    [(0, 1), (50, 1), (80, 1), (81, 0.95), (90, 0.5), (99, 0.05), (100, 0), (150, 0)],
)
def test_without_a_cap_the_rate_falls_linearly_over_the_last_warmdown_steps(step, expected):
    assert learning_rate_scale(step, 0.0, plan(iterations=100, iters=20)) == pytest.approx(expected)


@pytest.mark.parametrize("step, expected", [(0, 1), (50, 1), (60, 0.8), (75, 0.5), (100, 0)])
def test_without_a_cap_the_warmdown_takes_at_most_its_share_of_the_steps(step, expected):
    assert learning_rate_scale(
        step, 0.0, plan(iterations=100, iters=1000, frac=0.5)
    ) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, seconds, expected",
    [
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
    ],
)
def test_under_a_cap_the_warmdown_lasts_its_steps_at_the_mean_speed_but_at_most_its_share(
    step, seconds, expected
):
    assert learning_rate_scale(step, seconds, plan(iters=20, frac=0.8, cap=100.0)) == pytest.approx(
        expected
    )


def test_a_run_that_reaches_its_last_step_before_the_cap_warms_down_to_that_step():
    s = plan(iterations=100, iters=20, frac=1.0, cap=600.0)
    assert [learning_rate_scale(step, 0.01 * step, s) for step in (80, 90, 100)] == pytest.approx(
        [1, 0.5, 0]
    )


def test_no_warmdown_keeps_the_rate_until_the_last_step():
    assert [learning_rate_scale(step, 0.0, plan(iterations=100)) for step in (0, 99)] == [1, 1]
    assert learning_rate_scale(99, 99.0, plan(iterations=10**6, cap=100.0)) == 1


COUNTS, SECONDS = st.integers(1, 10**6), st.floats(0.001, 1e5)
SHARES = st.floats(0.01, 1)


@given(COUNTS, COUNTS, SHARES, SECONDS, st.floats(0, 2))
def test_under_a_cap_the_rate_is_the_time_left_over_the_warmdown_s_length(
    step, iters, frac, cap, elapsed
):
    seconds = cap * elapsed
    length = min(iters * seconds / step, frac * cap)
    expected = min(1.0, max(cap - seconds, 0.0) / length) if length else 1.0
    assert learning_rate_scale(step, seconds, plan(10**12, iters, frac, cap)) == pytest.approx(
        expected
    )


@given(COUNTS, COUNTS, SHARES, SECONDS, st.floats(1, 3))
def test_the_rate_is_0_at_the_cap_and_behind_it(step, iters, frac, cap, elapsed):
    assert learning_rate_scale(step, cap * elapsed, plan(10**12, iters, frac, cap)) == 0


@given(COUNTS, COUNTS, SHARES, SECONDS, st.integers(0, 10**6))
def test_the_rate_is_0_at_the_last_step_and_behind_it(iterations, iters, frac, cap, more):
    for s in (plan(iterations, iters, frac), plan(iterations, iters, frac, cap)):
        assert learning_rate_scale(iterations + more, cap / 2, s) == 0


@given(
    st.integers(0, 300),
    st.integers(0, 300),
    st.floats(0, 1),
    st.sampled_from([0.0, 50.0]),
    st.floats(0.01, 2),
)
def test_at_any_steady_speed_the_rate_starts_at_1_and_never_rises(
    iterations, iters, frac, cap, pace
):
    s = plan(iterations, iters, frac, cap)
    end = iterations if not cap else min(iterations, int(cap / pace))
    rates = [learning_rate_scale(step, step * pace, s) for step in range(end)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(later <= rate + 1e-9 for rate, later in zip(rates, rates[1:], strict=False))
    assert not rates or rates[0] == 1


@given(COUNTS, SECONDS, SECONDS)
def test_without_a_cap_time_changes_nothing(step, seconds, more):
    s = plan(1000, 300, 0.5)
    assert learning_rate_scale(step, seconds, s) == learning_rate_scale(step, seconds + more, s)


def warmup(steps, start=0.85, end=0.95):
    return Hyperparameters(
        muon_momentum=end, muon_momentum_warmup_start=start, muon_momentum_warmup_steps=steps
    )


@pytest.mark.parametrize(
    "step, expected", [(0, 0.85), (25, 0.875), (50, 0.9), (99, 0.949), (100, 0.95), (10**9, 0.95)]
)
def test_the_momentum_goes_linearly_from_its_start_to_its_end(step, expected):
    assert momentum_at(step, warmup(100)) == pytest.approx(expected, abs=1e-12)


def test_without_a_warmup_the_momentum_is_its_end_at_once():
    assert [momentum_at(step, warmup(0)) for step in (0, 1)] == [0.95, 0.95]


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_the_momentum_is_monotone_between_its_ends_and_exact_at_both(step, more, steps, start, end):
    s, (low, high) = warmup(steps, start, end), sorted((start, end))
    first, later = momentum_at(step, s), momentum_at(step + more, s)
    assert low - 1e-12 <= first <= high + 1e-12
    assert (later - first) * (end - start) >= -1e-12
    assert momentum_at(0, s) == (start if steps else end)
    assert momentum_at(steps, s) == end


@pytest.mark.parametrize(
    "iterations, cap, step, seconds, expected",
    [
        (10, 0.0, 0, 0.0, False),
        (10, 0.0, 9, 1e9, False),
        (10, 0.0, 10, 0.0, True),
        (10, 0.0, 11, 0.0, True),
        (0, 0.0, 0, 0.0, True),
        (0, 60.0, 0, 0.0, True),
        (10, 60.0, 0, 0.0, False),
        (10, 60.0, 5, 59.999, False),
        (10, 60.0, 5, 60.0, True),
        (10, 60.0, 5, 61.0, True),
        (10, 60.0, 10, 1.0, True),
    ],
)
def test_a_run_ends_with_its_steps_or_with_its_time_where_that_is_capped(
    iterations, cap, step, seconds, expected
):
    assert (progress(step, seconds, plan(iterations, cap=cap)) >= 1) is expected

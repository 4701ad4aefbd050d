import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from dmr_pipeline.precision.hull import below_hull, best_mixture, dominators, mixture_at


def test_a_hull_by_hand() -> None:
    """Corners (1, 2), (2, 6), (4, 8); (3, 6.5) lies half a point below the line at 7, and (5, 1) is dearer than all."""
    costs, successes = np.array([4.0, 1, 3, 2, 5]), np.array([8.0, 2, 6.5, 6, 1])
    at = np.array([0.5, 1, 1.5, 2, 3, 4, 9])
    assert best_mixture(costs, successes, at) == pytest.approx([2, 2, 4, 6, 7, 8, 8])
    rungs = {"int8": (4, 8), "int2": (1, 2), "int4": (3, 6.5), "int3": (2, 6), "float": (5, 1)}
    assert below_hull(rungs) == {"int4": "mixture", "float": "int8"}


def test_who_dominates() -> None:
    """The best of those that are as good and not dearer, of equals the cheapest; equals in both do not dominate each other."""
    assert below_hull({"a": (1.0, 0.5), "b": (1.0, 0.5)}) == {}
    assert below_hull({"a": (1.0, 0.5), "b": (1.0, 0.4), "c": (2.0, 0.5)}) == {"b": "a", "c": "a"}
    assert below_hull({"a": (1.0, 0.5), "b": (1.5, 0.7), "c": (2.0, 0.4), "d": (1.2, 0.7)}) == {"b": "d", "c": "d"}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6), st.integers(1, 60))
def test_the_best_mixture_is_the_linear_programs(points: list[tuple[int, int]], at: int) -> None:
    """Shares of whole episodes that maximise the success at a mean cost of `at` or less, as scipy's solver finds them."""
    costs, successes = np.array(points, dtype=float).T
    found = linprog(-successes, A_ub=[costs], b_ub=[at], A_eq=[np.ones_like(costs)], b_eq=[1])
    expected = -found.fun if found.success else successes[costs == costs.min()].max()
    assert found.success == (costs.min() <= at)
    assert float(best_mixture(costs, successes, np.array(at))) == pytest.approx(expected, abs=1e-6)


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1, max_size=2), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1
    )
)
def test_the_front_is_what_nothing_beats(points: dict[str, tuple[int, int]]) -> None:
    by = dominators(points)
    for name, (cost, success) in points.items():
        beaten = any(c <= cost and s >= success and (c, s) != (cost, success) for c, s in points.values())
        assert (name in by) == beaten
    assert not by.keys() & set(by.values()), "what dominates is on the front itself"
    assert by.items() <= below_hull(points).items()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6), st.integers(1, 60))
def test_a_mixture_is_made_of_what_it_wins(points: list[tuple[int, int]], at: int) -> None:
    costs, successes = np.array(points, dtype=float).T
    shares, slope = mixture_at(costs, successes, at)
    assert shares.sum() == pytest.approx(1)
    assert np.count_nonzero(shares) <= 2
    assert shares @ successes == pytest.approx(best_mixture(costs, successes, np.array(at)), abs=1e-9)
    assert shares @ costs <= max(at, costs.min()) + 1e-9
    if slope:
        assert shares @ costs == pytest.approx(at)

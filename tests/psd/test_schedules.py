import pytest

from psd.schedules import Constant, Cosine, Linear, Piecewise


def test_constant_ignores_the_step() -> None:
    assert Constant(7.5)(0) == Constant(7.5)(10_000) == 7.5


def test_linear_is_mvdreams_annealing() -> None:
    max_t = Linear(start=0.98, end=0.50, end_step=8000)
    assert [max_t(step) for step in (0, 2000, 4000, 8000, 9000)] == pytest.approx([0.98, 0.86, 0.74, 0.50, 0.50])


def test_linear_waits_for_its_start() -> None:
    schedule = Linear(start=1.0, end=3.0, start_step=10, end_step=20)
    assert [schedule(step) for step in (0, 10, 15, 20)] == [1.0, 1.0, 2.0, 3.0]


def test_cosine_is_halfway_in_the_middle_and_flat_at_the_ends() -> None:
    schedule = Cosine(start=1.0, end=0.0, end_step=100)
    assert [schedule(step) for step in (0, 50, 100, 200)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert schedule(25) == pytest.approx(0.5 + 0.5 * 2**-0.5)


def test_piecewise_interpolates_between_knots() -> None:
    schedule = Piecewise(((10, 0.0), (20, 1.0), (30, -1.0)))
    assert [schedule(step) for step in (0, 10, 15, 20, 25, 30, 99)] == [0.0, 0.0, 0.5, 1.0, 0.0, -1.0, -1.0]


@pytest.mark.parametrize("knots", [(), ((5, 1.0), (5, 2.0)), ((5, 1.0), (4, 2.0))])
def test_piecewise_refuses_knots_without_order(knots: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="increasing steps"):
        Piecewise(knots)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_ramps_must_end_after_they_start(kind: type[Linear] | type[Cosine]) -> None:
    with pytest.raises(ValueError, match="end_step must be after start_step"):
        kind(start=0.0, end=1.0, start_step=5, end_step=5)

"""The discounted sum inside an episode; its adjoint by dot product is in test_definition.py."""

import pytest
import torch as th

from sb3_blpo.gae import DiscountedSum


def random_block(T: int, E: int) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(T)
    return th.randn(T, E, generator=generator, dtype=th.float64), (th.rand(T, E, generator=generator) < 0.15).double()


@pytest.mark.parametrize(("T", "E"), [(1, 1), (1, 3), (2, 1), (7, 4), (64, 2), (301, 1)])
def test_both_ways_are_the_recursions(T: int, E: int) -> None:
    x, done = random_block(T, E)
    U, later, earlier = DiscountedSum(done, 0.93), th.zeros(E, dtype=th.float64), th.zeros(E, dtype=th.float64)
    sums: list[th.Tensor] = []
    traces: list[th.Tensor] = []
    for t in range(T):
        later = x[-1 - t] + 0.93 * (1 - done[-1 - t]) * later
        earlier = x[t] + 0.93 * (1 - (done[t - 1] if t else 0)) * earlier
        sums.insert(0, later)
        traces.append(earlier)
    th.testing.assert_close(U(x), th.stack(sums), rtol=1e-12, atol=1e-12)
    th.testing.assert_close(U.adjoint(x), th.stack(traces), rtol=1e-12, atol=1e-12)


def test_nothing_leaks_across_an_episode_end() -> None:
    x, done = random_block(41, 2)
    done[39] = 1
    U, changed = DiscountedSum(done, 0.93), x.clone()
    changed[40] = 1e300
    assert th.equal(U(x)[:40], U(changed)[:40])
    changed[:40], changed[40] = 1e300, x[40]
    assert th.equal(U.adjoint(x)[40], U.adjoint(changed)[40])


def test_the_edges_of_the_discount() -> None:
    x, done = random_block(20, 3)
    assert th.equal(DiscountedSum(done, 0.0)(x), x)
    th.testing.assert_close(DiscountedSum(0 * done, 1.0).adjoint(x), x.cumsum(0), rtol=1e-12, atol=1e-12)

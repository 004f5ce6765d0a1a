"""GAE and its adjoint."""

import pytest
import torch as th

from sb3_blpo import gae


def random_block(T: int, B: int, seed: int = 0) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    x, y = th.randn(2, T, B, generator=generator, dtype=th.float64)
    keep = 0.93 * (th.rand(T, B, generator=generator) > 0.15).double()
    return x, y, keep


@pytest.mark.parametrize("T", [1, 2, 3, 7, 64, 301])
@pytest.mark.parametrize("B", [1, 4])
def test_discounted_sum_is_the_recursion(T, B):
    x, _, keep = random_block(T, B)
    total, expected = th.zeros(B, dtype=th.float64), []
    for t in reversed(range(T)):
        total = x[t] + keep[t] * total
        expected.append(total)
    th.testing.assert_close(gae.discounted_sum(x, keep), th.stack(expected[::-1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 5, 128])
@pytest.mark.parametrize("B", [1, 3])
def test_adjoint_by_dot_product(T, B):
    x, y, keep = random_block(T, B, seed=T)
    left, right = (gae.discounted_sum(x, keep) * y).sum(), (x * gae.discounted_sum_adjoint(y, keep)).sum()
    assert abs(left - right) <= 1e-12 * max(1, abs(left))


@pytest.mark.parametrize("T", [1, 40])
def test_nothing_leaks_across_an_episode_end(T):
    x, _, keep = random_block(T + 1, 2)
    keep[T - 1] = 0  # the last step but one ends an episode
    later = x.clone()
    later[T:] += 1e6
    assert th.equal(gae.discounted_sum(x, keep)[:T], gae.discounted_sum(later, keep)[:T])
    earlier = x.clone()
    earlier[:T] += 1e6
    assert th.equal(gae.discounted_sum_adjoint(x, keep)[T:], gae.discounted_sum_adjoint(earlier, keep)[T:])


@pytest.mark.parametrize("inside_rollout", [True, False])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_return_gradient_is_the_derivative_of_the_returns(inside_rollout, gae_lambda):
    T, B, gamma = 12, 3, 0.97
    generator = th.Generator().manual_seed(1)
    rewards, V, terminal, weights = th.randn(4, T, B, generator=generator, dtype=th.float64)
    last, last_returns = th.randn(2, B, generator=generator, dtype=th.float64)
    ends = th.rand(T, B, generator=generator)
    done, truncated = (ends < 0.3).double(), (ends < 0.15).double()
    inputs = [tensor.requires_grad_() for tensor in (V, last, terminal)]
    baseline = V.detach()
    advantages = gae.advantages(
        rewards, V, last, last_returns if inside_rollout else None, terminal * truncated, done, gamma, gae_lambda
    )
    # Q = A + V; the baseline is no part of the leader's objective
    expected = th.autograd.grad((weights * (advantages + V - baseline)).sum(), inputs)
    by = gae.return_gradient(weights, done, gamma, gae_lambda, inside_rollout)
    th.testing.assert_close(by.values, expected[0], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(by.last_values, expected[1], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(by.terminal_values * truncated, expected[2], rtol=1e-12, atol=1e-12)

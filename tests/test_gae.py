"""GAE and its adjoint."""

import pytest
import torch as th

from sb3_blpo import gae


def random_block(T: int, B: int, seed: int = 0) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(seed)
    x, y = th.randn(2, T, B, generator=generator, dtype=th.float64)
    done = (th.rand(T, B, generator=generator) < 0.15).double()
    return x, y, done


@pytest.fixture(params=["matrix", "scan"])
def U(request, monkeypatch):
    """Both ways to apply the operator."""
    monkeypatch.setattr(gae.DiscountedSum, "max_matrix_steps", 10**6 if request.param == "matrix" else 0)

    def make(done: th.Tensor) -> gae.DiscountedSum:
        operator = gae.DiscountedSum(done, 0.93)
        assert (operator.matrix is not None) == (request.param == "matrix")
        return operator

    return make


@pytest.mark.parametrize("T", [1, 2, 3, 7, 64, 301])
@pytest.mark.parametrize("B", [1, 2, 4])
def test_discounted_sum_is_the_recursion(T, B, U):
    x, _, done = random_block(T, B)
    total, expected = th.zeros(B, dtype=th.float64), []
    for t in reversed(range(T)):
        total = x[t] + 0.93 * (1 - done[t]) * total
        expected.append(total)
    th.testing.assert_close(U(done)(x), th.stack(expected[::-1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 5, 128])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_adjoint_by_dot_product(T, B, U):
    x, y, done = random_block(T, B, seed=T)
    left, right = (U(done)(x) * y).sum(), (x * U(done).adjoint(y)).sum()
    assert abs(left - right) <= 1e-12 * max(1, abs(left))


@pytest.mark.parametrize("T", [1, 40])
def test_nothing_leaks_across_an_episode_end(T, U):
    x, _, done = random_block(T + 1, 2)
    done[T - 1] = 1  # the last step but one ends an episode
    later = x.clone()
    later[T:] += 1e6
    assert th.equal(U(done)(x)[:T], U(done)(later)[:T])
    earlier = x.clone()
    earlier[:T] += 1e6
    assert th.equal(U(done).adjoint(x)[T:], U(done).adjoint(earlier)[T:])


def test_long_blocks_have_no_matrix():
    longest = gae.DiscountedSum.max_matrix_steps
    assert gae.DiscountedSum(th.zeros(longest, 1), 0.9).matrix is not None
    assert gae.DiscountedSum(th.zeros(longest + 1, 1), 0.9).matrix is None


def test_tensors_are_made_where_the_inputs_are(U):
    x, _, done = random_block(9, 2)
    expected = U(done)(x), U(done).adjoint(x)
    with th.device("meta"):  # a default device on which nothing can be computed
        operator = U(done)
        th.testing.assert_close((operator(x), operator.adjoint(x)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("inside_rollout", [True, False])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_lambda_returns_are_the_recursion(inside_rollout, gae_lambda):
    T, B, gamma = 12, 3, 0.97
    generator = th.Generator().manual_seed(2)
    rewards, V_next, terminal = th.randn(3, T, B, generator=generator, dtype=th.float64)
    last_returns = th.randn(B, generator=generator, dtype=th.float64)
    ends = th.rand(T, B, generator=generator)
    done, truncated = (ends < 0.3).double(), (ends < 0.15).double()
    done[-1, 0], done[-1, 1] = 1, 0
    Q, expected = last_returns if inside_rollout else V_next[-1], []
    for t in reversed(range(T)):
        going_on = (1 - gae_lambda) * V_next[t] + gae_lambda * Q
        Q = rewards[t] + gamma * (1 - done[t]) * going_on + gamma * truncated[t] * terminal[t]
        expected.append(Q)
    kept = rewards.clone()
    found = gae.LambdaReturn(rewards, done, last_returns if inside_rollout else None, gamma, gae_lambda)
    th.testing.assert_close(found(V_next, terminal * truncated), th.stack(expected[::-1]), rtol=1e-12, atol=1e-12)
    assert th.equal(rewards, kept)


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
    Q = gae.LambdaReturn(rewards, done, last_returns if inside_rollout else None, gamma, gae_lambda)
    returns = Q(th.cat([V[1:], last[None]]), terminal * truncated)
    expected = th.autograd.grad((weights * returns).sum(), inputs)
    by = Q.gradient(weights)
    by_values = th.cat([th.zeros(1, B), by.next_values])
    th.testing.assert_close(by_values[:-1], expected[0], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(by_values[-1], expected[1], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(by.terminal_values * truncated, expected[2], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(Q(th.cat([V[1:], last[None]])), Q(th.cat([V[1:], last[None]]), 0 * terminal), rtol=0, atol=0)

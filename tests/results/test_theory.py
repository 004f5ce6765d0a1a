"""
The theory on problems that can be solved exactly (benchmarks/): why the leader's objective is the lambda-return and not the
advantage, what the hypergradient is worth, and that the package's estimate of it converges to its definition.
"""

import json

import numpy as np
import pytest
import torch as th
from mdp import Game
from stackelberg import (
    CRITICS,
    LAMBDAS,
    RESULTS,
    Quadratic,
    alignment,
    alignment_table,
    expected_updates,
    measure,
    small_mdp,
    smallest_eigenvalue,
    train,
    with_last,
)

from sb3_blpo.ihvp import ConjugateGradient, Exact

pytestmark = pytest.mark.benchmarks


@pytest.mark.parametrize("gae_lambda", LAMBDAS)
def test_tabular_hypergradient_is_the_policy_gradient(gae_lambda: float) -> None:
    cosines = alignment(gae_lambda, None)
    for name in ("direct", "hypergradient"):
        assert cosines[name].numpy() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("gae_lambda", "sign"), [(0.0, 1), (0.5, 1), (0.9, -1), (0.95, -1), (1.0, -1)])
def test_differentiating_the_baseline_reverses_it(gae_lambda: float, sign: int) -> None:
    """The test of the test: the total derivative of the mean advantage, which is 0 for every policy, fights the direct one."""
    assert alignment(gae_lambda, None)["baseline differentiated"].numpy() == pytest.approx(sign, abs=1e-9)


def test_small_linear_critics_cost_the_hypergradient_a_little() -> None:
    """With few features it points a little less well than the direct gradient, the less so the larger lambda."""
    table = alignment_table()
    assert table["4 features"]["direct"] == pytest.approx([0.990, 0.997, 1, 1, 1], abs=1e-3)
    assert table["4 features"]["hypergradient"] == pytest.approx([0.953, 0.973, 0.994, 0.997, 1], abs=1e-3)
    assert table["4 features"]["baseline differentiated"] == pytest.approx([0.990, 0.996, 0.258, -0.481, -0.965], abs=1e-3)
    recorded = json.loads((RESULTS / "stackelberg.json").read_text())
    assert recorded["lambdas"] == LAMBDAS
    for critic in CRITICS:
        for name, cosines in table[critic].items():
            assert recorded["alignment"][critic][name] == pytest.approx(cosines, abs=1e-4)


@pytest.mark.parametrize("k", [1.5, 2.5])
def test_fields_of_the_game(k: float) -> None:
    """The package's gradients in closed form; halves, because an episode has two steps."""
    game = Quadratic(k)
    for theta, omega in ((0.4, 0.3), (-0.7, 0.1)):
        leader, follower = game.gradients(theta, omega, None)
        assert leader == pytest.approx(((k - 1) * theta + omega) / 2, rel=1e-9)
        assert follower == pytest.approx((theta**2 + game.sigma**2) * (omega + theta), rel=1e-9)
        # At the best response: the gradient of the return, and that of the mean return of all visited states
        assert game.gradients(theta, -theta, None)[0] == pytest.approx((k - 2) * theta / 2, rel=1e-9)
        assert game.gradients(theta, -theta, Exact())[0] == pytest.approx((k - 3) * theta / 2, rel=1e-6)


def test_simultaneous_steps_cycle_where_nested_ones_converge() -> None:
    game = Quadratic(1.5)
    theta = game.path("simultaneous", 0.6, 0.4, 1000)[-500:, 0]
    assert theta.max() == pytest.approx(0.77, abs=0.02)
    assert theta.min() == pytest.approx(-0.77, abs=0.02)
    for method in ("nested", "hypergradient"):
        assert np.abs(game.path(method, 0.6, 0.4, 500)[-1]).max() < 2e-3


def test_bilevel_objective_and_return_part_ways() -> None:
    """At k = 2.5 the hypergradient goes to theta = 0, a minimum of the return, and nested steps go up the return."""
    game = Quadratic(2.5)
    assert np.abs(game.path("hypergradient", 0.6, 0.4, 500)[-1]).max() < 2e-3
    assert np.abs(game.path("nested", 0.6, 0.4, 500)[-1]).min() > 2


def test_sampled_hypergradient_is_the_exact_one_but_for_noise() -> None:
    run = measure(small_mdp(), train(small_mdp(), ConjugateGradient(50, 1e-12), 1e-9, 3))
    assert (run["leader, noise"] < 0.1 * run["leader"]).all()
    assert (run["follower, noise"] < 0.1 * run["follower"]).all()


def test_expected_updates_reach_a_local_stackelberg_equilibrium() -> None:
    mdp = small_mdp()
    norms, theta = expected_updates(mdp, 1000)
    assert norms[-1] < 1e-6 < norms[0]
    assert smallest_eigenvalue(mdp, theta) > 4e-4
    assert smallest_eigenvalue(mdp, th.zeros_like(theta)) < 0
    # No gradient is left for the follower at its fixed point
    assert Game(mdp, with_last(theta)).follower_gradient().norm() < 1e-12

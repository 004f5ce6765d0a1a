"""
Why the leader's objective is the lambda-return and not the advantage: exact computation on random MDPs, without sampling.
"""

import numpy as np
import pytest

N_STATES, N_ACTIONS, GAMMA = 12, 3, 0.95


def cosines(seed: int, gae_lambda: float, n_features: int | None, differentiate_baseline: bool = False) -> tuple[float, float]:
    """
    :param n_features: Of a linear critic with random features, at its TD(lambda) fixed point; ``None``: tabular
    :param differentiate_baseline: Take the mean advantage for the leader's objective, its baseline included
    :return: Cosine of the direct gradient and of the hypergradient with the true policy gradient
    """
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.ones(N_STATES), size=(N_STATES, N_ACTIONS))
    r, theta = rng.standard_normal((2, N_STATES, N_ACTIONS))
    pi = np.exp(theta) / np.exp(theta).sum(axis=1, keepdims=True)
    features = np.eye(N_STATES) if n_features is None else rng.standard_normal((N_STATES, n_features))
    P_pi, r_pi = np.einsum("sa,sat->st", pi, P), (pi * r).sum(axis=1)
    stationary = np.linalg.lstsq(np.vstack([P_pi.T - np.eye(N_STATES), np.ones(N_STATES)]), np.eye(N_STATES + 1)[-1])[0]
    D = np.diag(stationary)
    # Sums discounted by gamma lambda: the expectation of the package's operator U
    U = np.linalg.inv(np.eye(N_STATES) - GAMMA * gae_lambda * P_pi)

    bootstrap = GAMMA * (1 - gae_lambda) * U @ P_pi  # derivative of the lambda-returns by the values
    omega = np.linalg.solve(features.T @ D @ (features - bootstrap @ features), features.T @ D @ U @ r_pi)
    V = features @ omega
    returns = U @ r_pi + bootstrap @ V
    advantages = r + GAMMA * P @ ((1 - gae_lambda) * V + gae_lambda * returns) - V[:, None]

    def policy_gradient(state_weights: np.ndarray, action_values: np.ndarray) -> np.ndarray:
        centred = action_values - (pi * action_values).sum(axis=1, keepdims=True)
        return state_weights[:, None] * pi * centred

    # math: g = J^T c, v = H^-1 g, u = J v, e = U^T (2 d u)
    c = stationary @ bootstrap - (stationary if differentiate_baseline else 0)
    u = features @ np.linalg.solve(2 * features.T @ D @ features, features.T @ c)
    e = (2 * stationary * u) @ U
    direct = policy_gradient(stationary, advantages)
    hyper = direct + policy_gradient(e, advantages)
    V_pi = np.linalg.solve(np.eye(N_STATES) - GAMMA * P_pi, r_pi)
    visits = stationary @ np.linalg.inv(np.eye(N_STATES) - GAMMA * P_pi)
    true = policy_gradient(visits, r + GAMMA * P @ V_pi)

    def cosine(gradient: np.ndarray) -> float:
        return float((gradient * true).sum() / np.linalg.norm(gradient) / np.linalg.norm(true))

    return cosine(direct), cosine(hyper)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9, 0.95, 1.0])
def test_tabular_hypergradient_is_the_policy_gradient(gae_lambda):
    for seed in range(10):
        assert cosines(seed, gae_lambda, None) == pytest.approx((1, 1), abs=1e-9)


@pytest.mark.parametrize(("gae_lambda", "sign"), [(0.0, 1), (0.5, 1), (0.9, -1), (0.95, -1), (1.0, -1)])
def test_differentiating_the_baseline_reverses_it(gae_lambda, sign):
    """The test of the test: the total derivative of the mean advantage, which is 0 for every policy, fights the direct one."""
    for seed in range(10):
        assert cosines(seed, gae_lambda, None, differentiate_baseline=True)[1] == pytest.approx(sign, abs=1e-9)


@pytest.mark.parametrize(("gae_lambda", "least"), [(0.0, 0.93), (0.5, 0.95), (0.9, 0.98), (0.95, 0.99), (1.0, 0.9999)])
def test_linear_critic_of_four_features_is_close(gae_lambda, least):
    hyper = np.mean([cosines(seed, gae_lambda, 4)[1] for seed in range(100)])
    wrong = np.mean([cosines(seed, gae_lambda, 4, differentiate_baseline=True)[1] for seed in range(100)])
    assert hyper > least
    if gae_lambda >= 0.9:
        assert wrong < 0.5

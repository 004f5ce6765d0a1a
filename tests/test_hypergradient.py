"""The hypergradient against the definition, differentiated by brute force in float64."""

from typing import Any

import pytest
import torch as th
from brute_force import Truth, as_flat_function, lambda_returns, truth
from problems import Problem, problem

import sb3_blpo.hypergradient
from sb3_blpo.actor_critic import likelihood
from sb3_blpo.curvature import Curvature, GaussNewton, GramGaussNewton, Hessian
from sb3_blpo.hypergradient import Hypergradient, add_correction, best_response, clipped_surrogate, hypergradient
from sb3_blpo.ihvp import ConjugateGradient, Exact, Nystrom, Solution, make_solver
from sb3_blpo.jacobian import FunctionalJacobian, Jacobian
from sb3_blpo.layers import LayerJacobian

CLIP_RANGE = 0.2
DAMPING = 0.05


def jacobian_of(p: Problem, layers: bool) -> Jacobian:
    observations = p.segment.observations
    assert isinstance(observations, th.Tensor)
    if layers:
        return LayerJacobian(p.critic, observations)
    return FunctionalJacobian(
        lambda parameters: th.func.functional_call(p.critic, parameters, (observations,)).flatten(),
        dict(p.critic.named_parameters()),
        th.Generator(),
    )


def run(p: Problem, solver: str = "exact", layers: bool = True, entropy: th.Tensor | None = None, **changes) -> Hypergradient:
    jacobian = jacobian_of(p, layers)
    ihvp = make_solver(solver, rank=10**6, sketch="gaussian", max_iter=500, tol=1e-14)
    if ihvp is not None:
        ihvp.draw(th.zeros(jacobian.n_params, dtype=th.float64), th.Generator().manual_seed(0))
    arguments: dict[str, Any] = dict(
        clip_range=CLIP_RANGE, normalize_advantage=False, ent_coef=0.0, damping=DAMPING, curvature="gauss_newton"
    ) | {"max_correction_ratio": None}
    action_likelihood = likelihood(list(p.actor.parameters()), p.actor(p.actor_input), entropy)
    return hypergradient(*action_likelihood, p.segment, jacobian.values, jacobian, ihvp, **(arguments | changes))


def flat(gradients) -> th.Tensor:
    return th.cat([g.flatten() for g in gradients])


def dense_truth(p: Problem, curvature: str = "gauss_newton", **kwargs) -> Truth:
    observations = p.segment.observations
    assert isinstance(observations, th.Tensor)
    critic, omega = as_flat_function(p.critic, observations)
    log_prob, theta = as_flat_function(p.actor, p.actor_input)
    return truth(p.segment, lambda x: critic(x).flatten(), omega, log_prob, theta, CLIP_RANGE, DAMPING, curvature, **kwargs)


PROBLEMS = {
    "inside the rollout": dict(inside_rollout=True),
    "at its end": dict(inside_rollout=False),
    "one environment": dict(B=1, T=14),
    "one step": dict(B=3, T=1),
    "at the rollout's policy": dict(spread=0.0),
    "far from the rollout's policy": dict(spread=1.0),
    "linear critic": dict(hidden=None),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROBLEMS)
def test_advantages_are_the_recursion(name, seed):
    p = problem(seed, **PROBLEMS[name])
    values = p.critic(p.segment.observations).flatten().detach()
    expected = lambda_returns(p.segment, values).flatten() - values[: p.segment.n_transitions]
    actual = p.segment.advantages(values)
    th.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("solver", "curvature", "layers", "seed"),
    [
        ("exact", "gauss_newton", True, 0),
        ("exact", "gauss_newton", False, 1),
        ("cg", "gauss_newton", True, 2),
        ("cg", "gauss_newton", False, 3),
        ("nystrom", "gauss_newton", True, 4),
        ("nystrom", "gauss_newton", False, 5),
        ("nystrom_cg", "gauss_newton", True, 6),
        ("exact", "hessian", True, 7),
        ("exact", "hessian", False, 8),
        ("nystrom", "hessian", True, 9),
    ],
)
def test_every_quantity_equals_brute_force(name, solver, curvature, layers, seed):
    p = problem(seed, **PROBLEMS[name])
    expected = dense_truth(p, curvature)
    tolerance = 1e-6 if curvature == "hessian" and solver == "nystrom" else 1e-9

    def assert_close(actual: th.Tensor, wanted: th.Tensor) -> None:
        th.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())

    # g, v and u
    jacobian = jacobian_of(p, layers)
    n = p.segment.n_transitions
    residuals = jacobian.values[:n] - p.segment.returns
    advantages = p.segment.advantages(jacobian.values)
    surrogate = clipped_surrogate(p.actor(p.actor_input), p.segment.old_log_prob, advantages, CLIP_RANGE, False)
    c = p.segment.return_gradient(surrogate.weights)
    assert_close(jacobian.Jt_w(c), expected.g)
    ihvp = make_solver(solver, rank=10**6, sketch="gaussian", max_iter=500, tol=1e-14)
    assert ihvp is not None
    ihvp.draw(expected.g, th.Generator().manual_seed(0))
    if curvature == "hessian":
        system: GramGaussNewton | Hessian = Hessian(jacobian, c, residuals)
    else:
        system = GramGaussNewton(jacobian, c, n)
    # alpha is in units of the trace of the Gauss-Newton matrix for both curvatures; exact here, not estimated, without layers
    alpha = DAMPING * 2 / n * LayerJacobian(p.critic, p.segment.observations).squared_norm(n)
    jacobian.squared_norm = lambda n: alpha * n / 2 / DAMPING
    assert_close(system.to_parameters(ihvp.solve(system, alpha).x), expected.v)
    response = best_response(jacobian, c, residuals, ihvp, DAMPING, curvature)
    # Coefficients that stand for (almost) nothing have an inner product of rounding, hence a residual of its square root
    assert response.ok and response.residual < 1e-7
    assert_close(response.u, expected.u)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_gradients_equal_brute_force(name, seed, normalize_advantage):
    p = problem(seed, **PROBLEMS[name])
    expected = dense_truth(p, normalize_advantage=normalize_advantage)
    direct = run(p, "none", normalize_advantage=normalize_advantage).gradient
    th.testing.assert_close(direct, expected.direct, rtol=1e-9, atol=1e-9 * expected.direct.abs().max().item())
    for solver in ("exact", "cg", "nystrom", "nystrom_cg"):
        total = run(p, solver, normalize_advantage=normalize_advantage)
        wanted = expected.direct + expected.correction
        th.testing.assert_close(total.gradient, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
        norms = expected.correction.norm() / expected.direct.norm()
        th.testing.assert_close(total.stats["correction_ratio"], norms, rtol=1e-8, atol=0)
        cosine = th.cosine_similarity(expected.correction, expected.direct, dim=0)
        th.testing.assert_close(total.stats["correction_cosine"], cosine, rtol=1e-7, atol=1e-9)
        assert not total.stats["correction_capped"] and not total.stats["correction_skipped"]


def test_exact_hessian_gradient_equals_brute_force():
    for seed in range(3):
        p = problem(seed)
        expected = dense_truth(p, "hessian")
        wanted = expected.direct + expected.correction
        actual = run(p, curvature="hessian").gradient
        th.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


def test_the_correction_is_there_and_has_its_sign():
    """A correction replaced by nothing, or with its sign flipped, is far from the truth on these problems."""
    p = problem(0)
    expected = dense_truth(p)
    correction = run(p).gradient - run(p, "none").gradient
    assert expected.correction.norm() > 0.01 * expected.direct.norm()
    assert th.cosine_similarity(correction, expected.correction, dim=0) > 0.999999


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inside_rollout", [True, False])
def test_total_derivative_with_a_linear_critic(seed, inside_rollout):
    """
    Phi(theta) = J(theta, omega*(theta)) with the follower's problem, kept near its solution, solved exactly at each theta: the
    central difference of Phi less that of J at the fixed omega is the correction.
    """
    p = problem(seed, hidden=None, inside_rollout=inside_rollout, B=1, T=12)
    segment, N = p.segment, p.segment.n_transitions
    features = th.cat([segment.observations, th.ones(len(segment.observations), 1)], dim=1)
    omega = th.cat([p.critic[0].weight.flatten(), p.critic[0].bias]).detach()
    log_prob, theta = as_flat_function(p.actor, p.actor_input)
    block = segment.lambda_return
    gl, low, high = block.gamma * block.gae_lambda, 1 - CLIP_RANGE, 1 + CLIP_RANGE
    A = lambda_returns(segment, features @ omega).flatten() - (features @ omega)[:N]

    def ratio(theta_):
        return th.exp(log_prob(theta_) - segment.old_log_prob).detach()

    unclipped = ratio(theta) * A <= ratio(theta).clamp(low, high) * A

    def branch(theta_):
        return th.where(unclipped, ratio(theta_), ratio(theta_).clamp(low, high))

    def J(theta_, omega_):
        return (branch(theta_) * lambda_returns(segment, features @ omega_).flatten()).mean()

    def R(theta_):
        gain, total, totals = (branch(theta_) - branch(theta)) * A, th.zeros(()), []
        for k in reversed(range(N)):
            total = gain[k] + (0 if block.done[k, 0] else gl * total)
            totals.append(total)
        return segment.returns + th.stack(totals[::-1])

    F = features[:N]
    H = 2 / N * F.T @ F
    alpha = DAMPING * H.trace()
    A_damped = H + alpha * th.eye(len(H), dtype=th.float64)
    # The centre of the damping, such that omega is the solution at the current theta
    omega_0 = omega + 2 / N * F.T @ (F @ omega - segment.returns) / alpha

    def best(theta_):
        return th.linalg.solve(A_damped, 2 / N * F.T @ R(theta_) + alpha * omega_0)

    th.testing.assert_close(best(theta), omega, rtol=1e-9, atol=1e-9)
    step, differences = 1e-5, []
    for direction in th.eye(len(theta), dtype=th.float64):
        plus, minus = theta + step * direction, theta - step * direction
        total = J(plus, best(plus)) - J(minus, best(minus))
        partial = J(plus, omega) - J(minus, omega)
        differences.append((total - partial) / (2 * step))
    correction = run(p).gradient - run(p, "none").gradient
    th.testing.assert_close(correction, th.stack(differences), rtol=1e-6, atol=1e-6 * correction.abs().max().item())


def entropy_of(p: Problem, closed_form: bool) -> th.Tensor | None:
    """Any function of the actor will do."""
    return p.actor.mean(p.segment.states).square().sum(dim=1) + p.actor.log_std.sum() if closed_form else None


@pytest.mark.parametrize("closed_form", [True, False])
def test_entropy_is_part_of_the_direct_gradient(closed_form):
    p = problem(0)
    entropy = entropy_of(p, closed_form)
    gradient = run(p, "none", entropy=entropy, ent_coef=0.7).gradient - run(p, "none", entropy=entropy).gradient
    # Without a closed form the entropy is -log pi
    bonus = 0.7 * (-p.actor(p.actor_input) if entropy is None else entropy).mean()
    expected = flat(th.autograd.grad(bonus, list(p.actor.parameters()), retain_graph=True))
    th.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    # The correction's ratio compares with the direct gradient that has the entropy in it
    ratio = run(p, "exact", entropy=entropy, ent_coef=0.7).stats["correction_ratio"]
    correction = dense_truth(p).correction
    th.testing.assert_close(ratio, correction.norm() / run(p, "none", entropy=entropy, ent_coef=0.7).gradient.norm())


@pytest.mark.parametrize("closed_form", [True, False])
def test_statistics_are_those_of_ppo(closed_form):
    p = problem(0)
    entropy = entropy_of(p, closed_form)
    stats = run(p, entropy=entropy, ent_coef=0.7).stats
    with th.no_grad():
        values = p.critic(p.segment.observations).flatten()
        log_prob, advantages = p.actor(p.actor_input), p.segment.advantages(values)
        log_ratio = log_prob - p.segment.old_log_prob
        ratio = log_ratio.exp()
        policy_loss = -th.min(ratio * advantages, ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE) * advantages).mean()
        entropy_loss = (log_prob if entropy is None else -entropy).mean()
        expected = {
            "policy_gradient_loss": policy_loss,
            "entropy_loss": entropy_loss,
            "loss": policy_loss + 0.7 * entropy_loss,
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "clip_fraction": ((ratio - 1).abs() > CLIP_RANGE).float().mean(),
            "critic_loss_after": th.nn.functional.mse_loss(values[: len(ratio)], p.segment.returns),
        }
    assert 0 < stats["clip_fraction"] < 1
    th.testing.assert_close({name: stats[name] for name in expected}, expected)
    of_correction = {"correction_ratio", "correction_cosine", "correction_capped", "correction_skipped", "ihvp_residual"}
    assert stats.keys() == expected.keys() | of_correction
    assert run(p, "none").stats.keys() == expected.keys()
    assert stats["ihvp_residual"] < 1e-7 and run(p, with_residual=False).stats["ihvp_residual"].isnan()


@pytest.mark.parametrize(
    ("solver", "layers", "spare_rows", "expected"),
    [
        (ConjugateGradient(1, 0.1), True, 0, "whole Gram matrix"),
        (ConjugateGradient(1, 0.1), True, -1, "parameters"),
        (ConjugateGradient(1, 0.1), False, 0, "parameters"),
        (Nystrom(1, "values"), False, -1, "Gram matrix"),
        (Exact(), False, -1, "whole Gram matrix"),
    ],
)
def test_no_larger_matrix_than_the_solver_needs(solver, layers, spare_rows, expected, monkeypatch):
    p = problem(0)
    jacobian = jacobian_of(p, layers)
    residuals = jacobian.values[: p.segment.n_transitions] - p.segment.returns
    monkeypatch.setattr(sb3_blpo.hypergradient, "MAX_GRAM_ROWS", len(jacobian.values) + spare_rows)
    seen: list[Curvature] = []

    def solve(curvature: Curvature, alpha: th.Tensor) -> Solution:
        seen.append(curvature)
        return Solution(th.zeros_like(curvature.g), th.tensor(True), values=residuals)

    monkeypatch.setattr(solver, "solve", solve)
    response = best_response(jacobian, jacobian.values, residuals, solver, DAMPING, "gauss_newton", with_residual=False)
    assert response.u is residuals  # of the solver, which knew it
    (curvature,) = seen
    if expected == "parameters":
        assert type(curvature) is GaussNewton
    else:
        assert isinstance(curvature, GramGaussNewton) and curvature.whole == (expected == "whole Gram matrix")


def test_the_correction_is_capped_before_it_is_added():
    p = problem(0)
    direct, capped = run(p, "none").gradient, run(p, max_correction_ratio=0.01)
    th.testing.assert_close((capped.gradient - direct).norm(), 0.01 * direct.norm())
    assert capped.stats["correction_capped"] and capped.stats["correction_ratio"] > 0.01


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("cap", [0.0, 0.3, 1.0, 1e9])
def test_cap(cap, scale):
    direct = scale * th.tensor([3.0, 0.0, 4.0])  # norm 5
    correction = scale * th.tensor([0.0, 6.0, 8.0])  # norm 10
    gradient, comparison = add_correction(direct, correction, th.tensor(True), cap)
    th.testing.assert_close(gradient, direct + min(1.0, cap / 2) * correction)
    stats = comparison.statistics()
    th.testing.assert_close(stats["correction_ratio"], th.tensor(2.0))
    th.testing.assert_close(stats["correction_cosine"], th.tensor(32 / 50))
    assert bool(stats["correction_capped"]) == (cap < 2) and not stats["correction_skipped"]
    gradient, comparison = add_correction(direct, correction, th.tensor(True), None)
    assert th.equal(gradient, direct + correction) and not comparison.statistics()["correction_capped"]


@pytest.mark.parametrize("cap", [0.0, 1.0])
@pytest.mark.parametrize("direct", [0.0, 3.0])
def test_cap_of_nothing(direct, cap):
    gradient, comparison = add_correction(th.tensor([direct]), th.tensor([0.0]), th.tensor(True), cap)
    assert th.equal(gradient, th.tensor([direct]))
    assert not any(comparison.statistics().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_correction_that_is_not_finite_is_skipped(bad):
    for correction, ok in ((bad, True), (1.0, False)):
        gradient, comparison = add_correction(th.tensor([3.0]), th.tensor([correction]), th.tensor(ok), 1.0)
        assert th.equal(gradient, th.tensor([3.0])) and comparison.statistics()["correction_skipped"]


def test_normalization_leaves_a_single_transition_alone():
    log_prob, A = th.tensor([0.1], dtype=th.float64, requires_grad=True), th.tensor([2.5], dtype=th.float64)
    one = clipped_surrogate(log_prob, th.zeros(1, dtype=th.float64), A, 0.2, normalize_advantage=True)
    th.testing.assert_close(one.objective, A[0] * log_prob.exp()[0])
    assert one.scale == 1


def test_clipping_mask_comes_from_the_normalised_advantage():
    # Both advantages are positive; normalised, the first is negative, so that its large ratio is not clipped
    log_prob = th.tensor([0.5, 0.0], dtype=th.float64)
    A = th.tensor([1.0, 3.0], dtype=th.float64)
    assert clipped_surrogate(log_prob, th.zeros_like(A), A, 0.2, False).active.tolist() == [False, True]
    assert clipped_surrogate(log_prob, th.zeros_like(A), A, 0.2, True).active.tolist() == [True, True]

"""The critic's response as weights of the actor's step: cap, length, failures, memory. Its numbers: test_definition.py."""

from typing import Any

import pytest
import torch as th
from envs import SpaceEnv, vec_env
from problems import jacobian_of, problem, random_rollout
from stable_baselines3.common.logger import Logger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_blpo import BLPO
from sb3_blpo.ihvp import make_solver
from sb3_blpo.jacobian import MAX_SAMPLED_ROWS, SampledJacobian
from sb3_blpo.response import Response, best_response, correct, surrogate_derivative


def response_of(e: th.Tensor, ok: bool = True) -> Response:
    return Response(e, th.tensor(ok), th.tensor(0.0))


A = th.tensor([3.0, 0.0, -4.0, 1.0], dtype=th.float64)
E = th.tensor([0.5, 7.0, -1.0, 2.0], dtype=th.float64)


def test_derivative_of_the_surrogate() -> None:
    generator = th.Generator().manual_seed(0)
    ratio = (0.3 * th.randn(50, generator=generator, dtype=th.float64)).exp()
    advantages = th.randn(50, generator=generator, dtype=th.float64).requires_grad_()
    surrogate = th.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    (expected,) = th.autograd.grad(surrogate, advantages)
    th.testing.assert_close(surrogate_derivative(ratio, advantages.detach(), 0.2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("cap", [0.0, 0.3, 1.0, 1e9, None])
def test_the_correction_turns_the_advantages_and_does_not_lengthen_them(cap: float | None, scale: float) -> None:
    advantages, B = scale * A, 2 * E * scale * A
    weights, stats, skipped = correct(advantages, response_of(E), cap)
    ratio = float(B.norm() / advantages.norm())
    expected = advantages + min(1.0, (float("inf") if cap is None else cap) / ratio) * B
    if cap is not None:
        expected *= advantages.norm() / expected.norm()
        th.testing.assert_close(weights.norm(), advantages.norm(), rtol=1e-12, atol=0)
    th.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert stats["correction_ratio"] == pytest.approx(ratio)
    assert stats["correction_cosine"] == pytest.approx(float(B / B.norm() @ advantages / advantages.norm()))
    assert bool(stats["correction_capped"]) == (cap is not None and cap < ratio) and not skipped


@pytest.mark.parametrize("cap", [0.0, 1.0, None])
def test_nothing_to_correct_or_to_correct_with(cap: float | None) -> None:
    for advantages, e in ((A, 0 * E), (0 * A, E)):
        weights, stats, skipped = correct(advantages, response_of(e), cap)
        assert th.equal(weights, advantages) and not skipped and stats["correction_ratio"] == 0
    # The correction cancels the advantages: no direction is left
    assert not correct(A, response_of(0 * E - 0.5), 1.0).weights.any()
    none = correct(A, None, cap)
    assert th.equal(none.weights, A) and not none.skipped


@pytest.mark.parametrize("response", [response_of(E, ok=False), response_of(E / 0 * 0), response_of(1e300 * E)])
def test_a_failed_solve_means_the_advantages_themselves(response: Response) -> None:
    weights, stats, skipped = correct(1e200 * A, response, 1.0)
    assert th.equal(weights, 1e200 * A) and skipped and not stats


def test_a_failed_solve_is_counted_and_the_update_is_that_without_a_solver() -> None:
    """CG on the exact Hessian, which is indefinite far from the solution."""
    settings: dict[str, Any] = {"curvature": "hessian", "ihvp_solver": "cg", "ihvp_kwargs": {"damping": 1e-9, "tol": 0.0}}
    models = []
    for arguments in (settings, {"ihvp_solver": "none"}):
        env = vec_env(SpaceEnv(reward_scale=1e3), 2)
        models.append(
            BLPO("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=3, seed=0, device="cpu", **arguments).learn(32)
        )
    assert isinstance(models[0].logger, Logger)
    assert models[0].logger.name_to_value["train/correction_skipped"] == 1
    for ours, plain in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
        assert th.equal(ours, plain)


@pytest.mark.parametrize("solver", ["nystrom", "cg", "nystrom_cg", "exact"])
def test_a_critic_that_cannot_respond_has_no_response(solver: str) -> None:
    """Its values are the same whatever its first layer's parameters are: tr(H) = 0."""
    p = problem(0)
    for parameter in p.critic[2].requires_grad_(False).parameters():
        parameter.zero_()
    made, weights = make_solver(solver, 5, "values", 10, 1e-6), th.ones(len(p.rollout), dtype=th.float64)
    assert made is not None
    assert best_response(p.rollout, p.jacobian, weights, p.values, made, 0.1, "gauss_newton", th.Generator()) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"ihvp_solver": "nystrom"},
        {"ihvp_solver": "nystrom", "policy_kwargs": {"activation_fn": nn.PReLU}},
        {"ihvp_solver": "nystrom_cg", "ihvp_kwargs": {"sketch": "columns"}, "curvature": "hessian"},
        {"ihvp_solver": "nystrom", "ihvp_kwargs": {"sketch": "gaussian"}},
        {"ihvp_solver": "exact"},
    ],
)
def test_a_default_device_of_the_users_changes_nothing(settings: dict[str, Any]) -> None:
    """As for PPO: ``device`` counts. On this one nothing can be computed."""
    models = []
    for device in ("cpu", "meta"):
        model = BLPO(
            "MlpPolicy", vec_env(SpaceEnv(), 2), n_steps=16, batch_size=8, n_epochs=2, seed=0, device="cpu", **settings
        )
        with th.device(device):
            models.append(model.learn(32))
    for one, other in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
        assert th.equal(one, other)


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        sizes = [
            one.untyped_storage().nbytes() // one.element_size() for one in tree_leaves(outputs) if isinstance(one, th.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return outputs


@pytest.mark.parametrize(
    ("solver", "sketch", "curvature"),
    [
        ("nystrom", "values", "gauss_newton"),
        ("nystrom", "columns", "gauss_newton"),
        ("nystrom_cg", "gaussian", "hessian"),
        ("nystrom_cg", "values", "gauss_newton"),
        ("cg", "values", "hessian"),
    ],
)
@pytest.mark.parametrize("norm", [False, True], ids=["by layers", "from rows"])
def test_memory_is_linear_in_the_rollout_and_in_the_parameters(norm: bool, solver: str, sketch: str, curvature: str) -> None:
    """No tensor has N x N, P x P or N x P elements: at most N times a layer's width, rank x (N + P), or the sampled rows."""
    N, rank, batch_size = 4000, 4, 50
    rollout = random_rollout(N // 2, 2, th.Generator().manual_seed(0))
    norms: list[nn.Module] = [nn.LayerNorm(40)] if norm else []
    critic = nn.Sequential(nn.Linear(3, 40), *norms, nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    P = sum(parameter.numel() for parameter in critic.parameters())
    made = make_solver(solver, rank, sketch, 3, 1e-9)
    assert made is not None
    values, weights = critic(rollout.observations).flatten().detach(), th.ones(N, dtype=th.float64) / N
    with LargestTensor() as largest:
        jacobian = jacobian_of(critic, rollout.observations, len(values), N, batch_size)
        response = best_response(rollout, jacobian, weights, values, made, 0.1, curvature, th.Generator())
    assert response is not None and isinstance(jacobian, SampledJacobian) == norm
    # Twice, because "values" takes as many of the observations that are bootstrapped from
    of_layers, of_sketch, of_rows = 41 * len(values), 2 * rank * (N + P), MAX_SAMPLED_ROWS * P if norm else 0
    assert largest.elements <= max(of_layers, of_sketch, of_rows) < min(N, P) * P / 5

"""The checks that decide whether the code is right, one by one as the design's math.md has them; the fifth: test_theory.py."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from brute_force import Bilevel, Truth, as_flat_function, truth
from envs import DISCRETE, SpaceEnv, vec_env
from gymnasium import spaces
from problems import CLIP_RANGE, Problem, problem, random_rollout
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.curvature import GaussNewton, Hessian
from sb3_blpo.ihvp import Exact, make_solver
from sb3_blpo.response import Response, best_response, surrogate_derivative
from sb3_blpo.rollout import Rollout

DAMPING = 0.05
SETTINGS: dict[str, Any] = {"rank": 10**6, "sketch": "values", "max_iter": 500, "tol": 1e-14}


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float) -> None:
    """Relative to the largest element."""
    th.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# Check 1


@pytest.mark.parametrize("seed", range(3))
def test_1_adjoint_by_dot_product(seed: int) -> None:
    generator = th.Generator().manual_seed(seed)
    rollout = random_rollout(50, 3, generator)
    x, y = th.randn(2, 50, 3, generator=generator, dtype=th.float64)
    assert 0 < len(rollout.truncated) < rollout.done.sum()
    th.testing.assert_close((rollout.U(x) * y).sum(), (x * rollout.U.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)


# Check 2


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_2_advantages_are_those_of_sb3_under_the_current_critic(gae_lambda: float) -> None:
    T, E, generator = 40, 3, th.Generator().manual_seed(0)
    rollout = dataclasses.replace(random_rollout(T, E, generator), gae_lambda=gae_lambda)
    n = len(rollout.observations)
    rewards = th.randn(T, E, generator=generator, dtype=th.float64)
    before, now = th.randn(2, n, generator=generator, dtype=th.float64)
    rollout.advantages = sb3_advantages(rollout, rewards, before)
    th.testing.assert_close(
        rollout.advantages_after(now - before), sb3_advantages(rollout, rewards, now), rtol=1e-12, atol=1e-12
    )


def sb3_advantages(rollout: Rollout, rewards: th.Tensor, values: th.Tensor) -> th.Tensor:
    """By SB3's buffer in float64, after SB3's bootstrap from terminal observations."""
    T, E = rollout.done.shape
    of_states, last, terminal = values.split([T * E, E, len(rollout.truncated)])
    bootstrapped = rewards.flatten().clone()
    bootstrapped[rollout.truncated] += rollout.gamma * terminal
    box = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(T, box, box, "cpu", rollout.gae_lambda, rollout.gamma, E)
    buffer.rewards, buffer.values = bootstrapped.view(T, E).numpy(), of_states.view(T, E).numpy()
    buffer.advantages = np.zeros((T, E))
    buffer.episode_starts = np.concatenate([np.ones((1, E)), rollout.done[:-1].numpy()])
    buffer.compute_returns_and_advantage(last, rollout.done[-1].numpy())
    return th.as_tensor(buffer.advantages).flatten()


# Check 3


PROBLEMS: dict[str, dict[str, Any]] = {
    "two environments": {},
    "one environment": {"E": 1, "T": 14},
    "one step": {"E": 3, "T": 1},
    "at the rollout's policy": {"spread": 0.0},
    "far from the rollout's policy": {"spread": 1.0},
    "linear critic": {"hidden": None},
    "not made of layers": {"norm": True},
}


def response_of(p: Problem, solver: str = "exact", curvature: str = "gauss_newton") -> Response:
    weights = surrogate_derivative(p.ratio.detach(), advantages_of(p), CLIP_RANGE)
    made = make_solver(solver, **SETTINGS)
    assert made is not None
    response = best_response(p.rollout, p.jacobian, weights, p.values, made, DAMPING, curvature, th.Generator())
    assert response is not None and response.ok
    return response


def advantages_of(p: Problem) -> th.Tensor:
    return p.rollout.advantages_after(p.values - p.values_of_rollout)


def correction_of(p: Problem, response: Response) -> th.Tensor:
    """The policy gradient with the correction's weights, on the branch of the surrogate that is active."""
    A = advantages_of(p)
    objective = (surrogate_derivative(p.ratio, A, CLIP_RANGE) * 2 * response.e * A).sum()
    return flat(th.autograd.grad(objective, list(p.actor.parameters())))


def flat(parts: Any) -> th.Tensor:
    return th.cat([part.detach().flatten() for part in parts])


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_3_every_quantity_is_that_of_brute_force(name: str, curvature: str) -> None:
    for seed in range(2):
        p = problem(seed, **PROBLEMS[name])
        expected = truth(p.definition, DAMPING, curvature)
        jacobian, A = p.jacobian, advantages_of(p)
        assert_close(A, p.definition.A, 1e-12)
        g = jacobian.gradient(p.rollout.return_gradient(surrogate_derivative(p.ratio.detach(), A, CLIP_RANGE)))
        assert_close(g, expected.g, 1e-9)
        residuals = p.values[: len(p.rollout)] - p.rollout.returns
        system = GaussNewton(jacobian, g, DAMPING) if curvature == "gauss_newton" else Hessian(jacobian, g, DAMPING, residuals)
        assert_close(Exact().solve(system, th.Generator()).v, expected.v, 1e-9)
        # A central difference gives the changes of values where the critic is not made of layers
        tolerance = 1e-7 if name == "not made of layers" else 1e-9
        assert_close(jacobian.to_values(expected.v), expected.u, tolerance)
        response = response_of(p, curvature=curvature)
        assert_close(response.e, expected.e, tolerance)
        assert_close(correction_of(p, response), expected.correction, tolerance)
        # The test of the test: there is something to correct
        assert expected.correction.norm() > 0.01 * expected.direct.norm()


# Check 4


@pytest.mark.parametrize("seed", range(3))
def test_4_the_correction_is_the_total_derivative_with_a_linear_critic(seed: int) -> None:
    """The follower's problem, kept near its solution, is solved exactly at each theta."""
    p = problem(seed, hidden=None)
    definition = p.definition
    omega, theta, N = definition.omega, definition.theta, definition.N
    F = th.autograd.functional.jacobian(definition.critic, omega)[:N]
    alpha = DAMPING * (2 / N * F.T @ F).trace()
    A = 2 / N * F.T @ F + alpha * th.eye(len(omega), dtype=th.float64)
    # The centre of the damping, such that omega is the solution at the current theta
    omega_0 = omega + 2 / N * F.T @ (F @ omega - p.rollout.returns) / alpha

    def best(theta: th.Tensor) -> th.Tensor:
        return th.linalg.solve(A, 2 / N * F.T @ definition.R(theta) + alpha * omega_0)

    def gain(theta: th.Tensor) -> th.Tensor:
        """Of the leader by the follower's response."""
        return definition.J(theta, best(theta)) - definition.J(theta, omega)

    th.testing.assert_close(best(theta), omega, rtol=1e-9, atol=1e-9)
    steps = 1e-5 * th.eye(len(theta), dtype=th.float64)
    expected = th.stack([(gain(theta + step) - gain(theta - step)) / 2e-5 for step in steps])
    assert_close(correction_of(p, response_of(p)), expected, 1e-6)


# Check 6


@pytest.mark.parametrize("solver", ["cg", "nystrom", "nystrom_cg"])
def test_6_solvers_agree_at_full_rank(solver: str) -> None:
    for seed in range(3):
        p = problem(seed)
        assert_close(response_of(p, solver).e, response_of(p, "exact").e, 1e-8)


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
def test_6_the_error_of_nystrom_falls_in_the_rank(sketch: str) -> None:
    systems = []
    for seed in range(10):
        p = problem(seed, T=15, hidden=8)
        g = p.jacobian.gradient(th.ones_like(p.values))
        systems.append(GaussNewton(p.jacobian, g, DAMPING))
    exact = [system.jacobian.to_values(Exact().solve(system, th.Generator()).v) for system in systems]
    errors = []
    for rank in (1, 3, 9, 10**6):
        solver = make_solver("nystrom", **(SETTINGS | {"rank": rank, "sketch": sketch}))
        assert solver is not None
        error = 0.0
        for system, u in zip(systems, exact, strict=True):
            found = system.jacobian.to_values(solver.solve(system, th.Generator()).v)
            error += float((found - u).norm() / u.norm()) / len(systems)
        errors.append(error)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-8


# Checks 7 and 8, and the whole of train(), on SB3's policies in float64


class Double(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


@pytest.fixture
def float64() -> Iterator[None]:
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


SPACES = {"Gaussian": spaces.Box(-2, 2, (2,), np.float64), "categorical": DISCRETE}


def make(kind: Any, actions: str, **arguments: Any) -> Any:
    """A model of two environments, in float64, with a rollout of 32 transitions."""
    policy_kwargs = {"net_arch": [6], "features_extractor_class": Double} | arguments.pop("policy_kwargs", {})
    defaults = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "gamma": 0.96875, "gae_lambda": 0.875, "seed": 0}
    env = vec_env(SpaceEnv(action_space=SPACES[actions]), 2)
    return kind("MlpPolicy", env, policy_kwargs=policy_kwargs, device="cpu", **(defaults | arguments))


class AwayFromRolloutsPolicy(BaseCallback):
    """Moves the actor between rollout and update, so that some ratios are clipped, and keeps the policy as it was then."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        with th.no_grad():
            for parameter in self.model.policy.action_net.parameters():  # type: ignore[union-attr]
                parameter += 0.3 * th.randn_like(parameter)
        self.policy = copy.deepcopy(self.model.policy)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("actions", SPACES)
def test_7_gradients_of_minibatches_add_up_to_that_of_the_rollout(actions: str) -> None:
    model = make(BLPO, actions, learning_rate=0.0, max_grad_norm=1e9, ent_coef=0.1)
    gradients: list[th.Tensor] = []
    parameters = [parameter for group in model.policy.optimizer.param_groups for parameter in group["params"]]
    model.policy.optimizer.register_step_pre_hook(lambda *_: gradients.append(flat([p.grad for p in parameters])))
    model.learn(32, AwayFromRolloutsPolicy())
    model.batch_size = 12
    model.train()
    whole, *parts = gradients
    assert len(parts) == 3
    mean = sum(size / 32 * part for size, part in zip([12, 12, 8], parts, strict=True))
    assert isinstance(mean, th.Tensor) and (parts[0] - whole).norm() > 0.1 * whole.norm()
    assert_close(mean, whole, 1e-9)


class SameDraws(BaseCallback):
    """The same random numbers in each rollout, whatever an update has drawn, and perhaps the user's advantages."""

    def __init__(self, own_advantages: bool = False) -> None:
        super().__init__()
        self.own_advantages = own_advantages

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        th.manual_seed(self.n_calls)

    def _on_rollout_end(self) -> None:
        if self.own_advantages:
            buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
            buffer.advantages = np.random.default_rng(0).normal(size=buffer.advantages.shape).astype(np.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("own_advantages", [False, True])
@pytest.mark.parametrize("actions", SPACES)
def test_8_with_a_critic_that_stands_still_it_is_ppo(actions: str, own_advantages: bool) -> None:
    arguments = {"n_epochs": 4, "ent_coef": 0.05, "learning_rate": 3e-3}
    ppo = make(PPO, actions, vf_coef=0.0, **arguments)
    blpo = make(BLPO, actions, ihvp_solver="none", critic_learning_rate=0.0, **arguments)
    blpo.policy.load_state_dict(ppo.policy.state_dict())
    start = copy.deepcopy(ppo.policy.state_dict())
    for model in (ppo, blpo):
        model.learn(96, SameDraws(own_advantages))
    expected = ppo.policy.state_dict()
    assert not th.equal(expected["action_net.weight"], start["action_net.weight"])
    for name, parameter in blpo.policy.state_dict().items():
        th.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_8_a_correction_capped_at_nothing_is_no_correction(normalize_advantage: bool) -> None:
    models = []
    for correction in ({"ihvp_solver": "none"}, {"ihvp_solver": "nystrom", "max_correction_ratio": 0.0}, {}):
        arguments: dict[str, Any] = {"n_steps": 16, "batch_size": 8, "n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}
        model = BLPO("MlpPolicy", vec_env(SpaceEnv(), 2), seed=0, device="cpu", **arguments, **correction)
        model.normalize_advantage = normalize_advantage
        models.append(model.learn(96).policy.state_dict())
    none, capped, corrected = models
    for name, parameter in none.items():
        assert th.equal(parameter, capped[name]), name
    assert not th.equal(none["action_net.weight"], corrected["action_net.weight"])


class Values(nn.Module):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.policy.predict_values(observations)


class LogProb(Values):
    def forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:  # type: ignore[override]
        return self.policy.evaluate_actions(observations, actions)[1]


def truth_of(model: BLPO, before: Any, after: Any, curvature: str) -> tuple[Bilevel, Truth]:
    """By brute force, for the rollout that the model has been trained on, its actor before and its critic after the update."""
    assert model._last_episode_starts is not None
    one = Rollout.of(model.rollout_buffer, model._last_obs, model._last_episode_starts, model._truncations, "cpu")
    assert len(one.truncated) > 0 and isinstance(one.observations, th.Tensor)
    doubles = {name: getattr(one, name).double() for name in ("old_log_prob", "advantages", "returns", "done")}
    rollout = dataclasses.replace(one, **doubles)
    actor = [*before.mlp_extractor.policy_net.parameters(), *before.action_net.parameters()]
    actor += [before.log_std] if hasattr(before, "log_std") else []
    critic = [*after.mlp_extractor.value_net.parameters(), *after.value_net.parameters()]
    definition = Bilevel(
        rollout,
        Values(before)(one.observations).flatten().detach(),
        *as_flat_function(Values(after), critic, one.observations),
        *as_flat_function(LogProb(before), actor, rollout.states, rollout.actions),
        CLIP_RANGE,
    )
    return definition, truth(definition, DAMPING, curvature)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("actions", SPACES)
@pytest.mark.parametrize(
    ("solver", "curvature"),
    [("exact", "gauss_newton"), ("nystrom", "gauss_newton"), ("nystrom_cg", "gauss_newton"), ("exact", "hessian")],
)
def test_one_update_of_the_actor_is_a_step_along_the_hypergradient(solver: str, curvature: str, actions: str) -> None:
    """Uncapped and with a full batch it is Algorithm 1: here through the whole of ``train()``."""
    learning_rate, callback = 0.01, AwayFromRolloutsPolicy()
    model = make(
        BLPO, actions, learning_rate=learning_rate, critic_learning_rate=0.05, n_critic_updates=2, max_grad_norm=1e9,
        normalize_advantage=False, max_correction_ratio=None, ihvp_solver=solver, curvature=curvature,
        ihvp_kwargs={"damping": DAMPING, "rank": 10**6, "max_iter": 500, "tol": 1e-13},
        policy_kwargs={"optimizer_class": th.optim.SGD},
    )  # fmt: skip
    model.learn(32, callback)
    before, after = callback.policy, model.policy
    definition, expected = truth_of(model, before, after, curvature)
    ratio = (definition.log_prob(definition.theta) - definition.rollout.old_log_prob).exp()
    assert 0 < ((ratio - 1).abs() > CLIP_RANGE).sum() < 32
    # No advantage changes its sign, nor then the branch of the surrogate
    assert (1 + 2 * expected.e > 0).all() and expected.correction.norm() > 0.1 * expected.direct.norm()
    names = [name for name, _ in before.named_parameters() if "policy_net" in name]
    names += [name for name, _ in before.named_parameters() if "action_net" in name]
    names += ["log_std"] if hasattr(before, "log_std") else []
    theta = flat([after.get_parameter(name) for name in names])
    assert_close((theta - definition.theta) / learning_rate, expected.direct + expected.correction, 1e-6)

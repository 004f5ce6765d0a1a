"""The response of a critic with memory, in float64 against brute force: step by step, and by dense differentiation."""

import copy
import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch as th
from brute_force import Bilevel, as_flat_function, lambda_returns, truth
from envs import DISCRETE, TORQUES, SpaceEnv, vec_env
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_blpo import RecurrentBLPO
from sb3_blpo.engines import recurrent
from sb3_blpo.engines.recurrent import RecurrentEngine, RecurrentRollout, Sequences
from sb3_blpo.ihvp import make_solver
from sb3_blpo.response import Response, best_response, surrogate_derivative
from sb3_blpo.rollout import map_parts

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LSTM": {"lstm_hidden_size": 3, "net_arch": {"pi": [], "vf": [3]}},
    "two layers": {"lstm_hidden_size": 2, "n_lstm_layers": 2, "net_arch": []},
    "critic without LSTM": {"lstm_hidden_size": 3, "enable_critic_lstm": False, "net_arch": [3]},
}
CLIP, DAMPING = 0.02, 0.01


class StepByStep(nn.Module):
    """
    A policy's values of all observations of its rollout, or its log-probabilities of the actions, as they are collected: one
    step after the other, the memory handed on, forgotten where an episode starts.
    """

    def __init__(self, policy: Any, rollout: RecurrentRollout, starts: np.ndarray, first: Any, actor: bool) -> None:
        super().__init__()
        self.policy, self.actor = policy, actor
        self.data = rollout, th.tensor(starts, dtype=th.float64), first

    def look(self, observations: th.Tensor, memory: Any, starts: th.Tensor) -> tuple[Any, Any]:
        """What the network says now, and what it remembers afterwards."""
        if self.actor:
            return self.policy.get_distribution(observations, memory, starts)
        values = self.policy.predict_values(observations, memory, starts)
        if self.policy.lstm_critic is not None:
            features = self.policy.vf_features_extractor(observations)
            memory = self.policy._process_sequence(features, memory, starts, self.policy.lstm_critic)[1]
        return values.flatten(), memory

    def forward(self) -> th.Tensor:
        rollout, starts, memory = self.data
        observations = cast(dict[str, Any], rollout.observations)["observation"]
        n, (T, E) = len(rollout), rollout.done.shape
        truncated = rollout.truncated.tolist()
        outputs, terminal = [], {}
        for t in range(T):
            output, memory = self.look(observations[t * E : (t + 1) * E], memory, starts[t])
            outputs.append(output.log_prob(rollout.actions[t * E : (t + 1) * E]) if self.actor else output)
            for env in range(E) if not self.actor else ():
                if t * E + env in truncated:
                    i = truncated.index(t * E + env)
                    own = tuple(part[:, env : env + 1].contiguous() for part in memory)
                    terminal[i] = self.look(observations[n + E + i][None], own, th.zeros(1))[0]
        if self.actor:
            return th.cat(outputs)
        last = self.look(observations[n : n + E], memory, rollout.done[-1])[0]
        return th.cat([*outputs, last, *(terminal[i] for i in range(len(truncated)))])


class Double(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


def double(part: Any) -> Any:
    return part.double() if isinstance(part, th.Tensor) and part.is_floating_point() else part


class Problem:
    """A collected rollout in float64, whose actor and critic have moved on since."""

    def __init__(self, architecture: str, actions: Any, seed: int) -> None:
        self.model = model = RecurrentBLPO(
            "MlpLstmPolicy", vec_env(SpaceEnv(action_space=actions), 2), n_steps=11, batch_size=7, seed=seed, gamma=0.9,
            gae_lambda=0.8, policy_kwargs=ARCHITECTURES[architecture], device="cpu",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "train", lambda: None)
            model.learn(22)  # so that the second rollout starts within an episode
            model.learn(22, reset_num_timesteps=False)
        rollout = model._finished_rollout()
        for parameter in model.policy.parameters():
            parameter.data *= 1.5  # else all values are alike
        policy: Any = model.policy.double()
        policy.features_extractor = policy.pi_features_extractor = policy.vf_features_extractor = Double(
            model.observation_space
        )
        self.rollout = rollout = RecurrentRollout(
            **{field.name: map_parts(double, getattr(rollout, field.name)) for field in dataclasses.fields(rollout)}
        )
        buffer: Any = model.rollout_buffer
        critic_memory = th.tensor(buffer.hidden_states_vf[0]).double(), th.tensor(buffer.cell_states_vf[0]).double()
        actor_memory = th.tensor(buffer.hidden_states_pi[0]).double(), th.tensor(buffer.cell_states_pi[0]).double()
        self.critic = StepByStep(model.policy, rollout, buffer.episode_starts, critic_memory, actor=False)
        self.actor = StepByStep(model.policy, rollout, buffer.episode_starts, actor_memory, actor=True)
        self.engine = RecurrentEngine(
            model.policy,
            model.critic_optimizer,
            batch_size=7,
            clip_range=CLIP,
            ent_coef=0.0,
            max_grad_norm=1.0,
            target_kl=None,
        )
        with th.no_grad():
            self.values_of_rollout = self.critic()
            rollout.old_log_prob = self.actor()
            rollout.returns = rollout.advantages + self.values_of_rollout[: len(rollout)]
            generator = th.Generator().manual_seed(seed)
            for parameter in model.policy.parameters():
                parameter.data += 0.1 * th.randn(parameter.shape, generator=generator, dtype=th.float64)

    def brute_force(self) -> Bilevel:
        policy = self.model.policy
        actors = [p for group in policy.optimizer.param_groups for p in group["params"]]
        return Bilevel(
            self.rollout, self.values_of_rollout,
            *as_flat_function(self.critic, self.model._critic_parameters), *as_flat_function(self.actor, actors), CLIP,
        )  # fmt: skip

    def response(self, solver: str = "exact") -> tuple[Response, th.Tensor]:
        rollout, engine = self.rollout, self.engine
        values = engine.values(rollout)
        advantages = rollout.advantages_after(values - self.values_of_rollout)
        weights = surrogate_derivative((engine.log_prob(rollout) - rollout.old_log_prob).exp(), advantages, CLIP)
        generator = th.Generator().manual_seed(0)
        jacobian = engine.jacobian(rollout, self.model._critic_parameters, generator)
        made = make_solver(solver, rank=len(rollout), sketch="values", max_iter=1000, tol=1e-12)
        assert made is not None
        response = best_response(rollout, jacobian, weights, values, made, DAMPING, "gauss_newton", generator)
        assert response is not None and response.ok
        return response, jacobian.gradient(rollout.return_gradient(weights))


@pytest.fixture
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sampling: the curvature of all states."""
    monkeypatch.setattr(recurrent, "STATES_PER_ROW", 1)
    monkeypatch.setattr(recurrent, "MAX_PASSES", 10**6)


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float) -> None:
    assert th.linalg.vector_norm(actual - expected) <= tolerance * th.linalg.vector_norm(expected)


@pytest.mark.parametrize("actions", [DISCRETE, TORQUES], ids=["Discrete", "Box"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_run_along_the_rollout(architecture: str, actions: Any) -> None:
    p = Problem(architecture, actions, seed=0)
    assert 0 < len(p.rollout.truncated) < p.rollout.done.sum() and not p.rollout.done[-1].all()
    th.testing.assert_close(p.engine.values(p.rollout), p.critic().detach(), rtol=1e-12, atol=1e-12)
    th.testing.assert_close(p.engine.log_prob(p.rollout), p.actor().detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("every_row")
@pytest.mark.parametrize("solver", ["exact", "nystrom", "cg"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_is_that_of_dense_matrices(architecture: str, solver: str) -> None:
    for seed in range(2):
        p = Problem(architecture, DISCRETE, seed)
        expected = truth(p.brute_force(), DAMPING, "gauss_newton")
        response, g = p.response(solver)
        assert_close(g, expected.g, 1e-9)
        # u is a central difference along v
        assert_close(response.e, expected.e, 1e-7)


@pytest.mark.usefixtures("every_row")
def test_correction_is_the_mixed_derivative() -> None:
    p = Problem("LSTM", DISCRETE, seed=3)
    definition = p.brute_force()
    expected = truth(definition, DAMPING, "gauss_newton")
    response, _ = p.response()
    # A policy gradient with the weights 2 e A in place of the advantages, of the steps that are not clipped
    ratio = (definition.log_prob(definition.theta) - p.rollout.old_log_prob).exp()
    active = ratio * definition.A <= ratio.clamp(1 - CLIP, 1 + CLIP) * definition.A
    assert 0 < active.sum() < len(active)
    weights = 2 * response.e * definition.A * active * ratio.detach()
    theta = definition.theta.clone().requires_grad_()
    (correction,) = th.autograd.grad((weights * definition.log_prob(theta)).mean(), theta)
    assert_close(correction, expected.correction, 1e-7)


def test_advantages_follow_the_critic() -> None:
    p = Problem("LSTM", DISCRETE, seed=0)
    values, n = p.critic().detach(), len(p.rollout)
    before = p.values_of_rollout
    change = lambda_returns(p.rollout, values) - lambda_returns(p.rollout, before) - (values - before)[:n]
    advantages = p.rollout.advantages_after(p.engine.values(p.rollout) - before)
    th.testing.assert_close(advantages, p.rollout.advantages + change, rtol=1e-10, atol=1e-10)


def test_what_is_sampled_keeps_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem("LSTM", DISCRETE, seed=0)
    jacobian = p.engine.jacobian(p.rollout, p.model._critic_parameters, th.Generator().manual_seed(0))
    assert len(jacobian.curvature_states) == -(-len(p.rollout) // recurrent.STATES_PER_ROW)
    monkeypatch.setattr(recurrent, "MAX_PASSES", 0.1)
    fewer = p.engine.jacobian(p.rollout, p.model._critic_parameters, th.Generator().manual_seed(0))
    assert 1 <= len(fewer.curvature_states) < len(jacobian.curvature_states)


@pytest.mark.parametrize("batch_size", [1, 7, 22, 50])
def test_a_pass_has_each_step_once_in_time_order(batch_size: int) -> None:
    p = Problem("LSTM", DISCRETE, seed=0)
    p.engine.batch_size = batch_size
    states = cast(dict[str, Any], p.rollout.observations)
    pieces = list(p.engine._actor_minibatches(p.rollout))
    assert sorted(th.cat(pieces).tolist()) == list(range(len(p.rollout)))
    for piece in pieces:
        sequences = Sequences(piece, states["cut"][piece])
        assert th.equal(sequences.real(sequences.rows.flatten()), piece)
        n_envs = p.rollout.done.shape[1]
        for rows, real in zip(sequences.rows, sequences.is_real, strict=True):
            own = rows[real]
            assert (own.diff() == n_envs).all() and not states["cut"][own[1:]].any()
            assert not p.rollout.done.flatten()[own[:-1]].any()


def test_with_a_critic_that_stands_still_it_is_recurrent_ppo(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {
        "n_steps": 16, "batch_size": 32, "n_epochs": 3, "ent_coef": 0.05, "learning_rate": 3e-3, "seed": 0, "device": "cpu",
        "policy_kwargs": {"lstm_hidden_size": 4},
    }  # fmt: skip
    ppo = RecurrentPPO("MlpLstmPolicy", vec_env(SpaceEnv(), 2), vf_coef=0.0, **arguments)
    blpo = RecurrentBLPO("MlpLstmPolicy", vec_env(SpaceEnv(), 2), ihvp_solver="none", critic_learning_rate=0.0, **arguments)
    # Both start their passes at a random step
    monkeypatch.setattr(np.random, "randint", lambda n: n - 5)
    monkeypatch.setattr(recurrent.th, "randint", lambda n, size, device: th.tensor(5))
    start = copy.deepcopy(ppo.policy.state_dict())
    blpo.policy.load_state_dict(start, strict=False)
    for model in (ppo, blpo):
        th.manual_seed(0)
        model.learn(32)
    expected = ppo.policy.state_dict()
    assert not th.equal(expected["lstm_actor.weight_hh_l0"], start["lstm_actor.weight_hh_l0"])
    for name, parameter in blpo.policy.state_dict().items():
        th.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=name)

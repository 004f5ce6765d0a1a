"""
One actor step of the whole package on real environments, float32, against dense automatic differentiation in float64.
"""

import copy
from collections.abc import Callable

import pytest
import torch as th
from brute_force import as_flat_function, truth
from models import collect_rollout
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.gae import LambdaReturn

SOLVERS = [
    ("exact", {}, "gauss_newton"),
    ("cg", {"max_iter": 1000, "tol": 1e-9}, "gauss_newton"),
    ("nystrom", {"rank": 10**6}, "gauss_newton"),
    ("nystrom", {"rank": 10**6, "sketch": "columns"}, "gauss_newton"),
    ("nystrom_cg", {"max_iter": 1000, "tol": 1e-9}, "gauss_newton"),
    ("exact", {}, "hessian"),
]


class LogProb(nn.Module):
    """The MLP policy's log-probability of fixed actions, from SB3's own layers."""

    def __init__(self, policy, actions: th.Tensor) -> None:
        super().__init__()
        self.body = nn.Sequential(copy.deepcopy(policy.mlp_extractor.policy_net), copy.deepcopy(policy.action_net)).double()
        if hasattr(policy, "log_std"):
            self.log_std = nn.Parameter(policy.log_std.detach().double())
        self.actions = actions

    def forward(self, observations: th.Tensor) -> th.Tensor:
        outputs = self.body(observations)
        if hasattr(self, "log_std"):
            return th.distributions.Normal(outputs, self.log_std.exp()).log_prob(self.actions.double()).sum(1)
        return th.distributions.Categorical(logits=outputs).log_prob(self.actions)


@pytest.mark.parametrize(("solver", "ihvp_kwargs", "curvature"), SOLVERS)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_one_actor_step(env_id, solver, ihvp_kwargs, curvature):
    env = VecNormalize(make_vec_env(env_id, 1, seed=0))
    learning_rate, damping, n = 0.05, 0.02, 48
    model = BLPO(
        "MlpPolicy", env, seed=0, n_steps=n, batch_size=n, n_epochs=1, n_critic_updates=2,
        learning_rate=learning_rate, critic_learning_rate=1e-3, max_grad_norm=1e6, max_correction_ratio=None,
        ihvp_solver=solver, ihvp_kwargs={"damping": damping, **ihvp_kwargs}, curvature=curvature,
        policy_kwargs={"optimizer_class": th.optim.SGD, "net_arch": [8, 8]},
    )  # fmt: skip
    collect_rollout(model)
    # Away from the rollout's policy, so that ratios differ from 1 and some are clipped
    with th.no_grad():
        for parameter in model.policy.action_net.parameters():
            parameter += 0.3 * th.randn_like(parameter)
    before = copy.deepcopy(model.policy)
    (segment,) = model._segments()
    model.train()

    after = model.policy
    block = segment.lambda_return
    segment = segment._replace(
        observations=segment.observations.double(),
        old_log_prob=segment.old_log_prob.double(),
        returns=segment.returns.double(),
        lambda_return=LambdaReturn(
            block.rewards.double(), block.done.double(), block.last_returns, model.gamma, model.gae_lambda
        ),
    )
    # The critic at the end is the one that the actor's step saw
    critic = nn.Sequential(copy.deepcopy(after.mlp_extractor.value_net), copy.deepcopy(after.value_net)).double()
    critic_function, omega = as_flat_function(critic, segment.observations)
    log_prob, theta = as_flat_function(LogProb(before, segment.actions), segment.observations[:n])
    expected = truth(
        segment, lambda x: critic_function(x).flatten(), omega, log_prob, theta,
        0.2, damping, curvature,
    )  # fmt: skip
    gradient = expected.direct + expected.correction
    theta_after = nn.utils.parameters_to_vector(LogProb(after, segment.actions).parameters()).detach()
    step = (theta_after - theta) / learning_rate
    clipped = ((log_prob(theta) - segment.old_log_prob).exp() - 1).abs() > 0.2
    assert 0 < clipped.sum() < n and expected.correction.norm() > 0.1 * expected.direct.norm()
    assert (step - gradient).norm() <= 1e-4 * gradient.norm(), float((step - gradient).norm() / gradient.norm())


def by_autograd(model, log_prob, entropy, old_log_prob, advantages) -> list[th.Tensor]:
    """The direct gradient as PPO has it: of the clipped surrogate."""
    ratio = th.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(0.8, 1.2)
    surrogate = (th.where(ratio * advantages <= clipped * advantages, ratio, clipped) * advantages).mean()
    loss = surrogate + model.ent_coef * entropy.mean()
    return list(th.autograd.grad(loss, model.policy.optimizer.param_groups[0]["params"]))


def by_weights(model, log_prob, entropy, old_log_prob, advantages) -> list[th.Tensor]:
    """The same as a weighted sum of grad log pi and the entropies' gradients."""
    n = len(log_prob)
    ratio = th.exp(log_prob - old_log_prob).detach()
    active = ratio * advantages <= ratio.clamp(0.8, 1.2) * advantages
    weights = [active * (ratio / n) * advantages, th.full_like(ratio, model.ent_coef / n)]
    return list(th.autograd.grad([log_prob, entropy], model.policy.optimizer.param_groups[0]["params"], weights))


def nested_actor_critic(model: BLPO, direct_gradient: Callable[..., list[th.Tensor]]) -> None:
    """The nested actor-critic written down plainly: what ``train()`` without a solver must be."""
    policy, buffer = model.policy, model.rollout_buffer
    actor_optimizer, critic_optimizer = policy.optimizer, model.critic_optimizer
    n_steps, n_envs = buffer.rewards.shape
    length = model.batch_size
    blocks = [(env, start) for env in range(n_envs) for start in range(0, n_steps, length)]
    policy.set_training_mode(True)
    for _ in range(model.n_epochs):
        for index in th.randperm(len(blocks)).tolist():
            env, start = blocks[index]
            stop = min(start + length, n_steps)
            observations = th.as_tensor(buffer.observations[start:stop, env])
            returns = th.as_tensor(buffer.returns[start:stop, env])
            for _ in range(model.n_critic_updates):
                critic_optimizer.zero_grad()
                nn.functional.mse_loss(policy.predict_values(observations).flatten(), returns).backward()
                critic_optimizer.step()
            segments = [s for s in model._segments() if s.n_transitions == stop - start]
            (segment,) = [s for s in segments if th.equal(s.returns, returns)]
            with th.no_grad():
                values = policy.predict_values(segment.observations).flatten()
            advantages = segment.advantages(values)
            distribution = policy.get_distribution(observations)
            log_prob, entropy = distribution.log_prob(segment.actions), distribution.entropy()
            gradients = direct_gradient(model, log_prob, entropy, segment.old_log_prob, advantages)
            norm = th.cat([gradient.flatten() for gradient in gradients]).norm()
            clip = (model.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            for parameter, gradient in zip(actor_optimizer.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = -clip * gradient
            actor_optimizer.step()


def trained_both_ways(
    env_id: str, direct_gradient: Callable[..., list[th.Tensor]], critic_learning_rate: float = 1e-3, **policy_kwargs
) -> tuple[BLPO, BLPO]:
    def collected() -> BLPO:
        model = BLPO(
            "MlpPolicy", make_vec_env(env_id, 2, seed=0), seed=0, n_steps=40, batch_size=16, n_epochs=3, ent_coef=0.01,
            ihvp_solver="none", critic_learning_rate=critic_learning_rate, policy_kwargs=policy_kwargs,
        )  # fmt: skip
        return collect_rollout(model)

    with pytest.warns(UserWarning, match="truncated mini-batch of size 8"):
        blpo, plain = collected(), collected()
    start = copy.deepcopy(blpo.policy.state_dict())
    th.manual_seed(1)
    blpo.train()
    th.manual_seed(1)
    nested_actor_critic(plain, direct_gradient)
    assert all(not th.equal(value, start[name]) for name, value in blpo.policy.state_dict().items())
    return blpo, plain


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_none_is_the_nested_actor_critic_bit_for_bit(env_id):
    # An activation with parameters is not differentiated by hand
    blpo, plain = trained_both_ways(env_id, by_weights, activation_fn=nn.PReLU)
    assert blpo.actor.chain is None and blpo.critic.chain is None
    for (name, a), b in zip(blpo.policy.state_dict().items(), plain.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.PReLU])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_none_is_the_nested_actor_critic(env_id, activation):
    # SGD, for Adam makes steps of full size from differences by rounding
    blpo, plain = trained_both_ways(env_id, by_autograd, 1e-6, activation_fn=activation, optimizer_class=th.optim.SGD)
    assert (blpo.actor.chain is None) == (blpo.critic.chain is None) == (activation is nn.PReLU)
    for (name, a), b in zip(blpo.policy.state_dict().items(), plain.policy.state_dict().values(), strict=True):
        th.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)

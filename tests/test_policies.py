"""Policies that change after the model was made, and policies that are not SB3's own, treated as PPO treats them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from envs import TORQUES, SpaceEnv
from models import logged, small
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.nn.utils import prune

from sb3_blpo import BLPO

SOLVERS = ["nystrom", "cg", "exact", "none"]


def changed(model: BLPO, change: Callable[[], Any]) -> set[str]:
    """The parameters that are others afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    change()
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    return {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])}


def continuous(**arguments: Any) -> BLPO:
    return small(env=SpaceEnv(action_space=TORQUES), **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("part", ["log_std", "action_net", "policy_net", "value_net", "actor", "critic", "all"])
def test_frozen_and_trained_again(part: str, solver: str) -> None:
    model = continuous(ihvp_solver=solver).learn(16)
    names = {name for name, _ in model.policy.named_parameters()}
    of_critic = {name for name in names if "value_net" in name}
    frozen = {"actor": names - of_critic, "critic": of_critic, "all": names}.get(part, {n for n in names if part in n})
    assert frozen
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names - frozen
    model.policy.requires_grad_(True)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


def test_frozen_by_the_policy_and_trained_later() -> None:
    class Frozen(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.mlp_extractor.policy_net.requires_grad_(False)

    model = small(Frozen)
    names = {name for name, _ in model.policy.named_parameters()}
    assert changed(model, lambda: model.learn(16)) == {name for name in names if "policy_net" not in name}
    model.policy.requires_grad_(True)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_policy(solver: str) -> None:
    model = continuous(ihvp_solver=solver).learn(16)
    other = continuous(seed=1, policy_kwargs={"net_arch": [5], "activation_fn": nn.ReLU}).policy
    old = model.policy
    before = [parameter.detach().clone() for parameter in old.parameters()]
    model.policy = other
    assert len(changed(model, lambda: model.learn(16, reset_num_timesteps=False))) == len(list(other.parameters()))
    assert all(th.equal(a, b) for a, b in zip(before, old.parameters(), strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_optimizer(solver: str) -> None:
    model = continuous(ihvp_solver=solver).learn(16)
    names = {name for name, _ in model.policy.named_parameters()}
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=1e-3)
    model.critic_optimizer = th.optim.SGD(list(model.critic.trainable.values()), lr=1e-3)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names
    assert not model.policy.optimizer.state


@pytest.mark.parametrize("solver", SOLVERS)
def test_hooks_of_parameters(solver: str) -> None:
    """What masks gradients, logs them or clips them."""
    model = continuous(ihvp_solver=solver)
    weights = {"mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.0.weight", "log_std"}
    names = {name for name, _ in model.policy.named_parameters()}
    handles = [p.register_hook(th.zeros_like) for name, p in model.policy.named_parameters() if name in weights]
    assert changed(model, lambda: model.learn(16)) == names - weights
    for handle in handles:
        handle.remove()
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


@pytest.mark.parametrize("network", ["policy_net", "value_net"])
def test_hooks_of_modules(network: str) -> None:
    model = small()
    seen: list[int] = []
    module = getattr(model.policy.mlp_extractor, network)
    handle = module[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model.learn(16)
    assert 8 in seen or 9 in seen  # a minibatch, with the state after it for the values
    handle.remove()
    seen.clear()
    model.learn(16)
    assert not seen


@pytest.mark.parametrize("network", ["policy_net", "value_net"])
def test_pruned_weights_stay_zero(network: str) -> None:
    model = small()
    layer = getattr(model.policy.mlp_extractor, network)[0]
    prune.random_unstructured(layer, "weight", 0.5)
    before = layer.weight_orig.detach().clone()
    model.learn(32)
    moved = layer.weight_orig != before
    assert moved[layer.weight_mask == 1].any() and not moved[layer.weight_mask == 0].any()


def test_spectral_norm() -> None:
    """Its weight is computed in a hook, from a parameter that comes after the bias."""

    class Normed(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.mlp_extractor.value_net[0] = nn.utils.spectral_norm(self.mlp_extractor.value_net[0])
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    model = small(Normed)
    model.policy.set_training_mode(False)
    observations, returns = th.randn(8, 3), th.randn(8)
    loss = (model.policy.predict_values(observations).flatten() - returns).square().mean()
    gradients = th.autograd.grad(loss, list(model.critic.trainable.values()))
    th.testing.assert_close(
        model.critic.loss_and_gradient(observations, returns), (loss.detach(), th.cat([g.flatten() for g in gradients]))
    )
    assert "mlp_extractor.value_net.0.weight_orig" in changed(model, lambda: model.learn(32))


@pytest.mark.parametrize("network", ["policy_net", "value_net"])
@pytest.mark.parametrize("tied", ["layer", "weight"])
def test_a_layer_used_twice(network: str, tied: str) -> None:
    class Twice(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            layers = list(getattr(self.mlp_extractor, network))
            again = layers[2] if tied == "layer" else nn.Linear(8, 8)
            if tied == "weight":
                again.weight = layers[2].weight
            setattr(self.mlp_extractor, network, nn.Sequential(*layers, again, nn.Tanh()))
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    model = small(Twice, policy_kwargs={"net_arch": [8, 8]})
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


def test_a_parameter_without_gradient_in_training() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.at_evaluation = nn.Linear(3, 8), nn.Linear(3, 8)

        def forward(self, x: th.Tensor) -> th.Tensor:
            return self.always(x) if self.training else self.always(x) + self.at_evaluation(x)

    class Branched(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.mlp_extractor.policy_net, self.mlp_extractor.value_net = nn.Sequential(Branches()), nn.Sequential(Branches())
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    model = small(Branched)
    expected = {name for name, _ in model.policy.named_parameters() if "at_evaluation" not in name}
    assert changed(model, lambda: model.learn(16)) == expected


class Cold(ActorCriticPolicy):
    """Acts with less noise than its distribution has, and says so in what PPO calls."""

    def _cold(self, obs: th.Tensor) -> Any:
        distribution = self.get_distribution(obs)
        normal: Any = distribution.distribution
        distribution.distribution = th.distributions.Normal(normal.mean, 0.3 * normal.stddev)
        return distribution

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        distribution = self._cold(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution = self._cold(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


def test_own_evaluate_actions() -> None:
    model = small(Cold, SpaceEnv(action_space=TORQUES), batch_size=16).learn(16)
    assert logged(model)["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert logged(model)["clip_fraction"] == 0


def test_own_features() -> None:
    class Counted(ActorCriticPolicy):
        n_calls = 0

        def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
            Counted.n_calls += 1
            return super().extract_features(obs, features_extractor)

    small(Counted).learn(16)
    assert Counted.n_calls >= 16


class Copies(BaseCallback):
    """What a callback may do with the policy and the buffer."""

    def _on_step(self) -> bool:
        self.policies = [copy.deepcopy(self.model.policy), pickle.loads(pickle.dumps(self.model.policy))]
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        self.buffers = [copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))]
        self.values = self.model.policy(th.zeros(1, 3))[1]


def test_copies_made_within_a_rollout() -> None:
    callback = Copies()
    model = small().learn(16, callback)
    observations = th.randn(4, 3)
    for policy in callback.policies:
        assert policy(observations)[1].isfinite().all()
        assert policy.forward.__self__ is policy
    assert callback.values.isfinite().all()
    for buffer in callback.buffers:
        buffer.compute_returns_and_advantage(th.zeros(1), model._last_episode_starts)
        assert buffer.full
    assert "forward" not in vars(model.policy)


def test_a_forward_of_the_users_is_called_and_kept() -> None:
    model = small()
    calls: list[int] = []
    original = model.policy.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.policy.forward = forward  # type: ignore[method-assign]
    model.learn(16)
    assert len(calls) == 16
    assert model.policy.forward is forward


def test_set_random_seed() -> None:
    model = small(env="CartPole-v1")
    parameters: Any = copy.deepcopy(model.get_parameters())
    trained = []
    for _ in range(2):
        model.set_parameters(parameters)
        model.set_random_seed(7)
        model._last_obs = None
        model.learn(32)
        trained.append([parameter.detach().clone() for parameter in model.policy.parameters()])
    assert all(th.equal(a, b) for a, b in zip(*trained, strict=True))

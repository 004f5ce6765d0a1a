"""Policies that change after the model was made, and policies that are not SB3's own, treated as PPO treats them."""

import copy
import io
import pickle
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch as th
from envs import IMAGE, TORQUES, SpaceEnv
from gymnasium import spaces
from models import built_with, changed, differences, logged, small, state_of
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import FloatSchedule
from torch import nn
from torch.nn.utils import prune

from sb3_blpo import BLPO

SOLVERS = ["nystrom", "cg", "exact", "none"]


def continuous(**arguments: Any) -> BLPO:
    return small(env=SpaceEnv(action_space=TORQUES), **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize("part", ["log_std", "action_net", "policy_net", "value_net", "actor", "critic", "all"])
def test_frozen_and_trained_again(part: str, ent_coef: float, solver: str) -> None:
    model = continuous(ihvp_solver=solver, ent_coef=ent_coef).learn(16)
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
    model = small(built_with(lambda policy: policy.mlp_extractor.policy_net.requires_grad_(False)))
    names = {name for name, _ in model.policy.named_parameters()}
    assert changed(model, lambda: model.learn(16)) == {name for name in names if "policy_net" not in name}
    model.policy.requires_grad_(True)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


def test_a_common_trunk_cannot_be_trained_later() -> None:
    class Trunk(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.trunk = nn.Linear(3, 3).requires_grad_(False)

        def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
            return super().extract_features(self.trunk(obs), features_extractor)

        def get_distribution(self, obs: Any) -> Any:
            return super().get_distribution(self.trunk(obs))

        def predict_values(self, obs: Any) -> Any:
            return super().predict_values(self.trunk(obs))

    model = small(Trunk)
    assert not {name for name in changed(model, lambda: model.learn(16)) if "trunk" in name}
    model.policy.requires_grad_(True)
    model.save(io.BytesIO())  # what cannot be trained can be kept
    with pytest.raises(ValueError, match=r"`trunk.weight` of Trunk belongs to both"):
        model.learn(16)


def test_a_frozen_parameter_that_allows_no_gradient() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(th.zeros(3), requires_grad=False)

        def forward(self, x: th.Tensor) -> th.Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            return x - self.mean.detach().clone()

    def centre(policy: Any) -> None:
        for name in ("policy_net", "value_net"):
            setattr(policy.mlp_extractor, name, nn.Sequential(Running(), *getattr(policy.mlp_extractor, name)))

    model = small(built_with(centre), ihvp_solver="none")
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


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
    # Of all parameters, as PPO's is: the critic's stay with the critic's
    model.policy.optimizer = th.optim.SGD(model.policy.parameters(), lr=1e-3)
    model.critic_lr_schedule = FloatSchedule(0.0)
    of_actor = {name for name in names if "value_net" not in name}
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == of_actor
    model.critic_lr_schedule = FloatSchedule(1e-3)
    model.critic_optimizer = th.optim.SGD(list(model.critic.trainable.values()), lr=1e-3)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


def test_another_module() -> None:
    """New parameters are trained, by new optimizers."""
    model = small().learn(16)
    model.policy.value_net = nn.Linear(8, 1)
    nn.utils.parametrizations.weight_norm(model.policy.mlp_extractor.policy_net[0])
    names = {name for name, _ in model.policy.named_parameters()}
    assert any("original" in name for name in names)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


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


def test_hooks_of_parameters_see_what_is_minimised() -> None:
    """Positive gradients alone are let through: the parameter falls."""
    model = small(policy_kwargs={"net_arch": [8], "optimizer_class": th.optim.SGD}, learning_rate=0.1)
    for network in (model.policy.mlp_extractor.policy_net, model.policy.mlp_extractor.value_net):
        network[0].weight.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[operator]
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(16)
    for name in ("mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.0.weight"):
        change = model.policy.state_dict()[name] - before[name]
        assert change.min() < 0 and change.max() <= 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("network", ["policy_net", "value_net"])
def test_hooks_of_modules(network: str, solver: str) -> None:
    """What logs activations and gradients; nothing else changes."""
    plain = small(ihvp_solver=solver).learn(16)
    model = small(ihvp_solver=solver)
    seen: list[Any] = []
    module = getattr(model.policy.mlp_extractor, network)[0]
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().cpu().numpy())),
        module.register_full_backward_hook(lambda module, by_inputs, by_outputs: seen.append(by_outputs[0].numpy())),
    ]
    model.learn(16)
    assert 8 in {len(array) for array in seen}  # a minibatch
    for (name, a), b in zip(model.policy.named_parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, msg=name)
    for handle in handles:
        handle.remove()
    seen.clear()
    model.learn(16)
    assert not seen


def test_a_hook_that_changes_the_output() -> None:
    model = small()
    model.policy.mlp_extractor.value_net[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    model._look_at_policy()
    observations, v, w = th.randn(6, 3), th.randn(41), th.randn(6)
    jacobian = model.critic.jacobian(observations, th.Generator())
    values = model.policy.predict_values(observations).flatten()
    parameters = list(model.critic.trainable.values())
    rows = [th.autograd.grad(value, parameters, retain_graph=True) for value in values]
    J = th.stack([th.cat([gradient.flatten() for gradient in row]) for row in rows])
    th.testing.assert_close((jacobian.values, jacobian.J_v(v), jacobian.Jt_w(w)), (values.detach(), J @ v, J.T @ w))


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

    model = small(built_with(lambda policy: nn.utils.spectral_norm(policy.mlp_extractor.value_net[0])))
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
    def use_twice(policy: Any) -> None:
        layers = list(getattr(policy.mlp_extractor, network))
        again = layers[2] if tied == "layer" else nn.Linear(8, 8)
        if tied == "weight":
            again.weight = layers[2].weight
        setattr(policy.mlp_extractor, network, nn.Sequential(*layers, again, nn.Tanh()))

    model = small(built_with(use_twice), policy_kwargs={"net_arch": [8, 8]})
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


def test_a_parameter_without_gradient_in_training() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.at_evaluation = nn.Linear(3, 8), nn.Linear(3, 8)

        def forward(self, x: th.Tensor) -> th.Tensor:
            return self.always(x) if self.training else self.always(x) + self.at_evaluation(x)

    def branch(policy: Any) -> None:
        policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net = Branches(), Branches()

    model = small(built_with(branch))
    expected = {name for name, _ in model.policy.named_parameters() if "at_evaluation" not in name}
    assert changed(model, lambda: model.learn(16)) == expected


class OwnWay(ActorCriticPolicy):
    """Acts and is evaluated in its own way."""

    def own_distribution(self, obs: th.Tensor) -> Any:
        return self.get_distribution(obs)

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        distribution = self.own_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution = self.own_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class Cold(OwnWay):
    """Acts with less noise than its distribution has, and says so in what PPO calls."""

    def own_distribution(self, obs: th.Tensor) -> Any:
        distribution = super().own_distribution(obs)
        normal: Any = distribution.distribution
        distribution.distribution = th.distributions.Normal(normal.mean, 0.3 * normal.stddev)
        return distribution


class Scaled(ActorCriticPolicy):
    """Features that SB3's ``get_distribution()`` does not know of."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return 5 * super().extract_features(obs, features_extractor)


class OwnDistribution(ActorCriticPolicy):
    """A distribution that ``forward()`` does not know of."""

    def get_distribution(self, obs: Any) -> Any:
        return super().get_distribution(5 * obs)


def hooked(policy: ActorCriticPolicy) -> None:
    def louder(module: nn.Module, inputs: Any, output: Any) -> Any:
        return tuple(5 * part for part in output) if isinstance(output, tuple) else 5 * output

    for module in (policy.mlp_extractor, policy.features_extractor, policy.features_extractor.flatten):
        module.register_forward_hook(louder)  # type: ignore[union-attr]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("policy", [Cold, Scaled, OwnDistribution, "hooked"])
def test_what_acts_is_what_is_trained(policy: Any, solver: str) -> None:
    model = small(
        ActorCriticPolicy if policy == "hooked" else policy, SpaceEnv(action_space=TORQUES), batch_size=16, ihvp_solver=solver
    )
    if policy == "hooked":
        hooked(model.policy)
    else:
        # Larger than those of the initialisation, under which every distribution is about the same
        nn.init.normal_(model.policy.action_net.weight)  # type: ignore[arg-type]
    model.learn(16)
    # The only minibatch is evaluated before the actor's first step
    assert logged(model)["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert logged(model)["clip_fraction"] == 0


def louder(name: str, method: str = "forward") -> Callable[[Any], None]:
    """Replace a method of one object."""

    def change(policy: Any) -> None:
        owner = policy.get_submodule(name)
        original = getattr(owner, method)
        setattr(owner, method, lambda *args, **kwargs: 3 * original(*args, **kwargs))

    return change


def colder(policy: Any) -> None:
    original = policy._get_action_dist_from_latent

    def distribution(latent: th.Tensor) -> Any:
        found = original(latent)
        found.distribution = th.distributions.Normal(found.distribution.mean, 0.3 * found.distribution.stddev)
        return found

    policy._get_action_dist_from_latent = distribution


class Wider(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Any:
        return super().proba_distribution(mean_actions, log_std + 1)


REPLACED: dict[str, Callable[[Any], Any]] = {
    "actor's activation": lambda policy: setattr(policy.mlp_extractor.policy_net, "1", nn.ReLU()),
    "critic's activation": lambda policy: setattr(policy.mlp_extractor.value_net, "1", nn.ReLU()),
    "extractor": louder("features_extractor"),
    "mlp_extractor.forward_actor": louder("mlp_extractor", "forward_actor"),
    "mlp_extractor.forward_critic": louder("mlp_extractor", "forward_critic"),
    "layer of the actor": louder("mlp_extractor.policy_net.0"),
    "layer of the critic": louder("mlp_extractor.value_net.0"),
    "action_net": louder("action_net"),
    "value_net": louder("value_net"),
    "_get_action_dist_from_latent": colder,
    "action_dist": lambda policy: setattr(policy, "action_dist", Wider(2)),
    "action_dist.proba_distribution": lambda policy: setattr(
        policy.action_dist, "proba_distribution", Wider(2).proba_distribution
    ),
}


@pytest.mark.parametrize("solver", ["nystrom", "exact", "none"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_what_is_replaced_on_one_object(replaced: str, solver: str) -> None:
    """Rollouts and updates are those of the policy as it is now."""
    model = continuous(ihvp_solver=solver, batch_size=16).learn(16)
    nn.init.normal_(model.policy.action_net.weight)  # type: ignore[arg-type]
    REPLACED[replaced](model.policy)
    losses = []

    class Compare(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer: Any = self.model.rollout_buffer  # type: ignore[attr-defined]
            observations, actions = (th.as_tensor(x[:, 0]) for x in (buffer.observations, buffer.actions))
            values, log_prob, _ = self.model.policy.evaluate_actions(observations, actions)  # type: ignore[operator]
            np.testing.assert_allclose(log_prob.detach(), buffer.log_probs[:, 0], rtol=1e-4)
            np.testing.assert_allclose(values.flatten().detach(), buffer.values[:, 0], rtol=1e-4, atol=1e-6)
            losses.append(((values.flatten().detach().numpy() - buffer.returns[:, 0]) ** 2).mean())

    model.learn(16, Compare(), reset_num_timesteps=False)
    assert logged(model)["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert logged(model)["critic_loss_before"] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("method", ["evaluate_actions", "predict_values", "extract_features"])
def test_a_method_of_the_users_is_called(method: str) -> None:
    model = small(batch_size=16).learn(16)
    spy = Mock(wraps=getattr(model.policy, method))
    setattr(model.policy, method, spy)
    model.learn(16, reset_num_timesteps=False)
    assert spy.called


@pytest.mark.parametrize("how", ["copied", "compiled"])
def test_optimizers_keep_their_state(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", th.distributions.Distribution._validate_args)
    model = small().learn(16)
    other = copy.deepcopy(model)
    if how == "compiled":
        other.policy = th.compile(other.policy, backend="eager")  # type: ignore[assignment]
    optimizers = (other.policy.optimizer, other.critic_optimizer)
    for each in (model, other):
        th.manual_seed(0)
        each.learn(16)
    assert (other.policy.optimizer, other.critic_optimizer) == optimizers
    if how == "copied":
        assert not differences(state_of(model), state_of(other))


def test_a_frozen_extractor_in_place_of_a_trained_one() -> None:
    class Extractor(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, 4)
            self.layer = nn.Linear(3, 4)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return th.tanh(self.layer(observations))

    model = small(policy_kwargs={"features_extractor_class": Extractor, "net_arch": [8]}).learn(16)
    frozen = Extractor(model.observation_space).requires_grad_(False)
    for name in ("features_extractor", "pi_features_extractor", "vf_features_extractor"):
        setattr(model.policy, name, frozen)
    names = {name for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


class Looked(BaseFeaturesExtractor):
    """Looks up what the first number stands for: four things."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 5)
        self.table = nn.Embedding(4, 5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.table(observations[:, 0].long())


@pytest.mark.parametrize(
    ("space", "policy_kwargs"),
    [
        (spaces.Box(-np.finfo(np.float64).max, np.finfo(np.float64).max, (3,), np.float64), {}),
        (spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (27,)), {"activation_fn": nn.ReLU}),
        (spaces.Box(-1, 10, (3,)), {"features_extractor_class": Looked}),
        (spaces.Box(-np.inf, np.inf, (3,)), {"features_extractor_class": Looked}),
        (spaces.Box(7, 9, (3,), np.int64), {}),
    ],
)
def test_spaces_whose_samples_tell_little(space: spaces.Box, policy_kwargs: dict[str, Any]) -> None:
    """Networks are looked at with an observation that they can take."""
    env = SpaceEnv(spaces.Box(0, 1, space.shape))
    env.observation_space = space
    for seed in range(5):
        small(env=env, policy_kwargs=policy_kwargs, seed=seed)


class Branches(BaseFeaturesExtractor):
    """Which part sees an observation depends on it."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 5)
        self.positive, self.negative = nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = observations.new_zeros(len(observations), 5)
        positive = observations[:, 0] > 0
        for rows, layer in ((positive, self.positive), (~positive, self.negative)):
            if rows.any():
                features[rows] = layer(observations[rows])
        return features


def test_a_network_with_branches() -> None:
    model = small(batch_size=16, policy_kwargs={"features_extractor_class": Branches})
    assert changed(model, lambda: model.learn(64)) == {name for name, _ in model.policy.named_parameters()}
    assert logged(model)["correction_skipped"] == 0


class CriticsOwnFeatures(OwnWay):
    """The critic has a features extractor of another kind, though nothing says that they are not shared."""

    def _build(self, lr_schedule: Any) -> None:
        self.vf_features_extractor = Looked(self.observation_space)
        super()._build(lr_schedule)

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.value_net(self.mlp_extractor.forward_critic(self.vf_features_extractor(obs.abs())))


def test_a_features_extractor_of_the_critics_own() -> None:
    model = small(CriticsOwnFeatures, policy_kwargs={"features_extractor_class": Branches}).learn(32)
    assert type(model.policy.vf_features_extractor) is Looked
    assert type(model.policy.pi_features_extractor) is Branches


class Wrapped(nn.Module):
    """Around a features extractor."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.extractor, self.features_dim = extractor, extractor.features_dim

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.extractor(observations)


def test_a_wrapped_features_extractor() -> None:
    """What the policy had made of it before is the one inside: the critic gets a copy, wrapper and all."""

    def change(policy: Any) -> None:
        policy.features_extractor = Wrapped(policy.features_extractor)

    model = small(built_with(change), policy_kwargs={"features_extractor_class": Branches}).learn(32)
    assert type(model.policy.vf_features_extractor) is Wrapped


class Obstinate(CategoricalDistribution):
    """Takes the first action, or none at all."""

    broken = False

    def get_actions(self, *, deterministic: bool = False) -> th.Tensor:  # type: ignore[override]
        if self.broken:
            raise RuntimeError("an error of the user's")
        return th.zeros(len(self.distribution.logits), dtype=th.long)


def test_get_actions_of_the_users() -> None:
    model = small().learn(16)
    model.policy.action_dist = Obstinate(3)
    model.learn(16, reset_num_timesteps=False)
    assert not model.rollout_buffer.actions.any()
    model.policy.action_dist.broken = True
    with pytest.raises(RuntimeError, match=r"^an error of the user's$"):
        model.learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
def test_other_dtypes_are_refused(dtype: th.dtype) -> None:
    def change(policy: Any) -> None:
        policy.value_net.to(dtype)

    with pytest.raises(ValueError, match=r"trains parameters of torch.float32, but `value_net.weight` of Changed is torch"):
        small(built_with(change))


@pytest.mark.parametrize("shape", [(), (1,), (1, 2), (2,)])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_shapes_of_log_std(shape: tuple[int, ...], ent_coef: float) -> None:
    """SB3 takes whatever broadcasts: one standard deviation for all actions is possible, too."""

    def change(policy: Any) -> None:
        policy.log_std = nn.Parameter(th.full(shape, -0.3))

    gradients, entropies = [], []
    for by_hand in (True, False):
        model = continuous(policy=built_with(change), ent_coef=ent_coef, learning_rate=0.0, batch_size=16)
        if not by_hand:
            model.policy.action_net.register_forward_hook(lambda *_: None)
        model.set_random_seed(0)
        model.learn(16)
        assert (model.actor.chain is not None) == (by_hand and shape in ((1, 2), (2,)))
        gradients.append([parameter.grad for parameter in model.actor.parameters])
        entropies.append(logged(model)["entropy_loss"])
    th.testing.assert_close(*gradients)
    assert entropies[0] == pytest.approx(entropies[1])


def test_a_mask_that_is_not_infinite() -> None:
    """Attention masks are often the least number that there is."""

    def change(policy: Any) -> None:
        policy.register_buffer("mask", th.full((4, 4), th.finfo(th.float32).min).triu(1))
        policy.register_buffer("nothing", th.zeros(0))

    small(built_with(change)).learn(16)


def test_an_extractor_that_cannot_be_copied() -> None:
    class WeightNorm(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, 4)
            with pytest.warns(FutureWarning):
                self.layer = nn.utils.weight_norm(nn.Linear(3, 4))

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return th.tanh(self.layer(observations))

    arguments = {"features_extractor_class": WeightNorm, "net_arch": [8]}
    with pytest.raises(ValueError, match=r"WeightNorm cannot be copied .*; use `policy_kwargs`={'share_features_extractor': "):
        small(policy_kwargs=arguments)
    small(policy_kwargs=arguments | {"share_features_extractor": False})


def test_a_compiled_policy_is_saved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", th.distributions.Distribution._validate_args)
    model = small("CnnPolicy", SpaceEnv(IMAGE), n_steps=8)
    model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]
    model.learn(8)
    model.policy.save(file := io.BytesIO())  # type: ignore[arg-type]
    assert file.getbuffer().nbytes > 1000


def test_an_entropy_for_all_rows() -> None:
    """PPO takes its mean, of which a single number is one."""

    class Constant(ActorCriticPolicy):
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values, log_prob, entropy.mean()  # type: ignore[union-attr]

    models = [
        small(policy, SpaceEnv(action_space=TORQUES), ent_coef=0.5).learn(16) for policy in (Constant, ActorCriticPolicy)
    ]
    for a, b in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
        th.testing.assert_close(a, b)


class Copies(BaseCallback):
    """What a callback may do with the policy and the buffer."""

    def _on_step(self) -> bool:
        self.copy = copy.deepcopy(self.model)
        self.policies = [copy.deepcopy(self.model.policy), pickle.loads(pickle.dumps(self.model.policy))]
        return True

    def _on_rollout_end(self) -> None:
        self.end = copy.deepcopy(self.model)
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
    buffer = copy.deepcopy(model.rollout_buffer.returns)
    assert isinstance(callback.copy, BLPO) and isinstance(callback.end, BLPO)
    callback.end.train()
    callback.copy.learn(16)
    assert callback.copy.rollout_buffer.returns.any() and (buffer == model.rollout_buffer.returns).all()
    assert "forward" not in vars(callback.copy.policy)
    for buffer in callback.buffers:
        buffer.compute_returns_and_advantage(th.zeros(1), model._last_episode_starts)
        assert buffer.full
    assert "forward" not in vars(model.policy)


def test_another_policy_within_a_rollout() -> None:
    model, other = small(), small(seed=1).policy
    old = model.policy

    class Replace(BaseCallback):
        def _on_step(self) -> bool:
            self.model.policy = other if self.n_calls == 3 else self.model.policy
            return True

    model.learn(16, Replace())
    assert "forward" not in vars(old) and "forward" not in vars(other)
    assert old(th.zeros(1, 3))[1].isfinite().all()


def test_a_buffers_own_method_is_called_and_kept() -> None:
    model = small()
    calls: list[int] = []
    original = model.rollout_buffer.compute_returns_and_advantage

    def compute_returns_and_advantage(buffer: RolloutBuffer, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        original(*args, **kwargs)

    compute = types.MethodType(compute_returns_and_advantage, model.rollout_buffer)
    model.rollout_buffer.compute_returns_and_advantage = compute  # type: ignore[method-assign]
    copies: list[BLPO] = []

    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            copies.append(copy.deepcopy(self.model))  # type: ignore[arg-type]
            return True

    model.learn(32, Copy())
    assert len(calls) == 2
    assert model.rollout_buffer.compute_returns_and_advantage is compute
    assert copies[0].rollout_buffer.compute_returns_and_advantage.__func__ is compute.__func__  # type: ignore[attr-defined]


class KeywordBuffer(RolloutBuffer):
    """Takes its arguments by name alone, as SB3 passes them, and computes returns on the way as well."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)
        if self.pos == 4:
            self.compute_returns_and_advantage(last_values=th.zeros(1), dones=np.zeros(1))

    def compute_returns_and_advantage(self, *, last_values: th.Tensor, dones: np.ndarray) -> None:  # type: ignore[override]
        super().compute_returns_and_advantage(last_values, dones)


def test_a_buffer_of_the_users() -> None:
    a, b = (small(rollout_buffer_class=kind).learn(32).policy.parameters() for kind in (KeywordBuffer, None))
    th.testing.assert_close([*a], [*b], rtol=1e-4, atol=1e-5)


def test_training_on_a_rollout_that_was_collected_otherwise() -> None:
    model = small().learn(16)
    model._rollout_end = None
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.train()
    assert not all(map(th.equal, before, model.policy.parameters()))


def test_a_compiled_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which torch switches off for the rest of the process when it compiles
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", th.distributions.Distribution._validate_args)
    model = small()
    model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}


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

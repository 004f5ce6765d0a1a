"""Policies as users have them: frozen in parts, hooked, compiled, copied, built in their own way."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BOX, DICT, IMAGE, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from models import changed, differences, logged, moved, parameters_of, small, state_of
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sb3_blpo import BLPO, jacobian


def names_of(model: BLPO) -> set[str]:
    return {name for name, _ in model.policy.named_parameters()}


def check_all_learn(model: BLPO) -> BLPO:
    """Every parameter belongs to one optimizer, and moves."""
    ids = [id(p) for optimizer in (model.policy.optimizer, model.critic_optimizer) for p in parameters_of(optimizer)]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.policy.parameters())
    assert changed(model, lambda: model.learn(2 * model.n_steps * model.n_envs)) == names_of(model)
    return model


class Extractor(BaseFeaturesExtractor):
    def __init__(self, space: Any, *layers: nn.Module) -> None:
        super().__init__(space, 5)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3, 5), *layers)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


class Normed(Extractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.3))


# Frozen and thawed


@pytest.mark.parametrize("solver", ["nystrom", "none"])
@pytest.mark.parametrize("part", ["log_std", "policy_net", "value_net.0", "actor", "critic", "all"])
def test_frozen_and_trained_again(part: str, solver: str) -> None:
    model = small(env=SpaceEnv(action_space=TORQUES), ihvp_solver=solver).learn(16)
    names = names_of(model)
    of_critic = {name for name in names if "value_net" in name}
    frozen = {"actor": names - of_critic, "critic": of_critic, "all": names}.get(part, {n for n in names if part in n})
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names - frozen
    model.policy.requires_grad_(True)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


class Frozen(Extractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self.requires_grad_(False)


@pytest.mark.parametrize("share", [None, True, False])
def test_a_frozen_encoder(share: bool | None) -> None:
    model = small(
        policy_kwargs={"features_extractor_class": Frozen} | ({} if share is None else {"share_features_extractor": share})
    )
    names = names_of(model)
    assert changed(model, lambda: model.learn(16)) == {name for name in names if "features_extractor" not in name}
    model.policy.requires_grad_(True)
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names


class Trunk(ActorCriticPolicy):
    """A layer in front of both networks, and one of no use."""

    frozen: set[str]

    def _build_mlp_extractor(self) -> None:
        self.trunk, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        super()._build_mlp_extractor()
        for network in (self.mlp_extractor.policy_net, self.mlp_extractor.value_net):
            network.insert(0, self.trunk)


@pytest.mark.parametrize(("trainable", "side"), [("trunk", "both"), ("idle", "neither")])
def test_a_parameter_of_both_or_of_neither(trainable: str, side: str) -> None:
    with pytest.raises(ValueError, match=rf"`{trainable}.weight` of \w+ belongs to {side}; every trainable parameter must"):
        small(type("Other", (Trunk,), {"frozen": {"trunk", "idle"} - {trainable}}))
    # Frozen it does no harm, and cannot be trained later
    model = small(type("Other", (Trunk,), {"frozen": {"trunk", "idle"}}))
    assert changed(model, lambda: model.learn(16)) == {
        name for name in names_of(model) if "trunk" not in name and "idle" not in name
    }
    model.policy.get_submodule(trainable).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"`{trainable}.weight` is trainable, but no optimizer has it: .* or freeze it\.$"):
        model.learn(16)


# Two features extractors


class OwnPolicy(ActorCriticPolicy):
    """A user's own class."""


@pytest.mark.parametrize("share", [None, True, False])
@pytest.mark.parametrize(("policy", "space"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_actor_and_critic_have_their_own_extractors(policy: str, space: spaces.Space, share: bool | None) -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]} | ({} if share is None else {"share_features_extractor": share})
    given = copy.deepcopy(policy_kwargs)
    model = check_all_learn(small(policy, SpaceEnv(space), n_steps=8, policy_kwargs=policy_kwargs))
    actor, critic = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    assert policy_kwargs == given and model.policy.features_extractor is actor
    assert moved([*actor.parameters()], [*critic.parameters()])


@pytest.mark.parametrize(
    ("policy", "space", "policy_kwargs"),
    [
        ("MlpPolicy", None, {}),
        ("CnnPolicy", IMAGE, {"net_arch": [4]}),
        ("CnnPolicy", IMAGE, {"net_arch": [4], "share_features_extractor": False}),
        ("MultiInputPolicy", DICT, {"net_arch": [4]}),
        (OwnPolicy, None, {"features_extractor_class": Normed}),
    ],
)
def test_a_saved_policy(policy: Any, space: spaces.Space | None, policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    """Actor and critic stay apart, whether the policy is loaded by its class, pickled or copied."""
    env = SpaceEnv() if space is None else SpaceEnv(space)
    fresh = small(policy, env, n_steps=8, policy_kwargs=policy_kwargs).policy
    observations = fresh.obs_to_tensor(
        {k: v[None] for k, v in o.items()} if isinstance(o := env.reset(seed=0)[0], dict) else o[None]
    )[0]
    model = small(policy, env, n_steps=8, policy_kwargs=policy_kwargs)
    copies = [copy.deepcopy(model.policy)]
    model.learn(8)
    model.policy.save(str(tmp_path / "policy"))
    copies += [type(fresh).load(str(tmp_path / "policy"), device="cpu"), pickle.loads(pickle.dumps(model.policy))]

    @th.no_grad()
    def outputs(policy: Any) -> list[th.Tensor]:
        policy.set_training_mode(False)
        return [policy.predict_values(observations), policy.get_distribution(observations).distribution.logits]

    for twin, original in zip(copies, (fresh, model.policy, model.policy), strict=True):
        assert all(map(th.equal, outputs(twin), outputs(original)))


def test_an_extractor_that_cannot_be_copied() -> None:
    class WeightNorm(Extractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space)
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(self.net[1])

    with pytest.raises(ValueError, match=r"WeightNorm cannot be copied .*; use `policy_kwargs`={'share_features_extractor': "):
        small(policy_kwargs={"features_extractor_class": WeightNorm})
    check_all_learn(small(policy_kwargs={"features_extractor_class": WeightNorm, "share_features_extractor": False}))


# Networks of the users' own


class TwoHeads(nn.Module):
    """Hidden layers in the user's own shape."""

    latent_dim_pi, latent_dim_vf = 6, 5

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.forward_actor = nn.Sequential(nn.Linear(n_features, 6), nn.ELU())
        self.forward_critic = nn.Sequential(nn.Linear(n_features, 5), nn.LayerNorm(5), nn.Tanh())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)


class TwoHeadsPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = TwoHeads(self.features_dim)  # type: ignore[assignment]


class ScaledPolicy(ActorCriticPolicy):
    """A value that is more than its network's output, with a parameter of its own."""

    def _build(self, lr_schedule: Any) -> None:
        self.scale = nn.Parameter(th.ones(1))
        super()._build(lr_schedule)

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        actions, _, log_prob = super().forward(obs, deterministic)
        return actions, self.predict_values(obs), log_prob

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.scale * super().predict_values(obs)


class Branches(Extractor):
    """Which layer sees an observation depends on it."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, nn.Linear(5, 5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features = self.net[1](observations)
        return th.where(observations[:, :1] > 0, features, self.net[2](features))


def tied(policy: Any) -> None:
    for network in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
        network.append(nn.Linear(8, 8))
        network[-1].weight = network[2].weight


def spectral(policy: Any) -> None:
    nn.utils.spectral_norm(policy.mlp_extractor.value_net[0])
    nn.utils.parametrizations.weight_norm(policy.mlp_extractor.policy_net[0])


def in_all(change: Callable[[Any], Any]) -> type[ActorCriticPolicy]:
    """A policy whose networks are changed before its optimizer is made."""

    class Changed(ActorCriticPolicy):
        def _build_mlp_extractor(self) -> None:
            super()._build_mlp_extractor()
            change(self)

    return Changed


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        (TwoHeadsPolicy, {}),
        (ScaledPolicy, {"net_arch": [4]}),
        (in_all(tied), {"net_arch": [8, 8]}),
        (in_all(spectral), {"net_arch": [8]}),
        (ActorCriticPolicy, {"features_extractor_class": Normed}),
        ("MlpPolicy", {"features_extractor_class": Branches}),
        ("MlpPolicy", {"net_arch": {"pi": [4], "vf": [5, 3]}, "activation_fn": nn.ReLU}),
        ("MlpPolicy", {"net_arch": []}),
        ("MlpPolicy", {"net_arch": [4], "ortho_init": False, "activation_fn": nn.PReLU}),
    ],
    ids=["two heads", "scaled value", "tied", "spectral norm", "normed", "branches", "uneven", "linear", "PReLU"],
)
def test_networks(policy: Any, policy_kwargs: dict[str, Any], curvature: str) -> None:
    env = vec_env(SpaceEnv(action_space=TORQUES), 2)
    check_all_learn(small(policy, env, policy_kwargs=policy_kwargs, curvature=curvature, learning_rate=1e-2))


def test_batch_normalisation_and_dropout() -> None:
    """Statistics are those of gradient steps: what is looked at in eval mode leaves no trace."""
    model = small(policy_kwargs={"features_extractor_class": Normed}, n_critic_updates=3)
    policy: Any = model.learn(16).policy
    assert policy.pi_features_extractor.net[2].num_batches_tracked == 2
    assert policy.vf_features_extractor.net[2].num_batches_tracked == 6


class Cold(ActorCriticPolicy):
    """Acts with less noise than SB3's policy would."""

    def get_distribution(self, obs: Any) -> Any:
        distribution: Any = super().get_distribution(obs)
        normal = distribution.distribution
        distribution.distribution = th.distributions.Normal(normal.mean, 0.3 * normal.stddev)
        return distribution

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), None


def louder(module: nn.Module, inputs: Any, output: Any) -> Any:
    return tuple(5 * part for part in output) if isinstance(output, tuple) else 5 * output


class Wider(DiagGaussianDistribution):
    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Any:
        return super().proba_distribution(mean_actions, log_std + 1)


def replace_forward(policy: Any) -> None:
    original = policy.action_net.forward
    policy.action_net.forward = lambda x: 3 * original(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda policy: None,
    "hook of the extractor": lambda policy: policy.features_extractor.register_forward_hook(louder),
    "hook of a network": lambda policy: policy.mlp_extractor.policy_net[0].register_forward_hook(louder),
    "module": lambda policy: setattr(policy.mlp_extractor.policy_net, "1", nn.ReLU()),
    "method of one object": replace_forward,
    "distribution": lambda policy: setattr(policy, "action_dist", Wider(2)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("policy", [ActorCriticPolicy, Cold])
def test_what_acts_is_what_is_trained(policy: Any, change: str) -> None:
    """Rollouts and updates are those of the policy as it is now: before the actor's first step nothing differs."""
    model = small(policy, SpaceEnv(action_space=TORQUES), batch_size=16).learn(16)
    nn.init.normal_(model.policy.action_net.weight)  # type: ignore[arg-type]
    CHANGES[change](model.policy)
    model.learn(16, reset_num_timesteps=False)
    assert logged(model)["approx_kl"] == pytest.approx(0, abs=1e-6)


# Hooks, masks and compilers


@pytest.mark.parametrize("solver", ["nystrom", "none"])
def test_hooks_of_parameters(solver: str) -> None:
    """What masks gradients."""
    model = small(env=SpaceEnv(action_space=TORQUES), ihvp_solver=solver)
    weights = {"mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.0.weight", "log_std"}
    handles = [p.register_hook(th.zeros_like) for name, p in model.policy.named_parameters() if name in weights]
    assert changed(model, lambda: model.learn(16)) == names_of(model) - weights
    for handle in handles:
        handle.remove()
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names_of(model)


@pytest.mark.parametrize("network", ["policy_net", "value_net"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_that_look_change_nothing(network: str) -> None:
    plain = state_of(small(engine="torch").learn(16))
    model, seen = small(), []
    layer = getattr(model.policy.mlp_extractor, network)[0]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output.detach().numpy())))
    layer.register_full_backward_hook(lambda module, by_inputs, by_outputs: seen.append(len(by_outputs[0].numpy())))
    assert not differences(plain, state_of(model.learn(16)))
    assert 8 in seen  # a minibatch


@pytest.mark.parametrize("network", ["policy_net", "value_net"])
def test_pruned_weights_stay_zero(network: str) -> None:
    model = small()
    layer = getattr(model.policy.mlp_extractor, network)[0]
    weight = layer.weight
    prune.random_unstructured(layer, "weight", 0.5)
    layer.weight_orig = weight  # the parameter that the optimizer has
    before = weight.detach().clone()
    model.learn(32)
    assert th.equal(weight != before, layer.weight_mask == 1)


def test_a_compiled_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which torch switches off for the rest of the process when it compiles
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", th.distributions.Distribution._validate_args)
    model = small().learn(16)
    model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]
    assert changed(model, lambda: model.learn(16, reset_num_timesteps=False)) == names_of(model)
    model.save(file := io.BytesIO())
    loaded = BLPO.load(file, device="cpu")
    assert all(map(th.equal, loaded.policy.parameters(), model.policy.parameters()))


def test_a_loss_of_the_users() -> None:
    """Behaviour cloning with the actor's optimizer, before and after training: it moves the actor alone."""
    model = small()
    for _ in range(2):

        def imitate() -> None:
            values, log_prob, _ = model.policy.evaluate_actions(th.ones(4, 3), th.zeros(4))
            loss = F.mse_loss(values.flatten(), th.ones(4)) - log_prob.mean()
            model.policy.optimizer.zero_grad()
            loss.backward()
            model.policy.optimizer.step()

        assert changed(model, imitate) == {name for name in names_of(model) if "value_net" not in name}
        model.learn(16)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-3e38, 3e38, (27,), np.float32),
        spaces.Box(-1e308, 1e308, (3,), np.float64),
        spaces.Box(7, 9, (3,), np.int64),
    ],
    ids=["float32", "float64", "int64"],
)
def test_spaces_whose_samples_tell_little(space: spaces.Box) -> None:
    """Networks are looked at with observations that they can take."""
    env = SpaceEnv(spaces.Box(0, 1, space.shape))
    env.observation_space = space
    small(env=env, policy_kwargs={"activation_fn": nn.ReLU})


@pytest.mark.parametrize(("policy", "space"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT), ("MlpPolicy", BOX)])
def test_curvature_of_sb3s_own_critics_is_of_all_states(policy, space, monkeypatch):
    monkeypatch.setattr(jacobian, "SampledJacobian", None)
    assert logged(small(policy, SpaceEnv(space)).learn(32))["correction_skipped"] == 0


def test_values_by_which_a_policy_acts_and_by_which_it_is_trained():
    class Scaled(ActorCriticPolicy):
        def extract_features(self, obs, features_extractor=None):
            return super().extract_features(10.0 * obs, features_extractor)

    with pytest.warns(UserWarning, match="`forward` and `predict_values` of Scaled give different values"):
        small(Scaled)


def test_a_layer_that_is_called_by_keyword():
    class ByKeyword(BaseFeaturesExtractor):
        def __init__(self, space):
            super().__init__(space, 5)
            self.net = nn.Linear(3, 5)

        def forward(self, observations):
            return th.tanh(self.net(input=observations))

    assert logged(small(policy_kwargs={"features_extractor_class": ByKeyword}).learn(16))["correction_skipped"] == 0

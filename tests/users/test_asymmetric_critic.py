"""A critic that sees more than the actor, or the other way round: keys of dictionary observations for either."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BOX, DISCRETE, IMAGE, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from gymnasium.wrappers import FilterObservation
from models import SMALL, actor_of, changed, critic_of, differences, logged, moved, small, state_of
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.policies import MultiInputPolicy
from sb3_blpo.resume import ResumableCheckpoint, resume

SPACE = spaces.Dict({"position": BOX, "room": spaces.Discrete(4), "wind": spaces.Box(-1, 1, (5,), np.float32)})
WITH_IMAGE = spaces.Dict({**SPACE.spaces, "camera": IMAGE})
#: By what is hidden from whom
KEYS: dict[str, dict[str, Any]] = {
    "from the actor": {"actor_keys": ["position", "room"]},
    "from the critic": {"critic_keys": ("position",)},
    "from each": {"actor_keys": ["room", "position"], "critic_keys": ["wind"]},
}


def seeing(
    keys: dict[str, Any], space: spaces.Dict = SPACE, actions: spaces.Space = DISCRETE, policy: Any = "MultiInputPolicy",
    net_arch: Any = (8,), policy_kwargs: dict[str, Any] | None = None, n_envs: int = 2, **arguments: Any,
) -> BLPO:  # fmt: skip
    """A model whose actor and critic see these keys."""
    policy_kwargs = keys | {"net_arch": [*net_arch]} | (policy_kwargs or {})
    return small(policy, vec_env(SpaceEnv(space, actions), n_envs), policy_kwargs=policy_kwargs, **arguments)


def observed(space: spaces.Dict = SPACE, n: int = 12) -> dict[str, np.ndarray]:
    space = copy.deepcopy(space)
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}


@th.no_grad()
def outputs(policy: Any, observations: dict[str, np.ndarray]) -> tuple[th.Tensor, th.Tensor]:
    """Of the actor and of the critic."""
    policy.set_training_mode(False)
    tensors = policy.obs_to_tensor(observations)[0]
    distribution = policy.get_distribution(tensors).distribution
    actor = distribution.logits if isinstance(distribution, th.distributions.Categorical) else distribution.mean
    return actor, policy.predict_values(tensors)


def depends_on(policy: Any, space: spaces.Dict) -> tuple[set[str], set[str]]:
    """The keys that the actor's and the critic's outputs depend on."""
    observations, found = observed(space), (set[str](), set[str]())
    for key, values in observations.items():
        others = observations | {key: np.roll(values, 1, axis=0)}
        for keys, before, after in zip(found, outputs(policy, observations), outputs(policy, others), strict=True):
            keys |= {key} if not th.equal(before, after) else set()
    return found


# Who sees what


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("hidden", KEYS)
def test_each_depends_on_its_own_keys_alone(hidden: str, learned: bool) -> None:
    model = seeing(KEYS[hidden], learning_rate=1e-2)
    if learned:
        assert changed(model, lambda: model.learn(64)) == {name for name, _ in model.policy.named_parameters()}
    expected = [{*(KEYS[hidden].get(name) or SPACE.spaces)} for name in ("actor_keys", "critic_keys")]
    assert [*depends_on(model.policy, SPACE)] == expected
    # With all keys for both the same look finds all of them
    assert depends_on(seeing({}).policy, SPACE) == ({*SPACE.spaces}, {*SPACE.spaces})


@pytest.mark.parametrize("of", ["actor_keys", "critic_keys"])
def test_an_image_for_one_of_them(of: str) -> None:
    """The other has no convolutions."""
    keys = {"actor_keys": ["position"], "critic_keys": ["position", "wind"]}
    model = seeing(keys | {of: ["camera", "position"]}, WITH_IMAGE, n_steps=8)
    extractors = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    convolutions = [any(isinstance(module, nn.Conv2d) for module in extractor.modules()) for extractor in extractors]
    assert convolutions == [of == "actor_keys", of == "critic_keys"]
    assert changed(model, lambda: model.learn(32)) == {name for name, _ in model.policy.named_parameters()}
    assert depends_on(model.policy, WITH_IMAGE)[of == "critic_keys"] == {"camera", "position"}


@pytest.mark.parametrize("actions", [DISCRETE, TORQUES, spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(2)], ids=str)
@pytest.mark.parametrize("net_arch", [[], [4], {"pi": [4], "vf": [5, 3]}], ids=str)
def test_networks_and_actions(net_arch: Any, actions: spaces.Space) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": net_arch, "activation_fn": nn.ReLU, "ortho_init": False}}
    model = seeing(KEYS["from each"], SPACE, actions, **kwargs)
    assert (model.policy.pi_features_extractor.features_dim, model.policy.vf_features_extractor.features_dim) == (7, 5)
    assert changed(model, lambda: model.learn(64)) == {name for name, _ in model.policy.named_parameters()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"ihvp_solver": "none"}, {"ihvp_solver": "cg", "curvature": "hessian"}, {"ihvp_solver": "exact", "n_epochs": 2},
        {"critic_rollouts": 1}, {"policy_kwargs": {"share_features_extractor": True}},
        {"policy_kwargs": {"optimizer_class": th.optim.SGD}},
    ],
    ids=str,
)  # fmt: skip
def test_solvers_and_settings(arguments: dict[str, Any]) -> None:
    model = seeing(KEYS["from the actor"], **arguments)
    assert changed(model, lambda: model.learn(96)) == {name for name, _ in model.policy.named_parameters()}
    assert all(np.isfinite(value) for value in logged(model).values())


def test_state_dependent_exploration() -> None:
    model = seeing(KEYS["from each"], SPACE, TORQUES, use_sde=True, sde_sample_freq=4)
    assert changed(model, lambda: model.learn(64)) == {name for name, _ in model.policy.named_parameters()}
    assert depends_on(model.policy, SPACE) == ({"position", "room"}, {"wind"})


def test_without_keys_it_is_the_policy_of_sb3() -> None:
    states = []
    for policy, keys in (("MultiInputPolicy", {}), ("MultiInputPolicy", {"actor_keys": None, "critic_keys": None})):
        states.append(state_of(seeing(keys, policy=policy).learn(64)))
    model = seeing({}, policy=MultiInputActorCriticPolicy)
    assert type(model.policy) is MultiInputActorCriticPolicy
    states.append(state_of(model.learn(64)))
    assert not differences(states[0], states[1]) and not differences(states[0], states[2])
    # As PPO's begins
    ppo = PPO("MultiInputPolicy", vec_env(SpaceEnv(SPACE), 2), **SMALL).policy.state_dict()
    ours = seeing({}).policy.state_dict()
    assert ppo.keys() == ours.keys() and all(th.equal(ppo[name], ours[name]) for name in ppo)


def test_all_keys_by_name_are_all_keys() -> None:
    """What the critic sees beside the actor's keys is what makes the difference."""
    keys: dict[str, Any] = {"actor_keys": [*SPACE.spaces]}
    assert not differences(*(state_of(seeing(each).learn(64)) for each in (keys, {**keys, "critic_keys": [*SPACE.spaces]})))
    other = seeing({"actor_keys": ["position"]})
    assert moved(critic_of(seeing(keys).learn(64)), critic_of(other.learn(64)))


# Playing without what is hidden


@pytest.mark.parametrize("actions", [DISCRETE, TORQUES], ids=["Discrete", "Box"])
def test_predict_takes_the_actors_keys(actions: spaces.Space) -> None:
    model = seeing({"actor_keys": ["position", "room"]}, SPACE, actions).learn(64)
    nn.init.normal_(model.policy.action_net.weight)  # type: ignore[arg-type]
    everything = observed()
    visible = {key: everything[key] for key in ("position", "room")}
    expected, _ = model.predict(everything, deterministic=True)
    assert len(np.unique(expected, axis=0)) > 1
    np.testing.assert_array_equal(model.predict(visible, deterministic=True)[0], expected)
    for i in range(3):
        one = {key: values[i] for key, values in visible.items()}
        np.testing.assert_allclose(model.predict(one, deterministic=True)[0], expected[i], rtol=1e-5)
    th.manual_seed(0)
    drawn, _ = model.predict(everything)
    th.manual_seed(0)
    np.testing.assert_array_equal(model.predict(visible)[0], drawn)


def test_evaluation_where_nothing_is_hidden_any_more() -> None:
    """In an environment that offers the actor's keys alone."""
    model = seeing({"actor_keys": ["position"]}).learn(32)
    env = FilterObservation(SpaceEnv(SPACE), ["position"])
    assert np.isfinite(evaluate_policy(model, env, 3, warn=False)[0])


def test_an_image_that_the_critic_alone_sees_is_not_needed() -> None:
    model = seeing({"actor_keys": ["room"]}, WITH_IMAGE, n_steps=8).learn(16)
    rooms = np.arange(4)
    actions, _ = model.predict({"room": rooms}, deterministic=True)
    everything = observed(WITH_IMAGE, 4) | {"room": rooms}
    np.testing.assert_array_equal(model.predict(everything, deterministic=True)[0], actions)
    # An image that the actor sees, channels last and one alone
    model = seeing({"actor_keys": ["camera"], "critic_keys": ["wind"]}, WITH_IMAGE, n_steps=8).learn(16)
    assert DISCRETE.contains(int(model.predict({"camera": IMAGE.sample()})[0]))


@pytest.mark.parametrize(
    ("given", "missing"), [(["wind"], "'position', 'room'"), (["position", "wind"], "'room'"), ([], "'position', 'room'")]
)
def test_a_missing_key_of_the_actors(given: list[str], missing: str) -> None:
    model = seeing(KEYS["from the actor"])
    with pytest.raises(ValueError, match=rf"^The observation lacks {missing}, which the actor sees\.$"):
        model.predict({key: observed()[key] for key in given})


def test_a_missing_key_where_the_actor_sees_all() -> None:
    model = seeing({"critic_keys": ["position"]})
    with pytest.raises(ValueError, match=r"^The observation lacks 'room', 'wind', which the actor sees\.$"):
        model.predict({"position": BOX.sample()})


# Wrong keys


@pytest.mark.parametrize("name", ["actor_keys", "critic_keys"])
@pytest.mark.parametrize(
    "keys",
    [[], (), "position", "", ["nowhere"], ["position", "nowhere"], [1], [["position"]], 5, True, {"position"}, [None]],
    ids=str,
)
def test_wrong_keys(name: str, keys: Any) -> None:
    with pytest.raises(ValueError) as error:
        seeing({name: keys})
    known = "'position', 'room', 'wind'"
    assert str(error.value) == f"`{name}` must be a list of keys of the observation, {known}, or None, got {keys!r}."


def test_keys_of_an_observation_that_has_none() -> None:
    with pytest.raises(ValueError, match=r"keys of the observation, which has none, or None, got \['position'\]\.$"):
        small("MultiInputPolicy", SpaceEnv(), policy_kwargs={"actor_keys": ["position"]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'actor_keys'"):
        small("MlpPolicy", SpaceEnv(), policy_kwargs={"actor_keys": ["position"]})


def test_lists_are_the_users() -> None:
    keys = ["position"]
    model = seeing({"actor_keys": keys})
    keys.append("wind")
    assert model.predict({"position": BOX.sample()})[0] in range(3)


# Saved, loaded, resumed


@pytest.mark.parametrize("with_env", [False, True])
@pytest.mark.parametrize(
    ("hidden", "space"), [(hidden, SPACE) for hidden in KEYS] + [("from each", WITH_IMAGE)], ids=[*KEYS, "image"]
)
def test_saved_and_loaded(hidden: str, space: spaces.Dict, with_env: bool, tmp_path: Path) -> None:
    keys = KEYS[hidden] | ({"critic_keys": ["camera"]} if space is WITH_IMAGE else {})
    model = seeing(keys, space, n_steps=8, learning_rate=1e-2).learn(32)
    model.save(tmp_path / "model")
    env = vec_env(SpaceEnv(space), 2) if with_env else None
    loaded = BLPO.load(tmp_path / "model", env=env, device="cpu")
    observations = observed(space)
    for twin, original in zip(outputs(loaded.policy, observations), outputs(model.policy, observations), strict=True):
        assert th.equal(twin, original)
    assert not differences(state_of(model), state_of(loaded))
    assert depends_on(loaded.policy, space) == depends_on(model.policy, space)
    if with_env:
        assert changed(loaded, lambda: loaded.learn(32)) == {name for name, _ in loaded.policy.named_parameters()}


@pytest.mark.parametrize(
    ("hidden", "space"), [(hidden, SPACE) for hidden in KEYS] + [("from each", WITH_IMAGE)], ids=[*KEYS, "image"]
)
def test_the_policy_saved_alone(hidden: str, space: spaces.Dict, tmp_path: Path) -> None:
    keys = KEYS[hidden] | ({"critic_keys": ["camera"]} if space is WITH_IMAGE else {})
    model = seeing(keys, space, n_steps=8, learning_rate=1e-2).learn(32)
    model.policy.save(str(tmp_path / "policy"))
    observations = observed(space)
    expected, _ = model.predict(observations, deterministic=True)
    policies = [type(model.policy).load(str(tmp_path / "policy"), device="cpu"), copy.deepcopy(model.policy)]
    visible = {key: observations[key] for key in KEYS[hidden].get("actor_keys", space.spaces)}
    for policy in policies:
        assert isinstance(policy, MultiInputPolicy)
        for twin, original in zip(outputs(policy, observations), outputs(model.policy, observations), strict=True):
            assert th.equal(twin, original)
        np.testing.assert_array_equal(policy.predict(visible, deterministic=True)[0], expected)


def test_resumed(tmp_path: Path) -> None:
    """In the middle, with normalised observations and the critic's former rollouts: exactly as it would have gone on."""

    def start() -> BLPO:
        policy_kwargs = {"net_arch": [8], "actor_keys": ["position"], "critic_keys": ["position", "wind"]}
        env = VecNormalize(vec_env(SpaceEnv(SPACE), 2), norm_obs_keys=["position", "wind"])
        return small("MultiInputPolicy", env, policy_kwargs=policy_kwargs, critic_rollouts=3)

    whole = start().learn(160, ResumableCheckpoint(tmp_path / "whole"))
    start().learn(96, ResumableCheckpoint(tmp_path / "part"))
    resumed = resume(tmp_path / "part", device="cpu")
    resumed.learn(64, ResumableCheckpoint(tmp_path / "part"), reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(resumed))
    assert moved(actor_of(whole), actor_of(start()))


@pytest.mark.parametrize("key", ["position", "wind"])
def test_nan_leaves_no_trace(key: str) -> None:
    """Whoever sees it."""

    class Faulty(SpaceEnv):
        at_fault = False

        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            if self.at_fault:
                observation[key][0] = np.nan
            return observation, *rest

    env = Faulty(SPACE)
    model = small(
        "MultiInputPolicy", env, policy_kwargs={"net_arch": [8], "actor_keys": ["position"], "critic_keys": ["wind"]}
    )
    before = state_of(model.learn(16))
    env.at_fault = True
    with pytest.raises(ValueError, match=rf"`(terminal )?observations\['{key}'\]` hold NaN or infinity, so BLPO stopped"):
        model.learn(16)
    assert not differences(before, state_of(model))
    env.at_fault = False
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}

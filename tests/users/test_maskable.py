"""MaskableBLPO: BLPO for environments that say which actions are allowed, used as sb3-contrib's MaskablePPO is."""

import copy
import inspect
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, DICT, IMAGE, TORQUES, FaultyEnv, Masked, SpaceEnv, choices, vec_env
from gymnasium import spaces
from models import SMALL, actor_of, changed, collect_rollout, critic_of, differences, logged, moved, small, state_of
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_blpo import BLPO, MaskableBLPO
from sb3_blpo.resume import ResumableCheckpoint, resume

KINDS = ["Discrete", "MultiDiscrete", "MultiBinary"]
#: What one rollout of two environments takes
ROLLOUT = 32


def masked_env(actions: str = "Discrete", n_envs: int = 2, observations: spaces.Space = BOX) -> DummyVecEnv:
    return vec_env(Masked(SpaceEnv(observations, ACTION_SPACES[actions])), n_envs)


def masked(policy: Any = "MlpPolicy", env: Any = None, **arguments: Any) -> MaskableBLPO:
    """A model with minibatches of 8 transitions."""
    return MaskableBLPO(policy, masked_env() if env is None else env, **(SMALL | {"ihvp_kwargs": {"rank": 6}} | arguments))


def forbidden(env: Any) -> int:
    """How often what is forbidden was done."""
    return sum(env.get_attr("forbidden"))


@pytest.fixture
def float64() -> Iterator[None]:
    """New networks compute in float64."""
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


class InDoubles(FlattenExtractor):
    """Hands on what is observed in float32 in float64."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).double()


def score(model: MaskableBLPO | BLPO, env: Any, n_episodes: int = 10, **arguments: Any) -> float:
    """Mean return."""
    return float(np.mean(evaluate_policy(model, env, n_episodes, warn=False, **arguments)[0]))  # type: ignore[arg-type]


# Any environment, and what is forbidden is never done


@pytest.mark.parametrize("actions", KINDS)
@pytest.mark.parametrize(
    ("policy", "observations"),
    [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)],
    ids=["Box", "image", "Dict"],
)
def test_spaces(policy: str, observations: spaces.Space, actions: str) -> None:
    n_steps = 16 if policy == "MlpPolicy" else 8
    env = masked_env(actions, 2, observations)
    model = masked(policy, env, n_steps=n_steps)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(4 * n_steps)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))
    score(model, env, 6, deterministic=False)
    assert forbidden(env) == 0
    # The count counts
    masked(policy, env, n_steps=n_steps).learn(2 * n_steps, use_masking=False)
    assert forbidden(env) > 0


@pytest.mark.parametrize(
    "env",
    [InvalidActionEnvDiscrete(4, 10, 2), InvalidActionEnvMultiDiscrete([3, 2], 10, 2), InvalidActionEnvMultiBinary(3, 10, 2)],
    ids=KINDS,
)
def test_environments_of_sb3_contrib(env: Any) -> None:
    model = masked(env=Monitor(env))
    assert changed(model, lambda: model.learn(32)) == {name for name, _ in model.policy.named_parameters()}
    assert 0 <= score(model, model.get_env(), 2) <= 10


def test_action_masker() -> None:
    taken: list[int] = []

    class Recording(SpaceEnv):
        def step(self, action: Any) -> Any:
            taken.append(int(action))
            return super().step(action)

    env = ActionMasker(Recording(action_space=spaces.Discrete(6)), lambda env: np.arange(6) % 2 == 0)
    model = masked(env=env).learn(64)
    assert {*taken} == {0, 2, 4}
    assert {int(model.predict(np.ones(3), action_masks=get_action_masks(env))[0]) for _ in range(50)} == {0, 2, 4}


def masked_anew() -> Masked:
    return Masked(SpaceEnv(action_space=spaces.Discrete(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_environments_in_processes() -> None:
    """Masks arrive as they do from environments in this process."""
    states = []
    for env in (DummyVecEnv([masked_anew] * 2), SubprocVecEnv([masked_anew] * 2, start_method="fork")):
        model = masked(env=env).learn(2 * ROLLOUT)
        assert forbidden(model.env) == 0
        states.append(state_of(model))
        env.close()
    assert not differences(*states)


def test_evaluation_during_training(tmp_path: Path) -> None:
    """With normalised observations; what the callback saves as the best model can be loaded."""
    env, eval_env = (VecNormalize(DummyVecEnv([lambda: Monitor(masked_anew())] * n)) for n in (2, 1))
    arguments: dict[str, Any] = {"eval_freq": 8, "n_eval_episodes": 3, "deterministic": False, "verbose": 0}
    callback = MaskableEvalCallback(eval_env, **arguments, best_model_save_path=str(tmp_path))
    masked(env=env).learn(2 * ROLLOUT, callback)
    assert callback.best_mean_reward > 0 and forbidden(env) == forbidden(eval_env) == 0
    best = MaskableBLPO.load(tmp_path / "best_model", device="cpu")
    assert 0 < best.num_timesteps <= 2 * ROLLOUT
    # SB3's callback knows nothing of masks
    masked(env=env).learn(ROLLOUT, EvalCallback(eval_env, **arguments))
    assert forbidden(env) == 0 < forbidden(eval_env)


def test_predict() -> None:
    model = masked()
    observations = BOX.sample(), np.stack([BOX.sample() for _ in range(3)])
    for choice in range(3):
        masks = np.arange(3) == choice
        assert model.predict(observations[0], action_masks=masks)[0] == choice
        several = np.stack([masks, ~masks, masks])
        for deterministic in (True, False):
            actions, _ = model.predict(observations[1], action_masks=several, deterministic=deterministic)
            assert actions[0] == actions[2] == choice != actions[1]
            # As lists and as tensors
            for same in (several.astype(int).tolist(), th.as_tensor(several)):
                again, _ = model.predict(observations[1], action_masks=same, deterministic=True)  # type: ignore[arg-type]
                assert again[0] == again[2] == choice != again[1]
    # Without masks everything is allowed
    assert {int(model.predict(observations[0])[0]) for _ in range(100)} == {0, 1, 2}


# The actor's step is along the masked policy's gradient


class SameDraws(BaseCallback):
    """The same random numbers in each rollout, whatever an update has drawn."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        th.manual_seed(self.n_calls)


def check_that_it_is_maskable_ppo(actions: str, tolerance: float, policy_kwargs: dict[str, Any], engine: str) -> None:
    """The whole rollout in one minibatch: three steps of the actor, with an entropy bonus."""
    arguments: dict[str, Any] = SMALL | {"batch_size": ROLLOUT, "ent_coef": 0.05, "learning_rate": 3e-3}
    arguments["policy_kwargs"] = {"net_arch": [8]} | policy_kwargs
    ppo = MaskablePPO("MlpPolicy", masked_env(actions), vf_coef=0.0, **arguments)
    blpo = MaskableBLPO(
        "MlpPolicy", masked_env(actions), ihvp_solver="none", critic_learning_rate=0.0, engine=engine, **arguments
    )
    blpo.policy.load_state_dict(ppo.policy.state_dict())
    start = copy.deepcopy(ppo.policy.state_dict())
    for model in (ppo, blpo):
        model.learn(3 * ROLLOUT, SameDraws())
    assert str(blpo.engine_in_use).startswith(engine)
    expected = ppo.policy.state_dict()
    assert (expected["action_net.weight"] - start["action_net.weight"]).abs().max() > 1e-3
    for name, parameter in blpo.policy.state_dict().items():
        th.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("actions", KINDS)
def test_with_a_critic_that_stands_still_it_is_maskable_ppo(actions: str) -> None:
    check_that_it_is_maskable_ppo(actions, 1e-6, {"features_extractor_class": InDoubles}, "torch")


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("actions", KINDS)
def test_with_a_critic_that_stands_still_it_is_maskable_ppo_in_float32(actions: str, engine: str) -> None:
    check_that_it_is_maskable_ppo(actions, 2e-5, {}, engine)


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("actions", KINDS)
def test_log_probabilities_and_entropy_are_those_under_the_masks(actions: str, engine: str) -> None:
    """Of an actor that stands still: the ratio is 1 in each epoch, and the entropy is that of the choices that are left."""
    model = masked(env=masked_env(actions), learning_rate=0.0, n_epochs=2, engine=engine)
    th.nn.init.normal_(model.policy.action_net.weight)  # type: ignore[arg-type]
    collect_rollout(model)
    buffer: Any = model.rollout_buffer
    masks = th.as_tensor(buffer.action_masks.reshape(ROLLOUT, -1)) > 0
    assert 0.2 < masks.float().mean() < 0.9
    observations = th.as_tensor(buffer.observations.reshape(ROLLOUT, 3))
    with th.no_grad():
        logits = model.policy.action_net(model.policy.mlp_extractor.forward_actor(observations))
        unmasked: Any = model.policy.get_distribution(observations).entropy()
    n_choices = choices(model.action_space)
    entropy = th.zeros(ROLLOUT)
    for part, allowed in zip(logits.split(n_choices, dim=1), masks.split(n_choices, dim=1), strict=True):
        probabilities = part.where(allowed, th.tensor(-th.inf)).softmax(dim=1)
        entropy -= th.special.xlogy(probabilities, probabilities).sum(dim=1)
    model.train()
    values = logged(model)
    assert values["approx_kl"] == pytest.approx(0, abs=1e-6) and values["clip_fraction"] == 0
    assert -values["entropy_loss"] == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert float(unmasked.mean()) > 1.1 * float(entropy.mean())


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize("solver", ["nystrom", "cg", "exact", "none"])
def test_no_gradient_for_what_is_forbidden(solver: str, engine: str) -> None:
    """Where the last action is forbidden everywhere, nothing is learned about it."""
    env = vec_env(ActionMasker(SpaceEnv(), lambda env: np.array([1, 1, 0])), 2)
    model = masked(env=env, ihvp_solver=solver, ent_coef=0.1, engine=engine)
    weight: Any = model.policy.action_net.weight
    before = weight.detach().clone()
    model.learn(2 * ROLLOUT)
    change = (weight.detach() - before).abs().amax(dim=1)
    assert change[2] < 1e-6 and change[:2].min() > 1e-4


class Lock(SpaceEnv):
    """One of 100 actions, another at each step, opens the lock. It and one other are allowed; the observation says which."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(100), episode_length=10)
        self.right = 0

    def reset(self, **arguments: Any) -> Any:
        super().reset(**arguments)
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.right)
        _, _, *rest = super().step(action)
        return self._observation(), reward, *rest

    def _observation(self) -> np.ndarray:
        self.right = int(self.np_random.integers(100))
        return np.array([self.right < 50, self.right / 100], dtype=np.float32)

    def action_masks(self) -> Any:
        return np.isin(np.arange(100), [self.right, (self.right + 50) % 100])


@pytest.mark.filterwarnings("ignore:The environment has `action_masks:UserWarning")
def test_where_most_actions_are_invalid() -> None:
    """By chance an episode brings 5 with the masks, and 0.1 without them."""
    arguments: dict[str, Any] = dict(n_steps=64, gamma=0.0, learning_rate=1e-2, n_epochs=5, seed=0, device="cpu")
    with_masks = MaskableBLPO("MlpPolicy", vec_env(Lock(), 4), **arguments).learn(2560)
    without = BLPO("MlpPolicy", vec_env(Lock(), 4), engine="torch", **arguments).learn(2560)
    assert score(with_masks, vec_env(Lock(), 1)) > 9
    assert score(without, vec_env(Lock(), 1), use_masking=False) < 2


def test_without_masking() -> None:
    """All is allowed then, and the environment needs no masks."""
    model = masked(env=vec_env(SpaceEnv(), 2)).learn(ROLLOUT, use_masking=False)
    assert (model.rollout_buffer.action_masks == 1).all()
    with pytest.raises(ValueError, match="Environment does not support action masking"):
        model.learn(ROLLOUT)
    # Its argument stands where MaskablePPO has it
    assert list(inspect.signature(MaskableBLPO.learn).parameters) == list(inspect.signature(MaskablePPO.learn).parameters)


# Wrong masks


def refusal(action: Callable[[], Any]) -> str:
    """The message of the error that this raises: one sentence."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


#: By what is wrong: the action space, the masks of an observation, and what the message says
WRONG: dict[str, tuple[str, Any, str]] = {
    "too long": ("Discrete", np.ones(4), "have 3 elements for one observation, got the shape (4,)"),
    "too short": ("Discrete", [True, False], "have 3 elements for one observation, got the shape (2,)"),
    "empty": ("Discrete", [], "have 3 elements for one observation, got the shape (0,)"),
    "none": ("Discrete", None, "have 3 elements for one observation, got the shape ()"),
    "of two": ("Discrete", np.ones((2, 3)), "have 3 elements for one observation, got the shape (2, 3)"),
    "ragged": ("Discrete", [[1, 1], [1]], "have 3 elements for one observation, got lists of different lengths"),
    "one for each action": ("MultiDiscrete", np.ones(2), "have 5 elements for one observation, got the shape (2,)"),
    "one for each part": ("MultiDiscrete", [[1, 1, 1], [1, 1]], "have 5 elements for one observation, got lists of different"),
    "one for each bit": ("MultiBinary", np.ones(3), "have 6 elements for one observation, got the shape (3,)"),
    "nothing": ("Discrete", np.zeros(3), "must allow at least one action, but one of Discrete(3) allows none"),
    "a part": (
        "MultiDiscrete",
        [1, 0, 1, 0, 0],
        "must allow at least one action, but one of MultiDiscrete([3 2]) allows none",
    ),
    "a bit": ("MultiBinary", [1, 1, 0, 0, 1, 1], "must allow at least one action, but one of MultiBinary(3) allows none"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_wrong_masks(name: str, n_envs: int) -> None:
    """In the second rollout, at some of its steps: nothing is trained on it, and what is right later counts."""
    actions, wrong, message = WRONG[name]

    def masks(env: Any) -> Any:
        right = np.ones(sum(choices(env.action_space)))
        return wrong if wrong_at <= env.unwrapped.t else right

    wrong_at = 100
    model = masked(env=vec_env(ActionMasker(SpaceEnv(action_space=ACTION_SPACES[actions]), masks), n_envs)).learn(16 * n_envs)
    before = state_of(model)
    wrong_at = 3
    assert message in refusal(lambda: model.learn(16 * n_envs, reset_num_timesteps=False))
    assert not differences(before, state_of(model))
    wrong_at = 100
    assert changed(model, lambda: model.learn(16 * n_envs))


def test_masks_of_environments_that_differ() -> None:
    """Where some are right and others are not."""
    envs = [ActionMasker(SpaceEnv(), lambda env, n=n: np.ones(n)) for n in (3, 4)]  # type: ignore[misc]
    model = masked(env=DummyVecEnv([lambda: envs[0], lambda: envs[1]]))
    assert "have 3 elements for one observation, got the shape (4,)" in refusal(lambda: model.learn(ROLLOUT))


@pytest.mark.parametrize("name", [name for name in WRONG if name != "none"])
def test_wrong_masks_in_predict(name: str) -> None:
    actions, wrong, message = WRONG[name]
    model = masked(env=masked_env(actions))
    message = message.replace("one observation", "each observation" if name != "of two" else "one observation")
    assert message in refusal(lambda: model.predict(BOX.sample(), action_masks=wrong))


@pytest.mark.parametrize("n_masks", [1, 3])
def test_masks_for_another_number_of_observations(n_masks: int) -> None:
    model = masked()
    observations = np.stack([BOX.sample() for _ in range(2)])
    message = refusal(lambda: model.predict(observations, action_masks=np.ones((n_masks, 3))))
    assert f"have 3 elements for each of 2 observations, got the shape ({n_masks}, 3)" in message


def test_other_errors_of_an_environment_pass() -> None:
    class Raising(SpaceEnv):
        def step(self, action: Any) -> Any:
            raise ValueError("out of fuel")

    with pytest.raises(ValueError, match=r"^out of fuel$"):
        masked(env=Masked(Raising())).learn(16)


# What BLPO promises


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("where", "name"), [("reward", "`advantages`"), ("step", "`observations`"), ("terminal", "`terminal obs")]
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:stable_baselines3")
def test_nan_leaves_no_trace(where: str, name: str, value: float) -> None:
    env = FaultyEnv("", value)
    model = masked(env=Masked(env)).learn(16)
    env.where, env.episode = where, 0
    before = state_of(model)
    message = refusal(lambda: model.learn(32))
    assert name in message and "hold NaN or infinity, so BLPO stopped before any weight was changed" in message
    assert not differences(before, state_of(model))
    env.where = ""
    assert changed(model, lambda: model.learn(32)) == {name for name, _ in model.policy.named_parameters()}


@pytest.mark.parametrize("rate", ["learning_rate", "critic_learning_rate"])
def test_overflow_in_an_update_leaves_no_trace(rate: str) -> None:
    model = masked()
    before = state_of(model)
    setattr(model, rate, 1e39)
    assert "is not finite in update 1, after 32 timesteps; networks and optimizers" in refusal(lambda: model.learn(ROLLOUT))
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("solver", ["nystrom", "none"])
@pytest.mark.parametrize("actions", KINDS)
def test_seeded_runs_are_equal_in_one_call_or_two(actions: str, solver: str) -> None:
    arguments: dict[str, Any] = {"n_epochs": 2, "ihvp_solver": solver}
    whole = masked(env=masked_env(actions), **arguments).learn(3 * ROLLOUT)
    masked(seed=7).learn(ROLLOUT)
    parts = masked(env=masked_env(actions), **arguments).learn(ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(parts))
    other = masked(env=masked_env(actions), **arguments, seed=1).learn(3 * ROLLOUT)
    assert moved(actor_of(whole), actor_of(other)) and moved(critic_of(whole), critic_of(other))


@pytest.mark.parametrize("actions", KINDS)
def test_continuing_from_a_zip(actions: str, tmp_path: Path) -> None:
    """As if never interrupted, but for the rollouts before, which the zip does not hold."""
    model = masked(env=masked_env(actions), target_kl=0.5, learning_rate=2e-3, n_epochs=2).learn(ROLLOUT)
    model.save(tmp_path / "model")
    env = copy.deepcopy(model.get_env())
    generators = random.getstate(), np.random.get_state(), th.get_rng_state()  # noqa: NPY002
    model._former_rollouts.clear()
    model.learn(2 * ROLLOUT, reset_num_timesteps=False)

    loaded = MaskableBLPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    assert loaded.target_kl == 0.5 and loaded.n_epochs == 2
    random.setstate(generators[0])
    np.random.set_state(generators[1])  # noqa: NPY002
    th.set_rng_state(generators[2])
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps == 3 * ROLLOUT
    assert not differences(state_of(model), state_of(loaded)) and logged(model) == logged(loaded)
    assert forbidden(env) == 0


def test_a_loaded_model_acts_under_masks(tmp_path: Path) -> None:
    """Without an environment, and the policy alone."""
    model = masked().learn(ROLLOUT)
    model.save(tmp_path / "model")
    model.policy.save(str(tmp_path / "policy"))
    loaded = MaskableBLPO.load(tmp_path / "model", device="cpu")
    policy = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    observations = np.stack([BOX.sample() for _ in range(50)])
    masks = np.random.default_rng(0).random((50, 3)) < 0.5
    masks[:, 0] = True
    expected, _ = model.predict(observations, deterministic=True, action_masks=masks)
    assert masks[np.arange(50), expected].all() and len({*expected.tolist()}) > 1
    for twin in (loaded, policy):
        assert (twin.predict(observations, deterministic=True, action_masks=masks)[0] == expected).all()


@pytest.mark.parametrize("reset_env", [False, True])
def test_resumed(reset_env: bool, tmp_path: Path) -> None:
    """An interrupted training goes on exactly, whether the environment is pickled or reset."""

    def start(n_rollouts: int, path: str) -> MaskableBLPO:
        checkpoint = ResumableCheckpoint(tmp_path / path, reset_env=reset_env)
        return masked(env=masked_env("MultiDiscrete"), critic_rollouts=3).learn(n_rollouts * ROLLOUT, checkpoint)

    whole = start(5, "whole")
    start(3, "part")
    masked(seed=7).learn(ROLLOUT)
    env = masked_env("MultiDiscrete") if reset_env else None
    model = resume(tmp_path / "part", env, algorithm_class=MaskableBLPO, device="cpu")
    assert type(model) is MaskableBLPO and model.num_timesteps == 3 * ROLLOUT
    model.learn(2 * ROLLOUT, ResumableCheckpoint(tmp_path / "part", reset_env=reset_env), reset_num_timesteps=False)
    assert not differences(state_of(whole), state_of(model)) and forbidden(model.env) == 0


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not this")


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path) -> None:
    model = masked()
    model.save(tmp_path / "model")
    content = (tmp_path / "model.zip").read_bytes()
    model.learn(ROLLOUT).policy.optimizer.param_groups[0]["lr"] = Unpicklable()
    with pytest.raises(RuntimeError, match="not this"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_epochs", 0, "`n_epochs` must be an integer of at least 1, got 0"),
        ("clip_range_vf", 0.2, "`clip_range_vf` must be None"),
        ("ent_coef", -0.1, "`ent_coef` must be a finite number >= 0 or a schedule"),
        ("critic_learning_rate", "1e-3", "`critic_learning_rate` must be a finite number >= 0 or a schedule"),
        ("ihvp_kwargs", {"ranks": 5}, "`ihvp_kwargs` takes "),
        ("curvature", "fisher", "`curvature` must be one of 'gauss_newton', 'hessian'"),
    ],
)
def test_wrong_arguments(name: str, value: Any, message: str, tmp_path: Path) -> None:
    """In the constructor, when a model is loaded, and when set between two updates."""
    model = masked()
    model.save(tmp_path / "model")
    collect_rollout(model)
    before = state_of(model)
    assert message in refusal(lambda: masked(**{name: value}))
    assert message in refusal(lambda: MaskableBLPO.load(tmp_path / "model", device="cpu", **{name: value}))
    setattr(model, name, value)
    assert message in refusal(model.train)
    assert not differences(before, state_of(model))


def test_schedules_and_settings_that_change_between_updates_count() -> None:
    model = masked(learning_rate=LinearSchedule(1e-2, 0.0, 1.0), ent_coef=lambda progress: 0.1 * progress)
    model.learn(2 * ROLLOUT)
    assert logged(model)["learning_rate"] == 0 and logged(model)["ent_coef"] == 0
    model.learning_rate, model.ent_coef, model.n_epochs = 1e-3, 0.2, 3
    model.learn(ROLLOUT)
    assert (logged(model)["learning_rate"], logged(model)["ent_coef"], logged(model)["n_updates"]) == (1e-3, 0.2, 5)


def test_arguments_arrive_as_those_of_maskable_ppo_and_blpo() -> None:
    of_ppo: dict[str, Any] = {
        "learning_rate": 1e-3, "n_steps": 12, "batch_size": 6, "n_epochs": 2, "gamma": 0.9, "gae_lambda": 0.8,
        "clip_range": 0.3, "normalize_advantage": False, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.4,
        "rollout_buffer_class": MaskableRolloutBuffer, "rollout_buffer_kwargs": {}, "target_kl": 0.7, "stats_window_size": 5,
        "tensorboard_log": None, "policy_kwargs": {"net_arch": [4]}, "verbose": 0, "seed": 3,
    }  # fmt: skip
    own: dict[str, Any] = {
        "critic_learning_rate": 3e-3, "n_critic_updates": 2, "critic_rollouts": 5, "ihvp_solver": "cg",
        "ihvp_kwargs": {"damping": 0.1}, "ihvp_interval": 1, "curvature": "hessian", "max_correction_ratio": 0.5,
        "engine": "torch",
    }  # fmt: skip
    ppo: Any = MaskablePPO("MlpPolicy", masked_env(), **of_ppo, device="cpu")
    args: list[Any] = ["MlpPolicy", masked_env(), *of_ppo.values(), "cpu"]
    args.insert(9, None)  # `clip_range_vf`, which can be nothing else
    for model in (masked(**of_ppo, **own), MaskableBLPO(*args, **own)):
        for name in of_ppo.keys() - {"clip_range", "stats_window_size"}:
            assert getattr(model, name) == getattr(ppo, name), name
        assert {name: getattr(model, name) for name in own} == own
        assert model.clip_range(1) == 0.3 and model._stats_window_size == 5
        model.learn(24)


def test_spaces_and_policies_that_are_refused() -> None:
    with pytest.raises((ValueError, AssertionError), match=r"only supports .*Discrete.* as action spaces but Box"):
        masked(env=SpaceEnv(action_space=TORQUES))
    with pytest.raises(ValueError, match="must subclass MaskableActorCriticPolicy"):
        masked(BLPO.policy_aliases["MlpPolicy"])
    with pytest.raises(ValueError, match="`engine`='numba' cannot train this model"):
        masked("MultiInputPolicy", masked_env(observations=DICT), engine="numba", n_steps=8).learn(16)


# Beside BLPO and MaskablePPO


def test_blpo_says_that_it_ignores_masks() -> None:
    env = Masked(SpaceEnv())
    with pytest.warns(UserWarning) as caught:
        small(env=env, engine="torch").learn(32)
    messages = [str(warning.message) for warning in caught if "action_masks" in str(warning.message)]
    assert messages == ["The environment has `action_masks()`, which BLPO ignores: `MaskableBLPO` takes them."]
    assert env.forbidden > 0


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_warning_where_there_is_nothing_to_say() -> None:
    small(engine="torch").learn(32)
    masked().learn(ROLLOUT)


def test_each_class_refuses_what_the_other_has_saved(tmp_path: Path) -> None:
    masked().save(tmp_path / "masked")
    small(env=SpaceEnv()).save(tmp_path / "plain")
    assert "`MaskableBLPO`" in refusal(lambda: BLPO.load(tmp_path / "masked", device="cpu"))
    with pytest.raises(ValueError, match="must subclass MaskableActorCriticPolicy"):
        MaskableBLPO.load(tmp_path / "plain", device="cpu")
    masked().learn(ROLLOUT, ResumableCheckpoint(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="MaskableBLPO"):
        resume(tmp_path / "checkpoint", device="cpu")


def test_a_zip_of_maskable_ppo_is_refused(tmp_path: Path) -> None:
    MaskablePPO("MlpPolicy", masked_env(), **SMALL).save(tmp_path / "ppo")
    assert "not saved by BLPO" in refusal(lambda: MaskableBLPO.load(tmp_path / "ppo", device="cpu"))


def test_weights_of_maskable_ppo_can_be_taken_over() -> None:
    """As the message above says."""
    ppo = MaskablePPO("MlpPolicy", masked_env(), **(SMALL | {"seed": 5}))
    model = masked()
    model.set_parameters({"policy": ppo.policy.state_dict()}, exact_match=False)  # type: ignore[dict-item]
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), ppo.policy.parameters(), strict=True))
    assert changed(model, lambda: model.learn(ROLLOUT))


def test_signature_begins_with_that_of_maskable_ppo() -> None:
    def parameters(cls: type) -> list[tuple[str, Any]]:
        return [(name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items()]

    of_ppo, of_blpo = parameters(MaskablePPO), parameters(BLPO)
    assert parameters(MaskableBLPO)[: len(of_ppo)] == of_ppo
    own = [parameter for parameter in of_blpo if parameter[0] not in dict(of_ppo) and "sde" not in parameter[0]]
    assert parameters(MaskableBLPO)[len(of_ppo) :] == own

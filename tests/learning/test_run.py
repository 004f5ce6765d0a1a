"""Short runs over what a user may combine: both networks learn, all stays finite, all is logged."""

import copy
import csv
import io
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, IMAGE, OBSERVATION_SPACES, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from models import AtRolloutStart, actor_of, collect_rollout, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_blpo import BLPO

PPO_KEYS = {
    "learning_rate", "entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss",
    "explained_variance", "n_updates", "clip_range",
}  # fmt: skip
NESTED_KEYS = {"critic_learning_rate", "ent_coef", "critic_loss_before", "critic_loss_after"}
CORRECTION_KEYS = {
    "correction_ratio", "correction_cosine", "correction_capped", "correction_skipped", "ihvp_residual",
}  # fmt: skip
SOLVERS = ["nystrom", "cg", "nystrom_cg", "exact", "none"]


def policy_name(space: spaces.Space) -> str:
    return "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if space is IMAGE else "MlpPolicy"


def check_learning(model: BLPO) -> BLPO:
    """Train for two rollouts: both networks move, and the log has every key."""
    actor, critic = actor_of(model), critic_of(model)
    model.learn(2 * model.n_steps * model.n_envs)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))
    values = logged(model)
    expected = PPO_KEYS | NESTED_KEYS | (set() if model.ihvp_solver == "none" else CORRECTION_KEYS)
    expected |= {"std"} if isinstance(model.action_space, spaces.Box) else set()
    # An indefinite Hessian may fail every solve, and then there is no correction to describe
    failed = CORRECTION_KEYS if model.curvature == "hessian" and values.get("correction_skipped") else set()
    assert expected - failed <= values.keys() <= expected
    assert all(math.isfinite(value) for name, value in values.items() if name not in failed)
    return model


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_action_spaces(actions: str, n_envs: int) -> None:
    check_learning(small(env=vec_env(SpaceEnv(action_space=ACTION_SPACES[actions]), n_envs)))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
def test_observation_spaces(observations: str, curvature: str) -> None:
    space = OBSERVATION_SPACES[observations]
    model = small(policy_name(space), vec_env(SpaceEnv(space), 2), n_steps=8, curvature=curvature, ihvp_kwargs={"rank": 2})
    check_learning(model)
    assert model.predict(space.sample())[0] in model.action_space


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("actions", ["Box", "Discrete"])
def test_solvers(solver: str, curvature: str, actions: str) -> None:
    model = small(env=SpaceEnv(action_space=ACTION_SPACES[actions]), ihvp_solver=solver, curvature=curvature)
    check_learning(model)
    if curvature == "gauss_newton" and solver != "none":
        assert logged(model)["correction_skipped"] == 0 < logged(model)["correction_ratio"]


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize(
    "policy_kwargs",
    [{}, {"squash_output": True}, {"use_expln": True, "full_std": False}],
    ids=["plain", "squashed", "expln"],
)
def test_gsde(policy_kwargs: dict[str, Any], ent_coef: float) -> None:
    env = vec_env(SpaceEnv(action_space=TORQUES), 2)
    check_learning(small(env=env, use_sde=True, sde_sample_freq=4, ent_coef=ent_coef, policy_kwargs=policy_kwargs))


def test_entropy_bonus_raises_the_entropy() -> None:
    def std(ent_coef: float) -> float:
        model = small(env=SpaceEnv(action_space=TORQUES), ent_coef=ent_coef, learning_rate=1e-2, n_epochs=3)
        return logged(model.learn(48))["std"]

    assert std(10.0) > std(0.0)


def test_vec_normalize() -> None:
    env = VecNormalize(vec_env(SpaceEnv(reward_scale=100.0), 3))
    assert check_learning(small(env=env)).get_vec_normalize_env() is env
    assert env.ret_rms.count > 90


@pytest.mark.parametrize("target_kl", [1e-4, 1e30])
def test_target_kl_stops_before_the_step(target_kl: float) -> None:
    steps: list[None] = []
    model = small(target_kl=target_kl, n_epochs=20, learning_rate=1e-2, max_grad_norm=math.inf)
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    model.learn(16)
    # The minibatch that was found too far away is logged and not followed
    n_minibatches = len(steps) + (target_kl < 1)
    assert 1 <= len(steps) < 40 if target_kl < 1 else len(steps) == 40
    assert logged(model)["n_updates"] == math.ceil(n_minibatches / 2)


@pytest.mark.parametrize(("batch_size", "n_minibatches"), [(1, 48), (16, 3), (20, 3), (48, 1), (1000, 1)])
@pytest.mark.parametrize("n_critic_updates", [1, 3])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_number_of_steps(batch_size: int, n_minibatches: int, n_critic_updates: int) -> None:
    model = small(env=vec_env(SpaceEnv(), 3), batch_size=batch_size, n_critic_updates=n_critic_updates, n_epochs=2)
    steps: list[str] = []
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append("actor"))
    model.critic_optimizer.register_step_post_hook(lambda *_: steps.append("critic"))
    model.learn(48)
    assert steps == 2 * (n_critic_updates * n_minibatches * ["critic"] + n_minibatches * ["actor"])


def test_a_batch_size_that_does_not_divide_the_rollout_is_noted() -> None:
    with pytest.warns(UserWarning, match="You have specified a mini-batch size of 10, .* `n_steps \\* n_envs = 16`"):
        small(batch_size=10)


def test_schedules_change_both_optimizers() -> None:
    model = small(
        learning_rate=LinearSchedule(1e-2, 0.0, 1.0),
        critic_learning_rate=lambda progress: 0.5 if progress > 0.4 else 0.0,
        clip_range=LinearSchedule(0.4, 0.0, 1.0),
    )
    rates: list[tuple[float, ...]] = []
    critics: list[list[th.Tensor]] = []

    def look(m: BLPO) -> None:
        critics.append(critic_of(m))
        if m.num_timesteps > 0:
            rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in (m.policy.optimizer, m.critic_optimizer)))
            assert rates[-1] == (logged(m)["learning_rate"], logged(m)["critic_learning_rate"])
            rates[-1] += (logged(m)["clip_range"],)

    model.learn(64, callback=AtRolloutStart(look))
    np.testing.assert_allclose(rates, [(0.75e-2, 0.5, 0.3), (0.5e-2, 0.5, 0.2), (0.25e-2, 0.0, 0.1)])
    # At rate 0 the critic stands still
    assert moved(critics[1], critics[2]) and not moved(critics[2], critics[3])


class OwnBuffer(DictRolloutBuffer):
    def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


def test_a_buffer_of_the_users() -> None:
    space = spaces.Dict({"position": BOX})
    settings: dict[str, Any] = {"rollout_buffer_class": OwnBuffer, "rollout_buffer_kwargs": {"note": "mine"}}
    model = check_learning(small("MultiInputPolicy", SpaceEnv(space), **settings))
    assert model.rollout_buffer.note == "mine"  # type: ignore[attr-defined]
    plain = state_of(small().learn(16))
    assert not differences(plain, state_of(small(rollout_buffer_class=type("Own", (RolloutBuffer,), {})).learn(16)))


def test_the_spaces_of_the_environment_are_left_alone() -> None:
    """An environment that draws from its own space sees the same numbers as without BLPO."""
    first, second = SpaceEnv(spaces.MultiBinary(4)), SpaceEnv(spaces.MultiBinary(4))
    first.observation_space.seed(1)
    second.observation_space.seed(1)
    small(env=first)
    np.testing.assert_array_equal(first.observation_space.sample(), second.observation_space.sample())


def test_csv_log(tmp_path: Path) -> None:
    model = small(env=Monitor(SpaceEnv(action_space=TORQUES)))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(48)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))[1:]
    expected = {f"train/{name}" for name in PPO_KEYS | NESTED_KEYS | CORRECTION_KEYS | {"std"}}
    expected |= {"time/iterations", "time/fps", "rollout/ep_rew_mean", "rollout/ep_len_mean"}
    assert all(math.isfinite(float(row[name])) for row in rows for name in expected)
    assert [float(row["train/n_updates"]) for row in rows] == [1, 2]
    assert [float(row["time/total_timesteps"]) for row in rows] == [32, 48]


def test_callbacks_and_loggers_of_sb3(tmp_path: Path) -> None:
    for module in ("tensorboard", "tqdm", "rich"):
        pytest.importorskip(module)
    evaluation = EvalCallback(Monitor(SpaceEnv()), eval_freq=16, n_eval_episodes=1, verbose=0, log_path=str(tmp_path))
    checkpoints = CheckpointCallback(save_freq=16, save_path=str(tmp_path))
    small(tensorboard_log=str(tmp_path)).learn(32, [evaluation, checkpoints], progress_bar=True)
    assert (tmp_path / "evaluations.npz").is_file()
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == ["rl_model_16_steps.zip", "rl_model_32_steps.zip"]
    assert list(tmp_path.glob("BLPO_1/events.out.tfevents.*"))


@pytest.mark.parametrize("total_timesteps", [40, 4e1])
def test_total_timesteps(total_timesteps: float) -> None:
    assert small().learn(total_timesteps).num_timesteps == 48  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_registered_environments(name: str) -> None:
    check_learning(small(env=name, n_steps=32, seed=None))
    check_learning(small(env=gym.make(name), n_steps=32))


def test_set_random_seed() -> None:
    model = small(env="CartPole-v1", critic_rollouts=1)
    parameters: Any = copy.deepcopy(model.get_parameters())
    runs = []
    for _ in range(2):
        model.set_parameters(parameters)
        model.set_random_seed(7)
        model._last_obs = None
        runs.append(state_of(model.learn(32)))
    assert not differences(*runs)


@pytest.mark.parametrize("observations", ["Box", "image", "Dict"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gpu(solver: str, observations: str) -> None:
    """A whole update is the CPU's."""
    if not th.cuda.is_available():
        pytest.skip("no GPU")
    space = OBSERVATION_SPACES[observations]
    settings: dict[str, Any] = {"n_steps": 8, "n_epochs": 2, "ihvp_solver": solver, "ihvp_kwargs": {"rank": 2, "max_iter": 3}}
    # Where a gradient is no more than rounding, Adam's steps go anywhere
    settings["policy_kwargs"] = {"net_arch": [8], "optimizer_class": th.optim.SGD}
    cpu = collect_rollout(small(policy_name(space), SpaceEnv(space, TORQUES), **settings))
    cpu.save(file := io.BytesIO())
    gpu = BLPO.load(file, device="cuda")
    gpu.set_logger(cpu.logger)
    for name in ("rollout_buffer", "_last_obs", "_last_episode_starts", "_truncations"):
        setattr(gpu, name, getattr(cpu, name))
    before = actor_of(cpu), critic_of(cpu)
    for model in (cpu, gpu):
        th.manual_seed(0)
        model.train()
    assert moved(before[0], actor_of(cpu)) and moved(before[1], critic_of(cpu))
    for a, b in zip(cpu.policy.parameters(), gpu.policy.parameters(), strict=True):
        th.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)

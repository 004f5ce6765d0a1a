"""Interrupted training, continued in a new process from a checkpoint: bit for bit what it would have been."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from envs import BOX, SpaceEnv, vec_env
from gymnasium import spaces
from models import SMALL, actor_of, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_blpo import BLPO
from sb3_blpo.resume import ResumableCheckpoint, resume

#: A rollout of two environments takes 32 steps: checkpoints at 64 and 128
TOTAL, SAVE_FREQ, CRASH = 160, 33, 100


def gym_env(name: str) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(gym.make(name)) for _ in range(2)])


class Noisy(gym.RewardWrapper[Any, Any]):
    """Draws from NumPy's global generator, as old environments do."""

    def reward(self, reward: Any) -> float:
        return float(reward) + np.random.normal()  # noqa: NPY002


ENVS: dict[str, Callable[[], VecEnv]] = {
    "CartPole": lambda: gym_env("CartPole-v1"),
    "Pendulum": lambda: VecFrameStack(VecNormalize(gym_env("Pendulum-v1")), 2),
    "Hopper": lambda: VecNormalize(gym_env("Hopper-v5")),
    "LunarLander": lambda: VecNormalize(gym_env("LunarLander-v3")),
    "Noisy": lambda: vec_env(Noisy(gym.make("Pendulum-v1")), 2),
    "processes": lambda: SubprocVecEnv([lambda: gym.make("CartPole-v1") for _ in range(2)], start_method="spawn"),
}
#: Environment, whether it is seeded and reset, arguments
RUNS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "pickled": ("CartPole", False, {"critic_rollouts": 1, "ihvp_kwargs": {"sketch": "columns", "rank": 4}}),
    "normalized": ("Pendulum", False, {"critic_rollouts": 4, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0)}),
    "MuJoCo": ("Hopper", False, {"ihvp_solver": "nystrom_cg"}),
    "gSDE": ("Noisy", False, {"use_sde": True, "sde_sample_freq": 4}),
    "reset": ("Noisy", True, {"critic_rollouts": 2, "curvature": "hessian", "ihvp_kwargs": {"rank": 3}}),
    "reset gSDE": ("Pendulum", True, {"use_sde": True}),
    "Box2D": ("LunarLander", True, {}),
}


class Crash(BaseCallback):
    """Ends the training within a rollout."""

    def _on_step(self) -> bool:
        if self.num_timesteps >= CRASH:
            raise KeyboardInterrupt
        return True


def finish(folder: Path, run: str) -> bytes:
    """Resume a run, complete it, and tell what became of it."""
    env, reset_env, _ = RUNS[run]
    model = resume(folder / run, env=ENVS[env]() if reset_env else None, device="cpu")
    assert model.num_timesteps == 64
    checkpoint = ResumableCheckpoint(folder / run, SAVE_FREQ, reset_env)
    model.learn(TOTAL - model.num_timesteps, checkpoint, reset_num_timesteps=False)
    assert model.env is not None
    model.env.close()
    return pickle.dumps((state_of(model), logged(model)))


@pytest.fixture(scope="module")
def new_process() -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("run", RUNS)
def test_resumed_in_a_new_process(run: str, new_process: ProcessPoolExecutor, tmp_path: Path) -> None:
    env, reset_env, arguments = RUNS[run]
    uninterrupted = small(env=ENVS[env](), **arguments)
    uninterrupted.learn(TOTAL, ResumableCheckpoint(tmp_path / "other", SAVE_FREQ, reset_env))
    assert uninterrupted.num_timesteps == TOTAL

    interrupted = small(env=ENVS[env](), **arguments)
    with pytest.raises(KeyboardInterrupt):
        interrupted.learn(TOTAL, [ResumableCheckpoint(tmp_path / run, SAVE_FREQ, reset_env), Crash()])
    assert differences(state_of(interrupted), state_of(uninterrupted))
    for model in (interrupted, uninterrupted):
        assert model.env is not None
        model.env.close()
    state, log = pickle.loads(new_process.submit(finish, tmp_path, run).result())
    assert not differences(state_of(uninterrupted), state)
    assert log == logged(uninterrupted)


def test_the_end_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(env=ENVS["Pendulum"]()).learn(TOTAL, ResumableCheckpoint(tmp_path / "model", save_freq=1000, verbose=2))
    assert capsys.readouterr().out == f"Saving resumable checkpoint to {tmp_path / 'model'}\n"
    loaded = resume(tmp_path / "model.zip", device="cpu")
    assert loaded.num_timesteps == TOTAL
    # The last call left the generators as they were at the checkpoint
    loaded.learn(32, reset_num_timesteps=False)
    resume(tmp_path / "model", device="cpu")
    model.learn(32, reset_num_timesteps=False)
    assert not differences(state_of(model), state_of(loaded))
    # As any zip of BLPO it can be loaded without its environment
    assert moved(actor_of(BLPO.load(tmp_path / "model", device="cpu")), actor_of(model))


@pytest.mark.parametrize("run", ["gSDE", "reset gSDE", "reset", "normalized"])
def test_learning_in_parts(run: str, tmp_path: Path) -> None:
    """With a checkpoint at the end of each part, and continued from there: as in one, whatever a rollout draws first."""
    env, reset_env, arguments = RUNS[run]
    arguments = arguments | {"learning_rate": 1e-3}  # each part would have its own schedule

    def checkpoint() -> ResumableCheckpoint:
        return ResumableCheckpoint(tmp_path / "model", 64, reset_env)

    whole = small(env=ENVS[env](), **arguments).learn(128, checkpoint())
    parts = small(env=ENVS[env](), **arguments).learn(64, checkpoint())
    parts.learn(64, checkpoint(), reset_num_timesteps=False)
    small(env=ENVS[env](), **arguments).learn(64, checkpoint())
    resumed = resume(tmp_path / "model", env=ENVS[env]() if reset_env else None, device="cpu")
    resumed.learn(64, checkpoint(), reset_num_timesteps=False)
    for model in (parts, resumed):
        assert not differences(state_of(whole), state_of(model))


@pytest.mark.parametrize(
    ("policy", "env"), [("MlpPolicy", SpaceEnv()), ("MultiInputPolicy", SpaceEnv(spaces.Dict(x=BOX, room=spaces.Discrete(3))))]
)
def test_the_rollouts_before_are_kept(policy: str, env: SpaceEnv, tmp_path: Path) -> None:
    """The critic's minibatches come from these, too; a model that is loaded without them starts anew."""

    def run(model: BLPO, n_rollouts: int, path: str) -> BLPO:
        model.learn(16 * n_rollouts, ResumableCheckpoint(tmp_path / path), reset_num_timesteps=False)
        return model

    def start() -> BLPO:
        return small(policy, copy.deepcopy(env), critic_rollouts=4)

    whole = run(start(), 8, "whole")
    run(start(), 5, "part")
    assert not differences(state_of(whole), state_of(run(resume(tmp_path / "part", device="cpu"), 3, "other")))
    run(start(), 5, "part")
    without = resume(tmp_path / "part", device="cpu")
    without._former_rollouts = BLPO.load(tmp_path / "part", device="cpu")._former_rollouts
    assert without._former_rollouts == []
    assert moved(critic_of(whole), critic_of(run(without, 3, "other")))


def test_nothing_is_saved_within_a_rollout(tmp_path: Path) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < CRASH

    small(env=ENVS["CartPole"]()).learn(TOTAL, [ResumableCheckpoint(tmp_path / "model", SAVE_FREQ), Stop()])
    assert resume(tmp_path / "model", device="cpu").num_timesteps == 64


@pytest.mark.parametrize("env", ["LunarLander", "processes"])
def test_environments_that_cannot_be_pickled(env: str, tmp_path: Path) -> None:
    model = small(env=ENVS[env]())
    with pytest.raises(
        ValueError, match=r"^The environment cannot be pickled .* use `ResumableCheckpoint\(..., reset_env=True\)`"
    ):
        model.learn(TOTAL, ResumableCheckpoint(tmp_path / "model"))
    assert not list(tmp_path.iterdir())
    assert model.env is not None
    model.env.close()


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    small().learn(16).save(tmp_path / "model")
    with pytest.raises(ValueError, match="was not saved by `ResumableCheckpoint`"):
        resume(tmp_path / "model", device="cpu")
    for reset_env, env, what in [(False, SpaceEnv(), "cannot"), (True, None, "must")]:
        small().learn(16, ResumableCheckpoint(tmp_path / "model", reset_env=reset_env))
        with pytest.raises(ValueError, match=f"`reset_env`={reset_env}, so `env` {what} be given"):
            resume(tmp_path / "model", env, device="cpu")


class Subclass(BLPO):
    """A user's own, which collects rollouts in its own way: SB3's."""

    collect_rollouts = OnPolicyAlgorithm.collect_rollouts


def test_a_subclass(tmp_path: Path) -> None:
    def start() -> BLPO:
        return Subclass("MlpPolicy", ENVS["Pendulum"](), **SMALL, use_sde=True)

    whole = start().learn(TOTAL, ResumableCheckpoint(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        start().learn(TOTAL, [ResumableCheckpoint(tmp_path / "model"), Crash()])
    resumed = resume(tmp_path / "model", algorithm_class=Subclass, device="cpu")
    resumed.learn(TOTAL - resumed.num_timesteps, ResumableCheckpoint(tmp_path / "model"), reset_num_timesteps=False)
    assert type(resumed) is Subclass and not differences(state_of(whole), state_of(resumed))
    with pytest.raises(ValueError, match="is a checkpoint of Subclass, so `algorithm_class` must be that, got BLPO"):
        resume(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("save_freq", [0, -1, "a", None])
def test_save_freq(save_freq: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`save_freq` must be a number > 0, got "):
        ResumableCheckpoint(tmp_path / "model", save_freq)


def test_not_inside_of_callbacks_that_pass_on_steps_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`ResumableCheckpoint` cannot be inside of a callback that passes on steps alone"):
        small().learn(32, EveryNTimesteps(16, CallbackList([ResumableCheckpoint(tmp_path / "model")])))

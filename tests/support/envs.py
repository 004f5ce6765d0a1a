"""Small environments: any pair of spaces, and faults on demand."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

BOX = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
DICT = spaces.Dict({"position": BOX, "room": spaces.Discrete(3), "camera": IMAGE})
DISCRETE = spaces.Discrete(3)
TORQUES = spaces.Box(-2, 2, (2,), np.float32)

OBSERVATION_SPACES: dict[str, spaces.Space] = {
    "Box": BOX,
    "Box2D": spaces.Box(-1, 1, (2, 3), np.float64),
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
    "MultiBinary": spaces.MultiBinary(4),
    "image": IMAGE,
    "Dict": DICT,
}
ACTION_SPACES: dict[str, spaces.Space] = {
    "Box": TORQUES,
    "Box2D": spaces.Box(-1, 1, (2, 2), np.float32),
    "Discrete": DISCRETE,
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(3),
}


class SpaceEnv(gym.Env[Any, Any]):
    """
    Observations at random from their space; the reward grows with the action and with time. Episodes end by truncation and
    by termination in turn.

    :param observation_space: Any
    :param action_space: Any
    :param episode_length: Of every episode
    :param reward_scale: Factor of the reward
    """

    def __init__(
        self,
        observation_space: spaces.Space = BOX,
        action_space: spaces.Space = DISCRETE,
        episode_length: int = 5,
        reward_scale: float = 1.0,
    ) -> None:
        self.observation_space = copy.deepcopy(observation_space)  # Not to share its generator
        self.action_space = copy.deepcopy(action_space)
        self.episode_length = episode_length
        self.reward_scale = reward_scale
        self.episode = 0
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        self.episode += 1
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t += 1
        end = self.t == self.episode_length
        truncated = end and self.episode % 2 == 1
        reward = self.reward_scale * (float(np.mean(action)) + 0.3 * self.t)
        return self.observation_space.sample(), reward, end and not truncated, truncated, {}


class FaultyEnv(SpaceEnv):
    """
    A :class:`SpaceEnv` that says something that is no number. Its first episode is truncated.

    :param where: "reward", "reset", "step" or "terminal": which output is at fault, in every episode; "": none
    :param value: NaN or an infinity
    :param observation_space: Box, or a Dict with a Box "position"
    """

    def __init__(self, where: str, value: float, observation_space: spaces.Space = BOX) -> None:
        super().__init__(observation_space)
        self.where = where
        self.value = value

    def _spoil(self, observation: Any, spoilt: bool) -> Any:
        box = observation["position"] if isinstance(observation, dict) else observation
        if spoilt:
            box[1] = self.value
        return observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return self._spoil(observation, self.where == "reset"), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        end = terminated or truncated
        spoilt = (self.where == "step" and not end) or (self.where == "terminal" and end)
        if self.where == "reward" and self.t == 2:
            reward = self.value
        return self._spoil(observation, spoilt), reward, terminated, truncated, info


def choices(space: Any) -> list[int]:
    """How many choices each part of an action has: the lengths of its masks."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return list(space.nvec) if isinstance(space, spaces.MultiDiscrete) else [2] * space.n


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """
    About half of all choices are forbidden, others at each step. Counts how often they are taken nevertheless.

    :param env: With discrete actions of any kind
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.forbidden = 0
        self.masks = [np.ones(n, dtype=bool) for n in choices(env.action_space)]

    def action_masks(self) -> Any:
        return np.concatenate(self.masks)

    def _draw(self) -> None:
        for mask in self.masks:
            mask[:] = self.np_random.random(len(mask)) < 0.4
            mask[self.np_random.integers(len(mask))] = True

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        result = super().reset(**arguments)
        self._draw()
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        allowed = [mask[choice] for mask, choice in zip(self.masks, np.atleast_1d(action), strict=True)]
        self.forbidden += not all(allowed)
        result = super().step(action)
        self._draw()
        return result


def vec_env(env: gym.Env[Any, Any], n_envs: int) -> DummyVecEnv:
    """
    :param env: An environment
    :param n_envs: How many
    :return: Independent copies of it
    """
    return DummyVecEnv([lambda: copy.deepcopy(env) for _ in range(n_envs)])

"""BLPO with action masks: the collecting, policies and rollout buffers of sb3-contrib's MaskablePPO, and BLPO's update."""

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_blpo.bilevel import Bilevel
from sb3_blpo.rollout import Rollout, size

SelfMaskableBLPO = TypeVar("SelfMaskableBLPO", bound="MaskableBLPO")


class MaskableBLPO(Bilevel, MaskablePPO):  # type: ignore[misc]
    """
    BLPO with invalid action masking (Huang and Ontañón, https://arxiv.org/abs/2006.14171), as in sb3-contrib's MaskablePPO:
    the environment, or an ``ActionMasker`` around it, has a method ``action_masks()``, which says what is allowed now.

    Discrete, MultiDiscrete and MultiBinary actions. The arguments up to ``_init_setup_model`` are those of MaskablePPO, all
    others those of :class:`sb3_blpo.BLPO`, which explains them.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy: sb3-contrib's masked ones)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The actor's learning rate, or a schedule
    :param n_steps: The number of steps to run for each environment per update
    :param batch_size: Minibatch size in transitions, for both levels
    :param n_epochs: Number of passes of the actor over the rollout
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, in [0, 1]
    :param clip_range: Clipping parameter, or a schedule
    :param clip_range_vf: Must be ``None``
    :param normalize_advantage: Whether to normalize the advantages, over the whole rollout
    :param ent_coef: Entropy coefficient for the actor's loss, or a schedule
    :param vf_coef: Weighs the critic's loss in the logged ``train/loss``, and nothing else
    :param max_grad_norm: The maximum norm of the actor's gradient
    :param rollout_buffer_class: Rollout buffer class to use, one that stores masks
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Limit of the KL divergence between updates
    :param stats_window_size: Number of episodes that the logged success rate, episode length and reward are means over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug ones
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param critic_learning_rate: The critic's learning rate, or a schedule; ``None``: four times the actor's
    :param n_critic_updates: The critic takes so many times as many steps as the actor
    :param critic_rollouts: The critic's minibatches are drawn from so many of the latest rollouts
    :param ihvp_solver: How the critic's linear system is solved, or "none"
    :param ihvp_kwargs: Settings of the solver
    :param ihvp_interval: Number of epochs between solves; ``None``: one solve a rollout
    :param curvature: "gauss_newton" or "hessian"
    :param max_correction_ratio: Largest norm of the correction relative to that of the advantages
    :param engine: What computes the gradient steps: "numba", "torch" or "auto"; it acts as sb3-contrib does
    :raises ValueError: If an argument is of the wrong type or out of range, if masks do not fit the action space, or if one
        allows no action
    """

    actor_inputs = ("action_masks",)

    def __init__(
        self,
        policy: str | type[MaskableActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        critic_learning_rate: float | Schedule | None = None,
        n_critic_updates: int = 3,
        critic_rollouts: int | None = None,
        ihvp_solver: str = "nystrom",
        ihvp_kwargs: dict[str, Any] | None = None,
        ihvp_interval: int | None = None,
        curvature: str = "gauss_newton",
        max_correction_ratio: float | None = 1.0,
        engine: str = "auto",
    ):
        super().__init__(
            policy, env, learning_rate=learning_rate, n_steps=n_steps, batch_size=batch_size, n_epochs=n_epochs, gamma=gamma,
            gae_lambda=gae_lambda, clip_range=clip_range, clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage, ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef, max_grad_norm=max_grad_norm, rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs, target_kl=target_kl, stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log, policy_kwargs=policy_kwargs, verbose=verbose, seed=seed, device=device,
            _init_setup_model=False,
        )  # fmt: skip
        self._init_bilevel(
            _init_setup_model, critic_learning_rate=critic_learning_rate, n_critic_updates=n_critic_updates,
            critic_rollouts=critic_rollouts, ihvp_solver=ihvp_solver, ihvp_kwargs=ihvp_kwargs, ihvp_interval=ihvp_interval,
            curvature=curvature, max_correction_ratio=max_correction_ratio, engine=engine,
        )  # fmt: skip

    def learn(  # type: ignore[override]
        self: SelfMaskableBLPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "MaskableBLPO",
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskableBLPO:
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, use_masking, progress_bar
        )

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> bool:
        """As sb3-contrib's. Raises ValueError if the masks do not fit the action space."""
        try:
            return super().collect_rollouts(env, callback, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            if env.has_attr("action_masks"):
                for masks in env.env_method("action_masks"):
                    self._check_masks(masks, n_observations=1)
            raise

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As sb3-contrib's. Raises ValueError if the masks do not fit the action space, or one allows no action."""
        if action_masks is not None:
            self._check_masks(action_masks)
        try:
            return super().predict(observation, state, episode_start, deterministic, action_masks)
        except RuntimeError:
            if action_masks is not None:
                self._check_masks(action_masks, size(self.policy.obs_to_tensor(observation)[0]))
            raise

    def _finished_rollout(self) -> Rollout:
        self._check_masks(self.rollout_buffer.action_masks)
        return super()._finished_rollout()

    def _check_masks(self, masks: Any, n_observations: int | None = None) -> None:
        space: Any = self.action_space
        if isinstance(space, spaces.Discrete):
            n_choices = [int(space.n)]
        else:
            n_choices = list(space.nvec) if isinstance(space, spaces.MultiDiscrete) else [2] * space.n
        length = sum(n_choices)
        try:
            allowed = np.asarray(masks.cpu() if isinstance(masks, th.Tensor) else masks, dtype=bool)
            shape = f"the shape {allowed.shape}"
        except ValueError:
            allowed, shape = np.empty(0), "lists of different lengths"
        if allowed.size == 0 or allowed.size % length or n_observations not in (None, allowed.size // length):
            whom = {None: "each observation", 1: "one observation"}.get(
                n_observations, f"each of {n_observations} observations"
            )
            raise ValueError(f"Action masks of {space} have {length} elements for {whom}, got {shape}.")
        if not np.logical_or.reduceat(allowed.reshape(-1, length), np.cumsum([0, *n_choices[:-1]]), axis=1).all():
            raise ValueError(f"Action masks must allow at least one action, but one of {space} allows none.")

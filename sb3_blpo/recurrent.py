"""BLPO with memory: the collecting, policies and rollout buffers of sb3-contrib's RecurrentPPO, and BLPO's update."""

import dataclasses
from typing import Any, TypeVar

import numpy as np
import torch as th
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch.utils._pytree import tree_map

from sb3_blpo.bilevel import Bilevel
from sb3_blpo.checks import WrongArgument
from sb3_blpo.engines.recurrent import RecurrentEngine, RecurrentRollout
from sb3_blpo.policies import refuse_shared_lstm
from sb3_blpo.rollout import Rollout, episode_starts

SelfRecurrentBLPO = TypeVar("SelfRecurrentBLPO", bound="RecurrentBLPO")


class RecurrentBLPO(Bilevel, RecurrentPPO):  # type: ignore[misc]
    """
    BLPO for policies with memory, as sb3-contrib's RecurrentPPO: actor and critic have an LSTM each. How the critic would
    respond is a gradient through time.

    The arguments up to ``_init_setup_model`` are those of RecurrentPPO with its defaults, all others those of
    :class:`sb3_blpo.BLPO`, which explains them.

    :param policy: The policy model to use (MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The actor's learning rate, or a schedule
    :param n_steps: The number of steps to run for each environment per update
    :param batch_size: Minibatch size in transitions, for both levels: a piece of the rollout in time order, whose memory at
        its start is the one that was collected
    :param n_epochs: Number of passes of the actor over the rollout
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, in [0, 1]
    :param clip_range: Clipping parameter, or a schedule
    :param clip_range_vf: Must be ``None``
    :param normalize_advantage: Whether to normalize the advantages, over the whole rollout
    :param ent_coef: Entropy coefficient for the actor's loss, or a schedule
    :param vf_coef: Weighs the critic's loss in the logged ``train/loss``, and nothing else
    :param max_grad_norm: The maximum norm of the actor's gradient
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE; -1: only at the beginning of the rollout
    :param target_kl: Limit of the KL divergence between updates
    :param stats_window_size: Number of episodes that the logged success rate, episode length and reward are means over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. The critic has an LSTM of its own
        (``enable_critic_lstm=True``, the default) or none (False); ``shared_lstm=True`` is refused
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug ones
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param critic_learning_rate: The critic's learning rate, or a schedule; ``None``: four times the actor's
    :param n_critic_updates: The critic takes so many times as many steps as the actor
    :param critic_rollouts: The critic's minibatches are drawn from so many of the latest rollouts. Its memory at each of their
        states is kept as well
    :param ihvp_solver: How the critic's linear system is solved, or "none"
    :param ihvp_kwargs: Settings of the solver
    :param ihvp_interval: Number of epochs between solves; ``None``: one solve a rollout
    :param curvature: "gauss_newton" or "hessian"
    :param max_correction_ratio: Largest norm of the correction relative to that of the advantages
    :param engine: "auto" or "torch": the compiled engine does not serve recurrent policies
    :raises ValueError: If an argument is of the wrong type or out of range, or if actor and critic share a parameter
    """

    remembered = ("_former_rollouts", "_last_lstm_states")
    torch_engine = RecurrentEngine

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: None = None,
        normalize_advantage: bool = True,
        ent_coef: float | Schedule = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
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
            vf_coef=vf_coef, max_grad_norm=max_grad_norm, use_sde=use_sde, sde_sample_freq=sde_sample_freq,
            target_kl=target_kl, stats_window_size=stats_window_size, tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs, verbose=verbose, seed=seed, device=device, _init_setup_model=False,
        )  # fmt: skip
        self._init_bilevel(
            _init_setup_model, critic_learning_rate=critic_learning_rate, n_critic_updates=n_critic_updates,
            critic_rollouts=critic_rollouts, ihvp_solver=ihvp_solver, ihvp_kwargs=ihvp_kwargs, ihvp_interval=ihvp_interval,
            curvature=curvature, max_correction_ratio=max_correction_ratio, engine=engine,
        )  # fmt: skip

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, RecurrentActorCriticPolicy):
            names = ", ".join(self.policy_aliases)
            raise WrongArgument(
                f"`policy`={self.policy_class.__name__} has no memory: RecurrentBLPO takes {names} or a subclass of "
                "RecurrentActorCriticPolicy."
            )
        refuse_shared_lstm(self.policy_kwargs.get("shared_lstm", False))
        super()._setup_model()

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> bool:
        """As sb3-contrib's, but what a fault has left in the memory is forgotten."""
        buffer: Any = self.rollout_buffer
        buffer.hidden_state_shape = (buffer.buffer_size, *buffer.hidden_state_shape[1:])  # where `n_steps` was changed
        # contrib's way to forget is a product with 0, which NaN survives
        self._last_lstm_states = tree_map(lambda x: x.nan_to_num(0.0, 0.0, 0.0), self._last_lstm_states)
        return super().collect_rollouts(env, callback, *args, **kwargs)

    def learn(
        self: SelfRecurrentBLPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "RecurrentBLPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRecurrentBLPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _finished_rollout(self) -> RecurrentRollout:
        return with_memory(super()._finished_rollout(), self.rollout_buffer)


def with_memory(rollout: Rollout, buffer: Any) -> RecurrentRollout:
    """
    :param rollout: What every policy has of it
    :param buffer: sb3-contrib's, which knows what the LSTMs remembered
    :return: The rollout in sequences
    """
    n, (n_steps, n_envs), device = len(rollout), rollout.done.shape, rollout.done.device
    starts = th.tensor(episode_starts(buffer) > 0, device=device)

    def memory(array: np.ndarray, n_observations: int) -> th.Tensor:
        if buffer.generator_ready:
            array = array.reshape(n_envs, n_steps, *array.shape[1:]).swapaxes(0, 1)
        else:
            array = array.swapaxes(1, 2)  # layers come before environments
        remembered = th.tensor(array, device=device)
        remembered[starts] = 0
        flat = remembered.flatten(0, 1)
        return th.cat([flat, flat.new_zeros(n_observations - n, *flat.shape[1:])])

    step, env = th.meshgrid(th.arange(n_steps, device=device), th.arange(n_envs, device=device), indexing="ij")
    at = (env * 2 * (n_steps + 1) + 2 * step).flatten()
    order = th.cat([at, at[-n_envs:] + 2, at[rollout.truncated] + 1]).argsort()
    cut = th.cat([(starts | (step == 0)).flatten(), rollout.done[-1] > 0, th.zeros_like(rollout.truncated, dtype=th.bool)])
    arguments: dict[str, Any] = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    arguments["observations"] = {
        "observation": rollout.observations,
        "hidden": memory(buffer.hidden_states_vf, len(order)),
        "cell": memory(buffer.cell_states_vf, len(order)),
        "cut": cut,
    }
    arguments["actor_inputs"] = {
        "hidden": memory(buffer.hidden_states_pi, n), "cell": memory(buffer.cell_states_pi, n)
    }  # fmt: skip
    return RecurrentRollout(**arguments, order=order)

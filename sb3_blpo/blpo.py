"""BLPO: Bilevel Policy Optimization with Nyström Hypergradients."""

import warnings
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import is_masking_supported
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_blpo.bilevel import Bilevel
from sb3_blpo.policies import MlpPolicy, MultiInputPolicy

SelfBLPO = TypeVar("SelfBLPO", bound="BLPO")


class BLPO(Bilevel):
    """
    Bilevel Policy Optimization with Nyström Hypergradients (BLPO).

    Actor-critic as a bilevel problem: in each epoch the critic (follower) steps towards its best response, and then the actor
    (leader) takes PPO's clipped steps, on advantages that account for how the critic would respond. That needs an
    inverse-Hessian-vector product, once a rollout, by default a Nyström approximation.

    Paper: https://arxiv.org/abs/2505.11714 (Algorithm 1); Nyström hypergradients: https://arxiv.org/abs/2302.09726

    The arguments up to ``_init_setup_model`` are those of PPO, with PPO's meanings and defaults.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...). Actor and critic share no parameter: a features
        extractor with parameters exists twice
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The actor's learning rate, >= 0, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: The number of steps to run for each environment per update: a rollout has n_steps * n_envs transitions
    :param batch_size: Minibatch size in transitions, for both levels
    :param n_epochs: Number of passes of the actor over the rollout
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, in [0, 1]. At 1 nothing is
        bootstrapped inside an episode, and the correction all but vanishes
    :param clip_range: Clipping parameter, >= 0, it can be a function of the current progress remaining (from 1 to 0)
    :param clip_range_vf: Must be ``None``: the critic has a loss of its own
    :param normalize_advantage: Whether to normalize the advantages, over the whole rollout
    :param ent_coef: Entropy coefficient for the actor's loss, >= 0, it can be a function of the current progress remaining
        (from 1 to 0)
    :param vf_coef: Weighs the critic's loss in the logged ``train/loss``, and nothing else: the critic has a loss and a rate
        of its own. A warning if it is not PPO's default
    :param max_grad_norm: The maximum norm of the actor's gradient, > 0. The critic's is not clipped
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE; -1: only at the beginning of the rollout
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected. What its
        ``advantages`` and ``returns`` hold when the rollout ends counts; its ``get()`` is not called
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param target_kl: Limit of the KL divergence between updates, > 0; ``None``: no limit
    :param stats_window_size: Number of episodes that the logged success rate, episode length and reward are means over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. ``optimizer_class`` and
        ``optimizer_kwargs`` serve both optimizers
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug ones
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run; auto: the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :param critic_learning_rate: The critic's learning rate, >= 0, it can be a function of the current progress remaining;
        ``None``: four times the actor's, as in the paper's settings, so that the critic follows
    :param n_critic_updates: The critic takes so many times as many steps as the actor (nesting), at least 1, in each epoch
        before the actor's
    :param critic_rollouts: The critic's minibatches are drawn from so many of the latest rollouts, at least 1. The number of
        its steps does not grow with them. Their states and returns stay in memory, in float32, images as they are:
        ``critic_rollouts`` * ``n_steps`` * ``n_envs`` of them. ``None``: 4, for image observations 1
    :param ihvp_solver: How the critic's linear system is solved: "nystrom" (low-rank approximation), "cg" (conjugate
        gradients), "nystrom_cg" (preconditioned by Nyström), "exact" (dense) or "none" (no correction: nested actor-critic)
    :param ihvp_kwargs: Settings of the solver: ``damping`` (> 0, in units of the trace of the Gauss-Newton matrix, 0.01),
        ``rank`` (>= 1, 20) and ``sketch`` ("values", "gaussian" or, as in the paper, "columns") of Nyström, ``max_iter``
        (>= 1, 50) and ``tol`` (>= 0, relative, 1e-5) of CG. A solver ignores those that do not concern it
    :param ihvp_interval: Number of epochs between solves, at least 1; ``None``: one solve a rollout
    :param curvature: "gauss_newton" (positive semi-definite, the default) or "hessian" (exact, in general indefinite)
    :param max_correction_ratio: Largest norm of the correction relative to that of the advantages, >= 0; ``None``: no cap, and
        the advantages keep the length that the correction gives them
    :param engine: What computes the gradient steps: "numba" (compiled, for SB3's own MLP policies on the CPU with Adam or
        AdamW), "torch" (autograd, for every policy) or "auto" (numba's where it serves); ``engine_in_use`` says which and why
    :raises ValueError: If an argument is of the wrong type or out of range, or if actor and critic share a parameter
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
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
        use_sde: bool = False,
        sde_sample_freq: int = -1,
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
            policy, env, learning_rate=learning_rate, n_steps=n_steps, gamma=gamma, gae_lambda=gae_lambda, ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=vf_coef, max_grad_norm=max_grad_norm, use_sde=use_sde, sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class, rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, policy_kwargs=policy_kwargs,
            verbose=verbose, device=device, seed=seed, _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )  # fmt: skip
        self._init_bilevel(
            _init_setup_model, batch_size=batch_size, n_epochs=n_epochs, clip_range=clip_range, clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage, target_kl=target_kl, critic_learning_rate=critic_learning_rate,
            n_critic_updates=n_critic_updates, critic_rollouts=critic_rollouts, ihvp_solver=ihvp_solver,
            ihvp_kwargs=ihvp_kwargs, ihvp_interval=ihvp_interval, curvature=curvature,
            max_correction_ratio=max_correction_ratio, engine=engine,
        )  # fmt: skip

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in RecurrentPPO.policy_aliases.keys() - self.policy_aliases.keys():
            raise ValueError(f"`policy`={policy_name!r} has memory: use `RecurrentBLPO`.")
        return super()._get_policy_from_name(policy_name)

    def _setup_model(self) -> None:
        if issubclass(self.policy_class, MaskableActorCriticPolicy):
            raise ValueError(f"`policy`={self.policy_class.__name__} takes action masks: use `MaskableBLPO`.")
        if issubclass(self.policy_class, RecurrentActorCriticPolicy):
            raise ValueError(f"`policy`={self.policy_class.__name__} has memory: use `RecurrentBLPO`.")
        super()._setup_model()
        if self.env is not None and is_masking_supported(self.env):
            warnings.warn("The environment has `action_masks()`, which BLPO ignores: `MaskableBLPO` takes them.", stacklevel=2)

    def learn(
        self: SelfBLPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "BLPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfBLPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

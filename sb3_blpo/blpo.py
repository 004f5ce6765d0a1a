"""BLPO: Bilevel Policy Optimization with Nyström Hypergradients."""

import contextlib
import copy
import io
import math
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, BasePolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule, explained_variance, obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_blpo.actor_critic import Actor, Critic
from sb3_blpo.archive import atomic_file, check_saved_by_blpo, foreign
from sb3_blpo.checks import check_arguments, check_finite, scheduled
from sb3_blpo.hypergradient import Hypergradient, hypergradient, statistics
from sb3_blpo.ihvp import Solver, make_solver
from sb3_blpo.jacobian import MAX_JACOBIAN_BYTES
from sb3_blpo.optimizers import Descent, leave_to, make_optimizer, optimizes, parameters_of
from sb3_blpo.policies import StandIn, appearance, has_own, split_parameters, unshare_features_extractor
from sb3_blpo.segments import Rollout, Segment, Truncation, each

SelfBLPO = TypeVar("SelfBLPO", bound="BLPO")

IHVP_DEFAULTS: dict[str, Any] = {"damping": 0.01, "rank": 20, "sketch": "values", "max_iter": 50, "tol": 1e-5}

#: ihvp_solver="exact" refuses a dense Hessian of more critic parameters
MAX_HESSIAN_PARAMETERS = 20_000


class CriticUpdate(NamedTuple):
    """
    One step of the critic.

    :param loss: Mean squared error before the step ()
    :param norm: Norm of its gradient ()
    """

    loss: th.Tensor
    norm: th.Tensor


def torch_generator_states() -> dict[str, Any]:
    """
    :return: The states of torch's global generators, by device type
    """
    return {"torch": th.get_rng_state()} | ({"cuda": th.cuda.get_rng_state_all()} if th.cuda.is_initialized() else {})


class BLPO(OnPolicyAlgorithm):
    """
    Bilevel Policy Optimization with Nyström Hypergradients (BLPO).

    Actor-critic as a bilevel problem: the critic (follower) takes ``n_critic_updates`` steps towards its best response before
    each step of the actor (leader), which follows the hypergradient: PPO's clipped policy gradient plus a correction for how
    the critic would respond, by an inverse-Hessian-vector product, a Nyström approximation by default.

    Paper: https://arxiv.org/abs/2505.11714 (Algorithm 1); Nyström hypergradients: https://arxiv.org/abs/2302.09726

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...). Actor and critic share no parameter: a features
        extractor with parameters exists twice
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The actor's learning rate, >= 0, it can be a function of the current progress remaining (from 1 to 0)
    :param critic_learning_rate: The critic's learning rate, likewise; larger than the actor's, so that the critic follows
    :param n_steps: The number of steps to run for each environment per update
        (i.e. rollout buffer size is n_steps * n_envs where n_envs is number of environment copies running in parallel)
    :param batch_size: Minibatch size in transitions. Minibatches are time-ordered: up to ``n_steps``, a contiguous segment of
        one environment's rollout; above, the whole rollouts of ``batch_size // n_steps`` environments
    :param n_epochs: Number of passes over the rollout
    :param n_critic_updates: Number of critic steps before each actor step (nesting), at least 1
    :param gamma: Discount factor, in [0, 1]
    :param gae_lambda: Factor for trade-off of bias vs variance for Generalized Advantage Estimator, in [0, 1]. At 1 nothing is
        bootstrapped inside an episode, and the correction all but vanishes
    :param clip_range: Clipping parameter, >= 0, it can be a function of the current progress remaining (from 1 to 0)
    :param normalize_advantage: Whether to normalize the advantages of each minibatch: both gradients are divided by the
        standard deviation, and the direct one's advantages are shifted by the mean. Not done for minibatches of one transition
    :param ent_coef: Entropy coefficient for the actor's objective, >= 0
    :param max_grad_norm: The maximum norm of the actor's gradient, > 0. The critic's is not clipped
    :param ihvp_solver: How the critic's linear system is solved: "nystrom" (low-rank approximation), "cg" (conjugate
        gradients), "nystrom_cg" (preconditioned by Nyström), "exact" (dense) or "none" (no correction: nested actor-critic).
        Like ``ihvp_kwargs`` settled when the model is made or loaded: ``BLPO.load(path, env, ihvp_solver="none")``
    :param ihvp_kwargs: Settings of the solver: ``damping`` (> 0, in units of the trace of the Gauss-Newton matrix, 0.01),
        ``rank`` (>= 1, 20) and ``sketch`` ("values", "gaussian" or, as in the paper, "columns") of Nyström, ``max_iter``
        (>= 1, 50) and ``tol`` (>= 0, relative, 1e-5) of CG. A solver ignores those that do not concern it
    :param curvature: "gauss_newton" (positive semi-definite, the default) or "hessian" (exact, in general indefinite)
    :param max_correction_ratio: Largest norm of the correction relative to that of the direct gradient (entropy included),
        >= 0; ``None``: no cap
    :param target_kl: Limit the KL divergence between updates, > 0, because the clipping is not enough to prevent large update;
        by default, there is no limit on the kl div
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE.
        Default: -1 (only sample at the beginning of the rollout)
    :param rollout_buffer_class: Rollout buffer class to use. If ``None``, it will be automatically selected. Its ``get()`` is
        not called, and its ``advantages`` are not used: they are estimated anew from its ``rewards`` under the updated
        critic, which is fitted to its ``returns``. Rewards of one's own (intrinsic ones) belong into an environment's wrapper
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation. ``optimizer_class`` and
        ``optimizer_kwargs`` serve both optimizers
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: If an argument is of the wrong type or out of range, or if actor and critic share a parameter
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }

    # What `_look_at_policy` saw last: another policy and other parameters are split anew, other looks make a new Actor and a
    # new Critic alone
    _known_policy: ActorCriticPolicy | None = None
    _known_parameters: set[int]
    _known_looks: Any = None
    clip_range: Any  # a float or schedule as the user passes it, a FloatSchedule from `_setup_model` on
    actor: Actor
    critic: Critic
    critic_optimizer: th.optim.Optimizer
    solver: Solver | None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        critic_learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 256,
        n_epochs: int = 10,
        n_critic_updates: int = 3,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        normalize_advantage: bool = False,
        ent_coef: float = 0.0,
        max_grad_norm: float = 0.5,
        ihvp_solver: str = "nystrom",
        ihvp_kwargs: dict[str, Any] | None = None,
        curvature: str = "gauss_newton",
        max_correction_ratio: float | None = 1.0,
        target_kl: float | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,  # actor and critic have a loss and an optimizer each
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.critic_learning_rate = critic_learning_rate
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.n_critic_updates = n_critic_updates
        self.clip_range = clip_range
        self.normalize_advantage = normalize_advantage
        self.ihvp_solver = ihvp_solver
        self.ihvp_kwargs = ihvp_kwargs
        self.curvature = curvature
        self.max_correction_ratio = max_correction_ratio
        self.target_kl = target_kl
        # Source of everything that the solvers draw, saved with the model
        self.sketch_generator: th.Generator | None = None
        self._truncations: list[Truncation] = []
        #: States of torch's generators before a rollout's first noise (gSDE) was drawn, for `ResumableCheckpoint`
        self._before_noise: dict[str, Any] = {}
        #: Observation after the rollout, and whether its last steps ended their episodes
        self._rollout_end: tuple[Any, np.ndarray] | None = None

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        for name in ("learning_rate", "critic_learning_rate", "clip_range"):
            if not callable(getattr(self, name)):
                setattr(self, name, float(getattr(self, name)))  # SB3's schedules refuse numpy's numbers
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        self._look_at_policy()
        settings = IHVP_DEFAULTS | (self.ihvp_kwargs or {})
        self.damping = settings.pop("damping")
        self.solver = make_solver(self.ihvp_solver, **settings)
        self._check_sizes()
        if self.sketch_generator is None:
            self.sketch_generator = th.Generator().manual_seed(int(th.randint(2**62, ())))

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.critic_lr_schedule = FloatSchedule(self.critic_learning_rate)

    def _look_at_policy(self) -> None:
        """
        Split the policy into actor and critic, anew where it is no longer the same: users put another policy or optimizer in
        its place, freeze parameters and register hooks between updates.
        """
        present = {id(parameter) for parameter in self.policy.parameters()}
        trained = {id(parameter) for parameter in self.policy.parameters() if parameter.requires_grad}
        if self._known_policy is not self.policy or not trained <= self._known_parameters <= present:
            unshare_features_extractor(self.policy)
            actor, critic = split_parameters(self.policy, self.observation_space)
            # In a copy, or for a policy that was compiled, the optimizers are right and have their state
            if not optimizes(self.policy.optimizer, actor.values()):
                self.policy.optimizer = make_optimizer(self.policy, actor, self.lr_schedule(1), self.policy.optimizer)
            if not optimizes(critic_optimizer := getattr(self, "critic_optimizer", None), critic.values()):
                self.critic_optimizer = make_optimizer(self.policy, critic, self.critic_lr_schedule(1), critic_optimizer)
            self._known_policy = self.policy
            self._known_parameters = {id(parameter) for parameter in (*actor.values(), *critic.values())}
        looks = (self.policy.optimizer, self.critic_optimizer, self.curvature, appearance(self.policy))
        if self._known_looks != looks:
            leave_to(self.critic_optimizer, self.policy.optimizer)
            self.actor = Actor(self.policy, parameters_of(self.policy.optimizer))
            self.critic = Critic(self.policy, parameters_of(self.critic_optimizer), self.curvature)
            self._known_looks = looks

    def _check_sizes(self) -> None:
        """Refuse a dense solve that does not fit; warn of minibatches that do not divide the rollout, as PPO does."""
        n_envs = getattr(self, "n_envs", 1)
        length = min(self.batch_size, self.n_steps)
        width = min(max(1, self.batch_size // self.n_steps), n_envs)
        n_parameters = sum(parameter.numel() for parameter in self.critic.trainable.values())
        if self.ihvp_solver == "exact":
            jacobian_bytes = 4 * length * width * n_parameters
            if self.curvature == "hessian" and n_parameters > MAX_HESSIAN_PARAMETERS:
                raise ValueError(
                    f"`ihvp_solver`='exact' with `curvature`='hessian' takes a critic of at most {MAX_HESSIAN_PARAMETERS} "
                    f"parameters, but this one has {n_parameters}; use 'nystrom' or 'cg'."
                )
            if self.curvature != "hessian" and self.critic.layers is None and jacobian_bytes > MAX_JACOBIAN_BYTES:
                raise ValueError(
                    f"`ihvp_solver`='exact' takes at most {MAX_JACOBIAN_BYTES} bytes for the Jacobian of a critic that is not "
                    f"made of Linear and Conv2d layers, but a minibatch of {length * width} transitions and {n_parameters} "
                    f"parameters needs {jacobian_bytes}; use 'nystrom' or 'cg', or a smaller `batch_size`."
                )
        truncated = self.n_steps % length or n_envs % width * self.n_steps
        if self.env is not None and truncated:
            warnings.warn(
                f"You have specified a mini-batch size of {self.batch_size}, but because each mini-batch is a segment of the "
                f"rollout of n_steps={self.n_steps} steps of n_envs={n_envs} environments, "
                f"there will be a truncated mini-batch of size {truncated}\n"
                "We recommend using a `batch_size` that is a factor of `n_steps`, or `n_steps` times a factor of `n_envs`.",
                stacklevel=2,
            )

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Collect experiences as SB3 does, and remember where truncated episodes ended.

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill with rollouts
        :param n_rollout_steps: Number of experiences to collect per environment
        :return: True if function returned with at least `n_rollout_steps` collected, False if callback terminated rollout
        :raises ValueError: If an observation holds NaN
        """
        self._rollout_end = None
        self._before_noise = torch_generator_states() if self.use_sde else {}
        self._look_at_policy()
        try:
            with self._stand_ins(rollout_buffer):
                return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        except ValueError as error:
            # The distribution refuses the parameters that NaN observations lead to, in words that do not mention them
            check_finite("observations", self._last_obs)
            raise error

    @contextlib.contextmanager
    def _stand_ins(self, rollout_buffer: RolloutBuffer) -> Iterator[None]:
        """
        Remember what follows the rollout, for callbacks at its end may reset the environment. And act without the critic where
        nobody needs values earlier: when the rollout is full, it sees all observations at once.
        """
        sb3_buffer = type(rollout_buffer) in (RolloutBuffer, DictRolloutBuffer)
        lean = self.actor.acts_as_sb3 and sb3_buffer and not has_own(rollout_buffer, "compute_returns_and_advantage")

        compute_returns_and_advantage = rollout_buffer.compute_returns_and_advantage

        def at_the_end(last_values: th.Tensor, dones: np.ndarray) -> None:
            if lean or rollout_buffer.full:  # a buffer of the user's may come here earlier, too
                stand_ins.close()  # before callbacks see them again
            self._rollout_end = (self._last_obs, dones)
            if lean:
                rollout_buffer.values[:] = self._rollout_values(rollout_buffer.observations).cpu().numpy()
            compute_returns_and_advantage(last_values=last_values, dones=dones)

        with contextlib.ExitStack() as stand_ins:
            if lean:
                stand_ins.enter_context(StandIn(self.policy, "forward", self.actor.act))
            stand_ins.enter_context(StandIn(rollout_buffer, "compute_returns_and_advantage", at_the_end))
            yield

    def _rollout_values(self, observations: np.ndarray | dict[str, np.ndarray]) -> th.Tensor:
        """Values of a rollout's observations (n_steps, n_envs)."""

        def values(steps: slice) -> th.Tensor:
            part = each(lambda obs: th.as_tensor(obs[steps], device=self.device).flatten(0, 1), observations)
            return self.critic.values(part).view(-1, n_envs)

        parts = list(observations.values()) if isinstance(observations, dict) else [observations]
        n_steps, n_envs = parts[0].shape[:2]
        # Many at once are faster; what images take is bounded by `batch_size`, as in training
        is_large = sum(part[0, 0].size for part in parts) > 1024
        at_a_time = max(1, (min(self.batch_size, 1024) if is_large else 1024) // n_envs)
        return th.cat([values(slice(start, start + at_a_time)) for start in range(0, n_steps, at_a_time)])

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is None:
            return
        if self.rollout_buffer.pos == 0:  # here, for a subclass may have a `collect_rollouts` of its own
            self._truncations = []
        # Called by SB3 between the environment's step and the buffer's: the condition is that of SB3's own bootstrap
        for env in np.flatnonzero(dones).tolist():
            terminal = infos[env].get("terminal_observation")
            if terminal is not None and infos[env].get("TimeLimit.truncated", False):
                check_finite("terminal observations", terminal)
                observation = self.policy.obs_to_tensor(copy.deepcopy(terminal))[0]
                self._truncations.append(Truncation(self.rollout_buffer.pos, env, observation))

    def train(self) -> None:
        """
        Update critic and actor from the current rollout: Algorithm 1 of the paper, but for what README lists beside it.

        :raises ValueError: If NaN or infinity shows up in the rollout or in a gradient; both networks and optimizers are then
            as they were at the start of the minibatch that failed
        """
        self._look_at_policy()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        clip_range = scheduled("clip_range", self.clip_range, self._current_progress_remaining)
        buffers = list(self.policy.buffers())
        actor_descent, critic_descent = Descent(self.policy.optimizer), Descent(self.critic_optimizer)
        segments = self._segments()
        if self.solver is not None:
            assert self.sketch_generator is not None
            self.solver.draw(critic_descent.vector, self.sketch_generator)
            self.critic.jacobian_is_right = False

        minibatches: list[dict[str, th.Tensor]] = []
        first_of_epoch = 0
        continue_training = True
        for epoch in range(self.n_epochs):
            first_of_epoch = len(minibatches)
            # Every minibatch is a stretch of time; their order is random
            for index in th.randperm(len(segments), device="cpu").tolist():
                segment = segments[index]
                with critic_descent.undone_on_error(buffers), th.inference_mode(self._by_hand):
                    # Follower: nested updates towards the best response to the current actor
                    critic_updates = [self._update_critic(segment, critic_descent) for _ in range(self.n_critic_updates)]
                    # Leader: the hypergradient under the new critic
                    leader = self._hypergradient(segment, clip_range, with_residual=not minibatches)
                    actor_norm = th.linalg.vector_norm(leader.gradient)
                    descent = leader.gradient * (-self.max_grad_norm / (actor_norm + 1e-6)).clamp(min=-1)  # as clip_grad_norm_
                    approx_kl = self._check_minibatch(critic_updates, leader, actor_norm)
                minibatches.append(
                    leader.numbers | {f"critic_loss_{i}": update.loss for i, update in enumerate(critic_updates)}
                )
                if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
                    continue_training = False
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                    break
                actor_descent.step(descent)
            self._n_updates += 1
            if not continue_training:
                break

        self._log(minibatches, first_of_epoch, clip_range)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total, and a linear schedule would then end in a negative rate
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _update_learning_rates(self) -> None:
        """Give each optimizer its own current rate, and log both."""
        progress = self._current_progress_remaining
        scheduled("learning_rate", self.lr_schedule, progress)
        critic_learning_rate = scheduled("critic_learning_rate", self.critic_lr_schedule, progress)
        self._update_learning_rate(self.policy.optimizer)
        update_learning_rate(self.critic_optimizer, critic_learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)

    @property
    def _by_hand(self) -> bool:
        """
        Whether no minibatch needs automatic differentiation: without its bookkeeping small networks take a tenth less
        time. A subclass that does need it says so here.
        """
        return self.actor.chain is not None and self.critic.chain is not None and self.curvature == "gauss_newton"

    def _segments(self) -> Sequence[Segment]:
        """Cut the rollout into minibatches."""
        last_observation, last_done = self._rollout_end or (self._last_obs, self._last_episode_starts)
        assert last_observation is not None and last_done is not None
        buffer = self.rollout_buffer
        for name in ("observations", "rewards", "values", "returns", "log_probs"):
            check_finite(name, getattr(buffer, name))
        check_finite("observations", last_observation)
        terminal_values = th.zeros(0, device=self.device)
        if self._truncations:
            with th.no_grad(), self.critic.mode(training=False):
                # One by one, as SB3 computed what it added to the rewards
                terminal_values = th.cat([self.critic(truncation.observation) for truncation in self._truncations])
        rollout = Rollout(
            buffer,
            obs_as_tensor(last_observation, self.device),
            last_done,
            self._truncations,
            terminal_values,
            self.gamma,
        )
        return list(rollout.segments(self.batch_size))

    def _update_critic(self, segment: Segment, critic_descent: Descent) -> CriticUpdate:
        """One step of the follower on the mean squared error against the rollout's lambda-returns."""
        loss, gradient = self.critic.loss_and_gradient(segment.states, segment.returns)
        critic_descent.step(gradient)
        return CriticUpdate(loss, th.linalg.vector_norm(gradient))

    def _hypergradient(self, segment: Segment, clip_range: float, with_residual: bool) -> Hypergradient:
        """The leader's gradient on one minibatch."""
        log_prob, entropy, gradient = self.actor.likelihood(segment.states, segment.actions)

        def policy_gradient(by_log_prob: th.Tensor, by_entropy: th.Tensor | None) -> th.Tensor:
            with self.critic.mode(training=True):  # checkpointing runs parts of the forward pass again
                return gradient(by_log_prob, by_entropy)

        # The values that the leader reckons with must not depend on the minibatch's statistics or on dropout
        with self.critic.mode(training=False):
            jacobian = None
            if self.solver is None or not self.critic.trainable:  # what is frozen does not respond
                values = self.critic.values(segment.observations)
            else:
                assert self.sketch_generator is not None
                jacobian = self.critic.jacobian(segment.observations, self.sketch_generator, segment.kept)
                values = jacobian.values
            return hypergradient(
                log_prob,
                entropy,
                policy_gradient,
                segment,
                values,
                jacobian,
                self.solver,
                clip_range=clip_range,
                normalize_advantage=self.normalize_advantage,
                ent_coef=self.ent_coef,
                damping=self.damping,
                curvature=self.curvature,
                max_correction_ratio=self.max_correction_ratio,
                with_residual=with_residual,
            )

    def _check_minibatch(self, critic_updates: list[CriticUpdate], leader: Hypergradient, actor_norm: th.Tensor) -> float:
        """
        Raise if anything is not finite.

        :return: Approximate KL divergence between the rollout's policy and the current one
        """
        quantities = {f"critic's gradient in nested update {i + 1}": update.norm for i, update in enumerate(critic_updates)}
        quantities |= {"critic's loss": leader.numbers["critic_loss_after"], "actor's gradient": actor_norm}
        if self.critic.statistics:
            largest = [x.abs().max().float() for x in self.critic.statistics]
            quantities["largest of the layers' running statistics"] = th.stack(largest).max()
        quantities["approximate KL divergence"] = leader.numbers["approx_kl"]
        # The only host read of the minibatch
        numbers = th.stack(list(quantities.values())).tolist()
        for name, number in zip(quantities, numbers, strict=True):
            if not math.isfinite(number):
                raise ValueError(
                    f"The {name} is {number} in update {self._n_updates + 1}, after {self.num_timesteps} timesteps; networks "
                    "and optimizers were put back to the start of that minibatch. Look at the scale of rewards and "
                    "observations, `learning_rate` and `critic_learning_rate`."
                )
        return numbers[-1]

    def _log(self, minibatches: list[dict[str, th.Tensor]], first_of_epoch: int, clip_range: float) -> None:
        """Log SB3's PPO keys and BLPO's own, from one host copy of all minibatches' statistics."""
        stats = statistics({name: th.stack([numbers[name] for numbers in minibatches]) for name in minibatches[0]})
        critic_losses = th.stack([stats.pop(f"critic_loss_{i}") for i in range(self.n_critic_updates)])
        stats |= {"critic_loss_before": critic_losses[0], "value_loss": critic_losses.mean(dim=0)}
        table = th.stack([column.float() for column in stats.values()]).cpu().numpy()
        columns = dict(zip(stats, table, strict=True))
        means = {name: column.mean() for name, column in columns.items()}
        means["loss"] = columns["loss"][-1]
        means["approx_kl"] = columns["approx_kl"][first_of_epoch:].mean()
        if "correction_skipped" in columns:
            done = columns["correction_skipped"] == 0
            means["correction_skipped"] = len(done) - done.sum()
            for name in ("correction_ratio", "correction_cosine", "correction_capped"):
                means[name] = columns[name][done].mean() if done.any() else np.nan
            means["ihvp_residual"] = columns["ihvp_residual"][0]
        for name, mean in means.items():
            self.logger.record(f"train/{name}", float(mean))
        buffer = self.rollout_buffer
        self.logger.record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)

    def learn(
        self: SelfBLPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "BLPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfBLPO:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    @classmethod
    def load(
        cls: type[SelfBLPO],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfBLPO:
        """
        Load the model from a zip-file, as SB3 does; see :func:`sb3_blpo.resume.resume` for exact continuation.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: the new environment to run the loaded model on (can be None if you only need prediction from a trained
            model) has priority over any saved environment
        :param device: Device on which the code should run.
        :param custom_objects: Dictionary of objects to replace upon loading: what it names is not unpickled
        :param print_system_info: Whether to print system info from the saved model and the current system info
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        :param kwargs: extra arguments to change the model when loading
        :return: new model instance with loaded parameters
        :raises ValueError: If the file is no zip, damaged, or not from BLPO
        """
        check_saved_by_blpo(path)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all the attributes of the object and the model parameters in a zip-file. A file that is there already is replaced
        when the new one is complete, so that a crash leaves the one or the other.

        :param path: path to the file (or a file-like) where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        """
        if not isinstance(path, str | pathlib.Path):
            super().save(path, exclude, include)
            return
        with atomic_file(path) as file:
            super().save(file, exclude, include)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a given zip-file or a nested dictionary containing parameters for different modules
        (see ``get_parameters``). Where that fails, the model is as it was before.

        :param load_path_or_dict: Location of the saved data (path or file-like, see ``save``), or a nested dictionary
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception. If set to False, this can be used to update only specific parameters.
        :param device: Device on which the code should run.
        :raises ValueError: If the file is no zip, damaged, or not from BLPO, or if the parameters are not
        """
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            check_saved_by_blpo(params)
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        if exact_match and "policy" in params and "critic_optimizer" not in params:
            raise foreign("These parameters were")
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(params, exact_match, device)
        except Exception:
            super().set_parameters(cast(TensorDict, before))
            raise

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators (python, numpy, pytorch, gym, action_space), and of the solver's.

        :param seed: The seed; ``None``: nothing changes
        """
        super().set_random_seed(seed)
        # A model that is just being loaded keeps the generator of the file
        if seed is not None and self.sketch_generator is not None and hasattr(self, "solver"):
            self.sketch_generator.manual_seed(seed)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        if self._known_policy is not self.policy:
            self._look_at_policy()
        leave_to(self.critic_optimizer, self.policy.optimizer)  # one that was assigned since may have all parameters
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "critic_optimizer"], tensors

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "critic", "solver", "_known_policy", "_known_parameters", "_known_looks"]
        of_rollout = ["_truncations", "_before_noise", "_rollout_end"]
        return [*super()._excluded_save_params(), *own, *of_rollout]

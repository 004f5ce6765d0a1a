"""The recipe: nested critic epochs, one response a rollout, PPO's step of the actor on the advantages that follow from it."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_blpo.archive import Archived
from sb3_blpo.checks import WrongArgument, as_schedule, check_arguments, check_finite, finite, scheduled
from sb3_blpo.engines import ActorPass, TorchEngine, compiled_acting, make_engine
from sb3_blpo.ihvp import MAX_DENSE, make_solver
from sb3_blpo.policies import MlpPolicy, check_optimizers, separate, set_learning_rate
from sb3_blpo.response import Correction, Response, best_response, correct, surrogate_derivative
from sb3_blpo.rollout import Rollout, Truncation, joined

IHVP_DEFAULTS: dict[str, Any] = {"damping": 0.01, "rank": 20, "sketch": "values", "max_iter": 50, "tol": 1e-5}
#: The critic's learning rate in units of the actor's, the ratio of the paper's settings
CRITIC_RATE_RATIO = 4
#: Rollouts that the critic fits by default
CRITIC_ROLLOUTS = 4


def torch_generator_states() -> dict[str, Any]:
    """The states of torch's global generators, by device type."""
    return {"torch": th.get_rng_state()} | ({"cuda": th.cuda.get_rng_state_all()} if th.cuda.is_initialized() else {})


class Epoch(NamedTuple):
    """What happened in an epoch."""

    critic_losses: th.Tensor  # before each of the critic's steps
    correction: Correction
    actor_pass: ActorPass


class Bilevel(Archived, OnPolicyAlgorithm):
    """
    What BLPO does with a rollout, for SB3's collecting or that of another on-policy algorithm. A class that inherits from it
    ends its constructor with ``_init_bilevel()``.
    """

    #: Arrays of the rollout buffer that the actor sees beside the observations, by their argument of the policy's methods
    actor_inputs: ClassVar[tuple[str, ...]] = ()
    #: Tensors that a plain zip does without, and an exact continuation needs
    remembered: ClassVar[tuple[str, ...]] = ("_former_rollouts",)
    #: What computes the gradient steps where the compiled engine does not
    torch_engine: ClassVar[type[TorchEngine]] = TorchEngine

    critic_learning_rate: float | Schedule | None
    batch_size: int
    n_epochs: int
    n_critic_updates: int
    critic_rollouts: int | None
    clip_range: Any  # a float or schedule as the user passes it, a FloatSchedule from `_setup_model` on
    normalize_advantage: bool
    ihvp_solver: str
    ihvp_kwargs: dict[str, Any] | None
    ihvp_interval: int | None
    curvature: str
    max_correction_ratio: float | None
    target_kl: float | None
    engine: str = "auto"

    #: Which engine the latest update ran on, "numba" or "torch", and why
    engine_in_use: str | None = None
    critic_optimizer: th.optim.Optimizer
    #: States and returns of the latest rollouts before this one, the oldest first
    _former_rollouts: list[tuple[PyTorchObs, th.Tensor]]
    _truncations: list[Truncation]
    #: States of torch's generators before a rollout's first noise (gSDE) was drawn, for `ResumableCheckpoint`
    _before_noise: dict[str, Any]

    def _init_bilevel(self, set_up: bool, **arguments: Any) -> None:
        """
        :param set_up: Whether to build the networks
        :param arguments: BLPO's, those that the class which collects the rollouts does not have
        """
        for name, value in arguments.items():
            setattr(self, name, value)
        if set_up:
            self._setup_model()
        if self.vf_coef != 0.5:
            warnings.warn(
                f"`vf_coef`={self.vf_coef} has no effect: BLPO's critic has a loss of its own. Its step is set by "
                "`critic_learning_rate`.",
                stacklevel=3,
            )

    def _setup_model(self) -> None:
        check_arguments(self)
        self.clip_range = as_schedule("clip_range", self.clip_range)
        scheduled("ent_coef", self.ent_coef, 1.0)
        super()._setup_model()
        self.critic_optimizer = separate(self.policy)
        self._former_rollouts, self._truncations, self._before_noise = [], [], {}
        self._check_sizes()
        n = self.n_steps * self.n_envs
        if self.env is not None and n % self.batch_size:
            warnings.warn(
                f"You have specified a mini-batch size of {self.batch_size}, but because the `RolloutBuffer` is of size "
                f"`n_steps * n_envs = {n}`, after every {n // self.batch_size} untruncated mini-batches, there will be a "
                f"truncated mini-batch of size {n % self.batch_size}\n"
                f"We recommend using a `batch_size` that is a factor of `n_steps * n_envs`.\n"
                f"Info: (n_steps={self.n_steps} and n_envs={self.n_envs})",
                stacklevel=2,
            )

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        # SB3 knows its own class alone
        super()._maybe_recommend_cpu(MlpPolicy.__name__ if self.policy_class is MlpPolicy else mlp_class_name)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate)
        if self.critic_learning_rate is not None:
            self.critic_lr_schedule = as_schedule("critic_learning_rate", self.critic_learning_rate)
        self._scheduled_rates = (self.learning_rate, self.critic_learning_rate)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> bool:
        """As SB3's. Raises ValueError if the rollout buffer is for other settings, or an observation is not finite."""
        check_arguments(self)
        for name, of_buffer in (("n_steps", "buffer_size"), ("gamma", "gamma"), ("gae_lambda", "gae_lambda")):
            if getattr(self, name) != getattr(self.rollout_buffer, of_buffer):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but the rollout buffer was made for "
                    f"{getattr(self.rollout_buffer, of_buffer)}: set `model.rollout_buffer.{of_buffer}` as well, or load the "
                    f"model with `load(..., {name}={getattr(self, name)})`."
                )
        self._before_noise = torch_generator_states() if self.use_sde else {}
        try:
            with compiled_acting(self.engine, self.policy):
                return super().collect_rollouts(env, callback, *args, **kwargs)
        except ValueError:
            # The distribution refuses the parameters that NaN observations lead to, in words that do not mention them
            check_finite("observations", self._last_obs)
            raise

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is None:
            return
        if self.rollout_buffer.pos == 0:
            self._truncations = []
        # Called between the environment's step and the buffer's: the condition is that of SB3's own bootstrap
        for env in np.flatnonzero(dones).tolist():
            terminal = infos[env].get("terminal_observation")
            if terminal is not None and infos[env].get("TimeLimit.truncated", False):
                check_finite("terminal observations", terminal)
                self._truncations.append(Truncation(self.rollout_buffer.pos, env, copy.deepcopy(terminal)))

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As SB3's; the critic's former rollouts, which were of the old environment, are forgotten."""
        super().set_env(env, force_reset)
        self._former_rollouts = []

    def train(self) -> None:
        """
        Update critic and actor from the current rollout: Algorithm 1 of the paper, over the whole rollout at once.

        :raises ValueError: If an argument or an optimizer does not fit, or if NaN or infinity shows up; both networks and
            optimizers are then as they were before
        """
        check_arguments(self)
        check_optimizers(self.policy, self.critic_optimizer)
        self._check_sizes()
        rollout = self._finished_rollout()
        latest = [*self._former_rollouts, rollout.targets][-self._n_critic_rollouts :]
        states, returns = joined(latest)
        # numpy's integers may be 8 bits, and torch refuses them
        n_critic_steps = int(self.n_critic_updates) * -(-len(rollout) // int(self.batch_size))
        epochs: list[Epoch] = []
        response: Response | None = None
        with self._undone_on_error() as buffers:
            engine = self._engine()
            values_of_rollout = engine.values(rollout)
            for epoch in range(self.n_epochs):
                # Follower: nested updates towards the best response to the current actor
                critic_losses = engine.fit_critic(states, returns, n_critic_steps)
                # Advantages under the new critic
                values = engine.values(rollout)
                advantages = rollout.advantages_after(values - values_of_rollout)
                if self.normalize_advantage:
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                # How the critic's best response to the actor would move its values, and with them the advantages
                if epoch % (self.ihvp_interval or self.n_epochs) == 0:
                    response = self._best_response(rollout, engine, values, finite("advantages", advantages))
                correction = correct(advantages, response, self.max_correction_ratio)
                # Leader: PPO's steps on the corrected advantages
                actor_pass = engine.improve_actor(rollout, finite("corrected advantages", correction.weights))
                epochs.append(Epoch(critic_losses, correction, actor_pass))
                if actor_pass.stopped:
                    if self.verbose >= 1:
                        print(f"Early stopping at epoch {epoch}: the KL divergence is above 1.5 * {self.target_kl}")
                    break
            engine.write_back()
            self._check_networks(buffers)
        self._n_updates += len(epochs)
        self._former_rollouts = latest[1:] if len(latest) == self._n_critic_rollouts else latest
        self._log(epochs, response, engine.clip_range)

    @property
    def _n_critic_rollouts(self) -> int:
        """Of how many rollouts the critic's minibatches are drawn: images take too much memory to keep them."""
        if self.critic_rollouts is not None:
            return int(self.critic_rollouts)
        space = self.observation_space
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
        return 1 if any(len(part.shape or ()) >= 3 for part in parts) else CRITIC_ROLLOUTS

    @property
    def _critic_parameters(self) -> list[nn.Parameter]:
        """Those that are trained, in the policy's order."""
        own = {id(parameter) for group in self.critic_optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self.policy.parameters() if id(parameter) in own and parameter.requires_grad]

    def _check_sizes(self) -> None:
        if self.normalize_advantage and self.n_steps * self.n_envs == 1:
            raise WrongArgument("`normalize_advantage`=True takes more than one transition, got `n_steps` * `n_envs` = 1.")
        of_parameters = self.curvature == "hessian"
        n = sum(p.numel() for p in self._critic_parameters) if of_parameters else self.n_steps * self.n_envs
        if self.ihvp_solver == "exact" and n > MAX_DENSE:
            raise WrongArgument(
                f"`ihvp_solver`='exact' with `curvature`={self.curvature!r} takes at most {MAX_DENSE} "
                f"{'critic parameters' if of_parameters else 'transitions in a rollout'}, got {n}; use 'nystrom' or 'cg'."
            )

    def _finished_rollout(self) -> Rollout:
        buffer = self.rollout_buffer
        if not buffer.full or self._last_obs is None or self._last_episode_starts is None:
            raise ValueError(
                f"The rollout buffer holds {buffer.pos} of {buffer.buffer_size} steps: `learn` collects a rollout."
            )
        return Rollout.of(buffer, self._last_obs, self._last_episode_starts, self._truncations, self.device, self.actor_inputs)

    def _engine(self) -> TorchEngine:
        """Set both optimizers' rates, log them, and hand the networks to an engine."""
        if (self.learning_rate, self.critic_learning_rate) != self._scheduled_rates:  # assigned since
            self._setup_lr_schedule()
        progress = self._current_progress_remaining
        learning_rate = scheduled("learning_rate", self.lr_schedule, progress)
        critic_learning_rate = CRITIC_RATE_RATIO * learning_rate
        if self.critic_learning_rate is not None:
            critic_learning_rate = scheduled("critic_learning_rate", self.critic_lr_schedule, progress)
        set_learning_rate(self.policy.optimizer, learning_rate)
        set_learning_rate(self.critic_optimizer, critic_learning_rate)
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)
        ent_coef = scheduled("ent_coef", self.ent_coef, progress)
        self.logger.record("train/ent_coef", ent_coef)
        engine, in_use = make_engine(
            self.engine, self.torch_engine, self.policy, self.critic_optimizer, batch_size=int(self.batch_size),
            clip_range=scheduled("clip_range", self.clip_range, progress), ent_coef=ent_coef,
            max_grad_norm=self.max_grad_norm, target_kl=self.target_kl,
        )  # fmt: skip
        if self.verbose >= 1 and in_use != self.engine_in_use:
            compiles = "; where its compilation is not in numba's cache yet, that takes about 20 seconds"
            print(f"Using engine {in_use}{compiles * (in_use == 'numba')}")
        self.engine_in_use = in_use
        return engine

    def _best_response(
        self, rollout: Rollout, engine: TorchEngine, values: th.Tensor, advantages: th.Tensor
    ) -> Response | None:
        settings = IHVP_DEFAULTS | (self.ihvp_kwargs or {})
        damping = settings.pop("damping")
        solver = make_solver(self.ihvp_solver, **settings)
        parameters = self._critic_parameters
        if solver is None or not parameters:  # what is frozen does not respond
            return None
        # A function of the training's progress, so that solvers with and without a draw see the same global generators
        generator = th.Generator().manual_seed(self.num_timesteps)
        ratio = (engine.log_prob(rollout) - rollout.old_log_prob).exp()
        weights = surrogate_derivative(ratio, advantages, engine.clip_range)
        jacobian = engine.jacobian(rollout, parameters, generator)
        return best_response(rollout, jacobian, weights, values, solver, damping, self.curvature, generator)

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[dict[str, th.Tensor]]:
        """Put networks and optimizers back to what they are now, if the block raises. Yield a copy of the buffers."""
        before: Any = copy.deepcopy(self.get_parameters())
        buffers = {name: buffer.clone() for name, buffer in self.policy.named_buffers()}
        try:
            yield buffers
        except BaseException as error:
            for name, buffer in self.policy.named_buffers():
                buffer.data = buffers.get(name, buffer)  # those that `before` lacks and those of other shapes, too
            super().set_parameters(before)
            if not isinstance(error, FloatingPointError):
                raise
            raise ValueError(
                f"The {error} is not finite in update {self._n_updates + 1}, after {self.num_timesteps} timesteps; networks "
                "and optimizers were put back to what they were before it. Look at the scale of rewards and observations, "
                "`learning_rate` and `critic_learning_rate`."
            ) from error

    def _check_networks(self, buffers: dict[str, th.Tensor]) -> None:
        """Raise if a parameter, a buffer that is not as it was, or an optimizer's state is not finite."""
        for name, buffer in self.policy.named_buffers():
            if name not in buffers or not th.equal(buffer, buffers[name]):  # a mask of infinities is in order
                finite(f"buffer `{name}`", buffer)
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                finite(f"parameter `{name}`", parameter)
        for name, optimizer in (("actor", self.policy.optimizer), ("critic", self.critic_optimizer)):
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, th.Tensor):
                        finite(f"{name}'s optimizer state `{key}`", value)

    def _log(self, epochs: list[Epoch], response: Response | None, clip_range: float) -> None:
        """SB3's PPO keys and BLPO's own."""
        passes = [epoch.actor_pass.stats for epoch in epochs]
        stats = {name: float(np.mean([one[name] for one in passes])) for name in passes[0]}
        stats["approx_kl"] = passes[-1]["approx_kl"]
        # As PPO's, for whoever plots it
        stats["loss"] = passes[-1]["loss"] + self.vf_coef * float(epochs[-1].critic_losses[-1])
        losses = [float(epoch.critic_losses.mean()) for epoch in epochs]
        stats |= {"value_loss": float(np.mean(losses)), "critic_loss_before": losses[0], "critic_loss_after": losses[-1]}
        if response is not None:
            stats["ihvp_residual"] = float(response.residual)
            solves = epochs[:: self.ihvp_interval or self.n_epochs]
            stats["correction_skipped"] = float(sum(epoch.correction.skipped for epoch in solves))
            done = [epoch.correction.stats for epoch in epochs if epoch.correction.stats]
            stats |= {name: float(np.mean([one[name] for one in done])) for name in (done[0] if done else {})}
        buffer = self.rollout_buffer
        stats["explained_variance"] = float(explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        stats["clip_range"] = clip_range
        if hasattr(self.policy, "log_std"):
            stats["std"] = self.policy.log_std.exp().mean().item()
        for name, value in stats.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total, and a linear schedule would then end in a negative rate
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "critic_optimizer"], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_former_rollouts", "_truncations", "_before_noise", "engine_in_use"]

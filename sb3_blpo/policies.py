"""An SB3 policy as actor and critic: two sets of parameters that have nothing in common, each with its optimizer."""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_blpo.checks import WrongArgument

#: Observations that show which parameters an output depends on
N_EXAMPLES = 8


class MlpPolicy(ActorCriticPolicy):
    """SB3's, which acts by compiled calls while BLPO collects a rollout, where the compiled engine serves."""

    #: What acts instead of SB3's forward pass
    acting: Callable[[PyTorchObs], tuple[th.Tensor, th.Tensor, th.Tensor]] | None = None

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        acting = self.acting  # another thread may end it
        if acting is None or deterministic or th.is_grad_enabled():
            return super().forward(obs, deterministic)
        return acting(obs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "acting": None}  # copies act for themselves


class MultiInputPolicy(MultiInputActorCriticPolicy):
    """
    SB3's, of which actor and critic may see different parts of a dictionary observation. What the actor does not see is
    needed for training alone: :meth:`predict` takes the actor's keys.

    :param actor_keys: Keys of the observation that the actor sees; ``None``: all
    :param critic_keys: Keys of the observation that the critic sees; ``None``: all
    :param kwargs: Further arguments of SB3's MultiInputPolicy
    :raises ValueError: If a list of keys is empty, or a key is not the observation's
    """

    def __init__(
        self, observation_space: spaces.Dict, action_space: spaces.Space, lr_schedule: Schedule, *args: Any,
        actor_keys: Sequence[str] | None = None, critic_keys: Sequence[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        known = getattr(observation_space, "spaces", {})
        for name, keys in (("actor_keys", actor_keys), ("critic_keys", critic_keys)):
            is_list = isinstance(keys, list | tuple) and len(keys) > 0
            if keys is not None and not (is_list and all(isinstance(key, str) and key in known for key in keys)):
                raise WrongArgument(
                    f"`{name}` must be a list of keys of the observation, {', '.join(map(repr, known)) or 'which has none'}, "
                    f"or None, got {keys!r}."
                )
        self.actor_keys = None if actor_keys is None else [*actor_keys]
        self.critic_keys = None if critic_keys is None else [*critic_keys]
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        if self.actor_keys is None and self.critic_keys is None:
            super()._build_mlp_extractor()
            return
        # In place of what SB3 has made for all keys
        self.share_features_extractor = False
        self.features_extractor = self.pi_features_extractor = self._extractor(self.actor_keys)
        self.vf_features_extractor = self._extractor(self.critic_keys)
        actors, critics = (
            MlpExtractor(extractor.features_dim, self.net_arch, self.activation_fn, self.device)
            for extractor in (self.pi_features_extractor, self.vf_features_extractor)
        )
        self.mlp_extractor = actors
        actors.value_net, actors.latent_dim_vf = critics.value_net, critics.latent_dim_vf

    def _extractor(self, keys: Sequence[str] | None) -> BaseFeaturesExtractor:
        space = self.observation_space
        assert isinstance(space, spaces.Dict)
        seen = spaces.Dict({key: part for key, part in space.spaces.items() if keys is None or key in keys})
        return self.features_extractor_class(seen, **self.features_extractor_kwargs)

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As SB3's. Raises ValueError if a key that the actor sees is missing."""
        space = self.observation_space
        assert isinstance(space, spaces.Dict)
        needed = space.spaces if self.actor_keys is None else self.actor_keys
        if isinstance(observation, dict) and (missing := [key for key in needed if key not in observation]):
            raise ValueError(f"The observation lacks {', '.join(map(repr, missing))}, which the actor sees.")
        return super().obs_to_tensor(observation)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"actor_keys": self.actor_keys, "critic_keys": self.critic_keys}


def separate(policy: ActorCriticPolicy) -> th.optim.Optimizer:
    """
    Give the critic a features extractor of its own, and an optimizer with the settings of the policy's, which keeps the
    actor's parameters alone. Groups of parameters are kept, each on its side.

    :raises ValueError: If a trainable parameter belongs to both or to neither
    """
    for name, parameter in policy.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"`{name}` of {type(policy).__name__} has no shape yet (a lazy layer): run a dummy batch through the network "
                "in its `__init__`."
            )
    refuse_shared_lstm(getattr(policy, "shared_lstm", False))
    copies = _unshare_features_extractor(policy)
    actor, critic = _split(policy)
    optimizer = policy.optimizer
    for group in optimizer.param_groups:
        group["params"] += [copies[id(p)] for p in group["params"] if id(p) in copies]
        group["has_own_lr"] = group["lr"] != optimizer.defaults["lr"]
    for original in [p for p in optimizer.state if id(p) in copies]:  # Adagrad and others have state from the start
        optimizer.state[copies[id(original)]] = copy.deepcopy(optimizer.state[original])
    # A copy of the optimizer as it is, of whatever class, for the same parameters
    known: dict[int, Any] = {id(parameter): parameter for parameter in policy.parameters()}
    critic_optimizer = copy.deepcopy(optimizer, known)
    for each, own in ((optimizer, actor), (critic_optimizer, critic)):
        for group in each.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in own]
        for other in [p for p in each.state if id(p) not in own]:
            del each.state[other]
    return critic_optimizer


def refuse_shared_lstm(shared_lstm: bool) -> None:
    """contrib detaches it, so that no gradient would show the sharing."""
    if shared_lstm:
        raise WrongArgument(
            "`shared_lstm`=True gives actor and critic a common LSTM, and BLPO needs them apart: use False, with "
            "`enable_critic_lstm` True or False."
        )


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """Of all groups of parameters but those that were made with a rate of their own."""
    for group in optimizer.param_groups:
        if not group.get("has_own_lr"):
            group["lr"] = learning_rate


def _unshare_features_extractor(policy: ActorCriticPolicy) -> dict[int, nn.Parameter]:
    """Copy a shared features extractor with parameters for the critic. Return the copy of each parameter by its id."""
    copies: dict[int, nn.Parameter] = {}
    extractor = policy.features_extractor
    if policy.share_features_extractor:
        if not any(True for _ in extractor.parameters()):
            return copies
        try:
            policy.vf_features_extractor = copy.deepcopy(extractor)
        except RuntimeError as error:  # old-style weight_norm
            raise ValueError(
                f"The critic gets a copy of the features extractor, but {type(extractor).__name__} cannot be copied "
                f"({error}); use `policy_kwargs`={{'share_features_extractor': False}}."
            ) from error
        policy.share_features_extractor = False
        twins = policy.vf_features_extractor.parameters()
        copies = {id(parameter): twin for parameter, twin in zip(extractor.parameters(), twins, strict=True)}
    # SB3's list of constructor arguments lacks this one, so that `policy.load()` would merge what `policy.save()` has saved
    policy._get_constructor_parameters = functools.partial(_constructor_parameters, policy)  # type: ignore[method-assign]
    return copies


def _constructor_parameters(policy: ActorCriticPolicy) -> dict[str, Any]:
    return type(policy)._get_constructor_parameters(policy) | {"share_features_extractor": False}


def _split(policy: ActorCriticPolicy) -> tuple[set[int], set[int]]:
    """Ids of the parameters that the action distribution depends on, and of those that the value depends on."""
    named = {name: p for name, p in policy.named_parameters() if p.is_floating_point()}
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    observations = policy.obs_to_tensor(_examples(policy.observation_space))[0]
    policy.set_training_mode(False)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    for parameter in named.values():  # frozen ones have a side as well, and may be trained later
        parameter.requires_grad_(True)
    try:
        actor, critic = (_dependences(output, named) for output in _outputs(policy, observations))
    except (TypeError, AttributeError) as error:
        if policy.share_features_extractor:
            raise
        raise ValueError(
            f"{type(policy).__name__} failed ({error}). In BLPO the critic has a features extractor of its own: where "
            "`share_features_extractor` is False, `extract_features(obs)` returns two tensors: write "
            "`pi_features, vf_features = self.extract_features(obs)`."
        ) from error
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        for name, buffer in policy.named_buffers():  # what an extractor counts in each forward pass
            buffer.data = buffers.get(name, buffer)
    for name in trainable:
        if (name in actor) == (name in critic):
            raise ValueError(
                f"BLPO needs an actor and a critic without common parameters, but `{name}` of {type(policy).__name__} belongs "
                f"to {'both' if name in actor else 'neither'}; every trainable parameter must affect either the action "
                "distribution or the value."
            )
    return {id(named[name]) for name in actor - critic}, {id(named[name]) for name in critic - actor}


def _dependences(output: th.Tensor, named: dict[str, nn.Parameter]) -> set[str]:
    if not output.requires_grad:
        return set()
    gradients = th.autograd.grad(output, list(named.values()), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


@th.enable_grad()
def _outputs(policy: ActorCriticPolicy, observations: Any) -> tuple[th.Tensor, th.Tensor]:
    """What the actor's and the critic's parameters show in."""
    of_both, of_one = _no_memory(policy)
    with th.no_grad(), th.random.fork_rng(devices=[]):
        actions, acting_values, *_ = policy(observations, *of_both)  # the way in which rollouts are collected
        actions = actions.flatten(1) if actions.ndim > 1 else actions  # as the buffer holds them
    _, log_prob, entropy = policy.evaluate_actions(observations, actions, *of_both)
    values = policy.predict_values(observations, *of_one)
    with th.no_grad():
        # Not where an extractor's state makes each call another one
        again = policy.predict_values(observations, *of_one)
        if th.equal(values, again) and not th.allclose(values, acting_values.view_as(values), 1e-3, 1e-4, equal_nan=True):
            warnings.warn(
                f"`forward` and `predict_values` of {type(policy).__name__} give different values, and the critic is trained "
                "by the latter: where you override `extract_features` or `forward`, override `predict_values` and "
                "`get_distribution` as well.",
                stacklevel=2,
            )
        policy.get_distribution(observations, *of_one)  # the policy keeps it, and could not be copied with the graph in it
    return log_prob.sum() + (0 if entropy is None else entropy.sum()), values.sum()


def _no_memory(policy: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What contrib's recurrent policies take beside the examples: methods of both levels, methods of one."""
    if not isinstance(policy, RecurrentActorCriticPolicy):
        return (), ()
    n_layers, _, size = policy.lstm_hidden_state_shape
    zeros = th.zeros(n_layers, N_EXAMPLES, size, device=policy.device)
    starts = th.zeros(N_EXAMPLES, device=policy.device)
    return (RNNStates((zeros, zeros), (zeros, zeros)), starts), ((zeros, zeros), starts)


def _examples(space: spaces.Space, n: int = N_EXAMPLES) -> Any:
    """Observations of moderate size: what an unbounded space draws may overflow in the networks."""
    if isinstance(space, spaces.Dict):
        return {key: _examples(part, n) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Box):
        numbers = np.random.default_rng(0).standard_normal((n, *space.shape))
        return np.clip(numbers, space.low, space.high).astype(space.dtype)
    space = copy.deepcopy(space)  # sampling must not disturb an environment that draws from its own
    space.seed(0)
    return np.stack([space.sample() for _ in range(n)])


def check_optimizers(policy: ActorCriticPolicy, critic_optimizer: th.optim.Optimizer) -> None:
    """A ValueError unless each trainable parameter of the policy is in one of the two optimizers, and nothing else is."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    actor, critic = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in (policy.optimizer, critic_optimizer)
    )
    for which, ids in (("policy.optimizer", actor), ("critic_optimizer", critic)):
        if not ids <= names.keys():
            raise ValueError(
                f"`{which}` has parameters that are not the policy's (was a network replaced?): make it anew, or load "
                "the weights with `set_parameters`."
            )
    for key, parameter in zip(names, policy.parameters(), strict=True):
        if key in actor & critic:
            raise ValueError(
                f"`policy.optimizer` and `critic_optimizer` both have `{names[key]}`: give `policy.optimizer` the actor's "
                "parameters alone, those of the optimizer that it replaces."
            )
        if parameter.requires_grad and key not in actor | critic:
            raise ValueError(f"`{names[key]}` is trainable, but no optimizer has it: give it to one, or freeze it.")

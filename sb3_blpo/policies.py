"""
An SB3 policy, looked at: whose its parameters are, which of its parts are SB3's own, and what users changed of it.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn.modules import activation

from sb3_blpo.chain import Chain
from sb3_blpo.optimizers import are_same

#: Activations that act on every element by itself and have no parameters
ELEMENTWISE = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.ELU, activation.CELU, activation.SELU,
    activation.GELU, activation.SiLU, activation.Mish, activation.Tanh, activation.Sigmoid, activation.Softplus,
    activation.Softsign, activation.Hardtanh, activation.Hardswish, activation.Hardsigmoid, activation.LogSigmoid,
    activation.Softshrink, activation.Hardshrink, activation.Tanhshrink, nn.Identity,
)  # fmt: skip

#: Methods of a policy and of its mlp_extractor, beside ``forward``, that users may replace on one object
METHODS = (
    "evaluate_actions", "get_distribution", "extract_features", "predict_values", "_get_action_dist_from_latent",
    "forward_actor", "forward_critic",
)  # fmt: skip

#: What combines them
CONTAINERS = (nn.Sequential, nn.ModuleDict, FlattenExtractor, NatureCNN, CombinedExtractor)


def unshare_features_extractor(policy: ActorCriticPolicy) -> None:
    """
    Give the critic its own copy of a features extractor with parameters. One without (Flatten) may stay shared.

    :param policy: The policy, changed in place
    """
    if policy.share_features_extractor:
        if not any(True for _ in policy.features_extractor.parameters()):
            return
        actors = {id(p) for part in (policy.features_extractor, policy.pi_features_extractor) for p in part.parameters()}
        # A policy that computes values in its own way may have given the critic its own
        if is_sb3(policy, "predict_values") or any(id(p) in actors for p in policy.vf_features_extractor.parameters()):
            try:
                policy.vf_features_extractor = copy.deepcopy(policy.features_extractor)
            except (RuntimeError, TypeError) as error:  # old-style weight_norm, locks and others
                raise ValueError(
                    f"The critic gets a copy of the features extractor, but {type(policy.features_extractor).__name__} cannot "
                    f"be copied ({error}); use `policy_kwargs`={{'share_features_extractor': False}}."
                ) from error
        policy.share_features_extractor = False
    # SB3's list of constructor arguments lacks this one, and `policy.save()` and `load()` would silently merge the extractors
    policy._get_constructor_parameters = functools.partial(_constructor_parameters, policy)  # type: ignore[method-assign]


def _constructor_parameters(policy: ActorCriticPolicy) -> dict[str, Any]:
    policy = getattr(policy, "_orig_mod", policy)  # of torch.compile
    return type(policy)._get_constructor_parameters(policy) | {"share_features_extractor": False}


def split_parameters(
    policy: ActorCriticPolicy, observation_space: spaces.Space
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """
    Tell the actor's parameters, which the action distribution depends on, from the critic's, which the value depends on.

    :param policy: The policy
    :param observation_space: Of the policy
    :return: The actor's and the critic's parameters by name, in the policy's order; frozen ones too, so that they can be
        trained later
    :raises ValueError: If a trainable parameter belongs to both or to neither, or is not float32
    """
    named = {name: p for name, p in policy.named_parameters() if p.is_floating_point() or p.is_complex()}
    trainable = {name for name, parameter in named.items() if parameter.requires_grad}
    for name, parameter in named.items():
        if parameter.requires_grad and parameter.dtype != th.float32:
            raise ValueError(
                f"BLPO trains parameters of torch.float32, but `{name}` of {type(policy).__name__} is {parameter.dtype}."
            )
    example = _examples(observation_space, 1, "random")
    training = policy.training
    policy.set_training_mode(False)
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        try:
            by_actor, by_critic = _dependences(policy, named, example)
        except RuntimeError:  # what is always frozen may be used in ways that allow no gradient
            for name, parameter in named.items():
                parameter.requires_grad_(name in trainable)
            named = {name: named[name] for name in named if name in trainable}
            by_actor, by_critic = _dependences(policy, named, example)
        if not trainable <= by_actor | by_critic:
            # A network may have branches, and may not take whatever its space allows
            with contextlib.suppress(Exception):
                others = _dependences(policy, named, _examples(observation_space, 16, "standard_normal"))
                by_actor, by_critic = by_actor | others[0], by_critic | others[1]
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        policy.set_training_mode(training)
    for name in named:
        if name in trainable and (name in by_actor) == (name in by_critic):
            raise ValueError(
                f"BLPO needs an actor and a critic without common parameters, but `{name}` of {type(policy).__name__} belongs "
                f"to {'both' if name in by_actor else 'neither'}; every trainable parameter must affect either the action "
                "distribution or the value. Where a features extractor shares what it copies (torch.jit.script), use "
                "`policy_kwargs`={'share_features_extractor': False}."
            )
    actor = {name: parameter for name, parameter in named.items() if name in by_actor - by_critic}
    critic = {name: parameter for name, parameter in named.items() if name in by_critic - by_actor}
    return actor, critic


@th.enable_grad()
def _dependences(policy: ActorCriticPolicy, named: dict[str, nn.Parameter], observations: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters that the action distribution and the value depend on."""
    observation = policy.obs_to_tensor(observations)[0]
    with th.no_grad():
        actions = policy.get_distribution(observation).get_actions(deterministic=True)
    outputs = [log_prob_and_entropy(policy, observation, actions)[0].sum(), policy.predict_values(observation).sum()]
    with th.no_grad():
        policy.get_distribution(observation)  # the policy keeps it, and could not be copied with the graph in it
    gradients = (th.autograd.grad(output, list(named.values()), allow_unused=True) for output in outputs)
    by_actor, by_critic = ({name for name, g in zip(named, found, strict=True) if g is not None} for found in gradients)
    return by_actor, by_critic


def _examples(space: spaces.Space, n: int, draw: str) -> Any:
    """Observations of moderate size: what an unbounded space draws may overflow in the networks."""
    if isinstance(space, spaces.Dict):
        return {key: _examples(part, n, draw) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Box):
        numbers = getattr(np.random.default_rng(0), draw)((n, *space.shape))
        return np.clip(numbers, space.low, space.high).astype(space.dtype)
    # A copy: sampling must not disturb an environment that draws from its own space
    space = copy.deepcopy(space)
    return np.stack([space.sample() for _ in range(n)])


def log_prob_and_entropy(
    policy: ActorCriticPolicy, observations: PyTorchObs, actions: th.Tensor
) -> tuple[th.Tensor, th.Tensor | None]:
    """
    :param policy: The policy
    :param observations: (n, ...)
    :param actions: (n, ...)
    :return: log pi(a|s) (n,) and the entropy of pi(.|s) (n,), ``None`` where it has no closed form
    """
    if acts_as_trained(policy):  # without the critic
        distribution = policy.get_distribution(observations)
        return distribution.log_prob(actions), distribution.entropy()
    return policy.evaluate_actions(observations, actions)[1:]  # what PPO trains


def appearance(policy: ActorCriticPolicy) -> list[Any]:
    """
    What of a policy decides how :class:`Actor` and :class:`Critic` treat it, and may change at any time.

    :param policy: The policy
    :return: Of each parameter whether it is trained and whether it has hooks; each module, and whether it has; of each method
        whether the policy has its own; its distribution, and whether that has
    """
    of_parameters = [flag for p in policy.parameters() for flag in (p.requires_grad, bool(p._backward_hooks))]
    of_modules = [part for module in policy.modules() for part in (module, is_hooked(module))]
    own = [has_own(owner, name) for owner in (policy, getattr(policy, "mlp_extractor", policy)) for name in METHODS]
    distribution = getattr(policy, "action_dist", None)
    return [*of_parameters, *of_modules, *own, distribution, has_own_methods(distribution)]


def plain_layers(policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> list[nn.Linear | nn.Conv2d] | None:
    """
    See whether the critic is made of SB3's own parts with nothing but Linear and Conv2d layers and elementwise activations in
    them, so that everything the solvers need follows from the layers' inputs and signals.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    :return: The layers in the order of the parameters; ``None`` for any other critic
    """
    if not is_sb3(policy, "predict_values", "extract_features") or not is_mlp(policy.mlp_extractor, "forward_critic"):
        return None
    parts = [policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net]
    modules = [module for part in parts for _, module in part.named_modules(remove_duplicate=False)]
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers if all(map(_is_plain, modules)) and _have(layers, parameters) else None


def found_layers(policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> list[nn.Linear | nn.Conv2d] | None:
    """
    See whether all of the critic's parameters are those of Linear and Conv2d layers, whatever it does with these.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    :return: The layers in the order of the parameters; ``None`` if they are not
    """
    own = {id(parameter) for parameter in parameters}
    modules = [module for module in policy.modules() if any(id(p) in own for p in module.parameters(recurse=False))]
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d) and _is_plain(module)]
    return layers if _have(layers, parameters) else None


def _have(layers: Sequence[nn.Module], parameters: Sequence[th.Tensor]) -> bool:
    """Whether layers have these parameters in this order: nothing frozen, nothing beside the layers, no layer twice."""
    return are_same([parameter for layer in layers for parameter in layer.parameters()], parameters)


def chain_of(extractor: nn.Module, *networks: nn.Module) -> Chain | None:
    """
    See whether networks are nothing but Linear layers and activations one after another.

    :param extractor: Features extractor before them
    :param networks: The networks
    :return: Their layers; ``None`` if there is something else, or if features are more than the flattened observation
    """
    modules = [part for network in networks for part in (network if type(network) is nn.Sequential else [network])]
    plain = all(type(module) in (nn.Linear, *ELEMENTWISE) and _is_plain(module) for module in modules)
    parts = [part for network in (extractor, *networks) for part in network.modules()]
    hooked = any(map(is_hooked, parts)) or any(p._backward_hooks for part in parts for p in part.parameters())
    return Chain(modules) if plain and not hooked and type(extractor) is FlattenExtractor else None


def flat_features(policy: ActorCriticPolicy, extractor: BaseFeaturesExtractor, observations: PyTorchObs) -> th.Tensor:
    """
    :param policy: The policy
    :param extractor: The actor's or the critic's features extractor, which does no more than flatten
    :param observations: (n, ...)
    :return: The features (n, n_features)
    """
    if isinstance(observations, th.Tensor) and type(policy.observation_space) is spaces.Box and observations.ndim == 2:
        return observations.float()
    # The policy's own extract_features() would answer for both networks
    return BasePolicy.extract_features(policy, observations, extractor)


def _is_plain(module: nn.Module) -> bool:
    if not module._parameters.keys() <= {"weight", "bias"}:
        return False  # what prunes or normalises weights computes them from parameters of other names
    if has_own(module, "forward"):
        return False
    if isinstance(module, nn.Linear | nn.Conv2d) and [*module._parameters] != ["weight", "bias"]:
        return False  # what removes pruning turns them round
    if isinstance(module, nn.Conv2d):
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return type(module) is nn.Conv2d and module.groups == 1 and zeros
    if type(module) in ELEMENTWISE:
        return not getattr(module, "inplace", False)
    return type(module) in (nn.Linear, nn.Flatten, *CONTAINERS)


def is_hooked(module: nn.Module) -> bool:
    """
    :param module: A module
    :return: Whether calls of itself, and not of its parts alone, have hooks, or a ``forward`` of this object's own
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or has_own(module, "forward")


def is_mlp(extractor: nn.Module, *methods: str) -> bool:
    """
    :param extractor: Of the networks' last hidden layers
    :param methods: Names of its methods
    :return: Whether it is SB3's, with these methods
    """
    return type(extractor) is MlpExtractor and not any(has_own(extractor, method) for method in methods)


def _itself(thing: Any) -> Any:
    return thing


class StandIn:
    """
    What takes the place of a method of one object inside a ``with`` block. In a copy of the object it is the method.

    :param owner: The object
    :param name: Of the method
    :param function: What is called instead
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.function = function
        #: The object's own method, if it has another one than its class
        self.own = vars(owner)[name] if has_own(owner, name) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __enter__(self) -> "StandIn":
        vars(self.owner)[self.name] = self
        return self

    def __exit__(self, *_: Any) -> None:
        vars(self.owner).pop(self.name, None)
        if self.own is not None:
            vars(self.owner)[self.name] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        # Called before the copy has attributes of its own
        return (getattr, (self.owner, self.name)) if self.own is None else (_itself, (self.own,))


def has_own(owner: Any, name: str) -> bool:
    """
    :param owner: An object
    :param name: Of a method
    :return: Whether the object has another one than its class, and no stand-in of ours
    """
    own = vars(owner).get(name)
    if own is None or isinstance(own, StandIn):
        return False
    return getattr(own, "__func__", None) is not getattr(type(owner), name, None)


def has_own_methods(owner: Any) -> bool:
    """
    :param owner: An object, no module
    :return: Whether it has methods that its class has not
    """
    return any(map(callable, getattr(owner, "__dict__", {}).values()))


def acts_as_trained(policy: ActorCriticPolicy) -> bool:
    """
    :param policy: The policy
    :return: Whether ``get_distribution()``, which leaves the critic out, gives what ``evaluate_actions()`` does
    """
    own = is_sb3(policy, "evaluate_actions", "get_distribution", "extract_features")
    return own and not is_hooked(policy.mlp_extractor)  # of which the one calls a part, the other the whole


def is_sb3(policy: ActorCriticPolicy, *methods: str) -> bool:
    """
    :param policy: The policy
    :param methods: Names of methods
    :return: Whether it has them from SB3's base class
    """
    return all(
        getattr(type(policy), method, None) is getattr(ActorCriticPolicy, method) and not has_own(policy, method)
        for method in methods
    )

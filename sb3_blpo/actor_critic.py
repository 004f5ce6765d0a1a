"""
An SB3 actor-critic policy as leader and follower: two sets of parameters that have nothing in common.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn.modules import activation

from sb3_blpo.jacobian import FunctionalJacobian, Jacobian, LayerJacobian

#: Activations that act on every element by itself and have no parameters
ELEMENTWISE = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.ELU, activation.CELU, activation.SELU,
    activation.GELU, activation.SiLU, activation.Mish, activation.Tanh, activation.Sigmoid, activation.Softplus,
    activation.Softsign, activation.Hardtanh, activation.Hardswish, activation.Hardsigmoid, activation.LogSigmoid,
    activation.Softshrink, activation.Hardshrink, activation.Tanhshrink, nn.Identity,
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
        policy.vf_features_extractor = copy.deepcopy(policy.features_extractor)
        policy.share_features_extractor = False
    # SB3's list of constructor arguments lacks this one, and `policy.save()` and `load()` would silently merge the extractors
    policy._get_constructor_parameters = functools.partial(_constructor_parameters, policy)  # type: ignore[method-assign]


def _constructor_parameters(policy: ActorCriticPolicy) -> dict[str, Any]:
    return type(policy)._get_constructor_parameters(policy) | {"share_features_extractor": False}


def split_parameters(
    policy: ActorCriticPolicy, observation_space: spaces.Space
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """
    Tell the actor's parameters, which the action distribution depends on, from the critic's, which the value depends on.

    :param policy: The policy
    :param observation_space: Of the policy
    :return: The actor's and the critic's trainable parameters by name, in the policy's order
    :raises ValueError: If a parameter belongs to both or to neither
    """
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    training = policy.training
    policy.set_training_mode(False)
    with th.enable_grad():
        # A copy of the space: sampling must not disturb an environment that draws from its own space
        observation = policy.obs_to_tensor(copy.deepcopy(observation_space).sample())[0]
        distribution = policy.get_distribution(observation)
        log_prob = distribution.log_prob(distribution.get_actions(deterministic=True)).sum()
        value = policy.predict_values(observation).sum()
    parameters = list(named.values())
    by_actor = th.autograd.grad(log_prob, parameters, allow_unused=True)
    by_critic = th.autograd.grad(value, parameters, allow_unused=True)
    with th.no_grad():
        policy.get_distribution(observation)  # the policy keeps it, and could not be copied with the graph in it
    policy.set_training_mode(training)
    actor = {name: p for (name, p), grad in zip(named.items(), by_actor, strict=True) if grad is not None}
    critic = {name: p for (name, p), grad in zip(named.items(), by_critic, strict=True) if grad is not None}
    for name in named:
        if (name in actor) == (name in critic):
            raise ValueError(
                f"BLPO needs an actor and a critic without common parameters, but `{name}` of {type(policy).__name__} belongs "
                f"to {'both' if name in actor else 'neither'}; every trainable parameter must affect either the action "
                "distribution or the value."
            )
    return actor, critic


def make_optimizer(policy: ActorCriticPolicy, parameters: dict[str, nn.Parameter], learning_rate: float) -> th.optim.Optimizer:
    """
    :param policy: Has the optimizer's class and arguments
    :param parameters: What to optimize
    :param learning_rate: Initial learning rate
    :return: The optimizer
    """
    kwargs: dict[str, Any] = policy.optimizer_kwargs
    if policy.optimizer_class in (th.optim.Adam, th.optim.AdamW):
        # One kernel for all parameters: for small networks several times faster, on the CPU too
        kwargs = {"fused": not any(name in kwargs for name in ("foreach", "capturable", "differentiable"))} | kwargs
    return policy.optimizer_class(list(parameters.values()), lr=learning_rate, **kwargs)  # type: ignore[call-arg]


class Critic(nn.Module):
    """
    The policy's value function as a module of its own.

    :param policy: The policy
    :param parameters: The critic's trainable parameters by their names in the policy
    """

    def __init__(self, policy: ActorCriticPolicy, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.policy = policy
        self.trainable: dict[str, th.Tensor] = {f"policy.{name}": parameter for name, parameter in parameters.items()}
        self.layers = plain_layers(policy, list(parameters.values()))

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: (n, ...)
        :return: Their values (n,)
        """
        return self.policy.predict_values(observations).flatten()

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """
        Switch dropout and batch statistics off for a while; a critic of plain layers has none.

        :return: A context manager
        """
        if self.layers is not None:
            yield
            return
        training = self.policy.training
        self.policy.set_training_mode(False)
        try:
            yield
        finally:
            self.policy.set_training_mode(training)

    def jacobian(self, observations: PyTorchObs, generator: th.Generator) -> Jacobian:
        """
        :param observations: (n, ...)
        :param generator: Source of what the Jacobian draws
        :return: The values' Jacobian by the critic's parameters
        """
        if self.layers is not None:
            return LayerJacobian(self, observations, self.layers)

        def values(parameters: dict[str, th.Tensor]) -> th.Tensor:
            return th.func.functional_call(self, parameters, (observations,))

        return FunctionalJacobian(values, self.trainable, generator)


def plain_layers(policy: ActorCriticPolicy, parameters: list[nn.Parameter]) -> list[nn.Linear | nn.Conv2d] | None:
    """
    See whether the critic is made of SB3's own parts with nothing but Linear and Conv2d layers and elementwise activations in
    them, so that everything the solvers need follows from the layers' inputs and signals.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    :return: The layers in the order of the parameters; ``None`` for any other critic
    """
    if type(policy).predict_values is not ActorCriticPolicy.predict_values or type(policy.mlp_extractor) is not MlpExtractor:
        return None
    parts = [policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net]
    modules = [module for part in parts for module in part.modules()]
    if not all(map(_is_plain, modules)):
        return None
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    # Same parameters in the same order: nothing frozen, nothing beside the layers, no layer used twice
    chain = [parameter for layer in layers for parameter in layer.parameters()]
    same = len(chain) == len(parameters) and all(a is b for a, b in zip(chain, parameters, strict=True))
    return layers if same else None


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return type(module) is nn.Conv2d and module.groups == 1 and zeros
    if type(module) in ELEMENTWISE:
        return not getattr(module, "inplace", False)
    return type(module) in (nn.Linear, nn.Flatten, *CONTAINERS)


class Snapshot(NamedTuple):
    """
    What a minibatch changes before its last check: the critic, its optimizer's state, and the networks' buffers.

    :param optimizer: The critic's optimizer
    :param tensors: Parameters and buffers, each with its value
    :param state: The optimizer's state by parameter
    """

    optimizer: th.optim.Optimizer
    tensors: list[tuple[th.Tensor, th.Tensor]]
    state: dict[th.Tensor, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer, policy: ActorCriticPolicy) -> "Snapshot":
        """
        :param optimizer: The critic's optimizer
        :param policy: The policy, whose buffers (statistics of normalisation layers) forward passes change
        :return: Their values now
        """
        tensors = [*parameters_of(optimizer), *policy.buffers()]
        state = {
            parameter: {key: value.clone() if isinstance(value, th.Tensor) else value for key, value in entries.items()}
            for parameter, entries in optimizer.state.items()
        }
        return cls(optimizer, [(tensor, tensor.detach().clone()) for tensor in tensors], state)

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: Any) -> None:
        """Put everything back if the block raised."""
        if exception is None:
            return
        with th.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def parameters_of(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: An optimizer
    :return: Its parameters, in order
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

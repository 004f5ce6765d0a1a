"""
The optimizers of leader and follower: how they are made, their parameters, and undoing what one of them did.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn


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


def parameters_of(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: An optimizer
    :return: Those of its parameters that are not frozen, in order
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def optimizes(optimizer: th.optim.Optimizer | None, parameters: Iterable[th.Tensor]) -> bool:
    """
    :param optimizer: An optimizer
    :param parameters: Parameters, frozen ones too
    :return: Whether it has these, in this order, and no others
    """
    return optimizer is not None and are_same([p for group in optimizer.param_groups for p in group["params"]], [*parameters])


def are_same(some: Sequence[th.Tensor], others: Sequence[th.Tensor]) -> bool:
    """
    :param some: Tensors
    :param others: Tensors
    :return: Whether they are the same ones in the same order
    """
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def leave_to(first: th.optim.Optimizer, other: th.optim.Optimizer) -> None:
    """
    :param first: An optimizer
    :param other: Another, which loses the parameters that the first one has: each step must have one optimizer alone
    """
    taken = {id(parameter) for group in first.param_groups for parameter in group["params"]}
    for group in other.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]


def gradient_vector(optimizer: th.optim.Optimizer) -> th.Tensor:
    """
    :param optimizer: An optimizer; the ``grad`` of its parameters is set to views of the result, of frozen ones to ``None``
    :return: A vector that holds the gradients of :func:`parameters_of` it, zero now
    """
    optimizer.zero_grad()
    parameters = parameters_of(optimizer)
    example = parameters[0] if parameters else th.zeros(0)
    vector = th.zeros(sum(p.numel() for p in parameters), dtype=example.dtype, device=example.device)
    for parameter, part in zip(parameters, vector.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return vector


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
    def of(cls, optimizer: th.optim.Optimizer, buffers: list[th.Tensor]) -> "Snapshot":
        """
        :param optimizer: The critic's optimizer
        :param buffers: The policy's, which forward passes change (statistics of normalisation layers)
        :return: Their values now
        """
        tensors = [*parameters_of(optimizer), *buffers]
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

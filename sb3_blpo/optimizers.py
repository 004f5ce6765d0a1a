"""
The optimizers of leader and follower: how they are made, their parameters and gradients, and undoing what one of them did.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn


def make_optimizer(
    policy: ActorCriticPolicy,
    parameters: dict[str, nn.Parameter],
    learning_rate: float,
    former: th.optim.Optimizer | None = None,
) -> th.optim.Optimizer:
    """
    :param policy: Has the optimizer's class and arguments
    :param parameters: What to optimize
    :param learning_rate: Initial learning rate
    :param former: The optimizer until now, whose state of the same parameters is kept, if only its rate differs
    :return: The optimizer
    """
    kwargs: dict[str, Any] = policy.optimizer_kwargs
    if policy.optimizer_class in (th.optim.Adam, th.optim.AdamW):
        # One kernel for all parameters: for small networks several times faster, on the CPU too
        kwargs = {"fused": not any(name in kwargs for name in ("foreach", "capturable", "differentiable"))} | kwargs
    optimizer = policy.optimizer_class(list(parameters.values()), lr=learning_rate, **kwargs)  # type: ignore[call-arg]
    if type(former) is type(optimizer) and former.defaults | {"lr": 0} == optimizer.defaults | {"lr": 0}:
        optimizer.state.update({p: former.state[p] for p in parameters.values() if p in former.state})
    return optimizer


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


class Gradient:
    """
    The gradients of an optimizer's parameters as one vector.

    :param optimizer: The optimizer; the ``grad`` of frozen parameters is set to ``None``
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        optimizer.zero_grad()
        parameters = parameters_of(optimizer)
        for parameter in parameters:
            # Fused optimizers go through parameter and gradient in the order of memory
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        example = parameters[0] if parameters else th.zeros(0)
        #: Of :func:`parameters_of` the optimizer, flattened and joined
        self.vector = th.zeros(sum(p.numel() for p in parameters), dtype=example.dtype, device=example.device)
        parts = self.vector.split([parameter.numel() for parameter in parameters])
        self._views = [(parameter, part.view_as(parameter)) for parameter, part in zip(parameters, parts, strict=True)]

    def set(self, gradient: th.Tensor) -> None:
        """
        Give each parameter its part, whatever hooks have put in the place of the last one.

        :param gradient: The vector's new content
        """
        self.vector.copy_(gradient)
        for parameter, view in self._views:
            if parameter.grad is not view:
                parameter.grad = view


@contextlib.contextmanager
def undone_on_error(optimizer: th.optim.Optimizer, buffers: list[th.Tensor]) -> Iterator[None]:
    """
    Put back what a minibatch changes before its last check, the critic, its optimizer's state and the networks' buffers, if
    the block raises.

    :param optimizer: The critic's optimizer
    :param buffers: The policy's, which forward passes change (statistics of normalisation layers)
    :return: A context manager
    """
    before = [(tensor, tensor.detach().clone()) for tensor in (*parameters_of(optimizer), *buffers)]
    state = {
        parameter: {key: value.clone() if isinstance(value, th.Tensor) else value for key, value in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    try:
        yield
    except BaseException:
        with th.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise

"""
The optimizers of leader and follower: how they are made, their parameters, their steps along one vector, and undoing these.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.optim import optimizer as of_torch


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


class FusedAdam:
    """
    Torch's kernel of Adam, without what ``Adam.step()`` does around it: for small networks that takes longer than the kernel,
    and there are ``n_critic_updates + 1`` steps a minibatch. What it does to parameters and state is the same to the last bit.

    :param optimizer: Which :meth:`serves`
    :param gradients: Of its parameters
    """

    def __init__(self, optimizer: th.optim.Optimizer, gradients: list[th.Tensor]) -> None:
        (self.settings,) = optimizer.param_groups
        parameters = parameters_of(optimizer)
        state = [optimizer.state[parameter] for parameter in parameters]
        #: The parameters' numbers of steps, which the optimizer has parts of, so that one operation counts on
        self.steps = th.stack([entries["step"] for entries in state])
        for entries, step in zip(state, self.steps, strict=True):
            entries["step"] = step
        first, second = ([entries[name] for entries in state] for name in ("exp_avg", "exp_avg_sq"))
        self._tensors: list[list[th.Tensor]] = [parameters, gradients, first, second, [], list(self.steps)]
        self._changed = [x.detach().view(-1) for x in (*parameters, *first, *second, self.steps)]

    @staticmethod
    def serves(optimizer: th.optim.Optimizer) -> bool:
        """
        :param optimizer: Any optimizer
        :return: Whether it is Adam as SB3 makes it, with its state on the CPU, and nobody looks on when it steps
        """
        hooks = (
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
            of_torch._global_optimizer_pre_hooks, of_torch._global_optimizer_post_hooks,
        )  # fmt: skip
        if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1 or any(hooks) or "step" in vars(optimizer):
            return False
        group, parameters = optimizer.param_groups[0], parameters_of(optimizer)
        if not group["fused"] or group["amsgrad"] or group.get("decoupled_weight_decay") or not hasattr(th, "_fused_adam_"):
            return False
        has_numbers = all(isinstance(x, float | int) for x in (group["lr"], *group["betas"]))
        state = [optimizer.state.get(parameter, {}) for parameter in parameters]  # none before the first step
        has_state = bool(state) and all(entries.keys() == {"step", "exp_avg", "exp_avg_sq"} for entries in state)
        return has_numbers and has_state and all(map(_is_plain, parameters + [x for part in state for x in part.values()]))

    def step(self) -> None:
        """What ``Adam.step()`` does."""
        beta1, beta2 = self.settings["betas"]
        settings = {name: self.settings[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        with th.no_grad():
            self.steps += 1
            th._fused_adam_(*self._tensors, beta1=beta1, beta2=beta2, **settings)

    def remember(self) -> Callable[[], None]:
        """
        :return: What puts everything that steps change back to what it is now
        """
        before = th.cat(self._changed)

        def put_back() -> None:
            for x, value in zip(self._changed, before.split([len(x) for x in self._changed]), strict=True):
                x.copy_(value)

        return put_back


def _is_plain(x: Any) -> bool:
    return isinstance(x, th.Tensor) and x.is_contiguous() and x.device.type == "cpu" and x.dtype == th.float32


class Descent:
    """
    Steps of an optimizer along gradients that are given as one vector.

    :param optimizer: The optimizer; the ``grad`` of frozen parameters is set to ``None``
    """

    def __init__(self, optimizer: th.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.optimizer = optimizer
        parameters = parameters_of(optimizer)
        for parameter in parameters:
            # Fused optimizers go through parameter and gradient in the order of memory
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        example = parameters[0] if parameters else th.zeros(0)
        #: The gradient by :func:`parameters_of` the optimizer, flattened and joined
        self.vector = th.zeros(sum(p.numel() for p in parameters), dtype=example.dtype, device=example.device)
        parts = self.vector.split([parameter.numel() for parameter in parameters])
        self._views = [(parameter, part.view_as(parameter)) for parameter, part in zip(parameters, parts, strict=True)]
        self._fused = FusedAdam(optimizer, [view for _, view in self._views]) if FusedAdam.serves(optimizer) else None

    def step(self, gradient: th.Tensor) -> None:
        """
        :param gradient: What to step along (n_params,)
        """
        self.vector.copy_(gradient)
        for parameter, view in self._views:
            if parameter.grad is not view:  # hooks may have put something else in its place
                parameter.grad = view
        if self._fused is not None:
            self._fused.step()
        else:
            with th.inference_mode(False):  # its state, and what its hooks make of it, is used elsewhere too
                self.optimizer.step()

    @contextlib.contextmanager
    def undone_on_error(self, buffers: list[th.Tensor]) -> Iterator[None]:
        """
        Put back what a minibatch changes before its last check, the parameters, the optimizer's state and the networks'
        buffers, if the block raises.

        :param buffers: The policy's, which forward passes change (statistics of normalisation layers)
        :return: A context manager
        """
        before = [(buffer, buffer.clone()) for buffer in buffers]
        put_back = self._remember() if self._fused is None else self._fused.remember()
        try:
            yield
        except BaseException:
            with th.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
                put_back()
            raise

    def _remember(self) -> Callable[[], None]:
        """Return what puts parameters and state back to what they are now."""
        before = [(parameter, parameter.detach().clone()) for parameter in parameters_of(self.optimizer)]
        state = {
            parameter: {key: value.clone() if isinstance(value, th.Tensor) else value for key, value in entries.items()}
            for parameter, entries in self.optimizer.state.items()
        }

        def put_back() -> None:
            for parameter, value in before:
                parameter.copy_(value)
            self.optimizer.state.clear()
            self.optimizer.state.update(state)

        return put_back

"""
The critic's Jacobian J, whose row j is the gradient of the value V(s_j) by the critic's trainable parameters (n_params,),
flattened and joined.

J is never held as a whole. For a critic made of Linear layers all products follow from the layers' inputs and signals, and so
for one with Conv2d layers too, of which some random states are taken: :class:`LayerJacobian`. For any other critic the rows of
some random states are formed: :class:`SampledJacobian`.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from sb3_blpo.rows import AllLayers, FormedRows, LinearRows, Rows, conv_rows, flatten

#: A critic that is not made of Linear layers: how many rows are formed at most, and how large they may be together
MAX_SAMPLED_ROWS = 256
MAX_SAMPLED_BYTES = 2**28


class Values(nn.Module):
    """A policy's critic as a module of its own: it maps observations to their values (n,)."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Any) -> th.Tensor:
        return self.policy.predict_values(observations).flatten()


@dataclass(eq=False)
class Jacobian(ABC):
    """J of the values of observations, the N states in the critic's loss first."""

    critic: nn.Module  # maps observations to values (n,), in eval mode
    take: Callable[[th.Tensor], Any]  # maps indices of observations to a copy of these
    n_observations: int
    n_states: int  # N
    parameters: Sequence[nn.Parameter]  # those of the critic that are trained
    batch_size: int  # at most so many observations go through the critic at a time

    def __post_init__(self) -> None:
        self.n_params = sum(parameter.numel() for parameter in self.parameters)
        self.has_memory = any(isinstance(module, nn.RNNBase) for module in self.critic.modules())
        #: The states that the curvature is made from: all, or a sample of them
        self.curvature_states = th.arange(self.n_states, device="cpu")

    @abstractmethod
    def at(self, index: th.Tensor) -> Rows:
        """Rows of the observations with these indices (k,)."""

    @abstractmethod
    def chunks(self) -> Iterable[Rows]:
        """The rows of :attr:`curvature_states`, in order, some at a time."""

    @th.no_grad()
    def to_values(self, v: th.Tensor) -> th.Tensor:
        """What a change of the parameters does to the values of the N states, to first order (N,)."""
        # A central difference: what serves every critic, in place for those that keep their weights elsewhere as well. The
        # step balances its error and rounding
        before = [parameter.clone() for parameter in self.parameters]
        scale = 1 + th.linalg.vector_norm(flatten(before))
        step = th.finfo(v.dtype).eps ** (1 / 3) * scale / th.linalg.vector_norm(v).clamp_min(th.finfo(v.dtype).tiny)
        parts = v.split([parameter.numel() for parameter in before])
        values = []
        try:
            for change in (step, -step):
                for parameter, start, part in zip(self.parameters, before, parts, strict=True):
                    parameter.copy_(start + change * part.view_as(start))
                indices = th.arange(self.n_states, device="cpu").split(self.batch_size)
                values.append(th.cat([self.critic(self.take(index)) for index in indices]))
        finally:
            for parameter, start in zip(self.parameters, before, strict=True):
                parameter.copy_(start)
        return (values[0] - values[1]) / (2 * step)

    def gradient(self, c: th.Tensor) -> th.Tensor:
        """J^T c, the gradient of sum_j c_j V(s_j) over all observations (n_params,)."""
        total = c.new_zeros(self.n_params)
        for index in th.arange(self.n_observations, device="cpu").split(self.batch_size):
            total += self._differentiate(self._values(index), c[index])
        return total

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        """(sum_j w_j Hessian of V(s_j)) v over :attr:`curvature_states` (n_params,)."""
        total = th.zeros_like(v)
        for index, weights in zip(self.curvature_states.split(self.batch_size), w.split(self.batch_size), strict=True):
            gradient = self._differentiate(self._values(index), weights, create_graph=True)
            try:
                total += self._differentiate(gradient, v)
            except RuntimeError as error:
                raise ValueError(f"`curvature`='hessian' takes a critic with second derivatives ({error}).") from error
        return total

    def _values(self, index: th.Tensor) -> th.Tensor:
        # cuDNN's recurrent layers have no backward pass in eval mode
        with th.enable_grad(), th.backends.cudnn.flags(enabled=False) if self.has_memory else contextlib.nullcontext():
            return self.critic(self.take(index))

    def _differentiate(self, outputs: th.Tensor, weights: th.Tensor, create_graph: bool = False) -> th.Tensor:
        if not outputs.requires_grad:  # linear in the parameters, or without any
            return outputs.new_zeros(self.n_params)
        gradients = th.autograd.grad(
            outputs, self.parameters, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return flatten(gradients)

    def are_right(self, rows: Callable[[th.Tensor], Rows]) -> bool:
        """
        Whether a few rows are what automatic differentiation gives; not so where a layer is called twice, weights are used in
        another way than by their module, or values depend on one another's observations.
        """
        index = th.linspace(0, self.n_observations - 1, min(self.n_observations, 16), device="cpu").long()
        values = self._values(index)
        w = th.linspace(1, 2, len(index), device="cpu").to(values)
        sizes = [parameter.numel() for parameter in self.parameters]
        exact, given = self._differentiate(values, w), rows(index).Jt_w(w)
        for one, true in zip(given.split(sizes), exact.split(sizes), strict=True):
            # Far above rounding; what is not finite says nothing about the rows
            if th.linalg.vector_norm(one - true) > 0.01 * th.linalg.vector_norm(true) + 1e-6 * exact.abs().max():
                return False
        return True


class LayerJacobian(Jacobian):
    """
    The Jacobian of a critic whose parameters all belong to Linear and Conv2d layers, each used once. Inputs and signals of
    Linear layers are kept, memory linear in the number of states. Rows of Conv2d layers are formed, and so the curvature of a
    critic that has some is made from a sample of the states.

    :param layers: The layers, in the order of the parameters
    :param generator: Draws the sample
    """

    def __init__(
        self, layers: Sequence[nn.Linear | nn.Conv2d], *arguments: Any, generator: th.Generator | None = None
    ) -> None:
        super().__init__(*arguments)
        self.layers = layers
        self.sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        n_formed = sum(size for size, layer in zip(self.sizes, layers, strict=True) if isinstance(layer, nn.Conv2d))
        if n_formed > 0:
            self.curvature_states = some_states(self.n_states, n_formed, generator).sort().values
        else:
            self.batch_size = max(self.batch_size, 4096)
        self._kept: list[Rows] | None = None

    def chunks(self) -> Iterable[Rows]:
        if self._kept is None:
            self._kept = [self.at(index) for index in self.curvature_states.split(self.batch_size)]
        return self._kept

    def to_values(self, v: th.Tensor) -> th.Tensor:
        if len(self.curvature_states) < self.n_states:
            return super().to_values(v)
        return th.cat([rows.J_v(v) for rows in self.chunks()])

    def at(self, index: th.Tensor) -> Rows:
        seen: dict[nn.Module, list[tuple[th.Tensor, Any]]] = {layer: [] for layer in self.layers}
        thread = threading.get_ident()

        def see(layer: nn.Module, inputs: tuple[th.Tensor], output: th.Tensor) -> None:
            # The edge stays where it is if the output is changed in place. Users' threads may call the critic meanwhile
            if not inputs:
                raise RuntimeError(f"{layer} is called by keyword.")
            if threading.get_ident() == thread:
                seen[layer].append((inputs[0].detach(), get_gradient_edge(output)))

        hooks = [layer.register_forward_hook(see, prepend=True) for layer in self.layers]
        try:
            values = self._values(index)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, calls in seen.items():
            if [(h.ndim, len(h)) for h, _ in calls] != [(2 if isinstance(layer, nn.Linear) else 4, len(index))]:
                raise RuntimeError(f"{layer} is not called once, with one row for each value.")
        # A value depends on its own row alone: the gradient of their sum has each row's own in its place
        deltas = th.autograd.grad(values.sum(), [calls[0][1] for calls in seen.values()])
        parts: list[Rows] = []
        for layer, delta in zip(self.layers, deltas, strict=True):
            h, bias = seen[layer][0][0], layer.bias is not None
            parts.append(conv_rows(layer, h, delta) if isinstance(layer, nn.Conv2d) else LinearRows(h, delta, bias))
        return AllLayers(parts, self.sizes)


def some_states(n_states: int, n_formed: int, generator: th.Generator | None) -> th.Tensor:
    """Draw as many states as rows of so many numbers each may be formed."""
    n = min(MAX_SAMPLED_ROWS, max(1, MAX_SAMPLED_BYTES // (4 * n_formed)))
    return th.randperm(n_states, generator=generator, device="cpu")[:n]


class SampledJacobian(Jacobian):
    """
    The Jacobian of any critic. The curvature is made from the rows of some random states, which are formed; the gradient and
    the changes of values are those of all observations.
    """

    def __init__(self, generator: th.Generator, *arguments: Any) -> None:
        super().__init__(*arguments)
        names = {id(parameter): name for name, parameter in self.critic.named_parameters()}
        self._named = {names[id(parameter)]: parameter.detach() for parameter in self.parameters}
        self.curvature_states = self._sample(generator).sort().values
        self._vectorises = self._can_vectorise()
        self._rows = self.at(self.curvature_states)

    def _sample(self, generator: th.Generator) -> th.Tensor:
        return some_states(self.n_states, self.n_params, generator)

    def _can_vectorise(self) -> bool:
        try:
            return self.are_right(self._at_once)
        except th.OutOfMemoryError:
            raise
        except Exception:  # GRU, checkpointing, an old-style autograd.Function and others
            return False

    def chunks(self) -> Iterable[Rows]:
        return [self._rows]

    def at(self, index: th.Tensor) -> Rows:
        if self._vectorises:
            return self._at_once(index)
        one = th.ones(1, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        return FormedRows(th.stack([self._differentiate(self._values(i), one) for i in index.split(1)]))

    def _at_once(self, index: th.Tensor) -> Rows:
        def value(parameters: dict[str, th.Tensor], observation: Any) -> th.Tensor:
            one = tree_map(lambda obs: obs[None], observation)
            return functional_call(self.critic, parameters, (one,))[0]

        rows = vmap(grad(value), (None, 0), chunk_size=self.batch_size)(self._named, self.take(index))
        return FormedRows(th.cat([part.flatten(1) for part in rows.values()], dim=1))


def layers_of(critic: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Linear | nn.Conv2d] | None:
    """The critic's layers in the order of its parameters, if these are all those of plain Linear and Conv2d layers."""
    own = [id(parameter) for parameter in parameters]
    layers = [module for module in critic.modules() if any(id(p) in own for p in module.parameters(recurse=False))]
    plain = [layer for layer in layers if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and _is_plain(layer))]
    if len(plain) < len(layers) or any(layer._parameters.keys() != {"weight", "bias"} for layer in plain):  # weight_norm
        return None
    found = [id(parameter) for layer in plain for parameter in layer._parameters.values() if parameter is not None]
    return plain if plain and found == own else None


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def make_jacobian(policy: Any, generator: th.Generator, *arguments: Any) -> Jacobian:
    """By layers, where these give what automatic differentiation does; else from sampled rows."""
    critic = Values(policy)
    *_, parameters, _ = arguments
    layers = layers_of(critic, parameters)
    if layers is not None:
        jacobian = LayerJacobian(layers, critic, *arguments, generator=generator)
        try:
            if jacobian.are_right(jacobian.at):
                return jacobian
        except th.OutOfMemoryError:
            raise
        except RuntimeError:  # a layer is not called once, or by keyword
            pass
    return SampledJacobian(generator, critic, *arguments)

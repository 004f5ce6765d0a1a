"""
Products with the Jacobian of a critic whose parameters all belong to Linear and Conv2d layers, without forming it.

:class:`ChainJacobian` serves critics that are Linear layers and elementwise activations one after another,
:class:`LayerJacobian` whatever else is made of these and Conv2d layers.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call
from torch.nn import functional as F

from sb3_blpo.chain import ONE, Chain
from sb3_blpo.jacobian import Jacobian, flat_gradient, hessian_v


class LayerRows(ABC):
    """The part of J that belongs to one layer."""

    @abstractmethod
    def J_v(self, v: th.Tensor) -> th.Tensor:
        """
        :param v: The layer's part of k parameter vectors (n_layer_params, k)
        :return: Its part of J v (n_rows, k)
        """

    @abstractmethod
    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        """
        :param w: k vectors of coefficients (n_rows, k)
        :return: The layer's part of J^T w (n_layer_params, k)
        """

    @abstractmethod
    def columns(self, index: th.Tensor) -> th.Tensor:
        """
        :param index: Indices among the layer's parameters (k,)
        :return: These columns of J (n_rows, k)
        """

    @abstractmethod
    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        """
        :param rows: Indices of k rows of J (k,); ``None``: all
        :return: The layer's part of these rows of J J^T (k, n_rows)
        """

    @abstractmethod
    def squared_norms(self) -> th.Tensor:
        """
        :return: The layer's part of the rows' squared norms (n_rows,)
        """


class Inputs:
    """
    What a Linear layer's inputs contribute to products of its rows of J, whatever its signals.

    :param h: The inputs (n_rows, n_in)
    :param has_bias: Whether the layer has a bias, which sees the constant input 1
    """

    def __init__(self, h: th.Tensor, has_bias: bool) -> None:
        self.h = h
        self.has_bias = has_bias

    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        """
        :param rows: Indices of k rows (k,); ``None``: all
        :return: Inner products of their inputs with all (k, n_rows)
        """
        gram = _select(self.h, rows) @ self.h.T
        return gram.add_(ONE) if self.has_bias else gram

    def squared_norms(self) -> th.Tensor:
        """
        :return: Of each row's inputs (n_rows,)
        """
        squared_norms = th.linalg.vecdot(self.h, self.h)
        return squared_norms.add_(ONE) if self.has_bias else squared_norms


class FirstInputs(Inputs):
    """
    Those of a first layer, which do not depend on the parameters, so that what was computed once may be kept.

    :param h: The inputs (n_rows, n_in)
    :param has_bias: As in :class:`Inputs`
    :param kept: What was, of the same inputs
    """

    def __init__(self, h: th.Tensor, has_bias: bool, kept: dict[str, th.Tensor]) -> None:
        super().__init__(h, has_bias)
        self.kept = kept

    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        if rows is None:  # as large as the minibatch squared
            return super().gram(rows)
        if self.kept.get("rows") is not rows:
            self.kept |= {"rows": rows, "gram": super().gram(rows)}
        return self.kept["gram"]

    def squared_norms(self) -> th.Tensor:
        if "squared_norms" not in self.kept:
            self.kept["squared_norms"] = super().squared_norms()
        return self.kept["squared_norms"]


def _select(x: th.Tensor, rows: th.Tensor | None) -> th.Tensor:
    return x if rows is None else x.index_select(0, rows)


class LinearRows(LayerRows):
    """
    Of a Linear layer: the gradient of V(s_j) by its weight is the outer product of the layer's signal delta[j] = dV/dz and its
    input h[j], so every product is a matrix product with these factors.

    :param inputs: Its inputs (n_rows, n_in)
    :param signal: Derivatives of the values by its outputs (n_rows, n_out)
    """

    #: Largest number of elements of an intermediate result, unless a single vector needs more
    chunk_elements = 2**24

    def __init__(self, inputs: Inputs, signal: th.Tensor) -> None:
        self.inputs = inputs
        self.h, self.has_bias = inputs.h, inputs.has_bias
        self.signal = signal
        self.n_weights = self.h.shape[1] * signal.shape[1]

    def _in_groups(self, product: Callable[[th.Tensor], th.Tensor], vectors: th.Tensor) -> th.Tensor:
        """Multiply as many of the k vectors at a time as keep the intermediate result (n_rows, n_in, k) small."""
        group = max(1, self.chunk_elements // self.h.numel())
        if vectors.shape[1] <= group:
            return product(vectors)
        return th.cat([product(part) for part in vectors.split(group, dim=1)], dim=1)

    def J_v(self, v: th.Tensor) -> th.Tensor:
        return self._in_groups(self._J_v, v)

    def _J_v(self, v: th.Tensor) -> th.Tensor:
        n_rows, n_in = self.h.shape
        n_out, k = self.signal.shape[1], v.shape[1]
        change = self.signal @ v[: self.n_weights].reshape(n_out, n_in * k)
        if k == 1:  # without a batched product
            product = th.linalg.vecdot(self.h, change)[:, None]
        else:
            product = (self.h[:, None] @ change.view(n_rows, n_in, k))[:, 0]
        return product + self.signal @ v[self.n_weights :] if self.has_bias else product

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        return self._in_groups(self._Jt_w, w)

    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        n_rows, n_in = self.h.shape
        k = w.shape[1]
        weighted = (self.h[:, :, None] * w[:, None]).reshape(n_rows, n_in * k)
        product = (self.signal.T @ weighted).view(self.n_weights, k)
        return th.cat([product, self.signal.T @ w]) if self.has_bias else product

    def columns(self, index: th.Tensor) -> th.Tensor:
        n_in = self.h.shape[1]
        # A bias sees the constant input 1
        inputs = F.pad(self.h, (0, 1), value=1.0)
        is_weight = index < self.n_weights
        out_index = th.where(is_weight, index // n_in, index - self.n_weights)
        in_index = th.where(is_weight, index % n_in, n_in)
        return self.signal[:, out_index] * inputs[:, in_index]

    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        return (_select(self.signal, rows) @ self.signal.T).mul_(self.inputs.gram(rows))

    def squared_norms(self) -> th.Tensor:
        return th.linalg.vecdot(self.signal, self.signal).mul_(self.inputs.squared_norms())


class OutputRows(LinearRows):
    """
    Of the Linear layer whose outputs are the values, so that its signal is 1.

    :param inputs: Its inputs (n_rows, n_in)
    :param signal: Ones (n_rows, 1)
    """

    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        return self.inputs.gram(rows)

    def squared_norms(self) -> th.Tensor:
        return self.inputs.squared_norms()


class ConvRows(LayerRows):
    """
    Of a Conv2d layer, as a matrix: weights shared over the image leave no outer product, but are few.

    :param layer: The layer, of one group and padded with zeros
    :param h: Its inputs (n_rows, n_channels, height, width)
    :param signal: Derivatives of the values by its outputs (n_rows, n_out, height', width')
    """

    #: Rows per group: a group's unfolded inputs are larger than the images by the kernel's area
    group = 64

    def __init__(self, layer: nn.Conv2d, h: th.Tensor, signal: th.Tensor) -> None:
        self.rows = th.cat(
            [self._rows(layer, *part) for part in zip(h.split(self.group), signal.split(self.group), strict=True)]
        )

    @staticmethod
    def _rows(layer: nn.Conv2d, h: th.Tensor, signal: th.Tensor) -> th.Tensor:
        patches = F.unfold(h, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        signal = signal.flatten(2)
        by_weight = (signal @ patches.transpose(1, 2)).flatten(1)
        return by_weight if layer.bias is None else th.cat([by_weight, signal.sum(dim=2)], dim=1)

    def J_v(self, v: th.Tensor) -> th.Tensor:
        return self.rows @ v

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        return self.rows.T @ w

    def columns(self, index: th.Tensor) -> th.Tensor:
        return self.rows[:, index]

    def gram(self, rows: th.Tensor | None) -> th.Tensor:
        return _select(self.rows, rows) @ self.rows.T

    def squared_norms(self) -> th.Tensor:
        return self.rows.square().sum(dim=1)


class LayerJacobian(Jacobian):
    """
    Jacobian of a critic whose parameters all belong to Linear and Conv2d layers, each used once, and whose values do not
    depend on one another's observations. One forward and one backward pass give all layers' inputs and signals, and J is not
    formed, but for Conv2d layers.

    :param critic: Maps observations to values (n_rows,) or (n_rows, 1)
    :param observations: Its input
    :param layers: The layers, in the order of the parameters; ``None``: all that the critic has
    """

    cheap_gram = True
    #: Of critics that may have other Jacobians: what the rows of Conv2d layers may take
    max_conv_bytes = 2**28

    def __init__(self, critic: nn.Module, observations: Any, layers: Sequence[nn.Linear | nn.Conv2d] | None = None) -> None:
        self.critic = critic
        self.observations = observations
        if layers is None:
            layers = [module for module in critic.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.layers = layers
        self.sizes = [layer.weight.numel() + (0 if layer.bias is None else len(layer.bias)) for layer in layers]
        super().__init__(self._forward(), sum(self.sizes))

    def _forward(self) -> th.Tensor:
        """Return the values, and keep each layer's inputs and outputs."""
        seen: dict[nn.Module, list[tuple[th.Tensor, GradientEdge]]] = {layer: [] for layer in self.layers}

        def keep(layer: nn.Module, inputs: tuple[th.Tensor], output: th.Tensor) -> None:
            if not inputs:
                raise RuntimeError(f"{layer} is called by keyword.")
            # The edge stays where it is if the output is changed in place
            seen[layer].append((inputs[0].detach(), get_gradient_edge(output)))

        # Before hooks of the user's, which may change the output
        hooks = [layer.register_forward_hook(keep, prepend=True) for layer in self.layers]
        try:
            with th.enable_grad():
                values = self.critic(self.observations).flatten()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, calls in seen.items():
            ndim = 2 if isinstance(layer, nn.Linear) else 4
            if [(h.ndim, len(h)) for h, _ in calls] != [(ndim, len(values))]:
                raise RuntimeError(f"{layer} is not called once, with one row for each value.")
        self._inputs = [calls[0][0] for calls in seen.values()]
        self._outputs = [calls[0][1] for calls in seen.values()]
        self._total = values.sum()
        return values.detach()

    def _signals(self) -> Sequence[th.Tensor]:
        """Return the derivatives of the values by each layer's outputs."""
        # A value depends on its own row alone: the gradient of their sum has each row's own in its place
        return th.autograd.grad(self._total, self._outputs)

    @functools.cached_property
    def parts(self) -> list[LayerRows]:
        """Each layer's part of J."""
        return [
            ConvRows(layer, h, signal)
            if isinstance(layer, nn.Conv2d)
            else LinearRows(Inputs(h, layer.bias is not None), signal)
            for layer, h, signal in zip(self.layers, self._inputs, self._signals(), strict=True)
        ]

    def J_v(self, v: th.Tensor) -> th.Tensor:
        if v.ndim == 1:
            return self.J_v(v[:, None])[:, 0]
        return functools.reduce(
            th.Tensor.add_, [part.J_v(v_part) for part, v_part in zip(self.parts, v.split(self.sizes), strict=True)]
        )

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        if w.ndim == 1:
            return self.Jt_w(w[:, None])[:, 0]
        return th.cat([part.Jt_w(w) for part in self.parts])

    def columns(self, index: th.Tensor) -> th.Tensor:
        columns = self.values.new_empty(len(self.values), len(index))
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            here = (index >= start) & (index < start + size)
            columns[:, here] = part.columns(index[here] - start)
            start += size
        return columns

    def gram(self, rows: th.Tensor | None = None) -> th.Tensor:
        return functools.reduce(th.Tensor.add_, [part.gram(rows) for part in self.parts])

    def squared_norm(self, n: int) -> th.Tensor:
        return functools.reduce(th.Tensor.add_, [part.squared_norms() for part in self.parts])[:n].sum()

    def _function(self) -> tuple[Callable[[dict[str, th.Tensor]], th.Tensor], dict[str, th.Tensor]]:
        """The values as a function of the parameters by name, and these."""
        own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        parameters = {name: p.detach() for name, p in self.critic.named_parameters() if id(p) in own}
        return lambda p: functional_call(self.critic, p, (self.observations,)).flatten(), parameters

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        return hessian_v(*self._function(), w, v)

    def is_consistent(self) -> bool:
        n_conv = sum(size for layer, size in zip(self.layers, self.sizes, strict=True) if isinstance(layer, nn.Conv2d))
        if len(self.values) * n_conv * self.values.element_size() > self.max_conv_bytes:
            return False
        # A product is what automatic differentiation gives, unless values depend on one another's observations, or on a
        # layer's weights in other ways than by its call
        critic, parameters = self._function()
        parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        # Of mean 1, to see what values have in common
        w = 1 + th.randn(len(self.values), generator=th.Generator("cpu").manual_seed(0), device="cpu").to(self.values)
        with th.enable_grad():
            exact = flat_gradient([critic(parameters)], list(parameters.values()), [w])
        n_each = [parameter.numel() for parameter in parameters.values()]
        norms = [th.stack([th.linalg.vector_norm(part) for part in x.split(n_each)]) for x in (self.Jt_w(w) - exact, exact)]
        # Far above rounding. Every parameter counts alike, however small its gradient; what is not finite says nothing
        return not (norms[0].isfinite() & (norms[0] > 0.01 * norms[1] + 1e-6 * norms[1].max())).any()


class ChainJacobian(LayerJacobian):
    """
    The same for Linear layers and elementwise activations one after another, without automatic differentiation.

    :param chain: The layers and activations, with one output
    :param inputs: What goes into the first of them (n_rows, n_in)
    :param kept: What Jacobians of the same inputs leave to one another, empty at first; ``None``: nothing
    """

    def __init__(self, chain: Chain, inputs: th.Tensor, kept: dict[str, th.Tensor] | None = None) -> None:
        self.tape = chain.tape(inputs)
        self.kept = {} if kept is None else kept
        super().__init__(chain, inputs, chain.layers)

    def _forward(self) -> th.Tensor:
        return self.tape.outputs[:, 0]

    @functools.cached_property
    def parts(self) -> list[LayerRows]:
        """Each layer's part of J."""
        tape = self.tape
        signals = tape.signals(th.ones_like(tape.outputs))
        parts: list[LayerRows] = []
        for i, ((_, bias), h, signal) in enumerate(zip(tape.parameters, tape.inputs, signals, strict=True)):
            has_bias = bias is not None
            inputs = Inputs(h, has_bias) if i > 0 else FirstInputs(h, has_bias, self.kept)
            gives_values = i == len(signals) - 1 and not tape.pullbacks[i]
            parts.append((OutputRows if gives_values else LinearRows)(inputs, signal))
        return parts

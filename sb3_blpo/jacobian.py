"""
Products with the critic's Jacobian J, whose row j is the gradient of the value V(s_j) by the critic's parameters.

:class:`LayerJacobian` serves critics made of Linear layers and elementwise activations and never forms J;
:class:`FunctionalJacobian` serves every other critic through torch.func.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


class Jacobian(ABC):
    """
    The linear map from a change of the critic's parameters (n_params,) to the change of its values (n_rows,).

    Parameters are ordered as in ``critic.parameters()``, flattened and joined.

    :param values: V(s_j), detached (n_rows,)
    :param n_params: Number of the critic's parameters
    """

    #: Whether :meth:`gram` costs about as much as one product, so that solvers may work in the space of values
    cheap_gram: bool

    def __init__(self, values: th.Tensor, n_params: int) -> None:
        self.values = values
        self.n_params = n_params

    @abstractmethod
    def J_v(self, v: th.Tensor) -> th.Tensor:
        """
        :param v: Parameter vectors (n_params,) or (n_params, k)
        :return: J v (n_rows,) or (n_rows, k)
        """

    @abstractmethod
    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        """
        :param w: Coefficients of the rows (n_rows,) or (n_rows, k)
        :return: J^T w (n_params,) or (n_params, k)
        """

    @abstractmethod
    def columns(self, index: th.Tensor) -> th.Tensor:
        """
        :param index: Indices of parameters (k,)
        :return: These columns of J (n_rows, k)
        """

    @abstractmethod
    def gram(self) -> th.Tensor:
        """
        :return: J J^T (n_rows, n_rows)
        """

    @abstractmethod
    def squared_norm(self, n: int) -> th.Tensor:
        """
        :param n: How many rows count, from the first
        :return: The sum of their squared norms, the trace of J^T J for these rows ()
        """

    @abstractmethod
    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        """
        :param w: Weights of the values (n_rows,)
        :param v: Parameter vector (n_params,)
        :return: (sum_j w_j Hessian of V(s_j)) v (n_params,)
        """


class LayerJacobian(Jacobian):
    """
    Jacobian of a chain of Linear layers and elementwise activations, from one forward and one backward pass.

    The gradient of V(s_j) by the weight of layer l is the outer product of the layer's signal delta_l[j] = dV/dz_l and its
    input h_l[j], so every product with J is a few matrix products with these factors.

    :param body: Linear layers and elementwise activations, ending in a single output
    :param features: Input of the first layer (n_rows, n_features)
    """

    cheap_gram = True
    #: Largest number of elements of an intermediate result
    chunk_elements = 2**22

    def __init__(self, body: nn.Sequential, features: th.Tensor) -> None:
        self.body = body
        self.layers = [module for module in body if isinstance(module, nn.Linear)]
        self.inputs: list[th.Tensor] = []
        outputs = []
        h = features.detach()
        with th.enable_grad():
            for module in body:
                if isinstance(module, nn.Linear):
                    self.inputs.append(h.detach())
                    # Detached parameters: only the signals are wanted, so the backward pass skips the weights
                    h = F.linear(h, module.weight.detach(), None if module.bias is None else module.bias.detach())
                    outputs.append(h if h.requires_grad else h.requires_grad_())
                else:
                    h = module(h)
            self.signals = th.autograd.grad(h.sum(), outputs)
        super().__init__(h.detach().flatten(), sum(p.numel() for layer in self.layers for p in layer.parameters()))

    def _chunks(self, vectors: th.Tensor) -> tuple[th.Tensor, ...]:
        """Cut the columns of (n, k) into groups whose intermediate results (n_rows, width, group) stay small."""
        width = max(max(layer.in_features, layer.out_features) for layer in self.layers)
        return vectors.split(max(1, self.chunk_elements // (len(self.values) * width)), dim=1)

    def J_v(self, v: th.Tensor) -> th.Tensor:
        if v.ndim == 1:
            return self.J_v(v[:, None])[:, 0]
        return th.cat([self._J_v(chunk) for chunk in self._chunks(v)], dim=1)

    def _J_v(self, v: th.Tensor) -> th.Tensor:
        n_rows, k = len(self.values), v.shape[1]
        parts = iter(v.split([parameter.numel() for layer in self.layers for parameter in layer.parameters()]))
        product = v.new_zeros(n_rows, k)
        for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True):
            n_out, n_in = layer.weight.shape
            # One large matrix product for the change of the layer's outputs under all k vectors (n_rows, n_out, k)
            weights = next(parts).view(n_out, n_in, k).transpose(0, 1).reshape(n_in, n_out * k)
            change = (h @ weights).view(n_rows, n_out, k)
            product += (signal[:, None] @ change)[:, 0]
            if layer.bias is not None:
                product += signal @ next(parts)
        return product

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        if w.ndim == 1:
            return self.Jt_w(w[:, None])[:, 0]
        return th.cat([self._Jt_w(chunk) for chunk in self._chunks(w)], dim=1)

    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        n_rows, k = w.shape
        parts = []
        for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True):
            n_out, n_in = layer.weight.shape
            weighted = (signal[:, :, None] * w[:, None]).view(n_rows, n_out * k)
            parts.append((h.T @ weighted).view(n_in, n_out, k).transpose(0, 1).reshape(n_out * n_in, k))
            if layer.bias is not None:
                parts.append(signal.T @ w)
        return th.cat(parts)

    def columns(self, index: th.Tensor) -> th.Tensor:
        # Column (l, o, i) is signal_l[:, o] * h_l[:, i]; a bias sees the constant input 1
        ones = self.values.new_ones(len(self.values), 1)
        signals, inputs = th.cat(self.signals, dim=1), th.cat([*self.inputs, ones], dim=1)
        out_index, in_index = [], []
        n_out, n_in = 0, 0
        for layer in self.layers:
            rows = th.arange(n_out, n_out + layer.out_features, device=index.device)
            out_index.append(rows.repeat_interleave(layer.in_features))
            in_index.append(th.arange(n_in, n_in + layer.in_features, device=index.device).repeat(layer.out_features))
            if layer.bias is not None:
                out_index.append(rows)
                in_index.append(th.full_like(rows, inputs.shape[1] - 1))
            n_out, n_in = n_out + layer.out_features, n_in + layer.in_features
        return signals[:, th.cat(out_index)[index]] * inputs[:, th.cat(in_index)[index]]

    def gram(self) -> th.Tensor:
        K = self.values.new_zeros(len(self.values), len(self.values))
        for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True):
            inner = h @ h.T
            K += signal @ signal.T * (inner if layer.bias is None else inner + 1)
        return K

    def squared_norm(self, n: int) -> th.Tensor:
        total = self.values.new_zeros(())
        for layer, h, signal in zip(self.layers, self.inputs, self.signals, strict=True):
            h_squared = h[:n].square().sum(dim=1)
            total += (signal[:n].square().sum(dim=1) * (h_squared if layer.bias is None else h_squared + 1)).sum()
        return total

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        parameters = {name: parameter.detach() for name, parameter in self.body.named_parameters()}
        return _hessian_v(lambda p: functional_call(self.body, p, (self.inputs[0],)).flatten(), parameters, w, v)


class FunctionalJacobian(Jacobian):
    """
    Jacobian of any critic through torch.func, one vector at a time: no product needs an array of n_rows × n_params.

    The squared norm is an unbiased estimate (Hutchinson) from a few ±1 probes; :meth:`gram` alone forms the Jacobian.

    :param critic: Maps a dictionary of parameters to the values (n_rows,)
    :param parameters: The critic's parameters by name
    :param generator: Source of the probes
    """

    cheap_gram = False
    n_probes = 8

    def __init__(
        self, critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], generator: th.Generator
    ) -> None:
        self.critic = critic
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self.generator = generator
        values, self._vjp = th.func.vjp(critic, self.parameters)[:2]
        super().__init__(values.detach(), sum(parameter.numel() for parameter in parameters.values()))

    def J_v(self, v: th.Tensor) -> th.Tensor:
        if v.ndim == 2:
            return th.stack([self.J_v(column) for column in v.T], dim=1)
        return th.func.jvp(self.critic, (self.parameters,), (_unflatten(v, self.parameters),))[1]

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        if w.ndim == 2:
            return th.stack([self.Jt_w(column) for column in w.T], dim=1)
        return _flatten(self._vjp(w)[0])

    def columns(self, index: th.Tensor) -> th.Tensor:
        unit = self.values.new_zeros(self.n_params)
        return th.stack([self.J_v(unit.index_fill(0, i, 1.0)) for i in index], dim=1)

    def gram(self) -> th.Tensor:
        rows = self.Jt_w(th.eye(len(self.values), dtype=self.values.dtype, device=self.values.device))
        return rows.T @ rows

    def squared_norm(self, n: int) -> th.Tensor:
        signs = th.randint(2, (self.n_probes, n), generator=self.generator).to(self.values) * 2 - 1
        probes = F.pad(signs, (0, len(self.values) - n))
        return th.stack([self.Jt_w(probe).square().sum() for probe in probes]).mean()

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        return _hessian_v(self.critic, self.parameters, w, v)


def _flatten(tree: dict[str, th.Tensor]) -> th.Tensor:
    return th.cat([part.flatten() for part in tree.values()])


def _unflatten(v: th.Tensor, parameters: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    parts = v.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(parameter) for (name, parameter), part in zip(parameters.items(), parts, strict=True)}


def _hessian_v(
    critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], w: th.Tensor, v: th.Tensor
) -> th.Tensor:
    gradient = th.func.grad(lambda p: (w * critic(p)).sum())
    return _flatten(th.func.jvp(gradient, (parameters,), (_unflatten(v, parameters),))[1])

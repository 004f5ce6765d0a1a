"""
Linear layers and elementwise activations one after another, differentiated by hand.

What a small network costs is less its arithmetic than everything around it: written out, a pass forward and back takes half
the time of automatic differentiation, and leaves behind the layers' inputs and signals, of which the Jacobian is made.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

#: Scalars on the CPU go with tensors of any type and device, and faster than Python's numbers
ONE, MINUS_ONE = th.tensor(1.0, device="cpu"), th.tensor(-1.0, device="cpu")


class Tape(NamedTuple):
    """
    A forward pass.

    :param parameters: Weight and bias of each layer
    :param outputs: Of the last module (n_rows, n_out)
    :param inputs: Of each layer (n_rows, n_in)
    :param pullbacks: For each layer, of the activations that follow it, the first one first: from derivatives by the
        activation's outputs to those by its inputs
    """

    parameters: list[tuple[th.Tensor, th.Tensor | None]]
    outputs: th.Tensor
    inputs: list[th.Tensor]
    pullbacks: list[list[Callable[[th.Tensor], th.Tensor]]]

    def signals(self, by_outputs: th.Tensor) -> list[th.Tensor]:
        """
        :param by_outputs: Derivatives of a sum over the rows, by the outputs (n_rows, n_out)
        :return: Its derivatives by the outputs of each layer before the activation (n_rows, n_out)
        """
        signals: list[th.Tensor] = []
        signal = by_outputs
        for i in reversed(range(len(self.parameters))):
            for pullback in reversed(self.pullbacks[i]):
                signal = pullback(signal)
            signals.append(signal)
            if i > 0:
                signal = signal @ self.parameters[i][0].detach()
        return signals[::-1]

    def gradient(self, signals: list[th.Tensor], weights: th.Tensor | None = None) -> list[th.Tensor]:
        """
        :param signals: What :meth:`signals` returns
        :param weights: Of the rows in the sum (n_rows,); ``None``: all 1
        :return: The sum's gradients by the chain's parameters, flattened
        """
        column = None if weights is None else weights[:, None]
        gradients = []
        for (_, bias), h, signal in zip(self.parameters, self.inputs, signals, strict=True):
            weighted = signal if column is None else signal * column
            # The smaller factor first: for a few inputs MKL is two to three times faster that way round
            product = weighted.T @ h if h.shape[1] >= weighted.shape[1] else (h.T @ weighted).T
            gradients.append(product.flatten())
            if bias is not None:
                gradients.append(weighted.sum(dim=0))
        return gradients


class Chain(nn.Module):
    """
    A network that keeps what differentiating it by hand takes.

    :param modules: Linear layers and elementwise activations without parameters
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.chain = nn.Sequential(*modules)
        self.modules_in_order = modules
        self.layers = [module for module in modules if isinstance(module, nn.Linear)]
        #: Here, for modules take their time to look up their parameters
        self.by_layer: list[tuple[th.Tensor, th.Tensor | None]] = [(layer.weight, layer.bias) for layer in self.layers]

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (n_rows, n_in)
        :return: Outputs of the last module, by automatic differentiation (n_rows, n_out)
        """
        return self.chain(inputs)

    def outputs(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: (n_rows, n_in)
        :return: The same to the last bit, without what calling modules costs; hooks would not be called (n_rows, n_out)
        """
        x, parameters = inputs, iter(self.by_layer)
        for module in self.modules_in_order:
            x = F.linear(x, *next(parameters)) if isinstance(module, nn.Linear) else module.forward(x)
        return x

    @th.no_grad()
    def tape(self, inputs: th.Tensor) -> Tape:
        """
        :param inputs: (n_rows, n_in)
        :return: The forward pass, without a graph
        """
        x = inputs
        layer_inputs: list[th.Tensor] = []
        pullbacks: list[list[Callable[[th.Tensor], th.Tensor]]] = []
        for module in self.modules_in_order:
            if isinstance(module, nn.Linear):
                weight, bias = self.by_layer[len(layer_inputs)]
                layer_inputs.append(x)
                pullbacks.append([])
                x = F.linear(x, weight, bias)
            else:
                x, pullback = _activate(module, x)
                if pullbacks:  # before the first layer there is nothing to differentiate by
                    pullbacks[-1].append(pullback)
        return Tape(self.by_layer, x, layer_inputs, pullbacks)


def _activate(activation: nn.Module, z: th.Tensor) -> tuple[th.Tensor, Callable[[th.Tensor], th.Tensor]]:
    """Return an elementwise activation's outputs, and the map from derivatives by them to derivatives by its inputs."""
    if type(activation) is nn.Tanh:
        # tanh z = 2 sigmoid(2 z) - 1, as exact as numbers near 1 are. Torch's tanh is MKL's on x86: 2 to 4 times slower than
        # this where MKL has no AVX-512, twice as fast where it has
        h = th.add(MINUS_ONE, (z + z).sigmoid_(), alpha=2)
        return h, lambda by_h: th.ops.aten.tanh_backward(by_h, h)
    if type(activation) is nn.ReLU:
        h = z.relu()
        return h, lambda by_h: th.ops.aten.threshold_backward(by_h, h, 0)
    with th.inference_mode(False):  # which switches gradients on; a tensor made in that mode has none, a copy has
        z = z.clone().requires_grad_()
        h = activation(z)
        derivative = th.autograd.grad(h.sum(), z)[0]
    return h.detach(), lambda by_h: by_h * derivative

"""
Rows of the critic's Jacobian, the gradients of some states' values by the critic's parameters, and products with them.

For a Linear layer they are never formed: all follows from the layer's inputs and signals.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F


def flatten(parts: Sequence[th.Tensor]) -> th.Tensor:
    """One vector of all their elements."""
    return th.cat([part.flatten() for part in parts])


class Rows(ABC):
    """Some rows of J, or the part of them that belongs to one layer. Their number is ``len(rows)``."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def J_v(self, v: th.Tensor) -> th.Tensor:
        """J v (n_rows,)."""

    @abstractmethod
    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        """J^T w (n_params,)."""

    @abstractmethod
    def gram(self, other: Any) -> th.Tensor:
        """Inner products of these rows with k others of the same kind (n_rows, k)."""

    @abstractmethod
    def squared_norms(self) -> th.Tensor:
        """Of each row (n_rows,)."""


@dataclass(eq=False)
class FormedRows(Rows):
    """Rows as a matrix (n_rows, n_params)."""

    matrix: th.Tensor

    def __len__(self) -> int:
        return len(self.matrix)

    def J_v(self, v: th.Tensor) -> th.Tensor:
        return self.matrix @ v

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        return w @ self.matrix

    def gram(self, other: "FormedRows") -> th.Tensor:
        return self.matrix @ other.matrix.T

    def squared_norms(self) -> th.Tensor:
        return self.matrix.square().sum(dim=1)


class LinearRows(Rows):
    """
    Of a Linear layer: the gradient of V(s_j) by its weight is the outer product of the layer's signal delta[j] = dV/dz and
    its input h[j], so every product is a matrix product with these factors.

    :param h: The layer's inputs (n_rows, n_in)
    :param delta: Derivatives of the values by its outputs (n_rows, n_out)
    :param has_bias: Whether it has a bias, which sees the constant input 1
    """

    def __init__(self, h: th.Tensor, delta: th.Tensor, has_bias: bool) -> None:
        self.h = F.pad(h, (0, 1), value=1.0) if has_bias else h
        self.delta = delta
        self.has_bias = has_bias

    def __len__(self) -> int:
        return len(self.delta)

    def J_v(self, v: th.Tensor) -> th.Tensor:
        n_out, n_in = self.delta.shape[1], self.h.shape[1]
        if self.has_bias:
            v = th.cat([v[:-n_out].view(n_out, n_in - 1), v[-n_out:, None]], dim=1)
        return th.linalg.vecdot(self.h, self.delta @ v.view(n_out, n_in))

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        product = (self.delta * w[:, None]).T @ self.h
        return flatten([product[:, :-1], product[:, -1]] if self.has_bias else [product])

    def gram(self, other: "LinearRows") -> th.Tensor:
        return (self.delta @ other.delta.T).mul_(self.h @ other.h.T)

    def squared_norms(self) -> th.Tensor:
        return th.linalg.vecdot(self.delta, self.delta) * th.linalg.vecdot(self.h, self.h)


def conv_rows(layer: nn.Conv2d, h: th.Tensor, delta: th.Tensor) -> FormedRows:
    """Rows of a Conv2d layer: weights that are shared over the image leave no outer product, but are few."""
    patches = F.unfold(h, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    delta = delta.flatten(2)
    by_weight = (delta @ patches.transpose(1, 2)).flatten(1)
    return FormedRows(by_weight if layer.bias is None else th.cat([by_weight, delta.sum(dim=2)], dim=1))


@dataclass(eq=False)
class AllLayers(Rows):
    """Rows of a critic that is made of layers."""

    parts: Sequence[Rows]  # of each layer
    sizes: list[int]  # how many parameters each layer has

    def __len__(self) -> int:
        return len(self.parts[0])

    def J_v(self, v: th.Tensor) -> th.Tensor:
        products = (part.J_v(own) for part, own in zip(self.parts, v.split(self.sizes), strict=True))
        return sum(products, start=v.new_zeros(()))

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        return th.cat([part.Jt_w(w) for part in self.parts])

    def gram(self, other: "AllLayers") -> th.Tensor:
        gram = self.parts[0].gram(other.parts[0])
        for part, theirs in zip(self.parts[1:], other.parts[1:], strict=True):
            gram += part.gram(theirs)
        return gram

    def squared_norms(self) -> th.Tensor:
        return th.stack([part.squared_norms() for part in self.parts]).sum(dim=0)

"""
Products with the critic's Jacobian J, whose row j is the gradient of the value V(s_j) by the critic's parameters.

:mod:`sb3_blpo.layers` serves critics made of Linear and Conv2d layers. Here :class:`FunctionalJacobian` serves every other one
through torch.func, :class:`AutogradJacobian` those that it cannot transform, and :class:`FormedJacobian` those whose pass back
cannot be differentiated itself.
"""

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch as th
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

#: No Jacobian of a critic that is not made of layers is larger than this, where it has to be formed
MAX_JACOBIAN_BYTES = 64 * 2**20


class Jacobian(ABC):
    """
    The linear map from a change of the critic's parameters (n_params,) to the change of its values (n_rows,).

    Parameters are in the order of the critic's optimizer, flattened and joined.

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
    def gram(self, rows: th.Tensor | None = None) -> th.Tensor:
        """
        :param rows: Indices of k rows of J (k,); ``None``: all of them
        :return: These rows of the Gram matrix J J^T (k, n_rows)
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

    def is_consistent(self) -> bool:
        """
        :return: Whether the products are right, as far as this is not known beforehand and can be seen
        """
        return True


class VectorwiseJacobian(Jacobian):
    """
    Jacobian of any critic, by products with one vector at a time: none needs an array of n_rows × n_params.

    The squared norm is an unbiased estimate (Hutchinson) from a few ±1 probes; :meth:`gram` alone forms the Jacobian.

    :param values: V(s_j), detached (n_rows,)
    :param parameters: The critic's parameters by name
    :param generator: Source of the probes
    """

    cheap_gram = False
    n_probes = 8

    def __init__(self, values: th.Tensor, parameters: dict[str, th.Tensor], generator: th.Generator) -> None:
        super().__init__(values, sum(parameter.numel() for parameter in parameters.values()))
        self.parameters = parameters
        self.generator = generator

    @abstractmethod
    def _J_v(self, v: th.Tensor) -> th.Tensor:
        """J v for one vector."""

    @abstractmethod
    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        """J^T w for one vector."""

    def J_v(self, v: th.Tensor) -> th.Tensor:
        return self._J_v(v) if v.ndim == 1 else th.stack([self._J_v(column) for column in v.T], dim=1)

    def Jt_w(self, w: th.Tensor) -> th.Tensor:
        return self._Jt_w(w) if w.ndim == 1 else th.stack([self._Jt_w(column) for column in w.T], dim=1)

    def columns(self, index: th.Tensor) -> th.Tensor:
        unit = self.values.new_zeros(self.n_params)
        return th.stack([self.J_v(unit.index_fill(0, i, 1.0)) for i in index], dim=1)

    def gram(self, rows: th.Tensor | None = None) -> th.Tensor:
        identity = th.eye(len(self.values), dtype=self.values.dtype, device=self.values.device)
        if rows is not None:
            return th.stack([self.J_v(self.Jt_w(row)) for row in identity[rows]])
        J_transposed = self.Jt_w(identity)
        return J_transposed.T @ J_transposed

    def is_consistent(self) -> bool:
        # Both belong to one matrix, <w, J v> = <J^T w, v>, unless the critic's pass back holds something that torch takes for
        # constant
        generator = th.Generator("cpu").manual_seed(0)
        n_each = [parameter.numel() for parameter in self.parameters.values()]
        for _ in range(self.n_probes):
            sizes = (len(self.values), self.n_params)
            w, v = (th.randn(n, generator=generator, device="cpu").to(self.values) for n in sizes)
            Jt_w = self.Jt_w(w)
            # Every parameter counts alike, however small its gradient, unless that is rounding
            norms = th.cat([th.linalg.vector_norm(part).expand(len(part)) for part in Jt_w.split(n_each)])
            v = th.where(norms > 1e-6 * norms.max(), v / norms, 0)
            # Far above the rounding of bfloat16. What is not finite says nothing about the products, and does not stay unseen
            if 0.1 * len(n_each) ** 0.5 < (w @ self.J_v(v) - Jt_w @ v).abs() < math.inf:
                return False
        return True

    def squared_norm(self, n: int) -> th.Tensor:
        coins = th.randint(2, (self.n_probes, n), generator=self.generator, device=self.generator.device)
        signs = coins.to(self.values) * 2 - 1
        probes = F.pad(signs, (0, len(self.values) - n))
        return th.stack([self.Jt_w(probe).square().sum() for probe in probes]).mean()


class FunctionalJacobian(VectorwiseJacobian):
    """
    Through torch.func.

    :param critic: Maps a dictionary of parameters to the values (n_rows,)
    :param parameters: The critic's parameters by name
    :param generator: Source of the probes
    """

    def __init__(
        self, critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], generator: th.Generator
    ) -> None:
        self.critic = critic
        parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        values, self._vjp = th.func.vjp(critic, parameters)[:2]
        super().__init__(values.detach(), parameters, generator)

    def _J_v(self, v: th.Tensor) -> th.Tensor:
        # Backwards: the derivative of w -> J^T w, which is linear in w
        return _jvp(
            self.critic, self.parameters, v,
            lambda Jt_w, tangent: th.func.vjp(lambda w: Jt_w(w)[0], th.zeros_like(self.values))[1](tangent)[0],
        )  # fmt: skip

    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        return _flatten(self._vjp(w)[0])

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        return hessian_v(self.critic, self.parameters, w, v)


class AutogradJacobian(VectorwiseJacobian):
    """
    Without torch.func, for critics that it cannot transform: an ``autograd.Function`` without ``setup_context()``,
    checkpointing, buffers that every forward pass updates in place. Products with J, too, are made backwards.

    :param critic: Maps a dictionary of parameters to the values (n_rows,)
    :param parameters: The critic's parameters by name
    :param generator: Source of the probes
    """

    def __init__(
        self, critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], generator: th.Generator
    ) -> None:
        # Not the critic's own, whose hooks are for gradients of its loss
        parameters = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        with th.enable_grad(), _twice_differentiable():
            self._graph = critic(parameters)
        super().__init__(self._graph.detach(), parameters, generator)

    def _gradient(self, output: th.Tensor, weights: th.Tensor, create_graph: bool = False) -> th.Tensor:
        """Gradient of <output, weights> by the parameters (n_params,)."""
        with th.enable_grad(), _twice_differentiable():
            return flat_gradient([output], list(self.parameters.values()), [weights], create_graph)

    def _J_v(self, v: th.Tensor) -> th.Tensor:
        w = th.zeros_like(self.values).requires_grad_()
        Jt_w = self._gradient(self._graph, w, create_graph=True)
        with _twice_differentiable():
            return flat_gradient([Jt_w], [w], [v])

    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        return self._gradient(self._graph, w)

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        return self._gradient(self._gradient(self._graph, w, create_graph=True), v)


class FormedJacobian(VectorwiseJacobian):
    """
    Row by row, for critics whose pass back cannot be differentiated itself: with an ``autograd.Function`` that is
    ``once_differentiable`` or computes its gradient outside of torch, or an operation without a second derivative.

    :param critic: Maps a dictionary of parameters to the values (n_rows,)
    :param parameters: The critic's parameters by name
    :param generator: Source of the probes
    :raises ValueError: If the Jacobian is too large
    """

    def __init__(
        self, critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], generator: th.Generator
    ) -> None:
        parameters = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        with th.enable_grad():
            values = critic(parameters)
        super().__init__(values.detach(), parameters, generator)
        n_bytes = len(values) * self.n_params * values.element_size()
        if n_bytes > MAX_JACOBIAN_BYTES:
            raise ValueError(
                "Torch cannot differentiate the critic's gradient, so that its Jacobian has to be formed and may have at most "
                f"{MAX_JACOBIAN_BYTES} bytes, but a minibatch with {len(values)} values of {self.n_params} parameters needs "
                f"{n_bytes}; use a smaller `batch_size` or `ihvp_solver`='none'."
            )
        with th.enable_grad():
            self.rows = th.stack([flat_gradient([value], list(parameters.values())) for value in values])

    def _J_v(self, v: th.Tensor) -> th.Tensor:
        return self.rows @ v

    def _Jt_w(self, w: th.Tensor) -> th.Tensor:
        return self.rows.T @ w

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        raise ValueError("Torch cannot differentiate the critic's gradient: use `curvature`='gauss_newton'.")


def flat_gradient(
    outputs: Sequence[th.Tensor],
    parameters: Sequence[th.Tensor],
    by_outputs: Sequence[th.Tensor] | None = None,
    create_graph: bool = False,
) -> th.Tensor:
    """
    :param outputs: What to differentiate; may be differentiated again
    :param parameters: By what: any number
    :param by_outputs: Weights of the outputs' elements; ``None``: 1, and each output is one number
    :param create_graph: Whether the gradient is to be differentiated itself
    :return: The gradient, flattened and joined; 0 for what the outputs do not depend on (n_params,)
    """
    dependent = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not parameters or not dependent:
        return outputs[0].new_zeros(sum(parameter.numel() for parameter in parameters))
    outputs = [outputs[i] for i in dependent]
    by_outputs = None if by_outputs is None else [by_outputs[i] for i in dependent]
    gradients = th.autograd.grad(
        outputs,
        parameters,
        by_outputs,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return th.cat([gradient.flatten() for gradient in gradients])


def _flatten(tree: dict[str, th.Tensor]) -> th.Tensor:
    return th.cat([part.flatten() for part in tree.values()])


def _unflatten(v: th.Tensor, parameters: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    parts = v.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(parameter) for (name, parameter), part in zip(parameters.items(), parts, strict=True)}


def hessian_v(
    critic: Callable[[dict[str, th.Tensor]], th.Tensor], parameters: dict[str, th.Tensor], w: th.Tensor, v: th.Tensor
) -> th.Tensor:
    """
    :param critic: Maps a dictionary of parameters to the values (n_rows,)
    :param parameters: The parameters by name
    :param w: As in :meth:`Jacobian.hessian_v`
    :param v: Likewise
    :return: The same product
    """
    gradient = th.func.grad(lambda p: (w * critic(p)).sum())
    # Backwards: a Hessian is symmetric
    return _flatten(_jvp(gradient, parameters, v, lambda H_v, tangent: H_v(tangent)[0]))


#: torch's levels of forward mode belong to the process, and not to a thread
_FORWARD_MODE = threading.Lock()


def _jvp(
    function: Callable[..., Any], parameters: dict[str, th.Tensor], v: th.Tensor, backwards: Callable[[Any, Any], Any]
) -> Any:
    """Product of a function's Jacobian with v; without forward mode by ``backwards``, from the product with the transpose."""
    tangent = _unflatten(v, parameters)
    try:
        with _FORWARD_MODE:
            return th.func.jvp(function, (parameters,), (tangent,))[1]
    except NotImplementedError:  # torch's word for attention, LSTM, weight_norm and others
        with _twice_differentiable():
            return backwards(th.func.vjp(function, parameters)[1], tangent)


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Without kernels that can be differentiated only once, and not forward."""
    backends: Any = (th.backends.mkldnn, th.backends.cudnn)  # their LSTMs
    enabled = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before

"""
The curvature H of the critic's loss, as the solvers in :mod:`sb3_blpo.ihvp` see it.

A solver finds x with (H + alpha I) x = g for vectors in some representation: parameter vectors themselves, or the coefficients
c of J^T c. With the Gauss-Newton matrix both the right side and the solution lie in the span of J's rows, so that all of the
algebra can happen among n_rows coefficients and columns of the Gram matrix J J^T, without an array as long as the parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_blpo.jacobian import Jacobian

#: Up to this many values solvers that need the whole Gram matrix may have it (8 MiB in float64); above it they work among
#: parameters, so that memory grows linearly with the minibatch
MAX_GRAM_ROWS = 1024


class Restriction(NamedTuple):
    """
    H restricted to the span of k vectors omega_i, and the way back.

    :param H: omega_i^T H omega_j (k, k)
    :param inner: omega_i^T omega_j (k, k)
    :param g: omega_i^T g (k,)
    :param lift: Maps coefficients y (k,) to the vector sum_i y_i omega_i in the curvature's representation
    :param values: Maps them to what this vector does to the values of the loss's states (n_steps,)
    """

    H: th.Tensor
    inner: th.Tensor
    g: th.Tensor
    lift: Callable[[th.Tensor], th.Tensor]
    values: Callable[[th.Tensor], th.Tensor]


class Curvature(ABC):
    """
    H and the right side g of (H + alpha I) x = g. All vectors may be (n,) or, by columns, (n, k).

    :param jacobian: Of the critic's values: first those of the ``n_steps`` states that the loss is over, then the others
    :param g: The right side in this representation (n,)
    :param n_steps: Number N of values in the loss (1/N) sum_t (V_t - R_t)^2
    """

    #: Whether H is positive semi-definite, and not only symmetric
    semidefinite = True

    def __init__(self, jacobian: Jacobian, g: th.Tensor, n_steps: int) -> None:
        self.jacobian = jacobian
        self.g = g
        self.n_steps = n_steps
        #: Relative error of products with J
        self.rounding = th.finfo(jacobian.values.dtype).eps

    @abstractmethod
    def H_v(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Vector (n,) or vectors (n, k)
        :return: H x
        """

    @abstractmethod
    def dot(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """
        :param x: Vector or vectors
        :param y: Vector or vectors
        :return: Inner products of the parameter vectors that x and y stand for: (), (k,) or (k_x, k_y)
        """

    @abstractmethod
    def sketch(self, omega: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param omega: Orthonormal parameter vectors (n_params, k), or the indices of k parameters (k,), integers
        :return: C = H Omega in this representation (n, k) and M = Omega^T H Omega (k, k)
        """

    @abstractmethod
    def restrict(self, rows: th.Tensor) -> Restriction:
        """
        :param rows: Indices of k rows of J (k,)
        :return: H on the span of these values' gradients
        """

    @abstractmethod
    def sketch_of_rows(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param rows: Indices of k rows of J (k,)
        :return: C and M as in :meth:`sketch`, for these values' gradients as Omega
        """

    @abstractmethod
    def dense(self) -> th.Tensor:
        """
        :return: The matrix of H in this representation (n, n)
        """

    @abstractmethod
    def to_values(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Vector (n,)
        :return: How the parameter change x moves the values of the loss's states, J x (n_steps,)
        """

    @abstractmethod
    def to_parameters(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Vector (n,)
        :return: The parameter vector that x stands for (n_params,)
        """


class GramGaussNewton(Curvature):
    """
    Gauss-Newton curvature H = (2/N) J_N^T J_N among coefficients: x stands for J^T x. In float64.

    :param jacobian: As in :class:`Curvature`
    :param c: Coefficients of the right side g = J^T c (n_rows,)
    :param n_steps: As in :class:`Curvature`
    :param whole: Whether to form the Gram matrix at once, for solvers that multiply by it often
    """

    def __init__(self, jacobian: Jacobian, c: th.Tensor, n_steps: int, whole: bool = True) -> None:
        super().__init__(jacobian, c.double(), n_steps)
        self.whole = whole
        if whole:
            self.K = jacobian.gram().double()  # symmetric

    def _K_x(self, x: th.Tensor) -> th.Tensor:
        if self.whole:
            return self.K @ x
        return self.jacobian.J_v(self.jacobian.Jt_w(x.to(self.jacobian.values.dtype))).double()

    def _extend(self, x: th.Tensor) -> th.Tensor:
        """(2/N) times x, with zeros for the rows that are not in the loss."""
        rest = x.new_zeros(len(self.g) - self.n_steps, *x.shape[1:])
        return th.cat([2 / self.n_steps * x, rest])

    def H_v(self, x: th.Tensor) -> th.Tensor:
        return self._extend(self._K_x(x)[: self.n_steps])

    def dot(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return x.T @ self._K_x(y) if x.ndim == 2 else x @ self._K_x(y)

    def sketch(self, omega: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        jacobian = self.jacobian
        J_omega = jacobian.J_v(omega) if omega.is_floating_point() else jacobian.columns(omega)
        B = J_omega[: self.n_steps].double()
        return self._extend(B), 2 / self.n_steps * B.T @ B

    def restrict(self, rows: th.Tensor) -> Restriction:
        K = self.jacobian.gram(rows).double()
        B = K[:, : self.n_steps]
        return Restriction(
            (B @ B.T).mul_(2 / self.n_steps),
            K.index_select(1, rows),
            K @ self.g,
            lambda y: th.zeros_like(self.g).index_copy(0, rows, y),
            lambda y: (y @ B).to(self.jacobian.values.dtype),
        )

    def sketch_of_rows(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        B = self.K[: self.n_steps, rows]
        return self._extend(B), 2 / self.n_steps * B.T @ B

    def dense(self) -> th.Tensor:
        return self._extend(self.K[: self.n_steps])

    def to_values(self, x: th.Tensor) -> th.Tensor:
        return self._K_x(x)[: self.n_steps].to(self.jacobian.values.dtype)

    def to_parameters(self, x: th.Tensor) -> th.Tensor:
        return self.jacobian.Jt_w(x.to(self.jacobian.values.dtype))


class GaussNewton(Curvature):
    """
    Gauss-Newton curvature H = (2/N) J_N^T J_N among parameters.

    :param jacobian: As in :class:`Curvature`
    :param c: Coefficients of the right side g = J^T c (n_rows,)
    :param n_steps: As in :class:`Curvature`
    """

    def __init__(self, jacobian: Jacobian, c: th.Tensor, n_steps: int) -> None:
        super().__init__(jacobian, jacobian.Jt_w(c), n_steps)

    def H_v(self, x: th.Tensor) -> th.Tensor:
        w = 2 / self.n_steps * self.jacobian.J_v(x)
        w[self.n_steps :] = 0
        return self.jacobian.Jt_w(w)

    def dot(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return x.T @ y if x.ndim == 2 else x @ y

    def sketch(self, omega: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        if omega.is_floating_point():
            C = self.H_v(omega)
            return C, omega.T @ C
        C = self.H_v(self._unit_vectors(self.jacobian.n_params, omega))
        return C, C[omega]

    def _unit_vectors(self, n: int, index: th.Tensor) -> th.Tensor:
        vectors = th.zeros(n, len(index), dtype=self.g.dtype, device=self.g.device)
        vectors[index, th.arange(len(index), device=self.g.device)] = 1
        return vectors

    def _basis(self, rows: th.Tensor) -> th.Tensor:
        return th.linalg.qr(self.jacobian.Jt_w(self._unit_vectors(len(self.jacobian.values), rows))).Q

    def restrict(self, rows: th.Tensor) -> Restriction:
        omega = self._basis(rows)
        identity = th.eye(omega.shape[1], dtype=omega.dtype, device=omega.device)
        return Restriction(
            omega.T @ self.H_v(omega), identity, omega.T @ self.g, lambda y: omega @ y.to(omega.dtype),
            lambda y: self.to_values(omega @ y.to(omega.dtype)),
        )  # fmt: skip

    def sketch_of_rows(self, rows: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.sketch(self._basis(rows))

    def dense(self) -> th.Tensor:
        return self.H_v(th.eye(self.jacobian.n_params, dtype=self.g.dtype, device=self.g.device))

    def to_values(self, x: th.Tensor) -> th.Tensor:
        return self.jacobian.J_v(x)[: self.n_steps]

    def to_parameters(self, x: th.Tensor) -> th.Tensor:
        return x


class Hessian(GaussNewton):
    """
    The exact Hessian of the critic's loss, the Gauss-Newton matrix plus (2/N) sum_t (V_t - R_t) Hessian of V_t. Indefinite.

    :param jacobian: As in :class:`Curvature`
    :param c: Coefficients of the right side g = J^T c (n_rows,)
    :param residuals: V_t - R_t (n_steps,)
    """

    semidefinite = False

    def __init__(self, jacobian: Jacobian, c: th.Tensor, residuals: th.Tensor) -> None:
        super().__init__(jacobian, c, len(residuals))
        rest = residuals.new_zeros(len(c) - len(residuals))
        self.weights = th.cat([2 / self.n_steps * residuals, rest])

    def H_v(self, x: th.Tensor) -> th.Tensor:
        if x.ndim == 2:
            return th.stack([self.H_v(column) for column in x.T], dim=1)
        return super().H_v(x) + self.jacobian.hessian_v(self.weights, x)

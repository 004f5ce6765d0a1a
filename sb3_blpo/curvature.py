"""
The curvature H of the critic's loss, as the solvers in :mod:`sb3_blpo.ihvp` see it.

A solver finds x with (H + alpha I) x = g for vectors in some representation: parameter vectors themselves, or the coefficients
c of J^T c. With the Gauss-Newton matrix both the right side and the solution lie in the span of J's rows, so that all of the
algebra can happen among n_rows coefficients and the Gram matrix J J^T, without a single array as long as the parameters.
"""

from abc import ABC, abstractmethod

import torch as th

from sb3_blpo.jacobian import Jacobian

#: Up to this many values the Gauss-Newton algebra is done among values (a Gram matrix of 8 MiB in float64), above it among
#: parameters, so that memory grows linearly with the minibatch
MAX_GRAM_ROWS = 1024


class Curvature(ABC):
    """
    H and the right side g of (H + alpha I) x = g. All vectors may be (n,) or, by columns, (n, k).

    :param jacobian: Of the critic's values: first those of the ``n_steps`` states that the loss is over, then the others
    :param g: The right side in this representation (n,)
    :param n_steps: Number N of values in the loss (1/N) sum_t (V_t - R_t)^2
    """

    def __init__(self, jacobian: Jacobian, g: th.Tensor, n_steps: int) -> None:
        self.jacobian = jacobian
        self.g = g
        self.n_steps = n_steps

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
    """

    def __init__(self, jacobian: Jacobian, c: th.Tensor, n_steps: int) -> None:
        super().__init__(jacobian, c.double(), n_steps)
        self.K = jacobian.gram().double()

    def _extend(self, x: th.Tensor) -> th.Tensor:
        """(2/N) times x, with zeros for the rows that are not in the loss."""
        rest = x.new_zeros(len(self.K) - self.n_steps, *x.shape[1:])
        return th.cat([2 / self.n_steps * x, rest])

    def H_v(self, x: th.Tensor) -> th.Tensor:
        return self._extend(self.K[: self.n_steps] @ x)

    def dot(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        return x.T @ (self.K @ y) if x.ndim == 2 else x @ (self.K @ y)

    def sketch(self, omega: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        jacobian = self.jacobian
        J_omega = jacobian.J_v(omega) if omega.is_floating_point() else jacobian.columns(omega)
        B = J_omega[: self.n_steps].double()
        return self._extend(B), 2 / self.n_steps * B.T @ B

    def dense(self) -> th.Tensor:
        return self._extend(self.K[: self.n_steps])

    def to_values(self, x: th.Tensor) -> th.Tensor:
        return (self.K[: self.n_steps] @ x).to(self.jacobian.values.dtype)

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
        C = self.H_v(th.eye(self.jacobian.n_params, dtype=self.g.dtype, device=self.g.device)[:, omega])
        return C, C[omega]

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

    def __init__(self, jacobian: Jacobian, c: th.Tensor, residuals: th.Tensor) -> None:
        super().__init__(jacobian, c, len(residuals))
        rest = residuals.new_zeros(len(c) - len(residuals))
        self.weights = th.cat([2 / self.n_steps * residuals, rest])

    def H_v(self, x: th.Tensor) -> th.Tensor:
        if x.ndim == 2:
            return th.stack([self.H_v(column) for column in x.T], dim=1)
        return super().H_v(x) + self.jacobian.hessian_v(self.weights, x)

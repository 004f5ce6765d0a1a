"""The linear system (H + alpha I) v = g for the critic's response, among its parameters, as the solvers see it."""

import torch as th

from sb3_blpo.jacobian import Jacobian


class GaussNewton:
    """
    H = (2/n) J_n^T J_n, the Gauss-Newton matrix of the critic's loss (1/n) sum_t (V_t - R_t)^2: positive semi-definite, and
    the Hessian where the critic is linear in its parameters.

    :param jacobian: Of the critic's values
    :param g: The right side, the gradient of the leader's objective by the critic's parameters (n_params,)
    :param damping: alpha in units of the trace of this matrix, positive
    """

    #: Whether H is positive semi-definite, and not only symmetric
    semidefinite = True

    def __init__(self, jacobian: Jacobian, g: th.Tensor, damping: float) -> None:
        self.jacobian = jacobian
        self.g = g
        self.scale = 2 / len(jacobian.curvature_states)
        #: tr(H) ()
        self.trace = self.scale * th.stack([rows.squared_norms().sum() for rows in jacobian.chunks()]).sum()
        self.alpha = damping * self.trace

    def H_v(self, v: th.Tensor) -> th.Tensor:
        """H v (n_params,)."""
        total = th.zeros_like(v)
        for rows in self.jacobian.chunks():
            total += rows.Jt_w(rows.J_v(v))
        return self.scale * total

    def residual(self, v: th.Tensor) -> th.Tensor:
        """Norm of g - (H + alpha I) v relative to that of g, 0 where both are 0 ()."""
        g_norm = th.linalg.vector_norm(self.g)
        norm = th.linalg.vector_norm(self.g - self.H_v(v) - self.alpha * v)
        return th.where(g_norm > 0, norm / g_norm, norm)


class Hessian(GaussNewton):
    """
    The exact Hessian of the critic's loss, the Gauss-Newton matrix plus (2/n) sum_t (V_t - R_t) Hessian of V_t. Indefinite.
    ``damping`` stays in units of the trace of the Gauss-Newton matrix.

    :param residuals: V_t - R_t of all states in the loss (N,)
    """

    semidefinite = False

    def __init__(self, jacobian: Jacobian, g: th.Tensor, damping: float, residuals: th.Tensor) -> None:
        super().__init__(jacobian, g, damping)
        self.weights = self.scale * residuals[jacobian.curvature_states]

    def H_v(self, v: th.Tensor) -> th.Tensor:
        return super().H_v(v) + self.jacobian.hessian_v(self.weights, v)

"""Nyström approximation of the inverse (Hataya & Yamada, AISTATS 2023, arXiv 2302.09726)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp.dense import Solution, Solver, solve_dense
from sb3_blpo.jacobian import Jacobian
from sb3_blpo.rows import Rows


@dataclass
class Nystrom(Solver):
    """
    Replace H by a Nyström approximation of low rank, in one of two ways.

    Among parameters (sketch "columns" or "gaussian"): H_Q = C M^+ C^T, C = H Omega, M = Omega^T H Omega, whose regularised
    inverse is, by the Woodbury identity, (H_Q + alpha I)^-1 = I/alpha - (1/alpha^2) C (M + C^T C/alpha)^-1 C^T. It is computed
    from T = C M^(-1/2), as I/alpha - (1/alpha) T (alpha I + T^T T)^-1 T^T.

    Among values (sketch "values"): the exact solution within the span of the gradients of k of the rollout's states and of at
    most as many of the observations that it bootstraps from besides (Rudi, Camoriano & Rosasco, NeurIPS 2015,
    arXiv 1507.04717). What lies outside is left out, where the first way multiplies it by 1/alpha: what the sketch does not
    catch never makes the correction larger.

    :param rank: Number k, at least 1, clamped to what there is
    :param sketch: "values": one state from each of k equal stretches of the rollout; "columns" (the paper's): k of the unit
        vectors, so that C are columns of H; "gaussian": k random orthonormal vectors, which catch more of the spectrum
        (Frangella, Tropp & Udell, 2023)
    """

    rank: int
    sketch: str

    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        if self.sketch != "values":
            inverse, ok = self.inverse(system, generator)
            v = inverse(system.g)
            return Solution(v, ok & v.isfinite().all())
        jacobian, g = system.jacobian, system.g
        S = jacobian.at(self._sample(jacobian, generator))
        if system.semidefinite:
            B = th.cat([rows.gram(S) for rows in jacobian.chunks()]).double()
            H_S = system.scale * B.T @ B
        else:
            span = _matrix(S, g)
            H_S = (span @ _H_times(system, span.T)).double()
        A = H_S + system.alpha * _regular(S.gram(S).double(), g.dtype)
        y, ok = solve_dense(A, S.J_v(g))
        v = S.Jt_w(y.to(g.dtype))
        return Solution(v, ok & v.isfinite().all())

    def _sample(self, jacobian: Jacobian, generator: th.Generator) -> th.Tensor:
        """Indices of k of the loss's states, and of as many of the other observations."""
        others = jacobian.n_observations - jacobian.n_states
        return th.cat([self._spread(jacobian.n_states, generator), jacobian.n_states + self._spread(others, generator)])

    def _spread(self, n: int, generator: th.Generator) -> th.Tensor:
        k = min(self.rank, n)
        within = th.rand(k, generator=generator, dtype=th.float64, device="cpu")
        return ((th.arange(k, device="cpu") + within) * (n / max(k, 1))).long().clamp(max=n - 1)

    def inverse(self, system: GaussNewton, generator: th.Generator) -> tuple[Callable[[th.Tensor], th.Tensor], th.Tensor]:
        """The map v -> (H_Q + alpha I)^-1 v, and whether its factorisation succeeded."""
        C, M = self._sketch(system, generator)
        split = _semidefinite_inverse if system.semidefinite else _indefinite_inverse
        T, W_inverse, ok = split(C, M.double(), system.alpha)

        return lambda v: (v - T @ (W_inverse @ (T.T @ v))) / system.alpha, ok

    def _sketch(self, system: GaussNewton, generator: th.Generator) -> tuple[th.Tensor, th.Tensor]:
        """C = H Omega (n_params, k) and M = Omega^T C (k, k)."""
        g = system.g
        k = min(self.rank, len(g))
        if self.sketch == "columns":
            index = th.randperm(len(g), generator=generator, device="cpu")[:k].to(g.device)
            omega = th.zeros(len(g), k, dtype=g.dtype, device=g.device)
            omega[index, th.arange(k, device=g.device)] = 1
        elif self.sketch == "gaussian":
            normal = th.randn(len(g), k, generator=generator, dtype=g.dtype, device="cpu")
            omega = th.linalg.qr(normal.to(g.device)).Q
        else:
            omega = th.linalg.qr(_matrix(system.jacobian.at(self._sample(system.jacobian, generator)), g).T).Q
        C = _H_times(system, omega)
        return C, omega.T @ C


def _matrix(rows: Rows, like: th.Tensor) -> th.Tensor:
    """Form some rows of J (k, n_params)."""
    return th.stack([rows.Jt_w(unit) for unit in th.eye(len(rows), dtype=like.dtype, device=like.device)])


def _H_times(system: GaussNewton, vectors: th.Tensor) -> th.Tensor:
    return th.stack([system.H_v(v) for v in vectors.T], dim=1)


def _regular(M: th.Tensor, dtype: th.dtype) -> th.Tensor:
    """
    Shift a positive semi-definite matrix, in place, by the rounding errors of the numbers that it was made from: it is
    singular where a sampled parameter has no gradient (dead ReLU) or two sampled states are the same.
    """
    diagonal = M.diagonal()
    diagonal += diagonal.max() * (len(M) * th.finfo(dtype).eps) + th.finfo(dtype).tiny
    return M


def _semidefinite_inverse(C: th.Tensor, M: th.Tensor, alpha: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """H_Q = T T^T: return T, (alpha I + T^T T)^-1 and whether all went well."""
    L, failed = th.linalg.cholesky_ex(_regular(M, C.dtype))
    T = th.linalg.solve_triangular(L.to(C.dtype), C.T, upper=False).T
    # As well-conditioned as H_Q + alpha I, which M + C^T C/alpha is not
    identity = th.eye(len(M), dtype=M.dtype, device=M.device)
    W = (T.T @ T).double() + alpha * identity
    L, failed_too = th.linalg.cholesky_ex(W)
    # cholesky_inverse() would raise where the factorisation failed
    ok = (failed == 0) & (failed_too == 0) & (M.sum() + W.sum()).isfinite()
    return T, th.cholesky_solve(identity, L).to(C.dtype), ok


def _indefinite_inverse(C: th.Tensor, M: th.Tensor, alpha: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """H_Q = T S T^T with S = ±1: return T, (alpha S + T^T T)^-1, a pseudo-inverse, and whether all went well."""
    try:
        of_M, V = th.linalg.eigh(M)
        kept = _above_rounding(of_M, C.dtype)
        T = C @ (V * th.where(kept, of_M.abs().rsqrt(), 0)).to(C.dtype)
        S = th.where(kept, of_M.sign(), 1)
        of_W, V = th.linalg.eigh((T.T @ T).double() + alpha * S.diag())
    except th.linalg.LinAlgError:
        return C, M.to(C.dtype), alpha.new_zeros((), dtype=th.bool)
    kept = _above_rounding(of_W, th.float64)
    # NaN and infinity are never above rounding, but no zeros either
    return T, ((V * th.where(kept, 1 / of_W, 0)) @ V.T).to(C.dtype), (of_M.sum() + of_W.sum()).isfinite()


def _above_rounding(eigenvalues: th.Tensor, dtype: th.dtype) -> th.Tensor:
    magnitude = eigenvalues.abs()
    return magnitude > len(magnitude) * th.finfo(dtype).eps * magnitude.max()

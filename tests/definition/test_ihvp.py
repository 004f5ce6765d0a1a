"""Every solver on every kind of matrix, against the dense solve in float64; on critics: test_definition.py, check 6."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_blpo.curvature import GaussNewton, Hessian
from sb3_blpo.ihvp import ConjugateGradient, Exact, Nystrom, Solver
from sb3_blpo.jacobian import FormedRows, Jacobian

N_STATES, N = 12, 15


class MatrixJacobian(Jacobian):
    """
    A matrix, the first 12 of whose 15 rows belong to states in the loss.

    :param J: The matrix
    :param second: What the values' second derivatives add to the Gauss-Newton matrix, 0: the critic is linear
    """

    def __init__(self, J: th.Tensor, second: Any = 0.0) -> None:
        super().__init__(nn.Identity(), lambda index: index, len(J), min(N_STATES, len(J)), [nn.Parameter(J[0])], 5)
        self.J, self.second = J, second

    def at(self, index: th.Tensor) -> FormedRows:
        return FormedRows(self.J[index])

    def chunks(self) -> list[FormedRows]:
        return [self.at(index) for index in self.curvature_states.split(self.batch_size)]

    def to_values(self, v: th.Tensor) -> th.Tensor:
        return self.J[: self.n_states] @ v

    def hessian_v(self, w: th.Tensor, v: th.Tensor) -> th.Tensor:
        return self.second @ v if isinstance(self.second, th.Tensor) else self.second * v


def of_spectrum(singular_values: th.Tensor) -> th.Tensor:
    U = th.linalg.qr(th.randn(N, N, dtype=th.float64)).Q
    V = th.linalg.qr(th.randn(20, 20, dtype=th.float64)).Q
    k = len(singular_values)
    return U[:, :k] * singular_values @ V[:, :k].T


def matrix(kind: str) -> th.Tensor:
    th.manual_seed(3)
    if kind == "ill-conditioned":
        return of_spectrum(10.0 ** -th.arange(N, dtype=th.float64))
    if kind == "low rank":
        return of_spectrum(th.tensor([3.0, 2.0, 1.0], dtype=th.float64))
    J = th.randn(N, 8 if kind == "more rows than columns" else 20, dtype=th.float64)
    if kind == "dead units":
        J[:, ::3] = 0
    return J


KINDS = ["random", "more rows than columns", "ill-conditioned", "low rank", "dead units"]
SOLVERS: dict[str, Solver] = {
    "exact": Exact(),
    "cg": ConjugateGradient(300, 1e-13),
    **{f"nystrom {sketch}": Nystrom(10**6, sketch) for sketch in ("values", "gaussian", "columns")},
    **{
        f"nystrom_cg {sketch}": ConjugateGradient(300, 1e-13, Nystrom(5, sketch))
        for sketch in ("values", "gaussian", "columns")
    },
}


class System(GaussNewton):
    """Keeps what its matrix was multiplied with."""

    def __init__(self, J: th.Tensor, damping: float = 0.01, scale: float = 1.0) -> None:
        super().__init__(MatrixJacobian(J), scale * J.T @ th.linspace(1, 2, len(J), dtype=J.dtype), damping)
        self.seen: list[th.Tensor] = []

    def H_v(self, v: th.Tensor) -> th.Tensor:
        self.seen.append(v)
        return super().H_v(v)


def dense(system: GaussNewton) -> th.Tensor:
    """H."""
    J = system.jacobian.at(system.jacobian.curvature_states).gram(FormedRows(th.eye(len(system.g), dtype=system.g.dtype)))
    H = 2 / len(J) * J.T @ J
    return H if system.semidefinite else H + system.jacobian.hessian_v(J[0], th.eye(len(H), dtype=H.dtype))


def solved(H: th.Tensor, system: GaussNewton) -> th.Tensor:
    """(H + alpha I)^-1 g."""
    return th.linalg.solve(H + system.alpha * th.eye(len(H), dtype=H.dtype), system.g)


def assert_close(actual: th.Tensor, expected: th.Tensor, tolerance: float) -> None:
    th.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree_with_the_dense_solve(name: str, kind: str) -> None:
    """Whatever the damping and the right side."""
    for damping in (1.0, 1e-2, 1e-4):
        for scale in (1.0, 1e-12, 0.0):
            system = System(matrix(kind), damping, scale)
            expected = solved(dense(system), system)
            v, ok = SOLVERS[name].solve(system, generator())
            assert ok
            assert_close(system.jacobian.to_values(v), system.jacobian.to_values(expected), 1e-8)
            # Where gradients' inner products are rounding, a combination of them loses what the values do not show
            if (name, kind) != ("nystrom values", "ill-conditioned"):
                assert_close(v, expected, 1e-8)
                assert system.residual(v) < 1e-7


@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision(name: str) -> None:
    """What trains: the small matrices are solved in float64, and the solution comes back in float32."""
    system, exact = System(matrix("random").float()), System(matrix("random"))
    solver = ConjugateGradient(50, 1e-6) if name == "cg" else SOLVERS[name]
    v, ok = solver.solve(system, generator())
    assert ok and v.dtype == th.float32
    assert_close(v.double(), solved(dense(exact), exact), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_nystrom_among_parameters_is_its_formula(sketch: str, rank: int, kind: str) -> None:
    """(H_Q + alpha I)^-1 g with H_Q = C M^+ C^T formed and inverted densely."""
    system = System(matrix(kind))
    v, ok = Nystrom(rank, sketch).solve(system, generator())
    omega = th.stack(system.seen, dim=1)
    th.testing.assert_close(omega.T @ omega, th.eye(rank, dtype=th.float64))
    assert ok and (sketch != "columns" or set(omega.flatten().tolist()) == {0, 1})
    C = dense(system) @ omega
    H_Q = C @ th.linalg.pinv(omega.T @ C, hermitian=True, rtol=1e-12) @ C.T
    assert_close(v, solved(H_Q, system), 1e-8)


@pytest.mark.parametrize("rank", [1, 4])
def test_nystrom_among_values_is_exact_within_the_span_of_sampled_gradients(rank: int) -> None:
    """Of one state from each of `rank` stretches, and of as many further observations; Galerkin's condition."""
    system = System(matrix("random"))
    v, ok = Nystrom(rank, "values").solve(system, generator())
    J = matrix("random")
    coefficients = th.linalg.lstsq(J.T, v[:, None]).solution[:, 0]
    sampled = (coefficients.abs() > 1e-9 * coefficients.abs().max()).nonzero().flatten()
    assert ok and [int(i) // (N_STATES // rank) for i in sampled[sampled < N_STATES]] == [*range(rank)]
    assert len(sampled) == rank + min(rank, N - N_STATES)
    assert_close(J.T @ coefficients, v, 1e-9)
    residual = system.g - dense(system) @ v - system.alpha * v
    assert (J[sampled] @ residual).abs().max() < 1e-9 * (J[sampled] @ system.g).abs().max()


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
def test_sketches_are_drawn_from_the_generator(sketch: str) -> None:
    systems, source = [System(matrix("random")) for _ in range(3)], generator(1)
    before = th.get_rng_state()
    sources = (source, generator(1), source)
    first, again, another = (Nystrom(3, sketch).solve(system, one).v for system, one in zip(systems, sources, strict=True))
    assert th.equal(first, again) and not th.equal(first, another)
    assert th.equal(th.get_rng_state(), before)


def test_preconditioning_saves_iterations() -> None:
    plain, preconditioned = (System(matrix("ill-conditioned"), 1e-6) for _ in range(2))
    assert ConjugateGradient(200, 1e-10).solve(plain, generator()).ok
    assert ConjugateGradient(200, 1e-10, Nystrom(8, "gaussian")).solve(preconditioned, generator()).ok
    assert len(preconditioned.seen) - 8 < len(plain.seen)


def test_cg_stops_at_its_tolerance_relative_to_the_right_side() -> None:
    lengths = set()
    for scale in (1.0, 1e-9):
        system = System(matrix("random"), scale=scale)
        v, ok = ConjugateGradient(100, 1e-3).solve(system, generator())
        lengths.add(len(system.seen))
        assert ok and 1e-6 < system.residual(v) <= 1e-3
    assert len(lengths) == 1


@pytest.mark.parametrize("max_iter", [1, 3])
def test_cg_stopped_early_is_the_best_of_its_krylov_space(max_iter: int) -> None:
    system = System(matrix("random"))
    A = dense(system) + system.alpha * th.eye(20, dtype=th.float64)
    Q = th.linalg.qr(th.stack([th.linalg.matrix_power(A, k) @ system.g for k in range(max_iter)], dim=1)).Q
    v, ok = ConjugateGradient(max_iter, 0.0).solve(system, generator())
    assert ok and len(system.seen) == max_iter
    assert_close(v, Q @ th.linalg.solve(Q.T @ A @ Q, Q.T @ system.g), 1e-9)


def hessian_of(H: list[list[float]] | th.Tensor, g: list[float], alpha: float) -> Hessian:
    """A system with this matrix, and few rows of J."""
    H, right_side = th.as_tensor(H, dtype=th.float64), th.tensor(g, dtype=th.float64)
    J = th.eye(len(H), dtype=th.float64)[:2]
    system = Hessian(MatrixJacobian(J, H - J.T @ J), right_side, 1.0, th.zeros(2, dtype=th.float64))
    system.alpha = th.tensor(alpha, dtype=th.float64)
    return system


def test_indefinite_hessian() -> None:
    th.manual_seed(0)
    J, S = th.randn(N, 8, dtype=th.float64), th.randn(8, 8, dtype=th.float64)
    system = Hessian(MatrixJacobian(J, 2 * (S + S.T)), J.T @ th.ones(N, dtype=th.float64), 0.01, th.ones(N, dtype=th.float64))
    H = dense(system)
    assert th.linalg.eigvalsh(H)[0] < -1
    expected = solved(H, system)
    for solver in (Exact(), Nystrom(8, "gaussian"), Nystrom(8, "columns"), Nystrom(N, "values")):
        v, ok = solver.solve(system, generator())
        assert ok and system.residual(v) < 1e-7
        assert_close(v, expected, 1e-7)
    # No direction of positive curvature may be lacking: the solve has failed, and says so
    assert not ConjugateGradient(100, 1e-12).solve(system, generator()).ok


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_cg_fails_where_it_meets_negative_curvature(scale: float) -> None:
    """The first step from (2, 1) goes well, the second direction curves downwards."""
    system = hessian_of([[3.0, 0.0], [0.0, 0.0]], [2 * scale, scale], -1.0)
    assert not ConjugateGradient(10, 1e-6).solve(system, generator()).ok


@pytest.mark.parametrize(
    "H",
    [
        [[0.0, 1.0], [1.0, 0.0]],  # H e_1 = e_2 although e_1^T H e_1 = 0: M^+ is 0 and so is H_Q
        [[-0.25, 0.0], [0.0, -0.25]],  # H_Q = -alpha e_i e_i^T: nothing is subtracted where Woodbury's inner matrix is 0
    ],
)
def test_what_cannot_be_inverted_of_an_indefinite_sketch_is_left_out(H: list[list[float]]) -> None:
    v, ok = Nystrom(1, "columns").solve(hessian_of(H, [3.0, 5.0], 0.25), generator())
    assert ok and v.tolist() == [12.0, 20.0]


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_failure_is_a_value(name: str, bad: float, curvature: str) -> None:
    """Whether a state's row is not finite, or that of an observation that is bootstrapped from, and the right side with it."""
    for row in (3, N - 1):
        J = matrix("random")
        J[row, 4] = bad
        g = J.T @ th.ones(N, dtype=th.float64)
        system = GaussNewton(MatrixJacobian(J), g, 0.1)
        if curvature == "hessian":
            system = Hessian(MatrixJacobian(J), g, 0.1, th.ones(N, dtype=th.float64))
        solution = SOLVERS[name].solve(system, generator())
        assert not solution.ok and solution.v.shape == g.shape


@pytest.mark.parametrize("name", SOLVERS)
def test_no_curvature_at_all_is_a_failure(name: str) -> None:
    """Only the bootstrap observations have a gradient: alpha is 0, and there is nothing to invert."""
    J = th.zeros(N, 20, dtype=th.float64)
    J[N_STATES:] = 1.0
    assert not SOLVERS[name].solve(System(J), generator()).ok


def test_relative_residual() -> None:
    system = System(matrix("random"), scale=1e-6)
    v = th.linspace(-1, 1, 20, dtype=th.float64)
    expected = (system.g - dense(system) @ v - system.alpha * v).norm() / system.g.norm()
    th.testing.assert_close(system.residual(v), expected, rtol=1e-10, atol=0)
    assert System(matrix("random"), scale=0.0).residual(0 * v) == 0

"""Every solver on every kind of matrix, against the dense solve in float64."""

import itertools

import pytest
import torch as th
from brute_force import as_flat_function
from torch import nn

from sb3_blpo.curvature import Curvature, GaussNewton, GramGaussNewton, Hessian
from sb3_blpo.ihvp import ConjugateGradient, Exact, Nystrom, Solver, make_solver
from sb3_blpo.ihvp.base import relative_residual
from sb3_blpo.ihvp.nystrom import _above_rounding
from sb3_blpo.jacobian import FunctionalJacobian, Jacobian
from sb3_blpo.layers import LayerJacobian

N_STEPS = 12


class DenseJacobian(Jacobian):
    """A Jacobian that is a matrix."""

    cheap_gram = True

    def __init__(self, J: th.Tensor) -> None:
        super().__init__(J.new_zeros(len(J)), J.shape[1])
        self.J = J

    def J_v(self, v):
        return self.J @ v

    def Jt_w(self, w):
        return self.J.T @ w

    def columns(self, index):
        return self.J[:, index]

    def gram(self, rows=None):
        return (self.J if rows is None else self.J[rows]) @ self.J.T

    def squared_norm(self, n):
        return self.J[:n].square().sum()

    def hessian_v(self, w, v):
        return th.zeros_like(v)  # a linear critic


def spectrum_jacobian(n_rows: int, n_params: int, singular_values: th.Tensor) -> th.Tensor:
    U = th.linalg.qr(th.randn(n_rows, n_rows, dtype=th.float64)).Q
    V = th.linalg.qr(th.randn(n_params, n_params, dtype=th.float64)).Q
    k = len(singular_values)
    return U[:, :k] * singular_values @ V[:, :k].T


def jacobian_matrix(kind: str) -> th.Tensor:
    """15 rows, 3 of them bootstrap observations, and 20 parameters (8 in "tall")."""
    th.manual_seed(3)
    if kind == "random":
        return th.randn(15, 20, dtype=th.float64)
    if kind == "tall":
        return th.randn(15, 8, dtype=th.float64)
    if kind == "ill-conditioned":
        return spectrum_jacobian(15, 20, 10.0 ** -th.arange(15, dtype=th.float64))
    if kind == "low rank":
        return spectrum_jacobian(15, 20, th.tensor([3.0, 2.0, 1.0], dtype=th.float64))
    J = th.randn(15, 20, dtype=th.float64)
    J[:, ::3] = 0  # dead units
    return J


KINDS = ["random", "tall", "ill-conditioned", "low rank", "zero columns"]
REPRESENTATIONS = {"gram": GramGaussNewton, "parameters": GaussNewton}
SOLVERS: dict[str, Solver] = {
    "exact": Exact(),
    "cg": ConjugateGradient(200, 1e-13),
    "nystrom gaussian": Nystrom(10**6, "gaussian"),
    "nystrom columns": Nystrom(10**6, "columns"),
    "nystrom values": Nystrom(10**6, "values"),
    "nystrom_cg": ConjugateGradient(200, 1e-13, Nystrom(5, "gaussian")),
    "nystrom_cg values": ConjugateGradient(200, 1e-13, Nystrom(5, "values")),
    "nystrom_cg columns": ConjugateGradient(200, 1e-13, Nystrom(5, "columns")),
}


def system(kind: str, representation: str, c_scale: float = 1.0) -> tuple[Curvature, th.Tensor, th.Tensor, th.Tensor]:
    """The curvature object, and dense H, g and J."""
    J = jacobian_matrix(kind)
    c = c_scale * th.randn(len(J), dtype=th.float64)
    H = 2 / N_STEPS * J[:N_STEPS].T @ J[:N_STEPS]
    return REPRESENTATIONS[representation](DenseJacobian(J), c, N_STEPS), H, J.T @ c, J


@pytest.mark.parametrize("c_scale", [1.0, 1e-12, 0.0], ids=["right side 1", "tiny right side", "zero right side"])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree_with_the_dense_solve(name, kind, representation, damping, c_scale):
    curvature, H, g, J = system(kind, representation, c_scale)
    alpha = damping * H.trace()
    expected = th.linalg.solve(H + alpha * th.eye(len(H), dtype=th.float64), g)
    solver = SOLVERS[name]
    solver.draw(J[0], th.Generator().manual_seed(0))
    solution = solver.solve(curvature, alpha)
    assert solution.ok
    tolerance = {"rtol": 1e-8, "atol": 1e-8 * max(expected.abs().max().item(), 1e-300)}
    u = J[:N_STEPS] @ expected
    close_u = {"rtol": 1e-8, "atol": 1e-8 * max(u.abs().max().item(), 1e-300)}
    if solution.values is not None:
        th.testing.assert_close(solution.values, u, **close_u)
    if name == "nystrom values" and kind == "ill-conditioned" and representation == "gram":
        return  # coefficients cannot tell gradients apart whose inner products are rounding: v is lost, u is not
    th.testing.assert_close(curvature.to_parameters(solution.x), expected, **tolerance)
    th.testing.assert_close(curvature.to_values(solution.x), u, **close_u)
    assert relative_residual(curvature, alpha, solution.x) < 1e-7


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4])
def test_nystrom_is_its_formula(sketch, kind, rank):
    """(H_Q + alpha I)^-1 g with H_Q = C M^+ C^T formed and inverted densely; both representations."""
    for representation in REPRESENTATIONS:
        curvature, H, g, J = system(kind, representation)
        alpha = 0.01 * H.trace()
        solver = Nystrom(rank, sketch)
        solver.draw(J[0], th.Generator().manual_seed(1))
        if sketch == "values":
            omega = J[solver._rows(curvature)].T
        else:
            omega = solver.omega if sketch == "gaussian" else th.eye(len(H), dtype=th.float64)[:, solver.omega]
        C = H @ omega
        H_Q = C @ th.linalg.pinv(omega.T @ C, hermitian=True, rtol=1e-12) @ C.T
        expected = th.linalg.solve(H_Q + alpha * th.eye(len(H), dtype=th.float64), g)
        actual = curvature.to_parameters(solver.inverse(curvature, alpha).apply(curvature.g))
        # Gradients that differ by orders of magnitude are no orthonormal sketch: M loses digits
        tolerance = 1e-3 if sketch == "values" and kind == "ill-conditioned" else 1e-8
        th.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4])
def test_nystrom_of_values_is_its_formula(kind, rank):
    """The dense solve within the span of the sampled gradients, which is the exact formula with K_Q in place of K."""
    for representation in REPRESENTATIONS:
        curvature, H, g, J = system(kind, representation)
        alpha = 0.01 * H.trace()
        solver = Nystrom(rank, "values")
        solver.draw(J[0], th.Generator().manual_seed(1))
        S = solver._rows(curvature)
        assert len(S[S < N_STEPS]) == rank and len(S[S >= N_STEPS]) == min(rank, 3)
        # A basis of the span, cut off where the gradients' own rounding begins
        U, sizes, _ = th.linalg.svd(J[S].T, full_matrices=False)
        basis = U[:, sizes > 1e-6 * sizes[0]]
        v = basis @ th.linalg.solve(basis.T @ H @ basis + alpha * th.eye(basis.shape[1], dtype=th.float64), basis.T @ g)
        solution = solver.solve(curvature, alpha)
        u = J[:N_STEPS] @ v
        th.testing.assert_close(solution.values, u, rtol=1e-6, atol=1e-6 * u.abs().max().item())
        K, c = J @ J.T, th.linalg.lstsq(J.T, g[:, None]).solution[:, 0]
        K_Q = K[:, S] @ th.linalg.pinv(K[S][:, S], hermitian=True, rtol=1e-12) @ K[S]
        A = 2 / N_STEPS * K_Q[:N_STEPS, :N_STEPS] + alpha * th.eye(N_STEPS, dtype=th.float64)
        th.testing.assert_close(
            solution.values, th.linalg.solve(A, K_Q[:N_STEPS] @ c), rtol=1e-5, atol=1e-5 * u.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_the_gram_matrix_need_not_be_formed(dtype):
    J = jacobian_matrix("random").to(dtype)
    c, X = th.randn(15, dtype=dtype), th.randn(15, 3, dtype=th.float64)
    whole, lean = (GramGaussNewton(DenseJacobian(J), c, N_STEPS, whole) for whole in (True, False))
    assert not hasattr(lean, "K")
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == th.float32 else 1e-12}
    for x in (X, X[:, 0]):
        th.testing.assert_close(lean.H_v(x), whole.H_v(x), **tolerance)
        th.testing.assert_close(lean.dot(x, X), whole.dot(x, X), **tolerance)
        th.testing.assert_close(lean.to_values(x), whole.to_values(x), **tolerance)


def test_sampled_values_are_spread_over_the_minibatch():
    solver = Nystrom(5, "values")
    solver.draw(th.zeros(100), th.Generator().manual_seed(0))
    rows = solver._spread(0, 100)
    assert [int(row) // 20 for row in rows] == [0, 1, 2, 3, 4]
    assert th.equal(solver._spread(100, 103), th.arange(100, 103))  # all that there are
    assert th.equal(solver._spread(0, 5), th.arange(5))


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
def test_nystrom_error_falls_with_the_rank(sketch):
    th.manual_seed(0)
    J = spectrum_jacobian(30, 30, 0.8 ** th.arange(30, dtype=th.float64))
    errors = []
    for rank in (1, 4, 12, 30):
        total = 0.0
        for seed in range(12):
            curvature = GramGaussNewton(DenseJacobian(J), th.ones(30, dtype=th.float64), 30)
            alpha = 0.01 * curvature.jacobian.squared_norm(30) * 2 / 30
            solver = Nystrom(rank, sketch)
            solver.draw(J[0], th.Generator().manual_seed(seed))
            exact = Exact().solve(curvature, alpha).x
            u = curvature.to_values(exact)
            total += float((curvature.to_values(solver.solve(curvature, alpha).x) - u).norm() / u.norm())
        errors.append(total / 12)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-8


def test_gaussian_sketch_beats_columns_at_the_same_rank():
    th.manual_seed(0)
    errors = {}
    for sketch in ("gaussian", "columns"):
        total = 0.0
        for seed in range(20):
            th.manual_seed(seed)
            jacobian = LayerJacobian(
                nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1)).double(), th.randn(40, 6, dtype=th.float64)
            )
            curvature = GramGaussNewton(jacobian, th.randn(40, dtype=th.float64), 40)
            alpha = 0.01 * jacobian.squared_norm(40) * 2 / 40
            solver = Nystrom(10, sketch)
            solver.draw(th.zeros(jacobian.n_params, dtype=th.float64), th.Generator().manual_seed(seed))
            u = curvature.to_values(Exact().solve(curvature, alpha).x)
            total += float((curvature.to_values(solver.solve(curvature, alpha).x) - u).norm() / u.norm())
        errors[sketch] = total / 20
    assert errors["gaussian"] < errors["columns"], errors


def test_sketches_are_drawn_from_the_generator():
    like = th.zeros(50)
    for sketch in ("values", "gaussian", "columns"):
        first, second, third = Nystrom(5, sketch), Nystrom(5, sketch), Nystrom(5, sketch)
        generator = th.Generator().manual_seed(0)
        first.draw(like, generator)
        ConjugateGradient(1, 0.1, second).draw(like, th.Generator().manual_seed(0))
        third.draw(like, generator)
        assert th.equal(first.omega, second.omega)
        assert not th.equal(first.omega, third.omega)
    assert len(first.omega.unique()) == 5


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
def test_sketches_are_where_the_parameters_are(sketch):
    nystrom = Nystrom(5, sketch)
    nystrom.draw(th.zeros(50, device="meta"), th.Generator().manual_seed(0))
    assert nystrom.omega.device.type == "meta"


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("representation", ["gram", "parameters", "hessian"])
@pytest.mark.parametrize("name", SOLVERS)
def test_tensors_are_made_where_the_inputs_are_and_in_their_precision(name, representation, dtype):
    J, c = jacobian_matrix("random").to(dtype), th.ones(15, dtype=dtype)
    alpha, solver = th.tensor(0.5, dtype=dtype), SOLVERS[name]
    jacobian = DenseJacobian(J)
    solver.draw(J[0], th.Generator().manual_seed(0))
    with th.device("meta"):  # a default device on which nothing can be computed
        if representation == "hessian":
            curvature: Curvature = Hessian(jacobian, c, c[:N_STEPS])
        else:
            curvature = REPRESENTATIONS[representation](jacobian, c, N_STEPS)
        solution = solver.solve(curvature, alpha)
        x, values = solution.x, solution.values
        v, u = curvature.to_parameters(x), curvature.to_values(x)
        assert relative_residual(curvature, alpha, x) < 1e-5
    H = 2 / N_STEPS * J[:N_STEPS].T @ J[:N_STEPS]
    expected = th.linalg.solve(H + alpha * th.eye(20, dtype=dtype), J.T @ c)
    tolerance = 1e-4 if dtype == th.float32 else 1e-10
    th.testing.assert_close(v, expected, rtol=tolerance, atol=tolerance)
    for actual in (u, u if values is None else values):
        th.testing.assert_close(actual, J[:N_STEPS] @ expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sketch", ["gaussian", "columns", "values"])
def test_no_matrix_of_all_parameters_squared(sketch):
    critic = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 1))  # it would take 250 GB
    jacobian = LayerJacobian(critic, th.randn(4, 500))
    curvature = GaussNewton(jacobian, th.ones(4), 4)
    for solver in (Nystrom(2, sketch), ConjugateGradient(2, 1e-5, Nystrom(2, sketch))):
        solver.draw(th.zeros(jacobian.n_params), th.Generator().manual_seed(0))
        assert solver.solve(curvature, jacobian.squared_norm(4)).ok


def test_preconditioning_saves_iterations():
    curvature, H, _, J = system("ill-conditioned", "gram")
    alpha = 1e-6 * H.trace()
    preconditioned = ConjugateGradient(200, 1e-10, Nystrom(12, "gaussian"))
    preconditioned.draw(J[0], th.Generator().manual_seed(0))
    assert preconditioned.solve(curvature, alpha).iterations < ConjugateGradient(200, 1e-10).solve(curvature, alpha).iterations


def test_cg_tolerance_is_relative_and_max_iter_holds():
    for scale in (1.0, 1e-9):
        curvature, H, _, _ = system("random", "parameters", scale)
        alpha = 0.01 * H.trace()
        assert relative_residual(curvature, alpha, ConjugateGradient(100, 1e-3).solve(curvature, alpha).x) <= 1e-3


@pytest.mark.parametrize("max_iter", [1, 3])
def test_cg_stopped_early_is_the_best_of_its_krylov_space(max_iter):
    curvature, H, g, _ = system("random", "parameters")
    alpha = 0.01 * H.trace()
    A = H + alpha * th.eye(len(H), dtype=th.float64)
    Q = th.linalg.qr(th.stack([th.linalg.matrix_power(A, k) @ g for k in range(max_iter)], dim=1)).Q
    solution = ConjugateGradient(max_iter, 0.0).solve(curvature, alpha)
    assert solution.iterations == max_iter and solution.ok
    th.testing.assert_close(solution.x, Q @ th.linalg.solve(Q.T @ A @ Q, Q.T @ g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_cg_fails_where_it_meets_negative_curvature(scale):
    """A = diag(2, -1): the first step from (2, 1) goes well, the second direction curves downwards."""
    J = th.diag(th.tensor([3.0, 0.0], dtype=th.float64).sqrt())
    curvature = GaussNewton(DenseJacobian(J), th.zeros(2, dtype=th.float64), 2)
    curvature.g = scale * th.tensor([2.0, 1.0], dtype=th.float64)
    solution = ConjugateGradient(10, 1e-6).solve(curvature, th.tensor(-1.0, dtype=th.float64))
    assert solution.iterations == 1 and not solution.ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("call", range(1, 8))
def test_cg_fails_where_an_inner_product_is_not_finite(call, bad, monkeypatch):
    """Whichever: three of each iteration, after the norm of g."""
    curvature, *_ = system("random", "parameters")
    dot, products = curvature.dot, itertools.count(1)
    monkeypatch.setattr(curvature, "dot", lambda x, y: dot(x, y) * (bad if next(products) == call else 1))
    solution = ConjugateGradient(50, 1e-6).solve(curvature, th.tensor(1.0, dtype=th.float64))
    assert not solution.ok and solution.iterations == max(call - 2, 0) // 3 and next(products) <= call + 3


def indefinite() -> tuple[Hessian, th.Tensor, th.Tensor, th.Tensor]:
    th.manual_seed(0)
    body, observations = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double(), th.randn(12, 3, dtype=th.float64)
    jacobian = FunctionalJacobian(
        lambda p: th.func.functional_call(body, p, (observations,)).flatten(), dict(body.named_parameters()), th.Generator()
    )
    c, residuals = th.randn(12, dtype=th.float64), 3 * th.randn(10, dtype=th.float64)
    curvature = Hessian(jacobian, c, residuals)
    critic, omega = as_flat_function(body, observations)
    returns = jacobian.values[:10] - residuals
    H = th.autograd.functional.hessian(lambda x: (critic(x).flatten()[:10] - returns).square().mean(), omega)
    th.testing.assert_close(curvature.H_v(th.eye(len(H), dtype=th.float64)), H, rtol=1e-10, atol=1e-10)
    assert th.linalg.eigvalsh(H)[0] < -0.1
    return curvature, H, jacobian.Jt_w(c), th.tensor(0.05, dtype=th.float64)


def test_indefinite_hessian():
    curvature, H, g, alpha = indefinite()
    expected = th.linalg.solve(H + alpha * th.eye(len(H), dtype=th.float64), g)
    th.testing.assert_close(Exact().solve(curvature, alpha).x, expected, rtol=1e-9, atol=1e-9)
    for sketch in ("gaussian", "columns"):
        nystrom = Nystrom(len(H), sketch)
        nystrom.draw(g, th.Generator().manual_seed(0))
        th.testing.assert_close(nystrom.solve(curvature, alpha).x, expected, rtol=1e-6, atol=1e-6)
    # Within the span of all values' gradients
    nystrom = Nystrom(len(H), "values")
    nystrom.draw(g, th.Generator().manual_seed(0))
    basis = th.linalg.qr(curvature.jacobian.Jt_w(th.eye(12, dtype=th.float64))).Q
    within = basis @ th.linalg.solve(basis.T @ H @ basis + alpha * th.eye(12, dtype=th.float64), basis.T @ g)
    solution = nystrom.solve(curvature, alpha)
    th.testing.assert_close(solution.x, within, rtol=1e-9, atol=1e-9)
    th.testing.assert_close(solution.values, curvature.to_values(within), rtol=1e-9, atol=1e-9)
    # No direction of positive curvature may be lacking: the solve has failed, and says so
    assert not ConjugateGradient(100, 1e-12).solve(curvature, alpha).ok


def test_a_sampled_parameter_without_gradient_is_left_out():
    J = jacobian_matrix("zero columns")
    curvature = GaussNewton(DenseJacobian(J), th.ones(15, dtype=th.float64), N_STEPS)
    nystrom = Nystrom(1, "columns")
    nystrom.omega = th.tensor([3])
    solution = nystrom.solve(curvature, th.tensor(0.1, dtype=th.float64))
    assert solution.ok and th.equal(solution.x, curvature.g / 0.1)


def solve_by_sketch(C: list[list[float]], M: list[list[float]], g: list[float], alpha: float, monkeypatch) -> th.Tensor:
    """Nyström's solution for an indefinite H of which C = H Omega and M = Omega^T H Omega are given."""
    jacobian, right_side = DenseJacobian(th.eye(len(g), dtype=th.float64)), th.tensor(g, dtype=th.float64)
    curvature = Hessian(jacobian, right_side, right_side)
    sketch = th.tensor(C, dtype=th.float64), th.tensor(M, dtype=th.float64)
    monkeypatch.setattr(curvature, "sketch", lambda omega: sketch)
    nystrom = Nystrom(len(M), "columns")
    nystrom.draw(right_side, th.Generator().manual_seed(0))
    solution = nystrom.solve(curvature, th.tensor(alpha, dtype=th.float64))
    assert solution.ok
    return solution.x


def test_directions_without_curvature_are_left_out_of_an_indefinite_sketch(monkeypatch):
    """H e_1 = e_2 although e_1^T H e_1 = 0: M^+ is 0 and so is H_Q."""
    x = solve_by_sketch([[0.0], [1.0]], [[0.0]], [3.0, 5.0], 0.25, monkeypatch)
    assert x.tolist() == [12.0, 20.0]


def test_an_indefinite_sketch_that_cancels_the_damping_is_inverted_elsewhere(monkeypatch):
    """H_Q = -alpha e_1 e_1^T: nothing is subtracted in Woodbury's identity where its inner matrix is 0."""
    x = solve_by_sketch([[-0.25], [0.0]], [[-0.25]], [3.0, 5.0], 0.25, monkeypatch)
    assert x.tolist() == [12.0, 20.0]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rounding_is_relative_to_the_largest_eigenvalue(scale):
    eigenvalues = scale * th.tensor([1.0, -1e-3, 1e-9, 1e-17, 0.0], dtype=th.float64)
    assert _above_rounding(eigenvalues, th.float64).tolist() == [True, True, True, False, False]
    assert _above_rounding(eigenvalues, th.float32).tolist() == [True, True, False, False, False]
    assert not _above_rounding(0 * eigenvalues, th.float64).any()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_relative_residual(representation):
    for scale in (1.0, 1e-6):
        curvature, H, g, _ = system("random", representation, scale)
        alpha = 0.01 * H.trace()
        x = scale * th.randn(len(curvature.g), dtype=th.float64)
        v = curvature.to_parameters(x)
        expected = (g - H @ v - alpha * v).norm() / g.norm()
        th.testing.assert_close(relative_residual(curvature, alpha, x), expected, rtol=1e-10, atol=0)
    nothing, *_ = system("random", representation, 0.0)
    assert relative_residual(nothing, alpha, 0 * x) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_failure_is_a_value(name, representation, bad):
    solver = SOLVERS[name]
    J = jacobian_matrix("random")
    solver.draw(J[0], th.Generator().manual_seed(0))
    J[3, 4] = bad
    curvature = REPRESENTATIONS[representation](DenseJacobian(J), th.ones(15, dtype=th.float64), N_STEPS)
    solution = solver.solve(curvature, th.tensor(0.1, dtype=th.float64))
    assert th.equal(solution.ok, th.tensor(False)) and solution.x.shape == curvature.g.shape
    healthy, *_ = system("random", representation)
    assert not solver.solve(healthy, th.tensor(bad, dtype=th.float64)).ok or bad == float("inf")


def test_an_infinite_pivot_fails(monkeypatch):
    """Elimination turns it into a finite solution."""
    curvature, *_ = system("random", "gram")
    A = curvature.dense()
    A[3, 3] = -float("inf")
    monkeypatch.setattr(curvature, "dense", lambda: A)
    assert not Exact().solve(curvature, th.tensor(0.1, dtype=th.float64)).ok


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sketch_that_is_not_finite_fails(bad, rank, curvature, dtype, monkeypatch):
    """It is not above the cut-off for rounding errors, but neither is it a zero."""
    J = jacobian_matrix("random").to(dtype)
    c = th.ones(15, dtype=dtype)
    jacobian = DenseJacobian(J)
    H = Hessian(jacobian, c, c[:N_STEPS]) if curvature == "hessian" else GaussNewton(jacobian, c, N_STEPS)
    nystrom = Nystrom(rank, "columns")
    nystrom.draw(J[0], th.Generator().manual_seed(0))
    C, M = H.sketch(nystrom.omega)
    M[-1, -1] = bad
    monkeypatch.setattr(H, "sketch", lambda omega: (C, M))
    assert not nystrom.solve(H, th.tensor(0.1, dtype=dtype)).ok


@pytest.mark.parametrize("name", SOLVERS)
def test_no_curvature_at_all_fails(name):
    """A critic without any gradient has alpha = 0: there is nothing to invert."""
    solver = SOLVERS[name]
    J = th.zeros(15, 20, dtype=th.float64)
    J[12:] = 1.0  # only the bootstrap observations have a gradient
    solver.draw(J[0], th.Generator().manual_seed(0))
    curvature = GaussNewton(DenseJacobian(J), th.ones(15, dtype=th.float64), N_STEPS)
    assert not solver.solve(curvature, th.zeros((), dtype=th.float64)).ok


def test_make_solver():
    settings = {"rank": 3, "sketch": "columns", "max_iter": 7, "tol": 0.5}
    assert make_solver("none", **settings) is None
    assert isinstance(make_solver("exact", **settings), Exact)
    nystrom = make_solver("nystrom", **settings)
    assert isinstance(nystrom, Nystrom) and (nystrom.rank, nystrom.sketch) == (3, "columns")
    cg = make_solver("cg", **settings)
    assert isinstance(cg, ConjugateGradient) and (cg.max_iter, cg.tol, cg.preconditioner) == (7, 0.5, None)
    nystrom_cg = make_solver("nystrom_cg", **settings)
    assert isinstance(nystrom_cg, ConjugateGradient) and isinstance(nystrom_cg.preconditioner, Nystrom)
    assert (nystrom_cg.max_iter, nystrom_cg.tol) == (7, 0.5)
    assert (nystrom_cg.preconditioner.rank, nystrom_cg.preconditioner.sketch) == (3, "columns")
    # Only these work among values sampled from the minibatch, without the whole Gram matrix
    assert [Nystrom(3, sketch).needs_gram for sketch in ("values", "columns", "gaussian")] == [False, True, True]

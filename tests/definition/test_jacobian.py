"""The critic's Jacobian, by layers and row by row, against dense automatic differentiation in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from brute_force import as_flat_function
from problems import jacobian_of
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sb3_blpo.curvature import GaussNewton
from sb3_blpo.jacobian import MAX_SAMPLED_ROWS, Jacobian, LayerJacobian, SampledJacobian

N, N_STATES = 13, 10


class Each(nn.Module):
    """Any function of a module and its input."""

    def __init__(self, function: Callable[..., th.Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Any) -> th.Tensor:
        return self.function(x, *self.parts)


class Double(th.autograd.Function):
    """In the old style, which torch.func does not take."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return 2 * gradient


class Sine(th.autograd.Function):
    """Differentiated by NumPy, once."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.x = x.detach().numpy()
        return th.as_tensor(np.sin(ctx.x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return gradient * th.as_tensor(np.cos(ctx.x))


class Counted(nn.Module):
    """Counts its calls, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", th.zeros(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.calls += 1  # type: ignore[assignment, operator]
        return 2 * x


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Tanh(), nn.Linear(5, 1))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, (1, 2), padding=1, stride=(1, 2)), nn.Tanh(),
        nn.Conv2d(3, 2, (2, 1), dilation=(2, 1), bias=False), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1),
    )  # fmt: skip


def hooked() -> nn.Sequential:
    """A hook changes a layer's output."""
    critic = mlp()
    critic[0].register_forward_hook(lambda module, inputs, output: output.sin())
    return critic


def frozen() -> nn.Sequential:
    critic = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    critic[2].requires_grad_(False)
    return critic


def batch_norm() -> nn.Sequential:
    critic = mlp(nn.BatchNorm1d(5))
    critic(3 + th.randn(20, 6))  # running statistics that are not 0 and 1
    return critic


def of_sequence(layer: nn.Module, n_out: int) -> Each:
    """Observations are three pairs of numbers."""

    def value(x: th.Tensor, layer: nn.Module, head: nn.Module) -> th.Tensor:
        outputs = layer(x.view(-1, 3, 2))
        return head((outputs[0] if isinstance(outputs, tuple) else outputs).flatten(1))

    return Each(value, layer, nn.Linear(3 * n_out, 1))


def attention() -> Each:
    return of_sequence(nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True), 2)


Factory = Callable[[], nn.Module]
BY_LAYERS: dict[str, Factory] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 1)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)),
    "no bias": lambda: nn.Sequential(nn.Linear(6, 7, bias=False), nn.ELU(), nn.Linear(7, 1)),
    "convolutions": convolutions,
    "in place": lambda: mlp(nn.ELU(inplace=True)),
    "residual": lambda: Each(lambda x, a, b: b(x + a(x).tanh()), nn.Linear(6, 6), nn.Linear(6, 1)),
    "a frozen layer": frozen,
    "a hook": hooked,
    "an old-style function": lambda: mlp(Each(Double.apply)),
}
FROM_ROWS: dict[str, Factory] = {
    "LayerNorm": lambda: mlp(nn.LayerNorm(5)),
    "BatchNorm": batch_norm,
    "PReLU": lambda: mlp(nn.PReLU(init=0.3)),
    "attention": attention,
    "LSTM": lambda: of_sequence(nn.LSTM(2, 4, batch_first=True), 4),
    "GRU": lambda: of_sequence(nn.GRU(2, 4, batch_first=True), 4),
    "Embedding": lambda: Each(lambda x, table, head: head(table((x > 0).long()).sum(1)), nn.Embedding(2, 4), nn.Linear(4, 1)),
    "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)),
    "groups": lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 1)),
    "an old-style function": lambda: mlp(nn.LayerNorm(5), Each(Double.apply)),
    "differentiable once": lambda: mlp(nn.LayerNorm(5), Each(Sine.apply)),
    "counts in place": lambda: mlp(nn.LayerNorm(5), Counted()),
    "checkpoint": lambda: mlp(nn.LayerNorm(5), Each(lambda x: checkpoint(th.tanh, x, use_reentrant=False))),
    "weight_norm": lambda: mlp(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))),
    "a layer used twice": lambda: Each(lambda x, a, b: b(a(a(x).tanh()).tanh()), nn.Linear(6, 6), nn.Linear(6, 1)),
    "weights used without their layer": lambda: Each(lambda x, a: a(x) + a.weight.square().sum(), nn.Linear(6, 1)),
}
CRITICS: dict[str, tuple[type[Jacobian], Factory]] = {
    f"{name}, by layers": (LayerJacobian, BY_LAYERS[name]) for name in BY_LAYERS
}
CRITICS |= {f"{name}, from rows": (SampledJacobian, FROM_ROWS[name]) for name in FROM_ROWS}
#: torch 2.13 has no second derivative of them, or a wrong one
DIFFERENTIABLE_ONCE = ("attention, from rows", "differentiable once, from rows", "weight_norm, from rows")


def check_against_dense(critic: nn.Module, observations: Any, kind: type[Jacobian], hessian: bool = True) -> None:
    """Every product of the package's Jacobian, and the Hessian's by a central difference of the gradient."""
    jacobian = jacobian_of(critic, observations, N, N_STATES)
    assert type(jacobian) is kind
    parameters = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    function, omega = as_flat_function(critic, parameters, observations)
    values = critic(observations).flatten()
    rows = [th.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    J = th.stack([th.cat([part.flatten() for part in row]) for row in rows])
    J_n, v, w = J[:N_STATES], th.randn(J.shape[1], dtype=th.float64), th.randn(N, dtype=th.float64)
    index, others = th.tensor([7, 0, 12]), th.tensor([3, 11])
    some, chunks = jacobian.at(index), list(jacobian.chunks())
    actual = [some.J_v(v), some.Jt_w(w[:3]), some.gram(jacobian.at(others)), some.squared_norms(), jacobian.gradient(w)]
    expected = [J[index] @ v, J[index].T @ w[:3], J[index] @ J[others].T, J[index].square().sum(1), J.T @ w]
    actual += [th.cat([chunk.J_v(v) for chunk in chunks]), GaussNewton(jacobian, v, 1.0).trace]
    expected += [J_n @ v, 2 / N_STATES * J_n.square().sum()]
    th.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # By a central difference if from rows, which leaves the critic as it was
    th.testing.assert_close(jacobian.to_values(v), J_n @ v, rtol=1e-7, atol=1e-7)
    assert th.equal(as_flat_function(critic, parameters)[1], omega)

    def gradient(omega: th.Tensor) -> th.Tensor:
        omega = omega.clone().requires_grad_()
        return th.autograd.grad(w[:N_STATES] @ function(omega)[:N_STATES], omega)[0]

    if hessian:
        H_v = (gradient(omega + 1e-5 * v) - gradient(omega - 1e-5 * v)) / 2e-5
        th.testing.assert_close(jacobian.hessian_v(w[:N_STATES], v), H_v, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CRITICS)
def test_products_are_those_of_the_dense_jacobian(name: str) -> None:
    th.manual_seed(0)
    kind, make = CRITICS[name]
    check_against_dense(make().double().eval(), th.randn(N, 6, dtype=th.float64), kind, name not in DIFFERENTIABLE_ONCE)


@pytest.mark.parametrize("kind", [LayerJacobian, SampledJacobian])
def test_observations_in_a_dictionary(kind: type[Jacobian]) -> None:
    th.manual_seed(0)
    observations = {"image": th.randn(N, 1, 3, 3, dtype=th.float64), "vector": th.randn(N, 4, dtype=th.float64)}

    def value(x: Any, convolution: nn.Module, norm: nn.Module, head: nn.Module) -> th.Tensor:
        return head(th.cat([convolution(x["image"]).flatten(1).tanh(), norm(x["vector"])], dim=1))

    norm = nn.LayerNorm(4) if kind is SampledJacobian else nn.Identity()
    check_against_dense(Each(value, nn.Conv2d(1, 2, 2), norm, nn.Linear(12, 1)).double(), observations, kind)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_critic_whose_gradient_torch_refuses_to_differentiate() -> None:
    jacobian = jacobian_of(attention(), th.randn(N, 6, dtype=th.float64), N, N_STATES)
    with pytest.raises(ValueError, match=r"`curvature`='hessian'"):
        jacobian.hessian_v(th.ones(N_STATES, dtype=th.float64), th.ones(jacobian.n_params, dtype=th.float64))


def test_rows_are_formed_many_at_a_time() -> None:
    """Not one by one, as where torch.func cannot: 256 forward and backward passes would cost more than an epoch."""
    calls: list[int] = []
    critic = mlp(nn.LayerNorm(5))
    critic.register_forward_hook(lambda *_: calls.append(1))
    jacobian_of(critic, th.randn(300, 6, dtype=th.float64), 300, 300, batch_size=64)
    assert len(calls) < 10


@pytest.mark.parametrize("make", [lambda: mlp(nn.LayerNorm(5)), convolutions], ids=["LayerNorm", "convolutions"])
def test_the_sample_comes_from_the_generator_and_estimates_the_trace(make: Factory) -> None:
    th.manual_seed(0)
    critic, observations = make().double(), th.randn(2 * MAX_SAMPLED_ROWS + 5, 6, dtype=th.float64)
    n = n_states = len(observations)
    before = th.get_rng_state()
    one, same, *others = (jacobian_of(critic, observations, n, n_states, 64, seed) for seed in (1, *range(1, 20)))
    assert th.equal(th.get_rng_state(), before)
    assert len(one.curvature_states.unique()) == MAX_SAMPLED_ROWS == len(one.curvature_states)
    assert th.equal(one.curvature_states, same.curvature_states) and not th.equal(
        one.curvature_states, others[0].curvature_states
    )
    g = th.zeros(one.n_params, dtype=th.float64)
    traces = th.stack([GaussNewton(jacobian, g, 1.0).trace for jacobian in (one, *others)])
    rows = one.at(th.arange(n)).squared_norms()
    assert abs(traces.mean() - 2 * rows.mean()) < 4 * traces.std() / len(traces) ** 0.5
    # The change of all values, not only that of the sample's
    assert one.to_values(g).shape == (n_states,)

"""Critics that torch cannot transform or differentiate as usual: their Jacobians are right, or an error says so."""

from typing import Any

import numpy as np
import pytest
import torch as th
from models import built_with, changed, logged, small
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sb3_blpo.jacobian
from sb3_blpo import BLPO
from sb3_blpo.jacobian import AutogradJacobian, FormedJacobian, FunctionalJacobian, Jacobian
from sb3_blpo.layers import LayerJacobian

SOLVERS = ["nystrom", "cg", "exact", "none"]


class Scale(nn.Module):
    """Has parameters that belong to no layer, so that what follows is not served by layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(th.ones(8))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.scale * x


def followed_by(*modules: nn.Module, scale: bool = True) -> type[Any]:
    """SB3's policy, with these behind the critic's hidden layers."""
    return built_with(lambda policy: policy.mlp_extractor.value_net.extend([*([Scale()] if scale else []), *modules]))


class Twice(th.autograd.Function):
    """In the old style, which torch.func does not take."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return 2 * gradient


class OldStyle(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return Twice.apply(x)


class Counted(nn.Module):
    """Counts its calls, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", th.zeros(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        self.calls += 1  # type: ignore[assignment, operator]
        return 2 * x


class Checkpointed(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return checkpoint(lambda y: 2 * th.tanh(y), x, use_reentrant=False)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("module", [OldStyle, Counted, Checkpointed])
def test_critics_that_torch_func_cannot_transform(module: Any, curvature: str) -> None:
    model = small(followed_by(module()), curvature=curvature)
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}
    assert type(model.critic.jacobian(th.zeros(2, 3), th.Generator())) is AutogradJacobian
    assert logged(model)["correction_skipped"] == 0


class Once(th.autograd.Function):
    """Its backward is no function of tensors that require a gradient."""

    @staticmethod
    def forward(x: th.Tensor) -> th.Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class OutsideTorch(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        ctx.x = x.detach().numpy()
        return th.as_tensor(np.sin(ctx.x))

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return th.as_tensor(gradient.detach().numpy() * np.cos(ctx.x))


class ByFunction(nn.Module):
    def __init__(self, function: type[Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.function.apply(x)


class Distances(nn.Module):
    """Radial basis functions, whose distances torch differentiates once."""

    centres: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", th.linspace(-1, 1, 40).view(5, 8))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.pad((-th.cdist(x, self.centres)).exp(), (0, 3))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("module", [lambda: ByFunction(Once), lambda: ByFunction(OutsideTorch), Distances])
def test_critics_whose_gradient_torch_cannot_differentiate(module: Any, solver: str) -> None:
    """Products with their Jacobian would be wrong without a word, or an error of torch's."""
    model = small(followed_by(module()), ihvp_solver=solver)
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}
    assert logged(model).get("correction_skipped", 0) == 0
    check_products(model, FormedJacobian)


@pytest.mark.parametrize("module", [OldStyle, Counted, lambda: ByFunction(Once), lambda: ByFunction(OutsideTorch), Distances])
def test_critics_that_are_layers_otherwise(module: Any) -> None:
    """Their inputs and signals are all that it takes."""
    check_products(small(followed_by(module(), scale=False)).learn(32), LayerJacobian)


def test_curvature_set_later() -> None:
    model = small(followed_by(OldStyle(), scale=False)).learn(16)
    model.curvature = "hessian"
    model.learn(16, reset_num_timesteps=False)
    assert logged(model)["correction_skipped"] == 0
    check_products(model, AutogradJacobian)


def check_products(model: BLPO, kind: type[Jacobian]) -> None:
    """The critic's Jacobian is of this kind, and right."""
    observations = th.randn(5, 3)
    jacobian = model.critic.jacobian(observations, th.Generator())
    assert type(jacobian) is kind
    parameters = list(model.critic.trainable.values())
    gradients = (th.autograd.grad(value, parameters, retain_graph=True) for value in model.critic(observations))
    J = th.stack([th.cat([part.flatten() for part in row]) for row in gradients])
    v, w = th.randn(J.shape[1]), th.randn(5)
    actual = (jacobian.J_v(v), jacobian.Jt_w(w), jacobian.gram(th.tensor([2])), jacobian.columns(th.tensor([7])))
    th.testing.assert_close(actual, (J @ v, J.T @ w, J[[2]] @ J.T, J[:, [7]]))


def test_such_a_critic_behind_a_small_head() -> None:
    """Whose parameters' gradients are small beside the head's own."""

    def change(policy: Any) -> None:
        policy.mlp_extractor.value_net.extend([Scale(), ByFunction(OutsideTorch)])
        nn.init.zeros_(policy.value_net.weight)

    model = small(built_with(change)).learn(32)
    assert isinstance(model.critic.jacobian(th.randn(5, 3), th.Generator()), FormedJacobian)


def test_critics_in_half_precision() -> None:
    class HalfPrecision(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: th.Tensor) -> th.Tensor:
            with th.autocast("cpu", th.bfloat16):
                return self.layer(x).float()

    def change(policy: Any) -> None:
        policy.mlp_extractor.value_net[0] = HalfPrecision(policy.mlp_extractor.value_net[0])
        policy.value_net = HalfPrecision(policy.value_net)

    for seed in range(5):
        model = small(built_with(change), seed=seed, policy_kwargs={"net_arch": [32]}).learn(16)
        assert isinstance(model.critic.jacobian(th.randn(64, 3), th.Generator()), FunctionalJacobian)


def test_what_takes_more_than_such_critics_have(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = followed_by(Distances())
    with pytest.raises(ValueError, match="use `curvature`='gauss_newton'"):
        small(policy, curvature="hessian").learn(16)
    monkeypatch.setattr(sb3_blpo.jacobian, "MAX_JACOBIAN_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"may have at most 1000 bytes, but a minibatch with .* needs .* `ihvp_solver`='none'"
    ):
        small(policy).learn(16)


def test_hooks_of_parameters_do_not_see_the_jacobian() -> None:
    calls: list[str] = []
    for scale in (True, False):
        model = small(followed_by(OldStyle(), scale=scale))
        model.policy.value_net.weight.register_hook(lambda gradient: calls.append("critic"))
        model.learn(16)
    assert len(calls) == 12  # two minibatches, three updates each


def test_dropout_in_a_checkpoint() -> None:
    """Which runs that part of the forward pass once more, and compares."""

    class Part(nn.Module):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return checkpoint(lambda y: F.dropout(y, training=self.training), x, use_reentrant=False)

    def change(policy: Any) -> None:
        policy.mlp_extractor.policy_net.append(Part())
        policy.mlp_extractor.value_net.append(nn.Dropout())

    small(built_with(change)).learn(16)

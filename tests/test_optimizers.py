"""What users do to optimizers and to the parameters that these hold: BLPO takes it as PPO does."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from envs import IMAGE, TORQUES, SpaceEnv
from models import small
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sb3_blpo import BLPO
from sb3_blpo.optimizers import Descent, FusedAdam, parameters_of


def parameters_after(change: Callable[[BLPO], Any], images: bool = False) -> list[th.Tensor]:
    if images:
        # Few small steps: where a gradient is no more than rounding, Adam's go anywhere
        model = small("CnnPolicy", SpaceEnv(IMAGE), n_steps=8)
    else:
        model = small(env=SpaceEnv(action_space=TORQUES), learning_rate=1e-2, n_epochs=3)
    change(model)
    return [parameter.detach().contiguous() for parameter in model.learn(16).policy.parameters()]


def clone_gradients(optimizer: th.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.grad.clone()


def free_gradients(optimizer: th.optim.Optimizer, *_: Any) -> None:
    optimizer.zero_grad()


@pytest.mark.parametrize("hook", [clone_gradients, free_gradients])
def test_hooks_that_replace_gradients(hook: Callable[..., None]) -> None:
    def register(model: BLPO) -> None:
        for optimizer in (model.policy.optimizer, model.critic_optimizer):
            if hook is free_gradients:
                optimizer.register_step_post_hook(hook)
            else:
                optimizer.register_step_pre_hook(hook)

    assert all(map(th.equal, parameters_after(register), parameters_after(lambda model: None)))


def transpose_in_memory(model: BLPO) -> None:
    """As weights are that come from other libraries."""
    for network in (model.policy.mlp_extractor.policy_net, model.policy.mlp_extractor.value_net):
        layer = network[0]
        assert isinstance(layer, nn.Linear)
        layer.weight.data = layer.weight.data.T.contiguous().T
        assert not layer.weight.is_contiguous()


def channels_last(model: BLPO) -> None:
    model.policy.to(memory_format=th.channels_last)  # type: ignore[call-overload]
    assert not all(parameter.is_contiguous() for parameter in model.policy.parameters())


@pytest.mark.parametrize(("change", "images"), [(transpose_in_memory, False), (channels_last, True)])
def test_order_of_parameters_in_memory(change: Callable[[BLPO], Any], images: bool) -> None:
    th.testing.assert_close(
        parameters_after(change, images), parameters_after(lambda model: None, images), rtol=1e-4, atol=1e-5
    )


def test_a_replaced_parameter_leaves_the_state_of_the_others() -> None:
    model = small(env=SpaceEnv(action_space=TORQUES)).learn(16)
    model.policy.log_std = nn.Parameter(model.policy.log_std.detach() - 1)
    model.learn(16)
    optimizer = model.policy.optimizer
    steps = {name: float(optimizer.state[p]["step"]) for name, p in model.policy.named_parameters() if p in optimizer.state}
    assert steps["log_std"] == 2 and steps["action_net.weight"] == 4
    assert {float(state["step"]) for state in model.critic_optimizer.state.values()} == {12}


def test_a_replaced_parameter_where_other_arguments_want_another_state() -> None:
    model = small(env=SpaceEnv(action_space=TORQUES)).learn(16)
    model.policy.optimizer_kwargs["amsgrad"] = True
    model.policy.log_std = nn.Parameter(model.policy.log_std.detach() - 1)
    model.learn(16)
    assert {float(state["step"]) for state in model.policy.optimizer.state.values()} == {2}


def test_save_with_an_optimizer_of_all_parameters() -> None:
    model = small().learn(16)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)
    model.save(file := io.BytesIO())
    loaded = BLPO.load(file, device="cpu")
    assert all(map(th.equal, loaded.policy.parameters(), model.policy.parameters()))


def two_optimizers(**kwargs: Any) -> tuple[th.optim.Adam, th.optim.Adam]:
    """The same parameters twice, of several shapes, after a first step."""
    optimizers = []
    for _ in range(2):
        th.manual_seed(0)
        parameters = [nn.Parameter(th.randn(shape)) for shape in ((4, 3), (4,), ())]
        optimizers.append(th.optim.Adam(parameters, **{"lr": 1e-2, "fused": True} | kwargs))
        Descent(optimizers[-1]).step(th.randn(17))
    return optimizers[0], optimizers[1]


def everything_of(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    parameters = parameters_of(optimizer)
    return [*parameters, *(x for parameter in parameters for _, x in sorted(optimizer.state[parameter].items()))]


@pytest.mark.parametrize(
    "kwargs", [{}, {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}, {"maximize": True, "lr": 1.0}]
)
def test_the_kernel_of_adam_is_its_step(kwargs: dict[str, Any]) -> None:
    ours, torchs = two_optimizers(**kwargs)
    assert FusedAdam.serves(ours)
    descent = Descent(ours)
    for i in range(5):
        gradient = th.randn(17)
        with th.inference_mode(i % 2 == 0):
            descent.step(gradient)
        parts = gradient.split([12, 4, 1])
        for parameter, part in zip(parameters_of(torchs), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        torchs.step()
        if i == 2:
            ours.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 0.3
        assert all(map(th.equal, everything_of(ours), everything_of(torchs)))
    # What is saved, too, and it goes on from there with either
    torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for optimizer in (ours, torchs):
        Descent(optimizer).step(th.ones(17))
    assert all(map(th.equal, everything_of(ours), everything_of(torchs)))
    assert {float(state["step"]) for state in torchs.state.values()} == {7}


def group_apart(optimizer: th.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()]})


def forget_a_state(optimizer: th.optim.Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def transpose_a_state(optimizer: th.optim.Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["exp_avg"] = state["exp_avg"].T.contiguous().T


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer.register_step_pre_hook(lambda *_: None),
        lambda optimizer: optimizer.register_step_post_hook(lambda *_: None),
        lambda optimizer: th.optim.lr_scheduler.StepLR(optimizer, 1),
        lambda optimizer: optimizer.param_groups[0].update(lr=th.tensor(0.1)),
        lambda optimizer: optimizer.param_groups[0].update(fused=False),
        lambda optimizer: optimizer.param_groups[0].update(amsgrad=True),
        lambda optimizer: optimizer.param_groups[0].update(decoupled_weight_decay=True),
        lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][0]].update(step=1),
        lambda optimizer: [p.requires_grad_(False) for p in optimizer.param_groups[0]["params"]],
        group_apart,
        forget_a_state,
        transpose_a_state,
    ],
)
def test_whom_the_kernel_does_not_serve(change: Callable[[th.optim.Optimizer], Any]) -> None:
    optimizer = two_optimizers()[0]
    assert FusedAdam.serves(optimizer)
    change(optimizer)
    assert not FusedAdam.serves(optimizer)


def test_other_optimizers_and_hooks_of_all() -> None:
    adam = two_optimizers()[0]
    for optimizer_class in (th.optim.AdamW, th.optim.SGD, type("Mine", (th.optim.Adam,), {})):
        other = optimizer_class(adam.param_groups[0]["params"], lr=1e-2, fused=True)
        other.state = adam.state
        assert not FusedAdam.serves(other)
    hook = register_optimizer_step_post_hook(lambda *_: None)
    assert not FusedAdam.serves(adam)
    hook.remove()
    assert FusedAdam.serves(adam)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_undone(fused: bool) -> None:
    optimizer, buffer = two_optimizers(fused=fused)[0], th.zeros(2)
    before = [x.clone() for x in everything_of(optimizer)]
    descent = Descent(optimizer)
    with pytest.raises(ZeroDivisionError), descent.undone_on_error([buffer]):
        for _ in range(2):
            descent.step(th.randn(17))
        buffer += 1
        assert not any(map(th.equal, everything_of(optimizer), before))
        1 / 0  # noqa: B018
    assert all(map(th.equal, everything_of(optimizer), before)) and not buffer.any()
    with descent.undone_on_error([buffer]):
        descent.step(th.randn(17))
    assert not any(map(th.equal, everything_of(optimizer), before))


def test_training_with_the_kernel_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(model: BLPO) -> list[th.Tensor]:
        model.learn(48)
        return everything_of(model.policy.optimizer) + everything_of(model.critic_optimizer)

    served: list[bool] = []
    serves = FusedAdam.serves

    def noted(optimizer: th.optim.Optimizer) -> bool:
        served.append(serves(optimizer))
        return served[-1]

    monkeypatch.setattr(FusedAdam, "serves", noted)
    with_kernel = everything(small(env=SpaceEnv(action_space=TORQUES)))
    assert served == [False, False] + 2 * [True, True]  # actor and critic, three rollouts
    monkeypatch.setattr(FusedAdam, "serves", lambda optimizer: False)
    assert all(map(th.equal, with_kernel, everything(small(env=SpaceEnv(action_space=TORQUES)))))

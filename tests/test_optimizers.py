"""What users do to optimizers and to the parameters that these hold: BLPO takes it as PPO does."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from envs import IMAGE, TORQUES, SpaceEnv
from models import small
from torch import nn

from sb3_blpo import BLPO


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

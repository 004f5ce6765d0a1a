"""What users do to optimizers, and to the parameters that these hold."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from envs import ACTION_SPACES, SpaceEnv
from models import actor_of, changed, critic_of, differences, logged, moved, parameters_of, small, state_of
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_blpo import BLPO


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_the_policy_is_shared_out(actions: str) -> None:
    model = small(env=SpaceEnv(action_space=ACTION_SPACES[actions]))
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    actor, critic = ([names[id(p)] for p in parameters_of(o)] for o in (model.policy.optimizer, model.critic_optimizer))
    assert sorted(actor + critic) == sorted(names.values())
    assert set(critic) == {name for name in names.values() if "value_net" in name}


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"),
    [(None, {}), (th.optim.SGD, {"momentum": 0.5}), (th.optim.AdamW, {"foreach": True, "weight_decay": 0.1})],
)
def test_class_and_arguments_serve_both(optimizer_class: Any, optimizer_kwargs: dict[str, Any]) -> None:
    given = {} if optimizer_class is None else {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    model = small(policy_kwargs={"net_arch": [4]} | given).learn(16)
    for optimizer in (model.policy.optimizer, model.critic_optimizer):
        assert type(optimizer) is (optimizer_class or th.optim.Adam)
        expected = optimizer_kwargs or {"eps": 1e-5}  # SB3's
        assert expected.items() <= optimizer.param_groups[0].items()


class Encoder(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.net = nn.Linear(3, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.net(observations))


class Groups(ActorCriticPolicy):
    """An optimizer with three groups: one with weight decay, one with a rate of its own, and the rest."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        heads = [*self.action_net.parameters(), *self.value_net.parameters()]
        encoder = [*self.features_extractor.parameters()]
        rest = [*self.mlp_extractor.parameters()]
        groups = [
            {"params": heads, "weight_decay": 0.1},
            {"params": encoder, "lr": 0.5 * lr_schedule(1)},
            {"params": rest},
        ]
        self.optimizer = th.optim.Adam(groups, lr=lr_schedule(1))


def groups_of(model: BLPO) -> list[list[tuple[set[str], float, float]]]:
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    return [
        [({names[id(p)] for p in group["params"]}, group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
        for optimizer in (model.policy.optimizer, model.critic_optimizer)
    ]


def test_parameter_groups_are_kept() -> None:
    """Each on its side, at its own rate where it has one, after loading too."""
    model = small(
        Groups, learning_rate=LinearSchedule(0.1, 0.0, 1.0), critic_learning_rate=0.2,
        policy_kwargs={"features_extractor_class": Encoder, "net_arch": [8]},
    )  # fmt: skip
    names = {name for name, _ in model.policy.named_parameters()}
    assert changed(model, lambda: model.learn(32)) == names
    model.save(file := io.BytesIO())
    loaded = BLPO.load(file, env=SpaceEnv(), device="cpu").learn(32)
    for each in (model, loaded):
        groups = groups_of(each)
        for side, extractor, head, rate in (
            (groups[0], "pi_features_extractor", "action_net", logged(each)["learning_rate"]),
            (groups[1], "vf_features_extractor", "value_net", 0.2),
        ):
            assert [decay for _, decay, _ in side] == [0.1, 0, 0]
            assert [lr for _, _, lr in side] == [rate, 0.05, rate]
            assert side[0][0] == {f"{head}.weight", f"{head}.bias"}
            # The actor's is also `features_extractor`, by which it is named first
            assert {name.removeprefix("pi_").removeprefix("vf_") for name in side[1][0]} == {
                "features_extractor.net.weight", "features_extractor.net.bias",
            }, extractor  # fmt: skip
        assert set().union(*(part for side in groups for part, _, _ in side)) == names


def test_rates_belong_to_their_networks() -> None:
    for arguments, stands, moves in [
        ({"learning_rate": 0.0, "critic_learning_rate": 1e-3}, actor_of, critic_of),
        ({"critic_learning_rate": 0.0}, critic_of, actor_of),
    ]:
        model = small(**arguments)
        before = stands(model), moves(model)
        model.learn(32)
        assert not moved(before[0], stands(model)) and moved(before[1], moves(model))


def clone_gradients(optimizer: th.optim.Optimizer, *_: Any) -> None:
    for parameter in parameters_of(optimizer):
        parameter.grad = parameter.grad.clone()  # type: ignore[union-attr]


def free_gradients(optimizer: th.optim.Optimizer, *_: Any) -> None:
    optimizer.zero_grad()


@pytest.mark.parametrize(("when", "hook"), [("pre", clone_gradients), ("post", free_gradients)])
def test_hooks_that_replace_gradients(when: str, hook: Callable[..., None]) -> None:
    plain = state_of(small(engine="torch").learn(32))
    model = small(engine="torch")
    for optimizer in (model.policy.optimizer, model.critic_optimizer):
        getattr(optimizer, f"register_step_{when}_hook")(hook)
    assert not differences(plain, state_of(model.learn(32)))


def all_parameters(model: BLPO) -> Any:
    return th.optim.Adam(model.policy.parameters(), lr=1e-3)


def others_parameters(model: BLPO) -> Any:
    return th.optim.SGD(nn.Linear(2, 2).parameters(), lr=1e-3)


def some_parameters(model: BLPO) -> Any:
    return th.optim.SGD(parameters_of(model.policy.optimizer)[:2], lr=1e-3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            all_parameters,
            r"^`policy.optimizer` and `critic_optimizer` both have `mlp_extractor.value_net.0.weight`: give .*\.$",
        ),
        (others_parameters, r"^`policy.optimizer` has parameters that are not the policy's .*: make it anew, or .*\.$"),
        (some_parameters, r"^`.*` is trainable, but no optimizer has it: give it to one, or freeze it\.$"),
    ],
)
def test_an_optimizer_that_does_not_fit(make: Callable[[BLPO], Any], why: str) -> None:
    """``save`` changes nothing about it, and the next ``train`` says what is wrong."""
    model = small().learn(16)
    fitting, model.policy.optimizer = model.policy.optimizer, make(model)
    before = state_of(model)
    model.save(io.BytesIO())
    assert not differences(before, state_of(model))
    with pytest.raises(ValueError, match=why):
        model.learn(16)
    assert not differences(before, state_of(model))
    model.policy.optimizer = fitting
    assert moved(actor_of(model), actor_of(model.learn(16)))


def replace_policy(model: BLPO) -> None:
    model.policy = small(seed=1).policy


def replace_module(model: BLPO) -> None:
    model.policy.value_net = nn.Linear(8, 1)


@pytest.mark.parametrize("replace", [replace_policy, replace_module])
def test_a_replaced_network(replace: Callable[[BLPO], Any]) -> None:
    """Needs optimizers of its own, and is trained by them."""
    model = small().learn(16)
    replace(model)
    with pytest.raises(ValueError, match=r"^`critic_optimizer` has parameters that are not the policy's"):
        model.learn(16)
    names = {name for name, _ in model.policy.named_parameters()}
    critic = [p for name, p in model.policy.named_parameters() if "value_net" in name]
    model.critic_optimizer = th.optim.RMSprop(critic, lr=1e-3)
    assert changed(model, lambda: model.learn(16)) == names


def test_another_optimizer_of_the_same_parameters() -> None:
    model = small().learn(16)
    model.policy.optimizer, model.critic_optimizer = (
        th.optim.SGD(parameters_of(optimizer), lr=1.0, momentum=0.9)
        for optimizer in (model.policy.optimizer, model.critic_optimizer)
    )
    names = {name for name, _ in model.policy.named_parameters()}
    assert changed(model, lambda: model.learn(16)) == names
    assert model.policy.optimizer.param_groups[0]["lr"] == logged(model)["learning_rate"]


def test_an_optimizer_that_has_state_from_the_start() -> None:
    """The critic's copy of the extractor, too."""
    policy_kwargs = {"optimizer_class": th.optim.Adagrad, "features_extractor_class": Encoder, "net_arch": [8]}
    model = small(policy_kwargs=policy_kwargs)
    assert changed(model, lambda: model.learn(16)) == {name for name, _ in model.policy.named_parameters()}
    model.save(file := io.BytesIO())
    BLPO.load(file, env=SpaceEnv(), device="cpu").learn(16)

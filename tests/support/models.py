"""Small models, and what there is to compare of a model."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch as th
from envs import SpaceEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_blpo import BLPO
from sb3_blpo.bilevel import Bilevel

Model = TypeVar("Model", bound=Bilevel)

SMALL: dict[str, Any] = dict(n_steps=16, batch_size=8, n_epochs=1, seed=0, device="cpu", policy_kwargs={"net_arch": [8]})


def small(policy: Any = "MlpPolicy", env: Any = None, **arguments: Any) -> BLPO:
    """A model with minibatches of 8 transitions, two per environment and rollout."""
    return BLPO(policy, SpaceEnv() if env is None else env, **(SMALL | {"ihvp_kwargs": {"rank": 6}} | arguments))


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield path.removeprefix("/"), tree
    else:
        for key, value in items:
            yield from _leaves(value, f"{path}/{key}")


def state_of(model: Bilevel) -> dict[str, Any]:
    """Networks and optimizers, leaf by leaf, detached from the model."""
    trees = {
        "policy": model.policy.state_dict(),
        "actor": model.policy.optimizer.state_dict(),
        "critic": model.critic_optimizer.state_dict(),
    }
    return dict(_leaves(copy.deepcopy(trees)))


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The leaves at which two states differ by at least one bit."""

    def same(x: Any, y: Any) -> bool:
        return th.equal(x, y) if isinstance(x, th.Tensor) and isinstance(y, th.Tensor) else type(x) is type(y) and x == y

    return [name for name in sorted({*a, *b}) if name not in a or name not in b or not same(a[name], b[name])]


def parameters_of(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """All that an optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def actor_of(model: Bilevel) -> list[th.Tensor]:
    """Copies of the actor's parameters."""
    return [parameter.detach().clone() for parameter in parameters_of(model.policy.optimizer)]


def critic_of(model: Bilevel) -> list[th.Tensor]:
    """Copies of the critic's parameters."""
    return [parameter.detach().clone() for parameter in parameters_of(model.critic_optimizer)]


def moved(before: Sequence[th.Tensor], after: Sequence[th.Tensor]) -> bool:
    """Whether any parameter is another now. All must be finite."""
    assert all(parameter.isfinite().all() for parameter in after)
    return any(not th.equal(a, b) for a, b in zip(before, after, strict=True))


class AtRolloutStart(BaseCallback):
    """Calls a function with the model at the start of each rollout."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__()
        self.function = function

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, Bilevel)
        self.function(self.model)

    def _on_step(self) -> bool:
        return True


def logged(model: Bilevel) -> dict[str, float]:
    """What the latest ``train()`` logged, by name without `train/`."""
    assert isinstance(model.logger, Logger)
    values = model.logger.name_to_value
    return {name.removeprefix("train/"): value for name, value in values.items() if name.startswith("train/")}


def collect_rollout(model: Model) -> Model:
    """Collect a rollout and do not train on it."""
    _, callback = model._setup_learn(10**6, reset_num_timesteps=model._last_obs is None)
    assert model.env is not None
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


def changed(model: Bilevel, change: Callable[[], Any]) -> set[str]:
    """The parameters that are others afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    change()
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    return {name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])}


def built_with(change: Callable[[Any], Any]) -> type[ActorCriticPolicy]:
    """SB3's policy, with its networks changed while it is built."""

    class Changed(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            change(self)

    return Changed

"""
Numbers that are none, and errors, in the middle of a training: an update happens as a whole or not at all. A linear solve that
fails costs the correction alone.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import BOX, TORQUES, FaultyEnv, SpaceEnv
from gymnasium import spaces
from models import actor_of, built_with, collect_rollout, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_blpo.bilevel
from sb3_blpo import BLPO
from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp import Solution, Solver
from sb3_blpo.jacobian import LinearRows

NAN, INF = math.nan, math.inf
SOLVERS = ["nystrom", "cg", "nystrom_cg", "exact"]


class Remembering(BaseFeaturesExtractor):
    """Keeps statistics of what it sees in training, some of which are not saved."""

    seen: th.Tensor

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.register_buffer("seen", th.zeros(3), persistent=False)
        self.register_buffer("mask", th.tensor([0.0, -INF]))  # on purpose

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.training:
            self.seen += observations.sum(dim=0)
        return self.body(observations)


#: Kinds of models, with all that an update may change
KINDS: dict[str, dict[str, Any]] = {
    "Adam": {"net_arch": [8]},
    "momentum": {"net_arch": [8], "optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    "buffers": {"net_arch": [8], "features_extractor_class": Remembering},
}


def everything(model: BLPO) -> dict[str, Any]:
    """Networks with all their buffers, and optimizers."""
    return state_of(model) | {name: buffer.clone() for name, buffer in model.policy.named_buffers()}


def check_refused(model: BLPO, message: str, train: Callable[[BLPO], Any] = lambda model: model.learn(32)) -> None:
    """Training ends in one sentence, and nothing has changed."""
    before = everything(model)
    with pytest.raises(ValueError, match=message) as error:
        train(model)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not differences(before, everything(model))


def check_recovery(model: BLPO) -> None:
    """The model learns from healthy data."""
    actor, critic = actor_of(model), critic_of(model)
    model.learn(32)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))


# In what is collected


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("reward", "`advantages`"),
        ("reset", "`observations`"),
        ("step", "`observations`"),
        ("terminal", "`terminal observations`"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:stable_baselines3")
def test_fault_in_the_rollout(where: str, name: str, value: float) -> None:
    env = FaultyEnv("", value)
    model = small(env=env).learn(16)
    env.where, env.episode = where, 0
    check_refused(model, f"^The rollout's {name} hold NaN or infinity, so BLPO stopped before any weight was changed")
    env.where = ""
    check_recovery(model)


@pytest.mark.parametrize("action_space", [TORQUES, spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)], ids=str)
def test_fault_in_observations_whatever_the_actions(action_space: spaces.Space) -> None:
    env = FaultyEnv("step", NAN)
    env.action_space = action_space
    check_refused(small(env=env), "^The rollout's `observations` hold NaN or infinity")


@pytest.mark.parametrize("where", ["step", "terminal"])
def test_fault_in_a_dictionary_is_found_by_its_key(where: str) -> None:
    env = FaultyEnv(where, INF, spaces.Dict({"room": spaces.Discrete(3), "position": BOX}))
    check_refused(small("MultiInputPolicy", env), r"`(terminal )?observations\['position'\]` hold NaN or infinity")


def test_fault_behind_vec_normalize() -> None:
    env: Any = small(env=FaultyEnv("step", NAN)).get_env()
    check_refused(small(env=VecNormalize(env)), "`observations` hold NaN or infinity")


def test_fault_after_the_last_step() -> None:
    """The observation that the rollout ends with is never stored, but values bootstrap from it."""

    class LastStep(SpaceEnv):
        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            if self.t == 16:
                observation[0] = INF
            return observation, *rest

    check_refused(small(env=LastStep(episode_length=100)), "`observations` hold NaN or infinity")


@pytest.mark.parametrize("name", ["advantages", "returns", "log_probs"])
def test_fault_in_what_a_callback_writes(name: str) -> None:
    model = collect_rollout(small())
    getattr(model.rollout_buffer, name)[3] = NAN
    check_refused(model, f"^The rollout's `{name}` hold NaN or infinity", BLPO.train)


def test_terminal_observation_without_truncation_is_not_used() -> None:
    """Nothing is bootstrapped from the end of an episode that terminated, so whatever is observed there does no harm."""

    class Terminating(FaultyEnv):
        def step(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated or truncated, False, info

    check_recovery(small(env=Terminating("terminal", NAN)))


def test_other_value_errors_of_an_environment_pass() -> None:
    class Raising(SpaceEnv):
        def step(self, action: Any) -> Any:
            raise ValueError("out of fuel")

    with pytest.raises(ValueError, match=r"^out of fuel$"):
        small(env=Raising()).learn(16)


# In an update

LINEAR: dict[str, Any] = {"policy_kwargs": {"net_arch": []}}
LARGE = spaces.Box(-1e4, 1e4, (3,), np.float32)
#: By what is not finite: an environment and arguments with which nothing else stops training before
OVERFLOWS: dict[str, tuple[SpaceEnv, dict[str, Any]]] = {
    "critic's loss": (FaultyEnv("reward", 1e30), {}),
    "critic's value": (SpaceEnv(), LINEAR | {"critic_learning_rate": 1e39, "n_critic_updates": 1, "batch_size": 16}),
    "critic's optimizer state `exp_avg_sq`": (FaultyEnv("reward", 1e18, LARGE), LINEAR),
    "actor's gradient": (SpaceEnv(action_space=TORQUES), {"ent_coef": 1e38}),
    "actor's output": (SpaceEnv(action_space=TORQUES), {"learning_rate": 1e38, "critic_learning_rate": 1e-3}),
    "parameter `action_net.weight`": (
        SpaceEnv(),
        LINEAR | {"learning_rate": 1e39, "critic_learning_rate": 1e-3, "batch_size": 16},
    ),
    "buffer `features_extractor.body.1.running_var`": (FaultyEnv("step", 1e25), {"policy_kwargs": KINDS["buffers"]}),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_in_an_update(name: str) -> None:
    env, arguments = OVERFLOWS[name]
    model = small(env=env, **arguments)
    check_refused(model, f"^The {name} is not finite in update 1, after 16 timesteps; networks and optimizers were put back")


class Strike:
    """
    Counts the calls of both networks' last layers, in forward and backward passes, and does something at one of them.

    :param model: Which model's
    :param call: Which call, from 1; 0: none
    :param action: What happens
    """

    def __init__(self, model: BLPO, call: int, action: Callable[[], None]) -> None:
        self.call, self.action, self.calls = call, action, 0
        for layer in (model.policy.action_net, model.policy.value_net):
            layer.register_forward_hook(self.count)
            layer.register_full_backward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            self.action()


def learned(kind: str) -> BLPO:
    """A model after two updates, with a third rollout."""
    return collect_rollout(small(policy_kwargs=KINDS[kind], n_epochs=2).learn(32))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_fails_leaves_no_trace(kind: str) -> None:
    """Whatever hits it and where: all is as before, and the same update made again is what it would have been."""
    reference = learned(kind)
    strike = Strike(reference, 0, lambda: None)
    reference.train()
    errors = [KeyboardInterrupt, RuntimeError, FloatingPointError, ValueError, KeyboardInterrupt]
    for call, error in zip(np.linspace(1, strike.calls, len(errors), dtype=int), errors, strict=True):

        def fail(error: type[BaseException] = error) -> None:
            raise error("a nut came loose")

        model = learned(kind)
        before, generator = everything(model), th.get_rng_state()
        Strike(model, call, fail)
        with pytest.raises(ValueError if error is FloatingPointError else error, match="a nut came loose"):
            model.train()
        assert not differences(before, everything(model))
        th.set_rng_state(generator)
        model.train()
        assert not differences(everything(reference), everything(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_of_states_can_fail(kind: str) -> None:
    """All that an update changes is part of what the tests here compare."""
    model = learned(kind)
    before = everything(model)
    model.train()
    changed = {name.rsplit(".")[-1].rsplit("/")[-1] for name in differences(before, everything(model))}
    expected = {"momentum": {"momentum_buffer"}, "buffers": {"running_mean", "running_var", "num_batches_tracked", "seen"}}
    assert changed >= {"weight", "bias"} | expected.get(kind, {"exp_avg", "exp_avg_sq", "step"})


# In a linear solve: the actor's step is along the direct gradient


def direct(**arguments: Any) -> dict[str, Any]:
    return state_of(small(**(arguments | {"ihvp_solver": "none"})).learn(32))


class Failing(Solver):
    """A solver with an answer that is none."""

    def __init__(self, value: float, ok: bool) -> None:
        self.value, self.ok = value, ok

    def solve(self, system: GaussNewton, generator: th.Generator) -> Solution:
        return Solution(th.full_like(system.g, self.value), th.tensor(self.ok))


@pytest.mark.parametrize(("value", "ok"), [(1.0, False), (NAN, True), (INF, True), (1e38, True)])
def test_failed_solve_leaves_the_direct_gradient(value: float, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_blpo.bilevel, "make_solver", lambda *args, **kwargs: Failing(value, ok))
    model = small().learn(32)
    assert logged(model)["correction_skipped"] == 1
    assert not differences(direct(), state_of(model))


def test_one_of_several_solves_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(ihvp_solver="cg", n_epochs=3, ihvp_interval=1)
    original, calls = sb3_blpo.bilevel.make_solver, 0

    def make_solver(*args: Any, **kwargs: Any) -> Solver | None:
        nonlocal calls
        calls += 1
        return Failing(NAN, False) if calls == 2 else original(*args, **kwargs)

    monkeypatch.setattr(sb3_blpo.bilevel, "make_solver", make_solver)
    values = logged(model.learn(16))
    assert calls == 3 and values["correction_skipped"] == 1
    # Averages are those of the epochs that have a correction
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("solver", "sketch"),
    [("nystrom", "values"), ("nystrom", "columns"), ("nystrom_cg", "gaussian"), ("cg", "values"), ("exact", "values")],
)
@pytest.mark.parametrize("method", ["squared_norms", "J_v"])
def test_curvature_that_is_not_finite(
    method: str, solver: str, sketch: str, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever linear algebra makes of it, no error escapes."""
    original = getattr(LinearRows, method)
    monkeypatch.setattr(LinearRows, method, lambda *args: original(*args) * INF)
    model = small(ihvp_solver=solver, curvature=curvature, ihvp_kwargs={"rank": 6, "sketch": sketch}).learn(32)
    assert logged(model)["correction_skipped"] == 1
    assert not differences(direct(), state_of(model))


def test_eigenvalues_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    def eigh(*args: Any, **kwargs: Any) -> None:
        raise th.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(th.linalg, "eigh", eigh)
    model = small(ihvp_kwargs={"rank": 6, "sketch": "columns"}, curvature="hessian").learn(32)
    assert logged(model)["correction_skipped"] == 1
    assert not differences(direct(), state_of(model))


def test_cg_on_an_indefinite_hessian() -> None:
    """Errors far larger than the values make the Hessian indefinite, where the iteration means nothing."""
    model = small(env=SpaceEnv(reward_scale=1e4), ihvp_solver="cg", curvature="hessian").learn(32)
    assert logged(model)["correction_skipped"] == 1
    assert not differences(direct(env=SpaceEnv(reward_scale=1e4)), state_of(model))


def dead(policy: Any) -> None:
    """The only trainable parameters of the critic have no effect: curvature and damping are zero."""
    policy.value_net.requires_grad_(False)
    nn.init.constant_(policy.mlp_extractor.value_net[0].bias, -1e3)


def frozen(policy: Any) -> None:
    for network in (policy.mlp_extractor.value_net, policy.value_net):
        network.requires_grad_(False)


@pytest.mark.parametrize("change", [dead, frozen])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_critic_that_cannot_respond_is_no_failure(solver: str, change: Callable[[Any], None]) -> None:
    relu = {"net_arch": [8], "activation_fn": nn.ReLU}
    settings: dict[str, Any] = {"policy": built_with(change), "policy_kwargs": relu}
    model = small(ihvp_solver=solver, **settings).learn(32)
    assert logged(model).get("correction_skipped", 0) == 0
    assert not differences(direct(**settings), state_of(model))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("reward_scale", [1e-12, 1e4, 1e12])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_scale_of_rewards_breaks_a_solver(solver: str, reward_scale: float, curvature: str) -> None:
    model = small(env=SpaceEnv(reward_scale=reward_scale), ihvp_solver=solver, curvature=curvature, max_correction_ratio=None)
    check_recovery(model)
    if curvature == "gauss_newton":
        assert logged(model)["correction_skipped"] == 0

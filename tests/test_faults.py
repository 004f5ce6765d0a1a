"""Numbers that are none: training stops before they reach a weight; a linear solve that fails costs the correction alone."""

import math
import re
from typing import Any

import pytest
import torch as th
from envs import BOX, IMAGE, TORQUES, FaultyEnv, SpaceEnv
from gymnasium import spaces
from models import AtRolloutStart, actor_of, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.actor_critic import ActionLikelihood
from sb3_blpo.ihvp import Solution
from sb3_blpo.layers import LayerJacobian

NAN, INF = math.nan, math.inf
SOLVERS = ["nystrom", "cg", "nystrom_cg", "exact"]


class NormedExtractor(BaseFeaturesExtractor):
    """Keeps statistics of what it sees."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.body(observations)


def check_recovery(model: BLPO) -> None:
    """The model learns from healthy data."""
    actor, critic = actor_of(model), critic_of(model)
    model.learn(32)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("reward", "`rewards`"),
        ("reset", "`observations`"),
        ("step", "`observations`"),
        ("terminal", "`terminal observations`"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:stable_baselines3")
def test_fault_in_the_rollout(where: str, name: str, value: float, trained: bool) -> None:
    env = FaultyEnv("", value)
    model = small(env=env)
    if trained:
        model.learn(16)
    before = state_of(model)
    env.where = where
    env.episode = 0
    with pytest.raises(ValueError, match=f"^The rollout's {name} hold NaN or infinity") as error:
        model.learn(32)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not differences(before, state_of(model))
    env.where = ""
    check_recovery(model)


@pytest.mark.parametrize("action_space", [TORQUES, spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)], ids=str)
@pytest.mark.parametrize("where", ["reset", "step", "terminal"])
def test_fault_in_observations_whatever_the_actions(where: str, action_space: spaces.Space) -> None:
    env = FaultyEnv(where, NAN)
    env.action_space = action_space
    model = small(env=env)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^The rollout's `(terminal )?observations` hold NaN or infinity"):
        model.learn(16)
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["reset", "step", "terminal"])
def test_fault_in_a_dictionary_is_found_by_its_key(where: str, value: float) -> None:
    model = small("MultiInputPolicy", FaultyEnv(where, value, spaces.Dict({"room": spaces.Discrete(3), "position": BOX})))
    before = state_of(model)
    with pytest.raises(ValueError, match=r"`(terminal )?observations\['position'\]` hold NaN or infinity"):
        model.learn(16)
    assert not differences(before, state_of(model))


def test_fault_after_the_last_step() -> None:
    """The observation that the rollout ends with is never stored, but values bootstrap from it."""

    class LastStep(SpaceEnv):
        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            if self.t == 8:
                observation[0] = INF
            return observation, *rest

    model = small(env=LastStep(episode_length=100), n_steps=8)
    before = state_of(model)
    with pytest.raises(ValueError, match="`observations` hold NaN or infinity"):
        model.learn(8)
    assert not differences(before, state_of(model))


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


def test_fault_behind_vec_normalize() -> None:
    env = FaultyEnv("step", NAN)
    model = small(env=env)
    vec = model.get_env()
    assert vec is not None
    model = small(env=VecNormalize(vec))
    before = state_of(model)
    with pytest.raises(ValueError, match="`observations` hold NaN or infinity"):
        model.learn(16)
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("trained", [False, True])
def test_overflow_in_the_critics_gradient(trained: bool) -> None:
    """Rewards that are finite, with a squared error that is not."""
    env = FaultyEnv("", 1e30)
    model = small(env=env)
    if trained:
        model.learn(32)
    env.where = "reward"
    before = state_of(model)
    update = 3 if trained else 1
    with pytest.raises(ValueError, match=rf"critic's gradient in nested update 1 is inf in update {update}, after"):
        model.learn(16)
    assert not differences(before, state_of(model))
    env.where = ""
    check_recovery(model)


def test_overflow_in_the_critics_loss() -> None:
    """The gradient is fine, the critic after the step is not."""
    model = small(critic_learning_rate=1e30, n_critic_updates=1)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"critic's loss is (inf|nan) in update 1, after 16 timesteps"):
        model.learn(16)
    assert not differences(before, state_of(model))


def test_overflow_in_the_actors_gradient() -> None:
    model = small(env=SpaceEnv(action_space=TORQUES), ent_coef=1e38)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"actor's gradient is (inf|nan) in update 1, after 16 timesteps"):
        model.learn(16)
    assert not differences(before, state_of(model))


def test_overflow_in_batch_statistics() -> None:
    """Their squares are infinite, and all that they normalise is zero from then on: gradients and losses look healthy."""
    env = FaultyEnv("step", 1e25)
    model = small(env=env, policy_kwargs={"features_extractor_class": NormedExtractor, "net_arch": [8]})
    before = state_of(model)
    with pytest.raises(ValueError, match=r"largest of the layers' running statistics is (inf|nan) in update 1"):
        model.learn(16)
    assert not differences(before, state_of(model))
    env.where = ""
    check_recovery(model)


def spoil_gradient(
    monkeypatch: pytest.MonkeyPatch, model: BLPO, network: str, values: dict[int, float], entry: int = -1
) -> None:
    """Make an entry of a network's gradient another value when it is computed for the `call`-th time, call by call."""
    calls = 0

    def spoiled(gradient: th.Tensor) -> th.Tensor:
        nonlocal calls
        calls += 1
        gradient[entry] = values.get(calls, gradient[entry])
        return gradient

    if network == "critic":
        follower = model.critic.loss_and_gradient

        def loss_and_gradient(*args: Any) -> tuple[th.Tensor, th.Tensor]:
            loss, gradient = follower(*args)
            return loss, spoiled(gradient)

        monkeypatch.setattr(model.critic, "loss_and_gradient", loss_and_gradient)
    else:
        leader = model.actor.likelihood

        def likelihood(*args: Any) -> ActionLikelihood:
            result = leader(*args)
            return result._replace(gradient=lambda *by: spoiled(result.gradient(*by)))

        monkeypatch.setattr(model.actor, "likelihood", likelihood)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("network", "call", "minibatch", "name"),
    [
        ("critic", 1, 1, "critic's gradient in nested update 1"),
        ("critic", 3, 1, "critic's gradient in nested update 3"),
        ("critic", 8, 3, "critic's gradient in nested update 2"),
        # The direct gradient and the correction of one minibatch
        ("actor", 1, 1, "actor's gradient"),
        ("actor", 5, 3, "actor's gradient"),
    ],
)
@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {},
        {"features_extractor_class": NormedExtractor},
        {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    ],
    ids=["Adam", "BatchNorm", "SGD"],
)
def test_fault_in_a_gradient(
    policy_kwargs: dict[str, Any],
    network: str,
    call: int,
    minibatch: int,
    name: str,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both networks, their buffers and both optimizers are as they were at the start of the minibatch."""
    model = small(policy_kwargs={"net_arch": [8], **policy_kwargs}, n_epochs=2)
    spoil_gradient(monkeypatch, model, network, {call: value})
    starts = [state_of(model)]
    model.policy.optimizer.register_step_post_hook(lambda *_: starts.append(state_of(model)))
    with pytest.raises(ValueError, match=f"The {name} is .* in update {1 + minibatch // 3}, after 16 timesteps") as error:
        model.learn(16)
    assert "put back to the start of that minibatch" in str(error.value) and "\n" not in str(error.value)
    assert len(starts) == minibatch
    assert not differences(starts[-1], state_of(model))
    monkeypatch.undo()
    check_recovery(model)


def test_the_comparison_of_states_can_fail() -> None:
    """Everything that a minibatch changes is part of what the tests here compare."""
    model = small(policy_kwargs={"features_extractor_class": NormedExtractor, "net_arch": [8]}).learn(16)
    names = differences(state_of(model), state_of(model.learn(16)))
    changed = {f"{name.split('/')[0]}/{re.split('[/.]', name)[-1]}" for name in names}
    assert changed >= {
        "policy/weight", "policy/bias", "policy/running_mean", "policy/running_var", "policy/num_batches_tracked",
        "actor/exp_avg", "actor/exp_avg_sq", "actor/step", "critic/exp_avg", "critic/exp_avg_sq", "critic/step",
    }  # fmt: skip


def without_correction(**arguments: Any) -> dict[str, Any]:
    return state_of(small(ihvp_solver="none", **arguments).learn(32))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("value", "ok"), [(1.0, False), (NAN, False), (NAN, True), (INF, True), (-INF, False)])
def test_failed_solve_leaves_the_direct_gradient(solver: str, value: float, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(ihvp_solver=solver)
    monkeypatch.setattr(
        model.solver, "solve", lambda curvature, alpha: Solution(th.full_like(curvature.g, value), th.tensor(ok))
    )
    model.learn(32)
    assert logged(model)["correction_skipped"] == 2
    assert not differences(without_correction(), state_of(model))


def test_only_failures_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(n_epochs=2)
    assert model.solver is not None
    original, calls = model.solver.solve, 0

    def solve(*args: Any) -> Solution:
        nonlocal calls
        calls += 1
        solution = original(*args)
        return solution._replace(ok=th.tensor(False)) if calls == 2 else solution

    monkeypatch.setattr(model.solver, "solve", solve)
    values = logged(model.learn(16))
    assert calls == 4 and values["correction_skipped"] == 1
    # Averages are those of the minibatches that have a correction
    assert all(math.isfinite(value) for value in values.values())
    assert differences(state_of(small(ihvp_solver="none", n_epochs=2).learn(16)), state_of(model))


def test_overflow_in_the_correction_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    # The second gradient of each minibatch is the correction's
    spoil_gradient(monkeypatch, model, "actor", {2: INF, 4: NAN}, entry=0)
    model.learn(16)
    assert logged(model)["correction_skipped"] == 2
    assert not differences(state_of(small(ihvp_solver="none").learn(16)), state_of(model))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_curvature_that_is_not_finite(solver: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever linear algebra makes of it, no error escapes."""

    def gram(self: LayerJacobian, rows: th.Tensor | None = None) -> th.Tensor:
        return self.values.new_full((len(self.values if rows is None else rows), len(self.values)), value)

    monkeypatch.setattr(LayerJacobian, "gram", gram)
    model = small(ihvp_solver=solver).learn(32)
    assert logged(model)["correction_skipped"] == 2
    assert not differences(without_correction(), state_of(model))


@pytest.mark.parametrize(("solver", "sketch"), [("nystrom", "columns"), ("nystrom", "gaussian"), ("nystrom_cg", "values")])
def test_eigenvalues_that_do_not_converge(solver: str, sketch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def eigh(*args: Any, **kwargs: Any) -> None:
        raise th.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(th.linalg, "eigh", eigh)
    model = small(ihvp_solver=solver, ihvp_kwargs={"rank": 6, "sketch": sketch}, curvature="hessian").learn(32)
    assert logged(model)["correction_skipped"] == 2
    assert not differences(without_correction(), state_of(model))


class DeadCritic(ActorCriticPolicy):
    """A critic whose only trainable parameters have no effect: curvature and damping are zero."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.value_net.requires_grad_(False)
        hidden: Any = self.mlp_extractor.value_net[0]
        nn.init.constant_(hidden.bias, -1e3)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_critic_without_gradient(solver: str, curvature: str) -> None:
    settings: dict[str, Any] = {"policy": DeadCritic, "policy_kwargs": {"net_arch": [8], "activation_fn": nn.ReLU}}
    model = small(ihvp_solver=solver, curvature=curvature, **settings).learn(32)
    # Nothing to respond with: no correction, be it skipped or zero
    assert not differences(without_correction(**settings), state_of(model))


def test_cg_on_an_indefinite_hessian() -> None:
    """Errors far larger than the values make the Hessian indefinite, where the iteration means nothing."""
    settings: dict[str, Any] = {"env": SpaceEnv(reward_scale=1e4), "batch_size": 16}
    model = small(ihvp_solver="cg", curvature="hessian", **settings).learn(32)
    assert logged(model)["correction_skipped"] == 1
    settings["env"] = SpaceEnv(reward_scale=1e4)
    assert not differences(without_correction(**settings), state_of(model))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("reward_scale", [1e-12, 1e4, 1e12])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_no_scale_of_rewards_breaks_a_solver(solver: str, reward_scale: float, curvature: str) -> None:
    model = small(env=SpaceEnv(reward_scale=reward_scale), ihvp_solver=solver, curvature=curvature, max_correction_ratio=None)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(32)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))
    if curvature == "gauss_newton":
        assert logged(model)["correction_skipped"] == 0


def test_failures_are_recorded_for_other_critics_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("CnnPolicy", SpaceEnv(IMAGE), ihvp_kwargs={"rank": 2})
    monkeypatch.setattr(model.solver, "solve", lambda curvature, alpha: Solution(curvature.g, th.tensor(False)))
    skipped: list[float] = []
    model.learn(48, callback=AtRolloutStart(lambda m: skipped.append(logged(m).get("correction_skipped", -1))))
    assert skipped == [-1, 2, 2]


def test_any_other_error_in_the_middle_of_a_minibatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong after the critic's nested updates, the distribution's own refusal for instance, they are undone."""
    model = small(n_epochs=2)
    original, calls = model.actor.likelihood, 0

    def likelihood(*args: Any) -> ActionLikelihood:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("Expected parameter loc")
        return original(*args)

    monkeypatch.setattr(model.actor, "likelihood", likelihood)
    starts = [state_of(model)]
    model.policy.optimizer.register_step_post_hook(lambda *_: starts.append(state_of(model)))
    with pytest.raises(ValueError, match="Expected parameter"):
        model.learn(16)
    assert len(starts) == 3
    assert not differences(starts[-1], state_of(model))

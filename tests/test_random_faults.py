"""
Random faults: NaN, infinity or a huge number, anywhere and at any time. None is lost: training stops with an error and all is
as at the start of the minibatch, or the correction is dropped and that is counted, or a huge number leads to finite ones.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from envs import DISCRETE, TORQUES, SpaceEnv, vec_env
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from models import AtRolloutStart, actor_of, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from test_faults import NormedExtractor

from sb3_blpo import BLPO
from sb3_blpo.actor_critic import ActionLikelihood
from sb3_blpo.checks import CURVATURES, IHVP_SOLVERS, SKETCHES
from sb3_blpo.curvature import Curvature
from sb3_blpo.ihvp import Solution, Solver
from sb3_blpo.jacobian import Jacobian
from sb3_blpo.segments import Segment


class Fault:
    """
    Spoils what goes through it, once.

    :param value: What it puts there
    :param call: Which of the things that go through it, from 1
    :param position: Which element of it, modulo their number; ``None``: all
    """

    def __init__(self, value: float, call: int, position: int | None) -> None:
        self.value, self.call, self.position = value, call, position
        self.seen = 0

    @property
    def happened(self) -> bool:
        return self.seen >= self.call

    def __call__(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self(part) for part in x)
        self.seen += 1
        if self.seen != self.call:
            return x
        spoilt = np.full(x.shape, self.position is None)
        if self.position is not None:
            spoilt.flat[self.position % spoilt.size] = True
        if isinstance(x, np.ndarray):
            return np.where(spoilt, self.value, x).astype(x.dtype)
        here = th.as_tensor(spoilt)
        # Not a constant: its derivative is at fault, too
        factor = th.where(here & (x != 0), self.value / x.detach(), 1)
        return x * factor + th.where(here & (x == 0), self.value, 0)


def no_fault(x: Any) -> Any:
    return x


class FaultyVecEnv(VecEnvWrapper):
    """
    Environments of which one output is at fault.

    :param venv: Environments that are in order
    """

    spoil: dict[str, Callable[[Any], Any]]

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.spoil = {}

    def reset(self) -> Any:
        return self.spoil.get("observations", no_fault)(self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if info.get("TimeLimit.truncated"):
                spoil = self.spoil.get("terminal observations", no_fault)
                info["terminal_observation"] = spoil(info["terminal_observation"])
        spoil_observations, spoil_rewards = (self.spoil.get(name, no_fault) for name in ("observations", "rewards"))
        return spoil_observations(observations), spoil_rewards(rewards), dones, infos


Injection = Callable[[BLPO, Fault, pytest.MonkeyPatch], Any]


def environment(output: str) -> Injection:
    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        env: Any = model.env
        while not isinstance(env, FaultyVecEnv):
            env = env.venv
        env.spoil = {output: fault}

    return inject


def gradient(network: str) -> Injection:
    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        if network == "critic":
            follower = model.critic.loss_and_gradient

            def loss_and_gradient(*args: Any) -> tuple[th.Tensor, th.Tensor]:
                loss, vector = follower(*args)
                return loss, fault(vector)

            monkeypatch.setattr(model.critic, "loss_and_gradient", loss_and_gradient)
        else:
            leader = model.actor.likelihood

            def likelihood(*args: Any) -> ActionLikelihood:
                found = leader(*args)
                return found._replace(gradient=lambda *by: fault(found.gradient(*by)))

            monkeypatch.setattr(model.actor, "likelihood", likelihood)

    return inject


def classes(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for subclass in base.__subclasses__():
        yield from classes(subclass)


def result(method: str, *bases: type) -> Injection:
    """Of a method, in whatever subclass defines it."""

    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(original: Callable[..., Any], *args: Any) -> Any:
            value = original(*args)
            if isinstance(value, Solution):
                return value._replace(coefficients=fault(value.coefficients))
            return fault(value)

        for cls in (cls for base in bases for cls in classes(base) if method in vars(cls)):
            monkeypatch.setattr(cls, method, functools.partialmethod(functools.partial(faulty, vars(cls)[method])))

    return inject


def values(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    model.policy.value_net.register_forward_hook(lambda module, inputs, output: fault(output))


class Site(NamedTuple):
    """
    Where a fault happens.

    :param inject: Put it there
    :param n_calls: How often something is seen there, about
    :param arguments: Of the model, without which nothing is
    """

    inject: Injection
    n_calls: int
    arguments: dict[str, Any] = {}  # noqa: RUF012


SITES = {
    "rewards": Site(environment("rewards"), 32),
    "observations": Site(environment("observations"), 32),
    "terminal observations": Site(environment("terminal observations"), 2),
    "log-probabilities": Site(result("log_prob", CategoricalDistribution, DiagGaussianDistribution), 40),
    "values": Site(values, 60),
    "actor's gradient": Site(gradient("actor"), 8),
    "critic's gradient": Site(gradient("critic"), 24),
    "right side": Site(result("return_gradient", Segment), 8),
    "solution": Site(result("solve", Solver), 8),
    "H v": Site(result("H_v", Curvature), 8),
    "inner products": Site(result("dot", Curvature), 8),
    "sketch": Site(result("sketch", Curvature), 16, {"ihvp_solver": "nystrom"}),
    "dense matrix": Site(result("dense", Curvature), 8, {"ihvp_solver": "exact"}),
    "values of the solution": Site(result("to_values", Curvature), 8),
    "J v": Site(result("J_v", Jacobian), 16, {"curvature": "hessian"}),
    "J^T w": Site(result("Jt_w", Jacobian), 16, {"curvature": "hessian"}),
    "Hessian v": Site(result("hessian_v", Jacobian), 16, {"curvature": "hessian"}),
    "Hessian columns": Site(result("columns", Jacobian), 8, {"ihvp_solver": "nystrom", "ihvp_kwargs": {"sketch": "columns"}}),
    "Gram matrix": Site(result("gram", Jacobian), 8, {"curvature": "gauss_newton"}),
    "trace": Site(result("squared_norm", Jacobian), 8),
}

FAULTS = st.builds(
    Fault,
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e38, -1e38]),
    st.just(0),
    st.none() | st.integers(0, 1000),
)
MODELS = st.fixed_dictionaries(
    {
        "n_envs": st.integers(1, 2),
        "actions": st.sampled_from([DISCRETE, TORQUES]),
        "normalize": st.booleans(),
        "trained": st.booleans(),
        "ihvp_solver": st.sampled_from([solver for solver in IHVP_SOLVERS if solver != "none"]),
        "curvature": st.sampled_from(CURVATURES),
        "ihvp_kwargs": st.fixed_dictionaries({"rank": st.integers(1, 6), "sketch": st.sampled_from(SKETCHES)}),
        "max_correction_ratio": st.none() | st.just(1.0),
        "normalize_advantage": st.booleans(),
        "policy_kwargs": st.sampled_from(
            [
                {"net_arch": [8]},
                {"net_arch": [8], "activation_fn": th.nn.ReLU},
                {"net_arch": [8], "features_extractor_class": NormedExtractor},
                {"net_arch": [8], "optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
            ]
        ),
    }
)

#: What may be said of a fault
MESSAGES = re.compile(
    r"The rollout's `.*` hold NaN or infinity, so BLPO stopped before any weight was changed\."
    r"|The (critic's|actor's|largest of|approximate) .* is (nan|inf|-inf) in update \d+, after \d+ timesteps; "
    r"networks and optimizers were put back to the start of that minibatch\. .*"
)


def finite(state: dict[str, Any]) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in state.values() if isinstance(leaf, th.Tensor))


def make(n_envs: int, actions: Any, normalize: bool, trained: bool, **arguments: Any) -> BLPO:
    env: VecEnv = vec_env(SpaceEnv(action_space=actions), n_envs)
    # Whose statistics would keep NaN
    model = small(env=FaultyVecEnv(VecNormalize(env) if normalize else env), n_epochs=2, **arguments)
    return model.learn(16 * n_envs) if trained else model


@pytest.mark.parametrize("site", SITES)
@settings(
    max_examples=max(3, settings().max_examples // 10),
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(fault=FAULTS, arguments=MODELS, data=st.data())
def test_random_fault(site: str, fault: Fault, arguments: dict[str, Any], data: Any) -> None:
    inject, n_calls, needed = SITES[site]
    arguments |= needed | {"ihvp_kwargs": arguments["ihvp_kwargs"] | needed.get("ihvp_kwargs", {})}
    model = make(**arguments)
    total_timesteps = 32 * model.n_envs
    starts, skipped, stopped = [state_of(model)], 0.0, False
    model.policy.optimizer.register_step_post_hook(lambda *_: starts.append(state_of(model)))

    def count(model: BLPO) -> None:
        nonlocal skipped
        skipped += logged(model).get("correction_skipped", 0)

    fault.call = data.draw(st.integers(1, n_calls), label="call")
    with pytest.MonkeyPatch.context() as monkeypatch:
        inject(model, fault, monkeypatch)
        try:
            model.learn(total_timesteps, AtRolloutStart(count))
        except ValueError as error:
            assert MESSAGES.fullmatch(str(error)), str(error)
            stopped = True
        assume(fault.happened)
        fault.call = 0
    count(model)
    state = state_of(model)
    assert finite(state) and not differences(starts[-1], state)
    if not (stopped or skipped or math.isfinite(fault.value)):
        # Then it was in what only the log needs: the same as with a fault that never happens
        reference = make(**arguments)
        with pytest.MonkeyPatch.context() as monkeypatch:
            inject(reference, Fault(fault.value, 0, None), monkeypatch)
            reference.learn(total_timesteps)
        assert not differences(state_of(reference), state)
        event("without effect")
    else:
        event("stopped" if stopped else "skipped" if skipped else "finite")
    actor, critic = actor_of(model), critic_of(model)
    model.learn(16 * model.n_envs)
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))

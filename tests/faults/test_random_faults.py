"""
Random faults: NaN, infinity or a huge number, anywhere and at any time. None is lost: training stops with an error, all is as
before that update, and it goes on as if nothing had been; or the correction is dropped and that is counted; or a huge number
leads to finite ones.
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
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from models import collect_rollout, differences, logged, parameters_of, small
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from test_faults import KINDS, check_recovery, everything

from sb3_blpo import BLPO
from sb3_blpo.checks import CURVATURES, IHVP_SOLVERS, SKETCHES
from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp import Solution, Solver
from sb3_blpo.jacobian import Jacobian, Rows
from sb3_blpo.rollout import Rollout


class Fault:
    """
    Spoils what goes through it, once.

    :param value: What it puts there
    :param call: Which of the things that go through it, from 1; 0: none
    :param position: Which element of it, modulo their number; ``None``: all
    """

    def __init__(self, value: float, call: int, position: int | None) -> None:
        self.value, self.call, self.position = value, call, position
        self.seen = 0

    @property
    def happened(self) -> bool:
        return self.seen >= self.call

    def __call__(self, x: Any) -> Any:
        self.seen += 1
        if self.seen != self.call:
            return x
        spoilt = np.full(x.shape, self.position is None)
        if self.position is not None:
            spoilt.flat[self.position % spoilt.size] = True
        if isinstance(x, np.ndarray):
            return np.where(spoilt, self.value, x).astype(x.dtype)
        # Times a number where there is one, so that its derivative is at fault, too
        here = th.as_tensor(spoilt)
        factor = th.where(here & (x != 0), self.value / x.detach(), 1)
        return x * factor + th.where(here & (x == 0), self.value, 0)


# In the environment


class FaultyVecEnv(VecEnvWrapper):
    """
    Environments of which one output is at fault.

    :param venv: Environments that are in order
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.output, self.fault = "", Fault(0.0, 0, None)

    def spoil(self, output: str, x: Any) -> Any:
        return self.fault(x) if output == self.output else x

    def reset(self) -> Any:
        return self.spoil("observations", self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if info.get("TimeLimit.truncated"):
                info["terminal_observation"] = self.spoil("terminal observations", info["terminal_observation"])
        return self.spoil("observations", observations), self.spoil("rewards", rewards), dones, infos


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
        "trained": st.booleans(),
        "ihvp_solver": st.sampled_from([solver for solver in IHVP_SOLVERS if solver != "none"]),
        "curvature": st.sampled_from(CURVATURES),
        "ihvp_kwargs": st.fixed_dictionaries({"rank": st.integers(1, 6), "sketch": st.sampled_from(SKETCHES)}),
        "max_correction_ratio": st.none() | st.just(1.0),
        "normalize_advantage": st.booleans(),
        "policy_kwargs": st.sampled_from([*KINDS.values(), {"net_arch": [8], "activation_fn": th.nn.ReLU}]),
    }
)
LIMITS = settings(
    max_examples=max(3, settings().max_examples // 10),
    phases=[Phase.generate],  # an example is as small as it can be
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.differing_executors],
)
IN_ROLLOUT = re.compile(r"The rollout's `.*` hold NaN or infinity, so BLPO stopped before any weight was changed\.")
IN_UPDATE = re.compile(
    r"The (critic's|actor's|advantages|corrected|parameter|buffer) ?.* is not finite in update \d+, after \d+ timesteps; "
    r"networks and optimizers were put back to what they were before it\. .*"
)


def make(n_envs: int, actions: Any, trained: bool, normalize: bool = False, **arguments: Any) -> BLPO:
    env: VecEnv = vec_env(SpaceEnv(action_space=actions), n_envs)
    # VecNormalize's statistics would keep NaN
    env = FaultyVecEnv(VecNormalize(env) if normalize else env)
    model = small(env=env, n_epochs=2, n_critic_updates=2, **arguments)
    return model.learn(16 * n_envs) if trained else model


def check_finite(model: BLPO) -> None:
    assert all(
        bool(leaf.isfinite().all())
        for name, leaf in everything(model).items()
        if isinstance(leaf, th.Tensor) and "mask" not in name
    )


@pytest.mark.parametrize("output", ["rewards", "observations", "terminal observations"])
@LIMITS
@given(fault=FAULTS, arguments=MODELS, normalize=st.booleans(), call=st.integers(1, 20))
@pytest.mark.filterwarnings("ignore:.*value encountered:RuntimeWarning")
def test_random_fault_in_the_environment(
    output: str, fault: Fault, arguments: dict[str, Any], normalize: bool, call: int
) -> None:
    model = make(normalize=normalize, **arguments)
    env: Any = model.env
    env.output, env.fault, fault.call = output, fault, call
    before = everything(model)
    try:
        model.learn(16 * model.n_envs)
    except ValueError as error:
        assert IN_ROLLOUT.fullmatch(str(error)) or IN_UPDATE.fullmatch(str(error)), str(error)
        assert not differences(before, everything(model))
        event("stopped")
    else:
        assert math.isfinite(fault.value) or not fault.happened
    assume(fault.happened)
    env.output = ""
    check_finite(model)
    check_recovery(model)


# In an update

Injection = Callable[[BLPO, Fault, pytest.MonkeyPatch], Any]


def classes(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for subclass in base.__subclasses__():
        yield from classes(subclass)


def result(method: str, base: type) -> Injection:
    """Of a method, in whatever subclass defines it."""

    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(original: Callable[..., Any], *args: Any) -> Any:
            value = original(*args)
            return value._replace(v=fault(value.v)) if isinstance(value, Solution) else fault(value)

        for cls in (cls for cls in classes(base) if method in vars(cls)):
            monkeypatch.setattr(cls, method, functools.partialmethod(functools.partial(faulty, vars(cls)[method])))

    return inject


def output(layer: str) -> Injection:
    """What a network says."""

    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Any:
        return getattr(model.policy, layer).register_forward_hook(lambda module, inputs, output: fault(output))

    return inject


def gradient(optimizer: str) -> Injection:
    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Any:
        return parameters_of(optimizer_of(model, optimizer))[0].register_hook(fault)

    return inject


def optimizer_of(model: BLPO, which: str) -> th.optim.Optimizer:
    return model.critic_optimizer if which == "critic" else model.policy.optimizer


def after_step(which: str, pick: Callable[[BLPO, th.optim.Optimizer], th.Tensor]) -> Injection:
    """Something that a step, of the critic's or the actor's optimizer, leaves behind."""

    def inject(model: BLPO, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Any:
        def spoil(optimizer: th.optim.Optimizer, *_: Any) -> None:
            x = pick(model, optimizer)
            x.data.copy_(fault(x.detach().clone()))

        return optimizer_of(model, which).register_step_post_hook(spoil)

    return inject


def parameter(model: BLPO, optimizer: th.optim.Optimizer) -> th.Tensor:
    return parameters_of(optimizer)[0]


def momentum(model: BLPO, optimizer: th.optim.Optimizer) -> th.Tensor:
    return list(optimizer.state[parameters_of(optimizer)[0]].values())[-1]


def statistics(model: BLPO, optimizer: th.optim.Optimizer) -> th.Tensor:
    return model.policy.get_buffer("vf_features_extractor.body.1.running_var")


class Site(NamedTuple):
    """
    Where a fault happens.

    :param inject: Put it there. What it returns has a ``remove()``, or monkeypatch does it
    :param n_calls: How often something is seen there in an update, about
    :param arguments: Of the model, without which nothing is
    """

    inject: Injection
    n_calls: int
    arguments: dict[str, Any] = {}  # noqa: RUF012


BUFFERS = {"policy_kwargs": KINDS["buffers"]}
LAYERS = {"policy_kwargs": KINDS["Adam"]}
SITES = {
    "values": Site(output("value_net"), 24),
    "logits": Site(output("action_net"), 6),
    "critic's gradient": Site(gradient("critic"), 8),
    "actor's gradient": Site(gradient("actor"), 4),
    "critic's parameter": Site(after_step("critic", parameter), 8),
    "actor's parameter": Site(after_step("actor", parameter), 4),
    "critic's momentum": Site(after_step("critic", momentum), 8),
    "actor's momentum": Site(after_step("actor", momentum), 4),
    "batch statistics": Site(after_step("critic", statistics), 8, BUFFERS),
    "right side": Site(result("return_gradient", Rollout), 1),
    "solution": Site(result("solve", Solver), 1),
    "H v": Site(result("H_v", GaussNewton), 6),
    "J^T c": Site(result("gradient", Jacobian), 1),
    "change of values": Site(result("to_values", Jacobian), 1),
    "eligibility trace": Site(result("eligibility_trace", Rollout), 1),
    "J v": Site(result("J_v", Rows), 8, LAYERS),
    "J^T w": Site(result("Jt_w", Rows), 8, LAYERS),
    "Gram matrix": Site(result("gram", Rows), 4, {"ihvp_kwargs": {"sketch": "values"}}),
    "squared norms": Site(result("squared_norms", Rows), 2),
    "Hessian v": Site(result("hessian_v", Jacobian), 6, {"curvature": "hessian"}),
}


@pytest.mark.parametrize("site", SITES)
@LIMITS
@given(fault=FAULTS, arguments=MODELS, data=st.data())
def test_random_fault_in_an_update(site: str, fault: Fault, arguments: dict[str, Any], data: Any) -> None:
    inject, n_calls, needed = SITES[site]
    arguments |= needed | {"engine": "torch", "ihvp_kwargs": arguments["ihvp_kwargs"] | needed.get("ihvp_kwargs", {})}
    model = collect_rollout(make(**arguments))
    before, generator = everything(model), th.get_rng_state()
    stopped, fault.call = False, data.draw(st.integers(1, n_calls), label="call")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hook = inject(model, fault, monkeypatch)
        try:
            model.train()
        except ValueError as error:
            assert IN_UPDATE.fullmatch(str(error)), str(error)
            stopped = True
        if hook is not None:
            hook.remove()
    assume(fault.happened)
    check_finite(model)
    twin = collect_rollout(make(**arguments))
    if stopped:
        event("stopped")
        assert not differences(before, everything(model))
        th.set_rng_state(generator)
        model.train()
    elif math.isfinite(fault.value):
        event("finite")
        return
    elif logged(model)["correction_skipped"]:
        event("skipped")
        twin.ihvp_solver = "none"
    elif site in ("values", "J^T w") or (site == "logits" and fault.value == -math.inf):
        return  # another kind of Jacobian was chosen, which is right as well; an action was masked
    else:
        event("without effect")  # in what only the log needs
    th.set_rng_state(generator)
    twin.train()
    assert not differences(everything(twin), everything(model))
    check_recovery(model)

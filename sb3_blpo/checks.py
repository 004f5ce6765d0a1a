"""What BLPO refuses, before it touches a weight, and in which words."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

IHVP_SOLVERS = ("nystrom", "cg", "nystrom_cg", "exact", "none")
CURVATURES = ("gauss_newton", "hessian")
SKETCHES = ("values", "gaussian", "columns")


def as_schedule(name: str, value: float | Schedule) -> FloatSchedule:
    """SB3's schedule of an argument; a ValueError if it starts at a value that is not allowed."""
    # SB3's refuses numpy's numbers
    schedule = FloatSchedule(value if callable(value) else float(value))
    scheduled(name, schedule, 1.0)
    return schedule


def scheduled(name: str, value: float | Schedule, progress_remaining: float) -> float:
    """An argument's value at this progress, from 1 to 0; a ValueError if it is negative, NaN or infinite, or no number."""
    now: Any = FloatSchedule(value)(progress_remaining) if callable(value) else value
    if not NON_NEGATIVE.check(now):
        raise ValueError(f"`{name}` must be finite and >= 0, but is {now!r} at progress_remaining={progress_remaining}.")
    return float(now)


def check_finite(name: str, array: Any) -> None:
    """A ValueError if an array of a rollout, or a dictionary of arrays, holds NaN or infinity."""
    arrays = {f"{name}[{key!r}]": part for key, part in array.items()} if isinstance(array, dict) else {name: array}
    for quantity, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"The rollout's `{quantity}` hold NaN or infinity, so BLPO stopped before any weight was changed."
            )


def finite(name: str, x: th.Tensor) -> th.Tensor:
    """The quantity itself; a FloatingPointError with its name, of which ``train()`` makes a sentence, if it is not finite."""
    if not x.isfinite().all():
        raise FloatingPointError(name)
    return x


def _is(kind: type[Real] | type[Integral], value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool | np.bool_)


class WrongArgument(ValueError, AssertionError):
    """An argument that BLPO refuses. An AssertionError as well, as SB3's algorithms raise, so that callers catch either."""


class Rule(NamedTuple):
    """What is allowed of an argument, in words and as a function."""

    allowed: str
    check: Callable[[Any], bool]


POSITIVE_INTEGER = Rule("an integer of at least 1", lambda x: _is(Integral, x) and x >= 1)
FRACTION = Rule("a number in [0, 1]", lambda x: _is(Real, x) and 0 <= x <= 1)
POSITIVE = Rule("a number > 0", lambda x: _is(Real, x) and 0 < x)
POSITIVE_FINITE = Rule("a finite number > 0", lambda x: _is(Real, x) and 0 < x < math.inf)
NON_NEGATIVE = Rule("a finite number >= 0", lambda x: _is(Real, x) and 0 <= x < math.inf)
RATE = Rule(
    "a finite number >= 0 or a schedule (a function of the progress remaining)",
    lambda x: callable(x) or NON_NEGATIVE.check(x),
)


def one_of(*names: str) -> Rule:
    return Rule("one of " + ", ".join(map(repr, names)), lambda x: isinstance(x, str) and x in names)


def or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed} or None", lambda x: x is None or rule.check(x))


ARGUMENT_RULES: dict[str, Rule] = {
    "learning_rate": RATE,
    "n_steps": POSITIVE_INTEGER,
    "batch_size": POSITIVE_INTEGER,
    "n_epochs": POSITIVE_INTEGER,
    "gamma": FRACTION,
    "gae_lambda": FRACTION,
    "clip_range": RATE,
    "clip_range_vf": Rule("None: the critic has a loss of its own and takes no part in the actor's step", lambda x: x is None),
    "normalize_advantage": Rule("True or False", lambda x: isinstance(x, bool | np.bool_)),
    "ent_coef": RATE,
    "vf_coef": NON_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "target_kl": or_none(POSITIVE_FINITE),
    "critic_learning_rate": or_none(RATE),
    "n_critic_updates": POSITIVE_INTEGER,
    "critic_rollouts": or_none(POSITIVE_INTEGER),
    "ihvp_solver": one_of(*IHVP_SOLVERS),
    "ihvp_kwargs": or_none(Rule("a dictionary", lambda x: isinstance(x, dict))),
    "ihvp_interval": or_none(POSITIVE_INTEGER),
    "curvature": one_of(*CURVATURES),
    "max_correction_ratio": or_none(NON_NEGATIVE),
    "engine": one_of("auto", "torch", "numba"),
}
IHVP_RULES: dict[str, Rule] = {
    "damping": POSITIVE_FINITE,
    "rank": POSITIVE_INTEGER,
    "sketch": one_of(*SKETCHES),
    "max_iter": POSITIVE_INTEGER,
    "tol": NON_NEGATIVE,
}


def check(name: str, rule: Rule, value: Any) -> None:
    if not rule.check(value):
        raise WrongArgument(f"`{name}` must be {rule.allowed}, got {value!r}.")


def check_arguments(model: Any) -> None:
    """Check all of BLPO's arguments; here, and not in the constructor, because ``load`` sets them after it."""
    for name, rule in ARGUMENT_RULES.items():
        check(name, rule, getattr(model, name))
    for key, value in (model.ihvp_kwargs or {}).items():
        if key not in IHVP_RULES:
            raise WrongArgument(f"`ihvp_kwargs` takes {', '.join(map(repr, IHVP_RULES))}, got {key!r}.")
        check(f"ihvp_kwargs[{key!r}]", IHVP_RULES[key], value)

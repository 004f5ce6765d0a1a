"""The gradient steps of both levels. An engine knows networks and optimizers; what they are trained on comes from outside."""

import contextlib
import functools
import os
import warnings
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_blpo.engines.torch import ActorPass, TorchEngine
from sb3_blpo.policies import MlpPolicy

__all__ = ["ActorPass", "TorchEngine", "compiled_acting", "make_engine"]


def make_engine(
    engine: str, torch_engine: type[TorchEngine], policy: ActorCriticPolicy, critic_optimizer: th.optim.Optimizer,
    **settings: Any,
) -> tuple[TorchEngine, str]:  # fmt: skip
    """
    :param engine: "numba" (compiled), "torch" or "auto": the compiled one where it serves
    :param torch_engine: The one with autograd
    :return: An engine, and which one it is and why
    :raises ValueError: If it shall be the compiled one, which cannot serve
    """
    if engine == "torch":
        return torch_engine(policy, critic_optimizer, **settings), "torch (as chosen)"
    reason = _numba_is_missing()
    if reason is None:
        from sb3_blpo.engines.numba import NumbaEngine, serves

        reason = serves(policy, critic_optimizer)
        if reason is None:
            return NumbaEngine(policy, critic_optimizer, **settings), "numba"
    if engine == "numba":
        raise ValueError(f"`engine`='numba' cannot train this model: {reason}; use 'auto' or 'torch'.")
    return torch_engine(policy, critic_optimizer, **settings), f"torch ({reason})"


def compiled_acting(engine: str, policy: ActorCriticPolicy) -> contextlib.AbstractContextManager[None]:
    """A context in which the policy acts by compiled calls, where it can."""
    if engine == "torch" or not isinstance(policy, MlpPolicy) or _numba_is_missing() is not None:
        return contextlib.nullcontext()
    from sb3_blpo.engines.acting import acting

    return acting(policy)


@functools.cache
def _numba_is_missing() -> str | None:
    """Why numba cannot be used at all; looked up, and said in a warning, once."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    try:
        import sb3_blpo.engines.numba  # noqa: F401
    except Exception as error:  # not installed, or not for this NumPy
        warnings.warn(f"BLPO trains without its compiled engine, several times slower: {error}", stacklevel=2)
        return f"{type(error).__name__} on importing numba"
    return None

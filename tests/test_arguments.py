"""What the constructor refuses and in which words, what it takes, and that every argument is documented."""

import importlib
import inspect
import math
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import IMAGE, TORQUES, SpaceEnv, vec_env
from models import SMALL, OwnCNN, Seen, moved, small
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import nn

import sb3_blpo
from sb3_blpo import BLPO
from sb3_blpo.checks import ARGUMENT_RULES, IHVP_RULES
from sb3_blpo.optimizers import parameters_of

NAN, INF = math.nan, math.inf

INTEGER = "an integer of at least 1"
NO_INTEGERS = [0, -1, 1.5, 8.0, True, NAN, INF, "8", None, [8], np.bool_(True)]
FRACTION = "a number in [0, 1]"
NO_FRACTIONS = [-0.01, 1.5, NAN, INF, -INF, "0.9", None, True, [0.9], 1j]
RATE = "a finite number >= 0 or a schedule"
NO_RATES = [-1e-9, NAN, INF, -INF, "3e-4", None, True, [1e-3], np.array([1e-3])]
NON_NEGATIVE = "a finite number >= 0"
NO_NON_NEGATIVES = [-1e-9, NAN, INF, "0", True, [0.0]]
POSITIVE = "number > 0"
NO_POSITIVES = [0, 0.0, -0.5, NAN, -INF, "1", True]

#: By argument: what the message says is allowed, and what is not
WRONG: dict[str, tuple[str, list[Any]]] = {
    "learning_rate": (RATE, NO_RATES),
    "critic_learning_rate": (RATE, NO_RATES),
    "n_steps": (INTEGER, NO_INTEGERS),
    "batch_size": (INTEGER, NO_INTEGERS),
    "n_epochs": (INTEGER, NO_INTEGERS),
    "n_critic_updates": (INTEGER, NO_INTEGERS),
    "gamma": (FRACTION, NO_FRACTIONS),
    "gae_lambda": (FRACTION, NO_FRACTIONS),
    "clip_range": (RATE, NO_RATES),
    "normalize_advantage": ("True or False", [1, 0, None, "True", NAN]),
    "ent_coef": (NON_NEGATIVE, [*NO_NON_NEGATIVES, None, "auto"]),
    "max_grad_norm": (POSITIVE, [*NO_POSITIVES, None]),
    "ihvp_solver": ("'nystrom', 'cg', 'nystrom_cg', 'exact', 'none'", ["newton", "", None, 1, True, ["cg"], "Nystrom"]),
    "ihvp_kwargs": ("a dictionary or None", [[("rank", 5)], "rank=5", 5, True]),
    "curvature": ("'gauss_newton', 'hessian'", ["fisher", None, 1, ""]),
    "max_correction_ratio": ("a finite number >= 0 or None", NO_NON_NEGATIVES),
    "target_kl": ("a finite number > 0 or None", [*NO_POSITIVES, INF]),
}
WRONG_IHVP: dict[str, tuple[str, list[Any]]] = {
    "damping": (POSITIVE, [*NO_POSITIVES, INF, None]),
    "rank": (INTEGER, NO_INTEGERS),
    "sketch": ("'gaussian', 'columns'", ["normal", None, 1]),
    "max_iter": (INTEGER, NO_INTEGERS),
    "tol": (NON_NEGATIVE, [*NO_NON_NEGATIVES, None]),
}


def cases(table: dict[str, tuple[str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(name, value, allowed, id=f"{name}={value!r}")
        for name, (allowed, values) in table.items()
        for value in values
    ]


def refusal(**arguments: Any) -> str:
    """The message of the error that these arguments raise: one sentence."""
    with pytest.raises(ValueError) as error:
        small(**arguments)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_the_tables_cover_every_rule() -> None:
    assert WRONG.keys() == ARGUMENT_RULES.keys()
    assert WRONG_IHVP.keys() == IHVP_RULES.keys()


@pytest.mark.parametrize(("name", "value", "allowed"), cases(WRONG))
def test_wrong_value(name: str, value: Any, allowed: str) -> None:
    message = refusal(**{name: value})
    assert f"`{name}`" in message
    assert f"got {value!r}" in message
    assert allowed in message


@pytest.mark.parametrize(("name", "value", "allowed"), cases(WRONG_IHVP))
def test_wrong_value_in_ihvp_kwargs(name: str, value: Any, allowed: str) -> None:
    message = refusal(ihvp_kwargs={name: value})
    assert f"`ihvp_kwargs['{name}']`" in message
    assert f"got {value!r}" in message
    assert allowed in message


@pytest.mark.parametrize("solver", ["nystrom", "cg", "exact", "none"])
def test_settings_that_do_not_concern_the_solver_are_checked_too(solver: str) -> None:
    assert "`ihvp_kwargs['tol']`" in refusal(ihvp_solver=solver, ihvp_kwargs={"rank": 3, "tol": -1})


@pytest.mark.parametrize("key", ["nystrom_rank", "Rank", "", 3])
def test_unknown_key_in_ihvp_kwargs_lists_the_known_ones(key: Any) -> None:
    message = refusal(ihvp_kwargs={"damping": 0.1, key: 5})
    assert "`ihvp_kwargs`" in message and f"got {key!r}" in message
    for known in ("damping", "rank", "sketch", "max_iter", "tol"):
        assert repr(known) in message


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "clip_range"])
@pytest.mark.parametrize("value", [-0.1, NAN, INF, None, "0.1"])
def test_wrong_value_of_a_schedule(name: str, value: Any) -> None:
    message = refusal(**{name: lambda _: value})
    assert f"`{name}`" in message and ">= 0" in message
    assert f"is {value!r} at progress_remaining=1.0" in message


def test_rates_set_later() -> None:
    """By the way that SB3's `_setup_lr_schedule` offers."""
    model = small()
    model.learning_rate, model.critic_learning_rate = 1e-5, 2e-5
    model._setup_lr_schedule()
    model.learn(16)
    optimizers = (model.policy.optimizer, model.critic_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [1e-5, 2e-5]


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "clip_range"])
@pytest.mark.parametrize("value", [-0.1, NAN])
def test_schedule_that_goes_wrong_during_training(name: str, value: float) -> None:
    model = small(**{name: lambda progress: 0.1 if progress > 0.4 else value})
    with pytest.raises(ValueError, match=f"`{name}` must be finite and >= 0, but is {value}"):
        model.learn(32)
    assert model.num_timesteps == 32


# The first rollout of a model with each of these must be learnt from, without a warning
ACCEPTED: list[dict[str, Any]] = [
    {"learning_rate": 0, "critic_learning_rate": 0, "clip_range": 0},
    {"learning_rate": 0.0, "critic_learning_rate": 0.0, "clip_range": 0.0},
    {"learning_rate": np.float32(1e-3), "critic_learning_rate": np.float64(1e-3), "clip_range": np.float32(0.2)},
    {"learning_rate": np.int64(0), "critic_learning_rate": lambda progress: np.float32(1e-3 * progress)},
    {"learning_rate": lambda progress: np.array(1e-3), "critic_learning_rate": lambda progress: th.tensor(1e-3)},
    {"n_steps": np.int64(16), "batch_size": np.int32(8), "n_epochs": np.int8(1), "n_critic_updates": np.uint8(1)},
    {"gamma": 0},
    {"gamma": 1, "gae_lambda": 0},
    {"gamma": np.float32(1), "gae_lambda": np.float32(1)},
    {"gamma": 1.0, "gae_lambda": 1.0, "ihvp_solver": "exact"},
    {"normalize_advantage": np.bool_(True), "ent_coef": np.float32(0.01)},
    {"max_grad_norm": INF},
    {"max_grad_norm": np.float32(1e-30)},
    {"max_correction_ratio": 0},
    {"max_correction_ratio": None, "ihvp_kwargs": None},
    {"target_kl": 1e-300},
    {"ihvp_kwargs": {}},
    {"ihvp_kwargs": {"rank": 10**6}},
    {"ihvp_kwargs": {"rank": np.int64(10**6), "sketch": "columns"}},
    {"ihvp_kwargs": {"rank": 1, "sketch": "columns", "damping": 1e-30}},
    {"ihvp_kwargs": {"damping": np.float32(1e3), "tol": 0, "max_iter": 1}, "ihvp_solver": "cg"},
    {"policy_kwargs": {"net_arch": []}},
    {"policy_kwargs": {"net_arch": []}, "ihvp_solver": "nystrom_cg", "curvature": "hessian"},
    {"batch_size": 10**9},
    {"batch_size": 1, "n_steps": 1},
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=[",".join(arguments) for arguments in ACCEPTED])
def test_extreme_values_are_taken(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = small(**arguments).learn(16)
    assert all(tensor.isfinite().all() for tensor in model.policy.state_dict().values())
    assert math.isfinite(model.logger.name_to_value["train/loss"])


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", 1.5), ("critic_learning_rate", -1.0), ("ihvp_kwargs", {"ranks": 5}), ("curvature", "fisher")]
)
def test_load_checks_too(name: str, value: Any, tmp_path: Path) -> None:
    small().save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"`{name}`"):
        BLPO.load(tmp_path / "model", **{name: value})


def test_size_limits_are_checked_by_load(tmp_path: Path) -> None:
    small(policy_kwargs={"net_arch": [150, 150]}).save(tmp_path / "model")
    with pytest.raises(ValueError, match="at most 20000"):
        BLPO.load(tmp_path / "model", ihvp_solver="exact", curvature="hessian")


def test_exact_hessian_of_a_large_critic() -> None:
    large: dict[str, Any] = {"policy_kwargs": {"net_arch": [150, 150]}, "ihvp_solver": "exact"}
    n_parameters = 4 * 150 + 151 * 150 + 151
    message = refusal(curvature="hessian", **large)
    assert "`ihvp_solver`='exact'" in message and "at most 20000 parameters" in message and f"has {n_parameters}" in message
    small(curvature="gauss_newton", **large)
    small(curvature="hessian", **(large | {"ihvp_solver": "cg"}))
    small(curvature="hessian", ihvp_solver="exact", policy_kwargs={"net_arch": [100, 100]})


def test_exact_with_a_large_jacobian() -> None:
    own: dict[str, Any] = {"net_arch": [], "features_extractor_class": OwnCNN}
    images: dict[str, Any] = {"policy": "CnnPolicy", "policy_kwargs": own, "n_steps": 256}
    message = refusal(env=SpaceEnv(IMAGE), ihvp_solver="exact", batch_size=256, **images)
    assert "`ihvp_solver`='exact'" in message and f"at most {64 * 2**20} bytes" in message and "256 transitions" in message
    # 2 environments of 64 steps fill a minibatch, 4 would as well
    message = refusal(env=vec_env(SpaceEnv(IMAGE), 4), ihvp_solver="exact", batch_size=256, **(images | {"n_steps": 64}))
    assert "256 transitions" in message
    small(env=vec_env(SpaceEnv(IMAGE), 2), ihvp_solver="exact", batch_size=256, **(images | {"n_steps": 64}))
    small(env=SpaceEnv(IMAGE), ihvp_solver="nystrom", batch_size=256, **images)
    # Nor does the Hessian
    small(env=SpaceEnv(), ihvp_solver="exact", curvature="hessian", n_steps=2048, batch_size=2048,
          policy_kwargs={"net_arch": [96, 96], "activation_fn": nn.PReLU})  # fmt: skip
    # Critics made of Linear layers and convolutions never form the Jacobian
    small("CnnPolicy", SpaceEnv(IMAGE), ihvp_solver="exact", n_steps=256, batch_size=256)
    small(ihvp_solver="exact", n_steps=4096, batch_size=4096, policy_kwargs={"net_arch": [64, 64]})


@pytest.mark.parametrize(
    ("n_envs", "batch_size", "truncated"),
    [
        (1, 8, None), (1, 16, None), (1, 1, None), (1, 5, 1), (1, 6, 4), (1, 15, 1), (1, 17, None), (1, 1000, None),
        (3, 8, None), (3, 6, 4), (3, 16, None), (3, 24, None), (3, 32, 16), (3, 47, 16), (3, 48, None), (3, 1000, None),
    ],
)  # fmt: skip
def test_warning_of_a_truncated_minibatch(
    n_envs: int, batch_size: int, truncated: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(env=vec_env(SpaceEnv(), n_envs), batch_size=batch_size)
    messages = [str(warning.message) for warning in caught if "mini-batch" in str(warning.message)]
    assert len(messages) == (truncated is not None)
    # What is warned of is what happens
    seen = Seen(monkeypatch)
    model.learn(16 * n_envs)
    sizes = sorted(segment.n_transitions for segment in seen.segments)
    assert sum(sizes) == 16 * n_envs
    if truncated is None:
        assert len(set(sizes)) == 1
    else:
        assert len(set(sizes)) == 2 and sizes[0] == truncated
        assert f"mini-batch size of {batch_size}" in messages[0]
        assert f"truncated mini-batch of size {truncated}\n" in messages[0]


class SharedTrunk(MlpExtractor):
    """A layer in front of both networks, which belongs to both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trunk = nn.Linear(3, 3)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return super().forward_actor(self.trunk(features))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return super().forward_critic(self.trunk(features))


class SharingPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = SharedTrunk(self.features_dim, self.net_arch, self.activation_fn, self.device)


class IdlePolicy(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("policy", "tensor", "owner"),
    [(SharingPolicy, "mlp_extractor.trunk.weight", "both"), (IdlePolicy, "spare.weight", "neither")],
)
@pytest.mark.parametrize("continuous", [False, True])
def test_parameter_of_both_networks_or_of_neither(
    policy: type[ActorCriticPolicy], tensor: str, owner: str, continuous: bool
) -> None:
    env = SpaceEnv(action_space=TORQUES) if continuous else SpaceEnv()
    message = refusal(policy=policy, env=env)
    assert f"`{tensor}` of {policy.__name__}" in message and f"belongs to {owner}" in message


class FrozenTrunk(SharingPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.trunk.requires_grad_(False)


def test_frozen_parameters_may_be_shared_and_stay() -> None:
    model = small(FrozenTrunk)
    trunk: Any = model.policy.mlp_extractor.trunk
    frozen = [parameter.clone() for parameter in trunk.parameters()]
    model.learn(32)
    assert not moved(frozen, list(trunk.parameters()))
    trained = {id(p) for optimizer in (model.policy.optimizer, model.critic_optimizer) for p in parameters_of(optimizer)}
    assert trained == {id(p) for p in model.policy.parameters() if p.requires_grad}


def documented() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every public function, class and method of the package, and the docstring that describes its parameters."""
    names = [sb3_blpo.__name__, *(m.name for m in pkgutil.walk_packages(sb3_blpo.__path__, "sb3_blpo."))]
    for module in map(importlib.import_module, names):
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing, inspect.getdoc(thing) or ""
            elif inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing, thing.__doc__ or ""
                for key, member in vars(thing).items():
                    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    if not key.startswith("_") and inspect.isfunction(function):
                        docs = [getattr(getattr(base, key, None), "__doc__", None) or "" for base in thing.__mro__]
                        # An override may say what is special about it and leave the parameters to the base class
                        doc = next((doc for doc in docs if ":param" in doc), next(filter(None, docs), ""))
                        yield f"{module.__name__}.{name}.{key}", function, doc


@pytest.mark.parametrize(("thing", "doc"), [pytest.param(thing, doc, id=name) for name, thing, doc in documented()])
def test_parameters_are_documented_in_order(thing: Callable[..., Any], doc: str) -> None:
    assert doc, "no docstring"
    parameters = [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]
    assert re.findall(r"^\s*:param (\w+):", doc, flags=re.MULTILINE) == parameters
    if not inspect.isclass(thing) and inspect.signature(thing).return_annotation not in (None, "None"):
        assert ":return:" in doc


def test_the_search_for_docstrings_finds_the_package() -> None:
    names = [name for name, _, _ in documented()]
    for name in ("blpo.BLPO", "blpo.BLPO.train", "gae.LambdaReturn", "ihvp.nystrom.Nystrom.solve", "segments.Segment.trace"):
        assert f"sb3_blpo.{name}" in names


def test_signature() -> None:
    """Users and benchmarks rely on these names and their order."""
    assert list(inspect.signature(BLPO).parameters) == [
        "policy", "env", "learning_rate", "critic_learning_rate", "n_steps", "batch_size", "n_epochs", "n_critic_updates",
        "gamma", "gae_lambda", "clip_range", "normalize_advantage", "ent_coef", "max_grad_norm", "ihvp_solver", "ihvp_kwargs",
        "curvature", "max_correction_ratio", "target_kl", "use_sde", "sde_sample_freq", "rollout_buffer_class",
        "rollout_buffer_kwargs", "stats_window_size", "tensorboard_log", "policy_kwargs", "verbose", "seed", "device",
        "_init_setup_model",
    ]  # fmt: skip


def test_arguments_are_not_changed() -> None:
    ihvp_kwargs, policy_kwargs = {"rank": 3}, {"net_arch": [4]}
    BLPO("MlpPolicy", SpaceEnv(), **(SMALL | {"ihvp_kwargs": ihvp_kwargs, "policy_kwargs": policy_kwargs}))
    assert (ihvp_kwargs, policy_kwargs) == ({"rank": 3}, {"net_arch": [4]})

"""The arguments: PPO's and BLPO's own, what is refused and in which words, whenever it is set."""

import inspect
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import TORQUES, SpaceEnv, vec_env
from models import SMALL, AtRolloutStart, changed, collect_rollout, differences, logged, parameters_of, small, state_of
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from torch import nn

from sb3_blpo import BLPO, MaskableBLPO
from sb3_blpo.checks import ARGUMENT_RULES, IHVP_RULES

NAN, INF = math.nan, math.inf
INTEGER = ("an integer of at least 1", [0, 1.5, 8.0, True, NAN, "8"])
FRACTION = ("a number in [0, 1]", [-0.01, 1.5, NAN, "0.9", True, None])
RATE = ("a finite number >= 0 or a schedule", [-1e-9, NAN, INF, "3e-4", True, [1e-3]])
NON_NEGATIVE = ("a finite number >= 0", [-1e-9, NAN, INF, "0", True])
POSITIVE = ("number > 0", [0, -0.5, NAN, "1", True])

#: By argument: what the message says is allowed, and what is not
WRONG: dict[str, tuple[str, list[Any]]] = {
    "learning_rate": RATE,
    "n_steps": INTEGER,
    "batch_size": INTEGER,
    "n_epochs": INTEGER,
    "gamma": FRACTION,
    "gae_lambda": FRACTION,
    "clip_range": RATE,
    "clip_range_vf": ("None: the critic has a loss of its own", [0.2, 0, FloatSchedule(0.2)]),
    "normalize_advantage": ("True or False", [1, None, "True"]),
    "ent_coef": RATE,
    "vf_coef": NON_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "target_kl": ("a finite number > 0 or None", [0, -0.5, NAN, INF, "1"]),
    "critic_learning_rate": RATE,
    "n_critic_updates": INTEGER,
    "critic_rollouts": INTEGER,
    "ihvp_solver": ("'nystrom', 'cg', 'nystrom_cg', 'exact', 'none'", ["newton", None, 1, "Nystrom"]),
    "ihvp_kwargs": ("a dictionary or None", [[("rank", 5)], "rank=5", 5]),
    "ihvp_interval": INTEGER,
    "curvature": ("'gauss_newton', 'hessian'", ["fisher", None]),
    "max_correction_ratio": ("a finite number >= 0 or None", [-1e-9, NAN, INF, "0", True]),
    "engine": ("one of 'auto', 'torch', 'numba'", ["Torch", None, True]),
}
WRONG_IHVP: dict[str, tuple[str, list[Any]]] = {
    "damping": ("a finite number > 0", [0, -0.5, NAN, INF, None]),
    "rank": INTEGER,
    "sketch": ("'values', 'gaussian', 'columns'", ["normal", None]),
    "max_iter": INTEGER,
    "tol": NON_NEGATIVE,
}


def refusal(action: Any) -> str:
    """The message of the error that this raises: one sentence."""
    with pytest.raises(ValueError) as error:
        action()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_the_tables_cover_every_rule() -> None:
    assert WRONG.keys() == ARGUMENT_RULES.keys() and WRONG_IHVP.keys() == IHVP_RULES.keys()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_value(name: str, tmp_path: Path) -> None:
    """In the constructor, when a model is loaded, and when it is set between two updates: nothing is trained on it."""
    allowed, values = WRONG[name]
    model = small()
    model.save(tmp_path / "model")
    collect_rollout(model)
    before, right = state_of(model), getattr(model, name)
    for value in values:
        setattr(model, name, value)
        for action in (
            model.train,
            lambda value=value: BLPO.load(tmp_path / "model", device="cpu", **{name: value}),
            lambda value=value: small(**{name: value}),
        ):
            message = refusal(action)
            assert f"`{name}` must be " in message and allowed in message and f"got {value!r}." in message
    assert not differences(before, state_of(model))
    setattr(model, name, right)
    assert changed(model, model.train)


@pytest.mark.parametrize("name", WRONG_IHVP)
def test_wrong_value_in_ihvp_kwargs(name: str) -> None:
    allowed, values = WRONG_IHVP[name]
    for value in values:
        # Those that do not concern the solver are checked, too
        message = refusal(lambda value=value: small(ihvp_solver="none", ihvp_kwargs={name: value}))
        assert f"`ihvp_kwargs['{name}']` must be " in message and allowed in message and f"got {value!r}." in message


def test_unknown_key_in_ihvp_kwargs_lists_the_known_ones() -> None:
    message = refusal(lambda: small(ihvp_kwargs={"damping": 0.1, "nystrom_rank": 5}))
    assert "`ihvp_kwargs`" in message and "got 'nystrom_rank'" in message and all(repr(key) in message for key in IHVP_RULES)


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate", "clip_range", "ent_coef"])
@pytest.mark.parametrize("value", [-0.1, NAN, INF])
def test_wrong_value_of_a_schedule(name: str, value: float) -> None:
    """At its start, and in the middle of training, where the update that it was for does not happen."""
    message = refusal(lambda: small(**{name: lambda progress: value}))
    assert f"`{name}` must be finite and >= 0, but is {value!r} at progress_remaining=1" in message
    model = small(**{name: lambda progress: 0.1 if progress > 0.4 else value})
    starts: list[dict[str, Any]] = []
    message = refusal(lambda: model.learn(32, AtRolloutStart(lambda model: starts.append(state_of(model)))))
    assert f"`{name}` must be finite and >= 0, but is {value!r} at progress_remaining=0" in message
    assert len(starts) == 2 and not differences(starts[-1], state_of(model))


def test_settings_changed_between_updates_count() -> None:
    model = small().learn(16)
    model.learning_rate, model.critic_learning_rate, model.clip_range = 1e-5, LinearSchedule(2e-5, 2e-5, 1.0), 0.05
    model.learn(16)
    optimizers = (model.policy.optimizer, model.critic_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([1e-5, 2e-5])
    assert logged(model)["clip_range"] == 0.05


@pytest.mark.parametrize(("name", "of_buffer"), [("n_steps", "buffer_size"), ("gamma", "gamma"), ("gae_lambda", "gae_lambda")])
def test_settings_of_the_rollout_buffer_cannot_change_alone(name: str, of_buffer: str, tmp_path: Path) -> None:
    model = small().learn(16)
    model.save(tmp_path / "model")
    value: Any = getattr(model, name) / 2 if name != "n_steps" else 8
    setattr(model, name, value)
    message = refusal(lambda: model.learn(16))
    assert f"`{name}` is {value}" in message and f"load(..., {name}={value})" in message
    model = BLPO.load(tmp_path / "model", SpaceEnv(), device="cpu", **{name: value}).learn(16)
    assert getattr(model.rollout_buffer, of_buffer) == value


# A rollout of a model with each of these must be learnt from, without a warning
ACCEPTED: list[dict[str, Any]] = [
    {"learning_rate": 0, "critic_learning_rate": 0.0, "clip_range": 0},
    {"learning_rate": np.float32(1e-3), "critic_learning_rate": np.float64(1e-3), "clip_range": np.float32(0.2)},
    {"learning_rate": lambda progress: np.array(1e-3), "critic_learning_rate": lambda progress: th.tensor(1e-3)},
    {"n_steps": np.int64(16), "batch_size": np.int32(8), "n_epochs": np.int8(1), "n_critic_updates": np.uint8(1)},
    {"gamma": 1, "gae_lambda": 0},
    {"gamma": np.float32(1), "gae_lambda": np.float32(1), "ihvp_solver": "exact"},
    {"normalize_advantage": np.bool_(True), "ent_coef": np.float32(0.01)},
    {"ent_coef": lambda progress: np.float32(0.01 * progress)},
    {"ent_coef": lambda progress: th.tensor(0.01 * progress)},
    {"max_grad_norm": INF},
    {"max_grad_norm": np.float32(1e-30), "target_kl": 1e-300},
    {"max_correction_ratio": None, "ihvp_kwargs": None, "ihvp_interval": 10**6, "critic_rollouts": np.int64(10**6)},
    {"ihvp_kwargs": {"rank": np.int64(10**6), "sketch": "columns"}},
    {"ihvp_kwargs": {"rank": 1, "damping": 1e-30}},
    {"ihvp_kwargs": {"damping": np.float32(1e3), "tol": 0, "max_iter": 1}, "ihvp_solver": "cg"},
    {"policy_kwargs": {"net_arch": []}, "ihvp_solver": "nystrom_cg", "curvature": "hessian"},
    {"batch_size": 1, "n_steps": 1, "normalize_advantage": False},
]


@pytest.mark.parametrize("arguments", ACCEPTED, ids=[",".join(arguments) for arguments in ACCEPTED])
def test_extreme_values_are_taken(arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = small(**arguments).learn(16)
    assert all(tensor.isfinite().all() for tensor in model.policy.state_dict().values())


def test_arguments_are_not_changed() -> None:
    ihvp_kwargs, policy_kwargs = {"rank": 3}, {"net_arch": [4]}
    small(ihvp_kwargs=ihvp_kwargs, policy_kwargs=policy_kwargs).learn(16)
    assert (ihvp_kwargs, policy_kwargs) == ({"rank": 3}, {"net_arch": [4]})


@pytest.mark.parametrize(
    ("curvature", "large", "what"),
    [
        ("hessian", {"policy_kwargs": {"net_arch": [80, 80]}}, f"critic parameters, got {4 * 80 + 81 * 80 + 81}"),
        ("gauss_newton", {"n_steps": 5008}, "transitions in a rollout, got 5008"),
    ],
)
def test_dense_solve_of_a_large_system(curvature: str, large: dict[str, Any], what: str, tmp_path: Path) -> None:
    model = small(curvature=curvature, **large)
    model.save(tmp_path / "model")
    for action in (
        lambda: small(ihvp_solver="exact", curvature=curvature, **large),
        lambda: BLPO.load(tmp_path / "model", SpaceEnv(), device="cpu", ihvp_solver="exact"),
    ):
        message = refusal(action)
        assert "`ihvp_solver`='exact'" in message and "at most 5000" in message and what in message


# PPO's arguments


def parameters(cls: type) -> list[tuple[str, Any]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(cls).parameters.items()]


def test_signature_begins_with_that_of_ppo() -> None:
    of_ppo = parameters(PPO)
    assert parameters(BLPO)[: len(of_ppo)] == of_ppo


@pytest.mark.parametrize("cls", [BLPO, MaskableBLPO])
def test_every_argument_is_documented_in_order(cls: type) -> None:
    documented = re.findall(r"^\s*:param (\w+):", cls.__doc__ or "", flags=re.MULTILINE)
    assert documented == [name for name, _ in parameters(cls)]


#: As people tune PPO, in RL Zoo for instance
TUNED: list[tuple[list[Any], dict[str, Any]]] = [
    ([1e-3, 32, 256, 20, 0.98, 0.8, 0.2, None, True, 0.0, 0.5], {}),
    ([], {"n_steps": 16, "gae_lambda": 0.98, "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01, "batch_size": 64}),
    (
        [LinearSchedule(2.5e-4, 0.0, 1.0), 128],
        {"clip_range": LinearSchedule(0.1, 0.0, 1.0), "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01, "vf_coef": 0.5},
    ),
    (
        [2e-5],
        {
            "n_steps": 64, "batch_size": 64, "gamma": 0.98, "gae_lambda": 0.92, "max_grad_norm": 0.8, "target_kl": 0.03,
            "use_sde": True, "sde_sample_freq": 4, "normalize_advantage": False,
            "policy_kwargs": {"log_std_init": -2, "ortho_init": False, "activation_fn": nn.ReLU,
                              "net_arch": {"pi": [16, 16], "vf": [16, 16]}},
        },
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")
@pytest.mark.parametrize(("args", "kwargs"), TUNED)
def test_tuned_settings_of_ppo_are_taken(args: list[Any], kwargs: dict[str, Any]) -> None:
    classes: tuple[Any, Any] = (PPO, BLPO)
    ppo, model = (cls("MlpPolicy", SpaceEnv(action_space=TORQUES), *args, **kwargs) for cls in classes)
    model.learn(model.n_steps)
    for name in set(inspect.signature(PPO).parameters) - {"env", "policy", "_init_setup_model", "clip_range"}:
        given, taken = getattr(ppo, name, None), getattr(model, name, None)
        assert type(given) is type(taken) and (callable(given) or given == taken), name
    assert model.clip_range(0.5) == ppo.clip_range(0.5)


def test_vf_coef_has_no_effect_and_says_so() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = small(vf_coef=0.7).learn(32)
    assert sum("`vf_coef`=0.7 has no effect" in str(warning.message) for warning in caught) == 1
    assert not differences(state_of(small().learn(32)), state_of(model))


@pytest.mark.parametrize(("n_envs", "batch_size"), [(1, 8), (1, 5), (1, 1000), (3, 16), (3, 47)])
def test_warning_of_a_truncated_minibatch(n_envs: int, batch_size: int) -> None:
    """As PPO warns, and what is warned of is what happens."""
    messages = []
    classes: tuple[Any, Any] = (PPO, BLPO)
    for cls in classes:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = cls("MlpPolicy", vec_env(SpaceEnv(), n_envs), **(SMALL | {"batch_size": batch_size}))
        messages.append([str(warning.message) for warning in caught if "mini-batch" in str(warning.message)])
    assert messages[0] == messages[1]
    sizes: list[int] = []
    # What the critic's and the actor's steps are made from
    model.policy.value_net.register_full_backward_hook(lambda module, inputs, outputs: sizes.append(len(outputs[0])))
    model.policy.action_net.register_full_backward_hook(lambda module, inputs, outputs: sizes.append(-len(outputs[0])))
    model.learn(16 * n_envs)
    n = 16 * n_envs
    one_pass = [min(batch_size, n)] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    assert sizes[: 3 * len(one_pass)] == 3 * one_pass
    assert [-size for size in sizes if size < 0] == one_pass


# Whose parameters are whose


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


class FrozenTrunk(SharingPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.trunk.requires_grad_(False)


@pytest.mark.parametrize(
    ("policy", "tensor", "owner"),
    [(SharingPolicy, "mlp_extractor.trunk.weight", "both"), (IdlePolicy, "spare.weight", "neither")],
)
def test_parameter_of_both_networks_or_of_neither(policy: type[ActorCriticPolicy], tensor: str, owner: str) -> None:
    for actions in (TORQUES, SpaceEnv().action_space):
        message = refusal(lambda actions=actions: small(policy, SpaceEnv(action_space=actions)))
        assert f"`{tensor}` of {policy.__name__}" in message and f"belongs to {owner}" in message


def test_frozen_parameters_may_be_shared_and_stay() -> None:
    model = small(FrozenTrunk)
    names = changed(model, lambda: model.learn(32))
    assert names == {name for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    assert not any("trunk" in name for name in names) and len(parameters_of(model.critic_optimizer)) > 0

"""The compiled engine computes what torch's does, serves where it can, and leaves the rest to torch's."""

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import IMAGE, OBSERVATION_SPACES, TORQUES, Masked, SpaceEnv, vec_env
from gymnasium import spaces
from models import SMALL, actor_of, built_with, collect_rollout, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from threadpoolctl import threadpool_info
from torch import nn
from torch.nn.utils import parametrize

from sb3_blpo import BLPO, MaskableBLPO, response
from sb3_blpo.engines import kernels
from sb3_blpo.engines.kernels import CATEGORICAL, GAUSSIAN, IDENTITY, RELU, TANH, Network
from sb3_blpo.response import Correction


def updated(model: BLPO, engine: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Train on the rollout that is there by one of the engines; the model is then as it was. Return its state and its log."""
    before: Any = copy.deepcopy(model.get_parameters())
    former, n_updates = model._former_rollouts, model._n_updates
    model.engine = engine
    th.manual_seed(1)
    model.train()
    assert model.engine_in_use is not None and model.engine_in_use.startswith(engine)
    result = state_of(model), logged(model)
    model.set_parameters(before)
    model._former_rollouts, model._n_updates = former, n_updates
    return result


def freeze(model: BLPO) -> None:
    model.policy.log_std.requires_grad_(False)
    model.policy.mlp_extractor.value_net[0].requires_grad_(False)


def two_groups(model: BLPO) -> None:
    group = model.policy.optimizer.param_groups[0]
    last = group["params"].pop()
    model.policy.optimizer.add_param_group(
        {**group, "params": [last], "eps": 1e-3, "betas": (0.5, 0.9), "lr": 1e-4, "has_own_lr": True}
    )


ADAMW: dict[str, Any] = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
GRID: dict[str, dict[str, Any]] = {
    "Gaussian": {},
    "one environment": {"env": SpaceEnv(action_space=TORQUES)},
    "Categorical, ReLU": {"action_space": spaces.Discrete(3), "policy_kwargs": {"activation_fn": nn.ReLU}},
    "MultiCategorical": {"action_space": spaces.MultiDiscrete([3, 2]), "ent_coef": 0.05},
    "entropy of a Gaussian": {"ent_coef": 0.05},
    "entropy of a Categorical": {"action_space": spaces.Discrete(3), "ent_coef": 0.05},
    "masks": {"action_space": spaces.Discrete(5), "ent_coef": 0.05, "kind": MaskableBLPO},
    "masks of MultiDiscrete": {"action_space": spaces.MultiDiscrete([3, 4]), "ent_coef": 0.05, "kind": MaskableBLPO},
    "masks of MultiBinary": {"action_space": spaces.MultiBinary(3), "kind": MaskableBLPO, "batch_size": 7},
    "remainders": {"batch_size": 7},
    "full batch": {"batch_size": 32},
    "Discrete observations": {"observation_space": spaces.Discrete(4)},
    "MultiDiscrete observations": {"observation_space": spaces.MultiDiscrete([3, 4])},
    "float64 observations": {"observation_space": OBSERVATION_SPACES["Box2D"]},
    "no hidden layer": {"policy_kwargs": {"net_arch": []}},
    "different networks": {"policy_kwargs": {"net_arch": {"pi": [9], "vf": [8, 7]}}},
    "no normalisation": {"normalize_advantage": False, "max_correction_ratio": None},
    "much is clipped": {"clip_range": 0.01, "max_grad_norm": 0.01, "learning_rate": 0.01},
    "KL limit": {"target_kl": 1e-3, "n_epochs": 8},
    "one critic pass on this rollout": {"n_critic_updates": 1, "critic_rollouts": 1},
    "a solve every epoch": {"ihvp_interval": 1, "ihvp_solver": "cg"},
    "exact Hessian": {"curvature": "hessian", "ihvp_kwargs": {"damping": 1.0}},
    "no response": {"ihvp_solver": "none"},
    "AdamW": {"policy_kwargs": ADAMW},
    "weight decay": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}}},
    "frozen parts": {"change": freeze},
    "groups": {"change": two_groups},
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", GRID)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_both_engines_agree(name: str, trained: bool) -> None:
    settings = {"n_epochs": 3, "learning_rate": 3e-3} | GRID[name]
    action_space = settings.pop("action_space", TORQUES)
    env = SpaceEnv(settings.pop("observation_space", OBSERVATION_SPACES["Box"]), action_space)
    change: Callable[[BLPO], None] = settings.pop("change", lambda model: None)
    kind = settings.pop("kind", BLPO)
    settings["policy_kwargs"] = {"net_arch": [8, 8]} | settings.get("policy_kwargs", {})
    made = {"env": vec_env(env if kind is BLPO else Masked(env), 2), "engine": "torch"}
    model = kind("MlpPolicy", **(SMALL | {"ihvp_kwargs": {"rank": 6}} | made | settings))
    if trained:
        model.learn(64)
    change(model)
    collect_rollout(model)
    start = state_of(model)
    (by_torch, torch_log), (by_numba, numba_log) = (updated(model, engine) for engine in ("torch", "numba"))
    assert by_torch.keys() == by_numba.keys()
    changes = {key: float((by_torch[key] - start[key]).abs().max()) for key in start if key.startswith("policy/")}
    assert max(changes.values()) > 0
    for key, value in by_torch.items():
        if not isinstance(value, th.Tensor):
            assert by_numba[key] == value, key
            continue
        which, name_of_state = key.split("/")[0], key.split("/")[-1]
        of_its_kind = [by_torch[k].abs().max() for k in by_torch if k.startswith(which) and k.endswith(name_of_state)]
        # Moments and logs feel the float32 of the linear solve more than parameters do
        tolerance = 1e-5 * max(changes.values()) if which == "policy" else 5e-5 * float(max(of_its_kind))
        assert by_numba[key].dtype == value.dtype and by_numba[key].shape == value.shape
        assert float((by_numba[key] - value).abs().max()) <= tolerance, key
    assert torch_log.keys() == numba_log.keys()
    for key, number in torch_log.items():
        # The residual is a small difference of large numbers
        assert numba_log[key] == pytest.approx(number, rel=5e-5, abs=1e-4 if key == "ihvp_residual" else 1e-5), key
    if name == "KL limit":
        assert any(by_torch[key] < 2 * 8 * 4 for key in by_torch if key.startswith("actor/") and key.endswith("/step"))


class OwnDistribution(ActorCriticPolicy):
    """Its actions are less random."""

    def get_distribution(self, obs: Any) -> Any:
        return super().get_distribution(obs)


def replace_forward(model: BLPO) -> None:
    layer: Any = model.policy.action_net
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def replace_method(model: BLPO) -> None:
    policy = model.policy
    policy.predict_values = lambda obs: ActorCriticPolicy.predict_values(policy, obs)  # type: ignore[method-assign]


class Half(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x / 2


def halve(model: BLPO) -> None:
    parametrize.register_parametrization(model.policy.action_net, "bias", Half())


def pop_activation(policy: Any) -> None:
    policy.mlp_extractor.value_net.append(nn.Tanh())


def no_bias(policy: Any) -> None:
    policy.value_net = nn.Linear(8, 1, bias=False)
    policy.optimizer = th.optim.Adam(policy.parameters())


def other_parameter(policy: Any) -> None:
    policy.temperature = nn.Parameter(th.ones(1), requires_grad=False)


OTHERS: dict[str, dict[str, Any]] = {
    "images": {"policy": "CnnPolicy", "env": SpaceEnv(IMAGE)},
    "flat images": {"env": SpaceEnv(IMAGE)},
    "Bernoulli": {"env": SpaceEnv(action_space=spaces.MultiBinary(3))},
    "dictionaries": {"policy": "MultiInputPolicy", "env": SpaceEnv(spaces.Dict({"a": OBSERVATION_SPACES["Box"]}))},
    "gSDE": {"env": SpaceEnv(action_space=TORQUES), "use_sde": True},
    "another activation": {"policy_kwargs": {"activation_fn": nn.ELU}},
    "two activations": {"policy": built_with(pop_activation)},
    "no bias": {"policy": built_with(no_bias)},
    "another parameter": {"policy": built_with(other_parameter)},
    "another method": {"policy": OwnDistribution},
    "another optimizer": {"policy_kwargs": {"optimizer_class": th.optim.SGD}},
    "amsgrad": {"policy_kwargs": {"optimizer_kwargs": {"amsgrad": True}}},
}
CHANGES: dict[str, Callable[[BLPO], Any]] = {
    "a forward of a layer's own": replace_forward,
    "a method of the policy's own": replace_method,
    "a parametrization": halve,
    "a hook on a module": lambda m: m.policy.value_net.register_forward_hook(lambda *_: None),
    "a hook before a module": lambda m: m.policy.register_forward_pre_hook(lambda *_: None),
    "a hook on gradients": lambda m: m.policy.value_net.weight.register_hook(lambda gradient: gradient),
    "a hook after gradients": lambda m: m.policy.value_net.weight.register_post_accumulate_grad_hook(lambda p: None),
    "a hook on an optimizer": lambda m: m.critic_optimizer.register_step_post_hook(lambda *_: None),
    "a scheduler of torch's": lambda m: th.optim.lr_scheduler.ConstantLR(m.policy.optimizer),
}


@pytest.mark.parametrize("name", [*OTHERS, *CHANGES])
def test_torch_trains_what_is_not_sb3s_own(name: str) -> None:
    settings = {"policy_kwargs": {"net_arch": [8]}} | OTHERS.get(name, {})
    settings["policy_kwargs"] = {"net_arch": [8]} | settings["policy_kwargs"]
    model = small(**settings)
    CHANGES.get(name, lambda model: None)(model)
    actor, critic = actor_of(model), critic_of(model)
    collect_rollout(model).train()
    assert model.engine_in_use is not None and model.engine_in_use.startswith("torch (")
    assert moved(actor, actor_of(model)) and moved(critic, critic_of(model))
    model.engine = "numba"
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^`engine`='numba' cannot train this model: [^\n]+\.$"):
        model.train()
    assert not differences(before, state_of(model))


def test_global_hooks_lead_to_torch() -> None:
    model = collect_rollout(small())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model.train()
    finally:
        handle.remove()
    assert model.engine_in_use is not None and model.engine_in_use.startswith("torch (")
    model.train()
    assert model.engine_in_use == "numba"


def test_which_engine_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = small(verbose=1).learn(48)
    assert capsys.readouterr().out.count("Using engine numba") == 1
    model.engine = "torch"
    model.learn(32, reset_num_timesteps=False)
    assert capsys.readouterr().out.count("Using engine torch") == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"critic_learning_rate": 1e30},
        {"critic_learning_rate": 1e38, "n_critic_updates": 1},
        {"env": SpaceEnv(action_space=TORQUES), "ent_coef": 1e38},
        {"learning_rate": 1e38, "critic_learning_rate": 1e-3, "n_epochs": 3},
        {"env": SpaceEnv(reward_scale=1e25)},
    ],
    ids=["critic_diverges", "critic_overflows", "entropy", "actor_diverges", "rewards"],
)
def test_what_is_not_finite_is_refused_in_the_same_words(settings: dict[str, Any]) -> None:
    messages = []
    for engine in ("torch", "numba"):
        model = collect_rollout(small(engine=engine, **copy.deepcopy(settings)))
        before = state_of(model)
        with pytest.raises(ValueError, match="is not finite in update 1") as error:
            model.train()
        assert not differences(before, state_of(model))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_nothing_of_the_model_changes_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = collect_rollout(small(env=SpaceEnv(action_space=TORQUES), n_epochs=2))
    before = state_of(model)
    seen: list[list[str]] = []

    def correct(*arguments: Any) -> Correction:
        seen.append([name for name in differences(before, state_of(model)) if not name.endswith("/lr")])
        return response.correct(*arguments)

    monkeypatch.setattr("sb3_blpo.bilevel.correct", correct)
    model.train()
    assert seen == [[], []] and differences(before, state_of(model))


def test_blas_threads_are_put_back() -> None:
    def n_threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    model = small(engine="numba").learn(16)
    before = n_threads()
    model.learn(16)
    assert n_threads() == before


def test_a_loaded_model_keeps_its_engine(tmp_path: Any) -> None:
    small(engine="torch").save(tmp_path / "model.zip")
    model = BLPO.load(tmp_path / "model.zip", env=SpaceEnv())
    assert model.engine == "torch" and model.engine_in_use is None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (OBSERVATION_SPACES["Box"], TORQUES),
        (OBSERVATION_SPACES["Box2D"], spaces.Box(-1, 1, (2, 2), np.float32)),
        (OBSERVATION_SPACES["Discrete"], spaces.Discrete(3)),
        (OBSERVATION_SPACES["MultiBinary"], spaces.MultiDiscrete([3, 2])),
    ],
    ids=str,
)
def test_acting_is_the_same(observation_space: spaces.Space, action_space: spaces.Space, trained: bool) -> None:
    """Actions, values and log-probabilities, for the same noise; the generator is at the same place afterwards."""
    buffers, draws = [], []
    for engine in ("torch", "numba"):
        model = small(env=vec_env(SpaceEnv(observation_space, action_space), 2), engine="torch")
        if trained:
            model.learn(64)
        model.engine = engine
        buffers.append(collect_rollout(model).rollout_buffer)
        draws.append(th.rand(1))
    assert draws[0] == draws[1]
    for name in ("observations", "actions", "values", "log_probs", "advantages"):
        by_torch, by_numba = (getattr(buffer, name) for buffer in buffers)
        assert by_torch.dtype == by_numba.dtype
        np.testing.assert_allclose(by_numba, by_torch, rtol=1e-4, atol=1e-5)


class Looking(BaseCallback):
    """Calls a function with the model in the middle of each rollout."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        if self.n_calls % 16 == 8:
            self.function(self.model)
        return True


@th.no_grad()
def add(model: BLPO) -> None:
    bias: Any = model.policy.action_net.bias
    bias.add_(th.tensor([1.0, 0.0, -1.0]))


def replace_data(model: BLPO) -> None:
    model.policy.value_net.bias.data = th.tensor([5.0])


@pytest.mark.parametrize("change", [add, replace_data])
def test_weights_that_a_callback_changes_act_at_once(change: Callable[[BLPO], None]) -> None:
    model = small(engine="numba")
    callback = Looking(change)
    model._setup_learn(16)
    callback.init_callback(model)
    assert model.env is not None
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    buffer = model.rollout_buffer
    with th.no_grad():
        values, log_prob, _ = model.policy.evaluate_actions(
            th.tensor(buffer.observations[8:, 0]), th.tensor(buffer.actions[8:, 0, 0])
        )
    np.testing.assert_allclose(buffer.values[8:, 0], values.flatten(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(buffer.log_probs[8:, 0], log_prob, rtol=1e-5, atol=1e-6)


def test_copies_made_while_acting_act_for_themselves() -> None:
    copies: list[Any] = []
    model = small(engine="numba")
    model.learn(16, Looking(lambda m: copies.extend([copy.deepcopy(m.policy), pickle.loads(pickle.dumps(m.policy))])))
    observations = th.rand(5, 3)
    for policy in copies:
        with th.no_grad():
            policy.value_net.bias.fill_(7.0)
            policy.value_net.weight.zero_()
            assert policy(observations)[1].flatten().tolist() == [7.0] * 5
            assert model.policy(observations)[1].flatten().tolist() != [7.0] * 5


def test_hooks_see_how_the_model_acts() -> None:
    calls: list[int] = []
    model = small()
    model.policy.action_net.register_forward_hook(lambda *_: calls.append(1))
    collect_rollout(model)
    assert len(calls) == 16


def test_a_forward_of_the_users_acts() -> None:
    calls: list[int] = []

    class Counting(ActorCriticPolicy):
        def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
            calls.append(1)
            return super().forward(obs, deterministic)

    model = small(Counting).learn(16)
    assert len(calls) >= 16 and model.engine_in_use == "numba"


def test_two_models_in_two_threads() -> None:
    models = [small(env=vec_env(SpaceEnv(action_space=TORQUES), 2), engine="numba") for _ in range(2)]
    before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda model: model.learn(320), models))
    assert all(parameter.isfinite().all() for model in models for parameter in model.policy.parameters())
    assert [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"] == before


PROGRAM = """
import warnings, torch as th
from envs import SpaceEnv
from sb3_blpo import BLPO, response
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        model = BLPO("MlpPolicy", SpaceEnv(), n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8)
print(model.engine_in_use, sum("compiled engine" in str(warning.message) for warning in caught))
"""


@pytest.mark.parametrize(
    ("disabled", "expected"), [(True, "torch (NUMBA_DISABLE_JIT is set) 0"), (False, "torch (ImportError")]
)
def test_without_numba(disabled: bool, expected: str, tmp_path: Any) -> None:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"} if disabled else dict(os.environ)
    if not disabled:
        (tmp_path / "numba.py").write_text("raise ImportError('no numba here')")
        path = os.pathsep.join([str(tmp_path), path])
    environment["PYTHONPATH"] = path
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(expected) and result.stdout.split()[-1] == ("0" if disabled else "1")


def test_without_a_cache() -> None:
    namespace: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", namespace)  # numba finds no file to keep a cache for
    assert kernels.compiled(namespace["twice"])(3) == 6


# The kernels, in float64


def network(sizes: list[int], activations: list[int], n_others: int = 0, batch_size: int = 6) -> Network:
    """Random parameters, one span, Adam's state after some steps."""
    rng = np.random.default_rng(0)
    layers, n, n_outputs = [], 0, 0
    for n_in, n_out, activation in zip(sizes[:-1], sizes[1:], activations, strict=True):
        layers.append([n_in, n_out, n, n + n_in * n_out, n_outputs, activation])
        n, n_outputs = n + (n_in + 1) * n_out, n_outputs + n_out
    n += n_others
    parameters, gradient, exp_avg = rng.standard_normal((3, n))
    return Network(
        parameters, gradient, exp_avg, rng.uniform(1, 2, n), np.array(layers), np.array([[0, n]]),
        np.array([[1e-2, 0.9, 0.99, 1e-3, 0.1, 0.0]]), np.array([3.0]), np.empty((batch_size, sizes[0])),
        np.empty(batch_size * n_outputs), np.empty((2, batch_size * max(sizes[1:]))),
    )  # fmt: skip


def slopes(function: Callable[[], Any], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of a function by each entry of what it reads (x.size, ...)."""
    rows = []
    for i in np.ndindex(x.shape):
        start = x[i]
        ends = []
        for sign in (1, -1):
            x[i] = start + sign * step
            ends.append(np.array(function()))
        x[i] = start
        rows.append((ends[0] - ends[1]) / (2 * step))
    return np.array(rows)


@pytest.mark.parametrize("activations", [[TANH, TANH, IDENTITY], [RELU, TANH, IDENTITY], [IDENTITY]], ids=str)
def test_gradient_of_the_critics_loss(activations: list[int]) -> None:
    net = network([3, 5, 4, 1] if len(activations) == 3 else [3, 1], activations)
    rng = np.random.default_rng(1)
    x, returns, index = rng.standard_normal((6, 3)), rng.standard_normal(9), np.array([4, 0, 8, 2, 2, 7])
    d = kernels.deltas(net, len(activations) - 1, 6)[0]

    def loss() -> float:
        return kernels.squared_error(kernels.forward(net, x)[0], returns, index, d)

    values = kernels.forward(net, x)[0].copy()
    assert loss() == pytest.approx(np.mean((values - returns[index]) ** 2), rel=1e-12)
    kernels.backward(net, x)
    gradient = net.gradient.copy()
    np.testing.assert_allclose(gradient, slopes(loss, net.parameters), rtol=1e-6, atol=1e-8)
    assert kernels.gradient_norm(net) == pytest.approx(np.linalg.norm(gradient), rel=1e-12)


def test_signals_of_each_layer() -> None:
    """By a layer's bias, the derivative of a value is that by the layer's W h + b."""
    net = network([3, 5, 4, 1], [TANH, RELU, IDENTITY])
    x = np.random.default_rng(1).standard_normal((6, 3))
    flat = np.empty_like(net.outputs)
    kernels.signals(net, x, flat)
    for layer in net.layers:
        exact = slopes(lambda: kernels.forward(net, x)[0].copy(), kernels.bias(net.parameters, layer))
        np.testing.assert_allclose(kernels.outputs(flat, layer, 6), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "choices"), [(GAUSSIAN, [3]), (CATEGORICAL, [3]), (CATEGORICAL, [3, 2])])
def test_distributions(kind: int, choices: list[int]) -> None:
    n_out = sum(choices)
    net = network([2, n_out], [IDENTITY], n_out if kind == GAUSSIAN else 0)
    rng = np.random.default_rng(1)
    y, by_log_prob, by_entropy = rng.standard_normal((n_out, 6)), rng.standard_normal(6), 0.3
    log_std = net.parameters[-n_out:]
    log_prob, entropy = np.empty(6), np.empty(6)
    parts: list[th.distributions.Distribution]
    if kind == GAUSSIAN:
        actions = rng.standard_normal((6, n_out))
        parts = [th.distributions.Normal(th.tensor(y.T), th.tensor(log_std).exp())]
    else:
        actions = np.stack([rng.integers(0, n, 6) for n in choices], axis=1).astype(float)
        logits = th.tensor(y.T.copy()).split(choices, dim=1)
        parts = [th.distributions.Categorical(logits=part) for part in logits]
    choices_array = np.array(choices)

    def evaluated() -> tuple[np.ndarray, np.ndarray]:
        assert kernels.evaluate(net, kind, choices_array, y.copy(), actions, log_prob, entropy)
        return log_prob, entropy

    one = kind == CATEGORICAL
    taken = [th.tensor(actions[:, k]) for k in range(len(choices))] if one else [th.tensor(actions)]
    exact = [sum(f(p, a).reshape(6, -1).sum(1) for p, a in zip(parts, taken, strict=True))
             for f in (lambda p, a: p.log_prob(a), lambda p, a: p.entropy())]  # fmt: skip
    for given, true in zip(evaluated(), exact, strict=True):
        np.testing.assert_allclose(given, np.asarray(true), rtol=1e-12, atol=1e-12)

    def total() -> float:
        return float(by_log_prob @ evaluated()[0] + by_entropy * entropy.sum())

    seen, d = y.copy(), np.empty_like(y)
    kernels.evaluate(net, kind, choices_array, seen, actions, log_prob, entropy)
    kernels.evaluate_gradient(net, kind, choices_array, seen, actions, by_log_prob, by_entropy, d)
    np.testing.assert_allclose(d.flatten(), slopes(total, y), rtol=1e-6, atol=1e-8)
    if kind == GAUSSIAN:
        np.testing.assert_allclose(net.gradient[-n_out:], slopes(total, log_std), rtol=1e-6, atol=1e-8)


def test_surrogate() -> None:
    rng = np.random.default_rng(0)
    index = np.array([5, 1, 7, 0, 3, 2])
    old, W = rng.standard_normal((2, 8))
    log_prob = old[index] + np.array([-0.5, -0.1, 0.0, 0.1, 0.5, 0.6])
    row = np.empty(5)

    def loss() -> float:
        kernels.surrogate(log_prob.copy(), old, W, index, 0.2, row)
        return row[2]

    exact = slopes(loss, log_prob)
    ratio = np.exp(log_prob - old[index])
    loss()
    assert row[0] == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), rel=1e-12) and row[1] == 0.5
    assert row[2] == pytest.approx(-np.minimum(ratio * W[index], ratio.clip(0.8, 1.2) * W[index]).mean(), rel=1e-12)
    by_log_prob = log_prob.copy()
    kernels.surrogate(by_log_prob, old, W, index, 0.2, row)
    np.testing.assert_allclose(by_log_prob, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(decoupled: bool) -> None:
    net = network([3, 2], [IDENTITY])
    net.settings[0, kernels.DECOUPLED] = decoupled
    parameter = nn.Parameter(th.tensor(net.parameters.copy()))
    kind = th.optim.AdamW if decoupled else th.optim.Adam
    optimizer = kind([parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    optimizer.state[parameter] = {
        "step": th.tensor(3.0), "exp_avg": th.tensor(net.exp_avg.copy()), "exp_avg_sq": th.tensor(net.exp_avg_sq.copy()),
    }  # fmt: skip
    for _ in range(3):
        parameter.grad = th.tensor(net.gradient * 0.5)
        optimizer.step()
        kernels.adam(net, 0.5)
    np.testing.assert_allclose(net.parameters, parameter.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_tanh_in_float32() -> None:
    x = np.concatenate([np.linspace(-20, 20, 40001), np.geomspace(1e-30, 1, 100), [0, math.inf, -math.inf, math.nan]])
    z = x.astype(np.float32)
    kernels.tanh(z, np.float32(0))
    np.testing.assert_allclose(z, np.tanh(x.astype(np.float32).astype(np.float64)), rtol=5e-7)

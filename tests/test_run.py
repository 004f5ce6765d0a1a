"""Short runs over everything that a user may combine: both networks learn, all stays finite, all is logged."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, DICT, IMAGE, OBSERVATION_SPACES, TORQUES, SpaceEnv, vec_env
from gymnasium import spaces
from models import AtRolloutStart, Seen, actor_of, critic_of, differences, logged, moved, small, state_of
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_blpo import BLPO
from sb3_blpo.optimizers import parameters_of

PPO_KEYS = {
    "learning_rate", "entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss",
    "explained_variance", "n_updates", "clip_range",
}  # fmt: skip
NESTED_KEYS = {"critic_learning_rate", "critic_loss_before", "critic_loss_after"}
CORRECTION_KEYS = {
    "correction_ratio", "correction_cosine", "correction_capped", "correction_skipped", "ihvp_residual",
}  # fmt: skip
SOLVERS = ["nystrom", "cg", "nystrom_cg", "exact", "none"]


def policy_name(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space is IMAGE else "MlpPolicy"


def check_learning(model: BLPO, total_timesteps: int | None = None) -> BLPO:
    """Train for two rollouts: every network moves, stays finite and says so in the log."""
    actor, critic = actor_of(model), critic_of(model)
    model.learn(2 * model.n_steps * model.n_envs if total_timesteps is None else total_timesteps)
    assert moved(actor, actor_of(model))
    assert moved(critic, critic_of(model))
    check_log(model)
    return model


def check_log(model: BLPO) -> None:
    values = logged(model)
    expected = PPO_KEYS | NESTED_KEYS | (set() if model.ihvp_solver == "none" else CORRECTION_KEYS)
    if isinstance(model.action_space, spaces.Box):
        expected = expected | {"std"}
    assert values.keys() == expected
    # An indefinite Hessian may fail every solve, and then there is no correction to describe
    may_fail = CORRECTION_KEYS if model.curvature == "hessian" and values.get("correction_skipped") else set()
    for name, value in values.items():
        assert math.isfinite(value) or name in may_fail, f"{name} is {value}"


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_action_spaces(actions: str, n_envs: int) -> None:
    check_learning(small(env=vec_env(SpaceEnv(action_space=ACTION_SPACES[actions]), n_envs)))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("observations", OBSERVATION_SPACES)
def test_observation_spaces(observations: str, n_envs: int) -> None:
    space = OBSERVATION_SPACES[observations]
    model = check_learning(small(policy_name(space), vec_env(SpaceEnv(space), n_envs), n_steps=8))
    assert model.predict(space.sample())[0] in model.action_space


@pytest.mark.parametrize("observations", ["Discrete", "Dict"])
def test_observation_spaces_with_the_exact_hessian(observations: str) -> None:
    space = OBSERVATION_SPACES[observations]
    check_learning(small(policy_name(space), SpaceEnv(space), ihvp_kwargs={"rank": 3}, curvature="hessian"))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("actions", ["Box", "Discrete"])
def test_solvers(solver: str, curvature: str, actions: str) -> None:
    env = SpaceEnv(action_space=ACTION_SPACES[actions])
    model = check_learning(small(env=env, ihvp_solver=solver, curvature=curvature, normalize_advantage=True))
    if curvature == "gauss_newton" and solver != "none":
        assert logged(model)["correction_skipped"] == 0
        assert logged(model)["correction_ratio"] > 0


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_on_images(solver: str, curvature: str) -> None:
    if solver == "exact" and curvature == "hessian":
        pytest.skip("too large a critic, see test_arguments.py")
    settings = {"rank": 2, "max_iter": 2}
    model = small("CnnPolicy", SpaceEnv(IMAGE), ihvp_solver=solver, curvature=curvature, ihvp_kwargs=settings, n_steps=8)
    check_learning(model, 8)


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_sketch_is_drawn_anew_for_every_rollout(sketch: str) -> None:
    model = small(ihvp_kwargs={"sketch": sketch, "rank": 4}, n_epochs=2)
    drawn: list[th.Tensor] = []
    model.learn(48, callback=AtRolloutStart(lambda m: drawn.append(getattr(m.solver, "omega", th.zeros(0)))))
    assert drawn[0].numel() == 0 and drawn[1].shape == drawn[2].shape and drawn[1].shape[-1] == 4
    assert not th.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize(
    "policy_kwargs",
    [{}, {"squash_output": True}, {"use_expln": True, "full_std": False}],
    ids=["plain", "squashed", "expln"],
)
def test_gsde(policy_kwargs: dict[str, Any], ent_coef: float) -> None:
    env = vec_env(SpaceEnv(action_space=TORQUES), 2)
    check_learning(small(env=env, use_sde=True, sde_sample_freq=4, ent_coef=ent_coef, policy_kwargs=policy_kwargs))


@pytest.mark.parametrize("squash_output", [False, True])
def test_entropy_bonus_raises_the_entropy(squash_output: bool) -> None:
    def run(ent_coef: float) -> float:
        model = small(
            env=SpaceEnv(action_space=TORQUES), use_sde=True, ent_coef=ent_coef, learning_rate=1e-2, n_epochs=3,
            policy_kwargs={"squash_output": squash_output},
        )  # fmt: skip
        return logged(model.learn(48))["std"]

    assert run(10.0) > run(0.0)


def test_vec_normalize() -> None:
    env = VecNormalize(vec_env(SpaceEnv(reward_scale=100.0), 3))
    model = check_learning(small(env=env))
    assert model.get_vec_normalize_env() is env
    assert env.ret_rms.count > 90


def test_target_kl_stops_before_the_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    steps: list[None] = []
    model = small(target_kl=1e-4, n_epochs=20, learning_rate=1e-2, max_grad_norm=math.inf, verbose=1)
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    check_learning(model, 16)
    # The minibatch that was found too far away is logged and not followed
    assert 1 <= len(steps) == len(seen.segments) - 1 < 40
    assert logged(model)["n_updates"] == math.ceil(len(seen.segments) / 2)
    assert logged(model)["approx_kl"] > 0
    assert "Early stopping at step" in capsys.readouterr().out


def test_target_kl_out_of_reach() -> None:
    model = check_learning(small(target_kl=1e30, n_epochs=3), 16)
    assert logged(model)["n_updates"] == 3


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 16, 24, 32, 1000])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_batch_sizes(batch_size: int, n_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transition is in one minibatch of each epoch, the steps of a minibatch follow each other in one environment."""
    seen = Seen(monkeypatch)
    model = small(env=vec_env(SpaceEnv(), n_envs), batch_size=batch_size, n_epochs=2, normalize_advantage=True)
    check_learning(model, 16 * n_envs)
    rewards = model.rollout_buffer.rewards
    for epoch in np.array_split(np.arange(len(seen.segments)), 2):
        assert sum(seen.segments[i].n_transitions for i in epoch) == rewards.size
    for segment in seen.segments:
        T, B = segment.shape
        assert (T, B) == (16, min(batch_size // 16, n_envs)) or (T <= batch_size and B == 1) or T == 16
        assert isinstance(segment.states, th.Tensor)
        observations = np.moveaxis(segment.states.reshape(T, B, 3).numpy(), 1, 0)
        rollout = model.rollout_buffer.observations.reshape(16, n_envs, 3)
        for block in observations:
            places = [(t, env) for env in range(n_envs) for t in range(17 - T) if (rollout[t : t + T, env] == block).all()]
            assert len(places) == 1


def test_order_of_minibatches_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    small(n_steps=64, n_epochs=4).learn(64)
    epochs = [[float(segment.old_log_prob[0]) for segment in seen.segments[8 * i : 8 * i + 8]] for i in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


class SealedBuffer(RolloutBuffer):
    """A buffer that refuses to be shuffled."""

    def get(self, batch_size: int | None = None) -> Any:
        raise AssertionError("get() must not be called")


class SealedDictBuffer(DictRolloutBuffer):
    def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note

    def get(self, batch_size: int | None = None) -> Any:
        raise AssertionError("get() must not be called")


def test_custom_rollout_buffer() -> None:
    model = check_learning(small(rollout_buffer_class=SealedBuffer))
    assert type(model.rollout_buffer) is SealedBuffer
    space = spaces.Dict({"position": BOX})
    settings: dict[str, Any] = {"rollout_buffer_class": SealedDictBuffer, "rollout_buffer_kwargs": {"note": "sealed"}}
    model = check_learning(small("MultiInputPolicy", SpaceEnv(space), **settings))
    assert model.rollout_buffer.note == "sealed"  # type: ignore[attr-defined]


def test_schedules_change_both_optimizers() -> None:
    model = small(
        learning_rate=LinearSchedule(1e-2, 0.0, 1.0),
        critic_learning_rate=lambda progress: 0.5 if progress > 0.4 else 0.0,
        clip_range=LinearSchedule(0.4, 0.0, 1.0),
    )
    rates: list[tuple[float, float, float]] = []
    critics: list[list[th.Tensor]] = []

    def look(m: BLPO) -> None:
        critics.append(critic_of(m))
        if m.num_timesteps > 0:
            actor, critic = m.policy.optimizer.param_groups, m.critic_optimizer.param_groups
            assert logged(m)["learning_rate"] == actor[0]["lr"]
            assert logged(m)["critic_learning_rate"] == critic[0]["lr"]
            rates.append((actor[0]["lr"], critic[0]["lr"], logged(m)["clip_range"]))

    model.learn(64, callback=AtRolloutStart(look))
    np.testing.assert_allclose(rates, [(0.75e-2, 0.5, 0.3), (0.5e-2, 0.5, 0.2), (0.25e-2, 0.0, 0.1)])
    # At rate 0 the critic stands still
    assert moved(critics[1], critics[2]) and not moved(critics[2], critics[3])


def test_learning_rates_belong_to_their_networks() -> None:
    model = small(learning_rate=0.0, max_grad_norm=math.inf)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(32)
    assert not moved(actor, actor_of(model)) and moved(critic, critic_of(model))
    model = small(critic_learning_rate=0.0)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(32)
    assert moved(actor, actor_of(model)) and not moved(critic, critic_of(model))


@pytest.mark.parametrize("n_critic_updates", [1, 4])
def test_number_of_steps(n_critic_updates: int) -> None:
    model = small(n_critic_updates=n_critic_updates, n_epochs=3)
    steps = {"actor": 0, "critic": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            steps[name] += 1

        return hook

    model.policy.optimizer.register_step_post_hook(count("actor"))
    model.critic_optimizer.register_step_post_hook(count("critic"))
    model.learn(32)
    assert steps == {"actor": 12, "critic": 12 * n_critic_updates}
    assert logged(model)["n_updates"] == 6


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_optimizers_share_the_policy_between_them(actions: str) -> None:
    model = small(env=SpaceEnv(action_space=ACTION_SPACES[actions]))
    owners = {}
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    for owner, optimizer in (("actor", model.policy.optimizer), ("critic", model.critic_optimizer)):
        for parameter in parameters_of(optimizer):
            assert names[id(parameter)] not in owners
            owners[names[id(parameter)]] = owner
    assert owners == {name: "critic" if "value_net" in name else "actor" for name in names.values()}


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs"),
    [
        (th.optim.SGD, {"momentum": 0.5}),
        (th.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-3}),
        (th.optim.Adam, {"fused": False}),
        (th.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    ],
)
def test_optimizer_class_and_kwargs_serve_both(
    optimizer_class: type[th.optim.Optimizer], optimizer_kwargs: dict[str, Any]
) -> None:
    model = small(policy_kwargs={"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs})
    for optimizer in (model.policy.optimizer, model.critic_optimizer):
        assert type(optimizer) is optimizer_class
        for name, value in optimizer_kwargs.items():
            assert optimizer.param_groups[0][name] == value
    check_learning(model)


def test_default_optimizers_are_those_of_sb3() -> None:
    model = small()
    for optimizer in (model.policy.optimizer, model.critic_optimizer):
        assert type(optimizer) is th.optim.Adam
        assert optimizer.param_groups[0]["eps"] == 1e-5


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ({}, True),
        ({"ihvp_solver": "none", "policy_kwargs": {"optimizer_class": th.optim.AdamW}}, True),
        ({"policy_kwargs": {"activation_fn": nn.ELU}}, True),
        ({"curvature": "hessian"}, False),
        ({"env": SpaceEnv(action_space=TORQUES), "use_sde": True}, False),
    ],
)
def test_inference_mode_where_nothing_needs_automatic_differentiation(
    arguments: dict[str, Any], by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(**arguments)
    modes = set()

    def spy(*arguments: Any) -> Any:
        modes.add(th.is_inference_mode_enabled())
        return original(*arguments)

    original = model.critic.loss_and_gradient
    monkeypatch.setattr(model.critic, "loss_and_gradient", spy)
    check_learning(model)
    assert modes == {by_hand}


@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_step_outside_after_training(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(env=SpaceEnv(action_space=TORQUES))
    kept: dict[th.optim.Optimizer, list[th.Tensor]] = {model.policy.optimizer: [], model.critic_optimizer: []}

    def keep(optimizer: th.optim.Optimizer, *_: Any) -> None:
        kept[optimizer].append(parameters_of(optimizer)[0].detach().clone())

    for optimizer in kept:
        optimizer.register_step_post_hook(keep)
    model.learn(16)
    if fails:  # and what the snapshot puts back is ordinary as well
        monkeypatch.setattr(model, "_check_minibatch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.learn(16)
    for optimizer, tensors in kept.items():
        assert optimizer.state
        assert tensors and not any(tensor.is_inference() for tensor in tensors)
    observations, actions = th.as_tensor(BOX.sample())[None], th.as_tensor(TORQUES.sample())[None]
    value, log_prob, _ = model.policy.evaluate_actions(observations, actions)
    # Added to the gradients that training left
    (value.sum() + log_prob.sum()).backward()
    for optimizer, parameters in ((model.policy.optimizer, actor_of), (model.critic_optimizer, critic_of)):
        before = parameters(model)
        optimizer.step()
        assert moved(before, parameters(model))


class TwoHeads(nn.Module):
    """An extractor of the networks' last hidden layers in the user's own shape."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = 6, 5
        self.left = nn.Sequential(nn.Linear(n_features, 6), nn.ELU())
        self.right = nn.Sequential(nn.Linear(n_features, 5), nn.LayerNorm(5), nn.Tanh())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.left(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.right(features)


class TwoHeadsPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = TwoHeads(self.features_dim)  # type: ignore[assignment]


class ScaledPolicy(ActorCriticPolicy):
    """A value that is more than its network's output, with a parameter of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(th.ones(1))

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.scale * super().predict_values(obs)


class NormedExtractor(BaseFeaturesExtractor):
    """Batch normalisation and dropout, which must not see single observations or spoil the Jacobian."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 6) -> None:
        super().__init__(observation_space, features_dim)
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(3, features_dim), nn.BatchNorm1d(features_dim), nn.ReLU(inplace=True), nn.Dropout(0.3)
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.body(observations)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("policy", "policy_kwargs"),
    [
        (TwoHeadsPolicy, {}),
        (ScaledPolicy, {"net_arch": [4]}),
        ("MlpPolicy", {"features_extractor_class": NormedExtractor}),
        ("MlpPolicy", {"features_extractor_class": NormedExtractor, "share_features_extractor": False}),
        ("MlpPolicy", {"net_arch": {"pi": [4], "vf": [5, 3]}, "activation_fn": nn.ReLU}),
        ("MlpPolicy", {"net_arch": []}),
        ("MlpPolicy", {"net_arch": [4], "ortho_init": False, "activation_fn": nn.PReLU}),
        (ActorCriticPolicy, {"net_arch": [4]}),
    ],
    ids=["two heads", "scaled value", "normed", "normed apart", "uneven", "linear", "PReLU", "class"],
)
def test_custom_policies(policy: Any, policy_kwargs: dict[str, Any], curvature: str) -> None:
    model = check_learning(
        small(policy, vec_env(SpaceEnv(action_space=TORQUES), 2), policy_kwargs=policy_kwargs, curvature=curvature)
    )
    ids = [id(p) for optimizer in (model.policy.optimizer, model.critic_optimizer) for p in parameters_of(optimizer)]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.policy.parameters())


def test_batch_normalisation_learns_its_statistics() -> None:
    policy: Any = small(policy_kwargs={"features_extractor_class": NormedExtractor}).learn(16).policy
    # The actor's extractor sees each minibatch once, the critic's once per nested update: bootstraps leave no trace
    assert policy.pi_features_extractor.body[2].num_batches_tracked == 2
    assert policy.vf_features_extractor.body[2].num_batches_tracked == 6


@pytest.mark.parametrize("share", [None, True, False])
@pytest.mark.parametrize("space", [IMAGE, DICT], ids=["image", "Dict"])
def test_extractors_with_parameters_are_not_shared(space: spaces.Space, share: bool | None) -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]} | ({} if share is None else {"share_features_extractor": share})
    policy = check_learning(small(policy_name(space), SpaceEnv(space), n_steps=8, policy_kwargs=policy_kwargs)).policy
    actor, critic = list(policy.pi_features_extractor.parameters()), list(policy.vf_features_extractor.parameters())
    assert actor and not {id(parameter) for parameter in actor} & {id(parameter) for parameter in critic}
    assert policy.features_extractor is policy.pi_features_extractor
    assert moved(actor, critic)


@pytest.mark.parametrize("share", [None, False])
def test_saved_policy_keeps_actor_and_critic_apart(share: bool | None, tmp_path: Path) -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]} | ({} if share is None else {"share_features_extractor": share})
    model = small("CnnPolicy", SpaceEnv(IMAGE), n_steps=8, policy_kwargs=policy_kwargs).learn(16)
    model.policy.save(str(tmp_path / "policy.zip"))
    loaded = ActorCriticCnnPolicy.load(str(tmp_path / "policy.zip"))
    observations = th.as_tensor(np.stack([SpaceEnv(IMAGE).reset(seed=i)[0] for i in range(4)])).permute(0, 3, 1, 2)
    model.policy.set_training_mode(False)
    with th.no_grad():
        assert th.equal(loaded.predict_values(observations), model.policy.predict_values(observations))
        logits = [p.get_distribution(observations).distribution.logits for p in (loaded, model.policy)]  # type: ignore[union-attr]
    assert th.equal(logits[0], logits[1])


def test_parameters_of_the_environment_spaces_are_left_alone() -> None:
    """An environment that draws from its own space sees the same numbers as without BLPO."""
    first, second = SpaceEnv(), SpaceEnv()
    first.observation_space.seed(1)
    second.observation_space.seed(1)
    small(env=first)
    np.testing.assert_array_equal(first.observation_space.sample(), second.observation_space.sample())


def test_csv_log(tmp_path: Path) -> None:
    model = small(env=SpaceEnv(action_space=TORQUES))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(64)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    train = {f"train/{name}" for name in PPO_KEYS | NESTED_KEYS | CORRECTION_KEYS | {"std"}}
    others = {"time/iterations", "time/fps", "time/total_timesteps", "rollout/ep_rew_mean", "rollout/ep_len_mean"}
    for row in rows[1:]:
        assert {*train, *others} <= row.keys()
        for name in train | others:
            assert math.isfinite(float(row[name])), name
    assert [float(row["train/n_updates"]) for row in rows[1:]] == [1, 2, 3]
    assert [float(row["time/total_timesteps"]) for row in rows] == [16, 32, 48, 64]


def test_tensorboard_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    small(tensorboard_log=str(tmp_path)).learn(32)
    assert list(tmp_path.glob("BLPO_1/events.out.tfevents.*"))


def test_progress_bar_and_callbacks(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    evaluation = EvalCallback(Monitor(SpaceEnv()), eval_freq=16, n_eval_episodes=1, verbose=0, log_path=str(tmp_path))
    checkpoints = CheckpointCallback(save_freq=16, save_path=str(tmp_path))
    steps: list[int] = []

    def count(local_variables: dict[str, Any], _: dict[str, Any]) -> bool:
        steps.append(local_variables["self"].num_timesteps)
        return True

    small().learn(32, callback=CallbackList([evaluation, checkpoints]), progress_bar=True)
    assert (tmp_path / "evaluations.npz").is_file()
    assert sorted(path.name for path in tmp_path.glob("*.zip")) == ["rl_model_16_steps.zip", "rl_model_32_steps.zip"]
    small().learn(32, callback=count)
    assert steps == list(range(1, 33))


def test_callback_can_stop_the_rollout() -> None:
    model = small()
    before = state_of(model)
    model.learn(32, callback=lambda *_: False)
    assert model.num_timesteps == 1
    assert not differences(before, state_of(model))


@pytest.mark.parametrize("total_timesteps", [40, 4e1])
def test_total_timesteps(total_timesteps: float) -> None:
    assert small().learn(total_timesteps).num_timesteps == 48  # type: ignore[arg-type]


def test_registered_environments() -> None:
    for name in ("CartPole-v1", "Pendulum-v1"):
        env = gym.make(name)
        check_learning(small(env=env, n_steps=32, ihvp_kwargs={"rank": 5}))
        check_learning(small(env=name, n_steps=32, seed=None))


@pytest.mark.parametrize("settings", [{"sketch": "values"}, {"sketch": "columns"}, {"sketch": "gaussian"}])
def test_a_default_device(settings: dict[str, Any]) -> None:
    for arguments in ({}, {"policy_kwargs": {"activation_fn": nn.PReLU}}):
        model = small(ihvp_kwargs={"rank": 3} | settings, **arguments)
        with th.device("meta"):  # where nothing can be computed
            model.learn(16)


@pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("observations", ["Box", "image", "Dict"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gpu(solver: str, observations: str) -> None:
    space = OBSERVATION_SPACES[observations]
    env = vec_env(SpaceEnv(space, TORQUES), 2)
    model = check_learning(small(policy_name(space), env, ihvp_solver=solver, device="cuda"))
    assert all(parameter.is_cuda for parameter in model.policy.parameters())

"""Random configurations: whatever is allowed trains, stays finite, and comes back from its zip as it was."""

import io
import re
from typing import Any

import numpy as np
import pytest
import torch as th
from envs import ACTION_SPACES, BOX, OBSERVATION_SPACES, SpaceEnv, vec_env
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from models import differences, state_of
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_blpo import BLPO
from sb3_blpo.checks import CURVATURES, IHVP_SOLVERS, SKETCHES

#: What may be refused: all else must work, but for steps of SGD, which grow with the rewards
REFUSED = re.compile(
    r"generalized State-Dependent Exploration \(gSDE\) can only be used with continuous actions\."
    r"|`normalize_advantage`=True takes more than one transition, .*"
    r"|`ihvp_solver`='exact' with `curvature`='hessian' takes at most .*"
)
DIVERGED = re.compile(r"The .* is not finite in update \d+, after \d+ timesteps; networks and optimizers were put back .*")
LAYERS = st.lists(st.integers(1, 9), max_size=2)
POLICY_KWARGS = st.fixed_dictionaries(
    {"net_arch": LAYERS | st.fixed_dictionaries({"pi": LAYERS, "vf": LAYERS})},
    optional={
        "activation_fn": st.sampled_from([th.nn.ReLU, th.nn.ELU, th.nn.PReLU]),
        "share_features_extractor": st.booleans(),
        "ortho_init": st.booleans(),
        "log_std_init": st.sampled_from([-2.0, 0.0]),
        "optimizer_class": st.sampled_from([th.optim.AdamW, th.optim.SGD, th.optim.RMSprop]),
    },
)
RATES = st.sampled_from([0.0, 3e-4, 1e-2, LinearSchedule(1e-3, 0.0, 0.7)])
ARGUMENTS = st.fixed_dictionaries(
    {
        "n_steps": st.integers(1, 8),
        "batch_size": st.integers(1, 40),
        "policy_kwargs": POLICY_KWARGS,
        "ihvp_solver": st.sampled_from(IHVP_SOLVERS),
        "curvature": st.sampled_from(CURVATURES),
        "ihvp_kwargs": st.none()
        | st.fixed_dictionaries(
            {"rank": st.integers(1, 8)},
            optional={
                "damping": st.sampled_from([1e-6, 0.1, 10.0]),
                "sketch": st.sampled_from(SKETCHES),
                "max_iter": st.integers(1, 5),
                "tol": st.sampled_from([0.0, 0.1]),
            },
        ),
    },
    optional={
        "learning_rate": RATES,
        "critic_learning_rate": RATES,
        "n_epochs": st.integers(1, 3),
        "n_critic_updates": st.integers(1, 4),
        "critic_rollouts": st.integers(1, 2),
        "ihvp_interval": st.integers(1, 2),
        "gamma": st.sampled_from([0.0, 0.9, 1.0]),
        "gae_lambda": st.sampled_from([0.0, 0.5, 1.0]),
        "clip_range": st.sampled_from([0.0, 0.01, LinearSchedule(0.3, 0.0, 1.0)]),
        "normalize_advantage": st.booleans(),
        "ent_coef": st.sampled_from([0.0, 0.01, 1.0]),
        "max_grad_norm": st.sampled_from([1e-3, float("inf")]),
        "max_correction_ratio": st.sampled_from([None, 0.0, 0.3, 10.0]),
        "target_kl": st.sampled_from([1e-6, 0.02]),
        "use_sde": st.booleans(),
        "sde_sample_freq": st.integers(1, 3),
    },
)


@st.composite
def environments(draw: st.DrawFn) -> tuple[str, VecEnv]:
    """Draw a policy and environments for it."""
    observations = draw(st.sampled_from(list(OBSERVATION_SPACES)))
    actions = ACTION_SPACES[draw(st.sampled_from(list(ACTION_SPACES)))]
    length, scale = draw(st.integers(1, 7)), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    env: VecEnv = vec_env(SpaceEnv(OBSERVATION_SPACES[observations], actions, length, scale), draw(st.integers(1, 5)))
    if draw(st.booleans()):
        vectors = [key for key, space in getattr(env.observation_space, "spaces", {}).items() if space == BOX]
        norm_obs = observations in ("Box", "Box2D", "Dict")
        env = VecNormalize(env, norm_obs=norm_obs, norm_obs_keys=vectors or None)
    if observations == "Dict":
        return "MultiInputPolicy", env
    return draw(st.sampled_from(["CnnPolicy", "MlpPolicy"] if observations == "image" else ["MlpPolicy"])), env


def check_round_trip(model: BLPO) -> None:
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = BLPO.load(file, device="cpu")
    assert not differences(state_of(model), state_of(loaded))
    assert model.env is not None
    observations: Any = model.env.reset()
    first, second = (m.predict(observations, deterministic=True)[0] for m in (model, loaded))
    np.testing.assert_array_equal(first, second)
    assert all(action in model.action_space for action in first)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size:UserWarning")
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(environment=environments(), arguments=ARGUMENTS)
def test_random_configuration(environment: tuple[str, VecEnv], arguments: dict[str, Any]) -> None:
    policy, env = environment
    try:
        model = BLPO(policy, env, seed=0, device="cpu", **arguments)
    except ValueError as error:
        assert REFUSED.fullmatch(str(error)), error
        event("refused")
        return
    for reset_num_timesteps in (True, False):
        try:
            model.learn(model.n_steps * model.n_envs, reset_num_timesteps=reset_num_timesteps)
        except ValueError as error:
            if type(model.critic_optimizer) is not th.optim.SGD or not DIVERGED.fullmatch(str(error)):
                raise
            event("diverged")
        for name, leaf in state_of(model).items():
            assert not isinstance(leaf, th.Tensor) or leaf.isfinite().all(), name
        check_round_trip(model)

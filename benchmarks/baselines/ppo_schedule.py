"""
PPO with BLPO's schedule, for RL Zoo's `--conf-file`: the entries of hyperparams/blpo.yml without what only BLPO knows.

`normalize_advantage` stays PPO's own default, True, whatever an entry says for BLPO: that is PPO as people run it. On
Walker2d, Ant and Swimmer PPO has what its own trials found instead (benchmarks/tuning.md), where BLPO has what BLPO's found;
over a million steps grid.py adds what they found for that length.
"""

import inspect
from typing import Any

import yaml
from stable_baselines3 import PPO

from sb3_blpo import BLPO
from sb3_blpo.zoo import default_hyperparams

#: What PPO's own trials found
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "Ant-v5": {"normalize_advantage": False},
    "Swimmer-v5": {"batch_size": 128},
    "Walker2d-v5": {"batch_size": 128, "learning_rate": "lin_5e-4", "gamma": 0.995, "gae_lambda": 0.9, "clip_range": 0.1},
}
#: Likewise, over a million steps alone
OVER_A_MILLION_STEPS: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"learning_rate": "lin_5e-4"},
    "Hopper-v5": {
        "gae_lambda": 0.95,
        "clip_range": 0.1,
        "policy_kwargs": "dict(activation_fn=nn.ReLU, net_arch=[256, 256])",
    },
}
NOT_SHARED = {"normalize_advantage", *(inspect.signature(BLPO).parameters.keys() - inspect.signature(PPO).parameters.keys())}

hyperparams = {
    env_id: {name: value for name, value in entry.items() if name not in NOT_SHARED} | OF_ITS_OWN.get(env_id, {})
    for env_id, entry in yaml.safe_load(default_hyperparams().read_text()).items()
}

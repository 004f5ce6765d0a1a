"""BLPO, Bilevel Policy Optimization with Nyström Hypergradients (arXiv 2505.11714), for Stable-Baselines3."""

from importlib.metadata import version

from stable_baselines3.common.policies import ActorCriticCnnPolicy as CnnPolicy

from sb3_blpo.blpo import BLPO
from sb3_blpo.maskable import MaskableBLPO
from sb3_blpo.policies import MlpPolicy, MultiInputPolicy
from sb3_blpo.recurrent import RecurrentBLPO

__version__ = version("sb3_blpo")

__all__ = ["BLPO", "CnnPolicy", "MaskableBLPO", "MlpPolicy", "MultiInputPolicy", "RecurrentBLPO", "__version__"]

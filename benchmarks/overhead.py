"""
What BLPO costs beside SB3's PPO, or its siblings beside sb3-contrib's, with the same rollouts, minibatches and epochs.

``python benchmarks/overhead.py`` writes ``overhead.csv``, ``overhead_memory.csv`` and a figure to ``benchmarks/results``. It
takes about 25 minutes and a machine that does nothing else; ``--cases`` chooses a part, whose rows replace the old ones.

Time: the algorithms of a case live in one process with one thread and take turns, one rollout and one ``train()`` each, in CPU
seconds; ratios are those of two turns side by side, the first turn of each is not counted. SBX's PPO (JAX) takes turns too
where it is installed (``pip install 'sb3_blpo[peers]'``), with two layers of 64 units. The environment of the cases with
other critics costs next to nothing, so that its ratios are the largest that such a critic can have.
Memory: the largest resident memory of a process that trains on long rollouts, one process for each algorithm.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_blpo import BLPO, MaskableBLPO, RecurrentBLPO

RESULTS = Path(__file__).parent / "results"
N_ENVS, SCHEDULE = 8, {"n_steps": 256, "batch_size": 256, "n_epochs": 10, "seed": 0, "device": "cpu"}
ALGORITHMS = ("ppo", "none", "nystrom")  # BLPO's by their solver
NETWORKS: dict[str, dict[str, Any]] = {
    "64-64": {"net_arch": [64, 64]},
    "256-256": {"net_arch": [256, 256], "activation_fn": nn.ReLU},
}


class Cheap(gym.Env[Any, Any]):
    """
    Episodes of 100 steps with random observations and rewards, drawn beforehand.

    :param observation_space: Any
    """

    action_space = spaces.Discrete(4)

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space = observation_space
        observation_space.seed(0)
        self.observations = [observation_space.sample() for _ in range(101)]
        self.rewards = np.random.default_rng(0).standard_normal(101).tolist()
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.t = 0
        return self.observations[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observations[self.t], self.rewards[self.t], self.t == 100, False, {}


def towards_the_middle(env: Any) -> np.ndarray:
    """Which pushes are allowed: none towards a border that is near."""
    position = env.unwrapped.state[0]
    return np.array([position > -1, position < 1])


def masked_cart_pole() -> gym.Env[Any, Any]:
    return ActionMasker(gym.make("CartPole-v1"), towards_the_middle)


VECTOR = spaces.Box(-1, 1, (16,))
WINDOW = spaces.Box(-1, 1, (16, 8))  # of 16 observations
TOKENS = spaces.Box(0, 63, (16,), np.int64)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)


class Extractor(BaseFeaturesExtractor):
    """
    Features of a vector, of a window of observations, or of tokens.

    :param observation_space: Space
    :param kind: A key of :data:`CRITICS`
    """

    def __init__(self, observation_space: spaces.Box, kind: str) -> None:
        super().__init__(observation_space, 32)
        self.kind = kind
        networks = {
            "LayerNorm": lambda: nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh()),
            "BatchNorm": lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh()),
            "attention": lambda: nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)),
            "LSTM": lambda: nn.LSTM(8, 32, batch_first=True),
            "GRU": lambda: nn.GRU(8, 32, batch_first=True),
            "Embedding": lambda: nn.Embedding(64, 32),
            "Conv1d": lambda: nn.Sequential(nn.Conv1d(8, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3), nn.ReLU()),
        }
        self.network = networks[kind]()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.kind in ("LayerNorm", "BatchNorm"):
            return self.network(observations)
        if self.kind in ("LSTM", "GRU"):
            return self.network(observations)[0][:, -1]
        if self.kind == "Conv1d":
            return self.network(observations.transpose(1, 2)).mean(dim=2)
        return self.network(observations.long() if self.kind == "Embedding" else observations).mean(dim=1)


#: Policy and observation space of each critic that is no MLP
CRITICS: dict[str, tuple[str, spaces.Space]] = {
    "LayerNorm": ("MlpPolicy", VECTOR),
    "BatchNorm": ("MlpPolicy", VECTOR),
    "attention": ("MlpPolicy", WINDOW),
    "LSTM": ("MlpPolicy", WINDOW),
    "GRU": ("MlpPolicy", WINDOW),
    "Embedding": ("MlpPolicy", TOKENS),
    "Conv1d": ("MlpPolicy", WINDOW),
    "NatureCNN": ("CnnPolicy", IMAGE),
    "Dict": ("MultiInputPolicy", spaces.Dict({"vector": VECTOR, "image": IMAGE})),
}
#: Other classes or settings: PPO's class, BLPO's class, the policy, its arguments, and what BLPO alone is given
SIBLINGS: dict[str, tuple[Any, Any, str, dict[str, Any], dict[str, Any]]] = {
    "64-64, torch": (PPO, BLPO, "MlpPolicy", NETWORKS["64-64"], {"engine": "torch"}),
    "masked 64-64": (MaskablePPO, MaskableBLPO, "MlpPolicy", NETWORKS["64-64"], {}),
    "masked 64-64, torch": (MaskablePPO, MaskableBLPO, "MlpPolicy", NETWORKS["64-64"], {"engine": "torch"}),
    "recurrent 64": (RecurrentPPO, RecurrentBLPO, "MlpLstmPolicy", {"lstm_hidden_size": 64}, {}),
    "recurrent 256": (RecurrentPPO, RecurrentBLPO, "MlpLstmPolicy", {}, {}),
    "recurrent 64, one critic pass": (
        RecurrentPPO, RecurrentBLPO, "MlpLstmPolicy", {"lstm_hidden_size": 64}, {"n_critic_updates": 1}
    ),
}  # fmt: skip
TASKS = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Humanoid-v5")
WIDE_TASKS = ("CartPole-v1", "LunarLander-v3", "Hopper-v5", "HalfCheetah-v5")
DEFAULTS = "CartPole-v1 64-64, PPO's defaults"  # one environment, 2048 steps, minibatches of 64
CASES = (*(f"{task} 64-64" for task in TASKS), DEFAULTS, *(f"{task} 256-256" for task in WIDE_TASKS), *SIBLINGS, *CRITICS)


def make(case: str, algorithm: str, n_envs: int = N_ENVS, **settings: Any) -> Any:
    """
    :param case: One of :data:`CASES`
    :param algorithm: One of :data:`ALGORITHMS`, or "sbx"
    :param n_envs: Number of environments
    :param settings: Instead of those of :data:`SCHEDULE`
    :return: The model, with environments of its own
    """
    ppo: Any = PPO
    blpo: Any = BLPO
    own: dict[str, Any] = {}
    if case in SIBLINGS:
        ppo, blpo, policy, policy_kwargs, own = SIBLINGS[case]
        env: Any = make_vec_env(masked_cart_pole if ppo is MaskablePPO else "CartPole-v1", n_envs, seed=0)
    elif case in CRITICS:
        policy, space = CRITICS[case]
        env = make_vec_env(Cheap, n_envs, seed=0, env_kwargs={"observation_space": space})
        policy_kwargs = {}
        if policy == "MlpPolicy":
            policy_kwargs = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"kind": case}}
    else:
        if case == DEFAULTS:
            n_envs, settings = 1, {"n_steps": 2048, "batch_size": 64} | settings
        env_id, network = case.partition(",")[0].split()
        policy, policy_kwargs = "MlpPolicy", NETWORKS[network]
        env = make_vec_env(env_id, n_envs, seed=0)
        env = VecNormalize(env) if env_id.endswith("v5") else env
    settings = SCHEDULE | {"policy_kwargs": policy_kwargs} | settings
    if algorithm == "sbx":
        ppo = import_module("sbx").PPO
    if algorithm in ("ppo", "sbx"):
        return ppo(policy, env, **settings)
    return blpo(policy, env, ihvp_solver=algorithm, **settings | own)


def measure(case: str, n_turns: int) -> pd.DataFrame:
    """
    :param case: One of :data:`CASES`
    :param n_turns: Turns of each algorithm that count
    :return: CPU seconds of each turn
    """
    names = (*ALGORITHMS, "sbx") if "64-64" in case and case not in SIBLINGS and find_spec("sbx") else ALGORITHMS
    models = {name: make(case, name) for name in names}
    callbacks = {name: model._setup_learn(10**9)[1] for name, model in models.items()}
    rows = []
    for turn in range(-1, n_turns):
        for name, model in models.items():
            start = time.process_time()
            model.collect_rollouts(model.env, callbacks[name], model.rollout_buffer, model.n_steps)
            collected = time.process_time()
            model.train()
            rows.append((case, name, turn, collected - start, time.process_time() - collected))
    table = pd.DataFrame(rows, columns=["case", "algorithm", "turn", "collect", "train"])
    return table[table.turn >= 0]


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """
    :param table: All turns
    :return: Whole turns relative to those beside them, a row for each case and turn
    """
    turns = table.assign(whole=table.collect + table.train).pivot(index=["case", "turn"], columns="algorithm", values="whole")
    return pd.DataFrame({
        "none / PPO": turns["none"] / turns.ppo,
        "nystrom / PPO": turns.nystrom / turns.ppo,
        "nystrom / none": turns.nystrom / turns["none"],
        "nystrom / SBX": turns.nystrom / turns.get("sbx", np.nan),
    })  # fmt: skip


def summary(table: pd.DataFrame) -> str:
    """
    :param table: All turns
    :return: Medians
    """
    medians = ratios(table).groupby("case").median().loc[[case for case in CASES if case in set(table["case"])]]
    seconds = table.groupby(["case", "algorithm"])[["collect", "train"]].median().unstack()
    for name in ALGORITHMS:
        collect, train = seconds["collect", name], seconds["train", name]
        medians[f"{name}, s"] = collect.map("{:.2f} + ".format) + train.map("{:.2f}".format)
    return medians.to_string(float_format="{:.2f}".format)


def plot(table: pd.DataFrame, path: Path) -> None:
    """
    :param table: All turns
    :param path: The PNG
    """
    import matplotlib

    matplotlib.use("Agg")
    quartiles = ratios(table).groupby("case").quantile([0.25, 0.5, 0.75]).unstack()
    quartiles = quartiles.loc[[case for case in CASES if case in quartiles.index]]
    medians = quartiles.xs(0.5, axis=1, level=1)[["none / PPO", "nystrom / PPO"]]
    errors = [[medians[c] - quartiles[c, 0.25], quartiles[c, 0.75] - medians[c]] for c in medians]
    axis = medians.plot.bar(yerr=errors, color=["#777777", "#d55e00"], figsize=(11, 4.6), rot=30, width=0.7, xlabel="")
    axis.axhline(1, color="black", linewidth=1)
    axis.set_ylabel("CPU time relative to PPO")
    axis.set_title("A rollout and an update beside SB3's PPO, same schedule, one thread (median, quartiles)")
    axis.figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def largest_memory(case: str, algorithm: str, n_envs: int, n_steps: int) -> float:
    """
    :param case: One of :data:`CASES`
    :param algorithm: One of :data:`ALGORITHMS`
    :param n_envs: Number of environments
    :param n_steps: Of a rollout
    :return: MiB, after as many rollouts as BLPO's critic remembers and one more
    """
    th.set_num_threads(1)
    model = make(case, algorithm, n_envs, n_steps=n_steps, n_epochs=1)
    model.learn(9 * n_envs * n_steps)
    # Not what getrusage() says, which begins with that of the process that started this one
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(n_envs: int, n_steps: int) -> pd.DataFrame:
    """
    :param n_envs: Number of environments
    :param n_steps: Of a rollout
    :return: Largest memory of each algorithm
    """
    rows = []
    for network in NETWORKS:
        for name in ALGORITHMS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                mib = pool.submit(largest_memory, f"CartPole-v1 {network}", name, n_envs, n_steps).result()
            rows.append((network, name, n_envs * n_steps, mib))
    return pd.DataFrame(rows, columns=["network", "algorithm", "N", "MiB"])


def main() -> None:
    parser = argparse.ArgumentParser(description="What BLPO costs beside SB3's PPO")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES, help="none: memory and figure alone")
    parser.add_argument("--turns", type=int, default=9, help="of each algorithm")
    parser.add_argument("--memory", type=int, nargs=2, default=(64, 1024), help="environments and steps")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")  # of SBX
    th.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "overhead.csv"
    for case in arguments.cases:
        table = measure(case, arguments.turns)
        if path.exists():
            old = pd.read_csv(path)
            table = pd.concat([old[old["case"] != case], table])
        table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
        print(case, flush=True)
    table = pd.read_csv(path)
    print(summary(table), flush=True)
    plot(table, arguments.folder / "overhead.png")
    of_memory = memory(*arguments.memory)
    of_memory.to_csv(arguments.folder / "overhead_memory.csv", index=False, float_format="%.0f", lineterminator="\n")
    print(of_memory.to_string(index=False, float_format="{:.0f}".format))


if __name__ == "__main__":
    main()

"""
What BLPO costs beside SB3's PPO at the same schedule.

``python benchmarks/overhead.py`` (about eight minutes on one free core) writes ``benchmarks/results/overhead.csv`` and its
figure; ``--env`` and ``--repeats`` choose a part, whose rows replace the old ones of that environment. All algorithms of an
environment live in one process with one thread and take turns, one rollout and one ``train()`` each; the ratio is that of two
turns side by side. The first turn of each is not counted.
"""

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_blpo import BLPO

RESULTS = Path(__file__).parent / "results"

#: The schedule of hyperparams/blpo.yml, PPO's number of epochs
SCHEDULE: dict[str, Any] = {"n_steps": 256, "batch_size": 256, "n_epochs": 10, "seed": 0, "device": "cpu"}
N_ENVS = 8
#: Images: one minibatch of each environment's rollout, as in Atari's entry of hyperparams/blpo.yml, but fewer of them
IMAGE_SCHEDULE = SCHEDULE | {"n_steps": 64, "batch_size": 64, "n_epochs": 1}
N_IMAGE_ENVS = 2

NORMALIZED = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Humanoid-v5")
#: Behind an environment's name: the networks that hyperparams/blpo.yml has for it, instead of two layers of 64 tanh units
WIDE = " (256-256)"
ENVIRONMENTS = (
    "CartPole-v1", "Acrobot-v1", "LunarLander-v3", "LunarLander-v3" + WIDE, *NORMALIZED, "HalfCheetah-v5" + WIDE,
    "CarRacing-v3",
)  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"ihvp_solver": "none"},
    "nystrom": {},
    "nystrom gaussian": {"ihvp_kwargs": {"sketch": "gaussian"}},
    "nystrom columns": {"ihvp_kwargs": {"sketch": "columns"}},
    "cg (50)": {"ihvp_solver": "cg", "ihvp_kwargs": {"tol": 0.0}},
    "nystrom_cg": {"ihvp_solver": "nystrom_cg"},
    "exact": {"ihvp_solver": "exact"},
}

#: The authors' whole runs relative to their PPO, JAX on a GPU (arXiv 2505.11714): nested, CG, Nyström
AUTHORS = {
    "CartPole-v1": (1.10, 1.99, 2.07),
    "Acrobot-v1": (1.16, 1.95, 2.11),
    "Walker2d-v5": (1.04, 1.52, 1.31),
    "Hopper-v5": (1.07, 1.63, 1.38),
    "Humanoid-v5": (1.03, 1.28, 1.16),
    "HalfCheetah-v5": (1.00, 1.15, 1.09),
}


class Turn(NamedTuple):
    """
    One rollout and one ``train()``.

    :param env_id: Environment
    :param algorithm: "ppo" or a variant of BLPO
    :param repeat: Number of the turn, from 0
    :param collection: Seconds of ``collect_rollouts()``
    :param training: Seconds of ``train()``
    :param critic_step: Seconds of one nested step of the critic, mean over the turn; 0 for PPO
    :param n_minibatches: Minibatches of one ``train()``
    """

    env_id: str
    algorithm: str
    repeat: int
    collection: float
    training: float
    critic_step: float
    n_minibatches: int


class Stopwatch:
    """
    Adds up the time that a method takes.

    :param owner: Object whose method to replace
    :param method: Its name
    """

    def __init__(self, owner: Any, method: str) -> None:
        self.seconds, self.calls = 0.0, 0
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        setattr(owner, method, timed)


def make(env_id: str, variant: dict[str, Any] | None) -> PPO | BLPO:
    """
    :param env_id: One of :data:`ENVIRONMENTS`
    :param variant: Arguments of BLPO, ``None``: PPO
    :return: The algorithm with environments of its own
    """
    images, name = env_id == "CarRacing-v3", env_id.removesuffix(WIDE)
    env: Any = make_vec_env(name, N_IMAGE_ENVS if images else N_ENVS, seed=0)
    if name in NORMALIZED:
        env = VecNormalize(env)
    schedule = IMAGE_SCHEDULE if images else SCHEDULE
    if name != env_id:
        schedule = schedule | {"policy_kwargs": {"net_arch": [256, 256], "activation_fn": th.nn.ReLU}}
    policy = "CnnPolicy" if images else "MlpPolicy"
    return PPO(policy, env, **schedule) if variant is None else BLPO(policy, env, **schedule, **variant)


def measure(env_id: str, repeats: int) -> list[Turn]:
    """
    :param env_id: Environment
    :param repeats: Number of turns of each algorithm
    :return: All turns
    """
    variants: dict[str, dict[str, Any] | None] = {"ppo": None, **VARIANTS}
    if env_id == "CarRacing-v3":
        del variants["nystrom_cg"], variants["cg (50)"]  # minutes for each turn
    models = {name: make(env_id, variant) for name, variant in variants.items()}
    watches = {name: (Stopwatch(model, "collect_rollouts"), Stopwatch(model, "train")) for name, model in models.items()}
    critic_watches = {name: Stopwatch(model, "_update_critic") for name, model in models.items() if isinstance(model, BLPO)}
    turns = []
    for repeat in range(-1, repeats):
        for name, model in models.items():
            watched = [*watches[name], *([critic_watches[name]] if name in critic_watches else [])]
            for watch in watched:
                watch.seconds, watch.calls = 0.0, 0
            n_transitions = model.n_steps * model.n_envs
            model.learn(n_transitions, reset_num_timesteps=repeat < 0)
            collection, training = (watch.seconds for watch in watches[name])
            critic = critic_watches.get(name)
            if repeat >= 0:
                turns.append(Turn(
                    env_id, name, repeat, collection, training, critic.seconds / critic.calls if critic else 0.0,
                    model.n_epochs * n_transitions // model.batch_size,
                ))  # fmt: skip
    for model in models.values():
        assert model.env is not None
        model.env.close()
    return turns


def read() -> list[Turn]:
    """
    :return: All recorded turns
    """
    path = RESULTS / "overhead.csv"
    if not path.exists():
        return []
    with path.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [Turn(*(kind(row[name]) for name, kind in Turn.__annotations__.items())) for row in rows]


def write(turns: list[Turn]) -> None:
    """
    :param turns: What to record
    """
    with (RESULTS / "overhead.csv").open("w", newline="") as file:
        file.write(f"# one thread, torch {th.__version__}, {platform.machine()}, seconds\n")
        writer = csv.writer(file)
        writer.writerow(Turn._fields)
        writer.writerows([*turn[:3], *(f"{x:.6g}" for x in turn[3:6]), turn[6]] for turn in turns)


def ratios(turns: list[Turn], env_id: str, algorithm: str, to: str) -> np.ndarray:
    """
    :param turns: All turns
    :param env_id: Environment
    :param algorithm: An algorithm
    :param to: Another
    :return: Whole turns of the one relative to those of the other beside them (repeats,)
    """
    of = {(t.algorithm, t.repeat): t.collection + t.training for t in turns if t.env_id == env_id}
    return np.array([seconds / of[to, repeat] for (name, repeat), seconds in of.items() if name == algorithm])


def summary(turns: list[Turn]) -> str:
    """
    :param turns: All turns
    :return: A table in Markdown: medians
    """
    lines = [
        "| environment | PPO: collection + training, s | " + " | ".join(f"{name} / PPO" for name in VARIANTS)
        + " | nystrom / none | nystrom - none | critic step |",
        "| --- " * (len(VARIANTS) + 5) + "|",
    ]  # fmt: skip
    for env_id in (name for name in ENVIRONMENTS if any(turn.env_id == name for turn in turns)):
        here = [turn for turn in turns if turn.env_id == env_id]

        def median(field: str, algorithm: str, here: list[Turn] = here) -> float:
            return float(np.median([getattr(turn, field) for turn in here if turn.algorithm == algorithm]))

        cells = [env_id, f"{median('collection', 'ppo'):.3f} + {median('training', 'ppo'):.3f}"]
        for name in VARIANTS:
            found = ratios(turns, env_id, name, "ppo")
            cells.append(f"{np.median(found):.2f}" if len(found) else "-")
        cells.append(f"{np.median(ratios(turns, env_id, 'nystrom', 'none')):.2f}")
        extra = (median("training", "nystrom") - median("training", "none")) / here[0].n_minibatches
        cells += [f"{1e3 * extra:.2f} ms", f"{1e3 * median('critic_step', 'none'):.2f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(turns: list[Turn]) -> None:
    """
    :param turns: All turns
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    env_ids = [name for name in ENVIRONMENTS if any(turn.env_id == name for turn in turns)]
    shown = {
        "none": "#777777", "nystrom": "#d55e00", "nystrom columns": "#e69f00", "cg (50)": "#0072b2", "nystrom_cg": "#56b4e9",
        "exact": "#009e73",
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(11, 4.6), layout="constrained")
    width = 0.8 / len(shown)
    for i, (name, colour) in enumerate(shown.items()):
        for x, env_id in enumerate(env_ids):
            found = ratios(turns, env_id, name, "ppo")
            if len(found):
                low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
                place = x - 0.4 + (i + 0.5) * width
                axis.bar(place, middle, width, color=colour, label=name if x == 0 else None)
                axis.plot([place, place], [low, high], color="black", linewidth=1)
                authors = AUTHORS.get(env_id)
                if authors and name in ("none", "cg (50)", "nystrom"):
                    value = authors[("none", "cg (50)", "nystrom").index(name)]
                    axis.plot(place, value, "D", color="white", markeredgecolor=colour, markersize=6)
    axis.plot([], [], "D", color="white", markeredgecolor="black", label="authors' JAX code on a GPU")
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(env_ids)), [name.replace(" ", "\n") for name in env_ids], fontsize=8)
    axis.set_ylabel("runtime relative to PPO")
    axis.set_title("Time of a rollout and an update beside SB3's PPO, same schedule, one CPU thread (median, quartiles)")
    axis.set_ylim(0, None)
    figure.legend(loc="outside lower center", ncols=len(shown) + 1, fontsize=8, frameon=False)
    figure.savefig(RESULTS / "overhead.png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="What BLPO costs beside SB3's PPO at the same schedule")
    parser.add_argument(
        "--env", nargs="*", default=ENVIRONMENTS, choices=ENVIRONMENTS, help="environments to measure; none: plot"
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of each algorithm")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    for env_id in arguments.env:
        new = measure(env_id, arguments.repeats)
        turns = [turn for turn in read() if turn.env_id != env_id] + new
        write(turns)
        print(summary(new), flush=True)
    turns = read()
    plot(turns)
    print(summary(turns))


if __name__ == "__main__":
    main()

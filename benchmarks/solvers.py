"""
How good a solve of the critic's linear system is, and what it costs, by solver.

``nice python benchmarks/solvers.py`` writes two tables and two figures to ``benchmarks/results``, in about seven minutes on
one core. Times are CPU times of one thread, in float32, and those of all that a response costs a rollout: the Jacobian, the
right side, the solve and the change of the values.

(a) accuracy: ``solvers_accuracy.csv`` and ``.png``. Critics in mid-training, whole rollouts of 2,048 transitions: the relative
    error of u (how the critic's best response moves the values) against "exact" at the same damping. "256 rows" is
    :class:`SampledJacobian`, which serves critics that are not made of layers, forced on the same critics.
(b) growth: ``solvers_growth.csv`` and ``.png``. Time and largest memory on random data, by the rollout's size N.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch as th
from gymnasium import spaces
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.profiler import ProfilerActivity, profile

from sb3_blpo import zoo
from sb3_blpo.bilevel import IHVP_DEFAULTS
from sb3_blpo.curvature import GaussNewton
from sb3_blpo.ihvp import make_solver
from sb3_blpo.jacobian import SampledJacobian, Values, make_jacobian
from sb3_blpo.rollout import size, take

zoo.register()

RESULTS = Path(__file__).parent / "results"
ENVIRONMENTS = ("CartPole-v1", "LunarLander-v3", "Hopper-v5", "HalfCheetah-v5")
NETWORKS = {64: "dict(net_arch=[64, 64])", 256: "dict(activation_fn=nn.ReLU, net_arch=[256, 256])"}
N_ROLLOUTS, N_TRANSITIONS = 15, 2048
N_DRAWS = 3
RANKS, DAMPINGS = (5, 10, 20, 40), (1e-3, 1e-2, 1e-1)
#: How :func:`make_solver` calls them
SKETCHES: dict[str, dict[str, Any]] = {
    sketch: {"ihvp_solver": "nystrom", "sketch": sketch} for sketch in ("values", "gaussian", "columns")
}
SOLVERS = SKETCHES | {name: {"ihvp_solver": name} for name in ("cg", "nystrom_cg", "exact")}
ROWS = " (256 rows)"
COLOURS = {
    "values": "#d55e00", "gaussian": "#0072b2", "columns": "#56b4e9", "cg": "#009e73", "nystrom_cg": "#cc79a7",
    "exact": "black", "values" + ROWS: "#e69f00", "exact" + ROWS: "#777777",
}  # fmt: skip


class Problem(NamedTuple):
    """
    A rollout's linear system.

    :param policy: Its critic
    :param observations: Of the rollout
    :param n_states: N, how many of them are in the critic's loss
    :param c: Derivative of the leader's objective by the values of all observations
    """

    policy: ActorCriticPolicy
    observations: Any
    n_states: int
    c: th.Tensor

    def u(self, solver: str, rank: int, damping: float, seed: int) -> tuple[th.Tensor, bool]:
        """
        :param solver: A key of :data:`COLOURS`
        :param rank: Of Nyström
        :param damping: alpha in units of tr(H)
        :param seed: Of what is drawn
        :return: u (N,), and whether the solve succeeded
        """
        generator = th.Generator().manual_seed(seed)
        critic = Values(self.policy)
        parameters = [
            p for name, p in self.policy.named_parameters() if name.startswith(("mlp_extractor.value_net", "value_"))
        ]
        arguments = (lambda i: take(self.observations, i), size(self.observations), self.n_states, parameters, 256)
        if solver.endswith(ROWS):
            jacobian: Any = SampledJacobian(generator, critic, *arguments)
        else:
            jacobian = make_jacobian(self.policy, generator, *arguments)
        system = GaussNewton(jacobian, jacobian.gradient(self.c), damping)
        settings = {name: value for name, value in IHVP_DEFAULTS.items() if name != "damping"} | {"rank": rank}
        method = make_solver(**settings | SOLVERS[solver.removesuffix(ROWS)])
        assert method is not None
        solution = method.solve(system, generator)
        return jacobian.to_values(solution.v), bool(solution.ok)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.thread_time()
    result = function(*arguments)
    return result, 1000 * (time.thread_time() - start)


# (a)


def trained(env_id: str, width: int, n_rollouts: int) -> Problem:
    """Train with nested updates alone, so that no solver has a part in what it is then judged by."""
    params = {"ihvp_solver": "none", "policy_kwargs": NETWORKS[width], "n_timesteps": 10**6}
    with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as folder:

        def manager(**more: Any) -> ExperimentManager:
            return ExperimentManager(
                argparse.Namespace(), "blpo", env_id, folder, hyperparams=params | more, eval_freq=-1, seed=0, verbose=0,
                log_interval=-1, device="cpu",
            )  # fmt: skip

        n_envs = manager().read_hyperparameters()[1]["n_envs"]
        experiment = manager(n_steps=N_TRANSITIONS // n_envs).setup_experiment()
        assert experiment is not None
        model: Any = experiment[0].learn(n_rollouts * N_TRANSITIONS)
    model.policy.set_training_mode(False)
    rollout = model._finished_rollout()
    # The surrogate's derivative by each lambda-return, where the policy is still the rollout's
    weights = th.full((len(rollout),), 1 / len(rollout))
    return Problem(model.policy, rollout.observations, len(rollout), rollout.return_gradient(weights))


def cases() -> Iterator[tuple[str, int, float]]:
    """Solver, rank (of what has none: 0) and damping."""
    for damping in DAMPINGS:
        yield from ((sketch, rank, damping) for sketch in SKETCHES for rank in RANKS)
        for name in COLOURS.keys() - SKETCHES.keys():
            yield name, RANKS[2] if name.startswith(("nystrom", "values")) else 0, damping


def accuracy(n_rollouts: int) -> pd.DataFrame:
    """One row for each critic, case and draw."""
    rows = []
    for env_id in ENVIRONMENTS:
        for width in NETWORKS:
            problem = trained(env_id, width, n_rollouts)
            truths = {damping: problem.u("exact", 0, damping, 0)[0] for damping in DAMPINGS}
            for solver, rank, damping in cases():
                for seed in range(1 if solver in ("exact", "cg") else N_DRAWS):
                    (u, ok), ms = timed(problem.u, solver, rank, damping, seed)
                    error = th.linalg.vector_norm(u - truths[damping]) / th.linalg.vector_norm(truths[damping])
                    rows.append((env_id, width, solver, rank, damping, float(error), ms, not ok))
            print(f"{env_id}, {width}-{width}", flush=True)
    return pd.DataFrame(rows, columns=["environment", "width", "solver", "rank", "damping", "error", "ms", "failed"])


def summary(raw: pd.DataFrame) -> pd.DataFrame:
    """Median and largest errors by critic, and over all critics."""
    both = pd.concat([raw, raw.assign(environment="all", width=0)])
    columns = {"error_median": ("error", "median"), "error_max": ("error", "max"), "ms_median": ("ms", "median")}
    columns |= {"failed": ("failed", "sum"), "solves": ("failed", "size")}
    return both.groupby(["environment", "width", "solver", "rank", "damping"], sort=False).agg(**columns).reset_index()


def plot_accuracy(plt: Any, table: pd.DataFrame) -> Any:
    figure, axes = plt.subplots(1, len(DAMPINGS), figsize=(12, 4.4), sharey=True, layout="constrained")
    for axis, damping in zip(axes, DAMPINGS, strict=True):
        here = table[(table.environment == "all") & (table.damping == damping)]
        for name, colour in COLOURS.items():
            rows = here[here.solver == name]
            if name in SKETCHES:
                axis.loglog(rows["rank"], rows.error_median, "o-", color=colour, label=f"nystrom, {name}")
            elif name != "exact":
                axis.axhline(rows.error_median.item(), color=colour, ls="--", label=name)
        axis.axhline(0.1, color="black", lw=0.5)
        axis.set(title=f"damping {damping:g}", xlabel="rank")
        axis.set_xticks(RANKS, RANKS)
        axis.minorticks_off()
    axes[0].set_ylabel("relative error of u (median)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# (b)

SIZES = (2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
#: By the critic's width; "exact" takes time as N³
GROWING = {64: ("values", "gaussian", "columns", "cg", "exact", "values" + ROWS), 256: ("values", "values" + ROWS)}
MAX_EXACT = 5_000


def random_problem(n: int, width: int) -> Problem:
    th.manual_seed(0)
    box, net_arch = spaces.Box(-np.inf, np.inf, (17,)), [width, width]
    policy = ActorCriticPolicy(box, spaces.Discrete(2), lambda _: 0.0, net_arch).train(False)
    return Problem(policy, th.randn(n + 1, 17), n, th.randn(n + 1) / n)


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest memory that tensors, and what torch's own functions need beside them, take at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def growth(sizes: tuple[int, ...]) -> pd.DataFrame:
    rows = []
    for width, names in GROWING.items():
        for n in sizes:
            problem = random_problem(n, width)
            for name in names:
                if name == "exact" and n > MAX_EXACT:
                    continue
                arguments = name, IHVP_DEFAULTS["rank"], IHVP_DEFAULTS["damping"], 0
                mib = peak_bytes(lambda arguments=arguments, problem=problem: problem.u(*arguments)) / 2**20  # type: ignore[misc]
                ms = min(timed(problem.u, *arguments)[1] for _ in range(2))
                rows.append((width, name, n, ms, mib))
    return pd.DataFrame(rows, columns=["width", "solver", "N", "ms", "MiB"])


def plot_growth(plt: Any, table: pd.DataFrame) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for (width, name), rows in table.groupby(["width", "solver"], sort=False):
        style = {"color": COLOURS[name], "ls": "-" if width == 64 else "--", "label": f"{name}, {width}-{width}"}
        for axis, column in zip(axes, ("ms", "MiB"), strict=True):
            axis.loglog(rows.N, rows[column], marker="o", ms=3, **style)
    for axis, title in zip(axes, ("time of a response (ms)", "its largest memory (MiB)"), strict=True):
        axis.set(title=title, xlabel="transitions N of the rollout")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    import matplotlib

    parser = argparse.ArgumentParser(description="Error and cost of the solvers")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--rollouts", type=int, default=N_ROLLOUTS, help="trained before a critic is looked at")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    th.set_num_threads(1)
    tables = {"accuracy": summary(accuracy(arguments.rollouts)), "growth": growth(arguments.sizes)}
    for (name, table), plot in zip(tables.items(), (plot_accuracy, plot_growth), strict=True):
        table.to_csv(arguments.folder / f"solvers_{name}.csv", index=False, float_format="%.4g", lineterminator="\n")
        plot(plt, table).savefig(arguments.folder / f"solvers_{name}.png", dpi=100, metadata={"Software": None})
    overall = tables["accuracy"].query("environment == 'all'")
    columns = ["error_median", "ms_median"]
    print(overall.pivot(index=["solver", "rank"], columns="damping", values=columns).to_string(float_format="{:.3g}".format))
    print(tables["growth"].to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()

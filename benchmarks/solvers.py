"""
What a solve of the critic's linear system costs and how good it is, by solver and size.

``python benchmarks/solvers.py`` writes two tables and two figures to ``benchmarks/results``, in about five minutes on one
core. Times are CPU times of one thread, in float32: other jobs on the machine hardly disturb them.

(a) accuracy: ``solvers_accuracy.csv`` and ``.png``. Critics in the middle of training, all minibatches of the last rollout,
    several draws of each sketch: the relative error of u (how the critic's best response moves the values) and of v (the
    response itself) against the exact solution in float64 at the same damping, and the distance of u from the exact solution
    at a damping of 1e-4. Time is that of ``best_response``: what a solver adds to a minibatch, but for the correction's pass
    through the actor. Sketches are drawn beforehand, as training draws them once for many minibatches.
(b) growth: ``solvers_growth.csv`` and ``.png``. Time of one solve on random data, the critic's forward and backward pass
    included, and its largest memory, the sketch included: by minibatch N, by the critic's parameters P and by rank. "exact"
    is left out above N = 2048: its N × N matrix in float64 takes time as N³. Above N = 1024 gaussian, columns and cg give up
    the whole Gram matrix for products with the Jacobian, which shows as a kink.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sb3_blpo import BLPO
from sb3_blpo.chain import Chain
from sb3_blpo.curvature import Curvature
from sb3_blpo.hypergradient import best_response
from sb3_blpo.ihvp import ConjugateGradient, Exact, Nystrom, Solution, Solver
from sb3_blpo.jacobian import Jacobian
from sb3_blpo.layers import ChainJacobian

RESULTS = Path(__file__).parent / "results"
DAMPING, WEAK_DAMPING = 0.01, 1e-4
#: The package's default
RANK = 20
#: Environments and the steps trained on each
STEPS = {"Hopper-v5": 40_000, "HalfCheetah-v5": 40_000, "Humanoid-v5": 25_000, "LunarLander-v3": 40_000}
N_DRAWS = 5
SKETCHES = ("values", "gaussian", "columns")
RANKS = (1, 2, 5, 10, 20, 30, 50, 100)
ITERATIONS = (1, 2, 5, 10, 20, 50)
#: Of each solver, ranks or iterations
SIZES = {sketch: RANKS for sketch in SKETCHES} | {"cg": ITERATIONS, "nystrom_cg": ITERATIONS, "exact": (0,)}
LABELS = {
    "values": "nystrom, values",
    "gaussian": "nystrom, gaussian",
    "columns": "nystrom, columns (the paper's)",
    "cg": "cg",
    "nystrom_cg": f"nystrom_cg (values, rank {RANK})",
    "exact": "exact",
}
COLOURS = {
    "values": "#d55e00",
    "gaussian": "#0072b2",
    "columns": "#56b4e9",
    "cg": "#009e73",
    "nystrom_cg": "#cc79a7",
    "exact": "black",
}
GREY = "#777777"


def make(name: str, size: int, tol: float = 1e-5) -> Solver:
    """
    :param name: A key of :data:`SIZES`
    :param size: The rank, or the number of iterations
    :param tol: At which CG stops
    :return: The solver
    """
    if name == "exact":
        return Exact()
    if name in SKETCHES:
        return Nystrom(size, name)
    return ConjugateGradient(size, tol, None if name == "cg" else Nystrom(RANK, "values"))


# (a)


class Recorded(Solver):
    """A solver whose last solution can be had as a parameter vector."""

    curvature: Curvature
    solution: Solution

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.needs_gram = solver.needs_gram

    def draw(self, like: th.Tensor, generator: th.Generator) -> None:
        self.solver.draw(like, generator)

    def solve(self, curvature: Curvature, alpha: th.Tensor) -> Solution:
        self.curvature, self.solution = curvature, self.solver.solve(curvature, alpha)
        return self.solution

    def v(self) -> th.Tensor:
        """The last solution (n_params,)."""
        return self.curvature.to_parameters(self.solution.x)


class Problem(NamedTuple):
    """
    A minibatch's linear system.

    :param jacobian: Makes the Jacobian, so that each solve pays for its own
    :param coefficients: Of the right side (n_rows,)
    :param residuals: Of the critic (N,)
    """

    jacobian: Callable[[], Jacobian]
    coefficients: th.Tensor
    residuals: th.Tensor

    def u(self, jacobian: Jacobian, solver: Solver, damping: float = DAMPING) -> tuple[th.Tensor, bool]:
        """Return u, and whether the solve succeeded."""
        coefficients, residuals = self.coefficients.to(jacobian.values.dtype), self.residuals.to(jacobian.values.dtype)
        response = best_response(jacobian, coefficients, residuals, solver, damping, "gauss_newton", with_residual=False)
        return response.u, bool(response.ok)


def trained(env_id: str, n_steps: int) -> BLPO:
    """Train on nested updates alone, so that no solver has a part in what it is then judged by."""
    env = make_vec_env(env_id, 8, seed=0)
    if isinstance(env.action_space, gym.spaces.Box):
        env = VecNormalize(env)
    model = BLPO(
        "MlpPolicy",
        env,
        n_steps=256,
        batch_size=256,
        critic_learning_rate=1.2e-3,
        ihvp_solver="none",
        seed=0,
        device="cpu",
    )
    return model.learn(n_steps)


def minibatches(model: BLPO) -> Iterator[tuple[Problem, Jacobian]]:
    """The linear systems of the last rollout's minibatches, and their Jacobians in float64."""
    chain = model.critic.chain
    assert chain is not None
    for segment in model._segments():
        n, observations = segment.n_transitions, segment.observations
        assert isinstance(observations, th.Tensor)
        observations = observations.float()
        coefficients = segment.return_gradient(th.full((n,), 1 / n))
        residuals = model.critic.values(observations)[:n] - segment.returns
        problem = Problem(functools.partial(ChainJacobian, chain, observations), coefficients, residuals)
        yield problem, ChainJacobian(copy.deepcopy(chain).double(), observations.double())


def relative(x: th.Tensor, truth: th.Tensor) -> float:
    return (th.linalg.vector_norm(x.double() - truth) / th.linalg.vector_norm(truth)).item()


@th.no_grad()
def accuracy(model: BLPO) -> pd.DataFrame:
    """One row for each solver, size, draw and minibatch."""
    problems, truths = [], []
    for problem, jacobian in minibatches(model):
        exact = Recorded(Exact())
        u_weak = problem.u(jacobian, exact, WEAK_DAMPING)[0]
        u = problem.u(jacobian, exact)[0]
        problems.append(problem)
        truths.append((u, exact.v(), u_weak))
    like = th.zeros(problems[0].jacobian().n_params)
    generator = th.Generator().manual_seed(0)
    rows = []
    for name, sizes in SIZES.items():
        for size in sizes:
            solver = Recorded(make(name, size))
            for _ in range(N_DRAWS):
                solver.draw(like, generator)
                for problem, (u_true, v_true, u_weak) in zip(problems, truths, strict=True):
                    jacobian = problem.jacobian()
                    start = time.thread_time()
                    u, ok = problem.u(jacobian, solver)
                    seconds = time.thread_time() - start
                    errors = relative(u, u_true), relative(solver.v(), v_true), relative(u, u_weak)
                    rows.append((name, size, *errors, 1000 * seconds, not ok))
    return pd.DataFrame(rows, columns=["solver", "size", "u", "v", "u_weak", "ms", "failed"])


def summary(raw: pd.DataFrame) -> pd.DataFrame:
    """Median and largest errors by environment, and of all of them together."""
    both = pd.concat([raw, raw.assign(environment="all")])
    return (
        both.groupby(["environment", "solver", "size"], sort=False)
        .agg(
            u_median=("u", "median"),
            u_max=("u", "max"),
            v_median=("v", "median"),
            v_max=("v", "max"),
            u_median_from_exact_1e_4=("u_weak", "median"),
            ms_median=("ms", "median"),
            failed=("failed", "sum"),
            solves=("failed", "size"),
        )
        .reset_index()
    )


def plot_accuracy(plt: Any, table: pd.DataFrame) -> Any:
    figure, axes = plt.subplots(1, len(STEPS), figsize=(14, 4.8), sharex=True, sharey=True, layout="constrained")
    for ax, env_id in zip(axes, STEPS, strict=True):
        here = table[table.environment == env_id].set_index(["solver", "size"])[["ms_median", "u_median"]]
        default = here.loc["values", RANK]
        ax.plot(*default, "*", ms=18, color=COLOURS["values"], mec="black", zorder=5, label=f"default: values, rank {RANK}")
        for name in SIZES:
            if name == "exact":
                ax.axvline(here.loc[name, 0].ms_median, color=COLOURS[name], ls=":", label="time of exact")
                continue
            width = 2.4 if name == "values" else 1.4
            ax.loglog(*here.loc[name].to_numpy().T, "o-", ms=3, lw=width, color=COLOURS[name], label=LABELS[name])
        for name, x, side in (("values", -7, "right"), ("gaussian", 5, "left")):
            for rank in (RANKS[0], RANKS[-1]):
                offset = {"textcoords": "offset points", "xytext": (x, -3), "ha": side, "fontsize": 8}
                ax.annotate(f"rank {rank}", here.loc[name, rank], color=COLOURS[name], **offset)
        ax.axhline(0.1, color=GREY, ls="--", lw=1)
        ax.set(title=env_id, xlabel="time of one solve (ms)", xlim=(0.06, 150), ylim=(3e-6, 90))
    axes[0].set_ylabel("relative error of u (median)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# (b)

N_INPUTS = 17
GROWTH_SOLVERS = {"values": RANK, "gaussian": RANK, "columns": RANK, "cg": 50, "exact": 0}


def random_problem(n: int, width: int) -> Problem:
    """N consecutive states of one environment, and the state after them."""
    th.manual_seed(0)
    chain = Chain([nn.Linear(N_INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)])
    observations = th.randn(n + 1, N_INPUTS)
    return Problem(lambda: ChainJacobian(chain, observations), th.randn(n + 1) / n, th.randn(n))


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest memory that tensors, and what torch's own functions need beside them, take at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


@th.no_grad()
def cost(name: str, size: int, n: int, width: int) -> dict[str, Any]:
    """Time and memory of one solve."""
    problem = random_problem(n, width)
    solver = make(name, size, tol=0)
    n_params = problem.jacobian().n_params

    def draw() -> None:
        solver.draw(th.zeros(n_params), th.Generator().manual_seed(0))

    def solve() -> float:
        start = time.thread_time()
        problem.u(problem.jacobian(), solver)
        return time.thread_time() - start

    def draw_and_solve() -> None:
        draw()
        times.append(solve())

    times: list[float] = []
    n_bytes = peak_bytes(draw_and_solve)
    if times[0] < 2:  # else one is enough, and the profiler's own time does not count
        times = [solve()]
        while len(times) < 3 or (len(times) < 20 and sum(times) < 0.3):
            times.append(solve())
    return {
        "solver": name, "size": size, "N": n, "P": n_params, "width": width,
        "ms": 1000 * float(np.median(times)), "MiB": n_bytes / 2**20,
    }  # fmt: skip


class Sweep(NamedTuple):
    """
    :param title: What the panel shows
    :param x: What grows: "N", "P" or "size"
    :param cells: (solver, size, N, width)
    """

    title: str
    x: str
    cells: list[tuple[str, int, int, int]]


def by_default(points: list[tuple[int, int]]) -> list[tuple[str, int, int, int]]:
    return [(name, size, n, w) for name, size in GROWTH_SOLVERS.items() for n, w in points if name != "exact" or n <= 2048]


SWEEPS = [
    Sweep("critic 64-64", "N", by_default([(2**k, 64) for k in range(6, 14)])),
    Sweep("critic 1024-1024", "N", by_default([(n, 1024) for n in (512, 2048, 8192)])),
    Sweep("N = 256, critics 64-64 to 1024-1024", "P", by_default([(256, width) for width in (64, 128, 256, 512, 1024)])),
    Sweep(
        "N = 256, critic 64-64",
        "size",
        [(sketch, rank, 256, 64) for sketch in SKETCHES for rank in (1, 2, 5, 10, 20, 50, 100, 200)],
    ),
]
AXES = {"N": "minibatch N", "P": "parameters P", "size": "rank"}


def growth() -> pd.DataFrame:
    cost("cg", 2, 64, 64)  # whatever is slow the first time
    return pd.DataFrame([{"sweep": i, **cost(*cell)} for i, sweep in enumerate(SWEEPS) for cell in sweep.cells])


def plot_growth(plt: Any, table: pd.DataFrame) -> Any:
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(15, 7.2), sharex="col", sharey="row", layout="constrained")
    for i, sweep in enumerate(SWEEPS):
        here = table[table.sweep == i]
        top, bottom = axes[:, i]
        for name, rows in here.groupby("solver", sort=False):
            of_size = "" if sweep.x == "size" else {"cg": ", 50 iterations", "exact": ""}.get(name, f", rank {RANK}")
            label = LABELS[name].split(" (")[0] + of_size
            style = {"color": COLOURS[name], "label": label, "lw": 2.2 if name == "values" else 1.3, "ms": 3.5}
            top.loglog(rows[sweep.x], rows.ms, "o-", **style)
            bottom.loglog(rows[sweep.x], rows.MiB, "o-", **style)
        points = here.drop_duplicates(sweep.x)
        bottom.plot(points[sweep.x], 4 * points.N * points.P / 2**20, ":", color=GREY, label="N × P floats, for comparison")
        bottom.plot(points[sweep.x], 4 * points.P**2 / 2**20, "--", color=GREY, label="P × P floats")
        top.set(title=sweep.title)
        bottom.set_xlabel(AXES[sweep.x])
        if len(points) < 4:  # less than a decade or so, which has ticks of its own
            bottom.set_xticks(points[sweep.x], points[sweep.x])
            bottom.minorticks_off()
    axes[0, 0].set(ylabel="time of one solve (ms)")
    axes[1, 0].set(ylabel="its largest memory (MiB)", ylim=(0.02, 1e5))
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def slope(table: pd.DataFrame, x: str, y: str) -> float:
    """Of y over x in log-log, at the upper end of x: 1 for linear growth."""
    last = table.sort_values(x).tail(3)
    return float(np.polyfit(np.log(last[x]), np.log(last[y]), 1)[0])


def report(table: pd.DataFrame, costs: pd.DataFrame) -> None:
    """Print what the figures show."""
    wide = table[table.solver != "exact"].assign(
        cell=lambda t: t.u_median.map("{:.2g}".format) + " / " + t.u_max.map("{:.2g}".format)
    )
    print("\nRelative error of u, median / largest")
    print(wide.pivot(index=["solver", "size"], columns="environment", values="cell").loc[list(SIZES)[:-1], [*STEPS, "all"]])
    print("\nRank or iterations as default: error of u and v, distance of u to exact at 1e-4 (medians), ms")
    default = table[
        table["size"].isin([RANK, 0]) & table.solver.isin([*SKETCHES, "exact"])
        | (table["size"] == 50) & (table.solver == "cg")
    ]
    columns = ["environment", "solver", "size", "u_median", "v_median", "u_median_from_exact_1e_4", "ms_median", "failed"]
    print(default[columns].to_string(index=False, float_format="{:.3g}".format))
    pooled = table[table.environment == "all"]
    for sketch in SKETCHES:
        good = pooled[(pooled.solver == sketch) & (pooled.u_median <= 0.1)]
        print(
            f"{sketch}: smallest rank with a median error of u of at most 0.1: {good['size'].min() if len(good) else 'none'}"
        )
    times = pooled.set_index(["solver", "size"]).ms_median
    ratios = {name: times[name, size] / times["values", RANK] for name, size in GROWTH_SOLVERS.items()}
    print("time of one solve, values = 1:", ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()))
    print("\nGrowth, slopes at the upper end in log-log (time, memory)")
    for i, sweep in enumerate(SWEEPS):
        for name, rows in costs[costs.sweep == i].groupby("solver", sort=False):
            slopes = f"{slope(rows, sweep.x, 'ms'):5.2f}, {slope(rows, sweep.x, 'MiB'):5.2f}"
            last = rows.iloc[-1]
            print(f"{AXES[sweep.x]:12} {sweep.title:36} {name:10} {slopes}   at the end {last.ms:9.2f} ms {last.MiB:8.2f} MiB")


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    start = time.perf_counter()
    th.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    pd.set_option("display.width", 127, "display.max_columns", 20, "display.max_rows", 200)

    table = summary(pd.concat([accuracy(trained(*item)).assign(environment=item[0]) for item in STEPS.items()]))
    print(f"accuracy: {time.perf_counter() - start:.0f} s", flush=True)
    costs = growth()
    for name, data, figure in (
        ("accuracy", table, plot_accuracy(plt, table)),
        ("growth", costs, plot_growth(plt, costs)),
    ):
        data.to_csv(RESULTS / f"solvers_{name}.csv", index=False, float_format="%.4g", lineterminator="\n")
        figure.savefig(RESULTS / f"solvers_{name}.png", dpi=100, metadata={"Software": None})
    report(table, costs)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

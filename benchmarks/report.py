"""
Tables and figures of what run.py recorded.

``python benchmarks/report.py`` reads ``benchmarks/results/returns/returns.csv`` alone, or the CSV that it is given, complete
or not, and writes ``report.md`` and figures beside it. What the numbers mean: returns.py.
"""

import argparse
import itertools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from returns import (
    BLPO,
    COLOURS,
    N_DRAWS,
    NONE,
    PPO,
    RANDOM,
    Estimate,
    Results,
    Task,
    area,
    estimate,
    final,
    groups,
    iqm,
    mean,
)
from scipy import stats

RETURNS = Path(__file__).parent / "results" / "returns" / "returns.csv"
DIFFERENCES_TO = ("PPO (BLPO's schedule)", NONE, BLPO)
COVERAGE = (
    "Intervals are 95 % of a bootstrap over runs. With five normally distributed runs a task they cover the truth in 84 % "
    "(mean, one task) to 93 % (IQM, three tasks) of the cases, with ten in 90 to 94 %, and one in eight differences of two "
    "such means, with ten runs one in 13, leaves out zero though there is none: of many, some will. An interval of no width "
    "says that these runs ended alike, and nothing of others."
)
ABOVE = "that a single run ends above one of theirs, mean over the tasks; equal returns count one half"


def markdown(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """
    :param header: Titles of the columns
    :param rows: Cells
    :return: A table
    """
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def inventory(results: Results) -> str:
    """
    :param results: All runs
    :return: How many runs there are, and what they were made with
    """
    counts = {key: runs.returns.shape[1] for key, runs in results.runs.items()}
    rows = [[name, *(counts.get((name, task), "") for task in results.tasks)] for name in results.algorithms]
    without = sorted({task.env_id for task in results.tasks} - results.random.keys())
    made_with = [f"{column}: {'; '.join(map(str, results.table[column].unique()))}" for column in ("commit", "versions")]
    return "\n\n".join([
        f"Number of runs; complete: {max(counts.values())}.",
        markdown(["", *results.tasks], rows),
        *([f"Without a random policy there is no normalised score: {', '.join(without)}."] if without else []),
        *made_with,
    ])  # fmt: skip


def aggregate(results: Results) -> str:
    """
    :param results: All runs
    :return: Table over groups of tasks
    """
    rows, complete = [], results.complete
    for (title, all_tasks), name in itertools.product(groups(results.tasks).items(), results.algorithms):
        tasks = [task for task in all_tasks if task in complete]
        if tasks and results.have(name, tasks=tasks) == tasks:  # over other tasks it is not to be compared
            rows.append([
                title, f"{len(tasks)} of {len(all_tasks)}", name,
                estimate(results.relative, iqm, final, name, tasks),
                estimate(results.relative, mean, final, name, tasks),
                estimate(results.relative, iqm, area, name, tasks),
                estimate(results.improvement, name, PPO, tasks),
                estimate(results.arrival, "steps", name, tasks),
                estimate(results.arrival, "seconds", name, tasks),
            ])  # fmt: skip
    header = [
        "", "tasks", "algorithm", "final return, IQM", "final return, mean", "area under the curve, IQM", "P(above PPO)",
        "steps to PPO's final return", "CPU time to it",
    ]  # fmt: skip
    return (
        "Relative to tuned PPO: returns as (return - random policy) / (PPO - random policy), final ones from the last 10 % of "
        "training; steps and time until the mean curve first reaches PPO's final return, as parts of PPO's whole training, "
        "median over the tasks. CPU times compare algorithms only as far as they ran on the same machine. "
        f"P(above PPO): {ABOVE}. Tasks on which runs are missing are left out, and so are algorithms that were not run on all "
        f"the others. {COVERAGE}\n\n" + markdown(header, rows)
    )


def by_task(results: Results) -> str:
    """
    :param results: All runs
    :return: Table of every algorithm on every task
    """
    rows = []
    for task, name in itertools.product(results.tasks, results.algorithms):
        if not results.have(name, tasks=[task]):
            continue
        scores = final(results.runs[name, task].returns[0])
        comparable = bool(results.have(PPO, RANDOM, tasks=[task]))
        rows.append([
            task, name, len(scores),
            f"{scores.mean():.1f}" + (f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""),
            estimate(results.raw, iqm, name, task),
            estimate(results.relative, mean, area, name, [task]) if comparable else "",
            estimate(results.arrival, "steps", name, [task]) if comparable else "",
            estimate(results.arrival, "seconds", name, [task]) if comparable else "",
            f"{results.runs[name, task].seconds[0, :, -1].mean():.0f}",
        ])  # fmt: skip
    header = [
        "", "algorithm", "runs", "final return, mean ± std", "IQM", "area / PPO's", "steps to PPO's final return",
        "CPU time to it", "CPU seconds",
    ]  # fmt: skip
    return markdown(header, rows)


def visible(found: Estimate, n_runs: Sequence[int]) -> str:
    """
    :param found: A difference of two algorithms
    :param n_runs: Number of runs of the one and of the other, for each task
    :return: About the true difference that as many runs show in four of five cases, by a t test at 5 %; empty for single runs
    """
    if min(n_runs) < 2:
        return ""
    freedom = sum(n_runs) - len(n_runs)
    error = found.error * np.sqrt(sum(n_runs) / freedom)  # the bootstrap divides by n, not by n - 1
    smallest = error * (stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom))
    return f"{float(f'{smallest:.2g}'):g}"


def differences(results: Results, other: str, left_out: Collection[str] = ()) -> str:
    """
    :param results: All runs
    :param other: An algorithm
    :param left_out: Algorithms that are not shown
    :return: Table of the others' final returns minus its own
    """
    rows = []
    for name in (name for name in results.algorithms if name != other and name not in left_out):
        found: list[tuple[Any, list[Task], Estimate, Estimate | str]] = []
        for title, tasks in groups(results.have(name, other, tasks=results.complete)).items():
            if len(tasks) > 1:
                of_mean, of_iqm = (estimate(results.difference, center, name, other, tasks) for center in (mean, iqm))
                found.append((f"{title} ({len(tasks)})", tasks, of_mean, of_iqm))
        for task in results.have(name, other):
            found.append((task, [task], estimate(results.raw_difference, name, other, task), ""))
        for title, tasks, difference, of_iqms in found:
            n_runs = [results.runs[who, task].returns.shape[1] for task in tasks for who in (name, other)]
            better = estimate(results.improvement, name, other, tasks)
            rows.append([name, title, difference, visible(difference, n_runs), of_iqms, better])
    return (
        "Final returns: differences of means and, over groups of tasks (in brackets: how many), of IQM, there in units of "
        "tuned PPO's, on single tasks in units of return. Smallest visible: the true difference of means that as many runs "
        f"would show in about four of five cases, by a t test at 5 %. P(above): {ABOVE}."
        "\n\n" + markdown(["", "tasks", f"minus {other}", "smallest visible", "of IQM", "P(above)"], rows)
    )


def tables(results: Results) -> str:
    """
    :param results: All runs
    :return: The report, but for its figures
    """
    sections = {"Runs": inventory(results), "Aggregated": aggregate(results), "Tasks": by_task(results)}
    for i, name in enumerate(DIFFERENCES_TO):
        if name in results.algorithms:
            sections[f"Differences to {name}"] = differences(results, name, left_out=DIFFERENCES_TO[:i])
    return "# Returns\n\n" + "\n\n".join(f"## {title}\n\n{section}" for title, section in sections.items()) + "\n"


def bar(axis: Any, found: Estimate, place: float, colour: str) -> None:
    """
    :param axis: Where to draw
    :param found: A number with its interval
    :param place: Height
    :param colour: Colour
    """
    axis.plot([found.low, found.high], [place, place], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
    axis.plot(found.value, place, "o", color=colour, markersize=7)


def save(figure: Any, shown: list[str], path: Path) -> None:
    """
    :param figure: A figure
    :param shown: Algorithms for the legend
    :param path: The PNG
    """
    handles = [figure.axes[0].plot([], [], color=COLOURS[name], linewidth=4)[0] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=max(1, len(shown)), frameon=False)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_curves(results: Results, path: Path) -> None:
    """
    :param results: All runs
    :param path: The PNG
    """
    from matplotlib import pyplot as plt

    n_columns = min(3, len(results.tasks))
    n_rows = -(-len(results.tasks) // n_columns)
    width = max(4 * n_columns, 8)  # of the title and the legend
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(width, 2.9 * n_rows + 0.5), squeeze=False, layout="constrained")
    for axis, task in itertools.zip_longest(axes.flat, results.tasks):
        if task is None:
            axis.set_axis_off()
            continue
        for name in (name for name in COLOURS if (name, task) in results.runs):
            runs = results.runs[name, task]
            low, high = np.quantile(results.draw(name, task, N_DRAWS).returns.mean(1), [0.025, 0.975], axis=0)
            axis.plot(runs.steps, runs.returns[0].mean(0), color=COLOURS[name], linewidth=2, zorder=3 if name == BLPO else 2)
            axis.fill_between(runs.steps, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        if task.env_id in results.random:
            axis.axhline(results.random[task.env_id], color="black", linewidth=0.8, linestyle=":")
        n_runs = [results.runs[name, task].returns.shape[1] for name in results.colored if (name, task) in results.runs]
        ends = sorted({min(n_runs, default=0), max(n_runs, default=0)})
        axis.set_title(f"{task} (runs: {' to '.join(map(str, ends))})", fontsize=11)
        axis.set_xlim(0, task.n_timesteps)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
    figure.suptitle("Return along training: mean of the runs with its 95 % interval (dotted: random policy)")
    save(figure, results.colored, path)


def plot_final(results: Results, path: Path) -> None:
    """
    :param results: All runs
    :param path: The PNG: final return of each algorithm on each task
    """
    from matplotlib import pyplot as plt

    n = max(1, len(results.tasks))
    figure, axes = plt.subplots(1, n, figsize=(max(2 * n, 8), 3.2), squeeze=False, layout="constrained")
    for axis, task in zip(axes.flat, results.tasks, strict=False):
        for i, name in enumerate(name for name in results.colored if (name, task) in results.runs):
            found = estimate(results.raw, mean, name, task)
            axis.plot([i, i], [found.low, found.high], color=COLOURS[name], linewidth=4, alpha=0.35, solid_capstyle="butt")
            axis.plot(i, found.value, "o", color=COLOURS[name], markersize=7)
        axis.set_title(f"{task.env_id.rsplit('-', 1)[0]}\n{task.n_timesteps // 1000}k steps", fontsize=11)
        axis.set_xticks([])
        axis.margins(x=0.2)
    figure.suptitle("Final return: mean of the runs with its 95 % interval")
    save(figure, results.colored, path)


def plot_ablation(results: Results, path: Path) -> None:
    """
    :param results: All runs
    :param path: The PNG, if there is a task with more than one variant: a single one is in the tables
    """
    from matplotlib import pyplot as plt

    variants = [name for name in results.algorithms if name not in COLOURS]
    tasks = [task for task in results.have(NONE) if sum((name, task) in results.runs for name in variants) > 1]
    if not tasks:
        return
    names = [name for name in results.algorithms if name not in (NONE, PPO)]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3 + 3 * len(tasks), 1.5 + 0.3 * len(names)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=True):
        for i, name in enumerate(names):
            if (name, task) in results.runs:
                colour = COLOURS.get(name, "black")
                bar(axis, estimate(results.raw_difference, name, NONE, task), -i, colour)
        axis.axvline(0, color=COLOURS[NONE], linewidth=2)
        axis.set_title(task, fontsize=11)
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks([-i for i in range(len(names))], names)
    figure.suptitle(f"Final return minus that of {NONE} (mean, 95 %)")
    save(figure, [], path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of what run.py recorded")
    parser.add_argument("csv", nargs="?", type=Path, default=RETURNS)
    path = parser.parse_args().csv
    import matplotlib

    matplotlib.use("Agg")
    results = Results(pd.read_csv(path, dtype={"commit": str}))
    text = tables(results)
    (path.parent / "report.md").write_text(text)
    print(text)
    plot_final(results, path.parent / "returns_final.png")
    plot_curves(results, path.parent / "returns_curves.png")
    plot_ablation(results, path.parent / "returns_ablation.png")


if __name__ == "__main__":
    main()

"""benchmarks/report.py, returns.py: what the tables and figures say of recorded runs."""

import sys

import numpy as np
import pandas as pd
import pytest
import report
import returns
from scipy import stats

pytestmark = pytest.mark.benchmarks


def curve(values):
    """Rows of one run: its returns at the evaluations."""
    return [{"step": 1000 * (k + 1), "mean_return": value} for k, value in enumerate(values)]


def table(runs, random=None):
    rows = []
    for (algorithm, env_id, n_timesteps), curves in runs.items():
        for seed, values in enumerate(curves):
            speed = 2.0 if algorithm == returns.PPO else 1.0
            for row in curve(values):
                head = {"algorithm": algorithm, "env_id": env_id, "n_timesteps": n_timesteps, "seed": seed}
                rows.append(head | row | {"cpu_seconds": speed * row["step"] / 1000})
    for env_id, value in (random or {}).items():
        head = {"algorithm": "random", "env_id": env_id, "n_timesteps": 0, "step": 0, "cpu_seconds": 0.0}
        rows += [head | {"seed": seed, "mean_return": value + shift} for seed, shift in enumerate((-1, 1))]
    return pd.DataFrame(rows).assign(std_return=0.0, seconds=0.0, config="x", commit="12e4567", versions="v")


HOPPER, CARTPOLE = returns.Task("Hopper-v5", 10_000), returns.Task("CartPole-v1", 10_000)


def flat(*scores):
    return [[score] * 10 for score in scores]


@pytest.fixture
def results():
    return returns.Results(table({
        (returns.BLPO, *HOPPER): flat(10, 40, 20, 30),
        (returns.PPO, *HOPPER): flat(5, 10, 15, 20),
        (returns.BLPO, *CARTPOLE): [[5 * k for k in range(1, 11)]] * 4,
        (returns.PPO, *CARTPOLE): flat(22, 22, 22, 22),
    }, {"Hopper-v5": 2.5, "CartPole-v1": 2}))  # fmt: skip


@pytest.mark.parametrize("n, first", [(10, 9), (20, 18), (5, 5), (4, 4)])
def test_final_is_the_last_tenth(n, first):
    assert returns.final(np.arange(1, n + 1)) == np.arange(first, n + 1).mean()


def test_interquartile_mean():
    assert returns.iqm(np.array([100, 1, 2, 3, -50])) == 2
    assert returns.iqm(np.array([4, 1, 3, 2])) == 2.5
    assert returns.iqm(np.array([1, 2, 9])) == 4


def test_normalized_by_hand(results):
    assert results.normalized(returns.final, returns.BLPO, [HOPPER], 0).tolist() == [[0.75, 3.75, 1.75, 2.75]]
    # CartPole: (47.5 - 2) / (22 - 2), four times
    both = results.relative(returns.iqm, returns.final, returns.BLPO, [HOPPER, CARTPOLE], 0)
    assert both == pytest.approx(np.mean([2.275] * 4))
    assert results.relative(returns.mean, returns.area, returns.BLPO, [CARTPOLE], 0) == pytest.approx((27.5 - 2) / 20)
    assert results.raw(returns.iqm, returns.BLPO, HOPPER, 0) == 25
    assert results.difference(returns.mean, returns.BLPO, returns.PPO, [HOPPER], 0) == pytest.approx(1.25)


def test_improvement_by_hand(results):
    # Above 5, 10, 15, 20: 10 in 1.5 of 4 cases, 20 in 3.5, 30 and 40 always
    assert results.improvement(returns.BLPO, returns.PPO, [HOPPER], 0) == pytest.approx(13 / 16)
    assert results.improvement(returns.BLPO, returns.PPO, [HOPPER, CARTPOLE], 0) == pytest.approx((13 / 16 + 1) / 2)


def test_arrival_by_hand(results):
    # 5 k reaches 22 at k = 4.4 of 10; PPO's ten take twice the time
    assert results.arrival("steps", returns.BLPO, [CARTPOLE], 0) == pytest.approx(0.44)
    assert results.arrival("seconds", returns.BLPO, [CARTPOLE], 0) == pytest.approx(0.22)
    assert results.arrival("steps", returns.BLPO, [HOPPER], 0) == pytest.approx(0.1)
    assert results.arrival("steps", returns.PPO, [CARTPOLE], 0) == pytest.approx(0.1)
    low = returns.Results(table({(returns.BLPO, *HOPPER): flat(1, 2), (returns.PPO, *HOPPER): flat(3, 4)}))
    found = returns.estimate(low.arrival, "steps", returns.BLPO, [HOPPER])
    assert str(found) == "never [never, never]"


def test_interval(results):
    found = returns.estimate(results.raw, returns.mean, returns.BLPO, HOPPER)
    # 256 equally likely samples of four: 2.5 % of them have a mean of at most 15
    assert found == returns.estimate(results.raw, returns.mean, returns.BLPO, HOPPER)
    assert found.value == 25 and (found.low, found.high) == (15, 35)
    assert found.error == pytest.approx(np.sqrt(125 / 4), rel=0.03)
    # PPO's runs are drawn, too, so its own mean is exact and its score is not
    assert returns.estimate(results.relative, returns.mean, returns.final, returns.PPO, [HOPPER])[:3] == pytest.approx(
        (1, 1, 1)
    )
    relative = returns.estimate(results.relative, returns.mean, returns.final, returns.BLPO, [HOPPER])
    assert relative.error > found.error / 10


def test_as_rliable():
    metrics = pytest.importorskip("rliable.metrics")
    library = pytest.importorskip("rliable.library")
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(5, 3))
    others = generator.normal(size=(5, 3))
    tasks = [returns.Task(f"Task{i}-v0", 10_000) for i in range(3)]
    results = returns.Results(table(
        {(name, *task): flat(*x[:, i]) for i, task in enumerate(tasks) for name, x in (("A", scores), ("B", others))}
        | {(returns.PPO, *task): flat(1, 1) for task in tasks},
        dict.fromkeys((task.env_id for task in tasks), 0),
    ))  # fmt: skip
    found = returns.estimate(results.relative, returns.iqm, returns.final, "A", tasks)
    point, interval = library.get_interval_estimates(
        {"A": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=5000, random_state=np.random.RandomState(0)
    )
    assert found.value == pytest.approx(point["A"][0])
    assert [found.low, found.high] == pytest.approx(interval["A"][:, 0], abs=0.05)
    better = results.improvement("A", "B", tasks, 0)[0]
    assert better == pytest.approx(metrics.probability_of_improvement(scores, others))


def test_groups():
    longer, acrobot, lander = (
        returns.Task(*task) for task in (("Hopper-v5", 20_000), ("Acrobot-v1", 5), ("LunarLander-v3", 6))
    )
    assert returns.groups([longer, HOPPER, CARTPOLE, acrobot, lander]) == {
        "MuJoCo, 20k": [longer],
        "MuJoCo, 10k": [HOPPER],
        "tasks that saturate": [CARTPOLE, acrobot],
        "all": [HOPPER, CARTPOLE, acrobot, lander],
    }
    assert returns.groups([CARTPOLE, acrobot]) == {"tasks that saturate": [CARTPOLE, acrobot]}


def test_smallest_visible():
    """A t test at 5 % finds that difference in four of five cases."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 20_000, 5))
    # The bootstrap's standard error of the difference of two means of five, were their standard deviation known to be 1
    error = np.sqrt(2 / 5 * 4 / 5)
    shift = float(report.visible(returns.Estimate(0, 0, 0, error), [5, 5]))
    assert (stats.ttest_ind(x + shift, y, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.05)
    assert report.visible(returns.Estimate(0, 0, 0, error), [5, 1]) == ""


def test_difference_in_returns(results):
    found = report.differences(results, returns.PPO)
    assert "| BLPO | Hopper-v5, 10k | 12.5 [" in found and "| BLPO | CartPole-v1, 10k | 25.5 [" in found
    # Over both, of the mean: 1.25 on the first, (47.5 - 2) / 20 - 1 on the second; of the IQM: 2.275 - 1
    (line,) = (line for line in found.splitlines() if "| BLPO | all (2) |" in line)
    means, _, iqms = line.split(" | ")[2:5]
    assert means.startswith("1.26 [") and iqms.startswith("1.27 [")
    # By hand in test_improvement_by_hand
    (line,) = (line for line in found.splitlines() if "| BLPO | Hopper-v5, 10k |" in line)
    assert line.split(" | ")[-1].startswith("0.81 [")


def test_other_hyperparameters_are_not_pooled():
    rows = table({(returns.BLPO, *HOPPER): flat(1, 2)})
    rows.loc[rows.seed == 1, "config"] = "y"
    with pytest.raises(ValueError, match="BLPO on Hopper-v5 has runs with different hyperparameters"):
        returns.Results(rows)


@pytest.mark.parametrize("left", ["all", "no PPO", "no random", "one"])
def test_report_of_a_part(left, results, tmp_path, monkeypatch, capsys):
    rows = results.table
    rows = {
        "all": rows,
        "no PPO": rows[rows.algorithm != returns.PPO],
        "no random": rows[rows.algorithm != "random"],
        "one": rows[(rows.algorithm == returns.BLPO) & (rows.env_id == "Hopper-v5") & (rows.seed == 0)],
    }[left]
    own = rows[rows.algorithm == returns.BLPO]
    more = [own.assign(algorithm=name) for name in ("BLPO, variant", "BLPO, other", returns.NONE)]
    path = tmp_path / "returns.csv"
    pd.concat([rows, *more]).to_csv(path, index=False)
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    monkeypatch.setattr(report, "N_DRAWS", 100)
    report.main()
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert "| Hopper-v5, 10k | BLPO |" in text and "nan" not in text
    assert "commit: 12e4567\n" in text
    assert ("## Differences to BLPO none" in text) and ("no normalised score: " in text) == (left in ("no random", "one"))
    figures = {"returns_curves.png", "returns_final.png", "returns_ablation.png"}
    assert {file.name for file in tmp_path.glob("*.png")} == figures


def test_only_complete_tasks_are_aggregated(results):
    rows = results.table
    assert results.complete == [HOPPER, CARTPOLE]
    variant = rows[(rows.algorithm == returns.BLPO) & (rows.seed == 0)].assign(algorithm="BLPO, variant")
    assert returns.Results(pd.concat([rows, variant])).complete == [HOPPER, CARTPOLE]
    for name in (returns.BLPO, returns.PPO):
        lacking = returns.Results(rows[(rows.algorithm != name) | (rows.env_id != "Hopper-v5") | (rows.seed != 3)])
        assert lacking.complete == [CARTPOLE]
        assert "tasks that saturate" in report.aggregate(lacking) and "MuJoCo" not in report.aggregate(lacking)
        assert f"| {HOPPER} | {name} | 3 |" in report.by_task(lacking)
        assert "| all (2) |" in report.differences(results, returns.PPO)
        assert "| all (2) |" not in report.differences(lacking, returns.PPO)
        assert f"| {HOPPER} |" in report.differences(lacking, returns.PPO)

"""benchmarks/grid.py, run.py, ablation.py: what is trained, when it is evaluated, what is left out, what is counted."""

import inspect
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ablation
import grid
import numpy as np
import pytest
import rl_zoo3
import run
import torch as th
import yaml
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common import callbacks
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed

from sb3_blpo import BLPO
from sb3_blpo.zoo import default_hyperparams

ROOT = Path(__file__).parents[1]
TINY = {"n_envs": 2, "n_steps": 32, "batch_size": 32, "n_epochs": 1}


def cell(name="BLPO", env_id="CartPole-v1", n_timesteps=128, seed=0, n_evaluations=2, **params):
    what = grid.ALGORITHMS[name]
    if name == "random":
        return grid.Cell(name, env_id, 0, seed, 1, what)
    return grid.Cell(name, env_id, n_timesteps, seed, n_evaluations, what._replace(params=what.params | TINY | params))


@pytest.fixture(autouse=True)
def one_thread():
    threads = th.get_num_threads()
    yield
    th.set_num_threads(threads)


# Hyperparameters


@pytest.mark.parametrize("algo", ["ppo", "trpo"])
def test_baselines_are_the_zoos(algo):
    if version("rl_zoo3") != "2.9.2":
        pytest.skip("the baselines are those of rl_zoo3 2.9.2")
    ours = yaml.safe_load((grid.BASELINES / f"{algo}.yml").read_text())
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    assert ours == {env_id: theirs[env_id if env_id in theirs else env_id.replace("-v5", "-v4")] for env_id in ours}


def test_every_cell_has_hyperparameters():
    for name, grids in grid.STAGES.items():
        cells = [one for one in grid.cells_of(grids) if one.seed == grids[0].seeds[0]]
        assert len({one[:4] for one in cells}) == len(cells) >= 15, name
        assert len({(one.env_id, run.config_of(one)) for one in cells if one.what.algo == "ppo"}) >= 6


@pytest.mark.parametrize("path", sorted(set(grid.OUTPUTS.values())), ids=lambda path: path.parent.name)
def test_results_are_of_these_hyperparameters(path):
    """What the repository shows is what its grid would train: else run benchmarks/run.py."""
    if (version("rl_zoo3"), version("stable_baselines3")) != ("2.9.2", "2.9.2"):
        pytest.skip("the defaults that the results were made with are those of rl_zoo3 and stable_baselines3 2.9.2")
    stages = [grid.STAGES[stage] for stage, output in grid.OUTPUTS.items() if output == path]
    cells = {tuple(map(str, one[:3])): one for grids in stages for one in grid.cells_of(grids)}
    recorded = {(run.key(row)[:3], row["config"]) for row in run.read(path)}
    assert recorded == {(key, run.config_of(cells[key])) for key, _ in recorded}


def test_hyperparameters_of_a_stage():
    own = {"n_steps": 64, "critic_learning_rate": 0.1}
    names = ("random", "BLPO", "BLPO none", "PPO (BLPO's schedule)", "PPO (tuned)", "TRPO (tuned)")
    cells = grid.cells_of([grid.Grid(names, {"CartPole-v1": 128, "Acrobot-v1": 128}, 2, [0], {"CartPole-v1": own})])
    params = [one.what.params for one in cells]
    none = {"ihvp_solver": "none"}
    assert params == [{}, own, own | none, {"n_steps": 64}, {}, {}, {}, {}, none, {}, {}, {}]


def test_no_default_hyperparameters_for_baselines():
    with pytest.raises(ValueError, match="Hyperparameters not found for ppo-MountainCar-v0"):
        run.config_of(cell("PPO (tuned)", "MountainCar-v0"))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_schedule_is_shared(env_id, tmp_path):
    models = []
    for name in ("BLPO", "PPO (BLPO's schedule)"):
        manager = run.experiment(grid.Cell(name, env_id, 1000, 0, 1, grid.ALGORITHMS[name]), tmp_path)
        models.append((manager, manager.setup_experiment()[0]))
    (blpo, leader), (ppo, baseline) = models
    assert type(baseline) is PPO and baseline.normalize_advantage
    assert (ppo.n_envs, ppo.normalize, ppo.normalize_kwargs) == (blpo.n_envs, blpo.normalize, blpo.normalize_kwargs)
    for name in (
        "n_steps",
        "batch_size",
        "n_epochs",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "max_grad_norm",
        "target_kl",
        "use_sde",
    ):
        assert getattr(baseline, name) == getattr(leader, name), name
    for progress in (1, 0.3):
        assert baseline.lr_schedule(progress) == leader.lr_schedule(progress)
        assert baseline.clip_range(progress) == leader.clip_range(progress)


def test_schedule_of_every_entry():
    shared = grid.ALGORITHMS["PPO (BLPO's schedule)"].config
    exec(shared.read_text(), names := {})
    for env_id, entry in yaml.safe_load(default_hyperparams().read_text()).items():
        settings, own = names["hyperparams"][env_id], names["OF_ITS_OWN"].get(env_id, {})
        assert settings.keys() & names["NOT_SHARED"] == ({"normalize_advantage"} if env_id == "Ant-v5" else set())
        # batch_size: BLPO's default, not PPO's
        wanted = {"batch_size": 256} | {name: value for name, value in entry.items() if name not in names["NOT_SHARED"]}
        assert settings == settings | wanted | own


def test_what_trials_found_holds_for_its_own_length_and_algorithm(tmp_path):
    """Walker2d's short runs have rollouts of their own, Hopper's long ones of PPO a `gae_lambda`, clipping and networks."""

    def settings(stage, name, env_id):
        one = next(c for c in grid.cells_of(grid.STAGES[stage]) if (c.algorithm, c.env_id) == (name, env_id))
        return run.experiment(one, tmp_path).read_hyperparameters()[1]

    ppo = "PPO (BLPO's schedule)"
    short, long = (settings(stage, ppo, "Hopper-v5") for stage in ("stage1", "stage2"))
    assert (short["gae_lambda"], long["gae_lambda"]) == (0.98, 0.95)
    assert "256" in long["policy_kwargs"] and "policy_kwargs" not in short
    assert long["clip_range"] == 0.1 and "clip_range" not in short
    assert settings("stage2", "BLPO", "Hopper-v5")["gae_lambda"] == 0.98
    short, long = (settings(stage, ppo, "Walker2d-v5") for stage in ("stage1", "stage2"))
    assert (short["n_steps"], long["n_steps"]) == (256, 512)
    assert short["batch_size"] == long["batch_size"] == 128 and short["gae_lambda"] == long["gae_lambda"] == 0.9


def test_a_cell_of_two_grids_has_one_meaning():
    one = grid.Grid(("BLPO",), {"CartPole-v1": 100}, n_evaluations=2)
    assert grid.cells_of([one, one]) == grid.cells_of([one])
    with pytest.raises(ValueError, match="in two grids"):
        grid.cells_of([one, one._replace(params={"CartPole-v1": {"batch_size": 32}})])


def test_config_names_all_that_matters(monkeypatch):
    one = cell()
    assert run.config_of(one) == run.config_of(cell(seed=1)) == run.config_of(cell(batch_size=32))
    others = [cell(batch_size=64), cell(n_timesteps=256), cell(n_evaluations=4), cell(ihvp_solver="cg"), cell("BLPO none")]
    assert len({run.config_of(other) for other in [one, *others]}) == 6

    hopper = cell(env_id="Hopper-v5")
    before = run.config_of(hopper)
    parameters = dict(inspect.signature(BLPO).parameters)
    off = inspect.Parameter("off", inspect.Parameter.KEYWORD_ONLY, default=None)
    more_updates = parameters["n_critic_updates"].replace(default=4)
    for changed, same in ((parameters | {"off": off}, True), (parameters | {"n_critic_updates": more_updates}, False)):

        class Newer(BLPO):
            __signature__ = inspect.Signature(list(changed.values()))

        monkeypatch.setitem(ALGOS, "blpo", Newer)
        assert (run.config_of(hopper) == before) == same


def test_settings_of_the_solver_are_merged(tmp_path):
    file = tmp_path / "blpo.yml"
    file.write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 100, ihvp_kwargs: {rank: 3, damping: 0.1}}")
    what = grid.Algorithm("blpo", file, {"ihvp_kwargs": {"rank": 4}})
    settings = run.experiment(cell()._replace(what=what), tmp_path).read_hyperparameters()[1]
    assert settings["ihvp_kwargs"] == {"rank": 4, "damping": 0.1}


# One cell


@pytest.mark.parametrize("n_envs", [1, 4, 8, 16])
def test_evaluations_at_equal_distances(n_envs, tmp_path):
    rows = run.train(cell("PPO (tuned)", n_timesteps=2000, n_evaluations=10, n_envs=n_envs, n_steps=128 // n_envs), tmp_path)
    assert [row.step for row in rows] == [k * (200 // n_envs) * n_envs for k in range(1, 11)]
    assert 2000 - 10 * n_envs < rows[-1].step <= 2000
    assert all(9 <= row.mean_return <= 500 and row.std_return > 0 for row in rows)
    assert all(np.diff([row.cpu_seconds for row in rows]) >= 0)
    assert np.load(next(tmp_path.rglob("evaluations.npz")))["results"].shape == (10, 10)


def test_no_evaluation_after_the_last(tmp_path):
    # The last rollout goes on to where a fifth one would be
    rows = run.train(cell("PPO (tuned)", n_timesteps=40, n_evaluations=4, n_steps=32), tmp_path)
    assert [row.step for row in rows] == [10, 20, 30, 40]


def test_evaluation_is_separate_and_costs_no_time(tmp_path, monkeypatch):
    seen = []

    def evaluate(model, env, n_eval_episodes, deterministic, **kwargs):
        start = time.process_time()
        while time.process_time() < start + 0.3:
            pass
        training = model.get_vec_normalize_env()
        assert env is not training and env.num_envs == n_eval_episodes == 10 and deterministic
        assert not env.training and not env.norm_reward
        assert (env.obs_rms.mean == training.obs_rms.mean).all() and (env.obs_rms.var == training.obs_rms.var).all()
        seen.append(training.obs_rms.count)
        return [float(len(seen))] * 10, [1] * 10

    monkeypatch.setattr(callbacks, "evaluate_policy", evaluate)
    rows = run.train(cell(env_id="Pendulum-v1", n_evaluations=4, normalize=True), tmp_path)
    assert [row.mean_return for row in rows] == [1, 2, 3, 4] and len(set(seen)) == 4
    # Three evaluations of 0.3 s each come before the last mark
    assert 0 < rows[-1].cpu_seconds < 0.9


def test_interrupted_training_is_no_result(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "evaluate_policy", interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        run.train(cell(), tmp_path)


def test_random_policy(tmp_path):
    (row,) = run.train(cell("random"), tmp_path)
    assert (row.step, row.n_timesteps, row.config) == (0, 0, "100 episodes")
    assert 15 < row.mean_return < 30
    assert run.train(cell("random"), tmp_path)[0].mean_return == row.mean_return
    assert run.train(cell("random", seed=1), tmp_path)[0].mean_return != row.mean_return


@pytest.mark.parametrize("name", ["BLPO", "BLPO none, rollout's advantages"])
def test_command_gives_the_same(name, tmp_path):
    one = cell(name)
    run.train(one, tmp_path / "ours")
    python, *words = shlex.split(run.command_of(one))
    assert python == "python"
    subprocess.run(
        [sys.executable, *words, "-f", tmp_path / "theirs"], cwd=ROOT, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    ours, theirs = (np.load(next((tmp_path / who).rglob("evaluations.npz"))) for who in ("ours", "theirs"))
    assert ours.files == theirs.files
    for array in ours.files:
        np.testing.assert_array_equal(ours[array], theirs[array])


# Many cells


@pytest.fixture
def trained(monkeypatch):
    """Cells that were trained, by a training that takes no time."""
    done = []

    def train(one, folder):
        if one.seed == 13:
            raise ValueError("bad luck")
        done.append(one[:4])
        config = run.config_of(one)
        return [run.Row(*one[:4], k, float(k), 0.0, 0.0, 0.0, config, "commit", "a, b") for k in range(one.n_evaluations)]

    monkeypatch.setattr(run, "train_apart", train)
    return done


def test_recorded_cells_are_left_out(trained, tmp_path, capsys):
    path = tmp_path / "results" / "returns.csv"
    cells = [cell("random"), cell(), cell(seed=1), cell(n_timesteps=256), cell("BLPO none")]
    assert run.run(cells[:3], path, 2) == 0
    assert sorted(trained) == sorted(one[:4] for one in cells[:3])
    assert run.run(cells, path, 2) == 0
    assert sorted(trained[3:]) == sorted(one[:4] for one in cells[3:])
    assert run.run(cells, path, 2) == 0
    assert len(trained) == 5
    assert "other hyperparameters" not in capsys.readouterr().out
    rows = run.read(path)
    assert len(rows) == 9 and {row["versions"] for row in rows} == {"a, b"}


def test_changed_hyperparameters(trained, tmp_path, capsys):
    path = tmp_path / "returns.csv"
    run.run([cell(), cell(seed=1)], path, 1)
    run.run([cell(batch_size=64), cell(seed=1)], path, 1)
    assert "('BLPO', 'CartPole-v1', 128, 0) was trained with other hyperparameters" in capsys.readouterr().out
    assert len(trained) == 3
    configs = {(row["seed"], row["config"]) for row in run.read(path)}
    assert configs == {("0", run.config_of(cell(batch_size=64))), ("1", run.config_of(cell()))}
    assert len(run.read(path)) == 4


def test_changed_default_of_the_solver(monkeypatch):
    before = [run.config_of(cell(name)) for name in ("BLPO", "BLPO none", "PPO (tuned)")]
    monkeypatch.setitem(run.IHVP_DEFAULTS, "rank", 3)
    after = [run.config_of(cell(name)) for name in ("BLPO", "BLPO none", "PPO (tuned)")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_each_stage_has_its_csv(monkeypatch):
    written = []
    monkeypatch.setattr(run, "run", lambda cells, path, n_jobs: written.append(path))
    for arguments in ([], *(["--stage", stage] for stage in grid.STAGES), ["--stage", "stage2", "--output", "x.csv"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        run.main()
    assert written == [grid.OUTPUTS["stage1"], *(grid.OUTPUTS[stage] for stage in grid.STAGES), Path("x.csv")]


@pytest.mark.parametrize(("arguments", "seeds"), [([], range(5, 10)), (["--seeds", "6", "11"], (6, 11))])
def test_replication_is_stage1_with_other_seeds(arguments, seeds, monkeypatch):
    trained = []
    monkeypatch.setattr(run, "run", lambda cells, path, n_jobs: trained.extend(cells))
    monkeypatch.setattr(sys, "argv", ["run.py", "--stage", "replication", *arguments])
    run.main()
    # Seed by seed, first what is compared on all tasks
    assert [one.seed for one in trained] == [seed for n_cells in (30, 3) for seed in seeds for _ in range(n_cells)]
    stage1 = grid.cells_of(grid.STAGES["stage1"])
    assert {one.seed for one in stage1}.isdisjoint(seeds)
    assert {one[:3] for one in trained} == {one[:3] for one in stage1}


def test_failed_cell(trained, tmp_path):
    path = tmp_path / "returns.csv"
    assert run.run([cell(seed=13), cell()], path, 1) == 1
    assert {row["seed"] for row in run.read(path)} == {"0"}


def test_processes(tmp_path):
    path = tmp_path / "returns.csv"
    cells = [cell("random"), cell()]
    assert run.run(cells, path, 2, tmp_path / "logs") == 0
    assert [(row["algorithm"], row["step"]) for row in sorted(run.read(path), key=lambda row: row["algorithm"])] == [
        ("BLPO", "64"), ("BLPO", "128"), ("random", "0"),
    ]  # fmt: skip
    assert "Loading hyperparameters" in (tmp_path / "logs" / "output.txt").read_text()
    in_this_process = run.train(cells[1], tmp_path / "here")
    recorded = [row for row in run.read(path) if row["algorithm"] == "BLPO"]
    assert [row["mean_return"] for row in recorded] == [str(row.mean_return) for row in in_this_process]


@pytest.mark.slow
def test_killed(tmp_path):
    path = tmp_path / "returns.csv"
    command = [
        sys.executable, "benchmarks/run.py", "--algorithms", "random", "BLPO", "--envs", "CartPole-v1", "--seeds", "0", "1",
        "-n", "20000", "--jobs", "1", "--output", str(path),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    while len(run.read(path)) < 11:
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = run.read(path)
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    after = run.read(path)
    assert after[: len(before)] == before and len(after) == 22
    assert len(output.splitlines()) == 4 - len({run.key(row) for row in before})


# The ablation's variants


def model(algorithm, **kwargs):
    env = make_vec_env("CartPole-v1", 2, seed=0)
    kwargs = {"n_steps": 64, "batch_size": 32, "n_epochs": 1, "n_critic_updates": 2, "seed": 0} | kwargs
    return algorithm("MlpPolicy", env, **kwargs)


def test_rollout_advantages(monkeypatch):
    """What the leader takes are SB3's advantages, although the critic has moved on."""
    taken, advantages = [], ablation.SegmentOfRollout.advantages
    monkeypatch.setattr(
        ablation.SegmentOfRollout, "advantages", lambda self, values: taken.append(advantages(self, values)) or taken[-1]
    )
    variant = model(ablation.RolloutAdvantages, ihvp_solver="none").learn(128)
    theirs = variant.rollout_buffer.advantages
    assert len(taken) == 4
    np.testing.assert_allclose(np.sort(th.cat(taken)), np.sort(theirs.flatten()), rtol=1e-4, atol=1e-5)


def test_shuffled():
    """The same transitions as of the rollout's stretches, whole, in another order."""
    variant = model(ablation.Shuffled, ihvp_solver="none").learn(128)

    def rows(segments):
        parts = ((s.states, s.actions, s.old_log_prob, s.returns, s.rollout_advantages) for s in segments)
        return np.concatenate([np.column_stack(part) for part in parts])

    segments, stretches = variant._segments(), super(ablation.Shuffled, variant)._segments()
    assert [segment.n_transitions for segment in segments] == [32] * 4
    found, wanted = rows(segments), rows(stretches)
    assert not np.array_equal(found, wanted)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], wanted[np.lexsort(wanted.T)])


def test_clipped_apart():
    """The actor's gradient is as long as allowed, the critic's as it was."""
    env = make_vec_env("CartPole-v1", 1, seed=0)
    variant = ablation.ClippedApart("MlpPolicy", env, n_steps=64, n_epochs=1, seed=0, vf_coef=100, max_grad_norm=1e-3)
    variant.learn(64)
    actor, critic = (
        th.stack(
            [part.grad.norm() for name, part in variant.policy.named_parameters() if ("value" in name) == of_critic]
        ).norm()
        for of_critic in (False, True)
    )
    assert float(actor) == pytest.approx(1e-3, rel=1e-3) and critic > 1


def test_what_is_left_is_ppo():
    """Without all that is BLPO's own, the steps are those of SB3's PPO."""
    kwargs = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "gamma": 0.9, "gae_lambda": 0.8, "max_grad_norm": 0.01}
    models = [
        model(ablation.TowardsPPO, ihvp_solver="none", normalize_advantage=True, n_critic_updates=1, **kwargs),
        ablation.ClippedApart("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, vf_coef=1, **kwargs),
    ]
    models[1].policy.load_state_dict(models[0].policy.state_dict())
    for one in models:
        set_random_seed(0)
        one.learn(64)
    ours, theirs = (dict(one.policy.named_parameters()) for one in models)
    th.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_larger_step():
    """The same direction as "none", and a rate of (1 + 1) times its own where the correction is capped at 1."""
    rates = []

    class Watched(ablation.LargerStep):
        def _hypergradient(self, *args, **kwargs):
            leader = super()._hypergradient(*args, **kwargs)
            rates.append((self.policy.optimizer.param_groups[0]["lr"], float(leader.stats["correction_ratio"])))
            return leader

    steps = []
    for algorithm, solver in ((BLPO, "none"), (Watched, "nystrom")):
        variant = model(algorithm, ihvp_solver=solver, batch_size=128)
        before = th.nn.utils.parameters_to_vector(variant.actor.parameters)
        steps.append(th.nn.utils.parameters_to_vector(variant.learn(128).actor.parameters) - before)
    ((rate, ratio),) = rates
    assert ratio > 0 and rate == pytest.approx(3e-4 * (1 + min(ratio, 1)))
    th.testing.assert_close(steps[1], steps[0] * rate / 3e-4, rtol=1e-3, atol=1e-7)


def test_constant_u_and_no_curvature():
    from sb3_blpo.curvature import GramGaussNewton

    class Rows:
        """J = the identity."""

        values = th.zeros(3)

        def Jt_w(self, w):
            return w

        J_v = Jt_w

    system = GramGaussNewton(Rows(), th.tensor([1.0, 2.0, 3.0]), 2, whole=False)
    solution = model(ablation.NoCurvature).solver.solve(system, th.tensor(0.5))
    assert system.to_values(solution.x).tolist() == [2, 4] and solution.ok
    constant = model(ablation.ConstantU, gamma=0.9, gae_lambda=0.8).solver.solve(system, th.tensor(0.5))
    assert constant.values.tolist() == pytest.approx([0.9 * 0.2 / (2 * 0.28)] * 2) and constant.ok


@pytest.mark.parametrize("name", [name for name in grid.ALGORITHMS if name.startswith(("BLPO", "PPO (BLPO"))])
def test_variants_train(name, tmp_path):
    rows = run.train(cell(name, n_timesteps=64, n_evaluations=1), tmp_path)
    assert [row.step for row in rows] == [64] and {row.algorithm for row in rows} == {name}

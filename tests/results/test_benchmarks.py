"""benchmarks/grid.py, run.py, ablation.py: what is trained, when it is evaluated, what is left out, what is counted."""

import copy
import inspect
import os
import shlex
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

from sb3_blpo import BLPO, bilevel
from sb3_blpo.curvature import GaussNewton
from sb3_blpo.engines import TorchEngine
from sb3_blpo.zoo import default_hyperparams

ROOT = Path(__file__).parents[2]
TINY = {"n_envs": 2, "n_steps": 32, "batch_size": 32, "n_epochs": 1}

pytestmark = pytest.mark.benchmarks


def cell(name="BLPO", env_id="CartPole-v1", n_timesteps=128, seed=0, n_evaluations=2, **params):
    what = grid.ALGORITHMS[name]
    if name == "random":
        return grid.Cell(name, env_id, 0, seed, 1, what)
    return grid.Cell(name, env_id, n_timesteps, seed, n_evaluations, what._replace(params=what.params | TINY | params))


# Hyperparameters


@pytest.mark.parametrize("algo", ["ppo", "trpo"])
def test_baselines_are_the_zoos(algo):
    if version("rl_zoo3") != "2.9.2":
        pytest.skip("the baselines are those of rl_zoo3 2.9.2")
    ours = yaml.safe_load((grid.BASELINES / f"{algo}.yml").read_text())
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    assert ours == {env_id: theirs[env_id if env_id in theirs else env_id.replace("-v5", "-v4")] for env_id in ours}


def test_every_cell_has_hyperparameters():
    for grids in grid.STAGES.values():
        cells = grid.cells_of(grids)
        assert len({one[:4] for one in cells}) == len(cells)
        for one in {one[:3]: one for one in cells}.values():
            run.config_of(one)  # raises where neither the Zoo nor a file of ours has any


@pytest.mark.parametrize("name", grid.VARIANTS | grid.FOLLOWERS)
def test_variants_take_their_arguments(name, tmp_path):
    assert isinstance(run.experiment(cell(name), tmp_path).setup_experiment()[0], BLPO)


def test_hyperparameters_of_a_stage():
    """A stage's own are given to PPO with BLPO's schedule, and to nobody else."""
    names = ("random", "BLPO", "PPO (BLPO's schedule)", "PPO (tuned)")
    stage = grid.Grid(names, {"CartPole-v1": 128, "Walker2d-v5": 128}, 2, [0], {"CartPole-v1": {"gamma": 0.9}})
    assert [one.what.params for one in grid.cells_of([stage])] == [{}, {}, {"gamma": 0.9}, {}, {}, {}, {}, {}]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_schedule_is_shared(env_id, tmp_path):
    managers = [
        run.experiment(grid.Cell(name, env_id, 1000, 0, 1, grid.ALGORITHMS[name]), tmp_path)
        for name in ("BLPO", "PPO (BLPO's schedule)")
    ]
    leader, baseline = (manager.setup_experiment()[0] for manager in managers)
    assert type(baseline) is PPO and baseline.normalize_advantage
    shared = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "max_grad_norm", "target_kl", "use_sde")
    for names, one, other in ((("n_envs", "normalize", "normalize_kwargs"), *managers), (shared, leader, baseline)):
        assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}
    for progress in (1, 0.3):
        assert baseline.lr_schedule(progress) == leader.lr_schedule(progress)
        assert baseline.clip_range(progress) == leader.clip_range(progress)


def test_ppo_is_given_nothing_that_only_blpo_knows():
    entries = yaml.safe_load(default_hyperparams().read_text())
    exec(grid.PPO_SCHEDULE.read_text(), names := {})
    known = {*inspect.signature(PPO).parameters, "n_envs", "n_timesteps", "normalize", "env_wrapper", "frame_stack"}
    assert names["hyperparams"].keys() == entries.keys()
    assert set().union(*names["hyperparams"].values()) <= known


def test_a_cell_of_two_grids_has_one_meaning():
    one = grid.Grid(("BLPO",), {"CartPole-v1": 100}, n_evaluations=2)
    assert grid.cells_of([one, one]) == grid.cells_of([one])
    with pytest.raises(ValueError, match="in two grids"):
        grid.cells_of([one, one._replace(n_evaluations=1)])


def test_config_names_all_that_matters(monkeypatch):
    one = cell()
    assert run.config_of(one) == run.config_of(cell(seed=1)) == run.config_of(cell(batch_size=32))
    others = [cell(batch_size=64), cell(n_timesteps=256), cell(n_evaluations=4), cell(ihvp_solver="cg"), cell("BLPO none")]
    assert len({run.config_of(other) for other in [one, *others]}) == 6
    changed = inspect.signature(BLPO).parameters["n_critic_updates"].replace(default=4)
    off = inspect.Parameter("off", inspect.Parameter.KEYWORD_ONLY, default=None)
    hopper = cell(env_id="Hopper-v5")
    before = run.config_of(hopper)
    for parameter, same in ((off, True), (changed, False)):
        parameters = dict(inspect.signature(BLPO).parameters) | {parameter.name: parameter}
        newer = type("Newer", (BLPO,), {"__signature__": inspect.Signature(list(parameters.values()))})
        monkeypatch.setitem(ALGOS, "blpo", newer)
        assert (run.config_of(hopper) == before) == same


def test_changed_default_of_the_solver(monkeypatch):
    before = [run.config_of(cell(name)) for name in ("BLPO", "BLPO none", "PPO (tuned)")]
    monkeypatch.setitem(run.IHVP_DEFAULTS, "rank", 3)
    after = [run.config_of(cell(name)) for name in ("BLPO", "BLPO none", "PPO (tuned)")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_settings_of_the_solver_are_merged(tmp_path):
    file = tmp_path / "blpo.yml"
    file.write_text("CartPole-v1: {policy: MlpPolicy, n_timesteps: 100, ihvp_kwargs: {rank: 3, damping: 0.1}}")
    what = grid.Algorithm("blpo", file, {"ihvp_kwargs": {"rank": 4}})
    settings = run.experiment(cell()._replace(what=what), tmp_path).read_hyperparameters()[1]
    assert settings["ihvp_kwargs"] == {"rank": 4, "damping": 0.1}


# One cell


@pytest.mark.parametrize("n_envs", [1, 8])
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


@pytest.mark.parametrize("name", ["BLPO", "BLPO, rollout's advantages"])
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
    cells = [cell("random"), cell(), cell(seed=1), cell("BLPO none")]
    for n, new in ((2, cells[:2]), (4, cells[2:]), (4, [])):
        trained.clear()
        assert run.run(cells[:n], path, 2) == 0
        assert sorted(trained) == sorted(one[:4] for one in new)
    assert "other hyperparameters" not in capsys.readouterr().out
    assert len(run.read(path)) == 7


def test_changed_hyperparameters(trained, tmp_path, capsys):
    path = tmp_path / "returns.csv"
    run.run([cell(), cell(seed=1)], path, 1)
    run.run([cell(batch_size=64), cell(seed=1)], path, 1)
    assert "('BLPO', 'CartPole-v1', 128, 0) was trained with other hyperparameters" in capsys.readouterr().out
    assert len(trained) == 3 and len(run.read(path)) == 4
    configs = {(row["seed"], row["config"]) for row in run.read(path)}
    assert configs == {("0", run.config_of(cell(batch_size=64))), ("1", run.config_of(cell()))}


def test_choosing_what_to_train(monkeypatch):
    written = []
    monkeypatch.setattr(run, "run", lambda cells, path, n_jobs: written.append((path, cells)))
    for arguments in ([], ["--stage", "million"], ["--envs", "CartPole-v1", "--seeds", "6", "11", "--output", "x.csv"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        run.main()
    assert [path for path, _ in written] == [grid.OUTPUTS["returns"], grid.OUTPUTS["million"], Path("x.csv")]
    assert {(one.env_id, one.seed) for one in written[-1][1]} == {("CartPole-v1", 6), ("CartPole-v1", 11)}


def test_failed_cell(trained, tmp_path):
    path = tmp_path / "returns.csv"
    assert run.run([cell(seed=13), cell()], path, 1) == 1
    assert {row["seed"] for row in run.read(path)} == {"0"}


def test_processes(tmp_path):
    path, one = tmp_path / "returns.csv", cell()
    assert run.run([one], path, 2, tmp_path / "logs") == 0
    assert "Loading hyperparameters" in (tmp_path / "logs" / "output.txt").read_text()
    in_this_process = [(str(row.step), str(row.mean_return)) for row in run.train(one, tmp_path / "here")]
    assert [(row["step"], row["mean_return"]) for row in run.read(path)] == in_this_process


# The ablation's variants


def model(algorithm, **kwargs):
    env = make_vec_env("CartPole-v1", 2, seed=0)
    kwargs = {"n_steps": 64, "batch_size": 32, "n_epochs": 1, "n_critic_updates": 2, "seed": 0} | kwargs
    return algorithm("MlpPolicy", env, **kwargs)


def test_rollout_advantages(monkeypatch):
    """In each epoch the leader takes SB3's advantages, although the critic has moved on."""
    taken, improve = [], TorchEngine.improve_actor

    def improve_actor(self, rollout, weights):
        taken.append(weights)
        return improve(self, rollout, weights)

    monkeypatch.setattr(TorchEngine, "improve_actor", improve_actor)
    variant = model(
        ablation.RolloutAdvantages, n_epochs=3, ihvp_solver="none", normalize_advantage=False, engine="torch"
    ).learn(128)
    np.testing.assert_array_equal(np.stack(taken), [variant.rollout_buffer.advantages.flatten()] * 3)


def test_stretches():
    """Consecutive steps of one environment, in random order, each once in a pass; more passes where the critic takes them."""
    th.manual_seed(0)
    minibatches = [index.tolist() for index in ablation.stretches(3, 24, 4)]
    assert sorted(minibatches) == [list(range(first, first + 12, 3)) for first in (0, 1, 2, 12, 13, 14)]
    assert minibatches != sorted(minibatches)
    two_passes = [index.tolist() for index in ablation.stretches(3, 24, 4, 12)]
    assert sorted(two_passes) == sorted(2 * minibatches)


def test_both_levels_see_stretches(monkeypatch):
    drawn, stretches = [], ablation.stretches
    monkeypatch.setattr(ablation, "stretches", lambda *given: drawn.append(given) or stretches(*given))
    model(ablation.TimeOrdered, n_critic_updates=2).learn(128)
    assert drawn == [(2, 128, 32, 8), (2, 128, 32)]


def under_the_critic(model, buffer, last_obs, last_done, gae_lambda):
    """Returns (N,) by SB3 itself, under the critic as it is, without truncations."""
    with th.no_grad():
        states = th.as_tensor(buffer.observations.reshape(-1, *buffer.obs_shape))
        buffer.values = model.policy.predict_values(states).numpy().reshape(buffer.values.shape)
        last = model.policy.predict_values(th.as_tensor(last_obs))
    buffer.gae_lambda = gae_lambda
    buffer.compute_returns_and_advantage(last, last_done)
    return buffer.returns.flatten()


def test_fresh_returns():
    """At the next rollout the critic's former one has the returns that SB3 would give it under the critic as it is then."""
    variant = model(ablation.FreshReturns, learning_rate=1e-2, ihvp_solver="none").learn(128)
    buffer, last = copy.deepcopy(variant.rollout_buffer), (variant._last_obs, variant._last_episode_starts)
    variant._finished_rollout()
    expected = under_the_critic(variant, buffer, *last, variant.gae_lambda)
    np.testing.assert_allclose(variant._former_rollouts[-1][1], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - variant.rollout_buffer.returns.flatten()).max() > 0.1


@pytest.mark.parametrize("of_advantages, of_targets", [(0.95, 0.98), (0.98, 0.9)])
def test_critic_lambda(of_advantages, of_targets):
    variant = model(ablation.CriticLambda, gae_lambda=of_advantages, learning_rate=0.0)
    variant.learn(128)
    found = variant._finished_rollout()
    np.testing.assert_array_equal(found.advantages, variant.rollout_buffer.advantages.flatten())
    buffer, last = copy.deepcopy(variant.rollout_buffer), (variant._last_obs, variant._last_episode_starts)
    np.testing.assert_allclose(found.returns, under_the_critic(variant, buffer, *last, of_targets), rtol=1e-4, atol=1e-5)


def test_slow_adam_and_wide_critic():
    assert {group["betas"] for group in model(ablation.SlowAdam).critic_optimizer.param_groups} == {(0.99, 0.99)}
    policy = model(ablation.WideCritic).policy
    sides = policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net
    assert [[layer.out_features for layer in side if hasattr(layer, "out_features")] for side in sides] == [
        [64, 64],
        [256, 256],
    ]


def test_one_rate():
    variant = model(ablation.OneRate, learning_rate=1e-3).learn(128)
    assert variant.policy.optimizer.param_groups[0]["lr"] == variant.critic_optimizer.param_groups[0]["lr"] == 1e-3


def test_no_curvature(monkeypatch):
    solutions = []

    def best_response(rollout, jacobian, weights, values, solver, damping, curvature, generator):
        system = GaussNewton(jacobian, jacobian.gradient(rollout.return_gradient(weights)), damping)
        solutions.append((solver.solve(system, generator).v, system.g / system.alpha))

    monkeypatch.setattr(bilevel, "best_response", best_response)
    model(ablation.NoCurvature).learn(128)
    ((found, wanted),) = solutions
    assert found.norm() > 0
    th.testing.assert_close(found, wanted)

"""BLPO in RL Zoo: the registration, the hyperparameter file, tuning, and the start-up hook."""

import argparse
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import optuna
import pytest
import yaml
from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO, zoo

STARTUP = Path(zoo.__file__).parent / "startup"
HYPERPARAMS = yaml.safe_load(zoo.default_hyperparams().read_text())
ARGUMENTS = set(inspect.signature(BLPO).parameters)
# What RL Zoo takes for itself, the rest goes to BLPO
CONSUMED = {"env_wrapper", "frame_stack", "n_envs", "n_timesteps", "normalize"}


@pytest.fixture
def exp_manager():
    zoo.register()
    from rl_zoo3 import exp_manager

    return exp_manager


@pytest.fixture
def experiment(exp_manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its warnings

    def make(env_id: str = "CartPole-v1", algo: str = "blpo", **kwargs):
        kwargs |= {"eval_freq": -1, "verbose": 0, "device": "cpu"}
        return exp_manager.ExperimentManager(argparse.Namespace(), algo, env_id, str(tmp_path), **kwargs)

    return make


# The registration


def test_register_twice(exp_manager):
    from rl_zoo3 import hyperparams_opt, utils

    before = [vars(exp_manager.ExperimentManager).copy(), vars(utils).copy(), vars(hyperparams_opt).copy()]
    zoo.register()
    assert [vars(exp_manager.ExperimentManager), vars(utils), vars(hyperparams_opt)] == before
    assert utils.ALGOS["blpo"] is exp_manager.ALGOS["blpo"] is BLPO


def test_modules_look_untouched(exp_manager):
    manager = exp_manager.ExperimentManager
    assert pickle.loads(pickle.dumps(manager)) is manager
    assert inspect.getsource(exp_manager) == Path(exp_manager.__file__).read_text()
    assert "config" in inspect.signature(manager).parameters


def test_default_hyperparams(exp_manager, experiment, tmp_path, monkeypatch):
    assert experiment().config == str(zoo.default_hyperparams())
    assert experiment(config="mine.yml").config == "mine.yml"
    # A Zoo that has a file of its own
    own = tmp_path / "hyperparams" / "blpo.yml"
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr(exp_manager, "__file__", str(tmp_path / "exp_manager.py"))
    assert experiment().config == str(own)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("critic_learning_rate", "lin_1e-3"), ("critic_learning_rate", 1e-3), ("critic_learning_rate", None),
        ("ent_coef", "lin_0.01"), ("ent_coef", 0.01), ("ent_coef", 0),
    ],
)  # fmt: skip
def test_schedules(experiment, name, value):
    model, _ = experiment(hyperparams={name: value, "n_envs": 1, "n_steps": 64, "batch_size": 64}).setup_experiment()
    taken = getattr(model, name)
    if isinstance(value, str):
        start = float(value.removeprefix("lin_"))
        assert isinstance(taken, LinearSchedule)
        assert [taken(progress) for progress in (1, 0.5, 0)] == [start, start / 2, 0]
    else:
        assert taken == value
    model.learn(64)


@pytest.mark.parametrize("value", ["1e-3", "lin_x", "lin", "exp_1e-3"])
@pytest.mark.parametrize("name", ["critic_learning_rate", "ent_coef"])
def test_bad_schedule(experiment, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number or 'lin_<number>', not the string '{value}'"):
        experiment(hyperparams={name: value}).setup_experiment()


@pytest.mark.parametrize("value", ["auto", "auto_0.1", 0.01])
def test_entropy_coefficients_of_other_algorithms_are_theirs(experiment, value):
    model, _ = experiment("Pendulum-v1", "sac", hyperparams={"ent_coef": value}).setup_experiment()
    assert type(model).__name__ == "SAC" and model.ent_coef == value


def test_schedules_of_other_algorithms_are_theirs(experiment):
    manager = experiment(algo="ppo", hyperparams={"critic_learning_rate": "lin_x"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'critic_learning_rate'"):
        manager.setup_experiment()


# Tuning


def test_sampler_and_converter():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(100):
        trial = study.ask()
        params = zoo.sample_blpo_params(trial, n_actions=1, n_envs=1, additional_args={})
        assert params == zoo.convert_blpo_params(trial.params)
        assert trial.user_attrs.items() <= params.items()
        assert set(params) <= ARGUMENTS
        assert 64 <= params["batch_size"] <= 1024
        assert 1 <= params["n_critic_updates"] <= 10
        assert params["critic_rollouts"] in (1, 4, 8)
        assert 1 <= params["critic_learning_rate"] / params["learning_rate"] <= 10 + 1e-9
        assert 0 < params["gamma"] < 1 and 0 < params["gae_lambda"] < 1
    BLPO("MlpPolicy", "Pendulum-v1", **params)


# The hyperparameter file


def test_hyperparams_are_arguments():
    assert next(iter(HYPERPARAMS)) == "default"
    for env_id, entry in HYPERPARAMS.items():
        assert set(entry) <= ARGUMENTS | CONSUMED, env_id
        assert {"n_timesteps", "policy"} <= set(entry), env_id


@pytest.mark.parametrize("env_id", [env_id for env_id in HYPERPARAMS if env_id not in ("default", "atari")])
def test_hyperparams_make_a_model(env_id, experiment):
    try:
        gym.make(env_id).close()
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        pytest.skip(str(error))
    model, _ = experiment(env_id).setup_experiment()
    entry = HYPERPARAMS[env_id]
    assert (model.n_envs, model.n_steps) == (entry["n_envs"], entry["n_steps"])
    # Minibatches of equal size
    assert model.n_envs * model.n_steps % model.batch_size == 0
    model.env.close()


# The start-up hook, as it is in this tree, whatever is installed: -S leaves the start-up files of site-packages unread

INSTALL = f"""
import os, sys
sys.path[:0] = {[str(STARTUP), *filter(None, sys.path)]!r}
before = set(sys.modules)
import _sb3_blpo_startup
_sb3_blpo_startup.install()
_sb3_blpo_startup.install()
assert set(sys.modules) - before == {{"_sb3_blpo_startup"}}, set(sys.modules) - before
assert sys.meta_path.count(_sb3_blpo_startup.FINDER) == 1
"""


def run(code: str, cwd: Path) -> str:
    process = subprocess.run([sys.executable, "-S", "-c", INSTALL + code], capture_output=True, text=True, cwd=cwd)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_hook(tmp_path):
    code = """
import runpy
for command in ("train -n 256 --eval-freq -1 -params n_envs:2 n_steps:64 batch_size:64", "enjoy -n 600 --no-render"):
    script, *arguments = command.split()
    sys.argv[1:] = ["--algo", "blpo", "--env", "CartPole-v1", *arguments]
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)
"""
    output = run(code, tmp_path)
    assert "Loading logs/blpo/CartPole-v1_1/CartPole-v1.zip" in output  # where it was trained, without being told
    assert "Mean reward: " in output


def test_looking_up_changes_nothing(tmp_path):
    """Of the Zoo's modules, each twice, before the Zoo's first import (Python itself imports the package, here a stand-in)."""
    code = """
import importlib.util, subprocess, types
folder, = importlib.util.find_spec("rl_zoo3").submodule_search_locations
names = [f"rl_zoo3.{file[:-3]}" for file in os.listdir(folder) if file.endswith(".py")]
sys.modules["rl_zoo3"] = types.ModuleType("rl_zoo3")
sys.modules["rl_zoo3"].__path__ = [folder]

def everything():
    contents = {name: {key: id(value) for key, value in vars(module).items()} for name, module in sys.modules.items()}
    return contents, sys.meta_path.copy(), sys.path.copy()

before = everything()
specs = [importlib.util.find_spec(name) for name in 2 * names]
after = everything()
del before[0]["__main__"], after[0]["__main__"]
assert after == before
assert "torch" not in sys.modules and "sb3_blpo" not in sys.modules

del sys.modules["rl_zoo3"]
from rl_zoo3 import exp_manager, hyperparams_opt
assert "blpo" in hyperparams_opt.HYPERPARAMS_SAMPLER and "blpo" in hyperparams_opt.HYPERPARAMS_CONVERTER
assert vars(exp_manager.__loader__) == {"name": exp_manager.__name__, "path": exp_manager.__file__}
print(len(names), exp_manager.ALGOS["blpo"].__name__)
"""
    n_modules, algorithm = run(code, tmp_path).splitlines()[-1].split()
    assert int(n_modules) >= 15 and algorithm == "BLPO"


def test_without_the_zoo(tmp_path):
    code = """
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
try:
    import rl_zoo3
except ModuleNotFoundError:
    print("no Zoo, no BLPO:", "sb3_blpo" not in sys.modules)
"""
    assert run(code, tmp_path) == "no Zoo, no BLPO: True\n"


def test_start_up_files_agree():
    hook = (STARTUP / "sb3_blpo.pth").read_text().strip()
    assert (STARTUP / "sb3_blpo.start").read_text().strip() == "_sb3_blpo_startup:install"
    assert hook == "import _sb3_blpo_startup; _sb3_blpo_startup.install()"

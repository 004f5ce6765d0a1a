"""BLPO through RL Zoo: its commands as users type them, the registration, the hyperparameter file and the start-up hook."""

import argparse
import inspect
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import optuna
import pytest
import yaml
from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO, zoo

ROOT = Path(__file__).parents[1]
STARTUP = ROOT / "sb3_blpo" / "startup"
HYPERPARAMS = yaml.safe_load((ROOT / "hyperparams" / "blpo.yml").read_text())
ARGUMENTS = set(inspect.signature(BLPO).parameters)
# What RL Zoo takes for itself, the rest goes to BLPO
CONSUMED = {"env_wrapper", "frame_stack", "n_envs", "n_timesteps", "normalize"}

TINY = ["--eval-freq", "-1", "--verbose", "0", "--env", "Pendulum-v1", "-n", "200", "-params", "n_envs:2", "n_steps:64"]


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m ...` as a user would."""
    inherited = {name: value for name, value in os.environ.items() if name != "SB3_BLPO_NO_ZOO"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(*arguments: str, cwd: Path, **environment: str) -> str:
    process = command(*arguments, cwd=cwd, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "RuntimeWarning" not in process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one training run and one study in it."""
    folder = tmp_path_factory.mktemp("zoo")
    succeed(
        "rl_zoo3.train", "--algo", "blpo", *TINY, "learning_rate:'lin_1e-3'", "critic_learning_rate:'lin_1e-2'", cwd=folder
    )
    study = ["--storage", "sqlite:///study.db", "--study-name", "study", "--eval-episodes", "1", "--no-optim-plots"]
    succeed("rl_zoo3.train", "--algo", "blpo", "-optimize", "--n-trials", "2", "--seed", "5", *study, *TINY, cwd=folder)
    return folder


@pytest.fixture
def exp_manager():
    zoo.register()
    from rl_zoo3 import exp_manager

    return exp_manager


def experiment(exp_manager, env_id: str, folder: Path, **kwargs):
    return exp_manager.ExperimentManager(
        argparse.Namespace(), "blpo", env_id, str(folder), eval_freq=-1, verbose=0, device="cpu", seed=0, **kwargs
    )


# The commands


def test_train(folder):
    model = BLPO.load(folder / "logs" / "blpo" / "Pendulum-v1_1" / "Pendulum-v1.zip")
    assert model.num_timesteps >= 200
    assert isinstance(model.critic_learning_rate, LinearSchedule)
    assert [model.critic_lr_schedule(progress) for progress in (1, 0.5, 0)] == [1e-2, 5e-3, 0]


def test_enjoy(folder):
    arguments = ["--algo", "blpo", "--env", "Pendulum-v1", "--folder", "logs", "-n", "400", "--no-render"]
    assert "Mean reward: -" in succeed("rl_zoo3.enjoy", *arguments, "--exp-id", "1", cwd=folder)


def test_enjoy_finds_what_was_trained_without_being_told_where(folder):
    arguments = ["--algo", "blpo", "--env", "Pendulum-v1", "-n", "200", "--no-render", "--exp-id", "1"]
    output = succeed("rl_zoo3.enjoy", *arguments, cwd=folder)
    assert "Loading logs/blpo/Pendulum-v1_1/Pendulum-v1.zip" in output


def test_optimize_and_trial_id(folder):
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{folder / 'study.db'}").trials
    assert [trial.state for trial in trials] == 2 * [optuna.trial.TrialState.COMPLETE]

    study = ["--storage", "sqlite:///study.db", "--study-name", "study", "--trial-id", "1", "--uuid"]
    arguments = [argument for argument in TINY if argument != "n_steps:64"]
    succeed("rl_zoo3.train", "--algo", "blpo", *study, *arguments, cwd=folder)
    (config,) = folder.glob("logs/blpo/Pendulum-v1_*-*/Pendulum-v1/config.yml")
    saved = dict(yaml.load(config.read_text(), Loader=yaml.UnsafeLoader))
    expected = zoo.convert_blpo_params(trials[1].params)
    assert {name: saved[name] for name in expected} == expected
    assert trials[1].user_attrs.items() <= expected.items()


def test_subprocess_environments_from_a_script(folder):
    """Spawned workers import the Zoo again, and with it the hook."""
    (folder / "script.py").write_text(
        "from rl_zoo3.utils import ALGOS\n"
        "from stable_baselines3.common.env_util import make_vec_env\n"
        "from stable_baselines3.common.vec_env import SubprocVecEnv\n"
        "if __name__ == '__main__':\n"
        "    env = make_vec_env('Pendulum-v1', 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method='spawn'))\n"
        "    print(ALGOS['blpo']('MlpPolicy', env, n_steps=32, batch_size=32, n_epochs=1).learn(64).num_timesteps)\n"
    )
    assert succeed("script", cwd=folder) == "64\n"


def test_switched_off_and_explicit(folder):
    process = command("rl_zoo3.train", "--algo", "blpo", *TINY, cwd=folder, SB3_BLPO_NO_ZOO="1")
    assert process.returncode == 2
    assert "invalid choice: 'blpo'" in process.stderr

    arguments = ["train", "--algo", "blpo", "--vec-env", "subproc", *TINY]
    assert "Saving to logs/blpo" in succeed("sb3_blpo.zoo", *arguments, cwd=folder, SB3_BLPO_NO_ZOO="1")


def test_unknown_command(tmp_path):
    process = command("sb3_blpo.zoo", "fly", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("usage: python -m sb3_blpo.zoo {train,enjoy,")


def test_failing_registration_leaves_the_zoo_working(tmp_path):
    (tmp_path / "sb3_blpo").mkdir()
    (tmp_path / "sb3_blpo" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    process = command("rl_zoo3.train", "--algo", "ppo", *TINY, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("RuntimeWarning") == 1
    assert "RL Zoo will not know BLPO, its registration failed (ImportError: broken on purpose)" in process.stderr
    assert "Saving to logs/ppo" in process.stdout


# The registration


def test_register_twice(exp_manager):
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    before = vars(exp_manager.ExperimentManager).copy()
    zoo.register()
    assert vars(exp_manager.ExperimentManager) == before
    assert ALGOS["blpo"] is exp_manager.ALGOS["blpo"] is BLPO
    assert HYPERPARAMS_SAMPLER["blpo"] is zoo.sample_blpo_params
    assert HYPERPARAMS_CONVERTER["blpo"] is zoo.convert_blpo_params


def test_modules_look_untouched(exp_manager):
    manager = exp_manager.ExperimentManager
    assert pickle.loads(pickle.dumps(manager)) is manager
    assert inspect.getsource(exp_manager) == Path(exp_manager.__file__).read_text()
    assert "config" in inspect.signature(manager).parameters
    assert vars(exp_manager.__loader__) == {"name": exp_manager.__name__, "path": exp_manager.__file__}


def test_default_hyperparams(exp_manager, tmp_path, monkeypatch):
    assert experiment(exp_manager, "Pendulum-v1", tmp_path).config == str(zoo.default_hyperparams())
    assert experiment(exp_manager, "Pendulum-v1", tmp_path, config="mine.yml").config == "mine.yml"
    # A Zoo that has a file of its own
    own = tmp_path / "hyperparams" / "blpo.yml"
    own.parent.mkdir()
    own.touch()
    monkeypatch.setattr(exp_manager, "__file__", str(tmp_path / "exp_manager.py"))
    assert experiment(exp_manager, "Pendulum-v1", tmp_path).config == str(own)


@pytest.mark.parametrize("value", [1e-3, 0])
def test_numbers_are_no_schedules(exp_manager, value):
    assert exp_manager.ExperimentManager._preprocess_schedules({"critic_learning_rate": value}) == {
        "critic_learning_rate": value
    }


@pytest.mark.parametrize("value", ["1e-3", "lin_x", "lin", "exp_1e-3"])
def test_bad_schedule(exp_manager, value):
    with pytest.raises(ValueError, match=f"critic_learning_rate must be a number or 'lin_<number>', not the string '{value}'"):
        exp_manager.ExperimentManager._preprocess_schedules({"critic_learning_rate": value})


def test_sampler_and_converter():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(100):
        trial = study.ask()
        params = zoo.sample_blpo_params(trial, n_actions=1, n_envs=1, additional_args={})
        assert params == zoo.convert_blpo_params(trial.params)
        assert set(params) <= ARGUMENTS
        assert 64 <= params["batch_size"] <= 1024
        assert 1 <= params["n_critic_updates"] <= 10
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
def test_hyperparams_make_a_model(env_id, exp_manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its warnings
    try:
        gym.make(env_id).close()
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        pytest.skip(str(error))
    manager = experiment(exp_manager, env_id, tmp_path)
    model, _ = manager.setup_experiment()
    entry = HYPERPARAMS[env_id]
    assert (model.n_envs, model.n_steps) == (entry["n_envs"], entry["n_steps"])
    # Segments of equal length
    assert model.n_steps % min(model.batch_size, model.n_steps) == 0
    # The follower is the faster one
    assert model.critic_lr_schedule(1) > model.lr_schedule(1)
    model.env.close()


# What other packages broke in the Zoo's scripts


def test_push_to_hub_is_mended(tmp_path):
    zoo.mend("rl_zoo3.push_to_hub")
    from rl_zoo3 import push_to_hub

    card, metadata = push_to_hub.generate_model_card("blpo", "BLPO", "org", "CartPole-v1", 1.0, 2.0, {}, {})
    push_to_hub.save_model_card(tmp_path, card, metadata)
    assert "value: 1.00 +/- 2.00" in (tmp_path / "README.md").read_text()


def test_load_from_hub_is_mended(monkeypatch):
    import huggingface_sb3
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import HTTPError

    class Missing(HfHubHTTPError):
        def __init__(self):
            pass  # a response of the hub's HTTP package would be needed

    def load_from_hub(repo_id: str, filename: str) -> str:
        raise Missing

    monkeypatch.setattr(huggingface_sb3, "load_from_hub", load_from_hub)
    zoo.mend("rl_zoo3.load_from_hub")
    with pytest.raises(HTTPError) as caught:
        huggingface_sb3.load_from_hub("sb3/blpo-CartPole-v1", "vec_normalize.pkl")
    assert isinstance(caught.value, Missing)


def test_benchmark_is_mended(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", calls.append)
    monkeypatch.chdir(tmp_path)
    zoo.mend("rl_zoo3.benchmark")
    subprocess.call(["python", "enjoy.py", "--algo", "blpo"])
    subprocess.call(["python", "other.py"])
    assert calls == [[sys.executable, "-m", "sb3_blpo.zoo", "enjoy", "--algo", "blpo"], ["python", "other.py"]]


# The start-up hook


def test_start_up_imports_nothing():
    """Every interpreter of the environment runs the hook, so it must cost next to nothing, with and without RL Zoo."""
    code = f"""
import os, sys
sys.path.insert(0, {str(STARTUP)!r})
before = set(sys.modules)
import _sb3_blpo_startup
_sb3_blpo_startup.install()
_sb3_blpo_startup.install()
assert set(sys.modules) - before == {{"_sb3_blpo_startup"}}, set(sys.modules) - before
assert sys.meta_path.count(_sb3_blpo_startup.FINDER) == 1
try:
    import rl_zoo3
except ModuleNotFoundError:
    print("no Zoo, no BLPO:", "sb3_blpo" not in sys.modules)
"""
    output = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert output.stdout == "no Zoo, no BLPO: True\n", output.stderr


def test_start_up_files_agree():
    hook = (STARTUP / "sb3_blpo.pth").read_text().strip()
    assert (STARTUP / "sb3_blpo.start").read_text().strip() == "_sb3_blpo_startup:install"
    assert hook == "import _sb3_blpo_startup; _sb3_blpo_startup.install()"


def test_wheel(tmp_path):
    pytest.importorskip("hatchling")
    succeed("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sb3_blpo").rglob("*.py") if path.parent != STARTUP}
    beside = {"_sb3_blpo_startup.py", "sb3_blpo.pth", "sb3_blpo.start"}
    assert names == package | beside | {"sb3_blpo/py.typed", "sb3_blpo/hyperparams/blpo.yml"}

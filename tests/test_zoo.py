"""BLPO in RL Zoo: the registration, the hyperparameter file, what is mended in the Zoo's scripts, and the start-up hook."""

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

from sb3_blpo import BLPO, zoo

ROOT = Path(__file__).parents[1]
STARTUP = ROOT / "sb3_blpo" / "startup"
HYPERPARAMS = yaml.safe_load((ROOT / "hyperparams" / "blpo.yml").read_text())
ARGUMENTS = set(inspect.signature(BLPO).parameters)
# What RL Zoo takes for itself, the rest goes to BLPO
CONSUMED = {"env_wrapper", "frame_stack", "n_envs", "n_timesteps", "normalize"}


@pytest.fixture
def exp_manager():
    zoo.register()
    from rl_zoo3 import exp_manager

    return exp_manager


def experiment(exp_manager, env_id: str, folder: Path, **kwargs):
    return exp_manager.ExperimentManager(
        argparse.Namespace(), "blpo", env_id, str(folder), eval_freq=-1, verbose=0, device="cpu", seed=0, **kwargs
    )


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
    # The follower is the faster one; on Ant by its number of steps alone
    critic_rate, rate = model.critic_lr_schedule(1), model.lr_schedule(1)
    assert critic_rate == rate and model.n_critic_updates > 1 if env_id.startswith("Ant-") else critic_rate > rate
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


def test_calls_are_mended(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: calls.append(command))
    monkeypatch.chdir(tmp_path)
    ours = [sys.executable, "-m", "sb3_blpo.zoo"]
    zoo.mend("rl_zoo3.benchmark")
    zoo.mend("rl_zoo3.record_training")
    for before, after in (
        (["python", "enjoy.py", "--algo", "blpo"], [*ours, "enjoy", "--algo", "blpo"]),
        (["python", "-m", "rl_zoo3.record_video", "-n", "1"], [*ours, "record_video", "-n", "1"]),
        (["python", "other.py"], ["python", "other.py"]),
        (["python", "-m", "other"], ["python", "-m", "other"]),
    ):
        subprocess.call(before)
        assert calls.pop() == after
    # A script of this name that is somebody's own
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "enjoy.py").touch()
    subprocess.call(["python", "enjoy.py"], cwd=tmp_path / "own")
    assert calls.pop() == ["python", "enjoy.py"]


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

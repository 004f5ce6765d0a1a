"""RecurrentBLPO in RL Zoo: its hyperparameter file, and its name."""

import argparse
import inspect
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import optuna
import pytest
import rl_zoo3
import yaml

from sb3_blpo import RecurrentBLPO, zoo

HYPERPARAMS = yaml.safe_load(zoo.default_hyperparams("blpo_lstm").read_text())
ARGUMENTS = set(inspect.signature(RecurrentBLPO).parameters)
# What RL Zoo takes for itself, the rest goes to RecurrentBLPO
CONSUMED = {"env_wrapper", "frame_stack", "n_envs", "n_timesteps", "normalize"}
#: Versions of environments in the Zoo's file by ours
RENAMED = {"v5": "v4", "v3": "v2"}
#: Other than the Zoo's: it has a policy that RecurrentPPO does not know, another tuning, and batches larger than rollouts
OURS = ("default", "CartPoleNoVel-v1", "InvertedDoublePendulum-v5", "InvertedPendulum-v5")


def experiment(env_id: str, folder: Path, **kwargs):
    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager

    kwargs |= {"eval_freq": -1, "verbose": 0, "device": "cpu"}
    return ExperimentManager(argparse.Namespace(), "blpo_lstm", env_id, str(folder), **kwargs)


def same(entry):
    """An entry's content, whatever is RecurrentPPO's default or spelled in another way."""
    defaults = {name: p.default for name, p in inspect.signature(RecurrentBLPO).parameters.items()} | {"n_envs": 1}
    entry = {name: value for name, value in entry.items() if name != "vf_coef" and defaults.get(name) != value}
    if "policy_kwargs" in entry:
        kwargs = "".join(entry["policy_kwargs"].split()).replace("enable_critic_lstm=True,", "").replace(",)", ")")
        entry["policy_kwargs"] = sorted(kwargs.removeprefix("dict(").removesuffix(")").split(","))
    return entry


def test_entries_are_those_of_the_zoos_recurrent_ppo():
    if version("rl_zoo3") != "2.9.2":
        pytest.skip("the entries are those of rl_zoo3 2.9.2")
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo_lstm.yml").read_text())

    def find(env_id):
        name, _, number = env_id.rpartition("-")
        return next(theirs[key] for key in (env_id, f"{name}-{RENAMED.get(number)}", f"{name}-v2") if key in theirs)

    for env_id, entry in HYPERPARAMS.items():
        if env_id not in OURS:
            assert same(entry) == same(find(env_id)), env_id
    names = {env_id.rpartition("-")[0] for env_id in HYPERPARAMS}
    assert {env_id.rpartition("-")[0] for env_id in theirs} == names


@pytest.mark.parametrize("env_id", [env_id for env_id in HYPERPARAMS if env_id not in ("default", "atari")])
def test_hyperparams_make_a_model(env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = HYPERPARAMS[env_id]
    assert set(entry) <= ARGUMENTS | CONSUMED and {"n_timesteps", "policy"} <= set(entry)
    if env_id not in gym.registry:
        pytest.skip(f"{env_id} is not installed")
    try:
        model, _ = experiment(env_id, tmp_path).setup_experiment()
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        pytest.skip(str(error))
    assert type(model) is RecurrentBLPO and model.n_envs == entry.get("n_envs", 1)
    # Minibatches of equal size
    assert model.n_envs * model.n_steps % model.batch_size == 0
    model.env.close()


def test_tuning_draws_its_arguments(tmp_path):
    zoo.register()
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    params = HYPERPARAMS_SAMPLER["blpo_lstm"](trial, n_actions=1, n_envs=1, additional_args={})
    assert params == HYPERPARAMS_CONVERTER["blpo_lstm"](trial.params)
    RecurrentBLPO("MlpLstmPolicy", "CartPole-v1", **params)


def test_training_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager = experiment("CartPoleNoVel-v1", tmp_path, hyperparams={"n_steps": 8, "batch_size": 64, "n_epochs": 1})
    model, _ = manager.setup_experiment()
    model.learn(64)
    assert model.num_timesteps == 64 and model.get_vec_normalize_env() is not None

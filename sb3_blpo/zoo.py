"""
BLPO in RL Zoo: `python -m rl_zoo3.train --algo blpo --env CartPole-v1` and all the Zoo's other commands.

An import hook (startup/_sb3_blpo_startup.py) calls :func:`register` for each of the Zoo's modules as it is imported. Where it
cannot run (`python -S`, `pip install --target`, frozen applications, SB3_BLPO_NO_ZOO=1), call :func:`register`, or use
`python -m sb3_blpo.zoo train --algo blpo ...` instead of `python -m rl_zoo3.train --algo blpo ...`.
"""

import contextlib
import functools
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO

if TYPE_CHECKING:
    import optuna

_SCRIPTS = ("train", "enjoy", "benchmark", "load_from_hub", "push_to_hub", "record_training", "record_video")
_PLOTS = ("all_plots", "plot_from_file", "plot_train")


def register(module: str | None = None) -> None:
    """
    Make BLPO known to RL Zoo. Calling it again changes nothing.

    :param module: The one of the Zoo's modules to register with, by default all of them
    """
    for name in _REGISTRATIONS if module is None else (module,):
        _REGISTRATIONS[name](importlib.import_module(name))


def _register_algorithm(utils: Any) -> None:
    utils.ALGOS["blpo"] = BLPO
    find = utils.get_model_path
    if hasattr(find, "__wrapped__"):
        return

    @functools.wraps(find)
    def get_model_path(exp_id: int, folder: str, algo: str, *args: Any, **kwargs: Any) -> tuple[str, str, str]:
        # Nobody publishes BLPO agents to download, so what was trained here is the better default for `enjoy`
        if algo == "blpo" and folder == "rl-trained-agents" and not os.path.isdir(os.path.join(folder, algo)):
            folder = "logs"
        return find(exp_id, folder, algo, *args, **kwargs)

    utils.get_model_path = get_model_path


def _register_tuning(hyperparams_opt: Any) -> None:
    hyperparams_opt.HYPERPARAMS_SAMPLER["blpo"] = sample_blpo_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["blpo"] = convert_blpo_params


def _register_hyperparams(exp_manager: Any) -> None:
    manager = exp_manager.ExperimentManager
    if hasattr(manager, "_knows_blpo"):
        return
    manager._knows_blpo = True
    init, preprocess_schedules = manager.__init__, manager._preprocess_schedules

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # The user's file comes first, then the Zoo's own, if it should have one some day
        if self.algo == "blpo" and kwargs.get("config") is None and not Path(self.config).is_file():
            self.config = str(default_hyperparams())

    @functools.wraps(preprocess_schedules)
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        hyperparams = preprocess_schedules(hyperparams)
        # The Zoo turns only the schedules that it knows by name into objects
        if isinstance(hyperparams.get("critic_learning_rate"), str):
            hyperparams["critic_learning_rate"] = _schedule(hyperparams["critic_learning_rate"])
        return hyperparams

    manager.__init__ = __init__
    manager._preprocess_schedules = staticmethod(_preprocess_schedules)


_REGISTRATIONS = {
    "rl_zoo3.utils": _register_algorithm,
    "rl_zoo3.hyperparams_opt": _register_tuning,
    "rl_zoo3.exp_manager": _register_hyperparams,
}


def default_hyperparams() -> Path:
    """
    :return: The hyperparameter file used without `--conf-file`: inside the package, or beside it in a checkout
    """
    package = Path(__file__).parent
    installed = package / "hyperparams" / "blpo.yml"
    return installed if installed.is_file() else package.parent / "hyperparams" / "blpo.yml"


def _schedule(text: str) -> LinearSchedule:
    kind, _, start = text.partition("_")
    try:
        if kind == "lin":
            return LinearSchedule(float(start), 0.0, 1.0)
    except ValueError:
        pass
    # YAML takes 1e-3 for text, it needs !!float there
    raise ValueError(f"critic_learning_rate must be a number or 'lin_<number>', not the string {text!r}")


def sample_blpo_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw BLPO's arguments for `-optimize`.

    :param trial: Optuna's trial
    :param n_actions: Not used, part of the Zoo's signature
    :param n_envs: Not used
    :param additional_args: Not used
    :return: Arguments of BLPO
    """
    trial.suggest_int("n_steps_pow", 6, 11)
    # Segments: shorter ones than 64 steps would see little of the traces along time
    trial.suggest_int("batch_size_pow", 6, 10)
    trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True)
    # The critic, as the follower, must not be the slower one
    trial.suggest_float("critic_learning_rate_ratio", 1, 10, log=True)
    trial.suggest_int("n_critic_updates", 1, 10)
    trial.suggest_categorical("n_epochs", [1, 5, 10, 20])
    trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4])
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 2)
    trial.suggest_float("damping", 1e-3, 0.1, log=True)
    trial.suggest_int("rank", 5, 40)
    trial.suggest_categorical("net_arch", ["tiny", "small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])

    params = convert_blpo_params(trial.params)
    # The true values, for the reports
    for name in ("gamma", "gae_lambda", "n_steps", "batch_size", "critic_learning_rate"):
        trial.set_user_attr(name, params[name])
    return params


def convert_blpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what was drawn for a trial into BLPO's arguments, for `--trial-id` too.

    :param sampled_params: The trial's parameters
    :return: Arguments of BLPO
    """
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    sampled = sampled_params.copy()
    ratio = sampled.pop("critic_learning_rate_ratio")
    ihvp_kwargs = {name: sampled.pop(name) for name in ("damping", "rank")}
    params = convert_onpolicy_params(sampled)
    return {**params, "critic_learning_rate": ratio * params["learning_rate"], "ihvp_kwargs": ihvp_kwargs}


def mend(module: str) -> None:
    """
    Repair what newer versions of other packages broke in a script of RL Zoo (up to 2.9.2) for every algorithm, PPO included.
    Each repair looks for its cause first and does nothing without it.

    :param module: The script's module, about to be executed
    """
    # Packages that have changed still further are not ours to mend
    with contextlib.suppress(ImportError, AttributeError):
        _MENDERS[module]()


def _mend_push_to_hub() -> None:
    # The script imports generate_metadata (a dict), which sb3-team-hf-integration 3.2 made _generate_metadata (an object)
    hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata") and hasattr(hub, "_generate_metadata"):
        hub.generate_metadata = lambda *args: hub._generate_metadata(*args).to_dict()


def _mend_load_from_hub() -> None:
    # The script takes requests' HTTPError for "no normalization file", the hub has moved on to another HTTP package
    import huggingface_sb3
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import HTTPError

    load_from_hub = huggingface_sb3.load_from_hub
    if issubclass(HfHubHTTPError, HTTPError) or hasattr(load_from_hub, "__wrapped__"):
        return

    @functools.wraps(load_from_hub)
    def load(*args: Any, **kwargs: Any) -> str:
        try:
            return load_from_hub(*args, **kwargs)
        except HfHubHTTPError as error:
            # One error that is both keeps every except clause working, old and new
            error.__class__ = type(type(error).__name__, (type(error), HTTPError), {})
            raise

    huggingface_sb3.load_from_hub = load


def _mend_calls() -> None:
    # benchmark runs `python enjoy.py`, which exists in the root folder of the Zoo's repository only, and record_training
    # `python -m rl_zoo3.record_video`; both need this Python, and the second one needs BLPO without the hook too
    call = subprocess.call
    if hasattr(call, "__wrapped__"):
        return

    @functools.wraps(call)
    def call_zoo(command: Any, *args: Any, **kwargs: Any) -> int:
        ours = [sys.executable, "-m", "sb3_blpo.zoo"]
        own_file = os.path.join(kwargs.get("cwd") or "", "enjoy.py")
        if isinstance(command, list) and command[:2] == ["python", "enjoy.py"] and not os.path.isfile(own_file):
            command = [*ours, "enjoy", *command[2:]]
        elif isinstance(command, list) and command[:3] == ["python", "-m", "rl_zoo3.record_video"]:
            command = [*ours, "record_video", *command[3:]]
        return call(command, *args, **kwargs)

    subprocess.call = call_zoo  # type: ignore[assignment]


_MENDERS = {
    "rl_zoo3.benchmark": _mend_calls,
    "rl_zoo3.load_from_hub": _mend_load_from_hub,
    "rl_zoo3.push_to_hub": _mend_push_to_hub,
    "rl_zoo3.record_training": _mend_calls,
}


def main() -> None:
    """Run one of RL Zoo's commands with BLPO registered."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if command not in _SCRIPTS + _PLOTS:
        sys.exit(f"usage: python -m sb3_blpo.zoo {{{','.join(_SCRIPTS + _PLOTS)}}} [arguments of the Zoo's command]")
    register()
    for name in _MENDERS:
        mend(name)
    if command in _PLOTS:
        getattr(importlib.import_module("rl_zoo3.plots"), command)()
    else:
        runpy.run_module(f"rl_zoo3.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # The module as everybody else imports it, not its copy under the name __main__
    importlib.import_module("sb3_blpo.zoo").main()

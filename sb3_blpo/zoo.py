"""
BLPO in RL Zoo: `python -m rl_zoo3.train --algo blpo --env CartPole-v1`, and the Zoo's other commands.

An import hook (startup/_sb3_blpo_startup.py) calls :func:`register` for the Zoo's modules as they are imported. Where it
cannot run (`python -S`, `pip install --target`, frozen applications, SB3_BLPO_NO_ZOO=1), call :func:`register`, or use
`python -m sb3_blpo.zoo train --algo blpo ...` instead of `python -m rl_zoo3.train --algo blpo ...`.
"""

import functools
import importlib
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO, RecurrentBLPO

if TYPE_CHECKING:
    import optuna

ALGORITHMS = {"blpo": BLPO, "blpo_lstm": RecurrentBLPO}  # by their names in the Zoo
SCHEDULES = ("critic_learning_rate", "ent_coef")  # arguments that may be lin_1e-3 in a file, beside those that the Zoo knows
SCRIPTS = ("train", "enjoy", "benchmark", "load_from_hub", "push_to_hub", "record_training", "record_video")
COMMANDS = {name: f"rl_zoo3.{name}" for name in SCRIPTS}
COMMANDS |= {name: f"rl_zoo3.plots.{name}" for name in ("all_plots", "plot_from_file", "plot_train")}


def register(module: ModuleType | None = None) -> None:
    """Make BLPO known to one of RL Zoo's modules, by default to all of them. Calling it again changes nothing."""
    for zoo_module in map(importlib.import_module, _REGISTRATIONS) if module is None else (module,):
        _REGISTRATIONS[zoo_module.__name__](zoo_module)


def _register_algorithms(utils: Any) -> None:
    if ALGORITHMS.keys() <= utils.ALGOS.keys():
        return
    find = utils.get_model_path

    @functools.wraps(find)
    def get_model_path(exp_id: int, folder: str, algo: str, *args: Any, **kwargs: Any) -> tuple[str, str, str]:
        # Nobody publishes our agents to download, so what was trained here is the better default for `enjoy`
        if algo in ALGORITHMS and folder == "rl-trained-agents" and not os.path.isdir(os.path.join(folder, algo)):
            folder = "logs"
        return find(exp_id, folder, algo, *args, **kwargs)

    utils.get_model_path = get_model_path
    utils.ALGOS.update(ALGORITHMS)


def _register_tuning(hyperparams_opt: Any) -> None:
    for algo in ALGORITHMS:
        hyperparams_opt.HYPERPARAMS_SAMPLER[algo] = sample_blpo_params
        hyperparams_opt.HYPERPARAMS_CONVERTER[algo] = convert_blpo_params


def _register_hyperparams(exp_manager: Any) -> None:
    manager = exp_manager.ExperimentManager
    if hasattr(manager, "_knows_blpo"):
        return
    init, preprocess_hyperparams = manager.__init__, manager._preprocess_hyperparams

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # The user's file comes first, then the Zoo's own, if it should have one some day
        if self.algo in ALGORITHMS and kwargs.get("config") is None and not Path(self.config).is_file():
            self.config = str(default_hyperparams(self.algo))

    @functools.wraps(preprocess_hyperparams)
    def _preprocess_hyperparams(self: Any, hyperparams: dict[str, Any]) -> tuple[Any, ...]:
        for name in SCHEDULES if self.algo in ALGORITHMS else ():
            if isinstance(hyperparams.get(name), str):
                hyperparams[name] = _parse_schedule(name, hyperparams[name])
        return preprocess_hyperparams(self, hyperparams)

    manager.__init__, manager._preprocess_hyperparams, manager._knows_blpo = __init__, _preprocess_hyperparams, True


_REGISTRATIONS = {
    "rl_zoo3.utils": _register_algorithms,
    "rl_zoo3.hyperparams_opt": _register_tuning,
    "rl_zoo3.exp_manager": _register_hyperparams,
}


def default_hyperparams(algo: str = "blpo") -> Path:
    """The hyperparameter file used without `--conf-file`: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent
    return (package if (package / "hyperparams").is_dir() else package.parent) / "hyperparams" / f"{algo}.yml"


def _parse_schedule(name: str, text: str) -> LinearSchedule:
    try:
        kind, start = text.split("_")
        return {"lin": LinearSchedule}[kind](float(start), 0.0, 1.0)
    except (KeyError, ValueError):  # YAML takes 1e-3 for text, it needs !!float there
        raise ValueError(f"{name} must be a number or 'lin_<number>', not the string {text!r}") from None


def sample_blpo_params(trial: "optuna.Trial", n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Draw BLPO's arguments for `-optimize`. The signature is the Zoo's."""
    trial.suggest_int("n_steps_pow", 6, 11)
    trial.suggest_int("batch_size_pow", 6, 10)
    trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
    trial.suggest_float("one_minus_gae_lambda", 0.0001, 0.1, log=True)
    trial.suggest_float("learning_rate", 1e-5, 2e-3, log=True)
    trial.suggest_float("critic_learning_rate_ratio", 1, 10, log=True)  # the follower must not be the slower one
    trial.suggest_int("n_critic_updates", 1, 10)
    trial.suggest_categorical("critic_rollouts", [1, 4, 8])
    trial.suggest_categorical("n_epochs", [1, 5, 10, 20])
    trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4])
    trial.suggest_float("ent_coef", 1e-8, 0.1, log=True)
    trial.suggest_float("max_grad_norm", 0.3, 2)
    trial.suggest_float("damping", 1e-3, 0.1, log=True)
    trial.suggest_int("rank", 5, 40)
    trial.suggest_categorical("net_arch", ["tiny", "small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])

    params = convert_blpo_params(trial.params)
    for name in ("gamma", "gae_lambda", "n_steps", "batch_size", "critic_learning_rate"):  # true values, for the reports
        trial.set_user_attr(name, params[name])
    return params


def convert_blpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Turn what was drawn for a trial into BLPO's arguments, for `--trial-id` too."""
    from rl_zoo3.hyperparams_opt import convert_onpolicy_params

    sampled = sampled_params.copy()
    ratio = sampled.pop("critic_learning_rate_ratio")
    ihvp_kwargs = {name: sampled.pop(name) for name in ("damping", "rank")}
    params = convert_onpolicy_params(sampled)
    return {**params, "critic_learning_rate": ratio * params["learning_rate"], "ihvp_kwargs": ihvp_kwargs}


def main() -> None:
    """Run one of RL Zoo's commands with BLPO registered."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        sys.exit(f"usage: python -m sb3_blpo.zoo {{{','.join(COMMANDS)}}} [arguments of the Zoo's command]")
    register()
    runpy.run_module(COMMANDS[command], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # The module as everybody else imports it, not its copy under the name __main__
    importlib.import_module("sb3_blpo.zoo").main()

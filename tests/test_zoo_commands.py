"""
RL Zoo's commands as users type them, each in a process of its own and in a fresh environment: through the import hook and,
with SB3_BLPO_NO_ZOO=1, through `python -m sb3_blpo.zoo`.
"""

import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
import torch as th
import yaml
from fresh import ROOT, Environment, build_wheel
from hub import Hub
from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO, zoo

BLPO_ON_CARTPOLE = ("--algo", "blpo", "--env", "CartPole-v1")
SHORT = ("-n", "500", "--eval-freq", "-1", "--verbose", "0")
SMALL = ("-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:2")
STUDY = ("--storage", "sqlite:///study.db", "--study-name", "study")


@dataclass
class Zoo:
    """
    :param environment: With the wheel and RL Zoo
    :param folder: The current folder of the commands
    :param explicit: Whether to do without the hook
    """

    environment: Environment
    folder: Path
    explicit: bool = False

    def run(self, command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        if not self.explicit:
            return self.environment.run("-m", f"rl_zoo3.{command}", *arguments, cwd=self.folder, **variables)
        variables |= {"SB3_BLPO_NO_ZOO": "1"}
        return self.environment.run("-m", "sb3_blpo.zoo", command, *arguments, cwd=self.folder, **variables)

    def succeed(self, command: str, *arguments: str, **variables: str) -> str:
        process = self.run(command, *arguments, **variables)
        assert process.returncode == 0, process.stdout + process.stderr
        assert "RL Zoo will not know BLPO" not in process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environment"), wheel, extras="envs")


@pytest.fixture(scope="module")
def with_plots(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("with_plots"), wheel, "envs,plots", others=("tensorboard", "wandb"))


@pytest.fixture(scope="module", params=["hook", pytest.param("explicit", marks=pytest.mark.zoo)])
def trained(request, environment, tmp_path_factory):
    """The Zoo, and logs/blpo/CartPole-v1_1 in its folder."""
    trained = Zoo(environment, tmp_path_factory.mktemp(request.param), request.param == "explicit")
    trained.succeed(
        "train",
        *BLPO_ON_CARTPOLE,
        "--verbose",
        "0",
        "-n",
        "500",
        "--eval-freq",
        "128",
        *SMALL,
        "normalize:True",
        "--seed",
        "1",
    )
    return trained


def steps(model: BLPO) -> list[int]:
    """How many steps each optimizer has taken."""
    states = (optimizer.state_dict()["state"] for optimizer in (model.policy.optimizer, model.critic_optimizer))
    return [int(state[0]["step"]) for state in states]


def test_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    startup = ROOT / "sb3_blpo" / "startup"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sb3_blpo").rglob("*.py") if path.parent != startup}
    beside = {"_sb3_blpo_startup.py", "sb3_blpo.pth", "sb3_blpo.start"}
    assert names == package | beside | {"sb3_blpo/py.typed", "sb3_blpo/hyperparams/blpo.yml"}


def test_train(trained):
    folder = trained.folder / "logs" / "blpo" / "CartPole-v1_1"
    model = BLPO.load(folder / "CartPole-v1.zip")
    assert model.num_timesteps == 512
    assert isinstance(model.critic_learning_rate, LinearSchedule)
    # The shipped file's
    assert [model.critic_lr_schedule(progress) for progress in (1, 0.5, 0)] == [4e-3, 2e-3, 0]
    assert {"best_model.zip", "evaluations.npz"} <= {path.name for path in folder.iterdir()}
    assert (folder / "CartPole-v1" / "vecnormalize.pkl").is_file()


def test_continue(trained):
    first = trained.folder / "logs" / "blpo" / "CartPole-v1_1" / "CartPole-v1.zip"
    trained.succeed("train", *BLPO_ON_CARTPOLE, *SHORT, "-i", str(first), "-f", "continued", *SMALL, "normalize:True")
    before, after = BLPO.load(first), BLPO.load(trained.folder / "continued" / "blpo" / "CartPole-v1_1" / "CartPole-v1.zip")
    # As many steps again, from the optimizers' state
    assert steps(after) == [2 * count for count in steps(before)]
    assert not th.equal(after.policy.value_net.weight, before.policy.value_net.weight)


def test_enjoy(trained):
    """Finds what was trained without being told where."""
    output = trained.succeed("enjoy", *BLPO_ON_CARTPOLE, "-n", "300", "--no-render", "--exp-id", "1")
    assert "Loading logs/blpo/CartPole-v1_1/CartPole-v1.zip\nLoading running average" in output
    assert "Mean reward: " in output


def test_optimize_and_trial_id(trained):
    short = ("-n", "500", "--eval-freq", "-1", "--verbose", "0", "-params", "n_envs:2", "n_steps:64", "n_epochs:1")
    parallel = ("-optimize", "--n-trials", "2", "--n-jobs", "2", "--eval-episodes", "1", "--no-optim-plots")
    trained.succeed("train", *BLPO_ON_CARTPOLE, *STUDY, "-f", "study", *parallel, *short)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{trained.folder / 'study.db'}").trials
    assert [trial.state for trial in trials] == 2 * [optuna.trial.TrialState.COMPLETE]

    trained.succeed("train", *BLPO_ON_CARTPOLE, *STUDY, "-f", "best", "--trial-id", "1", *short)
    config = trained.folder / "best" / "blpo" / "CartPole-v1_1" / "CartPole-v1" / "config.yml"
    saved = dict(yaml.load(config.read_text(), Loader=yaml.UnsafeLoader))
    expected = zoo.convert_blpo_params(trials[1].params)
    assert {name: saved[name] for name in expected} == expected | {"n_steps": 64, "n_epochs": 1}
    assert trials[1].user_attrs.items() <= expected.items()


def test_hub(trained):
    with Hub() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.TOKEN, "HF_HOME": "cache", "TRUST_REMOTE_CODE": "1"}
        where = ("-orga", "org", "-f")
        trained.succeed("push_to_hub", *BLPO_ON_CARTPOLE, *where, "logs", "--no-render", "-m", "A message", **variables)
        assert hub.commits == ["A message"]
        files = hub.files["org/blpo-CartPole-v1"]
        assert b"- stable-baselines3" in files["README.md"] and b"**BLPO** Agent playing **CartPole-v1**" in files["README.md"]
        trained.succeed("load_from_hub", *BLPO_ON_CARTPOLE, *where, "loaded", **variables)
        del files["vec_normalize.pkl"]
        variables["HF_HOME"] = "another_cache"
        output = trained.succeed("load_from_hub", *BLPO_ON_CARTPOLE, *where, "without_statistics", **variables)
        assert "No normalization file" in output
    for folder in ("loaded", "without_statistics"):
        run = trained.folder / folder / "blpo" / "CartPole-v1_1"
        assert (run / "CartPole-v1.zip").read_bytes() == files["blpo-CartPole-v1.zip"]
        assert (run / "CartPole-v1" / "vecnormalize.pkl").is_file() == (folder == "loaded")
    pushed, loaded = (BLPO.load(trained.folder / f / "blpo" / "CartPole-v1_1" / "CartPole-v1.zip") for f in ("logs", "loaded"))
    assert th.equal(pushed.policy.value_net.weight, loaded.policy.value_net.weight)


@pytest.mark.zoo
def test_subprocess_environments(trained):
    assert "Saving to subproc/blpo" in trained.succeed(
        "train", *BLPO_ON_CARTPOLE, "-n", "500", "--eval-freq", "128", "--vec-env", "subproc", "-f", "subproc", *SMALL
    )


@pytest.mark.zoo
def test_benchmark(trained, with_plots):
    benchmark = Zoo(with_plots, trained.folder, trained.explicit)
    benchmark.succeed("benchmark", "--log-dir", "logs", "--no-hub", "-n", "300")
    row = (trained.folder / "benchmark.md").read_text().splitlines()[-1].replace(" ", "").split("|")
    assert row[1:3] == ["blpo", "CartPole-v1"]
    assert 5 < float(row[3]) <= 300


@pytest.mark.zoo
def test_record_video(trained):
    trained.succeed("record_video", *BLPO_ON_CARTPOLE, "-n", "50", "-f", "logs", "-o", "videos")
    (video,) = (trained.folder / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000


@pytest.mark.zoo
def test_record_training(trained):
    import imageio_ffmpeg  # moviepy brings an ffmpeg along under another name; the Zoo wants it on the path

    (trained.environment.scripts / "ffmpeg").unlink(missing_ok=True)
    (trained.environment.scripts / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    trained.succeed("record_training", *BLPO_ON_CARTPOLE, "-n", "50", "-f", "logs", "-o", str(trained.folder / "training"))
    assert (trained.folder / "training" / "training.mp4").stat().st_size > 1000


@pytest.mark.zoo
def test_plots(trained, with_plots):
    plots = Zoo(with_plots, trained.folder / "compared", trained.explicit)
    shutil.copytree(trained.folder / "logs", plots.folder / "logs")
    plots.succeed("train", "--algo", "ppo", "--env", "CartPole-v1", "-n", "500", "--eval-freq", "128", *SMALL)
    for algo in ("blpo", "ppo"):  # plot_from_file wants two runs of each
        shutil.copytree(plots.folder / "logs" / algo / "CartPole-v1_1", plots.folder / "logs" / algo / "CartPole-v1_2")
    module = "" if trained.explicit else "plots."
    plots.succeed(f"{module}plot_train", "-a", "blpo", "-e", "CartPole-v1", "-f", "logs", "-w", "5")
    both = ("-a", "blpo", "ppo", "-e", "CartPole-v1", "-f", "logs", "--no-million")
    table = plots.succeed(f"{module}all_plots", *both, "--print-n-trials", "-o", "results")
    assert "CartPole-v1-BLPO-logs: 2\nCartPole-v1-PPO-logs: 2" in table
    plots.succeed(f"{module}plot_from_file", "-i", "results.pkl", "-r", "-vs", "-iqm", "-l", "BLPO", "PPO", "-o", "figure.svg")
    assert "BLPO" in (plots.folder / "figure.svg").read_text()


@pytest.mark.zoo
def test_track(trained, with_plots):
    tracked = Zoo(with_plots, trained.folder / "tracked", trained.explicit)
    tracked.folder.mkdir()
    tracked.succeed("train", *BLPO_ON_CARTPOLE, *SHORT, "--track", *SMALL, WANDB_MODE="offline", WANDB_DIR=str(tracked.folder))
    (run,) = tracked.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/correction_ratio" in run.read_bytes()


@pytest.mark.zoo
def test_rl_zoo3_command(with_plots, tmp_path):
    """The `rl_zoo3` script calls this module."""
    for arguments in (("train", *SHORT, *SMALL), ("enjoy", "-n", "200", "--no-render")):
        process = with_plots.run("-m", "rl_zoo3.cli", arguments[0], *BLPO_ON_CARTPOLE, *arguments[1:], cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    assert "Mean reward: " in process.stdout


@pytest.mark.zoo
def test_checkout(environment, tmp_path):
    """A clone of the Zoo's repository: its folder comes before the installed Zoo, and hyperparams/ stands beside rl_zoo3/."""
    shutil.copytree(environment.site_packages / "rl_zoo3", tmp_path / "rl_zoo3", ignore=shutil.ignore_patterns("hyperparams"))
    shutil.copytree(environment.site_packages / "rl_zoo3" / "hyperparams", tmp_path / "hyperparams")
    (tmp_path / "train.py").write_text("from rl_zoo3.train import train\n\nif __name__ == '__main__':\n    train()\n")
    for n_steps in (128, 32):
        process = environment.run("train.py", *BLPO_ON_CARTPOLE, "-n", "100", "--eval-freq", "-1", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert f"('n_steps', {n_steps})" in process.stdout
        # The second time the checkout has a file of its own
        own = {"n_timesteps": 100, "policy": "MlpPolicy", "n_steps": 32, "batch_size": 32}
        (tmp_path / "hyperparams" / "blpo.yml").write_text(yaml.safe_dump({"CartPole-v1": own}))


def test_subprocess_environments_from_a_script(environment, tmp_path):
    """Spawned workers import the Zoo again, and with it the hook."""
    (tmp_path / "script.py").write_text(
        "from rl_zoo3.utils import ALGOS\n"
        "from stable_baselines3.common.env_util import make_vec_env\n"
        "from stable_baselines3.common.vec_env import SubprocVecEnv\n"
        "if __name__ == '__main__':\n"
        "    env = make_vec_env('Pendulum-v1', 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method='spawn'))\n"
        "    print(ALGOS['blpo']('MlpPolicy', env, n_steps=32, batch_size=32, n_epochs=1).learn(64).num_timesteps)\n"
    )
    process = environment.run("script.py", cwd=tmp_path)
    assert process.stdout == "64\n", process.stderr


def test_switched_off(environment, tmp_path):
    process = Zoo(environment, tmp_path).run("train", *BLPO_ON_CARTPOLE, SB3_BLPO_NO_ZOO="1")
    assert process.returncode == 2
    assert "invalid choice: 'blpo'" in process.stderr


def test_unknown_command(environment, tmp_path):
    process = Zoo(environment, tmp_path, explicit=True).run("fly")
    assert process.returncode == 1
    assert process.stderr.startswith("usage: python -m sb3_blpo.zoo {train,enjoy,")


def test_failing_import(environment, tmp_path):
    """One warning that says why, and the Zoo's own algorithms go on working."""
    (tmp_path / "sb3_blpo").mkdir()
    (tmp_path / "sb3_blpo" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    for algo, returncode in (("ppo", 0), ("blpo", 2)):
        arguments = ("--algo", algo, "--env", "CartPole-v1", *SHORT, *SMALL)
        process = Zoo(environment, tmp_path).run("train", *arguments, PYTHONPATH=str(tmp_path))
        assert process.returncode == returncode, process.stderr
        assert process.stderr.count("RuntimeWarning") == 1
        assert "RL Zoo will not know BLPO, its registration failed (ImportError: broken on purpose)" in process.stderr
    assert "invalid choice: 'blpo'" in process.stderr


def test_without_the_zoo(wheel, tmp_path):
    """BLPO from Python needs no RL Zoo."""
    environment = Environment(tmp_path / "environment", wheel, "envs", without="rl_zoo3")
    code = (
        "import sb3_blpo; print(sb3_blpo.BLPO('MlpPolicy', 'CartPole-v1', n_steps=64, batch_size=64).learn(64).num_timesteps)"
    )
    process = environment.run("-W", "error::RuntimeWarning", "-c", code, cwd=tmp_path)
    assert (process.stdout, process.stderr) == ("64\n", "")
    for explicit in (False, True):
        process = Zoo(environment, tmp_path, explicit).run("train", *BLPO_ON_CARTPOLE)
        assert process.returncode == 1
        assert "No module named 'rl_zoo3'" in process.stderr.splitlines()[-1]


def test_uninstall(wheel, tmp_path):
    environment = Environment(tmp_path / "environment", wheel, "envs")
    zoo = Zoo(environment, tmp_path)
    zoo.succeed("train", *BLPO_ON_CARTPOLE, *SHORT, *SMALL)
    environment.pip("uninstall", "--yes", "sb3_blpo")
    assert [path for path in environment.site_packages.rglob("*") if "blpo" in str(path.relative_to(tmp_path))] == []
    process = zoo.run("train", "--algo", "ppo", "--env", "CartPole-v1", *SHORT, *SMALL)
    assert (process.returncode, process.stderr) == (0, "")
    assert "invalid choice: 'blpo'" in zoo.run("train", *BLPO_ON_CARTPOLE).stderr

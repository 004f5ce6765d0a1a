"""RL Zoo's commands as users type them, each in a process of its own and in a fresh environment."""

import hashlib
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio_ffmpeg
import optuna
import pytest
import yaml
from fresh import ROOT, Environment, build_wheel
from stable_baselines3.common.utils import LinearSchedule

from sb3_blpo import BLPO, zoo

pytestmark = pytest.mark.zoo

AGENT = ("--algo", "blpo", "--env", "CartPole-v1")
SHORT = ("-n", "500", "--eval-freq", "-1", "--verbose", "0")
SMALL = ("-params", "n_envs:2", "n_steps:64", "batch_size:64", "n_epochs:2")
STUDY = (
    "--storage",
    "sqlite:///study.db",
    "--study-name",
    "study",
    "--n-jobs",
    "2",
    "--eval-episodes",
    "1",
    "--no-optim-plots",
)
RUN = Path("blpo", "CartPole-v1_1")


def succeed(environment: Environment, folder: Path, module: str, *arguments: str, **variables: str) -> str:
    process = environment.run("-m", module, *arguments, cwd=folder, **variables)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "RL Zoo will not know BLPO" not in process.stderr
    return process.stdout


def fail(environment: Environment, folder: Path, *arguments: str, **variables: str) -> str:
    process = environment.run("-m", *arguments, cwd=folder, **variables)
    assert process.returncode != 0, process.stdout
    return process.stderr


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


@pytest.fixture(scope="module")
def trained(environment, tmp_path_factory):
    """A folder with a trained agent in logs/blpo/CartPole-v1_1."""
    folder = tmp_path_factory.mktemp("trained")
    more = ("normalize:True", "critic_learning_rate:'lin_4e-3'", "--eval-freq", "128", "--seed", "1")
    succeed(environment, folder, "rl_zoo3.train", *AGENT, *SHORT, *SMALL, *more)
    return folder


@pytest.fixture
def hub(trained) -> Iterator[str]:
    """The address of a stand-in for the Hugging Face Hub, whose repository org/blpo-CartPole-v1 has the trained agent."""
    files = {f"blpo-{file.name}": file for file in (trained / "logs" / RUN).glob("*.zip")}
    files |= {file.name: file for file in (trained / "logs" / RUN / "CartPole-v1").iterdir()}
    files["vec_normalize.pkl"] = files.pop("vecnormalize.pkl")
    files |= {name: trained / name for name in ("env_kwargs.yml", "train_eval_metrics.zip")}
    files["env_kwargs.yml"].write_text("{}")
    with zipfile.ZipFile(files["train_eval_metrics.zip"], "w") as metrics:
        metrics.write(trained / "logs" / RUN / "evaluations.npz", "evaluations.npz")

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            folder, _, name = path.rpartition("/")
            return str(files.get(name, "missing") if folder == "/org/blpo-CartPole-v1/resolve/main" else "missing")

        def end_headers(self) -> None:
            self.send_header("X-Repo-Commit", 40 * "0")
            self.send_header("ETag", hashlib.sha1(self.path.encode()).hexdigest())
            super().end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def steps(model: BLPO) -> list[int]:
    """How many steps the optimizers have taken."""
    parameters = model.get_parameters()
    return [int(parameters[name]["state"][0]["step"]) for name in parameters if "optimizer" in name]


def test_wheel(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    startup = ROOT / "sb3_blpo" / "startup"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "sb3_blpo").rglob("*.py") if path.parent != startup}
    hyperparams = {f"sb3_blpo/hyperparams/{path.name}" for path in (ROOT / "hyperparams").iterdir()}
    beside = {"_sb3_blpo_startup.py", "sb3_blpo.pth", "sb3_blpo.start"}
    assert names == package | hyperparams | beside | {"sb3_blpo/py.typed"}


def test_train(trained):
    folder = trained / "logs" / RUN
    model = BLPO.load(folder / "CartPole-v1.zip")
    assert model.num_timesteps == 512
    assert isinstance(model.critic_learning_rate, LinearSchedule)
    assert {"best_model.zip", "evaluations.npz"} <= {path.name for path in folder.iterdir()}
    assert (folder / "CartPole-v1" / "vecnormalize.pkl").is_file()
    # The rest is from the shipped file
    used = dict(yaml.load((folder / "CartPole-v1" / "config.yml").read_text(), Loader=yaml.UnsafeLoader))
    shipped = yaml.safe_load(zoo.default_hyperparams().read_text())["CartPole-v1"]
    given = {"n_envs", "n_steps", "batch_size", "n_epochs", "normalize", "critic_learning_rate", "n_timesteps"}
    assert {name: used[name] for name in shipped.keys() - given} == {name: shipped[name] for name in shipped.keys() - given}


def test_enjoy(environment, trained):
    output = succeed(environment, trained, "rl_zoo3.enjoy", *AGENT, "-n", "600", "--no-render", "--exp-id", "1")
    assert "Loading logs/blpo/CartPole-v1_1/CartPole-v1.zip\nLoading running average" in output
    assert "Mean reward: " in output


def test_continue_in_subprocesses(environment, trained):
    first, second = trained / "logs" / RUN / "CartPole-v1.zip", trained / "continued" / RUN / "CartPole-v1.zip"
    more = ("normalize:True", "-i", str(first), "-f", "continued", "--vec-env", "subproc")
    succeed(environment, trained, "rl_zoo3.train", *AGENT, *SHORT, *SMALL, *more)
    before, after = steps(BLPO.load(first)), steps(BLPO.load(second))
    assert len(before) == 2 and after == [2 * count for count in before]


def test_optimize_and_trial_id(environment, trained):
    short = (*SHORT, "-params", "n_envs:2", "n_steps:64", "n_epochs:1")
    succeed(environment, trained, "rl_zoo3.train", *AGENT, *STUDY, "-f", "study", "-optimize", "--n-trials", "2", *short)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{trained / 'study.db'}").trials
    assert [trial.state for trial in trials] == 2 * [optuna.trial.TrialState.COMPLETE]

    succeed(environment, trained, "rl_zoo3.train", *AGENT, *STUDY, "-f", "best", "--trial-id", "1", *short)
    config = trained / "best" / RUN / "CartPole-v1" / "config.yml"
    saved = dict(yaml.load(config.read_text(), Loader=yaml.UnsafeLoader))
    expected = zoo.convert_blpo_params(trials[1].params)
    assert {name: saved[name] for name in expected} == expected | {"n_steps": 64, "n_epochs": 1}


def test_recurrent(environment, tmp_path):
    agent = ("--algo", "blpo_lstm", "--env", "CartPoleNoVel-v1")
    short = (*SHORT, "-params", "n_steps:8", "batch_size:64", "n_epochs:1")
    succeed(environment, tmp_path, "rl_zoo3.train", *agent, *short)
    output = succeed(environment, tmp_path, "rl_zoo3.enjoy", *agent, "-n", "600", "--no-render")
    assert "Loading logs/blpo_lstm/CartPoleNoVel-v1_1/CartPoleNoVel-v1.zip" in output and "Mean reward: " in output
    succeed(environment, tmp_path, "rl_zoo3.train", *agent, *STUDY, "-optimize", "--n-trials", "2", *short)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    assert [trial.state for trial in trials] == 2 * [optuna.trial.TrialState.COMPLETE]


def test_without_the_hook(with_plots, tmp_path):
    off = {"SB3_BLPO_NO_ZOO": "1"}
    assert "invalid choice: 'blpo'" in fail(with_plots, tmp_path, "rl_zoo3.train", *AGENT, **off)
    assert fail(with_plots, tmp_path, "sb3_blpo.zoo", "fly").startswith("usage: python -m sb3_blpo.zoo {train,enjoy,")
    short = ("-n", "500", "--eval-freq", "128", *SMALL)
    for arguments, expected in (
        (("train", *AGENT, *short), "Saving to logs/blpo/CartPole-v1_1"),
        (("enjoy", *AGENT, "-n", "600", "--no-render"), "Mean reward: "),
        (("train", *AGENT, *STUDY, "-optimize", "--n-trials", "1", *short), "Best trial:"),
        (("plot_train", "-a", "blpo", "-e", "CartPole-v1", "-f", "logs", "-w", "5"), ""),
    ):
        assert expected in succeed(with_plots, tmp_path, "sb3_blpo.zoo", *arguments, **off)


def test_load_from_hub(environment, trained, hub):
    variables = {"HF_ENDPOINT": hub, "HF_HOME": "cache", "TRUST_REMOTE_CODE": "1"}
    arguments = ("-orga", "org", "-f", "loaded")
    succeed(environment, trained, "rl_zoo3.load_from_hub", *AGENT, *arguments, **variables)
    ours, loaded = trained / "logs" / RUN, trained / "loaded" / RUN
    assert (loaded / "CartPole-v1.zip").read_bytes() == (ours / "CartPole-v1.zip").read_bytes()
    assert (loaded / "CartPole-v1" / "vecnormalize.pkl").is_file()


def test_benchmark(with_plots, trained):
    """The Zoo starts `python enjoy.py`, a file of its repository, which users of the package have to make."""
    (trained / "enjoy.py").write_text("from rl_zoo3.enjoy import enjoy\n\nenjoy()\n")
    succeed(with_plots, trained, "rl_zoo3.benchmark", "--log-dir", "logs", "--no-hub", "-n", "600")
    row = (trained / "benchmark.md").read_text().splitlines()[-1].replace(" ", "").split("|")
    assert row[1:3] == ["blpo", "CartPole-v1"]
    assert 5 < float(row[3]) <= 500


def test_record_training(environment, trained):
    """Starts record_video for each model, and ffmpeg (moviepy brings one along under another name)."""
    (environment.scripts / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    arguments = ("-n", "50", "-f", "logs", "-o", str(trained / "training"))
    succeed(environment, trained, "rl_zoo3.record_training", *AGENT, *arguments)
    assert (trained / "training" / "training.mp4").stat().st_size > 1000
    assert len(list((trained / "training").glob("*.mp4"))) == 3


def test_plots(with_plots, trained, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "logs")
    ppo = ("--algo", "ppo", "--env", "CartPole-v1", "-n", "500", "--eval-freq", "128")
    succeed(with_plots, tmp_path, "rl_zoo3.train", *ppo, *SMALL)
    for algo in ("blpo", "ppo"):  # plot_from_file wants two runs of each
        shutil.copytree(tmp_path / "logs" / algo / "CartPole-v1_1", tmp_path / "logs" / algo / "CartPole-v1_2")
    both = ("-a", "blpo", "ppo", "-e", "CartPole-v1", "-f", "logs", "--no-million")
    table = succeed(with_plots, tmp_path, "rl_zoo3.plots.all_plots", *both, "--print-n-trials", "-o", "results")
    assert "CartPole-v1-BLPO-logs: 2\nCartPole-v1-PPO-logs: 2" in table
    figure = ("-i", "results.pkl", "-r", "-vs", "-iqm", "-l", "BLPO", "PPO", "-o", "figure.svg")
    succeed(with_plots, tmp_path, "rl_zoo3.plots.plot_from_file", *figure)
    assert "BLPO" in (tmp_path / "figure.svg").read_text()


def test_track(with_plots, tmp_path):
    """And the `rl_zoo3` script, which calls this module."""
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    succeed(with_plots, tmp_path, "rl_zoo3.cli", "train", *AGENT, *SHORT, "--track", *SMALL, **variables)
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/" in run.read_bytes()


def test_checkout(environment, tmp_path):
    """A clone of the Zoo's repository: its folder comes before the installed Zoo, and hyperparams/ stands beside rl_zoo3/."""
    shutil.copytree(environment.site_packages / "rl_zoo3", tmp_path / "rl_zoo3", ignore=shutil.ignore_patterns("hyperparams"))
    shutil.copytree(environment.site_packages / "rl_zoo3" / "hyperparams", tmp_path / "hyperparams")
    (tmp_path / "train.py").write_text("from rl_zoo3.train import train\n\nif __name__ == '__main__':\n    train()\n")
    shipped = yaml.safe_load(zoo.default_hyperparams().read_text())["CartPole-v1"]["n_steps"]
    for n_steps in (shipped, 32):
        process = environment.run("train.py", *AGENT, "-n", "100", "--eval-freq", "-1", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert f"('n_steps', {n_steps})" in process.stdout
        # The second time the checkout has a file of its own
        own = {"n_timesteps": 100, "policy": "MlpPolicy", "n_steps": 32, "batch_size": 32}
        (tmp_path / "hyperparams" / "blpo.yml").write_text(yaml.safe_dump({"CartPole-v1": own}))


def test_spawned_environments(environment, tmp_path):
    """Spawned workers import the script again, and with it the Zoo through the hook."""
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


def test_failing_import(environment, tmp_path):
    """One warning that says why, and the Zoo's own algorithms go on working."""
    (tmp_path / "sb3_blpo").mkdir()
    (tmp_path / "sb3_blpo" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    for algo, returncode in (("ppo", 0), ("blpo", 2)):
        arguments = ("--algo", algo, "--env", "CartPole-v1", *SHORT, *SMALL)
        process = environment.run("-m", "rl_zoo3.train", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
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
    for module in (("rl_zoo3.train",), ("sb3_blpo.zoo", "train")):
        assert "No module named 'rl_zoo3'" in fail(environment, tmp_path, *module, *AGENT).splitlines()[-1]


def test_uninstall(wheel, tmp_path):
    environment = Environment(tmp_path / "environment", wheel, "envs")
    environment.pip("uninstall", "--yes", "sb3_blpo")
    assert [path for path in environment.site_packages.rglob("*") if "blpo" in str(path.relative_to(tmp_path))] == []
    process = environment.run("-m", "rl_zoo3.train", "--algo", "ppo", *AGENT[2:], *SHORT, *SMALL, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")

"""What runs SB3's own tests against BLPO (``make conformance``): it replaces, selects, counts, and fails when it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sb3_tests import sb3_tests

PLUGIN = Path(__file__).parent

# In the manner of SB3's tests. NAME is replaced
SUITE = """
import pytest
from stable_baselines3 import A2C, PPO, SAC

MODELS = {"mine": NAME, "sac": SAC}

@pytest.fixture
def model():
    return NAME("MlpPolicy", "CartPole-v1", 0.01, vf_coef=0.1, max_grad_norm=0.4)

def test_fixture(model):
    assert (type(model).__name__, type(model).__mro__[1].__name__) == ("NAME", "BLPO")
    assert (model.learning_rate, model.vf_coef, model.max_grad_norm) == (0.01, 0.1, 0.4)

@pytest.mark.parametrize("model_class", [PPO, A2C, SAC])
def test_parameter(model_class):
    assert model_class("MlpPolicy", "CartPole-v1", n_steps=8).n_steps == 8

@pytest.mark.parametrize("name", MODELS)
def test_table(name):
    if name == "mine":
        arguments = {"use_rms_prop": False} if NAME is A2C else {}
        NAME("MlpPolicy", "CartPole-v1", **arguments)

def test_refusal():
    NAME("MlpPolicy", "CartPole-v1", n_steps=-8)

def test_unknown_argument():
    with pytest.raises(TypeError):
        NAME("MlpPolicy", "CartPole-v1", no_such_argument=1)

def test_error():
    NAME("MlpPolicy", "CartPole-v1").no_such_method()

def test_something_else():
    pass
"""


def run_suite(folder: Path, name: str, deviations: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """Run the suite above with the plugin."""
    table = {f"test_suite.py::{test}": "for a reason" for test in deviations}
    (folder / "test_suite.py").write_text(SUITE.replace("NAME", name))
    (folder / "conftest.py").write_text(f"import stand_in\nstand_in.DEVIATIONS[{name!r}] = {table}\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "stand_in", "--in-place-of", name, "-q", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PLUGIN), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("name", "workers"), [("PPO", []), ("A2C", ["-n", "1"])])
def test_outcomes(tmp_path, name, workers):
    process = run_suite(tmp_path, name, ["test_refusal", "test_fixture", "test_error"], *workers)
    output = process.stdout
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    # A deviation that passes, and an error where a deviation was expected
    assert "FAILED test_suite.py::test_fixture" in output and "FAILED test_suite.py::test_error" in output
    assert ("test_suite.py::test_table[mine] | use_rms_prop=False" in output) == (name == "A2C")
    assert "test_suite.py::test_refusal | for a reason" in output
    assert f"not counted:\n  test_suite.py::test_table[sac]\n  test_suite.py::test_unknown_argument\n{name}" in output
    assert f"{name}: 2 passed, 2 failed, 1 deviations, 0 skipped, 2 not counted" in output


def test_a_deviation_must_name_a_test(tmp_path):
    process = run_suite(tmp_path, "PPO", ["test_fixture", "test_renamed"])
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Deviations of PPO that name no test: test_suite.py::test_renamed" in process.stderr


def test_nothing_constructed_is_a_failure(tmp_path):
    process = run_suite(tmp_path, "PPO", [], "-k", "test_table and sac")
    assert process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "PPO: 0 passed, 0 failed, 0 deviations, 0 skipped, 1 not counted" in process.stdout


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match=r"could not download the source distribution of stable_baselines3==2\.9\.2"):
        sb3_tests("stable_baselines3", "2.9.2", tmp_path)
    assert not list(tmp_path.iterdir())

"""What runs SB3's own tests against BLPO (``make conformance``): it replaces, selects, counts, and fails when it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sb3_tests import sb3_tests

PLUGIN = Path(__file__).parent / "conformance"

# In the manner of SB3's tests
SUITE = """
import pytest
from stable_baselines3 import A2C, PPO, SAC

MODELS = {"ppo": PPO, "sac": SAC}

@pytest.fixture
def model():
    return PPO("MlpPolicy", "CartPole-v1", 0.01, vf_coef=0.1)

def test_fixture(model):
    assert (type(model).__name__, type(model).__mro__[1].__name__) == ("PPO", "BLPO")
    assert (model.learning_rate, model.critic_learning_rate, model.batch_size) == (0.01, 0.001, 64)

@pytest.mark.parametrize("model_class", [PPO, A2C, SAC])
def test_parameter(model_class):
    assert model_class("MlpPolicy", "CartPole-v1", n_steps=8).n_steps == 8

@pytest.mark.parametrize("name", MODELS)
def test_table(name):
    if name == "ppo":
        PPO("MlpPolicy", "CartPole-v1")

def test_refusal():
    with pytest.raises(AssertionError):
        PPO("MlpPolicy", "CartPole-v1", clip_range_vf=-1)

def test_unknown_argument():
    with pytest.raises(TypeError):
        PPO("MlpPolicy", "CartPole-v1", no_such_argument=1)

def test_error():
    PPO("MlpPolicy", "CartPole-v1").no_such_method()

def test_something_else():
    pass
"""


def run_suite(folder: Path, deviations: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """Run the suite above with the plugin, in place of PPO."""
    table = {f"test_suite.py::{name}": "for a reason" for name in deviations}
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "conftest.py").write_text(f"import stand_in\nstand_in.DEVIATIONS['PPO'] = {table}\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "stand_in", "--in-place-of", "PPO", "-q", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PLUGIN), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_outcomes(tmp_path, workers):
    process = run_suite(tmp_path, ["test_refusal", "test_fixture", "test_error"], *workers)
    output = process.stdout
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    # A deviation that passes, and an error where a deviation was expected
    assert "FAILED test_suite.py::test_fixture" in output and "FAILED test_suite.py::test_error" in output
    assert "test_suite.py::test_fixture | vf_coef=0.1" in output
    assert "test_suite.py::test_refusal | clip_range_vf=-1" in output
    assert "test_suite.py::test_refusal | for a reason" in output
    assert "not counted:\n  test_suite.py::test_table[sac]\n  test_suite.py::test_unknown_argument\nPPO" in output
    assert "PPO: 2 passed, 2 failed, 1 deviations, 0 skipped, 2 not counted" in output


def test_a_deviation_must_name_a_test(tmp_path):
    process = run_suite(tmp_path, ["test_fixture", "test_renamed"])
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Deviations of PPO that name no test: test_suite.py::test_renamed" in process.stderr


def test_nothing_constructed_is_a_failure(tmp_path):
    process = run_suite(tmp_path, [], "-k", "test_table and sac")
    assert process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "PPO: 0 passed, 0 failed, 0 deviations, 0 skipped, 1 not counted" in process.stdout


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match=r"could not download the source distribution of stable_baselines3==2\.9\.2"):
        sb3_tests("2.9.2", tmp_path)
    assert not list(tmp_path.iterdir())

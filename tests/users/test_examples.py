"""The examples in docs/examples and in README: they run, and show what they are there to show."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from envs import DICT, Masked, SpaceEnv

ROOT = Path(__file__).parents[2]


def returns_of(example: str, timesteps: int) -> list[float]:
    """The mean returns that a short run of an example prints, with an interval for each."""
    command = [sys.executable, str(ROOT / "docs" / "examples" / example), "--seeds", "2", "--timesteps", str(timesteps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600).stdout
    found = re.findall(r"mean return +(-?[\d.]+) ± [\d.]+ \(95 %\)$", output, re.MULTILINE)
    assert len(found) == len(output.splitlines()) == 2
    return [float(number) for number in found]


@pytest.mark.slow
def test_action_masks() -> None:
    with_masks, without = returns_of("action_masks.py", 8192)
    assert -15 < with_masks < 0 and -50 <= without < -40


@pytest.mark.slow
def test_asymmetric_critic() -> None:
    with_crowd, without = returns_of("asymmetric_critic.py", 12_288)
    assert 50 >= with_crowd > without + 8 > 8


#: By a word in it: an environment for an example of README's
ENVIRONMENTS: dict[str, Any] = {
    "MaskableBLPO": lambda: Masked(SpaceEnv()),
    "critic_keys": lambda: SpaceEnv(DICT),
    "RecurrentBLPO": SpaceEnv,
}


@pytest.mark.parametrize("word", ENVIRONMENTS)
def test_example_in_readme(word: str) -> None:
    """Shorter, and in an environment with what it is for."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (text for text in examples if word in text)
    env = ENVIRONMENTS[word]()
    names: dict[str, Any] = {"env": env, "obs": env.reset(seed=0)[0]}
    exec(re.sub(r"learn\([\d_]+\)", "learn(64)", re.sub(r"env(?=[,)])", "env, n_steps=64", example, count=1)), names)
    assert names["model"].num_timesteps == 64 and env.action_space.contains(int(names["actions"]))

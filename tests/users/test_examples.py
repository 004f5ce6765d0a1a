"""The examples in README, docs and docs/examples: they run, and show what they are there to show."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str) -> list[Any]:
    """All code of this language, by page and heading."""
    return [
        pytest.param(code, id=f"{page.stem}: {section.splitlines()[0]}")
        for page in PAGES
        for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)
        for code in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth as long."""
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"\b(\d+)_000\b", lambda found: str(int(found[1]) * 100), code), {"__name__": "__main__"})


#: Not run here: what installs, and what `make` does, which CI runs from a clean checkout
ELSEWHERE = ("pip ", "make ", ".ci/run")
#: How long the commands are here
SHORT = {"-n": "300", "--timesteps": "2000", "--seeds": "2", "--n-trials": "2", "--trials": "2"}


def commands() -> list[Any]:
    """Of each block of commands those that are run here."""
    lines = [
        (param.id, [line for line in param.values[0].splitlines() if not line.startswith(ELSEWHERE)])
        for param in blocks("bash")
    ]
    return [pytest.param(some, id=title) for title, some in lines if some]


@pytest.mark.parametrize("lines", commands())
def test_commands(lines: list[str], tmp_path: Path) -> None:
    """Short, in the order of the page."""
    for link in ("docs", "benchmarks"):
        (tmp_path / link).symlink_to(ROOT / link)
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "python"
        for option, value in SHORT.items():
            if option in words:
                words[words.index(option) + 1] = value
        if words[2] == "rl_zoo3.train":
            words += ["-n", "300"] * ("-n" not in words) + ["--eval-freq", "-1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=environment, check=True, timeout=600)


def output_of(example: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=600).stdout


def returns_of(example: str, timesteps: int) -> list[float]:
    """The mean returns that a short run of an example prints, with an interval for each."""
    output = output_of(example, "--seeds", "2", "--timesteps", str(timesteps))
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


def test_beside_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(9 <= mean <= 500 for mean in returns_of("beside_ppo.py", 4096))
    assert (tmp_path / "beside_ppo.png").stat().st_size > 10_000


def test_optuna_study() -> None:
    output = output_of("optuna_study.py", "--trials", "2", "--timesteps", "2048")
    assert re.search(r"best: [\d.]+ {'learning_rate': .*'critic_rollouts': \d+}", output)

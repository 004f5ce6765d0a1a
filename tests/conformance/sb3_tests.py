"""
Run the tests of the installed Stable-Baselines3 with BLPO in place of PPO, then in place of A2C, and those of sb3-contrib with
MaskableBLPO and RecurrentBLPO in place of MaskablePPO and RecurrentPPO.

Arguments go to pytest, for instance ``-n 2`` or ``-k save_load``. The tests come from the source distributions, which pip
downloads once.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
PASSES = (
    ("stable_baselines3", "PPO"),
    ("stable_baselines3", "A2C"),
    ("sb3_contrib", "MaskablePPO"),
    ("sb3_contrib", "RecurrentPPO"),
)


def sb3_tests(package: str, released: str, build: Path = BUILD) -> Path:
    """
    :param package: "stable_baselines3" or "sb3_contrib"
    :param released: Its version
    :param build: Where to unpack
    :return: Folder with that version's tests and its pyproject.toml, but not its package
    :raises SystemExit: If pip cannot download them
    """
    name = f"{package}-{released}"
    if (build / name).is_dir():
        return build / name
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "--dest", folder]
        if subprocess.run([*download, f"{package}=={released}"]).returncode:
            sys.exit(
                f"The tests of {package} did not run: pip (see above) could not download the source distribution of "
                f"{package}=={released}, the installed version, which holds them. It needs to only once."
            )
        with tarfile.open(Path(folder) / f"{name}.tar.gz") as archive:
            wanted = [file for file in archive if file.name.startswith((f"{name}/tests/", f"{name}/pyproject.toml"))]
            archive.extractall(folder, wanted, filter="data")
        (Path(folder) / name).rename(build / name)
    return build / name


def main(arguments: list[str]) -> int:
    """
    :param arguments: For pytest
    :return: Exit status: pytest's, of the first pass that failed
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    statuses = [
        subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "stand_in", "--in-place-of", name, "-q", "-rs", *arguments, "tests"],
            cwd=sb3_tests(package, version(package)),
            env=environment,
        ).returncode
        for package, name in PASSES
    ]
    return next(filter(None, statuses), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

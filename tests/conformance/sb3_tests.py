"""
Run the tests of the installed Stable-Baselines3 with BLPO in place of PPO, then in place of A2C.

Arguments go to pytest, for instance ``-n 2`` or ``-k save_load``. The tests come from SB3's source distribution, which pip
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


def sb3_tests(sb3_version: str, build: Path = BUILD) -> Path:
    """
    :param sb3_version: A released version
    :param build: Where to unpack
    :return: Folder with that version's tests and its pyproject.toml, but not its package
    :raises SystemExit: If pip cannot download them
    """
    name = f"stable_baselines3-{sb3_version}"
    if (build / name).is_dir():
        return build / name
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "stable_baselines3", "--dest", folder]
        if subprocess.run([*download, f"stable_baselines3=={sb3_version}"]).returncode:
            sys.exit(
                f"SB3's own tests did not run: pip (see above) could not download the source distribution of "
                f"stable_baselines3=={sb3_version}, the installed version, which holds them. It needs to only once."
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
    folder = sb3_tests(version("stable_baselines3"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    statuses = [
        subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "stand_in", "--in-place-of", name, "-q", "-rs", *arguments, "tests"],
            cwd=folder,
            env=environment,
        ).returncode
        for name in ("PPO", "A2C")
    ]
    return next(filter(None, statuses), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

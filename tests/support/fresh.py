"""A fresh environment for subprocesses: the wheel of this tree and the packages that it declares, no others."""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _declared(distribution: metadata.Distribution, extras: set[str]) -> list[Requirement]:
    requirements = [Requirement(text) for text in distribution.requires or ()]
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras | {""})]


class Environment:
    """
    A virtual environment with the wheel in it. Nothing is downloaded: what the wheel requires is linked from where the tests
    run, package by package, so that an undeclared one is missing.

    :param folder: Where to make it
    :param wheel: What to install
    :param extras: The wheel's optional dependencies
    :param others: What the user has installed beside it
    :param without: A package to leave out
    """

    def __init__(self, folder: Path, wheel: Path, extras: str = "", others: tuple[str, ...] = (), without: str = "") -> None:
        venv.create(folder)
        # Python 3.10 has no name of its own for what every virtual environment looks like
        scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_preferred_scheme("prefix")
        paths = sysconfig.get_paths(scheme, vars={"base": str(folder), "platbase": str(folder)})
        self.scripts, self.site_packages = Path(paths["scripts"]), Path(paths["purelib"])
        self.pip("install", "--no-deps", "--no-index", str(wheel))

        (distribution,) = metadata.distributions(name="sb3_blpo", path=[str(self.site_packages)])
        pending = _declared(distribution, set(extras.split(","))) + [Requirement(name) for name in others]
        done: set[tuple[str, str]] = set()
        while pending:
            requirement = pending.pop()
            name = canonicalize_name(requirement.name)
            wanted = {(name, extra) for extra in requirement.extras | {""}}
            if name != canonicalize_name(without) and not wanted <= done:
                done |= wanted
                distribution = metadata.distribution(name)
                pending += _declared(distribution, requirement.extras)
                self._link(distribution)

    def _link(self, distribution: metadata.Distribution) -> None:
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = self.site_packages / name
            if not link.exists():  # several distributions share a namespace
                link.symlink_to(Path(str(distribution.locate_file(name))).resolve())

    def pip(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.scripts / "python"), *arguments]
        subprocess.run(pip, check=True, capture_output=True)

    def run(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
        """Run `python ...` as a user who has activated the environment would."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SB3_BLPO_NO_ZOO")}
        inherited |= {"PATH": f"{self.scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        return subprocess.run(
            [self.scripts / "python", *arguments],
            cwd=cwd,
            env=inherited | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

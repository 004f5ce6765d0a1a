"""
Mutation check: do each numerics module's own test files notice small changes of that module? With mutmut.

Arguments choose modules, all of them if there are none. ``mutmut show <name>`` in build/mutation/<module> shows a survivor.
mutmut leaves decorated functions alone.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.9
#: Module or package, without suffix, and the test files that it answers to
OWN_TESTS = {
    "gae": ["gae", "definition"],
    "rollout": ["rollout", "definition"],
    "jacobian": ["jacobian"],
    "rows": ["jacobian"],
    "curvature": ["ihvp", "definition"],
    "ihvp": ["ihvp"],
    "response": ["response", "definition"],
    "engines/torch": ["definition", "rollout"],
    "engines/recurrent": ["recurrent_response"],
}
SETTINGS = """
[tool.mutmut]
source_paths = ["sb3_blpo"]
only_mutate = ["sb3_blpo/{module}.py", "sb3_blpo/{module}/*"]
pytest_add_cli_args_test_selection = {tests}
also_copy = ["benchmarks"]
use_git_change_detection = false
"""


def check(module: str) -> dict[str, int]:
    """
    :param module: A key of ``OWN_TESTS``
    :return: How many mutants there were in all, and how many ended in each way
    """
    copy = ROOT / "build" / "mutation" / module
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("sb3_blpo", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder)
    settings = SETTINGS.format(module=module, tests=[f"tests/definition/test_{name}.py" for name in OWN_TESTS[module]])
    (copy / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    mutmut = Path(sys.executable).with_name("mutmut")
    with (copy / "mutmut.log").open("w") as log:
        subprocess.run([mutmut, "run", "--max-children", "1"], cwd=copy, stdout=log, stderr=log, check=True)
    subprocess.run([mutmut, "export-cicd-stats"], cwd=copy, stdout=subprocess.DEVNULL, check=True)
    subprocess.run([mutmut, "results"], cwd=copy, check=True)
    return json.loads((copy / "mutants" / "mutmut-cicd-stats.json").read_text())


def report(module: str, killed: int, total: int, seconds: float) -> bool:
    """Print a line of the table, and return whether the target was reached."""
    print(f"{module:14} {killed:4} of {total:4} killed, {killed / total:6.1%}, {seconds / 60:4.1f} min")
    return killed >= TARGET * total


def main() -> None:
    """Print the share killed, and fail where it is below the target."""
    rows: dict[str, tuple[int, int, float]] = {}
    for module in sys.argv[1:] or OWN_TESTS:
        start = time.monotonic()
        counts = check(module)
        # A mutant that never ends is noticed as well
        rows[module] = counts["killed"] + counts["timeout"], counts["total"], time.monotonic() - start
    killed, total, seconds = zip(*rows.values(), strict=True)
    rows["all"] = sum(killed), sum(total), sum(seconds)
    if not all([report(module, *row) for module, row in rows.items()]):
        sys.exit(f"Less than {TARGET:.0%} killed")


if __name__ == "__main__":
    main()

"""
Makes `python -m rl_zoo3.train --algo blpo` work: registers BLPO with three modules of RL Zoo, each after it was executed.

RL Zoo offers no plug-in mechanism, so Python calls :func:`install` at start-up (sb3_blpo.pth; sb3_blpo.start from Python 3.15
on, PEP 829). Every interpreter of the environment pays for this module: it imports only what is already loaded by then, and
to look a module up (`importlib.util.find_spec`) imports and changes nothing.
"""

import os
import sys
from _frozen_importlib_external import SourceFileLoader, SourcelessFileLoader

TYPE_CHECKING = False  # importing typing at start-up would take longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTERED = {"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"}


class ZooFinder:
    """Meta path finder that leaves the finding to the others and only watches for RL Zoo's modules."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in REGISTERED or name in self._searching or os.environ.get("SB3_BLPO_NO_ZOO", "0") not in ("", "0"):
            return None
        self._searching.add(name)
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self._searching.discard(name)
        if spec is not None:
            _register_after_execution(spec.loader)
        return spec


def _register_after_execution(loader: "Loader | None") -> None:
    # Only loaders that serve one file; runpy, inspect and pickle look at them, so the object stays and is as before after use
    if not isinstance(loader, (SourceFileLoader, SourcelessFileLoader)):
        return

    def exec_module(module: "ModuleType") -> None:
        vars(loader).pop("exec_module", None)
        loader.exec_module(module)
        _register(module)

    vars(loader)["exec_module"] = exec_module


def _register(module: "ModuleType") -> None:
    try:
        from sb3_blpo.zoo import register

        register(module)
    except Exception as error:  # whatever it is, the Zoo's own algorithms must go on working
        if FINDER not in sys.meta_path:
            return  # said already
        import warnings

        sys.meta_path.remove(FINDER)
        reason = f"its registration failed ({type(error).__name__}: {error})"
        advice = "Reinstall sb3_blpo, or set SB3_BLPO_NO_ZOO=1 to do without."
        warnings.warn(f"RL Zoo will not know BLPO, {reason}. {advice}", RuntimeWarning, stacklevel=2)


FINDER = ZooFinder()


def install() -> None:
    """Watch the imports for RL Zoo's modules from now on."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)

"""The zip that a model is saved in: there as a whole or not at all, and recognised before anything in it is unpickled."""

import contextlib
import copy
import io
import json
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

SelfArchived = TypeVar("SelfArchived", bound="Archived")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """
    Write a file beside its final place and move it there when it is complete, so that whoever looks, after a crash too, finds
    either the old file or the new one. Suffix, missing folders and folders in the way are treated as SB3 does.
    """
    path = Path(path)
    if path.suffix == "":
        path = Path(f"{path}.zip")
    while path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=3)
        path = Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=3)
        path.parent.mkdir(exist_ok=True, parents=True)
    path = path.resolve()  # A link stays a link
    if path.exists() and not path.is_file():  # A device or a pipe
        with open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def foreign(name: str) -> ValueError:
    return ValueError(
        f"{name} not saved by BLPO, for `critic_optimizer` is not there: load a PPO or A2C model with its own class, or start "
        "BLPO from its policy with `set_parameters({'policy': ...}, exact_match=False)`."
    )


def check_saved_by_blpo(path: str | Path | io.BufferedIOBase) -> None:
    """Refuse what :meth:`BLPO.save` has not written, or what did not arrive as a whole. Nothing is unpickled."""
    file: Any = open_path(path, "r", suffix="zip")
    # The caller goes on to read a file object from where it stands
    with contextlib.nullcontext(file) if file is path else file:
        position = file.tell()
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                damaged = archive.testzip()
                attributes = json.loads(archive.read("data")) if "data" in names and damaged is None else {}
        except Exception as error:  # Damage shows in many ways: BadZipFile, EOFError, NotImplementedError, zlib.error, ...
            raise ValueError(f"`{path}` wasn't a zip-file, or is a damaged one: {error}.") from error
        finally:
            file.seek(position)
    if damaged is not None:
        raise ValueError(f"`{path}` is damaged: `{damaged}` in it is not what was saved.")
    for name in ("data", "policy.pth", "policy.optimizer.pth"):
        if name not in names:
            raise ValueError(f"`{path}` is not a saved model, or only part of one: there is no `{name}` in it.")
    if "critic_optimizer.pth" not in names:
        raise foreign(f"`{path}` was")
    if "critic_rollouts" not in attributes:
        raise ValueError(
            f"`{path}` was saved by the unreleased first edition of BLPO, whose optimizers and arguments are others: train "
            "the model anew."
        )


class Archived(BaseAlgorithm):
    """How BLPO and its siblings are saved and loaded: with the optimizers of both levels, and as a whole or not at all."""

    @classmethod
    def load(
        cls: type[SelfArchived],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfArchived:
        """
        As SB3's, but a file that is no zip, damaged, or not from BLPO is refused before anything in it is unpickled. For exact
        continuation see :func:`sb3_blpo.resume.resume`.
        """
        check_saved_by_blpo(path)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As SB3's, but a file is replaced when the new one is complete, so that a crash leaves the one or the other."""
        with atomic_file(path) if isinstance(path, str | Path) else contextlib.nullcontext(path) as file:
            super().save(file, exclude, include)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's, but what is damaged or not BLPO's is refused, and where loading fails, the model is as it was before."""
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            check_saved_by_blpo(params)
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        if exact_match and "policy" in params and "critic_optimizer" not in params:
            raise foreign("These parameters were")
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(params, exact_match, device)
        except Exception:
            super().set_parameters(cast(TensorDict, before))
            raise

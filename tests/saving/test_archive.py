"""A saved model is the old one or the new one, whatever happens; what is not one is refused in one sentence."""

import base64
import io
import json
import multiprocessing
import os
import random
import signal
import stat
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch as th
from envs import SpaceEnv
from models import differences, small, state_of
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_blpo import BLPO


def fill(model: BLPO, number: int) -> None:
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.fill_(number)


def kill_while_saving(path: Path, times: int, atomic: bool) -> tuple[int, int]:
    """
    Kill processes that do nothing but save models, each filled with one number, to the same path.

    :return: How often the file was not a model afterwards, and how many models came to be saved
    """
    th.set_num_threads(1)
    model = small()
    save = model.save if atomic else lambda path: OnPolicyAlgorithm.save(model, path)
    fill(model, 0)
    start = time.perf_counter()
    save(path)
    duration = time.perf_counter() - start
    broken, seen = 0, set()
    for i in range(times):
        pid = os.fork()
        if pid == 0:
            for k in range(1000):
                fill(model, 1000 * i + k)
                save(path)
            os._exit(0)
        time.sleep(random.uniform(0, 3 * duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            parameters = list(BLPO.load(path, device="cpu").policy.parameters())
            (number,) = {number for parameter in parameters for number in parameter.unique().tolist()}
            seen.add(number)
        except Exception:
            broken += 1
    return broken, len(seen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_while_saving(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        broken, saved = pool.submit(kill_while_saving, tmp_path / "model.zip", 30, True).result()
        # Kills came at all times: before, while and after something was saved
        assert broken == 0 and saved > 3 and len(list(tmp_path.glob("model.zip.*.tmp"))) > 3
        # SB3's own way of saving does not survive this
        assert pool.submit(kill_while_saving, tmp_path / "ppo.zip", 20, False).result()[0] > 0


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not this")


def test_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "model")
    content = (tmp_path / "model.zip").read_bytes()
    model.policy.optimizer.param_groups[0]["lr"] = Unpicklable()
    with pytest.raises(RuntimeError, match="not this"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert (tmp_path / "model.zip").read_bytes() == content


def test_paths(tmp_path: Path) -> None:
    model = small()
    model.save(str(tmp_path / "a"))
    model.save(tmp_path / "a.model")
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        model.save(tmp_path / "b" / "c" / "model.zip")
    (tmp_path / "d.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder. Will save instead to"):
        model.save(tmp_path / "d")
    for name in ("a", "a.zip", "a.model", "b/c/model", "d.zip_2"):
        BLPO.load(tmp_path / name, device="cpu")
    model.save(os.devnull)
    assert not Path(os.devnull).is_file()


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "model.zip"
    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    model.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == usual
    path.chmod(0o640)
    (tmp_path / "link.zip").symlink_to(path)
    model.learn(16).save(tmp_path / "link")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and (tmp_path / "link.zip").is_symlink()
    assert not differences(state_of(BLPO.load(path, device="cpu")), state_of(model))


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def foreign_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("holiday.txt", "by the sea")
    return file.getvalue()


def flipped() -> bytes:
    content = bytearray(saved(small()))
    content[content.index(b"critic_optimizer.pth") + 500] ^= 1
    return bytes(content)


class Trap:
    def __reduce__(self) -> Any:
        return pytest.fail, ("was unpickled",)


def first_edition() -> bytes:
    """The attributes of a model, which nobody unpickles, without one that the first edition did not know."""
    file, older = io.BytesIO(saved(small())), io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(older, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "data":
                data = json.loads(content)
                del data["critic_rollouts"]
                data["policy_class"][":serialized:"] = base64.b64encode(cloudpickle.dumps(Trap())).decode()
                content = json.dumps(data).encode()
            copy.writestr(name, content)
    return older.getvalue()


FOREIGN: dict[str, tuple[Any, str]] = {
    "empty": (bytes, "wasn't a zip-file, or is a damaged one"),
    "text": (lambda: b"data,policy.pth\n1,2\n", "wasn't a zip-file, or is a damaged one"),
    "truncated": (lambda: saved(small())[:-5000], "wasn't a zip-file|only part of one"),
    "flipped bit": (flipped, "is damaged: `critic_optimizer.pth` in it is not what was saved"),
    "zip": (foreign_zip, "is not a saved model, or only part of one: there is no `data` in it"),
    "PPO": (lambda: saved(PPO("MlpPolicy", SpaceEnv(), device="cpu")), "was not saved by BLPO, for `critic_optimizer` is not"),
    "first edition": (first_edition, "was saved by the unreleased first edition of BLPO"),
    "SAC": (
        lambda: saved(SAC("MlpPolicy", "Pendulum-v1", device="cpu")),
        "is not a saved model, or only part of one: there is no `policy.optim",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_model(kind: str, tmp_path: Path) -> None:
    make, message = FOREIGN[kind]
    path = tmp_path / "model.zip"
    path.write_bytes(make())
    model = small().learn(16)
    before = state_of(model)
    for load in (
        lambda: BLPO.load(path, device="cpu"),
        lambda: model.set_parameters(str(path)),
        lambda: model.set_parameters(str(path), exact_match=False),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert str(error.value).startswith(f"`{path}` ") and str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not differences(before, state_of(model))
    with pytest.raises(ValueError, match=message):
        BLPO.load(io.BytesIO(path.read_bytes()), device="cpu")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BLPO.load(tmp_path / "model")


def test_damage_anywhere() -> None:
    """Cut short anywhere, or with any byte changed, a file loads as it was or not at all."""
    model = small()
    content, state = saved(model), state_of(model)
    draw, refused = random.Random(0), 0
    for i in range(200):
        damaged = bytearray(content)
        position = draw.randrange(len(content)) if i % 4 else draw.randrange(len(content) - 3000, len(content))
        if i % 5:
            damaged[position] ^= draw.randrange(1, 256)
        else:
            del damaged[position:]
        try:
            loaded = BLPO.load(io.BytesIO(damaged), device="cpu")
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            # In a time stamp, for instance
            assert not differences(state, state_of(loaded))
    assert refused > 100


@pytest.mark.parametrize("exact_match", [True, False])
def test_failed_set_parameters_changes_nothing(exact_match: bool) -> None:
    model = small().learn(16)
    before = state_of(model)
    twin: dict[str, Any] = small(seed=1).learn(16).get_parameters()
    wider: dict[str, Any] = small(seed=1, policy_kwargs={"net_arch": {"pi": [8], "vf": [9]}}).get_parameters()
    # The actor fits, the critic does not; all fits but what comes last
    for params in (wider, {**twin, "critic_optimizer": {"state": {}, "param_groups": []}}, {**twin, "": {}}):
        with pytest.raises((RuntimeError, ValueError)):
            model.set_parameters(params, exact_match=exact_match)
        assert not differences(before, state_of(model))
    model.set_parameters(twin, exact_match=exact_match)
    assert differences(before, state_of(model))

"""
Exact continuation of an interrupted training: checkpoints at the end of a rollout's training, where a model, its environment
and the states of the random generators are all there is.
"""

import inspect
import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch as th
from gymnasium.utils import EzPickle
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnvWrapper
from torch.utils._pytree import tree_map

from sb3_blpo.archive import atomic_file
from sb3_blpo.bilevel import Bilevel, torch_generator_states
from sb3_blpo.blpo import BLPO
from sb3_blpo.checks import POSITIVE, check
from sb3_blpo.rollout import map_parts

#: What a checkpoint has more than a saved model
ENTRY = "resume.pkl"


class ResumableCheckpoint(BaseCallback):
    """
    Save the model, the rollouts that its critic fits, its environment and all generators between two rollouts, in one zip for
    :func:`resume` (and for ``BLPO.load``), replaced as a whole each time, and when ``learn`` ends after a whole rollout. An
    environment that holds the model or its policy (self-play) holds the resumed one afterwards.

    Resume with the same callback: what it does is then the same, too.

    :param save_path: The zip
    :param save_freq: Number of timesteps between checkpoints, > 0; they wait for the end of a rollout, so that
        ``EveryNTimesteps`` and its like, which pass on steps alone, cannot call it
    :param reset_env: For environments that cannot be pickled (``SubprocVecEnv``, Box2D, Atari, a ``Monitor`` with a file):
        seed and reset them at each checkpoint instead, and keep the statistics of ``VecNormalize``. This cuts their episodes
        short, and is exact if the seed determines all that they do
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: If ``save_freq`` is not allowed, or the callback is inside of one that passes on steps alone
    """

    model: Bilevel

    def __init__(self, save_path: str | Path, save_freq: int = 1, reset_env: bool = False, verbose: int = 0) -> None:
        super().__init__(verbose)
        check("save_freq", POSITIVE, save_freq)
        self.save_path = save_path
        self.save_freq = save_freq
        self.reset_env = reset_env

    def _init_callback(self) -> None:
        self.latest = self.model.num_timesteps
        self.sees_rollouts = False

    def _on_step(self) -> bool:
        if not self.sees_rollouts:
            raise ValueError(
                "`ResumableCheckpoint` cannot be inside of a callback that passes on steps alone, such as `EveryNTimesteps`; "
                "give it to `learn` itself, with a `save_freq` of its own."
            )
        return True

    def _on_rollout_start(self) -> None:
        self.sees_rollouts = True
        if self.model.num_timesteps - self.latest >= self.save_freq:
            # Where SB3 has drawn this rollout's noise, it will do so after resuming, too
            self._save(_generator_states() | self.model._before_noise)
            if self.model.use_sde and not self.model._before_noise:  # a subclass that collects rollouts in its own way
                self.model.policy.reset_noise(self.training_env.num_envs)

    def _on_training_end(self) -> None:
        # A callback that ends the training does so within a rollout
        if self.model.num_timesteps > self.latest and self.model.rollout_buffer.full:
            self._save(_generator_states())

    def _save(self, generators: dict[str, Any]) -> None:
        assert isinstance(self.model, Bilevel)
        seed = None
        if self.reset_env:
            generator = th.Generator().set_state(generators["torch"])  # a copy: training goes on with what it would draw
            seed = int(th.randint(2**31, (), generator=generator))
        state: dict[str, Any] = {
            "class": type(self.model).__name__,
            "generators": generators,
            "seed": seed,
            "strides": map_parts(lambda x: x.strides, self.model._last_obs),
            "remembered": {
                name: tree_map(lambda x: x.numpy(force=True), getattr(self.model, name)) for name in self.model.remembered
            },
        }
        normalize = self.model.get_vec_normalize_env()
        if seed is None:
            state["env"] = _pickled(self.training_env, self.model)
        elif normalize is not None:
            state["statistics"] = pickle.dumps((normalize.obs_rms, normalize.ret_rms))
        with atomic_file(self.save_path) as file:
            self.model.save(file)
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(ENTRY, pickle.dumps(state))
        self.latest = self.model.num_timesteps
        if seed is not None:
            _restart(self.model, seed)
        if self.verbose >= 2:
            print(f"Saving resumable checkpoint to {self.save_path}")


def resume(path: str | Path, env: GymEnv | None = None, algorithm_class: type[Bilevel] = BLPO, **kwargs: Any) -> Any:
    """
    Load a checkpoint, its environment and the states of the global generators of Python, NumPy and torch, so that
    ``learn(total - model.num_timesteps, callback, reset_num_timesteps=False)`` continues as if never interrupted. What other
    callbacks keep (``EvalCallback`` its best return) is theirs, and not in the checkpoint.

    :param path: The zip of :class:`ResumableCheckpoint`. Its content is unpickled: it must be trusted
    :param env: The environment, made as it was for training, where the checkpoints were made with ``reset_env``; else None
    :param algorithm_class: Class of the model, if it is not BLPO
    :param kwargs: Further arguments of ``BLPO.load``
    :return: The model
    :raises ValueError: If the file is not such a checkpoint, or of another class, or ``env`` is missing or not needed
    """
    model = algorithm_class.load(path, **kwargs)
    with open_path(path, "r", suffix="zip") as file, zipfile.ZipFile(file) as archive:
        if ENTRY not in archive.namelist():
            raise ValueError(f"`{path}` was not saved by `ResumableCheckpoint`; use `BLPO.load`.")
        state = pickle.loads(archive.read(ENTRY))
    if state.get("class", algorithm_class.__name__) != algorithm_class.__name__:
        raise ValueError(
            f"`{path}` is a checkpoint of {state['class']}, so `algorithm_class` must be that, got {algorithm_class.__name__}."
        )
    if (env is None) != (state["seed"] is None):
        raise ValueError(
            f"`{path}` was saved with `reset_env`={env is None}, so `env` {'must' if env is None else 'cannot'} be given."
        )
    model.set_env(_Unpickler(state["env"], model).load() if env is None else env, force_reset=False)
    for name, value in state.get("remembered", {}).items():
        setattr(model, name, tree_map(lambda x: th.as_tensor(x, device=model.device), value))
    if "strides" in state:
        model._last_obs = map_parts(_laid_out, model._last_obs, state["strides"])
    normalize = model.get_vec_normalize_env()
    if "statistics" in state and normalize is not None:
        normalize.obs_rms, normalize.ret_rms = pickle.loads(state["statistics"])
    _set_generator_states(state["generators"])
    if env is not None:
        _restart(model, state["seed"])
    return model


def _laid_out(array: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    """
    A copy that lies in memory as it did, so that convolutions of images, whose channels SB3 puts first by a view, round as
    they did.
    """
    if min(strides, default=-1) < 0:
        return array
    n_bytes = array.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))
    copy = np.ndarray(array.shape, array.dtype, np.empty(n_bytes, np.uint8), strides=strides)
    copy[...] = array
    return copy


def _restart(model: Bilevel, seed: int) -> None:
    """Start new episodes that the seed determines."""
    assert model.env is not None
    model.env.seed(seed)
    model._last_obs = model.env.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones(model.n_envs, dtype=bool)


def _generator_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state()} | torch_generator_states()  # noqa: NPY002


def _set_generator_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    th.set_rng_state(states["torch"])
    if "cuda" in states and th.cuda.is_available():
        th.cuda.set_rng_state_all(states["cuda"])


class _Pickler(cloudpickle.Pickler):
    """
    Pickles environments as they are: with the wrapped ones, which VecNormalize leaves out, and what EzPickle makes anew. Of
    the model and its policy, which they may hold for self-play, the names alone.
    """

    def __init__(self, file: io.BytesIO, model: Bilevel) -> None:
        super().__init__(file)
        self.names = {id(model): "model", id(model.policy): "policy"}

    def persistent_id(self, obj: Any) -> str | None:
        return self.names.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        made_anew = isinstance(obj, EzPickle) and type(obj).__getstate__ is EzPickle.__getstate__
        if made_anew or isinstance(obj, VecEnvWrapper):
            state = {name: value for name, value in obj.__dict__.items() if name != "class_attributes"}
            return object.__new__, (type(obj),), state, None, None, _set_attributes
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, model: Bilevel) -> None:
        super().__init__(io.BytesIO(pickled))
        self.model = model

    def persistent_load(self, name: str) -> Any:
        return {"model": self.model, "policy": self.model.policy}[name]


def _set_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    obj.__dict__.update(attributes)
    if isinstance(obj, VecEnvWrapper):
        obj.class_attributes = dict(inspect.getmembers(type(obj)))


def _pickled(env: Any, model: Bilevel) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, model).dump(env)
    except Exception as error:
        raise ValueError(
            f"The environment cannot be pickled ({error}); use `ResumableCheckpoint(..., reset_env=True)`, which seeds and "
            "resets it at each checkpoint."
        ) from error
    return file.getvalue()

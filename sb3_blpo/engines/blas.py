"""How many threads SciPy's BLAS has, which numba's matrix products run in."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import scipy.linalg.cython_blas  # noqa: F401  the library must be there to be found
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_blas: Any = None
_limiter: Any = None
_n_users = 0


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """
    More threads would only wait for each other over small matrices. The last of several users puts their number back.
    """
    global _blas, _limiter, _n_users
    with _lock:
        if _blas is None:
            every = ThreadpoolController().select(user_api="blas")
            paths = [library["filepath"] for library in every.info() if "scipy" in library["filepath"]]
            _blas = every.select(filepath=paths) if paths else every
        if _n_users == 0:
            _limiter = _blas.limit(limits=1)
        _n_users += 1
    try:
        yield
    finally:
        with _lock:
            _n_users -= 1
            if _n_users == 0:
                _limiter.restore_original_limits()

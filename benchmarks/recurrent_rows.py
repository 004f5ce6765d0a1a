"""
What it costs RecurrentBLPO to form the gradients of some values only: the error of its response beside that with all of them.

``python benchmarks/recurrent_rows.py`` trains on CartPole without velocities (entry of hyperparams/blpo_lstm.yml, rollouts of
1,024 transitions) and writes ``benchmarks/results/recurrent_rows.csv``: errors of e relative to the exact solution from all
gradients at the same damping, in mid-training. It takes about three minutes.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import rl_zoo3.import_envs  # noqa: F401, registers environments without velocities
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_blpo import RecurrentBLPO
from sb3_blpo.engines import TorchEngine
from sb3_blpo.engines.recurrent import RecurrentEngine, RecurrentJacobian, RecurrentValues
from sb3_blpo.ihvp import make_solver
from sb3_blpo.response import Response, best_response, surrogate_derivative
from sb3_blpo.rollout import Rollout

OUTPUT = Path(__file__).parent / "results" / "recurrent_rows.csv"
#: Timesteps at which solvers and numbers of gradients are compared, with so many draws of the sampled states
AT, N_DRAWS = (10_240, 20_480, 30_720, 40_960), 3
SOLVERS, ROWS = ("exact", "nystrom"), (32, 64, 128, 256, 1024)


class Sampled(RecurrentJacobian):
    """
    :param n_rows: How many gradients are formed
    """

    def __init__(self, n_rows: int, *arguments: Any) -> None:
        self.n_rows = n_rows
        super().__init__(*arguments)

    def _sample(self, generator: th.Generator) -> th.Tensor:
        return th.randperm(self.n_states, generator=generator)[: self.n_rows]


class Compared(RecurrentBLPO):
    """Collects the errors."""

    table: list[tuple[Any, ...]]

    def _best_response(
        self, rollout: Rollout, engine: TorchEngine, values: th.Tensor, advantages: th.Tensor
    ) -> Response | None:
        if self.num_timesteps in AT:
            self.table += self.compare(rollout, engine, values, advantages)
        return super()._best_response(rollout, engine, values, advantages)

    def compare(self, rollout: Any, engine: Any, values: th.Tensor, advantages: th.Tensor) -> Iterator[tuple[Any, ...]]:
        weights = surrogate_derivative((engine.log_prob(rollout) - rollout.old_log_prob).exp(), advantages, engine.clip_range)
        n = len(rollout.order)

        def solve(solver: str, n_rows: int, seed: int) -> tuple[th.Tensor, float]:
            generator, start = th.Generator().manual_seed(seed), time.perf_counter()
            critic = RecurrentValues(self.policy, rollout)  # type: ignore[arg-type]
            jacobian = Sampled(n_rows, generator, critic, lambda i: i, n, len(rollout), self._critic_parameters, n)
            made = make_solver(solver, rank=20, sketch="values", max_iter=50, tol=1e-5)
            assert made is not None
            response = best_response(rollout, jacobian, weights, values, made, 0.01, "gauss_newton", generator)
            assert response is not None
            return response.e, time.perf_counter() - start

        true, _ = solve("exact", len(rollout), 0)
        for solver in SOLVERS:
            for n_rows in ROWS:
                for seed in range(N_DRAWS):
                    e, seconds = solve(solver, n_rows, seed)
                    error, cosine = (e - true).norm() / true.norm(), e @ true / (e.norm() * true.norm())
                    yield self.num_timesteps, solver, n_rows, seed, float(error), float(cosine), seconds


def main() -> None:
    th.set_num_threads(1)
    assert issubclass(Compared.torch_engine, RecurrentEngine)
    model = Compared(
        "MlpLstmPolicy", VecNormalize(make_vec_env("CartPoleNoVel-v1", 8, seed=0)), n_steps=128, batch_size=256, seed=1,
        gae_lambda=0.98, learning_rate=7e-4, max_grad_norm=1, device="cpu",
        policy_kwargs={"ortho_init": False, "lstm_hidden_size": 64, "net_arch": {"pi": [], "vf": [64]}},
    )  # fmt: skip
    model.table = []
    model.learn(max(AT))
    table = pd.DataFrame(model.table, columns=["timesteps", "solver", "rows", "draw", "error", "cosine", "seconds"])
    table.to_csv(OUTPUT, index=False, float_format="%.4g", lineterminator="\n")
    print(table.groupby(["solver", "rows"])[["error", "cosine", "seconds"]].median().to_string())


if __name__ == "__main__":
    main()

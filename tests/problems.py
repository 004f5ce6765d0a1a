"""Small random problems in float64: a segment, a critic and an actor away from the rollout's policy."""

from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_blpo.gae import LambdaReturn
from sb3_blpo.segments import Segment


def random_segment(T: int, B: int, n_features: int, inside_rollout: bool, generator: th.Generator) -> Segment:
    """A block of T steps of B environments with about a fifth of the steps terminated or truncated."""

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=th.float64)

    ends = th.rand(T, B, generator=generator)
    done, truncated = ends < 0.2, ends < 0.1
    n_truncated = int(truncated.sum())
    N = T * B
    of_transitions: dict[str, Any] = dict(
        observations=normal(N + B + n_truncated, n_features),
        actions=normal(N, 2),
        old_log_prob=normal(N),
        returns=normal(N),
        truncated=truncated.flatten().nonzero().flatten(),
    )
    of_block: dict[str, Any] = dict(
        rewards=normal(T, B),
        done=done.double(),
        last_returns=normal(B) if inside_rollout else None,
        gamma=0.97,
        gae_lambda=0.9,
    )
    return Segment(**of_transitions, lambda_return=LambdaReturn(**of_block))


class GaussianActor(nn.Module):
    """Observations and actions -> log pi(a|s), of a diagonal Gaussian with a state-dependent mean."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(n_features, 4), nn.Tanh(), nn.Linear(4, 2))
        self.log_std = nn.Parameter(th.tensor([-0.3, 0.2]))
        self.double()

    def forward(self, observations_and_actions: th.Tensor) -> th.Tensor:
        observations, actions = observations_and_actions.tensor_split([-2], dim=1)
        return th.distributions.Normal(self.mean(observations), self.log_std.exp()).log_prob(actions).sum(1)


class Problem(NamedTuple):
    segment: Segment
    critic: nn.Sequential
    actor: GaussianActor
    actor_input: th.Tensor


def problem(
    seed: int, T: int = 9, B: int = 2, inside_rollout: bool = True, hidden: int | None = 5, spread: float = 0.3
) -> Problem:
    """
    :param hidden: Width of the critic's hidden layer, ``None``: a linear critic
    :param spread: How far the current policy is from the rollout's, in log-probability
    """
    th.manual_seed(seed)
    generator = th.Generator().manual_seed(seed)
    segment = random_segment(T, B, 3, inside_rollout, generator)
    layers = [nn.Linear(3, 1)] if hidden is None else [nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)]
    actor = GaussianActor(3)
    assert isinstance(segment.states, th.Tensor)
    actor_input = th.cat([segment.states, segment.actions], dim=1)
    noise = spread * th.randn(T * B, generator=generator, dtype=th.float64)
    return Problem(
        segment._replace(old_log_prob=actor(actor_input).detach() + noise),
        nn.Sequential(*layers).double(),
        actor,
        actor_input,
    )

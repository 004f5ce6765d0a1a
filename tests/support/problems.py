"""Small random problems in float64: a rollout, a critic that has moved since, and an actor away from the rollout's policy."""

from typing import Any, NamedTuple

import torch as th
from brute_force import Bilevel, as_flat_function
from torch import nn

from sb3_blpo.jacobian import Jacobian, make_jacobian
from sb3_blpo.rollout import Rollout, take

CLIP_RANGE = 0.2


def random_rollout(T: int, E: int, generator: th.Generator) -> Rollout:
    """T steps of E environments, about a fifth of the steps terminated or truncated."""

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, dtype=th.float64)

    ends, N = th.rand(T, E, generator=generator), T * E
    truncated = (ends < 0.1).flatten().nonzero().flatten()
    return Rollout(
        observations=normal(N + E + len(truncated), 3),
        actions=normal(N, 2),
        old_log_prob=normal(N),
        advantages=normal(N),
        returns=normal(N),
        done=(ends < 0.2).double(),
        truncated=truncated,
        gamma=0.97,
        gae_lambda=0.9,
    )


class GaussianActor(nn.Module):
    """Observations and actions -> log pi(a|s), of a diagonal Gaussian with a state-dependent mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.log_std = nn.Parameter(th.tensor([-0.3, 0.2]))

    def forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return th.distributions.Normal(self.mean(observations), self.log_std.exp()).log_prob(actions).sum(1)


class ValuePolicy(nn.Module):
    """What :func:`make_jacobian` wants of a policy."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def predict_values(self, observations: Any) -> th.Tensor:
        return self.critic(observations)


def jacobian_of(
    critic: nn.Module, observations: Any, n: int, n_states: int, batch_size: int = 4, seed: int = 0, dtype: Any = th.float64
) -> Jacobian:
    """The package's Jacobian of a critic's values of n observations."""
    policy, generator = ValuePolicy(critic.to(dtype).eval()), th.Generator().manual_seed(seed)
    parameters = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    return make_jacobian(policy, generator, lambda i: take(observations, i), n, n_states, parameters, batch_size)


class Problem(NamedTuple):
    rollout: Rollout
    values_of_rollout: th.Tensor
    critic: nn.Sequential
    actor: GaussianActor

    @property
    def values(self) -> th.Tensor:
        """Of all observations, under the critic as it is now."""
        return self.critic(self.rollout.observations).flatten().detach()

    @property
    def ratio(self) -> th.Tensor:
        """Differentiable."""
        assert isinstance(self.rollout.states, th.Tensor)
        return (self.actor(self.rollout.states, self.rollout.actions) - self.rollout.old_log_prob).exp()

    @property
    def jacobian(self) -> Jacobian:
        return jacobian_of(self.critic, self.rollout.observations, len(self.values), len(self.rollout))

    @property
    def definition(self) -> Bilevel:
        rollout = self.rollout
        return Bilevel(
            rollout,
            self.values_of_rollout,
            *as_flat_function(self.critic, self.critic.parameters(), rollout.observations),
            *as_flat_function(self.actor, self.actor.parameters(), rollout.states, rollout.actions),
            CLIP_RANGE,
        )


def problem(seed: int, T: int = 9, E: int = 2, hidden: int | None = 5, norm: bool = False, spread: float = 0.3) -> Problem:
    """
    :param seed: Of everything
    :param T: Steps
    :param E: Environments
    :param hidden: Width of the critic's hidden layer, ``None``: a linear critic
    :param norm: Whether it has a LayerNorm, so that it is not made of layers that the package knows
    :param spread: How far the current policy is from the rollout's, in log-probability
    """
    th.manual_seed(seed)
    generator = th.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(3, 1)]
    if hidden is not None:
        layers = [nn.Linear(3, hidden), *([nn.LayerNorm(hidden)] if norm else []), nn.Tanh(), nn.Linear(hidden, 1)]
    rollout, actor = random_rollout(T, E, generator), GaussianActor().double()
    with th.no_grad():
        now = actor(rollout.states, rollout.actions)
    rollout.old_log_prob = now + spread * th.randn(T * E, generator=generator, dtype=th.float64)
    values_of_rollout = th.randn(len(rollout.observations), generator=generator, dtype=th.float64)
    return Problem(rollout, values_of_rollout, nn.Sequential(*layers).double(), actor)

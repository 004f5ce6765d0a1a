"""Gradient steps of policies with memory: minibatches are pieces of sequences, as in sb3-contrib's RecurrentPPO."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_blpo.checks import finite
from sb3_blpo.engines.torch import TorchEngine, finite_distribution
from sb3_blpo.jacobian import Jacobian, SampledJacobian
from sb3_blpo.rollout import Rollout, minibatches, take

#: How many states have their value's gradient formed: at most so many,
MAX_ROWS = 128
#: at most one in so many,
STATES_PER_ROW = 4
#: and not more than go back through so many times as many steps together as the rollout has
MAX_PASSES = 8


@dataclass
class RecurrentRollout(Rollout):
    """
    A rollout of a policy with memory. To its observations belong what the LSTMs remembered before each, "hidden" and "cell"
    (n_observations, n_lstm_layers, lstm_hidden_size), zeros at the start of an episode, and whether that is where a sequence
    begins, "cut": each environment's first step of a rollout, and each episode's. ``actor_inputs`` has the actor's memory.
    """

    #: Indices of the observations sequence by sequence. A terminal observation ends its own, the one after the last step its
    #: environment's last, if that episode goes on
    order: th.Tensor = field(kw_only=True)

    @property
    def steps(self) -> th.Tensor:
        """The N steps in this order."""
        return self.order[self.order < len(self)]

    @property
    def targets(self) -> tuple[PyTorchObs, th.Tensor]:
        return take(self.observations, self.steps), self.returns[self.steps]


class Sequences:
    """
    Sequences of observations, padded to the same length.

    :param index: Indices of observations, sequence by sequence
    :param cut: Whether each begins a sequence; the first one does in any case (n,)
    """

    def __init__(self, index: th.Tensor, cut: th.Tensor) -> None:
        starts = [0, *(i for i in th.nonzero(cut).flatten().tolist() if i > 0)]
        lengths = [end - start for start, end in itertools.pairwise([*starts, len(index)])]
        rows = nn.utils.rnn.pad_sequence(list(index.split(lengths)), batch_first=True, padding_value=-1)
        self.is_real = rows >= 0
        self.rows = rows.clamp_min(0)  # (n_sequences, length)
        self.first = self.rows[:, 0]

    def memory(self, hidden: th.Tensor, cell: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """What the LSTM remembers at their beginning, each (n_lstm_layers, n_sequences, lstm_hidden_size)."""
        return hidden[self.first].transpose(0, 1).contiguous(), cell[self.first].transpose(0, 1).contiguous()

    def no_starts(self) -> th.Tensor:
        """What contrib's policies take for ``episode_starts``: sequences do not reach beyond an episode."""
        return th.zeros(self.rows.numel(), device=self.rows.device)

    def real(self, padded: th.Tensor) -> th.Tensor:
        """Without the padding, in the order of ``index`` (n, ...)."""
        return padded.view(*self.rows.shape, *padded.shape[1:])[self.is_real]


def values_of(policy: RecurrentActorCriticPolicy, states: Any, sequences: Sequences) -> th.Tensor:
    """
    :param states: As in :class:`RecurrentRollout`
    :return: The values along these sequences (n,)
    """
    observations: Any = take(states["observation"], sequences.rows.flatten())
    memory = sequences.memory(states["hidden"], states["cell"])
    return sequences.real(policy.predict_values(observations, memory, sequences.no_starts())).flatten()


class RecurrentEngine(TorchEngine):
    """Both levels of a recurrent policy of sb3-contrib."""

    policy: Any

    def values(self, rollout: Rollout) -> th.Tensor:
        """Of all its observations, the critic run along the whole rollout from its first memory."""
        assert isinstance(rollout, RecurrentRollout)
        self.policy.set_training_mode(False)
        with th.no_grad():
            values = self._values_at(rollout.observations, rollout.order)
        return finite("critic's value", th.zeros_like(values).index_put((rollout.order,), values))

    def log_prob(self, rollout: Rollout) -> th.Tensor:
        assert isinstance(rollout, RecurrentRollout)
        self.policy.set_training_mode(False)
        with th.no_grad():
            log_prob = self._evaluate(rollout, rollout.steps)[0]
        return finite("actor's output", th.zeros_like(log_prob).index_put((rollout.steps,), log_prob))

    def jacobian(self, rollout: Rollout, parameters: list[nn.Parameter], generator: th.Generator) -> Jacobian:
        assert isinstance(rollout, RecurrentRollout)
        n = len(rollout.order)
        critic = RecurrentValues(self.policy, rollout)
        return RecurrentJacobian(generator, critic, lambda index: index, n, len(rollout), parameters, n)

    def _critic_minibatches(self, n: int, n_minibatches: int) -> Iterator[th.Tensor]:
        return minibatches(n, self.batch_size, n_minibatches, in_time_order)

    def _actor_minibatches(self, rollout: Rollout) -> Iterator[th.Tensor]:
        assert isinstance(rollout, RecurrentRollout)
        steps = rollout.steps
        return (steps[index] for index in minibatches(len(steps), self.batch_size, draw=in_time_order))

    def _values_at(self, observations: Any, index: th.Tensor) -> th.Tensor:
        return values_of(self.policy, observations, Sequences(index, observations["cut"][index]))

    def _evaluate(self, rollout: Rollout, index: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        states: Any = rollout.observations
        sequences = Sequences(index, states["cut"][index])
        observations = take(states["observation"], sequences.rows.flatten())
        memory = sequences.memory(**rollout.actor_inputs)
        with finite_distribution():
            distribution, _ = self.policy.get_distribution(observations, memory, sequences.no_starts())
            log_prob = distribution.log_prob(rollout.actions[sequences.rows.flatten()])
            entropy = distribution.entropy()
        return sequences.real(log_prob), None if entropy is None else sequences.real(entropy)


def in_time_order(n: int) -> th.Tensor:
    """The numbers from 0 to n - 1, from a random one on: sb3-contrib's way to shuffle a bit (n,)."""
    return th.arange(n, device="cpu").roll(int(th.randint(n, (), device="cpu")))


class RecurrentValues(nn.Module):
    """
    The critic as a function of indices of a rollout's observations. A value depends on all observations of its sequence up to
    its own.

    :param policy: The policy
    :param rollout: The rollout
    """

    states: Any

    def __init__(self, policy: RecurrentActorCriticPolicy, rollout: RecurrentRollout) -> None:
        super().__init__()
        self.policy = policy
        self.states = rollout.observations
        self.order = rollout.order
        #: The places in this order at which each observation stands, and at which its sequence begins
        self.place = self.order.argsort()
        begins = th.arange(len(self.order), device=self.order.device) * self.states["cut"][self.order]
        self.begin = begins.cummax(dim=0).values[self.place]

    def forward(self, index: th.Tensor) -> th.Tensor:
        """The values (k,) of one observation or of all, in their order."""
        begin, end = (int(self.begin[index]), int(self.place[index])) if len(index) == 1 else (0, len(self.order) - 1)
        piece = self.order[begin : end + 1]
        values = values_of(self.policy, self.states, Sequences(piece, self.states["cut"][piece]))
        return values[-1:] if len(index) == 1 else values[self.place[index]]


class RecurrentJacobian(SampledJacobian):
    """
    Gradients through time: of the sampled states one by one, of all observations by one pass through the rollout. How many
    are sampled keeps the time of the former in proportion to that of the gradient steps.
    """

    def __init__(self, generator: th.Generator, critic: RecurrentValues, *arguments: Any) -> None:
        self.n_steps_back = critic.place - critic.begin + 1
        super().__init__(generator, critic, *arguments)

    def _sample(self, generator: th.Generator) -> th.Tensor:
        states = super()._sample(generator)
        states = states[: min(MAX_ROWS, -(-self.n_states // STATES_PER_ROW))]
        n = int((self.n_steps_back[states].cumsum(dim=0) <= MAX_PASSES * self.n_states).sum())
        return states[: max(1, n)]

    def _can_vectorise(self) -> bool:
        return False  # a value depends on other observations than its own

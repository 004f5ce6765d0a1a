"""
The action distributions of SB3's policies, differentiated by hand.

Each gives what SB3's distribution gives for the same outputs of the actor: samples of the same generator and their
log-probabilities to the last bit, and entropies. It adds what small networks are slow to get by automatic differentiation, the
derivatives of each row's log-probability and entropy by the distribution's arguments: the actor's outputs and, of a Gaussian,
log_std.
"""

import math
from abc import ABC, abstractmethod

import torch as th
from torch.nn import functional as F


class WrittenOut(ABC):
    """An action distribution for each row of the actor's outputs."""

    @abstractmethod
    def sample(self) -> th.Tensor:
        """
        :return: Actions drawn from torch's global generator (n,) or (n, n_actions)
        """

    @abstractmethod
    def mode(self) -> th.Tensor:
        """
        :return: The most likely actions (n,) or (n, n_actions)
        """

    def get_actions(self, deterministic: bool = False) -> th.Tensor:
        """
        :param deterministic: Whether to take the most likely actions
        :return: Actions (n,) or (n, n_actions)
        """
        return self.mode() if deterministic else self.sample()

    @abstractmethod
    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: (n,) or (n, n_actions)
        :return: Their log-probabilities (n,)
        """

    @abstractmethod
    def entropy(self) -> th.Tensor:
        """
        :return: Entropies (n,)
        """

    @abstractmethod
    def log_prob_slopes(self, actions: th.Tensor) -> list[th.Tensor]:
        """
        :param actions: (n,) or (n, n_actions)
        :return: Derivatives of each row's log-probability by each argument (n, n_out)
        """

    @abstractmethod
    def entropy_slopes(self) -> list[th.Tensor]:
        """
        :return: Derivatives of each row's entropy by each argument (n, n_out)
        """


class DiagGaussian(WrittenOut):
    """
    Independent normal distributions. Arguments: mean and, the same in all rows, log_std.

    :param mean: (n, n_actions)
    :param log_std: (n_actions,)
    """

    def __init__(self, mean: th.Tensor, log_std: th.Tensor) -> None:
        self.mean = mean
        self.std = log_std.exp()
        self.log_std = self.std.log()  # as torch computes it

    def sample(self) -> th.Tensor:
        return self.mean + th.randn_like(self.mean) * self.std

    def mode(self) -> th.Tensor:
        return self.mean

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        variance = self.std**2
        each = -((actions - self.mean) ** 2) / (2 * variance) - self.log_std - math.log(math.sqrt(2 * math.pi))
        return each.sum(dim=1)

    def entropy(self) -> th.Tensor:
        return (0.5 + 0.5 * math.log(2 * math.pi) + self.log_std).sum().expand(len(self.mean))

    def log_prob_slopes(self, actions: th.Tensor) -> list[th.Tensor]:
        z = (actions - self.mean) / self.std
        return [z / self.std, z.square() - 1]

    def entropy_slopes(self) -> list[th.Tensor]:
        return [th.zeros_like(self.mean), th.ones_like(self.mean)]


class Categorical(WrittenOut):
    """
    One of several actions.

    :param logits: (n, n_actions)
    """

    def __init__(self, logits: th.Tensor) -> None:
        self.log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
        self.probs = self.log_probs.softmax(dim=-1)

    def sample(self) -> th.Tensor:
        return th.multinomial(self.probs, 1, replacement=True)[:, 0]

    def mode(self) -> th.Tensor:
        return self.probs.argmax(dim=1)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return self.log_probs.gather(1, actions.long()[:, None])[:, 0]

    def _finite_log_probs(self) -> th.Tensor:
        # Where an action is impossible, 0 times the lowest number and not minus infinity
        return self.log_probs.clamp_min(th.finfo(self.probs.dtype).min)

    def entropy(self) -> th.Tensor:
        return -(self._finite_log_probs() * self.probs).sum(dim=1)

    def log_prob_slopes(self, actions: th.Tensor) -> list[th.Tensor]:
        chosen = actions.long()[:, None]
        return [(-self.probs).scatter_add_(1, chosen, th.ones_like(chosen, dtype=self.probs.dtype))]

    def entropy_slopes(self) -> list[th.Tensor]:
        return [-self.probs * (self._finite_log_probs() + self.entropy()[:, None])]


class MultiCategorical(WrittenOut):
    """
    Several choices, each independent of the others.

    :param logits: Of all choices, one after another (n, n_logits)
    :param n_actions: Number of actions of each choice
    """

    def __init__(self, logits: th.Tensor, n_actions: list[int]) -> None:
        self.choices = [Categorical(part) for part in logits.split(n_actions, dim=1)]

    def sample(self) -> th.Tensor:
        return th.stack([choice.sample() for choice in self.choices], dim=1)

    def mode(self) -> th.Tensor:
        return th.stack([choice.mode() for choice in self.choices], dim=1)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        each = [choice.log_prob(action) for choice, action in zip(self.choices, actions.unbind(dim=1), strict=True)]
        return th.stack(each, dim=1).sum(dim=1)

    def entropy(self) -> th.Tensor:
        return th.stack([choice.entropy() for choice in self.choices], dim=1).sum(dim=1)

    def log_prob_slopes(self, actions: th.Tensor) -> list[th.Tensor]:
        each = [choice.log_prob_slopes(action) for choice, action in zip(self.choices, actions.unbind(dim=1), strict=True)]
        return [th.cat([slope for (slope,) in each], dim=1)]

    def entropy_slopes(self) -> list[th.Tensor]:
        return [th.cat([slope for choice in self.choices for slope in choice.entropy_slopes()], dim=1)]


class Bernoulli(WrittenOut):
    """
    Independent bits.

    :param logits: (n, n_actions)
    """

    def __init__(self, logits: th.Tensor) -> None:
        self.logits = logits
        self.probs = logits.sigmoid()

    def sample(self) -> th.Tensor:
        return self.probs.bernoulli()

    def mode(self) -> th.Tensor:
        return self.probs.round()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return -F.binary_cross_entropy_with_logits(self.logits, actions, reduction="none").sum(dim=1)

    def entropy(self) -> th.Tensor:
        return F.binary_cross_entropy_with_logits(self.logits, self.probs, reduction="none").sum(dim=1)

    def log_prob_slopes(self, actions: th.Tensor) -> list[th.Tensor]:
        return [actions - self.probs]

    def entropy_slopes(self) -> list[th.Tensor]:
        return [-self.logits * self.probs * (1 - self.probs)]

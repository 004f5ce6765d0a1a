"""Acting by compiled calls while a rollout is collected, inside SB3's own loop."""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_blpo.engines import kernels, numba
from sb3_blpo.engines.blas import one_blas_thread
from sb3_blpo.engines.kernels import Network
from sb3_blpo.policies import MlpPolicy


class CompiledActing:
    """
    What an MLP policy's ``forward`` does, in one compiled call: the same actions for the same state of torch's generator, but
    for rounding. Parameters are read anew in each call, and calls share no memory. What else changes after the first call of a
    rollout, a hook for instance, is noticed in the next.

    :param policy: The policy
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self.serves: bool | None = None

    def __call__(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        if self.serves is None:
            self.serves = self._serves()
        if not self.serves:
            return ActorCriticPolicy.forward(self.policy, observations)  # type: ignore[arg-type]
        x = numba.features(self.policy, observations)
        n = len(x)
        noise, actions = self._noise(n), np.empty((n, self.n_actions), np.float32)
        values, log_prob = np.empty((2, n), np.float32)
        nets = [net.read(n) for net in self.nets]
        if not kernels.act(*nets, self.kind, self.choices, x, noise, actions, values, log_prob):
            return ActorCriticPolicy.forward(self.policy, observations)  # type: ignore[arg-type]  # which refuses the outputs
        chosen = th.from_numpy(actions if self.kind == kernels.GAUSSIAN else actions.astype(np.int64))
        shape = self.policy.action_space.shape or ()
        return chosen.view(n, *shape), th.from_numpy(values).view(n, 1), th.from_numpy(log_prob)

    def _serves(self) -> bool:
        policy = self.policy
        reasons = [numba.policy_is_other(policy, numba.METHODS)]
        reasons += [numba.network_is_other(policy, which) for which in ("actor", "critic")]
        if any(True for _ in itertools.chain(*reasons, numba.parameters_are_other(policy))):
            return False
        self.kind, self.choices = numba.distribution_of(policy)
        self.n_actions = self.choices[0] if self.kind == kernels.GAUSSIAN else len(self.choices)
        self.nets = [ActingNetwork(policy, which) for which in ("actor", "critic")]
        return True

    def _noise(self, n: int) -> np.ndarray:
        """As torch's distributions draw it, one categorical action after the other (n, n_out)."""
        if self.kind == kernels.GAUSSIAN:
            return th.empty(n, self.n_actions, device="cpu").normal_().numpy()
        parts = [th.empty(n, k, device="cpu").exponential_().numpy() for k in self.choices.tolist()]
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


class ActingNetwork:
    """
    The actor or the critic, for forward passes alone.

    :param policy: The policy
    :param which: "actor" or "critic"
    """

    def __init__(self, policy: ActorCriticPolicy, which: str) -> None:
        self.parameters = numba.parameters_of(policy, which)
        self.addresses: list[int] = []
        self.views: list[np.ndarray] = []
        layers = numba.table_of(numba.modules_of(policy, which))
        self.n_outputs = layers[:, kernels.N_OUT].sum()
        none, nothing = np.empty(0, np.float32), np.empty((0, 0))
        spans, rows = np.empty((0, 2), np.int64), nothing.astype(np.float32)
        self.net = Network(none, none, none, none, layers, spans, nothing, np.empty(0), rows, none, rows)

    def read(self, n: int) -> Network:
        """
        :param n: Number of observations
        :return: The network as it is now
        """
        addresses = [parameter.data_ptr() for parameter in self.parameters]
        if addresses != self.addresses:
            self.views = [parameter.detach().view(-1).numpy() for parameter in self.parameters]
            self.addresses = addresses
        outputs = np.empty(n * self.n_outputs, np.float32)
        return self.net._replace(parameters=np.concatenate(self.views), outputs=outputs)


@contextlib.contextmanager
def acting(policy: MlpPolicy) -> Iterator[None]:
    """
    :param policy: A policy, which acts by compiled calls in this context, if it can
    """
    with one_blas_thread():
        policy.acting = CompiledActing(policy)
        # What SB3 leaves there at each step: an old one would mislead callbacks
        policy.action_dist.distribution = None  # type: ignore[assignment]
        try:
            yield
        finally:
            policy.acting = None

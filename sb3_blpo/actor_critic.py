"""
An SB3 actor-critic policy as leader and follower: two sets of parameters that have nothing in common.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_blpo.chain import Chain
from sb3_blpo.checks import not_finite
from sb3_blpo.distributions import Bernoulli, Categorical, DiagGaussian, MultiCategorical, WrittenOut
from sb3_blpo.jacobian import AutogradJacobian, FormedJacobian, FunctionalJacobian, Jacobian, flat_gradient
from sb3_blpo.layers import ChainJacobian, LayerJacobian
from sb3_blpo.optimizers import are_same
from sb3_blpo.policies import (
    acts_as_trained,
    chain_of,
    flat_features,
    found_layers,
    has_own_methods,
    is_hooked,
    is_mlp,
    is_sb3,
    log_prob_and_entropy,
    plain_layers,
)

#: SB3's distributions of the actor's outputs, and at most of log_std, and how each is made written out
WRITTEN_OUT: dict[type[Any], Callable[[Any, th.Tensor], WrittenOut]] = {
    DiagGaussianDistribution: lambda policy, outputs: DiagGaussian(outputs, policy.log_std.detach()),
    CategoricalDistribution: lambda policy, outputs: Categorical(outputs),
    MultiCategoricalDistribution: lambda policy, outputs: MultiCategorical(outputs, policy.action_dist.action_dims),
    BernoulliDistribution: lambda policy, outputs: Bernoulli(outputs),
}


class Critic(nn.Module):
    """
    The policy's value function as a module of its own.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    :param curvature: "gauss_newton" or "hessian", what its Jacobians are for
    """

    def __init__(self, policy: ActorCriticPolicy, parameters: Sequence[th.Tensor], curvature: str = "gauss_newton") -> None:
        super().__init__()
        self.policy = policy
        names = {id(parameter): f"policy.{name}" for name, parameter in policy.named_parameters()}
        self.trainable: dict[str, th.Tensor] = {names[id(parameter)]: parameter for parameter in parameters}
        self.layers = plain_layers(policy, parameters)
        self.chain: Chain | None = None
        if self.layers is not None:
            self.chain = chain_of(policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net)
        #: What its Jacobian may be, where not all of it is known: the first one that serves is kept
        self.jacobians: list[Callable[..., Jacobian]] = [FunctionalJacobian, AutogradJacobian, FormedJacobian]
        self.found_layers = found_layers(policy, parameters)
        if self.found_layers is not None and curvature == "gauss_newton":  # whose first derivatives are all that is checked
            self.jacobians.insert(0, LayerJacobian)
        #: Whether this was seen, once for every ``train()``, by layers for every minibatch
        self.jacobian_is_right = False
        #: Of actor and critic, what normalisation layers keep; a mask of -inf is none of it
        self.statistics = [x for x in policy.buffers() if x.is_floating_point() and x.numel() and x.float().isfinite().all()]

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: (n, ...)
        :return: Their values (n,)
        """
        return self.policy.predict_values(observations).flatten()

    @th.no_grad()
    def values(self, observations: PyTorchObs) -> th.Tensor:
        """
        :param observations: (n, ...)
        :return: Their values, without a graph (n,)
        """
        if self.chain is not None:
            return self.chain.tape(self._features(observations)).outputs[:, 0]
        return self(observations)

    def loss_and_gradient(self, observations: PyTorchObs, returns: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The follower's loss (1/N) sum_t (V_t - R_t)^2.

        :param observations: (N, ...)
        :param returns: R_t (N,)
        :return: The loss () and its gradient (n_params,)
        """
        if self.chain is not None:
            tape = self.chain.tape(self._features(observations))
            target = returns[:, None]
            by_outputs = (tape.outputs - target).mul_(2 / len(returns))
            return F.mse_loss(tape.outputs, target), th.cat(tape.gradient(tape.signals(by_outputs)))
        loss = F.mse_loss(self(observations), returns)
        return loss.detach(), flat_gradient([loss], list(self.trainable.values()))

    @contextlib.contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """
        Switch dropout and batch statistics on or off for a while; a critic of plain layers has none.

        :param training: Whether they are on
        :return: A context manager
        """
        before = self.policy.training
        if self.layers is not None or before == training:
            yield
            return
        self.policy.set_training_mode(training)
        try:
            yield
        finally:
            self.policy.set_training_mode(before)

    def jacobian(
        self, observations: PyTorchObs, generator: th.Generator, kept: dict[str, th.Tensor] | None = None
    ) -> Jacobian:
        """
        :param observations: (n, ...)
        :param generator: Source of what the Jacobian draws
        :param kept: What Jacobians at the same observations leave to one another, empty at first; ``None``: nothing
        :return: The values' Jacobian by the critic's parameters
        :raises ValueError: If it has to be formed and is too large
        """
        if self.chain is not None:
            return ChainJacobian(self.chain, self._features(observations), kept)
        if self.layers is not None:
            return LayerJacobian(self, observations, self.layers)

        def values(parameters: dict[str, th.Tensor]) -> th.Tensor:
            return th.func.functional_call(self, parameters, (observations,))

        while True:
            kind = self.jacobians[0]
            arguments = (
                (self, observations, self.found_layers) if kind is LayerJacobian else (values, self.trainable, generator)
            )
            try:
                jacobian = kind(*arguments)
                # Whose rows the layers see may depend on the observations
                known = self.jacobian_is_right and kind is not LayerJacobian
                self.jacobian_is_right = known or jacobian.is_consistent()
                if self.jacobian_is_right:
                    return jacobian
            except th.OutOfMemoryError:
                raise
            except RuntimeError:  # layers may be called twice, torch.func has its limits, some operations no second derivative
                if len(self.jacobians) == 1:
                    raise
            del self.jacobians[0]
            self.jacobian_is_right = False

    def _features(self, observations: PyTorchObs) -> th.Tensor:
        return flat_features(self.policy, self.policy.vf_features_extractor, observations)


class ActionLikelihood(NamedTuple):
    """
    How likely the actor finds given actions.

    :param log_prob: log pi(a_t|s_t) (N,)
    :param entropy: Entropy of pi(.|s_t) (N,); ``None`` where it has no closed form
    :param gradient: Maps derivatives by log_prob (N,) and, where not ``None``, by the entropy (N,) to the gradient by the
        actor's parameters, flattened and joined (n_actor_params,)
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    gradient: Callable[[th.Tensor, th.Tensor | None], th.Tensor]


def likelihood(parameters: Sequence[th.Tensor], log_prob: th.Tensor, entropy: th.Tensor | None) -> ActionLikelihood:
    """
    Differentiate automatically.

    :param parameters: The actor's parameters
    :param log_prob: log pi(a_t|s_t), differentiable (N,)
    :param entropy: Entropy of pi(.|s_t), differentiable (N,); ``None`` where it has no closed form
    :return: The same without a graph, and their gradient
    """

    def gradient(by_log_prob: th.Tensor, by_entropy: th.Tensor | None) -> th.Tensor:
        outputs, by_outputs = [log_prob], [by_log_prob]
        if by_entropy is not None:
            assert entropy is not None
            outputs, by_outputs = [log_prob, entropy], [by_log_prob, by_entropy]
        # Hooks of parameters see what PPO's see, the gradient of what is minimised
        return -flat_gradient(outputs, parameters, [-by for by in by_outputs])

    return ActionLikelihood(log_prob.detach(), None if entropy is None else entropy.detach(), gradient)


class Actor:
    """
    The policy's action distribution.

    :param policy: The policy
    :param parameters: The actor's trainable parameters
    """

    def __init__(self, policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> None:
        self.policy = policy
        self.parameters = parameters
        one_way = acts_as_trained(policy)
        #: Whether :meth:`act` may take the place of the policy's ``forward()``
        self.acts_as_sb3 = (
            one_way and is_sb3(policy, "forward", "predict_values") and not any(map(is_hooked, policy.modules()))
        )
        #: The networks, where they and the distribution can be differentiated by hand
        self.chain = self._find_chain() if one_way else None

    def _find_chain(self) -> Chain | None:
        policy, distribution = self.policy, self.policy.action_dist
        sb3 = is_sb3(policy, "_get_action_dist_from_latent") and is_mlp(policy.mlp_extractor, "forward_actor")
        if not sb3 or type(distribution) not in WRITTEN_OUT or has_own_methods(distribution):
            return None
        chain = chain_of(policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
        if chain is None:
            return None
        beside: list[th.Tensor] = []
        if isinstance(distribution, DiagGaussianDistribution):
            beside = [policy.log_std]
            if policy.log_std.numel() != distribution.action_dim:  # a policy of the user's may have one for all actions
                return None
        differentiated = [*beside, *(parameter for layer in chain.layers for parameter in layer.parameters())]
        return chain if are_same(differentiated, self.parameters) and not any(p._backward_hooks for p in beside) else None

    def act(self, observations: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        What the policy's ``forward()`` does, without the values.

        :param observations: (n, ...)
        :param deterministic: Whether to take the most likely actions
        :return: The same actions (n, ...), NaN for the values (n, 1), the same log-probabilities (n,)
        :raises ValueError: If a log-probability is not finite
        """
        distribution: WrittenOut | Distribution
        if self.chain is not None:
            distribution = self._distribution(self.chain.outputs(self._features(observations)))
        else:
            distribution = self.policy.get_distribution(observations)
        try:
            actions = distribution.get_actions(deterministic=deterministic)
            log_prob = distribution.log_prob(actions)
        except RuntimeError as error:
            if not isinstance(distribution, WrittenOut) and "probability tensor contains" not in str(error):  # multinomial()'s
                raise
            raise not_finite("probabilities of actions") from error
        # Their sum is quicker, but may overflow
        if not math.isfinite(log_prob.sum()) and not log_prob.isfinite().all():
            raise not_finite("log_probs")
        actions = actions.reshape((-1, *self.policy.action_space.shape))  # type: ignore[misc]
        return actions, log_prob.new_full((len(log_prob), 1), th.nan), log_prob

    def likelihood(self, observations: PyTorchObs, actions: th.Tensor) -> ActionLikelihood:
        """
        :param observations: (N, ...)
        :param actions: (N, ...)
        :return: How likely the actions are
        """
        if self.chain is not None:
            return self._chain_likelihood(self.chain, observations, actions)
        return likelihood(self.parameters, *log_prob_and_entropy(self.policy, observations, actions))

    @th.no_grad()
    def _chain_likelihood(self, chain: Chain, observations: PyTorchObs, actions: th.Tensor) -> ActionLikelihood:
        """The same without automatic differentiation."""
        tape = chain.tape(self._features(observations))
        distribution = self._distribution(tape.outputs)

        def differentiate(slopes: list[th.Tensor]) -> Callable[[th.Tensor], th.Tensor]:
            by_outputs, *by_log_std = slopes
            signals = tape.signals(by_outputs)
            return lambda weights: th.cat([weights @ part for part in by_log_std] + tape.gradient(signals, weights))

        # Both gradients of a minibatch share one pass back
        of_log_prob = differentiate(distribution.log_prob_slopes(actions))

        def gradient(by_log_prob: th.Tensor, by_entropy: th.Tensor | None) -> th.Tensor:
            direct = of_log_prob(by_log_prob)
            return direct if by_entropy is None else direct + differentiate(distribution.entropy_slopes())(by_entropy)

        return ActionLikelihood(distribution.log_prob(actions), distribution.entropy(), gradient)

    def _distribution(self, outputs: th.Tensor) -> WrittenOut:
        return WRITTEN_OUT[type(self.policy.action_dist)](self.policy, outputs)

    def _features(self, observations: PyTorchObs) -> th.Tensor:
        return flat_features(self.policy, self.policy.pi_features_extractor, observations)

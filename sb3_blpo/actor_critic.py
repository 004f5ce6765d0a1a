"""
An SB3 actor-critic policy as leader and follower: two sets of parameters that have nothing in common.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import activation

from sb3_blpo.chain import Chain
from sb3_blpo.checks import not_finite
from sb3_blpo.distributions import Bernoulli, Categorical, DiagGaussian, MultiCategorical, WrittenOut
from sb3_blpo.jacobian import ChainJacobian, FunctionalJacobian, Jacobian, LayerJacobian

#: Activations that act on every element by itself and have no parameters
ELEMENTWISE = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.ELU, activation.CELU, activation.SELU,
    activation.GELU, activation.SiLU, activation.Mish, activation.Tanh, activation.Sigmoid, activation.Softplus,
    activation.Softsign, activation.Hardtanh, activation.Hardswish, activation.Hardsigmoid, activation.LogSigmoid,
    activation.Softshrink, activation.Hardshrink, activation.Tanhshrink, nn.Identity,
)  # fmt: skip

#: SB3's distributions of the actor's outputs, and at most of log_std, and how each is made written out
WRITTEN_OUT: dict[type[Any], Callable[[Any, th.Tensor], WrittenOut]] = {
    DiagGaussianDistribution: lambda policy, outputs: DiagGaussian(outputs, policy.log_std.detach()),
    CategoricalDistribution: lambda policy, outputs: Categorical(outputs),
    MultiCategoricalDistribution: lambda policy, outputs: MultiCategorical(outputs, policy.action_dist.action_dims),
    BernoulliDistribution: lambda policy, outputs: Bernoulli(outputs),
}

#: What combines them
CONTAINERS = (nn.Sequential, nn.ModuleDict, FlattenExtractor, NatureCNN, CombinedExtractor)


def unshare_features_extractor(policy: ActorCriticPolicy) -> None:
    """
    Give the critic its own copy of a features extractor with parameters. One without (Flatten) may stay shared.

    :param policy: The policy, changed in place
    """
    if policy.share_features_extractor:
        if not any(True for _ in policy.features_extractor.parameters()):
            return
        policy.vf_features_extractor = copy.deepcopy(policy.features_extractor)
        policy.share_features_extractor = False
    # SB3's list of constructor arguments lacks this one, and `policy.save()` and `load()` would silently merge the extractors
    policy._get_constructor_parameters = functools.partial(_constructor_parameters, policy)  # type: ignore[method-assign]


def _constructor_parameters(policy: ActorCriticPolicy) -> dict[str, Any]:
    return type(policy)._get_constructor_parameters(policy) | {"share_features_extractor": False}


def split_parameters(
    policy: ActorCriticPolicy, observation_space: spaces.Space
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """
    Tell the actor's parameters, which the action distribution depends on, from the critic's, which the value depends on.

    :param policy: The policy
    :param observation_space: Of the policy
    :return: The actor's and the critic's parameters by name, in the policy's order; frozen ones too, so that they can be
        trained later
    :raises ValueError: If a trainable parameter belongs to both or to neither
    """
    named = {name: p for name, p in policy.named_parameters() if p.is_floating_point() or p.is_complex()}
    trainable = {name for name, parameter in named.items() if parameter.requires_grad}
    training = policy.training
    policy.set_training_mode(False)
    try:
        for parameter in named.values():
            parameter.requires_grad_(True)
        try:
            by_actor, by_critic = _dependences(policy, named, observation_space)
        except RuntimeError:  # what is always frozen may be used in ways that allow no gradient
            for name, parameter in named.items():
                parameter.requires_grad_(name in trainable)
            named = {name: named[name] for name in named if name in trainable}
            by_actor, by_critic = _dependences(policy, named, observation_space)
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        policy.set_training_mode(training)
    for name in named:
        if name in trainable and (name in by_actor) == (name in by_critic):
            raise ValueError(
                f"BLPO needs an actor and a critic without common parameters, but `{name}` of {type(policy).__name__} belongs "
                f"to {'both' if name in by_actor else 'neither'}; every trainable parameter must affect either the action "
                "distribution or the value."
            )
    actor = {name: parameter for name, parameter in named.items() if name in by_actor - by_critic}
    critic = {name: parameter for name, parameter in named.items() if name in by_critic - by_actor}
    return actor, critic


@th.enable_grad()
def _dependences(
    policy: ActorCriticPolicy, named: dict[str, nn.Parameter], observation_space: spaces.Space
) -> tuple[set[str], set[str]]:
    """Names of the parameters that the action distribution and the value depend on."""
    # A copy of the space: sampling must not disturb an environment that draws from its own space
    observation = policy.obs_to_tensor(copy.deepcopy(observation_space).sample())[0]
    with th.no_grad():
        actions = policy.get_distribution(observation).get_actions(deterministic=True)
    outputs = [log_prob_and_entropy(policy, observation, actions)[0].sum(), policy.predict_values(observation).sum()]
    with th.no_grad():
        policy.get_distribution(observation)  # the policy keeps it, and could not be copied with the graph in it
    gradients = (th.autograd.grad(output, list(named.values()), allow_unused=True) for output in outputs)
    by_actor, by_critic = ({name for name, g in zip(named, found, strict=True) if g is not None} for found in gradients)
    return by_actor, by_critic


def log_prob_and_entropy(
    policy: ActorCriticPolicy, observations: PyTorchObs, actions: th.Tensor
) -> tuple[th.Tensor, th.Tensor | None]:
    """
    :param policy: The policy
    :param observations: (n, ...)
    :param actions: (n, ...)
    :return: log pi(a|s) (n,) and the entropy of pi(.|s) (n,), ``None`` where it has no closed form
    """
    if _acts_as_trained(policy):  # without the critic
        distribution = policy.get_distribution(observations)
        return distribution.log_prob(actions), distribution.entropy()
    return policy.evaluate_actions(observations, actions)[1:]  # what PPO trains


def appearance(policy: ActorCriticPolicy) -> list[bool]:
    """
    What of a policy decides how :class:`Actor` and :class:`Critic` treat it, and may change at any time.

    :param policy: The policy
    :return: Of each parameter whether it is trained and whether it has hooks, of each module whether it has
    """
    of_parameters = [flag for p in policy.parameters() for flag in (p.requires_grad, bool(p._backward_hooks))]
    return of_parameters + [_is_hooked(module) for module in policy.modules()]


class Critic(nn.Module):
    """
    The policy's value function as a module of its own.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    """

    def __init__(self, policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> None:
        super().__init__()
        self.policy = policy
        names = {id(parameter): f"policy.{name}" for name, parameter in policy.named_parameters()}
        self.trainable: dict[str, th.Tensor] = {names[id(parameter)]: parameter for parameter in parameters}
        self.layers = plain_layers(policy, parameters)
        self.chain: Chain | None = None
        if self.layers is not None:
            self.chain = chain_of(policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net)
        #: Of actor and critic, what normalisation layers keep; a mask of -inf is none of it
        self.statistics = [x for x in policy.buffers() if x.is_floating_point() and x.isfinite().all()]

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
            residuals = tape.outputs - returns[:, None]
            return residuals.square().mean(), th.cat(tape.gradient(tape.signals(residuals * (2 / len(returns)))))
        loss = F.mse_loss(self(observations), returns)
        return loss.detach(), flat_gradient([loss], list(self.trainable.values()))

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """
        Switch dropout and batch statistics off for a while; a critic of plain layers has none.

        :return: A context manager
        """
        if self.layers is not None:
            yield
            return
        training = self.policy.training
        self.policy.set_training_mode(False)
        try:
            yield
        finally:
            self.policy.set_training_mode(training)

    def jacobian(self, observations: PyTorchObs, generator: th.Generator) -> Jacobian:
        """
        :param observations: (n, ...)
        :param generator: Source of what the Jacobian draws
        :return: The values' Jacobian by the critic's parameters
        """
        if self.chain is not None:
            return ChainJacobian(self.chain, self._features(observations))
        if self.layers is not None:
            return LayerJacobian(self, observations, self.layers)

        def values(parameters: dict[str, th.Tensor]) -> th.Tensor:
            return th.func.functional_call(self, parameters, (observations,))

        return FunctionalJacobian(values, self.trainable, generator)

    def _features(self, observations: PyTorchObs) -> th.Tensor:
        return flat_features(self.policy, self.policy.vf_features_extractor, observations)


def plain_layers(policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> list[nn.Linear | nn.Conv2d] | None:
    """
    See whether the critic is made of SB3's own parts with nothing but Linear and Conv2d layers and elementwise activations in
    them, so that everything the solvers need follows from the layers' inputs and signals.

    :param policy: The policy
    :param parameters: The critic's trainable parameters
    :return: The layers in the order of the parameters; ``None`` for any other critic
    """
    if not _is_sb3(policy, "predict_values", "extract_features") or type(policy.mlp_extractor) is not MlpExtractor:
        return None
    parts = [policy.vf_features_extractor, policy.mlp_extractor.value_net, policy.value_net]
    modules = [module for part in parts for _, module in part.named_modules(remove_duplicate=False)]
    if not all(map(_is_plain, modules)):
        return None
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    # Same parameters in the same order: nothing frozen, nothing beside the layers, no layer used twice
    return layers if _are_same([parameter for layer in layers for parameter in layer.parameters()], parameters) else None


def chain_of(extractor: nn.Module, *networks: nn.Module) -> Chain | None:
    """
    See whether networks are nothing but Linear layers and activations one after another.

    :param extractor: Features extractor before them
    :param networks: The networks
    :return: Their layers; ``None`` if there is something else, or if features are more than the flattened observation
    """
    modules = [part for network in networks for part in (network if type(network) is nn.Sequential else [network])]
    plain = all(type(module) in (nn.Linear, *ELEMENTWISE) and _is_plain(module) for module in modules)
    parts = [part for network in (extractor, *networks) for part in network.modules()]
    hooked = any(map(_is_hooked, parts)) or any(p._backward_hooks for part in parts for p in part.parameters())
    return Chain(modules) if plain and not hooked and type(extractor) is FlattenExtractor else None


def flat_features(policy: ActorCriticPolicy, extractor: BaseFeaturesExtractor, observations: PyTorchObs) -> th.Tensor:
    """
    :param policy: The policy
    :param extractor: The actor's or the critic's features extractor, which does no more than flatten
    :param observations: (n, ...)
    :return: The features (n, n_features)
    """
    if isinstance(observations, th.Tensor) and type(policy.observation_space) is spaces.Box and observations.ndim == 2:
        return observations.float()
    # The policy's own extract_features() would answer for both networks
    return BasePolicy.extract_features(policy, observations, extractor)


def _is_plain(module: nn.Module) -> bool:
    if not module._parameters.keys() <= {"weight", "bias"}:
        return False  # what prunes or normalises weights computes them from parameters of other names
    if isinstance(module, nn.Conv2d):
        zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return type(module) is nn.Conv2d and module.groups == 1 and zeros
    if type(module) in ELEMENTWISE:
        return not getattr(module, "inplace", False)
    return type(module) in (nn.Linear, nn.Flatten, *CONTAINERS)


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _are_same(some: Sequence[th.Tensor], others: Sequence[th.Tensor]) -> bool:
    """Whether two sequences hold the same tensors in the same order."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


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


def flat_gradient(
    outputs: Sequence[th.Tensor], parameters: Sequence[th.Tensor], by_outputs: Sequence[th.Tensor] | None = None
) -> th.Tensor:
    """
    :param outputs: What to differentiate; may be differentiated again
    :param parameters: By what: any number
    :param by_outputs: Weights of the outputs' elements; ``None``: 1
    :return: The gradient, flattened and joined; 0 for what the outputs do not depend on (n_params,)
    """
    dependent = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not parameters or not dependent:
        return outputs[0].new_zeros(sum(parameter.numel() for parameter in parameters))
    outputs = [outputs[i] for i in dependent]
    by_outputs = None if by_outputs is None else [by_outputs[i] for i in dependent]
    gradients = th.autograd.grad(outputs, parameters, by_outputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return th.cat([gradient.flatten() for gradient in gradients])


class Actor:
    """
    The policy's action distribution.

    :param policy: The policy
    :param parameters: The actor's trainable parameters
    """

    def __init__(self, policy: ActorCriticPolicy, parameters: Sequence[th.Tensor]) -> None:
        self.policy = policy
        self.parameters = parameters
        #: Whether :meth:`act` may take the place of the policy's ``forward()``
        self.acts_as_sb3 = _is_sb3(
            policy, "forward", "get_distribution", "predict_values", "evaluate_actions", "extract_features"
        )
        self.acts_as_sb3 &= not any(map(_is_hooked, policy.modules()))
        self.chain: Chain | None = None
        plain = _acts_as_trained(policy) and _is_sb3(policy, "_get_action_dist_from_latent")
        if plain and type(policy.mlp_extractor) is MlpExtractor and type(policy.action_dist) in WRITTEN_OUT:
            chain = chain_of(policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
            beside = [policy.log_std] if type(policy.action_dist) is DiagGaussianDistribution else []
            layers = [] if chain is None else chain.layers
            differentiated = [*beside, *(parameter for layer in layers for parameter in layer.parameters())]
            if _are_same(differentiated, parameters) and not any(p._backward_hooks for p in beside):
                self.chain = chain

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
            distribution = self._distribution(self.chain(self._features(observations)))
        else:
            distribution = self.policy.get_distribution(observations)
        try:
            actions = distribution.mode() if deterministic else distribution.sample()
            log_prob = distribution.log_prob(actions)
        except RuntimeError as error:  # of multinomial()
            raise not_finite("probabilities of actions") from error
        if not log_prob.isfinite().all():
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


class StandIn:
    """
    What takes the place of a method of one object for a while. In a copy of the object it is the method.

    :param owner: The object
    :param name: Of the method
    :param function: What is called instead
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Called before the copy has attributes of its own
        return getattr, (self.owner, self.name)


def has_own(owner: Any, name: str) -> bool:
    """
    :param owner: An object
    :param name: Of a method
    :return: Whether the object has another one than its class
    """
    own = vars(owner).get(name)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(owner), name)


def _acts_as_trained(policy: ActorCriticPolicy) -> bool:
    """Whether ``get_distribution()``, which leaves the critic out, gives what ``evaluate_actions()`` does."""
    own = _is_sb3(policy, "evaluate_actions", "get_distribution", "extract_features")
    return own and not _is_hooked(policy.mlp_extractor)  # of which the one calls a part, the other the whole


def _is_sb3(policy: ActorCriticPolicy, *methods: str) -> bool:
    """Whether the policy has these methods from SB3's base class."""
    return all(getattr(type(policy), method, None) is getattr(ActorCriticPolicy, method) for method in methods)

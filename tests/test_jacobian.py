"""Products with the critic's Jacobian, and chains differentiated by hand, against automatic differentiation."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from brute_force import as_flat_function
from gymnasium import spaces
from models import OwnCNN
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn
from torch.nn.utils import prune

from sb3_blpo.actor_critic import Actor, Critic
from sb3_blpo.chain import Chain
from sb3_blpo.jacobian import AutogradJacobian, FormedJacobian, FunctionalJacobian, Jacobian, VectorwiseJacobian, flat_gradient
from sb3_blpo.layers import ChainJacobian, ConvRows, Inputs, LayerJacobian, LinearRows
from sb3_blpo.policies import ELEMENTWISE, split_parameters, unshare_features_extractor

BODIES = {
    "linear": lambda: nn.Sequential(nn.Linear(3, 1)),
    "tanh": lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)),
    "relu": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)),
    "silu": lambda: nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 1)),
    "elu, no bias": lambda: nn.Sequential(nn.Linear(3, 7, bias=False), nn.ELU(), nn.Linear(7, 1)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 3, (1, 2), padding=1, stride=(1, 2)), nn.Tanh(),
        nn.Conv2d(3, 2, (2, 1), dilation=(2, 1), bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1),
    ),
    "256, 256": lambda: nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)),
}  # fmt: skip


def functional(
    critic: nn.Module, observations: th.Tensor, kind: Callable[..., VectorwiseJacobian] = FunctionalJacobian
) -> VectorwiseJacobian:
    parameters: dict[str, th.Tensor] = dict(critic.named_parameters())
    return kind(
        lambda p: th.func.functional_call(critic, p, (observations,)).flatten(), parameters, th.Generator().manual_seed(0)
    )


@pytest.fixture(params=BODIES)
def body(request):
    th.manual_seed(0)
    return BODIES[request.param]().double()


def is_chain(body: nn.Sequential) -> bool:
    return not any(isinstance(module, nn.Conv2d) for module in body)


THROUGH_TORCH = {"functional": FunctionalJacobian, "autograd": AutogradJacobian, "formed": FormedJacobian}


@pytest.fixture(params=["layers", "chain", *THROUGH_TORCH])
def jacobian_and_dense(request, body):
    observations = th.randn(11, 3, dtype=th.float64)
    if request.param == "layers" or (request.param == "chain" and not is_chain(body)):
        jacobian: Jacobian = LayerJacobian(body, observations)
    elif request.param == "chain":
        jacobian = ChainJacobian(Chain(list(body)), observations)
    else:
        jacobian = functional(body, observations, THROUGH_TORCH[request.param])
    function, flat = as_flat_function(body, observations)
    return jacobian, th.autograd.functional.jacobian(lambda p: function(p).flatten(), flat), body(observations).flatten()


def test_products_equal_the_dense_jacobian(jacobian_and_dense):
    jacobian, J, values = jacobian_and_dense
    close = {"rtol": 1e-10, "atol": 1e-10}
    th.testing.assert_close(jacobian.values, values.detach(), **close)
    assert jacobian.n_params == J.shape[1]
    v, V = th.randn(J.shape[1], dtype=th.float64), th.randn(J.shape[1], 3, dtype=th.float64)
    w, W = th.randn(J.shape[0], dtype=th.float64), th.randn(J.shape[0], 3, dtype=th.float64)
    rows, index = th.tensor([3, 0, 10]), th.randperm(J.shape[1])[:5]
    with th.device("meta"):  # a default device on which nothing can be computed: all must be made where the inputs are
        actual = [jacobian.J_v(v), jacobian.J_v(V), jacobian.Jt_w(w), jacobian.Jt_w(W)]
        actual += [jacobian.gram(), jacobian.gram(rows), jacobian.columns(index)]
    expected = [J @ v, J @ V, J.T @ w, J.T @ W, J @ J.T, J[rows] @ J.T, J[:, index]]
    th.testing.assert_close(actual, expected, **close)


def test_layers_give_the_exact_squared_norm(body):
    observations = th.randn(9, 3, dtype=th.float64)
    function, flat = as_flat_function(body, observations)
    J = th.autograd.functional.jacobian(lambda p: function(p).flatten(), flat)
    th.testing.assert_close(LayerJacobian(body, observations).squared_norm(7), J[:7].square().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, *ELEMENTWISE], ids=lambda activation: activation.__name__)
def test_chains_are_differentiated_as_by_autograd(activation):
    th.manual_seed(0)
    body = nn.Sequential(activation(), nn.Linear(3, 5), activation(), activation(), nn.Linear(5, 4), activation(),
                         nn.Linear(4, 2, bias=False), activation()).double()  # fmt: skip
    inputs, by_outputs = 3 * th.randn(7, 3, dtype=th.float64), th.randn(7, 2, dtype=th.float64)
    tape = Chain(list(body)).tape(inputs)
    outputs = body(inputs)
    th.testing.assert_close(tape.outputs, outputs.detach(), rtol=1e-12, atol=1e-12)
    signals, weights = tape.signals(by_outputs), th.randn(7, dtype=th.float64)
    for arguments, total in [((), by_outputs), ((weights,), by_outputs * weights[:, None])]:
        expected = th.autograd.grad(outputs, list(body.parameters()), total, retain_graph=True)
        for actual, wanted in zip(tape.gradient(signals, *arguments), expected, strict=True):
            th.testing.assert_close(actual, wanted.flatten(), rtol=1e-10, atol=1e-12)


def test_products_in_threads_are_the_same():
    """RL Zoo's ``--n-jobs`` trains in threads of one process, and torch's forward mode knows of none."""
    th.manual_seed(0)
    bodies = [BODIES["silu"]().double() for _ in range(2)]
    observations, v = th.randn(9, 3, dtype=th.float64), th.randn(49, dtype=th.float64)
    expected = [functional(body, observations).J_v(v) for body in bodies]

    def products(body: nn.Module) -> list[th.Tensor]:
        return [functional(body, observations).J_v(v) for _ in range(100)]

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(products, bodies), expected, strict=True):
            th.testing.assert_close(th.stack(found), wanted.expand(100, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", range(6))
def test_products_that_are_not_of_one_matrix_are_noticed(part):
    """Whichever parameter's part of J v is missing, and however small it is."""
    th.manual_seed(0)
    body, observations = BODIES["tanh"]().double(), th.randn(11, 3, dtype=th.float64)
    with th.no_grad():
        body[4].weight *= 1e-4
    jacobian = functional(body, observations, FormedJacobian)
    sizes = [parameter.numel() for parameter in body.parameters()]
    J_v = jacobian._J_v
    assert jacobian.is_consistent()
    jacobian._J_v = lambda v: J_v(th.cat([0 * x if i == part else x for i, x in enumerate(v.split(sizes))]))
    assert not jacobian.is_consistent()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("element", [0, 5])
@pytest.mark.parametrize("kind", [FormedJacobian, LayerJacobian])
def test_what_is_not_finite_says_nothing_about_the_products(kind, element, bad):
    """It is an error of the numbers: no reason to take another kind of Jacobian from then on."""
    th.manual_seed(0)
    body, observations = BODIES["tanh"]().double(), th.randn(11, 3, dtype=th.float64)
    jacobian = LayerJacobian(body, observations) if kind is LayerJacobian else functional(body, observations, kind)
    name = "Jt_w" if kind is LayerJacobian else "_J_v"
    product = getattr(jacobian, name)
    setattr(jacobian, name, lambda x: product(x).index_fill(0, th.tensor(element), bad))
    assert jacobian.is_consistent()


def test_flat_gradient_of_what_depends_on_some_parameters():
    x, y, z = (th.tensor(value, dtype=th.float64, requires_grad=True) for value in ([2.0, 3.0], [[5.0]], [7.0]))
    expected = th.tensor([2 * 2 * 5 + 1, 2 * 3 * 5 + 1, 2**2 + 3**2, 0], dtype=th.float64)
    gradient = flat_gradient([x.detach().sum(), (x**2 * y).sum(), x.sum()], [x, y, z])
    th.testing.assert_close(gradient, expected, rtol=0, atol=0)
    outputs = [x.detach(), x**2 * y[0], x.sum()]
    weights = [th.ones(2), th.tensor([1.0, -1.0], dtype=th.float64), th.tensor(0.5, dtype=th.float64)]
    gradient = flat_gradient(outputs, [x, y, z], weights, create_graph=True)
    expected = th.tensor([2 * 2 * 5 + 0.5, -2 * 3 * 5 + 0.5, 2**2 - 3**2, 0], dtype=th.float64)
    th.testing.assert_close(gradient.detach(), expected, rtol=0, atol=0)
    second = flat_gradient([gradient], [x, y, z], [th.tensor([1.0, 0, 0, 0], dtype=th.float64)])
    th.testing.assert_close(second, th.tensor([10.0, 0, 4, 0], dtype=th.float64), rtol=0, atol=0)
    assert flat_gradient([x.detach()], [x, y]).tolist() == [0, 0, 0] and flat_gradient(outputs, []).shape == (0,)


def test_hutchinson_is_unbiased():
    th.manual_seed(0)
    body, observations = BODIES["tanh"]().double(), th.randn(9, 3, dtype=th.float64)
    jacobian = functional(body, observations)
    exact = LayerJacobian(body, observations).squared_norm(7)
    estimates = th.stack([jacobian.squared_norm(7) for _ in range(400)])
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert standard_error < 0.05 * exact
    assert abs(estimates.mean() - exact) < 4 * standard_error


def test_probes_are_drawn_from_the_generator_and_used_where_the_values_are():
    body, observations = BODIES["tanh"](), th.randn(9, 3)
    first, second = (functional(body, observations).squared_norm(7) for _ in range(2))
    assert th.equal(first, second)
    assert functional(body.to("meta"), observations.to("meta")).squared_norm(7).device.type == "meta"


def test_rows_of_convolutions_in_groups_are_the_same(monkeypatch):
    th.manual_seed(0)
    body, observations = BODIES["convolutions"]().double(), th.randn(11, 3, dtype=th.float64)
    whole = LayerJacobian(body, observations).gram()
    monkeypatch.setattr(ConvRows, "group", 4)
    th.testing.assert_close(LayerJacobian(body, observations).gram(), whole, rtol=1e-12, atol=1e-12)


def test_products_in_chunks_are_the_same(monkeypatch):
    th.manual_seed(0)
    jacobian = LayerJacobian(BODIES["tanh"]().double(), th.randn(11, 3, dtype=th.float64))
    V, W = th.randn(jacobian.n_params, 10, dtype=th.float64), th.randn(11, 10, dtype=th.float64)
    whole = jacobian.J_v(V), jacobian.Jt_w(W)
    monkeypatch.setattr(LinearRows, "chunk_elements", 150)  # 2 columns at a time
    th.testing.assert_close((jacobian.J_v(V), jacobian.Jt_w(W)), whole, rtol=1e-12, atol=1e-12)


def test_hessian_product():
    th.manual_seed(0)
    body, observations = BODIES["silu"]().double(), th.randn(6, 3, dtype=th.float64)
    function, flat = as_flat_function(body, observations)
    w, v = th.randn(6, dtype=th.float64), th.randn(len(flat), dtype=th.float64)
    H = th.autograd.functional.hessian(lambda p: (w * function(p).flatten()).sum(), flat)
    chain = ChainJacobian(Chain(list(body)), observations)
    backwards = functional(body, observations, AutogradJacobian)
    for jacobian in (functional(body, observations), backwards, LayerJacobian(body, observations), chain):
        th.testing.assert_close(jacobian.hessian_v(w, v), H @ v, rtol=1e-10, atol=1e-10)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x.reshape(-1, 3, 2)).flatten(1)


class Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 6, batch_first=True)

    def forward(self, x):
        return self.layer(x.reshape(-1, 3, 2))[0][:, -1]


class WeightNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))


@pytest.mark.parametrize("dtype", [th.float64, th.float32])  # torch's kernels differ
@pytest.mark.parametrize("layer", ["attention", "LSTM", "weight_norm"])
def test_layers_that_torch_cannot_differentiate_forward(layer, dtype):
    th.manual_seed(0)
    first = {"attention": Attention, "LSTM": Recurrence, "weight_norm": WeightNorm}[layer]()
    body, observations = nn.Sequential(first, nn.Linear(6, 1)).to(dtype), th.randn(5, 6, dtype=dtype)
    function, flat = as_flat_function(body, observations)
    jacobian = functional(body, observations)
    enabled = th.backends.mkldnn.enabled, th.backends.cudnn.enabled
    J = th.autograd.functional.jacobian(lambda p: function(p).flatten(), flat)
    v, w = th.randn(len(flat), dtype=dtype), th.randn(5, dtype=dtype)
    tolerance = {th.float64: 1e-10, th.float32: 1e-4}[dtype]
    th.testing.assert_close(jacobian.J_v(v), J @ v, rtol=tolerance, atol=tolerance)
    th.testing.assert_close(jacobian.Jt_w(w), J.T @ w, rtol=tolerance, atol=tolerance)
    H_v = jacobian.hessian_v(w, v)
    assert (th.backends.mkldnn.enabled, th.backends.cudnn.enabled) == enabled
    if dtype == th.float64 and layer != "weight_norm":  # whose second derivative torch 2.13 gets wrong
        step = 1e-6 * v

        def gradient(p):
            p = p.detach().requires_grad_()
            return th.autograd.grad(w @ function(p).flatten(), p)[0]

        th.testing.assert_close(H_v, (gradient(flat + step) - gradient(flat - step)) / 2e-6, rtol=1e-5, atol=1e-6)


def make_critic(policy_class, observation_space, **policy_kwargs) -> Critic:
    th.manual_seed(0)
    policy = policy_class(observation_space, spaces.Discrete(2), ConstantSchedule(1e-3), **policy_kwargs)
    unshare_features_extractor(policy)
    return Critic(policy, list(split_parameters(policy, observation_space)[1].values()))


BOX = spaces.Box(-1, 1, (4,))
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})


class OwnValues(ActorCriticPolicy):
    """A policy whose value is not what its layers say."""

    def predict_values(self, obs):
        return super().predict_values(obs) ** 2


class Contrast(ActorCriticPolicy):
    """Each value depends on all observations."""

    def predict_values(self, obs):
        values = super().predict_values(obs)
        return values - values.mean()


class Twice(ActorCriticPolicy):
    """A layer is called twice."""

    def predict_values(self, obs):
        return super().predict_values(obs) + super().predict_values(-obs)


class Regularised(ActorCriticPolicy):
    """Weights are used without their layer."""

    def predict_values(self, obs):
        return super().predict_values(obs) + self.value_net.weight.square().sum()


class Keyword(ActorCriticPolicy):
    """A layer is called by keyword."""

    def predict_values(self, obs):
        return self.value_net(input=self.mlp_extractor.forward_critic(self.extract_features(obs, self.vf_features_extractor)))


class Encoder(BaseFeaturesExtractor):
    """A features extractor of the user's, as SB3's documentation makes them."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, observations):
        hidden = self.first(observations).tanh()
        return hidden + self.second(hidden).tanh()


class GroupedConvolution(BaseFeaturesExtractor):
    """A features extractor of the user's."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.convolution = nn.Conv2d(4, 8, 1, groups=2)

    def forward(self, observations):
        return self.convolution(observations[:, :, None, None]).flatten(1)


class LayerNormExtractor(nn.Module):
    """A custom network behind the features extractor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.policy_net, self.value_net = nn.Linear(width, 8), nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8))
        self.latent_dim_pi = self.latent_dim_vf = 8

    def forward_actor(self, features):
        return self.policy_net(features)

    def forward_critic(self, features):
        return self.value_net(features)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)


class LayerNormPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = LayerNormExtractor(self.features_dim)


@pytest.mark.parametrize(
    ("policy_class", "observation_space", "policy_kwargs", "kind"),
    [
        (ActorCriticPolicy, BOX, {}, ChainJacobian),
        (ActorCriticPolicy, BOX, {"net_arch": []}, ChainJacobian),
        (ActorCriticPolicy, BOX, {"net_arch": [256, 256], "activation_fn": nn.ReLU}, ChainJacobian),
        (ActorCriticPolicy, BOX, {"activation_fn": nn.SiLU}, ChainJacobian),
        (ActorCriticPolicy, spaces.Discrete(5), {}, ChainJacobian),
        (ActorCriticPolicy, spaces.MultiBinary(5), {}, ChainJacobian),
        (MultiInputActorCriticPolicy, DICT, {}, LayerJacobian),
        (ActorCriticPolicy, BOX, {"activation_fn": nn.PReLU}, FunctionalJacobian),
        (ActorCriticPolicy, BOX, {"activation_fn": lambda: nn.ReLU(inplace=True)}, LayerJacobian),
        (ActorCriticPolicy, BOX, {"activation_fn": nn.Dropout}, LayerJacobian),
        (ActorCriticCnnPolicy, IMAGE, {}, LayerJacobian),
        (ActorCriticCnnPolicy, IMAGE, {"net_arch": [8], "normalize_images": False}, LayerJacobian),
        (MultiInputActorCriticPolicy, spaces.Dict({"image": IMAGE, "vector": BOX}), {}, LayerJacobian),
        (ActorCriticPolicy, BOX, {"features_extractor_class": GroupedConvolution}, FunctionalJacobian),
        (ActorCriticPolicy, BOX, {"features_extractor_class": Encoder}, LayerJacobian),
        (OwnValues, BOX, {}, LayerJacobian),
        (Contrast, BOX, {}, FunctionalJacobian),
        (Twice, BOX, {}, FunctionalJacobian),
        (Keyword, BOX, {}, FunctionalJacobian),
        (Regularised, BOX, {}, FunctionalJacobian),
        (LayerNormPolicy, BOX, {}, FunctionalJacobian),
    ],
)
def test_the_path_is_chosen_by_the_critic_and_both_agree(policy_class, observation_space, policy_kwargs, kind):
    critic = make_critic(policy_class, observation_space, **policy_kwargs)
    critic.policy.set_training_mode(False)
    observations = gym.vector.utils.batch_space(observation_space, 6).sample()
    obs_tensor = critic.policy.obs_to_tensor(observations)[0]
    jacobian = critic.jacobian(obs_tensor, th.Generator())
    assert type(jacobian) is kind
    # What is SB3's own needs no look
    known = kind is ChainJacobian or policy_class in (ActorCriticCnnPolicy, MultiInputActorCriticPolicy)
    assert (critic.layers is not None) == known and critic.jacobian_is_right != known
    # Against plain autograd, row by row
    values = critic(obs_tensor)
    parameters = list(critic.trainable.values())
    rows = [th.cat([g.flatten() for g in th.autograd.grad(value, parameters, retain_graph=True)]) for value in values]
    w = th.randn(6)
    th.testing.assert_close(jacobian.values, values.detach())
    th.testing.assert_close(jacobian.Jt_w(w), th.stack(rows).T @ w, rtol=1e-4, atol=1e-4)
    v = th.stack(rows)[0]
    th.testing.assert_close(jacobian.J_v(v), th.stack(rows) @ v, rtol=1e-3, atol=1e-3)


def test_a_layer_whose_rows_come_in_another_order_later():
    """In no minibatch the products are wrong."""

    class Sorted(ActorCriticPolicy):
        def predict_values(self, obs):
            order = obs[:, 0].argsort()
            return super().predict_values(obs[order])[order.argsort()]

    critic = make_critic(Sorted, BOX)
    observations = th.randn(6, 4)
    observations = observations[observations[:, 0].argsort()]
    assert type(critic.jacobian(observations, th.Generator())) is LayerJacobian
    jacobian = critic.jacobian(observations.flip(0), th.Generator())
    assert type(jacobian) is FunctionalJacobian
    th.testing.assert_close(
        jacobian.Jt_w(th.ones(6)), critic.loss_and_gradient(observations, critic.values(observations) - 3)[1]
    )


def test_inputs_that_are_not_contiguous():
    th.manual_seed(0)
    h, signal = th.randn(4, 6).T, th.randn(6, 3)
    w = th.randn(6, 2)
    actual, expected = (LinearRows(Inputs(x, True), signal).Jt_w(w) for x in (h, h.contiguous()))
    th.testing.assert_close(actual, expected)


def test_a_layer_whose_bias_comes_first():
    """As after pruning is removed: nothing may take it for the weight."""
    policy = ActorCriticPolicy(BOX, spaces.Discrete(2), ConstantSchedule(1e-3))
    for network in (policy.mlp_extractor.value_net, policy.mlp_extractor.policy_net):
        prune.remove(prune.l1_unstructured(network[0], "weight", amount=1), "weight")
    actor, parameters = (list(part.values()) for part in split_parameters(policy, BOX))
    critic = Critic(policy, parameters)
    assert critic.chain is None and Actor(policy, actor).chain is None
    observations = th.randn(6, 4)
    expected = th.autograd.grad(critic(observations).square().mean(), parameters)
    actual = critic.loss_and_gradient(observations, th.zeros(6))[1]
    th.testing.assert_close(actual, th.cat([gradient.flatten() for gradient in expected]))


def test_a_frozen_layer_is_no_parameter():
    th.manual_seed(0)
    policy = ActorCriticPolicy(BOX, spaces.Discrete(2), ConstantSchedule(1e-3))
    policy.mlp_extractor.value_net[0].requires_grad_(False)
    critic = Critic(policy, [p for p in split_parameters(policy, BOX)[1].values() if p.requires_grad])
    assert critic.layers is None and critic.chain is None
    assert critic.jacobian(th.zeros(2, 4), th.Generator()).n_params == 64 * 65 + 65


def test_convolutions_of_ones_own_with_many_parameters(monkeypatch):
    """Their rows would not fit."""
    monkeypatch.setattr(LayerJacobian, "max_conv_bytes", 1000)
    critic = make_critic(ActorCriticPolicy, IMAGE, features_extractor_class=OwnCNN)
    observations = th.zeros(2, 3, 36, 36)
    assert type(critic.jacobian(observations, th.Generator())) is FunctionalJacobian
    monkeypatch.setattr(LayerJacobian, "max_conv_bytes", 2**20)
    critic = make_critic(ActorCriticPolicy, IMAGE, features_extractor_class=OwnCNN)
    assert type(critic.jacobian(observations, th.Generator())) is LayerJacobian


def test_what_depends_on_the_observations_alone_is_kept() -> None:
    policy = ActorCriticPolicy(BOX, spaces.Discrete(2), ConstantSchedule(1e-3))
    critic = Critic(policy, list(split_parameters(policy, BOX)[1].values()))
    observations, kept = th.randn(6, *BOX.shape), dict[str, th.Tensor]()
    rows, others = th.tensor([4, 0]), th.tensor([3])
    grams = []
    for index in (rows, None, rows, others, rows):
        jacobian, expected = (
            critic.jacobian(observations, th.Generator(), kept),
            LayerJacobian(critic, observations, critic.layers),
        )
        th.testing.assert_close(jacobian.gram(index), expected.gram(index))
        th.testing.assert_close(jacobian.squared_norm(5), expected.squared_norm(5))
        grams.append(kept["gram"])
        with th.no_grad():
            for parameter in critic.trainable.values():
                parameter.add_(0.1 * th.randn_like(parameter))
    assert grams[0] is grams[1] is grams[2] and grams[2] is not grams[3] and grams[3] is not grams[4]
    assert {name: x.shape for name, x in kept.items()} == {"rows": (2,), "gram": (2, 6), "squared_norms": (6,)}

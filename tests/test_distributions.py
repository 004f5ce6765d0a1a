"""Distributions written out: SB3's samples and log-probabilities to the last bit, and derivatives as by autograd."""

from collections.abc import Callable

import pytest
import torch as th
from stable_baselines3.common import distributions as sb3

from sb3_blpo.distributions import Bernoulli, Categorical, DiagGaussian, MultiCategorical, WrittenOut

N = 50
#: For each kind: arguments per row, SB3's distribution of them, and ours
Kind = tuple[Callable[[], list[th.Tensor]], Callable[..., sb3.Distribution], Callable[..., WrittenOut]]
KINDS: dict[str, Kind] = {
    "gaussian": (
        lambda: [2 * th.randn(N, 3), th.randn(3).expand(N, 3).clone()],
        lambda mean, log_std: sb3.DiagGaussianDistribution(3).proba_distribution(mean, log_std),
        lambda mean, log_std: DiagGaussian(mean, log_std[0]),
    ),
    "categorical": (
        lambda: [3 * th.randn(N, 4)],
        lambda logits: sb3.CategoricalDistribution(4).proba_distribution(logits),
        Categorical,
    ),
    "multi-categorical": (
        lambda: [3 * th.randn(N, 7)],
        lambda logits: sb3.MultiCategoricalDistribution([2, 4, 1]).proba_distribution(logits),
        lambda logits: MultiCategorical(logits, [2, 4, 1]),
    ),
    "bernoulli": (
        lambda: [3 * th.randn(N, 5)],
        lambda logits: sb3.BernoulliDistribution(5).proba_distribution(logits),
        Bernoulli,
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_samples_and_their_log_probabilities_are_those_of_sb3(kind: Kind) -> None:
    make, of_sb3, ours = kind
    th.manual_seed(0)
    arguments = make()
    theirs, written_out = of_sb3(*arguments), ours(*arguments)
    th.manual_seed(1)
    actions = theirs.sample()
    th.manual_seed(1)
    th.testing.assert_close(written_out.sample(), actions, rtol=0, atol=0)
    th.testing.assert_close(written_out.mode(), theirs.mode(), rtol=0, atol=0)
    assert (actions != theirs.mode()).any()
    for taken in (actions, actions.float(), theirs.mode()):  # SB3's buffer keeps all actions but discrete ones as floats
        th.testing.assert_close(written_out.log_prob(taken), theirs.log_prob(taken), rtol=0, atol=0)
    th.testing.assert_close(written_out.entropy(), theirs.entropy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_slopes_are_those_of_autograd(kind: Kind) -> None:
    make, of_sb3, ours = kind
    th.manual_seed(0)
    arguments = [argument.double().requires_grad_() for argument in make()]
    theirs = of_sb3(*arguments)
    actions = theirs.sample().detach()
    written_out = ours(*(argument.detach() for argument in arguments))
    entropy = theirs.entropy()
    assert entropy is not None
    for total, slopes in [
        (theirs.log_prob(actions).sum(), written_out.log_prob_slopes(actions)),
        (entropy.sum(), written_out.entropy_slopes()),
    ]:
        expected = th.autograd.grad(total, arguments, retain_graph=True, materialize_grads=True)
        assert max(slope.abs().max() for slope in slopes) > 0.1
        for slope, wanted in zip(slopes, expected, strict=True):
            th.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)


def test_impossible_actions_have_neither_entropy_nor_slope() -> None:
    impossible = Categorical(th.tensor([[0.0, -th.inf, 0.0]]))
    th.testing.assert_close(impossible.entropy(), th.tensor([2.0]).log())
    th.testing.assert_close(impossible.entropy_slopes(), [th.zeros(1, 3)], atol=1e-6, rtol=0)
    th.testing.assert_close(impossible.log_prob_slopes(th.tensor([2])), [th.tensor([[-0.5, 0.0, 0.5]])])

"""
Why bilevel: the actor-critic game where it can be solved exactly, and BLPO's own update on it.

``python benchmarks/stackelberg.py`` writes the figures and numbers of README's section "Why bilevel" to
``benchmarks/results``. Everything is float64 and seeded; (a) and (b) need no sampling. In (c) another order of
summation moves a sampled state now and then, which changes what is below the noise, elsewhere the second or third digit.

(a) alignment: cosine of the leader's gradients with the true policy gradient on random MDPs
(b) game: simultaneous, nested and hypergradient steps in a game of two parameters
(c) convergence: the conditions of a local Stackelberg equilibrium along BLPO's updates, and what each solver makes of them
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from mdp import MDP, Game, cosine, random_mdps
from torch import nn
from torch.nn import functional as F

from sb3_blpo.gae import DiscountedSum
from sb3_blpo.ihvp import ConjugateGradient, Exact, Nystrom, Solver
from sb3_blpo.jacobian import LayerJacobian
from sb3_blpo.response import best_response, correct, surrogate_derivative
from sb3_blpo.rollout import Rollout, take

RESULTS = Path(__file__).parent / "results"
LAMBDAS = [0.0, 0.5, 0.9, 0.95, 1.0]
#: Critics by name, and their number of features, ``None``: tabular
CRITICS = {"2 features": 2, "4 features": 4, "8 features": 8, "tabular": None}
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def linear_critic(n_features: int) -> nn.Sequential:
    layer = nn.Linear(n_features, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    return nn.Sequential(layer, nn.Flatten(0))


def weights(critic: nn.Sequential) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(critic.parameters()).detach()


@th.no_grad()
def rollout_of(
    observations: th.Tensor,
    actions: th.Tensor,
    rewards: th.Tensor,
    policy: th.distributions.Distribution,
    critic: nn.Sequential,
    gamma: float,
    gae_lambda: float,
    done: th.Tensor,
) -> Rollout:
    """A rollout of (n_steps, n_envs) rewards, its targets the lambda-returns under the current critic."""
    # Under a critic of zeros, to which `advantages_after()` adds the current one
    advantages = DiscountedSum(done, gamma * gae_lambda)(rewards).flatten()
    none, log_prob = th.zeros(0, dtype=th.long), policy.log_prob(actions)
    rollout = Rollout(observations, actions, log_prob, advantages, advantages, done, none, gamma, gae_lambda)
    values = critic(observations)
    rollout.returns = rollout.advantages_after(values) + values[: len(rollout)]
    return rollout


def leader(
    theta: nn.Parameter,
    policy: th.distributions.Distribution,
    rollout: Rollout,
    critic: nn.Sequential,
    solver: Solver | None,
    damping: float,
    generator: th.Generator,
    ent_coef: float = 0.0,
) -> th.Tensor:
    """The package's gradient for the actor, of the rollout's policy, without the cap, which the theory does not know."""
    values = critic(rollout.observations).detach()
    advantages = rollout.advantages_after(values)
    response = None
    if solver is not None:
        layer, n = critic[0], len(values)
        assert isinstance(layer, nn.Linear)
        at = functools.partial(take, rollout.observations)
        jacobian = LayerJacobian([layer], critic, at, n, len(rollout), [layer.weight], n)
        of_returns = surrogate_derivative(th.ones_like(advantages), advantages, 0.2)
        response = best_response(rollout, jacobian, of_returns, values, solver, damping, "gauss_newton", generator)
    W = correct(advantages, response, None).weights
    objective = (policy.log_prob(rollout.actions) * W).mean() + ent_coef * policy.entropy().mean()
    return th.autograd.grad(objective, theta)[0]


# (a)


def alignment(gae_lambda: float, n_features: int | None) -> dict[str, th.Tensor]:
    """Cosines with the true policy gradient, one for each of 100 MDPs."""
    game = Game(*random_mdps(range(100), gae_lambda, n_features))
    gradients = {
        "direct": game.direct(),
        "hypergradient": game.hypergradient(),
        "baseline differentiated": game.hypergradient(differentiate_baseline=True),
    }
    return {name: cosine(gradient, game.policy_gradient()) for name, gradient in gradients.items()}


def alignment_table() -> dict[str, dict[str, list[float]]]:
    """Mean cosines by critic, gradient and lambda."""
    table = {}
    for critic, n_features in CRITICS.items():
        columns = [alignment(gae_lambda, n_features) for gae_lambda in LAMBDAS]
        table[critic] = {name: [column[name].mean().item() for column in columns] for name in columns[0]}
    return table


def plot_alignment(plt: Any, table: dict[str, dict[str, list[float]]]) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    titles = {
        "direct": "direct gradient\n(PPO, nested actor-critic)",
        "hypergradient": "hypergradient of the $\\lambda$-return\n(this package)",
        "baseline differentiated": "hypergradient of the advantage\n(baseline differentiated)",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for (critic, cosines), marker in zip(table.items(), "ov^s", strict=True):
            ax.plot(cosines[name], marker=marker, label=critic)
        lowest = min(min(cosines[name]) for cosines in table.values())
        ax.text(0.97, 0.8, f"lowest: {lowest:.2f}", ha="right", transform=ax.transAxes)
        ax.set(title=title, xlabel="$\\lambda$ of GAE", xticks=range(len(LAMBDAS)), xticklabels=LAMBDAS, ylim=(-1.08, 1.08))
        ax.axhline(0, color=GREY, lw=0.8)
    axes[0].set_ylabel("cosine with the policy gradient")
    axes[0].legend(title="critic", loc="lower left", frameon=False)
    return figure


# (b)


class Quadratic:
    """
    s = 0, a ~ N(theta, 0.1), reward k a²/2, s' = a, then reward -a' s' and the end; gamma 1, lambda 0, V(s) = omega s.

    The return is (k/2 - 1) theta² up to a constant, the critic's best response omega = -theta, and all expectations are
    those of the four episodes with a, a' = theta ± sigma (Gauss-Hermite quadrature of two points, exact for these cubics).
    """

    sigma = 0.1**0.5
    rate = 0.05

    def __init__(self, k: float) -> None:
        self.k = k
        self.done = th.tensor([[0.0], [1.0]]).double().expand(2, 4)
        self.critic = linear_critic(1)

    def gradients(self, theta: float, omega: float, solver: Solver | None) -> tuple[float, float]:
        """The leader's gradient and the follower's, by the package."""
        nn.init.constant_(self.critic[0].weight, omega)  # type: ignore[arg-type]
        mean = nn.Parameter(th.tensor(theta, dtype=th.float64))
        signs = th.tensor([[1, 1, -1, -1], [1, -1, 1, -1]]).double()
        a = mean.detach() + self.sigma * signs
        states = th.stack([th.zeros(4).double(), a[0], th.zeros(4).double()]).view(-1, 1)
        rewards = th.stack([self.k * a[0] ** 2 / 2, -a[0] * a[1]])
        policy = th.distributions.Normal(mean, self.sigma)
        rollout = rollout_of(states, a.flatten(), rewards, policy, self.critic, 1.0, 0.0, self.done)
        step = leader(mean, policy, rollout, self.critic, solver, 1e-9, th.Generator())
        (follower,) = th.autograd.grad(
            F.mse_loss(self.critic(rollout.states), rollout.returns), list(self.critic.parameters())
        )
        return step.item(), follower.item()

    def path(self, method: str, theta: float, omega: float, n: int) -> np.ndarray:
        """
        :param method: "simultaneous", "nested" or "hypergradient"
        :return: theta and omega along n steps, or up to |theta| = 3 (n_points, 2)
        """
        points = [(theta, omega)]
        for _ in range(n):
            if method != "simultaneous":
                omega = -theta  # the best response, which nested updates tend to
                points.append((theta, omega))
            step, follower = self.gradients(theta, omega, Exact() if method == "hypergradient" else None)
            theta += self.rate * step
            if method == "simultaneous":
                omega -= self.rate * follower
            points.append((theta, omega))
            if abs(theta) > 3:
                break
        return np.array(points)


GAME_COLOURS = {"simultaneous": ORANGE, "nested": BLUE, "hypergradient": GREEN}


def plot_game(plt: Any, paths: dict[float, dict[str, np.ndarray]]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharex=True, sharey=True, layout="constrained")
    titles = ["k = 1.5: the return has its maximum at $\\theta = 0$", "k = 2.5: the return has its minimum at $\\theta = 0$"]
    for ax, title, by_method in zip(axes, titles, paths.values(), strict=True):
        ax.plot([-1.6, 1.6], [1.6, -1.6], ":", color=GREY, label="best responses of the critic")
        for (name, path), offset in zip(by_method.items(), (0, 0.03, -0.03), strict=True):
            # Beside one another where they share the line of best responses
            x, y = (path + offset).T
            ax.plot(x, y, color=GAME_COLOURS[name], lw=1.6, label=name)
            ax.plot(x[0], y[0], "o", color=GAME_COLOURS[name])
            # An arrow after a third of a unit
            tail = np.flatnonzero(np.abs(path[:, 0] - path[0, 0]) > 0.3)[0]
            arrow = {"arrowstyle": "-|>", "color": GAME_COLOURS[name], "mutation_scale": 18}
            ax.annotate("", (x[tail + 2], y[tail + 2]), (x[tail], y[tail]), arrowprops=arrow)
        ax.plot(0, 0, "*", color="black", ms=15, zorder=3, label="Stackelberg equilibrium")
        ax.set(title=title, xlabel="actor's parameter $\\theta$", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    axes[0].set_ylabel("critic's parameter $\\omega$")
    axes[0].legend(loc="lower left", frameon=False, fontsize=9)
    return figure


# (c)

N_STEPS, N_ENVS, N_FEATURES, ENT_COEF = 1000, 100, 6, 1.0
ACTOR_RATE, CRITIC_RATE, N_CRITIC_UPDATES = 15.0, 0.1, 10


class Iteration(NamedTuple):
    """
    What one iteration saw and estimated.

    :param theta: Logits of all actions but the last, whose logit is 0 (n_states, n_actions - 1)
    :param omega: The critic that collected the rollout (n_features,)
    :param nested_omega: The critic after the nested updates (n_features,)
    :param follower: Gradient of the critic's loss at omega, from the sample (n_features,)
    :param leader: The hypergradient, from the sample (n_states, n_actions - 1)
    """

    theta: th.Tensor
    omega: th.Tensor
    nested_omega: th.Tensor
    follower: th.Tensor
    leader: th.Tensor


def with_last(theta: th.Tensor) -> th.Tensor:
    return F.pad(theta, (0, 1))


def small_mdp() -> MDP:
    mdp, _ = random_mdps(range(1), 0.5, N_FEATURES)
    return mdp._replace(P=mdp.P[0], r=mdp.r[0], features=mdp.features[0])


def sample(game: Game, rng: np.random.Generator) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """States and actions (n_steps, n_envs) and the states after the last step, started as the policy visits states."""
    n_states, n_actions = game.pi.shape
    # One table for all states: action and next state are found at s + u, for the probabilities of each state sum to 1
    table = (game.pi[..., None] * game.mdp.P).flatten().cumsum(0).numpy()
    start = game.visits.numpy()
    state = rng.choice(n_states, size=N_ENVS, p=start / start.sum())
    found = np.empty((N_STEPS, N_ENVS), dtype=np.int64)
    for t, u in enumerate(rng.random((N_STEPS, N_ENVS))):
        found[t] = np.searchsorted(table, state + u)
        state = found[t] % n_states
    states, actions = np.divmod(found // n_states, n_actions)
    return th.from_numpy(states), th.from_numpy(actions), th.from_numpy(state)


def train(mdp: MDP, solver: Solver | None, damping: float, n_iterations: int) -> list[Iteration]:
    """Algorithm 1 with plain gradient steps and a full batch of 1e5 transitions in each iteration."""
    rng, generator = np.random.default_rng(0), th.Generator().manual_seed(0)
    n_states, n_actions = mdp.r.shape
    theta, critic = nn.Parameter(th.zeros(n_states, n_actions - 1).double()), linear_critic(N_FEATURES)
    actor_optimizer = th.optim.SGD([theta], lr=ACTOR_RATE, maximize=True)
    critic_optimizer = th.optim.SGD(critic.parameters(), lr=CRITIC_RATE)
    done = th.zeros(N_STEPS, N_ENVS).double()
    history = []
    for _ in range(n_iterations):
        logits, omega = with_last(theta), weights(critic)
        states, actions, last = sample(Game(mdp, logits, omega), rng)
        policy = th.distributions.Categorical(logits=logits[states.flatten()], validate_args=False)
        observations = mdp.features[th.cat([states.flatten(), last])]
        rollout = rollout_of(
            observations, actions.flatten(), mdp.r[states, actions], policy, critic, mdp.gamma, mdp.gae_lambda, done
        )
        follower = []
        for _ in range(N_CRITIC_UPDATES):
            critic_optimizer.zero_grad()
            F.mse_loss(critic(rollout.states), rollout.returns).backward()
            follower += [parameter.grad.flatten() for parameter in critic.parameters() if parameter.grad is not None]
            critic_optimizer.step()
        gradient = leader(theta, policy, rollout, critic, solver, damping, generator, ENT_COEF)
        history.append(Iteration(theta.detach().clone(), omega, weights(critic), follower[0], gradient))
        theta.grad = gradient
        actor_optimizer.step()
    return history


def expected_updates(mdp: MDP, n_iterations: int) -> tuple[list[float], th.Tensor]:
    """The same without sampling, the critic at its best response: norms of the hypergradient, and theta in the end."""
    theta = th.zeros(mdp.r.shape[0], mdp.r.shape[1] - 1).double()
    norms = []
    for _ in range(n_iterations):
        gradient = Game(mdp, with_last(theta), ent_coef=ENT_COEF).hypergradient()[..., :-1]
        norms.append(gradient.norm().item())
        theta = theta + ACTOR_RATE * gradient
    return norms, theta


def smallest_eigenvalue(mdp: MDP, theta: th.Tensor) -> float:
    """Of the total second derivative of what the leader minimises, the critic at its best response."""
    game = Game(mdp, with_last(theta), ent_coef=ENT_COEF)
    hessian = th.autograd.functional.hessian(lambda x: -game.total(with_last(x)), theta)
    return th.linalg.eigvalsh(hessian.view(theta.numel(), -1))[0].item()


def distance(theta: th.Tensor, other: th.Tensor) -> float:
    """Total variation distance of two policies, mean over states."""
    return (F.softmax(with_last(theta), dim=-1) - F.softmax(with_last(other), dim=-1)).abs().sum(-1).mean().item() / 2


def measure(mdp: MDP, history: list[Iteration]) -> dict[str, np.ndarray]:
    """Exact gradients along a run, and how far the sampled ones were from them."""
    rows = []
    for step in history:
        logits = with_last(step.theta)
        exact = Game(mdp, logits, step.nested_omega, ENT_COEF).hypergradient()[..., :-1]
        follower = Game(mdp, logits, step.omega).follower_gradient()
        rows.append(
            {
                "leader": exact.norm().item(),
                "leader, sampled": step.leader.norm().item(),
                "leader, noise": (step.leader - exact).norm().item(),
                "follower": follower.norm().item(),
                "follower, sampled": step.follower.norm().item(),
                "follower, noise": (step.follower - follower).norm().item(),
                "smallest eigenvalue": smallest_eigenvalue(mdp, step.theta),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def rate(norms: np.ndarray, floor: float) -> tuple[float, float, int]:
    """Fit norm = c iteration^slope in log-log, until the norm is first below the floor: slope, c and that iteration."""
    below = np.flatnonzero(norms < floor)
    n = int(below[0]) + 1 if len(below) else len(norms)
    slope, intercept = np.polyfit(np.log(np.arange(1, n + 1)), np.log(norms[:n]), 1)
    return float(slope), float(np.exp(intercept)), n


def plot_convergence(plt: Any, run: dict[str, np.ndarray], expected: list[float], eigenvalue: float) -> Any:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    x = np.arange(1, len(run["leader"]) + 1)
    for ax, name in zip(axes, ("leader", "follower"), strict=False):
        floor = run[f"{name}, noise"][len(x) // 2 :].mean()
        slope, c, n = rate(run[name], floor)
        ax.loglog(x, run[f"{name}, sampled"], color=ORANGE, lw=0.8, alpha=0.6, label="as estimated from the sample")
        ax.loglog(x, run[name], color=BLUE, lw=1.8, label="exact, at the same parameters")
        ax.loglog(x[:n], c * x[:n] ** slope, "--", color="black", lw=1.2, label="fit")
        ax.text(0.6, 0.85, f"fit: iterations$^{{{slope:.2f}}}$", transform=ax.transAxes)
        ax.axhline(floor, color=GREY, ls=":", lw=1.5, label="noise of the sample")
        ax.set_xlabel("iterations (1e5 transitions each)")
    axes[0].loglog(np.arange(1, len(expected) + 1), expected, color=GREEN, lw=1.2, label="without sampling")
    axes[0].set(title="leader: norm of the hypergradient", ylim=(3e-5, None), xlim=(1, len(x)))
    axes[1].set(title="follower: norm of its gradient", xlim=(1, len(x)))
    axes[0].legend(loc="lower left", frameon=False, fontsize=8)
    axes[2].axhline(0, color=GREY, lw=0.8)
    axes[2].semilogx(x, 1000 * run["smallest eigenvalue"], color=BLUE, lw=1.8)
    axes[2].axhline(1000 * eigenvalue, color="black", ls=":", label="at the equilibrium")
    axes[2].set(title="leader: second-order condition", ylabel="smallest eigenvalue × 1000", xlim=(1, len(x)))
    axes[2].set_xlabel("iterations (1e5 transitions each)")
    axes[2].legend(loc="lower right", frameon=False)
    return figure


def plot_solvers(plt: Any, distances: dict[str, np.ndarray], final: dict[str, float]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    shown = {f"nystrom {rank}, 0.01": plt.cm.viridis(0.85 * (rank - 1) / N_FEATURES) for rank in (1, 3, 5, 6)}
    for name, colour in {**shown, "cg, 0.01": "black", "none": ORANGE}.items():
        label = name.split(",")[0].replace("nystrom", "nystrom, rank").replace("none", "none (nested only)")
        style = "--" if name.startswith("cg") else "-"
        left.loglog(np.arange(1, len(distances[name]) + 1), distances[name], style, color=colour, label=label)
    left.set(xlabel="iterations (1e5 transitions each)", ylabel="distance from the equilibrium policy", title="damping 0.01")
    left.legend(loc="lower left", frameon=False, fontsize=8)
    ranks = range(1, N_FEATURES + 1)
    for damping, colour in ((0.01, BLUE), (0.1, GREEN)):
        by_rank = [final[f"nystrom {rank}, {damping}"] for rank in ranks]
        right.semilogy(ranks, by_rank, "o-", color=colour, label=f"nystrom, damping {damping}")
        right.axhline(final[f"cg, {damping}"], color=colour, ls="--", label=f"cg, damping {damping}")
    right.axhline(final["none"], color=ORANGE, label="none (nested only)")
    right.set(xlabel=f"rank of Nyström (the critic has {N_FEATURES} parameters)", title="mean of the last 50 iterations")
    right.legend(loc="upper right", frameon=False, fontsize=8)
    return figure


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | np.ndarray):
        return [rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def main(n_iterations: int = 150) -> None:
    import matplotlib  # the tests do without it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    th.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)

    def save(name: str, figure: Any) -> None:
        figure.savefig(RESULTS / f"stackelberg_{name}.png", dpi=110, metadata={"Software": None})

    table = alignment_table()
    save("alignment", plot_alignment(plt, table))

    starts = {"simultaneous": (0.6, 0.4), "nested": (0.6, 0.4), "hypergradient": (-0.6, -0.4)}
    paths = {k: {name: Quadratic(k).path(name, *start, 1500) for name, start in starts.items()} for k in (1.5, 2.5)}
    save("game", plot_game(plt, paths))

    mdp = small_mdp()
    expected, equilibrium = expected_updates(mdp, 5000)
    eigenvalue = smallest_eigenvalue(mdp, equilibrium)
    history = train(mdp, ConjugateGradient(50, 1e-12), 1e-6, n_iterations)
    run = measure(mdp, history)
    save("convergence", plot_convergence(plt, run, expected, eigenvalue))

    histories = {"cg, 1e-06": history, "none": train(mdp, None, 1.0, n_iterations)}
    for damping in (0.01, 0.1):
        histories[f"cg, {damping}"] = train(mdp, ConjugateGradient(50, 1e-12), damping, n_iterations)
        for rank in range(1, N_FEATURES + 1):
            histories[f"nystrom {rank}, {damping}"] = train(mdp, Nystrom(rank, "gaussian"), damping, n_iterations)
    distances = {
        name: np.array([distance(step.theta, equilibrium) for step in history]) for name, history in histories.items()
    }
    final = {name: float(values[-50:].mean()) for name, values in distances.items()}
    save("solvers", plot_solvers(plt, distances, final))

    convergence = {}
    for name in ("leader", "follower"):
        late = slice(n_iterations // 2, None)
        floor = float(run[f"{name}, noise"][late].mean())
        slope, _, n = rate(run[name], floor)
        convergence[name] = {
            "first": float(run[name][0]),
            "fitted slope": slope,
            "iterations to the noise": n,
            "noise": floor,
            "mean of the second half": float(run[name][late].mean()),
        }
    eigenvalues = run["smallest eigenvalue"]
    numbers = {
        "lambdas": LAMBDAS,
        "alignment": table,
        "game": {
            "ends": {k: {name: path[-1] for name, path in by_method.items()} for k, by_method in paths.items()},
            "largest |theta| of the limit cycle": float(np.abs(paths[1.5]["simultaneous"][-500:, 0]).max()),
        },
        "convergence": convergence,
        "smallest eigenvalue": {
            "first": float(eigenvalues[0]),
            "iterations below 0": int((eigenvalues < 0).sum()),
            "last": float(eigenvalues[-1]),
            "at the equilibrium": eigenvalue,
        },
        "hypergradient without sampling": {n: expected[n - 1] for n in (1, 10, 100, 1000, 5000)},
        "distance from the equilibrium policy by solver and damping": final,
    }
    text = json.dumps(rounded(numbers), indent=1)
    # One line for each list
    text = re.sub(r"\s+(?=[^\[\]{}]*\])", " ", text)
    (RESULTS / "stackelberg.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

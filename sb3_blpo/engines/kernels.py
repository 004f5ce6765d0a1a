"""
The compiled engine's loops, for float32, and for float64 in the tests. One function a formula; a minibatch of B rows is a
matrix (n_features, B), so that a layer is W h + b as in a textbook. Importing this module imports numba; what is called for
the first time is compiled, or read from numba's cache on disk.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

Array = np.ndarray[Any, Any]

# Columns of `Network.layers`: sizes, where the layer's weight and bias start in the flat parameters, how many outputs the
# layers before it have together, its activation
N_IN, N_OUT, WEIGHT, BIAS, OUTPUT, ACTIVATION = range(6)
IDENTITY, TANH, RELU = range(3)
# Columns of `Network.settings`, of Adam
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED = range(6)
GAUSSIAN, CATEGORICAL = range(2)
# How a pass of the actor ends
DONE, STOPPED, BAD_OUTPUT, BAD_GRADIENT = range(4)


def compiled(function: Callable[..., Any]) -> Any:
    """Not `fastmath=True`: NaN must stay NaN. Without a cache where numba finds no folder that it may write to."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        return numba.njit(function, **options)


class Network(NamedTuple):
    """A network, its optimizer's state, and space for a minibatch."""

    parameters: Array  # weight and bias of each layer, then the logarithms of standard deviations if there are any (n,)
    gradient: Array  # (n,)
    exp_avg: Array  # Adam's first moments (n,)
    exp_avg_sq: Array  # Adam's second moments (n,)
    layers: Array  # (n_layers, 6)
    spans: Array  # where each trained parameter starts and ends (k, 2)
    settings: Array  # Adam's for each of these (k, 6)
    steps: Array  # number of Adam's steps of each (k,)
    rows: Array  # inputs of a minibatch (batch_size, n_in)
    outputs: Array  # of all layers (batch_size * n_outputs,)
    deltas: Array  # derivatives of the loss by a layer's outputs, layers take turns (2, batch_size * largest n_out)


@compiled
def weight(flat: Array, layer: Array) -> Array:
    return flat[layer[WEIGHT] : layer[BIAS]].reshape(layer[N_OUT], layer[N_IN])


@compiled
def bias(flat: Array, layer: Array) -> Array:
    return flat[layer[BIAS] : layer[BIAS] + layer[N_OUT]]


@compiled
def outputs(flat: Array, layer: Array, B: int) -> Array:
    """A layer's part of `Network.outputs`, or of an array like it (n_out, B)."""
    start, n_out = layer[OUTPUT] * B, layer[N_OUT]
    return flat[start : start + n_out * B].reshape(n_out, B)


@compiled
def deltas(net: Network, i: int, B: int) -> Array:
    """d loss / d h_i, then d loss / d z_i (n_out, B)."""
    n_out = net.layers[i, N_OUT]
    return net.deltas[i % 2, : n_out * B].reshape(n_out, B)


@compiled
def gather(source: Array, index: Array, rows: Array) -> Array:
    """Copy rows of `source` to the first rows of `rows`."""
    for i in range(len(index)):
        for j in range(source.shape[1]):
            rows[i, j] = source[index[i], j]
    return rows[: len(index)]


@compiled
def tanh(z: Array, b: float) -> None:
    """z = tanh(z + b). For float32 the rational function of Eigen and XLA, which vectorises, right to a few last places."""
    f = z.dtype.type
    if z.itemsize != 4:
        for j in range(len(z)):
            z[j] = math.tanh(z[j] + b)
        return
    largest = f(7.90531110763549805)
    a1, a3, a5, a7 = f(4.89352455891786e-03), f(6.37261928875436e-04), f(1.48572235717979e-05), f(5.12229709037114e-08)
    a9, a11, a13 = f(-8.60467152213735e-11), f(2.00018790482477e-13), f(-2.76076847742355e-16)
    b0, b2, b4, b6 = f(4.89352518554385e-03), f(2.26843463243900e-03), f(1.18534705686654e-04), f(1.19825839466702e-06)
    for j in range(len(z)):
        x = z[j] + b
        x = largest if x > largest else x
        x = -largest if x < -largest else x
        s = x * x
        odd = x * (a1 + s * (a3 + s * (a5 + s * (a7 + s * (a9 + s * (a11 + s * a13))))))
        z[j] = odd / (b0 + s * (b2 + s * (b4 + s * b6)))


@compiled
def activate(z: Array, b: Array, activation: int) -> None:
    """h = activation(z + b), in place."""
    zero = z.dtype.type(0)
    for i in range(len(z)):
        row = z[i]
        if activation == TANH:
            tanh(row, b[i])
            continue
        for j in range(len(row)):
            x = row[j] + b[i]
            row[j] = zero if activation == RELU and x < zero else x


@compiled
def times_slope(d: Array, h: Array, activation: int) -> None:
    """d loss / d z = d loss / d h times the activation's derivative, which its output h determines."""
    zero, one, d_flat, h_flat = d.dtype.type(0), d.dtype.type(1), d.reshape(-1), h.reshape(-1)
    if activation == TANH:
        for j in range(len(d_flat)):
            d_flat[j] *= one - h_flat[j] * h_flat[j]
    elif activation == RELU:
        for j in range(len(d_flat)):
            d_flat[j] = zero if h_flat[j] <= zero else d_flat[j]


@compiled
def forward(net: Network, x: Array) -> Array:
    """The network's outputs (n_out, B) of x (B, n_in)."""
    B = len(x)
    for i in range(len(net.layers)):
        layer = net.layers[i]
        W, z = weight(net.parameters, layer), outputs(net.outputs, layer, B)
        if i == 0:
            np.dot(W, x.T, z)
        else:
            np.dot(W, outputs(net.outputs, net.layers[i - 1], B), z)
        activate(z, bias(net.parameters, layer), layer[ACTIVATION])
    return outputs(net.outputs, net.layers[-1], B)


@compiled
def backward(net: Network, x: Array) -> None:
    """The gradient by the layers, after `forward`, from the derivatives by the network's outputs: the last layer's deltas."""
    B = len(x)
    for i in range(len(net.layers) - 1, -1, -1):
        layer, d = net.layers[i], deltas(net, i, B)
        by_bias = bias(net.gradient, layer)
        for k in range(len(d)):
            total = d.dtype.type(0)
            for j in range(B):
                total += d[k, j]
            by_bias[k] = total
        if i == 0:
            np.dot(d, x, weight(net.gradient, layer))
        else:
            h, by_h = outputs(net.outputs, net.layers[i - 1], B), deltas(net, i - 1, B)
            np.dot(d, h.T, weight(net.gradient, layer))
            np.dot(weight(net.parameters, layer).T, d, by_h)
            times_slope(by_h, h, net.layers[i - 1, ACTIVATION])


@compiled
def signals(net: Network, x: Array, flat: Array) -> None:
    """All layers' outputs, kept in the network, and derivatives of each value by each layer's z, in `flat`, laid out alike."""
    B = len(x)
    forward(net, x)
    outputs(flat, net.layers[-1], B)[:] = 1
    for i in range(len(net.layers) - 2, -1, -1):
        layer, after = net.layers[i], net.layers[i + 1]
        d = outputs(flat, layer, B)
        np.dot(weight(net.parameters, after).T, outputs(flat, after, B), d)
        times_slope(d, outputs(net.outputs, layer, B), layer[ACTIVATION])


@compiled
def adam(net: Network, scale: float) -> None:
    """A step of Adam, or of AdamW, along the gradient times `scale`."""
    f = net.parameters.dtype.type
    for k in range(len(net.spans)):
        own, settings = slice(net.spans[k, 0], net.spans[k, 1]), net.settings[k]
        net.steps[k] += 1
        decoupled, decay = settings[DECOUPLED] != 0, settings[WEIGHT_DECAY]
        shrink, penalty, c = f(1 - settings[LR] * decay if decoupled else 1), f(0 if decoupled else decay), f(scale)
        c1, b2, c2, eps = f(1 - settings[BETA1]), f(settings[BETA2]), f(1 - settings[BETA2]), f(settings[EPS])
        step_size = f(settings[LR] / (1 - settings[BETA1] ** net.steps[k]))
        root = f(math.sqrt(1 - settings[BETA2] ** net.steps[k]))
        parameters, gradient, exp_avg, exp_avg_sq = (
            net.parameters[own],
            net.gradient[own],
            net.exp_avg[own],
            net.exp_avg_sq[own],
        )
        for i in range(len(parameters)):
            p = parameters[i] * shrink
            g = c * gradient[i] + penalty * p
            m = exp_avg[i] + c1 * (g - exp_avg[i])
            v = b2 * exp_avg_sq[i] + c2 * g * g
            exp_avg[i], exp_avg_sq[i] = m, v
            parameters[i] = p - step_size * m / (np.sqrt(v) / root + eps)


@compiled
def squared_error(values: Array, returns: Array, index: Array, d: Array) -> float:
    """The mean of (V - R)^2 over a minibatch; its derivatives by V to `d`."""
    loss, B = values.dtype.type(0), values.dtype.type(len(index))
    for j in range(len(index)):
        error = values[j] - returns[index[j]]
        loss += error * error
        d[j] = 2 * error / B
    return loss / B


@compiled
def fit_critic(net: Network, x: Array, returns: Array, index: Array, starts: Array, losses: Array) -> None:
    """
    Steps of the critic's optimizer on features x (n, n_in) and returns (n,), in minibatches of the rows
    index[starts[k]:starts[k + 1]]; their losses are written.
    """
    for k in range(len(losses)):
        rows = index[starts[k] : starts[k + 1]]
        x_k = gather(x, rows, net.rows)
        d = deltas(net, len(net.layers) - 1, len(rows))
        losses[k] = squared_error(forward(net, x_k)[0], returns, rows, d[0])
        backward(net, x_k)
        adam(net, 1.0)


@compiled
def values(net: Network, x: Array, out: Array) -> None:
    """V(s) to `out` (n,), from features x (n, n_in)."""
    for start in range(0, len(x), len(net.rows)):
        part = x[start : start + len(net.rows)]
        out[start : start + len(part)] = forward(net, part)[0]


@compiled
def gaussian(mean: Array, log_std: Array, actions: Array, log_prob: Array, entropy: Array) -> bool:
    """Add log-probabilities and entropies. Return whether all standard deviations are positive."""
    f = mean.dtype.type
    for k in range(len(mean)):
        std, constant = np.exp(log_std[k]), log_std[k] + f(0.5 * math.log(2 * math.pi))
        if not std > 0:
            return False
        for j in range(mean.shape[1]):
            error = actions[j, k] - mean[k, j]
            log_prob[j] -= error * error / (f(2) * std * std) + constant
            entropy[j] += f(0.5) + constant
    return True


@compiled
def gaussian_gradient(
    mean: Array, log_std: Array, actions: Array, by_log_prob: Array, by_entropy: float, d: Array, d_log_std: Array
) -> None:
    for k in range(len(mean)):
        variance, total = np.exp(log_std[k]) * np.exp(log_std[k]), mean.dtype.type(0)
        for j in range(mean.shape[1]):
            error = actions[j, k] - mean[k, j]
            d[k, j] = by_log_prob[j] * error / variance
            total += by_log_prob[j] * (error * error / variance - 1) + by_entropy
        d_log_std[k] = total


@compiled
def categorical(logits: Array, actions: Array, log_prob: Array, entropy: Array) -> None:
    """Add log-probabilities and entropies of one choice; the logits become the choices' log-probabilities."""
    f = logits.dtype.type
    for j in range(logits.shape[1]):
        largest, total = logits[:, j].max(), f(0)
        for k in range(len(logits)):
            total += np.exp(logits[k, j] - largest)
        log_total = largest + np.log(total)
        for k in range(len(logits)):
            logits[k, j] -= log_total
            p = np.exp(logits[k, j])
            entropy[j] -= f(0) if p == 0 else p * logits[k, j]
        is_choice = 0 <= actions[j] < len(logits)
        log_prob[j] += logits[int(actions[j]), j] if is_choice else f(np.nan)


@compiled
def categorical_gradient(log_p: Array, actions: Array, by_log_prob: Array, by_entropy: float, d: Array) -> None:
    f = log_p.dtype.type
    for j in range(log_p.shape[1]):
        entropy = f(0)
        for k in range(len(log_p)):
            d[k, j] = np.exp(log_p[k, j])
            entropy -= f(0) if d[k, j] == 0 else d[k, j] * log_p[k, j]
        for k in range(len(log_p)):
            p, chosen = d[k, j], f(1) if k == int(actions[j]) else f(0)
            by_p = f(0) if p == 0 else by_entropy * p * (log_p[k, j] + entropy)
            d[k, j] = by_log_prob[j] * (chosen - p) - by_p


@compiled
def evaluate(net: Network, kind: int, choices: Array, y: Array, actions: Array, log_prob: Array, entropy: Array) -> bool:
    """
    log pi(a|s) and entropies, written (B,), from outputs y (n_out, B) and actions (B, n_actions). Return whether the outputs
    are parameters of a distribution. The logits of categorical actions, as many as `choices` for each, are normalised; in
    `actions` their masks may follow (B, n_actions + n_out), 0 where sb3-contrib forbids a choice.
    """
    log_prob[:], entropy[:] = 0, 0
    if kind == GAUSSIAN:
        if not gaussian(y, net.parameters[-len(y) :], actions, log_prob, entropy):
            return False
    else:
        masks, start = actions[:, len(choices) :], 0
        for j in range(len(masks)):
            for k in range(masks.shape[1]):
                if masks[j, k] == 0:
                    y[k, j] = -1e8
        for k in range(len(choices)):
            categorical(y[start : start + choices[k]], actions[:, k], log_prob, entropy)
            start += choices[k]
    return not (np.isnan(log_prob).any() or np.isnan(entropy).any())


@compiled
def evaluate_gradient(
    net: Network, kind: int, choices: Array, y: Array, actions: Array, by_log_prob: Array, by_entropy: float, d: Array
) -> None:
    """From derivatives of the loss by log-probabilities and by each entropy to those by outputs and standard deviations."""
    if kind == GAUSSIAN:
        log_std, by_log_std = net.parameters[-len(y) :], net.gradient[-len(y) :]
        gaussian_gradient(y, log_std, actions, by_log_prob, by_entropy, d, by_log_std)
        return
    start = 0
    for k in range(len(choices)):
        part = slice(start, start + choices[k])
        categorical_gradient(y[part], actions[:, k], by_log_prob, by_entropy, d[part])
        start += choices[k]


@compiled
def log_probs(net: Network, kind: int, choices: Array, x: Array, actions: Array, out: Array) -> bool:
    """log pi(a|s) to `out` (n,). Return whether the actor's outputs are parameters of a distribution."""
    entropy = np.empty_like(out)
    for start in range(0, len(x), len(net.rows)):
        own = slice(start, min(start + len(net.rows), len(x)))
        y = forward(net, x[own])
        if not evaluate(net, kind, choices, y, actions[own], out[own], entropy[own]):
            return False
    return True


@compiled
def sample(kind: int, choices: Array, y: Array, log_std: Array, noise: Array, actions: Array) -> None:
    """Actions (B, n_actions) from noise (B, n_out): standard normal for a Gaussian, else standard exponential."""
    for j in range(y.shape[1]):
        if kind == GAUSSIAN:
            for k in range(len(y)):
                actions[j, k] = y[k, j] + np.exp(log_std[k]) * noise[j, k]
            continue
        start = 0
        for k in range(len(choices)):  # the first arrival among exponential waiting times
            logits = y[start : start + choices[k], j]
            actions[j, k] = np.argmax(np.exp(logits - logits.max()) / noise[j, start : start + choices[k]])
            start += choices[k]


@compiled
def act(
    actor: Network, critic: Network, kind: int, choices: Array, x: Array, noise: Array, actions: Array, values: Array,
    log_prob: Array,
) -> bool:  # fmt: skip
    """Actions, values and log-probabilities, written. Return whether the actor's outputs are parameters of a distribution."""
    y = forward(actor, x)
    sample(kind, choices, y, actor.parameters[-len(y) :], noise, actions)
    is_distribution = evaluate(actor, kind, choices, y, actions, log_prob, values)
    values[:] = forward(critic, x)[0]
    return is_distribution


@compiled
def surrogate(log_prob: Array, old_log_prob: Array, W: Array, index: Array, clip_range: float, row: Array) -> None:
    """
    PPO's loss, minus the mean of min(rho W, clip(rho) W). Derivatives by the log-probabilities replace them; approximate KL
    divergence, fraction of clipped ratios and the loss go to `row`.
    """
    f = log_prob.dtype.type
    B, low, high = f(len(index)), f(1 - clip_range), f(1 + clip_range)
    kl, n_clipped, loss = f(0), 0, f(0)
    for j in range(len(index)):
        w, log_ratio = W[index[j]], log_prob[j] - old_log_prob[index[j]]
        ratio = np.exp(log_ratio)
        clipped = low if ratio < low else high if ratio > high else ratio
        kl += ratio - 1 - log_ratio
        n_clipped += abs(ratio - 1) > clip_range
        is_active = ratio * w <= clipped * w
        loss -= ratio * w if is_active else clipped * w
        log_prob[j] = -(w if is_active else f(0)) / B * ratio
    row[0], row[1], row[2] = kl / B, n_clipped / B, loss / B


@compiled
def gradient_norm(net: Network) -> float:
    total = net.gradient.dtype.type(0)
    for k in range(len(net.spans)):
        for g in net.gradient[net.spans[k, 0] : net.spans[k, 1]]:
            total += g * g
    return np.sqrt(total)


@compiled
def improve_actor(
    net: Network, kind: int, choices: Array, x: Array, actions: Array, old_log_prob: Array, W: Array, index: Array,
    starts: Array, clip_range: float, ent_coef: float, max_grad_norm: float, kl_limit: float, stats: Array,
) -> tuple[int, int]:  # fmt: skip
    """
    A pass of PPO's steps with W for advantages.

    :param kl_limit: The pass ends before a step where the approximate KL divergence is above it
    :param stats: KL divergence, fraction of clipped ratios, policy loss, entropy loss and loss, written (n_minibatches, 5)
    :return: Over how many minibatches, and how it ended
    """
    f = x.dtype.type
    batch_actions, scratch = np.empty((len(net.rows), actions.shape[1]), x.dtype), np.empty((2, len(net.rows)), x.dtype)
    for k in range(len(stats)):
        rows, row = index[starts[k] : starts[k + 1]], stats[k]
        B = len(rows)
        x_k, a_k = gather(x, rows, net.rows), gather(actions, rows, batch_actions)
        log_prob, entropy, d = scratch[0, :B], scratch[1, :B], deltas(net, len(net.layers) - 1, B)
        y = forward(net, x_k)
        if not evaluate(net, kind, choices, y, a_k, log_prob, entropy):
            return k, BAD_OUTPUT
        surrogate(log_prob, old_log_prob, W, rows, clip_range, row)
        row[3] = -entropy.mean()
        row[4] = row[2] + f(ent_coef) * row[3]
        evaluate_gradient(net, kind, choices, y, a_k, log_prob, f(-ent_coef / B), d)
        backward(net, x_k)
        norm = gradient_norm(net)
        if not np.isfinite(norm):
            return k, BAD_GRADIENT
        if row[0] > kl_limit:
            return k + 1, STOPPED
        adam(net, min(1.0, max_grad_norm / (norm + 1e-6)))
    return len(stats), DONE

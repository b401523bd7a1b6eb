"""One right answer to each exercise of the course. Lecturers: do not hand this out."""

import math

import torch
from scipy.stats import chi2


def _kl(r, p):
    return (torch.xlogy(r, r) - torch.xlogy(r, p)).sum(-1)


def posterior(prior, q, eta):
    w = prior * torch.exp((q - q.max()) / eta)
    return w / w.sum()


def gap(r, prior, q, eta):
    return eta * _kl(r, posterior(prior, q, eta))


def repeated(prior, q, eta, k):
    for _ in range(k):
        prior = posterior(prior, q, eta)
    return prior


def gaussian_posterior(s, g, eta):
    return s**2 * g / eta, s, (s * g / eta) ** 2 / 2


def dual_minimum(s, g, eps):
    return s * abs(g) / math.sqrt(2 * eps), s * abs(g) * math.sqrt(2 * eps)


def eta_of_particles(q, eps, floor):
    def kl(eta):
        w = torch.softmax(q / eta, -1)
        return math.log(len(q)) + torch.xlogy(w, w).sum()

    if kl(floor) <= eps:
        return floor
    low, high = math.log(floor), math.log(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        if kl(math.exp(middle)) > eps:
            low = middle
        else:
            high = middle
    return math.exp(low)


def weighted_fit(actions, weights):
    mean = (weights * actions).sum()
    return mean, (weights * (actions - mean) ** 2).sum()


def chunk_kl(new, old):
    return _kl(new.sum(1), old.sum(1)), _kl(new.flatten(), old.flatten())


def chunk_target(rewards, valid, terminated, discount, next_value):
    powers = discount ** torch.arange(rewards.shape[1])
    returns = (valid * powers * rewards).sum(1)
    return returns + discount ** valid.sum(1) * (1 - terminated) * next_value


def two_targets(reward, behaviour):
    return reward @ behaviour, reward.max(1).values


def two_loops(reward, chance):
    return (chance @ reward).max(), chance @ reward.max(1).values


def posterior_weights(q, eta):
    w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)
    return w / w.sum(-1, keepdim=True)


def effective(weights):
    n = weights.shape[-1]
    kl = math.log(n) + torch.xlogy(weights, weights).sum(-1)
    return 1 / weights.square().sum(-1) / n, kl


def resampled(weights, particles, start):
    teeth = (torch.arange(particles) + start) / particles
    picks = torch.searchsorted(weights.cumsum(0), teeth.to(weights.dtype), right=True)
    return picks.clamp(max=len(weights) - 1)


def true_gain(claimed, tau, sigma):
    return claimed * tau**2 / (tau**2 + sigma**2)


def forward_fit(shares, means, stds):
    mean = (shares * means).sum()
    return mean, (shares * (stds**2 + (means - mean) ** 2)).sum()


def habit_loss(a, mu, s):
    return math.pi / 4 * ((a - mu) ** 2 / s + s)


def alive(zeta, s, d):
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    v = s**2 / ((1 - t) ** 2 + t**2 * s**2)
    return chi2.cdf(d * zeta / v.numpy(), d).mean()


def clipped(losses, weights, zeta):
    return (weights.detach() * losses.clamp(0, zeta)).sum(-1)


def improve(pi, demos, q, eta, beta):
    return (demos + beta * posterior(pi, q, eta)) / (1 + beta)


def fixed_point(demos, q, eta, beta):
    pi = demos
    for _ in range(1000):
        pi = improve(pi, demos, q, eta, beta)
    return pi


def best_mass(share, p, beta):
    return 1 - share * (1 - p) / (share + beta)


def width(surrogate, zeta, d):
    t = (torch.arange(2000, dtype=torch.float64).numpy() + 0.5) / 2000

    def mean_loss(s):
        v = s**2 / ((1 - t) ** 2 + t**2 * s**2)
        x = d * zeta / v
        return (v * chi2.cdf(x, d + 2) + zeta * chi2.sf(x, d)).mean()

    low, high = 1e-3, 3.0
    for _ in range(20):
        middle = (low + high) / 2
        if mean_loss(middle) < surrogate:
            low = middle
        else:
            high = middle
    return low

"""The exercises of the course: fill in the blanks. This one file is what you hand in.

    python -m course check            # all of them, or one unit: python -m course check 4

Write your prediction first, then the code. Each blank needs one to eight lines. The checker calls
your functions with fresh numbers. It says right, or it names the mistake it recognises. Leave
`raise NotImplementedError` in what you have not tried.

All inputs are torch tensors in float64, or plain numbers. Return tensors of the shape in the
docstring, or plain numbers. You may use torch, math, and scipy.

Shapes: B rows (states), N candidates, H chunk length. Sums and maxima over candidates go over the
last dimension.
"""

import math  # noqa: F401

import torch  # noqa: F401

# ---- 1. Inference --------------------------------------------------------------------------------


def posterior(prior, q, eta):
    """1a. The best policy on a finite set: prior (N,), q (N,), eta -> probabilities (N,).

    Some q are near 1000 and some eta are 0.01: the result must stay finite. The prior may hold
    zeros.
    """
    raise NotImplementedError


def gap(r, prior, q, eta):
    """1b. How much less r earns than the best policy, J(q*) - J(r) -> scalar.

    J(r) = E_r[Q] - eta KL(r || prior), and all probabilities are positive.
    """
    raise NotImplementedError


def repeated(prior, q, eta, k):
    """1c. The policy after k steps: the posterior of one step is the prior of the next -> (N,)."""
    raise NotImplementedError


# ---- 2. The Gaussian, MPO ------------------------------------------------------------------------


def gaussian_posterior(s, g, eta):
    """2a. The posterior of N(0, s^2) under Q(a) = g a -> (mean, standard deviation, KL to prior).

    Three plain numbers.
    """
    raise NotImplementedError


def dual_minimum(s, g, eps):
    """2b. Where eta eps + s^2 g^2 / (2 eta) is smallest, and its value there -> (eta, value)."""
    raise NotImplementedError


def eta_of_particles(q, eps, floor):
    """2c. The eta at which KL(weights || uniform) = eps, for one state's q (N,) -> number.

    weights = softmax(q / eta). The KL must be right to 1e-4. It falls as eta grows, so bisect
    log(eta), between the floor and 1e4. Where even the floor gives a KL below eps there is no
    solution: return the floor.
    """
    raise NotImplementedError


def weighted_fit(actions, weights):
    """2d. Fit a Gaussian by weighted maximum likelihood: (N,), (N,) -> (mean, variance).

    The weights are positive and sum to 1. MPO's decoupled fit takes the variance around the old
    mean; here take it around the new one.
    """
    raise NotImplementedError


# ---- 3. Chunks -----------------------------------------------------------------------------------


def chunk_kl(new, old):
    """3a. KL(new || old) of two-step chunks: new, old (K, K) -> (first action's KL, chunk's KL).

    new[i, j] is the probability of action i and then action j. All entries are positive.
    """
    raise NotImplementedError


def chunk_target(rewards, valid, terminated, discount, next_value):
    """3b. The critic's targets, one per row -> (B,).

    rewards (B, H), valid (B, H), terminated (B,), discount a number, next_value (B,). Row b has k
    real steps: valid is 1 for those and 0 after them. Add the discounted rewards of the real steps.
    Where the episode went on, add discount^k times the next value. A terminated episode has no
    next value.
    """
    raise NotImplementedError


def two_targets(reward, behaviour):
    """3c. reward (K, K) of actions (a1, a2), behaviour (K,) = the data's p(a2) -> (K,), (K,).

    First the two-step target of each a1: it averages over what the data did next. Then the chunk
    critic's value of the best chunk that starts with each a1.
    """
    raise NotImplementedError


def two_loops(reward, chance):
    """3d. reward (C, K) of coin and action, chance (C,) of the coin -> (open loop, closed loop).

    Open loop: the best action that is chosen before the coin falls. Closed loop: the action may
    depend on the coin.
    """
    raise NotImplementedError


# ---- 4. Particles --------------------------------------------------------------------------------


def posterior_weights(q, eta):
    """4a. Weights of N candidates that were drawn from the policy: q (B, N) -> (B, N).

    Rows sum to 1. Some q are near 1e6 and some eta are 0.001: the result must stay finite.
    """
    raise NotImplementedError


def effective(weights):
    """4b. weights (B, N) -> (ESS/N (B,), KL(weights || uniform) (B,)). Some weights are zero."""
    raise NotImplementedError


def resampled(weights, particles, start):
    """4c. Systematic resampling of one state: weights (N,), M = particles -> indices (M,).

    Lay a comb with teeth at (m + start) / M, m = 0 ... M - 1, over the running sum of the weights.
    Candidate j owns the stretch from the sum before it up to the sum with it. Each tooth picks the
    candidate in whose stretch it lies. start is in [0, 1).
    """
    raise NotImplementedError


def true_gain(claimed, tau, sigma):
    """4d. What a claim is worth: claimed (B,) -> the expected true value (B,).

    True values are N(0, tau^2), and the critic adds noise N(0, sigma^2). This is the mean of the
    true value, given the claim.
    """
    raise NotImplementedError


# ---- 5. Projection, flow, clip -------------------------------------------------------------------


def forward_fit(shares, means, stds):
    """5a. The Gaussian closest to a mixture in forward KL: three times (K,) -> (mean, variance)."""
    raise NotImplementedError


def habit_loss(a, mu, s):
    """5b. The ideal network's mean flow-matching loss of actions a (B,), for one habit N(mu, s^2).

    Per cell, averaged over noise and flow time -> (B,).
    """
    raise NotImplementedError


def alive(zeta, s, d):
    """5c. The share of draws with loss <= zeta, for a habit of width s and d cells -> number.

    At time t the loss is v(t) times a chi-square with d degrees of freedom, divided by d, with
    v(t) = s^2 / ((1 - t)^2 + t^2 s^2). Average over t from 0 to 1; 0.001 is close enough.
    scipy.stats.chi2.cdf(x, d) is the chi-square's distribution function.
    """
    raise NotImplementedError


def clipped(losses, weights, zeta):
    """5d. The second term of POCO's objective: losses (B, N), weights (B, N) -> (B,).

    Its gradient with respect to the losses is the weight at or below zeta, and exactly zero above.
    No gradient may reach the weights.
    """
    raise NotImplementedError


# ---- 6. POCO -------------------------------------------------------------------------------------


def improve(pi, demos, q, eta, beta):
    """6a. One exact iteration, one part of demos and beta parts of the posterior: (N,) -> (N,)."""
    raise NotImplementedError


def fixed_point(demos, q, eta, beta):
    """6b. Where the iteration of 6a ends -> (N,). Iterating until nothing changes is allowed."""
    raise NotImplementedError


def best_mass(share, p, beta):
    """6c. The best action's final mass at a tiny eta -> number.

    A part `share` of the replay is demonstrations, which show the best action with probability p.
    The rest is the policy's own actions.
    """
    raise NotImplementedError


def width(surrogate, zeta, d):
    """6d. The width s at which E[min(loss, zeta)] equals the logged surrogate -> number, to 1e-3.

    The loss is that of 5c. For x = d zeta / v(t), the mean of min(loss, zeta) at time t is
    v(t) chi2.cdf(x, d + 2) + zeta chi2.sf(x, d). It grows with s, so bisect s between 1e-3 and 3.
    """
    raise NotImplementedError

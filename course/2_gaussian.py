# %% [markdown]
# # 2. Where a likelihood exists: MPO, and POCO beside it
#
# Run it: `python course/2_gaussian.py` takes 15 seconds of CPU and draws one figure.
#
# The posterior of unit 1 needs two things: a list of actions, and their probabilities. A robot's
# actions are continuous, so there is no list. If the policy is a Gaussian, there are formulas
# instead, and the classic method is MPO, Maximum a Posteriori Policy Optimization. This unit runs
# it, and then runs POCO on the same demonstrations with the same critic.

# %%
import math

import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt
from scipy.optimize import brentq

from poco import e_step, posterior_weights

toy.start()

# %% [markdown]
# ## One Gaussian, one slope
#
# Let the policy be a Gaussian with mean 0 and standard deviation s. Let the value be a slope:
# Q(a) = g a. Multiply the Gaussian by exp(Q/eta) and complete the square. The result is again a
# Gaussian, it has the same width, and its mean has moved to s^2 g / eta. The step costs
# KL = s^2 g^2 / (2 eta^2).
#
# **Predict:** s is 0.5, g is 2, eta is 1. How far does the mean move? Does the width change?

# %%
s, g = 0.5, 2.0
line = torch.linspace(-6, 6, 4001, dtype=torch.float64)
density = torch.softmax(-(line**2) / (2 * s**2) + g * line / 1.0, 0)
mean = (density * line).sum()
toy.expect("the posterior's mean at eta 1", mean, 0.5, 1e-6)
toy.expect(
    "the posterior's standard deviation", (density * (line - mean) ** 2).sum().sqrt(), s, 1e-6
)

# %% [markdown]
# ## The dual: let the step length choose the temperature
#
# A temperature is hard to choose, because it is measured in units of value. MPO asks for a step
# length instead: KL at most eps nats. The temperature is then the minimum of the dual function,
#
#     dual(eta) = eta eps + eta log E_pi[exp(Q/eta)].
#
# On our slope the dual is eta eps + s^2 g^2 / (2 eta). Its minimum is at
# eta = s |g| / sqrt(2 eps), and there the dual's value is s |g| sqrt(2 eps).
#
# **Predict:** eps is 0.1. What is eta?


# %%
def dual(eta, eps):
    """The dual function of the slope."""
    return eta * eps + (s * g) ** 2 / (2 * eta)


eps = 0.1
etas = torch.linspace(0.3, 8, 77_001, dtype=torch.float64)
lowest = dual(etas, eps).argmin()
toy.expect("the dual's minimum is at eta", etas[lowest], 2.2361, 1e-4, "a grid of 0.0001")
toy.expect("the dual's value there", dual(etas[lowest], eps), 0.4472, 1e-4)

# %% [markdown]
# ## The dual of particles
#
# With samples, the expectation in the dual is a mean over N candidates. At the minimum the weights
# satisfy KL(weights || uniform) = eps. This KL falls as eta grows, so bisection finds eta. But N
# weights can never be further than log N from uniform. With 8 candidates and eps above log 8 there
# is no solution, and the code must return its smallest temperature.


# %%
def kl_to_uniform(weights):
    """KL(weights || uniform), a mean over rows: weights (B, N) -> scalar."""
    return math.log(weights.shape[-1]) + torch.xlogy(weights, weights).sum(-1).mean()


def eta_of_particles(q, eps, floor=1e-3):
    """Solve KL(weights || uniform) = eps for eta, or return the floor: q (B, N) -> eta."""

    def excess(log_eta):
        return float(kl_to_uniform(posterior_weights(q, math.exp(log_eta)))) - eps

    if excess(math.log(floor)) <= 0:
        return floor
    return math.exp(brentq(excess, math.log(floor), math.log(1e4)))


for n, expected, spread in ((8, 1.91, 0.54), (128, 2.21, 0.17)):
    found = torch.tensor([eta_of_particles(g * s * torch.randn(1, n), eps) for _ in range(500)])
    toy.expect(f"eta from one state's N = {n}, mean", found.mean(), expected, 0.1, "500 states")
    toy.expect("  and its standard deviation", found.std(), spread, 0.1, "500 states")
eight = torch.randn(1, 8).double()
weights = posterior_weights(eight, eta_of_particles(eight, eps))
toy.expect("KL(weights || uniform) at the solution", kl_to_uniform(weights), eps, 1e-4, "one state")
toy.expect("no solution: eps 2.2 > log 8 returns", eta_of_particles(eight, 2.2), 1e-3, 0)

# %% [markdown]
# ## No signal, and still a change
#
# Fit a Gaussian to N samples by weighted maximum likelihood, and let the value be flat. All weights
# are equal, so nothing should happen. **Predict:** what is the variance after 20 iterations with 16
# samples each?
#
# The fitted mean sits in the middle of its own samples, and so the fitted variance is too small: on
# average by the factor 1 - 1/N. Every iteration pays again.


# %%
def weighted_fit(actions, weights):
    """Fit a Gaussian by weighted maximum likelihood: (n, A), (n,) -> mean (A,), cov (A, A)."""
    mean = (weights[:, None] * actions).sum(0)
    off = actions - mean
    return mean, (weights[:, None] * off).T @ off


chains = 4000
mean, variance = torch.zeros(chains, 1), torch.ones(chains, 1)
for _ in range(20):
    draws = mean + variance.sqrt() * torch.randn(chains, 16)
    mean, variance = draws.mean(1, keepdim=True), draws.var(1, keepdim=True, correction=0)
toy.expect("variance after 20 flat iterations, N 16", variance.mean(), 0.275, 0.03, "4,000 chains")
toy.expect("  and the formula (1 - 1/N)^20", (1 - 1 / 16) ** 20, 0.275, 1e-3)


# %% [markdown]
# MPO's cure is to limit the mean and the covariance separately: the decoupled KL. Take the weighted
# mean, but go only as far towards it as eps_mean allows. Take the weighted second moment around the
# *old* mean, and mix it with the old covariance until eps_cov is met.
#
# **Predict:** the value is a slope of 1, eta is 1, N is 16. The exact answer moves the mean by 1 in
# every iteration and keeps the width. Where is the mean after 20 iterations of the plain fit?


# %%
def decoupled(mean, cov, actions, weights, eps_mean, eps_cov):
    """Fit with separate limits on mean and covariance: (..., n, A), (..., n) summing to 1."""
    target = (weights[:, None] * actions).sum(0)
    inverse = torch.linalg.inv(cov)
    kl_mean = float((target - mean) @ inverse @ (target - mean)) / 2
    off = actions - mean  # around the OLD mean
    seen = (weights[:, None] * off).T @ off

    def mixed(log_mix):
        mix = math.exp(log_mix)
        return (seen + mix * cov) / (1 + mix)

    def excess(log_mix):
        ratio = inverse @ mixed(log_mix)
        kl = (torch.trace(ratio) - len(mean) - torch.logdet(ratio)) / 2
        return float(kl) - eps_cov

    new_cov = seen if excess(-12) <= 0 else mixed(brentq(excess, -12, 14))
    step = 1.0 if kl_mean == 0 else min(1.0, math.sqrt(eps_mean / kl_mean))
    return mean + step * (target - mean), new_cov


chains = {"plain": 100, "decoupled": 40}
ends = {"plain": [], "decoupled": []}
for name, end in ends.items():
    for _ in range(chains[name]):
        mean, cov = torch.zeros(1), torch.ones(1, 1)
        for _ in range(20):
            draws = mean + cov.sqrt() * torch.randn(16, 1)
            weights = posterior_weights(draws.T, 1.0)[0]
            if name == "plain":
                mean, cov = weighted_fit(draws, weights)
            else:
                mean, cov = decoupled(mean, cov, draws, weights, 0.1, 0.001)
        end.append((float(mean), float(cov.sqrt())))
plain = torch.tensor(ends["plain"]).mean(0)
limited = torch.tensor(ends["decoupled"]).mean(0)
toy.expect("plain fit after 20 iterations: mean (exact 20)", plain[0], 4.3, 0.8, "100 chains")
toy.expect("plain fit: standard deviation (exact 1)", plain[1], 0.166, 0.05, "100 chains")
toy.expect("decoupled fit: mean", limited[0], 9.6, 0.4, "40 chains")
toy.expect("decoupled fit: standard deviation", limited[1], 1.30, 0.06, "40 chains")

# %% [markdown]
# ## MPO beside POCO, on six habits
#
# Now the toy of this course. A demonstrator has six habits around a circle. The critic says
# Q = 2x + y everywhere. The truth agrees near a habit, and is -2 everywhere else: the critic
# extrapolates, as critics do. Both methods get the same demonstrations and the same critic.
#
# A Gaussian cannot hold six habits. Its clone is one wide cloud, and its middle lies where nobody
# ever acted. **Predict:** which method claims more? Which one gets more?


# %%
def report(name, actions):
    """Return claimed value, true value, share near a habit, and share outside the box."""
    return {
        "name": name,
        "actions": actions,
        "claimed": float(toy.value(actions).mean()),
        "true": float(toy.true_value(actions).mean()),
        "on": float(toy.on_habit(actions).float().mean()),
        "out": float((actions.abs() > 1).any(-1).float().mean()),
    }


def gaussian(mean, cov, n=20_000):
    """Draw n actions of a Gaussian."""
    return mean + torch.randn(n, 2) @ torch.linalg.cholesky(cov).T


slope = torch.tensor([2.0, 1.0])
zero = torch.zeros(2)
spread = (0.65**2 / 2 + toy.WIDTH**2) * torch.eye(2)  # the demonstrations' covariance


def mpo(mean, cov, eta=None, eps=None, limits=None):
    """One MPO iteration with 1024 x 64 particles, at a fixed eta or at the dual's."""
    candidates = gaussian(mean, cov, 1024 * 64).view(1024, 64, 2)
    q = toy.value(candidates)
    weights = posterior_weights(q, eta or eta_of_particles(q, eps))
    flat, share = candidates.flatten(0, 1), weights.flatten() / 1024
    if limits is None:
        return weighted_fit(flat, share)
    return decoupled(mean, cov, flat, share, *limits)


rows = [report("Gaussian clone, no RL", gaussian(zero, spread))]
exact_mean = spread @ slope / toy.ETA
rows.append(report("MPO, exact E-step", gaussian(exact_mean, spread)))
rows.append(report("MPO, particles", gaussian(*mpo(zero, spread, eta=toy.ETA))))
rows.append(report("MPO, dual eps 0.5", gaussian(*mpo(zero, spread, eps=0.5))))
mean, cov = zero, spread
for iteration in range(1, 6):
    mean, cov = mpo(mean, cov, eps=0.1, limits=(0.1, 0.01))
    if iteration in (1, 5):
        rows.append(report(f"MPO, decoupled, iteration {iteration}", gaussian(mean, cov)))

torch.manual_seed(0)
prior = toy.clone()
context = toy.NOTHING.expand(toy.STATES, 1)


def critic(context, candidates):
    """What the E-step asks: (B, N, 1, 2) -> (B, N)."""
    return toy.value(candidates[:, :, 0])


candidates, weights, stats = e_step(prior, critic, context, 64, toy.ETA)
policy = toy.m_step(prior, candidates, weights, guidance=50, steps=800)
rows.append(report("POCO, the same flow", toy.actions_of(policy)))

print(f"\n{'one iteration':30s} claimed    true  on-habit  outside the box")
for row in rows:
    print("{name:30s} {claimed:7.2f} {true:7.2f} {on:9.2f} {out:9.2f}".format(**row))
print()
# Means of 12 seeds; the tolerance is three standard deviations of the noisiest row.
expected = (
    ("claimed", "claimed", (0.0, 2.21, 1.82, 1.04, 0.46, 2.79, 1.22), 0.08),
    ("on", "near a habit", (0.61, 0.30, 0.42, 0.56, 0.59, 0.22, 0.99), 0.03),
)
for column, words, numbers, tolerance in expected:
    for row, number in zip(rows, numbers):
        toy.expect(f"{row['name']}: {words}", row[column], number, tolerance, "20,000 actions")
toy.expect("Gaussian clone: true", rows[0]["true"], -0.78, 0.03, "20,000 actions")
toy.expect("MPO, exact E-step: true", rows[1]["true"], -1.03, 0.03, "20,000 actions")
toy.expect("MPO, particles: outside the box", rows[2]["out"], 0.325, 0.03, "20,000 actions")

# %% [markdown]
# MPO claims more, and it claims it by acting where nobody demonstrated. POCO's candidates come from
# a policy that can hold six habits, so its weights choose among things that people did.
#
# ## The fair counter-example
#
# Give the demonstrator one habit, a Gaussian, and let the value be a bowl around (0.3, 0.2). Now
# the Gaussian policy is exactly right, and MPO has the exact answer in a hundredth of a second. The
# flow takes a few seconds and is a little off. Where a likelihood exists, use it.

# %%
home, width = torch.tensor([[-0.3, 0.0]]), 0.25
goal = torch.tensor([0.3, 0.2])
precision = 1 / width**2 + 2 / toy.ETA
exact_mean = (home[0] / width**2 + 2 * goal / toy.ETA) / precision
toy.expect("one habit, exact: mean x", exact_mean[0], -0.18, 1e-6)
toy.expect("one habit, exact: mean y", exact_mean[1], 0.04, 1e-6)
toy.expect("one habit, exact: standard deviation", precision**-0.5, 0.2236, 1e-4)


def bowl(actions):
    """The counter-example's value."""
    return -(actions - goal).square().sum(-1)


draws = gaussian(home[0], width**2 * torch.eye(2), 128 * 64)
weights = posterior_weights(bowl(draws).view(128, 64), toy.ETA)
mean, cov = weighted_fit(draws, weights.flatten() / 128)
toy.expect("one habit, MPO: mean x", mean[0], -0.18, 0.02, "8,192 particles")
toy.expect("one habit, MPO: mean y", mean[1], 0.04, 0.02, "8,192 particles")
mpo_width = cov.diag().mean().sqrt()
toy.expect("one habit, MPO: standard deviation", mpo_width, 0.224, 0.01, "8,192 particles")

single = toy.clone(steps=1000, habits=home, width=width)
single.flow_steps = 100  # 20 Euler steps would shrink a width of 0.25 to 0.224
candidates, weights, _ = e_step(single, lambda _, a: bowl(a[:, :, 0]), context, 64, toy.ETA)


def home_anchor(n):
    """Demonstrations of the one habit."""
    return toy.demonstrations(n, home, width)


distilled = toy.m_step(single, candidates, weights, 50, anchor=home_anchor, steps=600)
flow = toy.actions_of(distilled)
toy.expect("one habit, POCO's flow: mean x", flow[:, 0].mean(), -0.18, 0.04, "20,000 actions")
toy.expect("one habit, POCO's flow: mean y", flow[:, 1].mean(), 0.04, 0.04, "20,000 actions")
flow_width = flow.std(0).mean()
toy.expect("one habit, POCO's flow: std", flow_width, 0.2236, 0.03, "20,000 actions")

# %% [markdown]
# ## The figure
#
# Left: the dual for three step lengths, and where its minimum sits. Then the same iteration twice:
# a Gaussian policy steps off the habits, a flow chooses among them. Dotted circles are where the
# critic tells the truth.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained")
for one, colour in ((0.02, toy.PURPLE), (0.1, toy.BLUE), (0.5, toy.ORANGE)):
    curve = torch.linspace(0.25, 8, 400)
    lowest = s * g / math.sqrt(2 * one)
    axes[0].plot(curve, dual(curve, one), color=colour, label=f"eps {one}: eta* = {lowest:.2f}")
    axes[0].plot(lowest, dual(lowest, one), "o", color=colour, ms=9)
axes[0].set(xlabel="temperature eta", ylabel="dual(eta)", ylim=(0, 2.5), xlim=(0, 8))
axes[0].set_title("the dual's minimum chooses eta")
axes[0].legend()
for axis, row, name in ((axes[1], rows[2], "MPO"), (axes[2], rows[-1], "POCO")):
    title = f"{name}: claims {row['claimed']:.2f}, gets {row['true']:.2f}"
    toy.draw_plane(axis, row["actions"][:2500], title)
    axis.set_xlabel(f"{100 * row['on']:.0f} % near a demonstration")
toy.finish(figure, "2_gaussian")

# %% [markdown]
# ## Exercises
#
# Fill in 2a to 2d in `course/exercises.py` and run `python -m course check 2`.
#
# 2a. The Gaussian posterior. 2b. The dual's minimum. 2c. The dual of particles. 2d. Weighted
# maximum likelihood.
#
# What you should no longer believe: "no signal, no change."

# %% [markdown]
# # 1. Policy improvement is inference
#
# Run it: `python course/1_inference.py` takes 3 seconds of CPU and draws one figure.
#
# A robot knows six ways to grasp a cup. It learned them from people, so each habit has a
# probability. It has also learned a value for each habit. How should it change the probabilities?
#
# It could always take the best habit. Then it bets everything on a value that may be wrong, and it
# forgets the other five. It could change nothing. Then it never improves. We want a compromise, and
# we want to know what the compromise costs.

# %%
import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt

from poco import posterior

toy.start()

# %% [markdown]
# ## The idea
#
# Call the old policy the prior. Call its probabilities pi. A new policy r earns the expected value,
# and it pays for every step that it takes away from the prior. The price per nat is the
# temperature eta:
#
#     J(r) = E_r[Q] - eta KL(r || pi)
#
# A nat is the unit of the KL divergence. Here is J as code.

# %%
prior = torch.tensor([0.05, 0.25, 0.15, 0.20, 0.20, 0.15], dtype=torch.float64)
q = torch.tensor([1.3, 0.7, 0.0, -0.4, -1.3, -0.9], dtype=torch.float64)  # the best habit is rare


def kl(r, p):
    """KL(r || p) in nats."""
    return (torch.xlogy(r, r) - torch.xlogy(r, p)).sum(-1)


def objective(r, eta):
    """J(r): the value that r earns, less the price of leaving the prior."""
    return (r * q).sum(-1) - eta * kl(r, prior)


# %% [markdown]
# ## The answer, in one line
#
# Multiply each prior probability by exp(Q/eta) and divide by the sum Z. That is Bayes' rule: the
# prior is the old policy, and exp(Q/eta) plays the likelihood. Call the result q*. It is no
# heuristic, and here is why. Solve the definition of q* for Q, put that into J, and collect the
# terms:
#
#     J(r) = eta log Z - eta KL(r || q*)
#
# The first term does not depend on r. The second is never positive, and it is zero only at q*. So
# q* is the best policy, it is the only one, and every other policy r loses exactly
# eta KL(r || q*).
#
# **Predict before you run on.** What is J(q*) - J(pi), the loss of changing nothing? What is the
# loss of the greedy policy, which always takes the best habit?

# %%
eta = toy.ETA
best = posterior(prior, q, eta)
log_z = torch.log((prior * torch.exp(q / eta)).sum())
toy.expect("J(q*) less eta log Z", objective(best, eta) - eta * log_z, 0, 1e-8)

generator = torch.Generator().manual_seed(1)
others = torch.rand(1000, 6, generator=generator, dtype=torch.float64)
others = others / others.sum(-1, keepdim=True)
loss = objective(best, eta) - objective(others, eta)
error = (loss - eta * kl(others, best)).abs().max() / eta
toy.expect("largest error of the gap identity, relative to eta", error, 0, 1e-8, "1,000 policies")

greedy = torch.zeros(6, dtype=torch.float64)
greedy[q.argmax()] = 1
toy.expect("loss of changing nothing", objective(best, eta) - objective(prior, eta), 0.573, 0.001)
toy.expect("loss of the greedy policy", objective(best, eta) - objective(greedy, eta), 0.536, 0.001)

# %% [markdown]
# ## Small steps add up
#
# Do the same step twice: the first answer becomes the second prior. Each step multiplies the prior
# by exp(Q/eta) again. Logarithms add, so k steps at eta are one step at eta/k. Evidence adds, as in
# any Bayesian update. This is why a large temperature is safe but slow, and why an algorithm that
# iterates gets greedy even at a large temperature.

# %%
twice = posterior(posterior(prior, q, eta), q, eta)
toy.expect(
    "two steps at eta against one at eta/2",
    (twice - posterior(prior, q, eta / 2)).abs().max(),
    0,
    1e-9,
)
five = prior
for _ in range(5):
    five = posterior(five, q, eta)
toy.expect(
    "five steps at eta against one at eta/5",
    (five - posterior(prior, q, eta / 5)).abs().max(),
    0,
    1e-9,
)

# %% [markdown]
# ## The figure
#
# Walk from the prior, through q*, to the greedy policy. The value rises all the way. So does the
# price. Their difference has one top, and it is at q*. The gap below the top is eta KL(r || q*).

# %%
steps = torch.linspace(-0.5, 4, 181, dtype=torch.float64)
path = torch.stack([posterior(prior, step * q, eta) for step in steps])  # step 1 is q*
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
top = objective(best, eta)
left.plot(steps, (path * q).sum(-1), color=toy.GREEN, label="value  E[Q]")
left.plot(steps, eta * kl(path, prior), color=toy.ORANGE, label="price  eta KL(r || prior)")
left.plot(steps, objective(path, eta), color=toy.BLUE, lw=3, label="J = value - price")
left.fill_between(steps, objective(path, eta), top, color=toy.BLUE, alpha=0.15)
left.plot(1, top, "o", color=toy.BLUE, ms=9)
left.annotate("q*, the posterior", (1, top), (1.5, top - 0.5), arrowprops={"arrowstyle": "-"})
left.annotate("gap = eta KL(r || q*)", (3.2, top), (2.35, top + 0.08), color=toy.BLUE)
for step, name in ((0, "prior"), (1, "q*"), (4, "nearly greedy")):
    left.axvline(step, color="0.85", zorder=0)
    left.text(step - 0.06, -1.25, name, ha="right", color="0.4")
left.set(xlabel="how far along the path", ylim=(-1.35, 1.6), title="J has one top: the posterior")
left.legend(loc="lower right", bbox_to_anchor=(1, 0.12))

place = torch.arange(6)
bars = (
    (prior, "prior", toy.GREY),
    (best, "q*, the posterior, eta 0.5", toy.BLUE),
    (posterior(prior, q, 0.125), "posterior, eta 0.125", toy.ORANGE),
)
for shift, (p, name, colour) in enumerate(bars):
    right.bar(place + 0.27 * (shift - 1), p, 0.27, color=colour, label=name)
right.set_xticks(place, [f"{float(one):.2f}" for one in q])
right.set(xlabel="the habit's value Q", ylabel="probability", title="what happens to six habits")
right.legend()
toy.finish(figure, "1_inference")

# %% [markdown]
# ## Exercises
#
# Write your predictions first. Then fill in 1a, 1b and 1c in `course/exercises.py` and run
# `python -m course check 1`.
#
# 1a. The posterior of a finite set of actions. 1b. The gap of a policy r. 1c. k steps in a row.
#
# What you should no longer believe: "exp(Q/eta) is a heuristic."

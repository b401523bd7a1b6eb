# %% [markdown]
# # 4. Particles: what N samples can and cannot do
#
# Run it: `python course/4_particles.py` takes 5 seconds of CPU and draws one figure.
#
# A flow policy has no likelihood, but it has samples. POCO draws N candidates from the policy and
# weighs each by exp(Q/eta). The draw already contains the prior: a likely action is drawn often. So
# the weights must not contain the prior again. This unit asks what N samples can represent, and
# what happens when the values are wrong.

# %%
import math

import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt

from chunk_critic import aggregate
from poco import posterior_weights, resample

toy.start()


def ess(weights):
    """The effective share of the candidates, ESS/N: weights (B, N) -> scalar in (0, 1]."""
    return (1 / weights.square().sum(-1)).mean() / weights.shape[-1]


# %% [markdown]
# ## How many candidates are really used
#
# The effective sample size is one over the sum of the squared weights. Equal weights give N, a
# single winner gives 1. We report it as a share, ESS/N, and so does every run of this project.
#
# Let the values of one state be Gaussian with standard deviation sigma. Only the ratio sigma/eta
# matters. With many candidates, ESS/N tends to exp(-(sigma/eta)^2), and the KL from uniform tends
# to (sigma/eta)^2 / 2.
#
# **Predict:** at ratio 1, what share is left? Do few candidates show a larger or a smaller share?

# %%
for n, expected in ((16, 0.517), (32, 0.466), (64, 0.433)):
    share = ess(posterior_weights(torch.randn(4000, n), 1.0))
    toy.expect(f"ESS/N at ratio 1, N = {n}", share, expected, 0.02, "4,000 rows")
toy.expect("  and the limit exp(-1)", math.exp(-1), 0.368, 1e-3)
many = posterior_weights(torch.randn(64, 40_000), 1.0)
toy.expect("ESS/N with 40,000 candidates", ess(many), 0.368, 0.02, "64 rows")
kl = math.log(40_000) + torch.xlogy(many, many).sum(-1).mean()
toy.expect("KL from uniform with 40,000 candidates", kl, 0.5, 0.02, "64 rows")

# %% [markdown]
# ## N samples cannot move far
#
# Draw N candidates from a Gaussian, weigh them by a slope, and draw one of them by its weight. This
# is called sampling importance resampling, SIR. Unit 2 gave the exact answer: the mean moves by
# s^2 g / eta. With s = 0.8, g = 1.5 and eta = 2 that is 0.48. A single sample does not move at all.
#
# **Predict:** by how much does the step fall short for N = 1, 4, 16 and 64?

# %%
s, g, eta = 0.8, 1.5, 2.0
exact = s**2 * g / eta
for n, expected in ((1, -0.480), (4, -0.149), (16, -0.042), (64, -0.012)):
    draws = s * torch.randn(50_000, n)
    moved = (posterior_weights(g * draws, eta) * draws).sum(-1).mean()
    toy.expect(f"bias of the step, N = {n}", moved - exact, expected, 0.01, "50,000 rows")

# %% [markdown]
# However small eta gets, the step cannot pass the best candidate. Its expected place is 1.77 s for
# 16 candidates and 2.07 s for 32. This is a safety belt that nobody had to design: POCO never acts
# where the policy would not have gone by chance.

# %%
for n, expected in ((16, 1.766), (32, 2.07)):
    reach = torch.randn(100_000, n).amax(-1).mean()
    toy.expect(f"largest step in units of s, N = {n}", reach, expected, 0.01, "100,000 rows")

# %% [markdown]
# ## The winner's curse
#
# A critic is wrong by chance, and the maximum over candidates prefers the errors that flatter. Let
# the true values of 16 candidates have spread tau = 1, and let the critic add noise with sigma = 1.
#
# **Predict:** best-of-16 claims 2.50. What does it get? A softmax at eta 1 claims 1.60. Is the
# softmax immune?

# %%
true = torch.randn(50_000, 16)
claimed = true + torch.randn(50_000, 16)
best = claimed.argmax(-1, keepdim=True)
toy.expect("best-of-16 claims", claimed.gather(1, best).mean(), 2.50, 0.02, "50,000 rows")
toy.expect("best-of-16 gets", true.gather(1, best).mean(), 1.26, 0.02, "50,000 rows")
soft = posterior_weights(claimed, 1.0)
soft_claims, soft_gets = (soft * claimed).sum(-1).mean(), (soft * true).sum(-1).mean()
toy.expect("softmax claims", soft_claims, 1.60, 0.02, "50,000 rows")
toy.expect("softmax gets", soft_gets, 0.80, 0.02, "50,000 rows")
toy.expect("true over claimed, softmax", soft_gets / soft_claims, 0.5, 0.02, "50,000 rows")

# %% [markdown]
# True over claimed is tau^2 / (tau^2 + sigma^2), one half here, for both. The softmax is not
# immune. It only takes a smaller step.
#
# ## Off the data, heads disagree
#
# Now let half of the 16 candidates lie off the data. There the true value is -1 and a head's noise
# is 1. On the data the values spread by 0.3 and the noise is 0.1. One head falls for the noise. The
# mean of five heads averages it away. **Predict:** what do you gain by subtracting the heads'
# deviation?

# %%
states = 50_000
good = 0.3 * torch.randn(states, 8)
true = torch.cat([good, torch.full((states, 8), -1.0)], -1)
noise = torch.cat([torch.full((8,), 0.1), torch.ones(8)])
heads = true + noise * torch.randn(5, states, 16)
rules = (
    ("one head", heads[0], -0.22, -0.22),
    ("mean of five heads", aggregate(heads), 0.41, 0.36),
    ("mean less one deviation", aggregate(heads, pessimism=1.0), 0.42, 0.38),
)
toy.expect("best by one head claims", heads[0].amax(-1).mean(), 0.69, 0.02, "50,000 rows")
for name, rating, greedy, smooth in rules:
    pick = true.gather(1, rating.argmax(-1, keepdim=True)).mean()
    toy.expect(f"best by {name} gets", pick, greedy, 0.02, "50,000 rows")
    weighed = (posterior_weights(rating, 0.1) * true).sum(-1).mean()
    toy.expect(f"softmax at eta 0.1 by {name} gets", weighed, smooth, 0.02, "50,000 rows")

# %% [markdown]
# ## Fewer particles for the M-step
#
# The M-step is the expensive half. So draw M of the N candidates, by their weights, and distil only
# those. Systematic resampling lays a comb with M teeth over the weights: a candidate is drawn M
# times its weight on average, so the M-step's expectation stays. **Predict:** what does the mean of
# the drawn values miss?

# %%
values = torch.randn(20_000, 16)
weights = posterior_weights(values, 0.5)
drawn, _ = resample(values[:, :, None, None], weights, 4)
error = drawn.mean() - (weights * values).sum(-1).mean()
toy.expect("4 of 16 resampled: error of the mean", error, 0, 0.02, "20,000 rows")

# %% [markdown]
# ## The figure
#
# Left: the effective share against sigma/eta. Right: what the winner's curse costs at every
# temperature. The claim rises as eta falls, and half of it is always air.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
ratios = torch.linspace(0.02, 3, 60)
for n, colour, shift in ((16, toy.ORANGE, 0), (32, toy.GREEN, 0.015), (64, toy.BLUE, -0.02)):
    rows = torch.randn(4000, n)
    left.plot(ratios, [ess(posterior_weights(r * rows, 1.0)) for r in ratios], color=colour, lw=2.5)
    tail = float(ess(posterior_weights(3 * rows, 1.0)))
    left.text(3.03, tail + shift, f"N = {n}", color=colour, va="center")
left.plot(ratios, torch.exp(-(ratios**2)), "k--", label="limit: exp(-(sigma/eta)^2)")
left.axvline(1, color="0.85", zorder=0)
left.set(xlabel="spread of the values / temperature", ylabel="ESS / N", ylim=(0, 1.02))
left.set(title="how many candidates are really used", xlim=(0, 3.4))
left.legend(loc="upper right")

true = torch.randn(20_000, 16)
claimed = true + torch.randn(20_000, 16)
etas = torch.logspace(-1.3, 1.3, 40)
soft = [posterior_weights(claimed, float(one)) for one in etas]
claims = torch.stack([(w * claimed).sum(-1).mean() for w in soft])
gets = torch.stack([(w * true).sum(-1).mean() for w in soft])
right.semilogx(etas, claims, color=toy.ORANGE, lw=2.5, label="claimed")
right.semilogx(etas, gets, color=toy.GREEN, lw=2.5, label="true")
right.fill_between(etas, gets, claims, color=toy.ORANGE, alpha=0.15)
right.axhline(2.50, color=toy.ORANGE, ls=":", lw=1.5)
right.axhline(1.26, color=toy.GREEN, ls=":", lw=1.5)
right.text(20, 2.53, "best of 16", ha="right", color=toy.ORANGE)
right.text(20, 1.29, "best of 16", ha="right", color=toy.GREEN)
right.set(xlabel="temperature eta", ylabel="value", ylim=(0, 2.8), title="the winner's curse")
right.legend(loc="lower left")
toy.finish(figure, "4_particles")

# %% [markdown]
# ## Exercises
#
# Fill in 4a to 4d in `course/exercises.py` and run `python -m course check 4`.
#
# 4a. The weights. 4b. Effective share and KL. 4c. Systematic resampling. 4d. What is left of a
# claim.
#
# What you should no longer believe: "the softmax is immune to the winner's curse."

# %% [markdown]
# # 5. Projection, flow and clip
#
# Run it: `python course/5_flow.py` takes 12 seconds of CPU and draws one figure.
#
# The E-step leaves weighted candidates. The M-step must put them back into one policy. That is a
# projection, and POCO projects with a flow-matching loss that it clips. This unit asks which
# projection this is, what the loss measures, and what the clip really lets through.

# %%
import math

import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt
from scipy.integrate import quad
from scipy.stats import chi2, norm

toy.start()

# %% [markdown]
# ## Two ways to project
#
# Suppose the posterior has two narrow peaks, at -0.6 and 0.6, each with a width of 0.1. Your policy
# is one Gaussian. Maximum likelihood minimises KL(posterior || policy), the forward KL: it matches
# mean and variance, and covers everything. The reverse KL picks one peak.
#
# **Predict:** how much probability does the forward fit put between the peaks?

# %%
centre, width = 0.6, 0.1
line = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
cell = line[1] - line[0]


def bell(mean, std):
    """A Gaussian density on the line."""
    return torch.exp(-((line - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def kl(r, p):
    """KL(r || p) of two densities on the line."""
    return float((torch.xlogy(r, r) - torch.xlogy(r, p.clamp(min=1e-300))).sum() * cell)


peaks = (bell(centre, width) + bell(-centre, width)) / 2
std = math.sqrt(centre**2 + width**2)
between = line.abs() < 0.3
toy.expect("forward fit: standard deviation", std, 0.608, 1e-3)
toy.expect("forward fit: KL(posterior || fit)", kl(peaks, bell(0, std)), 1.112, 1e-2)
fit_between = 1 - 2 * norm.sf(0.3, scale=std)
toy.expect("forward fit: share between the peaks", fit_between, 0.38, 1e-2)
toy.expect("posterior: share between the peaks", (peaks * between).sum() * cell, 0.0013, 1e-4)
toy.expect("reverse fit: KL(fit || posterior)", kl(bell(centre, width), peaks), math.log(2), 1e-2)

# %% [markdown]
# A Gaussian policy has to choose between two evils. A flow can hold both peaks, so the forward
# projection does no harm. This is why a robot policy is a flow and not a Gaussian.
#
# ## What the flow-matching loss measures
#
# A flow learns to carry noise to data along straight lines. On a line at time t, the network sees a
# mixture of noise and action and must guess the direction, action minus noise. The guess cannot be
# perfect. For one Gaussian habit of width s, the ideal network leaves the variance
#
#     v(t) = s^2 / ((1 - t)^2 + t^2 s^2)
#
# Early the noise covers everything and v is s^2: the network knows nearly everything about the
# direction, since it sees the noise. Late v rises to 1: the noise is hidden by the action.
#
# **Predict:** the mean of v over t is pi s / 2. What does the best possible network lose at s =
# 0.1?


# %%
def left_over(t, s):
    """v(t): what an ideal network cannot know about the direction."""
    return s**2 / ((1 - t) ** 2 + t**2 * s**2)


s = 0.1
toy.expect("mean of v over t", quad(left_over, 0, 1, (s,), points=[0.99])[0], 0.157, 1e-3)
n = 2_000_000
noise, action, t = torch.randn(n), s * torch.randn(n), torch.rand(n)
place = (1 - t) * noise + t * action
ideal = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * place
error = (ideal - (action - noise)).square().mean()
toy.expect("loss of the ideal network, relative error", error / 0.15708 - 1, 0, 0.005, "2M draws")

flows = {}
one_habit = torch.tensor([[0.2, -0.1]])
for one in (0.1, 0.3):
    flows[one] = toy.clone(steps=1000, habits=one_habit, width=one)


def losses(policy, width, rows=20_000, habits=one_habit):
    """Draw the flow-matching loss of fresh demonstrations, one (noise, t) each."""
    chunks = toy.demonstrations(rows, habits, width).unsqueeze(0)
    with torch.no_grad():
        return policy.cfm_loss(toy.NOTHING, chunks)[0]


trained = losses(flows[0.1], 0.1).mean()
toy.expect("loss of a trained flow, s = 0.1", trained, 0.157, 0.01, "20,000 chunks")

# %% [markdown]
# How does the loss of one action a depend on its distance from the habit mu? Average over noise and
# time, for the ideal network:
#
#     loss(a) = (pi / 4) ((a - mu)^2 / s + s)
#
# It is a straight function of the squared distance, and so is -log p(a). In that sense the
# flow-matching loss is a negative log-likelihood. But compare the slopes: half a squared
# distance over s^2 is one nat, and one nat costs pi s / 2. A narrow policy pays less per nat.

# %%
for distance in (0.0, 0.1, 0.2):
    m = 1_000_000
    noise, t = torch.randn(m), torch.rand(m)
    place = (1 - t) * noise + t * distance
    ideal = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * place
    measured = (ideal - (distance - noise)).square().mean()
    formula = math.pi / 4 * (distance**2 / s + s)
    toy.expect(
        f"loss at distance {distance}, relative error",
        measured / formula - 1,
        0,
        0.01,
        "1M draws",
    )

# %% [markdown]
# ## What the clip lets through
#
# POCO clips each candidate's loss at zeta, before it is weighed. Above zeta the gradient is exactly
# zero: that draw teaches nothing. We call a draw alive if its loss is at most zeta. In our model
# the loss at time t is v(t) times a chi-square with d degrees of freedom, divided by d, where d is
# the number of cells in a chunk. So
#
#     alive = mean over t of P(chi-square_d <= d zeta / v(t)).
#
# **Predict:** zeta is 0.15 and d is 2. How many draws live at s = 0.1? And at s = 0.3?


# %%
def alive_at(t, zeta, s, d):
    """P(loss <= zeta) at flow time t."""
    return chi2.cdf(d * zeta / left_over(t, s), d)


def alive(zeta, s, d):
    """The share of draws below the clip, over all flow times."""
    return quad(alive_at, 0, 1, (zeta, s, d), limit=200)[0]


for one, formula, flow in ((0.1, 0.795, 0.793), (0.3, 0.401, 0.398)):
    toy.expect(f"alive by the formula, d = 2, s = {one}", alive(0.15, one, 2), formula, 1e-3)
    share = (losses(flows[one], one) <= 0.15).float().mean()
    toy.expect(f"alive in a trained flow, d = 2, s = {one}", share, flow, 0.02, "20,000 chunks")
toy.expect("alive by the formula, d = 35, s = 0.2", alive(0.15, 0.2, 35), 0.498, 1e-3)
late = max(alive_at(t, 0.15, 0.2, 35) for t in torch.linspace(0.9, 1, 21))
toy.expect("  and the most for any t above 0.9", late, 0, 1e-2)

# %% [markdown]
# Nothing here mentions the value of an action. In this model the clip does not reject over-valued
# actions. It silences late flow times and broad policies.
#
# ## Choosing a mode costs more than width
#
# Six narrow habits have a much larger floor than one narrow habit: early on, the network cannot
# know which of six habits a line leads to. **Predict:** the floor of one habit is 0.16. What is the
# floor of six? What does a clip of 0.1 leave alive?

# %%
six = toy.clone()
draws = losses(six, toy.WIDTH, 50_000, toy.HABITS)
toy.expect("loss floor of six habits", draws.mean(), 0.65, 0.03, "50,000 chunks")
toy.expect("alive at zeta 0.1", (draws <= 0.1).float().mean(), 0.07, 0.01, "50,000 chunks")

# %% [markdown]
# ## The figure
#
# Left: the two projections. Right: how many draws live at each flow time. Lines are the formula,
# dots are a trained flow.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
left.fill_between(line, peaks, color="0.85", label="posterior: two habits")
left.plot(line, bell(0, std), color=toy.ORANGE, lw=2.5, label="forward KL: covers both")
left.plot(line, bell(centre, width), color=toy.BLUE, lw=2.5, label="reverse KL: picks one")
left.annotate(
    f"{100 * fit_between:.0f} % where\nnobody acted",
    (0, 0.62),
    (0, 1.5),
    ha="center",
    color=toy.ORANGE,
    arrowprops={"arrowstyle": "->", "color": toy.ORANGE},
)
left.set(xlim=(-1.6, 1.6), ylim=(0, 5.6), xlabel="action", ylabel="density")
left.set_title("what a Gaussian makes of two habits")
left.legend(loc="upper left")

times = torch.linspace(0, 1, 201)
curves = ((2, 0.1, toy.GREEN), (2, 0.3, toy.ORANGE), (35, 0.2, toy.BLUE))
for d, one, colour in curves:
    label = f"{d} cells, width {one}: {100 * alive(0.15, one, d):.0f} % alive"
    shares = [alive_at(float(t), 0.15, one, d) for t in times]
    right.plot(times, shares, color=colour, lw=2.5, label=label)
for one, colour in ((0.1, toy.GREEN), (0.3, toy.ORANGE)):
    for t in torch.linspace(0.05, 0.95, 10):
        chunks = toy.demonstrations(2000, one_habit, one).unsqueeze(0)
        with torch.no_grad():
            loss = flows[one].cfm_loss(toy.NOTHING, chunks, t=torch.full((1, 2000), float(t)))
        right.plot(t, (loss <= 0.15).float().mean(), "o", color=colour, ms=6)
right.set(xlabel="flow time t  (0 noise, 1 action)", ylabel="P(alive | t)", ylim=(0, 1.35))
right.set_yticks([0, 0.5, 1])
right.set_title("the clip at zeta 0.15 silences late times")
right.legend(loc="upper right", fontsize=11)
toy.finish(figure, "5_flow")

# %% [markdown]
# ## Exercises
#
# Fill in 5a to 5d in `course/exercises.py` and run `python -m course check 5`.
#
# 5a. The forward fit. 5b. The loss of one action. 5c. The share that is alive. 5d. The clipped sum.
#
# What you should no longer believe: "the flow-matching loss is -log p", and "the clip rejects
# over-valued actions."

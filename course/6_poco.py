# %% [markdown]
# # 6. The loop, the anchor, and a robot
#
# Run it: `python course/6_poco.py` takes 20 seconds of CPU and draws one figure.
#
# One E-step and one M-step make one iteration. POCO iterates, and in every M-step it also clones
# the replay: that is its anchor. This unit asks where the loop ends, what the replay must forget,
# and what happens when the critic is wrong. Then the same formulas read the logs of real runs.

# %%
import csv
import json
import math

import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi2

from poco import e_step, posterior, posterior_weights, resample

toy.start()

# %% [markdown]
# ## The loop on six habits
#
# With guidance beta, the M-step fits a mixture: one part of demonstrations pi_D, and beta parts of
# the posterior. On a finite set we can compute it exactly:
#
#     pi_next = (pi_D + beta post(pi)) / (1 + beta)
#
# **Predict:** iterate with beta = 1 and eta = 0.5. Does the probability of the best habit go to
# one?

# %%
q = toy.value(toy.HABITS).double()
uniform = torch.full((6,), 1 / 6, dtype=torch.float64)


def improve(pi, anchor, q, eta, beta):
    """One exact POCO iteration on a finite set of actions."""
    return (anchor + beta * posterior(pi, q, eta)) / (1 + beta)


pi = uniform
for _ in range(200):
    pi = improve(pi, uniform, q, 0.5, 1.0)
# The prediction was rounded to three digits.
for habit, expected in enumerate((0.405, 0.250, 0.088, 0.084, 0.084, 0.090)):
    toy.expect(f"fixed point, habit {habit}", pi[habit], expected, 6e-4)
toy.expect("fixed point, E[Q]", (pi * q).sum(), 0.620, 6e-4)

# %% [markdown]
# It does not. The demonstrations pull back in every iteration, and the loop ends where both pulls
# balance. Put pi_next = pi and solve for pi. Then Z = E_pi[exp(Q/eta)] appears on both sides:
#
#     pi = pi_D / (1 + beta - beta exp(Q/eta) / Z)
#
# Z must make the probabilities sum to one, so it is the root of one equation.

# %%
evidence = torch.exp(q / 0.5)
z = (pi * evidence).sum()
balanced = uniform / (1 + 1.0 - 1.0 * evidence / z)
toy.expect("largest error of the fixed point's formula", (balanced - pi).abs().max(), 0, 1e-9)

# %% [markdown]
# ## The replay must forget
#
# Suppose only a share f of the replay is demonstrations, and the rest is the policy's own actions.
# With a tiny temperature the posterior is the best action alone, and its mass ends at
#
#     1 - f (1 - pi_D(best)) / (f + beta)
#
# **Predict** it for f = 1, 0.5, 0.25 and 0, at beta 1 and six equally likely habits.

# %%
for share, expected in ((1.0, 0.583), (0.5, 0.722), (0.25, 0.833), (0.0, 1.0)):
    pi = uniform
    for _ in range(200):
        replay = share * uniform + (1 - share) * pi
        pi = improve(pi, replay, q, 1e-3, 1.0)
    toy.expect(f"mass of the best habit, f = {share:g}", pi[0], expected, 0.002)

# %% [markdown]
# While the demonstrations stay, they hold the policy back. This is why Lift's replay is a small
# ring that new experience soon fills.
#
# ## The same loop with a flow
#
# Now the real thing: candidates from a flow, weights from `e_step`, and a network trained by
# `m_step_loss`. The exact recursion on a fine grid says what should come out. **Predict** from the
# formulas above: which of these three climbs fastest? Beta 1 on demonstrations, beta 1 on the
# policy's own actions, or beta 50?

# %%
cells = toy.grid()
demos = toy.demonstrator(cells)
grid_q = toy.value(cells)
context = toy.NOTHING.expand(toy.STATES, 1)
torch.manual_seed(0)
prior = toy.clone()


def exact_values(beta, own, iterations):
    """Return the claimed and the true value after each iteration of the exact recursion."""
    pi, claimed, true = demos, [], []
    for _ in range(iterations):
        pi = improve(pi, pi if own else demos, grid_q, toy.ETA, beta)
        claimed.append(float((pi * grid_q).sum()))
        true.append(float((pi * toy.true_value(cells)).sum()))
    return claimed, true


def flow_values(beta, own, iterations):
    """Return the value after each iteration of POCO with a flow."""
    policy, values = prior, []
    for _ in range(iterations):
        candidates, weights, _ = e_step(
            policy, lambda _, a: toy.value(a[:, :, 0]), context, 64, toy.ETA
        )
        candidates, weights = resample(candidates, weights, 16)  # a cheaper M-step, unit 4
        pool = toy.actions_of(policy, 4096).unsqueeze(1)

        def own_actions(n, pool=pool):
            return pool[torch.randint(len(pool), (n,))]

        anchor = own_actions if own else toy.demonstrations
        policy = toy.m_step(policy, candidates, weights, beta, anchor=anchor, steps=600, rows=32)
        values.append(float(toy.value(toy.actions_of(policy)).mean()))
    return values


cases = (
    ("beta 1, demonstrations", 1.0, False, (0.626, 0.703)),
    ("beta 1, own actions", 1.0, True, (0.626, 1.015)),
    ("beta 50, demonstrations", 50.0, False, (1.227, 1.425)),
)
for name, beta, own, expected in cases:
    exact, _ = exact_values(beta, own, 2)
    flow = flow_values(beta, own, 2)
    for k in range(2):
        toy.expect(f"{name}, iteration {k + 1}, exact", exact[k], expected[k], 2e-3)
        toy.expect(f"{name}, iteration {k + 1}, flow", flow[k], expected[k], 0.1, "20,000 actions")

# %% [markdown]
# ## The critic is wrong where nobody acted
#
# The critic says 2x + y everywhere. The truth is -2 off the habits. Each iteration sharpens a
# little, and the tail that points to high values grows. **Predict:** the claimed value rises for
# ever. What does the true value do, without an anchor? With one?

# %%
free_claimed, free_true = exact_values(1e9, False, 15)
held_claimed, held_true = exact_values(1.0, False, 15)
for iteration, claimed, true in ((1, 1.25, 1.24), (5, 1.76, 1.34), (10, 2.13, -0.74)):
    toy.expect(
        f"no anchor, iteration {iteration}, claimed", free_claimed[iteration - 1], claimed, 0.01
    )
    toy.expect(f"no anchor, iteration {iteration}, true", free_true[iteration - 1], true, 0.01)
toy.expect("beta 1, iteration 10, claimed", held_claimed[9], 1.01, 0.01)
toy.expect("beta 1, iteration 10, true", held_true[9], -0.20, 0.01)

# %% [markdown]
# The anchor slows the drift. It does not stop it. What stops it on a robot is new experience: the
# critic learns the truth about the actions that the policy really tries.
#
# ## From the toy to Lift
#
# Real runs log what unit 5 predicted. From the logged surrogate, which is the weighted mean of
# min(loss, zeta), solve for one number: the width s of a single-habit policy with the same
# surrogate. Then predict the logged `alive_mass` by the formula of unit 5. Nothing is fitted to
# `alive_mass`.
#
# **Predict:** real policies are not one Gaussian. How wrong will the formula be?


# %%
def left_over(t, s):
    """v(t) of unit 5: what an ideal network cannot know about the direction."""
    return s**2 / ((1 - t) ** 2 + t**2 * s**2)


def alive(zeta, s, d):
    """The share of draws whose loss is at most zeta."""
    return quad(lambda t: chi2.cdf(d * zeta / left_over(t, s), d), 0, 1, limit=200)[0]


def clipped_loss(zeta, s, d):
    """E[min(loss, zeta)] of a policy of width s with d cells."""

    def at(t):
        v = left_over(t, s)
        return v * chi2.cdf(d * zeta / v, d + 2) + zeta * chi2.sf(d * zeta / v, d)

    return quad(at, 0, 1, limit=200)[0]


def one_parameter(surrogate, zeta):
    """The rival: an exponential loss with the same surrogate. Return its alive share."""
    mean = brentq(lambda m: m * (1 - math.exp(-zeta / m)) - surrogate, 1e-4, 1e3)
    return 1 - math.exp(-zeta / mean)


def read_run(name):
    """Read a committed run: the means of the second half of its progress.csv, and its arguments."""
    folder = toy.run_folder(name)
    arguments = json.loads((folder / "args.json").read_text())["args"]
    with open(folder / "progress.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["alive_mass"]]
    late = rows[len(rows) // 2 :]
    columns = ("surrogate", "alive_mass", "ess", "q_spread")
    means = {name: sum(float(row[name]) for row in late) / len(late) for name in columns}
    return means, arguments


def predict(name):
    """Return what the formulas say about a run beside what it logged."""
    logged, arguments = read_run(name)
    zeta, n = arguments["clip"], arguments["num_candidates"]
    d = 7 * arguments["horizon"]  # robosuite's arms have seven action dimensions
    s = brentq(lambda s: clipped_loss(zeta, s, d) - logged["surrogate"], 1e-3, 3)
    ratio = logged["q_spread"] / arguments["temperature"]
    weights = posterior_weights(ratio * torch.randn(4000, n), 1.0)
    return {
        "run": name,
        "zeta": zeta,
        "s": s,
        "alive": logged["alive_mass"],
        "predicted": alive(zeta, s, d),
        "rival": one_parameter(logged["surrogate"], zeta),
        "ess": logged["ess"],
        "ess predicted": float((1 / weights.square().sum(-1)).mean()) / n,
    }


runs = [predict(name) for name in toy.RUNS]
print(f"\n{'run':26s} zeta  width s   alive: logged  formula  rival   ess: logged  formula")
row = "{run:26s} {zeta:4.2f} {s:8.3f} {alive:15.3f} {predicted:8.3f} {rival:6.3f} {ess:13.2f}"
for run in runs:
    print(row.format(**run), f"{run['ess predicted']:8.2f}")
print()
wide = [run for run in runs if run["zeta"] == 0.6]
tight = [run for run in runs if run["zeta"] == 0.15]
worst = max(abs(run["predicted"] - run["alive"]) for run in wide)
rival = max(abs(run["rival"] - run["alive"]) for run in wide)
toy.expect("zeta 0.6: largest error of alive_mass", worst, 0.024, 0.003, "12 runs")
toy.expect("zeta 0.6: largest error of the rival", rival, 0.090, 0.005, "12 runs")
error = abs(tight[0]["predicted"] - tight[0]["alive"])
toy.expect("zeta 0.15: error of alive_mass", error, 0.059, 0.005, "1 run")
error = abs(tight[0]["rival"] - tight[0]["alive"])
toy.expect("zeta 0.15: error of the rival", error, 0.048, 0.005, "1 run")

# %% [markdown]
# At zeta 0.6 the formula of one Gaussian habit is right within 0.03. At zeta 0.15 it is no better
# than the rival, so there it explains nothing.
#
# Now let a formula fail. Unit 4 predicts ESS/N from the logged spread of the values. It says about
# one quarter; the runs log more than one half. The likely reason: `q_spread` is a mean over states.
# In most states all candidates are equally good, and in a few they differ a lot. A mean ratio
# describes neither kind.

# %%
ess_logged = [run["ess"] for run in wide if run["run"].startswith("lift/")]
ess_predicted = [run["ess predicted"] for run in wide if run["run"].startswith("lift/")]
toy.expect("Lift: ESS/N logged, mean", sum(ess_logged) / 6, 0.56, 0.01, "6 runs")
toy.expect("Lift: ESS/N predicted, mean", sum(ess_predicted) / 6, 0.27, 0.01, "6 runs")

# %% [markdown]
# ## The figure
#
# Left: a wrong critic, with and without an anchor. Right: what the toy's formulas say about real
# robot runs that were finished before you read this page.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
iterations = range(1, 16)
for claimed, true, colour, name in (
    (free_claimed, free_true, toy.ORANGE, "no anchor"),
    (held_claimed, held_true, toy.BLUE, "anchor, beta 1"),
):
    left.plot(iterations, claimed, "--", color=colour, lw=2, label=f"{name}: claimed")
    left.plot(iterations, true, color=colour, lw=3, label=f"{name}: true")
left.axhline(0, color="0.85", zorder=0)
left.set(xlabel="iteration", ylabel="value", title="the critic is wrong off the habits")
left.set(ylim=(-2.1, 2.6))
left.legend(loc="lower left", fontsize=11)

right.plot([0.4, 1], [0.4, 1], color="0.8", zorder=0)
groups = (
    ("lift/", toy.BLUE, "lift"),
    ("can/", toy.GREEN, "can"),
    ("square/", toy.ORANGE, "square"),
)
for start, colour, name in groups:
    some = [run for run in wide if run["run"].startswith(start)]
    logged, predicted = [run["alive"] for run in some], [run["predicted"] for run in some]
    right.plot(predicted, logged, "o", color=colour, ms=9, label=f"{name}, zeta 0.6")
right.plot(tight[0]["predicted"], tight[0]["alive"], "kX", ms=10, label="lift, zeta 0.15: it fails")
right.set(xlim=(0.45, 1), ylim=(0.45, 1), xlabel="alive_mass predicted by unit 5")
right.set(ylabel="alive_mass logged by the run", title="real runs, nothing fitted")
right.legend(loc="upper left", fontsize=11)
toy.finish(figure, "6_poco")

# %% [markdown]
# ## Exercises
#
# Fill in 6a to 6d in `course/exercises.py` and run `python -m course check 6`.
#
# 6a. One exact iteration. 6b. Its fixed point. 6c. The mass of the best action. 6d. The width
# behind a logged surrogate.
#
# What you should no longer believe: "iterate, and it converges to the optimum."
#
# ## Go on
#
# You have now written every formula of `poco.py`. Read that file; it is short. Then train the
# robot:
#
#     python train_online.py --task lift --preset cpu
#
# It takes about 25 minutes on a laptop with two cores. Watch `ess`, `alive_mass` and `q_spread` in
# its `progress.csv`, and compare them with your predictions.

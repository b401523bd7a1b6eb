# %% [markdown]
# # 3. Chunks: what they buy and what they cost
#
# Run it: `python course/3_chunks.py` takes 4 seconds of CPU and draws one figure.
#
# A robot that decides 20 times a second has to keep every decision consistent with the last one.
# POCO decides on a chunk of H actions at once and then plays it without looking. This unit computes
# what a chunk costs in KL, how much faster values travel, why a chunk critic is right where an
# n-step target is not, and what playing blindly loses.

# %%
import itertools
import math

import numpy as np
import torch
import toy  # also finds poco.py and its neighbours
from matplotlib import pyplot as plt

from chunk_critic import td_target
from replay import ChunkReplay

toy.start()

# %% [markdown]
# ## The price of a chunk
#
# The policy pays KL for a whole chunk. By the chain rule, the chunk's KL is the KL of its first
# action plus the KL of the rest given the first. So the chunk costs at least as much as its first
# action, and a bound that pays for chunks is still a bound.
#
# Take coins. The prior is fair, the new policy says heads with 0.9, and H is 5. One policy tosses
# five times. Another tosses once and repeats the result. **Predict:** what does each one pay?


# %%
def chunk_probabilities(heads, horizon, repeat):
    """Return the probability of each of the 2^H chunks."""
    chunks = itertools.product((0, 1), repeat=horizon)
    p = []
    for chunk in chunks:
        if repeat:
            same = len(set(chunk)) == 1
            p.append((heads if chunk[0] else 1 - heads) if same else 0.0)
        else:
            ups = sum(chunk)
            p.append(heads**ups * (1 - heads) ** (horizon - ups))
    return torch.tensor(p, dtype=torch.float64)


def kl(r, p):
    """KL(r || p) in nats."""
    return (torch.xlogy(r, r) - torch.xlogy(r, p)).nansum()


first = kl(chunk_probabilities(0.9, 1, False), chunk_probabilities(0.5, 1, False))
toy.expect("KL of the first action", first, 0.36806, 1e-5)
five_tosses = kl(chunk_probabilities(0.9, 5, False), chunk_probabilities(0.5, 5, False))
toy.expect("KL of five independent actions", five_tosses, 1.84032, 1e-5)
new, old = chunk_probabilities(0.9, 5, True), chunk_probabilities(0.5, 5, True)
toy.expect("KL of one action, repeated five times", kl(new[new > 0], old[new > 0]), 0.36806, 1e-5)

# %% [markdown]
# A chunk that repeats one decision pays once. A chunk of five separate decisions pays five times.
# People's motions are smooth, so a cloned chunk policy is closer to the first kind.
#
# ## How fast a value travels
#
# Put a reward at the end of a chain of 50 steps. Compute values backwards, from the demonstrations
# in a replay. A target over H real steps carries the value back H states at a time. **Predict:**
# how many sweeps pass before the first state has heard of the reward, for H = 1, 5 and 10?
#
# The code below is the project's own replay and target, the same that train Lift.

# %%
LENGTH, DISCOUNT = 50, 0.99


def chain_replay(horizon):
    """One successful demonstration: 50 steps to the right, a reward of 1 on the last."""
    replay = ChunkReplay(LENGTH, 1, 1, horizon, DISCOUNT)
    steps = np.arange(LENGTH)
    last = (steps == LENGTH - 1).astype(float)
    replay.extend(
        {
            "obs": steps[:, None],
            "action": np.ones((LENGTH, 1)),
            "reward": last,
            "next_obs": ((steps + 1) % LENGTH)[:, None],  # after the end comes the next start
            "terminated": last,
            "truncated": np.zeros(LENGTH),
        }
    )
    return replay


def sweep(values, replay):
    """Give every state its h-step target: values (50,) -> values (50,)."""
    batch = replay.chunks(torch.arange(LENGTH))
    next_value = values[batch.next_obs[:, 0].long()]
    return td_target(batch.returns, batch.bootstrap, next_value)


history = {}
for horizon, expected in ((1, 50), (5, 10), (10, 5)):
    replay = chain_replay(horizon)
    values = torch.zeros(LENGTH)
    history[horizon] = [values]
    while values[0] == 0:
        values = sweep(values, replay)
        history[horizon].append(values)
    toy.expect(f"sweeps until V(start) > 0, H = {horizon}", len(history[horizon]) - 1, expected, 0)
    toy.expect("  and V(start) = 0.99^49", values[0], 0.6111, 1e-4)

# %% [markdown]
# ## Why the critic rates the whole chunk
#
# There is a cheaper idea: keep a critic of single actions, and use an n-step target. It is biased.
# Take two steps and the reward a1 times a2. The data choose a1 freely and a2 by a fair coin.
# **Predict:** what value does the two-step target give to a1 = 1? What value does a chunk critic
# give to the best chunk that starts with a1 = 1?

# %%
a1, a2 = torch.randint(2, (2, 20_000), generator=torch.Generator().manual_seed(0)).double()
reward = a1 * a2
n_step = reward[a1 == 1].mean()
chunk_critic = max(reward[(a1 == 1) & (a2 == second)].mean() for second in (0, 1))
toy.expect("n-step target of a1 = 1", n_step, 0.5, 0.02, "20,000 chunks")
toy.expect("chunk critic of the best chunk with a1 = 1", chunk_critic, 1, 0, "20,000 chunks")

# %% [markdown]
# The n-step target blames a1 for what the data did afterwards. The chunk critic knows the whole
# chunk, so nothing afterwards is left to blame.
#
# ## What playing blindly loses
#
# After the first step a coin falls, and the robot could see it. The reward is 1 for the action that
# matches the coin. **Predict:** what does the best chunk earn? What does a robot earn that looks?

# %%
coin = (0.5, 0.5)
matches = torch.eye(2, dtype=torch.float64)  # reward[coin, action]
chances = torch.tensor(coin, dtype=torch.float64)
open_loop = (chances @ matches).max()  # choose first, then average over the coin
closed_loop = chances @ matches.max(1).values  # see the coin, then choose
toy.expect("open loop: the best chunk", open_loop, 0.5, 0)
toy.expect("closed loop: look, then act", closed_loop, 1, 0)

# %% [markdown]
# ## The figure
#
# Each row is one sweep, each column one state. The value front moves H states per sweep.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained", sharey=True)
for axis, (horizon, rows) in zip(axes, history.items()):
    rows = rows + [rows[-1]] * (LENGTH + 1 - len(rows))
    picture = axis.imshow(torch.stack(rows), cmap="magma", vmin=0, vmax=1, aspect="auto")
    sweeps = math.ceil(LENGTH / horizon)
    axis.axhline(sweeps, color="white", lw=1.5, ls="--")
    where = {"va": "bottom" if sweeps > 40 else "top", "ha": "left", "color": "white"}
    shift = -1 if sweeps > 40 else 1.5
    axis.text(1, sweeps + shift, f"the start knows after {sweeps}", **where)
    axis.set(title=f"chunks of H = {horizon}", xlabel="state", xticks=[0, 25, 49])
axes[0].set_ylabel("sweep")
figure.colorbar(picture, ax=axes, label="value", shrink=0.8)
toy.finish(figure, "3_chunks")

# %% [markdown]
# ## Exercises
#
# Fill in 3a to 3d in `course/exercises.py` and run `python -m course check 3`.
#
# 3a. The KL of a chunk and of its first action. 3b. The target of a chunk, also where the episode
# ends. 3c. n-step target against chunk critic. 3d. Open loop against closed loop.
#
# What you should no longer believe: "chunks are free."

"""All of Algorithm 1 in sixty lines, from the four files that can be copied, on a toy of its own.

    python -m examples.minimal            # 25 seconds on one core; or beside the four copied files

A point starts anywhere on a line and should stop in [0.4, 0.6]. Demonstrations reach it in one case
of three. Not here: what a real run needs besides (train_online.py): evaluation seeds, checkpoints.
"""

import copy

import numpy as np
import torch

from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target
from flow_policy import FlowPolicy
from poco import e_step, m_step_loss
from replay import ChunkReplay

HORIZON, LIMIT = 4, 20
rng = np.random.default_rng(0)
torch.manual_seed(0)


def play(replay, act):
    """Play one episode into the replay, chunk by chunk; return whether it succeeded."""
    place, done, steps = rng.uniform(-1, 1, 1), False, 0
    while not done and steps < LIMIT:
        for action in act(place):
            before, steps = place, steps + 1
            place = np.clip(place + 0.2 * np.clip(action, -1, 1), -1, 1)
            done = 0.4 < place[0] < 0.6 and abs(action[0]) < 0.2  # inside, and standing still
            replay.add(before, action, float(done), place, done, steps == LIMIT)
            if done or steps == LIMIT:
                break
    return done


def demonstrate(place):
    goal = rng.choice([-0.5, 0.0, 0.5])  # two habits of three lead elsewhere
    return np.clip((goal - place) / 0.2 + 0.1 * rng.normal(size=(HORIZON, 1)), -1, 1)


replay = ChunkReplay(20_000, obs_dim=1, action_dim=1, horizon=HORIZON, discount=0.99)
policy = FlowPolicy(1, 1, HORIZON, hidden=64, layers=2, flow_steps=5)
critic = ChunkCritic(1, 1, HORIZON, hidden=64, layers=2)
target = copy.deepcopy(critic)
actor_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)


def act(place):
    return policy.sample(policy.encode(torch.tensor(place[None]).float()), 1)[0, 0].numpy()


def minimise(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learn(cloning, warmup):
    batch = replay.sample(64)
    context, candidates, weights = policy.encode(batch.obs), None, None
    if not cloning:
        next_context = policy.encode(batch.next_obs)
        next_q = aggregate(target(next_context, policy.sample(next_context, 1)))[:, 0]
        y = td_target(batch.returns, batch.bootstrap, next_q)
        minimise(critic_loss(critic, context, batch.chunk, y)[0], critic_optimizer)
        ema_update(target, critic, 0.02)
    if not cloning and not warmup:
        candidates, weights, _ = e_step(
            policy, lambda c, a: aggregate(target(c, a)), context, 8, 0.05
        )
    if not warmup:
        guidance = 0.0 if cloning else 1.0
        loss, _ = m_step_loss(
            policy, context, batch.chunk, batch.valid, candidates, weights, guidance, clip=1.0
        )
        minimise(loss, actor_optimizer)


for _ in range(60):  # demonstrations, then stage I
    play(replay, demonstrate)
for _ in range(1000):
    learn(cloning=True, warmup=False)
print(f"cloned: {np.mean([play(replay, act) for _ in range(100)]):.0%}")
for episode in range(300):  # stage II: warm-up, then POCO
    play(replay, act)
    for _ in range(8):
        learn(cloning=False, warmup=episode < 50)
print(f"POCO: {np.mean([play(replay, act) for _ in range(100)]):.0%}")

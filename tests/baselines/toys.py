"""A bandit over chunks that every off-policy method must solve, and agents on it.

Cloned data has two habits, chunks near -0.5 and chunks near +0.5, and only the second is rewarded.
Cloning reaches a mean action near 0, reinforcement learning one near 0.5 or above.
"""

import dataclasses

import torch

from baselines import dsrl, fql, qc, rlpd
from flow_policy import FlowPolicy
from logbook import Clock
from replay import Batch

OBS, ACTION, HORIZON = 2, 1, 3
METHODS = {
    "qc": (qc, qc.QC, {}),
    "qc-fql": (fql, fql.FQL, {"variant": "qc-fql"}),
    "rlpd-ac": (rlpd, rlpd.RLPD, {"variant": "rlpd-ac"}),
    "dsrl-na": (dsrl, dsrl.DSRL, {"variant": "dsrl-na"}),
    "dsrl-sac": (dsrl, dsrl.DSRL, {"variant": "dsrl-sac"}),
}


def settings(module, **changes):
    values = dict(
        task="toy",
        horizon=HORIZON,
        hidden=32,
        layers=2,
        flow_steps=4,
        batch_size=64,
        precision="float32",
        online_learning_rate=3e-3,
        critic_learning_rate=3e-3,
        tau=0.05,
        policy_tau=1.0,
        num_candidates=4,
        capacity=300,
    )
    fields = {field.name for field in dataclasses.fields(module.Args)}
    return module.Args(
        **{name: value for name, value in (values | changes).items() if name in fields}
    )


def make(name, **changes):
    """An agent on an untrained flow."""
    module, agent_class, variant = METHODS[name]
    args = settings(module, **variant, **changes)
    policy = FlowPolicy(OBS, ACTION, args.horizon, args.hidden, args.layers, args.flow_steps)
    return agent_class(args, policy, Clock())


def toy_batch(size=64):
    """Chunks of both habits; the return is 1 for positive ones, the episode is over."""
    sign = torch.randint(2, (size, 1, 1)) * 2.0 - 1
    chunk = (0.5 * sign + 0.1 * torch.randn(size, HORIZON, ACTION)).clamp(-1, 1)
    return Batch(
        torch.randn(size, OBS),
        chunk,
        torch.ones(size, HORIZON),
        (sign.flatten() + 1) / 2,
        torch.zeros(size),
        torch.randn(size, OBS),
    )


def parameters(network):
    return torch.cat([value.detach().flatten().clone() for value in network.parameters()])


def differs(network, before):
    return not torch.equal(parameters(network), before)


def spy_gradients(monkeypatch, module):
    """Keeps the gradients that the actor's loss leaves in every parameter, before the optimiser
    clears them."""
    kept = []

    def minimise(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        kept.append((optimizer, loss))

    monkeypatch.setattr(module, "minimise", minimise)
    return kept


def clone(policy, steps=300):
    """Stage I on the toy."""
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        batch = toy_batch()
        loss = policy.cfm_loss(policy.encode(batch.obs), batch.chunk[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Flags of a run with a simulator that takes seconds.
FLAGS = """
    --preset cpu --hidden 32 --layers 2 --batch-size 16 --flow-steps 2 --episode-limit 25
    --workers 1 --device cpu --precision float32 --threads 1 --eval-episodes 1 --demo-episodes 2
    --warmup-steps 8 --final-episodes 1 --eval-every 1000 --log-every 4 --save-every 10
"""
TOY = FLAGS.split()

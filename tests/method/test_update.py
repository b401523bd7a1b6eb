"""POCO's update against one written by hand, and what it may not touch (Eq. 14-23, Algorithm 1).

    python -m pytest tests/method/test_update.py

The networks are shaken apart first, so one that is taken for another shows.
Not here: the updates of the baselines (tests/baselines/), the loop around (tests/training/).
"""

import copy

import pytest
import torch

from flow_policy import FlowPolicy
from logbook import Clock
from poco import resample
from replay import Batch
from train_online import POCO, Args

OBS, ACTION, HORIZON, BATCH = 2, 1, 3, 64
MEAN, STD = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7])


def make(**changes):
    """A small POCO whose policy, actor, critic and target all differ."""
    values = {
        "horizon": HORIZON,
        "hidden": 32,
        "layers": 2,
        "flow_steps": 4,
        "precision": "float32",
        "num_candidates": 4,
        "heads": 2,
    }
    args = Args(**values | changes)
    torch.manual_seed(0)
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps)
    policy.set_normalizer(MEAN, STD)
    agent = POCO(args, policy, Clock())
    for network in (agent.policy, agent.actor, agent.critic, agent.target):
        for value in network.parameters():
            value.data += 0.05 * torch.randn_like(value)
    return agent


def cut_batch():
    """Chunks of 1 to HORIZON real steps that go on, with returns of any sign."""
    return Batch(
        obs=torch.randn(BATCH, OBS),
        chunk=torch.rand(BATCH, HORIZON, ACTION) * 2 - 1,
        valid=(torch.arange(HORIZON) < torch.randint(1, HORIZON + 1, (BATCH, 1))).float(),
        returns=torch.randn(BATCH),
        bootstrap=0.5 + 0.5 * torch.rand(BATCH),
        next_obs=torch.randn(BATCH, OBS),
    )


def parameters(network):
    return torch.cat([value.detach().flatten().clone() for value in network.parameters()])


def constant(critic, *values):
    """Let every head say one number, whatever it is asked."""
    critic.out.weight.data.zero_()
    critic.out.bias.data = torch.tensor(values).reshape(-1, 1, 1)


def descend(network, loss, rate):
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def follow(average, network, rate):
    for slow, new in zip(average.parameters(), network.parameters()):
        slow.data = (1 - rate) * slow.data + rate * new.data


@pytest.mark.parametrize("particles", [0, 2])
def test_pocos_update_is_algorithm_1_by_hand(particles):
    """Critic on a policy chunk at the next state, target, E-step, M-step, average. Eq. 14-23."""
    agent = make(
        temperature=0.1,
        guidance=0.7,
        clip=1.5,
        tau=0.3,
        policy_tau=0.6,
        pessimism=1.0,
        online_learning_rate=0.01,
        critic_learning_rate=0.02,
        particles=particles,
    )
    batch = cut_batch()
    policy, actor, critic, target = (
        copy.deepcopy(network)
        for network in (agent.policy, agent.actor, agent.critic, agent.target)
    )

    torch.manual_seed(5)
    stats = agent.update(batch, warmup=False)

    torch.manual_seed(5)
    seen, seen_next = (batch.obs - MEAN) / STD, (batch.next_obs - MEAN) / STD
    next_chunk = policy.sample(seen_next, 1)
    y = batch.returns + batch.bootstrap * target(seen_next, next_chunk).amin(0).squeeze(1)
    error = critic(seen, batch.chunk[:, None]).squeeze(-1) - y
    descend(critic, error.square().mean(), 0.02)
    follow(target, critic, 0.3)
    candidates = policy.sample(seen, 4)
    q = target(seen, candidates).amin(0)
    weights = torch.softmax(q / 0.1, -1).detach()
    if particles:
        candidates, weights = resample(candidates, weights, particles)
    bc = policy.cfm_loss(seen, batch.chunk[:, None], batch.valid).mean()
    losses = policy.cfm_loss(seen, candidates)
    descend(policy, bc + 0.7 * (weights * losses.clamp(max=1.5)).sum(-1).mean(), 0.01)
    follow(actor, policy, 0.6)

    for name, network in (
        ("critic", critic),
        ("target", target),
        ("policy", policy),
        ("actor", actor),
    ):
        assert torch.allclose(parameters(getattr(agent, name)), parameters(network), atol=1e-5), (
            name
        )
    assert torch.isclose(stats["target"], y.mean())
    assert torch.isclose(stats["q_mean"], q.mean())
    assert 0.1 < stats["clip_frac"] < 0.9 and 0.3 < stats["ess"] < 0.95  # both matter here


def test_the_target_looks_at_the_next_state_alone_and_the_actor_at_its_own():
    """Another state leaves the target as it is, another next state what is learnt. Eq. 14."""
    batch = cut_batch()
    stats = []
    for one in (
        batch,
        batch._replace(obs=batch.obs + 1),
        batch._replace(next_obs=batch.next_obs + 1),
    ):
        agent = make(tau=1e-9, online_learning_rate=1e-12, critic_learning_rate=1e-12)
        torch.manual_seed(5)
        stats.append(agent.update(one, warmup=False))
    first, moved, later = stats
    assert first["target"] == moved["target"] != later["target"]
    own = set(first) - {"target", "critic"}
    assert all(torch.isclose(first[key], later[key], rtol=1e-4) for key in own)
    assert any(first[key] != moved[key] for key in own)


def test_the_pessimistic_value_of_two_heads_is_their_minimum_in_eq_14_and_16():
    agent = make(pessimism=1.0, tau=1e-9, temperature=1.0)
    constant(agent.target, 1.0, 5.0)
    batch = cut_batch()._replace(returns=torch.zeros(BATCH), bootstrap=torch.ones(BATCH))
    stats = agent.update(batch, warmup=False)
    assert torch.isclose(stats["target"], torch.tensor(1.0))
    assert torch.isclose(stats["q_mean"], torch.tensor(1.0))


def test_what_acts_follows_at_policy_tau_and_stands_still_in_warm_up():
    agent = make(policy_tau=0.25, tau=0.5)
    before = parameters(agent.actor)
    cloned = parameters(agent.policy)
    agent.update(cut_batch(), warmup=True)
    assert torch.equal(parameters(agent.actor), before)
    assert torch.equal(parameters(agent.policy), cloned)
    target = parameters(agent.target)
    agent.update(cut_batch(), warmup=False)
    moved = before + 0.25 * (parameters(agent.policy) - before)
    assert torch.allclose(parameters(agent.actor), moved, atol=1e-6)
    moved = target + 0.5 * (parameters(agent.critic) - target)
    assert torch.allclose(parameters(agent.target), moved, atol=1e-6)


def test_without_guidance_no_candidate_is_drawn():
    """guidance = 0 is behaviour cloning. Eq. 24."""
    agent = make(guidance=0.0)
    drawn = []
    sample = agent.policy.sample
    agent.policy.sample = lambda context, n: drawn.append(n) or sample(context, n)
    stats = agent.update(cut_batch(), warmup=False)
    assert drawn == [1] and "ess" not in stats and "bc" in stats


def test_the_average_acts_and_the_online_critic_chooses():
    agent = make(num_candidates=7, temperature=0.3, pessimism=0.5)
    bare, posterior = agent.acting("policy"), agent.acting("posterior")
    assert bare.policy is posterior.policy is agent.actor
    assert bare.critic is None and posterior.critic is agent.critic
    assert (posterior.num_candidates, posterior.temperature, posterior.pessimism) == (7, 0.3, 0.5)
    assert [make(act=act).collects for act in ("policy", "posterior")] == ["policy", "posterior"]


def test_each_optimiser_has_its_own_rate_and_the_critic_its_heads():
    agent = make(learning_rate=0.1, online_learning_rate=0.02, critic_learning_rate=0.003, heads=3)
    assert agent.actor_optimizer.param_groups[0]["lr"] == 0.02
    assert agent.critic_optimizer.param_groups[0]["lr"] == 0.003
    assert agent.critic.heads == agent.target.heads == 3


def test_a_saved_agent_continues_bitwise():
    agent = make()
    batches = [cut_batch() for _ in range(4)]
    for batch in batches[:2]:
        agent.update(batch, warmup=False)
    other = make()
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in (agent, other):
        torch.manual_seed(3)
        for batch in batches[2:]:
            one.update(batch, warmup=False)
    for name in ("policy", "actor", "critic", "target"):
        assert torch.equal(parameters(getattr(agent, name)), parameters(getattr(other, name)))

"""OGPO: chains and their density, advantages, the success buffer, a toy, the loop.

    python -m pytest tests/baselines/test_ogpo.py

The toy is that of toys.py: cloned data has two habits and only one of them is rewarded.
"""

import copy

import numpy as np
import pytest
import torch
from helpers import same
from torch import distributions as D
from toys import (
    ACTION,
    HORIZON,
    OBS,
    TOY,
    clone,
    differs,
    parameters,
    settings,
    toy_batch,
)

import envs
from baselines import ogpo
from flow_policy import FlowPolicy
from logbook import Clock, UserError, load_checkpoint, read_args
from logbook.series import read_run
from replay import ChunkReplay
from train_offline import Acting

VARIANTS = ("ogpo", "ogpo-plus", "ogpo-ca")


def make(variant="ogpo-ca", **changes):
    """An agent on an untrained flow."""
    args = settings(ogpo, **dict(variant=variant, heads=3, prompts=8, group=4) | changes)
    return ogpo.OGPO(
        args, FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps), Clock()
    )


def pair(**changes):
    batch = toy_batch()._replace(**changes)
    return batch, batch


def imagined(agent, n=4, size=8):
    """Context, chains and values, ready for update_actor."""
    obs = torch.randn(size, OBS)
    context = agent.policy.encode(obs)
    chains, chunks = agent.imagine(context, size, n)
    return context, chains, agent.target(obs, chunks)


def spy(monkeypatch):
    """Losses and gradients of the actor instead of a step."""
    kept = []

    def minimise(loss, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        kept.append(loss.detach())

    monkeypatch.setattr(ogpo, "minimise", minimise)
    return kept


def shake(network, size=0.05):
    for value in network.parameters():
        value.data += size * torch.randn_like(value)


# ---- chains --------------------------------------------------------------------------------------


def test_the_density_of_a_chain_is_that_of_torch_distributions():
    """Every step is Gaussian with the published mean and std; the sum is divided by K + 1 and by
    the chunk's cells."""
    policy, s0, steps = FlowPolicy(OBS, ACTION, HORIZON, 16, 2, 4).double(), 0.3, 4
    context, chains = (
        torch.randn(5, OBS).double(),
        torch.randn(5, 6, steps + 1, HORIZON, ACTION).double(),
    )
    total = D.Normal(0.0, 1.0).log_prob(chains[:, :, 0])
    for k in range(steps):
        t, x = k / steps, chains[:, :, k]
        v = policy.velocity(context, x, torch.full((5, 6), t).double())
        mean = x + (v + 0.5 * s0**2 * (t * v - x)) / steps
        total = total + D.Normal(mean, s0 * (1 - t) ** 0.5).log_prob(chains[:, :, k + 1])
    expected = total.sum((-2, -1)) / (steps + 1) / (HORIZON * ACTION)
    assert torch.allclose(ogpo.log_density(policy, context, chains, s0), expected)


def test_the_sampler_takes_the_steps_whose_density_is_computed():
    """What a chain adds to the mean of each step is s0 sqrt(1 - t) times the noise it was given,
    cut at three."""
    policy, s0 = FlowPolicy(OBS, ACTION, HORIZON, 16, 2, 4), 0.3
    context, noise = torch.randn(5, OBS), 3 * torch.randn(5, 6, 5, HORIZON, ACTION)
    chains = ogpo.sample_chains(policy, context, noise, s0)
    assert (
        chains.shape == noise.shape
        and torch.equal(chains[:, :, 0], noise[:, :, 0])
        and not chains.requires_grad
    )
    for k in range(4):
        mean = ogpo.step_mean(policy, context, chains[:, :, k], torch.full((5, 6), k / 4), s0)
        e = (chains[:, :, k + 1] - mean) / (s0 * (1 - k / 4) ** 0.5)
        assert torch.allclose(e, noise[:, :, k + 1].clamp(-3, 3), atol=1e-4) and e.abs().max() > 2.9


def test_without_noise_a_chain_is_the_flows_own_sample():
    policy, noise = (
        FlowPolicy(OBS, ACTION, HORIZON, 16, 2, 4),
        torch.randn(5, 6, 5, HORIZON, ACTION),
    )
    context = torch.randn(5, OBS)
    chunks = ogpo.sample_chains(policy, context, noise, 0.0)[:, :, -1].clamp(-1, 1)
    assert torch.allclose(chunks, policy.sample(context, 6, noise[:, :, 0]), atol=1e-6)


def test_chains_spread_a_little_more_than_the_flow_as_the_header_says():
    """Data N(0, 0.2^2) has a velocity in closed form, so every x is Gaussian and its variance a
    recursion."""

    class Exact(torch.nn.Module):
        flow_steps = 10

        def velocity(self, context, x, t):
            t = t[..., None, None]
            return x * (t * 0.2**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * 0.2**2)

    def spread(s0, scale):
        """Standard deviation of the last x, with the correction as published (1) or as large as it
        should be (K)."""
        variance = 1.0
        for k in range(10):
            t = k / 10
            slope = (t * 0.04 - (1 - t)) / ((1 - t) ** 2 + t**2 * 0.04)
            variance *= (1 + slope / 10 + scale * 0.5 * s0**2 * (t * slope - 1) / 10) ** 2
            variance += s0**2 * (1 - t) * 0.9951  # a standard normal cut at three
        return variance**0.5

    noise = torch.randn(1, 200_000, 11, 1, 1)
    for s0 in (0.0, 0.05, 0.1):
        std = ogpo.sample_chains(Exact(), None, noise, s0)[:, :, -1].std().item()
        assert abs(std / spread(s0, 1) - 1) < 0.01
    flow, published, right = spread(0.0, 1), spread(0.05, 1), spread(0.05, 10)
    assert 1.01 < published / flow < 1.1 and abs(right / flow - 1) < 0.5 * (published / flow - 1)


# ---- advantages and the loss ---------------------------------------------------------------------


def test_vanilla_advantages_sum_to_zero_over_each_group():
    q = torch.randn(3, 7, 5)
    a = ogpo.advantages(q, False)
    assert a.shape == (7, 5) and a.sum(-1).abs().max() < 1e-5
    assert torch.isclose(a[2, 1], q[:, 2, 1].mean() - q[:, 2].mean(), atol=1e-6)


def test_conservative_advantages_are_the_nearest_to_zero_of_heads_that_agree_and_zero_otherwise():
    q, found = torch.randn(3, 40, 5), set()
    a = ogpo.advantages(q, True)
    for b in range(40):
        for g in range(5):
            own = [(q[m, b, g] - q[m, b].mean()).item() for m in range(3)]
            sign = {x > 0 for x in own}
            expected = 0.0 if len(sign) == 2 else min(own) if own[0] > 0 else max(own)
            found.add((len(sign), own[0] > 0))
            assert abs(a[b, g].item() - expected) < 1e-6
    assert len(found) == 4  # agreement both ways, and disagreement, occurred


def test_a_group_of_one_chain_moves_nothing_and_is_refused(tmp_path):
    """Its advantages are 0 in every update: hours in which plain OGPO's policy would stay what it
    was."""
    agent = make("ogpo", group=1)
    before = parameters(agent.policy)
    agent.update(pair(), False)
    assert torch.equal(parameters(agent.policy), before)
    with pytest.raises(UserError, match="--group .* at least 2 chains"):
        ogpo.main(["--preset", "cpu", "--group", "1", "--data", str(tmp_path / "none.hdf5")])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_while_the_policy_equals_its_average(precision):
    """Chains may be drawn in bfloat16; both densities are computed alike, in float32."""
    agent = make(precision=precision)
    assert agent.update(pair(), warmup=False)["ratio"] == 0
    assert (
        agent.update(pair(), warmup=False)["ratio"] == 0
    )  # policy_tau 1: the average is the policy
    agent.args.policy_tau = 0.005
    agent.update(pair(), warmup=False)
    assert agent.update(pair(), warmup=False)["ratio"] > 0


def test_the_loss_is_ppos_with_one_ratio_for_each_chain(monkeypatch):
    agent = make("ogpo", ratio_clip=0.02)
    kept = spy(monkeypatch)
    shake(agent.policy)
    context, chains, q = imagined(agent)
    new, old = (
        ogpo.log_density(one, context, chains, agent.args.noise)
        for one in (agent.policy, agent.actor)
    )
    stats = agent.update_actor(context, chains, q, toy_batch())
    advantage, terms, clipped = q.mean(0) - q.mean(0).mean(-1, keepdim=True), [], 0
    for rho, a in zip((new - old).exp().flatten().tolist(), advantage.flatten().tolist()):
        bound = min(max(rho, 0.98), 1.02)
        terms.append(min(rho * a, bound * a))
        clipped += bound * a < rho * a
    assert 0 < clipped < 32 and np.isclose(stats["clip_frac"].item(), clipped / 32)
    assert np.isclose(kept[0].item(), -np.mean(terms), rtol=1e-4)


def test_the_gradient_flows_through_the_density_under_the_policy_only(monkeypatch):
    """At ratio 1 it is the policy gradient, -E[A grad log p]; critics, average and chains are
    constants."""
    agent = make("ogpo")
    spy(monkeypatch)
    context, chains, q = imagined(agent)
    agent.update_actor(context, chains, q.requires_grad_(), toy_batch())
    found = [value.grad.clone() for value in agent.policy.parameters()]
    density = ogpo.log_density(agent.policy, context, chains, agent.args.noise)
    loss = -(ogpo.advantages(q.detach(), False) * density).mean()
    wanted = torch.autograd.grad(loss, list(agent.policy.parameters()))
    assert (
        all(torch.allclose(a, b, atol=1e-8) for a, b in zip(found, wanted))
        and found[0].abs().sum() > 0
    )
    assert q.grad is None and not chains.requires_grad
    for network in (agent.actor, agent.critic, agent.target):
        assert all(value.grad is None for value in network.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_plus_and_ca_also_clone_what_they_are_given_with_its_mask(variant, monkeypatch):
    agent, cloned = make(variant, bc_weight=7.0), toy_batch()
    kept, context, chains, q = spy(monkeypatch), *imagined(agent)
    cloned = cloned._replace(valid=(torch.rand(64, HORIZON) < 0.5).float())
    torch.manual_seed(3)
    bc = agent.policy.cfm_loss(
        agent.policy.encode(cloned.obs), cloned.chunk[:, None], cloned.valid
    ).mean()
    torch.manual_seed(3)
    stats = agent.update_actor(context, chains, q, cloned)
    gradient = -ogpo.advantages(q, variant == "ogpo-ca").mean()  # at ratio 1
    assert torch.isclose(stats["bc"], bc)
    assert torch.isclose(kept[0], gradient + (0 if variant == "ogpo" else 7 * bc), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_solves_the_toy(variant):
    """Cloning is of both habits here, so that only the policy gradient can tell them apart."""
    args = settings(
        ogpo,
        variant=variant,
        heads=3,
        prompts=32,
        group=16,
        noise=0.3,
        bc_weight=0.001,
        policy_learning_rate=3e-3,
        policy_tau=0.1,
    )
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps)
    clone(policy)
    rng, obs = np.random.default_rng(0), np.zeros((1, OBS), np.float32)
    cloned = np.mean([Acting(policy)(obs, rng).mean() for _ in range(200)])
    agent = ogpo.OGPO(args, policy, Clock())
    for step in range(500):
        agent.update(pair(), warmup=step < 100)
    for mode in agent.modes:
        act = agent.acting(mode)
        good = np.mean([act(obs, rng).mean() > 0.25 for _ in range(200)])
        assert abs(cloned) < 0.15 and good > 0.9, (mode, cloned, good)


# ---- the success buffer --------------------------------------------------------------------------


def test_the_success_buffer_holds_the_steps_of_successful_episodes_that_the_ring_still_has():
    """Against a record of everything, over many episodes and turns of the ring; observations number
    the steps."""
    rng, generator, ring, demos = np.random.default_rng(0), torch.Generator().manual_seed(0), 23, 7
    replay = ChunkReplay(demos + ring, OBS, ACTION, HORIZON, 0.99)
    rows = {
        name: np.zeros((demos, width))
        for name, width in (("obs", OBS), ("action", ACTION), ("next_obs", OBS))
    }
    replay.extend(rows | {name: np.zeros(demos) for name in ("reward", "terminated", "truncated")})
    successes, episodes, step, sampled = ogpo.Successes(ring), [[]], 0, 0
    for _ in range(400):
        step += 1
        ended = (
            rng.random() < 0.2 or len(episodes[-1]) == 30
        )  # some episodes are longer than the ring
        success = ended and rng.random() < 0.5
        move = envs.Transition(
            np.full(OBS, step, np.float32),
            np.full(ACTION, step / 1000),
            0.0,
            np.zeros(OBS, np.float32),
            success,
            ended and not success,
            success,
        )
        replay.add(*move[:6])
        successes.add(move)
        episodes[-1].append(step)
        if ended:
            episodes = [*(episodes if success else episodes[:-1]), []]
        own = {
            one: episode[-1] for episode in episodes[:-1] for one in episode if one > step - ring
        }
        batch = successes.sample(replay, 5, generator)
        assert (batch is None) == (len(own) < 5)
        if batch is not None:
            sampled += 1
            starts = batch.obs[:, 0].int().tolist()
            for start, chunk, valid in zip(starts, batch.chunk[..., 0], batch.valid):
                steps = range(
                    start, min(start + HORIZON, own[start] + 1)
                )  # own[start]: the last one
                assert valid.sum() == len(steps)
                assert torch.allclose(chunk[: len(steps)], torch.tensor(steps) / 1000)
    assert sampled > 100 and step > 10 * ring


def test_every_step_of_a_successful_episode_is_drawn_and_a_restored_buffer_draws_the_same():
    replay, successes, other = (
        ChunkReplay(50, OBS, ACTION, HORIZON, 0.99),
        ogpo.Successes(50),
        ogpo.Successes(50),
    )
    for step in range(30):
        success, obs = (
            step in (9, 29),
            np.full(OBS, step, np.float32),
        )  # episodes: 0-9 yes, 10-19 no, 20-29 yes
        move = envs.Transition(obs, np.zeros(ACTION), 0.0, obs, success, step == 19, success)
        replay.add(*move[:6])
        successes.add(move)
        if step == 23:
            other.load_state_dict(copy.deepcopy(successes.state_dict()))  # inside an episode
        elif step > 23:
            other.add(move)
    drawn = [
        {
            int(batch.obs[i, 0])
            for seed in range(40)
            for batch in [one.sample(replay, 20, torch.Generator().manual_seed(seed))]
            for i in range(20)
        }
        for one in (successes, other)
    ]
    assert drawn[0] == drawn[1] == {*range(10), *range(20, 30)}


def test_what_is_cloned_is_the_same_batch_until_there_are_enough_successes():
    agent, replay, generator = (
        make(capacity=50),
        ChunkReplay(60, OBS, ACTION, HORIZON, 0.99),
        torch.Generator(),
    )
    zero = np.zeros(OBS, np.float32)
    for step in range(20):
        move = envs.Transition(
            zero + step, np.zeros(ACTION), 0.0, zero, step == 19, False, step == 19
        )
        replay.add(*move[:6])
        agent.observe(move)
        batch, cloned = agent.draw(replay, 16, generator) if step > 4 else (None, None)
        assert (batch is cloned) == (step < 19)
    assert len(cloned.obs) == 16


# ---- options -------------------------------------------------------------------------------------


def test_the_average_follows_at_its_own_rate():
    agent = make("ogpo", policy_tau=0.25)
    start = parameters(agent.policy)
    agent.update(pair(), warmup=False)
    end = parameters(agent.policy)
    assert torch.allclose(parameters(agent.actor), start + 0.25 * (end - start), atol=1e-6)
    assert not torch.equal(start, end) and ogpo.Args().policy_tau == 0.005


def test_chains_are_imagined_and_rated_for_the_first_prompts_of_the_batch(monkeypatch):
    agent, seen, batches = make("ogpo"), [], pair()
    monkeypatch.setattr(
        agent,
        "update_actor",
        lambda context, chains, *_: seen.append((context, chains.shape)) or {},
    )
    agent.update(batches, warmup=False)
    assert torch.equal(seen[0][0], agent.policy.encode(batches[0].obs[:8])) and seen[0][1][:2] == (
        8,
        4,
    )


def test_the_target_is_the_value_of_a_chunk_of_the_averaged_actor():
    """The mean of the heads."""
    agent = make()
    shake(agent.actor)
    batch, _ = pair(returns=torch.zeros(64), bootstrap=torch.full((64,), 0.5))
    torch.manual_seed(5)
    noise = torch.randn(64, 1, agent.policy.flow_steps + 1, HORIZON, ACTION)
    chains = ogpo.sample_chains(agent.actor, batch.next_obs, noise, agent.args.noise)
    expected = 0.5 * agent.target(batch.next_obs, chains[:, :, -1].clamp(-1, 1)).mean()
    torch.manual_seed(5)
    assert torch.isclose(agent.update((batch, batch), True)["target"], expected)


def test_the_averaged_actor_collects_with_noise_and_is_evaluated_without():
    agent = make()
    shake(agent.actor, 0.5)
    obs = np.ones((1, OBS), np.float32)
    noise = np.random.default_rng(3).standard_normal(
        (1, 1, agent.policy.flow_steps + 1, HORIZON, ACTION), np.float32
    )
    chain = ogpo.sample_chains(
        agent.actor, torch.as_tensor(obs), torch.as_tensor(noise), agent.args.noise
    )
    found = agent.acting("chain")(obs, np.random.default_rng(3))
    assert np.array_equal(found, chain[0, 0, -1].clamp(-1, 1).numpy())
    bare = agent.acting("policy")(obs, np.random.default_rng(4))
    assert np.array_equal(bare, Acting(agent.actor)(obs, np.random.default_rng(4)))


# ---- the agent in the loop -----------------------------------------------------------------------


def test_warm_up_trains_the_critic_only_and_declared_figures_are_finite():
    agent = make()
    before, critic = (
        [parameters(one) for one in (agent.policy, agent.actor)],
        parameters(agent.critic),
    )
    agent.update(pair(), warmup=True)
    assert not any(differs(*one) for one in zip((agent.policy, agent.actor), before))
    assert differs(agent.critic, critic)
    stats = agent.update(pair(), warmup=False)
    assert set(stats) == set(agent.stats) and all(
        np.isfinite(float(value)) for value in stats.values()
    )
    assert not any(value.requires_grad for value in stats.values())
    batch = pair()  # its episodes have ended: the target is the return
    assert torch.isclose(agent.update(batch, True)["target"], batch[0].returns.mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_agent_restored_from_its_state_continues_bitwise(variant):
    agent, other, batches = (
        make(variant),
        make(variant),
        [pair() for _ in range(4)],
    )
    for i, one in enumerate(batches[:2]):
        agent.update(one, warmup=i == 0)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in (agent, other):
        torch.manual_seed(1)
        for batch in batches[2:]:
            one.update(batch, warmup=False)
    for network in ("policy", "actor", "critic", "target"):
        assert not differs(getattr(other, network), parameters(getattr(agent, network))), network


@pytest.mark.sim
def test_a_run_resumed_is_bitwise_the_uninterrupted_run_and_evaluated_both_ways(
    demo_file, checkpoint, tmp_path
):
    """18 steps + resume + 22 == 40; 18 stops inside a chunk."""
    command = [
        *TOY,
        "--data",
        str(demo_file),
        "--checkpoint",
        str(checkpoint),
        *[
            "--variant",
            "ogpo-plus",
            "--heads",
            "2",
            "--prompts",
            "4",
            "--group",
            "4",
        ],
    ]
    ogpo.main([*command, "--online-steps", "40", "--run-dir", str(tmp_path / "whole")])
    ogpo.main([*command, "--online-steps", "18", "--run-dir", str(tmp_path / "parts")])
    ogpo.main(["--resume", str(tmp_path / "parts"), "--online-steps", "40"])
    same(*(load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")))
    assert read_args(tmp_path / "whole")["method"] == "ogpo-plus"
    assert {acting: sorted(steps) for acting, steps in read_run(tmp_path / "whole")[1].items()} == {
        "policy": [0, 40],
        "chain": [40],
    }

"""The baselines: what a wrong one breaks, a toy that each must solve, and the loop they share.

    python -m pytest tests/baselines/test_baselines.py

Not here: what all off-policy updates have in common (test_methods.py), OGPO (test_ogpo.py), the
on-policy methods (test_onpolicy.py).
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import same
from torch import distributions as D
from toys import (
    ACTION,
    HORIZON,
    METHODS,
    OBS,
    TOY,
    clone,
    differs,
    make,
    parameters,
    settings,
    spy_gradients,
    toy_batch,
)

import envs
import train_online
from baselines import dsrl, fql, ogpo, qc, rlpd
from flow_policy import FlowPolicy
from logbook import Clock, UserError, load_checkpoint, read_args
from logbook.options import parse
from logbook.series import read_run
from replay import ChunkReplay
from train_offline import Acting

# ---- every method --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_each_method_solves_the_toy(name):
    module, agent_class, variant = METHODS[name]
    args = settings(module, **variant, alpha=0.3, num_candidates=16)
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps)
    clone(policy)
    rng, obs = np.random.default_rng(0), np.zeros((1, OBS), np.float32)
    cloned = np.mean([Acting(policy)(obs, rng).mean() for _ in range(200)])
    agent = agent_class(args, policy, Clock())
    for step in range(500):
        batch = toy_batch()
        if name == "dsrl-sac":  # it learns from noise: what the noise led to is rewarded
            w = 1.5 * (2 * torch.rand_like(batch.chunk) - 1)
            reached = policy.sample(policy.encode(batch.obs), 1, w[:, None]).mean((1, 2, 3))
            batch = batch._replace(chunk=w, returns=(reached > 0).float())
        agent.update(batch, warmup=step < 100)
    act = agent.acting(agent.modes[0])
    reached = np.array([act(obs, rng).mean() for _ in range(200)])
    assert abs(cloned) < 0.15 and (reached > 0.25).mean() > 0.9, (
        cloned,
        reached.mean(),
        (reached > 0.25).mean(),
    )


@pytest.mark.parametrize("name", METHODS)
def test_warm_up_trains_the_critic_and_leaves_what_acts_alone(name):
    agent = make(name)
    act, rng = agent.acting("policy"), np.random.default_rng(0)
    obs = np.ones((1, OBS), np.float32)
    before, critic = act(obs, np.random.default_rng(0)), parameters(agent.critic)
    for _ in range(3):
        agent.update(toy_batch(), warmup=True)
    assert np.array_equal(before, act(obs, np.random.default_rng(0))) and differs(
        agent.critic, critic
    )
    for _ in range(3):
        agent.update(toy_batch(), warmup=False)
    assert not np.array_equal(before, act(obs, np.random.default_rng(0)))
    assert act(obs, rng).shape == (HORIZON, ACTION) and act(obs, rng).dtype == np.float32


@pytest.mark.parametrize("name", METHODS)
def test_targets_carry_no_gradient_and_every_declared_figure_is_finite(name):
    agent = make(name)
    batch = toy_batch()._replace(bootstrap=torch.full((64,), 0.9))
    stats = agent.update(batch, warmup=False)
    assert set(stats) == set(agent.stats) - ({"noise_critic"} if name == "dsrl-sac" else set())
    assert all(np.isfinite(float(value)) for value in stats.values())
    assert not any(value.requires_grad for value in stats.values())
    assert not any(
        value.requires_grad or value.grad is not None for value in agent.target.parameters()
    )
    assert all(
        value.requires_grad for value in agent.critic.parameters()
    )  # frozen only while the actor climbs


@pytest.mark.parametrize("name", METHODS)
def test_the_target_bootstraps_with_the_discount_and_not_through_a_terminal(name):
    """y = returns + bootstrap * next value: with bootstrap 0 it is the return, whatever the next
    state."""
    agent = make(name)
    batch = toy_batch()
    assert torch.isclose(agent.update(batch, True)["target"], batch.returns.mean())
    agent.target.out.bias.data.fill_(7.0)
    agent.target.out.weight.data.zero_()
    agent.args.tau = 0.0
    stats = agent.update(batch._replace(bootstrap=torch.full((64,), 0.5)), True)
    assert torch.isclose(stats["target"], batch.returns.mean() + 3.5)


@pytest.mark.parametrize("name", ["qc", "qc-fql"])
def test_steps_after_an_episodes_end_are_not_cloned(name, monkeypatch):
    """The replay's mask reaches the flow-matching loss."""
    agent, batch, seen = make(name), toy_batch(), []
    loss = agent.policy.cfm_loss

    def spy(context, actions, valid=None):
        seen.append(valid)
        return loss(context, actions, valid)

    monkeypatch.setattr(agent.policy, "cfm_loss", spy)
    agent.update(batch, warmup=False)
    assert len(seen) == 1 and seen[0] is batch.valid


@pytest.mark.parametrize("name", METHODS)
def test_an_agent_restored_from_its_state_continues_bitwise(name):
    agent, other = make(name), make(name)
    batches = [toy_batch() for _ in range(4)]
    for i, batch in enumerate(batches[:2]):
        agent.update(batch, warmup=i == 0)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in (agent, other):
        torch.manual_seed(1)
        for batch in batches[2:]:
            one.update(batch, warmup=False)
    obs = np.ones((1, OBS), np.float32)
    actions = [one.acting(one.modes[0])(obs, np.random.default_rng(0)) for one in (agent, other)]
    assert np.array_equal(*actions) and not differs(other.critic, parameters(agent.critic))


# ---- QC ------------------------------------------------------------------------------------------


def test_qc_with_one_candidate_is_behaviour_cloning_bitwise():
    """POCO with guidance 0 is behaviour cloning on the replay; QC with N = 1 ends in the same
    weights, all of them."""
    agent = make("qc", num_candidates=1)
    cloning = train_online.POCO(
        settings(train_online, guidance=0.0), copy.deepcopy(agent.policy), Clock()
    )
    for network in ("critic", "target"):
        getattr(cloning, network).load_state_dict(getattr(agent, network).state_dict())
    batches = [toy_batch()._replace(bootstrap=torch.ones(64)) for _ in range(6)]
    for one in (agent, cloning):
        torch.manual_seed(1)
        for i, batch in enumerate(batches):
            one.update(batch, warmup=i < 2)
    for network in ("policy", "actor", "critic", "target"):
        assert torch.equal(
            parameters(getattr(agent, network)), parameters(getattr(cloning, network))
        ), network
    obs = np.ones((1, OBS), np.float32)
    assert np.array_equal(
        agent.acting("best")(obs, np.random.default_rng(3)),
        agent.acting("policy")(obs, np.random.default_rng(3)),
    )


def test_qc_takes_the_candidate_its_critic_likes_best_on_average():
    policy = FlowPolicy(OBS, ACTION, HORIZON, 16, 1, 2)
    noise = torch.randn(5, 8, HORIZON, ACTION)

    def critic(obs, chunks):  # two heads that disagree: their mean likes small actions
        return torch.stack([chunks.sum((-2, -1)), -3 * chunks.sum((-2, -1))])

    context = policy.encode(torch.zeros(5, OBS))
    chosen = qc.best_of_n(policy, critic, context, 8, noise=noise)
    sums = policy.sample(torch.zeros(5, OBS), 8, noise=noise).sum((-2, -1))
    assert chosen.shape == (5, 1, HORIZON, ACTION) and torch.equal(
        chosen.sum((-2, -1)).squeeze(1), sums.amin(1)
    )


def test_qc_bootstraps_with_the_target_critics_value_of_the_online_critics_choice():
    agent = make("qc", num_candidates=16)
    agent.target.load_state_dict(make("qc").critic.state_dict())
    batch = toy_batch()._replace(returns=torch.zeros(64), bootstrap=torch.ones(64))
    torch.manual_seed(5)
    chunks = agent.policy.sample(agent.policy.encode(batch.next_obs), 16)
    pick = agent.critic(batch.next_obs, chunks).mean(0).argmax(1, keepdim=True)
    expected = agent.target(batch.next_obs, chunks).mean(0).gather(1, pick).mean()
    torch.manual_seed(5)
    assert torch.isclose(agent.update(batch, True)["target"], expected)


# ---- FQL -----------------------------------------------------------------------------------------


def test_fql_climbs_q_through_the_action_only(monkeypatch):
    """The gradient of -Q reaches the one-step policy, and neither the flow nor the critic."""
    agent, batch = make("qc-fql", alpha=0.0), toy_batch()
    spy_gradients(monkeypatch, fql)
    monkeypatch.setattr(agent.policy, "cfm_loss", lambda *_: torch.zeros(()))
    agent.update_actor(batch, warmup=False)
    assert any(value.grad.abs().sum() > 0 for value in agent.one_step.parameters())
    for network in (agent.policy, agent.critic, agent.target):
        assert all(value.grad is None for value in network.parameters())


def test_fql_distils_the_unclipped_chunk_to_the_flows_for_the_same_noise(monkeypatch):
    """L_distill with alpha: no gradient in the flow; zero for a one-step policy that equals the
    flow."""
    agent, batch = make("qc-fql", flow_steps=1, alpha=2.0), toy_batch()
    z = 0.1 * torch.randn(64, 1, HORIZON, ACTION)
    context = agent.policy.encode(batch.obs)
    assert (
        agent.distillation(context, z)[1] < 1e-12
    )  # one Euler step is the one-step policy's start
    agent.one_step.out.bias.data.add_(3.0)  # beyond the action range: the distance is 3, not less
    loss = agent.distillation(context, z)[1]
    assert torch.isclose(loss, torch.tensor(9.0), rtol=1e-3)
    loss.backward()
    assert all(value.grad is None for value in agent.policy.parameters())


@pytest.mark.parametrize(
    "task, flags, alpha",
    [
        ("lift", [], 10),
        ("scene", [], 10),
        ("cube-triple", [], 300),
        ("cube-triple", ["--alpha", "7"], 7),
    ],
)
def test_fqls_alpha_follows_the_scale_of_the_tasks_rewards(task, flags, alpha):
    assert parse(fql.Args, ["--task", task, "--preset", "cpu", *flags]).alpha == alpha


@pytest.mark.parametrize("method, heads", [(qc, 5), (rlpd, 10), (ogpo, 10)])
def test_a_methods_own_default_wins_over_the_preset(method, heads):
    assert envs.TASKS["can"].cpu["heads"] == 5
    assert parse(method.Args, ["--task", "can", "--preset", "cpu"]).heads == heads
    assert parse(method.Args, ["--task", "can", "--preset", "cpu", "--heads", "3"]).heads == 3


def test_fql_weighs_its_three_losses_as_published(monkeypatch):
    agent, batch = make("qc-fql", alpha=7.0), toy_batch()
    kept = spy_gradients(monkeypatch, fql)
    stats = agent.update_actor(batch, warmup=False)
    assert torch.isclose(kept[0][1], stats["bc"] + 7 * stats["distill"] - stats["q_actor"])


def test_fql_asks_the_critic_about_the_clipped_chunk():
    agent, batch = make("qc-fql"), toy_batch()
    agent.one_step.out.bias.data.add_(9.0)  # all of it beyond the action range
    expected = agent.critic(batch.obs, torch.ones(64, 1, HORIZON, ACTION)).mean()
    assert torch.isclose(agent.update_actor(batch, warmup=False)["q_actor"], expected)
    assert (
        agent.acting("policy")(np.ones((1, OBS), np.float32), np.random.default_rng(0)) == 1
    ).all()


def test_fql_bootstraps_with_a_clipped_chunk_of_the_one_step_policy():
    agent = make("qc-fql")
    agent.one_step.out.bias.data.sub_(9.0)
    batch = toy_batch()._replace(returns=torch.zeros(64), bootstrap=torch.ones(64))
    expected = agent.target(batch.next_obs, -torch.ones(64, 1, HORIZON, ACTION)).mean()
    assert torch.isclose(agent.update(batch, True)["target"], expected)


def test_fql_is_single_actions_and_qc_fql_chunks():
    assert fql.Args(variant="fql").horizon == 1 and fql.Args(variant="qc-fql").horizon == 5
    assert rlpd.Args(variant="rlpd").horizon == 1 and rlpd.Args().horizon == 5


# ---- RLPD ----------------------------------------------------------------------------------------


def test_rlpds_log_density_is_that_of_torch_distributions():
    policy = FlowPolicy(OBS, ACTION, HORIZON, 16, 1, 2).double()
    policy.set_normalizer(torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7]))
    actor = rlpd.TanhGaussian(policy, 16, 2).double()
    actor.out.bias.data[HORIZON * ACTION] = -5.0  # one cell is nearly certain
    obs, noise = torch.randn(50, OBS).double(), torch.randn(50, HORIZON, ACTION).double()
    chunk, log_density = actor(obs, noise)
    mean, log_std = actor.out(actor.body(policy.encode(obs))).chunk(2, -1)
    base = D.Independent(D.Normal(mean, log_std.exp()), 1)
    expected = D.TransformedDistribution(base, D.TanhTransform(cache_size=1))
    assert torch.allclose(log_density, expected.log_prob(chunk.flatten(1)))
    far = actor(obs, torch.full_like(noise, 60.0))  # tanh saturates to 1 exactly
    assert torch.isfinite(far[1]).all() and (far[0] <= 1).all()


def filled_replay(demos, online):
    """Demonstrations have observation 0, experience has 1; no episode ends in it. RLPD's share of
    each."""
    replay = ChunkReplay(500, OBS, ACTION, HORIZON, 0.99, demo_share=rlpd.Args().demo_share)

    def rows(n, value):
        return dict(
            obs=np.full((n, OBS), value),
            action=np.zeros((n, ACTION)),
            reward=np.zeros(n),
            next_obs=np.zeros((n, OBS)),
            terminated=np.zeros(n),
            truncated=np.zeros(n),
        )

    if demos:
        replay.extend(rows(demos, 0.0))
    for _ in range(online):
        replay.add(np.ones(OBS), np.zeros(ACTION), 0.0, np.zeros(OBS), False, False)
    return replay


@pytest.mark.parametrize(
    "demos, online, share",
    [(20, 200, 0.5), (200, 20, 0.5), (20, HORIZON - 1, 0.0), (20, 0, 0.0), (0, 20, 1.0)],
)
def test_rlpds_batches_are_half_demonstrations_half_experience(demos, online, share):
    """Whatever their numbers; as long as no own chunk is complete, all come from the
    demonstrations."""
    replay, generator = filled_replay(demos, online), torch.Generator().manual_seed(0)
    agent = make("rlpd-ac")
    batch = agent.draw(replay, 64, generator)
    assert len(batch.obs) == 64 and batch.obs[:, 0].mean() == share
    if online > HORIZON:
        assert {row.item() for row in agent.draw(replay, 4000, generator).valid.sum(1)} <= {
            1.0,
            2.0,
            3.0,
        }
        own = agent.draw(replay, 4000, generator)
        assert (
            own.valid[own.obs[:, 0] == 1].sum(1) == HORIZON
        ).all()  # the open tail is never sampled


def test_rlpds_target_can_be_the_minimum_of_two_heads_with_the_entropy_bonus():
    agent = make("rlpd-ac", subset=2, entropy_backup=True, heads=3, init_temperature=0.5)
    assert agent.target_entropy == -0.5 * HORIZON * ACTION
    batch = toy_batch()._replace(returns=torch.zeros(64), bootstrap=torch.ones(64))
    torch.manual_seed(5)
    chunk, log_density = agent.actor(batch.next_obs)
    two = torch.randperm(3)[:2]
    expected = (
        agent.target(batch.next_obs, chunk[:, None])[two, :, 0].amin(0) - 0.5 * log_density
    ).mean()
    torch.manual_seed(5)
    assert torch.isclose(agent.update(batch, True)["target"], expected)


@pytest.mark.parametrize("name", ["rlpd-ac", "dsrl-na", "dsrl-sac"])
def test_the_temperature_rises_when_there_is_too_little_entropy_and_falls_when_too_much(name):
    agent, actions = make(name), {}
    entropy = -agent.actor(torch.randn(500, OBS))[1].mean().item()
    for wanted in (entropy - 1, entropy + 1):
        agent.target_entropy = agent.args.target_entropy = wanted
        before = agent.temperature().item()
        agent.update(toy_batch(), warmup=False)
        actions[wanted > entropy] = agent.temperature().item() > before
    assert actions == {False: False, True: True}


@pytest.mark.parametrize("name", ["rlpd-ac", "dsrl-na"])
def test_entropy_and_value_both_pull_at_the_actor(name, monkeypatch):
    """Actor loss: alpha log pi - Q; with a constant Q the policy only spreads."""
    agent = make(name, init_temperature=1.0)
    network = agent.noise_critic if name == "dsrl-na" else agent.critic
    network.out.weight.data.zero_()
    agent.actor.out.bias.data[HORIZON * ACTION :] = -2.0  # a narrow start
    monkeypatch.setattr(agent, "update_critic", lambda batch: {})
    monkeypatch.setattr(agent, "update_noise_critic", lambda obs: {}, raising=False)
    first, last = [float(agent.update(toy_batch(), False)["entropy"]) for _ in range(60)][::59]
    assert last > first + 0.5


# ---- DSRL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dsrl-na", "dsrl-sac"])
def test_dsrl_leaves_the_flow_untouched_and_needs_no_gradient_in_it(name):
    agent = make(name)
    before = parameters(agent.policy)
    for _ in range(3):
        agent.update(toy_batch()._replace(bootstrap=torch.ones(64)), warmup=False)
    assert not differs(agent.policy, before)
    assert not any(
        value.requires_grad or value.grad is not None for value in agent.policy.parameters()
    )


def test_dsrls_noise_critic_learns_the_value_of_what_the_flow_makes_of_the_noise():
    """Q^W(s, w) = Q^A(s, F(s, w)), without moving Q^A."""
    agent, losses = make("dsrl-na"), []
    agent.critic.out.weight.data.mul_(3)
    before = parameters(agent.critic)
    for _ in range(150):
        losses.append(float(agent.update_noise_critic(torch.randn(64, OBS))["noise_critic"]))
    assert not differs(agent.critic, before) and np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.parametrize("name, bound", [("dsrl-na", 0.3), ("dsrl-sac", 1.5)])
def test_dsrls_noise_stays_in_its_bound_and_warm_up_acts_like_the_flow(name, bound):
    agent = make(name, noise_bound=bound)
    obs, act = np.ones((1, OBS), np.float32), agent.acting("policy")
    if name == "dsrl-na":  # the clip of the other variant hardly ever acts
        flow = Acting(agent.policy)(obs, np.random.default_rng(0))
        assert np.array_equal(act(obs, np.random.default_rng(0)), flow)
    agent.update(toy_batch(), warmup=False)
    rng = np.random.default_rng(1)
    for _ in range(20):
        chunk = act(obs, rng)
        assert act.noise.abs().max() <= bound
        expected = agent.policy.sample(torch.as_tensor(obs), 1, act.noise[None, None])
        assert np.array_equal(chunk, expected[0, 0].numpy())


@pytest.mark.parametrize("name", ["dsrl-na", "dsrl-sac"])
def test_dsrls_actor_climbs_the_value_of_the_noise_that_it_would_send(name):
    agent, obs = make(name, noise_bound=3.0), torch.randn(64, OBS)
    torch.manual_seed(5)
    expected = agent.noise_critic(obs, 3 * agent.actor(obs)[0].unsqueeze(1)).mean()
    torch.manual_seed(5)
    assert torch.isclose(agent.update_actor(obs)["q_actor"], expected)


class OnDevice:
    """A tensor of an accelerator: numpy cannot read it."""

    def __init__(self, value):
        self.value = value

    def cpu(self):
        return self.value


def test_dsrl_sac_remembers_one_noise_for_each_chunk_with_its_discounted_rewards():
    agent = make("dsrl-sac", discount=0.5, reward_offset=-0.25)
    assert agent.draw(None, 8, None) is None and agent.update(None, True) == {}
    noises, agent.steered = (
        [torch.full((HORIZON, ACTION), float(i)) for i in range(3)],
        SimpleNamespace(),
    )

    def step(i, chunk, terminated=False, truncated=False):
        agent.steered.noise = OnDevice(noises[chunk])
        before, after = np.full(OBS, i, np.float32), np.full(OBS, i + 1, np.float32)
        agent.observe(
            envs.Transition(before, np.zeros(ACTION), 1.0, after, terminated, truncated, terminated)
        )

    for i in range(3):
        step(i, 0)  # a whole chunk
    step(3, 1)
    step(4, 1, terminated=True)  # cut after two of three steps
    step(9, 2)
    step(10, 2, truncated=True)  # cut, too, but goes on in the value
    step(20, 0)  # only begun
    data = agent.memory.replay.data
    assert len(agent.memory.replay) == 3
    assert data["obs"][:3, 0].tolist() == [0, 3, 9] and data["next_obs"][:3, 0].tolist() == [
        3,
        5,
        11,
    ]
    assert data["action"][:3, :3].tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert data["reward"][:2].tolist() == [0.75 * 1.75, 0.75 * 1.5] and data["terminated"][
        :2
    ].tolist() == [0, 1]
    batch = agent.draw(None, 32, torch.Generator().manual_seed(0))
    assert batch.chunk.shape == (32, HORIZON, ACTION) and set(batch.bootstrap.tolist()) == {
        0.0,
        0.125,
        0.25,
    }


# ---- the loop they share -------------------------------------------------------------------------


@pytest.mark.sim
def test_a_baseline_resumed_is_bitwise_the_uninterrupted_run(demo_file, checkpoint, tmp_path):
    """18 steps + resume + 22 == 40, in the baseline with the most state of its own; 18 stops inside
    a chunk."""
    command = [
        *TOY,
        "--data",
        str(demo_file),
        "--checkpoint",
        str(checkpoint),
        "--variant",
        "dsrl-sac",
    ]
    dsrl.main([*command, "--online-steps", "40", "--run-dir", str(tmp_path / "whole")])
    dsrl.main([*command, "--online-steps", "18", "--run-dir", str(tmp_path / "parts")])
    dsrl.main(["--resume", str(tmp_path / "parts"), "--online-steps", "40"])
    same(*(load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")))


@pytest.mark.sim
def test_qc_is_evaluated_in_both_ways_of_acting_and_rlpd_needs_no_stage_one(
    demo_file, checkpoint, tmp_path, capsys
):
    command = [*TOY, "--data", str(demo_file), "--online-steps", "12"]
    qc.main([*command, "--checkpoint", str(checkpoint), "--run-dir", str(tmp_path / "qc")])
    evaluations = read_run(tmp_path / "qc")[1]
    assert {acting: sorted(steps) for acting, steps in evaluations.items()} == {
        "policy": [0, 12],
        "best": [12],
    }
    rlpd.main([*command, "--variant", "rlpd", "--run-dir", str(tmp_path / "rlpd")])
    assert read_args(tmp_path / "rlpd")["horizon"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qc", "rlpd"]
    with pytest.raises(UserError, match="rlpd-ac begins untrained: leave out --checkpoint"):
        rlpd.main([*command, "--checkpoint", str(checkpoint), "--run-dir", str(tmp_path / "none")])
    qc.main(["--eval", str(tmp_path / "qc")])
    assert "acting from the best: success" in capsys.readouterr().out

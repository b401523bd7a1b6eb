"""One update of every off-policy method: what they must have in common.

    python -m pytest tests/baselines/test_methods.py

Networks are shaken apart first, so one that is taken for another shows.
Not here: POCO's update by hand (tests/method/test_update.py), the loop (tests/training/).
"""

import pytest
import torch
from toys import ACTION, HORIZON, OBS, parameters, settings, spy_gradients, toy_batch

import train_online
from baselines import dsrl, fql, ogpo, qc, rlpd
from flow_policy import FlowPolicy
from logbook import Clock

METHODS = {
    "poco": (train_online, train_online.POCO),
    "qc": (qc, qc.QC),
    "qc-fql": (fql, fql.FQL),
    "rlpd-ac": (rlpd, rlpd.RLPD),
    "dsrl-na": (dsrl, dsrl.DSRL),
    "dsrl-sac": (dsrl, dsrl.DSRL),
    "ogpo": (ogpo, ogpo.OGPO),
}


def make(name, **changes):
    """An agent whose networks all differ; noise is chosen and the one-step policy acts already."""
    torch.manual_seed(0)
    module, agent_class = METHODS[name]
    args = settings(module, **dict(variant=name, heads=2, prompts=64, group=4) | changes)
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps)
    policy.set_normalizer(torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7]))
    agent = agent_class(args, policy, Clock())
    for network in (one for one in vars(agent).values() if isinstance(one, torch.nn.Module)):
        for value in network.parameters():
            value.data += 0.05 * torch.randn_like(value)
    return agent


def cut_batch():
    """Chunks of 1 to HORIZON real steps that go on, with returns of any sign."""
    valid = (torch.arange(HORIZON) < torch.randint(1, HORIZON + 1, (64, 1))).float()
    return toy_batch()._replace(
        valid=valid, returns=torch.randn(64), bootstrap=0.5 + 0.5 * torch.rand(64)
    )


def update(agent, batch, warmup=False):
    return agent.update((batch, batch) if agent.name.startswith("ogpo") else batch, warmup)


def constant(critic, *values):
    """Every head says one number, whatever it is asked."""
    critic.out.weight.data.zero_()
    critic.out.bias.data = torch.tensor(values).reshape(-1, 1, 1)


@pytest.mark.parametrize("name", METHODS)
def test_the_target_looks_at_the_next_state_alone_and_the_actor_at_its_own(name):
    """Eq. 14: another state leaves the target as it is, another next state what is learnt
    besides."""
    batch, stats = cut_batch(), []
    for one in (
        batch,
        batch._replace(obs=batch.obs + 1),
        batch._replace(next_obs=batch.next_obs + 1),
    ):
        agent = make(
            name,
            tau=0.0,
            online_learning_rate=1e-12,
            critic_learning_rate=1e-12,
            policy_learning_rate=1e-12,
        )
        if name.startswith("dsrl"):
            agent.steered.ready.fill_(1)
        torch.manual_seed(5)
        stats.append(update(agent, one))
    first, moved, later = stats
    assert first["target"] == moved["target"] != later["target"]
    own = set(first) - {"target", "critic", "agree", "ratio", "clip_frac", "alive_mass"}
    assert all(torch.isclose(first[key], later[key], rtol=1e-4) for key in own), name
    assert any(first[key] != moved[key] for key in own)


@pytest.mark.parametrize("name", METHODS)
def test_heads_that_disagree_count_as_each_method_says(name):
    """With two heads pessimism 1 is their minimum; RLPD and OGPO take the mean. The actor climbs
    the online mean."""
    agent = make(
        name,
        pessimism=1.0,
        tau=0.0,
        online_learning_rate=1e-12,
        critic_learning_rate=1e-12,
        temperature=1.0,
    )
    batch = toy_batch()._replace(returns=torch.zeros(64), bootstrap=torch.ones(64))
    constant(agent.target, 1.0, 5.0)
    constant(agent.critic, 2.0, 10.0)
    if name == "dsrl-na":
        constant(agent.noise_critic, 7.0, 9.0)
    stats = update(agent, batch)
    assert torch.isclose(stats["target"], torch.tensor(3.0 if name in ("rlpd-ac", "ogpo") else 1.0))
    if name == "poco":
        assert stats["q_mean"] == 1
    if "q_actor" in stats:
        assert torch.isclose(stats["q_actor"], torch.tensor(8.0 if name == "dsrl-na" else 6.0))
    if name == "dsrl-na":  # its regression is on the online critic's minimum, 2
        assert torch.isclose(stats["noise_critic"], torch.tensor((5.0**2 + 7.0**2) / 2))


@pytest.mark.parametrize("name", ["poco", "qc", "qc-fql", "ogpo"])
def test_what_acts_follows_at_policy_tau_and_the_target_critic_at_tau(name):
    agent, batch = make(name, policy_tau=0.25, tau=0.5), cut_batch()
    learns, acts = (
        (agent.one_step, agent.actor.one_step) if name == "qc-fql" else (agent.policy, agent.actor)
    )
    for warmup in (True, False):
        before, target = parameters(acts), parameters(agent.target)
        update(agent, batch, warmup)
        if not warmup or name == "qc-fql":  # whose one-step policy is distilled in the warm-up, too
            assert torch.allclose(
                parameters(acts), before + 0.25 * (parameters(learns) - before), atol=1e-6
            )
        else:
            assert torch.equal(parameters(acts), before)
        assert torch.allclose(
            parameters(agent.target), target + 0.5 * (parameters(agent.critic) - target), atol=1e-6
        )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rlpd-ac"])
def test_warm_up_leaves_the_cloned_policy_alone(name):
    agent = make(name)
    before = parameters(agent.policy)
    for _ in range(3):
        update(agent, cut_batch(), warmup=True)
    assert torch.equal(parameters(agent.policy), before)


@pytest.mark.parametrize(
    "name, mode",
    [("poco", "policy"), ("poco", "posterior"), ("qc", "policy"), ("qc", "best")]
    + [("ogpo", "policy"), ("ogpo", "chain")],
)
def test_the_average_acts_and_a_critic_that_chooses_is_the_online_one(name, mode):
    """The flags of choosing arrive."""
    agent = make(name, num_candidates=7, temperature=0.3, pessimism=0.5, noise=0.7)
    act = agent.acting(mode)
    assert act.policy is agent.actor
    if mode == "posterior":
        assert act.critic is agent.critic
        assert (act.num_candidates, act.temperature, act.pessimism) == (7, 0.3, 0.5)
    if mode == "best":
        assert act.critic is agent.critic
        assert (act.n, act.pessimism) == (7, 0.5)
    if mode == "chain":
        assert act.s0 == 0.7


def test_who_collects():
    assert [make("poco", act=act).collects for act in ("policy", "posterior")] == [
        "policy",
        "posterior",
    ]
    assert [make(name).collects for name in ("qc", "ogpo", "qc-fql")] == ["best", "chain", "policy"]


@pytest.mark.parametrize("name", METHODS)
def test_critics_see_what_the_policy_standardised_and_have_as_many_heads_as_asked(name):
    agent = make(name, heads=3)
    batch = cut_batch()
    mean, std = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.7])
    known = [((obs - mean) / std).tolist() for obs in (batch.obs, batch.next_obs)]
    for critic in (agent.critic, agent.target):
        assert critic.heads == 3
        seen = []
        plain = critic.forward

        def spy(obs, chunks, plain=plain, seen=seen):
            seen.append(obs.tolist())
            return plain(obs, chunks)

        critic.forward = spy
        update(agent, batch)
        assert seen and all(obs in known for obs in seen)


@pytest.mark.parametrize("name", METHODS)
def test_every_optimiser_has_the_rate_of_stage_two(name):
    """Policies have --online-learning-rate, OGPO's its own, critics --critic-learning-rate."""
    agent = make(
        name,
        learning_rate=0.1,
        online_learning_rate=0.02,
        policy_learning_rate=0.003,
        critic_learning_rate=0.04,
    )
    rates = {
        key: one.param_groups[0]["lr"]
        for key, one in vars(agent).items()
        if isinstance(one, torch.optim.Adam)
    }
    assert rates.pop("actor_optimizer") == (0.003 if name == "ogpo" else 0.02)
    assert set(rates.values()) == {0.04}


@pytest.mark.parametrize("name", ["rlpd-ac", "dsrl-na", "dsrl-sac"])
def test_neither_the_actor_moves_for_the_temperature_nor_the_temperature_for_the_actor(
    name, monkeypatch
):
    """d/d log alpha = alpha (entropy - target); the actor's gradient is that of -alpha entropy -
    Q."""
    agent, batch = make(name, init_temperature=0.5, noise_bound=2.0), toy_batch()
    agent.target_entropy = agent.args.target_entropy = wanted = -1.25
    kept, alpha = spy_gradients(monkeypatch, METHODS[name][0]), agent.temperature().item()
    torch.manual_seed(5)
    agent.update_actor(batch if name == "rlpd-ac" else batch.obs)
    assert len(kept) == 1
    found = [value.grad.clone() for value in agent.actor.parameters()]
    torch.manual_seed(5)
    chunk, log_density = agent.actor(batch.obs)
    assert torch.isclose(agent.temperature.log_alpha.grad, alpha * (-log_density.mean() - wanted))
    q = (
        agent.critic(agent.seen(batch.obs), chunk[:, None])
        if name == "rlpd-ac"
        else agent.noise_critic(agent.seen(batch.obs), 2 * chunk[:, None])
    )
    expected = torch.autograd.grad(
        alpha * log_density.mean() - q.mean(), list(agent.actor.parameters())
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))


@pytest.mark.parametrize("name", ["dsrl-na", "dsrl-sac"])
def test_dsrls_target_rates_the_chunk_that_chosen_noise_becomes_and_dsrl_sacs_the_noise(name):
    agent, batch = make(name, noise_bound=0.7), cut_batch()
    agent.steered.ready.fill_(1)
    torch.manual_seed(5)
    w = 0.7 * agent.actor(batch.next_obs, torch.randn(64, HORIZON, ACTION))[0][:, None]
    rated = (
        agent.policy.sample(agent.policy.encode(batch.next_obs), 1, w) if name == "dsrl-na" else w
    )
    expected = (
        batch.returns
        + batch.bootstrap * agent.target(agent.seen(batch.next_obs), rated).mean((0, 2))
    ).mean()
    torch.manual_seed(5)
    assert torch.isclose(agent.update(batch, True)["target"], expected)


def test_qcs_choice_for_the_target_is_the_online_critics_and_as_wary_as_its_acting(monkeypatch):
    agent, seen, plain = make("qc", num_candidates=7, pessimism=0.5), [], qc.best_of_n

    def spy(policy, critic, obs, n, pessimism=0.0):
        seen.append((policy is agent.policy, critic is agent.critic, n, pessimism))
        return plain(policy, critic, obs, n, pessimism)

    monkeypatch.setattr(qc, "best_of_n", spy)
    agent.update(cut_batch(), True)
    assert seen == [(True, True, 7, 0.5)]

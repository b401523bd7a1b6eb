"""The on-policy baselines, DPPO and ReinFlow: mathematics, memory, a toy problem, the runs.

    python -m pytest tests/baselines/test_onpolicy.py

The toy is the bandit of toys.py behind an environment: an episode is one chunk, which succeeds if
its mean action is positive. The cloned flow makes positive and negative chunks alike.
"""

import copy
import csv
import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from helpers import same
from torch import distributions as D

import demos
import envs
import train_offline
from baselines import dppo, ppo, reinflow
from benchmarks import compare, fairness, jobs
from flow_policy import FlowPolicy
from logbook import Clock, Interrupt, UserError, load_checkpoint
from train_offline import Acting

OBS, ACTION, HORIZON, STEPS = 2, 1, 3, 4
METHODS = {"dppo": (dppo, dppo.DPPO), "reinflow": (reinflow, reinflow.ReinFlow)}


class Toy(gymnasium.Env):
    """Observation: (episode's seed modulo 1000, steps so far). `length` steps, then success or its
    opposite."""

    action_space = gymnasium.spaces.Box(-1, 1, (ACTION,))
    length, truncates = HORIZON, False

    def reset(self, *, seed=None, options=None):
        self.episode_seed, self.actions = seed, []
        return self.observation(), {}

    def observation(self):
        return np.array([self.episode_seed % 1000, len(self.actions)], np.float32)

    def step(self, action):
        self.actions.append(float(action[0]))
        over = len(self.actions) == self.length
        success = over and not self.truncates and np.mean(self.actions) > 0
        return (
            self.observation(),
            float(success),
            over and not self.truncates,
            over and self.truncates,
            {"success": success},
        )


@pytest.fixture(autouse=True)
def toy_task(monkeypatch, request):
    torch.manual_seed(0)
    monkeypatch.setitem(
        envs.TASKS, "toy", dataclasses.replace(envs.TASKS["lift"], obs_dim=OBS, action_dim=ACTION)
    )
    if "sim" not in request.keywords:
        monkeypatch.setattr(envs, "make_env", lambda *_, **__: Toy())


def make(name, **changes):
    """An agent on an untrained flow."""
    module, agent_class = METHODS[name]
    values = (
        dict(
            task="toy",
            horizon=HORIZON,
            hidden=32,
            layers=2,
            flow_steps=STEPS,
            batch_size=64,
            warmup_steps=0,
            critic_learning_rate=1e-3,
            policy_learning_rate=1e-3,
            num_envs=4,
            rollout_chunks=6,
            reward_offset=0.0,
            target_kl=1e9,
            value_hidden=32,
            value_layers=2,
        )
        | changes
    )
    args = module.Args(
        **{name: value for name, value in values.items() if hasattr(module.Args, name)}
    )
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, STEPS)
    policy.set_normalizer(torch.tensor([500.0, 1.5]), torch.tensor([300.0, 1.0]))
    return agent_class(args, policy, Clock())


def world_of(agent):
    simulation = train_offline.Simulation(agent.args)
    return ppo.Rollouts(agent.args, agent, agent.clock, simulation, 0, Interrupt())


def start(agent):
    world = world_of(agent)
    world.start({})
    return world


def defaults(args_class, task, preset):
    known = {"task": task, "preset": preset, "setting": None}
    return args_class(**args_class.defaults(known))


def drive(agent, world, steps):
    """The loop of train_online.py without its files. Returns the statistics of all updates."""
    stats = []
    for _ in range(steps):
        warmup = world.warmup()
        world.step()
        stats += [agent.update(batch, warmup) for batch in world.batches()]
    return stats


def rollout(agent, world):
    """Steps until the next rollout is complete; returns its minibatches."""
    while not (batches := list(world.batches())):
        world.step()
    return batches


def parameters(network):
    return torch.cat([value.detach().flatten().clone() for value in network.parameters()])


# ---- the mathematics -----------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_gae_is_the_mixture_of_n_step_returns(trace):
    """(1 - lambda) sum lambda^(n-1) G_n - V; the last G before an end of episode or rollout takes
    the rest."""
    torch.manual_seed(1)
    T, E = 9, 5
    reward, value, next_value = (torch.randn(T, E, dtype=torch.float64) for _ in range(3))
    discount = 0.9 ** torch.randint(1, 6, (T, E)).double()
    terminated = (torch.rand(T, E) < 0.2).double()
    ended = torch.maximum(terminated, (torch.rand(T, E) < 0.2).double())
    for t in range(T - 1):  # within an episode V(s') is V of the next chunk's s
        next_value[t] = torch.where(ended[t] > 0, next_value[t], value[t + 1])
    assert terminated.sum() and (ended - terminated).sum() and (ended[-1] == 0).any()
    expected = torch.zeros(T, E, dtype=torch.float64)
    for t in range(T):
        for e in range(E):
            returns, gained, factor = [], 0.0, 1.0
            for k in range(t, T):
                gained += factor * reward[k, e]
                factor *= discount[k, e]
                returns.append(gained + (0.0 if terminated[k, e] else factor * next_value[k, e]))
                if ended[k, e]:
                    break
            weights = [(1 - trace) * trace**n for n in range(len(returns) - 1)] + [
                trace ** (len(returns) - 1)
            ]
            expected[t, e] = sum(w * g for w, g in zip(weights, returns)) - value[t, e]
    assert torch.allclose(
        ppo.gae(reward, discount, terminated, ended, value, next_value, trace), expected
    )


def chains(agent, count=16, dtype=torch.float64):
    """The agent in float64, with observations and the chains it draws for them."""
    agent.policy.to(dtype)
    if isinstance(agent.log_std, torch.nn.Module):
        agent.log_std.to(dtype)
    obs, noise = (
        torch.randn(count, OBS, dtype=dtype),
        torch.randn(count, STEPS + 1, HORIZON, ACTION, dtype=dtype),
    )
    return obs, noise, ppo.sample_chain(agent.policy, agent.log_std, obs, noise)


@pytest.mark.parametrize("name", METHODS)
def test_the_likelihood_is_that_of_the_steps_which_were_drawn(name):
    """Both passes see the same times and deviations: what the likelihood standardises is the noise
    that was added."""
    agent = make(name)
    obs, noise, chain = chains(agent)
    mean, log_std = ppo.all_steps(agent.policy, agent.log_std, obs, chain)
    assert torch.equal(chain[:, 0], noise[:, 0])
    assert torch.allclose((chain[:, 1:] - mean) / log_std.exp(), noise[:, 1:], atol=1e-9)


def test_the_log_likelihood_is_that_of_torch_distributions_over_executed_cells():
    chain, mean = (
        torch.randn(6, STEPS + 1, HORIZON, 2).double(),
        torch.randn(6, STEPS, HORIZON, 2).double(),
    )
    log_std = 0.3 * torch.randn(6, STEPS, HORIZON, 2).double()
    count = torch.tensor([1, 2, 3, 3, 2, 1])
    valid = (torch.arange(HORIZON) < count[:, None]).double()
    cells = D.Normal(mean, log_std.exp()).log_prob(chain[:, 1:])
    found = ppo.log_likelihood(chain, mean, log_std, valid)
    for b in range(6):
        assert torch.allclose(found[b], cells[b, :, : count[b]].mean((-2, -1)))


def test_the_kl_of_a_chain_is_that_of_torch_distributions():
    old_mean, mean = torch.randn(2, 6, STEPS, HORIZON, ACTION).double()
    old_log_std, log_std = 0.3 * torch.randn(2, 6, STEPS, HORIZON, ACTION).double()
    cells = D.kl_divergence(D.Normal(old_mean, old_log_std.exp()), D.Normal(mean, log_std.exp()))
    assert torch.allclose(
        ppo.chain_kl(old_mean, old_log_std, mean, log_std), cells.sum((1, 2, 3)).mean()
    )


@pytest.mark.parametrize("name", METHODS)
def test_without_noise_the_chain_is_the_flow_and_that_is_what_is_evaluated(name):
    agent = make(name)
    obs, noise, _ = chains(agent, dtype=torch.float32)
    quiet = ppo.sample_chain(
        agent.policy, agent.log_std, obs, torch.cat([noise[:, :1], 0 * noise[:, 1:]], 1)
    )
    flow = agent.policy.sample(agent.policy.encode(obs), 1, noise[:, :1])
    assert torch.equal(quiet[:, -1:].clamp(-1, 1), flow)
    act, one = agent.acting("policy"), obs[:1].numpy()
    assert isinstance(act, Acting) and act.policy is agent.policy and agent.modes == ("policy",)
    drawn = np.random.default_rng(3).standard_normal((1, 1, HORIZON, ACTION), dtype=np.float32)
    expected = agent.policy.sample(agent.policy.encode(obs[:1]), 1, torch.as_tensor(drawn))[0, 0]
    assert np.array_equal(act(one, np.random.default_rng(3)), expected.numpy())


def test_the_clipped_loss_pulls_only_where_a_step_would_help_and_the_ratio_is_not_there_yet():
    """Gradient -A rho, but none for A > 0 above 1 + clip and for A < 0 below 1 - clip; the unlucky
    side still pulls."""
    ratio = torch.tensor([0.7, 0.85, 1.0, 1.15, 1.3]).repeat(2)
    advantage = torch.tensor([2.0] * 5 + [-3.0] * 5)
    log_ratio = ratio.log().requires_grad_()
    loss, clipped = ppo.clipped_loss(log_ratio, advantage, 0.2)
    loss.backward()
    alive = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 1.0])
    assert torch.allclose(log_ratio.grad * 10, -advantage * ratio * alive)
    assert torch.isclose(clipped, torch.tensor(0.4)) and not clipped.requires_grad


def test_dppos_later_steps_count_more_and_may_move_further():
    agent = make("dppo", denoising_discount=0.9, ratio_clip=0.01, clip_first=0.1)
    assert torch.allclose(agent.weights, torch.tensor([0.729, 0.81, 0.9, 1.0]))
    assert (
        torch.allclose(agent.clips[[0, -1]], torch.tensor([0.001, 0.01]))
        and (agent.clips.diff() > 0).all()
    )
    assert (agent.clips.diff().diff() > 0).all()  # exponentially


def test_reinflows_noise_stays_in_its_bounds_and_depends_on_state_and_time():
    net = make("reinflow", min_std=0.05, max_std=0.3).log_std
    context, t = 50 * torch.randn(64, OBS), torch.rand(64, STEPS)
    net.out.weight.data.mul_(30)
    std = net(context, t).exp()
    assert std.shape == (64, STEPS, HORIZON, ACTION) and std.min() >= 0.0499 and std.max() <= 0.3001
    assert std.min() < 0.1 and std.max() > 0.2
    assert std.std(0).min() > 0 and std.std(1).mean() > 0


# ---- an update -----------------------------------------------------------------------------------


def spy(monkeypatch):
    """Keeps the arguments of every clipped_loss."""
    seen, real = [], ppo.clipped_loss

    def clipped_loss(log_ratio, advantage, clip):
        seen.append((log_ratio.detach(), advantage, clip))
        return real(log_ratio, advantage, clip)

    monkeypatch.setattr(ppo, "clipped_loss", clipped_loss)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_the_ratios_are_1_before_the_first_update_and_not_after_it(name, monkeypatch):
    """DPPO has one for each flow step, with the advantage weighed; ReinFlow one for the chain."""
    agent, seen = make(name, epochs=1, batch_size=24), spy(monkeypatch)
    (batch,) = rollout(agent, start(agent))
    assert agent.update(batch, False)["kl"] < 1e-6
    agent.update(batch, False)
    (first, advantage, clip), (second, *_) = seen
    assert first.shape == ((24, STEPS) if name == "dppo" else (24,))
    assert first.abs().max() < 1e-6 < second.abs().max() and agent.kl > 1e-4
    standard = (batch.advantage - batch.advantage.mean()) / batch.advantage.std(correction=0)
    assert torch.allclose(
        advantage, standard[:, None] * agent.weights if name == "dppo" else standard, atol=1e-4
    )
    assert clip is agent.clips if name == "dppo" else clip == agent.args.ratio_clip


@pytest.mark.parametrize("name", METHODS)
def test_ratios_and_kl_are_those_of_the_moved_policy_over_executed_cells(name, monkeypatch):
    agent, seen = make(name, epochs=1), spy(monkeypatch)
    batch = rollout(agent, start(agent))[0]
    batch = batch._replace(
        valid=(torch.arange(HORIZON) < torch.randint(1, HORIZON + 1, (24, 1))).float()
    )
    for value in [*agent.policy.parameters(), *getattr(agent.log_std, "parameters", list)()]:
        value.data += 0.03 * torch.randn_like(value)
    with torch.no_grad():
        steps = ppo.all_steps(agent.policy, agent.log_std, batch.obs, batch.chain)
    old, new = (
        D.Normal(mean, log_std.exp()) for mean, log_std in ((batch.mean, batch.log_std), steps)
    )
    moved = (new.log_prob(batch.chain[:, 1:]) - old.log_prob(batch.chain[:, 1:])).mean(
        -1
    ) * batch.valid[:, None]
    expected = moved.sum(-1) / batch.valid.sum(1, keepdim=True)  # (B, K)
    kl = agent.update(batch, False)["kl"]
    assert torch.allclose(seen[0][0], expected if name == "dppo" else expected.mean(1), atol=1e-5)
    assert (
        torch.isclose(kl, D.kl_divergence(old, new).sum((1, 2, 3)).mean(), rtol=1e-4) and kl > 0.01
    )


@pytest.mark.parametrize("name", METHODS)
def test_policy_and_value_have_rates_of_their_own(name):
    agent = make(name, policy_learning_rate=0.002, critic_learning_rate=0.03)
    assert [
        one.param_groups[0]["lr"] for one in (agent.actor_optimizer, agent.value_optimizer)
    ] == [0.002, 0.03]


@pytest.mark.parametrize("name", METHODS)
def test_the_ratio_is_exactly_1_in_float64(name):
    agent = make(name)
    obs, _, chain = chains(agent)
    valid, passes = (
        torch.ones(16, HORIZON),
        [ppo.all_steps(agent.policy, agent.log_std, obs, chain) for _ in range(2)],
    )
    old, new = (ppo.log_likelihood(chain, *one, valid) for one in passes)
    assert torch.equal((new - old).exp(), torch.ones(16, STEPS).double()) and new.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_nothing_from_the_rollout_carries_a_gradient_and_the_losses_stay_apart(name, monkeypatch):
    agent = make(name, epochs=1)
    (batch,) = rollout(agent, start(agent))
    assert not any(value.requires_grad for value in batch)
    kept = []
    monkeypatch.setattr(METHODS[name][0], "minimise", lambda loss, _: kept.append(loss))
    monkeypatch.setattr(ppo, "minimise", lambda loss, _: kept.append(loss))
    stats = agent.update(batch, False)
    value_loss, actor_loss = kept
    value_loss.backward()
    assert all(p.grad is None for p in agent.policy.parameters()) and all(
        p.grad is not None for p in agent.value.parameters()
    )
    agent.value.zero_grad()
    actor_loss.backward()
    assert all(p.grad is not None for p in agent.policy.parameters()) and all(
        p.grad is None for p in agent.value.parameters()
    )
    assert set(stats) == set(agent.stats) and not any(
        value.requires_grad for value in stats.values()
    )
    assert all(np.isfinite(float(value)) for value in stats.values())


def test_reinflows_noise_grows_with_the_weight_of_its_entropy_alone():
    agent = make("reinflow", entropy=100.0)
    batch = rollout(agent, start(agent))[0]
    before = float(batch.log_std.mean())
    for _ in range(20):
        stats = agent.update(batch._replace(advantage=0 * batch.advantage), False)
    assert stats["entropy"] > before + 0.5 * np.log(2 * np.pi * np.e) + 0.05


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("warmup, rollouts", [(72, 1), (73, 2)])
def test_a_rollout_that_began_in_warm_up_trains_the_value_alone(name, warmup, rollouts):
    agent = make(
        name, warmup_steps=warmup, epochs=2
    )  # a rollout has 72 steps: the second began before 73
    world, policy, value = start(agent), parameters(agent.policy), parameters(agent.value)
    assert [set(stats) for stats in drive(agent, world, 72 * rollouts)] == [
        {"value", "returns"}
    ] * 2 * rollouts
    assert torch.equal(parameters(agent.policy), policy) and not torch.equal(
        parameters(agent.value), value
    )
    drive(agent, world, 72)
    assert not torch.equal(parameters(agent.policy), policy)


def test_the_value_learns_its_returns():
    agent = make("dppo", epochs=1, batch_size=24, online_learning_rate=1e-2)
    batch = rollout(agent, start(agent))[0]
    batch = batch._replace(returns=(batch.obs[:, 0] > 500).float())
    losses = [
        float(ppo.update_value(agent.value, agent.value_optimizer, batch)["value"])
        for _ in range(400)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_the_value_standardises_its_observation_and_bounds_what_is_far_off():
    agent = make("dppo")
    obs = torch.tensor([[800.0, 0.5], [500 + 300 * 6.0, 1.5], [500 + 300 * 9.0, 1.5]])
    assert torch.equal(
        agent.value(obs),
        agent.value.body(torch.tensor([[1.0, -1.0], [5.0, 0.0], [5.0, 0.0]]))[:, 0],
    )


# ---- the rollouts --------------------------------------------------------------------------------


def test_every_episode_is_a_new_one_that_no_evaluation_plays(monkeypatch):
    seen, real = [], Toy.reset
    monkeypatch.setattr(
        Toy,
        "reset",
        lambda env, *, seed=None, options=None: seen.append(seed) or real(env, seed=seed),
    )
    agent = make("dppo", seed=3)
    world = start(agent)
    for _ in range(72):
        world.step()
    assert len(set(seen)) == len(seen) == 28 and max(seen) < train_offline.EVAL_SEED
    assert (
        world.episodes == 24
        and len(world.recent) == 20
        and world.success() == np.mean(world.recent)
    )
    start(make("dppo", seed=4))
    assert seen[28:] != seen[:4]


@pytest.mark.parametrize("truncates", [False, True])
def test_a_chunk_is_remembered_with_its_own_last_observation_and_discount(truncates, monkeypatch):
    """Episodes of 5 steps, chunks of 3: a whole chunk, then one cut after 2 steps; then the next
    episode."""
    monkeypatch.setattr(Toy, "length", 5)
    monkeypatch.setattr(Toy, "truncates", truncates)
    agent = make("dppo", discount=0.5, reward_offset=0.25, num_envs=2, rollout_chunks=4)
    world = start(agent)
    seeds = [runner.seed % 1000 for runner in world.runners]
    for _ in range(2 * 10 - 1):
        assert list(world.batches()) == []
        world.step()
    world.step()
    data = {name: value.clone() for name, value in world.data.items()}
    assert world.steps == 20 and world.episodes == 4 and len(world.recent) == 4
    assert (
        data["obs"][:, :, 1].tolist() == [[0, 0], [3, 3]] * 2
        and data["obs"][0, :, 0].tolist() == seeds
    )
    assert (
        data["next_obs"][:, :, 1].tolist() == [[3, 3], [5, 5]] * 2
    )  # not the next episode's first
    assert torch.equal(data["next_obs"][:, :, 0], data["obs"][:, :, 0])
    assert data["obs"][2, 0, 0] != data["obs"][1, 0, 0]
    assert data["valid"].tolist() == [[[1, 1, 1]] * 2, [[1, 1, 0]] * 2] * 2
    assert data["discount"].tolist() == [[0.125] * 2, [0.25] * 2] * 2
    assert data["ended"].tolist() == [[0, 0], [1, 1]] * 2
    assert torch.equal(data["terminated"], data["ended"] * (not truncates))
    success = (data["reward"][1] > 0.375).float() * 0.5
    assert torch.allclose(
        data["reward"][:2], torch.stack([torch.full((2,), 0.4375), 0.375 + success])
    )
    assert not (truncates and success.any())


@pytest.mark.parametrize("truncates", [False, True])
def test_a_time_out_bootstraps_from_the_value_and_an_end_does_not(truncates, monkeypatch):
    monkeypatch.setattr(Toy, "truncates", truncates)
    agent = make("dppo", discount=0.5, epochs=1)
    agent.value.body[-1].weight.data.zero_()
    agent.value.body[-1].bias.data.fill_(4.0)
    (batch,) = rollout(agent, world := start(agent))
    assert batch.returns.unique().tolist() == ([0.5] if truncates else [0.0, 0.25])
    assert torch.allclose(batch.advantage, batch.returns - 4) and world.row == 0


def test_what_is_executed_is_the_clipped_end_of_the_chain():
    agent = make("dppo", num_envs=2, noise_std=2.0)
    world = start(agent)
    for turn in range(2):
        for _ in range(HORIZON - 1):
            world.step()
        end = world.data["chain"][0, turn, -1]
        executed = torch.tensor(np.array(world.runners[turn]._executed))
        assert torch.equal(executed, end.clamp(-1, 1)[:2]) and end.abs().max() > 1
        world.step()


def test_every_epoch_visits_every_chunk_once_and_the_kl_ends_an_iteration():
    agent = make("dppo", epochs=3, batch_size=10, target_kl=0.5)
    world = start(agent)
    batches = rollout(agent, world)
    assert [len(batch.obs) for batch in batches] == [12, 12] * 3
    for i in range(0, 6, 2):
        seen = torch.cat([batches[i].chain, batches[i + 1].chain])[:, 0, 0, 0]
        assert len(seen.unique()) == 24
    assert not torch.equal(batches[0].chain, batches[2].chain)
    for _ in range(71):
        world.step()
    world.step()
    count = 0
    for _ in world.batches():
        count += 1
        agent.kl = 0.6 if count == 3 else 0.4
    assert count == 3 and world.row == 0 and world.began == world.steps == 144


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first", [31, 100])
def test_an_interrupted_run_continues_bitwise(name, first):
    """Inside a chunk of the first rollout, and in the second; 72 steps are one rollout."""
    agents = make(name), make(name)
    agents[1].load_state_dict(copy.deepcopy(agents[0].state_dict()))
    worlds = [start(agent) for agent in agents]
    for agent, world in zip(agents, worlds):
        drive(agent, world, first)
    agent = make(name)
    torch.manual_seed(5)
    resumed = world_of(agent)
    agent.load_state_dict(copy.deepcopy(agents[1].state_dict()))
    resumed.load_state_dict(copy.deepcopy(worlds[1].state_dict()))
    drive(agents[0], worlds[0], 200)
    drive(agent, resumed, 200)
    same(agents[0].state_dict(), agent.state_dict())
    same(tensors(worlds[0].state_dict()), tensors(resumed.state_dict()))


def tensors(state):
    """With arrays as a checkpoint keeps them."""
    if isinstance(state, dict):
        return {name: tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [tensors(value) for value in state]
    return torch.as_tensor(state) if isinstance(state, np.ndarray) else state


# ---- a toy that each must solve ------------------------------------------------------------------


def clone(policy, steps=300):
    """Stage I on the toy: chunks near -0.5 and near +0.5, whatever the state."""
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for _ in range(steps):
        sign = torch.randint(2, (64, 1, 1, 1)) * 2.0 - 1
        chunk = (0.5 * sign + 0.1 * torch.randn(64, 1, HORIZON, ACTION)).clamp(-1, 1)
        obs = torch.stack([1000 * torch.rand(64), torch.zeros(64)], 1)
        loss = policy.cfm_loss(policy.encode(obs), chunk).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_solves_the_toy(name):
    agent = make(
        name, num_envs=32, rollout_chunks=4, ratio_clip=0.3, target_kl=10.0, warmup_steps=300
    )
    clone(agent.policy)

    def success():
        obs = np.stack([1000 * np.random.default_rng(0).random(400), np.zeros(400)], 1).astype(
            np.float32
        )
        noise = torch.randn(400, 1, HORIZON, ACTION, generator=torch.Generator().manual_seed(0))
        chunks = agent.policy.sample(agent.policy.encode(torch.as_tensor(obs)), 1, noise)
        return float((chunks.mean((1, 2, 3)) > 0).float().mean())

    cloned = success()
    drive(agent, start(agent), 384 * 25)
    assert 0.35 < cloned < 0.65 and success() > 0.95, (cloned, success())


# ---- the runs ------------------------------------------------------------------------------------

FLAGS = """
    --preset cpu --hidden 32 --layers 2 --batch-size 16 --flow-steps 2 --episode-limit 12
    --workers 1 --device cpu --precision float32 --threads 1 --eval-episodes 1 --demo-episodes 2
    --warmup-steps 8 --final-episodes 1 --eval-every 1000 --log-every 4 --save-every 10
    --num-envs 2 --rollout-chunks 2 --epochs 2
"""
TOY = FLAGS.split()


@pytest.fixture(scope="module")
def start_of_runs(tmp_path_factory):
    """Flags of a run on two demonstrations, and its finished stage I of 10 steps."""
    file = demos.collect(
        "lift", 2, 3, tmp_path_factory.mktemp("demos") / "lift.hdf5", progress=False
    )
    folder, flags = tmp_path_factory.mktemp("bc") / "run", TOY[: TOY.index("--warmup-steps")]
    train_offline.main(
        [*flags, "--data", str(file), "--pretrain-steps", "10", "--run-dir", str(folder)]
    )
    return [*TOY, "--data", str(file), "--checkpoint", str(folder / "last.pt")]


@pytest.mark.sim
def test_a_run_resumed_is_bitwise_the_uninterrupted_run(start_of_runs, tmp_path):
    """33 steps + resume + 27 == 60; a rollout is about 20 steps and an episode 12."""
    reinflow.main([*start_of_runs, "--online-steps", "60", "--run-dir", str(tmp_path / "whole")])
    reinflow.main([*start_of_runs, "--online-steps", "33", "--run-dir", str(tmp_path / "parts")])
    reinflow.main(["--resume", str(tmp_path / "parts"), "--online-steps", "60"])
    same(*(load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")))
    arguments = (tmp_path / "parts/args.json").read_text()
    for flags, told in (
        (["--num-envs", "3"], "--num-envs 2"),
        (["--episode-limit", "2"], "--episode-limit 2"),
    ):
        with pytest.raises(UserError, match=told):
            reinflow.main(["--resume", str(tmp_path / "parts"), "--online-steps", "90", *flags])
    assert (tmp_path / "parts/args.json").read_text() == arguments


@pytest.mark.sim
def test_a_run_is_logged_evaluated_and_compared_like_the_others(
    start_of_runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["--tasks", "lift", "--methods", "dppo", "--seeds", "1", "--online-steps", "44"]
    compare.main([*command, *start_of_runs])
    assert "| dppo | policy | 1 |" in capsys.readouterr().out
    with open("runs/lift-dppo-s0/progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    updated = [row for row in rows if row["kl"]]
    assert [int(row["step"]) for row in rows] == list(range(4, 45, 4)) and updated
    assert all(np.isfinite(float(updated[-1][name])) for name in dppo.DPPO.stats)
    assert rows[0]["warmup"] == "1" and rows[-1]["warmup"] == "0"
    dppo.main(["--eval", "runs/lift-dppo-s0"])
    assert "acting from the policy: success" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_no_preset_hands_pocos_clip_to_ppo(name, preset):
    """It is a threshold on another quantity, and 60 times as wide."""
    for task in sorted(set(envs.TASKS) - {"toy"}):
        args = defaults(METHODS[name][0].Args, task, preset)
        assert args.ratio_clip == 0.01 and not hasattr(args, "clip")
    assert args.num_envs == {"cpu": 5, "paper": 20}[preset]


@pytest.mark.parametrize("name", METHODS)
def test_what_must_be_equal_in_a_comparison_is_a_flag_of_both_methods(name):
    fields = {field.name for field in dataclasses.fields(METHODS[name][0].Args)}
    assert set(fairness.SHARED) <= fields
    assert jobs.METHODS[name] == (f"baselines.{name}", (), "policy")

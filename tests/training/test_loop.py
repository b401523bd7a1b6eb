"""The loop of stage II and its interaction, on an environment that costs nothing (counter.py).

    python -m pytest tests/training/test_loop.py

What is stored, when the actor is frozen, who is evaluated how often, which checkpoint is the best,
and stage I's loss. Not here: the updates (tests/method/test_update.py), whole runs with a simulator
and how they resume (test_train.py).
"""

import csv
import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counter import HORIZON, Counter

import envs
import train_offline
import train_online
from flow_policy import FlowPolicy
from logbook import Clock, Interrupt, Logbook, Report, load_checkpoint

DEMOS = 6


@pytest.fixture(autouse=True)
def toy_task(monkeypatch):
    monkeypatch.setitem(
        envs.TASKS, "toy", dataclasses.replace(envs.TASKS["lift"], obs_dim=3, action_dim=2)
    )
    monkeypatch.setattr(envs, "make_env", lambda *_, **__: Counter(0.0))


class Actor:
    """Acts at random and knows its name."""

    def __init__(self, mode):
        self.mode = mode

    def to(self, device):
        return self

    def __call__(self, obs, rng):
        return rng.uniform(-1, 1, (HORIZON, 2)).astype(np.float32)


class Agent:
    """Learns nothing; remembers what it was told."""

    name = "fake"
    stats = ("q",)
    modes = ("policy", "best")
    collects = "best"
    cloned = True
    device = torch.device("cpu")

    def __init__(self, *_):
        self.actors = {mode: Actor(mode) for mode in self.modes}
        self.moves = []
        self.flags = []

    @staticmethod
    def check(args):
        pass

    def draw(self, replay, batch_size, generator):
        return replay.sample(batch_size, generator)

    def acting(self, mode):
        return self.actors[mode]

    def observe(self, move):
        self.moves.append(move)

    def update(self, batch, warmup):
        self.flags.append(warmup)
        return {"q": torch.tensor(float(len(self.flags)))}

    def state_dict(self):
        return {}


def arguments(**changes):
    return train_online.LoopArgs(
        **dict(task="toy", horizon=HORIZON, batch_size=8, workers=1, capacity=60) | changes
    )


def demonstrations():
    rows = np.arange(DEMOS, dtype=np.float32)
    return {
        "obs": np.tile(rows[:, None], 3),
        "action": np.zeros((DEMOS, 2)),
        "reward": rows,
        "next_obs": np.tile(rows[:, None] + 1, 3),
        "terminated": rows == DEMOS - 1,
        "truncated": np.zeros(DEMOS),
    }


def interaction(args, agent, clock=None):
    simulation = train_online.Simulation(args)
    return train_online.Interaction(args, agent, clock or Clock(), simulation, DEMOS, Interrupt())


def world_of(agent, **changes):
    world = interaction(arguments(**changes), agent)
    world.start(demonstrations())
    return world


def test_every_step_is_stored_as_it_was_with_the_offset_and_episodes_are_counted():
    agent = Agent()
    world = world_of(agent, discount=0.5, reward_offset=-0.25, demo_share=0.25)
    for _ in range(400):
        world.step()
    replay, data = world.replay, world.replay.data
    assert (replay.capacity, replay.demos, replay.online) == (DEMOS + 60, DEMOS, 60)
    assert (replay.discount, replay.demo_share, replay.horizon) == (0.5, 0.25, HORIZON)
    assert data["reward"][:DEMOS].tolist() == [row - 0.25 for row in range(DEMOS)]
    assert len(agent.moves) == world.steps == 400
    for step in range(340, 400):
        move, row = agent.moves[step], DEMOS + step % 60
        for name in ("obs", "action", "next_obs", "terminated", "truncated"):
            assert np.array_equal(data[name][row], np.asarray(getattr(move, name), np.float32)), (
                name
            )
        assert data["reward"][row] == move.reward - 0.25
    ends = [move for move in agent.moves if move.terminated or move.truncated]
    assert {(move.terminated, move.truncated) for move in ends} == {(True, False), (False, True)}
    assert world.episodes == len(ends) > 25 and world.recent == [
        float(move.success) for move in ends[-20:]
    ]
    assert world.success() == np.mean(world.recent)


def test_training_never_plays_an_evaluation_episode_and_no_episode_twice():
    agent = Agent()
    world = world_of(agent)
    for _ in range(400):
        world.step()
    seeds = [int(move.obs[0]) for move in agent.moves if move.obs[1] == 0]
    assert len(set(seeds)) == len(seeds) > 25 and max(seeds) < train_offline.EVAL_SEED
    asked = []
    evaluator = SimpleNamespace(run=lambda acting, episodes, seed: asked.append((episodes, seed)))
    train_offline.run_evaluation(evaluator, Actor("policy"), 7)
    assert asked == [(7, 1_000_000)]  # the same for every run and method: they are paired


def test_the_seed_decides_episodes_actions_and_batches_by_streams_of_their_own():
    def first(seed):
        world = world_of(agent := Agent(), seed=seed)
        world.step()
        return (
            int(agent.moves[0].obs[0]),
            agent.moves[0].action[0].item(),
            next(world.batches()).obs[:, 0].tolist(),
        )

    one, again, other = first(3), first(3), first(4)
    assert one == again and all(a != b for a, b in zip(one, other))
    fresh = interaction(arguments(), Agent())
    assert fresh.act_rng.random() != fresh.episode_rng.random()


RATES = {"policy": {0: 0.0, 3: 1.0, 6: 0.25, 9: 0.5, 12: 0.5, 13: 0.25}, "best": {12: 1.0}}


def test_warm_up_evaluations_rows_and_the_best_checkpoint(tmp_path, monkeypatch):
    """13 steps, 5 of warm-up; the best is the first best of the first mode after the warm-up, here
    that of step 9."""
    agent, asked = Agent(), []
    args = arguments(
        online_steps=13,
        warmup_steps=5,
        eval_every=3,
        eval_episodes=4,
        final_episodes=8,
        log_every=2,
    )

    def run_evaluation(_, acting, episodes, advice):
        step = world.steps
        # The one that collects may hold what it has just done.
        assert acting is not agent.actors[acting.mode]
        asked.append((step, acting.mode, episodes))
        success = np.arange(episodes) < episodes * RATES[acting.mode].get(step, 0.0)
        lengths = np.ones(episodes, int)
        return envs.EvalResult(np.arange(episodes), success, lengths, np.ones(episodes))

    monkeypatch.setattr(train_online, "run_evaluation", run_evaluation)
    columns = [
        *train_online.COLUMNS,
        *agent.stats,
        *(f"time/{phase}" for phase in train_online.PHASES),
    ]
    book = Logbook.create(tmp_path / "run", dataclasses.asdict(args), columns)
    clock = Clock()
    world = interaction(args, agent, clock)
    world.start(demonstrations())
    run = train_online.Run(args, agent, world, book, Report(book, clock, train_online.PHASES))
    assert train_online.train(run, None, clock, Interrupt())
    assert agent.flags == [True] * 5 + [False] * 8
    assert asked == [(0, "policy", 8)] + [
        (step, mode, 8 if step == 13 else 4) for step in (3, 6, 9, 12, 13) for mode in agent.modes
    ]
    best, last = (load_checkpoint(book.folder / f"{name}.pt") for name in ("best", "last"))
    assert (best["world"]["steps"], best["report"]["best"], last["world"]["steps"]) == (9, 0.5, 13)
    with open(book.folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        [int(row["step"]) for row in rows]
        == [int(row["updates"]) for row in rows]
        == [2, 4, 6, 8, 10, 12, 13]
    )
    assert [float(row["q"]) for row in rows] == [
        1.5,
        3.5,
        5.5,
        7.5,
        9.5,
        11.5,
        13,
    ]  # means since the row before
    assert [int(row["warmup"]) for row in rows] == [1, 1, 0, 0, 0, 0, 0]
    for row in rows:
        busy, steps = (
            sum(float(row[f"time/{phase}"]) for phase in train_online.PHASES),
            1 if row["step"] == "13" else 2,
        )
        assert [
            float(row[name]) * busy for name in ("env_steps_per_s", "updates_per_s")
        ] == pytest.approx([steps] * 2)
    assert last["report"]["sums"] == {}


def test_stage_two_begins_with_the_same_random_numbers_whatever_stage_one_drew(
    tmp_path, monkeypatch
):
    found = []

    def load(draws):
        torch.rand(draws)
        return FlowPolicy(3, 2, HORIZON, 8, 1, 1)

    def begin(args, policy, clock):
        found.append(torch.rand(1).item())
        raise InterruptedError

    begin.check = Agent.check
    begin.name = "fake"
    begin.stats = ()
    begin.cloned = True
    monkeypatch.setattr(train_online.Simulation, "demonstrations", lambda self: demonstrations())
    for draws in (1, 1000):
        monkeypatch.setattr(train_online, "stage_one", lambda *_, draws=draws: (load(draws), None))
        argv = ["--preset", "cpu", "--threads", "1", "--device", "cpu"]
        argv += ["--run-dir", str(tmp_path / str(draws))]
        with pytest.raises(InterruptedError):
            train_online.main(argv, agent_class=begin)
    assert found[0] == found[1]


def test_stage_one_masks_what_is_missing_and_has_its_own_rate(monkeypatch):
    """Recordings of 3 steps and chunks of 5: the loss must be told."""
    masks, saved = [], []
    loss = FlowPolicy.cfm_loss

    def spy(policy, context, actions, valid=None, **more):
        masks.append(valid)
        return loss(policy, context, actions, valid, **more)

    monkeypatch.setattr(FlowPolicy, "cfm_loss", spy)
    args = train_offline.Args(
        task="toy",
        horizon=5,
        hidden=8,
        layers=1,
        batch_size=32,
        pretrain_steps=2,
        learning_rate=0.007,
    )
    data = demonstrations() | {"truncated": np.arange(DEMOS) % 3 == 2}
    book = SimpleNamespace(
        log=lambda *_, **__: None, save=lambda name, state: saved.append(state), last_good=str
    )
    simulation = train_offline.Simulation(args)
    device = torch.device("cpu")
    policy = simulation.make_policy(device, data)
    assert train_offline.pretrain(train_offline.Cloning(args, policy, data, device), book)
    assert len(masks) == 2 and set(masks[0].sum(1).tolist()) == {1.0, 2.0, 3.0}
    assert saved[-1]["step"] == 2 and saved[-1]["optimizer"]["param_groups"][0]["lr"] == 0.007
    assert torch.equal(policy.obs_mean, torch.full((3,), 2.5))
    args.normalize = False
    assert torch.equal(simulation.make_policy(device, data).obs_mean, torch.zeros(3))


def test_a_resumed_report_counts_on_and_its_row_holds_the_time_before_the_interruption():
    rows, clock = [], Clock()
    book = SimpleNamespace(columns=["q"], log=lambda step, **row: rows.append(row))
    one, other = (Report(book, clock, ("env",)) for _ in range(2))
    one.add({"q": torch.tensor(1.0)})
    one.best = 0.5
    one.seconds["env"] = 7.0
    one.row_step = 2
    with clock("env"):
        time.sleep(0.01)
    saved = one.state_dict()
    one.seconds["env"] = one.row_seconds["env"] = 99.0  # what is saved stays as it was
    other.load_state_dict(saved)
    other.add({"q": torch.tensor(3.0)})
    with clock("env"):
        pass
    other.write(5)
    assert (rows[0]["q"], rows[0]["updates"], other.best) == (2.0, 2, 0.5)
    assert 7.01 < other.seconds["env"] < 9
    assert 0.01 < rows[0]["time/env"] < 2 and rows[0]["env_steps_per_s"] == 3 / rows[0]["time/env"]
    assert rows[0]["updates_per_s"] == 2 / rows[0]["time/env"]

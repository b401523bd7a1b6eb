"""The oracle on a toy whose true values are known: what it rolls out, and what it says of it."""

import csv
import json

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import envs
from benchmarks import oracle, oracle_report
from benchmarks.oracle import Judge, State
from benchmarks.oracle_report import Measured
from flow_policy import FlowPolicy
from logbook import UserError

LIMIT, HORIZON = 8, 2


class Fork(gymnasium.Env):
    """The sign of an episode's first action decides: after four steps the right side is a success.

    The observation is (step, side, a number of the seed). Every step costs nothing; success pays 1.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    drift = 0.0  # a simulator that is not a function of seed and actions

    def reset(self, *, seed=None, options=None):
        self.episode_seed = seed
        self.clock = 0
        self.side = 0.0
        type(self).drift += self.leak
        return self._obs(), {"success": False}

    leak = 0.0

    def _obs(self):
        return np.array([self.clock, self.side, self.episode_seed % 7 + self.drift], np.float32)

    def step(self, action):
        if self.clock == 0:
            self.side = 1.0 if action[0] > 0 else -1.0
        self.clock += 1
        success = self.clock == 4 and self.side > 0
        truncated = self.clock == LIMIT and not success
        return self._obs(), float(success), success, truncated, {"success": success}


class Opinion(nn.Module):
    """A critic of two heads, both a multiple of the chunk's first action."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, seen, chunks):
        return torch.stack([self.sign * chunks[..., 0, 0]] * 2)


def judge_of(sign=1.0, temperature=1e-6, discount=0.5, reward_offset=0.0, step=100):
    torch.manual_seed(0)
    policy = FlowPolicy(3, 1, HORIZON, hidden=8, layers=1, flow_steps=2)
    return Judge(policy, Opinion(sign), 0.0, temperature, discount, reward_offset, step)


def start(seed=5):
    env = Fork()
    obs, _ = env.reset(seed=seed)
    return State(seed, np.zeros((0, 1), np.float32), obs, "start")


def measured(success, returns=None, q=None, weight=None, phase="start", temperature=1e-6):
    success = np.array(success, float)
    states, candidates, _ = success.shape
    returns = success if returns is None else np.array(returns, float)
    q = np.zeros((states, candidates)) if q is None else np.array(q, float)
    weight = np.full(q.shape, 1 / candidates) if weight is None else np.array(weight, float)
    return Measured(np.array([phase] * states), q, weight, success, returns, temperature, 1)


# ---- rollouts ------------------------------------------------------------------------------------


def test_a_rollout_executes_the_chunk_then_the_policy_and_discounts_from_the_state_on():
    judge = judge_of(discount=0.5)
    right = np.array([[0.5], [0.0]], np.float32)
    rng = np.random.default_rng(0)
    assert oracle.rollout(Fork(), start(), right, judge, rng) == (True, 0.5**3)
    assert oracle.rollout(Fork(), start(), -right, judge, rng) == (False, 0.0)
    later = State(5, np.array([[1.0], [0.0]], np.float32), np.array([2, 1, 5], np.float32), "reach")
    assert oracle.rollout(Fork(), later, -right, judge, rng) == (True, 0.5)  # decided before


def test_a_truncated_episode_goes_on_like_its_last_step():
    """Every step costs 1: eight steps and then for ever are -1 / (1 - gamma)."""
    left = np.array([[-0.5], [0.0]], np.float32)
    for discount in (0.5, 0.9):
        judge = judge_of(discount=discount, reward_offset=-1.0)
        success, value = oracle.rollout(Fork(), start(), left, judge, np.random.default_rng(0))
        assert not success and value == pytest.approx(-1 / (1 - discount))
    judge = judge_of(discount=1.0, reward_offset=-1.0)
    assert oracle.rollout(Fork(), start(), left, judge, np.random.default_rng(0))[1] == -LIMIT


def test_a_simulator_that_does_not_return_to_the_state_is_refused(monkeypatch):
    state = start()
    monkeypatch.setattr(Fork, "leak", 0.25)
    with pytest.raises(UserError, match="not deterministic: after 0 steps"):
        oracle.rollout(Fork(), state, np.zeros((2, 1)), judge_of(), np.random.default_rng(0))
    monkeypatch.setattr(Fork, "drift", 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rows_hold_the_true_value_of_each_candidate(sign):
    args = oracle.Args(candidates=8, repeats=2)
    rows = oracle.measure_state(Fork(), 3, start(), judge_of(sign), args)
    assert [row["candidate"] for row in rows] == list(range(8))
    assert {row["state"] for row in rows} == {3} and {row["step"] for row in rows} == {0}
    first = np.array([sign * row["q"] for row in rows])  # the first action
    assert (first > 0).any() and (first < 0).any()
    for row, action in zip(rows, first):
        assert row["successes"] == ("1 1" if action > 0 else "0 0")
        assert row["returns"] == ("0.125 0.125" if action > 0 else "0 0")
        assert row["q_std"] == 0
    highest = max(row["q"] for row in rows)
    on_best = sum(row["weight"] for row in rows if row["q"] == highest)  # clipped ones may tie
    assert on_best == pytest.approx(1)
    again = oracle.measure_state(Fork(), 3, start(), judge_of(sign), args)
    assert again == rows
    assert oracle.measure_state(Fork(), 4, start(), judge_of(sign), args)[0]["q"] != rows[0]["q"]


# ---- states --------------------------------------------------------------------------------------


def test_states_are_where_chunks_begin_with_the_actions_that_lead_there():
    def moved(first, obs):
        return obs[0] >= 4

    states = oracle.visited_states(judge_of().policy, Fork(), 6, moved)
    assert {len(state.actions) for state in states} <= {0, 2, 4, 6}
    assert len({state.seed for state in states}) == 6
    for state in states:
        assert state.obs[0] == len(state.actions)
        if len(state.actions) == 0:
            assert state.phase == "start"
    late = [state.phase for state in states if len(state.actions) > 4]
    assert late and set(late) == {"overtime"}  # every success takes four steps
    assert {state.phase for state in states if len(state.actions) == 2} == {"reach"}
    assert oracle.phase_of(4, 9, True) == "manipulate" and oracle.phase_of(9, 9, False) == "reach"


def test_each_phase_gets_its_share_of_the_states():
    states = []
    for number, phase in enumerate(["start"] * 2 + ["reach"] * 30 + ["overtime"] * 30):
        states.append(State(number, np.zeros((0, 1)), np.zeros(3), phase))
    chosen = oracle.choose_states(states, 12, seed=0)
    counts = {phase: sum(s.phase == phase for s in chosen) for phase in oracle.PHASES}
    assert counts == {"start": 2, "reach": 5, "manipulate": 0, "overtime": 5}
    assert len({state.seed for state in chosen}) == 12
    assert [s.seed for s in chosen] == [s.seed for s in oracle.choose_states(states, 12, seed=0)]
    assert len(oracle.choose_states(states, 1000, seed=0)) == len(states)


@pytest.mark.parametrize("name, first", [("lift", 9), ("cube-triple", 19)])
def test_an_object_has_moved_when_its_part_of_the_observation_has(name, first):
    task = envs.get_task(name)
    moved = oracle.object_moved(task)
    obs = np.zeros(task.obs_dim, np.float32)
    hand = obs.copy()
    hand[: first - 1] = 1.0
    object_ = obs.copy()
    object_[first] = 0.2
    assert not moved(obs, hand) and moved(obs, object_)


# ---- what is said of them ------------------------------------------------------------------------


def test_a_perfect_and_an_inverted_critic():
    success = [[[1, 1], [0, 0], [0, 0], [1, 1]]]
    returns = [[[4, 4], [1, 1], [2, 2], [3, 3]]]
    good = oracle_report.report(measured(success, returns, q=[[4, 1, 2, 3]]))
    assert good["rho"] == pytest.approx(1) and good["rho of halves"] == pytest.approx(1)
    assert good["policy"] == 0.5 and good["critic's best"] == 1 and good["regret"] == 0
    assert good["error"] == 0 and good["bias"] == 0
    assert good["true spread"] == good["critic's spread"] == pytest.approx(1.25**0.5)
    bad = oracle_report.report(measured(success, returns, q=[[-4, -1, -2, -3]]))
    assert bad["rho"] == pytest.approx(-1) and bad["critic's best"] == 0 and bad["regret"] == 1
    assert bad["oracle's best"] == 1 and bad["bias"] == -5


def test_the_half_that_chooses_never_judges():
    """Every candidate succeeds at random: seen with its own eyes the best of 50 looks perfect."""
    rng = np.random.default_rng(0)
    noise = measured(rng.integers(0, 2, (200, 50, 2)))
    ways = oracle_report.ways_to_choose(noise)
    assert ways["oracle's best"].mean() == pytest.approx(0.5, abs=0.04)
    one = measured([[[1, 0], [0, 1]]])  # each half favours what the other one sees fail
    assert oracle_report.ways_to_choose(one)["oracle's best"].tolist() == [0]
    other = measured([[[1, 0], [0, 0]]])  # the second half cannot tell them apart
    assert oracle_report.ways_to_choose(other)["oracle's best"].tolist() == [0.25]


def test_the_ceiling_is_the_e_step_with_true_values():
    returns = [[[1.0, 1.0], [0.0, 0.0]]]
    success = [[[1, 1], [0, 0]]]
    cold = oracle_report.ways_to_choose(measured(success, returns, temperature=1e-6))
    warm = oracle_report.ways_to_choose(measured(success, returns, temperature=1.0))
    assert cold["oracle's posterior"].tolist() == [1]
    assert warm["oracle's posterior"][0] == pytest.approx(np.e / (np.e + 1))


def test_what_the_m_step_has_still_to_distil_and_what_the_policy_lacks():
    success = [[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [0, 0]]]
    weight = [[0.75, 0.25], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]
    found = oracle_report.report(measured(success, weight=weight))
    assert found["lost"] == 0.25 and found["sure"] == 0.25 and found["between"] == 0.5
    assert found["policy"] == pytest.approx((0.5 + 0 + 1 + 0.25) / 4)
    assert found["critic's posterior"] == pytest.approx((0.75 + 0 + 1 + 0) / 4)
    assert found["M-step"] == pytest.approx(found["critic's posterior"] - found["policy"])


def test_the_rollouts_noise_is_taken_off_spread_and_error():
    rng = np.random.default_rng(1)
    value = rng.normal(size=(400, 16))
    returns = value[..., None] + rng.normal(scale=2.0, size=(400, 16, 4))
    q = value + 0.5 * rng.normal(size=value.shape) + 3.0
    errors = oracle_report.errors(measured(np.zeros((400, 16, 4)), returns, q=q))
    shrink = (15 / 16) ** 0.5  # deviations from the mean of 16
    assert errors["true spread"] == pytest.approx(shrink, rel=0.05)
    assert errors["error"] == pytest.approx(0.5 * shrink, rel=0.15)
    assert errors["bias"] == pytest.approx(3.0, abs=0.05)


def test_ties_share_the_choice_and_flat_states_have_no_rank():
    assert oracle_report.best(np.array([[2.0, 2.0, 1.0]])).tolist() == [[0.5, 0.5, 0.0]]
    flat = np.zeros((1, 3))
    ranks = np.array([[1.0, 2.0, 3.0]])
    assert len(oracle_report.spearman(flat, ranks)) == len(oracle_report.spearman(ranks, flat)) == 0


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose policy acts on the toy."""
    folder = tmp_path / "runs" / "toy-poco-s0"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": {"task": "toy", "method": "poco"}}))

    class Simulation:
        task = envs.get_task("lift")
        args = oracle.Args()

        def make_eval_env(self):
            return Fork()

    Simulation.args.task = "toy"
    monkeypatch.setattr(oracle, "load_run", lambda folder, checkpoint: (judge_of(), Simulation()))
    monkeypatch.setattr(oracle, "object_moved", lambda task: lambda first, obs: obs[0] >= 4)
    return folder


def test_an_interrupted_measurement_is_continued_and_ends_the_same(run, tmp_path, monkeypatch):
    argv = [str(run), "--states", "5", "--candidates", "4", "--repeats", "2", "--episodes", "4"]
    argv += ["--out", str(tmp_path)]
    oracle.main(argv)
    assert (tmp_path / "oracle-toy.png").read_bytes()[:4] == b"\x89PNG"
    whole = (run / "oracle.csv").read_text()
    with open(run / "oracle.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    kept = [line for line in whole.splitlines(True) if not line.startswith(("2,", "4,"))]
    (run / "oracle.csv").write_text("".join(kept))
    measured_now = []
    measure = oracle.measure_state

    def spy(env, number, *rest):
        measured_now.append(number)
        return measure(env, number, *rest)

    monkeypatch.setattr(oracle, "measure_state", spy)
    oracle.main(argv)
    assert measured_now == [2, 4]
    assert sorted((run / "oracle.csv").read_text().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(UserError, match="was measured with candidates 4, not 8"):
        oracle.main([*argv, "--candidates", "8"])
    simulation = oracle.load_run(run, "last.pt")[1]
    monkeypatch.setattr(oracle, "load_run", lambda *_: (judge_of(step=200), simulation))
    with pytest.raises(UserError, match="was measured with step 100, not 200"):  # trained on
        oracle.main(argv)


def test_the_table_has_a_column_per_phase(run, tmp_path, capsys):
    argv = ["--states", "6", "--candidates", "4", "--repeats", "2", "--out", str(tmp_path)]
    oracle.main([str(run), *argv])
    out = capsys.readouterr().out
    assert (
        "| | start | reach | manipulate | overtime |" in out and "| states | 2 | 2 | 1 | 1 |" in out
    )
    overtime = oracle_report.read_run(run).of("overtime")
    assert oracle_report.outcomes(overtime)["lost"] == 1.0


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give run folders"),
        (["x", "--repeats", "3"], "--repeats is even"),
        (["x", "--candidates", "1"], "--candidates is at least 2"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        oracle.main(argv)


def test_a_method_without_candidates_is_refused(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"args": {"task": "lift", "method": "fql"}}))
    with pytest.raises(UserError, match="a run of fql: the oracle judges poco and qc"):
        oracle.load_run(tmp_path, "last.pt")

"""replay.py against a brute-force reading of episodes, wherever they end and wherever the ring has
wrapped.

python -m pytest tests/test_replay.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from replay import FIELDS, Batch, ChunkReplay

DISCOUNT = 0.9
SEEDS = st.integers(0, 2**31 - 1)
# horizon, room for online steps beyond the horizon, demonstration steps, times the ring is written,
# chance of an end
WORLDS = st.tuples(
    st.integers(1, 5), st.integers(0, 12), st.integers(0, 9), st.floats(0, 3.5), st.floats(0, 0.6)
)


def steps(count, rng, ends, first=0):
    """`count` steps of random episodes, (obs, action, reward, next_obs, terminated, truncated),
    told apart by obs."""
    return [
        (
            np.array([first + i, rng.normal()]),
            rng.normal(size=3),
            rng.normal(),
            rng.normal(size=2),
            rng.random() < ends / 2,
            rng.random() < ends / 2,
        )
        for i in range(count)
    ]


def columns(rows):
    shapes = ((0, 2), (0, 3), (0,), (0, 2), (0,), (0,))
    return {
        name: np.array([row[i] for row in rows]) if rows else np.zeros(shapes[i])
        for i, name in enumerate(FIELDS)
    }


def build(horizon, room, demos, wraps, ends, seed):
    """A replay, and what it should hold: demonstrations and the newest online steps, oldest
    first."""
    rng = np.random.default_rng(seed)
    ring = horizon + room
    recorded, online = steps(demos, rng, ends), steps(round(wraps * ring), rng, ends, first=100)
    replay = ChunkReplay(demos + ring, 2, 3, horizon, DISCOUNT)
    replay.extend(columns(recorded[: demos // 2]))
    replay.extend(columns(recorded[demos // 2 :]))
    for step in online:
        replay.add(*step)
    for last in {demos // 2 - 1, demos - 1} & set(range(demos)):  # a recording's last step ends it
        obs, action, reward, next_obs, terminated, truncated = recorded[last]
        recorded[last] = (obs, action, reward, next_obs, terminated, truncated or not terminated)
    return replay, recorded, online[-ring:]


def chunk_by_hand(rows, i, horizon):
    """The chunk that starts at rows[i], or None while its episode is still being played."""
    taken = []
    for step in rows[i : i + horizon]:
        taken.append(step)
        if step[4] or step[5]:
            break
    k, (*_, next_obs, terminated, truncated) = len(taken), taken[-1]
    if k < horizon and not (terminated or truncated):
        return None
    actions = [step[1] for step in taken] + [taken[-1][1]] * (horizon - k)
    return Batch(
        obs=taken[0][0],
        chunk=np.array(actions),
        valid=np.arange(horizon) < k,
        returns=sum(DISCOUNT**j * step[2] for j, step in enumerate(taken)),
        bootstrap=0.0 if terminated else DISCOUNT**k,
        next_obs=next_obs,
    )


def expected(recorded, online, horizon):
    """Every chunk that may be sampled, by the first entry of its obs."""
    chunks = [
        chunk_by_hand(rows, i, horizon) for rows in (recorded, online) for i in range(len(rows))
    ]
    return {int(chunk.obs[0]): chunk for chunk in chunks if chunk is not None}


def assert_batch(batch, chunks):
    for field, values in zip(Batch._fields, batch):
        by_hand = np.array([getattr(chunk, field) for chunk in chunks], dtype=np.float32)
        assert_close(
            values,
            torch.as_tensor(by_hand),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, field=field: f"{field}: {text}",
        )


@given(WORLDS, SEEDS)
def test_samples_are_the_brute_force_chunks_and_all_of_them(world, seed):
    """Rewards, masks, gamma^k, next state, for any ends, pointer, wraps; exactly the complete
    chunks appear. Eq. 14."""
    replay, recorded, online = build(*world, seed)
    chunks = expected(recorded, online, world[0])
    assert len(replay) == len(recorded) + len(online)
    if not chunks:
        with pytest.raises(ValueError, match="nothing to sample"):
            replay.sample(1)
        return
    batch = replay.sample(25 * len(chunks), torch.Generator().manual_seed(seed))
    names = batch.obs[:, 0].int().tolist()
    assert set(names) == set(chunks)
    assert_batch(batch, [chunks[name] for name in names])


def test_start_points_are_uniform():
    """Chi-squared over 24 start points: demonstrations, a wrapped ring, and an open tail that
    waits."""
    replay, recorded, online = build(3, 14, 9, 2.4, 0.2, 0)
    chunks = expected(recorded, online, 3)
    assert len(chunks) == 24 == len(replay) - 2
    names = replay.sample(24_000, torch.Generator().manual_seed(0)).obs[:, 0]
    counts = names.unique(return_counts=True)[1]
    assert (
        len(counts) == 24 and ((counts - 1000).float() ** 2 / 1000).sum() < 50
    )  # 99.9 % quantile of 23 d.o.f.


@settings(max_examples=50)
@given(WORLDS, SEEDS)
def test_demonstrations_are_never_overwritten(world, seed):
    replay, recorded, online = build(*world, seed)
    for name, column in columns(recorded).items():
        assert torch.equal(
            replay.data[name][: len(recorded)], torch.tensor(column, dtype=torch.float32)
        )


def test_no_chunk_crosses_the_write_pointer():
    """One endless episode in a ring at each of its positions: chunks hold consecutive steps, the
    newest ones wait."""
    replay = ChunkReplay(10, 1, 1, 4, 1.0)
    for i in range(35):
        replay.add([i], [i], 0.0, [i + 1], False, False)
        if i >= 3:
            batch = replay.sample(300)
            assert (batch.chunk[:, :, 0] == batch.obs + torch.arange(4)).all() and (
                batch.valid == 1
            ).all()
            assert (batch.next_obs == batch.obs + 4).all() and (batch.bootstrap == 1).all()
            assert set(batch.obs[:, 0].tolist()) == set(range(max(0, i - 9), i - 2))


@pytest.mark.parametrize("timeout", [False, True])
def test_an_open_tail_waits_until_its_chunk_is_complete_or_its_episode_ends(timeout):
    replay = ChunkReplay(20, 1, 1, 3, 0.5)
    for i, total in enumerate((0, 0, 1, 2, 5)):
        replay.add([i], [i], 1.0, [i + 1], i == 4 and not timeout, i == 4 and timeout)
        if total:
            assert set(replay.sample(200).obs[:, 0].tolist()) == set(range(total))
        else:
            with pytest.raises(ValueError, match="no complete chunk"):
                replay.sample(1)
    batch = replay.chunks(torch.arange(5))
    assert batch.returns.tolist() == [1.75, 1.75, 1.75, 1.5, 1.0]
    assert batch.bootstrap.tolist() == [0.125, 0.125] + (
        [0.125, 0.25, 0.5] if timeout else [0, 0, 0]
    )
    assert batch.valid.sum(1).tolist() == [3, 3, 3, 2, 1] and batch.chunk[:, :, 0].tolist()[3] == [
        3,
        4,
        4,
    ]


@pytest.mark.parametrize("before", [1, 3, 8])
def test_a_cut_ends_the_episode_at_its_newest_step(before):
    """What could not be continued is a timeout, also where the ring has wrapped; twice is once."""
    replay = ChunkReplay(6, 1, 1, 2, 0.5)
    replay.cut()  # of nothing
    for i in range(before):
        replay.add([i], [i], 1.0, [i + 1], False, False)
    replay.cut()
    replay.cut()
    replay.add([50], [0], 8.0, [51], False, False)
    batch = replay.chunks(torch.tensor([len(replay) - 2]))
    assert batch.obs.item() == before - 1 and batch.valid.tolist() == [[1, 0]]
    assert (batch.returns.item(), batch.bootstrap.item()) == (1.0, 0.5)
    assert batch.next_obs.item() == before
    assert replay.data["truncated"].sum() == 1


@pytest.mark.parametrize(
    "terminated, truncated, bootstrap", [(1, 0, 0.0), (0, 1, 0.25), (1, 1, 0.0)]
)
def test_a_timeout_keeps_the_future_and_a_terminal_does_not(terminated, truncated, bootstrap):
    """bootstrap = gamma^k at a timeout, 0 at a terminal, also when both come at once. Eq. 14."""
    replay = ChunkReplay(20, 1, 1, 4, 0.5)
    replay.add([0], [0], 1.0, [1], False, False)
    replay.add([1], [1], 1.0, [2], terminated, truncated)
    for _ in range(4):
        replay.add([9], [9], 99.0, [9], False, False)  # the next episode must not leak in
    batch = replay.chunks(torch.tensor([0]))
    assert (batch.bootstrap.item(), batch.returns.item(), batch.next_obs.item()) == (
        bootstrap,
        1.5,
        2.0,
    )
    assert batch.valid.tolist() == [[1, 1, 0, 0]] and batch.chunk[0, :, 0].tolist() == [0, 1, 1, 1]


@settings(max_examples=50)
@given(WORLDS, SEEDS, st.integers(0, 8))
def test_a_saved_replay_continues_exactly(world, seed, more):
    """state_dict -> load_state_dict: the same generator gives bitwise the same batches, also after
    further steps."""
    replay, recorded, online = build(*world, seed)
    other = ChunkReplay(replay.capacity, 2, 3, world[0], DISCOUNT)
    other.load_state_dict(replay.state_dict())
    further = steps(more, np.random.default_rng(seed), world[4], first=500)
    for step in further:
        replay.add(*step)
        other.add(*step)
    if expected(recorded, (online + further)[-(world[0] + world[1]) :], world[0]):
        ours, theirs = (x.sample(64, torch.Generator().manual_seed(seed)) for x in (replay, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_saved_replay_is_a_copy_of_the_filled_rows():
    replay, _, _ = build(3, 5, 4, 0.5, 0.2, 0)
    state = replay.state_dict()
    before = {name: value.clone() for name, value in state["data"].items()}
    for _ in range(20):
        replay.add(*steps(1, np.random.default_rng(1), 0.0, first=900)[0])
    assert all(
        torch.equal(before[name], value) and len(value) == 8
        for name, value in state["data"].items()
    )


def test_demonstrations_may_be_tensors_and_are_not_changed():
    """A recording that just stops counts as truncated in the replay, and stays as it is in the
    caller's arrays."""
    for kind in (torch.zeros, lambda *shape: np.zeros(shape, np.float32)):
        demos = {
            name: kind(3, *shape) for name, shape in zip(FIELDS, ((2,), (3,), (), (2,), (), ()))
        }
        replay = ChunkReplay(10, 2, 3, 2, DISCOUNT)
        replay.extend(demos)
        assert replay.data["truncated"][:3].tolist() == [0, 0, 1] and not demos["truncated"].any()


# ---- refusals ----


def one(**changes):
    step = dict(
        obs=[0.0, 0.0],
        action=[0.0] * 3,
        reward=0.0,
        next_obs=[0.0, 0.0],
        terminated=False,
        truncated=False,
    )
    return step | changes


def full(count=4, **changes):
    return columns([tuple(one().values())] * count) | changes


@pytest.mark.parametrize(
    "change",
    [
        dict(obs=[0.0, np.nan]),
        dict(action=[np.inf, 0, 0]),
        dict(reward=-np.inf),
        dict(next_obs=[np.nan, 0.0]),
    ],
)
def test_a_non_finite_transition_is_refused(change):
    replay = ChunkReplay(10, 2, 3, 2, DISCOUNT)
    with pytest.raises(ValueError, match="non-finite"):
        replay.add(**one(**change))
    with pytest.raises(ValueError, match=f"'{list(change)[0]}' holds a non-finite"):
        replay.extend(full(1, **{name: np.array([value]) for name, value in change.items()}))
    assert len(replay) == 0 and not any(value.any() for value in replay.data.values())


@pytest.mark.parametrize(
    "change",
    [
        dict(obs=[0.0]),
        dict(obs=0.0),
        dict(action=[0.0]),
        dict(action=[0.0] * 4),
        dict(reward=[0.0]),
    ],
)
def test_a_wrong_shape_is_refused_and_never_broadcast(change):
    replay = ChunkReplay(10, 2, 3, 2, DISCOUNT)
    with pytest.raises(ValueError, match=f"'{list(change)[0]}' has shape"):
        replay.add(**one(**change))
    assert len(replay) == 0 and replay.pointer == 0


def test_bad_demonstrations_are_refused():
    replay = ChunkReplay(10, 2, 3, 2, DISCOUNT)
    for bad in (
        full(action=np.zeros((4, 2))),
        full(reward=np.zeros((4, 1))),
        full(next_obs=np.zeros((3, 2))),
    ):
        with pytest.raises(ValueError, match="has shape .* expected"):
            replay.extend(bad)
    with pytest.raises(KeyError, match="truncated"):
        replay.extend({name: value for name, value in full().items() if name != "truncated"})
    with pytest.raises(ValueError, match="12 demonstration steps do not fit a capacity of 10"):
        replay.extend(full(12))
    assert len(replay) == 0


def test_the_order_and_the_capacity_are_guarded():
    with pytest.raises(ValueError, match="cannot hold one chunk"):
        ChunkReplay(3, 2, 3, 4, DISCOUNT)
    replay = ChunkReplay(10, 2, 3, 2, DISCOUNT)
    with pytest.raises(ValueError, match="nothing to sample"):
        replay.sample(1)
    replay.add(**one())
    with pytest.raises(ValueError, match="before the first online transition"):
        replay.extend(full())
    crowded = ChunkReplay(10, 2, 3, 2, DISCOUNT)
    crowded.extend(full(9))
    with pytest.raises(ValueError, match="full of 9 demonstration steps"):
        crowded.add(**one())
    crowded.sample(4)


def test_a_state_of_another_size_is_refused():
    state = build(2, 5, 3, 1.0, 0.2, 0)[0].state_dict()
    with pytest.raises(ValueError, match="capacity 10 does not fit one of 11"):
        ChunkReplay(11, 2, 3, 2, DISCOUNT).load_state_dict(state)
    with pytest.raises(ValueError, match="'action' has shape"):
        ChunkReplay(10, 2, 4, 2, DISCOUNT).load_state_dict(state)


@settings(max_examples=30)
@given(
    st.integers(0, 60),
    st.integers(4, 60),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_a_share_of_every_batch_comes_from_the_demonstrations(demos, online, batch_size, share):
    """Exactly, however many there are of either; uniform within each part; the rest is
    experience."""
    replay = ChunkReplay(200, 1, 1, 4, 1.0, demo_share=share)
    rows = np.zeros((demos, 1))
    replay.extend(
        dict(
            obs=rows,
            action=rows,
            reward=rows[:, 0],
            next_obs=rows,
            terminated=rows[:, 0],
            truncated=rows[:, 0],
        )
    )
    for step in range(online):
        replay.add([1.0 + step], [0.0], 0.0, [0.0], False, False)
    old = (replay.sample(batch_size, torch.Generator().manual_seed(0)).obs == 0).sum()
    share = share if demos else 0
    assert old == round(share * batch_size)
    seen = {
        row.item() for row in replay.sample(4000, torch.Generator().manual_seed(1)).obs.squeeze(1)
    }
    assert (
        seen == {0.0} if share == 1 else seen - {0.0} == {1.0 + step for step in range(online - 3)}
    )


@pytest.mark.parametrize("name", ["demos", "online", "pointer", "tail"])
@pytest.mark.parametrize("value", [-1, 10**9, 1.0, True, "1", None])
def test_altered_counts_of_a_saved_replay_are_refused(name, value):
    replay = build(2, 5, 3, 1.0, 0.2, 0)[0]
    state = replay.state_dict() | {name: value}
    with pytest.raises(ValueError, match=f"a replay's {name} is a count"):
        replay.load_state_dict(state)


def test_missing_rows_of_a_saved_replay_are_refused():
    replay = build(2, 5, 3, 1.0, 0.2, 0)[0]
    state = replay.state_dict()
    state["data"]["reward"] = state["data"]["reward"][:-1]
    with pytest.raises(ValueError, match="replay field 'reward' has shape"):
        replay.load_state_dict(state)

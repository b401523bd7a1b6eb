"""An arm's learner: POCO on the files of episodes, its warm-up, its checkpoints.

    python -m pytest tests/robot/test_learner.py

Not here: the update (tests/method/test_update.py), the second process (test_background.py), whole
sessions (test_session.py).
"""

import numpy as np
import pytest
import torch
from arm_data import TASK, settings, write_episode

import train_online
from arms.learner import Learner, least_deviation, make_policy, trained
from arms.pipe import fingerprint, flat
from logbook import UserError, load_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Two demonstrations, and a run of three episodes."""
    for seed in range(2):
        write_episode(tmp_path / "demos", seed)
    for seed in range(2, 5):
        write_episode(tmp_path / "run/episodes", seed, steps=20)
    return tmp_path


def episode(folder, number):
    return folder / f"run/episodes/episode_{number:05d}.hdf5"


def test_the_update_is_train_onlines(folder, monkeypatch):
    """Nothing of the arm's own: the same object, called with the replay's chunks."""
    learner = Learner(settings(folder), TASK)
    assert type(learner.agent) is train_online.POCO
    seen = []
    update = learner.agent.update
    monkeypatch.setattr(
        learner.agent, "update", lambda batch, warmup: seen.append(warmup) or update(batch, warmup)
    )
    learner.absorb(episode(folder, 0))
    learner.absorb(episode(folder, 1))
    assert seen == [True] * 25 + [False] * 15 and learner.updates == 40 == learner.seen


@pytest.mark.parametrize("ratio, last", [("0.5", 12), ("1", 24), ("2", 49)])
def test_warm_up_is_counted_in_steps(folder, ratio, last):
    """25 steps pay for 12.5, 25 or 50 updates: the actor is released after the same experience."""
    learner = Learner(settings(folder, "--updates-per-step", ratio), TASK)
    for learner.updates, frozen in ((0, True), (last, True), (last + 1, False)):
        assert learner.warmup() == frozen


def test_guidance_zero_is_behaviour_cloning_and_samples_no_candidate(folder, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the E-step ran although guidance is 0")

    monkeypatch.setattr(train_online, "e_step", forbidden)
    args = settings(folder, "--guidance", "0", "--warmup-steps", "1")
    learner = Learner(args, TASK)
    before = flat([learner.agent.policy]).clone()
    learner.update()
    learner.update()
    assert not torch.equal(flat([learner.agent.policy]), before)
    assert {"bc", "surrogate", "ess"} & set(learner.totals) == {"bc"}
    with pytest.raises(AssertionError, match="E-step ran"):
        args.guidance = 1.0
        learner.update()


def test_a_pessimistic_posterior_avoids_what_the_heads_disagree_on(folder):
    """Q of two chunks, heads (1, 1) and (0, 3): the mean prefers the second, else the first."""
    args = settings(folder, "--act", "posterior", "--num-candidates", "2")
    chunks = torch.zeros(1, 2, args.horizon, 7)
    chunks[:, 1] = 1
    for args.pessimism, chosen in ((0.0, 1.0), (1.0, 0.0)):
        acting = Learner(args, TASK).acting()
        acting.policy.sample = lambda *_, **__: chunks
        acting.critic = lambda obs, given: torch.tensor([[[1.0, 0.0]], [[1.0, 3.0]]])
        assert acting(np.zeros((1, 16), np.float32), np.random.default_rng(0)).mean() == chosen


def test_a_part_that_demonstrations_hardly_move_is_not_blown_up():
    least = least_deviation(TASK)
    assert least.tolist() == pytest.approx([0.05] * 6 + [0.005] + [0.005] * 3 + [0.05] * 6)


@pytest.mark.parametrize("save_after", [1, 2])
def test_a_learner_goes_on_from_its_checkpoint_to_the_bit(folder, save_after):
    """Episodes are read again from their files, and those it had not absorbed are not."""
    whole = Learner(settings(folder), TASK)
    whole.pretrain(lambda learner: None)
    for number in range(3):
        whole.absorb(episode(folder, number))
    part = Learner(settings(folder), TASK)
    part.pretrain(lambda learner: None)
    for number in range(save_after):
        part.absorb(episode(folder, number))
    part.save(folder / "run/last.pt")
    again = Learner(settings(folder), TASK)
    again.load_state_dict(load_checkpoint(folder / "run/last.pt"), folder / "run/episodes")
    assert again.absorbed == save_after
    for number in range(save_after, 3):
        again.absorb(episode(folder, number))
    nets = [(learner.agent.actor, learner.agent.critic) for learner in (whole, again)]
    assert fingerprint(nets[0]) == fingerprint(nets[1]) != fingerprint(nets[1][:1])
    assert again.updates == whole.updates == 60 and again.cloned == 20


def test_a_checkpoint_says_all_that_acting_needs(folder):
    """No size is typed in: neither by eval nor by train_online.load_policy."""
    learner = Learner(settings(folder, "--hidden", "24", "--flow-steps", "3"), TASK)
    learner.agent.actor.out.bias.data.fill_(0.3)  # another one than the policy
    learner.save(folder / "run/last.pt")
    acting, updates, steps = trained(settings(folder, "--hidden", "24"), TASK)
    loaded = train_online.load_policy(folder / "run/last.pt")
    for one in (acting, loaded):
        assert one.policy.sizes() == learner.agent.actor.sizes()
        assert fingerprint([one.policy]) == fingerprint([learner.agent.actor])
    assert (updates, steps) == (0, 0) and loaded.act(np.zeros(16)).shape == (4, 7)


def test_a_checkpoint_of_other_columns_is_refused(folder):
    learner = Learner(settings(folder), TASK)
    learner.save(folder / "run/last.pt")
    other = TASK.__class__(**vars(TASK) | {"obs_keys": ("joints", "gripper", "object")})
    with pytest.raises(UserError, match="learnt from joints, gripper, eef, this arm offers joints"):
        trained(settings(folder), other)


def test_what_diverged_is_not_saved(folder):
    learner = Learner(settings(folder), TASK)
    learner.save(folder / "run/last.pt")
    before = (folder / "run/last.pt").read_bytes()
    learner.agent.critic.out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="learner.critic.out.bias became non-finite"):
        learner.save(folder / "run/last.pt")
    assert (folder / "run/last.pt").read_bytes() == before


def test_without_recordings_it_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match="python robot.py record --task insert-usb"):
        Learner(settings(tmp_path), TASK)


def test_an_untrained_policy_fits_the_columns(folder):
    assert make_policy(settings(folder), TASK).sizes()["obs_dim"] == 16

"""What must not go wrong silently on an arm: a start outside the box, lost recordings, a starved learner, a failure."""
import contextlib
import io
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import arms.learner as learner_module
import robot
from arms.episodes import Take, following, layout, length, load, merge, numbered, outcome, reach, refuse_loss
from arms.keypad import ScriptedPad
from arms.learner import STARVED, Acting, Background, Learner, flat, networks, serve
from arms.senses import JOINTS, PERIOD, Pace, Senses
from arms.settings import TASKS, open_arm, parse
from arms.sim import SimArm
from logbook import Interrupt, UserError
from robot import LATE

ROOT = Path(__file__).parent.parent
TOY = ("--preset cpu --task insert-usb --hidden 32 --layers 2 --flow-steps 2 --batch-size 16 --num-candidates 4 "
       "--pretrain-steps 20 --warmup-updates 25 --save-every 20 --device cpu --no-realtime").split()
ASIDE = "--box-center 36 3 -2 --box-size 8 8 8".split()                     # cm; the tool starts at 30, 0, 1


@pytest.mark.parametrize("flags", ("--updates-per-step inf", "--updates-per-step nan", "--heads 0", "--leash -1",
                                   "--learning-rate 0", "--threads 0", "--pretrain-steps 0", "--max-turn nan"))
def test_settings_that_could_only_fail_later_are_refused(flags):
    with pytest.raises(UserError, match=f"{flags.split()[0]} must be a number greater than 0, got {flags.split()[1]}"):
        parse(["train", *TOY, *flags.split()], "")


@pytest.mark.parametrize("flags, told", [
    ("--clip nan", "at least 0, got nan"), ("--guidance -1", "at least 0"), ("--pessimism nan", "at least 0"),
    ("--temperature 1e-9", "at least 1e-06"), ("--seed -1", "at least 0"), ("--demo-share 2", "between 0 and 1, got 2"),
    ("--reward-offset nan", "a finite number"), ("--capacity 2", "cannot hold one chunk"),
    ("--device gpu", "cannot be used here"), ("--box-size nan nan nan", "three lengths in cm"),
    ("--box-center inf 0 0", "a place in cm"), ("--options size=abc", "does not take these options")])
def test_so_are_these(flags, told):
    with pytest.raises(UserError, match=f"{flags.split()[0]} .*{told}|{told}"):
        open_arm(parse(["train", *TOY, *flags.split()], ""))


# ---- a start outside the box

def rig(*flags, shift=0.0):
    """A rig on the simulated arm, whose encoders may be wrong by `shift` rad, and what it was sent."""
    args = parse(["train", *TOY, *ASIDE, *flags], "")
    arm, teleop = open_arm(args)
    sent, send, get = [], arm.send_action, arm.get_observation
    arm.send_action = lambda action: sent.append([action[name] for name in JOINTS]) or send(action)
    arm.get_observation = lambda: {name: value + shift * (name == JOINTS[4]) for name, value in get().items()}
    senses = Senses(arm, arm.kinematics, Pace(False))
    return robot.Rig(args, arm, senses, ScriptedPad(), teleop, Interrupt(), True), sent


def test_outside_the_box_nothing_moves_without_recover():
    outside, sent = rig()
    with pytest.raises(UserError, match="outside its limits.*--recover"), outside:
        pass
    assert not sent and not outside.robot.is_connected


def test_recover_goes_slowly_to_the_middle_of_the_box():
    inside, sent = rig("--recover")
    with inside:
        count, place = len(sent), inside.senses.kinematics.fk(inside.senses.read(inside.robot).joints)[0]
        np.testing.assert_allclose(place, [0.36, 0.03, -0.02], atol=0.01)
        assert inside.guard.outside(inside.home) is None
    speed = np.abs(np.diff(sent[:count], axis=0)).max() / PERIOD
    assert count > 5 and speed <= np.radians(90) / 4 + 1e-6                # a quarter of the limit


def test_recover_does_not_move_an_arm_whose_zero_is_wrong():
    wrong, sent = rig("--recover", shift=2.0)
    with pytest.raises(UserError, match="check its zero"), wrong:
        pass
    assert not sent


def test_recover_gives_up_when_the_middle_of_the_box_is_out_of_reach():
    far, sent = rig("--recover", "--box-center", "120", "0", "0")
    with pytest.raises(UserError, match="cannot reach the middle of the box"), far:
        pass
    assert not sent and not far.robot.is_connected


def test_quitting_ends_a_recovery_at_once():
    inside, sent = rig("--recover")
    send = inside.robot.send_action

    def quit_at_three(action):
        inside.interrupt.stop = len(sent) >= 2
        return send(action)
    inside.robot.send_action = quit_at_three
    with pytest.raises(UserError, match="did not reach"), inside:
        pass
    assert len(sent) == 3


# ---- recordings

def test_episodes_of_a_real_arm_are_never_overwritten(tmp_path):
    (tmp_path / "episodes").mkdir()
    file = tmp_path / "episodes" / "episode_00000.hdf5"
    file.write_bytes(b"an afternoon")
    with pytest.raises(UserError, match="1 episodes played on piper.*move the folder away.*--resume"):
        refuse_loss(tmp_path, "piper")
    refuse_loss(tmp_path, "sim")
    refuse_loss(tmp_path / "none", "piper")
    (tmp_path / "args.json").write_text('{"args": {"robot": "piper"}}')             # whoever asks
    with pytest.raises(UserError, match="1 episodes played on piper.*move the folder away"):
        refuse_loss(tmp_path, "sim")
    assert file.read_bytes() == b"an afternoon"


def test_train_refuses_before_it_writes_anything(tmp_path, monkeypatch):
    """--overwrite on another arm: here the simulated one by the name that anybody's driver has."""
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    command = ["train", *TOY[:-1], "--robot", "arms.sim:SimArm", "--keypad", "none", "--data", str(tmp_path / "demos"),
               "--run-dir", str(tmp_path / "run"), "--overwrite"]
    episode = tmp_path / "run" / "episodes" / "episode_00000.hdf5"
    episode.parent.mkdir(parents=True)
    episode.write_bytes((tmp_path / "demos" / "episode_00000.hdf5").read_bytes())
    with pytest.raises(UserError, match="move the folder away"):
        robot.main(command)
    assert episode.exists() and not (tmp_path / "run" / "args.json").exists()


def test_episodes_are_numbered_after_the_last_one_and_others_files_are_left_alone(tmp_path):
    assert following(tmp_path) == (0, tmp_path / "episode_00000.hdf5")
    for name in ("episode_00000.hdf5", "episode_00003.hdf5", "episode_bad.hdf5", "episode_00001.hdf5"):
        (tmp_path / name).touch()
    assert [path.name[8:13] for path in numbered(tmp_path)] == ["00000", "00001", "00003"]
    assert following(tmp_path) == (4, tmp_path / "episode_00004.hdf5")


@pytest.mark.parametrize("read", [outcome, length, lambda path: merge([path], path.parent / "all.hdf5"),
                                  lambda path: reach([path])])
def test_a_torn_episode_is_named(tmp_path, read):
    torn = tmp_path / "episode_00000.hdf5"
    torn.write_bytes(b"half of an afternoon")
    with pytest.raises(UserError, match="episode_00000.hdf5 is damaged"):
        read(torn)


# ---- an arm that is no simulation: it cannot be reset, knows no success, and somebody places the object

class Plain:
    """The ten members of the protocol and no more."""

    is_calibrated = True

    def __init__(self, realtime):
        self.inner = SimArm(task="peg", cameras=False, realtime=realtime)
        self.sent, self.reading, self.overlaps, self.slow = [], False, 0, 0.0
        self.rest, self.kinematics, self.action_features = self.inner.rest, self.inner.kinematics, {}
        self.observation_features = {name: kind for name, kind in self.inner.observation_features.items()
                                     if not name.startswith("object")}

    is_connected = property(lambda self: self.inner.is_connected)
    calibrate = configure = lambda self: None

    def connect(self, calibrate=True):
        self.inner.connect()

    def get_observation(self):
        self.reading = True
        time.sleep(self.slow)
        self.reading = False
        return self.inner.get_observation()

    def send_action(self, action):
        self.overlaps += self.reading
        self.sent.append([action[name] for name in JOINTS])
        return self.inner.send_action(action)

    def disconnect(self):
        self.inner.disconnect()


class Person(ScriptedPad):
    """Does `answer` whenever the arm waits for a key."""

    def __init__(self, answer, events=()):
        super().__init__(events)
        self.answer = answer

    def wait(self, seconds):
        self.answer(self)
        return self.poll()


def space(person):
    person.events.insert(0, "pause")


def plain(person, realtime=False, teleop=None):
    args = parse(["train", *TOY, "--episode-limit", "10"], "")
    args.realtime, arm = realtime, Plain(realtime)
    return robot.Rig(args, arm, Senses(arm, arm.kinematics, Pace(realtime)), person, teleop, Interrupt(), False), arm


def ahead(obs):
    return np.tile(np.array([0.5, 0, 0, 0, 0, 0, -0.5], np.float32), (4, 1))


def test_no_command_of_the_policy_before_somebody_agreed():
    lost, arm = plain(Person(lambda person: setattr(person, "gone", True)))
    with pytest.raises(UserError, match="keypad is gone"), lost:
        lost.episode(ahead, 0)
    assert np.ptp(arm.sent, axis=0).max() < 1e-9                                     # only holds
    for key in ("quit", "stop"):
        asked, arm = plain(Person(lambda person: person.events.append(key)))
        with asked:
            take = asked.episode(ahead, 0)
            assert take.outcome == key and take.steps == 0 and asked.stopped == (key == "stop")
    told = []
    eager, _ = plain(Person(space))
    eager.keypad.forget = lambda: told.append("forgotten")
    with eager:
        eager.episode(ahead, 0)
    assert told == ["forgotten"] * 2                                # before the first command and before the label


@pytest.mark.parametrize("key", ["quit", "stop"])
def test_a_key_on_the_way_to_the_start_ends_the_session_there(key):
    asked, arm = plain(Person(space, [None, None, key]))
    with asked:
        asked.home = asked.home + [0.4, 0, 0, 0, 0, 0]
        take = asked.episode(ahead, 0)
        assert take.outcome == key and take.steps == 0 and len(arm.sent) == 3
    assert (len(arm.sent) == 4) == (key == "stop")                                   # after q the way to rest


def test_without_its_keypad_no_way_is_gone_on(capfd):
    asked, arm = plain(Person(space))
    asked.keypad.poll = lambda: setattr(asked.keypad, "gone", len(arm.sent) >= 3)
    with pytest.raises(UserError, match="keypad is gone"), asked:
        asked.home = asked.home + [0.4, 0, 0, 0, 0, 0]
        asked.episode(ahead, 0)
    assert len(arm.sent) == 4 and "holds where it is" in capfd.readouterr().err      # three steps and a hold


def test_x_is_obeyed_on_the_way_out_too():
    leaving, arm = plain(Person(space))
    with leaving:
        leaving.interrupt.stop, leaving.rest = True, leaving.rest + [0.5, 0, 0, 0, 0, 0]
        assert leaving.episode(ahead, 0).outcome == "quit"
        leaving.keypad.events, before = [None, None, "stop"], len(arm.sent)
    assert len(arm.sent) - before == 1 + 3


def test_a_tele_operator_without_a_number_is_no_command():
    class Broken:
        def get_action(self):
            return dict.fromkeys(JOINTS, np.nan) | {"gripper.pos": 0.0}
    held, arm = plain(Person(space), teleop=Broken())
    with held:
        take = held.episode(None, 0)
        assert take.outcome == "timeout" and held.guard.counts["nonfinite"] == 10
        assert np.ptp(arm.sent, axis=0).max() < 1e-9


@pytest.mark.realtime
def test_the_watchdog_repeats_the_last_target_and_never_while_the_driver_is_read():
    watched, arm = plain(Person(space), realtime=True)
    asked = []

    def act(obs):
        asked.append(len(arm.sent))
        if len(asked) == 2:
            time.sleep(0.5)                                                          # five periods of silence
            asked.append(np.ptp(arm.sent[asked[1] - 1:], axis=0).max())
        arm.slow = 0.4 * (len(asked) == 5)                                           # so has the driver
        return ahead(obs)[:1]
    with watched:
        watched.episode(act, 0)
    assert watched.trips >= 2 and asked[2] < 1e-9 and arm.overlaps == 0 and "watchdog" in watched.status()


@pytest.mark.realtime
def test_what_a_policy_made_of_an_old_view_is_not_executed(capfd):
    late, arm = plain(Person(space), realtime=True)
    calls = []

    def act(obs):
        calls.append(len(arm.sent))
        time.sleep((LATE + 0.1) * (len(calls) == 2))
        return ahead(obs)
    with late:
        take = late.episode(act, 0)
    assert take.dropped == 1 and [len(piece["action"]) for piece in take.pieces] == [4, 6]
    assert "HOLDING: the policy took 1." in capfd.readouterr().err and late.guard.counts["late"] == 1


def test_a_stamp_that_is_no_number_is_stale():
    arm = Plain(True)
    arm.connect()
    senses, frozen = Senses(arm, arm.kinematics, Pace(True)), arm.get_observation() | {"stamp": np.nan}
    arm.get_observation = lambda: frozen
    assert senses.read(arm) is None and "nothing new" in senses.fault


def test_whatever_the_terminal_the_arm_is_left_in_order(monkeypatch):
    class Gone(io.TextIOBase):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    left, arm = plain(Person(space))
    with pytest.raises(ZeroDivisionError), left:
        monkeypatch.setattr(sys, "stderr", Gone())
        left.episode(lambda obs: 1 / 0, 0)
    assert np.allclose(arm.sent[-1], arm.rest, atol=1e-3) and not arm.is_connected


def test_a_real_arm_needs_a_keypad(monkeypatch):
    monkeypatch.setattr(robot, "open_arm", lambda args: (Plain(False), None))
    with pytest.raises(UserError, match="--keypad none is for a simulated arm"):
        with robot.session(parse(["train", *TOY, "--keypad", "none"], "")):
            pass


@pytest.mark.parametrize("fault", [None, OSError("unplugged")])
def test_the_leader_is_let_go_whatever_happens(fault, monkeypatch):
    left = []

    class Leader:
        def disconnect(self):
            left.append(True)
            raise fault or RuntimeError("twice")
    monkeypatch.setattr(robot, "open_arm", lambda args: (SimArm("peg", cameras=False, realtime=False), Leader()))
    with pytest.raises(OSError) if fault else contextlib.nullcontext():
        with robot.session(parse(["train", *TOY], "")):
            if fault:
                raise fault
    assert left == [True]


def test_seeds_of_recording_training_and_evaluation_never_meet():
    seeds = [parse([role, *TOY, "--seed", str(seed)], "").seed_of(number) for role in ("record", "train")
             for seed in (0, 1, 49, 50, 51, 99, 100, 150) for number in (0, 9999)]
    tested = parse(["record", *TOY], "")
    tested.role = "eval"
    for tested.seed in (0, 49, 50, 100):
        seeds += [tested.seed_of(0), tested.seed_of(9999)]
    assert len(set(seeds)) == len(seeds) and tested.seed_of(1) == tested.seed_of(0) + 1


def test_as_many_demonstrations_as_in_the_paper(monkeypatch):
    counts = [parse(["record", "--preset", "paper", "--task", task], "").episodes for task in TASKS]
    assert counts == [40, 30, 50, 40, 50, 50] and parse(["record", *TOY], "").episodes == 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse(["record", "--preset", "auto"], "").episodes == 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse(["record", "--preset", "auto"], "").episodes == 50


def test_a_closed_terminal_is_a_lost_keypad_and_the_arm_is_left_in_order(tmp_path):
    """The terminal that the program runs in, so the kernel sends SIGHUP as well."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = ("import sys, arms.sim, robot; from logbook import cli; from pathlib import Path\n"
                "leave = arms.sim.SimArm.disconnect\n"
                f"def told(arm):\n    leave(arm); Path({str(tmp_path / 'left')!r}).touch()\n"
                "arms.sim.SimArm.disconnect = told\n"
                f"sys.argv = {['robot.py', 'record', *TOY, '--keypad', 'terminal', '--episodes', '50']!r}\n"
                f"sys.argv.remove('--no-realtime'); sys.argv += ['--data', {str(tmp_path / 'data')!r}]\n"
                "cli(robot.main)")
        os.execve(sys.executable, [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)})
    seen, end = b"", time.monotonic() + 60
    while b"box" not in seen and time.monotonic() < end:
        seen += os.read(terminal, 4096)
    time.sleep(0.5)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), "the hang-up killed it"
    assert (tmp_path / "left").exists()


# ---- a starved learner

class Pipe:
    def __init__(self, *messages):
        self.messages = list(messages)

    def poll(self):
        return bool(self.messages)

    def recv(self):
        return self.messages.pop(0)


def test_a_learner_that_falls_behind_is_told_once(capfd):
    background = Background.__new__(Background)
    background.stats, background.told = {}, False
    for behind in (STARVED, STARVED + 1, 10, 2 * STARVED):
        background.connection = Pipe({"updates": 3, "behind": behind})
        assert background.report() == {"updates": 3}
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"{STARVED + 1} updates behind" in err and "--updates-per-step" in err


def test_the_last_words_of_a_learner_that_diverged_are_told():
    for ask in (Background.report, Background.check):
        background = Background.__new__(Background)
        background.stats, background.told, background.args = {}, False, SimpleNamespace(run_dir="run")
        background.connection = Pipe({"updates": 3, "behind": 0}, {"failed": "Q became non-finite"})
        background.process = SimpleNamespace(is_alive=lambda: False, exitcode=0)
        with pytest.raises(UserError, match="the learner stopped: Q became non-finite"):
            ask(background)


def test_a_learner_in_the_background_says_why_it_stopped(tmp_path, monkeypatch):
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    args = parse(["train", *TOY, "--data", str(tmp_path / "demos"), "--run-dir", str(tmp_path / "run")], "")
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9, "object": 4})
    path, said = tmp_path / "run/last.pt", []
    path.parent.mkdir()
    learner = Learner(args, task)
    learner.save(path)
    good = path.read_bytes()

    def diverge(one):
        one.critic.out.bias.data.fill_(np.nan)
        raise ValueError("the critic returned a non-finite Q")
    monkeypatch.setattr(Learner, "update", diverge)
    monkeypatch.setattr(Learner, "owed", lambda one: 1)
    for module, name in ((os, "nice"), (signal, "signal"), (torch, "set_num_threads")):      # those of its own process
        monkeypatch.setattr(module, name, lambda *_: None)
    line = SimpleNamespace(send=said.append, poll=lambda seconds: False)
    serve(vars(args), task, line, flat([learner.actor, learner.critic]), contextlib.nullcontext(),
          SimpleNamespace(value=0))
    assert "a non-finite Q" in said[-1]["failed"] and "last.pt is the last good" in said[-1]["failed"]
    assert path.read_bytes() == good


def test_guidance_zero_is_behaviour_cloning_and_samples_no_candidate(tmp_path, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the E-step ran although guidance is 0")
    monkeypatch.setattr(learner_module, "e_step", forbidden)
    robot.main(["record", *TOY, "--episodes", "1", "--data", str(tmp_path / "demos")])
    args = parse(["train", *TOY, "--data", str(tmp_path / "demos"), "--guidance", "0", "--warmup-updates", "1"], "")
    learner = Learner(args, layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9, "object": 4}))
    before = flat([learner.policy]).clone()
    learner.update(), learner.update()
    assert not torch.equal(flat([learner.policy]), before) and {"bc"} == {"bc", "surrogate", "ess"} & set(learner.sums)
    with pytest.raises(AssertionError, match="E-step ran"):
        args.guidance = 1.0
        learner.update()


def test_the_arm_waits_for_weights_that_are_just_being_written():
    """Version 1 is announced while the learner still holds the lock, for long where it gets no processor."""
    background, waited = Background.__new__(Background), []
    background.shared, background.newest, background.lock = torch.ones(3), -1, multiprocessing.Lock()
    background.version, background.policies = SimpleNamespace(value=1), [torch.nn.Linear(2, 1)]
    background.lock.acquire()
    background.process = SimpleNamespace(
        join=lambda seconds: waited.append(seconds) or len(waited) == 3 and background.lock.release(),
        is_alive=lambda: True)
    background.wait()
    assert len(waited) == 3 and background.newest == 1 and (background.policies[0].weight == 1).all()


def test_a_pessimistic_posterior_avoids_what_the_heads_disagree_on():
    """Q of two chunks, heads (1, 1) and (0, 3): the mean prefers the second, one deviation less the first."""
    args = parse(["train", *TOY, "--act", "posterior", "--num-candidates", "2"], "")
    policy, _ = networks(args, layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9}))
    chunks = torch.zeros(1, 2, args.horizon, 7)
    chunks[:, 1] = 1
    policy.sample = lambda *_, **__: chunks
    for args.pessimism, chosen in ((0.0, 1.0), (1.0, 0.0)):
        acting = Acting(args, policy, lambda obs, given: torch.tensor([[[1.0, 0.0]], [[1.0, 3.0]]]))
        assert acting(np.zeros(16), np.random.default_rng(0)).mean() == chosen


# ---- failure and running out of time

@pytest.mark.parametrize("outcome, terminated, truncated, reward", [
    ("success", 1, 0, 1), ("fail", 1, 0, 0), ("timeout", 0, 1, 0)])
def test_a_failure_is_terminal_without_reward_and_running_out_of_time_is_not(tmp_path, outcome, terminated, truncated,
                                                                           reward):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take, obs, action = Take(np.zeros(16)), np.zeros(16), np.zeros(7)
    for step in range(5):
        take.add(action, action, obs)
        if step == 2:
            take.drop(obs)
    take.outcome = outcome
    take.save(tmp_path / "one.hdf5", task, outcome == "success")
    rows = load([tmp_path / "one.hdf5"], task)
    assert rows["terminated"].tolist() == [0, 0, 0, 0, terminated]            # never at the hole
    assert rows["truncated"].tolist() == [0, 0, 1, 0, truncated] and rows["reward"].tolist() == [0, 0, 0, 0, reward]
    with h5py.File(tmp_path / "one.hdf5") as file:
        assert file["data/demo_1/dones"][:].tolist() == [0, terminated]
        assert file["data/demo_0/dones"][:].tolist() == [0, 0, 0] and "failed" not in file["data/demo_0"].attrs


def test_a_failure_before_a_hole_at_the_end_is_not_put_on_the_step_before_it(tmp_path):
    task = layout("insert-usb", {"joints": 6, "gripper": 1, "eef": 9})
    take = Take(np.zeros(16))
    take.add(np.zeros(7), np.zeros(7), np.zeros(16))
    take.drop(np.zeros(16))
    take.outcome = "fail"
    take.save(tmp_path / "one.hdf5", task, False)
    rows = load([tmp_path / "one.hdf5"], task)
    assert not rows["terminated"].any() and rows["truncated"].tolist() == [1]


# ---- pictures

def test_record_train_eval_from_pictures(tmp_path):
    """At toy size. Needs OpenGL, which the other tests switch off: so in processes of their own."""
    environment = os.environ | {"MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)}

    def python(*command):
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    if python("-c", "from arms.sim import can_draw; assert can_draw()").returncode:
        pytest.skip("OpenGL does not work here (MUJOCO_GL=egl)")
    code = "import sys, robot\nfor line in sys.argv[1:]: robot.main(line.split())"
    where = f"--data {tmp_path}/demos --run-dir {tmp_path}/run"
    toy = " ".join(TOY) + " --observe vision --options size=64 " + where
    result = python("-c", code, f"record {toy} --episodes 1", f"train {toy} --episodes 2 --episode-limit 15",
                    f"eval --run-dir {tmp_path}/run --episodes 1 --episode-limit 5")
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "run" / "episodes" / "episode_00000.hdf5") as file:
        seen = file["data/demo_0/obs"]
        assert sorted(seen) == ["eef", "front", "gripper", "joints", "wrist"]         # no pose from the simulator
        assert seen["front"].shape[1] == 512 and np.ptp(seen["wrist"][:], axis=0).max() > 0
    assert "success" in result.stdout and (tmp_path / "run" / "eval.csv").exists()

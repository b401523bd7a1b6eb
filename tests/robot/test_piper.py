"""The Piper's driver against a fake arm on python-can's virtual bus, frame by frame; cameras.

    python -m pytest tests/robot/test_piper.py

Needs piper_sdk and python-can, skipped without.
"""

import itertools
import struct
import threading
import time

import numpy as np
import pytest

from arms.camera import Camera
from arms.piper_model import KEYS, limits
from logbook import UserError

can = pytest.importorskip("can")
pytest.importorskip("piper_sdk")
from arms.piper import PiperArm, PiperLeader  # noqa: E402

pytestmark = pytest.mark.realtime  # an arm that is silent for half a second counts as lost
names = (f"fake{i}" for i in itertools.count())
START = (0.0, 1.5, -1.0, 0.1, 0.3, -0.2, 0.03)  # radians and metres, from the first frame on


class FakeArm:
    """Answers as a Piper does, every 5 ms: joints, gripper, status, motor states. `log` has what
    it was sent.
    """

    def __init__(self, channel):
        self.bus = can.Bus(interface="virtual", channel=channel)
        self.joints, self.opening = (
            [round(np.degrees(joint) * 1000) for joint in START[:6]],
            round(START[6] * 1e6),
        )
        self.enabled, self.mode, self.status, self.log = False, 0, 0, []
        self.silent = self.refuses = self.done = False
        self.rounds = 0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.done:
            message = self.bus.recv(0.005)
            while message is not None:
                self.take(message.arbitration_id, bytes(message.data))
                message = self.bus.recv(0)
            if not self.silent:
                self.feed()
            self.rounds += 1

    def take(self, number, data):
        self.log.append((number, data))
        if number in (0x155, 0x156, 0x157) and self.enabled:
            place = 2 * (number - 0x155)
            self.joints[place : place + 2] = struct.unpack(">ii", data)
        elif number == 0x159:
            self.opening = struct.unpack(">i", data[:4])[0]
        elif number == 0x151:
            self.mode = data[0]
        elif number == 0x471 and not self.refuses:
            self.enabled = data[1] == 2
        elif number == 0x150:
            self.status = data[0]

    def send(self, number, data):
        self.bus.send(can.Message(arbitration_id=number, data=data, is_extended_id=False))

    def feed(self):
        self.send(0x2A1, bytes([self.mode, self.status, 1, 0, 0, 0, 0, 0]))
        for i in range(3):
            self.send(0x2A5 + i, struct.pack(">ii", *self.joints[2 * i : 2 * i + 2]))
        self.send(0x2A8, struct.pack(">ihBB", self.opening, 0, 0, 0))
        for i in range(6):
            self.send(0x261 + i, bytes([0, 240, 0, 20, 20, 0x40 * self.enabled, 0, 0]))

    def settle(self):
        """Return when what was sent before, either way, has arrived, however slow it is."""
        enough, end = self.rounds + 3, time.monotonic() + 10
        while self.rounds < enough and time.monotonic() < end and not self.done:
            time.sleep(0.005)
        time.sleep(0.02)  # the SDK's thread reads, too

    def sent(self, number):
        self.settle()
        return [data for other, data in self.log if other == number]

    def close(self):
        self.done = True
        self.thread.join(1)
        self.bus.shutdown()


@pytest.fixture
def pair():
    channel = next(names)
    fake, arm = FakeArm(channel), PiperArm(channel, bus="virtual", timeout=10.0)
    yield fake, arm
    arm.disconnect()
    fake.close()


def action(values):
    return dict(zip(KEYS, map(float, values), strict=True))


def test_connecting_enables_where_the_arm_is_and_moves_nothing(pair):
    fake, arm = pair
    joints = list(fake.joints)
    arm.connect()
    assert arm.is_connected and arm.is_calibrated and fake.enabled and fake.joints == joints
    numbers = [number for number, _ in fake.log]
    assert (
        numbers.index(0x151) < numbers.index(0x155) < numbers.index(0x471)
    )  # a target before there is torque
    assert fake.sent(0x47A)[0][:6] == bytes([5] * 6)  # crash protection
    assert all(
        data[:4] == bytes([1, 1, 30, 0]) for data in fake.sent(0x151)
    )  # CAN, joints, 30 %, no MIT
    assert not {0x152, 0x153, 0x154} & set(numbers)  # never a pose of the firmware's IK


def test_a_round_trip_of_every_frame(pair):
    fake, arm = pair
    assert set(arm.observation_features) == {*KEYS, "stamp"} and set(arm.action_features) == set(
        KEYS
    )
    arm.connect()
    seen = arm.get_observation()
    np.testing.assert_allclose([seen[key] for key in KEYS], START, atol=1e-5)
    assert 0 <= time.monotonic() - seen["stamp"] < 0.1
    target = [0.5, 1.2, -0.7, -0.3, 0.25, 1.0, 0.045]
    sent = arm.send_action(action(target))
    np.testing.assert_allclose([sent[key] for key in KEYS], target, atol=1e-5)
    assert struct.unpack(">ii", fake.sent(0x155)[-1]) == (
        round(np.degrees(0.5) * 1000),
        round(np.degrees(1.2) * 1000),
    )
    assert struct.unpack(">ihBB", fake.sent(0x159)[-1]) == (
        45000,
        1000,
        1,
        0,
    )  # 0.001 mm, 0.001 N m, on, no zeroing
    seen = arm.get_observation()
    np.testing.assert_allclose([seen[key] for key in KEYS], [sent[key] for key in KEYS], atol=1e-9)


def test_holding_keeps_the_grip_on_what_is_between_the_fingers(pair):
    fake, arm = pair
    take, fake.opening = fake.take, 30_000

    def held(number, data):
        take(number, data)
        fake.opening = max(fake.opening, 30_000)  # 30 mm wide

    fake.take = held
    arm.connect()
    assert struct.unpack(">i", fake.sent(0x159)[-1][:4]) == (
        30_000,
    )  # nothing was commanded before
    arm.send_action(action([*START[:6], 0.01]))
    fake.settle()
    assert arm.get_observation()["gripper.pos"] == pytest.approx(0.03)
    for way in (arm.hold, arm.disconnect):
        count = len(fake.sent(0x159))
        way()
        assert [struct.unpack(">i", data[:4])[0] for data in fake.sent(0x159)[count:]] == [10_000]


def test_an_arm_in_its_teach_mode_is_not_taken_from_who_leads_it(pair):
    fake, arm = pair
    arm.connect()
    fake.settle()
    fake.mode = 2
    fake.settle()
    count = len(fake.log)
    with pytest.raises(RuntimeError, match="left CAN control"):
        arm.hold()
    arm.disconnect()
    fake.settle()
    assert not arm.is_connected and not [number for number, _ in fake.log[count:]]


def test_targets_are_clipped_and_what_was_sent_is_returned(pair):
    fake, arm = pair
    arm.connect()
    sent = arm.send_action(action([9, -9, 9, -9, 9, -9, 9]))
    low, high = limits().T
    np.testing.assert_allclose(
        [sent[key] for key in KEYS],
        [high[0], low[1], high[2], low[3], high[4], low[5], 0.07],
        atol=1e-5,
    )
    assert struct.unpack(">ii", fake.sent(0x155)[-1]) == (150_000, 0)
    count = len(fake.log)
    with pytest.raises(ValueError, match="finite"):
        arm.send_action(action([np.nan] + [0.5] * 6))
    fake.settle()
    assert len(fake.log) == count


def test_an_arm_that_never_spoke_is_refused(pair):
    """The SDK would return zeros for ever."""
    fake, arm = pair
    fake.silent, arm.timeout = True, 0.5
    with pytest.raises(ConnectionError, match="no joint and gripper feedback"):
        arm.connect()
    assert not arm.is_connected and not [
        number for number, _ in fake.log if number in (0x155, 0x471)
    ]
    fake.silent, arm.timeout = False, 10.0
    arm.connect()  # and the next try works
    assert arm.get_observation()["joint_2.pos"] == pytest.approx(1.5, abs=1e-5)


def test_frozen_feedback_shows_its_age_then_counts_as_lost(pair):
    """The SDK would return the last pose for ever."""
    fake, arm = pair
    arm.connect()
    fake.silent = True
    time.sleep(0.2)
    assert 0.15 < time.monotonic() - arm.get_observation()["stamp"] < 0.4
    time.sleep(0.5)
    for call in (arm.get_observation, lambda: arm.send_action(action(START)), arm.hold):
        with pytest.raises(ConnectionError):
            call()
    fake.silent = False
    fake.settle()
    assert time.monotonic() - arm.get_observation()["stamp"] < 0.1  # the cable is back


def test_a_wall_clock_set_back_does_not_make_a_frozen_arm_look_fresh(pair, monkeypatch):
    fake, arm = pair
    arm.connect()
    fake.silent = True
    time.sleep(0.1)
    arm.get_observation()
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() - 3600)
    time.sleep(0.2)
    assert time.monotonic() - arm.get_observation()["stamp"] > 0.2


def test_bus_off_is_an_error(pair, monkeypatch):
    """The SDK would log and raise nothing."""
    _, arm = pair
    arm.connect()
    with monkeypatch.context() as patch:
        patch.setattr(
            type(arm._sdk.GetCanBus().send_bus), "state", property(lambda self: can.BusState.ERROR)
        )
        for call in (lambda: arm.send_action(action(START)), arm.hold, arm.emergency_stop):
            with pytest.raises(ConnectionError, match="bus off"):
                call()
        time.sleep(0.6)
        with pytest.raises(RuntimeError):
            arm.get_observation()


def test_a_full_queue_of_the_adapter_is_an_error(pair, monkeypatch):
    _, arm = pair
    arm.connect()

    def send(message, timeout=None):
        raise can.CanOperationError("No buffer space available")

    monkeypatch.setattr(arm._sdk.GetCanBus().send_bus, "send", send)
    with pytest.raises(ConnectionError, match="does not take frames"):
        arm.send_action(action(START))
    arm.get_observation()  # it can still be heard


@pytest.mark.parametrize(
    "status, word", [(1, "emergency stop"), (4, "limit"), (7, "collision"), (99, "unknown")]
)
def test_a_reported_fault_is_an_error(pair, status, word):
    fake, arm = pair
    arm.connect()
    fake.status = status
    fake.settle()
    for call in (arm.get_observation, lambda: arm.send_action(action(START))):
        with pytest.raises(RuntimeError, match=word):
            call()


def test_an_arm_taken_out_of_can_control_is_an_error(pair):
    fake, arm = pair
    arm.connect()
    fake.settle()
    fake.mode = 2  # the teach button
    fake.settle()
    with pytest.raises(RuntimeError, match="CAN control"):
        arm.get_observation()


def test_an_arm_in_a_fault_is_not_enabled(pair):
    fake, arm = pair
    fake.status = 1
    with pytest.raises(RuntimeError, match="emergency stop"):
        arm.connect()
    assert not arm.is_connected and not fake.sent(0x471)


def test_motors_that_do_not_enable_time_out(pair):
    fake, arm = pair
    fake.refuses, arm.timeout = True, 0.5
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="did not enable"):
        arm.connect()
    assert time.monotonic() - begin < 3 and not arm.is_connected


def test_an_arm_that_moves_before_its_motors_enable_is_told_to_stay_where_it_is_then(pair):
    fake, arm = pair
    enable, tries = fake.take, []

    def late(number, data):
        if number == 0x471:
            tries.append(number)
            if len(tries) == 3:
                fake.joints[0] = 30_000  # it sank, or somebody moved it
            fake.refuses = len(tries) < 12
        enable(number, data)

    fake.take = late
    arm.connect()
    asked = [struct.unpack(">ii", data)[0] for number, data in fake.log if number == 0x155]
    assert fake.enabled and asked[0] == 0 and asked[-1] == 30_000 and fake.joints[0] == 30_000


def test_crash_protection_that_did_not_reach_the_arm_is_an_error(pair, monkeypatch):
    from piper_sdk.hardware_port.can_encapsulation_v0_4_0 import C_STD_CAN

    fake, arm = pair
    send = C_STD_CAN.SendCanMessage
    monkeypatch.setattr(
        C_STD_CAN,
        "SendCanMessage",
        lambda self, number, *args, **options: (
            None if number == 0x47A else send(self, number, *args, **options)
        ),
    )
    with pytest.raises(ConnectionError, match="does not take frames"):
        arm.connect()
    assert not arm.is_connected and not fake.sent(0x47A)


def test_disconnecting_holds_and_never_cuts_the_power(pair):
    fake, arm = pair
    arm.connect()
    fake.settle()
    fake.joints[0] = 12_345  # where the arm really is
    fake.settle()
    arm.disconnect()
    assert struct.unpack(">ii", fake.sent(0x155)[-1])[0] == 12_345
    assert fake.enabled and not arm.is_connected and not [d for d in fake.sent(0x471) if d[1] != 2]
    with pytest.raises(ConnectionError, match="connect"):
        arm.get_observation()
    arm.disconnect()
    arm.connect()
    assert arm.get_observation()["joint_1.pos"] == pytest.approx(np.radians(12.345), abs=1e-6)


def test_power_is_cut_only_in_the_rest_pose(pair):
    fake, arm = pair
    arm.connect()
    with pytest.raises(UserError, match="fall"):
        arm.disconnect(release=True)
    assert arm.is_connected and fake.enabled
    arm.send_action(action([0.0] * 7))
    fake.settle()
    arm.disconnect(release=True)
    assert fake.sent(0x471)[-1][1] == 1 and not fake.enabled


def test_disconnecting_from_a_dead_bus_is_quiet(pair):
    fake, arm = pair
    arm.connect()
    fake.silent = True
    time.sleep(0.6)
    arm.disconnect()
    assert not arm.is_connected and fake.enabled


def test_the_emergency_stop(pair):
    fake, arm = pair
    arm.connect()
    arm.emergency_stop()
    assert fake.sent(0x150)[-1][0] == 1
    count = len(fake.sent(0x155))
    with pytest.raises(RuntimeError, match="emergency_stop"):
        arm.send_action(action(START))
    arm.disconnect()
    assert len(fake.sent(0x155)) == count and fake.enabled  # nothing is sent after it


def test_an_interrupt_while_connecting_closes_the_bus(pair, monkeypatch):
    fake, arm = pair

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(arm, "configure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        arm.connect()
    assert not arm.is_connected


def test_a_leader_is_read_from_a_can_of_its_own():
    channel = next(names)
    bus, leader = can.Bus(interface="virtual", channel=channel), PiperLeader(channel, bus="virtual")
    with pytest.raises(ConnectionError, match="connect"):
        leader.get_action()
    leader.connect()
    with pytest.raises(ConnectionError, match="silent"):
        leader.get_action()
    angles = (10_000, 90_000, -200_000, 0, -5000, 1)  # the third is beyond its range
    for i in range(3):
        bus.send(
            can.Message(
                arbitration_id=0x155 + i,
                data=struct.pack(">ii", *angles[2 * i : 2 * i + 2]),
                is_extended_id=False,
            )
        )
    bus.send(
        can.Message(
            arbitration_id=0x159, data=struct.pack(">ihBB", 50_000, 0, 1, 0), is_extended_id=False
        )
    )
    time.sleep(0.1)
    targets = leader.get_action()
    np.testing.assert_allclose(
        np.degrees([targets[key] for key in KEYS[:6]]), [10, 90, -170, 0, -5, 0.001]
    )
    assert targets["gripper.pos"] == pytest.approx(0.05)
    time.sleep(0.6)
    with pytest.raises(ConnectionError, match="silent"):
        leader.get_action()
    leader.disconnect()
    bus.shutdown()


def test_an_unknown_channel_is_named():
    with pytest.raises(ConnectionError, match="can7"):
        PiperArm("can7", timeout=0.2).connect()


# ---- cameras
@pytest.fixture
def video(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 15, (160, 120))
    picture = np.zeros((120, 160, 3), np.uint8)
    picture[:, 20:140] = (0, 0, 255)  # red, as OpenCV orders it
    for _ in range(3):
        writer.write(picture)
    writer.release()
    return path


def test_a_camera_delivers_the_middle_square_in_rgb_with_its_stamp(video):
    camera = Camera(video, size=32)
    with pytest.raises(ConnectionError, match="not open"):
        camera.read()
    camera.open()
    time.sleep(0.2)  # the film is over
    picture, stamp = camera.read()
    assert picture.shape == camera.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert picture[..., 0].min() > 200 and picture[..., 1:].max() < 60
    assert camera.read()[1] == stamp < time.monotonic() - 0.05  # a camera that stops grows old
    camera.close()
    with pytest.raises(ConnectionError):
        camera.read()


def test_a_camera_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.avi"):
        Camera(str(tmp_path / "absent.avi"), timeout=0.5).open()


def test_pictures_come_with_the_arms_observation(video):
    channel = next(names)
    fake, arm = (
        FakeArm(channel),
        PiperArm(channel, bus="virtual", timeout=10.0, wrist=video, size=32),
    )
    try:
        assert (
            arm.observation_features["wrist"] == (32, 32, 3)
            and "front" not in arm.observation_features
        )
        arm.connect()
        seen = arm.get_observation()
        assert set(seen) == set(arm.observation_features) and seen["wrist"].shape == (32, 32, 3)
    finally:
        arm.disconnect()
        fake.close()

"""AgileX Piper over CAN, and a second one that leads it by hand. Needs piper_sdk 0.6.2.

    sudo ip link set can0 up type can bitrate 1000000
    arm = PiperArm(channel="can0", front="/dev/video0", wrist="/dev/video2")
    arm.connect()                                         # enables the motors where the arm is
    arm.send_action({"joint_1.pos": 0.1, ..., "gripper.pos": 0.03})           # radians, metres
    arm.disconnect()                                      # the arm goes on holding

Firmware V1.5-2 or newer. Joint commands only, at half speed at most: the firmware's own IK
(EndPoseCtrl) flips and obeys no limit. The SDK fails silently in four ways, and each is caught
here: zeros before the first frame, the last pose for ever once the arm is quiet, commands into a
dead bus, joints beyond their range. Without power the arm falls, so only disconnect(release=True)
in the rest pose cuts it. Position control has no compliance: crash protection is on, and a
hardware emergency stop within reach is not optional.
Not here: workspace limits and speeds (guard.py), the loop (rig.py), the model (piper_model.py),
pictures (camera.py).
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from arms.camera import Camera
from arms.piper_model import KEYS, OPENING, TOOL, limits, piper_profile
from logbook import UserError

# Seconds without feedback until the arm counts as lost; younger state comes with its true stamp.
SILENCE = 0.5
REST_REACH = 0.1  # rad from the rest pose within which the power may be cut
STATUS = {
    1: "emergency stop",
    2: "no solution",
    3: "singularity",
    4: "target beyond a limit",
    5: "a joint is silent",
    6: "a brake is closed",
    7: "collision",
    8: "too fast while dragged",
    9: "a joint is faulty",
    10: "fault",
    11: "recording a teach-in",
    12: "replaying a teach-in",
    13: "a teach-in is paused",
    14: "controller too hot",
    15: "brake resistor too hot",
}


def open_sdk(channel: str, bus: str, dh_is_offset: int = 1):
    """Open the SDK's interface to a CAN channel and start reading.

    UserError without piper_sdk, ConnectionError without the bus.
    """
    try:
        from piper_sdk import C_PiperInterface_V2
    except ImportError as error:
        raise UserError(
            f"the Piper needs its SDK ({error}): pip install piper_sdk==0.6.2 python-can==4.6.1"
        ) from error
    # The SDK keeps one interface per channel for ever, and a used one cannot read again.
    C_PiperInterface_V2._instances.pop(channel, None)
    # The SDK's own clamps would also falsify what is measured: send_action clamps instead.
    sdk = C_PiperInterface_V2(
        channel,
        judge_flag=False,
        can_auto_init=False,
        dh_is_offset=dh_is_offset,
        start_sdk_joint_limit=False,
        start_sdk_gripper_limit=False,
    )
    try:
        sdk.CreateCanBus(
            channel, bustype=bus, expected_bitrate=1_000_000, judge_flag=bus == "socketcan"
        )
        sdk.ConnectPort(piper_init=True)
    except (ConnectionError, OSError, ValueError) as error:
        raise ConnectionError(
            f"cannot open CAN channel {channel} ({error}); is the adapter plugged in? sudo ip link "
            f"set {channel} up type can bitrate 1000000"
        ) from error
    return sdk


def wait_until(ready, seconds: float) -> bool:
    """Ask ready() until it is true or so many seconds have passed; return its last answer."""
    end = time.monotonic() + seconds
    done = ready()
    while not done and time.monotonic() < end:
        time.sleep(0.02)
        done = ready()
    return done


class Feed:
    """When messages of one kind arrived, by the monotonic clock: their own stamps are wall time."""

    def __init__(self):
        self.stamp = 0.0
        self.seen = 0.0

    def arrival(self, stamp: float) -> float:
        """Return when the message with this stamp arrived, in seconds of time.monotonic().

        Never later than the moment this stamp was first seen: the wall clock may be set back.
        0 where none ever came.
        """
        if not stamp:
            return 0.0
        now = time.monotonic()
        if stamp != self.stamp:
            self.stamp = stamp
            self.seen = now
        return min(self.seen, now - max(0.0, time.time() - stamp))


class PiperArm:
    """One Piper. Constructing it opens nothing.

    channel: CAN interface. bus: python-can's name of its kind. speed: percent, at most 50.
    crash_protection: 1 (least) to 8, of every joint. grip: N m. front, wrist: cameras, device or
    file. rest: joints (6,) in radians where the arm may lose its power. dh_is_offset, tool: see
    piper_profile.
    """

    name = "piper"

    def __init__(
        self,
        channel: str = "can0",
        bus: str = "socketcan",
        speed: int = 30,
        crash_protection: int = 5,
        grip: float = 1.0,
        front=None,
        wrist=None,
        size: int = 128,
        rest=(0.0,) * 6,
        dh_is_offset: int = 1,
        tool: float = TOOL,
        timeout: float = 5.0,
    ):
        if not 1 <= int(speed) <= 50:
            raise UserError(f"speed is 1 to 50 percent, got {speed}")
        if not 1 <= int(crash_protection) <= 8:
            raise UserError(f"crash_protection is 1 to 8, got {crash_protection}; it stays on")
        if not 0 <= float(grip) <= 5:
            raise UserError(f"grip is 0 to 5 N m, got {grip}")
        if isinstance(rest, str):  # 0,0.1,... on the command line
            rest = rest.split(",")
        self.channel = channel
        self.bus = bus
        self.speed = int(speed)
        self.crash_protection = int(crash_protection)
        self.grip = float(grip)
        self.timeout = float(timeout)
        self.dh_is_offset = int(dh_is_offset)
        self.rest = np.array(rest, dtype=np.float64)
        self.profile = piper_profile(self.dh_is_offset, float(tool), tuple(np.degrees(self.rest)))
        self._range = limits()
        sources = {"front": front, "wrist": wrist}
        self._cameras = {
            name: Camera(source, int(size))
            for name, source in sources.items()
            if source is not None
        }
        self._sdk = None
        self._stopped = False  # by emergency_stop
        self._ready = False  # enabled and under CAN control
        self._unsent = 0  # frames of a command that the bus did not take

    @property
    def observation_features(self) -> dict:
        stamps = [f"{name}.stamp" for name in self._cameras]
        pictures = {name: camera.shape for name, camera in self._cameras.items()}
        return dict.fromkeys((*KEYS, "stamp", *stamps), float) | pictures

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(KEYS, float)

    @property
    def is_connected(self) -> bool:
        return self._sdk is not None

    @property
    def is_calibrated(self) -> bool:
        return True  # the zero is stored in the motors

    def connect(self, calibrate: bool = True) -> None:
        """Open bus and cameras, wait for feedback, enable, hold. A failure leaves nothing open."""
        if self.is_connected:
            return
        self._feeds = (Feed(), Feed(), Feed())
        self._stopped = False
        self._ready = False
        self._opening = None  # metres, as last commanded
        self._sdk = open_sdk(self.channel, self.bus, self.dh_is_offset)
        self._watch_sends()
        try:
            if not wait_until(lambda: 0 < self._age() < SILENCE, self.timeout):
                raise ConnectionError(
                    f"no joint and gripper feedback on {self.channel} within {self.timeout:g} s: "
                    "is the arm powered, its cable plugged in, the bitrate 1000000?"
                )
            time.sleep(0.05)  # the joints come in three frames, the first of them sets the stamp
            for camera in self._cameras.values():
                camera.open()
            self.configure()
        except BaseException:
            self._close()
            raise

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Enable the motors where the arm is: that is the target before there is torque."""

        def enabled():
            self.hold()  # in every try: it may have sunk meanwhile
            return self._sdk.EnablePiper()

        self._check(ready=False)
        if not wait_until(enabled, self.timeout):
            raise ConnectionError(
                f"the motors did not enable within {self.timeout:g} s: release the emergency stop, "
                "look at the arm's light, power-cycle it while somebody holds it"
            )
        self._unsent = 0
        self._sdk.CrashProtectionConfig(*[self.crash_protection] * 6)
        self._refuse_unsent()
        self.hold()
        obeys = wait_until(lambda: self._sdk.GetArmStatus().arm_status.ctrl_mode == 1, self.timeout)
        if not obeys:
            raise ConnectionError(
                "the arm stays out of CAN control: end its teach mode, unplug a leader arm"
            )
        self._ready = True

    def get_observation(self) -> dict:
        """Return measured joints (rad), opening (m), `stamp` of the oldest message, and pictures.

        ConnectionError when the arm is lost, RuntimeError when it reports a fault.
        """
        self._check()
        observation = dict(zip(KEYS, self._measured().tolist(), strict=True))
        observation["stamp"] = time.monotonic() - self._age()
        for name, camera in self._cameras.items():
            picture, stamp = camera.read()
            observation[name] = picture
            observation[f"{name}.stamp"] = stamp
        return observation

    def send_action(self, action: dict) -> dict:
        """Send targets, clipped to the joint ranges and rounded to 0.001 degree; return them.

        ValueError, and nothing sent, for targets that are not finite.
        """
        target = np.array([action[key] for key in KEYS], dtype=np.float64)
        if not np.isfinite(target).all():
            raise ValueError(f"targets must be finite, got {action}")
        self._check()
        sent = self._command(target)
        self._opening = sent[6]
        return dict(zip(KEYS, sent.tolist(), strict=True))

    def hold(self) -> None:
        """Make the measured pose the target: the arm stops where it is and stays there.

        The gripper keeps its last commanded opening. At the measured one it would no longer press
        on what it holds, and drop it.
        """
        self._require()
        if not 0 < self._age() < SILENCE:
            raise ConnectionError("the arm's pose is unknown, so it cannot be told to stay there")
        self._refuse_teaching()  # somebody holds it: it must not stiffen in their hands
        target = self._measured()
        if self._opening is not None:
            target[6] = self._opening
        self._command(target)

    def emergency_stop(self) -> None:
        """Use the firmware's stop: the arm sinks, and only a power cycle brings it back."""
        self._require()
        self._stopped = True
        self._unsent = 0
        self._sdk.EmergencyStop(1)
        self._refuse_unsent()

    def disconnect(self, release: bool = False) -> None:
        """Hold and close; the motors stay on.

        release=True cuts their power, but only at the rest pose; elsewhere UserError, and the arm
        stays connected.
        """
        if not self.is_connected:
            return
        if release:
            self._check(ready=False)
            if np.abs(self._measured()[:6] - self.rest).max() > REST_REACH:
                raise UserError(
                    f"without power the arm would fall: move it to its rest pose {self.rest} first"
                )
            self._sdk.DisableArm(7)
        elif not self._stopped:
            with contextlib.suppress(
                Exception
            ):  # a dead bus: the arm holds its last target by itself
                self.hold()
        self._close()

    def _close(self) -> None:
        for camera in self._cameras.values():
            camera.close()
        sdk = self._sdk
        self._sdk = None
        self._ready = False
        with contextlib.suppress(Exception):
            sdk.DisconnectPort()

    def _command(self, target) -> np.ndarray:
        """Send a target (7,) and return what the frames said (7,).

        The speed goes along each time, because other programs may change it.
        """
        degrees = np.degrees(np.clip(target[:6], *self._range.T))
        joints = np.rint(degrees * 1000).astype(int).tolist()  # 0.001 degree
        opening = int(np.rint(np.clip(target[6], 0.0, OPENING) * 1e6))  # 0.001 mm
        self._unsent = 0
        self._sdk.ModeCtrl(0x01, 0x01, self.speed, 0x00)  # CAN control, joint move, no MIT
        self._sdk.JointCtrl(*joints)
        self._sdk.GripperCtrl(opening, int(self.grip * 1000), 0x01, 0x00)
        self._refuse_unsent()
        return np.append(np.radians(np.array(joints) / 1000), opening / 1e6)

    def _measured(self) -> np.ndarray:
        """Return the measured joints and opening, (7,)."""
        joints = angles_of(self._sdk.GetArmJointMsgs().joint_state)
        gripper = self._sdk.GetArmGripperMsgs().gripper_state
        return np.append(joints, gripper.grippers_angle / 1e6)

    def _age(self) -> float:
        """Return the seconds since the oldest of joints, gripper and status, or infinity."""
        sdk = self._sdk
        messages = (sdk.GetArmJointMsgs(), sdk.GetArmGripperMsgs(), sdk.GetArmStatus())
        oldest = oldest_arrival(self._feeds, messages)
        return max(time.monotonic() - oldest, 1e-9) if oldest else np.inf

    def _watch_sends(self) -> None:
        """Count the frames that the bus does not take: the SDK only logs them."""
        bus = self._sdk.GetCanBus()
        send = bus.SendCanMessage

        def watched(*args, **options):
            status = send(*args, **options)
            if status is not bus.CAN_STATUS.SEND_MESSAGE_SUCCESS:
                self._unsent += 1
            return status

        bus.SendCanMessage = watched
        self._unsent = 0

    def _refuse_unsent(self) -> None:
        if self._unsent:
            raise ConnectionError(
                f"the CAN bus {self.channel} does not take frames: cable, power, bus off? The arm "
                "holds the last target that reached it"
            )

    def _require(self) -> None:
        if not self.is_connected:
            raise ConnectionError("the Piper is not connected: call connect() first")

    def _check(self, ready: bool = True) -> None:
        self._require()
        if self._stopped:
            raise RuntimeError(
                "the Piper was stopped by emergency_stop(): power-cycle it while somebody holds it"
            )
        age = self._age()
        if not age < SILENCE:
            raise ConnectionError(
                f"no feedback from the Piper on {self.channel} for {age:.1f} s: cable, power, bus "
                "off? It holds its last target"
            )
        status = self._sdk.GetArmStatus().arm_status
        code = int(status.arm_status)
        if code:
            fault = STATUS.get(code, "an unknown fault")
            raise RuntimeError(
                f"the Piper reports {fault} (arm_status {code}): clear the cause, then connect "
                "again"
            )
        if ready:
            self._refuse_teaching()

    def _refuse_teaching(self) -> None:
        if self._ready and int(self._sdk.GetArmStatus().arm_status.ctrl_mode) != 1:
            raise RuntimeError(
                "the Piper left CAN control (teach button, a leader on the same bus?): connect "
                "again"
            )


class PiperLeader:
    """A second Piper in teach mode as a master (MasterSlaveConfig 0xFA), on a CAN of its own.

    What the hand that holds it does are the targets of another arm, through the Guard.
    Constructing it opens nothing.
    """

    def __init__(self, channel: str = "can1", bus: str = "socketcan"):
        self.channel = channel
        self.bus = bus
        self._sdk = None

    def connect(self, calibrate: bool = True) -> None:
        """Listen; a leader that is silent now may still speak when it is needed."""
        self._feeds = (Feed(), Feed())
        self._sdk = open_sdk(self.channel, self.bus)

    def get_action(self) -> dict:
        """Return joint targets (rad) and opening (m), inside the joint ranges.

        ConnectionError when the leader is silent.
        """
        if self._sdk is None:
            raise ConnectionError("the leader arm is not connected: call connect() first")
        joints = self._sdk.GetArmJointCtrl()
        gripper = self._sdk.GetArmGripperCtrl()
        oldest = oldest_arrival(self._feeds, (joints, gripper))
        if not oldest or time.monotonic() - oldest > SILENCE:
            raise ConnectionError(
                f"the leader arm on {self.channel} is silent: powered, and configured as a master?"
            )
        angles = np.clip(angles_of(joints.joint_ctrl), *limits().T)
        opening = np.clip(gripper.gripper_ctrl.grippers_angle / 1e6, 0.0, OPENING)
        return dict(zip(KEYS, [*angles.tolist(), float(opening)], strict=True))

    def disconnect(self) -> None:
        """Stop listening."""
        sdk = self._sdk
        self._sdk = None
        if sdk is not None:
            sdk.DisconnectPort()


def angles_of(message) -> np.ndarray:
    """Return the joints (6,) in radians of a message of the SDK, which counts in 0.001 degree."""
    return np.radians([getattr(message, f"joint_{i}") / 1000 for i in range(1, 7)])


def oldest_arrival(feeds, messages) -> float:
    """Return when the oldest of these messages arrived, by time.monotonic(); 0: never."""
    arrivals = [
        feed.arrival(message.time_stamp) for feed, message in zip(feeds, messages, strict=True)
    ]
    return min(arrivals)

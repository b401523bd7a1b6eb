"""
AgileX Piper over CAN, and a second one as the hand that leads it. Needs piper_sdk 0.6.2 and firmware V1.5-2 or newer.

    sudo ip link set can0 up type can bitrate 1000000
    arm = PiperArm(channel="can0", front="/dev/video0", wrist="/dev/video2")
    arm.connect()                                         # enables the motors and holds where the arm is
    arm.send_action({"joint_1.pos": 0.1, ..., "gripper.pos": 0.03})           # radians, metres
    arm.disconnect()                                      # it goes on holding; at rest, release=True cuts the power

Joint commands only, at no more than half speed: the firmware's own IK (EndPoseCtrl) flips and obeys no limit. The SDK
fails silently in four ways, each caught here: zeros before the first frame, the last pose for ever once the arm is
quiet, commands into a dead bus, joints beyond their range. Losing power lets the arm fall, so nothing here ever cuts it
but disconnect(release=True) in the rest pose. Position control has no compliance: crash protection is on, and a
hardware emergency stop in reach is not optional.
Not here: workspace limits, speeds, the loop (robot.py), kinematics (kinematics.py), pictures (camera.py).
"""
from __future__ import annotations

import contextlib
import time

import numpy as np

from arms.camera import Camera
from arms.kinematics import JOINTS, OPENING, Kinematics, limits
from logbook import UserError

KEYS = tuple(f"{name}.pos" for name in (*JOINTS, "gripper"))
SILENCE = 0.5  # seconds without feedback until the arm counts as lost; younger state is returned with its true stamp
STATUS = {1: "emergency stop", 2: "no solution", 3: "singularity", 4: "target beyond a limit", 5: "a joint is silent",
          6: "a brake is closed", 7: "collision", 8: "too fast while dragged", 9: "a joint is faulty", 10: "fault",
          11: "recording a teach-in", 12: "replaying a teach-in", 13: "a teach-in is paused", 14: "controller too hot",
          15: "brake resistor too hot"}


def open_sdk(channel: str, bus: str, dh_is_offset: int = 1):
    """The SDK's interface to a CAN channel, reading; UserError without piper_sdk, ConnectionError without the bus."""
    try:
        from piper_sdk import C_PiperInterface_V2
    except ImportError as error:
        raise UserError(f"the Piper needs its SDK ({error}): pip install piper_sdk==0.6.2 python-can==4.6.1") from error
    C_PiperInterface_V2._instances.pop(channel, None)  # one per channel for ever; a used one cannot read again
    # the SDK's own clamps would also falsify what is measured: send_action clamps instead
    sdk = C_PiperInterface_V2(channel, judge_flag=False, can_auto_init=False, dh_is_offset=dh_is_offset,
                              start_sdk_joint_limit=False, start_sdk_gripper_limit=False)
    try:
        sdk.CreateCanBus(channel, bustype=bus, expected_bitrate=1_000_000, judge_flag=bus == "socketcan")
        sdk.ConnectPort(piper_init=True)
    except (ConnectionError, OSError, ValueError) as error:
        raise ConnectionError(f"cannot open CAN channel {channel} ({error}); is the adapter plugged in? sudo ip link "
                              f"set {channel} up type can bitrate 1000000") from error
    return sdk


def _wait(ready, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := ready()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


class _Feed:
    """When messages arrived, by the monotonic clock: their stamps are wall time, which jumps."""

    def __init__(self):
        self.stamp, self.seen = 0.0, 0.0

    def arrival(self, stamp: float) -> float:
        """Message stamp -> seconds of time.monotonic(); never after the moment this stamp was first seen; 0: never."""
        if not stamp:
            return 0.0
        now = time.monotonic()
        if stamp != self.stamp:
            self.stamp, self.seen = stamp, now
        return min(self.seen, now - max(0.0, time.time() - stamp))


class PiperArm:
    """
    channel: CAN interface; bus: python-can's name of its kind; speed: percent, at most 50; crash_protection: 1 (least)
    to 8, of every joint; grip: N m; front, wrist: cameras, device or file; rest: joints (6,) where the arm may lose its
    power; dh_is_offset, tool: as in Kinematics. Constructing opens nothing.
    """

    name = "piper"

    def __init__(self, channel: str = "can0", bus: str = "socketcan", speed: int = 30, crash_protection: int = 5,
                 grip: float = 1.0, front=None, wrist=None, size: int = 128, rest=(0.0,) * 6, dh_is_offset: int = 1,
                 tool: float | None = None, timeout: float = 5.0):
        if not 1 <= int(speed) <= 50:
            raise UserError(f"speed is 1 to 50 percent, got {speed}")
        if not 1 <= int(crash_protection) <= 8:
            raise UserError(f"crash_protection is 1 to 8, got {crash_protection}; it stays on")
        if not 0 <= float(grip) <= 5:
            raise UserError(f"grip is 0 to 5 N m, got {grip}")
        self.channel, self.bus, self.speed, self.crash_protection = channel, bus, int(speed), int(crash_protection)
        self.grip, self.timeout, self.dh_is_offset = float(grip), float(timeout), int(dh_is_offset)
        self.rest = np.array(rest.split(",") if isinstance(rest, str) else rest, dtype=np.float64)  # 0,0.1,... as text
        self._range = limits()
        self.kinematics = Kinematics(self.dh_is_offset, *(() if tool is None else (float(tool),)))
        sources = {"front": front, "wrist": wrist}
        self._cameras = {name: Camera(source, int(size)) for name, source in sources.items() if source is not None}
        self._sdk, self._stopped, self._ready = None, False, False

    @property
    def observation_features(self) -> dict:
        floats = (*KEYS, "stamp", *(f"{name}.stamp" for name in self._cameras))
        return dict.fromkeys(floats, float) | {name: camera.shape for name, camera in self._cameras.items()}

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
        """Opens bus and cameras, waits for feedback, enables, holds. Whatever fails leaves nothing open."""
        if self.is_connected:
            return
        self._feeds, self._stopped, self._ready = (_Feed(), _Feed(), _Feed()), False, False
        self._opening = None  # metres, as last commanded
        self._sdk = open_sdk(self.channel, self.bus, self.dh_is_offset)
        self._watch_sends()
        try:
            if not _wait(lambda: 0 < self._age() < SILENCE, self.timeout):
                raise ConnectionError(f"no joint and gripper feedback on {self.channel} within {self.timeout:g} s: is "
                                      "the arm powered, its cable plugged in, the bitrate 1000000?")
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
        """Enables the motors where the arm is: the target is the measured pose before there is torque."""
        def enabled():
            self.hold()  # in every try: it may have sunk meanwhile
            return self._sdk.EnablePiper()

        self._check(ready=False)
        if not _wait(enabled, self.timeout):
            raise ConnectionError(f"the motors did not enable within {self.timeout:g} s: release the emergency stop, "
                                  "look at the arm's light, power-cycle it while somebody holds it")
        self._unsent = 0
        self._sdk.CrashProtectionConfig(*[self.crash_protection] * 6)
        self._refuse_unsent()
        self.hold()
        obeys = _wait(lambda: self._sdk.GetArmStatus().arm_status.ctrl_mode == 1, self.timeout)
        if not obeys:
            raise ConnectionError("the arm stays out of CAN control: end its teach mode, unplug a leader arm")
        self._ready = True

    def get_observation(self) -> dict:
        """Measured joints (rad), opening (m), `stamp` of the older of the two, pictures. Raises ConnectionError when
        the arm is lost, RuntimeError when it reports a fault."""
        self._check()
        observation = dict(zip((*KEYS, "stamp"), [*self._measured().tolist(), time.monotonic() - self._age()],
                               strict=True))
        for name, camera in self._cameras.items():
            observation[name], observation[f"{name}.stamp"] = camera.read()
        return observation

    def send_action(self, action: dict) -> dict:
        """Targets, clipped to the joint ranges and rounded to the wire's 0.001 degree; returned as they were sent."""
        target = np.array([action[key] for key in KEYS], dtype=np.float64)
        if not np.isfinite(target).all():
            raise ValueError(f"targets must be finite, got {action}")
        self._check()
        sent = self._command(target)
        self._opening = sent[6]
        return dict(zip(KEYS, sent.tolist(), strict=True))

    def hold(self) -> None:
        """
        The measured pose becomes the target: the arm stops where it is and stays there. The gripper keeps its last
        commanded opening: at the measured one it would no longer press on what it holds, and drop it.
        """
        self._require()
        if not 0 < self._age() < SILENCE:
            raise ConnectionError("the arm's pose is unknown, so it cannot be told to stay there")
        self._refuse_teaching()  # somebody holds it: it must not stiffen in their hands
        target = self._measured()
        target[6] = target[6] if self._opening is None else self._opening
        self._command(target)

    def emergency_stop(self) -> None:
        """The firmware's own: the arm stops and sinks slowly. Afterwards only a power cycle brings it back."""
        self._require()
        self._stopped, self._unsent = True, 0
        self._sdk.EmergencyStop(1)
        self._refuse_unsent()

    def disconnect(self, release: bool = False) -> None:
        """
        Holds and closes; the motors stay on. release=True cuts their power, only within 0.1 rad of the rest pose, else
        UserError and the arm stays connected.
        """
        if not self.is_connected:
            return
        if release:
            self._check(ready=False)
            if np.abs(self._measured()[:6] - self.rest).max() > 0.1:
                raise UserError(f"without power the arm would fall: move it to its rest pose {self.rest} first")
            self._sdk.DisableArm(7)
        elif not self._stopped:
            with contextlib.suppress(Exception):  # a dead bus: the arm holds its last target by itself
                self.hold()
        self._close()

    def _close(self) -> None:
        for camera in self._cameras.values():
            camera.close()
        sdk, self._sdk, self._ready = self._sdk, None, False
        with contextlib.suppress(Exception):
            sdk.DisconnectPort()

    def _command(self, target) -> np.ndarray:
        """target (7,) -> what the frames said (7,). The speed goes along each time: other programs may change it."""
        joints = np.rint(np.degrees(np.clip(target[:6], *self._range.T)) * 1000).astype(int).tolist()  # 0.001 degree
        opening = int(np.rint(np.clip(target[6], 0.0, OPENING) * 1e6))  # 0.001 mm
        self._unsent = 0
        self._sdk.ModeCtrl(0x01, 0x01, self.speed, 0x00)  # CAN control, joint move, no MIT
        self._sdk.JointCtrl(*joints)
        self._sdk.GripperCtrl(opening, int(self.grip * 1000), 0x01, 0x00)
        self._refuse_unsent()
        return np.append(np.radians(np.array(joints) / 1000), opening / 1e6)

    def _measured(self) -> np.ndarray:
        joints, gripper = self._sdk.GetArmJointMsgs().joint_state, self._sdk.GetArmGripperMsgs().gripper_state
        angles = [getattr(joints, f"joint_{i}") / 1000 for i in range(1, 7)]
        return np.append(np.radians(angles), gripper.grippers_angle / 1e6)

    def _age(self) -> float:
        """Seconds since the oldest of joints, gripper and status; infinite if one never came."""
        messages = (self._sdk.GetArmJointMsgs(), self._sdk.GetArmGripperMsgs(), self._sdk.GetArmStatus())
        arrivals = [feed.arrival(message.time_stamp) for feed, message in zip(self._feeds, messages, strict=True)]
        return max(time.monotonic() - min(arrivals), 1e-9) if min(arrivals) else np.inf

    def _watch_sends(self) -> None:
        """Counts the frames that the bus did not take: the SDK only logs them."""
        bus = self._sdk.GetCanBus()
        send = bus.SendCanMessage

        def watched(*args, **options):
            status = send(*args, **options)
            self._unsent += status is not bus.CAN_STATUS.SEND_MESSAGE_SUCCESS
            return status
        bus.SendCanMessage, self._unsent = watched, 0

    def _refuse_unsent(self) -> None:
        if self._unsent:
            raise ConnectionError(f"the CAN bus {self.channel} does not take frames: cable, power, bus off? The arm "
                                  "holds the last target that reached it")

    def _require(self) -> None:
        if not self.is_connected:
            raise ConnectionError("the Piper is not connected: call connect() first")

    def _check(self, ready: bool = True) -> None:
        self._require()
        if self._stopped:
            raise RuntimeError("the Piper was stopped by emergency_stop(): power-cycle it while somebody holds it")
        if not self._age() < SILENCE:
            raise ConnectionError(f"no feedback from the Piper on {self.channel} for {self._age():.1f} s: cable, "
                                  "power, bus off? It holds its last target")
        status = self._sdk.GetArmStatus().arm_status
        if int(status.arm_status):
            fault = STATUS.get(int(status.arm_status), "an unknown fault")
            raise RuntimeError(f"the Piper reports {fault} (arm_status {int(status.arm_status)}): clear the cause, "
                               "then connect again")
        if ready:
            self._refuse_teaching()

    def _refuse_teaching(self) -> None:
        if self._ready and int(self._sdk.GetArmStatus().arm_status.ctrl_mode) != 1:
            raise RuntimeError("the Piper left CAN control (teach button, a leader on the same bus?): connect again")


class PiperLeader:
    """
    A second Piper in teach mode as a master (MasterSlaveConfig 0xFA), on a CAN of its own: what its hand does are the
    targets of another arm, through robot.py's Guard. get_action raises ConnectionError when it is silent. Constructing
    opens nothing.
    """

    def __init__(self, channel: str = "can1", bus: str = "socketcan"):
        self.channel, self.bus, self._sdk = channel, bus, None

    def connect(self, calibrate: bool = True) -> None:
        """Listens; a leader that is silent now may still speak when it is needed."""
        self._feeds, self._sdk = (_Feed(), _Feed()), open_sdk(self.channel, self.bus)

    def get_action(self) -> dict:
        """Joint targets (rad) and opening (m), inside the joint ranges."""
        if self._sdk is None:
            raise ConnectionError("the leader arm is not connected: call connect() first")
        joints, gripper = self._sdk.GetArmJointCtrl(), self._sdk.GetArmGripperCtrl()
        arrivals = [feed.arrival(message.time_stamp)
                    for feed, message in zip(self._feeds, (joints, gripper), strict=True)]
        if not min(arrivals) or time.monotonic() - min(arrivals) > SILENCE:
            raise ConnectionError(f"the leader arm on {self.channel} is silent: powered, and configured as a master?")
        angles = np.radians([getattr(joints.joint_ctrl, f"joint_{i}") / 1000 for i in range(1, 7)])
        opening = np.clip(gripper.gripper_ctrl.grippers_angle / 1e6, 0.0, OPENING)
        return dict(zip(KEYS, [*np.clip(angles, *limits().T).tolist(), float(opening)], strict=True))

    def disconnect(self) -> None:
        sdk, self._sdk = self._sdk, None
        if sdk is not None:
            sdk.DisconnectPort()

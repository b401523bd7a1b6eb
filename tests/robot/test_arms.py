"""Arms: kinematics by plain numpy and the maker's SDK, the simulated arm, its expert, the encoder.

python -m pytest tests/robot/test_arms.py
"""

import itertools
import time

import numpy as np
import pytest
import torch

import arms
from arms import piper_model as kin
from arms.piper_model import KEYS, limits, mjcf, piper_profile
from arms.rotation import rotation_matrix, rotation_vector
from arms.sim import DOWN, OBJECT, RANGES, STARTS, SUBSTEPS, TABLE, SimArm
from arms.teleop import ScriptedExpert
from arms.vision import Encoder, ResNet10
from logbook import UserError


def dh_product(joints, dh_is_offset, tool):
    """The TCP's pose (4, 4) as a product of modified DH transforms, without MuJoCo."""
    pose = np.eye(4)
    for a, alpha, d, offset, joint in zip(
        (0, 0, 0.28503, -0.02198, 0, 0),
        (0, -90, 0, 90, -90, 90),
        (0.123, 0, 0, 0.25075, 0, 0.091),
        kin.TURN[dh_is_offset],
        joints,
        strict=True,
    ):
        angle, twist = joint + np.radians(offset), np.radians(alpha)
        (c, s), (ca, sa) = (np.cos(angle), np.sin(angle)), (np.cos(twist), np.sin(twist))
        pose = pose @ [
            [c, -s, 0, a],
            [s * ca, c * ca, -sa, -sa * d],
            [s * sa, c * sa, ca, ca * d],
            [0, 0, 0, 1],
        ]
    return pose @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, tool], [0, 0, 0, 1]]


def poses(count, seed=0):
    return np.random.default_rng(seed).uniform(*limits().T, (count, 6))


def action(joints, gripper=0.0):
    return dict(zip(KEYS, [*map(float, joints), float(gripper)], strict=True))


def simulated(**options):
    arm = SimArm(**{"realtime": False, "cameras": False} | options)
    arm.connect()
    return arm


# ---- kinematics
@pytest.mark.parametrize("dh_is_offset", [0, 1])
@pytest.mark.parametrize("tool", [0.0, kin.TOOL, 0.2])
def test_fk_is_the_product_of_the_dh_transforms(dh_is_offset, tool):
    kinematics = piper_profile(dh_is_offset, tool).kinematics()
    for joints in poses(100):
        position, rotation = kinematics.fk(joints)
        expected = dh_product(joints, dh_is_offset, tool)
        np.testing.assert_allclose(position, expected[:3, 3], rtol=0, atol=1e-9)
        np.testing.assert_allclose(rotation, expected[:3, :3], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dh_is_offset", [0, 1])
def test_fk_is_the_sdks(dh_is_offset):
    fk = pytest.importorskip("piper_sdk.kinematics.piper_fk").C_PiperForwardKinematics(dh_is_offset)
    kinematics = piper_profile(dh_is_offset, tool=0.0).kinematics()
    for joints in poses(100):
        np.testing.assert_allclose(
            kinematics.fk(joints)[0] * 1000, fk.CalFK(list(joints))[-1][:3], rtol=0, atol=1e-6
        )


def test_ik_follows_a_path_without_jumps():
    """Over the whole box of Pick Cube, tool down: below 1 um and 1e-6 rad, joints move like the
    tool.
    """
    kinematics, rng = piper_profile().kinematics(), np.random.default_rng(0)
    joints = kinematics.ik(STARTS["cube"], DOWN, np.radians([0, 100, -60, 0, 45, 0]))[0]
    place = np.array(STARTS["cube"])
    for _ in range(300):
        place = np.clip(place + rng.normal(0, 0.008, 3), (0.2, -0.2, -0.1), (0.38, 0.2, 0.05))
        new, position_error, rotation_error = kinematics.ik(place, DOWN, joints)
        assert position_error < 1e-6 and rotation_error < 1e-6 and np.abs(new - joints).max() < 0.4
        np.testing.assert_allclose(kinematics.fk(new)[0], place, atol=2e-6)
        joints = new


def test_ik_stays_inside_the_limits_and_says_how_far_it_got():
    kinematics, (low, high) = piper_profile().kinematics(), limits().T
    for target, start in zip(poses(60, 1), poses(60, 2), strict=True):
        position, rotation = kinematics.fk(target)
        joints, position_error, rotation_error = kinematics.ik(position * 1.5, rotation, start)
        assert (joints >= low).all() and (joints <= high).all()
        here, turn = kinematics.fk(joints)
        assert position_error == pytest.approx(np.linalg.norm(position * 1.5 - here), abs=1e-9)
        assert rotation_error == pytest.approx(
            np.linalg.norm(rotation_vector(rotation @ turn.T)), abs=1e-6
        )
    assert kinematics.ik((3.0, 0, 0), DOWN, start)[1] > 2


@pytest.mark.parametrize(
    "call",
    [
        lambda k: k.fk(np.full(6, np.nan)),
        lambda k: k.fk(np.zeros(7)),
        lambda k: k.ik((np.inf, 0, 0), DOWN, np.zeros(6)),
        lambda k: mjcf(dh_is_offset=2),
    ],
)
def test_kinematics_refuses_what_is_no_pose(call):
    with pytest.raises(ValueError):
        call(piper_profile().kinematics())


def test_limits_are_the_makers():
    np.testing.assert_allclose(
        np.degrees(limits()),
        [(-150, 150), (0, 180), (-170, 0), (-100, 100), (-70, 70), (-120, 120)],
    )


# ---- make
@pytest.mark.parametrize(
    "name, options, said",
    [
        ("sym", {}, "sim, piper"),
        ("nowhere.at.all:Arm", {}, "nowhere"),
        ("logbook:Arm", {}, "no class"),
        (":Arm", {}, "import"),
        ("sim", {"colour": "red"}, "colour"),
        ("sim", {"task": "juggle"}, "peg, cube"),
        ("sim", {"clearance": -1}, "clearance"),
        ("logbook:Clock", {}, "lacks observation_features"),
        ("piper", {"speed": 80}, "50"),
        ("piper", {"crash_protection": 0}, "1 to 8"),
    ],
)
def test_make_says_what_is_wrong(name, options, said):
    with pytest.raises(UserError, match=said):
        arms.make(name, **options)


def test_make_takes_any_class_with_the_ten_members():
    assert isinstance(arms.make("arms.sim:SimArm", cameras=False), SimArm)
    assert all(hasattr(arms.make("sim", cameras=False), member) for member in arms.PROTOCOL)


def test_the_piper_without_its_sdk_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "piper_sdk", None)
    with pytest.raises(UserError, match="pip install piper_sdk"):
        arms.make("piper").connect()


# ---- the simulated arm
def test_features_are_known_before_connecting_and_match_what_comes():
    arm = SimArm(cameras=False, realtime=False)
    observed, acted = arm.observation_features, arm.action_features
    assert set(acted) == set(KEYS) and {*KEYS, *OBJECT, "stamp"} == set(observed)
    for call in (arm.get_observation, lambda: arm.send_action(action(arm.home))):
        with pytest.raises(ConnectionError, match="connect"):
            call()
    arm.connect()
    assert arm.is_connected and arm.is_calibrated and set(arm.get_observation()) == set(observed)
    assert all(type(value) is float for value in arm.get_observation().values())
    arm.disconnect()
    assert not arm.is_connected
    with pytest.raises(ConnectionError):
        arm.get_observation()


def test_send_action_returns_what_was_sent_and_moves_there():
    arm = simulated(task="cube")
    goal = arm.home + [0.1, 0.05, -0.05, 0.2, -0.1, 0.3]
    for _ in range(20):
        sent = arm.send_action(action(goal, 0.02))
    assert sent == action(goal, 0.02)
    seen = arm.get_observation()
    np.testing.assert_allclose([seen[key] for key in KEYS], [*goal, 0.02], atol=2e-3)
    sent = arm.send_action(action(np.full(6, 10.0), 1.0))
    np.testing.assert_allclose([sent[key] for key in KEYS], [*limits()[:, 1], kin.OPENING])
    np.testing.assert_allclose(arm.target, [sent[key] for key in KEYS])


def test_a_target_that_is_not_finite_moves_nothing():
    arm = simulated()
    before = arm.target
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            arm.send_action(action([*arm.home[:5], bad]))
    with pytest.raises(KeyError):
        arm.send_action({"joint_1.pos": 0.0})
    np.testing.assert_array_equal(arm.target, before)


def test_the_fingers_hold_the_peg_whatever_is_commanded():
    assert simulated().send_action(action(np.zeros(6), 0.07))["gripper.pos"] == pytest.approx(0.016)


@pytest.mark.parametrize("task", RANGES)
def test_same_seed_same_actions_same_trajectory_bitwise(task):
    def play(arm):
        arm.reset(3)
        rng, states = np.random.default_rng(0), []
        for _ in range(25):
            arm.send_action(action(arm.home + rng.normal(0, 0.2, 6), rng.uniform(0, 0.07)))
            states.append([arm.observe()[key] for key in (*KEYS, *OBJECT)])
        return np.array(states)

    used, fresh = simulated(task=task, seed=1), simulated(task=task, seed=2)
    first = play(used)
    used.reset(9)
    used.send_action(action(np.zeros(6)))
    np.testing.assert_array_equal(first, play(used))
    np.testing.assert_array_equal(first, play(fresh))
    fresh.reset(4)
    assert fresh.observe()["object.x"] != first[0, 7]


@pytest.mark.parametrize("task", RANGES)
def test_objects_start_all_over_table_iiis_ranges(task):
    arm = simulated(task=task)
    places = []
    for seed in range(200):
        arm.reset(seed)
        places.append([arm.observe()["object.x"], arm.observe()["object.y"]])
    spread = np.ptp(places, axis=0)
    assert (spread <= RANGES[task]).all() and (spread > 0.9 * np.array(RANGES[task])).all()
    np.testing.assert_allclose(np.mean(places, axis=0), STARTS[task][:2], atol=0.02)


@pytest.mark.parametrize("task", RANGES)
def test_hostile_targets_do_not_explode_the_physics(task):
    arm, rng = simulated(task=task), np.random.default_rng(0)
    for _ in range(150):
        arm.send_action(action(rng.uniform(*limits().T), rng.uniform(0, 0.07)))
        assert np.abs(arm._data.qvel[:6]).max() < 5
    assert not any(warning.number for warning in arm._data.warning)


def test_the_peg_stops_on_the_rim_and_goes_through_the_hole():
    """Pressed 2 cm down beside the hole the tip stays on the rim; over the hole it goes in and
    counts.
    """
    for beside, inside in ((0.006, False), (0.0, True)):
        arm = simulated()
        arm.reset(0)
        hole = np.array([arm.observe()[key] for key in OBJECT[:3]])
        joints = arm.home
        for height in np.linspace(0.02, -0.025, 30):
            assert not arm.success() or height < -0.015
            joints = arm.kinematics.ik(hole + [beside, 0, 0.04 + height], DOWN, joints)[0]
            arm.send_action(action(joints))
        tip = arm.kinematics.fk([arm.observe()[key] for key in KEYS[:6]])[0][2] - 0.04
        assert (
            arm.success() == inside and (tip - hole[2] < -0.02) == inside and tip - hole[2] > -0.03
        )


def test_a_peg_as_deep_beside_the_socket_is_no_success():
    arm = simulated()
    arm.reset(0)
    hole = np.array([arm.observe()[key] for key in OBJECT[:3]])
    arm._data.qpos[:6] = arm.kinematics.ik(hole + [-0.06, 0, 0.015], DOWN, arm.home)[0]
    arm._mujoco.mj_forward(arm._model, arm._data)
    assert arm._data.site("tcp").xpos[2] - 0.04 < hole[2] - 0.02 and not arm.success()


def test_success_of_the_cube_is_its_height():
    arm = simulated(task="cube")
    arm.reset(0)
    for height, lifted in ((0.02, False), (0.099, False), (0.101, True)):
        arm._data.qpos[10] = TABLE + height
        arm._mujoco.mj_forward(arm._model, arm._data)
        assert arm.success() == lifted


@pytest.mark.realtime
def test_real_time_follows_the_clock():
    arm = simulated(realtime=True)
    goal = arm.home + [0.6, 0, 0, 0, 0, 0]
    begin, arm._clock = time.monotonic(), time.monotonic()
    arm.send_action(action(goal))
    assert abs(arm.get_observation()["joint_1.pos"]) < 0.1  # nothing moves before time has passed
    time.sleep(0.2)
    arm.get_observation()
    took = time.monotonic() - begin
    assert arm._data.time == pytest.approx(took, abs=0.02)
    arm._clock -= 100.0  # a suspended computer: no long catching up
    arm.get_observation()
    assert arm._data.time < took + 1.0


def test_without_real_time_an_action_is_one_period():
    arm = simulated()
    for _ in range(3):
        arm.get_observation()
        arm.send_action(action(arm.home))
    assert arm._data.time == pytest.approx(3 / 15) and SUBSTEPS == 32


def test_faults():
    arm = simulated()
    first = arm.get_observation()
    arm.freeze_state()
    arm.send_action(action(arm.home + 0.05))
    assert arm.get_observation() == first
    arm.freeze_state(False)
    later = arm.get_observation()
    assert later["stamp"] > first["stamp"] and later["joint_1.pos"] != first["joint_1.pos"]
    arm.unplug()
    for call in (arm.get_observation, lambda: arm.send_action(action(arm.home))):
        with pytest.raises(ConnectionError, match="unplugged"):
            call()
    arm.unplug(False)
    arm.freeze_state()
    arm.reset(0)
    assert arm.get_observation()["stamp"] > later["stamp"]  # a reset clears the faults


def test_frozen_cameras_keep_picture_and_stamp(monkeypatch):
    """The bookkeeping of cameras, without OpenGL."""
    arm, drawn = simulated(), itertools.count()
    arm._cameras = ("front", "wrist")
    picture = lambda: np.full((128, 128, 3), next(drawn), np.uint8)  # noqa: E731
    monkeypatch.setattr(
        arm,
        "_draw",
        lambda: {
            "front": picture(),
            "wrist": picture(),
            "front.stamp": time.monotonic(),
            "wrist.stamp": time.monotonic(),
        },
    )
    assert arm.observation_features["wrist"] == (128, 128, 3)
    first = arm.get_observation()
    assert (
        set(first) == set(arm.observation_features)
        and (arm.get_observation()["front"] != first["front"]).all()
    )
    arm.freeze_cameras()
    frozen = arm.get_observation()
    frozen["front"] += 1  # a reader's own copy
    again = arm.get_observation()
    assert (again["front"] != frozen["front"]).all() and again["front.stamp"] == frozen[
        "front.stamp"
    ]
    assert again["stamp"] > frozen["stamp"]


def test_pictures_show_both_views_where_opengl_works():
    from arms.sim import can_draw

    if not can_draw():
        pytest.skip("no OpenGL here")
    arm = simulated(cameras=True, size=64)
    seen = arm.get_observation()
    for name in ("front", "wrist"):
        assert (
            seen[name].shape == (64, 64, 3)
            and seen[name].dtype == np.uint8
            and seen[name].std() > 5
        )
    arm.disconnect()


# ---- the expert
@pytest.mark.parametrize("task", RANGES)
def test_the_expert_succeeds_in_time_and_differs_between_episodes(task):
    arm, lengths = simulated(task=task), []
    expert = ScriptedExpert(arm, seed=0)
    for seed in range(15):
        arm.reset(500 + seed)
        for step in range(200):
            before = arm.kinematics.fk(arm.target[:6])[0]
            targets = expert.get_action()
            assert set(targets) == set(KEYS)
            arm.send_action(targets)
            assert np.linalg.norm(arm.kinematics.fk(arm.target[:6])[0] - before) < 0.02
            if arm.success():
                lengths.append(step)
                break
    assert len(lengths) >= 14 and len(set(lengths)) > 5


def test_the_expert_is_repeatable_and_perfect_without_noise():
    def play(noise):
        arm = simulated()
        expert, tips = ScriptedExpert(arm, noise=noise, seed=1), []
        arm.reset(5)
        while not arm.success():
            arm.send_action(expert.get_action())
            tips.append(arm.target)
        return np.array(tips), expert.attempts

    np.testing.assert_array_equal(play(1.0)[0], play(1.0)[0])
    perfect, attempts = play(0.0)
    assert attempts == 1 and len(perfect) < 60


def test_the_expert_recovers_when_somebody_else_moved_the_arm():
    arm = simulated()
    expert = ScriptedExpert(arm, seed=3)
    arm.reset(1)
    for _ in range(5):
        arm.send_action(expert.get_action())
    joints = arm.target[:6]
    for _ in range(10):
        joints = arm.kinematics.ik(
            arm.kinematics.fk(joints)[0] + [0.0, 0.008, 0.002], DOWN, joints
        )[0]
        arm.send_action(action(joints))
    before = expert.attempts
    for _ in range(150):
        arm.send_action(expert.get_action())
        if arm.success():
            break
    assert arm.success() and expert.attempts > before


def test_a_rotation_vector_turns_about_the_base_frames_axes():
    turn = rotation_matrix([0.0, 0.0, 0.3])
    np.testing.assert_allclose(turn[:2, 0], [np.cos(0.3), np.sin(0.3)], atol=1e-12)
    np.testing.assert_allclose(
        rotation_vector(rotation_matrix([0.1, -0.2, 0.05])), [0.1, -0.2, 0.05], atol=1e-9
    )


# ---- the vision encoder
def pictures(batch=2, views=2, size=32, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (batch, views, size, size, 3), dtype=np.uint8
    )


def test_features_have_a_shape_and_are_always_the_same(capsys):
    one, other = Encoder(), Encoder()
    assert "warning" in capsys.readouterr().err
    batch = pictures()
    features = one.features(batch)
    assert (
        features.shape == (2, 1024)
        and features.dtype == torch.float32
        and not features.requires_grad
    )
    assert (
        torch.equal(features, other.features(torch.from_numpy(batch)))
        and torch.isfinite(features).all()
    )
    torch.testing.assert_close(
        one.features({"front": batch[1, 0], "wrist": batch[1, 1]}), features[1:]
    )
    torch.testing.assert_close(one.features(batch[:, :1]), features[:, :512])
    assert features.std() > 0.05 and (features[0] - features[1]).abs().mean() > 0.01


def test_the_encoder_is_frozen_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    encoder = Encoder()
    assert torch.equal(torch.rand(3), expected)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.features(pictures())
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert 4.8e6 < sum(weight.numel() for weight in encoder.parameters()) < 5.0e6


def test_weights_come_from_a_file(tmp_path, capsys):
    torch.manual_seed(1)
    net = ResNet10()
    torch.save(net.state_dict() | {"fc.weight": torch.zeros(5, 512)}, tmp_path / "net.pt")
    encoder = Encoder(tmp_path / "net.pt")
    assert capsys.readouterr().err == ""
    assert not torch.equal(encoder.features(pictures()), Encoder().features(pictures()))
    encoder.save(tmp_path / "again.pt")
    again = Encoder(tmp_path / "again.pt")
    assert torch.equal(again.features(pictures()), encoder.features(pictures()))
    torch.save(net.state_dict() | {"bn1.running_mean": torch.ones(64)}, tmp_path / "other.pt")
    names = [
        *again.sizes(["front"]),
        *Encoder(tmp_path / "other.pt").sizes(["front"]),
        *Encoder().sizes(["front"]),
    ]
    assert (
        list(encoder.sizes(["front"])) == names[:1] and len(set(names)) == 3
    )  # columns of episodes: never mixed


def test_weights_that_cannot_be_saved_leave_the_old_file(tmp_path, monkeypatch):
    (encoder := Encoder()).save(tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()

    def fail(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        encoder.save(tmp_path / "net.pt")
    assert (tmp_path / "net.pt").read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


class Trap:
    """A file with it, read carelessly, leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="trap.pt"):
        Encoder(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_wrong_files_are_refused_by_name(tmp_path):
    state = ResNet10().state_dict()
    cases = {
        "junk.pt": b"not a file of weights",
        "list.pt": [torch.zeros(3)],
        "numbers.pt": {0: torch.zeros(3)},
        "short.pt": {name: value for name, value in state.items() if "layer4" not in name},
        "nan.pt": state | {"bn1.weight": torch.full((64,), torch.nan)},
    }
    for name, content in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
    for name in (*cases, "absent.pt"):
        with pytest.raises(UserError, match=name):
            Encoder(tmp_path / name)


@pytest.mark.parametrize(
    "wrong", [pictures()[0], pictures().astype(np.float32), pictures().transpose(0, 1, 4, 2, 3)]
)
def test_the_encoder_refuses_other_shapes_and_types(wrong):
    with pytest.raises(ValueError, match="uint8"):
        Encoder().features(wrong)

"""What is left out of OGBench's steps, and its control law written out, change no bit of what it computes."""
import numpy as np
import pytest

import envs
from demos import control, ogbench

pytest.importorskip("ogbench")
pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore:.*precision lowered")]


class OwnWay(ogbench.PlayEnv):
    """OGBench as it comes."""

    def _read_state_once_per_step(self):
        self.simulator.forget = lambda: None

    def _save_time(self):
        self.simulator._model.vis.global_.bvactive = 1


@pytest.mark.parametrize("task", ["cube-triple", "scene", "puzzle-3x3"])
def test_play_is_ogbenchs_own_to_the_last_bit(task):
    ours, own, rng = ogbench.PlayEnv(envs.TASKS[task]), OwnWay(envs.TASKS[task]), np.random.default_rng(0)
    touched = []
    for seed in range(3):
        observations = []
        for env in (ours, own):
            np.random.seed(seed)
            observations.append(env.reset(seed=seed)[0])
        for step in range(60):
            assert np.array_equal(*observations), (seed, step)
            if step % 15 == 0:  # far enough to leave the workspace; now and then an angle of next to nothing
                action = rng.uniform(-1, 1, 5) * rng.choice([1.0, 1e-7], 5, p=[0.7, 0.3])
                action[2] = (-1, 1, -0.2)[seed]
            observations = [env.step(action)[0] for env in (ours, own)]
            for name in ("qpos", "qvel", "ctrl", "qfrc_constraint"):
                assert np.array_equal(*(getattr(env.simulator._data, name) for env in (ours, own))), (seed, step, name)
            touched.append(ours.simulator._data.ncon)
    assert max(touched) > min(touched)  # it also pressed on something
    assert "set_control" in vars(ours.simulator) and "set_control" not in vars(own.simulator)
    assert (ours.simulator._model.vis.global_.bvactive, own.simulator._model.vis.global_.bvactive) == (0, 1)
    for env, paints in (ours, False), (own, True):
        kind = "cube" if task.startswith("cube") else "button"
        assert any(map(len, getattr(env.simulator, f"_{kind}_geom_ids_list"))) == paints
    ours.close(), own.close()


@pytest.mark.parametrize("distance", [0.0, 1e-5, 0.02, 1.5])
def test_joints_are_ogbenchs_own(distance):
    """Reached at once, after some iterations, or never: far away the largest turn and the last iteration count."""
    env = ogbench.PlayEnv(envs.TASKS["cube-double"])
    env.reset(seed=0)
    simulator, rng = env.simulator, np.random.default_rng(1)
    simulator._ik._max_angle_change = np.radians(20)
    solve, joints = control._inverse_kinematics(simulator._ik), simulator._data.qpos[simulator._arm_joint_ids].copy()
    position, matrix = (getattr(simulator._data, name)[simulator._attach_site_id].copy()
                        for name in ("site_xpos", "site_xmat"))
    for _ in range(20):
        aim = position + distance * rng.uniform(-1, 1, 3)
        turned = simulator._effector_down_rotation.from_matrix(matrix.reshape(3, 3)).wxyz
        own = simulator._ik.solve(pos=aim, quat=turned, curr_qpos=joints)
        assert np.array_equal(own, solve(aim, turned, joints))
        assert np.array_equal(own, joints) == (distance < 1e-4)
    env.close()


def test_rotations_are_ogbenchs_own():
    from ogbench.manipspace.lie import SO3

    rng = np.random.default_rng(0)
    for angle in (0.0, 1e-6, -9.9e-6, 1e-5, 0.3, -np.pi, *rng.uniform(-7, 7, 200)):
        other, third = SO3(rng.normal(size=4)), SO3(rng.normal(size=4))
        assert np.array_equal(SO3.from_z_radians(angle).wxyz, control._about_z(angle))
        assert np.array_equal((other @ third).wxyz, control._times(other.wxyz.tolist(), third.wxyz.tolist()))
        assert np.array_equal(other.inverse().wxyz, control._inverse(other.wxyz.tolist()))
        assert other.compute_yaw_radians() == control._yaw(other.wxyz.tolist())

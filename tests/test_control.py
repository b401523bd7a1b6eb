"""What is left out of OGBench's steps, and what of them is written out, change no bit of what it computes."""
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


@pytest.mark.parametrize("task", ["cube-triple", "scene", "puzzle-3x3"])
def test_a_step_without_looking_is_a_step_and_what_is_seen_is_ogbenchs_own_reading(task):
    """Along play, so that buttons get pressed and something is touched, against simulator.step() in a second world."""
    task = envs.TASKS[task]
    ours, own = ogbench.PlayEnv(task), OwnWay(task)
    ours.reset(seed=3), own.reset(seed=3)
    oracles, info, oracle = ogbench._make_oracles(task, ours.simulator), ours.simulator.compute_ob_info(), None
    kept, observations, touched = [], [], []
    np.random.seed(0)
    for _ in range(75):
        seen = control.look(ours.simulator, task)
        if oracle is None:
            oracle = oracles["button" if task.goal.buttons else "cube"]
            oracle.reset(None, info)
        action = np.clip(oracle.select_action(None, seen), -1, 1)
        info = own.simulator.compute_ob_info()
        assert all(np.array_equal(seen[key], info[key]) for key in seen if key != "contact")
        assert np.array_equal(oracle.select_action(None, info), oracle.select_action(None, seen))
        kept.append(seen), observations.append(own.simulator.compute_observation())
        touched.append(info["proprio/gripper_contact"][0])
        control.advance(ours.simulator, action, seen), own.simulator.step(action)
    columns = {key: np.array([seen[key] for seen in kept]) for key in seen if not key.startswith("privileged")}
    assert np.array_equal(control.observe(task, columns), observations)
    assert max(touched) > 0 and (not task.goal.buttons or np.ptp(columns["button_states"], axis=0).any())
    ours.close(), own.close()


@pytest.mark.parametrize("task", ["cube-double", "scene"])
def test_plans_are_ogbenchs_own(task):
    from ogbench.manipspace.oracles.plan.plan_oracle import PlanOracle

    env, told = ogbench.PlayEnv(envs.TASKS[task]), []
    for seed in range(4):
        env.reset(seed=seed)
        info = env.simulator.compute_ob_info()
        kinds = ["button", "drawer", "window"] if task == "scene" else []
        for kind, oracle in ogbench._make_oracles(envs.TASKS[task], env.simulator).items():
            if kind not in ("cube", *kinds):
                continue
            oracle._noise = (0.1, 0.4)[seed % 2]
            np.random.seed(seed)
            oracle.reset(None, info)
            ours, after = oracle._plan, np.random.rand()
            del oracle.compute_plan  # the class's own again
            np.random.seed(seed)
            oracle.reset(None, info)
            assert np.array_equal(ours, oracle._plan) and after == np.random.rand(), (seed, kind)
            assert type(oracle).compute_plan is PlanOracle.compute_plan
            told.append(kind)
    assert len(told) == 4 * (1 + len(kinds))
    env.close()


def test_a_cubes_turn_is_ogbenchs_own_to_the_last_bit():
    """numpy squares a number and an array of numbers differently, which shows when a cube stands on its edge."""
    from ogbench.manipspace.lie import SO3

    task, rows = envs.TASKS["cube-double"], np.random.default_rng(0).normal(size=(3000, 28))
    seen = {"qpos": rows, "qvel": rows[:, :26], "proprio/effector_pos": rows[:, :3]}
    seen |= dict.fromkeys(("proprio/effector_yaw", "proprio/gripper_opening", "contact"), rows[:, :1])
    observed = control.observe(task, seen)
    for i in range(2):
        yaws = np.array([[SO3(row).compute_yaw_radians()] for row in rows[:, 17 + 7 * i : 21 + 7 * i]])
        own = np.concatenate([[np.cos(yaw), np.sin(yaw)] for yaw in yaws], axis=1).T
        assert np.array_equal(observed[:, 26 + 9 * i : 28 + 9 * i], own)

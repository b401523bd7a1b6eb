"""robosuite's Lift, Can and Square with robomimic's low-dimensional observation, at 495 steps/s.

    from simulators import make
    env = make(task)                                  # robomimic's world: Panda, OSC_POSE, 20 Hz
    env = make(task, env_args=json_of_a_data_file)    # the world a file was recorded in

Two patches make a step twice as fast and change no bit of it: sensors are read once per action
instead of once per physics step, and the controller reads MuJoCo's arrays directly.
What robosuite draws while it builds a model, such as the size of Lift's cube, is fixed. Positions,
angles and the arm's first pose are the seed's.
Not here: rewards (envs.py).
"""

import logging
from typing import Any

import numpy as np

from .base import SimulatorEnv, import_simulator


class RobosuiteEnv(SimulatorEnv):
    """A robosuite task; env_args is the JSON of a robomimic file, None for robomimic's world."""

    patched = True  # False: robosuite as it comes, to compare with

    def _build(self, render, env_args):
        robosuite = import_simulator("robosuite", render)
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        if env_args is None:
            env_args = self._robomimic_world(robosuite)
        self._check_origin(env_args, robosuite.__version__)
        kwargs = env_args["env_kwargs"] | {
            "has_renderer": False,
            "has_offscreen_renderer": render,
            "use_camera_obs": False,
            "use_object_obs": True,
            "reward_shaping": False,
            "ignore_done": True,
            "hard_reset": False,  # a hard reset rebuilds the model: 0.15 s instead of 1 ms
            "seed": 0,  # of the model only (see the header); reset() seeds the episodes
        }
        try:
            self.simulator = robosuite.make(self.task.env_name, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"robosuite {robosuite.__version__} does not take these env_args: {error}"
            ) from error
        self.env_args = {
            "env_name": self.task.env_name,
            "type": 1,
            "env_version": robosuite.__version__,
            "env_kwargs": kwargs,
        }
        if self.patched:
            # For a viewer MuJoCo clears a byte per bounding volume at each physics step, 370 kB.
            self.simulator.sim.model._model.vis.global_.bvactive = 0
            read_sensors_once_per_action(self.simulator, self.task.obs_keys)

    def _robomimic_world(self, robosuite) -> dict[str, Any]:
        body = robosuite.load_composite_controller_config(controller="BASIC")["body_parts"]["right"]
        right = {**body, "input_ref_frame": "world"}
        controller = {"type": "BASIC", "body_parts": {"right": right}}
        kwargs = {"robots": "Panda", "controller_configs": controller, "control_freq": 20}
        return {
            "env_name": self.task.env_name,
            "env_version": robosuite.__version__,
            "type": 1,
            "env_kwargs": kwargs,
        }

    def _check_origin(self, env_args, version):
        """Refuse settings of another task, or of a version whose controllers differ."""
        name = env_args.get("env_name")
        if name != self.task.env_name:
            raise ValueError(
                f"task '{self.task.name}' is {self.task.env_name}, these env_args are for {name}"
            )
        recorded = str(env_args.get("env_version", ""))
        if recorded.split(".")[:2] != version.split(".")[:2]:
            raise ValueError(
                f"the data was recorded with robosuite {recorded or 'unknown'}, installed is "
                f"{version}; the controllers differ: pip install robosuite=={recorded or version}"
            )

    def _observation(self, readings: dict) -> np.ndarray:
        keys = ("object-state" if key == "object" else key for key in self.task.obs_keys)
        return np.concatenate([readings[key] for key in keys]).astype(np.float32)  # (D,)

    def _reset(self, seed):
        generator = np.random.default_rng(seed)
        self.simulator.rng = generator  # draws the arm's first pose
        placement = self.simulator.placement_initializer
        placement.rng = generator
        if "samplers" in vars(placement):  # of several objects, each with its own reference
            for sampler in placement.samplers.values():
                sampler.rng = generator
        readings = self.simulator.reset()
        if self.patched:
            read_arm_directly(self.simulator)
        return self._observation(readings)

    def _advance(self, action):
        self.simulator.step(action)
        readings = self.simulator._get_observations(force_update=True)
        return self._observation(readings), np.array([self.simulator._check_success()], bool)

    def _draw(self):
        return self.simulator.sim.render(camera_name="agentview", width=512, height=512)[::-1]


def read_sensors_once_per_action(simulator, wanted: tuple[str, ...]) -> None:
    """Read the sensors we use, once per action: bitwise the same observation, up to twice as fast.

    robosuite polls all its sensors at each of the 25 physics steps of an action and keeps the last
    reading. In Can and Square, relative poses take the object where it was read last: one action
    ago here, 24 physics steps ago there.
    """
    for name, observable in simulator._observables.items():
        if name not in wanted and observable.modality != "object":
            observable.set_enabled(False)
    read = simulator._update_observables

    def read_when_forced(force=False):
        if force:
            read(force=True)

    simulator._update_observables = read_when_forced


def read_arm_directly(simulator) -> None:
    """Let the controller read MuJoCo's arrays instead of asking by name, several times per step.

    The control law stays robosuite's. What it reads is bitwise the same, and a step is nearly twice
    as fast again. A reset makes new controllers, so this follows every reset. A controller of
    another kind, from a data file, is left as it is.
    """
    (robot,) = simulator.robots
    arm = robot.part_controllers["right"]
    if type(arm).__name__ != "OperationalSpaceController":
        return
    if arm.num_ref_sites != 1 or not arm.lite_physics:
        return
    reader = DirectReader(simulator, robot, arm)
    arm.update = reader.update
    simulator._pre_action = reader.pre_action
    simulator.sim.data.get_site_xvelp = reader.linear_velocity
    simulator.sim.data.get_site_xvelr = reader.angular_velocity


class DirectReader:
    """What `read_arm_directly` puts in place of four methods of robosuite."""

    def __init__(self, simulator, robot, arm):
        self.robot = robot
        self.arm = arm
        self.model = simulator.sim.model._model
        self.data = simulator.sim.data._data
        self.site = self.model.site(arm.ref_name).id
        self.base = f"{arm.naming_prefix}{arm.part_name}_center"
        self.joints = arm.qvel_index
        self.motors = robot._ref_actuators_indexes_dict["right"]
        self.low, self.high = self.model.actuator_ctrlrange[self.motors].T
        # Two arrays: half of one may lie between 16 bytes, where old SSE kernels round differently.
        self.jacobian_pos = np.zeros((3, self.model.nv))
        self.jacobian_ori = np.zeros((3, self.model.nv))
        self.inertia = np.zeros((self.model.nv, self.model.nv))
        self.still = np.zeros(3)
        self.update_by_name = arm.update
        self.wrapper = simulator.sim.data
        self.read_linear = type(self.wrapper).get_site_xvelp  # the class's, not our last one
        self.read_angular = type(self.wrapper).get_site_xvelr

    def update(self, force=False):
        """Replace OperationalSpaceController.update."""
        import mujoco

        arm = self.arm
        data = self.data
        if force or not arm.new_update:
            return self.update_by_name(force)
        mujoco.mj_jacSite(self.model, data, self.jacobian_pos, self.jacobian_ori, self.site)
        mujoco.mj_fullM(self.model, self.inertia, data.qM)
        arm.ref_pos[:] = data.site_xpos[self.site]
        arm.ref_ori_mat[:] = data.site_xmat[self.site].reshape(3, 3)
        arm.ref_pos_vel[:] = np.dot(self.jacobian_pos, data.qvel)
        arm.ref_ori_vel[:] = np.dot(self.jacobian_ori, data.qvel)
        arm.J_pos[:] = self.jacobian_pos[:, self.joints]
        arm.J_ori[:] = self.jacobian_ori[:, self.joints]
        arm.J_full[:3] = arm.J_pos
        arm.J_full[3:] = arm.J_ori
        arm.joint_pos = data.qpos[arm.qpos_index]
        arm.joint_vel = data.qvel[self.joints]
        arm.mass_matrix = self.inertia[self.joints][:, self.joints]
        arm.new_update = False

    def pre_action(self, action, policy_step=False):
        """Replace ManipulationEnv._pre_action."""
        if policy_step:  # new goals; the gripper's command then stays for the rest of the action
            self.robot.control(action, True)
        else:
            torques = self.arm.run_controller()
            self.data.ctrl[self.motors] = np.clip(torques, self.low, self.high)

    def linear_velocity(self, name):
        """Replace MjData.get_site_xvelp: the base is bolted down."""
        if name == self.base:
            return self.still
        return self.read_linear(self.wrapper, name)

    def angular_velocity(self, name):
        """Replace MjData.get_site_xvelr."""
        if name == self.base:
            return self.still
        return self.read_angular(self.wrapper, name)

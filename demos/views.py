"""
Pictures of a robosuite scene for policies that see: rendered where OpenGL starts, otherwise drawn by software.

    view = View("auto", "lift")                       # prints nothing; view.kind is "rendered" or "drawn"
    images = view(env)                                # (V, S, S, 3) uint8: the scene from above and from the hand
    env = Seeing(env, view, policy.observe, 9)                       # its observations are policy.observe's
    data = see_demonstrations(view, "lift.hdf5", 20, policy.observe, 9)           # of every recorded state, replayed

Both kinds show the collision shapes, which say as much as the visual meshes at a tenth of the work: on one core without
a GPU, two views of 64 x 64 take 15 ms rendered and 4 ms drawn, against 300 ms of robosuite's default picture.
`shapes="visual"` renders the meshes with shadows, for cameras that must look like photographs.
Not here: the simulator itself (envs.py), the real arm's cameras (robot.py).

Shapes: V views, S image side, T steps of a demonstration, N steps of the file.
"""
from __future__ import annotations

import os

import gymnasium
import numpy as np
import torch

import envs
from demos import hdf5

CAMERAS = ("agentview", "robot0_eye_in_hand")
SKY = (90, 110, 140)
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))       # of a box's corners


class View:
    """
    view(env) -> (V, S, S, 3) uint8. kind: "rendered" (needs OpenGL), "drawn", or "auto", which takes what works.
    It copies the state into a simulator of its own, the only one with an OpenGL context: when one of several in a
    process closes, robosuite frees the buffers of whichever was used last, and pictures go wrong without a word.
    Raises RuntimeError where "rendered" is asked for and OpenGL does not start.
    """

    def __init__(self, kind="auto", task="lift", size=64, cameras=CAMERAS, shapes="collision", env_args=None):
        self.task, self.size, self.cameras, self.shapes = envs.get_task(task), size, cameras, shapes
        if self.task.suite != "robosuite":
            raise ValueError(f"pictures of task '{self.task.name}' are not implemented; robosuite's tasks have them")
        self.env_args, self._outlines, self.kind, self._sim = env_args, {}, kind, None
        if kind == "rendered":
            self._simulator()
        elif kind == "auto":
            try:
                self.kind = "drawn" if os.environ.get("MUJOCO_GL") == "disable" else "rendered"
                self._simulator()
            except Exception:  # a driver can fail in any way; the software picture needs none of it
                self.kind, os.environ["MUJOCO_GL"] = "drawn", "disable"

    def __call__(self, env) -> np.ndarray:
        return self.of_state(env.unwrapped.simulator.sim.get_state().flatten())

    def of_state(self, state: np.ndarray) -> np.ndarray:
        """The same for a flattened simulator state, as robomimic files hold."""
        sim = self._simulator()
        sim.set_state_from_flattened(state)
        sim.forward()
        draw = self._render if self.kind == "rendered" else self._draw
        return np.stack([draw(sim, camera) for camera in self.cameras])

    def _simulator(self):
        if self._sim is None:
            mode = "rgb_array" if self.kind == "rendered" else None
            self._env = envs.make_env(self.task, render_mode=mode, env_args=self.env_args)
            self._env.reset(seed=0)
            if self.kind == "rendered":
                self._render(self._env.simulator.sim, self.cameras[0])
            self._sim = self._env.simulator.sim
        return self._sim

    def _render(self, sim, camera) -> np.ndarray:
        import mujoco

        context = sim._render_context_offscreen
        collision = self.shapes == "collision"
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            context.scn.flags[flag] = not collision
        context.vopt.geomgroup[:3] = (1, 0, 0) if collision else (0, 1, 0)
        return sim.render(camera_name=camera, width=self.size, height=self.size)[::-1].copy()

    def _draw(self, sim, camera) -> np.ndarray:
        """Project each convex collision shape and fill its outline, the farthest first."""
        import cv2

        model, data = sim.model._model, sim.data._data
        index = model.camera(camera).id
        place, axes = data.cam_xpos[index], data.cam_xmat[index].reshape(3, 3)
        scale = self.size / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
        outlines = []
        for geom in np.flatnonzero(model.geom_group == 0):
            if geom not in self._outlines:
                self._outlines[geom] = _corners(model, geom)
            points, faces = self._outlines[geom]
            points = (points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom] - place) @ axes
            ahead = points[:, 2] < -0.02
            if not (ahead.all() if len(faces) else ahead.sum() > 2):
                continue
            points = points[ahead]
            pixels = scale * points[:, :2] / -points[:, 2:] * [1, -1] + self.size / 2
            color = 255 * model.geom_rgba[geom, :3]
            centre = points.mean(0)
            for face in faces:
                normal = np.cross(points[face[1]] - points[face[0]], points[face[2]] - points[face[0]])
                normal *= np.sign(normal @ (points[face].mean(0) - centre)) / (np.linalg.norm(normal) + 1e-9)
                if normal @ points[face].mean(0) < 0:  # towards the camera
                    outlines.append((-points[:, 2].min(), pixels[face], color * (0.55 + 0.45 * abs(axes[2] @ normal))))
            if not len(faces):
                outlines.append((-points[:, 2].min(), cv2.convexHull(pixels.astype(np.float32))[:, 0], 0.8 * color))
        image = np.full((self.size, self.size, 3), SKY, np.uint8)
        for _, outline, color in sorted(outlines, key=lambda one: -one[0]):
            fixed = np.clip(outline * 16, -(2**20), 2**20).round().astype(np.int32)
            cv2.fillConvexPoly(image, fixed, color.tolist(), cv2.LINE_AA, shift=4)
        return image


def _corners(model, geom):
    """A geom's outline in its own frame: points (n, 3), and a box's faces as indices (6, 4)."""
    import mujoco

    kind, size = model.geom_type[geom], model.geom_size[geom]
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return model.mesh_vert[first : first + model.mesh_vertnum[mesh]][::7].astype(float), ()
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return signs * size, np.array(FACES)
    return signs * (size[0], size[0], size[1] or size[0]), ()  # a cylinder or a ball by its box


class Seeing(gymnasium.Wrapper):
    """
    An environment for policies that see: its observation is observe(images (1, V, S, S, 3), first `state` numbers of
    the old observation (1, state))[0]. every: look at each so-many-th step only, zeros between; an open-loop policy
    looks only where a chunk begins.
    """

    def __init__(self, env, view: View, observe, state: int, every: int = 1):
        super().__init__(env)
        self.view, self.observe, self.state, self.every, self.count, self.last = view, observe, state, every, 0, None

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.count = 0
        return self._look(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.count += 1
        return self._look(obs), *rest

    def _look(self, obs):
        if self.count % self.every:
            return np.zeros_like(self.last)
        images, state = torch.from_numpy(self.view(self.env)), torch.from_numpy(obs[: self.state])
        self.last = self.observe(images[None], state[None])[0].float().cpu().numpy()
        return self.last


def see_demonstrations(view: View, path, episodes: int, observe, state: int) -> dict:
    """
    Transitions of the first `episodes` demonstrations as demos.load gives them, with observe's observations (N, D).
    Every recorded state is seen once. The one after an episode's end is not recorded: the last one stands in for it.
    """
    data = hdf5.load(path, view.task, episodes)
    ends = np.flatnonzero(np.maximum(data["terminated"], data["truncated"]))
    images = torch.from_numpy(_pictures(view, path, np.diff(ends, prepend=-1)))
    states = torch.from_numpy(data["obs"][:, :state])
    obs = torch.cat([observe(*pair).float().cpu() for pair in zip(images.split(64), states.split(64))])
    after = np.arange(1, len(obs) + 1)
    after[ends] = ends
    return data | {"obs": obs, "next_obs": obs[after]}


def _pictures(view: View, path, steps) -> np.ndarray:
    """Of the first steps[i] recorded states of demonstration i -> (N, V, S, S, 3)."""
    import h5py

    images, width = [], len(view._simulator().get_state().flatten())
    with h5py.File(path, "r") as file:
        for name, count in zip(hdf5.names(file), steps):
            if "states" not in file["data"][name]:
                raise ValueError(f"{path}: data/{name} has no 'states' to make pictures of; record it again: "
                                 f"python -m demos --task {view.task.name} --out FILE")
            states = file["data"][name]["states"][()]
            if states.shape[1:] != (width,) or len(states) < count or not np.isfinite(states).all():
                raise ValueError(f"{path}: data/{name}/states must be {count} finite rows of {width} for this "
                                 f"simulator's model, found {states.shape}; make or fetch it again")
            images += [view.of_state(state) for state in states[:count]]
    return np.array(images)

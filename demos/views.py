"""Pictures of a robosuite scene for policies that see: rendered by OpenGL, or drawn by software.

    view = View("auto", "lift")                  # view.kind is "rendered" or "drawn"
    images = view(env)                           # (V, S, S, 3) uint8: from above, from the hand
    env = Seeing(env, view, policy.observe, 9)   # its observations are policy.observe's
    data = see_demonstrations(view, "lift.hdf5", 20, policy.observe, 9)

Both kinds show the collision shapes, which say as much as the visual meshes at a tenth of the work:
on one core without a GPU two views of 64 x 64 take 15 ms rendered and 4 ms drawn, robosuite's
default picture 300 ms. shapes="visual" renders the meshes with shadows, for cameras that must look
like photographs.
Not here: the simulator itself (simulators/), the real arm's cameras (arms/).

Shapes: V views, S image side, T steps of a demonstration, N steps of the file.
"""

import os
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor

import envs
from demos import hdf5
from demos.columns import DataError, make_command

CAMERAS = ("agentview", "robot0_eye_in_hand")
SKY = (90, 110, 140)
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))  # box
COLLISION = 0  # MuJoCo's geom groups in robosuite
VISUAL = 1

Observe = Callable[[Tensor, Tensor], Tensor]  # images (B, V, S, S, 3), state (B, P) -> (B, D)


class View:
    """Take pictures of a state: view(env) -> (V, S, S, 3) uint8.

    kind: "rendered" (needs OpenGL), "drawn", or "auto", which takes what works. The state is copied
    into a simulator of the view's own, the only one with an OpenGL context: when one of several in
    a process closes, robosuite frees the buffers of whichever was used last, and pictures go wrong
    without a word. Raises RuntimeError where "rendered" is asked for and OpenGL does not start.
    """

    def __init__(
        self,
        kind: str = "auto",
        task: str | envs.Task = "lift",
        size: int = 64,
        cameras: tuple[str, ...] = CAMERAS,
        shapes: str = "collision",
        env_args: dict | None = None,
    ):
        self.task = envs.get_task(task)
        if self.task.suite != "robosuite":
            raise ValueError(
                f"pictures of task '{self.task.name}' are not implemented; "
                "robosuite's tasks have them"
            )
        self.kind = kind
        self.size = size
        self.cameras = cameras
        self.shapes = shapes
        self.env_args = env_args
        self._env = None
        self._outlines: dict[int, tuple] = {}
        if kind == "rendered":
            self._simulator()
        elif kind == "auto":
            self._choose()

    def _choose(self) -> None:
        """Render where OpenGL starts, draw elsewhere."""
        self.kind = "drawn" if os.environ.get("MUJOCO_GL") == "disable" else "rendered"
        try:
            self._simulator()
        except Exception:  # a driver can fail in any way; the software picture needs none of it
            self.kind = "drawn"
            os.environ["MUJOCO_GL"] = "disable"

    def __call__(self, env: gymnasium.Env) -> np.ndarray:
        return self.of_state(env.unwrapped.simulator.sim.get_state().flatten())

    def of_state(self, state: np.ndarray) -> np.ndarray:
        """Take pictures of a flattened simulator state, as robomimic files hold."""
        sim = self._simulator()
        sim.set_state_from_flattened(state)
        sim.forward()
        take = self._render if self.kind == "rendered" else self._draw
        return np.stack([take(sim, camera) for camera in self.cameras])

    def state_width(self) -> int:
        """Return the length of a flattened state."""
        return len(self._simulator().get_state().flatten())

    def _simulator(self):
        if self._env is None:
            mode = "rgb_array" if self.kind == "rendered" else None
            env = envs.make_env(self.task, render_mode=mode, env_args=self.env_args)
            env.reset(seed=0)
            if self.kind == "rendered":
                self._render(env.simulator.sim, self.cameras[0])
            self._env = env
        return self._env.simulator.sim

    def _render(self, sim, camera: str) -> np.ndarray:
        import mujoco

        context = sim._render_context_offscreen
        visual = self.shapes != "collision"
        context.scn.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = visual
        context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = visual
        context.vopt.geomgroup[:3] = 0
        context.vopt.geomgroup[VISUAL if visual else COLLISION] = 1
        return sim.render(camera_name=camera, width=self.size, height=self.size)[::-1].copy()

    def _draw(self, sim, camera: str) -> np.ndarray:
        """Project each convex collision shape and fill its outline, the farthest first."""
        import cv2

        model = sim.model._model
        surfaces = []
        for geom in np.flatnonzero(model.geom_group == COLLISION):
            surfaces += self._surfaces(model, sim.data._data, model.camera(camera).id, geom)
        image = np.full((self.size, self.size, 3), SKY, np.uint8)
        for _, outline, color in sorted(surfaces, key=lambda one: -one[0]):
            fixed = np.clip(outline * 16, -(2**20), 2**20).round().astype(np.int32)
            cv2.fillConvexPoly(image, fixed, color.tolist(), cv2.LINE_AA, shift=4)
        return image

    def _surfaces(self, model, data, camera: int, geom: int) -> list[tuple]:
        """Return what the camera sees of a shape: depth, outline (n, 2) in pixels, colour (3,)."""
        import cv2

        if geom not in self._outlines:
            self._outlines[geom] = corners(model, geom)
        points, faces = self._outlines[geom]
        axes = data.cam_xmat[camera].reshape(3, 3)
        place = data.geom_xpos[geom] - data.cam_xpos[camera]
        points = (points @ data.geom_xmat[geom].reshape(3, 3).T + place) @ axes
        ahead = points[:, 2] < -0.02
        hidden = not ahead.all() if len(faces) else ahead.sum() <= 2
        if hidden:
            return []
        points = points[ahead]
        scale = self.size / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
        pixels = scale * points[:, :2] / -points[:, 2:] * [1, -1] + self.size / 2
        color = 255 * model.geom_rgba[geom, :3]
        depth = -points[:, 2].min()
        if not len(faces):
            return [(depth, cv2.convexHull(pixels.astype(np.float32))[:, 0], 0.8 * color)]
        visible = visible_faces(points, faces)
        return [
            (depth, pixels[face], color * (0.55 + 0.45 * abs(axes[2] @ normal)))
            for face, normal in visible
        ]


def visible_faces(points: np.ndarray, faces: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the faces of a box that look towards a camera at the origin, with their normals."""
    centre = points.mean(0)
    visible = []
    for face in faces:
        middle = points[face].mean(0)
        normal = np.cross(points[face[1]] - points[face[0]], points[face[2]] - points[face[0]])
        normal *= np.sign(normal @ (middle - centre)) / (np.linalg.norm(normal) + 1e-9)
        if normal @ middle < 0:
            visible.append((face, normal))
    return visible


def corners(model, geom: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a shape's outline in its own frame: points (n, 3), a box's faces (6, 4) as indices."""
    import mujoco

    kind = model.geom_type[geom]
    size = model.geom_size[geom]
    no_faces = np.empty((0, 4), int)
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        return points[::7].astype(float), no_faces
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return signs * size, np.array(FACES)
    return signs * (size[0], size[0], size[1] or size[0]), no_faces  # a cylinder or ball by its box


class Seeing(gymnasium.Wrapper):
    """Give a policy that sees its observations.

    The observation becomes observe(images (1, V, S, S, 3), the first `state` numbers of the old
    observation (1, state))[0]. every: look only at every so-manieth step, zeros between; an
    open-loop policy looks only where a chunk begins.
    """

    def __init__(
        self, env: gymnasium.Env, view: View, observe: Observe, state: int, every: int = 1
    ):
        super().__init__(env)
        self.view = view
        self.observe = observe
        self.state = state
        self.every = every
        self.count = 0
        self.last = None

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.count = 0
        return self._look(obs), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.count += 1
        return self._look(obs), *rest

    def _look(self, obs: np.ndarray) -> np.ndarray:
        if self.count % self.every:
            return np.zeros_like(self.last)
        images = torch.from_numpy(self.view(self.env))
        state = torch.from_numpy(obs[: self.state])
        self.last = self.observe(images[None], state[None])[0].float().cpu().numpy()
        return self.last


def see_demonstrations(
    view: View, path: str | Path, episodes: int, observe: Observe, state: int
) -> dict:
    """Load the first `episodes` demonstrations with observe's observations (N, D).

    Every recorded state is seen once. The state after an episode's end is not recorded: the last
    one stands in for it. Raises DataError where the file has no states of this simulator.
    """
    data = hdf5.load(path, view.task, episodes)
    ends = np.flatnonzero(data["terminated"] | data["truncated"])
    images = torch.from_numpy(pictures(view, Path(path), np.diff(ends, prepend=-1)))
    states = torch.from_numpy(data["obs"][:, :state])
    batches = zip(images.split(64), states.split(64))
    obs = torch.cat([observe(*batch).float().cpu() for batch in batches])
    after = np.arange(1, len(obs) + 1)
    after[ends] = ends
    return data | {"obs": obs, "next_obs": obs[after]}


def pictures(view: View, path: Path, steps: np.ndarray) -> np.ndarray:
    """Take pictures of the first steps[i] recorded states of demonstration i -> (N, V, S, S, 3)."""
    width = view.state_width()
    images = []
    with hdf5.opened(path) as file:
        for name, count in zip(hdf5.names(file), steps):
            recorded = hdf5.member(file["data"][name], "states")
            if recorded is None:
                raise DataError(
                    f"{path}: data/{name} has no 'states' to make pictures of; make others: "
                    f"{make_command(view.task.name, Path('data') / f'{view.task.name}.hdf5')}"
                )
            states = recorded[()]
            fits = states.shape[1:] == (width,) and len(states) >= count
            if not fits or not np.isfinite(states).all():
                raise DataError(
                    f"{path}: data/{name}/states must be {count} finite rows of {width} for this "
                    f"simulator's model, found {states.shape}; make or fetch it again"
                )
            images += [view.of_state(state) for state in states[:count]]
    return np.array(images)

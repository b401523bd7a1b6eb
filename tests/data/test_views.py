"""demos/views.py: pictures show the state, the same live and replayed; views do not disturb others.

python -m pytest tests/data/test_views.py
"""

import os

import numpy as np
import pytest

import demos
import envs
from demos.views import View, see_demonstrations

pytest.importorskip("robosuite")
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def view():
    return View("drawn", "lift")


def red(image):
    """Centre of the red pixels (row, column): the cube's."""
    mask = (image[..., 0] > 100) & (image[..., 1] < 40)
    assert mask.sum() > 8
    return np.argwhere(mask).mean(0)


def cube_at(env, x, y):
    state = env.simulator.sim.get_state().flatten()
    joint = env.simulator.sim.model.get_joint_qpos_addr(env.simulator.cube.joints[0])[0]
    state[1 + joint : 3 + joint] = x, y  # after the time
    return state


def test_the_picture_follows_the_cube(view):
    """In agentview x comes towards the camera, down in the picture, and y goes to the right."""
    env = envs.make_env("lift")
    env.reset(seed=0)
    middle, near, right = (
        view.of_state(cube_at(env, *place)) for place in ((0, 0), (0.03, 0), (0, 0.03))
    )
    assert middle.shape == (2, 64, 64, 3) and middle.dtype == np.uint8
    assert (
        red(near[0])[0] > red(middle[0])[0] + 1.5 and abs(red(near[0])[1] - red(middle[0])[1]) < 1
    )
    assert (
        red(right[0])[1] > red(middle[0])[1] + 3 and abs(red(right[0])[0] - red(middle[0])[0]) < 1
    )
    assert np.linalg.norm(red(near[1]) - red(middle[1])) > 3  # the hand's camera sees it too


def kinds():
    """Both kinds; rendering needs an OpenGL, which this machine may lack."""
    return ["drawn", pytest.param("rendered", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", kinds())
def test_environments_do_not_disturb_each_others_pictures(kind):
    before = os.environ.get("MUJOCO_GL")
    try:
        try:
            view = View(kind, "lift")
        except RuntimeError as error:
            pytest.skip(str(error))
        one, two = envs.make_env("lift"), envs.make_env("lift")
        one.reset(seed=1)
        first = view(one)
        two.reset(seed=2)
        other = view(two)
        assert np.array_equal(view(one), first) and not np.array_equal(other, first)
        two.close()
        assert np.array_equal(view(one), first)
        drawn = View("drawn", "lift")(one)
        assert (
            np.abs(red(first[0]) - red(drawn[0])).max() < 1.5
        )  # the same place by OpenGL and by software
    finally:
        os.environ["MUJOCO_GL"] = before or "disable"


def test_recorded_states_look_as_they_did_and_are_each_seen_once(view, tmp_path):
    path, seen = demos.collect("lift", 2, 0, tmp_path / "two.hdf5", progress=False), []

    def observe(images, state):
        import torch

        seen.append(images)
        return torch.cat([state, images.flatten(1).float()], 1)

    data = see_demonstrations(view, path, 2, observe, 9)
    plain = demos.load(path, "lift", 2)
    assert sum(len(images) for images in seen) == len(plain["obs"]) == len(data["obs"])
    assert np.array_equal(data["obs"][:, :9], plain["obs"][:, :9]) and np.array_equal(
        data["action"], plain["action"]
    )
    ends = np.flatnonzero(plain["terminated"] | plain["truncated"])
    inside = np.setdiff1d(np.arange(len(plain["obs"]) - 1), ends)
    assert np.array_equal(data["next_obs"][inside], data["obs"][inside + 1])
    assert np.array_equal(data["next_obs"][ends], data["obs"][ends])
    env = envs.make_env("lift", env_args=demos.env_args(path))
    import h5py

    with h5py.File(path) as file:
        env.reset(seed=int(file["data/demo_0"].attrs["seed"]))
    for step in range(3):
        assert np.array_equal(view(env).ravel(), data["obs"][step, 9:].numpy())
        env.step(plain["action"][step])


STATES = {
    "fewer than actions": lambda states: states[:-1],
    "of a larger model": lambda states: np.hstack([states] * 2),
    "not finite": lambda states: states * np.nan,
    "no table": lambda states: states[:, 0],
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_make_no_pictures_are_refused_by_name(view, tmp_path, name):
    import h5py

    path = demos.collect("lift", 1, 0, tmp_path / "one.hdf5", progress=False)
    with h5py.File(path, "r+") as file:
        states = file["data/demo_0"].pop("states")[()]
        file["data/demo_0/states"] = STATES[name](states)
    with pytest.raises(
        ValueError, match=f"one.hdf5: data/demo_0/states must be {len(states)} finite rows of 32"
    ):
        see_demonstrations(view, path, 1, lambda images, state: state, 9)


def test_what_cannot_be_rendered_is_refused_at_once(monkeypatch):
    """Not when the first picture is wanted, which in an evaluation is a traceback."""

    def make_env(*_, render_mode, **__):
        raise RuntimeError(f"cannot render {render_mode}")

    monkeypatch.setattr(envs, "make_env", make_env)
    with pytest.raises(RuntimeError, match="cannot render rgb_array"):
        View("rendered", "lift")


def test_where_opengl_is_switched_off_auto_draws_and_other_suites_are_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert View("auto", "lift").kind == "drawn"
    with pytest.raises(ValueError, match="pictures of task 'scene'"):
        View("auto", "scene")

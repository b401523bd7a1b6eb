"""Simulators behind one interface: robosuite's, OGBench's and gymnasium's environments.

    from simulators import Goal, make
    env = make(task, seed=0)           # task: a row of envs.TASKS, or anything with its fields

Each suite is a file: robosuite_env.py, ogbench_env.py, gym_env.py (any gymnasium id); base.py is
what they share. The first two hold the simulators' speed patches, each bitwise equal to the code it
replaces.
Not here: the table of tasks and its rewards (envs.py), demonstrations (demos/).
"""

from . import gym_env
from .base import SimulatorEnv, import_simulator, make
from .ogbench_env import Goal

__all__ = ["Goal", "SimulatorEnv", "gym_env", "import_simulator", "make"]

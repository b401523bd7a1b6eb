"""Simulators behind one interface: robosuite's and OGBench's tasks as gymnasium environments.

    from simulators import Goal, make
    env = make(task, seed=0)           # task: a row of envs.TASKS, or anything with its fields

Each suite is a file: base.py (what all share), robosuite_env.py, ogbench_env.py. They hold the
simulators' speed patches, each bitwise equal to the code it replaces.
Not here: the table of tasks and its rewards (envs.py), demonstrations (demos/).
"""

from .base import SimulatorEnv, import_simulator, make
from .ogbench_env import Goal

__all__ = ["Goal", "SimulatorEnv", "import_simulator", "make"]

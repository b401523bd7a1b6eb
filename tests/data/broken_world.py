"""A module that cannot be imported."""

raise RuntimeError("the robot's licence has expired")

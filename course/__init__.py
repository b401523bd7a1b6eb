"""RL as inference, taught on the code that the robot runs. Start with course/README.md."""

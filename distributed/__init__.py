"""Acting and learning at the same time: rollout workers and learners elsewhere.

    python train_online.py --task lift --rollouts 1               # one process acts meanwhile
    python train_online.py --task lift --rollouts 4 --ray local   # workers as actors of Ray
    python robot.py train --task insert-usb --learner GPU:6379    # an arm's learner elsewhere
    python train_online.py --task lift --graph                    # an update is one CUDA graph
    from distributed import Rollouts                              # in place of envs.ChunkRunner

rollouts.py is the learner's end of the interaction thread of Algorithm 1, worker.py the other;
processes.py connects them on one machine, cluster.py on several. arm.py is an arm's learner on
another machine, graph.py the captured update. README.md says how to set up a cluster.
Not here: the updates (train_online.py), the arm's learner itself (arms/learner.py).
"""

from .rollouts import Rollouts

__all__ = ["Rollouts"]

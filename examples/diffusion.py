"""A policy that is not ours: DDPM in place of flow matching, improved by the same POCO.

    python -m examples.diffusion --task lift --preset cpu       # all of train_online.py's flags
    from examples.diffusion import DiffusionPolicy

The network predicts the noise of a chunk instead of a velocity. poco.py calls two methods of a
policy, `sample` and `cfm_loss`; both are here, and nothing else changes. What train_online.py asks
besides (encode, critic_obs, sizes, ...) comes from FlowPolicy, whose network this is.
Not here: POCO itself (train_online.py).

Shapes: B batch, N candidates, H chunk, A action, K denoising steps.
"""

import math

import torch
from torch import Tensor

import train_online
from flow_policy import FlowPolicy
from logbook import cli
from train_offline import Simulation


class DiffusionPolicy(FlowPolicy):
    """Denoising diffusion over chunks with a cosine schedule; t = 0 is an action, t = 1 noise."""

    def signal(self, t: Tensor) -> Tensor:
        """Return the share of the action's variance at time t, broadcast to a chunk."""
        return torch.cos(0.49 * math.pi * t).square()[..., None, None]  # never quite 0

    def cfm_loss(
        self,
        context: Tensor,
        actions: Tensor,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """Compute the squared error of the predicted noise: one loss per chunk, (B, N)."""
        noise = torch.randn_like(actions) if noise is None else noise
        t = torch.rand(actions.shape[:2], device=actions.device) if t is None else t
        share = self.signal(t)
        x = share.sqrt() * actions + (1 - share).sqrt() * noise
        error = (self.velocity(context, x, t) - noise).square()
        mask = torch.ones_like(error) if valid is None else valid[:, None, :, None]
        mask = mask.expand_as(error)
        return (error * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)

    @torch.no_grad()
    def sample(
        self, context: Tensor, n: int, noise: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Denoise n chunks per state in K deterministic steps: (B, n, H, A) in [-1, 1]."""
        steps = steps or self.flow_steps
        shape = (len(context), n, self.horizon, self.action_dim)
        x = torch.randn(shape, device=context.device) if noise is None else noise
        for k in range(steps, 0, -1):
            t = torch.full(shape[:2], k / steps, device=x.device)
            share, next_share = self.signal(t), self.signal(t - 1 / steps)
            predicted = self.velocity(context, x, t)
            action = ((x - (1 - share).sqrt() * predicted) / share.sqrt()).clamp(-1, 1)
            x = next_share.sqrt() * action + (1 - next_share).sqrt() * predicted
        return x.clamp(-1, 1)


class DiffusionSimulation(Simulation):
    """The same simulator with this policy, whose runs have names of their own."""

    policy_class = DiffusionPolicy
    stage_one = "diffusion-bc"
    method = "diffusion"


def main(argv: list[str] | None = None) -> None:
    train_online.main(argv, simulation_class=DiffusionSimulation)


if __name__ == "__main__":
    cli(main)

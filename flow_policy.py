"""Conditional flow matching over action chunks: POCO's policy (Sec. III-C, Eq. 6-8).

A velocity field v(x, t | s) carries Gaussian noise (t = 0) to an action chunk (t = 1). Training
regresses v on the straight lines between the two, which needs no likelihood. Acting integrates the
ODE with a few Euler steps.

    from flow_policy import FlowPolicy
    policy = FlowPolicy(obs_dim=19, action_dim=7, horizon=5)
    context = policy.encode(obs)                                  # once per state, whatever n is
    chunks = policy.sample(context, n=32)                         # (B, 32, 5, 7) in [-1, 1]
    loss = policy.cfm_loss(context, demo_chunk[:, None]).mean()   # Eq. 8: behaviour cloning

One core, 4x512, K = 10: a chunk takes about 2 ms, a gradient step on 256 chunks about 15 ms.
Needs torch only. Not here: images (vla_head.py), likelihoods (the method needs none), the
reinforcement learning update (poco.py).

Shapes: B batch, N candidates, H chunk length, A action, D observation, F what the critic sees,
K flow steps. The sample axis is always 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FlowPolicy(nn.Module):
    """MLP velocity field over whole chunks: `layers` layers of `hidden` SiLU units (Sec. V-A1).

    Observations are standardised inside with `obs_mean` and `obs_std`, which do nothing until
    `set_normalizer` is called. Actions live in [-1, 1]. `flow_steps` is K, the number of Euler
    steps.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        horizon: int,
        hidden: int = 512,
        layers: int = 4,
        flow_steps: int = 10,
    ):
        super().__init__()
        self.obs_dim = obs_dim
        self.action_dim = action_dim
        self.horizon = horizon
        self.flow_steps = flow_steps
        cells = horizon * action_dim
        # The first layer is split in two: a state is projected once and shared by its N candidates.
        self.from_obs = nn.Linear(obs_dim, hidden)
        self.from_chunk = nn.Linear(cells + 1, hidden)  # the noisy chunk and the time
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, cells)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def sizes(self) -> dict[str, int]:
        """Return the constructor's arguments: FlowPolicy(**sizes) builds this network anew."""
        return {
            "obs_dim": self.obs_dim,
            "action_dim": self.action_dim,
            "horizon": self.horizon,
            "hidden": self.from_obs.out_features,
            "layers": len(self.hidden) + 1,
            "flow_steps": self.flow_steps,
        }

    @property
    def device(self) -> torch.device:
        return self.obs_mean.device

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """Standardise observations with these statistics (D,), usually the demonstrations'."""
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """Return what the optimiser trains: here everything, in a VLA the action head only."""
        return self.parameters()

    def encode(self, obs: Tensor) -> Tensor:
        """Turn observations (B, D) into a context: once per state for all candidates and steps."""
        return (obs - self.obs_mean) / self.obs_std

    def critic_obs(self, context: Tensor) -> Tensor:
        """Return what the critic sees of a context, (B, F): here the standardised observation."""
        return context

    @property
    def critic_dim(self) -> int:
        """F, the width of `critic_obs`."""
        return self.obs_dim

    def velocity(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v(x, t | context): x (B, N, H, A), t (B, N) in [0, 1] -> (B, N, H, A)."""
        chunk_and_time = torch.cat([x.flatten(2), t.unsqueeze(-1)], dim=-1)  # (B, N, H*A + 1)
        h = F.silu(self.from_chunk(chunk_and_time) + self.from_obs(context).unsqueeze(1))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h).unflatten(-1, (self.horizon, self.action_dim))

    @torch.no_grad()
    def sample(
        self, context: Tensor, n: int, noise: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw n chunks per state by Euler integration of Eq. 6.

        noise (B, n, H, A) is where the flow starts, N(0, I) by default. Returns (B, n, H, A),
        clipped to [-1, 1], without gradient.
        """
        steps = steps or self.flow_steps
        if noise is None:
            shape = (len(context), n, self.horizon, self.action_dim)
            noise = torch.randn(shape, device=context.device, dtype=context.dtype)
        x = noise
        for k in range(steps):
            t = torch.full(x.shape[:2], k / steps, device=x.device, dtype=x.dtype)
            x = x + self.velocity(context, x, t) / steps  # Eq. 6, one Euler step
        return x.clamp(-1, 1)

    def cfm_loss(
        self,
        context: Tensor,
        actions: Tensor,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """Compute each chunk's flow-matching loss, the paper's L_BC, from one (noise, t) draw.

        actions (B, N, H, A); noise like actions; t (B, N). valid (B, H) masks the steps that do
        not exist, for all N chunks of a state. Returns (B, N): the MEAN over real steps and action
        dimensions, which is the unit `clip` is measured in.
        """
        if noise is None:
            noise = torch.randn_like(actions)
        if t is None:
            t = torch.rand(actions.shape[:2], device=actions.device, dtype=actions.dtype)
        m = t[..., None, None]
        x = (1 - m) * noise + m * actions  # Eq. 7
        error = (self.velocity(context, x, t) - (actions - noise)).square()  # Eq. 8
        if valid is None:
            return error.mean(dim=(-2, -1))  # (B, N)
        mask = valid.to(error.dtype)[:, None, :, None]
        cells = (mask.sum(dim=(-2, -1)) * self.action_dim).clamp(min=1)
        return (error * mask).sum(dim=(-2, -1)) / cells

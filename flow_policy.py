"""Conditional flow matching over action chunks: the policy that POCO improves (paper Sec. III-C, Eq. 6-8).

A velocity field v(x, t | s) carries Gaussian noise (t = 0) to an action chunk (t = 1). Training regresses v on straight
lines between the two, which needs no likelihood; acting integrates the ODE with a few Euler steps.

    from flow_policy import FlowPolicy
    policy = FlowPolicy(obs_dim=19, action_dim=7, horizon=5)
    context = policy.encode(obs)                                  # once per state, whatever n is
    chunks = policy.sample(context, n=32)                         # (B, 32, 5, 7) in [-1, 1]
    loss = policy.cfm_loss(context, demo_chunk[:, None]).mean()   # Eq. 8: behaviour cloning

Cost on one core, 4x512, K = 10: one chunk about 2 ms, a gradient step on 256 chunks about 15 ms.
Needs torch only. Not here: images (vla_head.py), likelihoods (the method needs none), the RL update (poco.py).

Shapes: B batch, N candidates, H chunk length, A action, D observation, K flow steps. The sample axis is always 1.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FlowPolicy(nn.Module):
    """MLP velocity field over whole chunks: `layers` hidden layers of `hidden` SiLU units, linear output (Sec. V-A1).

    Observations are standardised inside with `obs_mean` and `obs_std`, identity until `set_normalizer` is called;
    actions live in [-1, 1]. `flow_steps` is K, the number of Euler steps used by `sample`.
    """

    def __init__(self, obs_dim: int, action_dim: int, horizon: int, hidden: int = 512, layers: int = 4,
                 flow_steps: int = 10):
        super().__init__()
        self.horizon, self.action_dim, self.flow_steps = horizon, action_dim, flow_steps
        cells = horizon * action_dim
        # The first layer is split in two, so a state is projected once and shared by its N candidates.
        self.from_obs = nn.Linear(obs_dim, hidden)
        self.from_chunk = nn.Linear(cells + 1, hidden)                            # noisy chunk and time
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, cells)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """Standardise observations with these statistics, each (D,), usually those of the demonstrations."""
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def head_parameters(self):
        """What the optimiser trains: here everything; in a VLA the action head only."""
        return self.parameters()

    def encode(self, obs: Tensor) -> Tensor:
        """Observation (B, D) -> context, computed once per state and reused over N candidates and K steps."""
        return (obs - self.obs_mean) / self.obs_std

    def velocity(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t | context): x (B, N, H, A), t (B, N) in [0, 1] -> (B, N, H, A)."""
        chunk_and_time = torch.cat([x.flatten(2), t.unsqueeze(-1)], dim=-1)       # (B, N, H*A + 1)
        h = F.silu(self.from_chunk(chunk_and_time) + self.from_obs(context).unsqueeze(1))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h).unflatten(-1, (self.horizon, self.action_dim))

    @torch.no_grad()
    def sample(self, context: Tensor, n: int, noise: Tensor | None = None, steps: int | None = None) -> Tensor:
        """Draw n chunks per state: Euler integration of Eq. 6 from `noise` (B, n, H, A), default N(0, I).

        Returns (B, n, H, A) clipped to [-1, 1], without gradient.
        """
        steps = steps or self.flow_steps
        if noise is None:
            noise = torch.randn(len(context), n, self.horizon, self.action_dim, device=context.device,
                                dtype=context.dtype)
        x = noise
        for k in range(steps):
            t = torch.full(x.shape[:2], k / steps, device=x.device, dtype=x.dtype)
            x = x + self.velocity(context, x, t) / steps                          # Eq. 6, one Euler step
        return x.clamp(-1, 1)

    def cfm_loss(self, context: Tensor, actions: Tensor, valid: Tensor | None = None, noise: Tensor | None = None,
                 t: Tensor | None = None) -> Tensor:
        """Flow-matching loss of each chunk, the L_BC of the paper, with one (noise, t) draw per chunk.

        actions (B, N, H, A); valid (B, H) masks steps that do not exist, for every one of the N chunks; noise like
        actions; t (B, N). Returns (B, N): the MEAN over real steps and action dimensions, the unit `clip` is
        measured in.
        """
        noise = torch.randn_like(actions) if noise is None else noise
        t = torch.rand(actions.shape[:2], device=actions.device, dtype=actions.dtype) if t is None else t
        m = t[..., None, None]
        x = (1 - m) * noise + m * actions                                         # Eq. 7
        error = (self.velocity(context, x, t) - (actions - noise)).square()       # Eq. 8
        if valid is None:
            return error.mean(dim=(-2, -1))                                       # (B, N)
        mask = valid.to(error.dtype)[:, None, :, None]
        return (error * mask).sum(dim=(-2, -1)) / (mask.sum(dim=(-2, -1)) * self.action_dim).clamp(min=1)

"""Chunk-level critic: Q(s, a_t ... a_{t+H-1}), the return of executing a whole chunk open loop (Sec. IV-A1, Eq. 14).

    from chunk_critic import ChunkCritic, aggregate, td_target, critic_loss, ema_update
    critic = ChunkCritic(obs_dim=19, action_dim=7, horizon=5)
    q = critic(obs, chunks)                                       # (M, B, N): M heads, N candidates per state
    target = td_target(batch.returns, batch.bootstrap, aggregate(target_critic(batch.next_obs, next_chunk))[:, 0])
    loss, stats = critic_loss(critic, batch.obs, batch.chunk, target)

Cost on one core, 2 heads of 4x512: a gradient step on 256 chunks about 25 ms.
Needs torch only. Not here: how the next chunk is drawn (the policy does that), replay (replay.py).

Shapes: B batch, N candidates, H chunk length, A action, D observation, M heads.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadLinear(nn.Module):
    """M independent linear layers as one batched product: (M, rows, inputs) -> (M, rows, outputs)."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)                                             # nn.Linear's initialisation
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class ChunkCritic(nn.Module):
    """M heads of `layers` hidden layers, each SiLU then LayerNorm, linear output (Sec. V-A1)."""

    def __init__(self, obs_dim: int, action_dim: int, horizon: int, hidden: int = 512, layers: int = 4, heads: int = 2):
        super().__init__()
        self.heads = heads
        # As in the policy, the state is projected once and shared by its N candidates.
        self.from_obs = HeadLinear(heads, obs_dim, hidden)
        self.from_chunk = HeadLinear(heads, horizon * action_dim, hidden)
        self.hidden = nn.ModuleList(HeadLinear(heads, hidden, hidden) for _ in range(layers - 1))
        self.out = HeadLinear(heads, hidden, 1)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def set_normalizer(self, mean: Tensor, std: Tensor) -> None:
        """Standardise observations with these statistics, each (D,), usually those of the demonstrations."""
        self.obs_mean.copy_(mean)
        self.obs_std.copy_(std)

    def forward(self, obs: Tensor, chunks: Tensor) -> Tensor:
        """obs (B, D), chunks (B, N, H, A) -> Q (M, B, N)."""
        rows, n = chunks.shape[:2]
        state = self.from_obs(((obs - self.obs_mean) / self.obs_std).expand(self.heads, -1, -1))
        h = self.from_chunk(chunks.flatten(2).flatten(0, 1).expand(self.heads, -1, -1))      # (M, B*N, hidden)
        h = (h.unflatten(1, (rows, n)) + state.unsqueeze(2)).flatten(1, 2)
        h = F.layer_norm(F.silu(h), h.shape[-1:])                                 # its gain and offset would only
        for layer in self.hidden:                                                 # repeat the next linear layer's
            h = F.layer_norm(F.silu(layer(h)), h.shape[-1:])
        # Never in bf16: candidates of one state differ by less than a bf16 step of their common value. As a weighted
        # sum, since a product with a single column is slow on a CPU.
        q = (h * self.out.weight.mT).sum(-1) + self.out.bias.squeeze(-1)          # float32 even under autocast
        return q.unflatten(1, (rows, n))                                          # (M, B, N)


def aggregate(q: Tensor, pessimism: float = 0.0) -> Tensor:
    """One value from M heads: q (M, ...) -> (...), their mean less `pessimism` standard deviations.

    0 is the mean (authors' scripts). 1 with two heads is exactly their minimum (the default of the authors' code); with
    more heads it mistrusts chunks that the data does not cover, on which the heads disagree.
    """
    mean = q.mean(0)
    return mean if pessimism == 0 else mean - pessimism * q.std(0, correction=0)


@torch.no_grad()
def td_target(returns: Tensor, bootstrap: Tensor, next_q: Tensor) -> Tensor:
    """h-step target of Eq. 14, each argument (B,), without gradient.

    returns = sum of gamma^i r_i over the chunk's k real steps; bootstrap = gamma^k, the paper's gamma^T where the
    episode went on, or 0 where it terminated; next_q = target-critic value of a policy chunk at the state after the
    last real step.
    """
    return returns + bootstrap * next_q


def critic_loss(critic: nn.Module, obs: Tensor, chunk: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared TD error of every head: obs (B, D), chunk (B, H, A) from the replay, target (B,)."""
    q = critic(obs, chunk.unsqueeze(1)).squeeze(-1)                               # (M, B)
    loss = (q - target.detach()).square().mean()                                  # Eq. 14
    return loss, {"critic": loss.detach(), "q_data": q.detach().mean(), "target": target.detach().mean()}


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, in place over all parameters."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)

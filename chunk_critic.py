"""Chunk-level critic: Q(s, a_t ... a_{t+H-1}), the return of a whole chunk (Sec. IV-A1, Eq. 14).

    from chunk_critic import ChunkCritic, aggregate, td_target, critic_loss, ema_update
    critic = ChunkCritic(obs_dim=19, action_dim=7, horizon=5)
    q = critic(obs, chunks)                        # (M, B, N): M heads, N candidates per state
    next_q = aggregate(target_critic(next_obs, next_chunk))[:, 0]
    target = td_target(batch.returns, batch.bootstrap, next_q)
    loss, stats = critic_loss(critic, obs, batch.chunk, target)

One core, 2 heads of 4x512: a gradient step on 256 chunks takes about 25 ms. Needs torch only.
Not here: how the next chunk is drawn (the policy does that), what the critic sees of a state (the
policy's `critic_obs`, standardised already), the replay (replay.py).

Shapes: B batch, N candidates, H chunk length, A action, D what the critic sees, M heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadLinear(nn.Module):
    """Apply M independent linear layers in one product: (M, rows, inputs) -> (M, rows, outputs)."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # nn.Linear's initialisation
        weight = torch.empty(heads, inputs, outputs).uniform_(-bound, bound)
        bias = torch.empty(heads, 1, outputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class ChunkCritic(nn.Module):
    """M heads of `layers` hidden layers, SiLU then LayerNorm, and a linear output (Sec. V-A1)."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        horizon: int,
        hidden: int = 512,
        layers: int = 4,
        heads: int = 2,
    ):
        super().__init__()
        self.heads = heads
        # As in the policy, a state is projected once and shared by its N candidates.
        self.from_obs = HeadLinear(heads, obs_dim, hidden)
        self.from_chunk = HeadLinear(heads, horizon * action_dim, hidden)
        self.hidden = nn.ModuleList(HeadLinear(heads, hidden, hidden) for _ in range(layers - 1))
        self.out = HeadLinear(heads, hidden, 1)

    def forward(self, obs: Tensor, chunks: Tensor) -> Tensor:
        """Rate chunks: obs (B, D), chunks (B, N, H, A) -> Q (M, B, N)."""
        rows, n = chunks.shape[:2]
        state = self.from_obs(obs.expand(self.heads, -1, -1))  # (M, B, hidden)
        flat = chunks.flatten(2).flatten(0, 1)  # (B*N, H*A)
        h = self.from_chunk(flat.expand(self.heads, -1, -1))  # (M, B*N, hidden)
        h = (h.unflatten(1, (rows, n)) + state.unsqueeze(2)).flatten(1, 2)
        # LayerNorm without gain and offset: the next linear layer subsumes them.
        h = F.layer_norm(F.silu(h), h.shape[-1:])
        for layer in self.hidden:
            h = F.layer_norm(F.silu(layer(h)), h.shape[-1:])
        # A weighted sum, because a product with a single column is slow on a CPU. It stays float32
        # under autocast: candidates of one state differ by less than a bf16 step of their value.
        q = (h * self.out.weight.mT).sum(-1) + self.out.bias.squeeze(-1)
        return q.unflatten(1, (rows, n))  # (M, B, N)


def aggregate(q: Tensor, pessimism: float = 0.0) -> Tensor:
    """Reduce M heads to one value: q (M, ...) -> (...), the mean less `pessimism` deviations.

    0 is the mean (the authors' scripts). 1 with two heads is exactly their minimum (the default of
    the authors' code). With more heads it mistrusts chunks outside the data, where heads disagree.
    """
    mean = q.mean(0)
    if pessimism == 0:
        return mean
    return mean - pessimism * q.std(0, correction=0)


@torch.no_grad()
def td_target(returns: Tensor, bootstrap: Tensor, next_q: Tensor) -> Tensor:
    """Compute the h-step target of Eq. 14 from arguments of shape (B,), without gradient.

    returns = sum of gamma^i r_i over the chunk's k real steps. bootstrap = gamma^k (the paper's
    gamma^T) where the episode went on, 0 where it terminated. next_q = the target critic's value of
    a policy chunk at the state after the last real step.
    """
    return returns + bootstrap * next_q


def critic_loss(
    critic: nn.Module, obs: Tensor, chunk: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute every head's squared TD error: obs (B, D), chunk (B, H, A), target (B,)."""
    q = critic(obs, chunk.unsqueeze(1)).squeeze(-1)  # (M, B)
    loss = (q - target.detach()).square().mean()  # Eq. 14
    stats = {
        "critic": loss.detach(),
        "q_data": q.detach().mean(),
        "target": target.detach().mean(),
    }
    return loss, stats


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move target towards online in place: target <- (1 - tau) target + tau online."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)

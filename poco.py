"""POCO, Posterior Optimization with Clipped Objective: policy improvement as posterior inference (paper Sec. IV).

    python poco.py                                   # draws bandit.png: the whole idea on a 2-D action space
    from poco import e_step, m_step_loss
    candidates, weights, stats = e_step(policy, q_fn, context, num_candidates=32, temperature=0.001)
    loss, stats = m_step_loss(policy, context, chunk, valid, candidates, weights, guidance=1.0, clip=0.15)

`policy` is anything with sample(context, n) and cfm_loss(context, actions, valid=None), so a flow, a diffusion model or
a VLA's action head plugs in unchanged; `q_fn(context, candidates)` returns (B, N). Needs torch (the demo: matplotlib).
Not here: the policy (flow_policy.py), the critic (chunk_critic.py), Algorithm 1 itself (train_online.py).

Why the E-step is a softmax (Eq. 25-30). Per state, with prior pi, evidence Q and temperature eta, maximise over r

    J(r) = E_r[Q] - eta KL(r || pi).

Let Z = sum_a pi(a) exp(Q(a)/eta) and q*(a) = pi(a) exp(Q(a)/eta) / Z, so that Q = eta (log q* - log pi + log Z).
Put this Q into J and complete the KL:

    J(r) = eta E_r[log q* - log pi + log Z] - eta E_r[log r - log pi] = eta log Z - eta KL(r || q*).

The first term does not depend on r and the second is zero exactly at r = q*. That one line is optimality, uniqueness,
the optimal value eta log Z and the price of every other choice. The Lagrangian of Eq. 26-29 finds the same stationary
point: Q - eta log(q*/pi) is the constant eta log Z, its multiplier. eta is fixed here and the prior is the current
policy, so unlike MPO there is no dual problem. Drawing candidates from pi already supplies the factor pi of q*, which
is why the particle weights use exp(Q/eta) alone.

Shapes: B batch, N candidates, H chunk length, A action. The sample axis is always 1.
"""
import math

import torch
from torch import Tensor


def posterior(prior: Tensor, q: Tensor, temperature: float) -> Tensor:
    """The E-step in closed form on a finite support: prior and q (..., N) -> probabilities (..., N), Eq. 13.

    prior sums to 1 over the last dimension and may hold zeros; they stay zero. Raises ValueError on a temperature
    below 1e-6 or a non-finite q.
    """
    eta = _checked(temperature, q)
    pi, q = _upcast(prior), _upcast(q)
    q = torch.where(pi > 0, q, -torch.inf)           # what the prior excludes must not set the maximum
    return torch.softmax(pi.log() + (q - q.amax(-1, keepdim=True)) / eta, dim=-1)        # Eq. 13


@torch.no_grad()
def posterior_weights(q: Tensor, temperature: float) -> Tensor:
    """Weights of N candidates drawn from the policy: q (B, N) -> (B, N), detached, each row sums to 1, Eq. 16-17.

    Computed in float32 or better. The row maximum is subtracted before the division, so q = 1e6 with a temperature of
    0.001 neither overflows nor loses the differences q itself still holds.
    """
    eta = _checked(temperature, q)
    q = _upcast(q)
    w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)                                  # Eq. 16
    return w / w.sum(-1, keepdim=True)                                                   # Eq. 17


def clipped_surrogate(losses: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Second term of the objective: losses (B, N), weights (B, N) -> (B,).

    Each candidate's loss is clipped before it is weighed, and hard: above `clip` its gradient is zero, at or below it
    is exactly weight * gradient. clip = inf gives the unclipped objective, Eq. 22.
    """
    if not clip >= 0:
        raise ValueError(f"clip must be >= 0 (inf: no clipping), got {clip}")
    zeta, w = clip, weights.detach()
    return (w * losses.clamp(0, zeta)).sum(-1)                                           # Eq. 22 and 23, second term


@torch.no_grad()
def e_step(policy, q_fn, context, num_candidates: int, temperature: float) -> tuple[Tensor, Tensor, dict]:
    """Implicit E-step: draw N chunks per state from the policy and weigh them by their value.

    Returns candidates (B, N, H, A), weights (B, N) and stats; nothing carries a gradient.
    """
    candidates = policy.sample(context, num_candidates)                                  # (B, N, H, A)
    q = q_fn(context, candidates).float()                                                # (B, N)
    weights = posterior_weights(q, temperature)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    stats = {"q_mean": q.mean(), "q_min": q.min(), "q_max": q.max(), "q_spread": q.std(-1, correction=0).mean(),
             "ess": (1 / weights.square().sum(-1)).mean() / num_candidates,              # effective samples / N
             "kl": math.log(num_candidates) - entropy.mean()}                            # KL(weights || uniform)
    return candidates.detach(), weights, stats


def m_step_loss(policy, context, chunk: Tensor, valid: Tensor | None, candidates: Tensor | None,
                weights: Tensor | None, guidance: float, clip: float) -> tuple[Tensor, dict]:
    """M-step objective, Eq. 23: behaviour cloning of the replay chunk plus the clipped loss of weighted candidates.

    chunk (B, H, A) and valid (B, H) come from the replay, candidates and weights from `e_step`. guidance = 0 is exactly
    behaviour cloning, Eq. 24: candidates and weights may then be None and are not looked at. Losses are means over a
    chunk's cells, so `clip` has the same meaning for every horizon and action size. Returns the loss and stats;
    clip_frac is the share of candidates above clip, alive_mass the posterior weight that still gets a gradient.
    """
    bc = policy.cfm_loss(context, chunk.unsqueeze(1), valid=valid).mean()                # Eq. 24
    if guidance == 0:
        return bc, {"bc": bc.detach()}
    losses = policy.cfm_loss(context, candidates.detach())                               # (B, N)
    surrogate = clipped_surrogate(losses, weights, clip).mean()
    beta = guidance
    loss = bc + beta * surrogate                                                         # Eq. 23
    alive = losses.detach() <= clip
    stats = {"bc": bc.detach(), "surrogate": surrogate.detach(), "clip_frac": 1 - alive.float().mean(),
             "alive_mass": (weights * alive).sum(-1).mean()}
    return loss, stats


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _checked(temperature: float, q: Tensor) -> float:
    if not temperature >= 1e-6:
        raise ValueError(f"temperature must be at least 1e-6, got {temperature}")
    if not torch.isfinite(q).all():
        raise ValueError("the critic returned a non-finite Q: training has diverged (lower the learning rate, or check "
                         "rewards and observations for NaN)")
    return temperature

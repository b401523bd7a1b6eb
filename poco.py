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
    q = _upcast(q_fn(context, candidates))                                               # (B, N)
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
    bc = policy.cfm_loss(context, chunk.unsqueeze(1), valid=valid).mean()
    if guidance == 0:
        return bc, {"bc": bc.detach()}
    losses = policy.cfm_loss(context, candidates.detach())                               # (B, N)
    surrogate = clipped_surrogate(losses, weights, clip).mean()
    beta = guidance
    loss = bc + beta * surrogate                                                         # Eq. 23
    alive = losses.detach() <= clip
    stats = {"bc": bc.detach(), "surrogate": surrogate.detach(), "clip_frac": 1 - alive.float().mean(),
             "alive_mass": (weights.detach() * alive).sum(-1).mean()}
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


# ---- python poco.py: the idea on a 2-D action space --------------------------------------------------------------------

def _demo(path: str = "bandit.png") -> dict[str, float]:
    """Draw prior, exact posterior and the policy after one M-step, then what extreme eta and zeta do. Returns each E[Q]."""
    import copy

    torch.manual_seed(0)
    torch.set_num_threads(1)
    angle = torch.arange(8) * math.pi / 4
    modes = 0.7 * torch.stack([angle.cos(), angle.sin()], -1)                            # (8, 2)
    side = torch.linspace(-1, 1, 101)
    grid = torch.cartesian_prod(side, side)                                              # (G, 2)

    def q(a):
        """Evidence: the right is good, the top right is best."""
        return 2 * a[..., 0] + a[..., 1]

    def train(policy, steps, loss):
        optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)                  # averages the loss's noise out
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return policy

    def data(n=1024):
        return (modes[torch.randint(8, (n,))] + 0.06 * torch.randn(n, 2)).unsqueeze(1)   # (n, H = 1, A = 2)

    def improved(temperature, clip):
        """One EM iteration from the same prior; guidance 50 all but lifts the anchor, to show what it would hold back."""
        candidates, weights, _ = e_step(prior, lambda _, a: q(a[:, :, 0]), context[:64], 64, temperature)
        policy = copy.deepcopy(prior)
        return train(policy, 300, lambda: m_step_loss(policy, context[:64], data(64), None, candidates, weights, 50.0, clip)[0])

    context = torch.zeros(1024, 0)                                                       # a bandit has one state
    network = _DemoFlow()
    prior = train(network, 700, lambda: network.cfm_loss(context, data().unsqueeze(1)).mean())
    density = torch.exp(-(grid[:, None] - modes).square().sum(-1) / (2 * 0.06 ** 2)).sum(-1)
    exact = {"prior": density / density.sum()}
    exact["exact posterior, eta 0.5"] = posterior(exact["prior"], q(grid), 0.5)
    drawn = {"policy after the M-step, eta 0.5": improved(0.5, math.inf), "eta 0.05: greedy": improved(0.05, math.inf),
             "eta 50: nothing learnt": improved(50.0, math.inf), "zeta 0.1: all clipped": improved(0.5, 0.1)}
    samples = {name: policy.sample(torch.zeros(1, 0), 3000)[0, :, 0] for name, policy in drawn.items()}
    value = {name: (p * q(grid)).sum().item() for name, p in exact.items()}
    value |= {name: q(a).mean().item() for name, a in samples.items()}
    _demo_figure(exact, samples, value, path)
    return value


class _DemoFlow(torch.nn.Module):
    """The smallest thing `e_step` and `m_step_loss` accept: a flow over one 2-D action, without observations."""

    def __init__(self):
        super().__init__()
        width = 128
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
                                       torch.nn.SiLU(), torch.nn.Linear(width, 2))

    @torch.no_grad()
    def sample(self, context, n, steps=10):
        x = torch.randn(len(context), n, 1, 2)
        for k in range(steps):
            x = x + self.net(torch.cat([x, torch.full_like(x[..., :1], k / steps)], -1)) / steps
        return x.clamp(-1, 1)

    def cfm_loss(self, context, actions, valid=None):
        noise, t = torch.randn_like(actions), torch.rand(*actions.shape[:2], 1, 1)
        v = self.net(torch.cat([(1 - t) * noise + t * actions, t], -1))
        return (v - (actions - noise)).square().mean((-2, -1))


def _demo_figure(exact, samples, value, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, value):
        if name in exact:
            side = int(len(exact[name]) ** 0.5)
            axis.imshow(exact[name].reshape(side, side).T.sqrt(), origin="lower", extent=(-1, 1, -1, 1), cmap="Blues")
        else:
            axis.scatter(*samples[name].T, s=2, alpha=0.25, color="tab:blue", linewidths=0)
        axis.set(title=f"{name}\nE[Q] = {value[name]:.2f}", aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
    figure.suptitle("Q grows to the right and upwards")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    results = _demo()
    for name, value in results.items():
        print(f"{name:36s} E[Q] = {value:6.3f}")
    old, best, new = list(results.values())[:3]
    print(f"one EM iteration reached {100 * (new - old) / (best - old):.0f} % of the exact gain; see bandit.png")

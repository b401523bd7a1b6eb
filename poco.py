"""POCO, Posterior Optimization with Clipped Objective: policy improvement as posterior inference (paper Sec. IV).

    python poco.py                                   # bandit.png, 15 seconds: the idea on a 2-D action space
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
point: Q - eta log(q*/pi) is the constant eta log Z, its multiplier plus eta. eta is fixed here and the prior is the
current policy, so unlike MPO there is no dual problem. Drawing candidates from pi already supplies the factor pi of
q*, which is why the particle weights use exp(Q/eta) alone.

What surrounds it. Eq. 9-12: a trajectory's KL is the sum of its steps', and by the chain rule a whole chunk's KL is at
least that of its first action, so a bound that pays for chunks stays a bound; E- and M-step raise it in turn. Eq. 15:
the M-step maximises E_q*[log pi] less lambda times the KL from the last policy. Eq. 18-21: pi has no likelihood, but
its flow-matching loss stands for -log pi up to a constant and, up to another, for that KL on samples of the last
policy; replayed chunks take their place (Eq. 22), which makes the second task plain behaviour cloning: the anchor. Its
price lambda is gone: Eq. 22 and 23 weigh the first task instead, by beta.

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
    # no mask (the authors' code takes the chunk's): a candidate's steps are all real
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
    if not _capturing(q) and not torch.isfinite(q).all():
        raise ValueError("the critic returned a non-finite Q: training has diverged (lower the learning rate, or check "
                         "rewards and observations for NaN)")
    return temperature


def _capturing(q: Tensor) -> bool:
    """While a CUDA graph is captured no number can be read back."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- python poco.py: the idea on a 2-D action space ------------------------------------------------------------------

def _demo(path: str = "bandit.png") -> dict[str, float]:
    """Draw prior, exact posterior and the policy after one M-step, then what extreme eta and zeta do; return E[Q]s."""
    import copy

    torch.manual_seed(0)
    torch.set_num_threads(1)
    angle = torch.arange(6) * math.pi / 3
    modes, width = 0.65 * torch.stack([angle.cos(), angle.sin()], -1), 0.1               # demonstrations: six habits
    context = torch.zeros(128, 0)                                                        # a bandit has one state

    def q(a):
        """Evidence: the right is good, the top right is best."""
        return 2 * a[..., 0] + a[..., 1]

    def data(n):
        return (modes[torch.randint(6, (n,))] + width * torch.randn(n, 2)).unsqueeze(1)  # (n, H = 1, A = 2)

    def train(policy, steps, rate, loss):
        optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)                  # averages the loss's noise out
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    def improved(temperature, clip):
        """One EM iteration from the prior: samples, alive_mass. guidance 50 all but lifts the anchor to the data."""
        candidates, weights, _ = e_step(prior, lambda _, a: q(a[:, :, 0]), context, 64, temperature)
        policy = copy.deepcopy(prior)

        def loss(rows):
            return m_step_loss(policy, context[rows], data(len(rows)), None, candidates[rows], weights[rows],
                               50.0, clip)

        train(policy, 1000, 0.005, lambda: loss(torch.randint(128, (8,)))[0])
        return policy.sample(context[:1], 2500)[0, :, 0], loss(torch.arange(128))[1]["alive_mass"].item()

    prior = _DemoFlow()
    train(prior, 2500, 0.01, lambda: prior.cfm_loss(context, data(256).unsqueeze(1)).mean())
    side = torch.linspace(-1, 1, 201)
    grid = torch.cartesian_prod(side, side)
    density = torch.exp(-(grid[:, None] - modes).square().sum(-1) / (2 * width**2)).sum(-1)
    exact = density / density.sum()
    panels, value = {}, {}
    for name, p in (("prior", exact), ("exact posterior, eta 0.5", posterior(exact, q(grid), 0.5))):
        panels[name], value[name] = grid[p.multinomial(2500, replacement=True)], (p * q(grid)).sum().item()
    for name, eta, zeta in (("policy after the M-step, eta 0.5", 0.5, math.inf),
                            ("policy, eta 0.02: greedy", 0.02, math.inf),
                            ("policy, eta 50: the prior again", 50.0, math.inf),
                            ("policy, zeta 0.1: {:.0f} % of weight alive", 0.5, 0.1)):
        samples, alive = improved(eta, zeta)
        name = name.format(100 * alive)
        panels[name], value[name] = samples, q(samples).mean().item()
    _demo_figure(panels, value, q, path)
    return value


class _DemoFlow(torch.nn.Module):
    """The smallest thing `e_step` and `m_step_loss` accept: a flow over one 2-D action, without observations."""

    def __init__(self):
        super().__init__()
        sizes = (11, 64, 64, 64, 2)
        layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())]
        self.net = torch.nn.Sequential(*layers[:-1])

    def velocity(self, x, t):
        waves = math.pi * t * torch.arange(1, 5)                                         # lets v turn sharply in t
        return self.net(torch.cat([x, t, waves.sin(), waves.cos()], -1))

    @torch.no_grad()
    def sample(self, context, n, steps=40):
        x = torch.randn(len(context), n, 1, 2)
        for k in range(steps):
            x = x + self.velocity(x, torch.full_like(x[..., :1], k / steps)) / steps
        return x.clamp(-1, 1)

    def cfm_loss(self, context, actions, valid=None):
        noise, t = torch.randn_like(actions), torch.rand(*actions.shape[:2], 1, 1)
        return (self.velocity((1 - t) * noise + t * actions, t) - (actions - noise)).square().mean((-2, -1))


def _demo_figure(panels, value, q, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 6.5), layout="constrained")
    side = torch.linspace(-1, 1, 50)
    for axis, (name, a) in zip(axes.flat, panels.items()):
        axis.contour(side, side, q(torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)), 9, colors="0.85",
                     linewidths=0.8, linestyles="solid", zorder=0)
        axis.scatter(*a.T, s=3, c=q(a), cmap="plasma", vmin=-1.8, vmax=2.4, alpha=0.6, linewidths=0)
        axis.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
        axis.set_title(f"{name}\nE[Q] = {value[name]:.2f}", fontsize=10)
    figure.supxlabel("colour and grey lines: Q, growing to the right and upwards", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    results = _demo()
    for name, value in results.items():
        print(f"{name:39s} E[Q] = {value:6.3f}")
    old, best, new = list(results.values())[:3]
    print(f"one EM iteration reached {100 * (new - old) / (best - old):.0f} % of the exact gain; see bandit.png")

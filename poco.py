"""POCO, Posterior Optimization with Clipped Objective: policy improvement as inference (Sec. IV).

    python poco.py                              # draws bandit.png in 15 seconds: the idea in 2-D
    from poco import e_step, m_step_loss
    candidates, weights, stats = e_step(policy, q_fn, context, num_candidates=32, temperature=0.001)
    loss, stats = m_step_loss(
        policy, context, chunk, valid, candidates, weights, guidance=1.0, clip=0.15
    )

`policy` is anything with sample(context, n) and cfm_loss(context, actions, valid=None): a flow, a
diffusion model or a VLA's action head plugs in unchanged. `q_fn(context, candidates)` returns
(B, N). Needs torch, and matplotlib for the demo.
Not here: the policy (flow_policy.py), the critic (chunk_critic.py), Algorithm 1 (train_online.py),
exercises (course/).

Why the E-step is a softmax (Eq. 25-30). For one state, let pi be the prior, Q the evidence and
eta the temperature. Maximise over distributions r

    J(r) = E_r[Q] - eta KL(r || pi).

Define Z = sum_a pi(a) exp(Q(a)/eta) and q*(a) = pi(a) exp(Q(a)/eta) / Z. Then

    Q = eta (log q* - log pi + log Z).

Insert this Q into J and complete the KL:

    J(r) = eta E_r[log q* - log pi + log Z] - eta E_r[log r - log pi] = eta log Z - eta KL(r || q*).

The first term does not depend on r. The second is zero exactly at r = q*. This one line proves
optimality and uniqueness. It also gives the optimal value, eta log Z, and the loss of any other
choice. The Lagrangian of Eq. 26-29 finds the same stationary point: Q - eta log(q*/pi) is the
constant eta log Z. The temperature is fixed and the prior is the current policy, so unlike MPO
there is no dual problem to solve. Drawing candidates from pi already supplies the factor pi of
q*. That is why the particle weights use exp(Q/eta) alone.

What surrounds it. Eq. 9-12: the KL of a trajectory is the sum of its steps' KLs, and by the chain
rule the KL of a whole chunk is at least that of its first action. A bound that pays for chunks is
therefore still a bound, and the E-step and the M-step raise it in turn. Eq. 15: the M-step
maximises E_q*[log pi] minus lambda times the KL from the last policy. Eq. 18-21: pi has no
likelihood, but its flow-matching loss equals -log pi up to a constant. On samples of the last
policy it also equals that KL, up to another constant. Eq. 22 replaces those samples by replayed
chunks, which turns the second task into behaviour cloning: the anchor. Lambda disappears: Eq. 22
and 23 weigh the first task by beta instead.

Shapes: B batch, N candidates, M particles, H chunk length, A action. The sample axis is always 1.
"""

import math

import torch
from torch import Tensor


def posterior(prior: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Solve the E-step on a finite support: prior and q (..., N) -> probabilities (..., N), Eq. 13.

    The prior sums to 1 over the last dimension. It may hold zeros, which stay zero. Raises
    ValueError on a temperature below 1e-6 or a non-finite q.
    """
    eta = _checked(temperature, q)
    pi, q = _upcast(prior), _upcast(q)
    q = torch.where(pi > 0, q, -torch.inf)  # an action the prior excludes must not set the maximum
    return torch.softmax(pi.log() + (q - q.amax(-1, keepdim=True)) / eta, dim=-1)  # Eq. 13


@torch.no_grad()
def posterior_weights(q: Tensor, temperature: float) -> Tensor:
    """Weigh N candidates that were drawn from the policy: q (B, N) -> (B, N), Eq. 16-17.

    Rows sum to 1 and carry no gradient. Computed in float32 or better. The row maximum is
    subtracted before the division, so q = 1e6 with a temperature of 0.001 does not overflow and
    keeps the differences that q itself still holds.
    """
    eta = _checked(temperature, q)
    q = _upcast(q)
    w = torch.exp((q - q.amax(-1, keepdim=True)) / eta)  # Eq. 16
    return w / w.sum(-1, keepdim=True)  # Eq. 17


def clipped_surrogate(losses: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Compute the objective's second term: losses (B, N), weights (B, N) -> (B,).

    Each candidate's loss is clipped before it is weighed, and the clip is hard: above `clip` the
    gradient is zero, at or below it the gradient is exactly weight * gradient. clip = inf gives the
    unclipped objective, Eq. 22.
    """
    if not clip >= 0:
        raise ValueError(f"clip must be >= 0 (inf: no clipping), got {clip}")
    zeta = clip
    w = weights.detach()
    return (w * losses.clamp(0, zeta)).sum(-1)  # Eq. 22 and 23, second term


@torch.no_grad()
def e_step(
    policy, q_fn, context, num_candidates: int, temperature: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run the implicit E-step: draw N chunks per state from the policy, weigh them by their value.

    Returns candidates (B, N, H, A), weights (B, N) and stats. Nothing carries a gradient. Raises
    ValueError where the policy or q_fn returns another shape: broadcasting would hide it.
    """
    candidates = policy.sample(context, num_candidates)  # (B, N, H, A)
    if candidates.ndim != 4 or candidates.shape[1] != num_candidates:
        raise ValueError(
            f"policy.sample(context, {num_candidates}) must return chunks (B, N, H, A) with "
            f"N = {num_candidates}, got {tuple(candidates.shape)}"
        )
    q = _upcast(q_fn(context, candidates))
    if q.shape != candidates.shape[:2]:
        raise ValueError(
            f"q_fn must return one value per candidate, (B, N) = {tuple(candidates.shape[:2])}, "
            f"got {tuple(q.shape)}"
        )
    weights = posterior_weights(q, temperature)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    stats = {
        "q_mean": q.mean(),
        "q_min": q.min(),
        "q_max": q.max(),
        "q_spread": q.std(-1, correction=0).mean(),
        "ess": (1 / weights.square().sum(-1)).mean() / num_candidates,  # effective samples / N
        "kl": math.log(num_candidates) - entropy.mean(),  # KL(weights || uniform)
    }
    return candidates.detach(), weights, stats


@torch.no_grad()
def resample(candidates: Tensor, weights: Tensor, particles: int) -> tuple[Tensor, Tensor]:
    """Draw M of N weighted candidates by systematic resampling (ours): a cheaper M-step.

    candidates (B, N, H, A), weights (B, N) -> candidates (B, M, H, A), weights (B, M) = 1/M. A
    candidate is drawn M * weight times on average, so the expectation of the M-step is unchanged.
    Heavy candidates are drawn several times, each with its own (noise, t).
    """
    rows, n = weights.shape
    start = torch.rand(rows, 1, device=weights.device, dtype=weights.dtype)
    comb = (torch.arange(particles, device=weights.device) + start) / particles  # (B, M) in [0, 1)
    pick = torch.searchsorted(weights.cumsum(-1), comb.to(weights.dtype), right=True)
    pick = pick.clamp(max=n - 1)  # rounding may leave the last sum below 1
    row = torch.arange(rows, device=weights.device).unsqueeze(1)
    return candidates[row, pick], torch.full_like(comb, 1 / particles)


def m_step_loss(
    policy,
    context,
    chunk: Tensor,
    valid: Tensor | None,
    candidates: Tensor | None,
    weights: Tensor | None,
    guidance: float,
    clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the M-step's objective, Eq. 23: clone the replay chunk, distil weighted candidates.

    chunk (B, H, A) and valid (B, H) come from the replay, candidates and weights from `e_step`.
    guidance = 0 is exactly behaviour cloning, Eq. 24: candidates and weights are not looked at and
    may be None. Losses are means over a chunk's cells, so `clip` means the same for every horizon
    and action size. Returns the loss and stats: clip_frac is the share of candidates above clip,
    alive_mass the posterior weight that still gets a gradient. Raises ValueError where cfm_loss
    returns another shape than one loss per chunk.
    """
    bc = _loss_per_chunk(policy, context, chunk.unsqueeze(1), valid).mean()
    if guidance == 0:
        return bc, {"bc": bc.detach()}
    # No mask: all steps of a candidate are real (the authors' code takes the replay chunk's mask).
    losses = _loss_per_chunk(policy, context, candidates.detach(), None)  # (B, N)
    surrogate = clipped_surrogate(losses, weights, clip).mean()
    beta = guidance
    loss = bc + beta * surrogate  # Eq. 23
    alive = losses.detach() <= clip
    stats = {
        "bc": bc.detach(),
        "surrogate": surrogate.detach(),
        "clip_frac": 1 - alive.float().mean(),
        "alive_mass": (weights.detach() * alive).sum(-1).mean(),
    }
    return loss, stats


def _loss_per_chunk(policy, context, actions: Tensor, valid: Tensor | None) -> Tensor:
    """Call the policy's cfm_loss and insist on one loss per chunk, (B, N)."""
    losses = policy.cfm_loss(context, actions, valid=valid)
    if losses.shape != actions.shape[:2]:
        raise ValueError(
            f"policy.cfm_loss must return one loss per chunk, (B, N) = {tuple(actions.shape[:2])}, "
            f"got {tuple(losses.shape)}: take the mean over the chunk's cells only"
        )
    return losses


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _checked(temperature: float, q: Tensor) -> float:
    if not temperature >= 1e-6:
        raise ValueError(f"temperature must be at least 1e-6, got {temperature}")
    if not _capturing(q) and not torch.isfinite(q).all():
        raise ValueError(
            "the critic returned a non-finite Q: training has diverged (lower the learning rate, "
            "or check rewards and observations for NaN)"
        )
    return temperature


def _capturing(q: Tensor) -> bool:
    """Say whether a CUDA graph is being captured: no number can be read back meanwhile."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- python poco.py: the idea in a 2-D action space ----------------------------------------------


class _DemoFlow(torch.nn.Module):
    """The smallest policy that e_step and m_step_loss accept: a flow over one 2-D action."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(11, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 2),
        )

    def velocity(self, x, t):
        waves = math.pi * t * torch.arange(1, 5)  # sines let the velocity turn sharply in t
        return self.net(torch.cat([x, t, waves.sin(), waves.cos()], -1))

    @torch.no_grad()
    def sample(self, context, n, steps=40):
        x = torch.randn(len(context), n, 1, 2)
        for k in range(steps):
            x = x + self.velocity(x, torch.full_like(x[..., :1], k / steps)) / steps
        return x.clamp(-1, 1)

    def cfm_loss(self, context, actions, valid=None):
        noise = torch.randn_like(actions)
        t = torch.rand(*actions.shape[:2], 1, 1)
        x = (1 - t) * noise + t * actions
        return (self.velocity(x, t) - (actions - noise)).square().mean((-2, -1))


class _Bandit:
    """One state, six habits around a circle, and a value that grows to the right and upwards."""

    def __init__(self):
        angle = torch.arange(6) * math.pi / 3
        self.modes = 0.65 * torch.stack([angle.cos(), angle.sin()], -1)
        self.width = 0.1
        self.context = torch.zeros(128, 0)  # no observation

    def q(self, action):
        return 2 * action[..., 0] + action[..., 1]

    def demonstrations(self, n):
        habit = self.modes[torch.randint(6, (n,))]
        return (habit + self.width * torch.randn(n, 2)).unsqueeze(1)  # (n, H = 1, A = 2)

    def exact_prior(self, grid):
        distance = (grid[:, None] - self.modes).square().sum(-1)
        density = torch.exp(-distance / (2 * self.width**2)).sum(-1)
        return density / density.sum()


def _train(policy, steps, rate, loss):
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)  # averages out the loss's noise
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _improved(prior, bandit, temperature, clip):
    """Run one EM iteration from the prior and return 2500 samples and alive_mass.

    A guidance of 50 all but removes the anchor to the demonstrations.
    """
    import copy

    candidates, weights, _ = e_step(
        prior, lambda _, a: bandit.q(a[:, :, 0]), bandit.context, 64, temperature
    )
    policy = copy.deepcopy(prior)

    def loss(rows):
        chunk = bandit.demonstrations(len(rows))
        return m_step_loss(
            policy, bandit.context[rows], chunk, None, candidates[rows], weights[rows], 50.0, clip
        )

    _train(policy, 1000, 0.005, lambda: loss(torch.randint(128, (8,)))[0])
    samples = policy.sample(bandit.context[:1], 2500)[0, :, 0]
    return samples, loss(torch.arange(128))[1]["alive_mass"].item()


def _demo(path: str = "bandit.png") -> dict[str, float]:
    """Draw the prior, its posterior and policies after one M-step. Return each one's E[Q]."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    bandit = _Bandit()
    prior = _DemoFlow()

    def cloning():
        demonstrations = bandit.demonstrations(256).unsqueeze(1)
        return prior.cfm_loss(bandit.context, demonstrations).mean()

    _train(prior, 2500, 0.01, cloning)
    side = torch.linspace(-1, 1, 201)
    grid = torch.cartesian_prod(side, side)
    exact = bandit.exact_prior(grid)
    panels = {}
    value = {}
    for name, p in (
        ("prior", exact),
        ("exact posterior, eta 0.5", posterior(exact, bandit.q(grid), 0.5)),
    ):
        panels[name] = grid[p.multinomial(2500, replacement=True)]
        value[name] = (p * bandit.q(grid)).sum().item()
    for name, eta, zeta in (
        ("policy after the M-step, eta 0.5", 0.5, math.inf),
        ("policy, eta 0.02: greedy", 0.02, math.inf),
        ("policy, eta 50: the prior again", 50.0, math.inf),
        ("policy, zeta 0.1: {:.0f} % of weight alive", 0.5, 0.1),
    ):
        samples, alive = _improved(prior, bandit, eta, zeta)
        name = name.format(100 * alive)
        panels[name] = samples
        value[name] = bandit.q(samples).mean().item()
    _demo_figure(panels, value, bandit.q, path)
    return value


def _demo_figure(panels, value, q, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 3, figsize=(9, 6.8), layout="constrained", sharex=True, sharey=True
    )
    side = torch.linspace(-1, 1, 50)
    levels = q(torch.stack(torch.meshgrid(side, side, indexing="xy"), -1))
    for axis, (name, a) in zip(axes.flat, panels.items()):
        axis.contour(
            side, side, levels, 9, colors="0.85", linewidths=0.8, linestyles="solid", zorder=0
        )
        dots = axis.scatter(*a.T, s=3, c=q(a), cmap="plasma", vmin=-1.8, vmax=2.4, alpha=0.6)
        axis.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axis.set_title(f"{name}\nE[Q] = {value[name]:.2f}", fontsize=10)
    figure.supxlabel("action, first dimension", fontsize=10)
    figure.supylabel("action, second dimension", fontsize=10)
    bar = figure.colorbar(dots, ax=axes, shrink=0.6, label="value Q of the action")
    bar.solids.set(alpha=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    results = _demo()
    for name, value in results.items():
        print(f"{name:39s} E[Q] = {value:6.3f}")
    old, best, new = list(results.values())[:3]
    share = 100 * (new - old) / (best - old)
    print(f"one EM iteration reached {share:.0f} % of the exact gain; see bandit.png")

"""poco.py, theorem by theorem: the E-step is the exact posterior, the M-step distils it.

    python -m pytest tests/method/test_poco.py        # -k eq17 selects the tests that cite Eq. 17

J(r) = E_r[Q] - eta KL(r || pi) and q* is its maximiser. Algebra runs in float64. Q is drawn as eta
times a bounded number, so every eta is as hard as any other. Robustness runs in the precisions that
training uses.

Three statements look true and are false, hence exercises and not tests. "Shifting Q by 1e6 changes
nothing in float32": its step there is 1/16. "Clipping never increases the gradient's norm": what it
drops may have been cancelling. "bfloat16 is enough for a softmax": it sums to 1 within 0.3 % only.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.testing import assert_close

import poco
from poco import (
    clipped_surrogate,
    e_step,
    m_step_loss,
    posterior,
    posterior_weights,
    resample,
)

SEEDS = st.integers(0, 2**31 - 1)
ETAS = st.floats(-3, 3).map(lambda power: 10**power)
FEW = settings(max_examples=30)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rows(seed, count=1, states=3, scale=2.0):
    """`count` random tensors (states, n), float64, with the same random n of 2 to 12."""
    g = generator(seed)
    n = int(torch.randint(2, 13, (), generator=g))
    return [scale * torch.randn(states, n, generator=g, dtype=torch.float64) for _ in range(count)]


def problem(seed, eta, scale=4.0):
    """A random prior, Q and rival distribution r, each (3, n)."""
    prior, q, rival = rows(seed, 3)
    return prior.softmax(-1), eta * scale * q, rival.softmax(-1)


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def objective(r, prior, q, eta):
    return (r * q).sum(-1) - eta * kl(r, prior)


def log_z(prior, q, eta):
    return torch.logsumexp(prior.log() + q / eta, -1)


# ---- the derivation in poco.py's docstring, line by line ----


@given(SEEDS, ETAS)
def test_the_posterior_is_the_prior_times_the_exponentiated_evidence(seed, eta):
    """q*(a) = pi(a) exp(Q(a)/eta) / Z. Eq. 13."""
    prior, q, _ = problem(seed, eta)
    close(posterior(prior, q, eta), prior * (q / eta).exp() / log_z(prior, q, eta).exp()[:, None])


@given(SEEDS, ETAS)
def test_evidence_is_eta_times_the_log_ratio_plus_a_constant(seed, eta):
    """Q = eta (log q* - log pi + log Z), the stationarity of the Lagrangian. Eq. 27-28."""
    prior, q, _ = problem(seed, eta)
    ratio = posterior(prior, q, eta).log() - prior.log()
    close(ratio + log_z(prior, q, eta)[:, None], q / eta, 1e-8)


@given(SEEDS, ETAS)
def test_the_optimal_value_is_eta_log_z(seed, eta):
    """J(q*) = eta log Z. Eq. 12-13."""
    prior, q, _ = problem(seed, eta)
    close(objective(posterior(prior, q, eta), prior, q, eta) / eta, log_z(prior, q, eta))


@given(SEEDS, ETAS)
def test_every_other_distribution_pays_eta_times_its_kl_to_the_posterior(seed, eta):
    """J(q*) - J(r) = eta KL(r || q*) for every r: optimality and uniqueness in one line. Eq. 13."""
    prior, q, rival = problem(seed, eta)
    star = posterior(prior, q, eta)
    gap = objective(star, prior, q, eta) - objective(rival, prior, q, eta)
    close(gap / eta, kl(rival, star), 1e-8)
    assert (gap >= 0).all()


@settings(max_examples=15)
@given(SEEDS, ETAS)
def test_a_numerical_optimiser_finds_the_same_distribution(seed, eta):
    """argmax_r J(r) = q*, by BFGS over the logits of r. Eq. 25-30."""
    prior, q, _ = (x[0] for x in problem(seed, eta, scale=1.0))

    def loss(logits):
        x = torch.tensor(logits, requires_grad=True)
        value = -objective(x.softmax(-1), prior, q, eta) / eta
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    result = minimize(loss, np.zeros(len(q)), jac=True, method="BFGS", options={"gtol": 1e-8})
    close(torch.tensor(result.x).softmax(-1), posterior(prior, q, eta), 1e-4)
    close(-result.fun, log_z(prior, q, eta).item(), 1e-7)


@given(SEEDS, ETAS, st.floats(0.05, 1.0), st.integers(1, 5))
def test_exponentiated_gradient_reaches_the_posterior_geometrically(seed, eta, f, steps):
    """r <- r exp((f/eta) dJ/dr) shrinks log(r/q*) by 1 - f per step; f = 1 lands at once. Eq.
    13."""
    prior, q, _ = problem(seed, eta)
    log_r = prior.log()
    for _ in range(steps):
        slope = q - eta * (log_r - prior.log())
        log_r = (log_r + f / eta * slope).log_softmax(-1)
    start, end = ((x - posterior(prior, q, eta).log()) for x in (prior.log(), log_r))
    close(
        end - end.mean(-1, keepdim=True),
        (1 - f) ** steps * (start - start.mean(-1, keepdim=True)),
        1e-8,
    )


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 4))
def test_the_chunk_kl_bounds_the_first_actions_kl(seed, horizon):
    """KL of the first h steps grows with h; chunk minus first action is the expected conditional
    KL. Eq. 10-11."""
    g = generator(seed)
    shape = (3,) * horizon
    prior = torch.randn(3**horizon, generator=g, dtype=torch.float64).softmax(-1)
    q = posterior(prior, torch.randn(3**horizon, generator=g, dtype=torch.float64), 0.5)
    first = [x.reshape(3, -1).sum(1) for x in (q, prior)]
    conditional = [x.reshape(3, -1) / first[i][:, None] for i, x in enumerate((q, prior))]
    partial = []
    for h in range(1, horizon + 1):
        rest = tuple(range(h, horizon))
        partial.append(
            kl(*(x.reshape(shape).sum(rest).flatten() if rest else x for x in (q, prior)))
        )
    assert all(later >= earlier - 1e-12 for earlier, later in zip(partial, partial[1:]))
    close(partial[-1] - partial[0], (first[0] * kl(*conditional)).sum())


# ---- what the posterior does as eta, Q and the prior change ----


@given(SEEDS, ETAS, st.floats(1.01, 100))
def test_a_larger_eta_stays_closer_to_the_prior_and_gains_less(seed, eta, factor):
    """E_q*[Q] and KL(q* || pi) both fall as eta rises, and E_q*[Q] >= E_pi[Q]. Eq. 13."""
    prior, q, _ = problem(seed, eta)
    sharp, soft = posterior(prior, q, eta), posterior(prior, q, eta * factor)
    value = [(r * q / eta).sum(-1) for r in (prior, soft, sharp)]
    assert (value[0] <= value[1] + 1e-9).all() and (value[1] <= value[2] + 1e-9).all()
    assert (kl(soft, prior) <= kl(sharp, prior) + 1e-9).all()


@given(SEEDS, ETAS)
def test_the_gain_per_inverse_temperature_is_the_variance_of_q(seed, eta):
    """d E_q*[Q] / d(1/eta) = Var_q*[Q]. Eq. 13."""
    prior, q, _ = problem(seed, eta, scale=1.0)
    star, unit = posterior(prior, q, eta), q / eta
    up, down = ((posterior(prior, q, eta / (1 + h)) * unit).sum(-1) for h in (1e-5, -1e-5))
    mean = (star * unit).sum(-1, keepdim=True)
    close((up - down) / 2e-5, (star * (unit - mean).square()).sum(-1), 1e-6)


@given(SEEDS)
def test_a_huge_eta_returns_the_prior(seed):
    """eta -> inf: q* -> pi, and particle weights become uniform. Eq. 13."""
    prior, q, _ = problem(seed, 1.0)
    close(posterior(prior, q, 1e12), prior)
    close(posterior_weights(q, 1e12), torch.full_like(q, 1 / q.shape[1]))


@given(SEEDS)
def test_a_tiny_eta_returns_the_best_and_splits_ties_by_the_prior(seed):
    """eta -> 0: q* -> pi restricted to argmax Q. Eq. 13."""
    prior, q, _ = problem(seed, 1.0)
    q = q.round()
    best = prior * (q == q.amax(-1, keepdim=True))
    close(posterior(prior, q, 1e-3), best / best.sum(-1, keepdim=True))


@given(SEEDS, ETAS, ETAS)
def test_evidence_adds_up(seed, eta1, eta2):
    """Conditioning on Q1/eta1 and then on Q2/eta2 is conditioning on their sum: inference composes.
    Eq. 3, 13."""
    logits, u1, u2 = rows(seed, 3)
    prior = logits.softmax(-1)
    twice = posterior(posterior(prior, eta1 * u1, eta1), eta2 * u2, eta2)
    close(twice, posterior(prior, u1 + u2, 1.0))


@given(SEEDS, ETAS, st.floats(-100, 100), ETAS)
def test_only_differences_of_q_over_eta_matter(seed, eta, shift, factor):
    """Q + c gives the same posterior, and so does (kQ, k eta). Eq. 13, 17."""
    prior, q, _ = problem(seed, eta)
    for f in (lambda q, eta: posterior(prior, q, eta), posterior_weights):
        close(f(q + eta * shift, eta), f(q, eta))
        close(f(factor * q, factor * eta), f(q, eta))


@given(SEEDS, ETAS)
def test_order_and_neighbours_do_not_matter(seed, eta):
    """Permuting the candidates permutes the weights; a state's weights do not depend on its batch.
    Eq. 17."""
    prior, q, _ = problem(seed, eta)
    order = torch.randperm(q.shape[1], generator=generator(seed))
    for f in (lambda i: posterior(prior[i], q[i], eta), lambda i: posterior_weights(q[i], eta)):
        together = f((slice(None), order))
        for state in range(len(q)):
            close(together[state : state + 1], f((slice(state, state + 1),))[:, order])


def test_what_the_prior_excludes_stays_excluded_and_unnoticed():
    """pi(a) = 0 implies q*(a) = 0, however good a is, and leaves the others as if a did not exist.
    Eq. 13."""
    prior, q = torch.tensor([0.0, 0.3, 0.7]), torch.tensor([1e6, 0.001, 0.002])
    close(posterior(prior, q, 1e-3)[1:], posterior(prior[1:], q[1:], 1e-3), 1e-6)
    assert posterior(prior, q, 1e-3)[0] == 0


# ---- particles ----


@given(SEEDS, ETAS)
def test_particles_carry_the_prior(seed, eta):
    """Repeat action i n_i times and add its weights up: the posterior with pi_i = n_i / N. Eq. 13 =
    Eq. 17."""
    _, q, _ = problem(seed, eta)
    counts = torch.randint(1, 6, (q.shape[1],), generator=generator(seed))
    action = torch.repeat_interleave(torch.arange(len(counts)), counts)
    weights = posterior_weights(q[:, action], eta)
    total = torch.zeros_like(q).index_add(1, action, weights)
    close(total, posterior((counts / counts.sum()).double().expand_as(q), q, eta), 1e-7)


def test_gaussian_particles_find_the_gaussian_posterior():
    """pi = N(0, s^2), Q = g a: the mean moves by s^2 g / eta, and N particles find it to
    O(1/sqrt(N)). Eq. 16-17."""
    s, g, eta, error = 0.8, 1.5, 2.0, []
    for n in (64, 4096):
        a = s * torch.randn(400, n, generator=generator(n), dtype=torch.float64)
        mean = (posterior_weights(g * a, eta) * a).sum(-1)
        error.append((mean - s**2 * g / eta).square().mean().sqrt())
    assert error[1] < 0.02 and 6.5 < error[0] / error[1] < 9.5  # sqrt(4096 / 64) = 8


@given(st.floats(-1e6, 1e6), ETAS)
def test_a_single_candidate_always_weighs_one(q, eta):
    """N = 1: w = 1 whatever Q, so the critic has no say. Eq. 17."""
    assert posterior_weights(torch.tensor([[q]]), eta).item() == 1.0


@given(SEEDS, ETAS)
def test_a_small_enough_eta_is_exactly_best_of_n(seed, gap):
    """(Q1 - Q2) / eta > 104 underflows float32: one-hot weights, the surrogate is the best one's
    loss. Eq. 17, 23."""
    losses = rows(seed)[0].abs().float()
    q = (
        gap * torch.rand(losses.shape, generator=generator(seed)).argsort(-1).argsort(-1).float()
    )  # `gap` apart
    best = q.argmax(-1, keepdim=True)
    weights = posterior_weights(q, gap / 105)
    assert torch.equal(weights, torch.zeros_like(q).scatter(1, best, 1.0))
    assert torch.equal(
        clipped_surrogate(losses, weights, 1.0), losses.clamp(max=1).gather(1, best)[:, 0]
    )


@given(
    SEEDS,
    ETAS,
    st.floats(0, 6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@example(seed=0, eta=1e-3, power=2, dtype=torch.float16)
def test_weights_survive_any_q_in_any_precision(seed, eta, power, dtype):
    """Finite, >= 0, rows sum to 1, in float32 or better, for |Q| up to 1e6 and eta from 1e-3. Eq.
    16-17."""
    q = (10**power * rows(seed)[0].tanh()).to(dtype)
    q = q.clamp(-6e4, 6e4) if dtype == torch.float16 else q
    for weights in (posterior_weights(q, eta), posterior(torch.ones_like(q) / 2**4, q, eta)):
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (weights >= 0).all() and torch.isfinite(weights).all()
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
        close(weights.double(), (q.double() / eta).softmax(-1), 1e-4)


def test_small_differences_of_large_q_are_kept():
    """The maximum is subtracted before the division: at Q = 1e6 float32 still tells 1/16 apart. Eq.
    16."""
    steps = torch.arange(4) / 16
    exact = (steps.double() / 1e-2).softmax(-1)
    for weights in (
        posterior_weights(1e6 + steps[None], 1e-2)[0],
        posterior(torch.ones(4) / 4, 1e6 + steps, 1e-2),
    ):
        close(weights.double(), exact, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_q_is_refused(bad):
    for q in (torch.tensor([[0.0, bad]]), torch.full((1, 2), bad)):
        with pytest.raises(ValueError, match="non-finite Q"):
            posterior_weights(q, 1.0)
        with pytest.raises(ValueError, match="non-finite Q"):
            posterior(torch.ones(1, 2) / 2, q, 1.0)
        with pytest.raises(ValueError, match="non-finite Q"):
            e_step(Policy(), lambda *_, q=q: q, torch.zeros(1, 3), 2, 1.0)


@pytest.mark.parametrize("eta", [0.0, 9.9e-7, -1.0, math.nan])
def test_a_vanishing_temperature_is_refused(eta):
    for call in (
        lambda: posterior_weights(torch.zeros(1, 2), eta),
        lambda: posterior(torch.ones(2) / 2, torch.zeros(2), eta),
    ):
        with pytest.raises(ValueError, match="temperature must be at least 1e-6"):
            call()


# ---- the E-step as it is called ----


class Policy(torch.nn.Module):
    """One trainable mean; a chunk's loss is its mean squared distance. Its samples carry a gradient
    on purpose."""

    def __init__(self, horizon=2, actions=3, dtype=torch.float64):
        super().__init__()
        self.mean = torch.nn.Parameter(
            torch.linspace(-0.5, 0.5, horizon * actions, dtype=dtype).reshape(horizon, -1)
        )
        self.calls = []

    def sample(self, context, n):
        with torch.enable_grad():
            noise = torch.randn(
                len(context), n, *self.mean.shape, generator=generator(n), dtype=self.mean.dtype
            )
            return self.mean + noise

    def cfm_loss(self, context, actions, valid=None):
        self.calls.append((context, actions, valid))
        error = (actions - self.mean).square()
        mask = torch.ones_like(error) if valid is None else valid[:, None, :, None].expand_as(error)
        return (error * mask).sum((-2, -1)) / mask.sum((-2, -1))


@FEW
@given(SEEDS, ETAS, st.integers(1, 40))
def test_e_step_weighs_the_policys_own_samples(seed, eta, n):
    """Candidates are draws from the policy, weights posterior_weights of their Q, stats describe
    them. Eq. 16-17."""
    policy, context = Policy(), torch.randn(3, 4, generator=generator(seed))
    q_fn = lambda context, a: eta * a.sum((-2, -1)) + context.sum(-1, keepdim=True)  # noqa: E731
    candidates, weights, stats = e_step(policy, q_fn, context, n, eta)
    q = q_fn(context, policy.sample(context, n)).detach()
    assert torch.equal(candidates, policy.sample(context, n)) and torch.equal(
        weights, posterior_weights(q, eta)
    )
    entropy = torch.stack([-torch.xlogy(w, w).sum() for w in weights])
    ess = torch.stack([1 / w.square().sum() for w in weights])
    close(stats["kl"], math.log(n) - entropy.mean(), 1e-8)
    close(stats["ess"] * n, ess.mean())
    assert (
        (ess >= 1 - 1e-9).all() and (ess <= n + 1e-9).all() and (entropy.exp() >= ess - 1e-9).all()
    )
    close(
        torch.stack([stats[k] for k in ("q_mean", "q_min", "q_max", "q_spread")]),
        torch.stack(
            [q.mean(), q.min(), q.max(), torch.stack([row.std(correction=0) for row in q]).mean()]
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_e_step_lets_no_gradient_through(dtype):
    """Candidates, weights and stats are constants of the M-step, though policy and critic are
    trainable. Eq. 23."""
    policy, scale = Policy(dtype=dtype), torch.ones((), dtype=dtype, requires_grad=True)

    def q_fn(context, candidates):
        with torch.enable_grad():
            return scale * candidates.sum((-2, -1))

    candidates, weights, stats = e_step(policy, q_fn, torch.zeros(2, 4), 5, 0.1)
    assert not any(x.requires_grad for x in (candidates, weights, *stats.values()))
    assert candidates.dtype == dtype and weights.device == candidates.device
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = Policy()
    plain.sample = lambda context, n: plain.mean.expand(len(context), n, -1, -1)
    _, _, stats = e_step(plain, lambda _, a: a.sum((-2, -1)), torch.zeros(2, 4), 5, 0.1)
    assert not any(x.requires_grad for x in stats.values())
    assert not posterior_weights(scale.expand(1, 3), 1.0).requires_grad


# ---- the M-step ----


def losses_and_weights(seed):
    """Losses (3, n) between 0 and about 6 and weights (3, n) whose rows sum to 1."""
    losses, weights = rows(seed, 2)
    return losses.abs(), weights.softmax(-1)


@pytest.mark.parametrize("shape", [(), (3,), (3, 8, 1), (3, 7), (8, 3)])
def test_a_q_fn_of_another_shape_is_refused_by_name(shape):
    """Broadcasting would hide it: (B, N, 1) weights every state by the whole batch. Eq. 16."""
    with pytest.raises(ValueError, match=r"q_fn must return one value per candidate, .*\(3, 8\)"):
        e_step(Policy(), lambda *_: torch.zeros(shape), torch.zeros(3, 4), 8, 1.0)


@pytest.mark.parametrize("shape", [(3, 2, 3), (3, 7, 2, 3), (3, 8, 6)])
def test_samples_of_another_shape_are_refused_by_name(shape):
    policy = Policy()
    policy.sample = lambda context, n: torch.zeros(shape)
    with pytest.raises(ValueError, match=r"policy.sample\(context, 8\) must return chunks"):
        e_step(policy, lambda _, a: a.flatten(2).sum(-1), torch.zeros(3, 4), 8, 1.0)


@pytest.mark.parametrize(
    "reduce", [lambda x: x.mean(), lambda x: x.mean(1), lambda x: x[..., None]]
)
def test_a_loss_of_another_shape_is_refused_by_name(reduce):
    """A scalar loss would clone, but no candidate would be clipped or weighed alone. Eq. 23."""
    policy = Policy()
    loss_per_chunk = policy.cfm_loss
    policy.cfm_loss = lambda context, actions, valid=None: reduce(
        loss_per_chunk(context, actions, valid)
    )
    chunk = torch.zeros(3, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cfm_loss must return one loss per chunk"):
        m_step_loss(policy, torch.zeros(3, 4), chunk, None, None, None, 0.0, 0.1)


# ---- resampling ----


def numbered(rows, n):
    """Candidates (rows, n, 1, 1) that say which they are: state * 100 + candidate."""
    return (100 * torch.arange(rows)[:, None] + torch.arange(n))[..., None, None].double()


@FEW
@given(SEEDS, st.integers(1, 9))
def test_systematic_resampling_draws_floor_or_ceil_of_m_times_the_weight(seed, particles):
    """Candidate j is drawn floor(M w_j) or ceil(M w_j) times, in its own state; weights 1/M."""
    weights = rows(seed)[0].softmax(-1)
    torch.manual_seed(seed)
    drawn, equal = resample(numbered(*weights.shape), weights, particles)
    assert drawn.shape == (3, particles, 1, 1)
    close(equal, torch.full((3, particles), 1 / particles, dtype=torch.float64))
    picks = drawn[..., 0, 0] - 100 * torch.arange(3)[:, None]
    counts = (picks[..., None] == torch.arange(weights.shape[1])).sum(1)
    assert (counts.sum(1) == particles).all()
    assert (counts >= (particles * weights - 1e-9).floor()).all()
    assert (counts <= (particles * weights + 1e-9).ceil()).all()


def test_resampling_leaves_the_expectation_of_the_m_step():
    """The mean loss of M particles is, over many draws, the weighted loss of all N. Eq. 22."""
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).double().expand(40_000, -1)
    losses = torch.tensor([1.0, -2.0, 4.0, 8.0, 1e6]).double()
    torch.manual_seed(0)
    candidates = losses.expand(40_000, -1)[..., None, None]
    drawn, equal = resample(candidates, weights, 3)
    close((drawn[..., 0, 0] * equal).sum(1).mean(), (weights[0] * losses).sum(), 0.02)


def test_resampling_survives_rounding_and_carries_no_gradient():
    """The last cumulated weight may fall short of 1; a one-hot weight fills all particles."""
    weights = torch.full((50, 3), 1 / 3, requires_grad=True)
    drawn, equal = resample(torch.randn(50, 3, 2, 2, requires_grad=True), weights * 0.999, 7)
    assert torch.isfinite(drawn).all() and not drawn.requires_grad and not equal.requires_grad
    one_hot = torch.eye(4)
    drawn, _ = resample(numbered(4, 4), one_hot, 5)
    assert torch.equal(drawn[..., 0, 0], (101 * torch.arange(4.0))[:, None].double().expand(-1, 5))


def test_each_state_has_its_own_comb():
    """States with equal weights do not all draw the same candidates."""
    torch.manual_seed(0)
    drawn, _ = resample(numbered(64, 8) % 100, torch.full((64, 8), 1 / 8), 1)
    assert len(drawn.unique()) == 8


@given(SEEDS, st.floats(0, 5))
def test_each_loss_is_clipped_before_it_is_weighed(seed, clip):
    """The surrogate is sum_j w_j min(loss_j, zeta), one number per state. Eq. 23."""
    losses, weights = losses_and_weights(seed)
    by_hand = [
        sum(float(w) * min(float(x), clip) for w, x in zip(*row)) for row in zip(weights, losses)
    ]
    close(clipped_surrogate(losses, weights, clip), torch.tensor(by_hand, dtype=torch.float64))


@given(SEEDS, st.floats(0.01, 5))
def test_above_the_clip_the_gradient_is_zero_and_below_it_is_the_weight(seed, clip):
    """d/dloss = w where loss <= zeta, exactly, and 0 where loss > zeta, exactly; weights get none.
    Eq. 23."""
    losses, weights = losses_and_weights(seed)
    losses[0, 0] = clip  # the boundary itself counts as below
    losses.requires_grad_()
    weights.requires_grad_()
    clipped_surrogate(losses, weights, clip).sum().backward()
    assert torch.equal(losses.grad, torch.where(losses <= clip, weights, 0.0).detach())
    assert weights.grad is None


@given(SEEDS, st.floats(0, 5), st.floats(0, 5))
def test_the_surrogate_grows_with_the_clip_up_to_the_unclipped_one(seed, a, b):
    """Nondecreasing in zeta, at most zeta, and zeta = inf is Eq. 22 exactly. Eq. 23."""
    losses, weights = losses_and_weights(seed)
    low, high = (clipped_surrogate(losses, weights, clip) for clip in sorted((a, b)))
    assert (low <= high).all() and (high <= max(a, b) + 1e-12).all()
    assert torch.equal(clipped_surrogate(losses, weights, math.inf), (weights * losses).sum(-1))


@pytest.mark.parametrize("clip", [-0.1, -math.inf, math.nan])
def test_a_negative_clip_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be >= 0"):
        clipped_surrogate(torch.ones(1, 2), torch.ones(1, 2) / 2, clip)


@FEW
@given(SEEDS, st.floats(0.01, 20), st.floats(0.2, 3))
def test_the_m_step_is_cloning_plus_beta_times_the_surrogate(seed, guidance, clip):
    """J = E[L(chunk) + beta sum_j w_j clip(L(a_j), 0, zeta)], as loops; `valid` masks the chunk
    only. Eq. 23."""
    policy, g = Policy(), generator(seed)
    chunk, candidates = (
        torch.randn(4, *n, 2, 3, generator=g, dtype=torch.float64) for n in ((), (5,))
    )
    weights = torch.randn(4, 5, generator=g, dtype=torch.float64).softmax(-1)
    valid = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    loss, stats = m_step_loss(policy, None, chunk, valid, candidates, weights, guidance, clip)
    square = [(a - policy.mean.detach()).square() for a in (chunk, candidates)]
    bc = surrogate = above = alive = 0.0
    for b in range(4):
        bc += float(square[0][b][: int(valid[b].sum())].mean()) / 4
        for j in range(5):
            one = float(square[1][b, j].mean())
            surrogate += float(weights[b, j]) * min(one, clip) / 4
            above += (one > clip) / 20
            alive += (one <= clip) * float(weights[b, j]) / 4
    close(loss.item(), bc + guidance * surrogate)
    close(
        [stats[k].item() for k in ("bc", "surrogate", "clip_frac", "alive_mass")],
        [bc, surrogate, above, alive],
        1e-6,
    )
    assert policy.calls[1][2] is None
    highest = policy.cfm_loss(None, candidates).max().item()  # at the clip, not above it
    stats = m_step_loss(policy, None, chunk, valid, candidates, weights, guidance, highest)[1]
    assert stats["clip_frac"] == 0 and abs(stats["alive_mass"] - 1) < 1e-9


@given(SEEDS)
def test_the_m_step_trains_the_policy_only(seed):
    """Candidates and weights are constants even if they arrive with a gradient, and stats are
    constants too. Eq. 23."""
    policy, g = Policy(), generator(seed)
    chunk = torch.randn(2, 2, 3, generator=g, dtype=torch.float64)
    candidates = torch.randn(2, 4, 2, 3, generator=g, dtype=torch.float64).requires_grad_()
    logits = torch.randn(2, 4, generator=g, dtype=torch.float64).requires_grad_()
    loss, stats = m_step_loss(policy, None, chunk, None, candidates, logits.softmax(-1), 1.0, 1.0)
    loss.backward()
    assert candidates.grad is None and logits.grad is None and policy.mean.grad.abs().sum() > 0
    assert not any(x.requires_grad for x in stats.values())


class Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"'{name}' of something that cloning must not look at")


def test_without_guidance_the_m_step_is_behaviour_cloning():
    """beta = 0: loss and gradient are bitwise those of cloning; candidates and weights are not
    looked at. Eq. 24."""
    policy, chunk = Policy(), torch.randn(4, 2, 3, generator=generator(0), dtype=torch.float64)
    valid, context = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 1)
    for nothing in (None, Untouchable()):
        loss, stats = m_step_loss(policy, context, chunk, valid, nothing, nothing, 0, 0.15)
        cloning = policy.cfm_loss(context, chunk[:, None], valid).mean()
        gradients = [torch.autograd.grad(x, policy.mean)[0] for x in (loss, cloning)]
        assert torch.equal(loss, cloning) and torch.equal(*gradients)
        assert list(stats) == ["bc"] and torch.equal(stats["bc"], cloning.detach())
    assert len(policy.calls) == 4 and all(
        call[0] is context and call[2] is valid for call in policy.calls
    )


@pytest.mark.slow
def test_the_demo_reaches_the_exact_gain_and_draws_it(tmp_path):
    """`python poco.py`: after one M-step the policy has at least 90 % of the exact posterior's
    gain. Eq. 13, 23."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, poco.__file__],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    percent = float(out.stdout.strip().splitlines()[-1].split("reached ")[1].split(" %")[0])
    assert 90 <= percent <= 110
    picture = Path(tmp_path, "bandit.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bandit.png"]

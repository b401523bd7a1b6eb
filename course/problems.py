"""What the checker knows about each exercise: inputs, right values, and the usual mistakes.

    from problems import PROBLEMS           # used by checker.py; the tests use the same table

The right values are computed by another route than the one that the exercise asks for: by
quadrature, by brute force, or by the project's own code. Each mistake is a wrong function with
the misconception behind it. A hand-in that returns the same wrong numbers gets that message. The
tests hand in every mistake and insist on its message.
Not here: how a hand-in is loaded and judged (checker.py), the blanks (exercises.py).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.integrate import quad  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.stats import chi2  # noqa: E402

import poco  # noqa: E402

TIMES = (np.arange(2000) + 0.5) / 2000  # flow times, the middle of 2,000 equal parts


def call(function, inputs):
    """Observe a hand-in by what it returns."""
    return function(*inputs)


@dataclass(frozen=True)
class Problem:
    """One exercise: `cases(random)` lists its inputs, `truth(*inputs)` gives the right values.

    `observe(function, inputs)` turns a hand-in into the numbers that are compared; for most
    exercises it just calls the function. `tolerance` is absolute, in units of the largest right
    value where that exceeds 1.
    """

    key: str
    name: str
    lesson: str  # what is true, said when the answer is right
    cases: Callable
    truth: Callable
    mistakes: tuple[tuple[str, Callable], ...]
    tolerance: float = 1e-8
    rows_sum_to_one: bool = False
    observe: Callable = call

    @property
    def unit(self) -> int:
        return int(self.key[0])


# ---- random inputs -------------------------------------------------------------------------------


def _normal(random, *shape, std=1.0):
    return std * torch.randn(*shape, generator=random, dtype=torch.float64)


def _uniform(random, low, high):
    return low + (high - low) * float(torch.rand(1, generator=random, dtype=torch.float64))


def _simplex(random, *shape):
    p = torch.rand(*shape, generator=random, dtype=torch.float64) + 0.1
    return p / p.sum(-1, keepdim=True)


def _kl(r, p):
    return (torch.xlogy(r, r) - torch.xlogy(r, p)).sum(-1)


def _softmax(x):
    return torch.softmax(x, -1)


# ---- 1. inference --------------------------------------------------------------------------------


def _finite_cases(random):
    cases = [
        (_simplex(random, 6), _normal(random, 6), _uniform(random, 0.3, 0.8)) for _ in range(3)
    ]
    with_zero = _simplex(random, 5)
    with_zero[2] = 0
    with_zero = with_zero / with_zero.sum()
    cases.append((with_zero, _normal(random, 5), 0.5))
    cases.append((_simplex(random, 6), 1000 + 0.02 * _normal(random, 6), 0.01))
    return cases


def _naive_posterior(prior, q, eta):
    w = prior * torch.exp(q / eta)
    return w / w.sum()


def _unnormalised(prior, q, eta):
    return prior * torch.exp((q - q.max()) / eta)


ONE_A = Problem(
    "1a",
    "posterior",
    "Q - eta log(q*/prior) is the same for every action",
    _finite_cases,
    poco.posterior,
    (
        (
            "you multiplied Q by eta; divide: a small eta must sharpen the policy",
            lambda prior, q, eta: poco.posterior(prior, q * eta, 1.0),
        ),
        ("you dropped the prior", lambda prior, q, eta: _softmax(q / eta)),
        (
            "you counted the prior twice",
            lambda prior, q, eta: poco.posterior(prior**2 / (prior**2).sum(), q, eta),
        ),
        (
            "exp(Q / eta) overflows: subtract the largest Q before you divide and exponentiate",
            _naive_posterior,
        ),
        ("you forgot to divide by the sum", _unnormalised),
        (
            "you preferred low values: the sign of Q is wrong",
            lambda prior, q, eta: poco.posterior(prior, -q, eta),
        ),
    ),
    rows_sum_to_one=True,
)


def _gap_cases(random):
    return [
        (
            _simplex(random, 6),
            _simplex(random, 6),
            _normal(random, 6),
            _uniform(random, 0.3, 0.8),
        )
        for _ in range(4)
    ]


def _objective(r, prior, q, eta):
    return (r * q).sum() - eta * _kl(r, prior)


def _gap(r, prior, q, eta):
    return _objective(poco.posterior(prior, q, eta), prior, q, eta) - _objective(r, prior, q, eta)


ONE_B = Problem(
    "1b",
    "gap",
    "the gap is eta KL(r || q*): never negative, zero only at the posterior",
    _gap_cases,
    _gap,
    (
        (
            "your KL has its arguments swapped: it is KL(r || q*)",
            lambda r, p, q, eta: eta * _kl(poco.posterior(p, q, eta), r),
        ),
        (
            "you forgot to multiply the KL by eta",
            lambda r, p, q, eta: _kl(r, poco.posterior(p, q, eta)),
        ),
        (
            "you measured the distance to the prior; the gap is the distance to the posterior",
            lambda r, p, q, eta: eta * _kl(r, p),
        ),
        (
            "you compared values only; J also pays eta KL(r || prior)",
            lambda r, p, q, eta: ((poco.posterior(p, q, eta) - r) * q).sum(),
        ),
        ("the sign is wrong: the gap is J(q*) - J(r)", lambda *inputs: -_gap(*inputs)),
    ),
)


def _repeated_cases(random):
    return [(_simplex(random, 6), _normal(random, 6), 0.7, k) for k in (1, 2, 3, 5)]


def _steps(prior, q, eta, k):
    for _ in range(k):
        prior = poco.posterior(prior, q, eta)
    return prior


ONE_C = Problem(
    "1c",
    "repeated",
    "k steps at eta are one step at eta / k: evidence adds",
    _repeated_cases,
    lambda prior, q, eta, k: poco.posterior(prior, q, eta / k),
    (
        (
            "you started every step from the first prior: k steps became one",
            lambda prior, q, eta, k: poco.posterior(prior, q, eta),
        ),
        (
            "more steps must sharpen the policy; you multiplied eta by k",
            lambda prior, q, eta, k: poco.posterior(prior, q, eta * k),
        ),
        ("one step too many", lambda prior, q, eta, k: _steps(prior, q, eta, k + 1)),
        ("one step too few", lambda prior, q, eta, k: _steps(prior, q, eta, k - 1)),
    ),
    rows_sum_to_one=True,
)


# ---- 2. the Gaussian, MPO ------------------------------------------------------------------------


def _slope_cases(random):
    return [
        (_uniform(random, 0.3, 0.7), _uniform(random, 0.8, 2.0), _uniform(random, 0.6, 0.95))
        for _ in range(4)
    ]


def _gaussian_by_quadrature(s, g, eta):
    line = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    prior = _softmax(-(line**2) / (2 * s**2))
    post = poco.posterior(prior, g * line, eta)
    mean = (post * line).sum()
    return mean, (post * (line - mean) ** 2).sum().sqrt(), _kl(post, prior)


TWO_A = Problem(
    "2a",
    "gaussian_posterior",
    "a slope moves a Gaussian by s^2 g / eta and keeps its width",
    _slope_cases,
    _gaussian_by_quadrature,
    (
        (
            "the mean moves by s^2 g / eta: the variance counts, not the standard deviation",
            lambda s, g, eta: (s * g / eta, s, (s * g / eta) ** 2 / 2),
        ),
        (
            "a slope does not change the width",
            lambda s, g, eta: (s**2 * g / eta, s * math.sqrt(eta), (s * g / eta) ** 2 / 2),
        ),
        (
            "the KL of two Gaussians of one width is the squared shift over TWICE the variance",
            lambda s, g, eta: (s**2 * g / eta, s, (s * g / eta) ** 2),
        ),
        (
            "return the standard deviation, not the variance",
            lambda s, g, eta: (s**2 * g / eta, s**2, (s * g / eta) ** 2 / 2),
        ),
        (
            "you multiplied by eta: a large temperature must make a small step",
            lambda s, g, eta: (s**2 * g * eta, s, (s * g * eta) ** 2 / 2),
        ),
    ),
    tolerance=1e-6,
)


def _dual_cases(random):
    cases = []
    for sign in (1, -1, 1, -1):
        eps = _uniform(random, 0.02, 0.5)
        cases.append((_uniform(random, 0.3, 0.8), sign * _uniform(random, 1.0, 2.5), eps))
    return cases


def _dual_by_bisection(s, g, eps):
    eta = brentq(lambda x: eps - (s * g) ** 2 / (2 * x**2), 1e-4, 1e4, xtol=1e-12)
    return eta, eta * eps + (s * g) ** 2 / (2 * eta)


TWO_B = Problem(
    "2b",
    "dual_minimum",
    "at the dual's minimum the KL is exactly eps",
    _dual_cases,
    _dual_by_bisection,
    (
        (
            "you lost the factor 2: the slope of the dual is eps - s^2 g^2 / (2 eta^2)",
            lambda s, g, eps: (s * abs(g) / math.sqrt(eps), 1.5 * s * abs(g) * math.sqrt(eps)),
        ),
        (
            "eta must be positive also where the slope g is negative",
            lambda s, g, eps: (s * g / math.sqrt(2 * eps), s * g * math.sqrt(2 * eps)),
        ),
        (
            "the value of the dual has two terms: eta eps, and s^2 g^2 / (2 eta) beside it",
            lambda s, g, eps: (
                s * abs(g) / math.sqrt(2 * eps),
                s * abs(g) * math.sqrt(eps / 2),
            ),
        ),
        (
            "swapped: return eta first and then the dual's value",
            lambda s, g, eps: _dual_by_bisection(s, g, eps)[::-1],
        ),
    ),
    tolerance=1e-6,
)


def _particle_cases(random):
    cases = [(_normal(random, n, std=2.0), eps, 1e-3) for n, eps in ((16, 0.1), (64, 0.5), (8, 1))]
    cases.append((_normal(random, 8), 2.2, 1e-2))  # above log 8: no solution
    return cases


def _kl_uniform(q, eta):
    w = _softmax(q / eta)
    return math.log(len(q)) + float(torch.xlogy(w, w).sum())


def _solve(excess, floor, ceiling=1e4):
    if excess(floor) <= 0:
        return floor
    if excess(ceiling) >= 0:
        return ceiling
    return math.exp(brentq(lambda x: excess(math.exp(x)), math.log(floor), math.log(ceiling)))


def _observe_kl(function, inputs):
    """Judge eta by the KL it gives; where there is no solution, by itself."""
    q, eps, floor = inputs
    eta = float(function(q, eps, floor))
    if not (math.isfinite(eta) and eta > 0):
        return eta, math.nan
    solvable = _kl_uniform(q, floor) > eps
    return (eta if not solvable else 0.0), (_kl_uniform(q, eta) if solvable else eps)


def _swapped_kl(q, eta):
    return -math.log(len(q)) - float(torch.log_softmax(q / eta, -1).mean())


def _dual_with_sum(q, eps, floor):
    """The dual's minimum with the sum of exp(q / eta) where the mean belongs."""
    return _solve(lambda eta: _kl_uniform(q, eta) - math.log(len(q)) - eps, floor)


TWO_C = Problem(
    "2c",
    "eta_of_particles",
    "KL(weights || uniform) = eps, and above log N there is no such eta",
    _particle_cases,
    lambda q, eps, floor: (0.0, eps) if _kl_uniform(q, floor) > eps else (floor, eps),
    (
        (
            "your KL has its arguments swapped: it is KL(weights || uniform)",
            lambda q, eps, floor: _solve(lambda eta: _swapped_kl(q, eta) - eps, floor),
        ),
        (
            "you kept the wrong half: the KL falls as eta grows, and your bisection ran to the end",
            lambda q, eps, floor: 1e4,
        ),
        (
            "you forgot log N: KL(weights || uniform) is log N minus the entropy",
            _dual_with_sum,
        ),
        (
            "you returned log(eta); return eta",
            lambda q, eps, floor: math.log(_solve(lambda x: _kl_uniform(q, x) - eps, floor)),
        ),
        (
            "no solution means the floor; you ran below it",
            lambda q, eps, floor: _solve(lambda eta: _kl_uniform(q, eta) - eps, 1e-9),
        ),
    ),
    tolerance=1e-4,
    observe=_observe_kl,
)


def _fit_cases(random):
    return [(2 + _normal(random, n), _simplex(random, n)) for n in (4, 8, 16)]


def _moments(x, w):
    return (w * x).sum(), torch.cov(x, correction=0, aweights=w)


def _bessel(x, w):
    mean, variance = _moments(x, w)
    return mean, variance / (1 - (w**2).sum())


TWO_D = Problem(
    "2d",
    "weighted_fit",
    "with equal weights the variance shrinks by 1 - 1/N on average, also without a signal",
    _fit_cases,
    _moments,
    (
        (
            "you forgot the weights in the variance",
            lambda x, w: ((w * x).sum(), ((x - (w * x).sum()) ** 2).mean()),
        ),
        (
            "you forgot the weights in the mean",
            lambda x, w: (x.mean(), (w * (x - x.mean()) ** 2).sum()),
        ),
        (
            "maximum likelihood has no correction for small samples: that is why it shrinks",
            _bessel,
        ),
        (
            "return the variance, not the standard deviation",
            lambda x, w: (_moments(x, w)[0], _moments(x, w)[1].sqrt()),
        ),
        (
            "take the variance around the mean, not around zero",
            lambda x, w: ((w * x).sum(), (w * x**2).sum()),
        ),
    ),
)


# ---- 3. chunks -----------------------------------------------------------------------------------


def _joint_cases(random):
    return [(_simplex(random, 9).view(3, 3), _simplex(random, 9).view(3, 3)) for _ in range(4)]


def _chain_rule(new, old):
    first_new, first_old = new.sum(1), old.sum(1)
    first = _kl(first_new, first_old)
    rest = (first_new * _kl(new / first_new[:, None], old / first_old[:, None])).sum()
    return first, first + rest


def _joint_kl(new, old):
    return _kl(new.flatten(), old.flatten())


THREE_A = Problem(
    "3a",
    "chunk_kl",
    "by the chain rule a chunk's KL is at least that of its first action",
    _joint_cases,
    _chain_rule,
    (
        (
            "your KL has its arguments swapped: it is KL(new || old)",
            lambda new, old: _chain_rule(old, new),
        ),
        (
            "you added the KL of each action's own distribution; that forgets how they depend",
            lambda new, old: (
                _kl(new.sum(1), old.sum(1)),
                _kl(new.sum(1), old.sum(1)) + _kl(new.sum(0), old.sum(0)),
            ),
        ),
        (
            "you took the second action for the first: sum over the second one",
            lambda new, old: (_kl(new.sum(0), old.sum(0)), _joint_kl(new, old)),
        ),
        (
            "you returned the KL of the rest; the chunk's KL includes the first action",
            lambda new, old: (
                _chain_rule(new, old)[0],
                _chain_rule(new, old)[1] - _chain_rule(new, old)[0],
            ),
        ),
    ),
)


def _target_cases(random):
    cases = []
    for discount in (0.99, 0.9, 0.5):
        k = torch.randint(1, 5, (8,), generator=random)
        k[0], k[1] = 4, 2
        valid = (torch.arange(4) < k[:, None]).double()
        terminated = (torch.arange(8) % 2).double()
        rewards = _normal(random, 8, 4)  # also after the end: those must not count
        cases.append((rewards, valid, terminated, discount, 3 + _normal(random, 8)))
    return cases


def _target_by_loop(rewards, valid, terminated, discount, next_value):
    targets = []
    for b in range(len(rewards)):
        total, factor = 0.0, 1.0
        for h in range(rewards.shape[1]):
            if valid[b, h] == 0:
                break
            total += factor * float(rewards[b, h])
            factor *= discount
        targets.append(total + (0.0 if terminated[b] else factor * float(next_value[b])))
    return torch.tensor(targets, dtype=torch.float64)


def _target(rewards, valid, discount, end, first=0):
    steps = torch.arange(first, first + rewards.shape[1])
    return (valid * discount**steps * rewards).sum(1) + end


THREE_B = Problem(
    "3b",
    "chunk_target",
    "a time-out keeps its future, a terminal state has none",
    _target_cases,
    _target_by_loop,
    (
        (
            "you bootstrapped through a terminal state: after the end there is no next value",
            lambda r, v, t, g, n: _target(r, v, g, g ** v.sum(1) * n),
        ),
        (
            "you counted rewards after the episode's end",
            lambda r, v, t, g, n: _target(r, torch.ones_like(v), g, g ** v.sum(1) * (1 - t) * n),
        ),
        (
            "a cut chunk has k real steps: discount the next value by k, not by H",
            lambda r, v, t, g, n: _target(r, v, g, g ** r.shape[1] * (1 - t) * n),
        ),
        (
            "you discounted the next value once; k steps have passed",
            lambda r, v, t, g, n: _target(r, v, g, g * (1 - t) * n),
        ),
        (
            "the first reward is not discounted: its power is 0",
            lambda r, v, t, g, n: _target(r, v, g, g ** v.sum(1) * (1 - t) * n, first=1),
        ),
        (
            "you did not discount the rewards",
            lambda r, v, t, g, n: (v * r).sum(1) + g ** v.sum(1) * (1 - t) * n,
        ),
    ),
    tolerance=1e-6,
)


def _table_cases(random):
    return [(_normal(random, 3, 3), _simplex(random, 3)) for _ in range(4)]


def _two_targets(reward, behaviour):
    average = torch.stack([sum(p * r for p, r in zip(behaviour, row)) for row in reward])
    return average, torch.stack([max(row) for row in reward])


THREE_C = Problem(
    "3c",
    "two_targets",
    "the n-step target blames a1 for what the data did next; a chunk critic does not",
    _table_cases,
    _two_targets,
    (
        (
            "swapped: the two-step target first, the chunk critic second",
            lambda reward, p: _two_targets(reward, p)[::-1],
        ),
        (
            "you went over a1; keep a1 and go over a2, the last dimension",
            lambda reward, p: (p @ reward, reward.max(0).values),
        ),
        (
            "the chunk critic knows a2: take the best one, not the data's average",
            lambda reward, p: (reward @ p, reward @ p),
        ),
        (
            "the data do not choose a2 uniformly: weigh by their behaviour",
            lambda reward, p: (reward.mean(1), reward.max(1).values),
        ),
    ),
)


def _two_loops(reward, chance):
    by_action = [sum(c * r for c, r in zip(chance, column)) for column in reward.T]
    return max(by_action), sum(c * max(row) for c, row in zip(chance, reward))


THREE_D = Problem(
    "3d",
    "two_loops",
    "looking never hurts: the closed loop earns at least as much",
    _table_cases,
    _two_loops,
    (
        (
            "swapped: open loop first; choosing before the coin falls cannot earn more",
            lambda reward, p: _two_loops(reward, p)[::-1],
        ),
        (
            "you chose the coin as well; nature does that: average over it",
            lambda reward, p: (_two_loops(reward, p)[0], reward.max()),
        ),
        (
            "you mixed up the dimensions: coins are rows, actions are columns",
            lambda reward, p: _two_loops(reward.T, p),
        ),
        (
            "the coin is not fair: weigh its sides by their chance",
            lambda reward, p: _two_loops(reward, torch.full_like(p, 1 / len(p))),
        ),
        (
            "the open loop also picks its best action; you averaged over actions",
            lambda reward, p: ((p @ reward).mean(), _two_loops(reward, p)[1]),
        ),
    ),
)


# ---- 4. particles --------------------------------------------------------------------------------


def _value_cases(random):
    return [
        (_normal(random, 5, 8), _uniform(random, 0.3, 0.8)),
        (_normal(random, 4, 4), _uniform(random, 0.3, 0.8)),
        (1e6 + _normal(random, 3, 6, std=0.002), 0.001),
    ]


def _naive_weights(q, eta):
    w = torch.exp(q / eta)
    return w / w.sum(-1, keepdim=True)


def _z_scored(q, eta):
    return _softmax((q - q.mean(-1, keepdim=True)) / q.std(-1, keepdim=True, correction=0) / eta)


FOUR_A = Problem(
    "4a",
    "posterior_weights",
    "the draw supplies the prior, so the weights hold exp(Q / eta) alone",
    _value_cases,
    poco.posterior_weights,
    (
        (
            "you multiplied Q by eta; divide: a small eta must pick out the best",
            lambda q, eta: _softmax((q - q.amax(-1, keepdim=True)) * eta),
        ),
        (
            "you normalised over the states; the weights of one state's candidates sum to 1",
            lambda q, eta: torch.softmax(q / eta, 0),
        ),
        (
            "exp(Q / eta) overflows: subtract the row's largest Q before you divide",
            _naive_weights,
        ),
        (
            "you z-scored Q; then a state where nothing matters looks like one where all does",
            _z_scored,
        ),
        (
            "your rows sum to N; divide by the sum, not by the mean",
            lambda q, eta: q.shape[-1] * _softmax(q / eta),
        ),
    ),
    rows_sum_to_one=True,
    tolerance=1e-5,  # q / eta is 1e9 in one case: dividing first rounds, but is no mistake
)


def _weight_cases(random):
    with_zeros = _simplex(random, 4, 6)
    with_zeros[:, :3] = 0
    return [
        (_simplex(random, 5, 8),),
        (_softmax(_normal(random, 3, 16, std=2.0)),),
        (with_zeros / with_zeros.sum(-1, keepdim=True),),
    ]


def _entropy(w):
    return torch.tensor(
        [-sum(float(x) * math.log(float(x)) for x in row if x > 0) for row in w],
        dtype=torch.float64,
    )


def _effective(w):
    n = w.shape[-1]
    return 1 / (n * (w**2).sum(-1)), math.log(n) - _entropy(w)


FOUR_B = Problem(
    "4b",
    "effective",
    "ESS/N lies in (0, 1], the KL in [0, log N]",
    _weight_cases,
    _effective,
    (
        (
            "you returned ESS; divide by N",
            lambda w: (1 / (w**2).sum(-1), math.log(w.shape[-1]) - _entropy(w)),
        ),
        (
            "log(0) is not finite: a weight of zero adds nothing, use torch.xlogy",
            lambda w: (_effective(w)[0], math.log(w.shape[-1]) + (w * w.log()).sum(-1)),
        ),
        (
            "you returned the entropy; the KL from uniform is log N minus the entropy",
            lambda w: (_effective(w)[0], _entropy(w)),
        ),
        (
            "you returned the perplexity exp(entropy) / N; ESS is one over the sum of squares",
            lambda w: (torch.exp(_entropy(w)) / w.shape[-1], _effective(w)[1]),
        ),
        (
            "you averaged over the rows; return one number per row",
            lambda w: tuple(x.mean() * torch.ones(len(w)) for x in _effective(w)),
        ),
    ),
)


def _comb_cases(random):
    cases = [
        (_simplex(random, 8), 4, _uniform(random, 0.2, 0.8)),
        (_softmax(_normal(random, 16, std=1.5)), 8, _uniform(random, 0.2, 0.8)),
        (_softmax(_normal(random, 6, std=0.5)), 12, _uniform(random, 0.2, 0.8)),
    ]
    cases.append((torch.tensor([0.05, 0.15, 0.45, 0.05, 0.2, 0.1]).double(), 5, 0.3))
    return cases


def _comb(weights, teeth):
    picks = []
    for tooth in teeth:
        total, j = 0.0, 0
        while j < len(weights) - 1 and total + float(weights[j]) <= tooth:
            total += float(weights[j])
            j += 1
        picks.append(j)
    return torch.tensor(picks)


FOUR_C = Problem(
    "4c",
    "resampled",
    "a candidate is drawn M times its weight on average, so the M-step's expectation stays",
    _comb_cases,
    lambda w, m, start: _comb(w, [(k + start) / m for k in range(m)]),
    (
        (
            "you left the start out: without it the draw is not random, and not unbiased",
            lambda w, m, start: _comb(w, [k / m for k in range(m)]),
        ),
        (
            "the start moves the comb by start / M, not by start",
            lambda w, m, start: _comb(w, sorted((k / m + start) % 1 for k in range(m))),
        ),
        (
            "you took the M heaviest; light candidates must be drawn now and then",
            lambda w, m, start: w.argsort(descending=True)[torch.arange(m) % len(w)].sort().values,
        ),
        (
            "one too far: the tooth lies before the sum that passes it",
            lambda w, m, start: _comb(w, [(k + start) / m for k in range(m)]) + 1,
        ),
        (
            "you ignored the weights",
            lambda w, m, start: torch.arange(m) * len(w) // m,
        ),
    ),
)


def _claim_cases(random):
    return [
        (_normal(random, 6, std=2.0), _uniform(random, 0.5, 0.9), _uniform(random, 1.1, 1.5))
        for _ in range(4)
    ]


def _true_by_quadrature(claimed, tau, sigma):
    line = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    log_p = -(line**2) / (2 * tau**2) - (claimed[:, None] - line) ** 2 / (2 * sigma**2)
    return (_softmax(log_p) * line).sum(-1)


FOUR_D = Problem(
    "4d",
    "true_gain",
    "a softmax does not escape the winner's curse: true / claimed stays the same",
    _claim_cases,
    _true_by_quadrature,
    (
        (
            "you believed the claim; part of it is noise that was selected",
            lambda claimed, tau, sigma: claimed,
        ),
        (
            "variances add, deviations do not: square tau and sigma",
            lambda claimed, tau, sigma: claimed * tau / (tau + sigma),
        ),
        (
            "that is the share of the noise; the truth's share is the rest",
            lambda claimed, tau, sigma: claimed * sigma**2 / (tau**2 + sigma**2),
        ),
        (
            "you subtracted the noise's deviation; the curse is proportional to the claim",
            lambda claimed, tau, sigma: claimed - sigma,
        ),
    ),
    tolerance=1e-6,
)


# ---- 5. projection, flow, clip -------------------------------------------------------------------


def _mixture_cases(random):
    return [
        (_simplex(random, k), _normal(random, k), 0.2 + torch.rand(k, generator=random).double())
        for k in (2, 3, 5)
    ]


def _fit_by_quadrature(shares, means, stds):
    line = torch.linspace(-25, 25, 100_001, dtype=torch.float64)
    parts = _softmax(-((line - means[:, None]) ** 2) / (2 * stds[:, None] ** 2))
    p = shares @ parts
    mean = (p * line).sum()
    return mean, (p * (line - mean) ** 2).sum()


FIVE_A = Problem(
    "5a",
    "forward_fit",
    "the forward KL matches mean and variance, and so covers the gap between the habits",
    _mixture_cases,
    _fit_by_quadrature,
    (
        (
            "you averaged the variances; the distance between the habits is missing",
            lambda p, m, s: ((p * m).sum(), (p * s**2).sum()),
        ),
        (
            "you took the spread of the means only; each habit has a width of its own",
            lambda p, m, s: ((p * m).sum(), (p * (m - (p * m).sum()) ** 2).sum()),
        ),
        (
            "that is the reverse KL's answer, one habit; the forward KL covers them all",
            lambda p, m, s: (m[p.argmax()], s[p.argmax()] ** 2),
        ),
        (
            "the habits are not equally likely: weigh by their shares",
            lambda p, m, s: (m.mean(), (s**2 + (m - m.mean()) ** 2).mean()),
        ),
        (
            "return the variance, not the standard deviation",
            lambda p, m, s: (
                _fit_by_quadrature(p, m, s)[0],
                _fit_by_quadrature(p, m, s)[1].sqrt(),
            ),
        ),
    ),
    tolerance=1e-6,
)


def _habit_cases(random):
    return [
        (_normal(random, 6, std=0.5), _uniform(random, 0.2, 0.6), _uniform(random, 0.1, 0.4))
        for _ in range(3)
    ]


def _habit_loss_by_quadrature(a, mu, s):
    """Integrate the ideal network's squared error over the flow time."""

    def error(t, distance):
        c = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2)
        return distance**2 * (1 - c * t) ** 2 + (1 + c * (1 - t)) ** 2

    return torch.tensor(
        [quad(error, 0, 1, (float(x) - mu,), limit=200)[0] for x in a], dtype=torch.float64
    )


FIVE_B = Problem(
    "5b",
    "habit_loss",
    "the loss is -log p up to a constant, but one nat costs pi s / 2",
    _habit_cases,
    _habit_loss_by_quadrature,
    (
        (
            "that is -log p; the loss has the same shape, but another slope and constant",
            lambda a, mu, s: (a - mu) ** 2 / (2 * s**2) + math.log(s * math.sqrt(2 * math.pi)),
        ),
        (
            "the floor is missing: even the habit itself cannot be predicted without error",
            lambda a, mu, s: math.pi / 4 * (a - mu) ** 2 / s,
        ),
        (
            "divide the squared distance by s, not by s^2",
            lambda a, mu, s: math.pi / 4 * ((a - mu) ** 2 / s**2 + s),
        ),
        (
            "you doubled it: the factor is pi / 4; the mean over the habit is then pi s / 2",
            lambda a, mu, s: math.pi / 2 * ((a - mu) ** 2 / s + s),
        ),
        (
            "measure the distance from the habit mu, not from zero",
            lambda a, mu, s: math.pi / 4 * (a**2 / s + s),
        ),
    ),
    tolerance=1e-5,
)


def _alive_cases(random):
    return [
        (_uniform(random, 0.1, 0.3), _uniform(random, 0.1, 0.3), 2),
        (_uniform(random, 0.1, 0.3), _uniform(random, 0.3, 0.5), 2),
        (_uniform(random, 0.1, 0.6), _uniform(random, 0.1, 0.25), 35),
    ]


def _left_over(t, s):
    return s**2 / ((1 - t) ** 2 + t**2 * s**2)


def _over_time(f):
    """Average f over the flow time; f takes an array."""
    return float(f(TIMES).mean())


def _alive(zeta, s, d):
    return _over_time(lambda t: chi2.cdf(d * zeta / _left_over(t, s), d))


def _alive_by_quadrature(zeta, s, d):
    return quad(lambda t: chi2.cdf(d * zeta / _left_over(t, s), d), 0, 1, limit=300)[0]


FIVE_C = Problem(
    "5c",
    "alive",
    "the clip silences late flow times and broad policies; it never saw the value",
    _alive_cases,
    _alive_by_quadrature,
    (
        (
            "the loss is a MEAN over d cells: compare d zeta / v with the chi-square",
            lambda zeta, s, d: _over_time(lambda t: chi2.cdf(zeta / _left_over(t, s), d)),
        ),
        (
            "that is the clipped share; alive is the rest",
            lambda zeta, s, d: 1 - _alive(zeta, s, d),
        ),
        (
            "you multiplied by v; a large left-over variance must kill draws",
            lambda zeta, s, d: _over_time(lambda t: chi2.cdf(d * zeta * _left_over(t, s), d)),
        ),
        (
            "you used the mean of v; average the probability over t, not v",
            lambda zeta, s, d: chi2.cdf(d * zeta / (math.pi * s / 2), d),
        ),
        (
            "you took t = 1/2; average over t from 0 to 1",
            lambda zeta, s, d: chi2.cdf(d * zeta / _left_over(0.5, s), d),
        ),
    ),
    tolerance=2e-3,
)


def _clip_cases(random):
    return [
        (
            2 * torch.rand(4, n, generator=random).double(),
            _softmax(_normal(random, 4, n)),
            _uniform(random, 0.5, 1.0),
        )
        for n in (4, 8)
    ] + [(_normal(random, 3, 4).abs(), _softmax(_normal(random, 3, 4)), math.inf)]


def _observe_gradients(function, inputs):
    """Return the value, its gradient by the losses, and its gradient by the weights."""
    losses = inputs[0].clone().requires_grad_()
    weights = inputs[1].clone().requires_grad_()
    value = function(losses, weights, inputs[2])
    if not torch.is_tensor(value) or value.shape != losses.shape[:1]:
        return (value,)  # the shape is reported before any gradient
    if not value.requires_grad:
        return value, torch.full_like(losses, math.nan), torch.zeros_like(weights)
    by_losses, by_weights = torch.autograd.grad(value.sum(), (losses, weights), allow_unused=True)
    zero = torch.zeros_like(losses)
    return (
        value,
        zero if by_losses is None else by_losses,
        zero if by_weights is None else by_weights,
    )


def _clipped_truth(losses, weights, zeta):
    small = losses <= zeta
    value = (weights * torch.where(small, losses, zeta)).sum(-1)
    return value, weights * small, torch.zeros_like(weights)


def _straight_through(losses, weights, zeta):
    held = losses + (losses.clamp(0, zeta) - losses).detach()
    return (weights.detach() * held).sum(-1)


FIVE_D = Problem(
    "5d",
    "clipped",
    "above zeta a draw teaches nothing; at or below it, its gradient is its weight",
    _clip_cases,
    _clipped_truth,
    (
        (
            "you clipped after weighing; then zeta means something else for every N",
            lambda x, w, z: (w.detach() * x).clamp(0, z).sum(-1),
        ),
        (
            "the weights already sum to 1: take the sum over candidates, not the mean",
            lambda x, w, z: (w.detach() * x.clamp(0, z)).mean(-1),
        ),
        (
            "a gradient reaches the weights: detach them",
            lambda x, w, z: (w * x.clamp(0, z)).sum(-1),
        ),
        (
            "above zeta the gradient must be zero; yours passes straight through",
            _straight_through,
        ),
        (
            "above zeta the loss counts as zeta, not as 0",
            lambda x, w, z: (w.detach() * torch.where(x <= z, x, 0.0)).sum(-1),
        ),
        (
            "no gradient reaches the losses: do not detach them",
            lambda x, w, z: (w * x.clamp(0, z)).sum(-1).detach(),
        ),
    ),
    observe=_observe_gradients,
)


# ---- 6. POCO -------------------------------------------------------------------------------------


def _loop_cases(random):
    return [
        (
            _simplex(random, 6),
            _simplex(random, 6),
            _normal(random, 6),
            _uniform(random, 0.3, 0.8),
            _uniform(random, 1.5, 3.0),
        )
        for _ in range(4)
    ]


def _improve(pi, demos, q, eta, beta):
    return (demos + beta * poco.posterior(pi, q, eta)) / (1 + beta)


SIX_A = Problem(
    "6a",
    "improve",
    "the M-step fits a mixture of demonstrations and posterior",
    _loop_cases,
    _improve,
    (
        (
            "divide by 1 + beta: these are probabilities",
            lambda pi, d, q, eta, beta: d + beta * poco.posterior(pi, q, eta),
        ),
        (
            "beta weighs the posterior, not the demonstrations",
            lambda pi, d, q, eta, beta: (beta * d + poco.posterior(pi, q, eta)) / (1 + beta),
        ),
        (
            "the posterior starts from the current policy pi, not from the demonstrations",
            lambda pi, d, q, eta, beta: _improve(d, d, q, eta, beta),
        ),
        (
            "the anchor is the demonstrations, not the current policy",
            lambda pi, d, q, eta, beta: _improve(pi, pi, q, eta, beta),
        ),
        (
            "you multiplied Q by eta; divide",
            lambda pi, d, q, eta, beta: _improve(pi, d, q * eta, 1.0, beta),
        ),
    ),
    rows_sum_to_one=True,
)


def _fixed_cases(random):
    return [
        (
            _simplex(random, 6),
            _normal(random, 6),
            _uniform(random, 0.4, 0.8),
            _uniform(random, 0.5, 2.0),
        )
        for _ in range(4)
    ]


def _fixed_point(demos, q, eta, beta):
    """Solve for Z: the formula's probabilities must sum to one."""
    evidence = torch.exp((q - q.max()) / eta)

    def at(z):
        return demos / (1 + beta - beta * evidence / z)

    low = beta / (1 + beta) * (1 + 1e-13)
    return at(brentq(lambda z: float(at(z).sum()) - 1, low, 1e3, xtol=1e-15))


def _iterated(demos, q, eta, beta, steps, anchored=True):
    pi = demos
    for _ in range(steps):
        pi = _improve(pi, demos if anchored else pi, q, eta, beta)
    return pi


def _with_demos_z(demos, q, eta, beta):
    evidence = torch.exp((q - q.max()) / eta)
    return demos / (1 + beta - beta * evidence / (demos * evidence).sum())


SIX_B = Problem(
    "6b",
    "fixed_point",
    "the loop ends where demonstrations and posterior balance, not at the best action",
    _fixed_cases,
    _fixed_point,
    (
        ("that is one iteration; go on until nothing changes", lambda *x: _iterated(*x, 1)),
        (
            "you lost the demonstrations on the way: the anchor pulls in every iteration",
            lambda *x: _iterated(*x, 500, anchored=False),
        ),
        (
            "Z is the mean of exp(Q / eta) under the fixed point, not under the demonstrations",
            _with_demos_z,
        ),
        (
            "that is the posterior of the demonstrations: beta is missing",
            lambda demos, q, eta, beta: poco.posterior(demos, q, eta),
        ),
    ),
    rows_sum_to_one=True,
    tolerance=1e-5,
)


def _mass_cases(random):
    return [
        (share, _uniform(random, 0.05, 0.4), _uniform(random, 0.5, 3.0))
        for share in (1.0, 0.6, 0.3, 0.1)
    ]


def _mass_by_iteration(share, p, beta):
    mass = p
    for _ in range(4000):
        mass = (share * p + (1 - share) * mass + beta) / (1 + beta)
    return mass


SIX_C = Problem(
    "6c",
    "best_mass",
    "only a replay that forgets its demonstrations lets the policy become the best",
    _mass_cases,
    _mass_by_iteration,
    (
        (
            "you ignored the share: the policy's own actions do not pull back",
            lambda f, p, beta: 1 - (1 - p) / (1 + beta),
        ),
        (
            "that is the mass of all other actions",
            lambda f, p, beta: f * (1 - p) / (f + beta),
        ),
        (
            "that is the first iteration; the own actions improve too, so go on",
            lambda f, p, beta: (p + beta) / (1 + beta) if f == 1 else 1 - f * (1 - p) / (1 + beta),
        ),
        ("you forgot that the demonstrations also show the best", lambda f, p, b: b / (f + b)),
    ),
)


def _width_cases(random):
    cases = []
    for zeta, s, d in ((0.6, 0.1, 35), (0.15, 0.2, 35), (0.6, 0.3, 25)):
        s = s * _uniform(random, 0.8, 1.2)
        cases.append((_clipped_loss(zeta, s, d), zeta, d))
    return cases


def _clipped_loss(zeta, s, d, inner=2):
    def at(t):
        v = _left_over(t, s)
        x = d * zeta / v
        return v * chi2.cdf(x, d + inner) + zeta * chi2.sf(x, d)

    return _over_time(at)


def _bisect_width(f, target):
    low, high = 1e-3, 3.0
    if (f(low) - target) * (f(high) - target) > 0:
        return math.nan
    return brentq(lambda s: f(s) - target, low, high)


SIX_D = Problem(
    "6d",
    "width",
    "one logged number gives the width, and the width predicts another logged number",
    _width_cases,
    lambda surrogate, zeta, d: _bisect_width(lambda s: _clipped_loss(zeta, s, d), surrogate),
    (
        (
            "that is the width without a clip; the logged surrogate is clipped",
            lambda surrogate, zeta, d: 2 * surrogate / math.pi,
        ),
        (
            "below zeta the mean of v chi-square_d / d needs d + 2 degrees of freedom",
            lambda surrogate, zeta, d: _bisect_width(
                lambda s: _clipped_loss(zeta, s, d, inner=0), surrogate
            ),
        ),
        (
            "you forgot the draws above zeta: each counts zeta",
            lambda surrogate, zeta, d: _bisect_width(
                lambda s: _over_time(
                    lambda t: _left_over(t, s) * chi2.cdf(d * zeta / _left_over(t, s), d + 2)
                ),
                min(surrogate, 0.9 * zeta),
            ),
        ),
        (
            "you used one cell; the loss is a mean over d cells",
            lambda surrogate, zeta, d: _bisect_width(
                lambda s: _clipped_loss(zeta, s, 1), surrogate
            ),
        ),
    ),
    tolerance=1e-3,
)


PROBLEMS = (
    *(ONE_A, ONE_B, ONE_C),
    *(TWO_A, TWO_B, TWO_C, TWO_D),
    *(THREE_A, THREE_B, THREE_C, THREE_D),
    *(FOUR_A, FOUR_B, FOUR_C, FOUR_D),
    *(FIVE_A, FIVE_B, FIVE_C, FIVE_D),
    *(SIX_A, SIX_B, SIX_C, SIX_D),
)

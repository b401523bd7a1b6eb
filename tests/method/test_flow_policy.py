"""flow_policy.py: the loss and the sampler against hand-written loops, masks, exactness on straight
paths, no leaks.

python -m pytest tests/test_flow_policy.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from flow_policy import FlowPolicy

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.tuples(*[st.integers(1, high) for high in (4, 3, 4, 3, 5)])  # B, N, H, A, D


def close(actual, expected, tolerance=1e-10):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make(sizes, seed, layers=2, cls=FlowPolicy):
    """A small float64 policy with a non-trivial normaliser, and obs, actions, noise, t, all
    random."""
    b, n, h, a, d = sizes
    g = torch.Generator().manual_seed(seed)
    policy = cls(d, a, h, hidden=8, layers=layers, flow_steps=4).double()
    for p in policy.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    policy.set_normalizer(torch.randn(d, generator=g), torch.rand(d, generator=g) + 0.5)
    obs = torch.randn(b, d, generator=g, dtype=torch.float64)
    actions, noise = torch.randn(2, b, n, h, a, generator=g, dtype=torch.float64)
    return policy, obs, actions.tanh(), noise, torch.rand(b, n, generator=g, dtype=torch.float64)


@settings(max_examples=30)
@given(SIZES, SEEDS, st.integers(1, 4))
def test_the_velocity_is_a_plain_mlp_of_state_chunk_and_time(sizes, seed, layers):
    """The split first layer equals one layer on the concatenation; SiLU between layers, none after
    the last. Eq. 6."""
    policy, obs, x, _, t = make(sizes, seed, layers)
    v = policy.velocity(policy.encode(obs), x, t)
    state = (obs - policy.obs_mean) / policy.obs_std
    for b in range(len(x)):
        for n in range(x.shape[1]):
            inputs = torch.cat([state[b], x[b, n].flatten(), t[b, n : n + 1]])
            first = torch.cat([policy.from_obs.weight, policy.from_chunk.weight], 1)
            out = F.silu(first @ inputs + policy.from_obs.bias + policy.from_chunk.bias)
            for layer in policy.hidden:
                out = F.silu(layer.weight @ out + layer.bias)
            close(v[b, n].flatten(), policy.out.weight @ out + policy.out.bias)
    assert len(policy.hidden) == layers - 1


@settings(max_examples=50)
@given(SIZES, SEEDS, st.booleans())
def test_the_loss_is_the_squared_error_on_the_straight_line(sizes, seed, masked):
    """Mean over real cells of (v(a_m, m) - (a_1 - a_0))^2 with a_m = (1 - m) a_0 + m a_1, as loops.
    Eq. 7-8."""
    policy, obs, actions, noise, t = make(sizes, seed)
    b, n, h, a, _ = sizes
    real = torch.randint(1, h + 1, (b,), generator=torch.Generator().manual_seed(seed))
    real = real if masked else torch.full((b,), h)
    valid = (torch.arange(h) < real[:, None]).double() if masked else None
    loss = policy.cfm_loss(policy.encode(obs), actions, valid, noise, t)
    assert loss.shape == (b, n)
    for i in range(b):
        for j in range(n):
            x = (1 - t[i, j]) * noise[i, j] + t[i, j] * actions[i, j]
            v = policy.velocity(
                policy.encode(obs[i : i + 1]), x[None, None], t[i : i + 1, j : j + 1]
            )[0, 0]
            cells = [
                (v[k, c] - (actions[i, j, k, c] - noise[i, j, k, c])) ** 2
                for k in range(real[i])
                for c in range(a)
            ]
            close(loss[i, j], sum(cells) / len(cells))


def test_a_mask_of_ones_changes_nothing_and_a_mask_of_zeros_gives_zero():
    policy, obs, actions, noise, t = make((3, 2, 4, 2, 3), 0)
    with_mask = [
        policy.cfm_loss(policy.encode(obs), actions, mask, noise, t)
        for mask in (None, torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4))
    ]
    close(with_mask[1], with_mask[0])
    close(with_mask[2], with_mask[0])
    assert torch.equal(with_mask[3], torch.zeros(3, 2, dtype=torch.float64))


@settings(max_examples=40)
@given(SIZES, SEEDS, st.one_of(st.none(), st.integers(1, 6)))
def test_sampling_is_euler_steps_of_the_flow(sizes, seed, steps):
    """x <- x + v(x, k/K)/K for k = 0 ... K - 1, then clipped to [-1, 1]; one state and chunk at a
    time. Eq. 6."""
    policy, obs, _, noise, _ = make(sizes, seed)
    policy.out.weight.data *= 0.1
    chunks = policy.sample(policy.encode(obs), sizes[1], noise, steps)
    count = steps or policy.flow_steps
    for b in range(sizes[0]):
        for n in range(sizes[1]):
            context, x = policy.encode(obs[b : b + 1]), noise[b : b + 1, n : n + 1]
            for k in range(count):
                x = (
                    x
                    + policy.velocity(
                        context, x, torch.full((1, 1), k / count, dtype=torch.float64)
                    )
                    / count
                )
            close(chunks[b, n], x[0, 0].clamp(-1, 1))


class Straight(FlowPolicy):
    """The true velocity when the only data chunk is `goal`."""

    goal = 0.7

    def velocity(self, context, x, t):
        return (self.goal - x) / (1 - t[..., None, None])


@given(SIZES, SEEDS, st.integers(1, 20))
def test_straight_paths_are_exact_for_any_number_of_steps(sizes, seed, steps):
    """v = (a - x)/(1 - m) has zero loss and carries every noise to a, whatever K. Eq. 6-8."""
    policy, obs, actions, noise, t = make(sizes, seed, cls=Straight)
    goal = torch.full_like(actions, Straight.goal)
    close(policy.sample(policy.encode(obs), sizes[1], noise, steps), goal)
    close(policy.cfm_loss(policy.encode(obs), goal, None, noise, 0.99 * t), torch.zeros_like(t))


class Recorder(FlowPolicy):
    """Notes what the network is asked, and how often a state is encoded."""

    def velocity(self, context, x, t):
        self.seen = x, t
        return super().velocity(context, x, t)

    def encode(self, obs):
        self.encoded = getattr(self, "encoded", 0) + 1
        return super().encode(obs)


def test_every_chunk_has_its_own_standard_noise_and_uniform_time():
    """m ~ U(0, 1) and a_0 ~ N(0, I), drawn per chunk when not given. Eq. 7-8."""
    torch.manual_seed(0)
    policy = Recorder(3, 2, 4, hidden=4)
    policy.cfm_loss(policy.encode(torch.zeros(200, 3)), torch.zeros(200, 20, 4, 2))
    x, t = policy.seen
    noise = x / (1 - t)[..., None, None]
    assert t.shape == (200, 20) and len(t.unique()) > 3900
    assert (
        abs(t.mean() - 0.5) < 0.03
        and abs(t.std() - 12**-0.5) < 0.02
        and t.min() >= 0
        and t.max() < 1
    )
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert (
        abs((noise[:, :, 0] * noise[:, :, 1]).mean()) < 0.03
        and abs((noise[:, 0] * noise[:, 1]).mean()) < 0.1
    )


def test_randomness_is_an_argument():
    """Given noise and t, loss and samples are bitwise repeatable; without them each call draws
    anew."""
    policy, obs, actions, noise, t = make((3, 4, 2, 2, 3), 0)
    context = policy.encode(obs)
    for repeatable, fresh in (
        (
            lambda: policy.cfm_loss(context, actions, None, noise, t),
            lambda: policy.cfm_loss(context, actions),
        ),
        (lambda: policy.sample(context, 4, noise), lambda: policy.sample(context, 4)),
    ):
        assert torch.equal(repeatable(), repeatable()) and not torch.equal(fresh(), fresh())


def test_a_state_is_encoded_once_whatever_the_number_of_chunks_and_steps():
    policy = Recorder(3, 2, 4, hidden=4)
    context = policy.encode(torch.zeros(5, 3))
    policy.sample(context, 32, steps=10)
    policy.cfm_loss(context, torch.zeros(5, 32, 4, 2))
    assert policy.encoded == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_fresh_bounded_chunks_without_gradient(dtype):
    policy = FlowPolicy(3, 2, 4, hidden=16).to(dtype)
    policy.out.weight.data *= 100
    chunks = policy.sample(policy.encode(torch.randn(50, 3, dtype=dtype)), 20)
    assert chunks.shape == (50, 20, 4, 2) and chunks.dtype == dtype and not chunks.requires_grad
    assert chunks.min() == -1 and chunks.max() == 1 and len(chunks.unique()) > 100


def test_the_loss_trains_every_parameter_of_the_head():
    policy, obs, actions, noise, t = make((3, 4, 2, 2, 3), 0)
    policy.cfm_loss(policy.encode(obs), actions, None, noise, t).mean().backward()
    head = list(policy.head_parameters())
    assert len(head) == len(list(policy.parameters())) == 8
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head)


def test_observations_are_standardised_and_the_statistics_are_saved():
    policy = FlowPolicy(3, 2, 4, hidden=4)
    obs, mean, std = torch.randn(5, 3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    assert torch.equal(policy.encode(obs), obs)
    policy.set_normalizer(mean, std)
    close(policy.encode(obs), (obs - mean) / std, 1e-6)
    other = FlowPolicy(3, 2, 4, hidden=4)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.encode(obs), policy.encode(obs))


def test_the_critic_sees_the_standardised_observation():
    policy = make((3, 1, 2, 2, 5), 0)[0]
    obs = torch.randn(4, 5, dtype=torch.float64)
    seen = policy.critic_obs(policy.encode(obs))
    assert torch.equal(seen, (obs - policy.obs_mean) / policy.obs_std)
    assert policy.critic_dim == seen.shape[1] == 5 and policy.device == obs.device


@settings(max_examples=20)
@given(SIZES, SEEDS, st.integers(1, 4))
def test_sizes_rebuild_the_network(sizes, seed, layers):
    """FlowPolicy(**sizes) takes the weights and draws the same chunks with as many Euler steps."""
    policy, obs, _, noise, _ = make(sizes, seed, layers)
    other = FlowPolicy(**policy.sizes()).double()
    other.load_state_dict(policy.state_dict())
    chunks = policy.sample(policy.encode(obs), noise.shape[1], noise)
    assert torch.equal(other.sample(other.encode(obs), noise.shape[1], noise), chunks)
    assert other.sizes() == policy.sizes()

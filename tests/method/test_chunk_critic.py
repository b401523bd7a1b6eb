"""chunk_critic.py: batched heads against a loop, the TD target, what may carry a gradient, and
precision.

python -m pytest tests/test_chunk_critic.py
"""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from chunk_critic import ChunkCritic, aggregate, critic_loss, ema_update, td_target

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.tuples(*[st.integers(1, high) for high in (3, 4, 3, 4, 3, 5)])  # M, B, N, H, A, D


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make(sizes, seed, layers=2):
    """A small float64 critic of random weights, random obs (B, D) and chunks (B, N, H,
    A)."""
    m, b, n, h, a, d = sizes
    g = torch.Generator().manual_seed(seed)
    critic = ChunkCritic(d, a, h, hidden=8, layers=layers, heads=m).double()
    for p in critic.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return (
        critic,
        torch.randn(b, d, generator=g).double(),
        torch.randn(b, n, h, a, generator=g).double(),
    )


@given(SIZES, SEEDS, st.floats(0, 3))
def test_heads_aggregate_to_mean_less_deviations(sizes, seed, pessimism):
    """0 is the mean; 1 with two heads is their minimum; more pessimism never raises a value; (M, B,
    N) -> (B, N)."""
    q = torch.randn(sizes[:3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(aggregate(q), q.mean(0))
    close(aggregate(q[:2], 1.0), q[:2].amin(0))
    value = aggregate(q, pessimism)
    for b in range(sizes[1]):
        for n in range(sizes[2]):
            heads = q[:, b, n]
            close(
                value[b, n], heads.mean() - pessimism * ((heads - heads.mean()) ** 2).mean().sqrt()
            )


@settings(max_examples=40)
@given(SIZES, SEEDS, st.integers(1, 4))
def test_every_head_is_a_plain_mlp_of_state_and_chunk(sizes, seed, layers):
    """Q of each head, state and candidate alone: hidden layers of SiLU then LayerNorm, linear
    output. Sec. V-A1."""
    critic, obs, chunks = make(sizes, seed, layers)
    q = critic(obs, chunks)
    assert q.shape == sizes[:3] and len(critic.hidden) == layers - 1
    for m in range(sizes[0]):
        for b in range(sizes[1]):
            for n in range(sizes[2]):
                h = (
                    obs[b] @ critic.from_obs.weight[m]
                    + chunks[b, n].flatten() @ critic.from_chunk.weight[m]
                )
                h = h + critic.from_obs.bias[m, 0] + critic.from_chunk.bias[m, 0]
                for layer in critic.hidden:
                    h = F.layer_norm(F.silu(h), (8,)) @ layer.weight[m] + layer.bias[m, 0]
                h = F.layer_norm(F.silu(h), (8,))
                close(q[m, b, n], h @ critic.out.weight[m, :, 0] + critic.out.bias[m, 0, 0])


def test_heads_start_different_and_share_nothing():
    critic = ChunkCritic(3, 2, 4, hidden=8, heads=3)
    q = critic(torch.randn(5, 3), torch.randn(5, 6, 4, 2))
    assert not torch.allclose(q[0], q[1]) and not torch.allclose(q[1], q[2])
    q[1].sum().backward()
    for p in critic.parameters():
        assert p.grad[1].abs().sum() > 0 and p.grad[0].abs().sum() == p.grad[2].abs().sum() == 0


def test_initialisation_is_that_of_a_linear_layer():
    torch.manual_seed(0)
    weight = ChunkCritic(3, 2, 4, hidden=64).hidden[0].weight
    assert weight.abs().max() <= 64**-0.5 and abs(weight.std() - 64**-0.5 / 3**0.5) < 0.005


@given(SEEDS)
def test_the_target_is_returns_plus_discounted_next_value(seed):
    """y = sum_k gamma^k r + gamma^k Q(s', a'), without gradient. Eq. 14."""
    returns, bootstrap, next_q = torch.randn(
        3, 7, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    target = td_target(returns, bootstrap, next_q)
    assert target.shape == (7,) and not target.requires_grad
    for i in range(7):
        close(target[i].item(), returns[i].item() + bootstrap[i].item() * next_q[i].item(), 1e-6)


@settings(max_examples=30)
@given(SIZES, SEEDS)
def test_the_loss_is_the_mean_squared_td_error_of_all_heads(sizes, seed):
    """mean over heads and states of (Q(s, a) - y)^2. Eq. 14."""
    critic, obs, chunks = make(sizes, seed)
    target = torch.randn(
        sizes[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    loss, stats = critic_loss(critic, obs, chunks[:, 0], target)
    q = critic(obs, chunks[:, :1])[:, :, 0]
    errors = [(q[m, b] - target[b]) ** 2 for m in range(sizes[0]) for b in range(sizes[1])]
    close(loss, sum(errors) / len(errors))
    close(
        [stats[k].item() for k in ("critic", "q_data", "target")],
        [x.mean().item() for x in (loss, q, target)],
    )
    assert not any(x.requires_grad for x in stats.values())


def test_the_loss_trains_the_critic_and_never_the_target():
    """Semi-gradient: d loss / d Q = 2 (Q - y) / (M B), and the target network gets none. Eq. 14."""
    critic, obs, chunks = make((2, 4, 1, 3, 2, 3), 0)
    other, _, _ = make((2, 4, 1, 3, 2, 3), 1)
    y = other(obs, chunks).mean((0, 2))
    assert y.requires_grad
    loss, stats = critic_loss(critic, obs, chunks[:, 0], y)
    loss.backward()
    assert all(p.grad is None for p in other.parameters()) and not any(
        x.requires_grad for x in stats.values()
    )
    bias = critic.out.bias.grad[:, 0, 0]
    close(bias, (2 * (critic(obs, chunks)[..., 0] - y) / 8).sum(1).detach())
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())


@given(SEEDS, st.floats(0, 1))
def test_the_target_network_is_a_moving_average_of_parameters(seed, tau):
    """target <- (1 - tau) target + tau online, in place; online network and buffers stay."""
    online = make((2, 1, 1, 2, 1, 3), seed)[0]
    target = make((2, 1, 1, 2, 1, 3), seed + 1)[0]
    online.register_buffer("statistics", torch.zeros(3))
    target.register_buffer("statistics", torch.ones(3))
    before = copy.deepcopy((online.state_dict(), target.state_dict()))
    places = [p.data_ptr() for p in target.parameters()]
    ema_update(target, online, tau)
    assert [p.data_ptr() for p in target.parameters()] == places
    parameters = dict(target.named_parameters())
    for name, value in target.state_dict().items():
        old_online, old = before[0][name], before[1][name]
        assert torch.equal(online.state_dict()[name], old_online)
        if name in parameters:
            close(value, (1 - tau) * old + tau * old_online)
        else:
            assert torch.equal(value, old)
    assert len(parameters) == 8 and len(target.state_dict()) == 9


def test_under_autocast_only_the_hidden_layers_are_rounded():
    """Values, and so differences of candidates, are within 3 % of their spread of those in float32
    (1.4 % here)."""
    torch.manual_seed(0)
    critic = ChunkCritic(3, 2, 4, hidden=256, layers=3).requires_grad_(False)
    obs, chunks = torch.randn(64, 3), torch.rand(64, 16, 4, 2) * 2 - 1
    exact = critic(obs, chunks)
    with torch.autocast("cpu", torch.bfloat16):
        error = critic(obs, chunks) - exact
    assert error.square().mean().sqrt() < 0.03 * exact.std(-1).mean()


def test_values_are_never_rounded_to_bfloat16():
    """Under autocast the output is float32 in fact and not only in name: bfloat16 would merge close
    candidates."""
    critic = ChunkCritic(3, 2, 4, hidden=64)
    for bias in (0, 100):  # at 100 bfloat16 has steps of 0.5
        critic.out.bias.data.fill_(bias)
        with torch.autocast("cpu", torch.bfloat16):
            q = critic(torch.randn(8, 3), torch.randn(8, 16, 4, 2))
        assert q.dtype == torch.float32
        assert (q != q.bfloat16()).float().mean() > 0.9 and len(q[0, 0].unique()) > 8
    with torch.no_grad():
        assert not torch.equal(critic.out.weight, critic.out.weight.bfloat16())

"""A captured update without a GPU: its operations are recorded on the CPU and repeated.

    python -m pytest tests/distributed/test_graph.py

That is what a CUDA graph does. So what a graph cannot hold shows here: a number that goes to Python
and back, memory that is not the same in the next call, a scalar that should have changed.
Not here: CUDA itself, the update (tests/method/test_update.py).
"""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import logbook
import poco
import train_online
from distributed import graph
from flow_policy import FlowPolicy
from logbook import Clock, UserError
from replay import Batch

OBS, ACTION, HORIZON, BATCH = 2, 1, 3, 64
# Operations for which Python would wait for a GPU.
READS = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "unique")


def make(agent_class, **changes):
    """A small agent whose policy, actor, critic and target all differ."""
    values = {
        "horizon": HORIZON,
        "hidden": 32,
        "layers": 2,
        "flow_steps": 4,
        "precision": "float32",
        "num_candidates": 4,
    }
    args = train_online.Args(**values | changes)
    torch.manual_seed(0)
    policy = FlowPolicy(OBS, ACTION, HORIZON, args.hidden, args.layers, args.flow_steps)
    agent = agent_class(args, policy, Clock())
    for network in (agent.policy, agent.actor, agent.critic, agent.target):
        for value in network.parameters():
            value.data += 0.05 * torch.randn_like(value)
    return agent


def cut_batch():
    """Chunks of 1 to HORIZON real steps that go on, with returns of any sign."""
    return Batch(
        obs=torch.randn(BATCH, OBS),
        chunk=torch.rand(BATCH, HORIZON, ACTION) * 2 - 1,
        valid=(torch.arange(HORIZON) < torch.randint(1, HORIZON + 1, (BATCH, 1))).float(),
        returns=torch.randn(BATCH),
        bootstrap=0.5 + 0.5 * torch.rand(BATCH),
        next_obs=torch.randn(BATCH, OBS),
    )


class Recorder(TorchDispatchMode):
    """Runs operations and remembers them; `replay` repeats them into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(function, *arguments):
    """distributed.graph.record on the CPU: it runs the call, then puts back what that changed."""
    agent = function.__self__
    noise = torch.get_rng_state()
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        assert all(group["capturable"] for group in optimizer.param_groups)  # or CUDA refuses
    before = copy.deepcopy(state(agent))
    with Recorder() as recorder:
        results = function(*arguments)
    with torch.no_grad():
        for name, value in state(agent).items():  # in place: these are captured
            value.copy_(before[name])
    torch.set_rng_state(noise)
    return recorder.replay, results


@pytest.fixture
def cpu_graph(monkeypatch):
    """Captured on a CPU; streams are CUDA's and left out. Holds what was done in which order."""
    ran = []
    monkeypatch.setattr(
        graph, "record", lambda *arguments: ran.append("record") or record(*arguments)
    )
    monkeypatch.setattr(
        graph, "beside", lambda function, *arguments: ran.append("beside") or function(*arguments)
    )
    monkeypatch.setattr(poco, "_capturing", lambda q: True)
    return ran


def state(agent):
    """Every tensor that an update may change, by name."""
    leaves = pytree.tree_leaves_with_path(agent.state_dict())
    return {name: value for name, value in leaves if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 0.0},
        {"policy_tau": 0.1, "pessimism": 1.0, "clip": 2.0},
        {"particles": 2},
    ],
    ids=["paper", "cloning", "cpu", "particles"],
)
def test_a_captured_update_gives_the_same_numbers_as_eager(cpu_graph, changes, precision):
    """Warm-up, three eager updates, then the graph, a batch for each: to the bit."""
    changes = changes | {"precision": precision, "online_learning_rate": 0.01}
    eager = make(train_online.POCO, **changes)
    captured = make(graph.CapturedPOCO, **changes)
    batches = [cut_batch() for _ in range(9)]
    seen = {eager: [], captured: []}
    for agent, results in seen.items():
        torch.manual_seed(3)
        for number, batch in enumerate(batches):
            stats = agent.update(Batch(*(value.clone() for value in batch)), number in (0, 1, 7))
            copied = {name: value.clone() for name, value in stats.items()}
            results.append((copied, copy.deepcopy(state(agent))))
    assert cpu_graph == 5 * ["beside"] + ["record", "beside"]
    for number, (one, other) in enumerate(zip(*seen.values())):
        for expected, found in zip(one, other):
            assert expected.keys() == found.keys()
            wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
            assert wrong == [], number
    before, after = seen[eager][-2][1], seen[eager][-1][1]
    changed = {name[0].key for name in after if not torch.equal(after[name], before[name])}
    assert changed >= set(train_online.POCO.saved)


def test_reading_a_number_cannot_be_captured(cpu_graph, monkeypatch):
    """The recorder refuses what CUDA refuses: here whether Q is finite, asked while capturing."""
    monkeypatch.setattr(poco, "_capturing", lambda q: False)
    agent = make(graph.CapturedPOCO)
    for _ in range(3):
        agent.update(cut_batch(), False)
    with pytest.raises(
        UserError, match="not permitted when stream is capturing.*--no-graph goes on"
    ):
        agent.update(cut_batch(), False)


def test_q_is_only_taken_on_trust_while_a_graph_is_captured():
    assert poco._capturing(torch.zeros(2)) is False
    with pytest.raises(ValueError, match="non-finite"):
        poco.posterior_weights(torch.tensor([[0.0, float("nan")]]), 1.0)


def test_a_run_without_an_nvidia_gpu_refuses_the_flag_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="--graph needs an NVIDIA GPU, this would run on cpu: --no-graph"
    ):
        train_online.main(["--task", "lift", "--graph", "--device", "cpu"])
    assert not list(tmp_path.iterdir())


def test_the_flag_chooses_the_captured_agent():
    args = train_online.Args(horizon=HORIZON, precision="float32", graph=True)
    policy = FlowPolicy(OBS, ACTION, HORIZON)
    for args.graph, kind in ((True, graph.CapturedPOCO), (False, train_online.POCO)):
        assert type(train_online.make_agent(args, train_online.POCO, policy, Clock())) is kind


def test_a_second_gpu_becomes_the_current_one(monkeypatch):
    """Streams, captures and random numbers are the current GPU's; another's graph is empty."""
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [logbook.usable_device(name).index for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == [
        None,
        None,
        0,
        1,
    ]
    assert chosen == [torch.device("cuda:1")]


class Chip:
    """A device with random numbers of its own, as torch.cuda offers them."""

    def __init__(self):
        self.state = torch.tensor([1], dtype=torch.uint8)

    def get_rng_state(self):
        return self.state.clone()

    def set_rng_state(self, state):
        self.state = state


def test_a_checkpoint_holds_the_random_numbers_of_processor_and_gpu(monkeypatch):
    chip, gpu, processor = Chip(), torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: chip if device == gpu else torch.cpu
    )
    torch.manual_seed(0)
    saved = logbook.noise_state(gpu)
    drawn, chip.state = torch.rand(3), torch.tensor([9], dtype=torch.uint8)
    logbook.restore_noise(saved, gpu)
    assert torch.equal(torch.rand(3), drawn) and chip.state.item() == 1
    chip.state = torch.tensor([9], dtype=torch.uint8)
    for state, device in ((saved, processor), (saved[:1], gpu)):
        logbook.restore_noise(state, device)
        assert torch.equal(torch.rand(3), drawn) and chip.state.item() == 9
    torch.manual_seed(0)
    assert len(only := logbook.noise_state(processor)) == 1 and torch.equal(only[0], saved[0])


def test_an_optimiser_keeps_what_its_device_needs():
    """--resume on a GPU of what a processor saved, and with another learning rate."""
    weight = torch.nn.Parameter(torch.zeros(1))
    saved = torch.optim.Adam([weight], lr=0.1, betas=(0.5, 0.6)).state_dict()
    optimizer = logbook.keep_rate(torch.optim.Adam([weight], lr=0.2, fused=True))
    optimizer.param_groups[0]["capturable"] = True
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["fused"], group["capturable"], group["betas"]) == (
        0.2,
        True,
        True,
        (0.5, 0.6),
    )

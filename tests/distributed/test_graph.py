"""A captured update without a GPU: its operations are recorded on the CPU and repeated on the same memory.

    python -m pytest tests/test_graph.py

That is what a CUDA graph does, so what a graph cannot hold shows here: a number that goes to Python and back, memory
that is not the same in the next call, a scalar that should have changed. Not here: CUDA itself.
"""
import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import logbook
import poco
import train_online
from baselines import qc
from distributed import graph
from logbook import UserError
from replay import Batch

from test_baselines import settings, toy_task  # noqa: F401, a task without a simulator
from test_update import cut_batch, make

READS = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "unique")      # a GPU would be waited for


class Recorder(TorchDispatchMode):
    """Runs operations and remembers them; `replay` runs them again, results into the memory of the first time."""

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
    """distributed.graph.record on the CPU. Unlike a capture the call is run, so what it changed is put back."""
    agent, noise = function.__self__, torch.get_rng_state()
    optimizers = (agent.actor_optimizer, agent.critic_optimizer)
    assert all(group["capturable"] for one in optimizers for group in one.param_groups)      # or Adam refuses on CUDA
    before = copy.deepcopy(state(agent))
    with Recorder() as recorder:
        results = function(*arguments)
    with torch.no_grad():
        for name, value in state(agent).items():                                  # in place: these are captured
            value.copy_(before[name])
    torch.set_rng_state(noise)
    return recorder.replay, results


@pytest.fixture
def cpu_graph(monkeypatch):
    """Captured on a CPU; streams are CUDA's and left out. Holds what was done in which order."""
    ran = []
    monkeypatch.setattr(graph, "record", lambda *arguments: ran.append("record") or record(*arguments))
    monkeypatch.setattr(graph, "beside", lambda function, *arguments: ran.append("beside") or function(*arguments))
    monkeypatch.setattr(poco, "_capturing", lambda q: True)
    return ran


def state(agent):
    """Every tensor that an update may change, by name."""
    leaves = pytree.tree_leaves_with_path(agent.state_dict())
    return {name: value for name, value in leaves if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"guidance": 0.0}, {"policy_tau": 0.1, "pessimism": 1.0, "clip": 2.0}],
                         ids=["paper", "cloning", "cpu"])
def test_a_captured_update_gives_the_same_numbers_as_eager(cpu_graph, changes, precision):
    """Warm-up, three eager updates, then the graph, a batch for each: state and statistics, to the bit."""
    eager, other = (make("poco", precision=precision, online_learning_rate=0.01, **changes) for _ in range(2))
    batches = [cut_batch() for _ in range(9)]
    update, old, new = graph.Captured(other), [], []
    for agent, call, seen in ((eager, eager.update, old), (other, update, new)):
        torch.manual_seed(3)
        for number, batch in enumerate(batches):
            stats = call(Batch(*(value.clone() for value in batch)), number in (0, 1, 7))
            seen.append(({name: value.clone() for name, value in stats.items()}, copy.deepcopy(state(agent))))
    assert cpu_graph == 5 * ["beside"] + ["record", "beside"]
    for number, ((stats, after), (same_stats, same)) in enumerate(zip(old, new)):
        assert stats.keys() == same_stats.keys() and all(torch.equal(stats[name], same_stats[name]) for name in stats)
        assert after.keys() == same.keys()
        assert [name for name, value in after.items() if not torch.equal(value, same[name])] == [], number
    changed = [name for name, value in old[-1][1].items() if not torch.equal(value, old[-2][1][name])]
    assert {name[0].key for name in changed} >= {"policy", "actor", "critic", "target", "actor_optimizer",
                                                 "critic_optimizer"}


def test_reading_a_number_cannot_be_captured(cpu_graph, monkeypatch):
    """The recorder refuses what CUDA refuses: here e_step's question whether Q is finite, asked during the capture."""
    monkeypatch.setattr(poco, "_capturing", lambda q: False)
    agent = make("poco")
    update = graph.Captured(agent)
    for _ in range(3):
        update(cut_batch(), False)
    with pytest.raises(UserError, match="not permitted when stream is capturing.*--no-graph goes on"):
        update(cut_batch(), False)


def test_q_is_only_taken_on_trust_while_a_graph_is_captured():
    assert poco._capturing(torch.zeros(2)) is False
    with pytest.raises(ValueError, match="non-finite"):
        poco.posterior_weights(torch.tensor([[0.0, float("nan")]]), 1.0)


def test_a_run_without_an_nvidia_gpu_refuses_the_flag_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--graph is for NVIDIA GPUs, and this would run on cpu: --no-graph"):
        train_online.main(["--task", "lift", "--graph", "--device", "cpu"])
    assert not list(tmp_path.iterdir())
    assert isinstance(make("poco", graph=True).update, graph.Captured) and not hasattr(settings(qc), "graph")


def test_a_second_gpu_becomes_the_current_one(monkeypatch):
    """Streams, captures and random numbers are the current GPU's: a graph of another would hold nothing."""
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [logbook.usable_device(name).index for name in ("cpu", "cuda", "cuda:0", "cuda:1")] == [None, None, 0, 1]
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
    monkeypatch.setattr(torch, "get_device_module", lambda device: chip if device == gpu else torch.cpu)
    torch.manual_seed(0)
    saved = logbook.noise_state(gpu)
    drawn, chip.state = torch.rand(3), torch.tensor([9], dtype=torch.uint8)
    logbook.restore_noise(saved, gpu)
    assert torch.equal(torch.rand(3), drawn) and chip.state.item() == 1
    chip.state = torch.tensor([9], dtype=torch.uint8)
    for state, device in ((saved, processor), (saved[:1], gpu), (saved[0], gpu)):             # the last: as once saved
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
    assert (group["lr"], group["fused"], group["capturable"], group["betas"]) == (0.2, True, True, (0.5, 0.6))

"""Mutants: wrong versions of the method files, each of which the tests must notice.

    python tests/method/mutants.py             # all, and how many tests kill each; 1 minute
    python tests/method/mutants.py replay.py   # those of one file

A mutant is (name, file, old text, new text). Its file and that file's tests are copied to a new
folder and the text is replaced there. The tests run with few examples in a forked child, so torch
is imported only once. An unchanged copy of each file comes first and must pass. A mutant that
breaks the import counts as a mistake of this table. Where one test alone kills a mutant, its name
is printed: never delete that test.
"""

import contextlib
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent

MUTANTS = [
    # the E-step
    ("prior dropped", "poco.py", "torch.softmax(pi.log() + (q", "torch.softmax((q"),
    ("prior counted twice", "poco.py", "softmax(pi.log() +", "softmax(2 * pi.log() +"),
    (
        "particles inherit the prior twice",
        "poco.py",
        "w = torch.exp(",
        "w = torch.arange(1, q.shape[-1] + 1) * torch.exp(",
    ),
    ("eta inverted", "poco.py", "keepdim=True)) / eta)", "keepdim=True)) * eta)"),
    ("eta inverted, closed form", "poco.py", "keepdim=True)) / eta, ", "keepdim=True)) * eta, "),
    ("eta doubled", "poco.py", "keepdim=True)) / eta)", "keepdim=True)) / (2 * eta))"),
    (
        "eta doubled, closed form",
        "poco.py",
        "keepdim=True)) / eta, ",
        "keepdim=True)) / (2 * eta), ",
    ),
    (
        "Q z-scored",
        "poco.py",
        "    w = torch.exp(",
        "    z = q - q.mean(-1, keepdim=True)\n"
        "    q = z / q.std(-1, keepdim=True, correction=0).clamp(min=1e-9)\n"
        "    w = torch.exp(",
    ),
    (
        "Q z-scored, closed form",
        "poco.py",
        "    return torch.softmax(",
        "    z = q - q.mean(-1, keepdim=True)\n"
        "    q = z / q.std(-1, keepdim=True, correction=0).clamp(min=1e-9)\n"
        "    return torch.softmax(",
    ),
    (
        "weights times N",
        "poco.py",
        "return w / w.sum(-1, keepdim=True)",
        "return w / w.mean(-1, keepdim=True)",
    ),
    (
        "naive exp",
        "poco.py",
        "torch.exp((q - q.amax(-1, keepdim=True)) / eta)",
        "torch.exp(q / eta)",
    ),
    (
        "divided before the maximum is subtracted",
        "poco.py",
        "torch.exp((q - q.amax(-1, keepdim=True)) / eta)",
        "torch.exp(q / eta - (q / eta).amax(-1, keepdim=True))",
    ),
    ("no upcast", "poco.py", "return x if x.dtype == torch.float64 else x.float()", "return x"),
    (
        "float64 rounded in the E-step",
        "poco.py",
        "q = _upcast(q_fn(context, candidates))",
        "q = q_fn(context, candidates).float()",
    ),
    (
        "normalised over states",
        "poco.py",
        "w / w.sum(-1, keepdim=True)",
        "w / w.sum(0, keepdim=True)",
    ),
    (
        "maximum over states",
        "poco.py",
        "torch.exp((q - q.amax(-1, keepdim=True))",
        "torch.exp((q - q.amax(0, keepdim=True))",
    ),
    (
        "excluded actions set the maximum",
        "poco.py",
        "q = torch.where(pi > 0, q, -torch.inf)",
        "q = q",
    ),
    (
        "weights carry a gradient",
        "poco.py",
        "@torch.no_grad()\ndef posterior_weights",
        "def posterior_weights",
    ),
    ("E-step stats carry a gradient", "poco.py", "@torch.no_grad()\ndef e_step", "def e_step"),
    (
        "candidates carry a gradient",
        "poco.py",
        "return candidates.detach(), weights, stats",
        "return candidates, weights, stats",
    ),
    ("eta = 0 accepted", "poco.py", "if not temperature >= 1e-6", "if not temperature >= 0"),
    ("eta = nan accepted", "poco.py", "if not temperature >= 1e-6", "if temperature < 1e-6"),
    ("infinite Q accepted", "poco.py", "not torch.isfinite(q).all()", "torch.isnan(q).any()"),
    (
        "sign of the KL statistic",
        "poco.py",
        "math.log(num_candidates) - entropy",
        "entropy - math.log(num_candidates)",
    ),
    ("ESS not divided by N", "poco.py", ".mean() / num_candidates,", ".mean(),"),
    ("scalar Q broadcast", "poco.py", "if q.shape != candidates.shape[:2]:", "if False:"),
    ("samples of another N accepted", "poco.py", "candidates.ndim != 4 or", "False and"),
    # resampling
    ("multinomial resampling", "poco.py", "torch.rand(rows, 1,", "torch.rand(rows, particles,"),
    ("comb not shifted", "poco.py", "device=weights.device) + start)", "device=weights.device))"),
    (
        "resampled uniformly",
        "poco.py",
        "weights.cumsum(-1)",
        "torch.ones_like(weights).cumsum(-1) / n",
    ),
    (
        "weights kept after resampling",
        "poco.py",
        "full_like(comb, 1 / particles)",
        "ones_like(comb)",
    ),
    ("one comb for all states", "poco.py", "torch.rand(rows, 1,", "torch.rand(1, 1,"),
    (
        "candidates of another state",
        "poco.py",
        "candidates[row, pick]",
        "candidates[row * 0, pick]",
    ),
    # the M-step
    ("weights not detached", "poco.py", "w = weights.detach()", "w = weights"),
    (
        "candidates not detached",
        "poco.py",
        "(policy, context, candidates.detach(), None)",
        "(policy, context, candidates, None)",
    ),
    ("alive_mass carries a gradient", "poco.py", "(weights.detach() * alive)", "(weights * alive)"),
    (
        "clipped after weighing",
        "poco.py",
        "(w * losses.clamp(0, zeta))",
        "(w * losses).clamp(0, zeta)",
    ),
    (
        "half a gradient at the clip",
        "poco.py",
        "losses.clamp(0, zeta)",
        "torch.minimum(losses, torch.full_like(losses, zeta))",
    ),
    (
        "straight-through clip",
        "poco.py",
        "losses.clamp(0, zeta)",
        "(losses + (losses.clamp(0, zeta) - losses).detach())",
    ),
    (
        "mean over candidates",
        "poco.py",
        "losses.clamp(0, zeta)).sum(-1)",
        "losses.clamp(0, zeta)).mean(-1)",
    ),
    ("clip = nan accepted", "poco.py", "if not clip >= 0", "if clip < 0"),
    ("beta ignored", "poco.py", "bc + beta * surrogate", "bc + surrogate"),
    ("cloning term lost", "poco.py", "bc + beta * surrogate", "beta * surrogate"),
    ("missing steps cloned", "poco.py", "chunk.unsqueeze(1), valid)", "chunk.unsqueeze(1), None)"),
    ("candidates masked", "poco.py", "candidates.detach(), None)", "candidates.detach(), valid)"),
    (
        "candidates used without guidance",
        "poco.py",
        "if guidance == 0:",
        "if guidance == 0 and candidates is None:",
    ),
    (
        "alive_mass counts candidates",
        "poco.py",
        "(weights.detach() * alive).sum(-1).mean()",
        "alive.float().mean()",
    ),
    ("scalar loss broadcast", "poco.py", "if losses.shape != actions.shape[:2]:", "if False:"),
    # the flow
    (
        "noise and data swapped",
        "flow_policy.py",
        "(1 - m) * noise + m * actions",
        "m * noise + (1 - m) * actions",
    ),
    (
        "velocity reversed",
        "flow_policy.py",
        "- (actions - noise)).square()",
        "- (noise - actions)).square()",
    ),
    (
        "sum instead of mean",
        "flow_policy.py",
        "error.mean(dim=(-2, -1))",
        "error.sum(dim=(-2, -1))",
    ),
    ("mask ignored", "flow_policy.py", "if valid is None:", "if True:"),
    ("missing steps counted", "flow_policy.py", "sum(dim=(-2, -1)) / cells", "mean(dim=(-2, -1))"),
    (
        "action dimensions summed",
        "flow_policy.py",
        "(mask.sum(dim=(-2, -1)) * self.action_dim)",
        "mask.sum(dim=(-2, -1))",
    ),
    ("empty mask divides by zero", "flow_policy.py", ".clamp(min=1)", ""),
    (
        "one time per state",
        "flow_policy.py",
        "torch.rand(actions.shape[:2], device=actions.device, dtype=actions.dtype)",
        "torch.rand(len(actions), 1, dtype=actions.dtype).expand(actions.shape[:2])",
    ),
    ("uniform noise", "flow_policy.py", "torch.randn_like(actions)", "torch.rand_like(actions)"),
    (
        "given noise ignored in sampling",
        "flow_policy.py",
        "        if noise is None:\n            shape",
        "        if True:\n            shape",
    ),
    (
        "given noise ignored in the loss",
        "flow_policy.py",
        "        if noise is None:\n            noise = torch.randn_like",
        "        if True:\n            noise = torch.randn_like",
    ),
    ("given time ignored", "flow_policy.py", "if t is None:", "if True:"),
    (
        "critic sees noise",
        "flow_policy.py",
        "return context\n",
        "return torch.randn_like(context)\n",
    ),
    ("sizes forget a layer", "flow_policy.py", "len(self.hidden) + 1", "len(self.hidden)"),
    (
        "Euler time one step late",
        "flow_policy.py",
        "x.shape[:2], k / steps",
        "x.shape[:2], (k + 1) / steps",
    ),
    (
        "last Euler step missing",
        "flow_policy.py",
        "for k in range(steps)",
        "for k in range(steps - 1)",
    ),
    (
        "steps argument ignored",
        "flow_policy.py",
        "steps = steps or self.flow_steps",
        "steps = self.flow_steps",
    ),
    ("samples not clipped", "flow_policy.py", "return x.clamp(-1, 1)", "return x"),
    ("samples carry a gradient", "flow_policy.py", "    @torch.no_grad()\n", ""),
    (
        "float32 noise for a float64 policy",
        "flow_policy.py",
        "dtype=context.dtype)",
        "dtype=torch.float32)",
    ),
    (
        "normaliser inverted",
        "flow_policy.py",
        "- self.obs_mean) / self.obs_std",
        "- self.obs_mean) * self.obs_std",
    ),
    (
        "normaliser not saved",
        "flow_policy.py",
        "torch.zeros(obs_dim))",
        "torch.zeros(obs_dim), persistent=False)",
    ),
    # the critic
    ("target not detached", "chunk_critic.py", "q - target.detach()", "q - target"),
    (
        "td_target carries a gradient",
        "chunk_critic.py",
        "@torch.no_grad()\ndef td_target",
        "def td_target",
    ),
    ("stats carry a gradient", "chunk_critic.py", "target.detach().mean()", "target.mean()"),
    ("pessimism turned round", "chunk_critic.py", "mean - pessimism", "mean + pessimism"),
    (
        "bootstrap factor dropped",
        "chunk_critic.py",
        "returns + bootstrap * next_q",
        "returns + next_q",
    ),
    (
        "tau inverted",
        "chunk_critic.py",
        "list(online.parameters()), tau)",
        "list(online.parameters()), 1 - tau)",
    ),
    (
        "online network averaged",
        "chunk_critic.py",
        "_(list(target.parameters()), list(online.parameters())",
        "_(list(online.parameters()), list(target.parameters())",
    ),
    (
        "buffers averaged",
        "chunk_critic.py",
        "_(list(target.parameters()), list(online.parameters())",
        "_(list(target.state_dict().values()), list(online.state_dict().values())",
    ),
    (
        "norm before activation",
        "chunk_critic.py",
        "F.layer_norm(F.silu(layer(h)), h.shape[-1:])",
        "F.silu(F.layer_norm(layer(h), h.shape[-1:]))",
    ),
    (
        "first norm missing",
        "chunk_critic.py",
        "h = F.layer_norm(F.silu(h), h.shape[-1:])",
        "h = F.silu(h)",
    ),
    (
        "heads share a layer",
        "chunk_critic.py",
        "torch.baddbmm(self.bias, x, self.weight)",
        "torch.baddbmm(self.bias, x, self.weight[:1].expand_as(self.weight))",
    ),
    ("loss of one head", "chunk_critic.py", "(q - target.detach())", "(q[:1] - target.detach())"),
    (
        "values in bfloat16",
        "chunk_critic.py",
        "h * self.out.weight.mT",
        "h * self.out.weight.mT.to(h.dtype)",
    ),
    (
        "initialisation too wide",
        "chunk_critic.py",
        "1 / math.sqrt(inputs)",
        "2 / math.sqrt(inputs)",
    ),
    # the replay
    ("bootstrap through a terminal", "replay.py", ' * (1 - self.data["terminated"][last])', ""),
    (
        "timeout treated as terminal",
        "replay.py",
        '(1 - self.data["terminated"][last])',
        '(1 - self.data["terminated"][last]) * (1 - self.data["truncated"][last])',
    ),
    (
        "timeout does not end a chunk",
        "replay.py",
        'torch.maximum(self.data["terminated"][slot], self.data["truncated"][slot])',
        'self.data["terminated"][slot]',
    ),
    (
        "valid one step short",
        "replay.py",
        "torch.cat([torch.ones_like(ended[:, :1]), (1 - ended[:, :-1]).cumprod(1)], dim=1)",
        "(1 - ended).cumprod(1).clamp(min=1e-9).round()",
    ),
    (
        "valid recovers after an end",
        "replay.py",
        "(1 - ended[:, :-1]).cumprod(1)",
        "(1 - ended[:, :-1])",
    ),
    (
        "rewards discounted too much",
        "replay.py",
        "self.discount**steps",
        "self.discount**(steps + 1)",
    ),
    ("bootstrap discounted too little", "replay.py", "discount**count", "discount**(count - 1)"),
    ("bootstrap always gamma^H", "replay.py", "discount**count", "discount**self.horizon"),
    ("rewards after the end counted", "replay.py", "(valid * gamma *", "(gamma *"),
    (
        "next state of the whole chunk",
        "replay.py",
        'self.data["next_obs"][last]',
        'self.data["next_obs"][slot[:, -1]]',
    ),
    (
        "next episode's actions as padding",
        "replay.py",
        'self.data["action"][filled]',
        'self.data["action"][slot]',
    ),
    (
        "chunks cross the write pointer",
        "replay.py",
        "oldest = self.pointer if self.online == ring else 0",
        "oldest = 0",
    ),
    (
        "demonstrations overwritten",
        "replay.py",
        "[self.demos + self.pointer] = value",
        "[self.pointer] = value",
    ),
    ("recording's end not marked", "replay.py", 'rows["truncated"][-1] = 1.0', "pass"),
    (
        "caller's arrays changed",
        "replay.py",
        "torch.tensor(np.asarray(transitions[name])",
        "torch.as_tensor(np.asarray(transitions[name])",
    ),
    ("open tail sampled", "replay.py", "min(self.tail, self.horizon - 1)", "0"),
    (
        "open tail waits a step too long",
        "replay.py",
        "min(self.tail, self.horizon - 1)",
        "min(self.tail, self.horizon)",
    ),
    (
        "ended tail waits",
        "replay.py",
        "min(self.tail, self.horizon - 1)",
        "min(self.online, self.horizon - 1)",
    ),
    (
        "timeout leaves the tail open",
        "replay.py",
        "0 if terminated or truncated else",
        "0 if terminated else",
    ),
    (
        "newest start never sampled",
        "replay.py",
        "torch.randint(first, end,",
        "torch.randint(first, max(end - 1, 1),",
    ),
    (
        "early starts sampled more often",
        "replay.py",
        "torch.randint(first, end, (count,), generator=generator, device=self.device)",
        "torch.minimum(*torch.randint(first, end, (2, count), generator=generator))",
    ),
    ("share ignored", "replay.py", "if self.demo_share is None or", "if True or"),
    (
        "shares swapped",
        "replay.py",
        "round(self.demo_share * batch_size)",
        "round((1 - self.demo_share) * batch_size)",
    ),
    ("generator ignored", "replay.py", "generator=generator, ", ""),
    (
        "wrong shapes broadcast",
        "replay.py",
        "            if value.shape != self.data[name].shape[1:]:  ",
        "            if False:  ",
    ),
    (
        "non-finite accepted",
        "replay.py",
        "if not all(bool(torch.isfinite(value).all())",
        "if not all(True",
    ),
    ("saved state is a view", "replay.py", ".cpu().clone()", ".cpu()"),
    ("saved pointer lost", "replay.py", 'self.pointer = state["pointer"]', "pass"),
    ("saved tail lost", "replay.py", 'self.tail = state["tail"]', "pass"),
]


def copy(folder, file, old="", new=""):
    """Put one method file, changed, and its tests into `folder`."""
    text = (ROOT / file).read_text()
    if old and text.count(old) != 1:
        raise ValueError(
            f"{file} should contain this once, please update the table of mutants: {old!r}"
        )
    (folder / "tests").mkdir()
    (folder / file).write_text(text.replace(old, new, 1) if old else text)
    shutil.copy(TESTS.parent / "conftest.py", folder / "tests")
    shutil.copy(TESTS / f"test_{file}", folder / "tests")


def failing(folder):
    """Names of the tests that fail in `folder`, from a forked child."""
    child = os.fork()
    if child == 0:
        import pytest

        class Listener:
            failed = set()

            def pytest_runtest_logreport(self, report):
                if report.failed:
                    self.failed.add(report.nodeid.split("::")[-1].split("[")[0])

        code = 3
        try:
            os.chdir(folder)
            options = ["-q", "--tb=no", "-m", "not slow", "-p", "no:cacheprovider"]
            with open("output", "w") as out, contextlib.redirect_stdout(out):
                code = pytest.main(["tests", *options], plugins=[Listener()])
            Path("failed").write_text("\n".join(sorted(Listener.failed)))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code > 1:  # 0 all passed, 1 some failed
        raise RuntimeError(f"pytest could not run in {folder}:\n{(folder / 'output').read_text()}")
    return (folder / "failed").read_text().split()


def killers(mutant):
    """A mutant and the names of the tests that notice it."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder), *mutant[1:])
        return *mutant[:2], failing(Path(folder))


def main(files):
    os.environ |= {"HYPOTHESIS_PROFILE": "mutants", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import hypothesis  # noqa: E401, F401 - once, before the forks
    import torch

    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its own late imports
    gc.freeze()  # children need not walk all of torch
    mutants, survivors = (
        [("unchanged", file) for file in files] + [one for one in MUTANTS if one[1] in files],
        [],
    )
    with multiprocessing.get_context("fork").Pool(min(4, os.cpu_count() or 1)) as pool:
        for name, file, tests in pool.imap(killers, mutants):
            if bool(tests) == (name == "unchanged"):
                survivors.append(f"{file}: {name}")
            print(
                f"{file:16s} {name:42s} {len(tests):3d}  {tests[0] if len(tests) == 1 else ''}",
                flush=True,
            )
    if survivors:
        raise SystemExit("the tests do not notice:\n" + "\n".join(survivors))


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or sorted({mutant[1] for mutant in MUTANTS}))
    except (ValueError, RuntimeError) as error:  # a SystemExit would hang the worker
        raise SystemExit(str(error)) from None

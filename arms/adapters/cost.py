"""
What POCO on a VLA will take, measured on this machine before a long run, and what to lower if it does not fit.

    print(cost(policy, lambda: policy.backbone(image), context, 16, 15_000, critic, policy.backbone.model, 2e9))

Any policy with sample and cfm_loss: vla_head.VLAFlowHead or an adapter.
Not here: the simulator's or the robot's own time.
"""
from __future__ import annotations

import time

import torch


def cost(policy, prefix, context, num_candidates: int, updates: int, critic, frozen, replay_bytes: float) -> str:
    """
    Three lines: memory, time, advice. prefix: runs the backbone for one state; context: of a batch of states;
    frozen: the backbone's module. The critic's own time is not counted, so updates/s is an upper bound.
    """
    n, k, device = num_candidates, policy.flow_steps, context.device
    actions = torch.zeros(len(context), n + 1, policy.horizon, policy.action_dim, device=device)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(call):
        call()
        start = now()
        call(), call()
        return (now() - start) / 2

    once = seconds(prefix)
    draw = seconds(lambda: policy.sample(context, n))
    loss = seconds(lambda: policy.cfm_loss(context, actions).mean().backward())
    policy.zero_grad()
    update = draw * (1 + 1 / n) + loss
    megabytes = sum(p.numel() * p.element_size() for p in frozen.parameters()) / 1e6
    head, value = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (policy, critic))
    return (f"cost: backbone {megabytes:.1f} MB, once a state, {1e3 * once:.1f} ms; head {head:.2f} M and critic "
            f"{value:.2f} M weights, {20 * (head + value):.0f} MB with Adam and averages; replay "
            f"{replay_bytes / 1e6:.0f} MB\n"
            f"      N x K = {n} x {k} steps on {len(context)} states, {1e3 * draw / k:.1f} ms each, sharing a prefix: "
            f"at most {1 / update:.1f} updates/s; {updates * update / 60:.0f} min for {updates} updates\n"
            "      too slow: lower --num-candidates, --flow-steps, --batch-size or raise --steps-per-update; too big: "
            "lower --capacity, --batch-size or take a smaller --backbone")

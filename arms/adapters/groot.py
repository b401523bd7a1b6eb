"""
GR00T's flow action head (N1.7 as in LeRobot 0.6.1): the vision-language model frozen, the whole head trained.

    policy = Groot(action_head, action_dim=7)          # a GR00TN17ActionHead of a loaded model
    context = policy.encode(backbone_output | {"state": state, "embodiment_id": ids})

Its time runs as here, cut into 1/1000 steps; 4 Euler steps. The backbone's features, 1 MB a state in bf16, can be kept
in a replay: `vlln`, the layers behind it and the state encoder belong to the head and run again after each update, once
per `sample`. Freeze the backbone with tune_llm=False, tune_visual=False and tune_top_llm_layers=0.
Not here: N1.6, the paper's version, which no release of LeRobot holds; its head has the same methods less
`vl_self_attention`, but this file has not run against it.
"""
from __future__ import annotations

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix


class Groot(Adapter):
    """Groot(action_head, action_dim, horizon): horizon None is the head's own."""

    head = ("model", "state_encoder", "action_encoder", "action_decoder", "position_embedding", "vlln",
            "vl_self_attention")

    def __init__(self, action_head, action_dim: int, horizon: int | None = None, group: int = 4,
                 processors=(None, None)):
        config = action_head.config
        super().__init__(None, action_head, action_dim, horizon or config.action_horizon, config.max_action_dim,
                         config.num_inference_timesteps, 1.0, group, processors)

    def encode(self, batch: dict) -> Prefix:
        """
        The backbone's output, once per state: backbone_features (B, L, D), backbone_attention_mask, image_mask (B, L),
        with state (B, 1, padded) and embodiment_id (B,).
        """
        names = ("backbone_features", "backbone_attention_mask", "image_mask", "state", "embodiment_id")
        return Prefix({name: batch[name].detach() for name in names})

    def prepare(self, context: Prefix) -> Prefix:
        """The head's own layers on features and state."""
        if "seen" in context.parts:
            return context
        model, parts = self.model, context.parts
        seen = model.vl_self_attention(model.vlln(parts["backbone_features"]))
        state = model.state_encoder(parts["state"].flatten(1).unsqueeze(1), parts["embodiment_id"])
        return Prefix(parts | {"seen": seen, "encoded_state": state})

    def velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """See Adapter.velocity; the head's own layers on the context run before the candidates share it."""
        return super().velocity(self.prepare(context), x, t)

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        model, parts = self.model, prefix.parts
        time = (t * model.num_timestep_buckets + 1e-4).long()  # 0.3 * 1000 must not become 299
        h = model.action_encoder(x, time, parts["embodiment_id"])
        if model.config.add_pos_embed:
            h = h + model.position_embedding(torch.arange(h.shape[1], device=h.device))
        extra = {}
        if model.config.use_alternate_vl_dit:
            extra = {"image_mask": parts["image_mask"], "backbone_attention_mask": parts["backbone_attention_mask"]}
        h = model.model(hidden_states=torch.cat([parts["encoded_state"], h], 1), encoder_hidden_states=parts["seen"],
                        timestep=time, **extra)
        return model.action_decoder(h, parts["embodiment_id"])[:, -x.shape[1]:]

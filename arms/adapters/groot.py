"""GR00T's flow action head (N1.7 as in LeRobot 0.6.1, N1.6): the VLM frozen, the head trained.

    policy = Groot(action_head, action_dim=7)    # a GR00TN17ActionHead of a loaded model
    context = policy.encode(backbone_output | {"state": state, "embodiment_id": ids})

Its time runs as here, cut into 1/1000 steps, with 4 Euler steps. The backbone's features, 1 MB per
state in bf16, fit in a replay. `vlln`, the layers behind it and the state encoder belong to the
head: they run again after each update, once per `sample`. Freeze the backbone with
tune_llm=False, tune_visual=False and tune_top_llm_layers=0.
N1.6, the paper's version, has no `vl_self_attention`. No release of LeRobot holds it: the test
removes that layer from N1.7's head, and NVIDIA's own class was read, not run.
Not here: the backbone and its preprocessing.
"""

from typing import Any

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix, pooled


class Groot(Adapter):
    """Wrap an action head of N1.7 or N1.6. horizon: the head's own by default."""

    head = (
        "model",
        "state_encoder",
        "action_encoder",
        "action_decoder",
        "position_embedding",
        "vlln",
        "vl_self_attention",
    )

    def __init__(
        self,
        action_head: Any,
        action_dim: int,
        horizon: int | None = None,
        group: int = 4,
        processors: tuple = (None, None),
    ):
        config = action_head.config
        super().__init__(
            None,
            action_head,
            action_dim,
            horizon=horizon or config.action_horizon,
            width=config.max_action_dim,
            flow_steps=config.num_inference_timesteps,
            critic_dim=config.max_state_dim + config.backbone_embedding_dim,
            group=group,
            processors=processors,
        )
        self.has_self_attention = "vl_self_attention" in dict(action_head.named_children())

    def sizes(self) -> dict[str, int]:
        """Return the constructor's arguments beside the action head."""
        return super().sizes() | {"horizon": self.horizon}

    def encode_batch(self, batch: dict) -> Prefix:
        """Keep the backbone's output, once per state.

        batch: backbone_features (B, L, D), backbone_attention_mask and image_mask (B, L), state
        (B, 1, padded) and embodiment_id (B,).
        """
        names = (
            "backbone_features",
            "backbone_attention_mask",
            "image_mask",
            "state",
            "embodiment_id",
        )
        parts = {name: batch[name].detach() for name in names}
        mask = parts["backbone_attention_mask"]
        parts["pooled"] = pooled(parts["state"].flatten(1), parts["backbone_features"], mask)
        return Prefix(parts)

    def prepare(self, context: Prefix) -> Prefix:
        """Run the head's own layers on features and state."""
        if "features" in context.parts:
            return context
        model = self.model
        parts = context.parts
        features = model.vlln(parts["backbone_features"])
        if self.has_self_attention:
            features = model.vl_self_attention(features)
        state = parts["state"].flatten(1).unsqueeze(1)
        encoded = model.state_encoder(state, parts["embodiment_id"])
        return Prefix(parts | {"features": features, "encoded_state": encoded})

    def velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate v as Adapter does; the candidates share the head's layers on the context."""
        return super().velocity(self.prepare(context), x, t)

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        model = self.model
        parts = prefix.parts
        time = (t * model.num_timestep_buckets + 1e-4).long()  # 0.3 * 1000 must not become 299
        h = model.action_encoder(x, time, parts["embodiment_id"])
        if model.config.add_pos_embed:
            h = h + model.position_embedding(torch.arange(h.shape[1], device=h.device))
        masks = {}
        if model.config.use_alternate_vl_dit:
            masks = {name: parts[name] for name in ("image_mask", "backbone_attention_mask")}
        h = model.model(
            hidden_states=torch.cat([parts["encoded_state"], h], dim=1),
            encoder_hidden_states=parts["features"],
            timestep=time,
            **masks,
        )
        return model.action_decoder(h, parts["embodiment_id"])[:, -x.shape[1] :]

"""
LeRobot's SmolVLA (0.6.1): SmolVLM frozen, the action expert trained.

    policy = SmolVLA.load("smolvla_base", action_dim=6, horizon=10)

The state is a token of the prefix, projected by `state_proj`: that projection is frozen here, because a prefix that
depends on a trained weight would be stale after one update and would hide the weight's gradient. Actions are
usually normalised by mean and deviation, and samples then clipped at 5 deviations, not at 1.
Not here: pi0.5 (pi05.py).
"""
from __future__ import annotations

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix, action_limit, cache_of, parts_of


class SmolVLA(Adapter):
    """SmolVLA(library, action_dim): library is a lerobot SmolVLAPolicy; see `load`."""

    head = ("vlm_with_expert.lm_expert", "action_in_proj", "action_out_proj", "action_time_mlp_in",
            "action_time_mlp_out")
    backwards = True

    def __init__(self, library, action_dim: int, group: int = 4, processors=(None, None)):
        config = library.config
        super().__init__(library, library.model, action_dim, config.chunk_size, config.max_action_dim, config.num_steps,
                         action_limit(config), group, processors)

    @classmethod
    def load(cls, folder, action_dim: int, horizon: int | None = None) -> SmolVLA:
        """From a local folder of LeRobot's; UserError where weights did not load. horizon: chunk length, any."""
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        return cls._load(SmolVLAPolicy, folder, action_dim, horizon, train_state_proj=False, load_vlm_weights=False)

    @torch.no_grad()
    def encode(self, batch: dict) -> Prefix:
        """LeRobot's processed batch (images in [0, 1], tokens, state) -> keys and values, once per state."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        model, language = self.model, "observation.language."
        images, masks = self.library.prepare_images(batch)
        embedded, pad, attend = model.embed_prefix(images, masks, batch[language + "tokens"],
                                                   batch[language + "attention_mask"],
                                                   state=self.library.prepare_state(batch))
        _, cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attend), position_ids=pad.cumsum(1) - 1, past_key_values=None,
            inputs_embeds=[embedded, None], use_cache=True)
        self.calls += 1
        return Prefix({"pad": pad}, parts_of(cache))

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        return self.model.denoise_step(prefix.parts["pad"], cache_of(prefix.cache), x, t)

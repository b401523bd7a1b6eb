"""
LeRobot's pi0.5 (0.6.1): Gemma and SigLIP frozen, the action expert trained. The prompt holds the discretised state.

    policy = Pi05.load("pi05_base", action_dim=7, horizon=10)

The prefix is Gemma's keys and values: 18 MB a state in bf16 with three views, so a replay keeps images and tokens, not
these. The expert's unused lm_head (263 M weights) is neither trained nor saved.
Not here: pi0, whose state enters the expert instead of the prompt.
"""
from __future__ import annotations

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix, action_limit, cache_of, parts_of


class Pi05(Adapter):
    """Pi05(library, action_dim): library is a lerobot PI05Policy; see `load`."""

    head = ("paligemma_with_expert.gemma_expert.model", "action_in_proj", "action_out_proj", "time_mlp_in",
            "time_mlp_out")
    backwards = True

    def __init__(self, library, action_dim: int, group: int = 4, processors=(None, None)):
        config = library.config
        super().__init__(library, library.model, action_dim, config.chunk_size, config.max_action_dim,
                         config.num_inference_steps, action_limit(config), group, processors)

    @classmethod
    def load(cls, folder, action_dim: int, horizon: int | None = None) -> Pi05:
        """From a local folder of LeRobot's; UserError where weights did not load. horizon: chunk length, any."""
        from lerobot.policies.pi05.modeling_pi05 import PI05Policy

        return cls._load(PI05Policy, folder, action_dim, horizon, train_expert_only=True, compile_model=False)

    @torch.no_grad()
    def encode(self, batch: dict) -> Prefix:
        """LeRobot's processed batch (images in [0, 1], tokens and their mask) -> keys and values, once per state."""
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        model, language = self.model, "observation.language."
        images, masks = self.library._preprocess_images(batch)
        embedded, pad, attend = model.embed_prefix(images, masks, batch[language + "tokens"],
                                                   batch[language + "attention_mask"])
        pair = model.paligemma_with_expert
        pair.paligemma.model.language_model.config._attn_implementation = "eager"
        _, cache = pair.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, attend)), position_ids=pad.cumsum(1) - 1,
            past_key_values=None, inputs_embeds=[embedded, None], use_cache=True)
        self.calls += 1
        return Prefix({"pad": pad}, parts_of(cache))

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        return self.model.denoise_step(prefix.parts["pad"], cache_of(prefix.cache), x, t)

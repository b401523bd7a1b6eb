"""LeRobot's pi0.5 (0.6.1): Gemma and SigLIP frozen, the action expert trained.

    policy = Pi05.load("pi05_base", action_dim=7, horizon=10)

The prompt holds the state, discretised. The prefix is Gemma's keys and values, 18 MB per state in
bf16 with three views, so a replay keeps images and tokens instead. The expert's unused lm_head
(263 M weights) is neither trained nor saved.
Not here: pi0, whose state enters the expert instead of the prompt.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix, action_limit, cache_of, layers_of, pooled


class Pi05(Adapter):
    """Wrap a lerobot PI05Policy; see `load`."""

    head = (
        "paligemma_with_expert.gemma_expert.model",
        "action_in_proj",
        "action_out_proj",
        "time_mlp_in",
        "time_mlp_out",
    )
    backwards = True

    def __init__(
        self, library: Any, action_dim: int, group: int = 4, processors: tuple = (None, None)
    ):
        config = library.config
        gemma = library.model.paligemma_with_expert.paligemma.config.text_config
        super().__init__(
            library,
            library.model,
            action_dim,
            horizon=config.chunk_size,
            width=config.max_action_dim,
            flow_steps=config.num_inference_steps,
            critic_dim=config.robot_state_feature.shape[0] + gemma.hidden_size,
            limit=action_limit(config),
            group=group,
            processors=processors,
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        action_dim: int,
        horizon: int | None = None,
        device: str | torch.device = "cpu",
        tokenizer: str | None = None,
    ) -> "Pi05":
        """Load a local LeRobot folder.

        horizon: chunk length, and tokenizer: its name or folder; the checkpoint's own by default.
        Raises UserError where weights did not load.
        """
        from lerobot.policies.pi05.modeling_pi05 import PI05Policy

        changes = {"train_expert_only": True, "compile_model": False}
        return cls._load(PI05Policy, folder, action_dim, horizon, device, tokenizer, changes)

    @torch.no_grad()
    def encode_batch(self, batch: dict) -> Prefix:
        """Run the frozen model once per state.

        batch: LeRobot's processed batch, with images in [0, 1], tokens and their mask, and state.
        """
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        model = self.model
        images, image_masks = self.library._preprocess_images(batch)
        embedded, pad, attend = model.embed_prefix(
            images,
            image_masks,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
        )
        both = model.paligemma_with_expert
        both.paligemma.model.language_model.config._attn_implementation = "eager"
        (hidden, _), cache = both.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, attend)),
            position_ids=pad.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        self.calls += 1
        seen = pooled(batch["observation.state"], hidden, pad)
        return Prefix({"pad": pad, "pooled": seen}, layers_of(cache))

    def _field(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        return self.model.denoise_step(prefix.parts["pad"], cache_of(prefix.cache), x, t)

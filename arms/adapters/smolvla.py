"""LeRobot's SmolVLA (0.6.1): SmolVLM frozen, the action expert trained.

    policy = SmolVLA.load("smolvla_base", action_dim=6, horizon=10)

The state is a token of the prefix, projected by `state_proj`. That projection is frozen here: a
prefix that depends on a trained weight would be stale after one update and would hide the weight's
gradient. Actions are usually normalised by mean and deviation; samples are then clipped at 5
deviations, not at 1.
Not here: pi0.5 (pi05.py).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arms.adapters import Adapter, Prefix, action_limit, cache_of, layers_of, pooled


class SmolVLA(Adapter):
    """Wrap a lerobot SmolVLAPolicy; see `load`."""

    head = (
        "vlm_with_expert.lm_expert",
        "action_in_proj",
        "action_out_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    )
    backwards = True

    def __init__(
        self, library: Any, action_dim: int, group: int = 4, processors: tuple = (None, None)
    ):
        config = library.config
        language = library.model.vlm_with_expert.config.text_config
        super().__init__(
            library,
            library.model,
            action_dim,
            horizon=config.chunk_size,
            width=config.max_action_dim,
            flow_steps=config.num_steps,
            critic_dim=config.robot_state_feature.shape[0] + language.hidden_size,
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
    ) -> "SmolVLA":
        """Load a local LeRobot folder.

        horizon: chunk length, and tokenizer: its name or folder; the checkpoint's own by default.
        Raises UserError where weights did not load.
        """
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        changes = {"train_state_proj": False, "load_vlm_weights": False}
        return cls._load(SmolVLAPolicy, folder, action_dim, horizon, device, tokenizer, changes)

    @torch.no_grad()
    def encode_batch(self, batch: dict) -> Prefix:
        """Run the frozen model once per state.

        batch: LeRobot's processed batch, with images in [0, 1], tokens and their mask, and state.
        """
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        model = self.model
        images, image_masks = self.library.prepare_images(batch)
        embedded, pad, attend = model.embed_prefix(
            images,
            image_masks,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
            state=self.library.prepare_state(batch),
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attend),
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

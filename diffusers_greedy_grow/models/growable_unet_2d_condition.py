# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0

"""The grown model: a pretrained core with one or more growth stages around it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.models.normalization import RMSNorm
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub.errors import HTTPError

from ..flow import descend, enlarge, upsample, velocity_from_clean
from ..hub.lineage import add_to_lineage, find_source, get_lineage
from ..hub.mixins import ModelHubMixin, fetch_adapter
from .blocks import GreedyGrowOutput, GrowthDecoder, GrowthEncoder, TextCache, check_sizes
from .shallow_unet_2d import ShallowUNet2DModel, check_text


class GrowthStage(nn.Module):
    """
    What one growth adds around an inner model: an encoder and a decoder. With `init="preserve"` the inner model answers for
    the pooled state, as it does alone; the encoder sees its answer beside the state, and the decoder adds to it. With
    `init="random"` it is a transformer only, between encoder and decoder.

    It reads the text itself, since a core that never saw detail has learned to ignore the words for it, and while it is frozen
    cannot pass them on: all residual blocks by its mean, and the decoder word by word, which tells apart what the mean blurs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        inner_channels: int,
        cross_attention_dim: int | None,
        init: str,
        factor: int,
    ):
        super().__init__()
        self.preserves, self.factor = init == "preserve", factor
        temb_channels = 4 * block_out_channels[0]
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, temb_channels)
        if cross_attention_dim is not None:
            self.norm_text = RMSNorm(cross_attention_dim, eps=1e-6)
            self.text_proj = nn.Linear(cross_attention_dim, temb_channels)
        seen_channels = in_channels + (out_channels if self.preserves else 0)
        self.encoder = GrowthEncoder(seen_channels, patch_size, block_out_channels, layers_per_block, temb_channels)
        if not self.preserves:
            self.conv_to_inner = nn.Conv2d(block_out_channels[-1], inner_channels, kernel_size=1)
        self.decoder = GrowthDecoder(
            out_channels,
            patch_size,
            inner_channels,
            block_out_channels,
            layers_per_block,
            temb_channels,
            cross_attention_dim,
        )

    def embed(
        self,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        dtype: torch.dtype,
        text_cache: TextCache,
    ) -> torch.Tensor:
        """What conditions the residual blocks, `(B, temb_channels)`, from `timestep` `(B,)` and the text."""
        time_dtype = get_parameter_dtype(self.time_embedding)
        temb = self.time_embedding(self.time_proj(timestep).to(time_dtype)).to(dtype)
        if encoder_hidden_states is None:
            return temb
        if cached := text_cache.values.get(self.text_proj):
            return temb + cached[0]
        if encoder_attention_mask is not None:
            encoder_hidden_states = encoder_hidden_states * encoder_attention_mask.to(dtype).unsqueeze(-1)
        # The norm makes a sum a mean, and what sets one caption apart larger than a mean would leave it. In float32, since
        # float16 has no numbers for what some encoders' outliers add up to; hence diffusers' norm, which takes it beside
        # weights in float16 where torch's warns.
        text = self.norm_text(encoder_hidden_states.sum(dim=1, dtype=torch.float32))
        text = self.text_proj(text.to(dtype))
        text_cache.values[self.text_proj] = (text,)
        return temb + text

    def forward(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cross_attention_kwargs: dict | None,
        inner: Callable,
        dtype: torch.dtype,
        text_cache: TextCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `inner(sample, sigma, features)` answers for the state one level further in, as this does for its own: with the clean
        image, and with its features. It starts from the encoder's `features` where it has no entry of its own.
        """
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.to(dtype)
        temb = self.embed(1000 * sigma, encoder_hidden_states, encoder_attention_mask, dtype, text_cache)
        inner_state = descend(sample, sigma, self.factor)

        # 1. The inner model and the encoder around it. By a device map, what is inside may come from another device.
        if self.preserves:
            # The state of its own level is all that it hears. Encoder features added to its first ones, with a weight that
            # starts at zero, undid what it had learned as soon as everything trained: an eighth of the loss.
            pred_original_sample, features = inner(*inner_state, None)
            image = enlarge(pred_original_sample.to(sample.device), self.factor)
            hidden_states, skips = self.encoder(torch.cat([sample, image], dim=1).to(dtype), temb)
        else:
            image = torch.zeros_like(sample)
            hidden_states, skips = self.encoder(sample.to(dtype), temb)
            _, features = inner(*inner_state, self.conv_to_inner(hidden_states))

        # 2. Detail, drawn from the state and from the image so far
        detail, features, text_cache.values[self.decoder] = self.decoder(
            features.to(sample.device),
            hidden_states,
            skips,
            temb,
            encoder_hidden_states,
            encoder_attention_mask,
            cross_attention_kwargs,
            text_cache.values.get(self.decoder),
        )
        return image + detail.to(sample.dtype), features


class GrowableUNet2DConditionModel(ModelHubMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    A core with growth stages around it, each of which multiplies the resolution (Vasconcelos et al., 2024,
    section 4). Made by [`~GrowableUNet2DConditionModel.from_core`]; the constructor is what loading uses.

    With `init="preserve"` one stage around an inner model computes, with the pooling `P`, the smooth upsampling `S` and the
    scale `n` of [`flow`](flow.py),

        x_in   = P x / n(sigma)                     # a state of the inner model's own process, at sigma_in
        x0_in  = inner(x_in, sigma_in)              # its own prediction of the clean image
        x0_hat = S x0_in + detail(x, S x0_in, features, sigma)

    where `detail` starts at zero: right after growing, `P x0_hat` is the inner model's prediction, up to
    rounding. With `init="random"`, the paper's recipe, the first stage has no such side path: its encoder feeds the
    core's transformer, its decoder alone draws the image, and entry, exit and residual blocks of the core are gone.

    Parameters:
        sample_size (`int`, defaults to 256):
            The resolution of the outermost stage.
        inner_sample_sizes (`tuple[int, ...]`, defaults to `(64,)`):
            The resolutions inside, the core's first, one for each stage.
        block_out_channels (`tuple[tuple[int, ...], ...]`, defaults to `((128, 256),)`):
            For each stage, the innermost first, its channels: one entry per halving between the stage's own grid and
            the inner model's feature grid, outermost first.
        layers_per_block (`tuple[int, ...]`, defaults to `(1,)`):
            For each stage, how many residual blocks each of its blocks has.
        init (`str`, defaults to `"preserve"`):
            `"preserve"` or `"random"`: how the first stage was grown. Later stages always preserve.
        in_channels, out_channels, patch_size, hidden_size, num_layers, num_attention_heads, mlp_ratio,
        cross_attention_dim:
            The core's; see [`ShallowUNet2DModel`].
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GreedyGrowTransformerBlock", "ResnetBlock2D", "GrowthStage"]
    _repeated_blocks = ["GreedyGrowTransformerBlock", "GrowthEncoder", "GrowthDecoder"]
    _group_offload_block_modules = ["core"]
    _keep_in_fp32_modules = ["time_embedding", "time_modulation", "scale_shift_table"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out", "time_embedding", "time_modulation"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        inner_sample_sizes: tuple[int, ...] = (64,),
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[tuple[int, ...], ...] = ((128, 256),),
        layers_per_block: tuple[int, ...] = (1,),
        init: str = "preserve",
        patch_size: int = 4,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        cross_attention_dim: int | None = 768,
    ):
        super().__init__()
        check_sizes(sample_size=sample_size)
        check_sizes(1, inner_sample_sizes=inner_sample_sizes, layers_per_block=layers_per_block)
        check_sizes(2, block_out_channels=block_out_channels)
        if not len(inner_sample_sizes) == len(block_out_channels) == len(layers_per_block):
            raise ValueError(
                "`inner_sample_sizes`, `block_out_channels` and `layers_per_block` need one entry per growth stage, but "
                f"have {len(inner_sample_sizes)}, {len(block_out_channels)} and {len(layers_per_block)}."
            )
        if init not in ("preserve", "random"):
            raise ValueError(f'`init={init!r}` is unknown: pass "preserve" or "random".')

        self.core = ShallowUNet2DModel(
            sample_size=inner_sample_sizes[0],
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            cross_attention_dim=cross_attention_dim,
        )
        if init == "random":
            self.core.remove_shallow_parts()

        self.stage_arguments: list[dict] = []
        sample_sizes = (*inner_sample_sizes, sample_size)
        inner_patch_size, inner_channels = patch_size, hidden_size
        for i, channels in enumerate(block_out_channels):
            stage_patch_size = get_stage_patch_size(sample_sizes[i], sample_sizes[i + 1], inner_patch_size, channels)
            self.stage_arguments.append(
                {
                    "in_channels": in_channels,
                    "out_channels": out_channels,
                    "patch_size": stage_patch_size,
                    "block_out_channels": channels,
                    "layers_per_block": layers_per_block[i],
                    "inner_channels": inner_channels,
                    "cross_attention_dim": cross_attention_dim,
                    "init": init if i == 0 else "preserve",
                    "factor": sample_sizes[i + 1] // sample_sizes[i],
                }
            )
            inner_patch_size, inner_channels = stage_patch_size, channels[0]
        self.stages = nn.ModuleList([GrowthStage(**arguments) for arguments in self.stage_arguments])

        self.core_frozen = False

    # ------------------------------------------------------------------------------------------------------------------
    # Growing

    @classmethod
    def from_core(
        cls,
        core: "ShallowUNet2DModel | GrowableUNet2DConditionModel | str | Path",
        sample_size: int,
        block_out_channels: tuple[int, ...] = (128, 256),
        layers_per_block: int = 1,
        init: str = "preserve",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        **kwargs,
    ) -> "GrowableUNet2DConditionModel":
        r"""
        Grows a model: a new stage of `sample_size` around a copy of `core`, whose adapters must be unloaded.

        Args:
            core ([`ShallowUNet2DModel`], [`GrowableUNet2DConditionModel`], `str` or `Path`):
                The pretrained model, or a local folder or Hub repository that holds it (alone or as the `unet` of a
                pipeline). A grown model grows again.
            sample_size (`int`):
                The new resolution, a multiple of the core's.
            block_out_channels (`tuple[int, ...]`, defaults to `(128, 256)`):
                Channels of the new stage, outermost first, one entry per halving between its own grid and the core's
                features. Its entry patch follows:
                `patch = sample_size / (inner_grid * 2 ** len(block_out_channels))`, an integer >= 1, so more entries
                mean a finer patch.
            layers_per_block (`int`, defaults to 1):
                Residual blocks per entry.
            init (`str`, defaults to `"preserve"`):
                `"preserve"` keeps the core's function: right after growing the result answers as the core does.
                `"random"` is the paper's recipe: only the core's transformer is kept, encoder and decoder are random.
            push_to_hub (`bool`, defaults to `False`):
                Publishes the grown model. If only the upload fails, the model is returned all the same; the log says in
                which folder everything lies and how to go on.
            repo_id, private, create_pr, commit_message:
                See [`HubMixin.push_to_hub`].
            token (`str`, *optional*):
                For the core's repository and for `repo_id`.
            revision (`str`, *optional*):
                If `core` is a repository, its branch, tag or commit; if it is a loaded model, the branch of `repo_id` to
                commit to.
            kwargs:
                Passed to `from_pretrained` of the core if `core` is a path or repository: `subfolder`, `variant`,
                `cache_dir`, `local_files_only`, `force_download`, `dtype`, ...

        Returns:
            [`GrowableUNet2DConditionModel`] in the dtype and on the device of the core.

        Raises:
            `ValueError`: if `sample_size`, `block_out_channels` or `init` do not fit the core, or it has adapters or is quantised.
            `TypeError`: if there are `kwargs` although `core` is a loaded model, or arguments of a push without one.
            `HfHubHTTPError`: if `repo_id` may not be written to, before anything is grown.
            `OSError`: if there is no complete, undamaged core at `core`.
        """
        check_sizes(sample_size=sample_size, layers_per_block=layers_per_block)
        check_sizes(1, block_out_channels=block_out_channels)
        is_loaded_here = isinstance(core, (str, Path))
        push = cls.plan_push(
            push_to_hub,
            core_is_loaded=not is_loaded_here,
            repo_id=repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        if isinstance(core, (str, Path)):
            core = load_core(core, token=token, revision=revision, **kwargs)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} only apply when `core` is a path or repository, not a loaded model.")
        core = unwrap_module(core)  # from `torch.compile(core)`
        if not isinstance(core, (ShallowUNet2DModel, GrowableUNet2DConditionModel)):
            raise ValueError(
                "`core` must be a ShallowUNet2DModel, a GrowableUNet2DConditionModel, a folder or a repository id, "
                f"but is a {type(core).__name__}."
            )
        check_growable(core)

        # 1. The configuration of the grown model: the core's, with one more stage. No memory yet, nor random numbers.
        grown = cls.build_on_meta(core.config, sample_size, block_out_channels, layers_per_block, init)
        if push is not None:
            push.prepare()

        # 2. What is inside: every parameter comes from the core. One that was loaded for the purpose gives its tensors away.
        inside = [(grown.core, core)]
        if isinstance(core, GrowableUNet2DConditionModel):
            inside = [(grown.core, core.core), *zip(grown.stages, core.stages)]
        for module, source in inside:
            values = source.state_dict()
            state = {name: values[name] if is_loaded_here else values[name].clone() for name in module.state_dict()}
            module.load_state_dict(state, assign=True)

        # 3. The new stage, random but for what must be zero; what is kept in float32 in the core is so here
        stage = GrowthStage(**grown.stage_arguments[-1]).to(device=core.device, dtype=core.dtype)
        stage.time_embedding.to(get_parameter_dtype(grown.core.time_embedding))
        grown.stages[-1] = stage

        grown.register_to_config(_lineage=get_lineage(core))
        add_to_lineage(grown, grown_to=sample_size, init=init, **find_source(core))
        if push is not None:
            push.publish_or_keep(grown)
        return grown

    @classmethod
    def build_on_meta(
        cls,
        config: dict[str, Any],
        sample_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 1,
        init: str = "preserve",
    ) -> "GrowableUNet2DConditionModel":
        """
        The model that growing a core of that `config` would give, without weights; raises a `ValueError` that names what does
        not fit. The arguments are those of [`~GrowableUNet2DConditionModel.from_core`].
        """
        stages: dict = {"inner_sample_sizes": (), "block_out_channels": (), "layers_per_block": (), "init": init}
        if "inner_sample_sizes" in config:
            if init != "preserve":
                raise ValueError(
                    f"`init={init!r}` keeps a transformer and throws away what is around it, but the encoder and decoder "
                    'of a grown core are part of what was trained: pass `init="preserve"`, or grow `core.core` again.'
                )
            stages = {name: config[name] for name in stages}
        with torch.device("meta"):
            return cls(
                sample_size=sample_size,
                inner_sample_sizes=(*stages["inner_sample_sizes"], config["sample_size"]),
                block_out_channels=(*stages["block_out_channels"], tuple(block_out_channels)),
                layers_per_block=(*stages["layers_per_block"], layers_per_block),
                init=stages["init"],
                **{name: config[name] for name in CORE_CONFIG_NAMES},
            )

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        """The resolutions this model holds, the core's first: `(64, 256, ...)`."""
        return (*self.config.inner_sample_sizes, self.config.sample_size)

    # ------------------------------------------------------------------------------------------------------------------
    # Phases

    def freeze_core(self) -> None:
        """
        Begins the detail phase: only the outermost stage trains. With `init="preserve"` everything inside runs without
        gradient from here on; with `init="random"` gradients cross the frozen core.
        """
        self.requires_grad_(False)
        self.stages[-1].requires_grad_(True)
        self.core_frozen = True

    def unfreeze_core(self) -> None:
        """Begins the joint phase: everything trains."""
        self.requires_grad_(True)
        self.core_frozen = False

    def parameter_groups(self, lr: float, core_lr_scale: float = 1.0) -> list[dict]:
        """
        Groups for a torch optimizer, of the parameters that train: `"stage"`, the outermost stage, at `lr`, and
        `"core"`, everything inside it, at `lr * core_lr_scale`; no `"core"` while it is frozen.
        """
        stage = [parameter for parameter in self.stages[-1].parameters() if parameter.requires_grad]
        stage_ids = {id(parameter) for parameter in stage}
        core = [p for p in self.parameters() if p.requires_grad and id(p) not in stage_ids]
        groups = [{"name": "stage", "params": stage, "lr": lr}]
        if core:
            groups.append({"name": "core", "params": core, "lr": lr * core_lr_scale})
        return groups

    # ------------------------------------------------------------------------------------------------------------------
    # The model

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", **kwargs: Any
    ) -> None:
        """As diffusers has it; an adapter of the core that this model was grown from becomes one of its `core`."""
        weight_name = kwargs.pop("weight_name", None)
        state_dict, metadata = fetch_adapter(pretrained_model_name_or_path_or_dict, kwargs, weight_name)
        kwargs["metadata"] = metadata or kwargs.get("metadata")
        super().load_lora_adapter(map_to_core(state_dict, self, prefix), prefix=prefix, **kwargs)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        num_stages: int | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        negative_encoder_attention_mask: torch.Tensor | None = None,
        guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        text_cache: TextCache | None = None,
    ) -> GreedyGrowOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                The state `x = (1 - sigma) x0 + sigma e` at the outermost resolution. `H` and `W` must be multiples
                of `sample_size / inner grid`, the side of what one cell of the core's grid covers.
            timestep (`torch.Tensor` of shape `(B,)` or `()`, or a number):
                `1000 * sigma`, in (0, 1000].
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`, *optional*):
                Text embeddings. Required by a conditional model.
            encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                True for the text tokens to attend to; all of them by default.
            cross_attention_kwargs (`dict`, *optional*):
                `scale` scales the LoRA layers; the rest goes to the attention processors.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GreedyGrowOutput`] or a tuple with the velocity alone.
            num_stages (`int`, *optional*):
                How many of the growth stages take part, from the innermost; all by default. The others add no detail:
                with 0, the prediction is `U x0_in`, the core's own. For states of high noise, in which detail cannot be
                seen yet, that is enough, at a fraction of the cost.
            negative_encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`, *optional*):
                Text to steer away from, at the core's resolution: the core answers for it as well, and the stages
                around it go on from what `guide` makes of its two answers.
            negative_encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                Its mask; needed if there is an `encoder_attention_mask`.
            guide (`Callable`, *optional*):
                `guide(pred, negative_pred)`, both clean images at the core's resolution, returns the guided one.
            text_cache ([`TextCache`], *optional*):
                See [`ShallowUNet2DModel.forward`].

        Returns:
            [`GreedyGrowOutput`] or `tuple`; the velocity has the shape and the dtype of `sample`.

        Raises:
            `ValueError`: if text, sides or `num_stages` do not fit, or if a stage or a core is asked for an answer that it
            cannot give by itself, since with `init="random"` the first stage and the core are one.
        """
        batch_size, _, height, width = sample.shape
        check_text(self.config.cross_attention_dim, batch_size, encoder_hidden_states, encoder_attention_mask)
        cell = self.config.patch_size * self.config.sample_size // self.config.inner_sample_sizes[0]
        if height % cell or width % cell:
            raise ValueError(f"`sample` is {height} x {width}, but both sides must be multiples of {cell}.")
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(batch_size)
        sigma = timestep / 1000
        num_stages = len(self.stages) if num_stages is None else num_stages
        if not 0 <= num_stages <= len(self.stages):
            raise ValueError(f"`num_stages={num_stages}` must be from 0 to {len(self.stages)}.")
        if (guide is None) != (negative_encoder_hidden_states is None):
            raise ValueError("`guide` and `negative_encoder_hidden_states` need each other: pass both or neither.")
        if not self.stages[0].preserves and (num_stages == 0 or guide is not None):
            argument = "`num_stages=0`" if num_stages == 0 else "`guide`"
            raise ValueError(
                f"{argument} asks the core for an image, but that of a model grown with `init='random'` draws no images of "
                "its own. Run all stages, once for each text."
            )
        if guide is not None:
            check_text(
                self.config.cross_attention_dim,
                batch_size,
                negative_encoder_hidden_states,
                negative_encoder_attention_mask,
            )
            if (encoder_attention_mask is None) != (negative_encoder_attention_mask is None):
                raise ValueError(
                    "`encoder_attention_mask` and `negative_encoder_attention_mask` need each other: pass both or neither."
                )

        dtype = self.stages[0].encoder.conv_in.weight.dtype  # of all weights; `self.dtype` looks for it
        grad_enabled = torch.is_grad_enabled()
        if grad_enabled:
            text_cache = None
        # With the core frozen and the side path, no gradient is needed inside: neither computed nor stored.
        # But adapters, wherever they are, are there to be trained.
        nothing_trains_inside = self.core_frozen and self.stages[-1].preserves and not self._hf_peft_config_loaded
        inner_grad_enabled = grad_enabled and not nothing_trains_inside

        def run(level: int, state: torch.Tensor, state_sigma: torch.Tensor, features: torch.Tensor | None = None):
            """The core, which is level 0, or a stage with all that is inside it."""
            outermost = level == len(self.stages)
            with torch.set_grad_enabled(grad_enabled if outermost else inner_grad_enabled):
                if level == 0:
                    return run_core(state, state_sigma, features)
                return self.stages[level - 1](
                    state,
                    state_sigma,
                    encoder_hidden_states,
                    encoder_attention_mask,
                    cross_attention_kwargs,
                    inner=partial(run, level - 1),
                    dtype=dtype,
                    text_cache=text_cache or TextCache(),
                )

        def run_core(state: torch.Tensor, state_sigma: torch.Tensor, features: torch.Tensor | None):
            """The core; with a `guide` for both texts at once."""
            hidden_states, attention_mask = encoder_hidden_states, encoder_attention_mask
            if guide is not None:
                hidden_states = torch.cat([encoder_hidden_states, negative_encoder_hidden_states])
                if encoder_attention_mask is not None:
                    attention_mask = torch.cat([encoder_attention_mask, negative_encoder_attention_mask])
                state, state_sigma = torch.cat([state, state]), torch.cat([state_sigma, state_sigma])
            inner = self.core(
                state,
                1000 * state_sigma,
                hidden_states,
                attention_mask,
                cross_attention_kwargs=cross_attention_kwargs,
                features=features,
                text_cache=text_cache,
            )
            if guide is None:
                return inner.pred_original_sample, inner.features
            return guide(*inner.pred_original_sample.chunk(2)), inner.features[:batch_size]

        # From the outermost stage that takes part to the core, and back
        state, state_sigma = sample, sigma
        for stage in reversed(self.stages[num_stages:]):
            state, state_sigma = descend(state, state_sigma, stage.factor)
        pred_original_sample, features = run(num_stages, state, state_sigma)
        # `U`, not `S`: what the stages that are left out would draw stays out of the state altogether, until they set in.
        if num_stages < len(self.stages):
            pred_original_sample = upsample(pred_original_sample, height // pred_original_sample.shape[-2])

        pred_original_sample = pred_original_sample.to(sample.device)
        velocity = velocity_from_clean(sample, pred_original_sample, sigma).to(sample.dtype)
        if not return_dict:
            return (velocity,)
        return GreedyGrowOutput(sample=velocity, pred_original_sample=pred_original_sample, features=features)


# ----------------------------------------------------------------------------------------------------------------------
# What must fit, and what must be there

CORE_CONFIG_NAMES = (
    "in_channels",
    "out_channels",
    "patch_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "mlp_ratio",
    "cross_attention_dim",
)


def map_to_core(names: dict, model, prefix: str | None = None) -> dict:
    """
    Names of a core's adapter layers, such as `transformer_blocks.0...` after `prefix` and a dot, as those of a grown model
    (`core.transformer_blocks.0...`); names that are a grown model's already, and all names if `model` is a core, stay.
    """
    if not isinstance(model, GrowableUNet2DConditionModel):
        return names
    start = f"{prefix}." if prefix else ""
    parts = tuple(f"{start}{part}." for part, _ in model.core.named_children())
    return {
        f"{start}core.{name.removeprefix(start)}" if name.startswith(parts) else name: value
        for name, value in names.items()
    }


def get_stage_patch_size(
    inner_sample_size: int,
    sample_size: int,
    inner_patch_size: int,
    block_out_channels: tuple[int, ...],
) -> int:
    """
    The entry patch of a stage, `sample_size / (inner_grid * 2 ** len(block_out_channels))`; raises a `ValueError` that
    names what does not fit and what would.
    """
    if sample_size <= inner_sample_size or sample_size % inner_sample_size:
        raise ValueError(
            f"`sample_size={sample_size}` must be a larger multiple of the core's {inner_sample_size}: "
            f"{inner_sample_size * max(2, round(sample_size / inner_sample_size))}, for example."
        )
    cell = sample_size // inner_sample_size * inner_patch_size
    most = 0
    while cell % 2 ** (most + 1) == 0:
        most += 1
    if most == 0:
        raise ValueError(
            f"`sample_size={sample_size}` does not fit: a cell of the inner grid covers {cell} pixels per side, which "
            f"cannot be halved; {2 * inner_sample_size} would do."
        )
    if len(block_out_channels) > most:
        raise ValueError(
            f"`block_out_channels={tuple(block_out_channels)}` must have between 1 and {most} entries here: "
            f"a cell of the inner grid covers {cell} pixels per side, and each entry halves it once."
        )
    return cell // 2 ** len(block_out_channels)


def check_growable(core: ShallowUNet2DModel | GrowableUNet2DConditionModel) -> None:
    """Raises a `ValueError` if a model is not as it was trained: with adapters, quantised, or with weights elsewhere."""
    if getattr(core, "peft_config", None):
        raise ValueError(
            f"`core` has the adapters {sorted(core.peft_config)}, which growing would not carry over: remove them by "
            "`core.unload_lora()`, and load them into the grown model."
        )
    if getattr(core, "hf_quantizer", None) is not None:
        raise ValueError(
            "`core` was loaded with a `quantization_config`, and a grown model could neither be trained nor saved with such "
            "weights: grow it as it was trained, and pass the `quantization_config` when loading the result."
        )
    if any(parameter.dtype.itemsize == 1 or parameter.is_meta for parameter in core.parameters()) and not (
        all(parameter.is_meta for parameter in core.parameters())  # to count what it would cost
    ):
        raise ValueError(
            "`core` has weights in eight bits or on the disk, by layerwise casting or offloading: grow it as it was loaded, "
            "and enable these on the grown model."
        )


def find_core(path: str | Path, subfolder: str | None = None, **kwargs) -> tuple[Any, dict, str | None, str | None]:
    """
    Looks for either model in a folder or Hub repository, alone or as the `unet` of a pipeline.

    Returns:
        Its class, its configuration, the subfolder it is in, and its commit if it is on the Hub.

    Raises:
        `OSError`: if nothing is there.
        `ValueError`: if it is another kind of model.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in ("torch_dtype", "dtype", "variant", "device_map")}
    try:
        config, commit = ShallowUNet2DModel.load_config(path, subfolder=subfolder, return_commit_hash=True, **kwargs)
    except OSError as error:
        try:
            if subfolder is not None:
                raise
            subfolder = "unet"
            config, commit = ShallowUNet2DModel.load_config(
                path, subfolder=subfolder, return_commit_hash=True, **kwargs
            )
        except OSError:
            raise OSError(
                f"`core={str(path)!r}` is no model: no readable `config.json` in it, nor in its subfolder `{subfolder}`. "
                "Pass the folder or repository of a trained core, or of a pipeline around one; of a repository, a `revision` that "
                f"it has and a `token` that may read it. The reason was {type(error).__name__}: {error}"
            ) from error
    classes = {model.__name__: model for model in (ShallowUNet2DModel, GrowableUNet2DConditionModel)}
    if config.get("_class_name") not in classes:
        raise ValueError(
            f"`core={str(path)!r}` holds a {config.get('_class_name')}; only {' and '.join(classes)} can be grown."
        )
    return classes[config["_class_name"]], config, subfolder, commit


def load_core(path: str | Path, **kwargs) -> ShallowUNet2DModel | GrowableUNet2DConditionModel:
    """
    Loads either model from a folder or Hub repository, alone or as the `unet` of a pipeline, and accepts nothing less
    than all of its weights. `kwargs` go to `from_pretrained`.

    Raises:
        `OSError`: if nothing is there, a file is damaged, or weights have other shapes than its configuration says.
        `ValueError`: if it is another kind of model, or weights are missing or left over.
    """
    model_class, _, kwargs["subfolder"], commit = find_core(path, **kwargs)
    try:
        model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        raise OSError(
            f"`core={str(path)!r}` cannot be loaded: {type(error).__name__}: {error} Unless that is about an argument "
            "of yours, its weights are missing, damaged or do not belong to its config.json: download or save it "
            "again."
        ) from error
    # diffusers fills in what a checkpoint lacks with random numbers and a warning; a core must be complete.
    problems = {name: names for name, names in info.items() if names}
    if problems:
        raise ValueError(f"`core={str(path)!r}` does not hold the weights that its config.json describes: {problems}.")
    model._commit_hash = commit
    return model

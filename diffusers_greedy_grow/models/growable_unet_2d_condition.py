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
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import unwrap_module

from ..flow import descend, upsample, velocity_from_clean
from ..hub.lineage import add_to_lineage, find_source, get_lineage
from ..hub.mixins import HubMixin
from ..hub.references import find_folder
from .adapters import AdapterMixin
from .blocks import GreedyGrowOutput, check_sizes, complete_crop
from .core_loading import check_unmodified, load_core
from .core_references import CoreReferenceMixin
from .cores import Core, ForeignCore, adopt_core, build_core, is_foreign
from .growth_stage import GrowthStage
from .shallow_unet_2d import CORE_CONFIG_NAMES, ShallowUNet2DModel, check_text
from .text import TextCache, TextInputs


class GrowableUNet2DConditionModel(HubMixin, CoreReferenceMixin, AdapterMixin, AttentionMixin, ConfigMixin):
    r"""
    A core with growth stages around it, each of which multiplies the resolution (Vasconcelos et al., 2024,
    section 4). Create one by [`~GrowableUNet2DConditionModel.from_core`]; loading uses the constructor.

    With `init="preserve"`, a stage around an inner model computes the following, with the pooling `P`, the smooth upsampling
    `S` and the scale `n` of `flow.py`:

        x_in   = P x / n(sigma)                     # a state of the inner model's own process, at sigma_in
        x0_in  = inner(x_in, sigma_in)              # its own prediction of the clean image
        x0_hat = S x0_in + detail + gain (x - (1 - sigma) S x0_in)

    The decoder predicts `detail` and `gain`, for each pixel, from `x`, `S x0_in`, the core's features, the text and `sigma`.
    Both start at zero: right after growing, `P x0_hat` is the inner model's prediction, up to rounding. With
    `init="random"`, the paper's recipe, the first stage does not add to the core's image: its encoder feeds the core's
    transformer, its decoder alone draws the image, and the core's entry, exit and residual blocks are removed.

    Parameters:
        sample_size (`int`, defaults to 256):
            The resolution of the outermost stage.
        inner_sample_sizes (`tuple[int, ...]`, defaults to `(64,)`):
            The resolutions inside, one per stage, the core's first.
        block_out_channels (`tuple[tuple[int, ...], ...]`, defaults to `((128, 256),)`):
            The channels of each stage, the innermost stage first. A stage has one entry per halving between its own grid
            and the inner model's feature grid, outermost first.
        layers_per_block (`tuple[int, ...]`, defaults to `(1,)`):
            The number of residual blocks per entry, for each stage.
        init (`str`, defaults to `"preserve"`):
            `"preserve"` or `"random"`: how the first stage was grown. Later stages always preserve.
        in_channels, out_channels, patch_size, hidden_size, num_layers, num_attention_heads, mlp_ratio:
            The core's configuration; see [`ShallowUNet2DModel`].
        cross_attention_dim, dropout, crop_conditioning:
            More of the core's configuration; see [`ShallowUNet2DModel`].
        core_config (`dict`, *optional*), core_process (`dict`, *optional*):
            A core of another class: the name of the class, one of diffusers', with its configuration, and the process that it
            was trained on. With them, the core's configuration above says what the stages need to know of that core, and
            what only [`ShallowUNet2DModel`] has is None. [`~GrowableUNet2DConditionModel.from_core`] sets all of this.
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
        num_layers: int | None = 12,
        num_attention_heads: int | None = 12,
        mlp_ratio: float | None = 4.0,
        cross_attention_dim: int | None = 768,
        dropout: float = 0.0,
        crop_conditioning: bool = False,
        core_config: dict[str, Any] | None = None,
        core_process: dict[str, Any] | None = None,
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

        arguments = {name: self.config[name] for name in CORE_CONFIG_NAMES}
        if core_config is None:
            self.core = ShallowUNet2DModel(sample_size=inner_sample_sizes[0], **arguments)
        else:
            self.core = build_core(core_config, core_process, inner_sample_sizes[0])
            check_core_arguments(self.core, arguments, init)
            self._repeated_blocks = [*self.core._repeated_blocks, "GrowthEncoder", "GrowthDecoder"]
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
                    "crop_conditioning": crop_conditioning,
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
        core: "ShallowUNet2DModel | GrowableUNet2DConditionModel | ModelMixin | str | Path",
        sample_size: int,
        block_out_channels: tuple[int, ...] = (128, 256),
        layers_per_block: int = 1,
        init: str = "preserve",
        core_sample_size: int | None = None,
        process: Any = None,
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
        Grow a model: a new stage of `sample_size` around a copy of `core`, whose adapters must be unloaded.

        Args:
            core ([`ShallowUNet2DModel`], [`GrowableUNet2DConditionModel`], `str` or `Path`):
                The pretrained model, or a local folder or Hub repository that holds it (alone or as the `unet` of a
                pipeline). A grown model grows again. Models of diffusers in pixel space can be grown, too, with their
                `process`: a loaded `UNet2DModel`, `UNet2DConditionModel` or `PRXTransformer2DModel`.
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
            core_sample_size (`int`, *optional*):
                The resolution of a core of diffusers whose configuration does not say it.
            process (`DDPMScheduler`, `DDIMScheduler` or [`RectifiedFlow`], *optional*):
                The process that a core of diffusers was trained on: a UNet's scheduler, whose `prediction_type` and limits to
                the values of a clean image also count, or `RectifiedFlow(noise_scale)` of `diffusers_greedy_grow.flow` for a
                `PRXTransformer2DModel` that predicts clean images.
            push_to_hub (`bool`, defaults to `False`):
                Whether to publish the grown model. If only the upload fails, the model is returned nevertheless; the log
                says in which folder everything lies and how to continue.
            repo_id, private, create_pr, commit_message:
                See [`HubMixin.push_to_hub`].
            token (`str`, *optional*):
                A token for the core's repository and for `repo_id`.
            revision (`str`, *optional*):
                If `core` is a repository, its branch, tag or commit; if it is a loaded model, the branch of `repo_id` to
                commit to.
            kwargs:
                Passed to `from_pretrained` of the core if `core` is a path or repository: `subfolder`, `variant`,
                `cache_dir`, `local_files_only`, `force_download`, `dtype`, ...

        Returns:
            [`GrowableUNet2DConditionModel`] in the dtype and on the device of the core.

        Raises:
            `ValueError`: if `sample_size`, `block_out_channels`, `init` or `process` do not fit the core, if it has adapters or
                is quantized, or if it is a model of diffusers that cannot be grown.
            `TypeError`: if there are `kwargs` although `core` is a loaded model, arguments of a push without one, or a `process`
                for a core that has its own.
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
        if not isinstance(core, (ShallowUNet2DModel, GrowableUNet2DConditionModel)) and not is_foreign(core):
            raise ValueError(
                "`core` must be a ShallowUNet2DModel, a GrowableUNet2DConditionModel, a UNet2DModel, UNet2DConditionModel or "
                f"PRXTransformer2DModel of diffusers, a folder or a repository id, but is a {type(core).__name__}. A pipeline is "
                "grown by `GreedyGrowPipeline.from_core`."
            )
        check_unmodified(core)
        lineage, source_of_core = get_lineage(core), find_source(core)
        folder = core.core_folder if isinstance(core, GrowableUNet2DConditionModel) else find_folder(core)
        if is_foreign(core):
            core = adopt_core(core, process, core_sample_size)
        elif process is not None or core_sample_size is not None:
            raise TypeError("`process` and `core_sample_size` only apply to a `core` that is a model of diffusers.")

        # 1. The grown model: the core's configuration with one more stage, on the meta device, so without memory and without
        # random numbers
        config = core.config if isinstance(core, GrowableUNet2DConditionModel) else core.growth_config
        grown = cls.build_on_meta(config, sample_size, block_out_channels, layers_per_block, init)
        if push is not None:
            push.prepare()

        # 2. The inner model: every parameter comes from the core, copied unless the core was loaded here
        inside = [(grown.core, core)]
        if isinstance(core, GrowableUNet2DConditionModel):
            inside = [(grown.core, core.core), *zip(grown.stages, core.stages)]
        for module, source in inside:
            values = source.state_dict()
            state = {name: values[name] if is_loaded_here else values[name].clone() for name in module.state_dict()}
            module.load_state_dict(state, assign=True)

        # 3. The new stage, with random weights; its time embedding is in float32 if that of our own core is
        stage = GrowthStage(**grown.stage_arguments[-1]).to(device=core.device, dtype=core.dtype)
        is_own = isinstance(grown.core, ShallowUNet2DModel)
        stage.time_embedding.to(get_parameter_dtype(grown.core.time_embedding) if is_own else torch.float32)
        grown.stages[-1] = stage

        grown.core_folder = folder
        grown.register_to_config(_lineage=lineage)
        add_to_lineage(grown, grown_to=sample_size, init=init, **source_of_core)
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
        Build the model that growing a core of this `config` gives, without weights. Raise a `ValueError` that names what does
        not fit. The arguments are those of [`~GrowableUNet2DConditionModel.from_core`].
        """
        stages: dict = {"inner_sample_sizes": (), "block_out_channels": (), "layers_per_block": (), "init": init}
        if "inner_sample_sizes" in config:
            if init != "preserve":
                raise ValueError(
                    f"`init={init!r}` keeps a transformer and throws away what is around it, but the encoder and decoder "
                    'of a grown core have been trained, too: pass `init="preserve"`, or grow `core.core` again.'
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
                **{name: config.get(name) for name in ("core_config", "core_process")},
            )

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        """The resolutions of the core and of each stage, the core's first: `(64, 256, ...)`."""
        return (*self.config.inner_sample_sizes, self.config.sample_size)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The `sample_sizes` at which the model predicts images: not the core's with `init="random"`, which draws none of its own."""
        return self.sample_sizes if self.stages[0].preserves else self.sample_sizes[1:]

    @property
    def side_multiple(self) -> int:
        """The number that must divide both sides of a state: as many cells of the outermost grid as the core needs."""
        return self.core.side_multiple * self.config.sample_size // self.config.inner_sample_sizes[0]

    @property
    def reads_padding(self) -> bool:
        """Whether the text's padding also decides the core's prediction, whatever the mask says."""
        return self.core.reads_padding

    # ------------------------------------------------------------------------------------------------------------------
    # Phases

    def freeze_core(self) -> None:
        """
        Begin the detail phase: only the outermost stage trains. With `init="preserve"`, everything inside runs without
        gradients from now on; with `init="random"`, gradients cross the frozen core. What is frozen stays in evaluation mode,
        without dropout.
        """
        self.requires_grad_(False)
        self.stages[-1].requires_grad_(True)
        self.core_frozen = True
        self.train(self.training)

    def unfreeze_core(self) -> None:
        """Begin the joint phase: everything trains."""
        self.requires_grad_(True)
        self.core_frozen = False
        self.train(self.training)

    def train(self, mode: bool = True) -> "GrowableUNet2DConditionModel":
        """Switch to training or evaluation. A frozen core stays in evaluation: a stage learns from the core as it is sampled."""
        super().train(mode)
        if self.core_frozen and not self._hf_peft_config_loaded:  # as in `forward`: adapters may train anywhere
            for module in (self.core, *self.stages[:-1]):
                module.eval()
        return self

    def parameter_groups(self, lr: float, core_lr_scale: float = 1.0) -> list[dict]:
        """
        Return the parameters that train, as groups for a torch optimizer: `"stage"`, the outermost stage, at `lr`, and
        `"core"`, everything inside it, at `lr * core_lr_scale`. While the core is frozen there is no `"core"`.
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
        level: int | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        negative_encoder_attention_mask: torch.Tensor | None = None,
        guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        text_cache: TextCache | None = None,
        crop: torch.Tensor | None = None,
        inner_image: torch.Tensor | None = None,
        core_output: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> GreedyGrowOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, H, W)`):
                The state `x = (1 - sigma) x0 + sigma e` at the resolution of `level`. `H` and `W` must be multiples of what
                one cell of the core's grid covers there: `side_multiple` at the outermost level.
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
                The number of growth stages that take part, from the innermost; all by default. The others add no detail:
                with 0, the prediction is the core's own, `U x0_in`. At high noise levels, which hide the detail anyway,
                this costs a fraction and loses nothing.
            level (`int`, *optional*):
                The index in `sample_sizes` of the resolution to work at: 0 for the core's, where the model is the core; the
                outermost by default. The stages around this level do not run, and there are at most `level` `num_stages`.
            negative_encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`, *optional*):
                Text to steer away from, at the core's resolution: the core predicts an image for each of the two texts,
                and the stages around it continue from the image that `guide` returns.
            negative_encoder_attention_mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*):
                Its mask; needed if there is an `encoder_attention_mask`.
            guide (`Callable`, *optional*):
                `guide(pred, negative_pred)` combines two clean images at the core's resolution into one.
            text_cache ([`TextCache`], *optional*), crop (`torch.Tensor` of shape `(B, 3)`, *optional*):
                See [`ShallowUNet2DModel.forward`].
            inner_image (`torch.Tensor` of shape `(B, out_channels, h, w)`, *optional*):
                A clean image at the resolution of the core or of an inner stage. It takes the place of the one that is
                predicted there, and the stages around it add their detail.
            core_output (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                What [`~GrowableUNet2DConditionModel.predict_core`] has returned for the same state, text and crop, or a rounded
                copy: the core is not run again.

        Returns:
            [`GreedyGrowOutput`] or `tuple`; the velocity has the shape and the dtype of `sample`.

        Raises:
            `ValueError`: if text, sides, `num_stages`, `level` or `core_output` do not fit, or if the core is asked for an image of
                its own although the model was grown with `init="random"`.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
        sigma = timestep / 1000
        crop = complete_crop(self.config.crop_conditioning, crop, timestep)
        level = len(self.stages) if level is None else level
        num_stages = level if num_stages is None else num_stages
        grad_enabled = torch.is_grad_enabled()
        if grad_enabled:
            text_cache = None
        text = TextInputs(encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs, text_cache)
        negative_text = None
        if negative_encoder_hidden_states is not None:
            negative_text = TextInputs(negative_encoder_hidden_states, negative_encoder_attention_mask)
        self.check_inputs(sample, text, num_stages, level, negative_text, guide, inner_image)
        dtype = self.stages[0].encoder.conv_in.weight.dtype  # the model's; `self.dtype` searches all weights

        # With a frozen core inside a stage that preserves, nothing inside needs gradients: they are neither computed nor
        # stored. Adapters are an exception: wherever they are, they may train.
        nothing_trains_inside = self.core_frozen and self.stages[-1].preserves and not self._hf_peft_config_loaded
        inner_grad_enabled = grad_enabled and not nothing_trains_inside

        # 1. Inwards: the state at each resolution
        (core_sample, core_sigma), *stage_states = self.descend_to_core(sample, sigma, level)

        # 2. The core; before it, what the stages read of the text, the same for all
        stage_text = text.cast(dtype)
        text_sum = stage_text.sum_tokens() if num_stages else None  # the core alone does not read it
        run_core = partial(self.run_core, core_sample, core_sigma, text, negative_text, guide, crop=crop)
        image: torch.Tensor | None
        features: torch.Tensor | None
        if core_output is not None:
            self.check_core_output(core_output, core_sample, guide)
            image, features = core_output[0].to(sample.dtype), core_output[1].to(dtype)
        elif self.stages[0].preserves:
            with torch.set_grad_enabled(inner_grad_enabled):
                image, features = run_core()
        else:
            # `init="random"`: the core has no entry, it starts from the first stage's encoder features. That stage runs it.
            image, features = None, None
        if image is not None and inner_image is not None and inner_image.shape == image.shape:
            image = inner_image
        images = [image]

        # 3. Outwards: the stages that take part add detail, from the innermost to the outermost
        for stage, state in zip(self.stages[:num_stages], stage_states):
            with torch.set_grad_enabled(grad_enabled if stage is self.stages[-1] else inner_grad_enabled):
                image, features = stage(*state, stage_text, text_sum, dtype, image, features, run_core, crop)
            if inner_image is not None and inner_image.shape == image.shape:
                image = inner_image
            images.append(image)
        assert image is not None
        inner_images = tuple(one for one in images[:level] if one is not None)

        # Stages that are left out enlarge by `U`, not `S`: the state gets no high band at all until they join.
        if num_stages < level:
            image = upsample(image, sample.shape[-2] // image.shape[-2])

        image = image.to(sample.device)
        velocity = velocity_from_clean(sample, image, sigma).to(sample.dtype)
        if not return_dict:
            return (velocity,)
        return GreedyGrowOutput(
            sample=velocity, pred_original_sample=image, features=features, inner_images=inner_images
        )

    def descend_to_core(
        self, sample: torch.Tensor, sigma: torch.Tensor, level: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the state at each resolution, from the core's to that of `level`, each with its noise level; see [`descend`]."""
        states = [(sample, sigma)]
        for stage in reversed(self.stages[:level]):
            states.append(descend(*states[-1], stage.factor))
        return states[::-1]

    def predict_core(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        crop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run the core alone. The arguments are those of [`~GrowableUNet2DConditionModel.forward`], which takes the result as
        `core_output`.

        Returns:
            The clean image `(B, C, h, w)` at the core's resolution, and the core's features.

        Raises:
            `ValueError`: if text or sides do not fit, or the model was grown with `init="random"`.
        """
        text = TextInputs(encoder_hidden_states, encoder_attention_mask)
        self.check_inputs(sample, text, 0, len(self.stages), None, None)
        state, sigma = self.descend_to_core(sample, timestep / 1000, len(self.stages))[0]
        image, features = self.run_core(
            state, sigma, text, None, None, crop=complete_crop(self.config.crop_conditioning, crop, timestep)
        )
        assert image is not None
        return image, features

    def run_core(
        self,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        text: TextInputs,
        negative_text: TextInputs | None,
        guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        features: torch.Tensor | None = None,
        crop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        Run the core on a state of its own resolution; with a `guide`, once for both texts together. `features` are those of
        the first stage's encoder, with `init="random"`.

        Returns:
            The clean image, guided if there is a `guide` (None with `init="random"`), and the core's features for `text`.
        """
        batch_size = sample.shape[0]
        embeds, mask = text.encoder_hidden_states, text.encoder_attention_mask
        if negative_text is not None:
            negative_embeds, negative_mask = negative_text.encoder_hidden_states, negative_text.encoder_attention_mask
            assert embeds is not None and negative_embeds is not None
            embeds = torch.cat([embeds, negative_embeds])
            if mask is not None and negative_mask is not None:
                mask = torch.cat([mask, negative_mask])
            sample, sigma = torch.cat([sample, sample]), torch.cat([sigma, sigma])
            crop = None if crop is None else torch.cat([crop, crop])
        core: Core = self.core
        output = core(
            sample,
            1000 * sigma,
            embeds,
            mask,
            cross_attention_kwargs=text.cross_attention_kwargs,
            features=features,
            text_cache=text.cache,
            crop=crop,
        )
        image, features = output.pred_original_sample, output.features
        if guide is not None:
            image, features = guide(*image.chunk(2)), features[:batch_size]
        return None if image is None else core.limit_values(image), features

    def check_core_output(
        self, core_output: tuple[torch.Tensor, torch.Tensor], state: torch.Tensor, guide: Callable | None
    ) -> None:
        """Raise a `ValueError` unless `core_output` can be used instead of running the core on `state`."""
        if guide is not None or not self.stages[0].preserves:
            raise ValueError(
                "`core_output` is a prediction for one text, of a core that draws images: pass no `guide`, and no model grown "
                "with `init='random'`."
            )
        batch_size, _, height, width = state.shape
        cell = self.config.patch_size
        shapes = [tuple(state.shape), (batch_size, self.config.hidden_size, height // cell, width // cell)]
        if (found := [tuple(tensor.shape) for tensor in core_output]) != shapes:
            raise ValueError(
                f"`core_output` has the shapes {found}, but the core's image and features for this `sample` have {shapes}: pass what "
                "`predict_core` returns for it."
            )

    def check_inputs(
        self,
        sample: torch.Tensor,
        text: TextInputs,
        num_stages: int,
        level: int,
        negative_text: TextInputs | None,
        guide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        inner_image: torch.Tensor | None = None,
    ) -> None:
        """Raise a `ValueError` that names the argument of [`~GrowableUNet2DConditionModel.forward`] that does not fit."""
        batch_size, _, height, width = sample.shape
        dim = self.config.cross_attention_dim
        check_text(dim, batch_size, text.encoder_hidden_states, text.encoder_attention_mask)
        if not 0 <= level <= len(self.stages):
            raise ValueError(f"`level={level}` must be from 0 to {len(self.stages)}, for one of {self.sample_sizes}.")
        cell = self.side_multiple * self.sample_sizes[level] // self.config.sample_size
        if height % cell or width % cell:
            raise ValueError(f"`sample` is {height} x {width}, but both sides must be multiples of {cell}.")
        if not 0 <= num_stages <= level:
            raise ValueError(f"`num_stages={num_stages}` must be from 0 to {level}.")
        if (guide is None) != (negative_text is None):
            raise ValueError("`guide` and `negative_encoder_hidden_states` need each other: pass both or neither.")
        if not self.stages[0].preserves and (num_stages == 0 or guide is not None):
            argument = "`num_stages=0`" if num_stages == 0 else "`guide`"
            raise ValueError(
                f"{argument} needs a core that predicts images, but the core of a model grown with `init='random'` draws no "
                "images of its own. Run all stages, once per text."
            )
        if inner_image is not None:
            # The levels that predict an image, and have a stage around them that takes part
            sizes = self.sample_sizes[0 if self.stages[0].preserves else 1 : num_stages]
            scales = [self.sample_sizes[level] // size for size in sizes]
            shapes = [(batch_size, sample.shape[1], height // scale, width // scale) for scale in scales]
            if tuple(inner_image.shape) not in shapes:
                raise ValueError(
                    f"`inner_image` is of shape {tuple(inner_image.shape)}, but must be of one of {shapes}."
                )
        if negative_text is not None:
            check_text(dim, batch_size, negative_text.encoder_hidden_states, negative_text.encoder_attention_mask)
            if (text.encoder_attention_mask is None) != (negative_text.encoder_attention_mask is None):
                raise ValueError(
                    "`encoder_attention_mask` and `negative_encoder_attention_mask` need each other: pass both or neither."
                )


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def get_stage_patch_size(
    inner_sample_size: int,
    sample_size: int,
    inner_patch_size: int,
    block_out_channels: tuple[int, ...],
) -> int:
    """
    Return the entry patch of a stage, `sample_size / (inner_grid * 2 ** len(block_out_channels))`. Raise a `ValueError`
    that names what does not fit and a value that fits.
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
            f"cannot be halved; {2 * inner_sample_size} would fit."
        )
    if len(block_out_channels) > most:
        raise ValueError(
            f"`block_out_channels={tuple(block_out_channels)}` must have between 1 and {most} entries here: "
            f"a cell of the inner grid covers {cell} pixels per side, and each entry halves it once."
        )
    return cell // 2 ** len(block_out_channels)


def check_core_arguments(core: ForeignCore, arguments: dict[str, Any], init: str) -> None:
    """Raise a `ValueError` if a model's `arguments` about its core are not those of this one, or it cannot be grown by `init`."""
    if init != "preserve":
        raise ValueError(
            f"`init={init!r}` keeps the transformer of a ShallowUNet2DModel alone, but the core is another model: pass "
            '`init="preserve"`.'
        )
    for name, value in arguments.items():
        if value != core.growth_config[name]:
            raise ValueError(f"`{name}={value!r}` must be {core.growth_config[name]!r} for this `core_config`.")

# Copyright 2026 The diffusers-greedy-grow authors.
# SPDX-License-Identifier: Apache-2.0


"""
Publishing: a model's or a pipeline's files, its card and where it came from, as one commit on the Hub.

Where a model came from is its *lineage*, a list of entries in its configuration, which therefore travels with its weights:
growths (`{"grown_to": 256, ...}`) and phases of training (`{"phase": "grown-256-detail", ...}`), the oldest first.
"""

import fnmatch
import inspect
import json
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# What a server answers when the same request may well succeed a moment later; 412: somebody else has committed.
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
ATTEMPTS = 4
PUSH_ARGUMENTS = {"repo_id", "commit_message", "private", "token", "create_pr", "revision"}
FETCH_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
CARD_TEMPLATE = Path(__file__).parent / "model_card_template.md"


class UploadError(RuntimeError):
    """An upload has failed; the message says in which folder everything lies, and the command that goes on."""


# ----------------------------------------------------------------------------------------------------------------------
# Lineage


def get_lineage(model) -> list[dict[str, Any]]:
    """Where a model came from, the oldest entry first."""
    return list(model.config.get("_lineage", []))


def find_source(model) -> dict[str, str]:
    """The repository, and where known its commit, that a model was loaded from; nothing of local folders."""
    name = str(model.config.get("_name_or_path", ""))
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})", name):
        return {"core": f"{cached[1]}/{cached[2]}", "core_revision": cached[3]}
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or Path(name).exists():
        return {}
    revision = getattr(model, "_commit_hash", None)
    return {"core": name} | ({"core_revision": revision} if revision else {})


def add_to_lineage(model, **entry: Any) -> None:
    """Adds an entry, of values that JSON can hold, to a model's lineage; of a phase, instead of what it was before."""
    lineage = get_lineage(model)
    if "phase" in entry and lineage and lineage[-1].get("phase") == entry["phase"]:
        lineage.pop()
    model.register_to_config(_lineage=[*lineage, entry])


# ----------------------------------------------------------------------------------------------------------------------
# Model cards

TAGS = ["diffusers", "diffusers-greedy-grow", "greedy-growing", "pixel-space", "flow-matching"]
USE_PIPELINE = """import diffusers_greedy_grow
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source})
pipe({prompt}).images[0].save("image.png")"""
USE_MODEL = """import diffusers_greedy_grow
from diffusers import AutoModel

unet = AutoModel.from_pretrained({source})"""
GROW = """from diffusers_greedy_grow import {name}

grown = {name}.from_core({source}, sample_size={size}, block_out_channels=(32, 64))"""
USE_LORA = """import diffusers_greedy_grow
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({source})
pipe.load_lora_weights("{repo_id}")
pipe({prompt}).images[0].save("image.png")"""
LORA_CARD = """---
{{ card_data }}
---

# {{ name }}

LoRA weights for `{{ base_model }}`, a text-to-image model in pixel space of diffusers-greedy-grow; they also load into every
model grown from it. Trained by `training_examples/train_lora.py`: {{ trained }}.

![Without and with the LoRA]({{ samples }})

## Use

    pip install diffusers-greedy-grow

```python
{{ use }}
```
"""
PROMPT = '"a large red striped circle on a white background"'


def make_card(
    pushed,
    repo_id: str,
    license: str | None = None,
    datasets: list[str] | None = None,
    eval_results: list[EvalResult] | None = None,
    samples: str | None = None,
    tag: str | None = None,
) -> ModelCard:
    """
    The card of a model or pipeline: metadata as the Hub reads it, how to use and grow it, and where it came from.

    Args:
        pushed ([`GreedyGrowPipeline`], [`ShallowUNet2DModel`] or [`GrowableUNet2DConditionModel`]):
            What is published.
        repo_id (`str`):
            Where.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            Identifiers of the Hub.
        eval_results (`list[EvalResult]`, *optional*):
            Figures, for the metadata and a table.
        samples (`str`, *optional*):
            The name, within the repository, of an image to show.
        tag (`str`, *optional*):
            The tag of the repository under which this state of it stays.
    """
    model = getattr(pushed, "unet", pushed)
    is_pipeline = model is not pushed
    lineage = get_lineage(model)
    cores = [entry["core"] for entry in lineage if entry.get("core")]
    name = repo_id.split("/")[-1]
    source = f'"{repo_id}"' + (f', revision="{tag}"' if tag else "")
    has_text = model.config.cross_attention_dim is not None
    relation: dict = {"base_model": cores[-1], "base_model_relation": "finetune"} if cores else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if has_text else "unconditional-image-generation",
        tags=TAGS,
        license=license,
        datasets=datasets,
        eval_results=eval_results or None,
        model_name=name if eval_results else None,
        **relation,
    )
    grown_name = "GreedyGrowPipeline" if is_pipeline else "GrowableUNet2DConditionModel"
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        name=name,
        repo_id=repo_id,
        class_name=type(pushed).__name__,
        sizes=model.sample_sizes,
        parameters=f"{model.num_parameters() / 1e6:.1f} M",
        untrained=bool(lineage) and "grown_to" in lineage[-1],
        has_text=has_text,
        use=(USE_PIPELINE if is_pipeline else USE_MODEL).format(source=source, prompt=PROMPT if has_text else ""),
        grow=GROW.format(name=grown_name, source=source, size=4 * model.sample_sizes[-1]),
        lineage=[describe(entry) for entry in lineage],
        figures=[(result.dataset_name, result.metric_name, result.metric_value) for result in eval_results or []],
        samples=samples,
        tag=tag,
    )


def write_card(folder: Path, pushed, repo_id: str, samples: str | Path | None = None, **card: Any) -> None:
    """Writes the card into a folder that holds `pushed`, with the image `samples`; the rest is as for [`make_card`]."""
    if samples is not None:
        card["samples"] = "samples" + Path(samples).suffix
        shutil.copy(samples, folder / card["samples"])
    make_card(pushed, repo_id, **card).save(folder / "README.md")


def make_lora_card(
    repo_id: str,
    base_model: str,
    revision: str | None,
    prompt: str,
    samples: str,
    trained: str,
    license: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCard:
    """
    The card of an adapter.

    Args:
        repo_id (`str`):
            Where it is published.
        base_model (`str`), revision (`str`, *optional*):
            The pipeline that it was trained on, a repository or a folder.
        prompt (`str`):
            For the example.
        samples (`str`):
            The name, within the repository, of an image to show.
        trained (`str`):
            How it was trained, in a few words.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            Identifiers of the Hub.
    """
    is_folder = Path(base_model).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, "lora"],
        license=license,
        datasets=datasets,
        **({} if is_folder else {"base_model": base_model, "base_model_relation": "adapter"}),  # type: ignore[arg-type]
    )
    source = f'"{base_model}"' + (f', revision="{revision}"' if revision else "")
    use = USE_LORA.format(source=source, repo_id=repo_id, prompt=json.dumps(prompt, ensure_ascii=False))
    return ModelCard.from_template(
        data,
        template_str=LORA_CARD,
        name=repo_id.split("/")[-1],
        base_model=base_model,
        trained=trained,
        use=use,
        samples=samples,
    )


def describe(entry: dict[str, Any]) -> tuple:
    """One row of a card's table of lineage."""
    if "grown_to" in entry:
        core, revision = entry.get("core"), entry.get("core_revision")
        source = f" from `{core}`" + (f" at `{revision[:12]}`" if revision else "") if core else ""
        return (f"grown{source}, `init={entry.get('init')!r}`", entry["grown_to"], "", "", "", "")
    return tuple(entry.get(name, "") for name in ("phase", "resolution", "trained", "steps", "images", "seed"))


# ----------------------------------------------------------------------------------------------------------------------
# Uploading


class HubMixin:
    """
    For models and pipelines, instead of diffusers': `push_to_hub` with a card, on a branch, and losing nothing;
    `save_pretrained` that writes only what loads again; and loading that reads no pickles and refuses what is strange.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any):
        """
        As diffusers has it, of safetensors only.

        Raises:
            `ValueError`: if `use_safetensors` is false, or the configuration has entries that the class does not know.
            `OSError`: if there are no safetensors.
        """
        refuse_pickles(kwargs.get("use_safetensors"))
        folder = Path(pretrained_model_name_or_path)
        # Else diffusers may look for pickled weights, which are refused.
        if not folder.is_dir() or any(folder.rglob("*.bin")):
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        What diffusers calls with a configuration before it builds anything. Entries that are not known are refused, and so
        are unknown arguments of a model's `from_pretrained`, which diffusers ignores.
        """
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
        if issubclass(cls, ModelMixin) and (unknown := sorted(unused.keys() & kwargs.keys())):
            raise TypeError(f"A {cls.__name__} is not loaded with {unknown}: are they misspelled?")
        if unknown := sorted(name for name in unused if name in config_dict and name not in kwargs):
            raise ValueError(
                f"The configuration has {unknown}, which a {cls.__name__} does not know. It was made by a newer version of "
                "diffusers-greedy-grow, which `pip install -U diffusers-greedy-grow` gets, or for something else."
            )
        lineage = config_dict.get("_lineage", [])
        if not isinstance(lineage, (list, tuple)) or not all(isinstance(entry, dict) for entry in lineage):
            raise ValueError(f"The configuration's `_lineage` must be a list of dictionaries, but is {lineage!r}.")
        return init_dict, unused, hidden

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As diffusers has it, but for three traps. Arguments that are not used here must be named all the same: a pipeline
        passes on to its components only what their `save_pretrained` names.

        Raises:
            `ValueError`: if adapters are attached or fused, whose weights would be under names that do not load.
        """
        given = inspect.signature(super().save_pretrained).bind_partial(save_directory, *args)  # type: ignore[misc]
        safe_serialization = given.arguments.pop("safe_serialization", safe_serialization)
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS & kwargs.keys()}
        warn_of_pickles(safe_serialization)
        model: Any = getattr(self, "unet", self)
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"The adapters {sorted(model.peft_config)} are attached, and what is saved with them would not load again. "
                "Save them by `save_lora_weights` and take them off by `unload_lora_weights()` (of a pipeline) or "
                "`save_lora_adapter` and `unload_lora()` (of a model); those that are fused stay part of the weights."
            )
        arguments = {"safe_serialization": True, "variant": variant, "max_shard_size": max_shard_size, **kwargs}
        arguments = {name: value for name, value in arguments.items() if value is not None} | given.arguments
        super().save_pretrained(**arguments)  # type: ignore[misc]
        for index in Path(save_directory).glob("*.safetensors.index*.json"):
            name = index.name.removesuffix(".json").replace(".safetensors.index", "") + ".safetensors"
            weights = index.with_name(name)
            if weights.exists() and weights.stat().st_mtime_ns > index.stat().st_mtime_ns:
                index.unlink()  # of shards that are gone: it would be believed when loading
        if push_to_hub:
            repo_id = push.pop("repo_id", None) or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, variant=variant, max_shard_size=max_shard_size, **push)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        samples: str | Path | None = None,
        max_shard_size: int | str | None = None,
        **card: Any,
    ) -> str:
        r"""
        Saves, writes the model card, and uploads all files as one commit.

        Args:
            repo_id (`str`):
                The repository, such as `"user/model-256"`; it is made if there is none.
            commit_message (`str`, *optional*):
                Says what was uploaded by default.
            private (`bool`, *optional*):
                Of a repository that is made: whether others cannot see it.
            token (`str`, *optional*):
                Instead of the one that `hf auth login` has stored.
            create_pr (`bool`, defaults to `False`):
                Opens a pull request instead of committing.
            safe_serialization (`bool`, defaults to `True`):
                Safetensors are written either way.
            variant (`str`, *optional*):
                Such as `"fp16"`, part of the weight files' names.
            subfolder (`str`, *optional*):
                The folder of the repository to upload to; then the repository's card is left alone.
            revision (`str`, *optional*):
                The branch to commit to; it is made if there is none.
            samples (`str` or `Path`, *optional*):
                An image to upload and to show in the card.
            max_shard_size (`int` or `str`, *optional*):
                As for `save_pretrained`.
            card:
                `license`, `datasets` and `eval_results` of [`make_card`].

        Returns:
            `str`: The address of the commit, or of the pull request.

        Raises:
            `TypeError`, `ValueError`: if an argument does not fit, before anything else.
            `HfHubHTTPError`: if the token is missing or wrong or may not write there, before anything is saved.
            [`UploadError`]: if the upload fails; the message names the folder in which all files are.
        """
        warn_of_pickles(safe_serialization)
        if unknown := sorted(card.keys() - {"license", "datasets", "eval_results"}):
            raise TypeError(f"{unknown} are no arguments of `push_to_hub`.")
        if samples is not None and not Path(samples).is_file():
            raise ValueError(f"`samples={str(samples)!r}` is no file.")
        repo_id = prepare_repository(repo_id, private, token, revision, create_pr)
        saving = {"variant": variant, "max_shard_size": max_shard_size}
        return publish(self, repo_id, token, revision, create_pr, commit_message, saving, subfolder, samples, card)


class ModelHubMixin(HubMixin):
    """[`HubMixin`] for models, whose adapters are safetensors too."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers has it, which by default looks for a pickle."""
        refuse_pickles(kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)  # type: ignore[misc]

    def save_lora_adapter(
        self, save_directory: str | Path, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ):
        """As diffusers has it."""
        warn_of_pickles(safe_serialization)
        super().save_lora_adapter(save_directory, *args, safe_serialization=True, **kwargs)  # type: ignore[misc]


def fetch_adapter(
    pretrained_model_name_or_path_or_dict: Any, kwargs: dict[str, Any], weight_name: str | None = None
) -> tuple[dict, dict | None]:
    """
    The tensors of an adapter and, if the file has it, its configuration: of a folder, a repository, or a dictionary of
    tensors. Takes out of `kwargs` what says where to look.
    """
    return _fetch_state_dict(
        pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
        weight_name=weight_name,
        use_safetensors=True,
        allow_pickle=False,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        **{name: kwargs.pop(name, None) for name in FETCH_ARGUMENTS},
    )


def refuse_pickles(use_safetensors: bool | None) -> None:
    """Raises a `ValueError` if pickled weights are asked for."""
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickled weights, which are not safe to load: leave it at its default."
        )


def warn_of_pickles(safe_serialization: bool) -> None:
    """Warns that weights are written as safetensors all the same, if pickled ones are asked for."""
    if not safe_serialization:
        logger.warning(
            "`safe_serialization=False` asks for pickled weights, which are not safe to load: safetensors are written in their place."
        )


def publish(
    pushed,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    saving: dict[str, Any] = {},
    subfolder: str | None = None,
    samples: str | Path | None = None,
    card: dict[str, Any] = {},
) -> str:
    """
    What [`HubMixin.push_to_hub`] does once [`prepare_repository`] has found that it may; the arguments are its own, those in
    `saving` are for `save_pretrained`.
    """
    folder = None
    try:
        folder = new_upload_folder(repo_id)
        pushed.save_pretrained(folder, **saving)
        if subfolder is None:
            write_card(folder, pushed, repo_id, samples, **card)
    except Exception as error:  # whatever it is, what was grown must survive it
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise UploadError(
            f"Nothing was uploaded to {repo_id}, since it cannot be saved first: {type(error).__name__}: {error} If there is no "
            f"room in {constants.HF_HOME}, set HF_HOME to a folder that has, or save it elsewhere by `save_pretrained` and upload "
            "that by `hf upload`."
        ) from error
    message = commit_message or f"Upload {type(pushed).__name__}"
    commit = upload(folder, repo_id, token, revision, create_pr, message, subfolder)
    shutil.rmtree(folder, ignore_errors=True)
    return str(commit.pr_url or commit.commit_url)


def check_push(push_to_hub: bool, core_is_loaded: bool, private: bool | None = None, **given: Any) -> dict[str, Any]:
    """
    What `from_core` does about publishing before anything else.

    Args:
        push_to_hub (`bool`):
            Whether to publish.
        core_is_loaded (`bool`):
            Whether the core is an object, so that `token` and `revision` are not about it.
        private (`bool`, *optional*), given:
            `repo_id`, `token`, `revision`, `create_pr` and `commit_message` as `from_core` got them.

    Returns:
        `dict`: Arguments for [`push_or_keep`].

    Raises:
        `TypeError`: if something was given that has no effect.
        `ValueError`: if there is no `repo_id`.
    """
    about_core = {} if core_is_loaded else {"token", "revision"}
    if not push_to_hub:
        idle = sorted(
            name for name, value in {**given, "private": private}.items() if value and name not in about_core
        )
        if idle:
            where = "" if set(idle) - {"token", "revision"} else "`core` is a path or repository, or with "
            raise TypeError(f"{idle} only apply when {where}`push_to_hub=True`.")
        return {}
    if given["repo_id"] is None:
        raise ValueError('`push_to_hub=True` needs a `repo_id`, such as "user/model-256".')
    if not core_is_loaded:
        given["revision"] = None
    return {**given, "private": private}


def prepare_push(push: dict[str, Any]) -> dict[str, Any]:
    """[`prepare_repository`] for what [`check_push`] has returned; the arguments that are left are for [`push_or_keep`]."""
    names = ("repo_id", "private", "token", "revision", "create_pr")
    repo_id = prepare_repository(*(push[name] for name in names))
    return {**{name: value for name, value in push.items() if name != "private"}, "repo_id": repo_id}


def push_or_keep(pushed, **arguments: Any) -> None:
    """[`publish`] at the end of something that must not be lost with it: a failed upload is logged."""
    try:
        url = publish(pushed, **arguments)
    except UploadError as error:
        logger.error(error)
    else:
        logger.warning(
            f"Published: {url}"
        )  # the caller gets no address otherwise, and less than a warning is not shown


def new_upload_folder(repo_id: str) -> Path:
    """An empty folder for files that wait for their upload, and that stay there if it fails."""
    place = Path(constants.HF_HOME) / "greedy-grow-uploads"
    place.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=re.sub(r"[^\w.-]", "-", repo_id.replace("/", "--")) + "-", dir=place))


def prepare_repository(
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """
    Makes sure, before any work, that there is a repository which may be written to, and the branch `revision` in it.

    Returns:
        `str`: Its full name.

    Raises:
        `ValueError`: if it is no name of a repository, `token` has blanks in it, or `create_pr` comes with a `revision`.
        `HfHubHTTPError`: if the token is missing or wrong, or may not write there.
    """
    if isinstance(token, str) and re.search(r"\s", token):
        raise ValueError("`token` has blanks or line ends in it: pass it without, as by `.strip()`.")
    if create_pr and revision is not None:
        raise ValueError(
            f"`create_pr=True` and `revision={revision!r}`: a pull request goes to `main`; pass one of them."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:  # of a repository that exists, creating it says nothing about who may write; anybody may open a pull request
        api.auth_check(repo_id, write=not create_pr)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # 404: a Hub that does not know the question
            raise
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload",
    path_in_repo: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """
    Uploads a folder as one commit, again after errors that pass. With `tag`, that tag is the commit's from then on.

    Large files that have arrived are not sent again. The commit holds all files or does not exist, so that no half a
    repository can be seen. It removes the same weights in another number of shards.

    Raises:
        [`UploadError`]: if it fails for good.
    """
    api, commit = HfApi(token=token), None
    attempts = 1 if create_pr else ATTEMPTS  # a commit whose answer is lost would become a second pull request
    for attempt in range(1, attempts + 1):
        try:
            if commit is None:
                operations = list_operations(api, folder, repo_id, revision, path_in_repo)
                commit = api.create_commit(
                    repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
                )
            if tag is not None:
                move_tag(api, repo_id, tag, commit.oid)
            break
        except Exception as error:  # whatever it is, the weights must survive it
            reason = f"{type(error).__name__}: {error}"
            reason = reason.replace(api.token, "***") if isinstance(api.token, str) and api.token else reason
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            passes = status in TRANSIENT if status else isinstance(error, (OSError, HTTPError))
            if attempt == attempts or not passes:
                raise UploadError(
                    f"The upload to {repo_id} failed: {reason} Nothing is lost: all files are in {folder}. Go on with "
                    f"`{upload_command(folder, repo_id, revision, create_pr, path_in_repo, tag)}`."
                ) from error
            logger.warning(f"The upload to {repo_id} failed ({reason}); trying again.")
            time.sleep(2.0 ** (attempt - 1))
    assert commit is not None
    logger.info(f"Uploaded to {commit.pr_url or commit.commit_url}.")
    return commit


def check_license(license: str | None) -> None:
    """Asks the Hub, before any work, whether it knows an identifier; raises a `ValueError` if it does not."""
    if license is not None:
        ModelCard(f"---\nlicense: {license}\n---\n").validate()


def list_operations(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, path_in_repo: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What one commit does: it adds all files of `folder`, and removes those that [`other_shards`] names."""
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    files = {
        prefix + path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    patterns = [prefix + pattern for pattern in other_shards(folder)]
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name not in files and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return [
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
    ]


def move_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit)


def upload_command(
    folder: Path, repo_id: str, revision: str | None, create_pr: bool, path_in_repo: str | None, tag: str | None
) -> str:
    """What a shell does instead of [`upload`]."""
    words = ["hf", "upload", repo_id, str(folder), path_in_repo or "."]
    words += [word for pattern in other_shards(folder) for word in ("--delete", pattern)]
    words += (["--revision", revision] if revision else []) + (["--create-pr"] if create_pr else [])
    command = shlex.join(words)
    if tag:
        command += f" && (hf repos tag delete -y {repo_id} {tag}; hf repos tag create {repo_id} {tag})"
    return command


def other_shards(folder: Path) -> list[str]:
    """Patterns of the files that the weights in `folder` could have been in, of the same component and variant."""
    patterns = set()
    for path in folder.rglob("*.safetensors"):
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        base, _, variant = stem.partition(".")
        index = f"{base}.safetensors.index." + (f"{variant}.json" if variant else "json")
        names = (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", index)
        patterns |= {path.with_name(name).relative_to(folder).as_posix() for name in names}
    return sorted(patterns)

# Copyright 2026 The diffusers-greedy-grow authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""
Publishing: a model's or a pipeline's files, its card and where it came from, as one commit on the Hub.

Where a model came from is its *lineage*, a list of entries in its configuration, which therefore travels with its weights:
growths (`{"grown_to": 256, ...}`) and phases of training (`{"phase": "grown-256-detail", ...}`), the oldest first.
"""

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# What a server answers when the same request may well succeed a moment later; 412: somebody else has committed.
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
ATTEMPTS = 4
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
    """Adds an entry, of values that JSON can hold, to a model's lineage; of a phase, in place of what it was before."""
    lineage = get_lineage(model)
    if "phase" in entry and lineage and lineage[-1].get("phase") == entry["phase"]:
        lineage.pop()
    model.register_to_config(_lineage=[*lineage, entry])


# ----------------------------------------------------------------------------------------------------------------------
# Model cards

TAGS = ["diffusers", "diffusers-greedy-grow", "greedy-growing", "pixel-space", "flow-matching"]
USE_PIPELINE = """import diffusers_greedy_grow
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
pipe("a large red striped circle on a white background").images[0].save("picture.png")"""
USE_MODEL = """import diffusers_greedy_grow
from diffusers import AutoModel

unet = AutoModel.from_pretrained("{repo_id}")"""
GROW = """from diffusers_greedy_grow import {name}

grown = {name}.from_core("{repo_id}", sample_size={size}, block_out_channels=(32, 64))"""


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
            The name, within the repository, of a picture to show.
        tag (`str`, *optional*):
            The tag of the repository under which this state of it stays.
    """
    model = getattr(pushed, "unet", pushed)
    is_pipeline = model is not pushed
    lineage = get_lineage(model)
    cores = [entry["core"] for entry in lineage if entry.get("core")]
    name = repo_id.split("/")[-1]
    relation: dict = {"base_model": cores[-1], "base_model_relation": "finetune"} if cores else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        license=license,
        datasets=datasets,
        eval_results=eval_results,
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
        use=(USE_PIPELINE if is_pipeline else USE_MODEL).format(repo_id=repo_id),
        grow=GROW.format(name=grown_name, repo_id=repo_id, size=4 * model.sample_sizes[-1]),
        lineage=[describe(entry) for entry in lineage],
        figures=[(result.dataset_name, result.metric_name, result.metric_value) for result in eval_results or []],
        samples=samples,
        tag=tag,
    )


def write_card(folder: Path, pushed, repo_id: str, samples: str | Path | None = None, **card: Any) -> None:
    """Writes the card into a folder that holds `pushed`, with the picture `samples`; the rest is as for [`make_card`]."""
    if samples is not None:
        card["samples"] = "samples" + Path(samples).suffix
        shutil.copy(samples, folder / card["samples"])
    make_card(pushed, repo_id, **card).save(folder / "README.md")


def describe(entry: dict[str, Any]) -> tuple:
    """One row of a card's table of lineage."""
    if "grown_to" in entry:
        core, revision = entry.get("core"), entry.get("core_revision")
        source = f" from `{core}`" + (f" at `{revision[:12]}`" if revision else "") if core else ""
        return (f"grown{source}, `init={entry['init']!r}`", entry["grown_to"], "", "", "", "")
    return tuple(entry.get(name, "") for name in ("phase", "resolution", "trained", "steps", "pictures", "seed"))


# ----------------------------------------------------------------------------------------------------------------------
# Uploading


class HubMixin:
    """
    For models and pipelines, in place of diffusers': `push_to_hub` with a card, on a branch, and losing nothing;
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
        read_safetensors(kwargs.get("use_safetensors"))
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir() or any(folder.rglob("*.bin")):  # else diffusers may look for a pickle, in vain
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """What diffusers calls with a configuration before it builds anything; entries that are not known are refused."""
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]
        if unknown := sorted(name for name in unused if name in config_dict and name not in kwargs):
            raise ValueError(
                f"The configuration has {unknown}, which a {cls.__name__} does not know. It was made by a newer version of "
                "diffusers-greedy-grow, which `pip install -U diffusers-greedy-grow` gets, or for something else."
            )
        lineage = config_dict.get("_lineage", [])
        if not isinstance(lineage, (list, tuple)) or not all(isinstance(entry, dict) for entry in lineage):
            raise ValueError(f"The configuration's `_lineage` has to be a list of dictionaries, but is {lineage!r}.")
        return init_dict, unused, hidden

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        As diffusers has it, but for three traps. A pipeline gives its components what they have arguments for by name.

        Raises:
            `ValueError`: if adapters are attached or fused, whose weights would be under names that do not load.
        """
        write_safetensors(safe_serialization)
        model: Any = getattr(self, "unet", self)
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"The adapters {sorted(model.peft_config)} are attached, and what is saved with them would not load again. "
                "Save them by `save_lora_weights` and take them off by `unload_lora_weights()` (of a pipeline) or "
                "`save_lora_adapter` and `unload_lora()` (of a model); those that are fused stay part of the weights."
            )
        if max_shard_size is not None:
            kwargs["max_shard_size"] = max_shard_size
        super().save_pretrained(  # type: ignore[misc]
            save_directory, *args, safe_serialization=True, variant=variant, **kwargs
        )
        for index in Path(save_directory).glob("*.safetensors.index*.json"):
            name = index.name.removesuffix(".json").replace(".safetensors.index", "") + ".safetensors"
            weights = index.with_name(name)
            if weights.exists() and weights.stat().st_mtime_ns > index.stat().st_mtime_ns:
                index.unlink()  # of shards that are gone: it would be believed when loading

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
                In place of the one that `hf auth login` has stored.
            create_pr (`bool`, defaults to `False`):
                Opens a pull request in place of committing.
            safe_serialization (`bool`, defaults to `True`):
                Safetensors are written either way.
            variant (`str`, *optional*):
                Such as `"fp16"`, part of the weight files' names.
            subfolder (`str`, *optional*):
                The folder of the repository to upload to; then the repository's card is left alone.
            revision (`str`, *optional*):
                The branch to commit to; it is made if there is none.
            samples (`str` or `Path`, *optional*):
                A picture to upload and to show in the card.
            card:
                `license`, `datasets` and `eval_results` of [`make_card`].

        Returns:
            `str`: The address of the commit, or of the pull request.

        Raises:
            `HfHubHTTPError`: if the token is missing or wrong or may not write there, before anything is saved.
            [`UploadError`]: if the upload fails; the message names the folder in which all files are.
        """
        write_safetensors(safe_serialization)
        repo_id = prepare_repository(repo_id, private, token, revision)
        return publish(self, repo_id, token, revision, create_pr, commit_message, variant, subfolder, samples, card)


class ModelHubMixin(HubMixin):
    """[`HubMixin`] for models, whose adapters are safetensors too."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers has it, which by default looks for a pickle."""
        read_safetensors(kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)  # type: ignore[misc]

    def save_lora_adapter(
        self, save_directory: str | Path, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ):
        """As diffusers has it."""
        write_safetensors(safe_serialization)
        super().save_lora_adapter(save_directory, *args, safe_serialization=True, **kwargs)  # type: ignore[misc]


def read_safetensors(use_safetensors: bool | None) -> None:
    """Raises a `ValueError` if pickled weights are asked for."""
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickled weights, which are not safe to load: leave it at its default."
        )


def write_safetensors(safe_serialization: bool) -> None:
    """Warns that weights are written as safetensors all the same, if pickled ones are asked for."""
    if not safe_serialization:
        logger.warning(
            "`safe_serialization=False` asks for pickled weights, which are not safe to load: safetensors are written in their place."
        )


def publish(
    pushed,
    repo_id: str,
    token: str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    variant: str | None = None,
    subfolder: str | None = None,
    samples: str | Path | None = None,
    card: dict[str, Any] = {},
) -> str:
    """What [`HubMixin.push_to_hub`] does once [`prepare_repository`] has found that it may; the arguments are its own."""
    folder = upload_folder_of(repo_id, subfolder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        pushed.save_pretrained(folder, variant=variant)
        if subfolder is None:
            write_card(folder, pushed, repo_id, samples, **card)
    except OSError as error:
        raise UploadError(
            f"Nothing was uploaded to {repo_id}, since it cannot be saved to {folder} first: {error} Set HF_HOME to a folder "
            "with room for it, or save it elsewhere by `save_pretrained` and upload that by `hf upload`."
        ) from error
    message = commit_message or f"Upload {type(pushed).__name__}"
    commit = upload(folder, repo_id, token, revision, create_pr, message, subfolder)
    shutil.rmtree(folder)
    return str(commit.pr_url or commit.commit_url)


def prepare_push(push_to_hub: bool, core_is_loaded: bool, private: bool | None = None, **given: Any) -> dict[str, Any]:
    """
    What `from_core` does about publishing before it grows anything.

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
        `ValueError`, `HfHubHTTPError`: see [`prepare_repository`].
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
    if not core_is_loaded:
        given["revision"] = None
    repo_id = prepare_repository(given["repo_id"], private, given["token"], given["revision"])
    return {**given, "repo_id": repo_id}


def push_or_keep(pushed, **arguments: Any) -> None:
    """[`publish`] at the end of something that must not be lost with it: a failed upload is logged."""
    try:
        publish(pushed, **arguments)
    except UploadError as error:
        logger.error(error)


def upload_folder_of(repo_id: str, subfolder: str | None = None) -> Path:
    """Where files wait for their upload, and where they stay if it fails."""
    name = "--".join(filter(None, [*repo_id.split("/"), subfolder]))
    return Path(constants.HF_HOME) / "greedy-grow-uploads" / re.sub(r"[^\w.-]", "-", name)


def prepare_repository(
    repo_id: str | None, private: bool | None = None, token: str | None = None, revision: str | None = None
) -> str:
    """
    Makes sure, before any work, that there is a repository which may be written to, and the branch `revision` in it.

    Returns:
        `str`: Its full name.

    Raises:
        `ValueError`: if there is no `repo_id`, or it is no name of a repository.
        `HfHubHTTPError`: if the token is missing or wrong, or may not write there.
    """
    if repo_id is None:
        raise ValueError('`push_to_hub=True` needs a `repo_id`, such as "user/model-256".')
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    path_in_repo: str | None = None,
    tag: str | None = None,
) -> CommitInfo:
    """
    Uploads a folder as one commit, again after errors that pass. With `tag`, that tag is the commit's from then on.

    Large files that have arrived are not sent again. A commit holds all files or does not exist, so that no half a
    repository can be seen. It removes the same weights in another number of shards.

    Raises:
        [`UploadError`]: if it fails for good.
    """
    api = HfApi(token=token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=path_in_repo,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                delete_patterns=other_shards(folder),
            )
            if tag is not None:
                with suppress(RevisionNotFoundError):
                    api.delete_tag(repo_id, tag=tag)
                api.create_tag(repo_id, tag=tag, revision=commit.oid)
            break
        except Exception as error:  # whatever it is, the weights have to survive it
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            passes = status in TRANSIENT if status else isinstance(error, (OSError, HTTPError))
            if attempt == ATTEMPTS or not passes:
                command = " ".join(
                    ["hf upload", repo_id, str(folder), path_in_repo or "."]
                    + (["--revision", revision] if revision else [])
                    + (["--create-pr"] if create_pr else [])
                    + (["&&", "hf", "repos", "tag", "create", repo_id, tag] if tag else [])
                )
                raise UploadError(
                    f"The upload to {repo_id} failed: {type(error).__name__}: {error} Nothing is lost: all files are in "
                    f"{folder}. Go on with `{command}`."
                ) from error
            logger.warning(f"The upload to {repo_id} failed ({type(error).__name__}: {error}); trying again.")
            time.sleep(2.0 ** (attempt - 1))
    logger.info(f"Uploaded to {commit.pr_url or commit.commit_url}.")
    return commit


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

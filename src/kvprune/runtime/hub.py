"""Pruned folders on the Hugging Face hub: a folder there, and a repository here as a whole folder."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from kvprune.errors import BadOption, HubRefused, KVPruneError, UnknownSource
from kvprune.models.check import first_line
from kvprune.runtime.files import CARD, RECORD, check_there, read_record, verify_files

_UNFINISHED = [".*", "*.partial"]  # and hidden files, which are no part of a model
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
_MADE = "kvprune_made"  # of a model: (tokenizer, plan.json, record), where it was made in this process


def push(
    folder: str | Path | PreTrainedModel, repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> dict[str, str]:
    """Upload a pruned folder, checked first, to the repository `repo_id` ("user/name"), which is made if there is none.

    Or a pruned model in memory, of any layout: its weights as they are now, and with them tokenizer, plan, record and
    card of the folder that it was loaded from, or of the run that made it.
    Files of the same name, the model card among them, are replaced, weights of other names removed; the repository's
    history keeps them. private: of a new repository; None: as the hub's account has it. revision: a branch. The token
    is the hub's own: HF_TOKEN, or what `hf auth login` stored. Returns {"repository", "url" (of the commit), "commit"}.
    Raises UnknownSource, BrokenCheckpoint, BadOption or HubRefused.
    """
    if isinstance(folder, PreTrainedModel):
        with TemporaryDirectory(prefix="kvprune-") as aside:
            if not _write(folder, Path(aside) / "model"):
                raise UnknownSource(
                    "this model is in no folder that kvprune wrote, so there is no record of it; "
                    "give one that prune or recover returned, or that was loaded from such a folder"
                )
            done = _upload(Path(aside) / "model", repo_id, private=private, revision=revision)
    else:
        folder = Path(folder)
        check_there(folder)
        verify_files(folder)
        done = _upload(folder, repo_id, private=private, revision=revision)
    return {"repository": done.repo_url.repo_id, "url": done.commit_url, "commit": done.oid}


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """What `push_to_hub` of a pruned model does: upload it as `prune` writes it, with tokenizer, plan, record and card.

    The weights go in the dtype that they are stored in. Where they were trained further, the record stays that of the
    folder that they were loaded from, and says so when it is loaded. A model of which there is no record is uploaded
    as transformers does it. Raises HubRefused or BadOption.
    """
    commit = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
    where: dict[str, Any] = {"private": private, "token": token, "revision": revision, **commit}
    with TemporaryDirectory(prefix="kvprune-") as aside:
        folder = Path(aside) / "model"
        if not _write(model, folder):
            return PreTrainedModel.push_to_hub(model, repo_id, tags=list(tags), **where)  # type: ignore[return-value]
        if tags:
            card = ModelCard.load(folder / CARD)
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
            card.save(folder / CARD)
        return _upload(folder, repo_id, **where)


def remember(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: str, record: dict[str, Any]
) -> None:
    """Keep at a model that was made in this process what `push_model` wants."""
    setattr(model, _MADE, (tokenizer, plan, record))


def _write(model: PreTrainedModel, folder: Path) -> bool:
    """Write the model with all that belongs to it; False where there is no record of it."""
    from kvprune.runtime.checkpoint import save, save_model
    from kvprune.runtime.refresh import card_of

    if _MADE in vars(model):
        tokenizer, plan, record = vars(model)[_MADE]
        saved = save(model, tokenizer, plan, lambda: record, folder)
        if "files" in record:  # measured on weights with these checksums
            saved["files"] = {name: record["files"].get(name, digest) for name, digest in saved["files"].items()}
            (folder / RECORD).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
        return True
    source = _loaded_from(model)
    if source is None:
        return False
    folder.mkdir()
    record = read_record(source)
    for name in (*record["files"], "chat_template.jinja", RECORD, CARD):
        if (source / name).is_file() and not name.startswith("model"):
            shutil.copyfile(source / name, folder / name)
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(card_of(source, record, model.config.model_type), encoding="utf-8")
    save_model(model, folder)
    return True


def _loaded_from(model: PreTrainedModel) -> Path | None:
    """The pruned folder, or a repository's in the hub's cache, that a model was loaded from; None for another."""
    from kvprune.models.source import resolve

    try:
        source = resolve(model.name_or_path) if model.name_or_path else None
    except UnknownSource:
        return None
    return Path(source.folder) if source is not None and source.is_pruned else None


def _upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    api = HfApi(token=token, library_name="kvprune")
    if not isinstance(token, str) and get_token() is None:
        raise HubRefused("the hub wants a token to write with: set HF_TOKEN, or run: hf auth login")
    with _as_user_error(repo_id):
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a model pruned by kvprune",
            commit_description=commit_description,
            create_pr=create_pr,
            ignore_patterns=list(_UNFINISHED),
            delete_patterns=_WEIGHTS,  # in other pieces than these, which would be read in their place
        )


@contextmanager
def _as_user_error(repo_id: str) -> Iterator[None]:
    """What the hub's client raises, in one line that says how to mend it."""
    try:
        yield
    except HFValidationError:
        raise BadOption(f"{repo_id!r} is no name of a repository; give one as user/name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0]
        mend = {
            401: "the token is not known: make one at the hub's settings, and run: hf auth login",
            403: f"this token may not write to {repo_id}: give one with the right to write, or another user/name",
        }.get(status, "try again, or give another user/name")
        raise HubRefused(f"the hub refused {repo_id} ({status}: {said}); {mend}") from error
    except OfflineModeIsEnabled:
        raise HubRefused("HF_HUB_OFFLINE is set; unset it to reach the hub") from None
    except KVPruneError:
        raise
    except ValueError as error:  # metadata that the hub does not take
        raise HubRefused(f"the hub refused {repo_id}: {' '.join(str(error).split())}; mend {CARD}") from error
    except Exception as error:
        if not isinstance(error, (OSError, HfHubHTTPError.__bases__[0])):  # the HTTP client's own
            raise
        raise HubRefused(f"the hub cannot be reached: {' '.join(str(error).split())}; try again") from error


def pruned_snapshot(name: str, revision: str | None = None, *, whole: bool = True) -> Path | None:
    """The folder in the hub's cache where a repository with kvprune.json lies, fetched if it is not there, whole or
    only that file; None for another repository, or one that cannot be read. Raises UnknownSource and BrokenCheckpoint.
    """
    try:
        found = cached_file(
            name,
            RECORD,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository: whoever asks for its config.json says so
        return None
    if found is None:
        return None
    folder = Path(found).parent
    files = read_record(folder)["files"]
    if whole and not all((folder / file).is_file() for file in files):
        wanted = [RECORD, CARD, *files, "*.json", "*.jinja", *_WEIGHTS]
        try:
            snapshot_download(name, revision=folder.name, allow_patterns=wanted)  # of that commit
        except Exception as error:  # the hub's errors have no common class
            reason = first_line(error)
            raise UnknownSource(f"{name} is not whole in the hub's cache, and cannot be fetched: {reason}") from error
    return folder

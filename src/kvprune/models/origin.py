"""What may be said to others of where a model comes from: its id on the hub, and its licence."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.constants import REPOCARD_NAME
from transformers.utils import cached_file

from kvprune.models import gguf
from kvprune.models.in_memory import InMemory
from kvprune.models.source import Source

# As model cards name them; a licence that the hub has no name for is "other", with a name and a link of its own.
_FIELDS = ("license", "license_name", "license_link")
_IN_GGUF = ("general.license", "general.license.name", "general.license.link")


def origin(source: Source) -> dict[str, Any]:
    """{"base_model": the hub id, None for what is on this machine; "license": what of `license`, `license_name` and
    `license_link` the source's own model card, config.json or GGUF header says, None where they say nothing (of a
    model in memory they never do)}."""
    if isinstance(source, InMemory):  # what it was loaded from may not be what it is
        return {"base_model": None, "license": None}
    on_hub = not (source.gguf_file or source.is_local)
    return {"base_model": source.name if on_hub else None, "license": _licence(source, on_hub)}


def _licence(source: Source, on_hub: bool) -> dict[str, Any] | None:
    if source.gguf_file:
        keys = gguf.read_header(Path(source.name)).keys
        said = {name: keys.get(key) for name, key in zip(_FIELDS, _IN_GGUF, strict=True)}
    else:
        card = _card(source)
        said = {name: card.get(name) for name in _FIELDS}
        if not said["license"]:
            said = {"license": source.settings.get("license")}
    found = {name: value for name, value in said.items() if isinstance(value, str) and value}
    link = found.get("license_link")
    if link and not re.match(r"https?://", link):  # a file beside the source's card
        del found["license_link"]
        if on_hub:
            found["license_link"] = f"https://huggingface.co/{source.name}/blob/main/{link.removeprefix('./')}"
    return found if "license" in found else None


def _card(source: Source) -> dict[str, Any]:
    """The metadata of the source's model card; nothing where it has none that can be read."""
    try:
        path = cached_file(
            source.folder,
            REPOCARD_NAME,
            revision=source.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return (metadata_load(path) if path else None) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}

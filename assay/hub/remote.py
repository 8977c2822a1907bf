"""Models by their name on the Hugging Face hub: fetched once, kept in its cache, and only what an import reads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-*-of-*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What is fetched: configurations, safetensors, tokenizers. Never code, never pickles."""
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_name(text: str) -> bool:
    """Whether this could be `owner/model` or `owner/model@revision`."""
    return NAME.fullmatch(text) is not None


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder with a model's files, in the hub's cache (`cache`, else where HF_HOME says).

    Files that are there already are not fetched again; with HF_HUB_OFFLINE=1 nothing is fetched at all. ValueError for
    a name that the hub does not know or does not give out, and for one that is not in the cache when there is no
    network.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r:.80}: not a name on the hub; owner/model or owner/model@revision is expected")
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    try:
        found = snapshot_download(
            match["repo"], revision=match["revision"], cache_dir=cache, allow_patterns=list(FILES), etag_timeout=10
        )
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: no such file or folder; nor in the hub's cache, and not to be reached{offline}"
        ) from None
    except HfHubHTTPError as error:
        raise ValueError(f"{name}: the hub: {' '.join(str(error).split())[:300]}") from None
    except HFValidationError as error:
        raise ValueError(f"{name}: {error}") from None
    folder = Path(found)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: {folder} holds no config.json: it was fetched in part, or is no model's")
    return folder

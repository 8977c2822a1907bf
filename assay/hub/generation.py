"""What a checkpoint's generation settings ask of a reply that no reply here does by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay.data.settings import CONFIG, GENERATION, read_settings

FLAGS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
"""How transformers would draw where nobody says: here a flag of the same name says it. The values change nothing."""

SAID: Mapping[str, tuple[Any, str]] = {
    "num_beams": (1, "generate --beams"),
    "length_penalty": (1, "generate --beams N --length-penalty"),
    "penalty_alpha": (0.0, "generate --penalty-alpha"),
    "min_new_tokens": (0, "--min-new"),
    "min_length": (0, "--min-new N: it counts the prompt too, of an encoder-decoder what the reply begins with"),
}
"""How it would search, and how long: at what value that changes nothing, and what says it here."""

NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("num_beam_groups", "guidance_scale"), 1),
    **dict.fromkeys(("encoder_repetition_penalty",), 1.0),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff"), 0.0),
    **dict.fromkeys(("early_stopping", "renormalize_logits", "remove_invalid_values"), False),
    **dict.fromkeys(("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), None),
    **dict.fromkeys(("force_words_ids", "sequence_bias", "exponential_decay_length_penalty", "stop_strings"), None),
    **dict.fromkeys(("watermarking_config", "prompt_lookup_num_tokens", "max_time", "constraints"), None),
}
"""What transformers' `generate` obeys and nothing here does, at the values that change nothing."""


def unheeded(folder: Path) -> dict[str, Any]:
    """The settings of generation_config.json, or of config.json, where older files have them, that change replies
    under transformers and none here unless a flag says so; by name, with their values."""
    found = settings(folder)
    drawn = FLAGS if found.get("do_sample") is True else {}
    searched = {key: neutral for key, (neutral, _) in SAID.items()}
    return {
        key: found[key]
        for key, neutral in {**NEUTRAL, **searched, **drawn}.items()
        if found.get(key) is not None and found[key] not in (neutral, [], {})
    }


def settings(folder: Path) -> dict[str, Any]:
    """config.json's values with generation_config.json's over them."""
    config = read_settings(folder / CONFIG)
    inner = config.get("text_config")
    return {**(inner if isinstance(inner, dict) else {}), **config, **read_settings(folder / GENERATION)}


def told(key: str, value: Any) -> str:
    """One of them, for people."""
    flag = SAID[key][1] if key in SAID else f"--{key.replace('_', '-')}" if key in FLAGS else None
    how = "transformers obeys it, replies here do not" if flag is None else f"give {flag}"
    return f"generation setting that is not taken over: {key}: {value!r:.60} ({how})"

"""A checkpoint's `config.json`: typed reads in both dialects, and a record of what nobody read.

transformers 5 writes `rope_parameters` and explicit `layer_types`; the files on the hub carry `rope_theta`,
`rope_scaling` and pattern integers. A family asks one question and gets the same answer from either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

Tree = dict[str, Any]
MISSING: Any = object()

IRRELEVANT = frozenset(
    {
        # Bookkeeping.
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "_name_or_path"),
        *("model_type", "tokenizer_class", "problem_type", "id2label", "label2id", "task_specific_params"),
        *("use_cache", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "is_decoder"),
        *("attn_implementation", "_attn_implementation", "chunk_size_feed_forward", "pretraining_tp", "max_length"),
        # Tokens by name: the tokenizer says which they are.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id"),
        # Training only.
        *("initializer_range", "initializer_factor", "attention_dropout", "attn_pdrop", "dropout", "embd_pdrop"),
        *("hidden_dropout", "resid_pdrop", "classifier_dropout", "gradient_checkpointing"),
        *("output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
    }
)
"""What changes nothing that a forward pass in evaluation computes: bookkeeping, tokens by name, dropout, losses."""

MAX_SIZE, MAX_NUMBER = (1 << 31) - 1, 3.5e38
MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), 10_000),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 65_536),
}
"""The largest values of keys whose number of things is listed one by one: checked before any list is made."""

ACTS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Hugging Face's names of activations."""


class Config:
    """The values of a configuration, each read by name and type. ValueError names the key, its value and what is
    accepted.

    tensors: the names in the checkpoint's files, for the few choices that only these show; None where a configuration
    stands alone.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str = "config.json", tensors: Collection[str] | None = None
    ) -> None:
        self.values, self.where, self.tensors = dict(values), where, tensors
        self._read: set[str] = set()
        self._inner: dict[str, Config] = {}

    def _take(self, name: str, default: Any, wanted: str, good: Callable[[Any], bool]) -> Any:
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            if default is MISSING:
                raise ValueError(f"{self.where}: {name}: missing; {wanted} is expected")
            return default
        if not good(value):
            raise ValueError(f"{self.where}: {name}: {value!r:.80}; {wanted} is expected")
        return value

    def either(self, *names: str) -> str:
        """The first of several names of one key that has a value; the first of all where none has."""
        return next((name for name in names if self.has(name)), names[0])

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: Any = MISSING, least: int = 1) -> Any:
        """An integer from `least` to what `MOST` says of the name; null counts as missing, here and below."""
        most = MOST.get(name, MAX_SIZE)
        whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most  # noqa: E731
        return self._take(name, default, f"an integer from {least} to {most}", whole)

    def number(self, name: str, default: Any = MISSING) -> Any:
        return self._take(name, default, "a number", is_number)

    def positive(self, name: str, default: Any = MISSING) -> Any:
        return self._take(name, default, "a number above 0", lambda v: is_number(v) and v > 0)

    def flag(self, name: str, default: Any = MISSING) -> Any:
        return self._take(name, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: Any = MISSING, among: Collection[str] = ()) -> Any:
        wanted = f"one of {', '.join(among)}" if among else "a string"
        return self._take(name, default, wanted, lambda v: isinstance(v, str) and (not among or v in among))

    def listed(self, name: str, default: Any = MISSING, length: int | None = None) -> Any:
        wanted = "a list" if length is None else f"a list of {length}"
        return self._take(name, default, wanted, lambda v: isinstance(v, list) and (length is None or len(v) == length))

    def mapping(self, name: str, default: Any = MISSING) -> Any:
        return self._take(name, default, "a mapping", lambda v: isinstance(v, dict))

    def activation(self, name: str, default: str | None = None) -> str:
        return ACTS[self.text(name, MISSING if default is None else default, tuple(ACTS))]

    def must_be(self, name: str, *accepted: Any, why: str = "") -> None:
        """A key that is honoured only at these values (null and missing included)."""
        self._read.add(name)
        value = self.values.get(name)
        if value is not None and value not in accepted:
            told = ", ".join(json.dumps(a) for a in accepted)
            raise ValueError(f"{self.where}: {name}: {value!r:.80}; accepted: {told}{f' ({why})' if why else ''}")

    def ignore(self, *names: str) -> None:
        """Keys of this family that change nothing here."""
        self._read.update(names)

    def inner(self, name: str) -> Config:
        """The configuration inside this one, such as `text_config`; its unread keys count as this one's."""
        if name not in self._inner:
            self._inner[name] = Config(self.mapping(name), f"{self.where}: {name}", self.tensors)
        return self._inner[name]

    def unread(self) -> tuple[str, ...]:
        """The keys with a value that no reader asked for."""
        own = [k for k, v in self.values.items() if v is not None and k not in self._read and k not in IRRELEVANT]
        inside = [f"{name}.{k}" for name, config in self._inner.items() for k in config.unread()]
        return tuple(sorted(own + inside))

    def each_layer(self, name: str, layers: int, pattern: Callable[[int], str]) -> tuple[str, ...]:
        """What kind each layer is: listed under `name`, else by the family's own pattern from its older keys."""
        given = self._take(
            name, None, f"a list of {layers} strings",
            lambda v: isinstance(v, list) and len(v) == layers and all(isinstance(kind, str) for kind in v),
        )  # fmt: skip
        return tuple(given) if given is not None else tuple(pattern(i) for i in range(layers))

    def rope(self, kind: str | None = None, theta: float = 10_000.0, share: float = 1.0, size: int = 0) -> Tree:
        """The RoPE of one kind of layer as a position spec; `share` of a head's `size` is turned where nothing is said.

        kind: a layer type, for a family with a table for each.
        """
        rules = self.rope_rules(kind)
        base = rules.get("rope_theta")
        part = rules.get("partial_rotary_factor", share)
        found: Tree = {"kind": "rope", "theta": float(theta if base is None else base)}
        if part != 1.0:
            found["dim"] = int((size or self.head_size()) * part)
        if (scaling := self.scaling(rules)) is not None:
            found["scaling"] = scaling
        return found

    def rope_rules(self, kind: str | None = None) -> Mapping[str, Any]:
        """`rope_parameters`, or the older keys in its form: each of its own type, and none that is null."""
        rules = self.mapping("rope_parameters", None)
        theta, older = self.number("rope_theta", None), self.mapping("rope_scaling", None)
        part = self.number("partial_rotary_factor", self.number("rotary_pct", None))
        if rules is not None and any(isinstance(v, dict) for v in rules.values()):
            if kind not in rules:
                accepted = ", ".join(rules)
                raise ValueError(f"{self.where}: rope_parameters: no entry {kind!r}; there are {accepted}")
            rules = Config(rules, f"{self.where}: rope_parameters").mapping(str(kind))
        given = {key: value for key, value in (rules or older or {}).items() if value is not None}
        for key, value in (("rope_theta", theta), ("partial_rotary_factor", part)):
            if value is not None:
                given.setdefault(key, value)
        check = Config(given, f"{self.where}: rope_parameters")
        for kind_of, keys in RULES.items():
            for key in keys:
                getattr(check, kind_of)(key, None)
        return given

    def head_size(self) -> int:
        width, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        size: int = self.integer("head_dim", None) or width // heads
        if not size:
            raise ValueError(f"{self.where}: num_attention_heads: {heads}; at most hidden_size ({width}) is accepted")
        return size

    def scaling(self, rules: Mapping[str, Any]) -> Tree | None:
        """The `scaling` of a RoPE spec from transformers' rules; None where nothing is scaled."""
        kind = rules.get("rope_type", rules.get("type", "default"))
        if kind == "default":
            return None
        if kind not in SCALINGS:
            raise ValueError(f"{self.where}: rope_type: {kind!r}; accepted: default, {', '.join(SCALINGS)}")
        found: Tree = {"kind": kind}
        for ours, theirs in SCALINGS[kind].items():
            if rules.get(theirs) is not None:
                value = rules[theirs]
                found[ours] = tuple(value) if isinstance(value, list) else value
        if kind in ("dynamic", "longrope", "yarn", "llama3") and "original" not in found:
            longest = self.integer("max_position_embeddings")
            found["original"] = self.integer("original_max_position_embeddings", longest)
        if kind == "longrope" and "factor" not in found:
            found["factor"] = self.integer("max_position_embeddings") / found["original"]
        return found


RULES = {
    "positive": ("rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor"),
    "number": ("mscale", "mscale_all_dim", "attention_factor", "beta_fast", "beta_slow"),
    "integer": ("original_max_position_embeddings",),
    "text": ("rope_type", "type"),
    "listed": ("short_factor", "long_factor"),
    "flag": ("truncate",),
}
"""Of which type each of RoPE's rules is."""

SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
    "llama3": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "longrope": {
        "short": "short_factor",
        "long": "long_factor",
        "original": "original_max_position_embeddings",
        "factor": "factor",
        "attention_factor": "attention_factor",
    },
}
"""Our field -> transformers' key, by kind of scaling."""


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER

"""A model of assay's for transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The spec stands in config.json under `assay`; the package of that name, which must be installed, builds the model.
`generate` keeps what the model declares to be remembered in the package's own cache, one row for each text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from assay.cache import Cache, Size
from assay.model.lm import LM, initialise_all, state_table
from assay.ops.state import State
from assay.ops.step import Step
from assay.spec.load import validate
from assay.spec.model import ModelSpec


class AssayConfig(PretrainedConfig):
    """assay: the spec, every field, as model.yaml has it."""

    model_type = "assay"

    def __init__(self, assay: dict[str, Any] | None = None, **more: Any) -> None:
        self.assay = assay
        super().__init__(**more)


class AssayCache:
    """What a model remembers of the texts that it goes on with. tokens: the most columns that will be fed; copies: rows
    may be copied, as beams are. Memory is taken with the first call, when the number of texts is known."""

    is_compileable = is_croppable = False

    def __init__(self, model: LM, tokens: int, copies: bool = False) -> None:
        self.model, self.tokens, self.copies = model, tokens, copies
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def begin(self, ids: Tensor, keep: Tensor, last: int) -> tuple[Step, dict[str, State]]:
        """The step of new columns [B, T], and the states that it reads and writes. What pads a row is not stored."""
        if not self.columns:
            self._allocate(ids, keep)
        past = torch.tensor([self.store.length(slot) for slot in self.slots], device=ids.device)
        step = packed(ids, keep, last, (past, self.horizon))
        states = self.store.begin(self.slots, step)
        self.columns += ids.shape[1]
        return step, states

    def _allocate(self, ids: Tensor, keep: Tensor) -> None:
        rows, width = ids.shape
        room = Size(rows * (2 if self.copies else 1), max(self.tokens, width), width)
        fields, dtype = state_table(self.model.spec, self.model.prefix), next(self.model.parameters()).dtype
        self.store = Cache(fields, room, dtype, ids.device)
        self.slots = [self.store.open() for _ in range(rows)]
        # Position schemes that depend on the length plan for the whole of it, as the package's own engine does.
        self.horizon = room.tokens + 1 - (width - keep.sum(1))

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i goes on with what row `rows[i]` has stored."""
        kept = [self.store.fork(self.slots[i]) for i in rows.tolist()]
        for slot in self.slots:
            self.store.close(slot)
        self.slots = kept


class AssayForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AssayConfig
    base_model_prefix = "model"
    _is_stateful = True  # a recurrence cannot be taken back by a few tokens

    def __init__(self, config: AssayConfig) -> None:
        super().__init__(config)
        self.model = LM(validate(ModelSpec, config.assay, "config.json: assay"))
        if not next(self.model.parameters()).is_meta:
            initialise_all(self.model, self.model.spec, 0)
        self._tied_weights_keys = shared(self)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the constructor has drawn them, and a file fills every one."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        past_key_values: AssayCache | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids, labels [B, T]; logits [B, T, V], of the last `logits_to_keep` columns where it is not 0.
        attention_mask: of these columns and those in the cache. A masked token is seen by none, and positions count
        the others. Through a cache nothing is differentiated."""
        rows, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.columns
        keep = input_ids.new_ones(rows, past + length) if attention_mask is None else attention_mask
        if keep.shape != (rows, past + length):
            raise ValueError(f"attention_mask: shape {tuple(keep.shape)}; {(rows, past + length)} is expected")
        keep = keep[:, past:].bool()
        if past_key_values is None:
            found = self.model(packed(input_ids, keep, logits_to_keep))
        else:
            with torch.no_grad():
                found = self.model(*past_key_values.begin(input_ids, keep, logits_to_keep))
        logits = found.logits.unflatten(0, (rows, -1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return out.to_tuple() if return_dict is False else out

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, longest: int, *device: Any
    ) -> None:
        """A cache for one `generate`, where the model can go on with a text; without one each step reads all of it."""
        if generation_config.cache_implementation is not None:
            raise ValueError(f"cache_implementation: {generation_config.cache_implementation!r}; accepted: null")
        whole = any("chunking" in part.refusals() for _, part in self.model.spec.parts())
        if generation_config.use_cache is not False and not whole and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = AssayCache(self.model, longest, (generation_config.num_beams or 1) > 1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: AssayCache | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        new = input_ids if past_key_values is None else input_ids[:, past_key_values.columns :]
        found = {"input_ids": new, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return found | {k: v for k, v in more.items() if k == "logits_to_keep"}


def shared(module: torch.nn.Module) -> dict[str, str]:
    """Names under which a parameter stands again, in layers that share theirs -> its first name."""
    first: dict[int, str] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for name, p in named:
        first.setdefault(id(p), name)
    return {name: first[id(p)] for name, p in named if first[id(p)] != name}


def packed(ids: Tensor, keep: Tensor, last: int, stored: tuple[Tensor, Tensor] | None = None) -> Step:
    """Rows with the tokens that count moved to their beginning; `emit` asks for logits in the order of the columns.
    stored: of each row, how many tokens a cache has and how many it will have; null is no cache."""
    rows, length = ids.shape
    order = keep.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    lengths = keep.sum(1)
    past, horizon = (torch.zeros_like(lengths), lengths.clamp(min=1)) if stored is None else stored
    column, row = torch.arange(length, device=ids.device), torch.arange(rows, device=ids.device)
    seq = torch.where(column < lengths[:, None], row[:, None], -1)
    index = (past[:, None] + column).reshape(-1)
    alone = stored is not None and length == 1 and bool(keep.all())
    return Step(
        {"ids": ids.gather(1, order).reshape(-1)},
        seq.reshape(-1),
        index,
        index,
        torch.arange(rows + 1, device=ids.device) * length,
        past,
        horizon,
        (rows, length),
        rows if alone else 0,
        length,
        length if stored is None else None,
        saves=None if stored is None else row * length + (lengths - 1).clamp(min=0),
        emit=(row[:, None] * length + order.argsort(dim=1))[:, -last:].reshape(-1),
    )

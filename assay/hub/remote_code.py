"""A model of assay's for transformers: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The spec stands in config.json under `assay`; the package of that name, which must be installed, builds the model.
A call computes all tokens anew: there is no cache between the steps of `generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from assay.model.lm import LM, initialise_all
from assay.ops.step import Step
from assay.spec.load import validate
from assay.spec.model import ModelSpec


class AssayConfig(PretrainedConfig):
    """assay: the spec, every field, as model.yaml has it."""

    model_type = "assay"

    def __init__(self, assay: dict[str, Any] | None = None, **more: Any) -> None:
        self.assay = assay
        super().__init__(**more)


class AssayForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AssayConfig
    base_model_prefix = "model"

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
        **ignored: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """input_ids, attention_mask, labels [B, T]; logits [B, T, V], of the last `logits_to_keep` columns where it is
        not 0. A masked token is seen by none, and positions count the others."""
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if keep.shape != input_ids.shape:
            raise ValueError(f"attention_mask: shape {tuple(keep.shape)}; {tuple(input_ids.shape)} is expected")
        step = packed(input_ids, keep.bool(), logits_to_keep)
        logits = self.model(step).logits.unflatten(0, (input_ids.shape[0], -1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        out = CausalLMOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> dict[str, Any]:
        found = {"input_ids": input_ids, "attention_mask": attention_mask}
        return found | {k: v for k, v in more.items() if k == "logits_to_keep"}


def shared(module: torch.nn.Module) -> dict[str, str]:
    """Names under which a parameter stands again, in layers that share theirs -> its first name."""
    first: dict[int, str] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for name, p in named:
        first.setdefault(id(p), name)
    return {name: first[id(p)] for name, p in named if first[id(p)] != name}


def packed(ids: Tensor, keep: Tensor, last: int) -> Step:
    """Rows with the tokens that count moved to their beginning; `emit` asks for logits in the order of the columns."""
    rows, length = ids.shape
    order = keep.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    lengths = keep.sum(1)
    column, row = torch.arange(length, device=ids.device), torch.arange(rows, device=ids.device)
    seq = torch.where(column < lengths[:, None], row[:, None], -1)
    index = column.repeat(rows)
    return Step(
        {"ids": ids.gather(1, order).reshape(-1)},
        seq.reshape(-1),
        index,
        index,
        torch.arange(rows + 1, device=ids.device) * length,
        torch.zeros_like(lengths),
        lengths.clamp(min=1),
        (rows, length),
        0,
        length,
        length,
        emit=(row[:, None] * length + order.argsort(dim=1))[:, -last:].reshape(-1),
    )

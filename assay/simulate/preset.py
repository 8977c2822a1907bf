"""A machine's costs from what a model's parts declare and a device's published rates (this reads parts, so torch)."""

from __future__ import annotations

from assay.cost.bill import DTYPES, Question, Sheet
from assay.cost.hardware import Hardware, weights_read
from assay.simulate.cost import Machine, StepCost, chunk_pairs
from assay.spec.base import DTYPE_BYTES
from assay.spec.model import ModelSpec

KEPT = 0.9  # of the memory for weights and state; the rest is working memory


def machine_of(
    spec: ModelSpec, device: Hardware, *, share: float, dtype: str = "bf16", overhead: float = 0.0
) -> Machine:
    """`share` of the device's memory and arithmetic rates is reached; 1 is the roofline, which no kernel reaches.

    Costs are lines through two contexts, the model's whole one and half of it: exact for full attention, and for state
    that does not grow; a window or a compressed state in between bends.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share}; accepted: above 0, at most 1, of the device's published rates")
    sheet, whole = Sheet(spec), max(spec.context, 2)
    half, rate, reads = whole // 2, share * device.rate(dtype), share * device.memory_byte_s
    flops = {n: sheet.bill(Question(n, 1, dtype, dtype)).flops["prefill"] for n in (half, whole)}
    pair = (flops[whole] / whole - flops[half] / half) / (chunk_pairs(whole) / whole - chunk_pairs(half) / half)
    token = flops[whole] / whole - pair * chunk_pairs(whole) / whole
    read = {n: sheet.state_bytes_read(Question(n, 1, dtype, dtype)) for n in (half, whole)}
    grows = (read[whole] - read[half]) / (whole - half)
    kept = {n: sheet.state_bytes(Question(n, 1, dtype, dtype)) for n in (half, whole)}
    width = DTYPE_BYTES[DTYPES[dtype]]
    weights = sum(w.numel for w in sheet.weights().values()) * width
    room = KEPT * device.memory_bytes - weights
    held = (kept[whole] - kept[half]) / (whole - half) or kept[whole] / whole
    if room < held:
        raise ValueError(
            f"{device.name}: the weights take {weights:,} of {device.memory_bytes:,.0f} bytes; no room for state"
        )
    step = StepCost(
        overhead=overhead,
        weights=weights_read(spec, half) * width / reads,
        token=max(token, 0.0) / rate,
        sequence=max(read[whole] - grows * whole, 0.0) / reads,
        context=grows / reads,
        pair=max(pair, 0.0) / rate,
    )
    capacity = int(room / held) if held else None
    return Machine(name=f"{device.name} at {share:.0%}", step=step, capacity=capacity, state_bytes=held)

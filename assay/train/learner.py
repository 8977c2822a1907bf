"""One optimiser step, for every architecture. It knows two prefixes of taps, `loss.` and `stat.`, and no mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from assay.cost.memory import Need, need_of
from assay.cost.parallel import Spread, held, in_flight, on_stage, stream_values, streams_kept
from assay.data.dataset import Data
from assay.data.halves import Halves, halves
from assay.data.loader import Batch
from assay.model.lm import LM, build, weight_table
from assay.parts.base import Part
from assay.parts.heads.lm import LossOptions
from assay.spec.model import ModelSpec
from assay.spec.shard import deal
from assay.train.ema import average_of
from assay.train.evaluate import step_of_halves
from assay.train.memory import SavedForBackward, available_bytes, loss_piece
from assay.train.objective import posed
from assay.train.optim.adamw import load_state, set_rate, state_tensors
from assay.train.optim.build import build as build_optimizer
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.replicas import local, placed
from assay.train.parallel.spec import ROWS
from assay.train.parallel.team import Team
from assay.train.precision import Runner
from assay.train.recipe import Recipe
from assay.train.recompute import apply as recompute
from assay.train.schedule import factor

NLL = "nll"
LOGIT_BYTES = 6
"""Of each logit held at once, beside what is saved: its gradient in float32 and in half precision."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken: the mean loss of its targets in nats, and the gradient's norm before clipping, both still
    on the device; the learning rate."""

    loss: Tensor
    norm: Tensor
    rate: float


class Learner:
    """A model, its optimiser and its data: everything that an optimiser step changes."""

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        data: Data,
        device: torch.device,
        compiled: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        mesh = mesh or Mesh.of(recipe.parallel, device.type)
        table = weight_table(spec)
        how = Spread(mesh.spec.sizes, recipe.batch.accumulate)
        own = on_stage(table, spec, *self._stage_of(mesh))
        self.mesh, self._held = mesh, held(own, deal(spec, how.sizes), how)
        self.spec, self.recipe, self.device = spec, recipe, device
        self.tokenizer = data.tokenizer if spec.encoder is None else data.tokenizer.going_on()
        self._moments = 4 * sum(recipe.optimizer.keeps(table[name], w) for name, w in self._held.items())
        self.home = torch.device("cpu") if mesh.spec.offload else device
        self._kept().check(self.available_on(self.home), "a narrower or shallower model needs less")
        if compiled and mesh.processes > 1:
            raise ValueError(f"--compile: compiled steps are for one process; recipe.parallel makes {mesh.processes}")
        if compiled and spec.encoder is not None:
            raise ValueError("--compile: compiled steps have one size, and an encoder's sources have many")
        self.parameters = sum(w.numel for w in table.values())
        # What is cut is cut on the host: a device need not have room for the whole.
        self.model = build(spec, recipe.seed, "cpu" if mesh.size("shard") > 1 else device).train()
        recompute(self.model, recipe.recompute)
        self.team = Team(self.model, mesh, recipe.precision)
        placed(self.model, device, mesh.spec.offload)
        # What `shard` gathers is in the precision of the products already.
        self.precision = "float32" if self.team.casts else recipe.precision
        self.optimizer = build_optimizer(recipe.optimizer, self.model, table, self.team)
        kept = dict(self.model.named_parameters())
        averages = recipe.optimizer.kind == "schedule_free"
        self.average = average_of(recipe.evaluation.ema, kept, self.team.cuts, averages)
        mix = [(recipe.mix.passkey, recipe.mix.share)] if recipe.mix.share else []
        self.loader = data.stream(recipe.batch.rows, recipe.batch.length, recipe.seed, mix)
        self.runner = Runner(self.model, self.precision, compiled)
        self.options = LossOptions(recipe.loss.smoothing, recipe.loss.z, loss_piece(device))
        self._after = [m for m in self.model.modules() if isinstance(m, Part) and type(m).after is not Part.after]

    def step(self, number: int, steps: int) -> Taken:
        """Step `number` of 0 .. steps-1, on the next batch.

        The loss is the sum over all targets of the batch by their count, however the batch is cut: a mean of the
        pieces' means would weigh a target in a piece of few targets more.
        """
        batch = posed(next(self.loader), self.recipe.loss, self.recipe.seed, number)
        total = max(1, batch.counted)
        pieces = self._pieces(batch)
        sums: dict[str, Tensor] = {NLL: torch.zeros((), device=self.device)}
        with self.runner.cast_once() if len(pieces) > 1 else nullcontext():
            self.team.run(len(pieces), lambda i: self._objective(pieces[i], total, sums))
        self.team.reduce()
        stats = self.team.total(sums)
        stats |= self.team.total({NLL: stats[NLL]}, ("pipeline",))
        norm = self.team.clip(self.recipe.clip if self.recipe.clip is not None else float("inf"))
        rate = self.recipe.optimizer.peak(self.spec.d_model) * factor(self.recipe.schedule, number, steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for part in self._after:
            place = f"{part.name}."
            part.after({k.removeprefix(place): v for k, v in stats.items() if k.startswith(place)})
        if self.average is not None:
            self.average.update()
        return Taken(stats[NLL] / total, norm, rate)

    def _pieces(self, batch: Batch) -> tuple[Batch, ...]:
        count = self.recipe.batch.accumulate
        return (batch,) if count == 1 else tuple(batch.split(batch.grid[0] // count))

    def _objective(self, piece: Batch, total: int, sums: dict[str, Tensor]) -> Tensor:
        """What is minimised of this process's part of a piece. Its losses are added to `sums`.

        A `loss.*` tap is a mean over the piece's tokens, weighted by its part of the model, and counts by the share of
        the targets that are here. `stat.*` taps are sums.
        """
        # Rows are dealt out behind the cut: what is as wide as all rows need draws the dropout of one process.
        read = halves(piece, self.spec)
        own, place = self.team.part(read.own)
        share = self.team.share(own.counted, total)
        source = None if read.source is None else self.team.part(read.source)[0]
        read = replace(read, source=source, own=own).to(self.device)
        out = self.runner(step_of_halves(read, place), read.own.targets, self.options)
        assert out.loss is not None
        sums[NLL] = sums[NLL] + out.loss["nll"].detach()
        objective = out.loss["objective"] / total
        for name, value in out.taps.items():
            if ".loss." in name:
                objective = objective + value * share
            elif ".stat." in name:
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return objective

    def trained(self) -> LM:
        """The model in evaluation mode; where its weights are cut, the first process gets a whole one, on the host, and
        the others what they hold. All processes have to ask."""
        self.model.eval()
        if not self.team.cuts:
            return self.model
        weights = self.team.weights()
        if not weights:
            return self.model
        whole = LM(self.spec).eval()
        for name, parameter in whole.named_parameters():
            parameter.data = weights[name]
        return whole

    def need(self) -> Need:
        """What a step needs. A second row is run beside a first one to see what it adds to what is saved for backward:
        the copies of the weights, which a first one saves too, count once and stand in `need_of`."""
        rows = -(-self.recipe.batch.rows // self.recipe.batch.accumulate // self.mesh.size(*ROWS))
        one, two = (self._saves(count, rows) for count in (1, 2))
        tokens, (stage, stages) = rows * self.recipe.batch.length, self._stage_of(self.mesh)
        logits = min(self.options.piece, tokens * self.spec.vocab) if stage == stages - 1 else 0
        need = self._kept() if self.home == self.device else Need(0, 0, 0)
        pieces, width = self.recipe.batch.accumulate, 2 if self.recipe.precision == "bfloat16" else 4
        stream = tokens // self.mesh.size("context") * stream_values(self.spec) * width
        saved = in_flight(stage, stages, pieces) * rows * (two - one) + streams_kept(stage, stages, pieces) * stream
        return need.with_activations(saved + LOGIT_BYTES * logits)

    @staticmethod
    def _stage_of(mesh: Mesh) -> tuple[int, int]:
        """Which stage of a pipeline this process has, and of how many."""
        return mesh.rank("pipeline"), mesh.size("pipeline")

    def _kept(self) -> Need:
        """Of weights, their gradients and what is remembered of them, which stand at `home`."""
        return need_of(self._held, self.recipe.precision, self._moments)

    def available_on(self, device: torch.device) -> int:
        """Memory that this process can still have, where those beside it on the machine take as much."""
        return available_bytes(device) // self.mesh.sharing(device)

    def _saves(self, count: int, rows: int) -> int:
        """Bytes saved for backward by `count` of a batch's rows, with their share of the logits held at once."""
        length = self.recipe.batch.length
        ids = torch.zeros(count * length, dtype=torch.long, device=self.device)
        index = torch.arange(length, device=self.device).repeat(count)
        starts = torch.arange(count + 1, device=self.device) * length
        seq = torch.arange(count, device=self.device).repeat_interleave(length)
        batch = Batch(ids, ids, seq, index, starts, torch.ones_like(ids), (count, length))
        options = replace(self.options, piece=max(1, self.options.piece * count // rows))
        with SavedForBackward(self.model) as saved:
            # An encoder reads no more than a whole row, and what its decoder says is no longer.
            read = Halves(batch if self.spec.encoder is not None else None, batch, ids)
            Runner(self.model, self.precision)(step_of_halves(read), batch.targets, options)
        return saved.bytes

    def check_memory(self) -> None:
        """ValueError with the numbers when a step would not fit."""
        need = self.need()
        need.check(
            self.available_on(self.device) + need.weights, "more pieces (recipe.batch.accumulate) save less at once"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All but the weights: named tensors, whole and on the first process alone, and values for JSON. All processes
        have to ask."""
        state = state_tensors(self.optimizer, self.model)
        found = self.team.kept({k: (k.rpartition("/")[0], v) for k, v in state.items()})
        tensors = {f"optimizer/{k}": v for k, v in found.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.average is None:
            return tensors, {"loader": self.loader.state()}
        return tensors | self.average.state(), {"loader": self.loader.state(), "ema_steps": self.average.steps}

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Put these whole weights into the model, in the dtype that it has."""
        for name, parameter in self.team.parameters.items():
            local(parameter).copy_(local(self.team.own(name, weights[name])))

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. ValueError for a state of another model or other data."""
        prefix = "optimizer/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        state = {k: v for k, v in state.items() if self.team.keeps(k.rpartition("/")[0])}
        load_state(self.optimizer, self.model, {k: self.team.own_moment(k, v) for k, v in state.items()})
        if self.average is not None:
            self.average.restore(tensors, values["ema_steps"])
        self.loader.restore(values["loader"])
        torch.set_rng_state(tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)

"""A model as data: blocks by name, a pattern tiled over depth, positions by name, embedding and head.

`ModelSpec.expand()` gives one list of stages for each layer; nothing downstream reads the sugar.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from assay.spec.base import (
    EmbedSpec,
    FfnSpec,
    HeadSpec,
    InitSpec,
    LinearSpec,
    MixerSpec,
    NestedError,
    NormSpec,
    PartSpec,
    PositionSpec,
    ResidualSpec,
    Site,
    Spec,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]  # it becomes part of dotted names
Place = Literal["pre", "post", "output", "sandwich", "none"]


class BlockNorm(Spec):
    """Where a block normalises. pre: x + f(n(x)). post: n(x + f(x)). output: x + n(f(x)). sandwich: x + n(f(n(x)))."""

    place: Place = "pre"
    kind: NormSpec = Field(default="rmsnorm", validate_default=True)


class BranchSpec(Spec):
    """`scale * post(part(conv(pre(x))))`. Exactly one of `mixer` and `ffn`.

    conv: a mixer without weights to spare that comes before the part: a short convolution (`kind: conv`).
    """

    mixer: MixerSpec | None = None
    ffn: FfnSpec | None = None
    pre: NormSpec | None = None
    conv: MixerSpec | None = None
    post: NormSpec | None = None
    scale: float = 1.0
    name: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9_]*$")

    @model_validator(mode="after")
    def _one_part(self) -> Self:
        if (self.mixer is None) == (self.ffn is None):
            raise ValueError("a branch has exactly one of `mixer` and `ffn`")
        return self

    @property
    def part(self) -> PartSpec:
        part = self.mixer or self.ffn
        assert part is not None
        return part


class StageSpec(Spec):
    """A residual around parallel branches, summed. `pre` is one norm shared by all branches."""

    branches: tuple[BranchSpec, ...] = Field(min_length=1)
    residual: ResidualSpec = Field(default="add", validate_default=True)
    pre: NormSpec | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class BlockSpec(Spec):
    """One kind of block. `mixer` and `ffn` are sugar for two stages of one branch; `stages` says it in full.

    parallel: `own` gives both branches their own pre-norm (GPT-NeoX), `shared` one norm for both (Cohere, PaLM).
    scale: multiplier on every branch (residual multiplier). like: `blocks.N` shares that layer's weights.
    conv: a short convolution before the mixer (`kind: conv`).
    """

    mixer: MixerSpec | None = None
    ffn: FfnSpec | None = None
    conv: MixerSpec | None = None
    norm: BlockNorm = Field(default={}, validate_default=True)
    residual: ResidualSpec = Field(default="add", validate_default=True)
    parallel: Literal["no", "own", "shared"] = "no"
    scale: float = 1.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    stages: tuple[StageSpec, ...] = ()
    like: str | None = None
    linears: dict[str, LinearSpec] = {}

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        sugar = self.mixer is not None or self.ffn is not None
        if self.like is not None and (sugar or self.stages):
            raise ValueError("`like` stands alone: the block it names says the rest")
        if self.like is None and sugar == bool(self.stages):
            raise ValueError("a block has `mixer` and/or `ffn`, or `stages`, or `like`")
        self._only("like", {"like"}) if self.like is not None else None
        self._only("stages", {"stages", "linears"}) if self.stages else None
        if self.norm.place == "post" and not hasattr(self.residual, "norm") and self.residual.kind_name() != "add":
            raise ValueError(
                f"`norm.place: post` puts the norm into the residual, and `residual` is "
                f"{self.residual.kind_name()!r}; accepted: add, post"
            )
        if self.parallel != "no" and (self.mixer is None or self.ffn is None):
            raise ValueError("`parallel` needs both `mixer` and `ffn`")
        if self.conv is not None and self.mixer is None:
            raise ValueError("`conv` stands before a `mixer`, which is missing")
        if self.parallel == "shared" and self.norm.place not in ("pre", "none"):
            raise ValueError(
                f"`parallel: shared` shares one pre-norm; norm.place is {self.norm.place!r}, accepted: pre"
            )
        return self

    def _only(self, form: str, allowed: set[str]) -> None:
        """Beside `like` or `stages`, the fields of the sugar would be read by nobody."""
        blank = {"norm": BlockNorm(), "residual": ResidualSpec._parse("add")}
        for name, info in BlockSpec.model_fields.items():
            if name not in allowed and getattr(self, name) != blank.get(name, info.default):
                raise NestedError(
                    (name,), f"says nothing beside `{form}`; accepted there: {', '.join(sorted(allowed))}"
                )

    def expand(self) -> tuple[StageSpec, ...]:
        if self.stages:
            return self.stages
        parts = [(k, p) for k, p in (("mixer", self.mixer), ("ffn", self.ffn)) if p is not None]
        place, kind = self.norm.place, self.norm.kind
        shared = self.parallel == "shared" and place == "pre"
        branches = [
            BranchSpec.model_validate(
                {
                    key: part,
                    "pre": kind if place in ("pre", "sandwich") and not shared else None,
                    "conv": self.conv if key == "mixer" else None,
                    "post": kind if place in ("output", "sandwich") else None,
                    "scale": self.scale,
                    "name": key,
                }
            )
            for key, part in parts
        ]
        residual: Any = {"kind": "post", "norm": kind} if place == "post" else self.residual
        if place == "post" and self.residual.kind_name() != "add":
            residual = self.residual.model_copy(update={"norm": kind})
        common = {"residual": residual, "dropout": self.dropout}
        if self.parallel != "no":
            return (StageSpec.model_validate({"branches": branches, "pre": kind if shared else None, **common}),)
        return tuple(StageSpec.model_validate({"branches": (b,), **common}) for b in branches)


class ModelSpec(Spec):
    """A language model. `context` is the length it is meant for; `encoder` adds a memory for cross-attention."""

    d_model: int = Field(ge=1)
    vocab: int = Field(ge=1)
    layers: int = Field(ge=1, le=10_000)
    context: int = Field(ge=1)
    blocks: dict[str, BlockSpec] = Field(min_length=1)
    pattern: tuple[str, ...] = ()
    positions: dict[Name, PositionSpec] = {}
    embed: EmbedSpec = Field(default="token", validate_default=True)
    final_norm: NormSpec | None = Field(default="rmsnorm", validate_default=True)
    head: HeadSpec | None = Field(default="lm", validate_default=True)
    init: InitSpec = InitSpec()
    encoder: ModelSpec | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for name in self.pattern:
            if name not in self.blocks:
                raise NestedError(("pattern",), f"names no block: {name!r}; accepted: {', '.join(self.blocks)}")
        if not self.pattern and len(self.blocks) > 1:
            raise NestedError(("pattern",), f"missing: there are several blocks ({', '.join(self.blocks)})")
        for layer, _ in enumerate(self.plan):
            self._source(layer)
        for site, part in self.parts():
            try:
                part.check(site)
                self._check_position(part, site)
            except NestedError as error:
                raise NestedError((site.name, *error.loc), str(error)) from None
            except ValueError as error:
                raise NestedError((site.name,), str(error)) from None
        self._check_shared()
        if self.encoder is not None and self.encoder.head is not None:
            raise NestedError(("encoder", "head"), "an encoder has no head: its features are read; accepted: null")
        if self.encoder is not None:
            self._check_table(self.encoder)
        return self

    def _check_table(self, encoder: ModelSpec) -> None:
        try:
            encoder.embed.borrows((self.vocab, self.d_model), (encoder.vocab, encoder.d_model))
        except ValueError as error:
            raise NestedError(("encoder", "embed"), str(error)) from None

    def _check_shared(self) -> None:
        """Every `takes` has an earlier `gives` that it can read; cross-attention fits the encoder's width."""
        given: dict[str, MixerSpec] = {}
        for layer in range(self.layers):
            for site, _, branch in self.branches(layer):
                part, name = branch.part, getattr(branch.part, "takes", None)
                if isinstance(name, str) and name not in given:
                    accepted = ", ".join(given) or "none is given"
                    raise NestedError((site.name, "takes"), f"no earlier layer gives {name!r}; accepted: {accepted}")
                try:
                    if isinstance(name, str) and isinstance(part, MixerSpec):
                        part.shares(given[name], site)
                    if self.encoder is not None and isinstance(part, MixerSpec):
                        part.recalls(self.encoder.d_model, site)
                except ValueError as error:
                    raise NestedError((site.name,), str(error)) from None
                if isinstance(part, MixerSpec) and isinstance(gives := getattr(part, "gives", None), str):
                    given[gives] = part

    def _check_position(self, part: PartSpec, site: Site) -> None:
        name = getattr(part, "position", None)
        if isinstance(name, str) and name not in self.positions:
            accepted = ", ".join(self.positions) or "none are declared"
            raise NestedError(("position",), f"no position named {name!r}; accepted: {accepted}")
        if isinstance(name, str) and isinstance(part, MixerSpec):
            part.meets(self.positions[name], site)

    @cached_property
    def plan(self) -> tuple[str, ...]:
        """The block name of each layer: the pattern tiled over depth."""
        pattern = self.pattern or tuple(self.blocks)
        return tuple(pattern[i % len(pattern)] for i in range(self.layers))

    def _source(self, layer: int) -> int:
        """The layer whose weights this one uses: itself unless its block says `like: blocks.N`."""
        like = self.blocks[self.plan[layer]].like
        if like is None:
            return layer
        number = like.removeprefix("blocks.")
        if not number.isdigit() or int(number) >= layer or self.blocks[self.plan[int(number)]].like is not None:
            raise NestedError(
                ("blocks", self.plan[layer], "like"), f"{like!r} is not an earlier layer of its own: blocks.N"
            )
        return int(number)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        return tuple(self._source(layer) for layer in range(self.layers))

    @cached_property
    def _stages(self) -> tuple[tuple[StageSpec, ...], ...]:
        expanded = {name: block.expand() for name, block in self.blocks.items() if block.like is None}
        return tuple(expanded[self.plan[source]] for source in self.sources)

    def expand(self) -> tuple[tuple[StageSpec, ...], ...]:
        """The stages of every layer, through `like`."""
        return self._stages

    def site(self, layer: int) -> Site:
        rules = tuple(self.blocks[self.plan[self.sources[layer]]].linears.items())
        d = self.d_model
        return Site(f"blocks.{layer}", layer, self.layers, d, d, rules, self.context, self.init)

    def root(self, name: str) -> Site:
        return Site(name, 0, self.layers, self.d_model, self.d_model, (), self.context, self.init)

    def branches(self, layer: int) -> Iterator[tuple[Site, StageSpec, BranchSpec]]:
        """Every branch of a layer with the site of its part."""
        site = self.site(layer)
        for number, stage in enumerate(self.expand()[layer]):
            for name, branch in zip(branch_names(self.expand()[layer], number), stage.branches, strict=True):
                yield site.child(name), stage, branch

    def parts(self) -> Iterator[tuple[Site, PartSpec]]:
        """Every part with its site: positions, embedding, the layers' mixers and ffns, norms and residuals, head."""
        for name, position in self.positions.items():
            yield self.root(f"positions.{name}"), position
        yield self.root("embed"), self.embed
        for layer in range(self.layers):
            yield from self.layer_parts(layer)
        if self.final_norm is not None:
            yield self.root("final_norm"), self.final_norm
        if self.head is not None:
            yield self.root("head"), self.head

    def layer_parts(self, layer: int) -> Iterator[tuple[Site, PartSpec]]:
        site, stages = self.site(layer), self.expand()[layer]
        for number, stage in enumerate(stages):
            yield site.child(f"residual{number}"), stage.residual
            if stage.pre is not None:
                yield site.child(f"norm{number}"), stage.pre
            for name, branch in zip(branch_names(stages, number), stage.branches, strict=True):
                if branch.pre is not None:
                    yield site.child(f"{name}_norm"), branch.pre
                if branch.conv is not None:
                    yield site.child(f"{name}_conv"), branch.conv
                yield site.child(name), branch.part
                if branch.post is not None:
                    yield site.child(f"{name}_post"), branch.post


def branch_names(stages: tuple[StageSpec, ...], number: int) -> tuple[str, ...]:
    """Module names of a stage's branches: `mixer` and `ffn`, numbered from the second of a kind in the block."""
    seen: dict[str, int] = {}
    names: list[str] = []
    for i, stage in enumerate(stages[: number + 1]):
        for branch in stage.branches:
            base = branch.name or ("mixer" if branch.mixer is not None else "ffn")
            seen[base] = seen.get(base, 0) + 1
            if i == number:
                names.append(base if seen[base] == 1 else f"{base}{seen[base]}")
    return tuple(names)

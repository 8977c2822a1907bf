"""What every spec is made of: frozen values that say what a mechanism needs and costs, without a tensor.

Everything a spec answers is a function of (spec, site). Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from assay.spec.values import DTYPE_BYTES as DTYPE_BYTES
from assay.spec.values import Cost as Cost
from assay.spec.values import Fan as Fan
from assay.spec.values import Init as Init
from assay.spec.values import NestedError as NestedError
from assay.spec.values import Role as Role
from assay.spec.values import StateField as StateField
from assay.spec.values import Weight as Weight


class Spec(BaseModel):
    """Base of everything described as data: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """An unknown field is named together with the accepted ones (pydantic's own message does not list them)."""
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise NestedError((key,), f"unknown field{hint}; accepted: {', '.join(cls.model_fields)}")
            if isinstance(data[key], bool) and _is_number(cls.model_fields[key].annotation):
                raise NestedError((key,), f"expected a number, not {data[key]}")
        return data


def _is_number(annotation: Any) -> bool:
    """A field of whole or real numbers: pydantic would read `true` as 1 there."""
    options = get_args(annotation) or (annotation,)
    return bool not in options and (int in options or float in options)


class InitSpec(Spec):
    """How weights are drawn. `embed: null` is d_model ** -0.5 (a tied head then starts with logits of order one).

    std: the spread of every matrix, or `fan_in` for fan_in ** -0.5. depth: maps onto the residual stream are divided by
    sqrt(2 layers). zero_out: they start at zero.
    """

    std: float | Literal["fan_in"] = 0.02
    embed: float | None = Field(default=None, ge=0.0)
    depth: bool = True
    zero_out: bool = False

    @field_validator("std", mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and 0 <= value < math.inf
        if value != "fan_in" and not number:
            raise ValueError(f"expected a number of at least 0, or 'fan_in', not {value!r}")
        return value

    def matrix(self, fan_in: int) -> Init:
        return Init.fan_in(fan_in) if self.std == "fan_in" else Init("normal", float(self.std))

    def out(self, fan_in: int, layers: int) -> Init:
        """A projection that writes to the residual stream: GPT-2's 1/sqrt(2 layers), or zero."""
        if self.zero_out:
            return Init.constant(0.0)
        std = self.matrix(fan_in).std
        return Init("normal", std / math.sqrt(2 * layers) if self.depth else std)

    def embedding(self, d_model: int) -> Init:
        return Init("normal", d_model**-0.5 if self.embed is None else self.embed)


@dataclass(frozen=True)
class Site:
    """Where a spec stands. `name` is the dotted name of the built module, and of its weights and state."""

    name: str = "part"
    layer: int = 0
    layers: int = 1
    d_in: int = 32
    d_out: int = 32
    linears: tuple[tuple[str, Any], ...] = ()
    context: int = 2048
    init: InitSpec = field(default_factory=InitSpec)

    def child(self, name: str, d_in: int | None = None, d_out: int | None = None) -> Site:
        changes = {f.name: getattr(self, f.name) for f in fields(self)}
        changes["name"] = f"{self.name}.{name}" if self.name else name
        changes["d_in"] = self.d_in if d_in is None else d_in
        changes["d_out"] = self.d_out if d_out is None else d_out
        return Site(**changes)

    def linear(self, name: str) -> Any:
        """The linear spec whose glob matches `<site>.<name>`; the last rule wins; None is the plain linear."""
        found = None
        for glob, spec in self.linears:
            if fnmatchcase(f"{self.name}.{name}", glob):
                found = spec
        return found


class PartSpec(Spec):
    """A mechanism as data. Subclasses in `parts/<slot>/` set `kind`; the slot classes below are what fields name.

    A field annotated with a slot class accepts any registered part of that slot, chosen by its `kind`.
    """

    slot: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.__dict__.get("abstract_slot"):
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls._parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda v: v.model_dump())
        )

    @classmethod
    def _parse(cls, value: Any) -> PartSpec:
        from assay.spec import registry

        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise NestedError((), f"expected a mapping with a `kind`, or the name of a kind, not {value!r}")
        kind = value.get("kind")
        if kind is None:
            raise NestedError(("kind",), f"missing; accepted for {cls.slot}: {registry.names(cls.slot)}")
        part = registry.get(cls.slot, kind)
        try:
            return part.model_validate(dict(value))
        except ValidationError as error:
            loc, message = first_error(error)
            raise NestedError(loc, message) from None

    def refusals(self) -> Mapping[str, str]:
        """Law or feature -> reason, for this very spec; `refuses` unless a field decides."""
        return self.refuses

    def check(self, site: Site) -> None:
        """Raise ValueError for what cannot be honoured here, before a tensor exists."""

    def linears(self, site: Site) -> dict[str, Fan]:
        """The linear maps of this part by name; which linear stands there is the site's rule."""
        return {}

    def own(self, site: Site) -> dict[str, Weight]:
        """Parameters that are not inside a linear or a child part."""
        return {}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        """Parts inside this one (a norm on the queries), with their sites."""
        return {}

    def weights(self, site: Site) -> dict[str, Weight]:
        """Every parameter below this part by its name in the built module. Derived: the module is built from it."""
        table = dict(self.own(site))
        for name, fan in self.linears(site).items():
            table |= {f"{name}.{key}": w for key, w in linear_at(site, name).fan(fan, site).items()}
        for name, (child, place) in self.children(site).items():
            table |= {f"{name}.{key}": w for key, w in child.weights(place).items()}
        return table

    def state(self, site: Site) -> tuple[StateField, ...]:
        return ()

    def pieces(self, site: Site) -> Mapping[str, int]:
        """Into how many equal pieces `tensor` and `expert` ranks may deal the part out: 0 is whole on each of them."""
        return {}

    def copied(self, site: Site) -> Mapping[str, int]:
        """Maps, weights of the part itself and state fields that come in fewer pieces than `pieces` has for `tensor`:
        where there are more ranks than that, neighbours hold copies of one piece."""
        return {}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return Cost()

    def build(self, site: Site) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no build")

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        """Small sizes for conformance; d_in is 32."""
        raise NotImplementedError(f"{cls.__name__} needs tiny(): sizes for conformance")

    @classmethod
    def kind_name(cls) -> str:
        return str(get_args(cls.model_fields["kind"].annotation)[0])


class MixerSpec(PartSpec):
    slot: ClassVar[str] = "mixers"
    abstract_slot: ClassVar[bool] = True

    def meets(self, scheme: PositionSpec, site: Site) -> None:
        """Raise ValueError where this mixer cannot work with the position scheme that its `position` names."""

    def shares(self, giver: MixerSpec, site: Site) -> None:
        """Raise ValueError where this mixer cannot read what `giver`, under the name in `takes`, gives."""

    def recalls(self, d_memory: int, site: Site) -> None:
        """Raise ValueError where this mixer cannot read an encoder's features of this width."""


class FfnSpec(PartSpec):
    slot: ClassVar[str] = "ffns"
    abstract_slot: ClassVar[bool] = True


class PositionSpec(PartSpec):
    slot: ClassVar[str] = "positions"
    abstract_slot: ClassVar[bool] = True

    @property
    def reads(self) -> bool:
        """Keys are stored raw and turned when they are read."""
        return False

    @property
    def by_length(self) -> bool:
        """What a token is told depends on the length that its sequence plans for."""
        return False

    def fits(self, heads: int, head_dim: int) -> None:
        """Raise ValueError for query heads of a number or size that the scheme cannot serve."""

    def told(self, site: Site, heads: int, new: int, pairs: int, square: int) -> Cost:
        """Products for a layer's biases: `new` tokens, `pairs` pairs that are seen, `square` that are multiplied."""
        return Cost()

    def limit(self, site: Site) -> int | None:
        """How many positions the scheme has (0 to limit - 1); a later one raises. None: no end."""
        return None


class NormSpec(PartSpec):
    slot: ClassVar[str] = "norms"
    abstract_slot: ClassVar[bool] = True


class ResidualSpec(PartSpec):
    slot: ClassVar[str] = "residuals"
    abstract_slot: ClassVar[bool] = True

    def gain(self, weight: str, site: Site) -> float:
        """Multiplier on the initial standard deviation of a weight of the stage's branches (DeepNorm's beta)."""
        return 1.0


class RouterSpec(PartSpec):
    slot: ClassVar[str] = "routers"
    abstract_slot: ClassVar[bool] = True


class SelectorSpec(PartSpec):
    """Its site's d_in is the width of the mixer's input, d_out that of what the mixer makes its queries from."""

    slot: ClassVar[str] = "selectors"
    abstract_slot: ClassVar[bool] = True

    def turns(self, dim: int) -> None:
        """Raise ValueError where its keys have fewer than the `dim` leading dimensions that the mixer turns."""

    def narrows(self, entries: int) -> bool:
        """Whether a token that could see this many keys sees fewer."""
        raise NotImplementedError

    def pairs(self, new: int, seen: int) -> int:
        """(query, key) pairs that are left when `new` tokens arrive after `seen` others; exact."""
        raise NotImplementedError


class LinearSpec(PartSpec):
    slot: ClassVar[str] = "linears"
    abstract_slot: ClassVar[bool] = True

    def fan(self, fan: Fan, site: Site) -> dict[str, Weight]:
        """The weights of one linear of this kind; `site` is that of the part it stands in."""
        raise NotImplementedError

    def build_fan(self, fan: Fan, site: Site, name: str) -> Any:
        raise NotImplementedError


class EmbedSpec(PartSpec):
    slot: ClassVar[str] = "embeds"
    abstract_slot: ClassVar[bool] = True

    def borrows(self, outer: tuple[int, int], own: tuple[int, int]) -> None:
        """Raise ValueError where an encoder's embedding cannot use the table [V, D] of the model around it."""


class HeadSpec(PartSpec):
    slot: ClassVar[str] = "heads"
    abstract_slot: ClassVar[bool] = True
    names_tokens: ClassVar[bool] = True
    """Its output is logits over the vocabulary for every token, not something about a whole sequence."""


SLOTS: Mapping[str, type[PartSpec]] = {c.slot: c for c in PartSpec.__subclasses__()}
"""The slots of this file by name, in its order."""


def linear_at(site: Site, name: str) -> LinearSpec:
    """The linear that the site's rules put at `name`; the plain one where no rule speaks."""
    rule = site.linear(name)
    if rule is None:
        from assay.spec import registry

        rule = registry.get("linears", "dense")()
    return rule


def first_error(error: ValidationError) -> tuple[tuple[Any, ...], str]:
    """The place and the message of the first problem, through nested parts; the message names the value given."""
    item = error.errors(include_url=False)[0]
    loc = tuple(item["loc"])
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, NestedError):
        return loc + cause.loc, str(cause)
    if item["type"] == "missing":
        return loc, "missing"
    message = item["msg"].removeprefix("Value error, ")
    return loc, f"{message}, not {item['input']!r}" if item["type"] != "value_error" else message

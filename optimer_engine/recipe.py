"""What a user writes: a recipe, decoded strictly and turned back into canonical text.

    base: org/base-model            # a folder, or org/name on the Hub (org/name@revision)
    sources:
      - {name: ja,   model: runs/ja/vector, weight: 0.4}
      - {name: math, model: org/math-cpt,   weight: 0.25, by_layer: [1.0, 0.5]}   # half in the end
    method: ties                    # default task_arithmetic; `docs/methods.md` lists them all
    parameters: {density: 0.5}      # of the method, for all sources; a source may have its own
    out_dtype: bfloat16             # default: as the base has it, tensor by tensor
    max_shard_size: 5GB             # default

YAML is read by rules narrower than YAML's own (see `read_config`): what is written means one thing,
and a misspelt key is refused instead of ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from optimer_engine.errors import RecipeError, is_text, quoted
from optimer_engine.types import DType, parse_bytes

MAX_CONFIG_BYTES = 1_000_000

T = TypeVar("T")


class Source(msgspec.Struct, forbid_unknown_fields=True):
    """One input of a merge beside the base.

    Attributes:
        name: the user's word for it, unique in the recipe.
        model: a folder, or `org/name` on the Hub; a full checkpoint or a distribution vector.
        weight: finite coefficient of its delta; not normalised. 0 leaves the source unread.
        revision: branch, tag or commit on the Hub.
        parameters: of the recipe's method, for this source alone, such as {"density": 0.3}.
        by_layer: factors on the weight for equal groups of consecutive layers, first to last:
            [1.0, 0.5] halves it in the second half. What stands before the layers (embeddings)
            goes with the first group, what stands after them with the last.
    """

    name: str
    model: str
    weight: float = 1.0
    revision: str | None = None
    parameters: dict[str, Any] = {}
    by_layer: list[float] = []

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise RecipeError("a source has an empty name", todo="give each source a name")
        if not math.isfinite(self.weight):
            raise RecipeError(
                f"weight is {self.weight}, expected a finite number",
                where=f"source {self.name!r}",
                todo="write a number such as 0.3",
            )
        if not all(math.isfinite(factor) for factor in self.by_layer):
            raise RecipeError(
                f"by_layer is {self.by_layer}, expected finite numbers",
                where=f"source {self.name!r}",
                todo="write factors on the weight such as [1.0, 0.5]",
            )


class Recipe(msgspec.Struct, forbid_unknown_fields=True):
    """theta_base + sum_i w_i * tau_i, or another method, as a user asks for it, not looked up yet.

    Attributes:
        base: folder or Hub id of the checkpoint that all is added to.
        sources: at least one, with distinct names.
        base_revision: branch, tag or commit of the base on the Hub.
        out_dtype: dtype of the merged floating-point tensors; None keeps the base's.
        max_shard_size: bytes of tensor data per output file, an int or text such as "5GB".
        method: a name in `optimer_engine.methods`; `parameters`: its settings.
        rounding: "nearest", or "stochastic" for bfloat16 outputs: unbiased, so that deltas too
            small for the grid survive on average.
        seed: of all that is left to chance, the masks of methods and stochastic rounding.
        rows: "strict", "common", "pad" or "by_token": other vocabularies, see `alignment.RowRule`.
        vocabulary: of the output under "by_token": the "union" of all, or the "base"'s.
    """

    base: str
    sources: list[Source]
    base_revision: str | None = None
    out_dtype: str | None = None
    max_shard_size: int | str = "5GB"
    method: str = "task_arithmetic"
    parameters: dict[str, Any] = {}
    rows: Literal["strict", "common", "pad", "by_token"] = "strict"
    vocabulary: Literal["union", "base"] = "union"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError("has no sources", where="recipe", todo="add at least one source")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(
                f"source names must be unique, found twice: {', '.join(twice)}",
                where="recipe",
                todo="give each source a name of its own",
            )
        for model in (self.base, *(source.model for source in self.sources)):
            if not model.strip():
                raise RecipeError(
                    "a model has an empty name", where="recipe", todo="name a folder or org/name"
                )
            if not is_text(model):
                raise RecipeError(
                    "is a path that no recipe or report can hold",
                    where=quoted(model),
                    todo="rename the folder, or link to it under a name in UTF-8",
                )
        if self.vocabulary != "union" and self.rows != "by_token":
            raise RecipeError(
                "is only looked at where rows are aligned by token",
                where="vocabulary",
                todo="write rows: by_token, or leave it out",
            )
        if self.out_dtype is not None:
            DType.parse(self.out_dtype)
        parse_bytes(self.max_shard_size)
        if len({len(source.by_layer) for source in self.sources} - {0}) > 1:
            raise RecipeError(
                "by_layer has other lengths for other sources",
                where="recipe",
                todo="give every source as many factors, or none",
            )

    @property
    def layer_groups(self) -> int:
        """Groups of layers that the sources' `by_layer` speak of; 1 where there are none."""
        return max(1, *(len(source.by_layer) for source in self.sources))

    @classmethod
    def load(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from a YAML file's path, a mapping, or a recipe.

        Raises:
            RecipeError: naming the key and the nearest right one.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return decode(recipe, cls, "recipe")
        return read_config(recipe, cls)

    def to_yaml(self) -> str:
        """Canonical text, in a fixed key order; `load` of it gives an equal recipe."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in canonical key order, without keys that are empty or None."""
        data = msgspec.to_builtins(self)
        data["sources"] = [_without_empty(source) for source in data["sources"]]
        for key in ("method", "rows", "vocabulary", "rounding", "seed"):
            if data[key] == _DEFAULTS[key]:
                del data[key]
        return _without_empty(data)

    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical text."""
        return fingerprint(self.to_dict())


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """sha256 (hex) of a recipe's plain data as YAML."""
    import yaml

    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    return hashlib.sha256(text.encode()).hexdigest()


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Recipe)}


def _without_empty(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in data.items() if value is not None and value not in ({}, [])
    }


def read_config(path: str | Path, type_: type[T]) -> T:
    """Read a YAML file into a msgspec Struct, refusing whatever could be read in two ways.

    Raises:
        RecipeError: naming the file, the line or key, and the nearest right key.
    """
    return decode(read_yaml(path), type_, str(path))


def read_yaml(path: str | Path) -> Any:
    """A YAML file as plain data.

    At most 1 MB, 30,000 values and 16 levels; no aliases, tags or duplicate keys; numbers and
    booleans by YAML 1.2's core rules (`1e-3` is a number, `no` is a text, infinities and NaN are
    not numbers).

    Raises:
        RecipeError: naming the file and line.
    """
    try:
        raw = _read_some(path)
        if len(raw) > MAX_CONFIG_BYTES:
            raise RecipeError(
                f"more than {MAX_CONFIG_BYTES} bytes, which no recipe needs", where=str(path)
            )
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path), todo="check the path") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", where=str(path)) from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"cannot be read: {what}", where=str(path)) from error
    from optimer_engine.strict_yaml import parse

    return parse(text, str(path))


def _read_some(path: str | Path) -> bytes:
    """All of a file or a pipe (as the shell's `<(...)` makes), or more of it than is allowed."""
    # O_NONBLOCK: a FIFO that nobody writes to is empty, and must not be waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise RecipeError("is not a regular file", where=str(path), todo="check the path")
        os.set_blocking(fd, True)
        raw = b""
        while len(raw) <= MAX_CONFIG_BYTES and (piece := os.read(fd, MAX_CONFIG_BYTES + 1)):
            raw += piece
        return raw
    finally:
        os.close(fd)


def decode(data: object, type_: type[T], where: str) -> T:
    """Plain data as a msgspec Struct; `where` names its origin in errors.

    Raises:
        RecipeError: naming the key and the nearest right one.
    """
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, RecipeError):  # from a Struct's own __post_init__
            raise RecipeError(
                cause.what, where=f"{where}: {cause.where}".rstrip(": "), todo=cause.todo
            ) from None
        message = str(error).replace(" - at `$.", " - at `").replace(" - at `$", " - at `the top")
        raise RecipeError(message, where=where, todo=_nearest_key(message, type_)) from None


def _nearest_key(message: str, type_: type) -> str:
    unknown = re.search(r"unknown field `(.+?)`", message)
    if unknown is None:
        return ""
    keys = sorted(_all_keys(msgspec.inspect.type_info(type_)))
    near = difflib.get_close_matches(unknown[1], keys, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"


def _all_keys(info: Any) -> set[str]:
    if isinstance(info, msgspec.inspect.StructType):
        nested = (_all_keys(field.type) for field in info.fields)
        return {field.encode_name for field in info.fields}.union(*nested)
    inner = [getattr(info, name, None) for name in ("item_type", "value_type")]
    inner += getattr(info, "types", ())
    return set().union(*(_all_keys(part) for part in inner if part is not None))

"""How a mergekit recipe names a model: `path[@revision][+adapter[@revision]]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimer_engine.errors import RecipeError

Reference = str | dict[str, Any]
"""A model as it stands in the file."""


@dataclass(frozen=True, order=True)
class ModelRef:
    """A folder or Hub repository, and the LoRA adapter that is applied to it, if any."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    @classmethod
    def parse(cls, data: Reference, at: str) -> ModelRef:
        """From the text, or from {model: ..., lora: ...} with texts or {path, revision}.

        Raises:
            RecipeError: naming the key `at`.
        """
        if isinstance(data, str):
            model, plus, lora = data.partition("+")
            if "+" in lora or (plus and not lora):
                raise RecipeError(
                    f"{data!r} is not MODEL or MODEL+ADAPTER",
                    where=at,
                    todo="name one adapter; write a path that holds a + as {model: {path: ...}}",
                )
            return cls(*_path(model, at), *(_path(lora, at) if lora else ()))
        data = {key: value for key, value in data.items() if value is not None}
        only(data, {"model", "lora"}, at)
        if "model" not in data:
            raise RecipeError("has no key model", where=at)
        adapter = data.get("lora")
        return cls(
            *_path(data["model"], f"{at}.model"),
            *(() if adapter is None else _path(adapter, f"{at}.lora")),
        )

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.lora is None:
            return model
        return f"{model}+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "")


def _path(data: Any, at: str) -> tuple[str, str | None]:
    if isinstance(data, dict):
        only(data, {"path", "revision"}, at)
        path, revision = data.get("path"), data.get("revision")
    else:
        path, _, revision = str(data).partition("@")
    if not isinstance(path, str) or not path or "@" in str(revision or ""):
        raise RecipeError(
            f"{data!r} is not a model", where=at, todo="write a folder or org/name[@revision]"
        )
    return path, str(revision) if revision else None


def only(data: dict[str, Any], keys: set[str], at: str) -> None:
    """Refuse keys of `data` beside `keys`.

    Raises:
        RecipeError: naming the first.
    """
    unknown = sorted(str(key) for key in data.keys() - keys)
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r}", where=at, todo=f"keys are {', '.join(sorted(keys))}"
        )

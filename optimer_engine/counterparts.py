"""Which tensor of a source stands for which of the base, where the two are laid out differently.

A text-only model and the multimodal one that holds it name the same tensors `model.layers.0...` and
`language_model.model.layers.0...` (Gemma 3, and `model.language_model.layers.0...` in newer
versions of Transformers). Equal names are the same tensor; of the others, those that are equal
without the prefix of their language model. What could be meant in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import quoted
from optimer_engine.names import is_multimodal, plain


@dataclass(frozen=True)
class Counterparts:
    """A source's tensors by the base's names.

    Attributes:
        names: the base's name to the source's.
        extra: names of the source that stand for no tensor of the base.
        untouched: names of the base's vision, audio and connecting parts, where the source has
            none at all.
        notes: what was matched by rule, or left out, in words.
        problems: what could be meant in two ways.
    """

    names: dict[str, str]
    extra: list[str]
    untouched: frozenset[str]
    notes: list[str]
    problems: list[str]

    @classmethod
    def of(cls, base: Checkpoint, given: Collection[str], label: str, whole: bool) -> Counterparts:
        """Match `given`, the names that a source offers.

        Args:
            label: what the user calls the source.
            whole: whether it has every tensor of its model, as an adapter has not.
        """
        names = {name: name for name in given if name in base.tensors}
        others = [name for name in given if name not in names]
        by_plain: dict[str, list[str]] = {}
        for name in base.tensors if others else ():
            by_plain.setdefault(plain(name), []).append(name)
        extra, moved, problems = [], [], []
        for name in others:
            meant = by_plain.get(plain(name), [])
            if len(meant) > 1:
                either = " or ".join(map(quoted, meant))
                problems.append(f"{label}: {quoted(name)} may stand for {either}")
            elif meant and meant[0] in names:
                both = f"{quoted(names[meant[0]])} and {quoted(name)}"
                problems.append(f"{label}: {both} both stand for {quoted(meant[0])}")
            elif meant:
                names[meant[0]] = name
                moved.append((name, meant[0]))
            else:
                extra.append(name)
        notes = []
        if moved:
            here, there = moved[0]
            notes.append(
                f"{label} is laid out differently: {len(moved)} tensors are matched without their"
                f" prefix, such as {quoted(here)} for {quoted(there)}"
            )
        parts = {name for name in base.tensors if is_multimodal(plain(name))}
        own = [name for name in given if is_multimodal(plain(name))]
        untouched = frozenset(parts if whole and not own else ())
        if untouched:
            notes.append(f"{label} is text only: {_tops(untouched)} stay as the base has them")
        if own and not parts:
            extra = [name for name in extra if name not in set(own)]
            notes.append(f"{label}: {_tops(own)} are left out, as the base is text only")
        return cls(names, extra, untouched, notes, problems)


def same_language_model(base: Checkpoint, source: Checkpoint) -> bool:
    """Whether one's language model is of the other's type: a multimodal model and its text part."""
    whole, part = base.config, source.config
    return any(
        text in (one.get("model_type"), _text(one)) and text is not None
        for one, text in ((whole, _text(part)), (part, _text(whole)))
    )


def _text(config: dict) -> str | None:
    inner = config.get("text_config")
    return inner.get("model_type") if isinstance(inner, dict) else None


def _tops(names: Collection[str]) -> str:
    tops = sorted({quoted(plain(name).partition(".")[0]) for name in names})
    return f"{len(names)} tensors of {', '.join(tops)}"

"""A mergekit recipe and opened checkpoints become rows: one TensorRecipe for each output tensor.

Differences to mergekit (docs/mergekit.md has them all): the tensors come from the checkpoints, not
from a table of architectures, so none is dropped; the arithmetic starts from the exact inputs, not
from inputs cast to `dtype`; without a base_model the donor of config.json and tokenizer is the
first model of the file, not a random one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_engine.checkpoint import MODEL, Checkpoint
from optimer_engine.errors import CheckpointError, MismatchError, RecipeError, quoted
from optimer_engine.mergekit.assembly import Assembly
from optimer_engine.mergekit.config import MergekitConfig
from optimer_engine.mergekit.outconfig import OutConfig
from optimer_engine.mergekit.precedence import filters
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import RowMap
from optimer_engine.mergekit.templates import choose_template
from optimer_engine.mergekit.tokenizer import (
    TokenizerPlan,
    build_tokenizer,
    changed_files,
    vocab_size,
)
from optimer_engine.mergekit.tokenizer_json import TOKENIZER_FILES, dump_json
from optimer_engine.names import HEAD, Names, is_multimodal
from optimer_engine.tensor_recipe import TensorRecipe
from optimer_engine.types import DType

_TEXT = {"default", "text_decoder", "text_model", "language_model"}
_VISION = {"vision_tower", "vision_model", "visual"}


@dataclass(frozen=True)
class Expansion:
    """All that an engine needs to run a mergekit recipe.

    Attributes:
        models: `Ref.checkpoint` counts these.
        rows: one for each output tensor, in the order of the output.
        row_maps: by the name of an output tensor whose rows are gathered by token; the operands of
            such a row are `rowmap.GatheredRows` in place of stored tensors.
        donor: number of the model that config.json and companion files come from.
        config: config.json as it is to be written; `config_changes` by dotted key.
        files: companion files to write in place of the donor's of the same name.
        omitted: companion files of the donor that are not to be copied.
        warnings: what was noticed and not refused.
    """

    models: tuple[ModelRef, ...]
    rows: tuple[TensorRecipe, ...]
    row_maps: dict[str, RowMap]
    donor: int
    config: dict[str, Any]
    config_changes: dict[str, Any]
    files: dict[str, bytes]
    omitted: tuple[str, ...]
    warnings: tuple[str, ...]


def expand(
    config: MergekitConfig,
    checkpoints: Mapping[ModelRef, Checkpoint],
    tokenizer_folders: Mapping[ModelRef, Path] | None = None,
) -> Expansion:
    """Resolve a recipe against the headers of its models; no weight is read.

    Args:
        checkpoints: an opened checkpoint for each of `config.models()`; for `model+adapter` one
            with the names and shapes of the model.
        tokenizer_folders: a folder for each of `config.tokenizer_models()`.

    Raises:
        MismatchError: all the ways in which the models do not fit the recipe, at once.
        RecipeError, CheckpointError: a key cannot be fulfilled; a tokenizer is not usable.
    """
    models = config.models()
    opened = tuple(checkpoints[model] for model in models)
    for model, checkpoint in zip(models, opened, strict=True):
        if checkpoint.kind != MODEL:
            raise MismatchError(
                f"is a {checkpoint.kind}, expected a full checkpoint",
                where=str(model),
                todo="name a model; an adapter is written base+adapter",
            )
    donor = 0 if config.base is None else models.index(config.base)
    vocabulary = None
    if config.tokenizer is not None:
        folders = {m: c.folder for m, c in zip(models, opened, strict=True)}
        vocabulary = build_tokenizer(
            config.tokenizer,
            models,
            donor,
            {**folders, **(tokenizer_folders or {})},
            [vocab_size(checkpoint.config) for checkpoint in opened],
        )
    names = tuple(Names.of(checkpoint) for checkpoint in opened)
    assembly = Assembly(config, models, opened, names, donor, vocabulary)
    for name, module in config.modules.items():
        assembly.add_module(module, _covered(name, config, names))
    _keep_uncovered(assembly)
    assembly.finish()
    out = OutConfig(opened[donor].config)
    _change_config(out, assembly, vocabulary)
    files, omitted = _tokenizer_files(config, opened, donor, vocabulary)
    spelled = {ref.name for row in assembly.rows.values() for ref in row.sources} | set(
        assembly.rows
    )
    unmatched = [
        f"filter {quoted(part)!r} is part of no tensor's name"
        for part in dict.fromkeys(filters(config))
        if not any(part in name for name in spelled)
    ]
    noticed = (vocabulary.warnings if vocabulary else []) + out.warnings + unmatched
    return Expansion(
        models,
        tuple(assembly.rows.values()),
        assembly.row_maps,
        donor,
        out.data,
        out.changes,
        files,
        omitted,
        (*config.warnings, *assembly.warnings, *dict.fromkeys(noticed)),
    )


def _covered(name: str, config: MergekitConfig, names: tuple[Names, ...]) -> set[str] | None:
    """The plain names that module `name` is about; None for all of them.

    Raises:
        RecipeError: when no tensor answers to the module's name.
    """
    if len(config.modules) == 1 and name == "default":
        return None
    every = {plain for each in names for plain in each.stored}
    if name in _TEXT:
        return {plain for plain in every if not is_multimodal(plain)}
    parts = _VISION if name in _VISION else {name}
    found = {plain for plain in every if plain.partition(".")[0] in parts}
    if "multi_modal_projector" in config.modules:
        merger = {plain for plain in every if plain.startswith("visual.merger")}
        found = found | merger if name == "multi_modal_projector" else found - merger
    if not found:
        tops = sorted({plain.partition(".")[0] for plain in every if is_multimodal(plain)})
        raise RecipeError(
            "no tensor of the models belongs to it",
            where=f"modules.{name}",
            todo=f"modules of these models: text_decoder{''.join(', ' + top for top in tops)}",
        )
    return found


def _keep_uncovered(assembly: Assembly) -> None:
    """Tensors of the donor that no module is about stay as they are."""
    config = assembly.config
    if "default" in config.modules:
        return
    covered: set[str] = set()
    for name in config.modules:
        covered |= _covered(name, config, assembly.names) or set()
    left = [n for n in assembly.names[assembly.donor].stored if n not in covered]
    for name in left:
        assembly.keep(name, assembly.donor)
    if left:
        tops = ", ".join(sorted({quoted(name.partition(".")[0]) for name in left}))
        assembly.warnings[f"no module names {tops}: kept as in the base"] = None


def _change_config(out: OutConfig, assembly: Assembly, vocabulary: TokenizerPlan | None) -> None:
    """Everything in the donor's config.json that the merge makes untrue."""
    donor = assembly.donor
    stored = _main_dtype((i.dtype, i.shape) for i in assembly.checkpoints[donor].tensors.values())
    written = _main_dtype((row.dtype, row.shape) for row in assembly.rows.values())
    if written is not None and (assembly.config.out_dtype or written is not stored):
        out.set_dtype(written)
    if vocabulary is not None:
        out.set_vocabulary(vocabulary.rows)
    if assembly.names[donor].spell(HEAD) in assembly.rows and assembly.unties_head:
        out.untie()
    picked = assembly.picked_layers()
    if picked is not None:
        stack = assembly.names[donor].text_stack
        out.set_layers(assembly.names[donor].stacks.get(stack or "", 0), picked)


def _main_dtype(tensors: Iterable[tuple[DType, tuple[int, ...]]]) -> DType | None:
    """The dtype of most of the elements that can be merged."""
    elems: Counter[DType] = Counter()
    for dtype, shape in tensors:
        if dtype.mergeable:
            elems[dtype] += math.prod(shape)
    return elems.most_common(1)[0][0] if elems else None


def _tokenizer_files(
    config: MergekitConfig,
    checkpoints: tuple[Checkpoint, ...],
    donor: int,
    vocabulary: TokenizerPlan | None,
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Tokenizer files to write, and the donor's that must not be copied."""
    folder = checkpoints[donor].folder
    present = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    files = {} if vocabulary is None else dict(vocabulary.files)
    if config.chat_template is not None:
        text = choose_template(config.chat_template, [c.folder for c in checkpoints])
        if text is not None:
            if not files and not present:
                raise CheckpointError(
                    "has no tokenizer that a chat template could be added to",
                    where=str(folder),
                    todo="remove chat_template, or add the tokenizer's files",
                )
            files = files or {name: path.read_bytes() for name, path in present.items()}
            settings = json.loads(files.get("tokenizer_config.json", b"{}"))
            settings["chat_template"] = text
            files["tokenizer_config.json"] = dump_json(settings)
            for name in ("chat_template.jinja", "chat_template.json"):
                files.pop(name, None)
    return changed_files(folder, files)

"""What of the model is trained: all of it, all but the embeddings, or a low-rank adapter.

An adapter (LoRA, arXiv 2106.09685) is kept as its factors A and B from training to merge: expanded,
it would be as large as the model and no more exact.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.adapter import adapter_tensors
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.durable import sync
from optimer_engine.errors import MissingExtraError, OptimerError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULTS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_KEEP_BASE = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Leave input and output token embeddings, one tensor where they are tied, untrained."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)
    # Recomputing activations needs a gradient to arrive at the first block's input.
    model.enable_input_require_grads()


def with_adapter(model: PreTrainedModel, settings: dict[str, Any], base: str) -> Any:
    """`model` with a fresh adapter, in which alone it is trained; a `peft.PeftModel`.

    Args:
        settings: of `peft.LoraConfig`, by their names.
        base: what the adapter's configuration calls its base.

    Raises:
        RecipeError: an unknown setting, or an adapter that could not be merged as a source.
        MissingExtraError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "peft is not installed", todo="pip install 'optimer-engine[train]'"
        ) from error
    known = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    for name in settings:
        if name not in known:
            raise RecipeError(
                f"is no field of LoraConfig in PEFT {peft.__version__}",
                where=f"lora: {name}",
                todo="see PEFT's documentation for the names",
            )
    start = settings.get("init_lora_weights", True)
    if start not in _KEEP_BASE:
        raise RecipeError(
            f"{start!r} changes the base's weights, or needs data",
            where="lora: init_lora_weights",
            todo="use true, gaussian or orthogonal",
        )
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **(_DEFAULTS | settings))  # type: ignore[arg-type]
        model.enable_input_require_grads()  # as in `freeze_embeddings`
        with warnings.catch_warnings():
            # PEFT asks the model for an attribute that Transformers has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"refused by PEFT: {error}", where="lora") from error
    config.base_model_name_or_path = base
    _check_mergeable(adapted)
    return adapted


def save_adapter(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, a folder that is there when whole.

    Args:
        model: a `peft.PeftModel`.
        weights: its tensors by name, where it does not hold them itself.
    """
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    _write(model, partial, weights)
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)


def _write(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True)
    # Whether embeddings were resized would be looked up on the Hub; they never are here.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = folder / "adapter_config.json"
    mode = config.stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes 0600 whatever the umask
    # Sets come in any order; equal runs shall have equal files.
    data = msgspec.json.decode(config.read_bytes())
    if isinstance(data.get("target_modules"), list):
        data["target_modules"].sort()
    config.write_bytes(msgspec.json.format(msgspec.json.encode(data)))


def _check_mergeable(adapted: Any) -> None:
    """Found before training: an adapter that the engine could not merge."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        _write(adapted, folder)
        try:
            with Checkpoint.open(folder) as checkpoint:
                adapter_tensors(checkpoint)
        except OptimerError as error:
            raise RecipeError(
                f"the adapter could not be merged: {error.what}",
                where="lora",
                todo="choose settings of plain LoRA",
            ) from error

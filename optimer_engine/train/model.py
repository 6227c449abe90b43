"""The base going in and the trained checkpoint coming out."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.checkpoint import MODEL, Checkpoint
from optimer_engine.errors import CheckpointError, RecipeError
from optimer_engine.hub import locate
from optimer_engine.train.resume import sync

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base(msgspec.Struct, frozen=True):
    """The checkpoint a run starts from.

    Attributes:
        folder: where it lies, downloaded if need be.
        fingerprint: of its tensors.
        dtype: torch name of the dtype of most of its floating-point elements.
    """

    folder: Path
    fingerprint: str
    dtype: str


def find_base(model: str, revision: str | None) -> Base:
    """Find and identify a base; only headers and samples are read.

    Raises:
        CheckpointError: there is none, or it is no full checkpoint.
    """
    folder = locate(model, revision)
    with Checkpoint.open(folder) as checkpoint:
        if checkpoint.kind != MODEL:
            raise CheckpointError(
                "is a distribution vector, expected a full checkpoint",
                where=str(folder),
                todo="name the base that the run starts from",
            )
        elems: Counter[str] = Counter()
        for info in checkpoint.tensors.values():
            if info.dtype.mergeable:
                elems[info.dtype.torch_name] += info.elems
        if not elems:
            raise CheckpointError("has no floating-point tensor", where=str(folder))
        return Base(folder, checkpoint.fingerprint, elems.most_common(1)[0][0])


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        CheckpointError: it cannot be loaded, or has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"its tokenizer cannot be loaded: {_first_line(error)}",
            where=str(base),
            todo="put the tokenizer's files into the base's folder",
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            "its tokenizer has no EOS token to put between documents",
            where=str(base),
            todo="set eos_token in tokenizer_config.json",
        )
    result: PreTrainedTokenizerBase = tokenizer
    return result


def load(base: Path, block_size: int, dtype: str = "float32") -> PreTrainedModel:
    """The base as a causal language model.

    Args:
        dtype: what its weights are held in; float32 where they are trained.

    Raises:
        CheckpointError: it cannot be loaded, tensors missing or unknown.
        RecipeError: `block_size` exceeds the base's positions.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, loading = loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot be loaded as a causal language model: {_first_line(error)}", where=str(base)
        ) from error
    for kind, fault in (
        ("missing_keys", "lacks {} tensors of its architecture, which would start at random"),
        ("unexpected_keys", "has {} tensors that its architecture does not know and would drop"),
    ):
        if names := sorted(loading[kind]):
            raise CheckpointError(
                f"{fault.format(len(names))}; the first is {names[0]!r}",
                where=str(base),
                todo="restore the checkpoint, or correct config.json",
            )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise RecipeError(
            f"{block_size} tokens, but the base has {positions} positions",
            where="block_size",
            todo=f"set it to at most {positions}",
        )
    result: PreTrainedModel = model
    return result


def check_separable(model: PreTrainedModel, separator: int) -> None:
    """Check that attention restarts where positions restart, by trying it.

    Raises:
        RecipeError: what stands before a document changes what the model makes of it.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # no process holds weights to try
        return
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    tokens = torch.arange(12) * 7919 % vocabulary
    places = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6])
    other = tokens.clone()
    other[:4] = (other[:4] + 1) % vocabulary
    tokens[4] = other[4] = separator
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            model(input_ids=t[None], position_ids=places[None], use_cache=False).logits[0, 5:]
            for t in (tokens.to(model.device), other.to(model.device))
        ]
    model.train(training)
    if not torch.equal(*logits):
        raise RecipeError(
            f"{type(model).__name__} attends across documents although positions restart",
            where="separate_documents",
            todo="leave it out",
        )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    folder: Path,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder that appears only when it is whole.

    Args:
        weights: the model's tensors by name, where it does not hold them itself.
    """
    import torch

    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    to = getattr(torch, dtype)
    if weights is None:
        model.to(to).save_pretrained(partial)
    else:
        # Gathered one by one, tied weights come under both names, each with a copy of its own.
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        own = {n: t for n, t in weights.items() if tied.get(n) not in weights}
        cast = {n: t.to(to) if t.is_floating_point() else t for n, t in own.items()}
        model.config.dtype = to
        model.save_pretrained(partial, state_dict=cast)
    tokenizer.save_pretrained(partial)
    mode = (partial / "config.json").stat().st_mode
    for path in partial.iterdir():
        path.chmod(mode)  # safetensors writes 0600 whatever the umask
        sync(path)
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

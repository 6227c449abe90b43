"""What a tensor's name tells: its layer, its part of the model, and its name in other layouts.

No table of architectures: the names in the checkpoints decide. A language model is saved under
`model.` by itself and under `language_model.model.` or `model.language_model.` inside a multimodal
one; without that prefix (its *plain* name) a tensor is the same in all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from optimer_engine.checkpoint import Checkpoint

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
              "tok_embeddings.weight", "shared.weight")  # fmt: skip
HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight")

_PREFIX = re.compile(
    r"(?:language_model\.model\.|model\.language_model\.|model\.|language_model\.|transformer\.)"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks)\.(\d+)\.")
_OTHER_PART = re.compile(
    r"(?:vision|visual|audio|image|speech|multi_modal|multimodal|mm_|connector|aligner)"
)
_FIRST = re.compile(r"emb|wte|wpe")


def plain(name: str) -> str:
    """`name` without the prefix of its language model."""
    return name[match.end() :] if (match := _PREFIX.match(name)) else name


def layer(name: str) -> tuple[str, int, str] | None:
    """(stack, index, rest) of "model.layers.3.mlp.weight": ("model.layers.", 3, ".mlp.weight")."""
    match = _LAYER.search(name)
    if match is None:
        return None
    return name[: match.start(1)], int(match[1]), name[match.end(1) :]


def is_multimodal(plain_name: str) -> bool:
    """Whether a tensor belongs to the vision, audio or connecting part of a multimodal model."""
    return _OTHER_PART.match(plain_name) is not None


def is_vocabulary(plain_name: str) -> bool:
    """Whether the first dimension counts the tokens of the language model."""
    found = plain_name.endswith(EMBEDDINGS) or plain_name in HEADS
    return found and not is_multimodal(plain_name)


def is_buffer(name: str) -> bool:
    """Whether a tensor is computed from the configuration, and stored by old versions only."""
    return name.endswith(("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias"))


def comes_first(plain_name: str) -> bool:
    """Whether a tensor outside the layers stands before the first one (else after the last)."""
    return is_multimodal(plain_name) or _FIRST.search(plain_name) is not None


@dataclass(frozen=True)
class Names:
    """The tensor names of one checkpoint.

    Attributes:
        stored: plain name to the name in the file, in file order.
        stacks: for each stack of layers, by plain name, the number of layers.
        tied: the plain name of the embeddings when config.json ties the head to them.
        says_tied: whether config.json says so, and not only Transformers' default.
    """

    stored: dict[str, str]
    stacks: dict[str, int]
    tied: str | None
    says_tied: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Names:
        """Read from the checkpoint's headers."""
        stored = {plain(name): name for name in checkpoint.tensors}
        if len(stored) < len(checkpoint.tensors):  # the prefix tells two tensors apart: keep it
            stored = {name: name for name in checkpoint.tensors}
        stacks: dict[str, int] = {}
        for name in stored:
            if (found := layer(name)) is not None:
                stacks[found[0]] = max(stacks.get(found[0], 0), found[1] + 1)
        embeddings = [
            name for name in stored if name.endswith(EMBEDDINGS) and not is_multimodal(name)
        ]
        ties = checkpoint.ties_embeddings and len(embeddings) == 1
        inner = checkpoint.config.get("text_config")
        levels = [checkpoint.config, inner if isinstance(inner, dict) else {}]
        said = any(level.get("tie_word_embeddings") is True for level in levels)
        return cls(stored, stacks, embeddings[0] if ties else None, said)

    def find(self, name: str) -> str | None:
        """The stored name of the tensor of a plain name; the embeddings for a tied head."""
        if name not in self.stored and name == HEAD and self.tied is not None:
            return self.stored[self.tied]
        return self.stored.get(name)

    @property
    def text_stack(self) -> str | None:
        """The stack of the language model's layers; None when there is none, or several."""
        found = [stack for stack in self.stacks if not is_multimodal(stack)]
        return found[0] if len(found) == 1 else None

    @property
    def multimodal(self) -> bool:
        """Whether the checkpoint has a part beside the language model."""
        return any(map(is_multimodal, self.stored))

    def spell(self, name: str) -> str:
        """A plain name as this checkpoint's layout writes it, also where it lacks the tensor."""
        if name in self.stored:
            return self.stored[name]
        text = [n for n in self.stored if not is_multimodal(n) and n not in HEADS]
        first = text[0] if text else ""
        prefix = self.stored[first][: len(self.stored[first]) - len(first)] if text else ""
        if name in HEADS:
            return f"language_model.{name}" if prefix == "language_model.model." else name
        return name if is_multimodal(name) else prefix + name

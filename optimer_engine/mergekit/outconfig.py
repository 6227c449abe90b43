"""What of the donor's config.json no longer holds for the merged model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from optimer_engine.types import DType

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

_COUNTS_LAYERS = (
    "max_window_layers", "sliding_window_pattern", "full_attention_interval",
    "first_k_dense_replace", "mlp_only_layers", "attn_layer_period", "attn_layer_offset",
    "expert_layer_period", "expert_layer_offset", "num_kv_shared_layers",
)  # fmt: skip
"""Keys that count or number layers in ways that only the architecture's code knows."""


class OutConfig:
    """A donor's config.json and the changes made to it.

    Attributes:
        data: config.json as it will be written.
        changes: by dotted key, the new values.
        warnings: what may have to be changed by hand.
    """

    def __init__(self, donor: dict[str, Any]) -> None:
        self.data = copy.deepcopy(donor)
        self.changes: dict[str, Any] = {}
        self.warnings: list[str] = []

    def _level(self, *keys: str) -> tuple[dict[str, Any], str]:
        """Where the language model's keys stand: at the top, or under text_config."""
        inner = self.data.get("text_config")
        if isinstance(inner, dict) and not any(key in self.data for key in keys):
            return inner, "text_config."
        return self.data, ""

    def _set(self, level: dict[str, Any], path: str, key: str, value: Any) -> None:
        if key not in level or level[key] != value:
            level[key] = value
            self.changes[path + key] = value

    def set_dtype(self, dtype: DType) -> None:
        """The dtype of the weights, under whichever of its two keys the donor has."""
        parts = [(v, f"{k}.") for k, v in self.data.items() if k.endswith("_config")]
        levels = [(self.data, ""), *((v, path) for v, path in parts if isinstance(v, dict))]
        said = [
            (level, path, key)
            for level, path in levels
            for key in ("dtype", "torch_dtype")
            if isinstance(level.get(key), str)
        ]
        for level, path, key in said or [(self.data, "", "torch_dtype")]:
            self._set(level, path, key, dtype.torch_name)

    def set_vocabulary(self, rows: int) -> None:
        """The number of rows of the embeddings."""
        level, path = self._level("vocab_size")
        self._set(level, path, "vocab_size", rows)

    def untie(self) -> None:
        """The output head is a tensor of its own."""
        inner = self.data.get("text_config")
        if isinstance(inner, dict) and "tie_word_embeddings" in inner:
            self._set(inner, "text_config.", "tie_word_embeddings", False)
        self._set(self.data, "", "tie_word_embeddings", False)

    def set_layers(self, count: int, picked: Sequence[tuple[dict[str, Any], int]]) -> None:
        """Another stack of layers.

        Args:
            count: layers of the donor.
            picked: for each output layer, the config.json and the index of the layer that leads.
        """
        level, path = self._level(*LAYER_COUNTS)
        known = [key for key in LAYER_COUNTS if key in level]
        self._set(level, path, known[0] if known else LAYER_COUNTS[0], len(picked))
        if len(picked) == count and all(index == at for at, (_, index) in enumerate(picked)):
            return
        for key, value in list(level.items()):
            if isinstance(value, list) and len(value) == count:
                lists = [OutConfig._list(config, key, value) for config, _ in picked]
                entries = [
                    entry[index] if index < len(entry) else None
                    for entry, (_, index) in zip(lists, picked, strict=True)
                ]
                self._set(level, path, key, entries)
            elif key in _COUNTS_LAYERS and value not in (None, 0, []):
                self.warnings.append(
                    f"config.json: {path}{key} is {value!r} as in the donor; see whether it still"
                    " fits the new layers"
                )

    @staticmethod
    def _list(config: dict[str, Any], key: str, default: list[Any]) -> list[Any]:
        inner = config.get("text_config")
        for level in (config, inner if isinstance(inner, dict) else {}):
            if isinstance(level.get(key), list):
                return level[key]
        return default

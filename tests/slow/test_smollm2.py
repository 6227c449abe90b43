"""The whole loop on a real pretrained model: needs a network for one package, and some minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gguf")

pytestmark = pytest.mark.slow


def test_a_trained_and_merged_smollm2_still_knows_the_capital_of_france(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from benchmarks import smollm2

    result = smollm2.loop(tmp_path_factory.getbasetemp() / "smollm2", steps=8)

    assert "Paris" in result["answers"]["merged"]
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {
        path.name for path in Path(result["merged"]).iterdir()
    }
    scores = result["bits_per_byte"]
    for domain in ("code", "reference"):
        assert scores[f"base + {domain}"][domain] < scores["base"][domain]
        assert scores["merged"][domain] < scores["base"][domain]

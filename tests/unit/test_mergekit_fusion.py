"""Arcee Fusion on the few values that a row of a bf16 model has: equal to the threshold is kept."""

from __future__ import annotations

import torch

from optimer_engine.methods import merge_arrays


def test_what_equals_the_threshold_stands_out():
    at_threshold = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        base = (torch.randn(64, generator=generator) * 0.1).bfloat16()
        source = (base.float() + torch.randn(64, generator=generator) * 0.003).bfloat16()
        start, moved = base.double(), source.double()
        p, q = (torch.softmax(t, -1) + 1e-8 for t in (moved, start))
        importance = (moved - start).abs() * (p * torch.log(p / q)).sum()
        low, median, high = importance.sort().values[[15, 31, 47]]
        threshold = median + 1.5 * (high - low)
        kept = importance >= threshold * (1 - 1e-12)
        at_threshold += int(((importance / threshold - 1).abs() < 1e-12).sum())
        found = merge_arrays("arcee_fusion", base, [source], {}, [{}])
        assert torch.equal(found, torch.where(kept, source, base)), seed
    assert at_threshold > 20

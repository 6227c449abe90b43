"""Choose the demo's learning rate on dev text: what each rate does to vectors, merges and mixture.

The rate decides the regime. Too low, and every row is the base; too high, and the loss is no longer
nearly linear along the vectors, so that no merge works. The rate that is best for the data mixture
is reported beside the one that is best for merging, since choosing for one alone would decide the
demo's outcome. Test text is not read.

Run::

    python benchmarks/demo_assets/choose_settings.py --work /tmp/settings 3e-4 6e-4 1.2e-3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from optimer_engine import LiveModelSink, plan
from optimer_engine.demo.assets import BASE, DOMAINS, unpack
from optimer_engine.demo.geometry import geometry
from optimer_engine.demo.loop import SCALES, Loop
from optimer_engine.search.live import load_model

TOKENS = 131_072
DEV_BLOCKS = 32
LEVELS = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0)


def explore(work: Path, learning_rate: float) -> None:
    """Print one rate's row: norms, dev means of base, singles, equal weights, and mixtures."""
    scale = msgspec.structs.replace(
        SCALES["full"], learning_rate=learning_rate, tokens=TOKENS, dev_blocks=DEV_BLOCKS
    )
    loop = Loop(work / f"{learning_rate:g}", scale)
    unpack(loop.text, scale.text_bytes)
    for domain in DOMAINS:
        loop.train(f"cpt/{domain}", {domain: 1.0}, scale.tokens)
    even = dict.fromkeys(DOMAINS, 1.0)
    loop.train("mixture-uniform", even, len(DOMAINS) * scale.tokens)
    vectors = {d: loop.out / "cpt" / d / "vector" for d in DOMAINS}

    objective = loop.objective("dev", DOMAINS, scale.dev_blocks)
    model = load_model(str(BASE))
    made = plan(
        {
            "base": str(BASE),
            "sources": [{"name": d, "model": str(v), "weight": 0.0} for d, v in vectors.items()],
            "out_dtype": "float32",
        }
    )

    def show(label: str, scores: dict) -> None:
        values = [scores[d].value for d in DOMAINS]
        cells = " ".join(f"{v:.4f}" for v in values)
        print(f"{learning_rate:g} {label:12s} {cells}  mean {sum(values) / len(values):.4f}")

    def merged(label: str, weights: dict[str, float]) -> None:
        made.with_weights(weights).run(LiveModelSink(model))
        show(label, objective(model))

    norms = geometry(BASE, vectors).relative_norms
    print(f"{learning_rate:g} norms " + " ".join(f"{norm:.1%}" for norm in norms))
    merged("base", dict.fromkeys(DOMAINS, 0.0))
    for domain in DOMAINS:
        merged(f"only {domain}", dict.fromkeys(DOMAINS, 0.0) | {domain: 1.0})
    for level in LEVELS:
        merged(f"equal {level:g}", dict.fromkeys(DOMAINS, level))
    show("mixture 4T", objective(load_model(str(loop.out / "mixture-uniform" / "model"))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("learning_rates", type=float, nargs="+")
    arguments = parser.parse_args()
    for rate in arguments.learning_rates:
        explore(arguments.work, rate)

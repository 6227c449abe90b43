"""The whole OptiMer loop on real text, small enough for two CPU cores: `optimer demo`.

    report = run_demo("demo-run")          # demo-run/demo.json, demo-run/demo.md

A 2.6M-parameter Llama that was pretrained once is continually pre-trained on four domains, one at
a time; the changes are extracted as distribution vectors; a search finds the weights of their
merge; and tables on held-out text compare it with everything it should be compared with, above all
with training on the mixed data. Every step goes through the public API that a user has.

What it can show: what each step does, costs and writes, and which of the rows wins *here*. What
it cannot show: the claim of the paper, which is about a 27B model and a billion tokens a vector.
"""

from __future__ import annotations

from optimer_engine.demo.loop import SCALES, Scale, run_demo
from optimer_engine.demo.report import DemoReport, Winner
from optimer_engine.demo.table import Row, Table

__all__ = ["SCALES", "DemoReport", "Row", "Scale", "Table", "Winner", "run_demo"]

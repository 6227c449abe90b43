"""How the vectors of a pool lie to each other: measured once, kept in the run.

Vectors that point the same way share their weight between them, so the search cannot tell theirs
apart; nearly orthogonal ones can be weighed one by one. One streaming pass over all vectors tells,
in the memory of a few tiles (`inspection.measure`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.durable import replace_file
from optimer_engine.errors import OptimerError
from optimer_engine.recipe import read_config
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.trials import read

FILE = "cosines.json"


class Cosines(msgspec.Struct, frozen=True):
    """Cosines [n][n] between the vectors ``names``, None for a vector of nothing but zeros.

    ``vectors`` has their fingerprints and ``base`` the base's, so that nothing stale is shown.
    """

    names: list[str]
    values: list[list[float | None]]
    base: str
    vectors: dict[str, str]


def kept(run: Path, identity: dict[str, Any]) -> Cosines | None:
    """What was measured of the pool that the search with ``identity`` in ``run`` is about."""
    path = run / FILE
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Cosines)
    except (OSError, msgspec.DecodeError):
        return None
    same = (found.base, found.vectors) == (identity.get("base"), identity.get("vectors"))
    return found if same else None


def measured(run: Path) -> str:
    """Measure the vectors of the search in ``run``, unless that is done; why it cannot be.

    Shows progress on stderr when it takes more than two seconds.
    """
    from tqdm import tqdm

    from optimer_engine.checkpoint import Checkpoint
    from optimer_engine.inspection.measure import Pool, measure
    from optimer_engine.plans import available_cores

    head, _ = read(run / "trials.jsonl")
    if kept(run, head.identity) is not None:
        return ""
    try:
        config = read_config(run / "search.yaml", SearchConfig)
        base = Checkpoint.open(config.base)
        folders = [Checkpoint.open(vector.model) for vector in config.vectors]
        names = [vector.name for vector in config.vectors]
        prints = {n: f.fingerprint for n, f in zip(names, folders, strict=True)}
        found = base.fingerprint, prints
        if found != (head.identity.get("base"), head.identity.get("vectors")):
            return "the folders hold other vectors than those that were searched"
        pool = Pool(folders, base)
        with tqdm(desc="cosines", total=pool.elems, unit_scale=True, delay=2.0, leave=False) as bar:
            pairs = measure(
                pool, threads=available_cores(), progress=lambda done: bar.update(done) and None
            )
    except OptimerError as error:
        return str(error).partition("\n")[0]
    rows = [[float(f"{c:.6f}") if c == c else None for c in row] for row in pairs.cosines()]
    result = Cosines(names, rows, *found)
    replace_file(run / FILE, msgspec.json.format(msgspec.json.encode(result), indent=1))
    return ""

"""What the demo ships: a pretrained base, and five domains of text in four splits each.

Where everything comes from, and under which licence, is in `assets/SOURCES.md`;
`benchmarks/demo_assets/` rebuilds it. Splits are disjoint by document: `base` pretrained the base,
`cpt` trains the vectors, `dev` guides the searches, and `test` is read for the final tables only.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
DOMAINS = ("ja", "zh", "code", "math")
"""The domains that get a vector; English is there to see what the base forgets."""
RETAINED = "en"
SPLITS = ("cpt", "dev", "test")


def read_split(domain: str, split: str) -> list[str]:
    """The documents of one domain and split."""
    with lzma.open(ASSETS / "text" / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return [row["text"] for row in rows if row["split"] == split]


def unpack(folder: Path, limit_bytes: int) -> None:
    """Write `DOMAIN.SPLIT.jsonl` for every domain into `folder`; files already there are kept.

    A split is cut after the document with which it passes `limit_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for domain in (*DOMAINS, RETAINED):
        for split in SPLITS if domain != RETAINED else SPLITS[1:]:
            path = folder / f"{domain}.{split}.jsonl"
            if path.exists():
                continue
            fresh = path.with_suffix(".new")
            with fresh.open("w", encoding="utf-8") as file:
                for document in read_split(domain, split):
                    file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                    if file.tell() > limit_bytes:
                        break
            fresh.replace(path)

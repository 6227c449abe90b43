"""The model card of a pool on the Hub: base, data and licence, for people and for search."""

from __future__ import annotations

import re
from typing import Any

from optimer_engine.pool.manifest import Entry, Manifest
from optimer_engine.types import format_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(manifest: Manifest, repo: str) -> str:
    """README.md of a repository that holds a pool.

    Args:
        manifest: every entry of it has a dataset and a license.
        repo: the repository's id, for the example.
    """
    import yaml

    licenses = sorted({str(entry.license) for entry in manifest.vectors})
    front: dict[str, Any] = {
        "library_name": "optimer-engine",
        "tags": ["distribution-vector", "task-vector", "model-merging", "optimer"],
        "license": licenses[0] if len(licenses) == 1 else "other",
    }
    if len(licenses) > 1:
        front["license_name"] = "mixed"
    if _HUB_ID.fullmatch(manifest.base):
        front |= {"base_model": manifest.base, "base_model_relation": "adapter"}
    if ids := sorted({name for entry in manifest.vectors for name in entry.dataset_ids}):
        front["datasets"] = ids
    revision = f" at revision `{manifest.base_revision}`" if manifest.base_revision else ""
    rows = "\n".join(map(_row, manifest.vectors))
    first = manifest.vectors[0].name if manifest.vectors else "NAME"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {repo.rpartition("/")[2]}

Distribution vectors: what continual pre-training on each dataset changed in one base model. They
are no models by themselves; added to the base with a weight each, they make one.

**Base:** {_code(manifest.base)}{revision}, fingerprint `{manifest.base_fingerprint}`.
Its own licence applies to whatever is merged from it.

| vector | data | licence of the data | tokens | training | stored as | size |
|---|---|---|---|---|---|---|
{rows}

```
pip install optimer-engine
optimer pool pull {repo} pool
optimer merge --base {manifest.base} --add pool/{first}=0.5 -o merged
```

`pool.json` lists every file with its sha256; `optimer pool verify pool` checks them.
"""


def _row(entry: Entry) -> str:
    ids = ", ".join(
        f"[{name}](https://huggingface.co/datasets/{name})" for name in entry.dataset_ids
    )
    tokens = "unknown" if entry.tokens is None else f"{entry.tokens:,}"
    storage = "LoRA factors" if entry.kind != "vector" else entry.storage
    cells = [
        _code(entry.name), ids or _plain(entry.dataset), _plain(entry.license), tokens,
        _plain(entry.training), storage, format_bytes(entry.bytes),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _plain(text: str | None) -> str:
    """A user's words inside a table: no markup, no new cell or line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join((text or "unknown").split()))


def _code(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"

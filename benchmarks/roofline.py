"""What binds a merge on a GPU, by arithmetic alone: `python -m benchmarks.roofline`.

A merge of N sources reads N + 1 operands and writes one, so its time on each link is the bytes that
cross it over what the link carries: for GPU memory and bus what copies reached on an H100 (`optimer
bench kernels`: 3,005 and 54 GB/s), for the disk a data sheet. Reading and writing overlap on the
bus, which is two-way, and share memory and disk.
"""

from __future__ import annotations

import click

GB_PER_S = {"HBM": 3000.0, "PCIe": 55.0, "NVMe": 7.0}
"""Data sheets say 3350 for the memory of an H100 SXM, 64 each way for PCIe 5 x16; 7 is of a PCIe
4 x4 disk."""

PARAMETERS = 27e9
BF16, FP32 = 2, 4


def seconds(parameters: float, source_bytes: int, sources: int) -> dict[str, float]:
    """Time on each link to merge bf16 sources, or fp32 vectors, into a bf16 base, once each."""
    read = parameters * (BF16 + sources * source_bytes)
    written = parameters * BF16
    return {
        "HBM": (read + written) / GB_PER_S["HBM"] / 1e9,
        "PCIe": max(read, written) / GB_PER_S["PCIe"] / 1e9,
        "NVMe": (read + written) / GB_PER_S["NVMe"] / 1e9,
    }


def table(parameters: float = PARAMETERS) -> str:
    """The roofline as Markdown, for a bf16 base of so many parameters."""
    lines = [
        f"| {parameters / 1e9:.0f}B, bf16 base and output | read + written"
        " | all in GPU memory (HBM) | over the bus (PCIe) | from and to disk (NVMe) |",
        "|---|---|---|---|---|",
    ]
    for sources, size, name in (
        (1, BF16, "1 bf16 model"),
        (4, BF16, "4 bf16 models"),
        (4, FP32, "4 fp32 vectors"),
        (8, BF16, "8 bf16 models"),
        (32, BF16, "32 bf16 models"),
    ):
        moved = parameters * (2 * BF16 + sources * size) / 1e9
        cells = " | ".join(f"{s:.3g} s" for s in seconds(parameters, size, sources).values())
        lines.append(f"| {name} | {moved:,.0f} GB | {cells} |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--parameters", default=PARAMETERS, help="Of the base.")
def main(parameters: float) -> None:
    """Print how long each link of an H100 machine is busy during a merge."""
    click.echo(table(parameters))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.roofline")

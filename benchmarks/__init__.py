"""Benchmarks: what a merge costs here, beside what it costs elsewhere and what the machine allows.

    python -m benchmarks run merge        # makes its own files, installs its own rival

One registry (`cases.CASES`), one runner (`runner`), one record (`record`). A case lists
contestants: ours, rivals, and ceilings, which do the part of the work that nobody can avoid (read
the files, write the output, stream memory) and nothing else. The
alternative, a table of numbers from separate runs, says more about the other tenants of a machine
than about the programs: contestants are therefore interleaved, and every ratio is taken within a
round before the median is.
"""

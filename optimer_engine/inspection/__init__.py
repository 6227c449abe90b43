"""What is in a folder, and how vectors of one pool lie to each other.

`summary` reads headers. `measure` streams every element once and keeps, for each tensor, the
products of all pairs of vectors: norms, cosines, the length of a path and every test that warns
(`findings`) are sums of those products, so they cost nothing more.
"""

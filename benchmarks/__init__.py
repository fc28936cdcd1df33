"""``pytest benchmarks/ --benchmark-only``: who wins, by how much, on this machine, after every result was checked."""

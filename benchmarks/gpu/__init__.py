"""What a session on a GPU runs, step by step: ``python -m benchmarks.on_gpu --list``."""

"""Heads at work on embedded data, minutes on one CPU core each: ``python -m sprout.examples.classification`` and
``python -m sprout.examples.question_answering``. Importing this package imports neither.
"""

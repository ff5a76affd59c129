"""Puzzles of the package reasoning-gym with long chains of thought, and a small model that learns them.

Run its modules from the folder above: `cd benchmarks && python -m puzzles.train --out DIR`.
"""

"""Many selection policies side by side in one batch, outside any engine: what their constants bring.

Run it from the folder above: `cd benchmarks && python -m policy_lab.sensitivity --help`.
"""

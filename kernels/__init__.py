"""Scoring, selection and movement of cached keys and values, on plain tensors.

``naive`` is the literal reference (float64-capable), ``tiled`` the vectorised torch path, ``cache_layout``
and ``batch`` describe a paged cache and the requests of a round, and ``compaction_round`` is one whole round
on a GPU. Nothing here imports vLLM; ``naive``, ``tiled``, ``cache_layout`` and ``batch`` do not need Triton,
and ``options`` needs nothing.
"""

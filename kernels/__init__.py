"""Scoring, selection and movement of cached keys and values, on plain tensors.

``naive`` is the literal reference (float64-capable), ``tiled`` the vectorised torch path, ``cache_layout``
describes a paged cache, and ``compaction_round`` is one whole round on a GPU. Nothing here imports vLLM, and
``naive``, ``tiled`` and ``cache_layout`` do not need Triton either.
"""

"""Scoring, selection and movement of cached keys and values, on plain tensors.

``naive`` is the literal reference (float64-capable), ``tiled`` the vectorised torch path, ``paged`` the
description of a paged cache, and ``pipeline`` one whole compaction round on a GPU. Nothing here imports
vLLM, and ``naive``, ``tiled`` and ``paged`` do not need Triton either.
"""

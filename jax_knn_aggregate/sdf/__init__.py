"""Signed distance fields trained through `knn_aggregate_aniso`: the `jax-knn-aggregate fit` command.

The modules need the optional dependencies of ``pip install "jax_knn_aggregate[sdf]"``; the library itself does not.
"""

"""The ops, a room each; rooms of the same names are in csrc/, tests/ and benchmarks/.

A room imports core/ and, where it says so, another room's public functions. core/ imports no room.
"""

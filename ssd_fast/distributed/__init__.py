"""The processes that train together.

In: what a launcher says (horovodrun, Slurm). Out: a World: rank, size, device, and what ranks tell each other.
May be imported by every room above; imports only the leaves.
"""

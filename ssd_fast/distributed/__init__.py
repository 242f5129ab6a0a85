"""The processes that train together, one rank each.

In: what a launcher says (horovodrun, Slurm). Out: a World: rank, size, device, and the collectives between ranks.
May be imported by every room above; imports only the leaves.
"""

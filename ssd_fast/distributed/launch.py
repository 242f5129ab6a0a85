"""The way into the world: what a launcher has made this process part of."""

from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.slurm import read_launch
from ssd_fast.distributed.world import World


def connect(config: DistributedConfig) -> World:
    """Return the world that a launcher has made this process part of, or a world of one; use it as a context.

    Within it, a lost or hanging rank ends this process after at most config.timeout_s, with exit status 1 and a line
    on stderr that names that rank.
    Raises ValueError when the launcher's variables, the GPUs and Horovod's build do not go together.
    """
    launch = read_launch()
    if launch is None:
        return World()
    from ssd_fast.distributed.horovod import HorovodWorld  # whose library a single process does without

    return HorovodWorld(launch, config.timeout_s)

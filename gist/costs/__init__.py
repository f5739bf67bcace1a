"""What a run takes in memory, disk, exchange and computation, before anything is allocated."""

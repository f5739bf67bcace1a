"""The grouped form of layers: m subnets side by side, as one."""

"""Where subnets run."""

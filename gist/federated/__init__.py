"""Federated training on subnets: clients of unequal speed, on a clock of their own."""

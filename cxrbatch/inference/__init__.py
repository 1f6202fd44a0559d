"""Bundles, the cascade, the decision rule, and the engines that run the networks."""

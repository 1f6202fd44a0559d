"""Train, evaluate, calibrate and explain the networks of a cascade (extra `train`)."""

"""The grids of `mobilenet_v2_int8` (docs/adr/0007-integer-networks.md)."""

#: Weights are -63 ... 63 steps. Processors without VNNI add two products of a weight and an activation in 16 bits:
#: with seven bits a weight no such sum is cut off.
WEIGHT_LEVELS = 63
RELU6_LEVELS = 255  # steps from 0 to 6
BLOCK_STEP = 3 / 16  # what a block puts out: -128 to 127 steps

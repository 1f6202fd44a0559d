"""The grids of `mobilenet_v2_int8` (docs/adr/0007-integer-networks.md).

Processors without VNNI add two products of a weight and an activation in 16 bits. No such sum is cut off where one of
the two has seven bits: the weights, or (before projections, which lose most by rounding) the activations. Depthwise
convolutions do not add in pairs.
"""

WEIGHT_LEVELS = 63  # of the first convolution, the expansions and the last one: -63 to 63 steps
FINE_LEVELS = 127  # of depthwise convolutions and projections: -127 to 127 steps
RELU6_LEVELS = 255  # steps from 0 to 6
COARSE_LEVELS = 127  # steps from 0 to 6 before a projection
BLOCK_STEP = 3 / 16  # what a block puts out: -128 to 127 steps

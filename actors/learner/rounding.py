"""From float32 to bfloat16 so that small updates are not lost.

bfloat16 has 8 bits: rounded to the nearest, a weight that was bfloat16 before stays what it was if its update is below half a step. Of a
short training's low-rank updates that were most of the weights (70 % in a reward model of 135 million), and the merged model gave other
rewards than the trained one (0.81 in place of 1.37). Rounded up with the probability of what is cut off, every weight is right in the mean
(stochastic rounding; Gupta et al. 2015, arXiv 1502.02551): the updates of many weights add up, the errors do not.
"""

import torch

CUT_BITS = 16
"""that float32 has more than bfloat16, the last of its fraction"""


def stochastic(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A bfloat16 neighbour of every number, the nearer one more often: its expectation is the number.

    Args:
        weights: float32 of any shape, on the CPU. What bfloat16 can hold, and what is not finite, stays what it is.
        generator: of the draws.
    """
    bits = weights.contiguous().view(torch.int32)
    draws = torch.randint(0, 1 << CUT_BITS, bits.shape, generator=generator, dtype=torch.int32)
    # Sign and size are apart in a float: added to the size, a draw carries over into it as often as it should.
    rounded = ((bits + draws) & -(1 << CUT_BITS)).view(torch.float32)
    return torch.where(weights.isfinite(), rounded, weights).to(torch.bfloat16)

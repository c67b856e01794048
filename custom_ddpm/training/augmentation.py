"""Augmentation of small sets: pictures are mirrored, shifted and scaled at random in the first part of a run.

What is learned of such pictures would show in the samples ("leak"), unless the network is told how each was changed
(Karras et al. 2022, appendix F.2). Here the rest of the run, in which the learning rate falls, sees the pictures as
they are.
"""

import torch
import torch.nn.functional as F

MIRRORED = 0.5  # share of the pictures
CHANGED = 0.3  # share of the pictures for each shift and for the scale, independently
SHIFT = 0.125  # largest one, of height and width
SCALE = 0.2  # largest one, as the logarithm to base 2


def augmented(x_0: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Mirror, shift and scale pictures at random; what comes in at the edges is reflected.

    Args:
        x_0: pictures, float32 (B, C, H, W).
        uniforms: independent numbers, float32 (B, 7) in [0, 1), on the CPU: whether a picture is mirrored; how far it
            is shifted to the side, up or down, and scaled; whether it is, each.

    Returns:
        Pictures of the same shape; their values do not leave the range of x_0.
    """
    changed = uniforms[:, 4:] < CHANGED
    amounts = torch.where(changed, 2 * uniforms[:, 1:4] - 1, 0)
    scale = 2 ** (SCALE * amounts[:, 2])
    matrices = torch.zeros(len(x_0), 2, 3)
    matrices[:, 0, 0] = torch.where(uniforms[:, 0] < MIRRORED, -scale, scale)
    matrices[:, 1, 1] = scale
    matrices[:, :, 2] = 2 * SHIFT * amounts[:, :2]  # in coordinates from -1 to 1
    places = F.affine_grid(matrices.to(x_0.device, non_blocking=True), list(x_0.shape), align_corners=False)
    return F.grid_sample(x_0, places, mode="bilinear", padding_mode="reflection", align_corners=False)

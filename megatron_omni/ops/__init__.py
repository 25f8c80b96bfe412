"""The operations of the MoE layer, one file each: formula, reference, and the seam for its kernels."""

"""The second stage: the pixel decoder is trained further on the latents of a frozen encoder."""

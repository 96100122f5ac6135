"""From hidden states to answers: boxes, masks, text, and the `Detector` in front of them."""

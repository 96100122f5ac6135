"""From hidden states to answers: boxes, masks, text."""

"""The three stages of training, their losses, and the loop they run in."""

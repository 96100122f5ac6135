"""What every run needs: options, plan, checkpoints, log, processes."""

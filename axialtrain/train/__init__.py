"""Engine (DeepSpeed), loop, checkpoint, tracking."""

"""rlbridge as the wire of a job that verl runs: a verl CheckpointEngine, for `checkpoint_engine.backend=rlbridge`.

All trainer ranks send, each its stripes of every bucket, out of memory that is registered once. Every rollout worker reads a
bucket from all of them at once, while verl takes tensors out of the one before, and hands on what it has verified.
"""

"""rlbridge as the wire of a job that verl runs: a verl CheckpointEngine, for `checkpoint_engine.backend=rlbridge`.

All trainer ranks send, each the tensors that it owns, out of memory that is registered once. Every rollout worker reads from
all of them at once, in rounds that fit its two buckets, and hands tensors on to verl when they are verified.
"""

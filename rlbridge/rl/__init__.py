"""Prompts, rewards, advantages, checkpoints and the loop."""

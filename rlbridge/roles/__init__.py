"""The contracts that a plugin's author implements."""

"""The conformance suite: proof that a backend's weight sync is right, and what it stands on."""

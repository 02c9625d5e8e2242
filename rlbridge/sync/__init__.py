"""The versioned protocol that brings a trainer's weights into a generator."""

"""Pure functions over layouts: what lies where, the plan that carries it, and digests. No Ray and no I/O."""

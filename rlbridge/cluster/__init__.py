"""Ray: the cluster, the actors of each role, and how the driver calls them."""

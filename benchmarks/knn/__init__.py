"""What is measured of searches and aggregates."""

"""What is measured of the distortion losses."""

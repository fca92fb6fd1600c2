"""What djdist needs to know of DataJoint's tables."""

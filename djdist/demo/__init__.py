"""A pipeline over real images, to see djdist at work: ``python -m djdist.demo``."""

"""slidecube: see the README."""

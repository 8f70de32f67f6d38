"""What detects: cards, the zoo of detectors behind one protocol, and prediction on the grid's lattice."""

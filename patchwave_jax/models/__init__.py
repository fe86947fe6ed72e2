"""Networks behind one contract (`base`), and what they share."""

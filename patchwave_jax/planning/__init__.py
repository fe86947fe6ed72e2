"""What a step needs and takes on a machine that is not here."""

"""Linear predictors of the waveform, fitted to the context itself."""

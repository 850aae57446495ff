"""The parts of a transformer, with TransformerLens' names, parameters and hook points."""

"""The verbs that drive a simulation, and what a run is made of: one module each."""

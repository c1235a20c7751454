"""A federation of processes: coordinator, gateway and control of Flower."""

"""How the weights of a route meet the experts."""

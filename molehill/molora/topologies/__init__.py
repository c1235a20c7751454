"""How frozen modules and branches are wired."""

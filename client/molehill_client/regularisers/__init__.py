"""What acts on the gradients of local training beside the objective, named in ``train.rules``."""

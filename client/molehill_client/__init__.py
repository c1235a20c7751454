"""The data owner's side: local training, objectives and personal state."""

"""Client-level differential privacy with a trusted server (central DP), and the server's part in secure aggregation.

The clients clip what they send, the server adds noise to the sum, and an accountant stops the run at its budget. What
is protected is the shared model, and with it everything that is computed from it; events, reports and checkpoints stay
with the server.
"""

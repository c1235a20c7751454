"""Merging client updates: a space, a rule, a way back to factors and a server optimiser.

=========  =============================================================================================
space      what is combined: factors, factors with one of them common, or products ``B A``
rule       how much each client counts, per expert
lower      how a combined product comes back to factors of the old rank
server_opt what the combined change does to the old model
=========  =============================================================================================

Every published method here is a row of these four; `molehill_server.presets` names the rows.
"""

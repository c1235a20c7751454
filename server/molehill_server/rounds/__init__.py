"""The rooms of the round loop: a plain round, a masked round, and measuring at the end.

`way` is what the loop asks of a round, `notes` what a round writes down, `record` what a run keeps on disk, `crew` who
takes part, `post` how plans go out and deltas come in.
"""

"""Rows of files: JSON lines, JSON arrays, CSV, TSV, plain lines, and all of them compressed by gzip; Parquet.

The one reader of everything that takes rows: training, `molehill check`, a lab machine, and a device, which is why it
needs the standard library only, and pyarrow for Parquet (docs/adr/0006). Every row comes with its place, ``file:line``;
whatever is no row is a `DataError` with that place, and so is a string that is no Unicode.
"""

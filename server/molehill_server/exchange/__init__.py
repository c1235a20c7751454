"""The data plane of a deployment: the coordinator's folder of blobs, served to its nodes over gRPC with mutual TLS.

The service is a process of its own on the coordinator's host. The two share a folder and nothing else::

    blobs/<digest>          what nodes fetch, and deltas that came whole; the coordinator's `folder:` exchange
    grants/<node>.json      what a node may do; the coordinator writes it with every plan
    parts/<node>/           the delta a node is uploading
    receipts/<node>.json    the last delta a node delivered
    revoked.json            serial numbers (hexadecimal) of certificates that are no longer accepted

With ``--blobs URL``, whole blobs lie in an object store instead, which is the coordinator's ``fsspec:URL`` exchange.
"""

"""The toy federation under secure aggregation, and clients that do not answer."""

from __future__ import annotations

from toy_federation import config

SECURE = {"secure_aggregation": True}


def settings(**sections):
    return config(**{"privacy": SECURE, **sections})


def plain(**sections):
    return config(**{"privacy": {}, **sections})


def silent(*names, kind):
    """Clients whose answers to one kind of question never arrive."""

    def meddle(client, message, text):
        return None if message.kind == kind and client.name in names else text

    return meddle


def mute(*names):
    """Clients whose deltas never arrive."""
    return lambda client, plan, reply: None if client.name in names else reply.model_dump_json()

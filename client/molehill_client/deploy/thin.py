"""The ClientApp on a lab machine: hands every message to the trainer process and its answer back.

Flower starts a new process for every message. This one imports neither torch nor the model: the trainer, which lives
as long as the node, has both in memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from molehill.errors import DeployError, MolehillError
from molehill_client.deploy.line import Request, ask

_PATIENCE = 120.0  # seconds; the trainer imports torch when it starts

app = ClientApp()


@app.query("hello")
@app.query("keys")
@app.query("shares")
@app.query("agree")
@app.query("unmask")
@app.train()
@app.train("baseline")
@app.evaluate()
def forward(message: Message, context: Context) -> Message:
    """Ask the trainer whose socket the node's configuration names."""
    record = message.content.get("plan")
    text = str(record["json"]) if isinstance(record, ConfigRecord) else ""
    request = Request(message.metadata.message_type, text)
    try:
        answer = ask(str(context.node_config["trainer"]), request, _PATIENCE)
    except MolehillError as error:
        # The line's own errors name places on this machine.
        reason = "its trainer does not answer" if isinstance(error, DeployError) else str(error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return Message(RecordDict({"reply": ConfigRecord({"json": answer})}), reply_to=message)

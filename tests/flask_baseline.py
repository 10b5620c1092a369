"""What the bench of the control plane is read against: a service like the one that Mayfly replaces, in Flask, with a dict for
its sessions. It makes nothing, and forgets everything when it ends. Its port is the first argument."""

import sys
import threading
import uuid
from datetime import datetime, timezone

from flask import Flask, jsonify, request

app = Flask(__name__)
sessions = {}
lock = threading.Lock()


@app.post("/api/session/create")
def create():
    now = datetime.now(timezone.utc).isoformat()
    session = {
        "session_id": str(uuid.uuid4()),
        "username": request.get_json()["username"],
        "created_at": now,
        "last_activity": now,
        "status": "creating",
    }
    with lock:
        sessions[session["session_id"]] = session
    return jsonify(session), 201


@app.get("/api/sessions")
def listed():
    with lock:
        return jsonify({"count": len(sessions)})


app.run(port=int(sys.argv[1]), threaded=True)

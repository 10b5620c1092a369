"""What a playbook does, for a program: one JSON object a line. The orchestrator reads it (orchestrator/src/ansible/events.rs)."""

DOCUMENTATION = """
name: mayfly
type: stdout
short_description: Progress and failures as lines of JSON
description:
  - C({"mayfly":"task","name":…,"number":…}) when a task starts; they are counted over the whole run.
  - C({"mayfly":"failed","task":…,"reason":…}) when one fails, or its machine cannot be reached, unless the playbook ignores that.
    A failure that a C(rescue) takes up is told as well; the run's exit code says whether it failed.
  - What a task with C(no_log) says is not told.
  - C({"mayfly":"done","hosts":[…]}) at the end, with the machines that anything was done to. A playbook that matches none succeeds.
"""

import json

from ansible.plugins.callback import CallbackBase

# Characters of a reason: enough for the end of what a package manager says.
LONGEST = 2000


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "mayfly"

    def __init__(self):
        super().__init__()
        self._tasks = 0

    def _say(self, kind, **words):
        self._display.display(json.dumps({"mayfly": kind, **words}))

    def _start(self, task):
        self._tasks += 1
        self._say("task", name=task.get_name(), number=self._tasks)

    def _failed(self, result):
        # ansible-core 2.19 gave these names without underscores; the old ones still work there.
        self._say("failed", task=result._task.get_name(), reason=reason(result._result))

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._start(task)

    def v2_playbook_on_handler_task_start(self, task):
        self._start(task)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        if not ignore_errors:
            self._failed(result)

    def v2_runner_on_unreachable(self, result):
        self._failed(result)

    def v2_playbook_on_stats(self, stats):
        self._say("done", hosts=sorted(stats.processed))


def reason(said):
    """Why a task failed, from its result; Ansible has removed what `no_log` hides."""
    if "censored" in said:
        return "what it said is hidden (no_log)"
    # Of a loop, the first item that failed: the result itself only says that one did.
    for item in said.get("results") or []:
        if isinstance(item, dict) and (item.get("failed") or item.get("unreachable")):
            return reason(item)
    words = [str(said.get("msg") or "").strip()]
    # A program's own words, the last of them where they are long; never its arguments.
    for stream in ("stderr", "module_stderr", "stdout", "module_stdout"):
        text = str(said.get(stream) or "").strip()
        if text:
            if text not in words[0]:
                words.append(text[-LONGEST:])
            break
    return ": ".join(word for word in words if word)[:2 * LONGEST] or "it says nothing"

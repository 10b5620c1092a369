"""The callback plugin, through ansible-playbook itself.

    python3 -m unittest discover -s ansible/tests
"""

import json
import os
import subprocess
import tempfile
import unittest
from pathlib import Path

ANSIBLE = Path(__file__).resolve().parent.parent


def said(playbook, inventory="localhost,"):
    """The exit code and the lines of a run on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "playbook.yml"
        file.write_text(json.dumps(playbook))
        environment = {
            "ANSIBLE_CALLBACK_PLUGINS": str(ANSIBLE / "plugins/callback"),
            "ANSIBLE_STDOUT_CALLBACK": "mayfly",
            "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
            "ANSIBLE_LOCAL_TEMP": folder,
        }
        run = subprocess.run(
            ["ansible-playbook", "-i", inventory, file],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return run.returncode, [json.loads(line) for line in run.stdout.splitlines()]


def play(*tasks, hosts="all", connection="local"):
    return {"hosts": hosts, "gather_facts": False, "connection": connection, "tasks": list(tasks)}


def command(name, script, **more):
    return {"name": name, "ansible.builtin.command": {"argv": ["sh", "-c", script]}, **more}


class Callback(unittest.TestCase):
    def test_tasks_are_counted_over_all_plays(self):
        code, lines = said([play(command("First", "true")), play(command("Second", "true"))])
        self.assertEqual(code, 0)
        self.assertEqual(
            lines,
            [
                {"mayfly": "task", "name": "First", "number": 1},
                {"mayfly": "task", "name": "Second", "number": 2},
                {"mayfly": "done", "hosts": ["localhost"]},
            ],
        )

    def test_a_failure_has_its_task_and_the_program_s_words_but_not_its_arguments(self):
        code, lines = said([play(command("Install", "echo no mirror >&2; exit 3 # --password=hunter2"))])
        self.assertEqual(code, 2)
        self.assertEqual(lines[1], {"mayfly": "failed", "task": "Install", "reason": "non-zero return code: no mirror"})
        self.assertNotIn("hunter2", json.dumps(lines))

    def test_what_is_ignored_is_no_failure_and_what_is_hidden_stays_hidden(self):
        ignored = command("Ignored", "exit 1", ignore_errors=True)
        hidden = command("Hidden", "echo hunter2 >&2; exit 1", no_log=True)
        _, lines = said([play(ignored, hidden)])
        failed = [line for line in lines if line["mayfly"] == "failed"]
        self.assertEqual(failed, [{"mayfly": "failed", "task": "Hidden", "reason": "what it said is hidden (no_log)"}])
        self.assertNotIn("hunter2", json.dumps(lines))

    def test_of_a_loop_the_item_that_failed_is_told(self):
        _, lines = said([play(command("Loop", "echo item {{ item }} >&2; exit {{ item }}", loop=[0, 4]))])
        self.assertEqual(lines[1]["reason"], "non-zero return code: item 4")

    def test_a_machine_that_is_not_reached_is_a_failure_of_the_task(self):
        machine = "192.0.2.1,"
        environment = {"ansible_ssh_args": "-F none -o ProxyCommand=false"}
        code, lines = said([{**play(command("First", "true"), connection="ssh"), "vars": environment}], machine)
        self.assertEqual(code, 4)
        self.assertEqual((lines[1]["mayfly"], lines[1]["task"]), ("failed", "First"))
        self.assertIn("closed", lines[1]["reason"])

    def test_a_playbook_that_matches_nothing_says_so(self):
        code, lines = said([play(command("First", "true"), hosts="nobody")])
        self.assertEqual((code, lines), (0, [{"mayfly": "done", "hosts": []}]))


if __name__ == "__main__":
    unittest.main()

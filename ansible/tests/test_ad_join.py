"""What the program that joins accepts and writes; the join itself is tested in tests/ad-lab, in a real domain."""

import importlib.machinery
import importlib.util
import io
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as xml
from pathlib import Path
from unittest import mock

PROGRAM = Path(__file__).resolve().parent.parent / "roles/ad-join/files/ad-join"
sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("ad_join", str(PROGRAM))
ad_join = importlib.util.module_from_spec(importlib.util.spec_from_loader("ad_join", loader))
loader.exec_module(ad_join)


def parameters(**given):
    return {
        "domain": "ad.mayfly.test", "host_name": "desktop-0000001", "users": ["alice"], "groups": [], "servers": [],
        "dns_servers": [], "method": "adcli", "join_as": "computer", "ou": "", "shares": [], "pam": ["xrdp-sesman"],
        "local_user": "", **given,
    }  # fmt: skip


def files(**given):
    checked = parameters(**given)
    ad_join.check(checked)
    return {path: content for path, content, _ in ad_join.Join(checked).files()}


class AdJoin(unittest.TestCase):
    def test_what_could_end_a_line_or_a_section_is_refused(self):
        share = {"server": "files", "share": "s", "mount": "Partage"}
        for wrong in (
            {"users": ["alice\naccess_provider = permit"]},
            {"users": ["alice, bob"]},
            {"users": ["%group"]},
            {"users": ["root"]},
            {"groups": ["a]\n[b"]},
            {"domain": "ad.mayfly.test\n"},
            {"domain": "localhost"},
            {"host_name": "desktop-00000012"},
            {"servers": ["dc1 dc2"]},
            {"pam": ["../passwd"]},
            {"local_user": "me root"},
            {"method": "realm"},
            {"shares": [{**share, "mount": "../../etc"}]},
            {"shares": [{**share, "mount": "%(DOMAIN)"}]},
            {"shares": [{**share, "options": "a b"}]},
            {"shares": [{**share, "password": "x"}]},
        ):
            with self.subTest(wrong), self.assertRaises(ad_join.Failure):
                files(**wrong)

    def test_nobody_named_is_not_everybody(self):
        with self.assertRaises(ad_join.Failure):
            files(users=[])
        sssd = files(users=[], groups=["desktop users"])[ad_join.SSSD_CONF]
        self.assertIn("simple_allow_groups = desktop users\n", sssd)
        self.assertNotIn("simple_allow_users", sssd)

    def test_a_desktop_lets_in_the_domain_alone_unless_a_local_account_is_named(self):
        alone = files()["/etc/pam.d/xrdp-sesman"]
        self.assertNotIn("auth     sufficient pam_unix", alone)
        beside = files(local_user="ops")["/etc/pam.d/xrdp-sesman"]
        self.assertIn("pam_succeed_if.so quiet user != ops\nauth     sufficient pam_unix.so\n", beside)

    def test_shares_are_well_formed_whatever_their_names(self):
        shares = [
            {"server": "files", "share": "R&D <x>/{user}", "mount": "Mes documents"},
            {"server": "files", "share": "home", "mount": "/home/{user}", "security": "ntlmssp", "options": "seal"},
        ]
        volumes = xml.fromstring(files(shares=shares)["/etc/security/pam_mount.conf.xml"]).findall("volume")
        self.assertEqual(volumes[0].get("path"), "R&D <x>/%(USER)")
        self.assertEqual(volumes[0].get("mountpoint"), "/home/%(USER)/Mes documents")
        self.assertTrue(volumes[0].get("options").endswith("sec=krb5,cruid=%(USERUID)"))
        self.assertEqual(volumes[1].get("mountpoint"), "/home/%(USER)")
        self.assertTrue(volumes[1].get("options").endswith("sec=ntlmssp,user=%(USER),seal"))

    def test_mounts_are_found_with_spaces_in_their_names_the_deepest_first(self):
        table = (
            "//f/home /home/alice cifs rw,uid=200001 0 0\n//f/x /home/alice/Mes\\040documents cifs rw 0 0\n"
            "tmpfs /home/alicette tmpfs rw 0 0\n"
        )
        original, ad_join.text = ad_join.text, lambda _: table
        self.addCleanup(setattr, ad_join, "text", original)
        self.assertEqual([path for path, _, _ in ad_join.mounts("/home/alice")], ["/home/alice/Mes documents", "/home/alice"])

    def join(self, servers, answers):
        """Joins where each controller says this, the last of it again and again. Which were asked, and SSSD's order afterwards."""
        folder = self.enterContext(tempfile.TemporaryDirectory())
        asked, now = [], [0]

        def tool(*command, stdin=""):
            server = command[command.index("--domain-controller") + 1]
            asked.append(server)
            said = answers[server][0] if len(answers[server]) == 1 else answers[server].pop(0)
            return subprocess.CompletedProcess(command, 1 if said else 0, "", said)

        def silence(_, server):
            if answers[server][0] == SILENT:
                asked.append(server)
                return ad_join.Failure("unreachable", server)

        def sleep(seconds):
            now[0] += seconds
            for said in answers.values():
                if said[0] == SILENT and len(said) > 1:
                    said.pop(0)

        for name, stand_in in {
            "KEYTAB": f"{folder}/keytab", "SSSD_CONF": f"{folder}/sssd.conf", "tool": tool,
        }.items():  # fmt: skip
            self.enterContext(mock.patch.object(ad_join, name, stand_in))
        self.enterContext(mock.patch.object(ad_join.Join, "silence", silence))
        self.enterContext(mock.patch.object(ad_join.Join, "write", lambda _: None))
        self.enterContext(mock.patch.object(ad_join.time, "sleep", sleep))
        self.enterContext(mock.patch.object(ad_join.time, "monotonic", lambda: now[0]))
        self.enterContext(mock.patch.object(ad_join.sys, "stdin", io.StringIO("one-time\n")))
        join = ad_join.Join(parameters(servers=servers))
        try:
            join.join()
        except ad_join.Failure as failure:
            return asked, failure.code
        return asked, join.p["servers"]

    def test_the_first_controller_that_accepts_the_machine_is_asked_first_from_then_on(self):
        self.assertEqual(self.join(["a", "b"], {"a": [""], "b": [""]}), (["a"], ["a", "b"]))
        self.assertEqual(self.join(["a", "b"], {"a": [SILENT], "b": [""]}), (["a", "b"], ["b", "a"]))

    def test_while_the_controller_that_knows_is_silent_the_others_are_asked_until_they_know(self):
        asked, order = self.join(["a", "b"], {"a": [SILENT], "b": [UNKNOWN, UNKNOWN, ""]})
        self.assertEqual((asked, order), (["a", "b"] * 3, ["b", "a"]))
        asked, order = self.join(["a", "b"], {"a": [SILENT, SILENT, ""], "b": [UNKNOWN]})
        self.assertEqual((asked[-1], order), ("a", ["a", "b"]))
        self.assertEqual(self.join(["a", "b"], {"a": [SILENT], "b": [UNKNOWN]})[1], "no_account")
        self.assertEqual(self.join(["a", "b"], {"a": [SILENT], "b": [SILENT]})[1], "unreachable")

    def test_what_no_other_controller_could_mend_ends_it_at_once(self):
        self.assertEqual(self.join(["a", "b"], {"a": [UNKNOWN], "b": [UNKNOWN]}), (["a", "b"], "no_account"))
        for said, code in {
            "Preauthentication failed": "secret", "KRB5: Clock skew too great": "clock", "Insufficient access": "join",
        }.items():  # fmt: skip
            self.assertEqual(self.join(["a", "b"], {"a": [said], "b": [""]}), (["a"], code))


SILENT, UNKNOWN = "silent", "adcli: Client 'X$@Y' not found in Kerberos database"

if __name__ == "__main__":
    unittest.main()

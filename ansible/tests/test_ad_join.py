"""What the program that joins accepts and writes; the join itself is tested in tests/ad-lab, in a real domain."""

import importlib.machinery
import importlib.util
import sys
import unittest
import xml.etree.ElementTree as xml
from pathlib import Path

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


if __name__ == "__main__":
    unittest.main()

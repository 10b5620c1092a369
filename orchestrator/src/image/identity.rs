//! What a root folder holds that copies of it must not share: keys, passwords, a machine's id.

use std::fs;
use std::path::Path;

/// Lists what gives `root` an identity or lets somebody in; empty when it is fit to be copied.
pub(super) fn found_in(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for name in [
        "etc/xrdp/rsakeys.ini",
        "etc/xrdp/cert.pem",
        "etc/xrdp/key.pem",
        "etc/xrdp/mayfly-cert.pem",
        "etc/xrdp/mayfly-key.pem",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "etc/krb5.keytab",
        "var/lib/systemd/random-seed",
        "var/lib/systemd/credential.secret",
        "root/.ssh/authorized_keys",
    ] {
        if root.join(name).symlink_metadata().is_ok() {
            found.push(format!("/{name}"));
        }
    }
    for name in ["etc/machine-id", "var/lib/dbus/machine-id"] {
        let path = root.join(name);
        // A link leads to the other file, and absolute ones out of the root.
        let is_file = path.symlink_metadata().is_ok_and(|m| m.is_file());
        if is_file && fs::metadata(&path).is_ok_and(|m| m.len() > 0) {
            found.push(format!("/{name}"));
        }
    }
    for entry in entries(&root.join("etc/ssh")) {
        if entry.starts_with("ssh_host_") {
            found.push(format!("/etc/ssh/{entry}"));
        }
    }
    for entry in entries(&root.join("home")) {
        found.push(format!("/home/{entry}"));
    }
    let shadow = fs::read_to_string(root.join("etc/shadow")).unwrap_or_default();
    for line in shadow.lines() {
        let mut fields = line.split(':');
        let (user, hash) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        if !(hash.starts_with('!') || hash.starts_with('*')) {
            found.push(format!("a password of {user} in /etc/shadow"));
        }
    }
    found
}

fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::found_in;
    use std::fs;

    #[test]
    fn a_sealed_root_is_clean_and_every_leftover_is_named() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        write("etc/machine-id", "");
        write("etc/shadow", "root:*:1::::::\nxrdp:!:1::::::\n");
        write("etc/ssh/sshd_config", "");
        std::os::unix::fs::symlink("/etc/hostname", root.path().join("etc/os-release")).unwrap();
        assert_eq!(found_in(root.path()), Vec::<String>::new());

        write("etc/machine-id", "0123\n");
        write("etc/ssh/ssh_host_ed25519_key", "");
        write("etc/xrdp/rsakeys.ini", "");
        write("home/somebody/.profile", "");
        write("etc/shadow", "root::1::::::\nme:$y$hash:1::::::\n");
        // Debian's links to a key that is gone already.
        std::os::unix::fs::symlink("/nowhere", root.path().join("etc/xrdp/key.pem")).unwrap();
        let mut found = found_in(root.path());
        found.sort();
        assert_eq!(
            found,
            [
                "/etc/machine-id",
                "/etc/ssh/ssh_host_ed25519_key",
                "/etc/xrdp/key.pem",
                "/etc/xrdp/rsakeys.ini",
                "/home/somebody",
                "a password of me in /etc/shadow",
                "a password of root in /etc/shadow",
            ]
        );
    }
}

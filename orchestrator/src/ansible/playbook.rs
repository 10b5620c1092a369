//! The run of a playbook against one machine: its private files, its environment, its command.
//!
//! # Guarantees
//! * Host keys are checked, against the one key that was learned from inside the machine: neither the playbook nor its variables
//!   nor anybody's SSH configuration can switch that off.
//! * What is secret is in files of mode 0600 in a folder of mode 0700, and in no argument or variable of the environment.

use super::AnsibleConfig;
use crate::provider::SshServer;
use crate::run::{Order, Run};
use mayfly_api::DesktopName;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The plugin that says what happens; of the same version as what reads it.
const CALLBACK: &str = include_str!("../../../ansible/plugins/callback/mayfly.py");
/// Playbooks find the machine in this group, as in the inventory plugin.
const GROUP: &str = "ephemeral_desktop";
/// The longest path of a Unix socket (unix(7)), without the random end that ssh gives it while it is made.
const LONGEST_SOCKET: usize = 107 - 17;

/// Where a run's private files are, while it runs.
pub(super) fn work(run: &Run) -> PathBuf {
    run.folder().join("work")
}

/// Writes the files of a run, and says how to start it.
pub(super) fn prepare(
    run: &Run,
    config: &AnsibleConfig,
    playbook: &Path,
    name: DesktopName,
    server: &SshServer,
    key: &SecretString,
    deadline: Duration,
) -> io::Result<Order> {
    let work = &work(run);
    std::fs::DirBuilder::new().mode(0o700).create(work)?;
    let write = |file: &str, content: &str| -> io::Result<PathBuf> {
        let path = work.join(file);
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?
            .write_all(content.as_bytes())?;
        Ok(path)
    };
    write("mayfly.py", CALLBACK)?;
    write("known_hosts", &known_hosts(name, server)?)?;
    write("key", key.expose_secret())?;
    let ssh = write("ssh_config", &ssh_config(work, name))?;
    let host = json!({
        "ansible_host": server.address.ip(),
        "ansible_port": server.address.port(),
        "ansible_user": server.user,
    });
    // JSON is YAML.
    let inventory = json!({ GROUP: { "hosts": { name.to_string(): host } } });
    let inventory = write("inventory.yml", &inventory.to_string())?;
    // Variables of the command line win over all others.
    let variables = json!({
        "ansible_host_key_checking": true,
        "ansible_ssh_host_key_checking": true,
        "ansible_ssh_args": format!("-F '{}'", ssh.display().to_string().replace('\'', r"'\''")),
        "ansible_ssh_common_args": "",
        "ansible_ssh_extra_args": "",
        "deploy_desktop_agent": config.agent,
    });
    let variables = write("variables.json", &variables.to_string())?;

    let mut command: Vec<OsString> = vec![config.program.clone().into()];
    command.extend(["--inventory".into(), inventory.into()]);
    for file in config.variables.iter().chain([&variables]) {
        let mut from = OsString::from("@");
        from.push(file);
        command.extend(["--extra-vars".into(), from]);
    }
    command.push(playbook.into());
    Ok(Order {
        command,
        environment: environment(work, config, playbook),
        deadline,
    })
}

fn environment(work: &Path, config: &AnsibleConfig, playbook: &Path) -> Vec<(OsString, OsString)> {
    let mut all: Vec<(OsString, OsString)> = [
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        // Ansible refuses any other encoding.
        ("LC_ALL", "C.UTF-8"),
        ("PYTHONDONTWRITEBYTECODE", "1"),
        ("ANSIBLE_STDOUT_CALLBACK", "mayfly"),
        ("ANSIBLE_INVENTORY_ENABLED", "yaml"),
        ("ANSIBLE_HOST_KEY_CHECKING", "1"),
        ("ANSIBLE_NOCOLOR", "1"),
        ("ANSIBLE_RETRY_FILES_ENABLED", "0"),
        // One process a task instead of three.
        ("ANSIBLE_PIPELINING", "1"),
        // An SSH server that is just being started.
        ("ANSIBLE_SSH_RETRIES", "3"),
    ]
    .into_iter()
    .map(|(name, value)| (name.into(), value.into()))
    .collect();
    for name in ["HOME", "TMPDIR", "ANSIBLE_HOME", "ANSIBLE_CALLBACK_PLUGINS"] {
        all.push((name.into(), work.into()));
    }
    all.push(("ANSIBLE_LOCAL_TEMP".into(), work.join("tmp").into()));
    let settings = playbook.with_file_name("ansible.cfg");
    if settings.exists() {
        all.push(("ANSIBLE_CONFIG".into(), settings.into()));
    }
    if let Some(file) = &config.vault_password_file {
        all.push(("ANSIBLE_VAULT_PASSWORD_FILE".into(), file.into()));
    }
    all
}

/// The machine's key, under its name: an address may have been another machine's a moment ago.
fn known_hosts(name: DesktopName, server: &SshServer) -> io::Result<String> {
    // Without the comment, which is the guest's.
    let key = ssh_key::PublicKey::from(server.host_key.key_data().clone());
    let key = key.to_openssh().map_err(io::Error::other)?;
    Ok(format!("{name} {key}\n"))
}

fn ssh_config(work: &Path, name: DesktopName) -> String {
    let quoted = |file: &str| {
        let path = work.join(file).display().to_string();
        format!("\"{}\"", path.replace('%', "%%"))
    };
    let socket = work.join("ssh");
    // Where the folder's name is too long, a connection a task.
    let shared = if socket.as_os_str().len() <= LONGEST_SOCKET {
        let path = quoted("ssh");
        format!("ControlMaster auto\nControlPersist 30\nControlPath {path}\n")
    } else {
        String::new()
    };
    format!(
        "StrictHostKeyChecking yes\n\
         HostKeyAlias {name}\n\
         HostKeyAlgorithms ssh-ed25519\n\
         UserKnownHostsFile {}\n\
         GlobalKnownHostsFile /dev/null\n\
         UpdateHostKeys no\n\
         IdentityFile {}\n\
         IdentitiesOnly yes\n\
         IdentityAgent none\n\
         PreferredAuthentications publickey\n\
         BatchMode yes\n\
         ConnectTimeout 30\n\
         ServerAliveInterval 15\n\
         {shared}",
        quoted("known_hosts"),
        quoted("key"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> DesktopName {
        DesktopName::from_number(1).unwrap()
    }

    #[test]
    fn the_machine_s_key_is_known_by_its_name_without_its_comment() {
        let key =
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ4Dw0mcCVwLsHhkTXUVbM9UyGcVcmJ5UYkM0CqWy6Hm";
        let server = SshServer {
            address: "10.0.0.7:22".parse().unwrap(),
            user: "mayfly".to_owned(),
            host_key: format!("{key} root@x\u{a0}y").parse().unwrap(),
        };
        let known = known_hosts(name(), &server).unwrap();
        assert_eq!(known, format!("desktop-0000001 {key}\n"));
    }

    #[test]
    fn keys_are_checked_and_a_connection_is_shared_where_its_socket_fits() {
        let config = ssh_config(Path::new("/var/lib/100%/work"), name());
        assert!(config.starts_with("StrictHostKeyChecking yes\n"));
        assert!(config.contains("UserKnownHostsFile \"/var/lib/100%%/work/known_hosts\"\n"));
        assert!(config.contains("ControlPath \"/var/lib/100%%/work/ssh\"\n"));
        let long = ssh_config(&PathBuf::from("/").join("x".repeat(90)), name());
        assert!(!long.contains("Control"), "{long}");
    }
}

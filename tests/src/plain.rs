//! A desktop of a plain cloud-init template (`tests/plain-template`) that Ansible configures at session time: how an orchestrator is
//! told of it, what the roles promise to have done, and the playbook's second run on the machine.
//!
//! `cargo xtask soak --only plain` shows all of it.

use crate::lab::Lab;
use crate::site::Site;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The playbook has this long, emulated, on a machine that others need too.
pub const CONFIGURED: Duration = Duration::from_secs(7200);
/// `[limits]` that leave a playbook so long. Nobody beats here for the session.
pub const LIMITS: &str = "idle_s = 20\nlease_s = 36000\nnever_connected_s = 7200\ncreating_timeout_s = 10800\n\
                          create_timeout_s = 14400\nbooting_timeout_s = 900\nconfiguring_timeout_s = 900";
/// Where the first run of the playbook leaves its mark, so that the next skips the roles: a run that does not is told a version that
/// is higher than any.
const NEWER: u32 = 1_000_000;

/// What the roles promise, and what the agent needs of them: each a line of shell that succeeds in the desktop of `$user`.
const PROMISES: &[(&str, &str)] = &[
    (
        "the late packages are installed",
        "test \"$(dpkg-query -W -f '${Status}\\n' xrdp xorgxrdp adcli | sort -u)\" = 'install ok installed'",
    ),
    (
        "the agent runs, also after the next boot",
        "systemctl -q is-active mayfly-agent.service && systemctl -q is-enabled mayfly-agent.service",
    ),
    (
        "xrdp and its session manager run",
        "systemctl -q is-active xrdp.service && systemctl -q is-active xrdp-sesman.service",
    ),
    (
        "RDP is TLS alone, with the agent's certificate",
        "for line in security_layer=tls 'ssl_protocols=TLSv1.2, TLSv1.3' certificate=/etc/xrdp/mayfly-cert.pem \
         key_file=/etc/xrdp/mayfly-key.pem enable_token_login=false; do grep -qxF \"$line\" /etc/xrdp/xrdp.ini || exit 1; done",
    ),
    (
        "its key is for xrdp's group alone",
        "test \"$(stat -c '%U:%G %a' /etc/xrdp/mayfly-key.pem)\" = 'root:xrdp 640'",
    ),
    (
        "credentials lead straight into the one session that is offered",
        "grep -qxF autorun=Xorg /etc/xrdp/xrdp.ini && grep -qxF ls_title=Mayfly /etc/xrdp/xrdp.ini \
         && ! grep -qiE '^\\[(Xvnc|vnc-any|neutrinordp-any)' /etc/xrdp/xrdp.ini && ! grep -qF '[Xvnc]' /etc/xrdp/sesman.ini",
    ),
    (
        "no channel is offered that Mayfly does not have",
        "for line in rdpsnd=false rail=false xrdpvr=false; do grep -qxF $line /etc/xrdp/xrdp.ini || exit 1; done",
    ),
    (
        "sessions are as configured",
        "for line in EnableUserWindowManager=false DefaultWindowManager=/usr/lib/mayfly/desktop-session AllowRootLogin=false \
         AllowAlternateShell=false MaxSessions=2 KillDisconnected=false DisconnectedTimeLimit=0 IdleTimeLimit=0; \
         do grep -qxF $line /etc/xrdp/sesman.ini || exit 1; done",
    ),
    (
        "a desktop's session, its settings and its looks are there",
        "test -x /usr/lib/mayfly/desktop-session && cd /usr/share/mayfly && test -s mayfly.svg \
         && test -s xdg/xfce4/xfconf/xfce-perchannel-xml/xfce4-panel.xml && test -s /usr/share/backgrounds/mayfly/wallpaper.jpg",
    ),
    (
        "Firefox has its policies, and nobody is asked what they cannot answer",
        "test -s /etc/firefox/policies/policies.json && test -s /etc/polkit-1/rules.d/40-mayfly.rules",
    ),
    (
        "the site's locales are there, the first of them set",
        "locale -a | grep -qix en_GB.utf8 && locale -a | grep -qix fr_FR.utf8 && ! locale -a | grep -qix de_DE.utf8 \
         && grep -qxF LANG=en_GB.UTF-8 /etc/default/locale",
    ),
    (
        "time zone and keyboard are set",
        "test \"$(readlink -f /etc/localtime)\" = \"$(readlink -f /usr/share/zoneinfo/Etc/UTC)\" \
         && grep -qxF 'XKBLAYOUT=\"us\"' /etc/default/keyboard",
    ),
    (
        "the distribution's units have our additions",
        "cd /etc/systemd && test -s system/xrdp.service.d/mayfly.conf -a -s system/qemu-guest-agent.service.d/mayfly.conf \
         -a -s journald.conf.d/mayfly.conf",
    ),
    (
        "the bootstrap's folder is root's alone, and empty by now",
        "test \"$(stat -c '%U %a' /run/mayfly/bootstrap)\" = 'root 700' && test -z \"$(ls /run/mayfly/bootstrap)\"",
    ),
    (
        "the person has an account and a home, and is no administrator",
        "test \"$(id -u $user)\" -ge 1000 && test \"$(stat -c %U /home/$user)\" = $user && ! id -nG $user | grep -qw sudo",
    ),
    (
        "the account of Ansible has no password",
        "passwd -S mayfly | grep -q '^mayfly L '",
    ),
    (
        "a domain could be joined, and nothing of one runs",
        "test -x /usr/lib/mayfly/ad-join && ! systemctl -q is-active sssd.service \
         && ! grep -qE 'pam_(sss|mount|pwquality)\\.so' /etc/pam.d/common-auth /etc/pam.d/common-password",
    ),
    (
        "the machine has its own name and id",
        "hostname | grep -qxE 'desktop-[0-9a-f]{7}' && test \"$(wc -c </etc/machine-id)\" = 33",
    ),
    (
        "the stamp says which version it is",
        "grep -q '\"version\"' /usr/share/mayfly/image.json",
    ),
];

/// Parts of a configuration: a template whose desktops Ansible makes of the site's machines, and the site.
///
/// # Errors
/// When `cargo xtask soak` did not say where things are.
pub fn configuration(site: &Site) -> Result<String> {
    let file = site.path("desktop.yml");
    std::fs::write(&file, site_variables())?;
    Ok(format!(
        "memory_mib = 1536\nplaybook = {:?}\n{}[ansible]\ntimeout_s = {}\nagent = {:?}\nvariables = [{file:?}]\n",
        playbook()?,
        site.configuration()?,
        CONFIGURED.as_secs(),
        agent()?,
    ))
}

/// As few locales as can be chosen among: an emulated machine takes most of a minute for each.
fn site_variables() -> String {
    json!({"desktop_config_locales": ["en_GB.UTF-8", "fr_FR.UTF-8"]}).to_string()
}

fn playbook() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ansible/deploy-desktop.yml");
    path.canonicalize()
        .with_context(|| format!("finding {}", path.display()))
}

fn agent() -> Result<PathBuf> {
    let agent = std::env::var_os("MAYFLY_AGENT");
    agent.map(PathBuf::from).context(
        "MAYFLY_AGENT must name the agent, linked statically: run `cargo xtask soak --only plain`",
    )
}

/// Looks whether this person's desktop is what the roles promise; returns how many promises that were.
///
/// # Errors
/// With the promises that are not kept.
pub fn verify(site: &mut Site, vmid: u32, user: &str) -> Result<usize> {
    let mut broken = Vec::new();
    for (promise, line) in PROMISES {
        if let Err(error) = site.shell(vmid, &format!("user={user}; {line}")) {
            broken.push(format!("not so: {promise}: {error:#}"));
        }
    }
    ensure!(broken.is_empty(), "{}", broken.join("\n"));
    Ok(PROMISES.len())
}

/// Runs the playbook on the machine once more, roles and all; returns the names of the tasks that changed anything.
///
/// # Errors
/// When it fails.
pub async fn run_again(
    site: &mut Site,
    lab: &Lab,
    vmid: u32,
    address: IpAddr,
) -> Result<Vec<String>> {
    let path = |name: &str| lab.path("run").join(name);
    let mut keygen = lab.command("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
    let made = keygen.arg(path("key")).status()?;
    ensure!(made.success(), "ssh-keygen: {made}");
    let key = std::fs::read_to_string(path("key.pub"))?;
    // The orchestrator's key is gone with its run. What opens the machine and what it is known by go through the guest agent.
    let admit = format!(
        "echo '{}' >>~mayfly/.ssh/authorized_keys; cat /etc/ssh/ssh_host_ed25519_key.pub",
        key.trim_end()
    );
    let host_key = site.shell(vmid, &admit)?;
    std::fs::write(path("known_hosts"), format!("{address} {host_key}"))?;
    let host = json!({"ansible_host": address, "ansible_user": "mayfly"});
    let inventory = json!({"ephemeral_desktop": {"hosts": {"desktop": host}}});
    std::fs::write(path("inventory.yml"), inventory.to_string())?;
    std::fs::write(path("variables.yml"), site_variables())?;
    let options = [
        "StrictHostKeyChecking=yes".to_owned(),
        format!("UserKnownHostsFile={}", path("known_hosts").display()),
        "GlobalKnownHostsFile=/dev/null".to_owned(),
        "HostKeyAlgorithms=ssh-ed25519".to_owned(),
        "IdentitiesOnly=yes".to_owned(),
        format!("IdentityFile={}", path("key").display()),
        "ControlMaster=auto".to_owned(),
        "ControlPersist=20".to_owned(),
        format!("ControlPath={}", path("ssh").display()),
    ]
    .map(|option| format!("-o {option}"));
    let playbook = playbook()?;
    let mut command = lab.command("ansible-playbook");
    command
        .env("ANSIBLE_CONFIG", playbook.with_file_name("ansible.cfg"))
        .env("ANSIBLE_SSH_ARGS", options.join(" "))
        .env("ANSIBLE_HOST_KEY_CHECKING", "1")
        .env("ANSIBLE_NOCOLOR", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg("--inventory")
        .arg(path("inventory.yml"))
        .arg(format!("--extra-vars=@{}", path("variables.yml").display()))
        .arg("--extra-vars")
        .arg(json!({"mayfly_image_version": NEWER, "deploy_desktop_agent": agent()?}).to_string())
        .arg(playbook);
    let mut play = lab.start("playbook again", command)?;
    let exit = play.exit(CONFIGURED).await?;
    ensure!(exit.success(), "{exit}: {}", play.last_words());
    let changed = changed(&play.output());
    // The connection that its tasks shared.
    crate::lab::until("ssh ends", Duration::from_secs(120), async || {
        Ok(lab.running("ssh")?.is_empty().then_some(()))
    })
    .await?;
    Ok(changed)
}

/// The tasks that changed something, by what `ansible-playbook` says.
fn changed(said: &str) -> Vec<String> {
    let (mut task, mut changed) = ("", Vec::new());
    for line in said.lines() {
        if let Some((kind, rest)) = line.split_once(" [")
            && ["TASK", "RUNNING HANDLER"].contains(&kind)
        {
            task = rest.split_once(']').map_or(rest, |(name, _)| name);
        } else if line.starts_with("changed: [") && changed.last().is_none_or(|last| last != task) {
            changed.push(task.to_owned());
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_task_and_a_handler_that_changed_something_are_named_once_each() {
        let said = "TASK [role : Write the file] ******\nok: [desktop] => (item=a)\n\
                    changed: [desktop] => (item=b)\nchanged: [desktop] => (item=c)\n\n\
                    TASK [Look] ****\nok: [desktop]\nskipping: [desktop]\n\n\
                    RUNNING HANDLER [role : Start it] ****\nchanged: [desktop]\n\n\
                    PLAY RECAP ****\ndesktop : ok=3    changed=2    unreachable=0\n";
        assert_eq!(
            super::changed(said),
            ["role : Write the file", "role : Start it"]
        );
        assert!(super::changed("TASK [Look] ****\nok: [desktop]\n").is_empty());
    }
}

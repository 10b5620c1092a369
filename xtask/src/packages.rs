//! The system's packages: which, for what, and how they come.
//!
//! # Guarantees
//! * Nothing is installed when everything is there; otherwise what is missing is named with its reason first.
//! * Only Debian's and Ubuntu's own archives are used, by `apt-get`, as root or through sudo.
//! * Nothing is removed to make room: some packages exclude others, such as Debian's compilers each other.

use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a package is for; `demo` and `test` name the purposes they serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Compile the tray app and its windows.
    Build,
    /// Build the desktop image.
    Image,
    /// Run desktops here and connect to them.
    Run,
    /// Drive everything as a person would, without a screen.
    Test,
    /// Build for Windows and type-check for macOS.
    Cross,
}

/// A package, or one of several, and why.
pub(crate) struct Need {
    purpose: Purpose,
    /// Any one of these; the first that the archive has is installed.
    any_of: &'static [&'static str],
    reason: &'static str,
    /// What is lost without it, where a release does not have it.
    without: Option<&'static str>,
}

const fn need(purpose: Purpose, any_of: &'static [&'static str], reason: &'static str) -> Need {
    Need {
        purpose,
        any_of,
        reason,
        without: None,
    }
}

impl Need {
    /// Some releases do not have it; what is lost without it.
    const fn or(self, without: &'static str) -> Self {
        Self {
            without: Some(without),
            ..self
        }
    }
}

use Purpose::{Build, Cross, Image, Run, Test};

const NOT_CROSS: &str = "nothing is built or checked for other systems";

const NEEDS: &[Need] = &[
    need(Build, &["gcc"], "compiles the C parts of Rust crates"),
    need(
        Build,
        &["libc6-dev"],
        "C headers, and the static libc of the agent",
    ),
    need(
        Build,
        &["pkg-config", "pkgconf"],
        "finds the libraries of the windows",
    ),
    need(Build, &["libwebkit2gtk-4.1-dev"], "draws the windows"),
    need(
        Image,
        &["mmdebstrap"],
        "makes the desktop's root file system",
    ),
    need(
        Image,
        &["debian-archive-keyring"],
        "checks Debian's signatures",
    ),
    need(
        Image,
        &["ansible"],
        "configures the desktop (role desktop-config)",
    ),
    need(Image, &["e2fsprogs"], "makes the desktop's disk"),
    need(Run, &["qemu-utils"], "disk images and overlays"),
    need(Run, &["qemu-system-x86"], "runs desktops"),
    need(Run, &["freerdp2-x11", "freerdp3-x11"], "the RDP client"),
    need(Run, &["libayatana-appindicator3-1"], "the tray icon"),
    need(
        Run,
        &["passt"],
        "the desktop's network, shut off from this machine",
    )
    .or("desktops have no internet"),
    need(Test, &["xvfb"], "a screen without a screen"),
    need(Test, &["dbus-daemon", "dbus"], "a private D-Bus session"),
    need(Test, &["xfce4-panel"], "a real panel to hold the tray icon"),
    need(Test, &["xfconf"], "the panel's configuration"),
    need(Test, &["dunst"], "receives the notifications"),
    need(Test, &["gnome-keyring"], "a real keyring"),
    need(
        Test,
        &["webkit2gtk-driver"],
        "drives the windows (WebDriver)",
    ),
    need(Test, &["xdotool"], "keyboard and mouse"),
    need(
        Test,
        &["iproute2"],
        "networks of the tests' own, and cut connections",
    ),
    need(
        Test,
        &["samba-ad-dc", "samba"],
        "a real Active Directory domain",
    ),
    need(
        Test,
        &["samba-ad-provision", "samba"],
        "what a new domain is made from",
    ),
    need(Test, &["samba-dsdb-modules"], "the domain's directory"),
    need(Test, &["samba-vfs-modules"], "the domain's file server"),
    need(Test, &["winbind"], "the domain's accounts"),
    need(Test, &["ldap-utils"], "asks the domain what is left in it"),
    need(Test, &["openssl"], "the domain's certificate"),
    need(
        Test,
        &["postgresql"],
        "the database of several orchestrators",
    ),
    need(
        Test,
        &["dnsmasq-base"],
        "gives the PVE lab's machines addresses",
    ),
    need(Test, &["openssh-client"], "by which Ansible logs in"),
    need(
        Test,
        &["python3-asyncssh"],
        "an SSH server of the tests' own",
    ),
    need(
        Test,
        &["nftables"],
        "the firewall of the PVE lab's machines",
    ),
    need(Test, &["x11-xkb-utils"], "sets the person's keyboard"),
    need(Test, &["python3-venv"], "tools that only PyPI has"),
    need(Test, &["procps"], "finds and kills what a test wants dead"),
    need(Test, &["curl"], "a script of the prototype's time"),
    need(Test, &["jq"], "a script of the prototype's time"),
    need(Test, &["fonts-dejavu-core"], "letters in the windows"),
    need(Test, &["mmdebstrap"], "fetches the micro guest's parts"),
    need(Cross, &["gcc-mingw-w64-x86-64"], "links the Windows build").or(NOT_CROSS),
    need(
        Cross,
        &["rustc-web"],
        "a Rust compiler whose standard library can be rebuilt",
    )
    .or(NOT_CROSS),
    need(Cross, &["cargo-web"], "the cargo of that compiler").or(NOT_CROSS),
    need(
        Cross,
        &["rust-web-src"],
        "the source of the standard library",
    )
    .or(NOT_CROSS),
];

/// How packages are installed.
const INSTALL: [&str; 4] = ["-q", "-y", "--no-install-recommends", "--no-remove"];

/// Installs what is missing for these purposes.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    let mut missing = missing(purposes)?;
    let node = purposes.contains(&Build) && crate::ui::node_on_path().is_none();
    if missing.is_empty() && !node {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "this machine has no apt-get. Install by hand what Debian calls:\n{}",
            table(&missing)
        );
    }
    apt(&["update", "-q"])?;
    let mut install = BTreeSet::new();
    missing.retain(|need| match available(need) {
        Some(package) => {
            install.insert(package);
            true
        }
        None if need.without.is_some() => {
            eprintln!(
                "{} cannot be had from this release's archive: {}.",
                need.any_of[0],
                need.without.unwrap_or_default()
            );
            false
        }
        // apt-get names it in its own error.
        None => {
            install.insert(need.any_of[0]);
            true
        }
    });
    let mut reasons = table(&missing);
    if node && crate::ui::archive_has_node() {
        reasons.push_str("  nodejs npm                   build the windows\n");
        install.extend(["nodejs", "npm"]);
    }
    if install.is_empty() {
        return Ok(());
    }
    eprintln!("Installing from this system's own archive:\n{reasons}");
    let samba = install.iter().any(|package| package.starts_with("samba"));
    let postgresql = install.contains("postgresql");
    let mut args = vec!["install"];
    args.extend(INSTALL);
    args.extend(install);
    if postgresql {
        as_root("sh")?.args(["-c", NO_CLUSTER]).status()?;
    }
    let installed = apt(&args);
    if postgresql {
        as_root("rm")?.args(["-f", NO_CLUSTER_FILE]).status()?;
    }
    installed?;
    if samba {
        stop_samba();
    }
    Ok(())
}

/// A database server that comes for the tests makes and starts no database: tests start their own, in folders of their own.
const NO_CLUSTER: &str = "mkdir -p /etc/postgresql-common/createcluster.d \
    && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/mayfly-tests.conf";
const NO_CLUSTER_FILE: &str = "/etc/postgresql-common/createcluster.d/mayfly-tests.conf";

/// A file server that came for the tests shall serve nobody else: tests start their own, in networks of their own.
fn stop_samba() {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    eprintln!("Samba's own services are not wanted here: switching them off.");
    for service in ["smbd", "nmbd", "winbind", "samba-ad-dc"] {
        let stopped = as_root("systemctl").map(|mut command| {
            command
                .args(["disable", "--now", service])
                .stderr(Stdio::null())
                .status()
        });
        // One that this release does not have.
        drop(stopped);
    }
}

/// A program run as root, through sudo if need be.
fn as_root(program: &str) -> Result<Command> {
    if crate::run::output(Command::new("id").arg("-u"))?.trim() == "0" {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("sudo");
    // Without a terminal nobody can type a password: fail at once instead of waiting.
    if !std::io::stdin().is_terminal() {
        command.arg("-n");
        command.stdin(Stdio::null());
    }
    command.args(["--preserve-env=DEBIAN_FRONTEND", program]);
    Ok(command)
}

/// What is not installed.
pub(crate) fn missing(purposes: &[Purpose]) -> Result<Vec<&'static Need>> {
    let installed = installed();
    Ok(NEEDS
        .iter()
        .filter(|need| purposes.contains(&need.purpose))
        .filter(|need| {
            !need
                .any_of
                .iter()
                .any(|package| installed.contains(*package))
        })
        .collect())
}

/// Names of all installed packages; none where there is no dpkg.
fn installed() -> BTreeSet<String> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Package}\\n"])
        .output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .map(str::to_owned)
        .collect()
}

/// The first of its packages that the archive offers.
fn available(need: &Need) -> Option<&'static str> {
    need.any_of.iter().copied().find(|package| {
        candidate(package).is_some() && (need.without.is_none() || finds_room(package))
    })
}

/// Whether apt would install it without removing anything.
fn finds_room(package: &str) -> bool {
    Command::new("apt-get")
        .args(["install", "--simulate"])
        .args(INSTALL)
        .arg(package)
        .output()
        .is_ok_and(|output| output.status.success())
}

/// The version that apt would install.
pub(crate) fn candidate(package: &str) -> Option<String> {
    let output = Command::new("apt-cache")
        .args(["policy", package])
        .env("LC_ALL", "C")
        .output()
        .ok()?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

/// The needs and their reasons, a line each.
pub(crate) fn table(needs: &[&Need]) -> String {
    needs.iter().fold(String::new(), |mut text, need| {
        let _ = writeln!(text, "  {:<28} {}", need.any_of.join(" or "), need.reason);
        text
    })
}

fn apt(args: &[&str]) -> Result<()> {
    let status = as_root("apt-get")?
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status();
    if status
        .context("starting apt-get")
        .is_ok_and(|s| s.success())
    {
        return Ok(());
    }
    bail!(
        "apt-get failed, or needs an administrator. Run this, then come back:\n  sudo apt-get update && sudo apt-get {}",
        args.join(" ")
    );
}

/// Whether this is the release whose archive has everything named here.
pub(crate) fn is_debian_12() -> bool {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    ["ID=debian", "VERSION_ID=\"12\""]
        .iter()
        .all(|wanted| release.lines().any(|line| line == *wanted))
}

//! What can be known before the long wait: tools, disk, readable inputs; and the way to build without root.

use super::BuildOptions;
use anyhow::{Context, bail, ensure};
use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// `PATH` with the folders of system tools, which an ordinary user's lacks.
pub(super) fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Fails, with the command that helps, if one of `tools` (name, Debian package) is missing.
pub(super) fn tools(tools: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: Vec<_> = tools
        .iter()
        .filter(|(tool, _)| which::which_in(tool, Some(path()), "/").is_err())
        .collect();
    let names = |pick: fn(&(&str, &str)) -> String| {
        let mut names: Vec<_> = missing.iter().map(|entry| pick(entry)).collect();
        names.dedup();
        names
    };
    ensure!(
        missing.is_empty(),
        "the image cannot be built without {}. Install with: apt install {}",
        names(|(tool, _)| (*tool).to_owned()).join(", "),
        names(|(_, package)| (*package).to_owned()).join(" "),
    );
    Ok(())
}

/// The agent must be a program that runs in any guest: an ELF file.
pub(super) fn agent(path: &Path) -> anyhow::Result<()> {
    let mut magic = [0; 4];
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut magic))
        .with_context(|| {
            format!(
                "cannot read the agent {}; name it with --agent",
                path.display()
            )
        })?;
    ensure!(
        magic == *b"\x7fELF",
        "the agent {} is not a Linux program; name a statically linked mayfly-agent with --agent",
        path.display()
    );
    Ok(())
}

/// Checks what a build from nothing needs.
pub(super) fn whole_build(options: &BuildOptions) -> anyhow::Result<()> {
    tools(&[
        ("mmdebstrap", "mmdebstrap"),
        ("ansible-playbook", "ansible"),
        ("ansible-doc", "ansible"),
        ("mke2fs", "e2fsprogs"),
        ("unshare", "util-linux"),
    ])?;
    let (keyring, how) = options.suite.keyring();
    ensure!(
        Path::new(keyring).exists(),
        "{keyring} is missing: packages of {} could not be verified. Install with: {how}",
        options.suite.codename()
    );
    // ansible-core alone lacks the connection by chroot.
    let known = std::process::Command::new("ansible-doc")
        .args(["-t", "connection", "community.general.chroot"])
        .env("PATH", path())
        .stdin(Stdio::null())
        .output()
        .context("cannot run ansible-doc")?;
    ensure!(
        known.status.success(),
        "Ansible lacks the collection community.general. Install with: apt install ansible"
    );
    Ok(())
}

/// Fails if `folder`'s file system has less than `need` bytes left.
pub(super) fn disk(folder: &Path, need: u64) -> anyhow::Result<()> {
    const GIB: f64 = (1u64 << 30) as f64;
    let stat = nix::sys::statvfs::statvfs(folder)
        .with_context(|| format!("cannot ask for the free space of {}", folder.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    ensure!(
        free >= need,
        "{} has {:.1} GiB left; this build needs {:.1} GiB. Free some, or name another folder with --output",
        folder.display(),
        free as f64 / GIB,
        need as f64 / GIB
    );
    Ok(())
}

/// Becomes this same command with root's rights inside a user namespace: there the packages' scripts and file owners
/// work as for root, and outside everything belongs to the user.
pub(super) async fn run_again_in_a_user_namespace() -> anyhow::Result<()> {
    const HELP: &str = "Build as root, or give this user a range of ids to use: apt install uidmap, then as root \
                        usermod --add-subuids 100000-165535 --add-subgids 100000-165535 NAME. Some distributions also \
                        forbid user namespaces to ordinary programs (sysctl kernel.apparmor_restrict_unprivileged_userns)";
    tools(&[("unshare", "util-linux"), ("newuidmap", "uidmap")])?;
    let namespace = ["--map-root-user", "--map-auto", "--mount"];
    let trial = tokio::process::Command::new("unshare")
        .args(namespace)
        .arg("true")
        .env("PATH", path())
        .stdin(Stdio::null())
        .output()
        .await
        .context("cannot run unshare")?;
    if !trial.status.success() {
        let said = String::from_utf8_lossy(&trial.stderr);
        bail!(
            "cannot build without root: no user namespace ({}). {HELP}",
            said.trim()
        );
    }
    let this: PathBuf = std::env::current_exe().context("cannot find this program's own file")?;
    let error = std::process::Command::new("unshare")
        .args(namespace)
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env("PATH", path())
        .exec();
    Err(error).context("cannot run unshare")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_missing_tool_names_its_package() {
        let error = super::tools(&[("sh", "dash"), ("no-such-tool", "its-package")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the image cannot be built without no-such-tool. Install with: apt install its-package"
        );
    }

    #[test]
    fn a_small_disk_is_refused_with_both_sizes() {
        let error = super::disk(std::path::Path::new("/tmp"), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("GiB left"), "{error}");
    }

    #[test]
    fn an_agent_that_is_a_script_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let agent = folder.path().join("agent");
        assert!(
            super::agent(&agent)
                .unwrap_err()
                .to_string()
                .contains("--agent")
        );
        std::fs::write(&agent, "#!/bin/sh\n").unwrap();
        assert!(
            super::agent(&agent)
                .unwrap_err()
                .to_string()
                .contains("not a Linux program")
        );
    }
}

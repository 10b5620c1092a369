//! `cargo xtask bare`: both README commands on a machine that has nothing.
//!
//! A Debian root with git, CA certificates and a C compiler is made once in the cache; each run works in a fresh copy of
//! it, with this machine's Rust toolchain mounted read-only and a fresh clone of `HEAD`.
//!
//! # Guarantees
//! * Mounts and processes live in namespaces of their own: when the run ends, however it ends, the kernel removes them.
//! * The root is entered by `pivot_root`, not `chroot`: user namespaces, which passt shuts itself into, are refused
//!   inside a chroot.
//!
//! # Caveats
//! * Needs root. The network is this machine's, for the package registries.

use crate::house::House;
use crate::run;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Options of `cargo xtask bare`.
#[derive(Args)]
pub(crate) struct BareArgs {
    /// Keep the root after the run and print its path
    #[arg(long)]
    keep: bool,
    /// Run this in the clone instead of the README's commands
    #[arg(last = true)]
    command: Vec<String>,
}

const SUITE: &str = "bookworm";
const PACKAGES: &str = "git,ca-certificates,gcc,libc6-dev";

/// Mounts what a machine has, then makes `$1` the root and runs the rest of the arguments in it.
const ENTER: &str = r#"
set -eu
root=$1; toolchain=$2; cargo=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty kvm net/tun fuse vhost-net; do
    [ -e "/dev/$node" ] || continue
    mkdir -p "dev/$(dirname "$node")"; : > "dev/$node"; mount --bind "/dev/$node" "dev/$node"
done
mkdir dev/pts dev/shm; ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p opt/rustup opt/cargo-bin
mount --bind "$toolchain" opt/rustup; mount -o remount,bind,ro opt/rustup
mount --bind "$cargo" opt/cargo-bin; mount -o remount,bind,ro opt/cargo-bin
mkdir -p .old
pivot_root . .old
cd /
umount -l /.old
exec "$@"
"#;

/// Both README commands, as a person types them.
const README: &str =
    "set -eux; cargo xtask demo --headless; cat target/reports/demo.json; cargo xtask test";

pub(crate) fn run(house: &House, args: &BareArgs) -> Result<()> {
    if run::output(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!("`cargo xtask bare` mounts file systems: run it as root");
    }
    let base = base(house)?;
    let root = house.cache.join(format!("bare/run-{}", std::process::id()));
    run::run(Command::new("cp").arg("-a").arg(&base).arg(&root))?;
    let removed = Removed {
        root: &root,
        keep: args.keep,
    };
    let clone = root.join("root/mayfly");
    run::run(
        Command::new("git")
            .args(["clone", "--quiet", "--no-hardlinks"])
            .arg(&house.root)
            .arg(&clone),
    )?;
    let log = house.reports()?.join("bare.log");
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--uts",
            "--ipc",
            "--",
        ])
        .args(["sh", "-c", ENTER, "enter"])
        .arg(&root)
        .arg(toolchain()?)
        .arg(cargo_bin()?)
        .args([
            "env",
            "-i",
            "-C",
            "/root/mayfly",
            "HOME=/root",
            "LANG=C.UTF-8",
        ])
        .args(["PATH=/opt/cargo-bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])
        .args(["RUSTUP_HOME=/opt/rustup", "CARGO_HOME=/root/.cargo"])
        .args(client_environment());
    if args.command.is_empty() {
        command.args(["sh", "-c", README]);
    } else {
        command.args(&args.command);
    }
    println!(
        "running in {}; the log is {}",
        root.display(),
        log.display()
    );
    let outcome = run::run_logged(command.stdin(Stdio::null()), &log);
    let reports = clone.join("target/reports");
    if reports.is_dir() {
        let kept = house.reports()?.join("bare");
        let _ = fs::remove_dir_all(&kept);
        run::run(Command::new("cp").arg("-r").arg(&reports).arg(&kept))?;
    }
    drop(removed);
    outcome
}

/// The bare root, made once; its name says what is in it.
fn base(house: &House) -> Result<PathBuf> {
    let name = format!("{SUITE}-{}", PACKAGES.replace(',', "+"));
    let base = house.cache.join("bare").join(name);
    if base.join("usr/bin/git").exists() {
        return Ok(base);
    }
    crate::packages::ensure(&[crate::packages::Purpose::Image])?;
    let half = base.with_extension("half");
    let _ = fs::remove_dir_all(&half);
    fs::create_dir_all(&half)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--mode=root"]);
    command.arg(format!("--include={PACKAGES}"));
    // How this machine reaches the archive: proxies, and mirrors older than today.
    let options = Command::new("apt-config")
        .args(["dump", "--format", "%f \"%v\";%n", "Acquire"])
        .output()
        .context("starting apt-config")?;
    for option in String::from_utf8_lossy(&options.stdout).lines() {
        if !option.ends_with("\"\";") && !option.contains("::GzipIndexes") {
            command.arg(format!("--aptopt={option}"));
        }
    }
    // Without a mirror named, mmdebstrap takes Debian's own, with updates and security.
    command.arg(SUITE).arg(&half);
    run::run(&mut command)?;
    copy_trust(&half)?;
    fs::rename(&half, &base)?;
    Ok(base)
}

/// The certificate authorities and package-client settings of this machine: the registries may stand behind them.
fn copy_trust(root: &Path) -> Result<()> {
    let ours = Path::new("/usr/local/share/ca-certificates");
    if let Ok(entries) = fs::read_dir(ours) {
        for entry in entries.flatten() {
            let to = root
                .join("usr/local/share/ca-certificates")
                .join(entry.file_name());
            fs::copy(entry.path(), to)?;
        }
    }
    run::run(
        Command::new("chroot")
            .arg(root)
            .arg("update-ca-certificates"),
    )?;
    let home = directories::BaseDirs::new().context("no home folder: set HOME")?;
    for (from, to) in [
        (PathBuf::from("/etc/pip.conf"), "etc/pip.conf"),
        (PathBuf::from("/etc/resolv.conf"), "etc/resolv.conf"),
        (home.home_dir().join(".npmrc"), "root/.npmrc"),
        (
            home.home_dir().join(".cargo/config.toml"),
            "root/.cargo/config.toml",
        ),
    ] {
        let to = root.join(to);
        if from.exists() {
            fs::create_dir_all(to.parent().unwrap_or(root))?;
            // A link (resolv.conf is one on many machines) would point outside the root.
            let _ = fs::remove_file(&to);
            fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
        }
    }
    let _ = symlink("/proc/self/mounts", root.join("etc/mtab"));
    Ok(())
}

/// Variables that tell package clients of certificates and proxies; their files exist in the root as well.
fn client_environment() -> Vec<String> {
    std::env::vars()
        .filter(|(name, _)| {
            let name = name.to_ascii_lowercase();
            name.ends_with("_proxy")
                || name.starts_with("ssl_cert")
                || matches!(
                    name.as_str(),
                    "curl_ca_bundle"
                        | "node_extra_ca_certs"
                        | "git_ssl_cainfo"
                        | "pip_cert"
                        | "requests_ca_bundle"
                )
        })
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

/// The folder of rustup's toolchains.
fn toolchain() -> Result<PathBuf> {
    let home = match std::env::var_os("RUSTUP_HOME") {
        Some(home) => PathBuf::from(home),
        None => home_folder(".rustup")?,
    };
    if !home.join("toolchains").is_dir() {
        bail!(
            "{} holds no toolchain; `cargo xtask bare` needs rustup's",
            home.display()
        );
    }
    Ok(home)
}

/// The folder of rustup's `cargo` and `rustc`.
fn cargo_bin() -> Result<PathBuf> {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => Ok(PathBuf::from(home).join("bin")),
        None => home_folder(".cargo/bin"),
    }
}

fn home_folder(name: &str) -> Result<PathBuf> {
    let base = directories::BaseDirs::new().context("no home folder: set HOME")?;
    Ok(base.home_dir().join(name))
}

/// The root of a run, removed at its end.
struct Removed<'a> {
    root: &'a Path,
    keep: bool,
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if self.keep {
            println!("kept: {}", self.root.display());
        } else if let Err(error) = fs::remove_dir_all(self.root) {
            eprintln!("could not remove {}: {error}", self.root.display());
        }
    }
}

//! The micro guest: the smallest machine in which everything but the desktop is real. Debian's cloud kernel, an initramfs with
//! busybox, the QEMU guest agent and Mayfly's own agent, and `micro-rdp` in the place of xrdp. It boots in seconds under software
//! emulation, so that whole life cycles can be tested on virtual machines by the hundred.
//!
//! Promises:
//! * The agent that goes in runs unchanged: what it calls (`useradd`, `systemctl`, …) is there, however small.
//! * Its image folder keeps the same contract as the desktop image's, and is made of the same content under the same name:
//!   a folder that exists is whole and is not built again.
//! * Needs neither root nor anything installed but `mmdebstrap` and `qemu-img`.

use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Debian's release; its packages are fetched once and kept.
const SUITE: &str = "bookworm";
const PACKAGES: &str = "busybox-static,linux-image-cloud-amd64,qemu-guest-agent";
/// In the order in which they load.
const MODULES: [&str; 11] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "virtio-rng",
];
/// The dynamic loader of x86-64.
const LOADER: &str = "ld-linux-x86-64.so.2";
const MEMORY_MIB: u32 = 192;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// Files of ours: where they go, and what they are.
const FILES: [(&str, &str); 9] = [
    ("init", include_str!("../guest/init")),
    ("etc/inittab", include_str!("../guest/inittab")),
    (
        "usr/share/udhcpc/default.script",
        include_str!("../guest/udhcpc"),
    ),
    ("usr/sbin/useradd", include_str!("../guest/useradd")),
    ("usr/sbin/chpasswd", include_str!("../guest/chpasswd")),
    ("usr/bin/systemctl", include_str!("../guest/systemctl")),
    ("bin/shutdown", include_str!("../guest/shutdown")),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\n"),
];

/// Builds the image folder below `images`, unless it is there, and returns it. `agent` and `rdp` are the static programs
/// `mayfly-agent` and `micro-rdp`.
///
/// # Errors
/// Says which program, package or file is missing. Nothing half-made stays under the folder's final name.
pub fn build(agent: &Path, rdp: &Path, images: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(images).with_context(|| format!("making {}", images.display()))?;
    let base = base(images)?;
    let mut content = Sha256::new();
    for part in [agent, rdp, &base.join("complete")] {
        content.update(hash(part)?);
    }
    for (path, text) in FILES {
        content.update(Sha256::digest(path));
        content.update(Sha256::digest(text));
    }
    content.update(format!("{MODULES:?} {MEMORY_MIB} {CMDLINE}"));
    let key = data_encoding::HEXLOWER.encode(&content.finalize());
    let folder = images.join(&key);
    if folder.join("image.json").is_file() {
        return Ok(folder);
    }

    let work = tempfile::Builder::new()
        .prefix(".micro-guest-")
        .tempdir_in(images)
        .context("making a work folder")?;
    let stage = work.path().join("initramfs");
    populate(&stage, &base, agent, rdp)?;
    let image = work.path().join("image");
    fs::create_dir(&image)?;
    pack(&base, &stage, &image.join("initrd.img"))?;
    copy(&base.join("vmlinuz"), &image.join("vmlinuz"))?;
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(image.join("disk.qcow2"))
        .arg("64M"))?;
    let description = serde_json::json!({
        "format": 1,
        "name": "micro-guest",
        "key": key,
        "kernel": "vmlinuz",
        "initrd": "initrd.img",
        "disk": "disk.qcow2",
        "cmdline": CMDLINE,
        "memory_mib": MEMORY_MIB,
    });
    fs::write(image.join("image.json"), format!("{description:#}\n"))?;
    // Another builder may have been faster: its folder has the same content.
    match fs::rename(&image, &folder) {
        Err(error) if !folder.join("image.json").is_file() => {
            Err(error).with_context(|| format!("putting {} in place", folder.display()))
        }
        _ => Ok(folder),
    }
}

/// What comes from Debian: kernel, modules, busybox, guest agent and its libraries. Fetched once.
fn base(images: &Path) -> anyhow::Result<PathBuf> {
    let key = data_encoding::HEXLOWER
        .encode(&Sha256::digest(format!("1 {SUITE} {PACKAGES} {MODULES:?}")));
    let folder = images.join(format!(".micro-guest-base-{}", &key[..16]));
    if folder.join("complete").is_file() {
        return Ok(folder);
    }
    let work = tempfile::Builder::new()
        .prefix(".micro-guest-")
        .tempdir_in(images)
        .context("making a work folder")?;
    let work = work.path().canonicalize()?;
    let (root, picked) = (work.join("root"), work.join("picked"));
    fs::create_dir(&root)?;
    extract(&root)?;

    fs::create_dir_all(picked.join("modules"))?;
    let kernel = one(&root.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    copy(&kernel, &picked.join("vmlinuz"))?;
    let modules = either(&root, "lib/modules")?;
    let tree = files_below(&modules)?;
    for name in MODULES {
        let file = format!("{name}.ko");
        let path = tree.get(file.as_str());
        let path = path.with_context(|| format!("the kernel of {SUITE} has no {file}"))?;
        copy(path, &picked.join("modules").join(file))?;
    }
    copy(&either(&root, "bin/busybox")?, &picked.join("busybox"))?;
    let guest_agent = either(&root, "sbin/qemu-ga")?;
    copy(&guest_agent, &picked.join("qemu-ga"))?;
    libraries(&root, &guest_agent, &picked.join("lib"))?;
    // Names what is in it: part of the key of everything made from it.
    let mut list = String::new();
    for (name, path) in files_below(&picked)? {
        list += &format!("{} {name}\n", data_encoding::HEXLOWER.encode(&hash(&path)?));
    }
    fs::write(picked.join("complete"), list)?;
    match fs::rename(&picked, &folder) {
        Err(error) if !folder.join("complete").is_file() => {
            Err(error).with_context(|| format!("putting {} in place", folder.display()))
        }
        _ => Ok(folder),
    }
}

/// Unpacks the packages and all that they need. Runs nothing of them, so any user can.
fn extract(root: &Path) -> anyhow::Result<()> {
    let mut debian = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=extract", "--format=tar"])
        .arg(format!("--include={PACKAGES}"))
        .args([SUITE, "-"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting mmdebstrap; install the package mmdebstrap")?;
    let tar = debian.stdout.take().context("mmdebstrap has no output")?;
    let unpacked = Command::new("tar")
        .args(["-x", "--exclude=./dev/*", "--exclude=./usr/share/*", "-C"])
        .arg(root)
        .stdin(tar)
        .status()
        .context("starting tar")?;
    let fetched = debian.wait().context("waiting for mmdebstrap")?;
    ensure!(
        fetched.success() && unpacked.success(),
        "fetching {PACKAGES} of {SUITE} with mmdebstrap failed ({fetched}, tar {unpacked}): see its words above"
    );
    Ok(())
}

/// The libraries of a program of another root, with its loader, by the loader's own word (man ld.so).
fn libraries(root: &Path, program: &Path, into: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(into)?;
    let loader = either(root, &format!("lib/x86_64-linux-gnu/{LOADER}"))?;
    copy(&loader, &into.join(LOADER))?;
    let folders = ["lib", "usr/lib"].map(|lib| root.join(lib).join("x86_64-linux-gnu"));
    let path = folders.map(|folder| folder.display().to_string()).join(":");
    let listed = Command::new(&loader)
        .args(["--library-path", &path, "--list"])
        .arg(program)
        .output()
        .context("listing the libraries of qemu-ga")?;
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        if let Some((name, rest)) = line.trim().split_once(" => ") {
            let name = Path::new(name).file_name().unwrap_or_default();
            let file = Path::new(rest.split(" (").next().unwrap_or_default());
            ensure!(
                file.starts_with(root),
                "qemu-ga needs {}, which {SUITE} lacks",
                name.display()
            );
            copy(file, &into.join(name))?;
        }
    }
    Ok(())
}

/// The tree that becomes the initramfs.
fn populate(stage: &Path, base: &Path, agent: &Path, rdp: &Path) -> anyhow::Result<()> {
    for folder in [
        "bin",
        "dev",
        "etc/ssh",
        "etc/xrdp",
        "lib64",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "home",
        "usr/bin",
        "usr/lib/mayfly",
        "usr/sbin",
        "usr/share/udhcpc",
        "usr/share/zoneinfo",
        "var",
        "etc/default",
    ] {
        fs::create_dir_all(stage.join(folder))?;
    }
    symlink("bin", stage.join("sbin"))?;
    symlink("/run", stage.join("var/run"))?;
    symlink("/proc/mounts", stage.join("etc/mtab"))?;
    for (from, to) in [
        (base.join("busybox"), "bin/busybox"),
        (base.join("qemu-ga"), "usr/sbin/qemu-ga"),
        (agent.to_owned(), "usr/lib/mayfly/mayfly-agent"),
        (rdp.to_owned(), "usr/sbin/micro-rdp"),
    ] {
        copy(&from, &stage.join(to))?;
        fs::set_permissions(stage.join(to), fs::Permissions::from_mode(0o755))?;
    }
    for (path, text) in FILES {
        let path = stage.join(path);
        fs::write(&path, text)?;
        let program = text.starts_with("#!");
        fs::set_permissions(
            &path,
            fs::Permissions::from_mode(if program { 0o755 } else { 0o644 }),
        )?;
    }
    for (name, path) in files_below(&base.join("lib"))? {
        copy(&path, &stage.join("lib64").join(name))?;
    }
    symlink("lib64", stage.join("lib"))?;
    fs::create_dir(stage.join("modules"))?;
    for (number, name) in MODULES.iter().enumerate() {
        // Numbered: the shell's order is the order of loading.
        copy(
            &base.join("modules").join(format!("{name}.ko")),
            &stage.join("modules").join(format!("{number:02}-{name}.ko")),
        )?;
    }
    Ok(())
}

/// Packs the initramfs with busybox's own cpio, everything owned by root. Uncompressed: unpacking costs more than reading.
fn pack(base: &Path, stage: &Path, into: &Path) -> anyhow::Result<()> {
    let list = Command::new("find")
        .arg(".")
        .current_dir(stage)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting find")?;
    let output = fs::File::create(into)?;
    run(Command::new(base.join("busybox"))
        .args(["cpio", "-o", "-H", "newc", "-R", "0:0"])
        .current_dir(stage)
        .stdin(list.stdout.context("find has no output")?)
        .stdout(output)
        .stderr(Stdio::null()))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    ensure!(
        status.success(),
        "{} failed: {status}",
        command.get_program().display()
    );
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("copying {} to {}", from.display(), to.display()))
}

fn hash(path: &Path) -> anyhow::Result<[u8; 32]> {
    let mut file = fs::File::open(path).with_context(|| format!("reading {}", path.display()))?;
    let mut content = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(content.finalize().into()),
            n => content.update(&buffer[..n]),
        }
    }
}

/// A path with or without `usr/`, which releases do differently. A link that leads out of the root does not count.
fn either(root: &Path, path: &str) -> anyhow::Result<PathBuf> {
    [root.join("usr").join(path), root.join(path)]
        .into_iter()
        .find(|path| path.canonicalize().is_ok_and(|path| path.starts_with(root)))
        .with_context(|| format!("the packages of {SUITE} have no {path}"))
}

fn one(folder: &Path, fits: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    let mut found = fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| fits(&path.file_name().unwrap_or_default().to_string_lossy()));
    match (found.next(), found.next()) {
        (Some(path), None) => Ok(path),
        _ => bail!("expected one kernel in {}", folder.display()),
    }
}

/// Every file below a folder, by its name.
fn files_below(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                files.insert(
                    entry.file_name().to_string_lossy().into_owned(),
                    entry.path(),
                );
            }
        }
    }
    Ok(files)
}

//! The build itself: keys, the two cache levels, and the tools it runs.

use super::progress::{Progress, Stages};
use super::{BuildOptions, identity, preflight};
use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// Grows when a change of this file changes what is built.
const RECIPE: &str = "mayfly image 1";

/// Size of a desktop's disk. Only what is written takes room.
const DISK_SIZE: &str = "16G";

/// Where the agent lives in an image.
const AGENT_FOLDER: &str = "/usr/lib/mayfly";

/// cloud-init is for templates on Proxmox VE: with our own provider even its search costs the boot a second.
/// `tsc=reliable`: under software emulation Linux takes the processors' equal clocks for unequal ones, and then every
/// question for the time costs six times as much (17 µs against 3 µs measured).
const CMDLINE: &str = "root=/dev/vda rw rootfstype=ext4 rootflags=noatime console=ttyS0 quiet tsc=reliable \
                       cloud-init=disabled";

const GIB: u64 = 1 << 30;
const BASE_NEEDS: u64 = 7 * GIB;
const IMAGE_NEEDS: u64 = 4 * GIB;

const SYSTEM: &str = "basic system";
const DESKTOP: &str = "desktop";
const DISK: &str = "file system";
const AGENT: &str = "agent";
const WHOLE: Stages = &[(SYSTEM, 40), (DESKTOP, 150), (DISK, 10), (AGENT, 10)];
const LAST: Stages = &[(AGENT, 10)];

/// Finds the image in `output` or builds it there; returns its folder.
pub(super) async fn build(options: &BuildOptions, output: &Path) -> anyhow::Result<PathBuf> {
    preflight::agent(&options.agent)?;
    let playbook = options.role.join("bake-image.yml");
    ensure!(
        playbook.is_file(),
        "{} is missing; name the folder that holds Mayfly's playbook with --role",
        playbook.display()
    );
    let role = read_role(&options.role)?;
    let agent = fs::read(&options.agent)
        .with_context(|| format!("cannot read the agent {}", options.agent.display()))?;
    let base_key = base_key(options, &role);
    let key = image_key(&base_key, &agent);

    fs::create_dir_all(output)
        .with_context(|| format!("cannot make the folder {}", output.display()))?;
    let output = &output
        .canonicalize()
        .with_context(|| format!("cannot use the folder {}", output.display()))?;
    let image = output.join(&key);
    if image.is_dir() && !options.force {
        return Ok(image);
    }
    let _lock = lock(output).await?;
    if image.is_dir() && !options.force {
        return Ok(image);
    }
    remove_remains(output)?;

    preflight::tools(&[
        ("cp", "coreutils"),
        ("debugfs", "e2fsprogs"),
        ("qemu-img", "qemu-utils"),
    ])?;
    let base = output.join(format!("base-{base_key}"));
    let whole = options.force || !base.is_dir();
    if whole {
        preflight::whole_build(options)?;
        preflight::disk(output, BASE_NEEDS)?;
    } else {
        preflight::disk(output, IMAGE_NEEDS)?;
    }

    let work = tempfile::Builder::new()
        .prefix(WORK_PREFIX)
        .tempdir_in(output)
        .with_context(|| format!("cannot make a folder in {}", output.display()))?;
    // The packages' own users pass through it.
    fs::set_permissions(work.path(), fs::Permissions::from_mode(0o755))?;
    let mut run = Run {
        log: output.join("build.log"),
        progress: Progress::new(
            if whole { WHOLE } else { LAST },
            output.join("build-times.json"),
        ),
    };
    fs::write(&run.log, "").with_context(|| format!("cannot write {}", run.log.display()))?;

    let steps = async {
        if whole {
            make_base(options, &role, work.path(), &base, &mut run).await?;
        }
        make_image(options, &agent, &key, work.path(), &base, &image, &mut run).await
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let stopped = tokio::select! {
        result = steps => {
            result?;
            None
        }
        _ = tokio::signal::ctrl_c() => Some("interrupted"),
        _ = terminate.recv() => Some("told to stop"),
    };
    if let Some(why) = stopped {
        remove_work(work.path()).await.context(why)?;
        bail!("{why}; nothing was kept of this build");
    }
    run.progress.finish();
    Ok(image)
}

/// First level of the cache: a file system without the agent, its kernel and its initrd.
async fn make_base(
    options: &BuildOptions,
    role: &Role,
    work: &Path,
    base: &Path,
    run: &mut Run,
) -> anyhow::Result<()> {
    let root = work.join("root");
    let playbook = work.join("ansible");
    write_role(role, &playbook)?;
    run.progress.begin(SYSTEM);
    let mut mmdebstrap = Command::new("unshare");
    mmdebstrap
        .args(OF_ITS_OWN)
        .args(["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"])
        .arg(format!("--components={}", options.suite.components()))
        .arg(format!("--keyring={}", options.suite.keyring().0))
        .args([
            // In Debian apt comes with the variant; in Ubuntu its priority is too low for that.
            "--include=apt,ca-certificates,python3,python3-apt",
            "--aptopt=APT::Install-Recommends \"false\"",
            "--aptopt=Acquire::Retries \"2\"",
            "--aptopt=Acquire::http::Timeout \"30\"",
            // Nobody reads them in a desktop that lives for hours; licences stay.
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
            "--dpkgopt=path-exclude=/usr/share/info/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            // /proc, /sys and the network are there for the role; mmdebstrap takes them away again.
            "--customize-hook=cd \"$MAYFLY_ROLE\" && exec ansible-playbook -i \"$1,\" bake-image.yml --tags image",
        ])
        .arg(options.suite.codename())
        .arg(&root)
        .args(&options.mirror)
        .env("MAYFLY_ROLE", &playbook)
        .env("ANSIBLE_CONFIG", playbook.join("ansible.cfg"))
        .env("ANSIBLE_LOCAL_TEMP", work.join("ansible-temporary"))
        .env("ANSIBLE_REMOTE_TEMP", "/tmp/.ansible")
        .env("ANSIBLE_NOCOLOR", "1")
        .env("LC_ALL", "C.UTF-8");
    run.tool(mmdebstrap, |line, progress| {
        if let Some(task) = line.strip_prefix("TASK [") {
            progress.detail(task.trim_end_matches(['*', ' ', ']']));
        } else if line.starts_with("PLAY [") {
            progress.begin(DESKTOP);
        } else if let Some(step) = line.strip_prefix("I: ") {
            progress.detail(step);
        }
    })
    .await
    .context(
        "the root folder could not be made. If no mirror was reached, name one with --mirror; if a package is missing, \
         the mirror lacks it",
    )?;

    run.progress.begin(DISK);
    // mmdebstrap leaves "uninitialized": systemd would take that for a first boot and apply its presets.
    fs::write(root.join("etc/machine-id"), "").context("cannot empty the machine id")?;
    // Newer than /usr, so that the first boot does not bring caches up to date that are (man systemd-update-done).
    for folder in ["etc", "var"] {
        fs::write(root.join(folder).join(".updated"), "")?;
    }
    let found = identity::found_in(&root);
    ensure!(
        found.is_empty(),
        "the image would give every desktop the same identity: {}",
        found.join(", ")
    );
    let level = work.join("base");
    fs::create_dir(&level)?;
    take_newest(&root.join("boot"), "vmlinuz-", &level.join("vmlinuz"))?;
    take_newest(&root.join("boot"), "initrd.img-", &level.join("initrd.img"))?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args([
            "-q", "-t", "ext4", "-L", "mayfly", "-m", "0", "-J", "size=64",
        ])
        // Otherwise every desktop's kernel would go on writing tables in its first minutes.
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg("-d")
        .arg(&root)
        .arg(level.join("disk.raw"))
        .arg(DISK_SIZE);
    run.tool(mke2fs, |_, _| {}).await?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    publish(&level, base)
}

/// Second level: the agent on top, as a qcow2 disk with its description.
async fn make_image(
    options: &BuildOptions,
    agent: &[u8],
    key: &str,
    work: &Path,
    base: &Path,
    image: &Path,
    run: &mut Run,
) -> anyhow::Result<()> {
    run.progress.begin(AGENT);
    let level = work.join("image");
    fs::create_dir(&level)?;
    for name in ["vmlinuz", "initrd.img"] {
        fs::copy(base.join(name), level.join(name))
            .with_context(|| format!("cannot copy {name}"))?;
    }
    let raw = work.join("disk.raw");
    let mut cp = Command::new("cp");
    cp.args(["--sparse=always", "--reflink=auto"])
        .arg(base.join("disk.raw"))
        .arg(&raw);
    run.tool(cp, |_, _| {}).await?;

    // debugfs puts a file in without mounting, which an ordinary user may not do. It always exits with 0.
    fs::write(work.join("mayfly-agent"), agent)?;
    fs::write(
        work.join("debugfs.cmd"),
        format!(
            "cd {AGENT_FOLDER}\nwrite mayfly-agent mayfly-agent\nset_inode_field mayfly-agent mode 0100755\n\
             set_inode_field mayfly-agent uid 0\nset_inode_field mayfly-agent gid 0\n\
             dump mayfly-agent written-agent\n"
        ),
    )?;
    let mut debugfs = Command::new("debugfs");
    debugfs
        .current_dir(work)
        .args(["-w", "-f", "debugfs.cmd", "disk.raw"]);
    run.tool(debugfs, |_, _| {}).await?;
    ensure!(
        fs::read(work.join("written-agent")).is_ok_and(|written| written == agent),
        "the agent could not be written into the disk image; see {}",
        run.log.display()
    );

    let mut qemu_img = Command::new("qemu-img");
    qemu_img
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(level.join("disk.qcow2"));
    run.tool(qemu_img, |_, _| {}).await?;
    let description = json!({
        "format": 1,
        "name": options.suite.image_name(),
        "key": key,
        "kernel": "vmlinuz",
        "initrd": "initrd.img",
        "disk": "disk.qcow2",
        "cmdline": CMDLINE,
        "memory_mib": 1536,
    });
    fs::write(
        level.join("image.json"),
        serde_json::to_vec_pretty(&description)?,
    )?;
    publish(&level, image)
}

/// The first level and what comes on top of it.
fn image_key(base_key: &str, agent: &[u8]) -> String {
    hex(Sha256::new()
        .chain_update(base_key)
        .chain_update(CMDLINE)
        .chain_update([0])
        .chain_update(agent))
}

/// Everything that the first level is made of, in one number.
fn base_key(options: &BuildOptions, role: &Role) -> String {
    let mut hash = Sha256::new()
        .chain_update(RECIPE)
        .chain_update([0])
        .chain_update(options.suite.codename())
        .chain_update([0]);
    for mirror in &options.mirror {
        hash = hash.chain_update(mirror).chain_update([0]);
    }
    for (name, content) in role {
        hash = hash
            .chain_update(name.as_os_str().as_encoded_bytes())
            .chain_update([0])
            .chain_update((content.len() as u64).to_le_bytes())
            .chain_update(content);
    }
    hex(hash)
}

/// The playbook's folder: names in it, and what they hold. Read once, so that the key is that of what was run.
type Role = BTreeMap<PathBuf, Vec<u8>>;

fn read_role(folder: &Path) -> anyhow::Result<Role> {
    // What else lies there, a site's inventory and vault for example, is nobody's business in an image.
    let part = |file: &PathBuf| {
        let name = file.strip_prefix(folder).unwrap_or(file);
        name.starts_with("roles")
            || ["ansible.cfg", "bake-image.yml", "image-version.yml"]
                .map(Path::new)
                .contains(&name)
    };
    files_below(folder)?
        .into_iter()
        .filter(part)
        .map(|file| {
            let content =
                fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let name = file.strip_prefix(folder).unwrap_or(&file).to_owned();
            Ok((name, content))
        })
        .collect()
}

fn write_role(role: &Role, folder: &Path) -> anyhow::Result<()> {
    for (name, content) in role {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// All files below a folder, sorted.
fn files_below(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn hex(hash: Sha256) -> String {
    data_encoding::HEXLOWER.encode(&hash.finalize())
}

/// Moves `boot/<prefix><version>` out of the root: the machine is started from outside.
fn take_newest(boot: &Path, prefix: &str, to: &Path) -> anyhow::Result<()> {
    let found = files_below(boot)?.into_iter().rfind(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    });
    let from = found.with_context(|| format!("the role installed no {prefix}* in /boot"))?;
    fs::rename(&from, to).with_context(|| format!("cannot move {}", from.display()))
}

/// Gives a finished folder its name. One with that name that is already there goes first (`--force`).
fn publish(from: &Path, to: &Path) -> anyhow::Result<()> {
    // Who runs desktops need not be who built the image, whatever the builder's umask.
    for file in files_below(from)? {
        fs::set_permissions(file, fs::Permissions::from_mode(0o644))?;
    }
    fs::set_permissions(from, fs::Permissions::from_mode(0o755))?;
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("cannot replace {}", to.display()))?;
    }
    fs::rename(from, to).with_context(|| format!("cannot name {}", to.display()))
}

const WORK_PREFIX: &str = "building-";

/// mmdebstrap mounts /proc and the like into the root folder, and apt gives dpkg a session of its own. With these flags of
/// `unshare`, mounts and processes go when the tool is killed.
const OF_ITS_OWN: [&str; 4] = ["--mount", "--pid", "--fork", "--kill-child"];

/// Removes the folder of a build whose tools were killed a moment ago: they may not have ended yet.
async fn remove_work(folder: &Path) -> anyhow::Result<()> {
    let mut tries = 50;
    loop {
        match fs::remove_dir_all(folder) {
            Err(error) if tries == 0 => {
                return Err(error)
                    .with_context(|| format!("{} could not be removed", folder.display()));
            }
            Err(_) => tries -= 1,
            Ok(()) => return Ok(()),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// One build at a time in a folder.
async fn lock(output: &Path) -> anyhow::Result<nix::fcntl::Flock<fs::File>> {
    use nix::fcntl::{Flock, FlockArg};
    let path = output.join("build.lock");
    let file =
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            eprintln!(
                "another build works in {}; waiting for it",
                output.display()
            );
            tokio::task::spawn_blocking(move || Flock::lock(file, FlockArg::LockExclusive))
                .await?
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Removes what a killed build left behind.
fn remove_remains(output: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(output)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
            fs::remove_dir_all(entry.path()).with_context(|| {
                format!(
                    "cannot remove {}, left by a build that was killed",
                    entry.path().display()
                )
            })?;
        }
    }
    Ok(())
}

/// Runs the tools of one build.
struct Run {
    log: PathBuf,
    progress: Progress,
}

impl Run {
    /// Runs a tool to its end, its output in the log. When this future is dropped, the tool and its children are killed.
    async fn tool(
        &mut self,
        mut command: Command,
        mut on_line: impl FnMut(&str, &mut Progress),
    ) -> anyhow::Result<()> {
        const LAST_WORDS: usize = 12;
        let name = command
            .as_std()
            .get_program()
            .to_string_lossy()
            .into_owned();
        let mut log = fs::File::options().append(true).open(&self.log)?;
        writeln!(log, "$ {:?}", command.as_std())?;
        let (read, write) = std::io::pipe()?;
        let mut child = command
            .env("PATH", preflight::path())
            .stdin(Stdio::null())
            .stdout(write.try_clone()?)
            .stderr(write)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        // It holds the pipe's writing end, and the reading below ends when nobody does.
        drop(command);
        let _group = Group(child.id());
        let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(read.into())?;
        let mut lines = BufReader::new(pipe).lines();
        let mut last = VecDeque::new();
        while let Some(line) = lines.next_line().await? {
            writeln!(log, "{line}")?;
            on_line(&line, &mut self.progress);
            if last.len() == LAST_WORDS {
                last.pop_front();
            }
            last.push_back(line);
        }
        let status = child.wait().await?;
        ensure!(
            status.success(),
            "{name} failed ({status}); its last words:\n{}\nall of them: {}",
            Vec::from(last).join("\n"),
            self.log.display()
        );
        Ok(())
    }
}

/// A tool's process group; killed when it is dropped.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(|pid| i32::try_from(pid).ok()) {
            // It usually is gone already.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: BuildOptions,
    }

    fn options(arguments: &[&str]) -> BuildOptions {
        Command::parse_from([&["build"], arguments].concat()).options
    }

    fn run_in(folder: &Path) -> Run {
        fs::write(folder.join("log"), "").unwrap();
        Run {
            log: folder.join("log"),
            progress: Progress::new(LAST, folder.join("times")),
        }
    }

    #[test]
    fn every_input_of_the_first_level_changes_its_key() {
        let role = |name: &str, content: &str| Role::from([(name.into(), content.into())]);
        let keys = [
            base_key(&options(&[]), &role("a", "b")),
            base_key(&options(&[]), &role("a", "c")),
            base_key(&options(&[]), &role("ab", "")),
            base_key(&options(&["--suite", "debian-13"]), &role("a", "b")),
            base_key(&options(&["--mirror", "http://m/"]), &role("a", "b")),
        ];
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(
            keys[0],
            base_key(&options(&["--force"]), &role("a", "b")),
            "how it is built is no input"
        );
    }

    #[tokio::test]
    async fn an_image_in_the_cache_is_found_and_another_agent_asks_for_another() {
        let folder = tempfile::tempdir().unwrap();
        let (role, agent, output) = (
            folder.path().join("role"),
            folder.path().join("agent"),
            folder.path().join("images"),
        );
        fs::create_dir(&role).unwrap();
        fs::write(role.join("bake-image.yml"), "[]").unwrap();
        fs::write(&agent, b"\x7fELF first").unwrap();
        let mut options = options(&[]);
        options.role.clone_from(&role);
        options.agent.clone_from(&agent);
        let key = image_key(
            &base_key(&options, &read_role(&role).unwrap()),
            b"\x7fELF first",
        );
        fs::create_dir_all(output.join(&key)).unwrap();
        let found = build(&options, &output).await.unwrap();
        assert_eq!(found, output.canonicalize().unwrap().join(&key));
        assert_ne!(key, image_key("another base", b"\x7fELF first"));
        assert_ne!(
            key,
            image_key(
                &base_key(&options, &read_role(&role).unwrap()),
                b"\x7fELF second"
            )
        );
    }

    #[tokio::test]
    async fn a_role_that_is_not_there_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let agent = folder.path().join("agent");
        fs::write(&agent, b"\x7fELF").unwrap();
        let mut options = options(&["--role", "/nowhere"]);
        options.agent = agent;
        let error = build(&options, folder.path()).await.unwrap_err();
        assert!(error.to_string().contains("--role"), "{error}");
    }

    #[tokio::test]
    async fn a_tool_that_fails_has_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = run_in(folder.path());
        let mut tool = super::Command::new("sh");
        tool.args(["-c", "echo first; echo it broke >&2; exit 3"]);
        let error = run.tool(tool, |_, _| {}).await.unwrap_err().to_string();
        assert!(error.contains("it broke") && error.contains("3"), "{error}");
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert!(log.contains("first"), "{log}");
    }

    /// Interrupts a tool as soon as `sleep <seconds>`, which it starts, runs; fails if that goes on.
    async fn interrupt(tool: super::Command, seconds: &str) {
        // A zombie has no command line.
        let asleep = || {
            let line = format!("sleep\0{seconds}\0");
            let processes = fs::read_dir("/proc").unwrap().flatten();
            processes
                .map(|process| fs::read(process.path().join("cmdline")).unwrap_or_default())
                .any(|found| found == line.as_bytes())
        };
        let pause = || tokio::time::sleep(Duration::from_millis(20));
        let folder = tempfile::tempdir().unwrap();
        let mut run = run_in(folder.path());
        tokio::select! {
            result = run.tool(tool, |_, _| {}) => panic!("it should still run: {result:?}"),
            () = async {
                while !asleep() {
                    pause().await;
                }
            } => {}
        }
        for _ in 0..500 {
            if !asleep() {
                return;
            }
            pause().await;
        }
        panic!("the tool's child still runs");
    }

    #[tokio::test]
    async fn an_interrupted_build_takes_its_tools_and_their_children_along() {
        let seconds = format!("1000.{}", std::process::id());
        let mut tool = super::Command::new("sh");
        tool.args(["-c", "sleep \"$0\" & wait", &seconds]);
        interrupt(tool, &seconds).await;
    }

    #[tokio::test]
    async fn and_what_has_a_session_of_its_own() {
        let as_root = |arguments: &[&str]| {
            let mut tool = super::Command::new("unshare");
            tool.arg("--map-root-user").args(OF_ITS_OWN).args(arguments);
            tool
        };
        if !as_root(&["true"]).status().await.unwrap().success() {
            eprintln!("this machine allows no user namespaces: not tested");
            return;
        }
        let seconds = format!("2000.{}", std::process::id());
        let tool = as_root(&["sh", "-c", "setsid sleep \"$0\" & wait", &seconds]);
        interrupt(tool, &seconds).await;
    }

    #[tokio::test]
    async fn a_folder_that_is_still_written_to_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("building-abc");
        fs::create_dir(&work).unwrap();
        let writer = std::thread::spawn({
            let work = work.clone();
            move || {
                let mut number = 0;
                while number < 2000 && fs::write(work.join(number.to_string()), "").is_ok() {
                    number += 1;
                }
            }
        });
        remove_work(&work).await.unwrap();
        writer.join().unwrap();
        assert!(!work.exists());
    }

    #[test]
    fn what_is_published_can_be_read_by_those_who_run_desktops() {
        let folder = tempfile::tempdir().unwrap();
        let (level, image) = (folder.path().join("level"), folder.path().join("image"));
        fs::create_dir(&level).unwrap();
        fs::write(level.join("disk.qcow2"), "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        // As with umask 077.
        fs::set_permissions(level.join("disk.qcow2"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&level, fs::Permissions::from_mode(0o700)).unwrap();
        publish(&level, &image).unwrap();
        assert_eq!(mode(&image), 0o755);
        assert_eq!(mode(&image.join("disk.qcow2")), 0o644);
    }

    #[test]
    fn what_a_killed_build_left_goes_with_the_next() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("building-abc/root/etc")).unwrap();
        fs::create_dir_all(folder.path().join("base-1")).unwrap();
        remove_remains(folder.path()).unwrap();
        assert!(!folder.path().join("building-abc").exists());
        assert!(folder.path().join("base-1").exists());
    }
}

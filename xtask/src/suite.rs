//! `test`, `bench`, `soak` and `chaos`: the stages, in order; the first that fails stops the run and is named.
//!
//! # Guarantees
//! * Everything a stage starts has its temporary folder below one folder of this run, named in its environment
//!   (`TMPDIR`). What is left of it at the end, process, socket or file, fails the run: counted from `/proc` and the
//!   file system, never from Mayfly's own records.
//! * The last line is `N passed, N failed`, summed from what the test runners said.

use crate::ansible;
use crate::cross;
use crate::guests;
use crate::house::House;
use crate::packages::{self, Purpose};
use crate::run::{self, Tally};
use crate::terraform;
use crate::tools;
use crate::ui;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Options of `cargo xtask test`.
#[derive(Args)]
pub(crate) struct TestArgs {
    /// Only these stages, and what they need; all without one. `list` names them
    stages: Vec<String>,
    /// Passed to the test programs, such as part of a test's name
    #[arg(last = true)]
    tests: Vec<String>,
}

/// Options of `cargo xtask bench` and `soak`, which the programs behind them read.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Passed on
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Options of `cargo xtask chaos`.
#[derive(Args)]
pub(crate) struct ChaosArgs {
    /// How long everything that can fail does
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Draws the faults of an earlier report
    #[arg(long)]
    seed: Option<u64>,
    /// A version from which the orchestrators are upgraded meanwhile: a commit of this repository
    #[arg(long)]
    older: Option<String>,
}

/// One run of the suite.
struct Suite<'a> {
    house: &'a House,
    tests: &'a [String],
    tally: Tally,
    /// Temporary folder of everything that this run starts.
    tmp: PathBuf,
    /// Where the programs are that this run starts.
    programs: PathBuf,
    built: Option<Vec<TestProgram>>,
    micro: Option<PathBuf>,
    desktop: Option<PathBuf>,
    /// A template that is plain, and the agent that Ansible puts into its machines.
    plain: Option<(PathBuf, PathBuf)>,
    /// A Python that has fakepve.
    fakepve: Option<PathBuf>,
    terraform: Option<terraform::Tools>,
    toxiproxy: Option<PathBuf>,
}

/// The crate whose tests cross crates, and its test programs that need the real desktop.
const LAB: &str = "mayfly-tests";
const REAL: &[&str] = &["desktop", DOMAIN];
/// The one of these with a domain, on a Proxmox site.
const DOMAIN: &str = "domain";
/// The test program with a Proxmox site.
const SITE: &str = "proxmox";
/// The test program in which everything fails.
const CHAOS: &str = "chaos";

/// What the control plane is measured beside.
const FLASK: &str = "flask==3.1.*";

/// A program of tests that cargo built.
#[derive(Clone)]
struct TestProgram {
    /// Its crate.
    package: String,
    /// Its target's name: that of the crate for unit tests, of the file for others.
    name: String,
    /// Folder of the crate, where tests run.
    folder: PathBuf,
    executable: PathBuf,
}

/// A stage's work.
type Work = fn(&mut Suite<'_>) -> Result<()>;

struct Stage {
    name: &'static str,
    what: &'static str,
    work: Work,
}

const STAGES: &[Stage] = &[
    Stage {
        name: "packages",
        what: "what the system must have",
        work: |_| {
            use Purpose::{Build, Cross, Image, Run, Test};
            packages::ensure(&[Build, Image, Run, Test, Cross])
        },
    },
    Stage {
        name: "fmt",
        what: "every file formatted",
        work: |suite| run::run(&mut suite.house.cargo(["fmt", "--all", "--check"])),
    },
    Stage {
        name: "ui",
        what: "types, component tests and build of the windows",
        work: |suite| ui::check_and_build(suite.house, &mut suite.tally),
    },
    Stage {
        name: "clippy",
        what: "no warning in the workspace",
        work: |suite| {
            ui::build(suite.house)?;
            let args = "clippy --workspace --all-targets --locked -- -D warnings";
            run::run(&mut suite.house.cargo(args.split(' ')))
        },
    },
    Stage {
        name: "build",
        what: "every program and every test",
        work: |suite| suite.build().map(drop),
    },
    Stage {
        name: "cross",
        what: "the launchers built for Windows and type-checked for macOS, without a warning",
        work: |suite| cross::check(suite.house),
    },
    Stage {
        name: "ansible",
        what: "roles and playbooks, by ansible-lint's profile for production",
        work: |suite| ansible::lint(suite.house),
    },
    Stage {
        name: "terraform",
        what: "the modules, against the real provider",
        work: |suite| terraform::check(suite.house, &suite.tmp, &mut suite.tally),
    },
    Stage {
        name: "micro-guest",
        what: "the static agent and the smallest machine that holds it",
        work: |suite| suite.micro_guest().map(drop),
    },
    Stage {
        name: "crates",
        what: "tests of each crate; the qemu provider on the micro guest, the Proxmox client on fakepve",
        work: |suite| {
            suite.fakepve()?;
            suite.run_tests(&[], |test| test.package != LAB)?;
            let args = "test --workspace --doc --locked";
            run::run_tests(&mut suite.house.cargo(args.split(' ')), &mut suite.tally)
        },
    },
    Stage {
        name: "scenarios",
        what: "the lab, and whole sessions on the micro guest",
        work: |suite| {
            suite.run_tests(&[], |test| {
                let elsewhere = [SITE, CHAOS].contains(&&*test.name) || REAL.contains(&&*test.name);
                test.package == LAB && !elsewhere
            })
        },
    },
    Stage {
        name: "chaos",
        what: "three orchestrators on one PostgreSQL, and everything that can fail does, for two minutes",
        work: |suite| {
            suite.toxiproxy()?;
            suite.run_tests(&[], |test| test.package == LAB && test.name == CHAOS)
        },
    },
    Stage {
        name: "proxmox",
        what: "the same by Terraform on the lab of Proxmox VE, with machines of the micro guest",
        work: |suite| {
            suite.fakepve()?;
            suite.terraform()?;
            // One site at a time: each has up to three machines on as many cores as there are.
            suite.run_tests(&["--test-threads=1"], |test| {
                test.package == LAB && test.name == SITE
            })
        },
    },
    Stage {
        name: "image",
        what: "the desktop image",
        work: |suite| suite.desktop().map(drop),
    },
    Stage {
        name: "desktop",
        what: "whole sessions on the real desktop, the demonstration among them",
        work: |suite| {
            suite.desktop()?;
            suite.real_desktop()
        },
    },
    Stage {
        name: "leftovers",
        what: "no process, socket or file of the tests is left",
        work: |suite| suite.leftovers(),
    },
];

pub(crate) fn test(house: &House, args: &TestArgs) -> Result<()> {
    if args.stages.iter().any(|name| name == "list") {
        for stage in STAGES {
            println!("{:<12} {}", stage.name, stage.what);
        }
        return Ok(());
    }
    if let Some(unknown) = args
        .stages
        .iter()
        .find(|name| STAGES.iter().all(|stage| stage.name != **name))
    {
        bail!("no stage is called {unknown:?}; `cargo xtask test list` names them");
    }
    let mut suite = Suite::new(house, &args.tests)?;
    let mut times: Vec<(&str, Duration)> = Vec::new();
    let mut failure = None;
    for stage in STAGES {
        if !args.stages.is_empty() && args.stages.iter().all(|name| name != stage.name) {
            continue;
        }
        println!("\n━━ {}: {}", stage.name, stage.what);
        let start = Instant::now();
        let outcome = (stage.work)(&mut suite);
        times.push((stage.name, start.elapsed()));
        if let Err(error) = outcome {
            failure = Some((stage.name, error));
            break;
        }
    }
    let left = match &failure {
        Some(_) => suite.leftovers().err(),
        None => None,
    };
    println!("\nstage            seconds");
    for (name, time) in &times {
        println!("{name:<16} {:>7.1}", time.as_secs_f64());
    }
    let total: Duration = times.iter().map(|(_, time)| *time).sum();
    println!("{:<16} {:>7.1}", "all", total.as_secs_f64());
    if let Some((name, error)) = &failure {
        println!("\nstage {name} failed: {error:#}");
        if let Some(left) = left {
            println!("{left:#}");
        }
        // A stage can fail without a failed test: a warning, a build.
        suite.tally.failed = suite.tally.failed.max(1);
    }
    let Tally { passed, failed } = suite.tally;
    println!("\n{passed} passed, {failed} failed");
    match failure {
        Some((name, _)) => bail!("stage {name} failed"),
        None => Ok(()),
    }
}

/// Measures, built as it is shipped, with everything it may use. `control-plane` first: that alone, which needs no machine.
pub(crate) fn bench(house: &House, args: &Arguments) -> Result<()> {
    if let Some(("control-plane", arguments)) = args
        .arguments
        .split_first()
        .map(|(first, rest)| (&**first, rest))
    {
        return control_plane(house, arguments);
    }
    with_desktop(house, |suite| {
        let build = "build --workspace --bins --release --locked";
        run::run(&mut house.cargo(build.split(' ')))?;
        suite.programs = house.target.join("release");
        suite.fakepve()?;
        suite.terraform()?;
        run::run(&mut suite.reporter("bench", &args.arguments)?)
    })
}

fn control_plane(house: &House, arguments: &[String]) -> Result<()> {
    packages::ensure(&[Purpose::Test])?;
    let mut suite = Suite::new(house, &[])?;
    let build = "build --workspace --bin mayfly-orchestrator --bin load --release --locked";
    run::run(&mut house.cargo(build.split(' ')))?;
    suite.programs = house.target.join("release");
    let flask = tools::venv(house, FLASK)?.join("bin/python");
    let outcome = run::run(
        suite
            .reporter("load", arguments)?
            .env("MAYFLY_FLASK", flask),
    );
    suite.leftovers().and(outcome)
}

/// Every case and kill point on the real desktop: first those of the test run's stage `desktop`, then those of the program
/// `soak`; with `--only PART` that part of the program alone.
pub(crate) fn soak(house: &House, args: &Arguments) -> Result<()> {
    with_desktop(house, |suite| {
        suite.fakepve()?;
        suite.terraform()?;
        suite.micro_guest()?;
        suite.plain = Some((guests::plain_template(house)?, guests::agent(house)?));
        if !args.arguments.iter().any(|word| word.starts_with("--only")) {
            suite.real_desktop()?;
        }
        let mut command = suite.reporter("soak", &args.arguments)?;
        run::run(command.args(["--commit", &commit(house)?]))
    })
}

/// Three orchestrators, and everything that can fail does, for as long as is said.
pub(crate) fn chaos(house: &House, args: &ChaosArgs) -> Result<()> {
    packages::ensure(&[Purpose::Test])?;
    let mut suite = Suite::new(house, &[])?;
    suite.toxiproxy()?;
    let build = "build --workspace --bin mayfly-orchestrator --bin chaos --locked";
    run::run(&mut house.cargo(build.split(' ')))?;
    let mut command = suite.reporter("chaos", &[])?;
    command.args(["--commit", &commit(house)?]);
    command.args(["--minutes", &args.minutes.to_string()]);
    if let Some(seed) = args.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(revision) = &args.older {
        command
            .args(["--older-commit", revision])
            .arg("--older")
            .arg(older(house, revision)?);
    }
    let outcome = run::run(&mut command);
    suite.leftovers().and(outcome)
}

/// The orchestrator as it was at that commit, built from there.
fn older(house: &House, revision: &str) -> Result<PathBuf> {
    let folder = house.target.join("older");
    let (tree, target) = (folder.join("tree"), folder.join("target"));
    let archive = folder.join("tree.tar");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    fs::create_dir_all(&tree)?;
    let mut git = house.command("git");
    git.args(["archive", "--format=tar", "--output"]);
    run::run(git.arg(&archive).arg(revision))?;
    // Of now: cargo builds what is newer than what it has.
    let mut tar = house.command("tar");
    run::run(
        tar.args(["--extract", "--touch", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(&tree),
    )?;
    let build = "build --package mayfly-orchestrator --bin mayfly-orchestrator --locked";
    let mut build = house.cargo(build.split(' '));
    run::run(build.current_dir(&tree).env("CARGO_TARGET_DIR", &target))?;
    Ok(target.join("debug/mayfly-orchestrator"))
}

/// What is tested, for reports.
fn commit(house: &House) -> Result<String> {
    let changed = run::output(house.command("git").args(["status", "--porcelain"]))?;
    let commit = run::output(house.command("git").args(["rev-parse", "HEAD"]))?;
    let commit = commit.trim();
    Ok(if changed.is_empty() {
        commit.to_owned()
    } else {
        format!("{commit} and uncommitted changes")
    })
}

/// Arguments of `lab`.
#[derive(clap::Args)]
pub(crate) struct LabArgs {
    /// Which lab
    #[arg(value_enum)]
    lab: LabName,
}

/// The labs there are.
#[derive(Clone, Copy, clap::ValueEnum)]
enum LabName {
    /// Proxmox VE's API with emulated machines behind it, and an Active Directory domain
    Proxmox,
}

/// The scenario of a lab, told as it happens.
pub(crate) fn lab(house: &House, LabArgs { lab }: &LabArgs) -> Result<()> {
    let LabName::Proxmox = lab;
    with_desktop(house, |suite| {
        suite.fakepve()?;
        suite.terraform()?;
        suite.run_tests(&["--nocapture"], |test| {
            test.package == LAB && test.name == DOMAIN
        })?;
        println!(
            "{}",
            house.root.join("target/reports/proxmox.json").display()
        );
        Ok(())
    })
}

/// Runs with the desktop image and everything installed, and leaves nothing.
fn with_desktop(house: &House, work: impl FnOnce(&mut Suite<'_>) -> Result<()>) -> Result<()> {
    use Purpose::{Build, Image, Run, Test};
    packages::ensure(&[Build, Image, Run, Test])?;
    let mut suite = Suite::new(house, &[])?;
    suite.desktop()?;
    let outcome = work(&mut suite);
    suite.leftovers().and(outcome)
}

impl<'a> Suite<'a> {
    fn new(house: &'a House, tests: &'a [String]) -> Result<Self> {
        // Short: unix sockets below it have 107 bytes for their whole path.
        let tmp = std::env::temp_dir().join(format!("mfl-{}", std::process::id()));
        fs::create_dir(&tmp).with_context(|| format!("making {}", tmp.display()))?;
        Ok(Self {
            house,
            tests,
            tally: Tally::default(),
            tmp,
            programs: house.target.join("debug"),
            built: None,
            micro: None,
            desktop: None,
            plain: None,
            fakepve: None,
            terraform: None,
            toxiproxy: None,
        })
    }

    /// Builds all at once: with fewer packages named, cargo would give shared crates other features and build them again.
    fn build(&mut self) -> Result<Vec<TestProgram>> {
        if let Some(built) = &self.built {
            return Ok(built.clone());
        }
        ui::build(self.house)?;
        let args =
            "build --workspace --all-targets --locked --message-format=json-render-diagnostics";
        let messages = run::output(&mut self.house.cargo(args.split(' ')))?;
        let built: Vec<_> = messages.lines().filter_map(test_program).collect();
        if built.is_empty() {
            bail!("cargo built no test program");
        }
        self.built = Some(built.clone());
        Ok(built)
    }

    fn run_tests(&mut self, options: &[&str], chosen: fn(&TestProgram) -> bool) -> Result<()> {
        let programs = self.build()?;
        self.micro_guest()?;
        let chosen: Vec<_> = programs.iter().filter(|program| chosen(program)).collect();
        if chosen.is_empty() {
            bail!("no test program is of this stage");
        }
        for program in chosen {
            println!("\n─ {} {}", program.package, program.name);
            let mut command = self.house.command(&program.executable);
            command
                .args(options)
                .args(self.tests)
                .current_dir(&program.folder)
                .env("CARGO_MANIFEST_DIR", &program.folder);
            self.environment(&mut command);
            run::run_tests(&mut command, &mut self.tally)
                .with_context(|| format!("{} {}", program.package, program.name))?;
        }
        Ok(())
    }

    fn real_desktop(&mut self) -> Result<()> {
        self.fakepve()?;
        self.terraform()?;
        // One at a time: two emulated desktops on two cores take more than twice as long.
        self.run_tests(&["--test-threads=1"], |test| {
            test.package == LAB && REAL.contains(&&*test.name)
        })
    }

    /// A program of the lab that writes a report.
    fn reporter(&self, name: &str, arguments: &[String]) -> Result<std::process::Command> {
        let mut command = self.house.command(self.programs.join(name));
        command
            .arg("--reports")
            .arg(self.house.reports()?)
            .args(arguments);
        self.environment(&mut command);
        Ok(command)
    }

    fn micro_guest(&mut self) -> Result<PathBuf> {
        if self.micro.is_none() {
            self.build()?;
            self.micro = Some(guests::micro_guest(self.house)?);
        }
        Ok(self.micro.clone().unwrap_or_default())
    }

    fn desktop(&mut self) -> Result<PathBuf> {
        if self.desktop.is_none() {
            self.build()?;
            self.desktop = Some(guests::image(self.house, &[])?);
        }
        Ok(self.desktop.clone().unwrap_or_default())
    }

    fn fakepve(&mut self) -> Result<()> {
        if self.fakepve.is_none() {
            self.fakepve = Some(tools::fakepve(self.house)?);
        }
        Ok(())
    }

    fn terraform(&mut self) -> Result<()> {
        if self.terraform.is_none() {
            self.terraform = Some(terraform::tools(self.house)?);
        }
        Ok(())
    }

    fn toxiproxy(&mut self) -> Result<()> {
        if self.toxiproxy.is_none() {
            self.toxiproxy = Some(tools::toxiproxy(self.house)?);
        }
        Ok(())
    }

    /// What tests find their tools by.
    fn environment(&self, command: &mut std::process::Command) {
        command
            .env("TMPDIR", &self.tmp)
            .env("MAYFLY_PROGRAMS", &self.programs)
            .env("MAYFLY_REPORTS", self.house.root.join("target/reports"));
        if let Some(folder) = &self.micro {
            command.env("MAYFLY_MICRO_GUEST", folder);
        }
        if let Some(folder) = &self.desktop {
            command.env("MAYFLY_DESKTOP_IMAGE", folder);
        }
        if let Some((template, agent)) = &self.plain {
            command
                .env("MAYFLY_PLAIN_TEMPLATE", template)
                .env("MAYFLY_AGENT", agent);
        }
        if let Some(python) = &self.fakepve {
            command.env("MAYFLY_FAKEPVE", python);
        }
        if let Some(program) = &self.toxiproxy {
            command.env("MAYFLY_TOXIPROXY", program);
        }
        if let Some(tools) = &self.terraform {
            command
                .env("MAYFLY_TOFU", &tools.program)
                .env("MAYFLY_PLUGINS", &tools.plugins);
        }
    }

    /// Fails if anything of this run is left; ends and removes it then, so that the next run begins clean.
    fn leftovers(&self) -> Result<()> {
        let processes = processes_of(&self.tmp);
        let mut left: Vec<String> = processes
            .iter()
            .map(|(pid, command)| format!("process {pid}: {command}"))
            .collect();
        left.extend(sockets_below(&self.tmp));
        left.extend(files_below(&self.tmp));
        for (pid, _) in &processes {
            let _ = run::run(std::process::Command::new("kill").args(["-KILL", &pid.to_string()]));
        }
        let _ = fs::remove_dir_all(&self.tmp);
        if left.is_empty() {
            println!("nothing is left in {}", self.tmp.display());
            return Ok(());
        }
        bail!("left over after the run:\n  {}", left.join("\n  "));
    }
}

impl Drop for Suite<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.tmp);
    }
}

/// The test program that a line of cargo's JSON output tells of.
fn test_program(line: &str) -> Option<TestProgram> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let manifest = Path::new(message["manifest_path"].as_str()?);
    // `path+file:///…/tests#mayfly-tests@0.1.0`, or `…/agent#0.1.0` where folder and crate have one name.
    let id = message["package_id"].as_str()?.rsplit_once('#')?;
    let package = match id.1.split_once('@') {
        Some((name, _)) => name,
        None => id.0.rsplit('/').next()?,
    };
    Some(TestProgram {
        package: package.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        folder: manifest.parent()?.to_owned(),
        executable: PathBuf::from(message["executable"].as_str()?),
    })
}

/// Processes with this path in their command line or environment.
fn processes_of(path: &Path) -> Vec<(u32, String)> {
    let needle = path.to_string_lossy().into_owned();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| {
            let read = |file: &str| {
                let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            let command = read("cmdline");
            (command.contains(&needle) || read("environ").contains(&needle))
                .then_some((pid, command))
        })
        .collect()
}

fn sockets_below(path: &Path) -> Vec<String> {
    let needle = path.to_string_lossy().into_owned();
    fs::read_to_string("/proc/net/unix")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|socket| socket.contains(&needle))
        .map(|socket| format!("socket {socket}"))
        .collect()
}

fn files_below(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .flat_map(|path| {
            let below = if path.is_dir() && !path.is_symlink() {
                files_below(&path)
            } else {
                Vec::new()
            };
            std::iter::once(format!("file {}", path.display())).chain(below)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_read_from_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///m/tests#mayfly-tests@0.1.0",
            "manifest_path":"/m/tests/Cargo.toml","target":{"kind":["test"],"name":"desktop"},
            "profile":{"test":true},"executable":"/t/debug/deps/desktop-1"}"#;
        let program = test_program(line).unwrap();
        assert_eq!(
            (program.package.as_str(), program.name.as_str()),
            (LAB, REAL[0])
        );
        assert_eq!(program.folder, Path::new("/m/tests"));

        let same_name = line.replace("tests#mayfly-tests@", "xtask#");
        assert_eq!(test_program(&same_name).unwrap().package, "xtask");
        assert!(test_program(&line.replace("\"test\":true", "\"test\":false")).is_none());
        assert!(test_program("not JSON").is_none());
    }
}

//! The Terraform modules: formatted, valid against the real provider's schema, and tested, by every tool that people use.
//!
//! OpenTofu and the provider are built from their Go modules; Terraform itself is used as well where it is installed.
//! The provider reaches both through a file system mirror, as it does where a site has no way out.

use crate::house::House;
use crate::run::{self, Tally};
use crate::tools;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Pinned in `terraform/proxmox/versions.tf` and in the `go.mod` below.
const PROVIDER: &str = "0.111.1";
/// The modules whose provider can be had here.
const MODULES: &[&str] = &["proxmox"];
/// Formatted only, and held to the same inputs.
const UNVERIFIED: &[&str] = &["proxmox-telmate"];
/// The inputs: one file, the same in every module.
const INPUTS: &str = "variables.tf";

/// What a run of a module needs.
#[derive(Clone)]
pub(crate) struct Tools {
    /// OpenTofu.
    pub(crate) program: PathBuf,
    /// A file system mirror with the provider.
    pub(crate) plugins: PathBuf,
}

/// Makes them, unless they are cached.
pub(crate) fn tools(house: &House) -> Result<Tools> {
    let program = tools::go_program(
        house,
        "terraform/opentofu",
        "github.com/opentofu/opentofu/cmd/tofu",
        "-X github.com/opentofu/opentofu/version.dev=no",
    )?;
    Ok(Tools {
        program,
        plugins: mirror(house)?,
    })
}

/// Checks every module with every tool.
pub(crate) fn check(house: &House, tmp: &Path, tally: &mut Tally) -> Result<()> {
    let Tools {
        program: tofu,
        plugins: mirror,
    } = tools(house)?;
    let modules = house.root.join("terraform");
    let inputs = |module: &str| {
        let path = modules.join(module).join(INPUTS);
        fs::read(&path).with_context(|| format!("reading {}", path.display()))
    };
    for module in UNVERIFIED {
        ensure!(
            inputs(module)? == inputs(MODULES[0])?,
            "terraform/{module}/{INPUTS} differs from that of {}: the inputs are one contract",
            MODULES[0]
        );
    }
    let folder = tmp.join("terraform");
    fs::create_dir_all(&folder)?;
    let settings = folder.join("cli.tfrc");
    fs::write(
        &settings,
        format!(
            "provider_installation {{\n  filesystem_mirror {{\n    path = {mirror:?}\n  }}\n}}\n"
        ),
    )?;
    let mut programs = vec![tofu];
    programs.extend(which("terraform"));
    for program in &programs {
        let run = |folder: &Path, args: &str| {
            let mut command = Command::new(program);
            command
                .args(args.split(' '))
                .current_dir(folder)
                .env("TF_CLI_CONFIG_FILE", &settings)
                .env("TF_IN_AUTOMATION", "1")
                .env("CHECKPOINT_DISABLE", "1");
            command
        };
        run::run(&mut run(&modules, "fmt -check -diff -recursive"))?;
        for module in MODULES {
            println!("\n─ {} {module}", program.display());
            // A copy: what these tools leave in a folder is nobody's source.
            let copy = folder.join(module);
            run::run(
                Command::new("cp")
                    .arg("-r")
                    .arg(modules.join(module))
                    .arg(&copy),
            )?;
            run::run(&mut run(
                &copy,
                "init -backend=false -input=false -no-color",
            ))?;
            run::run(&mut run(&copy, "validate -no-color"))?;
            run::run_tests(&mut run(&copy, "test -no-color"), tally)?;
            fs::remove_dir_all(&copy)?;
        }
    }
    fs::remove_dir_all(&folder).context("removing the copies")
}

/// A file system mirror with the provider, under the names of both registries.
fn mirror(house: &House) -> Result<PathBuf> {
    let provider = tools::go_program(
        house,
        "terraform/provider",
        "github.com/bpg/terraform-provider-proxmox",
        &format!("-X main.version={PROVIDER}"),
    )?;
    let mirror = provider.with_file_name("mirror");
    for registry in ["registry.terraform.io", "registry.opentofu.org"] {
        let platform = mirror.join(format!(
            "{registry}/bpg/proxmox/{PROVIDER}/linux_{}",
            arch()
        ));
        fs::create_dir_all(&platform)?;
        let place = platform.join(format!("terraform-provider-proxmox_v{PROVIDER}"));
        if !place.exists() {
            fs::hard_link(&provider, &place)
                .with_context(|| format!("making {}", place.display()))?;
        }
    }
    Ok(mirror)
}

/// This machine's processor, as Go calls it.
fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn which(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

//! `mayfly-orchestrator image build`: makes the golden image that desktops are overlays of.
//!
//! mmdebstrap makes a root folder, our Ansible role turns it into a desktop inside it (by chroot), `mke2fs` makes a file
//! system of it, and the agent is put into that last.
//!
//! # Guarantees
//! * An image folder is named by the key of all that went into it, and appears whole or not at all.
//! * Nothing that a copy must not share is in it (see [`identity`]): the build fails rather than publish a key.
//! * Two levels are cached: a changed agent costs seconds, a changed role or suite a whole build.
//! * What would fail late is checked first (see [`preflight`]).
//!
//! # Caveats
//! The packages are those of the day: the same inputs built again a month later give newer ones under the same key.
//! `--force` asks for that.

mod build;
mod identity;
mod preflight;
mod progress;

use anyhow::Context;
use std::path::PathBuf;

/// What can be done with images.
#[derive(Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// Build the desktop image, or find it in the cache; prints its folder
    Build(BuildOptions),
}

/// Options of `image build`.
#[derive(Clone, Debug, clap::Args)]
pub struct BuildOptions {
    /// Distribution
    #[arg(long, value_enum, default_value_t = Suite::Bookworm)]
    pub suite: Suite,
    /// Package mirror: an address, or a whole line of sources.list; may be repeated [default: the distribution's own,
    /// with its updates and security updates]
    #[arg(long)]
    pub mirror: Vec<String>,
    /// Folder that holds images and the build's cache [default: mayfly/images in the user's cache folder]
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// The agent to put in, linked statically
    #[arg(long, default_value = "/usr/lib/mayfly/mayfly-agent")]
    pub agent: PathBuf,
    /// Folder with the playbook bake-image.yml and its roles
    #[arg(long, default_value = "/usr/share/mayfly/ansible")]
    pub role: PathBuf,
    /// Build everything anew, even if it is in the cache
    #[arg(long)]
    pub force: bool,
}

/// A distribution that desktops can be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Debian 12
    #[value(alias = "debian-12")]
    Bookworm,
    /// Debian 13
    #[value(alias = "debian-13")]
    Trixie,
    /// Ubuntu 22.04
    #[value(alias = "ubuntu-22.04")]
    Jammy,
    /// Ubuntu 24.04
    #[value(alias = "ubuntu-24.04")]
    Noble,
}

impl Suite {
    /// The name that mirrors use.
    fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Jammy => "jammy",
            Self::Noble => "noble",
        }
    }

    /// The image's name for people.
    fn image_name(self) -> &'static str {
        match self {
            Self::Bookworm => "debian-12-xfce",
            Self::Trixie => "debian-13-xfce",
            Self::Jammy => "ubuntu-22.04-xfce",
            Self::Noble => "ubuntu-24.04-xfce",
        }
    }

    /// The parts of the archive that hold what the role installs.
    fn components(self) -> &'static str {
        match self {
            Self::Bookworm | Self::Trixie => "main",
            Self::Jammy | Self::Noble => "main,universe",
        }
    }

    /// Signs the archive: the file, and how to get it.
    fn keyring(self) -> (&'static str, &'static str) {
        match self {
            Self::Bookworm | Self::Trixie => (
                "/usr/share/keyrings/debian-archive-keyring.gpg",
                "apt install debian-archive-keyring",
            ),
            Self::Jammy | Self::Noble => (
                "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
                "apt install ubuntu-keyring (Debian 12 has no such package; the one of Debian 13 fits)",
            ),
        }
    }
}

/// Runs a subcommand of `image`.
///
/// # Errors
/// Say what is missing or what failed, and what to do; nothing is left behind but the cache and the log.
pub async fn run(command: ImageCommand) -> anyhow::Result<()> {
    let ImageCommand::Build(options) = command;
    if !nix::unistd::geteuid().is_root() {
        return preflight::run_again_in_a_user_namespace().await;
    }
    let output = match options.output.clone() {
        Some(output) => output,
        None => directories::BaseDirs::new()
            .context("no home folder is known; name a folder with --output")?
            .cache_dir()
            .join("mayfly/images"),
    };
    let image = build::build(&options, &output).await?;
    println!("{}", image.display());
    Ok(())
}

//! The orchestrator's one binary.

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use mayfly_api::DesktopName;
use mayfly_orchestrator::admin::{self, Resolution, Until};
use mayfly_orchestrator::config::Config;
use mayfly_orchestrator::drain::Rest;
use mayfly_orchestrator::list::{self, Which};
use mayfly_orchestrator::provider::CheckStatus;
use mayfly_orchestrator::provider::qemu::uplink;
use mayfly_orchestrator::store::words::Whose;
use mayfly_orchestrator::{doctor, image, last_words, reaper, receipt, serve, supervise, systemd};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

#[derive(Parser)]
#[command(name = "mayfly-orchestrator", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Takes sessions and makes their desktops, until SIGTERM or SIGINT
    Serve(ServeCommand),
    /// Says what is missing here, and what to do; exit code 1 if desktops cannot be made
    Doctor(DoctorCommand),
    /// Brings the database's schema up to date, and says from which version to which
    Migrate(ConfigFile),
    /// Copies the database into a new file, also while the service runs; PostgreSQL has pg_dump for that
    Backup(BackupCommand),
    /// Shows what a desktop that failed left to read: console, journal, the words of what made it
    Logs(AboutCommand),
    /// Shows what was checked to be gone when a desktop was removed, by whom, and when
    Receipt(AboutCommand),
    /// Shows the sessions that are not over, with their desktops, and what no desktop owns
    List(ListCommand),
    /// Takes no new sessions, says what is left, and if you like waits for it
    Drain(DrainCommand),
    /// Says what becomes of a desktop that could not be removed
    Resolve(ResolveCommand),
    /// Looks at once for what no desktop owns, and says what was found, put into quarantine, removed or held back
    Reap(ReapCommand),
    /// Keeps what no desktop owns from being removed
    Keep(KeepCommand),
    /// Desktop images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Holds one child process for the orchestrator
    #[command(hide = true)]
    Supervise(supervise::SuperviseCommand),
    /// Runs a machine with its network
    #[command(hide = true)]
    Uplink(uplink::UplinkCommand),
}

#[derive(Args)]
struct ConfigFile {
    /// The configuration; without it /etc/mayfly/orchestrator.toml if it exists
    #[arg(long, value_name = "FILE", env = "MAYFLY_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Args)]
struct ServeCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// Leave a desktop that could not be made for an hour, so that you can look at it (limits.keep_failed_s)
    #[arg(long)]
    keep_failed: bool,
    /// How the log looks: on stderr, or in systemd's journal, which it goes to by itself if that is where stderr goes
    #[arg(long, value_enum)]
    log: Option<LogFormat>,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people
    Plain,
    /// One JSON object a line
    Json,
    /// To systemd's journal, with MAYFLY_SESSION, MAYFLY_DESKTOP and the like as fields
    Journal,
}

#[derive(Args)]
struct DoctorCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// As a JSON array of checks
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BackupCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// Where to; there must be no such file
    to: PathBuf,
}

#[derive(Args)]
struct AboutCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// The id of a session, or the name of a desktop
    whose: Whose,
}

#[derive(Args)]
struct ListCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// Only those whose desktop could not be removed, with the reason
    #[arg(long)]
    stuck: bool,
    /// Only what no desktop owns or, in the last week, owned, and what became of it
    #[arg(long, conflicts_with = "stuck")]
    strays: bool,
}

#[derive(Args)]
struct ReapCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// As a JSON array, one report for each provider
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct KeepCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// The name that it has
    desktop: DesktopName,
    /// Does not keep it any more
    #[arg(long)]
    off: bool,
}

#[derive(Args)]
struct DrainCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// Ends every session now; without it they end by themselves
    #[arg(long)]
    end: bool,
    /// Waits until no session is left
    #[arg(long)]
    wait: bool,
    /// Takes sessions again
    #[arg(long, conflicts_with_all = ["end", "wait"])]
    off: bool,
}

#[derive(Args)]
struct ResolveCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// The desktop
    desktop: DesktopName,
    #[command(flatten)]
    how: How,
    /// With --gone: without asking the provider, since you have looked yourself
    #[arg(long, requires = "gone")]
    i_have_checked: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct How {
    /// Tries its removal again, as if for the first time
    #[arg(long)]
    retry: bool,
    /// Counts it as gone, if its provider does not list it any more
    #[arg(long)]
    gone: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        // These two live as long as a desktop and handle signals themselves: no runtime, no threads before them.
        Command::Supervise(command) => supervise::run(&command)?,
        Command::Uplink(command) => uplink::run(&command)?,
        Command::Image(command) => runtime()?.block_on(image::run(command))?,
        Command::Serve(command) => {
            begin_log(command.log)?;
            let mut config = Config::load(command.file.config.as_deref())?;
            if command.keep_failed && config.limits.keep_failed_s == 0 {
                config.limits.keep_failed_s = 3_600;
            }
            runtime()?.block_on(serve::run(config))?;
        }
        Command::Logs(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let text = runtime()?.block_on(last_words::show(&config, command.whose))?;
            std::io::stdout().write_all(text.as_bytes())?;
        }
        Command::Backup(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            runtime()?.block_on(serve::back_up(&config, &command.to))?;
        }
        Command::Receipt(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let text = runtime()?.block_on(receipt::show(&config, command.whose))?;
            std::io::stdout().write_all(text.as_bytes())?;
        }
        Command::List(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let lines = runtime()?.block_on(async {
                Ok::<_, anyhow::Error>(match (command.stuck, command.strays) {
                    (true, _) => list::lines(&config, Which::Stuck).await?,
                    (_, true) => list::strays(&config, true).await?,
                    _ => {
                        let sessions = list::lines(&config, Which::All).await?;
                        [sessions, list::strays(&config, false).await?].concat()
                    }
                })
            });
            lines?.iter().for_each(|line| say(line));
        }
        Command::Reap(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let reports = runtime()?.block_on(admin::reap_from_here(&config))?;
            let text = if command.json {
                format!("{}\n", serde_json::to_string_pretty(&reports)?)
            } else {
                reaper::told(&reports)
            };
            std::io::stdout().write_all(text.as_bytes())?;
        }
        Command::Keep(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let said = admin::keep_from_here(&config, command.desktop, !command.off);
            say(&runtime()?.block_on(said)?);
        }
        Command::Drain(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let rest = if command.end { Rest::End } else { Rest::Wait };
            let rest = (!command.off).then_some(rest);
            let until = if command.wait {
                Until::Over
            } else {
                Until::Told
            };
            runtime()?.block_on(admin::drain_from_here(&config, rest, until, say))?;
        }
        Command::Resolve(command) => {
            let config = Config::load(command.file.config.as_deref())?;
            let how = match (command.how.retry, command.i_have_checked) {
                (true, _) => Resolution::Retry,
                (false, true) => Resolution::GoneAsChecked,
                (false, false) => Resolution::Gone,
            };
            let said = admin::resolve_from_here(&config, command.desktop, how);
            say(&runtime()?.block_on(said)?);
        }
        Command::Doctor(command) => return examine(&command),
        Command::Migrate(file) => {
            let config = Config::load(file.config.as_deref())?;
            let done = runtime()?.block_on(serve::migrate(&config))?;
            std::io::stdout().write_all(done.as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line on standard output; nobody may be there to read it.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("no asynchronous runtime")
}

/// `MAYFLY_LOG` filters, as `tracing_subscriber::EnvFilter` reads it.
fn begin_log(wanted: Option<LogFormat>) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("MAYFLY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let journal = std::env::var("JOURNAL_STREAM").ok();
    let format = wanted.unwrap_or_else(|| {
        if systemd::reads_stderr(journal.as_deref(), std::io::stderr()) {
            LogFormat::Journal
        } else {
            LogFormat::Plain
        }
    });
    let lines = || {
        tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(false)
    };
    let layer = match format {
        LogFormat::Plain => lines().boxed(),
        LogFormat::Json => lines().json().boxed(),
        LogFormat::Journal => match tracing_journald::layer() {
            Ok(journal) => journal.with_field_prefix(Some("MAYFLY".to_owned())).boxed(),
            Err(_) if wanted.is_none() => lines().boxed(),
            Err(error) => return Err(error).context("systemd's journal cannot be written to"),
        },
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .init();
    Ok(())
}

fn examine(command: &DoctorCommand) -> anyhow::Result<ExitCode> {
    let config = Config::load(command.file.config.as_deref())?;
    let checks = runtime()?.block_on(doctor::examine(&config));
    let text = if command.json {
        format!("{}\n", serde_json::to_string_pretty(&checks)?)
    } else {
        doctor::report(&checks)
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(match doctor::verdict(&checks) {
        CheckStatus::Error => ExitCode::FAILURE,
        CheckStatus::Ok | CheckStatus::Warning => ExitCode::SUCCESS,
    })
}

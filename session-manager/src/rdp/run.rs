//! Starts a client and watches it.
//!
//! # Guarantees
//! * The client is in a process group of its own: it survives the launcher, and Ctrl-C in the launcher's terminal.
//! * It writes to a file, not to a pipe that would break with the launcher.
//! * [`Running::stop`] asks (SIGTERM; on Windows as the window's button would) and kills after two seconds.

#[cfg(windows)]
use super::windows::{self, CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW};
use super::{Client, ClientEnd, ClientTrouble, Flavour, end_of_freerdp, freerdp, microsoft};
use crate::view::RdpOptions;
use mayfly_api::{Credentials, RdpEndpoint};
use secrecy::ExposeSecret;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

const GRACE: Duration = Duration::from_secs(2);
/// What is kept of the client's words for the diagnostics, in bytes.
const TAIL: usize = 2000;

/// A running client.
#[derive(Debug)]
pub struct Running {
    child: Child,
    flavour: Flavour,
    log: PathBuf,
    cleanup: Cleanup,
}

/// What a client leaves that must go with it.
#[derive(Debug, Default)]
struct Cleanup {
    files: Vec<PathBuf>,
    #[cfg(windows)]
    credential: Option<windows::Credential>,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        for file in &self.files {
            // Holds no secret; a leftover is only untidy.
            let _ = std::fs::remove_file(file);
        }
        #[cfg(windows)]
        if let Some(credential) = &self.credential
            && let Err(error) = credential.remove()
        {
            tracing::warn!(%error, "the desktop's password stays in the Credential Manager until log-off");
        }
    }
}

/// Starts `client`. Its words go to a file in `folder` that is removed with [`Running`].
///
/// # Errors
/// [`ClientTrouble::NotStarted`] with the operating system's reason.
pub async fn start(
    client: &Client,
    endpoint: &RdpEndpoint,
    credentials: &Credentials,
    title: &str,
    options: &RdpOptions,
    folder: &Path,
) -> Result<Running, ClientTrouble> {
    let failed = |e: std::io::Error| ClientTrouble::NotStarted {
        path: client.path.display().to_string(),
        reason: e.to_string(),
    };
    let mut cleanup = Cleanup::default();
    std::fs::create_dir_all(folder).map_err(failed)?;
    // One for each desktop: a person may have two launchers.
    let log = folder.join(format!("rdp-client-{title}.log"));
    let output = std::fs::File::create(&log).map_err(failed)?;
    cleanup.files.push(log.clone());
    let mut rdp_file = |text: &str| {
        let path = folder.join(format!("{title}.rdp"));
        crate::settings::write_atomically(&path, text.as_bytes())?;
        cleanup.files.push(path.clone());
        std::io::Result::Ok(path)
    };
    let mut command = Command::new(&client.path);
    let mut stdin = None;
    match client.flavour {
        Flavour::FreeRdp2 | Flavour::FreeRdp3 => {
            let made = freerdp::freerdp_command(client, endpoint, credentials, title, options);
            command.args(&made.args);
            stdin = Some(made.stdin);
        }
        Flavour::Mstsc => {
            let plan = microsoft::mstsc_plan(endpoint, credentials, options);
            command.arg(rdp_file(&plan.file).map_err(failed)?);
            #[cfg(windows)]
            if !plan.password.expose_secret().is_empty() {
                let credential = windows::Credential::of(&plan).map_err(failed)?;
                // Before it is written: half of it must go as well.
                cleanup
                    .credential
                    .insert(credential)
                    .write(&plan)
                    .map_err(failed)?;
            }
        }
        Flavour::WindowsApp => {
            let plan = microsoft::macos_plan(endpoint, credentials, options);
            command.args(&plan.open_args);
            command.arg(rdp_file(&plan.file).map_err(failed)?);
        }
    }
    command
        .stdin(if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(output.try_clone().map_err(failed)?)
        .stderr(output);
    #[cfg(unix)]
    command.process_group(0);
    #[cfg(windows)]
    command.creation_flags(CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW);
    let mut child = command.spawn().map_err(failed)?;
    if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
        // A client that ends at once does not read; its exit code says why.
        let _ = pipe.write_all(text.expose_secret().as_bytes()).await;
    }
    Ok(Running {
        child,
        flavour: client.flavour,
        log,
        cleanup,
    })
}

impl Running {
    /// Waits for its end. Cancel-safe.
    ///
    /// # Returns
    /// How it ended, and its last words.
    pub async fn wait(&mut self) -> (ClientEnd, String) {
        let status = self.child.wait().await;
        let tail = self.tail();
        let end = match status {
            Ok(status) => self.end(status, &tail),
            Err(_) => ClientEnd::Unknown(-1),
        };
        (end, tail)
    }

    /// Ends it: politely, then by force.
    pub async fn stop(mut self) {
        self.ask();
        if tokio::time::timeout(GRACE, self.child.wait())
            .await
            .is_err()
        {
            self.force().await;
        }
        drop(self.cleanup);
    }

    fn end(&self, status: ExitStatus, words: &str) -> ClientEnd {
        #[cfg(unix)]
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        #[cfg(not(unix))]
        let signal = None;
        match self.flavour {
            Flavour::FreeRdp2 | Flavour::FreeRdp3 => end_of_freerdp(status.code(), signal, words),
            // Microsoft's clients have no documented codes: any end is a closed client.
            Flavour::Mstsc | Flavour::WindowsApp => match signal {
                Some(signal) => ClientEnd::Killed(signal),
                None => ClientEnd::Closed,
            },
        }
    }

    fn tail(&self) -> String {
        let words = std::fs::read(&self.log).unwrap_or_default();
        let from = words.len().saturating_sub(TAIL);
        String::from_utf8_lossy(&words[from..]).into_owned()
    }

    #[cfg(unix)]
    fn signal(&self, signal: nix::sys::signal::Signal) {
        use nix::unistd::Pid;
        // Not reaped yet, so the number is still this group's.
        if let Some(pid) = self.child.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = nix::sys::signal::killpg(Pid::from_raw(pid), signal);
        }
    }

    #[cfg(unix)]
    fn ask(&self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
    }

    #[cfg(unix)]
    async fn force(&mut self) {
        self.signal(nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait().await;
    }

    /// Without `/F`, `taskkill` closes the window as its button would.
    #[cfg(windows)]
    fn ask(&self) {
        if let Some(id) = self.child.id() {
            let _ = Command::new("taskkill")
                .args(["/PID", &id.to_string()])
                .creation_flags(CREATE_NO_WINDOW)
                .spawn();
        }
    }

    #[cfg(windows)]
    async fn force(&mut self) {
        let _ = self.child.kill().await;
    }
}

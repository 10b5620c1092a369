//! Which RDP client this machine has.

use super::ClientTrouble;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// The sort of a client, which decides its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// `FreeRDP` 2.x.
    FreeRdp2,
    /// `FreeRDP` 3.x or later.
    FreeRdp3,
    /// Microsoft's client in Windows.
    Mstsc,
    /// Microsoft's "Windows App" on macOS.
    WindowsApp,
}

/// A client that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its program.
    pub path: PathBuf,
    /// Its sort.
    pub flavour: Flavour,
    /// What it calls its version; empty for Microsoft's.
    pub version: String,
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.path.display(), self.version)
    }
}

/// Names in order of preference: the SDL client speaks Wayland, 3.x before 2.x.
const FREERDP: [&str; 5] = [
    "sdl-freerdp3",
    "sdl-freerdp",
    "xfreerdp3",
    "xfreerdp",
    "xfreerdp2",
];
/// Where Homebrew puts programs: not in the `PATH` of an app started from the Finder.
const HOMEBREW: &str = "/opt/homebrew/bin:/usr/local/bin";
const WINDOWS_APP: &str = "/Applications/Windows App.app";
/// `--version` answers in a fifth of a second; a client that hangs is of no use.
const PATIENCE: Duration = Duration::from_secs(5);

/// The client at `chosen`, or the best one found.
///
/// # Errors
/// [`ClientTrouble::NotFound`]; [`ClientTrouble::Unusable`] if the chosen one does not answer like a client.
pub async fn find(chosen: Option<&str>) -> Result<Client, ClientTrouble> {
    if let Some(path) = chosen {
        return examine(Path::new(path)).await;
    }
    if cfg!(windows) {
        return microsoft("mstsc.exe", Flavour::Mstsc);
    }
    let mut refused = None;
    for name in FREERDP {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut path = path.into_string().unwrap_or_default();
        if cfg!(target_os = "macos") {
            path = format!("{path}:{HOMEBREW}");
        }
        let Ok(found) = which::which_in(name, Some(path), ".") else {
            continue;
        };
        match examine(&found).await {
            Ok(client) => return Ok(client),
            Err(trouble) => refused = refused.or(Some(trouble)),
        }
    }
    if cfg!(target_os = "macos") && Path::new(WINDOWS_APP).exists() {
        return Ok(Client {
            path: PathBuf::from("/usr/bin/open"),
            flavour: Flavour::WindowsApp,
            version: String::new(),
        });
    }
    Err(refused.unwrap_or_else(|| ClientTrouble::NotFound {
        looked_for: FREERDP.join(", "),
    }))
}

fn microsoft(name: &str, flavour: Flavour) -> Result<Client, ClientTrouble> {
    let path = which::which(name).map_err(|_| ClientTrouble::NotFound {
        looked_for: name.to_owned(),
    })?;
    Ok(Client {
        path,
        flavour,
        version: String::new(),
    })
}

/// Asks a program which `FreeRDP` it is.
async fn examine(path: &Path) -> Result<Client, ClientTrouble> {
    let unusable = |reason: String| ClientTrouble::Unusable {
        path: path.display().to_string(),
        reason,
    };
    if path
        .file_stem()
        .is_some_and(|name| name.eq_ignore_ascii_case("mstsc"))
    {
        return microsoft(&path.to_string_lossy(), Flavour::Mstsc);
    }
    let mut command = tokio::process::Command::new(path);
    command
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    #[cfg(windows)]
    command.creation_flags(super::windows::CREATE_NO_WINDOW);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| unusable("it does not answer --version".to_owned()))?
        .map_err(|e| unusable(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    match version(&text) {
        Some((flavour, version)) => Ok(Client {
            path: path.to_owned(),
            flavour,
            version,
        }),
        None if text.contains("open display") => {
            Err(unusable("there is no graphical display".to_owned()))
        }
        None => Err(unusable("it does not say that it is FreeRDP".to_owned())),
    }
}

/// Reads the answer to `--version`: `This is FreeRDP version 2.11.7 (2.11.7)`.
fn version(text: &str) -> Option<(Flavour, String)> {
    let rest = text.split("This is FreeRDP version ").nth(1)?;
    let version: String = rest.split_whitespace().next()?.to_owned();
    let major: u32 = version.split('.').next()?.parse().ok()?;
    let flavour = match major {
        2 => Flavour::FreeRdp2,
        3.. => Flavour::FreeRdp3,
        _ => return None,
    };
    Some((flavour, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_decides_the_flavour() {
        let of = |text| version(text);
        assert_eq!(
            of("This is FreeRDP version 2.11.7 (2.11.7)\n"),
            Some((Flavour::FreeRdp2, "2.11.7".into()))
        );
        assert_eq!(
            of("This is FreeRDP version 3.15.0-dev (n/a)"),
            Some((Flavour::FreeRdp3, "3.15.0-dev".into()))
        );
        assert_eq!(of("This is FreeRDP version 1.1.0"), None);
        assert_eq!(of("GNU coreutils"), None);
    }

    #[tokio::test]
    async fn a_chosen_program_that_is_no_client_is_refused_with_its_path() {
        for path in ["/bin/true", "/nonexistent/xfreerdp"] {
            let trouble = find(Some(path)).await.unwrap_err();
            assert!(
                matches!(&trouble, ClientTrouble::Unusable { path: p, .. } if p == path),
                "{trouble}"
            );
        }
    }
}

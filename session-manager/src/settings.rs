//! The settings file: `settings.toml` in the person's configuration folder.
//!
//! # Guarantees
//! * An unknown key or a wrong value is refused with its place in the file, and the file is left as it is.
//! * Saving is atomic: a crash leaves the old file or the new one. A file that could not be read is kept
//!   beside the new one as `settings.toml.refused`.

use crate::view::{Message, Settings};
use mayfly_api::client::Client;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The languages of the catalogue.
pub const LANGUAGES: [&str; 2] = ["en", "fr"];

/// Why settings cannot be read or saved.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file is not what it should be.
    #[error("{path} cannot be used: {reason}. Correct it or remove it")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place.
        reason: String,
    },
    /// Not an orchestrator's address.
    #[error("{reason}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A language without a catalogue.
    #[error("language is {0:?}; it can be \"en\", \"fr\" or absent")]
    Language(String),
    /// The file system said no.
    #[error("{path} cannot be {what}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        what: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The launcher is leaving.
    #[error("the launcher has stopped")]
    Stopped,
}

impl SettingsError {
    /// Words for the person who wants to save.
    #[must_use]
    pub fn words(&self) -> Message {
        match self {
            Self::Address { address, .. } => {
                Message::new("settings-not-an-address").text("address", address)
            }
            other => Message::new("settings-not-saved").text("reason", other),
        }
    }
}

/// Where the launcher keeps its files.
#[derive(Clone, Debug)]
pub struct Places {
    /// The settings.
    pub config_dir: PathBuf,
    /// What survives a crash: ids of live sessions, logs. No secrets.
    pub data_dir: PathBuf,
}

impl Places {
    /// The person's own folders; `MAYFLY_CONFIG_DIR` and `MAYFLY_DATA_DIR` replace them.
    #[must_use]
    pub fn of_person() -> Option<Self> {
        let dirs = directories::ProjectDirs::from("", "", "mayfly");
        let place = |variable: &str, default: Option<PathBuf>| {
            std::env::var_os(variable)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
                .or(default)
        };
        Some(Self {
            config_dir: place(
                "MAYFLY_CONFIG_DIR",
                dirs.as_ref().map(|d| d.config_dir().to_owned()),
            )?,
            data_dir: place(
                "MAYFLY_DATA_DIR",
                dirs.as_ref().map(|d| d.data_local_dir().to_owned()),
            )?,
        })
    }

    /// The settings file.
    #[must_use]
    pub fn settings_file(&self) -> PathBuf {
        self.config_dir.join("settings.toml")
    }

    /// Where log files go.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.data_dir.join("log")
    }
}

/// Reads the settings; a file that does not exist means the defaults.
///
/// # Errors
/// [`SettingsError::Refused`] with the place in the file; [`SettingsError::Io`].
pub fn load(path: &Path) -> Result<Settings, SettingsError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Settings::default()),
        Err(source) => {
            return Err(SettingsError::Io {
                path: path.to_owned(),
                what: "read",
                source,
            });
        }
    };
    let refused = |reason: String| SettingsError::Refused {
        path: path.to_owned(),
        reason,
    };
    let settings: Settings = toml::from_str(&text).map_err(|e| {
        // Its first line names the place; the drawing that follows needs a terminal's font.
        let whole = e.to_string();
        let place = whole.lines().next().unwrap_or_default();
        refused(format!("{place}: {}", e.message()))
    })?;
    check(&settings).map_err(|e| refused(e.to_string()))?;
    Ok(settings)
}

/// Whether the values make sense.
///
/// # Errors
/// [`SettingsError::Address`], [`SettingsError::Language`].
pub fn check(settings: &Settings) -> Result<(), SettingsError> {
    Client::new(&settings.orchestrator).map_err(|e| SettingsError::Address {
        address: settings.orchestrator.clone(),
        reason: e.to_string(),
    })?;
    match settings.language.as_deref() {
        Some(tag) if !LANGUAGES.contains(&tag) => Err(SettingsError::Language(tag.to_owned())),
        _ => Ok(()),
    }
}

/// Writes the settings.
///
/// # Errors
/// As [`check`], or [`SettingsError::Io`]; the old file stays.
pub fn save(path: &Path, settings: &Settings) -> Result<(), SettingsError> {
    check(settings)?;
    let failed = |source| SettingsError::Io {
        path: path.to_owned(),
        what: "written",
        source,
    };
    let text = toml::to_string(settings).map_err(|e| failed(std::io::Error::other(e)))?;
    if matches!(load(path), Err(SettingsError::Refused { .. })) {
        std::fs::rename(path, path.with_extension("toml.refused")).map_err(failed)?;
    }
    write_atomically(path, text.as_bytes()).map_err(failed)
}

/// Writes a whole file beside the old one, then takes its place.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let fresh = path.with_extension(format!("new.{}", std::process::id()));
    let written = std::fs::File::create(&fresh)
        .and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&fresh, path));
    if written.is_err() {
        // The old file still stands; what could not be completed is of no use.
        let _ = std::fs::remove_file(&fresh);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Countdown;

    #[test]
    fn no_file_means_the_defaults_and_what_is_saved_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/settings.toml");
        assert_eq!(load(&path).unwrap(), Settings::default());
        let mut settings = Settings {
            countdown: Countdown::TwoMinutes,
            language: Some("fr".into()),
            ..Settings::default()
        };
        settings.rdp.client = Some("/usr/bin/xfreerdp".into());
        save(&path, &settings).unwrap();
        assert_eq!(load(&path).unwrap(), settings);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1
        );
    }

    #[test]
    fn what_a_file_leaves_out_is_as_usual() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings.toml");
        std::fs::write(&path, "[rdp]\nsound = true\n").unwrap();
        let mut usual = Settings::default();
        usual.rdp.sound = true;
        assert!(usual.rdp.clipboard);
        assert_eq!(load(&path).unwrap(), usual);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_file_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("settings.toml");
        let text = "countdown = \"30s\"\ncolour = \"blue\"\n";
        std::fs::write(&path, text).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert!(
            error.contains("colour") && error.contains("line 2"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        save(&path, &Settings::default()).unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("settings.toml.refused")).unwrap(),
            text
        );
    }

    #[test]
    fn senseless_values_are_refused() {
        for (orchestrator, language) in [
            ("ftp://x", None),
            ("", None),
            ("http://127.0.0.1:5000", Some("de")),
        ] {
            let settings = Settings {
                orchestrator: orchestrator.into(),
                language: language.map(str::to_owned),
                ..Settings::default()
            };
            assert!(check(&settings).is_err(), "{orchestrator} {language:?}");
        }
    }
}
